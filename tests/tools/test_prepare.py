"""tools.prepare: what is held out, the same bytes however it was made, up-sampling by length."""
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from processes import fork_context
from texts import TRAINING_TEXT

import data
from tools import prepare
from tools.train_tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 12"},
                {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "So long 👋"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([TRAINING_TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


# ---------------------------------------------------------------------------------------------------------- corpus


def write_text_files(folder, count=60, seed=0, words=80):
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.py").write_text(" ".join(f"name{rng.randrange(10**5)}" for _ in range(words)))
    return folder


def read_back(directory, split, tokenizer):
    """Documents as (tokens, mask), from the files alone."""
    dataset = data.PackedDataset(directory, split, 8, 0, "none")
    return [(dataset.tokens[s][a:a + n].copy(), dataset.masks[s][a:a + n].copy())
            for s, a, n in zip(dataset.shards, dataset.starts, dataset.lengths)]


def test_loss_masks_of_the_three_kinds_of_document(tmp_path, tokenizer):
    lines = [{"text": "all of it"}, {"prompt": "question ", "completion": "answer"}, {"messages": CONVERSATION}, {"text": ""}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    meta = prepare.prepare_corpus([("x", tmp_path / "d.jsonl")], tokenizer, tmp_path / "out", holdout=0)
    documents = read_back(tmp_path / "out", "train", tokenizer)
    carried = [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in documents]
    assert carried == ["all of it", "answer", "Hello.<|eot_id|>So long 👋<|eot_id|>"]
    assert tokenizer.decode(documents[1][0].tolist()) == "question answer"
    assert meta["splits"]["train"]["documents"] == 3  # the empty one is left out


def test_ids_above_65535_survive(tmp_path):
    """uint16 storage wraps silently for Llama 3's 128,256 ids."""
    ranks = {bytes([b]): b for b in range(256)} | {b"%06d" % i: i for i in range(256, 128_000)}
    large = data.Tokenizer("large", data.LLAMA3, ranks, {})
    ids = [65_535, 65_536, 127_999, 0]
    prepare.write_corpus({"train": [("x", ids, None)]}, tmp_path / "out", large)
    assert data.PackedDataset(tmp_path / "out", "train", 3, 0, "none").sequence(0)[0].tolist() == ids
    with pytest.raises(ValueError, match="ids must be 0 to 127999"):
        prepare.write_corpus({"train": [("x", [128_000], None)]}, tmp_path / "out2", large)


def test_holdout_is_by_content_whatever_the_order_and_copies_share_a_side(tmp_path, tokenizer):
    texts = [f"document {i} " + "word " * i for i in range(60)]
    sides = []
    for order, lines in (("a", texts), ("b", [*texts[::-1], *texts])):
        (tmp_path / f"{order}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
        prepare.prepare_corpus([("x", tmp_path / f"{order}.jsonl")], tokenizer, tmp_path / order, 0.3, holdout_window=0)
        sides.append([{tokenizer.decode(tokens.tolist()) for tokens, _ in read_back(tmp_path / order, split, tokenizer)}
                      for split in ("train", "valid")])
    assert sides[0] == sides[1] and not sides[0][0] & sides[0][1] and sides[0][0] | sides[0][1] == set(texts)
    assert 5 <= len(sides[0][1]) <= 30
    prepare.prepare_corpus([("x", tmp_path / "a.jsonl")], tokenizer, tmp_path / "c", 0.3, 0, seed=1)
    assert len(read_back(tmp_path / "c", "valid", tokenizer)) != len(sides[0][1]) or {
        tokenizer.decode(tokens.tolist()) for tokens, _ in read_back(tmp_path / "c", "valid", tokenizer)} != sides[0][1]


def test_windows_shared_with_training_documents_are_cut_out_of_held_out_ones(tmp_path, tokenizer):
    """A licence header in every file would otherwise be measured as held-out text."""
    rng = random.Random(1)
    licence = " ".join(str(rng.randrange(10**6)) for _ in range(40))
    folder = write_text_files(tmp_path / "text", words=120)
    for i, path in enumerate(sorted(folder.iterdir())):
        own = path.read_text()
        path.write_text(own[:300] + "\n" + licence + "\n" + own[300:] if i % 2 else own)
    prepare.prepare_corpus([("x", folder)], tokenizer, tmp_path / "out", 0.3, holdout_window=48)
    prepare.prepare_corpus([("x", folder)], tokenizer, tmp_path / "uncut", 0.3, holdout_window=0)
    def windows(documents):
        return {tuple(t[i:i + 48].tolist()) for t, _ in documents for i in range(len(t) - 47)}
    train, valid, uncut = (read_back(tmp_path / d, s, tokenizer) for d, s in (
        ("out", "train"), ("out", "valid"), ("uncut", "valid")))
    assert windows(uncut) & windows(train) and not windows(valid) & windows(train)
    assert min(len(tokens) for tokens, _ in valid) >= 48
    lost = sum(len(t) for t, _ in uncut) - sum(len(t) for t, _ in valid)
    assert 0 < lost < 0.6 * sum(len(t) for t, _ in uncut)  # the documents' own text is kept
    assert windows(valid) <= windows(uncut)


def test_exactly_the_shared_tokens_are_cut_and_short_remainders_dropped():
    held_out = ("x", np.arange(100, dtype=np.uint32), np.arange(100) < 90)
    training = np.array([7, *range(20, 33), 8, *range(38, 47), *range(60, 70), 9], dtype=np.uint32)
    shared = np.intersect1d(prepare.window_hashes(held_out[1], 10), prepare.window_hashes(training, 10))
    assert len(shared) == 5
    pieces = [tokens.tolist() for _, tokens, _ in prepare.cut_shared_windows(*held_out, 10, shared)]
    assert pieces == [list(range(20)), list(range(33, 60)), list(range(70, 100))]
    short = [tokens.tolist() for _, tokens, _ in prepare.cut_shared_windows("x", held_out[1][12:80], held_out[2][12:80], 10, shared)]
    assert short == [list(range(33, 60)), list(range(70, 80))]  # 12 to 19 is too short to keep
    silent = ("x", held_out[1], np.arange(100) < 60)  # the last piece has no token with loss
    assert [tokens[0] for _, tokens, _ in prepare.cut_shared_windows(*silent, 10, shared)] == [0, 33]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 48, 64])
def test_window_hashes_tell_windows_apart_and_find_equal_ones(window):
    tokens = np.random.default_rng(0).integers(0, 3, 3000).astype(np.uint32)
    hashes = prepare.window_hashes(tokens, window)
    expected = [tuple(tokens[i:i + window].tolist()) for i in range(len(tokens) - window + 1)]
    assert len(hashes) == len(expected)
    assert len(set(zip(hashes.tolist(), expected))) == len(set(expected)) == len(set(hashes.tolist()))


def test_an_interrupted_prepare_leaves_nothing(tmp_path, tokenizer):
    def documents():
        yield "x", [1, 2, 3], None
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare.write_corpus({"train": documents()}, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_prepare_leaves_no_corpus_and_does_not_block_the_next(tmp_path, tokenizer):
    train_bpe([TRAINING_TEXT], 300, tmp_path / "tokenizer")
    code = ("import os, signal\n"
            "from data import load_tokenizer\n"
            "from tools.prepare import write_corpus\n"
            "def documents():\n"
            "    yield 'x', [1, 2, 3], None\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_corpus({'train': documents()}, 'out', load_tokenizer('tokenizer'))\n")
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    prepare.write_corpus({"train": [("x", [4], None)]}, tmp_path / "out", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_a_full_disk_is_one_line_with_the_path_and_leaves_nothing(tmp_path, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # like a full disk, for this process only
    try:
        with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'out'))}: not written") as caught:
            prepare.write_corpus({"train": [("x", [5] * 9000, None)]}, tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_prepare_refuses_before_it_reads(tmp_path, tokenizer):
    folder = write_text_files(tmp_path / "text", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("keep me")
    (tmp_path / "empty").mkdir()
    for sources, out, options, message in (
            ([("x", folder)], "full", {}, "already exists"), ([("x", folder)], "o", {"holdout": 1.5}, "holdout 1.5"),
            ([("x", folder), ("x", folder)], "o", {}, "names must differ"), ([("x", tmp_path / "no")], "o", {}, "no such file"),
            ([("x", tmp_path / "empty")], "o", {}, "no training documents")):
        with pytest.raises((ValueError, OSError), match=message):
            prepare.prepare_corpus(sources, tokenizer, tmp_path / out, **options)
    assert (tmp_path / "full" / "file").read_text() == "keep me" and not (tmp_path / "o").exists()


def test_shards_are_cut_between_documents(tmp_path, tokenizer):
    documents = [("x", [i] * n, [i % 2 == 0] * n) for i, n in enumerate([30, 50, 40, 150, 10, 90])]
    meta = prepare.write_corpus({"train": documents}, tmp_path / "out", tokenizer, shard_tokens=100)
    assert meta["splits"]["train"]["shards"] == [80, 40, 150, 100]
    assert [(t.tolist(), m.tolist()) for t, m in read_back(tmp_path / "out", "train", tokenizer)] == [
        (tokens, mask) for _, tokens, mask in documents]


# --------------------------------------------------------------------------------------------- length up-sampling


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Two JSON-lines files of 700 documents, sources "web" and "books" by a field, lengths from 20 to 20,000 characters."""
    place, rng = tmp_path_factory.mktemp("web"), random.Random(5)
    for name in ("a.jsonl", "b.jsonl.gz"):
        lines = []
        for _ in range(350):
            source = rng.choice(["web", "web", "books"])
            words = int(2 ** rng.uniform(2, 9.5 if source == "books" else 8))
            text = " ".join(f"{rng.randrange(10**4)}" for _ in range(words))
            lines.append(json.dumps({"text": text, "meta": {"set": {"name": source}}}))
        content = "\n".join(lines).encode()
        (place / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return place
UPSAMPLED = {"source_field": "meta.set.name", "holdout_window": 16, "short": 100, "long": 500, "short_weight": 0.4, "long_weight": 2.5}


def prepared(web, tokenizer, out, **options):
    return prepare.prepare_corpus([("slim", web)], tokenizer, out, **UPSAMPLED | options)


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_token_shares_by_length_and_source_are_what_the_weights_ask(web, tokenizer, tmp_path, monkeypatch):
    """Up-sampling by the documents drawn, not their tokens; a budget filled from the head of the files; sources that drift."""
    monkeypatch.setattr(prepare, "EDGES", [0, 100, 500, 2**62])
    everything = prepared(web, tokenizer, tmp_path / "all", short_weight=1.0, long_weight=1.0)["splits"]["train"]["tokens"]
    for budget in (everything // 3, everything // 9 * 8, None):
        meta = prepared(web, tokenizer, tmp_path / str(budget), budget=budget)
        written = meta["splits"]["train"]["tokens"]
        assert written == budget or budget is None and abs(written / everything - 1) < 0.01
        sources = meta["lengths"]["sources"]
        assert set(sources) == {"slim/web", "slim/books"}
        for rows in sources.values():  # proportions of sources are kept
            assert sum(rows["asked"]) == pytest.approx(sum(rows["tokens"]) / everything * (budget or everything), rel=1e-3)
            assert abs(sum(rows["written"]) - sum(rows["asked"])) <= (3 if budget else 600)
            expected = np.array(rows["tokens"]) * [0.4, 1, 2.5]
            for measured, asked, own in zip(rows["written"], rows["asked"], expected / expected.sum()):
                assert abs(asked / sum(rows["asked"]) - own) < 1e-3
                assert abs(measured / written - own * sum(rows["tokens"]) / everything) < 0.01


def test_long_documents_may_be_left_out(web, tokenizer, tmp_path):
    """A check of the options that takes one weight of 0 for all."""
    prepared(web, tokenizer, tmp_path / "out", long_weight=0.0)
    assert np.diff(np.load(tmp_path / "out" / "train-offsets.npy")).max() <= 500  # UPSAMPLED's border of long documents


def test_no_document_occurs_more_often_than_its_weight(web, tokenizer, tmp_path):
    once = prepared(web, tokenizer, tmp_path / "once", short_weight=1.0, long_weight=1.0, holdout=0)
    assert once["splits"]["train"]["documents"] == 700
    meta = prepared(web, tokenizer, tmp_path / "out", holdout=0)
    dataset = data.PackedDataset(tmp_path / "once", "train", 8, 0, "none")
    weights = data.length_weights(dataset.lengths, np.load(tmp_path / "once" / "train-sources.npy"), 100, 500, 0.4, 2.5)
    whole = [tokens.tobytes() for tokens, _ in read_back(tmp_path / "once", "train", tokenizer)]
    count = Counter(tokens.tobytes() for tokens, _ in read_back(tmp_path / "out", "train", tokenizer))
    assert set(count) <= set(whole) and len(set(whole)) == 700 and weights.max() > 1.2
    for tokens, weight in zip(whole, weights):
        assert int(weight) <= count[tokens] <= np.ceil(weight)
    most = meta["splits"]["train"]["tokens"]
    with pytest.raises(ValueError, match=rf"--tokens {2 * most} is more than .* give, \d+"):
        prepared(web, tokenizer, tmp_path / "more", holdout=0, budget=2 * most)


def test_any_number_of_processes_writes_the_same_bytes(web, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 10_000)
    for processes in (1, 4):
        prepared(web, tokenizer, tmp_path / str(processes), processes=processes, budget=100_000, seed=3)
    assert content(tmp_path / "1") == content(tmp_path / "4")
    other = prepared(web, tokenizer, tmp_path / "other", budget=100_000, seed=4)
    assert other["splits"]["train"]["tokens"] == 100_000 and content(tmp_path / "other") != content(tmp_path / "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "other"]  # no parts are left


def prepare_in_small_parts(arguments, options):
    prepare.PART_BYTES = 10_000
    prepare.prepare_corpus(*arguments, **options)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prepare_killed_anywhere_goes_on_to_the_same_bytes(web, tokenizer, tmp_path, monkeypatch, processes):
    """Killed while it tokenises, compares and writes, and every time after something more is done."""
    monkeypatch.setattr(prepare, "PART_BYTES", 10_000)
    prepared(web, tokenizer, tmp_path / "whole", budget=100_000)
    parts, whole = tmp_path / "out.parts", 29

    def done():
        return len(list(parts.glob("*.safetensors")))

    moments = {"tokenises": lambda: done() >= 4, "still does": lambda: done() >= 15, "has done so": lambda: done() == whole,
               "compares": (parts / "held_out_windows.npy").exists, "writes": (tmp_path / "out.partial").exists, "never": lambda: False}
    if processes > 1:  # each start takes seconds
        del moments["tokenises"], moments["has done so"], moments["compares"]
    counts = []
    for when, is_reached in moments.items():
        process = fork_context().Process(target=prepare_in_small_parts, args=(
            ([("slim", web)], tokenizer, tmp_path / "out"), {"budget": 100_000, "processes": processes} | UPSAMPLED))
        process.start()
        end = time.monotonic() + 120
        while process.is_alive() and not is_reached() and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == (0 if when == "never" else -signal.SIGKILL)
        assert (tmp_path / "out").exists() == (when == "never")
        counts.append(done())
    assert 4 <= counts[0] <= counts[-3] <= whole == counts[-2] and counts[-1] == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_copies_at_the_border_of_the_cap_are_held_out_together():
    lengths = np.array([100, 100, 50, 50])
    for hashes, most, kept in (([5, 5, 2**60, 2**62], 10, 2), ([5, 5, 5, 5], 120, 4), ([5, 9, 9, 9], 160, 1), ([1, 2, 3, 4], 260, 3)):
        hashes = np.array(hashes, np.uint64)
        share = prepare.capped_holdout(lengths, hashes, 0.5, most)
        assert (hashes < share * 2**64).sum() == kept


def test_a_part_is_used_again_only_for_the_same_tokenizer_and_if_it_is_whole(tmp_path, tokenizer):
    """Equal ranks cut by another pattern; a file that a crash left short."""
    raws = [data.Raw("x", b"12345 and more text", False)]
    arguments = ["x", None, 0]
    path, encoded = prepare.encode_part(raws, *arguments, tokenizer, tmp_path, "a")
    assert encoded and prepare.encode_part(raws, *arguments, tokenizer, tmp_path, "a") == (path, 0)
    os.truncate(path, 100)
    assert prepare.encode_part(raws, *arguments, tokenizer, tmp_path, "a") == (path, encoded)
    other = data.Tokenizer("other", data.LLAMA3.replace("{1,3}", ""), tokenizer._mergeable_ranks, tokenizer._special_tokens,
                           path=tokenizer.path)
    (tmp_path / "d.txt").write_text("12345 and more text")
    with prepare.workers(1) as pool:
        made = [prepare.encode_sources([("x", tmp_path / "d.txt")], None, 0, each, tmp_path, pool, 1)[0] for each in (tokenizer, other)]
    assert made[0] != made[1]


def test_prepare_touches_no_folder_but_its_own_and_works_alone(web, tokenizer, tmp_path):
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="has notes.txt, which prepare did not write"):
        prepared(web, tokenizer, tmp_path / "out")
    assert (tmp_path / "out.parts" / "notes.txt").read_text() == "precious"
    (tmp_path / "more.parts").mkdir()
    hold = ("import data, sys, time\nwith data.locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(30)\n")
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "more.parts" / "lock"], stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is at work"):
            prepared(web, tokenizer, tmp_path / "more")
    finally:
        other.kill()
        other.wait()
    assert prepared(web, tokenizer, tmp_path / "more")["splits"]["train"]["documents"]


@pytest.mark.parametrize("field", ["meta.sett.name", "meta", "text"])
def test_a_source_field_that_names_no_sources_is_refused(web, tokenizer, tmp_path, field, monkeypatch):
    if field == "text":  # one a document
        monkeypatch.setattr(prepare, "MOST_SOURCES", 100)
    with pytest.raises(ValueError, match=f"--source-field {field}: gives"):
        prepared(web, tokenizer, tmp_path / "out", source_field=field)


def test_held_out_tokens_are_capped_and_still_chosen_by_content(web, tokenizer, tmp_path):
    wide, narrow = (prepared(web, tokenizer, tmp_path / str(most), holdout=0.3, holdout_window=0, holdout_tokens=most)
                    for most in (10**9, 20_000))
    sides = [[{t.tobytes() for t, _ in read_back(tmp_path / str(most), split, tokenizer)} for split in ("train", "valid")]
             for most in (10**9, 20_000)]
    assert wide["splits"]["valid"]["tokens"] > 40_000 and 10_000 < narrow["splits"]["valid"]["tokens"] <= 20_000
    assert sides[1][1] < sides[0][1] and not sides[1][0] & sides[1][1] and narrow["holdout"] < wide["holdout"] == 0.3


def test_a_bad_line_keeps_the_parts_that_are_done(web, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 10_000)
    bad = tmp_path / "z.jsonl"
    bad.write_text('{"txt": 1}')
    with pytest.raises(ValueError, match="z.jsonl, line 1: needs an object"):
        prepare.prepare_corpus([("slim", web), ("bad", bad)], tokenizer, tmp_path / "out", source_field="meta.set.name", processes=2)
    assert len(list((tmp_path / "out.parts").iterdir())) > 3 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- command line


def test_command_line_prepares_a_corpus_and_prints_its_lengths(tmp_path, tokenizer, capsys):
    folder = write_text_files(tmp_path / "text", 40)
    prepare.main(["--source", f"numbers={folder}", "--tokenizer", str(tokenizer.path), "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    assert "numbers" in printed and "100.0%" in printed
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    assert meta["splits"]["train"]["documents"] + meta["splits"]["valid"]["documents"] == 40
    assert f"train: {meta['splits']['train']['documents']} documents" in printed


@pytest.mark.parametrize("arguments, message", [
    ("--source text --tokenizer t --out o", "NAME=PATH"),
    ("--source a=missing --tokenizer t --out o", "--source missing"),
    ("--source a=text --tokenizer missing --out o", "missing"),
    ("--source a=text --tokenizer t --out text", "already exists"),
    ("--source a=text --tokenizer t --out o --holdout 2", "holdout 2.0")])
def test_a_users_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_text_files(tmp_path / "text", 3)
    train_bpe([TRAINING_TEXT], 300, "t")
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments.split())
    assert str(caught.value).startswith("error: ") and message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "text"]
