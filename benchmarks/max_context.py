"""How far a shape trains on this device: peak memory against sequence length, its slope in bytes a
token, the largest length.

    python -m benchmarks.max_context
    python -m benchmarks.max_context --config runs/llama32_1b.json \\
        --lengths 32768 131072 524288 --recompute mlp --offload --largest

The first is for a CPU: 2K to 64K tokens, a small Llama.

Every length is a whole training step with its optimizer in a fresh process: peak is its largest
resident size on a CPU, the most torch had allocated on a GPU. On a GPU a second step follows a
first of less than a minute, in which host memory is locked, and the time is the last one's: with 1
under "steps" it has the locking in it. The slope is a least-squares line's; "predicted" is what
`tools.plan` computes from shapes. --largest then looks, a step a try, for the longest sequence
within --memory-gib and the host's memory, beginning at the predicted one; with --search-layers of a
model with so few layers, and what the others take, by the plan, is added: a step at 1M tokens takes
minutes, its attention 16 times those of 256K. Writes JSON.
"""
from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from model import RECOMPUTE, Llama, ModelConfig, read_config
from parallel import Grid, ShardedAdamW, one_line_errors
from tools.plan import Plan, host_bytes
from train import activate, option, peak_memory_gib

COLUMNS = {
    "S": ",", "layers": "", "kernel": "", "peak GiB": ".3f", "predicted GiB": ".3f", "steps": "",
    "s a step": ".2f", "tokens/s": ",.0f",
}


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
    kernel: str

    def predicted_gib(self, length: int) -> tuple[float, float]:
        """On the device and on the host; on a CPU all of it is the device's."""
        plan = Plan(self.config, length, batch=1, micro_batch=1, tp=1, cp=1, dp=1,
                    itemsize=getattr(torch, self.dtype).itemsize, recompute=self.recompute,
                    offload=self.offload, offload_optimizer=self.offload_optimizer, tile=self.tile,
                    cuda=self.device == "cuda", kernel=self.kernel)
        total = sum(plan.memory().values()) / 2**30
        on_host = plan.on_host() / 2**30
        return (total + on_host, 0.0) if self.device == "cpu" else (total, on_host)

    def serve(self, pipe, length: int, steps: int) -> None:
        """Child process: so many steps, none after a minute; answers (peak GiB, seconds of each),
        or None if the GPU's memory does not suffice."""
        torch.set_num_threads(self.threads)
        activate(self.kernel)
        try:
            grid = Grid(kernel=self.kernel)
            model = Llama(self.config, grid).to(self.device, getattr(torch, self.dtype))
            model.recompute = self.recompute
            model.offload = self.offload
            model.tile = self.tile
            optimizer = ShardedAdamW(model, grid, on_host=self.offload_optimizer)
            batch = common.random_batch(self.config.vocab_size, length)
            short = batch.part(torch.arange(1), min(length, 1024))
            common.step(model, optimizer, short)  # warms up
            seconds = []
            while len(seconds) < steps and sum(seconds) < 60:
                start = time.perf_counter()
                common.step(model, optimizer, batch)
                seconds.append(time.perf_counter() - start)
            pipe.send((peak_memory_gib(self.device), seconds))
        except torch.OutOfMemoryError:
            pipe.send(None)


def measure(step: Step, length: int, memory_gib: float,
            steps: int = 1) -> tuple[float, list[float]] | None:
    """(peak GiB, seconds) of steps at this length, None if they do not fit."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=step.serve, args=(other, length, steps))
    process.start()
    other.close()
    try:
        found = pipe.recv()
    except EOFError:  # the system ended the process
        found = None
    process.join()
    if process.exitcode == 1:  # it has said why
        raise SystemExit(f"error: the step of {length:,} tokens failed")
    return found if found and found[0] <= memory_gib else None


def largest(step: Step, memory_gib: float, layers: int, limit: int,
            table: common.Table) -> tuple[int, float]:
    """The longest sequence up to `limit` that trains within the memory, to 1/32 of the predicted
    one, and its peak in GiB. Steps are made with so many layers; the plan has what others take.
    Each try goes into `table`."""
    host = host_bytes() / 2**30
    lengths = [n for n in range(1024, limit + 1, 1024) if step.predicted_gib(n)[1] <= host]
    if not lengths:
        raise SystemExit(f"error: this machine's memory, {host:.0f} GiB: what is offloaded takes "
                         "more")
    fits = [n for n in lengths if step.predicted_gib(n)[0] <= memory_gib]
    if not fits:
        raise SystemExit(f"error: --memory-gib {memory_gib:g}: the model alone takes more")
    small = replace(step, config=replace(step.config, num_hidden_layers=layers))

    def peak_of(length: int) -> float | None:
        predicted, _ = step.predicted_gib(length)
        rest = predicted - small.predicted_gib(length)[0]
        found = measure(small, length, memory_gib - rest)
        peak = found[0] + rest if found else None
        table.add({"S": length, "layers": layers, "kernel": step.kernel, "peak GiB": peak,
                   "predicted GiB": predicted})
        if peak:
            table.save(largest=length, largest_peak_gib=peak, largest_layers=layers)
        return peak

    stride = max(1024, fits[-1] // 32 // 1024 * 1024)
    length = fits[-1]
    best = peak_of(length)
    direction = 1 if best else -1
    while 0 < length + direction * stride <= lengths[-1]:
        peak = peak_of(length + direction * stride)
        if direction > 0 and peak is None:
            break
        length += direction * stride
        best = peak
        if direction < 0 and peak:
            break
    if best is None:
        raise SystemExit(f"error: --memory-gib {memory_gib:g}: no length trains within it")
    return length, best


def main() -> None:
    parser = common.parser(__doc__, "out/max_context.json")
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
    at_least_1024 = option(int, lambda n: n >= 1024, "a whole number, 1024 or more")
    parser.add_argument("--largest", type=at_least_1024, nargs="?", const=2**24, metavar="N",
                        help="also look for the longest sequence, up to N tokens")
    parser.add_argument("--search-layers", type=int, help="for --largest (default: all)")
    parser.add_argument("--memory-gib", type=float,
                        help="for --largest (default: a GPU's memory less 1; needed on a CPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args()
    cuda = a.device == "cuda"
    if a.config:
        config = read_config(a.config)
    else:
        small = common.small_llama(a.hidden_size, a.layers, 1024, 2**22)
        config = ModelConfig.from_hf(small)
    kernel, _ = common.start_kernel(a, a.dtype, config.head_dim, 1024)  # --largest: multiples of it
    step = Step(config, a.recompute, a.offload, a.offload_optimizer, a.tile, a.dtype, a.device,
                a.threads, kernel)
    memory_gib = a.memory_gib or float("inf")
    if a.largest and a.memory_gib is None:
        if not cuda:
            parser.error("--largest needs --memory-gib on a CPU")
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 - 1
    # glibc in the children: what is freed goes back, so the peak is what was alive
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    title = (f"A training step by length: {config.num_hidden_layers} layers of width "
             f"{config.hidden_size}, --recompute {a.recompute}" + ", --offload" * a.offload
             + f", {a.dtype}")
    table = common.Table(a.out, title, a.device, {"arguments": vars(a)}, COLUMNS)
    for length in a.lengths:
        kernel, why = common.start_kernel(a, a.dtype, config.head_dim, length)
        row = {"S": length, "layers": config.num_hidden_layers, "kernel": kernel, "why": why,
               "predicted GiB": step.predicted_gib(length)[0]}
        found = measure(replace(step, kernel=kernel), length, memory_gib, 2 if cuda else 1)
        if found:
            peak, seconds = found
            row |= {"peak GiB": peak, "steps": len(seconds), "s a step": seconds[-1],
                    "tokens/s": length / seconds[-1], "seconds": seconds}
        table.add(row)
    rows = [row for row in table.rows if "peak GiB" in row]
    if a.largest:
        layers = a.search_layers or config.num_hidden_layers
        length, peak = largest(step, memory_gib, layers, a.largest, table)
    print("\nwhat has no peak does not fit")
    if len(rows) > 1:
        lengths = np.array([row["S"] for row in rows])
        peaks = np.array([row["peak GiB"] for row in rows])
        line = np.polyfit(lengths, peaks, 1)
        slope = line[0] * 2**30
        straight = abs(np.polyval(line, lengths) - peaks).max()
        predicted_line = np.polyfit(lengths, [row["predicted GiB"] for row in rows], 1)
        predicted = predicted_line[0] * 2**30
        table.save(bytes_per_token=slope, predicted_bytes_per_token=predicted,
                   off_the_line_gib=straight)
        print(f"slope: {slope:,.0f} bytes a token, predicted {predicted:,.0f} "
              f"({predicted / slope - 1:+.1%}); points lie within {straight:.3f} GiB of a line")
    if a.largest:
        _, on_host = step.predicted_gib(length)
        beside = f", {on_host:.1f} of the host's {host_bytes() / 2**30:.1f}" if on_host else ""
        print(f"largest: {length:,} tokens, peak {peak:.2f} GiB of {memory_gib:.1f}{beside}; "
              f"measured with {layers} of {config.num_hidden_layers} layers, the others' part "
              "planned")


if __name__ == "__main__":
    with one_line_errors():
        main()
