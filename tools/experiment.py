"""The paper's claims and its readers' questions as experiments that a laptop can run.

    python -m tools.experiment rope --seeds 0 1 2 3 4 --out out/experiments
    bash runs/experiments.sh      # all of them, and the page that shows them

An experiment is a table of runs: a row is a variant, and a run a few commands, those of
runs/tiny.sh with other options. Each is made once a seed: a model of 0.7M parameters with a window
of 128 tokens is carried to 2,048 by so few steps that variants still differ. Variants of a seed
share their base, their data's order and their prompts, so that tools.report can compare them in
pairs.

A run that has come to its end is a line of `runs.jsonl` in --out: its commands, its seed, what was
measured, its CPU seconds. It is not run again, whichever experiment asks for it: after whatever has
stopped this program, the same command goes on.
"""
from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import locked, parse_json, read_object, write_complete
from parallel import one_line_errors
from train import LOCK, Parser, directory, nonnegative, positive

ROOT = Path(__file__).resolve().parent.parent
ONE_CORE = {  # of a command; glibc keeps what it frees: to give it back takes a third of a step
    "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "268435456"}
# how much of everything: "toy" shows that all runs, and measures nothing
SIZES = {
    "full": {"documents": 8000, "long": 200, "mixed": 600, "short": 1200, "base_steps": 500,
             "steps": 60, "half": 30, "third": 20, "two_thirds": 40, "double": 120, "all": 300,
             "few": 10, "many": 40, "samples": 24, "texts": 40},
    "toy": {"documents": 64, "long": 8, "mixed": 8, "short": 8, "base_steps": 2,
            "steps": 3, "half": 2, "third": 1, "two_thirds": 2, "double": 4, "all": 2,
            "few": 1, "many": 2, "samples": 1, "texts": 1},
}

# ---------------------------------------------------------------- commands; a run fills their {...}

Run = tuple[str, ...]  # commands; what one with an --out NAME.json writes is what is measured
LENGTHS = (128, 512, 2048)
DEPTHS = ("0", "12.5", "25", "37.5", "50", "62.5", "75", "87.5", "100")
STRETCHES = (0, 128, 256, 384, 512, 1024, 1920)  # of positions: where 128 of them begin
BASES = ("llama", "qwen2", "qwen3")  # Qwen2: biases of q, k and v; Qwen3: norms of q and k

TEXT = (
    "tools.train_tokenizer --source stdlib --vocab-size 1024 --out {run}/tokenizer",
    "tools.prepare --source code=stdlib --tokenizer {run}/tokenizer --out {run}/corpus",
)
MADE = "--corpus {text}/corpus --tokenizer {text}/tokenizer --seed {seed}"
FACTS = f"tools.tiny_documents retrieval {MADE}"
FOR_BASE = f"{FACTS} --chat-share 0.3 --count {{documents}}"
FOR_STAGE1 = f"{FACTS} --text-loss 0.05"
DOCUMENTS = (
    f"{FOR_BASE} --length 64 --most-facts 2 --out {{run}}/facts-64",
    f"{FOR_BASE} --length 128 --most-facts 4 --out {{run}}/facts-128",
    f"{FOR_STAGE1} --length 125 --most-facts 4 --chat-share 0.4 --count {{short}} "
    "--out {run}/facts-short",
    f"{FOR_STAGE1} --length 509 --most-facts 8 --chat-share 0.4 --count {{long}} "
    "--out {run}/facts-middle",
    f"{FOR_STAGE1} --length 2045 --most-facts 24 --chat-share 0.4 --count {{long}} "
    "--out {run}/facts-long",
    f"{FOR_STAGE1} --shortest 64 --length 2045 --most-facts 24 --chat-share 0.4 --count {{mixed}} "
    "--out {run}/facts-mixed",
    # four documents in a row, 2,048 tokens with their <s>: what the last asks, the first may know
    f"{FOR_STAGE1} --length 2036 --most-facts 24 --chat-share 0 --pieces 4 --count {{long}} "
    "--out {run}/pieces",
    f"tools.tiny_documents chat {MADE} --length 128 --count {{documents}} --out {{run}}/chat.jsonl",
)
COMMON = "--seed {seed} --dtype float32 --weight-decay 0.05 --validation-sequences 0"


def words(text: str) -> str:
    """With one blank where an option that was left out has left two."""
    return " ".join(text.split())


def base_model(family: str) -> Run:
    """From random weights to a window of 128 tokens, as in runs/tiny.sh."""
    return (
        f"train.py --config {{text}}/{family}.json --tokenizer {{text}}/tokenizer "
        "--data {data}/facts-64 --separator none --sequence-length 64 --batch-size 16 "
        "--steps {base_steps} --learning-rate 1.5e-3 --final-learning-rate 0.8 "
        f"--warmup-steps 10 {COMMON} --out {{run}}/64",
        "train.py --model {run}/64/final --data {data}/facts-128 --separator none "
        "--sequence-length 128 --batch-size 16 --steps {base_steps} --learning-rate 1.2e-3 "
        f"--final-learning-rate 0.05 --warmup-steps 10 {COMMON} --out {{run}}/base",
    )


def base(family: str = "llama") -> str:
    return f"{{bases}}/{family}/base/final"


YARN = "--rope-kind yarn --rope-factor 16 --original-length 128"
BLEND = ("{text}/corpus=0.04 {data}/facts-long=0.46 {data}/facts-mixed=0.28 "
         "{data}/facts-short=0.22 --short-length 1024 --short-weight 0.5 --long-length 2048 "
         "--long-weight 2")
MIDDLE = BLEND.replace("facts-long", "facts-middle")
# no up-sampling: a document that is drawn twice or not at all leaves its neighbours
RELATED = "{text}/corpus=0.04 {data}/pieces=0.46 {data}/facts-mixed=0.28 {data}/facts-short=0.22"


def stage1(rule: str = YARN, more: str = "", steps: str = "{steps}", blend: str = BLEND,
           length: int = 2048, model: str = base(), out: str = "stage1") -> str:
    """Continued pretraining from `model`, 2,048 tokens a step."""
    return words(
        f"train.py --model {model} {rule} --new-window {length} --data {blend} "
        f"--sequence-length {length} --batch-size {2048 // length} --steps {steps} "
        f"--learning-rate 8e-4 --final-learning-rate 0.05 --warmup-steps 10 {more} {COMMON} "
        f"--out {{run}}/{out}")


PROMPTS = "--haystack {text}/corpus --samples {samples} --seed 9{seed:03}"


def needles(model: str = "{run}/stage1/final", rule: str = "", more: str = "",
            out: str = "needles") -> str:
    return words(f"eval_niah.py {model} {rule} {PROMPTS} --task mixed --lengths 128 512 2048 "
                 f"--depths 5 {more} --out {{run}}/{out}.json")


def pairs(kind: str) -> str:
    return (f"tools.needle_pairs {{run}}/stage1/final --pair {kind} {PROMPTS} --lengths 2048 "
            f"--depths 5 --out {{run}}/{kind}.json")


def by_place(model: str, rule: str = "") -> tuple[str, str]:
    """Needles at nine depths of 2,048 tokens, and the loss by position."""
    return (
        words(f"eval_niah.py {model} {rule} {PROMPTS} --task mixed --lengths 2048 --depths 9 "
              "--out {run}/depth.json"),
        words(f"tools.perplexity {model} {rule} --haystack {{text}}/corpus --lengths 2048 "
              "--samples {texts} --buckets 16 --out {run}/loss.json"),
    )


# ------------------------------------------------------------------------------------- experiments


class Cell(NamedTuple):
    """Which run, and which of its values (see `measured`)."""

    run: Run
    value: str


class Table(NamedTuple):
    """Variants in rows, each with the same columns; one row is what others are compared with."""

    rows: dict[str, dict[str, Cell]]
    reference: str
    unit: str = "exact match, %"


def by_length(title: str, run: Run, name: str = "needles",
              lengths: tuple[int, ...] = LENGTHS) -> dict[str, Cell]:
    """Columns: needles of each length."""
    return {f"{title}, {length:,}": Cell(run, f"{name} {length}") for length in lengths}


def yarn(factor: int) -> str:
    return f"--rope-kind yarn --rope-factor {factor} --original-length 128"


def with_rule(rule: str) -> dict[str, Cell]:
    """A rule without training, and after stage 1."""
    untrained = (needles(base(), rule),)
    trained = (stage1(rule), needles())
    return by_length("untrained", untrained) | by_length("60 steps", trained)


def with_separator(separator: str) -> dict[str, Cell]:
    """One training, measured at each third of its steps."""
    options = f"--separator {separator} --checkpoint-every {{third}} --keep-checkpoints 3"
    checkpoints = {"20": "{third:08}", "40": "{two_thirds:08}", "60": "{steps:08}"}
    run = [stage1(more=options)]
    for steps, number in checkpoints.items():
        run.append(needles(f"{{run}}/stage1/checkpoint-{number}", out=steps))
    cells = {}
    for steps in checkpoints:
        cells |= by_length(f"{steps} steps", tuple(run), steps)
    return cells


def with_mask(options: str) -> dict[str, Cell]:
    """Stage 1 on documents that follow their neighbours in a text, or on the same ones shuffled."""
    cells = {}
    for data, order in (("unrelated", ""), ("related", "--stored-order")):
        train = stage1(more=f"{options} {order}", blend=RELATED)
        run = (train, needles(), pairs("border"))
        cells |= by_length(data, run, lengths=(128, 2048))
        for place in ("same document", "another document"):
            cells[f"{data}, {place}"] = Cell(run, f"border {place} 2048")
    return cells


def in_two_steps(half: str) -> Run:
    """To 512 tokens with s = 4, and from there to 2,048 with s = 16; as many tokens each."""
    first = stage1(yarn(4), steps=half, blend=MIDDLE, length=512, out="first")
    return (first, stage1(steps=half, model="{run}/first/final"), needles())


def stage2(steps: str, out: str) -> str:
    return ("sft.py --model {run}/stage1/final --data {data}/chat.jsonl --sequence-length 128 "
            f"--batch-size 32 --micro-batch-size 32 --steps {steps} --learning-rate 1e-4 "
            f"--warmup-steps 0 {COMMON} --out {{run}}/{out}")


def before_and_after_stage2() -> Table:
    """One stage 1, and stage 2 on two numbers of samples; all asked in both ways."""
    run = [stage1(steps="{all}"), stage2("{few}", "few"), stage2("{many}", "many"), pairs("hops")]
    rows = {"after stage 1": "stage1", "stage 2, 320 samples": "few",
            "stage 2, 1,280 samples": "many"}
    models = {f"{{run}}/{name}/final": name for name in rows.values()}
    for model, name in models.items():
        run.append(needles(model, out=f"{name}-plain"))
        run.append(needles(model, more="--prompt chat", out=f"{name}-chat"))
    untrained = {"plain": (needles(base(), YARN),),
                 "chat": (needles(base(), YARN, "--prompt chat"),)}
    cells = {"base with YaRN, untrained": {}}
    for form, of_base in untrained.items():
        cells["base with YaRN, untrained"] |= by_length(form, of_base)
        for row, name in rows.items():
            cells.setdefault(row, {}).update(by_length(form, tuple(run), f"{name}-{form}"))
    return Table(cells, "after stage 1")


def of_bases(rule: str | None) -> dict[str, Cell]:
    """A rule on three bases without training; without one, YaRN after stage 1."""
    cells = {}
    for family in BASES:
        model = base(family)
        run = (stage1(model=model), needles()) if rule is None else (needles(model, rule),)
        cells |= by_length(family, run)
    return cells


def places_of(rule: str, trained: bool) -> Run:
    if trained:
        return (stage1(rule), *by_place("{run}/stage1/final"))
    return by_place(base(), rule)


def by_depth_and_position() -> tuple[Table, Table]:
    """Where in a prompt, and where in a text, a factor that is too small fails."""
    runs = {}
    for name, rule in (("nothing", ""), ("s = 4", yarn(4)), ("s = 16", YARN)):
        runs[f"{name}, untrained"] = places_of(rule, trained=False)
        runs[f"{name}, 60 steps"] = places_of(rule, trained=True)
    depths = {}
    losses = {}
    for row, run in runs.items():
        depths[row] = {f"{depth} %": Cell(run, f"depth 2048 at {depth} %") for depth in DEPTHS}
        losses[row] = {f"{start:,} to {start + 128:,}": Cell(run, f"loss {start}-{start + 128}")
                       for start in STRETCHES}
    return (Table(depths, "s = 16, 60 steps"),
            Table(losses, "s = 16, 60 steps", "loss, nats a token, by position"))


EXPERIMENTS = {
    "rope": [Table({
        "YaRN": with_rule(YARN),
        "YaRN, no temperature": with_rule(f"{YARN} --no-attention-temperature"),
        "NTK-aware": with_rule("--rope-kind ntk --rope-factor 16"),
        "linear": with_rule("--rope-kind linear --rope-factor 16"),
        "theta 500,000": with_rule("--rope-theta 500000"),
        "nothing": with_rule(""),
    }, "YaRN")],
    "factor": [Table({
        "s = 16, beta_fast 4": with_rule(YARN),
        "s = 8": with_rule(yarn(8)),
        "s = 32": with_rule(yarn(32)),
        "s = 64": with_rule(yarn(64)),
        "beta_fast 6": with_rule(f"{YARN} --beta-fast 6"),
        "beta_fast 32": with_rule(f"{YARN} --beta-fast 32"),
        "no temperature": with_rule(f"{YARN} --no-attention-temperature"),
    }, "s = 16, beta_fast 4")],
    "separator": [Table({
        "<s>": with_separator("<s>"),
        "none": with_separator("none"),
        "end and begin of text": with_separator("bos_eos"),
    }, "<s>")],
    "mask": [Table({
        "no mask, <s>": with_mask(""),
        "no mask, no separator": with_mask("--separator none"),
        "mask, <s>": with_mask("--cross-document-mask"),
        "mask, no separator": with_mask("--cross-document-mask --separator none"),
    }, "no mask, <s>")],
    "steps": [Table({
        "one step to 2,048": by_length("60 steps", (stage1(), needles()))
        | by_length("120 steps", (stage1(steps="{double}"), needles())),
        "two steps, by way of 512": by_length("60 steps", in_two_steps("{half}"))
        | by_length("120 steps", in_two_steps("{steps}")),
    }, "one step to 2,048")],
    "short": [before_and_after_stage2()],
    "base": [Table({
        "no scaling": of_bases(""),
        "YaRN, s = 8": of_bases(yarn(8)),
        "YaRN, s = 16": of_bases(YARN),
        "YaRN, s = 32": of_bases(yarn(32)),
        "YaRN, s = 16, 60 steps": of_bases(None),
    }, "YaRN, s = 16")],
    "depth": [*by_depth_and_position()],
}


def runs_of(name: str) -> list[Run]:
    """All runs of an experiment, each once."""
    runs = {}
    for table in EXPERIMENTS[name]:
        for row in table.rows.values():
            for cell in row.values():
                runs[cell.run] = None
    return list(runs)


# -------------------------------------------------------------------------------- what was measured


def measured(place: Path) -> dict[str, float]:
    """The values in all results NAME.json of a run, by name: of needles "NAME 2048" and, of a
    depth, "NAME 2048 at 50 %", in % of exact matches; of needles in pairs "NAME two facts 2048"; of
    losses "NAME 128-256", in nats a token."""
    values = {}
    for file in sorted(place.glob("*.json")):
        name = file.stem
        results = read_object(file)
        for twin, part in results.get("twins", {"": results}).items():
            for mean in part.get("means", ()):
                values[" ".join(f"{name} {twin} {mean['length']}".split())] = mean["accuracy"]
        if "twins" not in results:
            for cell in results.get("cells", ()):
                depth = f"{100 * cell['depth']:g} %"
                values[f"{name} {cell['length']} at {depth}"] = cell["accuracy"]
        edges = results.get("edges", ())
        for (start, end), loss in zip(itertools.pairwise(edges), results.get("loss", ()),
                                      strict=True):
            values[f"{name} {start}-{end}"] = loss
    return values


class Record(NamedTuple):
    """A run that has come to its end, a line of runs.jsonl."""

    seed: int
    run: Run
    values: dict[str, float]
    seconds: float  # of one core


def as_line(record: Record) -> bytes:
    return f"{json.dumps(record._asdict())}\n".encode()


def read_records(out: Path) -> dict[tuple[int, Run], Record]:
    """What has been run. A line that a killed program has left half counts as not there."""
    records = {}
    file = out / "runs.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            stated = parse_json(line, f"{file}, line {number}")
            record = Record(stated["seed"], tuple(stated["run"]), stated["values"],
                            stated["seconds"])
            records[record.seed, record.run] = record
    return records


# ------------------------------------------------------------------------------------- running them


class Laboratory:
    """Runs commands in a directory, each run once. What is there:

        recipe.json         what all runs have in common
        text/               the standard library: tokenizer, corpus; and the bases' shapes
        seed-0/documents    documents of a seed
        seed-0/llama        a base; qwen2, qwen3
        work/               runs at work; each goes when its line is written
        runs.jsonl          a line a run, see `Record`
        log.txt             all commands, and what they have said
    """

    def __init__(self, out: Path, size: str) -> None:
        """ValueError if `out` holds something else."""
        self.out = out.resolve()  # commands run in the repository
        self.size = SIZES[size]
        recipe = {"size": self.size, "made": [TEXT, DOCUMENTS, *map(base_model, BASES)]}
        content = json.dumps(recipe, indent=1).encode()
        file = self.out / "recipe.json"
        if file.exists() and file.read_bytes() != content or not file.exists() and any(
                path.name != LOCK for path in self.out.iterdir()):
            raise ValueError(f"--out {out}: holds something else, or what another --size or an "
                             "earlier version has made; choose another directory")
        write_complete(file, content)
        shutil.rmtree(self.out / "work", ignore_errors=True)  # what a killed program has left
        (self.out / "work").mkdir()
        self.records = read_records(self.out)
        lines = [as_line(record) for record in self.records.values()]
        write_complete(self.out / "runs.jsonl", b"".join(lines))  # without one that is half
        self.writing = threading.Lock()
        self.children = set()  # commands at work
        self.is_closed = False

    def close(self) -> None:
        """End what is at work."""
        with self.writing:
            self.is_closed = True
            for child in self.children:
                child.terminate()

    def command(self, text: str, places: dict) -> float:
        """Run a command. Returns the CPU seconds it took; ValueError with its last words if it
        fails."""
        program, *options = text.format(**places).split()
        words = [program] if program.endswith(".py") else ["-m", program]
        words += options
        with tempfile.TemporaryFile() as said:
            with self.writing:
                if self.is_closed:
                    raise ValueError("stopped")
                child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=said,
                                         stderr=said, env=os.environ | ONE_CORE)
                self.children.add(child)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            with self.writing:
                self.children.remove(child)
                said.seek(0)
                spoken = said.read().decode(errors="replace").replace("\r", "\n")
                with open(self.out / "log.txt", "a") as log:
                    log.write(f"$ python {shlex.join(words)}\n{spoken}")
        if child.returncode:
            last = (spoken.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"{program} has failed, see {self.out}/log.txt: {last}")
        return usage.ru_utime + usage.ru_stime

    def make(self, run: Run, seed: int, keep: Path | None = None) -> None:
        """Run it and write its line, unless that has been done; or make the directory `keep`."""
        if keep.exists() if keep else (seed, run) in self.records:
            return
        with tempfile.TemporaryDirectory(dir=self.out / "work") as place:
            made = Path(place) / "made"
            made.mkdir()
            of_seed = self.out / f"seed-{seed}"
            places = self.size | {"seed": seed, "run": made, "text": self.out / "text",
                                  "data": of_seed / "documents", "bases": of_seed}
            seconds = sum(self.command(text, places) for text in run)
            record = Record(seed, run, measured(made), round(seconds, 1))
            if keep:
                keep.parent.mkdir(exist_ok=True)
                made.rename(keep)
        with self.writing, open(self.out / "runs.jsonl", "ab") as file:
            file.write(as_line(record))
            self.records[seed, run] = record

    def all(self, jobs: list[tuple], workers: int, what: str) -> None:
        """`make` all of them, so many at a time."""
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc=what) as bar:
            futures = [pool.submit(self.make, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:  # an error, Ctrl-C or SIGTERM
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise


def write_shapes(text: Path) -> None:
    """config.json of each base: runs/tiny.json as another family."""
    tiny = read_object(ROOT / "runs" / "tiny.json")
    for family in BASES:
        content = json.dumps(tiny | {"model_type": family}, indent=1).encode()
        write_complete(text / f"{family}.json", content)


def parser() -> Parser:
    parser = Parser("Run an experiment, or what is not yet there of it.")
    add = parser.add_argument
    add("name", choices=tuple(EXPERIMENTS), help="what is asked: see docs/experiments.md")
    add("--seeds", type=nonnegative, nargs="+", default=[0, 1, 2, 3, 4], help="a run of all each")
    add("--out", type=directory, required=True, help="of all experiments: they share runs")
    add("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, one core each")
    add("--size", choices=tuple(SIZES), default="full", help="toy: shows only that all runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make text, documents and bases, then the runs."""
    with one_line_errors():
        a = parser().parse_args(argv)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        a.out.mkdir(parents=True, exist_ok=True)
        with locked(a.out / LOCK):
            laboratory = Laboratory(a.out, a.size)
            runs = runs_of(a.name)
            text = laboratory.out / "text"
            families = [family for family in BASES if f"/{family}/" in str(runs)]
            documents = []
            bases = []
            for seed in a.seeds:
                place = laboratory.out / f"seed-{seed}"
                documents.append((DOCUMENTS, seed, place / "documents"))
                bases += [(base_model(family), seed, place / family) for family in families]
            laboratory.all([(TEXT, 0, text)], 1, "text")
            write_shapes(text)
            laboratory.all(documents, a.jobs, "documents")
            laboratory.all(bases, a.jobs, "bases")
            laboratory.all([(run, seed) for seed in a.seeds for run in runs], a.jobs, a.name)
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
