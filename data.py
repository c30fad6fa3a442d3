"""What is on disk, and how it becomes batches: tokenizers, weights, corpora, packed documents.

A corpus is a directory that `python -m tools.prepare` writes. It holds shards, each of documents of
one source, in three files:

    SPLIT-00000.tokens    little-endian uint32, document after document
    SPLIT-00000.mask      a byte a token: whether it carries loss
    SPLIT-00000.lengths   little-endian int64, the tokens of each document

and meta.json, written last: it names the shards of both splits (train, valid) and says that the
corpus is complete.

A dataset has `sequence_length` S, `document_mask` (whether documents of a row are kept apart) and
`sequence(index) -> (tokens int64, loss mask bool, document ids int64)`, each of S + 1 elements and
a pure function of index and seed: resume anywhere, on any number of ranks. `batch` shifts the
targets there and then, before anything is sharded: none is lost at a shard's border.
"""
from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel import Grid, unshard, whole_shape

# ---------------------------------------------------------------------------------------- tokenizers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2: digits are cut off before GPT-2's pattern runs, so its lookahead takes a digit for the
# end of the text.
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPECIAL = (  # llama-models, llama3/tokenizer.py
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)))


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, with what Hugging Face's byte-level BPE files need beyond it.

    It applies `normal_form` (Qwen2: NFC) and drops bytes the vocabulary lacks as the tokenizers
    library does (SmolLM2 lacks 21). `encode_ordinary` never makes special tokens of what a text
    spells.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int],
                 normal_form: str | None = None, path: Path | None = None) -> None:
        size = max([*ranks.values(), *special.values()]) + 1
        absent = sorted({bytes([b]) for b in range(256)} - ranks.keys())
        beyond = {byte: size + i for i, byte in enumerate(absent)}  # tiktoken wants ids for them
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks | beyond, special_tokens=special)
        self.max_token_value = size - 1
        self.normal_form = normal_form
        self.lacks_bytes = bool(absent)
        self.path = path  # the file it was loaded from

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of plain text, its white space cut after 100,000 in a row: at a million tiktoken panics."""
        pieces = re.split(r"(\s{100000})", self.normalise(text))
        encoded = map(super().encode_ordinary, pieces)
        return self.known(itertools.chain.from_iterable(encoded))

    def encode(self, text: str, **special) -> list[int]:
        """Ids of a text, with tiktoken's `allowed_special` and `disallowed_special`."""
        return self.known(super().encode(self.normalise(text), **special))

    def normalise(self, text: str) -> str:
        """The text in `normal_form`."""
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def known(self, tokens: Iterable[int]) -> list[int]:
        """The ids that the vocabulary has."""
        return [t for t in tokens if t <= self.max_token_value] if self.lacks_bytes else list(tokens)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Llama-3 `tokenizer.model`, or Hugging Face `tokenizer.json` of byte-level BPE (Llama 3,
    Qwen2, SmolLM2).

    path: the file or its directory, where tokenizer.model wins: Llama 3.1's 256 special tokens
    follow its ranks. vocab_size: the model's, which must have room for all ids. Raises
    FileNotFoundError, or ValueError if the tokenizer cannot be reproduced exactly.
    """
    path = Path(path)
    if path.is_dir():
        single = path / "tokenizer.model"
        path = single if single.exists() else path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; needs a tokenizer.model or tokenizer.json")
    load = load_tokenizer_json if path.suffix == ".json" else load_tokenizer_model
    tokenizer = load(path)
    if vocab_size is not None and tokenizer.n_vocab > vocab_size:
        raise ValueError(f"{path}: {tokenizer.n_vocab} tokens, but the model's vocab_size is {vocab_size}; "
                         "use the model's own tokenizer")
    return tokenizer


def load_tokenizer_model(path: Path) -> Tokenizer:
    """See load_tokenizer."""
    ranks = {}
    try:
        lines = [line for line in path.read_bytes().splitlines() if line]
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise ValueError(f"{path}: not a Llama-3 tokenizer.model (lines of base64 token and rank)") from None
    complete = all(bytes([b]) in ranks for b in range(256))
    if list(ranks.values()) != list(range(len(lines))) or not complete:
        raise ValueError(f"{path}: needs ranks 0, 1, 2, ... for distinct tokens, all 256 bytes among them")
    special = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}
    return Tokenizer("llama3", LLAMA3, ranks, special, path=path)


def load_tokenizer_json(path: Path) -> Tokenizer:
    """See load_tokenizer."""
    # 1. Read: special tokens, the others, and which token each merge makes.
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        merged = []
        for pair in model["merges"]:
            pair = pair.split(" ") if isinstance(pair, str) else pair
            merged.append(vocab["".join(pair)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer.json ({type(error).__name__}: {error})") from None

    # 2. Check that tiktoken can do the same.
    byte_of = byte_characters()
    splitting = content.get("pre_tokenizer") or {}
    normal_form = (content.get("normalizer") or {}).get("type")
    pattern = split_pattern(splitting)
    if pattern is None:
        raise ValueError(f"{path}: pre_tokenizer {json.dumps(splitting)[:200]} is not supported, only GPT-2's "
                         "(ByteLevel), SmolLM2's (Digits + ByteLevel), Llama 3's and Qwen2's (Split)")
    if normal_form not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {normal_form} is not supported, only none or NFC")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name):
            raise ValueError(f"{path}: model.{name} {model[name]!r} is not supported, only none")
    # tiktoken joins the pair whose result has the lowest id, tokenizers the first one of `merges`:
    # the same if ids grow along `merges` and every longer token has a merge
    if merged != sorted(merged):
        raise ValueError(f"{path}: token ids do not grow in the order of merges, so tiktoken would encode differently")
    made = set(merged)
    for token, i in vocab.items():
        if token not in byte_of and i not in made:
            raise ValueError(f"{path}: token {token!r} has no merge, so tiktoken would encode differently")

    # 3. Translate characters to the bytes they stand for.
    ranks = {}
    for token, i in vocab.items():
        ranks[bytes(byte_of[character] for character in token)] = i
    return Tokenizer(path.parent.name, pattern, ranks, special, normal_form, path)


def byte_characters() -> dict[str, int]:
    """The characters as which a tokenizer.json writes bytes: {character: byte}, as GPT-2 does.

    Printable ones stand for themselves, the others are characters from 256 on: "Ġ" is the space.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts text as `pre_tokenizer` does; None if that is not known."""
    match pre_tokenizer.get("pretokenizers") or [pre_tokenizer]:
        case [{"type": "ByteLevel", "add_prefix_space": False, **more}] if more.get("use_regex", True):
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **more}] if more.get("use_regex", True):
            return GPT2_DIGITS
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            # tiktoken drops what lies between matches: with these patterns nothing does
            return pattern if pattern in (LLAMA3, QWEN2, GPT2) else None
    return None


def stop_tokens(tokenizer: tiktoken.Encoding, known: int | list[int] | None) -> list[int]:
    """Ids at which a server should stop: those the model states (`eos_token_id`), and what ends a
    text or a turn here."""
    names = {"<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>"} & tokenizer.special_tokens_set
    stops = {tokenizer.encode_single_token(name) for name in names}
    stated = [known] if isinstance(known, int) else known or []
    return sorted(stops.union(stated))


# --------------------------------------------------------------------------------------------- files


def parse_json(content: bytes, place: object) -> object:
    """The JSON value of some bytes. Raises ValueError that starts with `place`, where they stand."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises OSError, or ValueError that names the file."""
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line, of a file or .gz, that is not blank. ValueError: damaged."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """(place, JSON value) of each line of a .jsonl or .jsonl.gz file. ValueError names the place."""
    for number, line in read_lines(path):
        place = f"{path}, line {number}"
        yield place, parse_json(line, place)


def sync(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """Yield a new directory `path`.partial to fill; synced, it becomes `path`, or on any error it
    is removed.

    Raises ValueError if `path` already holds something, OSError with the path if writing fails
    (disk full).
    """
    path = Path(path).absolute()
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: already exists; remove it or choose another place")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    try:
        aside.mkdir(parents=True)
        yield aside
        for item in (*aside.rglob("*"), aside):
            sync(item)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_complete(path: Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all. Raises OSError with the path."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content)
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"{path}: not written ({error.strerror or error})") from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that is there only meanwhile. ValueError if another process has it."""
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not inherit it
            if not os.fstat(file.fileno()).st_nlink:
                raise OSError  # another process had it, and has just removed the file
        except OSError:
            raise ValueError(f"{path}: another process is at work on it; wait for it to end, or choose another "
                             "place") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """Identifies what is at a path by its content: a file, or a corpus's or model's JSON files, tokens and weights; of tokens
    and weights the first MiB, where two corpora or models hardly ever agree."""
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.suffix in (".json", ".tokens", ".safetensors"))
    content = hashlib.sha256()
    for file in files:
        is_large = file.suffix in (".tokens", ".safetensors")
        with open(file, "rb") as stream:
            content.update(stream.read(2**20 if is_large else -1))
    return content.hexdigest()[:16]


# ------------------------------------------------------------------------------------------- weights


def locate_weights(path: Path, stem: str) -> dict[str, Path]:
    """Which safetensors file of the directory holds which tensor: {name: file}.

    Raises FileNotFoundError, or ValueError for a file that is damaged.
    """
    single = path / f"{stem}.safetensors"
    index = path / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)")
        files = {name: path / str(file) for name, file in weight_map.items()}
    elif single.is_file():
        with open_weights(single) as tensors:
            files = dict.fromkeys(tensors.keys(), single)
    else:
        raise FileNotFoundError(f"{path}: neither {single.name} nor {index.name} is there")
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the index names it, but it is missing; copy every shard")
    return files


@contextmanager
def open_weights(file: Path) -> Iterator[safe_open]:
    """One safetensors file. Opening compares its size with its header: ValueError if it is
    truncated or no such file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from None


def read_weights(path: Path, stem: str, like: dict[str, Tensor], dims: dict[str, int | None], grid: Grid,
                 dtype: torch.dtype | None, device) -> Iterator[tuple[str, Tensor]]:
    """(name, this tp rank's shard) of a directory's tensors, one at a time: those of the names and shapes of `like`.

    dims: the dimension along which tp cuts each, None: not at all. dtype None keeps the file's.
    Raises ValueError that names the file if it is damaged, or if a tensor is missing, is one too
    many, has another shape than the whole of these shards, or is quantised.
    """
    files = locate_weights(path, stem)
    # a tied checkpoint may repeat its embedding as lm_head; old Llama 2 files hold tables that are computed here
    harmless = re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq")
    missing = [name for name in like if name not in files]
    unexpected = [name for name in files if name not in like and not harmless.fullmatch(name)]
    if missing or unexpected:
        problem = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unexpected"
        raise ValueError(f"{path}: tensor {problem} ({len(missing)} missing, {len(unexpected)} unexpected); "
                         "config.json and the weights describe different models")
    for file, names in itertools.groupby(like, key=files.get):
        with open_weights(file) as tensors:
            for name in names:
                shape = like[name].shape
                stored = read_shard(file, tensors, name, shape, dims[name], grid)
                # a copy: this is a view of the file, at whatever address, where kernels may round otherwise
                yield name, torch.empty(shape, dtype=dtype or stored.dtype, device=device).copy_(stored)


def read_shard(file: Path, tensors: safe_open, name: str, shape: tuple, dim: int | None, grid: Grid) -> Tensor:
    """This tp rank's shard, of `shape`, of one tensor of an open file. See read_weights."""
    stored = tensors.get_slice(name)
    stored_shape, whole = tuple(stored.get_shape()), whole_shape(shape, dim, grid)
    if stored_shape != whole:
        raise ValueError(f"{file}: {name} has shape {stored_shape}, config.json asks for {whole}")
    if dim is None:
        tensor = stored[:]
    else:
        first = grid.tp_rank * shape[dim]
        own = slice(first, first + shape[dim])
        tensor = stored[:, own] if dim == 1 else stored[own]
    if not tensor.is_floating_point():
        raise ValueError(f"{file}: {name} holds {tensor.dtype}; use the checkpoint that is not quantised")
    return tensor


def write_weights(path: Path, stem: str, shards: Iterable[tuple[str, Tensor]], like: dict[str, Tensor],
                  dims: dict[str, int | None], grid: Grid, max_shard_bytes: int = 5 * 10**9) -> None:
    """`stem`-0000i-of-0000n.safetensors and the index that says which holds what: what read_weights reads.

    shards: (name, this tp rank's shard), in the order of `like`, which has their shapes and types; dims: see read_weights.
    Every rank calls this, and the first writes the whole tensors. A full disk is an OSError that names the file.
    """
    # 1. Which tensors go into which file.
    sizes = {}  # bytes of each whole tensor
    for name, shard in like.items():
        sizes[name] = math.prod(whole_shape(shard.shape, dims[name], grid)) * shard.itemsize
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    weight_map = {name: f"{stem}-{i:05d}-of-{number:05d}.safetensors" for name, i in numbers.items()}
    # 2. File after file.
    for file, group in itertools.groupby(shards, key=lambda item: weight_map[item[0]]):
        tensors = {}
        for name, shard in group:
            whole = unshard(shard, dims[name], grid)
            if grid.is_first:
                tensors[name] = whole.cpu().contiguous()
        grid.restart_timer()  # the others wait for the first
        if grid.is_first:
            save_tensors(path / file, tensors)
    # 3. The index.
    if grid.is_first:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, with the mode of any new file: the library makes it its owner's alone."""
    try:
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
        sync(file)  # in this file's own time: all at the end may take longer than a rank's --timeout
    except SafetensorError as error:  # as which the library raises what is an OSError: a full disk
        raise OSError(f"{file}: could not be written ({error})") from None


# ------------------------------------------------------------------------------------------- corpora


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """Identifies what ordinary ids stand for; special ones have other names in another file."""
    content = hashlib.sha256()
    for token, rank in sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1]):
        content.update(b"%d %d %s" % (rank, len(token), token))
    return content.hexdigest()[:16]


def is_corpus(path: Path) -> bool:
    """Whether a directory is a corpus, not text."""
    return (path / "meta.json").is_file()


def read_meta(directory: str | Path, tokenizer: tiktoken.Encoding | None = None) -> dict:
    """meta.json of a corpus: {"splits": {"train": [shard, ...], "valid": [...]}, "tokenizer":
    fingerprint, ...}, where a shard is {"name", "source", "documents", "tokens"}.

    Raises FileNotFoundError, or ValueError for a corpus of another format or, if one is given,
    another `tokenizer`.
    """
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a corpus (no meta.json); write one with python -m tools.prepare")
    meta = read_object(path)
    if meta.get("format") != 2 or not {"splits", "tokenizer"} <= meta.keys():
        raise ValueError(f"{path}: not a corpus of format 2, which this version reads; prepare it again")
    if tokenizer is not None and fingerprint(tokenizer) != meta["tokenizer"]:
        given = getattr(tokenizer, "path", None) or tokenizer.name
        raise ValueError(f"{directory}: was prepared with another tokenizer than {given}; give that one or prepare it again")
    return meta


def map_file(path: Path, dtype: torch.dtype, size: int) -> np.ndarray:
    """A file of `size` numbers as an array (size,) that is read where it is touched. Unlike numpy's
    memmap it keeps no file open: a process may have a thousand, a corpus has more. ValueError."""
    if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path}: missing, or not the {size} elements of meta.json; prepare the corpus again")
    return torch.from_file(str(path), size=size, dtype=dtype).numpy()


def open_shard(directory: Path, shard: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A shard of a corpus: tokens uint32 (T,), loss mask bool (T,), documents' lengths int64 (N,).

    Raises ValueError naming the file that is not as long as `shard`, an entry of meta.json, says.
    """
    prefix = f"{directory}/{shard['name']}"
    tokens = map_file(Path(f"{prefix}.tokens"), torch.int32, shard["tokens"]).view("<u4")
    mask = map_file(Path(f"{prefix}.mask"), torch.bool, shard["tokens"])
    lengths = map_file(Path(f"{prefix}.lengths"), torch.int64, shard["documents"])
    if lengths.sum() != shard["tokens"]:
        raise ValueError(f"{prefix}.lengths: are not those of its {shard['tokens']} tokens; prepare the corpus again")
    return tokens, mask, lengths


# ------------------------------------------------------------------------------------------ datasets


class Batch(NamedTuple):
    """int64 tensors (B, S). targets: the token after each of `tokens`, or -100 where that carries
    no loss; document_ids: None unless documents are masked."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None

    def part(self, rows: Tensor, length: int) -> Batch:
        """Some rows, to `length`."""
        return Batch(*(None if x is None else x[rows, :length] for x in self))

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return Batch(*(None if x is None else x.to(device) for x in self))


def batch(dataset, first: int, count: int) -> Batch:
    """Sequences first ... first + count - 1 of a dataset, their targets shifted."""
    sequences = [dataset.sequence(index) for index in range(first, first + count)]
    tokens, mask, ids = (torch.from_numpy(np.stack(rows)) for rows in zip(*sequences, strict=True))  # (B, S + 1)
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # (B, S)
    document_ids = ids[:, :-1].contiguous() if dataset.document_mask else None
    return Batch(tokens[:, :-1].contiguous(), targets, document_ids)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,), that depends on (seed, epoch) only."""
    return np.argsort(np.random.default_rng([seed, epoch]).random(count), kind="stable")


def length_weights(lengths: np.ndarray, sources: np.ndarray, short: int = 4096, long: int = 8192,
                   short_weight: float = 1.0, long_weight: float = 1.0) -> np.ndarray:
    """Expected repeats of each document an epoch, float64 (documents,): the up-sampling of arXiv
    2504.06214, 3.1.

    Below `short` tokens a document weighs short_weight, above `long` long_weight, else 1. Each
    source is then scaled so that its expected tokens stay as they are: sources keep their
    proportions. Raises ValueError.
    """
    assert 0 <= short_weight < np.inf and 0 <= long_weight < np.inf, f"weights {short_weight} and {long_weight}"
    if short > long:
        raise ValueError(f"--short-length {short} is above --long-length {long}")
    weights = np.ones(len(lengths))
    weights[lengths < short] = short_weight
    weights[lengths > long] = long_weight
    for source in np.unique(sources):
        own = sources == source
        weighted = weights[own] @ lengths[own]  # tokens
        if not weighted:
            raise ValueError(f"--short-weight {short_weight} and --long-weight {long_weight} leave no document of one of the "
                             "corpus's sources; raise them")
        weights[own] *= lengths[own].sum() / weighted
    return weights


def separator_tokens(separator: str, tokenizer: tiktoken.Encoding | None) -> np.ndarray:
    """What follows each document, int64 (n,); see PackedDataset. Raises ValueError."""
    if separator == "none":
        tokens = []
    elif tokenizer is None:
        raise ValueError(f"separator {separator!r} needs the tokenizer")
    elif separator == "<s>":
        tokens = tokenizer.encode_ordinary("<s>")
    elif separator == "bos_eos":
        names = ("<|end_of_text|>", "<|endoftext|>", "<|begin_of_text|>")
        tokens = [tokenizer.encode_single_token(name) for name in names if name in tokenizer.special_tokens_set]
        if not tokens:
            raise ValueError(f"tokenizer {tokenizer.name!r} has no end-of-text token for separator 'bos_eos'")
    else:
        raise ValueError(f"separator {separator!r} is unknown; use '<s>', 'none' or 'bos_eos'")
    return np.array(tokens, dtype=np.int64)


class PackedDataset:
    """A split of a corpus as one endless stream of documents, cut into sequences.

    In an epoch a document occurs length_weights times (the fraction is drawn), in shuffled order: a
    pure function of (seed, epoch). The separator follows every document: "<s>" is that plain text
    (arXiv 2504.06214, 3.1), "bos_eos" the end-of-text token and, where there is one, begin-of-text,
    "none" nothing. It carries loss: to predict it is to know where a document ends. Sequence i is
    tokens i·S to i·S + S of the stream, so its last target is the next one's first input, and
    documents of S - len(separator) tokens start exactly where sequences do:

        stream      a a a a a <s> b b <s> c c c c ...     with S = 4, and <s> as if it were one token
        sequence 0  a a a a a
        sequence 1          a <s> b b <s>
        sequence 2                    <s> c c c c
    """

    def __init__(self, directory: str | Path, split: str, sequence_length: int, seed: int, separator: str = "<s>",
                 short: int = 4096, long: int = 8192, short_weight: float = 1.0, long_weight: float = 1.0,
                 tokenizer: tiktoken.Encoding | None = None, document_mask: bool = False) -> None:
        """tokenizer: the one the corpus was prepared with, which is checked; separator "none" needs none. See read_meta."""
        meta = read_meta(directory, tokenizer)
        if not meta["splits"].get(split):
            raise ValueError(f"{directory}: no documents in split {split!r}; prepare it with a larger --holdout (or train "
                             "with --validation-sequences 0)")
        self.sequence_length = sequence_length
        self.seed = seed
        self.document_mask = document_mask
        self.separator = separator_tokens(separator, tokenizer)  # (n,)

        shards = meta["splits"][split]
        self.arrays = [open_shard(Path(directory), shard) for shard in shards]  # (tokens, loss mask, lengths) of each
        counts = [shard["documents"] for shard in shards]
        # of each document, (documents,): its shard, its length, where in the shard it begins, how often it is used
        self.shard_of = np.repeat(np.arange(len(shards)), counts)
        self.lengths = np.concatenate([lengths for _, _, lengths in self.arrays])
        self.starts = np.concatenate([np.cumsum(lengths) - lengths for _, _, lengths in self.arrays])
        _, sources = np.unique([shard["source"] for shard in shards], return_inverse=True)
        self.weights = length_weights(self.lengths, np.repeat(sources, counts), short, long, short_weight, long_weight)

        self.epochs = 0  # how many epochs of the stream are planned so far,
        self.order = np.zeros(0, dtype=np.int64)  # (n,): the documents that occur in them,
        self.bounds = np.zeros(1, dtype=np.int64)  # (n + 1,): where each begins, and the last ends

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens uint32 (T,) and loss mask bool (T,) of a document."""
        tokens, mask, _ = self.arrays[self.shard_of[index]]
        part = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return tokens[part], mask[part]

    def plan(self, epoch: int) -> np.ndarray:
        """Documents of an epoch in order, int64 (n,).

        Systematic sampling: along the sum of all weights stands a mark at every whole number, moved
        by one random fraction; a document of weight w covers floor(w) or ceil(w) marks, and occurs
        as often.
        """
        shift = np.random.default_rng([self.seed, epoch, 1]).random()
        marks = np.floor(np.cumsum(self.weights) + shift).astype(np.int64)  # up to each document's end
        repeats = np.diff(marks, prepend=0)
        documents = np.repeat(np.arange(len(repeats)), repeats)
        return documents[shuffled(len(documents), self.seed, epoch)]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, loss mask bool, document ids int64, each (S + 1,). Ids count documents
        along the stream, so a repeated document gets a new one; a separator has the id of the
        document before it."""
        first = index * self.sequence_length
        size = self.sequence_length + 1
        while self.bounds[-1] < first + size:
            self.plan_epoch()
        tokens = np.empty(size, dtype=np.int64)
        mask = np.empty(size, dtype=bool)
        ids = np.empty(size, dtype=np.int64)
        separator = self.separator, np.ones(len(self.separator), dtype=bool)

        # 1. The document in which the sequence begins, and how much of it and its separator lies
        # before.
        number = int(np.searchsorted(self.bounds, first, side="right")) - 1
        skipped = first - int(self.bounds[number])
        # 2. Of each document, then of its separator, take what fits.
        filled = 0
        while filled < size:
            for own_tokens, own_mask in (self.document(self.order[number]), separator):
                part = slice(skipped, skipped + size - filled)
                end = filled + len(own_tokens[part])
                tokens[filled:end] = own_tokens[part]
                mask[filled:end] = own_mask[part]
                ids[filled:end] = number
                filled = end
                skipped = max(0, skipped - len(own_tokens))
            number += 1
        return tokens, mask, ids

    def plan_epoch(self) -> None:
        """Append one more epoch to what is planned of the stream."""
        order = self.plan(self.epochs)
        ends = self.bounds[-1] + np.cumsum(self.lengths[order] + len(self.separator))
        self.order = np.append(self.order, order)
        self.bounds = np.append(self.bounds, ends)
        self.epochs += 1


class Blend:
    """Datasets mixed by weight: each sequence comes from one of them, drawn by weight, and each gives its own in
    order, without a gap: the k-th time that a dataset is drawn it gives its sequence k.

    Of n sequences a dataset of share p gives about p n, give or take sqrt(p (1 - p) n). Raises ValueError.
    """

    CHUNK = 2**16

    def __init__(self, datasets: Sequence, weights: Sequence[float], seed: int) -> None:
        if not datasets or len(datasets) != len(weights) or not all(0 < w < np.inf for w in weights):
            raise ValueError(f"a blend needs a positive weight for each of its datasets, not {weights}")
        if len({dataset.sequence_length for dataset in datasets}) > 1:
            raise ValueError("a blend needs datasets of one sequence_length")
        self.datasets, self.seed = datasets, seed
        self.borders = np.cumsum(weights)[:-1] / np.sum(weights)  # between the datasets' shares of [0, 1)
        self.owners = np.zeros(0, dtype=np.int64)  # the dataset of each sequence that is drawn so far
        self.sequence_length = datasets[0].sequence_length
        self.document_mask = datasets[0].document_mask

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sequence `index` of the blend, from the dataset that is drawn for it: a pure function of (seed, index)."""
        while index >= len(self.owners):
            generator = np.random.default_rng([self.seed, len(self.owners), 2])
            drawn = np.searchsorted(self.borders, generator.random(self.CHUNK), side="right")
            self.owners = np.append(self.owners, drawn)
        owner = self.owners[index]
        earlier = np.count_nonzero(self.owners[:index] == owner)
        return self.datasets[owner].sequence(earlier)
