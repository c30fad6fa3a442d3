"""tools.needle_pairs: two prompts that differ in one thing alone."""
import json
import random
import re

import numpy as np
import pytest
import torch
from texts import TEXT, make_tokenizer

from data import separator_tokens
from eval_niah import KEYS
from parallel import Grid
from tools import needle_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(3)


@pytest.fixture(scope="module")
def passage(tokenizer):
    return np.array(tokenizer.encode_ordinary(TEXT))


@pytest.mark.parametrize("task", ["passkey", "needle"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_border_moves_and_nothing_else(tokenizer, passage, depth, task):
    border = separator_tokens("<s>", tokenizer).tolist()
    rng = random.Random(f"{depth} {task}")
    same, other = needle_pairs.border_pair(tokenizer, passage, 400, depth, rng, task)
    assert len(same.tokens) == len(other.tokens) == 400
    without = []
    for prompt in (same, other):
        assert tokenizer.decode(prompt.tokens[prompt.answer_start:]) == prompt.answer
        [place] = [i for i in range(400) if prompt.tokens[i:i + len(border)] == border]
        without.append(prompt.tokens[:place] + prompt.tokens[place + len(border):])
        documents = "".join(tokenizer.decode(prompt.tokens)).split("<s>")
        assert len(documents) == 2
        number = documents[0].count(prompt.answer), documents[1].count(prompt.answer)
        assert number == ((0, 2) if prompt is same else (1, 1))
        fact = tokenizer.decode(prompt.tokens[prompt.needle_start:])
        assert fact.startswith("\nThe pass key" if task == "passkey" else "\nThe magic number")
    assert without[0] == without[1]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_number_is_asked_for_alone_among_others_and_by_way_of_another_key(tokenizer, passage,
                                                                              depth):
    rng = random.Random(3)
    alone, one, two = needle_pairs.hop_prompts(tokenizer, passage, 500, depth, rng, "needle")
    assert alone.answer == one.answer == two.answer
    assert alone.key == one.key != two.key
    for prompt in (alone, one, two):
        assert len(prompt.tokens) == 500
        text = tokenizer.decode(prompt.tokens)
        stated = dict(re.findall(r"The magic number of (\S+) is (\d{5})\.", text))
        same = dict(re.findall(r"The magic number of (\S+) is that of (\S+)\.", text))
        assert len(stated) == (1 if prompt is alone else 1 + needle_pairs.OTHERS)
        assert len(set(stated.values())) == len(stated)
        assert list(same) == ([] if prompt is alone else [two.key])
        assert stated[same.get(prompt.key, prompt.key)] == prompt.answer
        assert text.endswith(f"What is the magic number of {prompt.key}? The magic number of "
                             f"{prompt.key} is {prompt.answer}")
        fact = tokenizer.decode(prompt.tokens[prompt.needle_start:])
        assert fact.startswith(f"\nThe magic number of {one.key} is {one.answer}.")
    # but for the question, and the text that it leaves room for, the last two are one prompt
    shared = [a == b for a, b in zip(one.tokens, two.tokens, strict=True)].index(False)
    assert shared > 400
    # the fact is near its depth
    assert abs(alone.needle_start - depth * 415) < 30


def test_a_passage_that_holds_all_words_gets_compound_keys(tokenizer):
    text = " ".join(KEYS) + TEXT
    passage = np.array(tokenizer.encode_ordinary(text))
    prompts = needle_pairs.hop_prompts(tokenizer, passage, 800, 0.5, random.Random(3), "needle")
    assert all("-" in prompt.key for prompt in prompts)


def test_a_prompt_without_room_is_refused(tokenizer, passage):
    with pytest.raises(ValueError, match="length 60 is too small for 5 facts and a question"):
        needle_pairs.hop_prompts(tokenizer, passage, 60, 0.5, random.Random(3), "needle")


@pytest.mark.parametrize("pair, names", [
    ("border", ["same document", "another document"]),
    ("hops", ["alone", "one fact", "two facts"]),
])
def test_both_are_measured(pair, names, model_directory, text_file, tmp_path, capsys):
    out = tmp_path / "pairs.json"
    words = [model_directory, "--pair", pair, "--haystack", text_file, "--lengths", 300, 400,
             "--depths", 3, "--samples", 2, "--out", out]
    needle_pairs.main([str(word) for word in words])
    twins = json.loads(out.read_text())["twins"]
    assert list(twins) == names
    for twin in twins.values():
        assert [mean["length"] for mean in twin["means"]] == [300, 400]
        assert len(twin["cells"]) == 2 * 3
        assert all(len(cell["prompts"]) == 2 for cell in twin["cells"])
    assert f"{names[-1]}, 400 tokens: 0.0 %" in capsys.readouterr().out


def test_each_name_has_its_own_prompts(tokenizer, passage, monkeypatch):
    """A model that is right where the fact stands in the question's document alone."""
    def predict(reader, prompts):
        border = separator_tokens("<s>", tokenizer).tolist()
        reader.read = reader.computed = 1
        said = []
        for prompt in prompts:
            answer = prompt.tokens[prompt.answer_start:]
            place = tokenizer.decode(prompt.tokens).index("<s>")
            right = place < tokenizer.decode(prompt.tokens).index(prompt.answer)
            said.append((answer if right else border) + tokenizer.encode_continued("."))
        return said

    class Model:
        grid = Grid()
        head_weight = torch.zeros(1)

    monkeypatch.setattr(needle_pairs, "predict", predict)
    twins = needle_pairs.evaluate_pairs(Model(), tokenizer, passage, "border", [400, 300],
                                        [0.0, 1.0], 4, seed=1)
    assert [mean["accuracy"] for mean in twins["same document"]["means"]] == [100, 100]
    assert [mean["accuracy"] for mean in twins["another document"]["means"]] == [0, 0]


@pytest.mark.parametrize("change, message", [
    (["--lengths", "9000000"], "9000000 needs as many"),
    (["--lengths", "40"], "too small"),
    (["--pair", "triple"], "--pair"),
    (["--samples", "0"], "--samples 0"),
])
def test_mistakes_are_one_line(change, message, model_directory, text_file):
    words = [str(model_directory), "--pair", "hops", "--haystack", str(text_file), "--lengths",
             "400", *change]
    with pytest.raises(SystemExit) as caught:
        needle_pairs.main(words)
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
