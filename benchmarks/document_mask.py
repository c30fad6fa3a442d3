"""What masking documents apart leaves of attention's work, and how long ranks then wait for each
other.

    python -m benchmarks.document_mask
    python -m benchmarks.document_mask --corpus CORPUS --tokenizer MODEL_DIR --lengths 65536

The first one times: on one process of as many threads as there are --ranks and on a ring of these,
documents of several lengths take turns with no mask, one pass (forward and backward) each, so that
a slow minute of the machine hits all. What the mask leaves is counted in pairs of a query and a key
that it sees; that share of the time without a mask is what a pass should take, if the pairs lie
evenly on the ranks. Medians; a ring's time is its slowest rank's.

The second one counts: of the documents of a corpus (train.py's first --sequences) and of documents
of one length, how many pairs are left and how unevenly they lie on rings of 2, 4 and 8. Between two
bounds lies a layer's time, in multiples of an even split: the pairs of its slowest rank, as if
ranks met after the layer only; those of each hop's slowest rank, as if they met after every hop.
"""
from __future__ import annotations

import math
import statistics
from argparse import Namespace

from benchmarks import common
from benchmarks.ring_attention import add_shape_arguments, end_ring, seconds_of, start_ring
from data import PackedDataset, batch, load_tokenizer
from parallel import Grid, document_segments, one_line_errors, visible_blocks
from train import existing, positive

TIMES = {"documents": "", "pairs left": ".1%", "one process": ".1%", "ring": ".1%",
         "slowest rank": ".2f"}
WAITS = {"documents": "", "S": ",", "ring": "", "pairs left": ".1%", "slowest rank": ".2f",
         "slowest of each hop": ".2f", "worst sequence": ".2f"}
RINGS = (2, 4, 8)


def pairs(length: int, cp: int, borders: list[int]) -> list[list[int]]:
    """Queries x keys that each rank computes at each hop."""
    table = []
    for rank in range(cp):
        hops = []
        for hop in range(cp):
            source = (rank - hop) % cp
            number = 0
            for _, queries, keys in visible_blocks(Grid(cp=cp, rank=rank), source, length // cp,
                                                   [borders]):
                n = queries.stop - queries.start
                rectangle = n * (keys.stop - keys.start)
                number += n * (n + 1) // 2 if hop == 0 else rectangle
            hops.append(number)
        table.append(hops)
    return table


def equal_documents(length: int, count: int) -> list[int]:
    """Borders of so many documents of one length."""
    return [length * i // count for i in range(count + 1)]


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
    """The first table: times, as shares of those without a mask."""
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
                             {"arguments": vars(a), "seconds": seconds}, TIMES)
        for name, borders in every.items():
            found = pairs(length, a.ranks, borders or [0, length])
            sums = [sum(hops) for hops in found]
            row = {"documents": name, "pairs left": 2 * sum(sums) / (length * (length + 1)),
                   "slowest rank": max(sums) * a.ranks / sum(sums)}
            for side, median in medians[name].items():
                row[side] = median / medians["no mask"][side]
            table.add(row)


def waits(table: common.Table, name: str, length: int, cp: int, rows: list[list[int]]) -> None:
    """A row of the second table, from the borders of some sequences."""
    left = slowest = by_hop = 0
    worst = 0.0
    for borders in rows:
        found = pairs(length, cp, borders)
        sums = [sum(hops) for hops in found]
        left += sum(sums)
        slowest += max(sums)
        by_hop += sum(max(hops) for hops in zip(*found, strict=True))
        worst = max(worst, max(sums) * cp / sum(sums))
    table.add({"documents": name, "S": length, "ring": cp,
               "pairs left": 2 * left / len(rows) / (length * (length + 1)),
               "slowest rank": slowest * cp / left, "slowest of each hop": by_hop * cp / left,
               "worst sequence": worst})


def count(a: Namespace) -> None:
    """The second table: pairs, of the corpus and of documents of one length."""
    tokenizer = load_tokenizer(a.tokenizer)
    every = {}  # borders of sequences, by length and name
    for length in a.lengths:
        dataset = PackedDataset(a.corpus, "train", length, seed=0, document_mask=True,
                                tokenizer=tokenizer)
        rows = batch(dataset, 0, a.sequences).document_ids
        every[length, "the corpus's"] = document_segments(rows)
        for number in (3, 8, 20):
            every[length, f"{number} of one length"] = [equal_documents(length, number)]
    title = "What is left, and how evenly: multiples of an even split"
    table = common.Table(a.out, title, "cpu", {"arguments": vars(a)}, WAITS)
    for (length, name), borders in every.items():
        for cp in RINGS:
            waits(table, name, length, cp, borders)


def main() -> None:
    parser = common.parser(__doc__, "out/document_mask.json", device="cpu")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16384])
    parser.add_argument("--ranks", type=positive, default=2, help="of the ring that is timed")
    add_shape_arguments(parser)
    parser.add_argument("--corpus", type=existing, help="count what is left of a corpus")
    parser.add_argument("--tokenizer", type=existing, help="that it was prepared with")
    parser.add_argument("--sequences", type=positive, default=8, help="of the corpus")
    a = parser.parse_args()
    multiple = math.lcm(128, 2 * a.ranks)  # for the shortest documents, and for all rings
    for length in a.lengths:
        if length % multiple:
            parser.error(f"--lengths {length} must be a multiple of {multiple}")
    if bool(a.corpus) != bool(a.tokenizer):
        parser.error("--corpus needs --tokenizer, the one it was prepared with, and the other way "
                     "round")
    if a.corpus:
        count(a)
    else:
        measure(a)


if __name__ == "__main__":
    with one_line_errors():
        main()
