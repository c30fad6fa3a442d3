"""Needles in pairs: prompts that differ in one thing, so that its effect is measured alone.

    python -m tools.needle_pairs MODEL_DIR --pair border --haystack CORPUS --lengths 512 2048 \\
        --out border.json

border: where does a document end? Either before the fact, so that fact and question stand in the
same document, or between them. hops, three prompts: a fact alone; the same fact among five keys,
one of which is said to have its number; and these, asked for that one (two facts). Numbers are
those of the evaluation, in its words: see eval_niah.py.
"""
from __future__ import annotations

import itertools
import random

from tqdm import tqdm

import data
from data import Tokenizer
from eval_niah import (
    OFFSETS,
    Prompt,
    Reader,
    as_json,
    begin_of_text,
    build_prompt,
    checkpoint_parser,
    draw_fact,
    even_depths,
    fact_tokens,
    haystack_for,
    insertion_point,
    load_model,
    note_lengths,
    predict,
    print_saved,
    question_tokens,
    read_checkpoint,
    results_header,
    score,
    summary,
)
from model import Llama
from parallel import Grid, one_line_errors, print_once
from train import Parser, existing, nonnegative, positive, writable

SAME_NUMBER = "\nThe magic number of {alias} is that of {key}.\n"
OTHERS = 3  # keys with a number of their own beside the one that is asked for


def border_pair(tokenizer: Tokenizer, passage, length: int, depth: float, rng: random.Random,
                task: str) -> tuple[Prompt, Prompt]:
    """A needle of `length` tokens with a border of documents in the middle of what stands before
    its fact, and the same with the border in the middle of what stands behind it."""
    border = data.separator_tokens("<s>", tokenizer).tolist()
    prompt = build_prompt(tokenizer, passage, length - len(border), depth, rng, task)
    # 1. Where fact and question stand.
    fact = fact_tokens(tokenizer, task, prompt.key, prompt.answer)
    fact_end = prompt.needle_start + len(fact)
    question = prompt.answer_start - len(question_tokens(tokenizer, task, prompt.key))
    # 2. A border before the one, or before the other.
    before = (len(begin_of_text(tokenizer)) + prompt.needle_start) // 2
    behind = (fact_end + question) // 2
    pair = []
    for place in (before, behind):
        tokens = prompt.tokens[:place] + border + prompt.tokens[place:]
        moved = prompt.needle_start + (len(border) if place <= prompt.needle_start else 0)
        pair.append(Prompt(tokens, prompt.answer_start + len(border), moved, prompt.answer, task,
                           prompt.key))
    return tuple(pair)


def hop_prompts(tokenizer: Tokenizer, passage, length: int, depth: float, rng: random.Random,
                task: str) -> tuple[Prompt, Prompt, Prompt]:
    """Prompts of `length` tokens: with one fact, at `depth`; with three more keys and their
    numbers, and a key that is said to have the first one's number; and the same, asked for that
    key. Who guesses among the numbers is right once in four. What questions and facts leave is
    text, the same one as far as there is room for it."""
    encode = tokenizer.encode_continued
    passage = passage[:length].tolist()
    text = tokenizer.decode_bytes(passage).lower()
    # 1. Keys and numbers that do not stand in the text, and what is said of them.
    known = {}
    while len(known) < 2 + OTHERS:
        drawn, number = draw_fact(rng, text, 5, task)
        if number not in known.values():
            known[drawn] = number
    (key, number), *others, (alias, _) = known.items()

    facts = [fact_tokens(tokenizer, task, key, number),
             encode(SAME_NUMBER.format(alias=alias, key=key))]
    facts += [fact_tokens(tokenizer, task, *other) for other in others]
    depths = [depth] + [rng.random() for _ in facts[1:]]
    # 2. The questions; the longer one's length is left for both.
    head = begin_of_text(tokenizer)
    answer = encode(number)
    tails = {name: question_tokens(tokenizer, task, name) for name in (key, alias)}
    left = length - len(head) - len(answer) - max(map(len, tails.values()))
    # 3. The prompts.
    prompts = []
    for name, stated_facts in ((key, facts[:1]), (key, facts), (alias, facts)):
        room = left - sum(map(len, stated_facts))
        if room < 1:
            raise ValueError(f"length {length} is too small for {len(facts)} facts and a question")
        places = []
        for share in depths[:len(stated_facts)]:
            places.append(insertion_point(tokenizer, passage[:room], round(share * room)))
        body = list(head)
        previous = 0
        for place, fact in sorted(zip(places, stated_facts, strict=True)):
            body += passage[previous:place]
            if fact is facts[0]:
                needle_start = len(body)
            body += fact
            previous = place
        tail = tails[name] + answer
        rest = length - len(body) - len(tail)
        tokens = body + passage[previous:previous + rest] + tail
        prompts.append(Prompt(tokens, length - len(answer), needle_start, number, task, name))
    return tuple(prompts)


PAIRS = {  # what makes them, and what they are called
    "border": (border_pair, ("same document", "another document")),
    "hops": (hop_prompts, ("alone", "one fact", "two facts")),
}


def evaluate_pairs(model: Llama, tokenizer: Tokenizer, haystack, pair: str, lengths: list[int],
                   depths: list[float], samples: int, seed: int) -> dict[str, dict]:
    """`eval_niah.summary` of the first prompts, of the second ones, ..., by their names."""
    make, names = PAIRS[pair]
    reader = Reader(model)
    records = {name: {} for name in names}
    cells = list(itertools.product(sorted(set(lengths)), depths))
    for length, depth in tqdm(cells, unit="cell", disable=None if model.grid.is_first else True):
        pairs = []
        for sample in range(samples):
            task = ("passkey", "needle")[sample % 2] if pair == "border" else "needle"
            rng = random.Random(f"{seed} {sample}")  # the same text in every cell
            start = rng.randrange(min(OFFSETS, len(haystack) - length + 1))
            rng = random.Random(f"{seed} {length} {depth:.6f} {sample}")
            pairs.append(make(tokenizer, haystack[start:], length, depth, rng, task))
        for name, prompts in zip(names, zip(*pairs, strict=True), strict=True):
            cell = []
            for prompt, said in zip(prompts, predict(reader, list(prompts)), strict=True):
                correct, given = score(tokenizer, prompt, said)
                cell.append({"expected": prompt.answer, "given": given, "correct": correct})
            records[name][length, depth] = cell
    read, computed = reader.counts()
    print_saved(read, computed)
    return {name: summary(cells) for name, cells in records.items()}


def parser() -> Parser:
    parser = checkpoint_parser("Needles in pairs that differ in one thing.")
    add = parser.add_argument_group("prompts").add_argument
    add("--pair", choices=tuple(PAIRS), required=True, help="a border of documents, or two facts")
    add("--haystack", type=existing, required=True, help="as eval_niah.py's")
    add("--lengths", type=positive, nargs="+", required=True, help="tokens, the answer's included")
    add("--depths", type=positive, default=5, help="how many, evenly from 0 to 1")
    add("--samples", type=positive, default=20, help="pairs a cell, all read side by side")
    add("--seed", type=nonnegative, default=1234)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=writable, help="results, JSON")
    add("--window", type=positive, help="old window to mark (if not given: before extension)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check everything, build the shortest prompts, load the model, evaluate, show and write."""
    with one_line_errors():
        a = parser().parse_args(argv)
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = read_checkpoint(a, grid)
        longest = max(a.lengths)
        note_lengths(config, longest)
        haystack = haystack_for(a.haystack, tokenizer, longest)
        # a length that is too small shows here, before the weights are read
        make, _ = PAIRS[a.pair]
        make(tokenizer, haystack, min(a.lengths), 0.5, random.Random(a.seed), "needle")
        results = results_header(a, config, grid)
        results["twins"] = evaluate_pairs(load_model(a, grid), tokenizer, haystack, a.pair,
                                          a.lengths, even_depths(a.depths), a.samples, a.seed)
        for name, twin in results["twins"].items():
            for mean in twin["means"]:
                print_once(f"{name}, {mean['length']} tokens: {mean['accuracy']:.1f} % ± "
                           f"{mean['standard_error']:.1f}")
        if a.out and grid.is_first:
            data.write_complete(a.out, as_json(results))
        grid.close()


if __name__ == "__main__":
    main()
