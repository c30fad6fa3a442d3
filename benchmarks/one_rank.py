"""One rank of a tp x cp grid on a single device: compute and memory of a training step, with
stand-ins for the other ranks.

    python -m benchmarks.one_rank --config runs/llama31_8b.json --length 1048576 --tp 8 \\
        --layers 2 4 --recompute mlp --offload
    python -m benchmarks.one_rank --config runs/llama32_1b.json --length 131072 --recompute mlp
    python -m benchmarks.one_rank --hidden-size 256 --layers 2 --length 4096 --tp 2 --cp 2 \\
        --device cpu

The first two need a GPU, the last is a try.

NOT a distributed run: a gather repeats this rank's part, a reduce-scatter keeps it, a ring hop
hands the own keys back. So shapes, kernels and memory are one rank's of the grid; the loss means
nothing, and no time is spent on links. With --tp 1 --cp 1 it is a real step.

Each row stands beside the prediction of `tools.plan`. With several --layers a last row follows
their line to the config's own number: time and memory are straight in the layers, if what they keep
is on the host. MFU: causal, no recomputation, of the data sheet's dense bfloat16. --profile makes
one more step and lists the operators that take most of it. Prints a table, writes JSON.
"""
from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from model import RECOMPUTE, Llama, ModelConfig, read_config
from parallel import Grid, Hop, ShardedAdamW, one_line_errors
from tools.plan import DEVICES, Device, Plan, measured_device
from train import PEAKS, forward_flops, peak_memory_gib

# CUDA's of the planner's devices
NAMES = {"H100 80GB HBM3": "H100-80", "NVIDIA H200": "H200", "A100-SXM4-80GB": "A100-80"}
COLUMNS = {
    "layers": "", "kernel": "", "s a step": ".2f", "planned s": ".2f", "tokens/s/GPU": ",.0f",
    "MFU": ".1%", "peak GiB": ".2f", "planned GiB": ".2f",
}


class StandInGrid(Grid):
    """A rank whose partners are itself: every collective has its shapes and memory, and no
    meaning."""

    def all_gather(self, x: Tensor, group: str) -> Tensor:
        if self.size(group) == 1:
            return x[None]
        return x.expand(self.size(group), *x.shape).clone()

    def reduce_scatter(self, x: Tensor, group: str) -> Tensor:
        if self.size(group) == 1:
            return x[0]
        return x[0].clone(memory_format=torch.contiguous_format)

    def send_around(self, *leaving: Tensor, tag: int = 0) -> Hop:
        if self.cp == 1:
            return Hop(leaving, [])
        arriving = [x.clone(memory_format=torch.contiguous_format) for x in leaving]
        return Hop(tuple(arriving), [])


def configuration(path: Path | None, hidden_size: int, length: int) -> ModelConfig:
    """A config.json's, or a small Llama for a try."""
    if path:
        return read_config(path)
    return ModelConfig.from_hf({
        "vocab_size": 8192,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 128,
        "head_dim": 32,
        "max_position_embeddings": length,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    })


def measure(plan: Plan, options: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """Median seconds of a step, after one that warms up, and the peak in GiB. (On a CPU that of the
    whole process: the largest so far.)"""
    if plan.cuda:
        gc.collect()  # what the last one has left
        torch.cuda.reset_peak_memory_stats()
    grid = StandInGrid(1, plan.cp, plan.tp, options.rank, kernel=plan.kernel)
    with torch.device("meta"):
        model = Llama(plan.config, grid)
    model.to_empty(device=options.device).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    model.recompute = plan.recompute
    model.offload = plan.offload
    model.tile = plan.tile
    optimizer = ShardedAdamW(model, grid, on_host=plan.offload_optimizer)
    batch = common.random_batch(plan.config.vocab_size, plan.length)
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        common.step(model, optimizer, batch)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_gib(options.device)
    if options.profile:
        with torch.profiler.profile() as profile:
            common.step(model, optimizer, batch)
        print_operators(profile, plan.cuda)
    return statistics.median(seconds[1:]), peak


def print_operators(profile: torch.profiler.profile, cuda: bool) -> None:
    """The ten operators whose own work takes longest, without what they call."""
    totals = {}
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operator, not a GPU's kernel
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            totals[event.key] = own / 1e6
    everything = sum(totals.values())
    for name in sorted(totals, key=totals.get, reverse=True)[:10]:
        print(f"{totals[name]:10.3f} s {totals[name] / everything:6.1%}  {name}")


def row_of(plan: Plan, device: Device, seconds: float, peak: float, peak_flops: float | None):
    """A row of the table: what was measured, beside the plan of what this rank does alone."""
    planned_seconds = 0.0
    for what, value in plan.times(device).items():
        if "communication" not in what and "ring" not in what:
            planned_seconds += value
    share = plan.tp * plan.cp
    flops = 3 * sum(forward_flops(plan.config, plan.length)) / share
    return {
        "layers": plan.config.num_hidden_layers,
        "kernel": plan.kernel,
        "s a step": seconds,
        "planned s": planned_seconds,
        "tokens/s/GPU": plan.length / share / seconds,
        "MFU": flops / seconds / peak_flops if peak_flops else None,
        "peak GiB": peak,
        "planned GiB": sum(plan.memory().values()) / 2**30,
    }


def on_the_line(first: dict, last: dict, layers: int, name: str) -> float:
    """A column's value for so many layers, on the line through two rows."""
    slope = (last[name] - first[name]) / (last["layers"] - first["layers"])
    return first[name] + slope * (layers - first["layers"])


def main() -> None:
    parser = common.parser(__doc__, "out/one_rank.json")
    parser.add_argument("--config", type=Path, help="config.json, or a model directory")
    parser.add_argument("--hidden-size", type=int, default=256,
                        help="without --config: a multiple of 128")
    parser.add_argument("--layers", type=int, nargs="+", help="instead of the config's")
    parser.add_argument("--length", type=int, required=True, help="of the whole sequence")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="mlp")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--offload-optimizer", action="store_true")
    parser.add_argument("--tile", type=int, help="positions")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    a = parser.parse_args()
    dtype = getattr(torch, a.dtype)
    config = configuration(a.config, a.hidden_size, a.length)
    whole = config.num_hidden_layers
    kernel, why = common.start_kernel(a, a.dtype, config.head_dim, a.length, a.cp, a.tp)
    plan = Plan(config, a.length, batch=1, micro_batch=1, tp=a.tp, cp=a.cp, dp=1,
                itemsize=dtype.itemsize, recompute=a.recompute, offload=a.offload,
                offload_optimizer=a.offload_optimizer, tile=a.tile, cuda=a.device == "cuda",
                kernel=kernel)
    name = torch.cuda.get_device_name() if plan.cuda else "CPU"
    known = [key for part, key in NAMES.items() if part in name]
    if known:
        device = DEVICES[known[0]]
    else:
        device = measured_device(a.device, dtype, config.head_dim, kernel)
    peak_flops = PEAKS.get(name)

    title = (f"One rank of tp {a.tp} x cp {a.cp}, {a.length:,} tokens, --recompute {a.recompute}"
             + ", --offload" * a.offload + f", {a.dtype}; the other ranks are local stand-ins; "
             f"attention by {kernel} ({why})")
    facts = {"arguments": vars(a), "kernel": kernel, "why": why}
    table = common.Table(a.out, title, a.device, facts, COLUMNS)
    for layers in a.layers or [whole]:
        part = replace(plan, config=replace(config, num_hidden_layers=layers))
        seconds, peak = measure(part, a, dtype)
        table.add(row_of(part, device, seconds, peak, peak_flops))
    if len(table.rows) > 1:
        first, last = table.rows[0], table.rows[-1]
        seconds = on_the_line(first, last, whole, "s a step")
        peak = on_the_line(first, last, whole, "peak GiB")
        row = row_of(plan, device, seconds, peak, peak_flops)
        table.add(row | {"layers": f"{whole}, extrapolated"})


if __name__ == "__main__":
    with one_line_errors():
        main()
