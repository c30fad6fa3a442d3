"""Figures: heat maps of needles and curves of perplexity, several runs side by side; and pictures
for a lecture, drawn from the code.

    python -m tools.plot compare before.json after.json --labels before "after stage 1" \\
        --figure compare.png
    python -m tools.plot rope --factor 128 --figure rope.png     # each pair before and after YaRN
    python -m tools.plot ring --figure ring.png                  # who computes what, hop by hop
    python -m tools.plot memory --figure memory.png              # where a GPU's memory goes
    python -m tools.plot stream --figure stream.png              # documents become sequences

The files are what --out of eval_niah.py or tools.perplexity has written; without --figure the
tables alone are printed. The pictures are those of tools/pictures.py; `rope` has the options of
rope_yarn.py.
"""
from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import write_complete
from eval_niah import accuracy_grid, lengths_inside, short_length, terminal_map
from parallel import one_line_errors
from rope_yarn import add_rule_arguments
from tools.perplexity import perplexity_table
from tools.pictures import memory_picture, png, ring_picture, rope_picture, stream_picture
from tools.plan import DEVICES
from train import Parser, existing, nonnegative, nonnegative_number, option, positive, writable

ROOT = Path(__file__).resolve().parent.parent


def draw_figure(runs: list[dict], labels: list[str]) -> bytes:
    """PNG of the runs' heat maps side by side on one colour scale, a line where the old window
    ends."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    # Okabe and Ito's vermilion and bluish green: colour-blind readers tell them apart
    tones = ["#d55e00", "#f3b173", "#fbf3dc", "#7cc9ae", "#009e73"]
    colours = LinearSegmentedColormap.from_list("retrieval", tones)
    size = (1.4 + 4.55 * len(runs), 5)
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, results, label in zip(panels, runs, labels, strict=True):
        image = draw_map(panel, results, colours)
        panel.set_title(label, loc="left", fontsize=14, fontweight="bold", pad=24)
    panels[0].set_ylabel("depth of the fact", fontsize=12)
    scale = figure.colorbar(image, ax=list(panels), pad=0.015, aspect=30)
    scale.set_label("exact match (%)", fontsize=12)
    return png(figure)


def draw_map(panel, results: dict, colours):
    """One run's heat map: a row a depth, a column a length. Returns the image."""
    # 1. The cells, each with its number.
    grid = accuracy_grid(results)
    image = panel.imshow(grid, vmin=0, vmax=100, aspect="auto", cmap=colours)
    for (row, column), value in np.ndenumerate(np.array(grid)):
        dark = value < 15 or value > 85
        panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=10,
                   color="white" if dark else "#333333")

    # 2. Their names, and white lines between them.
    lengths = [short_length(length) for length in results["lengths"]]
    depths = [f"{100 * depth:.0f} %" for depth in results["depths"]]
    panel.set_xticks(range(len(lengths)), lengths, fontsize=11)
    panel.set_yticks(range(len(grid)), depths, fontsize=11)
    right = len(lengths) - 0.5
    bottom = len(grid) - 0.5
    between_rows = np.arange(len(grid) - 1) + 0.5
    between_columns = np.arange(len(lengths) - 1) + 0.5
    panel.hlines(between_rows, -0.5, right, color="white", linewidth=1.5)
    panel.vlines(between_columns, -0.5, bottom, color="white", linewidth=1.5)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("context length (tokens)", fontsize=12)

    # 3. Where the old window ends: after so many lengths.
    border = lengths_inside(results)
    if border:
        left = border < len(lengths) / 2
        panel.axvline(border - 0.5, color="#222222", linewidth=2, linestyle=(0, (4, 2)))
        panel.text(border - 0.5, -0.6, f"old window: {short_length(results['window'])}",
                   fontsize=10, ha="left" if left else "right", va="bottom", color="#222222")
    return image


def draw_perplexity(runs: list[dict], labels: list[str]) -> bytes:
    """PNG of perplexity over positions, a curve a run, a line where the old window ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained", facecolor="white")
    panel = figure.subplots()
    colours = itertools.cycle(("#d55e00", "#0072b2", "#009e73", "#cc79a7"))
    for results, label in zip(runs, labels, strict=True):
        middles = [(start + end) / 2 for start, end in itertools.pairwise(results["edges"])]
        panel.plot(middles, np.exp(results["loss"]), label=label, color=next(colours), linewidth=2,
                   marker="o", markersize=4)
    window = runs[0]["window"]
    length = runs[0]["edges"][-1]
    if window < length:
        panel.axvline(window, color="#222222", linewidth=2, linestyle=(0, (4, 2)))
        panel.text(window, 1.01, f"old window: {short_length(window)}", fontsize=10, ha="center",
                   va="bottom", color="#222222", transform=panel.get_xaxis_transform())
    panel.set_yscale("log")
    panel.set_xlim(0, length)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("position in the document (tokens)", fontsize=12)
    panel.set_ylabel("perplexity", fontsize=12)
    panel.legend(frameon=False)
    return png(figure)


def read_results(paths: list[Path], window: int | None) -> list[dict]:
    """What --out of needles or perplexity has written, all of one kind; `window` in place of their
    own. Raises ValueError."""
    runs = []
    for path in paths:
        try:
            results = json.loads(path.read_text())
            runs.append(results | {"window": window or results["window"]})
            if "edges" in results:  # whatever is missing shows here
                perplexity_table(runs[-1:], [""])
            else:
                terminal_map(runs[-1], colour=False)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
            raise ValueError(f"{path}: not results of needles or perplexity that --out has "
                             "written") from None
    if len({str(results.get("edges")) for results in runs}) > 1:
        raise ValueError("these are not all of needles, or all of perplexity at the same positions")
    return runs


def accuracy_table(runs: list[dict], labels: list[str]) -> str:
    """Mean accuracy in %, one row a run, one column a length."""
    lengths = sorted({length for results in runs for length in results["lengths"]})
    width = max(map(len, labels))
    title = "".join(f"{short_length(length):>8}" for length in lengths)
    lines = [" " * width + title]
    for label, results in zip(labels, runs, strict=True):
        means = {mean["length"]: f"{mean['accuracy']:.1f}" for mean in results["means"]}
        row = "".join(f"{means.get(length, '-'):>8}" for length in lengths)
        lines.append(f"{label:>{width}}{row}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- command line


png_file = option(writable, lambda path: path.suffix == ".png", "a PNG: a name that ends in .png")
ring_size = option(int, lambda n: 2 <= n <= 4, "2, 3 or 4: more hops are not readable")


def parser() -> Parser:
    parser = Parser("Draw results side by side, or a picture for a lecture.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "results of eval_niah.py or tools.perplexity: a table, and a figure"
    compare = commands.add_parser("compare", help=text, description=text)
    add = compare.add_argument
    add("results", type=existing, nargs="+", metavar="JSON", help="what --out has written")
    add("--labels", nargs="+", help="names of the runs (if not given: the files')")
    add("--window", type=positive, help="old window to mark (if not given: the results')")
    add("--figure", type=png_file, help="heat maps or curves, PNG")

    text = "wavelengths of each pair before and after a rule"
    rope = picture(commands, "rope", text, rope_picture)
    add_rule_arguments(rope)

    text = "who computes what at each hop of a ring, without and with documents masked apart"
    add = picture(commands, "ring", text, ring_picture).add_argument
    add("--cp", type=ring_size, default=4, help="ranks")
    add("--documents", type=positive, nargs="+", metavar="TOKENS",
        help="lengths of documents (if not given: three, whose borders halve chunks on 4 ranks)")

    text = "where a GPU's memory goes, technique by technique"
    add = picture(commands, "memory", text, memory_picture).add_argument
    add("--config", type=existing, default=ROOT / "runs" / "llama31_8b.json", help="config.json")
    add("--sequence-length", type=positive, default=2**20, help="tokens")
    add("--tp", type=positive, default=8, help="tensor parallel")
    add("--gpu", choices=tuple(DEVICES), default="H100-80", help="whose memory is the line")

    text = "how documents become sequences, and how often each is drawn"
    add = picture(commands, "stream", text, stream_picture).add_argument
    add("--documents", type=positive, nargs="+", metavar="TOKENS", help="lengths of documents",
        default=[24, 24, 24, 60, 60, 120])
    add("--sequence-length", type=positive, default=100, help="tokens")
    add("--short-length", type=nonnegative, default=40, help="documents below are short")
    add("--long-length", type=nonnegative, default=80, help="documents above are long")
    add("--short-weight", type=nonnegative_number, default=0.5, help="how often short ones occur")
    add("--long-weight", type=nonnegative_number, default=2.0, help="how often long ones occur")
    add("--seed", type=nonnegative, default=37,  # of many one whose first epoch shows it all
        help="of the order")
    return parser


def picture(commands, name: str, text: str, draw: Callable) -> Parser:
    """The command of a picture: `draw` makes a figure of the options."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--figure", type=png_file, required=True, help="PNG")
    command.set_defaults(draw=draw)
    return command


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        if a.figure and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--figure needs matplotlib: pip install -r requirements-dev.txt")
        if a.command != "compare":
            write_complete(a.figure, png(a.draw(a), palette=True))
            return
        labels = a.labels or [path.stem for path in a.results]
        if len(labels) != len(a.results):
            raise ValueError(f"--labels has {len(labels)} names for {len(a.results)} results")
        runs = read_results(a.results, a.window)
        if "edges" in runs[0]:
            tabulate = perplexity_table
            draw = draw_perplexity
        else:
            tabulate = accuracy_table
            draw = draw_figure
        print(tabulate(runs, labels))
        if a.figure:
            write_complete(a.figure, draw(runs, labels))


if __name__ == "__main__":
    main()
