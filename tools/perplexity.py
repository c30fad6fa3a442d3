"""Perplexity by position in long documents: what a model still understands, at every distance from
the start.

    python -m tools.perplexity MODEL_DIR --haystack CORPUS --lengths 32768 --samples 5 \\
        --out perplexity.json
    python -m tools.plot compare none.json yarn.json --figure perplexity.png  # side by side

A low perplexity is no retrieval yet: that is what the needles of eval_niah.py are for.
"""
from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from eval_niah import (
    as_json,
    begin_of_text,
    checkpoint_parser,
    load_model,
    note_lengths,
    read_checkpoint,
    results_header,
)
from model import Llama, logit_bytes
from parallel import (
    Grid,
    gathered,
    one_line_errors,
    print_once,
    vocab_parallel_cross_entropy,
    zigzag_unshard,
)
from tools.prepare import held_out_split
from tools.records import Documents, source_path, texts_of
from train import Parser, positive, writable


def load_long_documents(path: Path, tokenizer: data.Tokenizer, length: int,
                        count: int) -> np.ndarray:
    """The first length + 1 tokens of the first `count` documents that have them, begin-of-text
    where there is one included: (count, length + 1) int64.

    From a corpus's held-out split, or from text files. ValueError if there are fewer.
    """
    source = None
    if data.is_corpus(path):
        documents = held_out_split(path, tokenizer)
    else:
        source = Documents(path)
        texts = ("\n\n".join(texts_of(document)) for _, document in source)
        documents = (np.array(tokenizer.encode_ordinary(text)) for text in texts)
    begin = np.array(begin_of_text(tokenizer), np.int64)
    samples = []
    longest = 0
    for document in documents:
        tokens = np.concatenate([begin, document])
        longest = max(longest, len(tokens))
        if len(tokens) > length:
            samples.append(tokens[:length + 1])
        if len(samples) == count:
            break
    if source:
        print_once(source.report("haystack, as far as it is read"))
    if len(samples) < count:
        raise ValueError(f"--haystack {path}: {len(samples)} documents have more than {length} "
                         f"tokens (the longest {longest}); --samples asks for {count}: lower it or "
                         "--lengths, or take longer documents")
    return np.stack(samples)


def token_losses(model: Llama, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every position, (B, S) float32, 0 where the target is -100; on every
    rank."""
    grid = model.grid
    hidden = model.hidden_states(tokens)  # (B, m, hidden)
    own_targets = model.local_targets(targets)  # (B, tp, m)

    # logits of a tile at a time: of all positions they would not fit
    position = logit_bytes(model.config, grid.tp, hidden.itemsize)
    tile = model.positions_a_tile(position, len(tokens))
    losses = []
    for part, target in zip(hidden.split(tile, 1), own_targets.split(tile, 2), strict=True):
        rows = gathered(model.model.norm(part), grid)  # (B, tp, tile, hidden)
        logits = F.linear(rows, model.head_weight).float()
        logits = logits.flatten(0, 2)  # (B tp tile, V / tp)
        loss, _ = vocab_parallel_cross_entropy(logits, target.flatten().clamp(min=0), grid)
        losses.append(loss.view(target.shape) * (target != -100))  # (B, tp, tile)
    local = torch.cat(losses, 2).flatten(1)  # (B, S / cp)
    return zigzag_unshard(local, grid, 1)[:, :targets.shape[1]]


@torch.inference_mode()
def perplexity_by_position(model: Llama, documents: np.ndarray, buckets: int) -> dict:
    """Mean loss of the tokens at each stretch of positions, over documents (N, S + 1), one at a
    time a replica.

    Returns "edges" (buckets + 1 positions), "loss" (nats a token, buckets) and "standard_error"
    over the documents.
    """
    grid = model.grid
    device = model.head_weight.device
    length = documents.shape[1] - 1
    edges = [round(i * length / buckets) for i in range(buckets + 1)]
    sums = torch.zeros(len(documents), buckets, dtype=torch.float64, device=device)
    for row in range(grid.dp_rank, len(documents), grid.dp):
        grid.restart_timer()
        tokens = torch.from_numpy(documents[row:row + 1]).to(device)
        inputs = tokens[:, :-1].contiguous()
        targets = tokens[:, 1:]
        losses = token_losses(model, inputs, targets)[0].double()  # (S,)
        stretches = losses.tensor_split(edges[1:-1])
        sums[row] = torch.stack([stretch.mean() for stretch in stretches])
    grid.restart_timer()  # other replicas may have a document more
    sums = grid.all_reduce(sums, "dp").cpu()  # (N, buckets): a row has one replica's only
    error = torch.zeros(buckets)
    if len(sums) > 1:
        error = sums.std(0) / len(sums) ** 0.5
    return {
        "edges": edges,
        "loss": sums.mean(0).tolist(),
        "standard_error": error.tolist(),
        "documents": len(sums),
    }


def perplexity_table(runs: list[dict], labels: list[str]) -> str:
    """Perplexity of each run, a column, at each stretch of positions, a row; a line where the old
    window ends."""
    width = max(10, *(len(label) + 2 for label in labels))
    lines = [f"{'positions':>17}" + "".join(f"{label:>{width}}" for label in labels)]
    edges = runs[0]["edges"]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        if i and start >= runs[0]["window"] > edges[i - 1]:
            lines.append(f"{'old window ends':>17}")
        stretch = f"{start:,}-{end:,}"
        row = "".join(f"{math.exp(run['loss'][i]):>{width}.4g}" for run in runs)
        lines.append(f"{stretch:>17}{row}")
    return "\n".join(lines)


def parser() -> Parser:
    parser = checkpoint_parser("Perplexity by position in long documents.")
    add = parser.add_argument_group("documents").add_argument
    add("--haystack", type=Path, required=True,
        help="text that was not trained on: a corpus directory (of which the held-out split is "
        "used), a directory, .txt or .jsonl of text, or stdlib")
    add("--lengths", type=positive, required=True,
        help="tokens of a document; shorter ones are passed over")
    add("--samples", type=positive, default=5, help="documents")
    add("--buckets", type=positive, default=16, help="stretches of positions")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=writable, help="results, JSON; tools.plot draws them")
    add("--window", type=positive, help="old window to mark (default: before extension)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check everything, read long documents, load the model, measure, show and write."""
    with one_line_errors():
        a = parser().parse_args(argv)
        if a.lengths < a.buckets:
            raise ValueError(f"--lengths {a.lengths} is too small for --buckets {a.buckets}")
        path = source_path(a.haystack, "--haystack")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = read_checkpoint(a, grid)
        note_lengths(config, a.lengths)
        documents = load_long_documents(path, tokenizer, a.lengths, a.samples)
        results = results_header(a, config, grid)
        results |= perplexity_by_position(load_model(a, grid), documents, a.buckets)
        if grid.is_first:
            print(perplexity_table([results], [a.model.name]))
            if a.out:
                data.write_complete(a.out, as_json(results))
        grid.close()


if __name__ == "__main__":
    main()
