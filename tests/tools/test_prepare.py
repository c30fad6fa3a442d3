"""tools.prepare: what is read and held out, the same bytes however they were made."""
import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import fork_context
from texts import (
    CONVERSATION,
    TRAINING_TEXT,
    hugging_face_tokenizer,
    sentencepiece_tokenizer,
)

import data
from tools import prepare
from tools.train_tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([TRAINING_TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


def read_back(directory, split):
    """Documents as (tokens, mask)."""
    dataset = data.PackedDataset(directory, split, 8, 0, "none")
    return [dataset.document(i) for i in range(len(dataset.lengths))]


def texts(directory, split, tokenizer):
    return {tokenizer.decode(tokens.tolist()) for tokens, _ in read_back(directory, split)}


def content(directory):
    """What is in its files, by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def write_lines(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


# ----------------------------------------------------------------------------------------- corpus


def write_text_files(folder, count=60, seed=0, words=80):
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        text = " ".join(f"name{rng.randrange(10**5)}" for _ in range(words))
        (folder / f"{i:03}.py").write_text(text)
    return folder


def test_loss_masks_of_the_three_kinds_of_document(tmp_path, tokenizer):
    lines = [
        {"text": "all of it"},
        {"prompt": "question ", "completion": "answer"},
        {"messages": CONVERSATION},
        {"text": ""},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    meta = prepare.prepare_corpus([("x", tmp_path / "d.jsonl")], tokenizer, tmp_path / "out",
                                  holdout=0)
    documents = read_back(tmp_path / "out", "train")
    carried = [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in documents]
    assert carried == ["all of it", "answer", "Hello.<|eot_id|>So long 👋<|eot_id|>"]
    assert tokenizer.decode(documents[1][0].tolist()) == "question answer"
    [shard] = meta["splits"]["train"]  # the empty document is left out
    count = sum(len(tokens) for tokens, _ in documents)
    assert shard == {"name": "train-00000", "source": "x", "documents": 3, "tokens": count}


def test_ids_above_65535_survive(tmp_path):
    """uint16 storage wraps silently for Llama 3's 128,256 ids."""
    ranks = {bytes([b]): b for b in range(256)}
    for i in range(256, 128_000):
        ranks[b"%06d" % i] = i
    large = data.Tokenizer("large", data.LLAMA3, ranks, {})
    ids = [65_535, 65_536, 127_999, 0]
    prepare.write_corpus({"train": [("x", ids, None)]}, tmp_path / "out", large)
    tokens, _, _ = data.PackedDataset(tmp_path / "out", "train", 3, 0, "none").sequence(0)
    assert tokens.tolist() == ids


def test_holdout_is_by_content_whatever_the_order_and_copies_share_a_side(tmp_path, tokenizer):
    lines = [f"document {i} " + "word " * i for i in range(60)]
    sides = []
    for name, order, seed in (("a", lines, 0), ("b", [*lines[::-1], *lines], 0), ("c", lines, 1)):
        file = write_lines(tmp_path / f"{name}.jsonl", order)
        prepare.prepare_corpus([("x", file)], tokenizer, tmp_path / name, 0.3, holdout_window=0,
                               seed=seed)
        sides.append([texts(tmp_path / name, split, tokenizer) for split in ("train", "valid")])
    assert sides[0] == sides[1] != sides[2]
    train, valid = sides[0]
    assert not train & valid
    assert train | valid == set(lines)
    assert 5 <= len(valid) <= 30


def test_windows_shared_with_training_documents_are_cut_out_of_held_out_ones(tmp_path, tokenizer):
    """A licence header in every file would otherwise be measured as held-out text."""
    rng = random.Random(1)
    licence = " ".join(str(rng.randrange(10**6)) for _ in range(40))
    folder = write_text_files(tmp_path / "text", words=120)
    for i, path in enumerate(sorted(folder.iterdir())):
        own = path.read_text()
        if i % 2:
            path.write_text(f"{own[:300]}\n{licence}\n{own[300:]}")
    prepare.prepare_corpus([("x", folder)], tokenizer, tmp_path / "out", 0.3, holdout_window=48)
    prepare.prepare_corpus([("x", folder)], tokenizer, tmp_path / "uncut", 0.3, holdout_window=0)

    def windows(documents):
        """All runs of 48 tokens."""
        return {tuple(t[i:i + 48].tolist()) for t, _ in documents for i in range(len(t) - 47)}

    def size(documents):
        return sum(len(tokens) for tokens, _ in documents)

    train = read_back(tmp_path / "out", "train")
    valid = read_back(tmp_path / "out", "valid")
    uncut = read_back(tmp_path / "uncut", "valid")
    assert windows(uncut) & windows(train)
    assert not windows(valid) & windows(train)
    assert windows(valid) <= windows(uncut)
    assert min(len(tokens) for tokens, _ in valid) >= 48
    assert 0 < size(uncut) - size(valid) < 0.6 * size(uncut)  # the documents' own text is kept


def test_exactly_the_shared_tokens_are_cut_and_short_remainders_dropped():
    tokens = np.arange(100, dtype=np.uint32)
    training = np.array([7, *range(20, 33), 8, *range(38, 47), *range(60, 70), 9], dtype=np.uint32)
    shared = np.intersect1d(prepare.window_hashes(tokens, 10), prepare.window_hashes(training, 10))
    assert len(shared) == 5  # four begin at 20 to 23, one at 60; 38 to 46 is too short

    def pieces(tokens, mask):
        cut = prepare.cut_shared_windows(tokens, mask, 10, shared)
        return [piece.tolist() for piece, _ in cut]

    mask = tokens < 90
    assert pieces(tokens, mask) == [
        list(range(20)),
        list(range(33, 60)),
        list(range(70, 100)),
    ]
    assert pieces(tokens[12:80], mask[12:80]) == [  # 12 to 19 is too short to keep
        list(range(33, 60)),
        list(range(70, 80)),
    ]
    assert pieces(tokens, tokens < 60) == [  # the last piece has no token with loss
        list(range(20)),
        list(range(33, 60)),
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 48, 64])
def test_window_hashes_tell_windows_apart_and_find_equal_ones(window):
    tokens = np.random.default_rng(0).integers(0, 3, 3000).astype(np.uint32)
    hashes = prepare.window_hashes(tokens, window)
    windows = [tuple(tokens[i:i + window].tolist()) for i in range(len(tokens) - window + 1)]
    pairs = set(zip(hashes.tolist(), windows, strict=True))
    assert len(pairs) == len(set(windows))  # equal windows have equal hashes
    assert len(pairs) == len(set(hashes.tolist()))  # others have others


def test_a_full_disk_is_one_line_with_the_path_and_leaves_nothing(tmp_path, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # like a full disk, for this process only
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    message = f"{re.escape(str(tmp_path / 'out'))}: not written"
    try:
        with pytest.raises(OSError, match=message) as caught:
            prepare.write_corpus({"train": [("x", [5] * 9000, None)]}, tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_before_it_reads(tmp_path, tokenizer):
    folder = write_text_files(tmp_path / "text", 3)
    for name in ("full", "empty", "whole"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").write_text("keep me")
    (tmp_path / "whole" / "meta.json").write_text("{}")
    foreign = "already exists, and has file, which prepare did not write"
    cases = [
        ([("x", folder)], "full", foreign),
        ([("x", folder)], "whole", "already exists; remove it"),
        ([("x", folder), ("x", folder)], "o", "names must differ"),
        ([("x", tmp_path / "no")], "o", "no such file"),
        ([("x", tmp_path / "empty")], "o", "empty: holds no file to read"),
        ([("x", folder), ("y", tmp_path / "empty")], "o", "empty: holds no file to read"),
        ([("x", tmp_path / "whole")], "o", "is a corpus"),
    ]
    for sources, out, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            prepare.prepare_corpus(sources, tokenizer, tmp_path / out)
    assert (tmp_path / "full" / "file").read_text() == "keep me"
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------- jobs and processes


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Two JSON-lines files of 700 documents, sources "web" and "books" by a field, lengths from 20
    to 20,000 characters."""
    place = tmp_path_factory.mktemp("web")
    rng = random.Random(5)
    for name in ("a.jsonl", "b.jsonl.gz"):
        lines = []
        for _ in range(350):
            source = rng.choice(["web", "web", "books"])
            words = int(2 ** rng.uniform(2, 9.5 if source == "books" else 8))
            text = " ".join(f"{rng.randrange(10**4)}" for _ in range(words))
            lines.append(json.dumps({"text": text, "meta": {"set": {"name": source}}}))
        text = "\n".join(lines).encode()
        (place / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return place


SMALL = {"source_field": "meta.set.name", "holdout_window": 16, "job_characters": 20_000}


def prepared(web, tokenizer, out, **options):
    return prepare.prepare_corpus([("slim", web)], tokenizer, out, **SMALL | options)


def test_shards_have_one_source_each_and_all_documents_in_order(web, tokenizer, tmp_path):
    meta = prepared(web, tokenizer, tmp_path / "out", holdout=0)
    dataset = data.PackedDataset(tmp_path / "out", "train", 8, 0, "none")
    names = {shard["source"] for shard in meta["splits"]["train"]}
    assert names == {"slim/web", "slim/books"}
    assert len(meta["splits"]["train"]) > 10
    found = {name: [] for name in names}
    number = 0
    for shard in meta["splits"]["train"]:
        for _ in range(shard["documents"]):
            tokens, _ = dataset.document(number)
            found[shard["source"]].append(tokenizer.decode(tokens.tolist()))
            number += 1
    expected = {name: [] for name in names}
    for name in ("a.jsonl", "b.jsonl.gz"):
        for _, record in data.read_records(web / name):
            expected[f"slim/{record['meta']['set']['name']}"].append(record["text"])
    assert found == expected


def test_any_number_of_processes_writes_the_same_bytes(web, tokenizer, tmp_path):
    for processes in (1, 4):
        prepared(web, tokenizer, tmp_path / str(processes), processes=processes, seed=3)
    files = content(tmp_path / "1")
    assert files == content(tmp_path / "4")
    kinds = {name.partition(".")[2] for name in files}
    assert kinds == {"json", "tokens", "mask", "lengths"}  # and no parts
    prepared(web, tokenizer, tmp_path / "other", seed=4)
    assert content(tmp_path / "other") != files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "other"]


def prepare_in_a_process(web, tokenizer_path, out, options):
    prepared(web, data.load_tokenizer(tokenizer_path), out, **options)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepare_killed_anywhere_goes_on_to_the_same_bytes(web, tokenizer, tmp_path, processes):
    """Killed at random moments, with what an earlier run of another seed left lying there."""
    prepared(web, tokenizer, tmp_path / "whole")
    out = tmp_path / "out"
    rng = random.Random(processes)

    def start(**options):
        arguments = (web, tokenizer.path, out, {"processes": processes} | options)
        process = fork_context().Process(target=prepare_in_a_process, args=arguments)
        process.start()
        return process

    def kill_at(process, is_reached):
        end = time.monotonic() + 60
        while process.is_alive() and not is_reached() and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
        process.join()

    def receipts():
        return len(list(out.glob("parts/*.json")))

    def kill_at_random():
        wanted = rng.choice([1, 5, 20, 40])
        process = start()
        moment = time.monotonic() + rng.uniform(0, 0.6)
        kill_at(process, lambda: receipts() >= wanted and time.monotonic() > moment)

    kill_at(start(seed=1), lambda: receipts() >= 12)
    assert receipts() >= 12
    assert not data.is_corpus(out)
    for _ in range(8 if processes == 1 else 3):  # more processes take longer to start
        kill_at_random()
    for files in ("parts/windows.npy", "valid-*"):  # it compares, it writes what is held out
        kill_at(start(), lambda files=files: data.is_corpus(out) or list(out.glob(files)))
    if not data.is_corpus(out):
        process = start()
        process.join()
        assert process.exitcode == 0
    # and if it was killed at the very end, this tidies up
    with pytest.raises(ValueError, match="already exists"):
        prepared(web, tokenizer, out)
    assert content(out) == content(tmp_path / "whole")


def test_what_is_done_is_not_done_again_unless_it_would_differ(tmp_path, tokenizer):
    """Equal ranks cut by another pattern; another text; a file that a crash left short."""
    job = prepare.Job(0, "x", [{"text": "12345 and more text"}])
    (tmp_path / "parts").mkdir()

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("train*")}

    def encode(job=job, settings="settings"):
        """Whether anything is written."""
        before = written()
        prepare.encode_job(job, tokenizer.path, tmp_path, 0.1, 0, settings)
        return before != written()

    assert encode()
    assert not encode()
    os.truncate(tmp_path / "train-00000.mask", 3)
    assert encode()
    assert not encode()
    assert encode(settings="of a tokenizer with another pattern")
    assert encode()
    assert not encode()
    assert encode(job._replace(documents=[{"text": "12345"}]))
    assert encode(job._replace(source="y"))


HOLD = """
import data, sys, time
with data.locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(30)
"""


def test_prepare_works_alone(web, tokenizer, tmp_path):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, tmp_path / "out" / "lock"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is at work"):
            prepared(web, tokenizer, tmp_path / "out")
    finally:
        other.kill()
        other.wait()
    assert prepared(web, tokenizer, tmp_path / "out")["splits"]["train"]


@pytest.mark.parametrize("field, message", [
    ("meta.sett.name", "gives no source"),
    ("meta", "gives no source"),
    ("text", "gives more than 100"),
])
def test_a_source_field_that_names_no_sources_is_refused(web, tokenizer, tmp_path, field, message):
    with pytest.raises(ValueError, match=f"--source-field {field}: {message}"):
        prepared(web, tokenizer, tmp_path / "out", source_field=field)


def test_a_bad_line_keeps_the_shards_that_are_done(web, tokenizer, tmp_path):
    bad = tmp_path / "z.jsonl"
    bad.write_text('{"txt": 1}')
    with pytest.raises(ValueError, match="z.jsonl: holds no document; no text"):
        prepare.prepare_corpus([("slim", web), ("bad", bad)], tokenizer, tmp_path / "out", **SMALL,
                               processes=2)
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) > 3
    assert not data.is_corpus(tmp_path / "out")


def test_a_stopped_run_goes_on_with_its_own_tokenizer_only(web, tmp_path):
    """A token more that is spelled in plain text changes no id of the vocabulary, but documents."""
    bad = tmp_path / "z.jsonl"
    bad.write_text('{"txt": 1}')
    tokenizers = {}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        hugging_face_tokenizer("qwen2", tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        if name == "after":
            content = json.loads(path.read_text())
            entry = content["added_tokens"][0] | {"content": "12", "id": 500, "special": False}
            content["added_tokens"].append(entry)
            path.write_text(json.dumps(content))
        tokenizers[name] = data.load_tokenizer(path)
    assert data.fingerprint(tokenizers["before"]) == data.fingerprint(tokenizers["after"])
    with pytest.raises(ValueError, match="z.jsonl"):
        prepare.prepare_corpus([("slim", web), ("bad", bad)], tokenizers["before"],
                               tmp_path / "out", **SMALL)
    prepared(web, tokenizers["after"], tmp_path / "out")
    prepared(web, tokenizers["after"], tmp_path / "anew")
    assert content_of_shards(tmp_path / "out") == content_of_shards(tmp_path / "anew")


def content_of_shards(directory):
    return {name: part for name, part in content(directory).items() if name != "meta.json"}


def test_a_completion_goes_on_after_its_prompt(tmp_path):
    """Llama 2's kind puts a space before a text, and none within one."""
    sentencepiece_tokenizer("metaspace", tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    document = {"prompt": "the cat", "completion": "the dog"}
    tokens, mask = prepare.encode_document(document, tokenizer)
    assert tokenizer.decode_bytes(tokens.tolist()) == b" the catthe dog"
    assert tokenizer.decode_bytes(tokens[mask].tolist()) == b"the dog"


WORKERS = """
import os, signal, sys, time
from pathlib import Path
from tools.prepare import in_order, workers

def job(seconds):
    time.sleep(seconds)
    return os.getpid()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with workers(2) as pool:
        if sys.argv[1] == "die":
            list(in_order(pool, 4, die, [()]))
        print(*set(in_order(pool, 4, job, [(0.3,)] * 4)), flush=True)
        time.sleep(60)
"""


def start_workers(tmp_path, argument):
    (tmp_path / "program.py").write_text(WORKERS)
    command = [sys.executable, tmp_path / "program.py", argument]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Else they wait for ever for their next job."""
    process = start_workers(tmp_path, "wait")
    numbers = process.stdout.readline().split()
    assert len(numbers) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(Path("/proc", number).exists() for number in numbers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path("/proc", number).exists() for number in numbers)


def test_a_killed_worker_is_one_clear_line(tmp_path):
    process = start_workers(tmp_path, "die")
    _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert last.startswith("OSError: a worker process was killed (too little memory?)")


# ----------------------------------------------------------------------------------- command line


def test_command_line_prepares_a_corpus_and_prints_its_lengths(tmp_path, tokenizer, capsys):
    folder = write_text_files(tmp_path / "text", 40)
    prepare.main(["--source", f"numbers={folder}", "--tokenizer", str(tokenizer.path),
                  "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    assert re.search(r"numbers +[\d.]+% ", printed)
    splits = json.loads((tmp_path / "c" / "meta.json").read_text())["splits"]
    [train] = splits["train"]
    [valid] = splits["valid"]
    assert train["documents"] + valid["documents"] == 40
    assert f"train: {train['documents']} documents" in printed


@pytest.mark.parametrize("arguments, message", [
    ("--source text --tokenizer t --out o", "--source text: write it as NAME=PATH"),
    ("--source a=missing --tokenizer t --out o", "--source missing"),
    ("--source a=text --tokenizer missing --out o", "--tokenizer missing"),
    ("--source a=text --tokenizer t --out text", "already exists"),
    ("--source a=text --tokenizer t --out o --processes 0",
     "--processes 0 must be a whole number, 1 or more"),
    ("--source a=text --tokenizer t --out o --holdout 2",
     "--holdout 2 must be a number from 0 to 1"),
    ("--source a=text --tokenizer t --out o --holdout 1", "leaves no training documents"),
    ("--source a=text --tokenizer t --out o --tokens 9", "unrecognized arguments: --tokens 9"),
])
def test_a_users_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_text_files(tmp_path / "text", 3)
    train_bpe([TRAINING_TEXT], 300, "t")
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments.split())
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "text"]
