"""Llama in plain PyTorch: configuration, blocks, tiles, generation, Hugging Face load and save.

Read from the top: `ModelConfig` is what a config.json says, `Attention`, `MLP` and `Block` are one
layer, `RecomputedBlock` the same layer in less memory, `Llama` stacks them. In shapes, m is
S / (cp tp): the positions that a rank holds between attentions. Module names are Hugging Face's, so
`state_dict()` keys are the names in a checkpoint's safetensors. Llama 2 and 3, Qwen2, Qwen3 and
SmolLM3 differ only in what `ModelConfig` says. `python -m tools.chat MODEL_DIR` talks to one.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu

from data import read_object, read_weights, stated_stops, write_weights
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

TILE_BYTES = {"cpu": 2**27, "cuda": 2**30}  # what a tile may take in a block or in the loss
RECOMPUTE = ("none", "mlp", "block")  # see RecomputedBlock
VOCABULARY_TILE = 8192  # rows of the head's gradient that are added up at a time


# ---------------------------------------------------------------------------------- configuration

SHAPE = (  # positive integers, under their names in config.json
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
SPLIT_BY_TP = (  # those of them that tensor parallelism cuts
    "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")
ARCHITECTURES = {  # model_type: transformers' class
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM"}
LEFT_OUT = {  # transformers' value of a key that a config.json leaves out
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"max_position_embeddings": 32768, "num_key_value_heads": 4,
                "tie_word_embeddings": True}}
ONLY = {  # all we compute
    "hidden_act": "silu", "layer_types": "full_attention", "is_causal": True, "use_rope": True}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# keys of a config.json that are read, here or by RopeScaling.from_hf
READ = (*SHAPE, *ONLY, *TOKEN_IDS, "model_type", "rms_norm_eps", "initializer_range",
        "tie_word_embeddings", "attention_bias", "rope_theta", "rope_scaling", "rope_parameters",
        ORIGINAL, "partial_rotary_factor")
# keys that change nothing that is computed: notes of other programs
INERT = """architectures auto_map dtype torch_dtype transformers_version transformers.js_config
_name_or_path _attn_implementation_autoset use_cache use_bfloat16 pretraining_tp is_llama_config
tokenizer_class max_sequence_length model_max_length unsloth_fixed unsloth_version do_sample
max_length temperature top_k top_p repetition_penalty id2label label2id problem_type return_dict
num_beams num_beam_groups num_return_sequences length_penalty typical_p""".split()
# keys of some families: a window (refused is use_sliding_window, without which it is off), and what
# SmolLM3 reads
SWITCHED_OFF = ("sliding_window", "max_window_layers")
OF_FAMILY = {"qwen2": SWITCHED_OFF, "qwen3": SWITCHED_OFF,
             "smollm3": (*SWITCHED_OFF, "no_rope_layers", "no_rope_layer_interval")}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under Hugging Face's names; `hf` is the config.json it came from, with
    what that left out and all stop tokens."""

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
    attention_bias: bool = False  # of all four projections
    model_type: str = "llama"
    no_rope_layers: tuple[int, ...] = ()  # SmolLM3: 0 for a layer that turns nothing; (): all turn
    hf: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SHAPE:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, found {value!r}")
        for name, least in (("rms_norm_eps", 0), ("initializer_range", 0), ("rope_theta", 1)):
            value = getattr(self, name)
            if not is_number(value) or value <= least:
                raise ValueError(f"config.json: {name} must be a number above {least}, "
                                 f"found {value!r}")
        for name in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config.json: {name} must be true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"config.json: num_attention_heads {self.num_attention_heads} is not "
                             f"a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; RoPE turns pairs")
        turns = self.no_rope_layers
        if len(turns) not in (0, self.num_hidden_layers) or any(x not in (0, 1) for x in turns):
            raise ValueError(f"config.json: no_rope_layers {list(turns)} must have a 0 or 1 for "
                             f"each of the {self.num_hidden_layers} layers")

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have a bias. Qwen2's have, and its o has none: no key says so."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normed before it is turned."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """Read a config.json of transformers 4 or 5; a key left out has transformers' default."""
        # 1. Is it one of our architectures, and is all that it says understood?
        if not {"model_type", "hidden_size"} & config.keys():
            raise ValueError("config.json: is no model's configuration: it has neither model_type "
                             "nor hidden_size")
        family = config.get("model_type", "llama")
        if family not in ARCHITECTURES:
            raise ValueError(f"config.json: model_type {family!r} is none of "
                             f"{', '.join(ARCHITECTURES)}")
        check_keys(config, family)
        config = LEFT_OUT[family] | config
        # 2. Its shape: two more keys may be left out
        shape = {name: config.get(name) for name in SHAPE}
        hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
        if shape["num_key_value_heads"] is None:  # every query head has keys of its own
            shape["num_key_value_heads"] = heads
        are_sizes = is_number(hidden) and is_number(heads) and heads > 0  # others: __post_init__
        if shape["head_dim"] is None and are_sizes:
            if hidden % heads:
                raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_"
                                 f"attention_heads {heads}; state head_dim or change one of them")
            shape["head_dim"] = hidden // heads
        # 3. The rest.
        theta = 2e6 if family == "smollm3" else 1e4  # where it is left out
        scaling = RopeScaling.from_hf(config)
        model = cls(
            **shape, rope_theta=stated_value(config, "rope_theta", theta), rope_scaling=scaling,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            initializer_range=config.get("initializer_range", 0.02),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=family != "qwen2" and config.get("attention_bias", False),
            model_type=family, hf=config)
        # 4. Which layers turn q and k? In spite of the list's name, 1 stands for those that do.
        if family == "smollm3":
            interval = config.get("no_rope_layer_interval", 4)
            if type(interval) is not int or interval < 1:
                raise ValueError(f"config.json: no_rope_layer_interval is {interval!r}; it must be "
                                 "a whole number, 1 or more")
            by_default = [int(i % interval != 0) for i in range(1, model.num_hidden_layers + 1)]
            stated = config.get("no_rope_layers") or by_default
            stated = stated if isinstance(stated, list) else [stated]
            model = replace(model, no_rope_layers=tuple(stated[:model.num_hidden_layers]))
        # 5. Its window: Qwen2.5's documents add yarn without raising max_position_embeddings
        if scaling.kind == "yarn" and stated_value(config, ORIGINAL):
            extended = round(scaling.original_max_position * scaling.factor)
            window = max(model.max_position_embeddings, extended)
            model = replace(model, max_position_embeddings=window)
        return model

    def to_hf(self) -> dict:
        """A config.json from which transformers 4 and 5 and vLLM compute the same model.

        Of the one it came from only the ids of tokens are taken over: other keys may say what holds
        no longer, such as how its weights were quantised, or which code was to compute it.
        """
        scaling = self.rope_scaling
        theta = self.rope_theta
        rope = None  # the default kind
        if scaling.kind == "ntk":  # Hugging Face has none: it is the default at a larger theta
            theta = ntk_theta(theta, scaling.factor, self.head_dim)
        elif scaling.kind != "default":
            rope = scaling.to_hf()
        if scaling.kind == "yarn" and self.window_before() is None:
            del rope[ORIGINAL]  # left out when read; stated, from_hf (5.) would extend it once more
        config = {key: self.hf.get(key) for key in TOKEN_IDS}  # left out they would be Llama 2's
        if self.no_rope_layers:
            config["no_rope_layers"] = list(self.no_rope_layers)
        for name in (*SHAPE, "model_type", "rms_norm_eps", "initializer_range",
                     "tie_word_embeddings", "attention_bias"):
            config[name] = getattr(self, name)
        if self.model_type == "qwen2":  # see qkv_bias
            del config["attention_bias"]
        return config | {"architectures": [ARCHITECTURES[self.model_type]],
                         "hidden_act": "silu", "rope_theta": theta, "rope_scaling": rope}

    def window_before(self) -> int | None:
        """The window before extension; None where the checkpoint does not say.

        A linear rule never says. Nor does yarn that leaves the old window out: with factor 4 and a
        window of 131,072 its frequencies take 131,072 for the old one, as in transformers.
        """
        scaling = self.rope_scaling
        if scaling.kind == "default":  # never extended
            return self.max_position_embeddings
        # are the window and the rule still those of config.json, and is the old window left out?
        window = self.hf.get("max_position_embeddings")
        as_read = window == self.max_position_embeddings and scaling == RopeScaling.from_hf(self.hf)
        if as_read and not stated_value(self.hf, ORIGINAL):
            return None
        return scaling.original_max_position

    def check_tp(self, tp: int) -> None:
        """Raise ValueError unless tensor parallelism can cut all that it cuts into `tp` pieces."""
        for name in SPLIT_BY_TP:
            size = getattr(self, name)
            if size % tp:
                raise ValueError(f"--tp {tp} does not divide the model's {name}, {size}")


def check_keys(config: dict, family: str) -> None:
    """Raise ValueError for a key of a config.json that may change what the model computes.

    One that is neither read nor known to be inert passes while it says nothing: null, false, 0, an
    empty list, or 1 where a multiplier is meant.
    """
    known = {*READ, *INERT, *OF_FAMILY.get(family, ())}
    if config.get("quantization_config"):
        raise ValueError("config.json: quantization_config is stated; use the checkpoint before "
                         "quantisation, or delete it if the weights are plain numbers")
    unknown = []
    for key, value in config.items():
        is_multiplier = "multiplier" in key or "scal" in key
        says_nothing = not value or (value == 1 and value is not True and is_multiplier)
        if key not in known and not says_nothing:
            unknown.append(f"{key} is {shorten(str(value), 40, placeholder=' ...')}")
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)}, which may change what the model "
                         "computes and is not known here; delete it if it changes nothing")
    for key, needed in ONLY.items():
        stated = config.get(key)
        for value in stated if isinstance(stated, list) else [stated]:
            if value not in (needed, None):
                raise ValueError(f"config.json: {key} has {value!r}; only {needed!r} is known")


def read_config(path: str | Path) -> ModelConfig:
    """ModelConfig of a model directory or a config.json; the eos_token_id of its `hf` has the ids
    of generation_config.json beside it too. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no config.json there; give a Hugging Face model "
                                "directory (of a run: its `final`)")
    contents = {file: read_object(file)}
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        contents[generation] = read_object(generation)
    stops = stated_stops(contents)
    try:
        config = ModelConfig.from_hf(contents[file])
    except ValueError as error:  # the file has any name where it is given itself
        reason = str(error).removeprefix("config.json: ")
        raise ValueError(f"{file}: {reason}") from None
    return replace(config, hf=config.hf | {"eos_token_id": stops}) if stops else config


def rescale(config: ModelConfig, scaling: RopeScaling | None = None, theta: float | None = None,
            window: int | None = None) -> ModelConfig:
    """`config` with `scaling` in place of its own, as two never stack, and its window: old window x
    factor, or the `window` that is asked for; with RoPE's base `theta`, if one is given."""
    config = replace(config, rope_theta=theta or config.rope_theta)
    if scaling is not None:
        config = with_scaling(config, scaling)
    reached = config.max_position_embeddings
    if window is not None and window < reached:  # a config.json with yarn could not say so
        raise ValueError(f"--new-window {window} is below the {reached} that the model takes")
    return replace(config, max_position_embeddings=window or reached)


def with_scaling(config: ModelConfig, scaling: RopeScaling) -> ModelConfig:
    """`config` with this rule, and the window to which that leads."""
    before = config.window_before()
    if scaling.kind == "default":  # back to the old window, if the checkpoint says which that was
        window = before or config.max_position_embeddings
    else:
        original = scaling.original_max_position or before
        if original is None:
            raise ValueError("--original-length is needed: a checkpoint with such "
                             f"{config.rope_scaling.kind} scaling does not state its window before")
        scaling = replace(scaling, original_max_position=original)
        window = round(original * scaling.factor)
    return replace(config, rope_scaling=scaling, max_position_embeddings=window)


# ----------------------------------------------------------------------------------- architecture


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions; what happens between positions is
    parallel.py's. A tp rank has H / tp query heads, Hkv / tp key and value heads; norms of heads
    are whole on every rank, which sees its own heads only: their gradients are summed over tp."""

    def __init__(self, config: ModelConfig, grid: Grid, layer: int) -> None:
        super().__init__()
        self.grid = grid
        self.head_dim = config.head_dim
        self.turns = not config.no_rope_layers or config.no_rope_layers[layer] == 1
        hidden = config.hidden_size
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = ColumnParallelLinear(hidden, q_size, grid, bias=config.qkv_bias)
        self.k_proj = ColumnParallelLinear(hidden, kv_size, grid, bias=config.qkv_bias)
        self.v_proj = ColumnParallelLinear(hidden, kv_size, grid, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(q_size, hidden, grid, bias=config.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, m, hidden), tables (tp, m, D / 2) -> q, k (normed, turned), v (B, tp, m, heads x
        D)."""
        x = GatherSequence.apply(x, self.grid)  # (B, tp, m, hidden), once for all three
        q = self.norm_and_turn(self.q_proj(x), self.q_norm, cos, sin)  # (B, tp, m, H / tp x D)
        k = self.norm_and_turn(self.k_proj(x), self.k_norm, cos, sin)  # (B, tp, m, Hkv / tp x D)
        v = self.v_proj(x)  # (B, tp, m, Hkv / tp x D)
        return q, k, v

    def norm_and_turn(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm every head of x (B, tp, m, heads x D), and turn it by its position's angles."""
        x = norm(x.unflatten(-1, (-1, self.head_dim)))  # (B, tp, m, heads, D)
        if self.turns:
            x = x.transpose(2, 3)  # (B, tp, heads, m, D)
            x = apply_rotary(x, cos[:, None], sin[:, None])  # (tp, 1, m, D / 2): all heads alike
            x = x.transpose(2, 3)
        return x.flatten(3)  # (B, tp, m, heads x D)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, tp, m, heads x D) -> (B, heads, S / cp, D): how attention wants it."""
        x = x.flatten(1, 2)  # (B, S / cp, heads x D)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join_heads(self, x: Tensor) -> Tensor:
        """(B, heads, S / cp, D) -> (B, tp, m, heads x D): how projections want it."""
        x = x.transpose(1, 2).flatten(2)  # (B, S / cp, heads x D)
        return x.unflatten(1, (self.grid.tp, -1))


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
        gate = self.gate_proj(x)  # (B, tp, m, intermediate / tp)
        up = self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)  # (B, m, hidden)


class Block(nn.Module):
    """One pre-norm transformer layer, (B, m, hidden) -> the same, in three parts:

        before      norm, q k v           each position on its own: in tiles
        attention   softmax(q k^T) v      positions see each other
        after       o, norm, MLP          each position on its own: in tiles
    """

    def __init__(self, config: ModelConfig, grid: Grid, layer: int) -> None:
        super().__init__()
        # RMSNorm: x / sqrt(mean(x^2) + eps) * weight
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, grid, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, grid)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A tile of x (B, m, hidden) -> its q, k, v, see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """A tile of x (B, m, hidden) and of attention's output (B, tp, m, heads x D) -> as x."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor,
                            tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """`before` of all of x, in tiles -> q, k, v (B, heads, S / cp, D)."""
        q, k, v = in_tiles(self.before, (x, cos, sin), tile)  # (B, tp, m, heads x D) each
        split = self.self_attn.split_heads
        return split(q), split(k), split(v)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable, tile: int) -> Tensor:
        """attend: q, k, v -> out, (B, heads, S / cp, D): ring_attention, or that of a KVCache."""
        q, k, v = self.queries_keys_values(x, cos, sin, tile)
        attended = self.self_attn.join_heads(attend(q, k, v))  # (B, tp, m, heads x D)
        return in_tiles(self.after, (x, attended), tile)[0]


# -------------------------------------------------------------- less memory: tiles, recomputation


def in_tiles(function: Callable, inputs: tuple[Tensor, ...], tile: int) -> tuple[Tensor, ...]:
    """function(*inputs), a tensor or several, on `tile` positions at a time; always as a tuple.

    Positions are dimension -2. 10 of them in tiles of 4, y = function(x):

        y[..., 0:4, :] from x[..., 0:4, :], then 4:8, then 8:10

    What function makes on its way, such as an MLP's gate, up and product, lives for one tile.
    """
    length = inputs[0].shape[-2]
    results = None
    for start in range(0, length, tile):
        end = start + tile
        parts = function(*[x[..., start:end, :] for x in inputs])
        if isinstance(parts, Tensor):
            parts = (parts,)
        if tile >= length:  # one tile is everything: nothing to copy, and autograd can follow
            return parts
        if results is None:  # now the shapes are known
            results = tuple(x.new_empty(*x.shape[:-2], length, x.shape[-1]) for x in parts)
        for result, part in zip(results, parts, strict=True):
            result[..., start:end, :] = part
    return results


def tiles_backward(function: Callable, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...],
                   gradients: tuple[Tensor, ...], tile: int) -> list[Tensor]:
    """Gradients of `inputs` from those of function(*inputs, *constants), a tile at a time:

        y[0:4] again from x[0:4], dx[0:4] from dy[0:4], then 4:8, then 8:10

    Gradients of parameters, sums over the tiles, are added up in `parameter.grad`, as always.
    """
    d_inputs = [torch.empty_like(x) for x in inputs]
    for start in range(0, inputs[0].shape[-2], tile):
        end = start + tile
        # 1. forward again, from leaves: there the tile's backward ends
        leaves = [x[..., start:end, :].detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            outputs = function(*leaves, *[x[..., start:end, :] for x in constants])
        # 2. backward, and the leaves' gradients to their place
        torch.autograd.backward(outputs, [dy[..., start:end, :] for dy in gradients])
        for d_input, leaf in zip(d_inputs, leaves, strict=True):
            d_input[..., start:end, :] = leaf.grad
    return d_inputs


class RecomputedBlock(torch.autograd.Function):
    """A block that computes most of itself again in backward, tile by tile (arXiv 1604.06174).

    Sizes are those of one layer of Llama-3.1-8B on one rank: 1M tokens, tp 8, cp 4, bfloat16.

        recompute   what is kept                 size      what is computed again
        none        all that autograd needs      8.6 GiB   nothing: a plain Block
        mlp         x; attention's out and lse   516 MiB   before, after
        block       x                            256 MiB   before, attention, after

    Attention is by far the most work at this length, quadratic in S. Its backward needs q, k, v,
    out and lse (the log-sum-exp of its rows). q, k and v are a projection away from x, so with
    "mlp", which keeps the other two, attention's forward never runs twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: Block, cos: Tensor, sin: Tensor,
                segments: list[list[int]] | None, tile: int, recompute: str) -> Tensor:
        """x (B, m, hidden) -> the block's output, of the same shape."""
        ctx.settings = block, (cos, sin), segments, tile, recompute
        attention = block.self_attn
        q, k, v = block.queries_keys_values(x, cos, sin, tile)
        attended, lse = ring_forward(q, k, v, attention.grid, segments)
        del q, k, v
        attended = attention.join_heads(attended)  # contiguous: save_on_cpu gives back no other
        out_lse = (attended, lse) if recompute == "mlp" else (None, None)
        ctx.save_for_backward(x, *out_lse)
        return in_tiles(block.after, (x, attended), tile)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The output's gradient (B, m, hidden) -> x's; parameters' go into `parameter.grad`."""
        block, tables, segments, tile, recompute = ctx.settings
        attention = block.self_attn
        # 1. what attention's backward needs: q, k, v again; out and lse where they were not kept
        x, attended, lse = ctx.saved_tensors
        q, k, v = block.queries_keys_values(x, *tables, tile)
        if recompute == "block":
            attended, lse = ring_forward(q, k, v, attention.grid, segments)
            attended = attention.join_heads(attended)
        # 2. back through `after`: x is one of its inputs, attention's output the other
        dx, d_attended = tiles_backward(block.after, (x, attended), (), (dy,), tile)
        # 3. back through attention
        out = attention.split_heads(attended)
        d_out = attention.split_heads(d_attended)
        gradients = ring_backward(d_out, q, k, v, out, lse, attention.grid, segments)
        del q, k, v, attended, d_attended, out, d_out
        # 4. back through `before`
        gradients = tuple(attention.join_heads(gradient) for gradient in gradients)
        (d_before,) = tiles_backward(block.before, (x,), tables, gradients, tile)
        return dx.add_(d_before), *[None] * 6


# -------------------------------------------------------------------------------- the whole model


class KVCache:
    """Keys and values of every layer, spread over the ring: a rank keeps those it has computed.

    A prompt of 8 tokens on cp 2, then three tokens one by one:

        first rank     0 1 6 7    8 9 10    a lone token, padded, lies in chunk 0: the first rank's
        second rank    2 3 4 5

    `truncate` forgets the last ones: prompts that begin alike compute their common beginning once.
    """

    def __init__(self, config: ModelConfig, grid: Grid, batch: int, capacity: int,
                 like: Tensor) -> None:
        heads = config.num_key_value_heads // grid.tp
        # layers, keys and values, B, Hkv / tp, capacity, D
        shape = (config.num_hidden_layers, 2, batch, heads, capacity, config.head_dim)
        self.keys_values = like.new_empty(shape)
        self.grid = grid
        self.capacity = capacity  # tokens that a rank has room for
        self.positions = torch.empty(0, dtype=torch.int64)  # of this rank's tokens, rising
        self.length = 0  # tokens of all ranks

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.positions = self.positions[self.positions < length]
        self.length = min(length, self.length)

    def fullest(self) -> int:
        """How many tokens the fullest rank has: after `truncate` ranks may hold unequal numbers."""
        size = torch.tensor(len(self.positions), device=self.keys_values.device)
        return self.grid.all_reduce(size, "cp", dist.ReduceOp.MAX).item()

    def attend(self, new: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of s more tokens, of which `new` are no padding, over all tokens so far.

        q (B, H / tp, s, D), k and v (B, Hkv / tp, s, D) -> as q. Stores the new keys and values.
        """
        keys, values = self.keys_values[layer]  # (B, Hkv / tp, capacity, D) each
        old, end = len(self.positions), len(self.positions) + new
        assert end <= self.capacity, f"the KV cache has room for {self.capacity} tokens, not {end}"
        keys[:, :, old:end] = k[:, :, :new]
        values[:, :, old:end] = v[:, :, :new]
        out, lse = ring_forward(q, k, v, self.grid)  # among the s tokens, causally
        if self.length:  # they all see the earlier ones
            out = attend_earlier(q, out, lse, keys[:, :, :old], values[:, :, :old], self.grid)
        return out


class Llama(nn.Module):
    """A Llama for causal language modelling, spread over a grid; its settings change no result:

        recompute   one of RECOMPUTE: what backward computes again, see `RecomputedBlock`
        offload     what recomputed blocks keep is kept in host memory
        tile        how many positions, of all tp ranks and rows together, go through a block or the
                    loss at a time (None: see `positions_a_tile`)

    Every public method is called on all ranks of a replica (cp x tp) with the same, whole rows of
    tokens; each rank computes its share, and all return the same result.
    """

    def __init__(self, config: ModelConfig, grid: Grid | None = None) -> None:
        super().__init__()
        grid = grid or Grid()
        config.check_tp(grid.tp)
        self.config = config
        self.grid = grid
        self.recompute = "none"
        self.offload = False
        self.tile = None
        vocabulary, hidden = config.vocab_size, config.hidden_size
        blocks = [Block(config, grid, layer) for layer in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": VocabParallelEmbedding(vocabulary, hidden, grid),
            "layers": nn.ModuleList(blocks),
            "norm": nn.RMSNorm(hidden, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = ColumnParallelLinear(hidden, vocabulary, grid)

    @torch.no_grad()
    def initialise(self, seed: int) -> Llama:
        """Normal(0, initializer_range) matrices, zero biases, unit norms: the same for a seed.

        Each key projection starts equal to the first query projection that reads it: a token looks
        for its like from the first step on (mimetic initialisation, arXiv 2305.09828), and a small
        model learns to retrieve several times sooner.
        """
        config, grid = self.config, self.grid
        generator = torch.Generator().manual_seed(seed)
        dims = shard_dims(self)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # every rank draws the whole matrix and keeps its shard
                dim = dims[name]
                whole = torch.empty(whole_shape(parameter.shape, dim, grid))
                whole.normal_(0.0, config.initializer_range, generator=generator)
                parameter.copy_(whole.chunk(grid.tp, dim)[grid.tp_rank])
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        group = config.num_attention_heads // config.num_key_value_heads  # queries that share keys
        for block in self.model.layers:
            queries = block.self_attn.q_proj.weight  # (H D, hidden)
            queries = queries.unflatten(0, (-1, group, config.head_dim))  # (Hkv, group, D, hidden)
            keys = queries[:, 0].flatten(0, 1)  # (Hkv D, hidden)
            block.self_attn.k_proj.weight.copy_(keys)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V / tp, hidden): the embedding itself when tied."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def positions_a_tile(self, position_bytes: float, rows: int = 1) -> int:
        """How many positions of each of `rows` rows a rank puts into a tile. `self.tile`, or what
        TILE_BYTES hold, counts those of all tp ranks and rows: 100, with tp 4 and 2 rows, gives 12
        (of m); in the loss, where all rows are one, 25 (of B m)."""
        tile = self.tile or TILE_BYTES[self.head_weight.device.type] // position_bytes
        return max(1, int(tile) // (self.grid.tp * rows))

    def pad(self, rows: Tensor, value: int = 0) -> Tensor:
        """(B, S) -> (B, S'), padded on the right: 37 positions to 40 on a grid of multiple 8."""
        length = rows.shape[1]
        return F.pad(rows, (0, self.grid.padded(length) - length), value=value)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of this rank's positions (S / cp,): float32 (tp, m, D / 2) each."""
        config = self.config
        inv_freq, factor = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling)
        positions = positions.to(self.head_weight.device)
        cos, sin = rotary_tables(positions, inv_freq, factor)  # (S / cp, D / 2)
        shape = (self.grid.tp, -1)  # S / cp = tp m
        return cos.unflatten(0, shape), sin.unflatten(0, shape)

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None,
                      cache: KVCache | None = None) -> Tensor:
        """Whole rows (B, S) int64 -> the last block's output (B, m, hidden), before the final norm.

        Rows of 37 tokens on cp 2, tp 2 are padded to 40 (Grid.sequence_multiple is 8), which gives
        each rank m = 10 positions, here just one chunk of the zigzag:

                        tp rank 0    tp rank 1
            cp rank 0    0 ...  9    30 ... 39    37, 38 and 39 are padding: no earlier one sees it
            cp rank 1   10 ... 19    20 ... 29

        `document_ids` (B, S) masks documents apart. With a cache the tokens follow those it has.
        """
        grid = self.grid
        assert self.recompute in RECOMPUTE, f"recompute is {self.recompute!r}, none of {RECOMPUTE}"
        check_ids(tokens, self.config.vocab_size)
        # 1. this rank's positions, and their rotary tables, which serve all layers
        length = tokens.shape[1]
        tokens = self.pad(tokens)
        positions = zigzag_positions(tokens.shape[1], grid)  # (S / cp,)
        new = int((positions < length).sum())  # the others, which come last, are padding
        if cache is not None:
            positions += cache.length
        cos, sin = self.rotary_tables(positions)
        segments = None if document_ids is None else document_segments(self.pad(document_ids))
        # 2. its tokens' embedding, a tile of positions at a time
        position_bytes = block_bytes(self.config, grid.tp, self.head_weight.itemsize)
        tile = self.positions_a_tile(position_bytes, len(tokens))
        local = zigzag_shard(tokens, grid, 1).unflatten(1, (grid.tp, -1))  # (B, tp, m)
        x = self.model.embed_tokens(local, tile)  # (B, m, hidden)
        # 3. the blocks
        recompute = self.recompute
        if not torch.is_grad_enabled():  # there is no backward to save memory for
            recompute = "none"
        elif recompute == "none":  # backward needs everything at once: tiles would save nothing
            tile = x.shape[1]
        offload = self.offload and recompute != "none"
        attend = functools.partial(ring_attention, grid=grid, segments=segments)
        with save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext():
            for layer, block in enumerate(self.model.layers):
                if cache is not None:  # attention sees its tokens too
                    attend = functools.partial(cache.attend, new, layer)
                if recompute == "none":
                    x = block(x, cos, sin, attend, tile)
                else:
                    x = RecomputedBlock.apply(x, block, cos, sin, segments, tile, recompute)
        if cache is not None:  # now that every layer has stored these tokens' keys and values
            cache.positions = torch.cat([cache.positions, positions[:new]])
            cache.length += length
        return x

    def hidden_at(self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normed states of some positions (B, n) of rows (B, S) -> (B, n, hidden), on all ranks."""
        grid = self.grid
        hidden = self.hidden_states(tokens, cache=cache)  # (B, m, hidden)
        # 1. the positions that this rank has, rising: its early chunk, then its late one
        length = hidden.shape[1] * grid.cp * grid.tp  # with padding
        own = zigzag_positions(length, grid).chunk(grid.tp)[grid.tp_rank]  # (m,)
        own = own.to(positions.device)
        # 2. the state of each position, of some other one if this rank does not have it
        index = torch.searchsorted(own, positions.contiguous())  # (B, n)
        index = index.clamp(max=len(own) - 1)[..., None]  # (B, n, 1)
        states = hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))  # (B, n, hidden)
        # 3. zeros for the others: in the sum over ranks each position then counts once
        states = states.masked_fill(own[index] != positions[..., None], 0.0)
        return self.model.norm(grid.all_reduce(states, "cp_tp"))

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed states (..., hidden), on all ranks -> scores (..., V). Inference: no gradients."""
        parts = F.linear(hidden, self.head_weight)  # (..., V / tp)
        parts = self.grid.all_gather(parts, "tp")  # (tp, ..., V / tp)
        return parts.movedim(0, -2).flatten(-2)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache for `batch` rows, with room for `capacity` tokens of each on a rank."""
        return KVCache(self.config, self.grid, batch, capacity, self.head_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position, for inference: (B, S) int64 -> (B, S, V). `loss` has none."""
        hidden = self.model.norm(self.hidden_states(tokens))  # (B, m, hidden)
        hidden = GatherSequence.apply(hidden, self.grid).flatten(1, 2)  # (B, S / cp, hidden)
        logits = zigzag_unshard(self.logits(hidden), self.grid, 1)  # (B, S, V), padded
        return logits[:, :tokens.shape[1]]

    def loss(self, tokens: Tensor, targets: Tensor,
             document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the targets that are not -100, and their number.

        tokens, targets (B, S) int64, targets already shifted -> float32 and int64 scalars, the same
        on all ranks of the replica: divide the sum by the number over the whole global batch.
        Backward leaves each rank its share of the gradients. No target: (0, 0), zero gradients.
        """
        norm = self.model.norm
        hidden = self.hidden_states(tokens, document_ids)  # (B, m, hidden)
        check_ids(targets.masked_fill(targets == -100, 0), self.config.vocab_size)
        tile = self.positions_a_tile(logit_bytes(self.config, self.grid.tp, hidden.itemsize))
        losses = TiledCrossEntropy.apply(hidden, norm.weight, self.head_weight, norm,
                                         self.local_targets(targets), self.grid, tile)
        return losses, (targets != -100).sum()

    def local_targets(self, targets: Tensor) -> Tensor:
        """Targets of the positions of this rank of the ring: whole rows (B, S) -> (B, tp, m)."""
        local = zigzag_shard(self.pad(targets, -100), self.grid, 1)  # (B, S / cp)
        return local.unflatten(1, (self.grid.tp, -1))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0,
                 top_p: float = 1.0, stop_tokens: tuple[int, ...] = (), seed: int | None = None,
                 cache: KVCache | None = None) -> Tensor:
        """Continue prompts (B, S) of equal length -> (B, S + n) int64, n <= max_new_tokens.

        temperature, top_p: see `sample`. Ends once every row has produced a stop token; later
        tokens of a finished row repeat it. A `cache` that has the first tokens of the prompts
        (fewer than S) saves computing them; it needs room for the new.
        """
        device = tokens.device
        batch, length = tokens.shape
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        if cache is None:  # a rank's share of the prompt, padded, and, on the first, all new tokens
            share = length // self.grid.cp + self.grid.sequence_multiple
            cache = self.new_cache(batch, share + max_new_tokens)
        for _ in range(max_new_tokens):
            self.grid.restart_timer()
            # 1. read what the cache does not have: the prompts, later each row's newest token
            unread = tokens[:, cache.length:]  # (B, s)
            last = torch.full((batch, 1), unread.shape[1] - 1, device=device)  # (B, 1)
            hidden = self.hidden_at(unread, last, cache)  # (B, 1, hidden)
            # 2. draw the next token from the scores after the last one
            logits = self.logits(hidden[:, 0]).float()  # (B, V)
            newest = sample(logits, temperature, top_p, generator)  # (B,)
            newest = self.grid.broadcast(newest, "cp_tp")  # without a seed every rank draws its own
            # 3. append it; a finished row repeats its stop token; stop once every row is finished
            newest = torch.where(done, tokens[:, -1], newest)
            tokens = torch.cat([tokens, newest[:, None]], dim=1)  # (B, S + 1), (B, S + 2), ...
            done |= torch.isin(newest, stops)
            if done.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, grid: Grid | None = None,
                        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                        rope_scaling: RopeScaling | None = None,
                        rope_theta: float | None = None) -> Llama:
        """Load a Hugging Face directory. dtype None keeps the files'; `rope_scaling` and
        `rope_theta` replace the checkpoint's own, see `rescale`. Raises ValueError or
        FileNotFoundError naming the file."""
        own = read_config(path)
        config = rescale(own, rope_scaling, rope_theta)
        with torch.device("meta"):  # no memory, no time for weights that are about to be replaced
            model = cls(config, grid)
        # 1. Two tensors may be there beside the parameters: the head of a tied model and, in files
        #    of old versions of transformers, the frequencies before any rule.
        inv_freq, _ = inverse_frequencies(own.head_dim, own.rope_theta, RopeScaling())
        owners = ["model", *[f"model.layers.{i}.self_attn" for i in range(len(model.model.layers))]]
        repeated = {f"{owner}.rotary_emb.inv_freq": inv_freq for owner in owners}
        if config.tie_word_embeddings:
            repeated["lm_head.weight"] = model.head_weight
        like = dict(model.named_parameters()) | repeated
        dims = dict.fromkeys(like) | {"lm_head.weight": 0} | shard_dims(model)
        weights = dict(read_weights(
            Path(path), "model", like, dims, model.grid, dtype, device, repeated))
        beside = {name: weights.pop(name) for name in repeated if name in weights}
        model.load_state_dict(weights, strict=True, assign=True)
        # 2. They must repeat what the model has: else we would drop something that has a meaning.
        for name, stored in beside.items():
            if name == "lm_head.weight":
                same = torch.equal(stored, model.head_weight)
                cause = "tie_word_embeddings is true, but model.embed_tokens.weight differs"
            else:  # some were rounded to float16
                same = torch.allclose(stored.double().cpu(), inv_freq, rtol=0.01, atol=1e-7)
                cause = f"rope_theta is {own.rope_theta:g}, of which come others"
            if not same:
                raise ValueError(f"{path}: {name} contradicts config.json, whose {cause}; correct "
                                 "config.json, or delete the tensor")
        return model

    def save_pretrained(self, path: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face directory. Every rank calls this; the grid changes no byte of it."""
        path = Path(path)
        if self.grid.is_first:
            if any(path.glob("*.safetensors")) or (path / "config.json").exists():
                raise ValueError(f"{path}: already holds a model; choose another directory")
            path.mkdir(parents=True, exist_ok=True)
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        write_weights(path, "model", parameters.items(), parameters, shard_dims(self), self.grid,
                      max_shard_bytes)
        if self.grid.is_first:  # config.json comes last: without it this is no model
            config = self.config.to_hf()
            config["torch_dtype"] = str(self.head_weight.dtype).removeprefix("torch.")
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --------------------------------------------------------------------------------- loss, sampling


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """IndexError for an id outside the vocabulary: each tp rank would take it for another's."""
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise IndexError(f"ids from {int(low)} to {int(high)} leave the vocabulary of {vocab_size}")


def block_bytes(config: ModelConfig, tp: int, itemsize: int) -> float:
    """What a position takes on its way through a block and back, at most: the MLP's gathered input
    and output; gate, up, silu(gate) and their product; and a gradient of each."""
    return itemsize * (4 * config.hidden_size + 8 * config.intermediate_size / tp)


def logit_bytes(config: ModelConfig, tp: int, itemsize: int) -> float:
    """What a position takes in the loss: its logits in the compute type and in float32."""
    return config.vocab_size / tp * (itemsize + 4)


class TiledCrossEntropy(torch.autograd.Function):
    """The summed loss and its gradients together, a tile of positions at a time.

    Of a position, with h = norm(x), logits z = W h and dz = softmax(z) - onehot(target):

        dh = W^T dz, and through the norm dx
        dW = dz h^T, summed over positions

    The gradients are known as soon as z is. So forward uses a tile's logits up at once (loss, dx,
    dW), the next tile's overwrite them, and backward multiplies stored gradients by a scalar: no
    product is computed twice. Logits of 1M positions and 128,256 tokens would take 250 GiB in
    bfloat16; those of a tile, in both types, take TILE_BYTES. A tp rank has V / tp rows of W.
    """

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, weight: Tensor, norm: nn.RMSNorm,
                targets: Tensor, grid: Grid, tile: int) -> Tensor:
        """x (B, m, hidden), W (V / tp, hidden), targets (B, tp, m) of all tp ranks -> the sum in
        float32, the same on every rank. norm_weight is norm.weight, for autograd to see it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        d_norm = torch.zeros_like(norm_weight, dtype=wide)
        d_weight = torch.zeros_like(weight, dtype=wide)
        states = x.flatten(0, 1)  # (B m, hidden)
        d_states = torch.empty_like(states)
        targets = targets.movedim(1, 0).flatten(1)  # (tp, B m)
        tile = min(tile, len(states))
        # Two buffers (tp tile, V / tp) serve all tiles: `logits` in the compute type, for products,
        # and `scores` in float32, for the softmax; one if the types are one: copies then do nothing
        logits = x.new_empty(grid.tp * tile, len(weight))
        scores = logits if logits.dtype == wide else torch.empty_like(logits, dtype=wide)
        tiles = zip(states.split(tile), d_states.split(tile), targets.split(tile, 1), strict=True)
        for x_tile, dx_tile, target in tiles:
            # 1. h, of the other tp ranks' positions too
            with torch.enable_grad():
                leaf = x_tile.detach().requires_grad_()  # (tile, hidden)
                normed = norm(leaf)
            h = gathered(normed.detach()[None], grid).flatten(0, 2)  # (tp tile, hidden)
            target = target.flatten()  # (tp tile,)
            # 2. z, in both buffers
            logits, scores = logits[:len(h)], scores[:len(h)]  # the last tile may be shorter
            torch.mm(h, weight.T, out=logits)
            scores.copy_(logits)
            # 3. the loss; z becomes dz * normaliser, in both buffers. To divide there would be one
            #    more pass over (tp tile, V / tp): dh and h are divided instead, which are narrower.
            losses, normaliser = vocab_parallel_cross_entropy(scores, target.clamp(min=0), grid)
            valid = (target != -100).to(wide)
            total += (losses * valid).sum()
            logits.copy_(scores)
            scale = valid[:, None] / normaliser  # (tp tile, 1)
            # 4. dh, of which every tp rank has a part of the sum, and through the norm dx
            d_h = torch.mm(logits, weight).mul_(scale)  # (tp tile, hidden)
            d_h = d_h.view(1, grid.tp, -1, d_h.shape[1])  # (1, tp, tile, hidden)
            d_normed = scattered(d_h, grid)[0]  # (tile, hidden)
            d_leaf, d_norm_part = torch.autograd.grad(normed, (leaf, norm_weight), d_normed)
            dx_tile.copy_(d_leaf)
            d_norm += d_norm_part
            # 5. dW: products of the compute type, summed in float32, some rows of W at a time
            h = (h * scale).to(h.dtype)
            columns = logits.split(VOCABULARY_TILE, dim=1)
            for d_w, dz in zip(d_weight.split(VOCABULARY_TILE), columns, strict=True):
                d_w += dz.T @ h
        ctx.save_for_backward(d_states.view(x.shape), d_norm, d_weight)
        # d total / d (a rank's own part) = 1: backward need not communicate
        return grid.all_reduce(total, "cp")

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_norm, d_weight = [gradient.mul_(d_total) for gradient in ctx.saved_tensors]
        return d_x, d_norm, d_weight, *[None] * 4


def sample(logits: Tensor, temperature: float, top_p: float,
           generator: torch.Generator | None) -> Tensor:
    """A token for each row of logits (B, V) -> (B,) int64; temperature 0 takes the largest.

    Otherwise from the nucleus, the smallest set of probability >= top_p (arXiv 1904.09751): of
    probabilities 0.5, 0.3, 0.15, 0.05 and top_p 0.6 the first two, with 0 and 0.5 above them.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    probabilities, order = probabilities.sort(dim=-1, descending=True)
    above = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ranked above
    probabilities = probabilities.masked_fill(above >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1), a place in `order`
    return order.gather(1, drawn)[:, 0]
