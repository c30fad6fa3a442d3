"""Text to training batches: tokenizers, corpora on disk, length up-sampling, packing, chat samples.

    python data.py train-bpe --source stdlib --vocab-size 1024 --out out/tokenizer
    python data.py prepare --source code=stdlib --tokenizer out/tokenizer --out out/corpus

A dataset has `sequence_length` S and `sequence(index) -> (tokens int64, loss mask bool, document ids int64)`, each of
S + 1 elements and a pure function of index and seed: resume anywhere, on any number of ranks. `batch` shifts the
targets there and then, before anything is sharded: none is lost at a shard's border.
"""
from __future__ import annotations

import argparse
import base64
import fcntl
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sysconfig
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------------- tokenizers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN2_STDLIB = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")  # `re` has no \p{L}: [^\W\d_] is it, and signs like ½
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


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train byte-level BPE, write it as a Llama-3 tokenizer.model (`path`: directory or *.model file) and load it.

    vocab_size counts the 256 bytes; 256 special tokens come on top. Pieces are Llama 3's but for single digits: no
    merge joins digits, so Llama 3's own pattern gives one token a digit. ValueError for an impossible size.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size} is too small: the bytes alone are 256 tokens")
    words, pattern = Counter(), re.compile(QWEN2_STDLIB)
    for text in texts:
        words.update(pattern.findall(text))
    tokens = learn_merges({word.encode(errors="replace"): n for word, n in words.items()}, vocab_size)
    path = model_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_complete(path, b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return load_tokenizer(path)


def model_file(path: str | Path) -> Path:
    """The tokenizer.model that a directory, or the *.model file itself, stands for."""
    return Path(path) if Path(path).suffix == ".model" else Path(path) / "tokenizer.model"


def learn_merges(words: dict[bytes, int], vocab_size: int) -> list[bytes]:
    """BPE (arXiv 1508.07909) over {word: frequency}: the vocabulary in order of merging, the most frequent pair first,
    lower ids on a tie. Words are spelled as strings with a character for each token id, so that str.replace merges."""
    tokens, frequency = [bytes([b]) for b in range(256)], list(words.values())
    spelled, counts, where = [word.decode("latin-1") for word in words], Counter(), defaultdict(set)

    def count(w: int, sign: int) -> None:
        for pair in itertools.pairwise(spelled[w]):
            counts[pair] += sign * frequency[w]
            where[pair].add(w)

    for w in range(len(spelled)):
        count(w, 1)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size:
        while heap and counts[heap[0][1]] < -heap[0][0]:  # counts of pairs fall as merges use their tokens up
            heapq.heapreplace(heap, (-counts[heap[0][1]], heap[0][1]))
        if not heap or not heap[0][0]:
            raise ValueError(f"vocab_size {vocab_size} is too large: these texts give {len(tokens)} at most")
        (first, second), joined, made = heapq.heappop(heap)[1], chr(len(tokens)), set()
        for w in list(where[first, second]):
            count(w, -1)
            spelled[w] = spelled[w].replace(first + second, joined)
            count(w, 1)
            made.update(pair for pair in itertools.pairwise(spelled[w]) if joined in pair)
        tokens.append(tokens[ord(first)] + tokens[ord(second)])
        for pair in made:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens


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
        raise ValueError(f"{path}: is a corpus that data.py prepare wrote, not text")
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
        if error.filename is not None or isinstance(error, ConnectionError):  # another rank was lost: no fault of the disk
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


def write_corpus(splits: dict[str, Iterable[tuple[str, Sequence[int], Sequence[bool] | None]]], out_dir: str | Path,
                 tokenizer: tiktoken.Encoding, shard_tokens: int = 2**27, **notes) -> dict:
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


def read_meta(directory: str | Path) -> dict:
    """meta.json of a corpus directory. Raises FileNotFoundError, or ValueError for another format."""
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a corpus (no meta.json); write one with data.py prepare")
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


def content_hash(document: dict, seed: int) -> int:
    """64 bits that depend on nothing but content and seed."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, document]).encode(), digest_size=8).digest(), "little")


def is_held_out(document: dict, holdout: float, seed: int) -> bool:
    """By a hash of seed and content: independent of order, and copies of a document fall on one side."""
    return content_hash(document, seed) < holdout * 2**64


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


# ----------------------------------------------------------------------------------------------------------- preparing

# Text becomes parts, files that depend on nothing but their own text and are kept until the corpus is there: any number of
# processes writes the same ones, and a run that was killed finds them. Then one process plans and writes the corpus.

PART_BYTES = 2**23  # of text in a part
MOST_SOURCES = 1000
EDGES = [0, 1024, 4096, 8192, 32768, 131072, 2**62]  # document lengths in the histogram, tokens


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
        raise OSError("a worker process was killed (too little memory?); run the same command again, with fewer --processes: "
                      "it keeps what is done") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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


def workers(processes: int) -> ProcessPoolExecutor:
    """A pool of processes, forks of this one, which find its modules loaded."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), end_with, (os.getpid(),))


def end_with(parent: int) -> None:
    """End this process soon after `parent`, which alone heeds Ctrl-C: a killed one leaves no worker that waits for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    with parts_folder(out_dir.with_name(out_dir.name + ".parts")) as folder:
        paths = encode_sources(sources, source_field, seed, tokenizer, folder, processes)
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
        shared = find_shared(by_part, holdout_window, folder, processes)
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
                   processes: int) -> list[Path]:
    """Parts of all documents, in order."""
    identity = hashlib.sha256(repr([fingerprint(tokenizer), tokenizer._pat_str, tokenizer.normal_form,
                                    sorted(tokenizer._special_tokens.items()), digest(__file__)]).encode()).hexdigest()
    paths, started, encoded = [], time.perf_counter(), 0
    calls = part_calls(sources, source_field, seed, tokenizer, folder, identity)
    bar = tqdm(desc="tokenise", unit=" tokens", unit_scale=True, disable=None)
    for path, tokens in in_order(workers(processes), 2 * processes, encode_part, calls):
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


def find_shared(by_part: list[tuple], window: int, folder: Path, processes: int) -> np.ndarray:
    """Hashes of the windows that held-out documents share with training ones, sorted."""
    held_out = [window_hashes(tokens, window) for path, held, _ in by_part if window
                for _, tokens, _ in held_out_documents(path, held)]
    if not held_out:
        return np.zeros(0, np.uint64)
    known = folder / "held_out_windows.npy"
    np.save(known, np.unique(np.concatenate([np.zeros(1, np.uint64), *held_out])))  # never empty: a 0 too many does no harm
    calls = ((path, repeats > 0, known, window) for path, _, repeats in by_part)
    bar = tqdm(in_order(workers(processes), 2 * processes, shared_windows, calls), "compare with held-out", len(by_part),
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


# ---------------------------------------------------------------------------------------------------------- datasets


class Batch(NamedTuple):
    """int64 tensors (B, S). targets: the token after each of `tokens`, or -100 where that carries no loss."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor


def batch(dataset, first: int, count: int) -> Batch:
    """Sequences first ... first + count - 1 of a dataset, their targets shifted."""
    sequences = [dataset.sequence(index) for index in range(first, first + count)]
    tokens, mask, ids = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*sequences, strict=True))
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # (B, S) of (B, S + 1)
    return Batch(tokens[:, :-1].contiguous(), targets, ids[:, :-1].contiguous())


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
                 tokenizer: tiktoken.Encoding | None = None) -> None:
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
        self.sequence_length, self.seed = sequence_length, seed
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
        self.sequence_length, self.seed, self.pack, self.padding = sequence_length, seed, pack, end_of_turn(tokenizer)
        self.order, self.starts, self.epochs = np.empty(0, dtype=np.int64), [], 0  # samples of the epochs planned so far, rows

    def plan(self) -> None:
        """Put the samples of the next epoch into rows, which begin at `starts` in `order`."""
        order, room = shuffled(len(self.rows), self.seed, self.epochs), 0
        for place, length in enumerate(self.lengths[order].tolist(), len(self.order)):
            if length > room or not self.pack:
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
        self.datasets, self.seed, self.sequence_length = datasets, seed, datasets[0].sequence_length

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next sequence of the dataset whose turn `index` is."""
        block, place = divmod(index, self.BLOCK)
        owners = np.repeat(np.arange(len(self.counts)), self.counts)  # (BLOCK,), and which of its owner's each is:
        own = np.concatenate([np.arange(count) for count in self.counts])
        jitter = np.random.default_rng([self.seed, block]).random(self.BLOCK)
        turn = np.argsort((own + jitter) / self.counts[owners], kind="stable")[place]
        return self.datasets[owners[turn]].sequence(int(block * self.counts[owners[turn]] + own[turn]))


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tokenizer; tokenise a corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    bpe = commands.add_parser("train-bpe", help="train byte-level BPE, one token a digit", **options)
    bpe.add_argument("--source", nargs="+", action="extend", required=True, metavar="PATH", help="file, directory or stdlib")
    bpe.add_argument("--vocab-size", type=int, required=True, help="tokens, without the 256 special ones")
    bpe.add_argument("--max-bytes", type=int, default=5_000_000, help="how much text to train on")
    bpe.add_argument("--out", type=Path, required=True, help="directory to put tokenizer.model in")
    prepare = commands.add_parser("prepare", help="tokenise sources into a corpus directory", **options)
    prepare.add_argument("--source", nargs="+", action="extend", required=True, metavar="NAME=PATH",
                         help="a file or directory; stdlib is this Python's standard library")
    prepare.add_argument("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    prepare.add_argument("--out", type=Path, required=True, help="new corpus directory")
    prepare.add_argument("--source-field", metavar="KEY.KEY",
                         help="where a JSON record names its source (SlimPajama: meta.redpajama_set_name)")
    prepare.add_argument("--tokens", type=int, help="how many to write, exactly (the paper: 1000000000); default: all")
    prepare.add_argument("--short-length", type=int, default=4096, help="tokens below which a document is short")
    prepare.add_argument("--short-weight", type=float, default=1.0, help="how often short documents are used")
    prepare.add_argument("--long-length", type=int, default=8192, help="tokens above which a document is long")
    prepare.add_argument("--long-weight", type=float, default=1.0, help="how often long documents are used")
    prepare.add_argument("--holdout", type=float, default=0.1, help="share of the documents to hold out")
    prepare.add_argument("--holdout-tokens", type=int, default=2**24, help="but no more than this")
    prepare.add_argument("--holdout-window", type=int, default=48,
                         help="cut held-out runs of this many tokens that training has too; 0: keep them")
    prepare.add_argument("--seed", type=int, default=0, help="chooses the held-out documents, and which are drawn")
    prepare.add_argument("--processes", type=int, default=os.cpu_count(), help="change the time only, not the result")
    return parser.parse_args(argv)


def read_texts(paths: list[Path], max_bytes: int) -> Iterator[str]:
    """Texts of all documents until `max_bytes` of UTF-8 are reached."""
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        for text in [message["content"] for message in document.get("messages", [])] or document.values():
            if max_bytes <= 0:
                return
            yield text[:max_bytes]
            max_bytes -= len(text.encode(errors="replace"))


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


def main(argv: list[str] | None = None) -> None:
    a = parse_arguments(argv)
    try:
        if a.command == "train-bpe":
            target = model_file(a.out)
            if target.exists():
                raise ValueError(f"--out {target}: already exists; remove it or choose another place")
            tokenizer = train_bpe(read_texts([source_path(text) for text in a.source], a.max_bytes), a.vocab_size, target)
            print(f"wrote {target}: {a.vocab_size} tokens, {len(tokenizer.special_tokens_set)} special ones")
            return
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
