"""How far a shape trains on this device: peak memory against sequence length, its slope in bytes a
token, the largest length.

    python -m benchmarks.max_context
    python -m benchmarks.max_context --config runs/llama32_1b.json \\
        --lengths 32768 131072 524288 --recompute mlp --offload --largest

The first is for a CPU: 2K to 64K tokens, a small Llama.

Every length is a whole training step with its optimizer in a fresh process: peak is its largest
resident size on a CPU, the most torch had allocated on a GPU. The slope is a least-squares line's;
"predicted" is what `tools.plan` computes from shapes. --largest then looks for the longest sequence
within --memory-gib, beginning at the predicted one. Writes JSON.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from model import RECOMPUTE, Llama, ModelConfig, read_config
from parallel import Grid, ShardedAdamW, one_line_errors
from tools.plan import Plan
from train import peak_memory_gib


@dataclass(frozen=True)
class Step:
    """A training step to measure: everything but its length."""

    config: ModelConfig
    recompute: str
    offload: bool
    offload_optimizer: bool
    tile: int
    dtype: str
    device: str
    threads: int

    def predicted_gib(self, length: int) -> float:
        """On a CPU the host's memory is the device's."""
        plan = Plan(self.config, length, batch=1, micro_batch=1, tp=1, cp=1, dp=1,
                    itemsize=getattr(torch, self.dtype).itemsize, recompute=self.recompute,
                    offload=self.offload, offload_optimizer=self.offload_optimizer, tile=self.tile,
                    cuda=self.device == "cuda")
        total = sum(plan.memory().values())
        if self.device == "cpu":
            total += plan.on_host()
        return total / 2**30

    def serve(self, pipe, length: int) -> None:
        """Child process: one step; answers (peak GiB, seconds), or None if the GPU's memory does
        not suffice."""
        torch.set_num_threads(self.threads)
        try:
            model = Llama(self.config).to(self.device, getattr(torch, self.dtype))
            model.recompute = self.recompute
            model.offload = self.offload
            model.tile = self.tile
            optimizer = ShardedAdamW(model, Grid(), on_host=self.offload_optimizer)
            batch = common.random_batch(self.config.vocab_size, length)
            start = time.perf_counter()
            common.step(model, optimizer, batch)
            pipe.send((peak_memory_gib(self.device), time.perf_counter() - start))
        except torch.OutOfMemoryError:
            pipe.send(None)


def measure(step: Step, length: int, memory_gib: float) -> tuple[float, float] | None:
    """(peak GiB, seconds) of a step at this length, None if it does not fit."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=step.serve, args=(other, length))
    process.start()
    other.close()
    try:
        found = pipe.recv()
    except EOFError:  # the system ended the process
        found = None
    process.join()
    return found if found and found[0] <= memory_gib else None


def largest(step: Step, memory_gib: float) -> tuple[int, float, float]:
    """The longest sequence that trains within the memory, to 1/32 of the predicted one: (length,
    peak GiB, seconds)."""
    fits = [n for n in range(1024, 2**24, 1024) if step.predicted_gib(n) <= memory_gib]
    if not fits:
        raise SystemExit(f"error: --memory-gib {memory_gib:g}: the model alone takes more")
    stride = max(1024, fits[-1] // 32 // 1024 * 1024)
    length = fits[-1]
    best = measure(step, fits[-1], memory_gib)
    direction = 1 if best else -1
    while length + direction * stride > 0:
        next_length = length + direction * stride
        found = measure(step, next_length, memory_gib)
        if direction > 0 and found is None:
            break
        length, best = next_length, found
        if direction < 0 and found:
            break
    if best is None:
        raise SystemExit(f"error: --memory-gib {memory_gib:g}: no length trains within it")
    return length, *best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json, or a model directory")
    parser.add_argument("--lengths", type=int, nargs="+",
                        default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--hidden-size", type=int, default=256,
                        help="without --config: a multiple of 256")
    parser.add_argument("--layers", type=int, default=2, help="without --config")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="mlp")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--offload-optimizer", action="store_true")
    parser.add_argument("--tile", type=int, default=1024,
                        help="positions; few, so that tiles are full at the shortest length")
    parser.add_argument("--largest", action="store_true", help="also look for the longest sequence")
    parser.add_argument("--memory-gib", type=float,
                        help="for --largest (default: a GPU's memory less 1; needed on a CPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/max_context.json"))
    a = parser.parse_args()
    cuda = a.device == "cuda"
    if a.config:
        config = read_config(a.config)
    else:
        small = common.small_llama(a.hidden_size, a.layers, 1024, 2**22)
        config = ModelConfig.from_hf(small)
    step = Step(config, a.recompute, a.offload, a.offload_optimizer, a.tile, a.dtype, a.device,
                a.threads)
    memory_gib = a.memory_gib or float("inf")
    if a.largest and a.memory_gib is None:
        if not cuda:
            parser.error("--largest needs --memory-gib on a CPU")
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 - 1
    # glibc in the children: what is freed goes back, so the peak is what was alive
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {a.threads} threads"
    print(f"{name}, torch {torch.__version__}, {a.dtype}, --recompute {a.recompute}"
          + ", --offload" * a.offload)
    print(f"{'S':>9} {'peak GiB':>9} {'predicted GiB':>14} {'s a step':>9} {'tokens/s':>9}")
    rows = []
    for length in a.lengths:
        found = measure(step, length, memory_gib)
        if not found:
            print(f"{length:>9}   does not fit", flush=True)
            continue
        peak, seconds = found
        predicted = step.predicted_gib(length)
        rows.append({"length": length, "peak_gib": peak, "seconds": seconds,
                     "predicted_gib": predicted})
        print(f"{length:>9} {peak:>9.3f} {predicted:>14.3f} {seconds:>9.2f} "
              f"{length / seconds:>9,.0f}", flush=True)
    result = {"device": name, "torch": torch.__version__, "arguments": vars(a), "rows": rows}
    if len(rows) > 1:
        lengths = np.array([row["length"] for row in rows])
        peaks = np.array([row["peak_gib"] for row in rows])
        line = np.polyfit(lengths, peaks, 1)
        slope = line[0] * 2**30
        straight = abs(np.polyval(line, lengths) - peaks).max()
        predicted_line = np.polyfit(lengths, [row["predicted_gib"] for row in rows], 1)
        predicted = predicted_line[0] * 2**30
        result |= {"bytes_per_token": slope, "predicted_bytes_per_token": predicted,
                   "off_the_line_gib": straight}
        print(f"slope: {slope:,.0f} bytes a token, predicted {predicted:,.0f} "
              f"({predicted / slope - 1:+.1%}); points lie within "
              f"{straight:.3f} GiB of a line")
    if a.largest:
        length, peak, seconds = largest(step, memory_gib)
        result |= {"largest": length, "largest_peak_gib": peak, "largest_seconds": seconds}
        print(f"largest: {length:,} tokens, peak {peak:.2f} GiB of {memory_gib:.1f}, "
              f"{length / seconds:,.0f} tokens/s")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    with one_line_errors():
        main()
