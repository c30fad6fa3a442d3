"""Train byte-level BPE, one token a digit, and write it as a Llama-3 tokenizer.model.

    python -m tools.train_tokenizer --source stdlib --vocab-size 1024 --out out/tokenizer
"""
from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import Tokenizer, load_tokenizer, write_complete
from parallel import one_line_errors
from tools.records import Documents, source_path, texts_of
from train import Parser, positive

# Qwen2's pattern, a piece a digit, for Python's `re`, which has no \p{L}: [^\W\d_] is it, and signs
# like ½
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # what an apostrophe joins
    r"|(?:[^\r\n\w]|_)?[^\W\d_]+"  # a word, with one sign before it
    r"|\d"
    r"| ?(?:[^\s\w]|_)+[\r\n]*"  # signs
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # the last space before a word is the word's
BYTES = [chr(256 + byte) for byte in range(256)]  # how the library is shown them: in the same order


def learn_tokens(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The vocabulary in order of merging (BPE, arXiv 1508.07909): the 256 bytes, then what is
    merged, the most frequent pair first, lower ids on a tie.

    Pieces are Llama 3's but for single digits, so no merge joins digits.
    """
    try:
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("training a tokenizer needs the tokenizers library: pip install "
                         "tokenizers") from None
    pattern = re.compile(PIECES)
    shift = dict(enumerate(BYTES))

    def pieces(text: str) -> str:
        """One piece a line, a character a byte."""
        lines = []
        for piece in pattern.findall(text):
            as_bytes = piece.encode(errors="replace")
            lines.append(as_bytes.decode("latin-1").translate(shift))
        return "\n".join(lines)

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=BYTES)
    library.train_from_iterator(map(pieces, texts), trainer)
    vocab = library.get_vocab()
    tokens = []
    for token in sorted(vocab, key=vocab.get):
        tokens.append(bytes(ord(character) - 256 for character in token))
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
    tokens = learn_tokens(texts, vocab_size)
    if len(tokens) < vocab_size:
        raise ValueError(f"--vocab-size {vocab_size} is too large: these texts give {len(tokens)} "
                         "at most")
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_complete(path, b"".join(lines))
    return load_tokenizer(path)


def read_texts(sources: list[Documents], max_bytes: int) -> Iterator[str]:
    """Texts of all documents until `max_bytes` of UTF-8 are reached."""
    for documents in sources:
        for _, document in documents:
            for text in texts_of(document):
                if max_bytes <= 0:
                    return
                yield text[:max_bytes]
                max_bytes -= len(text.encode(errors="replace"))


def parser() -> Parser:
    parser = Parser("Train byte-level BPE, one token a digit.")
    add = parser.add_argument
    add("--source", type=source_path, nargs="+", action="extend", required=True, metavar="PATH",
        help="file, directory or stdlib")
    add("--text-field", metavar="KEY.KEY", help="where a record has its text, see tools.prepare")
    add("--vocab-size", type=positive, required=True, help="tokens, without the 256 special ones")
    add("--max-bytes", type=positive, default=5_000_000, help="how much text to train on")
    add("--out", type=Path, required=True, help="directory to put tokenizer.model in")
    return parser


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        a = parser().parse_args(argv)
        sources = [Documents(path, a.text_field) for path in a.source]
        tokenizer = train_bpe(read_texts(sources, a.max_bytes), a.vocab_size, a.out)
        for documents in sources:
            print(documents.report(f"{documents.path}, up to --max-bytes"))
        special = len(tokenizer.special_tokens_set)
        print(f"wrote {tokenizer.path}: {a.vocab_size} tokens, {special} special ones")


if __name__ == "__main__":
    main()
