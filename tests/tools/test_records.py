"""tools.records: what a file is, its content says; what is not read is counted and told."""
import gzip
import json
import os
import random
import sys
import tracemalloc

import pyarrow.parquet
import pytest
import zstandard
from texts import CONVERSATION

from tools import records
from tools.records import Documents, PassedOver, list_files, read_records

RECORDS = [{"text": "one"}, {"text": "zwei – два"}, {"text": "three\nlines\n"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PRETTY = "".join(json.dumps(record, indent=2) + "\n" for record in RECORDS).encode()
LIST = json.dumps(RECORDS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
MARK = b"\xef\xbb\xbf"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def values(path):
    return [record for _, record in read_records(path)]


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES),
    ("a.JSONL", LINES),
    ("a.ndjson", LINES),
    ("a.json", LINES),
    ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES)),
    ("a.jsonl.zst", zstandard.compress(LINES)),
    ("two_frames.jsonl.zst", zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])),
    ("a.json", LIST),
    ("a.json", json.dumps(RECORDS, indent=1).encode()),
    ("a.jsonl", LIST),
    ("a.json", PRETTY),
    ("a.json.gz", gzip.compress(LIST)),
    ("named_wrongly.txt", LINES),
    ("without_suffix", LINES),
    ("without_suffix", gzip.compress(LINES)),
    ("list.txt", LIST + b"\n"),
    ("spaces.txt", MARK + b" \n " + LINES),
    ("skippable.jsonl.zst", b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(LINES)),
    ("blank.json", b"\n " + LIST),
    ("blank_lines.jsonl", b"\n" + LINES.replace(b"\n", b"\n\n")),
    ("mark.jsonl", MARK + LINES),
    ("mark.json", MARK + LIST),
])
def test_records_are_found_whatever_the_name_and_layout(tmp_path, name, content):
    assert values(write(tmp_path / name, content)) == RECORDS


def test_rows_of_parquet(tmp_path):
    written = [{"text": f"text {i}", "score": None if i % 3 else i} for i in range(1000)]
    path = tmp_path / "000_00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), path, row_group_size=300)
    assert values(path) == written
    places = [place for place, _ in read_records(path)]
    assert (places[0], places[-1]) == (f"{path}, row 1", f"{path}, row 1000")


def test_one_object_is_one_record_and_other_text_is_text(tmp_path):
    assert values(write(tmp_path / "a.json", b'{\n  "text": "x"\n}\n')) == [{"text": "x"}]
    for name, content in [("a.txt", b'{"a": 1}\nis how JSON looks.\n'), ("b.md", b"[1]\n[2]\nNote"),
                          ("c.txt", b"{}\n{}\nprose")]:
        assert values(write(tmp_path / name, content)) == [{"text": content.decode()}]
    for name in ("a.txt", "[a].md", "b"):
        content = b"{ not json }\n[link](there)\r\n"
        assert values(write(tmp_path / name, content)) == [{"text": content.decode()}]
    assert values(write(tmp_path / "mark.txt", MARK + b"x")) == [{"text": "x"}]
    assert values(write(tmp_path / "a.txt.gz", gzip.compress(b"x"))) == [{"text": "x"}]


def test_values_longer_than_a_chunk_and_at_its_edges_are_whole(tmp_path, monkeypatch):
    rng = random.Random(0)
    wanted = [{"text": "ä\\\"{[,]}" * rng.randrange(60), "n": [i, -1.5e3, None, True]}
              for i in range(50)]
    for indent in (None, 2):
        path = write(tmp_path / "a.json", json.dumps(wanted, indent=indent).encode())
        for chunk in (1, 7, 64, 1000, 10**6):
            monkeypatch.setattr(records, "CHUNK", chunk)
            assert values(path) == wanted


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.zst", "parquet"])
def test_records_are_read_in_little_memory(tmp_path, monkeypatch, kind):
    """ShareGPT's list of 700 MB, parsed whole, took 5 times its size."""
    monkeypatch.setattr(records, "CHUNK", 2**16)
    rng = random.Random(0)
    rows = [{"text": rng.randbytes(10_000).hex()} for _ in range(1000)]
    path = tmp_path / f"large.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        path.write_bytes(b"[" + lines.replace(b"\n", b",\n")[:-2] + b"]")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(zstandard.compress(lines) if kind.endswith("zst") else lines)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.25 * len(lines)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", LINES + b"{", "line 4: not valid JSON"),
    ("a.jsonl", LINES + b'{"text": "\xff"}', "line 4: not valid JSON"),
    ("a.json", LIST[:-1], "record 4: not valid JSON, or cut short"),
    ("a.json", LIST[:-5], "record 3: not valid JSON, or cut short"),
    ("a.json", LIST + b"x", "record 4: not valid JSON"),
    ("a.json", b"{'text': 1}", "record 1: not valid JSON"),
    ("deep.json", b"[" * 100_000, "record 1: not valid JSON"),
    ("latin.json", '[{"text": "ä"}]'.encode("latin-1"), "not UTF-8"),
    ("latin.txt", "ä".encode("latin-1"), "not UTF-8"),
    ("utf16.txt", "abc".encode("utf-16"), "not UTF-8"),
    ("utf16.txt", "abc".encode("utf-16-le"), "binary"),
    ("cut.jsonl.gz", gzip.compress(LINES * 1000)[:-20], "damaged .gz file"),
    ("cut.jsonl.zst", zstandard.compress(LINES * 1000)[:-3], "damaged .zst file"),
    ("bits.jsonl.zst", zstandard.compress(LINES * 9)[:20] + b"xyz" * 9, "damaged .zst file"),
    ("bits.jsonl.gz", gzip.compress(LINES * 9)[:20] + b"xyz" * 9, "damaged .gz file"),
    ("sum.jsonl.gz", gzip.compress(LINES)[:-8] + b"12345678", "damaged .gz file"),
    ("a.parquet", b"PAR1" + b"x" * 100, "cannot be read as Parquet"),
    ("a.csv", b"text,label\nx,1\n", "a table"),
])
def test_what_is_damaged_or_no_text_is_named(tmp_path, name, content, message):
    """A .zst file cut short was taken for a whole one, by zstandard's own reader."""
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}.*{message}") as caught:
        values(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package, name", [("zstandard", "a.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_one_line_at_once(tmp_path, monkeypatch, package, name):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / f"deep/{name}".replace(".zst", ".jsonl.zst"), b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install {package}"):
        Documents(tmp_path)


# -------------------------------------------------------------------------------------- directories


def test_a_mixed_directory_is_read_in_order_and_the_rest_is_told(tmp_path):
    folder = tmp_path / "mixed"
    for name in ("b.py", "node_modules/x.js", "a/z.md", "a/b.TXT", ".git/x.py", "__pycache__/x.py",
                 "x.pdf", "y.PDF", ".x.py", "Makefile", "notebook.ipynb"):
        write(folder / name, name.encode() + b"\r\n")
    write(folder / "latin.txt", b"\xff\xfe bad")
    write(folder / "empty.py", b"")
    write(folder / "empty.jsonl", b"\n")
    write(folder / "none.json", b"[]")
    os.mkfifo(folder / "pipe.py")
    write(folder / "package.json", b'{"name": "x", "version": "1"}')
    write(folder / "comments.json", b"// not JSON\n{}")
    (folder / "link.txt").symlink_to(folder / "nowhere.txt")
    write(tmp_path / "other/linked.txt", b"x")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "good_link.txt").symlink_to(tmp_path / "other/linked.txt")
    (folder / "same.txt").symlink_to(tmp_path / "other/linked.txt")  # Hugging Face's snapshots
    lines = ['{"text": "line 1", "id": 7}', "", '{"prompt": "p", "completion": "c"}', ""]
    write(folder / "c.jsonl", "\n".join(lines).encode())
    write(folder / "d.jsonl.gz", gzip.compress(json.dumps({"messages": CONVERSATION}).encode()))

    documents = Documents(folder)
    assert [document for _, document in documents] == [
        {"text": "b.py\r\n"},
        {"text": "line 1"},
        {"prompt": "p", "completion": "c"},
        {"messages": CONVERSATION},
        {"text": "x"},
        {"text": "a/b.TXT\r\n"},
        {"text": "a/z.md\r\n"},
    ]
    unknown = "suffix not known"
    linked = "linked folder (it can be a source of its own)"
    no_text = ("no text, content, raw_content, prompt and completion, or messages (tools.prepare: "
               "--text-field)")
    assert documents.passed_over.counts == {
        "hidden folder": {".git": 1},
        "folder not entered": {"__pycache__": 1, "node_modules": 1},
        linked: {"linked": 1},
        "hidden file": {".py": 1},
        unknown: {".pdf": 2, "without suffix": 1, ".ipynb": 1},
        "no file (a pipe, or a link to nothing)": {".txt": 1, ".py": 1},
        "without a record": {".jsonl": 1, ".json": 1},
        "link to a file that is read already": {".txt": 1},
        "not valid JSON, or cut short": {".json": 1},
        "empty": {"of .py": 1},
        "not UTF-8": {".txt": 1},
        no_text: {"of .json": 1},
    }
    report = documents.report("code").splitlines()
    assert report[0] == "code: 7 documents of 2 .txt, 1 .py, 1 .jsonl, 1 .jsonl.gz, 1 .md"
    assert f"  passed over, not UTF-8: 1 .txt (the first: {folder}/latin.txt)" in report
    assert len(report) == 1 + len(documents.passed_over.counts)


def test_a_path_that_gives_nothing_is_an_error_that_says_why(tmp_path):
    write(tmp_path / "papers/a.pdf", b"%PDF-1.4 \xff")
    write(tmp_path / "papers/b.pdf", b"%PDF-1.4 \xff")
    with pytest.raises(ValueError, match=r"papers: holds no file to read; suffix .*: 2 \.pdf"):
        Documents(tmp_path / "papers")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: holds no file to read$"):
        Documents(tmp_path / "none")
    for path, reason in [
        (tmp_path / "papers/a.pdf", r"holds no document; not UTF-8: 1 \.pdf"),
        (write(tmp_path / "n.jsonl", b'{"text": null}\n{"text": null}'),
         r"n.jsonl: holds no document; text is null or absent: 2 of \.jsonl \(the first: .*line 1, "
         r"of keys text"),
        (write(tmp_path / "s.jsonl", b'{"body": "x"}'), "s.jsonl: holds no document; no text"),
        (write(tmp_path / "b.json", b"{"), "b.json: holds no document; not valid JSON"),
        (write(tmp_path / "d.json", b'{"train": [], "test": []}'), "of keys train, test"),
        (write(tmp_path / "t.csv", b"text\nx\n"), "holds no document; a table: write it as"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            list(Documents(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("b.jsonl.gz", gzip.compress(LINES)[:-3], "damaged .gz file"),
    ("b.jsonl.zst", zstandard.compress(LINES)[:-3], "damaged .zst file"),
    ("b.json", LIST[:-1], "record 4: not valid JSON, or cut short"),
    ("b.jsonl", LINES[:-3], "line 3: not valid JSON"),
    ("b.jsonl", LINES[5:], "record 1: not valid JSON"),
    ("b.ndjson", LINES[5:], "record 1: not valid JSON"),
    ("b.jsonl", b"\xff" + LINES, "not UTF-8"),
    ("b.parquet", b"<!DOCTYPE html>", "cannot be read as Parquet"),
    ("b.parquet", b"", "cannot be read as Parquet"),
    ("b.parquet", POINTER, "git lfs pull"),
    ("b.txt", POINTER, "git lfs pull"),
])
def test_a_damaged_file_of_a_directory_is_an_error_not_half_read(tmp_path, name, content, message):
    write(tmp_path / "a.txt", b"fine")
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        list(Documents(tmp_path))


def test_a_long_list_of_kinds_is_shortened(tmp_path):
    passed_over = PassedOver()
    for i in range(20):
        for _ in range(20 - i):
            passed_over.add("why", f".k{i}", f"file {i}")
    [line] = passed_over.lines()
    assert line == ("why: 20 .k0, 19 .k1, 18 .k2, 17 .k3, 16 .k4, 15 .k5, 14 .k6, 13 .k7, 78 of "
                    "12 other kinds (the first: file 0)")


def test_list_files_takes_suffixes_packed_or_not_in_any_case(tmp_path):
    for name in ("a.JSON", "A.JSON.GZ", "b.json.gz", "c.Parquet", "d.jsonl.ZST", "e.tar.gz",
                 "f.txt", "g.gz"):
        write(tmp_path / name, b"")
    found = list_files(tmp_path, records.RECORDS, PassedOver())
    assert [file.name for file in found] == ["A.JSON.GZ", "a.JSON", "b.json.gz", "c.Parquet",
                                               "d.jsonl.ZST"]


def test_folders_are_entered_in_order_and_one_that_cannot_be_read_is_an_error(tmp_path,
                                                                              monkeypatch):
    names = random.Random(0).sample(range(100), 40)
    for name in names:
        write(tmp_path / str(name) / "a.txt", b"x")
    files = list_files(tmp_path, (".txt",), PassedOver())
    assert [file.parent.name for file in files] == sorted(map(str, names))

    scan = os.scandir

    def refuse(path):
        if str(path).endswith(str(names[0])):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        list_files(tmp_path, (".txt",), PassedOver())


def test_a_pipe_is_refused_not_read_from_its_middle(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: a pipe or device; write what it gives"):
        Documents(tmp_path / "pipe")


# ---------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("record, field, document", [
    ({"text": "a"}, None, {"text": "a"}),
    ({"content": "a", "id": 1}, None, {"text": "a"}),
    ({"raw_content": "a", "url": "u"}, None, {"text": "a"}),
    ({"text": None, "content": "b"}, None, {"text": "b"}),
    ({"prompt": "", "completion": "c"}, None, {"prompt": "", "completion": "c"}),
    ({"text": "a", "content": "b"}, None, {"text": "a"}),
    ({"text": "a", "content": "b"}, "content", {"text": "b"}),
    ({"code": {"body": "a"}}, "code.body", {"text": "a"}),
    ({"messages": CONVERSATION}, "messages", "messages is not a string"),
    ({"messages": CONVERSATION, "text": "t"}, None, {"messages": CONVERSATION}),
    ({"messages": None, "text": "t"}, None, {"text": "t"}),
    ({"messages": None}, None, "messages is null"),
    ({"prompt": "p", "completion": "c"}, None, {"prompt": "p", "completion": "c"}),
    ({"prompt": "p", "completion": None}, None, "completion is null or absent"),
    ({"prompt": "p", "completion": "c", "system": "s"}, None,
     "has 'system', which is not read here"),
    ({"text": None}, None, "text is null or absent"),
    ({"text": 5}, None, "text is not a string"),
    ({"text": ""}, None, "empty"),
    ({"text": "a"}, "body", "body is null or absent"),
    ([1, 2], None, "no JSON object"),
    ("text", None, "no JSON object"),
    (None, None, "no JSON object"),
    ({"messages": [{"role": "user", "content": "x"}]}, None,
     "messages have no assistant content to learn, so nothing to train on"),
])
def test_a_document_or_the_reason_why_there_is_none(record, field, document):
    assert records.parse_document(record, field) == document


def test_a_report_before_the_end_names_the_file_that_is_being_read(tmp_path):
    """tools.train_tokenizer stops at --max-bytes, often within its only file."""
    documents = Documents(write(tmp_path / "a.jsonl", LINES))
    next(iter(documents))
    assert documents.report("up to here") == "up to here: 1 documents of 1 .jsonl"


def test_records_without_the_source_field_are_counted(tmp_path):
    lines = [{"text": "a", "meta": {"set": "x"}}, {"text": "b"}, {"text": "c", "meta": {"set": ""}}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode())
    documents = Documents(path, source_field="meta.set")
    assert [source for source, _ in documents] == ["x", None, None]
    assert documents.report("slim").splitlines() == [
        "slim: 3 documents of 1 .jsonl",
        "  2 of them without meta.set",
    ]


def test_a_text_field_is_for_records_not_for_plain_text(tmp_path):
    write(tmp_path / "a.jsonl", b'{"body": "in a record"}')
    write(tmp_path / "b.txt", b"plain")
    documents = [document for _, document in Documents(tmp_path, text_field="body")]
    assert documents == [{"text": "in a record"}, {"text": "plain"}]
