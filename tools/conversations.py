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
NOTHING = (None, "", "<noinput>", "[]", "{}", [], {})  # values of a key that is not used

# Keys that say where a record comes from or what it is worth, or say again what it says.
SAYS_NOTHING = frozenset(
    # which one
    "file parent_id id _id idx index raw_index uuid hash prompt_id question_id conversation_id "
    "conversation_hash "
    # from where
    "source data_source dataset origin resource problem_source url license "
    "model model_name generator openai_fingerprint timestamp created date version "
    # of what kind
    "category type problem_type question_type domain split subset lang "
    # how large, how good, what was taken out
    "turn num_turns length token_count num_tokens difficulty level score rating markdown "
    "openai_moderation detoxify_moderation toxic redacted state country hashed_ip header "
    "turn_identifier views skip_prompt_formatting avatarUrl "
    # said again: the question before it was reworded, the answer that grades
    "original_question answer expected_answer is_correct".split())


class NotUsed(ValueError):
    """Something of a record is not understood, or there is nothing to learn from it; says what."""


def to_messages(record: object, system: str | None, ignored: Iterable[str],
                cut_off: Counter) -> list[dict]:
    """Messages: a system's if there is one, then user and assistant by turns. Raises NotUsed.

    `system` is for a record that has no system message; `ignored`: more keys that say nothing;
    `cut_off` counts turns, see alternating.
    """
    # 1. Where the record has its turns, and which keys are then read.
    if not isinstance(record, dict):
        raise NotUsed("not a chat record")
    record = {key: value for key, value in record.items() if key not in ignored}
    lists = [key for key in TURNS if record.get(key) is not None]
    pairs = [pair for pair in PAIRS if record.keys() >= set(pair)]
    if lists:
        turns = list_of_turns(record, lists[0])
        read = {lists[0], "language", *repeated(record, turns)}
        if "prompt_id" in record:
            read.add("prompt")  # UltraChat's: the first turn
    elif pairs:
        turns = turns_of_pair(record, *pairs[0])
        read = {*pairs[0], *PASSAGES, "history"}
        if pairs[0][0] == "instruction":
            read.add("text")  # Alpaca's whole prompt; beside a question it might be a passage
        if pairs[0][0] == "problem":
            read.add("seed")  # Magicoder's: the code that the problem was made of
    else:
        raise NotUsed("not a chat record")
    # 2. Nothing else may be said there.
    check_keys(record, {*read, *SYSTEM, *SAYS_NOTHING})
    if record.get("is_correct") in (False, 0):
        raise NotUsed("marked as not correct")
    # 3. The turns, one by one, and the system message.
    messages = []
    for turn in turns:
        check_keys(turn, {*TURN_KEYS, *ignored})
        messages.append(read_turn(turn))
    own = system_message(record, messages)
    return alternating(messages, own or system, cut_off)


def says_something(value: object) -> bool:
    """Whether a key with this value says anything; NaN, of a table, does not equal itself."""
    return value == value and value not in NOTHING


def check_keys(content: dict, known: set[str]) -> None:
    """NotUsed if a key says something, and it is not known what."""
    unknown = [key for key in content if key not in known and says_something(content[key])]
    if unknown:
        raise NotUsed(f"not understood: {' '.join(unknown)}")


# ------------------------------------------------------------------------------------------- turns


def list_of_turns(record: dict, key: str) -> list[dict]:
    """The turns in a list; if the user has the last one, `answer` is the next (AceMath)."""
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise NotUsed("turns that cannot be read")
    answer = record.get("answer")
    if turns and isinstance(answer, str) and role_of(turns[-1]) == "user":
        turns = [*turns, {"role": "assistant", "content": answer}]
    return turns


def turns_of_pair(record: dict, question: str, answer: str) -> list[dict]:
    """The turns of a question and its answer, after those of the history."""
    asked = [record[question]]
    asked += [record[key] for key in PASSAGES if says_something(record.get(key))]
    if not all(isinstance(text, str) for text in asked):
        raise NotUsed("content is not text")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise NotUsed("turns that cannot be read")
    turns = []
    for pair in [*history, ["\n\n".join(asked), record[answer]]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise NotUsed("turns that cannot be read")
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def repeated(record: dict, turns: list[dict]) -> set[str]:
    """The keys of pairs that only say once more what one of the turns beside them says."""
    contents = [str(either(turn, "content", "value")).strip() for turn in turns]
    keys = {*itertools.chain(*PAIRS)} & record.keys()
    return {key for key in keys if str(record[key]).strip() in contents}


def read_turn(turn: dict) -> dict:
    """{role, content}, with weight 0 where an answer carries no loss."""
    message = {"role": role_of(turn), "content": content_of(turn)}
    for key in ("weight", "train"):
        weight = turn.get(key)
        if weight not in (None, 0, 1):
            raise NotUsed(f"{key} is neither 0 nor 1")
        if weight and message["role"] != "assistant":
            raise NotUsed(f"loss on what the {message['role']} says")
        if weight == 0 and message["role"] == "assistant":
            message["weight"] = 0
    return message


def role_of(turn: dict) -> str:
    """system, user or assistant."""
    stated = either(turn, "role", "from")
    role = ROLES.get(stated.lower()) if isinstance(stated, str) else None
    if role is None:
        raise NotUsed(f"unknown role {stated!r}")
    return role


def content_of(turn: dict) -> str:
    """What is said; of OpenAI's parts all texts, a line each."""
    content = either(turn, "content", "value")
    if isinstance(content, list) and content:
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise NotUsed("content is not text")
            check_keys(part, {"type", "text"})
            parts.append(part.get("text"))
    else:
        parts = [content]
    if not all(isinstance(part, str) for part in parts):
        raise NotUsed("content is not text")
    return "\n".join(parts)


def either(turn: dict, first: str, second: str) -> object:
    """What a turn has at one of two keys, None without both."""
    values = [turn[key] for key in (first, second) if turn.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise NotUsed(f"{first} and {second} differ")
    return values[0] if values else None


# ---------------------------------------------------------------------------------------- messages


def system_message(record: dict, messages: list[dict]) -> str | None:
    """What the system says in the record or, taken out, in the first message."""
    texts = [record[key] for key in SYSTEM if says_something(record.get(key))]
    if messages and messages[0]["role"] == "system":
        texts.append(messages.pop(0)["content"])
    if not all(isinstance(text, str) for text in texts):
        raise NotUsed("content is not text")
    texts = {text for text in texts if text.strip()}
    if len(texts) > 1:
        raise NotUsed("two system messages")
    return texts.pop() if texts else None


def alternating(messages: list[dict], system: str | None, cut_off: Counter) -> list[dict]:
    """The system message, then user and assistant by turns.

    Assistant turns before the first user's answer nothing (ShareGPT has conversations cut in two),
    and user turns after the last answer have none: both are cut off, and counted in `cut_off`.
    """
    whole = len(messages)
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
        raise NotUsed("no answer to a user")
    if not all(message["content"].strip() for message in messages):
        raise NotUsed("empty turn")
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise NotUsed("roles do not alternate")
    if not any(map(carries_loss, messages)):
        raise NotUsed("no answer to learn")
    cut_off["turns"] += whole - len(messages)
    return [{"role": "system", "content": system}, *messages] if system else messages
