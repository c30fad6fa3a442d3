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

import atexit
import faulthandler
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

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

    def __post_init__(self) -> None:
        self.tp_rank = self.rank % self.tp
        self.cp_rank = self.rank // self.tp % self.cp
        self.dp_rank = self.rank // (self.tp * self.cp)
        self.is_first = self.rank == 0  # the process that prints and writes files
        # sequence lengths that cut evenly: 2 chunks a context-parallel rank, each in tp pieces; 1 for one process
        self.sequence_multiple = 1 if self.tp * self.cp == 1 else 2 * self.cp * self.tp

    @classmethod
    def create(cls, tp: int = 1, cp: int = 1, device: str | None = None, timeout: float = 600.0) -> Grid:
        """The grid of this job: world = dp x cp x tp processes, NCCL on cuda, gloo on cpu. Call it on every rank.

        One process needs no torch.distributed. More calls make other grids of the same processes. Raises ValueError for a
        grid that does not fit the number of processes.
        """
        rank, world = launched()
        if min(tp, cp) < 1 or world % (tp * cp):
            raise ValueError(f"--tp {tp} x --cp {cp} must divide the number of processes, {world}; change them or start "
                             f"{max(1, tp * cp)} or a multiple (torchrun --standalone --nproc-per-node N)")
        grid = cls(world // (cp * tp), cp, tp, rank, timeout=timeout)
        if world == 1:
            return grid
        patience = timedelta(seconds=10 * timeout)  # torch's own: more stretches than any `restart_timer` is given
        if not dist.is_initialized():
            start_processes(device or ("cuda" if torch.cuda.is_available() else "cpu"), patience)
        ranks = torch.arange(world).view(grid.dp, cp, tp)
        for name, axes in GROUPS.items():
            if grid.size(name) > 1:
                inside = [("dp", "cp", "tp").index(axis) for axis in axes]
                last = list(range(-len(inside), 0))
                members = ranks.movedim(inside, last).reshape(-1, grid.size(name))  # a row is a group
                grid.groups[name], _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=patience)
        return grid

    def size(self, group: str) -> int:
        """How many ranks the group of this name has."""
        return math.prod(getattr(self, axis) for axis in GROUPS[group])

    def all_reduce(self, x: Tensor, group: str, operation=dist.ReduceOp.SUM) -> Tensor:
        """Sum (or maximum) of every rank's x, in place."""
        if group in self.groups:
            dist.all_reduce(x, op=operation, group=self.groups[group])
        return x

    def all_gather(self, x: Tensor, group: str) -> Tensor:
        """(...) -> (ranks, ...): every rank's x. One rank's x is not copied."""
        if group not in self.groups:
            return x[None]
        out = x.new_empty(self.size(group), *x.shape)
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

    def send_around(self, *leaving: Tensor, tag: int = 0) -> Hop:
        """Start to send tensors to the next rank of the ring and to receive the previous one's: `.wait()` gives those.

        The caller leaves its own alone until then. One rank's ring is itself. `tag` tells apart hops that are under way at
        once.
        """
        if "cp" not in self.groups:
            return Hop(leaving, [])
        group = self.groups["cp"]
        following, previous = (self.cp_rank + 1) % self.cp, (self.cp_rank - 1) % self.cp  # ranks of the group
        arriving, messages = [], []
        for number, x in enumerate(leaving, len(leaving) * tag):
            x = x.contiguous()
            arriving.append(torch.empty_like(x))
            messages.append(dist.P2POp(dist.isend, x, None, group, number, following))
            messages.append(dist.P2POp(dist.irecv, arriving[-1], None, group, number, previous))
        return Hop(tuple(arriving), dist.batch_isend_irecv(messages))

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
        """Stop the timer, and return once every rank has come here. A program may also simply end."""
        self.barrier()
        if self.groups:  # as in `restart_timer`: alone, the timer is somebody else's
            faulthandler.cancel_dump_traceback_later()


@dataclass
class Hop:
    """Tensors on their way around the ring."""

    arriving: tuple[Tensor, ...]
    works: list

    def wait(self) -> tuple[Tensor, ...]:
        """What the previous rank has sent, once it is here."""
        for work in self.works:
            work.wait()
        return self.arriving


def start_processes(device: str, patience: timedelta) -> None:
    """Start torch.distributed. Raises ValueError if there are more processes than GPUs."""
    rank, world = launched()
    gpu = None
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"more processes than GPUs on this machine: it has {torch.cuda.device_count()}; start as many")
        gpu = torch.device("cuda", local)
        torch.cuda.set_device(gpu)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)  # a restarted job must not find its dead ranks' addresses
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world, timeout=patience,
                            device_id=gpu)
    atexit.register(end_processes)
    # torchrun sends it when another rank has failed; train.py's loop puts its own handler there
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)


def end_processes() -> None:
    """End torch.distributed, unless the program has: gloo's threads abort a process that ends without."""
    if dist.is_initialized():
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


class ColumnParallelLinear(nn.Linear):
    """The rank's 1 / tp of the outputs: x (..., in), whole -> (..., out / tp). Arguments are the whole layer's sizes."""

    shard_dims = {"weight": 0, "bias": 0}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features, out_features // grid.tp, bias)


class RowParallelLinear(nn.Linear):
    """The rank's 1 / tp of the inputs: x (B, tp, m, in / tp) -> (B, m, out), summed over ranks, the bias added once."""

    shard_dims = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features // grid.tp, out_features, bias)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x = ScatterSequence.apply(F.linear(x, self.weight), self.grid)
        return x if self.bias is None else x + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """The rank's V / tp rows of the table: tokens (B, tp, m) int64 -> (B, m, hidden). Arguments are the whole table's.

    A token of another rank's rows gives zeros here, and the sum over tp ranks is what its own rank found. `tile` of the m
    positions are looked up at a time, so that no tensor of tp m x hidden is made.
    """

    shard_dims = {"weight": 0}

    def __init__(self, num_embeddings: int, embedding_dim: int, grid: Grid) -> None:
        super().__init__(num_embeddings // grid.tp, embedding_dim)
        self.grid = grid

    def forward(self, tokens: Tensor, tile: int) -> Tensor:
        return Lookup.apply(self.weight, tokens, tile, self.grid)


class Lookup(torch.autograd.Function):
    """The rows of tokens. Their gradients are summed in float32: a token that occurs thousands of times needs that."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, tile: int, grid: Grid) -> Tensor:
        """This rank's rows (V / tp, hidden), tokens (B, tp, m) -> (B, m, hidden)."""
        ctx.save_for_backward(weight, tokens)
        ctx.tile, ctx.grid = tile, grid
        out = weight.new_empty(tokens.shape[0], tokens.shape[2], weight.shape[1])  # (B, m, hidden)
        for part, out_part in zip(tokens.split(tile, dim=2), out.split(tile, dim=1), strict=True):
            row, mine = local_rows(part, len(weight), grid)
            x = F.embedding(row, weight).masked_fill_(~mine[..., None], 0.0)  # (B, tp, tile, hidden)
            out_part.copy_(scattered(x, grid))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """(B, m, hidden) -> the gradient of this rank's rows, float32 (V / tp, hidden)."""
        weight, tokens = ctx.saved_tensors
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part, d_x in zip(tokens.split(ctx.tile, dim=2), gradient.split(ctx.tile, dim=1), strict=True):
            row, mine = local_rows(part, len(weight), ctx.grid)
            d_x = gathered(d_x, ctx.grid).to(d_weight.dtype)  # (B, tp, tile, hidden)
            d_x = d_x.masked_fill_(~mine[..., None], 0.0)
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
    dims = {}
    for prefix, module in model.named_modules():
        cut = getattr(module, "shard_dims", {})
        for name, _ in module.named_parameters(prefix, recurse=False):
            dims[name] = cut.get(name.rpartition(".")[2])
    return dims


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
    one causal block a document, so no S x S mask is ever built. It works on a ring of one rank. The recipe itself leaves it
    out (arXiv 2504.06214, section 3.1).
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
        return by_document(ring_forward, segments, grid, q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    for hop in range(grid.cp):
        source, is_last = (grid.cp_rank - hop) % grid.cp, hop == grid.cp - 1  # `source`: whose keys and values are at hand
        if not is_last:
            next_keys_values = grid.send_around(k, v)
        queries, keys = zigzag_block(grid.cp_rank, source, q.shape[2])
        part, part_lse = block_forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], causal=hop == 0)
        if hop == 0:
            out, lse = part, part_lse
        else:
            out = out.to(wide)  # a copy at the first merge only
            merge(out[:, :, queries], lse[:, :, queries], part, part_lse)
        if not is_last:
            k, v = next_keys_values.wait()
    return out.to(q.dtype), lse


def ring_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grid: Grid,
                  segments: list[list[int]] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of this rank's positions, summed in float32 over the ring."""
    if segments is not None:
        return by_document(ring_backward, segments, grid, d_out, q, k, v, out, lse)
    wide = torch.promote_types(q.dtype, torch.float32)
    next_gradients = None  # from the rank before: dK, dV of the keys and values that arrive with them
    for hop in range(grid.cp):
        source, is_last = (grid.cp_rank - hop) % grid.cp, hop == grid.cp - 1
        if not is_last:
            next_keys_values = grid.send_around(k, v)
        queries, keys = zigzag_block(grid.cp_rank, source, q.shape[2])
        d_q, d_k, d_v = block_backward(d_out[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
                                       out[:, :, queries], lse[:, :, queries], causal=hop == 0)
        if hop == 0:
            dq, dk, dv = d_q, d_k, d_v
        else:
            dq = dq.to(wide)
            dq[:, :, queries] += d_q
            dk, dv = next_gradients.wait()
            dk, dv = dk.to(wide), dv.to(wide)
            dk[:, :, keys] += d_k
            dv[:, :, keys] += d_v
        next_gradients = grid.send_around(dk, dv, tag=1)  # to the rank that has these keys and values next; at last, home
        if not is_last:
            k, v = next_keys_values.wait()
    dk, dv = next_gradients.wait()
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def by_document(attention: Callable, segments: list[list[int]], grid: Grid, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`attention(..., grid)` of each document of each row alone: `inputs` and results are (B, H, S, ...)."""
    assert grid.cp == 1, f"the cross-document mask works on whole sequences, not on a ring of {grid.cp}"
    rows = []
    for row, borders in enumerate(segments):
        documents = []
        for start, end in itertools.pairwise(borders):
            parts = [x[row:row + 1, :, start:end] for x in inputs]
            documents.append(attention(*parts, grid))
        rows.append([torch.cat(parts, dim=2) for parts in zip(*documents, strict=True)])  # (1, H, S, ...) each
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def zigzag_block(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which of `rank`'s queries see which of `source`'s keys, both of `length` local positions (see `ring_attention`)."""
    early, late, everything = slice(0, length // 2), slice(length // 2, length), slice(0, length)
    if source == rank:  # own keys, under the causal mask: local order is global order
        return everything, everything
    elif source < rank:  # its early chunk lies before all our queries, its late chunk after all of them
        return everything, early
    else:  # its chunks lie between ours: only our late queries see them, and see them all
        return late, everything


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
    """This rank's two chunks of a whole sequence, S -> S / cp along `dim`."""
    assert grid.cp == 1 or x.shape[dim] % (2 * grid.cp) == 0, f"{x.shape[dim]} is no multiple of 2 x cp = {2 * grid.cp}"
    chunks = x.tensor_split(2 * grid.cp, dim)
    return torch.cat((chunks[grid.cp_rank], chunks[-1 - grid.cp_rank]), dim)


def zigzag_unshard(x: Tensor, grid: Grid, dim: int) -> Tensor:
    """The whole sequence on every rank, S / cp -> S along `dim`; no gradient flows through it."""
    early, late = grid.all_gather(x, "cp").tensor_split(2, dim + 1)  # of every rank: (cp, ..., S / (2 cp), ...) each
    return torch.cat([*early, *late.flip(0)], dim)


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
    dtype, out = q.dtype, out.to(lse.dtype)
    for _ in range(grid.cp):
        if k.shape[2]:
            part, part_lse = block_forward(q, k, v, causal=False)
            merge(out, lse, part, part_lse)
        q, out, lse = grid.send_around(q, out, lse).wait()
    return out.to(dtype)


# ------------------------------------------------------------------------------- data parallel: the sharded optimizer


class ShardedAdamW:
    """AdamW (arXiv 1711.05101) whose float32 state is spread over the dp x cp ranks (ZeRO-1, arXiv 1910.02054).

    Every parameter is cut into dp x cp equal pieces, and rank r updates piece r of each: only there are its float32 master
    weights and its two moments. Gradients accumulate over micro-batches in float32, in `parameter.grad`, whatever the
    parameter's type. A step does four things for each parameter:

        1. reduce-scatter   the gradients of all dp x cp ranks are summed, and each rank keeps its own piece of the sum
        2. norm and clip    over the pieces of all ranks
        3. AdamW            on the own piece; matrices decay, vectors (norms and biases) do not
        4. all-gather       every rank's new piece, rounded to the parameter's type

    What every tp rank holds whole (norms) saw only that rank's positions: such gradients are summed over tp as well, and
    count once in the norm.

    Args: model, grid; betas and weight_decay as in torch; `on_host` keeps the float32 state in host memory, where the
    update then runs: 12 bytes a parameter less on the GPU, two copies a step more.
    """

    KINDS = ("master", "exp_avg", "exp_avg_sq")

    def __init__(self, model: nn.Module, grid: Grid, betas: tuple[float, float] = (0.9, 0.95),
                 weight_decay: float = 0.1, on_host: bool = False) -> None:
        self.grid = grid
        self.dims = shard_dims(model)
        self.parameters = dict(model.named_parameters())
        self.pieces = grid.size("dp_cp")
        self.piece = grid.dp_rank * grid.cp + grid.cp_rank
        self.masters = {}
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)  # float64 models (tests) keep float64
            parameter.grad_dtype = wide
            parameter.grad = torch.zeros_like(parameter, dtype=wide)
            own = self.cut(parameter.detach())[self.piece]
            # float32 weights are their own master: a view, if it is none of a padded copy
            copy = on_host or parameter.numel() % self.pieces > 0
            self.masters[name] = own.to("cpu" if on_host else parameter.device, wide, copy=copy)
        matrices = [self.masters[name] for name, parameter in self.parameters.items() if parameter.ndim >= 2]
        vectors = [self.masters[name] for name, parameter in self.parameters.items() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        for master in self.masters.values():  # now rather than in the first step, so that a checkpoint has a place to go
            self.adamw.state[master] = {"step": torch.zeros((), device=master.device), "master": master,
                                        "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}

    def cut(self, x: Tensor) -> Tensor:
        """A parameter's elements, padded with zeros, in equal pieces: any shape -> (dp cp, n)."""
        flat = x.flatten()
        padding = -len(flat) % self.pieces
        if padding:
            flat = F.pad(flat, (0, padding))
        return flat.view(self.pieces, -1)

    def join(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """The opposite, on every rank: its own piece (n,) -> `shape`."""
        flat = self.grid.all_gather(piece, "dp_cp").flatten()
        return flat[:shape.numel()].view(shape)

    def zero_gradients(self) -> None:
        """Forget the accumulated gradients: call before the first backward of a step."""
        for parameter in self.parameters.values():
            parameter.grad.zero_()

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float = 0.0) -> float:
        """One AdamW update from the accumulated gradients, clipped to `max_norm` (0: no clipping).

        Returns the gradient norm before clipping, after which `parameter.grad` is used up. Raises ArithmeticError, with
        nothing updated, if it is not finite.
        """
        gradients = self.reduce_gradients()
        norm = self.gradient_norm(gradients)
        if not norm < math.inf:
            raise ArithmeticError(f"the gradient norm is {norm}")
        for name, master in self.masters.items():
            if 0 < max_norm < norm:
                gradients[name] *= max_norm / norm
            master.grad = gradients[name].to(master.device)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.publish()
        return norm

    def reduce_gradients(self) -> dict[str, Tensor]:
        """This rank's piece of every parameter's gradient, summed over all ranks: float32 (n,). Call once a step."""
        pieces = {}
        for name, parameter in self.parameters.items():
            if self.dims[name] is None:
                self.grid.all_reduce(parameter.grad, "tp")
            pieces[name] = self.grid.reduce_scatter(self.cut(parameter.grad), "dp_cp")
        return pieces

    def gradient_norm(self, pieces: dict[str, Tensor]) -> float:
        """Euclidean norm over all parameters of the whole model, each counted once."""
        counted = [piece for name, piece in pieces.items() if self.dims[name] is not None or self.grid.tp_rank == 0]
        norms = torch.stack([torch.linalg.vector_norm(piece) for piece in counted])
        square = norms.double().square().sum()
        return self.grid.all_reduce(square, "all").sqrt().item()

    def publish(self) -> None:
        """Give every rank's piece of the weights to all, rounded to the parameter's type."""
        for name, parameter in self.parameters.items():
            piece = self.masters[name].to(parameter.device, parameter.dtype)
            parameter.copy_(self.join(piece, parameter.shape))

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, this tp rank's shard) of every parameter for a kind of KINDS, on every rank, one at a time."""
        for name, parameter in self.parameters.items():
            piece = self.adamw.state[self.masters[name]][kind].to(parameter.device)
            yield name, self.join(piece, parameter.shape)

    @torch.no_grad()
    def load_state(self, kind: str, tensors: Iterable[tuple[str, Tensor]], steps: int) -> None:
        """Restore a kind of state from (name, this tp rank's shard) of every parameter, and the number of `steps`."""
        for name, tensor in tensors:
            state = self.adamw.state[self.masters[name]]
            state[kind].copy_(self.cut(tensor)[self.piece])
            state["step"].fill_(steps)
        if kind == "master":
            self.publish()


# ------------------------------------------------------------------------------------------ what every command needs


def launched() -> tuple[int, int]:
    """(rank, number of processes) of this job, as torchrun tells its processes; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a whole command: a mistake of its user, or Ctrl-C, becomes one line and exit code 1.

    A mistake is met by every rank alike: the first one tells of it, and torchrun then ends the others before they speak. An
    error of one rank alone is told by that one.
    """
    rank, world = launched()
    try:
        yield
    except KeyboardInterrupt:
        if world == 1:
            raise SystemExit("stopped") from None
        os._exit(1)  # torchrun says it for all
    except (ValueError, OSError, ArithmeticError) as error:
        if world == 1:
            raise SystemExit(f"error: {error}") from None
        faulthandler.unregister(signal.SIGTERM)  # a rank that torchrun ends meanwhile has nothing to add
        time.sleep(2.0 if rank else 0.0)
        print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the others may wait for this rank in a communication: there is no orderly way out
    except Exception:
        if world == 1:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, where the error is another rank's end: first the traceback
        sys.excepthook(*sys.exc_info())
        os._exit(1)  # NCCL's groups are given up together only, and the others may wait in another communication


def print_once(text: str) -> None:
    """Print on the first process only."""
    if launched()[0] == 0:
        print(text, flush=True)
