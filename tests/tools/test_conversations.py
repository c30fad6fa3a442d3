"""tools.conversations: a record is used with all that it says, or dropped with the reason."""
import itertools
import math
from collections import Counter

import pytest

from sft import fault_in
from tools import conversations
from tools.conversations import PAIRS, SAYS_NOTHING, TURNS


def to_messages(record, system=None, ignored=()):
    """The messages, or why there are none."""
    try:
        return conversations.to_messages(record, system, ignored, Counter())
    except conversations.NotUsed as error:
        return str(error)


def said(messages):
    """"u:question a:answer", an answer without loss as "A"."""
    if isinstance(messages, str):
        return messages
    letters = []
    for message in messages:
        letter = message["role"][0]
        letters.append((letter.upper() if message.get("weight") == 0 else letter)
                       + ":" + message["content"])
    return " ".join(letters)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


Q, A = turn("user", "q"), turn("assistant", "a")
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TEXT = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
IMAGE = [{"type": "image_url", "image_url": "u"}]


@pytest.mark.parametrize("record, expected", [
    # the layouts
    ({"messages": [turn("system", "s"), Q, A]}, "s:s u:q a:a"),
    ({"conversations": SHARE}, "u:q a:a"),
    ({"conversations": [{"from": "system", "value": "s"}, *SHARE, *SHARE]}, "s:s u:q a:a u:q a:a"),
    ({"conversations": [Q, A]}, "u:q a:a"),
    ({"conversation": [Q, A], "conversation_id": "1", "model": "m", "turn": 1,
      "openai_moderation": [{"flagged": False}], "redacted": False, "language": "English"},
     "u:q a:a"),  # LMSYS
    ({"prompt": "q", "prompt_id": "7", "messages": [Q, A]}, "u:q a:a"),  # UltraChat
    ({"messages": [Q], "answer": "a"}, "u:q a:a"),  # AceMath, the paper's own samples
    ({"messages": [Q, A, turn("user", "q2")], "answer": "a2"}, "u:q a:a u:q2 a:a2"),
    ({"messages": [Q, A], "answer": "5"}, "u:q a:a"),  # what grades it
    ({"messages": [Q], "answer": 5}, "no answer to a user"),
    ({"instruction": "do", "input": "this", "output": "done"}, "u:do\n\nthis a:done"),
    ({"instruction": "do", "input": "", "output": "done", "text": "Below is"}, "u:do a:done"),
    ({"instruction": "do", "input": "<noinput>", "output": "done"}, "u:do a:done"),
    ({"instruction": "do", "input": None, "output": "done"}, "u:do a:done"),
    ({"instruction": "do", "input": math.nan, "output": "done"}, "u:do a:done"),  # of a table
    ({"instruction": "do", "output": "done", "system": "s", "history": [["q", "a"], ["q2", "a2"]]},
     "s:s u:q a:a u:q2 a:a2 u:do a:done"),
    ({"instruction": "do", "context": "a text", "response": "done", "category": "qa"},
     "u:do\n\na text a:done"),  # Dolly
    ({"question": "q", "passage": "a text", "answer": "a"}, "u:q\n\na text a:a"),
    ({"type": "MATH_AnsAug", "query": "q", "original_question": "o", "response": "a"}, "u:q a:a"),
    ({"query": "q", "answer": "a", "resource": "evol", "lang": "python"}, "u:q a:a"),
    ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, "s:s u:q a:a"),
    ({"problem": "q", "generated_solution": "a", "expected_answer": "5", "problem_source": "x"},
     "u:q a:a"),
    ({"question": "q", "generated_solution": "a", "expected_answer": "5", "is_correct": True},
     "u:q a:a"),
    ({"question": "q", "generated_solution": "a", "is_correct": False}, "marked as not correct"),
    ({"question": "q", "generated_solution": "a", "is_correct": 0}, "marked as not correct"),
    ({"prompt": "q", "completion": "a"}, "u:q a:a"),
    ({"problem": "q", "solution": "a", "answer": "5", "level": "3"}, "u:q a:a"),
    ({"messages": None, "query": "q", "response": "a"}, "u:q a:a"),
    # roles
    ({"messages": [turn("Human", "q"), turn("GPT", "a")]}, "u:q a:a"),
    ({"messages": [turn("developer", "s"), Q, A]}, "s:s u:q a:a"),
    ({"messages": [Q, turn("function_call", "{}"), turn("observation", "5"), A]},
     "unknown role 'function_call'"),
    ({"messages": [turn(None, "q"), A]}, "unknown role None"),
    ({"messages": [turn(["user"], "q"), A]}, "unknown role ['user']"),
    ({"messages": [{}]}, "unknown role None"),
    # contents
    ({"messages": [turn("user", TEXT), A]}, "u:one\ntwo a:a"),
    ({"messages": [turn("user", IMAGE), A]}, "content is not text"),
    ({"messages": [turn("user", [*TEXT, *IMAGE]), A]}, "content is not text"),
    ({"messages": [turn("user", []), A]}, "content is not text"),
    ({"messages": [Q, turn("assistant", None)]}, "content is not text"),
    ({"instruction": "do", "input": "", "output": 42}, "content is not text"),
    ({"instruction": 5, "input": "x", "output": "y"}, "content is not text"),
    ({"question": "q", "context": ["x"], "answer": "a"}, "content is not text"),
    # what is not understood
    ({"messages": [Q, turn("assistant", None, tool_calls=[{"id": "c"}])]},
     "not understood: tool_calls"),
    ({"messages": [Q, turn("assistant", "a", tool_calls=None, name="")]}, "u:q a:a"),
    ({"messages": [Q, A], "tools": [{"name": "f"}]}, "not understood: tools"),
    ({"messages": [Q, A], "tools": "[]"}, "u:q a:a"),
    ({"messages": [Q, A], "context": "a text"}, "not understood: context"),
    ({"messages": [turn("user", " q\n"), A], "problem": "q", "solution": " a "}, "u: q\n a:a"),
    ({"messages": [Q, A], "problem": "other"}, "not understood: problem"),
    ({"messages": [Q, A], "text": "a long passage"}, "not understood: text"),
    ({"messages": [Q, A, Q], "completion": "a2"}, "not understood: completion"),
    ({"messages": [turn("user", "q", value="other"), A]}, "content and value differ"),
    ({"messages": [turn("user", "q", value="q"), A]}, "u:q a:a"),
    ({"messages": [{"role": "user", "from": "gpt", "content": "q"}, A]}, "role and from differ"),
    ({"messages": [Q, turn("assistant", "a", answer="b")]}, "not understood: answer"),
    ({"messages": [Q, turn("assistant", "a", score=-1)]}, "not understood: score"),
    ({"messages": [turn("user", [{"type": "text", "text": "q", "image": "u"}]), A]},
     "not understood: image"),
    ({"task": "Translate", "question": "q", "answer": "a"}, "not understood: task"),
    ({"instruction": "do", "output": "a", "language": "German"}, "not understood: language"),
    ({"messages": [Q, A], "language": "en"}, "u:q a:a"),
    ({"instruction": "do", "output": "a", "title": "T"}, "not understood: title"),
    ({"conversations": SHARE, "skip_prompt_formatting": True, "views": 3}, "u:q a:a"),
    ({"messages": [Q, A], "task": "Translate into German"}, "not understood: task"),
    ({"messages": [Q, A], "prompt": "q"}, "u:q a:a"),
    ({"messages": [Q, A], "prompt": "other"}, "not understood: prompt"),
    ({"question": "q", "answer": "a", "seed": "a passage?"}, "not understood: seed"),
    ({"problem": "q", "solution": "a", "seed": "code"}, "u:q a:a"),  # Magicoder
    ({"messages": [Q, A], "conversations": SHARE}, "not understood: conversations"),
    ({"instruction": "do", "output": "a", "response": "b"}, "not understood: response"),
    ({"question": "q", "answer": "a", "text": "a passage?"}, "not understood: text"),
    ({"question": "q", "answer": "a", "choices": ["a", "b"]}, "not understood: choices"),
    ({"instruction": "do", "output": "a", "history": [["q"]]}, "turns that cannot be read"),
    ({"instruction": "do", "output": "a", "history": "q"}, "turns that cannot be read"),
    ({"instruction": "do", "output": "a", "history": 5}, "turns that cannot be read"),
    ({"instruction": "do", "output": "a", "history": [["q", "a", "b"]]},
     "turns that cannot be read"),
    ({"instruction": "do", "output": "a", "input": "one", "context": "two", "passage": "three"},
     "u:do\n\none\n\ntwo\n\nthree a:a"),
    ({"prompt": "q", "response": "a"}, "u:q a:a"),
    ({"instruction": "q", "response": "a"}, "u:q a:a"),
    ({"query": "q", "response": "a", "answer": "5"}, "u:q a:a"),  # a solution, and what grades it
    ({"messages": [7]}, "turns that cannot be read"),
    ({"messages": "x"}, "turns that cannot be read"),
    ({"prompt": "q", "chosen": [Q, A], "rejected": []}, "not a chat record"),
    ({}, "not a chat record"),
    (7, "not a chat record"),
    (None, "not a chat record"),
    (["x"], "not a chat record"),
    # system messages
    ({"messages": [Q, A], "system": "s"}, "s:s u:q a:a"),
    ({"messages": [turn("system", "s"), Q, A], "system": "s"}, "s:s u:q a:a"),
    ({"messages": [turn("system", "s"), Q, A], "system": "t"}, "two system messages"),
    ({"messages": [turn("system", " "), Q, A]}, "u:q a:a"),
    ({"messages": [Q, A], "system": 5}, "content is not text"),
    # loss
    ({"messages": [Q, turn("assistant", "bad", weight=0), Q, turn("assistant", "a", weight=1)]},
     "u:q A:bad u:q a:a"),
    ({"messages": [turn("user", "q", train=False), turn("assistant", "bad", train=False), Q,
                   turn("assistant", "a", train=True)]}, "u:q A:bad u:q a:a"),
    ({"conversations": [{"from": "system", "value": "s", "weight": None},
                        {"from": "human", "value": "q", "weight": 0},
                        {"from": "gpt", "value": "a", "weight": 1}]}, "s:s u:q a:a"),  # SlimOrca
    ({"messages": [Q, turn("assistant", "bad", weight=0)]}, "no answer to learn"),
    ({"messages": [Q, turn("assistant", "a", weight=0.5)]}, "weight is neither 0 nor 1"),
    ({"messages": [Q, turn("assistant", "a", weight=[0])]}, "weight is neither 0 nor 1"),
    ({"messages": [turn("user", "q", train=True), A]}, "loss on what the user says"),
])
def test_a_record_is_used_with_all_it_says_or_dropped_with_the_reason(record, expected):
    messages = to_messages(record)
    assert said(messages) == expected
    if not isinstance(messages, str):
        assert fault_in({"messages": messages}) is None  # so sft.py takes it


@pytest.mark.parametrize("turns, expected", [
    ("s:s u:1 a:2", "s:s u:1 a:2"),
    ("a:0 u:1 a:2", "u:1 a:2"),
    ("s:s a:0 a:0 u:1 a:2", "s:s u:1 a:2"),
    ("u:1 a:2 u:3", "u:1 a:2"),
    ("a:0 u:1 a:2 u:3 u:4", "u:1 a:2"),
    ("s: u:1 a:2", "u:1 a:2"),
    ("u:1 a:2 u:", "u:1 a:2"),
    ("u:1 a:", "empty turn"),
    ("u:1 a: u:3 a:4", "empty turn"),
    ("u:1 a:2 u: a:4", "empty turn"),
    ("u:1 u:2 a:3", "roles do not alternate"),
    ("u:1 a:2 a:3", "roles do not alternate"),
    ("u:1 s:s a:2", "roles do not alternate"),
    ("u:1 a:2 s:s u:1 a:2", "roles do not alternate"),
    ("u:1", "no answer to a user"),
    ("a:1", "no answer to a user"),
    ("s:s", "no answer to a user"),
    ("", "no answer to a user"),
    ("u:1 t:2 a:3", "unknown role 'tool'"),
])
def test_turns_are_cleaned_or_the_record_dropped(turns, expected):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [turn(names[part[0]], part[2:]) for part in turns.split()]
    assert said(to_messages({"messages": messages})) == expected


@pytest.mark.parametrize("role", ["human", "user", "prompter", "User"])
def test_roles_of_a_user(role):
    assert said(to_messages({"messages": [turn(role, "q"), A]})) == "u:q a:a"


@pytest.mark.parametrize("role", ["assistant", "gpt", "chatgpt", "bing", "bard", "model"])
def test_roles_of_an_assistant(role):
    assert said(to_messages({"messages": [Q, turn(role, "a")]})) == "u:q a:a"


def test_turns_that_are_cut_off_are_counted():
    cut_off = Counter()
    for turns in ([Q, A], [A, A, Q, A], [Q, A, Q], [A, Q, A, Q, Q]):
        assert said(conversations.to_messages({"messages": turns}, None, (), cut_off)) == "u:q a:a"
    assert cut_off.total() == 0 + 2 + 1 + 3
    with pytest.raises(conversations.NotUsed):
        conversations.to_messages({"messages": [A, Q]}, None, (), cut_off)
    assert cut_off.total() == 6  # none of a record that is not used


def test_a_system_message_is_for_records_without_one_and_ignored_keys_say_nothing():
    assert said(to_messages({"messages": [Q, A]}, "Be brief.")) == "s:Be brief. u:q a:a"
    own = {"messages": [turn("system", "own"), Q, A]}
    assert said(to_messages(own, "Be brief.")) == "s:own u:q a:a"
    record = {"instruction": "q", "input": "i", "system": "s", "output": "a"}
    assert said(to_messages(record, ignored=["input", "system"])) == "u:q a:a"
    record = {"messages": [Q, turn("assistant", "a", mood="glad")], "quality": 3}
    assert to_messages(record) == "not understood: quality"
    assert to_messages(record, ignored=["quality"]) == "not understood: mood"
    assert to_messages(record | {"prize": 1}) == "not understood: quality prize"
    assert said(to_messages(record, ignored=["quality", "mood"])) == "u:q a:a"


def test_no_key_has_two_meanings():
    used = {*TURNS, "system", "system_prompt", "history", "input", "context", "passage"}
    questions = {question for question, _ in PAIRS}
    answers = {answer for _, answer in PAIRS}
    assert not used & SAYS_NOTHING
    assert not questions & answers
    assert not questions & (used | SAYS_NOTHING)
    # "answer" alone is both: beside a solution it is what grades it
    assert answers & (used | SAYS_NOTHING) == {"answer"}
    for first, second in itertools.combinations(PAIRS, 2):
        assert first != second
