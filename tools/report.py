"""The page of experiments: tables with intervals, figures, and what commands print.

    python -m tools.report out/experiments --text docs/experiments_text.md \\
        --out docs/experiments.md --figures assets

The prose is in --text, so running again loses none of it. Lines of it stand for what is measured:
{{experiment NAME}}, {{model NAME}}, {{output COMMAND}}, {{machine}}; a text of the one line
{{experiment hops}} shows one experiment. A mean is given with its 95 % interval over seeds
(Student's t). Rows are compared in pairs: both of a pair have the same seed, and so base, data and
prompts; a difference is significant if its interval excludes zero.
"""
from __future__ import annotations

import importlib.util
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from data import read_object, write_complete
from parallel import one_line_errors
from tools.experiment import ROOT, Record, read_records
from tools.pictures import BLUE, GREEN, GREY, VERMILION, png
from tools.variants import (
    DOCUMENTS,
    EXPERIMENTS,
    MODEL_EXPERIMENTS,
    MODEL_SIZES,
    SIZES,
    Cell,
    Run,
    Table,
    runs_of,
)
from train import Parser, directory, existing, writable

# the 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)


# -------------------------------------------------------------------------------------- statistics


class Interval(NamedTuple):
    """A mean, and how far its 95 % interval reaches to both sides."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def interval(values: list[float]) -> Interval:
    """Of a mean over seeds: t s / sqrt(n), with the sample's standard deviation s and Student's t
    of n - 1 degrees of freedom. Of 1, 2, 3, 4 and 5: 3 ± 2.776 x 1.5811 / 2.2361 = 1.963."""
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} seed has no spread; run two or more")
    quantile = STUDENT[min(count - 1, len(STUDENT)) - 1]  # beyond the table: a little too wide
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.mean(values), half)


def paired(values: list[float], reference: list[float]) -> Interval:
    """Of the mean difference between two rows, seed by seed: what both share falls out. Seeds with
    5, 7 and 12 against 1, 2 and 9 differ by 4, 5 and 3: 4 ± 2.484; their means are 8 and 4 with
    8.957 and 10.828 around them."""
    return interval([a - b for a, b in zip(values, reference, strict=True)])


# ------------------------------------------------------------------------------------------ results


class Results(NamedTuple):
    """An experiment's records, the seeds for which it is complete, and the size of all."""

    records: dict[tuple[int, Run], Record]
    seeds: list[int]
    size: dict

    def of(self, cell: Cell) -> list[float]:
        """A cell's value for each seed."""
        name = cell.value.format(**self.size)
        return [self.records[seed, cell.run].values[name] for seed in self.seeds]

    def difference(self, table: Table, row: str, column: str) -> Interval:
        """Of a row from the one that others are compared with."""
        return paired(self.of(table.rows[row][column]),
                      self.of(table.rows[table.reference][column]))


def read_results(out: Path, name: str, tables: list[Table]) -> Results:
    """ValueError if an experiment is not complete for two seeds."""
    records = read_records(out)
    runs = runs_of(tables)
    if not records:
        raise ValueError(f"{out}: no experiments there")
    seeds = []
    for seed in sorted({seed for seed, _ in records}):
        if all((seed, run) in records for run in runs):
            seeds.append(seed)
    if len(seeds) < 2:
        raise ValueError(f"{out}: {name} is complete for {len(seeds)} of the two seeds that are "
                         "needed; run tools.experiment again, or take it out of the text")
    return Results(records, seeds, read_object(out / "recipe.json")["size"])


def compared(table: Table) -> list[tuple[str, str]]:
    """All (row, column) but those of the reference."""
    pairs = []
    for row, cells in table.rows.items():
        if row != table.reference:
            pairs += [(row, column) for column in cells]
    return pairs


# ----------------------------------------------------------------------------------------- markdown


def markdown(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| " + " | ".join([title, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, texts in rows.items():
        lines.append("| " + " | ".join([row.replace("<s>", "`<s>`"), *texts]) + " |")
    return "\n".join(lines)


def numbers(table: Table) -> str:
    """How a table's numbers are written: percent with one digit, nats with two."""
    return ".1f" if "%" in table.unit else ".2f"


def means_table(table: Table, results: Results) -> str:
    """Every mean with its interval."""
    form = numbers(table)
    rows = {}
    for row, cells in table.rows.items():
        means = [interval(results.of(cell)) for cell in cells.values()]
        rows[row] = [f"{mean:{form}} ± {half:{form}}" for mean, half in means]
    return markdown(table.unit, list(table.rows[table.reference]), rows)


def differences_table(table: Table, results: Results) -> str:
    """Every row less the reference, bold where zero is excluded."""
    form = numbers(table)
    rows = {}
    for row, column in compared(table):
        difference = results.difference(table, row, column)
        mark = "**" if difference.excludes_zero else ""
        text = f"{mark}{difference.mean:+{form}}{mark} ± {difference.half:{form}}"
        rows.setdefault(row, []).append(text.replace("-", "−"))
    title = f"difference from “{table.reference}”".replace("<s>", "`<s>`")
    return markdown(title, list(table.rows[table.reference]), rows)


def sensitivity(table: Table, results: Results) -> str:
    """From which size on a difference would have been significant, and how many are."""
    form = numbers(table)
    differences = [results.difference(table, *pair) for pair in compared(table)]
    # two rows that are one and the same model differ by 0 ± 0, which says nothing
    halves = sorted(difference.half for difference in differences if difference.half)
    if not halves:
        return "All rows are equal."
    significant = sum(difference.excludes_zero for difference in differences)
    unit = "points" if "%" in table.unit else "nats"
    return (f"An observed difference is significant (bold) from half of its interval on: "
            f"{statistics.median(halves):{form}} {unit} in the median, {halves[0]:{form}} to "
            f"{halves[-1]:{form}} by cell. {significant} of {len(differences)} are; if none were "
            f"real, {len(differences) / 20:.1f} would be by chance.")


def cost(tables: list[Table], results: Results) -> str:
    """What an experiment takes, from the CPU seconds of its runs."""
    runs = runs_of(tables)
    seconds = sum(results.records[seed, run].seconds for seed in results.seeds for run in runs)
    seeds = ", ".join(map(str, results.seeds))
    return (f"{len(runs)} runs a seed; seeds {seeds}: {seconds / 120:.0f} minutes on two cores, if "
            "no other experiment shares them.")


def processor() -> str:
    """The name of this machine's CPU."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", file.read_text()) if file.exists() else []
    return names[0] if names else "an unknown CPU"


def shared_cost(out: Path) -> str:
    """What text, documents and bases take, which all experiments share."""
    made = [record for record in read_records(out).values() if not record.values]
    seeds = sum(record.run == DOCUMENTS for record in made)
    minutes = sum(record.seconds for record in made) / 120
    return (f"Text, documents and bases of {seeds} seeds, which all share: {minutes:.0f} minutes "
            f"on two cores (torch {torch.__version__}, {processor()}).")


# ------------------------------------------------------------------------------------------ figures


def draw_dots(panel, table: Table, results: Results, column: str) -> None:
    """One column: a row's seeds as small dots, its mean with the interval; the reference blue, what
    differs from it vermilion and filled, what does not hollow and grey."""
    rows = list(table.rows)
    for place, row in enumerate(rows):
        values = results.of(table.rows[row][column])
        mean, half = interval(values)
        face = edge = BLUE
        if row != table.reference:
            differs = results.difference(table, row, column).excludes_zero
            edge = VERMILION if differs else GREY
            face = edge if differs else "white"
        panel.plot(values, [place] * len(values), "o", color="#aaaaaa", markersize=4, zorder=1)
        panel.errorbar(mean, place, xerr=half, fmt="o", color=edge, markerfacecolor=face,
                       markersize=9, capsize=4, linewidth=2, zorder=2)
        if row == table.reference:
            panel.axvline(mean, color=BLUE, linewidth=1, linestyle=":", zorder=0)
    panel.set_yticks(range(len(rows)), rows, fontsize=13)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(-4, 104)
    panel.set_title(column, fontsize=14, fontweight="bold")
    panel.tick_params(axis="x", labelsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def dots_figure(table: Table, results: Results) -> bytes:
    """A panel a column, three or four side by side."""
    from matplotlib.figure import Figure

    titles = list(table.rows[table.reference])
    across = min(len(titles), 4 if len(titles) % 4 == 0 else 3)
    down = math.ceil(len(titles) / across)
    size = (max(13.8, 3 + 3.6 * across), down * (1.2 + 0.42 * len(table.rows)))
    figure = Figure(figsize=size, dpi=80, layout="constrained", facecolor="white")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for panel, title in zip(panels[:len(titles)], titles, strict=True):
        draw_dots(panel, table, results, title)
    for panel in panels[len(titles):]:
        panel.set_axis_off()
    figure.supxlabel(f"{table.unit}: seeds (small), mean with its 95 % interval.  Filled: differs "
                     f"from “{table.reference}” (blue); hollow: no difference seen", fontsize=13)
    return png(figure)


def curves_figure(tables: list[Table], results: Results) -> bytes:
    """A panel a table: a row is a curve over its columns, with its intervals as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.6), dpi=80, layout="constrained", facecolor="white")
    for panel, table in zip(figure.subplots(1, len(tables)), tables, strict=True):
        colours = {}
        for row, cells in table.rows.items():
            family = row.partition(",")[0]  # a colour each; trained or not: the line's kind
            colour = colours.setdefault(family, (VERMILION, BLUE, GREEN)[len(colours) % 3])
            means = [interval(results.of(cell)) for cell in cells.values()]
            middle = [mean for mean, _ in means]
            low = [mean - half for mean, half in means]
            high = [mean + half for mean, half in means]
            style = ":" if "untrained" in row else "-"
            panel.plot(middle, style, color=colour, linewidth=2.5, marker="o", label=row)
            panel.fill_between(range(len(middle)), low, high, color=colour, alpha=0.13)
        titles = list(table.rows[table.reference])
        panel.set_xticks(range(len(titles)), titles, fontsize=11, rotation=35, ha="right")
        panel.tick_params(axis="y", labelsize=12)
        panel.set_ylabel(table.unit, fontsize=14)
        if "%" in table.unit:
            panel.set_ylim(-4, 104)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=13)
    return png(figure)


def draw(tables: list[Table], results: Results) -> bytes:
    if len(tables) > 1:
        return curves_figure(tables, results)
    return dots_figure(tables[0], results)


# --------------------------------------------------------------------------------------------- page


class Page(NamedTuple):
    """Where the results of a page are, and where it and its figures go."""

    experiments: Path
    on_model: Path | None  # results with --model
    figures: Path
    out: Path

    def experiment(self, name: str) -> str:
        """Command, figure and tables of an experiment with the tiny model."""
        tables = EXPERIMENTS[name]
        results = read_results(self.experiments, name, tables)
        command = f"python -m tools.experiment {name} --out {self.experiments}"
        return self.section(f"experiment-{name}", tables, results, command, cost(tables, results))

    def model(self, name: str) -> str:
        """The same with a real checkpoint, if there are results."""
        if not self.on_model:
            return f"{name}: not measured yet."
        tables = MODEL_EXPERIMENTS[name]
        results = read_results(self.on_model, name, tables)
        command = f"python -m tools.experiment {name} --model $M --out {self.on_model}"
        seeds = ", ".join(map(str, results.seeds))
        return self.section(f"model-{name}", tables, results, command, f"Seeds {seeds}.")

    def section(self, name: str, tables: list[Table], results: Results, command: str,
                note: str) -> str:
        """The Markdown of an experiment; its figure is written."""
        figure = self.figures / f"{name}.png"
        write_complete(figure, draw(tables, results))
        address = Path(os.path.relpath(figure, self.out.parent)).as_posix()
        seeds = " ".join(map(str, results.seeds))
        if results.size in (SIZES["toy"], MODEL_SIZES["toy"]):
            command += " --size toy"
            note += " Of size toy: these numbers mean nothing."
        parts = [f"```bash\n{command} --seeds {seeds}\n```", note, f"![{name}]({address})"]
        for table in tables:
            parts += [means_table(table, results), differences_table(table, results),
                      sensitivity(table, results)]
        return "\n\n".join(parts)

    def fill(self, text: str) -> str:
        """`text` with its {{...}} lines replaced."""
        parts = []
        for line in text.splitlines():
            match = re.fullmatch(r"\{\{(\w+) ?(.*)\}\}", line) if "{{" in line else None
            kind, argument = match.groups() if match else ("", "")
            if kind == "experiment" and argument in EXPERIMENTS:
                line = self.experiment(argument)
            elif kind == "model" and argument in MODEL_EXPERIMENTS:
                line = self.model(argument)
            elif kind == "output":
                line = output_section(argument)
            elif kind == "machine":
                line = shared_cost(self.experiments)
            elif "{{" in line:
                raise ValueError(f"{line}: unknown; use experiment with one of "
                                 f"{', '.join(EXPERIMENTS)}, model with one of "
                                 f"{', '.join(MODEL_EXPERIMENTS)}, output with a command, machine")
            parts.append(line)
        return "\n".join(parts) + "\n"


def output_section(command: str) -> str:
    """A command, and what it prints. ValueError if it fails."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # this python
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, text=True,
                            capture_output=True, env=os.environ | {"PATH": path})
    if result.returncode:
        raise ValueError(f"{command}: {result.stderr.strip()}")
    return f"```\n$ {command}\n{result.stdout.rstrip()}\n```"


def parser() -> Parser:
    parser = Parser("Write the page of all experiments.")
    add = parser.add_argument
    add("experiments", type=directory, help="--out of tools.experiment")
    add("--on-model", type=existing, help="the same of its --model, where there is one")
    add("--text", type=existing, required=True, help="the page without numbers, see above")
    add("--out", type=writable, required=True, help="the page, Markdown")
    add("--figures", type=directory, required=True, help="directory for experiment-NAME.png")
    return parser


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("figures need matplotlib: pip install -r requirements-dev.txt")
        a.figures.mkdir(parents=True, exist_ok=True)
        page = Page(a.experiments, a.on_model, a.figures, a.out)
        write_complete(a.out, page.fill(a.text.read_text()).encode())


if __name__ == "__main__":
    main()
