"""Llama in plain PyTorch: configuration, blocks, memory-tiled loss, generation, Hugging Face load and save.

Read from the top: `ModelConfig` is what a config.json says, `Attention`, `MLP` and `Block` are one layer, `RecomputedBlock`
the same layer in less memory, `Llama` stacks them. In shapes, m is S / (cp tp): the positions that a rank holds between
attentions. Module names are Hugging Face's, so `state_dict()` keys are the names in a checkpoint's safetensors. Llama 2, 3,
3.1, 3.2 and Qwen2 differ only in what `ModelConfig` says. `python -m tools.chat MODEL_DIR` talks to a checkpoint.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu

from data import read_object, read_weights, write_weights
from parallel import (
    ColumnParallelLinear,
    GatherSequence,
    Grid,
    RowParallelLinear,
    VocabParallelEmbedding,
    attend_earlier,
    document_segments,
    gathered,
    ring_attention,
    ring_backward,
    ring_forward,
    scattered,
    shard_dims,
    vocab_parallel_cross_entropy,
    whole_shape,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from rope_yarn import (
    ORIGINAL,
    RopeScaling,
    apply_rotary,
    inverse_frequencies,
    is_number,
    ntk_theta,
    rotary_tables,
    stated_value,
)

TILE_BYTES = {"cpu": 2**27, "cuda": 2**30}  # what one tile of positions may take on its way through the loss or a block
RECOMPUTE = ("none", "mlp", "block")
VOCABULARY_TILE = 8192  # rows of the head's gradient that are added up at a time


# ---------------------------------------------------------------------------------------------- configuration


SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
SPLIT_BY_TP = ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")
ONLY = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}  # other values are other architectures
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under Hugging Face's names. `hf` keeps the other keys of the config.json it came from.

    Raises ValueError naming the key of config.json that is missing or means nothing.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    hf: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SHAPE:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, found {value!r}")
        for name, least in (("rms_norm_eps", 0), ("initializer_range", 0), ("rope_theta", 1)):
            value = getattr(self, name)
            if not is_number(value) or value <= least:
                raise ValueError(f"config.json: {name} must be a number above {least}, found {value!r}")
        for name in ("tie_word_embeddings", "qkv_bias", "output_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config.json: {name.replace('qkv_bias', 'attention_bias')} must be true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; rotary embedding turns pairs, so it must be even")

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """Read a config.json of transformers 4 or 5; a key that is left out has transformers' default."""
        family = config.get("model_type", "llama")
        if family not in ARCHITECTURES:
            raise ValueError(f"config.json: model_type {family!r} is not supported; supported are llama and qwen2")
        for key, needed in ONLY.items():
            if config.get(key, needed) != needed:
                raise ValueError(f"config.json: {key} is {config[key]!r}; only {needed!r} is supported")
        shape = {name: config.get(name) for name in SHAPE}
        heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
        if shape["num_key_value_heads"] is None:
            shape["num_key_value_heads"] = heads
        if shape["head_dim"] is None and is_number(heads) and is_number(hidden) and heads > 0:
            if hidden % heads:
                raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; state "
                                 "head_dim or change one of them")
            shape["head_dim"] = hidden // heads
        if shape["max_position_embeddings"] is None:
            shape["max_position_embeddings"] = 2048
        scaling, bias = RopeScaling.from_hf(config), config.get("attention_bias", False)
        found = cls(**shape, rope_theta=stated_value(config, "rope_theta", 10000.0), rope_scaling=scaling,
                    rms_norm_eps=config.get("rms_norm_eps", 1e-6), initializer_range=config.get("initializer_range", 0.02),
                    tie_word_embeddings=config.get("tie_word_embeddings", False),
                    qkv_bias=True if family == "qwen2" else bias, output_bias=bias if family == "llama" else False,
                    hf=dict(config))
        if scaling.kind == "yarn" and stated_value(config, ORIGINAL):  # Qwen2.5's documented edit leaves the old window there
            extended = round(scaling.original_max_position * scaling.factor)
            return replace(found, max_position_embeddings=max(found.max_position_embeddings, extended))
        return found

    def to_hf(self) -> dict:
        """A config.json that transformers 4.43+, transformers 5 and vLLM read, and compute the same model from."""
        theta, scaling = self.rope_theta, self.rope_scaling
        if scaling.kind == "ntk":  # Hugging Face has no static NTK kind: it is the default kind at a larger theta
            theta, scaling = ntk_theta(theta, scaling.factor, self.head_dim), RopeScaling()
        rope = None if scaling.kind == "default" else scaling.to_hf()
        if scaling.kind == "yarn" and self.window_before() is None:  # stated now, it would be read as half an extension
            del rope["original_max_position_embeddings"]
        config = dict(self.hf)
        for key in ("rope_parameters", "original_max_position_embeddings", "dtype"):  # they would contradict what follows
            config.pop(key, None)
        family = config.get("model_type", "qwen2" if self.qkv_bias and not self.output_bias else "llama")
        if family == "llama":
            config["attention_bias"] = self.output_bias
        for name in (*SHAPE, "rms_norm_eps", "initializer_range", "tie_word_embeddings"):
            config[name] = getattr(self, name)
        return config | {"architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu",
                         "rope_theta": theta, "rope_scaling": rope}

    def window_before(self) -> int | None:
        """The window before extension; None where the checkpoint does not say.

        A linear rule's config.json states the new window alone. So does yarn's if it leaves the old one out: its frequencies
        are then computed as if nothing had been extended, as transformers does.
        """
        scaling = self.rope_scaling
        if scaling.kind == "default":
            return self.max_position_embeddings
        window = self.hf.get("max_position_embeddings")
        as_read = window == self.max_position_embeddings and scaling == RopeScaling.from_hf(self.hf)
        return None if as_read and not stated_value(self.hf, ORIGINAL) else scaling.original_max_position

    def check_tp(self, tp: int) -> None:
        """Raise ValueError unless tensor parallelism can cut everything that it cuts into `tp` pieces."""
        for name in SPLIT_BY_TP:
            if getattr(self, name) % tp:
                raise ValueError(f"--tp {tp} does not divide the model's {name}, {getattr(self, name)}")


# ----------------------------------------------------------------------------------------------- architecture


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions; a tp rank has H / tp and Hkv / tp heads."""

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.head_dim, self.grid = config.head_dim, grid
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = ColumnParallelLinear(config.hidden_size, q_size, grid, bias=config.qkv_bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, kv_size, grid, bias=config.qkv_bias)
        self.v_proj = ColumnParallelLinear(config.hidden_size, kv_size, grid, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(q_size, config.hidden_size, grid, bias=config.output_bias)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, m, hidden), tables (tp, m, D / 2) -> q, k turned, and v: (B, tp, m, this rank's heads x D)."""
        x = GatherSequence.apply(x, self.grid)  # (B, m, hidden) -> (B, tp, m, hidden), once for all three
        q = self.rotate(self.q_proj(x), cos, sin)  # (B, tp, m, H / tp x D)
        k = self.rotate(self.k_proj(x), cos, sin)  # (B, tp, m, Hkv / tp x D)
        v = self.v_proj(x)
        return q, k, v

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn every head of x (B, tp, m, heads x D)."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(2, 3)  # (B, tp, heads, m, D)
        x = apply_rotary(x, cos[:, None], sin[:, None])
        return x.transpose(2, 3).flatten(3)  # (B, tp, m, heads x D)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, tp, m, heads x D) -> (B, heads, S / cp, D): how attention wants it."""
        return x.flatten(1, 2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join_heads(self, x: Tensor) -> Tensor:
        """(B, heads, S / cp, D) -> (B, tp, m, heads x D): how projections want it."""
        return x.transpose(1, 2).flatten(2).unflatten(1, (self.grid.tp, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): (B, m, hidden) -> the same."""

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.gate_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, grid)
        self.up_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, grid)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, grid)

    def forward(self, x: Tensor) -> Tensor:
        x = GatherSequence.apply(x, self.grid)  # (B, tp, m, hidden), once for both
        gate, up = self.gate_proj(x), self.up_proj(x)  # (B, tp, m, intermediate / tp)
        return self.down_proj(F.silu(gate) * up)  # (B, m, hidden)


class Block(nn.Module):
    """One pre-norm transformer layer, (B, m, hidden) -> the same: what stands before attention, attention, what stands after.

    Before and after, every position is on its own, so both can run on a tile of positions at a time.
    """

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)  # x / sqrt(mean(x^2) + eps) * weight
        self.self_attn = Attention(config, grid)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, grid)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A tile of x (B, m, hidden) -> its q, k, v, see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """A tile of x (B, m, hidden) and of attention's output (B, tp, m, heads x D) -> the block's output (B, m, hidden)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """`before` of all of x, in tiles -> q, k, v (B, heads, S / cp, D)."""
        q, k, v = in_tiles(self.before, (x, cos, sin), tile)
        split = self.self_attn.split_heads
        return split(q), split(k), split(v)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable, tile: int) -> Tensor:
        """attend: (q, k, v) -> out, all (B, heads, S / cp, D): within the tokens, with a cache's, or by document."""
        q, k, v = self.queries_keys_values(x, cos, sin, tile)
        attended = self.self_attn.join_heads(attend(q, k, v))
        x, = in_tiles(self.after, (x, attended), tile)
        return x


# -------------------------------------------------------------------------------- less memory: tiles, recomputation


def in_tiles(function: Callable, inputs: tuple[Tensor, ...], tile: int) -> tuple[Tensor, ...]:
    """function(*inputs), a tensor or several, on `tile` positions (dimension -2) at a time; always as a tuple."""
    length = inputs[0].shape[-2]
    whole = ()
    for start in range(0, length, tile):
        place = (..., slice(start, start + tile), slice(None))
        parts = function(*[x[place] for x in inputs])
        parts = (parts,) if isinstance(parts, Tensor) else parts
        if tile >= length:
            return parts
        if not whole:
            whole = tuple(part.new_empty(*part.shape[:-2], length, part.shape[-1]) for part in parts)
        for result, part in zip(whole, parts, strict=True):
            result[place] = part
    return whole


def tiles_backward(function: Callable, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...],
                   gradients: tuple[Tensor, ...], tile: int) -> list[Tensor]:
    """Gradients of `inputs` from those of function(*inputs, *constants), computed again a tile at a time.

    What a tile keeps for its backward is gone before the next tile begins. Gradients of parameters are added up where
    autograd always does, in `parameter.grad`.
    """
    d_inputs = [torch.empty_like(x) for x in inputs]
    for start in range(0, inputs[0].shape[-2], tile):
        place = (..., slice(start, start + tile), slice(None))
        leaves = [x[place].detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(*leaves, *[x[place] for x in constants])
        torch.autograd.backward(outputs, [gradient[place] for gradient in gradients])
        for d_input, leaf in zip(d_inputs, leaves, strict=True):
            d_input[place] = leaf.grad
    return d_inputs


class RecomputedBlock(torch.autograd.Function):
    """A block that keeps its input x alone and computes the rest again in backward, tile by tile (arXiv 1604.06174).

    With recompute "mlp" it also keeps what attention found, out and lse: all that backward needs of attention, which is by
    far the most work at long lengths, so its forward never runs twice. q, k and v are a projection away.
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: Block, cos: Tensor, sin: Tensor, segments: list[list[int]] | None, tile: int,
                recompute: str) -> Tensor:
        """x (B, m, hidden) -> the block's output, of the same shape."""
        ctx.block, ctx.tables, ctx.segments, ctx.tile = block, (cos, sin), segments, tile
        attention = block.self_attn
        q, k, v = block.queries_keys_values(x, cos, sin, tile)
        attended, lse = ring_forward(q, k, v, attention.grid, segments)
        del q, k, v
        attended = attention.join_heads(attended)  # kept in this layout, which save_on_cpu keeps too
        if recompute == "mlp":
            ctx.save_for_backward(x, attended, lse)
        else:
            ctx.save_for_backward(x)
        x, = in_tiles(block.after, (x, attended), tile)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The output's gradient (B, m, hidden) -> x's; those of parameters go into `parameter.grad`."""
        block, attention, tile = ctx.block, ctx.block.self_attn, ctx.tile
        x, *found = ctx.saved_tensors
        q, k, v = block.queries_keys_values(x, *ctx.tables, tile)
        if found:
            attended, lse = found
        else:
            attended, lse = ring_forward(q, k, v, attention.grid, ctx.segments)
            attended = attention.join_heads(attended)
        # 1. what stands after attention
        dx, d_attended = tiles_backward(block.after, (x, attended), (), (dy,), tile)
        # 2. attention
        out, d_out = attention.split_heads(attended), attention.split_heads(d_attended)
        gradients = ring_backward(d_out, q, k, v, out, lse, attention.grid, ctx.segments)
        del q, k, v, found, attended, d_attended, out, d_out
        # 3. what stands before it
        gradients = tuple(attention.join_heads(gradient) for gradient in gradients)
        d_before, = tiles_backward(block.before, (x,), ctx.tables, gradients, tile)
        return dx.add_(d_before), None, None, None, None, None, None


# ------------------------------------------------------------------------------------------------- the whole model


class KVCache:
    """Keys and values of every layer, spread over the ring: a rank keeps those of the positions it had when they were
    computed. More tokens may follow, any number at a time, and `truncate` forgets the last ones: prompts that begin alike
    compute what they share once. `capacity` is how many tokens a rank has room for; tokens that come one by one are all kept
    by the ring's first rank.
    """

    def __init__(self, config: ModelConfig, grid: Grid, batch: int, capacity: int, like: Tensor) -> None:
        heads = config.num_key_value_heads // grid.tp
        self.keys_values = like.new_empty(config.num_hidden_layers, 2, batch, heads, capacity, config.head_dim)
        self.grid, self.capacity = grid, capacity
        self.positions = torch.empty(0, dtype=torch.int64)  # of the tokens this rank holds, in order
        self.length = 0  # tokens in all

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.positions = self.positions[self.positions < length]
        self.length = min(length, self.length)

    def fullest(self) -> int:
        """How many tokens the rank of the ring holds that holds most: what was truncated may have lain on some ranks only."""
        held = torch.tensor(len(self.positions), device=self.keys_values.device)
        return self.grid.all_reduce(held, "cp", dist.ReduceOp.MAX).item()

    def attend(self, new: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the first `new` of k, v (B, Hkv / tp, s, D); out (B, H / tp, s, D) of q over all tokens so far."""
        keys, values = self.keys_values[layer]  # (B, Hkv / tp, capacity, D) each
        held = len(self.positions)
        assert held + new <= self.capacity, f"the KV cache has room for {self.capacity} tokens, not {held + new}"
        keys[:, :, held:held + new] = k[:, :, :new]
        values[:, :, held:held + new] = v[:, :, :new]
        out, lse = ring_forward(q, k, v, self.grid)
        if self.length:
            out = attend_earlier(q, out, lse, keys[:, :, :held], values[:, :, :held], self.grid)
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, grid)
        self.layers = nn.ModuleList(Block(config, grid) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama for causal language modelling, spread over a grid.

    `recompute`, one of RECOMPUTE, says what backward computes again rather than keeps: nothing; all but attention; whole
    blocks. `offload` keeps what recomputed blocks keep in host memory. `tile` is how many of a rank's S / cp positions go
    through a block or the loss at a time (None: as many as `positions_a_tile` says). Every public method is called on all
    ranks of a replica (cp x tp) with the same, whole rows of tokens; each rank computes its share and all return the same
    result. Raises ValueError if the grid does not fit the model.
    """

    def __init__(self, config: ModelConfig, grid: Grid | None = None) -> None:
        super().__init__()
        self.config, self.grid = config, grid or Grid()
        self.recompute, self.offload, self.tile = "none", False, None
        config.check_tp(self.grid.tp)
        self.model = Decoder(config, self.grid)
        if not config.tie_word_embeddings:
            self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, self.grid)

    def initialise(self, seed: int) -> Llama:
        """Normal(0, initializer_range) matrices, zero biases, unit norms: the same weights for the same seed.

        Each key projection starts equal to the first query projection that reads it, so a token looks for its like from
        the first step on (mimetic initialisation, arXiv 2305.09828): a small model then learns to retrieve several
        times sooner, and by every seed.
        """
        generator, dims, grid = torch.Generator().manual_seed(seed), shard_dims(self), self.grid
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.ndim == 2:  # every rank draws the whole matrix and keeps its shard
                    values = torch.empty(whole_shape(parameter.shape, dims[name], grid))
                    values.normal_(0.0, self.config.initializer_range, generator=generator)
                    parameter.copy_(values.chunk(grid.tp, dims[name])[grid.tp_rank])
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        for block in self.model.layers:
            queries = block.self_attn.q_proj.weight.detach().unflatten(0, (-1, group, self.config.head_dim))
            keys = queries[:, 0].flatten(0, 1)  # (Hkv, group, D, hidden) -> (Hkv D, hidden)
            block.self_attn.k_proj.weight.detach().copy_(keys)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V / tp, hidden): the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def positions_a_tile(self, position_bytes: float, rows: int = 1) -> int:
        """How many of m positions in each of `rows` rows make a tile: `self.tile` or as many as TILE_BYTES hold, over all of
        the tp ranks and the rows."""
        tile = self.tile or TILE_BYTES[self.head_weight.device.type] // position_bytes
        return max(1, int(tile) // (self.grid.tp * rows))

    def pad(self, rows: Tensor, value: int = 0) -> Tensor:
        """(B, S) -> (B, S'): whole rows padded on the right to a length the grid divides evenly."""
        return F.pad(rows, (0, -rows.shape[1] % self.grid.sequence_multiple), value=value)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of this rank's positions (S / cp,): float32 (tp, m, D / 2) each, for all layers."""
        config = self.config
        inv_freq, factor = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = rotary_tables(positions.to(self.head_weight.device), inv_freq, factor)  # (S / cp, D / 2)
        return cos.unflatten(0, (self.grid.tp, -1)), sin.unflatten(0, (self.grid.tp, -1))

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The last block's output, before the final norm: whole rows (B, S) int64 -> this rank's (B, m, hidden).

        m is S / (cp tp), of S padded on the right to what the grid divides evenly: no earlier position sees the padding.
        `document_ids` (B, S) masks documents apart. With a cache the tokens follow those it holds.
        """
        grid, length = self.grid, tokens.shape[1]
        assert self.recompute in RECOMPUTE, f"recompute is {self.recompute!r}; it must be one of {', '.join(RECOMPUTE)}"
        check_ids(tokens, self.config.vocab_size)
        tokens = self.pad(tokens)
        positions = zigzag_positions(tokens.shape[1], grid)
        new = int((positions < length).sum())  # the others, which come last, are padding
        positions += cache.length if cache else 0
        cos, sin = self.rotary_tables(positions)
        segments = None if document_ids is None else document_segments(self.pad(document_ids))

        local = zigzag_shard(tokens, grid, 1).unflatten(1, (grid.tp, -1))  # (B, S) -> (B, tp, m)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        tile = self.positions_a_tile(block_bytes(self.config, grid.tp, self.head_weight.itemsize), len(tokens))
        x = self.model.embed_tokens(local, tile)  # (B, m, hidden)
        if torch.is_grad_enabled() and recompute == "none":
            tile = x.shape[1]  # backward needs everything at once
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload and recompute != "none" else nullcontext():
            for layer, block in enumerate(self.model.layers):
                if recompute != "none":
                    x = RecomputedBlock.apply(x, block, cos, sin, segments, tile, recompute)
                elif cache:
                    x = block(x, cos, sin, functools.partial(cache.attend, new, layer), tile)
                else:
                    x = block(x, cos, sin, functools.partial(ring_attention, grid=grid, segments=segments), tile)
        if cache:
            cache.positions = torch.cat([cache.positions, positions[:new]])  # every layer has stored these
            cache.length += length
        return x

    def hidden_at(self, tokens: Tensor, places: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final-norm hidden states of some places in rows of tokens, on every rank: (B, S), (B, n) int64 -> (B, n, hidden)."""
        grid = self.grid
        hidden = self.hidden_states(tokens, cache=cache)  # (B, m, hidden)
        length = hidden.shape[1] * grid.cp * grid.tp
        held = zigzag_positions(length, grid).chunk(grid.tp)[grid.tp_rank]  # (m,): the places that this rank has, in order
        held = held.to(places.device)
        index = torch.searchsorted(held, places.contiguous()).clamp(max=len(held) - 1)[..., None]  # (B, n, 1)
        rows = hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))  # (B, n, hidden)
        rows = rows.masked_fill(held[index] != places[..., None], 0.0)  # another rank's
        return self.model.norm(grid.all_reduce(rows, "cp_tp"))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token from hidden states that every rank has: (..., hidden) -> (..., V)."""
        parts = self.grid.all_gather(F.linear(hidden, self.head_weight), "tp")  # (tp, ..., V / tp)
        return parts.movedim(0, -2).flatten(-2)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache for `batch` rows, with room for `capacity` tokens of each on every rank."""
        return KVCache(self.config, self.grid, batch, capacity, self.head_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position: tokens (B, S) int64 -> (B, S, V). For a loss use `loss`, which never builds them."""
        hidden = self.model.norm(self.hidden_states(tokens))  # (B, m, hidden)
        hidden = GatherSequence.apply(hidden, self.grid).flatten(1, 2)  # (B, S / cp, hidden)
        return zigzag_unshard(self.logits(hidden), self.grid, 1)[:, :tokens.shape[1]]

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the targets that are not -100, and their number; no S x V logits exist.

        tokens, targets (B, S) int64, whole rows, targets already shifted. Returns (float32 scalar, int64 scalar), the same
        on every rank of the replica: divide the sum by the number over the whole global batch. Backward on every rank leaves
        each its share of the gradients. A batch without a target gives (0, 0) and zero gradients.
        """
        hidden = self.hidden_states(tokens, document_ids)  # (B, m, hidden)
        check_ids(targets.masked_fill(targets == -100, 0), self.config.vocab_size)
        norm = self.model.norm
        tile = self.positions_a_tile(logit_bytes(self.config, self.grid.tp, hidden.itemsize))
        losses = TiledCrossEntropy.apply(hidden, norm.weight, self.head_weight, norm, self.local_targets(targets), self.grid,
                                         tile)
        return losses, (targets != -100).sum()

    def local_targets(self, targets: Tensor) -> Tensor:
        """Targets of the positions this rank of the ring holds: whole rows (B, S) -> (B, tp, m)."""
        return zigzag_shard(self.pad(targets, -100), self.grid, 1).unflatten(1, (self.grid.tp, -1))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                 stop_tokens: tuple[int, ...] = (), seed: int | None = None, cache: KVCache | None = None) -> Tensor:
        """Continue prompts (B, S) of equal length -> (B, S + n) int64, n <= max_new_tokens.

        temperature 0 is greedy; otherwise nucleus sampling from the smallest set of probability >= top_p
        (arXiv 1904.09751). Ends once every row has produced a stop token; later tokens of a finished row repeat it. A `cache`
        that holds the first tokens of the prompts (fewer than S) saves computing them; it needs room for the new ones.
        """
        batch, length = tokens.shape
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
        done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        cache = cache or self.new_cache(batch, length // self.grid.cp + self.grid.sequence_multiple + max_new_tokens)
        for _ in range(max_new_tokens):
            self.grid.restart_timer()
            unread = tokens[:, cache.length:]  # the prompts, later the newest token
            last = torch.full((batch, 1), unread.shape[1] - 1, device=tokens.device)
            hidden = self.hidden_at(unread, last, cache)  # (B, 1, hidden)
            new = sample(self.logits(hidden[:, 0]).float(), temperature, top_p, generator)  # (B,)
            new = self.grid.broadcast(new, "cp_tp")  # without a seed every rank has drawn its own
            new = torch.where(done, tokens[:, -1], new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            done |= torch.isin(new, stops)
            if done.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, grid: Grid | None = None, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, rope_scaling: RopeScaling | None = None) -> Llama:
        """Load a Hugging Face directory (one safetensors file, or shards with an index).

        dtype None keeps the file's; `rope_scaling` replaces the checkpoint's own scaling (they never stack) and sets
        max_position_embeddings to original x factor. Raises ValueError or FileNotFoundError naming the file or tensor.
        """
        config = rescale(read_config(path), rope_scaling)
        with torch.device("meta"):  # no memory and no time for weights that are about to be replaced
            model = cls(config, grid)
        parameters = dict(model.named_parameters())
        weights = dict(read_weights(Path(path), "model", parameters, shard_dims(model), model.grid, dtype, device))
        model.load_state_dict(weights, strict=True, assign=True)
        return model

    def save_pretrained(self, path: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json and sharded safetensors with an index into the directory `path`, under HF names.

        Every rank calls this; the first puts whole tensors together, one file at a time, and writes what one process would.
        """
        path = Path(path)
        if self.grid.is_first:
            if (path / "config.json").exists():
                raise ValueError(f"{path}: already holds a model; choose another directory")
            path.mkdir(parents=True, exist_ok=True)
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        write_weights(path, "model", parameters.items(), parameters, shard_dims(self), self.grid, max_shard_bytes)
        if self.grid.is_first:
            config = self.config.to_hf() | {"torch_dtype": str(self.head_weight.dtype).removeprefix("torch.")}
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: without it this is no model


# ------------------------------------------------------------------------------------------------ loss, sampling


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise IndexError for a token outside the vocabulary: spread over ranks, none would miss it."""
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token ids from {int(low)} to {int(high)} do not lie in the vocabulary of {vocab_size}")


def block_bytes(config: ModelConfig, tp: int, itemsize: int) -> float:
    """What a position takes on its way through a block and back: its gathered input and that one's gradient, twice; gate, up,
    their product and both gradients."""
    return itemsize * (4 * config.hidden_size + 8 * config.intermediate_size / tp)


def logit_bytes(config: ModelConfig, tp: int, itemsize: int) -> float:
    """What a position takes in the loss: its logits in the compute type and in float32."""
    return config.vocab_size / tp * (itemsize + 4)


class TiledCrossEntropy(torch.autograd.Function):
    """Sum over targets of -log softmax(norm(x) @ weight.T)[target], a tile of positions at a time, with its gradients.

    The gradient of a row's logits is softmax - onehot, known as soon as the logits are. So a tile's logits are used up at
    once (for the loss, the gradient of x, the gradient of the weight) and overwritten by the next tile's, and backward
    multiplies stored results by a scalar. Beside the gradients memory is one tile's, and no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, weight: Tensor, norm: nn.RMSNorm, targets: Tensor, grid: Grid,
                tile: int) -> Tensor:
        """x (B, m, hidden), weight (V / tp, hidden), targets (B, tp, m) of all tp ranks, -100 for none -> float32 scalar
        (float64 for float64 input), the same on every rank. The norm's weight stands beside it so that autograd sees it.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        d_norm, d_weight = torch.zeros_like(norm_weight, dtype=wide), torch.zeros_like(weight, dtype=wide)
        rows, targets = x.flatten(0, 1), targets.movedim(1, 0).flatten(1)  # (B m, hidden), (tp, B m)
        d_rows = torch.empty_like(rows)
        tile = min(tile, len(rows))
        product = x.new_empty(grid.tp * tile, len(weight))  # (tp tile, V / tp), in the compute type: logits, later gradients
        exact = product if product.dtype == wide else torch.empty_like(product, dtype=wide)  # the same in float32
        tiles = zip(rows.split(tile), d_rows.split(tile), targets.split(tile, 1), strict=True)
        for part, d_part, target in tiles:
            # 1. the rows of all tp ranks, normed
            with torch.enable_grad():
                part = part.detach().requires_grad_()  # (tile, hidden)
                normed = norm(part)
            h = gathered(normed.detach()[None], grid).flatten(0, 2)  # (tp tile, hidden)
            target = target.flatten()  # (tp tile,)
            # 2. their logits
            logits, scores = product[:len(h)], exact[:len(h)]
            torch.mm(h, weight.T, out=logits)
            scores.copy_(logits)  # nothing, where both are one buffer
            # 3. their loss; the scores become (softmax - onehot) * normaliser, and back into the compute type
            losses, normaliser = vocab_parallel_cross_entropy(scores, target.clamp(min=0), grid)
            valid = (target != -100).to(wide)
            total += (losses * valid).sum()
            logits.copy_(scores)
            scale = valid[:, None] / normaliser  # rows without a target count as 0
            # 4. the gradient of the rows, through the norm
            d_h = torch.mm(logits, weight).mul_(scale)  # (tp tile, hidden): this rank's part of a sum over tp
            d_normed = scattered(d_h.view(1, grid.tp, -1, d_h.shape[1]), grid)[0]  # (tile, hidden), summed
            d_input, d_n = torch.autograd.grad(normed, (part, norm_weight), d_normed)
            d_part.copy_(d_input)
            d_norm += d_n
            # 5. the gradient of the head: products of the compute type, summed in float32
            h = (h * scale).to(h.dtype)
            for d_w, columns in zip(d_weight.split(VOCABULARY_TILE), logits.split(VOCABULARY_TILE, dim=1), strict=True):
                d_w += columns.T @ h
        ctx.save_for_backward(d_rows.view(x.shape), d_norm, d_weight)
        return grid.all_reduce(total, "cp")  # of a rank's own part the gradient is 1: backward does not communicate

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_norm, d_weight = ctx.saved_tensors
        return d_x.mul_(d_total), d_norm.mul_(d_total), d_weight.mul_(d_total), None, None, None, None


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row from logits (B, V) -> (B,) int64; temperature 0 takes the largest."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ranked above
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


# ------------------------------------------------------------------------------------- Hugging Face directories


def read_config(path: str | Path) -> ModelConfig:
    """ModelConfig of a model directory, or of a config.json itself. Raises FileNotFoundError or ValueError, one line."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no config.json there; give a Hugging Face model directory (of a run: its `final`)")
    return ModelConfig.from_hf(read_object(file))


def rescale(config: ModelConfig, scaling: RopeScaling | None) -> ModelConfig:
    """`config` with `scaling` in place of its own rope scaling (they never stack), and the window that follows.

    None changes nothing: the window is a fact of its own, no product of the rule. Raises ValueError where the window before
    the checkpoint's own scaling is needed and not known.
    """
    if scaling is None:
        return config
    before = config.window_before()
    if scaling.kind == "default":
        return replace(config, rope_scaling=scaling, max_position_embeddings=before or config.max_position_embeddings)
    original = scaling.original_max_position or before
    if original is None:
        raise ValueError(f"--original-length is needed: a checkpoint with such {config.rope_scaling.kind} scaling does not "
                         "state its window before")
    return replace(config, rope_scaling=replace(scaling, original_max_position=original),
                   max_position_embeddings=round(original * scaling.factor))


