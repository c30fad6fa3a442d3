"""Train byte-level BPE, one token a digit, and write it as a Llama-3 tokenizer.model.

    python -m tools.train_tokenizer --source stdlib --vocab-size 1024 --out out/tokenizer
"""
from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import QWEN2, Tokenizer, byte_characters, load_tokenizer, write_complete
from parallel import Parser, one_line_errors, positive
from tools.prepare import read_documents, source_path, texts_of


def learn_tokens(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The vocabulary in order of merging (BPE, arXiv 1508.07909): the 256 bytes, then what is
    merged.

    Pieces are Qwen2's: Llama 3's but for single digits, so no merge joins digits.
    """
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError("training a tokenizer needs the tokenizers library: pip install tokenizers") from None
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(texts, trainer)

    vocab = json.loads(library.to_str())["model"]["vocab"]
    byte_of = byte_characters()
    tokens = [bytes([byte]) for byte in range(256)]  # the library has them in the order of its characters
    for token in sorted(vocab, key=vocab.get)[256:]:
        tokens.append(bytes(byte_of[character] for character in token))
    return tokens


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Train on texts, write `folder`/tokenizer.model (a line a token: base64 and rank) and load it.

    vocab_size counts the 256 bytes; Llama 3's 256 special tokens come on top. ValueError for a size
    that the texts do not give, or if a tokenizer is there.
    """
    path = Path(folder) / "tokenizer.model"
    if vocab_size < 256:
        raise ValueError(f"--vocab-size {vocab_size} is too small: the bytes alone are 256 tokens")
    if path.exists():
        raise ValueError(f"{path}: already exists; remove it or choose another place")
    tokens = learn_tokens((text.encode(errors="replace").decode() for text in texts), vocab_size)
    if len(tokens) < vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is too large: these texts give {len(tokens)} at most")
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_complete(path, b"".join(lines))
    return load_tokenizer(path)


def read_texts(paths: list[Path], max_bytes: int) -> Iterator[str]:
    """Texts of all documents until `max_bytes` of UTF-8 are reached."""
    for path in paths:
        for _, document in read_documents(path):
            for text in texts_of(document):
                if max_bytes <= 0:
                    return
                yield text[:max_bytes]
                max_bytes -= len(text.encode(errors="replace"))


def parser() -> Parser:
    parser = Parser("Train byte-level BPE, one token a digit.")
    parser.add_argument("--source", type=source_path, nargs="+", action="extend", required=True,
                        metavar="PATH", help="file, directory or stdlib")
    parser.add_argument("--vocab-size", type=positive, required=True, help="tokens, without the 256 special ones")
    parser.add_argument("--max-bytes", type=positive, default=5_000_000, help="how much text to train on")
    parser.add_argument("--out", type=Path, required=True, help="directory to put tokenizer.model in")
    return parser


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        tokenizer = train_bpe(read_texts(a.source, a.max_bytes), a.vocab_size, a.out)
        print(f"wrote {tokenizer.path}: {a.vocab_size} tokens, {len(tokenizer.special_tokens_set)} special ones")


if __name__ == "__main__":
    main()
