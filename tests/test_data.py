"""data.py: each test makes one classic bug of tokenizers, chat masks, corpora or packing
impossible."""
import errno
import gzip
import json
import os
import random
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import (
    SCRIPTS,
    SENTENCE,
    TEXT,
    TRAINING_TEXT,
    hugging_face_tokenizer,
    sentencepiece_tokenizer,
)

import data
import eval_niah
import train
from eval_niah import begin_of_text, build_prompt, score, text_of
from sft import encode_chat
from tools import prepare
from tools.prepare import write_corpus
from tools.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([TRAINING_TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


def random_texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 8)):
            script = rng.choice(SCRIPTS)
            parts.append(script[rng.randrange(6):rng.randrange(5, 30)])
        yield rng.choice(["", " ", "  ", "\n", "7", " 7", "\t"]).join(parts)


# ------------------------------------------------------------------------------------- tokenizers


def test_bpe_round_trip_in_many_scripts(tokenizer):
    for text in [*SCRIPTS, *random_texts(200)]:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_llama3_special_ids(tokenizer):
    """Official order, at the offsets Llama 3.1 has from 128,000; 256 in all."""
    official = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_2|>": 12,
        "<|reserved_special_token_245|>": 255,
    }
    for name, offset in official.items():
        assert tokenizer.encode_single_token(name) == 400 + offset, name
    assert tokenizer.n_vocab == 400 + 256


def test_llama3_pattern_pieces(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode_ordinary("<s>")]
    assert pieces == ["<", "s", ">"]
    assert tokenizer.decode(tokenizer.encode_ordinary("\n\n\n")) == "\n\n\n"


def test_a_million_spaces_do_not_crash_tiktoken(tokenizer):
    text = "a" + " " * 1_200_000 + "b"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_runs_of_white_space_are_cut_where_too_long_and_looked_through_once():
    most = data.MOST_SPACES
    assert list(data.short_runs("a" + " " * (2 * most + 5) + "b")) == [
        "a" + " " * most, " " * most, " " * 5 + "b"]
    whole = "a" + " " * most + "b"
    assert list(data.short_runs(whole)) == [whole]
    # looked through from each space this takes seconds
    text = " " * 150_000 + "a" * most
    start = time.perf_counter()
    assert list(data.short_runs(text)) == [text]
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("content, message", [
    ("not base64 at all", "not a Llama-3"),
    ("QQ== 0\nQg== 2", "ranks 0, 1, 2"),
    ("QQ== 0\nQg== 1", "256 bytes"),
])
def test_a_broken_tokenizer_model_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        data.load_tokenizer(tmp_path / "missing")


def test_a_blank_first_line_makes_no_sentencepiece_model(tokenizer, tmp_path):
    content = tokenizer.path.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(b"\n" + content)
    assert data.fingerprint(data.load_tokenizer(tmp_path)) == data.fingerprint(tokenizer)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt2", "smollm2"])
def test_tokenizer_json_equals_the_tokenizers_library(kind, tmp_path):
    library = hugging_face_tokenizer(kind, tmp_path)
    ours = data.load_tokenizer(tmp_path)
    decomposed = unicodedata.normalize("NFD", " ".join(SCRIPTS))
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:20]
    standard_library = [path.read_text() for path in files]
    for text in [*SCRIPTS, *random_texts(500), decomposed, "a\x04b \x06", *standard_library]:
        assert ours.encode_ordinary(text) == library.encode(text).ids, repr(text)
    assert ours.n_vocab == library.get_vocab_size()
    assert ours.encode_single_token("<|im_end|>") == library.token_to_id("<|im_end|>")


def change_file(path, change):
    """Change the JSON of a directory's tokenizer.json; the library's own view of it."""
    tokenizers = pytest.importorskip("tokenizers")
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    library = tokenizers.Tokenizer.from_file(str(file))
    library.encode_special_tokens = True
    return library


BEYOND_TIKTOKEN = [
    (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.*Whitespace"),
    (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
    (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda t: t["model"]["merges"].reverse(), "order of merges"),
    (lambda t: t["model"]["vocab"].update(zebra=900), "'zebra', which has no merge"),
    (lambda t: t.update(truncation={"max_length": 2, "stride": 0, "direction": "Right",
                                    "strategy": "LongestFirst"}, normalizer={"type": "NFKC"}),
     "normalizer NFKC"),
    (lambda t: t.update(padding={"strategy": {"Fixed": 300}, "direction": "Right",
                                 "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                                 "pad_token": "<|endoftext|>"}, normalizer={"type": "NFKC"}),
     "normalizer NFKC"),
]


@pytest.mark.parametrize("change, message", BEYOND_TIKTOKEN)
def test_what_tiktoken_cannot_express_is_the_librarys(change, message, tmp_path, monkeypatch):
    hugging_face_tokenizer("gpt2", tmp_path)
    library = change_file(tmp_path, change)
    library.no_truncation()
    library.no_padding()
    ours = data.load_tokenizer(tmp_path)
    for text in [*SCRIPTS, *random_texts(50), "<|im_end|>"]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode_ordinary(text) == ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert list(ours.encode_parts(text)) == [ids]
    assert ours.n_vocab == max(library.get_vocab().values()) + 1
    # without the extra it is refused in one line
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*pip install[^\n]*$"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update(model={"type": "WordPiece", "vocab": {}}), "model.type WordPiece"),
    (lambda t: t.update(model={"type": "Unigram", "vocab": []}), "model.type Unigram"),
    (lambda t: t["model"].update(dropout=0.1), "dropout 0.1"),
    (lambda t: t["model"].pop("merges"), "not a BPE tokenizer.json .KeyError: 'merges'"),
    (lambda t: t["added_tokens"][0].update(id=None), "not a BPE tokenizer.json .TypeError"),
    (lambda t: t["added_tokens"][0].update(id="0"), "not a BPE tokenizer.json .TypeError"),
    (lambda t: t["added_tokens"][0].update(id=-1), "not a BPE tokenizer.json .OverflowError"),
    (lambda t: t.update(added_tokens=["<s>"]), "not a BPE tokenizer.json .TypeError"),
    (lambda t: t.update(normalizer="NFC"), "not a BPE tokenizer.json .AttributeError"),
    (lambda t: t.update(pre_tokenizer=["x"]), "not a BPE tokenizer.json .AttributeError"),
    (lambda t: t.update(model="BPE"), "not a BPE tokenizer.json .AttributeError"),
    (lambda t: t["model"].update(merges=[3]), "not a BPE tokenizer.json .TypeError"),
    (lambda t: t["model"]["vocab"].update(a=3), "two tokens of model.vocab have the same id"),
    (lambda t: t.update(normalizer={"type": "Unheard"}), "library does not read it"),
])
def test_a_tokenizer_json_that_is_not_bpe_is_refused_in_one_line(change, message, tmp_path):
    hugging_face_tokenizer("gpt2", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^[^\n]*tokenizer.json: [^\n]*{message}[^\n]*$"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [None, lambda t: t.update(normalizer={"type": "NFKC"})])
def test_surrogates_are_read_as_tiktoken_reads_them(change, tmp_path):
    """JSON can state them: a pair is a character, a lone one none."""
    hugging_face_tokenizer("gpt2", tmp_path)
    if change:
        change_file(tmp_path, change)
    ours = data.load_tokenizer(tmp_path)
    assert isinstance(ours, data.Tokenizer) == (change is None)
    assert ours.encode_ordinary("a \ud800 b\udc00") == ours.encode_ordinary("a \ufffd b\ufffd")
    assert ours.encode_ordinary("x \ud83d\ude42") == ours.encode_ordinary("x 🙂")


def test_bytes_that_the_vocabulary_lacks_are_dropped_from_every_part(tmp_path, monkeypatch):
    library = hugging_face_tokenizer("smollm2", tmp_path)
    text = "a\x04b \x06 the\n" * 50
    ids = library.encode(text).ids
    assert data.load_tokenizer(tmp_path).encode_ordinary(text) == ids

    def add(content):
        content["added_tokens"].append({
            "id": library.get_vocab_size(), "content": "<think>", "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False, "special": False})

    change_file(tmp_path, add)
    ours = data.load_tokenizer(tmp_path)
    think = ours.encode_single_token("<think>")
    assert ours.encode_ordinary(text + "<think>" + text) == [*ids, think, *ids]
    monkeypatch.setattr(data, "PART", 20)
    parts = list(ours.encode_parts(text))
    assert len(parts) > 10
    assert sum(parts, []) == ids
    assert data.load_tokenizer(tmp_path).encode_ordinary(text) == ids


def test_an_added_token_is_special_unless_its_file_denies_it(tmp_path):
    library = hugging_face_tokenizer("gpt2", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        del token["special"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    library.encode_special_tokens = True
    text = "a<|im_end|>b"
    ids = data.load_tokenizer(tmp_path).encode_ordinary(text)
    assert ids == library.encode(text).ids
    assert library.token_to_id("<|im_end|>") not in ids


def test_a_text_that_goes_on_gets_no_space_of_byte_levels(tmp_path):
    plain = hugging_face_tokenizer("gpt2", tmp_path)
    change_file(tmp_path, lambda t: t["pre_tokenizer"].update(add_prefix_space=True))
    ours = data.load_tokenizer(tmp_path)
    assert ours.encode_continued("the cat") == plain.encode("the cat").ids
    assert ours.encode_ordinary("the cat") == plain.encode(" the cat").ids


@pytest.mark.parametrize("fallback, spelling", [(True, b"A"), (False, b"<0x41>")])
def test_only_byte_fallback_makes_bytes_of_numbers(fallback, spelling, tmp_path):
    sentencepiece_tokenizer("prepend", tmp_path)
    change_file(tmp_path, lambda t: t["model"].update(byte_fallback=fallback))
    ours = data.load_tokenizer(tmp_path)
    assert ours.decode_single_token_bytes(ours.encode_single_token("<0x41>")) == spelling


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_a_tokenizer_of_llama_2s_kind_equals_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sentencepiece_tokenizer(kind, tmp_path)
    ours = data.load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:100]
    assert len(files) == 100
    for text in [*(file.read_text() for file in files), " ".join(SCRIPTS), *random_texts(200)]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
        spelled = ours.decode_bytes(ids).decode()
        assert spelled in (text, " " + text)  # Metaspace puts none before a space
    # no token for these: bytes
    assert ours.decode_single_token_bytes(ours.encode_continued("\n")[0]) == b"\n"
    assert len(ours.encode_continued("𓀀")) == 4


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_llama_2s_special_tokens_are_known_and_no_texts(kind, tmp_path):
    sentencepiece_tokenizer(kind, tmp_path)
    ours = data.load_tokenizer(tmp_path)
    begin, end = map(ours.encode_single_token, ("<s>", "</s>"))
    assert begin_of_text(ours) == [begin]
    assert data.stop_tokens(ours, None) == sorted([end, ours.encode_single_token("<|im_end|>")])
    assert data.separator_tokens("bos_eos", ours).tolist() == [end, begin]
    # the separator of the paper is text, though merges of this vocabulary would make the token
    separator = data.separator_tokens("<s>", ours).tolist()
    assert begin not in separator
    assert ours.decode_bytes(separator) == b"<s>"  # no space before it
    assert begin not in ours.encode_ordinary("x<s> <s></s>")
    assert text_of(ours, [begin, *ours.encode_ordinary("Hi"), ours.n_vocab]) == "<s> Hi\ufffd"
    with pytest.raises(KeyError):
        ours.encode_single_token("no such token")


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_text_that_goes_on_after_another_gets_no_space(kind, tmp_path):
    sentencepiece_tokenizer(kind, tmp_path)
    ours = data.load_tokenizer(tmp_path)
    whole = ours.encode_ordinary("the cat sat 12")
    assert ours.encode_ordinary("the cat") + ours.encode_continued(" sat 12") == whole
    tokens, _ = encode_chat([{"role": "user", "content": "the cat"}], ours)
    assert ours.decode(tokens) == "<|im_start|>user\nthe cat<|im_end|>\n"
    for length in (200, 301):
        haystack = np.array(ours.encode_ordinary(TEXT))
        prompt = build_prompt(ours, haystack, length, 0.5, random.Random(0))
        assert len(prompt.tokens) == length
        fact = f"\nThe pass key is {prompt.answer}. Remember it.\n"
        assert fact in ours.decode(prompt.tokens)
        assert ours.decode(prompt.tokens).endswith(f"The pass key is {prompt.answer}")
        right = [*prompt.tokens[prompt.answer_start:], ours.encode_continued(".")[0]]
        assert score(ours, prompt, right)[0]
        assert not score(ours, prompt, right[:-1] + ours.encode_continued("7"))[0]


def test_a_sentencepiece_model_gives_way_to_the_tokenizer_json_beside_it(tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c")  # as Llama 2's begins
    with pytest.raises(FileNotFoundError, match="^[^\n]*needs a tokenizer.json[^\n]*$"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="^[^\n]*SentencePiece's[^\n]*the directory[^\n]*$"):
        data.load_tokenizer(model)
    sentencepiece_tokenizer("prepend", tmp_path)
    assert data.load_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"


def test_fingerprint_and_rules_tell_tokenizers_of_llama_2s_kind_apart(tmp_path):
    sentencepiece_tokenizer("prepend", tmp_path)
    first = data.load_tokenizer(tmp_path)
    change_file(tmp_path, lambda content: content.update(post_processor=None, truncation=None))
    saved = data.load_tokenizer(tmp_path)
    assert (data.fingerprint(saved), saved.rules) == (data.fingerprint(first), first.rules)
    change_file(tmp_path, lambda content: content.update(normalizer=None))
    same_tokens = data.load_tokenizer(tmp_path)
    assert data.fingerprint(same_tokens) == data.fingerprint(first)
    assert same_tokens.rules != first.rules
    sentencepiece_tokenizer("prepend", tmp_path, 450)
    assert data.fingerprint(data.load_tokenizer(tmp_path)) != data.fingerprint(first)


def test_the_fingerprint_of_a_tokenizer_that_lacks_bytes_stays():
    """Corpora on people's disks state it: this is what the version before `tokenizers` wrote."""
    ranks = {bytes([byte]): byte - 32 for byte in range(32, 127)}
    ranks |= {b"th": 95, b"the": 96}
    small = data.Tokenizer("small", data.GPT2, ranks, {"<|endoftext|>": 97})
    assert data.fingerprint(small) == "b85fc2fbddcefe15"


def test_rules_tell_apart_what_is_spelled_in_plain_text():
    ranks = {bytes([byte]): byte for byte in range(256)}
    added = {"<think>": 256}
    special = data.Tokenizer("x", data.GPT2, ranks, added)
    spelled = data.Tokenizer("x", data.GPT2, ranks, added, spelled=["<think>"])
    assert special.encode_ordinary("<think>") != spelled.encode_ordinary("<think>")
    assert data.fingerprint(special) == data.fingerprint(spelled)
    assert special.rules != spelled.rules


ADDED = ["<think>", "<tool_call>", "<think>\n", "  "]


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True}, {"rstrip": True},
                                   {"single_word": True}])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_added_tokens_that_are_not_special_are_one_id(kind, flags, tmp_path):
    transformers = pytest.importorskip("transformers")
    library = hugging_face_tokenizer(kind, tmp_path)

    def add(content):
        content["decoder"] = {"type": "ByteLevel", "add_prefix_space": False,
                              "trim_offsets": True, "use_regex": True}
        for token in ADDED:
            entry = {"id": library.get_vocab_size() + ADDED.index(token), "content": token}
            entry |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                      "special": False}
            content["added_tokens"].append(entry | flags)

    change_file(tmp_path, add)
    ours = data.load_tokenizer(tmp_path)
    by_tiktoken = not flags or (kind == "gpt2" and "normalized" in flags)
    assert isinstance(ours, data.Tokenizer) == by_tiktoken
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"),
                                                  split_special_tokens=True)
    think = ours.encode_single_token("<think>")
    assert ours.encode_ordinary("<think>") == [think]
    end = ours.encode_single_token("<|im_end|>")
    rng = random.Random(0)
    pieces = [*ADDED, "<|im_end|>", "a", " ", "\n", "\u0338", "\u0301", "e", "<", "think>", "1"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        ids = ours.encode_ordinary(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert end not in ids
        if kind == "gpt2" and not {"lstrip", "rstrip"} & flags.keys():
            assert ours.decode_bytes(ids).decode() == text


# where pieces of all patterns end, and all that NFC joins
LETTERS = ["a", "b", "é", "e", "\u0301", "\u0338", "<", "1", "٢", " ", " ", "\n", "\n", "\r", "\t",
           ".", "'s", "'", "\u3000", "\x1c", "\x85", "中", "ᄀ", "ᅡ", "ᆨ", "\u0345", "🙂", "_", "-"]


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt2", "smollm2", "nfc gpt2", "nfc llama3"])
def test_parts_of_a_text_have_the_ids_of_the_whole(kind, tmp_path, monkeypatch):
    hugging_face_tokenizer(kind.split()[-1], tmp_path)
    if "nfc" in kind:
        change_file(tmp_path, lambda content: content.update(normalizer={"type": "NFC"}))
    ours = data.load_tokenizer(tmp_path)
    assert isinstance(ours, data.Tokenizer)
    rng = random.Random(0)
    cuts = 0
    for number in range(3000):
        few = rng.sample(LETTERS, 5) + ["the", "\n", " "]
        text = "".join(rng.choices(few, k=rng.randrange(40)))
        whole = ours.known(super(data.Tokenizer, ours).encode_ordinary(ours.normalise(text)))
        monkeypatch.setattr(data, "PART", 1 + number % 3)  # cut wherever it may be cut
        parts = list(ours.encode_parts(text))
        assert sum(parts, []) == ours.encode_ordinary(text) == whole, repr(text)
        cuts += len(parts) - 1
    assert cuts > 3000


def test_a_long_text_comes_in_parts(tokenizer):
    text = SENTENCE * (3 * data.PART // len(SENTENCE))
    sizes = [len(tokenizer.decode(part)) for part in tokenizer.encode_parts(text)]
    assert len(sizes) == 3
    assert max(sizes) < data.PART + 100


def test_a_long_run_of_white_space_has_the_librarys_ids(tmp_path):
    library = hugging_face_tokenizer("smollm2", tmp_path)
    ours = data.load_tokenizer(tmp_path)
    for text in ("a" + " " * 700_000 + "b", "\n" * 150_000, "x" + "\t" * 150_001 + "1"):
        assert ours.encode_ordinary(text) == library.encode(text).ids
        assert text in data.parts(text)  # whole


def test_text_to_needles_with_a_tokenizer_of_llama_2s_kind(tmp_path, capsys):
    """The whole way: corpus, a few steps, a needle map."""
    sentencepiece_tokenizer("prepend", tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    config = json.loads((Path(train.__file__).parent / "runs" / "tiny.json").read_text())
    config |= {"vocab_size": tokenizer.n_vocab, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"text": TEXT[i:] + TEXT}) + "\n" for i in range(0, 600, 20)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    source = f"text={tmp_path / 'text.jsonl'}"
    place = [str(tmp_path / name) for name in ("corpus", "run", "results.json")]
    prepare.main(["--source", source, "--tokenizer", str(tmp_path), "--holdout", "0.5",
                  "--holdout-window", "0", "--processes", "1", "--out", place[0]])
    train.main(["--config", str(tmp_path / "config.json"), "--tokenizer", str(tmp_path),
                "--data", place[0], "--sequence-length", "64", "--steps", "2", "--device", "cpu",
                "--validation-sequences", "1", "--out", place[1]])
    eval_niah.main([f"{place[1]}/final", "--haystack", place[0], "--lengths", "200", "300",
                    "--depths", "2", "--samples", "1", "--device", "cpu", "--out", place[2]])
    assert "length" in capsys.readouterr().out
    assert len(json.loads(Path(place[2]).read_text())["cells"]) == 4
    end = tokenizer.encode_single_token("</s>")
    assert end in json.loads(Path(place[1], "final", "config.json").read_text())["eos_token_id"]


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_records_are_named_by_their_lines(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(file, "wb") as lines:
        lines.write(b'{"a": 1}\n\n  \n[2]\n{oops\n')
    records = data.read_records(file)
    assert next(records) == (f"{file}, line 1", {"a": 1})
    assert next(records) == (f"{file}, line 4", [2])
    with pytest.raises(ValueError, match=f"^{file}, line 5: not valid JSON"):
        next(records)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: b"no gzip",
                                    lambda whole: whole[:10] + b"?"])
def test_a_damaged_gzip_file_of_records_is_named(damage, tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(damage(gzip.compress(b'{"a": 1}\n' * 1000)))
    with pytest.raises(ValueError, match=f"^{file}: damaged gzip file"):
        list(data.read_records(file))


# ----------------------------------------------------------------------------------------- corpus


def test_a_corpus_reads_back_as_it_was_written(tmp_path, tokenizer):
    """Documents cut at the border of a shard, masks of another document, sources mixed in a
    shard."""
    documents = []
    for i, length in enumerate([30, 50, 40, 150, 10, 90, 0]):
        source = "b" if i % 3 == 0 else "a"
        documents.append((source, [i] * length, [i % 2 == 0] * length))
    meta = write_corpus({"train": documents}, tmp_path / "out", tokenizer, shard_tokens=40)
    dataset = data.PackedDataset(tmp_path / "out", "train", 8, 0, "none")
    read = []
    for shard in meta["splits"]["train"]:
        for _ in range(shard["documents"]):
            tokens, mask = dataset.document(len(read))
            read.append((shard["source"], tokens.tolist(), mask.tolist()))
    # a document without tokens is none
    assert sorted(read) == sorted(documents[:-1])
    assert len(meta["splits"]["train"]) == 4
    assert sum(shard["tokens"] for shard in meta["splits"]["train"]) == 370


def test_a_damaged_or_foreign_corpus_is_refused(tmp_path, tokenizer):
    write_corpus({"train": [("x", [1, 2, 3], None)]}, tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match="no documents in split 'valid'"):
        data.PackedDataset(tmp_path / "out", "valid", 2, 0, "none")
    # fewer tokens, and as many but others
    for text, size in (("ab ab", 257), (TRAINING_TEXT.upper(), 400)):
        other = train_bpe([text], size, tmp_path / str(size))
        with pytest.raises(ValueError, match="another tokenizer"):
            data.PackedDataset(tmp_path / "out", "train", 2, 0, tokenizer=other)
    damage = [
        ("tokens", b"12345"),
        ("mask", b"11"),
        ("lengths", b"1"),
        ("lengths", bytes([2, *[0] * 7])),
    ]
    for kind, content in damage:
        file = tmp_path / "out" / f"train-00000.{kind}"
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-00000.{kind}"):
            data.PackedDataset(tmp_path / "out", "train", 2, 0, "none")
        file.write_bytes(whole)
    data.PackedDataset(tmp_path / "out", "train", 2, 0, "none")
    with pytest.raises(FileNotFoundError, match="not a corpus"):
        data.PackedDataset(tmp_path, "train", 2, 0, "none")


@pytest.mark.parametrize("content", ["{}", '{"format": 1, "vocab_size": 656}', '{"format": 2}'])
def test_a_corpus_of_another_format_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    message = "^[^\n]*meta.json: not a corpus of format 2, [^\n]*; prepare it again$"
    with pytest.raises(ValueError, match=message):
        data.read_meta(tmp_path)


def test_corpora_of_the_same_lengths_have_digests_of_their_own(tmp_path, tokenizer):
    """A run resumed on other data would not be noticed."""
    for name, token in (("a", 1), ("again", 1), ("b", 2)):
        write_corpus({"train": [("x", [token] * 9, None)]}, tmp_path / name, tokenizer)
    a = data.digest(tmp_path / "a")
    again = data.digest(tmp_path / "again")
    b = data.digest(tmp_path / "b")
    assert a == again != b


def test_a_lock_is_not_held_on_a_file_that_its_last_holder_has_just_removed(tmp_path, monkeypatch):
    """Between opening and locking: a third process would make a file of its own and lock that."""
    file = tmp_path / "lock"
    lock = data.fcntl.lockf

    def removed_just_before(*arguments):
        file.unlink()
        lock(*arguments)

    monkeypatch.setattr(data.fcntl, "lockf", removed_just_before)
    with pytest.raises(ValueError, match="another process is at work"), data.locked(file):
        pass


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])  # which of them, systems differ
def test_a_lock_of_another_process_is_told(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "Resource temporarily unavailable")

    monkeypatch.setattr(data.fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match="another process is at work"):
        with data.locked(tmp_path / "lock"):
            pass


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    """As Lustre can be: to wait would not help."""
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "lockf", refuse)
    message = "lock: cannot be locked .No locks available.; choose a place on a file system with"
    with pytest.raises(OSError, match=message), data.locked(tmp_path / "lock"):
        pass


# ----------------------------------------------------------------------------- length up-sampling


def test_length_weights_keep_each_sources_tokens():
    lengths = np.array([100, 5000, 9000, 200, 4096, 8192, 50])
    sources = np.array([0, 0, 0, 1, 1, 1, 2])
    weights = data.length_weights(lengths, sources, short_weight=0.5, long_weight=3.0)
    for source in range(3):
        mine = sources == source
        assert np.isclose((weights * lengths)[mine].sum(), lengths[mine].sum())
    assert np.isclose(weights[2] / weights[1], 3)
    assert np.isclose(weights[0] / weights[1], 0.5)
    # 4,096 and 8,192 are in the middle
    assert np.isclose(weights[4], weights[5])
    assert np.isclose(weights[6], 1)
    assert (data.length_weights(lengths, sources) == 1).all()
    with pytest.raises(ValueError, match="leave no document of one of the corpus.s sources"):
        data.length_weights(lengths, sources, short_weight=0)
    with pytest.raises(ValueError, match="--short-length 9000 is above --long-length 8192"):
        data.length_weights(lengths, sources, short=9000)
    with pytest.raises(AssertionError):
        data.length_weights(lengths, sources, long_weight=-1)


def test_measured_token_shares_follow_the_weights(tmp_path, tokenizer):
    """Two sources of short (10), middle (50) and long (200) documents; shares counted in 20 epochs
    of the stream."""
    rng = np.random.default_rng(0)
    documents = []
    for s in range(2):
        for kind, size in enumerate((10, 50, 200)):
            document = (f"source {s}", [100 * s + kind] * size, None)
            documents += [document] * (30 * (s + 1))
    documents = [documents[i] for i in rng.permutation(len(documents))]
    write_corpus({"train": documents}, tmp_path / "out", tokenizer)
    dataset = data.PackedDataset(tmp_path / "out", "train", 1000, 0, "none", short=20, long=100,
                                 short_weight=0.3, long_weight=2)
    total = 20 * sum(len(tokens) for _, tokens, _ in documents)
    stream = np.concatenate([dataset.sequence(i)[0][:-1] for i in range(total // 1000)])
    weighted = np.array([10 * 0.3, 50, 200 * 2])
    for s in range(2):
        shares = [(stream == 100 * s + kind).mean() for kind in range(3)]
        expected = weighted / weighted.sum() * (s + 1) / 3  # the second source has twice as much
        assert np.allclose(shares, expected, rtol=0.06)


# ---------------------------------------------------------------------------------------- packing


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """40 documents of 5 to 90 tokens in several shards; document i is i, 100, 101, 102, ...; odd
    ones carry loss on their second half."""
    rng = np.random.default_rng(3)
    documents = []
    for i, size in enumerate(rng.integers(5, 90, 40).tolist()):
        mask = None
        if i % 2:
            mask = [False] * (size // 2) + [True] * (size - size // 2)
        documents.append(("x", [i, *range(100, 100 + size - 1)], mask))
    directory = tmp_path_factory.mktemp("corpus") / "out"
    write_corpus({"train": documents, "valid": documents[:3]}, directory, tokenizer,
                 shard_tokens=500)
    return directory, documents


def stream_of(dataset, documents, separator, epochs):
    """What the docstring promises, built document by document."""
    tokens = []
    mask = []
    ids = []
    number = 0
    for epoch in range(epochs):
        for i in dataset.plan(epoch):
            _, own, loss = documents[i]
            tokens += own + separator
            mask += (loss or [True] * len(own)) + [True] * len(separator)
            ids += [number] * (len(own) + len(separator))
            number += 1
    return np.array(tokens), np.array(mask), np.array(ids)


@pytest.mark.parametrize("separator, weights", [
    ("<s>", {}),
    ("none", {}),
    ("bos_eos", {}),
    ("<s>", {"short": 20, "long": 60, "short_weight": 0.4, "long_weight": 2.6}),
])
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_sequences_are_the_stream_without_a_token_lost_or_repeated(
        corpus, tokenizer, separator, weights, size):
    """Over three epochs: what is cut at a sequence's border must continue in the next, masks and
    ids alike."""
    directory, documents = corpus
    dataset = data.PackedDataset(directory, "train", size, 5, separator, tokenizer=tokenizer,
                                 **weights)
    end = tokenizer.encode_single_token("<|end_of_text|>")
    begin = tokenizer.encode_single_token("<|begin_of_text|>")
    between = {"<s>": tokenizer.encode_ordinary("<s>"), "none": [], "bos_eos": [end, begin]}
    expected = stream_of(dataset, documents, between[separator], 3)
    for i in range((len(expected[0]) - 1) // size):
        for got, want in zip(dataset.sequence(i), expected, strict=True):
            assert np.array_equal(got, want[i * size:i * size + size + 1])
    tokens, mask, ids = dataset.sequence(0)
    assert (tokens.dtype, mask.dtype, ids.dtype) == (np.int64, bool, np.int64)


def test_targets_are_shifted_before_anything_is_sharded(corpus, tokenizer):
    """Each next token is a target exactly once, also at the borders of sequences and of batches."""
    dataset = data.PackedDataset(corpus[0], "train", 16, 0, tokenizer=tokenizer)
    first = data.batch(dataset, 0, 4)
    second = data.batch(dataset, 4, 4)
    tokens, mask, _ = stream_of(dataset, corpus[1], tokenizer.encode_ordinary("<s>"), 1)
    inputs = torch.cat([first.tokens.flatten(), second.tokens.flatten()]).numpy()
    targets = torch.cat([first.targets.flatten(), second.targets.flatten()]).numpy()
    assert np.array_equal(inputs, tokens[:128])
    assert np.array_equal(targets, np.where(mask[1:129], tokens[1:129], -100))
    assert (targets == -100).any()
    for x in (first.tokens, first.targets):
        assert x.dtype == torch.int64
        assert x.shape == (4, 16)
    assert first.document_ids is None


def test_stored_order_is_the_corpuss_in_every_epoch(corpus):
    directory, documents = corpus
    dataset = data.PackedDataset(directory, "train", 64, 5, "none", stored_order=True)
    starts = set()
    for epoch in range(5):  # from a document on that is drawn
        order = dataset.plan(epoch).tolist()
        start = order[0]
        assert order == [*range(start, len(documents)), *range(start)]
        starts.add(start)
    assert len(starts) > 1
    with pytest.raises(ValueError, match="would follow its own copy"):
        data.PackedDataset(directory, "train", 64, 5, "none", short_weight=0.5, stored_order=True)


def test_order_is_a_pure_function_of_seed_and_epoch(corpus, tokenizer):
    """Ranks that shuffle differently, or a resumed run that starts the order anew, train on other
    data."""
    def make(seed=0):
        return data.PackedDataset(corpus[0], "train", 50, seed, tokenizer=tokenizer)

    one = make()
    forward = [one.sequence(i)[0].tolist() for i in range(200)]
    # each resumed at i in a fresh object
    assert forward == [make().sequence(i)[0].tolist() for i in range(200)]
    assert forward[::-1] == [one.sequence(i)[0].tolist() for i in reversed(range(200))]
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            order = make(seed).plan(epoch).tolist()
            assert sorted(order) == list(range(40))
            orders.add(tuple(order))
    assert len(orders) == 4


def test_separator_is_the_plain_text_not_a_special_token(corpus, tokenizer):
    """arXiv 2504.06214: `<s>`, not Llama 3's begin-of-text token."""
    dataset = data.PackedDataset(corpus[0], "train", 3000, 0, tokenizer=tokenizer)
    tokens = dataset.sequence(0)[0].tolist()
    assert tokenizer.decode(tokens).count("<s>") >= 20
    assert max(tokens) < 400
    with pytest.raises(ValueError, match="'</s>' is unknown"):
        data.PackedDataset(corpus[0], "train", 10, 0, "</s>", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        data.PackedDataset(corpus[0], "train", 10, 0)


@pytest.mark.parametrize("separator", ["<s>", "none", "bos_eos"])
def test_documents_as_long_as_a_sequence_start_where_sequences_start(
        tmp_path, tokenizer, separator):
    size = 32
    after = len(data.separator_tokens(separator, tokenizer))
    documents = [("x", [i, *[300] * (size - after - 1)], None) for i in range(20)]
    write_corpus({"train": documents}, tmp_path / "out", tokenizer)
    dataset = data.PackedDataset(tmp_path / "out", "train", size, 0, separator,
                                 tokenizer=tokenizer, document_mask=True)
    rows = data.batch(dataset, 0, 60)
    for epoch in range(3):
        first = rows.tokens[20 * epoch:20 * epoch + 20, 0]
        assert sorted(first.tolist()) == list(range(20))
    assert (rows.document_ids == rows.document_ids[:, :1]).all()
    assert (rows.tokens[:, 1:] >= 20).all()


def test_a_repeated_document_beside_itself_has_two_ids(tmp_path, tokenizer):
    """With one id, a cross-document mask would let the copy see the original."""
    write_corpus({"train": [("x", [1, 2, 3], None)]}, tmp_path / "out", tokenizer)
    ids = data.PackedDataset(tmp_path / "out", "train", 8, 0, "none").sequence(2)[2]
    assert ids.tolist() == [5, 5, 6, 6, 6, 7, 7, 7, 8]


def test_packing_a_batch_is_fast(tmp_path, tokenizer):
    """32 sequences of 128 tokens in well under 2 ms: no Python per token."""
    rng = np.random.default_rng(0)
    documents = [("x", rng.integers(0, 400, n), None) for n in rng.integers(50, 200, 2000)]
    write_corpus({"train": documents}, tmp_path / "out", tokenizer)
    dataset = data.PackedDataset(tmp_path / "out", "train", 128, 0, tokenizer=tokenizer)
    times = []
    for i in range(20):
        start = time.perf_counter()
        data.batch(dataset, 32 * i, 32)
        times.append(time.perf_counter() - start)
    assert min(times) < 4e-3


# ----------------------------------------------------------------------------------------- blends


class Counting:
    """A dataset whose sequence i is filled with i."""

    sequence_length = 4
    document_mask = False

    def __init__(self, name):
        self.name = name

    def sequence(self, index):
        return np.full(5, index), np.ones(5, bool), np.full(5, self.name)


def test_blend_uses_every_sequence_of_each_dataset_once_in_order_at_its_weight():
    """Shares as exact as coins are: all within four standard deviations. And resumed at any
    place."""
    def make(seed=3):
        return data.Blend([Counting(0), Counting(1), Counting(2)], [7, 2, 1], seed)

    count = 10_000
    def drawn_by(blend, index):
        """(dataset, index of its sequence)."""
        tokens, _, ids = blend.sequence(index)
        return int(ids[0]), int(tokens[0])

    blend = make()
    drawn = [drawn_by(blend, i) for i in range(count)]
    for name, share in enumerate((0.7, 0.2, 0.1)):
        own = [index for owner, index in drawn if owner == name]
        assert own == list(range(len(own)))
        for n in (100, 1000, count):
            number = sum(owner == name for owner, _ in drawn[:n])
            assert abs(number - share * n) < 4 * np.sqrt(share * (1 - share) * n)
    for index in (count - 1, 1, 4095, 4096):
        assert drawn_by(make(), index) == drawn[index]
    other = make(4)
    assert [drawn_by(other, i)[0] for i in range(100)] != [owner for owner, _ in drawn[:100]]


def test_blend_far_into_a_run_is_fast():
    """A resume at step 100,000 of 32 sequences."""
    start = time.perf_counter()
    data.Blend([Counting(i) for i in range(4)], [1, 2, 3, 4], 0).sequence(3_200_000)
    assert time.perf_counter() - start < 3


def test_blend_refuses_what_it_cannot_keep():
    one = [Counting(0)]
    for datasets, weights in (([], []), (one, [0.0]), (one, [1, 2]), (one, [np.inf])):
        with pytest.raises(ValueError, match="weight"):
            data.Blend(datasets, weights, 0)
    longer = Counting(1)
    longer.sequence_length = 8
    with pytest.raises(ValueError, match="one sequence_length"):
        data.Blend([Counting(0), longer], [1, 1], 0)


def test_no_document_occurs_more_often_in_an_epoch_than_its_weight_rounded_up(tmp_path, tokenizer):
    documents = [("x", [1] * length, None) for length in (3, 5, 8, 13, 21, 34, 55)]
    write_corpus({"train": documents}, tmp_path / "c", tokenizer)
    dataset = data.PackedDataset(tmp_path / "c", "train", 8, seed=1, separator="none", short=6,
                                 long=20, short_weight=0.3, long_weight=2.7)
    for epoch in range(20):
        times = np.bincount(dataset.plan(epoch), minlength=7)
        assert (times >= np.floor(dataset.weights)).all()
        assert (times <= np.ceil(dataset.weights)).all()
