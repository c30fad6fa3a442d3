"""Answers and scores prompts of files: RULER's, LongBench-like sets, your own.

    python -m tools.answer MODEL_DIR --jsonl ruler.jsonl --out answers.jsonl
    torchrun --standalone --nproc-per-node 8 -m tools.answer MODEL_DIR --tp 2 --cp 4 \\
        --jsonl ruler.jsonl --out answers.jsonl

A line of a file is a JSON object with prompt (or context and input) and answers (or outputs, or
answer), or one that tools/questions.py knows. A directory, as RULER's DATA/TASK/validation.jsonl,
stands for the files in it. Prompts that begin alike share the keys and values of what they share.
The same command goes on after a stop.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
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
from sft import chat_template, encode_question
from tools.questions import METRICS, RULER_TASK, Question, printable, read_questions
from tools.records import PassedOver, list_files
from train import Parser, compute_type, option, positive, writable

# ---------------------------------------------------------------------------------------- answers


def prompt_tokens(tokenizer: data.Tokenizer, text: str, answer_prefix: str = "", chat: bool = False,
                  system: str | None = None) -> list[int]:
    """What the model reads: plain text after begin-of-text, or a user's message in the chat
    template; then how the answer begins."""
    if chat:
        return encode_question(text, tokenizer, system) + tokenizer.encode_continued(answer_prefix)
    return begin_of_text(tokenizer) + tokenizer.encode_ordinary(text + answer_prefix)


# batches between two meetings of replicas: meeting seldom, they wait less for the longest prompts
ROUND = 8


@torch.inference_mode()
def answer_questions(reader: Reader, tokenizer: data.Tokenizer, questions: list[Question],
                     pending: list[int], limit: int, chat: bool = False, system: str | None = None,
                     batch_tokens: int = 16384) -> Iterator[tuple[int, int, int, str]]:
    """(index, tokens of the prompt, how many of them are read, what the model says, greedily) for
    each `pending` index into questions.

    Replicas take stretches of the questions in alphabetical order, so that a prompt begins as much
    as possible like the one before; equal lengths share a batch of up to `batch_tokens` tokens.
    Prompts longer than `limit` with their answer lose their middle. Every rank yields all answers,
    those of a few batches at a time.
    """
    grid = reader.model.grid
    device = reader.model.head_weight.device
    stops = tuple(data.stop_tokens(tokenizer, reader.model.config.hf.get("eos_token_id")))

    def encode(index: int) -> tuple[list[int], int]:
        """Tokens to read, and how many the whole prompt has."""
        question = questions[index]
        tokens = prompt_tokens(tokenizer, question.text, question.answer_prefix, chat, system)
        room = limit - question.max_new_tokens
        if len(tokens) <= room:
            return tokens, len(tokens)
        end = room // 2
        return tokens[:room - end] + tokens[len(tokens) - end:], len(tokens)

    def goes_on(token: int) -> bool:  # negative: gather_rows fills up with it
        return token not in stops and token >= 0

    # 1. This replica's stretch of the questions, in batches.
    order = sorted(pending, key=lambda index: (questions[index].text, index))
    share = math.ceil(len(order) / grid.dp)
    own = order[grid.dp_rank * share:(grid.dp_rank + 1) * share]
    own_batches = batches(own, questions, encode, batch_tokens)
    while True:
        # 2. A few of them are answered.
        rows = []  # index, length of the prompt, how much of it is read, answer
        for batch in itertools.islice(own_batches, 1 if grid.dp == 1 else ROUND):
            indices, inputs, lengths = batch
            prompts = torch.tensor(inputs, device=device)  # (B, S)
            most = questions[indices[0]].max_new_tokens
            answers = generate(reader, prompts, most, stops)
            for index, length, answer in zip(indices, lengths, answers, strict=True):
                rows.append([index, length, prompts.shape[1], *answer])
        # 3. Replicas meet, until none has said anything.
        grid.restart_timer(ROUND)  # another replica may be at its first batch
        everything = gather_rows(rows, grid, device)
        if not everything:
            return
        for index, length, read, *answer in everything:
            tokens = list(itertools.takewhile(goes_on, answer))
            yield index, length, read, printable(text_of(tokenizer, tokens))


def generate(reader: Reader, prompts: torch.Tensor, most: int,
             stops: tuple[int, ...]) -> list[list[int]]:
    """What the model says to prompts (B, S), greedily: up to `most` tokens each."""
    length = prompts.shape[1]
    cache = reader.begin(prompts, length - 1)
    whole = reader.model.generate(prompts, most, stop_tokens=stops, cache=cache)
    return whole[:, length:].tolist()


def batches(order: list[int], questions: list[Question], encode: Callable,
            batch_tokens: int) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """(indices, rows of tokens, whole lengths) of neighbours in `order` with equal lengths and
    equal room for an answer, up to `batch_tokens` tokens together; `encode` gives a row and its
    whole length."""
    indices, rows, lengths = [], [], []
    for index in order:
        row, length = encode(index)
        if rows:
            room = questions[index].max_new_tokens
            alike = len(row) == len(rows[0]) and room == questions[indices[0]].max_new_tokens
            if not alike or (len(rows) + 1) * len(row) > batch_tokens:
                yield indices, rows, lengths
                indices, rows, lengths = [], [], []
        indices.append(index)
        rows.append(row)
        lengths.append(length)
    if rows:
        yield indices, rows, lengths


def gather_rows(rows: list[list[int]], grid: Grid, device: str) -> list[list[int]]:
    """Rows of numbers, not negative, of every replica, on every rank; short ones end in -1."""
    shape = [len(rows), max(map(len, rows), default=0)]
    shapes = grid.all_gather(torch.tensor(shape, device=device), "dp")  # (dp, 2)
    most, widest = shapes.amax(0).tolist()
    padded = torch.full((most, widest), -1, device=device)
    for place, row in enumerate(rows):
        padded[place, :len(row)] = torch.tensor(row, device=device)
    replicas = grid.all_gather(padded, "dp").tolist()  # (dp, most, widest)
    everything = []
    for replica, count in zip(replicas, shapes[:, 0].tolist(), strict=True):
        everything += replica[:count]
    return everything


# ---------------------------------------------------------------------------- the file of answers


def weights_stamp(model: Path) -> str:
    """Identifies the weights of a model directory by names, sizes and times of its files."""
    files = []
    for file in model.glob("*.safetensors"):
        status = file.stat()
        files.append((file.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:16]


def files_stamp(files: list[Path]) -> str:
    """Identifies what files hold, in their order."""
    digests = list(map(data.digest, files))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def questions_stamp(questions: list[Question]) -> str:
    """Identifies what is asked and how it is scored: another version may read a file otherwise."""
    content = hashlib.sha256()
    for question in questions:
        rules = (question.answer_prefix, question.answers, question.metric, question.max_new_tokens)
        content.update(json.dumps([question.text, *rules]).encode())
    return content.hexdigest()[:16]


# keys of an answer, a line of the file
NUMBERS = ("index", "prompt_tokens", "read", "score")
OTHERS = ("task", "length", "prediction", "answers", "metric")


def is_answer(line: object, count: int) -> bool:
    """Whether a line is an answer to one of `count` questions."""
    if not isinstance(line, dict) or not line.keys() >= {*NUMBERS, *OTHERS}:
        return False
    if not all(type(line[key]) in (int, float) for key in NUMBERS):
        return False
    return type(line["index"]) is int and 0 <= line["index"] < count


def read_answers(path: Path, settings: dict, questions: list[Question]) -> dict[int, dict]:
    """Answers that an earlier run wrote, by index; a line that a killed run left half-written is
    left out.

    Raises ValueError if they were made with other settings, or the file is none of ours.
    """
    if not path.exists():
        return {}
    holds_none = f"--out {path}: exists and holds no answers of --jsonl; choose another file"
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        first, *lines = map(json.loads, whole.splitlines() or [b"{}"])
        earlier = {name: first["settings"].get(name) for name in settings}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(holds_none) from None
    for name, now in settings.items():
        before = earlier[name]
        if before == now:
            continue
        if name == "questions":
            raise ValueError(f"--out {path}: has answers to prompts or by rules that are not "
                             "those of now, as of an earlier version; choose another file")
        if isinstance(before, dict) and isinstance(now, dict):  # a model's: only what differs
            now = {key: value for key, value in now.items() if before.get(key) != value}
            before = {key: before.get(key) for key in now}
        raise ValueError(f"--out {path}: was made with {name} {before!r}, not {now!r}; choose "
                         "another file")
    answers = {}
    for line in lines:
        if not is_answer(line, len(questions)):
            raise ValueError(holds_none)
        # its row and column are those of now: a file may have another name
        question = questions[line["index"]]
        answers[line["index"]] = line | {"task": question.task, "length": question.length}
    return answers


def write_answers(out: Path | None, settings: dict, answers: dict[int, dict],
                  questions: list[Question], texts: Iterable[tuple[int, int, int, str]]) -> None:
    """Add what answer_questions yields to `answers`, scored, and each at once to the file `out`."""
    with ExitStack() as files:
        if out:
            files.enter_context(data.locked(out.with_name(out.name + ".lock")))
            lines = [json.dumps({"settings": settings}), *map(json.dumps, answers.values())]
            data.write_complete(out, "".join(line + "\n" for line in lines).encode())
            file = files.enter_context(open(out, "a"))
        for index, length, read, text in texts:
            question = questions[index]
            answers[index] = {
                "index": index,
                "task": question.task,
                "length": question.length,
                "prompt_tokens": length,
                "read": read,
                "prediction": text,
                "answers": question.answers,
                "metric": question.metric,
                "score": METRICS[question.metric](text, question.answers),
            }
            if out:  # at once: a run may be stopped
                file.write(json.dumps(answers[index]) + "\n")
                file.flush()


WORDS = ("short", "medium", "long")  # LongBench v2's lengths
THRESHOLD = 85.6  # %: Llama-2-7B at 4K, by which RULER calls a length effective (arXiv 2404.06654)


def place_of(length: str) -> tuple:
    """Sorts lengths: numbers ("4096" before "16384"), then LongBench v2's, then other words."""
    if length.isdecimal():
        return 0, int(length), length
    return 1, WORDS.index(length) if length in WORDS else len(WORDS), length


def effective_length(means: dict[str, float]) -> str:
    """The longest length whose mean, as that of all shorter ones, is above RULER's threshold."""
    effective = "none"
    for length, mean in means.items():
        if mean <= THRESHOLD:
            break
        effective = short_length(int(length))
    return effective


def score_table(answers: dict[int, dict]) -> str:
    """Mean score in % of each task and length, the number of prompts, the mean of tasks, and for
    RULER's tasks the effective length."""
    scores = {}  # task -> length -> scores
    for _, answer in sorted(answers.items()):
        row = scores.setdefault(answer["task"], {})
        row.setdefault(answer["length"], []).append(100 * answer["score"])
    lengths = {answer["length"] for answer in answers.values()}
    lengths = sorted(lengths, key=place_of)

    width = max(4, *map(len, scores))
    title = f"{'task':<{width}}"
    for length in lengths:
        title += f"{short_length(int(length)) if length.isdecimal() else length:>8}"
    lines = [f"{title}{'prompts':>9}"]
    rows = {}
    for task, row in scores.items():
        rows[task] = {length: np.mean(column) for length, column in row.items()}
    # a mean of fewer tasks than the others are of would say something else
    means = {}
    for length in lengths:
        column = [row[length] for row in rows.values() if length in row]
        if len(column) == len(rows):
            means[length] = np.mean(column)
    if len(scores) > 1:
        rows["mean"] = means
    for name, row in rows.items():
        cells = [f"{row[length]:8.1f}" if length in row else f"{'-':>8}" for length in lengths]
        count = sum(map(len, scores[name].values())) if name in scores else len(answers)
        lines.append(f"{name:<{width}}{''.join(cells)}{count:>9}")
    if all(map(RULER_TASK.fullmatch, scores)) and all(map(str.isdecimal, lengths)):
        lines.append(f"effective length, by {len(scores)} of RULER's 13 tasks and its threshold of "
                     f"{THRESHOLD}: {effective_length(means)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- command line


# how a prompt begins that is in a chat template already, as RULER's --model_template_type makes it
IN_TEMPLATE = re.compile(r"(?:<s>|<\|begin_of_text\|>|\s)*"
                         r"(<\|start_header_id\|>|<\|im_start\|>|\[INST\])")


def choose_prompt(prompt: str | None, system: str | None, questions: list[Question],
                  tokenizer: data.Tokenizer) -> tuple[str, str | None]:
    """(template, system message): where they are not given, what the prompts were made for.
    ValueError if they contradict, or if a template would go around another."""
    made_for = {question.made_for for question in questions} - {(None, None)}
    if len(made_for) == 1 and prompt is None and system is None:
        [(prompt, system)] = made_for
    if not prompt:
        prompt = "chat" if chat_template(tokenizer) else "plain"
    if system is not None and prompt == "plain":
        raise ValueError("--system: only a chat prompt has a system message; use --prompt chat "
                         "(with a tokenizer that has chat tokens)")
    for template, other in made_for - {(prompt, system)}:
        raise ValueError(f"--jsonl has prompts made for --prompt {template} and --system "
                         f"{other!r}, not for {prompt} and {system!r}: their lengths would be "
                         "wrong; leave both options out")
    begins = filter(None, (IN_TEMPLATE.match(question.text) for question in questions))
    first = next(begins, None)
    if first and prompt == "chat":
        raise ValueError(f"--jsonl has prompts in a chat template already ({first[1]}): make them "
                         "without (RULER: --model_template_type base), or read them as they are: "
                         "--prompt plain")
    if first:
        print_once(f"note: prompts are in a chat template ({first[1]}), which is read as plain "
                   "text")
    return prompt, system


def missing_answers(questions: list[Question], answers: dict[int, dict], grid: Grid,
                    device: str) -> list[int]:
    """Indices of the questions that have no answer yet, on every rank: the first rank's file
    decides."""
    missing = [index not in answers for index in range(len(questions))]
    missing = grid.broadcast(torch.tensor(missing, device=device).long())
    return missing.nonzero()[:, 0].tolist()


existing_path = option(Path, Path.exists, "a file or directory that exists")


def prompt_files(paths: list[Path], out: Path | None) -> list[Path]:
    """The files at some paths: of a directory all that may hold prompts, so not `out`, in order."""
    files = []
    passed_over = PassedOver()
    for path in paths:
        # .json in a folder may be anything, so such a file is to be named itself
        inside = list_files(path, (".jsonl", ".ndjson", ".parquet"), passed_over)
        if path.is_dir() and out:
            inside = [file for file in inside if file.resolve() != out.resolve()]
        if not inside:
            raise ValueError(f"--jsonl {path}: has no .jsonl or .parquet file")
        files += inside
    for line in passed_over.lines():
        print_once(f"passed over, {line}")
    # one that is named twice, in whatever spelling, is read once, as it is named first
    first = {}
    for file in files:
        first.setdefault(file.resolve(), file)
    return list(first.values())


def parser() -> Parser:
    parser = checkpoint_parser("Answer and score the prompts of a file.")
    add = parser.add_argument_group("prompts").add_argument
    add("--jsonl", type=existing_path, nargs="+", required=True,
        help="records with a prompt and its answers: JSON lines, a JSON list, Parquet, packed or "
        "not; of a directory all .jsonl and .parquet files inside")
    add("--ignore", nargs="+", default=[], metavar="KEY",
        help="keys of records that are no part of what is asked; unknown ones are refused")
    add("--question", help="for records that have a context and ask nothing about it")
    add("--prompt", choices=("plain", "chat"),
        help="if not given: chat where the tokenizer has chat tokens")
    add("--system", help="a system message before each chat prompt")
    add("--metric", choices=METRICS,
        help="if not given: the record's, else its choices' or RULER's for its task, else all of "
        "outputs or any of answers")
    add("--max-new-tokens", type=positive,
        help="if not given: the record's, else RULER's for its task, else 128")
    add("--max-length", type=positive,
        help="longer prompts lose their middle; if not given: the model's window")
    add("--batch-tokens", type=positive, default=16384,
        help="tokens a forward of a replica, or one prompt")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=writable, help="JSON lines, one an answer; a stopped run goes on")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Answer what `--out` does not hold yet, write a line an answer, and print mean scores."""
    with one_line_errors():
        a = parser().parse_args(argv)
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = read_checkpoint(a, grid)
        note_lengths(config, a.max_length or 0)
        files = prompt_files(a.jsonl, a.out)
        questions = read_questions(files, a.metric, a.max_new_tokens, a.ignore, a.question)
        limit = a.max_length or config.max_position_embeddings
        prompt, system = choose_prompt(a.prompt, a.system, questions, tokenizer)
        least = max(question.max_new_tokens for question in questions) + 2
        if limit < least:
            raise ValueError(f"--max-length {limit} is too small: the answers alone take "
                             f"{least - 2}")

        # what decides the answers: the first line of their file, so results of other settings
        # never mix
        settings = {
            "prompt": prompt,
            "system": system,
            "metric": a.metric,
            "max_new_tokens": a.max_new_tokens,
            "max_length": a.max_length,
            "dtype": compute_type(a.dtype, a.device),
            "jsonl": files_stamp(files),
            "ignore": sorted(a.ignore) or None,
            "question": a.question,
            "questions": questions_stamp(questions),
            "model": config.to_hf(),
            "weights": weights_stamp(a.model),
        }
        answers = read_answers(a.out, settings, questions) if a.out else {}
        pending = missing_answers(questions, answers, grid, a.device)
        if answers and pending:
            print_once(f"{a.out} has {len(answers)} of {len(questions)} answers: the others follow")
        if pending:
            reader = Reader(load_model(a, grid), least)
            texts = answer_questions(reader, tokenizer, questions, pending, limit,
                                     prompt == "chat", system, a.batch_tokens)
            hidden = None if grid.is_first else True  # None: where there is no terminal
            texts = tqdm(texts, total=len(pending), unit="prompt", disable=hidden)
            write_answers(a.out if grid.is_first else None, settings, answers, questions, texts)

        print_once(score_table(answers))
        cut = sum(answer["read"] < answer["prompt_tokens"] for answer in answers.values())
        if cut:
            print_once(f"note: {cut} of {len(answers)} prompts do not fit into {limit} tokens with "
                       "their answer: middle cut")
        if pending:
            print_saved(*reader.counts())
        grid.close()


if __name__ == "__main__":
    main()
