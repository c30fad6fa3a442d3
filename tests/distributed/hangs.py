"""Worker: ranks that hang, or only seem to, under a timeout of two seconds: sleeps, deadlock, computes, works."""
import sys
import time

import torch

from parallel import Grid


def rank_1_sleeps(grid: Grid) -> None:
    if grid.rank == 1:
        time.sleep(1000)


def deadlock(grid: Grid) -> None:
    """Ranks in communications that do not match."""
    if grid.rank == 1:
        grid.all_gather(torch.zeros(1), "cp")
        grid.barrier()
        grid.barrier()
    else:
        grid.all_gather(torch.zeros(1), "cp")
        grid.barrier()
        grid.post_hop(torch.zeros(1))()


def computes(grid: Grid) -> None:
    """Everybody, for longer than the timeout, without a word to the others."""
    time.sleep(5)


def works(grid: Grid) -> None:
    """One rank keeps the others waiting for longer than the timeout, and shows that it gets on."""
    for _ in range(10 if grid.is_first else 0):
        time.sleep(0.5)
        grid.progress()


if __name__ == "__main__":
    grid = Grid.create(cp=3, device="cpu", timeout=2)
    {"sleeps": rank_1_sleeps, "deadlock": deadlock, "computes": computes, "works": works}[sys.argv[1]](grid)
    grid.barrier()
    grid.close()
