"""Stage 1: continued pretraining at the target length, and the one training loop both stages share.

    python train.py --config config.json --tokenizer DIR --data CORPUS --sequence-length 128 --steps 500 --out out/base
    python train.py --model out/base/final --rope-kind yarn --rope-factor 16 --data CORPUS --sequence-length 2048 \
                    --steps 300 --learning-rate 3e-5 --out out/stage1
    torchrun --standalone --nproc-per-node 8 train.py --tp 2 --cp 4 ...      # the same on eight processes

A run directory holds `metrics.jsonl`, the newest `checkpoint-STEP` directories (model, optimizer, data position: each
is complete or absent) and, at the end, `final`, a Hugging Face model directory. `--resume` continues from the newest
checkpoint to the last bit, and starts where there is none: with torchrun --max-restarts a failed job goes on by itself.
SIGTERM or Ctrl-C writes a checkpoint and stops (under torchrun, if step and checkpoint fit into its --shutdown-timeout,
30 s by default). `python -m tools.plan H100-80` and the same options say what a run takes.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from model import RECOMPUTE, Llama, ModelConfig, read_config, rescale
from parallel import Grid, ShardedAdamW, attention_kernel, launched, one_line_errors, print_once, whole_shape
from rope_yarn import RopeScaling, add_scaling_arguments, scaling_from_options

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")
FREE_TO_CHANGE = ("out", "resume", "device", "checkpoint_every", "keep_checkpoints", "validate_every", "validation_sequences",
                  "validation_data", "micro_batch_size", "recompute", "offload", "offload_optimizer", "tile", "tp", "cp",
                  "timeout", "config")  # at a resume; the checkpoint has the model
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}  # dense bfloat16 FLOP/s
CHECKPOINT_FORMAT = 2


# --------------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and whose usage errors `one_line_errors` tells like any other mistake."""

    def __init__(self, description: str, **more) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more)

    def print_help(self, file=None) -> None:
        if launched()[0] == 0:
            super().print_help(file)

    def error(self, message: str) -> None:
        if message.startswith("argument "):  # "argument --steps: 0 must ..." -> "--steps 0 must ..."
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise ValueError(message)


def option(kind: Callable, fits: Callable, right: str) -> Callable[[str], object]:
    """A type for argparse: an option's text as a `kind` that `fits`; else the error says what would be `right`."""
    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {right}")  # argparse puts the option's name before it
        return value

    return check


positive = option(int, lambda n: n >= 1, "a whole number, 1 or more")
nonnegative = option(int, lambda n: n >= 0, "a whole number, 0 or more")
nonnegative_number = option(float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
fraction = option(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
seconds = option(float, lambda x: 0 < x < 1e7, "a number of seconds above 0")
existing = option(Path, Path.exists, "a file or directory that exists")


def can_be_written(path: Path) -> bool:
    """Whether a file can be made there."""
    return path.parent.is_dir() and not path.is_dir() and os.access(path.parent, os.W_OK)


def is_here(device: str) -> bool:
    """Whether this machine has the device; of several processes each takes a GPU of its own, so none names one."""
    if device == "cpu":
        return True
    if not torch.cuda.is_available():
        return False
    return device == "cuda" or device.startswith("cuda:") and launched()[1] == 1


writable = option(Path, can_be_written, "a file in a directory that exists and can be written")
device_here = option(str, is_here, "cpu, or cuda where there is a GPU (of several processes each takes its own)")
below_one = option(float, lambda beta: 0 <= beta < 1, "a number from 0 to below 1")
positive_weight = option(float, lambda weight: 0 < weight < math.inf, "a weight above 0")
directory = option(Path, lambda path: not path.is_file(), "a directory, not a file")


def add_compute_arguments(parser: argparse.ArgumentParser, device: Callable = device_here) -> None:
    """How a model is computed: type, device (of option type `device`) and grid; what is left of the processes is data
    parallel."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    group = parser.add_argument_group("compute; parallel under torchrun --standalone --nproc-per-node N (data: N / tp / cp)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="if not given: bfloat16 on a GPU, float32 on a CPU")
    group.add_argument("--device", type=device, default=here, help="cpu or cuda")
    group.add_argument("--tp", type=positive, default=1, help="tensor parallel: ranks that share every matrix")
    group.add_argument("--cp", type=positive, default=1, help="context parallel: ranks that share every sequence")
    group.add_argument("--timeout", type=seconds, default=600.0, help="seconds for a micro-batch, a validation "
                       "sequence, a prompt or a file: a rank that takes longer prints where it stands and ends the job")


def compute_type(dtype: str | None, device: str) -> str:
    """The --dtype that was asked for, else bfloat16 on a GPU and float32 on a CPU: few of those have bfloat16 units."""
    return dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def argument_parser(description: str, planned: bool = False) -> Parser:
    """The options both stages have; a stage adds its data group. For a run that is only planned, what it would read and
    where it would run need not be there, and --steps, --data and --out need not be given."""
    parser, required, readable = Parser(description), not planned, Path if planned else existing
    group = parser.add_argument_group("model")
    start = group.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", type=existing, help="start from this Hugging Face model directory")
    start.add_argument("--config", type=existing, help="start from random weights of this config.json")
    add = group.add_argument
    add("--tokenizer", type=readable, help="tokenizer directory or file (if not given: the model's own)")

    add = parser.add_argument_group("memory").add_argument
    add("--recompute", choices=RECOMPUTE, default="none",
        help="what backward computes again: nothing, all but attention, blocks")
    add("--offload", action="store_true", help="keep what recomputed blocks keep in host memory")
    add("--offload-optimizer", action="store_true", help="keep master weights and moments in host memory")
    add("--tile", type=positive, help="positions that go through a block or the loss at a time (if not given: as fit)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive, required=required, help="optimizer steps in all")
    add("--batch-size", type=positive, default=1, help="sequences a step, over all processes")
    add("--micro-batch-size", type=positive, help="sequences a forward of a replica (if not given: its share of the batch)")
    add("--learning-rate", type=nonnegative_number, default=3e-5, help="the peak")
    add("--warmup-steps", type=nonnegative, default=10, help="linear warm-up")
    add("--final-learning-rate", type=fraction, default=0.1, help="end of the cosine, as a share of the peak")
    add("--weight-decay", type=nonnegative_number, default=0.1, help="of matrices; vectors do not decay")
    add("--betas", type=below_one, nargs=2, default=(0.9, 0.95), help="of AdamW")
    add("--clip", type=nonnegative_number, default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--seed", type=nonnegative, default=0, help="weights (with --config) and data order")

    add_compute_arguments(parser, str if planned else device_here)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=directory, required=required, help="run directory")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint, if there is one")
    add("--checkpoint-every", type=nonnegative, default=0, help="steps; 0: at the end, and when a signal stops the run")
    add("--keep-checkpoints", type=positive, default=2, help="how many of the newest to keep")
    add("--validate-every", type=nonnegative, default=0, help="steps between validations; 0: only at the end")
    add("--validation-sequences", type=nonnegative, default=8, help="held-out sequences a validation; 0: none")
    return parser


def stage1_parser(planned: bool = False) -> Parser:
    """Stage 1's options: packed documents, length up-sampling, rope scaling."""
    parser = argument_parser("Continued pretraining on packed documents (stage 1), or pretraining from scratch.", planned)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", action="extend", type=str if planned else weighted_path, required=not planned,
        metavar="DIR[=WEIGHT]", help="corpora written by `python -m tools.prepare`; each sequence comes from one, by weight")
    add("--sequence-length", type=positive, required=True, help="tokens")
    add("--separator", choices=("<s>", "none", "bos_eos"), default="<s>", help="between documents")
    add("--short-length", type=nonnegative, default=4096, help="documents below are short")
    add("--long-length", type=nonnegative, default=8192, help="documents above are long")
    add("--short-weight", type=nonnegative_number, default=1.0, help="how often short documents are used")
    add("--long-weight", type=nonnegative_number, default=1.0, help="how often long documents are used")
    add("--cross-document-mask", dest="document_mask", action="store_true", help="ablation: documents do not see each other")
    add_scaling_arguments(parser, "context extension (replaces the checkpoint's own scaling)")
    return parser


def weighted_path(text: str) -> tuple[Path, float]:
    """An option's PATH or PATH=WEIGHT -> (path, weight), 1.0 without one."""
    path, _, weight = text.rpartition("=")
    if not path or "/" in weight:  # this '=' belongs to the path
        path, weight = text, "1"
    return existing(path), positive_weight(weight)


def check_run(options: Namespace, grid: Grid, config: ModelConfig) -> None:
    """Raise ValueError for options that cannot be trained on this grid, naming one and what would be right."""
    config.check_tp(grid.tp)
    length, multiple = options.sequence_length, grid.sequence_multiple
    if length % multiple:
        near = length // multiple * multiple or multiple
        raise ValueError(f"--sequence-length {length} is not a multiple of {multiple} (2 x cp x tp); {near} is")
    if options.document_mask and grid.cp > 1:
        raise ValueError("--cross-document-mask (and sft.py --pack) works on whole sequences: use --cp 1 (and --tp)")
    if options.batch_size % grid.dp:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of the {grid.dp} data-parallel replicas")
    share = options.batch_size // grid.dp
    if share % (options.micro_batch_size or share):
        raise ValueError(f"--micro-batch-size {options.micro_batch_size} does not divide a replica's share of --batch-size, "
                         f"{share}")
    if options.offload and options.recompute == "none":
        raise ValueError("--offload moves what recomputed blocks keep: add --recompute block or --recompute mlp")


def stage1_datasets(sources: list[tuple[Path, float]], validation_sequences: int, seed: int, short_weight: float,
                    long_weight: float, **options):
    """(training, validation) datasets of packed documents, see PackedDataset, whose `options` these are.

    Training blends the (corpus, weight) sources; validation is the first one's held-out split, its documents as they come,
    or None without `validation_sequences`. Raises ValueError.
    """
    parts = [data.PackedDataset(path, "train", seed=seed, short_weight=short_weight, long_weight=long_weight, **options)
             for path, _ in sources]
    training = data.Blend(parts, [weight for _, weight in sources], seed)
    if not validation_sequences:
        return training, None
    corpus, needed = sources[0][0], validation_sequences * training.sequence_length + 1
    validation = data.PackedDataset(corpus, "valid", seed=seed, **options)
    if validation.lengths.sum() < needed:  # a document seen twice in one sequence would be copied
        raise ValueError(f"--validation-sequences {validation_sequences} need {needed} tokens, but {corpus} holds out "
                         f"{validation.lengths.sum()}; ask for fewer, or prepare it with a larger --holdout")
    return training, validation


# ----------------------------------------------------------------------------------------------- model and schedule


def extension(config: ModelConfig, length: int) -> str:
    """The options that extend a model's window to `length`, for people."""
    known, scaling = config.window_before(), config.rope_scaling
    original = known or round(config.max_position_embeddings / scaling.factor)
    options = f"train.py --rope-kind yarn --rope-factor {math.ceil(length / original)}"
    if scaling.kind == "default":
        return options
    which = "which" if known else "if that was its window before; it"
    return f"{options} --original-length {original}, {which} replaces the model's own {scaling.kind} rule"


def load_start(options: Namespace, grid: Grid, scaling: RopeScaling | None) -> tuple[ModelConfig, data.Tokenizer]:
    """Configuration, with the rope scaling that was asked for, and tokenizer to start from, checked against each other and
    the options. Raises ValueError, OSError."""
    own = read_config(options.model or options.config)
    config = rescale(own, scaling)
    length, window = options.sequence_length, config.max_position_embeddings
    if length > window:
        raise ValueError(f"--sequence-length {length} is beyond the model's window of {window}; extend it "
                         f"({extension(own, length)}) or shorten the sequences")
    check_run(options, grid, config)
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    attention_kernel(options.device, dtype, config.head_dim)  # refuses what it cannot do
    if not (options.tokenizer or options.model):
        raise ValueError("--tokenizer is needed with --config: the one that the corpus was prepared with")
    tokenizer = data.load_tokenizer(options.tokenizer or options.model, config.vocab_size)
    stops = data.stop_tokens(tokenizer, config.hf.get("eos_token_id"))  # where servers should stop
    return replace(config, hf=config.hf | {"eos_token_id": stops}), tokenizer


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """Linear warm-up to the peak, then a cosine to `final_share` of it; `step` counts from 1 to `steps`."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def forward_flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """FLOPs of one sequence's forward pass, of matrix products and of causal attention; backward takes twice as many.

    Causal: each query sees half of the keys on average. Counting all, as is common, doubles attention's share.
    """
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    block = hidden * (width + 2 * kv_width) + width * hidden + 3 * hidden * config.intermediate_size
    products = 2 * length * (config.num_hidden_layers * block + config.vocab_size * hidden)
    return products, config.num_hidden_layers * 2 * length**2 * width  # Q K^T and P V: 2 x 2 S^2 / 2 each


# ------------------------------------------------------------------------------------------------------ checkpoints


def copy_tokenizer(source: Path, target: Path, config: ModelConfig) -> None:
    """Put the tokenizer's files beside the weights, with the model's window and stop tokens: what a server reads."""
    if source.is_file():
        shutil.copyfile(source, target / f"tokenizer{source.suffix}")
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, key, value in (("tokenizer_config.json", "model_max_length", config.max_position_embeddings),
                             ("generation_config.json", "eos_token_id", config.hf["eos_token_id"])):
        if (target / name).is_file():
            content = json.loads((target / name).read_text()) | {key: value}
            (target / name).write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def written_once(path: Path, model: Llama, tokenizer: Path) -> Iterator[Path]:
    """Write a model directory, and let the caller add to it: complete or absent. Every rank calls this, the first writes."""
    with data.complete_or_absent(path) if model.grid.is_first else nullcontext(path) as aside:
        model.save_pretrained(aside)
        if model.grid.is_first:
            copy_tokenizer(tokenizer, aside, model.config)
        yield aside


def save_checkpoint(run: Path, step: int, model: Llama, optimizer: ShardedAdamW, tokenizer: Path, agreed: dict,
                    keep: int) -> Path:
    """Write `run/checkpoint-STEP`, complete or absent, then drop all but the newest `keep`.

    Every rank calls this; the first writes what one process would write, so any grid can continue from it.
    """
    path, grid = run / f"checkpoint-{step:08d}", model.grid
    like = {name: parameter.grad for name, parameter in optimizer.parameters.items()}  # of a state's shapes and type
    with written_once(path, model, tokenizer) as aside:
        if grid.is_first:
            (aside / "optimizer").mkdir()
        for kind in optimizer.KINDS:
            data.write_weights(aside / "optimizer", kind, optimizer.state(kind), like, optimizer.dims, grid)
        if grid.is_first:
            progress = {"format": CHECKPOINT_FORMAT, "step": step, "settings": agreed}
            (aside / "training.json").write_text(json.dumps(progress, indent=2) + "\n")
    if grid.is_first:
        for old in checkpoints(run)[:-keep]:
            old.rename(f"{old}.partial")  # no longer a checkpoint, should its deletion be cut short
        for leftover in run.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
    grid.barrier()
    return path


def load_optimizer(checkpoint: Path, optimizer: ShardedAdamW, step: int) -> None:
    """Restore the optimizer from a checkpoint of any grid."""
    path, parameters = checkpoint / "optimizer", optimizer.parameters
    for kind in optimizer.KINDS:  # one at a time, by way of the host: the device may have no room for more
        shards = data.read_weights(path, kind, parameters, optimizer.dims, optimizer.grid, None, "cpu")
        optimizer.load_state(kind, shards, step)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-" + 8 * "[0-9]"))


def agreed_settings(options: Namespace, tokenizer: data.Tokenizer) -> dict:
    """What a resumed run must share with the run it continues, as JSON; files by what is in them, not by their path."""
    agreed = {name: value for name, value in sorted(vars(options).items()) if name not in FREE_TO_CHANGE}
    agreed |= {"dtype": compute_type(options.dtype, options.device), "tokenizer": data.fingerprint(tokenizer),
               "model": options.model and data.digest(options.model),
               "data": [[data.digest(path), weight] for path, weight in options.data]}
    return json.loads(json.dumps(agreed, default=str))


def load_progress(out: Path, resume: bool, agreed: dict) -> tuple[Path | None, int]:
    """(newest checkpoint, its step) of the run in `out`, (None, 0) at the start. ValueError if it may not be continued."""
    files = [path.name for path in out.iterdir()] if out.exists() else []
    if any(not name.startswith(("checkpoint-", "final", "metrics")) for name in files) and "metrics.jsonl" not in files:
        raise ValueError(f"--out {out}: holds files, but no run; choose another directory")
    if files and not resume:
        raise ValueError(f"--out {out}: holds an earlier run; add --resume to continue it, or choose another directory")
    found = checkpoints(out)
    if not found:
        return None, 0
    newest = found[-1]
    saved = data.read_object(newest / "training.json")
    if saved.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{newest}: a checkpoint of an earlier version, which this one cannot resume; start a new run from it "
                         f"with --model {newest}")
    for name, value in agreed.items():
        if saved["settings"].get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, but the run in {out} has "
                             f"{saved['settings'].get(name)!r}; resume with the same settings or choose another --out")
    return newest, saved["step"]


def open_metrics(path: Path, step: int):
    """metrics.jsonl, open for one line a step or validation; a resumed run first drops what it will do again."""
    kept = []
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    data.write_complete(path, "".join(kept).encode())
    return path.open("a", buffering=1)  # a line is written when it ends


# ------------------------------------------------------------------------------------------------------- the loop


@torch.no_grad()
def validate(model: Llama, dataset, sequences: int) -> float:
    """Mean held-out loss."""
    grid, device = model.grid, model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, targets
    for index in range(grid.dp_rank, sequences, grid.dp):
        grid.restart_timer()
        batch = data.batch(dataset, index, 1).to(device)
        total += torch.stack(model.loss(batch.tokens, batch.targets, batch.document_ids))
    grid.restart_timer()  # other replicas may have a sequence more
    loss, targets = grid.all_reduce(total, "dp").tolist()
    return loss / max(1, targets)


def training_step(model: Llama, optimizer: ShardedAdamW, batch: data.Batch, micro_batch_size: int) -> tuple[float, int]:
    """Accumulate one global batch's gradients in the optimizer, from this replica's rows of it.

    Returns the mean loss over the whole batch's targets and the positions computed, the same on every rank.
    """
    grid, device = model.grid, model.head_weight.device
    optimizer.zero_gradients()
    targets = torch.tensor(int((batch.targets != -100).sum()), device=device)
    targets = max(1, grid.all_reduce(targets, "dp").item())  # of the whole batch, before any backward
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, positions
    for rows in torch.arange(len(batch.tokens)).split(micro_batch_size):
        grid.restart_timer()
        has_target = (batch.targets[rows] != -100).any(0)  # (S,)
        ends = torch.arange(1, len(has_target) + 1)
        length = max(1, int((has_target * ends).max()))  # what follows the last target, padding say, changes nothing
        part = batch.part(rows, length).to(device)
        loss, _ = model.loss(part.tokens, part.targets, part.document_ids)
        (loss / targets).backward()
        total[0] += loss.detach()
        total[1] += part.tokens.numel()
    loss, positions = grid.all_reduce(total, "dp").tolist()
    return loss / targets, int(positions)


def peak_memory_gib(device: torch.device | str) -> float:
    """Largest memory this process has used: allocated on the GPU, resident on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Yield a list that collects the SIGTERM and SIGINT (Ctrl-C) of this block, which then do nothing else."""
    received, previous = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(model: Llama, optimizer: ShardedAdamW, training, validation, options: Namespace, save: Callable[[int], Path],
          first_step: int, stop: list[int]) -> int:
    """Steps first_step + 1 ... --steps, then a checkpoint. Returns the last step made: a signal in `stop` ends early."""
    grid, device, steps = model.grid, model.head_weight.device, options.steps
    share, length = options.batch_size // grid.dp, training.sequence_length
    products, attention = forward_flops(model.config, length)  # of a whole sequence; shorter ones take a little less
    flops = 3 * (products + (0 if training.document_mask else attention))  # masked documents: their products alone
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None  # what an MFU of 100 % means
    step = first_step
    log = open_metrics(options.out / "metrics.jsonl", first_step) if grid.is_first else None
    bar = tqdm(range(first_step + 1, steps + 1), initial=first_step, total=steps, desc=options.out.name, mininterval=1.0,
               disable=not grid.is_first)

    def note(**values) -> None:
        if log:
            print(json.dumps({"step": step, **values}), file=log)

    def is_due(every: int) -> bool:
        """Every so many steps, and at the end."""
        return step == steps or every > 0 and step % every == 0

    for step in bar:
        start = time.perf_counter()
        batch = data.batch(training, (step - 1) * options.batch_size + grid.dp_rank * share, share)
        waited = time.perf_counter() - start
        loss, positions = training_step(model, optimizer, batch, options.micro_batch_size or share)
        rate = learning_rate(step, steps, options.learning_rate, options.warmup_steps, options.final_learning_rate)
        try:
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss}")
            norm = optimizer.step(rate, options.clip)
        except ArithmeticError as error:
            good = checkpoints(options.out)
            raise ArithmeticError(f"step {step}: {error}; nothing was updated. The last good checkpoint is "
                                  f"{good[-1] if good else 'none'}; try a lower --learning-rate") from None
        seconds, gib = time.perf_counter() - start, peak_memory_gib(device)
        speed = positions / seconds / grid.size("all")  # tokens a second and process
        mfu = speed * flops / length / peak if peak else None
        note(loss=loss, learning_rate=rate, gradient_norm=norm, tokens=positions,
             tokens_per_second=round(speed * grid.size("all")), tokens_per_second_per_gpu=round(speed),
             mfu=mfu and round(mfu, 4), data_wait=round(waited / seconds, 4), peak_memory_gib=round(gib, 3))
        used = f"MFU {mfu:.0%}, " if mfu else ""
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s/GPU, {used}{gib:.1f} GiB, data {waited / seconds:.0%}",
                            refresh=False)
        if validation and is_due(options.validate_every):
            held_out = validate(model, validation, options.validation_sequences)
            note(validation_loss=held_out)
            if grid.is_first:
                bar.write(f"step {step}: held-out loss {held_out:.3f}")
        stopping = grid.all_reduce(torch.tensor(len(stop), device=device), "all").item() > 0  # all stop after the same step
        if stopping or is_due(options.checkpoint_every):
            path = save(step)
        if stopping:
            if grid.is_first:
                bar.write(f"stopped by a signal after step {step}; continue with --resume from {path}")
            break
    return step


def build_model(config: ModelConfig, checkpoint: Path | None, grid: Grid, options: Namespace) -> Llama:
    """The model of a checkpoint, as it is; else the one that `config` describes, with --model's weights or random ones."""
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    source = checkpoint or options.model
    if source:
        model = Llama.from_pretrained(source, grid, dtype, options.device)
    else:
        model = Llama(config, grid).initialise(options.seed).to(options.device, dtype)
    if not checkpoint:
        model.config = config
    model.recompute, model.offload, model.tile = options.recompute, options.offload, options.tile
    return model


def run_stage(options: Namespace, grid: Grid, config: ModelConfig, tokenizer: data.Tokenizer, training, validation) -> None:
    """Build everything, train, and leave `final`: what is the same in both stages.

    options: those of `argument_parser`. Raises ValueError, OSError, ArithmeticError.
    """
    out, length, dtype = options.out, training.sequence_length, compute_type(options.dtype, options.device)
    tokenizer_files = options.tokenizer or options.model
    kernel = attention_kernel(options.device, getattr(torch, dtype), config.head_dim)
    agreed = agreed_settings(options, tokenizer)
    checkpoint, step = load_progress(out, options.resume, agreed)
    is_done = (out / "final" / "config.json").exists()
    found = torch.tensor([step, zlib.crc32(json.dumps(agreed).encode()), is_done], device=options.device)
    if (grid.all_gather(found, "all") != found).any():
        raise ValueError(f"the ranks have found different checkpoints in {out}, options or data; --out and --data must be the "
                         "same for all of them")
    if is_done:
        print_once(f"{out}/final is already there; nothing to do")
        return
    model = build_model(config, checkpoint, grid, options)
    optimizer = ShardedAdamW(model, grid, options.betas, weight_decay=options.weight_decay, on_host=options.offload_optimizer)
    if checkpoint:
        load_optimizer(checkpoint, optimizer, step)
    if grid.is_first:
        out.mkdir(parents=True, exist_ok=True)
    parameters = 0
    for name, parameter in model.named_parameters():
        parameters += math.prod(whole_shape(parameter.shape, optimizer.dims[name], grid))
    config, begun = model.config, f"resumed after step {step}" if checkpoint else "from the first step on"
    print_once(f"{parameters / 1e6:.2f}M parameters, {dtype} on {options.device}, window {config.max_position_embeddings}, "
               f"rope {config.rope_scaling.kind}, {options.batch_size} x {length} tokens a step, {begun}")
    print_once(f"grid dp {grid.dp} x cp {grid.cp} x tp {grid.tp}; attention by {kernel}")

    def save(step: int) -> Path:
        return save_checkpoint(out, step, model, optimizer, tokenizer_files, agreed, options.keep_checkpoints)

    with signals_received() as stop:
        step = train(model, optimizer, training, validation, options, save, step, stop)
    if step == options.steps:
        with written_once(out / "final", model, tokenizer_files):
            pass
        print_once(f"wrote {out}/final")


def main(argv: list[str] | None = None) -> None:
    """Stage 1."""
    with one_line_errors():
        a = stage1_parser().parse_args(argv)
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = load_start(a, grid, scaling_from_options(vars(a)))
        training, validation = stage1_datasets(
            a.data, a.validation_sequences, a.seed, a.short_weight, a.long_weight, sequence_length=a.sequence_length,
            separator=a.separator, tokenizer=tokenizer, short=a.short_length, long=a.long_length,
            document_mask=a.document_mask)
        run_stage(a, grid, config, tokenizer, training, validation)
        grid.close()


if __name__ == "__main__":
    main()
