"""Peak memory of a rank in a training step, for context parallel rings of 1, 2 and 4, at fixed S
and at fixed S / cp.

    python -m benchmarks.memory                                    # CPU processes, gloo
    python -m benchmarks.memory --device cuda --length 131072      # one GPU a rank

"above the model": what the step adds to weights, gradients and optimizer state: activations,
mostly, which a ring of cp ranks shares. On a CPU the peak is the largest resident size of the
process (getrusage), on a GPU torch.cuda.max_memory_allocated.
"""
from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import torch

from benchmarks import common
from model import RECOMPUTE, Llama, ModelConfig
from parallel import Grid, ShardedAdamW, one_line_errors
from train import activate, peak_memory_gib

VOCABULARY = 8192
COLUMNS = {
    "series": "", "kernel": "", "cp": "", "S": ",", "S / cp": ",", "peak GiB": ".2f",
    "above the model": ".2f", "of the first": ".2f", "loss": ".4f",
}


def resident_gib(device: str) -> float:
    """Memory this process holds now (Linux, or a GPU's)."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 2**30
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def serve(pipe, rank: int, cp: int, port: int, length: int, config: dict, recompute: str,
          dtype: str, device: str, kernel: str) -> None:
    """Child process: build the model, make one step, answer (GiB held before it, GiB at the peak,
    loss)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cp),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    activate(kernel)
    grid = Grid.create(cp=cp, device=device)
    grid.kernel = kernel
    model = Llama(ModelConfig.from_hf(config), grid).initialise(0).to(device, getattr(torch, dtype))
    model.recompute = recompute
    optimizer = ShardedAdamW(model, grid)
    batch = common.random_batch(VOCABULARY, length)
    before = resident_gib(device)
    loss = common.step(model, optimizer, batch)
    pipe.send((before, peak_memory_gib(device), loss))
    grid.close()


def measure(cp: int, length: int, *options) -> dict:
    """The rank with the highest peak of a fresh ring of `cp` processes; `options` are the last of
    `serve`."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(cp):
        pipe, other = context.Pipe()
        context.Process(target=serve, args=(other, rank, cp, port, length, *options)).start()
        other.close()  # a child that dies is then an EOFError here
        pipes.append(pipe)
    answers = [pipe.recv() for pipe in pipes]
    before, peak, loss = max(answers, key=lambda answer: answer[1] - answer[0])
    return {"cp": cp, "S": length, "S / cp": length // cp, "peak GiB": peak,
            "above the model": peak - before, "loss": loss}


def main() -> None:
    parser = common.parser(__doc__, "out/memory.json", device="cpu")
    parser.add_argument("--length", type=int, default=16384,
                        help="S where it is fixed; a quarter of it is the fixed S / cp")
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    a = parser.parse_args()
    title = f"Peak of a rank in GiB, {a.layers} layers of width {a.hidden_size}, {a.dtype}"
    table = common.Table(a.out, title, a.device, {"arguments": vars(a)}, COLUMNS)
    series = {
        "fixed S": [a.length] * len(a.rings),
        "fixed S / cp": [a.length // 4 * cp for cp in a.rings],
    }
    for name, lengths in series.items():
        first = None
        for cp, length in zip(a.rings, lengths, strict=True):
            config = common.small_llama(a.hidden_size, a.layers, VOCABULARY, length)
            kernel, why = common.start_kernel(a, a.dtype, config["head_dim"], length, cp)
            row = measure(cp, length, config, a.recompute, a.dtype, a.device, kernel)
            first = first or row["above the model"]
            table.add({"series": name, "kernel": kernel, "why": why, **row,
                       "of the first": row["above the model"] / first})


if __name__ == "__main__":
    with one_line_errors():
        main()
