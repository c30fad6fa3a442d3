"""What a training run takes of each GPU, memory and time, and whether it fits: in a second, before anything is rented.

    python -m tools.plan H100-80 --config runs/llama31_8b.json --sequence-length 1048576 --tp 8 --recompute mlp --offload
    python -m tools.plan measured --model MODEL_DIR --sequence-length 16384      # this machine, timed in a few seconds

Options are train.py's, sft.py's --pack, and --processes: how many GPUs there are. Everything is computed from
shapes, nothing is allocated. A plan that does not fit is an error that names the smallest change that does.
"""
from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model import RECOMPUTE, SPLIT_BY_TP, TILE_BYTES, VOCABULARY_TILE, ModelConfig, block_bytes, logit_bytes, read_config
from parallel import Grid, attention_kernel, block_backward, block_forward, launched, one_line_errors
from rope_yarn import scaling_from_options
from train import Parser, check_run, compute_type, device_here, forward_flops, positive, stage1_parser

# ------------------------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """What a plan assumes of one GPU: bytes, FLOP/s and bytes/s.

    `memory`, `peak`, `bandwidth` are the data sheet's, memory less 3 GiB for CUDA, NCCL and fragmentation. The rates of matrix
    products, of the flash kernel and of the links are what well-tuned code is known to reach: assumptions, not measurements.
    """

    memory: float
    peak: float  # dense bfloat16: 100 % utilisation
    product: float
    attention: float  # forward, of causal FLOPs
    attention_backward: float
    bandwidth: float  # of its memory
    link: float  # to a GPU of the same node, one way
    network: float  # to one of another node
    host: float  # to pinned host memory
    host_memory: float  # a GPU's share of it


DEVICES = {
    "H100-80": Device(76 * 2**30, 989e12, 640e12, 380e12, 300e12, 3.35e12, 350e9, 40e9, 50e9, 240 * 2**30),
    "H200": Device(137 * 2**30, 989e12, 640e12, 380e12, 300e12, 4.8e12, 350e9, 40e9, 50e9, 240 * 2**30),
    "A100-80": Device(76 * 2**30, 312e12, 220e12, 185e12, 165e12, 2.0e12, 230e9, 20e9, 22e9, 120 * 2**30),
}
NODE = 8  # GPUs that share the fast link
PAGEABLE = 5  # how much slower copies from and to memory that is not pinned are


def best_seconds(function: Callable[[], Tensor]) -> float:
    """Seconds of a function, after a call that warms up: the best of five, or of what a second holds."""
    seconds = []
    while len(seconds) < 2 or len(seconds) < 6 and sum(seconds[1:]) < 1:
        start = time.perf_counter()
        function().flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here, of a size that keeps the device busy."""
    size = 8192 if device.startswith("cuda") else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(lambda: matrix @ matrix)


def matrices(config: ModelConfig) -> dict[str, int]:
    """Elements of the weight matrices, by part: a forward pass multiplies each token by all but the embedding."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    table, layers = config.vocab_size * hidden, config.num_hidden_layers
    return {"embedding": table, "head": 0 if config.tie_word_embeddings else table,
            "qkv": layers * hidden * (heads + 2 * kv_heads) * config.head_dim, "o": layers * hidden * heads * config.head_dim,
            "mlp": layers * 3 * hidden * config.intermediate_size}


def measured_device(device: str, dtype: torch.dtype, head_dim: int) -> Device:
    """This machine, for a plan: a matrix product, the attention kernel and a copy, timed in a few seconds."""
    cuda = device.startswith("cuda")
    length, heads = (16384, 16) if cuda else (1024, 4)
    shape = (1, heads, length, head_dim)
    q, k, v, d_out = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    large = torch.empty(2**28 if cuda else 2**25, dtype=torch.uint8, device=device)
    out, lse = block_forward(q, k, v, True)
    forward = best_seconds(lambda: block_forward(q, k, v, True)[0])
    backward = best_seconds(lambda: block_backward(d_out, q, k, v, out, lse, True)[0])
    flops, copy = heads * 2 * length**2 * head_dim, 2 * large.nbytes / best_seconds(large.clone)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(0).total_memory - 3 * 2**30 if cuda else host
    rate = product_rate(device, dtype)
    return Device(total, rate, rate, flops / forward, 2.5 * flops / backward, copy, copy, copy, copy, host)


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass
class Plan:
    """Memory (bytes) and time (seconds a step) of one rank, computed from shapes alone: nothing is allocated.

    Symbols as in model.py: n = S / cp positions inside attention, m = n / tp between blocks, times the rows of a micro-batch.
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

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def parameters(self) -> float:
        """Of one tp rank."""
        norms = (2 * self.config.num_hidden_layers + 1) * self.config.hidden_size
        return sum(matrices(self.config).values()) / self.tp + norms

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
        c, n = self.config, self.micro_batch * self.length / self.cp
        head, gathered = n / self.tp * c.head_dim * self.itemsize, n * c.hidden_size * self.itemsize
        return {"x": gathered / self.tp, "gathered": gathered, "q": head * c.num_attention_heads,
                "kv": 2 * head * c.num_key_value_heads, "lse": n * c.num_attention_heads / self.tp * 4,
                "mlp": n * c.intermediate_size / self.tp * self.itemsize}

    def kept_by_block(self) -> float:
        """What one block leaves for backward."""
        s = self.sizes()
        inputs = 2 * s["gathered"]  # of the two column-parallel products
        norms = 0.0 if self.cuda else 14 / self.itemsize * s["x"]  # on a CPU RMSNorm keeps float32 intermediates
        return {"block": s["x"], "mlp": s["x"] + s["q"] + s["lse"],
                "none": 2 * s["x"] + inputs + norms + 2 * s["q"] + s["kv"] + s["lse"] + 4 * s["mlp"]}[self.recompute]

    def memory(self) -> dict[str, float]:
        """Bytes of a rank on its device at the worst moment of a step, by what they are."""
        c, s, layers = self.config, self.sizes(), self.config.num_hidden_layers
        positions, size = self.micro_batch * self.length / self.cp, self.itemsize
        state = (12 if size < 4 else 8) * self.shard  # float32 weights are their own master
        kept = (1 if self.offloaded else layers) * self.kept_by_block()  # offloaded: the one at hand
        rows = c.vocab_size / self.tp
        in_block, in_loss = block_bytes(c, self.tp, size), logit_bytes(c, self.tp, size)  # of a position
        tile_bytes = TILE_BYTES["cuda" if self.cuda else "cpu"]
        tile = min(self.tile or tile_bytes / in_block, positions) * in_block
        tile = 0.0 if self.recompute == "none" else tile  # then it is kept already, and given back where its gradients come
        logits = min(self.tile or tile_bytes / in_loss, positions) * in_loss
        logits = logits / 2 if size == 4 else logits  # float32 logits need no second buffer
        head = rows * c.hidden_size * 4
        ring = 4 / size * (s["q"] + s["kv"]) + 3 * s["kv"] if self.cp > 1 else 0.0  # float32 sums; K V, dK dV under way
        kernel = 2 * s["q"] + 4 / size * s["q"] if self.cuda else 0.0  # dK dV of every query head, dQ in float32
        again = s["q"] + s["lse"] if self.recompute == "block" else 0.0  # attention's result, computed once more
        qkv = 0.0 if self.recompute == "none" else s["q"] + s["kv"]
        tied = head if c.tie_word_embeddings else 0.0  # the head's gradient waits for the embedding's, and their sum is a third
        summed = 4 * self.shard if self.dp * self.cp > 1 else 0.0
        name = f"kept by {layers} blocks" + (", 1 on the device" if self.offloaded else "")
        within = {name: kept, "tied head: its gradient": tied}
        block = within | {"block: q k v, out": qkv + again, "block: gradients of x and out": 2 * s["x"] + s["q"]}
        moments = [
            {name: kept, "loss: x and its gradient": 2 * s["x"], "loss: tile": logits,
             "loss: gradient of the head": head + min(rows, VOCABULARY_TILE) * c.hidden_size * size},
            block | {"block: tile": tile},
            block | {"attention: dq dk dv": s["q"] + s["kv"], "attention: ring": ring, "attention: kernel": kernel},
            within | {"block: gradients of x": 3 * s["x"], "attention: dq dk dv": s["q"] + s["kv"], "block: tile": tile},
            {"embedding: gradients, tile": head + 2 * tied + s["x"] + tile}, {"update: summed gradients": summed}]
        worst = max(moments, key=lambda moment: sum(moment.values()))
        return {"weights": self.parameters * size, "gradients (float32)": 4 * self.parameters,
                "optimizer (float32)": 0.0 if self.offload_optimizer else state,
                "rotary tables": positions / self.micro_batch * c.head_dim * 4,
                "tokens": self.micro_batch * self.length * 40,  # and targets, documents, places: int64
                **{name: part for name, part in worst.items() if part}}

    def on_host(self) -> float:
        """Bytes of host memory for what is offloaded."""
        state = 16 * self.shard if self.offload_optimizer else 0.0  # master, moments and the gradient of an update
        return state + (self.config.num_hidden_layers * self.kept_by_block() if self.offloaded else 0.0)

    def traffic(self) -> dict[str, float]:
        """Bytes a rank sends in a step, by dimension."""
        c, s, rounds = self.config, self.sizes(), self.batch / self.dp / self.micro_batch
        # gathers and scatters of a block: 4 forward, 4 backward; recomputed: 1 for q k v, 1 + 3 in the tiles' forward
        per_block = (8 if self.recompute == "none" else 13) * s["gathered"] * (self.tp - 1) / self.tp
        hops = (self.cp - 1) * s["kv"] * (3 if self.recompute == "block" else 2) + s["kv"]
        hops += (self.cp - 1) * s["kv"] * 4 / self.itemsize  # dK dV: the first hop in the compute type, the others in float32
        others = (self.dp * self.cp - 1) / (self.dp * self.cp)
        kept = 2 * rounds * c.num_hidden_layers * self.kept_by_block() if self.offloaded else 0.0  # out and in
        return {"tp": rounds * c.num_hidden_layers * per_block,
                "cp": rounds * c.num_hidden_layers * hops if self.cp > 1 else 0.0,
                "dp": others * self.parameters * (4 + self.itemsize), "host": kept}

    def fits(self, device: Device) -> bool:
        return sum(self.memory().values()) <= device.memory and self.on_host() <= device.host_memory

    def times(self, device: Device) -> dict[str, float]:
        """Seconds of a step, by what they go to; the ring runs beside the computation."""
        c, traffic, rows = self.config, self.traffic(), self.batch / self.dp
        share, size = self.tp * self.cp, matrices(self.config)
        products, attention = (rows * flops / share for flops in forward_flops(c, self.length))
        tokens = rows * self.length / share
        again = 0 if self.recompute == "none" else 2 * tokens * (2 * size["qkv"] + size["o"] + size["mlp"])
        pointwise = tokens * c.num_hidden_layers * (30 * c.hidden_size + 16 * c.intermediate_size) * self.itemsize
        near = {"tp": self.tp <= NODE, "cp": self.tp * self.cp <= NODE, "dp": self.processes <= NODE}
        link = {axis: traffic[axis] / (device.link if near[axis] else device.network) for axis in near}
        forwards = 2 if self.recompute == "block" else 1
        work = {"matrix products": (3 * products + again) / device.product,
                "attention": attention * (forwards / device.attention + 2.5 / device.attention_backward),
                "norms, rotations, activations": pointwise / device.bandwidth, "tp communication": link["tp"]}
        beside = {"ring, beyond attention": max(0.0, link["cp"] - work["attention"]),
                  "host copies": traffic["host"] / device.host}
        update = 28 * self.shard / (device.host if self.offload_optimizer else device.bandwidth)  # bytes AdamW reads and writes
        update += PAGEABLE * self.shard * (4 + self.itemsize) / device.host if self.offload_optimizer else 0.0
        return work | beside | {"dp communication": link["dp"], "update": update}


def fitting_plans(plan: Plan, processes: int, device: Device) -> list[Plan]:
    """Every grid of so many GPUs with every memory option that trains the same batch and fits, the fastest first."""
    found, sizes = [], [getattr(plan.config, name) for name in SPLIT_BY_TP]
    for tp in (n for n in range(1, min(NODE, processes) + 1) if not any(size % n for size in sizes)):
        for cp in (n for n in range(1, processes // tp + 1) if processes % (n * tp) == 0
                   and plan.length % Grid(cp=n, tp=tp).sequence_multiple == 0):
            for recompute, offload, on_host in itertools.product(RECOMPUTE, (False, True), (False, True)):
                candidate = replace(plan, tp=tp, cp=cp, dp=processes // (tp * cp), micro_batch=1, recompute=recompute,
                                    offload=offload, offload_optimizer=on_host)
                possible = plan.batch % candidate.dp == 0 and not (offload and recompute == "none")
                if possible and candidate.fits(device):
                    found.append(candidate)
    return sorted(found, key=lambda candidate: sum(candidate.times(device).values()))


def cheapest(plan: Plan, device: Device) -> Plan | None:
    """What fits on the least GPUs, at least as many as now: this grid with other options, else the fastest grid."""
    for processes in [plan.processes, *(2**i for i in range(13) if 2**i > plan.processes)]:
        found = fitting_plans(plan, processes, device)
        same = [candidate for candidate in found if (candidate.tp, candidate.cp) == (plan.tp, plan.cp)]
        if found:
            return (same or found)[0]
    return None


# -------------------------------------------------------------------------------------------------------------- tables


def rank_shapes(plan: Plan) -> str:
    """What a rank's tensors look like: a line for people."""
    config, rows, tp, cp = plan.config, plan.micro_batch, plan.tp, plan.cp
    heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
    return (f"x ({rows}, {plan.length // (cp * tp)}, {config.hidden_size}) between blocks, q ({rows}, {heads}, "
            f"{plan.length // cp}, {config.head_dim}), k and v with {kv_heads} heads")


def options_of(plan: Plan) -> str:
    """A plan as the options of a command."""
    return (f"--processes {plan.processes} --tp {plan.tp} --cp {plan.cp} --micro-batch-size {plan.micro_batch} "
            f"--recompute {plan.recompute}" + " --offload" * plan.offload + " --offload-optimizer" * plan.offload_optimizer)


def print_memory(plan: Plan, device: Device) -> None:
    """The first table of a plan: where a rank's memory goes."""
    memory = plan.memory()
    print("\nmemory of a rank at its worst moment, GiB")
    for name, size in memory.items():
        print(f"  {name:34}{size / 2**30:9.2f}")
    verdict = "fits" if plan.fits(device) else "DOES NOT FIT"
    print(f"  {'total':34}{sum(memory.values()) / 2**30:9.2f} of {device.memory / 2**30:.1f}: {verdict}")
    if plan.on_host():
        print(f"  {'in host memory':34}{plan.on_host() / 2**30:9.2f} of {device.host_memory / 2**30:.1f}")


def print_times(plan: Plan, device: Device) -> None:
    """The second: what is computed and sent, and how long a step takes under which assumptions."""
    traffic, times, (products, attention) = plan.traffic(), plan.times(device), forward_flops(plan.config, plan.length)
    step, flops = sum(times.values()), 3 * plan.batch * (products + attention)
    print("\nsent by a rank a step, GiB: " + ", ".join(f"{axis} {size / 2**30:.2f}" for axis, size in traffic.items()))
    print(f"FLOPs a step (causal, nothing counted twice): {flops:.4g}, {attention / (products + attention):.0%} in attention")
    print("\nseconds of a step")
    for name, seconds in times.items():
        print(f"  {name:34}{seconds:9.2f}")
    rate, used = plan.batch * plan.length / step / plan.processes, flops / plan.processes / step / device.peak
    print(f"  {'total':34}{step:9.2f}: {rate:,.0f} tokens/s a GPU, causal MFU {used:.1%}, "
          f"{1e9 / rate / 3600:,.0f} GPU-hours for 1B tokens")
    print(f"assumed: products at {device.product / 1e12:.3g} TFLOP/s, attention {device.attention / 1e12:.3g} forward and "
          f"{device.attention_backward / 1e12:.3g} backward, memory {device.bandwidth / 1e12:.3g} TB/s, links "
          f"{device.link / 1e9:.0f} GB/s in a node of {NODE}, {device.network / 1e9:.0f} between nodes, host "
          f"{device.host / 1e9:.0f}; the ring is hidden behind attention, nothing else is")


def print_plan(plan: Plan, name: str, device: Device) -> None:
    """What is planned, on which device, and both tables."""
    config = plan.config
    print(f"{sum(matrices(config).values()) / 1e9:.2f}B parameters, {plan.batch} x {plan.length:,} tokens a step; "
          f"dp {plan.dp} x cp {plan.cp} x tp {plan.tp} = {plan.processes} x {name}; --recompute {plan.recompute}"
          + ", --offload" * plan.offload + ", --offload-optimizer" * plan.offload_optimizer)
    print("a rank: " + rank_shapes(plan))
    print_memory(plan, device)
    print_times(plan, device)


def what_would_fit(plan: Plan, device: Device) -> str:
    """For a plan that does not fit: what it takes, and the smallest that would."""
    gib, better = 2**30, cheapest(plan, device)
    hint = f"the smallest that does: {options_of(better)}" if better else "nothing up to 4,096 such GPUs does"
    return (f"{sum(plan.memory().values()) / gib:.1f} GiB and {plan.on_host() / gib:.1f} on the host do not fit in "
            f"{device.memory / gib:.1f} and {device.host_memory / gib:.1f}; {hint}")


# ------------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    parser = stage1_parser(planned=True)
    parser.description = "Plan a run: memory and time of a rank. Options are train.py's, and sft.py's --pack."
    parser.add_argument("--pack", dest="document_mask", action="store_true", help="of sft.py")
    parser.add_argument("on", metavar="GPU", choices=(*DEVICES, "measured"),
                        help=f"{', '.join(DEVICES)}, or measured: this machine")
    parser.add_argument("--processes", type=positive, help="GPUs in all (if not given: tp x cp)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the plan of a command. Exit code 1 if a rank's memory does not suffice, with a line that names what would."""
    with one_line_errors():
        a = parser().parse_args(argv)
        where = device_here(a.device) if a.on == "measured" else "cuda"
        dtype = getattr(torch, compute_type(a.dtype, where))
        scaling_from_options(vars(a))  # a command that cannot run has no plan
        config, processes = read_config(a.model or a.config), a.processes or max(launched()[1], a.tp * a.cp)
        if processes % (a.tp * a.cp):
            raise ValueError(f"--tp {a.tp} x --cp {a.cp} must divide --processes {processes}")
        grid = Grid(processes // (a.tp * a.cp), a.cp, a.tp)
        check_run(a, grid, config)
        attention_kernel(where, dtype, config.head_dim)
        device = measured_device(where, dtype, config.head_dim) if a.on == "measured" else DEVICES[a.on]
        rows = a.micro_batch_size or a.batch_size // grid.dp
        plan = Plan(config, a.sequence_length, a.batch_size, rows, a.tp, a.cp, grid.dp, dtype.itemsize, a.recompute, a.offload,
                    a.offload_optimizer, a.tile, where != "cpu")
        print_plan(plan, a.on, device)
        if plan.length > config.max_position_embeddings and not a.rope_kind:
            print(f"the model's window is {config.max_position_embeddings}: training needs --rope-kind and --rope-factor")
        if not plan.fits(device):
            raise ValueError(f"{a.on}: {what_would_fit(plan, device)}")


if __name__ == "__main__":
    main()
