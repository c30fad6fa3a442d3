"""Worker: ring attention on all processes against dense attention in float64.

    torchrun --standalone --nproc-per-node 3 tests/distributed/rings.py \\
        results.json unmasked|masked parallel.py [mutated.py ...]
"""
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HEADS = [(4, 4), (8, 2), (8, 1)]
RESULTS = ("out", "lse", "dq", "dk", "dv")


def load(file: str):
    """A module from a file of any name."""
    name = Path(file).stem
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, file))
    sys.modules[name] = module
    module.__spec__.loader.exec_module(module)
    return module


def inputs(batch: int, heads: int, kv_heads: int, length: int, width: int, dtype: torch.dtype,
           scale: float) -> list:
    """q, k, v and the gradient of the output; `scale` makes the scores large."""
    generator = torch.Generator().manual_seed(heads + kv_heads)

    def draw(heads: int) -> torch.Tensor:
        shape = (batch, heads, length, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = draw(heads)
    k = draw(kv_heads)
    v = draw(kv_heads)
    d_out = draw(heads)
    return [x.to(dtype) for x in (q * scale, k, v, d_out)]


def layouts(cp: int, chunk: int) -> list[list[int]]:
    """Borders of documents in a row of 2 cp chunks: 12 that are made to be hard, 50 at random."""
    length = 2 * cp * chunk
    edges = list(range(0, length + 1, chunk))
    inner = edges[1:-1]
    found = [
        [0, length],  # one document
        list(range(length + 1)),  # a document a token
        edges,
        [0, *[edge - 1 for edge in inner], length],
        [0, *[edge + 1 for edge in inner], length],
        sorted({0, 1, length - 1, length}),
        [0, *inner[cp - 1:cp], length],  # between rank cp - 1's two chunks
        # a document over exactly these two, and over exactly the first rank's and all between
        sorted({0, (cp - 1) * chunk, (cp + 1) * chunk, length}),
        sorted({0, chunk // 2, length - chunk // 2, length}),
        sorted({0, chunk, length - chunk, length}),
        [0, chunk + 1, length],
        [0, length - chunk - 1, length],
    ]
    generator = torch.Generator().manual_seed(cp)
    for _ in range(50):
        count = int(torch.randint(1, 9, (), generator=generator))
        borders = torch.randint(1, length, (count,), generator=generator).tolist()
        found.append(sorted({0, *borders, length}))
    return found


def allowed(segments: list[list[int]] | None, length: int) -> torch.Tensor:
    """Which key each query may see: earlier ones, of its own document. (B, 1, S, S) bool."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    rows = []
    for borders in segments or [[0, length]]:
        sizes = torch.tensor(borders).diff()
        document = torch.arange(len(sizes)).repeat_interleave(sizes)  # (S,)
        rows.append(causal & (document[:, None] == document))
    return torch.stack(rows)[:, None]


def dense(q, k, v, d_out, segments=None) -> dict[str, torch.Tensor]:
    """SDPA under a mask and its gradients in float64, and the log-sum-exp written out."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    mask = allowed(segments, q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    gradients = torch.autograd.grad(out, (q, k, v), d_out.double())
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.transpose(2, 3) / math.sqrt(q.shape[3])
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))


def ring(parallel, grid, q, k, v, d_out, segments=None) -> dict[str, torch.Tensor]:
    """The same, by a module's ring attention on this rank's shards, put together."""
    q, k, v, d_out = (parallel.zigzag_shard(x, grid, 2) for x in (q, k, v, d_out))
    lse = parallel.ring_forward(q, k, v, grid, segments)[1]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = parallel.ring_attention(*leaves, grid, segments)
    shards = (out.detach(), lse, *torch.autograd.grad(out, leaves, d_out))
    whole = [parallel.zigzag_unshard(x, grid, 2) for x in shards]
    return dict(zip(RESULTS, whole, strict=True))


def errors(parallel, grid, *arguments, segments=None) -> dict[str, float]:
    """Norm of the difference / norm, of each result."""
    given = inputs(*arguments)
    expected = dense(*given, segments)
    found = ring(parallel, grid, *given, segments)
    relative = {}
    for name, x in expected.items():
        difference = found[name].double() - x
        relative[name] = float(difference.norm() / x.norm())
    return relative


def earlier_error(parallel, grid) -> float:
    """New tokens over earlier ones, of which every rank has another number, the last one none (but
    on a ring of one)."""
    new = 2 * grid.cp
    q, k, v, _ = inputs(3, 8, 2, 40 + new, 16, torch.float64, 1.0)
    borders = [0]
    for rank in range(1, grid.cp):
        borders.append(round(40 * (rank / (grid.cp - 1)) ** 2))
    borders.append(40)
    mine = slice(borders[grid.cp_rank], borders[grid.cp_rank + 1])
    last = [parallel.zigzag_shard(x[:, :, 40:], grid, 2) for x in (q, k, v)]
    found = parallel.attend_earlier(last[0], *parallel.ring_forward(*last, grid), k[:, :, mine],
                                    v[:, :, mine], grid)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, 40:]
    return float((parallel.zigzag_unshard(found, grid, 2) - expected).abs().max())


def unmasked_cases(parallel, grid) -> dict[str, dict[str, float]]:
    """Errors by case and result: whole rows that see all that comes before."""
    cases = {}
    for heads in HEADS:
        for scale in (1.0, 400.0):  # scores up to thousands: exp of a raw log-sum-exp overflows
            length = 2 * grid.cp * 5
            cases[f"float64 {heads[0]}:{heads[1]} x{scale:g}"] = errors(
                parallel, grid, 3, *heads, length, 16, torch.float64, scale)
    cases["bfloat16"] = errors(parallel, grid, 1, 4, 2, 960, 64, torch.bfloat16, 1.0)
    cases["earlier"] = {"out": earlier_error(parallel, grid)}
    return cases


def masked_cases(parallel, grid) -> dict[str, dict[str, float]]:
    """The same for documents that are masked apart: every layout is a row of one batch, and all of
    one row's documents are a batch of their own."""
    every = layouts(grid.cp, 5)
    cases = {}
    for heads in HEADS:
        for segments in (every, every[-1:]):
            cases[f"masked {heads[0]}:{heads[1]} of {len(segments)}"] = errors(
                parallel, grid, len(segments), *heads, 2 * grid.cp * 5, 16, torch.float64, 1.0,
                segments=segments)
    return cases


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    grids = []
    cases = {"unmasked": unmasked_cases, "masked": masked_cases}[sys.argv[2]]
    for file in sys.argv[3:]:
        parallel = load(file)
        grid = parallel.Grid.create(cp=parallel.launched()[1], device="cpu")
        grids.append(grid)
        found[Path(file).stem] = cases(parallel, grid)
    if grid.is_first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    grids[0].close()
