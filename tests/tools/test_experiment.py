"""tools.experiment and tools.report: one experiment end to end at toy size, killed and continued;
every command of all others; the statistics against numbers worked by hand."""
import importlib
import itertools
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import eval_niah
import sft
import train
from tools import experiment, report, variants
from tools.experiment import Record
from tools.needle_pairs import PAIRS
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
    names = ["text/corpus", "data", "bases", "run/tokenizer", "model"]
    names += [f"data/{word.partition('/')[2].partition('=')[0]}" for command in commands()
              for word in command.split() if word.startswith("{data}/")]
    for name in names:
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "run" / "prompts.jsonl").touch()
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
    if "--new-window" in command:  # train.py takes no less than a rule reaches
        reached = (options.original_length or 1) * (options.rope_factor or 1)
        assert options.new_window >= max(reached, options.sequence_length)
    if program == "train.py" and options.model != places["model"]:
        assert options.batch_size * options.sequence_length in (16 * 64, 16 * 128, 2048)
    if "--seed" in command:
        kind = re.search(r"--seed (\d?)\{seed", command)[1]  # 1: of a second step, 9: of prompts
        assert options.seed == int(kind or 0) * 1000 + 7
        assert (kind == "9") is ("--haystack" in command)
    assert "  " not in command


@pytest.mark.parametrize("name", ALL)
def test_every_cell_finds_its_value_in_what_its_run_measures(name, places, tmp_path):
    """Results as the programs write them, of the lengths, depths, stretches that are asked for; no
    two values are alike."""
    for number, run in enumerate(runs_of(ALL[name])):
        place = tmp_path / str(number)
        place.mkdir()
        expected = {}
        for command in run:
            program, options = options_of(command, places)
            if options.out.suffix in (".json", ".jsonl"):
                content, values = written(program, options, 1000 * len(expected))
                (place / options.out.name).write_text(content)
                expected |= {f"{options.out.stem} {name}": value for name, value in values.items()}
        values = experiment.measured(place)
        assert values == pytest.approx(expected)
        wanted = {cell.value.format(**places) for table in ALL[name]
                  for cells in table.rows.values() for cell in cells.values() if cell.run == run}
        assert wanted
        assert wanted <= values.keys()


def written(program, options, first):
    """(what a program writes to its --out, the values in it by name)."""
    numbers = itertools.count(first)
    values = {}
    if program == "tools.ruler":
        return json.dumps({"task": "vt", "length": "65536", "input": "x"}) + "\n", values
    if program == "tools.answer":
        lines = [{"settings": 1}]
        for task in ("niah_single_2", "niah_multikey_1", "vt"):
            low, high = next(numbers), next(numbers)
            values[f"{task} 65536"] = 100 * (low + high) / 2
            for score in (low, high):
                lines.append({"task": task, "length": "65536", "score": score})
        return "".join(json.dumps(line) + "\n" for line in lines), values
    if program == "tools.perplexity":
        edges = np.linspace(0, options.lengths, options.buckets + 1).astype(int).tolist()
        losses = [next(numbers) for _ in range(options.buckets)]
        for (start, end), loss in zip(itertools.pairwise(edges), losses, strict=True):
            values[f"{start}-{end}"] = loss
        return json.dumps({"edges": edges, "loss": losses}), values

    def part(prefix, with_cells):
        means = []
        cells = []
        for length in options.lengths:
            means.append({"length": length, "accuracy": next(numbers)})
            values[f"{prefix}{length}"] = means[-1]["accuracy"]
            for depth in np.linspace(0, 1, options.depths).round(6).tolist():
                cells.append({"length": length, "depth": depth, "accuracy": next(numbers)})
                if with_cells:
                    values[f"{prefix}{length} at {100 * depth:g} %"] = cells[-1]["accuracy"]
        return {"means": means, "cells": cells}

    if program == "tools.needle_pairs":
        twins = {name: part(f"{name} ", False) for name in PAIRS[options.pair][1]}
        return json.dumps({"twins": twins}), values
    return json.dumps(part("", True)), values


def command_of(name, row, column):
    """The training of a cell: its options, as one text."""
    cell = EXPERIMENTS[name][0].rows[row][column]
    return " ".join(command for command in cell.run if command.startswith("train.py"))


@pytest.mark.parametrize("row, masked, separated", [
    ("no mask, <s>", False, True), ("no mask, no separator", False, False),
    ("mask, <s>", True, True), ("mask, no separator", True, False)])
def test_a_row_of_the_mask_is_what_it_is_called(row, masked, separated):
    for column in EXPERIMENTS["mask"][0].rows[row]:
        command = command_of("mask", row, column)
        assert ("--cross-document-mask" in command) is masked
        assert ("--separator none" not in command) is separated
        assert ("--stored-order" in command) is column.startswith("related")
        assert "apart-" in command and "facts-" not in command  # no begin-of-text
        assert "weight" not in command.replace("--weight-decay", "")


@pytest.mark.parametrize("steps", [60, 120])
def test_two_steps_see_as_many_tokens_as_one_and_no_sequence_twice(steps, places):
    column = f"{steps} steps, 2,048"
    tokens = {}
    seeds = []
    for row, cells in EXPERIMENTS["steps"][0].rows.items():
        runs = [options_of(command, places)[1] for command in cells[column].run
                if command.startswith("train.py")]
        tokens[row] = sum(a.steps * a.batch_size * a.sequence_length for a in runs)
        seeds.append([a.seed for a in runs])
        assert sum(a.warmup_steps for a in runs) == 10
        assert [a.sequence_length for a in runs][-1] == 2048
    assert list(tokens.values()) == [steps * 2048] * 2
    assert seeds == [[7], [7, 1007]]


def test_checkpoints_and_samples_are_those_of_their_columns(places):
    for row, cells in EXPERIMENTS["separator"][0].rows.items():
        for column, cell in cells.items():
            steps = column.split()[0]
            [measure] = [text for text in cell.run if f"/{cell.value.split()[0]}.json" in text]
            assert f"checkpoint-{steps:0>8}" in measure.format(**places)
            assert {"none": "--separator none", "<s>": "--separator <s>"}.get(
                row, "--separator bos_eos") in cell.run[0]
    for row, cells in EXPERIMENTS["short"][0].rows.items():
        for column, cell in cells.items():
            [measure] = [text for text in cell.run if f"/{cell.value.split()[0]}.json" in text]
            assert ("--prompt chat" in measure) is column.startswith("chat")
            if row.startswith("stage 2"):
                samples = row.split()[2].replace(",", "")
                folder = measure.split("{run}/")[1].split("/")[0]
                [tuning] = [text for text in cell.run if text.endswith(f"{{run}}/{folder}")]
                options = options_of(tuning, places)[1]
                assert options.steps * options.batch_size == int(samples)


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
    assert page.endswith("\nrope: not measured yet.\n")
    assert "2 runs a seed; seeds 0, 1: 2 minutes on two cores" in page
    assert "![experiment-steps](experiment-steps.png)" in page
    assert "| exact match, % | x | y |\n|---|---|---|\n" in page
    assert "| a | 51.0 ± 12.7 | 15.0 ± 63.5 |" in page
    # 10 and 11 are 10.5 ± 6.4, called; 2 and -5 are -1.5 ± 44.5, not
    assert "| b `<s>` | **+10.5** ± 6.4 | −1.5 ± 44.5 |" in page
    assert "half of its interval on: 25.4 points in the median, 6.4 to 44.5 by cell." in page
    assert " 1 of 2 are; if none were real, 0.1 would be by chance." in page
    assert "\nHonestly.\n```\n$ python -c \"print(6 * 7)\"\n42\n```\n" in page
    assert (made_up / "experiment-steps.png").read_bytes().startswith(b"\x89PNG")


def fake(out, tables, size):
    """Three seeds of all runs of some tables, with random values."""
    out.mkdir()
    random = np.random.default_rng(0)
    names = {}
    for table in tables:
        for cells in table.rows.values():
            for cell in cells.values():
                names.setdefault(cell.run, set()).add(cell.value.format(**size))
    records = [Record(seed, run, {name: random.uniform(40, 60) for name in sorted(values)}, 1.0)
               for seed in (4, 5, 6) for run, values in names.items()]
    (out / "recipe.json").write_text(json.dumps({"size": size}))
    (out / "runs.jsonl").write_bytes(b"".join(map(experiment.as_line, records)))
    return {(record.seed, record.run): record.values for record in records}


def test_two_tables_are_two_panels_and_a_models_page_has_its_own_results(tmp_path):
    pytest.importorskip("matplotlib")
    fake(tmp_path / "tiny", EXPERIMENTS["depth"], variants.SIZES["full"])
    size = variants.MODEL_SIZES["full"]
    values = fake(tmp_path / "model", MODEL_EXPERIMENTS["mask"], size)
    (tmp_path / "text.md").write_text("{{experiment depth}}\n{{model mask}}\n")
    words = [tmp_path / "tiny", "--on-model", tmp_path / "model", "--text", tmp_path / "text.md",
             "--out", tmp_path / "page.md", "--figures", tmp_path]
    report.main([str(word) for word in words])
    page = (tmp_path / "page.md").read_text()
    assert page.count("| exact match, %, by depth of the fact | 0 % | 12.5 % |") == 1
    assert page.count("| loss, nats a token, by position | 0 to 128 |") == 1
    run = MODEL_EXPERIMENTS["mask"][0].rows["mask"]["needles, 8x"].run
    column = [values[seed, run]["needles 65536"] for seed in (4, 5, 6)]
    mean, half = np.mean(column), 4.303 * np.std(column, ddof=1) / 3**0.5
    [row] = [line for line in page.splitlines() if line.startswith("| mask | ")][:1]
    assert row.split(" | ")[4] == f"{mean:.1f} ± {half:.1f}"
    for name in ("experiment-depth", "model-mask"):
        assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("line, message", [
    ("{{experiment nothing}}", "{{experiment nothing}}: unknown; use experiment with one of rope"),
    ("{{experiment rope}}", "rope is complete for 0 of the two seeds that are needed"),
    ("{{output python -c 1/0 | cat}}", "python -c 1/0 | cat: "),
    ("{{what}}", "{{what}}: unknown"),
    ("  {{experiment steps}} ", "{{experiment steps}} : unknown"),
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


def run_until(words, out, count):
    """Start tools.experiment, and return it as soon as so many lines are written."""
    process = subprocess.Popen([sys.executable, "-m", "tools.experiment", *words],
                               cwd=experiment.ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while len(lines_of(out)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def test_one_experiment_killed_and_continued(tmp_path):
    """At toy size. It is stopped while it makes bases, killed in the middle of its runs, and has
    half a line; the same command goes on, and runs nothing twice. Then the page."""
    out = tmp_path / "out"
    words = ["steps", "--seeds", "0", "1", "1", "--out", str(out), "--size", "toy", "--jobs", "2"]
    process = run_until(words, out, 1 + 2)  # text, documents
    with pytest.raises(SystemExit, match="another process is at work on it"):
        experiment.main(words)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].endswith("stopped")
    assert "Traceback" not in said

    before = 1 + 2 + 2  # text, documents, bases
    process = run_until(words, out, before + 1)
    process.kill()
    process.communicate()
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

    # the page
    pytest.importorskip("matplotlib")
    (tmp_path / "text.md").write_text("{{experiment steps}}\n")
    report.main([str(out), "--text", str(tmp_path / "text.md"), "--out", str(tmp_path / "page.md"),
                 "--figures", str(tmp_path)])
    page = (tmp_path / "page.md").read_text()
    assert "4 runs a seed; seeds 0, 1:" in page
    assert "--seeds 0 1\n```\n" in page and " --size toy" in page and "mean nothing" in page
    for row in EXPERIMENTS["steps"][0].rows:
        assert f"| {row} | 0.0 ± 0.0 | " in page

    # all is there: nothing runs
    experiment.main(words)
    assert lines_of(out) == lines
    for wrong, message in ((["--size", "full"], "holds experiments of another --size or --model"),
                           (["--model", str(tmp_path)], "--model has rope, separator, mask, not"),
                           (["--seeds", "-1"], "--seeds -1 must be a whole number"),
                           (["--out", str(tmp_path / "other")], "holds files, but no experiments")):
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
    assert str(caught.value).startswith("error: tools.prepare has failed (seed 0), see ")
    assert "log.txt: error: --source nowhere: write it as NAME=PATH" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not lines_of(tmp_path / "out")
