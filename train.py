"""Stage 1: continued pretraining at the target length, and the training loop both stages share.

    python train.py --config config.json --tokenizer DIR --data CORPUS --sequence-length 128 \
                    --steps 500 --out out/base
    python train.py --model out/base/final --rope-kind yarn --rope-factor 16 --data CORPUS \
                    --sequence-length 2048 --steps 300 --learning-rate 3e-5 --out out/stage1
    torchrun --standalone --nproc-per-node 8 train.py --tp 2 --cp 4 ...     # on eight processes

A run directory holds `metrics.jsonl`, the newest `checkpoint-STEP` directories (model, optimizer,
data position: each is complete or absent) and, at the end, `final`, a Hugging Face model directory.
`--resume` continues from the newest checkpoint, and starts where there is none: with torchrun
--max-restarts a failed job goes on by itself. On CPUs, with the same grid and threads, the losses
are the uninterrupted run's to the last bit; on GPUs or another grid they are to rounding. SIGTERM
or Ctrl-C writes a checkpoint and stops (under torchrun, if step and checkpoint fit into its
--shutdown-timeout, 30 s by default). `python -m tools.plan H100-80` says what a run takes.
"""
from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from model import RECOMPUTE, Llama, ModelConfig, read_config, rescale
from parallel import (
    CUDNN_MULTIPLE,
    Grid,
    ShardedAdamW,
    block_backward,
    block_forward,
    launched,
    one_line_errors,
    print_once,
)
from rope_yarn import RopeScaling, add_scaling_arguments, scaling_from_options

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja")
STALE = ("max_length", "max_len", "auto_map")  # keys in files: an old window, code left behind
FREE_TO_CHANGE = (  # at a resume; --config too, since a resumed run's model is its checkpoint's
    "out", "resume", "checkpoint_every", "keep_checkpoints", "validate_every",
    "validation_sequences", "validation_data", "device", "timeout", "tp", "cp", "micro_batch_size",
    "recompute", "offload", "offload_optimizer", "tile", "attention", "config")
SPELLED = {  # options that are not called what they set
    "document_mask": "--cross-document-mask (sft.py: --pack)",
    "attention_temperature": "attention temperature (--no-attention-temperature)"}
PEAKS = {  # dense bfloat16 FLOP/s
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
CHECKPOINT_FORMAT = 2
LOCK = ".ultralong.lock"  # a file in --out, there while a run is
ATTENTION = ("auto", "flash", "cudnn", "fa3")  # see `attention_kernel`


# ------------------------------------------------------------------------------------------ options


class Parser(ArgumentParser):
    """argparse that shows defaults, and whose usage errors are one line, as other mistakes are."""

    def __init__(self, description: str, **more) -> None:
        super().__init__(description=description, **more,
                         formatter_class=ArgumentDefaultsHelpFormatter)

    def print_help(self, file=None) -> None:
        if launched()[0] == 0:
            super().print_help(file)

    def error(self, message: str) -> None:
        # "argument --steps: 0 must be ..." -> "--steps 0 must be ..."
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise ValueError(message)


def option(kind: Callable, fits: Callable, right: str) -> Callable[[str], object]:
    """An option's type: its text as a `kind` that `fits`; else the error says what is `right`.
    `positive` below makes 3 of "3"; of "0" it says "0 must be a whole number, 1 or more"."""
    def check(text: str):
        with suppress(ValueError):  # "ten" is no int
            value = kind(text)
            if fits(value):
                return value
        raise ArgumentTypeError(f"{text} must be {right}")
    return check


def multiple_near(number: int, of: int) -> int:
    """The largest multiple up to a number, for an error's hint: of 4 near 11 it is 8, near 3 it is
    4."""
    return number // of * of or of


def can_be_written(path: Path) -> bool:
    """Whether a file can be made there."""
    return path.parent.is_dir() and not path.is_dir() and os.access(path.parent, os.W_OK)


def is_here(device: str) -> bool:
    """Whether this machine has the device."""
    if not torch.cuda.is_available():
        return device == "cpu"
    # of several processes each takes a GPU of its own, so none names one
    named = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if launched()[1] == 1 else []
    return device in ("cpu", "cuda", *named)


positive = option(int, lambda n: n >= 1, "a whole number, 1 or more")
nonnegative = option(int, lambda n: n >= 0, "a whole number, 0 or more")
nonnegative_number = option(float, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
fraction = option(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
above_0 = option(float, lambda x: 0 < x < math.inf, "a finite number above 0")
above_1 = option(float, lambda x: 1 < x < math.inf, "a finite number above 1")
below_one = option(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
seconds = option(float, lambda x: 0 < x < 1e7, "a number of seconds above 0 and below 1e7")
existing = option(Path, Path.exists, "a file or directory that exists")
directory = option(Path, lambda path: not path.is_file(), "a directory, not a file")
writable = option(Path, can_be_written, "a file in a directory that exists and can be written")
device_here = option(str, is_here, "cpu, or cuda where there is a GPU (one process: also cuda:1)")


def weighted_path(text: str) -> tuple[Path, float]:
    """An option's PATH or PATH=WEIGHT: "books=3" -> (books, 3.0), "books" -> (books, 1.0)."""
    path, _, weight = text.rpartition("=")
    if not path or "/" in weight:  # this '=' belongs to the path
        path, weight = text, "1"
    return existing(path), above_0(weight)


def add_compute_arguments(parser: ArgumentParser, device: Callable = device_here) -> None:
    """How a model is computed. Of 16 processes, --tp 2 --cp 4 makes two replicas of 8."""
    title = "compute; parallel under torchrun --standalone --nproc-per-node N (data: N / tp / cp)"
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument_group(title).add_argument
    add("--dtype", choices=("float32", "bfloat16"),
        help="if not given: bfloat16 on a GPU, float32 on a CPU")
    add("--device", type=device, default=here, help="cpu or cuda")
    add("--attention", choices=ATTENTION, default="auto",
        help="on a GPU; auto: cuDNN on a Hopper or Blackwell in stage 1 without a mask, else flash "
        "(FlashAttention-2)")
    add("--tp", type=positive, default=1, help="tensor parallel: ranks that share every matrix")
    add("--cp", type=positive, default=1, help="context parallel: ranks that share every sequence")
    add("--timeout", type=seconds, default=600.0,
        help="seconds for a micro-batch, a validation sequence, a prompt or a file: a rank that "
        "takes longer prints where it stands and ends the job")


def add_extension_arguments(parser: ArgumentParser, title: str) -> None:
    """A rule that stretches RoPE, and its base; `extension` reads them."""
    add = add_scaling_arguments(parser, title)
    add("--rope-theta", type=above_1, help="RoPE's base (if not given: the model's)")


def extension(options: Namespace) -> dict:
    """The RoPE that options of `add_extension_arguments` ask for, as `model.rescale` takes it."""
    return {"scaling": scaling_from_options(vars(options)), "theta": options.rope_theta}


def compute_type(dtype: str | None, device: str) -> str:
    """The --dtype that was asked for; else bfloat16 on a GPU, and float32 on a CPU."""
    return dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def argument_parser(description: str, planned: bool = False) -> Parser:
    """The options of both stages; a stage adds its data group. For tools.plan, where a run is only
    `planned`, the GPU need not be there, nor --steps, --data and --out be given."""
    parser = Parser(description)
    group = parser.add_argument_group("model")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    # paths that a resumed run needs no more
    add("--model", type=directory, help="start from this Hugging Face model directory")
    add("--config", type=Path, help="start from random weights of this config.json")
    group.add_argument("--tokenizer", type=Path,
                       help="directory or file (if not given: the model's own)")
    add = parser.add_argument_group("memory").add_argument
    add("--recompute", choices=RECOMPUTE, default="none",
        help="what backward computes again: nothing, all but attention, blocks")
    add("--offload", action="store_true", help="keep what recomputed blocks keep in host memory")
    add("--offload-optimizer", action="store_true", help="keep the optimizer in host memory")
    add("--tile", type=positive, help="positions a tile of block or loss (if not given: as fit)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive, required=not planned, help="optimizer steps in all")
    add("--batch-size", type=positive, default=1, help="sequences a step, over all processes")
    add("--micro-batch-size", type=positive, help="sequences a forward (not given: train.py all)")
    add("--learning-rate", type=nonnegative_number, default=3e-5, help="the peak")
    add("--warmup-steps", type=nonnegative, default=10, help="linear warm-up")
    add("--final-learning-rate", type=fraction, default=0.1, help="a share of the peak")
    add("--weight-decay", type=nonnegative_number, default=0.1, help="of matrices, not vectors")
    add("--betas", type=below_one, nargs=2, default=(0.9, 0.95), help="of AdamW")
    add("--clip", type=nonnegative_number, default=1.0, help="limit of the gradient norm; 0: none")
    add("--seed", type=nonnegative, default=0, help="weights (with --config) and data order")
    add_compute_arguments(parser, str if planned else device_here)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=directory, required=not planned, help="run directory")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--checkpoint-every", type=nonnegative, default=0, help="steps; 0: at the end or a signal")
    add("--keep-checkpoints", type=positive, default=2, help="how many of the newest to keep")
    add("--validate-every", type=nonnegative, default=0, help="steps; 0: only at the end")
    add("--validation-sequences", type=nonnegative, default=8, help="held-out; 0: no validation")
    return parser


def stage1_parser(planned: bool = False) -> Parser:
    """Stage 1's options: packed documents, length up-sampling, rope scaling."""
    parser = argument_parser("Continued pretraining, or training from scratch (stage 1).", planned)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", action="extend", type=str if planned else weighted_path,
        required=not planned, metavar="DIR[=WEIGHT]",
        help="corpora that `python -m tools.prepare` wrote; a sequence comes from one, by weight")
    add("--sequence-length", type=positive, required=not planned, help="tokens")
    add("--separator", choices=("<s>", "none", "bos_eos"), default="<s>", help="between documents")
    add("--short-length", type=nonnegative, default=4096, help="documents below are short")
    add("--long-length", type=nonnegative, default=8192, help="documents above are long")
    add("--short-weight", type=nonnegative_number, default=1.0, help="how often short ones occur")
    add("--long-weight", type=nonnegative_number, default=1.0, help="how often long ones occur")
    add("--cross-document-mask", dest="document_mask", action="store_true",
        help="ablation: documents do not see each other")
    add("--stored-order", action="store_true",
        help="ablation: training documents as they stand in a corpus, not shuffled")
    add("--new-window", type=positive, help="ablation: tokens that the model is said to take (if "
        "not given: old window x factor, which is what other programs expect)")
    add_extension_arguments(parser, "context extension (a rule replaces the checkpoint's own)")
    return parser


def check_run(options: Namespace, grid: Grid, config: ModelConfig) -> None:
    """Raise ValueError for options that this grid cannot train."""
    config.check_tp(grid.tp)
    length = options.sequence_length
    multiple = grid.sequence_multiple
    if length % multiple:
        good = grid.cudnn_multiple if length > grid.cudnn_multiple else multiple
        raise ValueError(f"--sequence-length {length} is not a multiple of {multiple} "
                         f"(2 x cp x tp); {multiple_near(length, good)} is")
    if options.batch_size % grid.dp:
        near = multiple_near(options.batch_size, grid.dp)
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of the {grid.dp} "
                         f"data-parallel replicas; {near} is (a larger --tp or --cp makes fewer)")
    share = options.batch_size // grid.dp
    if options.micro_batch_size and share % options.micro_batch_size:
        raise ValueError(f"--micro-batch-size {options.micro_batch_size} does not divide a "
                         f"replica's share of --batch-size, {share}")
    if options.offload and options.recompute == "none":
        raise ValueError("--offload moves what recomputed blocks keep: add --recompute block or "
                         "--recompute mlp")


def stage1_datasets(options: Namespace, tokenizer: data.Tokenizer):
    """(training, validation): the corpora of --data, blended by weight; what the first holds out,
    its documents as they come, or None with --validation-sequences 0."""
    def documents(path: Path, split: str, short_weight: float = 1.0, long_weight: float = 1.0):
        return data.PackedDataset(
            path, split, options.sequence_length, options.seed, options.separator,
            options.short_length, options.long_length, short_weight, long_weight,
            tokenizer, options.document_mask, options.stored_order and split == "train")

    paths, weights = zip(*options.data, strict=True)
    drawn = (options.short_weight, options.long_weight)
    corpora = [documents(path, "train", *drawn) for path in paths]
    training = data.Blend(corpora, weights, options.seed)
    count = options.validation_sequences
    if not count:
        return training, None
    validation = documents(paths[0], "valid")
    needed = count * options.sequence_length + 1
    held_out = validation.lengths.sum()
    # else a document may come twice: the model would copy it, and the loss would look too good
    if held_out < needed:
        raise ValueError(f"--validation-sequences {count} need {needed} tokens, but {paths[0]} "
                         f"holds out {held_out}; ask for fewer, or prepare with a larger --holdout")
    return training, validation


# -------------------------------------------------------------------------- the kernel of attention


def capability_of(device: str) -> tuple[int, int] | None:
    """The compute capability of a GPU, (9, 0) of an H100; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else None


def attention_kernel(asked: str, capability: tuple[int, int] | None, dtype: torch.dtype,
                     head_dim: int, chunk: int | None) -> tuple[str, str]:
    """(kernel, why): what computes a run's blocks, see `parallel.block_forward`.

    `asked` is one of ATTENTION; auto is cudnn where it can be, else flash. `capability` is the
    GPU's (major, minor), None of a CPU; `chunk` the length of a zigzag chunk, None if lengths vary.
    Raises ValueError for what cannot be.
    """
    if capability is None:
        if asked in ("cudnn", "fa3"):
            raise ValueError(f"--attention {asked} needs a GPU; a CPU takes auto or flash")
        return "flash", "the kernel for CPUs"
    if capability < (8, 0):
        raise ValueError("--device cuda: this GPU's compute capability is {}.{}, attention needs "
                         "8.0 (A100) or newer; use --device cpu".format(*capability))
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"--dtype {name} cannot be used on cuda, whose flash attention takes "
                         "bfloat16; use --dtype bfloat16")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"config.json: head_dim {head_dim} cannot be used on cuda; its flash "
                         "attention takes 8, 16, ... 256")
    kernel = "cudnn" if asked == "auto" else asked
    major = capability[0]
    obstacle = None  # what it does not take
    if kernel == "fa3" and major != 9:
        obstacle = f"the GPU's compute capability, {major}.x, is not 9.0"
    elif kernel == "cudnn" and major not in (9, 10):
        obstacle = f"the GPU's compute capability, {major}.x, is neither 9 nor 10"
    elif kernel == "cudnn" and head_dim > 128:
        obstacle = f"head_dim {head_dim} is above 128"
    elif kernel == "cudnn" and chunk is None:
        obstacle = "samples, prompts, documents have any length"
    elif kernel == "cudnn" and chunk % CUDNN_MULTIPLE:
        obstacle = (f"a chunk of the sequence, {chunk:,} positions, is no multiple of "
                    f"{CUDNN_MULTIPLE}; {multiple_near(chunk, CUDNN_MULTIPLE):,} is")
    if not obstacle:
        return kernel, "the faster one here" if asked == "auto" else "as asked"
    if asked == "auto":
        return "flash", f"not cudnn: {obstacle}"
    raise ValueError(f"--attention {asked} cannot be used: {obstacle}; use --attention auto")


def activate(kernel: str) -> None:
    """In this process FlashAttention-3 takes the place of torch's own flash operators, if asked."""
    if kernel == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")


def try_kernel(kernel: str, device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Make a kernel ready and compute a block with it: what this machine's torch or its packages
    lack is met here, not in the first step. Raises ValueError."""
    remedy = {
        "fa3": "install FlashAttention-3 (hopper/ of github.com/Dao-AILab/flash-attention) or use "
               "--attention auto",
        "cudnn": "use --attention flash",
        "flash": "use --device cpu",
    }
    try:
        activate(kernel)
        if device.startswith("cuda"):
            q = torch.zeros(1, 1, CUDNN_MULTIPLE, head_dim, dtype=dtype, device=device)
            out, lse = block_forward(q, q, q, True, kernel)
            block_backward(q, q, q, q, out, lse, True, kernel)
    except torch.OutOfMemoryError:
        raise ValueError(f"--device {device}: its memory is full before anything is loaded; end "
                         "what else runs there") from None
    except (ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"attention by {kernel} does not run here: {reason}; "
                         f"{remedy[kernel]}") from None


def kernel_here(asked: str, device: str, dtype: torch.dtype, head_dim: int,
                chunk: int | None) -> tuple[str, str]:
    """`attention_kernel` of this machine's device, ready in this process: see `try_kernel`. Raises
    ValueError for what cannot be, or does not run."""
    kernel, why = attention_kernel(asked, capability_of(device), dtype, head_dim, chunk)
    try_kernel(kernel, device, dtype, head_dim)
    return kernel, why


def choose_attention(options: Namespace, grid: Grid, config: ModelConfig,
                     chunk: int | None) -> None:
    """Set `grid.kernel` for this run, and say which it is and why: see `attention_kernel`."""
    dtype = getattr(torch, compute_type(options.dtype, options.device))
    grid.kernel, why = kernel_here(
        options.attention, options.device, dtype, config.head_dim, chunk)
    print_once(f"attention by {grid.kernel} ({why})")


def chunk_length(options: Namespace, grid: Grid) -> int | None:
    """Positions in a zigzag chunk of stage 1; None with a mask: documents have any length."""
    return None if options.document_mask else grid.chunk(options.sequence_length)


# ------------------------------------------------------------------------------- model and schedule


def extension_hint(config: ModelConfig, length: int) -> str:
    """The options that extend a model's window to `length`, for people."""
    scaling = config.rope_scaling
    stated = config.window_before()
    old_window = stated or round(config.max_position_embeddings / scaling.factor)
    options = f"train.py --rope-kind yarn --rope-factor {math.ceil(length / old_window)}"
    if scaling.kind == "default":  # there is no rule yet
        return options
    options += f" --original-length {old_window}"
    rule = f"the model's own {scaling.kind} rule"
    if stated:
        return f"{options}, which replaces {rule}"
    return f"{options}, if that was its window before; it replaces {rule}"


def beyond_window(own: ModelConfig, config: ModelConfig, length: int) -> str:
    """What is wrong with sequences of `length`, and what would be right; "" if nothing is. `config`
    is the model's `own`, extended as the options say."""
    window = config.max_position_embeddings
    if length <= window:
        return ""
    return (f"--sequence-length {length} is beyond the model's window of {window}; extend it "
            f"({extension_hint(own, length)}) or shorten the sequences")


def load_start(options: Namespace, grid: Grid, changes: dict, chunk: int | None,
               checkpoint: Path | None) -> tuple[ModelConfig, data.Tokenizer, dict[str, bytes]]:
    """Configuration and tokenizer to start from, or those of the checkpoint that is continued,
    checked against each other and the options, and the `model_files` that every save writes; the
    kernel of attention is chosen, see `choose_attention`. `changes` are for `model.rescale`."""
    own = read_config(checkpoint or options.model or options.config)
    config = own if checkpoint else rescale(own, **changes)
    problem = beyond_window(own, config, options.sequence_length)
    if problem:
        raise ValueError(problem)
    check_run(options, grid, config)
    choose_attention(options, grid, config, chunk)
    path = options.tokenizer or options.model
    if checkpoint and not (path and path.exists()):  # it may be gone: the checkpoint has it
        path = checkpoint
    if not path:
        raise ValueError("--tokenizer is needed with --config: the one that the corpus was "
                         "prepared with")
    tokenizer = data.load_tokenizer(path, config.vocab_size)
    stops = data.stop_tokens(tokenizer, config.hf.get("eos_token_id"))
    config = replace(config, hf=config.hf | {"eos_token_id": stops})  # where servers should stop
    return config, tokenizer, model_files(path, checkpoint or options.model or path, config)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int,
                  final_share: float) -> float:
    """The rate of a step, counted from 1 to `steps`. With a peak of 2.0, 10 of 110 steps of warm-up
    and a final share of 0.1:

        step      1     5     10    35      60     85      110
        rate      0.2   1.0   2.0   1.736   1.1    0.464   0.2
                  warm-up     peak          half way       end
    """
    # 1. Warm-up, linear: AdamW's averages rest on a few batches only, so its steps are unsure yet.
    if step <= warmup_steps:
        return peak * step / warmup_steps
    # 2. Then half a cosine: slowly away from the peak, fast, and slowly into the end.
    progress = (step - warmup_steps) / (steps - warmup_steps)  # above 0, 1 at the last step
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return peak * (final_share + (1 - final_share) * cosine)


def forward_flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """FLOPs of one sequence's forward pass: of matrix products, and of causal attention, where a
    query sees half of the keys on average (to count all of them, as is common, doubles it)."""
    hidden = config.hidden_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    attention_weights = hidden * (width + 2 * kv_width) + width * hidden
    mlp_weights = 3 * hidden * config.intermediate_size
    head_weights = config.vocab_size * hidden
    weights = layers * (attention_weights + mlp_weights) + head_weights
    products = 2 * length * weights  # a multiplication and an addition a weight
    attention = layers * 2 * length**2 * width  # Q K^T and P V: 2 S^2 width / 2 each
    return products, attention


# -------------------------------------------------------------------------------------- checkpoints


def serving_note(scaling: RopeScaling) -> str:
    """What llama.cpp must be told of an exported model, as it takes beta_fast 32 and beta_slow 1
    whatever the model says. transformers and vLLM read all in config.json."""
    if scaling.kind != "yarn" or (scaling.beta_fast, scaling.beta_slow) == (32, 1):
        return ""
    return (f"; llama.cpp needs --yarn-beta-fast {scaling.beta_fast:g} "
            f"--yarn-beta-slow {scaling.beta_slow:g}")


def written_once(path: Path, grid: Grid):
    """A directory that all ranks fill together, the first one writing: complete or absent."""
    return data.complete_or_absent(path) if grid.is_first else nullcontext(path)


def model_files(tokenizer: Path, model: Path, config: ModelConfig) -> dict[str, bytes]:
    """What a model directory holds beside config.json and the weights, by name: a tokenizer's file,
    or those of its directory, and the model's generation_config.json, with this window and these
    stop tokens. Built before the first step: a comma too many in one of them would else end a run
    at its first checkpoint."""
    sources = {name: tokenizer / name for name in TOKENIZER_FILES}
    if tokenizer.is_file():  # under the name that data.load_tokenizer looks for
        name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
        sources = {name: tokenizer}
    sources["generation_config.json"] = model / "generation_config.json"
    new = {
        "tokenizer.json": {"truncation": None, "padding": None},  # to the old window
        "tokenizer_config.json": {"model_max_length": config.max_position_embeddings},
        "generation_config.json": {"eos_token_id": config.hf["eos_token_id"]},
    }
    files = {}
    for name, file in sources.items():
        if not file.is_file():
            continue
        if name.endswith(".json"):
            content = data.read_object(file) | new.get(name, {})
            kept = {key: value for key, value in content.items() if key not in STALE}
            files[name] = (json.dumps(kept, indent=2) + "\n").encode()
        else:
            files[name] = file.read_bytes()
    return files


def save_model(path: Path, model: Llama, files: dict[str, bytes]) -> None:
    """Write a model directory: config.json, weights and `model_files`."""
    model.save_pretrained(path)
    if model.grid.is_first:
        for name, content in files.items():
            (path / name).write_bytes(content)


def save_checkpoint(run: Path, step: int, model: Llama, optimizer: ShardedAdamW,
                    files: dict[str, bytes], settings: dict, keep: int) -> Path:
    """Write `run/checkpoint-STEP`, then drop all but the newest `keep`. A checkpoint holds what one
    process would write, so any grid can continue:

        checkpoint-00000300/
            config.json, model-*.safetensors, `files`       a Hugging Face model directory
            optimizer/master-*, exp_avg-*, exp_avg_sq-*     whole tensors, float32
            training.json                                   format, step, settings
    """
    grid = model.grid
    path = run / f"checkpoint-{step:08d}"
    with written_once(path, grid) as aside:
        save_model(aside, model, files)
        # a gradient has the shape and the type of its parameter's state
        like = {name: parameter.grad for name, parameter in optimizer.parameters.items()}
        target = aside / "optimizer"
        if grid.is_first:
            target.mkdir()
        for kind in optimizer.KINDS:
            state = optimizer.state(kind)
            data.write_weights(target, kind, state, like, optimizer.dims, grid)
        # the step is the data position too: step i takes the i-th batch of sequences
        if grid.is_first:
            progress = {"format": CHECKPOINT_FORMAT, "step": step, "settings": settings}
            (aside / "training.json").write_text(json.dumps(progress, indent=2) + "\n")
    # the new one is complete and has its name: now old ones may go
    if grid.is_first:
        for old in checkpoints(run)[:-keep]:
            old.rename(f"{old}.partial")  # at first: a half-deleted one must not look complete
        for leftover in run.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
    grid.barrier()
    return path


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-" + 8 * "[0-9]"))


def has_final(out: Path) -> bool:
    """Whether the run in --out has come to its end."""
    return (out / "final" / "config.json").exists()


def damage(checkpoint: Path, is_done: bool = False) -> str:
    """Why a checkpoint cannot be resumed, "" if it can be. Of weights only headers are read, and
    nothing where the run is done."""
    try:
        saved = data.read_object(checkpoint / "training.json")
        if saved.get("format") != CHECKPOINT_FORMAT:
            return (f"{checkpoint}: a checkpoint of an earlier version, which this one cannot "
                    f"resume; start a new run from it with --model {checkpoint}")
        if not {"step", "settings"} <= saved.keys():
            return f"{checkpoint}/training.json: has no step or no settings"
        if is_done:
            return ""
        data.load_tokenizer(checkpoint, read_config(checkpoint).vocab_size)
        files = set(data.locate_weights(checkpoint, "model").values())
        for kind in ShardedAdamW.KINDS:
            files.update(data.locate_weights(checkpoint / "optimizer", kind).values())
        for file in files:
            with data.open_weights(file):  # compares its length with its header
                pass
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@contextmanager
def run_directory(out: Path, resume: bool, grid: Grid) -> Iterator[Path | None]:
    """Own --out, and yield the checkpoint from which its run is resumed, None at the start.

    The first rank holds a lock, which ends with its process, however that ends: two runs would
    write over each other's metrics and checkpoints. An --out in which nothing came to be goes.
    """
    is_new = not out.exists()
    if grid.is_first:
        out.mkdir(parents=True, exist_ok=True)
    try:
        with data.locked(out / LOCK) if grid.is_first else nullcontext():
            yield find_checkpoint(out, resume)
    finally:
        if grid.is_first and is_new and not any(out.iterdir()):
            out.rmdir()


def find_checkpoint(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint of the run in --out. Raises ValueError if --out holds something else,
    or if that checkpoint is damaged: whether an older one will do is the user's to say."""
    # 1. What is there: nothing, a run, or foreign files?
    names = [path.name for path in out.iterdir() if path.name != LOCK] if out.exists() else []
    ours = ("checkpoint-", "final", "metrics")
    foreign = [name for name in names if not name.startswith(ours)]
    if foreign and "metrics.jsonl" not in names:
        raise ValueError(f"--out {out}: holds files, but no run; choose another directory")
    if names and not resume:
        raise ValueError(f"--out {out}: holds an earlier run; add --resume to continue it, or "
                         "choose another directory")
    # 2. Where did the run stop?
    complete = checkpoints(out)
    if not complete:
        return None
    problem = damage(complete[-1], has_final(out))
    if problem:
        whole = [path for path in complete if not damage(path)]
        if whole:
            problem += f"; {whole[-1]} is whole: remove every newer one to continue from it"
        raise ValueError(problem)
    return complete[-1]


def agreed_settings(options: Namespace, tokenizer: data.Tokenizer,
                    checkpoint: Path | None) -> tuple[dict, int]:
    """(what a resumed run must share with the run it continues, as JSON; that one's step so far).

    Files count by what is in them, not by their path: they may move, but not change, and the base
    model may be gone. Raises ValueError if the checkpoint has other settings: together they would
    make a run that no command describes.
    """
    settings = {name: value for name, value in vars(options).items() if name not in FREE_TO_CHANGE}
    settings["dtype"] = compute_type(options.dtype, options.device)
    settings["tokenizer"] = data.fingerprint(tokenizer)
    settings["model"] = None
    settings["data"] = [[data.digest(path), weight] for path, weight in options.data]
    saved = data.read_object(checkpoint / "training.json") if checkpoint else None
    if options.model and options.model.exists():
        settings["model"] = data.digest(options.model)
    elif options.model:  # without a checkpoint it was missed before
        print_once(f"--model {options.model} is not there; the checkpoint has all that is needed")
        settings["model"] = saved["settings"].get("model")
    settings = json.loads(json.dumps(settings, default=str, sort_keys=True))  # as a file has it
    for name, value in settings.items() if saved else ():
        before = saved["settings"].get(name)
        if name not in saved["settings"] and not value:
            continue  # of an earlier version, which had no such option
        if before != value:
            what = SPELLED.get(name, f"--{name.replace('_', '-')}")
            if name in ("model", "data", "tokenizer"):
                what = f"the digest of --{name}'s files"
            raise ValueError(f"{what} is {value!r}, but the run in {options.out} has {before!r}; "
                             "resume with the same or choose another --out")
    return settings, saved["step"] if saved else 0


def open_metrics(path: Path, step: int):
    """metrics.jsonl, without what a resumed run will write again: lines after its step, or half."""
    past = []
    if path.exists():
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            place = f"{path}, line {number}"
            if line.endswith(b"\n") and data.parse_json(line, place)["step"] <= step:
                past.append(line)
    data.write_complete(path, b"".join(past))
    return path.open("a", buffering=1)  # a line is written when it ends


# ----------------------------------------------------------------------------------------- the loop


@torch.no_grad()
def validate(model: Llama, dataset, sequences: int) -> float:
    """Mean held-out loss."""
    grid = model.grid
    device = model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, targets
    for index in range(grid.dp_rank, sequences, grid.dp):
        grid.restart_timer()
        batch = data.batch(dataset, index, 1).to(device)  # of one sequence
        loss, targets = model.loss(batch.tokens, batch.targets, batch.document_ids)
        total += torch.stack((loss, targets))
    grid.restart_timer()  # other replicas may have a sequence more
    loss, targets = grid.all_reduce(total, "dp").tolist()
    return loss / max(1, targets)


def training_step(model: Llama, optimizer: ShardedAdamW, batch: data.Batch,
                  micro_batch_size: int) -> tuple[float, int]:
    """Accumulate one global batch's gradients in the optimizer, from this replica's rows of it.

    Returns the batch's mean loss and the positions computed. The mean is over all targets, so that
    each counts alike: say that one rank has one target of loss 4, and another three of loss 2.

        mean of all targets     (4 + 2 + 2 + 2) / 4 = 2.5     each weighs 1/4
        mean of the two means   (4 / 1 + 6 / 3) / 2 = 3.0     the first one weighs 1/2: wrong

    Both divide by 4 before their backward, and their gradients need only be summed. So this 4 must
    be known before any backward, and neither can count it alone."""
    grid = model.grid
    device = model.head_weight.device
    optimizer.zero_gradients()
    # 1. Count the targets of the whole global batch.
    targets = torch.tensor(int((batch.targets != -100).sum()), device=device)
    targets = max(1, grid.all_reduce(targets, "dp").item())  # without one the loss is 0, not NaN
    # 2. Forward and backward of a micro-batch at a time: gradients add up in the optimizer.
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, positions
    for rows in torch.arange(len(batch.tokens)).split(micro_batch_size):
        grid.restart_timer()
        has_target = (batch.targets[rows] != -100).any(0)  # (S,)
        places = has_target.nonzero()  # (n, 1), ascending
        # what follows the last target, padding say, changes nothing
        length = int(places[-1]) + 1 if len(places) else 1
        if grid.kernel == "cudnn":  # which takes whole chunks, so none may be padded later
            length += -length % grid.cudnn_multiple
        part = batch.part(rows, length).to(device)
        loss, _ = model.loss(part.tokens, part.targets, part.document_ids)
        (loss / targets).backward()
        total[0] += loss.detach()
        total[1] += part.tokens.numel()
    # 3. Sum what is reported. The gradients are summed once, in the optimizer's step.
    loss, positions = grid.all_reduce(total, "dp").tolist()
    return loss / targets, int(positions)


def peak_memory_gib(device: torch.device | str) -> float:
    """Largest memory this process has used: allocated on the GPU, resident on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else KiB


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """Yield a list of this block's SIGTERM and SIGINT (Ctrl-C), which then do nothing else."""
    received = []
    previous = {}  # the handlers that are given back
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(model: Llama, optimizer: ShardedAdamW, training, validation, options: Namespace,
          save: Callable[[int], Path], first_step: int, received: list[int]) -> int:
    """Steps first_step + 1 ... --steps, then a checkpoint. Returns the last step made: a signal in
    `received` ends the run early, with a checkpoint after the step in which it came."""
    grid = model.grid
    device = model.head_weight.device
    steps = options.steps
    share = options.batch_size // grid.dp  # sequences a step of this replica
    micro_batch_size = options.micro_batch_size or share

    # FLOPs of a whole sequence, and twice as many backward; shorter ones take a little less a token
    length = training.sequence_length
    flops, attention = forward_flops(model.config, length)
    if not training.document_mask:  # what a mask leaves of attention is not counted
        flops += attention
    flops *= 3
    peak = None  # what an MFU of 100 % means
    if device.type == "cuda":
        peak = PEAKS.get(torch.cuda.get_device_name(device))

    log = open_metrics(options.out / "metrics.jsonl", first_step) if grid.is_first else None
    bar = tqdm(range(first_step + 1, steps + 1), initial=first_step, total=steps,
               desc=options.out.name, mininterval=1.0, disable=not grid.is_first)

    def note(step: int, **values) -> None:
        if log:
            print(json.dumps({"step": step, **values}), file=log)

    def is_due(step: int, every: int) -> bool:
        return step == steps or (every > 0 and step % every == 0)

    step = first_step  # all may have been made: then there is no loop
    for step in bar:
        # 1. Batch: a step takes the next --batch-size sequences of the data, a replica its share.
        start = time.perf_counter()
        first = (step - 1) * options.batch_size + grid.dp_rank * share
        batch = data.batch(training, first, share)  # this replica's rows
        waited = time.perf_counter() - start

        # 2. Step: gradients, then the update, unless it would make every weight NaN.
        loss, positions = training_step(model, optimizer, batch, micro_batch_size)
        rate = learning_rate(step, steps, options.learning_rate, options.warmup_steps,
                             options.final_learning_rate)
        try:
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss}")
            norm = optimizer.step(rate, options.clip)
        except ArithmeticError as error:
            good = checkpoints(options.out)
            raise ArithmeticError(
                f"step {step}: {error}; nothing was updated. The last good checkpoint is "
                f"{good[-1] if good else 'none'}; try a lower --learning-rate") from None

        # 3. Log: a line of metrics.jsonl, and the progress bar.
        duration = time.perf_counter() - start
        gib = peak_memory_gib(device)
        speed = positions / duration / grid.size("all")  # tokens a second and process
        mfu = speed * flops / length / peak if peak else None
        note(step, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=positions,
             tokens_per_second=round(speed * grid.size("all")),
             tokens_per_second_per_gpu=round(speed),
             mfu=round(mfu, 4) if mfu else None,
             data_wait=round(waited / duration, 4), peak_memory_gib=round(gib, 3),
             attention=grid.kernel)
        utilisation = f"MFU {mfu:.0%}, " if mfu else ""
        bar.set_postfix_str(
            f"loss {loss:.3f}, {speed:,.0f} tokens/s/GPU, {utilisation}{gib:.1f} GiB, "
            f"data {waited / duration:.0%}", refresh=False)

        # 4. Validate.
        if validation and is_due(step, options.validate_every):
            held_out = validate(model, validation, options.validation_sequences)
            note(step, validation_loss=held_out)
            if grid.is_first:
                bar.write(f"step {step}: held-out loss {held_out:.3f}")

        # 5. Save. A signal reaches one rank before this line and another after it. If each obeyed
        # alone, the first would wait in its save, the second in its next step, each for the other.
        # The sum of all signals is the same on all ranks: they stop after the same step.
        signals = torch.tensor(len(received), device=device)
        must_stop = grid.all_reduce(signals, "all").item() > 0
        if must_stop or is_due(step, options.checkpoint_every):
            path = save(step)
        if must_stop:
            if grid.is_first:
                bar.write(f"stopped by a signal after step {step}: --resume continues from {path}")
            break
    return step


def build(config: ModelConfig, checkpoint: Path | None, step: int, grid: Grid, dtype: torch.dtype,
          options: Namespace) -> tuple[Llama, ShardedAdamW]:
    """The model and the optimizer that a run starts with, or continues with after `step`."""
    if checkpoint:  # as it is, whatever has become of --model and --config
        model = Llama.from_pretrained(checkpoint, grid, dtype, options.device)
    elif options.model:  # its weights, under the window and rule that were asked for
        model = Llama.from_pretrained(options.model, grid, dtype, options.device)
        model.config = config
    else:  # random weights, the same on every grid
        model = Llama(config, grid).initialise(options.seed)
        model = model.to(options.device, dtype)
    model.recompute = options.recompute
    model.offload = options.offload
    model.tile = options.tile
    # after the weights are loaded: the optimizer's master weights begin as their copy
    optimizer = ShardedAdamW(model, grid, options.betas, options.weight_decay,
                             options.offload_optimizer)
    if checkpoint:
        for kind in optimizer.KINDS:
            # one at a time, by way of the host: the device may have no room for more
            shards = data.read_weights(checkpoint / "optimizer", kind, optimizer.parameters,
                                       optimizer.dims, grid, None, "cpu")
            optimizer.load_state(kind, shards, step)
    return model, optimizer


def run_stage(options: Namespace, grid: Grid, config: ModelConfig, tokenizer: data.Tokenizer,
              files: dict[str, bytes], checkpoint: Path | None, training, validation) -> None:
    """Check, build, train, export: what both stages do. Checks come first: a large model takes
    minutes to load, on every GPU of a job, and a mistake in the options should cost seconds."""
    # 1. Check that it is the run of the checkpoint.
    out = options.out
    settings, step = agreed_settings(options, tokenizer, checkpoint)
    dtype = getattr(torch, settings["dtype"])
    is_done = has_final(out)

    # 2. Check that all ranks see the same files: on machines with disks of their own they may not.
    checksum = zlib.crc32(json.dumps(settings).encode())  # a number that fits into a tensor
    own = torch.tensor([step, checksum, is_done], device=options.device)
    if (grid.all_gather(own, "all") != own).any():
        raise ValueError(f"the ranks have found different checkpoints in {out}, options or data; "
                         "--out and --data must be the same for all of them")
    if is_done:
        print_once(f"{out}/final is already there; nothing to do")
        return

    # 3. Build, and say what is trained.
    model, optimizer = build(config, checkpoint, step, grid, dtype, options)
    parameters = 0
    for name, parameter in model.named_parameters():
        is_cut = optimizer.dims[name] is not None
        parameters += parameter.numel() * (grid.tp if is_cut else 1)
    begun = f"resumed after step {step}" if checkpoint else "from the first step on"
    print_once(
        f"{parameters / 1e6:.2f}M parameters, {settings['dtype']} on {options.device}, "
        f"window {model.config.max_position_embeddings}, rope {model.config.rope_scaling.kind}, "
        f"{options.batch_size} x {training.sequence_length} tokens a step, {begun}")
    print_once(f"grid dp {grid.dp} x cp {grid.cp} x tp {grid.tp}")

    # 4. Train. The last step too leaves a checkpoint, so a failing export loses nothing.
    def save(step: int) -> Path:
        return save_checkpoint(out, step, model, optimizer, files, settings,
                               options.keep_checkpoints)

    with signals_received() as received:
        step = train(model, optimizer, training, validation, options, save, step, received)

    # 5. Export, unless a signal has stopped the run.
    if step == options.steps:
        with written_once(out / "final", grid) as aside:
            save_model(aside, model, files)
        print_once(f"wrote {out}/final{serving_note(config.rope_scaling)}")


def main(argv: list[str] | None = None) -> None:
    """Stage 1."""
    with one_line_errors():
        options = stage1_parser().parse_args(argv)
        grid = Grid.create(options.tp, options.cp, options.device, options.timeout)
        changes = extension(options) | {"window": options.new_window}
        chunk = chunk_length(options, grid)
        with run_directory(options.out, options.resume, grid) as checkpoint:
            config, tokenizer, files = load_start(options, grid, changes, chunk, checkpoint)
            training, validation = stage1_datasets(options, tokenizer)
            run_stage(options, grid, config, tokenizer, files, checkpoint, training, validation)
            grid.close()


if __name__ == "__main__":
    main()
