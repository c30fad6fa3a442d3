"""One training step, ours against transformers' LlamaForCausalLM: tokens/s and peak memory,
interleaved.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --lengths 16384 --recompute --repeats 2
    python -m benchmarks.train_step --dtypes float32 --lengths 256 --vocab-size 4096 --repeats 2

The first has S = 2,048 and 8,192 and Llama 3's vocabulary of 128,256; in the second both sides
recompute their blocks.

Same configuration, weights, dtype, batch and optimizer settings (AdamW, fused where transformers'
side allows it). Two child processes take turns, one step each, so that a slow minute of the machine
hits both; the ratio is of medians. Peak memory is the child's largest resident size (CPU) or
torch.cuda.max_memory_allocated. Prints a table, writes JSON. In bfloat16, transformers' side also
keeps its weights and AdamW's moments in bfloat16: less memory, less to compute and less exact than
our float32 state, so that row does not flatter ours.
"""
from __future__ import annotations

import multiprocessing
import statistics
import time

import torch

from benchmarks import common
from model import Llama, ModelConfig
from parallel import Grid, ShardedAdamW, one_line_errors
from train import activate, peak_memory_gib

WEIGHT_DECAY = 0.1
COLUMNS = {
    "type": "", "S": ",", "kernel": "", "ours, tokens/s": ",.0f", "transformers, tokens/s": ",.0f",
    "speed": ".2f", "ours, GiB": ".2f", "transformers, GiB": ".2f", "memory": ".2f",
    "loss difference": ".1e",
}


def our_step(config: dict, dtype: torch.dtype, device: str, recompute: bool, kernel: str):
    """A function that makes one step of train.py on a batch and returns the mean loss."""
    activate(kernel)
    grid = Grid(kernel=kernel)
    model = Llama(ModelConfig.from_hf(config), grid).initialise(0).to(device, dtype)
    model.recompute = "mlp" if recompute else "none"
    optimizer = ShardedAdamW(model, grid, weight_decay=WEIGHT_DECAY)

    return lambda batch: common.step(model, optimizer, batch)


def transformers_step(config: dict, dtype: torch.dtype, device: str, recompute: bool, kernel: str):
    """The same step with transformers' model and torch's AdamW, from the same weights. SDPA chooses
    its own kernel."""
    import transformers

    settings = {key: value for key, value in config.items() if key != "model_type"}
    hf = transformers.LlamaConfig(**settings)
    hf._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(hf).to(device, dtype)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    ours = Llama(ModelConfig.from_hf(config)).initialise(0)
    model.load_state_dict(ours.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=common.LEARNING_RATE, betas=(0.9, 0.95),
                                  weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch):
        tokens = batch.tokens.to(device)
        targets = batch.targets.to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, shift_labels=targets, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def serve(pipe, build, config: dict, rows: int, length: int, dtype: torch.dtype, device: str,
          threads: int, recompute: bool, kernel: str) -> None:
    """Child process: one step whenever asked, answering (seconds, loss, peak GiB)."""
    torch.set_num_threads(threads)
    step = build(config, dtype, device, recompute, kernel)
    batch = common.random_batch(config["vocab_size"], length, rows)
    while pipe.recv():
        start = time.perf_counter()
        loss = step(batch)
        pipe.send((time.perf_counter() - start, loss, peak_memory_gib(device)))


def compare(config: dict, rows: int, dtype: str, length: int, device: str, threads: int,
            recompute: bool, kernel: str, repeats: int) -> dict:
    """Interleaved steps of both in one type at one sequence length."""
    context = multiprocessing.get_context("spawn")
    sides = {}
    for name, build in (("ours", our_step), ("transformers", transformers_step)):
        pipe, other = context.Pipe()
        arguments = (other, build, config, rows, length, getattr(torch, dtype), device, threads,
                     recompute, kernel)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        sides[name] = (process, pipe, [])
    for _ in range(repeats + 1):
        for process, pipe, results in sides.values():
            if process.is_alive():
                pipe.send(True)
            while process.is_alive() and not pipe.poll(1.0):
                pass
            if pipe.poll():
                results.append(pipe.recv())
    row = {"type": dtype, "S": length, "kernel": kernel}
    losses = {}
    for name, (process, pipe, results) in sides.items():
        if not process.is_alive():  # the system ended it: out of memory
            continue
        pipe.send(False)
        process.join()
        seconds = [seconds for seconds, _, _ in results[1:]]  # the first step warms up
        row[f"{name}, tokens/s"] = rows * length / statistics.median(seconds)
        row[f"{name}, GiB"] = results[-1][2]
        row[f"{name}, seconds"] = seconds
        losses[name] = [loss for _, loss, _ in results]
    if len(losses) == 2:
        pairs = zip(losses["ours"], losses["transformers"], strict=True)
        row["speed"] = row["ours, tokens/s"] / row["transformers, tokens/s"]
        row["memory"] = row["ours, GiB"] / row["transformers, GiB"]
        row["loss difference"] = max(abs(x - y) for x, y in pairs)
    return row


def main() -> None:
    parser = common.parser(__doc__, "out/train_step.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", choices=("float32", "bfloat16"), nargs="+",
                        default=["float32", "bfloat16"])
    parser.add_argument("--recompute", action="store_true",
                        help="ours --recompute mlp, theirs gradient checkpointing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args()
    title = (f"A training step: {a.layers} layers of width {a.hidden_size}, vocabulary "
             f"{a.vocab_size}; what has no number ran out of memory")
    table = common.Table(a.out, title, a.device, {"arguments": vars(a)}, COLUMNS)
    for dtype in a.dtypes:
        for length in a.lengths:
            config = common.small_llama(a.hidden_size, a.layers, a.vocab_size, length)
            kernel, why = common.start_kernel(a, dtype, config["head_dim"], length)
            row = compare(config, a.batch_size, dtype, length, a.device, a.threads, a.recompute,
                          kernel, a.repeats)
            table.add(row | {"why": why})


if __name__ == "__main__":
    with one_line_errors():
        main()
