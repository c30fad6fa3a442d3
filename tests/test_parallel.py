"""The grid of one process, attention, and the flat optimizer."""
import pytest
import torch

from parallel import Grid, ShardedAdamW, ring_attention


def test_grid_of_one_process_and_refusal_of_more():
    assert Grid.create() == Grid(dp=1, cp=1, tp=1, rank=0)
    with pytest.raises(ValueError, match="tp 2"):
        Grid.create(tp=2)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_attention_equals_the_formula_with_grouped_heads(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 17, 16, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(3, kv_heads, 17, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = q @ k.repeat_interleave(8 // kv_heads, 1).transpose(2, 3) / 4
    scores = scores.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(8 // kv_heads, 1)
    torch.testing.assert_close(ring_attention(q, k, v, Grid()), expected)


def test_optimizer_equals_torch_adamw(tiny_model):
    """Five clipped steps in float64: the flat update gives torch's own AdamW, with decay on matrices only."""
    ours, theirs = tiny_model(torch.float64), tiny_model(torch.float64)
    flat = ShardedAdamW(ours, Grid(), weight_decay=0.1)
    groups = [{"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(5):
        tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(seed))
        flat.zero_gradients()
        reference.zero_grad()
        for model in (ours, theirs):
            loss, count = model.loss(tokens, tokens)
            (loss / count).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        for p in theirs.parameters():
            p.grad.mul_(0.5 / norm)  # torch's own clipping divides by the norm + 1e-6
        reference.step()
        assert flat.step(1e-2, 0.5) == pytest.approx(norm.item(), rel=1e-12)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_bfloat16_gradients_accumulate_in_float32_and_small_updates_survive(tiny_model):
    """256 + 1 is 256 in bfloat16: a gradient or master weight kept in bfloat16 would lose it."""
    model = tiny_model(torch.bfloat16)
    optimizer = ShardedAdamW(model, Grid(), weight_decay=0.0)
    weight = model.model.norm.weight
    for value in (256.0, 1.0):
        (weight * value).sum().backward()
    assert weight.grad.dtype == torch.float32 and (weight.grad == 257.0).all()
    before = optimizer.master.clone()
    optimizer.step(1e-6)
    moved = (optimizer.master - before).abs()
    assert 0 < moved.max() <= 1.1e-6  # far below bfloat16's spacing near 1


def test_state_restores_to_the_last_bit(tiny_model):
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))

    def step(model, optimizer):
        optimizer.zero_gradients()
        loss, count = model.loss(tokens, tokens)
        (loss / count).backward()
        optimizer.step(1e-2, 1.0)
        return loss.item()

    model = tiny_model(torch.bfloat16)
    optimizer = ShardedAdamW(model, Grid())
    step(model, optimizer)
    state = {kind: {name: tensor.clone() for name, tensor in optimizer.state(kind)} for kind in optimizer.KINDS}
    expected = [step(model, optimizer) for _ in range(3)]
    fresh = tiny_model(torch.bfloat16, seed=5)
    restored = ShardedAdamW(fresh, Grid())
    restored.load_state(state, 1)
    assert [step(fresh, restored) for _ in range(3)] == expected and restored.steps == 4


def test_non_finite_gradient_changes_nothing(tiny_model):
    model = tiny_model()
    optimizer = ShardedAdamW(model, Grid())
    before = optimizer.master.clone()
    optimizer.gradient[3] = float("nan")
    with pytest.raises(ArithmeticError, match="nan"):
        optimizer.step(1e-2, 1.0)
    assert torch.equal(optimizer.master, before)
