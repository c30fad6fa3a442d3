"""tools.plan: memory as counted in real steps, FLOPs as the formula has them, hints that fit."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from steps import MEMORY_MODES, batch, build

from model import ModelConfig, read_config
from parallel import Grid, ShardedAdamW
from tools import plan
from tools.plan import DEVICES, Plan, cheapest, grids
from train import attention_kernel, forward_flops, training_step

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_the_plan_counts_every_parameter(family):
    """Of models without biases, which it leaves out: they are few."""
    model = build(model_type=family, attention_bias=False)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert Plan(model.config, 64, 1, 1, tp=1, cp=1, dp=1).parameters == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute, offload", MEMORY_MODES)
def test_the_plan_predicts_the_memory_that_is_alive(dtype, recompute, offload):
    """Every tensor of a step is counted: the highest sum alive is the plan's, within 2.5 %."""
    models = [
        ({"vocab_size": 16384, "num_hidden_layers": 1}, 256),
        ({}, 1024),
        ({"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6}, 512),
        ({"num_hidden_layers": 4, "model_type": "qwen3"}, 512),
    ]
    if recompute == "none":
        models = [(changes, length // 2) for changes, length in models]
    for changes, length in models:
        rows = batch(1, length)
        with Allocations() as seen:
            model = build(dtype, recompute, offload, 128, tie_word_embeddings=True, **changes)
            optimizer = ShardedAdamW(model, Grid())
            seen.peak = 0
            training_step(model, optimizer, rows, 1)
        expected = Plan(model.config, length, batch=1, micro_batch=1, tp=1, cp=1, dp=1,
                        itemsize=dtype.itemsize, recompute=recompute, offload=offload, tile=128,
                        cuda=False)
        memory = expected.memory()
        # no scratch of the CPU's kernel is counted, nor seen here
        predicted = sum(memory.values()) + expected.on_host()
        assert seen.peak == pytest.approx(predicted, rel=0.025), memory


def planned(capsys, *words: str) -> str:
    plan.main(list(words))
    return capsys.readouterr().out


def test_plan_of_the_8b_model(capsys):
    """Hand-computed: 8.03B parameters / 8 in bfloat16 and float32, block inputs of 131,072 x 4,096
    x 2 bytes."""
    out = planned(capsys, "H100-80", "--config", str(ROOT / "runs/llama31_8b.json"),
                  "--sequence-length", str(2**20), "--tp", "8", "--recompute", "block")
    assert "8.03B parameters" in out
    assert out.count("cudnn") == 1  # the kernel, and why it: said once
    assert ("note: --sequence-length 1048576 is beyond the model's window of 131072; extend it "
            "(train.py --rope-kind yarn --rope-factor 128") in out
    assert "fits" in out
    assert "DOES NOT" not in out
    table = out.split("GiB\n")[1].split("  total")[0]
    number = {line[:36].strip(): float(line[36:]) for line in table.splitlines()}
    assert number["weights"] == pytest.approx(8.03e9 / 8 * 2 / 2**30, rel=0.01)
    assert number["gradients (float32)"] == pytest.approx(8.03e9 / 8 * 4 / 2**30, rel=0.01)
    assert number["kept by 32 blocks"] == 32.0
    assert "q (1, 4, 1048576, 128), k and v with 1 heads" in out


def test_plan_names_options_that_fit(capsys):
    words = ["H100-80", "--config", str(ROOT / "runs/llama31_8b.json"),
             "--sequence-length", str(2**20), "--tp", "8"]
    with pytest.raises(SystemExit) as ended:
        planned(capsys, *words)
    hint = str(ended.value)
    assert "do not fit in 76.0" in hint
    assert "--processes 8 --tp 8 --cp 1" in hint
    extra = hint.split("--micro-batch-size 1 ")[1].split()
    assert "fits" in planned(capsys, *words, *extra)


@pytest.mark.parametrize("kernel, largest", [
    ("flash", 16),
    ("cudnn", 4),  # chunks of 1024 / 8 = 128 positions
])
def test_only_grids_that_run_are_looked_at(kernel, largest):
    config = read_config(ROOT / "runs/llama32_1b.json")
    asked = Plan(config, 1024, 16, 1, 1, 1, 1, kernel=kernel)
    capability = (9, 0) if kernel == "cudnn" else (8, 0)

    def kernel_on(grid: Grid) -> str:
        chunk = grid.chunk(1024)
        return attention_kernel(kernel, capability, torch.bfloat16, config.head_dim, chunk)[0]

    assert max(grid.cp for grid in grids(asked, 16, kernel_on)) == largest


@pytest.mark.parametrize("cp", [4, 32])
def test_the_fastest_takes_the_kernel_of_its_own_grid(capsys, cp):
    """Chunks of 1,044,480 tokens are whole for cuDNN on cp 4, not on cp 32: either command finds
    the same."""
    words = ["H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--sequence-length",
             "1044480", "--batch-size", "8", "--recompute", "mlp", "--tp", "8", "--processes",
             "256"]
    out = planned(capsys, *words, "--cp", str(cp))
    title, fastest = out.split("the fastest of 256 x H100-80: ")
    assert ("attention by cudnn" in title) == (cp == 4)
    assert ("attention by cudnn" in fastest) == (cp == 32)  # said where it is another one
    assert "--tp 4 --cp 8 --micro-batch-size 1 --recompute mlp, 516 tokens/s" in fastest


def test_documents_that_are_masked_take_flash(capsys):
    out = planned(capsys, "H100-80", "--config", str(ROOT / "runs/llama32_1b.json"),
                  "--sequence-length", "8192", "--cross-document-mask")
    assert "attention by flash (not cudnn: samples, prompts, documents have any length)" in out


def test_a_step_beyond_the_timeout_is_told(capsys):
    """2M tokens on eight GPUs take minutes more than train.py's patience by default: two
    micro-batches of 984 s."""
    words = ["H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--sequence-length",
             str(2**21), "--batch-size", "2", "--micro-batch-size", "1", "--tp", "8",
             "--recompute", "mlp", "--offload"]
    assert "note: a micro-batch takes 984 s, longer than --timeout 600" in planned(capsys, *words)
    assert "a micro-batch takes" not in planned(capsys, *words, "--timeout", "7200")


def test_the_fastest_says_what_it_takes_of_the_host(capsys):
    out = planned(capsys, "H100-80", "--config", str(ROOT / "runs/llama31_8b.json"),
                  "--sequence-length", str(2**20), "--tp", "8", "--recompute", "mlp", "--offload")
    assert "--tp 2 --cp 4" in out
    assert "tokens/s a GPU in 50.9 GiB and 64.5 on the host\n" in out


def test_a_tile_that_is_too_large_is_not_what_rents_more(capsys):
    with pytest.raises(SystemExit) as ended:
        planned(capsys, "H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--tile",
                "1000000000", "--sequence-length", str(2**20), "--tp", "8", "--recompute", "mlp",
                "--offload")
    assert "these options do: --processes 8 --tp 8" in str(ended.value)
    assert str(ended.value).endswith("without --tile")


def test_stage_2_has_its_own_defaults(capsys):
    """128 samples of at most 8,192 tokens; stage 1 has none for the length."""
    words = ["H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--tp", "8"]
    out = planned(capsys, *words, "--stage", "2")
    assert "128 x 8,192 tokens a step" in out
    assert "q (1, 4, 8192, 128)" in out
    assert "attention by flash" in out
    assert "note: planned as if every sample or document had the full length" in out
    with pytest.raises(SystemExit, match="are required: --sequence-length"):
        planned(capsys, *words)


def test_cheapest_is_none_when_nothing_fits():
    config = ModelConfig.from_hf(json.loads((ROOT / "runs/llama31_8b.json").read_text()))
    tiny = replace(DEVICES["H100-80"], memory=2**20)
    assert cheapest(Plan(config, 2**20, 1, 1, 8, 1, 1), tiny, lambda grid: "flash") is None


def test_plan_counts_the_papers_flops():
    """6 N a token for N = 8.03B - 0.53B (the embedding is no product), and 6 S hidden layers for
    causal attention."""
    config = ModelConfig.from_hf(json.loads((ROOT / "runs/llama31_8b.json").read_text()))
    products, attention = forward_flops(config, 2**20)
    assert 3 * products / 2**20 == pytest.approx(6 * (8.03e9 - 0.525e9), rel=1e-3)
    assert 3 * attention / 2**20 == 6 * 2**20 * 4096 * 32


def test_plan_measured_here(capsys):
    """Ranks share the memory of this machine."""
    words = ["measured", "--config", str(ROOT / "runs/tiny.json"), "--sequence-length", "128",
             "--device", "cpu", "--batch-size", "2"]
    there = {}
    for processes in ("1", "2"):
        out = planned(capsys, *words, "--processes", processes)
        assert "tokens/s a GPU" in out
        there[processes] = float(re.search(r"total +[\d.]+ of ([\d.]+): fits", out)[1])
    assert there["2"] == pytest.approx(there["1"] / 2, abs=0.1)
