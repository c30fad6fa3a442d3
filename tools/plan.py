"""What a training run takes of each GPU, memory and time, and whether it fits: in a second, before
anything is rented.

    python -m tools.plan H100-80 --config runs/llama31_8b.json --sequence-length 1048576 \\
        --tp 8 --recompute mlp --offload
    python -m tools.plan measured --model MODEL_DIR --sequence-length 16384

The second one is for this machine, which is timed in a few seconds. Options are train.py's;
--processes says how many GPUs there are, --stage 2 that sft.py is planned. Everything is computed
from shapes, nothing is allocated. A plan that does not fit is an error that names options that do,
on as many GPUs or else on the next power of two that suffices.
"""
from __future__ import annotations

import itertools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model import (
    RECOMPUTE,
    SPLIT_BY_TP,
    TILE_BYTES,
    VOCABULARY_TILE,
    ModelConfig,
    block_bytes,
    logit_bytes,
    read_config,
    rescale,
)
from parallel import (
    Grid,
    block_backward,
    block_forward,
    launched,
    one_line_errors,
)
from sft import stage2_parser
from train import (
    Parser,
    attention_kernel,
    beyond_window,
    capability_of,
    check_run,
    chunk_length,
    compute_type,
    extension,
    forward_flops,
    is_here,
    kernel_here,
    positive,
    stage1_parser,
)

# ---------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """What a plan assumes of one GPU: bytes, FLOP/s and bytes/s.

    `peak` and `bandwidth` are the data sheet's; `memory` is what torch reports (H100: 79.6 GiB,
    H200: about 140) less 3 GiB for CUDA, NCCL and fragmentation. Where attention's rates come from
    stands in docs/memory.md; those of matrix products and of the links are what well-tuned code is
    known to reach.
    """

    capability: tuple[int, int] | None  # the compute capability of a GPU
    memory: float
    peak: float  # dense bfloat16: 100 % utilisation
    product: float
    attention: dict[str, tuple[float, float]]  # by kernel: forward, backward, of causal FLOPs
    small_heads: float  # what share of it heads of less than 128 reach
    bandwidth: float  # of its memory
    link: float  # to a GPU of the same node, one way
    network: float  # to one of another node
    host: float  # to pinned host memory
    host_memory: float  # a GPU's share of it


H100 = Device(
    capability=(9, 0), memory=76 * 2**30, peak=989e12, product=640e12,
    attention={"flash": (311e12, 328e12), "cudnn": (538e12, 545e12), "fa3": (616e12, 561e12)},
    small_heads=0.8,
    bandwidth=3.35e12, link=350e9, network=40e9, host=50e9, host_memory=240 * 2**30)
A100 = Device(
    capability=(8, 0), memory=76 * 2**30, peak=312e12, product=220e12,
    attention={"flash": (185e12, 165e12)}, small_heads=0.8,
    bandwidth=2.0e12, link=230e9, network=20e9, host=22e9, host_memory=120 * 2**30)
DEVICES = {
    "H100-80": H100,
    "H200": replace(H100, memory=137 * 2**30, bandwidth=4.8e12),
    "A100-80": A100,
}
NODE = 8  # GPUs that share the fast link
PAGEABLE = 5  # how much slower copies from and to memory that is not pinned are


def best_seconds(function: Callable[[], Tensor]) -> float:
    """Seconds of a function, after a call that warms up: the best of five, or of what a second
    holds."""
    seconds = []
    while len(seconds) < 2 or len(seconds) < 6 and sum(seconds[1:]) < 1:
        start = time.perf_counter()
        result = function()
        result[(0,) * result.ndim].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here, of a size that keeps the device busy."""
    size = 8192 if device.startswith("cuda") else 512
    matrix = torch.randn(size, size, dtype=dtype, device=device)  # a GPU is faster at ones
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix)


def matrices(config: ModelConfig) -> dict[str, int]:
    """Elements of the weight matrices, by part: a forward pass multiplies each token by all but
    the embedding."""
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    table = config.vocab_size * hidden
    heads_q_k_v = config.num_attention_heads + 2 * config.num_key_value_heads
    return {
        "embedding": table,
        "head": 0 if config.tie_word_embeddings else table,
        "qkv": layers * hidden * heads_q_k_v * config.head_dim,
        "o": layers * hidden * config.num_attention_heads * config.head_dim,
        "mlp": layers * 3 * hidden * config.intermediate_size,
    }


def host_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured_device(device: str, dtype: torch.dtype, head_dim: int, kernel: str,
                    ranks: int = 1) -> Device:
    """This machine, for a plan: a matrix product, attention's `kernel` and a copy, timed in a few
    seconds. So many ranks share its memory; on a CPU that is all they have."""
    cuda = device.startswith("cuda")
    length, heads = (16384, 16) if cuda else (1024, 4)
    shape = (1, length, heads, head_dim)  # in memory, as a model has them
    q, k, v, d_out = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2)
                      for _ in range(4))
    out, lse = block_forward(q, k, v, True, kernel)
    forward = best_seconds(lambda: block_forward(q, k, v, True, kernel)[0])
    backward = best_seconds(lambda: block_backward(d_out, q, k, v, out, lse, True, kernel)[0])
    flops = heads * 2 * length**2 * head_dim

    large = torch.empty(2**28 if cuda else 2**25, dtype=torch.uint8, device=device)
    copy = 2 * large.nbytes / best_seconds(large.clone)  # a byte is read and written
    host = host_bytes() / ranks
    total = torch.cuda.get_device_properties(device).total_memory - 3 * 2**30 if cuda else host
    rate = product_rate(device, dtype)
    rates = (flops / forward, 2.5 * flops / backward)
    return Device(
        capability=capability_of(device), memory=total, peak=max(rate, *rates), product=rate,
        attention={kernel: rates},
        small_heads=1.0,  # these are the model's own heads
        bandwidth=copy, link=copy, network=copy, host=copy, host_memory=host)


# --------------------------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """Memory (bytes) and time (seconds a step) of one rank, computed from shapes alone: nothing is
    allocated.

    Symbols as in model.py: n = S / cp positions inside attention, m = n / tp between blocks, times
    the rows of a micro-batch.
    """

    config: ModelConfig
    length: int
    batch: int  # sequences a step, over all processes
    micro_batch: int
    tp: int
    cp: int
    dp: int
    itemsize: int = 2
    recompute: str = "none"
    offload: bool = False
    offload_optimizer: bool = False
    tile: int | None = None  # positions, see Llama
    cuda: bool = True
    kernel: str = "flash"  # of attention, see parallel.block_forward

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def rounds(self) -> float:
        """Micro-batches a step."""
        return self.batch / self.dp / self.micro_batch

    @property
    def positions(self) -> float:
        """n, of all rows of a micro-batch."""
        return self.micro_batch * self.length / self.cp

    @property
    def parameters(self) -> float:
        """Of one tp rank."""
        c = self.config
        norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
        if c.qk_norm:
            norms += 2 * c.num_hidden_layers * c.head_dim
        return sum(matrices(c).values()) / self.tp + norms

    @property
    def shard(self) -> float:
        """Parameters that this rank's optimizer updates."""
        return self.parameters / (self.dp * self.cp)

    @property
    def offloaded(self) -> bool:
        """On a CPU there is no other place to go."""
        return self.offload and self.cuda

    def sizes(self) -> dict[str, float]:
        """Bytes of the tensors that a rank's positions come in, by what one of them is."""
        c = self.config
        n = self.positions
        head = n / self.tp * c.head_dim * self.itemsize
        gathered = n * c.hidden_size * self.itemsize
        return {
            "x": gathered / self.tp,
            "gathered": gathered,
            "q": head * c.num_attention_heads,
            "kv": 2 * head * c.num_key_value_heads,
            "lse": n * c.num_attention_heads / self.tp * 4,
            "mlp": n * c.intermediate_size / self.tp * self.itemsize,
        }

    def kept_by_block(self) -> float:
        """What one block leaves for backward."""
        s = self.sizes()
        if self.recompute == "block":  # its input, and everything is computed again
            return s["x"]
        if self.recompute == "mlp":  # attention's result too, so that attention never runs twice
            return s["x"] + s["q"] + s["lse"]
        inputs = 2 * s["gathered"]  # of the two column-parallel products
        normed = 2 * s["x"]  # what goes into the norms
        if self.config.qk_norm:  # q and k too
            normed += s["q"] + s["kv"] / 2
        # on a CPU RMSNorm keeps its parts, those of bfloat16 in float32
        norms = 0.0
        if not self.cuda:
            norms = normed if self.itemsize == 4 else 3.5 * normed
        return normed + inputs + norms + 2 * s["q"] + s["kv"] + s["lse"] + 4 * s["mlp"]

    def memory(self) -> dict[str, float]:
        """Bytes of a rank on its device at the worst moment of a step, by what they are."""
        moments = self.moments()
        worst = max(moments, key=lambda moment: sum(moment.values()))
        # float32 weights are their own master
        state = (12 if self.itemsize < 4 else 8) * self.shard
        return {
            "weights": self.parameters * self.itemsize,
            "gradients (float32)": 4 * self.parameters,
            "optimizer (float32)": 0.0 if self.offload_optimizer else state,
            "rotary tables": self.positions / self.micro_batch * self.config.head_dim * 4,
            "tokens": self.micro_batch * self.length * 40,  # targets, documents, places too: int64
            **{name: part for name, part in worst.items() if part},
        }

    def moments(self) -> list[dict[str, float]]:
        """The moments of a step that may need the most memory: what each has beside weights,
        gradients and optimizer."""
        c = self.config
        s = self.sizes()
        size = self.itemsize
        layers = c.num_hidden_layers
        x = s["x"]
        q = s["q"]
        kv = s["kv"]

        # 1. What is there in most moments: what blocks have left for backward.
        kept = self.kept_by_block()
        name = f"kept by {layers} blocks"
        if self.offloaded:  # only the one at hand
            name += ", 1 on the device"
        else:
            kept = layers * kept
        # the gradient of a tied head waits for the embedding's, and their sum is a third
        rows = c.vocab_size / self.tp
        head = rows * c.hidden_size * 4
        tied = head if c.tie_word_embeddings else 0.0
        within = {name: kept, "tied head: its gradient": tied}

        # 2. Tiles: of a block where it is recomputed, of logits always.
        tile = 0.0  # without recomputation it is kept already, given back where gradients come
        qkv = 0.0
        if self.recompute != "none":
            tile = self.tile_bytes(block_bytes(c, self.tp, size))
            qkv = q + kv
        logits = self.tile_bytes(logit_bytes(c, self.tp, size))
        if size == 4:  # float32 logits need no second buffer
            logits = logits / 2
        columns = min(rows, VOCABULARY_TILE) * c.hidden_size * size
        # h and dh; then, the larger, h scaled in float32 and rounded, or a product of h
        states = self.tile_positions(logit_bytes(c, self.tp, size)) * c.hidden_size * size
        products = max((4 / size + 2 + 3 / self.tp) * states, (1 + 3 / self.tp) * states + columns)
        at_loss = {
            name: 0.0 if self.offloaded else kept,
            "loss: x and its gradient": 2 * x,
            "loss: tile": logits + states + products,
            "loss: gradient of the head": head,
        }

        # 3. Backward of a block: of its second half, of attention, and of its first products.
        # attention's result, computed once more
        again = q + s["lse"] if self.recompute == "block" else 0.0
        # A later hop of the ring's last rank: all queries with half of the keys.
        hop_kv = kv / 2 if self.cp > 1 else kv
        ring = 0.0
        if self.cp == 2:  # the first hop's results are not yet sums; K V, and dK dV under way
            one_head = c.num_key_value_heads == self.tp  # lies as it is sent; several are copied
            ring = q + (3 if one_head else 4) * kv
        elif self.cp > 2:  # dQ and dK dV summed in float32, dK dV and K V under way, the last parts
            ring = 4 / size * (q + 2 * kv) + 2 * kv + q + hop_kv
        kernel = self.kernel_scratch(q, hop_kv)
        block = within | {
            "block: q k v, out": qkv + again,
            "block: gradients of x and out": 2 * x + q,
        }
        at_attention = block | {
            "attention: dq dk dv": q + hop_kv,
            "attention: ring": ring,
            "attention: kernel": kernel,
        }
        at_projections = within | {
            "block: gradients of x": 3 * x,
            "attention: dq dk dv": q + kv,
            "block: tile": tile,
        }

        # 4. The end of backward, and the update.
        at_embedding = {"embedding: gradients, tile": head + 2 * tied + x + tile}
        pieces = self.dp * self.cp
        whole = rows * c.hidden_size * size  # the largest parameter, as it is published
        at_update = {"update: a parameter": whole}
        if pieces > 1:
            at_update = {"update: summed gradients": 4 * self.shard,
                         "update: a parameter and its piece": whole + whole / pieces}
        at_mlp = block | {"block: tile": tile}
        return [at_loss, at_mlp, at_attention, at_projections, at_embedding, at_update]

    def kernel_scratch(self, q: float, kv: float) -> float:
        """What attention's backward takes for itself on CUDA: dQ in float32, a number of each
        query, and where heads share keys dK dV, of each query head or (FA3) in float32."""
        if not self.cuda:
            return 0.0
        wide = 4 / self.itemsize
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        d_kv = wide * kv if self.kernel == "fa3" else group * kv
        if group == 1:
            d_kv = 0.0
        return wide * q + self.sizes()["lse"] + d_kv

    def tile_positions(self, position: float) -> float:
        """Positions in a tile, where one of them has so many bytes."""
        full = TILE_BYTES["cuda" if self.cuda else "cpu"]
        return min(self.tile or full / position, self.positions)

    def tile_bytes(self, position: float) -> float:
        """Bytes of such a tile."""
        return self.tile_positions(position) * position

    def on_host(self) -> float:
        """Bytes of host memory for what is offloaded."""
        state = gradient = kept = 0.0
        if self.offload_optimizer:
            state = 12 * self.shard  # master and moments
            gradient = 4 * self.shard  # at an update: what blocks keep is used up by then
        if self.offloaded:
            kept = self.config.num_hidden_layers * self.kept_by_block()
        return state + max(gradient, kept)

    def gathers(self) -> int:
        """Gathers and scatters of a block over tp: 4 forward, 4 backward.

        Recomputed: 1 more for q k v, and 1 + 3 in the tiles' forward.
        """
        return 8 if self.recompute == "none" else 13

    def traffic(self) -> dict[str, float]:
        """Bytes a rank sends in a step, by dimension."""
        s = self.sizes()
        layers = self.config.num_hidden_layers

        partners = (self.tp - 1) / self.tp
        blocks = layers * self.gathers() * s["gathered"] * partners
        # the embedding scatters and gathers, the loss too; and sums three numbers a position
        ends = (4 * s["gathered"] + 24 * self.positions) * partners

        # K V go around once a forward, once in backward
        passes = 3 if self.recompute == "block" else 2
        ring = (self.cp - 1) * s["kv"] * passes + s["kv"]
        # dK dV: the first hop in the compute type, the others in float32
        ring += (self.cp - 1) * s["kv"] * 4 / self.itemsize

        kept = 0.0
        if self.offloaded:  # out and in
            kept = 2 * self.rounds * layers * self.kept_by_block()
        others = (self.dp * self.cp - 1) / (self.dp * self.cp)
        return {
            "tp": self.rounds * (blocks + ends),
            "cp": self.rounds * layers * ring if self.cp > 1 else 0.0,
            "dp": others * self.parameters * (4 + self.itemsize),
            "host": kept,
        }

    def fits(self, device: Device) -> bool:
        on_device = sum(self.memory().values())
        return on_device <= device.memory and self.on_host() <= device.host_memory

    def pointwise(self) -> float:
        """Bytes that a micro-batch's operators read and write on this rank, but for products and
        attention. The numbers were fitted to counts on fake tensors; tests/test_fake_cuda.py holds
        them to 20 %."""
        c = self.config
        between = self.positions / self.tp
        width = c.num_attention_heads * c.head_dim
        # 1. norms, rotations, residuals, activations of a layer, in elements of a position
        elements = 38 * c.hidden_size + 28 * c.intermediate_size
        tiles = 1.0
        if self.recompute != "none":  # forward runs twice
            elements = 56 * c.hidden_size + 42 * c.intermediate_size
            tiles = self.positions / self.tile_positions(block_bytes(c, self.tp, self.itemsize))
        if c.qk_norm:
            heads = c.num_attention_heads + c.num_key_value_heads
            elements += (5 if self.recompute == "none" else 9) * heads * c.head_dim
        elements += 8 * (self.tp - 1) * c.hidden_size  # gathered, and their gradients' sums
        if self.micro_batch > 1 and self.tp > 1:  # of several rows they are copied, too
            elements += 2 * self.gathers() * self.tp * c.hidden_size
        elements += 22 * (self.cp - 1) * width  # a hop's merge, and its sums in float32
        layer = between * elements * self.itemsize
        # 2. each tile adds its gradients to all of a layer's weights', in float32
        size = matrices(c)
        weights = (size["qkv"] + size["o"] + size["mlp"]) / self.tp
        layers = c.num_hidden_layers * layer + 18 * tiles * weights
        # 3. logits are copied, exponentiated, summed; each tile adds to the head's gradient
        rows = c.vocab_size / self.tp
        logit_tiles = self.positions / self.tile_positions(logit_bytes(c, self.tp, self.itemsize))
        head = 36 * self.positions * rows + 10 * logit_tiles * rows * c.hidden_size
        return layers + head

    def times(self, device: Device) -> dict[str, float]:
        """Seconds of a step, by what they go to; the ring runs beside the computation."""
        c = self.config
        rows = self.batch / self.dp
        ranks = self.tp * self.cp  # that share a sequence
        tokens = rows * self.length / ranks

        # 1. What is computed: backward takes two products for each of forward's.
        products, attention = (rows * flops / ranks for flops in forward_flops(c, self.length))
        size = matrices(c)
        again = 0
        if self.recompute != "none":
            again = 2 * tokens * (2 * size["qkv"] + size["o"] + size["mlp"])
        forwards = 2 if self.recompute == "block" else 1
        forward_rate, backward_rate = device.attention[self.kernel]
        seconds_a_flop = forwards / forward_rate + 2.5 / backward_rate
        if c.head_dim < 128:
            seconds_a_flop = seconds_a_flop / device.small_heads

        # 2. What is sent: a dimension that leaves the node takes the slower network.
        traffic = self.traffic()
        links = {}
        for axis, reach in (("tp", self.tp), ("cp", ranks), ("dp", self.processes)):
            links[axis] = traffic[axis] / (device.link if reach <= NODE else device.network)

        # 3. The update: bytes that AdamW reads and writes.
        update = 28 * self.shard / (device.host if self.offload_optimizer else device.bandwidth)
        if self.offload_optimizer:  # gradients come and weights go, in memory that is not pinned
            update += PAGEABLE * self.shard * (4 + self.itemsize) / device.host
        work = attention * seconds_a_flop
        # the last hop brings dK dV home, in float32, and nothing is left to compute meanwhile
        home = 0.0
        if self.cp > 1:
            home = self.rounds * c.num_hidden_layers * self.sizes()["kv"] * 4 / self.itemsize
            home = home / (device.link if ranks <= NODE else device.network)
        return {
            "matrix products": (3 * products + again) / device.product,
            "attention": work,
            "norms, activations, loss, sums": self.rounds * self.pointwise() / device.bandwidth,
            "tp communication": links["tp"],
            "ring, beyond attention": max(0.0, links["cp"] - home - work) + home,
            "host copies": traffic["host"] / device.host,
            "dp communication": links["dp"],
            "update": update,
        }


def tokens_per_second(plan: Plan, device: Device) -> float:
    """Of one GPU."""
    seconds = sum(plan.times(device).values())
    return plan.batch * plan.length / seconds / plan.processes


KernelOn = Callable[[Grid], str]  # what computes attention on a grid; ValueError if it cannot be


def grids(plan: Plan, processes: int, kernel_on: KernelOn) -> Iterator[Plan]:
    """The plan on every grid of so many GPUs that can split its heads, sequence and batch, and
    leaves chunks to a kernel that it takes."""
    split = [getattr(plan.config, name) for name in SPLIT_BY_TP]
    for tp in range(1, min(NODE, processes) + 1):
        if any(size % tp for size in split):
            continue
        for cp in range(1, processes // tp + 1):
            grid = Grid(cp=cp, tp=tp)
            if processes % (cp * tp) or plan.length % grid.sequence_multiple:
                continue
            dp = processes // (tp * cp)
            if plan.batch % dp:
                continue
            try:
                kernel = kernel_on(grid)
            except ValueError:  # what is asked takes no such chunks
                continue
            yield replace(plan, tp=tp, cp=cp, dp=dp, micro_batch=1, kernel=kernel)


def fitting_plans(plan: Plan, processes: int, device: Device, kernel_on: KernelOn) -> list[Plan]:
    """Every grid of so many GPUs with every memory option that trains the same batch and fits,
    the fastest first."""
    found = []
    for grid in grids(plan, processes, kernel_on):
        for options in itertools.product(RECOMPUTE, (False, True), (False, True)):
            recompute, offload, on_host = options
            if offload and recompute == "none":  # which train.py refuses
                continue
            candidate = replace(grid, recompute=recompute, offload=offload,
                                offload_optimizer=on_host)
            if candidate.fits(device):
                found.append(candidate)
    return sorted(found, key=lambda candidate: sum(candidate.times(device).values()))


def cheapest(plan: Plan, device: Device, kernel_on: KernelOn) -> Plan | None:
    """What fits on as many GPUs as now, else on the next power of two that suffices: this grid with
    the fastest options, else the fastest grid."""
    more = [2**i for i in range(13) if 2**i > plan.processes]
    for processes in [plan.processes, *more]:
        found = fitting_plans(plan, processes, device, kernel_on)
        same = [other for other in found if (other.tp, other.cp) == (plan.tp, plan.cp)]
        if found:
            return (same or found)[0]
    return None


# ---------------------------------------------------------------------------- where memory goes


def techniques(plan: Plan) -> dict[str, Plan]:
    """What makes a long sequence fit, one technique after the other, from a plan of a grid."""
    plain = replace(plan, tile=2**40)  # one tile holds everything
    blocks = replace(plain, recompute="block")
    tiles = replace(blocks, tile=None)
    mlp = replace(tiles, recompute="mlp")
    offload = replace(mlp, offload=True)
    return {
        "everything kept, no tiles": plain,
        "blocks recomputed whole": blocks,
        "and tiles": tiles,
        "out and lse kept (mlp)": mlp,
        "mlp, kept on the host": offload,
        "and the optimizer": replace(offload, offload_optimizer=True),
    }


def memory_parts(plan: Plan) -> dict[str, float]:
    """`Plan.memory` in three parts: what a step begins with, what its blocks leave for backward,
    and what is there beside both at its worst moment."""
    memory = plan.memory()
    fixed = memory["weights"] + memory["gradients (float32)"] + memory["optimizer (float32)"]
    kept = next((size for name, size in memory.items() if name.startswith("kept")), 0.0)
    return {
        "weights, gradients, optimizer": fixed,
        f"kept by {plan.config.num_hidden_layers} blocks": kept,
        "at the worst moment beside it": sum(memory.values()) - fixed - kept,
    }


# ----------------------------------------------------------------------------------------- tables


def gib(size: float) -> float:
    return size / 2**30


def rank_shapes(plan: Plan) -> str:
    """What a rank's tensors look like: a line for people."""
    config = plan.config
    rows = plan.micro_batch
    between = plan.length // (plan.cp * plan.tp)
    inside = plan.length // plan.cp
    heads = config.num_attention_heads // plan.tp
    kv_heads = config.num_key_value_heads // plan.tp
    return (f"x ({rows}, {between}, {config.hidden_size}) between blocks, "
            f"q ({rows}, {heads}, {inside}, {config.head_dim}), k and v with {kv_heads} heads")


def hop_shapes(plan: Plan) -> str:
    """What a rank sends to the next one of its ring in each layer: a line for people."""
    config = plan.config
    shape = (plan.micro_batch, config.num_key_value_heads // plan.tp, plan.length // plan.cp,
             config.head_dim)
    mib = plan.sizes()["kv"] / 2**20
    wide = mib * 4 / plan.itemsize
    return (f"k and v {shape} each, {mib:,.0f} MiB together, {plan.cp - 1} times forward and again "
            f"backward; there also dk and dv, {plan.cp} times, {mib:,.0f} MiB and then, in "
            f"float32, {wide:,.0f}; from each rank to rank + {plan.tp}, from the last to the first")


def options_of(plan: Plan) -> str:
    """A plan as the options of a command."""
    options = (f"--processes {plan.processes} --tp {plan.tp} --cp {plan.cp} "
               f"--micro-batch-size {plan.micro_batch} --recompute {plan.recompute}")
    if plan.offload:
        options += " --offload"
    if plan.offload_optimizer:
        options += " --offload-optimizer"
    return options


def print_memory(plan: Plan, device: Device) -> None:
    """The first table of a plan: where a rank's memory goes."""
    memory = plan.memory()
    print("\nmemory of a rank at its worst moment, GiB")
    for name, size in memory.items():
        print(f"  {name:34}{gib(size):9.2f}")
    lines = [("total", sum(memory.values()), device.memory)]
    if plan.on_host():
        lines.append(("in host memory", plan.on_host(), device.host_memory))
    for name, needed, there in lines:
        verdict = "fits" if needed <= there else "DOES NOT FIT"
        print(f"  {name:34}{gib(needed):9.2f} of {gib(there):.1f}: {verdict}")


def print_times(plan: Plan, device: Device) -> None:
    """The second: what is computed and sent, and how long a step takes under which assumptions."""
    sent = ", ".join(f"{axis} {gib(size):.2f}" for axis, size in plan.traffic().items())
    print(f"\nsent by a rank a step, GiB: {sent}")
    products, attention = forward_flops(plan.config, plan.length)
    flops = 3 * plan.batch * (products + attention)
    share = attention / (products + attention)
    print(f"FLOPs a step (causal, nothing counted twice): {flops:.4g}, {share:.0%} in attention")

    print("\nseconds of a step")
    times = plan.times(device)
    for name, seconds in times.items():
        print(f"  {name:34}{seconds:9.2f}")
    step = sum(times.values())
    rate = tokens_per_second(plan, device)
    utilisation = flops / plan.processes / step / device.peak
    print(f"  {'total':34}{step:9.2f}: {rate:,.0f} tokens/s a GPU, "
          f"causal MFU {utilisation:.1%}, {1e9 / rate / 3600:,.0f} GPU-hours for 1B tokens")
    forward, backward = device.attention[plan.kernel]
    print(f"assumed: products at {device.product / 1e12:.3g} TFLOP/s, "
          f"attention {forward / 1e12:.3g} forward and {backward / 1e12:.3g} backward, "
          f"memory {device.bandwidth / 1e12:.3g} TB/s, "
          f"links {device.link / 1e9:.0f} GB/s in a node of {NODE}, "
          f"{device.network / 1e9:.0f} between nodes, host {device.host / 1e9:.0f}; "
          "the ring is hidden behind attention, nothing else is")


def print_plan(plan: Plan, name: str, device: Device, why: str) -> None:
    """What is planned, on which device, `why` with this kernel, and both tables."""
    parameters = sum(matrices(plan.config).values())
    title = (f"{parameters / 1e9:.2f}B parameters, {plan.batch} x {plan.length:,} tokens a step; "
             f"dp {plan.dp} x cp {plan.cp} x tp {plan.tp} = {plan.processes} x {name}; "
             f"--recompute {plan.recompute}")
    if plan.offload:
        title += ", --offload"
    if plan.offload_optimizer:
        title += ", --offload-optimizer"
    print(title)
    print(f"attention by {plan.kernel} ({why})")
    print("a rank: " + rank_shapes(plan))
    if plan.cp > 1:
        print("a hop of the ring: " + hop_shapes(plan))
    print_memory(plan, device)
    print_times(plan, device)


def print_fastest(plan: Plan, name: str, device: Device, kernel_on: KernelOn) -> None:
    """What else as many GPUs can do with the same batch: the fastest that fits."""
    found = fitting_plans(plan, plan.processes, device, kernel_on)
    best = found[0] if found else plan
    rate = tokens_per_second(best, device)
    host = f" and {gib(best.on_host()):.1f} on the host" if best.on_host() else ""
    other = f", attention by {best.kernel}" if best.kernel != plan.kernel else ""
    print(f"the fastest of {plan.processes} x {name}: {options_of(best)}, {rate:,.0f} tokens/s a "
          f"GPU in {gib(sum(best.memory().values())):.1f} GiB{host}{other}")


def what_would_fit(plan: Plan, device: Device, kernel_on: KernelOn) -> str:
    """For a plan that does not fit: what it takes, and what would."""
    better = cheapest(replace(plan, tile=None), device, kernel_on)
    if better:
        tile = ", without --tile" if plan.tile else ""
        hint = f"these options do: {options_of(better)}{tile}"
    else:
        hint = "nothing up to 4,096 such GPUs does"
    on_device = sum(plan.memory().values())
    return (f"{gib(on_device):.1f} GiB and {gib(plan.on_host()):.1f} on the host do not fit in "
            f"{gib(device.memory):.1f} and {gib(device.host_memory):.1f}; {hint}")


# ----------------------------------------------------------------------------------- command line


def parser() -> Parser:
    parser = stage1_parser(planned=True)
    parser.description = ("Plan a run: memory and time of a rank. Options are train.py's, and some "
                          "of sft.py's.")
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), default=1,
        help="2: sft.py, whose defaults hold (8,192 tokens, a batch of 128, a micro-batch of 1); "
        "rows are as long as their samples, and planned at --sequence-length")
    add("--pack", action="store_true", help="with --stage 2: as sft.py --pack")
    add("on", metavar="GPU", choices=(*DEVICES, "measured"),
        help=f"{', '.join(DEVICES)}, or measured: this machine")
    add("--processes", type=positive,
        help="GPUs in all (if not given: those of torchrun, or tp x cp)")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The options of a command, with its stage's defaults."""
    own = parser()
    a = own.parse_args(argv)
    if a.stage == 2:
        stage2 = stage2_parser()
        for name in ("sequence_length", "batch_size", "micro_batch_size"):
            own.set_defaults(**{name: stage2.get_default(name)})
        a = own.parse_args(argv)
    if a.sequence_length is None:
        raise ValueError("the following arguments are required: --sequence-length")
    if a.pack and a.stage == 1:
        raise ValueError("--pack is sft.py's: add --stage 2")
    if a.document_mask and a.stage == 2:
        raise ValueError("--cross-document-mask is train.py's: sft.py's is --pack")
    if a.stage == 2 and (a.stored_order or a.new_window or a.rope_theta):
        raise ValueError("--stored-order, --new-window and --rope-theta are train.py's: sft.py has "
                         "no such options")
    a.document_mask = a.document_mask or a.pack
    return a


def main(argv: list[str] | None = None) -> None:
    """Print the plan of a command. Exit code 1 if a rank's memory does not suffice, with a line
    that names what would."""
    with one_line_errors():
        a = parse(argv)
        where = "cuda"
        if a.on == "measured":
            where = a.device
            if not is_here(where):
                raise ValueError(f"--device {where}: is not here; measured is this machine")
        dtype = getattr(torch, compute_type(a.dtype, where))

        # a command that cannot run has no plan; only the extension may be left out
        own = read_config(a.model or a.config)
        config = rescale(own, **extension(a), window=a.new_window)
        problem = beyond_window(own, config, a.sequence_length)
        if problem and (a.rope_kind or a.rope_theta or a.new_window):
            raise ValueError(problem)
        processes = a.processes or max(launched()[1], a.tp * a.cp)
        if processes % (a.tp * a.cp):
            raise ValueError(f"--tp {a.tp} x --cp {a.cp} must divide --processes {processes}")
        grid = Grid(processes // (a.tp * a.cp), a.cp, a.tp)
        check_run(a, grid, config)

        def chunk_on(grid: Grid) -> int | None:
            return chunk_length(a, grid) if a.stage == 1 else None  # samples have any length

        asked, head_dim, chunk = a.attention, config.head_dim, chunk_on(grid)
        if a.on == "measured":
            kernel, why = kernel_here(asked, where, dtype, head_dim, chunk)
            device = measured_device(where, dtype, head_dim, kernel, min(processes, NODE))
            asked = kernel  # no other was timed
        else:
            device = DEVICES[a.on]
            kernel, why = attention_kernel(asked, device.capability, dtype, head_dim, chunk)
        rows = a.micro_batch_size or a.batch_size // grid.dp
        plan = Plan(config, a.sequence_length, a.batch_size, rows, a.tp, a.cp, grid.dp,
                    dtype.itemsize, a.recompute, a.offload, a.offload_optimizer, a.tile,
                    cuda=where != "cpu", kernel=kernel)
        print_plan(plan, a.on, device, why)
        if problem:
            print(f"note: {problem}")
        if chunk is None:
            print("note: planned as if every sample or document had the full length; shorter ones "
                  "take less, uneven ones make the ranks of a ring wait (docs/grids.md)")
        seconds = sum(plan.times(device).values()) / plan.rounds
        if processes > 1 and seconds > a.timeout:
            print(f"note: a micro-batch takes {seconds:,.0f} s, longer than --timeout "
                  f"{a.timeout:g}, after which a rank counts as hanging; give twice as much")

        def kernel_on(grid: Grid) -> str:
            return attention_kernel(asked, device.capability, dtype, head_dim, chunk_on(grid))[0]

        if not plan.fits(device):
            raise ValueError(f"{a.on}: {what_would_fit(plan, device, kernel_on)}")
        print_fastest(plan, a.on, device, kernel_on)


if __name__ == "__main__":
    main()
