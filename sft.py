"""Stage 2: supervised fine-tuning on short chat samples. The loop is stage 1's; data and defaults differ.

    python sft.py --model runs/stage1/final --data chat.jsonl --sequence-length 8192 --steps 780 --out runs/stage2

Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Loss is on the assistant's words and its end-of-turn token only. Samples stay short (< 8K tokens): the long window
was learned in stage 1, and short samples keep it (arXiv 2504.06214, section 3.2).
"""
from __future__ import annotations

import argparse

import data
from train import argument_parser, main, weighted_paths


def stage2_parser() -> argparse.ArgumentParser:
    """Stage 2's options, with the paper's batch of 128 and learning rate of 5e-6 as defaults."""
    parser = argument_parser("Supervised fine-tuning on short chat samples (stage 2).")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE[=WEIGHT]", help="JSON lines with messages")
    group.add_argument("--sequence-length", type=int, default=8192, help="longer samples are dropped and counted")
    group.add_argument("--validation-data", help="held-out chat samples")
    parser.set_defaults(batch_size=128, learning_rate=5e-6)
    parser.set_defaults(rope_kind=None, rope_factor=1.0, original_length=None)  # the window stays as stage 1 made it
    parser.set_defaults(cross_document_mask=False)  # a row holds one sample
    return parser


def stage2_datasets(a: argparse.Namespace, tokenizer):
    """(training, validation) datasets of chat samples, one a row."""
    sources = weighted_paths(a.data)
    parts = [data.ChatDataset(path, tokenizer, a.sequence_length, a.seed) for path, _ in sources]
    training = data.Blend(parts, [weight for _, weight in sources], a.seed) if len(parts) > 1 else parts[0]
    held_out = weighted_paths([a.validation_data])[0][0] if a.validation_data and a.validation_sequences else None
    return training, held_out and data.ChatDataset(held_out, tokenizer, a.sequence_length, a.seed)


if __name__ == "__main__":
    main(stage2_parser(), stage2_datasets)
