"""Text to a corpus: tokenised by several processes, a share of the documents held out.

    python -m tools.prepare --source code=stdlib --tokenizer out/tokenizer --out out/corpus
    python -m tools.prepare --source books=books/ slim=slimpajama/ \\
        --source-field meta.redpajama_set_name --tokenizer MODEL_DIR --out out/corpus

1. The sources are cut into jobs of some 8 MiB of text, always the same ones.
2. A worker encodes a job into a training and a held-out shard.
3. Held-out shards lose the runs of tokens that training has too.
4. meta.json, written last, says that the corpus is complete.

A run that was stopped anywhere goes on when it is started again, and the result depends on neither
that nor the number of processes. The corpus has every document as it was found, once: which lengths
are used more often, and how many tokens in all, is said to train.py (--short-weight, --long-weight;
steps x batch x window).
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import (
    PackedDataset,
    Tokenizer,
    complete_or_absent,
    fingerprint,
    is_corpus,
    load_tokenizer,
    locked,
    open_shard,
    write_complete,
)
from parallel import one_line_errors
from sft import encode_chat
from tools.records import Documents, source_path, texts_of
from train import Parser, existing, fraction, nonnegative, positive

JOB_CHARACTERS = 2**23  # of text in a job
MOST_SOURCES = 100  # each has a job that waits for more documents
EDGES = [0, 1024, 4096, 8192, 32768, 131072, 2**62]  # document lengths in the table, tokens
# what prepare writes into an unfinished corpus
OURS = re.compile(r"parts|lock|train-\d+\..*|valid-\d+\..*|meta\.json\.\d+\.partial")


# -------------------------------------------------------------------------------------- documents


def held_out_split(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Tokens uint32 (T,) of each held-out document of a corpus. ValueError: see PackedDataset."""
    dataset = PackedDataset(path, "valid", 1, seed=0, separator="none", tokenizer=tokenizer)
    for index in range(len(dataset.lengths)):
        yield dataset.document(index)[0]


def encode_document(document: dict, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens uint32 (T,) and loss mask bool (T,): loss on all of a text, on a completion but not
    its prompt, or as encode_chat says."""
    if "messages" in document:
        tokens, mask = encode_chat(document["messages"], tokenizer)
        return np.array(tokens, dtype=np.uint32), np.array(mask, dtype=bool)
    tokens = [np.zeros(0, np.uint32)]
    mask = [np.zeros(0, bool)]
    for key, text in document.items():
        if key == "completion":  # it goes on after the prompt
            parts = [tokenizer.encode_continued(text)]
        else:  # part by part: as a list of Python's numbers all tokens need 40 bytes each
            parts = tokenizer.encode_parts(text)
        for ids in parts:
            tokens.append(np.array(ids, dtype=np.uint32))
            mask.append(np.full(len(ids), key != "prompt"))
    return np.concatenate(tokens), np.concatenate(mask)


# ---------------------------------------------------------------------------------- held-out text


def content_hash(document: dict, seed: int) -> int:
    """64 bits that depend on nothing but content and seed."""
    content = json.dumps([seed, document]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def is_held_out(content: int, holdout: float) -> bool:
    """By a document's content_hash: independent of order, and copies of it fall on one side."""
    return content < holdout * 2**64


def window_hashes(tokens: np.ndarray, window: int) -> np.ndarray:
    """Hash of each run of `window` tokens, uint64 (T - window + 1,), modulo 2^64:

    h(s) = sum over k from s to s + window - 1 of token k times base^(k - s), as a difference of
    running sums of token k times base^k, divided by base^s.
    """
    base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
    inverse = pow(base, -1, 2**64)
    powers = np.cumprod(np.full(len(tokens), base, np.uint64))
    inverses = np.cumprod(np.full(len(tokens), inverse, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(tokens * powers)])
    return (sums[window:] - sums[:-window]) * inverses[:max(0, len(sums) - window)]


def contains(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of `values` are among `known` (sorted, not empty).

    For [1, 4] and [4, 2]: [True, False].
    """
    places = np.searchsorted(known, values, side="right") - 1
    return known[places] == values


def cut_shared_windows(tokens: np.ndarray, mask: np.ndarray, window: int,
                       shared: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, mask) of what is left of a held-out document.

    The document itself if it has none of the `shared` hashes (sorted), else its pieces between such
    windows that are `window` tokens or longer and carry loss.
    """
    starts = np.zeros(0, dtype=bool)
    if len(shared):
        starts = contains(shared, window_hashes(tokens, window))
    if not starts.any():
        yield tokens, mask
        return
    own = np.convolve(starts, np.ones(window)) == 0  # (T,): in no shared window
    borders = np.flatnonzero(np.diff(own, prepend=False, append=False))
    for start, end in borders.reshape(-1, 2):
        if end - start >= window and mask[start:end].any():
            yield tokens[start:end], mask[start:end]


# ----------------------------------------------------------------------------------------- shards


def write_shard(directory: Path, name: str, source: str,
                documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """Write (tokens, mask) documents as shard `name`, see data.py, but for those without a token.

    Returns its entry of meta.json in a list, which is empty if there is nothing to write.
    """
    documents = [(tokens, mask) for tokens, mask in documents if len(tokens)]
    if not documents:
        return []
    tokens = np.concatenate([tokens for tokens, _ in documents], dtype="<u4", casting="unsafe")
    mask = np.concatenate([mask for _, mask in documents], dtype=bool)
    lengths = np.array([len(tokens) for tokens, _ in documents], dtype="<i8")
    write_complete(directory / f"{name}.tokens", tokens.data)
    write_complete(directory / f"{name}.mask", mask.data)
    write_complete(directory / f"{name}.lengths", lengths.data)
    return [{"name": name, "source": source, "documents": len(documents), "tokens": len(tokens)}]


def shard_documents(directory: Path, shard: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, mask) of each document of a shard."""
    tokens, mask, lengths = open_shard(directory, shard)
    borders = np.cumsum(lengths)[:-1]
    return zip(np.split(tokens, borders), np.split(mask, borders), strict=True)


def write_meta(directory: Path, tokenizer: Tokenizer, splits: dict[str, list[dict]],
               **notes) -> dict:
    """Write meta.json, a corpus's last file, and return it.

    ValueError without training documents.
    """
    if not splits["train"]:
        raise ValueError(f"{directory}: no training documents that hold text, so nothing to write")
    meta = {
        "format": 2,
        "vocab_size": tokenizer.n_vocab,
        "tokenizer": fingerprint(tokenizer),
        **notes,
        "splits": splits,
    }
    content = json.dumps(meta, indent=1) + "\n"
    write_complete(directory / "meta.json", content.encode())
    return meta


def by_source(items: Iterable[tuple[str, int, object]], most: int) -> Iterator[tuple[str, list]]:
    """(source, size, item) -> (source, items of that source), when these are of size `most`."""
    waiting = {}
    sizes = Counter()
    for source, size, item in items:
        waiting.setdefault(source, []).append(item)
        sizes[source] += size
        if sizes[source] >= most:
            yield source, waiting.pop(source)
            del sizes[source]
    yield from waiting.items()


def write_corpus(splits: dict[str, Iterable[tuple[str, Sequence[int], Sequence[bool] | None]]],
                 out_dir: str | Path, tokenizer: Tokenizer, shard_tokens: int = 2**22,
                 **notes) -> dict:
    """Write documents token for token: {"train": [(source, tokens, loss mask), ...], "valid": ...}.

    A mask of None is loss everywhere. out_dir appears complete or not at all; its meta.json takes
    `notes` and is returned. ValueError without training documents.
    """
    def sized(documents: Iterable[tuple]) -> Iterator[tuple]:
        for source, tokens, mask in documents:
            tokens = np.asarray(tokens, dtype=np.int64)  # (T,)
            if mask is None:
                mask = np.ones(len(tokens), bool)
            mask = np.asarray(mask, dtype=bool)
            assert len(mask) == len(tokens), "a mask value for each token"
            assert ((tokens >= 0) & (tokens < tokenizer.n_vocab)).all(), "ids of another vocabulary"
            yield source, len(tokens), (tokens, mask)

    shards = {"train": [], "valid": []}
    with complete_or_absent(out_dir) as aside:
        for split, documents in splits.items():
            for source, group in by_source(sized(documents), shard_tokens):
                name = f"{split}-{len(shards[split]):05d}"
                shards[split] += write_shard(aside, name, source, group)
        return write_meta(aside, tokenizer, shards, **notes)


# ---------------------------------------------------------------------------------------- workers


class Job(NamedTuple):
    """Documents of one source."""

    number: int
    source: str
    documents: list[dict]


def cut_jobs(sources: dict[str, Documents], source_field: str | None,
             characters: int) -> Iterator[Job]:
    """All documents of the named sources in jobs of that many characters. Raises ValueError."""
    names = set()

    def sized() -> Iterator[tuple[str, int, dict]]:
        for source, documents in sources.items():
            for own, document in documents:
                name = f"{source}/{own}" if own else source
                names.add(name)
                if len(names) > MOST_SOURCES:
                    raise ValueError(f"--source-field {source_field}: gives more than "
                                     f"{MOST_SOURCES} sources; it must name a few, not each "
                                     "document")
                size = sum(map(len, texts_of(document)))
                yield name, size, document

    for number, (source, documents) in enumerate(by_source(sized(), characters)):
        yield Job(number, source, documents)
    if source_field and names == sources.keys():
        raise ValueError(f"--source-field {source_field}: gives no source; it must be in the "
                         "records, keys joined by dots")


@functools.cache
def worker_tokenizer(path: Path) -> Tokenizer:
    """load_tokenizer, once in a process."""
    return load_tokenizer(path)


def encode_job(job: Job, tokenizer_path: Path, out_dir: Path, holdout: float, seed: int,
               settings: str) -> dict[str, list[dict]]:
    """Encode a job: a training shard in `out_dir`, a held-out one, not cut yet, in out_dir/parts.

    Returns the shards of each split, see write_shard. The job's receipt is written last: it says
    what was written, and has a hash of all that this depends on (`settings`: what that is beside
    documents, source and seed). Where such a receipt is, nothing is encoded again.
    """
    hashes = [content_hash(document, seed) for document in job.documents]
    content = json.dumps([settings, job.source, hashes]).encode()
    identity = hashlib.blake2b(content, digest_size=16).hexdigest()
    receipt = out_dir / "parts" / f"{job.number:05d}.json"
    folders = {"train": out_dir, "valid": out_dir / "parts"}
    try:
        known = json.loads(receipt.read_text())
        if known["identity"] == identity:
            for split, shards in known["shards"].items():
                for shard in shards:
                    open_shard(folders[split], shard)  # ValueError: not complete
            return known["shards"]
    except (FileNotFoundError, ValueError):
        pass
    receipt.unlink(missing_ok=True)

    tokenizer = worker_tokenizer(tokenizer_path)
    encoded = {"train": [], "valid": []}
    for document, number in zip(job.documents, hashes, strict=True):
        split = "valid" if is_held_out(number, holdout) else "train"
        encoded[split].append(encode_document(document, tokenizer))
    shards = {}
    for split, documents in encoded.items():
        name = f"{split}-{job.number:05d}"
        shards[split] = write_shard(folders[split], name, job.source, documents)
    write_complete(receipt, json.dumps({"identity": identity, "shards": shards}).encode())
    return shards


def shared_windows(directory: Path, shard: dict, known: Path, window: int) -> np.ndarray:
    """Those of the `known` hashes (a sorted .npy file) that a shard's documents have, sorted."""
    hashes = np.load(known, mmap_mode="r")
    found = [np.zeros(0, np.uint64)]
    for tokens, _ in shard_documents(directory, shard):
        own = np.sort(window_hashes(tokens, window))  # sorted: twice as fast to search for
        found.append(own[contains(hashes, own)])
    return np.unique(np.concatenate(found))


def in_order(pool: Executor, ahead: int, function: Callable, calls: Iterable[tuple]) -> Iterator:
    """Results of function(*call) in order. `ahead` calls at most wait: so memory is bounded."""
    waiting = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(function, *call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise OSError("a worker process was killed (too little memory?), or could not start (a "
                      "program that uses processes needs `if __name__ == '__main__'`); run the "
                      "same command again, with fewer --processes: it keeps what is done") from None


@contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """A pool of processes, forks of a server that has torch and no threads: a fork of this
    process, which has some, might hang. A single worker is a thread of this process."""
    if processes == 1:
        pool = ThreadPoolExecutor(1)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sft"])
        pool = ProcessPoolExecutor(processes, context, end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process with the one that started it, which alone heeds Ctrl-C: a killed one leaves
    no worker that waits for its next job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -------------------------------------------------------------------------------------- preparing


def prepare_corpus(sources: list[tuple[str, str | Path]], tokenizer: Tokenizer,
                   out_dir: str | Path, holdout: float = 0.1, holdout_window: int = 48,
                   seed: int = 0, *, processes: int = 1, text_field: str | None = None,
                   source_field: str | None = None, job_characters: int = JOB_CHARACTERS) -> dict:
    """Tokenise (name, path) sources, see source_path, into a corpus; returns its meta.json, and
    prints what was read of each source and what was passed over.

    `text_field`: where the text of a record is, see Documents. A record's `source_field`
    (SlimPajama: meta.redpajama_set_name) makes it a source of its own, NAME/FIELD. A share
    `holdout` of the documents (see is_held_out) becomes split "valid"; every run of
    `holdout_window` tokens that a training document has too is cut out of it (0: kept), or
    boilerplate would count as held-out. `job_characters`: how much text a shard is made of.

    Memory holds a few jobs a process and 8 bytes a held-out token. Raises ValueError, OSError.
    """
    assert 0 <= holdout <= 1 and processes >= 1 and seed >= 0 and tokenizer.path is not None
    if holdout == 1:
        raise ValueError("--holdout 1 leaves no training documents")
    out_dir = Path(out_dir).absolute()
    if len(dict(sources)) != len(sources):
        raise ValueError(f"source names must differ: {', '.join(name for name, _ in sources)}")
    sources = {name: Documents(source_path(path), text_field, source_field)
               for name, path in sources}
    settings = repr([fingerprint(tokenizer), tokenizer.rules, holdout])
    with unfinished(out_dir), workers(processes) as pool:
        # 1. Cut the sources into jobs, and 2. encode each.
        jobs = cut_jobs(sources, source_field, job_characters)
        calls = ((job, tokenizer.path, out_dir, holdout, seed, settings) for job in jobs)
        results = in_order(pool, 2 * processes, encode_job, calls)
        train = []
        held_out = []
        for shards in tqdm(results, "tokenise", unit=" jobs", disable=None):
            train += shards["train"]
            held_out += shards["valid"]
        for name, documents in sources.items():
            print(documents.report(name))

        # 3. Cut the windows that training has too out of held-out documents.
        shared = np.zeros(0, np.uint64)
        if holdout_window and held_out:
            known = out_dir / "parts" / "windows.npy"
            np.save(known, held_out_windows(out_dir / "parts", held_out, holdout_window))
            calls = ((out_dir, shard, known, holdout_window) for shard in train)
            results = in_order(pool, 2 * processes, shared_windows, calls)
            for found in tqdm(results, "compare", len(train), unit=" shards", disable=None):
                shared = np.union1d(shared, found)
        valid = []
        for shard in held_out:
            pieces = []
            for tokens, mask in shard_documents(out_dir / "parts", shard):
                pieces += cut_shared_windows(tokens, mask, holdout_window, shared)
            valid += write_shard(out_dir, shard["name"], shard["source"], pieces)

        # 4. Say that the corpus is complete.
        remove_others(out_dir, train + valid)
        return write_meta(out_dir, tokenizer, {"train": train, "valid": valid}, holdout=holdout,
                          holdout_window=holdout_window, seed=seed)


def held_out_windows(directory: Path, shards: list[dict], window: int) -> np.ndarray:
    """Hashes of all windows of these shards' documents, sorted, uint64."""
    hashes = [np.zeros(1, np.uint64)]  # so that there is one; a 0 too many does no harm
    for shard in shards:
        for tokens, _ in shard_documents(directory, shard):
            hashes.append(window_hashes(tokens, window))
    return np.unique(np.concatenate(hashes))


def remove_others(directory: Path, shards: list[dict]) -> None:
    """Remove files that are not of these shards: of a stopped run of other sources or settings."""
    wanted = {"lock"}
    for shard in shards:
        for kind in ("tokens", "mask", "lengths"):
            wanted.add(f"{shard['name']}.{kind}")
    for path in directory.iterdir():
        if path.is_file() and path.name not in wanted:
            path.unlink()


@contextmanager
def unfinished(out_dir: Path) -> Iterator[None]:
    """Make `out_dir` and in it `parts`, which goes when the corpus is complete, for this process
    alone.

    If nothing has been done that the next run could use, an error removes it all. Raises ValueError
    if a corpus is there already, or files that prepare did not write, or if another process uses
    it.
    """
    parts = out_dir / "parts"
    if is_corpus(out_dir):
        shutil.rmtree(parts, ignore_errors=True)  # what a run left that was killed just before that
        (out_dir / "lock").unlink(missing_ok=True)
        raise ValueError(f"{out_dir}: already exists; remove it or choose another place")
    for path in out_dir.iterdir() if out_dir.exists() else ():
        if not OURS.fullmatch(path.name):
            raise ValueError(f"{out_dir}: already exists, and has {path.name}, which prepare did "
                             "not write; choose another place")
    parts.mkdir(parents=True, exist_ok=True)
    with locked(out_dir / "lock"):
        try:
            yield
        except BaseException:
            if not list(parts.glob("*.json")):
                shutil.rmtree(out_dir)
            raise
        shutil.rmtree(parts)


# ----------------------------------------------------------------------------------- command line


def print_corpus(directory: Path, meta: dict) -> None:
    """Counts, and how the training tokens of each source spread over document lengths."""
    for split, shards in meta["splits"].items():
        documents = sum(shard["documents"] for shard in shards)
        tokens = sum(shard["tokens"] for shard in shards)
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {len(shards)} shards")
    heads = [f"< {edge:,}" for edge in EDGES[1:-1]] + ["longer"]
    row = "{:>44}" + "{:>10}" * len(heads) + "{:>16}"
    print(row.format("training tokens by document length", *heads, "tokens"))
    lengths = {}
    for shard in meta["splits"]["train"]:
        lengths.setdefault(shard["source"], []).append(open_shard(directory, shard)[2])
    for source, parts in lengths.items():
        own = np.concatenate(parts)
        tokens, _ = np.histogram(own, EDGES, weights=own)
        shares = [f"{share:.1%}" for share in tokens / tokens.sum()]
        print(row.format(source, *shares, f"{own.sum():,}"))


def named_source(text: str) -> tuple[str, Path]:
    """The type of --source."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text}: write it as NAME=PATH")
    return name, source_path(path)


def parser() -> Parser:
    parser = Parser("Tokenise sources into a corpus directory; every document as it is found, "
                    "once. Up-sampling by length, and how many tokens are used, are options of "
                    "train.py.")
    add = parser.add_argument
    add("--source", type=named_source, nargs="+", action="extend", required=True,
        metavar="NAME=PATH", help="a file or directory; stdlib is this Python's standard library")
    add("--tokenizer", type=existing, required=True, help="tokenizer file or its directory")
    add("--out", type=Path, required=True, help="new corpus directory")
    add("--text-field", metavar="KEY.KEY",
        help="where a record has its text; if not given: text, content, raw_content, prompt and "
        "completion, or messages")
    add("--source-field", metavar="KEY.KEY",
        help="where a JSON record names its source (SlimPajama: meta.redpajama_set_name)")
    add("--holdout", type=fraction, default=0.1, help="share of the documents to hold out")
    add("--holdout-window", type=nonnegative, default=48,
        help="cut held-out runs of this many tokens that training has too; 0: no")
    add("--seed", type=nonnegative, default=0, help="chooses the held-out documents")
    add("--processes", type=positive, default=os.cpu_count(),
        help="change the time, not the result")
    return parser


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        try:
            tokenizer = load_tokenizer(a.tokenizer)
            meta = prepare_corpus(a.source, tokenizer, a.out, a.holdout, a.holdout_window, a.seed,
                                  processes=a.processes, text_field=a.text_field,
                                  source_field=a.source_field)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on") from None
        print_corpus(a.out, meta)


if __name__ == "__main__":
    main()
