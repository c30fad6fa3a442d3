"""Answers and scores prompts of a file: RULER's, LongBench-like sets, your own.

    python -m tools.answer MODEL_DIR --jsonl ruler.jsonl --out answers.jsonl
    torchrun --standalone --nproc-per-node 8 -m tools.answer MODEL_DIR --tp 2 --cp 4 --jsonl ruler.jsonl --out answers.jsonl

A line of the file is a JSON object with prompt (or context and input) and answers (or outputs, or answer). Prompts that begin
alike share the keys and values of what they share. The same command goes on after a stop.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import re
import string
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
from eval_niah import (
    Reader,
    begin_of_text,
    checkpoint_parser,
    load_model,
    note_lengths,
    print_saved,
    read_checkpoint,
    short_length,
    text_of,
)
from parallel import Grid, one_line_errors, print_once
from sft import CHAT_TOKENS, encode_question
from train import Parser, compute_type, option, positive, writable

# ----------------------------------------------------------------------------------------------------------- questions


def prompt_tokens(tokenizer: Encoding, text: str, answer_prefix: str = "", chat: bool = False,
                  system: str | None = None) -> list[int]:
    """What the model reads: plain text after begin-of-text, or a user's message in the chat template; then how the
    answer begins."""
    if chat:
        return encode_question(text, tokenizer, system) + tokenizer.encode_ordinary(answer_prefix)
    return begin_of_text(tokenizer) + tokenizer.encode_ordinary(text + answer_prefix)


def has_chat_tokens(tokenizer: Encoding) -> bool:
    """Whether the tokenizer has a chat template's special tokens."""
    return any(tokenizer.special_tokens_set.issuperset(tokens) for tokens in CHAT_TOKENS)


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


# -------------------------------------------------------------------------------------------------------------- scores


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


# ------------------------------------------------------------------------------------------------------------- answers


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
    model = reader.model
    grid, device, stops = model.grid, model.head_weight.device, tuple(data.stop_tokens(tokenizer, None))
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
            whole = model.generate(prompts, questions[indices[0]].max_new_tokens, stop_tokens=stops, cache=cache)
            new = whole[:, prompts.shape[1]:].tolist()
            said += [[index, length, len(row), *answer] for index, length, row, answer in zip(indices, lengths, rows, new)]
        grid.restart_timer(ROUND)  # another replica may be at its first batch
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
    most, widest = shapes.amax(0).tolist()
    padded = torch.full((most, widest), -1, device=device)
    for place, row in enumerate(rows):
        padded[place, :len(row)] = torch.tensor(row, device=device)
    gathered = grid.all_gather(padded, "dp").tolist()  # (dp, most, widest)
    return [row for part, count in zip(gathered, shapes[:, 0].tolist()) for row in part[:count]]


# ------------------------------------------------------------------------------------------------- the file of answers


def weights_stamp(model: Path) -> str:
    """Identifies the weights of a model directory by names, sizes and times of its files."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model.glob("*.safetensors"))
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


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
        name, before = next(iter(other.items()))
        now = settings[name]
        if isinstance(before, dict) and isinstance(now, dict):  # of a model's configuration what differs
            now = {key: value for key, value in now.items() if before.get(key) != value}
            before = {key: before.get(key) for key in now}
        raise ValueError(f"--out {path}: was made with {name} {before!r}, not {now!r}; choose another file")
    return answers


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


# -------------------------------------------------------------------------------------------------------- command line


def choose_prompt(prompt: str | None, system: str | None, questions: list[Question],
                  tokenizer: Encoding) -> tuple[str, str | None]:
    """(template, system message): where they are not given, what the prompts were made for. ValueError if they contradict."""
    made_for = {question.made_for for question in questions} - {(None, None)}
    if len(made_for) == 1 and prompt is None:
        prompt, system = next(iter(made_for))
    prompt = prompt or ("chat" if has_chat_tokens(tokenizer) else "plain")
    for template, other in made_for - {(prompt, system)}:
        raise ValueError(f"--jsonl has prompts made for --prompt {template} and --system {other!r}, not for "
                         f"{prompt} and {system!r}: their lengths would be wrong; leave both options out")
    return prompt, system


def missing_answers(questions: list[Question], answers: dict[int, dict], grid: Grid, device: str) -> list[int]:
    """Indices of the questions that have no answer yet, on every rank: the first rank's file decides."""
    missing = torch.tensor([index not in answers for index in range(len(questions))], device=device)
    return grid.broadcast(missing.long()).nonzero()[:, 0].tolist()


existing_file = option(Path, Path.is_file, "a file that exists")


def parser() -> Parser:
    parser = checkpoint_parser("Answer and score the prompts of a file.")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--jsonl", type=existing_file, required=True, help="a prompt and its answers a line")
    prompts.add_argument("--prompt", choices=("plain", "chat"), help="if not given: chat where the tokenizer has chat tokens")
    prompts.add_argument("--system", help="a system message before each chat prompt")
    prompts.add_argument("--metric", choices=METRICS, help="if not given: the record's, else all")
    prompts.add_argument("--max-new-tokens", type=positive, help="if not given: the record's, else 128")
    prompts.add_argument("--max-length", type=positive,
                         help="longer prompts lose their middle; if not given: the model's window")
    prompts.add_argument("--batch-tokens", type=positive, default=16384, help="tokens a forward of a replica, or one prompt")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=writable, help="JSON lines, one an answer; a stopped run goes on")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Answer what `--out` does not hold yet, write a line an answer, and print mean scores."""
    with one_line_errors():
        a = parser().parse_args(argv)
        if a.system is not None and a.prompt == "plain":
            raise ValueError("--system: only a chat prompt has a system message; use --prompt chat")
        config, tokenizer = read_checkpoint(a)
        note_lengths(config, a.max_length or 0)
        questions = read_questions(a.jsonl, a.metric, a.max_new_tokens)
        limit = a.max_length or config.max_position_embeddings
        prompt, system = choose_prompt(a.prompt, a.system, questions, tokenizer)
        least = max(question.max_new_tokens for question in questions) + 2
        if limit < least:
            raise ValueError(f"--max-length {limit} is too small: the answers alone take {least - 2}")
        # what decides the answers, as the first line of their file states it: results of other settings never mix
        settings = {"prompt": prompt, "system": system, "metric": a.metric, "max_new_tokens": a.max_new_tokens,
                    "max_length": a.max_length, "dtype": compute_type(a.dtype, a.device),
                    "jsonl": data.digest(a.jsonl), "model": config.to_hf(), "weights": weights_stamp(a.model)}
        answers = read_answers(a.out, settings) if a.out else {}
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        pending = missing_answers(questions, answers, grid, a.device)
        if answers and pending:
            print_once(f"{a.out} has {len(answers)} of {len(questions)} answers: the others follow")
        if pending:
            reader = Reader(load_model(a, grid), least)
            found = answer_questions(reader, tokenizer, questions, pending, limit, prompt == "chat", system, a.batch_tokens)
            found = tqdm(found, total=len(pending), unit="prompt", disable=None if grid.is_first else True)
            write_answers(a.out if grid.is_first else None, settings, answers, questions, found)
        print_once(score_table(answers))
        if cut := sum(answer["read"] < answer["prompt_tokens"] for answer in answers.values()):
            print_once(f"note: {cut} of {len(answers)} prompts do not fit into {limit} tokens with their answer: middle cut")
        if pending:
            print_saved(*reader.counts())
        grid.close()


if __name__ == "__main__":
    main()
