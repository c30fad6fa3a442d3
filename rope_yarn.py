"""Rotary position embedding (RoPE), and every rule that stretches it to a longer window.

RoPE (arXiv 2104.09864) splits a head's D numbers into D/2 pairs and, at position m, turns pair i by m f_i:

    f_i = theta^(-2i/D)                    radians a token; wavelength 2 pi / f_i tokens

so a query at m and a key at n meet at the angle (m - n) f_i: attention sees distances. The first pairs turn
once every few tokens; the last do not finish one turn in the training window L. Beyond L the slow pairs come
to angles that training never showed, and the model loses its way. To reach a window of s L without that:

    linear  f_i / s                        position interpolation (2306.15595): no new angle, neighbours blur
    ntk     theta' = theta s^(D/(D-2))     larger base: divides the slowest pair by s, the fastest not at all
    yarn    g_i f_i + (1 - g_i) f_i / s    "NTK by parts" (2309.00071): count turns r_i = L f_i / 2 pi in L;
                                           keep pairs above beta_fast turns (g = 1), interpolate those
                                           below beta_slow (g = 0), blend between. And multiply cos and sin
                                           by 0.1 ln s + 1: long context flattens the softmax, this sharpens
    llama3  the same, g linear in r_i,     Llama-3.1's rule is YaRN's text without the sharpening:
            cos and sin not sharpened      high_freq_factor = beta_fast, low_freq_factor = beta_slow

yarn's g is linear in the pair's index i, as in its published code and transformers; the equation in its paper
is linear in the turns r_i (ramp="rotation"), and the two differ by up to 1.83 times. The ultra-long recipe
(2504.06214) is yarn with beta_slow 1, beta_fast 4, L = 8,192 and s = 128, 256 or 512. It replaces Llama-3.1's
own scaling: every rule here starts from theta, so two can never stack.

Angles are formed in float64. The float32 product m * f_i is off by 0.05 rad at 1M tokens and 0.2 rad at 4M
(half as much again if f_i was computed in float32 too), worst in the fast pairs, which tell neighbours apart.

    python rope_yarn.py --factor 128      # what happens to each pair of Llama-3.1-8B; tools.plot draws it
"""
from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("default", "linear", "ntk", "llama3", "yarn")
ROTATION_RAMP_TYPE = "yarn_rotation_ramp"  # our own name: transformers must fail, not use its own ramp
ORIGINAL = "original_max_position_embeddings"
YARN_KEYS = ("factor", ORIGINAL, "beta_fast", "beta_slow", "truncate",
             "attention_factor", "mscale", "mscale_all_dim")
HF_KEYS = {"default": (), "linear": ("factor",), "yarn": YARN_KEYS, ROTATION_RAMP_TYPE: YARN_KEYS,
           "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor")}
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
CHUNK = 65536  # positions whose float64 angles exist at once in rotary_tables


# -------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class RopeScaling:
    """One context-extension rule. Raises ValueError naming the field that means nothing.

    kind: default, linear, ntk, llama3 or yarn.
    factor: s = new window / old window; but llama3's is no ratio of windows (3.1: 8 and 8,192, its window is 131,072).
    original_max_position: L, the old window in tokens; llama3 and yarn compute no frequencies without it.
    beta_fast, beta_slow: turns within L above which a pair is kept, below which it is interpolated.
    attention_temperature: yarn multiplies cos and sin by 0.1 ln s + 1; attention_factor replaces it.
    ramp: what yarn's blend is linear in, the pair's "index" or its "rotation" count.
    truncate: round the ends of yarn's index ramp outwards to whole pairs.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 4.0
    beta_slow: float = 1.0
    attention_temperature: bool = True
    attention_factor: float | None = None
    ramp: str = "index"
    truncate: bool = True

    def __post_init__(self) -> None:
        yarn, length, attention = self.kind == "yarn", self.original_max_position, self.attention_factor
        positive = {name: is_number(getattr(self, name)) and getattr(self, name) > 0
                    for name in ("factor", "beta_fast", "beta_slow", "attention_factor")}
        checks = (
            ("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            ("factor", positive["factor"] and self.factor >= 1, "a number >= 1, new window / old window"),
            ("factor", self.kind != "default" or self.factor == 1, "1 for kind default; or name a kind"),
            ("original_max_position", length is None or (type(length) is int and length > 0),
             "a whole number of tokens above 0"),
            ("beta_slow", positive["beta_slow"], "a number above 0"),
            ("beta_fast", positive["beta_fast"] and self.beta_fast > self.beta_slow,
             f"a number above beta_slow, {self.beta_slow}"),
            ("attention_temperature", isinstance(self.attention_temperature, bool), "True or False"),
            ("attention_factor", attention is None or (yarn and positive["attention_factor"]),
             "a number above 0, and for kind yarn only"),
            ("ramp", self.ramp == "index" or (self.ramp == "rotation" and yarn), "index (yarn: or rotation)"),
            ("truncate", isinstance(self.truncate, bool), "True or False"))
        for name, fine, right in checks:
            if not fine:
                raise ValueError(f"rope scaling: {name} is {getattr(self, name)!r}; it must be {right}")

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by: 1 except for yarn (arXiv 2309.00071, equation 22)."""
        if self.kind == "yarn" and self.attention_factor is not None:
            return float(self.attention_factor)
        return yarn_temperature(self.factor) if self.kind == "yarn" and self.attention_temperature else 1.0

    @classmethod
    def from_hf(cls, config: dict) -> RopeScaling:
        """Read a config.json's rope_scaling (transformers 4) or rope_parameters (5), or that dict itself.

        What is left out takes transformers' defaults (yarn: beta_fast 32, beta_slow 1). Raises ValueError for
        anything not understood in full: a scaling half understood is a model that is silently wrong.
        """
        if not isinstance(config, dict):
            raise ValueError(f"rope scaling must be a JSON object, of config.json or its scaling: {config!r}")
        if "rope_type" in config or "type" in config:
            return read_scaling("rope scaling", config, config)
        refuse_partial_rotation("config.json", config)
        found = [read_scaling(name, config[name], config) for name in ("rope_scaling", "rope_parameters")
                 if config.get(name) not in (None, {})]
        if len(found) == 2 and found[0] != found[1]:
            raise ValueError(f"config.json: rope_scaling {config['rope_scaling']} and rope_parameters "
                             f"{config['rope_parameters']} contradict each other; keep one")
        return found[0] if found else cls()

    def to_hf(self) -> dict:
        """The value of rope_scaling or rope_parameters in a config.json; yarn's attention_factor is explicit.

        What Hugging Face can express is written so that transformers computes the same. Two rules it cannot:
        ntk raises ValueError (write rope_theta = `ntk_theta` and kind default instead). yarn's rotation ramp
        gets a rope_type of our own, which `from_hf` reads and transformers refuses, unless its attention
        factor is 1: then it is Llama-3.1's rule, and is written as such.
        """
        if self.kind == "default":
            return {"rope_type": "default"}
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": float(self.factor)}
        if self.kind == "ntk":
            raise ValueError("rope scaling: ntk has no Hugging Face rope_type; write rope_type default and "
                             "rope_theta = ntk_theta(theta, factor, head_dim)")
        shared = {"factor": float(self.factor), ORIGINAL: old_window(self)}
        if self.kind == "llama3" or (self.ramp == "rotation" and self.cos_sin_factor == 1):
            return {"rope_type": "llama3", **shared,
                    "low_freq_factor": float(self.beta_slow), "high_freq_factor": float(self.beta_fast)}
        return {"rope_type": "yarn" if self.ramp == "index" else ROTATION_RAMP_TYPE, **shared,
                "beta_fast": float(self.beta_fast), "beta_slow": float(self.beta_slow),
                "truncate": self.truncate, "attention_factor": self.cos_sin_factor}


def old_window(scaling: RopeScaling) -> int:
    """original_max_position, for the kinds that cannot do without."""
    if scaling.original_max_position is None:
        raise ValueError(f"rope scaling: {scaling.kind} needs original_max_position, the old window")
    return scaling.original_max_position


def yarn_temperature(factor: float, scale: float = 1.0) -> float:
    """YaRN's 0.1 ln s + 1, for s >= 1; DeepSeek's `mscale` multiplies the logarithm by `scale`."""
    return 0.1 * scale * math.log(factor) + 1.0


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware scaling as a change of base, theta s^(D/(D-2)): the slowest pair is divided by exactly s."""
    if head_dim < 4:
        raise ValueError(f"head_dim is {head_dim}; ntk needs at least 4: theta does not move pair 0")
    return theta * factor ** (head_dim / (head_dim - 2))


def kept_share(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """g_i of yarn and llama3, float64 (D/2,): 1 keeps the pair's frequency, 0 divides it by the factor."""
    length, fast, slow = old_window(scaling), scaling.beta_fast, scaling.beta_slow
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    if scaling.kind == "llama3" or scaling.ramp == "rotation":  # 2309.00071, section 3.2
        turns = length * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        return ((turns - slow) / (fast - slow)).clamp(0, 1)
    # as the published code: the ramp runs between the (fractional) pairs that make `fast` and `slow` turns
    low, high = (head_dim * math.log(length / (2 * math.pi * beta)) / (2 * math.log(theta))
                 for beta in (fast, slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return 1 - ((pair - low) / ((high - low) or 0.001)).clamp(0, 1)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Radians per token of each pair, float64 (D/2,), fastest first; and the factor on cos and sin.

    Raises ValueError for an odd head_dim, a theta of 1 or less, or a missing original_max_position.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and positive, as rotations turn pairs")
    if not is_number(theta) or theta <= 1:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 1")
    if scaling.kind == "ntk":
        theta = ntk_theta(theta, scaling.factor, head_dim)
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind in ("llama3", "yarn"):
        keep = kept_share(head_dim, theta, scaling)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling.factor
    return inv_freq, scaling.cos_sin_factor


# ----------------------------------------------------------------------------------------------- the rotation


def rotary_tables(positions: Tensor, inv_freq: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin times the factor: int64 (S,) in any order, float64 (D/2,) -> float32 (S, D/2) each.

    They are on the device of `positions`.
    """
    cos, sin = (positions.new_empty((len(positions), len(inv_freq)), dtype=torch.float32) for _ in range(2))
    inv_freq = inv_freq.to(positions.device)
    for start in range(0, len(positions), CHUNK):  # in chunks: all angles of 4M positions would take 2 GB
        rows = slice(start, start + CHUNK)
        angles = torch.outer(positions[rows].to(torch.float64), inv_freq)  # (CHUNK, D/2)
        cos[rows], sin[rows] = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., S, D) by the tables (..., S, D/2) in float32; the result has x's shape and dtype.

    Pair i is (x_i, x_{i + D/2}), Hugging Face's split-half layout. Differentiable in x, not in the tables.
    """
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """Backward is the turn the other way, written out: it costs what forward does and keeps no activation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, sin, -1), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """(first, second) -> (first cos - second sin, second cos + first sin); direction -1 turns back."""
    halves = x.unflatten(-1, (2, -1))  # (..., S, 2, D/2)
    turned = halves * cos[..., None, :]  # float32 by promotion, without a float32 copy of x
    turned[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-direction)
    turned[..., 1, :].addcmul_(halves[..., 0, :], sin, value=direction)
    return turned.flatten(-2).to(x.dtype)  # (..., S, D)


# ---------------------------------------------------------------------------------------- reading config.json


def rope_theta_from_hf(config: dict) -> float:
    """RoPE's base: a config.json's rope_theta, at the top level or with the scaling; 10,000 if not stated."""
    places = (config, config.get("rope_parameters"), config.get("rope_scaling"))
    found = {number("config.json", place, "rope_theta") for place in places
             if isinstance(place, dict) and place.get("rope_theta") is not None}
    if len(found) > 1:
        raise ValueError(f"config.json: rope_theta has several values, {sorted(found)}; keep one")
    theta = found.pop() if found else 10000.0
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta is {theta}; it must be a number above 1")
    return theta


def read_scaling(name: str, scaling: dict, config: dict) -> RopeScaling:
    """One scaling dict, called `name` in errors, as a RopeScaling; `config` is the config.json around it."""
    kind = rope_type(name, scaling)
    refuse_partial_rotation(name, scaling)
    known = HF_KEYS[kind] + COMMON_KEYS
    unknown = [key for key in scaling if key not in known]
    if unknown:
        raise ValueError(f"{name}: rope_type {kind} has no key {unknown[0]!r}; it has {', '.join(known)}")
    if kind == "default":
        return RopeScaling()
    factor = number(name, scaling, "factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = original_length(name, scaling, config)
    if kind == "llama3":
        return RopeScaling("llama3", factor, original, number(name, scaling, "high_freq_factor"),
                           number(name, scaling, "low_freq_factor"))
    attention = scaling.get("attention_factor")
    if attention is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):  # both, as in HF
        over, under = (yarn_temperature(max(factor, 1), number(name, scaling, key))
                       for key in ("mscale", "mscale_all_dim"))
        attention = over / under
    return RopeScaling("yarn", factor, original, number(name, scaling, "beta_fast", 32.0),
                       number(name, scaling, "beta_slow", 1.0), attention_factor=attention,
                       ramp="index" if kind == "yarn" else "rotation", truncate=scaling.get("truncate", True))


def rope_type(name: str, scaling: dict) -> str:
    """The type that a scaling dict names, or ValueError if it is not one of ours."""
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(f"{name} must be one flat JSON object, not one per layer type; found {scaling!r}")
    named = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(named) == 2 and named[0] != named[1]:
        raise ValueError(f"{name}: rope_type {named[0]!r} and type {named[1]!r} differ; keep rope_type")
    kind = named[0] if named else "default"
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"{name}: rope_type {kind} varies with the input's length; use yarn instead")
    if not isinstance(kind, str) or kind not in HF_KEYS:
        raise ValueError(f"{name}: rope_type {kind!r} is unknown; known are {', '.join(HF_KEYS)}")
    return kind


def original_length(name: str, scaling: dict, config: dict) -> int | None:
    """The old window: stated with the scaling or beside it, else max_position_embeddings, as transformers."""
    stated = [place[ORIGINAL] for place in (scaling, config) if place.get(ORIGINAL) is not None]
    if any(length != stated[0] for length in stated):  # transformers 4 would follow the first, 5 the second
        raise ValueError(f"{name}: {ORIGINAL} is {stated[0]!r} but {stated[1]!r} at config.json's top; keep one")
    return stated[0] if stated else config.get("max_position_embeddings")


def stated_original(config: dict) -> bool:
    """Whether a config.json states the old window, with its scaling or beside it."""
    places = (config, config.get("rope_scaling"), config.get("rope_parameters"))
    return any(isinstance(place, dict) and place.get(ORIGINAL) is not None for place in places)


def refuse_partial_rotation(name: str, place: dict) -> None:
    """Every pair of a Llama's head is turned; a share of them is another architecture."""
    if place.get("partial_rotary_factor") is not None and number(name, place, "partial_rotary_factor") != 1:
        raise ValueError(f"{name}: partial_rotary_factor is {place['partial_rotary_factor']}; it must be 1")


def is_number(value: object) -> bool:
    """A finite int or float: JSON's true is not a number, nor is its NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def number(name: str, place: dict, key: str, default: float | None = None) -> float:
    """place[key] as a finite float; missing or null gives the default, or ValueError where there is none."""
    value = default if place.get(key) is None else place[key]
    if not is_number(value):
        raise ValueError(f"{name}: {key} is {place.get(key, 'missing')!r}; it must be a number")
    return float(value)


def add_scaling_arguments(parser: argparse.ArgumentParser, title: str, prefix: str = "rope-") -> None:
    """The options of a rule, `--{prefix}kind` and so on: `stated_rule` and `scaling_from_options` read them."""
    rope = parser.add_argument_group(title)
    rope.add_argument(f"--{prefix}kind", dest="rope_kind", choices=KINDS)
    rope.add_argument(f"--{prefix}factor", dest="rope_factor", type=float, help="s: new window / old window")
    rope.add_argument("--original-length", type=int, help="old window in tokens (if not given: the model's)")
    rope.add_argument("--beta-fast", type=float, help="keep pairs with more rotations than this (if not given: 4)")
    rope.add_argument("--beta-slow", type=float, help="interpolate pairs with fewer (if not given: 1)")
    rope.add_argument(f"--{prefix}ramp", dest="rope_ramp", choices=("index", "rotation"),
                      help="what yarn's blend is linear in (if not given: index)")
    rope.add_argument("--no-truncate", dest="truncate", action="store_const", const=False,
                      help="yarn: do not round the ramp's ends")
    rope.add_argument("--no-attention-temperature", "--no-temperature", dest="attention_temperature",
                      action="store_const", const=False, help="yarn without 0.1 ln s + 1")


def stated_rule(options: dict) -> dict:
    """The fields of RopeScaling that these options give, all but the kind."""
    fields = {"factor": "rope_factor", "original_max_position": "original_length", "beta_fast": "beta_fast",
              "beta_slow": "beta_slow", "ramp": "rope_ramp", "truncate": "truncate",
              "attention_temperature": "attention_temperature"}
    return {name: options[option] for name, option in fields.items() if options.get(option) is not None}


def scaling_from_options(options: dict) -> RopeScaling | None:
    """The rule that options of `add_scaling_arguments` ask for, None if they ask for none.

    Raises ValueError for settings without a kind, or no factor.
    """
    kind, stated = options.get("rope_kind"), stated_rule(options)
    if kind is None and stated:
        raise ValueError(f"rope scaling: {next(iter(stated))} is given without a kind; add --rope-kind yarn (or another)")
    if kind not in (None, "default") and "factor" not in stated:
        raise ValueError(f"--rope-kind {kind} needs --rope-factor, new window / old window")
    return None if kind is None else RopeScaling(kind, **stated)


# ----------------------------------------------------------------------------- what a rule does, pair by pair


def explain(head_dim: int, theta: float, length: int, scaling: RopeScaling, known: bool = True) -> str:
    """A table of the pairs (wavelengths in tokens, turns in the old window `length`) and a summary.

    known: whether `length` times the factor is the new window. For llama3 it never is.
    """
    before, _ = inverse_frequencies(head_dim, theta, RopeScaling())
    after, factor = inverse_frequencies(head_dim, theta, scaling)
    lines = ["pair    wavelength  rotations  change           new wavelength   stretch"]
    pairs = {"kept": 0, "blended": 0, "interpolated": 0}
    for pair, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        blend = (1 - new / old) / (1 - 1 / scaling.factor) if scaling.factor > 1 else 0.0
        change = "kept" if blend < 1e-9 else "interpolated" if blend > 1 - 1e-9 else "blended"
        pairs[change] += 1
        shown = f"blended {blend:7.2%}" if change == "blended" else change
        lines.append(f"{pair:>4}  {2 * math.pi / old:>12,.1f}  {length * old / (2 * math.pi):>9,.3f}  "
                     f"{shown:<15}  {2 * math.pi / new:>14,.0f}  {old / new:>7.2f}x")
    reach = f"a window of {length:,} tokens becomes {round(length * scaling.factor):,}"
    aim = "s times slower, so the new window has no new angle"
    if not known or scaling.kind == "llama3":
        reach = f"pairs of few turns in {length:,} tokens are slowed down; config.json says how far that reaches"
        aim = "s times slower"
    return "\n".join(lines + [
        "", f"{scaling.kind}, s = {scaling.factor:g}: {reach} (theta {theta:,.0f}, head dim {head_dim})",
        f"{pairs['kept']:>3} pairs kept: neighbouring tokens look as they always did",
        f"{pairs['blended']:>3} pairs blended: the percentage is how far they are from kept to interpolated",
        f"{pairs['interpolated']:>3} pairs interpolated: {aim}",
        f"attention factor {factor:.5f}: multiplies cos and sin, so attention scores by {factor ** 2:.5f}"])


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which rule to explain, of which model."""
    add_scaling_arguments(parser, "rule", prefix="")
    model = parser.add_argument_group("model")
    model.add_argument("--config", type=Path, metavar="FILE", help="config.json to read all of this from")
    model.add_argument("--head-dim", type=int, help="D (128)")
    model.add_argument("--theta", type=float, help="RoPE's base (500000)")


def read_config(path: Path) -> tuple[int, float, int, RopeScaling, bool]:
    """Head dim, theta, old window and scaling of a config.json, and whether it says which window that is."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    scaling, theta = RopeScaling.from_hf(config), rope_theta_from_hf(config)
    if config.get("head_dim") is None:
        heads = number(str(path), config, "num_attention_heads")
        config = config | {"head_dim": number(str(path), config, "hidden_size") // heads if heads > 0 else 0}
    length = scaling.original_max_position or number(str(path), config, "max_position_embeddings")
    if scaling.kind == "linear":  # such a file states the window after the extension
        length = round(length / scaling.factor)
    known = scaling.kind != "yarn" or stated_original(config)
    return int(number(str(path), config, "head_dim")), theta, int(length), scaling, known


def rule_from_options(options: dict) -> tuple[int, float, int, RopeScaling, bool]:
    """Head dim, theta, old window and rule of these options: a config.json's, or yarn at factor 128 on Llama-3.1-8B; and
    whether the old window is one: yarn whose config.json does not state it is computed with another number."""
    path = options["config"]
    head_dim, theta, length, scaling, known = read_config(path) if path else (128, 500000.0, 8192, None, True)
    head_dim = head_dim if options["head_dim"] is None else options["head_dim"]
    theta = theta if options["theta"] is None else options["theta"]
    asked, kind = stated_rule(options), options["rope_kind"]
    length = asked.pop("original_max_position", length)  # the table's window, with any rule
    if asked or kind or scaling is None:
        factor = 1.0 if kind == "default" else 128.0
        scaling, known = RopeScaling(kind or "yarn", **{"factor": factor} | asked), True
    return head_dim, theta, length, replace(scaling, original_max_position=length), known


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Show what a context-extension rule does to each frequency pair.",
        epilog="Without --config: yarn at factor 128 on Llama-3.1-8B. With it: that model and its own rule, "
               "which any option of the rule replaces as a whole (rules never stack).")
    add_rule_arguments(parser)
    a = parser.parse_args(argv)
    try:
        print(explain(*rule_from_options(vars(a))))
    except (ValueError, OSError, ArithmeticError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
