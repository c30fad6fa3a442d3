"""Worker: train models on a grid and in one process from the same weights and batches, and report
how far apart they are.

    torchrun --standalone --nproc-per-node 4 tests/distributed/grids.py results.json 2,1 1,2 ...

The pairs are tp,cp.
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data import Batch
from model import Llama, ModelConfig
from parallel import Grid, ShardedAdamW, shard_dims, unshard, zigzag_positions
from train import training_step

SEQUENCE, ROWS, STEPS = 48, 4, 3
CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "initializer_range": 0.1,
}
MODELS = {  # what differs; qwen3 and smollm3 on three of the grids, see main
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "masked": {},  # documents do not see each other
    "qwen3": {"model_type": "qwen3", "attention_bias": False},
    # without biases: where nothing is turned, that of the keys adds the same to all scores of a
    # query, and its gradient is zero but for noise
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True,
                "attention_bias": False},
}
EVERY_MODEL = ((2, 1, 1), (1, 2, 1), (2, 2, 1))  # tp, cp, dp


def own(whole: torch.Tensor, dim: int | None, grid: Grid) -> torch.Tensor:
    """This rank's shard of a whole tensor."""
    return whole if dim is None else whole.chunk(grid.tp, dim)[grid.tp_rank]


def make_model(kind: str, dtype: torch.dtype, grid: Grid) -> Llama:
    """Every parameter away from 0 and 1, biases and norms too, the same whatever the grid."""
    model = Llama(ModelConfig.from_hf(CONFIG | MODELS[kind]), grid).initialise(3)
    dims = shard_dims(model)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            shape = unshard(parameter.detach(), dims[name], grid).shape
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            parameter.data += 0.3 * own(whole, dims[name], grid)
    return model.to(dtype)


def make_batch(step: int, grid: Grid, has_documents: bool) -> Batch:
    """Random tokens; a third of the targets masked, rows of very different weight, and in the first
    step all targets of the last replica and all at the places of the ring's rank 0. Of documents
    every row has other ones, about six; the first row is one."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(96, (ROWS, SEQUENCE + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    targets[0, 5:] = -100  # rows of very different weight
    if grid.dp > 1 and step == 0:
        targets[ROWS - ROWS // grid.dp:] = -100
    if grid.cp > 1 and step == 0:
        targets[:, zigzag_positions(SEQUENCE, Grid(cp=grid.cp))] = -100
    document_ids = None
    if has_documents:
        is_border = torch.rand(targets.shape, generator=generator) < 0.1
        is_border[0] = False
        document_ids = is_border.cumsum(1)
    return Batch(tokens[:, :-1].contiguous(), targets, document_ids)


def rows(batch: Batch, grid: Grid) -> Batch:
    """This replica's."""
    share = ROWS // grid.dp
    own_rows = torch.arange(grid.dp_rank * share, (grid.dp_rank + 1) * share)
    return batch.part(own_rows, SEQUENCE)


def summed(tensors: list[torch.Tensor], group: str, grid: Grid) -> list[torch.Tensor]:
    """Each added up over a group, in one message."""
    flat = grid.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def run(grid: Grid, kind: str, dtype: torch.dtype, micro_batch: int) -> dict[str, float]:
    """Relative errors against one process; of a tensor: norm of the difference / norm. It is the
    whole one's: a shard of the keys' biases, whose gradients nearly cancel, is mostly rounding."""
    alone = Grid()
    models = [make_model(kind, dtype, grid), make_model(kind, dtype, alone)]
    tied = models[0].config.tie_word_embeddings
    # recomputed with communication inside
    if tied:
        models[0].recompute = "block"
    elif dtype == torch.float64:
        models[0].recompute = "mlp"
    else:
        models[0].recompute = "none"
    m = SEQUENCE // (grid.cp * grid.tp)
    # two uneven tiles of a block; each more is a round of messages
    models[0].tile = (m // 2 + 1) * micro_batch * grid.tp
    models[0].offload = tied and dtype == torch.float64
    optimizers = [ShardedAdamW(models[0], grid), ShardedAdamW(models[1], alone)]
    dims = optimizers[0].dims
    errors = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0}

    def note(what: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The worst error of pairs (ours, theirs), of this rank's shards."""
        squares = [torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs]
        squares = grid.all_reduce(torch.stack(squares).double(), "tp")  # (pairs, 2)
        error = (squares[:, 0] / squares[:, 1]).sqrt().max()
        errors[what] = max(errors[what], float("inf") if error.isnan() else error.item())

    for step in range(STEPS):
        batch = make_batch(step, grid, kind == "masked")
        losses = []
        parts = (rows(batch, grid), batch)
        for model, optimizer, part in zip(models, optimizers, parts, strict=True):
            losses.append(training_step(model, optimizer, part, micro_batch)[0])
        whole = [name for name, dim in dims.items() if dim is None]
        cut = [name for name, dim in dims.items() if dim is not None]
        for names, group in ((whole, "all"), (cut, "dp_cp")):
            gradients = [optimizers[0].parameters[name].grad for name in names]
            expected = [own(optimizers[1].parameters[name].grad, dims[name], grid)
                        for name in names]
            ours = summed(gradients, group, grid)
            note("gradients", list(zip(ours, expected, strict=True)))
        norms = [optimizer.step(1e-4, max_norm=1.0) for optimizer in optimizers]
        note("loss", [torch.tensor(losses, dtype=torch.float64).unbind()])
        note("norm", [torch.tensor(norms, dtype=torch.float64).unbind()])
    weights = []
    for name, theirs in optimizers[1].parameters.items():
        ours = optimizers[0].parameters[name].detach()
        weights.append((ours, own(theirs.detach(), dims[name], grid)))
    note("weights", weights)
    for what, error in errors.items():  # the worst of all ranks
        error = torch.tensor(error, dtype=torch.float64)
        errors[what] = grid.all_reduce(error, "all", dist.ReduceOp.MAX).item()
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    grids = []
    for text in sys.argv[2:]:
        grid = Grid.create(*map(int, text.split(",")), device="cpu")
        grids.append(grid)
        for dtype in (torch.float32, torch.float64):
            every = (grid.tp, grid.cp, grid.dp) in EVERY_MODEL
            for kind in MODELS if every else ("untied", "tied", "masked"):
                # gradients add up over two micro-batches
                parts = 2 if kind in ("tied", "masked") and dtype == torch.float64 else 1
                errors = run(grid, kind, dtype, micro_batch=ROWS // grid.dp // parts)
                shape = f"{grid.tp},{grid.cp},{grid.dp}"
                name = str(dtype).removeprefix("torch.")
                found[f"{shape} {name} {kind}"] = errors
    if grid.is_first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    grids[0].close()
