"""Worker: what a model on a grid computes and saves, against one process.

    torchrun --standalone --nproc-per-node 4 tests/distributed/models.py \\
        results.json MODEL_DIR PLACE 2,2 1,4 ...

The pairs are tp,cp.
"""
import json
import math
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from allocations import Allocations  # noqa: E402

from model import Llama  # noqa: E402
from parallel import Grid, shard_dims, whole_shape  # noqa: E402
from tools.perplexity import token_losses  # noqa: E402


def agree(grid: Grid, tokens: torch.Tensor) -> bool:
    """Whether all ranks of a replica have the same."""
    return bool((grid.all_gather(tokens, "cp_tp") == tokens).all())


def largest(model: Llama) -> int:
    """Elements of the largest tensor that a rank makes in a forward and backward pass over 1,088
    tokens."""
    model.recompute = "block"
    model.tile = 32 * model.grid.tp
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (1, 1088), generator=generator)
    with Allocations() as seen:
        model.loss(tokens, tokens)[0].backward()
    return seen.elements


def continued(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of two places of `tokens`, read in pieces, between which other tokens were read
    and forgotten."""
    cache = model.new_cache(len(tokens), 3 * tokens.shape[1])
    pieces = [
        (tokens[:, :30], 21),
        (tokens[:, 3:14], 17),
        (tokens[:, 17:18], 18),
        (tokens[:, 18:23], 22),
    ]
    for piece, kept in pieces:
        model.hidden_at(piece, torch.zeros_like(piece[:, :1]), cache)
        cache.truncate(kept)
    return model.hidden_at(tokens[:, 22:], torch.tensor([[0, 14], [9, 3]]), cache)


def differences(model: Llama, alone: Llama, tokens: torch.Tensor,
                targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model on a grid computes, less what it computes alone."""
    places = torch.tensor([[0, 36], [17, 5]])
    own_losses = token_losses(model, tokens, targets)
    own_continued = continued(model, tokens)
    expected = alone.hidden_at(tokens, torch.tensor([[22, 36], [31, 25]]))
    return {
        "logits": model(tokens) - alone(tokens),
        "token_losses": own_losses - token_losses(alone, tokens, targets),
        "loss": model.loss(tokens, targets)[0] - alone.loss(tokens, targets)[0],
        "hidden_at": model.hidden_at(tokens, places) - alone.hidden_at(tokens, places),
        "continued": own_continued - expected,
    }


def said(model: Llama, tokens: torch.Tensor) -> dict[str, list]:
    """What it generates, greedily after prompts of three lengths, and drawn with a seed."""
    greedy = [model.generate(tokens[:, :length], 7) for length in (1, 2, 37)]
    sampled = model.generate(tokens, 7, temperature=1.0, top_p=0.9, seed=5)
    return {"greedy": [rows.tolist() for rows in greedy], "sampled": sampled.tolist()}


def counts(model: Llama, grid: Grid) -> dict[str, int]:
    """Elements that a rank holds, those of cut parameters, those of the whole model."""
    dims = shard_dims(model)
    held = cut = whole = 0
    for name, parameter in model.named_parameters():
        held += parameter.numel()
        if dims[name] is not None:
            cut += parameter.numel()
        whole += math.prod(whole_shape(parameter.shape, dims[name], grid))
    return {"held": held, "cut": cut, "whole": whole}


if __name__ == "__main__":
    torch.manual_seed(int(os.environ["RANK"]))  # what is drawn without a seed differs by rank
    torch.set_num_threads(1)
    alone = Llama.from_pretrained(sys.argv[2])
    generator = torch.Generator().manual_seed(1)
    # no grid divides 37
    tokens = torch.randint(alone.config.vocab_size, (2, 37), generator=generator)
    without_loss = torch.rand(tokens.shape, generator=generator) < 0.3
    targets = tokens.roll(-1, 1).masked_fill(without_loss, -100)
    found = {}
    grids = []
    for text in sys.argv[4:]:
        grid = Grid.create(*map(int, text.split(",")), device="cpu")
        grids.append(grid)
        model = Llama.from_pretrained(sys.argv[2], grid)
        case = {}
        with torch.no_grad():
            for name, difference in differences(model, alone, tokens, targets).items():
                case[name] = float(difference.abs().max())
        model.save_pretrained(Path(sys.argv[3]) / text, max_shard_bytes=20_000)
        case |= said(model, tokens)
        case["agreed"] = agree(grid, model.generate(tokens, 7, temperature=1.0))
        case["largest"] = largest(model)
        case |= counts(model, grid)
        found[text] = case
    found["alone"] = said(alone, tokens)
    if grid.is_first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    grids[0].close()
