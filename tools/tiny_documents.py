"""Training documents of the tiny recipe: retrieval documents of given lengths, and short chats.

    python -m tools.tiny_documents retrieval --corpus out/corpus --tokenizer out/tokenizer \\
        --length 128 --count 8000 --out DIR
    python -m tools.tiny_documents chat --corpus out/corpus --tokenizer out/tokenizer \\
        --length 128 --count 2000 --out FILE

A retrieval document is real text from the corpus's training split with facts hidden in it (worded
as in the evaluation, numbers drawn anew) and questions about them at its end. Loss is on the
answers and on a random share of the text, so that the model also learns to write text without the
text drowning the few answers. With --relatives several documents in a row have the same facts, each
in a text and in an order of its own, and each asks for them. Chat samples are short: "what does
this function do" from the corpus's own docstrings, and one in two a short retrieval document as a
conversation.
"""
from __future__ import annotations

import ast
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import PackedDataset, load_tokenizer, read_meta
from eval_niah import KEYS, WORDING, begin_of_text, chat_frame
from parallel import one_line_errors
from sft import encode_chat, end_of_turn
from tools.prepare import content_hash, is_held_out, write_corpus
from tools.records import Documents, source_path
from train import Parser, fraction, positive


class Fact(NamedTuple):
    """A fact to hide, how it is asked for, how the answer begins, and the answer."""

    text: str
    question: str
    lead: str
    number: str


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Magic numbers of different words, every other time a pass key in the place of the first."""
    names = [("needle", key) for key in rng.sample(KEYS, count)]
    if rng.random() < 0.5:
        names[0] = ("passkey", "")
    facts = []
    for task, key in names:
        wording = WORDING[task]
        number = str(rng.randrange(10_000, 100_000))
        texts = (number.join(wording["fact"]), wording["question"], wording["lead"])
        facts.append(Fact(*(text.replace("{key}", key) for text in texts), number))
    return facts


def draw_questions(rng: random.Random, facts: list[Fact]) -> list[Fact]:
    """The facts in the order in which they are asked for.

    The first is asked for several times if there are many: a pass key is one fact of many in
    training, but half of what the evaluation asks for.
    """
    asked = facts + facts[:1] * (len(facts) // 3)
    return rng.sample(asked, len(asked))


class Encoder:
    """Tokenizes the few hundred pieces that all documents are made of once."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known = {}
        self.end_of_turn = end_of_turn(tokenizer)
        self.open_user, self.open_assistant = chat_frame(tokenizer)

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode_continued(text)
        return self.known[text]

    def with_number(self, text: str, number: str) -> list[int]:
        """Tokens of a text around a number, in pieces, digit by digit, as the evaluation has it."""
        before, after = text.split(number)
        tokens = list(self(before))
        for digit in number:
            tokens += self(digit)
        return tokens + self(after)


def retrieval_document(encode: Encoder, haystack: np.ndarray, length: int, rng: random.Random,
                       facts: list[Fact], begin: list[int], chat: bool,
                       text_loss: float) -> tuple | None:
    """(tokens, loss mask) of exactly `length` tokens, or None if these facts do not fit. `begin`:
    the tokens with which it begins, if it is no chat."""
    # 1) the questions and their answers, which stand last
    tail, tail_mask = [], []
    for i, fact in enumerate(draw_questions(rng, facts)):
        if chat:
            again = encode.open_user[1:] if i else []  # the next turn: without begin-of-text
            before = [*again, *encode(fact.question), *encode.open_assistant, *encode(fact.lead)]
            after = [encode.end_of_turn]
        else:
            before = encode(f"{fact.question} {fact.lead}")
            after = encode(".\n")
        digits = encode.with_number(fact.number, fact.number)
        tail += before + digits + after
        tail_mask += [False] * len(before) + [True] * len(digits)
        tail_mask += [True] + [False] * (len(after) - 1)
    # 2) what is left for text; answers must also stand at the very last positions, so what follows
    #    the last one may be cut off
    cut = rng.randrange(len(after) + 1)
    head = encode.open_user if chat else begin
    hidden = [encode.with_number(fact.text, fact.number) for fact in facts]
    room = length + cut - len(head) - len(tail) - sum(map(len, hidden))
    if room < 0:
        return None
    start = rng.randrange(len(haystack) - room)
    window = haystack[start:start + room].tolist()
    window_mask = [rng.random() < text_loss for _ in window]
    # 3) the facts among the text
    places = sorted(rng.randrange(room + 1) for _ in hidden)
    tokens = list(head)
    mask = [False] * len(head)
    previous = 0
    in_any_order = rng.sample(hidden, len(hidden))
    for place, fact in zip(places, in_any_order, strict=True):
        tokens += window[previous:place] + fact
        mask += window_mask[previous:place] + [False] * len(fact)  # nobody can guess a number
        previous = place
    tokens += window[previous:] + tail
    mask += window_mask[previous:] + tail_mask
    return tokens[:length], mask[:length]


def training_haystack(corpus: Path, tokenizer) -> np.ndarray:
    """The training split as a row of tokens: never the held-out text that the evaluation uses."""
    dataset = PackedDataset(corpus, "train", 2, seed=0, separator="none", tokenizer=tokenizer)
    return np.concatenate([tokens for tokens, _, _ in dataset.arrays])


def retrieval_documents(tokenizer, haystack: np.ndarray, count: int, shortest: int, length: int,
                        most_facts: int, chat_share: float, text_loss: float, seed: int,
                        relatives: int = 1, begin: bool = True):
    """`count` x `relatives` documents for `write_corpus` of `length` tokens, or of any from
    `shortest` to it. `begin`: with begin-of-text, where the tokenizer has one."""
    encode = Encoder(tokenizer)
    head = begin_of_text(tokenizer) if begin else []
    rng = random.Random(f"{seed} retrieval {length} {shortest}")
    for _ in range(count):
        size = round(math.exp(rng.uniform(math.log(shortest), math.log(length))))
        documents = [None]
        while None in documents:  # as many facts as fit
            number = rng.randint(1, most_facts)
            chat = rng.random() < chat_share
            facts = draw_facts(rng, number)
            documents = [
                retrieval_document(encode, haystack, size, rng, facts, head, chat, text_loss)
                for _ in range(relatives)]
        for document in documents:
            yield ("retrieval", *document)


def exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def docstring_samples(corpus: Path) -> Iterator[list[dict]]:
    """Conversations from the standard library's own functions: what does it do, asked by its
    signature, answered by the first line of its docstring."""
    meta = read_meta(corpus)
    for _, document in Documents(source_path("stdlib")):
        if is_held_out(content_hash(document, meta["seed"]), meta["holdout"]):
            continue
        try:
            tree = ast.parse(document["text"])
        except (SyntaxError, ValueError):  # the library's tests hold broken files on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                if 10 < len(summary) < 80:
                    signature = f"{node.name}({ast.unparse(node.args)})"
                    yield exchange(f"What does def {signature} do?", summary)


def chat_samples(corpus: Path, tokenizer, length: int, count: int, seed: int) -> Iterator[dict]:
    """`count` conversations of at most `length` tokens; every second hides a fact in some text."""
    def fits(sample: list[dict]) -> bool:
        return len(encode_chat(sample, tokenizer)[0]) <= length

    rng = random.Random(f"{seed} chat {length}")
    haystack = training_haystack(corpus, tokenizer)
    plain = list(itertools.islice(filter(fits, docstring_samples(corpus)), count))
    if not plain:
        raise ValueError(f"--length {length}: no docstring sample is that short")
    while count:
        sample = rng.choice(plain)
        if count % 2 == 0:
            facts = draw_facts(rng, 1)
            [fact] = draw_questions(rng, facts)
            start = rng.randrange(len(haystack) - length)
            room = rng.randrange(length // 2)
            text = tokenizer.decode(haystack[start:start + room].tolist())
            place = round(rng.random() * len(text))
            question = text[:place] + fact.text + text[place:] + fact.question
            sample = exchange(question, fact.lead + fact.number)
            if not fits(sample):
                continue
        count -= 1
        yield {"messages": sample}


def parser() -> Parser:
    parser = Parser("Training documents of the tiny recipe: retrieval documents, or chat samples.")
    add = parser.add_argument
    add("what", choices=("retrieval", "chat"), help="what to write")
    add("--corpus", type=Path, required=True, help="of the standard library, by tools.prepare")
    add("--tokenizer", type=Path, required=True, help="tokenizer file or its directory")
    add("--length", type=positive, required=True, help="tokens of a document, of a chat at most")
    add("--shortest", type=positive, help="retrieval: lengths from this to --length, as many short "
        "as long ones in every octave (if not given: --length)")
    add("--count", type=positive, required=True, help="documents or samples")
    add("--most-facts", type=positive, default=3, help="of a retrieval document, 1 to this many")
    add("--chat-share", type=fraction, default=0.3, help="of retrieval documents, as conversations")
    add("--text-loss", type=fraction, default=0.1, help="share of a document's text with loss")
    add("--relatives", type=positive, default=1,
        help="retrieval: documents in a row that have the same facts, for each of --count")
    add("--no-begin-of-text", dest="begin", action="store_false",
        help="retrieval: documents that only their separator parts from the one before")
    add("--seed", type=int, default=0, help="another seed draws other documents")
    add("--out", type=Path, required=True, help="new corpus directory; chat: a .jsonl file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write one corpus of retrieval documents, or one file of chat samples."""
    with one_line_errors():
        a = parser().parse_args(argv)
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
                                            a.most_facts, a.chat_share, a.text_loss, a.seed,
                                            a.relatives, a.begin)
            write_corpus({"train": documents}, a.out, tokenizer)
            print(f"wrote {a.out}: {a.count * a.relatives} retrieval documents of {shortest} to "
                  f"{a.length} tokens")


if __name__ == "__main__":
    main()
