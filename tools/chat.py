"""Chat with a checkpoint: one prompt, one answer.

    python -m tools.chat MODEL_DIR --prompt "Why is the sky blue?"
    torchrun --standalone --nproc-per-node 8 -m tools.chat MODEL_DIR --tp 8 \\
        --prompt "Why is the sky blue?"
"""
from __future__ import annotations

import torch

import data
from eval_niah import checkpoint_parser, load_model, read_checkpoint
from parallel import Grid, launched, one_line_errors, print_once
from sft import encode_question
from train import Parser, nonnegative, nonnegative_number, option, positive

nucleus = option(float, lambda share: 0 < share <= 1, "a number above 0, at most 1")


def parser() -> Parser:
    parser = checkpoint_parser("Chat with a checkpoint.")
    add = parser.add_argument_group("chat").add_argument
    add("--prompt", required=True, help="the user's message")
    add("--system", help="a system message before it")
    add("--raw", action="store_true",
        help="continue the prompt as plain text, without a chat template")
    add("--max-new-tokens", type=positive, default=200, help="of the answer")
    add("--temperature", type=nonnegative_number, default=0.0, help="0 is greedy")
    add("--top-p", type=nucleus, default=0.9, help="nucleus size when sampling")
    add("--seed", type=nonnegative, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Answer one prompt and print the answer."""
    with one_line_errors():
        a = parser().parse_args(argv)
        if launched()[1] != a.tp * a.cp:
            raise ValueError(f"--tp {a.tp} x --cp {a.cp} must be the number of processes, "
                             f"{launched()[1]}: one prompt has no use for data parallelism")
        grid = Grid.create(a.tp, a.cp, a.device, a.timeout)
        config, tokenizer = read_checkpoint(a, grid)
        if a.raw:
            tokens = tokenizer.encode_ordinary(a.prompt)
        else:
            tokens = encode_question(a.prompt, tokenizer, a.system or None)
        stops = tuple(data.stop_tokens(tokenizer, config.hf.get("eos_token_id")))
        window = config.max_position_embeddings
        if not tokens or len(tokens) + a.max_new_tokens > window:
            raise ValueError(f"--prompt has {len(tokens)} tokens and --max-new-tokens is "
                             f"{a.max_new_tokens}: together they must fit the model's window of "
                             f"{window}, and the prompt not be empty")
        model = load_model(a, grid)
        prompt = torch.tensor([tokens], device=a.device)
        output = model.generate(prompt, a.max_new_tokens, a.temperature, a.top_p, stops, a.seed)
        new = output[0, len(tokens):].tolist()
        # ids beyond the tokenizer's only pad the model's vocabulary
        answer = [token for token in new if token not in stops and token < tokenizer.n_vocab]
        print_once(tokenizer.decode(answer))
        grid.close()


if __name__ == "__main__":
    main()
