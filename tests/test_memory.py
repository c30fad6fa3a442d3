"""Tiles, recomputation, host memory: the same numbers in less memory, and a plan that says how much."""
import json
from pathlib import Path

import pytest
import torch
from allocations import Allocations, Operators

import train
from data import Batch
from model import RECOMPUTE, HostMemory, Llama, ModelConfig
from parallel import Grid, ShardedAdamW
from train import DEVICES, Plan, cheapest, training_step

ROOT = Path(__file__).parent.parent
SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "rope_theta": 10000.0, "attention_bias": True}


def build(dtype=torch.float64, recompute="none", host=False, tile_bytes=2**30, **changes):
    model = Llama(ModelConfig.from_hf(SHAPE | changes)).initialise(0).to(dtype)
    model.recompute, model.host, model.tile_bytes = recompute, HostMemory() if host else None, tile_bytes
    return model


def batch(rows: int, length: int, vocab_size: int = 512) -> Batch:
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].masked_fill(torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    return Batch(tokens[:, :-1], targets, torch.zeros_like(targets))


def options(rows: int = 1, device: str = "cpu"):
    return train.argparse.Namespace(micro_batch_size=rows, cross_document_mask=False, device=device)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute, host", [("none", False), ("mlp", False), ("mlp", True), ("block", False), ("block", True)])
def test_tiled_recomputed_offloaded_equal_plain(recompute, host, tied):
    """Tiles of 7 and fewer positions in 101, a scaled loss, two micro-batches through the same host buffers."""
    models = [build(tie_word_embeddings=tied), build(recompute=recompute, host=host, tile_bytes=7 * 2 * 8 * 1600, tie_word_embeddings=tied)]
    rows = batch(2, 101)
    losses = []
    for model in models:
        for scale in (0.37, 11.0):
            loss, _ = model.loss(rows.tokens, rows.targets)
            (loss * scale).backward()
        losses.append(loss.detach())
    assert losses[1] == pytest.approx(losses[0].item(), rel=1e-12)
    for (name, plain), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (other.grad - plain.grad).norm() <= 1e-10 * plain.grad.norm(), name


def test_an_unknown_mode_is_refused():
    """False was a mode once, and would silently recompute."""
    rows = batch(1, 16)
    with pytest.raises(ValueError, match="recompute is False"):
        build(recompute=False).loss(rows.tokens, rows.targets)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputation_with_the_cross_document_mask(recompute):
    models = [build(), build(recompute=recompute, tile_bytes=2**16)]
    rows, ids = batch(2, 40), (torch.arange(40) // 13).expand(2, 40)
    for model in models:
        model.loss(rows.tokens, rows.targets, ids)[0].backward()
    for plain, other in zip(*(model.parameters() for model in models), strict=True):
        assert (other.grad - plain.grad).norm() <= 1e-10 * plain.grad.norm()


@pytest.mark.parametrize("recompute, times", [("none", 3), ("mlp", 3), ("block", 6)])
def test_mlp_mode_runs_attention_forward_once_and_block_mode_twice(recompute, times):
    rows = batch(1, 16)
    with Operators() as seen:
        build(recompute=recompute).loss(rows.tokens, rows.targets)[0].backward()
    assert seen.count["_scaled_dot_product_flash_attention_for_cpu"] == times  # of three layers


def test_a_step_allocates_nothing_of_the_forbidden_sizes():
    """S x V is 4,096 x 512, S x S is 4,096 x 4,096, S x intermediate 4,096 x 640: none may exist, and little above S x hidden."""
    model = build(torch.bfloat16, "block", tile_bytes=2**16, intermediate_size=640)
    optimizer, rows = ShardedAdamW(model, Grid()), batch(1, 4096)
    with Allocations() as seen:
        training_step(model, optimizer, rows, options())
    assert seen.elements <= 4096 * 64, seen.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute, host", [("none", False), ("mlp", False), ("mlp", True), ("block", False), ("block", True)])
def test_the_plan_predicts_the_memory_that_is_alive(dtype, recompute, host):
    """Every tensor of a step is counted: the highest sum alive is the plan's, within 5 % (10 % without recomputation)."""
    for changes, length in (({"vocab_size": 16384, "num_hidden_layers": 1}, 512), ({}, 2048), ({"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6}, 1024)):
        length = length if recompute != "none" else length // 2
        rows = batch(1, length)
        with Allocations() as seen:
            model = build(dtype, recompute, host, 2**17, tie_word_embeddings=True, **changes)
            optimizer = ShardedAdamW(model, Grid())
            seen.peak = 0
            training_step(model, optimizer, rows, options())
        plan = Plan(model.config, length, 1, 1, 1, 1, 1, dtype.itemsize, recompute, host, False, 2**17, cuda=False)
        memory = plan.memory()
        predicted = sum(memory.values()) + plan.on_host()  # no scratch of the CPU's kernel is counted, nor seen here
        assert seen.peak == pytest.approx(predicted, rel=0.1 if recompute == "none" else 0.05), (seen.peak, predicted, memory)


def test_a_second_forward_before_backward_is_refused():
    """Its tensors would have taken the first one's place: silently wrong gradients."""
    model, rows = build(recompute="mlp", host=True), batch(1, 16)
    first, _ = model.loss(rows.tokens, rows.targets)
    second, _ = model.loss(rows.tokens.flip(1), rows.targets)
    second.backward()
    with pytest.raises(RuntimeError, match="another forward pass"):
        first.backward()


def test_optimizer_state_on_the_host_is_the_same_update():
    """And its state is apart from float32 weights, which are their own master otherwise."""
    weights = []
    for on_host in (False, True):
        model = build(torch.float32)
        optimizer, rows = ShardedAdamW(model, Grid(), on_host=on_host), batch(1, 32)
        for _ in range(3):
            training_step(model, optimizer, rows, options())
            optimizer.step(1e-3, 1.0)
        weights.append(optimizer.weights.clone())
        assert (optimizer.master.data_ptr() == optimizer.weights.data_ptr()) != on_host
        assert torch.equal(torch.cat([x.flatten() for _, x in optimizer.state("master")]),
                           torch.cat([x.detach().flatten() for x in optimizer.parameters.values()]))
    assert torch.equal(*weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gpu_memory_and_gradients(recompute):
    """On a GPU: pinned buffers on their own stream give the gradients of resident ones, to the kernel's own noise."""
    models = [build(torch.bfloat16, recompute, host, 2**20).cuda() for host in (False, recompute != "none")]
    rows = Batch(*(x.cuda() for x in batch(1, 1024)))
    for model in models:
        for length in (1024, 640, 1024):  # buffers are used again, and made anew for another length
            model.loss(rows.tokens[:, :length], rows.targets[:, :length])[0].backward()
    for plain, other in zip(*(model.parameters() for model in models), strict=True):
        assert (other.grad - plain.grad).float().norm() <= 1e-2 * plain.grad.float().norm()


# ----------------------------------------------------------------------------------------------------- the planner


def dry_run(capsys, *words: str) -> str:
    train.main(train.stage1_parser(), None, ["--dry-run", *words])
    return capsys.readouterr().out


def test_dry_run_of_the_8b_model(capsys):
    """Hand-computed: 8.03B parameters / 8 in bfloat16 and float32, block inputs of 131,072 x 4,096 x 2 bytes."""
    out = dry_run(capsys, "H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--sequence-length", str(2**20), "--tp", "8",
                  "--recompute", "block")
    assert "8.03B parameters" in out and "fits" in out and "DOES NOT" not in out
    table = out.split("GiB\n")[1].split("  total")[0]
    number = {line[:36].strip(): float(line[36:]) for line in table.splitlines()}
    assert number["weights"] == pytest.approx(8.03e9 / 8 * 2 / 2**30, rel=0.01)
    assert number["gradients (float32)"] == pytest.approx(8.03e9 / 8 * 4 / 2**30, rel=0.01)
    assert number["kept by 32 blocks"] == 32.0
    assert "q (1, 4, 1048576, 128), k and v with 1 heads" in out


def test_dry_run_names_the_smallest_that_fits(capsys):
    words = ["H100-80", "--config", str(ROOT / "runs/llama31_8b.json"), "--sequence-length", str(2**20), "--tp", "8"]
    with pytest.raises(SystemExit) as ended:
        dry_run(capsys, *words)
    hint = str(ended.value)
    assert "do not fit in 76.0" in hint and "--processes 8 --tp 8 --cp 1" in hint
    extra = hint.split("--micro-batch-size 1 ")[1].split()
    assert "fits" in dry_run(capsys, *words, *extra)


def test_cheapest_is_none_when_nothing_fits():
    config = ModelConfig.from_hf(json.loads((ROOT / "runs/llama31_8b.json").read_text()))
    tiny = train.replace(DEVICES["H100-80"], memory=2**20)
    assert cheapest(Plan(config, 2**20, 1, 1, 8, 1, 1), tiny) is None


def test_plan_counts_the_papers_flops():
    """6 N a token for N = 8.03B - 0.53B (the embedding is no product), and 6 S hidden layers for causal attention."""
    config = ModelConfig.from_hf(json.loads((ROOT / "runs/llama31_8b.json").read_text()))
    products, attention = config.forward_flops(2**20)
    assert 3 * products / 2**20 == pytest.approx(6 * (8.03e9 - 0.525e9), rel=1e-3)
    assert 3 * attention / 2**20 == 6 * 2**20 * 4096 * 32


def test_dry_run_measured_here(capsys):
    out = dry_run(capsys, "measured", "--config", str(ROOT / "runs/tiny.json"), "--sequence-length", "128", "--device", "cpu")
    assert "fits" in out and "tokens/s a GPU" in out
