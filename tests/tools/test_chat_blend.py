"""tools.chat_blend: every step drops what it should, nothing else, and says why."""
import gzip
import itertools
import json
import random
import re
import string
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import data
from sft import ChatDataset, encode_chat
from tools import chat_blend
from tools.train_tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = []
for i in range(3000):
    letters = random.Random(i).choices(string.ascii_lowercase, k=3 + i % 7)
    WORDS.append("".join(letters))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)], 300, folder)
    return folder


def prose(seed, words=60):
    return " ".join(random.Random(f"prose {seed}").choices(WORDS, k=words))


def chat(*contents, system=None):
    """A record: what user and assistant say in turns."""
    messages = []
    if system:
        messages.append({"role": "system", "content": system})
    for role, content in zip(itertools.cycle(("user", "assistant")), contents):
        messages.append({"role": role, "content": content})
    return {"messages": messages}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def blend(tokenizer, out, sources, *options):
    """(train, dropped, report) of a run."""
    chat_blend.main(["--source", *sources, "--tokenizer", str(tokenizer), "--out", str(out),
                     *map(str, options)])
    report = json.loads((out / "report.json").read_text())
    return read_lines(out / "train.jsonl"), read_lines(out / "dropped.jsonl"), report


def kept_and_dropped(tmp_path, tokenizer, records, *options):
    """Line numbers from 1 of the records that stay, and {line number: what dropped.jsonl says} of
    the others."""
    path = write_lines(tmp_path / "samples.jsonl", records)
    train, dropped, _ = blend(tokenizer, tmp_path / "out", [f"general={path}"], *options)
    reasons = {row["record"]: row for row in dropped}
    kept = [i for i in range(1, len(records) + 1) if i not in reasons]
    written = [json.dumps(row["messages"]) for row in train]
    expected = [json.dumps(records[i - 1]["messages"]) for i in kept]
    assert sorted(written) == sorted(expected)
    return kept, reasons


def failure(*arguments):
    with pytest.raises(SystemExit) as caught:
        chat_blend.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------- reading and cleaning


def test_unusable_records_are_counted_with_their_reason_and_never_a_crash(tmp_path, tokenizer):
    records = [
        chat("q", "a"),
        7,
        None,
        ["x"],
        {},
        {"messages": "x"},
        {"messages": [7]},
        {"messages": []},
        chat("q", None),
        chat("q", ["x"]),
        {"messages": [{"role": None, "content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{}]},
        {"instruction": 5, "input": "x", "output": "y"},
        {"query": "q", "response": None},
        chat("q \ud800", "lone surrogate"),
    ]
    path = write_lines(tmp_path / "s.jsonl", records)
    train, dropped, report = blend(tokenizer, tmp_path / "out", [f"general={path}"])
    assert len(train) == 2
    assert [row["record"] for row in dropped] == list(range(2, 16))
    expected = {"not a chat record": 4, "content is not text": 4, "turns that cannot be read": 2,
                "unknown role None": 2, "unknown role ['user']": 1, "no answer to a user": 1}
    assert Counter(row["reason"] for row in dropped) == expected
    assert report["files"][str(path)]["dropped"] == expected


def test_kinds_of_files_and_directories(tmp_path, tokenizer):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps([chat("in a list", "yes")], indent=2))
    lines = [json.dumps(chat("first", "line")), "", "", json.dumps(chat("fourth", "line"))]
    (folder / "b.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "deep" / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps(chat("gzip", "yes")))
    (folder / "README.md").write_text("not data")
    (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    rows = pyarrow.Table.from_pylist([chat("parquet", "yes")])
    pyarrow.parquet.write_table(rows, folder / "train-00000.parquet")
    train, dropped, report = blend(tokenizer, tmp_path / "out", [f"general={folder}"])
    assert {(row["messages"][0]["content"], row["source"]) for row in train} == {
        ("in a list", "a.json"),
        ("first", "b.jsonl"),
        ("fourth", "b.jsonl"),
        ("gzip", "c.jsonl.gz"),
        ("parquet", "train-00000.parquet"),
    }
    read = {Path(name).name: entry["read"] for name, entry in report["files"].items()}
    assert read == {"a.json": 1, "b.jsonl": 2, "c.jsonl.gz": 1, "dataset_infos.json": 1,
                    "train-00000.parquet": 1}
    [line] = report["passed_over"]
    assert line.endswith(f"1 .md (the first: {folder}/README.md)")
    assert dropped == [{"file": str(folder / "dataset_infos.json"), "record": 1,
                        "reason": "not a chat record"}]


def test_weights_and_ignored_keys_reach_the_file(tmp_path, tokenizer):
    record = chat("q", "wrong", "q2", "right")
    record["messages"][1]["train"] = False
    path = write_lines(tmp_path / "s.jsonl", [record | {"mood": "glad"}])
    message = failure("--source", f"a={path}", "--tokenizer", tokenizer, "--out", tmp_path / "o")
    assert f"1 not understood: mood ({path}, line 1, keys: messages mood)" in message
    record["messages"].append({"role": "user", "content": "never answered"})
    path = write_lines(tmp_path / "s.jsonl", [record | {"mood": "glad"}])
    (row,), _, report = blend(tokenizer, tmp_path / "out", [f"a={path}"], "--ignore", "mood")
    assert report["turns_cut_off"] == 1
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]
    assert report["settings"]["ignore"] == ["mood"]
    dataset = ChatDataset(tmp_path / "out/train.jsonl", data.load_tokenizer(tokenizer), 512, seed=0)
    tokens, mask = dataset.samples[0]
    learned = data.load_tokenizer(tokenizer).decode(tokens[mask].tolist())
    assert learned == "right<|eot_id|>"
    assert report["categories"]["a"]["loss_tokens"] == mask.sum()


def test_system_message_is_for_samples_without_one(tmp_path, tokenizer):
    records = [chat("one", "a"), chat("two", "b", system="own"), chat("three", "c", system=" ")]
    path = write_lines(tmp_path / "s.jsonl", records)
    train, _, _ = blend(tokenizer, tmp_path / "out", [f"general={path}"], "--system", "Be brief.")
    said = {row["messages"][1]["content"]: row["messages"][0]["content"] for row in train}
    assert said == {"one": "Be brief.", "two": "own", "three": "Be brief."}


def test_samples_at_the_limit_stay_and_those_above_it_go(tmp_path, tokenizer):
    records = [chat(prose(i, 10 + i), prose(-i, 10)) for i in range(20)]
    lengths = [len(encode_chat(r["messages"], data.load_tokenizer(tokenizer))[0]) for r in records]
    limit = sorted(lengths)[10]
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, records, "--max-tokens", limit)
    assert kept == [i for i, n in enumerate(lengths, 1) if n <= limit]
    assert 0 < len(reasons) < 20
    for i, row in reasons.items():
        assert row["reason"] == "too long"
        assert row["tokens"] == lengths[i - 1]


# ------------------------------------------------------------------------------------- duplicates


def test_copies_are_dropped_in_any_case_spacing_and_punctuation(tmp_path, tokenizer):
    """Whatever their system message."""
    records = [
        chat("What is it?", "A ﬁsh, of course"),
        chat("what is it", "a FISH of course!"),
        chat("W hat\nis it?", "Afish, ofcourse"),
        chat("What is it?", "A ﬁsh, of course", system="s"),
        chat("What is it?", "A fish, of course not"),
        chat("What is", "it? A fish, of course"),
        chat("1 + 1", "+"),
        chat("1 + 1", "-"),
    ]
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, records)
    assert kept == [1, 5, 6, 7, 8]
    for row in reasons.values():
        assert row["reason"] == "copy"
        assert row["repeats_record"] == 1
        assert Path(row["repeats_file"]).name == "samples.jsonl"


def changed(text, rng, words):
    parts = text.split()
    for i in rng.sample(range(len(parts)), words):
        parts[i] = rng.choice(WORDS)
    return " ".join(parts)


def test_near_copies_are_exactly_those_of_a_comparison_of_all_pairs(tmp_path, tokenizer):
    """From one changed word to half of them: what banding misses or verification lets through
    differs from all pairs."""
    rng = random.Random(0)
    records = []
    for i in range(40):
        text = prose(i, 200)
        records.append(chat(f"question {i}", text))
        for n in (1, 2, 3, 5, 9, 50):
            records.append(chat(f"question {i}", changed(text, rng, n)))
    rng.shuffle(records)

    def shingles(record):
        """All runs of twenty letters and digits."""
        lines = [re.sub("[^a-z0-9]", "", m["content"]) for m in record["messages"]]
        return {line[k:k + 20] for line in lines for k in range(len(line) - 19)}

    def jaccard(own, other):
        return len(own & other) / len(own | other)

    sets = [shingles(record) for record in records]
    stay = []
    for i, own in enumerate(sets):
        if not any(jaccard(own, sets[j]) >= 0.8 for j in stay):
            stay.append(i)
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, records)
    assert kept == [i + 1 for i in stay]
    assert 80 < len(reasons) < 180
    for i, row in reasons.items():
        assert row["reason"] == "near copy"
        similarity = jaccard(sets[i - 1], sets[row["repeats_record"] - 1])
        assert row["similarity"] == round(similarity, 3) >= 0.8


def test_one_changed_word_is_found_at_any_threshold_and_0_is_off(tmp_path, tokenizer):
    long = prose(1, 300)
    records = [chat("q", long), chat("q", changed(long, random.Random(3), 1))]
    records += [chat(f"q{i}", prose(100 + i, 300)) for i in range(5)]

    def kept_at(threshold):
        folder = tmp_path / str(threshold)
        folder.mkdir()
        kept, _ = kept_and_dropped(folder, tokenizer, records, "--near-duplicate", threshold)
        return kept

    for threshold in (0.5, 0.8, 0.9):
        assert kept_at(threshold) == [1, 3, 4, 5, 6, 7]
    assert kept_at(0) == [1, 2, 3, 4, 5, 6, 7]


def test_near_copies_are_found_among_hundreds_that_share_a_long_instruction(tmp_path, tokenizer):
    """Buckets are full of them, and the similarity of all pairs is just below the threshold's
    margin."""
    lead = prose("instruction", 150)
    records = [chat(lead, prose(f"own {i}", 50)) for i in range(300)]
    copies = []
    for i in range(0, 300, 10):
        answer = records[i]["messages"][1]["content"]
        copies.append(chat(lead, changed(answer, random.Random(i), 1)))
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, records + copies)
    assert kept == list(range(1, 301))
    assert [row["repeats_record"] for row in reasons.values()] == list(range(1, 301, 10))


def test_without_datasketch_one_line_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_blend.importlib.util, "find_spec", lambda name: None)
    path = write_lines(tmp_path / "samples.jsonl", [chat("q", "a")])
    options = ("--source", f"a={path}", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    message = "--near-duplicate needs datasketch: pip install -r requirements-dev.txt"
    assert message in failure(*options)
    chat_blend.main([*map(str, options), "--near-duplicate", "0"])


def test_minhash_values_agree_as_often_as_the_similarity():
    rng = random.Random(1)
    for n in (1, 4, 12):
        text = prose(n, 150)
        texts = [chat_blend.normalise(text), chat_blend.normalise(changed(text, rng, n))]
        samples = [chat_blend.Sample(None, None, 0, [], text) for text in texts]
        first, second = chat_blend.minhash(samples, 4000)
        similarity = chat_blend.jaccard(*map(chat_blend.shingles, texts))
        assert abs((first == second).mean() - similarity) < 0.03


# -------------------------------------------------------------------------------- decontamination


def item(i):
    """A benchmark record: nested strings, the longer ones of well over 50 letters."""
    choices = [prose(f"choice {i} {k}", 14) for k in range(3)]
    question = f"Problem {prose(f'item {i}', 25)}?"
    return {"id": i, "question": question, "more": {"choices": choices}}


def respaced(text, rng):
    return "".join(c + rng.choice(["", "", "", " ", "\n", "  ", "-"]) for c in text)


def full_width(text, rng):
    return "".join(chr(ord(c) + 0xfee0) if c.isalnum() else c for c in text)


def inside_a_message(text, rng):
    return f"{prose(rng.random())} {text} {prose(rng.random())}"


DISGUISES = {
    "verbatim": lambda text, rng: text,
    "upper case": lambda text, rng: text.upper(),
    "title": lambda text, rng: text.title(),
    "doubled spaces": lambda text, rng: text.replace(" ", "  "),
    "new lines": lambda text, rng: text.replace(" ", "\n"),
    "spaces inside words": respaced,
    "no spaces": lambda text, rng: text.replace(" ", ""),
    "punctuation": lambda text, rng: text.replace(" ", ", ") + "!!",
    "full width": full_width,
    "bold letters": lambda text, rng: f"**{text}**",
    "inside a longer message": inside_a_message,
}


def test_every_planted_item_is_found_and_every_clean_sample_stays(tmp_path, tokenizer):
    """Hard negatives: on the topic of an item, with half of its words in order, and with all of its
    words in another."""
    rng = random.Random(0)
    bench = write_lines(tmp_path / "bench.jsonl", [item(i) for i in range(40)])
    planted = []
    clean = [chat(prose(f"clean {i}", 40), prose(f"clean answer {i}", 40)) for i in range(100)]
    for i, disguise in enumerate(DISGUISES.values()):
        for part in (item(i)["question"], item(i)["more"]["choices"][2]):
            copy = disguise(part, rng)
            planted.append(chat(f"{copy} {i}", prose(rng.random())))
            planted.append(chat(prose(rng.random()), copy))
            planted.append(chat(prose(rng.random()), "no", copy, "no"))
    for i in range(11, 40):
        words = item(i)["question"].split()
        clean.append(chat(" ".join(words[:4]) + " " + prose(f"negative {i}", 20), "a"))
        clean.append(chat(" ".join(words[0:24:2] + words[1:24:2]), "b"))
    records = planted + clean
    order = rng.sample(range(len(records)), len(records))
    options = ("--benchmark", bench, "--near-duplicate", 0)
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, [records[i] for i in order], *options)
    assert len(planted) == 66
    assert {order[i - 1] for i in reasons} == set(range(66))
    assert len(kept) == len(clean) == 158
    for i, row in reasons.items():
        assert row["reason"] == "contaminated"
        assert row["benchmark"] == str(bench)
        assert len(row["excerpt"]) == 50
        assert row["item"] == order[i - 1] // 6 + 1
        texts = chat_blend.strings(item(row["item"] - 1))
        assert row["excerpt"] in "\n".join(map(chat_blend.normalise, texts))


def test_a_window_to_the_letter_is_too_much_and_one_letter_less_is_not(tmp_path, tokenizer):
    text = prose("item", 40).replace(" ", "")
    bench = write_lines(tmp_path / "bench.jsonl", [{"text": text}])
    records = [chat(f"9 {text[7:7 + n]} 9", f"answer {n}") for n in (47, 48, 49, 50, 51)]
    records += [chat(text[:45] + "9", "9" + text[45:90]),
                chat(text[:30], text[30:60]),  # cut in two
                chat("hello", "again", system=text)]
    options = ("--benchmark", bench, "--near-duplicate", 0)
    kept, _ = kept_and_dropped(tmp_path, tokenizer, records, *options)
    assert kept == [1, 2, 3, 6, 7, 8]
    (tmp_path / "30").mkdir()
    kept, _ = kept_and_dropped(tmp_path / "30", tokenizer, records, *options, "--window", 30)
    assert kept == [8]


def test_boilerplate_of_many_records_is_ignored_but_not_what_follows_it(tmp_path, tokenizer):
    lead = ("Answer the following multiple choice question with the letter of the right choice, "
            "and say why you chose it: ")
    for count, expected in ((10, [5]), (11, [1, 2, 5])):
        folder = tmp_path / str(count)
        folder.mkdir()
        brief = prose("brief", 30).replace(" ", "")[:35]  # less than a window, but most of one
        items = [{"prompt": lead + brief, "again": lead}]
        for i in range(1, count):
            items.append({"prompt": lead + prose(f"item {i}", 30), "again": lead})
        bench = write_lines(folder / "bench.jsonl", items)
        # the start of an item by chance: with the lead more than a window
        few = prose("item 3", 30).replace(" ", "")[:20]
        records = [
            chat(lead + prose("other", 30), "a"),
            chat(lead + few + " 999 " + prose("another", 20), "b"),
            chat(lead + prose("item 3", 30), "c"),
            chat(prose("item 4", 30), "d"),
            chat(prose("clean"), "e"),
            chat(lead + brief, "f"),
        ]
        kept, reasons = kept_and_dropped(folder, tokenizer, records, "--benchmark", bench)
        assert kept == expected
        assert reasons[4]["item"] == 5
        if count == 11:
            assert reasons[3]["item"] == 4
        report = json.loads((folder / "out" / "report.json").read_text())["benchmarks"]
        assert report["records"] == count
        assert (report["boilerplate"] > 0) == (count == 11)


def test_short_items_match_whole_messages_and_lines_only(tmp_path, tokenizer):
    lines = ["Who wrote the Iliad, and when?", "all of the above", "",
             "Name the largest moon of Saturn.", ""]
    (tmp_path / "bench.txt").write_text("\n".join(lines))
    many = [{"choice": "It cannot be told from this.", "n": i} for i in range(11)]
    (tmp_path / "many.json").write_text(json.dumps(many))
    records = [
        chat("who wrote the iliad and WHEN", "Homer"),
        chat("Tell me,\n  Name the largest moon of Saturn!\nplease", "Titan"),
        chat("Who wrote the\nIliad, and when?", "Homer, long ago"),
        chat("all of the above", "x"),
        chat("It cannot be told from this.", "y"),
        chat("Do you know who wrote the Iliad, and when?", "z"),
        chat("Hm", "Name the largest moon of Saturn."),
    ]
    options = ("--benchmark", tmp_path / "bench.txt", tmp_path / "many.json", "--near-duplicate", 0)
    kept, reasons = kept_and_dropped(tmp_path, tokenizer, records, *options)
    assert kept == [4, 5, 6]
    items = {i: (row["item"], row["excerpt"]) for i, row in reasons.items()}
    assert items == {
        1: (1, "whowrotetheiliadandwhen"),
        2: (4, "namethelargestmoonofsaturn"),
        3: (1, "whowrotetheiliadandwhen"),
        7: (4, "namethelargestmoonofsaturn"),
    }


def test_equal_hashes_of_other_texts_are_no_match(tmp_path, tokenizer, monkeypatch):
    true_hashes = chat_blend.window_hashes

    def few_hashes(tokens, window):
        return true_hashes(tokens, window) % np.uint64(97) << np.uint64(40)

    monkeypatch.setattr(chat_blend, "window_hashes", few_hashes)
    bench = write_lines(tmp_path / "bench.jsonl", [item(i) for i in range(20)])
    records = [chat(prose(f"clean {i}"), prose(f"answer {i}")) for i in range(30)]
    options = ("--benchmark", bench, "--common", 1000, "--near-duplicate", 0)
    kept, _ = kept_and_dropped(tmp_path, tokenizer, records, *options)
    assert len(kept) == 30


# ---------------------------------------------------------------------------------------- drawing


def three_sources(folder, sizes=(50, 30, 40)):
    folder.mkdir(exist_ok=True)
    sources = []
    for name, size in zip(("general", "math", "code"), sizes, strict=True):
        records = [chat(f"{name} {i}", prose((name, i), 20)) for i in range(size)]
        path = write_lines(folder / f"{name}.jsonl", records)
        sources.append(f"{name}={path}")
    return sources


def categories(rows):
    return dict(Counter(row["category"] for row in rows))


def test_apportion_is_by_largest_remainder_and_exact():
    assert chat_blend.apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    weights = {"a": Fraction("0.45"), "b": Fraction("0.35"), "c": Fraction("0.2")}
    assert chat_blend.apportion(7, weights) == {"a": 3, "b": 3, "c": 1}
    rng = random.Random(0)
    for _ in range(200):
        weights = {i: rng.randrange(1, 1000) for i in range(rng.randrange(1, 6))}
        total = rng.randrange(500)
        counts = chat_blend.apportion(total, weights)
        assert sum(counts.values()) == total
        for i, number in counts.items():
            assert abs(number - total * weights[i] / sum(weights.values())) < 1


def test_category_counts_are_exact_and_the_holdout_is_proportional(tmp_path, tokenizer, capsys):
    sources = three_sources(tmp_path)
    general, math, code = sources
    weighted = [f"{general}=0.5", f"{math}=0.3", f"{code}=0.2"]
    train, _, report = blend(tokenizer, tmp_path / "out", weighted, "--count", 80, "--holdout", 20)
    valid = read_lines(tmp_path / "out" / "valid.jsonl")
    assert categories(train) == {"general": 30, "math": 18, "code": 12}
    assert categories(valid) == {"general": 10, "math": 6, "code": 4}
    assert len({json.dumps(row) for row in train + valid}) == 80
    assert [row["category"] for row in train] != sorted(row["category"] for row in train)  # mixed

    by_survivors, _, _ = blend(tokenizer, tmp_path / "default", sources, "--count", 24)
    assert categories(by_survivors) == {"general": 10, "math": 6, "code": 8}
    assert len(blend(tokenizer, tmp_path / "all", sources)[0]) == 120
    assert not (tmp_path / "all" / "valid.jsonl").exists()

    library = data.load_tokenizer(tokenizer)
    lengths = []
    loss_tokens = []
    for row in train + valid:
        tokens, mask = encode_chat(row["messages"], library)
        lengths.append(len(tokens))
        loss_tokens.append(sum(mask))
    counts = report["categories"].values()
    assert sum(count["tokens"] for count in counts) == sum(lengths)
    assert sum(count["loss_tokens"] for count in counts) == sum(loss_tokens)
    assert sum(report["lengths"].values()) == 80
    assert re.search(r"math +18 +6 ", capsys.readouterr().out)


def test_files_of_a_category_share_its_samples_by_weight(tmp_path, tokenizer):
    a = write_lines(tmp_path / "a.jsonl", [chat(f"a {i}", prose(i, 20)) for i in range(40)])
    b = write_lines(tmp_path / "b.jsonl", [chat(f"b {i}", prose(-i - 1, 20)) for i in range(40)])
    c = write_lines(tmp_path / "c.jsonl", [chat(f"c {i}", prose(f"c{i}", 20)) for i in range(40)])
    sources = [f"math={a}=3", f"math={b}=1", f"code={c}=4"]
    train, _, _ = blend(tokenizer, tmp_path / "out", sources, "--count", 40)
    assert Counter(row["source"] for row in train) == {"a.jsonl": 15, "b.jsonl": 5, "c.jsonl": 20}
    # c has 40: that is all that the weights allow
    most, _, _ = blend(tokenizer, tmp_path / "most", sources)
    assert Counter(row["source"] for row in most) == {"a.jsonl": 30, "b.jsonl": 10, "c.jsonl": 40}


def test_too_few_of_a_category_is_named_with_the_count_that_works(tmp_path, tokenizer):
    sources = [f"{source}=1" for source in three_sources(tmp_path)]
    common = ["--source", *sources, "--tokenizer", tokenizer]
    line = failure(*common, "--count", 120, "--out", tmp_path / "out")
    assert "category math has too few samples: 30 are left" in line
    assert "40 are needed" in line
    works = int(re.search(r"--count (\d+) would work", line)[1])
    assert len(blend(tokenizer, tmp_path / "out", sources, "--count", works)[0]) == works >= 90
    line = failure(*common, "--count", works + 1, "--out", tmp_path / "more")
    assert f"--count {works} would" in line
    assert not (tmp_path / "more").exists()
    assert not (tmp_path / "more.partial").exists()


def test_same_samples_and_seed_same_bytes_in_whatever_order_sources_are_named(tmp_path, tokenizer):
    sources = three_sources(tmp_path)
    files = ("train.jsonl", "valid.jsonl", "dropped.jsonl", "report.json")

    def contents(name, order, seed):
        blend(tokenizer, tmp_path / name, [sources[i] for i in order], "--count", 60,
              "--holdout", 7, "--seed", seed)
        return [(tmp_path / name / file).read_bytes() for file in files]

    first = contents("a", (0, 1, 2), 0)
    assert first == contents("b", (0, 1, 2), 0) == contents("c", (2, 0, 1), 0)
    path = Path(sources[0].split("=")[1])
    # nor does the order in a file matter
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert first == contents("d", (1, 0, 2), 0)
    other = contents("e", (0, 1, 2), 1)
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_the_output_trains(tmp_path, tokenizer):
    blend(tokenizer, tmp_path / "out", three_sources(tmp_path), "--count", 50, "--holdout", 10,
          "--max-tokens", 512)
    for split, size in (("train", 40), ("valid", 10)):
        file = tmp_path / "out" / f"{split}.jsonl"
        dataset = ChatDataset(file, data.load_tokenizer(tokenizer), 512, seed=0)
        assert len(dataset.samples) == size
        assert dataset.dropped == 0
        assert dataset.sequence(0)[1].any()


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments, message", [
    ("--source good.jsonl", "--source good.jsonl must be CATEGORY=PATH"),
    ("--source a=missing.jsonl", "--source missing.jsonl: no such file"),
    ("--source a=text.md", "text.md: no record can be used: 1 not a chat record"),
    ("--source a=empty", "--source empty: holds no .json, .jsonl, .ndjson, .parquet file"),
    ("--source a=good.jsonl=x", "--source a=good.jsonl=x: weight 'x' must be a number above 0"),
    ("--source a=good.jsonl=0", "weight '0'"),
    ("--source a=good.jsonl=nan", "'nan'"),
    ("--source a=good.jsonl=1 b=other.jsonl", "a weight to every source or to none"),
    ("--source a=broken.jsonl", "broken.jsonl, line 2: not valid JSON"),
    ("--source a=latin.jsonl", "latin.jsonl: not UTF-8"),
    ("--source a=object.json", "object.json: no record can be used: 1 not a chat record"),
    ("--source a=broken.json", "broken.json, record 2: not valid JSON"),
    ("--source a=cut.jsonl.gz", "cut.jsonl.gz: damaged .gz file"),
    ("--source a=deep.jsonl", "deep.jsonl, record 1: not valid JSON"),
    ("--source a=keys.jsonl", "keys.jsonl: no record can be used: 3 not a chat record "
     r"\(keys.jsonl, line 1, keys: title body\); tools/conversations.py says"),
    ("--source a=nothing.jsonl", "nothing.jsonl: no record can be used: there is none"),
    ("--source a=good.jsonl --benchmark gone.jsonl", "--benchmark gone.jsonl: no such file"),
    ("--source a=good.jsonl --benchmark empty", "--benchmark empty: holds no .*, .txt file"),
    ("--source a=good.jsonl --benchmark broken.jsonl", "broken.jsonl, line 2: not valid JSON"),
    ("--source a=good.jsonl --benchmark nothing.jsonl",
     "--benchmark nothing.jsonl: has no text of 20 letters"),
    ("--source a=good.jsonl --count 0", "--count 0 must be a whole number, 1 or more"),
    ("--source a=good.jsonl --window 19", "--window 19 must be a whole number, 20 or more"),
    ("--source a=good.jsonl --near-duplicate 1", "--near-duplicate 1 must be 0"),
    ("--source a=good.jsonl --near-duplicate nan", "--near-duplicate nan must be 0"),
    ("--source a=good.jsonl --count 2 --holdout 2", "--holdout 2 must be below --count 2"),
    ("--source a=good.jsonl --holdout 9", "--holdout 9 must be below the 2"),
    ("--source a=good.jsonl --count 3", "category a has too few samples: 2 are left of good.jsonl, "
     "3 are needed; --count 2 would work"),
    ("--source a=good.jsonl=1 b=good.jsonl=1",
     "category b has too few samples: none is left of good.jsonl"),
    ("--source a=good.jsonl --max-tokens 3", "no sample is left"),
    ("--source a=good.jsonl --tokenizer gone", "gone/tokenizer.json|gone: no such"),
    ("--source a=good.jsonl --out text.md", "text.md: already exists"),
])
def test_a_users_mistake_is_one_line_and_writes_nothing(
        tmp_path, monkeypatch, tokenizer, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "good.jsonl", [chat("one", "a"), chat("two", "b")])
    write_lines(tmp_path / "other.jsonl", [chat("three", "c")])
    write_lines(tmp_path / "keys.jsonl", [{"title": "t", "body": "b"}] * 3)
    good = json.dumps(chat("long enough to be an item", "a")).encode()
    contents = {
        "text.md": b"text",
        "broken.jsonl": good + b'\n{"messages": [',
        "latin.jsonl": b'"\xff"',
        "object.json": b'{"a": 1}',
        "broken.json": b"[1,",
        "nothing.jsonl": b"\n",
        "deep.jsonl": b"[" * 100_000,
        "cut.jsonl.gz": gzip.compress(good * 99)[:-9],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert re.search(message, failure("--tokenizer", tokenizer, "--out", "out", *arguments.split()))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_script_runs_by_itself(tmp_path, tokenizer):
    command = [sys.executable, "-m", "tools.chat_blend", "--tokenizer", tokenizer,
               "--out", tmp_path / "out", "--source"]
    good = subprocess.run([*command, *three_sources(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert good.returncode == 0
    assert "wrote" in good.stdout
    assert "nothing is decontaminated" in good.stdout
    again = subprocess.run([*command, "a=gone.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr == "error: --source gone.jsonl: no such file or directory\n"
