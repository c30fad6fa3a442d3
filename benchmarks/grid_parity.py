"""A real checkpoint on a grid of processes against one process: logits and greedy text.

    torchrun --standalone --nproc-per-node 6 -m benchmarks.grid_parity MODEL_DIR --tp 3 --cp 2

511 tokens of the standard library (a length no grid divides), in float64, where every grid agrees
to rounding, and in float32, whose own rounding is as large as the differences: the last column is
one process against itself in float64. Exits 1 if logits differ by more than 1e-4 in float32 or 1e-9
in float64.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.common import library_tokens
from model import Llama
from parallel import Grid, one_line_errors
from train import add_compute_arguments


def run(path: Path, tp: int, cp: int, timeout: float) -> None:
    """Compare on the first rank and print; every rank computes its share."""
    grid = Grid.create(tp, cp, "cpu", timeout)
    tokens = library_tokens(path, 511)
    exact = None
    good = torch.ones(())
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = Llama.from_pretrained(path, grid, dtype)
        with torch.no_grad():
            logits = model(tokens)
            text = model.generate(tokens[:, :65], 64)
        if grid.is_first:
            alone = Llama.from_pretrained(path, dtype=dtype)
            with torch.no_grad():
                expected = alone(tokens)
                same = torch.equal(alone.generate(tokens[:, :65], 64), text)
            exact = expected if exact is None else exact
            difference = (logits - expected).abs().max()
            good *= same and difference <= limit
            whole = sum(parameter.numel() for parameter in alone.parameters())
            share = sum(parameter.numel() for parameter in model.parameters()) / whole
            print(f"dp {grid.dp} x cp {grid.cp} x tp {grid.tp}, "
                  f"{str(dtype).removeprefix('torch.')}: "
                  f"logits differ by at most {difference:.1e} "
                  f"(they reach {expected.abs().max():.0f}), "
                  f"64 greedy tokens {'equal' if same else 'differ'}, "
                  f"a rank holds {share:.3f} of the weights; one process is "
                  f"{(expected - exact).abs().max():.1e} from float64")
    grid.broadcast(good)
    grid.close()
    sys.exit(not good)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    add_compute_arguments(parser)
    with one_line_errors():
        a = parser.parse_args()
        run(a.model, a.tp, a.cp, a.timeout)


if __name__ == "__main__":
    main()
