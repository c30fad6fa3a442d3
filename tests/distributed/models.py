"""Worker: what a model on a grid computes and saves, against one process.

    torchrun --standalone --nproc-per-node 4 tests/distributed/models.py results.json MODEL_DIR PLACE 2,2 1,4 ...     # tp,cp
"""
import json
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
    """Elements of the largest tensor that a rank makes in a forward and backward pass over 2,048
    tokens."""
    model.recompute, model.tile = "block", 32
    tokens = torch.randint(model.config.vocab_size, (1, 2048),
                           generator=torch.Generator().manual_seed(2))
    with Allocations() as seen:
        model.loss(tokens, tokens)[0].backward()
    return seen.elements


def continued(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of two places of `tokens`, read in pieces, between which other tokens were read
    and forgotten."""
    cache = model.new_cache(len(tokens), 3 * tokens.shape[1])
    for piece, kept in ((tokens[:, :30], 21), (tokens[:, 3:14], 17), (tokens[:, 17:18], 18),
                        (tokens[:, 18:23], 22)):
        model.hidden_at(piece, torch.zeros_like(piece[:, :1]), cache)
        cache.truncate(kept)
    return model.hidden_at(tokens[:, 22:], torch.tensor([[0, 14], [9, 3]]), cache)


if __name__ == "__main__":
    torch.manual_seed(int(os.environ["RANK"]))  # what is drawn without a seed differs by rank
    torch.set_num_threads(1)
    alone = Llama.from_pretrained(sys.argv[2])
    generator = torch.Generator().manual_seed(1)
    # no grid divides 37
    tokens = torch.randint(alone.config.vocab_size, (2, 37), generator=generator)
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3,
                                             -100)
    found = {}
    grids = []
    for text in sys.argv[4:]:
        grid = Grid.create(*map(int, text.split(",")))
        grids.append(grid)
        model = Llama.from_pretrained(sys.argv[2], grid)
        dims = shard_dims(model)
        with torch.no_grad():
            differences = {"logits": model(tokens) - alone(tokens),
                           "token_losses": token_losses(model, tokens, targets)
                           - token_losses(alone, tokens, targets),
                           "loss": model.loss(tokens, targets)[0] - alone.loss(tokens, targets)[0],
                           "hidden_at": model.hidden_at(tokens, torch.tensor([[0, 36], [17, 5]]))
                           - alone.hidden_at(tokens, torch.tensor([[0, 36], [17, 5]])),
                           "continued": continued(model, tokens)
                           - alone.hidden_at(tokens, torch.tensor([[22, 36], [31, 25]]))}
        model.save_pretrained(Path(sys.argv[3]) / text, max_shard_bytes=20_000)
        found[text] = {name: float(x.abs().max()) for name, x in differences.items()} | {
            "greedy": [model.generate(tokens[:, :length], 7).tolist() for length in (1, 2, 37)],
            "sampled": model.generate(tokens, 7, temperature=1.0, top_p=0.9, seed=5).tolist(),
            "agreed": agree(grid, model.generate(tokens, 7, temperature=1.0)),
            "largest": largest(model), "held": sum(p.numel() for p in model.parameters()),
            "cut": sum(p.numel() for n, p in model.named_parameters() if dims[n] is not None),
            "whole": sum(torch.Size(whole_shape(p.shape, dims[n], grid)).numel() for n,
                         p in model.named_parameters())}
    found["alone"] = {"greedy": [alone.generate(tokens[:, :length], 7).tolist()
                                 for length in (1, 2, 37)],
                      "sampled": alone.generate(tokens, 7, temperature=1.0, top_p=0.9,
                                                seed=5).tolist()}
    if grid.is_first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    grids[0].close()
