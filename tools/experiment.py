"""The paper's claims and its readers' questions as experiments that a laptop can run.

    python -m tools.experiment rope --seeds 0 1 2 3 4 --out out/experiments
    python -m tools.experiment rope --model MODEL_DIR --seeds 0 1 --out out/smollm2    # on a GPU
    bash runs/experiments.sh      # all of them, and the page that shows them

What is run stands in tools/variants.py, each run once a seed: a model of 0.7M parameters with a
window of 128 tokens is carried to 2,048 by so few steps that variants still differ. Variants of a
seed share their base, their data's order and their prompts, so that tools.report can compare them
in pairs. With --model the base is a real checkpoint.

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
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import digest, locked, parse_json, read_object, write_complete
from parallel import one_line_errors
from tools.variants import (
    BASES,
    DOCUMENTS,
    EXPERIMENTS,
    MODEL_EXPERIMENTS,
    MODEL_SIZES,
    MODEL_TEXT,
    SIZES,
    TEXT,
    Run,
    base,
    base_model,
    runs_of,
)
from train import LOCK, Parser, directory, existing, nonnegative, positive

ROOT = Path(__file__).resolve().parent.parent
KEEP_MEMORY = {  # glibc: to give back what is freed takes a third of a step on a CPU
    "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456"}

# -------------------------------------------------------------------------------- what was measured


def measured(place: Path) -> dict[str, float]:
    """The values in all results of a run, NAME.json or NAME.jsonl, by name: of needles "NAME 2048"
    and, of a depth, "NAME 2048 at 50 %", in % of exact matches; of needles in pairs "NAME two facts
    2048"; of answers to RULER "NAME vt 2048", in %; of losses "NAME 128-256", in nats a token."""
    values = {}
    for file in sorted(place.glob("*.jsonl")):
        scores = {}
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            answer = parse_json(line, f"{file}, line {number}")
            if "score" in answer:  # settings have none, nor have prompts
                name = f"{file.stem} {answer['task']} {answer['length']}"
                scores.setdefault(name, []).append(100 * answer["score"])
        values |= {name: statistics.mean(column) for name, column in scores.items()}
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
        text/               tokenizer, corpus, the bases' shapes; with --model the corpus alone
        seed-0/documents    documents of a seed
        seed-0/llama        a base; qwen2, qwen3
        work/               runs at work; each goes when its line is written
        runs.jsonl          a line a run, see `Record`
        log.txt             all commands, and what they have said
    """

    def __init__(self, out: Path, size: str, model: Path | None, jobs: int) -> None:
        """`model`: a real checkpoint. ValueError if `out` holds something else."""
        self.out = out.resolve()  # commands run in the repository
        self.jobs = jobs
        recipe = {"size": SIZES[size], "made": [TEXT, DOCUMENTS, *map(base_model, BASES)]}
        if model:
            recipe = {"size": MODEL_SIZES[size], "made": [MODEL_TEXT], "model": digest(model)}
        self.places = recipe["size"] | {  # what {...} in any command stands for
            "text": self.out / "text", "model": model and model.resolve(),
            "packages": sysconfig.get_paths()["purelib"]}
        content = json.dumps(recipe, indent=1).encode()
        file = self.out / "recipe.json"
        names = {path.name for path in self.out.iterdir()} - {LOCK}
        if names and file.name not in names:
            raise ValueError(f"--out {out}: holds files, but no experiments; choose another "
                             "directory")
        if names and file.read_bytes() != content:
            raise ValueError(f"--out {out}: holds experiments of another --size or --model, or of "
                             "an earlier version; choose another directory")
        write_complete(file, content)
        # what a killed program has left, whose last commands may still write there
        shutil.rmtree(self.out / "work", ignore_errors=True)
        (self.out / "work").mkdir(exist_ok=True)
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
        words = [word.format(**places) for word in text.split()]
        program = words[0]
        if not program.endswith(".py"):
            words.insert(0, "-m")
        threads = max(1, os.cpu_count() // self.jobs)
        variables = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(threads)}
        with tempfile.TemporaryFile() as said:
            with self.writing:
                if self.is_closed:
                    raise ValueError("stopped")
                child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=said,
                                         stderr=said, env=variables)
                self.children.add(child)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            with self.writing:
                self.children.remove(child)
                said.seek(0)
                spoken = said.read().decode(errors="replace").replace("\r", "\n")
                with open(self.out / "log.txt", "a") as log:
                    log.write(f"$ python {shlex.join(words)}\n{spoken}")
        made = Path(words[words.index("--out") + 1])
        if program in ("train.py", "sft.py"):  # stopped by a signal they end well, without it
            made = made / "final"
        if child.returncode or not made.exists():
            last = (spoken.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"{program} has failed (seed {places['seed']}), see "
                             f"{self.out}/log.txt: {last}")
        return usage.ru_utime + usage.ru_stime

    def make(self, run: Run, seed: int, keep: Path | None = None) -> None:
        """Run it and write its line, unless that has been done; `keep`: where what it makes goes,
        and is found."""
        if keep.exists() if keep else (seed, run) in self.records:
            return
        with tempfile.TemporaryDirectory(dir=self.out / "work") as place:
            made = Path(place) / "made"
            made.mkdir()
            of_seed = self.out / f"seed-{seed}"
            places = self.places | {"seed": seed, "run": made, "data": of_seed / "documents",
                                    "bases": of_seed}
            seconds = sum(self.command(text, places) for text in run)
            record = Record(seed, run, measured(made), round(seconds, 1))
            if keep:
                keep.parent.mkdir(exist_ok=True)
                made.rename(keep)
        with self.writing, open(self.out / "runs.jsonl", "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            line = as_line(record)
            if file.write(line) < len(line):  # a full disk; half a line would spoil the next one
                file.truncate(end)
                raise OSError(f"{file.name}: not written, no space left on device")
            self.records[seed, run] = record

    def all(self, jobs: list[tuple], what: str) -> None:
        """`make` all of them, several at a time."""
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(total=len(jobs), desc=what) as bar:
            try:
                futures = [pool.submit(self.make, *job) for job in jobs]
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
    add("--seeds", type=nonnegative, nargs="+", default=[0, 1, 2, 3, 4],
        help="every run is made once for each")
    add("--out", type=directory, required=True,
        help="directory; experiments in it share runs")
    add("--model", type=existing, help="a real checkpoint (SmolLM2-135M-Instruct) as the base")
    add("--jobs", type=positive,
        help="runs at a time (if not given: one a core; with --model one)")
    add("--size", choices=tuple(SIZES), default="full",
        help="toy: to see that all runs; its numbers mean nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make text, documents and bases, then the runs."""
    with one_line_errors():
        a = parser().parse_args(argv)
        experiments = MODEL_EXPERIMENTS if a.model else EXPERIMENTS
        if a.name not in experiments:
            raise ValueError(f"--model has {', '.join(experiments)}, not {a.name}")
        runs = runs_of(experiments[a.name])
        seeds = list(dict.fromkeys(a.seeds))  # each once
        a.out.mkdir(parents=True, exist_ok=True)
        with locked(a.out / LOCK), sigterm_as_ctrl_c():
            jobs = a.jobs or (1 if a.model else os.cpu_count())
            laboratory = Laboratory(a.out, a.size, a.model, jobs)
            text = laboratory.out / "text"
            laboratory.all([(MODEL_TEXT if a.model else TEXT, 0, text)], "text")
            if not a.model:
                write_shapes(text)
                prepare_seeds(laboratory, runs, seeds)
            laboratory.all([(run, seed) for seed in seeds for run in runs], a.name)
        print(f"{a.out} has {a.name} for seeds {' '.join(map(str, seeds))}; tools.report shows it")


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Both end the commands at work and the program, with one line."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def prepare_seeds(laboratory: Laboratory, runs: list[Run], seeds: list[int]) -> None:
    """Documents of each seed, and the bases from which these runs start."""
    commands = list(itertools.chain.from_iterable(runs))
    families = [family for family in BASES if any(base(family) in text for text in commands)]
    documents = []
    bases = []
    for seed in seeds:
        place = laboratory.out / f"seed-{seed}"
        documents.append((DOCUMENTS, seed, place / "documents"))
        bases += [(base_model(family), seed, place / family) for family in families]
    laboratory.all(documents, "documents")
    laboratory.all(bases, "bases")


if __name__ == "__main__":
    main()
