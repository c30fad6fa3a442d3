"""What records of a file ask, and how answers are scored: RULER's, LongBench-like sets, your own.

A line of the file is a JSON object with prompt (or context and input) and answers (or outputs, or
answer). `tools.answer` reads, answers and scores them.
"""
from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import data

# -------------------------------------------------------------------------------------- questions


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


def parse_question(record: dict, task: str, metric: str | None,
                   max_new_tokens: int | None) -> Question:
    """The question of a record; `task` is for records that name none.

    Raises ValueError, TypeError, LookupError or AttributeError if it is none.
    """
    if "prompt" in record:
        text = record["prompt"]
    else:
        parts = [record[key] for key in ("context", "input") if record.get(key)]
        text = "\n\n".join(parts)
    stated = [record[key] for key in ("outputs", "answers", "answer") if key in record]
    answers = stated[0] if isinstance(stated[0], list) else [stated[0]]
    question = Question(
        text=text,
        answer_prefix=record.get("answer_prefix", ""),
        answers=[str(answer) for answer in answers],
        metric=metric or record.get("metric", "all"),
        max_new_tokens=max_new_tokens or record.get("max_new_tokens", 128),
        task=str(record.get("task", task)),
        length=str(record.get("length", "all")),
        made_for=(record.get("template"), record.get("system")))

    if not isinstance(text, str) or not isinstance(question.answer_prefix, str):
        raise ValueError("text is no text")
    if not text or not answers or not all(question.answers):
        raise ValueError("a text is empty")
    if not all(isinstance(answer, (str, int, float)) for answer in answers):
        raise ValueError("an answer is neither text nor a number")
    if question.metric not in METRICS:
        raise ValueError("unknown metric")
    if not isinstance(question.max_new_tokens, int) or question.max_new_tokens < 1:
        raise ValueError("no room for an answer")
    return question


def read_questions(path: Path, metric: str | None = None,
                   max_new_tokens: int | None = None) -> list[Question]:
    """Questions of a .jsonl file: RULER's (input, answer_prefix, outputs, length), InfiniteBench's
    (context, input, answer), LV-Eval's (context, input, answers), or prompt and answers.

    A record may state its own task, metric and max_new_tokens; the arguments win over them, and
    without either they are the file's name, "all" and 128. Raises ValueError naming the line.
    """
    task = path.name.split(".")[0]
    questions = []
    for number, line in data.read_lines(path):
        try:
            question = parse_question(json.loads(line), task, metric, max_new_tokens)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}, line {number}: needs a JSON object with prompt (or context and input), "
                "answers (or outputs, or answer), and if stated a metric of "
                f"{', '.join(METRICS)} and max_new_tokens of 1 or more") from None
        questions.append(question)
    if not questions:
        raise ValueError(f"--jsonl {path}: holds no prompt")
    return questions


# ----------------------------------------------------------------------------------------- scores


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles (SQuAD's normalisation, arXiv 1606.05250)."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def shared_words(text: str, answer: str) -> float:
    """F1 of the words that prediction and answer share (arXiv 1606.05250)."""
    said = Counter(words(text))
    right = Counter(words(answer))
    return 2 * (said & right).total() / max(1, said.total() + right.total())


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


# score in [0, 1] of a text against the right answers
METRICS = {"all": share_of_answers, "any": any_answer, "f1": best_shared_words, "exact": same_words}


def printable(text: str) -> str:
    """A prediction as RULER scores it: control characters are line breaks, nothing around it."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()
