"""Chat with a checkpoint: one prompt, one answer.

    python -m tools.chat MODEL_DIR --prompt "Why is the sky blue?"
    torchrun --standalone --nproc-per-node 8 -m tools.chat MODEL_DIR --tp 8 --prompt "Why is the sky blue?"
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data import encode_chat, end_of_turn
from eval_niah import Checkpoint
from parallel import (
    Grid,
    Parser,
    add_grid_arguments,
    checked,
    launched,
    nonnegative_number,
    one_line_errors,
    positive,
    print_once,
)


def nucleus(text: str) -> float:
    return checked(float, text, lambda x: 0 < x <= 1, "a number above 0, at most 1")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("Chat with a checkpoint.")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--prompt", required=True, help="the user's message")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without a chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=200, help="of the answer")
    parser.add_argument("--temperature", type=nonnegative_number, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="nucleus size when sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto: bfloat16 on GPU, float32 on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_grid_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Answer one prompt and print the answer."""
    with one_line_errors():
        a = parse_arguments(argv)
        if launched()[1] != a.tp * a.cp:
            raise ValueError(f"--tp {a.tp} x --cp {a.cp} must be the number of processes, {launched()[1]}: one prompt has no "
                             "use for data parallelism")
        checkpoint = Checkpoint.open(a.model, None, a.tp, a.cp, a.device, a.dtype)
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        if a.raw:
            tokens, stops = tokenizer.encode_ordinary(a.prompt), ()
        else:
            system = [{"role": "system", "content": a.system}] if a.system else []
            messages = [*system, {"role": "user", "content": a.prompt}]
            tokens, stops = encode_chat(messages, tokenizer, add_generation_prompt=True)[0], (end_of_turn(tokenizer),)
        if not tokens or len(tokens) + a.max_new_tokens > config.max_position_embeddings:
            raise ValueError(f"--prompt has {len(tokens)} tokens and --max-new-tokens is {a.max_new_tokens}: together they "
                             f"must fit the model's window of {config.max_position_embeddings}, and the prompt not be empty")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        model = checkpoint.load(grid)
        prompt = torch.tensor([tokens], device=a.device)
        output = model.generate(prompt, a.max_new_tokens, a.temperature, a.top_p, stops, a.seed)
        answer = [t for t in output[0, len(tokens):].tolist() if t not in stops and t < tokenizer.n_vocab]
        print_once(tokenizer.decode(answer))
        grid.close()


if __name__ == "__main__":
    main()
