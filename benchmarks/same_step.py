"""A model's first training steps on this device, with each memory option, against one step in
float32 on the CPU.

    python -m benchmarks.same_step --config runs/smollm2_135m.json --length 4096
    python -m benchmarks.same_step --config runs/tiny.json --length 128 --device cpu

Random weights, a random sequence, three steps in bfloat16. Errors are of the first step: of the
loss its difference, of all gradients the norm of the difference / norm. The options must give the
first row's losses, to the noise of kernels that add up in no fixed order. Prints a table, writes
JSON; exits 1 if a loss is off by more than 1e-3 or a gradient by more than 5 %.
"""
from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from model import Llama, ModelConfig, read_config
from parallel import Grid, ShardedAdamW, one_line_errors
from train import peak_memory_gib, training_step

STEPS = 3
LOSS_LIMIT = 1e-3
GRADIENT_LIMIT = 5e-2
OPTIONS = [("none", False), ("mlp", False), ("block", False), ("mlp", True)]
COLUMNS = {
    "kernel": "", "--recompute": "", "--offload": "", "losses": "", "loss error": ".1e",
    "gradient error": ".1e", "least ms": ",.0f", "peak GiB": ".2f",
}


def first_steps(config: ModelConfig, length: int, kernel: str, recompute: str, offload: bool,
                device: str, dtype: torch.dtype,
                steps: int) -> tuple[list[float], dict[str, Tensor], float]:
    """The losses, the first step's gradients in float32 on the CPU, and the least seconds."""
    grid = Grid(kernel=kernel)
    model = Llama(config, grid).initialise(0).to(device, dtype)
    model.recompute = recompute
    model.offload = offload
    optimizer = ShardedAdamW(model, grid)
    batch = common.random_batch(config.vocab_size, length)
    losses, seconds, gradients = [], [], {}
    for step in range(steps):
        start = time.perf_counter()
        loss, _ = training_step(model, optimizer, batch, 1)
        if step == 0:
            for name, parameter in model.named_parameters():
                gradients[name] = parameter.grad.to("cpu", copy=True)
        optimizer.step(common.LEARNING_RATE, max_norm=1.0)
        model.head_weight[0, 0].item()  # waits for the device
        losses.append(loss)
        seconds.append(time.perf_counter() - start)
    return losses, gradients, min(seconds[1:], default=0.0)  # the first one warms up


def gradient_error(ours: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Of all parameters together."""
    difference = sum((ours[name] - x).double().square().sum() for name, x in right.items())
    whole = sum(x.double().square().sum() for x in right.values())
    return (difference / whole).sqrt().item()


def main() -> None:
    parser = common.parser(__doc__, "out/same_step.json")
    parser.add_argument("--config", type=Path, required=True, help="config.json")
    parser.add_argument("--length", type=int, required=True)
    a = parser.parse_args()
    config = read_config(a.config)
    kernel, why = common.start_kernel(a, "bfloat16", config.head_dim, a.length)
    title = (f"The same training step: {config.num_hidden_layers} layers of width "
             f"{config.hidden_size}, {a.length:,} tokens; attention by {kernel} ({why})")
    table = common.Table(a.out, title, a.device, {"kernel": kernel, "why": why}, COLUMNS)
    losses, right, _ = first_steps(config, a.length, "flash", "none", False, "cpu",
                                   torch.float32, 1)
    exact = losses[0]
    table.add({"kernel": "CPU, float32", "losses": f"{exact:.5f}"})
    good = True
    plain = None
    for recompute, offload in OPTIONS:
        if a.device == "cuda":
            gc.collect()  # what the last one has left
            torch.cuda.reset_peak_memory_stats()
        losses, gradients, seconds = first_steps(
            config, a.length, kernel, recompute, offload, a.device, torch.bfloat16, STEPS)
        plain = plain or losses
        row = {
            "kernel": kernel,
            "--recompute": recompute,
            "--offload": "yes" if offload else "no",
            "losses": " ".join(f"{loss:.5f}" for loss in losses),
            "loss error": abs(losses[0] - exact),
            "gradient error": gradient_error(gradients, right),
            "least ms": 1e3 * seconds,
            "peak GiB": peak_memory_gib(a.device),
        }
        table.add(row)
        same = max(abs(x - y) for x, y in zip(losses, plain, strict=True))
        good = good and max(row["loss error"], same) <= LOSS_LIMIT
        good = good and row["gradient error"] <= GRADIENT_LIMIT
    print(f"\n{'ok' if good else 'FAILED'}: losses to {LOSS_LIMIT}, gradients to {GRADIENT_LIMIT}")
    sys.exit(not good)


if __name__ == "__main__":
    with one_line_errors():
        main()
