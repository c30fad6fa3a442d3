"""Train byte-level BPE, one token a digit, and write it as a Llama-3 tokenizer.model.

    python -m tools.train_tokenizer --source stdlib --vocab-size 1024 --out out/tokenizer
"""
from __future__ import annotations

import argparse
import base64
import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import Tokenizer, load_tokenizer, read_documents, source_path, write_complete

# Qwen2's pattern, a piece a digit, for Python's `re`, which has no \p{L}
QWEN2_STDLIB = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")  # `re` has no \p{L}: [^\W\d_] is it, and signs like ½


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train byte-level BPE, write it as a Llama-3 tokenizer.model (`path`: directory or *.model file) and load it.

    vocab_size counts the 256 bytes; 256 special tokens come on top. Pieces are Llama 3's but for single digits: no
    merge joins digits, so Llama 3's own pattern gives one token a digit. ValueError for an impossible size.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size} is too small: the bytes alone are 256 tokens")
    words, pattern = Counter(), re.compile(QWEN2_STDLIB)
    for text in texts:
        words.update(pattern.findall(text))
    tokens = learn_merges({word.encode(errors="replace"): n for word, n in words.items()}, vocab_size)
    path = model_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_complete(path, b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return load_tokenizer(path)


def model_file(path: str | Path) -> Path:
    """The tokenizer.model that a directory, or the *.model file itself, stands for."""
    return Path(path) if Path(path).suffix == ".model" else Path(path) / "tokenizer.model"


def learn_merges(words: dict[bytes, int], vocab_size: int) -> list[bytes]:
    """BPE (arXiv 1508.07909) over {word: frequency}: the vocabulary in order of merging, the most frequent pair first,
    lower ids on a tie. Words are spelled as strings with a character for each token id, so that str.replace merges."""
    tokens, frequency = [bytes([b]) for b in range(256)], list(words.values())
    spelled, counts, where = [word.decode("latin-1") for word in words], Counter(), defaultdict(set)

    def count(w: int, sign: int) -> None:
        for pair in itertools.pairwise(spelled[w]):
            counts[pair] += sign * frequency[w]
            where[pair].add(w)

    for w in range(len(spelled)):
        count(w, 1)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size:
        while heap and counts[heap[0][1]] < -heap[0][0]:  # counts of pairs fall as merges use their tokens up
            heapq.heapreplace(heap, (-counts[heap[0][1]], heap[0][1]))
        if not heap or not heap[0][0]:
            raise ValueError(f"vocab_size {vocab_size} is too large: these texts give {len(tokens)} at most")
        (first, second), joined, made = heapq.heappop(heap)[1], chr(len(tokens)), set()
        for w in list(where[first, second]):
            count(w, -1)
            spelled[w] = spelled[w].replace(first + second, joined)
            count(w, 1)
            made.update(pair for pair in itertools.pairwise(spelled[w]) if joined in pair)
        tokens.append(tokens[ord(first)] + tokens[ord(second)])
        for pair in made:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens


def read_texts(paths: list[Path], max_bytes: int) -> Iterator[str]:
    """Texts of all documents until `max_bytes` of UTF-8 are reached."""
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        for text in [message["content"] for message in document.get("messages", [])] or document.values():
            if max_bytes <= 0:
                return
            yield text[:max_bytes]
            max_bytes -= len(text.encode(errors="replace"))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train byte-level BPE, one token a digit.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", nargs="+", action="extend", required=True, metavar="PATH", help="file, directory or stdlib")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, without the 256 special ones")
    parser.add_argument("--max-bytes", type=int, default=5_000_000, help="how much text to train on")
    parser.add_argument("--out", type=Path, required=True, help="directory to put tokenizer.model in")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = parse_arguments(argv)
    try:
        target = model_file(a.out)
        if target.exists():
            raise ValueError(f"--out {target}: already exists; remove it or choose another place")
        tokenizer = train_bpe(read_texts([source_path(text) for text in a.source], a.max_bytes), a.vocab_size, target)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {target}: {a.vocab_size} tokens, {len(tokenizer.special_tokens_set)} special ones")


if __name__ == "__main__":
    main()
