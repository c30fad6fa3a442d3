"""Stage 1: continued pretraining at the target length, and the one training loop both stages share.

    python train.py --config config.json --tokenizer DIR --data CORPUS --sequence-length 128 --steps 500 --out out/base
    python train.py --model out/base/final --rope-kind yarn --rope-factor 16 --data CORPUS --sequence-length 2048 \
                    --steps 300 --learning-rate 3e-5 --out out/stage1
    torchrun --standalone --nproc-per-node 8 train.py --tp 2 --cp 4 ...      # the same on eight processes

A run directory holds `metrics.jsonl`, the newest `checkpoint-STEP` directories (model, optimizer, data position: each
is complete or absent) and, at the end, `final`, a Hugging Face model directory. `--resume` continues from the newest
checkpoint to the last bit; SIGTERM or Ctrl-C writes one and stops (under torchrun, if step and checkpoint fit into its
--shutdown-timeout, 30 s by default). `--dry-run` says what a run takes, and whether it fits, and starts nothing:

    python train.py --dry-run H100-80 --config runs/llama31_8b.json --sequence-length 1048576 --tp 8 --recompute mlp --offload
"""
from __future__ import annotations

import argparse
import itertools
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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import (
    RECOMPUTE,
    TILE_BYTES,
    VOCABULARY_TILE,
    HostMemory,
    Llama,
    ModelConfig,
    block_tile_bytes,
    check_device,
    locate_weights,
    logit_bytes,
    read_config,
    read_shards,
    rescale,
    write_weights,
)
from parallel import (
    Grid,
    ShardedAdamW,
    add_grid_arguments,
    attention_kernel,
    block_backward,
    block_forward,
    check_grid,
    finish,
    launched,
    nearest_multiples,
    parse_once,
    print_once,
    restarts,
)
from rope_yarn import add_scaling_arguments, scaling_from_arguments

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")
FREE_TO_CHANGE = ("out", "resume", "device", "checkpoint_every", "keep_checkpoints", "validate_every", "validation_sequences",
                  "validation_buckets", "micro_batch_size", "recompute", "offload", "offload_optimizer", "tile_mib", "dry_run",
                  "processes", "tp", "cp", "timeout")
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
    memory.add_argument("--dry-run", nargs="?", const="H100-80", choices=(*DEVICES, "measured"), default=None,
                        help="plan: memory and time of a rank there (measured: here); train nothing")
    memory.add_argument("--processes", type=int, default=None, help="with --dry-run: GPUs in all (None: tp x cp)")
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
                       help="corpora written by `data.py prepare`; each sequence comes from one, by weight")
    group.add_argument("--sequence-length", type=int, required=True)
    group.add_argument("--separator", choices=("<s>", "none", "bos_eos"), default="<s>", help="between documents")
    group.add_argument("--short-length", type=int, default=4096, help="documents below are short")
    group.add_argument("--long-length", type=int, default=8192, help="documents above are long")
    group.add_argument("--short-weight", type=float, default=1.0, help="sampling weight of short documents")
    group.add_argument("--long-weight", type=float, default=1.0, help="sampling weight of long documents")
    group.add_argument("--cross-document-mask", action="store_true", help="ablation: documents do not see each other")
    add_scaling_arguments(parser, "context extension (replaces the checkpoint's own scaling)")
    return parser


def check_arguments(a: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read. Raises ValueError naming the option."""
    if not a.dry_run:
        for name in ("data", "steps", "out"):
            if getattr(a, name) is None:
                raise ValueError(f"--{name} is needed (only --dry-run goes without)")
    elif a.processes is not None and a.processes < 1:
        raise ValueError(f"--processes {a.processes} is too small; the least is 1")
    at_least = {"steps": 1, "batch_size": 1, "sequence_length": 2, "warmup_steps": 0, "checkpoint_every": 0,
                "keep_checkpoints": 1, "validate_every": 0, "validation_sequences": 0, "validation_buckets": 1, "seed": 0,
                "tile_mib": 0}
    for name, smallest in at_least.items():
        if getattr(a, name) is not None and getattr(a, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(a, name)} is too small; the least is {smallest}")
    for name in ("learning_rate", "weight_decay", "clip", "final_learning_rate"):
        if not 0 <= getattr(a, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(a, name)} must be a finite number, zero or more")
    if a.final_learning_rate > 1:
        raise ValueError(f"--final-learning-rate {a.final_learning_rate} must be at most 1: it is a share of --learning-rate")
    if not all(0 <= beta < 1 for beta in a.betas):
        raise ValueError(f"--betas {a.betas[0]} {a.betas[1]} must lie in [0, 1)")
    if a.offload and a.recompute == "none":
        raise ValueError("--offload moves what recomputed blocks keep: add --recompute block or --recompute mlp")
    world = planned_processes(a) if a.dry_run else launched()[1]
    check_grid(a.tp, a.cp, world, sequence_length=a.sequence_length)
    replicas = world // (a.tp * a.cp)
    if a.batch_size % replicas:
        raise ValueError(f"--batch-size {a.batch_size} is not a multiple of the {replicas} data-parallel replicas; "
                         f"the nearest is {nearest_multiples(a.batch_size, replicas)}")
    share = a.batch_size // replicas
    a.micro_batch_size = share if a.micro_batch_size is None else a.micro_batch_size
    if a.micro_batch_size < 1 or share % a.micro_batch_size:
        of_batch = f"--batch-size {a.batch_size}" + (f" / {replicas} data-parallel replicas" if replicas > 1 else "")
        raise ValueError(f"--micro-batch-size {a.micro_batch_size} does not divide {of_batch}")
    if a.cross_document_mask and a.cp > 1:
        raise ValueError("--cross-document-mask (and sft.py --pack) works on whole sequences: use --cp 1 (and --tp), or "
                         "leave it out")
    if a.out and a.out.is_file():
        raise ValueError(f"--out {a.out}: is a file; choose a directory")
    if a.dry_run not in DEVICES:
        check_device(a.device)


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


def stage1_datasets(a: argparse.Namespace, tokenizer: data.Tokenizer):
    """(training, validation) datasets of packed documents; validation is the first corpus's held-out split, or None."""
    sources = weighted_paths("--data", a.data)
    options = {"sequence_length": a.sequence_length, "seed": a.seed, "separator": a.separator, "tokenizer": tokenizer,
               "short": a.short_length, "long": a.long_length}
    parts = [data.PackedDataset(path, "train", short_weight=a.short_weight, long_weight=a.long_weight, **options)
             for path, _ in sources]
    training = data.Blend(parts, [weight for _, weight in sources], a.seed) if len(parts) > 1 else parts[0]
    validation = data.PackedDataset(sources[0][0], "valid", **options) if a.validation_sequences else None
    needed = a.validation_sequences * a.sequence_length + 1
    if validation and validation.lengths.sum() < needed:  # a document seen twice in one sequence would be copied
        raise ValueError(f"--validation-sequences {a.validation_sequences} need {needed} tokens, but {sources[0][0]} holds out "
                         f"{validation.lengths.sum()}; ask for fewer, or prepare it with a larger --holdout")
    return training, validation


# ----------------------------------------------------------------------------------------------- model and schedule


def best_seconds(function) -> float:
    """Seconds of a function that returns a tensor, the best of six: the first ones warm up."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        function().flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(device: str, dtype: torch.dtype, size: int = 512) -> float:
    """FLOP/s of a square matrix product here."""
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
        for part, key in NAMES.items():
            if part in name:
                return DEVICES[key].peak, f"the {DEVICES[key].peak / 1e12:.0f} TFLOP/s of {name}"
    rate = product_rate(device, dtype, 1024)
    return rate, f"{rate / 1e12:.3g} TFLOP/s, a measured matrix product"


def starting_config(a: argparse.Namespace) -> ModelConfig:
    """The configuration to train: the checkpoint's or the JSON's, with the rope scaling that was asked for."""
    scaling = scaling_from_arguments(a) if "rope_kind" in a else None  # stage 2 keeps the window
    config = rescale(read_config(a.model or a.config), scaling)
    if a.sequence_length > config.max_position_embeddings:
        needed = math.ceil(a.sequence_length / (config.rope_scaling.original_max_position or config.max_position_embeddings))
        raise ValueError(f"--sequence-length {a.sequence_length} is beyond the model's window of "
                         f"{config.max_position_embeddings}; extend it (train.py --rope-kind yarn --rope-factor {needed}) "
                         "or shorten the sequences")
    return config


def learning_rate(step: int, a: argparse.Namespace) -> float:
    """Linear warm-up to the peak, then a cosine to `final_learning_rate` of it; `step` counts from 1."""
    if step <= a.warmup_steps:
        return a.learning_rate * step / a.warmup_steps
    progress = (step - a.warmup_steps) / max(1, a.steps - a.warmup_steps)
    floor = a.final_learning_rate
    return a.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


# --------------------------------------------------------------------------------------------- the plan (--dry-run)


@dataclass(frozen=True)
class Device:
    """What a plan assumes of one GPU: bytes, FLOP/s and bytes/s.

    `memory`, `peak`, `bandwidth` are the data sheet's, memory less 3 GiB for CUDA, NCCL and fragmentation. The rates of matrix
    products, of the flash kernel and of the links are what well-tuned code is known to reach: assumptions, not measurements.
    """

    memory: float
    peak: float  # dense bfloat16: 100 % utilisation
    product: float
    attention: float  # forward, of causal FLOPs
    attention_backward: float
    bandwidth: float  # of its memory
    link: float  # to a GPU of the same node, one way
    network: float  # to one of another node
    host: float  # to pinned host memory
    host_memory: float  # a GPU's share of it


DEVICES = {
    "H100-80": Device(76 * 2**30, 989e12, 640e12, 380e12, 300e12, 3.35e12, 350e9, 40e9, 50e9, 240 * 2**30),
    "H200": Device(137 * 2**30, 989e12, 640e12, 380e12, 300e12, 4.8e12, 350e9, 40e9, 50e9, 240 * 2**30),
    "A100-80": Device(76 * 2**30, 312e12, 220e12, 185e12, 165e12, 2.0e12, 230e9, 20e9, 22e9, 120 * 2**30),
}
NODE = 8  # GPUs that share the fast link
PAGEABLE = 5  # how much slower copies from and to memory that is not pinned are
NAMES = {"H100 80GB HBM3": "H100-80", "NVIDIA H200": "H200", "A100-SXM4-80GB": "A100-80"}  # as CUDA calls them


def measured_device(a: argparse.Namespace, config: ModelConfig) -> Device:
    """This machine, for a plan: a matrix product, the attention kernel and a copy, timed in a few seconds."""
    dtype, cuda = planned_dtype(a), a.device.startswith("cuda")
    size, length, heads = (8192, 16384, 16) if cuda else (1024, 1024, 4)
    shape = (1, heads, length, config.head_dim)
    q, k, v, d_out = (torch.randn(shape, dtype=dtype, device=a.device) for _ in range(4))
    large = torch.empty(2**28 if cuda else 2**25, dtype=torch.uint8, device=a.device)
    out, lse = block_forward(q, k, v, True)
    forward = best_seconds(lambda: block_forward(q, k, v, True)[0])
    backward = best_seconds(lambda: block_backward(d_out, q, k, v, out, lse, True)[0])
    flops, copy = heads * 2 * length**2 * config.head_dim, 2 * large.nbytes / best_seconds(large.clone)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(0).total_memory - 3 * 2**30 if cuda else host
    rate = product_rate(a.device, dtype, size)
    return Device(total, rate, rate, flops / forward, 2.5 * flops / backward, copy, copy, copy, copy, host)


def planned_processes(a: argparse.Namespace) -> int:
    """How many processes a plan is for."""
    return a.processes or max(launched()[1], a.tp * a.cp)


def planned_dtype(a: argparse.Namespace) -> torch.dtype:
    """The compute type before anything is measured: auto may become bfloat16."""
    return torch.bfloat16 if a.dtype == "auto" else getattr(torch, a.dtype)


@dataclass
class Plan:
    """Memory (bytes) and time (seconds a step) of one rank, computed from shapes alone: nothing is allocated.

    Symbols as in model.py: n = S / cp positions inside attention, m = n / tp between blocks, times the rows of a micro-batch.
    """

    config: ModelConfig
    length: int
    batch: int  # sequences a step, over all processes
    micro_batch: int
    tp: int
    cp: int
    dp: int
    itemsize: int = 2
    recompute: str = "none"
    offload: bool = False
    offload_optimizer: bool = False
    tile_bytes: int = TILE_BYTES["cuda"]
    cuda: bool = True

    @classmethod
    def of(cls, config: ModelConfig, a: argparse.Namespace) -> Plan:
        """The plan of a command line that `check_arguments` has passed."""
        on_gpu, dp = a.dry_run in DEVICES or a.device.startswith("cuda"), planned_processes(a) // (a.tp * a.cp)
        tile = a.tile_mib * 2**20 or TILE_BYTES["cuda" if on_gpu else "cpu"]
        return cls(config, a.sequence_length, a.batch_size, a.micro_batch_size, a.tp, a.cp, dp, planned_dtype(a).itemsize,
                   a.recompute, a.offload, a.offload_optimizer, tile, on_gpu)

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def parameters(self) -> float:
        """Of one tp rank."""
        norms = (2 * self.config.num_hidden_layers + 1) * self.config.hidden_size
        return sum(self.config.matrices().values()) / self.tp + norms

    @property
    def shard(self) -> float:
        """Parameters that this rank's optimizer updates."""
        return self.parameters / (self.dp * self.cp)

    def sizes(self) -> dict[str, float]:
        """Bytes of the tensors that a rank's positions come in, by what one of them is."""
        c, n = self.config, self.micro_batch * self.length / self.cp
        head, gathered = n / self.tp * c.head_dim * self.itemsize, n * c.hidden_size * self.itemsize
        return {"x": gathered / self.tp, "gathered": gathered, "q": head * c.num_attention_heads,
                "kv": 2 * head * c.num_key_value_heads, "lse": n * c.num_attention_heads / self.tp * 4,
                "mlp": n * c.intermediate_size / self.tp * self.itemsize}

    def kept_by_block(self) -> float:
        """What one block leaves for backward."""
        s = self.sizes()
        inputs = 2 * s["gathered"]  # of the two column-parallel products
        norms = 0.0 if self.cuda else 14 / self.itemsize * s["x"]  # on a CPU RMSNorm keeps float32 intermediates
        return {"block": s["x"], "mlp": s["x"] + s["q"] + s["lse"],
                "none": 2 * s["x"] + inputs + norms + 2 * s["q"] + s["kv"] + s["lse"] + 4 * s["mlp"]}[self.recompute]

    def memory(self) -> dict[str, float]:
        """Bytes of a rank on its device at the worst moment of a step, by what they are."""
        c, s, layers = self.config, self.sizes(), self.config.num_hidden_layers
        positions, size = self.micro_batch * self.length / self.cp, self.itemsize
        state = (12 if size < 4 else 8) * self.shard  # float32 weights are their own master
        kept = (min(layers, 2) if self.offload else layers) * self.kept_by_block()  # offloaded: one at hand, one arriving
        tile = min(self.tile_bytes, block_tile_bytes(c, self.tp, size) * positions)
        logits = min(self.tile_bytes, logit_bytes(c, self.tp, size) * positions)
        logits = logits if size < 4 else logits / 2  # float32 logits need no second buffer
        rows = c.vocab_size / self.tp
        head = rows * c.hidden_size * 4
        ring = 4 / size * (s["q"] + s["kv"]) + 3 * s["kv"] if self.cp > 1 else 0.0  # float32 sums; K V, dK dV under way
        kernel = 2 * s["q"] + 4 / size * s["q"] if self.cuda else 0.0  # dK dV of every query head, dQ in float32
        again = s["q"] + s["lse"] if self.recompute == "block" else 0.0  # attention's result, computed once more
        qkv = 0.0 if self.recompute == "none" else s["q"] + s["kv"]
        tied = head if c.tie_word_embeddings else 0.0  # the head's gradient waits for the embedding's, and their sum is a third
        summed = 4 * self.shard if self.dp * self.cp > 1 else 0.0
        name = f"kept by {layers} blocks" + (", 2 on the device" if self.offload else "")
        within = {name: kept, "tied head: its gradient": tied}
        block = within | {"block: q k v, out": qkv + again, "block: gradients of x and out": 2 * s["x"] + s["q"]}
        moments = [
            {name: kept, "loss: x and its gradient": 2 * s["x"], "loss: tile": logits,
             "loss: gradient of the head": head + min(rows, VOCABULARY_TILE) * c.hidden_size * size},
            block | {"block: tile": tile},
            block | {"attention: dq dk dv": s["q"] + s["kv"], "attention: ring": ring, "attention: kernel": kernel},
            within | {"block: gradients of x": 3 * s["x"], "attention: dq dk dv": s["q"] + s["kv"], "block: tile": tile},
            {"embedding: gradients, tile": head + 2 * tied + s["x"] + tile}, {"update: summed gradients": summed}]
        worst = max(moments, key=lambda moment: sum(moment.values()))
        return {"weights": self.parameters * size, "gradients (float32)": 4 * self.parameters,
                "optimizer (float32)": 0.0 if self.offload_optimizer else state,
                "rotary tables": positions / self.micro_batch * c.head_dim * 4,
                "tokens": self.micro_batch * self.length * 40,  # and targets, documents, places: int64
                **{name: part for name, part in worst.items() if part}}

    def on_host(self) -> float:
        """Bytes of host memory for what is offloaded."""
        state = 16 * self.shard if self.offload_optimizer else 0.0  # master, moments and the gradient of an update
        return state + (self.config.num_hidden_layers * self.kept_by_block() if self.offload else 0.0)

    def traffic(self) -> dict[str, float]:
        """Bytes a rank sends in a step, by dimension."""
        c, s, rounds = self.config, self.sizes(), self.batch / self.dp / self.micro_batch
        # gathers and scatters of a block: 4 forward, 4 backward; recomputed: 1 for q k v, 1 + 3 in the tiles' forward
        per_block = (8 if self.recompute == "none" else 13) * s["gathered"] * (self.tp - 1) / self.tp
        hops = (self.cp - 1) * s["kv"] * (3 if self.recompute == "block" else 2) + s["kv"]
        hops += (self.cp - 1) * s["kv"] * 4 / self.itemsize  # dK dV: the first hop in the compute type, the others in float32
        others = (self.dp * self.cp - 1) / (self.dp * self.cp)
        kept = 2 * rounds * c.num_hidden_layers * self.kept_by_block() if self.offload else 0.0  # out and in
        return {"tp": rounds * c.num_hidden_layers * per_block,
                "cp": rounds * c.num_hidden_layers * hops if self.cp > 1 else 0.0,
                "dp": others * self.parameters * (4 + self.itemsize), "host": kept}

    def fits(self, device: Device) -> bool:
        return sum(self.memory().values()) <= device.memory and self.on_host() <= device.host_memory

    def times(self, device: Device) -> dict[str, float]:
        """Seconds of a step, by what they go to; the ring and the host's copies run beside the computation."""
        c, traffic, rows = self.config, self.traffic(), self.batch / self.dp
        share, size = self.tp * self.cp, self.config.matrices()
        products, attention = (rows * flops / share for flops in c.forward_flops(self.length))
        tokens = rows * self.length / share
        again = 0 if self.recompute == "none" else 2 * tokens * (2 * size["qkv"] + size["o"] + size["mlp"])
        pointwise = tokens * c.num_hidden_layers * (30 * c.hidden_size + 16 * c.intermediate_size) * self.itemsize
        near = {"tp": self.tp <= NODE, "cp": self.tp * self.cp <= NODE, "dp": self.processes <= NODE}
        link = {axis: traffic[axis] / (device.link if near[axis] else device.network) for axis in near}
        forwards = 2 if self.recompute == "block" else 1
        work = {"matrix products": (3 * products + again) / device.product,
                "attention": attention * (forwards / device.attention + 2.5 / device.attention_backward),
                "norms, rotations, activations": pointwise / device.bandwidth, "tp communication": link["tp"]}
        beside = {"ring, beyond attention": max(0.0, link["cp"] - work["attention"]),
                  "host copies, beyond the rest": max(0.0, traffic["host"] / device.host - sum(work.values()))}
        update = 28 * self.shard / (device.host if self.offload_optimizer else device.bandwidth)  # bytes AdamW reads and writes
        update += PAGEABLE * self.shard * (4 + self.itemsize) / device.host if self.offload_optimizer else 0.0
        return work | beside | {"dp communication": link["dp"], "update": update}


def fitting_plans(plan: Plan, processes: int, device: Device) -> list[Plan]:
    """Every grid of so many GPUs with every memory option that trains the same batch and fits, the fastest first."""
    found, shards = [], plan.config.shards().values()
    for tp in (n for n in range(1, min(NODE, processes) + 1) if not any(size % n for size in shards)):
        for cp in (n for n in range(1, processes // tp + 1) if processes % (n * tp) == 0
                   and plan.length % Grid(cp=n, tp=tp).sequence_multiple == 0):
            for recompute, offload, on_host in itertools.product(RECOMPUTE, (False, True), (False, True)):
                candidate = replace(plan, tp=tp, cp=cp, dp=processes // (tp * cp), micro_batch=1, recompute=recompute,
                                    offload=offload, offload_optimizer=on_host)
                possible = plan.batch % candidate.dp == 0 and not (offload and recompute == "none")
                if possible and candidate.fits(device):
                    found.append(candidate)
    return sorted(found, key=lambda candidate: sum(candidate.times(device).values()))


def cheapest(plan: Plan, device: Device) -> Plan | None:
    """What fits on the least GPUs, at least as many as now: this grid with other options, else the fastest grid."""
    for processes in [plan.processes, *(2**i for i in range(13) if 2**i > plan.processes)]:
        found = fitting_plans(plan, processes, device)
        same = [candidate for candidate in found if (candidate.tp, candidate.cp) == (plan.tp, plan.cp)]
        if found:
            return (same or found)[0]
    return None


def rank_shapes(config: ModelConfig, rows: int, length: int, tp: int, cp: int) -> str:
    """What a rank's tensors look like: a line for people."""
    heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
    return (f"x ({rows}, {length // (cp * tp)}, {config.hidden_size}) between blocks, q ({rows}, {heads}, {length // cp}, "
            f"{config.head_dim}), k and v with {kv_heads} heads")


def options_of(plan: Plan) -> str:
    """A plan as the options of a command."""
    return (f"--processes {plan.processes} --tp {plan.tp} --cp {plan.cp} --micro-batch-size {plan.micro_batch} "
            f"--recompute {plan.recompute}" + " --offload" * plan.offload + " --offload-optimizer" * plan.offload_optimizer)


def print_memory(plan: Plan, device: Device) -> None:
    """The first table of a plan: where a rank's memory goes."""
    memory = plan.memory()
    print("\nmemory of a rank at its worst moment, GiB")
    for name, size in memory.items():
        print(f"  {name:34}{size / 2**30:9.2f}")
    verdict = "fits" if plan.fits(device) else "DOES NOT FIT"
    print(f"  {'total':34}{sum(memory.values()) / 2**30:9.2f} of {device.memory / 2**30:.1f}: {verdict}")
    if plan.on_host():
        print(f"  {'in host memory':34}{plan.on_host() / 2**30:9.2f} of {device.host_memory / 2**30:.1f}")


def print_times(plan: Plan, device: Device) -> None:
    """The second: what is computed and sent, and how long a step takes under which assumptions."""
    traffic, times, (products, attention) = plan.traffic(), plan.times(device), plan.config.forward_flops(plan.length)
    step, flops = sum(times.values()), 3 * plan.batch * (products + attention)
    print("\nsent by a rank a step, GiB: " + ", ".join(f"{axis} {size / 2**30:.2f}" for axis, size in traffic.items()))
    print(f"FLOPs a step (causal, nothing counted twice): {flops:.4g}, {attention / (products + attention):.0%} in attention")
    print("\nseconds of a step")
    for name, seconds in times.items():
        print(f"  {name:34}{seconds:9.2f}")
    rate, used = plan.batch * plan.length / step / plan.processes, flops / plan.processes / step / device.peak
    print(f"  {'total':34}{step:9.2f}: {rate:,.0f} tokens/s a GPU, causal MFU {used:.1%}, "
          f"{1e9 / rate / 3600:,.0f} GPU-hours for 1B tokens")
    print(f"assumed: products at {device.product / 1e12:.3g} TFLOP/s, attention {device.attention / 1e12:.3g} forward and "
          f"{device.attention_backward / 1e12:.3g} backward, memory {device.bandwidth / 1e12:.3g} TB/s, links "
          f"{device.link / 1e9:.0f} GB/s in a node of {NODE}, {device.network / 1e9:.0f} between nodes, host "
          f"{device.host / 1e9:.0f}; tp communication is not hidden, the ring and the host's copies are")


def print_plan(a: argparse.Namespace) -> None:
    """What `--dry-run` says. Raises ValueError if a rank's memory does not suffice, naming what would."""
    config = read_config(a.model or a.config)
    check_grid(a.tp, a.cp, planned_processes(a), config.shards())
    attention_kernel("cuda" if a.dry_run in DEVICES else a.device, planned_dtype(a), config.head_dim)
    plan, device = Plan.of(config, a), measured_device(a, config) if a.dry_run == "measured" else DEVICES[a.dry_run]
    print(f"{sum(config.matrices().values()) / 1e9:.2f}B parameters, {plan.batch} x {plan.length:,} tokens a step; "
          f"dp {plan.dp} x cp {plan.cp} x tp {plan.tp} = {plan.processes} x {a.dry_run}; --recompute {plan.recompute}"
          + ", --offload" * plan.offload + ", --offload-optimizer" * plan.offload_optimizer)
    print("a rank: " + rank_shapes(config, plan.micro_batch, plan.length, plan.tp, plan.cp))
    if plan.length > config.max_position_embeddings and not getattr(a, "rope_kind", None):
        print(f"the model's window is {config.max_position_embeddings}: training needs --rope-kind and --rope-factor")
    print_memory(plan, device)
    print_times(plan, device)
    if not plan.fits(device):
        better, gib, needed = cheapest(plan, device), 2**30, sum(plan.memory().values())
        hint = f"the smallest that does: {options_of(better)}" if better else "nothing up to 4,096 such GPUs does"
        raise ValueError(f"--dry-run {a.dry_run}: {needed / gib:.1f} GiB and {plan.on_host() / gib:.1f} on the host do not fit "
                         f"in {device.memory / gib:.1f} and {device.host_memory / gib:.1f}; {hint}")


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


def save_checkpoint(run: Path, step: int, model: Llama, optimizer: ShardedAdamW, a: argparse.Namespace) -> Path:
    """Write `run/checkpoint-STEP`, complete or absent, then drop all but the newest `keep_checkpoints`.

    Every rank calls this; the first writes what one process would write, so any grid can continue from it.
    """
    path, grid = run / f"checkpoint-{step:08d}", model.grid
    with data.complete_or_absent(path) if grid.is_first else nullcontext(path) as aside:
        model.save_pretrained(aside)
        if grid.is_first:
            copy_tokenizer(a.tokenizer, aside, model.config)
            (aside / "optimizer").mkdir()
        for kind in optimizer.KINDS:
            write_weights(aside / "optimizer", kind, optimizer.shapes(), optimizer.state(kind), OPTIMIZER_SHARD_BYTES, grid)
        if grid.is_first:
            progress = {"step": step, "updates": optimizer.steps, "settings": settings(a)}
            (aside / "training.json").write_text(json.dumps(progress, indent=2) + "\n")
    if grid.is_first:
        for old in checkpoints(run)[:-a.keep_checkpoints]:
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


def settings(a: argparse.Namespace) -> dict:
    """What a resumed run must share with the run it continues, as JSON."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in sorted(vars(a).items())
            if name not in FREE_TO_CHANGE}


def load_progress(a: argparse.Namespace) -> tuple[Path | None, int, int]:
    """Newest checkpoint of `--out`, its step and updates, or (None, 0, 0). ValueError if it belongs to another run."""
    found = checkpoints(a.out)
    if not a.resume:
        if a.out.exists() and any(a.out.iterdir()):
            raise ValueError(f"--out {a.out}: holds an earlier run; add --resume to continue it, or choose another directory")
        return None, 0, 0
    if not found:
        print_once(f"{a.out} holds no checkpoint to resume from: starting at the first step")
        return None, 0, 0
    try:
        saved = json.loads((found[-1] / "training.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{found[-1]}/training.json: not valid JSON ({error})") from None
    a.dtype = saved["settings"]["dtype"] if a.dtype == "auto" else a.dtype
    for name, value in settings(a).items():
        if saved["settings"].get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, but the run in {a.out} has "
                             f"{saved['settings'].get(name)!r}; resume with the same settings or choose another --out")
    return found[-1], saved["step"], saved["updates"]


def job_name() -> str:
    """What torchrun calls this job, the same after a restart; empty if it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def restarted(run: Path) -> bool:
    """Whether torchrun --max-restarts started this job anew after it had begun `run`: then it resumes without being told."""
    return restarts() > 0 and job_name() != "" and (run / "job").is_file() and (run / "job").read_text() == job_name()


def check_agreement(grid: Grid, a: argparse.Namespace, step: int) -> None:
    """Raise ValueError unless every rank has found the same checkpoint, options and data: files may differ by machine."""
    mine = torch.tensor([step, zlib.crc32(json.dumps(settings(a)).encode())], device=a.device)
    low, high = (grid.to_host(grid.all_reduce(mine.clone(), "all", o)) for o in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if low != high:
        what = f"checkpoints in {a.out}, of steps {low[0]} to {high[0]}" if low[0] != high[0] else "options or data"
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


def validate(model: Llama, dataset, sequences: int, buckets: int, masked: bool, device: str) -> tuple[float, list[float]]:
    """Mean held-out loss, and by equal ranges of positions: where a window ends, the curve jumps."""
    grid, sums = model.grid, torch.zeros(2, dataset.sequence_length, dtype=torch.float64, device=device)
    for index in range(grid.dp_rank, sequences, grid.dp):
        batch = data.batch(dataset, index, 1)
        ids = batch.document_ids.to(device) if masked else None
        targets = batch.targets.to(device)
        sums[0] += model.token_losses(batch.tokens.to(device), targets, ids)[0]  # (S,)
        sums[1] += targets[0] != -100
        grid.progress()
    total, count = grid.all_reduce(sums, "dp").cpu()
    parts = list(zip(total.tensor_split(buckets), count.tensor_split(buckets)))
    by_bucket = [(t.sum() / n.sum()).item() if n.sum() else None for t, n in parts]
    return (total.sum() / count.sum().clamp(min=1)).item(), by_bucket


def training_step(model: Llama, optimizer: ShardedAdamW, batch: data.Batch, a: argparse.Namespace) -> tuple[float, int]:
    """Accumulate one global batch's gradients in the optimizer, from this replica's rows of it.

    Returns the mean loss over the whole batch's targets and the positions computed, the same on every rank.
    """
    optimizer.zero_gradients()
    valid = torch.tensor(int((batch.targets != -100).sum()), device=a.device)
    valid = max(1, model.grid.to_host(model.grid.all_reduce(valid, "dp")))  # over the whole batch, before any backward
    total = torch.zeros(2, dtype=torch.float64, device=a.device)  # summed loss, positions
    for rows in torch.arange(len(batch.tokens)).split(a.micro_batch_size):
        last = (batch.targets[rows] != -100).any(0).nonzero()[-1:]  # what follows the last target, padding say, changes nothing
        used = int(last.sum()) + 1
        part = [x[rows, :used].to(a.device) for x in (batch.tokens, batch.targets, batch.document_ids)]
        loss, _ = model.loss(*part[:2], part[2] if a.cross_document_mask else None)
        (loss / valid).backward()
        total += torch.stack((loss.detach().double(), total.new_tensor(part[0].numel())))
        model.grid.progress()
    loss, positions = model.grid.to_host(model.grid.all_reduce(total, "dp"))
    return loss / valid, int(positions)


def stop_requested(stop: list[int], grid: Grid, device: str) -> bool:
    """Whether any rank has received a signal: all agree, so all stop after the same step."""
    return bool(grid.to_host(grid.all_reduce(torch.tensor(len(stop), device=device), "all")))


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


def train(model: Llama, optimizer: ShardedAdamW, training, validation, a: argparse.Namespace, first_step: int,
          stop: list[int]) -> int:
    """Steps first_step + 1 ... a.steps, then a checkpoint; returns the last step made: a signal in `stop` ends it early."""
    grid = model.grid
    metrics = Metrics(a.out / "metrics.jsonl", first_step, grid.is_first)
    bar = tqdm(range(first_step + 1, a.steps + 1), initial=first_step, total=a.steps, desc=a.out.name, mininterval=1.0,
               disable=not grid.is_first)
    step, share = first_step, a.batch_size // grid.dp
    products, attention = model.config.forward_flops(a.sequence_length)  # of a whole sequence; shorter ones take a little less
    flops = 3 * (products + (0 if a.cross_document_mask else attention))  # masked documents: their products alone
    peak, what = peak_rate(a.device, model.head_weight.dtype)
    print_line(bar, f"MFU counts causal attention and no recomputation, against {what}")
    for step in bar:
        start = time.perf_counter()
        batch = data.batch(training, (step - 1) * a.batch_size + grid.dp_rank * share, share)
        waited = time.perf_counter() - start
        loss, positions = training_step(model, optimizer, batch, a)
        rate = learning_rate(step, a)
        try:
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss}")
            norm = optimizer.step(rate, a.clip)
        except ArithmeticError as error:
            good = checkpoints(a.out)
            raise ArithmeticError(f"step {step}: {error}; nothing was updated. The last good checkpoint is "
                                  f"{good[-1] if good else 'none'}; try a lower --learning-rate") from None
        seconds, world = time.perf_counter() - start, grid.size("all")
        speed, used = positions / seconds / world, flops * positions / a.sequence_length / seconds / world / peak
        metrics.write(step=step, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=positions,
                      tokens_per_second=round(speed * world), tokens_per_second_per_gpu=round(speed), mfu=round(used, 4),
                      data_wait=round(waited / seconds, 4), peak_memory_gib=round(peak_memory_gib(a.device), 3))
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s/GPU, MFU {used:.0%}, {peak_memory_gib(a.device):.1f} GiB, "
                            f"data {waited / seconds:.0%}", refresh=False)
        if validation and (step == a.steps or a.validate_every and step % a.validate_every == 0):
            mean, by_position = validate(model, validation, a.validation_sequences, a.validation_buckets,
                                         a.cross_document_mask, a.device)
            metrics.write(step=step, validation_loss=mean, validation_loss_by_position=by_position)
            shown = " ".join("-" if value is None else f"{value:.2f}" for value in by_position)
            print_line(bar, f"step {step}: held-out loss {mean:.3f}; by position {shown}")
        stopping = stop_requested(stop, grid, a.device)
        if stopping or step == a.steps or a.checkpoint_every and step % a.checkpoint_every == 0:
            path = save_checkpoint(a.out, step, model, optimizer, a)
        if stopping:
            print_line(bar, f"stopped by a signal after step {step}; continue with --resume from {path}")
            break
    return step


def build_model(config: ModelConfig, tokenizer: data.Tokenizer, grid: Grid, checkpoint: Path | None, updates: int,
                a: argparse.Namespace) -> tuple[Llama, ShardedAdamW]:
    """Model and optimizer from the checkpoint to resume, else from --model or random weights."""
    dtype = getattr(torch, a.dtype)
    if checkpoint or a.model:
        model = Llama.from_pretrained(checkpoint or a.model, grid, dtype, a.device, None if checkpoint else config.rope_scaling)
    else:
        model = Llama(config, grid).initialise(a.seed).to(a.device, dtype)
    stops = data.stop_tokens(tokenizer, model.config.hf.get("eos_token_id"))
    model.config, model.recompute = replace(model.config, hf=model.config.hf | {"eos_token_id": stops}), a.recompute
    model.host, model.tile_bytes = HostMemory() if a.offload else None, a.tile_mib * 2**20
    optimizer = ShardedAdamW(model, grid, tuple(a.betas), weight_decay=a.weight_decay, on_host=a.offload_optimizer)
    if checkpoint:
        load_optimizer(checkpoint, optimizer, updates)
    return model, optimizer


def run(a: argparse.Namespace, build_datasets) -> None:
    """Check everything, build everything, train, and leave `final`: the whole of a stage.

    Up to `Grid.create` nothing is written, and every rank finds the same; from there on they go in step.
    """
    check_arguments(a)
    if a.dry_run:
        return print_plan(a) if launched()[0] == 0 else None
    a.resume = a.resume or restarted(a.out)
    a.tokenizer = a.tokenizer or a.model
    if a.tokenizer is None:
        raise ValueError("--tokenizer is needed with --config: the directory of the tokenizer the corpus was prepared with")
    config, tokenizer = starting_config(a), data.load_tokenizer(a.tokenizer)
    check_grid(a.tp, a.cp, launched()[1], config.shards())
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"--tokenizer {a.tokenizer} has {tokenizer.n_vocab} tokens, but the model's vocab_size is "
                         f"{config.vocab_size}; use the model's own tokenizer")
    training, validation = build_datasets(a, tokenizer)
    if validation and a.validation_buckets > a.sequence_length:
        raise ValueError(f"--validation-buckets {a.validation_buckets} is more than --sequence-length {a.sequence_length}")
    paths = [path for path, _ in weighted_paths("--data", a.data)]
    a.data = [[text, data.digest(path)] for text, path in zip(a.data, paths)]  # what a resumed run must find again
    checkpoint, step, updates = load_progress(a)
    if (a.out / "final" / "config.json").exists():
        print_once(f"{a.out}/final is already there; nothing to do")
        return
    kernel = attention_kernel(a.device, planned_dtype(a), config.head_dim)
    grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
    check_agreement(grid, a, step)
    if a.dtype == "auto":  # the first rank's finding holds for all
        is_fast = torch.tensor(int(faster_dtype(a.device) == torch.bfloat16), device=a.device)
        a.dtype = "bfloat16" if grid.broadcast(is_fast) else "float32"
    model, optimizer = build_model(config, tokenizer, grid, checkpoint, updates, a)
    if grid.is_first:
        a.out.mkdir(parents=True, exist_ok=True)
        if job_name():
            (a.out / "job").write_text(job_name())
    parameters = sum(math.prod(shape) for shape, _ in optimizer.shapes().values())
    print_once(f"{parameters / 1e6:.2f}M parameters, {a.dtype} on {a.device}, window {config.max_position_embeddings}, "
               f"rope {config.rope_scaling.kind}, {a.batch_size} x {a.sequence_length} tokens a step"
               + (f", resumed after step {step}" if checkpoint else ""))
    print_once(f"grid dp {grid.dp} x cp {grid.cp} x tp {grid.tp}; attention by {kernel}; a rank: "
               + rank_shapes(config, a.micro_batch_size, a.sequence_length, a.tp, a.cp))
    with signals_received() as stop:
        step = train(model, optimizer, training, validation, a, step, stop)
    if step == a.steps:
        with data.complete_or_absent(a.out / "final") if grid.is_first else nullcontext(a.out / "final") as aside:
            model.save_pretrained(aside)
            if grid.is_first:
                copy_tokenizer(a.tokenizer, aside, model.config)
        print_once(f"wrote {a.out}/final")
    grid.close()


def main(parser: argparse.ArgumentParser, build_datasets, argv: list[str] | None = None) -> None:
    """Command line of a stage: one line and exit code 1 for a user's mistake."""
    try:
        run(parse_once(parser, argv), build_datasets)
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main(stage1_parser(), stage1_datasets)
