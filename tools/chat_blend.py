"""The chat samples of stage 2: public sets read, cleaned, deduplicated, decontaminated and drawn by category.

    python -m tools.chat_blend --source general=sharegpt.json math=metamath.jsonl.gz code=magicoder.jsonl \\
        --tokenizer DIR --benchmark gsm8k.jsonl mmlu.jsonl --count 100000 --holdout 500 --out out/chat

Records are OpenAI `messages`, ShareGPT `conversations`, Alpaca's `instruction`, `input`, `output`, or another pair of
PAIRS. A sample must pass, in this order: clean turns; --max-tokens; no copy, nor nearly one, of an earlier sample; nothing
shared with a benchmark. The rest is drawn by weight. The directory has train.jsonl and valid.jsonl for sft.py,
dropped.jsonl (what was left out, and why) and report.json. The same samples and seed give the same bytes, in whatever order
sources are named; but of two copies, the one in the source named first stays.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Tokenizer, complete_or_absent, load_tokenizer, read_lines
from parallel import check_least
from sft import encode_documents, end_of_turn
from tools.prepare import window_hashes

ROLES = {"system": "system", "human": "user", "user": "user", **dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")}
PAIRS = (("instruction", "output"), ("instruction", "response"), ("query", "response"), ("prompt", "completion"),
         ("question", "answer"), ("problem", "solution"))
JSON = (".json", ".jsonl", ".jsonl.gz")
SHINGLE = 20  # characters, about the five words of arXiv 2107.06499
ROWS = 5  # MinHash values a band
MISSED = 1e-3  # share of the pairs right at the threshold that no band brings together
BUCKET, COMPARED = 100, 16  # most samples a bucket, and a sample, is compared with: thousands may share a long instruction
SHORTEST_ITEM = 20  # letters and digits; shorter texts of a benchmark ("all of the above") say nothing
GROUP = 256  # samples that numpy takes at once


@dataclass(frozen=True, eq=False)
class Source:
    """What one --source names; `weight` is None unless given."""

    category: str
    path: Path
    weight: Fraction | None
    files: list[Path]


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
        self.dropped, self.messages, self.text = {"reason": reason, **more}, [], ""


# ------------------------------------------------------------------------------------------------- reading and cleaning


def parse_source(text: str) -> Source:
    """CATEGORY=PATH or CATEGORY=PATH=WEIGHT. Raises ValueError, FileNotFoundError."""
    match = re.fullmatch(r"([^=/]+)=(.+?)(?:=([^/=]*))?", text)
    if not match:
        raise ValueError(f"--source {text}: write it as CATEGORY=PATH or CATEGORY=PATH=WEIGHT")
    category, path, weight = match.groups()
    if weight is not None and not re.fullmatch(r"(?=.*[1-9])\d*\.?\d+", weight):
        raise ValueError(f"--source {text}: the weight {weight!r} after the path must be a number above 0")
    return Source(category, Path(path), Fraction(weight) if weight else None, list_files("--source", Path(path), JSON))


def list_files(option: str, path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or those of a directory that end so, sorted. Raises ValueError, FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{option} {path}: no such file or directory")
    files = [p for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if p.is_file() and p.name.endswith(suffixes)]
    if not files:
        raise ValueError(f"{option} {path}: needs {', '.join(suffixes)}" + (" files in it" if path.is_dir() else ""))
    return files


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of a .json list, (line number, value) of other files. ValueError names file and line."""
    if path.suffix == ".json":
        content = parse(path.read_bytes(), str(path))
        if not isinstance(content, list):
            raise ValueError(f"{path}: needs a list of records, not {type(content).__name__}; with a record a line, name it "
                             ".jsonl")
        yield from enumerate(content, 1)
        return
    for number, line in read_lines(path):
        yield number, parse(line, f"{path}, line {number}", is_text=path.suffix == ".txt")


def parse(content: bytes, place: str, is_text: bool = False) -> object:
    """The text or JSON value of some bytes. Raises ValueError that starts with `place`."""
    try:
        return content.decode() if is_text else json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error})" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
        raise ValueError(f"{place}: {reason}") from None


def read_turns(record: object) -> list[tuple[object, object]] | None:
    """(role, content) of each turn as the file has them; None if it is not a chat record."""
    record = record if isinstance(record, dict) else {}
    for turns in (record.get("messages"), record.get("conversations")):
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    for question, answer in PAIRS:
        if question in record and answer in record:
            asked, given = record[question], record.get("input") if question == "instruction" else None
            asked = f"{asked}\n\n{given}" if isinstance(asked, str) and isinstance(given, str) and given.strip() else asked
            return [("user", asked), ("assistant", record[answer])]
    return None


def clean(turns: list[tuple[object, object]], system: str | None) -> list[dict] | str:
    """Messages: a system's if there is one, then user and assistant by turns; or, as a string, why it is no sample.

    Assistant turns before the first user's answer nothing (ShareGPT has conversations cut in two), and user turns after
    the last answer have none: both are cut off. A conversation without a system message gets `system`.
    """
    if not all(isinstance(role, str) and role in ROLES for role, _ in turns):
        return "unknown role"
    if not all(isinstance(content, str) for _, content in turns):
        return "content is not text"
    messages = [{"role": ROLES[role], "content": content} for role, content in turns]
    own = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        return "no answer to a user"
    if not all(message["content"].strip() for message in messages):
        return "empty turn"
    if any(message["role"] != role for message, role in zip(messages, itertools.cycle(("user", "assistant")))):
        return "roles do not alternate"
    own = own if own.strip() else system
    return [{"role": "system", "content": own}, *messages] if own else messages


def read_samples(sources: list[Source], system: str | None) -> list[Sample]:
    """Every record of every file in order, the unusable ones dropped. ValueError if a file has no chat record at all."""
    samples = []
    for origin, path in [(source, path) for source in sources for path in source.files]:
        keys, readable = {}, False
        for number, record in tqdm(read_records(path), f"read {path.name}", unit=" records", disable=None):
            turns = read_turns(record)
            messages = "not a chat record" if turns is None else clean(turns, system)
            samples.append(Sample(origin, path, number, messages))
            if isinstance(messages, str):
                samples[-1].drop(messages)
            readable |= turns is not None
            keys |= dict.fromkeys(record) if isinstance(record, dict) and len(keys) < 20 else {}
        if not readable:
            found, known = ", ".join(keys) or "none", ", ".join("/".join(pair) for pair in PAIRS)
            raise ValueError(f"{path}: has no chat records, its keys are: {found}; needs messages, conversations, or {known}")
    return samples


def drop_long(samples: list[Sample], tokenizer: Tokenizer, max_tokens: int) -> None:
    """Count the tokens as training will have them; drop what exceeds `max_tokens`."""
    documents = ((sample, {"messages": sample.messages}) for sample in tqdm(samples, "tokenise", unit=" samples", disable=None))
    for sample, tokens, mask in encode_documents(documents, tokenizer):
        sample.tokens, sample.loss_tokens = len(tokens), int(mask.sum())
        if len(tokens) > max_tokens:
            sample.drop("too long", tokens=len(tokens))


# ----------------------------------------------------------------------------------------------------------- duplicates


def normalise(text: str) -> str:
    """Letters and digits only, in one case and form: spaces (even inside words) and punctuation cannot hide a copy."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def windows(text: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts int64 (n,), hashes uint64 (n,)) of each run of `size` characters within a line."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    breaks = np.concatenate([[0], np.cumsum(points == ord("\n"))])
    starts = np.flatnonzero(breaks[size:] == breaks[:-size])
    return starts, window_hashes(points, size)[starts]


def groups(samples: list[Sample], progress: str) -> Iterator[tuple[list[Sample], str, np.ndarray]]:
    """GROUP samples at a time, their texts as one, and where in it each begins."""
    for first in tqdm(range(0, len(samples), GROUP), progress, unit_scale=GROUP, unit=" samples", disable=None):
        group = samples[first:first + GROUP]
        yield group, "\n".join(s.text for s in group), np.cumsum([0, *(len(s.text) + 1 for s in group[:-1])])


def drop_copies(samples: list[Sample]) -> None:
    """Normalise the texts; drop those that an earlier sample has letter for letter."""
    seen = {}
    for sample in tqdm(samples, "copies", unit=" samples", disable=None):
        contents = [message["content"] for message in sample.messages if message["role"] != "system"]
        sample.text = "\n".join(normalise(content) or content for content in contents)  # "+" and "-" are no copies
        first = seen.setdefault(hashlib.blake2b(sample.text.encode(errors="replace"), digest_size=16).digest(), sample)
        if first is not sample:
            sample.drop("copy", repeats_file=str(first.file), repeats_record=first.number)


def minhash(samples: list[Sample], count: int) -> tuple[list[Sample], np.ndarray]:
    """The samples that have a shingle, and their signatures, uint32 (samples, count).

    Broder, "On the resemblance and containment of documents" (1997): under a random order of all shingles, two texts have
    the same first one with the probability of their Jaccard similarity. An order is the hashes' times an odd number.
    """
    factors = np.random.default_rng(0).integers(2**64, size=count, dtype=np.uint64) | np.uint64(1)
    shingled, signatures = [], [np.empty((0, count), dtype=np.uint32)]
    for group, text, starts in groups(samples, "MinHash"):
        places, hashes = windows(text, SHINGLE)
        owners, first = np.unique(np.searchsorted(starts, places, side="right"), return_index=True)
        if len(owners):
            shingled += [group[i - 1] for i in owners]
            smallest = [np.minimum.reduceat(hashes * factor, first) for factor in factors]
            signatures.append((np.stack(smallest, axis=1) >> np.uint64(32)).astype(np.uint32))
    return shingled, np.concatenate(signatures)


def jaccard(first: str, second: str) -> float:
    """Similarity of two texts' sets of shingles."""
    a, b = (np.unique(windows(text, SHINGLE)[1]) for text in (first, second))
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def drop_near_copies(samples: list[Sample], threshold: float) -> None:
    """Drop samples whose Jaccard similarity to an earlier one that stays is `threshold` or more.

    Only pairs that agree in all ROWS values of a band are compared; there are as many bands as MISSED asks for.
    """
    bands = math.ceil(math.log(MISSED) / math.log(1 - threshold ** ROWS))
    samples, signatures = minhash(samples, bands * ROWS)
    mixers = np.random.default_rng(1).integers(2**64, size=ROWS, dtype=np.uint64) | np.uint64(1)
    keys = signatures.reshape(len(samples), bands, ROWS).astype(np.uint64) @ mixers  # (samples, bands)
    shared = np.zeros(keys.shape, dtype=bool)  # most values of a band are one sample's only: no bucket for them
    for band in range(bands):
        _, bucket, sizes = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared[:, band] = sizes[bucket] > 1
    buckets = defaultdict(list)  # of samples that stay
    for i in tqdm(np.flatnonzero(shared.any(axis=1)).tolist(), "near copies", unit=" samples", disable=None):
        mine = [buckets[band, int(keys[i, band])] for band in np.flatnonzero(shared[i]).tolist()]
        near = np.array(sorted(set().union(*mine)), dtype=np.int64)
        agreement = (signatures[near] == signatures[i]).mean(axis=1)  # of so many values: within 0.2 of the similarity
        likely = np.argsort(-agreement, kind="stable")[:COMPARED]
        likely = near[likely[agreement[likely] >= threshold - 0.2]]
        compared = ((jaccard(samples[i].text, samples[j].text), samples[j]) for j in likely)
        similarity, found = next((pair for pair in compared if pair[0] >= threshold), (0.0, None))
        if found:
            samples[i].drop("near copy", repeats_file=str(found.file), repeats_record=found.number,
                            similarity=round(similarity, 3))
        else:
            for bucket in mine:
                if len(bucket) < BUCKET:
                    bucket.append(i)


# ------------------------------------------------------------------------------------------------------ decontamination


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


class Benchmarks:
    """Windows of all benchmark items to look up: GPT-4's check (arXiv 2303.08774, appendix C), with every substring.

    A window in more than `common` records is boilerplate and ignored (as in arXiv 2005.14165, appendix C), and so is one
    that such windows cover by more than half: the few letters after "answer the question" are soon the same by chance.
    """

    def __init__(self, files: list[Path], window: int, common: int) -> None:
        """Raises ValueError for a file without an item."""
        self.window, self.records, texts, owners, short = window, [], [], [], defaultdict(set)
        for path in files:
            before = len(texts)
            for number, record in tqdm(read_records(path), f"read {path.name}", unit=" records", disable=None):
                items = sorted({text for text in map(normalise, strings(record)) if len(text) >= SHORTEST_ITEM})
                for text in items:
                    if len(text) < window:
                        short[text].add(len(self.records))
                texts += items
                owners += [len(self.records)] * len(items)
                self.records.append({"benchmark": str(path), "item": number})
            if len(texts) == before:
                raise ValueError(f"--benchmark {path}: has no text of {SHORTEST_ITEM} letters and digits or more")
        self.short = {text: min(records) for text, records in short.items() if len(records) <= common}
        self.text, lengths = "\n".join(texts), np.array(list(map(len, texts)))
        self.owners = np.repeat(np.array(owners, dtype=np.int32), lengths + 1)  # the record of each character
        starts, hashes = windows(self.text, window)
        usual = in_many(hashes, self.owners[starts], common)
        edges = sum(sign * np.bincount(starts[usual] + at, minlength=len(self.text) + 1) for sign, at in ((1, 0), (-1, window)))
        covered = np.append(0, np.cumsum(np.cumsum(edges) > 0))  # how many characters before each are boilerplate's
        own = ~usual & (2 * (covered[starts + window] - covered[starts]) <= window)
        self.counts = {"records": len(self.records), "windows": len(starts), "boilerplate": int((~own).sum())}
        self.hashes, first = np.unique(hashes[own], return_index=True)
        self.starts = starts[own][first]
        self.table = np.zeros(2**26, dtype=bool)  # by the highest bits: far faster than a search among all hashes
        self.table[self.hashes >> np.uint64(38)] = True

    def drop_shared(self, samples: list[Sample]) -> None:
        """Drop samples that share a window with an item, or have a message or a line that is a short item."""
        for group, text, begins in groups(samples, "decontaminate"):
            starts, hashes = windows(text, self.window)
            likely = np.flatnonzero(self.table[hashes >> np.uint64(38)])
            found = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
            same = self.hashes[found] == hashes[likely]
            for start, place in zip(starts[likely[same]].tolist(), self.starts[found[same]].tolist()):
                sample, excerpt = group[np.searchsorted(begins, start, side="right") - 1], text[start:start + self.window]
                if not sample.dropped and excerpt == self.text[place:place + self.window]:  # not only the hash
                    sample.drop("contaminated", **self.records[self.owners[place]], excerpt=excerpt)
            for sample in group if self.short else ():
                contents = [message["content"] for message in sample.messages if message["role"] != "system"]
                lines = (normalise(text) for content in contents for text in (content, *content.splitlines()))
                if excerpt := next((line for line in lines if line in self.short), None):
                    sample.drop("contaminated", **self.records[self.short[excerpt]], excerpt=excerpt)


def in_many(hashes: np.ndarray, owners: np.ndarray, common: int) -> np.ndarray:
    """Which hashes more than `common` owners (ascending) have, bool (n,)."""
    order, result = np.argsort(hashes, kind="stable"), np.zeros(len(hashes), dtype=bool)  # an owner's equal ones side by side
    fresh = np.append(True, hashes[order][1:] != hashes[order][:-1])[:len(hashes)]
    another = fresh | (np.diff(owners[order], prepend=-1) != 0)
    group = np.cumsum(fresh) - 1
    result[order] = np.bincount(group, weights=another, minlength=1)[group] > common
    return result


# -------------------------------------------------------------------------------------------------------------- drawing


def apportion(total: int, weights: dict) -> dict:
    """`total` in whole numbers in proportion to weights, by largest remainder; the first in order on a tie."""
    whole = sum(weights.values()) or 1
    exact = {name: Fraction(total * weight) / whole for name, weight in weights.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:total - sum(counts.values())]:
        counts[name] += 1
    return counts


def quotas(count: int, weights: dict[Source, Fraction | int]) -> dict[Source, int]:
    """Samples of each source: exact shares for categories first, then within each."""
    categories, result = Counter(), {}
    for source, weight in weights.items():
        categories[source.category] += weight
    for category, n in apportion(count, categories).items():
        result |= apportion(n, {source: weight for source, weight in weights.items() if source.category == category})
    return result


def plan_draw(sources: list[Source], samples: list[Sample], count: int | None) -> dict[Source, int]:
    """How many samples of each source to draw. ValueError if it has not so many."""
    have = Counter(sample.source for sample in samples)
    if not have:
        raise ValueError("no sample is left to draw from; look at --max-tokens, --near-duplicate and --window")
    for source in sources:
        if source.weight and not have[source]:
            raise ValueError(f"category {source.category} has too few samples: none is left of {source.path}; leave it out")
    weights = {source: source.weight or have[source] for source in sorted(sources, key=lambda s: (s.category, str(s.path)))}
    # a quota is less than 2 below its exact share, so no larger count can work
    most = min(math.floor((have[source] + 2) * sum(weights.values()) / weight) for source, weight in weights.items() if weight)
    most = next(n for n in range(min(most, len(samples)), -1, -1) if all(q <= have[s] for s, q in quotas(n, weights).items()))
    plan = quotas(count or most, weights)
    worst = max(plan, key=lambda source: plan[source] - have[source])
    if plan[worst] > have[worst]:
        raise ValueError(f"category {worst.category} has too few samples: {have[worst]} are left of {worst.path}, "
                         f"{plan[worst]} are needed; --count {most} would work")
    return plan


def draw(samples: list[Sample], plan: dict[Source, int], holdout: int, seed: int) -> list[Sample]:
    """The samples of the plan, each with its `split`, in an order that hashes of seed and content give."""
    def rank(sample: Sample) -> bytes:
        return hashlib.blake2b(json.dumps([seed, sample.source.category, sample.messages]).encode(), digest_size=16).digest()

    room, drawn = Counter(plan), []
    for sample in sorted(samples, key=rank):
        if room[sample.source]:
            room[sample.source] -= 1
            drawn.append(sample)
    if holdout >= len(drawn):
        raise ValueError(f"--holdout {holdout} must be below the {len(drawn)} samples that are drawn")
    room = apportion(holdout, dict(sorted(Counter(sample.source.category for sample in drawn).items())))
    for sample in drawn:
        sample.split = "valid" if room[sample.source.category] > 0 else "train"
        room[sample.source.category] -= 1
    return drawn


# --------------------------------------------------------------------------------------------------------------- output


def report(samples: list[Sample]) -> dict:
    """Counts of each file, of each category, and of the lengths that were drawn."""
    files, categories = defaultdict(list), defaultdict(list)
    for sample in samples:
        files[str(sample.file)].append(sample)
        categories[sample.source.category] += [sample] if sample.split else []
    lengths = Counter(1 << (s.tokens - 1).bit_length() for s in samples if s.split)  # the next power of two
    return {"files": {name: {"category": mine[0].source.category, "read": len(mine),
                             "dropped": dict(Counter(s.dropped["reason"] for s in mine if s.dropped).most_common()),
                             "kept": sum(not s.dropped for s in mine), "drawn": sum(bool(s.split) for s in mine)}
                      for name, mine in sorted(files.items())},
            "categories": {name: {"train": sum(s.split == "train" for s in mine),
                                  "valid": sum(s.split == "valid" for s in mine),
                                  "tokens": sum(s.tokens for s in mine), "loss_tokens": sum(s.loss_tokens for s in mine)}
                           for name, mine in sorted(categories.items())},
            "lengths": {f"<= {n}": lengths[n] for n in sorted(lengths)}}


def write(directory: Path, samples: list[Sample], drawn: list[Sample], summary: dict) -> None:
    """The files of the output directory."""
    rows = {split: [{"messages": s.messages, "category": s.source.category, "source": s.file.name} for s in drawn
                    if s.split == split] for split in ("train", "valid")}
    dropped = sorted((s for s in samples if s.dropped), key=lambda s: (str(s.file), s.number))
    rows["dropped"] = [{"file": str(s.file), "record": s.number, **s.dropped} for s in dropped]
    for name in rows if rows["valid"] else ("train", "dropped"):
        with open(directory / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[name])
    (directory / "report.json").write_text(json.dumps(summary, indent=2) + "\n")


def print_report(summary: dict) -> None:
    for path, n in summary["files"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in n["dropped"].items()) or "none dropped"
        print(f"{path}: {n['read']:,} read, {reasons}; {n['kept']:,} kept, {n['drawn']:,} drawn")
    print(f"{'category':<12}{'train':>10}{'valid':>8}{'tokens':>14}{'with loss':>14}")
    for category, n in summary["categories"].items():
        print(f"{category:<12}{n['train']:>10,}{n['valid']:>8,}{n['tokens']:>14,}{n['loss_tokens']:>14,}")
    if not summary["benchmarks"]:
        print("no --benchmark, so nothing is decontaminated")


# --------------------------------------------------------------------------------------------------------- command line


def check_options(sources: list[Source], count: int | None, holdout: int, near_duplicate: float) -> None:
    """Raise ValueError for options that cannot work together."""
    if near_duplicate != 0 and not 0.5 <= near_duplicate < 1:
        raise ValueError(f"--near-duplicate {near_duplicate} must be 0 (off), or from 0.5 to below 1")
    if count is not None and holdout >= count:
        raise ValueError(f"--holdout {holdout} must be below --count {count}")
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("--source: give a weight to every source or to none")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", action="extend", required=True, metavar="CATEGORY=PATH[=WEIGHT]",
        help=".json, .jsonl, .jsonl.gz, or a directory of them; weights (of all sources or none) are shares of the samples, by "
        "default as many as each has left")
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--count", type=int, help="samples to draw in all, held-out ones too (default: as many as weights allow)")
    add("--max-tokens", type=int, default=8192, help="longer samples are dropped (default: 8192)")
    add("--benchmark", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="evaluation data to keep out: .json, .jsonl, .jsonl.gz, or .txt with an item a line")
    add("--window", type=int, default=50, help="letters and digits in a row that may not be shared (default: 50)")
    add("--common", type=int, default=10, help="a window in more benchmark records is boilerplate (default: 10)")
    add("--near-duplicate", type=float, default=0.8, help="Jaccard similarity to drop at; 0: off (default: 0.8)")
    add("--system", help="system message of the samples that have none")
    add("--holdout", type=int, default=0, help="samples that go to valid.jsonl (default: 0)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="new directory")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = parse_arguments(argv)
    try:
        check_least(1, count=a.count, max_tokens=a.max_tokens, common=a.common)
        check_least(SHORTEST_ITEM, window=a.window)
        check_least(0, holdout=a.holdout)
        sources = [parse_source(text) for text in a.source]
        check_options(sources, a.count, a.holdout, a.near_duplicate)
        benchmark_files = [path for name in a.benchmark for path in list_files("--benchmark", name, (*JSON, ".txt"))]
        tokenizer = load_tokenizer(a.tokenizer)
        end_of_turn(tokenizer)  # raises if it has none
        with complete_or_absent(a.out) as aside:
            benchmarks = Benchmarks(benchmark_files, a.window, a.common) if benchmark_files else None
            samples = read_samples(sources, a.system)
            steps = [lambda left: drop_long(left, tokenizer, a.max_tokens), drop_copies]
            steps += [lambda left: drop_near_copies(left, a.near_duplicate)] if a.near_duplicate else []
            steps += [benchmarks.drop_shared] if benchmarks else []
            for step in steps:
                step([sample for sample in samples if not sample.dropped])
            left = [sample for sample in samples if not sample.dropped]
            drawn = draw(left, plan_draw(sources, left, a.count), a.holdout, a.seed)
            names = ("count", "max_tokens", "system", "near_duplicate", "window", "common", "holdout", "seed")
            settings = {name: vars(a)[name] for name in names}
            summary = {"settings": settings, **report(samples), "benchmarks": benchmarks and benchmarks.counts}
            write(aside, samples, drawn, summary)
        print_report(summary)
        print(f"wrote {a.out}: {len(drawn) - a.holdout:,} training samples, {a.holdout:,} held out")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
