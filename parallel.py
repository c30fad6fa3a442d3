"""Where everything happens: the process grid, tensor parallelism, ring attention, the optimizer.

Many processes hold one sequence of S tokens together. A grid of dp x cp x tp splits the work three
ways:

    tp  tensor parallel    every matrix is cut into tp pieces; between the matrices each rank keeps
                           1 / tp of the positions
    cp  context parallel   a rank holds S / cp positions; keys and values travel around a ring
    dp  data parallel      each replica (cp x tp ranks) takes other sequences of the batch

    what a rank holds                             shape
    activations between blocks                    (B, S / (cp tp), hidden)
    q inside attention                            (B, H / tp, S / cp, D)
    k and v                                       (B, Hkv / tp, S / cp, D)
    weights and their float32 gradients           1 / tp
    float32 master weights, AdamW's two moments   1 / (tp dp cp)

One process is the grid 1 x 1 x 1 and runs the same code, without communication. Read in order:
`Grid` (who is who, and every communication there is), the tensor-parallel layers, `ring_attention`,
`ShardedAdamW`.
"""
from __future__ import annotations

import atexit
import bisect
import faulthandler
import hashlib
import itertools
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

AXES = ("dp", "cp", "tp")  # slowest first: neighbouring ranks differ in tp
# a process group is a set of ranks that communicate: here, those that differ in these axes only
GROUPS = {
    "tp": ("tp",), "cp": ("cp",), "dp": ("dp",),
    "cp_tp": ("cp", "tp"), "dp_cp": ("dp", "cp"), "all": AXES,
}
Segments = list[list[int]]  # of each row of a batch: where its documents begin and end, [0, ..., S]
CUDNN_MULTIPLE = 128  # cuDNN is given blocks whose lengths are multiples of it
aten = torch.ops.aten


# -------------------------------------------------------------------------------------- the grid


@dataclass
class Grid:
    """This process's place in a dp x cp x tp grid, and every communication it takes part in.

    rank = (dp_rank cp + cp_rank) tp + tp_rank. Eight ranks, dp 2, cp 2, tp 2:

                     cp_rank 0   cp_rank 1         tp      0 1 | 2 3 | 4 5 | 6 7   cut a matrix
        dp_rank 0       0 1         2 3            cp      0 2 | 1 3 | 4 6 | 5 7   are a ring
        dp_rank 1       4 5         6 7            dp      0 4 | 1 5 | 2 6 | 3 7   take other rows
                                                   cp_tp   0 1 2 3 | 4 5 6 7       are a replica
                                                   dp_cp   0 2 4 6 | 1 3 5 7       share masters

    What a group's ranks do together, if the first has x = [1, 2] and the second [3, 4]:

                            the first gets      the second gets
        all_reduce          [4, 6]              [4, 6]                the sum
        all_gather          [[1, 2], [3, 4]]    [[1, 2], [3, 4]]      everybody's x
        reduce_scatter      4                   6                     its own part of the sum
        broadcast           [1, 2]              [1, 2]                the first one's x
        send_around         [3, 4]              [1, 2]                the previous one's x

    `groups` holds this rank's process group for each entry of GROUPS with more than one rank: over
    another there is nothing to do. `timeout` is in seconds, see `restart_timer`. `kernel` computes
    the blocks of attention, see `block_forward`; `train.choose_attention` sets it.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    timeout: float = field(default=600.0, repr=False, compare=False)
    kernel: str = field(default="flash", compare=False)

    def __post_init__(self) -> None:
        self.tp_rank = self.rank % self.tp
        self.cp_rank = self.rank // self.tp % self.cp
        self.dp_rank = self.rank // (self.tp * self.cp)
        self.is_first = self.rank == 0  # the process that prints and writes files
        # of sequence lengths: 2 cp equal chunks (zigzag), and cp tp equal pieces; alone, any length
        self.sequence_multiple = 2 * self.cp * self.tp if self.cp * self.tp > 1 else 1
        # of those whose chunks cuDNN takes
        self.cudnn_multiple = math.lcm(2 * self.cp * CUDNN_MULTIPLE, self.sequence_multiple)

    def padded(self, length: int) -> int:
        """A sequence's length with the padding that makes it a multiple: 37 is 40 if that is 8."""
        return length + -length % self.sequence_multiple

    def chunk(self, length: int) -> int:
        """Positions in a zigzag chunk of a padded sequence; one rank has it whole."""
        length = self.padded(length)
        return length // (2 * self.cp) if self.cp > 1 else length

    @classmethod
    def create(cls, tp: int = 1, cp: int = 1, device: str | None = None,
               timeout: float = 600.0) -> Grid:
        """The grid of this job, over NCCL on cuda, gloo on cpu. Call it on every rank.

        One process needs no torch.distributed. More calls make other grids of the same processes.
        Raises ValueError for a grid that does not fit their number.
        """
        check_alone()
        rank, world = launched()
        if min(tp, cp) < 1 or world % (tp * cp):
            raise ValueError(f"--tp {tp} x --cp {cp} must divide the number of processes, {world}; "
                             f"change them or start {max(1, tp * cp)} or a multiple "
                             "(torchrun --standalone --nproc-per-node N)")
        grid = cls(world // (cp * tp), cp, tp, rank, timeout=timeout)
        if world == 1:
            return grid
        # torch's own timeout, long enough that `restart_timer` always ends a hanging job first
        patience = timedelta(seconds=10 * timeout)
        if not dist.is_initialized():
            default_device = "cuda" if torch.cuda.is_available() else "cpu"
            start_processes(device or default_device, patience)
        ranks = torch.arange(world).view(grid.dp, cp, tp)
        for name, axes in GROUPS.items():
            if grid.size(name) == 1:
                continue
            # put the axes that differ within a group last: then each row is a group, as for tp
            # in the example 0 1 | 2 3 | 4 5 | 6 7
            outside = [number for number, axis in enumerate(AXES) if axis not in axes]
            inside = [number for number, axis in enumerate(AXES) if axis in axes]
            members = ranks.permute(outside + inside).reshape(-1, grid.size(name)).tolist()
            ours, _ = dist.new_subgroups_by_enumeration(members, timeout=patience)
            grid.groups[name] = ours
        return grid

    def size(self, group: str) -> int:
        """How many ranks the group of this name has."""
        return math.prod(getattr(self, axis) for axis in GROUPS[group])

    def all_reduce(self, x: Tensor, group: str, operation=dist.ReduceOp.SUM) -> Tensor:
        """The sum (or maximum) of every rank's x, in place."""
        if group in self.groups:
            dist.all_reduce(x, op=operation, group=self.groups[group])
        return x

    def all_gather(self, x: Tensor, group: str) -> Tensor:
        """(...) -> (ranks, ...): every rank's x. One rank's x is not copied."""
        if group not in self.groups:
            return x[None]
        out = x.new_empty(self.size(group), *x.shape)
        flat = x.contiguous().view(-1)
        # its name since torch 2.13, and before
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out.view(-1), flat, group=self.groups[group])
        return out

    def reduce_scatter(self, x: Tensor, group: str) -> Tensor:
        """(ranks, ...) -> (...): the sum over ranks of the part that is this rank's."""
        if group not in self.groups:
            return x[0]
        out = torch.empty_like(x[0], memory_format=torch.contiguous_format)
        flat = x.contiguous().view(-1)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out.view(-1), flat, group=self.groups[group])
        return out

    def broadcast(self, x: Tensor, group: str = "all") -> Tensor:
        """The group's first rank's x, in place."""
        if group in self.groups:
            dist.broadcast(x, group=self.groups[group], group_src=0)
        return x

    def send_around(self, *leaving: Tensor, tag: int = 0) -> Hop:
        """Start to send tensors to the next rank of the ring and to receive the previous one's.

        `.wait()` gives those; until then, do not change what is sent. `tag`, 0 or 1, tells apart
        two hops of equally many tensors that are under way at once.
        """
        if "cp" not in self.groups:
            return Hop(leaving, [])
        ring = self.groups["cp"]
        following = (self.cp_rank + 1) % self.cp
        previous = (self.cp_rank - 1) % self.cp
        arriving, messages = [], []
        for number, x in enumerate(leaving, start=tag * len(leaving)):
            x = x.contiguous()
            room = torch.empty_like(x)
            arriving.append(room)
            send = dist.P2POp(dist.isend, x, None, ring, number, following)
            receive = dist.P2POp(dist.irecv, room, None, ring, number, previous)
            messages += [send, receive]
        return Hop(tuple(arriving), dist.batch_isend_irecv(messages))

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.groups:
            dist.barrier(group=self.groups["all"])

    def restart_timer(self, stretches: int = 1) -> None:
        """End the job unless this is called again, or `close`, within stretches x timeout seconds.

        A rank that hangs keeps all others waiting: each prints where it stands and ends. So call it
        wherever a stretch of work begins: a micro-batch, a validation sequence, a prompt, a file.
        """
        if self.groups:  # alone, a process keeps nobody waiting
            faulthandler.dump_traceback_later(stretches * self.timeout, exit=True)

    def close(self) -> None:
        """Stop the timer, and return once every rank has come here. A program may also just end."""
        self.barrier()
        if self.groups:  # alone, `restart_timer` has set none
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
    backend = "gloo"
    if device.startswith("cuda"):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError("more processes than GPUs on this machine: "
                             f"it has {gpus}; start as many")
        gpu = torch.device("cuda", local_rank)
        backend = "nccl"
        torch.cuda.set_device(gpu)
    # ranks find each other's addresses in a store, a dictionary that they share; with a name for
    # each attempt in it a restarted job does not find those of its dead ranks
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    store = dist.PrefixStore(attempt_name(store, rank, world), store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=patience, device_id=gpu)
    atexit.register(end_processes)
    # torchrun sends SIGTERM when another rank has failed: say where this one stood
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)


def attempt_name(store: dist.Store, rank: int, world: int) -> str:
    """A name for this attempt of a job, the same on every rank and never used before.

    Each torchrun counts the restarts of its own workers only, so those of several machines do not
    agree on a number. Instead each rank draws a name, and all of them together name the attempt. A
    rank may still find a dead rank's name, where the new one has not written its own: it names
    another attempt then than that rank will. So all look again until all say the same.
    """
    ranks = range(world)
    own = uuid.uuid4().hex
    store.set(f"name of {rank}", own)
    while True:
        names = store.multi_get([f"name of {other}" for other in ranks])  # waits for the first ones
        together = hashlib.sha256(b" ".join(names)).hexdigest()
        store.set(f"attempt of {rank}", together)
        said = store.multi_get([f"attempt of {other}" for other in ranks])
        if set(said) == {together.encode()}:
            return together
        time.sleep(0.1)


def end_processes() -> None:
    """End torch.distributed, unless the program has: otherwise gloo's threads abort it at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------- tensor parallel with sequence parallel
#
# Megatron's layers (arXiv 1909.08053, 2205.05198). A pair of matrices is cut so that one
# communication before it and one after it suffice. Between two such pairs, norms and residuals hold
# only this rank's share of the positions, m = S / (cp tp):
#
#     (B, m, hidden)            a rank's positions
#       all-gather           -> (B, tp, m, hidden)        those of all tp ranks
#       columns of matrix 1  -> (B, tp, m, width / tp)
#       rows of matrix 2     -> (B, tp, m, hidden)        a part of the sum
#       reduce-scatter       -> (B, m, hidden)            the sum, of a rank's positions
#
# In backward the two communications swap places. (tp, m), flattened, are the S / cp positions that
# this rank of the ring holds, in order.


class GatherSequence(torch.autograd.Function):
    """(B, m, hidden) -> (B, tp, m, hidden): all tp ranks' positions; gradients reduce-scattered."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return gathered(x, grid)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return scattered(gradient, ctx.grid), None


class ScatterSequence(torch.autograd.Function):
    """(B, tp, m, hidden) -> (B, m, hidden): summed over tp, own positions; gradients gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return scattered(x, grid)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.grid), None


def gathered(x: Tensor, grid: Grid) -> Tensor:
    x = grid.all_gather(x, "tp").movedim(0, 1)  # (tp, B, m, hidden) -> (B, tp, m, hidden)
    return x.contiguous()  # once, not in each product that reads it; one row lies so already


def scattered(x: Tensor, grid: Grid) -> Tensor:
    return grid.reduce_scatter(x.movedim(1, 0), "tp")  # (tp, B, m, hidden) -> (B, m, hidden)


class ColumnParallelLinear(nn.Linear):
    """The rank's 1 / tp of the outputs: (..., in) -> (..., out / tp). Arguments: whole sizes.

    Its input's gradient is a part of a sum over tp: GatherSequence's backward adds it up.
    """

    shard_dims = {"weight": 0, "bias": 0}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features, out_features // grid.tp, bias)


class RowParallelLinear(nn.Linear):
    """The rank's 1 / tp of the inputs: (B, tp, m, in / tp) -> (B, m, out), summed over ranks."""

    shard_dims = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, grid: Grid, bias: bool = False) -> None:
        super().__init__(in_features // grid.tp, out_features, bias)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x = ScatterSequence.apply(F.linear(x, self.weight), self.grid)
        if self.bias is not None:
            x = x + self.bias  # once, after the sum over ranks
        return x


class VocabParallelEmbedding(nn.Embedding):
    """The rank's V / tp rows of the table: tokens (B, tp, m) int64 -> (B, m, hidden).

    A token of another rank's rows gives zeros here, so that the sum over tp ranks is its row.
    `tile` of the m positions are looked up at a time: (B, tp, m, hidden) never exists whole.
    """

    shard_dims = {"weight": 0}

    def __init__(self, num_embeddings: int, embedding_dim: int, grid: Grid) -> None:
        super().__init__(num_embeddings // grid.tp, embedding_dim)
        self.grid = grid

    def forward(self, tokens: Tensor, tile: int) -> Tensor:
        return Lookup.apply(self.weight, tokens, tile, self.grid)


class Lookup(torch.autograd.Function):
    """The rows of tokens. One token may occur thousands of times: gradients add up in float32."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, tile: int, grid: Grid) -> Tensor:
        """This rank's rows (V / tp, hidden), tokens (B, tp, m) -> (B, m, hidden)."""
        ctx.save_for_backward(weight, tokens)
        ctx.tile, ctx.grid = tile, grid
        batch, _, m = tokens.shape
        out = weight.new_empty(batch, m, weight.shape[1])
        token_tiles = tokens.split(tile, dim=2)  # (B, tp, tile) each
        out_tiles = out.split(tile, dim=1)  # (B, tile, hidden) each
        for token_tile, out_tile in zip(token_tiles, out_tiles, strict=True):
            row, elsewhere = local_rows(token_tile, len(weight), grid)
            x = F.embedding(row, weight)  # (B, tp, tile, hidden)
            x.masked_fill_(elsewhere[..., None], 0.0)
            out_tile.copy_(scattered(x, grid))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """(B, m, hidden) -> the gradient of this rank's rows, float32 (V / tp, hidden)."""
        weight, tokens = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide)
        token_tiles = tokens.split(ctx.tile, dim=2)
        gradient_tiles = gradient.split(ctx.tile, dim=1)
        for token_tile, d_x in zip(token_tiles, gradient_tiles, strict=True):
            row, elsewhere = local_rows(token_tile, len(weight), ctx.grid)
            d_x = gathered(d_x, ctx.grid).to(wide)  # (B, tp, tile, hidden)
            d_x = d_x.masked_fill_(elsewhere[..., None], 0.0)
            d_weight.index_add_(0, row.flatten(), d_x.flatten(0, 2))
        return d_weight, None, None, None


def local_rows(tokens: Tensor, rows: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where tokens stand in this rank's `rows` rows of the vocabulary, and which do not.

    V = 8, tp = 2, on tp_rank 1, with rows 4 ... 7: tokens 5, 2 -> rows 1, 0 and elsewhere False,
    True. (Row 0 only stands in: what it gives is masked.)
    """
    row = tokens - grid.tp_rank * rows
    elsewhere = (row < 0) | (row >= rows)
    return row.masked_fill(elsewhere, 0), elsewhere


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor,
                                 grid: Grid) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient in one pass, the vocabulary spread over tp ranks.

    For logits x of a row and Z = sum of exp(x - max x), the normaliser:

        softmax(x)   = exp(x - max x) / Z
        loss         = -log softmax(x)[target] = log Z + max x - x[target]
        d loss / dx  = softmax(x) - onehot(target)

    Example, V = 4, tp = 2: rank 0 has x = [1, 3], rank 1 has [2, 0], the target is 2. Two small
    all-reduces tell both max x = 3, Z = e^-2 + e^0 + e^-1 + e^-3 = 1.55 and x[target] = 2 (rank 0
    adds 0): loss = log 1.55 + 3 - 2 = 1.44. No rank ever sees another's logits.

    logits (N, V / tp) float32 or float64, targets (N,) int64 in [0, V). Returns losses (N,) and
    normalisers (N, 1), the same on every tp rank. `logits` becomes this rank's part of the gradient
    times Z: dividing it would be one more pass over (N, V), so the caller divides what it makes of
    it, (N, hidden).
    """
    row, elsewhere = local_rows(targets[:, None], logits.shape[1], grid)  # (N, 1) each
    # 1. the largest, so that no exponential overflows
    largest = logits.amax(1, keepdim=True)  # (N, 1)
    largest = grid.all_reduce(largest, "tp", dist.ReduceOp.MAX)
    # 2. x[target], before the logits are overwritten
    target_logit = logits.gather(1, row).masked_fill(elsewhere, 0.0)  # (N, 1)
    # 3. exp(x - max x), and the sums over ranks of Z and x[target] in one message
    logits.sub_(largest).exp_()
    sums = torch.stack([logits.sum(1, keepdim=True), target_logit])  # (2, N, 1)
    normaliser, target_logit = grid.all_reduce(sums, "tp")
    # 4. (softmax - onehot) Z = exp(x - max x) - onehot Z; ranks without the target subtract 0
    logits.scatter_add_(1, row, -normaliser.masked_fill(elsewhere, 0.0))
    loss = normaliser.log() + largest - target_logit  # (N, 1)
    return loss[:, 0], normaliser


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """Along which dimension tp cuts each parameter; None: every tp rank holds it whole (norms)."""
    dims = {}
    for prefix, module in model.named_modules():
        cut = getattr(module, "shard_dims", {})
        for name, _ in module.named_parameters(prefix, recurse=False):
            dims[name] = cut.get(name.rpartition(".")[2])
    return dims


def whole_shape(shape: tuple[int, ...], dim: int | None, grid: Grid) -> tuple[int, ...]:
    """Shape of a whole parameter, from that of a tp rank's shard of it."""
    whole = list(shape)
    if dim is not None:
        whole[dim] *= grid.tp
    return tuple(whole)


def unshard(x: Tensor, dim: int | None, grid: Grid) -> Tensor:
    """A whole parameter from the tp ranks' shards of it, on every rank."""
    if dim is None or grid.tp == 1:
        return x
    shards = grid.all_gather(x, "tp")  # (tp, ...)
    return torch.cat(shards.unbind(), dim)


# ------------------------------------------------------------- ring attention (context parallel)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid,
                   segments: Segments | None = None) -> Tensor:
    """Causal attention over the whole sequence.

    q (B, H, S / cp, D), k and v (B, Hkv, S / cp, D) -> as q; H and Hkv are this tp rank's. The
    sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r (zigzag), an early and
    a late one, so that causal attention costs every rank the same at every hop. (In plain order the
    first rank would be done after hop 0, and the last would work at every hop.) Keys and values (K
    V) go around the ring (arXiv 2310.01889), queries stay. Who computes what with whose K V, cp =
    4, chunks 0 ... 7:

        rank  its chunks   hop 0: own K V    hop 1             hop 2             hop 3
         0      0, 7       0: causal         3: 7 x (3, 4)     2: 7 x (2, 5)     1: 7 x (1, 6)
         1      1, 6       1: causal         0: (1, 6) x 0     3: 6 x (3, 4)     2: 6 x (2, 5)
         2      2, 5       2: causal         1: (2, 5) x 1     0: (2, 5) x 0     3: 5 x (3, 4)
         3      3, 4       3: causal         2: (3, 4) x 2     1: (3, 4) x 1     0: (3, 4) x 0

    "3: 7 x (3, 4)": at hand are the K V of rank 3; the queries of chunk 7 see the keys of chunks 3
    and 4, all of them. What is not listed lies in the future. Every hop is two chunk products (hop
    0: two half ones and a whole one).

    A hop moves 2 B Hkv (S / cp) D elements of K V. In backward it also moves as many of dK dV, in
    float32 once there is a sum. S = 1M, cp = 4, Hkv = 2, D = 128, bfloat16: 256 and 256 + 512 MiB.

    `segments` masks documents apart: for each row of the batch the borders of its documents in the
    whole sequence (from `document_segments`), the same on every rank. There is no mask tensor. A
    document is contiguous and a rank holds its positions in order, so what it has of a document is
    one slice (of two chunks, if the document covers all between them), and a block is such a slice
    of queries x such a slice of keys. Only hop 0 has keys that come after a query: there each
    document is a causal block. On later hops a block's keys all come before its queries, and
    nothing within it is left to mask; and a row has one block at most, since only one document can
    reach from an earlier chunk into a later one. Its keys are the document's last ones there, its
    queries the first ones here. The same ring with documents A, B and C, whose borders halve chunks
    2 and 5 (2' 2" and 5' 5"):

        rank  its chunks   hop 0: own K V               hop 1          hop 2        hop 3
         0      0, 7       A: 0    C: 7                 -              C: 7 x 5"    C: 7 x 6
         1      1, 6       A: 1    C: 6                 A: 1 x 0       -            C: 6 x 5"
         2      2, 5       A: 2'   B: (2", 5')  C: 5"   A: 2' x 1      A: 2' x 0    B: 5' x (3, 4)
         3      3, 4       B: (3, 4)                    B: (3, 4) x 2" -            -

    Ranks are no longer equal: they wait for the one with most to do (docs/grids.md). The recipe has
    no such mask (arXiv 2504.06214, section 3.1).
    """
    return RingAttention.apply(q, k, v, grid, segments)


class RingAttention(torch.autograd.Function):
    """`ring_forward` with `ring_backward` as its gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, grid: Grid,
                segments: Segments | None) -> Tensor:
        out, lse = ring_forward(q, k, v, grid, segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.grid, ctx.segments = grid, segments
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dq, dk, dv = ring_backward(d_out, *ctx.saved_tensors, ctx.grid, ctx.segments)
        return dq, dk, dv, None, None


def ring_forward(q: Tensor, k: Tensor, v: Tensor, grid: Grid,
                 segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """Shapes of `ring_attention` -> out like q, and the log-sum-exp of its rows, (B, H, S / cp).

    The log-sum-exp (lse) of a row is log sum exp(its scores), over the whole sequence at the end.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    for hop in range(grid.cp):
        source = (grid.cp_rank - hop) % grid.cp  # the rank whose K V are at hand
        is_last = hop == grid.cp - 1
        # 1. post: send the K V at hand to rank + 1, receive the next from rank - 1; nobody waits
        if not is_last:
            next_keys_values = grid.send_around(k, v)
        # 2. compute, while they travel: out and lse of the queries over these keys alone. (The
        # slices have no names: a view that lives on would keep this hop's K V in memory.)
        blocks = visible_blocks(grid, source, q.shape[2], segments)
        parts = []
        for row, q_rows, k_rows in blocks:
            parts.append(block_forward(
                q[row, :, q_rows],
                k[row, :, k_rows],
                v[row, :, k_rows],
                causal=hop == 0,  # only our own blocks have keys that come after a query
                kernel=grid.kernel))
        # 3. merge into the float32 result
        if hop == 0:  # each of our queries is in one of them
            out, lse = join_documents(parts, len(q))
        else:
            out = out.to(wide)  # a copy at the first merge only
            for (row, q_rows, _), part in zip(blocks, parts, strict=True):
                merge(out[row, :, q_rows], lse[row, :, q_rows], *part)
        # 4. wait for the K V posted in step 1
        if not is_last:
            k, v = next_keys_values.wait()
    return out.to(q.dtype), lse


def ring_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                  grid: Grid, segments: Segments | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of this rank's positions, summed in float32 over the ring.

    Backward goes around once more. A block's softmax is rebuilt from the lse of the whole row, so a
    block yields parts of the true gradients and there is nothing to merge. dQ stays and is summed;
    dK dV travel with their K V, and every rank adds its part. Those of rank 0, for cp = 4:

        hop           0           1             2             3
        their place   rank 0 ---> rank 1 -----> rank 2 -----> rank 3 -----> home, rank 0
        their sum     from 0      + from 1      + from 2      + from 3
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    next_gradients = None  # dK dV on their way here, of the K V that arrive with them
    for hop in range(grid.cp):
        source = (grid.cp_rank - hop) % grid.cp
        is_last = hop == grid.cp - 1
        # 1. post the K V at hand
        if not is_last:
            next_keys_values = grid.send_around(k, v)
        # 2. compute these blocks' parts of the gradients
        blocks = visible_blocks(grid, source, q.shape[2], segments)
        parts = []
        for row, q_rows, k_rows in blocks:
            parts.append(block_backward(
                d_out[row, :, q_rows],
                q[row, :, q_rows],
                k[row, :, k_rows],
                v[row, :, k_rows],
                out[row, :, q_rows],
                lse[row, :, q_rows],
                causal=hop == 0,
                kernel=grid.kernel))
        # 3. add them: to our own dQ, and to the dK dV that the ranks before us have summed
        if hop == 0:
            dq, dk, dv = join_documents(parts, len(q))
        else:
            dq = dq.to(wide)
            dk, dv = next_gradients.wait()
            # with blocks or without: the next rank receives what it sends itself
            dk, dv = dk.to(wide), dv.to(wide)
            for (row, q_rows, k_rows), (d_q, d_k, d_v) in zip(blocks, parts, strict=True):
                dq[row, :, q_rows] += d_q
                dk[row, :, k_rows] += d_k
                dv[row, :, k_rows] += d_v
        # 4. post dK dV to the rank that has their K V next; on the last hop, home
        next_gradients = grid.send_around(dk, dv, tag=1)
        # 5. wait for the K V posted in step 1
        if not is_last:
            k, v = next_keys_values.wait()
    dk, dv = next_gradients.wait()
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def visible_blocks(grid: Grid, source: int, length: int,
                   segments: Segments | None) -> list[tuple[slice, slice, slice]]:
    """The blocks of this rank's queries with the K V of `source`: (row of the batch, queries, keys)
    each, the last two slices of the local positions, 0 ... `length` = S / cp.

    Without documents one block, of all rows; else one for each document of which this rank has
    queries and `source` has keys that they see.
    """
    q_rows, k_rows = zigzag_block(grid.cp_rank, source, length)
    if segments is None:
        return [(slice(None), q_rows, k_rows)]
    chunk = grid.cp_rank if q_rows.start == 0 else 2 * grid.cp - 1 - grid.cp_rank
    first_query = chunk * (length // 2)
    blocks = []
    for row, borders in enumerate(segments):
        ends = (borders[0], borders[-1])
        assert ends == (0, grid.cp * length), f"{ends} are not the ends of a whole, padded row"
        if source != grid.cp_rank:  # only the document of our first query reaches back to theirs
            number = bisect.bisect_right(borders, first_query)
            borders = borders[number - 1:number + 1]
        q_slices = document_slices(borders, grid.cp_rank, grid.cp, length, q_rows)
        k_slices = document_slices(borders, source, grid.cp, length, k_rows)
        for q_slice, k_slice in zip(q_slices, k_slices, strict=True):
            if q_slice.start < q_slice.stop and k_slice.start < k_slice.stop:
                blocks.append((slice(row, row + 1), q_slice, k_slice))
    return blocks


def zigzag_block(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which of `rank`'s queries see which of `source`'s keys: see the table of `ring_attention`."""
    everything = slice(0, length)  # a rank's local positions: its early chunk, then its late one
    early = slice(0, length // 2)
    late = slice(length // 2, length)
    if source == rank:  # own keys, under the causal mask: local order is global order
        return everything, everything
    elif source < rank:  # its early chunk lies before all our queries, its late one after them
        return everything, early
    else:  # its chunks lie between ours: only our late queries see them, and see them all
        return late, everything


def document_slices(borders: list[int], rank: int, cp: int, length: int,
                    within: slice) -> list[slice]:
    """What a rank has of each document `within` a part of its `length` local positions.

    S = 16, cp = 4: rank 1 has positions 2 3 12 13. Of documents 0 ... 2, 3 ... 12 and 13 ... 15
    (borders 0, 3, 13, 16) it has one, two and one: slices 0:1, 1:3 and 3:4.
    """
    half = length // 2
    places = []
    for border in borders:
        # how many of its early and of its late positions come before it (`within` cuts the rest)
        early = min(border - rank * half, half)
        late = max(border - (2 * cp - 1 - rank) * half, 0)
        places.append(min(max(early + late, within.start), within.stop))
    return [slice(start, end) for start, end in itertools.pairwise(places)]


def join_documents(parts: list[tuple[Tensor, ...]], batch: int) -> tuple[Tensor, ...]:
    """Hop 0's results of all documents, in order: (1, h, s, ...) -> (B, h, S / cp, ...) each.

    `parts` is emptied, so that those of a result are given back before the next one is joined.
    """
    if len(parts) == 1:  # one block had everything: nothing is copied
        return parts.pop()
    columns = [list(column) for column in zip(*parts, strict=True)]  # a list for each result
    parts.clear()
    results = []
    for column in columns:
        # heads side by side in memory, as a model has them: (1, B S / cp, h, ...), row after row
        x = torch.cat([part.transpose(1, 2) for part in column], dim=1)
        column.clear()
        x = x.unflatten(1, (batch, -1))[0]  # (B, S / cp, h, ...)
        results.append(x.transpose(1, 2))
    return tuple(results)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's result to the float32 one, in place: softmax over the union of their keys.

    exp(lse) is the sum by which softmax has divided: call it a for `out` and b for `part`. Over all
    keys the sum is a + b, so

        out <- (a out + b part) / (a + b) = out + share (part - out)
        share = b / (a + b) = 1 / (1 + a / b) = sigmoid(log b - log a)
        lse <- log(a + b) = log a - log(a / (a + b)) = lse - logsigmoid(log a - log b)

    Scores reach thousands, where a and b overflow. The difference of their logarithms does not.
    """
    share = torch.sigmoid(part_lse - lse)  # in [0, 1]
    out.lerp_(part.to(out.dtype), share[..., None])
    lse.sub_(F.logsigmoid(lse - part_lse))


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool,
                  kernel: str = "flash") -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of one block, and its rows' log-sum-exp in float32 (or float64).

    q (B, H, S, D), k and v (B, Hkv, N, D) -> (B, H, S, D), (B, H, S). K and V keep their own number
    of heads: grouped-query attention never repeats them in memory. On CUDA by one of three kernels:

        flash   FlashAttention-2: any length, heads up to 256, GPUs since A100
        cudnn   1.6 times as fast on an H100: compute capability 9 and 10, heads up to 128
        fa3     FlashAttention-3, a package of its own, behind flash's operators: Hopper

    These are the operators behind F.scaled_dot_product_attention, which does not return the
    log-sum-exp; 0.0 is dropout. Here and in `block_backward` is all that calls a kernel.
    """
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if kernel == "cudnn" and cudnn_takes(q, k):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
        return out, lse.reshape(q.shape[:3])  # it comes as (B, H, S, 1)
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def block_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                   causal: bool, kernel: str = "flash") -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block, given `out` and `lse` of the queries' whole rows."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal)
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the random state of no dropout
    lengths = (q.shape[2], k.shape[2])
    lse = lse.contiguous()  # a slice of it is not, and every kernel reads it as if it were
    if kernel == "cudnn" and cudnn_takes(q, k):
        # it may remember strides by q, k, v alone: out and d_out are to lie in one way always
        return aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, k, v, out, lse[..., None], unused, unused, None, None, None, *lengths,
            0.0, causal)
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse, None, None, *lengths, 0.0, causal, unused, unused)


def cudnn_takes(q: Tensor, k: Tensor) -> bool:
    """Whether a block is for cuDNN: of one query its backward has given NaN, and other lengths are
    left to flash to be safe."""
    return q.shape[2] % CUDNN_MULTIPLE == 0 and k.shape[2] % CUDNN_MULTIPLE == 0


def zigzag_shard(x: Tensor, grid: Grid, dim: int) -> Tensor:
    """This rank's two chunks of a whole sequence, S -> S / cp along `dim`.

    S = 8, cp = 2: the chunks are 0 1 | 2 3 | 4 5 | 6 7; rank 0 has 0 1 6 7, rank 1 has 2 3 4 5.
    """
    multiple = 2 * grid.cp
    if grid.cp > 1:  # one rank takes any length
        assert x.shape[dim] % multiple == 0, f"{x.shape[dim]} is no multiple of 2 cp = {multiple}"
    chunks = x.tensor_split(multiple, dim)
    early = chunks[grid.cp_rank]
    late = chunks[-1 - grid.cp_rank]
    return torch.cat((early, late), dim)


def zigzag_unshard(x: Tensor, grid: Grid, dim: int) -> Tensor:
    """The whole sequence on every rank, S / cp -> S along `dim`; no gradient flows through it."""
    shards = grid.all_gather(x, "cp")  # (cp, ..., S / cp, ...)
    early, late = shards.tensor_split(2, dim + 1)  # (cp, ..., S / (2 cp), ...) each
    return torch.cat([*early, *late.flip(0)], dim)  # the first rank's late chunk is the last


def zigzag_positions(seq_len: int, grid: Grid) -> Tensor:
    """Positions in the whole sequence of what this rank holds: int64 (seq_len / cp,)."""
    return zigzag_shard(torch.arange(seq_len), grid, 0)


def document_segments(document_ids: Tensor) -> Segments:
    """Where documents begin and end: ids (B, S) -> for each row the borders, on the host.

    Ids 5 5 5 9 9 2 -> borders 0, 3, 5, 6.
    """
    rows = []
    for row in document_ids:
        is_border = row[1:] != row[:-1]
        starts = torch.nonzero(is_border).flatten() + 1
        rows.append([0, *starts.tolist(), row.numel()])
    return rows


def attend_earlier(q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """New tokens attend to the cached ones, too, which come before all of them -> out.

    q, out (B, H, s, D) and lse (B, H, s): of the new tokens among themselves, by `ring_forward`. k
    and v (B, Hkv, N, D): this rank's N >= 0 cached tokens, in any order. Ranks may hold unequal
    numbers, so keys stay and queries go around the ring (the pass-Q of arXiv 2411.01783), with out
    and lse so far; the last hop brings them home.
    """
    dtype = q.dtype
    out = out.to(lse.dtype)
    for _ in range(grid.cp):
        if k.shape[2] > 0:
            part, part_lse = block_forward(q, k, v, causal=False, kernel=grid.kernel)
            merge(out, lse, part, part_lse)
        q, out, lse = grid.send_around(q, out, lse).wait()
    return out.to(dtype)


# ---------------------------------------------------------- data parallel: the sharded optimizer


class ShardedAdamW:
    """AdamW (arXiv 1711.05101), its float32 state spread over dp x cp ranks (ZeRO-1, 1910.02054).

    Every parameter is cut into dp x cp equal pieces, and rank r updates piece r of each: only there
    are its float32 master weights and its two moments. Ten elements over four ranks, padded with
    zeros to twelve:

        rank        0          1          2          3
        gradients   g0 ... g9  g0 ... g9  g0 ... g9  g0 ... g9    float32, each of its own tokens
        pieces      G0 G1 G2   G3 G4 G5   G6 G7 G8   G9 0  0      1. reduce-scatter: sums over ranks
                                                                  2. norm of all pieces, and clip
        masters     m0 m1 m2   m3 m4 m5   m6 m7 m8   m9 0  0      3. AdamW: float32, updated
        weights     m0 ... m9  m0 ... m9  m0 ... m9  m0 ... m9    4. all-gather: rounded

    `on_host` keeps masters and moments in host memory, where the update then runs: 12 bytes an
    element of a piece less on the GPU, two more copies a step.
    """

    KINDS = ("master", "exp_avg", "exp_avg_sq")

    def __init__(self, model: nn.Module, grid: Grid, betas: tuple[float, float] = (0.9, 0.95),
                 weight_decay: float = 0.1, on_host: bool = False) -> None:
        self.grid = grid
        self.dims = shard_dims(model)
        self.parameters = dict(model.named_parameters())
        self.pieces = grid.size("dp_cp")  # of each parameter
        self.piece = grid.dp_rank * grid.cp + grid.cp_rank  # this rank's
        self.masters = {}
        matrices, vectors = [], []
        for name, parameter in self.parameters.items():
            # gradients of micro-batches add up in float32, whatever the parameter's type
            wide = torch.promote_types(parameter.dtype, torch.float32)  # float64 stays (tests)
            parameter.grad_dtype = wide  # tells autograd that .grad has another type
            parameter.grad = torch.zeros_like(parameter, dtype=wide)
            # a float32 parameter is its own master: a view of it, nothing is copied. But a view of
            # what `cut` has padded would keep a copy of all pieces alive: there our own is copied
            own = self.cut(parameter.detach())[self.piece]
            is_padded = parameter.numel() % self.pieces > 0
            device = "cpu" if on_host else parameter.device
            master = own.to(device, wide, copy=on_host or is_padded)
            self.masters[name] = master
            if parameter.ndim >= 2:
                matrices.append(master)
            else:  # norms and biases do not decay
                vectors.append(master)
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        # torch would make the state in the first step; `load_state` fills it before that
        for master in self.masters.values():
            self.adamw.state[master] = {
                "step": torch.zeros((), device=master.device), "master": master,
                "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}

    def cut(self, x: Tensor) -> Tensor:
        """A parameter's elements, padded with zeros, in equal pieces: any shape -> (dp cp, n)."""
        flat = x.flatten()
        padding = -len(flat) % self.pieces  # 10 elements in 4 pieces: 2
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

        Returns the gradient norm before clipping, after which `parameter.grad` is used up. Raises
        ArithmeticError, with nothing updated, if it is not finite.
        """
        # 1. reduce-scatter: sum the gradients of all dp x cp ranks, keep the own piece
        gradients = {}
        for name, parameter in self.parameters.items():
            # what every tp rank holds whole (norms) has seen only that rank's positions
            is_whole = self.dims[name] is None
            if is_whole:
                self.grid.all_reduce(parameter.grad, "tp")
            gradients[name] = self.grid.reduce_scatter(self.cut(parameter.grad), "dp_cp")

        # 2. norm over the pieces of all ranks, and clip
        norms = []
        for name, gradient in gradients.items():
            # what every tp rank holds whole counts once
            if self.dims[name] is not None or self.grid.tp_rank == 0:
                norms.append(torch.linalg.vector_norm(gradient))
        square = torch.stack(norms).double().square().sum()
        norm = self.grid.all_reduce(square, "all").sqrt().item()
        if not norm < math.inf:  # nan is not less either
            raise ArithmeticError(f"the gradient norm is {norm}")
        if 0 < max_norm < norm:
            for gradient in gradients.values():
                gradient.mul_(max_norm / norm)

        # 3. AdamW on the own pieces
        for name, master in self.masters.items():
            master.grad = gradients[name].to(master.device)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()

        # 4. all-gather
        self.publish()
        return norm

    def publish(self) -> None:
        """Give every rank's piece of the weights to all, rounded to the parameter's type."""
        for name, parameter in self.parameters.items():
            piece = self.masters[name].to(parameter.device, parameter.dtype)
            parameter.copy_(self.join(piece, parameter.shape))

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, this tp rank's shard) of each parameter, for a kind of KINDS; on every rank."""
        for name, parameter in self.parameters.items():
            piece = self.adamw.state[self.masters[name]][kind]
            yield name, self.join(piece.to(parameter.device), parameter.shape)

    @torch.no_grad()
    def load_state(self, kind: str, tensors: Iterable[tuple[str, Tensor]], steps: int) -> None:
        """Restore what `state` gave for a kind, and the number of `steps`."""
        for name, tensor in tensors:
            state = self.adamw.state[self.masters[name]]
            state[kind].copy_(self.cut(tensor)[self.piece])
            state["step"].fill_(steps)
        if kind == "master":
            self.publish()


# ----------------------------------------------------------------------- what every command needs


def launched() -> tuple[int, int]:
    """(rank, number of processes) of this job, as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_alone() -> None:
    """Raise ValueError if srun or mpirun has started several processes of which none is told its
    rank: each would take itself for the whole job."""
    if "RANK" in os.environ:
        return
    for name, launcher in (("SLURM_NTASKS", "srun --ntasks-per-node 1"),
                           ("OMPI_COMM_WORLD_SIZE", "mpirun --npernode 1")):
        count = os.environ.get(name, "1")
        if count != "1":
            raise ValueError(f"{name} is {count} but RANK is not set: start one torchrun a machine "
                             f"({launcher} torchrun --nnodes N --nproc-per-node 8 --rdzv-backend "
                             "c10d --rdzv-endpoint HOST:29500 ...) or, for one process alone, "
                             f"unset {name}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a whole command: a mistake of its user, or Ctrl-C, becomes one line and exit code 1.

    A mistake is met by every rank alike: the first one tells of it, and torchrun then ends the
    others before they speak. An error of one rank alone is told by that one. One rank of several
    ends by os._exit: at an orderly end NCCL would wait for the others, which wait for this one.
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
        faulthandler.unregister(signal.SIGTERM)  # a rank that torchrun ends now has nothing to add
        time.sleep(2.0 if rank else 0.0)  # the first rank speaks first
        who = f"rank {rank}: " if rank else ""
        print(f"error: {who}{error}", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception:
        if world == 1:
            raise
        # where this follows another rank's end, torchrun's signal comes too: first the traceback
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def print_once(text: str) -> None:
    """Print on the first process only."""
    if launched()[0] == 0:
        print(text, flush=True)
