"""Stage 1: continued pretraining at the target length, and the one training loop both stages share.

    python train.py --config config.json --tokenizer DIR --data CORPUS --sequence-length 128 --steps 500 --out out/base
    python train.py --model out/base/final --rope-kind yarn --rope-factor 16 --data CORPUS --sequence-length 2048 \
                    --steps 300 --learning-rate 3e-5 --out out/stage1
    torchrun --standalone --nproc-per-node 8 train.py --tp 2 --cp 4 ...      # the same on eight processes

A run directory holds `metrics.jsonl`, the newest `checkpoint-STEP` directories (model, optimizer, data position: each
is complete or absent) and, at the end, `final`, a Hugging Face model directory. `--resume` continues from the newest
checkpoint to the last bit; SIGTERM or Ctrl-C writes one and stops (under torchrun, if step and checkpoint fit into its
--shutdown-timeout, 30 s by default). `python -m tools.plan H100-80` and the same options say what a run takes.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from data import locate_weights, read_shards, write_weights
from model import (
    RECOMPUTE,
    HostMemory,
    Llama,
    ModelConfig,
    check_device,
    read_config,
    rescale,
)
from parallel import (
    Grid,
    ShardedAdamW,
    add_grid_arguments,
    attention_kernel,
    check_grid,
    check_least,
    finish,
    launched,
    nearest_multiples,
    parse_once,
    print_once,
    restarts,
)
from rope_yarn import RopeScaling, add_scaling_arguments, scaling_from_options

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")
FREE_TO_CHANGE = ("out", "resume", "device", "checkpoint_every", "keep_checkpoints", "validate_every", "validation_sequences",
                  "validation_buckets", "micro_batch_size", "recompute", "offload", "offload_optimizer", "tile_mib", "tp", "cp",
                  "timeout")
PEAKS = {"H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "A100-SXM4-80GB": 312e12}  # dense bfloat16 FLOP/s, by CUDA's name
OPTIMIZER_SHARD_BYTES = 5 * 10**9  # largest file of optimizer state


# --------------------------------------------------------------------------------------------------------- options


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options both stages have. A stage adds its data group and its own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="start from this Hugging Face model directory")
    source.add_argument("--config", type=Path, help="start from random weights of this config.json")
    model.add_argument("--tokenizer", type=Path, help="tokenizer directory or file (default: the model's own)")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="compute type; auto measures whether bfloat16 is faster here. Master weights are float32")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--recompute", choices=RECOMPUTE, nargs="?", const="block", default="none",
                        help="what backward computes again: nothing; all but attention; whole blocks (--recompute alone)")
    memory.add_argument("--offload", action="store_true", help="keep what recomputed blocks keep in host memory")
    memory.add_argument("--offload-optimizer", action="store_true", help="keep master weights and moments in host memory")
    memory.add_argument("--tile-mib", type=int, default=0, help="memory of a tile of positions; 0: 128 on a CPU, 1024 on a GPU")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=int, default=None, help="optimizer steps in all")
    optimisation.add_argument("--batch-size", type=int, default=1, help="sequences a step, over all processes")
    optimisation.add_argument("--micro-batch-size", type=int, default=None,
                              help="sequences a forward of one data-parallel replica; None: its whole share of the batch")
    optimisation.add_argument("--learning-rate", type=float, default=3e-5, help="the peak")
    optimisation.add_argument("--warmup-steps", type=int, default=10, help="linear warm-up")
    optimisation.add_argument("--final-learning-rate", type=float, default=0.1, help="end of the cosine / peak")
    optimisation.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; vectors do not decay")
    optimisation.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW")
    optimisation.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
    optimisation.add_argument("--seed", type=int, default=0, help="weights (with --config) and data order")
    add_grid_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=None, help="run directory")
    output.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    output.add_argument("--checkpoint-every", type=int, default=0,
                        help="steps between checkpoints; 0: only at the end and when SIGTERM or Ctrl-C stops the run")
    output.add_argument("--keep-checkpoints", type=int, default=2, help="how many of the newest to keep")
    output.add_argument("--validate-every", type=int, default=0, help="steps between validations; 0: only at the end")
    output.add_argument("--validation-sequences", type=int, default=8, help="held-out sequences a validation; 0: none")
    output.add_argument("--validation-buckets", type=int, default=16, help="equal ranges of positions to report the loss by")
    return parser


def stage1_parser() -> argparse.ArgumentParser:
    """Stage 1's options: packed documents, length up-sampling, rope scaling."""
    parser = argument_parser("Continued pretraining on packed documents (stage 1), or pretraining from scratch.")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", action="extend", metavar="DIR[=WEIGHT]",
                       help="corpora written by `python -m tools.prepare`; each sequence comes from one, by weight")
    group.add_argument("--sequence-length", type=int, required=True)
    group.add_argument("--separator", choices=("<s>", "none", "bos_eos"), default="<s>", help="between documents")
    group.add_argument("--short-length", type=int, default=4096, help="documents below are short")
    group.add_argument("--long-length", type=int, default=8192, help="documents above are long")
    group.add_argument("--short-weight", type=float, default=1.0, help="sampling weight of short documents")
    group.add_argument("--long-weight", type=float, default=1.0, help="sampling weight of long documents")
    group.add_argument("--cross-document-mask", action="store_true", help="ablation: documents do not see each other")
    add_scaling_arguments(parser, "context extension (replaces the checkpoint's own scaling)")
    return parser


@dataclass(frozen=True)
class Optimisation:
    """What a step is, how many there are, and what each does to the weights. Raises ValueError naming the option."""

    steps: int
    batch_size: int = 1  # sequences a step, over all processes
    micro_batch_size: int | None = None  # sequences a forward of one data-parallel replica; None: its whole share of the batch
    learning_rate: float = 3e-5  # the peak, after warmup_steps
    warmup_steps: int = 10
    final_learning_rate: float = 0.1  # end of the cosine, as a share of the peak
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(1, steps=self.steps, batch_size=self.batch_size)
        check_least(0, warmup_steps=self.warmup_steps, seed=self.seed)
        for name in ("learning_rate", "weight_decay", "clip", "final_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a finite number, zero or more")
        if self.final_learning_rate > 1:
            raise ValueError(f"--final-learning-rate {self.final_learning_rate} must be at most 1: it is a share of "
                             "--learning-rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas {self.betas[0]} {self.betas[1]} must lie in [0, 1)")


@dataclass(frozen=True)
class Compute:
    """Where and how a run is computed: but for rounding, nothing here changes what is learned. Raises ValueError."""

    tp: int = 1
    cp: int = 1
    timeout: float = 600.0  # seconds until a rank that makes no progress ends the job
    device: str = "cpu"
    dtype: str = "auto"
    recompute: str = "none"
    offload: bool = False
    offload_optimizer: bool = False
    tile_mib: int = 0  # memory of a tile of positions; 0: TILE_BYTES of the device

    def __post_init__(self) -> None:
        check_least(0, tile_mib=self.tile_mib)
        if self.offload and self.recompute == "none":
            raise ValueError("--offload moves what recomputed blocks keep: add --recompute block or --recompute mlp")


@dataclass(frozen=True)
class Output:
    """The run directory, and what is written there when (in steps; 0: only at the end). Raises ValueError."""

    out: Path
    resume: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    validate_every: int = 0
    validation_sequences: int = 8
    validation_buckets: int = 16

    def __post_init__(self) -> None:
        check_least(1, keep_checkpoints=self.keep_checkpoints, validation_buckets=self.validation_buckets)
        check_least(0, checkpoint_every=self.checkpoint_every, validate_every=self.validate_every,
                    validation_sequences=self.validation_sequences)
        if self.out.is_file():
            raise ValueError(f"--out {self.out}: is a file; choose a directory")


def values_of(kind: type, options: dict):
    """A dataclass from the options that have its fields' names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def check_given(**options) -> None:
    """Raise ValueError for an option that nothing works without."""
    for name, value in options.items():
        if value is None:
            raise ValueError(f"--{name} is needed")


def check_split(batch_size: int, micro_batch_size: int | None, replicas: int) -> int:
    """Sequences of a micro-batch: what is asked for, or the whole share of a replica. Raises ValueError unless all is whole."""
    if batch_size % replicas:
        raise ValueError(f"--batch-size {batch_size} is not a multiple of the {replicas} data-parallel replicas; "
                         f"the nearest is {nearest_multiples(batch_size, replicas)}")
    share = batch_size // replicas
    micro = share if micro_batch_size is None else micro_batch_size
    if micro < 1 or share % micro:
        of_batch = f"--batch-size {batch_size}" + (f" / {replicas} data-parallel replicas" if replicas > 1 else "")
        raise ValueError(f"--micro-batch-size {micro} does not divide {of_batch}")
    return micro


def check_whole_sequences(document_mask: bool, cp: int) -> None:
    """Raise ValueError for a cross-document mask on a ring."""
    if document_mask and cp > 1:
        raise ValueError("--cross-document-mask (and sft.py --pack) works on whole sequences: use --cp 1 (and --tp), or "
                         "leave it out")


def weighted_paths(option: str, specifications: list[str]) -> list[tuple[Path, float]]:
    """['a=0.8', 'b'] -> [(a, 0.8), (b, 1.0)]. Raises for a path that is missing or a weight that is not positive."""
    result = []
    for text in specifications:
        path, _, weight = text.rpartition("=") if re.search(r"=[^/=]*$", text) else (text, "", "1")
        try:
            result.append((Path(path), float(weight)))
        except ValueError:
            raise ValueError(f"{option} {text}: the weight after '=' must be a number") from None
        if not 0 < result[-1][1] < math.inf:
            raise ValueError(f"{option} {text}: the weight must be above 0")
        if not Path(path).exists():
            raise FileNotFoundError(f"{option} {path}: no such file or directory")
    return result


def stage1_datasets(sources: list[tuple[Path, float]], validation_sequences: int, seed: int, short_weight: float,
                    long_weight: float, **options):
    """(training, validation) datasets of packed documents, see PackedDataset, whose `options` these are.

    Training blends the (corpus, weight) sources; validation is the first one's held-out split, its documents as they come,
    or None without `validation_sequences`. Raises ValueError.
    """
    parts = [data.PackedDataset(path, "train", seed=seed, short_weight=short_weight, long_weight=long_weight, **options)
             for path, _ in sources]
    training = data.Blend(parts, [weight for _, weight in sources], seed) if len(parts) > 1 else parts[0]
    if not validation_sequences:
        return training, None
    corpus, needed = sources[0][0], validation_sequences * training.sequence_length + 1
    validation = data.PackedDataset(corpus, "valid", seed=seed, **options)
    if validation.lengths.sum() < needed:  # a document seen twice in one sequence would be copied
        raise ValueError(f"--validation-sequences {validation_sequences} need {needed} tokens, but {corpus} holds out "
                         f"{validation.lengths.sum()}; ask for fewer, or prepare it with a larger --holdout")
    return training, validation


# ----------------------------------------------------------------------------------------------- model and schedule


def best_seconds(function) -> float:
    """Seconds of a function that returns a tensor, after a call that warms up: the best of five, or of what a second holds."""
    seconds = []
    while len(seconds) < 2 or len(seconds) < 6 and sum(seconds[1:]) < 1:
        start = time.perf_counter()
        function().flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here, of a size that keeps the device busy."""
    size = 8192 if device.startswith("cuda") else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix)


def faster_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, or if its matrix product beats float32's here, else float32 (CPUs without bf16 units lose 9x)."""
    if device.startswith("cuda"):
        return torch.bfloat16
    return max((torch.float32, torch.bfloat16), key=lambda dtype: product_rate(device, dtype))


def peak_rate(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that 100 % utilisation means here, and what that is: the data sheet's, or a product measured on the spot."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        for part, peak in PEAKS.items():
            if part in name:
                return peak, f"the {peak / 1e12:.0f} TFLOP/s of {name}"
    rate = product_rate(device, dtype)
    return rate, f"{rate / 1e12:.3g} TFLOP/s, a measured matrix product"


def starting_config(path: Path, scaling: RopeScaling | None, sequence_length: int) -> ModelConfig:
    """The configuration to train: the checkpoint's or the JSON's, with the rope scaling that was asked for, if any was."""
    own = read_config(path)
    config = rescale(own, scaling)
    if sequence_length > config.max_position_embeddings:
        raise ValueError(f"--sequence-length {sequence_length} is beyond the model's window of "
                         f"{config.max_position_embeddings}; extend it ({extension(own, sequence_length)}) or shorten the "
                         "sequences")
    return config


def extension(config: ModelConfig, length: int) -> str:
    """The options that extend a model's window to `length`, for people."""
    scaling, window = config.rope_scaling, config.max_position_embeddings
    if scaling.kind == "default":
        return f"train.py --rope-kind yarn --rope-factor {math.ceil(length / window)}"
    known = config.window_before()
    original = known or round(window / scaling.factor)
    options = f"train.py --rope-kind yarn --rope-factor {math.ceil(length / original)} --original-length {original}"
    unsure = "" if known else ", if that was its window before; it"
    return options + (unsure or ", which") + f" replaces the model's own {scaling.kind} rule"


def with_stop_tokens(config: ModelConfig, tokenizer: data.Tokenizer, path: Path) -> ModelConfig:
    """`config` with the tokens at which servers should stop. Raises ValueError if the tokenizer is larger than the model's."""
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"--tokenizer {path} has {tokenizer.n_vocab} tokens, but the model's vocab_size is "
                         f"{config.vocab_size}; use the model's own tokenizer")
    return replace(config, hf=config.hf | {"eos_token_id": data.stop_tokens(tokenizer, config.hf.get("eos_token_id"))})


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """Linear warm-up to the peak, then a cosine to `final_share` of it; `step` counts from 1 to `steps`."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def rank_shapes(config: ModelConfig, rows: int, length: int, tp: int, cp: int) -> str:
    """What a rank's tensors look like: a line for people."""
    heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
    return (f"x ({rows}, {length // (cp * tp)}, {config.hidden_size}) between blocks, q ({rows}, {heads}, {length // cp}, "
            f"{config.head_dim}), k and v with {kv_heads} heads")


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


def save_checkpoint(run: Path, step: int, model: Llama, optimizer: ShardedAdamW, tokenizer: Path, settings: dict,
                    keep: int) -> Path:
    """Write `run/checkpoint-STEP`, complete or absent, then drop all but the newest `keep`.

    Every rank calls this; the first writes what one process would write, so any grid can continue from it.
    """
    path, grid = run / f"checkpoint-{step:08d}", model.grid
    with data.complete_or_absent(path) if grid.is_first else nullcontext(path) as aside:
        model.save_pretrained(aside)
        if grid.is_first:
            copy_tokenizer(tokenizer, aside, model.config)
            (aside / "optimizer").mkdir()
        for kind in optimizer.KINDS:
            write_weights(aside / "optimizer", kind, optimizer.shapes(), optimizer.state(kind), OPTIMIZER_SHARD_BYTES, grid)
        if grid.is_first:
            progress = {"step": step, "updates": optimizer.steps, "settings": settings}
            (aside / "training.json").write_text(json.dumps(progress, indent=2) + "\n")
    if grid.is_first:
        for old in checkpoints(run)[:-keep]:
            old.rename(f"{old}.partial")  # no longer a checkpoint, should its deletion be cut short
        for leftover in run.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
    grid.barrier()
    return path


def load_optimizer(checkpoint: Path, optimizer: ShardedAdamW, updates: int) -> None:
    """Restore the optimizer from a checkpoint of any grid: a rank reads what it holds a part of."""
    shapes = {name: tuple(optimizer.parameters[name].shape) for name in optimizer.needed()}
    for kind in optimizer.KINDS:  # one at a time, by way of the host: the device may have no room for more
        files = locate_weights(checkpoint / "optimizer", kind)
        if absent := [name for name in shapes if name not in files]:
            raise ValueError(f"{checkpoint}/optimizer: {kind} of {absent[0]} is missing; the checkpoint is of another model")
        tensors = read_shards(files, shapes, optimizer.dims, optimizer.grid, None, "cpu")
        optimizer.load_state({kind: tensors}, updates)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8,}", p.name))


def shared_settings(options: dict, sources: list[tuple[Path, float]]) -> dict:
    """What a resumed run must share with the run it continues, as JSON; of each of the --data `sources` what is there, too."""
    settings = {name: value for name, value in sorted(options.items()) if name not in FREE_TO_CHANGE}
    settings["data"] = [[text, data.digest(path)] for text, (path, _) in zip(options["data"], sources)]
    return json.loads(json.dumps(settings, default=str))


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its newest checkpoint (None: not begun), step and updates, and the compute type it chose."""

    checkpoint: Path | None = None
    step: int = 0
    updates: int = 0
    dtype: str = "auto"


def load_progress(out: Path, resume: bool, settings: dict) -> Progress:
    """Progress of the run in `out`, if it is to be resumed. Raises ValueError if it has other settings."""
    found = checkpoints(out)
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out}: holds an earlier run; add --resume to continue it, or choose another directory")
        return Progress()
    if not found:
        print_once(f"{out} holds no checkpoint to resume from: starting at the first step")
        return Progress()
    try:
        saved = json.loads((found[-1] / "training.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{found[-1]}/training.json: not valid JSON ({error})") from None
    for name, value in settings.items():
        if saved["settings"].get(name) != value and (name, value) != ("dtype", "auto"):
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, but the run in {out} has "
                             f"{saved['settings'].get(name)!r}; resume with the same settings or choose another --out")
    return Progress(found[-1], saved["step"], saved["updates"], saved["settings"]["dtype"])


def job_name() -> str:
    """What torchrun calls this job, the same after a restart; empty if it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def restarted(run: Path) -> bool:
    """Whether torchrun --max-restarts started this job anew after it had begun `run`: then it resumes without being told."""
    return restarts() > 0 and job_name() != "" and (run / "job").is_file() and (run / "job").read_text() == job_name()


def check_agreement(grid: Grid, out: Path, step: int, settings: dict, device: str) -> None:
    """Raise ValueError unless every rank has found the same checkpoint, options and data: files may differ by machine."""
    mine = torch.tensor([step, zlib.crc32(json.dumps(settings).encode())], device=device)
    low, high = (grid.all_reduce(mine.clone(), "all", o).tolist() for o in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if low != high:
        what = f"checkpoints in {out}, of steps {low[0]} to {high[0]}" if low[0] != high[0] else "options or data"
        raise ValueError(f"the ranks have found different {what}; --out and --data must be the same for all of them")


class Metrics:
    """metrics.jsonl: one line a step or validation, flushed; a resumed run first drops what it will do again.

    Only the first rank writes; the others' file is None.
    """

    def __init__(self, path: Path, step: int, is_first: bool) -> None:
        self.file, kept = None, []
        if not is_first:
            return
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        aside = path.with_suffix(".partial")
        aside.write_text("".join(kept))
        os.replace(aside, path)
        self.file = path.open("a")

    def write(self, **values) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


# ------------------------------------------------------------------------------------------------------- the loop


def validate(model: Llama, dataset, sequences: int, buckets: int) -> tuple[float, list[float]]:
    """Mean held-out loss, and by equal ranges of positions: where a window ends, the curve jumps."""
    grid, device = model.grid, model.head_weight.device
    sums = torch.zeros(2, dataset.sequence_length, dtype=torch.float64, device=device)  # of losses, of targets
    for index in range(grid.dp_rank, sequences, grid.dp):
        grid.restart_timer()
        batch = data.batch(dataset, index, 1).to(device)
        sums[0] += model.token_losses(batch.tokens, batch.targets, batch.document_ids)[0]  # (S,)
        sums[1] += batch.targets[0] != -100
    grid.restart_timer()  # other replicas may have a sequence more
    total, count = grid.all_reduce(sums, "dp").cpu()
    parts = list(zip(total.tensor_split(buckets), count.tensor_split(buckets)))
    by_bucket = [(t.sum() / n.sum()).item() if n.sum() else None for t, n in parts]
    return (total.sum() / count.sum().clamp(min=1)).item(), by_bucket


def training_step(model: Llama, optimizer: ShardedAdamW, batch: data.Batch, micro_batch_size: int) -> tuple[float, int]:
    """Accumulate one global batch's gradients in the optimizer, from this replica's rows of it.

    Returns the mean loss over the whole batch's targets and the positions computed, the same on every rank.
    """
    grid, device = model.grid, model.head_weight.device
    optimizer.zero_gradients()
    valid = torch.tensor(int((batch.targets != -100).sum()), device=device)
    valid = max(1, grid.all_reduce(valid, "dp").item())  # over the whole batch, before any backward
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, positions
    for rows in torch.arange(len(batch.tokens)).split(micro_batch_size):
        grid.restart_timer()
        last = (batch.targets[rows] != -100).any(0).nonzero()[-1:]  # what follows the last target, padding say, changes nothing
        part = batch.part(rows, int(last.sum()) + 1).to(device)
        loss, _ = model.loss(part.tokens, part.targets, part.document_ids)
        (loss / valid).backward()
        total += torch.stack((loss.detach().double(), total.new_tensor(part.tokens.numel())))
    loss, positions = grid.all_reduce(total, "dp").tolist()
    return loss / valid, int(positions)


def stop_requested(stop: list[int], grid: Grid, device: str) -> bool:
    """Whether any rank has received a signal: all agree, so all stop after the same step."""
    return bool(grid.all_reduce(torch.tensor(len(stop), device=device), "all"))


def print_line(bar: tqdm, text: str) -> None:
    """A line above the progress bar, on the first rank."""
    if not bar.disable:
        bar.write(text)


def peak_memory_gib(device: str) -> float:
    """Largest memory this process has used: allocated on the GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Yield a list that collects the SIGTERM and SIGINT (Ctrl-C) of this block, which then do nothing else."""
    received = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number))
                for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(model: Llama, optimizer: ShardedAdamW, training, validation, optimisation: Optimisation, output: Output,
          save: Callable[[int], Path], first_step: int, stop: list[int]) -> int:
    """Steps first_step + 1 ... steps, then a checkpoint; returns the last step made: a signal in `stop` ends it early."""
    grid, device, steps, rows = model.grid, model.head_weight.device, optimisation.steps, optimisation.batch_size
    share = rows // grid.dp
    metrics = Metrics(output.out / "metrics.jsonl", first_step, grid.is_first)
    bar = tqdm(range(first_step + 1, steps + 1), initial=first_step, total=steps, desc=output.out.name, mininterval=1.0,
               disable=not grid.is_first)
    step, length = first_step, training.sequence_length
    products, attention = model.config.forward_flops(length)  # of a whole sequence; shorter ones take a little less
    flops = 3 * (products + (0 if training.document_mask else attention))  # masked documents: their products alone
    peak, what = peak_rate(str(device), model.head_weight.dtype)
    print_line(bar, f"MFU counts causal attention and no recomputation, against {what}")
    for step in bar:
        start = time.perf_counter()
        batch = data.batch(training, (step - 1) * rows + grid.dp_rank * share, share)
        waited = time.perf_counter() - start
        loss, positions = training_step(model, optimizer, batch, optimisation.micro_batch_size)
        rate = learning_rate(step, steps, optimisation.learning_rate, optimisation.warmup_steps,
                             optimisation.final_learning_rate)
        try:
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss}")
            norm = optimizer.step(rate, optimisation.clip)
        except ArithmeticError as error:
            good = checkpoints(output.out)
            raise ArithmeticError(f"step {step}: {error}; nothing was updated. The last good checkpoint is "
                                  f"{good[-1] if good else 'none'}; try a lower --learning-rate") from None
        seconds, world, gib = time.perf_counter() - start, grid.size("all"), peak_memory_gib(device.type)
        speed, used = positions / seconds / world, flops * positions / length / seconds / world / peak
        metrics.write(step=step, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=positions,
                      tokens_per_second=round(speed * world), tokens_per_second_per_gpu=round(speed), mfu=round(used, 4),
                      data_wait=round(waited / seconds, 4), peak_memory_gib=round(gib, 3))
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s/GPU, MFU {used:.0%}, {gib:.1f} GiB, "
                            f"data {waited / seconds:.0%}", refresh=False)
        if validation and (step == steps or output.validate_every and step % output.validate_every == 0):
            mean, by_position = validate(model, validation, output.validation_sequences, output.validation_buckets)
            metrics.write(step=step, validation_loss=mean, validation_loss_by_position=by_position)
            shown = " ".join("-" if value is None else f"{value:.2f}" for value in by_position)
            print_line(bar, f"step {step}: held-out loss {mean:.3f}; by position {shown}")
        stopping = stop_requested(stop, grid, device)
        if stopping or step == steps or output.checkpoint_every and step % output.checkpoint_every == 0:
            path = save(step)
        if stopping:
            print_line(bar, f"stopped by a signal after step {step}; continue with --resume from {path}")
            break
    return step


def build_model(config: ModelConfig, weights: Path | None, checkpoint: Path | None, grid: Grid, compute: Compute, dtype: str,
                seed: int) -> Llama:
    """The model of a checkpoint, as it is; else the one that `config` describes, with a directory's weights or random ones."""
    if checkpoint or weights:
        model = Llama.from_pretrained(checkpoint or weights, grid, getattr(torch, dtype), compute.device)
    else:
        model = Llama(config, grid).initialise(seed).to(compute.device, getattr(torch, dtype))
    if not checkpoint:
        model.config = config
    model.recompute, model.tile_bytes = compute.recompute, compute.tile_mib * 2**20
    model.host = HostMemory() if compute.offload else None
    return model


def check_processes(compute: Compute, optimisation: Optimisation, sequence_length: int, document_mask: bool) -> Optimisation:
    """Refuse what cannot work on so many processes and this device; `optimisation` with its micro-batch size. ValueError."""
    check_least(2, sequence_length=sequence_length)
    check_grid(compute.tp, compute.cp, launched()[1], sequence_length=sequence_length)
    replicas = launched()[1] // (compute.tp * compute.cp)
    micro_batch_size = check_split(optimisation.batch_size, optimisation.micro_batch_size, replicas)
    check_whole_sequences(document_mask, compute.cp)
    check_device(compute.device)
    return replace(optimisation, micro_batch_size=micro_batch_size)


def load_start(model: Path, tokenizer: Path | None, scaling: RopeScaling | None, sequence_length: int,
               compute: Compute) -> tuple[ModelConfig, data.Tokenizer, Path]:
    """Configuration, tokenizer and where that lies, checked against each other and the grid. Raises ValueError, OSError."""
    if tokenizer is None:
        raise ValueError("--tokenizer is needed with --config: the directory of the tokenizer the corpus was prepared with")
    config, loaded = starting_config(model, scaling, sequence_length), data.load_tokenizer(tokenizer)
    check_grid(compute.tp, compute.cp, launched()[1], config.shards())
    return with_stop_tokens(config, loaded, tokenizer), loaded, tokenizer


def expected_dtype(name: str) -> torch.dtype:
    """The compute type before anything is measured: auto may become bfloat16."""
    return torch.bfloat16 if name == "auto" else getattr(torch, name)


def chosen_dtype(grid: Grid, compute: Compute, progress: Progress) -> str:
    """The compute type: as asked for, as the run has had it so far, or what the first rank finds to be faster."""
    if compute.dtype != "auto":
        return compute.dtype
    if progress.dtype != "auto":
        return progress.dtype
    is_fast = torch.tensor(int(faster_dtype(compute.device) == torch.bfloat16), device=compute.device)
    return "bfloat16" if grid.broadcast(is_fast) else "float32"


def run_stage(config: ModelConfig, weights: Path | None, tokenizer: Path, training, validation, optimisation: Optimisation,
              compute: Compute, output: Output, settings: dict) -> None:
    """Build everything, train, and leave `final`: what is the same in both stages.

    weights: the model directory to start from, None for random weights. tokenizer: the files to put beside the model.
    settings: what a resumed run must share. Up to `Grid.create` nothing is written, and every rank finds the same; from there
    on they go in step. Raises ValueError, OSError, ArithmeticError.
    """
    if validation and output.validation_buckets > training.sequence_length:
        raise ValueError(f"--validation-buckets {output.validation_buckets} is more than --sequence-length "
                         f"{training.sequence_length}")
    progress = load_progress(output.out, output.resume or restarted(output.out), settings)
    if (output.out / "final" / "config.json").exists():
        print_once(f"{output.out}/final is already there; nothing to do")
        return
    kernel = attention_kernel(compute.device, expected_dtype(compute.dtype), config.head_dim)
    grid = Grid.create(compute.tp, compute.cp, compute.device, compute.timeout)
    check_agreement(grid, output.out, progress.step, settings, compute.device)
    dtype = chosen_dtype(grid, compute, progress)
    model = build_model(config, weights, progress.checkpoint, grid, compute, dtype, optimisation.seed)
    config = model.config
    optimizer = ShardedAdamW(model, grid, tuple(optimisation.betas), weight_decay=optimisation.weight_decay,
                             on_host=compute.offload_optimizer)
    if progress.checkpoint:
        load_optimizer(progress.checkpoint, optimizer, progress.updates)
    if grid.is_first:
        output.out.mkdir(parents=True, exist_ok=True)
        if job_name():
            (output.out / "job").write_text(job_name())
    parameters = sum(math.prod(shape) for shape, _ in optimizer.shapes().values())
    batch_size, length = optimisation.batch_size, training.sequence_length
    print_once(f"{parameters / 1e6:.2f}M parameters, {dtype} on {compute.device}, window {config.max_position_embeddings}, "
               f"rope {config.rope_scaling.kind}, {batch_size} x {length} tokens a step"
               + (f", resumed after step {progress.step}" if progress.checkpoint else ""))
    print_once(f"grid dp {grid.dp} x cp {grid.cp} x tp {grid.tp}; attention by {kernel}; a rank: "
               + rank_shapes(config, optimisation.micro_batch_size, length, grid.tp, grid.cp))

    def save(step: int) -> Path:
        return save_checkpoint(output.out, step, model, optimizer, tokenizer, settings | {"dtype": dtype},
                               output.keep_checkpoints)

    with signals_received() as stop:
        step = train(model, optimizer, training, validation, optimisation, output, save, progress.step, stop)
    if step == optimisation.steps:
        with data.complete_or_absent(output.out / "final") if grid.is_first else nullcontext(output.out / "final") as aside:
            model.save_pretrained(aside)
            if grid.is_first:
                copy_tokenizer(tokenizer, aside, config)
        print_once(f"wrote {output.out}/final")
    grid.close()


def main(argv: list[str] | None = None) -> None:
    """Stage 1: one line and exit code 1 for a user's mistake."""
    a = parse_once(stage1_parser(), argv)
    try:
        check_given(data=a.data, steps=a.steps, out=a.out)
        optimisation, compute, output = (values_of(kind, vars(a)) for kind in (Optimisation, Compute, Output))
        optimisation = check_processes(compute, optimisation, a.sequence_length, a.cross_document_mask)
        scaling = scaling_from_options(vars(a))
        config, tokenizer, path = load_start(a.model or a.config, a.tokenizer or a.model, scaling, a.sequence_length, compute)
        sources = weighted_paths("--data", a.data)
        training, validation = stage1_datasets(
            sources, output.validation_sequences, a.seed, a.short_weight, a.long_weight, sequence_length=a.sequence_length,
            separator=a.separator, tokenizer=tokenizer, short=a.short_length, long=a.long_length,
            document_mask=a.cross_document_mask)
        settings = shared_settings(vars(a) | {"tokenizer": path}, sources)
        run_stage(config, a.model, path, training, validation, optimisation, compute, output, settings)
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main()
