"""Text, and tokenizers of it whose tokens a test can count."""
import pytest

import data

SCRIPTS = ["Plain English, don't I'LL we'Ve 1234 5", "Ελληνικό κείμενο 12", "Русский текст 3,4",
           "العربية ١٢٣ نص", "עברית טקסט", "हिन्दी पाठ १२३", "中文文本一二三", "日本語のテキスト", "한국어 텍스트",
           "ภาษาไทย ๑๒๓", "தமிழ் உரை", "ქართული", "🙂👩‍👩‍👧‍👦🇫🇷👍🏽 emoji", "½²Ⅷ③",
           "   \n\n\t  x  \r\n  12  3", "\u3000\xa0 x \u2028", "def f(x):\n    return x\n"]
TRAINING_TEXT = (
    " ".join(SCRIPTS)
    + "the cat sat on the mat; the dog sat on the log. for i in range(10):\n    print(i)\n" * 20)
TEXT = "".join(f"{a} {b} went home\n    and said: {b}, {a}!\n"
               for a in ("Anna", "Bo", "Cyd", "Dee", "Émile")
               for b in ("quickly", "the old way", "naïvely", "again", "日本 style")
               for _ in range(6))


def ranks(digit_group: int) -> dict[bytes, int]:
    """All bytes, numbers of up to `digit_group` digits (Llama 3: 3) and a few words."""
    pieces = [bytes([b]) for b in range(256)]
    for width in range(2, digit_group + 1):
        pieces += [f"{i:0{width}d}".encode() for i in range(10**width)]
    pieces += [b"th", b"the", b" t", b" the", b"an", b"and", b" a", b" w"]
    return {piece: i for i, piece in enumerate(pieces)}


def make_tokenizer(digit_group: int) -> data.Tokenizer:
    found = ranks(digit_group)
    special = {name: len(found) + i for i, name in enumerate(data.LLAMA3_SPECIAL)}
    pattern = data.LLAMA3 if digit_group == 3 else data.QWEN2
    return data.Tokenizer(f"groups of {digit_group}", pattern, found, special)


def hugging_face_tokenizer(kind, path, vocab_size=500):
    """A tokenizer.json as Llama 3, Qwen2, GPT-2 or SmolLM2 have it, trained on TRAINING_TEXT, and
    its own library's view."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm2"))
    first = {"llama3": lambda: pre.Split(tokenizers.Regex(data.LLAMA3), "isolated"),
             "qwen2": lambda: pre.Split(tokenizers.Regex(data.QWEN2), "isolated"),
             "smollm2": lambda: pre.Digits(individual_digits=True), "gpt2": lambda: None}[kind]()
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre.Sequence([first, byte_level]) if first else byte_level
    library.normalizer = tokenizers.normalizers.NFC() if kind == "qwen2" else None
    alphabet = sorted(pre.ByteLevel.alphabet())
    library.train_from_iterator([TRAINING_TEXT],
                                tokenizers.trainers.BpeTrainer(
                                    vocab_size=vocab_size,
                                    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                    show_progress=False,
                                    initial_alphabet=alphabet if kind != "smollm2"
                                    else [c for c in alphabet if c not in "ĄĆñò"]))
    library.save(str(path / "tokenizer.json"))
    return library
