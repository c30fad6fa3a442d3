"""Tables of plans for Llama 3.1 8B and 70B at 1M, 2M and 4M tokens: what fits on how many GPUs,
how fast with cuDNN's attention and with flash, and where the memory goes.

    python -m benchmarks.plans

No GPU is needed: everything is computed from shapes, as by tools.plan. Every step has 8M tokens, as
in the paper (arXiv 2504.06214), whose own grids stand beside the fastest that fits.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from model import ModelConfig, read_config
from parallel import Grid
from tools.plan import (
    DEVICES,
    Device,
    Plan,
    fitting_plans,
    memory_parts,
    options_of,
    techniques,
    tokens_per_second,
)
from train import forward_flops

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 2**23
PAPER = {2**20: (8, 4), 2**21: (8, 16), 2**22: (8, 16)}  # tp, cp on 256 H100
PUBLISHED = {2**20: "217", 2**21: "181-212", 2**22: "105"}  # tokens/s/GPU, from its hours


def line(title: str, plan: Plan, device: Device, published: str = "") -> str:
    """One row of the first table."""
    seconds = sum(plan.times(device).values())
    memory = sum(plan.memory().values())
    rate = tokens_per_second(plan, device)
    by_flash = tokens_per_second(replace(plan, kernel="flash"), device)
    flops = 3 * plan.batch * sum(forward_flops(plan.config, plan.length))
    utilisation = flops / plan.processes / seconds / device.peak
    options = plan.recompute
    if plan.offload:
        options += ", offload"
    if plan.offload_optimizer:
        options += ", offload-optimizer"
    cells = [
        f"{plan.length // 2**20}M",
        title,
        f"{plan.tp}, {plan.cp}, {plan.dp}",
        options,
        f"{memory / 2**30:.1f}",
        f"{plan.on_host() / 2**30:.0f}",
        f"{seconds:,.0f}",
        f"{rate:,.0f}",
        f"{utilisation:.0%}",
        f"{by_flash:,.0f}",
        published,
        f"{1e9 / rate / 3600:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def by_cudnn(grid: Grid) -> str:
    """The kernel on every grid: chunks of 1M, 2M and 4M tokens are multiples of 128."""
    return "cudnn"


def planned_grids(config: ModelConfig, device: Device) -> Iterator[tuple[str, Plan]]:
    """(title, plan) of each row of the first table: the fastest on so many GPUs, the paper's."""
    for length, (tp, cp) in PAPER.items():
        plan = Plan(config, length, TOKENS // length, 1, tp, cp, 1, kernel="cudnn")
        for processes in (8, 16, 128, 256):
            for found in fitting_plans(plan, processes, device, by_cudnn)[:1]:
                yield str(processes), found
        same = [p for p in fitting_plans(plan, 256, device, by_cudnn) if (p.tp, p.cp) == (tp, cp)]
        yield "256, the paper's grid", same[0]


def others(small: ModelConfig, large: ModelConfig) -> Iterator[tuple[str, Plan, Device]]:
    """(title, plan, device) of the rows beside the paper's: a larger GPU, a larger model."""
    h100, h200 = DEVICES["H100-80"], DEVICES["H200"]
    cases = [("8 x H200, 8B", small, h200, 8), ("256 x H100, 70B", large, h100, 256),
             ("64 x H200, 70B", large, h200, 64)]
    for length in PAPER:
        for title, config, device, processes in cases:
            plan = Plan(config, length, TOKENS // length, 1, 8, 1, 1, kernel="cudnn")
            for found in fitting_plans(plan, processes, device, by_cudnn)[:1]:
                yield title, found, device


def main() -> None:
    device = DEVICES["H100-80"]
    config = read_config(ROOT / "runs" / "llama31_8b.json")
    print("| S | GPUs | tp, cp, dp | recompute | GiB | host GiB | s a step | tokens/s/GPU | MFU | "
          "with flash | the paper | GPU-hours for 1B |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for title, plan in planned_grids(config, device):
        print(line(title, plan, device, PUBLISHED[plan.length] if "paper" in title else ""))
    for title, plan, device in others(config, read_config(ROOT / "runs" / "llama31_70b.json")):
        print(line(title, plan, device))
    print("\nwhere the memory goes: one of 8 ranks, tp 8, S = 1M, GiB")
    plan = Plan(config, 2**20, 1, 1, 8, 1, 1, kernel="cudnn")
    steps = techniques(plan)
    print("| technique | weights, gradients, optimizer | kept by 32 blocks | at the worst moment "
          "beside it | total | on the host |")
    print("|---|---|---|---|---|---|")
    for name, step in steps.items():
        parts = memory_parts(step)
        sizes = (*parts.values(), sum(parts.values()), step.on_host())
        cells = [f"{size / 2**30:.1f}" for size in sizes]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nthe last as a command: python -m tools.plan H100-80 --config runs/llama31_8b.json "
          "--sequence-length 1048576 " + options_of(steps["and the optimizer"]))


if __name__ == "__main__":
    main()
