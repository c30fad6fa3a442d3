"""Stage 2: supervised fine-tuning on short chat samples. The loop is stage 1's; data and defaults differ.

    python sft.py --model out/stage1/final --data chat.jsonl --sequence-length 8192 --steps 780 --out out/stage2

Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Loss is on the assistant's words and its end-of-turn token only. Samples stay short (< 8K tokens): the long window
was learned in stage 1, and short samples keep it (arXiv 2504.06214, section 3.2).
"""
from __future__ import annotations

import argparse
from pathlib import Path

import data
from parallel import finish, parse_once, print_once
from train import (
    Compute,
    Optimisation,
    Output,
    argument_parser,
    check_given,
    check_processes,
    load_start,
    run_stage,
    shared_settings,
    values_of,
    weighted_paths,
)


def stage2_parser() -> argparse.ArgumentParser:
    """Stage 2's options, with the paper's batch of 128 and learning rate of 5e-6 as defaults."""
    parser = argument_parser("Supervised fine-tuning on short chat samples (stage 2).")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", action="extend", metavar="FILE[=WEIGHT]",
                       help="JSON lines with messages; each sample comes from one file, by weight")
    group.add_argument("--sequence-length", type=int, default=8192, help="longer samples are dropped and counted")
    group.add_argument("--pack", dest="cross_document_mask", action="store_true",
                       help="as many samples a row as fit, which do not see each other; --batch-size counts rows")
    group.add_argument("--validation-data", help="held-out chat samples; without them there is no validation")
    parser.set_defaults(batch_size=128, micro_batch_size=1, learning_rate=5e-6)
    return parser


def stage2_datasets(sources: list[tuple[Path, float]], held_out: Path | None, tokenizer: data.Tokenizer, sequence_length: int,
                    seed: int, pack: bool):
    """(training, validation) datasets of chat samples: a blend of (file, weight) sources, and `held_out`, None without it."""
    def samples(path: Path) -> data.ChatDataset:
        dataset = data.ChatDataset(path, tokenizer, sequence_length, seed, pack)
        print_once(f"{path}: {len(dataset.rows)} samples, {dataset.dropped} dropped as longer than {sequence_length} tokens")
        return dataset

    parts = [samples(path) for path, _ in sources]
    training = data.Blend(parts, [weight for _, weight in sources], seed) if len(parts) > 1 else parts[0]
    return training, samples(held_out) if held_out else None


def main(argv: list[str] | None = None) -> None:
    """Stage 2: one line and exit code 1 for a user's mistake."""
    a = parse_once(stage2_parser(), argv)
    try:
        check_given(data=a.data, steps=a.steps, out=a.out)
        optimisation, compute, output = (values_of(kind, vars(a)) for kind in (Optimisation, Compute, Output))
        optimisation = check_processes(compute, optimisation, a.sequence_length, a.cross_document_mask)
        config, tokenizer, path = load_start(a.model or a.config, a.tokenizer or a.model, None, a.sequence_length, compute)
        if a.validate_every and not a.validation_data:
            raise ValueError("--validate-every needs --validation-data, held-out chat samples")
        sources = weighted_paths("--data", a.data)
        held_out = weighted_paths("--validation-data", [a.validation_data])[0][0] if a.validation_data else None
        training, validation = stage2_datasets(sources, held_out if a.validation_sequences else None, tokenizer,
                                               a.sequence_length, a.seed, a.cross_document_mask)
        settings = shared_settings(vars(a) | {"tokenizer": path}, sources)
        run_stage(config, a.model, path, training, validation, optimisation, compute, output, settings)
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main()
