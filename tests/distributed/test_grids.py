"""Every grid of tensor, context and data parallel ranks computes what one process computes."""
import pytest
from launch import results

# processes: tp,cp
GRIDS = {
    1: ["1,1"],
    2: ["2,1", "1,2", "1,1"],
    3: ["1,3"],
    4: ["4,1", "1,4", "2,2", "2,1", "1,2"],
    8: ["2,2"],
}
LIMITS = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def errors():
    errors = {}
    for processes, grids in GRIDS.items():
        errors |= results(processes, "grids.py", *grids)
    return errors


def table(errors: dict) -> str:
    """One line a grid and model, masked: a Llama whose documents do not see each other; of Llama's
    other two the worse of tied and untied embeddings."""
    lines = ["| tp, cp, dp | model | type | loss | gradient norm | gradients | weights after 3 |",
             "|---|---|---|---|---|---|---|"]
    for key, found in errors.items():
        grid, dtype, model = key.split()
        if model == "untied":
            continue
        if model == "tied":
            untied = errors[f"{grid} {dtype} untied"]
            found = {what: max(error, untied[what]) for what, error in found.items()}
            model = "llama"
        worst = " | ".join(f"{error:.1e}" for error in found.values())
        lines.append(f"| {grid.replace(',', ', ')} | {model} | {dtype} | {worst} |")
    return "\n".join(lines)


def test_every_grid_equals_one_process(errors, capsys):
    """Norm gradients not summed over tp, a loss averaged by rank, labels lost at borders, a shard
    updated twice."""
    with capsys.disabled():
        print("\n" + table(errors))
    # two types of three Llamas on every grid, and of Qwen3 and SmolLM3 on three
    assert len(errors) == 6 * sum(map(len, GRIDS.values())) + 4 * 3
    for key, found in errors.items():
        assert max(found.values()) <= LIMITS[key.split()[1]], (key, found)
