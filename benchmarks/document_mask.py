"""What masking documents apart leaves of attention's time.

    python -m benchmarks.document_mask --lengths 16384 32768

On one process of as many threads as there are --ranks, and on a ring of these, documents of several
lengths take turns with no mask, one pass (forward and backward) each, so that a slow minute of the
machine hits all. "pairs left": of a query and a key that it sees, as a share of those without a
mask, which is the share of the time that a pass should take, if the pairs lie evenly on the ranks;
"slowest rank": its pairs, in multiples of an even share (see benchmarks.document_balance). Medians;
a ring's time is its slowest rank's.
"""
from __future__ import annotations

import math
import statistics
from argparse import Namespace

from benchmarks import common
from benchmarks.document_balance import equal_documents, pairs, slowest_share
from benchmarks.ring_attention import (
    add_shape_arguments,
    check_shape,
    end_ring,
    seconds_of,
    start_ring,
)
from parallel import one_line_errors
from train import positive

COLUMNS = {"documents": "", "pairs left": ".1%", "one process": ".1%", "ring": ".1%",
           "slowest rank": ".2f"}


def layouts(length: int) -> dict[str, list[int]]:
    """What is timed, by name: borders."""
    half = length // 2
    return {
        "1, masked": [0, length],
        "2 of S / 2": equal_documents(length, 2),
        "8 of S / 8": equal_documents(length, 8),
        "64 of S / 64": equal_documents(length, 64),
        "1 of S / 2, 32 of S / 64": [0, *[half + x for x in equal_documents(half, 32)]],
    }


def measure(a: Namespace) -> None:
    """A table for each length: times, as shares of those without a mask."""
    for length in a.lengths:
        kernel, _ = common.start_kernel(a, a.dtype, a.head_dim, length, a.ranks)
        one = start_ring(1, a.ranks if a.device == "cpu" else 1, a)
        ring = start_ring(a.ranks, 1, a)
        every = {"no mask": None, **layouts(length)}
        seconds = {name: {"one process": [], "ring": []} for name in every}
        for _ in range(a.repeats + 1):
            for name, borders in every.items():
                segments = None if borders is None else [borders]
                for side, children in (("one process", one), ("ring", ring)):
                    passed = seconds_of(children, "zigzag", length, kernel, segments)
                    seconds[name][side].append(passed)
        for children in (one, ring):
            end_ring(children)
        medians = {}  # the first pass warms up
        for name, sides in seconds.items():
            medians[name] = {side: statistics.median(times[1:]) for side, times in sides.items()}
        title = (f"Documents masked apart, S = {length:,}, {a.dtype}, {a.heads}:{a.kv_heads} heads "
                 f"of {a.head_dim}: time as a share of that without a mask, one process and a ring "
                 f"of {a.ranks}")
        table = common.Table(a.out.with_stem(f"{a.out.stem}-{length}"), title, a.device,
                             {"arguments": vars(a), "seconds": seconds}, COLUMNS)
        for name, borders in every.items():
            found = pairs(length, a.ranks, borders or [0, length])
            left = sum(sum(hops) for hops in found)
            row = {"documents": name, "pairs left": 2 * left / (length * (length + 1)),
                   "slowest rank": slowest_share(found)}
            for side, median in medians[name].items():
                row[side] = median / medians["no mask"][side]
            table.add(row)


def main() -> None:
    parser = common.parser(__doc__, "out/document_mask.json", device="cpu")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16384])
    parser.add_argument("--ranks", type=positive, default=2, help="of the ring")
    add_shape_arguments(parser)
    a = parser.parse_args()
    check_shape(parser, a, math.lcm(128, 2 * a.ranks))  # for the shortest documents; for the ring
    measure(a)


if __name__ == "__main__":
    with one_line_errors():
        main()
