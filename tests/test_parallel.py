"""The grid of one process, attention, and the sharded optimizer."""
import pytest
import torch
import torch.nn.functional as F

from parallel import (
    Grid,
    ShardedAdamW,
    block_backward,
    block_forward,
    merge,
    one_line_errors,
    ring_attention,
    zigzag_block,
    zigzag_shard,
)


def test_grid_of_one_process_and_refusal_of_more():
    assert Grid.create() == Grid(dp=1, cp=1, tp=1, rank=0)
    with pytest.raises(ValueError, match="tp 2"):
        Grid.create(tp=2)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_attention_equals_the_formula_with_grouped_heads(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 17, 16, dtype=torch.float64, generator=generator)
    k = torch.randn(3, kv_heads, 17, 16, dtype=torch.float64, generator=generator)
    v = torch.randn(3, kv_heads, 17, 16, dtype=torch.float64, generator=generator)

    keys = k.repeat_interleave(8 // kv_heads, 1)  # a key head serves a group of query heads
    values = v.repeat_interleave(8 // kv_heads, 1)
    scores = q @ keys.transpose(2, 3) / 4  # 4: the root of the head's 16 dimensions
    future = torch.ones(17, 17, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ values
    torch.testing.assert_close(ring_attention(q, k, v, Grid()), expected)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device, dtype, limit", [
    ("cpu", torch.float64, 1e-12),
    ("cpu", torch.bfloat16, 1e-2),
    pytest.param("cuda", torch.bfloat16, 1e-2, marks=gpu),
])
@pytest.mark.parametrize("cp", [2, 3])
def test_blocks_of_a_ring_give_its_rows_and_gradients(device, dtype, limit, cp):
    """The kernels as the ring calls them, on strided halves, for all ranks in one process: the
    check of a new backend."""
    def assert_close(ours, whole, rank):
        right = zigzag_shard(whole.detach(), Grid(cp=cp, rank=rank), 2)
        assert (ours - right).norm() <= limit * right.norm()

    # 1. Attention of the whole sequence, and its gradients.
    generator = torch.Generator().manual_seed(0)
    whole = []
    for heads in (8, 2, 2, 8):  # q, k, v and the gradient of the output
        x = torch.randn(2, heads, 96, 32, generator=generator)
        whole.append(x.to(device, dtype))
    leaves = [x.to(torch.float64, copy=True).requires_grad_() for x in whole[:3]]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(expected, leaves, whole[3].double())

    # 2. What each rank holds.
    shards = []
    d_keys = []  # of each rank's keys and values
    for rank in range(cp):
        shards.append([zigzag_shard(x, Grid(cp=cp, rank=rank), 2) for x in whole])
        shape = shards[rank][1].shape
        d_keys.append(torch.zeros(2, *shape, dtype=torch.float64, device=device))

    for rank, (q, _, _, d_out) in enumerate(shards):
        blocks = []
        for hop in range(cp):
            source = (rank - hop) % cp
            rows, columns = zigzag_block(rank, source, q.shape[2])
            blocks.append((rows, columns, source))

        # 3. Its rows: a block a hop, merged.
        for rows, columns, source in blocks:
            _, k, v, _ = shards[source]
            part, part_lse = block_forward(q[:, :, rows], k[:, :, columns], v[:, :, columns],
                                           source == rank)
            if source == rank:  # the first hop, and all rows
                out = part.to(torch.promote_types(dtype, torch.float32))
                lse = part_lse
            else:
                merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        out = out.to(dtype)
        assert_close(out, expected, rank)

        # 4. Its queries' gradients, and its part of all keys' and values'.
        d_q = torch.zeros(q.shape, dtype=torch.float64, device=device)
        for rows, columns, source in blocks:
            _, k, v, _ = shards[source]
            parts = block_backward(d_out[:, :, rows], q[:, :, rows], k[:, :, columns],
                                   v[:, :, columns], out[:, :, rows], lse[:, :, rows],
                                   source == rank)
            d_q[:, :, rows] += parts[0]
            d_keys[source][0][:, :, columns] += parts[1]
            d_keys[source][1][:, :, columns] += parts[2]
        assert_close(d_q, gradients[0], rank)

    for rank, (d_k, d_v) in enumerate(d_keys):
        assert_close(d_k, gradients[1], rank)
        assert_close(d_v, gradients[2], rank)


def test_a_rank_keeps_its_own_piece_only():
    """Ten numbers in pieces of four: a view of the padded copy would keep all three pieces."""
    model = torch.nn.Linear(10, 1, bias=False)
    optimizer = ShardedAdamW(model, Grid(dp=3))
    master = optimizer.masters["weight"]
    assert master.numel() == 4
    assert master.untyped_storage().nbytes() == master.nbytes


def test_optimizer_equals_torch_adamw(tiny_model):
    """Five clipped steps in float64: the update gives torch's own AdamW, with decay on matrices
    only."""
    ours = tiny_model(torch.float64)
    theirs = tiny_model(torch.float64)
    sharded = ShardedAdamW(ours, Grid(), weight_decay=0.1)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(5):
        tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(seed))
        sharded.zero_gradients()
        reference.zero_grad()
        for model in (ours, theirs):
            loss, count = model.loss(tokens, tokens)
            (loss / count).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        for p in theirs.parameters():
            p.grad.mul_(0.5 / norm)  # torch's own clipping divides by the norm + 1e-6
        reference.step()
        assert sharded.step(1e-2, 0.5) == pytest.approx(norm.item(), rel=1e-12)
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
    before = dict(optimizer.state("master"))["model.norm.weight"].clone()
    optimizer.step(1e-6)
    moved = (dict(optimizer.state("master"))["model.norm.weight"] - before).abs()
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
    state = {}
    for kind in optimizer.KINDS:
        state[kind] = [(name, tensor.clone()) for name, tensor in optimizer.state(kind)]
    expected = [step(model, optimizer) for _ in range(3)]
    fresh = tiny_model(torch.bfloat16, seed=5)
    restored = ShardedAdamW(fresh, Grid())
    for kind, tensors in state.items():
        restored.load_state(kind, tensors, 1)
    assert [step(fresh, restored) for _ in range(3)] == expected


def test_non_finite_gradient_changes_nothing(tiny_model):
    model = tiny_model()
    optimizer = ShardedAdamW(model, Grid())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.model.embed_tokens.weight.grad[0, 3] = float("nan")
    with pytest.raises(ArithmeticError, match="nan"):
        optimizer.step(1e-2, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_ctrl_c_ends_a_command_with_one_line():
    with pytest.raises(SystemExit, match="^stopped$"), one_line_errors():
        raise KeyboardInterrupt
