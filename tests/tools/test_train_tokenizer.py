"""tools.train_tokenizer: merges are those of a full recount, and one token is one digit."""
import re
from collections import Counter

import pytest
from texts import TRAINING_TEXT

import data
from tools import train_tokenizer
from tools.train_tokenizer import QWEN2_STDLIB, train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([TRAINING_TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


def test_bpe_gives_one_token_a_digit(tmp_path):
    """Llama 3's own pattern keeps three digits together, so a merge of digits would be used."""
    tokenizer = train_bpe(["2024 2024 2025 x1234 1234567 abc abd xyz " * 50], 262, tmp_path)
    assert tokenizer._pat_str == data.LLAMA3
    assert [tokenizer.decode([t]) for t in tokenizer.encode_ordinary("2024")] == list("2024")


def test_bpe_equals_recounting_every_merge(tokenizer):
    """Incremental counts that drift from a full recount choose other merges."""
    words = Counter(re.findall(QWEN2_STDLIB, TRAINING_TEXT))
    spelled = {word: [bytes([b]) for b in word.encode()] for word in words}
    expected = [bytes([b]) for b in range(256)]
    while len(expected) < 330:
        counts = Counter()
        for word, symbols in spelled.items():
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += words[word]
        rank = {token: i for i, token in enumerate(expected)}
        best = min(counts, key=lambda pair: (-counts[pair], rank[pair[0]], rank[pair[1]]))
        expected.append(best[0] + best[1])
        for word, symbols in spelled.items():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = [best[0] + best[1]]
                i += 1
    assert [tokenizer.decode_single_token_bytes(i) for i in range(330)] == expected


def test_bpe_is_deterministic_and_refuses_impossible_sizes(tokenizer, tmp_path):
    again = train_bpe([TRAINING_TEXT], 400, tmp_path / "a" / "tokenizer.model")
    assert again._mergeable_ranks == tokenizer._mergeable_ranks
    assert (tmp_path / "a" / "tokenizer.model").read_text().splitlines()[:2] == ["AA== 0", "AQ== 1"]
    with pytest.raises(ValueError, match="too large.*259"):
        train_bpe(["abc abc"], 300, tmp_path / "b")
    with pytest.raises(ValueError, match="too small"):
        train_bpe(["abc"], 100, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_command_line_writes_a_tokenizer_that_loads(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.py").write_text(" ".join(f"name{7 ** i % 10**5 + j}" for j in range(80)))
    train_tokenizer.main(["--source", str(tmp_path / "text"), "--vocab-size", "260", "--out", str(tmp_path / "t")])
    assert "260 tokens, 256 special" in capsys.readouterr().out and data.load_tokenizer(tmp_path / "t").n_vocab == 516


@pytest.mark.parametrize("arguments, message", [
    ("--source missing --vocab-size 300 --out o", "--source missing: no such file"),
    ("--source text --vocab-size 3 --out o", "too small"), ("--source text --vocab-size 300 --out t", "already exists")])
def test_a_users_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TRAINING_TEXT)
    train_bpe([TRAINING_TEXT], 300, "t")
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main(arguments.split())
    assert str(caught.value).startswith("error: ") and message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "text"]
