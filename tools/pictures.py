"""Pictures for a lecture, drawn from the code: what a RoPE rule does to each pair, who computes
what on the ring, where a GPU's memory goes, how documents become sequences.

`tools.plot` draws them. Each has a function that asks the code (`rope_regions`, `ring_hops`,
`techniques` of tools.plan, `read_stream`) and one that draws what it has said, a matplotlib figure.
Letters are of 16 points and more on 1600 x 900 pixels; no colour stands without a name or a number
beside it.
"""
from __future__ import annotations

import io
import itertools
import math
import string
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import PackedDataset, Tokenizer
from eval_niah import short_length
from model import read_config
from parallel import Grid, visible_blocks, zigzag_positions
from rope_yarn import RopeScaling, inverse_frequencies, kept_share, shown_rule
from tools.plan import DEVICES, Plan, gib, matrices, memory_parts, techniques
from tools.prepare import write_corpus

# Okabe and Ito's colours: colour-blind readers tell them apart
BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
VERMILION = "#d55e00"
SKY = "#56b4e9"
YELLOW = "#f0e442"
INK = "#222222"
GREY = "#888888"
RANKS = (BLUE, ORANGE, GREEN, PURPLE)

SMALL = 16  # sizes of letters, in points
NORMAL = 20
LARGE = 24
DASHED = (0, (5, 3))


def new_figure(title: str):
    """A figure of 1600 x 900 pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.suptitle(title, x=0.015, ha="left", fontsize=LARGE, fontweight="bold", color=INK)
    return figure


def write(panel, x: float, y: float, text: str, size: int = NORMAL, color: str = INK,
          va: str = "center", **more) -> None:
    """Text in a panel."""
    panel.text(x, y, text, fontsize=size, color=color, va=va, **more)


def behind(colour: str) -> dict:
    """A box that keeps hatching and lines away from letters."""
    return {"facecolor": colour, "edgecolor": "none", "pad": 1.5}


def without_frame(panel) -> None:
    """Neither a frame nor marks at the names."""
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def png(figure, palette: bool = False) -> bytes:
    """A matplotlib figure as a PNG file; with a palette, which suffices for few colours, of half
    the size."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    if palette:
        image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- RoPE


def rope_regions(head_dim: int, theta: float, scaling: RopeScaling) -> dict[str, tuple[int, int]]:
    """The first and the last pair that a rule keeps, blends and interpolates; empty for a rule that
    does not tell pairs apart."""
    if scaling.kind not in ("llama3", "yarn"):
        return {}
    share = kept_share(head_dim, theta, scaling)  # (D/2,)
    places = {
        "kept": share == 1,
        "blended": (share > 0) & (share < 1),
        "interpolated": share == 0,
    }
    regions = {}
    for name, mask in places.items():
        pairs = torch.nonzero(mask).flatten().tolist()
        if pairs:
            regions[name] = (pairs[0], pairs[-1])
    return regions


def wavelengths(head_dim: int, theta: float, scaling: RopeScaling) -> list[float]:
    """Tokens in which each pair turns once."""
    inv_freq, _ = inverse_frequencies(head_dim, theta, scaling)
    return (2 * math.pi / inv_freq).tolist()


def draw_rule(head_dim: int, theta: float, length: int, scaling: RopeScaling):
    """Each pair's wavelength before and after, the old window `length` and the new one, and the
    ramp."""
    name = f"{scaling.kind}, s = {scaling.factor:g}"
    figure = new_figure(f"{name}: what becomes of each pair")
    panel = figure.subplots()
    draw_curves(panel, head_dim, theta, scaling)

    # The windows, as lines.
    windows = {"old window": length}
    if scaling.kind != "llama3" and scaling.factor > 1:  # llama3's factor is no ratio of windows
        windows["new window"] = round(length * scaling.factor)
    for title, window in windows.items():
        panel.axhline(window, color=INK, linewidth=2, linestyle=DASHED)
        write(panel, 0, 1.15 * window, f"{title}: {window:,} tokens", va="bottom",
              bbox=behind("white"))

    # The ramp: which pairs are kept, blended, interpolated.
    above = panel.get_xaxis_transform()  # y: a share of the panel's height
    for title, (first, last) in rope_regions(head_dim, theta, scaling).items():
        pairs = f"{first} – {last}" if last > first else str(first)
        text = f"{title}\n{pairs}"
        write(panel, (first + last) / 2, 1.015, text, va="bottom", ha="center", transform=above)
        if title == "blended":
            band = (first - 0.5, last + 0.5)
            panel.axvspan(*band, facecolor=YELLOW, alpha=0.35, zorder=0)
            panel.axvspan(*band, facecolor="none", edgecolor=GREY, hatch="/", zorder=0)

    panel.set_xlabel("pair", fontsize=NORMAL)
    panel.set_ylabel("wavelength (tokens)", fontsize=NORMAL, labelpad=12)
    panel.tick_params(labelsize=NORMAL)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(panel, head_dim: int, theta: float, scaling: RopeScaling) -> None:
    """Wavelengths before and after, each with its name at its end."""
    before = wavelengths(head_dim, theta, RopeScaling())
    after = wavelengths(head_dim, theta, scaling)
    panel.semilogy(after, color=VERMILION, linewidth=3, marker="s", markersize=8)
    panel.semilogy(before, color=BLUE, linewidth=3, marker="o", markersize=7)
    last = head_dim // 2 - 1
    beside = 1.012 * last
    write(panel, beside, before[-1], "before", color=BLUE)
    if after != before:
        write(panel, beside, after[-1], "after", color=VERMILION)
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 2.5}
        start = (last, 1.33 * before[-1])
        end = (last, 0.75 * after[-1])
        panel.annotate("", end, start, arrowprops=arrow)
        middle = math.sqrt(before[-1] * after[-1])
        write(panel, beside, middle, f"× {after[-1] / before[-1]:.4g}")
    panel.set_xlim(-0.02 * last, 1.1 * last)


def rope_picture(a: Namespace):
    return draw_rule(a.head_dim, a.theta, a.original_length, shown_rule(vars(a)))


# ------------------------------------------------------------------------------------------- ring

AT_HAND = 1
COMPUTED = 2


def ring_hops(cp: int, length: int, borders: list[int] | None) -> Tensor:
    """What is at hand and what is computed at each hop, int8 (hops, S, S): the queries of rank 0,
    of rank 1, ... x all keys in their order. `borders` of documents that are masked apart."""
    segments = None if borders is None else [borders]
    local = length // cp
    hops = torch.zeros(cp, length, length, dtype=torch.int8)
    for hop in range(cp):
        for rank in range(cp):
            source = (rank - hop) % cp
            keys = zigzag_positions(length, Grid(cp=cp, rank=source))  # (S / cp,)
            own = hops[hop, rank * local:(rank + 1) * local]  # (S / cp, S), a view
            own[:, keys] = AT_HAND
            blocks = visible_blocks(Grid(cp=cp, rank=rank), source, local, segments)
            for _, q_rows, k_rows in blocks:
                columns = keys[k_rows]
                block = torch.ones(q_rows.stop - q_rows.start, len(columns), dtype=torch.int8)
                if hop == 0:  # only own keys come after a query
                    block = block.tril()
                own[q_rows, columns] += block  # AT_HAND becomes COMPUTED
    return hops


def chunk_owners(cp: int, length: int) -> list[int]:
    """The rank that holds each of the 2 cp chunks, in the sequence's order."""
    owners = torch.empty(length, dtype=torch.int64)  # of each position
    for rank in range(cp):
        owners[zigzag_positions(length, Grid(cp=cp, rank=rank))] = rank
    return owners[::length // (2 * cp)].tolist()


def rank_shares(hops: Tensor) -> list[float]:
    """Each rank's share of all pairs of a query and a key that are computed, from `ring_hops`."""
    pairs = (hops == COMPUTED).sum((0, 2))  # of each query: (S,)
    by_rank = pairs.view(len(hops), -1).sum(1)  # (cp,)
    return (by_rank / by_rank.sum()).tolist()


def ring_image(hop: Tensor, owners: list[int]) -> np.ndarray:
    """One hop (S, S) as colours (S, S, 3): of the rank that owns a key, full where it is computed
    with, pale where it is at hand."""
    from matplotlib.colors import to_rgb

    colours = torch.tensor([to_rgb(RANKS[owner]) for owner in owners])  # (2 cp, 3)
    full = colours.repeat_interleave(len(hop) // len(owners), 0)  # (S, 3)
    pale = 1 - 0.35 * (1 - full)
    image = torch.ones(*hop.shape, 3)
    image = torch.where((hop == AT_HAND)[..., None], pale, image)
    return torch.where((hop == COMPUTED)[..., None], full, image).numpy()


# A panel is measured in chunks: 0 to 2 cp from left to right, and from the top down.


def draw_hop(panel, states: Tensor, hop: int, owners: list[int]) -> None:
    """One panel: the queries' chunks by rank x the keys' chunks, at its right whose keys are at
    hand."""
    count = len(owners)
    cp = count // 2
    panel.imshow(ring_image(states, owners), extent=(0, count, count, 0), aspect="auto",
                 interpolation="nearest")
    chunks = range(1, count)
    panel.vlines(chunks, 0, count, color=GREY, linewidth=0.7)
    panel.hlines(chunks, 0, count, color=GREY, linewidth=0.7)
    panel.vlines((0, count), 0, count, color=INK, linewidth=2, clip_on=False)
    panel.hlines(range(0, count + 1, 2), 0, count, color=INK, linewidth=2, clip_on=False)
    for rank in range(cp):
        source = (rank - hop) % cp
        middle = 2 * rank + 1
        panel.barh(middle, 0.11 * count, 1.95, left=1.03 * count, color=RANKS[source])
        write(panel, 1.085 * count, middle, str(source), SMALL, ha="center", fontweight="bold",
              bbox=behind("white"))
    panel.set_xlim(0, 1.15 * count)
    panel.set_ylim(count, 0)
    panel.set_xticks(np.arange(count) + 0.5, range(count), fontsize=SMALL)
    panel.set_yticks([])
    without_frame(panel)


def draw_ring(cp: int, documents: list[int]):
    """The ring hop by hop: above without a mask, below with documents masked apart."""
    from matplotlib.patches import Patch

    borders = [0, *itertools.accumulate(documents)]
    length = borders[-1]
    owners = chunk_owners(cp, length)
    figure = new_figure(f"A ring of {cp}: who computes what with whose keys")
    above, below = figure.subplots(2, cp)

    # 1. The hops, and around them who is who.
    for panels, masked in ((above, None), (below, borders)):
        hops = ring_hops(cp, length, masked)
        for hop, panel in enumerate(panels):
            draw_hop(panel, hops[hop], hop, owners)
        name_queries(panels[0], owners)
        write_shares(panels[-1], rank_shares(hops))

    # 2. What stands above a row alone, or below it.
    for hop, panel in enumerate(above):
        panel.set_title(f"hop {hop}", loc="left", fontsize=NORMAL, fontweight="bold")
        write(panel, 2.3 * cp, -0.2, "keys of", SMALL, va="bottom", ha="right")
    for panel in below:
        name_documents(panel, documents)
        panel.set_xlabel("keys' chunks", fontsize=NORMAL)
    above[0].set_ylabel("causal", fontsize=NORMAL, labelpad=100)
    below[0].set_ylabel("documents apart", fontsize=NORMAL, labelpad=100)
    meaning = [Patch(color=INK, label="computed"), Patch(color="#cccccc", label="only at hand")]
    figure.legend(handles=meaning, loc="upper right", ncols=2, fontsize=NORMAL, frameon=False)
    return figure


def name_queries(panel, owners: list[int]) -> None:
    """At the left: ranks, and the two chunks that each holds."""
    chunks = np.argsort(owners, kind="stable")  # rank after rank, the early one first
    panel.set_yticks(np.arange(len(owners)) + 0.5, chunks, fontsize=SMALL)
    write(panel, -0.2, -0.2, "queries", SMALL, va="bottom", ha="right")
    for rank in range(len(owners) // 2):
        place = (0, 2 * rank + 1)
        panel.annotate(f"rank {rank}", place, (-32, 0), textcoords="offset points",
                       fontsize=NORMAL, color=INK, ha="right", va="center")


def write_shares(panel, shares: list[float]) -> None:
    """At the right: what share of all the work each rank has."""
    right = 1.2 * 2 * len(shares)
    write(panel, right, -0.2, "share", SMALL, va="bottom")
    for rank, share in enumerate(shares):
        write(panel, right, 2 * rank + 1, f"{100 * share:.0f} %")


def name_documents(panel, documents: list[int]) -> None:
    """Letters of documents above a panel, lines where they meet."""
    right, _ = panel.get_ylim()  # a panel is as wide in chunks as it is high
    start = 0.0
    for number, size in enumerate(documents):
        width = right * size / sum(documents)
        if start:
            panel.plot([start, start], [-0.55, right], color=INK, linewidth=2, linestyle=DASHED,
                       clip_on=False)
        if width > 0.06 * right:  # there is room for its letter
            letter = string.ascii_uppercase[number]
            write(panel, start + width / 2, -0.15, letter, va="bottom", ha="center",
                  fontweight="bold")
        start += width
    panel.set_ylim(right, 0)


def ring_picture(a: Namespace):
    """Raises ValueError for documents that do not fill a ring's sequence."""
    documents = a.documents or [10 * a.cp, 12 * a.cp, 10 * a.cp]
    length = sum(documents)
    if length % (2 * a.cp) or length > 1024 or len(documents) > 26:
        raise ValueError(f"--documents have {length} tokens in {len(documents)} documents; a "
                         f"picture needs a multiple of {2 * a.cp} (2 x cp), 1,024 at most, in 26 "
                         "at most")
    return draw_ring(a.cp, documents)


# ----------------------------------------------------------------------------------------- memory

# of each part: colour, hatching, colour of its number
PARTS = ((BLUE, "", "white"), (ORANGE, "/", INK), (SKY, ".", INK))


def draw_memory(plans: dict[str, Plan], gpu: str):
    """A bar a plan: what a rank holds at its worst moment, in GiB, beside what its GPU has."""
    from matplotlib.patches import Patch

    # 1. The bars.
    limit = gib(DEVICES[gpu].memory)
    end = 1.6 * limit  # they are cut here
    plan = next(iter(plans.values()))
    parameters = sum(matrices(plan.config).values())
    title = (f"{parameters / 1e9:.1f}B parameters, {short_length(plan.length)} tokens: "
             f"GiB on one GPU of {plan.tp}")
    figure = new_figure(title)
    panel = figure.subplots()
    for row, step in enumerate(plans.values()):
        draw_bar(panel, row, step, limit, end)

    # 2. What the GPU has.
    panel.axvline(limit, color=VERMILION, linewidth=4, zorder=2)
    write(panel, limit, -0.62, f"{gpu}: {limit:.0f} GiB", color=VERMILION, va="bottom",
          ha="center", fontweight="bold")

    # 3. The names of techniques and parts.
    meaning = []
    for name, (colour, hatch, _) in zip(memory_parts(plan), PARTS, strict=True):
        meaning.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name))
    figure.legend(handles=meaning, loc="outside lower center", ncols=3, fontsize=NORMAL,
                  frameon=False)
    panel.set_yticks(range(len(plans)), list(plans), fontsize=NORMAL)
    panel.set_ylim(len(plans) - 0.4, -0.6)
    panel.set_xlim(0, 1.2 * end)
    panel.set_xticks([])
    without_frame(panel)
    panel.spines["left"].set_visible(True)
    return figure


def draw_bar(panel, row: int, plan: Plan, limit: float, end: float) -> None:
    """One plan's parts, its total, and what it keeps on the host."""
    # 1. The parts, up to where bars are cut.
    left = 0.0
    for size, (colour, hatch, ink) in zip(memory_parts(plan).values(), PARTS, strict=True):
        width = min(gib(size), end - left)
        panel.barh(row, width, 0.6, left=left, color=colour, hatch=hatch, edgecolor="white")
        if width > 0.06 * end:  # there is room for its number
            number = f"{gib(size):,.1f}"
            write(panel, left + 0.012 * end, row, number, color=ink, bbox=behind(colour))
        left += width

    # 2. The total; a torn edge where there is more than the bar shows.
    total = gib(sum(plan.memory().values()))
    ink = INK if total <= limit else VERMILION
    write(panel, left + 0.02 * end, row, f"{total:,.1f}", LARGE, ink, fontweight="bold")
    if total > end:
        teeth = np.array([0.992, 1.008, 0.992, 1.008, 0.992, 1.008, 0.992])
        heights = np.linspace(row - 0.32, row + 0.32, len(teeth))
        panel.fill_betweenx(heights, end * teeth, 1.02 * end, color="white", zorder=3)

    # 3. The host, right of the GPU's line.
    if plan.on_host():
        place = max(left + 0.16 * end, limit + 0.02 * end)
        write(panel, place, row, f"+ {gib(plan.on_host()):,.1f} on the host")


def memory_picture(a: Namespace):
    """Raises ValueError for a model or a length that so many GPUs cannot share."""
    config = read_config(a.config)
    config.check_tp(a.tp)
    multiple = Grid(tp=a.tp).sequence_multiple
    if a.sequence_length % multiple:
        raise ValueError(f"--sequence-length {a.sequence_length} is not a multiple of {multiple}")
    plan = Plan(config, a.sequence_length, 1, 1, a.tp, cp=1, dp=1)
    return draw_memory(techniques(plan), a.gpu)


# ----------------------------------------------------------------------------------------- stream

SEQUENCES = 4  # of the stream, that are shown
EPOCHS = 10
SEPARATOR = -1  # in the place of a document's number


@dataclass
class Stream:
    """What a PackedDataset made of some documents.

    weights: of each document. repeats: how often it is drawn, (documents, EPOCHS). rows: of the
    first SEQUENCES sequences the document of each of their S + 1 tokens, or SEPARATOR. epoch_end:
    tokens of the first epoch.
    """

    documents: list[int]
    weights: np.ndarray
    repeats: np.ndarray
    rows: list[np.ndarray]
    epoch_end: int


def read_stream(documents: list[int], length: int, seed: int, **weighting) -> Stream:
    """A corpus of documents of these lengths, read by a PackedDataset in sequences of `length`
    tokens. `weighting`: its short ... long_weight.

    Document i consists of tokens i, so that a sequence's tokens say which document they are of.
    """
    characters = {bytes([byte]): byte for byte in range(256)}
    tokenizer = Tokenizer("bytes", ".", characters, {})
    texts = [("text", [number] * size, None) for number, size in enumerate(documents)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus({"train": texts}, corpus, tokenizer)
        dataset = PackedDataset(corpus, "train", length, seed, tokenizer=tokenizer, **weighting)
        rows = [dataset.sequence(index)[0] for index in range(SEQUENCES)]  # (S + 1,) each
        plans = [dataset.plan(epoch) for epoch in range(EPOCHS)]
    for row in rows:
        row[row >= len(documents)] = SEPARATOR
    counts = [np.bincount(plan, minlength=len(documents)) for plan in plans]
    first = dataset.lengths[plans[0]] + len(dataset.separator)
    return Stream(documents, dataset.weights, np.stack(counts, axis=1), rows, int(first.sum()))


def runs_of(row: np.ndarray) -> list[tuple[int, int, int]]:
    """A row of `Stream` in pieces: (document or SEPARATOR, start, end) each."""
    borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return [(int(row[start]), start, end) for start, end in itertools.pairwise(borders)]


def document_looks(documents: list[int], short: int, long: int) -> list[tuple[str, str, str]]:
    """(colour, hatching, what it counts as) of each document, by its length."""
    looks = []
    for size in documents:
        if size < short:
            looks.append((SKY, "", "short"))
        elif size > long:
            looks.append((GREEN, "/", "long"))
        else:
            looks.append((ORANGE, ".", ""))
    return looks


def draw_stream(stream: Stream, looks: list[tuple[str, str, str]]):
    """The stream, cut into sequences, and how often each document is drawn."""
    from matplotlib.patches import Patch

    # 1. The strip, a row a sequence.
    length = len(stream.rows[0]) - 1
    figure = new_figure(f"Documents become sequences of S = {length} tokens")
    above, below = figure.subplots(2, 1, height_ratios=(5, 4))
    for index, row in enumerate(stream.rows):
        draw_sequence(above, index, row, looks)
        draw_shared_tokens(above, index, length)
    names = [f"sequence {index}" for index in range(SEQUENCES)]
    above.set_yticks(range(SEQUENCES), names, fontsize=NORMAL)
    above.set_ylim(SEQUENCES - 0.3, -0.5)
    above.set_xlim(-0.5, length + 1.5)

    # 2. Where the next epoch begins.
    row, place = divmod(stream.epoch_end, length)
    if row < SEQUENCES:
        above.vlines(place, row - 0.42, row + 0.42, color=INK, linewidth=4)
        write(above, place, row - 0.43, "epoch 1", SMALL, va="bottom", fontweight="bold")

    # 3. What is what, and the table.
    frame = "last target of one, first token of the next"
    meaning = [Patch(color=INK, label="separator <s>"),
               Patch(facecolor="none", edgecolor=VERMILION, linewidth=3, label=frame)]
    above.legend(handles=meaning, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2,
                 fontsize=NORMAL, frameon=False)
    draw_table(below, stream, looks)
    for panel in (above, below):
        panel.set_xticks([])
        without_frame(panel)
    return figure


def draw_sequence(panel, index: int, row: np.ndarray, looks: list[tuple[str, str, str]]) -> None:
    """A row of the strip: documents with their letters, separators black."""
    for document, start, end in runs_of(row):
        if document == SEPARATOR:
            panel.barh(index, end - start, 0.56, left=start, color=INK, edgecolor="white")
            continue
        colour, hatch, _ = looks[document]
        panel.barh(index, end - start, 0.56, left=start, color=colour, hatch=hatch,
                   edgecolor="white")
        if end - start > 0.02 * len(row):  # there is room for its letter
            letter = string.ascii_uppercase[document]
            write(panel, (start + end) / 2, index, letter, ha="center", fontweight="bold",
                  bbox=behind(colour))


def draw_shared_tokens(panel, index: int, length: int) -> None:
    """Frames around a sequence's first token, which is the last target of the one before, and
    around its own last target; with their numbers in the stream."""
    for place in (0, length):
        number = index * length + place
        if number:  # the very first token is nobody's target
            panel.barh(index, 1, 0.62, left=place, color="none", edgecolor=VERMILION, linewidth=3)
            write(panel, place + 0.5, index + 0.33, str(number), SMALL, VERMILION, va="top",
                  ha="center")


def draw_table(panel, stream: Stream, looks: list[tuple[str, str, str]]) -> None:
    """Below: each document's length, its weight and how often it was drawn in each epoch."""
    # 1. The columns' places and titles.
    weights = 40
    epochs = range(48, 48 + 4 * EPOCHS, 4)
    means = 94
    panel.barh(len(looks) / 2 - 0.5, 3.4, len(looks), left=epochs[0] - 1.7, color="#dddddd")
    drawn = f"drawn in epoch 0 (above), 1, ... {EPOCHS - 1}"
    for place, title in ((5, "length"), (weights, "weight, scaled"), (66, drawn), (means, "mean")):
        write(panel, place, -0.6, title, va="bottom", ha="center")

    # 2. A row a document.
    for row, (colour, hatch, kind) in enumerate(looks):
        size = stream.documents[row]
        width = 24 * size / max(stream.documents)
        panel.barh(row, width, 0.8, color=colour, hatch=hatch, edgecolor="white")
        write(panel, width + 0.5, row, f"{size} {kind}")
        write(panel, weights, row, f"{stream.weights[row]:.2f}", ha="center")
        for place, count in zip(epochs, stream.repeats[row], strict=True):
            write(panel, place, row, str(count), ha="center")
        write(panel, means, row, f"{stream.repeats[row].mean():.1f}", ha="center")
    letters = list(string.ascii_uppercase[:len(looks)])
    panel.set_yticks(range(len(looks)), letters, fontsize=NORMAL, fontweight="bold")
    panel.set_ylim(len(looks) - 0.5, -1.2)
    panel.set_xlim(0, 98)


def stream_picture(a: Namespace):
    """Raises ValueError for more documents than a picture has room for."""
    if len(a.documents) > 8:
        raise ValueError(f"--documents: {len(a.documents)} are too many for a picture; 8 at most")
    stream = read_stream(a.documents, a.sequence_length, a.seed, short=a.short_length,
                         long=a.long_length, short_weight=a.short_weight,
                         long_weight=a.long_weight)
    return draw_stream(stream, document_looks(a.documents, a.short_length, a.long_length))
