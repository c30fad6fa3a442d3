"""Training documents of the tiny recipe: retrieval documents of given lengths, and short chat samples.

    python -m tools.tiny_documents retrieval --corpus out/corpus --tokenizer out/tokenizer --length 128 --count 8000 --out DIR
    python -m tools.tiny_documents chat --corpus out/corpus --tokenizer out/tokenizer --length 128 --count 2000 --out FILE

A retrieval document is real text from the corpus's training split with facts hidden in it (worded as in the evaluation,
numbers drawn anew) and questions about them at its end. Loss is on the answers and on a random share of the text, so that
the model also learns to write text without the text drowning the few answers. Chat samples are short: "what does
this function do" from the corpus's own docstrings, and one in two a short retrieval document as a conversation.
"""
from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np

from data import (
    PackedDataset,
    encode_chat,
    end_of_turn,
    load_tokenizer,
    read_documents,
    read_meta,
    source_path,
)
from eval_niah import KEYS, WORDING, begin_of_text
from parallel import Parser, fraction, one_line_errors, positive
from tools.prepare import is_held_out, write_corpus


def fact_texts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """(fact, question, lead) texts with {number} still open: `count` magic numbers of different words, or every other time
    a pass key in the place of one."""
    names = [("needle", key) for key in rng.sample(KEYS, count)]
    if rng.random() < 0.5:
        names[0] = ("passkey", "")
    return [tuple(text.replace("{key}", key)
                  for text in ("{number}".join(wording["fact"]), wording["question"], wording["lead"]))
            for wording, key in ((WORDING[task], key) for task, key in names)]


def conversation(rng: random.Random, facts: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Fact texts, and (question, lead, answer) for each in another order; numbers of five random digits.

    The first fact is asked for several times if there are many: a pass key is one fact of many in training, but half of
    what the evaluation asks for.
    """
    drawn = [(texts, str(rng.randrange(10_000, 100_000))) for texts in fact_texts(rng, facts)]
    asked = [(question, lead, answer) for (_, question, lead), answer in drawn]
    asked += asked[:1] * (facts // 3)
    return [fact.replace("{number}", answer) for (fact, _, _), answer in drawn], rng.sample(asked, len(asked))


class Encoder:
    """Tokenizes the few hundred pieces that all documents are made of once; numbers digit by digit."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.known = tokenizer, {}
        self.end_of_turn = end_of_turn(tokenizer)
        opened = encode_chat([{"role": "user", "content": ""}], tokenizer, add_generation_prompt=True)[0]
        between = opened.index(self.end_of_turn)
        self.open_user, self.open_assistant = opened[:between], opened[between:]

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode_ordinary(text)
        return self.known[text]

    def with_number(self, text: str, number: str) -> list[int]:
        """Tokens of a text around a number, in pieces, as the evaluation makes them."""
        before, after = text.split(number)
        return self(before) + [token for digit in number for token in self(digit)] + self(after)


def retrieval_document(encode: Encoder, haystack: np.ndarray, length: int, rng: random.Random, facts: int, chat: bool,
                       text_loss: float):
    """(tokens, loss mask) of exactly `length` tokens, or None if so many facts do not fit."""
    texts, asked = conversation(rng, facts)
    numbers = [next(a for _, _, a in asked if a in text) for text in texts]
    hidden = [encode.with_number(text, number) for text, number in zip(texts, numbers)]
    tail, mask, after = [], [], []
    for i, (question, lead, answer) in enumerate(asked):
        if chat:
            again = encode.open_user[1:] if i else []  # the next user turn: the template without its begin-of-text
            before = [*again, *encode(question), *encode.open_assistant, *encode(lead)]
            after = [encode.end_of_turn]
        else:
            before, after = encode(f"{question} {lead}"), encode(".\n")
        digits = encode.with_number(answer, answer)
        tail += before + digits + after
        mask += [False] * len(before) + [True] * len(digits) + [True] + [False] * (len(after) - 1)
    head = encode.open_user if chat else begin_of_text(encode.tokenizer)
    # answers must also stand at the very last positions, so what follows the last one may be cut off
    cut = rng.randrange(len(after) + 1)
    room = length + cut - len(head) - len(tail) - sum(map(len, hidden))
    if room < 0:
        return None
    start = rng.randrange(len(haystack) - room)
    window = haystack[start:start + room].tolist()
    text_mask = [rng.random() < text_loss for _ in window]
    places, order = sorted(rng.randrange(room + 1) for _ in hidden), rng.sample(hidden, len(hidden))
    body, body_mask, previous = head[:], [False] * len(head), 0
    for place, fact in zip(places, order):
        body += window[previous:place] + fact
        body_mask += text_mask[previous:place] + [False] * len(fact)  # nobody can guess a fresh number
        previous = place
    return (body + window[previous:] + tail)[:length], (body_mask + text_mask[previous:] + mask)[:length]


def training_haystack(corpus: Path, tokenizer) -> np.ndarray:
    """The training split as one row of tokens: never the held-out text that the evaluation hides its needles in."""
    dataset = PackedDataset(corpus, "train", 2, seed=0, separator="none", tokenizer=tokenizer)
    return np.concatenate(dataset.tokens)


def retrieval_documents(tokenizer, haystack: np.ndarray, count: int, shortest: int, length: int, most_facts: int,
                        chat_share: float, text_loss: float, seed: int):
    """`count` documents for `write_corpus` of `length` tokens, or of any length from `shortest` to it."""
    encode, rng = Encoder(tokenizer), random.Random(f"{seed} retrieval {length} {shortest}")
    for _ in range(count):
        size = round(math.exp(rng.uniform(math.log(shortest), math.log(length))))
        document = None
        while document is None:  # as many facts as fit
            facts, chat = rng.randint(1, most_facts), rng.random() < chat_share
            document = retrieval_document(encode, haystack, size, rng, facts, chat, text_loss)
        yield ("retrieval", *document)


def docstring_samples(corpus: Path):
    """Conversations from the standard library's own functions: signature asked, first line of the docstring answered."""
    meta = read_meta(corpus)
    for document in read_documents(source_path("stdlib")):
        if is_held_out(document, meta["holdout"], meta["seed"]):
            continue
        try:
            tree = ast.parse(document["text"])
        except (SyntaxError, ValueError):  # the library's tests hold broken files on purpose
            continue
        for node in ast.walk(tree):
            summary = (ast.get_docstring(node) or "").partition("\n")[0] if isinstance(node, ast.FunctionDef) else ""
            if 10 < len(summary) < 80:
                question = f"What does def {node.name}({ast.unparse(node.args)}) do?"
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": summary}]


def chat_samples(corpus: Path, tokenizer, length: int, count: int, seed: int):
    """`count` conversations of at most `length` tokens; every second one hides a fact in a few lines of text."""
    rng, haystack = random.Random(f"{seed} chat {length}"), training_haystack(corpus, tokenizer)
    short = (sample for sample in docstring_samples(corpus) if len(encode_chat(sample, tokenizer)[0]) <= length)
    fits = list(itertools.islice(short, count))
    if not fits:
        raise ValueError(f"--length {length}: no docstring sample is that short")
    while count:
        sample = rng.choice(fits)
        if count % 2 == 0:
            (fact,), ((question, lead, answer),) = conversation(rng, 1)
            start, room = rng.randrange(len(haystack) - length), rng.randrange(length // 2)
            text, cut = tokenizer.decode(haystack[start:start + room].tolist()), rng.random()
            place = round(cut * len(text))
            sample = [{"role": "user", "content": text[:place] + fact + text[place:] + question},
                      {"role": "assistant", "content": lead + answer}]
            if len(encode_chat(sample, tokenizer)[0]) > length:
                continue
        count -= 1
        yield {"messages": sample}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Training documents of the tiny recipe: retrieval documents, or chat samples.")
    add = parser.add_argument
    add("what", choices=("retrieval", "chat"), help="what to write")
    add("--corpus", type=Path, required=True, help="of the standard library, by tools.prepare")
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--length", type=positive, required=True, help="tokens of a document, of a chat at most")
    add("--shortest", type=positive, help="retrieval: lengths from this to --length, as many short as "
        "long ones in every octave (if not given: --length)")
    add("--count", type=positive, required=True, help="documents or samples")
    add("--most-facts", type=positive, default=3, help="facts of a retrieval document: 1 to this many")
    add("--chat-share", type=fraction, default=0.3, help="of retrieval documents, as conversations")
    add("--text-loss", type=fraction, default=0.1, help="share of a document's text with loss")
    add("--seed", type=int, default=0, help="another seed draws other documents")
    add("--out", type=Path, required=True, help="new corpus directory; chat: a .jsonl file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write one corpus of retrieval documents, or one file of chat samples."""
    with one_line_errors():
        a = parse_arguments(argv)
        shortest = a.shortest or a.length
        if not 64 <= shortest <= a.length:
            raise ValueError(f"--shortest {shortest} must be 64 to --length {a.length}")
        tokenizer = load_tokenizer(a.tokenizer)
        if a.what == "chat":
            samples = chat_samples(a.corpus, tokenizer, a.length, a.count, a.seed)
            a.out.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            print(f"wrote {a.out}: {a.count} chat documents of at most {a.length} tokens")
        else:
            haystack = training_haystack(a.corpus, tokenizer)
            documents = retrieval_documents(tokenizer, haystack, a.count, shortest, a.length,
                                            a.most_facts, a.chat_share, a.text_loss, a.seed)
            write_corpus({"train": documents}, a.out, tokenizer)
            print(f"wrote {a.out}: {a.count} retrieval documents of {shortest} to {a.length} tokens")


if __name__ == "__main__":
    main()
