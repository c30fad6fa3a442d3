"""Text, and tokenizers of it whose tokens a test can count."""
import json

import pytest

import data

SCRIPTS = ["Plain English, don't I'LL we'Ve 1234 5", "Ελληνικό κείμενο 12", "Русский текст 3,4",
           "العربية ١٢٣ نص", "עברית טקסט", "हिन्दी पाठ १२३", "中文文本一二三",
           "日本語のテキスト", "한국어 텍스트",
           "ภาษาไทย ๑๒๓", "தமிழ் உரை", "ქართული", "🙂👩‍👩‍👧‍👦🇫🇷👍🏽 emoji", "½²Ⅷ③",
           "   \n\n\t  x  \r\n  12  3", "\u3000\xa0 x \u2028", "def f(x):\n    return x\n"]
SENTENCE = "the cat sat on the mat; the dog sat on the log. for i in range(10):\n    print(i)\n"
TRAINING_TEXT = " ".join(SCRIPTS) + SENTENCE * 20
TEXT = ""
for who in ("Anna", "Bo", "Cyd", "Dee", "Émile"):
    for how in ("quickly", "the old way", "naïvely", "again", "日本 style"):
        TEXT += f"{who} {how} went home\n    and said: {how}, {who}!\n" * 6

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 12"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long 👋"},
]


def ranks(digit_group: int) -> dict[bytes, int]:
    """All bytes, numbers of up to `digit_group` digits (Llama 3: 3) and a few words."""
    pieces = [bytes([b]) for b in range(256)]
    for width in range(2, digit_group + 1):
        pieces += [f"{i:0{width}d}".encode() for i in range(10**width)]
    pieces += [b"th", b"the", b" t", b" the", b"an", b"and", b" a", b" w"]
    return {piece: i for i, piece in enumerate(pieces)}


def make_tokenizer(digit_group: int) -> data.Tokenizer:
    pieces = ranks(digit_group)
    special = {name: len(pieces) + i for i, name in enumerate(data.LLAMA3_SPECIAL)}
    pattern = data.LLAMA3 if digit_group == 3 else data.QWEN2
    return data.Tokenizer(f"groups of {digit_group}", pattern, pieces, special)


def hugging_face_tokenizer(kind, path, vocab_size=500):
    """A tokenizer.json as Llama 3, Qwen2, GPT-2 or SmolLM2 have it, trained on TRAINING_TEXT, and
    its own library's view."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm2"))
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    if kind == "gpt2":
        library.pre_tokenizer = byte_level
    else:
        if kind == "smollm2":
            first = pre.Digits(individual_digits=True)
        else:
            pattern = data.LLAMA3 if kind == "llama3" else data.QWEN2
            first = pre.Split(tokenizers.Regex(pattern), "isolated")
        library.pre_tokenizer = pre.Sequence([first, byte_level])
    if kind == "qwen2":
        library.normalizer = tokenizers.normalizers.NFC()

    alphabet = sorted(pre.ByteLevel.alphabet())
    if kind == "smollm2":  # which has not all bytes
        alphabet = [letter for letter in alphabet if letter not in "ĄĆñò"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=alphabet)
    library.train_from_iterator([TRAINING_TEXT], trainer)
    library.save(str(path / "tokenizer.json"))
    return library


def sentencepiece_tokenizer(kind, path, vocab_size=600):
    """A tokenizer.json as Llama 2 has it, or ("metaspace") as newer files of its kind, trained on
    TRAINING_TEXT. It lacks the line break and most letters of other scripts."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(
        byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pre = tokenizers.pre_tokenizers
    library.pre_tokenizer = pre.Sequence([pre.Metaspace(), pre.Digits(individual_digits=True)])
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + byte_tokens, show_progress=False,
        limit_alphabet=80)
    library.train_from_iterator([*TRAINING_TEXT.splitlines(), "<s> x </s> " * 20], trainer)
    content = json.loads(library.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"]
                               if token["content"] not in byte_tokens]
    # merges that make a special token, as converters of SentencePiece's files write them
    content["model"]["vocab"].setdefault("<s", len(content["model"]["vocab"]))
    content["model"]["merges"] = [["<", "s"], ["<s", ">"], *content["model"]["merges"]]
    content["pre_tokenizer"] = None
    if kind == "metaspace":
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁",
                                    "prepend_scheme": "first", "split": False}
    else:
        content["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    content["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    (path / "tokenizer.json").write_text(json.dumps(content))
