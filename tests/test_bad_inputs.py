"""Every mistake a user is likely to make gets one line that names it, a non-zero exit, and no file.

    PYTHONPATH=. python tests/test_bad_inputs.py        # prints the table of the README
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_niah
import rope_yarn
import sft
import train
from model import Llama, ModelConfig
from tools import answer, chat, perplexity, plan, plot, prepare, train_tokenizer

SCRIPTS = {
    "rope_yarn.py": rope_yarn.main, "train.py": train.main, "sft.py": sft.main, "eval_niah.py": eval_niah.main,
    **{f"tools.{tool.__name__.split('.')[1]}": tool.main for tool in (answer, chat, perplexity, plan, plot, prepare, train_tokenizer)}}

# what is wrong, the script, its arguments (names of files are those of `prepared`), what the line must say
TRAIN = "--data corpus --sequence-length 64 --steps 1 --out new"
NIAH = "good --haystack corpus --lengths 64 --depths 1 --samples 1"
CHAT = "--sequence-length 64 --steps 1 --batch-size 1 --out new"
CASES = [
    ("no such model directory", "train.py", f"--model missing {TRAIN}", "missing.*config.json"),
    ("config.json is not JSON", "train.py", f"--model not-json {TRAIN}", "config.json.*not valid JSON"),
    ("config.json lacks a key", "train.py", f"--config no-layers.json --tokenizer tokenizer {TRAIN}", "num_hidden_layers"),
    ("another architecture", "train.py", f"--config gemma.json --tokenizer tokenizer {TRAIN}", "model_type 'gemma'"),
    ("true or false is a string", "train.py", f"--config tied.json --tokenizer tokenizer {TRAIN}", "tie_word_embeddings must be true or"),
    ("unknown rope scaling", "train.py", f"--config spiral.json --tokenizer tokenizer {TRAIN}", "spiral.*known are"),
    ("contradictory rope scaling", "train.py", f"--config contradictory.json --tokenizer tokenizer {TRAIN}", "contradict"),
    ("heads do not divide", "train.py", f"--config heads.json --tokenizer tokenizer {TRAIN}", "num_key_value_heads 3"),
    ("truncated safetensors", "train.py", f"--model truncated {TRAIN}", "not a complete safetensors file"),
    ("missing shard", "train.py", f"--model shardless {TRAIN}", "safetensors.*missing"),
    ("quantised weights", "train.py", f"--model quantised {TRAIN}", "holds torch.int8"),
    ("weights of another shape", "train.py", f"--model reshaped {TRAIN}", "has shape.*config.json asks for"),
    ("no weights", "train.py", f"--model weightless {TRAIN}", "neither model.safetensors nor"),
    ("no tokenizer", "train.py", f"--config good/config.json {TRAIN}", "--tokenizer is needed"),
    ("tokenizer file is something else", "train.py", f"--model good --tokenizer text.txt {TRAIN}", "text.txt.*tokenizer.model"),
    ("tokenizer larger than the vocabulary", "train.py", f"--config small.json --tokenizer tokenizer {TRAIN}", "vocab_size is 300"),
    ("corpus of another tokenizer", "train.py", f"--model good --tokenizer other {TRAIN}", "another tokenizer"),
    ("no such corpus", "train.py", "--model good --data nowhere --sequence-length 64 --steps 1 --out new", "nowhere: no such"),
    ("corpus that was not prepared", "train.py", "--model good --data text.txt --sequence-length 64 --steps 1 --out new", "tools.prepare"),
    ("corpus shard cut off", "train.py", "--model good --data cut --sequence-length 64 --steps 1 --out new", "train-00000.tokens"),
    ("sequence beyond the window", "train.py", "--model good --data corpus --sequence-length 65 --steps 1 --out new",
     "65 is beyond the model's window of 64"),
    ("micro-batch does not divide", "train.py", f"--model good --batch-size 6 --micro-batch-size 4 {TRAIN}", "4 does not divide"),
    ("more ranks than processes", "train.py", f"--model good --tp 2 {TRAIN}", "--tp 2 x --cp 1 = 2 does not divide .*, 1"),
    ("no ranks", "train.py", f"--model good --cp 0 {TRAIN}", "--cp 0 is too small"),
    ("no steps", "train.py", "--model good --data corpus --sequence-length 64 --steps 0 --out new", "--steps 0"),
    ("final learning rate above the peak", "train.py", f"--model good --final-learning-rate 2 {TRAIN}", "must be at most 1"),
    ("more buckets than positions", "train.py", f"--model good --validation-buckets 65 {TRAIN}", "65 is more than --sequence-length 64"),
    ("a beta of 1", "train.py", f"--model good --betas 0.9 1 {TRAIN}", "--betas 0.9 1.0 must lie in"),
    ("learning rate is not a number", "train.py", f"--model good --learning-rate nan {TRAIN}", "--learning-rate nan"),
    ("factor below 1", "train.py", f"--model good --rope-kind yarn --rope-factor 0.5 {TRAIN}", "factor is 0.5; it must be"),
    ("factor without a kind", "train.py", f"--model good --rope-factor 4 {TRAIN}", "factor is given without a kind"),
    ("kind without a factor", "train.py", f"--model good --rope-kind yarn {TRAIN}", "--rope-kind yarn needs --rope-factor"),
    ("larger validation than what is held out", "train.py", f"--model good {TRAIN} --validation-sequences 999", "--validation-sequences 999"),
    ("no such device", "train.py", f"--model good --device tpu {TRAIN}", "--device tpu"),
    ("output directory in use", "train.py", "--model good --data corpus --sequence-length 64 --steps 1 --out good", "earlier run"),
    ("output is a file", "train.py", "--model good --data corpus --sequence-length 64 --steps 1 --out text.txt", "text.txt: is a file"),
    ("no data", "train.py", "--model good --sequence-length 64 --steps 1 --out new", "--data is needed"),
    ("offload of what is not recomputed", "train.py", f"--model good --offload {TRAIN}", "--offload moves what"),
    ("plan that does not fit", "tools.plan", "H100-80 --config 8b.json --sequence-length 1048576 --tp 8", "do not fit in 76.0 .*; the smallest"),
    ("plan with a type the kernel does not take", "tools.plan", "H100-80 --config 8b.json --dtype float32 --sequence-length 64", "--dtype float32"),
    ("plan measured on a device that is not there", "tools.plan", "measured --model good --device tpu --sequence-length 64", "--device tpu"),
    ("plan for no processes", "tools.plan", "H100-80 --model good --sequence-length 64 --processes 0", "--processes 0"),
    ("chat file: broken JSON line", "sft.py", f"--model good --data broken.jsonl {CHAT}", "broken.jsonl.*2"),
    ("chat file: unknown role", "sft.py", f"--model good --data role.jsonl {CHAT}", "robot"),
    ("chat file: no sample is short enough", "sft.py", f"--model good --data chat.jsonl {CHAT} --sequence-length 3", "none of 1 samples"),
    ("chat file: empty", "sft.py", f"--model good --data empty.jsonl {CHAT}", "empty.jsonl"),
    ("chat file: missing", "sft.py", f"--model good --data absent.jsonl {CHAT}", "absent.jsonl: no such"),
    ("validation without held-out chat", "sft.py", f"--model good --data chat.jsonl --validate-every 1 {CHAT}", "needs --validation-data"),
    ("chat file is no JSON lines", "sft.py", f"--model good --data text.txt {CHAT}", "needs a .jsonl"),
    ("held-out chat file: missing", "sft.py", f"--model good --data chat.jsonl --validation-data absent.jsonl {CHAT}", "--validation-data absent"),
    ("zero documents", "tools.prepare", "--source a=hollow --tokenizer tokenizer --out new", "no training documents"),
    ("source without a name", "tools.prepare", "--source text.txt --tokenizer tokenizer --out new", "NAME=PATH"),
    ("corpus directory exists", "tools.prepare", "--source a=text.txt --tokenizer tokenizer --out corpus", "already exists"),
    ("vocabulary below 256", "tools.train_tokenizer", "--source text.txt --vocab-size 99 --out new", "99"),
    ("tokenizer already there", "tools.train_tokenizer", "--source text.txt --vocab-size 260 --out tokenizer", "already exists"),
    ("JSON line that is no document", "tools.prepare", "--source a=shape.jsonl --tokenizer tokenizer --out new", "shape.jsonl"),
    ("no processes", "tools.prepare", "--source a=text.txt --tokenizer tokenizer --processes 0 --out new", "--processes: 0 must be"),
    ("share of all documents", "tools.prepare", "--source a=text.txt --tokenizer tokenizer --holdout 1.5 --out new", "--holdout: 1.5 must be"),
    ("negative weight", "train.py", f"--model good {TRAIN} --long-weight -1", "finite weights"),
    ("corpus of an earlier format", "train.py", "--model good --data old --sequence-length 64 --steps 1 --out new", "prepare it again"),
    ("directory of text as haystack", "eval_niah.py", "good --haystack hollow --lengths 64", "hollow: neither a corpus nor"),
    ("masked documents on a ring", "tools.plan", "H100-80 --model good --sequence-length 64 --pack --cp 2", "sft.py --pack"),
    ("plan of a command that cannot run", "tools.plan", "H100-80 --model good --sequence-length 64 --steps -3", "--steps -3 is too small"),
    ("prompts that are not there", "tools.answer", "good --jsonl nowhere.jsonl", "--jsonl: nowhere.jsonl must be a file that exists"),
    ("prompts without answers", "tools.answer", "good --jsonl shape.jsonl", "shape.jsonl, line 1: needs a JSON object with prompt"),
    ("documents shorter than the length", "tools.perplexity", "good --haystack text.txt --lengths 9999 --samples 1",
     "0 documents have more than 9999 tokens"),
    ("no haystack", "eval_niah.py", "good --haystack nowhere --lengths 64", "nowhere"),
    ("haystack shorter than the length", "eval_niah.py", "good --haystack text.txt --lengths 100000", "100000"),
    ("length below the question", "eval_niah.py", "good --haystack corpus --lengths 20", "20 is too small"),
    ("more ranks than processes", "eval_niah.py", f"{NIAH} --cp 2", "--tp 1 x --cp 2 = 2 does not divide .*, 1"),
    ("no samples", "eval_niah.py", f"{NIAH} --samples 0", "--samples 0"),
    ("results cannot be written", "eval_niah.py", f"{NIAH} --out nowhere/x.json", "--out nowhere/x.json"),
    ("compared file is missing", "tools.plot", "compare nowhere.json", "nowhere.json must be a file or directory that exists"),
    ("compared file is no result", "tools.plot", "compare shape.jsonl", "shape.jsonl"),
    ("beta_fast below beta_slow", "rope_yarn.py", "--beta-fast 1 --beta-slow 4", "beta_fast is 1.0; it must be"),
    ("odd head dimension", "rope_yarn.py", "--head-dim 63", "63"),
    ("prompt and answer beyond the window", "tools.chat", "good --prompt hello --max-new-tokens 64", "window of 64"),
    ("more ranks than processes", "tools.chat", "good --prompt hello --max-new-tokens 8 --tp 2", "--tp 2 x --cp 1 must be the number"),
    ("top-p out of range", "tools.chat", "good --prompt hello --top-p 1.5", "--top-p: 1.5 must be a number above 0"),
]


def make_files(place: Path) -> None:
    """The files the cases name: a good model and corpus, and one broken variant for each mistake."""
    text = "def add(first, second):\n    return first + second\n\nclass Counter:\n    total = 0\n" * 8
    (place / "text.txt").write_text(text)
    (place / "hollow").mkdir()
    shutil.copy(Path(__file__).parent.parent / "runs" / "llama31_8b.json", place / "8b.json")
    tokenizer = train_tokenizer.train_bpe([text], 270, place / "tokenizer")
    train_tokenizer.train_bpe([text], 269, place / "other")
    lines = [json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(40)]
    (place / "documents.jsonl").write_text("".join(lines))
    prepare.prepare_corpus([("code", place / "documents.jsonl")], tokenizer, place / "corpus", holdout_window=0)
    config = {"model_type": "llama", "vocab_size": tokenizer.n_vocab, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    Llama(ModelConfig.from_hf(config)).initialise(0).save_pretrained(place / "good")
    shutil.copy(place / "tokenizer" / "tokenizer.model", place / "good")
    for name in ("not-json", "truncated", "shardless", "reshaped", "weightless", "quantised"):
        shutil.copytree(place / "good", place / name)
    shard = "model-00001.safetensors"
    (place / "not-json" / "config.json").write_text("{oops")
    (place / "truncated" / shard).write_bytes((place / "good" / shard).read_bytes()[:-100])
    (place / "shardless" / shard).unlink()
    written = json.loads((place / "good" / "config.json").read_text())
    (place / "reshaped" / "config.json").write_text(json.dumps(written | {"intermediate_size": 25}))
    weights = {name: tensor.to(torch.int8) for name, tensor in load_file(place / "good" / shard).items()}
    save_file(weights, place / "quantised" / shard)
    (place / "weightless" / "model.safetensors.index.json").unlink()
    (place / "old").mkdir()
    (place / "old" / "meta.json").write_text('{"format": 1}')
    shutil.copytree(place / "corpus", place / "cut")
    (place / "cut" / "train-00000.tokens").write_bytes((place / "corpus" / "train-00000.tokens").read_bytes()[:-4])
    contradictory = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    for name, change in {"no-layers": {"num_hidden_layers": None}, "gemma": {"model_type": "gemma"}, "small": {"vocab_size": 300},
                         "spiral": {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "contradictory": contradictory,
                         "heads": {"num_key_value_heads": 3}, "tied": {"tie_word_embeddings": "false"}}.items():
        (place / f"{name}.json").write_text(json.dumps(config | change))
    good = json.dumps({"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}) + "\n"
    (place / "chat.jsonl").write_text(good)
    (place / "broken.jsonl").write_text(good + "{oops\n")
    (place / "role.jsonl").write_text(good.replace("user", "robot"))
    (place / "empty.jsonl").write_text("")
    (place / "shape.jsonl").write_text('{"title": "neither text nor messages"}\n')


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    make_files(place)
    return place


@pytest.mark.parametrize("what, script, arguments, said", CASES, ids=[case[0] for case in CASES])
def test_one_clear_line_and_no_file(what, script, arguments, said, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    before = sorted(map(str, prepared.rglob("*")))
    with pytest.raises(SystemExit, match=said) as stopped:
        SCRIPTS[script](arguments.split())
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)  # a string: exit code 1
    assert sorted(map(str, prepared.rglob("*"))) == before


if __name__ == "__main__":
    import contextlib
    import io
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            make_files(Path(folder))
        os.chdir(folder)
        print("| what is wrong | the line it gets |\n|---|---|")
        for what, script, arguments, _ in CASES:
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # progress
                    SCRIPTS[script](arguments.split())
            except SystemExit as stopped:
                print(f"| `{script}`: {what} | `{str(stopped).removeprefix('error: ').replace(folder + '/', '')}` |")
