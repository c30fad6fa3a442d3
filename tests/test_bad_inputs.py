"""Every mistake a user is likely to make gets one line that names it, a non-zero exit, and no
file."""
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
    "rope_yarn.py": rope_yarn.main,
    "train.py": train.main,
    "sft.py": sft.main,
    "eval_niah.py": eval_niah.main,
    "tools.answer": answer.main,
    "tools.chat": chat.main,
    "tools.perplexity": perplexity.main,
    "tools.plan": plan.main,
    "tools.plot": plot.main,
    "tools.prepare": prepare.main,
    "tools.train_tokenizer": train_tokenizer.main,
}

# a machine with a GPU finds the same mistakes
ON_CPU = dict.fromkeys(
    ("train.py", "sft.py", "eval_niah.py", "tools.answer", "tools.perplexity", "tools.chat"),
    ["--device", "cpu"])

# what is wrong, the script, its arguments (names of files are those of `prepared`), what the line
# must say
TRAIN = "--data corpus --sequence-length 64 --steps 1 --out new"
NIAH = "good --haystack corpus --lengths 64 --depths 1 --samples 1"
CHAT = "--sequence-length 64 --steps 1 --batch-size 1 --out new"
CASES = [
    ("no such model directory", "train.py",
     f"--model missing {TRAIN}", "missing: no config.json there"),
    ("a file as model", "train.py",
     f"--model good/config.json {TRAIN}", "--model good/config.json must be a directory"),
    ("a file as model to evaluate", "eval_niah.py",
     "good/config.json --haystack corpus --lengths 64", "good/config.json must be a directory"),
    ("names of other tensors", "train.py",
     f"--model prefixed {TRAIN}",
     "tensor model.embed_tokens.weight is missing, base.*weight is unexpected .12 missing, 12 un"),
    ("config.json is not JSON", "train.py",
     f"--model not-json {TRAIN}", "config.json.*not valid JSON"),
    ("config.json lacks a key", "train.py",
     f"--config no-layers.json --tokenizer tokenizer {TRAIN}", "num_hidden_layers"),
    ("another architecture", "train.py",
     f"--config gemma.json --tokenizer tokenizer {TRAIN}", "model_type 'gemma'"),
    ("unknown rope scaling", "train.py",
     f"--config spiral.json --tokenizer tokenizer {TRAIN}", "spiral.*known are"),
    ("truncated safetensors", "train.py",
     f"--model truncated {TRAIN}", "not a complete safetensors file"),
    ("missing shard", "train.py",
     f"--model shardless {TRAIN}", "safetensors.*missing"),
    ("quantised weights", "train.py",
     f"--model quantised {TRAIN}", "is stored as I8, not as one of.*before quantisation"),
    ("weights of another shape", "train.py",
     f"--model reshaped {TRAIN}", "has shape.*config.json asks for"),
    ("no tokenizer", "train.py",
     f"--config good/config.json {TRAIN}", "--tokenizer is needed"),
    ("corpus of another tokenizer", "train.py",
     f"--model good --tokenizer other {TRAIN}", "another tokenizer"),
    ("corpus that was not prepared", "train.py",
     "--model good --data text.txt --sequence-length 64 --steps 1 --out new", "tools.prepare"),
    ("corpus shard cut off", "train.py",
     "--model good --data cut --sequence-length 64 --steps 1 --out new", "train-00000.tokens"),
    ("sequence beyond the window", "train.py",
     "--model good --data corpus --sequence-length 65 --steps 1 --out new",
     "65 is beyond the model's window of 64"),
    ("a corpus that is never drawn", "train.py",
     "--model good --data corpus=0 --sequence-length 64 --steps 1 --out new",
     "--data 0 must be a finite number above 0"),
    ("no steps", "train.py",
     "--model good --data corpus --sequence-length 64 --steps 0 --out new",
     "--steps 0 must be a whole number, 1 or more"),
    ("learning rate is not a number", "train.py",
     f"--model good --learning-rate nan {TRAIN}", "--learning-rate nan must be a finite number"),
    ("kind without a factor", "train.py",
     f"--model good --rope-kind yarn {TRAIN}", "--rope-kind yarn needs --rope-factor"),
    ("larger validation than what is held out", "train.py",
     f"--model good {TRAIN} --validation-sequences 999", "--validation-sequences 999"),
    ("no such device", "train.py",
     f"--model good --device tpu {TRAIN}", "--device tpu must be cpu, or cuda"),
    ("output directory in use", "train.py",
     "--model good --data corpus --sequence-length 64 --steps 1 --out good",
     "holds files, but no run"),
    ("offload of what is not recomputed", "train.py",
     f"--model good --offload {TRAIN}", "--offload moves what"),
    ("plan that does not fit", "tools.plan",
     "H100-80 --config 8b.json --sequence-length 1048576 --tp 8",
     "do not fit in 76.0 .*; these options do: --processes 8"),
    ("chat file: broken JSON line", "sft.py",
     f"--model good --data broken.jsonl {CHAT}", "broken.jsonl.*2"),
    ("chat file: unknown role", "sft.py",
     f"--model good --data role.jsonl {CHAT}", "robot"),
    ("chat file: no sample is short enough", "sft.py",
     f"--model good --data chat.jsonl {CHAT} --sequence-length 3",
     "holds no sample of 3 tokens or fewer, 1 longer ones"),
    ("zero documents", "tools.prepare",
     "--source a=hollow --tokenizer tokenizer --out new", "holds no file to read"),
    ("corpus of an earlier format", "train.py",
     "--model good --data old --sequence-length 64 --steps 1 --out new", "prepare it again"),
    ("directory of text as haystack", "eval_niah.py",
     "good --haystack hollow --lengths 64", "hollow: neither a corpus nor"),
    ("haystack shorter than the length", "eval_niah.py",
     "good --haystack text.txt --lengths 100000", "100000"),
    ("length below the question", "eval_niah.py",
     "good --haystack corpus --lengths 20", "20 is too small"),
    ("results cannot be written", "eval_niah.py",
     f"{NIAH} --out nowhere/x.json", "--out nowhere/x.json must be a file in a directory"),
    ("beta_fast below beta_slow", "rope_yarn.py",
     "--beta-fast 1 --beta-slow 4", "beta_fast is 1.0; it must be"),
    ("prompt and answer beyond the window", "tools.chat",
     "good --prompt hello --max-new-tokens 64", "window of 64"),
    ("more ranks than processes", "train.py",
     f"--model good --tp 2 {TRAIN}", "--tp 2 x --cp 1 must divide the number of processes, 1"),
    ("checkpoint of an earlier format", "train.py",
     f"--model good {TRAIN.replace('new', 'run')} --resume --validation-sequences 0",
     "earlier version.*--model"),
    ("a beta of 1", "train.py",
     f"--model good --betas 0.9 1 {TRAIN}", "--betas 1 must be a number from 0 to below 1"),
    ("output is a file", "train.py",
     f"--model good {TRAIN.replace('new', 'text.txt')}", "--out text.txt must be a directory"),
    ("contradictory rope scaling", "train.py",
     f"--config contradictory.json --tokenizer tokenizer {TRAIN}", "contradict"),
    ("no weights", "train.py",
     f"--model weightless {TRAIN}", "neither model.safetensors nor"),
    ("plan with a type the kernel does not take", "tools.plan",
     "H100-80 --config 8b.json --dtype float32 --sequence-length 64", "--dtype float32"),
    ("plan of a window that the extension does not reach", "tools.plan",
     "H100-80 --config 8b.json --sequence-length 1048576 --rope-kind yarn --rope-factor 4 "
     "--original-length 8192", "beyond the model's window of 32768; extend it .*--rope-factor 128"),
    ("plan of stage 1, packed", "tools.plan",
     "H100-80 --config 8b.json --sequence-length 64 --pack", "--pack is sft.py's: add --stage 2"),
    ("plan of stage 2 with stage 1's mask", "tools.plan",
     "H100-80 --config 8b.json --sequence-length 64 --stage 2 --cross-document-mask",
     "sft.py's is --pack"),
    ("top-p out of range", "tools.chat",
     "good --prompt hello --top-p 1.5", "--top-p 1.5 must be a number above 0"),
]


def make_files(place: Path) -> None:
    """The files the cases name: a good model and corpus, and one broken variant for each
    mistake."""
    text = "def add(first, second):\n    return first + second\n\nclass Counter:\n    total = 0\n"
    text = text * 8
    (place / "text.txt").write_text(text)
    (place / "hollow").mkdir()
    shutil.copy(Path(__file__).parent.parent / "runs" / "llama31_8b.json", place / "8b.json")
    tokenizer = train_tokenizer.train_bpe([text], 270, place / "tokenizer")
    train_tokenizer.train_bpe([text], 269, place / "other")
    lines = [json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(40)]
    (place / "documents.jsonl").write_text("".join(lines))
    prepare.prepare_corpus([("code", place / "documents.jsonl")], tokenizer, place / "corpus",
                           holdout_window=0)

    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.n_vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    Llama(ModelConfig.from_hf(config)).initialise(0).save_pretrained(place / "good")
    shutil.copy(place / "tokenizer" / "tokenizer.model", place / "good")

    # models, each with one fault
    for name in ("not-json", "truncated", "shardless", "reshaped", "weightless", "quantised",
                 "prefixed"):
        shutil.copytree(place / "good", place / name)
    shard = "model-00001-of-00001.safetensors"
    (place / "not-json" / "config.json").write_text("{oops")
    (place / "truncated" / shard).write_bytes((place / "good" / shard).read_bytes()[:-100])
    (place / "shardless" / shard).unlink()
    written = json.loads((place / "good" / "config.json").read_text())
    (place / "reshaped" / "config.json").write_text(json.dumps(written | {"intermediate_size": 25}))
    weights = {}
    for name, tensor in load_file(place / "good" / shard).items():
        weights[name] = tensor.to(torch.int8)
    save_file(weights, place / "quantised" / shard)
    weights = load_file(place / "good" / shard)
    save_file({f"base.{name}": x for name, x in weights.items()}, place / "prefixed" / shard)
    (place / "prefixed" / "model.safetensors.index.json").unlink()
    (place / "prefixed" / shard).rename(place / "prefixed" / "model.safetensors")
    (place / "weightless" / "model.safetensors.index.json").unlink()

    # configurations
    changes = {
        "no-layers": {"num_hidden_layers": None},
        "gemma": {"model_type": "gemma"},
        "spiral": {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
        "contradictory": {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
                          "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    }
    for name, change in changes.items():
        (place / f"{name}.json").write_text(json.dumps(config | change))

    # a run and corpora
    checkpoint = place / "run" / "checkpoint-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training.json").write_text('{"step": 2, "updates": 2, "settings": {}}')
    (place / "old").mkdir()
    (place / "old" / "meta.json").write_text('{"format": 1}')
    shutil.copytree(place / "corpus", place / "cut")
    tokens = place / "cut" / "train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-4])

    # chat
    question = {"role": "user", "content": "1 + 1?"}
    answer = {"role": "assistant", "content": "2"}
    good = json.dumps({"messages": [question, answer]}) + "\n"
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
        SCRIPTS[script](arguments.split() + ON_CPU.get(script, []))
    assert str(stopped.value).startswith("error: ")  # a string: exit code 1
    assert "\n" not in str(stopped.value)
    assert sorted(map(str, prepared.rglob("*"))) == before


@pytest.mark.parametrize("program, data", [(train, "corpus"), (sft, "chat.jsonl")])
def test_a_type_that_no_kernel_takes_is_refused_before_data_is_read(program, data, prepared,
                                                                   monkeypatch):
    """To tokenise a large blend takes minutes: what the options alone say is said at once."""
    def refuse(asked, capability, dtype, head_dim, chunk):
        raise ValueError(f"no kernel for {dtype}")

    def read(*_):
        pytest.fail("data was read")

    monkeypatch.chdir(prepared)
    monkeypatch.setattr(train, "attention_kernel", refuse)
    monkeypatch.setattr(program, "stage1_datasets" if program is train else "stage2_datasets", read)
    words = f"--model good --data {data} --sequence-length 64 --steps 1 --batch-size 1 --out new"
    with pytest.raises(SystemExit, match="no kernel for torch.float32"):
        program.main([*words.split(), "--device", "cpu"])
