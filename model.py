"""Llama in plain PyTorch: configuration, blocks, memory-tiled loss, generation, Hugging Face load and save.

Read from the top: `ModelConfig` is what a config.json says, `Attention`, `MLP` and `Block` are one layer, `RecomputedBlock`
and `HostMemory` the same layer in less memory, `Llama` stacks them. In shapes, m is S / (cp tp): the positions that a rank
holds between attentions. Module names are Hugging Face's, so `state_dict()` keys are the names in a checkpoint's safetensors.
Llama 2, 3, 3.1, 3.2 and Qwen2 differ only in what `ModelConfig` says. `python -m tools.chat MODEL_DIR` talks to a checkpoint.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data import read_weights, write_weights
from parallel import (
    ColumnParallelLinear,
    Grid,
    RowParallelLinear,
    SumOverRing,
    VocabParallelEmbedding,
    attend_earlier,
    check_grid,
    decode_attention,
    document_segments,
    fused_linear,
    gather_sequence,
    gathered,
    launched,
    ring_attention,
    ring_backward,
    ring_forward,
    scattered,
    shard_dims,
    unshard,
    vocab_parallel_cross_entropy,
    whole_shape,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from rope_yarn import (
    RopeScaling,
    apply_rotary,
    inverse_frequencies,
    is_number,
    ntk_theta,
    rope_theta_from_hf,
    rotary_tables,
    stated_original,
)

TILE_BYTES = {"cpu": 2**27, "cuda": 2**30}  # what one tile of positions may take on its way through a block or the loss
RECOMPUTE = ("none", "mlp", "block")
NTK_KEY = "ntk_aware_scaling"  # our own key of config.json, beside the rope_theta that NTK-aware scaling came to
VOCABULARY_TILE = 8192  # rows of the head's gradient that are added up at a time


# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under Hugging Face's names. `hf` keeps the other keys of the config.json it came from."""

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
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    initializer_range: float = 0.02
    hf: dict = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """Read a config.json of transformers 4 or 5. Raises ValueError naming the key that is missing or unsupported."""
        family = config.get("model_type", "llama")
        if family not in ("llama", "qwen2"):
            raise ValueError(f"config.json: model_type {family!r} is not supported; supported are llama and qwen2")
        unsupported = {"hidden_act": (config.get("hidden_act", "silu"), "silu"),
                       "mlp_bias": (config.get("mlp_bias", False), False),
                       "use_sliding_window": (config.get("use_sliding_window", False), False)}
        for key, (found, needed) in unsupported.items():
            if found != needed:
                raise ValueError(f"config.json: {key} is {found!r}; only {needed!r} is supported")
        shape = {key: positive_integer(config, key) for key in
                 ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
        heads = shape["num_attention_heads"]
        kv_heads = positive_integer(config, "num_key_value_heads", default=heads)
        head_dim = positive_integer(config, "head_dim", default=shape["hidden_size"] // heads)
        if config.get("head_dim") is None and shape["hidden_size"] % heads:
            raise ValueError(f"config.json: hidden_size {shape['hidden_size']} is not a multiple of "
                             f"num_attention_heads {heads}; state head_dim or change one of them")
        if heads % kv_heads:
            raise ValueError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embedding turns pairs, so it must be even")
        for key in ("attention_bias", "tie_word_embeddings"):
            if not isinstance(config.get(key, False), bool):
                raise ValueError(f"config.json: {key} must be true or false, found {config[key]!r}")
        bias = config.get("attention_bias", False)
        theta, scaling, before = rope_theta_from_hf(config), RopeScaling.from_hf(config), config.get(NTK_KEY)
        if before:  # a model of ours: what its rope_theta was made from
            theta, scaling = before["rope_theta"], RopeScaling("ntk", before["factor"], before["original"])
        window = positive_integer(config, "max_position_embeddings", default=2048)
        if scaling.kind == "yarn" and stated_original(config):  # Qwen2.5's documented edit leaves the old window there
            window = max(window, round(scaling.original_max_position * scaling.factor))
        return cls(**shape, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=window,
                   rope_theta=theta, rope_scaling=scaling,
                   rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
                   tie_word_embeddings=config.get("tie_word_embeddings", False),
                   qkv_bias=family == "qwen2" or bias, output_bias=family == "llama" and bias,
                   initializer_range=positive_number(config, "initializer_range", 0.02), hf=dict(config))

    def window_before(self) -> int | None:
        """The window before extension; None where the checkpoint does not say.

        A linear rule's config.json states the new window alone. So does yarn's if it leaves the old one out: its frequencies
        are then computed as if nothing had been extended, as transformers does. (transformers 5 states it when it saves such
        a model: that file says what Qwen2.5's documented edit says, and is read as that.)
        """
        scaling = self.rope_scaling
        if scaling.kind == "default":
            return self.max_position_embeddings
        window = self.hf.get("max_position_embeddings")
        as_read = window == self.max_position_embeddings and scaling == RopeScaling.from_hf(self.hf)
        return None if as_read and not stated_original(self.hf) else scaling.original_max_position

    def shards(self) -> dict[str, int]:
        """What tensor parallelism cuts, by Hugging Face's names: tp must divide each."""
        return {name: getattr(self, name) for name in
                ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")}

    def matrices(self) -> dict[str, int]:
        """Elements of the weight matrices, by part: a forward pass multiplies each token by all but the embedding."""
        hidden, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        table = self.vocab_size * hidden
        return {"embedding": table, "head": 0 if self.tie_word_embeddings else table,
                "qkv": self.num_hidden_layers * hidden * (heads + 2 * kv_heads) * self.head_dim,
                "o": self.num_hidden_layers * hidden * heads * self.head_dim,
                "mlp": self.num_hidden_layers * 3 * hidden * self.intermediate_size}

    def forward_flops(self, sequence_length: int) -> tuple[int, int]:
        """FLOPs of one sequence's forward pass, of matrix products and of causal attention; backward takes twice as many.

        Causal: each query sees half of the keys on average. Counting all, as is common, doubles attention's share.
        """
        size = self.matrices()
        products = 2 * sequence_length * (size["qkv"] + size["o"] + size["mlp"] + self.vocab_size * self.hidden_size)
        heads = self.num_attention_heads * self.head_dim
        return products, self.num_hidden_layers * 2 * sequence_length**2 * heads  # Q K^T and P V: 2 x 2 S^2 / 2 each

    def to_hf(self) -> dict:
        """A config.json that transformers 4.43+, transformers 5 and vLLM read, and compute the same model from."""
        theta, scaling, note = self.rope_theta, self.rope_scaling, {}
        if scaling.kind == "ntk":  # Hugging Face has no static NTK kind: it is the default kind at a larger theta
            note = {NTK_KEY: {"rope_theta": theta, "factor": scaling.factor, "original": scaling.original_max_position}}
            theta, scaling = ntk_theta(theta, scaling.factor, self.head_dim), RopeScaling()
        written = None if scaling.kind == "default" else scaling.to_hf()
        if scaling.kind == "yarn" and self.window_before() is None:  # stated now, it would be read as half an extension
            del written["original_max_position_embeddings"]
        family = self.hf.get("model_type", "qwen2" if self.qkv_bias and not self.output_bias else "llama")
        kept = {key: value for key, value in self.hf.items() if key not in
                ("rope_parameters", "original_max_position_embeddings", "dtype", NTK_KEY)}  # they would contradict what follows
        architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
        bias = {"attention_bias": self.output_bias} if family == "llama" else {}
        return kept | bias | note | {
            "architectures": [architecture], "model_type": family, "hidden_act": "silu",
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings, "rope_theta": theta,
            "rope_scaling": written,
            "rms_norm_eps": self.rms_norm_eps, "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range}


def positive_integer(config: dict, key: str, default: int | None = None) -> int:
    """config[key] if it is an integer above zero; a missing or null key gives the default, if there is one."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive integer, found {config.get(key, 'nothing')!r}")
    return value


def positive_number(config: dict, key: str, default: float) -> float:
    """config[key], or the default where it is missing, if it is a finite number above zero."""
    value = config.get(key, default)
    if not is_number(value) or value <= 0:
        raise ValueError(f"config.json: {key} must be a number above 0, found {value!r}")
    return float(value)


# ----------------------------------------------------------------------------------------------- architecture


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions; a tp rank has H / tp and Hkv / tp heads."""

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.head_dim, self.grid = config.head_dim, grid
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = ColumnParallelLinear(config.hidden_size, q_size, grid, bias=config.qkv_bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, kv_size, grid, bias=config.qkv_bias)
        self.v_proj = ColumnParallelLinear(config.hidden_size, kv_size, grid, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(q_size, config.hidden_size, grid, bias=config.output_bias)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x (B, m, hidden), tables (tp, m, D / 2) -> q, k turned, and v: (B, tp, m, this rank's heads x D)."""
        x = gather_sequence(x, self.grid)  # (B, m, hidden) -> (B, tp, m, hidden), once for all three
        q, k, v = fused_linear(x, self.q_proj, self.k_proj, self.v_proj)
        q, k = (apply_rotary(y.unflatten(-1, (-1, self.head_dim)).transpose(2, 3), cos[:, None], sin[:, None])
                .transpose(2, 3).flatten(3) for y in (q, k))  # over (B, tp, heads, m, D)
        return q, k, v

    def heads(self, x: Tensor) -> Tensor:
        """(B, tp, m, heads x D) -> (B, heads, S / cp, D): how attention wants it."""
        return x.flatten(1, 2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rows(self, x: Tensor) -> Tensor:
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
        x = gather_sequence(x, self.grid)  # (B, tp, m, hidden), once for both
        gate, up = fused_linear(x, self.gate_proj, self.up_proj)  # (B, tp, m, intermediate / tp)
        return self.down_proj(F.silu(gate) * up)  # (B, m, hidden)


class Block(nn.Module):
    """One pre-norm transformer layer, (B, m, hidden) -> the same: what stands before attention, attention, what stands after.

    Before and after, every position is on its own, so both can run on a tile of positions at a time.
    """

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, grid)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, grid)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """A tile of x (B, m, hidden) -> its q, k, v, see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def queries_keys_values(self, x: Tensor, context: Context, tile: int) -> Iterator[Tensor]:
        """`before` of all of x, in tiles -> q, k, v (B, heads, S / cp, D)."""
        return map(self.self_attn.heads, in_tiles(self.before, (x, context.cos, context.sin), tile))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """A tile of x (B, m, hidden) and of attention's output (B, tp, m, heads x D) -> the block's output (B, m, hidden)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        if context.recompute != "none":
            return RecomputedBlock.apply(x, self, context, layer)
        attention, tile = self.self_attn, x.shape[1] if torch.is_grad_enabled() else context.tile
        q, k, v = self.queries_keys_values(x, context, tile)
        if context.cache is None:
            attended = ring_attention(q, k, v, attention.grid, context.segments)
        else:
            attended = context.cache.attend(layer, q, k, v, context.kept)
        return in_tiles(self.after, (x, attention.rows(attended)), tile)


# ------------------------------------------------------------------- less memory: tiles, recomputation, host memory


def in_tiles(function, inputs: tuple[Tensor, ...], tile: int):
    """function(*inputs) on `tile` positions (dimension -2) at a time; a tensor or a tuple of them, whole."""
    length = inputs[0].shape[-2]
    if tile >= length:
        return function(*inputs)
    whole = None
    for start in range(0, length, tile):
        place = slice(start, min(start + tile, length))
        found = function(*(x[..., place, :] for x in inputs))
        parts = (found,) if isinstance(found, Tensor) else found
        whole = whole or [part.new_empty(*part.shape[:-2], length, part.shape[-1]) for part in parts]
        for all_of_it, part in zip(whole, parts):
            all_of_it[..., place, :] = part
    return whole[0] if isinstance(found, Tensor) else tuple(whole)


def tiles_backward(function, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], gradients: tuple[Tensor, ...],
                   tile: int) -> list[Tensor]:
    """Gradients of `inputs` from those of function(*inputs, *constants), computed again a tile at a time.

    What a tile keeps for its backward is gone before the next tile begins. Gradients of parameters are added up where
    autograd always does, in `parameter.grad`.
    """
    found = [torch.empty_like(x) for x in inputs]
    for start in range(0, inputs[0].shape[-2], tile):
        place = (..., slice(start, start + tile), slice(None))
        leaves = [x[place].detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(*leaves, *(x[place] for x in constants))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [gradient[place] for gradient in gradients])
        for whole, leaf in zip(found, leaves):
            whole[place] = leaf.grad
    return found


class RecomputedBlock(torch.autograd.Function):
    """A block that keeps its input x alone and computes the rest again in backward, tile by tile (arXiv 1604.06174).

    With recompute "mlp" it also keeps what attention found, out and lse: all that backward needs of attention, which is by
    far the most work at long lengths, so its forward never runs twice. q, k and v are a projection away.
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: Block, context: Context, layer: int) -> Tensor:
        attention = block.self_attn
        q, k, v = block.queries_keys_values(x, context, context.tile)
        attended, lse = ring_forward(q, k, v, attention.grid, context.segments)
        del q, k, v
        kept = (x, attended, lse) if context.recompute == "mlp" else (x,)
        ctx.block, ctx.context, ctx.layer = block, context, layer
        if context.host:
            ctx.ticket = context.host.keep(layer, kept)
        else:
            ctx.save_for_backward(*kept)
        return in_tiles(block.after, (x, attention.rows(attended)), context.tile)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        block, context, attention = ctx.block, ctx.context, ctx.block.self_attn
        x, *kept = context.host.fetch(ctx.layer, ctx.ticket) if context.host else ctx.saved_tensors
        q, k, v = block.queries_keys_values(x, context, context.tile)
        attended, lse = kept or ring_forward(q, k, v, attention.grid, context.segments)
        dx, d_attended = tiles_backward(block.after, (x, attention.rows(attended)), (), (dy,), context.tile)
        gradients = ring_backward(attention.heads(d_attended), q, k, v, attended, lse, attention.grid, context.segments)
        del q, k, v, attended, kept, d_attended
        gradients = tuple(map(attention.rows, gradients))
        dx += tiles_backward(block.before, (x,), (context.cos, context.sin), gradients, context.tile)[0]
        return dx, None, None, None


class HostMemory:
    """Keeps tensors of each layer in host memory between forward and backward, under their layer's number.

    On a GPU the memory is pinned and copies run on a stream of their own: out while the next blocks compute, in one block
    before they are needed. The buffers stay for the next step. On a CPU it is a plain copy.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[int, list[Tensor]]] = {}  # by layer: ticket and host buffers
        self.arriving: dict[int, tuple] = {}  # by layer: tensors on the device, and the event of their copy
        self.leaving: list[tuple] = []  # events and tensors of the copies that may still run
        self.stream, self.device, self.tickets = None, None, 0

    def aside(self, x: Tensor):
        """Context in which copies go to the side stream, once the work queued so far is done."""
        if not x.is_cuda:
            return nullcontext()
        self.stream = self.stream or torch.cuda.Stream(x.device)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        return torch.cuda.stream(self.stream)

    def keep(self, layer: int, tensors: tuple[Tensor, ...]) -> int:
        """Copy a layer's tensors to the host. Returns the ticket to fetch them with."""
        self.tickets += 1
        _, place = self.kept.get(layer, (0, []))
        if [(x.shape, x.dtype, x.stride()) for x in place] != [(x.shape, x.dtype, x.stride()) for x in tensors]:
            place = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in tensors]
        self.kept[layer], self.device = (self.tickets, place), tensors[0].device
        self.arriving.pop(layer, None)
        with self.aside(tensors[0]):
            for host, x in zip(place, tensors):
                host.copy_(x, non_blocking=True)
        if self.stream:  # at most two blocks' tensors are on their way at once
            self.leaving.append((self.stream.record_event(), tensors))
            self.release(2)
        return self.tickets

    def release(self, but: int) -> None:
        """Give back what has left the device, waiting for all but the newest copies."""
        while len(self.leaving) > but:
            event, _ = self.leaving.pop(0)
            torch.cuda.current_stream(self.device).wait_event(event)

    def fetch(self, layer: int, ticket: int) -> list[Tensor]:
        """A layer's tensors, on the device again; the layer below begins to arrive. Raises RuntimeError if they are gone."""
        if self.kept[layer][0] != ticket:
            raise RuntimeError("another forward pass has taken this one's place in host memory: call backward in between")
        self.release(0)
        for wanted in (layer, layer - 1):
            if wanted in self.kept and wanted not in self.arriving:
                _, place = self.kept[wanted]
                tensors = [torch.empty_like(host, device=self.device) for host in place]
                with self.aside(tensors[0]):
                    for x, host in zip(tensors, place):
                        x.copy_(host, non_blocking=True)
                    self.arriving[wanted] = tensors, self.stream and self.stream.record_event()
        tensors, event = self.arriving.pop(layer)
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)
        return tensors


class KVCache:
    """Keys and values of every layer, spread over the ring: a rank keeps those of the positions it had when they were
    computed, (layers, 2, B, Hkv / tp, capacity, D). More tokens may follow, any number at a time, and `truncate` forgets the
    last ones: prompts that begin alike compute what they share once.
    """

    def __init__(self, config: ModelConfig, grid: Grid, batch: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads // grid.tp, 0, config.head_dim)
        self.keys_values, self.grid = torch.empty(shape, dtype=like.dtype, device=like.device), grid
        self.positions = torch.empty(0, dtype=torch.int64)  # of the tokens this rank holds, in order
        self.length = 0  # tokens in all

    def reserve(self, more: int) -> None:
        """Make room for `more` tokens on this rank, and a little over, so that as many again need no other buffer."""
        held, shape = len(self.positions), list(self.keys_values.shape)
        if held + more > shape[4]:
            shape[4] = held + more + (held + more) // 64
            kept = self.keys_values[..., :held, :].clone()  # what is held, never two whole buffers
            self.keys_values = self.keys_values.new_empty(0)
            self.keys_values = kept.new_empty(shape)
            self.keys_values[..., :held, :] = kept

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.positions, self.length = self.positions[self.positions < length], min(length, self.length)

    def fullest(self) -> int:
        """How many tokens the rank of the ring holds that holds most: what was truncated may have lain on some ranks only."""
        held = torch.tensor(len(self.positions), device=self.keys_values.device)
        return self.grid.all_reduce(held, "cp", dist.ReduceOp.MAX).item()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kept: int) -> Tensor:
        """Store the first `kept` of the new k, v (B, Hkv / tp, s, D); out (B, H / tp, s, D) of q over all tokens so far."""
        held = len(self.positions)
        end = held + kept
        keys, values = self.keys_values[layer]  # (B, Hkv / tp, capacity, D) each
        keys[:, :, held:end], values[:, :, held:end] = k[:, :, :kept], v[:, :, :kept]
        if q.shape[2] == self.grid.tp:  # one new token, which every rank of the ring has; the rest is padding
            out = decode_attention(q[:, :, :1], keys[:, :, :end], values[:, :, :end], self.grid)
            return F.pad(out, (0, 0, 0, q.shape[2] - 1))  # (B, H / tp, 1, D) -> (B, H / tp, tp, D)
        out, lse = ring_forward(q, k, v, self.grid)
        if self.length:
            out = attend_earlier(q, out, lse, keys[:, :, :held], values[:, :, :held], self.grid)
        return out


@dataclass
class Context:
    """What every layer shares in one forward pass: rotary tables (tp, m, D / 2), how many of the m positions make a tile, what
    to recompute, where to keep what backward needs (None: on the device), document borders, the KV cache and what to keep
    in it.
    """

    cos: Tensor
    sin: Tensor
    tile: int
    recompute: str = "none"
    host: HostMemory | None = None
    segments: list[list[int]] | None = None
    cache: KVCache | None = None
    kept: int = 0


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, grid: Grid) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, grid)
        self.layers = nn.ModuleList(Block(config, grid) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama for causal language modelling, spread over a grid.

    `recompute`, one of RECOMPUTE, says what backward computes again rather than keeps: nothing; all but attention; whole
    blocks. `host`, a HostMemory, takes what recomputed blocks keep. `tile_bytes` bounds what a tile of positions takes (None:
    TILE_BYTES of the device). Every public method is called on all ranks of a replica
    (cp x tp) with the same, whole rows of tokens; each rank computes its share and all return the same result. Raises
    ValueError if the grid does not fit the model.
    """

    def __init__(self, config: ModelConfig, grid: Grid | None = None) -> None:
        super().__init__()
        self.config, self.grid = config, grid or Grid()
        self.recompute, self.host, self.tile_bytes = "none", None, None
        check_grid(self.grid.tp, self.grid.cp, self.grid.size("all"), config.shards())
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
        for attention in (block.self_attn for block in self.model.layers):
            queries = attention.q_proj.weight.detach().unflatten(0, (-1, group, self.config.head_dim))
            attention.k_proj.weight.detach().copy_(queries[:, 0].flatten(0, 1))  # (Hkv, D, hidden) -> (Hkv D, hidden)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V / tp, hidden): the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def tile(self, element_bytes: int) -> int:
        """How many of this rank's m positions fit in a tile, at so many bytes a position of the S / cp."""
        tile_bytes = self.tile_bytes or TILE_BYTES[self.head_weight.device.type]
        return max(1, tile_bytes // (element_bytes * self.grid.tp))

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The last block's output, before the final norm: whole rows (B, S) int64 -> this rank's (B, m, hidden).

        m is S / (cp tp), of S padded on the right to what the grid divides evenly: no earlier position sees the padding.
        `document_ids` (B, S) masks documents apart. With a cache the tokens follow those it holds; a single one of them is
        computed by every rank of the ring.
        """
        grid, length, start = self.grid, tokens.shape[1], cache.length if cache else 0
        check_ids(tokens, self.config.vocab_size)
        if start and length == 1:
            tokens, positions = F.pad(tokens, (0, grid.tp - 1)), torch.full((grid.tp,), start)
            kept = int(start % grid.cp == grid.cp_rank)
        else:
            tokens = self.pad(tokens)
            positions = start + zigzag_positions(tokens.shape[1], grid)
            tokens, kept = zigzag_shard(tokens, grid, 1), int((positions < start + length).sum())
        if cache:
            cache.reserve(kept)
        inv_freq, factor = inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        device, rows = tokens.device, len(tokens)
        tables = rotary_tables(positions.to(device), inv_freq.to(device), factor)
        cos, sin = (table.unflatten(0, (grid.tp, -1)) for table in tables)  # float32 (tp, m, D / 2), for all layers
        segments = None if document_ids is None else document_segments(self.pad(document_ids))
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {self.recompute!r}; it must be one of {', '.join(RECOMPUTE)}")
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        tile = self.tile(rows * block_tile_bytes(self.config, grid.tp, self.head_weight.itemsize))
        context = Context(cos, sin, tile, recompute, self.host, segments, cache, kept)
        x = self.model.embed_tokens(tokens.unflatten(1, (grid.tp, -1)), tile)  # (B, tp, m) -> (B, m, hidden)
        for layer, block in enumerate(self.model.layers):
            x = block(x, context, layer)
        if cache:
            cache.length, cache.positions = start + length, torch.cat([cache.positions, positions[:kept]])
        return x

    def pad(self, rows: Tensor, value: int = 0) -> Tensor:
        """(B, S) -> (B, S'): whole rows padded on the right to a length the grid divides evenly."""
        return F.pad(rows, (0, -rows.shape[1] % self.grid.sequence_multiple), value=value)

    def hidden_at(self, tokens: Tensor, places: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final-norm hidden states of some places in rows of tokens, on every rank: (B, S), (B, n) int64 -> (B, n, hidden)."""
        grid, decoding = self.grid, cache is not None and cache.length > 0 and tokens.shape[1] == 1
        hidden = self.hidden_states(tokens, cache=cache)  # (B, m, hidden)
        length = hidden.shape[1] * grid.tp * (1 if decoding else grid.cp)
        held = (torch.arange(length) if decoding else zigzag_positions(length, grid)).chunk(grid.tp)[grid.tp_rank]
        local = torch.full((length,), -1)
        if not decoding or grid.cp_rank == 0:  # a new token is on every rank of the ring: one of them gives it
            local[held] = torch.arange(len(held))
        local = local.to(places.device)[places][..., None]  # (B, n, 1)
        rows = hidden.gather(1, local.clamp(min=0).expand(-1, -1, hidden.shape[2])).masked_fill(local < 0, 0.0)
        return self.model.norm(grid.all_reduce(rows, "cp_tp"))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token from hidden states that every rank has: (..., hidden) -> (..., V)."""
        parts = self.grid.all_gather(F.linear(hidden, self.head_weight), "tp")  # (tp, ..., V / tp)
        return parts.movedim(0, -2).flatten(-2)

    def new_cache(self, batch: int) -> KVCache:
        """An empty KV cache for `batch` rows."""
        return KVCache(self.config, self.grid, batch, self.head_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position: tokens (B, S) int64 -> (B, S, V). For a loss use `loss`, which never builds them."""
        hidden = gather_sequence(self.model.norm(self.hidden_states(tokens)), self.grid).flatten(1, 2)  # (B, S / cp, hidden)
        return zigzag_unshard(self.logits(hidden), self.grid, 1)[:, :tokens.shape[1]]

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the targets that are not -100, and their number; no S x V logits exist.

        tokens, targets (B, S) int64, whole rows, targets already shifted. Returns (float32 scalar, int64 scalar), the same
        on every rank of the replica: divide the sum by the number over the whole global batch. Backward on every rank leaves
        each its share of the gradients. A batch without a target gives (0, 0) and zero gradients.
        """
        hidden = self.hidden_states(tokens, document_ids)  # (B, m, hidden)
        check_ids(targets.masked_fill(targets == -100, 0), self.config.vocab_size)
        here = self.local_targets(targets)  # (B, tp, m)
        tile = self.tile(logit_bytes(self.config, self.grid.tp, hidden.itemsize))
        losses = tiled_cross_entropy(hidden, self.model.norm, self.head_weight, here, self.grid, tile)
        return SumOverRing.apply(losses, self.grid), (targets != -100).sum()

    def local_targets(self, targets: Tensor) -> Tensor:
        """Targets of the positions this rank of the ring holds: whole rows (B, S) -> (B, tp, m)."""
        return zigzag_shard(self.pad(targets, -100), self.grid, 1).unflatten(1, (self.grid.tp, -1))

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of every position, (B, S) float32, 0 where the target is -100: for loss by position."""
        hidden, here, losses = self.hidden_states(tokens, document_ids), self.local_targets(targets), []
        tile = self.tile(len(tokens) * logit_bytes(self.config, self.grid.tp, hidden.itemsize))
        for part, target in zip(hidden.split(tile, 1), here.split(tile, 2)):
            rows = gathered(self.model.norm(part), self.grid)  # (B, tp, tile, hidden)
            scores = F.linear(rows, self.head_weight).float().flatten(0, 2)  # (B tp tile, V / tp)
            found = vocab_parallel_cross_entropy(scores, target.flatten().clamp(min=0), self.grid)[0]
            losses.append(found.view(target.shape) * (target != -100))
        return zigzag_unshard(torch.cat(losses, 2).flatten(1), self.grid, 1)[:, :targets.shape[1]]

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                 stop_tokens: tuple[int, ...] = (), seed: int | None = None, cache: KVCache | None = None) -> Tensor:
        """Continue prompts (B, S) of equal length -> (B, S + n) int64, n <= max_new_tokens.

        temperature 0 is greedy; otherwise nucleus sampling from the smallest set of probability >= top_p
        (arXiv 1904.09751). Ends once every row has produced a stop token; later tokens of a finished row repeat it. A `cache`
        that holds the first tokens of the prompts (fewer than S) saves computing them.
        """
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        cache = cache or self.new_cache(len(tokens))
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        new = tokens[:, cache.length:]
        self.grid.restart_timer()
        cache.reserve(-(-new.shape[1] // self.grid.sequence_multiple) * self.grid.sequence_multiple // self.grid.cp
                      + -(-max_new_tokens // self.grid.cp))  # once, for all that follows
        hidden = self.hidden_at(new, torch.full_like(new[:, :1], new.shape[1] - 1), cache)  # (B, 1, hidden)
        for step in range(max_new_tokens):
            self.grid.restart_timer()
            new = sample(self.logits(hidden[:, 0]).float(), temperature, top_p, generator)  # (B,)
            new = self.grid.broadcast(new, "cp_tp")  # without a seed every rank has drawn its own
            new = torch.where(done, tokens[:, -1], new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            done |= torch.isin(new, stops)
            if done.all() or step == max_new_tokens - 1:
                break
            hidden = self.hidden_at(new[:, None], torch.zeros_like(new[:, None]), cache)
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
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        weights = read_weights(Path(path), shapes, shard_dims(model), model.grid, dtype, device)
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
        dims, dtype = shard_dims(self), self.head_weight.dtype
        shapes = {name: (whole_shape(p.shape, dims[name], self.grid), dtype) for name, p in self.named_parameters()}
        whole = ((name, unshard(p.detach(), dims[name], self.grid)) for name, p in self.named_parameters())
        write_weights(path, "model", shapes, whole, max_shard_bytes, self.grid)
        if self.grid.is_first:
            config = self.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: without it this is no model


# ------------------------------------------------------------------------------------------------ loss, sampling


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise IndexError for a token outside the vocabulary: spread over ranks, none would miss it."""
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token ids from {int(low)} to {int(high)} do not lie in the vocabulary of {vocab_size}")


def block_tile_bytes(config: ModelConfig, tp: int, itemsize: int) -> int:
    """What one position takes on its way through `Block.after` and back: its gathered input and that one's gradient, twice,
    and gate-up, their product and both gradients."""
    return itemsize * (4 * config.hidden_size + 8 * config.intermediate_size // tp)


def logit_bytes(config: ModelConfig, tp: int, itemsize: int) -> int:
    """What one position's logits take in the loss: in the compute type and in float32."""
    return config.vocab_size // tp * (itemsize + 4)


class TiledCrossEntropy(torch.autograd.Function):
    """Final norm, head and summed cross-entropy, one tile of positions at a time, gradients formed in the same pass.

    The gradient of a row's logits is softmax - onehot, known as soon as the logits are: so each tile's logits are
    used up (for the loss, the hidden gradient, the weight gradient) and overwritten by the next tile's, and backward
    multiplies stored results by a scalar. Peak memory is one tile, and no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, weight: Tensor, norm: RMSNorm, targets: Tensor, grid: Grid,
                tile: int) -> Tensor:
        """Arguments of `tiled_cross_entropy`; the norm's weight stands beside it so that autograd sees it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        flat, d_x = x.flatten(0, 1), torch.zeros_like(x)
        d_norm, d_weight = torch.zeros_like(norm_weight, dtype=wide), torch.zeros_like(weight, dtype=wide)
        places, targets = rows_with_targets(targets, grid)
        rows = min(places.shape[1], tile)
        product = x.new_empty(grid.tp * rows, weight.shape[0])  # (tp tile, V / tp), in the compute type
        logits = product if product.dtype == wide else torch.empty_like(product, dtype=wide)
        for place, target in zip(places[grid.tp_rank].split(max(1, rows)), targets.split(max(1, rows), 1)):
            with torch.enable_grad():
                picked = flat[place].requires_grad_()  # (tile, hidden)
                normed = norm(picked)
            h, target = gathered(normed.detach()[None], grid).flatten(0, 2), target.flatten()  # (tp tile, hidden), (tp tile,)
            exact = logits[:len(h)]
            rounded = torch.mm(h, weight.T, out=product[:len(h)])
            if exact.dtype != rounded.dtype:
                exact.copy_(rounded)
            # exact becomes (softmax - onehot) * normaliser; rows without a target count as 0
            losses, normaliser = vocab_parallel_cross_entropy(exact, target.clamp(min=0), grid)
            valid = (target != -100).to(wide)
            total += (losses * valid).sum()
            scale = valid[:, None] / normaliser
            if exact.dtype != rounded.dtype:
                rounded.copy_(exact)
            d_h = torch.mm(rounded, weight).mul_(scale)  # this rank's part of a sum over tp
            d_h = scattered(d_h.view(1, grid.tp, -1, d_h.shape[1]), grid)[0]  # (tile, hidden), summed
            d_picked, d_n = torch.autograd.grad(normed, (picked, norm_weight), d_h)
            d_x.view(flat.shape).index_add_(0, place, d_picked)  # padding adds zeros to the first row
            d_norm += d_n
            h = (h * scale).to(h.dtype)
            for d_w, columns in zip(d_weight.split(VOCABULARY_TILE), rounded.split(VOCABULARY_TILE, dim=1)):
                d_w += columns.T @ h  # a product of the compute type, summed in float32
        ctx.save_for_backward(d_x, d_norm, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor) -> tuple[Tensor, ...]:
        return *(gradient.mul_(d_total) for gradient in ctx.saved_tensors), None, None, None, None


def rows_with_targets(targets: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where each tp rank has targets, in chat data a small share: (B, tp, m) -> places in its B m rows and targets, (tp, N).

    Ranks with fewer than N repeat their first row with target -100.
    """
    by_rank = targets.movedim(1, 0).flatten(1)  # (tp, B m)
    order = (by_rank == -100).int().argsort(dim=1, stable=True)  # the valid first, in order
    order = order[:, :int((by_rank != -100).sum(1).max())]
    found = by_rank.gather(1, order)  # (tp, N)
    return order.masked_fill(found == -100, 0), found


def tiled_cross_entropy(x: Tensor, norm: RMSNorm, weight: Tensor, targets: Tensor, grid: Grid, tile: int) -> Tensor:
    """Sum over targets of -log softmax(norm(x) @ weight.T)[target]: no more than `tile` rows a rank at a time.

    x (B, m, hidden), weight (V / tp, hidden), targets (B, tp, m) of all tp ranks, -100 for none -> float32 scalar (float64
    for float64 input), the same on every tp rank. Gradients of x are whole, of the norm this rank's part.
    """
    return TiledCrossEntropy.apply(x, norm.weight, weight, norm, targets, grid, tile)


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
        raise FileNotFoundError(f"{path}: no config.json there; expected a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return ModelConfig.from_hf(config)


def rescale(config: ModelConfig, scaling: RopeScaling | None) -> ModelConfig:
    """`config` with `scaling` in place of its own rope scaling (they never stack), and the window that follows.

    None changes nothing: the window is a fact of its own, no product of the rule. Raises ValueError where the window before
    the checkpoint's own scaling is needed and not known.
    """
    if scaling is None:
        return config
    if scaling.kind == "default":
        return replace(config, rope_scaling=scaling)
    original = scaling.original_max_position or config.window_before()
    if original is None:
        raise ValueError(f"--original-length is needed: a checkpoint with such {config.rope_scaling.kind} scaling does not "
                         "state its window before")
    return replace(config, rope_scaling=replace(scaling, original_max_position=original),
                   max_position_embeddings=round(original * scaling.factor))


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute on it here."""
    if launched()[1] > 1 and device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: with several processes use cpu or cuda; each takes its own GPU")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {device} is not available here; use cpu, or cuda where there is a GPU")
