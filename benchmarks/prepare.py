"""Rate of `tools.prepare` against tiktoken alone in one thread, on the standard library's source,
interleaved.

    python -m benchmarks.prepare MODEL_DIR [--processes 1 2] [--repeats 3]

tiktoken's rate is that of `encode_ordinary` on texts that are already in memory. prepare reads,
decodes, hashes, encodes, compares with held-out text and writes: its rate is tokens over the whole
time.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import data
from tools.prepare import prepare_corpus
from tools.records import Documents, source_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="tokenizer file or its directory")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    tokenizer = data.load_tokenizer(a.tokenizer)
    texts = [document["text"] for _, document in Documents(source_path("stdlib"))]
    rates = {"tiktoken, one thread": [], **{f"prepare, {n} processes": [] for n in a.processes}}
    for _ in range(a.repeats):
        started = time.perf_counter()
        tokens = sum(len(super(data.Tokenizer, tokenizer).encode_ordinary(text)) for text in texts)
        rates["tiktoken, one thread"].append(tokens / (time.perf_counter() - started))
        for n in a.processes:
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                started = time.perf_counter()
                meta = prepare_corpus([("code", "stdlib")], tokenizer, Path(place) / "out",
                                      processes=n)
                seconds = time.perf_counter() - started
                shards = [*meta["splits"]["train"], *meta["splits"]["valid"]]
                written = sum(shard["tokens"] for shard in shards)
                rates[f"prepare, {n} processes"].append(written / seconds)
    alone = statistics.median(rates["tiktoken, one thread"])
    print(f"{tokens:,} tokens\n\n| | tokens/s | of tiktoken alone |\n|---|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):,.0f} | "
              f"{statistics.median(found) / alone:.2f}x |")


if __name__ == "__main__":
    main()
