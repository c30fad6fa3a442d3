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


def test_pieces_are_the_document_cut_between_facts(place):
    place, tokenizer = place
    more = ("--chat-share", 0, "--most-facts", 9, "--length", 600)
    whole = PackedDataset(made(place, "retrieval", "whole", *more), "train", 8, 0, "none")
    place_of_cut = made(place, "retrieval", "cut", *more, "--pieces", 3)
    cut = PackedDataset(place_of_cut, "train", 8, 0, "none")
    tokens, mask = whole.document(0)
    ends = np.cumsum(cut.lengths)
    count = int(np.searchsorted(ends, len(tokens))) + 1  # pieces of the first document
    assert ends[count - 1] == len(tokens)
    assert 1 < count <= 3
    pieces = [cut.document(i) for i in range(count)]
    assert np.array_equal(np.concatenate([piece for piece, _ in pieces]), tokens)
    assert np.array_equal(np.concatenate([loss for _, loss in pieces]), mask)
    texts = [tokenizer.decode(piece.tolist()) for piece, _ in pieces]
    facts = re.findall(r"The (?:magic number of \w+|pass key) is \d{5}\.", "".join(texts))
    assert sum(text.count(fact) for text in texts for fact in set(facts)) == len(facts)
    assert not any("What is" in text for text in texts[:-1])
    assert len(cut.lengths) > 20


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
