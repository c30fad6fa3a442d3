"""tools.perplexity: the mean loss of the tokens at each stretch of positions."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from texts import TEXT

import data
from model import Llama
from tools import perplexity, plot
from tools.answer import prompt_tokens
from tools.perplexity import load_long_documents
from tools.prepare import write_corpus


def test_perplexity_is_the_mean_loss_at_each_stretch(model_directory, tmp_path, capsys):
    """A bucket shifted by one, a mean over documents of other lengths, short documents joined to a
    long one."""
    pytest.importorskip("matplotlib")
    lines = [
        {"text": TEXT[0:900]},
        {"text": TEXT[50:110]},  # too short
        {"text": TEXT[300:1500]},
        {"text": TEXT[17:1017]},
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [str(model_directory), "--device", "cpu", "--haystack", str(tmp_path / "long.jsonl"),
               "--lengths", "301",
               "--samples", "2", "--buckets", "3", "--out", str(tmp_path / "p.json")]
    perplexity.main(command)
    results = json.loads((tmp_path / "p.json").read_text())
    shown = capsys.readouterr().out

    model = Llama.from_pretrained(model_directory)
    tokenizer = data.load_tokenizer(model_directory)
    rows = torch.tensor([prompt_tokens(tokenizer, lines[i]["text"])[:302] for i in (0, 2)])
    logits = model(rows[:, :-1])  # (2, 301, V)
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    losses = losses.view(2, 301)
    expected = [losses[:, a:b].mean().item() for a, b in ((0, 100), (100, 201), (201, 301))]
    assert results["edges"] == [0, 100, 201, 301]
    assert results["loss"] == pytest.approx(expected, rel=1e-4)
    assert results["documents"] == 2
    assert min(results["standard_error"]) > 0
    assert results["window"] == 256
    assert f"{np.exp(expected[1]):.4g}" in shown

    plot.main(["compare", str(tmp_path / "p.json"), str(tmp_path / "p.json"), "--labels", "A", "B",
               "--window", "100", "--figure", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 5000
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["positions", "A", "B"]
    assert rows[2].split() == ["old", "window", "ends"]
    assert len(rows) == 5
    message = "3 documents have more than 400 tokens .*--samples asks for 4"
    with pytest.raises(SystemExit, match=message):
        perplexity.main([*command, "--lengths", "400", "--samples", "4"])


def test_perplexity_of_a_corpus_reads_its_held_out_documents(model_directory, tmp_path):
    tokenizer = data.load_tokenizer(model_directory)
    documents = [("x", [i] * n, None) for i, n in enumerate((30, 90, 10, 80))]
    write_corpus({"train": documents[:1], "valid": documents}, tmp_path / "corpus", tokenizer,
                 shard_tokens=50)
    found = load_long_documents(tmp_path / "corpus", tokenizer, 80, 2)
    start = tokenizer.encode_single_token("<|begin_of_text|>")
    assert found.tolist() == [[start] + [1] * 80, [start] + [3] * 80]
