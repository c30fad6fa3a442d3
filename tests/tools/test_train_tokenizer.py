"""tools.train_tokenizer: merges by frequency, and one token is one digit."""
import pytest
from texts import TRAINING_TEXT

import data
from tools import train_tokenizer
from tools.records import Documents
from tools.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([TRAINING_TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


def test_the_most_frequent_pair_is_merged_first(tmp_path):
    """bc stands 7 times, abc 4, and xy 3 times."""
    tokenizer = train_bpe(["abc\nabc\nabc\nabc\nbc\nbc\nbc\nxy\nxy\nxy"], 259, tmp_path)
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(259)]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert tokens[256:] == [b"bc", b"abc", b"xy"]


def test_one_token_is_one_digit(tmp_path):
    """Llama 3's own pattern keeps three digits together, so a merge of digits would be used."""
    tokenizer = train_bpe(["2024 2024 2025 x1234 1234567 abc abd xyz " * 50], 262, tmp_path)
    assert tokenizer._pat_str == data.LLAMA3
    assert [tokenizer.decode([t]) for t in tokenizer.encode_ordinary("2024")] == list("2024")


def test_the_same_text_gives_the_same_file(tokenizer, tmp_path):
    again = train_bpe([TRAINING_TEXT], 400, tmp_path / "a")
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    assert again.path.read_text().splitlines()[:2] == ["AA== 0", "AQ== 1"]


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="too large.*259"):
        train_bpe(["abc abc"], 300, tmp_path / "b")
    with pytest.raises(ValueError, match="too small"):
        train_bpe(["abc"], 100, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_texts_end_after_so_many_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"prompt": "three", "completion": "four"}\n{"text": "five"}')
    assert list(train_tokenizer.read_texts([Documents(tmp_path)], 13)) == ["one two", "three", "f"]


def test_command_line_writes_a_tokenizer_that_loads(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(40):
        names = [f"name{7 ** i % 10**5 + j}" for j in range(80)]
        (tmp_path / "text" / f"{i}.py").write_text(" ".join(names))
    train_tokenizer.main(["--source", str(tmp_path / "text"), "--vocab-size", "259",
                          "--out", str(tmp_path / "t")])
    assert "259 tokens, 256 special" in capsys.readouterr().out
    assert data.load_tokenizer(tmp_path / "t").n_vocab == 515


@pytest.mark.parametrize("arguments, message", [
    ("--source missing --vocab-size 300 --out o", "--source missing: no such file"),
    ("--source text --vocab-size 3 --out o", "too small"),
    ("--source text --vocab-size 300 --out t", "already exists"),
])
def test_a_users_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TRAINING_TEXT)
    train_bpe([TRAINING_TEXT], 300, "t")
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main(arguments.split())
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "text"]
