"""Worker: ranks that hang, or only work for long, under a timeout of three seconds: sleeps,
deadlock, works; or end without close()."""
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
        grid.send_around(torch.zeros(1)).wait()


def works(grid: Grid) -> None:
    """Each stretch is shorter than the timeout, all together are longer; then the others wait for
    three of rank 1."""
    for _ in range(3):
        grid.restart_timer()
        time.sleep(1.5)
        grid.barrier()
    grid.restart_timer(3)
    for _ in range(3 if grid.rank == 1 else 0):
        grid.restart_timer()
        time.sleep(1.5)
    grid.barrier()
    second = Grid.create(tp=3, device="cpu")
    second.close()  # the first goes on
    assert grid.all_reduce(torch.ones(1), "cp").item() == 3


if __name__ == "__main__":
    if sys.argv[1] in ("ends", "destroys"):  # what a user writes who has not read about close()
        grid = Grid.create(cp=2, device="cpu")
        total = grid.all_reduce(torch.ones(3), "cp")
        shares = grid.all_gather(torch.ones(3), "cp")
        assert total.tolist() == [2.0] * 3 and shares.shape == (2, 3)
        if sys.argv[1] == "destroys":
            torch.distributed.destroy_process_group()
    else:
        grid = Grid.create(cp=3, device="cpu", timeout=3)
        grid.barrier()  # all begin together, however long one took to start
        grid.restart_timer()
        {"sleeps": rank_1_sleeps, "deadlock": deadlock, "works": works}[sys.argv[1]](grid)
        grid.barrier()
        grid.close()
