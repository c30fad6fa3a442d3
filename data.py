"""Text to training batches: tokenizers, corpora on disk, length up-sampling, packing, chat samples.

A corpus is a directory that `python -m tools.prepare` writes: SPLIT-00000.tokens (little-endian uint32) and .mask (a byte a
token), SPLIT-offsets.npy, SPLIT-sources.npy and meta.json. Chat samples are JSON lines.

A dataset has `sequence_length` S, `document_mask` (whether documents of a row are kept apart) and `sequence(index) ->
(tokens int64, loss mask bool, document ids int64)`, each of S + 1 elements and a pure function of index and seed: resume
anywhere, on any number of ranks. `batch` shifts the targets there and then, before anything is sharded: none is lost at a
shard's border.
"""
from __future__ import annotations

import base64
import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------------- tokenizers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off before GPT-2's pattern runs, so its lookahead takes a digit for the end of the text.
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPECIAL = (  # llama-models, llama3/tokenizer.py
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)))


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, with what Hugging Face's byte-level BPE files need beyond it.

    It applies `normal_form` (Qwen2: NFC) and drops bytes the vocabulary lacks as the tokenizers library does (SmolLM2
    lacks 21). `encode_ordinary` never makes special tokens of what a text spells.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int],
                 normal_form: str | None = None, path: Path | None = None) -> None:
        size = max([*ranks.values(), *special.values()]) + 1
        absent = {bytes([b]) for b in range(256)} - ranks.keys()  # tiktoken wants ids for them: past the end
        ranks = ranks | {byte: size + i for i, byte in enumerate(sorted(absent))}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.max_token_value, self.normal_form, self.lacks_bytes = size - 1, normal_form, bool(absent)
        self.path = path  # the file it was loaded from

    def __reduce__(self):
        """Another process loads the file, once, rather than take 100,000 tokens with every call."""
        return shared_tokenizer, (self.path,)

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of plain text. White space is cut after 100,000 in a row: at a million, tiktoken panics."""
        pieces = map(super().encode_ordinary, re.split(r"(\s{100000})", self.normalise(text)))
        return self.known(itertools.chain.from_iterable(pieces))

    def encode(self, text: str, **special) -> list[int]:
        """Ids of a text, with tiktoken's `allowed_special` and `disallowed_special`."""
        return self.known(super().encode(self.normalise(text), **special))

    def normalise(self, text: str) -> str:
        """The text in `normal_form`."""
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def known(self, tokens: Iterable[int]) -> list[int]:
        """The ids that the vocabulary has."""
        return [t for t in tokens if t <= self.max_token_value] if self.lacks_bytes else list(tokens)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Llama-3 `tokenizer.model`, or Hugging Face `tokenizer.json` of byte-level BPE (Llama 3, Qwen2, SmolLM2).

    path: the file or its directory, where tokenizer.model wins: Llama 3.1's 256 special tokens follow its ranks.
    Raises FileNotFoundError, or ValueError if it cannot be reproduced exactly.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("tokenizer.model" if (path / "tokenizer.model").exists() else "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; needs a tokenizer.model or tokenizer.json")
    if path.suffix == ".json":
        return load_tokenizer_json(path)
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path}: not a Llama-3 tokenizer.model (lines of base64 token and rank)") from None
    if list(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{path}: needs ranks 0, 1, 2, ... for distinct tokens, all 256 bytes among them")
    return Tokenizer("llama3", LLAMA3, ranks, {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}, path=path)


@functools.cache
def shared_tokenizer(path: Path) -> Tokenizer:
    """load_tokenizer, once in a process."""
    return load_tokenizer(path)


def load_tokenizer_json(path: Path) -> Tokenizer:
    """See load_tokenizer. tiktoken joins the pair whose result has the lowest id, tokenizers the first one of `merges`:
    the same if ids grow along `merges` and every longer token has a merge, which is checked."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in added}
        made = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer.json ({type(error).__name__}: {error})") from None
    splitting, normalizer = content.get("pre_tokenizer") or {}, content.get("normalizer") or {}
    pattern = split_pattern(splitting)
    if pattern is None:
        raise ValueError(f"{path}: pre_tokenizer {json.dumps(splitting)[:200]} is not supported, only GPT-2's (ByteLevel), "
                         "SmolLM2's (Digits + ByteLevel), Llama 3's and Qwen2's (Split)")
    if normalizer.get("type", "NFC") != "NFC":
        raise ValueError(f"{path}: normalizer {normalizer['type']} is not supported, only none or NFC")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(name):
            raise ValueError(f"{path}: model.{name} {model[name]!r} is not supported, only none")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these bytes as they are,
    others = sorted({*range(256)} - {*printable})  # and these as characters from 256 on
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    merged = set(made)
    lone = [token for token, i in vocab.items() if i not in merged and token not in byte_of]
    if lone or made != sorted(made):
        reason = f"token {lone[0]!r} has no merge" if lone else "token ids do not grow in the order of merges"
        raise ValueError(f"{path}: {reason}, so tiktoken would encode differently")
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}
    return Tokenizer(path.parent.name, pattern, ranks, added, normalizer.get("type"), path)


def split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts text as tokenizer.json's `pre_tokenizer` does; None if unknown."""
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


# -------------------------------------------------------------------------------------------------------------- chat


CHAT_TOKENS = (("<|start_header_id|>", "<|eot_id|>"), ("<|im_start|>", "<|im_end|>"))  # of Llama 3, of ChatML


def has_chat_tokens(tokenizer: tiktoken.Encoding) -> bool:
    """Whether the tokenizer has a chat template's special tokens."""
    return any(tokenizer.special_tokens_set.issuperset(tokens) for tokens in CHAT_TOKENS)


def end_of_turn(tokenizer: tiktoken.Encoding) -> int:
    """Id of the token that ends a message: Llama 3's <|eot_id|> or ChatML's <|im_end|>. Raises ValueError."""
    for start, end in CHAT_TOKENS:
        if {start, end} <= tokenizer.special_tokens_set:
            return tokenizer.encode_single_token(end)
    raise ValueError(f"tokenizer {tokenizer.name!r} has no chat tokens: Llama 3's <|start_header_id|> and <|eot_id|>, or "
                     "ChatML's <|im_start|> and <|im_end|>")


def stop_tokens(tokenizer: tiktoken.Encoding, known: int | list[int] | None) -> list[int]:
    """Ids at which a server should stop: those the model states (`eos_token_id`), and what ends a text or a turn here."""
    names = {"<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>"} & tokenizer.special_tokens_set
    stated = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({*stated, *map(tokenizer.encode_single_token, names)})


def check_messages(messages: list[dict], training: bool = True) -> None:
    """Raise ValueError unless these are chat messages, for training with an assistant's words in them."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects with role and content")
    for i, message in enumerate(messages):
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {i} has role {message.get('role')!r}; use system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} must have a content that is a string")
    if training and not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError("messages have no assistant content, so nothing to train on")


def encode_chat(messages: list[dict], tokenizer: tiktoken.Encoding,
                add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation and which carry loss: the assistant's words and its end-of-turn token, no others.

    Llama 3's template (llama-models, chat_format.py) or ChatML, by the tokenizer's special tokens; no system message is
    added (Hugging Face's templates of Llama 3.1, SmolLM2 and Qwen2 add one). Contents are plain text: a special token
    spelled there stays text. `add_generation_prompt` opens the assistant's answer, and then messages need none. Raises
    ValueError: see check_messages, end_of_turn.
    """
    check_messages(messages, training=not add_generation_prompt)
    end, text, special = end_of_turn(tokenizer), tokenizer.encode_ordinary, tokenizer.encode_single_token
    llama = "<|start_header_id|>" in tokenizer.special_tokens_set

    def header(role: str) -> list[int]:
        if llama:
            return [special("<|start_header_id|>"), *text(role), special("<|end_header_id|>"), *text("\n\n")]
        return [special("<|im_start|>"), *text(role + "\n")]

    parts = [([special("<|begin_of_text|>")] if llama else [], False)]  # (tokens, whether they carry loss)
    for message in messages:
        role, opening = message["role"], header(message["role"])
        if llama:
            whole = [*opening, *text(message["content"].strip()), end]  # stripped as Hugging Face's templates do
        else:  # one text: white space that begins a content joins ChatML's line break before it
            whole = [special("<|im_start|>"), *text(f"{role}\n{message['content']}"), end]
        own = next((i for i, (a, b) in enumerate(zip(opening, whole)) if a != b), len(opening))  # where the content begins
        parts += [(whole[:own], False), (whole[own:], role == "assistant")]
        parts.append(([] if llama else text("\n"), False))
    if add_generation_prompt:
        parts.append((header("assistant"), False))
    return [t for tokens, _ in parts for t in tokens], [loss for tokens, loss in parts for _ in tokens]


# --------------------------------------------------------------------------------------------------------- documents

JSON_LINES = (".jsonl", ".jsonl.gz")
TEXT = tuple(".c .cc .cfg .cpp .cs .css .cu .cuh .go .h .hpp .html .ini .java .js .json .jsx .kt .lua .md .php .pl .py "
             ".pyi .pyx .r .rb .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsx .txt .xml .yaml .yml".split())
SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages", "node_modules")


class Raw(NamedTuple):
    """A document as it was found: where, its bytes, and whether they are a line of JSON or plain text."""

    place: str
    content: bytes
    is_json: bool


def read_documents(path: str | Path) -> Iterator[dict]:
    """Documents of a file or directory, see read_raw: {text}, {prompt, completion} or {messages}."""
    return (parse_document(raw)[0] for raw in read_raw(path))


def read_raw(path: str | Path) -> Iterator[Raw]:
    """What a file holds, or recursively and sorted a directory, not parsed yet.

    .jsonl and .jsonl.gz hold one document a line; any other file is one text. In directories, hidden files, files without
    a known text suffix and files that are not UTF-8 are passed over. ValueError names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if (path / "meta.json").is_file() and (path / "train-offsets.npy").is_file():
        raise ValueError(f"{path}: is a corpus that tools.prepare wrote, not text")
    if path.name.endswith(JSON_LINES) and path.is_file():
        yield from (Raw(f"{path}, line {number}", line, True) for number, line in read_lines(path))
    elif path.is_file():
        yield Raw(str(path), path.read_bytes(), False)
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and name[0] != ".")
        for file in (Path(folder, name) for name in sorted(names) if name[0] != "."):
            if file.name.endswith(JSON_LINES):
                yield from read_raw(file)
            elif file.name.endswith(TEXT) and file.is_file():  # a link may lead nowhere
                content = file.read_bytes()
                with suppress(UnicodeDecodeError):
                    content.decode()
                    yield Raw(str(file), content, False)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line of a file, .gz or not, that is not blank. ValueError for a damaged .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def parse_document(raw: Raw, source_field: str | None = None) -> tuple[dict, str | None]:
    """A document, and what its record says at `source_field` (keys joined by dots), None if nothing; other keys are dropped.

    Raises ValueError that starts with the place.
    """
    try:
        if not raw.is_json:
            return {"text": raw.content.decode()}, None
        record = json.loads(raw.content)
        source = record
        for key in source_field.split(".") if source_field else ():
            source = source.get(key) if isinstance(source, dict) else None
        source = source if isinstance(source, str) else None
        if "messages" in record:
            check_messages(record["messages"])
            return {"messages": record["messages"]}, source
        keys = ("text",) if "text" in record else ("prompt", "completion")
        if all(isinstance(record[key], str) for key in keys):
            return {key: record[key] for key in keys}, source
    except UnicodeDecodeError as error:
        raise ValueError(f"{raw.place}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error})" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
        raise ValueError(f"{raw.place}: {reason}") from None
    except (KeyError, TypeError):
        pass  # the message below says what is needed
    raise ValueError(f"{raw.place}: needs an object with text, with prompt and completion (strings), or messages")


def source_path(source: str | Path, option: str = "--source") -> Path:
    """The path that a --source names; "stdlib" is the running Python's library. Raises FileNotFoundError."""
    path = Path(sysconfig.get_path("stdlib") if str(source) == "stdlib" else source)
    if not path.exists():
        raise FileNotFoundError(f"{option} {source}: no such file or directory")
    return path


# ----------------------------------------------------------------------------------------------------------- corpora


def refuse_existing(path: Path) -> None:
    """Raise ValueError if `path` holds something."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path}: already exists; remove it or choose another place")


@contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """Yield a new directory `path`.partial to fill; synced, it becomes `path`, or on any error it is removed.

    Raises ValueError if `path` already holds something, OSError with the path if writing fails (disk full).
    """
    path = Path(path).absolute()
    refuse_existing(path)
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
    """Write a file so that it is there complete or not at all."""
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
    """Hold a lock on a file that is there only meanwhile. Raises ValueError if another process has it."""
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not inherit it
        except OSError:
            raise ValueError(f"{path}: another process is at work on it; wait for it to end, or choose another place") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """Identifies what ordinary ids stand for (special ones have other names in tokenizer.json than in .model)."""
    ranks = sorted((rank, token) for token, rank in tokenizer._mergeable_ranks.items())
    return hashlib.sha256(b"".join(b"%d %d %s" % (i, len(t), t) for i, t in ranks)).hexdigest()[:16]


def read_meta(directory: str | Path) -> dict:
    """meta.json of a corpus directory. Raises FileNotFoundError, or ValueError for another format."""
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a corpus (no meta.json); write one with python -m tools.prepare")
    with suppress(ValueError, TypeError, KeyError):
        meta = json.loads(path.read_text())
        if meta["format"] == 1:
            return meta
    raise ValueError(f"{path}: not a corpus of format 1, which this version reads; prepare it again")


def digest(path: str | Path) -> str:
    """Identifies the data at a path: what a corpus's meta.json, or a file of samples, holds."""
    found = hashlib.sha256()
    with open(Path(path) / "meta.json" if Path(path).is_dir() else path, "rb") as file:
        while piece := file.read(2**24):
            found.update(piece)
    return found.hexdigest()[:16]


def encode_document(document: dict, tokenizer: tiktoken.Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Tokens uint32 (T,) and loss mask bool (T,): loss on all of a text, on a completion but not its prompt, or as
    encode_chat says."""
    if "messages" in document:
        tokens, mask = encode_chat(document["messages"], tokenizer)
    else:
        parts = [tokenizer.encode_ordinary(text) for text in document.values()]
        tokens, mask = sum(parts, []), np.repeat([key != "prompt" for key in document], list(map(len, parts)))
    return np.array(tokens, dtype=np.uint32), np.array(mask, dtype=bool)


def encode_documents(documents: Iterable[tuple[str, dict]], tokenizer: tiktoken.Encoding) -> Iterator[tuple]:
    """(source, document) -> (source, tokens, loss mask), see encode_document, in order. Threads: tiktoken releases the
    interpreter."""
    documents = iter(documents)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while group := list(itertools.islice(documents, 256)):  # bounded memory
            yield from pool.map(lambda item: (item[0], *encode_document(item[1], tokenizer)), group)



# ---------------------------------------------------------------------------------------------------------- datasets


class Batch(NamedTuple):
    """int64 tensors (B, S). targets: the token after each of `tokens`, or -100 where that carries no loss; document_ids: None
    unless documents are masked."""

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
    tokens, mask, ids = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*sequences, strict=True))
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # (B, S) of (B, S + 1)
    return Batch(tokens[:, :-1].contiguous(), targets, ids[:, :-1].contiguous() if dataset.document_mask else None)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,), that depends on (seed, epoch) only."""
    return np.argsort(np.random.default_rng([seed, epoch]).random(count), kind="stable")


def length_weights(lengths: np.ndarray, sources: np.ndarray, short: int = 4096, long: int = 8192,
                   short_weight: float = 1.0, long_weight: float = 1.0) -> np.ndarray:
    """Expected repeats of each document an epoch, float64 (documents,): the up-sampling of arXiv 2504.06214, 3.1.

    Below `short` tokens a document weighs short_weight, above `long` long_weight, else 1. Each source is then scaled so
    that its expected tokens stay as they are: sources keep their proportions. Raises ValueError.
    """
    if not 0 <= short <= long or not all(0 <= weight < np.inf for weight in (short_weight, long_weight)):
        raise ValueError(f"length weights need 0 <= short {short} <= long {long}, and finite weights of 0 or more, not "
                         f"{short_weight} and {long_weight}")
    weights = np.where(lengths < short, short_weight, np.where(lengths > long, long_weight, 1.0))
    for source in np.unique(sources):
        mine = sources == source
        kept = weights[mine] @ lengths[mine]
        if not kept:
            raise ValueError(f"source number {int(source) + 1}: every document has weight 0; raise --short-weight or "
                             "--long-weight")
        weights[mine] *= lengths[mine].sum() / kept
    return weights


def separator_tokens(separator: str, tokenizer: tiktoken.Encoding | None) -> np.ndarray:
    """What follows each document, int64 (n,); see PackedDataset. Raises ValueError."""
    if separator not in ("<s>", "none", "bos_eos"):
        raise ValueError(f"separator {separator!r} is unknown; use '<s>', 'none' or 'bos_eos'")
    if separator != "none" and tokenizer is None:
        raise ValueError(f"separator {separator!r} needs the tokenizer")
    if separator != "bos_eos":
        return np.array(tokenizer.encode_ordinary("<s>") if separator == "<s>" else [], dtype=np.int64)
    names = [name for name in ("<|end_of_text|>", "<|endoftext|>", "<|begin_of_text|>")
             if name in tokenizer.special_tokens_set]
    if not names:
        raise ValueError(f"tokenizer {tokenizer.name!r} has no end-of-text token for separator 'bos_eos'")
    return np.array([tokenizer.encode_single_token(name) for name in names], dtype=np.int64)


def load_array(path: str) -> np.ndarray:
    """A .npy file. Raises ValueError if it is damaged."""
    try:
        return np.load(path)
    except (ValueError, EOFError):
        raise ValueError(f"{path}: damaged; prepare the corpus again") from None


def map_shard(path: Path, dtype: str, size: int) -> np.ndarray:
    """A shard as an array that is read where touched. Raises ValueError unless it has `size` elements."""
    if not path.is_file() or path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: missing, or not the {size} tokens of meta.json; prepare the corpus again")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain array: indexing a memmap is far slower


class PackedDataset:
    """A split of a corpus as one endless stream of documents, cut into sequences.

    In an epoch a document occurs length_weights times (the fraction is drawn), in shuffled order: a pure function of
    (seed, epoch). The separator follows every document: "<s>" is that plain text (arXiv 2504.06214, 3.1), "bos_eos" the
    end-of-text token and, where there is one, begin-of-text, "none" nothing. It carries loss: to predict it is to know
    where a document ends. Sequence i is tokens i·S to i·S + S of the stream, so its last target is the next one's
    first input, and documents of S - len(separator) tokens start exactly where sequences do.
    """

    def __init__(self, directory: str | Path, split: str, sequence_length: int, seed: int, separator: str = "<s>",
                 short: int = 4096, long: int = 8192, short_weight: float = 1.0, long_weight: float = 1.0,
                 tokenizer: tiktoken.Encoding | None = None, document_mask: bool = False) -> None:
        """tokenizer: the one the corpus was prepared with, which is checked; separator "none" needs none."""
        meta, prefix = read_meta(directory), Path(directory) / split
        if not meta["splits"].get(split, {}).get("documents"):
            raise ValueError(f"{directory}: no documents in split {split!r}; prepare a larger holdout")
        if tokenizer is not None and fingerprint(tokenizer) != meta["tokenizer"]:
            raise ValueError(f"{directory}: was prepared with another tokenizer than {tokenizer.name!r}")
        if sequence_length < 1 or seed < 0:
            raise ValueError(f"sequence_length {sequence_length} must be 1 or more, seed {seed} 0 or more")
        shards = meta["splits"][split]["shards"]
        self.tokens, self.masks = (  # lists of arrays (T,), one a shard
            [map_shard(Path(f"{prefix}-{i:05d}.{kind}"), dtype, size) for i, size in enumerate(shards)]
            for kind, dtype in (("tokens", "<u4"), ("mask", "?")))
        offsets, shard_starts = load_array(f"{prefix}-offsets.npy"), np.cumsum([0, *shards])
        self.lengths = np.diff(offsets)  # (documents,), as are the next two and the weights
        self.shards = np.searchsorted(shard_starts, offsets[:-1], side="right") - 1
        self.starts = offsets[:-1] - shard_starts[self.shards]  # in the shard
        self.weights = length_weights(self.lengths, load_array(f"{prefix}-sources.npy"), short, long, short_weight, long_weight)
        self.sequence_length, self.seed, self.document_mask = sequence_length, seed, document_mask
        self.separator = separator_tokens(separator, tokenizer)
        self.epochs = 0  # how many of the stream are planned so far,
        self.order = np.empty(0, dtype=np.int64)  # (n,), the documents that occur in them,
        self.bounds = np.zeros(1, dtype=np.int64)  # (n + 1,), and where in the stream each begins and the last ends

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, uint32 (T,)."""
        return self.tokens[self.shards[index]][self.starts[index]:][:self.lengths[index]]

    def plan(self, epoch: int) -> np.ndarray:
        """Documents of an epoch in order, int64 (n,)."""
        draw = np.random.default_rng([self.seed, epoch, 1]).random()  # one for all: systematic sampling
        repeats = np.diff(np.floor(np.cumsum([0, *self.weights]) + draw)).astype(np.int64)
        repeated = np.repeat(np.arange(len(repeats)), repeats)
        return repeated[shuffled(len(repeated), self.seed, epoch)]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, loss mask bool, document ids int64, each (S + 1,). Ids count documents along the stream, so a
        repeated document gets a new one; a separator has the id of the document before it."""
        places = index * self.sequence_length + np.arange(self.sequence_length + 1)  # in the stream
        while self.bounds[-1] <= places[-1]:
            order = self.plan(self.epochs)
            self.order = np.append(self.order, order)
            self.bounds = np.append(self.bounds, self.bounds[-1] + np.cumsum(self.lengths[order] + len(self.separator)))
            self.epochs += 1
        ids = np.searchsorted(self.bounds, places, side="right") - 1
        documents, offsets = self.order[ids], places - self.bounds[ids]
        after = offsets - self.lengths[documents]  # < 0 in the document, 0, 1, ... in its separator
        tokens, mask = np.empty(len(places), dtype=np.int64), np.ones(len(places), dtype=bool)
        tokens[after >= 0] = self.separator[after[after >= 0]]
        for shard in np.unique(self.shards[documents]):
            mine = (self.shards[documents] == shard) & (after < 0)
            source = (self.starts[documents] + offsets)[mine]
            tokens[mine], mask[mine] = self.tokens[shard][source], self.masks[shard][source]
        return tokens, mask, ids


def is_corpus(path: Path) -> bool:
    """Whether a directory is a corpus, not text."""
    return (path / "meta.json").is_file()


def held_out_split(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Tokens uint32 (T,) of each held-out document of a corpus, in order. Raises ValueError, see PackedDataset."""
    held_out = PackedDataset(path, "valid", 1, seed=0, separator="none", tokenizer=tokenizer)
    return map(held_out.document, range(len(held_out.lengths)))


class ChatDataset:
    """Chat samples in rows, right-padded without loss, shuffled each epoch by (seed, epoch).

    A row has one sample, or with `pack` as many as fit in their order, each under an id of its own for the cross-document
    mask. Samples longer than `sequence_length` are dropped, never cut: `dropped` counts them, `rows` has the others.
    """

    def __init__(self, samples: str | Path | Iterable[list[dict]], tokenizer: tiktoken.Encoding, sequence_length: int,
                 seed: int, pack: bool = False) -> None:
        """samples: a .jsonl or .jsonl.gz file of {"messages": [...]}, or lists of messages. Raises ValueError."""
        name = samples if isinstance(samples, (str, Path)) else "samples"
        documents = list(read_documents(samples)) if name is samples else [{"messages": m} for m in samples]
        if not all("messages" in document for document in documents):
            raise ValueError(f"{name}: needs a .jsonl or .jsonl.gz file with messages on every line")
        rows = [row[1:] for row in encode_documents(((name, document) for document in documents), tokenizer)]
        self.rows = [row for row in rows if len(row[0]) <= sequence_length]  # (tokens, loss mask)
        self.dropped = len(rows) - len(self.rows)
        if not self.rows:
            raise ValueError(f"{name}: none of {len(rows)} samples has {sequence_length} tokens or fewer")
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.sequence_length, self.seed, self.padding = sequence_length, seed, end_of_turn(tokenizer)
        self.document_mask = pack
        self.order, self.starts, self.epochs = np.empty(0, dtype=np.int64), [], 0  # samples of the epochs planned so far, rows

    def plan(self) -> None:
        """Put the samples of the next epoch into rows, which begin at `starts` in `order`."""
        order, room = shuffled(len(self.rows), self.seed, self.epochs), 0
        for place, length in enumerate(self.lengths[order].tolist(), len(self.order)):
            if length > room or not self.document_mask:
                self.starts.append(place)
                room = self.sequence_length
            room -= length
        self.order, self.epochs = np.append(self.order, order), self.epochs + 1

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, loss mask bool, document ids int64 (a number for each sample of the stream), each (S + 1,)."""
        while index >= len(self.starts):
            self.plan()
        first, end = [*self.starts[index:index + 2], len(self.order)][:2]
        size, parts = self.sequence_length + 1, [self.rows[sample] for sample in self.order[first:end]]
        tokens, mask = np.full(size, self.padding, dtype=np.int64), np.zeros(size, dtype=bool)
        filled = sum(len(row) for row, _ in parts)
        tokens[:filled], mask[:filled] = (np.concatenate(arrays) for arrays in zip(*parts))
        ids = np.repeat(np.arange(first, end), [len(row) for row, _ in parts])
        return tokens, mask, np.pad(ids, (0, size - filled), mode="edge")  # padding belongs to the last sample


class Blend:
    """Datasets mixed by weight: a sequence comes from one of them, and each gives its own in order, without a gap.

    A block of 1,000 sequences has a fixed number of each (weights are rounded to 1/1000), evenly spread with a jitter
    drawn from (seed, block): any stretch of a run has close to the right shares. Raises ValueError.
    """

    BLOCK = 1000

    def __init__(self, datasets: Sequence, weights: Sequence[float], seed: int) -> None:
        if not datasets or len(datasets) != len(weights) or not all(0 < w < np.inf for w in weights):
            raise ValueError(f"a blend needs a positive weight for each of its datasets, not {weights}")
        if len({dataset.sequence_length for dataset in datasets}) > 1:
            raise ValueError("a blend needs datasets of one sequence_length")
        exact = np.array(weights) / sum(weights) * self.BLOCK
        self.counts = np.floor(exact).astype(np.int64)  # sequences of each in a block
        self.counts[np.argsort(self.counts - exact)[:self.BLOCK - self.counts.sum()]] += 1  # by remainder
        if not self.counts.all():
            raise ValueError(f"weights {weights}: none may be below 1/{self.BLOCK} of their sum")
        self.datasets, self.seed = datasets, seed
        self.sequence_length, self.document_mask = datasets[0].sequence_length, datasets[0].document_mask

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next sequence of the dataset whose turn `index` is."""
        block, place = divmod(index, self.BLOCK)
        owners = np.repeat(np.arange(len(self.counts)), self.counts)  # (BLOCK,), and which of its owner's each is:
        own = np.concatenate([np.arange(count) for count in self.counts])
        jitter = np.random.default_rng([self.seed, block]).random(self.BLOCK)
        turn = np.argsort((own + jitter) / self.counts[owners], kind="stable")[place]
        return self.datasets[owners[turn]].sequence(int(block * self.counts[owners[turn]] + own[turn]))
