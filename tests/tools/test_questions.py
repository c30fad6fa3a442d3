"""tools.questions: each benchmark's records become whole prompts, or are refused; scores are those
of the published rules."""
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from tools.questions import METRICS, Question, printable, read_questions, words


@pytest.fixture
def read(tmp_path):
    """Questions of records in a file of any name."""
    def build(*records, name="set.jsonl", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, records)))
        return read_questions([path], **options)
    return build


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("metric, prediction, answers, score", [
    # RULER: case does not matter, the answer may stand anywhere, even in a longer number; a share
    # of several
    ("all", "The magic numbers are 1234567 and 7654321.", ["1234567", "7654321"], 1.0),
    ("all", "1234567", ["1234567", "7654321"], 0.5),
    ("all", "none of them", ["1234567", "7654321"], 0.0),
    ("all", "12345678", ["1234567"], 1.0),
    ("all", "123 4567", ["1234567"], 0.0),
    ("all", "", ["a"], 0.0),
    ("all", "VAR ABC, and def", ["abc", "DEF", "ghi"], 2 / 3),
    ("all", "1,234,567", ["1234567"], 0.0),
    ("any", "It is Paris or so", ["london", "paris"], 1.0),
    ("any", "Rome", ["london", "paris"], 0.0),
    ("f1", "The cat sat, there.", ["a cat sat"], 0.8),
    ("f1", "the", ["cat"], 0.0),
    ("f1", "dog", ["cat", "dog"], 1.0),
    ("f1", "cat cat", ["cat"], 2 / 3),
    ("f1", "", ["cat"], 0.0),
    ("exact", "The Cat!", ["cat"], 1.0),
    ("exact", "cat sat", ["cat"], 0.0),
    ("exact", "b", ["a b", "b"], 1.0),
    # "a" is an article, but a text of nothing else is a letter
    ("f1", "A", ["A"], 1.0),
    ("exact", "A", ["A"], 1.0),
    ("exact", "A.", ["a"], 1.0),
    ("exact", "(A)", ["B"], 0.0),
    ("exact", "", ["A"], 0.0),
    ("f1", "", ["A"], 0.0),
    ("exact", "the", ["a"], 0.0),
    ("exact", "...", ["..."], 1.0),
    ("exact", "", ["..."], 0.0),
    ("f1", "a cat", ["A"], 0.0),
    ("exact", "dog–an", ["dog–"], 1.0),
    ("f1", "“The” cat", ["cat"], 0.5),  # of three words and one
    # LongBench v2, pred.py's extract_answer
    ("choice", "The correct answer is (B)", ["B"], 1.0),
    ("choice", "The correct answer is B.", ["B"], 1.0),
    ("choice", "**The correct answer is** **(B)** Because", ["B"], 1.0),
    ("choice", "I think that\nThe correct answer is (B), not (C).", ["B"], 1.0),
    ("choice", "The correct answer is (C)", ["B"], 0.0),
    ("choice", "The correct answer is C. The correct answer is (B)", ["B"], 1.0),  # brackets first
    ("choice", "The correct answer is Berlin", ["B"], 1.0),  # so it is published
    ("choice", "The correct answer is (b)", ["B"], 0.0),
    ("choice", "the correct answer is (B)", ["B"], 0.0),
    ("choice", "The correct answer is: (B)", ["B"], 0.0),
    ("choice", "(B)", ["B"], 0.0),
    ("choice", "B", ["B"], 0.0),
    ("choice", "", ["B"], 0.0),
    # InfiniteBench, compute_scores.py's get_score_one_longbook_choice_eng
    ("option", "C. Snowfield", ["Snowfield", "C"], 1.0),
    ("option", "C", ["Snowfield", "C"], 1.0),
    ("option", "Actually C", ["Snowfield", "C"], 0.0),  # A begins it
    ("option", "Snowfield", ["Snowfield", "C"], 1.0),
    ("option", "snowfield", ["Snowfield", "C"], 0.0),
    ("option", "The answer is C", ["Snowfield", "C"], 1.0),
    ("option", "The answer is: Snowfield.", ["Snowfield", "C"], 1.0),
    ("option", "The answer is D, not C", ["Snowfield", "C"], 0.0),
    ("option", "The answer is", ["Snowfield", "C"], 0.0),
    ("option", "The right option is\nC", ["Snowfield", "C"], 1.0),
    ("option", "It must be (C)", ["Snowfield", "C"], 0.0),
    ("option", "It must be C, or B", ["Snowfield", "C"], 1.0),
    ("option", "It must be B, or C", ["Snowfield", "C"], 0.0),
    ("option", "It must be that", ["Snowfield", "C"], 0.0),
    ("option", "", ["Snowfield", "C"], 0.0),
    # one character after the words is passed over, whatever it is
    ("option", "The answer is(C", ["Snowfield", "C"], 1.0),
    ("option", "The answer:C", ["Snowfield", "C"], 0.0),
    ("option", "The answer is: : C", ["Snowfield", "C"], 0.0),
    ("option", "The answer is,. C", ["Snowfield", "C"], 1.0),  # each a space, and spaces are one
    ("option", "The answer is\xa0C", ["Snowfield", "C"], 1.0),
    ("option", "The answer is \xa0C", ["Snowfield", "C"], 0.0),  # other white space is not
    ("option", "The answer\xa0is B. Or C", ["Snowfield", "C"], 0.0),
    ("option", "The answer\u3000is C. Or B", ["Snowfield", "C"], 1.0),
    ("option", "The answer is Snow\u3000field", ["Snow\u3000field", "C"], 1.0),
    ("option", "It must be {C}", ["Snowfield", "C"], 1.0),
    ("option", "The answer is {C}", ["Snowfield", "C"], 1.0),
    ("option", "It must be AB, or C", ["Snowfield", "C"], 0.0),  # a part of "ABCD" is a letter
    ("option", "It must be AC, or C", ["Snowfield", "C"], 1.0),
    ("option", "The option is Snowfield, the answer is B", ["Snowfield", "C"], 0.0),
    ("option", "The answer is here. So the answer is: C", ["Snowfield", "C"], 1.0),
])
def test_scores_of_texts(metric, prediction, answers, score):
    assert METRICS[metric](printable(prediction), answers) == pytest.approx(score)


@pytest.mark.parametrize("text, expected", [
    # evaluate-v1.1.py: lower case, then no punctuation, then no articles, then words
    ("The Cat", ["cat"]),
    ("a cat, an owl and the dog", ["cat", "owl", "and", "dog"]),
    ("theatre another banana", ["theatre", "another", "banana"]),
    ("U.S.A.", ["usa"]),
    ("cat-the-dog", ["catthedog"]),  # ASCII's hyphen is punctuation, so no border is left
    ("t.h.e cat", ["cat"]),
    ("the_cat", ["thecat"]),
    # a border is where a letter or digit ends; a dash and such quotes are no punctuation
    ("dog–an", ["dog–"]),
    ("dog – the cat", ["dog", "–", "cat"]),
    ("“The” cat", ["“", "”", "cat"]),
    ("l’a dit", ["l’", "dit"]),
    ("the\xa0cat\u3000a\nb", ["cat", "b"]),
    ("thé à la", ["thé", "à", "la"]),
    # ours: SQuAD's rule leaves nothing here, and so no answer would be right
    ("A.", ["a"]),
    ("The an", ["the", "an"]),
    ("...", ["..."]),
    ("", []),
])
def test_words_are_those_of_squads_rule(text, expected):
    assert words(text) == expected


def ruler_rules(prediction, references):
    """RULER's own lines, as its scripts/eval has them: the mean over references of whether each is
    a substring."""
    prediction = re.sub(r"[\x00-\x1f]", "\n", prediction).strip()
    scores = [1.0 if r.lower() in prediction.lower() else 0.0 for r in references]
    return sum(scores) / len(references)


def test_random_texts_score_as_rulers_rules_say():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("aB1 \x07\n9,", k=rng.randrange(12)))
        answers = []
        for _ in range(rng.randrange(1, 4)):
            answers.append("".join(rng.choices("Ab19 ", k=rng.randrange(1, 4))))
        assert METRICS["all"](printable(text), answers) == ruler_rules(text, answers)


# ----------------------------------------------------------------------------------------- formats


def test_own_records_are_read_as_they_state(read):
    lines = [
        {"index": 0, "input": "I", "outputs": ["1", "2"], "length": 4096, "answer_prefix": " A:",
         "task": "vt", "max_new_tokens": 31, "metric": "any"},
        {"context": "C", "input": "I", "answer": ["x"], "id": 3},
        {"context": "C", "input": "I", "answers": ["x", "y"]},
        {"context": "C", "question": "Q", "answer": "x", "length": None},
        {"prompt": "P", "answer": 7},
        {"prompt": "P", "outputs": ["7", "8"], "task": None},
    ]
    assert read(*lines) == [
        Question("I", " A:", ["1", "2"], "any", 31, "vt", "4096"),
        Question("C\n\nI", "", ["x"], "any", 128, "set", "all"),
        Question("C\n\nI", "", ["x", "y"], "any", 128, "set", "all"),
        Question("C\n\nQ", "", ["x"], "any", 128, "set", "all"),
        Question("P", "", ["7"], "any", 128, "set", "all"),
        Question("P", "", ["7", "8"], "all", 128, "set", "all"),
    ]
    for question in read(*lines, metric="f1", max_new_tokens=5):
        assert question.metric == "f1"
        assert question.max_new_tokens == 5


LONGBENCH_2 = {
    "_id": "66f36490821e116aacb2cc22", "domain": "Single-Document QA", "sub_domain": "Financial",
    "difficulty": "easy", "length": "short", "question": "How many factors are there?",
    "choice_A": "One factor", "choice_B": "Two factors", "choice_C": "Three factors",
    "choice_D": "Four factors", "answer": "D", "context": "A report of factors."}


def test_a_prompt_of_longbench_v2_has_its_question_and_all_choices(read):
    [question] = read(LONGBENCH_2, name="LongBench-v2/data.jsonl")
    assert question.text == """\
A report of factors.

How many factors are there?

(A) One factor
(B) Two factors
(C) Three factors
(D) Four factors

Which one is right? Say "The correct answer is (X)" with its letter."""
    assert question.answers == ["D"]
    assert question.metric == "choice"
    assert question.length == "short"
    assert question.task == "LongBench-v2"


def test_the_letter_of_longbench_v2_is_no_text_of_a_choice(read):
    questions = read(
        LONGBENCH_2 | {"choice_A": "B", "choice_B": "A", "answer": "A"},
        LONGBENCH_2 | {"choice_A": "Four factors"},  # as D is
        LONGBENCH_2 | {"answer": ["C"]})
    assert [question.answers for question in questions] == [["A"], ["D"], ["C"]]


@pytest.mark.parametrize("answer, right", [
    # get_answer of InfiniteBench's src/eval_utils.py
    ("A", ["A", "B"]), (["A"], ["A", "B"]), ("same", ["same", "C"]), ("D", ["same", "D"]),
    (["same", "D"], ["same", "D"]), (["B", "A"], ["B", "A"])])
def test_an_answer_of_infinitebench_is_a_text_before_it_is_a_letter(read, answer, right):
    record = {"input": "Q?", "answer": answer, "options": ["B", "A", "same", "same"]}
    assert read(record)[0].answers == right


@pytest.mark.parametrize("answer", [["Hall Farm"], ["Hall Farm", "B"], "Hall Farm", ["B"]])
def test_a_prompt_of_infinitebench_has_all_options(read, answer):
    record = {"id": 0, "context": "A book.", "input": "Where is it?", "answer": answer,
              "options": ["Snowfield", "Hall Farm", "The Mill", "Stoniton"]}
    [question] = read(record, name="longbook_choice_eng.jsonl")
    assert question.text == """\
A book.

Where is it?

A. Snowfield
B. Hall Farm
C. The Mill
D. Stoniton

Which one is right? Say its letter only."""
    assert question.answers == ["Hall Farm", "B"]
    assert question.metric == "option"
    assert question.task == "longbook_choice_eng"


def test_other_records_of_infinitebench_have_empty_options(read):
    record = {"id": 3, "context": "Noise. The pass key is 71432. Noise.",
              "input": "What is the pass key?", "answer": ["71432"], "options": []}
    [question] = read(record, name="passkey.jsonl")
    assert question.text == "Noise. The pass key is 71432. Noise.\n\nWhat is the pass key?"
    assert question.metric == "any"


def test_each_instruction_of_l_eval_is_a_question_about_its_document(read):
    record = {"instructions": ["How did they get it?", "Which is best?"], "source": "scientific_qa",
              "outputs": ["public resources", "relu"], "input": "A paper.", "evaluation": "f1"}
    assert read(record, name="scientific_qa.jsonl") == [
        Question("A paper.\n\nHow did they get it?", "", ["public resources"], "f1", 128,
                 "scientific_qa", "all"),
        Question("A paper.\n\nWhich is best?", "", ["relu"], "f1", 128, "scientific_qa", "all"),
    ]
    exam = record | {"evaluation": "exam", "outputs": ["18", "3"]}
    with pytest.raises(ValueError, match="line 1: metric or evaluation 'exam' is not known here; "
                                         "choose --metric all, any, f1, exact, choice, option$"):
        read(exam)
    assert {question.metric for question in read(exam, metric="any")} == {"any"}


LONGBENCH = {
    "input": "Who is it?", "context": "Passage 1: ...", "answers": ["Ann", "Anne"], "length": 3871,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "02ea17"}


def test_longbench_and_lv_eval_are_read(read):
    """Their lengths are words, and no two are alike: columns are powers of two."""
    lv_eval = {"input": "Who?", "context": "Article", "answers": ["Ann"], "length": 14020,
               "dataset": "hotpotwikiqa_mixup", "language": "en", "answer_keywords": "Ann",
               "confusing_facts": ["Bo did."]}
    classes = LONGBENCH | {"dataset": "trec", "all_classes": ["City", "Food"], "length": 8192}
    assert read(LONGBENCH, lv_eval, classes) == [
        Question("Passage 1: ...\n\nWho is it?", "", ["Ann", "Anne"], "any", 128, "hotpotqa",
                 "4096"),
        Question("Article\n\nWho?", "", ["Ann"], "any", 128, "hotpotwikiqa_mixup", "16384"),
        Question("Passage 1: ...\n\nWho is it?", "", ["Ann", "Anne"], "any", 128, "trec", "8192"),
    ]


@pytest.mark.parametrize("task, metric, room", [
    ("niah_single_1", "all", 128), ("niah_multivalue", "all", 128), ("vt", "all", 30),
    ("cwe", "all", 120), ("fwe", "all", 50), ("qa_1", "any", 32), ("qa_2", "any", 32)])
@pytest.mark.parametrize("length", [2049, 3967, 4096])
def test_rulers_own_files_say_their_task_by_their_folder(read, task, metric, room, length):
    record = {"index": 0, "input": "Text.\nQuestion?", "outputs": ["Ann", "Anne"], "length": length,
              "length_w_model_temp": length + 10, "answer_prefix": " Answer:"}
    [question] = read(record, name=f"4096/data/{task}/validation.jsonl")
    assert question == Question("Text.\nQuestion?", " Answer:", ["Ann", "Anne"], metric, room, task,
                                "4096")


@pytest.mark.parametrize("name, task", [
    ("qasper.jsonl", "qasper"), ("qasper.JSONL.gz", "qasper"), ("qasper/test.jsonl", "qasper"),
    ("qasper/data/test.jsonl", "qasper"), ("qasper/train-00000-of-00001.jsonl", "qasper"),
    ("qasper/contest.jsonl", "contest"), ("qasper/test.txt", "qasper"),
    ("qwen2.5_a.jsonl", "qwen2.5_a"), ("qwen2.5_b.jsonl", "qwen2.5_b"), ("qwen2.5_a", "qwen2.5_a"),
    ("qasper/sub/../test.jsonl", "qasper")])
def test_a_name_that_says_nothing_gives_way_to_its_folders(tmp_path, name, task):
    (tmp_path / "qasper/sub").mkdir(parents=True)
    path = tmp_path / name
    record = json.dumps({"prompt": "P", "answer": "x"}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(record) if path.suffix == ".gz" else record)
    [question] = read_questions([path])
    assert question.task == task


def test_a_link_has_the_task_of_its_own_place(tmp_path, monkeypatch):
    """A cache of Hugging Face's: each file is a link to one whose name says nothing."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0abc").write_text(json.dumps({"prompt": "P", "answer": "x"}))
    link = tmp_path / "snapshots/niah_single_1/validation.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/0abc")
    monkeypatch.chdir(link.parent)
    for path in (link, Path(link.name)):
        assert read_questions([path])[0].task == "niah_single_1"


@pytest.mark.parametrize("length, column", [
    (-5, "-5"), (0, "0"), (1, "1"), (2, "2"), (3, "4"), (4097, "8192"), ("4097", "4097")])
def test_a_length_is_rounded_up_to_a_power_of_two_if_it_has_one(read, length, column):
    assert read({"input": "I", "outputs": ["1"], "length": length})[0].length == column


def test_all_parts_of_a_prompt_are_asked_in_one_order(read):
    [question] = read({"question": "Q", "input": "I", "context": "C", "answer": "x"})
    assert question.text == "C\n\nI\n\nQ"


def test_lengths_that_tools_ruler_made_stay_as_they_are(read):
    record = {"input": "I", "outputs": ["1"], "length": 5000, "template": "plain", "system": None}
    [question] = read(record)
    assert question.length == "5000"
    assert question.made_for == ("plain", None)


def test_files_are_read_one_after_the_other(tmp_path):
    files = []
    for task in ("vt", "fwe"):
        file = tmp_path / task / "test.jsonl"
        file.parent.mkdir()
        file.write_text(json.dumps({"input": task, "outputs": ["1"]}))
        files.append(file)
    assert [question.text for question in read_questions(files)] == ["vt", "fwe"]
    files[1].write_text("\n")
    with pytest.raises(ValueError, match=f"--jsonl {files[1]}: holds no prompt"):
        read_questions(files)


def test_a_list_of_records_in_a_json_file_is_read(tmp_path):
    """LongBench v2's data.json."""
    (tmp_path / "data.json").write_text(json.dumps([LONGBENCH_2, LONGBENCH_2]))
    assert len(read_questions([tmp_path / "data.json"])) == 2


# ----------------------------------------------------------------------------------------- refusals


GOOD = {"input": "x", "outputs": ["y"]}


@pytest.mark.parametrize("line, message", [
    ("{", "not valid JSON"),
    pytest.param("[" * 100_000, "not valid JSON", id="deep"),
    ([], "needs a JSON object"),
    ({"input": "x"}, "needs one of outputs, answers, answer, has none"),
    ({"input": "x", "answer": None}, "needs one of outputs, answers, answer, has none"),
    (GOOD | {"answer": "y"}, "needs one of outputs, answers, answer, has outputs and answer"),
    ({"outputs": ["x"]}, "asks nothing: needs a prompt, an input or a question"),
    ({"context": "x", "outputs": ["x"]}, "asks nothing: .* or --question TEXT"),
    ({"context": "x", "input": "", "answers": ["x"]}, "asks nothing"),
    ({"input": 5, "outputs": ["x"]}, "input must be text"),
    ({"context": ["x"], "input": "x", "outputs": ["x"]}, "context and input must be text"),
    ({"prompt": "x", "context": "y", "input": "z", "answer": "x"},
     "has prompt, context and input: --ignore what is not to be read"),
    ({"input": "x", "outputs": []}, "outputs must be text or numbers"),
    ({"input": "x", "outputs": [None]}, "outputs must be text or numbers"),
    ({"input": "x", "answer": {"text": "x"}}, "answer must be text or numbers"),
    ({"input": "x", "outputs": [""]}, "outputs has an empty text"),
    (GOOD | {"answer_prefix": 5}, "answer_prefix must be text"),
    (GOOD | {"metric": ["all"]}, "evaluation .'all'. is not known here; choose --metric all, any"),
    (GOOD | {"metric": "bleu"}, "metric or evaluation 'bleu' is not known here"),
    (GOOD | {"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more"),
    (GOOD | {"max_new_tokens": "9"}, "max_new_tokens must be a whole number, 1 or more"),
    (GOOD | {"target": ["y", "z"], "level": 3}, "not known here: target level; rename .* --ignore"),
    ({"question": "x", "answer": "18 in all.\n#### 18"}, "a whole solution .GSM8K's"),
    ({"question": "x", "answer": "#### 18"}, "a whole solution .GSM8K's"),
    ({"question": "x", "answer": " "}, "answer has an empty text"),
    ({"question": "x", "answer": True}, "answer must be text or numbers"),
    ({"question": "x", "answer": float("nan")}, "answer has an empty text"),
    (GOOD | {"max_new_tokens": True}, "max_new_tokens must be a whole number"),
    (LONGBENCH_2 | {"metric": "any"}, "has choices, of which any says nothing; leave --metric out"),
    ({"input": "x", "answer": ["t", "A"], "options": ["s", "t"]}, "'t' and 'A' are two choices"),
    ({"input": "x", "answer": ["u", "A"], "options": ["s", "t"]}, "'u' and 'A' are two choices"),
    (GOOD | {"task": "math_calc"}, "math_calc is scored by a rule of its own"),
    (GOOD | {"task": "code_run"}, "code_run is scored by a rule of its own"),
    ({"question": "x", "choices": ["a", "b"], "answer": 2}, "answer .2. is none"),
    ({"question": "x", "choices": ["a", "b"], "answer": -1}, "answer .-1. is none"),
    ({"question": "x", "choices": {"text": ["a", "b"]}, "answer": 1}, "needs 2 to 4 choices"),
    (LONGBENCH_2 | {"choice_E": "Five"}, "not known here: choice_E; rename .*--ignore the rest"),
    (LONGBENCH_2 | {"choice_B": None}, "needs 2 to 4 choices, all text"),
    (LONGBENCH_2 | {"answer": "E"}, "the answer 'E' is none of the choices"),
    (LONGBENCH_2 | {"answer": "AB"}, "the answer 'AB' is none of the choices"),
    (LONGBENCH_2 | {"answer": "One factor"}, "the answer 'One factor' is none of the choices"),
    (LONGBENCH_2 | {"answer": ["A", "B"]}, "the answer 'A, B' is none of the choices"),
    (LONGBENCH_2 | {"question": ""}, "asks nothing"),
    ({"input": "x", "answer": "y", "options": ["y"]}, "needs 2 to 4 choices"),
    ({"input": "x", "answer": "y", "options": ["y", 2]}, "needs 2 to 4 choices, all text"),
    ({"input": "x", "answer": "y", "options": list("abcdy")}, "needs 2 to 4 choices"),
    ({"input": "x", "answer": "y", "options": ["a", "b"]}, "the answer 'y' is none"),
    ({"input": "x", "answer": "C", "options": ["a", "b"]}, "the answer 'C' is none"),
    ({"input": "x", "answer": ["s", "t"], "options": ["s", "t"]}, "the answer 's, t' is none"),
    ({"input": "x", "answer": ["A", "s"], "options": ["s", "t"]}, "the answer 'A, s' is none"),
    ({"input": "x", "answer": ["s", "s", "A"], "options": ["s", "t"]}, "'s, s, A' is none"),
    ({"input": "x", "instructions": ["a"], "outputs": []}, "lists of one length"),
    ({"input": "x", "instructions": "a", "outputs": "b"}, "lists of one length"),
    ({"instructions": ["a"], "input": "x", "outputs": ["b"], "context": "c"},
     "has instructions and context: --ignore what is not to be read"),
    ({"instructions": ["a"], "outputs": ["b"], "question": "q", "context": "c"},
     "has instructions and context and question"),
    (GOOD | {"template": "llama3"}, "template must be plain or chat"),
    (GOOD | {"template": ["chat"]}, "template must be plain or chat"),
    (GOOD | {"template": "chat", "system": ["Be brief."]}, "system must be text"),
    (GOOD | {"template": "plain", "system": "Be brief."}, "system: only a chat prompt has"),
    (GOOD | {"system": "Be brief."}, "system: only a chat .* write template: chat .* --ignore sys"),
    ({"instructions": ["", ""], "input": "x", "outputs": ["a", "b"]}, "asks nothing"),
])
def test_a_record_that_cannot_be_read_whole_is_named(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(ValueError, match=f"^{path}, line 2: .*{message}") as error:
        read_questions([path])
    assert "\n" not in str(error.value)


def test_lengths_of_a_table_are_whole_numbers(read):
    """A column with a null in it has floats."""
    assert read(GOOD | {"length": 4050.0})[0].length == "4096"
    assert read(GOOD | {"length": "8k+"})[0].length == "8k+"


def test_mmlus_answer_is_the_number_of_a_choice(read):
    record = {"question": "Q?", "subject": "law", "choices": ["no", "yes"], "answer": 1}
    [question] = read(record)
    assert "\nA. no\nB. yes\n" in question.text
    assert question.answers == ["yes", "B"]
    assert question.metric == "option"


def test_keys_to_ignore_are_as_if_absent(read):
    record = {"context": "C", "input": "I", "answers": ["x"], "title": "T", "year": 1999}
    with pytest.raises(ValueError, match="not known here: title year"):
        read(record)
    assert read(record, ignore=["title", "year"])[0].text == "C\n\nI"
    assert read(record, ignore=["title", "year", "context"])[0].text == "I"


def test_what_is_asked_of_a_context_alone_can_be_said(read):
    """LongBench's gov_report: its instruction is in LongBench's program."""
    report = LONGBENCH | {"input": "", "dataset": "gov_report"}
    summary, other = read(report, LONGBENCH, question="Summarise it.")
    assert summary.text == "Passage 1: ...\n\nSummarise it."
    assert other.text == "Passage 1: ...\n\nWho is it?"
