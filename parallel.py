"""Where everything happens: the process grid, tensor parallelism, ring attention, the sharded optimizer.

Eight or 256 processes hold one sequence of S tokens together. A grid of dp x cp x tp splits the work three ways:

    tp  tensor parallel    every matrix is cut into tp pieces; between the matrices each rank keeps 1/tp of the positions
    cp  context parallel   a rank holds S / cp positions of the sequence; keys and values travel around a ring
    dp  data parallel      each replica (cp x tp ranks) takes other sequences of the batch

    what a rank holds                             shape
    activations between blocks                    (B, S / (cp tp), hidden)
    q, k, v inside attention                      (B, H / tp, S / cp, D), k and v with Hkv / tp heads
    weights and their float32 gradients           1 / tp
    float32 master weights, AdamW's two moments   1 / (tp dp cp)

One process is the grid 1 x 1 x 1 and runs the same code: a collective over one rank returns its argument. Read in order:
`Grid` (who is who, and every communication there is), the tensor-parallel layers, `ring_attention`, `ShardedAdamW`.
"""
from __future__ import annotations

import argparse
import atexit
import faulthandler
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# which ranks talk to each other, by what they do together
GROUPS = {"tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "cp_tp": ("cp", "tp"), "dp_cp": ("dp", "cp"), "all": ("dp", "cp", "tp")}


# ------------------------------------------------------------------------------------------------------- the grid


@dataclass
class Grid:
    """This process's place in a dp x cp x tp grid, tp fastest, and every communication it takes part in.

    `groups` holds a process group for each entry of GROUPS with more than one rank; a collective over a missing one has
    one member and nothing to do. `timeout` is in seconds, see `restart_timer`.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    timeout: float = field(default=600.0, repr=False, compare=False)
    is_owner: bool = field(default=False, repr=False, compare=False)  # of torch's process group, which it closes

    @classmethod
    def create(cls, tp: int = 1, cp: int = 1, device: str | None = None, timeout: float = 600.0) -> Grid:
        """The grid of this job: world = dp x cp x tp processes, NCCL on cuda, gloo on cpu. Call it on every rank.

        One process needs no torch.distributed. More calls make other grids of the same processes. Raises ValueError for a
        grid that does not fit the number of processes.
        """
        rank, world = launched()
        check_grid(tp, cp, world)
        if not 0 < timeout < 1e7:
            raise ValueError(f"--timeout {timeout:g} must be a number of seconds above 0")
        grid = cls(world // (cp * tp), cp, tp, rank, timeout=timeout)
        if world == 1:
            return grid
        cuda = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda:
            if local >= torch.cuda.device_count():
                raise ValueError(f"more processes than GPUs on this machine: it has {torch.cuda.device_count()}; start as many")
            torch.cuda.set_device(local)
        patience = timedelta(seconds=2 * timeout + 60)  # torch's own, for programs that start no timer
        if not dist.is_initialized():
            grid.is_owner = True
            store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            store = dist.PrefixStore(f"attempt {restarts()}", store)  # a restarted job must not find its dead ranks' addresses
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=patience,
                                    device_id=torch.device("cuda", local) if cuda else None)
            # torchrun sends it when another rank has failed; while train.py collects signals, that comes first
            faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)
        atexit.register(grid.leave)  # gloo's threads abort a process that ends without
        ranks = torch.arange(world).view(grid.dp, cp, tp)
        for name, axes in GROUPS.items():
            together = [i for i, axis in enumerate(("dp", "cp", "tp")) if axis in axes]
            size = grid.size(name)
            if size > 1:
                members = ranks.movedim(together, tuple(range(-len(together), 0))).reshape(-1, size)
                grid.groups[name] = dist.new_subgroups_by_enumeration(members.tolist(), timeout=patience)[0]
        return grid

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp * self.cp)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    @property
    def sequence_multiple(self) -> int:
        """Sequence lengths that cut evenly: 2 chunks a context-parallel rank, each in tp pieces; 1 for one process."""
        return 1 if self.tp * self.cp == 1 else 2 * self.cp * self.tp

    def size(self, group: str) -> int:
        """How many ranks the group of this name has."""
        return math.prod(getattr(self, axis) for axis in GROUPS[group])

    def all_reduce(self, x: Tensor, group: str, operation=dist.ReduceOp.SUM) -> Tensor:
        """Sum (or maximum) of every rank's x, in place."""
        if group in self.groups:
            dist.all_reduce(x, op=operation, group=self.groups[group])
        return x

    def all_gather(self, x: Tensor, group: str, out: Tensor | None = None) -> Tensor:
        """(...) -> (ranks, ...): every rank's x, into `out` if that is given. One rank's x is not copied."""
        if group not in self.groups:
            return x[None]
        out = x.new_empty(self.size(group), *x.shape) if out is None else out
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(out.view(-1), x.contiguous().view(-1), group=self.groups[group])
        return out

    def reduce_scatter(self, x: Tensor, group: str) -> Tensor:
        """(ranks, ...) -> (...): the sum over ranks of the part that is this rank's."""
        if group not in self.groups:
            return x[0]
        out = torch.empty_like(x[0], memory_format=torch.contiguous_format)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
        scatter(out.view(-1), x.contiguous().view(-1), group=self.groups[group])
        return out

    def broadcast(self, x: Tensor, group: str = "all") -> Tensor:
        """The group's first rank's x, in place."""
        if group in self.groups:
            dist.broadcast(x, group=self.groups[group], group_src=0)
        return x

    def post_hop(self, *leaving: Tensor, tag: int = 0):
        """Start sending tensors to the next rank of the ring and receiving the previous one's; call the result to wait for
        those, a tuple. The caller leaves its own alone until then. One rank's ring is itself.
        """
        if "cp" not in self.groups:
            return lambda: leaving
        group, leaving = self.groups["cp"], [x.contiguous() for x in leaving]
        arriving = tuple(torch.empty_like(x) for x in leaving)
        ring = dist.get_process_group_ranks(group)
        to, origin = ring[(self.cp_rank + 1) % self.cp], ring[(self.cp_rank - 1) % self.cp]
        messages = []
        for number, (out, into) in enumerate(zip(leaving, arriving), len(leaving) * tag):
            messages += [dist.P2POp(dist.isend, out, to, group, number), dist.P2POp(dist.irecv, into, origin, group, number)]
        works = dist.batch_isend_irecv(messages)

        def wait() -> tuple[Tensor, ...]:
            for work in works:
                work.wait()
            return arriving

        return wait

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.groups:
            dist.barrier(group=self.groups["all"])

    def restart_timer(self, stretches: int = 1) -> None:
        """Give this rank `timeout` seconds from now for each of so many stretches of work, its own or what it waits for.

        Then it prints where it stands and ends, and torchrun ends the others: a rank that hangs keeps all others waiting, so
        each of them says where. Call it wherever a stretch begins: a micro-batch, a validation sequence, a prompt, a token, a
        file. `close` stops the timer. Alone, a process keeps nobody waiting.
        """
        if self.groups:
            faulthandler.dump_traceback_later(stretches * self.timeout, exit=True)

    def close(self) -> None:
        """Leave the job in step with the others: no rank ends before all have come here."""
        self.barrier()
        self.leave()

    def leave(self) -> None:
        """Stop the timer and give the process groups up; a program that just ends does this by itself."""
        if self.groups:
            faulthandler.cancel_dump_traceback_later()
            self.groups.clear()
        if self.is_owner and dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------ tensor parallel with sequence parallel
#
# Megatron's layers (arXiv 1909.08053, 2205.05198). A pair of matrices is cut so that one communication before it and one
# after it suffice. Between pairs, norms and residuals hold only this rank's share of the positions, m = S / (cp tp):
#
#     (B, m, hidden) --all-gather--> (B, tp, m, hidden) --columns--> (B, tp, m, wide / tp)
#     (B, m, hidden) <-reduce-scatter- (B, tp, m, hidden) <---rows--- (B, tp, m, wide / tp)
#
# In backward the two communications swap places. (tp, m), flattened, are the S / cp positions that this rank of the ring
# holds, in order. Each position is worked on alone, so a pair can run on a tile of the m positions at a time, and does.


class GatherSequence(torch.autograd.Function):
    """(B, m, hidden) -> (B, tp, m, hidden): every tp rank's positions; the gradients are summed and scattered back."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return gathered(x, grid)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return scattered(gradient, ctx.grid), None


class ScatterSequence(torch.autograd.Function):
    """(B, tp, m, hidden) -> (B, m, hidden): the sum over tp ranks of this rank's positions; the gradients are gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return scattered(x, grid)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.grid), None


def gathered(x: Tensor, grid: Grid) -> Tensor:
    return grid.all_gather(x, "tp").movedim(0, 1)  # (tp, B, m, hidden) -> (B, tp, m, hidden)


def scattered(x: Tensor, grid: Grid) -> Tensor:
    return grid.reduce_scatter(x.movedim(1, 0), "tp")  # (tp, B, m, hidden) -> (B, m, hidden)


class SumOverRing(torch.autograd.Function):
    """The sum over cp ranks of a scalar each has a part of; a rank's own part has gradient 1."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        return grid.all_reduce(x.clone(), "cp")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def gather_sequence(x: Tensor, grid: Grid) -> Tensor:
    """(B, m, hidden) -> (B, tp, m, hidden): call it once before all column-parallel layers that read x."""
    return GatherSequence.apply(x, grid)


def scatter_sequence(x: Tensor, grid: Grid) -> Tensor:
    """Partial sums (B, tp, m, hidden) of every tp rank -> (B, m, hidden), summed."""
    return ScatterSequence.apply(x, grid)


class ColumnParallelLinear(nn.Linear):
    """The rank's 1 / tp of the outputs: x (..., in), whole -> (..., out / tp). Arguments are the whole layer's sizes."""

    shard_dims = {"weight": 0, "bias": 0}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features, out_features // grid.tp, bias)


class FusedLinear(torch.autograd.Function):
    """x @ (weights below each other).T, one product for several layers that read the same x."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, stacked(weights))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        d_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # (all outputs, in)
        return gradient @ stacked(weights), *d_weight.split([len(weight) for weight in weights])


def adjacent(weights: tuple[Tensor, ...]) -> bool:
    """Whether matrices follow each other in memory: ShardedAdamW sees to it."""
    shared = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    return shared and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in zip(weights, weights[1:]))


def stacked(weights: tuple[Tensor, ...]) -> Tensor:
    """Matrices below each other: as they lie, if they are adjacent, else a copy."""
    if adjacent(weights):
        return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
    return torch.cat(weights)


def fused_linear(x: Tensor, *layers: ColumnParallelLinear) -> list[Tensor]:
    """[layer(x) for layer in layers], computed as one product: x (..., in) -> (..., out / tp) each."""
    weights = tuple(layer.weight for layer in layers)
    if not torch.is_grad_enabled() and not adjacent(weights):
        return [layer(x) for layer in layers]  # inference: a copy of the weights would cost more than a token's products
    outputs = FusedLinear.apply(x, *weights).split([len(weight) for weight in weights], -1)
    return [out if layer.bias is None else out + layer.bias for out, layer in zip(outputs, layers)]


class RowParallelLinear(nn.Linear):
    """The rank's 1 / tp of the inputs: x (B, tp, m, in / tp) -> (B, m, out), summed over ranks, the bias added once."""

    shard_dims = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features // grid.tp, out_features, bias)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x = scatter_sequence(F.linear(x, self.weight), self.grid)
        return x if self.bias is None else x + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """The rank's V / tp rows of the table: tokens (B, tp, m) int64 -> (B, m, hidden). Arguments are the whole table's.

    `rows` of the m positions are looked up at a time, so that no tensor of tp m x hidden is made.
    """

    shard_dims = {"weight": 0}

    def __init__(self, num_embeddings: int, embedding_dim: int, grid: Grid) -> None:
        super().__init__(num_embeddings // grid.tp, embedding_dim)
        self.grid = grid

    def forward(self, tokens: Tensor, rows: int) -> Tensor:
        return Lookup.apply(self.weight, tokens, rows, self.grid)


class Lookup(torch.autograd.Function):
    """The rows of tokens. Their gradients are summed in float32: a token that occurs thousands of times needs that."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, rows: int, grid: Grid) -> Tensor:
        ctx.save_for_backward(weight, tokens)
        ctx.rows, ctx.grid = rows, grid
        out = weight.new_empty(tokens.shape[0], tokens.shape[2], weight.shape[1])
        for part, x in zip(tokens.split(rows, 2), out.split(rows, 1)):
            row, mine = local_rows(part, len(weight), grid)
            x.copy_(scattered(F.embedding(row, weight).masked_fill_(~mine[..., None], 0.0), grid))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, tokens = ctx.saved_tensors
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part, d_x in zip(tokens.split(ctx.rows, 2), gradient.split(ctx.rows, 1)):
            row, mine = local_rows(part, len(weight), ctx.grid)
            d_x = gathered(d_x, ctx.grid).to(d_weight.dtype).masked_fill_(~mine[..., None], 0.0)
            d_weight.index_add_(0, row.flatten(), d_x.flatten(0, 2))
        return d_weight, None, None, None


def local_rows(tokens: Tensor, rows: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where tokens stand in this rank's `rows` rows of the vocabulary, and which are there at all (the others: row 0)."""
    row = tokens - grid.tp_rank * rows
    mine = (row >= 0) & (row < rows)
    return row.masked_fill(~mine, 0), mine


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target] of each row, the vocabulary spread over tp ranks, and the gradient in the same pass.

    logits (N, V / tp) float32 or float64, targets (N,) int64 in [0, V). Returns losses (N,) and normalisers (N, 1), the
    same on every tp rank. `logits` is overwritten by (softmax - onehot) * normaliser: divided by it, this rank's part of
    the gradient of the summed losses. Two small all-reduces; no rank ever sees another's logits.
    """
    row, mine = local_rows(targets, logits.shape[1], grid)
    largest = grid.all_reduce(logits.amax(1, keepdim=True), "tp", dist.ReduceOp.MAX)  # (N, 1)
    picked = logits.gather(1, row[:, None]).masked_fill(~mine[:, None], 0.0)
    logits.sub_(largest).exp_()
    normaliser, picked = grid.all_reduce(torch.stack([logits.sum(1, keepdim=True), picked]), "tp")  # (N, 1) each
    logits.scatter_add_(1, row[:, None], -normaliser.masked_fill(~mine[:, None], 0.0))
    return (normaliser.log() + largest - picked)[:, 0], normaliser


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """Along which dimension tp cuts each parameter of a model, by name; None: every tp rank holds all of it (norms)."""
    return {f"{prefix}.{name}" if prefix else name: getattr(module, "shard_dims", {}).get(name)
            for prefix, module in model.named_modules() for name, _ in module.named_parameters(recurse=False)}


def whole_shape(shape: tuple[int, ...], dim: int | None, grid: Grid) -> tuple[int, ...]:
    """Shape of a whole parameter, from that of a tp rank's shard of it."""
    return tuple(size * grid.tp if i == dim else size for i, size in enumerate(shape))


def unshard(x: Tensor, dim: int | None, grid: Grid) -> Tensor:
    """A whole parameter from the tp ranks' shards of it, on every rank."""
    return x if dim is None or grid.tp == 1 else torch.cat(list(grid.all_gather(x, "tp")), dim)


# --------------------------------------------------------------------------------- ring attention (context parallel)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid, segments: list[list[int]] | None = None) -> Tensor:
    """Causal attention over the whole sequence; q (B, H, S / cp, D), k and v (B, Hkv, S / cp, D), zigzag -> as q.

    The sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r (zigzag), an early and a late one, so that
    causal attention costs every rank the same at every hop. Keys and values (K V) go around the ring (arXiv 2310.01889),
    queries stay. Who computes what with whose K V, for cp = 4, chunks 0 ... 7:

        rank  its chunks   hop 0: own K V    hop 1             hop 2             hop 3
         0      0, 7       0: causal         3: 7 x (3, 4)     2: 7 x (2, 5)     1: 7 x (1, 6)
         1      1, 6       1: causal         0: (1, 6) x 0     3: 6 x (3, 4)     2: 6 x (2, 5)
         2      2, 5       2: causal         1: (2, 5) x 1     0: (2, 5) x 0     3: 5 x (3, 4)
         3      3, 4       3: causal         2: (3, 4) x 2     1: (3, 4) x 1     0: (3, 4) x 0

    "3: 7 x (3, 4)": at hand are the K V of rank 3; the queries of chunk 7 see the keys of chunks 3 and 4, all of them. What
    is not listed lies in the future. Every hop is two chunk products (hop 0: two half ones and a whole one). Its steps:

        1. post: send the K V at hand to rank + 1, receive the next from rank - 1; nobody waits yet
        2. compute this block: out and log-sum-exp (lse) of the queries over these keys alone
        3. merge into the float32 result: the weights are sigmoids of lse differences, so nothing can overflow
        4. wait for the K V posted in step 1

    Backward goes around once more. It rebuilds a block's softmax from the lse of the whole row, so a block yields parts of
    the true gradients and there is nothing to merge: dQ stays and is summed; dK dV travel with their K V, every rank adds
    its part, and the last hop brings them home.

    A hop moves 2 B Hkv (S / cp) D elements of K V in the compute type, and in backward as many of dK dV in float32 (on the
    first hop, where there is no sum yet, in the compute type): for S = 1M, cp = 4, Hkv / tp = 2, D = 128 in bfloat16 that is
    256 MiB, and 256 + 512 MiB.

    `segments` (from `document_segments`) is the cross-document mask of the ablation: each document attends to itself only,
    one causal block a document, so no S x S mask is ever built. The recipe itself leaves it out (arXiv 2504.06214,
    section 3.1). Raises ValueError for segments on a ring of several ranks.
    """
    return RingAttention.apply(q, k, v, grid, segments)


class RingAttention(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, grid: Grid, segments: list[list[int]] | None) -> Tensor:
        out, lse = ring_forward(q, k, v, grid, segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.grid, ctx.segments = grid, segments
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *ring_backward(d_out, *ctx.saved_tensors, ctx.grid, ctx.segments), None, None


def ring_forward(q: Tensor, k: Tensor, v: Tensor, grid: Grid, segments: list[list[int]] | None = None) -> tuple[Tensor, Tensor]:
    """Shapes of `ring_attention` -> out (B, H, S / cp, D) in q's type and lse (B, H, S / cp), of whole rows."""
    if segments is not None:
        return by_document(lambda *x: ring_forward(*x, grid), segments, grid, q, k, v)
    kv = (k, v)
    for hop in range(grid.cp):
        arrives = grid.post_hop(*kv) if hop + 1 < grid.cp else None
        rows, keys = zigzag_block(grid.cp_rank, (grid.cp_rank - hop) % grid.cp, q.shape[2])
        part, part_lse = block_forward(q[:, :, rows], kv[0][:, :, keys], kv[1][:, :, keys], causal=hop == 0)
        if hop == 0:
            out, lse = part, part_lse
        else:
            out = out.to(torch.promote_types(q.dtype, torch.float32))  # a copy at the first merge only
            merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        if arrives:
            kv = arrives()
    return out.to(q.dtype), lse


def ring_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grid: Grid,
                  segments: list[list[int]] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of this rank's positions, summed in float32 over the ring."""
    if segments is not None:
        return by_document(lambda *x: ring_backward(*x, grid), segments, grid, d_out, q, k, v, out, lse)
    wide, kv, gradients_arrive = torch.promote_types(q.dtype, torch.float32), (k, v), None
    for hop in range(grid.cp):
        arrives = grid.post_hop(*kv) if hop + 1 < grid.cp else None
        rows, keys = zigzag_block(grid.cp_rank, (grid.cp_rank - hop) % grid.cp, q.shape[2])
        d_q, *parts = block_backward(d_out[:, :, rows], q[:, :, rows], kv[0][:, :, keys], kv[1][:, :, keys], out[:, :, rows],
                                     lse[:, :, rows], causal=hop == 0)
        if hop == 0:
            dq, d_kv = d_q, parts
        else:
            dq = dq.to(wide)
            dq[:, :, rows] += d_q
            d_kv = [x.to(wide) for x in gradients_arrive()]  # of the K V at hand, from the ranks that had them before
            d_kv[0][:, :, keys] += parts[0]
            d_kv[1][:, :, keys] += parts[1]
        gradients_arrive = grid.post_hop(*d_kv, tag=1)  # to the rank that has these K V next; at last, home
        if arrives:
            kv = arrives()
    dk, dv = gradients_arrive()
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def by_document(attention: Callable, segments: list[list[int]], grid: Grid, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`attention` of each document of each row alone, put together along (B, H, S, ...)."""
    if grid.cp > 1:
        raise ValueError(f"the cross-document mask works on whole sequences, --cp 1; this grid has cp {grid.cp}")
    rows = []
    for row, borders in enumerate(segments):
        documents = [attention(*(x[row:row + 1, :, start:end] for x in inputs)) for start, end in zip(borders, borders[1:])]
        rows.append([torch.cat(parts, dim=2) for parts in zip(*documents)])  # (1, H, S, ...) each
    return tuple(torch.cat(parts) for parts in zip(*rows))


def zigzag_block(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which of `rank`'s queries see which of `source`'s keys, both of `length` local positions (see `ring_attention`)."""
    half, everything = length // 2, slice(None)
    if source == rank:
        return everything, everything  # under the causal mask: local order is global order
    return (everything, slice(half)) if source < rank else (slice(half, None), everything)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's result to the float32 one, in place: softmax over the union of their keys."""
    share = torch.sigmoid(part_lse - lse)  # of the new keys, in [0, 1]
    out.lerp_(part.to(out.dtype), share[..., None])
    lse.sub_(F.logsigmoid(lse - part_lse))  # log(exp(lse) + exp(part_lse))


def attention_kernel(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the kernel that computes blocks there. Raises ValueError for a type or head dimension it does not take."""
    if not device.startswith("cuda"):
        return "SDPA flash (CPU)"
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"--dtype {str(dtype).removeprefix('torch.')} cannot be used on cuda, whose flash attention takes "
                         "bfloat16; use --dtype bfloat16")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"config.json: head_dim {head_dim} cannot be used on cuda; its flash attention takes 8, 16, ... 256")
    return "SDPA flash (CUDA)"


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of one block, and its rows' log-sum-exp in float32 (float64 for float64).

    q (B, H, S, D), k and v (B, Hkv, N, D) -> (B, H, S, D), (B, H, S). K and V keep their own number of heads: grouped-query
    attention never repeats them in memory. Together with `block_backward` the one place that knows a kernel.
    """
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def block_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                   causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block, given `out` and `lse` of the queries' whole rows (over every block)."""
    if q.is_cuda:
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the random state of dropout, which there is none of
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, q, k, v, out, lse, 0.0, causal)


def zigzag_shard(x: Tensor, grid: Grid, dim: int) -> Tensor:
    """This rank's two chunks of a whole sequence, S -> S / cp along `dim`. Raises ValueError if 2 cp does not divide S."""
    if grid.cp > 1 and x.shape[dim] % (2 * grid.cp):
        raise ValueError(f"a sequence of {x.shape[dim]} cannot be cut into 2 x cp = {2 * grid.cp} equal chunks")
    chunks = x.tensor_split(2 * grid.cp, dim)
    return torch.cat((chunks[grid.cp_rank], chunks[-1 - grid.cp_rank]), dim)


def zigzag_unshard(x: Tensor, grid: Grid, dim: int) -> Tensor:
    """The whole sequence on every rank, S / cp -> S along `dim`; no gradient flows through it."""
    early, late = zip(*(shard.tensor_split(2, dim) for shard in grid.all_gather(x, "cp")))
    return torch.cat((*early, *late[::-1]), dim)


def zigzag_positions(seq_len: int, grid: Grid) -> Tensor:
    """Positions in the whole sequence of what this rank holds: int64 (seq_len / cp,)."""
    return zigzag_shard(torch.arange(seq_len), grid, 0)


def document_segments(document_ids: Tensor) -> list[list[int]]:
    """Where documents begin and end: ids (B, S) -> for each row the borders [0, ..., S], on the host."""
    rows = []
    for row in document_ids:
        starts = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
        rows.append([0, *starts, row.numel()])
    return rows


def attend_earlier(q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Add to causal attention among new tokens what they find in earlier ones, which they all see.

    q, out (B, H, s, D) and lse (B, H, s), as from `ring_forward`; k and v (B, Hkv, N, D), this rank's N >= 0 earlier tokens, in
    any order -> out. Ranks may hold unequal numbers of keys, so queries go around the ring and keys stay (the pass-Q of
    arXiv 2411.01783); with them goes what they have found, and the last hop brings it home.
    """
    visiting = q, out.to(lse.dtype), lse
    for _ in range(grid.cp):
        if k.shape[2]:
            merge(*visiting[1:], *block_forward(visiting[0], k, v, causal=False))
        visiting = grid.post_hop(*visiting)()
    return visiting[1].to(q.dtype)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """Attention of one new token over keys spread over the ring, in any order: each rank's part is weighted by its lse.

    q (B, H, 1, D), the same on every cp rank; k and v (B, Hkv, N, D), this rank's N >= 0 -> (B, H, 1, D) on every rank.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    if k.shape[2]:
        out, lse = block_forward(q, k, v, causal=False)
    share = grid.all_gather(lse, "cp").softmax(0)[..., None]  # (cp, B, H, 1, 1)
    return (share * grid.all_gather(out, "cp")).sum(0).to(q.dtype)


# ------------------------------------------------------------------------------- data parallel: the sharded optimizer


class ShardedAdamW:
    """AdamW (arXiv 1711.05101) whose float32 state is spread over the dp x cp ranks (ZeRO-1, arXiv 1910.02054).

    Every parameter owns one aligned range of two flat buffers: the weights, of which the parameters are views, and their
    float32 gradients, in which micro-batches accumulate (`parameter.grad` is a view too, whatever the parameter's type).
    Both are cut into dp x cp equal shards at any place. A step is: sum the gradients and keep the own shard of the sum
    (reduce-scatter), update that shard's master weights and moments, give the new weights to all (all-gather).
    Matrices decay; vectors (norms and biases) do not.

    Order of the ranges: matrices, vectors that tp cuts, vectors that every tp rank holds whole. The last each saw only
    their rank's positions, so their gradients are summed over tp, and they count once in the norm.

    Args: model (its parameters move into the flat buffers), grid; betas, eps and weight_decay as in torch; `on_host` keeps the
    float32 state in host memory, where the update then runs: 12 bytes a parameter less on the GPU, two copies a step more.
    """

    ALIGNMENT = 64  # elements: every view starts on a 128-byte border or better, so kernels round alike in every run
    KINDS = ("master", "exp_avg", "exp_avg_sq")

    def __init__(self, model: nn.Module, grid: Grid, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1, on_host: bool = False) -> None:
        self.grid, self.dims = grid, shard_dims(model)
        ordered = sorted(model.named_parameters(), key=lambda item: (item[1].ndim < 2, self.dims[item[0]] is None))  # stable
        self.parameters, self._ranges, total, matrices, cut = dict(ordered), {}, 0, 0, 0
        for name, parameter in ordered:
            self._ranges[name] = slice(total, total + parameter.numel())
            total += -(-parameter.numel() // self.ALIGNMENT) * self.ALIGNMENT
            matrices = total if parameter.ndim >= 2 else matrices
            cut = total if self.dims[name] is not None else cut
        self._whole_from = cut  # where the ranges begin that every tp rank holds whole
        shards = grid.size("dp_cp")
        total = -(-total // (self.ALIGNMENT * shards)) * self.ALIGNMENT * shards
        first, size = ordered[0][1], total // shards
        dtype = torch.promote_types(first.dtype, torch.float32)  # float64 models (tests) keep float64
        self.weights = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.gradient = torch.zeros(total, dtype=dtype, device=first.device)
        for name in self.parameters:
            self._adopt(name)
        self._start = (grid.dp_rank * grid.cp + grid.cp_rank) * size  # of this rank's shard
        self._own = self.weights[self._start:self._start + size]
        self._device = torch.device("cpu") if on_host else first.device  # of the state
        shared = first.dtype == dtype and not on_host  # float32 weights are their own master
        self.master = self._own if shared else self._own.to(self._device, dtype, copy=True)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        border = min(max(matrices - self._start, 0), size)
        self._parts = [slice(0, border), slice(border, size)]
        self._adamw = torch.optim.AdamW([{"params": [self.master[part]], "weight_decay": decay}
                                         for part, decay in zip(self._parts, (weight_decay, 0.0))],
                                        lr=0.0, betas=betas, eps=eps, fused=True)
        for part, group in zip(self._parts, self._adamw.param_groups):
            self._adamw.state[group["params"][0]] = {"step": torch.zeros((), device=self._device),
                                                     "exp_avg": self.exp_avg[part], "exp_avg_sq": self.exp_avg_sq[part]}

    def _view(self, flat: Tensor, name: str) -> Tensor:
        return flat[self._ranges[name]].view(self.parameters[name].shape)

    def _adopt(self, name: str) -> None:
        """Move one parameter and its gradient into the flat buffers."""
        parameter, place = self.parameters[name], self._view(self.weights, name)
        place.copy_(parameter.detach())
        parameter.data = place
        parameter.grad_dtype = self.gradient.dtype
        parameter.grad = self._view(self.gradient, name)

    def zero_gradients(self) -> None:
        """Forget the accumulated gradients: call before the first backward of a step."""
        self.gradient.zero_()

    def reduce_gradients(self) -> Tensor:
        """Sum every rank's accumulated gradients: this rank's shard of the sum, a flat float32 tensor. Call once a step."""
        self.grid.all_reduce(self.gradient[self._whole_from:], "tp")
        return self.grid.reduce_scatter(self.gradient.view(self.grid.size("dp_cp"), -1), "dp_cp")

    def gradient_norm(self, shard: Tensor) -> float:
        """Euclidean norm over all parameters of the whole model, each counted once, from every rank's reduced shard."""
        counted = shard if self.grid.tp_rank == 0 else shard[:max(0, self._whole_from - self._start)]
        square = torch.linalg.vector_norm(counted).double() ** 2
        return self.grid.all_reduce(square, "all").sqrt().item()

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float = 0.0) -> float:
        """One AdamW update from the accumulated gradients, clipped to `max_norm` (0: no clipping).

        Returns the gradient norm before clipping. Raises ArithmeticError, with nothing updated, if it is not finite.
        """
        shard = self.reduce_gradients()
        norm = self.gradient_norm(shard)
        if not norm < float("inf"):
            raise ArithmeticError(f"the gradient norm is {norm}")
        if 0 < max_norm < norm:
            shard.mul_(max_norm / norm)
        for part, group in zip(self._parts, self._adamw.param_groups):
            group["lr"], group["params"][0].grad = learning_rate, shard[part].to(self._device)
        self._adamw.step()
        self._publish()
        return norm

    def _publish(self) -> None:
        """Round the master weights into this rank's shard of the weights, and collect the others'."""
        self._own.copy_(self.master)
        self.grid.all_gather(self._own, "dp_cp", out=self.weights.view(self.grid.size("dp_cp"), -1))

    @property
    def steps(self) -> int:
        """How many updates have been made: AdamW's bias correction needs it."""
        return int(next(iter(self._adamw.state.values()))["step"])

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every parameter's whole tensor of one kind of state, in the order of `state`."""
        return {name: (whole_shape(parameter.shape, self.dims[name], self.grid), self.master.dtype)
                for name, parameter in self.parameters.items()}

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter for a kind of KINDS, on every rank, one at a time.

        The gradient buffer is where a kind is put together: call this between steps, and use a kind up before the next.
        """
        parts = self.gradient.view(self.grid.size("dp_cp"), -1)
        own = parts[self._start // parts.shape[1]].copy_(getattr(self, kind))
        whole = self.grid.all_gather(own, "dp_cp", out=parts).view(-1)
        for name in self.parameters:
            yield name, unshard(self._view(whole, name), self.dims[name], self.grid)

    def needed(self) -> list[str]:
        """Names of the parameters of which this rank holds some state."""
        end = self._start + self.master.numel()
        return [name for name, place in self._ranges.items() if place.start < end and place.stop > self._start]

    @torch.no_grad()
    def load_state(self, kinds: dict[str, dict[str, Tensor]], steps: int) -> None:
        """Restore from this tp rank's shards of the `needed` parameters, for every kind, and the number of `steps`."""
        end = self._start + self.master.numel()
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                place = self._ranges[name]
                low, high = max(place.start, self._start), min(place.stop, end)
                part = tensor.reshape(-1)[low - place.start:high - place.start]
                getattr(self, kind)[low - self._start:high - self._start] = part
        for part in self._adamw.state.values():
            part["step"].fill_(steps)
        self._publish()


# ------------------------------------------------------------------------------------------ what every command needs


def launched() -> tuple[int, int]:
    """(rank, number of processes) of this job, as torchrun tells its processes; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often torchrun --max-restarts has started this job anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and whose usage errors `one_line_errors` tells like any other mistake."""

    def __init__(self, description: str, **more) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more)

    def error(self, message: str) -> None:
        raise ValueError(message)


def checked(kind: Callable, text: str, fits: Callable, right: str):
    """An option's text as a `kind` that `fits`; argparse puts the option's name before what is raised."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text} must be {right}")
    return value


def positive(text: str) -> int:
    return checked(int, text, lambda n: n >= 1, "a whole number, 1 or more")


def nonnegative(text: str) -> int:
    return checked(int, text, lambda n: n >= 0, "a whole number, 0 or more")


def nonnegative_number(text: str) -> float:
    return checked(float, text, lambda x: 0 <= x < math.inf, "a finite number, 0 or more")


def fraction(text: str) -> float:
    return checked(float, text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def existing(text: str) -> Path:
    return checked(Path, text, Path.exists, "a file or directory that exists")


def writable(text: str) -> Path:
    return checked(Path, text, lambda path: path.parent.is_dir() and not path.is_dir() and os.access(path.parent, os.W_OK),
                   "a file in a directory that exists and can be written")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a whole command: a mistake of its user becomes one line and exit code 1.

    A mistake is met by every rank alike: the first one tells of it, and torchrun then ends the others before they speak. An
    error of one rank alone is told by that one.
    """
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        rank, world = launched()
        if world == 1:
            raise SystemExit(f"error: {error}") from None
        time.sleep(2.0 if rank else 0.0)
        print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the others may wait for this rank in a communication: there is no orderly way out


def print_once(text: str) -> None:
    """Print on the first process only."""
    if launched()[0] == 0:
        print(text, flush=True)


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a grid; what is left of the processes is data parallel."""
    group = parser.add_argument_group("parallelism, under torchrun --standalone --nproc-per-node N (data: N / tp / cp)")
    group.add_argument("--tp", type=int, default=1, help="tensor parallel: ranks that share every matrix")
    group.add_argument("--cp", type=int, default=1, help="context parallel: ranks that share every sequence")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds for a micro-batch, a validation "
                       "sequence, a prompt or a file: a rank that takes longer prints where it stands and ends the job")


def check_least(least: int, **options: int | None) -> None:
    """Raise ValueError naming the option unless every value that is given is `least` or more."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; the least is {least}")


def check_grid(tp: int, cp: int, world: int, shards: dict[str, int] | None = None, sequence_length: int | None = None) -> None:
    """Refuse a grid that cannot run, before any process group exists.

    `shards`: what tp must divide, by name (heads, vocabulary). Raises ValueError naming the option and the nearest values.
    """
    check_least(1, tp=tp, cp=cp)
    if world % (tp * cp):
        raise ValueError(f"--tp {tp} x --cp {cp} = {tp * cp} does not divide the number of processes, {world}; change them or "
                         f"start {nearest_multiples(world, tp * cp)} (torchrun --standalone --nproc-per-node N)")
    for name, size in (shards or {}).items():
        if size % tp:
            fits = [n for n in range(1, max(shards.values()) + 1) if not any(size % n for size in shards.values())]
            near = [*[n for n in fits if n < tp][-1:], *[n for n in fits if n > tp][:1]]
            raise ValueError(f"--tp {tp} does not divide the model's {name}, {size}; the nearest that fits the model is "
                             f"{' or '.join(map(str, near))}")
    multiple = Grid(cp=cp, tp=tp).sequence_multiple
    if sequence_length and sequence_length % multiple:
        raise ValueError(f"--sequence-length {sequence_length} is not a multiple of {multiple} (2 x cp x tp); the nearest is "
                         f"{nearest_multiples(sequence_length, multiple)}")


def nearest_multiples(value: int, of: int) -> str:
    """'low or high' around a value that is none; without the low one if that is 0."""
    return " or ".join(str(n) for n in (value // of * of, (value // of + 1) * of) if n)


def parse_once(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, on every rank; help and usage errors are printed by the first, which then ends the others."""
    if launched()[0] == 0:
        return parser.parse_args(argv)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            return parser.parse_args(argv)
        except SystemExit:
            time.sleep(2.0)
            raise


def finish(error: Exception) -> None:
    """Leave a command after `error` with one line and exit code 1.

    A mistake is met by every rank alike: the first one tells of it, and torchrun then ends the others before they speak.
    """
    rank, world = launched()
    if world == 1:
        raise SystemExit(f"error: {error}") from None
    time.sleep(2.0 if rank else 0.0)
    print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # the others may wait for this rank in a communication: there is no orderly way out
