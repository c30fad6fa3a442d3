"""Worker: ranks that hang, or only seem to, under a timeout of two seconds: sleeps, deadlock, works."""
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


def works(grid: Grid) -> None:
    """Everybody computes for longer than the timeout; then one keeps the others waiting for longer, and shows that it gets on."""
    time.sleep(4)
    for _ in range(10 if grid.is_first else 0):
        time.sleep(0.5)
        grid.progress()


if __name__ == "__main__":
    grid = Grid.create(cp=3, device="cpu", timeout=2)
    grid.barrier()  # all begin together, however long one took to start
    {"sleeps": rank_1_sleeps, "deadlock": deadlock, "works": works}[sys.argv[1]](grid)
    grid.barrier()
    grid.close()
