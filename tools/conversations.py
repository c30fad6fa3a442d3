"""Records of public chat sets to messages; one of which anything is not understood is not used.

    messages, conversations, conversation    turns, with OpenAI's keys or ShareGPT's; beside them
        answer                               AceMath's last turn, if the user has the last of these
    a pair of PAIRS                          question and answer, and beside them
        input, context, passage              a text that the question is about: it follows it
        history                              earlier [question, answer] pairs
    system, system_prompt                    the system message
    what SAYS_NOTHING names                  nothing
    any other key that has a value           a reason to drop the record

A turn has {role, content} or {from, value}. A content may be a list of text parts. weight 0
(OpenAI) or train false (Axolotl) on an answer is kept as weight 0: sft.py puts no loss there.
"""
from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from sft import carries_loss

TURNS = ("messages", "conversations", "conversation")
PAIRS = (  # question, answer
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly, Evol-Instruct
    ("query", "response"),  # MetaMath
    ("query", "answer"),  # CodeFeedback
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),  # OpenOrca
    ("question", "answer"),  # GSM8K
    ("question", "generated_solution"),  # OpenMathInstruct 1
    ("problem", "generated_solution"),  # OpenMathInstruct 2
    ("problem", "solution"))  # Magicoder, MATH
PASSAGES = ("input", "context", "passage")
SYSTEM = ("system", "system_prompt")
ROLES = {"system": "system", "developer": "system", "human": "user", "user": "user",
         "prompter": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "model": "assistant"}
TURN_KEYS = frozenset(  # the first six are read, the others say nothing
    "role from content value weight train id language timestamp created model toxic redacted "
    "country state hashed_ip header turn_identifier markdown".split())
# beside turns they are about them; beside a pair they may be part of what is asked
BESIDE_TURNS = ("prompt", "language", "task", "topic", "subject")
NOTHING = (None, "", "<noinput>", "[]", "{}", [], {})  # values of a key that is not used

# Keys that say where a record comes from or what it is worth, or say again what it says.
SAYS_NOTHING = frozenset(
    # which one
    "file parent_id id _id idx index raw_index uuid hash prompt_id question_id conversation_id "
    "conversation_hash "
    # from where
    "source data_source dataset origin resource problem_source seed url license "
    "model model_name generator openai_fingerprint timestamp created date version "
    # of what kind
    "category type problem_type question_type domain split subset lang "
    # how large, how good, what was taken out
    "turn num_turns length token_count num_tokens difficulty level score rating markdown "
    "openai_moderation detoxify_moderation toxic redacted state country hashed_ip header "
    "turn_identifier views skip_prompt_formatting custom_instruction avatarUrl "
    # said again: the question before it was reworded, the answer that grades
    "original_question answer expected_answer is_correct".split())


def to_messages(record: object, system: str | None, ignored: Iterable[str],
                cut_off: Counter) -> list[dict] | str:
    """Messages: a system's if there is one, then user and assistant by turns; or why not.

    `system` is for a record that has no system message; `ignored`: more keys that say nothing;
    `cut_off` counts turns, see alternate.
    """
    # 1. Where the record has its turns, and which keys are then used.
    if not isinstance(record, dict):
        return "not a chat record"
    lists = [key for key in TURNS if record.get(key) is not None]
    pairs = [pair for pair in PAIRS if record.keys() >= set(pair)]
    if lists:
        turns = record[lists[0]]
        known = {lists[0], *BESIDE_TURNS, *repeated(record, turns)}
    elif pairs:
        turns = turns_of(record, *pairs[0])
        known = {*pairs[0], *PASSAGES, "history"}
        if pairs[0][0] == "instruction":
            known.add("text")  # Alpaca's whole prompt; beside a question it might be a passage
    else:
        return "not a chat record"
    # 2. Nothing else may be said there.
    unknown = not_understood(record, {*known, *SYSTEM, *SAYS_NOTHING, *ignored})
    if unknown:
        return unknown
    if record.get("is_correct") in (False, 0):
        return "marked as not correct"
    # 3. The turns, one by one.
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "turns that cannot be read"
    messages = []
    for turn in turns:
        message = not_understood(turn, {*TURN_KEYS, *ignored}) or read_turn(turn)
        if isinstance(message, str):
            return message
        messages.append(message)
    if lists and messages and messages[-1]["role"] == "user":
        answer = record.get("answer")
        if isinstance(answer, str):
            messages.append({"role": "assistant", "content": answer})
    # 4. The system message: one.
    systems = [record[key] for key in SYSTEM if says_something(record.get(key))]
    if messages and messages[0]["role"] == "system":
        systems.append(messages.pop(0)["content"])
    if not all(isinstance(own, str) for own in systems):
        return "content is not text"
    systems = {own for own in systems if own.strip()}
    if len(systems) > 1:
        return "two system messages"
    return alternate(messages, systems.pop() if systems else system, cut_off)


def says_something(value: object) -> bool:
    is_number_missing = value != value  # NaN, of a table
    return not is_number_missing and value not in NOTHING


def not_understood(content: dict, known: set[str]) -> str | None:
    """Names the keys that say something, and not known what; None if there are none."""
    keys = [key for key, value in content.items() if key not in known and says_something(value)]
    return f"not understood: {' '.join(keys)}" if keys else None


def repeated(record: dict, turns: object) -> set[str]:
    """The keys of pairs, and text, that only say once more what the turns beside them say: one of
    them, or (a text in a chat template) all of them."""
    contents = []
    for turn in turns if isinstance(turns, list) else []:
        content = value_of(turn, "content", "value") if isinstance(turn, dict) else None
        contents.append(content.strip() if isinstance(content, str) else None)
    keys = set()
    for key in {*itertools.chain(*PAIRS), "text"} & record.keys():
        value = record[key]
        if isinstance(value, str) and contents and None not in contents:
            one = value.strip() in contents
            if one or all(content in value for content in contents):
                keys.add(key)
    return keys


def value_of(turn: dict, first: str, second: str) -> object:
    """What a turn has at one of two keys."""
    return turn.get(second) if turn.get(first) is None else turn[first]


def turns_of(record: dict, question: str, answer: str) -> list[dict] | None:
    """The turns of a record with question and answer; None if its history has no pairs."""
    asked = [record[question]]
    asked += [record[key] for key in PASSAGES if says_something(record.get(key))]
    if all(isinstance(text, str) for text in asked):
        asked = "\n\n".join(asked)
    history = record.get("history") or []
    if not isinstance(history, list):
        return None
    turns = []
    for pair in [*history, [asked, record[answer]]]:
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def read_turn(turn: dict) -> dict | str:
    """{role, content}, with weight 0 where an answer carries no loss; or why not."""
    for first, second in (("role", "from"), ("content", "value")):
        values = [turn[key] for key in (first, second) if turn.get(key) is not None]
        if len(values) == 2 and values[0] != values[1]:
            return f"{first} and {second} differ"
    stated = value_of(turn, "role", "from")
    role = ROLES.get(stated.lower()) if isinstance(stated, str) else None
    if role is None:
        return f"unknown role {stated!r}"
    content = value_of(turn, "content", "value")
    if isinstance(content, list):  # OpenAI's parts
        parts = []
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if is_text and not not_understood(part, {"type", "text"}):
                parts.append(part.get("text"))
            else:
                parts.append(None)
        content = "\n".join(parts) if parts and all(isinstance(p, str) for p in parts) else None
    if not isinstance(content, str):
        return "content is not text"
    message = {"role": role, "content": content}
    for key in ("weight", "train"):
        if turn.get(key) not in (None, 0, 1):
            return f"{key} is neither 0 nor 1"
        if role != "assistant" and turn.get(key):
            return f"loss on what the {role} says"
        if role == "assistant" and turn.get(key) == 0:
            message["weight"] = 0
    return message


def alternate(messages: list[dict], system: str | None, cut_off: Counter) -> list[dict] | str:
    """The system message, then user and assistant by turns; or why they are not so.

    Assistant turns before the first user's answer nothing (ShareGPT has conversations cut in two),
    and user turns after the last answer have none: both are cut off, and counted in `cut_off`.
    """
    whole = len(messages)
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    cut_off["turns"] += whole - len(messages)
    if not messages:
        return "no answer to a user"
    if not all(message["content"].strip() for message in messages):
        return "empty turn"
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            return "roles do not alternate"
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if not any(map(carries_loss, messages)):
        return "no answer to learn"
    return messages
