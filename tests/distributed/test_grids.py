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
    """One line a grid, the worse of tied and untied embeddings."""
    lines = ["| tp, cp, dp | type | loss | gradient norm | gradients | weights after 3 steps |",
             "|---|---|---|---|---|---|"]
    for key, tied in errors.items():
        grid, dtype, embeddings = key.split()
        if embeddings == "tied":
            untied = errors[f"{grid} {dtype} untied"]
            worst = [f"{max(tied[what], untied[what]):.1e}" for what in tied]
            lines.append(f"| {grid.replace(',', ', ')} | {dtype} | {' | '.join(worst)} |")
    return "\n".join(lines)


def test_every_grid_equals_one_process(errors, capsys):
    """Norm gradients not summed over tp, a loss averaged by rank, labels lost at borders, a shard
    updated twice."""
    with capsys.disabled():
        print("\n" + table(errors))
    assert len(errors) == 4 * sum(map(len, GRIDS.values()))
    for key, found in errors.items():
        assert max(found.values()) <= LIMITS[key.split()[1]], (key, found)
