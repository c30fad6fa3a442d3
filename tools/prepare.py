"""Text to a corpus directory: tokenised by several processes, restartable, up-sampled by length, a share held out.

    python -m tools.prepare --source code=stdlib --tokenizer out/tokenizer --out out/corpus
    python -m tools.prepare --source books=books/ slim=slimpajama/ --source-field meta.redpajama_set_name \\
        --tokenizer MODEL_DIR --short-weight 0.5 --long-weight 2 --tokens 1000000000 --out out/corpus

Text becomes parts, files that depend on nothing but their own text and are kept until the corpus is there: any number of
processes writes the same ones, and a run that was killed finds them. Then one process plans and writes the corpus.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

import data
from data import (
    Raw,
    Tokenizer,
    complete_or_absent,
    digest,
    encode_document,
    fingerprint,
    length_weights,
    load_tokenizer,
    locked,
    parse_document,
    read_raw,
    refuse_existing,
    source_path,
    write_complete,
)

PART_BYTES = 2**23  # of text in a part
MOST_SOURCES = 1000
EDGES = [0, 1024, 4096, 8192, 32768, 131072, 2**62]  # document lengths in the histogram, tokens


# ---------------------------------------------------------------------------------------------------------- the corpus


def write_corpus(splits: dict[str, Iterable[tuple[str, Sequence[int], Sequence[bool] | None]]], out_dir: str | Path,
                 tokenizer: Tokenizer, shard_tokens: int = 2**27, **notes) -> dict:
    """Write documents token for token: {"train": ..., "valid": ...}, each iterable of (source, tokens, loss mask).

    A mask of None is loss everywhere; documents without a token are left out. out_dir appears complete or not at all:
    SPLIT-00000.tokens (little-endian uint32) and .mask (a byte a token), SPLIT-offsets.npy (int64, documents + 1),
    SPLIT-sources.npy (int64, into meta.json's sources), and meta.json, which is returned and takes `notes`. Shards hold
    `shard_tokens` at most; a longer document has its own. ValueError without training documents.
    """
    with complete_or_absent(out_dir) as aside:
        sources, counts = {}, {}
        for split, documents in splits.items():
            counts[split] = write_split(documents, aside / split, sources, tokenizer.n_vocab, shard_tokens)
        if not counts.get("train", {}).get("documents"):
            raise ValueError(f"{out_dir}: no training documents that hold text, so nothing to write")
        meta = {"format": 1, "vocab_size": tokenizer.n_vocab, "tokenizer": fingerprint(tokenizer),
                "sources": list(sources), "splits": counts, **notes}
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def write_split(documents: Iterable[tuple], prefix: Path, sources: dict[str, int], vocab_size: int,
                shard_tokens: int) -> dict:
    """A split of write_corpus, in files `prefix`-...; adds to `sources`. Returns its entry of meta.json."""
    lengths, owners, shards = [], [], []
    with ExitStack() as files:
        for source, tokens, mask in documents:
            tokens = np.asarray(tokens, dtype=np.int64)  # (T,)
            mask = np.ones(len(tokens), bool) if mask is None else np.asarray(mask, dtype=bool)
            if not len(tokens):
                continue
            if len(mask) != len(tokens) or tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(f"{prefix.name} document {len(lengths)} ({source}): {len(mask)} mask values for "
                                 f"{len(tokens)} ids from {tokens.min()} to {tokens.max()}; ids must be 0 to "
                                 f"{vocab_size - 1}, with a mask value each")
            if not shards or shards[-1] + len(tokens) > shard_tokens:
                files.close()
                token_file, mask_file = (files.enter_context(open(f"{prefix}-{len(shards):05d}.{kind}", "wb"))
                                         for kind in ("tokens", "mask"))
                shards.append(0)
            token_file.write(tokens.astype("<u4").tobytes())
            mask_file.write(mask.tobytes())
            shards[-1] += len(tokens)
            lengths.append(len(tokens))
            owners.append(sources.setdefault(source, len(sources)))
    np.save(f"{prefix}-offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(f"{prefix}-sources.npy", np.array(owners, dtype=np.int64))
    return {"documents": len(lengths), "tokens": sum(lengths), "shards": shards}


# ------------------------------------------------------------------------------------------------------- held-out text


def content_hash(document: dict, seed: int) -> int:
    """64 bits that depend on nothing but content and seed."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, document]).encode(), digest_size=8).digest(), "little")


def is_held_out(document: dict, holdout: float, seed: int) -> bool:
    """By a hash of seed and content: independent of order, and copies of a document fall on one side."""
    return content_hash(document, seed) < holdout * 2**64


def window_hashes(tokens: np.ndarray, window: int) -> np.ndarray:
    """Hash of each run of `window` tokens, uint64 (len - window + 1,): the sum of token k times base^(k - start)."""
    base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
    powers, inverses = (np.cumprod(np.full(len(tokens), b, np.uint64)) for b in (base, pow(base, -1, 2**64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(tokens * powers)])
    return (sums[window:] - sums[:-window]) * inverses[:max(0, len(sums) - window)]


def contains(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of `values` are among the sorted `known` (one at least), bool."""
    return known[np.searchsorted(known, values, side="right") - 1] == values


def cut_shared_windows(source: str, tokens: np.ndarray, mask: np.ndarray, window: int, shared: np.ndarray) -> Iterator[tuple]:
    """A held-out document, whole if `shared` (sorted) has none of its windows, else its other pieces of that length."""
    starts = contains(shared, window_hashes(tokens, window)) if len(shared) else np.zeros(0, dtype=bool)
    if not starts.any():
        yield source, tokens, mask
        return
    kept = np.convolve(starts, np.ones(window)) == 0  # (T,): in none of the windows that start there
    for start, end in np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2):
        if end - start >= window and mask[start:end].any():
            yield source, tokens[start:end], mask[start:end]


# --------------------------------------------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """Encoded documents: tokens uint32 (T,), mask bool (T,), of each document length int64, content_hash uint64 and source, an
    index int32 into `names` (N,)."""

    tokens: np.ndarray | None
    mask: np.ndarray | None
    lengths: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    names: list[str]

    @classmethod
    def load(cls, path: Path, with_tokens: bool = True) -> Part:
        """A part's file; without its tokens and masks these are None."""
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys() if with_tokens or name not in ("tokens", "mask")}
            return cls(*map(arrays.get, cls._fields[:5]), json.loads(file.metadata()["names"]))

    def documents(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(source, tokens, mask) of each document."""
        borders = np.cumsum(self.lengths)[:-1]
        return zip((self.names[i] for i in self.sources), np.split(self.tokens, borders), np.split(self.mask, borders))


def encode_part(raws: list[Raw], source: str, source_field: str | None, seed: int, tokenizer: Tokenizer, folder: Path,
                identity: str) -> tuple[Path, int]:
    """Encode documents into a part in `folder`, named by all that its content depends on (`identity`: of tokenizer and code).

    Returns its path and how many tokens were encoded, 0 if it was there.
    """
    name = hashlib.blake2b(json.dumps([identity, source, source_field, seed]).encode(), digest_size=16)
    for raw in raws:
        name.update(b"%d %d " % (raw.is_json, len(raw.content)) + raw.content)
    path = folder / f"{name.hexdigest()}.safetensors"
    with suppress(OSError, SafetensorError):  # not there, or damaged: encode it
        Part.load(path, with_tokens=False)
        return path, 0
    tokens, masks, hashes, sources = [], [], [], []
    for raw in raws:
        document, own = parse_document(raw, source_field)
        encoded, mask = encode_document(document, tokenizer)
        if len(encoded):
            tokens.append(encoded)
            masks.append(mask)
            hashes.append(content_hash(document, seed))
            sources.append(f"{source}/{own}" if own else source)
    names = list(dict.fromkeys(sources))
    arrays = {"tokens": np.concatenate([np.zeros(0, np.uint32), *tokens]), "mask": np.concatenate([np.zeros(0, bool), *masks]),
              "lengths": np.array(list(map(len, tokens)), np.int64), "hashes": np.array(hashes, np.uint64),
              "sources": np.array(list(map({name: i for i, name in enumerate(names)}.get, sources)), np.int32)}
    write_complete(path, save(arrays, {"names": json.dumps(names)}))
    return path, len(arrays["tokens"])


def shared_windows(path: Path, training: np.ndarray, known: Path, window: int) -> np.ndarray:
    """Which of the `known` hashes (a sorted .npy file) are windows of a part's `training` documents (bool, (N,))."""
    hashes, found = np.load(known, mmap_mode="r"), []
    for (_, tokens, _), mine in zip(Part.load(path).documents(), training):
        if mine:
            own = np.sort(window_hashes(tokens, window))  # sorted: twice as fast to search for
            found.append(own[contains(hashes, own)])
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def in_order(pool: Executor, ahead: int, function: Callable, calls: Iterable[tuple]) -> Iterator:
    """Results of function(*call) of each call, in order; `ahead` calls at most are under way, so memory stays bounded."""
    under_way = deque()
    try:
        for call in calls:
            under_way.append(pool.submit(function, *call))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenExecutor:
        raise OSError("a worker process was killed (too little memory?), or could not start (a program that uses processes "
                      "needs `if __name__ == '__main__'`); run the same command again, with fewer --processes: it keeps what "
                      "is done") from None


def part_calls(sources: list[tuple[str, Path]], *arguments) -> Iterator[tuple]:
    """Calls of encode_part, a part for each PART_BYTES of a source."""
    for source, path in sources:
        raws, size = [], 0
        for raw in read_raw(path):
            raws.append(raw)
            size += len(raw.content)
            if size >= PART_BYTES:
                yield raws, source, *arguments
                raws, size = [], 0
        if raws:
            yield raws, source, *arguments


@contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """A pool of processes, forks of a server that has these modules and no threads: a fork of this process, which has some,
    might hang. A single worker is a thread of this process."""
    if processes == 1:
        pool = ThreadPoolExecutor(1)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tools.prepare"])
        pool = ProcessPoolExecutor(processes, context, end_with_parent)
    try:
        yield pool
    finally:
        # and wait: left to itself, it hangs the end of a caller that multiprocessing started
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process with the one that started it, which alone heeds Ctrl-C: a killed one leaves no worker that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------- preparing


def prepare_corpus(sources: list[tuple[str, str | Path]], tokenizer: Tokenizer, out_dir: str | Path, holdout: float = 0.1,
                   holdout_window: int = 48, seed: int = 0, *, processes: int = 1, source_field: str | None = None,
                   holdout_tokens: int = 2**24, budget: int | None = None, short: int = 4096, long: int = 8192,
                   short_weight: float = 1.0, long_weight: float = 1.0) -> dict:
    """Tokenise (name, path) sources, see source_path, into a corpus directory, see write_corpus; returns its meta.json.

    A record's `source_field` (SlimPajama: meta.redpajama_set_name) makes it a source of its own, NAME/FIELD. A share
    `holdout` of the documents (see is_held_out), `holdout_tokens` at most, becomes split "valid"; every run of
    `holdout_window` tokens that a training document has too is cut out of it (0: kept), or shared boilerplate would count
    as held-out. Training documents are drawn by length, see length_weights and draw_documents: `budget` tokens exactly
    (None: all that the weights ask for).

    The result depends on neither `processes` nor earlier runs that were stopped; what those have done is used. Memory
    holds the held-out documents, about 80 bytes a document, and a few parts a process. ValueError or OSError.
    """
    if not 0 <= holdout < 1 or holdout_window < 0 or holdout_tokens < 1:
        raise ValueError(f"holdout {holdout} must be in [0, 1), holdout_window {holdout_window} not negative, holdout_tokens "
                         f"{holdout_tokens} positive")
    if not 1 <= processes <= 8 * os.cpu_count() or budget is not None and budget < 1 or seed < 0:
        raise ValueError(f"processes {processes} must be 1 to {8 * os.cpu_count()}, tokens {budget} 1 or more, seed {seed} not "
                         "negative")
    length_weights(np.array([long, long + 1]), np.zeros(2), short, long, short_weight, long_weight)  # refuses bad ones now
    if len(dict(sources)) != len(sources):
        raise ValueError(f"source names must differ: {', '.join(name for name, _ in sources)}")
    out_dir, sources = Path(out_dir).absolute(), [(name, source_path(path)) for name, path in sources]
    refuse_existing(out_dir)
    with parts_folder(out_dir.with_name(out_dir.name + ".parts")) as folder, workers(processes) as pool:
        paths = encode_sources(sources, source_field, seed, tokenizer, folder, pool, processes)
        lengths, hashes, owners, names, borders = index_parts(paths)  # of all documents, (documents,) each
        if source_field and not set(names) - {name for name, _ in sources} or len(names) > MOST_SOURCES:
            raise ValueError(f"--source-field {source_field}: gives {len(names)} sources; it must be in the records, keys "
                             "joined by dots, and name a few sources, not each document")
        holdout = capped_holdout(lengths, hashes, holdout, holdout_tokens)
        valid = hashes < holdout * 2**64
        if not len(lengths) or valid.all():
            raise ValueError(f"{out_dir}: no training documents that hold text, so nothing to write")
        weights = np.zeros(len(lengths))
        weights[~valid] = length_weights(lengths[~valid], owners[~valid], short, long, short_weight, long_weight)
        repeats, cuts = draw_documents(lengths, owners, weights, budget, seed)
        asked = weights * lengths * (budget / (weights @ lengths) if budget else 1)
        by_part = list(zip(paths, np.split(valid, borders), np.split(repeats, borders)))
        shared = find_shared(by_part, holdout_window, folder, pool, processes)
        held_out = (piece for path, held, _ in by_part for document in held_out_documents(path, held)
                    for piece in cut_shared_windows(*document, holdout_window, shared))
        training = training_documents(by_part, dict(zip(names, cuts)))
        return write_corpus({"train": training, "valid": held_out}, out_dir, tokenizer, holdout=holdout,
                            holdout_window=holdout_window, seed=seed, lengths=length_histogram(
                                lengths, owners, names, ~valid, asked, repeats, cuts))


@contextmanager
def parts_folder(folder: Path) -> Iterator[Path]:
    """A folder for parts, of this process alone, which is removed at the end, and on an error if it has none.

    Raises ValueError if there are other files in it, or another process uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = re.compile(r"lock|[0-9a-f]{32}\.safetensors(\.\d+\.partial)?|held_out_windows\.npy")
    for path in folder.iterdir():
        if not ours.fullmatch(path.name):
            raise ValueError(f"{folder}: has {path.name}, which prepare did not write; move that away: its parts go there")
    with locked(folder / "lock"):
        try:
            yield folder
        except BaseException:
            if not list(folder.glob("*.safetensors")):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def index_parts(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Of all documents of these parts: lengths int64, hashes uint64, sources int64 into the names that follow, and at which
    document each part but the first begins."""
    parts = [Part.load(path, with_tokens=False) for path in paths]
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    owners = (np.array([names.index(name) for name in part.names], np.int64)[part.sources] for part in parts)
    return (np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)]),
            np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *owners]), names, np.cumsum([len(part.lengths) for part in parts])[:-1])


def encode_sources(sources: list[tuple[str, Path]], source_field: str | None, seed: int, tokenizer: Tokenizer, folder: Path,
                   pool: Executor, processes: int) -> list[Path]:
    """Parts of all documents, in order."""
    identity = hashlib.sha256(repr([fingerprint(tokenizer), tokenizer._pat_str, tokenizer.normal_form,
                                    sorted(tokenizer._special_tokens.items()), digest(data.__file__),
                                    digest(__file__)]).encode()).hexdigest()
    paths, started, encoded = [], time.perf_counter(), 0
    calls = part_calls(sources, source_field, seed, tokenizer, folder, identity)
    bar = tqdm(desc="tokenise", unit=" tokens", unit_scale=True, disable=None)
    for path, tokens in in_order(pool, 2 * processes, encode_part, calls):
        paths.append(path)
        bar.update(tokens)
        encoded += tokens
    bar.close()
    if encoded:
        seconds = time.perf_counter() - started
        print(f"tokenised {encoded:,} tokens in {seconds:.1f} s on {processes} processes, {encoded / seconds:,.0f} tokens/s")
    return paths


def capped_holdout(lengths: np.ndarray, hashes: np.ndarray, holdout: float, most: int) -> float:
    """The largest share up to `holdout` whose documents have `most` tokens or fewer; of several, one document at least."""
    mine = hashes < holdout * 2**64
    values, copies = np.unique(hashes[mine], return_inverse=True)
    kept = max(1, int(np.searchsorted(np.cumsum(np.bincount(copies, lengths[mine])), most, side="right")))
    return holdout if kept >= len(values) else float(values[kept]) / 2**64


def find_shared(by_part: list[tuple], window: int, folder: Path, pool: Executor, processes: int) -> np.ndarray:
    """Hashes of the windows that held-out documents share with training ones, sorted."""
    held_out = [window_hashes(tokens, window) for path, held, _ in by_part if window
                for _, tokens, _ in held_out_documents(path, held)]
    if not held_out:
        return np.zeros(0, np.uint64)
    known = folder / "held_out_windows.npy"
    np.save(known, np.unique(np.concatenate([np.zeros(1, np.uint64), *held_out])))  # never empty: a 0 too many does no harm
    calls = ((path, repeats > 0, known, window) for path, _, repeats in by_part)
    bar = tqdm(in_order(pool, 2 * processes, shared_windows, calls), "compare with held-out", len(by_part),
               unit=" parts", disable=None)
    return functools.reduce(np.union1d, bar)


def held_out_documents(path: Path, held: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(source, tokens, mask) of the documents of a part that are held out."""
    return itertools.compress(Part.load(path).documents(), held) if held.any() else iter(())


def training_documents(by_part: list[tuple], cuts: dict[str, int]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(source, tokens, mask) of training documents, each as often as drawn, the very last one of a source without its last
    `cuts` tokens."""
    left = Counter()
    for path, _, repeats in by_part:
        part = Part.load(path, with_tokens=False)
        for source, count in zip(part.sources.tolist(), repeats.tolist()):
            left[part.names[source]] += count
    for path, _, repeats in tqdm(by_part, "write", unit=" parts", disable=None):
        for (source, tokens, mask), count in zip(Part.load(path).documents() if repeats.any() else (), repeats):
            for _ in range(count):
                left[source] -= 1
                end = len(tokens) - (0 if left[source] else cuts[source])
                yield source, tokens[:end], mask[:end]


def draw_documents(lengths: np.ndarray, owners: np.ndarray, weights: np.ndarray, budget: int | None,
                   seed: int) -> tuple[np.ndarray, list[int]]:
    """How often each document occurs, int64 (documents,), and how many tokens the last occurrence in each source must lose.

    Each source gets its share of the `budget` to the token, and all of it `budget` tokens (None: what the weights ask for,
    to within a document a source). A document of weight w occurs floor(w) or ceil(w) times, or proportionally less often for
    a budget below what the weights ask for: systematic sampling along the documents sorted by length, so that each length
    gets its share almost exactly. Raises ValueError for a budget beyond what the weights give.
    """
    asked = np.bincount(owners, weights * lengths)  # tokens of each source
    ends = None if budget is None else np.floor(np.cumsum(asked) / asked.sum() * budget + 0.5).astype(np.int64)
    budgets = [None] * len(asked) if budget is None else np.diff(ends, prepend=0).tolist()
    repeats, cuts = np.zeros(len(lengths), dtype=np.int64), []
    draws = np.random.default_rng([seed, len(lengths)]).random(len(asked))
    for source, (own, draw) in enumerate(zip(budgets, draws)):
        mine = np.flatnonzero(owners == source)
        mine = mine[np.argsort(lengths[mine], kind="stable")]
        repeats[mine], cut = draw_source(lengths[mine], weights[mine], own, draw)
        if cut < 0:
            raise ValueError(f"--tokens {budget} is more than these sources and weights give, {budget + cut} at most; ask for "
                             "fewer: train.py goes through them as often as it needs")
        in_order = np.sort(mine)
        for last in in_order[np.flatnonzero(repeats[in_order])][::-1]:
            fewer = min(int(repeats[last]), cut // int(lengths[last]))
            repeats[last] -= fewer
            cut -= fewer * int(lengths[last])
            if repeats[last]:
                break
        cuts.append(cut)
    return repeats, cuts


def draw_source(lengths: np.ndarray, weights: np.ndarray, budget: int | None, draw: float) -> tuple[np.ndarray, int]:
    """How often each document of one source, sorted by length, occurs, and how many tokens that is above `budget` (None: 0),
    as little as possible; below it, negative, if all that the weights ask for is too little."""
    rate = 1.0 if budget is None else min(1.0, budget / max(1.0, float(weights @ lengths)))
    while True:
        repeats = np.diff(np.floor(np.cumsum([0, *rate * weights]) + draw)).astype(np.int64)
        excess = 0 if budget is None else int(repeats @ lengths) - budget
        if excess >= 0 or rate == 1:
            return repeats, excess
        rate = min(1.0, rate * (1 + max(1e-6, -excess / budget)))


def length_histogram(lengths: np.ndarray, owners: np.ndarray, names: list[str], training: np.ndarray, asked: np.ndarray,
                     repeats: np.ndarray, cuts: list[int]) -> dict:
    """Per source and stretch of document lengths (EDGES): training documents and tokens found, `asked` for by the weights, and
    written."""
    written = repeats * lengths
    for source, cut in enumerate(cuts):
        if cut:
            written[np.flatnonzero((owners == source) & (repeats > 0))[-1]] -= cut

    def spread(mine: np.ndarray, values: np.ndarray) -> list:
        return [round(value) for value in np.histogram(lengths[mine], EDGES, weights=values[mine])[0].tolist()]

    found = {name: training & (owners == i) for i, name in enumerate(names)}
    return {"edges": EDGES[1:-1], "sources": {name: {
        "documents": spread(mine, np.ones(len(lengths))), "tokens": spread(mine, lengths),
        "asked": spread(mine, asked), "written": spread(mine, written)} for name, mine in found.items()}}


# -------------------------------------------------------------------------------------------------------- command line


def print_corpus(meta: dict) -> None:
    """Counts, and how the training tokens spread over document lengths: as found, as the weights ask and as written."""
    for split, n in meta["splits"].items():
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, {len(n['shards'])} shards")
    heads = [*(f"< {edge:,}" for edge in meta["lengths"]["edges"]), "longer"]
    print(f"{'tokens by document length':>44}" + "".join(f"{head:>10}" for head in heads) + f"{'tokens':>16}{'of all':>9}")
    totals = Counter()
    for rows in meta["lengths"]["sources"].values():
        totals.update({kind: sum(tokens) for kind, tokens in rows.items()})
    for name, rows in meta["lengths"]["sources"].items():
        for kind in ("tokens", "asked", "written"):
            label = f"{name}, {'found' if kind == 'tokens' else kind}"
            shares = (f"{tokens / max(1, sum(rows[kind])):10.1%}" for tokens in rows[kind])
            print(f"{label:>44}" + "".join(shares) + f"{sum(rows[kind]):16,}{sum(rows[kind]) / max(1, totals[kind]):9.1%}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenise sources into a corpus directory.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", action="extend", required=True, metavar="NAME=PATH",
        help="a file or directory; stdlib is this Python's standard library")
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--out", type=Path, required=True, help="new corpus directory")
    add("--source-field", metavar="KEY.KEY", help="where a JSON record names its source (SlimPajama: meta.redpajama_set_name)")
    add("--tokens", type=int, help="how many to write, exactly (the paper: 1000000000); default: all")
    add("--short-length", type=int, default=4096, help="tokens below which a document is short")
    add("--short-weight", type=float, default=1.0, help="how often short documents are used")
    add("--long-length", type=int, default=8192, help="tokens above which a document is long")
    add("--long-weight", type=float, default=1.0, help="how often long documents are used")
    add("--holdout", type=float, default=0.1, help="share of the documents to hold out")
    add("--holdout-tokens", type=int, default=2**24, help="but no more than this")
    add("--holdout-window", type=int, default=48, help="cut held-out runs of this many tokens that training has too; 0: no")
    add("--seed", type=int, default=0, help="chooses the held-out documents, and which are drawn")
    add("--processes", type=int, default=os.cpu_count(), help="change the time only, not the result")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = parse_arguments(argv)
    try:
        for text in a.source:
            if not re.fullmatch("[^=]+=.+", text):
                raise ValueError(f"--source {text}: write it as NAME=PATH")
        sources = [tuple(text.split("=", 1)) for text in a.source]
        print_corpus(prepare_corpus(
            sources, load_tokenizer(a.tokenizer), a.out, a.holdout, a.holdout_window, a.seed, processes=a.processes,
            source_field=a.source_field, holdout_tokens=a.holdout_tokens, budget=a.tokens, short=a.short_length,
            long=a.long_length, short_weight=a.short_weight, long_weight=a.long_weight))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
