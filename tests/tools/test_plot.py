"""tools.plot: runs side by side, as a table and as a figure; the pairs of a RoPE rule."""
import numpy as np
import pytest

import eval_niah
from tools import plot

SHOWN = ("--depths", "3", "--samples", "2")


@pytest.fixture(scope="module")
def results(model_directory, text_file, tmp_path_factory):
    """Needles of 200 and 400 tokens, and of 200 alone."""
    place = tmp_path_factory.mktemp("results")
    for name, lengths in (("before", ["200", "400"]), ("after", ["200"])):
        eval_niah.main([str(model_directory), "--haystack", str(text_file), "--lengths", *lengths,
                        *SHOWN, "--out", str(place / f"{name}.json")])
    return place


def test_comparison_shows_runs_side_by_side(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [str(results / f"{name}.json") for name in ("before", "after", "before")]
    capsys.readouterr()
    plot.main(["compare", *files, "--labels", "A", "B b", "C",
               "--figure", str(tmp_path / "all.png")])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-2:] for row in rows] == [
        ["200", "400"],
        ["0.0", "0.0"],
        ["0.0", "-"],
        ["0.0", "0.0"],
    ]
    size = np.frombuffer((tmp_path / "all.png").read_bytes()[16:24], dtype=">u4")
    assert abs(size - [1500, 500]).max() <= 20


@pytest.mark.parametrize("rule", [
    "--factor 128",
    "--kind llama3 --factor 8 --theta 10000 --head-dim 64",
])
def test_a_rule_is_drawn(rule, tmp_path):
    pytest.importorskip("matplotlib")
    plot.main(["rope", *rule.split(), "--figure", str(tmp_path / "rule.png")])
    assert (tmp_path / "rule.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("arguments, message", [
    ("compare before.json --labels A B", "--labels has 2 names for 1 results"),
    ("compare text.txt", "text.txt: not results of needles"),
    ("compare nowhere.json", "JSON nowhere.json must be a file or directory that exists"),
    ("compare before.json --figure x.pdf", "--figure x.pdf must be a PNG"),
    ("compare before.json --figure no/x.png",
     "--figure no/x.png must be a file in a directory that exists"),
    ("compare before.json --window 0", "--window 0 must be a whole number, 1 or more"),
    ("rope --factor 0.5 --figure x.png", "factor is 0.5"),
])
def test_mistakes_are_one_line_and_no_file(results, monkeypatch, arguments, message):
    monkeypatch.chdir(results)
    (results / "text.txt").write_text("no results")
    before = sorted(results.iterdir())
    with pytest.raises(SystemExit) as caught:
        plot.main(arguments.split())
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(results.iterdir()) == before


def test_without_matplotlib_one_line_says_what_to_install(results, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs matplotlib: pip install"):
        plot.main(["compare", str(results / "before.json"), "--figure", str(results / "x.png")])
