"""tools.experiment and tools.report: one experiment end to end at toy size, killed and continued;
every command of all others; the statistics against numbers worked by hand."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import eval_niah
import sft
import train
from eval_niah import summary
from tools import experiment, report, variants
from tools.experiment import Record
from tools.variants import EXPERIMENTS, MODEL_EXPERIMENTS, Cell, Table, runs_of

PARSERS = {"train.py": train.stage1_parser, "sft.py": sft.stage2_parser,
           "eval_niah.py": eval_niah.parser}
ALL = EXPERIMENTS | {f"model {name}": tables for name, tables in MODEL_EXPERIMENTS.items()}


def commands():
    """All that any experiment runs, each once."""
    made = [variants.TEXT, variants.DOCUMENTS, *map(variants.base_model, variants.BASES),
            variants.MODEL_TEXT]
    runs = made + [run for tables in ALL.values() for run in runs_of(tables)]
    return {command: None for run in runs for command in run}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What {...} stands for, and what commands look for before they run."""
    place = tmp_path_factory.mktemp("places")
    names = ["text/corpus", "text/ruler.jsonl", "data", "bases", "run/tokenizer", "model"]
    names += [f"data/{word.partition('/')[2].partition('=')[0]}" for command in commands()
              for word in command.split() if word.startswith("{data}/")]
    for name in names:
        (place / name).mkdir(parents=True, exist_ok=True)
    size = variants.MODEL_SIZES["full"] | variants.SIZES["full"]
    paths = {name: place / name for name in ("run", "text", "data", "bases", "model")}
    return size | paths | {"seed": 7, "packages": place}


def options_of(command, places):
    program, *words = command.format(**places).split()
    parser = PARSERS.get(program) or importlib.import_module(program).parser
    return program, parser().parse_args(words)


@pytest.mark.parametrize("command", commands())
def test_every_option_exists(command, places):
    program, options = options_of(command, places)
    if program == "train.py" and options.model != places["model"]:
        assert options.batch_size * options.sequence_length in (16 * 64, 16 * 128, 2048)
    if "--seed" in command:
        assert options.seed == (9007 if "--haystack" in command else 7)
    assert "  " not in command


@pytest.mark.parametrize("name", ALL)
def test_every_cell_finds_its_value_in_what_its_run_measures(name, places, tmp_path):
    """Results as the programs write them, of the lengths, depths, stretches that are asked for."""
    for number, run in enumerate(runs_of(ALL[name])):
        place = tmp_path / str(number)
        place.mkdir()
        for command in run:
            program, options = options_of(command, places)
            if options.out.suffix in (".json", ".jsonl"):
                (place / options.out.name).write_text(written(program, options))
        values = experiment.measured(place)
        wanted = [cell.value.format(**places) for table in ALL[name]
                  for cells in table.rows.values() for cell in cells.values() if cell.run == run]
        assert wanted
        assert set(wanted) <= values.keys()


def written(program, options):
    """What a program writes to its --out."""
    if program == "tools.answer":
        tasks = ("niah_single_2", "niah_multikey_1", "vt")
        answers = [{"task": task, "length": "65536", "score": 0.5} for task in tasks]
        return "".join(json.dumps(line) + "\n" for line in ({"settings": 1}, *answers))
    return json.dumps(results_of(program, options))


def results_of(program, options):
    if program == "tools.perplexity":
        edges = np.linspace(0, options.lengths, options.buckets + 1).astype(int).tolist()
        return {"edges": edges, "loss": [1.0] * options.buckets}
    prompts = [{"correct": True}] * options.samples
    records = {(length, round(depth, 6)): prompts for length in options.lengths
               for depth in np.linspace(0, 1, options.depths).tolist()}
    if program == "tools.needle_pairs":
        from tools.needle_pairs import PAIRS
        return {"twins": {name: summary(records) for name in PAIRS[options.pair][1]}}
    return summary(records)


@pytest.mark.parametrize("name", ALL)
def test_rows_have_the_same_columns_and_differ(name):
    for table in ALL[name]:
        columns = list(table.rows[table.reference])
        assert all(list(cells) == columns for cells in table.rows.values())
        cells = [cell for row in table.rows.values() for cell in row.values()]
        assert len(set(cells)) == len(cells)


# -------------------------------------------------------------------------------------- statistics


def test_intervals_are_those_worked_by_hand():
    """1 to 5: deviations 2, 1, 0, 1, 2, so s = sqrt(10 / 4), and 2.776 s / sqrt(5) = 1.963."""
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * (10 / 4) ** 0.5 / 5**0.5)
    assert half == pytest.approx(1.963, abs=5e-4)
    # two seeds: s = |a - b| / sqrt(2), half = 12.706 |a - b| / 2
    assert report.interval([10.0, 14.0]) == pytest.approx((12, 12.706 * 2))
    assert report.interval([5.0, 5.0, 5.0]) == (5, 0)
    with pytest.raises(ValueError, match="1 seed has no spread"):
        report.interval([1.0])


def test_a_pair_of_rows_is_compared_seed_by_seed():
    """Both spread by 9 points and more, their differences, 4, 5 and 3, by 1: a difference."""
    a, b = [5.0, 7.0, 12.0], [1.0, 2.0, 9.0]
    difference = report.paired(a, b)
    assert difference == pytest.approx((4, 4.303 / 3**0.5))
    assert difference.excludes_zero
    assert not report.paired(a, [5.0, 2.0, 9.0]).excludes_zero  # 0, 5, 3: 2.67 ± 6.25
    assert not report.paired(a, a).excludes_zero  # 0 ± 0 is none
    assert report.paired(b, a).excludes_zero  # downwards, too
    unpaired = report.interval(a).half + report.interval(b).half
    assert unpaired > 4


def test_quantiles_are_students():
    """Of t with n degrees of freedom 95 % lies within, by the integral of its density."""
    from math import gamma, pi
    for n, quantile in enumerate(report.STUDENT, 1):
        x = np.linspace(-quantile, quantile, 200_001)
        density = gamma((n + 1) / 2) / ((n * pi) ** 0.5 * gamma(n / 2)) * (1 + x**2 / n) ** (
            -(n + 1) / 2)
        share = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert share == pytest.approx(0.95, abs=5e-5)


# ----------------------------------------------------------------------------------------- the page


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """An experiment of two rows and three seeds, one of which is not complete."""
    rows = {"a": {"x": Cell(("run a",), "v"), "y": Cell(("run a",), "w")},
            "b <s>": {"x": Cell(("run b",), "v"), "y": Cell(("run b",), "w")}}
    monkeypatch.setitem(EXPERIMENTS, "steps", [Table(rows, "a")])
    values = {("run a",): [(50, 10), (52, 20), (54, 60)], ("run b",): [(60, 12), (63, 15), (0, 0)]}
    records = [Record(seed, run, {"v": v, "w": w}, 60.0) for run, pairs in values.items()
               for seed, (v, w) in enumerate(pairs)][:-1]
    records.append(Record(2, ("run c",), {"v": 1.0}, 60.0))
    (tmp_path / "recipe.json").write_text('{"size": {}}')
    (tmp_path / "runs.jsonl").write_bytes(b"".join(map(experiment.as_line, records)))
    return tmp_path


def test_the_page_has_the_text_and_what_was_measured(made_up):
    pytest.importorskip("matplotlib")
    text = ("# Said\n\n{{experiment steps}}\n\nHonestly.\n"
            "{{output python -c \"print(6 * 7)\"}}\n{{machine}}\n{{model rope}}\n")
    (made_up / "text.md").write_text(text)
    words = [made_up, "--text", made_up / "text.md", "--out", made_up / "page.md", "--figures",
             made_up]
    report.main([str(word) for word in words])
    page = (made_up / "page.md").read_text()
    command = f"python -m tools.experiment steps --out {made_up} --seeds 0 1"
    assert page.startswith(f"# Said\n\n```bash\n{command}\n```\n")
    assert page.endswith("\nNot measured: no GPU was at hand.\n")
    assert "2 runs a seed; seeds 0, 1: 2 minutes on two cores" in page
    assert "![experiment-steps](experiment-steps.png)" in page
    assert "| exact match, % | x | y |\n|---|---|---|\n" in page
    assert "| a | 51.0 ± 12.7 | 15.0 ± 63.5 |" in page
    # 10 and 11 are 10.5 ± 6.4, called; 2 and -5 are -1.5 ± 44.5, not
    assert "| b `<s>` | **+10.5** ± 6.4 | −1.5 ± 44.5 |" in page
    assert "from 6.4 to 44.5 points on, by cell (median 25.4)" in page
    assert "Of 2 differences 1 are called (bold); were there none at all, 0.1 would be" in page
    assert "\nHonestly.\n```\n$ python -c \"print(6 * 7)\"\n42\n```\n" in page
    assert (made_up / "experiment-steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line, message", [
    ("{{experiment nothing}}", "{{experiment nothing}}: unknown; use experiment with one of rope"),
    ("{{experiment rope}}", "rope is complete for 0 seeds, two are needed: python -m tools.exp"),
    ("{{output python -c 1/0 | cat}}", "python -c 1/0 | cat: "),
    ("{{what}}", "{{what}}: unknown"),
])
def test_a_page_that_cannot_be_made_is_one_line_and_no_file(line, message, made_up):
    (made_up / "text.md").write_text(line)
    words = [made_up, "--text", made_up / "text.md", "--out", made_up / "page.md", "--figures",
             made_up]
    with pytest.raises(SystemExit) as caught:
        report.main([str(word) for word in words])
    assert str(caught.value).startswith(f"error: {message}") or message in str(caught.value)
    assert not (made_up / "page.md").exists()


# --------------------------------------------------------------------------------------- end to end


def lines_of(out):
    file = out / "runs.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


def test_one_experiment_killed_and_continued(tmp_path):
    """At toy size. It is killed in the middle of its runs, and again with half a line written; the
    same command goes on, and runs nothing twice. Then the page."""
    out = tmp_path / "out"
    words = ["steps", "--seeds", "0", "1", "--out", str(out), "--size", "toy", "--jobs", "2"]
    with subprocess.Popen([sys.executable, "-m", "tools.experiment", *words], cwd=experiment.ROOT,
                          stderr=subprocess.DEVNULL) as process:
        before = 1 + 2 + 2  # text, documents, bases
        deadline = time.monotonic() + 300
        while len(lines_of(out)) < before + 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    first = lines_of(out)
    assert before < len(first) < before + 2 * 4
    with open(out / "runs.jsonl", "ab") as file:
        file.write(b'{"seed": 1, "run": ["train.py --mo')

    experiment.main(words)
    lines = lines_of(out)
    assert lines[:len(first)] == first
    records = [json.loads(line) for line in lines]
    assert len({(record["seed"], *record["run"]) for record in records}) == len(records)
    assert len(records) == before + 2 * len(runs_of(EXPERIMENTS["steps"]))
    for record in records[before:]:
        assert {"needles 128", "needles 512", "needles 2048"} < record["values"].keys()
        assert record["seconds"] > 0
    said = (out / "log.txt").read_text()
    assert said.count("--new-window 512") == 2 * 2  # the first of two steps, twice a seed, at most

    # the page
    pytest.importorskip("matplotlib")
    (tmp_path / "text.md").write_text("{{experiment steps}}\n")
    report.main([str(out), "--text", str(tmp_path / "text.md"), "--out", str(tmp_path / "page.md"),
                 "--figures", str(tmp_path)])
    page = (tmp_path / "page.md").read_text()
    assert "4 runs a seed; seeds 0, 1:" in page
    for row in EXPERIMENTS["steps"][0].rows:
        assert f"| {row} | 0.0 ± 0.0 | " in page

    # all is there: nothing runs
    experiment.main(words)
    assert lines_of(out) == lines
    for wrong, message in ((["--size", "full"], "holds something else, or what another --size"),
                           (["--model", str(tmp_path)], "steps is none of rope, separator, mask"),
                           (["--seeds", "-1"], "--seeds -1 must be a whole number"),
                           (["--out", str(tmp_path / "other")], "other: holds something else")):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "file").touch()
        with pytest.raises(SystemExit, match=message):
            experiment.main([*words, *wrong])
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_command_that_fails_ends_all_with_its_last_words(tmp_path, monkeypatch):
    nowhere = ("tools.prepare --source nowhere --tokenizer none --out {run}/corpus",)
    monkeypatch.setattr(experiment, "TEXT", nowhere)
    with pytest.raises(SystemExit) as caught:
        experiment.main(["steps", "--out", str(tmp_path / "out"), "--size", "toy"])
    assert str(caught.value).startswith("error: tools.prepare has failed, see ")
    assert "log.txt: error: --source nowhere: write it as NAME=PATH" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not lines_of(tmp_path / "out")
