"""Tokens of 50 conversations: ours against transformers' `apply_chat_template`, or against Meta's
own llama-models package.

    python -m benchmarks.chat_templates MODEL_DIR
    pip install --target PLACE llama-models
    PYTHONPATH=PLACE python -m benchmarks.chat_templates PLACE/llama_models/llama3 --llama-models

MODEL_DIR has a tokenizer.json with its chat template; PLACE/llama_models/llama3 has Llama 3's
tokenizer.model.

Conversations have one to seven turns, with and without a system message, in several scripts, with
white space around and inside, digits, code and emoji. Where a template adds a system message of its
own, ours is given the same one.
"""
from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

from data import load_tokenizer
from sft import encode_chat

PIECES = ["Why is the sky blue?", "def f(x):\n    return x + 1\n", "1234567 and 3.14",
          "  two spaces ", "\n\nlines\n", "Привет, мир!", "中文文本", "naïve café", "🙂👍🏽",
          "I'll say: \"yes\"", "a\tb", "<tag> [list] {dict}", "€ 5, ½", "END"]


def conversations(count: int) -> list[list[dict]]:
    """Every other one has a system message; half end with the user's turn."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        turns = ["user", "assistant"] * rng.randrange(1, 4)
        if number % 2:
            turns = ["system", *turns]
        if number // 2 % 2:
            turns = [*turns, "user"]
        messages = []
        for role in turns:
            pieces = rng.choices(PIECES, k=rng.randrange(1, 5))
            messages.append({"role": role, "content": "".join(pieces)})
        found.append(messages)
    return found


def by_transformers(path: Path):
    """(messages, whether the assistant's turn is opened) -> tokens, and the messages as the
    template completes them."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path)
    probe = theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    # of ChatML templates that add one
    default = probe.partition("system\n")[2].partition("<|im_end|>")[0]

    def encode(messages: list[dict], opened: bool) -> list[int]:
        return theirs.apply_chat_template(messages, add_generation_prompt=opened, return_dict=False)

    def completed(messages: list[dict]) -> list[dict]:
        if default and messages[0]["role"] != "system":
            return [{"role": "system", "content": default}, *messages]
        return messages

    return encode, completed


def by_llama_models():
    """The same by Meta's package, which adds no message and, unlike Hugging Face's template of
    Llama 3 and ours, keeps white space around contents."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    theirs = ChatFormat(Tokenizer.get_instance())

    def encode(messages: list[dict], opened: bool) -> list[int]:
        dialog = []
        for message in messages:
            options = {}
            if message["role"] == "assistant":
                options["stop_reason"] = "end_of_turn"
            dialog.append(RawMessage(role=message["role"], content=message["content"], **options))
        tokens = theirs.encode_dialog_prompt(dialog).tokens  # opens the assistant's turn
        return tokens if opened else tokens[:-len(theirs._encode_header("assistant"))]

    def completed(messages: list[dict]) -> list[dict]:
        return [message | {"content": message["content"].strip()} for message in messages]

    return encode, completed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="tokenizer file or its directory")
    parser.add_argument("--llama-models", action="store_true",
                        help="against Meta's package, which Python must find")
    parser.add_argument("--count", type=int, default=50)
    a = parser.parse_args()
    tokenizer = load_tokenizer(a.tokenizer)
    encode, completed = by_llama_models() if a.llama_models else by_transformers(a.tokenizer)
    equal = tokens = 0
    for messages in conversations(a.count):
        opened = messages[-1]["role"] == "user"
        messages = completed(messages)
        ours = encode_chat(messages, tokenizer, add_generation_prompt=opened)[0]
        theirs = list(encode(messages, opened))
        tokens += len(ours)
        if ours == theirs:
            equal += 1
        else:
            place = len(os.path.commonprefix([ours, theirs]))
            print(f"FAIL {messages}\n  differ at {place}: ours "
                  f"{tokenizer.decode(ours[place:place + 8])!r}, "
                  f"theirs {tokenizer.decode(theirs[place:place + 8])!r}")
    print(f"{equal} of {a.count} conversations equal, {tokens:,} tokens")
    sys.exit(equal != a.count)


if __name__ == "__main__":
    main()
