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

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from benchmarks import common
from model import Llama, ModelConfig
from parallel import Grid, ShardedAdamW
from train import peak_memory_gib

WEIGHT_DECAY = 0.1


def our_step(config: dict, dtype: torch.dtype, device: str, recompute: bool):
    """A function that makes one step of train.py on a batch and returns the mean loss."""
    model = Llama(ModelConfig.from_hf(config)).initialise(0).to(device, dtype)
    model.recompute = "mlp" if recompute else "none"
    optimizer = ShardedAdamW(model, Grid(), weight_decay=WEIGHT_DECAY)

    return lambda batch: common.step(model, optimizer, batch)


def transformers_step(config: dict, dtype: torch.dtype, device: str, recompute: bool):
    """The same step with transformers' model (SDPA attention) and torch's AdamW, from the same
    weights."""
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
          threads: int, recompute: bool) -> None:
    """Child process: one step whenever asked, answering (seconds, loss, peak GiB)."""
    torch.set_num_threads(threads)
    step = build(config, dtype, device, recompute)
    batch = common.random_batch(config["vocab_size"], length, rows)
    while pipe.recv():
        start = time.perf_counter()
        loss = step(batch)
        pipe.send((time.perf_counter() - start, loss, peak_memory_gib(device)))


def compare(config: dict, rows: int, dtype: str, length: int, device: str, threads: int,
            recompute: bool, repeats: int) -> dict:
    """Interleaved steps of both in one type at one sequence length."""
    context = multiprocessing.get_context("spawn")
    sides = {}
    for name, build in (("ours", our_step), ("transformers", transformers_step)):
        pipe, other = context.Pipe()
        arguments = (other, build, config, rows, length, getattr(torch, dtype), device, threads,
                     recompute)
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
    row = {"dtype": dtype, "length": length}
    for name, (process, pipe, results) in sides.items():
        if not process.is_alive():  # the system ended it: out of memory
            row[name] = None
            continue
        pipe.send(False)
        process.join()
        seconds = [seconds for seconds, _, _ in results[1:]]  # the first step warms up
        row[name] = {
            "tokens_per_second": rows * length / statistics.median(seconds),
            "seconds": seconds,
            "losses": [loss for _, loss, _ in results],
            "peak_gib": results[-1][2],
        }
    if not (row["ours"] and row["transformers"]):
        return row
    row["speed_ratio"] = row["ours"]["tokens_per_second"] / row["transformers"]["tokens_per_second"]
    row["memory_ratio"] = row["ours"]["peak_gib"] / row["transformers"]["peak_gib"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/train_step.json"))
    a = parser.parse_args()
    device = f"CPU, {a.threads} threads"
    if a.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {a.layers} layers of width {a.hidden_size}, "
          f"vocabulary {a.vocab_size}")
    rows = []
    for dtype in a.dtypes:
        for length in a.lengths:
            config = common.small_llama(a.hidden_size, a.layers, a.vocab_size, length)
            rows.append(compare(config, a.batch_size, dtype, length, a.device, a.threads,
                                a.recompute, a.repeats))
    print(f"{'type':>8} {'S':>6} {'ours tok/s':>11} {'HF tok/s':>11} {'speed':>7} {'ours GiB':>9} "
          f"{'HF GiB':>8} {'memory':>7} {'loss difference':>16}")
    for row in rows:
        ours = row["ours"]
        other = row["transformers"]
        if not (ours and other):
            cells = []
            for side in (ours, other):
                if side:
                    cells.append(f"{side['tokens_per_second']:,.0f} tokens/s, "
                                 f"{side['peak_gib']:.2f} GiB")
                else:
                    cells.append("out of memory")
            print(f"{row['dtype']:>8} {row['length']:>6} ours {cells[0]}; transformers {cells[1]}")
            continue
        pairs = zip(ours["losses"], other["losses"], strict=True)
        difference = max(abs(x - y) for x, y in pairs)
        print(f"{row['dtype']:>8} {row['length']:>6} {ours['tokens_per_second']:>11,.0f} "
              f"{other['tokens_per_second']:>11,.0f} "
              f"{row['speed_ratio']:>6.2f}x {ours['peak_gib']:>9.2f} {other['peak_gib']:>8.2f} "
              f"{row['memory_ratio']:>6.2f}x {difference:>16.1e}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "arguments": vars(a),
                                 "rows": rows}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
