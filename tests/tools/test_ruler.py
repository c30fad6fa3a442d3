"""RULER's tasks: prompts of exact length, whose right answer is the one that is scored."""
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

import data
from tools import ruler
from tools.train_tokenizer import train_bpe

PROSE = ""
PEOPLE = ("Anna", "Bo", "Cyd", "Émile")
PLACES = ("park", "big old house", "sea", "end")
DEEDS = ("slept", "read a book", "sang")
for n, (who, where, what) in enumerate(itertools.product(PEOPLE, PLACES, DEEDS)):
    PROSE += f"{who} went to the {where}. There {who} {what}, naïvely!\n"
    PROSE += f"    Nobody {what} at the {where} {n}?\n日本 {n}\n"
LENGTHS = (3000, 6000)
ESSAYS = [task for task, config in ruler.NIAH.items() if config.haystack == "essay"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Small BPE with Llama 3's special tokens that knows the words of the lists."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    words = " ".join(ruler.ADJECTIVES + ruler.NOUNS)
    texts = [PROSE, ruler.NOISE * 20, f" {words}" * 3, Path(ruler.__file__).read_text()]
    train_bpe(texts, 1500, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return data.load_tokenizer(tokenizer_file)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Records by (task, length, sample) and other options, made once."""
    made = {}

    def record(task, length=3000, sample=0, **options):
        key = (task, length, sample, *sorted(options.items()))
        if key not in made:
            made[key] = ruler.make_record(tokenizer, PROSE, task, length, sample, **options)
        return made[key]

    return record


def body(record):
    """The haystack of a record: its text between the instruction and the question, without a worked
    example."""
    text = record["input"]
    if record["task"] == "vt":
        return text.split("assignments.\n\n")[-1].split("\nQuestion")[0]
    if record["task"] == "cwe":
        return text.split("most often.\n")[-1].split("\nQuestion")[0]
    return text.split(" later.\n", 1)[1].rsplit("\nAccording", 1)[0]


def needles(record):
    return re.findall(r"A special magic (?:number|uuid) of (\S+) is: ([\w-]+)\.", record["input"])


@pytest.mark.parametrize("options", [
    {},
    {"chat": True},
    {"chat": True, "system": "Be brief."},
], ids=["plain", "chat", "system"])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_length_is_exact(make, tokenizer, task, options):
    """A prompt rounded down to whole lines or sentences; a template or a begin-of-text that is not
    counted."""
    for length, sample in itertools.product((*LENGTHS, 4096 + 1777), (0, 1)):
        record = make(task, length, sample, **options)
        tokens = ruler.prompt_tokens(tokenizer, record["input"], record["answer_prefix"], **options)
        assert len(tokens) + record["max_new_tokens"] == length == record["length"]
        assert record["max_new_tokens"] == {"vt": 30, "cwe": 120, "fwe": 50}.get(task, 128)
        assert record["task"] == task
        assert record["sample"] == sample
        assert record["metric"] == "all"


def test_prompt_tokens_are_what_the_model_reads(tokenizer):
    start = tokenizer.encode_single_token("<|begin_of_text|>")
    text = "Where? In the park."
    plain = ruler.prompt_tokens(tokenizer, text[:6], text[6:])
    assert plain == [start, *tokenizer.encode_ordinary(text)]

    chat = ruler.prompt_tokens(tokenizer, "Where?", " In", chat=True, system="Be brief.")
    assert tokenizer.decode(chat) == (
        "<|begin_of_text|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n In")


def test_hard_characters_are_exact_too(tokenizer):
    """Letters of several tokens, lines without a border: a number of tokens that no end of the text
    gives."""
    text = "日本語のとても長い文章です" * 400
    for sample, task in itertools.product(range(12), ESSAYS):
        record = ruler.make_record(tokenizer, text, task, 3000, sample)
        tokens = ruler.prompt_tokens(tokenizer, record["input"], record["answer_prefix"])
        assert len(tokens) + 128 == 3000
        for value in record["outputs"]:
            line = rf"(^|\n)A special magic \w+ of \S+ is: {value}\.\n"
            assert re.search(line, record["input"])


@pytest.mark.parametrize("task", [*ruler.NIAH, "vt"])
def test_filler_is_short(make, tokenizer, task):
    """Exact, but because the haystack was given up early and filled with noise."""
    for length, sample in itertools.product(LENGTHS, range(3)):
        tail = body(make(task, length, sample))[-600:]
        if task in ("vt", "niah_single_1"):  # a haystack of noise
            for line in tail.split("\n")[1:]:
                assert line in ruler.NOISE or line.startswith(("A special", "VAR"))
            assert tail.count(ruler.NOISE) >= 2
        if task in ("niah_multikey_2", "niah_multikey_3"):
            line, *filler = tail[tail.rindex("A special magic"):].split("\n")
            of_line = len(tokenizer.encode_ordinary(line))
            of_filler = len(tokenizer.encode_ordinary("\n".join(filler)))
            assert of_filler <= max(24, of_line) + 3


SYNTHETIC_YAML = {  # RULER's
    "niah_single_1": ("noise", "word", "number", 1, 1, 1),
    "niah_single_2": ("essay", "word", "number", 1, 1, 1),
    "niah_single_3": ("essay", "word", "uuid", 1, 1, 1),
    "niah_multikey_1": ("essay", "word", "number", 4, 1, 1),
    "niah_multikey_2": ("needles", "word", "number", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuid", "uuid", 1, 1, 1),
    "niah_multivalue": ("essay", "word", "number", 1, 4, 1),
    "niah_multiquery": ("essay", "word", "number", 4, 1, 4),
}
PATTERNS = {
    "number": r"[1-9]\d{6}",
    "word": r"[a-z]+-[a-z]+",
    "uuid": r"\w{8}-\w{4}-4\w{3}-[89ab]\w{3}-\w{12}",
}


@pytest.mark.parametrize("task", ruler.NIAH)
def test_needles_are_those_of_the_task(make, task):
    """A value that is there twice or not at all, a distractor too few, an answer that belongs to
    another key."""
    config = ruler.NIAH[task]
    assert config == SYNTHETIC_YAML[task]
    for length, sample in itertools.product(LENGTHS, range(3)):
        record = make(task, length, sample)
        facts = needles(record)
        text = record["input"]
        assert len(set(facts)) == len(facts) == len({value for _, value in facts})
        asked = re.search(r" of (.+)\?$", text)[1].replace(", and ", ", ").split(", ")
        assert len(asked) == config.queries == len(set(asked))

        owner = {value: key for key, value in facts}
        expected = []
        for key in asked:
            expected += [key] * config.values
        assert [owner[value] for value in record["outputs"]] == expected
        assert len(record["outputs"]) == config.queries * config.values
        for value in record["outputs"]:
            assert text.count(value) == 1
        if config.haystack == "needles":
            assert len(facts) > 20
            assert len(dict(facts)) == len(facts)
        else:
            assert len(facts) == config.keys * config.values
            assert len(dict(facts)) == config.keys
        for key, value in facts:
            assert re.fullmatch(PATTERNS[config.key], key)
            assert re.fullmatch(PATTERNS[config.value], value)
        assert record["answer_prefix"].split(" of ")[1].startswith(asked[0])
        assert record["answer_prefix"][0] == " "

        for value, depth in zip(record["outputs"], record["depths"], strict=True):
            text = body(record).replace(f"is: {value}", "is: @")
            number = r"A special magic \S+ of \S+ is: [\w-]+\.\s?"
            left = text if config.haystack == "needles" else re.sub(number, "", text)
            assert abs(left.index("@") / len(left) - depth) < 0.04


@pytest.mark.parametrize("task", ESSAYS)
def test_essay_is_real_text_with_needles_between_lines_or_sentences(make, task):
    for sample in range(3):
        text = body(make(task, 6000, sample))
        needle = r"A special magic (?:number|uuid) of \S+ is: [\w-]+\."
        for match in re.finditer(rf"(^|.){needle}(.|$)", text, re.S):
            before = text[:match.start(1) + len(match[1])].rstrip(" ")
            if before:
                assert before[-1] in ".!?\n", repr(match[0])
                assert match[2] in (" ", "\n", ""), repr(match[0])
        left = re.sub(rf"\n?{needle}$|{needle}\s", "", text)
        if left not in PROSE * 20:  # its own end could not fill it
            left = re.sub(r" (The river.{,60}|[ .]{,60})$", "", left)
        assert left in PROSE * 20
        assert len(left) > 8000


def test_depths_are_spread(make):
    """All needles at one place: forty depths from 0 to 100 % are drawn from."""
    depths = [make("niah_single_2", sample=sample)["depths"][0] for sample in range(40)]
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert len(set(depths)) > 15
    assert len(ruler.DEPTHS) == 40
    assert ruler.DEPTHS[:2] == [0, 3]
    assert ruler.DEPTHS[-1] == 100

    lines = [f"fact {i}" for i in range(3)]
    before, more, after, places = ruler.hide_in_essay(lines, 200, PROSE, [100, 0, 50])
    assert before.startswith("fact 1\nAnna")
    assert after == "\nfact 0"
    assert before[-1] + more == PROSE[199:2200]
    assert places[:2] == [1, 0]
    assert 0.5 <= places[2] < 0.8
    assert before.index("fact 2") == round(200 * places[2]) + 7


def test_variables_are_those_of_the_chain(make):
    for length, sample in itertools.product(LENGTHS, range(4)):
        record = make("vt", length, sample)
        lines = re.findall(r"VAR (\w+) = (.+)", body(record))
        value = re.search(r"value (\d{5}) in", record["input"].rsplit("Question", 1)[1])[1]
        assert len(lines) == len(set(record["outputs"])) == 5
        origin = value
        for (name, assigned), output in zip(lines, record["outputs"], strict=True):
            assert len(name) == 5
            assert name == output
            assert assigned == origin
            origin = f"VAR {name}"
        assert f"value {value}" in record["answer_prefix"]

        example = record["input"].split("\n\n")[1]
        shown = re.findall(r"VAR (\w+) = (.+)", example)
        assert len(shown) == 5
        assert example.endswith(f"namely: {' '.join(name for name, _ in shown)}")
        assert value not in example
        assert record["depths"] == sorted(record["depths"])


@pytest.mark.parametrize("length, often, seldom, example", [
    (3000, 6, 1, (20, 3, 1)),
    (6000, 30, 3, (40, 10, 3)),
    (40_000, 30, 3, (40, 10, 3)),
])
def test_common_words_are_counted(make, length, often, seldom, example):
    record = make("cwe", length)
    count = Counter(re.findall(r"\d+\. ([a-z-]+)", body(record)))
    assert sorted(record["outputs"]) == sorted(word for word, n in count.items() if n == often)
    assert Counter(count.values()) == {often: 10, seldom: len(count) - 10}
    assert len(count) > 50
    assert len({"-" in word for word in count}) == 1  # no answer stands out by its form
    order = re.findall(r"\d+\. ([a-z-]+)", body(record))
    assert set(order[:10]) != set(order[10:20])  # shuffled
    assert set(order[-100:]) & set(record["outputs"])
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", body(record))]
    assert numbers == list(range(1, len(numbers) + 1))

    listing, answer, *_ = record["input"].split("list above are:")
    listing = listing.split("\nQuestion")[0]
    shown = Counter(re.findall(r"\d+\. ([a-z-]+)", listing))
    assert Counter(shown.values()) == {example[1]: 10, example[2]: example[0] - 10}
    assert not shown.keys() & count.keys()
    named = re.findall(r"\d+\. (\w+)", answer.split("\n")[0])
    assert sorted(named) == sorted(word for word, n in shown.items() if n == example[1])


def test_code_words_are_counted(make):
    for length, sample in itertools.product((*LENGTHS, 40_000), range(2)):
        record = make("fwe", length, sample)
        text = record["input"].split("most frequent ones.")[1].split("\nQuestion")[0]
        count = Counter(re.findall(r" ([a-z]{6}|\.\.\.)(?=\s)", text + " "))
        (top, dots), *rest = count.most_common()
        assert top == "..."
        assert [word for word, _ in rest[:3]] == record["outputs"]
        assert rest[2][1] > rest[3][1]
        # in proportion to 1/k^2: the dots are k = 1, the answers 2, 3, 4
        assert rest[0][1] / rest[2][1] == pytest.approx(4, rel=0.2)
        assert dots / rest[0][1] == pytest.approx(4, rel=0.3)
        assert len(rest) <= (length - 50) // 50 - 1


def test_third_code_word_is_never_as_rare_as_a_wrong_one():
    plan = ruler.fwe(ruler.random.Random(0), 3000)
    for size in range(plan.least, plan.least + 300):
        found = plan.draft(size)
        count = Counter(found.before.split("most frequent ones.")[1].split())
        words = count.most_common(5)
        assert words[0][0] == "..."
        assert [word for word, _ in words[1:4]] == found.outputs
        if len(count) > 4:
            assert words[3][1] > words[4][1]


def test_words_are_not_parts_of_each_other():
    words = ruler.ADJECTIVES + ruler.NOUNS
    assert not [(a, b) for a, b in itertools.permutations(words, 2) if a in b]
    assert len(words) > 200


def test_lines_of_needles_never_run_out():
    found = list(itertools.islice(ruler.draws("word", ruler.random.Random(0)), 20_000))
    pairs = len(ruler.ADJECTIVES) * len(ruler.NOUNS)
    assert len(set(found)) == 20_000
    assert {word.count("-") for word in found[:pairs]} == {1}
    assert found[pairs].count("-") == 2


def shared(*texts):
    return len(os.path.commonprefix(texts))


def test_prompts_of_a_sample_begin_alike(make):
    """Nothing for a prefix cache to reuse: an essay or a needle haystack drawn by length or by
    task."""
    def first(record):  # where the first needle begins
        return record["input"].index("A special magic number of")

    for sample in range(3):
        for task in ("niah_multikey_2", "niah_multikey_3", "niah_single_2", "niah_multiquery",
                     "niah_single_1"):
            short = make(task, LENGTHS[0], sample)
            long = make(task, LENGTHS[1], sample)
            whole = len(short["input"]) - 600  # all but filler and question
            expected = whole if "multikey" in task else min(first(short), first(long))
            assert shared(short["input"], long["input"]) >= expected
        one = make("niah_single_2", 6000, sample)
        other = make("niah_multikey_1", 6000, sample)
        assert shared(one["input"], other["input"]) >= min(first(one), first(other))
        for task, part, lengths in (("vt", "namely", LENGTHS),
                                    ("cwe", "list above are:", (6000, 40_000))):
            short, long = (make(task, length, sample)["input"] for length in lengths)
            assert shared(short, long) > short.index(part)
    starts = {ruler.essay_window(PROSE, 3000, 42, sample)[:300] for sample in range(20)}
    assert len(starts) > 10


def test_records_differ_by_everything_that_names_them(make):
    tasks = ("niah_single_2", "niah_multikey_1", "niah_multivalue")
    outputs = set()
    for task, length, sample, seed in itertools.product(tasks, LENGTHS, (0, 1), (1, 42)):
        outputs.add(make(task, length, sample, seed=seed)["outputs"][0])
    assert len(outputs) == 3 * 2 * 2 * 2


def test_value_in_the_essay_is_drawn_again(tokenizer):
    """A text that states the number anyway, elsewhere."""
    first = ruler.make_record(tokenizer, PROSE, "niah_single_2", 3000, 0)["outputs"][0]
    record = ruler.make_record(tokenizer, PROSE + first, "niah_single_2", 3000, 0)
    assert record["outputs"] != [first]
    assert first in record["input"]
    assert record["input"].count(record["outputs"][0]) == 1


# ----------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "essay.txt"
    path.write_text(PROSE)
    return path


def call(tokenizer_file, text_file, out, *more):
    ruler.main(["--tokenizer", str(tokenizer_file), "--haystack", str(text_file), "--out", str(out),
                "--lengths", "1500", "--samples", "2", "--tasks", "vt", "niah_single_2",
                *map(str, more)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_record_does_not_depend_on_others(tokenizer_file, text_file, tmp_path, capsys):
    """One random stream for a whole run; and the file is the same every time."""
    few = call(tokenizer_file, text_file, tmp_path / "few.jsonl")
    many = call(tokenizer_file, text_file, tmp_path / "many.jsonl", "--lengths", 2000, 1500, 1700,
                "--tasks", "fwe", "niah_single_2", "vt", "--samples", 3)
    assert [record["index"] for record in few] == [0, 1, 2, 3]
    assert [record["index"] for record in many] == list(range(27))

    def name(record):
        return record["task"], record["sample"], record["length"]

    assert [name(record) for record in many[9:13]] == [
        ("niah_single_2", 0, 1500),
        ("niah_single_2", 0, 1700),
        ("niah_single_2", 0, 2000),
        ("niah_single_2", 1, 1500),
    ]
    same = {name(record): record | {"index": 0} for record in many}
    for record in few:
        assert same[name(record)] == record | {"index": 0}

    again = (tmp_path / "few.jsonl").read_bytes()
    call(tokenizer_file, text_file, tmp_path / "few.jsonl")
    assert (tmp_path / "few.jsonl").read_bytes() == again
    haystack, first, *_ = capsys.readouterr().out.splitlines()
    assert haystack == "haystack: 1 documents of 1 .txt"
    assert first == f"wrote {tmp_path / 'few.jsonl'}: 4 plain prompts"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "many.jsonl"]


def test_chat_prompts_are_exact_for_chat(tokenizer_file, tokenizer, text_file, tmp_path):
    for record in call(tokenizer_file, text_file, tmp_path / "x.jsonl", "--prompt", "chat",
                       "--system", "Be brief."):
        tokens = ruler.prompt_tokens(tokenizer, record["input"], record["answer_prefix"], True,
                                     "Be brief.")
        assert len(tokens) + record["max_new_tokens"] == 1500


@pytest.mark.parametrize("change, message", [
    (["--tasks", "vt", "qa_1"], "--tasks invalid choice: 'qa_1'"),
    (["--samples", "0"], "--samples 0 must be a whole number, 1 or more"),
    (["--system", "x"], "--system"),
    (["--haystack", "/no/such/place"], "--haystack /no/such/place"),
    (["--tokenizer", "/no/such/place"], "/no/such/place"),
    (["--out", "/no/such/place/x"],
     "--out /no/such/place/x must be a file in a directory that exists"),
    (["--lengths", "1500", "-3"], "vt: length -3 is too small"),
])
def test_mistakes_are_one_line(tokenizer_file, text_file, tmp_path, change, message):
    with pytest.raises(SystemExit) as error:
        call(tokenizer_file, text_file, tmp_path / "x.jsonl", *change)
    line = str(error.value)
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ruler.TASKS)
def test_least_length_works_and_a_token_less_does_not(tokenizer_file, text_file, tmp_path, task):
    options = ("--tasks", task, "--samples", 3, "--lengths")
    message = (f"error: {task}: length 50 is too small; the least that works for 3 samples is "
               r"(\d+)")
    with pytest.raises(SystemExit, match=message) as error:
        call(tokenizer_file, text_file, tmp_path / "x.jsonl", *options, 50)
    least = int(str(error.value).split()[-1])
    assert 200 < least < 2500
    assert len(call(tokenizer_file, text_file, tmp_path / "x.jsonl", *options, least)) == 3
    with pytest.raises(SystemExit, match="too small"):
        call(tokenizer_file, text_file, tmp_path / "x.jsonl", *options, least - 25)


def test_impossible_length_is_an_error_and_leaves_the_old_file(
        tokenizer_file, text_file, tmp_path, monkeypatch):
    """A prompt that is a token short without a word; half a file in the place of a whole one."""
    path = tmp_path / "x.jsonl"
    made = ruler.make_record
    path.write_text("old")
    monkeypatch.setattr(ruler, "fill", lambda *args: None)
    with pytest.raises(SystemExit, match="error: vt, length 1500, sample 0: no draw"):
        call(tokenizer_file, text_file, path)
    monkeypatch.undo()

    def fails_later(*arguments, **options):
        if arguments[4] > 0:  # from the second sample on
            raise ValueError("math domain error")
        return made(*arguments, **options)

    monkeypatch.setattr(ruler, "make_record", fails_later)
    with pytest.raises(SystemExit, match="error: "):
        call(tokenizer_file, text_file, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_task_is_tried_before_the_work_begins(
        tokenizer_file, text_file, tmp_path, monkeypatch):
    """A length that is too small for the last task, found out after hours on the others."""
    tried = []
    made = ruler.make_record

    def noted(*arguments, **options):
        tried.append(arguments[2:5])
        return made(*arguments, **options)

    monkeypatch.setattr(ruler, "make_record", noted)
    with pytest.raises(SystemExit, match="vt: length 600 is too small"):
        call(tokenizer_file, text_file, tmp_path / "x.jsonl", "--lengths", 600, "--tasks", "fwe",
             "vt")
    assert ("fwe", 600, 0) in tried
    assert ("fwe", 600, 1) not in tried
