"""Retrieval evaluation: hide a number in real text at every depth of every length, ask for it.

    python eval_niah.py MODEL_DIR --haystack CORPUS --lengths 128 256 512 --out results.json
    torchrun --standalone --nproc-per-node 8 eval_niah.py MODEL_DIR --tp 2 --cp 4 ...      # the same on eight processes
    python -m tools.plot compare results.json --figure heat.png

A needle prompt costs one forward: the right answer is fed after the question (teacher forcing), and each of its tokens
must be what the model would have said. The haystack is text held out from training. A prompt of length N has exactly N
tokens. Prompts that begin alike share the keys and values of what they share. What else measures a model stands in tools/:
answer, ruler, perplexity.
"""
from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiktoken import Encoding
from tqdm import tqdm

import data
from model import KVCache, Llama, ModelConfig, read_config, rescale
from parallel import Grid, attention_kernel, one_line_errors, print_once
from rope_yarn import add_scaling_arguments, scaling_from_options
from sft import encode_question, end_of_turn
from train import Parser, add_compute_arguments, compute_type, existing, nonnegative, positive, writable

# A fact stands on a line of its own, its number between the two parts. The lead is where an answer begins.
WORDING = {
    "passkey": {"fact": ("\nThe pass key is ", ". Remember it.\n"),
                "question": "\nWhat is the pass key?", "lead": "The pass key is "},
    "needle": {"fact": ("\nThe magic number of {key} is ", ".\n"),
               "question": "\nWhat is the magic number of {key}?", "lead": "The magic number of {key} is "},
}
OFFSETS = 2**20  # a window begins at one of the haystack's first places, the same for every length and depth
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
                 task: str = "passkey", chat: bool = False, digits: int = 5, system: str | None = None) -> Prompt:
    """One prompt of exactly `length` tokens, the answer's included; a pure function of its arguments and of rng's state.

    haystack_tokens: 1-D ids, at least `length` of them, of which the first are used: the window. depth in [0, 1]
    is where in it the fact goes, moved to a line border if one is near. Every piece is tokenised alone and joined as
    ids, so lengths add up, and the number has the same tokens in the fact and in the answer. The window holds neither
    the key nor the number. Raises ValueError if the length is too small, or no key or number is left that the
    window does not hold.
    """
    assert 0 <= depth <= 1, depth
    assert len(haystack_tokens) >= length, f"the haystack has {len(haystack_tokens)} tokens, not {length}"
    window = np.asarray(haystack_tokens[:length]).tolist()
    key, number = draw_fact(rng, tokenizer.decode_bytes(window).lower(), digits, task)

    wording, encode = WORDING[task], tokenizer.encode_ordinary
    opening, closing = wording["fact"]
    answer = encode(number)
    fact = encode(opening.format(key=key)) + answer + encode(closing)
    question, lead = wording["question"].format(key=key), wording["lead"].format(key=key)
    if chat:
        head, turn = chat_frame(tokenizer, system)
        tail = encode(question) + turn + encode(lead)
    else:
        head, tail = begin_of_text(tokenizer), encode(f"{question} {lead}")
    room = length - len(head) - len(fact) - len(tail) - len(answer)
    if room < 1:
        raise ValueError(f"length {length} is too small: fact, question and answer take {length - room}")
    del window[room:]
    place = insertion_point(tokenizer, window, round(depth * room))
    tokens = head + window[:place] + fact + window[place:] + tail + answer
    return Prompt(tokens, length - len(answer), len(head) + place, number, task, key)


def draw_fact(rng: random.Random, text: bytes, digits: int, task: str) -> tuple[str | None, str]:
    """A key (None for a pass key) and a number, neither of which stands in lower-case `text`."""
    def absent(what: str, draw: Callable[[], str]) -> str:
        for _ in range(1000):
            candidate = draw()
            if candidate.encode() not in text:
                return candidate
        raise ValueError(f"the haystack holds nearly all {what}: longer numbers (--digits) or another haystack are needed")

    number = absent(f"numbers of {digits} digits", lambda: str(rng.randrange(10**(digits - 1), 10**digits)))
    if task == "passkey":
        return None, number
    free = [key for key in KEYS if key.encode() not in text]
    if free:
        return rng.sample(free, 1)[0], number
    # a million tokens of prose hold every common word, but not every two of them joined
    return absent("keys", lambda: "-".join(rng.sample(KEYS, 2))), number


def begin_of_text(tokenizer: Encoding) -> list[int]:
    """Llama 3 sees its begin-of-text token before any text; most other tokenizers have none."""
    name = "<|begin_of_text|>"
    return [tokenizer.encode_single_token(name)] if name in tokenizer.special_tokens_set else []


def chat_frame(tokenizer: Encoding, system: str | None = None) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after a user's message, up to the assistant's first token."""
    opened = encode_question("", tokenizer, system)
    end = len(opened) - 1 - opened[::-1].index(end_of_turn(tokenizer))  # of the user's empty message
    return opened[:end], opened[end:]


def insertion_point(tokenizer: Encoding, window: list[int], target: int) -> int:
    """The line border nearest to `target`, within 2 % of the window (8 to 256 tokens); if there is none, the
    nearest place that cuts no word, and at last one that cuts no character."""
    def text(i: int) -> bytes:
        return tokenizer.decode_single_token_bytes(window[i]) if 0 <= i < len(window) else b"\n"

    reach = min(max(8, len(window) // 50), 256)
    places = range(max(0, target - reach), min(len(window), target + reach) + 1)
    places = sorted(places, key=lambda place: abs(place - target))
    for place in places:
        if text(place - 1).endswith(b"\n") or text(place).startswith(b"\n"):
            return place
    for place in places:
        if text(place - 1)[-1:].isspace() or text(place)[:1].isspace():
            return place
    for place in places:
        if not b"\x80" <= text(place)[:1] < b"\xc0":  # UTF-8 continues a character with bytes 80 to BF
            return place
    return target


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
    read before stay in the KV cache. `read` counts tokens of rows, `computed` those that went through the model. `more` is
    how many tokens may be generated after a row.
    """

    def __init__(self, model: Llama, more: int = 0) -> None:
        self.model, self.more = model, more
        self.rows, self.cache = None, None  # what was read last
        self.read, self.computed = 0, 0

    def begin(self, rows: torch.Tensor, most: int) -> KVCache:
        """The cache, truncated to what it shares with rows (B, S) int64: `most` tokens at most."""
        grid, length = self.model.grid, rows.shape[1]
        most_held = length if grid.cp == 1 else math.ceil(1.5 * length / grid.cp)  # by one rank of the ring
        needed = most_held + grid.sequence_multiple + self.more
        if self.rows is None or len(self.rows) != len(rows) or self.cache.capacity < needed:
            self.rows, self.cache = rows, None  # given back before the next one is made
            self.cache = self.model.new_cache(len(rows), needed + needed // 32)  # a little over, for rows a little longer
        width = min(self.rows.shape[1], most, self.cache.length)
        differ = (self.rows[:, :width] != rows[:, :width]).any(0).nonzero()  # places
        self.cache.truncate(int(differ[0]) if len(differ) else width)
        if self.cache.fullest() + (length - self.cache.length) / grid.cp > most_held:
            self.cache.truncate(0)  # one rank would hold and do too much
        self.rows = rows
        self.read += rows.numel()
        self.computed += rows[:, self.cache.length:].numel()
        return self.cache

    def counts(self) -> list[int]:
        """`read` and `computed` of all replicas."""
        counts = torch.tensor([self.read, self.computed], device=self.model.head_weight.device)
        return self.model.grid.all_reduce(counts, "dp").tolist()


@torch.inference_mode()
def predict(reader: Reader, prompts: list[Prompt]) -> list[list[int]]:
    """Argmax for each answer token and the one after, of prompts of equal length, in one forward a replica.

    Data-parallel replicas share the prompts; every rank returns all predictions.
    """
    model, grid, device = reader.model, reader.model.grid, reader.model.head_weight.device
    grid.restart_timer()
    widths = [len(prompt.tokens) - prompt.answer_start + 1 for prompt in prompts]
    best = torch.zeros(len(prompts), max(widths), dtype=torch.int64, device=device)
    mine = prompts[grid.dp_rank::grid.dp]
    if mine:
        tokens = torch.tensor([prompt.tokens for prompt in mine], device=device)  # (B, S)
        first = tokens.shape[1] - max(widths)  # the place that predicts the first answer token
        cache = reader.begin(tokens, first)
        places = torch.arange(first, tokens.shape[1], device=device) - cache.length  # (answer + 1,)
        hidden = model.hidden_at(tokens[:, cache.length:], places.expand(len(tokens), -1), cache)
        best[grid.dp_rank::grid.dp] = model.logits(hidden).argmax(dim=-1)  # the head never sees S rows
    best = grid.all_reduce(best, "dp").tolist()
    return [row[-width:] for row, width in zip(best, widths, strict=True)]


def cell_prompt(tokenizer: Encoding, haystack_tokens, length: int, depth: float, sample: int, *, seed: int = 1234,
                task: str = "passkey", **options) -> Prompt:
    """Prompt number `sample` of one cell; depends on no other cell. "mixed" alternates tasks by sample; `options` are those
    of `build_prompt`.

    A sample's window of the haystack begins at the same place in all cells (of a haystack of OFFSETS tokens more than the
    longest has; of a shorter one in most), so that their prompts begin alike.
    """
    task = list(WORDING)[sample % 2] if task == "mixed" else task
    offset = random.Random(f"{seed} {sample}").randrange(max(1, min(OFFSETS, len(haystack_tokens) - length + 1)))
    rng = random.Random(f"{seed} {length} {depth:.6f} {sample}")
    return build_prompt(tokenizer, haystack_tokens[offset:], length, depth, rng, task, **options)


def standard_error(right: np.ndarray) -> float:
    """Standard error of the mean of `right` (depths, samples): over samples, since prompts of one share their text and fail
    together; binomial for a single sample."""
    if right.shape[1] == 1:
        return float((right.mean() * (1 - right.mean()) / right.size) ** 0.5)
    return float(right.mean(0).std(ddof=1) / right.shape[1] ** 0.5)


def evaluate(model: Llama, tokenizer: Encoding, haystack_tokens, lengths: list[int], depths: list[float], samples: int, *,
             batch_tokens: int = 16384, **options) -> dict:
    """Retrieval accuracy of every length x depth, `samples` prompts each; `options` are those of `cell_prompt`.

    Returns {"lengths", "depths", "cells", "means", "read", "computed"}. A cell has its length, depth, accuracy in % and
    every prompt's expected and given answer; a mean has a length's accuracy in % and standard error in points. Samples share
    forwards of up to `batch_tokens` tokens a replica; that changes no result, but by rounding. Of `read` tokens, `computed`
    went through the model.
    """
    lengths = sorted(set(lengths))
    reader = Reader(model)
    size = max(1, batch_tokens // lengths[-1]) * model.grid.dp  # prompts read side by side
    # from the last place of the fact to the first: each prompt begins like the one before, and only what follows is computed
    cells = sorted(itertools.product(lengths, depths), key=lambda cell: -cell[0] * cell[1])
    found = {(length, depth): [] for length in lengths for depth in depths}
    bar = tqdm(total=len(found) * samples, unit="prompt", disable=None if model.grid.is_first else True)
    for start in range(0, samples, size):
        group = range(start, min(start + size, samples))
        for length, depth in cells:
            prompts = [cell_prompt(tokenizer, haystack_tokens, length, depth, sample, **options) for sample in group]
            for sample, prompt, said in zip(group, prompts, predict(reader, prompts), strict=True):
                match, given = score(tokenizer, prompt, said)
                found[length, depth].append({
                    "sample": sample, "task": prompt.task, "key": prompt.key, "expected": prompt.answer,
                    "given": given, "correct": match, "needle_start": prompt.needle_start})
            bar.update(len(group))
    bar.close()
    read, computed = reader.counts()
    return {"lengths": lengths, "depths": list(depths), **summary(found), "read": read, "computed": computed}


def summary(found: dict[tuple[int, float], list[dict]]) -> dict:
    """{"means": of every length, "cells": of every length and depth} from the prompts of each (length, depth)."""
    cells, by_length = [], {}
    for (length, depth), prompts in found.items():
        right = [prompt["correct"] for prompt in prompts]
        cells.append({"length": length, "depth": depth, "prompts": prompts, "accuracy": 100 * sum(right) / len(right)})
        by_length.setdefault(length, []).append(right)
    means = []
    for length, rows in by_length.items():
        right = np.array(rows)  # (depths, samples)
        means.append({"length": length, "prompts": right.size, "accuracy": 100 * float(right.mean()),
                      "standard_error": 100 * standard_error(right)})
    return {"means": means, "cells": cells}


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
    inside = sum(length <= results["window"] for length in results["lengths"])
    return inside if inside < len(results["lengths"]) else 0


def terminal_map(results: dict, colour: bool) -> str:
    """The heat map as text: rows are depths, columns lengths, a bar where the old window ends."""
    border, means = lengths_inside(results), results["means"]

    def line(name: str, texts: list[str], values: list[float] | None = None) -> str:
        parts = [f"{text:^7}" for text in texts]
        if values and colour:  # of the 256 colours: 208 orange for 0 %, 187 sand, 36 bluish green for 100 %
            tones = [(208, 214, 222, 187, 115, 79, 36)[round(value / 100 * 6)] for value in values]
            parts = [f"\033[30;48;5;{tone}m{part}\033[0m" for tone, part in zip(tones, parts, strict=True)]
        if border:
            parts.insert(border, " | ")
        return f"{name:>7} " + "".join(parts)

    lines = [line("depth", [short_length(length) for length in results["lengths"]])]
    for depth, row in zip(results["depths"], accuracy_grid(results), strict=True):
        lines.append(line(f"{100 * depth:.0f} %", [f"{value:.0f}" for value in row], row))
    values = [mean["accuracy"] for mean in means]
    lines.append(line("mean", [f"{value:.1f}" for value in values], values))
    lines.append(line("±", [f"{mean['standard_error']:.1f}" for mean in means]))
    return "\n".join(lines)


def print_saved(read: int, computed: int) -> None:
    """How much of the prompts went through the model, the rest being shared."""
    print_once(f"{computed:,} of the prompts' {read:,} tokens computed ({computed / read:.2f}), the others shared")


# ---------------------------------------------------------------------------------------------- command line


def read_checkpoint(options: Namespace) -> tuple[ModelConfig, data.Tokenizer]:
    """Configuration, with the scaling that was asked for, and tokenizer of a model directory: all but its weights.

    options: those of `checkpoint_parser`. Raises ValueError or OSError naming what is wrong.
    """
    config = rescale(read_config(options.model), scaling_from_options(vars(options)))
    tokenizer = data.load_tokenizer(options.model, config.vocab_size)
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    attention_kernel(options.device, dtype, config.head_dim)  # refuses what it cannot do
    return config, tokenizer


def load_model(options: Namespace, grid: Grid) -> Llama:
    """The model of `read_checkpoint`, on this grid."""
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    return Llama.from_pretrained(options.model, grid, dtype, options.device, scaling_from_options(vars(options)))


def window_to_mark(config: ModelConfig) -> int:
    """The window before extension: Llama 3.1's own scaling is part of it, the other kinds extend one."""
    own = config.max_position_embeddings
    return own if config.rope_scaling.kind == "llama3" else config.window_before() or own


def results_header(options: Namespace, config: ModelConfig) -> dict:
    """What a file of results says first: the settings, and the window to mark in a figure."""
    settings = vars(options) | {"dtype": compute_type(options.dtype, options.device)}
    return {"settings": settings, "window": options.window or window_to_mark(config)}


def note_lengths(config: ModelConfig, longest: int) -> None:
    """Say so if prompts are longer than the window."""
    if longest > config.max_position_embeddings:
        print_once(f"note: lengths above {config.max_position_embeddings} lie beyond this model's window")


def checkpoint_parser(description: str) -> Parser:
    """The options that say which model is evaluated, and how it is computed."""
    parser = Parser(description)
    parser.add_argument("model", type=existing, help="Hugging Face model directory")
    add_compute_arguments(parser)
    add_scaling_arguments(parser, "context extension without training (replaces the checkpoint's scaling)")
    return parser


def as_json(results: dict) -> bytes:
    """Results as a file; a path among the settings as its text."""
    return (json.dumps(results, indent=1, default=str) + "\n").encode()


def load_haystack(path: Path, tokenizer: Encoding, needed: int) -> np.ndarray:
    """The first `needed` tokens (int64; or all there are) of a corpus's held-out split, or of one text file.

    Raises OSError, or ValueError if that is neither or states facts of its own in our wording.
    """
    if data.is_corpus(path):
        split = data.PackedDataset(path, "valid", 1, seed=0, separator="none", tokenizer=tokenizer)
        order = split.plan(0)  # of all documents, each once
        enough = np.searchsorted(np.cumsum(split.lengths[order]), needed) + 1
        tokens = np.concatenate([split.document(index)[0] for index in order[:enough]])[:needed].astype(np.int64)
    else:
        try:
            text = path.read_bytes().decode()
        except (IsADirectoryError, UnicodeDecodeError):
            raise ValueError(f"--haystack {path}: neither a corpus nor one file of UTF-8 text; prepare a corpus from "
                             "it (python -m tools.prepare)") from None
        tokens = np.array(tokenizer.encode_ordinary(text)[:needed], dtype=np.int64)
    text = tokenizer.decode_bytes(tokens.tolist())
    for wording in WORDING.values():
        fact = re.search(wording["lead"].replace("{key}", r"\S+").encode() + rb"\d+", text)
        if fact:
            raise ValueError(f"--haystack {path}: holds {fact.group()!r}, like the facts to be hidden")
    return tokens


def parser() -> Parser:
    """The options of an evaluation with needles."""
    parser = checkpoint_parser("Needles over lengths and depths.")
    add = parser.add_argument_group("prompts").add_argument
    add("--haystack", type=existing, required=True,
        help="text that was not trained on: a corpus (its held-out split is used) or a text file")
    add("--lengths", type=positive, nargs="+", required=True, help="tokens, the answer's included")
    add("--depths", type=positive, default=10, help="how many, evenly from 0 to 1")
    add("--samples", type=positive, default=5, help="prompts a cell, shared by data-parallel replicas")
    add("--task", choices=(*WORDING, "mixed"), default="passkey")
    add("--prompt", choices=("plain", "chat"), default="plain")
    add("--system", help="a system message before each chat prompt")
    add("--digits", type=positive, default=5, help="length of the numbers")
    add("--batch-tokens", type=positive, default=16384, help="tokens a forward of a replica, or one prompt")
    add("--seed", type=nonnegative, default=1234)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=writable, help="results, JSON")
    add("--window", type=positive, help="old window to mark (if not given: the one before extension)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check everything, build the shortest prompts, load the model, evaluate, show and write."""
    with one_line_errors():
        a = parser().parse_args(argv)
        if a.system is not None and a.prompt != "chat":
            raise ValueError("--system: only a chat prompt has a system message; use --prompt chat")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        longest = max(a.lengths)
        config, tokenizer = read_checkpoint(a)
        note_lengths(config, longest)
        haystack = load_haystack(a.haystack, tokenizer, OFFSETS + longest)
        if len(haystack) < longest:
            raise ValueError(f"--haystack {a.haystack}: {len(haystack)} tokens; length {longest} needs as many")
        depths = [round(i / (a.depths - 1), 6) for i in range(a.depths)] if a.depths > 1 else [0.5]
        options = {"seed": a.seed, "task": a.task, "chat": a.prompt == "chat", "digits": a.digits, "system": a.system}
        for depth, sample in itertools.product(depths, range(a.samples)):  # a length that is too small shows here
            cell_prompt(tokenizer, haystack, min(a.lengths), depth, sample, **options)
        results = results_header(a, config)
        results |= evaluate(load_model(a, grid), tokenizer, haystack, a.lengths, depths, a.samples,
                            batch_tokens=a.batch_tokens, **options)
        if grid.is_first:
            print(terminal_map(results, sys.stdout.isatty()))
            print_saved(results["read"], results["computed"])
            if a.out:
                data.write_complete(a.out, as_json(results))
        grid.close()


if __name__ == "__main__":
    main()
