"""Ring attention over several processes against dense attention by the same kernel, forward and
backward, on the same hardware.

    python -m benchmarks.ring_attention
    python -m benchmarks.ring_attention --device cuda --ranks 8 --lengths 65536 131072

The first is for a CPU: 2 ranks of a thread against 1 process of 2; the second: 8 GPUs against one.

Three sides take turns, one pass each, so that a slow minute of the machine hits all: dense
attention in one process, our zigzag ring, and the same ring with contiguous shards, which leaves
early ranks idle. Medians; the ring's time is its slowest rank's. "of dense" is throughput: on a CPU
all sides have the same cores; on GPUs dense has one, and is scaled by their number.
"""
from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from argparse import ArgumentParser, Namespace

import torch

from benchmarks import common
from benchmarks.document_balance import pairs
from parallel import (
    Grid,
    Segments,
    block_backward,
    block_forward,
    merge,
    one_line_errors,
    ring_attention,
)
from train import activate, positive

COLUMNS = {
    "S": ",", "kernel": "", "dense, s": ".3f", "zigzag, s": ".3f", "zigzag, of dense": ".1%",
    "contiguous, s": ".3f", "contiguous, of dense": ".1%",
}


def zigzag_pass(q, k, v, d_out, grid: Grid, segments: Segments | None):
    """What training runs."""
    return torch.autograd.grad(ring_attention(q, k, v, grid, segments), (q, k, v), d_out)


def contiguous_pass(q, k, v, d_out, grid: Grid, segments: None):
    """The ring with shard r = positions r S / cp ... (r + 1) S / cp: a rank works only on hops that
    bring earlier keys."""
    q = q.detach()
    own_k = k.detach()
    own_v = v.detach()
    sources = [(grid.cp_rank - hop) % grid.cp for hop in range(grid.cp)]
    k, v = own_k, own_v
    for hop, source in enumerate(sources):
        arriving = grid.send_around(k, v) if hop + 1 < grid.cp else None
        if source <= grid.cp_rank:
            part, part_lse = block_forward(q, k, v, hop == 0, grid.kernel)
            if hop == 0:
                out = part.float()
                lse = part_lse
            else:
                merge(out, lse, part, part_lse)
        if arriving:
            k, v = arriving.wait()
    out = out.to(q.dtype)
    k, v = own_k, own_v
    gradients = None
    for hop, source in enumerate(sources):
        arriving = grid.send_around(k, v) if hop + 1 < grid.cp else None
        parts = None
        if source <= grid.cp_rank:
            parts = block_backward(d_out, q, k, v, out, lse, hop == 0, grid.kernel)
        if hop == 0:
            dq, dk, dv = (part.float() for part in parts)
        else:
            dk, dv = gradients.wait()
            if parts:
                for total, part in zip((dq, dk, dv), parts, strict=True):
                    total += part
        gradients = grid.send_around(dk, dv, tag=1)
        if arriving:
            k, v = arriving.wait()
    dk, dv = gradients.wait()
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


PASSES = {"dense": zigzag_pass, "zigzag": zigzag_pass, "contiguous": contiguous_pass}


def serve(pipe, rank: int, ranks: int, port: int, threads: int, heads: tuple[int, int],
          head_dim: int, dtype: str, device: str, asked: str) -> None:
    """Child process: one pass of a kind at a length by a kernel, of documents or of one, whenever
    asked, answering its seconds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    activate(asked)
    grid = Grid.create(cp=ranks, device=device)
    place = f"cuda:{rank}" if device == "cuda" else "cpu"
    while request := pipe.recv():
        kind, length, grid.kernel, segments = request
        tensors = []
        for n in (heads[0], heads[1], heads[1], heads[0]):  # q, k, v and the output's gradient
            shape = (1, n, length // ranks, head_dim)
            tensors.append(torch.randn(shape, dtype=getattr(torch, dtype), device=place))
        *leaves, d_out = tensors
        for x in leaves:
            x.requires_grad_()
        grid.barrier()
        start = time.perf_counter()
        gradients = PASSES[kind](*leaves, d_out, grid, segments)
        gradients[0].sum().item()  # waits for the GPU
        pipe.send(time.perf_counter() - start)
    grid.close()


def start_ring(ranks: int, threads: int, a: Namespace) -> list:
    """Children that form a ring of so many ranks: (process, pipe) of each."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        pipe, other = context.Pipe()
        arguments = (other, rank, ranks, port, threads, (a.heads, a.kv_heads), a.head_dim, a.dtype,
                     a.device, a.attention)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        children.append((process, pipe))
    return children


def seconds_of(children: list, kind: str, length: int, kernel: str,
               segments: Segments | None = None) -> float:
    """One pass of a ring: its slowest rank's time."""
    for _, pipe in children:
        pipe.send((kind, length, kernel, segments))
    return max(pipe.recv() for _, pipe in children)


def end_ring(children: list) -> None:
    for _, pipe in children:
        pipe.send(None)
    for process, _ in children:
        process.join()


def add_shape_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--kv-heads", type=positive, default=2)
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=5)


def check_shape(parser: ArgumentParser, a: Namespace, multiple: int) -> None:
    """End with a line if heads or lengths cannot be cut."""
    if a.heads % a.kv_heads:
        parser.error(f"--heads {a.heads} must be a multiple of --kv-heads {a.kv_heads}")
    for length in a.lengths:
        if length % multiple:
            parser.error(f"--lengths {length} must be a multiple of {multiple}")


def work(ranks: int, kind: str) -> list[list[float]]:
    """Scores computed by each rank at each hop, as a share of all S (S + 1) / 2."""
    local = 840  # positions a rank; any even number gives the same shares
    length = ranks * local
    table = pairs(length, ranks, [0, length])
    if kind == "contiguous":  # below the diagonal, then all earlier keys
        own = local * (local + 1) // 2
        table = [[own, *[local**2] * rank, *[0] * (ranks - 1 - rank)] for rank in range(ranks)]
    return [[2 * number / (length * (length + 1)) for number in hops] for hops in table]


def main() -> None:
    parser = common.parser(__doc__, "out/ring_attention.json", device="cpu")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ranks", type=positive, default=2)
    add_shape_arguments(parser)
    a = parser.parse_args()
    check_shape(parser, a, 2 * a.ranks)
    chosen = [common.start_kernel(a, a.dtype, a.head_dim, n, a.ranks) for n in a.lengths]
    for kind in ("zigzag", "contiguous"):
        print(f"{kind}: share of all scores by hop 0 ... {a.ranks - 1}")
        for rank, hops in enumerate(work(a.ranks, kind)):
            shares = " ".join(f"{100 * share:5.1f} %" for share in hops)
            print(f"  rank {rank}: {shares}   sum {100 * sum(hops):5.1f} %")
    dense = start_ring(1, a.ranks if a.device == "cpu" else 1, a)
    ring = start_ring(a.ranks, 1, a)
    title = (f"Rings of {a.ranks} against dense attention, {a.dtype}, {a.heads}:{a.kv_heads} heads "
             f"of {a.head_dim}")
    table = common.Table(a.out, title, a.device, {"arguments": vars(a)}, COLUMNS)
    for length, (kernel, why) in zip(a.lengths, chosen, strict=True):
        seconds = {kind: [] for kind in PASSES}
        for _ in range(a.repeats + 1):
            for kind in PASSES:
                side = dense if kind == "dense" else ring
                seconds[kind].append(seconds_of(side, kind, length, kernel))
        # the first pass warms up
        medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
        scale = a.ranks if a.device == "cuda" else 1
        row = {"S": length, "kernel": kernel, "why": why, "seconds": seconds}
        for kind, median in medians.items():
            row[f"{kind}, s"] = median
            row[f"{kind}, of dense"] = medians["dense"] / (scale * median)
        table.add(row)
    for side in (dense, ring):
        end_ring(side)


if __name__ == "__main__":
    with one_line_errors():
        main()
