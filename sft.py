"""Stage 2: supervised fine-tuning on short chat samples. The loop is stage 1's; data and defaults differ.

    python sft.py --model out/stage1/final --data chat.jsonl --sequence-length 8192 --steps 780 --out out/stage2

Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Loss is on the assistant's words and its end-of-turn token only. Samples stay short (< 8K tokens): the long window
was learned in stage 1, and short samples keep it (arXiv 2504.06214, section 3.2).
"""
from __future__ import annotations

from pathlib import Path

import data
from parallel import Grid, Parser, existing, one_line_errors, positive, print_once
from train import Settings, agreed_settings, argument_parser, load_start, run_stage, weighted_path


def stage2_parser() -> Parser:
    """Stage 2's options, with the paper's batch of 128 and learning rate of 5e-6 as defaults."""
    parser = argument_parser("Supervised fine-tuning on short chat samples (stage 2).")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", action="extend", type=weighted_path, required=True, metavar="FILE[=WEIGHT]",
        help="JSON lines with messages; each sample comes from one file, by weight")
    add("--sequence-length", type=positive, default=8192, help="longer samples are dropped and counted")
    add("--pack", action="store_true",
        help="as many samples a row as fit, which do not see each other; --batch-size counts rows")
    add("--validation-data", type=existing, help="held-out chat samples; without them there is no validation")
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
    """Stage 2."""
    with one_line_errors():
        a = stage2_parser().parse_args(argv)
        settings = Settings.from_options(vars(a))
        if a.validate_every and not a.validation_data:
            raise ValueError("--validate-every needs --validation-data, held-out chat samples")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = load_start(settings, a.tokenizer, None, a.sequence_length)
        held_out = a.validation_data if a.validation_sequences else None
        training, validation = stage2_datasets(a.data, held_out, tokenizer, a.sequence_length, a.seed, a.pack)
        agreed = agreed_settings(vars(a), settings, tokenizer)
        run_stage(grid, config, a.tokenizer or a.model, training, validation, settings, agreed)
        grid.close()


if __name__ == "__main__":
    main()
