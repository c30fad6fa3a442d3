"""What other people's files hold: records, and documents of text; what is not read is told.

The one reader of tools.prepare, train_tokenizer, ruler, perplexity, chat_blend and answer. What a
file is, its content says:

    content                                            records
    a JSON object on the first line                    one a line
    other JSON, if its suffix or first line says so    a list's items, or one value after another
    Parquet (needs pyarrow)                            its rows
    other text in UTF-8                                {"text": all of it}

any of them plain, or packed by gzip or zstd (needs zstandard). Of a directory the files with a
known suffix are read, in any case of letters; a text named itself is read whatever its suffix.
"""
from __future__ import annotations

import gzip
import importlib
import io
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data import is_corpus, json_lines, parse_json
from sft import fault_in, unread

JSON = (".json", ".jsonl", ".ndjson")
RECORDS = (*JSON, ".parquet")
TEXT = tuple(
    ".c .cc .cfg .cpp .cs .css .cu .cuh .go .h .hpp .html .ini .java .js .jsx .kt .lua .md .php "
    ".pl .py .pyi .pyx .r .rb .rs .rst .scala .sh .sql .swift .tex .toml .ts .tsx .txt .xml "
    ".yaml .yml".split())
PACKED = (".gz", ".zst")
NOT_ENTERED = ("__pycache__", "site-packages", "dist-packages", "node_modules")
TEXT_FIELDS = ("text", "content", "raw_content")  # of a record: the first that it has
NOT_READ = {".csv": "a table: write it as JSON lines or Parquet",
            ".tsv": "a table: write it as JSON lines or Parquet",
            ".ipynb": "a notebook: write it as text"}
LFS = b"version https://git-lfs.github.com/spec/"  # begins what git has of a large file
CHUNK = 2**20
MOST_KINDS = 8  # that a line of a report names
MARK = b"\xef\xbb\xbf"  # a byte-order mark, which is no text


# -------------------------------------------------------------------------------------- open a file


class Unreadable(ValueError):
    """Something is not what is read here; `reason` is why, without the place."""

    def __init__(self, place: object, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.reason = reason


def extra(name: str, use: str):
    """A module that is not among the core packages. ValueError, one line, where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ValueError(f"{use} needs {package}: pip install {package}") from None


def zstd_pieces(file: io.BufferedReader) -> Iterator[bytes]:
    """The content of an open .zst file, piece by piece. An EOFError if it was cut short, as for
    gzip: zstandard's own reader takes what is there for the whole."""
    zstandard = extra("zstandard", "a .zst file")
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None  # the one that is begun: a file may have several, one after the other
    packed = b""
    while True:
        packed = packed or file.read(2**8)  # little: it may hold thousands of times as much
        if not packed:
            break
        frame = frame or unpacker.decompressobj()
        try:
            piece = frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        yield piece
        packed = b""
        if frame.eof:
            packed = frame.unused_data
            frame = None
    if frame:
        raise EOFError("it ends within a frame")


class Pieces(io.RawIOBase):
    """A file to read, of the pieces that are its content."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.rest = memoryview(b"")  # of the piece that is being read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """A file's content, unpacked by what it begins with. ValueError for one that is damaged."""
    with open(path, "rb") as file:
        head = file.peek(4)[:4]
        try:
            if head[:2] == b"\x1f\x8b":
                yield io.BufferedReader(gzip.GzipFile(fileobj=file), CHUNK)
            elif head == b"\x28\xb5\x2f\xfd" or head[1:] == b"\x2a\x4d\x18":  # a frame to skip
                yield io.BufferedReader(Pieces(zstd_pieces(file)), CHUNK)
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged {path.suffix} file ({error})") from None
        except UnicodeDecodeError:
            raise Unreadable(path, "not UTF-8") from None


# --------------------------------------------------------------------------------- read its records


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """(place, record) of a file. ValueError names the file, if it can, the line or record."""
    yield from reader_of(path)(path)


def reader_of(path: Path) -> Callable[[Path], Iterator[tuple[str, object]]]:
    """The function below that reads what this file holds."""
    suffix = bare_suffix(path)
    with unpacked(path) as stream:
        head = stream.peek(64)
        if head.startswith(LFS):
            raise ValueError(f"{path}: only says where the data is: git lfs pull brings it")
        if head[:4] == b"PAR1" or suffix == ".parquet":
            return read_rows
        if suffix in NOT_READ:
            raise Unreadable(path, NOT_READ[suffix])
        first = head.removeprefix(MARK).lstrip()[:1]
        if first == b"[" and suffix in JSON:  # its first line may be all of it: not read twice
            return read_values
        # a text may begin with a line of JSON: of what is not called JSON the first two lines count
        lines = itertools.islice(filter(is_filled, stream), 1 if suffix in JSON else 2)
        if first not in (b"{", b"[") or not all(map(has_records, lines)):
            return read_values if suffix in JSON else read_text
    return read_values if first == b"[" else read_lines


def is_filled(line: bytes) -> bool:
    """Whether something is on a line."""
    return bool(line.removeprefix(MARK).strip())


def has_records(line: bytes) -> bool:
    """Whether a line is a JSON object, or a list of objects."""
    try:
        value = parse_json(line, "")
    except ValueError:
        return False
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(value, dict) and value for value in values)


def read_lines(path: Path) -> Iterator[tuple[str, object]]:
    with unpacked(path) as stream:
        # a byte-order mark may be all of the first line
        first = stream.readline().removeprefix(MARK)
        yield from json_lines(itertools.chain([first], stream), path)


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """The items of a JSON list, or JSON values one after the other: one at a time is in memory."""
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,]*")
    with unpacked(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig")
        buffer = text.read(CHUNK).lstrip()
        is_list = buffer.startswith("[")
        end = "]" if is_list else ""  # what must follow the last value
        start = len("[") if is_list else 0
        for number in itertools.count(1):
            place = f"{path}, record {number}"
            while True:
                start = between.match(buffer, start).end()
                try:
                    value, start = decode(buffer, start)
                    break
                except (ValueError, RecursionError):
                    # perhaps it goes on: as much again is read, so that a long one is tried seldom
                    more = text.read(max(CHUNK, len(buffer) - start))
                if not more and buffer[start:].rstrip() == end:
                    return
                if not more:
                    raise Unreadable(place, "not valid JSON, or cut short")
                buffer = buffer[start:] + more
                start = 0
            yield place, value


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    parquet = extra("pyarrow.parquet", "a Parquet file")
    number = 1
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=32):  # in memory: a row may be a book
                for row in rows.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (OSError, ValueError) as error:  # what pyarrow raises
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from None


def read_text(path: Path) -> Iterator[tuple[str, object]]:
    with unpacked(path) as stream:
        text = stream.read().decode("utf-8-sig")
    if "\0" in text:
        raise Unreadable(path, "binary")
    yield str(path), {"text": text}


# ------------------------------------------------------------------------ which files, and the rest


class PassedOver:
    """What was not read: how many of each kind for a reason, and the first of them."""

    def __init__(self) -> None:
        self.counts = {}
        self.first = {}

    def add(self, reason: str, kind: str, place: object) -> None:
        self.counts.setdefault(reason, Counter())[kind] += 1
        self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """A line a reason: "not UTF-8: 2 .txt, 1 .py (the first: books/a.txt)"."""
        lines = []
        for reason, kinds in self.counts.items():
            counts = [f"{count:,} {kind}" for kind, count in kinds.most_common(MOST_KINDS)]
            others = [count for _, count in kinds.most_common()[MOST_KINDS:]]
            if others:
                counts.append(f"{sum(others):,} of {len(others)} other kinds")
            lines.append(f"{reason}: {', '.join(counts)} (the first: {self.first[reason]})")
        return lines

    def because(self) -> str:
        """The lines as the end of a message."""
        return "; ".join(["", *self.lines()])


def suffix_of(path: Path) -> str:
    """In lower case; of a packed file with the one before it: ".json.gz"."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower() + suffix
    return suffix or "without suffix"


def bare_suffix(path: Path) -> str:
    """suffix_of without how the file is packed: ".json"."""
    suffix = suffix_of(path)
    for packed in PACKED:
        suffix = suffix.removesuffix(packed)
    return suffix


def list_files(path: Path, suffixes: tuple[str, ...], passed_over: PassedOver) -> list[Path]:
    """The file itself, or the files of a directory with such suffixes (packed or not), sorted, a
    folder's own before its folders'. Raises ValueError where a package to read them is absent."""
    if path.is_dir():
        files = list(walk(path, suffixes, passed_over))
    elif path.is_file():
        files = [path]
    else:  # it is read twice: to see what it is, and to read it
        raise ValueError(f"{path}: a pipe or device; write what it gives into a file")
    kinds = {suffix_of(file) for file in files}
    if any(kind.endswith(".zst") for kind in kinds):
        extra("zstandard", f"{path}: a .zst file")
    if ".parquet" in kinds:
        extra("pyarrow", f"{path}: a Parquet file")
    return files


def walk(path: Path, suffixes: tuple[str, ...], passed_over: PassedOver) -> Iterator[Path]:
    """The files of a directory, see list_files. OSError for a folder that cannot be read."""
    def fail(error: OSError) -> None:
        raise error

    seen = set()  # files; a cache of Hugging Face's has links to the same one in each snapshot

    def is_seen(file: Path) -> bool:
        status = file.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return True
        seen.add(identity)
        return False

    for place, folders, names in os.walk(path, onerror=fail):
        folders.sort()
        for name in list(folders):
            folder = Path(place, name)
            if name.startswith("."):
                reason = "hidden folder"
            elif name in NOT_ENTERED:
                reason = "folder not entered"
            elif folder.is_symlink():
                reason = "linked folder (it can be a source of its own)"
            else:
                continue
            folders.remove(name)
            passed_over.add(reason, name, folder)
        for name in sorted(names):
            file = Path(place, name)
            if name.startswith("."):
                reason = "hidden file"
            elif bare_suffix(file) not in suffixes:
                reason = "suffix not known"
            elif not file.is_file():
                reason = "no file (a pipe, or a link to nothing)"
            elif is_seen(file):
                reason = "link to a file that is read already"
            else:
                yield file
                continue
            passed_over.add(reason, suffix_of(file), file)


# ------------------------------------------------------------------------------ documents of a text


def source_path(source: str | Path, option: str = "--source") -> Path:
    """The path that a --source names; "stdlib" is this Python's library. FileNotFoundError."""
    path = Path(sysconfig.get_path("stdlib") if str(source) == "stdlib" else source)
    if not path.exists():
        raise FileNotFoundError(f"{option} {source}: no such file or directory")
    return path


def field_of(record: dict, name: str) -> object:
    """What stands in a record at keys joined by dots; None if there is nothing."""
    value = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def parse_document(record: object, text_field: str | None = None) -> dict | str:
    """{text}, {prompt, completion} or {messages} of a record, or why it has none: its `text_field`,
    else messages, else the first of TEXT_FIELDS, else prompt and completion."""
    if not isinstance(record, dict):
        return "no JSON object"
    if text_field is None and record.get("messages") is not None:
        return fault_in(record) or {"messages": record["messages"]}
    # where in the record each part of the document stands
    names = [name for name in TEXT_FIELDS if name in record]
    names.sort(key=lambda name: record[name] is None)  # null is as if absent
    if text_field:
        fields = {"text": text_field}
    elif names:
        fields = {"text": names[0]}
    elif unread(record):
        return unread(record)
    elif "prompt" in record and "completion" in record:
        fields = {"prompt": "prompt", "completion": "completion"}
    elif "messages" in record:
        return "messages is null"
    else:
        known = ", ".join(TEXT_FIELDS)
        return f"no {known}, prompt and completion, or messages (tools.prepare: --text-field)"
    document = {part: field_of(record, name) for part, name in fields.items()}
    for part, text in document.items():
        if not isinstance(text, str):
            return f"{fields[part]} is {'null or absent' if text is None else 'not a string'}"
    return document if any(document.values()) else "empty"


class Documents:
    """The documents of a file or directory, to be read once, as (source, document): the text at the
    record's `source_field` or None, and what parse_document gives.

    A record without a document is passed over and counted, and so is a file that is no text, or a
    .json that is no JSON. A ValueError: a damaged file, one that breaks off, no document at all.
    """

    def __init__(self, path: Path, text_field: str | None = None,
                 source_field: str | None = None) -> None:
        if is_corpus(path):
            raise ValueError(f"{path}: is a corpus that tools.prepare wrote, not text")
        self.path = path
        self.text_field = text_field
        self.source_field = source_field
        self.passed_over = PassedOver()
        self.files = list_files(path, RECORDS + TEXT, self.passed_over)
        self.files_used = Counter()  # those that gave documents, by suffix
        self.count = 0  # documents
        self.without_source = 0
        self.check(self.files, "file to read")

    def check(self, things: object, what: str) -> None:
        if not things:
            raise ValueError(f"{self.path}: holds no {what}{self.passed_over.because()}")

    def __iter__(self) -> Iterator[tuple[str | None, dict]]:
        for file in self.files:
            kind = suffix_of(file)
            earlier = self.count
            records = 0
            try:
                reader = reader_of(file)
                # a plain text has no fields
                field = None if reader is read_text else self.text_field
                for place, record in reader(file):
                    records += 1
                    document = parse_document(record, field)
                    if isinstance(document, str):
                        if isinstance(record, dict):
                            place += f", of keys {', '.join(itertools.islice(record, 6))}"
                        self.passed_over.add(document, f"of {kind}", place)
                    else:
                        if self.count == earlier:  # the file's first
                            self.files_used[kind] += 1
                        self.count += 1
                        yield self.source_of(record), document
            except Unreadable as error:
                # a folder may have .json files of any kind
                if records or bare_suffix(file) in (".jsonl", ".ndjson"):
                    raise
                self.passed_over.add(error.reason, kind, file)
            else:
                if not records:
                    self.passed_over.add("without a record", kind, file)
        self.check(self.count, "document")

    def source_of(self, record: dict) -> str | None:
        if self.source_field is None:
            return None
        source = field_of(record, self.source_field)
        if isinstance(source, str) and source:
            return source
        self.without_source += 1
        return None

    def report(self, name: str) -> str:
        """Lines on what was read so far, and what was passed over."""
        used = self.files_used.most_common()
        files = ", ".join(f"{count:,} {kind}" for kind, count in used)
        lines = [f"{name}: {self.count:,} documents of {files}"]
        if self.without_source:
            lines.append(f"  {self.without_source:,} of them without {self.source_field}")
        for line in self.passed_over.lines():
            lines.append(f"  passed over, {line}")
        return "\n".join(lines)


def texts_of(document: dict) -> list[str]:
    """All that a document says, role names aside."""
    if "messages" in document:
        return [message["content"] for message in document["messages"]]
    return list(document.values())
