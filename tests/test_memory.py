"""Tiles, recomputation, host memory: the same numbers in less memory."""
import pytest
import torch
from allocations import Allocations, Operators
from steps import MEMORY_MODES, batch, build

import model as model_module
from model import RECOMPUTE
from parallel import Grid, ShardedAdamW
from train import training_step


@pytest.fixture(autouse=True)
def host_memory_apart(monkeypatch):
    """On a CPU torch's save_on_cpu keeps the very tensor. Here it keeps what a GPU's would: a copy
    that forgets strides."""
    def keep(x):
        return x.contiguous().clone()

    def give_back(x):
        return x.clone()

    def save(pin_memory):
        return torch.autograd.graph.saved_tensors_hooks(keep, give_back)

    monkeypatch.setattr(model_module, "save_on_cpu", save)


def assert_same_gradients(plain, other, limit):
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        difference = (b.grad - a.grad).double().norm()
        assert difference <= limit * a.grad.double().norm(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute, offload", MEMORY_MODES)
def test_tiled_recomputed_offloaded_equal_plain(recompute, offload, tied):
    """Tiles of 7 and fewer positions in 101, a scaled loss, two micro-batches."""
    plain = build(tie_word_embeddings=tied)
    lean = build(recompute=recompute, offload=offload, tile=14, tie_word_embeddings=tied)
    rows = batch(2, 101)
    losses = []
    for model in (plain, lean):
        for scale in (0.37, 11.0):
            loss, _ = model.loss(rows.tokens, rows.targets)
            (loss * scale).backward()
        losses.append(loss.detach())
    assert losses[1] == pytest.approx(losses[0].item(), rel=1e-12)
    assert_same_gradients(plain, lean, 1e-10)


def test_an_unknown_mode_is_refused():
    """False was a mode once, and would silently recompute."""
    rows = batch(1, 16)
    with pytest.raises(AssertionError, match="recompute is False"):
        build(recompute=False).loss(rows.tokens, rows.targets)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputation_with_the_cross_document_mask(recompute):
    plain = build()
    recomputed = build(recompute=recompute, tile=14)
    rows = batch(2, 40)
    ids = (torch.arange(40) // 13).expand(2, 40)
    for model in (plain, recomputed):
        model.loss(rows.tokens, rows.targets, ids)[0].backward()
    assert_same_gradients(plain, recomputed, 1e-10)


@pytest.mark.parametrize("recompute, times", [("none", 3), ("mlp", 3), ("block", 6)])
def test_mlp_mode_runs_attention_forward_once_and_block_mode_twice(recompute, times):
    rows = batch(1, 16)
    with Operators() as seen:
        build(recompute=recompute).loss(rows.tokens, rows.targets)[0].backward()
    assert seen.count["_scaled_dot_product_flash_attention_for_cpu"] == times  # of three layers


def test_a_step_allocates_nothing_of_the_forbidden_sizes():
    """S x V is 2,048 x 512, S x S is 2,048 x 2,048, S x intermediate 2,048 x 640: none may exist,
    and little above S x hidden."""
    model = build(torch.bfloat16, "block", tile=64, intermediate_size=640)
    optimizer = ShardedAdamW(model, Grid())
    rows = batch(1, 2048)
    with Allocations() as seen:
        training_step(model, optimizer, rows, 1)
    assert seen.elements <= 2048 * 64, seen.elements


def test_gradients_of_two_forwards_do_not_mix_on_the_host():
    """What the first one left there must still be there after the second."""
    rows = batch(1, 16)
    gradients = []
    for offload in (False, True):
        model = build(recompute="mlp", offload=offload)
        first, _ = model.loss(rows.tokens, rows.targets)
        second, _ = model.loss(rows.tokens.flip(1), rows.targets)
        (2 * second).backward()
        first.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, offloaded in zip(*gradients, strict=True):
        assert torch.equal(kept, offloaded)


def test_optimizer_state_on_the_host_is_the_same_update():
    """And its state is apart from float32 weights, which are their own master otherwise."""
    weights = []
    for on_host in (False, True):
        model = build(torch.float32)
        optimizer = ShardedAdamW(model, Grid(), on_host=on_host)
        rows = batch(1, 32)
        for _ in range(3):
            training_step(model, optimizer, rows, 1)
            optimizer.step(1e-3, 1.0)
        own = dict(model.named_parameters())
        for name, x in optimizer.state("master"):
            assert torch.equal(x, own[name])
            same_place = optimizer.masters[name].data_ptr() == own[name].data_ptr()
            assert same_place != on_host
        weights.append(own)
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gpu_memory_and_gradients(recompute):
    """On a GPU: what went through host memory gives the gradients of what stayed, to the kernel's
    own noise."""
    plain = build(torch.bfloat16, recompute, False, 256).cuda()
    offloaded = build(torch.bfloat16, recompute, recompute != "none", 256).cuda()
    rows = batch(1, 1024).to("cuda")
    for model in (plain, offloaded):
        for length in (1024, 640, 1024):
            model.loss(rows.tokens[:, :length], rows.targets[:, :length])[0].backward()
    assert_same_gradients(plain, offloaded, 1e-2)
