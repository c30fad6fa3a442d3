"""The chat samples of stage 2: public sets read, cleaned, deduplicated, decontaminated and drawn.

    python -m tools.chat_blend --source general=sharegpt.json math=metamath.jsonl.gz \\
        --tokenizer DIR --benchmark gsm8k.jsonl --count 100000 --holdout 500 --out out/chat

tools.conversations says which records are read. A sample must pass, in this order: all keys and
turns understood; --max-tokens; no copy, nor nearly one, of an earlier sample; nothing shared with a
benchmark. The rest is drawn by weight.

The directory has train.jsonl and valid.jsonl for sft.py, dropped.jsonl (what was left out, and why)
and report.json. The same samples and seed give the same bytes, in whatever order sources are named;
but of two copies, the one in the source named first stays.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Tokenizer, complete_or_absent, load_tokenizer
from parallel import one_line_errors
from sft import encode_chat, end_of_turn
from tools.conversations import NotUsed, to_messages
from tools.prepare import window_hashes
from tools.records import RECORDS, PassedOver, list_files, read_records, read_text, reader_of
from train import Parser, nonnegative, option, positive

SHINGLE = 20  # characters, about the five words of arXiv 2107.06499
ROWS = 5  # MinHash values a band
MISSED = 1e-3  # share of the pairs right at the threshold that no band brings together
BUCKET = 100  # most samples in a bucket: thousands may share a long instruction
COMPARED = 16  # most samples that one is compared with letter by letter
SHORTEST_ITEM = 20  # letters and digits; shorter ones ("all of the above") say nothing
TABLE_BITS = 26


@dataclass(frozen=True, eq=False)
class Source:
    """What one --source names; `weight` is None unless given."""

    category: str
    path: Path
    weight: Fraction | None
    files: list[Path]
    passed_over: PassedOver


@dataclass(slots=True)
class Sample:
    """A record of a file: `dropped` says why it is no candidate, `split` where it was drawn to."""

    source: Source
    file: Path
    number: int
    messages: list[dict]
    text: str = ""  # normalised messages but the system's, a line each
    tokens: int = 0
    loss_tokens: int = 0
    dropped: dict | None = None
    split: str | None = None

    def drop(self, reason: str, **more) -> None:
        self.dropped = {"reason": reason, **more}
        self.messages = []
        self.text = ""

    def contents(self) -> list[str]:
        """What is said, but for the system message."""
        return [message["content"] for message in self.messages if message["role"] != "system"]


def remaining(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.dropped]


def progress(items: Iterable, what: str) -> tqdm:
    return tqdm(items, what, unit=" samples", disable=None)


# --------------------------------------------------------------------------- reading and cleaning


def read_samples(source: Source, system: str | None, ignored: list[str],
                 cut_off: Counter) -> list[Sample]:
    """Every record of a source, the unusable ones dropped. ValueError if there is no other."""
    samples = []
    unusable = {}  # the first record with each reason
    for path in source.files:
        records = progress(read_records(path), f"read {path.name}")
        for number, (place, record) in enumerate(records, 1):
            sample = Sample(source, path, number, [])
            samples.append(sample)
            try:
                sample.messages = to_messages(record, system, ignored, cut_off)
            except NotUsed as error:
                sample.drop(str(error))
                keys = list(record) if isinstance(record, dict) else []
                unusable.setdefault(str(error), f"{place}, keys: {' '.join(keys) or 'none'}")
    if not remaining(samples):
        reasons = Counter(sample.dropped["reason"] for sample in samples)
        parts = [f"{n:,} {reason} ({unusable[reason]})" for reason, n in reasons.most_common(3)]
        raise ValueError(f"{source.path}: no record can be used: "
                         f"{'; '.join(parts) or 'there is none'}; tools/conversations.py says "
                         "what is read, --ignore takes keys that say nothing")
    return samples


def drop_long(samples: list[Sample], tokenizer: Tokenizer, max_tokens: int) -> None:
    """Count the tokens as training will have them; drop what exceeds `max_tokens`."""
    for sample in progress(samples, "tokenise"):
        tokens, mask = encode_chat(sample.messages, tokenizer)
        sample.tokens = len(tokens)
        sample.loss_tokens = sum(mask)
        if len(tokens) > max_tokens:
            sample.drop("too long", tokens=len(tokens))


# ------------------------------------------------------------------------------------- duplicates


def normalise(text: str) -> str:
    """Letters and digits only, in one case and form: spaces and punctuation cannot hide a copy."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def windows(text: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts int64 (n,), hashes uint64 (n,)) of each run of `size` characters within a line."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lines = np.concatenate([[0], np.cumsum(points == ord("\n"))])
    starts = np.flatnonzero(lines[size:] == lines[:-size])
    return starts, window_hashes(points, size)[starts]


def drop_copies(samples: list[Sample]) -> None:
    """Normalise the texts; drop those that an earlier sample has letter for letter."""
    seen = {}
    for sample in progress(samples, "copies"):
        lines = [normalise(content) or content for content in sample.contents()]  # "+" is not "-"
        sample.text = "\n".join(lines)
        content = sample.text.encode(errors="replace")
        digest = hashlib.blake2b(content, digest_size=16).digest()
        first = seen.setdefault(digest, sample)
        if first is not sample:
            sample.drop("copy", repeats_file=str(first.file), repeats_record=first.number)


def shingles(text: str) -> np.ndarray:
    """Hashes of the different runs of SHINGLE characters, uint64, sorted."""
    return np.unique(windows(text, SHINGLE)[1])


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """How similar two sets of shingles are: what both have, as a share of what either has."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def minhash(samples: list[Sample], count: int) -> Iterator[np.ndarray]:
    """`count` MinHash values of each sample: two agree in a value as often as they are similar.

    Broder, "On the resemblance and containment of documents" (1997).
    """
    from datasketch import MinHash

    hashes = (windows(sample.text, SHINGLE)[1] >> np.uint64(32) for sample in samples)
    sets = (values.tolist() for values in hashes)
    for each in MinHash.generator(sets, num_perm=count, hashfunc=int):  # they are hashes already
        yield each.hashvalues


def drop_near_copies(samples: list[Sample], threshold: float) -> None:
    """Drop samples whose Jaccard similarity to an earlier one that stays is `threshold` or more.

    Only pairs that agree in all ROWS values of a band are compared; there are as many bands as
    MISSED asks for.
    """
    # a sample whose lines are all too short has no shingle
    samples = [s for s in samples if max(map(len, s.text.split("\n"))) >= SHINGLE]
    bands = math.ceil(math.log(MISSED) / math.log(1 - threshold ** ROWS))
    signatures = np.empty((len(samples), bands * ROWS), dtype=np.uint32)
    buckets = defaultdict(list)  # a band and its values -> places of the samples that stay
    for i, values in enumerate(progress(minhash(samples, bands * ROWS), "near copies")):
        signatures[i] = values
        # 1) samples that have a band in common with this one
        rows = values.reshape(bands, ROWS)
        own = [(band, row.tobytes()) for band, row in enumerate(rows)]
        near = set()
        for key in own:
            near.update(buckets[key])
        if near:
            # 2) those that agree most, the earlier one on a tie
            near = np.array(sorted(near))
            agreement = (signatures[near] == values).mean(axis=1)  # within 0.2 of the similarity
            order = np.argsort(-agreement, kind="stable")[:COMPARED]
            order = order[agreement[order] >= threshold - 0.2]
            # 3) compared in full
            likely = [samples[other] for other in near[order]]
            compare_in_full(samples[i], likely, threshold)
        if not samples[i].dropped:
            for key in own:
                if len(buckets[key]) < BUCKET:
                    buckets[key].append(i)


def compare_in_full(sample: Sample, others: list[Sample], threshold: float) -> None:
    """Drop the sample if one of the others is so similar."""
    own = shingles(sample.text)
    for other in others:
        similarity = jaccard(own, shingles(other.text))
        if similarity >= threshold:
            sample.drop("near copy", repeats_file=str(other.file), repeats_record=other.number,
                        similarity=round(similarity, 3))
            return


# -------------------------------------------------------------------------------- decontamination


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        for inner in parts:
            yield from strings(inner)


def read_items(path: Path) -> Iterator[object]:
    """The records of a benchmark's file; of a plain text its lines."""
    reader = reader_of(path)
    for _, record in reader(path):
        if reader is read_text:
            yield from record["text"].splitlines()
        else:
            yield record


class Benchmarks:
    """Windows of all benchmark items to look up: GPT-4's check (arXiv 2303.08774, appendix C), with
    every substring.

    A window in more than `common` records is boilerplate and ignored (as in arXiv 2005.14165,
    appendix C), and so is one that such windows cover by more than half: the few letters after
    "answer the question" are soon the same by chance.
    """

    def __init__(self, files: list[Path], window: int, common: int) -> None:
        """Raises ValueError for a file without an item."""
        self.window = window
        self.records = []  # file and number of each
        self.texts = []  # its items, a line each
        for path in files:
            self.read(path)
        self.find_short_items(common)
        self.find_windows(common)

    def read(self, path: Path) -> None:
        has_items = False
        for number, record in enumerate(progress(read_items(path), f"read {path.name}"), 1):
            texts = {normalise(text) for text in strings(record)}
            items = sorted(text for text in texts if len(text) >= SHORTEST_ITEM)
            self.records.append({"benchmark": str(path), "item": number})
            self.texts.append("\n".join(items))
            has_items = has_items or bool(items)
        if not has_items:
            raise ValueError(f"--benchmark {path}: has no text of {SHORTEST_ITEM} letters and "
                             "digits or more")

    def find_short_items(self, common: int) -> None:
        """`short`: the first record of each item that has no window."""
        owners = defaultdict(list)
        for record, text in enumerate(self.texts):
            for item in text.split("\n"):
                if SHORTEST_ITEM <= len(item) < self.window:
                    owners[item].append(record)
        self.short = {}
        for item, records in owners.items():
            if len(records) <= common:
                self.short[item] = records[0]

    def find_windows(self, common: int) -> None:
        """`hashes`, sorted, of all windows but boilerplate; the `owners` and `starts` of each."""
        found = [windows(text, self.window) for text in self.texts]
        # 1) in how many records each window is
        once = [np.unique(hashes) for _, hashes in found]
        values, records_with = np.unique(np.concatenate(once), return_counts=True)
        # 2) which characters of a record boilerplate covers, which windows these do not
        own_hashes, own_starts, own_records = [], [], []
        for record, (starts, hashes) in enumerate(found):
            usual = starts[records_with[np.searchsorted(values, hashes)] > common]
            covered = np.zeros(len(self.texts[record]), dtype=bool)
            for start in usual:
                covered[start:start + self.window] = True
            before = np.append(0, np.cumsum(covered))  # how many characters before each
            covered_here = before[starts + self.window] - before[starts]
            own = 2 * covered_here <= self.window
            own_hashes.append(hashes[own])
            own_starts.append(starts[own])
            own_records.append(np.full(own.sum(), record))
        # 3) one table of all
        hashes = np.concatenate(own_hashes)
        self.hashes, first = np.unique(hashes, return_index=True)
        self.starts = np.concatenate(own_starts)[first]
        self.owners = np.concatenate(own_records)[first]
        total = sum(len(starts) for starts, _ in found)
        self.counts = {"records": len(self.records), "windows": total,
                       "boilerplate": total - len(hashes)}
        self.table = np.zeros(2**TABLE_BITS, dtype=bool)  # a look-up is far faster than a search
        self.table[self.hashes >> np.uint64(64 - TABLE_BITS)] = True

    def drop_shared(self, samples: list[Sample]) -> None:
        """Drop samples that share a window with an item, or have a short one as message or line."""
        for sample in progress(samples, "decontaminate"):
            shared = self.shared_window(sample.text) or self.shared_item(sample.contents())
            if shared:
                record, excerpt = shared
                sample.drop("contaminated", **self.records[record], excerpt=excerpt)

    def shared_window(self, text: str) -> tuple[int, str] | None:
        """(record, excerpt) of the first window of a text that a record has too."""
        starts, hashes = windows(text, self.window)
        likely = self.table[hashes >> np.uint64(64 - TABLE_BITS)]
        starts = starts[likely]
        hashes = hashes[likely]
        places = np.searchsorted(self.hashes, hashes)
        places = np.minimum(places, len(self.hashes) - 1)  # beyond the last: not the same anyway
        same = self.hashes[places] == hashes
        for start, place in zip(starts[same], places[same], strict=True):
            record = self.owners[place]
            begin = self.starts[place]
            excerpt = text[start:start + self.window]
            if excerpt == self.texts[record][begin:begin + self.window]:  # not only the hash
                return record, excerpt
        return None

    def shared_item(self, contents: list[str]) -> tuple[int, str] | None:
        """(record, item) of the first short item that is a message or a line of one."""
        if not self.short:
            return None
        for content in contents:
            for text in (content, *content.splitlines()):
                item = normalise(text)
                if item in self.short:
                    return self.short[item], item
        return None


# ---------------------------------------------------------------------------------------- drawing


def apportion(total: int, weights: dict) -> dict:
    """`total` in whole numbers in proportion to weights, by largest remainder; a tie: the first."""
    whole = sum(weights.values()) or 1
    exact = {name: Fraction(total * weight) / whole for name, weight in weights.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    lacking = total - sum(counts.values())
    # those that rounding down has cost most
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[:lacking]:
        counts[name] += 1
    return counts


def plan_draw(sources: list[Source], samples: list[Sample], count: int | None) -> dict[Source, int]:
    """How many samples of each source to draw. ValueError if it has not so many."""
    have = Counter(sample.source for sample in samples)
    if not have:
        raise ValueError("no sample is left to draw from; look at --max-tokens, --near-duplicate "
                         "and --window")
    weights = {}
    for source in sorted(sources, key=lambda source: (source.category, str(source.path))):
        if source.weight and not have[source]:
            raise ValueError(f"category {source.category} has too few samples: none is left of "
                             f"{source.path}; leave it out")
        weights[source] = source.weight or have[source]

    # the most that works: a quota is less than 1 below its exact share, so no larger count can
    most = len(samples)
    for source, weight in weights.items():
        if weight:
            most = min(most, math.floor((have[source] + 1) * sum(weights.values()) / weight))
    while any(quota > have[source] for source, quota in apportion(most, weights).items()):
        most -= 1

    plan = apportion(count or most, weights)
    worst = max(plan, key=lambda source: plan[source] - have[source])
    if plan[worst] > have[worst]:
        raise ValueError(f"category {worst.category} has too few samples: {have[worst]} are left "
                         f"of {worst.path}, {plan[worst]} are needed; --count {most} would work")
    return plan


def draw(samples: list[Sample], plan: dict[Source, int], holdout: int, seed: int) -> list[Sample]:
    """The samples of the plan, each with its `split`, ordered by a hash of seed and content."""
    def rank(sample: Sample) -> bytes:
        content = json.dumps([seed, sample.source.category, sample.messages])
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    room = Counter(plan)
    drawn = []
    for sample in sorted(samples, key=rank):
        if room[sample.source]:
            room[sample.source] -= 1
            drawn.append(sample)
    if holdout >= len(drawn):
        raise ValueError(f"--holdout {holdout} must be below the {len(drawn)} samples drawn")
    sizes = Counter(sample.source.category for sample in drawn)
    room = apportion(holdout, dict(sorted(sizes.items())))
    for sample in drawn:
        category = sample.source.category
        sample.split = "valid" if room[category] > 0 else "train"
        room[category] -= 1
    return drawn


# ----------------------------------------------------------------------------------------- output


def report(samples: list[Sample]) -> dict:
    """Counts of each file, of each category, and of the lengths that were drawn."""
    files = {}
    categories = {}
    lengths = Counter()
    for sample in samples:
        name = str(sample.file)
        category = sample.source.category
        if name not in files:
            files[name] = {"category": category, "read": 0, "dropped": Counter(), "kept": 0,
                           "drawn": 0}
        if category not in categories:
            categories[category] = {"train": 0, "valid": 0, "tokens": 0, "loss_tokens": 0}
        files[name]["read"] += 1
        if sample.dropped:
            files[name]["dropped"][sample.dropped["reason"]] += 1
        else:
            files[name]["kept"] += 1
        if sample.split:
            files[name]["drawn"] += 1
            categories[category][sample.split] += 1
            categories[category]["tokens"] += sample.tokens
            categories[category]["loss_tokens"] += sample.loss_tokens
            lengths[1 << (sample.tokens - 1).bit_length()] += 1  # the next power of two
    for counts in files.values():
        counts["dropped"] = dict(counts["dropped"].most_common())
    return {
        "files": dict(sorted(files.items())),
        "categories": dict(sorted(categories.items())),
        "lengths": {f"<= {n}": lengths[n] for n in sorted(lengths)},
    }


def write(directory: Path, samples: list[Sample], drawn: list[Sample], summary: dict) -> None:
    """The files of the output directory."""
    rows = {"train": [], "valid": [], "dropped": []}
    for sample in drawn:
        rows[sample.split].append({"messages": sample.messages, "category": sample.source.category,
                                   "source": sample.file.name})
    for sample in sorted(samples, key=lambda sample: (str(sample.file), sample.number)):
        if sample.dropped:
            place = {"file": str(sample.file), "record": sample.number}
            rows["dropped"].append(place | sample.dropped)
    if not rows["valid"]:
        del rows["valid"]
    for name in rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (directory / f"{name}.jsonl").write_text(lines)
    (directory / "report.json").write_text(json.dumps(summary, indent=2) + "\n")


def print_report(summary: dict) -> None:
    for line in summary["passed_over"]:
        print(f"passed over, {line}")
    for path, n in summary["files"].items():
        reasons = [f"{count:,} {reason}" for reason, count in n["dropped"].items()]
        dropped = ", ".join(reasons) or "none dropped"
        print(f"{path}: {n['read']:,} read, {dropped}; {n['kept']:,} kept, {n['drawn']:,} drawn")
    if summary["turns_cut_off"]:
        print(f"{summary['turns_cut_off']:,} turns cut off: before a first question, after a last "
              "answer")
    print(f"{'category':<12}{'train':>10}{'valid':>8}{'tokens':>14}{'with loss':>14}")
    for category, n in summary["categories"].items():
        print(f"{category:<12}{n['train']:>10,}{n['valid']:>8,}{n['tokens']:>14,}"
              f"{n['loss_tokens']:>14,}")
    if not summary["benchmarks"]:
        print("no --benchmark, so nothing is decontaminated")


# ----------------------------------------------------------------------------------- command line


def chat_files(path: Path, suffixes: tuple[str, ...], passed_over: PassedOver) -> list[Path]:
    """list_files of a path that must have some."""
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path}: no such file or directory")
    try:
        files = list_files(path, suffixes, passed_over)
    except ValueError as error:  # a pipe, or a package is missing
        raise argparse.ArgumentTypeError(str(error)) from None
    if not files:
        raise argparse.ArgumentTypeError(f"{path}: holds no {', '.join(suffixes)} file"
                                         f"{passed_over.because()}")
    return files


def parse_source(text: str) -> Source:
    """CATEGORY=PATH or CATEGORY=PATH=WEIGHT."""
    match = re.fullmatch(r"([^=/]+)=(.+?)(?:=([^/=]*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} must be CATEGORY=PATH or CATEGORY=PATH=WEIGHT")
    category, path, weight = match.groups()
    if weight is not None:
        if not re.fullmatch(r"(?=.*[1-9])\d*\.?\d+", weight):
            raise argparse.ArgumentTypeError(f"{text}: weight {weight!r} must be a number above 0")
        weight = Fraction(weight)
    passed_over = PassedOver()
    files = chat_files(Path(path), RECORDS, passed_over)
    return Source(category, Path(path), weight, files, passed_over)


def benchmark_files(text: str) -> tuple[list[Path], PassedOver]:
    passed_over = PassedOver()
    return chat_files(Path(text), (*RECORDS, ".txt"), passed_over), passed_over


window_length = option(int, lambda n: n >= SHORTEST_ITEM,
                       f"a whole number, {SHORTEST_ITEM} or more")
similarity = option(float, lambda x: x == 0 or 0.5 <= x < 1, "0 (off), or from 0.5 to below 1")


def parser() -> Parser:
    parser = Parser("The chat samples of stage 2, cleaned, without copies, drawn by category.")
    add = parser.add_argument
    add("--source", type=parse_source, nargs="+", action="extend", required=True,
        metavar="CATEGORY=PATH[=WEIGHT]",
        help=".json, .jsonl or .parquet, packed or not, or a directory of them; weights (of all "
        "sources or none) are shares of the samples; if not given: as many as each has left")
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--count", type=positive, help="samples in all; if not given: as many as weights allow")
    add("--max-tokens", type=positive, default=8192, help="longer samples are dropped")
    add("--benchmark", type=benchmark_files, nargs="+", action="extend", default=[], metavar="FILE",
        help="evaluation data to keep out: such files, or .txt with an item a line")
    add("--window", type=window_length, default=50, help="letters and digits in a row not to share")
    add("--common", type=positive, default=10, help="a window in more records is boilerplate")
    add("--near-duplicate", type=similarity, default=0.8, help="Jaccard similarity to drop; 0: off")
    add("--system", help="system message of the samples that have none")
    add("--ignore", nargs="+", action="extend", default=[], metavar="KEY",
        help="keys of records or turns that say nothing of what is asked or answered; a record "
        "with a key that is not known is dropped")
    add("--holdout", type=nonnegative, default=0, help="samples that go to valid.jsonl")
    add("--seed", type=int, default=0, help="another seed draws other samples")
    add("--out", type=Path, required=True, help="new directory")
    return parser


def check_options(sources: list[Source], count: int | None, holdout: int, near: float) -> None:
    """Raise ValueError for options that cannot work together, or here."""
    if count is not None and holdout >= count:
        raise ValueError(f"--holdout {holdout} must be below --count {count}")
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("--source: give a weight to every source or to none")
    if near and importlib.util.find_spec("datasketch") is None:
        raise ValueError("--near-duplicate needs datasketch: pip install -r requirements-dev.txt "
                         "(0: copies to the letter only)")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        check_options(a.source, a.count, a.holdout, a.near_duplicate)
        tokenizer = load_tokenizer(a.tokenizer)
        end_of_turn(tokenizer)  # raises if it has none
        with complete_or_absent(a.out) as aside:
            files = [path for paths, _ in a.benchmark for path in paths]
            benchmarks = Benchmarks(files, a.window, a.common) if files else None
            samples = []
            cut_off = Counter()
            for source in a.source:
                samples += read_samples(source, a.system, a.ignore, cut_off)

            drop_long(remaining(samples), tokenizer, a.max_tokens)
            drop_copies(remaining(samples))
            if a.near_duplicate:
                drop_near_copies(remaining(samples), a.near_duplicate)
            if benchmarks:
                benchmarks.drop_shared(remaining(samples))

            left = remaining(samples)
            drawn = draw(left, plan_draw(a.source, left, a.count), a.holdout, a.seed)
            settings = {
                "count": a.count,
                "max_tokens": a.max_tokens,
                "system": a.system,
                "ignore": a.ignore,
                "near_duplicate": a.near_duplicate,
                "window": a.window,
                "common": a.common,
                "holdout": a.holdout,
                "seed": a.seed,
            }
            summary = {"settings": settings, **report(samples)}
            summary["benchmarks"] = benchmarks.counts if benchmarks else None
            summary["turns_cut_off"] = cut_off.total()
            summary["passed_over"] = []
            for passed_over in (*(s.passed_over for s in a.source), *(p for _, p in a.benchmark)):
                summary["passed_over"] += passed_over.lines()
            write(aside, samples, drawn, summary)
        print_report(summary)
        print(f"wrote {a.out}: {len(drawn) - a.holdout:,} training samples, {a.holdout:,} held out")


if __name__ == "__main__":
    main()
