"""The grid of one process, attention, and the sharded optimizer."""
from bisect import bisect_right

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import (
    Grid,
    ShardedAdamW,
    attend_earlier,
    block_backward,
    block_forward,
    document_segments,
    join_documents,
    merge,
    one_line_errors,
    ring_attention,
    visible_blocks,
    zigzag_block,
    zigzag_positions,
    zigzag_shard,
)
from train import attention_kernel


def test_grid_of_one_process_and_refusal_of_more():
    assert Grid.create() == Grid(dp=1, cp=1, tp=1, rank=0)
    with pytest.raises(ValueError, match="tp 2"):
        Grid.create(tp=2)


@pytest.mark.parametrize("cp, tp, padded, chunk", [
    (1, 1, 513, 513),  # alone, any length
    (1, 3, 516, 516),
    (2, 1, 516, 129),
    (2, 2, 520, 130),
])
def test_chunks_are_those_of_the_padded_sequence(cp, tp, padded, chunk):
    """Else 513 tokens on two ranks would seem to have chunks of 128, which cuDNN takes."""
    grid = Grid(cp=cp, tp=tp)
    assert (grid.padded(513), grid.chunk(513)) == (padded, chunk)


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


def pairs_seen(cp: int, segments: list[list[int]] | None, rows: int, length: int) -> torch.Tensor:
    """How often each query is computed with each key, over all ranks and hops: (rows, S, S)."""
    seen = torch.zeros(rows, length, length, dtype=torch.int64)
    for rank in range(cp):
        own = zigzag_positions(length, Grid(cp=cp, rank=rank))
        for source in range(cp):
            keys = zigzag_positions(length, Grid(cp=cp, rank=source))
            blocks = visible_blocks(Grid(cp=cp, rank=rank), source, length // cp, segments)
            for row, q_rows, k_rows in blocks:
                block = torch.ones(len(own[q_rows]), len(keys[k_rows]), dtype=torch.int64)
                if source == rank:  # under the causal mask
                    assert q_rows == k_rows
                    block = block.tril()
                seen[row, own[q_rows, None], keys[k_rows]] += block
            if segments and source != rank:
                assert len(blocks) == len({row.start for row, _, _ in blocks})  # one a row
    return seen


@pytest.mark.parametrize("cp, length", [(1, 1), (1, 23), (2, 24), (3, 24), (4, 24), (8, 32)])
def test_every_query_meets_the_keys_before_it_in_its_document_once(cp, length):
    """All that can go wrong with borders, without attention: the blocks of all ranks and hops,
    counted, are the causal mask block by block. 200 random layouts of 1 to 10 documents, and one
    document, and a document a token."""
    causal = torch.ones(length, length, dtype=torch.int64).tril()
    assert pairs_seen(cp, None, 1, length)[0].equal(causal)
    generator = torch.Generator().manual_seed(cp)
    layouts = [[0, length], list(range(length + 1))]
    for _ in range(200):
        count = int(torch.randint(10, (), generator=generator))
        inner = torch.randint(1, length + 1, (count,), generator=generator).tolist()
        layouts.append(sorted({0, *inner, length}))
    expected = []
    for borders in layouts:
        ids = torch.bucketize(torch.arange(length), torch.tensor(borders), right=True)
        expected.append(causal * (ids[:, None] == ids))
    assert pairs_seen(cp, layouts, len(layouts), length).equal(torch.stack(expected))


def test_documents_begin_where_the_id_changes_up_or_down():
    ids = torch.tensor([[5, 5, 5, 9, 9, 2], [0, 0, 0, 0, 0, 0], [3, 1, 1, 1, 1, 3]])
    assert document_segments(ids) == [[0, 3, 5, 6], [0, 6], [0, 1, 5, 6]]


def test_documents_are_joined_as_a_models_heads_lie():
    """Side by side, (B, S, H, D): flash copies what does not lie so, and cuDNN counts on it."""
    q = torch.randn(2, 4, 12, 8)
    parts = join_documents([(q[:1, :, :5],), (q[:1, :, 5:],), (q[1:, :, :9],), (q[1:, :, 9:],)], 2)
    assert parts[0].equal(q)
    assert parts[0].transpose(1, 2).is_contiguous()


def test_borders_that_are_not_of_the_whole_padded_row_are_refused():
    x = torch.zeros(1, 1, 8, 4)
    for borders in ([0, 5], [1, 8], [0, 16]):
        with pytest.raises(AssertionError, match="padded row"):
            ring_attention(x, x, x, Grid(), [borders])


def chunks(positions: torch.Tensor) -> str:
    """Names of chunks of two positions: (3, 4) of 6 7 8 9; of halves: 2' of 4, 2" of 5."""
    names = []
    for number in sorted({place // 2 for place in positions.tolist()}):
        here = [place % 2 for place in positions.tolist() if place // 2 == number]
        half = {(0,): "'", (1,): '"'}.get(tuple(here), "")
        names.append(f"{number}{half}")
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


@pytest.mark.parametrize("segments", [None, [[0, 5, 11, 16]]])
def test_the_tables_of_the_docstring_are_what_is_computed(segments):
    """cp 4, without documents, and with three whose borders halve chunks 2 and 5."""
    lines = [" ".join(line.split()) for line in ring_attention.__doc__.splitlines()]
    for rank in range(4):
        own = zigzag_positions(16, Grid(cp=4, rank=rank))
        words = [f"{rank} {chunks(own).strip('()')}"]
        for hop in range(4):
            source = (rank - hop) % 4
            theirs = zigzag_positions(16, Grid(cp=4, rank=source))
            blocks = visible_blocks(Grid(cp=4, rank=rank), source, 4, segments)
            for _, q_rows, k_rows in blocks:
                queries, keys = own[q_rows], theirs[k_rows]
                name = str(source)
                if segments:
                    name = "ABC"[bisect_right(segments[0], int(queries[0])) - 1]
                what = f"{chunks(queries)} x {chunks(keys)}"
                if hop == 0:
                    what = chunks(queries) if segments else "causal"
                words.append(f"{name}: {what}")
            if not blocks:
                words.append("-")
        assert " ".join(words) in lines


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device, dtype, kernel, limit", [
    ("cpu", torch.float64, "flash", 1e-12),
    ("cpu", torch.bfloat16, "flash", 1e-2),
    pytest.param("cuda", torch.bfloat16, "flash", 1e-2, marks=gpu),
    pytest.param("cuda", torch.bfloat16, "cudnn", 1e-2, marks=gpu),
])
@pytest.mark.parametrize("cp", [2, 3])
def test_blocks_of_a_ring_give_its_rows_and_gradients(device, dtype, kernel, limit, cp):
    """The kernels as the ring calls them, on strided halves, for all ranks in one process: the
    check of a new backend."""
    def assert_close(ours, whole, rank):
        right = zigzag_shard(whole.detach(), Grid(cp=cp, rank=rank), 2)
        assert (ours - right).norm() <= limit * right.norm()

    # 1. Attention of the whole sequence, and its gradients.
    generator = torch.Generator().manual_seed(0)
    whole = []
    for heads in (8, 2, 2, 8):  # q, k, v and the gradient of the output
        length = 96 if device == "cpu" else 1536  # chunks of 384 and 256 are for cuDNN, too
        x = torch.randn(2, length, heads, 64, generator=generator)
        whole.append(x.to(device, dtype).transpose(1, 2))
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
                                           source == rank, kernel)
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
                                   source == rank, kernel)
            d_q[:, :, rows] += parts[0]
            d_keys[source][0][:, :, columns] += parts[1]
            d_keys[source][1][:, :, columns] += parts[2]
        assert_close(d_q, gradients[0], rank)

    for rank, (d_k, d_v) in enumerate(d_keys):
        assert_close(d_k, gradients[1], rank)
        assert_close(d_v, gradients[2], rank)


HOPPER, BLACKWELL, AMPERE, GAMING = (9, 0), (10, 0), (8, 0), (12, 0)


@pytest.mark.parametrize("asked, capability, head_dim, chunk, kernel, why", [
    ("auto", HOPPER, 128, 1024, "cudnn", "faster"),
    ("auto", BLACKWELL, 64, 128, "cudnn", "faster"),
    ("auto", AMPERE, 128, 1024, "flash", "8.x, is neither 9 nor 10"),
    ("auto", GAMING, 128, 1024, "flash", "12.x, is neither 9 nor 10"),
    ("auto", HOPPER, 256, 1024, "flash", "head_dim 256 is above 128"),
    ("auto", HOPPER, 128, 192, "flash", "192 positions, is no multiple of 128; 128 is"),
    ("auto", HOPPER, 128, 1048640, "flash", "1,048,640 positions"),
    ("auto", HOPPER, 128, None, "flash", "have any length"),  # samples, documents
    ("auto", None, 128, 1024, "flash", "CPU"),
    ("flash", HOPPER, 256, None, "flash", "asked"),
    ("flash", None, 128, None, "flash", "CPU"),
    ("cudnn", HOPPER, 128, 1024, "cudnn", "asked"),
    ("fa3", HOPPER, 256, None, "fa3", "asked"),
])
def test_the_kernel_is_chosen_by_device_head_and_length(asked, capability, head_dim, chunk, kernel,
                                                        why):
    chosen, reason = attention_kernel(asked, capability, torch.bfloat16, head_dim, chunk)
    assert chosen == kernel
    assert why in reason


@pytest.mark.parametrize("asked, capability, dtype, head_dim, chunk, message", [
    ("auto", (7, 5), torch.bfloat16, 128, 1024, "--device cuda: .* is 7.5, attention needs 8.0"),
    ("auto", HOPPER, torch.float32, 128, 1024, "--dtype float32 cannot be used on cuda"),
    ("auto", HOPPER, torch.bfloat16, 100, 1024, "head_dim 100 cannot be used on cuda"),
    ("flash", HOPPER, torch.bfloat16, 512, 1024, "head_dim 512 cannot be used on cuda"),
    ("cudnn", None, torch.bfloat16, 128, 1024, "--attention cudnn needs a GPU"),
    ("fa3", None, torch.bfloat16, 128, 1024, "--attention fa3 needs a GPU"),
    ("cudnn", AMPERE, torch.bfloat16, 128, 1024, "--attention cudnn .* 8.x, is neither"),
    ("cudnn", HOPPER, torch.bfloat16, 256, 1024, "--attention cudnn .* head_dim 256"),
    ("cudnn", HOPPER, torch.bfloat16, 128, None, "--attention cudnn .* have any length"),
    ("fa3", BLACKWELL, torch.bfloat16, 128, 1024, "--attention fa3 .* 10.x, is not 9.0"),
])
def test_a_kernel_that_cannot_be_is_refused(asked, capability, dtype, head_dim, chunk, message):
    with pytest.raises(ValueError, match=message) as refused:
        attention_kernel(asked, capability, dtype, head_dim, chunk)
    assert "\n" not in str(refused.value)


class Calls(TorchDispatchMode):
    """Notes each operator's arguments by their names in its schema, and results."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        names = [argument.name for argument in operator._schema.arguments]
        arguments = dict(zip(names, args, strict=False))
        self.seen[operator._overloadpacket.__name__] = arguments, results
        return results


@pytest.mark.parametrize("kernel, queries, keys, used", [
    ("flash", 256, 256, "flash"),
    ("fa3", 256, 256, "flash"),  # the same operators, with another package behind them
    ("cudnn", 256, 256, "cudnn"),
    ("cudnn", 128, 256, "cudnn"),  # later hops of a ring
    ("cudnn", 256, 128, "cudnn"),
    ("cudnn", 1, 256, "flash"),  # a new token
    ("cudnn", 192, 192, "flash"),
    ("cudnn", 256, 70, "flash"),
])
def test_blocks_call_their_kernel_as_it_wants(kernel, queries, keys, used):
    """On fake CUDA tensors: each argument arrives under its own name, the log-sum-exp leaves as
    (B, H, S) and enters contiguous, of cuDNN as (B, H, S, 1)."""
    with fake_cuda(), Calls() as calls:
        q, d_out = (torch.empty(2, queries, 4, 64, device="cuda:0", dtype=torch.bfloat16)
                    .transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(2, keys, 2, 64, device="cuda:0", dtype=torch.bfloat16).transpose(1, 2)
                for _ in range(2))
        out, lse = block_forward(q, k, v, True, kernel)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, queries)
        assert lse.dtype == torch.float32
        late = torch.empty(2, 4, 2 * queries, device="cuda:0")[:, :, queries:]
        assert not late.is_contiguous()
        gradients = block_backward(d_out, q, k, v, out, late, True, kernel)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    name = f"_scaled_dot_product_{used}_attention"
    assert [key for key in calls.seen if "scaled" in key] == [name, f"{name}_backward"]
    forward, _ = calls.seen[name]
    for given in (forward, calls.seen[f"{name}_backward"][0]):
        assert given["query"] is q
        assert given["key"] is k
        assert given["value"] is v
        assert given["is_causal"] is True
        assert given["dropout_p"] == 0.0
    assert given["grad_out"] is d_out
    assert given["out"] is out
    assert given["logsumexp"].is_contiguous()
    assert given["logsumexp"].shape == ((2, 4, queries, 1) if used == "cudnn" else (2, 4, queries))
    assert (given["max_q"], given["max_k"]) == (queries, keys)
    assert given["philox_seed"].device == q.device
    assert given["cum_seq_q"] is given["cum_seq_k"] is None


def test_cached_tokens_are_attended_to_by_the_grids_kernel():
    with fake_cuda() as meter:
        q, k, out = (torch.empty(1, 4, 128, 64, device="cuda:0", dtype=torch.bfloat16)
                     for _ in range(3))
        lse = torch.empty(1, 4, 128, device="cuda:0")
        attend_earlier(q, out, lse, k, k, Grid(kernel="cudnn"))
    assert meter.kernels == {"cudnn"}


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
