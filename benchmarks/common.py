"""What several benchmarks share: a small Llama, a random batch, one training step of a model."""
from __future__ import annotations

import torch

from data import Batch
from model import Llama
from parallel import ShardedAdamW
from train import training_step

LEARNING_RATE = 1e-4


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


def step(model: Llama, optimizer: ShardedAdamW, batch: Batch) -> float:
    """One step of train.py, all rows in one micro-batch: the mean loss, once the device has done
    everything."""
    loss, _ = training_step(model, optimizer, batch, len(batch.tokens))
    optimizer.step(LEARNING_RATE, max_norm=1.0)
    model.head_weight[0, 0].item()  # waits for the device
    return loss
