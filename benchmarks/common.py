"""What several benchmarks share: options, a small Llama, random and real tokens, one training step
of a model, the kernel that attention runs with, and a table of results."""
from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from data import Batch, load_tokenizer
from model import Llama
from parallel import Grid, ShardedAdamW
from train import ATTENTION, device_here, kernel_here, training_step

LEARNING_RATE = 1e-4


def parser(description: str, out: str, device: str | None = None) -> ArgumentParser:
    """The options that all have; `device` is the default, a GPU where there is one if not given."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--attention", choices=ATTENTION, default="auto")
    parser.add_argument("--device", type=device_here, choices=("cpu", "cuda"),
                        default=device or here)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def small_llama(hidden_size: int, layers: int, vocab_size: int, length: int) -> dict:
    """A config.json with heads of 64, four to a key-value head, and tied embeddings; hidden_size is
    a multiple of 256."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "hidden_act": "silu",
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "head_dim": 64,
        "max_position_embeddings": length,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def random_batch(vocab_size: int, length: int, rows: int = 1) -> Batch:
    """Rows of random tokens, each predicting the next."""
    tokens = torch.randint(vocab_size, (rows, length + 1),
                           generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def library_tokens(model: Path, count: int) -> torch.Tensor:
    """The first tokens of a file of the standard library, by a model directory's tokenizer: (1,
    count) int64."""
    source = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text()
    return torch.tensor([load_tokenizer(model).encode_ordinary(source)[:count]])


def step(model: Llama, optimizer: ShardedAdamW, batch: Batch) -> float:
    """One step of train.py, all rows in one micro-batch: the mean loss, once the device has done
    everything."""
    loss, _ = training_step(model, optimizer, batch, len(batch.tokens))
    optimizer.step(LEARNING_RATE, max_norm=1.0)
    model.head_weight[0, 0].item()  # waits for the device
    return loss


def start_kernel(options: Namespace, dtype: str, head_dim: int, length: int,
                 cp: int = 1, tp: int = 1) -> tuple[str, str]:
    """The kernel that --attention and --device give for sequences of `length`, and why; made ready
    in this process."""
    chunk = Grid(cp=cp, tp=tp).chunk(length)
    return kernel_here(options.attention, options.device, getattr(torch, dtype), head_dim, chunk)


def machine(device: str) -> dict[str, str]:
    """What a table was measured on."""
    if not device.startswith("cuda"):
        name = f"CPU, {torch.get_num_threads()} threads"
        return {"device": name, "torch": torch.__version__}
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(command, capture_output=True, text=True).stdout
        driver = printed.partition("\n")[0]
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def in_words(machine: dict[str, str]) -> str:
    """A line for people: "NVIDIA H100 80GB HBM3, driver 580.159.04, torch 2.11.0, ..."."""
    words = [f"{name} {value}" for name, value in machine.items()]
    return ", ".join(words).removeprefix("device ")


class Table:
    """Rows that are printed (markdown) and saved (JSON) one by one: what is stopped loses none.

    Table(path, title, "cpu", {}, {"S": ",", "peak GiB": ".2f"}) prints the title, the machine and
    "| S | peak GiB |"; then add({"S": 1024, "loss": 2.5}) prints "| 1,024 | - |" and saves all of
    it. `facts` go into the JSON.
    """

    def __init__(self, path: Path, title: str, device: str, facts: dict,
                 columns: dict[str, str]) -> None:
        self.path = path
        self.columns = columns
        self.result = {"title": title, **machine(device), **facts, "rows": []}
        print(f"\n{title}\n\n{in_words(machine(device))}\n")
        self.line(columns)
        self.line(["---"] * len(columns))

    @property
    def rows(self) -> list[dict]:
        return self.result["rows"]

    def line(self, cells) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    def add(self, row: dict) -> None:
        cells = []
        for name, form in self.columns.items():
            value = row.get(name)
            cells.append("-" if value is None else format(value, form))
        self.line(cells)
        self.rows.append(row)
        self.save()

    def save(self, **facts) -> None:
        """Write everything so far, and `facts`."""
        self.result |= facts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
