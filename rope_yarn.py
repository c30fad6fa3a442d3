"""Rotary position embedding, and every rule that stretches it to a longer window.

RoPE (arXiv 2104.09864) turns pair i of a head's D numbers by the angle m * f_i at position m, with f_i = theta^(-2i/D).
A query at m and a key at n then meet at the angle (m - n) f_i: attention sees distances. The first pairs turn once
every few tokens (wavelength 2 pi / f_i), the last ones hardly turn within the training window L. Beyond L those slow
pairs reach angles the model has never seen, and it loses its way. With s = new window / L, the rules are:

  linear   f_i / s                      position interpolation (2306.15595): no new angle, but neighbours blur
  ntk      theta' = theta s^(D/(D-2))   stretch slow pairs by s, fast pairs hardly
  yarn     g_i f_i + (1 - g_i) f_i / s  by rotations r_i = L f_i / 2 pi in the old window (2309.00071, "NTK-by-parts"):
                                        keep pairs with r > beta (g = 1), interpolate those with r < alpha (g = 0),
                                        blend between; and multiply cos and sin by 0.1 ln s + 1, which sharpens the
                                        softmax that a longer context flattens
  llama3   the same, g linear in r itself and no temperature: Llama 3.1's rule is YaRN's text with alpha 1, beta 4

The ultra-long recipe (2504.06214) is yarn with alpha = beta_slow = 1, beta = beta_fast = 4, L = 8,192, s = 128 to 512.
Angles are formed in float64: m * f in float32 is off by 0.05 rad at a million tokens and by 0.2 rad at four million.

    python rope_yarn.py --factor 128 [--plot yarn.png]      # what happens to each pair of Llama-3.1-8B
"""
from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("default", "linear", "ntk", "llama3", "yarn")
ROTATION_RAMP_TYPE = "yarn_rotation_ramp"  # unknown to transformers on purpose: it would compute the index ramp
HF_KEYS = {
    "default": (), "linear": ("factor",), "ntk": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "truncate",
             "mscale", "mscale_all_dim")}
HF_KEYS[ROTATION_RAMP_TYPE] = HF_KEYS["yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """One context-extension rule. Raises ValueError, naming the field, for values that mean nothing.

    kind: default, linear, ntk, llama3 or yarn. factor: s, new window / old window. original_max_position: L in tokens,
    which llama3 and yarn need. beta_fast, beta_slow: the paper's beta and alpha, rotations in L above which a pair is
    kept and below which it is interpolated (llama3: high_freq_factor, low_freq_factor). ramp: the blend is linear in the
    pair's "index" (as in the published code and transformers) or in its "rotation" count (the paper's text). truncate:
    round the index ramp's ends outwards. attention_temperature: yarn's 0.1 ln s + 1; attention_factor replaces it.
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
        if self.kind not in KINDS:
            raise ValueError(f"rope scaling kind {self.kind!r} is unknown; known are {', '.join(KINDS)}")
        if self.ramp not in ("index", "rotation"):
            raise ValueError(f"rope scaling ramp {self.ramp!r} is unknown; known are index and rotation")
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position"):
            value = getattr(self, name)
            optional = name in ("attention_factor", "original_max_position") and value is None
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            if not (optional or number):
                raise ValueError(f"rope scaling {name} must be a positive finite number, found {value!r}")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor {self.factor} is below 1; it is new window / old window")
        if self.kind == "default" and self.factor != 1:
            raise ValueError(f"rope scaling kind default has no factor, found {self.factor}; use yarn")
        if self.original_max_position is not None and self.original_max_position != int(self.original_max_position):
            raise ValueError(f"rope scaling original_max_position {self.original_max_position} must be a whole number of tokens")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"rope scaling beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}")

    @classmethod
    def from_hf(cls, config: dict) -> RopeScaling:
        """Read a config.json (its rope_scaling of transformers 4 or rope_parameters of 5), or that dict itself.

        Omitted values take transformers' defaults. Raises ValueError for unknown or contradictory settings.
        """
        scaling = scaling_dict(config)
        kind = rope_type(scaling)
        if kind == "default":
            return cls()
        unknown = [key for key in scaling if key not in HF_KEYS[kind] and key not in ("type", "rope_type", "rope_theta")]
        if unknown:
            raise ValueError(f"rope scaling of type {kind} has no setting {unknown[0]!r}; it has {', '.join(HF_KEYS[kind])}")
        if scaling.get("factor") is None:
            raise ValueError(f"rope scaling of type {kind} needs a factor")
        if kind in ("linear", "ntk"):
            return cls(kind, number(scaling, "factor"))
        original = next((x for x in (scaling.get("original_max_position_embeddings"),
                                     config.get("original_max_position_embeddings"),
                                     config.get("max_position_embeddings")) if x is not None), None)
        if kind == "llama3":
            return cls(kind, number(scaling, "factor"), original, number(scaling, "high_freq_factor"),
                       number(scaling, "low_freq_factor"), attention_temperature=False)
        factor, attention_factor = number(scaling, "factor"), scaling.get("attention_factor")
        if attention_factor is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention_factor = (temperature(factor, number(scaling, "mscale"))
                                / temperature(factor, number(scaling, "mscale_all_dim")))
        return cls("yarn", factor, original, number(scaling, "beta_fast", 32.0), number(scaling, "beta_slow", 1.0),
                   attention_factor=attention_factor, ramp="rotation" if kind == ROTATION_RAMP_TYPE else "index",
                   truncate=bool(scaling.get("truncate", True)))

    def to_hf(self) -> dict:
        """The value of `rope_scaling` in a config.json; yarn's attention_factor is always written out.

        Two rules have no Hugging Face name: static ntk (export `ntk_theta` as rope_theta instead) and yarn's rotation
        ramp, whose own type makes other readers fail loudly instead of computing something else.
        """
        if self.kind == "default":
            return {"rope_type": "default"}
        if self.kind in ("linear", "ntk"):
            return {"rope_type": self.kind, "factor": self.factor}
        if self.original_max_position is None:
            raise ValueError(f"rope scaling of kind {self.kind} needs original_max_position to be written")
        shared = {"factor": self.factor, "original_max_position_embeddings": int(self.original_max_position)}
        if self.kind == "llama3":
            return {"rope_type": "llama3", **shared, "low_freq_factor": self.beta_slow, "high_freq_factor": self.beta_fast}
        return {"rope_type": "yarn" if self.ramp == "index" else ROTATION_RAMP_TYPE, **shared,
                "beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate,
                "attention_factor": self.cos_sin_factor()}

    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by: 1 except for yarn (arXiv 2309.00071, equation 22)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return temperature(self.factor) if self.attention_temperature else 1.0


def temperature(factor: float, scale: float = 1.0) -> float:
    """YaRN's 0.1 ln s + 1."""
    return 0.1 * scale * math.log(factor) + 1.0


def number(scaling: dict, key: str, default: float | None = None) -> float:
    """scaling[key] as a number; missing or null gives the default, and an error if there is none."""
    value = scaling.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"rope scaling {key} must be a number, found {scaling.get(key, 'nothing')!r}")
    return float(value)


def scaling_dict(config: dict) -> dict:
    """The one scaling dict of a config.json (or the dict itself), refusing two that disagree."""
    if "rope_type" in config or "type" in config:
        return config
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            raise ValueError(f"config.json: {name} must be one flat JSON object; one per layer type is not supported")
    if old and new and any(old.get(k) != new.get(k) for k in (old.keys() | new.keys()) - {"rope_theta", "type", "rope_type"}):
        raise ValueError(f"config.json: rope_scaling {old} and rope_parameters {new} contradict each other; keep one")
    if old and new and rope_type(old) != rope_type(new):
        raise ValueError(f"config.json: rope_scaling is {rope_type(old)} and rope_parameters is {rope_type(new)}; keep one")
    return new or old


def rope_type(scaling: dict) -> str:
    """The kind a scaling dict names; ValueError if it is unknown, unsupported or named twice differently."""
    names = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(set(map(str, names))) > 1:
        raise ValueError(f"rope scaling: rope_type {names[0]!r} and type {names[1]!r} contradict each other; keep rope_type")
    if not names and scaling.get("factor") is not None:
        raise ValueError("rope scaling has a factor but no rope_type; name one of linear, llama3, yarn")
    name = names[0] if names else "default"
    if name in ("dynamic", "longrope"):
        raise ValueError(f"rope scaling type {name} changes with the input's length and is not supported; use yarn")
    if name not in HF_KEYS:
        raise ValueError(f"rope scaling type {name!r} is unknown; known are {', '.join(KINDS)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope scaling partial_rotary_factor {scaling['partial_rotary_factor']} is not supported; only 1.0 is")
    return name


def rope_theta_from_hf(config: dict) -> float:
    """RoPE's base: rope_theta of the config.json or of its rope_parameters, 10,000 if neither is there."""
    found = {number(place, "rope_theta") for place in (config, config.get("rope_parameters") or {})
             if place.get("rope_theta") is not None}
    if len(found) > 1 or any(not 1 < theta < math.inf for theta in found):
        raise ValueError(f"config.json: rope_theta must be one number above 1, found {sorted(found)}")
    return found.pop() if found else 10000.0


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware scaling as a change of base: theta s^(D/(D-2)) stretches the slowest pair by exactly s."""
    return theta * factor ** (head_dim / (head_dim - 2))


def kept_share(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """g_i of yarn and llama3 for each pair, float64 (D/2,): 1 keep the frequency, 0 divide it by s."""
    if scaling.original_max_position is None:
        raise ValueError(f"rope scaling of kind {scaling.kind} needs original_max_position, the window before extension")
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    length = scaling.original_max_position
    if scaling.kind == "llama3" or scaling.ramp == "rotation":
        rotations = length * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        return ((rotations - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)).clamp(0, 1)
    # the (fractional) pair that makes so many rotations within the original length: 2309.00071, section 3.2
    low, high = (head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return 1 - ((pair - low) / (high - low or 0.001)).clamp(0, 1)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Radians per token of each pair, float64 (D/2,), fastest first, and the factor on cos and sin."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even: rotary embedding turns pairs")
    if scaling.kind == "ntk":
        theta = ntk_theta(theta, scaling.factor, head_dim)
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind in ("llama3", "yarn"):
        keep = kept_share(head_dim, theta, scaling)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return frequency, scaling.cos_sin_factor()


def rotary_tables(positions: Tensor, inv_freq: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and pair: int64 (S,), float64 (D/2,) -> float32 (S, D/2) each."""
    angles = torch.outer(positions.to(torch.float64), inv_freq)  # float64: see the module's docstring
    return tuple((table * attention_factor).to(torch.float32) for table in (angles.cos(), angles.sin()))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, H, S, D) by cos, sin (S, D/2); pair i is (x_i, x_{i + D/2}), Hugging Face's split-half layout.

    The rotation is done in float32 (float64 for float64 input) and returned in x's dtype.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)  # (B, H, S, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# -------------------------------------------------------------------------------------------- what YaRN does, shown


def explain(head_dim: int, theta: float, length: int, scaling: RopeScaling) -> str:
    """One row a frequency pair: wavelength, rotations in the original window, what the rule does, new wavelength."""
    before, _ = inverse_frequencies(head_dim, theta, RopeScaling())
    after, factor = inverse_frequencies(head_dim, theta, scaling)
    rows = [f"{'pair':>4} {'wavelength':>13} {'rotations':>11}  {'':<15} {'new wavelength':>16} {'stretch':>8}"]
    for pair, (old, new) in enumerate(zip(before.tolist(), after.tolist())):
        stretch = old / new
        share = (1 - new / old) / (1 - 1 / scaling.factor) if scaling.factor > 1 else 0.0
        change = "kept" if share < 1e-9 else "interpolated" if share > 1 - 1e-9 else f"blended {share:5.1%}"
        rows.append(f"{pair:>4} {2 * math.pi / old:>13,.1f} {length * old / (2 * math.pi):>11,.2f}  {change:<15} "
                    f"{2 * math.pi / new:>16,.1f} {stretch:>7.2f}x")
    rows.append(f"window {length:,} -> {round(length * scaling.factor):,} tokens, {scaling.kind}, s = {scaling.factor:g}; "
                f"cos and sin are multiplied by {factor:.5f}")
    return "\n".join(rows)


def plot(path: Path, head_dim: int, theta: float, length: int, scaling: RopeScaling) -> None:
    """Draw each pair's wavelength before and after, with the two windows."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for label, rule in (("RoPE", RopeScaling()), (f"{scaling.kind}, s = {scaling.factor:g}", scaling)):
        axes.semilogy(2 * math.pi / inverse_frequencies(head_dim, theta, rule)[0], marker=".", label=label)
    axes.axhline(length, color="gray", linestyle=":", label=f"old window, {length:,}")
    axes.axhline(length * scaling.factor, color="gray", linestyle="--", label=f"new window, {round(length * scaling.factor):,}")
    axes.set(xlabel="frequency pair", ylabel="wavelength (tokens)", title="What each frequency pair becomes")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show what a context-extension rule does to each frequency pair.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--factor", type=float, default=128.0, help="s, new window / old window")
    parser.add_argument("--kind", choices=KINDS[1:], default="yarn")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--theta", type=float, default=500000.0, help="RoPE base")
    parser.add_argument("--original-length", type=int, default=8192, help="window before, in tokens")
    parser.add_argument("--beta-fast", type=float, default=4.0)
    parser.add_argument("--beta-slow", type=float, default=1.0)
    parser.add_argument("--ramp", choices=("index", "rotation"), default="index")
    parser.add_argument("--no-truncate", action="store_true", help="do not round the ramp's ends")
    parser.add_argument("--no-attention-temperature", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    a = parser.parse_args(argv)
    try:
        scaling = RopeScaling(a.kind, a.factor, a.original_length, a.beta_fast, a.beta_slow,
                              not a.no_attention_temperature, ramp=a.ramp, truncate=not a.no_truncate)
        if not a.theta > 1:
            raise ValueError(f"--theta {a.theta} must be above 1")
        print(explain(a.head_dim, a.theta, a.original_length, scaling))
        if a.plot:
            plot(a.plot, a.head_dim, a.theta, a.original_length, scaling)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
