"""tools.tiny_documents: documents of the lengths asked for, loss on their answers, conversations
that fit."""
import argparse
import json
import re
import shutil

import numpy as np
import pytest

from data import PackedDataset
from sft import encode_chat
from tools import tiny_documents
from tools.prepare import prepare_corpus
from tools.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer and a corpus of one module of the standard library."""
    place = tmp_path_factory.mktemp("documents")
    (place / "text").mkdir()
    shutil.copy(argparse.__file__, place / "text")
    tokenizer = train_bpe([(place / "text" / "argparse.py").read_text()], 600, place / "tokenizer")
    prepare_corpus([("code", place / "text")], tokenizer, place / "corpus", holdout=0)
    return place, tokenizer


def made(place, what: str, out: str, *more):
    words = [what, "--corpus", place / "corpus", "--tokenizer", place / "tokenizer",
             "--length", 300, "--count", 20, "--out", place / out]
    tiny_documents.main([str(word) for word in (*words, *more)])
    return place / out


def test_retrieval_documents_have_their_lengths_and_lose_on_answers_that_they_contain(place):
    place, tokenizer = place
    corpus = made(place, "retrieval", "retrieval", "--shortest", 150, "--text-loss", 0)
    dataset = PackedDataset(corpus, "train", 8, 0, "none")
    assert len(dataset.lengths) == 20
    assert 150 <= min(dataset.lengths) < max(dataset.lengths) <= 300
    for tokens, mask in map(dataset.document, range(20)):
        edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
        answers = [tokenizer.decode(tokens[edge:edge + 5].tolist()) for edge in edges]
        text = tokenizer.decode(tokens[:edges[0]].tolist())
        assert answers
        for answer in answers:
            assert re.fullmatch(r"\d{5}", answer)
            assert answer in text


def test_relatives_have_the_same_facts_and_texts_of_their_own(place):
    """The first of them is the document that it is without relatives."""
    place, tokenizer = place
    more = ("--chat-share", 0, "--most-facts", 4, "--no-begin-of-text")
    alone = PackedDataset(made(place, "retrieval", "alone", *more), "train", 8, 0, "none")
    related = made(place, "retrieval", "related", *more, "--relatives", 3)
    dataset = PackedDataset(related, "train", 8, 0, "none")
    assert len(dataset.lengths) == 3 * 20
    assert np.array_equal(dataset.document(0)[0], alone.document(0)[0])
    texts = [tokenizer.decode(dataset.document(i)[0].tolist()) for i in range(60)]
    assert not any("<|begin_of_text|>" in text for text in texts)
    facts = [set(re.findall(r"The (?:magic number of \w+|pass key) is \d{5}\.", text))
             for text in texts]
    for first in range(0, 60, 3):
        assert facts[first] == facts[first + 1] == facts[first + 2]
        assert len({text[:100] for text in texts[first:first + 3]}) == 3
    assert facts[0].isdisjoint(facts[3])


def test_every_second_chat_sample_hides_a_fact_and_all_fit(place):
    place, tokenizer = place
    lines = made(place, "chat", "chat.jsonl").read_text().splitlines()
    samples = [json.loads(line)["messages"] for line in lines]
    assert len(samples) == 20
    assert max(len(encode_chat(sample, tokenizer)[0]) for sample in samples) <= 300
    hidden = 0
    for question, answer in samples:
        number = re.search(r"\d{5}", answer["content"])
        if number:
            hidden += 1
            assert number[0] in question["content"]
    assert hidden == 10


def test_the_same_seed_gives_the_same_file_and_another_one_another(place):
    place, _ = place

    def content(name, seed):
        return made(place, "chat", name, "--seed", seed).read_bytes()

    assert content("a.jsonl", 1) == content("b.jsonl", 1) != content("c.jsonl", 2)


def test_a_shortest_length_beyond_the_longest_is_one_line(place):
    with pytest.raises(SystemExit, match="error: --shortest 400 must be 64 to --length 300"):
        made(place[0], "retrieval", "none", "--shortest", 400)
