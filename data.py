"""What is on disk, and how it becomes batches: tokenizers, weights, corpora, packed documents.

A corpus is a directory that `python -m tools.prepare` writes. It holds shards, each of documents of
one source, in three files:

    SPLIT-00000.tokens    little-endian uint32, document after document
    SPLIT-00000.mask      a byte a token: whether it carries loss
    SPLIT-00000.lengths   little-endian int64, the tokens of each document

and meta.json, written last: it names the shards of both splits (train, valid) and says that the
corpus is complete.

A dataset has `sequence_length` S, `document_mask` (whether documents of a row are kept apart) and
`sequence(index) -> (tokens int64, loss mask bool, document ids int64)`, each of S + 1 elements.
These depend on index and seed only: a run resumes anywhere, on any number of ranks.
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

from parallel import Grid, print_once, unshard, whole_shape

# --------------------------------------------------------------------------------------- tokenizers

# Patterns that cut a text into pieces; no token reaches over the end of a piece.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts off digits first: GPT-2's pattern then finds the end of the text where a digit was,
# and gives "  " whole in "a  1", but the second space to b in "a  b".
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPECIAL = (  # llama-models, llama3/tokenizer.py
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)))

PART = 2**19  # characters: longer texts are encoded in parts
# Where no piece of the patterns above reaches over, and NFC joins nothing: after a line break
# between two characters, before a space between two words.
BORDER = re.compile(r"(?<=\S\n)(?=\S)|(?<=[a-z])(?= [a-z])")
MOST_SPACES = 900_000  # tiktoken panics at a million white spaces in a row: cut before (ids differ)
# looked for from the first white space of each run only: from all of them it would be quadratic
LONG_RUN = re.compile(rf"(?<!\s)\s{{{MOST_SPACES},}}")


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, several times as fast as Hugging Face's tokenizers, and what it lacks to
    give their ids: text is put into `normal_form` (Qwen2: NFC), added tokens that are not special
    are one id where they are spelled in plain text (Qwen3: <think>), and bytes not in the
    vocabulary are dropped (SmolLM2: 21). See load_tokenizer_json."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], added: dict[str, int],
                 normal_form: str | None = None, path: Path | None = None,
                 spelled: Iterable[str] = ()) -> None:
        """added: tokens that no merge makes, special ones and those `spelled` in plain text."""
        size = max([*ranks.values(), *added.values()]) + 1
        # tiktoken wants an id for each byte: absent ones get ids beyond the vocabulary
        absent = sorted({bytes([b]) for b in range(256)} - ranks.keys())
        beyond = {byte: size + i for i, byte in enumerate(absent)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks | beyond,
                         special_tokens=added)
        self.max_token_value = size - 1  # tiktoken's, of which it makes n_vocab: without those
        self.normal_form = normal_form
        self.lacks_bytes = bool(absent)  # then `known` must drop them again
        self.path = path  # the file it was loaded from
        self.ordinary = ranks | beyond  # for `fingerprint`
        longest_first = sorted(spelled, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first))
        self.spelled = re.compile(f"({alternatives})") if alternatives else None
        # all on which ids depend, beside those of `ordinary`
        self.rules = repr([pattern, normal_form, longest_first, sorted(added.items())])

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of plain text: a special token spelled there stays text."""
        if len(text) <= PART and not self.spelled:  # nearly all texts
            return self.known(super().encode_ordinary(self.normalise(text)))
        return list(itertools.chain.from_iterable(self.encode_parts(text)))

    def encode_continued(self, text: str) -> list[int]:
        """Ids of plain text that goes on after another; see LibraryTokenizer, where they differ."""
        return self.encode_ordinary(text)

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        """The ids of encode_ordinary, part by part: a list of all takes 40 bytes a token."""
        texts = self.spelled.split(text) if self.spelled else [text]
        for number, between in enumerate(texts):
            if number % 2:  # "Hm <think> so" is split into "Hm ", "<think>", " so"
                yield [self._special_tokens[between]]
                continue
            for part in parts(between):
                yield self.known(super().encode_ordinary(self.normalise(part)))

    def encode(self, text: str, **special) -> list[int]:
        """Ids of a text, with tiktoken's `allowed_special` and `disallowed_special`."""
        return self.known(super().encode(self.normalise(text), **special))

    def normalise(self, text: str) -> str:
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def known(self, tokens: list[int]) -> list[int]:
        """Those of some ids that the vocabulary has."""
        if not self.lacks_bytes:
            return tokens
        return [token for token in tokens if token <= self.max_token_value]


def parts(text: str) -> Iterator[str]:
    """A text in parts a little longer than PART, as far as it has borders to cut it at."""
    start = 0
    while len(text) - start > PART:
        border = BORDER.search(text, start + PART)
        end = border.start() if border else len(text)
        yield from short_runs(text[start:end])
        start = end
    yield text[start:]


def short_runs(text: str) -> Iterator[str]:
    """A text, cut after each MOST_SPACES white spaces of a run."""
    start = 0
    for run in LONG_RUN.finditer(text):
        for end in range(run.start() + MOST_SPACES, run.end(), MOST_SPACES):
            yield text[start:end]
            start = end
    yield text[start:]


def load_tokenizer(path: str | Path,
                   vocab_size: int | None = None) -> Tokenizer | LibraryTokenizer:
    """Llama-3 `tokenizer.model`, or `tokenizer.json` of any BPE (Llama 2 and 3, Qwen2, SmolLM2):
    the file or its directory. vocab_size: the model's, which must have room for all ids."""
    path = Path(path)
    if path.is_dir():
        llama3 = path / "tokenizer.model"
        usable = llama3.is_file() and not is_sentencepiece(llama3)
        path = llama3 if usable else path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; needs a tokenizer.json, or the "
                                "tokenizer.model of Llama 3 (SentencePiece's is not read)")
    is_json = path.suffix == ".json"
    tokenizer = load_tokenizer_json(path) if is_json else load_tokenizer_model(path)
    if vocab_size is not None and tokenizer.n_vocab > vocab_size:
        raise ValueError(f"{path}: {tokenizer.n_vocab} tokens, but the model's vocab_size is "
                         f"{vocab_size}; use the model's own tokenizer")
    return tokenizer


def load_tokenizer_model(path: Path) -> Tokenizer:
    """Llama 3's file, a line a token: its bytes in base64 and its rank, which is its id, as in
    "IHRoZQ== 279" for " the". The special tokens are not in it: their ids follow the ranks."""
    if is_sentencepiece(path):
        raise ValueError(f"{path}: SentencePiece's, which is not read; give the directory or the "
                         "tokenizer.json of the same model")
    ranks = {}
    try:
        lines = [line for line in path.read_bytes().splitlines() if line]
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise ValueError(f"{path}: not a Llama-3 tokenizer.model (base64 token, rank)") from None
    complete = all(bytes([b]) in ranks for b in range(256))
    if list(ranks.values()) != list(range(len(lines))) or not complete:
        raise ValueError(f"{path}: needs ranks 0, 1, 2, ... for distinct tokens, all 256 bytes too")
    special = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}
    return Tokenizer("llama3", LLAMA3, ranks, special, path=path)


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is Llama 2's kind: a protobuf message that begins with another one,
    each with a line break for a tag and a length, as in 0A 0E 0A 05 <unk>."""
    with open(path, "rb") as file:
        start = file.read(3)
    return start[::2] == b"\n\n"


def load_tokenizer_json(path: Path) -> Tokenizer | LibraryTokenizer:
    """Hugging Face's file of BPE: by tiktoken where it does exactly the same, else by tokenizers.

    Both cut a text into pieces by a pattern, begin with a token a byte, and join two neighbours at
    a time. They choose the two differently: tokenizers takes the pair that stands first in
    `merges`, tiktoken the pair whose result has the lowest id. With merges "h e", then "t h":

        ids               "the" by tokenizers    by tiktoken
        he 256, th 257    t he                   t he
        th 256, he 257    t he                   th e

    For merges that BPE training found they agree if ids grow along `merges`, and if every longer
    token has a merge: tiktoken would make one without it, too, which tokenizers never does.
    """
    content = read_object(path)
    try:
        return bpe_tokenizer(path, content)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        kind = type(error).__name__
        raise ValueError(f"{path}: not a BPE tokenizer.json ({kind}: {error})") from error


def bpe_tokenizer(path: Path, content: dict) -> Tokenizer | LibraryTokenizer:
    """The tokenizer of a tokenizer.json's content; see load_tokenizer_json."""
    # 1. Added tokens, the others, and what the merges make.
    model = content["model"]
    kind = model.get("type", "BPE")  # not in some old files
    if kind != "BPE" or model.get("dropout"):  # which draws lots
        raise ValueError(f"{path}: model.type {kind}, dropout {model.get('dropout')} is not "
                         "supported, only BPE without dropout")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    # those that are text, as <think> is for Qwen3, and <|im_end|> is not
    texts = [token for token in content["added_tokens"] if not token.get("special", True)]
    spelled = [token["content"] for token in texts]
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: two tokens of model.vocab have the same id")
    merged = [vocab.get("".join(pair)) for pair in merge_pairs(model)]  # ids
    # 2. By the library.
    lacking = tiktoken_lacks(content, texts, vocab, merged)
    if lacking:
        return LibraryTokenizer(path, content, spelled, lacking)
    # 3. By tiktoken: tokens as the bytes they stand for.
    byte_of = byte_characters()
    ranks = {}
    for token, i in vocab.items():
        ranks[bytes(byte_of[character] for character in token)] = i
    pattern = split_pattern(content["pre_tokenizer"])
    normal_form = (content.get("normalizer") or {}).get("type")
    return Tokenizer(path.parent.name, pattern, ranks, added, normal_form, path, spelled)


def merge_pairs(model: dict) -> list[list[str]]:
    """The merges of a tokenizer.json's model: "h e" in older files, ["h", "e"] in newer ones."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def tiktoken_lacks(content: dict, texts: list[dict], vocab: dict[str, int],
                   merged: list[int | None]) -> str:
    """What of a tokenizer.json tiktoken does not do, or "". texts: added tokens that are text;
    vocab: without added tokens; merged: what each merge makes, None if that is not there."""
    # 1. What it does not have.
    splitting = content.get("pre_tokenizer") or {}
    if split_pattern(splitting) is None:
        return f"pre_tokenizer {json.dumps(splitting)[:200]}"
    normal_form = (content.get("normalizer") or {}).get("type")
    if normal_form not in (None, "NFC"):
        return f"normalizer {normal_form}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if content["model"].get(name):
            return f"model.{name} {content['model'][name]!r}"
    flags = ("lstrip", "rstrip", "single_word", *(["normalized"] if normal_form else []))
    for token in texts:
        for flag in flags:
            if token.get(flag):
                return f"{flag} of the added token {token['content']!r}"
    # 2. What it would do differently.
    if None in merged or merged != sorted(merged):
        return "token ids that do not grow in the order of merges"
    byte_of = byte_characters()
    mergeable = set(merged)
    for token, i in vocab.items():
        if token not in byte_of and i not in mergeable:
            return f"token {token!r}, which has no merge"
    return ""


class LibraryTokenizer:
    """A tokenizer.json that is beyond tiktoken, by the library that such files are of, an extra:
    Tokenizer's methods, several times slower. Hints elsewhere that say Tokenizer mean either.

    Llama 2's kind, SentencePiece's, writes a space as "▁", puts one before each text, and spells a
    character that it lacks in bytes. A text that goes on after another gets none:

        encode_ordinary("a cat\\n")     ▁a ▁cat <0x0A>
        encode_continued("a cat\\n")    a ▁cat <0x0A>

    decode takes a text's first space off, as the library does; decode_bytes, for parts, does not.
    """

    def __init__(self, path: Path, content: dict, spelled: list[str], lacking: str) -> None:
        """content: of the file; spelled: its added tokens that are not special; lacking: what
        tiktoken does not do."""
        added = {token["content"] for token in content["added_tokens"]}
        special = added.difference(spelled)
        # a special token that a text spells is text: no merge may make it
        pairs = [pair for pair in merge_pairs(content["model"]) if "".join(pair) not in special]
        model = content["model"] | {"merges": pairs}
        # truncation and padding are to a model's window
        used = content | {"model": model, "truncation": None, "padding": None}
        self.library = library_tokenizer(path, used, lacking)
        self.continued = library_tokenizer(path, used | without_prefix(content), lacking)

        self.name = path.parent.name
        self.path = path
        vocab = self.library.get_vocab()
        self.n_vocab = max(vocab.values()) + 1
        self.special_tokens_set = added  # as tiktoken has them: those that `spelled` names too
        self.ordinary = {token.encode(): i for token, i in vocab.items() if token not in special}
        self.spelling = token_bytes(vocab, content)  # bytes of each id
        rules = json.dumps(used | {"post_processor": None, "decoder": None})
        self.rules = hashlib.sha256(rules.encode()).hexdigest()

    def encode_ordinary(self, text: str) -> list[int]:
        return self.ids(self.library, text)

    def encode_continued(self, text: str) -> list[int]:
        return self.ids(self.continued, text)

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        yield self.encode_ordinary(text)

    def ids(self, library, text: str) -> list[int]:
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken
        return library.encode(valid, add_special_tokens=False).ids

    def encode_single_token(self, token: str) -> int:
        i = self.library.token_to_id(token)
        if i is None:
            raise KeyError(token)
        return i

    def decode(self, tokens: Sequence[int]) -> str:
        return self.library.decode(list(tokens), skip_special_tokens=False)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.spelling[token] for token in tokens)

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.spelling[token]


def library_tokenizer(path: Path, content: dict, lacking: str):
    """The `tokenizers` library's Tokenizer of a tokenizer.json's content."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError(f"{path}: {lacking}: not by tiktoken, but by the tokenizers library; "
                         "pip install -r requirements-dev.txt") from None
    try:
        library = Library.from_str(json.dumps(content))
    except Exception as error:  # it raises nothing more precise
        raise ValueError(f"{path}: the tokenizers library does not read it ({error})") from None
    library.encode_special_tokens = True  # as text
    return library


def token_bytes(vocab: dict[str, int], content: dict) -> dict[int, bytes]:
    """What each id of a tokenizer.json stands for in a text; vocab: with the added tokens."""
    added = {token["content"] for token in content["added_tokens"]}
    # the characters that the decoder turns back into bytes
    byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
    byte_of = byte_characters() if byte_level else {}
    numbered = content["model"].get("byte_fallback")
    spelling = {}
    for token, i in vocab.items():
        if token in added:  # as it stands there
            spelling[i] = token.encode()
        elif byte_of.keys() >= set(token):  # "Ġcat"
            spelling[i] = bytes(byte_of[character] for character in token)
        elif numbered and re.fullmatch("<0x[0-9A-F]{2}>", token):  # "<0x0A>"
            spelling[i] = bytes([int(token[3:5], 16)])
        else:  # "▁cat", as SentencePiece writes it
            spelling[i] = token.replace("▁", " ").encode()
    return spelling


def without_prefix(content: dict) -> dict:
    """The entries of a tokenizer.json that put a space before each text, so that they do not."""
    normalizers = [step for step in steps(content.get("normalizer")) if step["type"] != "Prepend"]
    splits = []
    for step in steps(content.get("pre_tokenizer")):
        if step["type"] in ("Metaspace", "ByteLevel"):
            step = step | {"prepend_scheme": "never", "add_prefix_space": False}
        splits.append(step)
    return {"normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}}


def steps(entry: dict | None) -> list[dict]:
    """A normalizer's or pre_tokenizer's: those of a sequence, or itself."""
    if not entry:
        return []
    return entry.get("normalizers") or entry.get("pretokenizers") or [entry]


def byte_characters() -> dict[str, int]:
    """The characters as which GPT-2 and a tokenizer.json write bytes, {character: byte}: printable
    ones stand for themselves, the others are characters from 256 on. "Ġ" is the space."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = map(chr, [*printable, *range(256, 256 + len(others))])
    return dict(zip(characters, printable + others, strict=True))


def split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts text as `pre_tokenizer` does; None if that is not known."""
    match pre_tokenizer.get("pretokenizers") or [pre_tokenizer]:  # a sequence of them, or one
        case [*first, {"type": "ByteLevel", "add_prefix_space": False, **options}]:
            cuts = options.get("use_regex", True)  # ByteLevel itself may cut, by GPT-2's pattern
        case _:
            return None
    match first, cuts:
        case [], True:
            return GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return GPT2_DIGITS
        # the pattern is in the file; ByteLevel only writes bytes as characters
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False}], False:
            # tiktoken drops what lies between matches: with these patterns nothing does
            return pattern if pattern in (LLAMA3, QWEN2, GPT2) else None
    return None


def stop_tokens(tokenizer: Tokenizer, eos: int | list[int] | None) -> list[int]:
    """Ids at which generation stops: a model's eos_token_id, and those that end a text or a
    turn."""
    stops = {eos} if isinstance(eos, int) else set(eos or [])
    for name in ("<|end_of_text|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|im_end|>"):
        if name in tokenizer.special_tokens_set:
            stops.add(tokenizer.encode_single_token(name))
    return sorted(stops)


# -------------------------------------------------------------------------------------------- files


def parse_json(content: bytes, place: object) -> object:
    """The JSON value of some bytes, which stand at `place`."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file."""
    content = parse_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def stated_stops(contents: dict[Path, dict]) -> list[int]:
    """All ids that JSON files state as eos_token_id: one, a list or null."""
    stops = set()
    for file, content in contents.items():
        eos = content.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        if any(token is not None and type(token) is not int for token in ids):
            raise ValueError(f"{file}: eos_token_id is {eos!r}; it must be an id or a list of ids")
        stops.update(ids)
    return sorted(stops - {None})


def json_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, object]]:
    """(place, JSON value) of each of a file's lines that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """json_lines of a .jsonl or .jsonl.gz file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            yield from json_lines(lines, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def sync(path: Path) -> None:
    """fsync a file or directory: wait until it is on the disk, not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_or_absent(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `path`, on any error it is removed.
    Whoever looks, even after a crash, sees all of `path` or nothing of it."""
    path = Path(path).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path}: already exists; remove it or choose another place")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    try:
        # 1. Write aside, on the same disk: only there a rename is one step.
        aside.mkdir(parents=True)
        yield aside
        # 2. fsync before the rename. The system may put a new name on the disk long before the
        #    content: after a power cut `path` would hold empty files.
        for item in (*aside.rglob("*"), aside):
            sync(item)
        # 3. Rename, and fsync the folder above, which is where the name stands.
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
    """Hold a lock on a file that is there only meanwhile. ValueError if another process has it."""
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks do not inherit it
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # another process had it, and has just removed the file
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{path}: another process is at work on it; wait for it to end, or "
                             "choose another place") from None
        except OSError as error:  # such as a file system that knows no locks
            raise OSError(f"{path}: cannot be locked ({error.strerror}); choose a place on a file "
                          "system with locks") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """Identifies what is at a path by its content: a file, or a corpus's or model's JSON files,
    tokens and weights; of tokens and weights the first MiB, where two hardly ever agree."""
    large = (".tokens", ".safetensors")
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.suffix in (".json", *large))
    content = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            content.update(stream.read(2**20 if file.suffix in large else -1))  # -1: all
    return content.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ weights

PLAIN = ("F64", "F32", "F16", "BF16")  # types, in safetensors' words, that mean what they hold


def locate_weights(path: Path, stem: str) -> dict[str, Path]:
    """Which safetensors file of the directory holds which tensor: {name: file}. The single file
    goes before an index, as in transformers."""
    single = path / f"{stem}.safetensors"
    index = path / f"{stem}.safetensors.index.json"
    if single.is_file():  # a small model needs no index
        if index.is_file() and f'"{single.name}"' not in index.read_text():
            print_once(f"{path}: holds two sets of weights; {single.name} is read, {index.name} "
                       "and its files are not")
        with open_weights(single) as tensors:
            files = dict.fromkeys(tensors.keys(), single)
    elif index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)")
        files = {name: path / str(file) for name, file in weight_map.items()}
    else:
        raise FileNotFoundError(f"{path}: neither {single.name} nor {index.name} is there; other "
                                "formats (.bin, .pth, .gguf) must be converted to safetensors")
    for file in files.values():  # all of them, before the first is read
        if not file.is_file():
            raise FileNotFoundError(f"{file}: named in the index, but missing; copy every file")
    return files


@contextmanager
def open_weights(file: Path) -> Iterator[safe_open]:
    """One safetensors file. Opening it compares its size with its header: one cut short is told."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from None


def read_weights(path: Path, stem: str, like: dict[str, Tensor], dims: dict[str, int | None],
                 grid: Grid, dtype: torch.dtype | None, device,
                 optional: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, this tp rank's shard) of a directory's tensors, one at a time.

    A shard is a tp rank's part of a tensor: only that is read. Hidden size 4, tp = 2:

        on disk           dims   rank 0 reads    rank 1 reads    shape in `like`
        q_proj  (8, 4)    0      [0:4]           [4:8]           (4, 4)
        o_proj  (4, 8)    1      [:, 0:4]        [:, 4:8]        (4, 4)
        norm    (4,)      None   all             all             (4,)

    `like` has the names and the shards' shapes, dims along which dimension tp cuts each; those that
    are `optional` may be absent. dtype None keeps the file's.
    """
    files = locate_weights(path, stem)
    # 1. The names must be those of the model.
    missing = [f"{name} is missing" for name in like if name not in {*files, *optional}]
    others = [f"{name} is unexpected" for name in files if name not in like]
    if missing or others:
        first = ", ".join(missing[:1] + others[:1])
        raise ValueError(f"{path}: tensor {first} ({len(missing)} missing, {len(others)} "
                         "unexpected); config.json and the weights describe different models")
    # 2. So must be their shapes, and what is stored must be plain numbers: of all tensors, before
    #    the first is read.
    found = [name for name in like if name in files]
    for file, names in itertools.groupby(found, key=files.get):
        with open_weights(file) as tensors:
            for name in names:
                check_header(file, tensors, name, whole_shape(like[name].shape, dims[name], grid))
    # 3. File after file, read this rank's slice of each tensor.
    for file, names in itertools.groupby(found, key=files.get):
        with open_weights(file) as tensors:
            for name in names:
                shape = like[name].shape
                stored = read_shard(tensors, name, shape, dims[name], grid)
                kind = dtype or stored.dtype
                # a copy: `stored` is a view of the file, wherever it lies there, and with alignment
                # the rounding of a kernel may change
                yield name, torch.empty(shape, dtype=kind, device=device).copy_(stored)


def check_header(file: Path, tensors: safe_open, name: str, whole: tuple) -> None:
    """Raise ValueError unless one tensor of an open file has the shape `whole` and a plain type."""
    stored = tensors.get_slice(name)  # nothing is read yet
    shape = tuple(stored.get_shape())
    if stored.get_dtype() not in PLAIN:
        raise ValueError(f"{file}: {name} is stored as {stored.get_dtype()}, not as one of "
                         f"{', '.join(PLAIN)}: its numbers may need scales; use the checkpoint "
                         "before quantisation, or convert this one to bfloat16")
    if shape != whole:
        raise ValueError(f"{file}: {name} has shape {shape}, config.json asks for {whole}")


def read_shard(tensors: safe_open, name: str, shape: tuple, dim: int | None, grid: Grid) -> Tensor:
    """This tp rank's shard, of `shape`, of one tensor of an open file; see read_weights."""
    stored = tensors.get_slice(name)
    if dim is None:  # every rank holds all of it
        return stored[:]
    first = grid.tp_rank * shape[dim]  # shards follow each other by rank
    own = slice(first, first + shape[dim])
    return stored[own] if dim == 0 else stored[:, own]


def write_weights(path: Path, stem: str, shards: Iterable[tuple[str, Tensor]],
                  like: dict[str, Tensor], dims: dict[str, int | None], grid: Grid,
                  max_shard_bytes: int = 5 * 10**9) -> None:
    """The inverse of read_weights: `stem`-0000i-of-0000n.safetensors, and the index that says which
    file holds what. Every rank calls this, and the first writes. `shards`, (name, this tp rank's
    shard), come in the order of `like`, which has their shapes and types."""
    # 1. How many tensors go into each file.
    counts = [0]
    filled = total = 0  # bytes: of the last file, of all files
    for name, shard in like.items():
        size = math.prod(whole_shape(shard.shape, dims[name], grid)) * shard.itemsize
        if filled and filled + size > max_shard_bytes:  # a tensor is never cut
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
        total += size
    # 2. File after file: put its tensors together, on every rank, and write them, on the first.
    shards = iter(shards)
    weight_map = {}
    for number, count in enumerate(counts, 1):
        file = f"{stem}-{number:05d}-of-{len(counts):05d}.safetensors"
        tensors = {}
        for name, shard in itertools.islice(shards, count):
            weight_map[name] = file
            whole = unshard(shard, dims[name], grid)
            if grid.is_first:  # in host memory: a device may have no room for a whole file
                tensors[name] = whole.cpu().contiguous()
        grid.restart_timer()  # the others wait for the first
        if grid.is_first:
            save_tensors(path / file, tensors)
    if grid.is_first:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file = path / f"{stem}.safetensors.index.json"
        index_file.write_text(json.dumps(index, indent=2) + "\n")


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, as readable as any new file, and wait until it is on the disk."""
    try:
        file.touch()
        mode = file.stat().st_mode  # of any new file: the library makes it its owner's alone
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
        sync(file)  # now: all files at the end may take longer than a rank's --timeout
    except SafetensorError as error:  # the library's name for an OSError, such as a full disk
        raise OSError(f"{file}: could not be written ({error})") from None


# ------------------------------------------------------------------------------------------ corpora


def fingerprint(tokenizer: Tokenizer) -> str:
    """Identifies what ordinary ids stand for; special ones have other names in another file."""
    ranks = tokenizer.ordinary
    content = hashlib.sha256()
    for token in sorted(ranks, key=ranks.get):  # with its length, so that no two spell alike
        content.update(b"%d %d %s" % (ranks[token], len(token), token))
    return content.hexdigest()[:16]


def is_corpus(path: Path) -> bool:
    """Whether a directory is a corpus, not text."""
    return (path / "meta.json").is_file()


def read_meta(directory: str | Path, tokenizer: Tokenizer | None = None) -> dict:
    """meta.json of a corpus: {"splits": {"train": [shard, ...], "valid": [...]}, "tokenizer":
    fingerprint, ...}, where a shard is {"name", "source", "documents", "tokens"}. A tokenizer must
    be the one that the corpus was prepared with."""
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a corpus (no meta.json); see tools.prepare")
    meta = read_object(path)
    if meta.get("format") != 2 or not {"splits", "tokenizer"} <= meta.keys():
        raise ValueError(f"{path}: not a corpus of format 2, which is read here; prepare it again")
    if tokenizer is not None and fingerprint(tokenizer) != meta["tokenizer"]:
        raise ValueError(f"{directory}: was prepared with another tokenizer; give that one")
    return meta


def open_shard(directory: Path, shard: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens uint32 (T,), loss mask bool (T,), lengths of documents int64 (N,) of a shard, an entry
    of meta.json. They are read where they are touched."""
    arrays = []
    # torch maps no uint32: tokens are viewed as such at the end
    for kind, dtype, size in (("tokens", torch.int32, shard["tokens"]),
                              ("mask", torch.bool, shard["tokens"]),
                              ("lengths", torch.int64, shard["documents"])):
        file = Path(directory, f"{shard['name']}.{kind}")
        if not file.is_file() or file.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{file}: not the {size} of meta.json; prepare the corpus again")
        # unlike numpy's memmap no file stays open: a process may have a thousand, a corpus has more
        arrays.append(torch.from_file(str(file), size=size, dtype=dtype).numpy())
    tokens, mask, lengths = arrays
    if lengths.sum() != shard["tokens"]:
        raise ValueError(f"{file}: not those of {shard['tokens']} tokens; prepare the corpus again")
    return tokens.view("<u4"), mask, lengths


# ----------------------------------------------------------------------------------------- datasets


class Batch(NamedTuple):
    """int64 tensors (B, S). targets: the token after each of `tokens`, or -100 where that carries
    no loss; document_ids: None unless documents are masked."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None

    def part(self, rows: Tensor, length: int) -> Batch:
        """The first `length` positions of some rows."""
        return Batch(*(None if x is None else x[rows, :length] for x in self))

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in self))


def batch(dataset, first: int, count: int) -> Batch:
    """Sequences first ... first + count - 1 of a dataset, their targets shifted:

        sequence    a  b  c  d        tokens     a  b  c
        loss mask   1  1  0  1        targets    b -100 d     (the next token, if it has loss)

    Here, before a sequence is cut over ranks: no target is lost where it is cut.
    """
    sequences = [dataset.sequence(index) for index in range(first, first + count)]
    tokens, mask, ids = map(np.stack, zip(*sequences, strict=True))  # (B, S + 1) each
    tokens = torch.from_numpy(tokens)
    has_loss = torch.from_numpy(mask)[:, 1:]  # (B, S)
    targets = tokens[:, 1:].masked_fill(~has_loss, -100)  # (B, S)
    document_ids = None
    if dataset.document_mask:
        document_ids = torch.from_numpy(ids)[:, :-1].contiguous()  # (B, S)
    return Batch(tokens[:, :-1].contiguous(), targets, document_ids)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,), that depends on (seed, epoch) only."""
    numbers = np.random.default_rng([seed, epoch]).random(count)
    return np.argsort(numbers, kind="stable")


def length_weights(lengths: np.ndarray, sources: np.ndarray, short: int = 4096, long: int = 8192,
                   short_weight: float = 1.0, long_weight: float = 1.0) -> np.ndarray:
    """Expected repeats of each document an epoch, float64 (documents,): the up-sampling of arXiv
    2504.06214, 3.1. A source of three documents, short_weight 0.5 and long_weight 1.5:

        tokens                         2,000    6,000    12,000    20,000 in all
        1. weight by length              0.5      1         1.5
           weighted tokens             1,000    6,000    18,000    25,000: 5/4 of the source
        2. weight x 4/5                  0.4      0.8       1.2
           expected tokens               800    4,800    14,400    20,000: sources keep their share

    From `short` to `long` tokens, both included: weight 1.
    """
    assert 0 <= short_weight < np.inf and 0 <= long_weight < np.inf  # as the options' types check
    if short > long:
        raise ValueError(f"--short-length {short} is above --long-length {long}")
    weights = np.ones(len(lengths))  # (documents,)
    weights[lengths < short] = short_weight
    weights[lengths > long] = long_weight
    for source in np.unique(sources):
        own = sources == source
        weighted = weights[own] @ lengths[own]  # tokens
        if not weighted:  # nothing to scale: the source would vanish
            raise ValueError(f"--short-weight {short_weight} and --long-weight {long_weight} leave "
                             "no document of one of the corpus's sources; raise them")
        weights[own] *= lengths[own].sum() / weighted  # the source keeps its tokens
    return weights


def separator_tokens(separator: str, tokenizer: Tokenizer | None) -> np.ndarray:
    """What follows each document, int64 (n,); see PackedDataset."""
    if separator == "none":
        tokens = []
    elif tokenizer is None:
        raise ValueError(f"separator {separator!r} needs the tokenizer")
    elif separator == "<s>":
        tokens = tokenizer.encode_continued("<s>")  # plain text: for Llama 2 and 3 < s >
    elif separator == "bos_eos":
        names = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<|begin_of_text|>", "<s>")
        names = [name for name in names if name in tokenizer.special_tokens_set]
        tokens = [tokenizer.encode_single_token(name) for name in names]
        if not tokens:
            raise ValueError(f"tokenizer {tokenizer.name!r} has no end-of-text token for 'bos_eos'")
    else:
        raise ValueError(f"separator {separator!r} is unknown; use '<s>', 'none' or 'bos_eos'")
    return np.array(tokens, dtype=np.int64)


class PackedDataset:
    """A split of a corpus as one endless stream of documents, cut into sequences.

    In an epoch a document occurs length_weights times (see plan), in shuffled order. The separator
    follows every document: "<s>" is that plain text (arXiv 2504.06214, 3.1), "bos_eos" the
    end-of-text token and, where there is one, begin-of-text, "none" nothing. It carries loss: to
    predict it is to know where a document ends. Sequence i is tokens i S to i S + S of the stream,
    both included. Documents a1 ... a5, b1 b2 and c1 c2 c3, S = 4, <s> as if it were one token:

        stream        a1 a2 a3 a4 a5 <s> b1 b2 <s> c1 c2 c3 <s>      and on, epoch after epoch
        document id   0  0  0  0  0  0   1  1  1   2  2  2  2
        sequence 0    a1 a2 a3 a4 a5
        sequence 1                a5 <s> b1 b2 <s>
        sequence 2                             <s> c1 c2 c3 <s>

    The last target of a sequence is the first token of the next: each token is a target once.
    """

    def __init__(self, directory: str | Path, split: str, sequence_length: int, seed: int,
                 separator: str = "<s>", short: int = 4096, long: int = 8192,
                 short_weight: float = 1.0, long_weight: float = 1.0,
                 tokenizer: Tokenizer | None = None, document_mask: bool = False,
                 stored_order: bool = False) -> None:
        """tokenizer: the one the corpus was prepared with, which is checked (see read_meta);
        separator "none" needs none. short ... long_weight: see length_weights. stored_order: the
        documents of an epoch as they stand in the corpus, where neighbours may be related.
        ValueError with weights: a document that is drawn twice would follow its own copy."""
        meta = read_meta(directory, tokenizer)
        shards = meta["splits"].get(split)
        if not shards:
            raise ValueError(f"{directory}: no documents in split {split!r}; prepare it with a "
                             "larger --holdout (or train with --validation-sequences 0)")
        self.sequence_length = sequence_length
        self.seed = seed
        self.document_mask = document_mask
        self.stored_order = stored_order
        if stored_order and (short_weight, long_weight) != (1, 1):
            raise ValueError("--stored-order with --short-weight or --long-weight: a document that "
                             "is drawn twice would follow its own copy; leave both at 1")
        self.separator = separator_tokens(separator, tokenizer)  # (n,)
        # of each shard: (tokens, loss mask, lengths)
        self.arrays = [open_shard(Path(directory), shard) for shard in shards]
        # of each document, (documents,): its shard, its length, where in the shard it begins
        counts = [shard["documents"] for shard in shards]
        self.shard_of = np.repeat(np.arange(len(shards)), counts)
        self.lengths = np.concatenate([lengths for _, _, lengths in self.arrays])
        starts = [np.cumsum(lengths) - lengths for _, _, lengths in self.arrays]
        self.starts = np.concatenate(starts)
        # ... and how often it is used in an epoch
        names = [shard["source"] for shard in shards]
        _, sources = np.unique(names, return_inverse=True)  # numbers instead of names
        self.weights = length_weights(self.lengths, np.repeat(sources, counts), short, long,
                                      short_weight, long_weight)
        # the stream, as far as planned: epochs, documents (n,), their borders in tokens (n + 1,)
        self.epochs = 0
        self.order = np.zeros(0, dtype=np.int64)
        self.bounds = np.zeros(1, dtype=np.int64)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens uint32 (T,) and loss mask bool (T,) of a document."""
        tokens, mask, _ = self.arrays[self.shard_of[index]]
        start = self.starts[index]
        part = slice(start, start + self.lengths[index])
        return tokens[part], mask[part]

    def plan(self, epoch: int) -> np.ndarray:
        """Documents of an epoch in order, int64 (n,).

        A document of weight w occurs floor(w) or ceil(w) times, w on average (systematic sampling).
        The three of length_weights, if the random shift is 0.7:

            document                     0      1      2
            weight                       0.4    0.8    1.2
            sum up to its end            0.4    1.2    2.4
            shifted                      1.1    1.9    3.1
            rounded down                 1      1      3
            repeats, the differences     1      0      2      -> documents 0 2 2, to be shuffled

        Document 0 occurs if the shift is 0.6 or more: with probability 0.4.
        """
        generator = np.random.default_rng([self.seed, epoch, 1])
        shifted = np.cumsum(self.weights) + generator.random()  # (documents,)
        rounded = np.floor(shifted).astype(np.int64)
        repeats = np.diff(rounded, prepend=0)
        documents = np.repeat(np.arange(len(repeats)), repeats)  # (n,)
        if self.stored_order:  # from one on that the seed draws
            return np.roll(documents, generator.integers(len(documents)))
        return documents[shuffled(len(documents), self.seed, epoch)]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, loss mask bool, document ids int64, each (S + 1,). Ids number the documents
        of the stream, so a repeated one gets a new id; a separator has that of its document."""
        size = self.sequence_length + 1
        tokens = np.empty(size, dtype=np.int64)
        mask = np.empty(size, dtype=bool)
        ids = np.empty(size, dtype=np.int64)
        after = (self.separator, np.ones(len(self.separator), dtype=bool))  # (tokens, loss mask)
        # 1. Plan more epochs of the stream until the window's end lies in it.
        first = index * self.sequence_length
        while self.bounds[-1] < first + size:
            order = self.plan(self.epochs)  # (n,)
            ends = self.bounds[-1] + np.cumsum(self.lengths[order] + len(self.separator))
            self.order = np.append(self.order, order)
            self.bounds = np.append(self.bounds, ends)
            self.epochs += 1
        # 2. Find the document in which the window begins, and what of it lies before the window.
        place = int(np.searchsorted(self.bounds, first, side="right")) - 1
        skipped = first - int(self.bounds[place])
        # 3. Copy document, separator, next document, ... until the window is full. Of the first,
        #    and of its separator if the window begins there, tokens are skipped.
        filled = 0
        while filled < size:
            for own_tokens, own_mask in (self.document(self.order[place]), after):
                part = slice(skipped, skipped + size - filled)  # beyond the end it stops by itself
                skipped = max(0, skipped - len(own_tokens))
                window = slice(filled, filled + len(own_tokens[part]))
                tokens[window] = own_tokens[part]
                mask[window] = own_mask[part]
                ids[window] = place
                filled = window.stop
            place += 1
        return tokens, mask, ids


class Blend:
    """Datasets mixed by weight: each sequence comes from one of them, drawn by weight, and each
    gives its own in order, without a gap. Datasets A and B of weights 2 and 1:

        random number in [0, 1)       0.31   0.84   0.12   0.55   0.97     (below 2/3: A)
        so it is drawn from           A      B      A      A      B
        and is that one's sequence    0      0      1      2      1

    Of n sequences a dataset of share p gives about p n, give or take sqrt(p (1 - p) n).
    """

    CHUNK = 2**16  # so many are drawn at once

    def __init__(self, datasets: Sequence, weights: Sequence[float], seed: int) -> None:
        positive = all(0 < weight < np.inf for weight in weights)
        if not datasets or len(datasets) != len(weights) or not positive:
            raise ValueError(f"a blend needs a positive weight for each dataset, not {weights}")
        if len({dataset.sequence_length for dataset in datasets}) > 1:
            raise ValueError("a blend needs datasets of one sequence_length")
        self.datasets = datasets
        self.seed = seed
        self.sequence_length = datasets[0].sequence_length
        self.document_mask = datasets[0].document_mask
        # [0, 1) is cut at these: each dataset has a part as long as its share
        self.borders = np.cumsum(weights)[:-1] / np.sum(weights)
        self.owners = np.zeros(0, dtype=np.int64)  # the dataset of each sequence drawn so far

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As PackedDataset's."""
        # 1. Draw on, in chunks that depend on the seed and their place only.
        while index >= len(self.owners):
            generator = np.random.default_rng([self.seed, len(self.owners), 2])
            numbers = generator.random(self.CHUNK)
            drawn = np.searchsorted(self.borders, numbers, side="right")
            self.owners = np.append(self.owners, drawn)
        # 2. Count how often its dataset was drawn before: so many sequences of it are used.
        owner = self.owners[index]
        earlier = np.count_nonzero(self.owners[:index] == owner)
        return self.datasets[owner].sequence(earlier)
