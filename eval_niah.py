"""Needle-in-a-haystack evaluation: hide a number in real text at every depth of every length, ask for it.

    python eval_niah.py MODEL_DIR --haystack CORPUS --lengths 128 256 512 --out results.json --figure heat.png
    torchrun --standalone --nproc-per-node 8 eval_niah.py MODEL_DIR --tp 2 --cp 4 ...      # the same on eight processes
    python eval_niah.py --compare before.json stage1.json stage2.json --figure compare.png

A prompt costs one forward: the right answer is fed after the question (teacher forcing), and each of its
tokens must be what the model would have said. The haystack is text held out from training. A prompt of length
N has exactly N tokens.
"""
from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable
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
                 task: str = "passkey", chat: bool = False, distractors: int = 0, digits: int = 5) -> Prompt:
    """One prompt of exactly `length` tokens, the answer's included; a pure function of its arguments.

    haystack_tokens: 1-D ids, at least `length` of them, of which a random window is used. depth in [0, 1] is
    where in the window the fact goes, moved to a line border if one is near. Task "needle" may have
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
    offset = rng.randrange(len(haystack_tokens) - length + 1)
    window = np.asarray(haystack_tokens[offset:offset + length]).tolist()
    keys, numbers = draw_facts(rng, tokenizer.decode_bytes(window).lower(), 1 + distractors, digits, task)

    wording, encode = WORDING[task], tokenizer.encode_ordinary
    opening, closing = wording["fact"]
    facts = [encode(opening.format(key=key)) + encode(number) + encode(closing)
             for key, number in zip(keys, numbers, strict=True)]
    question, lead = wording["question"].format(key=keys[0]), wording["lead"].format(key=keys[0])
    if chat:
        head, turn = chat_frame(tokenizer)
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


def chat_frame(tokenizer: Encoding) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after a user's message, up to the assistant's first token."""
    messages = ([{"role": "user", "content": letter}] for letter in "xy")
    one, other = (data.encode_chat(message, tokenizer, add_generation_prompt=True)[0] for message in messages)
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


def score(tokenizer: Encoding, prompt: Prompt, predictions: list[int]) -> tuple[bool, str]:
    """(exact match, what the model said), from its argmax for each answer token and for the one after.

    Every answer token must be predicted, and the prediction after must not make the number longer. The answer
    is split into tokens as the tokenizer does it, which is how the fact in the prompt and the training text
    spell it too (Llama 3: 482|13). A model that would say the same digits in another split (48|213) counts as
    wrong: the score may be too low for it, never too high.
    """
    said = b""
    for token in predictions:
        try:
            said += tokenizer.decode_single_token_bytes(token)
        except KeyError:  # an id that only pads the model's vocabulary
            said += "\ufffd".encode()
    given = said.decode("utf-8", errors="replace")
    right = predictions[:-1] == prompt.tokens[prompt.answer_start:]
    return right and exact_number_match(given, prompt.answer), given


@torch.inference_mode()
def predict(model: Llama, prompts: list[Prompt], device: str) -> list[list[int]]:
    """Argmax for each answer token and the one after, of prompts of equal length, in one forward a replica.

    Data-parallel replicas share the prompts; every rank returns all predictions.
    """
    grid = model.grid
    widths = [len(prompt.tokens) - prompt.answer_start + 1 for prompt in prompts]
    best = torch.zeros(len(prompts), max(widths), dtype=torch.int64, device=device)
    mine = slice(grid.dp_rank, None, grid.dp)
    if prompts[mine]:
        tokens = torch.tensor([prompt.tokens for prompt in prompts[mine]], device=device)  # (B, S)
        last = tokens.shape[1] - 1
        places = torch.arange(last + 1 - max(widths), last + 1, device=device).expand(len(tokens), -1)  # (B, answer + 1)
        best[mine] = model.logits(model.hidden_at(tokens, places)).argmax(dim=-1)  # the head never sees S rows
    best = grid.to_host(grid.all_reduce(best, "dp"))
    return [row[-width:] for row, width in zip(best, widths)]


def haystack_reach(length: int) -> int:
    """How many haystack tokens prompts of one length draw from, whatever other lengths a run has."""
    return max(2**20, 8 * length)


def cell_prompt(tokenizer: Encoding, haystack_tokens, length: int, depth: float, sample: int, *, seed: int,
                task: str, chat: bool, distractors: int, digits: int) -> Prompt:
    """Prompt number `sample` of one cell; depends on no other cell. "mixed" alternates tasks by sample."""
    task = list(WORDING)[sample % 2] if task == "mixed" else task
    rng = random.Random(f"{seed} {length} {depth:.6f} {sample}")
    return build_prompt(tokenizer, haystack_tokens[:haystack_reach(length)], length, depth, rng, task, chat,
                        distractors if task == "needle" else 0, digits)


def evaluate(model: Llama, tokenizer: Encoding, haystack_tokens, lengths: list[int], depths: list[float],
             samples: int, seed: int = 1234, *, task: str = "passkey", chat: bool = False,
             distractors: int = 0, digits: int = 5, batch_tokens: int = 16384, device: str = "cpu",
             progress: bool = False) -> dict:
    """Retrieval accuracy of every length x depth, `samples` prompts each.

    Returns {"lengths", "depths", "cells", "means"}. A cell has its length, depth, accuracy in % and every
    prompt's expected and given answer; a mean has a length's accuracy in % and binomial standard error in
    points. Prompts of one length share forwards of up to `batch_tokens` tokens a replica; that changes no result.
    """
    options = {"seed": seed, "task": task, "chat": chat, "distractors": distractors, "digits": digits}
    lengths, cells, means = sorted(set(lengths)), {}, []
    places = list(itertools.product(depths, range(samples)))
    bar = tqdm(total=len(lengths) * len(places), unit="prompt", disable=None if progress else True)
    for length in lengths:
        size, correct = max(1, batch_tokens // length) * model.grid.dp, 0
        for start in range(0, len(places), size):
            batch = places[start:start + size]
            prompts = [cell_prompt(tokenizer, haystack_tokens, length, *place, **options) for place in batch]
            predictions = predict(model, prompts, device)
            for (depth, sample), prompt, said in zip(batch, prompts, predictions, strict=True):
                match, given = score(tokenizer, prompt, said)
                cells.setdefault((length, depth), []).append({
                    "sample": sample, "task": prompt.task, "key": prompt.key, "expected": prompt.answer,
                    "given": given, "correct": match, "needle_start": prompt.needle_start})
                correct += match
            bar.update(len(batch))
        share = correct / len(places)
        means.append({"length": length, "prompts": len(places), "accuracy": 100 * share,
                      "standard_error": 100 * math.sqrt(share * (1 - share) / len(places))})
    bar.close()
    return {"lengths": lengths, "depths": list(depths), "means": means, "cells": [
        {"length": length, "depth": depth, "prompts": prompts,
         "accuracy": 100 * sum(p["correct"] for p in prompts) / samples}
        for (length, depth), prompts in cells.items()]}


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show_comparison(a: argparse.Namespace) -> None:
    """Print mean accuracy of runs x lengths, and draw their heat maps side by side."""
    runs, labels = [], a.labels or [path.stem for path in a.compare]
    if len(labels) != len(a.compare):
        raise ValueError(f"--labels has {len(labels)} names for {len(a.compare)} results")
    for path in a.compare:
        try:
            results = json.loads(path.read_text())
            runs.append(results | {"window": a.window or results["window"]})
            terminal_map(runs[-1], colour=False)  # whatever is missing shows here
        except (ValueError, LookupError, TypeError, ArithmeticError):
            raise ValueError(f"--compare {path}: not results that eval_niah.py --out has written") from None
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
    if (path / "meta.json").is_file():
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
    parser = argparse.ArgumentParser(description="Needle-in-a-haystack retrieval over lengths and depths.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="Hugging Face model directory")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--haystack", type=Path, help="text that was not trained on: a corpus directory (of "
                         "which the held-out split is used), or a directory, .txt or .jsonl of text")
    prompts.add_argument("--lengths", type=int, nargs="+", help="tokens, the answer's included")
    prompts.add_argument("--depths", type=int, default=10, help="how many, evenly from 0 to 1")
    prompts.add_argument("--samples", type=int, default=5, help="prompts a cell")
    prompts.add_argument("--task", choices=(*WORDING, "mixed"), default="passkey")
    prompts.add_argument("--prompt", choices=("plain", "chat"), default="plain")
    prompts.add_argument("--distractors", type=int, default=0, help="facts of other keys (task needle)")
    prompts.add_argument("--digits", type=int, default=5, help="length of the numbers")
    prompts.add_argument("--seed", type=int, default=1234)
    compute = parser.add_argument_group("compute")
    compute.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                         help="auto: bfloat16 on GPU, float32 on CPU")
    compute.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    compute.add_argument("--batch-tokens", type=int, default=16384, help="tokens a forward of a replica, or one prompt")
    add_grid_arguments(parser)
    add_scaling_arguments(parser, "context extension without training (replaces the checkpoint's scaling)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="results, JSON")
    output.add_argument("--figure", type=Path, help="heat map, PNG (needs matplotlib)")
    output.add_argument("--window", type=int, help="old window to mark (default: before extension)")
    output.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="only show earlier results")
    output.add_argument("--labels", nargs="+", help="names of the compared runs (default: the files')")
    return parse_once(parser, argv)


def check_arguments(a: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read. Raises ValueError or OSError naming the option."""
    if (a.model is None) == (a.compare is None):
        raise ValueError("give either a model directory to evaluate, or --compare with results to show")
    for path in a.compare or ():
        if not path.is_file():
            raise FileNotFoundError(f"--compare {path}: no such file")
    if a.model and not (a.haystack and a.lengths):
        raise ValueError("an evaluation needs --haystack and --lengths")
    smallest = {"depths": 1, "samples": 1, "distractors": 0, "digits": 1, "batch_tokens": 1, "window": 1}
    for name, least in smallest.items():
        value = getattr(a, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; the least is {least}")
    if a.distractors and a.task == "passkey":
        raise ValueError("--distractors need keys to tell facts apart: use --task needle or mixed")
    scaling_from_arguments(a)
    check_device(a.device)
    a.dtype = ("float32" if a.device == "cpu" else "bfloat16") if a.dtype == "auto" else a.dtype
    check_grid(a.tp, a.cp, launched()[1])
    for option, path in (("--out", a.out), ("--figure", a.figure)):
        if path and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise OSError(f"{option} {path}: cannot be written; give a file in a directory that exists")
    if a.figure and a.figure.suffix != ".png":
        raise ValueError(f"--figure {a.figure}: the heat map is a PNG; give a name that ends in .png")
    if a.figure and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install -r requirements-dev.txt")


def run(a: argparse.Namespace) -> None:
    """Check everything, build the shortest prompts, load the model, evaluate, show and write."""
    check_arguments(a)
    if a.compare:
        return show_comparison(a) if launched()[0] == 0 else None
    config, tokenizer = rescale(read_config(a.model), scaling_from_arguments(a)), data.load_tokenizer(a.model)
    check_grid(a.tp, a.cp, launched()[1], config.shards())
    attention_kernel(a.device, getattr(torch, a.dtype), config.head_dim)
    longest = max(a.lengths)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{a.model}: tokenizer of {tokenizer.n_vocab} tokens, model of {config.vocab_size}")
    haystack = load_haystack(a.haystack, tokenizer, haystack_reach(longest))
    if len(haystack) < longest:
        raise ValueError(f"--haystack {a.haystack}: {len(haystack)} tokens; length {longest} needs as many")
    depths = [round(i / (a.depths - 1), 6) for i in range(a.depths)] if a.depths > 1 else [0.5]
    options = {"seed": a.seed, "task": a.task, "chat": a.prompt == "chat", "distractors": a.distractors,
               "digits": a.digits}
    for depth, sample in itertools.product(depths, range(a.samples)):  # a length that is too small shows here
        cell_prompt(tokenizer, haystack, min(a.lengths), depth, sample, **options)
    if longest > config.max_position_embeddings:
        print_once(f"note: lengths above {config.max_position_embeddings} lie beyond this model's window")
    scaling = config.rope_scaling  # Llama 3.1's own is part of its window, the other kinds extend one
    extended = scaling.original_max_position if scaling.kind not in ("default", "llama3") else None
    grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
    model = Llama.from_pretrained(a.model, grid, getattr(torch, a.dtype), a.device, scaling if a.rope_kind else None)
    results = {"settings": json.loads(json.dumps(vars(a), default=str)),
               "window": a.window or extended or config.max_position_embeddings}
    results |= evaluate(model, tokenizer, haystack, a.lengths, depths, a.samples, batch_tokens=a.batch_tokens,
                        device=a.device, progress=grid.is_first, **options)
    if grid.is_first:
        print(terminal_map(results, sys.stdout.isatty()))
        if a.out:
            data.write_complete(a.out, (json.dumps(results, indent=1) + "\n").encode())
        if a.figure:
            data.write_complete(a.figure, draw_figure([results], [a.labels[0] if a.labels else a.model.name]))
    grid.close()


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main()
