"""tools.plot: runs side by side, as a table and as a figure; pictures, and that what they show is
what the code does."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_niah
from data import length_weights
from model import read_config
from parallel import Grid, zigzag_positions
from rope_yarn import RopeScaling
from tools import pictures, plot
from tools.plan import Plan, gib, memory_parts, techniques

ROOT = Path(__file__).resolve().parent.parent.parent
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


@pytest.mark.parametrize("arguments", [
    "rope --factor 128",
    "rope --kind llama3 --factor 8 --theta 10000 --head-dim 64",
    "rope --kind ntk",
    "rope --kind default",
    "ring",
    "ring --cp 2 --documents 1 5 3 3",
    "memory",
    "memory --sequence-length 131072 --tp 1 --gpu H200",
    "stream",
    "stream --documents 7 --sequence-length 16 --long-weight 1",
])
def test_a_picture_is_drawn(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    plot.main([*arguments.split(), "--figure", str(tmp_path / "picture.png")])
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert np.frombuffer(content[16:24], dtype=">u4").tolist() == [1600, 900]
    assert len(content) < 150_000
    assert len(list(tmp_path.iterdir())) == 1


def words(panel) -> list[str]:
    """All that is written into a panel."""
    return [text.get_text() for text in panel.texts]


def options(arguments: str):
    return plot.parser().parse_args([*arguments.split(), "--figure", "x.png"])


# ------------------------------------------------------------------------------------------- RoPE


def test_the_ramp_of_the_1m_recipe_is_pairs_29_to_34():
    regions = pictures.rope_regions(128, 500000.0, RopeScaling("yarn", 128.0, 8192))
    assert regions == {"kept": (0, 28), "blended": (29, 34), "interpolated": (35, 63)}
    # both ends in one pair: nothing is blended
    step = RopeScaling("yarn", 2.0, 128, beta_fast=1.01, beta_slow=1.0, truncate=False)
    assert pictures.rope_regions(16, 10000.0, step) == {"kept": (0, 2), "interpolated": (3, 7)}
    for kind in ("default", "linear", "ntk"):
        factor = 1.0 if kind == "default" else 8.0
        assert pictures.rope_regions(128, 500000.0, RopeScaling(kind, factor)) == {}


def test_the_drawn_curves_are_wavelengths_and_windows_have_their_numbers():
    pytest.importorskip("matplotlib")
    panel = pictures.rope_picture(options("rope --factor 128")).axes[0]
    after, before, *windows = [line.get_ydata() for line in panel.lines]
    assert before[0] == pytest.approx(2 * math.pi)
    assert after[28] == pytest.approx(before[28])
    assert before[29] < after[29] < after[34] < 128 * before[34]
    assert after[35] == pytest.approx(128 * before[35])
    assert [line[0] for line in windows] == [8192, 1048576]
    assert words(panel) == [
        "before", "after", "", "× 128",  # "": the arrow
        "old window: 8,192 tokens", "new window: 1,048,576 tokens",
        "kept\n0 – 28", "blended\n29 – 34", "interpolated\n35 – 63",
    ]


# ------------------------------------------------------------------------------------------- ring


@pytest.mark.parametrize("cp, documents", [
    (2, [1, 60, 3]),
    (3, [24]),
    (4, [40, 48, 40]),
    (4, [5, 6, 5]),
])
def test_all_hops_together_are_the_causal_mask(cp, documents):
    """So their pairs are S (S + 1) / 2, and with documents the sum of n (n + 1) / 2."""
    length = sum(documents)
    borders = [0, *np.cumsum(documents).tolist()]
    in_rank_order = torch.cat([zigzag_positions(length, Grid(cp=cp, rank=rank))
                               for rank in range(cp)])
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for masked, lengths in ((None, [length]), (borders, documents)):
        hops = pictures.ring_hops(cp, length, masked)
        computed = hops == pictures.COMPUTED
        assert computed.sum() == sum(n * (n + 1) // 2 for n in lengths)
        expected = causal if masked is None else causal & (ids[:, None] == ids)
        assert computed.sum(0).equal(expected[in_rank_order].long())
        # at hop 1 the keys of the rank before are at hand, and so on: they travel on by one
        for hop in range(cp):
            for rank, own in enumerate((hops[hop] > 0).chunk(cp)):
                keys = zigzag_positions(length, Grid(cp=cp, rank=(rank - hop) % cp))
                assert own.nonzero()[:, 1].view(-1, length // cp).equal(
                    keys.expand(length // cp, -1))
        assert sum(pictures.rank_shares(hops)) == pytest.approx(1)


def test_the_shares_of_the_work_are_those_of_the_rings_table():
    """Of `ring_attention`: A, B and C have 51 pairs in chunks of two tokens."""
    hops = pictures.ring_hops(4, 16, None)
    assert pictures.rank_shares(hops) == [0.25] * 4
    hops = pictures.ring_hops(4, 16, [0, 5, 11, 16])
    assert pictures.rank_shares(hops) == pytest.approx([12 / 51, 12 / 51, 13 / 51, 14 / 51])


def test_panels_are_the_hops_with_their_ranks_and_chunks():
    pytest.importorskip("matplotlib")
    figure = pictures.ring_picture(options("ring"))
    assert len(figure.axes) == 8
    for number, panel in enumerate(figure.axes):
        borders = None if number < 4 else [0, 40, 88, 128]
        hop = pictures.ring_hops(4, 128, borders)[number % 4]
        image = torch.as_tensor(np.array(panel.images[0].get_array()))
        assert (image == 1).all(2).equal(hop == 0)  # white where nothing is at hand
        at_hand = [str((rank - number) % 4) for rank in range(4)]
        assert [word for word in words(panel) if word in "0123"] == at_hand
    chunks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert chunks == ["0", "7", "1", "6", "2", "5", "3", "4"]
    assert [word for word in words(figure.axes[7]) if "%" in word] == ["23 %", "23 %", "26 %",
                                                                      "28 %"]


# ----------------------------------------------------------------------------------------- memory


def test_bars_have_the_numbers_of_the_documentation():
    pytest.importorskip("matplotlib")
    page = (ROOT / "docs/memory.md").read_text()
    config = read_config(ROOT / "runs/llama31_8b.json")
    panel = pictures.memory_picture(options("memory")).axes[0]
    for name, plan in techniques(Plan(config, 2**20, 1, 1, tp=8, cp=1, dp=1)).items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        *parts, total, host = [float(cell) for cell in line.split("|")[2:-1]]
        found = [round(gib(part), 1) for part in memory_parts(plan).values()]
        assert found == parts
        assert f"{total:,.1f}" in words(panel)
        assert not host or f"+ {host} on the host" in words(panel)
    assert "H100-80: 76 GiB" in words(panel)
    lengths = {}  # of bars, by row
    for patch in panel.patches:
        row = round(patch.get_y() + patch.get_height() / 2)
        lengths[row] = lengths.get(row, 0) + patch.get_width()
    cut = 1.6 * 76
    assert list(lengths.values()) == pytest.approx([cut, cut, 60.4, 91.9, 29.4, 18.2], abs=0.05)


# ----------------------------------------------------------------------------------------- stream


def test_the_stream_is_what_the_dataset_gives():
    documents = [24, 24, 24, 60, 60, 120]
    stream = pictures.read_stream(documents, 100, seed=37, short=40, long=80, short_weight=0.5,
                                  long_weight=2.0)
    weights = length_weights(np.array(documents), np.zeros(6), 40, 80, 0.5, 2.0)
    assert stream.weights.tolist() == weights.tolist()

    # 1. No document is drawn more often than its weight, rounded up, nor less than rounded down.
    assert stream.repeats.shape == (6, pictures.EPOCHS)
    low, high = np.floor(weights), np.ceil(weights)
    assert ((low <= stream.repeats.T) & (stream.repeats.T <= high)).all()

    # 2. Rows share a token; joined they are the stream, whose first epoch has the drawn documents,
    #    each whole and followed by the three tokens of "<s>".
    for row, following in zip(stream.rows, stream.rows[1:], strict=False):
        assert len(row) == 101
        assert row[-1] == following[0]
    whole = np.concatenate([row[:-1] for row in stream.rows])[:stream.epoch_end]
    runs = pictures.runs_of(whole)
    drawn = [document for document, _, _ in runs[::2]]
    assert np.bincount(drawn, minlength=6).tolist() == stream.repeats[:, 0].tolist()
    assert [end - start for _, start, end in runs[::2]] == [documents[i] for i in drawn]
    separators = {(document, end - start) for document, start, end in runs[1::2]}
    assert separators == {(pictures.SEPARATOR, 3)}


def test_the_table_of_documents_has_lengths_weights_and_draws():
    """The three of `length_weights`, of 20 tokens instead of 20,000."""
    pytest.importorskip("matplotlib")
    figure = pictures.stream_picture(options("stream --documents 2 6 12 --short-length 4 "
                                             "--long-length 8 --long-weight 1.5"))
    table = words(figure.axes[1])
    for word in ("2 short", "6 ", "12 long", "0.40", "0.80", "1.20"):
        assert word in table
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["sequence 0", "sequence 1", "sequence 2", "sequence 3"]
    borders = [word for word in words(figure.axes[0]) if word.isdigit()]
    assert borders == ["100", "100", "200", "200", "300", "300", "400"]


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("arguments, message", [
    ("compare before.json --labels A B", "--labels has 2 names for 1 results"),
    ("compare text.txt", "text.txt: not results of needles"),
    ("compare nowhere.json", "JSON nowhere.json must be a file or directory that exists"),
    ("compare before.json --figure x.pdf", "--figure x.pdf must be a PNG"),
    ("compare before.json --figure no/x.png",
     "--figure no/x.png must be a file in a directory that exists"),
    ("compare before.json --window 0", "--window 0 must be a whole number, 1 or more"),
    ("rope --factor 0.5 --figure x.png", "factor is 0.5"),
    ("ring --cp 5 --figure x.png", "--cp 5 must be 2, 3 or 4"),
    ("ring --documents 3 4 --figure x.png", "7 tokens in 2 documents; a picture needs a multiple"),
    ("ring --documents 2048 --figure x.png", "1,024 at most"),
    ("memory --tp 3 --figure x.png", "--tp 3 does not divide"),
    ("memory --sequence-length 1001 --figure x.png", "1001 is not a multiple of 16"),
    ("memory --config text.txt --figure x.png", "text.txt: not valid JSON"),
    ("stream --documents 1 2 3 4 5 6 7 8 9 --figure x.png", "9 are too many for a picture"),
    ("stream --short-length 90 --figure x.png", "--short-length 90 is above --long-length 80"),
    ("stream --documents 0 --figure x.png", "--documents 0 must be a whole number, 1 or more"),
    ("stream", "--figure"),
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
