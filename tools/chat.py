"""Chat with a checkpoint: one prompt, one answer.

    python -m tools.chat MODEL_DIR --prompt "Why is the sky blue?"
    torchrun --standalone --nproc-per-node 8 -m tools.chat MODEL_DIR --tp 8 --prompt "Why is the sky blue?"
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eval_niah import Checkpoint
from parallel import Grid, add_grid_arguments, finish, launched, parse_once, print_once
from sft import encode_chat, end_of_turn


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a checkpoint.")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--prompt", required=True, help="the user's message")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without a chat template")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus size when sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto: bfloat16 on GPU, float32 on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_grid_arguments(parser)
    return parse_once(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Answer one prompt and print the answer."""
    a = parse_arguments(argv)
    try:
        for name, value, fits in (("--max-new-tokens", a.max_new_tokens, a.max_new_tokens >= 1),
                                  ("--temperature", a.temperature, 0 <= a.temperature < float("inf")),
                                  ("--top-p", a.top_p, 0 < a.top_p <= 1)):
            if not fits:
                raise ValueError(f"{name} {value} is out of range")
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
    except (ValueError, OSError, ArithmeticError) as error:
        finish(error)


if __name__ == "__main__":
    main()
