"""A small Llama with every memory option, and a batch for it."""
import torch

from data import Batch
from model import Llama, ModelConfig

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "attention_bias": True,
}
MEMORY_MODES = [  # (recompute, offload): all there are
    ("none", False),
    ("mlp", False),
    ("mlp", True),
    ("block", False),
    ("block", True),
]


def build(dtype=torch.float64, recompute="none", offload=False, tile=None, **changes):
    model = Llama(ModelConfig.from_hf(SHAPE | changes)).initialise(0).to(dtype)
    model.recompute = recompute
    model.offload = offload
    model.tile = tile
    return model


def exact_rotary_tables(positions: torch.Tensor, inv_freq: torch.Tensor, factor: float):
    """`rope_yarn.rotary_tables` in float64, where a document's place changes nothing."""
    angles = positions.double()[:, None] * inv_freq
    return angles.cos() * factor, angles.sin() * factor


def batch(rows: int, length: int, vocab_size: int = 512) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    generator = torch.Generator().manual_seed(2)
    without_loss = torch.rand(rows, length, generator=generator) < 0.3
    targets = tokens[:, 1:].masked_fill(without_loss, -100)
    return Batch(tokens[:, :-1], targets)
