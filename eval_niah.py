"""Retrieval evaluation: hide a number in real text at every depth of every length, ask for it; score prompts of files;
perplexity by position.

    python eval_niah.py MODEL_DIR --haystack CORPUS --lengths 128 256 512 --out results.json --figure heat.png
    python eval_niah.py MODEL_DIR --jsonl ruler.jsonl --out answers.jsonl               # any file of prompts and answers
    python eval_niah.py MODEL_DIR --perplexity --haystack CORPUS --lengths 32768 --out perplexity.json --figure curve.png
    python eval_niah.py --compare before.json stage1.json stage2.json --figure compare.png
    torchrun --standalone --nproc-per-node 8 eval_niah.py MODEL_DIR --tp 2 --cp 4 ...      # any of them on eight processes

A needle prompt costs one forward: the right answer is fed after the question (teacher forcing), and each of its tokens
must be what the model would have said. The haystack is text held out from training. A prompt of length N has exactly N
tokens. Prompts that begin alike share the keys and values of what they share.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiktoken import Encoding
from tqdm import tqdm

import data
from model import Llama, check_device, read_config, rescale
from parallel import Grid, add_grid_arguments, attention_kernel, check_grid, finish, launched, parse_once, print_once
from rope_yarn import add_scaling_arguments, scaling_from_arguments

# A fact stands on a line of its own, its number between the two parts. The lead is where an answer begins.
WORDING = {
    "passkey": {"fact": ("\nThe pass key is ", ". Remember it.\n"),
                "question": "\nWhat is the pass key?", "lead": "The pass key is "},
    "needle": {"fact": ("\nThe magic number of {key} is ", ".\n"),
               "question": "\nWhat is the magic number of {key}?", "lead": "The magic number of {key} is "},
}
KEYS = """amber anchor apple arrow badge basket beacon berry blanket bottle bridge button cabin candle canyon
carpet castle cedar cherry circle clover cobalt copper coral cotton crystal dagger desert diamond dragon eagle
ember engine falcon feather forest garden ginger glacier hammer harbor helmet honey indigo island ivory jacket
jasper jungle kettle ladder lantern lemon lotus magnet maple marble meadow mirror needle nickel ocean olive
orchid""".split()


# --------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """Token ids, the answer's last: it starts at `answer_start`, the fact it repeats at `needle_start`."""

    tokens: list[int]
    answer_start: int
    needle_start: int
    answer: str
    task: str
    key: str | None


def build_prompt(tokenizer: Encoding, haystack_tokens, length: int, depth: float, rng: random.Random,
                 task: str = "passkey", chat: bool = False, distractors: int = 0, digits: int = 5,
                 system: str | None = None) -> Prompt:
    """One prompt of exactly `length` tokens, the answer's included; a pure function of its arguments.

    haystack_tokens: 1-D ids, at least `length` of them, of which the first are used: the window. depth in [0, 1]
    is where in it the fact goes, moved to a line border if one is near. Task "needle" may have
    `distractors`: facts of other keys at random depths. Every piece is tokenised alone and joined as ids, so
    lengths add up, and the number has the same tokens in the fact and in the answer. The window holds no key
    and no number of the prompt. Raises ValueError if the length is too small, the haystack too short, or no
    key or number is left that the window does not hold.
    """
    if task not in WORDING or not 0 <= depth <= 1:
        raise ValueError(f"task {task!r}, depth {depth}: needs a task of {list(WORDING)}, a depth in [0, 1]")
    if distractors and task != "needle":
        raise ValueError(f"distractors need keys to tell facts apart: use task needle, not {task}")
    if len(haystack_tokens) < length:
        raise ValueError(f"the haystack has {len(haystack_tokens)} tokens; length {length} needs as many")
    window = np.asarray(haystack_tokens[:length]).tolist()
    keys, numbers = draw_facts(rng, tokenizer.decode_bytes(window).lower(), 1 + distractors, digits, task)

    wording, encode = WORDING[task], tokenizer.encode_ordinary
    opening, closing = wording["fact"]
    facts = [encode(opening.format(key=key)) + encode(number) + encode(closing)
             for key, number in zip(keys, numbers, strict=True)]
    question, lead = wording["question"].format(key=keys[0]), wording["lead"].format(key=keys[0])
    if chat:
        head, turn = chat_frame(tokenizer, system)
        tail = encode(question) + turn + encode(lead)
    else:
        head, tail = begin_of_text(tokenizer), encode(f"{question} {lead}")
    answer = encode(numbers[0])
    room = length - len(head) - len(tail) - len(answer) - sum(map(len, facts))
    if room < 1:
        raise ValueError(f"length {length} is too small: facts, question and answer take {length - room}")
    del window[room:]
    targets = [round(depth * room)] + [rng.randrange(room + 1) for _ in range(distractors)]
    body, needle_start = insert_facts(tokenizer, window, facts, targets)
    tokens = head + body + tail + answer
    return Prompt(tokens, len(tokens) - len(answer), len(head) + needle_start, numbers[0], task, keys[0])


def draw_facts(rng: random.Random, text: bytes, count: int, digits: int, task: str) -> tuple[list, list]:
    """`count` keys (None for a pass key) and numbers, all different, none of them in lower-case `text`."""
    def absent(what: str, draw: Callable[[], str]) -> list[str]:
        found = []
        for _ in range(1000 + 10 * count):
            candidate = draw()
            if candidate not in found and candidate.encode() not in text:
                found.append(candidate)
            if len(found) == count:
                return found
        raise ValueError(f"the haystack holds nearly all {what}: longer numbers (--digits), fewer "
                         "distractors or another haystack are needed")

    numbers = absent(f"numbers of {digits} digits", lambda: str(rng.randrange(10**(digits - 1), 10**digits)))
    if task == "passkey":
        return [None], numbers
    free = [key for key in KEYS if key.encode() not in text]
    if len(free) >= count:
        return rng.sample(free, count), numbers
    # a million tokens of prose hold every common word, but not every two of them joined
    return absent("keys", lambda: "-".join(rng.sample(KEYS, 2))), numbers


def begin_of_text(tokenizer: Encoding) -> list[int]:
    """Llama 3 sees its begin-of-text token before any text; most other tokenizers have none."""
    name = "<|begin_of_text|>"
    return [tokenizer.encode_single_token(name)] if name in tokenizer.special_tokens_set else []


def chat_frame(tokenizer: Encoding, system: str | None = None) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after a user's message, up to the assistant's first token."""
    one, other = (prompt_tokens(tokenizer, letter, chat=True, system=system) for letter in "xy")
    place = next(i for i, token in enumerate(one) if token != other[i])  # the letter: all else is template
    return one[:place], one[place + 1:]


def insert_facts(tokenizer: Encoding, window: list[int], facts: list[list[int]], targets: list[int]):
    """(window with each fact put near its target, where the first of the facts begins)."""
    places = [insertion_point(tokenizer, window, target) for target in targets]
    body, previous, needle_start = [], 0, 0
    for i in sorted(range(len(facts)), key=places.__getitem__):
        body += window[previous:places[i]]
        needle_start = len(body) if i == 0 else needle_start
        body += facts[i]
        previous = places[i]
    return body + window[previous:], needle_start


def insertion_point(tokenizer: Encoding, window: list[int], target: int) -> int:
    """The line border nearest to `target`, within 2 % of the window (8 to 256 tokens); if there is none, the
    nearest place that cuts no word, and at last one that cuts no character."""
    def text(i: int) -> bytes:
        return tokenizer.decode_single_token_bytes(window[i]) if 0 <= i < len(window) else b"\n"

    reach = min(max(8, len(window) // 50), 256)
    near = range(max(0, target - reach), min(len(window), target + reach) + 1)
    places = sorted(near, key=lambda place: abs(place - target))
    line = (p for p in places if text(p - 1).endswith(b"\n") or text(p).startswith(b"\n"))
    word = (p for p in places if text(p - 1)[-1:].isspace() or text(p)[:1].isspace())
    character = (p for p in places if not b"\x80" <= text(p)[:1] < b"\xc0")  # UTF-8 continues with 80 to BF
    return next(itertools.chain(line, word, character), target)


# --------------------------------------------------------------------------------------------------- scoring


def exact_number_match(text: str, number: str) -> bool:
    """Whether the first number in `text` is `number`, whole.

    A number is a run of digits, with any '.' or ',' that stands between digits: "48213." and "It is 48213, I
    think" match 48213; "482135", "048213", "48,213", "48213.5" and "1 48213" (its first number is 1) do not.
    """
    found = re.search(r"\d+(?:[.,]\d+)*", text)
    return found is not None and found.group() == number


def text_of(tokenizer: Encoding, tokens: list[int]) -> str:
    """What tokens spell."""
    said = b""
    for token in tokens:
        try:
            said += tokenizer.decode_single_token_bytes(token)
        except KeyError:  # an id that only pads the model's vocabulary
            said += "\ufffd".encode()
    return said.decode("utf-8", errors="replace")


def score(tokenizer: Encoding, prompt: Prompt, predictions: list[int]) -> tuple[bool, str]:
    """(exact match, what the model said), from its argmax for each answer token and for the one after.

    Every answer token must be predicted, and the prediction after must not make the number longer. The answer
    is split into tokens as the tokenizer does it, which is how the fact in the prompt and the training text
    spell it too (Llama 3: 482|13). A model that would say the same digits in another split (48|213) counts as
    wrong: the score may be too low for it, never too high.
    """
    given = text_of(tokenizer, predictions)
    right = predictions[:-1] == prompt.tokens[prompt.answer_start:]
    return right and exact_number_match(given, prompt.answer), given


class Reader:
    """Reads rows of tokens with a model and leaves what they share out: the tokens with which they begin like the rows
    read before stay in the KV cache. `read` counts tokens of rows, `computed` those that went through the model.
    """

    def __init__(self, model: Llama, device: str) -> None:
        self.model, self.device, self.rows, self.cache, self.read, self.computed = model, device, None, None, 0, 0

    def begin(self, rows: torch.Tensor, most: int):
        """The cache, truncated to what it shares with rows (B, S) int64: `most` tokens at most."""
        if self.rows is None or len(self.rows) != len(rows):
            self.rows, self.cache = rows, self.model.new_cache(len(rows))  # empty: nothing to compare
        width = min(self.rows.shape[1], most, self.cache.length)
        other = (self.rows[:, :width] != rows[:, :width]).any(0)  # (width,)
        self.cache.truncate(int(other.int().argmax()) if other.any() else width)
        cp, new = self.model.grid.cp, rows.shape[1] - self.cache.length
        if self.cache.fullest() * cp + new > 1.5 * rows.shape[1]:  # one rank of the ring would hold and do too much
            self.cache.truncate(0)
        self.rows = rows
        self.read, self.computed = self.read + rows.numel(), self.computed + rows[:, self.cache.length:].numel()
        return self.cache

    def counts(self) -> list[int]:
        """`read` and `computed` of all replicas."""
        grid = self.model.grid
        return grid.to_host(grid.all_reduce(torch.tensor([self.read, self.computed], device=self.device), "dp"))


@torch.inference_mode()
def predict(reader: Reader, prompts: list[Prompt]) -> list[list[int]]:
    """Argmax for each answer token and the one after, of prompts of equal length, in one forward a replica.

    Data-parallel replicas share the prompts; every rank returns all predictions.
    """
    model, grid, device = reader.model, reader.model.grid, reader.device
    widths = [len(prompt.tokens) - prompt.answer_start + 1 for prompt in prompts]
    best = torch.zeros(len(prompts), max(widths), dtype=torch.int64, device=device)
    mine = slice(grid.dp_rank, None, grid.dp)
    if prompts[mine]:
        tokens = torch.tensor([prompt.tokens for prompt in prompts[mine]], device=device)  # (B, S)
        first = tokens.shape[1] - max(widths)  # place that predicts the first answer token
        cache = reader.begin(tokens, first)
        places = torch.arange(first, tokens.shape[1], device=device) - cache.length  # (answer + 1,)
        hidden = model.hidden_at(tokens[:, cache.length:], places.expand(len(tokens), -1), cache)
        best[mine] = model.logits(hidden).argmax(dim=-1)  # the head never sees S rows
    best = grid.to_host(grid.all_reduce(best, "dp"))
    return [row[-width:] for row, width in zip(best, widths)]


OFFSETS = 2**20  # a window begins at one of the haystack's first places, the same for every length and depth


def cell_prompt(tokenizer: Encoding, haystack_tokens, length: int, depth: float, sample: int, *, seed: int,
                task: str, chat: bool, distractors: int, digits: int, system: str | None = None) -> Prompt:
    """Prompt number `sample` of one cell; depends on no other cell. "mixed" alternates tasks by sample.

    A sample's window of the haystack begins at the same place in all cells, so that their prompts begin alike.
    """
    task = list(WORDING)[sample % 2] if task == "mixed" else task
    offset = random.Random(f"{seed} {sample}").randrange(max(1, min(OFFSETS, len(haystack_tokens) - length + 1)))
    rng = random.Random(f"{seed} {length} {depth:.6f} {sample}")
    return build_prompt(tokenizer, haystack_tokens[offset:], length, depth, rng, task, chat,
                        distractors if task == "needle" else 0, digits, system)


def standard_error(right: np.ndarray) -> float:
    """Of the mean of (depths, samples): over samples, since prompts of one share their text and fail together; binomial for
    a single sample."""
    if right.shape[1] == 1:
        return float((right.mean() * (1 - right.mean()) / right.size) ** 0.5)
    return float(right.mean(0).std(ddof=1) / right.shape[1] ** 0.5)


def evaluate(model: Llama, tokenizer: Encoding, haystack_tokens, lengths: list[int], depths: list[float],
             samples: int, seed: int = 1234, *, task: str = "passkey", chat: bool = False,
             distractors: int = 0, digits: int = 5, system: str | None = None, batch_tokens: int = 16384,
             device: str = "cpu", progress: bool = False) -> dict:
    """Retrieval accuracy of every length x depth, `samples` prompts each.

    Returns {"lengths", "depths", "cells", "means", "read", "computed"}. A cell has its length, depth, accuracy in % and
    every prompt's expected and given answer; a mean has a length's accuracy in % and standard error in points. Samples of a
    cell share forwards of up to `batch_tokens` tokens a replica; that changes no result, but by rounding. Cells go from the
    last place of the fact to the first, so that each begins like the one before and only what follows its fact is computed:
    of `read` tokens, `computed`.
    """
    options = {"seed": seed, "task": task, "chat": chat, "distractors": distractors, "digits": digits, "system": system}
    lengths, found, reader = sorted(set(lengths)), {}, Reader(model, device)
    bar = tqdm(total=len(lengths) * len(depths) * samples, unit="prompt", disable=None if progress else True)
    sizes = {length: min(samples, max(1, batch_tokens // length) * model.grid.dp) for length in lengths}
    for size in sorted(set(sizes.values())):
        cells = sorted(itertools.product([n for n in lengths if sizes[n] == size], depths),
                       key=lambda cell: -cell[0] * cell[1])
        for start, (length, depth) in itertools.product(range(0, samples, size), cells):
            batch = range(start, min(start + size, samples))
            prompts = [cell_prompt(tokenizer, haystack_tokens, length, depth, sample, **options) for sample in batch]
            for sample, prompt, said in zip(batch, prompts, predict(reader, prompts), strict=True):
                match, given = score(tokenizer, prompt, said)
                found.setdefault((length, depth), []).append({
                    "sample": sample, "task": prompt.task, "key": prompt.key, "expected": prompt.answer,
                    "given": given, "correct": match, "needle_start": prompt.needle_start})
            bar.update(len(batch))
    bar.close()
    cells = [{"length": length, "depth": depth, "prompts": found[length, depth],
              "accuracy": 100 * sum(p["correct"] for p in found[length, depth]) / samples}
             for length, depth in itertools.product(lengths, depths)]
    means = []
    for length in lengths:
        right = [[p["correct"] for p in cell["prompts"]] for cell in cells if cell["length"] == length]
        right = np.array(right)  # (depths, samples)
        means.append({"length": length, "prompts": right.size, "accuracy": 100 * float(right.mean()),
                      "standard_error": 100 * standard_error(right)})
    read, computed = reader.counts()
    return {"lengths": lengths, "depths": list(depths), "means": means, "cells": cells, "read": read, "computed": computed}


# ------------------------------------------------------------------------------------------- prompts of files


@dataclass(frozen=True)
class Question:
    """A prompt of a file, how its answer begins, right answers, the rule that scores them, what a table shows, and the template
    and system message that it was made for, if the file says so."""

    text: str
    answer_prefix: str
    answers: list[str]
    metric: str
    max_new_tokens: int
    task: str
    length: str
    made_for: tuple[str | None, str | None] = (None, None)


def read_questions(path: Path, metric: str | None = None, max_new_tokens: int | None = None) -> list[Question]:
    """Questions of a .jsonl file: RULER's (input, answer_prefix, outputs, length), InfiniteBench's (context, input,
    answer), LV-Eval's (context, input, answers), or prompt and answers.

    A record may state its own task, metric and max_new_tokens; the arguments win over them, and without either they
    are the file's name, "all" and 128. Raises ValueError naming the line.
    """
    questions = []
    for number, line in data.read_lines(path):
        try:
            record, text_or_number = json.loads(line), (str, int, float)
            text = record["prompt"] if "prompt" in record else "\n\n".join(
                record[key] for key in ("context", "input") if record.get(key))
            answers = next(record[key] for key in ("outputs", "answers", "answer") if key in record)
            answers = answers if isinstance(answers, list) else [answers]
            question = Question(text, record.get("answer_prefix", ""), [str(answer) for answer in answers],
                                metric or record.get("metric", "all"), max_new_tokens or record.get("max_new_tokens", 128),
                                str(record.get("task", path.name.split(".")[0])), str(record.get("length", "all")),
                                (record.get("template"), record.get("system")))
            good = (isinstance(text, str) and text and isinstance(question.answer_prefix, str) and question.metric in [*METRICS]
                    and answers and all(isinstance(answer, text_or_number) and str(answer) for answer in answers)
                    and isinstance(question.max_new_tokens, int) and question.max_new_tokens >= 1)
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
            good = False
        if not good:
            raise ValueError(f"{path}, line {number}: needs a JSON object with prompt (or context and input), answers (or "
                             f"outputs, or answer), and if stated a metric of {', '.join(METRICS)} and max_new_tokens of 1 or "
                             "more")
        questions.append(question)
    if not questions:
        raise ValueError(f"--jsonl {path}: holds no prompt")
    return questions


def prompt_tokens(tokenizer: Encoding, text: str, answer_prefix: str = "", chat: bool = False,
                  system: str | None = None) -> list[int]:
    """What the model reads: plain text after begin-of-text, or a user's message in the chat template; then how the
    answer begins."""
    if chat:
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]
        return data.encode_chat(messages, tokenizer, add_generation_prompt=True)[0] + tokenizer.encode_ordinary(answer_prefix)
    return begin_of_text(tokenizer) + tokenizer.encode_ordinary(text + answer_prefix)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles (SQuAD's normalisation, arXiv 1606.05250)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def shared_words(text: str, answer: str) -> float:
    """F1 of the words that prediction and answer share (arXiv 1606.05250)."""
    said, right = Counter(words(text)), Counter(words(answer))
    return 2 * (said & right).total() / max(1, said.total() + right.total())


METRICS = {  # score in [0, 1] of a text against the right answers; the first two are RULER's (arXiv 2404.06654)
    "all": lambda text, answers: sum(answer.lower() in text.lower() for answer in answers) / len(answers),
    "any": lambda text, answers: float(any(answer.lower() in text.lower() for answer in answers)),
    "f1": lambda text, answers: max(shared_words(text, answer) for answer in answers),
    "exact": lambda text, answers: float(any(words(text) == words(answer) for answer in answers)),
}


def printable(text: str) -> str:
    """A prediction as RULER scores it: control characters are line breaks, nothing around it."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()


ROUND = 8  # batches between two meetings of replicas: meeting seldom, they wait less for the longest prompts


@torch.inference_mode()
def answer_questions(reader: Reader, tokenizer: Encoding, questions: list[Question], pending: list[int], limit: int,
                     chat: bool = False, system: str | None = None, batch_tokens: int = 16384) -> Iterator[tuple]:
    """(index, tokens of the prompt, how many of them are read, what the model says, greedily) for each `pending` index into
    questions.

    Replicas take stretches of the questions in alphabetical order, so that a prompt begins as much as possible like
    the one before; equal lengths share a batch of up to `batch_tokens` tokens. Prompts longer than `limit` with their
    answer lose their middle. Every rank yields all answers, those of a few batches at a time.
    """
    grid, device, stops = reader.model.grid, reader.device, tuple(data.stop_tokens(tokenizer, None))
    ordered = sorted(pending, key=lambda index: (questions[index].text, index))
    share = -(-len(ordered) // grid.dp)

    def encode(index: int) -> tuple[list[int], int]:
        """Tokens to read, and how many the whole prompt has."""
        question, room = questions[index], limit - questions[index].max_new_tokens
        tokens = prompt_tokens(tokenizer, question.text, question.answer_prefix, chat, system)
        return tokens if len(tokens) <= room else tokens[:room - room // 2] + tokens[len(tokens) - room // 2:], len(tokens)

    mine = batches(ordered[grid.dp_rank * share:(grid.dp_rank + 1) * share], questions, encode, batch_tokens)
    while True:
        said = []  # index, length of the prompt, how much of it is read, answer
        for indices, rows, lengths in itertools.islice(mine, 1 if grid.dp == 1 else ROUND):
            prompts = torch.tensor(rows, device=device)  # (B, S)
            cache = reader.begin(prompts, prompts.shape[1] - 1)
            whole = reader.model.generate(prompts, questions[indices[0]].max_new_tokens, stop_tokens=stops, cache=cache)
            new = grid.to_host(whole[:, prompts.shape[1]:])
            said += [[index, length, len(row), *answer] for index, length, row, answer in zip(indices, lengths, rows, new)]
        found = gather_rows(said, grid, device)
        if not found:
            return
        for index, length, read, *answer in found:
            end = next((i for i, token in enumerate(answer) if token in stops or token < 0), len(answer))
            yield index, length, read, printable(text_of(tokenizer, answer[:end]))


def batches(order: list[int], questions: list[Question], encode: Callable, batch_tokens: int) -> Iterator[tuple]:
    """(indices, rows of tokens, whole lengths) of neighbours in `order` with equal lengths and equal room for an answer, up to
    `batch_tokens` tokens together; `encode` gives a row and its whole length."""
    indices, rows, lengths = [], [], []
    for index in order:
        row, length = encode(index)
        if rows and (len(row) != len(rows[0]) or (len(rows) + 1) * len(row) > batch_tokens
                     or questions[index].max_new_tokens != questions[indices[0]].max_new_tokens):
            yield indices, rows, lengths
            indices, rows, lengths = [], [], []
        indices.append(index)
        rows.append(row)
        lengths.append(length)
    if rows:
        yield indices, rows, lengths


def gather_rows(rows: list[list[int]], grid: Grid, device: str) -> list[list[int]]:
    """Rows of numbers, not negative, of every replica, on every rank; short ones end in -1."""
    shapes = grid.all_gather(torch.tensor([len(rows), max(map(len, rows), default=0)], device=device), "dp")  # (dp, 2)
    most, widest = grid.to_host(shapes.amax(0))
    padded = torch.full((most, widest), -1, device=device)
    for place, row in enumerate(rows):
        padded[place, :len(row)] = torch.tensor(row, device=device)
    gathered = grid.to_host(grid.all_gather(padded, "dp"))  # (dp, most, widest)
    return [row for part, count in zip(gathered, grid.to_host(shapes[:, 0])) for row in part[:count]]


def question_settings(a: argparse.Namespace, config) -> dict:
    """What decides the answers, as the first line of their file states it: results of other settings never mix."""
    names = ("prompt", "system", "metric", "max_new_tokens", "max_length", "dtype")
    weights = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in a.model.glob("*.safetensors"))
    weights = hashlib.sha256(repr(weights).encode()).hexdigest()[:16]
    stated = {name: getattr(a, name) for name in names}
    return stated | {"jsonl": data.digest(a.jsonl), "model": config.to_hf(), "weights": weights}


def read_answers(path: Path, settings: dict) -> dict[int, dict]:
    """Answers that an earlier run wrote, by index; a line that a killed run left half-written is dropped from the file.

    Raises ValueError if they were made with other settings, or the file is none of ours.
    """
    if not path.exists():
        return {}
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    try:
        first, *lines = map(json.loads, whole.splitlines() or [b"{}"])
        other = {name: first["settings"].get(name) for name in settings if first["settings"].get(name) != settings[name]}
        answers = {line["index"]: line for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--out {path}: exists and holds no answers of --jsonl; choose another file") from None
    if other:
        name = next(iter(other))
        raise ValueError(f"--out {path}: was made with {name} {other[name]!r}, not {settings[name]!r}; choose another file")
    return answers


def choose_prompt(a: argparse.Namespace, questions: list[Question], tokenizer: Encoding) -> None:
    """Set --prompt and --system, where they are not given, to what the prompts were made for. ValueError if they contradict."""
    made_for = {question.made_for for question in questions} - {(None, None)}
    if len(made_for) == 1 and a.prompt is None:
        a.prompt, a.system = next(iter(made_for))
    a.prompt = a.prompt or ("chat" if data.has_chat_tokens(tokenizer) else "plain")
    for template, system in made_for - {(a.prompt, a.system)}:
        raise ValueError(f"--jsonl {a.jsonl}: has prompts made for --prompt {template} and --system {system!r}, not for "
                         f"{a.prompt} and {a.system!r}: their lengths would be wrong; leave both options out")


def run_questions(a: argparse.Namespace, config, tokenizer: Encoding) -> None:
    """Answer what `--out` does not hold yet, write a line an answer, and print mean scores."""
    questions = read_questions(a.jsonl, a.metric, a.max_new_tokens)
    choose_prompt(a, questions, tokenizer)
    settings, limit = question_settings(a, config), a.max_length or config.max_position_embeddings
    least = max(question.max_new_tokens for question in questions) + 2
    if limit < least:
        raise ValueError(f"--max-length {limit} is too small: the answers alone take {least - 2}")
    answers = read_answers(a.out, settings) if a.out else {}
    grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
    missing = torch.tensor([index not in answers for index in range(len(questions))], device=a.device)
    pending = grid.broadcast(missing.long()).nonzero()[:, 0].tolist()  # the first rank's file decides
    counts = [0, 0]
    if answers and pending:
        print_once(f"{a.out} has {len(answers)} of {len(questions)} answers: the others follow")
    if pending:
        reader = Reader(load_model(a, config, grid), a.device)
        found = answer_questions(reader, tokenizer, questions, pending, limit, a.prompt == "chat", a.system, a.batch_tokens)
        write_answers(a.out if grid.is_first else None, settings, answers, questions,
                      tqdm(found, total=len(pending), unit="prompt", disable=None if grid.is_first else True))
        counts = reader.counts()
    print_once(score_table(answers))
    if cut := sum(answer["read"] < answer["prompt_tokens"] for answer in answers.values()):
        print_once(f"note: {cut} of {len(answers)} prompts do not fit into {limit} tokens with their answer: middle cut")
    print_saved(*counts)
    grid.close()


def write_answers(out: Path | None, settings: dict, answers: dict[int, dict], questions: list[Question],
                  found: Iterable[tuple]) -> None:
    """Add what answer_questions has `found` to `answers`, scored, and each at once to the file `out`."""
    with ExitStack() as files:
        if out:
            files.enter_context(data.locked(out.with_name(out.name + ".lock")))
            lines = [json.dumps({"settings": settings}), *map(json.dumps, answers.values())]
            data.write_complete(out, "".join(line + "\n" for line in lines).encode())
            file = files.enter_context(open(out, "a"))
        for index, length, read, text in found:
            question = questions[index]
            answers[index] = {"index": index, "task": question.task, "length": question.length, "prompt_tokens": length,
                              "read": read, "prediction": text, "answers": question.answers, "metric": question.metric,
                              "score": METRICS[question.metric](text, question.answers)}
            if out:
                file.write(json.dumps(answers[index]) + "\n")
                file.flush()


def score_table(answers: dict[int, dict]) -> str:
    """Mean score in % of each task and length, the number of prompts, and the mean of tasks."""
    lengths = sorted({answer["length"] for answer in answers.values()}, key=lambda text: (len(text), text))
    scores = {}
    for _, answer in sorted(answers.items()):
        scores.setdefault(answer["task"], {}).setdefault(answer["length"], []).append(100 * answer["score"])
    width = max(4, *map(len, scores))
    shown = [short_length(int(length)) if length.isdecimal() else length for length in lengths]
    lines = [f"{'task':<{width}}" + "".join(f"{text:>8}" for text in shown) + f"{'prompts':>9}"]
    for task, row in scores.items():
        means = (f"{np.mean(row[length]):8.1f}" if length in row else f"{'-':>8}" for length in lengths)
        lines.append(f"{task:<{width}}" + "".join(means) + f"{sum(map(len, row.values())):>9}")
    if len(scores) > 1:
        means = (np.mean([np.mean(row[length]) for row in scores.values() if length in row]) for length in lengths)
        lines.append(f"{'mean':<{width}}" + "".join(f"{mean:8.1f}" for mean in means) + f"{len(answers):>9}")
    return "\n".join(lines)


def print_saved(read: int, computed: int) -> None:
    """How much of the prompts went through the model, the rest being shared."""
    if read:
        print_once(f"{computed:,} of the prompts' {read:,} tokens computed ({computed / read:.2f}), the others shared")


# ---------------------------------------------------------------------------------------- perplexity by position


def load_long_documents(path: Path, tokenizer: Encoding, length: int, count: int) -> np.ndarray:
    """The first length + 1 tokens of the first `count` documents that have them, (count, length + 1) int64, begin-of-text where
    there is one included: of a corpus's held-out split, or of text files. Raises ValueError if there are fewer."""
    if data.is_corpus(path):
        documents = data.held_out_split(path, tokenizer)
    else:
        documents = (np.array(tokenizer.encode_ordinary(document.get("text", ""))) for document in data.read_documents(path))
    found, longest = [], 0
    for tokens in (np.concatenate([np.array(begin_of_text(tokenizer), np.int64), tokens]) for tokens in documents):
        longest = max(longest, len(tokens))
        if len(tokens) > length:
            found.append(tokens[:length + 1])
        if len(found) == count:
            return np.stack(found)
    raise ValueError(f"--haystack {path}: {len(found)} documents have more than {length} tokens (the longest {longest}); "
                     f"--samples asks for {count}: lower it or --lengths, or take longer documents")


@torch.inference_mode()
def perplexity_by_position(model: Llama, documents: np.ndarray, buckets: int, device: str) -> dict:
    """Mean loss of the tokens at each stretch of positions, over documents (N, S + 1), one at a time a replica.

    Returns "edges" (buckets + 1 positions), "loss" (nats a token, buckets) and "standard_error" over the documents.
    """
    grid, length = model.grid, documents.shape[1] - 1
    edges = [round(i * length / buckets) for i in range(buckets + 1)]
    sums = torch.zeros(len(documents), buckets, dtype=torch.float64, device=device)
    for row in range(grid.dp_rank, len(documents), grid.dp):
        tokens = torch.from_numpy(documents[row:row + 1]).to(device)
        losses = model.token_losses(tokens[:, :-1].contiguous(), tokens[:, 1:])[0].double()  # (S,)
        sums[row] = torch.stack([part.mean() for part in losses.tensor_split(edges[1:-1])])
    sums = torch.tensor(grid.to_host(grid.all_reduce(sums, "dp")), dtype=torch.float64)  # (N, buckets)
    error = sums.std(0) / len(sums) ** 0.5 if len(sums) > 1 else torch.zeros(buckets)
    return {"edges": edges, "loss": sums.mean(0).tolist(), "standard_error": error.tolist(), "documents": len(sums)}


def perplexity_table(runs: list[dict], labels: list[str]) -> str:
    """Perplexity of each run, a column, at each stretch of positions, a row; a line where the old window ends."""
    width = max(10, *(len(label) + 2 for label in labels))
    lines = [f"{'positions':>17}" + "".join(f"{label:>{width}}" for label in labels)]
    edges = runs[0]["edges"]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        if i and start >= runs[0]["window"] > edges[i - 1]:
            lines.append(f"{'old window ends':>17}")
        lines.append(f"{f'{start:,}-{end:,}':>17}" + "".join(f"{math.exp(run['loss'][i]):>{width}.4g}" for run in runs))
    return "\n".join(lines)


def draw_perplexity(runs: list[dict], labels: list[str]) -> bytes:
    """PNG of perplexity over positions, a curve a run, a line where the old window ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained", facecolor="white")
    panel = figure.subplots()
    for results, label, colour in zip(runs, labels, itertools.cycle(("#d55e00", "#0072b2", "#009e73", "#cc79a7"))):
        middles = [(start + end) / 2 for start, end in itertools.pairwise(results["edges"])]
        panel.plot(middles, np.exp(results["loss"]), color=colour, linewidth=2, marker="o", markersize=4, label=label)
    if runs[0]["window"] < runs[0]["edges"][-1]:
        panel.axvline(runs[0]["window"], color="#222222", linewidth=2, linestyle=(0, (4, 2)))
        panel.text(runs[0]["window"], 1.01, f"old window: {short_length(runs[0]['window'])}", fontsize=10, ha="center",
                   va="bottom", color="#222222", transform=panel.get_xaxis_transform())
    panel.set_yscale("log")
    panel.set_xlim(0, runs[0]["edges"][-1])
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("position in the document (tokens)", fontsize=12)
    panel.set_ylabel("perplexity", fontsize=12)
    panel.legend(frameon=False)
    return png(figure)


# ---------------------------------------------------------------------------------------------------- output


def short_length(length: int) -> str:
    """131072 -> 128K, 1048576 -> 1M, 1000 -> 1000."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def accuracy_grid(results: dict) -> list[list[float]]:
    """Accuracy in %, one row a depth, one column a length."""
    found = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in results["cells"]}
    return [[found[length, depth] for length in results["lengths"]] for depth in results["depths"]]


def lengths_inside(results: dict) -> int:
    """How many columns lie within the old window: 0 if there is no border to mark between two of them."""
    return sum(length <= results["window"] for length in results["lengths"]) % len(results["lengths"])


def terminal_map(results: dict, colour: bool) -> str:
    """The heat map as text: rows are depths, columns lengths, a bar where the old window ends."""
    border, means = lengths_inside(results), results["means"]

    def line(name: str, texts: list[str], values: list[float] | None = None) -> str:
        parts = [f"{text:^7}" for text in texts]
        if values and colour:  # of the 256 colours: 208 orange for 0 %, 187 sand, 36 bluish green for 100 %
            tones = [(208, 214, 222, 187, 115, 79, 36)[round(value / 100 * 6)] for value in values]
            parts = [f"\033[30;48;5;{tone}m{part}\033[0m" for tone, part in zip(tones, parts, strict=True)]
        return f"{name:>7} " + "".join(parts[:border]) + " | " * (border > 0) + "".join(parts[border:])

    lines = [line("depth", [short_length(length) for length in results["lengths"]])]
    for depth, row in zip(results["depths"], accuracy_grid(results), strict=True):
        lines.append(line(f"{100 * depth:.0f} %", [f"{value:.0f}" for value in row], row))
    values = [mean["accuracy"] for mean in means]
    lines.append(line("mean", [f"{value:.1f}" for value in values], values))
    lines.append(line("±", [f"{mean['standard_error']:.1f}" for mean in means]))
    return "\n".join(lines)


def draw_figure(runs: list[dict], labels: list[str]) -> bytes:
    """PNG of the runs' heat maps side by side on one colour scale, a line where the old window ends."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    # Okabe and Ito's vermilion and bluish green: colour-blind readers tell them apart
    tones = ["#d55e00", "#f3b173", "#fbf3dc", "#7cc9ae", "#009e73"]
    figure = Figure(figsize=(1.4 + 4.55 * len(runs), 5), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, results, label in zip(panels, runs, labels, strict=True):
        grid, border = accuracy_grid(results), lengths_inside(results)
        lengths = [short_length(length) for length in results["lengths"]]
        image = panel.imshow(grid, vmin=0, vmax=100, aspect="auto",
                             cmap=LinearSegmentedColormap.from_list("retrieval", tones))
        for (row, column), value in np.ndenumerate(np.array(grid)):
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=10,
                       color="white" if value < 15 or value > 85 else "#333333")
        panel.set_xticks(range(len(lengths)), lengths, fontsize=11)
        panel.set_yticks(range(len(grid)), [f"{100 * d:.0f} %" for d in results["depths"]], fontsize=11)
        panel.hlines(np.arange(len(grid) - 1) + 0.5, -0.5, len(lengths) - 0.5, color="white", linewidth=1.5)
        panel.vlines(np.arange(len(lengths) - 1) + 0.5, -0.5, len(grid) - 0.5, color="white", linewidth=1.5)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("context length (tokens)", fontsize=12)
        panel.set_title(label, loc="left", fontsize=14, fontweight="bold", pad=24)
        if border:
            left = border < len(lengths) / 2
            panel.axvline(border - 0.5, color="#222222", linewidth=2, linestyle=(0, (4, 2)))
            panel.text(border - 0.5, -0.6, f"old window: {short_length(results['window'])}", fontsize=10,
                       ha="left" if left else "right", va="bottom", color="#222222")
    panels[0].set_ylabel("depth of the fact", fontsize=12)
    figure.colorbar(image, ax=list(panels), pad=0.015, aspect=30).set_label("exact match (%)", fontsize=12)
    return png(figure)


def png(figure) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show_comparison(a: argparse.Namespace) -> None:
    """Print runs x lengths, or curves of perplexity, and draw them side by side."""
    runs, labels = [], a.labels or [path.stem for path in a.compare]
    if len(labels) != len(a.compare):
        raise ValueError(f"--labels has {len(labels)} names for {len(a.compare)} results")
    for path in a.compare:
        try:
            results = json.loads(path.read_text())
            runs.append(results | {"window": a.window or results["window"]})
            if "edges" in results:  # whatever is missing shows here
                perplexity_table(runs[-1:], [""])
            else:
                terminal_map(runs[-1], colour=False)
        except (ValueError, LookupError, TypeError, ArithmeticError):
            raise ValueError(f"--compare {path}: not results of needles or perplexity that --out has written") from None
    if len({str(results.get("edges")) for results in runs}) > 1:
        raise ValueError("--compare: these are not all of needles, or all of perplexity at the same positions")
    if "edges" in runs[0]:
        print(perplexity_table(runs, labels))
        return data.write_complete(a.figure, draw_perplexity(runs, labels)) if a.figure else None
    lengths = sorted({length for results in runs for length in results["lengths"]})
    width = max(map(len, labels))
    print(" " * width + "".join(f"{short_length(length):>8}" for length in lengths))
    for label, results in zip(labels, runs, strict=True):
        means = {mean["length"]: f"{mean['accuracy']:.1f}" for mean in results["means"]}
        print(f"{label:>{width}}" + "".join(f"{means.get(length, '-'):>8}" for length in lengths))
    if a.figure:
        data.write_complete(a.figure, draw_figure(runs, labels))


# ---------------------------------------------------------------------------------------------- command line


def load_haystack(path: Path, tokenizer: Encoding, needed: int) -> np.ndarray:
    """The first `needed` tokens (int64; or all there are) of a corpus's held-out split, or of text files.

    Raises FileNotFoundError, or ValueError if the text states facts of its own in our wording.
    """
    if data.is_corpus(path):
        options = {"seed": 0, "separator": "none", "tokenizer": tokenizer}
        held_out = int(data.PackedDataset(path, "valid", 1, **options).lengths.sum())  # then it repeats
        stream = data.PackedDataset(path, "valid", max(1, min(held_out, needed) - 1), **options)
        tokens = stream.sequence(0)[0]
    else:
        pieces, count = [], 0
        for document in data.read_documents(path):
            pieces.append(tokenizer.encode_ordinary(document.get("text", "") + "\n\n"))
            count += len(pieces[-1])
            if count >= needed:
                break
        tokens = np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int64)[:needed]
    text = tokenizer.decode_bytes(tokens.tolist())
    for wording in WORDING.values():
        fact = re.search(wording["lead"].replace("{key}", r"\S+").encode() + rb"\d+", text)
        if fact:
            raise ValueError(f"--haystack {path}: holds {fact.group()!r}, like the facts to be hidden")
    return tokens


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Needles over lengths and depths, prompts of files, perplexity by position.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="Hugging Face model directory")
    what = parser.add_argument_group("what to do (default: needles)")
    what.add_argument("--jsonl", type=Path, help="answer and score the prompts of a .jsonl file instead")
    what.add_argument("--perplexity", action="store_true", help="perplexity by position instead, in documents of one --lengths")
    what.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="only show earlier results")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--haystack", type=Path, help="text that was not trained on: a corpus directory (of which "
                         "the held-out split is used), a directory, .txt or .jsonl of text, or stdlib")
    prompts.add_argument("--lengths", type=int, nargs="+", help="tokens, the answer's included")
    prompts.add_argument("--depths", type=int, default=10, help="how many, evenly from 0 to 1")
    prompts.add_argument("--samples", type=int, default=5, help="prompts a cell, shared by data-parallel replicas; "
                         "documents of --perplexity")
    prompts.add_argument("--task", choices=(*WORDING, "mixed"), default="passkey")
    prompts.add_argument("--prompt", choices=("plain", "chat"), help="default: plain for needles; for --jsonl chat where the "
                         "tokenizer has chat tokens")
    prompts.add_argument("--system", help="a system message before each chat prompt")
    prompts.add_argument("--distractors", type=int, default=0, help="facts of other keys (task needle)")
    prompts.add_argument("--digits", type=int, default=5, help="length of the numbers")
    prompts.add_argument("--metric", choices=METRICS, help="of --jsonl; default: the record's, else all")
    prompts.add_argument("--max-new-tokens", type=int, help="of --jsonl; default: the record's, else 128")
    prompts.add_argument("--max-length", type=int, help="of --jsonl: longer prompts lose their middle; default: "
                         "the model's window")
    prompts.add_argument("--buckets", type=int, default=16, help="stretches of positions of --perplexity")
    prompts.add_argument("--seed", type=int, default=1234)
    compute = parser.add_argument_group("compute")
    compute.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                         help="auto: bfloat16 on GPU, float32 on CPU")
    compute.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    compute.add_argument("--batch-tokens", type=int, default=16384, help="tokens a forward of a replica, or one prompt")
    add_grid_arguments(parser)
    add_scaling_arguments(parser, "context extension without training (replaces the checkpoint's scaling)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="results, JSON; of --jsonl a line an answer, and a stopped run goes on")
    output.add_argument("--figure", type=Path, help="heat map or curve, PNG (needs matplotlib)")
    output.add_argument("--window", type=int, help="old window to mark (default: before extension)")
    output.add_argument("--labels", nargs="+", help="names of the compared runs (default: the files')")
    return parse_once(parser, argv)


def check_arguments(a: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read. Raises ValueError or OSError naming the option."""
    if (a.model is None) == (a.compare is None):
        raise ValueError("give either a model directory to evaluate, or --compare with results to show")
    for path in a.compare or ():
        if not path.is_file():
            raise FileNotFoundError(f"--compare {path}: no such file")
    if a.jsonl and (a.perplexity or a.haystack or a.lengths or a.figure):
        raise ValueError("--jsonl brings its own prompts: it goes without --perplexity, --haystack, --lengths and --figure")
    if a.model and not a.jsonl and not (a.haystack and a.lengths):
        raise ValueError("an evaluation needs --haystack and --lengths, or --jsonl")
    for name in ("metric", "max_new_tokens", "max_length"):
        if getattr(a, name) is not None and not a.jsonl:
            raise ValueError(f"--{name.replace('_', '-')} is for --jsonl only")
    if a.system is not None and (a.perplexity or a.prompt != "chat" and not (a.jsonl and a.prompt is None)):
        raise ValueError("--system: only a chat prompt has a system message; use --prompt chat")
    if a.perplexity and len(a.lengths) > 1:
        raise ValueError(f"--perplexity takes one of --lengths, not {len(a.lengths)}")
    smallest = {"depths": 1, "samples": 1, "distractors": 0, "digits": 1, "batch_tokens": 1, "window": 1, "buckets": 1,
                "max_new_tokens": 1, "max_length": 2}
    for name, least in smallest.items():
        value = getattr(a, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; the least is {least}")
    if a.perplexity and min(a.lengths) < a.buckets:
        raise ValueError(f"--lengths {a.lengths[0]} is too small for --buckets {a.buckets}")
    if a.distractors and a.task == "passkey":
        raise ValueError("--distractors need keys to tell facts apart: use --task needle or mixed")
    if a.haystack:
        a.haystack = data.source_path(a.haystack, "--haystack")
    scaling_from_arguments(a)
    check_device(a.device)
    a.dtype = ("float32" if a.device == "cpu" else "bfloat16") if a.dtype == "auto" else a.dtype
    check_grid(a.tp, a.cp, launched()[1])
    for option, path in (("--out", a.out), ("--figure", a.figure)):
        if path and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise OSError(f"{option} {path}: cannot be written; give a file in a directory that exists")
    if a.figure and a.figure.suffix != ".png":
        raise ValueError(f"--figure {a.figure}: the figure is a PNG; give a name that ends in .png")
    if a.figure and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install -r requirements-dev.txt")


def load_model(a: argparse.Namespace, config, grid: Grid) -> Llama:
    """The checkpoint on this grid, with the scaling that the arguments name."""
    scaling = config.rope_scaling if a.rope_kind else None
    return Llama.from_pretrained(a.model, grid, getattr(torch, a.dtype), a.device, scaling)


def old_window(a: argparse.Namespace, config) -> int:
    """The window before extension: Llama 3.1's own scaling is part of it, the other kinds extend one."""
    scaling = config.rope_scaling
    extended = scaling.original_max_position if scaling.kind not in ("default", "llama3") else None
    return a.window or extended or config.max_position_embeddings


def run_needles(a: argparse.Namespace, config, tokenizer: Encoding) -> None:
    """Build the shortest prompts, load the model, evaluate, show and write."""
    longest = max(a.lengths)
    haystack = load_haystack(a.haystack, tokenizer, OFFSETS + longest)
    if len(haystack) < longest:
        raise ValueError(f"--haystack {a.haystack}: {len(haystack)} tokens; length {longest} needs as many")
    depths = [round(i / (a.depths - 1), 6) for i in range(a.depths)] if a.depths > 1 else [0.5]
    options = {"seed": a.seed, "task": a.task, "chat": a.prompt == "chat", "distractors": a.distractors, "digits": a.digits,
               "system": a.system}
    for depth, sample in itertools.product(depths, range(a.samples)):  # a length that is too small shows here
        cell_prompt(tokenizer, haystack, min(a.lengths), depth, sample, **options)
    grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
    results = {"settings": json.loads(json.dumps(vars(a), default=str)), "window": old_window(a, config)}
    results |= evaluate(load_model(a, config, grid), tokenizer, haystack, a.lengths, depths, a.samples,
                        batch_tokens=a.batch_tokens, device=a.device, progress=grid.is_first, **options)
    if grid.is_first:
        print(terminal_map(results, sys.stdout.isatty()))
        print_saved(results["read"], results["computed"])
        write_results(a, results, lambda label: draw_figure([results], [label]))
    grid.close()


def run_perplexity(a: argparse.Namespace, config, tokenizer: Encoding) -> None:
    """Read long documents, load the model, measure, show and write."""
    documents = load_long_documents(a.haystack, tokenizer, a.lengths[0], a.samples)
    grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
    results = {"settings": json.loads(json.dumps(vars(a), default=str)), "window": old_window(a, config)}
    results |= perplexity_by_position(load_model(a, config, grid), documents, a.buckets, a.device)
    if grid.is_first:
        print(perplexity_table([results], [a.model.name]))
        write_results(a, results, lambda label: draw_perplexity([results], [label]))
    grid.close()


def write_results(a: argparse.Namespace, results: dict, draw: Callable[[str], bytes]) -> None:
    """--out and --figure, complete or not at all."""
    if a.out:
        data.write_complete(a.out, (json.dumps(results, indent=1) + "\n").encode())
    if a.figure:
        data.write_complete(a.figure, draw(a.labels[0] if a.labels else a.model.name))


def run(a: argparse.Namespace) -> None:
    """Check everything that can be checked without the weights, then do what was asked."""
    check_arguments(a)
    if a.compare:
        return show_comparison(a) if launched()[0] == 0 else None
    config, tokenizer = rescale(read_config(a.model), scaling_from_arguments(a)), data.load_tokenizer(a.model)
    check_grid(a.tp, a.cp, launched()[1], config.shards())
    attention_kernel(a.device, getattr(torch, a.dtype), config.head_dim)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{a.model}: tokenizer of {tokenizer.n_vocab} tokens, model of {config.vocab_size}")
    if max(a.lengths or [a.max_length or 0]) > config.max_position_embeddings:
        print_once(f"note: lengths above {config.max_position_embeddings} lie beyond this model's window")
    if a.jsonl:
        run_questions(a, config, tokenizer)
    elif a.perplexity:
        run_perplexity(a, config, tokenizer)
    else:
        run_needles(a, config, tokenizer)


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main()
