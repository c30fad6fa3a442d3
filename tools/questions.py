"""What the records of benchmarks ask, and how an answer is scored. `tools.answer` is the program.

A file is one of RULER, LongBench, LongBench v2, InfiniteBench, L-Eval, LV-Eval, or your own: an
object a line with prompt (or context, input, question and choices) and answers (or outputs, or
answer). tests/tools/test_questions.py shows a record of each and what is made of it. A prompt is
what the record holds, without the instructions that LongBench, InfiniteBench and LV-Eval put around
it in their programs, so their published numbers are not quite comparable.
"""
from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tools.records import RECORDS, TEXT, bare_suffix, read_records, suffix_of

# -------------------------------------------------------------------------------------- questions

# What the keys of a record are. Any other refuses its file: it may be what is asked, and the score
# of a prompt without its question means nothing.
PARTS = ("prompt", "context", "input", "question")  # of the prompt, in this order
CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")  # LongBench v2; InfiniteBench: `options`
ANSWERS = {"outputs": "all", "answers": "any", "answer": "any"}  # and the metric of each
DETAILS = ("options", "choices", "instructions", "answer_prefix", "max_new_tokens", "metric",
           "evaluation", "task", "dataset", "length", "template", "system")
NO_PART = (
    "_id", "id", "index", "source",
    "sample", "depths", "length_w_model_temp", "token_position_answer",  # tools.ruler, RULER
    "domain", "sub_domain", "difficulty",  # LongBench v2
    "subject",  # MMLU
    "language", "all_classes", "answer_keywords", "confusing_facts")  # LongBench, LV-Eval
KEYS = {*PARTS, *CHOICES, *ANSWERS, *DETAILS, *NO_PART}

LETTERS = "ABCD"
# how choices are shown, and what is said after them, for the metric of that name
CHOOSING = {
    "choice": ("({}) {}", 'Which one is right? Say "The correct answer is (X)" with its letter.'),
    "option": ("{}. {}", "Which one is right? Say its letter only."),
}

# RULER's tasks, and tokens for their answers (scripts/synthetic.yaml, data/synthetic/constants.py)
RULER_TASK = re.compile(r"niah_\w+|vt|cwe|fwe|qa_[12]")
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
OWN_RULES = ("math_calc", "code_run")  # InfiniteBench's: numbers in order, a number alone
# names of files that do not say what is asked: then their folder's does
NO_TASK = re.compile(r"(train|validation|valid|dev|test|data)(-\d+-of-\d+)?")


@dataclass(frozen=True)
class Question:
    """A prompt of a file, the right answers, and the rule that scores an answer."""

    text: str
    answer_prefix: str  # how the answer begins
    answers: list[str]
    metric: str
    max_new_tokens: int
    task: str  # a row of the table
    length: str  # its column
    # the template and system message that it was made for, if the file says so
    made_for: tuple[str | None, str | None] = (None, None)


def read_questions(files: list[Path], metric: str | None = None, max_new_tokens: int | None = None,
                   ignore: Iterable[str] = (), question: str | None = None) -> list[Question]:
    """The questions of files, one after the other.

    A record may state its own task, metric and max_new_tokens; the arguments win over them. Keys to
    `ignore` are as if absent; `question` is that of a context without one. Raises ValueError that
    says where and what is wrong.
    """
    arguments = {"metric": metric, "max_new_tokens": max_new_tokens}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    questions = []
    for file in files:
        before = len(questions)
        task = task_of(file)
        for place, record in read_records(file):
            try:
                for one in one_by_one(known_part(record, ignore)):
                    if asks_nothing(one) and question:
                        one["question"] = question
                    questions.append(parse_question(one | arguments, task))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        if len(questions) == before:
            raise ValueError(f"--jsonl {file}: holds no prompt")
    return questions


def task_of(file: Path) -> str:
    """The first of a file's own name and its folders' that says what is asked."""
    name = file.name
    if bare_suffix(file) in RECORDS + TEXT:  # not ".5_a" of qwen2.5_a
        name = name[:-len(suffix_of(file))]
    # where it is named, not where a link leads: a cache of Hugging Face's has links to blobs
    folders = [folder.name for folder in Path(os.path.abspath(file)).parents]
    return next(name for name in [name, *folders] if not NO_TASK.fullmatch(name))


def known_part(record: object, ignore: Iterable[str]) -> dict:
    """A record without keys to ignore, and without empty fields of a table (null)."""
    if not isinstance(record, dict):
        raise ValueError("needs a JSON object")
    part = {}
    for key, value in record.items():
        if value is not None and key not in ignore:
            part[key] = value
    unknown = " ".join(key for key in part if key not in KEYS)
    if unknown:
        raise ValueError(f"not known here: {unknown}; rename what is part of the question "
                         "(context, input, question) or of its answer (answers), --ignore the rest")
    return part


def one_by_one(record: dict) -> list[dict]:
    """L-Eval's `instructions` all ask something of one document, `input`: a record for each."""
    if "instructions" not in record:
        return [record]
    own = [key for key in ("context", "question") if key in record]
    if own:
        raise ValueError(f"has instructions and {' and '.join(own)}: --ignore what is not to be "
                         "read")
    rest = dict(record)
    instructions = rest.pop("instructions")
    outputs = rest.pop("outputs", None)
    document = rest.pop("input", "")
    are_lists = isinstance(instructions, list) and isinstance(outputs, list)
    if not are_lists or len(instructions) != len(outputs):
        raise ValueError("instructions and outputs must be lists of one length")
    records = []
    for question, output in zip(instructions, outputs, strict=True):
        records.append(rest | {"context": document, "question": question, "outputs": output})
    return records


def asks_nothing(record: dict) -> bool:
    return not any(record.get(key) for key in PARTS if key != "context")


def parse_question(record: dict, task: str) -> Question:
    """The question of a record; `task` is for records that name none.

    Raises ValueError that says what is wrong.
    """
    task = str(record.get("task", record.get("dataset", task)))
    text = prompt_text(record)
    answers_key, answers = right_answers(record)
    kind, choices = choices_of(record)
    if kind:
        answers = right_choice(kind, choices, answers, record[answers_key])
        text = with_choices(text, choices, kind)
    room = 128
    if RULER_TASK.fullmatch(task):  # they have their own room for an answer
        room = MAX_NEW_TOKENS[task.partition("_")[0]]
    question = Question(
        text=text,
        answer_prefix=record.get("answer_prefix", ""),
        answers=answers,
        metric=metric_of(record, task, answers, kind, ANSWERS[answers_key]),
        max_new_tokens=record.get("max_new_tokens", room),
        task=task,
        length=column(record),
        made_for=template_of(record))
    if not isinstance(question.answer_prefix, str):
        raise ValueError("answer_prefix must be text")
    if type(question.max_new_tokens) is not int or question.max_new_tokens < 1:
        raise ValueError("max_new_tokens must be a whole number, 1 or more")
    return question


def metric_of(record: dict, task: str, answers: list[str], kind: str | None, usual: str) -> str:
    """What scores an answer: the record says so, or its choices (`kind`) or its task do, else it is
    the `usual` one."""
    metric = record.get("metric", record.get("evaluation"))
    known = ", ".join(METRICS)
    if kind and metric not in (None, "choice", "option"):
        raise ValueError(f"has choices, of which {metric} says nothing; leave --metric out, or "
                         "choose choice or option")
    if metric is None and any("####" in answer for answer in answers):
        raise ValueError("the answer is a whole solution (GSM8K's, after ####); write the result "
                         "alone")
    if metric is None and task in OWN_RULES:
        raise ValueError(f"{task} is scored by a rule of its own, not known here; leave it out, or "
                         f"ask it in a run of its own with --metric {known}")
    if metric is None and task in ("qa_1", "qa_2"):  # RULER's other tasks ask for all of `outputs`
        metric = "any"
    if metric is None:
        metric = kind or usual
    if metric not in list(METRICS):  # L-Eval's evaluation: exam, rouge, LLM or human, but for f1
        raise ValueError(f"metric or evaluation {metric!r} is not known here; choose --metric "
                         f"{known}")
    return metric


def template_of(record: dict) -> tuple[str | None, str | None]:
    """(template, system message) of a record that states them."""
    template = record.get("template")
    system = record.get("system")
    if template not in (None, "plain", "chat"):
        raise ValueError("template must be plain or chat")
    if system is not None and not isinstance(system, str):
        raise ValueError("system must be text")
    if system is not None and template != "chat":
        raise ValueError("system: only a chat prompt has a system message; write template: chat "
                         "beside it, or --ignore system and give --system")
    return template, system


def prompt_text(record: dict) -> str:
    """What a record asks, but for its choices."""
    parts = {key: record[key] for key in PARTS if record.get(key)}
    if not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{' and '.join(parts)} must be text")
    if asks_nothing(record):
        raise ValueError("asks nothing: needs a prompt, an input or a question that is not empty, "
                         "or --question TEXT")
    if "prompt" in parts and len(parts) > 1:
        *others, last = parts
        raise ValueError(f"has {', '.join(others)} and {last}: --ignore what is not to be read")
    return "\n\n".join(parts.values())


def right_answers(record: dict) -> tuple[str, list[str]]:
    """(their key, the right answers) of a record."""
    keys = [key for key in ANSWERS if key in record]
    if len(keys) != 1:
        raise ValueError(f"needs one of {', '.join(ANSWERS)}, has {' and '.join(keys) or 'none'}; "
                         "rename the right answers' key, or --ignore one")
    [key] = keys
    answers = record[key] if isinstance(record[key], list) else [record[key]]
    if not answers or not all(type(answer) in (str, int, float) for answer in answers):
        raise ValueError(f"{key} must be text or numbers")
    answers = list(map(str, answers))
    if not all(answer.strip() for answer in answers) or "nan" in answers:
        raise ValueError(f"{key} has an empty text")
    return key, answers


def choices_of(record: dict) -> tuple[str | None, list[str]]:
    """(the metric that they have, the choices) of a record, or (None, [])."""
    if any(key in record for key in CHOICES):
        kind = "choice"
        choices = [record.get(key) for key in CHOICES]
    elif record.get("options") or record.get("choices"):  # InfiniteBench has empty ones, too
        kind = "option"
        choices = record.get("options") or record["choices"]
    else:
        return None, []
    are_texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not are_texts or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"needs 2 to {len(LETTERS)} choices, all text")
    return kind, choices


def right_choice(kind: str, choices: list[str], answers: list[str], original: object) -> list[str]:
    """What may be said for the right choice; `original` is the record's answer as it is."""
    letters = list(LETTERS[:len(choices)])
    last = answers[-1]
    fault = ValueError(f"the answer {', '.join(answers)[:40]!r} is none of the choices")
    if kind == "choice":  # LongBench v2: a letter, whatever the choices say
        if len(answers) > 1 or last not in letters:
            raise fault
        return [last]
    if type(original) is int and 0 <= original < len(choices):
        place = original  # MMLU: which one, from 0
    elif len(answers) == 1 and last in choices:
        place = choices.index(last)  # InfiniteBench: the text,
    elif len(answers) <= 2 and last in letters:
        place = letters.index(last)  # ... the letter, or both
    else:
        raise fault
    if len(answers) == 2 and answers[0] not in (choices[place], letters[place]):
        raise ValueError(f"the answers {answers[0][:40]!r} and {last!r} are two choices")
    return [choices[place], letters[place]]


def with_choices(text: str, choices: list[str], kind: str) -> str:
    """The prompt, then its choices and how to say which is right."""
    line, instruction = CHOOSING[kind]
    lines = map(line.format, LETTERS, choices)
    return "\n".join([text, "", *lines, "", instruction])


def column(record: dict) -> str:
    """The table's column: a length as it is if tools.ruler made it, else rounded up to a power of
    two. RULER's own are a little below one; LongBench's and LV-Eval's are numbers of words.
    """
    length = record.get("length", "all")
    if isinstance(length, float) and length.is_integer():  # of a table
        length = int(length)
    if type(length) is int and length > 0 and "template" not in record:
        length = 1 << (length - 1).bit_length()
    return str(length)


# ----------------------------------------------------------------------------------------- scores


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles (SQuAD's normalisation, arXiv 1606.05250); but
    not where nothing would be left: the letter "A." is ["a"]."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    without_articles = re.sub(r"\b(a|an|the)\b", " ", plain)  # of "dog–an", too
    return without_articles.split() or plain.split() or text.split()


def shared_words(text: str, answer: str) -> float:
    """F1 of the words that prediction and answer share (arXiv 1606.05250)."""
    prediction = Counter(words(text))
    right = Counter(words(answer))
    total = prediction.total() + right.total()
    return 2 * (prediction & right).total() / total


def share_of_answers(text: str, answers: list[str]) -> float:
    """RULER's string_match_all (arXiv 2404.06654)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def any_answer(text: str, answers: list[str]) -> float:
    """RULER's string_match_part."""
    return float(any(answer.lower() in text.lower() for answer in answers))


def best_shared_words(text: str, answers: list[str]) -> float:
    return max(shared_words(text, answer) for answer in answers)


def same_words(text: str, answers: list[str]) -> float:
    return float(any(words(text) == words(answer) for answer in answers))


def stated_choice(text: str, answers: list[str]) -> float:
    """LongBench v2's rule (pred.py of THUDM/LongBench): the letter after "The correct answer is",
    in brackets if any is, asterisks left out; without these words an answer is wrong."""
    plain = text.replace("*", "")
    match = (re.search(r"The correct answer is \(([A-D])\)", plain)
             or re.search(r"The correct answer is ([A-D])", plain))
    return float(match is not None and match[1] in answers)


def chosen_option(text: str, answers: list[str]) -> float:
    """InfiniteBench's rule of En.MC (src/compute_scores.py). What counts is, of these, the first
    that is there: a letter at the very beginning; the option or letter as the whole text; what
    follows "answer is" and the like, one character later; a letter that stands alone."""
    if text[:1] in tuple(LETTERS):
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    plain = re.sub(r"[\n\"'.,?!{}]", " ", text)
    plain = re.sub(" +", " ", plain)  # other white space stays
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        _, separator, rest = plain.partition(lead)
        if separator:
            return float(rest[1:].startswith(tuple(answers)))
    letters = [word for word in plain.split() if word in LETTERS]  # so is "AB", as published
    return float(bool(letters) and letters[0] in answers)


# score in [0, 1] of a text against the right answers
METRICS = {
    "all": share_of_answers,
    "any": any_answer,
    "f1": best_shared_words,
    "exact": same_words,
    "choice": stated_choice,
    "option": chosen_option,
}


def printable(text: str) -> str:
    """A prediction as RULER scores it: control characters are line breaks, nothing around it."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()
