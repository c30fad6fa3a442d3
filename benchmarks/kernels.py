"""A kernel of attention on this device, through the two functions that the ring calls: is it right,
and how fast?

    python -m benchmarks.kernels --attention cudnn
    python -m benchmarks.kernels --tiny --device cpu     # the same code in seconds

Four tables: relative errors (norm of the difference / norm) against float64 from the formula, of
causal and whole blocks, rectangles, lengths that cuDNN leaves to flash, a ring of two with one
log-sum-exp over both; rates, forward and backward, of causal FLOPs, and what backward allocates
beside its gradients; rates of a matrix product and of copies; errors of keys of more than 2^31
elements against their two halves. Writes JSON; exits 1 if an error exceeds its limit.
"""
from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks import common
from parallel import block_backward, block_forward, cudnn_takes, merge, one_line_errors
from tools.plan import best_seconds, product_rate

RESULTS = ("out", "lse", "dq", "dk", "dv")
# bfloat16 rounds to 4e-3, and a CPU adds grouped heads' gradients up in it; lse is float32, and
# rings exponentiate it
LIMITS = dict.fromkeys(RESULTS, 2e-2) | {"lse": 1e-4}
ERRORS = {"kernel": "", "block": "", "heads": ""} | dict.fromkeys(RESULTS, ".1e")  # a table
CASES = [  # causal, queries, keys, head_dim, query heads, key heads
    (True, 512, 512, 128, 8, 2),
    (True, 384, 384, 64, 8, 8),
    (True, 320, 320, 128, 8, 2),
    (False, 256, 512, 128, 8, 2),
    (False, 512, 256, 64, 8, 1),
    (False, 64, 192, 128, 8, 2),
    (False, 1, 512, 128, 8, 2),
]
RATES = [  # query heads, key heads, head_dim, length
    (4, 1, 128, 131072), (32, 8, 128, 16384), (32, 8, 64, 16384), (4, 1, 128, 524288)]
TINY_RATES = [(4, 1, 32, 256)]


def draw(queries: int, keys: int, head_dim: int, heads: int, kv_heads: int, device: str,
         batch: int = 1) -> list[Tensor]:
    """q, k, v and the gradient of the output, in bfloat16: (B, H, S, D), which lie in memory as a
    model's do, (B, S, H, D)."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries)):
        shape = (batch, n, h, head_dim)
        x = torch.randn(shape, generator=generator, device=device)
        tensors.append(x.bfloat16().transpose(1, 2))
    return tensors


def exact(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv in float64, from the formula."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]  # query heads that share a key head
    keys = leaves[1].repeat_interleave(group, 1)
    values = leaves[2].repeat_interleave(group, 1)
    scores = leaves[0] @ keys.mT / q.shape[3] ** 0.5  # (B, H, S, N)
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = scores.softmax(-1) @ values
    gradients = torch.autograd.grad(out, leaves, d_out.double())
    return out.detach(), scores.logsumexp(-1).detach(), *gradients


def whole_block(q, k, v, d_out, causal: bool, kernel: str) -> tuple[Tensor, ...]:
    """The same five from a kernel."""
    out, lse = block_forward(q, k, v, causal, kernel)
    return out, lse, *block_backward(d_out, q, k, v, out, lse, causal, kernel)


def ring_of_two(q, k, v, d_out, kernel: str) -> tuple[Tensor, ...]:
    """The same from two halves of the keys: results merged, then gradients with one lse."""
    half = k.shape[2] // 2
    halves = [(k[:, :, part], v[:, :, part]) for part in (slice(half), slice(half, None))]
    out, lse = block_forward(q, *halves[0], False, kernel)
    out = out.float()
    merge(out, lse, *block_forward(q, *halves[1], False, kernel))
    out = out.bfloat16()
    first, second = (block_backward(d_out, q, *part, out, lse, False, kernel) for part in halves)
    dq = first[0].float() + second[0].float()
    dk = torch.cat((first[1], second[1]), 2)
    dv = torch.cat((first[2], second[2]), 2)
    return out, lse, dq, dk, dv


def errors(ours: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> dict[str, float]:
    """The norm of each difference, as a share of the right one's."""
    found = {}
    for name, x, y in zip(RESULTS, ours, right, strict=True):
        difference = (x.to(y.dtype) - y).norm() / y.norm()
        found[name] = difference.item()
    return found


def that_ran(kernel: str, q: Tensor, k: Tensor) -> str:
    """The kernel that a block was given to: see `cudnn_takes`."""
    return "flash" if kernel == "cudnn" and not cudnn_takes(q, k) else kernel


def check_parity(table: common.Table, kernel: str, device: str) -> None:
    for causal, queries, keys, head_dim, heads, kv_heads in CASES:
        block = draw(queries, keys, head_dim, heads, kv_heads, device, batch=2)
        found = errors(whole_block(*block, causal, kernel), exact(*block, causal))
        name = "causal" if causal else "whole"
        table.add({"kernel": that_ran(kernel, *block[:2]), "block": f"{name} {queries} x {keys}",
                   "heads": f"{heads}:{kv_heads} of {head_dim}"} | found)
    block = draw(512, 1024, 128, 8, 2, device)
    found = errors(ring_of_two(*block, kernel), exact(*block, False))
    table.add({"kernel": kernel, "block": "ring of two, 512 x 1024", "heads": "8:2 of 128"} | found)


def check_many_elements(table: common.Table, kernel: str, device: str, tiny: bool) -> None:
    # 4 heads x 4.2M keys x 128 are more than 2^31 elements
    keys = 1024 if tiny else 2**22 + 4096
    block = draw(128, keys, 128, 4, 4, device)
    block[1][:, :, -5:] = 4 * block[0][:, :, :1]  # the first query must find the last keys
    found = errors(whole_block(*block, False, kernel), ring_of_two(*block, kernel))
    table.add({"kernel": kernel, "block": f"128 x {keys:,}, against its halves",
               "heads": "4:4 of 128"} | found)


def measure_rate(kernel: str, heads: int, kv_heads: int, head_dim: int, length: int,
                 device: str) -> dict:
    """A row: TFLOP/s of a causal block, and MiB that backward allocates."""
    q, k, v, d_out = draw(length, length, head_dim, heads, kv_heads, device)
    out, lse = block_forward(q, k, v, True, kernel)

    def backward() -> tuple[Tensor, ...]:
        return block_backward(d_out, q, k, v, out, lse, True, kernel)

    flops = heads * 2 * length**2 * head_dim
    forward_seconds = best_seconds(lambda: block_forward(q, k, v, True, kernel)[0])
    backward_seconds = best_seconds(lambda: backward()[0])
    row = {
        "kernel": kernel,
        "heads": f"{heads}:{kv_heads} of {head_dim}",
        "S": length,
        "forward TFLOP/s": flops / forward_seconds / 1e12,
        "backward TFLOP/s": 2.5 * flops / backward_seconds / 1e12,
    }
    if device == "cpu":
        return row
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = backward()
    own = sum(x.nbytes for x in gradients)
    scratch = torch.cuda.max_memory_allocated() - before - own
    return row | {"gradients MiB": own / 2**20, "scratch MiB": scratch / 2**20}


def measure_copies(table: common.Table, device: str, tiny: bool) -> None:
    """A product and copies: what a plan assumes of a device beside attention."""
    rate = product_rate(device, torch.bfloat16) / 1e12
    table.add({"what": "matrix product", "rate": rate, "unit": "TFLOP/s"})
    size = 2**20 if tiny else 2**30
    there = torch.empty(size, dtype=torch.uint8, device=device)
    pageable = torch.empty(size, dtype=torch.uint8)
    copies = {
        "device to pageable": lambda: pageable.copy_(there),
        "pageable to device": lambda: there.copy_(pageable),
    }
    if device == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)

        def to_pinned() -> Tensor:
            pinned.copy_(there, non_blocking=True)
            torch.cuda.synchronize()
            return pinned

        copies["device to pinned"] = to_pinned
        copies["pinned to device"] = lambda: there.copy_(pinned, non_blocking=True)
    for name, copy in copies.items():
        table.add({"what": name, "rate": size / best_seconds(copy) / 1e9, "unit": "GB/s"})
    rate = 2 * size / best_seconds(there.clone) / 1e9  # a byte is read and written
    table.add({"what": "in the device, read and written", "rate": rate, "unit": "GB/s"})


def main() -> None:
    parser = common.parser(__doc__, "out/kernels")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    a = parser.parse_args()
    if a.device == "cpu" and not a.tiny:
        parser.error("these shapes are for a GPU; on a CPU add --tiny")
    kernel, why = common.start_kernel(a, "bfloat16", 128, 512)

    title = f"Relative errors of a block in bfloat16, against float64, by {kernel} ({why})"
    parity = common.Table(a.out / "parity.json", title, a.device, {}, ERRORS)
    check_parity(parity, kernel, a.device)

    columns = {"kernel": "", "heads": "", "S": ",", "forward TFLOP/s": ".3g",
               "backward TFLOP/s": ".3g", "gradients MiB": ".0f", "scratch MiB": ".0f"}
    table = common.Table(a.out / "rates.json", "Rates of causal blocks", a.device, {}, columns)
    for shape in TINY_RATES if a.tiny else RATES:
        table.add(measure_rate(kernel, *shape, a.device))

    columns = {"what": "", "rate": ",.3g", "unit": ""}
    table = common.Table(a.out / "copies.json", "Products and copies", a.device, {}, columns)
    measure_copies(table, a.device, a.tiny)

    title = "More than 2^31 elements" if not a.tiny else "Many elements, in small"
    large = common.Table(a.out / "large.json", title, a.device, {}, ERRORS)
    check_many_elements(large, kernel, a.device, a.tiny)

    rows = parity.rows + large.rows
    good = all(row[name] <= limit for row in rows for name, limit in LIMITS.items())  # NaN is not
    print(f"\n{'ok' if good else 'FAILED'}: errors to 2e-2, of the log-sum-exp to 1e-4")
    sys.exit(not good)


if __name__ == "__main__":
    with one_line_errors():
        main()
