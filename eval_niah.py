"""Retrieval evaluation: hide a number in real text at every depth of every length, ask for it.

    python eval_niah.py MODEL_DIR --haystack CORPUS --lengths 128 256 512 --out results.json
    torchrun --standalone --nproc-per-node 8 eval_niah.py MODEL_DIR --tp 2 --cp 4 ...
    python -m tools.plot compare results.json --figure heat.png

The haystack is text held out from training. A prompt of length N has exactly N tokens and costs
one forward: the right answer is fed after the question (teacher forcing), and each of its tokens
must be what the model would have said. Prompts that begin alike share the keys and values of what
they share. What else measures a model stands in tools/: answer, ruler, perplexity.
"""
from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import Tokenizer
from model import KVCache, Llama, ModelConfig, read_config, rescale
from parallel import Grid, one_line_errors, print_once
from sft import encode_question, end_of_turn
from train import (
    Parser,
    add_compute_arguments,
    add_extension_arguments,
    choose_attention,
    compute_type,
    directory,
    existing,
    extension,
    nonnegative,
    positive,
    writable,
)

# A fact stands on a line of its own, its number between the two parts. The lead begins an answer.
WORDING = {
    "passkey": {
        "fact": ("\nThe pass key is ", ". Remember it.\n"),
        "question": "\nWhat is the pass key?",
        "lead": "The pass key is ",
    },
    "needle": {
        "fact": ("\nThe magic number of {key} is ", ".\n"),
        "question": "\nWhat is the magic number of {key}?",
        "lead": "The magic number of {key} is ",
    },
}
OFFSETS = 2**20  # how many start positions in the haystack a sample may draw from
KEYS = """amber anchor apple arrow badge basket beacon berry blanket bottle bridge button cabin
candle canyon carpet castle cedar cherry circle clover cobalt copper coral cotton crystal dagger
desert diamond dragon eagle ember engine falcon feather forest garden ginger glacier hammer harbor
helmet honey indigo island ivory jacket jasper jungle kettle ladder lantern lemon lotus magnet maple
marble meadow mirror needle nickel ocean olive orchid""".split()


# ------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompt:
    """Token ids, the answer's last: it begins at `answer_start`, its fact at `needle_start`."""

    tokens: list[int]
    answer_start: int
    needle_start: int
    answer: str
    task: str
    key: str | None


def build_prompt(tokenizer: Tokenizer, haystack_tokens, length: int, depth: float,
                 rng: random.Random, task: str = "passkey", chat: bool = False, digits: int = 5,
                 system: str | None = None) -> Prompt:
    """One prompt of exactly `length` tokens; a pure function of its arguments and of rng's state.
    haystack_tokens: 1-D ids, at least `length`. depth in [0, 1] is where among them the fact goes.
    With 400 tokens, a depth of 0.5 and the tests' tokenizer, to which 48213 is two tokens:

        head                    1    <|begin_of_text|>, or what opens a chat
        haystack, first part  168    164 is half of the 327 that fit; a line ends four tokens later
        fact                   34    \\nThe pass key is 48213. Remember it.\\n
        haystack, the rest    159
        tail                   36    \\nWhat is the pass key? The pass key is
        answer                  2    48213, of which the model is told nothing before it answers

    Each piece is tokenised alone and joined as ids: so lengths add up, and the number has the same
    tokens in fact and answer."""
    assert 0 <= depth <= 1, depth
    assert len(haystack_tokens) >= length
    passage = np.asarray(haystack_tokens[:length]).tolist()
    # 1. A number, and its key, that do not stand in the haystack: else it has two right places.
    text = tokenizer.decode_bytes(passage).lower()
    key, number = draw_fact(rng, text, digits, task)
    # 2. All that is no haystack.
    encode = tokenizer.encode_continued  # each follows other text
    answer = encode(number)
    fact = fact_tokens(tokenizer, task, key, number)
    if chat:
        head, turn = chat_frame(tokenizer, system)
        question, lead = asked(task, key)
        tail = encode(question) + turn + encode(lead)
    else:
        head = begin_of_text(tokenizer)
        tail = question_tokens(tokenizer, task, key)
    # 3. As much haystack as there is room for.
    others = len(head + fact + tail + answer)
    room = length - others
    if room < 1:
        raise ValueError(f"length {length} is too small: fact, question and answer take {others}")
    passage = passage[:room]
    # 4. The fact, near its depth, where it cuts no line.
    place = insertion_point(tokenizer, passage, round(depth * room))
    tokens = head + passage[:place] + fact + passage[place:] + tail + answer
    answer_start = length - len(answer)
    return Prompt(tokens, answer_start, len(head) + place, number, task, key)


def fact_tokens(tokenizer: Tokenizer, task: str, key: str | None, number: str) -> list[int]:
    """A fact as it is hidden, its number in tokens of its own."""
    encode = tokenizer.encode_continued
    opening, closing = WORDING[task]["fact"]
    return encode(opening.format(key=key)) + encode(number) + encode(closing)


def asked(task: str, key: str | None) -> tuple[str, str]:
    """How a fact is asked for, and how its answer begins."""
    wording = WORDING[task]
    return wording["question"].format(key=key), wording["lead"].format(key=key)


def question_tokens(tokenizer: Tokenizer, task: str, key: str | None) -> list[int]:
    """What stands before the answer of a plain prompt."""
    return tokenizer.encode_continued(" ".join(asked(task, key)))


def draw_fact(rng: random.Random, text: bytes, digits: int, task: str) -> tuple[str | None, str]:
    """A key (None for a pass key) and a number, neither of which stands in lower-case `text`."""
    def absent(what, draw):
        for _ in range(1000):
            candidate = draw()
            if candidate.encode() not in text:
                return candidate
        raise ValueError(f"the haystack holds nearly all {what}: longer numbers (--digits) or "
                         "another haystack are needed")
    least = 10 ** (digits - 1)
    number = absent(f"numbers of {digits} digits", lambda: str(rng.randrange(least, 10 * least)))
    if task == "passkey":
        return None, number
    free = [key for key in KEYS if key.encode() not in text]
    if free:
        return rng.choice(free), number
    # a million tokens of prose hold every common word, but not every two of them joined
    return absent("keys", lambda: "-".join(rng.sample(KEYS, 2))), number


def begin_of_text(tokenizer: Tokenizer) -> list[int]:
    """Llama 3 and Llama 2 see a token of their own before any text; most others have none."""
    for name in ("<|begin_of_text|>", "<s>"):
        if name in tokenizer.special_tokens_set:
            return [tokenizer.encode_single_token(name)]
    return []


def chat_frame(tokenizer: Tokenizer, system: str | None = None) -> tuple[list[int], list[int]]:
    """What a chat template puts before a user's message, and after it up to the answer."""
    tokens = encode_question("", tokenizer, system)  # around an empty message
    end = end_of_turn(tokenizer)
    border = len(tokens) - 1 - tokens[::-1].index(end)  # the last one: a system message has one too
    return tokens[:border], tokens[border:]


def insertion_point(tokenizer: Tokenizer, passage: list[int], target: int) -> int:
    """The place nearest to `target` where a fact damages no text: in "I sat down.\\nThe caterpillar
    slept" with the target inside "caterpillar" before "The", where a line begins. Without a border
    of lines within 2 % of the passage (8 to 256 tokens) it is between two words, and without that
    at least between two characters."""
    def spelling(i: int) -> bytes:  # of token i; what lies outside counts as a line break
        if not 0 <= i < len(passage):
            return b"\n"
        return tokenizer.decode_single_token_bytes(passage[i])
    reach = min(max(8, len(passage) // 50), 256)
    first = max(0, target - reach)
    last = min(len(passage), target + reach)
    places = sorted(range(first, last + 1), key=lambda place: abs(place - target))
    # 1. A border of lines.
    for place in places:
        if spelling(place - 1).endswith(b"\n") or spelling(place).startswith(b"\n"):
            return place
    # 2. A border of words.
    for place in places:
        if spelling(place - 1)[-1:].isspace() or spelling(place)[:1].isspace():
            return place
    # 3. A border of characters: UTF-8 continues one with bytes 80 to BF.
    for place in places:
        if not b"\x80" <= spelling(place)[:1] < b"\xc0":
            return place
    return target


# ------------------------------------------------------------------------------------------ scoring


def exact_number_match(text: str, number: str) -> bool:
    """Whether the first number in `text` is `number`, whole. A number is a run of digits, with any
    '.' or ',' that stands between digits. Against 48213:

        right    "48213."   "It is 48213, I think"
        wrong    "482135"   "048213"   "48,213"   "48213.5"   "1 48213", whose first number is 1
    """
    first = re.search(r"\d+(?:[.,]\d+)*", text)
    return first is not None and first.group() == number


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """What tokens spell."""
    said = b""
    for token in tokens:
        try:
            said += tokenizer.decode_single_token_bytes(token)
        except KeyError:  # an id that only pads the model's vocabulary
            said += "\ufffd".encode()
    return said.decode("utf-8", errors="replace")


def score(tokenizer: Tokenizer, prompt: Prompt, predictions: list[int]) -> tuple[bool, str]:
    """(exact match, what the model said), from its argmax for each answer token and the one after.

    For 48213, which Llama 3's tokenizer splits into 482|13:

        482|13|.    right
        482|13|5    wrong: each token of the answer is right, but the number does not end there
        48|213|.    wrong: 213 was said after 482, which was fed; after 48 nobody has asked

    The fact in the prompt is split as the answer is, so a model that copies gives 482|13. The score
    may be too low for a model that would give 48|213, never too high."""
    answer = prompt.tokens[prompt.answer_start:]
    given = text_of(tokenizer, predictions)
    correct = predictions[:-1] == answer and exact_number_match(given, prompt.answer)
    return correct, given


class Reader:
    """Reads rows of tokens with a model. The tokens with which they begin like the rows read last
    are still in the KV cache, and are left out:

        first row     h a y s t a c k F q      10 tokens read, 10 computed
        second row    h a y s F t a c k q      10 tokens read, 6 computed: h a y s are there

    `read` and `computed` count them. `more` tokens may be generated after a row."""

    def __init__(self, model: Llama, more: int = 0) -> None:
        self.model = model
        self.more = more
        self.rows = None  # what was read last,
        self.cache = None  # and its keys and values
        self.read = 0
        self.computed = 0

    def begin(self, rows: torch.Tensor, limit: int) -> KVCache:
        """The cache, truncated to what it shares with rows (B, S) int64: `limit` tokens at most."""
        grid = self.model.grid
        batch, length = rows.shape
        # 1. A cache that is large enough. Where what was truncated lay on other ranks of the ring,
        # a rank has more than its share of what is left: we allow 1.5 times, see step 3.
        allowed = min(length, math.ceil(1.5 * length / grid.cp))
        needed = allowed + grid.sequence_multiple + self.more
        if self.rows is None or len(self.rows) != batch or self.cache.capacity < needed:
            self.rows = rows
            self.cache = None  # given back before the next one is made
            room = needed + needed // 32  # a little over, for rows a little longer
            self.cache = self.model.new_cache(batch, room)
        # 2. Forget what follows the first column in which any row differs from the one before.
        width = min(self.rows.shape[1], limit, self.cache.length)
        differs = (self.rows[:, :width] != rows[:, :width]).any(0)  # (width,)
        columns = differs.nonzero()  # (n, 1)
        self.cache.truncate(int(columns[0]) if len(columns) else width)
        # 3. Begin anew if one rank would hold and do too much.
        new = (length - self.cache.length) / grid.cp  # tokens that each rank computes
        if self.cache.fullest() + new > allowed:
            self.cache.truncate(0)
        self.rows = rows
        self.read += batch * length
        self.computed += batch * (length - self.cache.length)
        return self.cache

    def counts(self) -> list[int]:
        """`read` and `computed` of all replicas."""
        device = self.model.head_weight.device
        counts = torch.tensor([self.read, self.computed], device=device)
        return self.model.grid.all_reduce(counts, "dp").tolist()


@torch.inference_mode()
def predict(reader: Reader, prompts: list[Prompt]) -> list[list[int]]:
    """Argmax for each answer token and the one after, of prompts of equal length. Replicas share
    the prompts; every rank returns all predictions. Position i predicts token i + 1: with an answer
    of 2 tokens in a prompt of 400, positions 397 to 399 predict tokens 398 to 400."""
    model = reader.model
    grid = model.grid
    device = model.head_weight.device
    grid.restart_timer()
    counts = [len(prompt.tokens) - prompt.answer_start + 1 for prompt in prompts]
    widest = max(counts)
    best = torch.zeros(len(prompts), widest, dtype=torch.int64, device=device)
    own = slice(grid.dp_rank, None, grid.dp)  # this replica's prompts
    rows = [prompt.tokens for prompt in prompts[own]]
    if rows:
        tokens = torch.tensor(rows, device=device)  # (B, S)
        length = tokens.shape[1]
        start = length - widest  # the position that predicts the first answer token
        cache = reader.begin(tokens, start)
        places = torch.arange(start, length, device=device) - cache.length  # in what is computed
        places = places.expand(len(rows), -1)  # (B, widest)
        hidden = model.hidden_at(tokens[:, cache.length:], places, cache)  # (B, widest, hidden)
        best[own] = model.logits(hidden).argmax(dim=-1)  # (B, widest): lm_head sees no other row
    best = grid.all_reduce(best, "dp").tolist()  # a replica has zeros in the others' rows
    return [row[-count:] for row, count in zip(best, counts, strict=True)]


def cell_prompt(tokenizer: Tokenizer, haystack_tokens, length: int, depth: float, sample: int, *,
                seed: int = 1234, task: str = "passkey", **options) -> Prompt:
    """Prompt number `sample` of one cell, see `build_prompt`; it depends on no other cell. "mixed"
    alternates tasks by sample. A sample's text begins at the same place of the haystack in all
    cells, if that has OFFSETS tokens more than the longest prompt: so its prompts begin alike."""
    if task == "mixed":
        task = ("passkey", "needle")[sample % 2]
    starts = min(OFFSETS, max(1, len(haystack_tokens) - length + 1))
    rng = random.Random(f"{seed} {sample}")  # the same in every cell
    passage = haystack_tokens[rng.randrange(starts):]
    rng = random.Random(f"{seed} {length} {depth:.6f} {sample}")  # of this prompt alone
    return build_prompt(tokenizer, passage, length, depth, rng, task, **options)


def evaluate(model: Llama, tokenizer: Tokenizer, haystack_tokens, lengths: list[int],
             depths: list[float], samples: int, *, batch_tokens: int = 16384, **options) -> dict:
    """Retrieval accuracy of every length x depth, a cell, `samples` prompts each. Cells are taken
    from the last place of a fact to the first: so each prompt begins like the one before, up to its
    own fact F, and only the rest is computed. With a letter for a token:

        length 10, depth 1      h a y s t a c k F q     all
        length 6, depth 1       h a y s F q             F q
        length 10, depth 0.5    h a y s F t a c k q     F t a c k q: each cell has its own number
        length 6, depth 0.5     h a F y s q             F y s q
        length 6, depth 0       F h a y s q             all
        length 10, depth 0      F h a y s t a c k q     all

    Samples share forwards of up to `batch_tokens` tokens a replica: no result changes, but by
    rounding. `options` are those of `cell_prompt`. For the results see `summary` and `Reader`."""
    lengths = sorted(set(lengths))
    records = {cell: [] for cell in itertools.product(lengths, depths)}
    order = sorted(records, key=math.prod, reverse=True)  # by length x depth
    reader = Reader(model)
    size = max(1, batch_tokens // lengths[-1]) * model.grid.dp  # prompts read side by side
    disable = None if model.grid.is_first else True  # None: unless this is a terminal
    bar = tqdm(total=len(records) * samples, unit="prompt", disable=disable)
    for start in range(0, samples, size):
        group = range(samples)[start:start + size]
        for length, depth in order:
            prompts = [cell_prompt(tokenizer, haystack_tokens, length, depth, sample, **options)
                       for sample in group]
            predictions = predict(reader, prompts)
            for sample, prompt, said in zip(group, prompts, predictions, strict=True):
                correct, given = score(tokenizer, prompt, said)
                records[length, depth].append({
                    "sample": sample,
                    "task": prompt.task,
                    "key": prompt.key,
                    "expected": prompt.answer,
                    "given": given,
                    "correct": correct,
                    "needle_start": prompt.needle_start,
                })
            bar.update(len(group))
    bar.close()
    read, computed = reader.counts()
    return {"lengths": lengths, "depths": list(depths), **summary(records),
            "read": read, "computed": computed}


def summary(records: dict[tuple[int, float], list[dict]]) -> dict:
    """{"means": of every length, "cells": of every length and depth}, accuracies in %. records: of
    each (length, depth) its prompts, what each "expected", what the model has "given" as its
    answer, and whether that is "correct"."""
    cells = []
    by_length = {}  # a row for each depth: which samples are right
    for (length, depth), prompts in records.items():
        right = [prompt["correct"] for prompt in prompts]
        accuracy = 100 * sum(right) / len(right)
        cells.append({"length": length, "depth": depth, "prompts": prompts, "accuracy": accuracy})
        by_length.setdefault(length, []).append(right)
    means = []
    for length, rows in by_length.items():
        right = np.array(rows)  # (depths, samples)
        means.append({
            "length": length,
            "prompts": right.size,
            "accuracy": 100 * float(right.mean()),
            "standard_error": 100 * standard_error(right),
        })
    return {"means": means, "cells": cells}


def standard_error(right: np.ndarray) -> float:
    """Standard error of the mean of `right` (depths, samples): over samples, whose prompts share
    their text and fail together. One sample has no spread: binomial, as if all were drawn alone."""
    mean = right.mean()
    samples = right.shape[1]
    if samples == 1:
        return float((mean * (1 - mean) / right.size) ** 0.5)
    spread = right.mean(0).std(ddof=1)
    return float(spread / samples**0.5)


# ------------------------------------------------------------------------------------------- output


def short_length(length: int) -> str:
    """131072 -> 128K, 1048576 -> 1M, 1000 -> 1000."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def accuracy_grid(results: dict) -> list[list[float]]:
    """Accuracy in %, one row a depth, one column a length."""
    accuracy = {}
    for cell in results["cells"]:
        accuracy[cell["length"], cell["depth"]] = cell["accuracy"]
    grid = []
    for depth in results["depths"]:
        grid.append([accuracy[length, depth] for length in results["lengths"]])
    return grid


def lengths_inside(results: dict) -> int:
    """How many columns lie within the old window: 0 if there is no border between two of them."""
    lengths = results["lengths"]
    inside = sum(length <= results["window"] for length in lengths)
    return inside if inside < len(lengths) else 0


def terminal_map(results: dict, colour: bool) -> str:
    """The heat map as text: rows are depths, columns lengths, a bar where the old window ends."""
    border = lengths_inside(results)
    tones = (208, 214, 222, 187, 115, 79, 36)  # of 256: orange for 0 %, sand, green for 100 %

    def line(name, texts, values=None):
        """A row of cells; `values` in % give them their colours."""
        parts = [f"{text:^7}" for text in texts]
        if values and colour:
            for column, value in enumerate(values):
                tone = tones[round(value / 100 * 6)]
                parts[column] = f"\033[30;48;5;{tone}m{parts[column]}\033[0m"
        if border:
            parts.insert(border, " | ")
        return f"{name:>7} " + "".join(parts)
    lines = [line("depth", [short_length(length) for length in results["lengths"]])]
    for depth, row in zip(results["depths"], accuracy_grid(results), strict=True):
        lines.append(line(f"{100 * depth:.0f} %", [f"{value:.0f}" for value in row], row))
    means = [mean["accuracy"] for mean in results["means"]]
    errors = [mean["standard_error"] for mean in results["means"]]
    lines.append(line("mean", [f"{value:.1f}" for value in means], means))
    lines.append(line("±", [f"{value:.1f}" for value in errors]))
    return "\n".join(lines)


def print_saved(read: int, computed: int) -> None:
    """How much of the prompts went through the model, the rest being shared."""
    print_once(f"{computed:,} of the prompts' {read:,} tokens computed ({computed / read:.2f}), "
               "the others shared")


# ------------------------------------------------------------------------------------- command line


def read_checkpoint(options: Namespace, grid: Grid) -> tuple[ModelConfig, Tokenizer]:
    """All of a model directory but its weights: configuration and tokenizer, checked."""
    config = rescale(read_config(options.model), **extension(options))
    tokenizer = data.load_tokenizer(options.model, config.vocab_size)
    choose_attention(options, grid, config, chunk=None)  # prompts have any length
    return config, tokenizer


def load_model(options: Namespace, grid: Grid) -> Llama:
    """The model of `read_checkpoint`, on this grid."""
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    rope = extension(options)
    return Llama.from_pretrained(options.model, grid, dtype, options.device, rope["scaling"],
                                 rope["theta"])


def results_header(options: Namespace, config: ModelConfig, grid: Grid) -> dict:
    """What a file of results says first: the settings, and the old window to mark in a figure."""
    window = config.max_position_embeddings
    if config.rope_scaling.kind != "llama3":  # Llama 3.1's own scaling is no extension
        window = config.window_before() or window
    settings = vars(options) | {
        "dtype": compute_type(options.dtype, options.device),
        "attention": grid.kernel,
    }
    return {"settings": settings, "window": options.window or window}


def note_lengths(config: ModelConfig, longest: int) -> None:
    """Say so if prompts are longer than the window."""
    window = config.max_position_embeddings
    if longest > window:
        print_once(f"note: lengths above {window} lie beyond this model's window")


def checkpoint_parser(description: str) -> Parser:
    """The options that say which model is evaluated, and how it is computed."""
    parser = Parser(description)
    parser.add_argument("model", type=directory, help="Hugging Face model directory")
    add_compute_arguments(parser)
    add_extension_arguments(parser, "context extension without training (replaces the model's own)")
    return parser


def as_json(results: dict) -> bytes:
    """Results as a file; a path among the settings as its text."""
    return f"{json.dumps(results, indent=1, default=str)}\n".encode()


def load_haystack(path: Path, tokenizer: Tokenizer, needed: int) -> np.ndarray:
    """The first `needed` tokens (int64) of a haystack; all, if it has no more. It is a corpus, of
    which the held-out split is taken, or a text file. Facts in our wording are refused."""
    if data.is_corpus(path):
        split = data.PackedDataset(path, "valid", sequence_length=1, seed=0, separator="none",
                                   tokenizer=tokenizer)
        tokens = []
        for index in split.plan(0):  # all documents, each once
            if len(tokens) < needed:
                document, _ = split.document(index)
                tokens += document.tolist()
    else:
        try:
            text = path.read_bytes().decode("utf-8-sig")  # without a byte-order mark
        except (IsADirectoryError, UnicodeDecodeError):
            text = None
        is_json = text is not None and re.match(r'\s*(\[\s*[{"]|\{\s*")', text)  # no prose
        if text is None or "\0" in text or is_json:
            raise ValueError(f"--haystack {path}: neither a corpus nor one file of UTF-8 text; "
                             "prepare a corpus from it (python -m tools.prepare)")
        tokens = tokenizer.encode_ordinary(text)
    tokens = tokens[:needed]
    content = tokenizer.decode_bytes(tokens)
    for wording in WORDING.values():
        lead = wording["lead"].replace("{key}", r"\S+").encode()
        fact = re.search(lead + rb"\d+", content)
        if fact:
            raise ValueError(f"--haystack {path}: holds {fact[0]!r}, like the facts to be hidden")
    return np.array(tokens, dtype=np.int64)


def haystack_for(path: Path, tokenizer: Tokenizer, longest: int) -> np.ndarray:
    """`load_haystack` for prompts of up to `longest` tokens. ValueError if it is shorter."""
    haystack = load_haystack(path, tokenizer, OFFSETS + longest)
    if len(haystack) < longest:
        raise ValueError(f"--haystack {path}: {len(haystack)} tokens; length {longest} needs as "
                         "many")
    return haystack


def even_depths(count: int) -> list[float]:
    """So many from 0 to 1; one alone is in the middle."""
    if count == 1:
        return [0.5]
    return [round(i / (count - 1), 6) for i in range(count)]


def parser() -> Parser:
    """The options of an evaluation with needles."""
    needles = checkpoint_parser("Needles over lengths and depths.")
    add = needles.add_argument_group("prompts").add_argument
    add("--haystack", type=existing, required=True,
        help="text that was not trained on: a corpus (its held-out split is used) or a text file")
    add("--lengths", type=positive, nargs="+", required=True, help="tokens, the answer's included")
    add("--depths", type=positive, default=10, help="how many, evenly from 0 to 1")
    add("--samples", type=positive, default=5, help="prompts a cell, shared by the replicas")
    add("--task", choices=(*WORDING, "mixed"), default="passkey")
    add("--prompt", choices=("plain", "chat"), default="plain")
    add("--system", help="a system message before each chat prompt")
    add("--digits", type=positive, default=5, help="length of the numbers")
    add("--batch-tokens", type=positive, default=16384, help="a forward of a replica (or a prompt)")
    add("--seed", type=nonnegative, default=1234)
    add = needles.add_argument_group("output").add_argument
    add("--out", type=writable, help="results, JSON")
    add("--window", type=positive, help="old window to mark (if not given: before extension)")
    return needles


def main(argv: list[str] | None = None) -> None:
    """Check everything, build the shortest prompts, load the model, evaluate, show and write."""
    with one_line_errors():
        options = parser().parse_args(argv)
        if options.system is not None and options.prompt != "chat":
            raise ValueError("--system: only a chat prompt has a system message; use --prompt chat")
        grid = Grid.create(options.tp, options.cp, options.device, options.timeout)
        config, tokenizer = read_checkpoint(options, grid)
        longest = max(options.lengths)
        note_lengths(config, longest)
        haystack = haystack_for(options.haystack, tokenizer, longest)
        depths = even_depths(options.depths)
        prompt_options = {"seed": options.seed, "task": options.task, "digits": options.digits,
                          "chat": options.prompt == "chat", "system": options.system}
        # a length that is too small shows here, before the weights are read
        for depth, sample in itertools.product(depths, range(options.samples)):
            cell_prompt(tokenizer, haystack, min(options.lengths), depth, sample, **prompt_options)
        model = load_model(options, grid)
        results = results_header(options, config, grid)
        results |= evaluate(model, tokenizer, haystack, options.lengths, depths, options.samples,
                            batch_tokens=options.batch_tokens, **prompt_options)
        if grid.is_first:
            print(terminal_map(results, sys.stdout.isatty()))
            print_saved(results["read"], results["computed"])
            if options.out:
                data.write_complete(options.out, as_json(results))
        grid.close()


if __name__ == "__main__":
    main()
