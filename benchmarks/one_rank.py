"""One rank of a tp x cp grid on a single device: compute and memory of a training step, with
stand-ins for the other ranks.

    python -m benchmarks.one_rank --config runs/llama31_8b.json --length 1048576 --tp 8 \\
        --recompute mlp --offload
    python -m benchmarks.one_rank --config runs/llama32_1b.json --length 131072 --recompute mlp
    python -m benchmarks.one_rank --hidden-size 256 --layers 2 --length 4096 --tp 2 --cp 2 \\
        --device cpu

The first two need a GPU, the last is a try.

NOT a distributed run: a gather repeats this rank's part, a reduce-scatter keeps it, a ring hop
hands the own keys back. So shapes, kernels and memory are one rank's of the grid; the loss means
nothing, and no time is spent on links. With --tp 1 --cp 1 it is a real step. "products + attention"
is what the profiler finds in matrix products and attention kernels in one more step. Prints a table
beside the prediction of `tools.plan`, writes JSON.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from model import RECOMPUTE, Llama, ModelConfig, read_config
from parallel import Grid, Hop, ShardedAdamW, one_line_errors
from tools.plan import DEVICES, Plan, measured_device
from train import PEAKS, forward_flops, peak_memory_gib

# CUDA's of the planner's devices
NAMES = {"H100 80GB HBM3": "H100-80", "NVIDIA H200": "H200", "A100-SXM4-80GB": "A100-80"}
KERNELS = ("aten::mm", "aten::addmm", "aten::bmm", "_flash_attention", "_cudnn_attention")


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


def configuration(path: Path | None, layers: int | None, hidden_size: int,
                  length: int) -> ModelConfig:
    """A config.json's, with fewer layers if asked, or a small Llama for a try."""
    if path:
        config = read_config(path).hf
        if layers:
            config = config | {"num_hidden_layers": layers}
        return ModelConfig.from_hf(config)
    return ModelConfig.from_hf({
        "vocab_size": 8192,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers or 2,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 128,
        "head_dim": 32,
        "max_position_embeddings": length,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    })


def kernel_seconds(step, cuda: bool) -> float:
    """Time of one step's matrix products and attention kernels, from the profiler."""
    with torch.profiler.profile() as profile:
        step()
    microseconds = 0
    for event in profile.key_averages():
        if any(name in event.key for name in KERNELS):
            microseconds += event.self_device_time_total if cuda else event.self_cpu_time_total
    return microseconds / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json, or a model directory")
    parser.add_argument("--hidden-size", type=int, default=256,
                        help="without --config: a multiple of 128")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--length", type=int, required=True, help="of the whole sequence")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="mlp")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--offload-optimizer", action="store_true")
    parser.add_argument("--tile", type=int, help="positions")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/one_rank.json"))
    a = parser.parse_args()
    cuda = a.device == "cuda"
    dtype = getattr(torch, a.dtype)
    config = configuration(a.config, a.layers, a.hidden_size, a.length)
    grid = StandInGrid(1, a.cp, a.tp, a.rank)
    with torch.device("meta"):
        model = Llama(config, grid)
    model.to_empty(device=a.device).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    model.recompute = a.recompute
    model.offload = a.offload
    model.tile = a.tile
    optimizer = ShardedAdamW(model, grid, on_host=a.offload_optimizer)
    batch = common.random_batch(config.vocab_size, a.length)

    def step() -> float:
        start = time.perf_counter()
        common.step(model, optimizer, batch)
        return time.perf_counter() - start

    seconds = statistics.median([step() for _ in range(a.repeats + 1)][1:])
    peak = peak_memory_gib(a.device)
    kernels = kernel_seconds(step, cuda)
    share = a.tp * a.cp
    name = torch.cuda.get_device_name() if cuda else "CPU"
    known = [key for part, key in NAMES.items() if part in name]
    if known:
        device = DEVICES[known[0]]
    else:
        device = measured_device(a.device, dtype, config.head_dim)
    plan = Plan(config, a.length, batch=1, micro_batch=1, tp=a.tp, cp=a.cp, dp=1,
                itemsize=dtype.itemsize, recompute=a.recompute, offload=a.offload,
                offload_optimizer=a.offload_optimizer, tile=a.tile, cuda=cuda)
    planned_seconds = 0  # of what this rank does alone
    for what, value in plan.times(device).items():
        if "communication" not in what and "ring" not in what:
            planned_seconds += value
    peak_flops = PEAKS.get(name) if cuda else None
    mfu = None
    if peak_flops:
        flops = 3 * sum(forward_flops(config, a.length)) / share
        mfu = flops / seconds / peak_flops
    row = {
        "length": a.length,
        "tp": a.tp,
        "cp": a.cp,
        "recompute": a.recompute,
        "offload": a.offload,
        "seconds": seconds,
        "tokens_per_second_per_gpu": a.length / share / seconds,
        "peak_gib": peak,
        "mfu": mfu,
        "kernel_seconds": kernels,
        "planned_gib": sum(plan.memory().values()) / 2**30,
        "planned_seconds": planned_seconds,
    }
    print(f"one rank of tp {a.tp} x cp {a.cp}, collectives replaced by local stand-ins; {name}, "
          f"torch {torch.__version__}, {a.dtype}")
    print("MFU: causal, no recomputation, of the data sheet's dense bfloat16" if mfu
          else "no data sheet of this device: no MFU")
    print(f"{'S':>9} {'s a step':>9} {'tokens/s/GPU':>13} {'MFU':>6} {'products + attention':>21} "
          f"{'peak GiB':>9} {'planned GiB':>12} "
          f"{'planned s':>10}")
    print(f"{a.length:>9} {seconds:>9.2f} {row['tokens_per_second_per_gpu']:>13,.0f} "
          f"{f'{mfu:.1%}' if mfu else '-':>6} {kernels:>19.2f} s {peak:>9.2f} "
          f"{row['planned_gib']:>12.2f} {row['planned_seconds']:>10.2f}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "arguments": vars(a),
                                 "row": row}, indent=1, default=str))


if __name__ == "__main__":
    with one_line_errors():
        main()
