"""Rotary position embedding (RoPE), and every rule that stretches it to a longer window.

RoPE (arXiv 2104.09864) splits a head's D numbers into D/2 pairs and, at position m, rotates pair i
by the angle m f_i:

    f_i = theta^(-2i/D)                  radians a token; wavelength 2 pi / f_i tokens

so a query at m and a key at n meet at the angle (m - n) f_i: attention sees distances. The first
pairs turn once every few tokens; the last do not finish one turn in the training window L. Beyond L
the slow pairs come to angles that training never showed, and the model loses its way. Rules that
reach a window of s L:

    linear  f_i / s                      position interpolation (2306.15595)
    ntk     theta' = theta s^(D/(D-2))   a larger base: the slowest pair / s, the fastest as it was
    yarn    g_i f_i + (1 - g_i) f_i / s  "NTK by parts" (2309.00071)
    llama3  the same with another g_i    Llama-3.1's

linear slows the fast pairs too, so that neighbouring tokens look alike. yarn counts turns, r_i = L
f_i / 2 pi in the old window: pairs above beta_fast turns are kept (g = 1), those below beta_slow
interpolated (g = 0), those between blended. And it multiplies cos and sin by 0.1 ln s + 1: a long
context flattens the softmax, this sharpens it. llama3 does not, and calls beta_fast
high_freq_factor, beta_slow low_freq_factor.

yarn's g is linear in the pair's index i, as in its published code and transformers. The equation in
YaRN's paper is linear in the turns r_i: that is llama3's g, and the frequencies of the two differ
by up to 1.83 times at s = 128. The ultra-long recipe (2504.06214) is yarn with beta_slow 1,
beta_fast 4, L = 8,192 and s = 128, 256 or 512. It replaces Llama-3.1's own scaling: every rule here
starts from theta, so two never stack.

Angles are formed in float64. The float32 product m * f_i is off by 0.05 rad at 1M tokens and 0.2
rad at 4M (half as much again if f_i was computed in float32 too), worst in the fast pairs, which
tell neighbours apart.

    python rope_yarn.py --factor 128     # each pair of Llama-3.1-8B; tools.plot draws it
"""
from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "linear", "ntk", "llama3", "yarn")
CHUNK = 65536  # positions whose float64 angles exist at once in rotary_tables

ORIGINAL = "original_max_position_embeddings"  # L, in a config.json
# of each rope_type: key in a config.json -> our field; and what transformers takes if left out
WINDOW = {"factor": "factor", ORIGINAL: "original_max_position"}
TURNS = {"low_freq_factor": "beta_slow", "high_freq_factor": "beta_fast"}
YARN = {key: key for key in ("beta_slow", "beta_fast", "truncate", "attention_factor")}
HF_FIELDS = {"default": {}, "linear": {"factor": "factor"}, "llama3": WINDOW | TURNS,
             "yarn": WINDOW | YARN}
HF_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0, "truncate": True, "attention_factor": None}


@dataclass(frozen=True)
class RopeScaling:
    """One context-extension rule. Raises ValueError naming a field whose value means nothing."""

    kind: str = "default"  # one of KINDS
    factor: float = 1.0  # s, new window / old window; llama3's is no such ratio (3.1: 8, not 16)
    original_max_position: int | None = None  # L, the old window in tokens: llama3 and yarn need it
    beta_fast: float = 4.0  # pairs with more turns in L are kept (the recipe's; YaRN's own is 32)
    beta_slow: float = 1.0  # pairs with fewer turns in L are interpolated
    attention_temperature: bool = True  # yarn: multiply cos and sin by 0.1 ln s + 1
    attention_factor: float | None = None  # yarn: multiply them by this instead
    truncate: bool = True  # yarn: round the ends of the blend outwards to whole pairs

    def __post_init__(self) -> None:
        # the only place where values are checked; each check relies on those above it
        need = self.need
        length = self.original_max_position
        attention = self.attention_factor
        need("kind", self.kind in KINDS, f"in {KINDS}")
        need("factor", is_number(self.factor) and self.factor >= 1, "a number >= 1")
        need("factor", self.kind != "default" or self.factor == 1, "1 (kind default)")
        need("original_max_position", length is None or (type(length) is int and length > 0),
             "a whole number of tokens above 0")
        need("beta_slow", is_number(self.beta_slow) and self.beta_slow > 0, "a number above 0")
        need("beta_fast", is_number(self.beta_fast) and self.beta_fast > self.beta_slow,
             f"a number above beta_slow, {self.beta_slow}")
        need("attention_temperature", isinstance(self.attention_temperature, bool), "True or False")
        need("attention_factor", attention is None or (is_number(attention) and attention > 0),
             "a number above 0")
        need("attention_factor", attention is None or self.kind == "yarn",
             f"left out (kind {self.kind} has none, only yarn)")
        need("truncate", isinstance(self.truncate, bool), "True or False")

    def need(self, field: str, fits: bool, right: str) -> None:
        """Raise ValueError, which says what would be `right`, unless the field's value `fits`."""
        if not fits:
            value = getattr(self, field)
            raise ValueError(f"rope scaling: {field} is {value!r}; it must be {right}")

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by: 1 except for yarn (arXiv 2309.00071, equation 22)."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.kind == "yarn" and self.attention_temperature:
            return 0.1 * math.log(self.factor) + 1.0
        return 1.0

    @classmethod
    def from_hf(cls, config: dict) -> RopeScaling:
        """Read a config.json's rope_scaling (transformers 4) or rope_parameters (5), or that dict.

        Raises ValueError for anything not understood in full, such as an unknown rope_type or key
        (DeepSeek's mscale is one): a rule half understood is a model that is silently wrong.
        """
        if not isinstance(config, dict):
            raise ValueError(f"rope scaling must be in a JSON object; found {config!r}")
        share = stated_value(config, "partial_rotary_factor", 1)
        if share != 1:  # every pair of a Llama's head is turned
            raise ValueError(f"config.json: partial_rotary_factor is {share!r}; it must be 1")
        # L; where it is not stated, transformers takes the window
        window = stated_value(config, ORIGINAL, config.get("max_position_embeddings"))
        places = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
        if "rope_type" in config or "type" in config:  # it is the scaling itself
            places = [config]
        rules = [cls(**fields_from_hf(place, window)) for place in places]
        if rules and rules[-1] != rules[0]:
            raise ValueError("config.json: rope_scaling and rope_parameters contradict each other; "
                             "keep one")
        return rules[0] if rules else cls()

    def to_hf(self) -> dict:
        """The rope_scaling or rope_parameters from which transformers computes the same.

        yarn's attention_factor is explicit. Raises ValueError for ntk, which has no rope_type.
        """
        if self.kind == "ntk":
            raise ValueError("rope scaling: ntk has no Hugging Face rope_type; write rope_type "
                             "default and rope_theta = ntk_theta(theta, factor, head_dim)")
        values = vars(self) | {"attention_factor": self.cos_sin_factor}
        for field in ("factor", "beta_slow", "beta_fast"):
            values[field] = float(values[field])  # transformers warns of an int
        written = {"rope_type": self.kind}
        for key, field in HF_FIELDS[self.kind].items():
            written[key] = values[field]
        if ORIGINAL in written:
            written[ORIGINAL] = old_window(self)
        return written


def is_number(value: object) -> bool:
    """A finite float, or an int in its range: JSON's true is not a number, nor is its NaN."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def old_window(scaling: RopeScaling) -> int:
    """L, for the kinds that cannot do without. Raises ValueError if it is not stated."""
    if scaling.original_max_position is None:
        raise ValueError(f"rope scaling: {scaling.kind} needs original_max_position")
    return scaling.original_max_position


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware scaling as a larger base: it divides the slowest pair by exactly s."""
    if head_dim < 4:
        raise ValueError(f"head_dim is {head_dim}; ntk needs 4 or more: theta does not move pair 0")
    return theta * factor ** (head_dim / (head_dim - 2))


def kept_share(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """g_i of yarn and llama3, float64 (D/2,): 1 keeps a pair's frequency, 0 divides it by s.

    yarn on Llama-3.1 (D = 128, theta = 500,000, L = 8,192, beta_fast 4, beta_slow 1): pairs 0 to 28
    have g = 1, pairs 29 to 34 have 6/7, 5/7, ... 1/7, pairs 35 to 63 have 0.
    """
    length = old_window(scaling)
    pair = torch.arange(head_dim // 2, dtype=torch.float64)  # i
    if scaling.kind == "llama3":  # the equation in YaRN's paper, section 3.2
        turns = length * theta ** (-2 * pair / head_dim) / (2 * math.pi)  # r_i
        ramp = (turns - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)
        return ramp.clamp(0, 1)
    # YaRN's published code: g falls from 1 to 0 between two pairs, low and high, the ones that turn
    # beta_fast and beta_slow times. r_i = L theta^(-2i/D) / 2 pi = beta gives
    #     i = D ln(L / (2 pi beta)) / (2 ln theta)
    log_fast = math.log(length / (2 * math.pi * scaling.beta_fast))
    log_slow = math.log(length / (2 * math.pi * scaling.beta_slow))
    low = head_dim * log_fast / (2 * math.log(theta))
    high = head_dim * log_slow / (2 * math.log(theta))
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    # D - 1 counts numbers, not pairs: a slip of the published code, kept so that all agree
    high = min(high, head_dim - 1)
    ramp = (pair - low) / ((high - low) or 0.001)  # both ends in one pair: a step, not 0 / 0
    return 1 - ramp.clamp(0, 1)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Radians a token of each pair, float64 (D/2,), fastest first; and the factor on cos and sin.

    Raises ValueError for an odd head_dim, a theta of 1 or less, or an old window that is missing.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and positive, to make pairs")
    if not is_number(theta) or theta <= 1:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 1")
    if scaling.kind == "ntk":
        theta = ntk_theta(theta, scaling.factor, head_dim)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim  # 2i / D
    inv_freq = theta ** -exponent
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind in ("llama3", "yarn"):
        g = kept_share(head_dim, theta, scaling)
        inv_freq = g * inv_freq + (1 - g) * inv_freq / scaling.factor
    return inv_freq, scaling.cos_sin_factor


# -------------------------------------------------------------------------------- the rotation


def rotary_tables(positions: Tensor, inv_freq: Tensor,
                  attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin times the factor: int64 (S,) in any order, float64 (D/2,) -> float32 (S, D/2).

    They are on the device of `positions`.
    """
    inv_freq = inv_freq.to(positions.device)
    shape = (len(positions), len(inv_freq))
    cos = positions.new_empty(shape, dtype=torch.float32)
    sin = torch.empty_like(cos)
    for start in range(0, len(positions), CHUNK):  # all angles of 4M positions would take 2 GB
        rows = slice(start, start + CHUNK)
        angles = torch.outer(positions[rows].double(), inv_freq)  # m f_i: (CHUNK, D/2)
        cos[rows] = angles.cos() * attention_factor
        sin[rows] = angles.sin() * attention_factor
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., S, D) by tables (..., S, D/2) in float32; the result has x's shape and dtype.

    Pair i is (x_i, x_{i + D/2}), Hugging Face's layout. Differentiable in x, not in the tables.
    """
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """Backward is the turn the other way, written out: as cheap as forward."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, sin, -1), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """(first, second) -> (first cos - second sin, second cos + first sin); -1 turns back."""
    halves = x.unflatten(-1, (2, -1))  # (..., S, 2, D/2)
    first, second = halves.unbind(-2)  # (..., S, D/2) each
    turned = halves * cos[..., None, :]  # bfloat16 x float32 is float32, without a copy of x in it
    turned[..., 0, :].addcmul_(second, sin, value=-direction)  # - second sin
    turned[..., 1, :].addcmul_(first, sin, value=direction)  # + first sin
    return turned.flatten(-2).to(x.dtype)  # (..., S, D)


# -------------------------------------------------------------------------- reading config.json


def stated_value(config: dict, key: str, default: object = None):
    """What a config.json states for `key`: in rope_scaling, in rope_parameters or at its top.

    Raises ValueError if these contradict each other.
    """
    places = (config.get("rope_scaling"), config.get("rope_parameters"), config)
    values = []
    for place in places:
        if isinstance(place, dict) and place.get(key) is not None:  # null: left out
            values.append(place[key])
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"config.json: {key} has several values, {values}; keep one")
    return values[0] if values else default


def fields_from_hf(stated: dict, window: int | None) -> dict:
    """RopeScaling's fields, unchecked, in a scaling of a config.json, whose old window is `window`.

    What is left out takes transformers' defaults, not the paper's (yarn: beta_fast 32). Raises
    ValueError for a rope_type or key that is unknown, or a key that is missing.
    """
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise ValueError(f"rope scaling must be one object, not one per layer type: {stated!r}")
    stated = {key: value for key, value in stated.items() if value is not None}  # null: left out
    kind = stated.get("rope_type", stated.get("type", "default"))
    if stated.get("type", kind) != kind:
        raise ValueError(f"rope scaling: rope_type {kind!r} and type {stated['type']!r} differ")
    if not isinstance(kind, str) or kind not in HF_FIELDS:
        raise ValueError(f"rope scaling: rope_type {kind!r} is unknown; known are "
                         f"{', '.join(HF_FIELDS)}; in place of dynamic or longrope use yarn")
    known = [*HF_FIELDS[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor"]
    for key in stated:
        if key not in known:
            raise ValueError(f"rope scaling: {kind} with key {key!r} is unknown; known are {known}")
    stated = HF_DEFAULTS | stated | {ORIGINAL: window}  # `window` is this key's, wherever it stood
    fields = {"kind": kind}
    for key, field in HF_FIELDS[kind].items():
        if key not in stated:
            raise ValueError(f"rope scaling: {kind} needs the key {key!r}")
        fields[field] = stated[key]
    return fields


# -------------------------------------------------------------------------------- command line


def add_scaling_arguments(parser: ArgumentParser, title: str, prefix: str = "rope-"):
    """The options of a rule, `--{prefix}kind` and so on, which `scaling_from_options` reads.

    Returns their group's add_argument, for more of them.
    """
    add = parser.add_argument_group(title).add_argument
    add(f"--{prefix}kind", dest="rope_kind", choices=KINDS)
    add(f"--{prefix}factor", dest="rope_factor", type=float, help="s: new window / old window")
    add("--original-length", type=int, help="old window in tokens (if not given: the model's)")
    add("--beta-fast", type=float, help="keep pairs with more turns than this (if not given: 4)")
    add("--beta-slow", type=float, help="interpolate pairs with fewer (if not given: 1)")
    add("--no-attention-temperature", dest="attention_temperature", action="store_const",
        const=False, help="yarn without 0.1 ln s + 1")
    return add


def scaling_from_options(options: dict) -> RopeScaling | None:
    """The rule that options of `add_scaling_arguments` ask for, None if they ask for none.

    Raises ValueError for settings without a kind, and for a kind without a factor.
    """
    fields = {"factor": "rope_factor", "original_max_position": "original_length",
              "beta_fast": "beta_fast", "beta_slow": "beta_slow",
              "attention_temperature": "attention_temperature"}
    kind = options.get("rope_kind")
    values = {}
    for name, option in fields.items():
        if options.get(option) is not None:
            values[name] = options[option]
    if kind is None and values:
        name = next(iter(values))
        raise ValueError(f"rope scaling: {name} is given without a kind; add --rope-kind yarn")
    if kind is None:
        return None
    if kind != "default" and "factor" not in values:
        raise ValueError(f"--rope-kind {kind} needs --rope-factor, new window / old window")
    return RopeScaling(kind, **values)


def explain(head_dim: int, theta: float, length: int, scaling: RopeScaling) -> str:
    """A table of the pairs (wavelengths in tokens, turns in the old window `length`), a summary."""
    before, _ = inverse_frequencies(head_dim, theta, RopeScaling())
    after, factor = inverse_frequencies(head_dim, theta, scaling)
    # 1 - g: how far a pair is on its way from f to f / s
    whole_way = max(1 - 1 / scaling.factor, 1e-6)  # at s = 1 there is no way: every pair is kept
    way = ((1 - after / before) / whole_way).clamp(0, 1)
    lines = ["pair    wavelength      turns  interpolated  new wavelength   stretch"]
    for pair, share in enumerate(way.tolist()):
        old = before[pair].item()
        new = after[pair].item()
        turns = length * old / (2 * math.pi)
        lines.append(f"{pair:>4}  {2 * math.pi / old:>12,.1f}  {turns:>9,.3f}  {share:>12.2%}  "
                     f"{2 * math.pi / new:>14,.0f}  {old / new:>7.2f}x")
    kept = (way < 1e-9).sum().item()
    interpolated = (way > 1 - 1e-9).sum().item()
    blended = len(way) - kept - interpolated
    reach = f"a window of {length:,} tokens becomes {round(length * scaling.factor):,}"
    aim = "s times slower, so they meet no new angle there"
    if scaling.kind == "llama3":  # its factor is no ratio of windows
        reach = f"pairs of few turns in {length:,} tokens are slowed down"
        aim = "s times slower"
    return "\n".join(lines + [
        "",
        f"{scaling.kind}, s = {scaling.factor:g}: {reach} (theta {theta:,.0f}, D = {head_dim})",
        f"{kept:>3} pairs kept: neighbouring tokens look as they always did",
        f"{blended:>3} pairs blended: that share of the way to interpolated",
        f"{interpolated:>3} pairs interpolated: {aim}",
        f"attention factor {factor:.5f}: multiplies cos and sin, so scores by {factor ** 2:.5f}"])


def add_rule_arguments(parser: ArgumentParser) -> None:
    """The options of a rule and a model to show; not given: the 1M recipe on Llama-3.1-8B."""
    add_scaling_arguments(parser, "rule", prefix="")
    parser.add_argument("--head-dim", type=int, default=128, help="D (128)")
    parser.add_argument("--theta", type=float, default=500000.0, help="RoPE's base (500000)")
    parser.set_defaults(rope_kind="yarn", original_length=8192)


def shown_rule(options: dict) -> RopeScaling:
    """The rule that options of `add_rule_arguments` ask for; s is 128 if it is not given."""
    factor = options["rope_factor"]
    if factor is None:
        factor = 1.0 if options["rope_kind"] == "default" else 128.0
    return scaling_from_options(options | {"rope_factor": factor})


def main(argv: list[str] | None = None) -> None:
    """Print what a rule does to each pair."""
    parser = ArgumentParser(description="Each pair under a rule (not given: yarn, s = 128).")
    add_rule_arguments(parser)
    a = parser.parse_args(argv)
    try:
        rule = shown_rule(vars(a))
        print(explain(a.head_dim, a.theta, a.original_length, rule))
    except (ValueError, ArithmeticError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
