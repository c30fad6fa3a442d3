"""How unevenly documents that are masked apart lie on the ranks of a ring.

    python -m benchmarks.document_balance CORPUS --tokenizer MODEL_DIR --lengths 65536

Counted are pairs of a query and a key that it sees: of a corpus's documents (train.py's first
--sequences) and of documents of one length, on rings of 2, 4 and 8. A layer takes, in multiples of
an even share, "at least" its slowest rank's pairs (ranks meet after a layer only), "at most" those
of each hop's slowest rank (they meet after every hop). Both are of all sequences together; "worst"
is "at least" of the worst one.
"""
from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from benchmarks import common
from data import PackedDataset, batch, load_tokenizer
from parallel import Grid, document_segments, one_line_errors, visible_blocks
from train import existing, positive

COLUMNS = {"documents": "", "S": ",", "ring": "", "pairs left": ".1%", "at least": ".2f",
           "worst": ".2f", "at most": ".2f"}
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


def slowest_share(found: list[list[int]]) -> float:
    """The pairs of the rank with most, in multiples of an even share."""
    sums = [sum(hops) for hops in found]
    return max(sums) * len(sums) / sum(sums)


def waits(table: common.Table, name: str, length: int, cp: int, rows: list[list[int]]) -> None:
    """A row of the table, from the borders of some sequences."""
    left = slowest = by_hop = 0
    worst = 0.0
    for borders in rows:
        found = pairs(length, cp, borders)
        sums = [sum(hops) for hops in found]
        left += sum(sums)
        slowest += max(sums)
        by_hop += sum(max(hops) for hops in zip(*found, strict=True))
        worst = max(worst, slowest_share(found))
    table.add({"documents": name, "S": length, "ring": cp,
               "pairs left": 2 * left / len(rows) / (length * (length + 1)),
               "at least": slowest * cp / left, "worst": worst, "at most": by_hop * cp / left})


def count(a: Namespace) -> None:
    """The table: pairs, of the corpus and of documents of one length."""
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
    table = common.Table(a.out, title, "cpu", {"arguments": vars(a)}, COLUMNS)
    for (length, name), borders in every.items():
        for cp in RINGS:
            waits(table, name, length, cp, borders)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=existing)
    parser.add_argument("--tokenizer", type=existing, required=True, help="it was prepared with")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[65536])
    parser.add_argument("--sequences", type=positive, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/document_balance.json"))
    a = parser.parse_args()
    for length in a.lengths:
        if length % (2 * max(RINGS)):
            parser.error(f"--lengths {length} must be a multiple of {2 * max(RINGS)}")
    count(a)


if __name__ == "__main__":
    with one_line_errors():
        main()
