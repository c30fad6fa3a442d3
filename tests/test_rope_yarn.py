"""Rotary embedding: parity with transformers, precision at four million tokens, and every refusal."""
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path

import pytest
import torch

import rope_yarn
from rope_yarn import (
    RopeScaling,
    apply_rotary,
    inverse_frequencies,
    ntk_theta,
    rope_theta_from_hf,
    rotary_tables,
)

SCRIPT = Path(rope_yarn.__file__)
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192}
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def ultralong(factor=128.0, **changes) -> RopeScaling:
    return RopeScaling("yarn", factor, 8192, **changes)


def random_scaling(draw: random.Random, kind: str) -> dict:
    """A rope_scaling dict that transformers accepts, with every optional key there or not."""
    factor = draw.choice([1.0, 2, 4.0, draw.uniform(1, 600)])
    original = draw.choice([128, 2048, 8192, 32768])
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        low = draw.uniform(0.25, 2)
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original,
                "low_freq_factor": low, "high_freq_factor": low + draw.uniform(0.5, 30)}
    optional = {"beta_fast": draw.uniform(3, 40), "beta_slow": draw.uniform(0.5, 2),
                "truncate": draw.random() < 0.5, "attention_factor": draw.uniform(0.5, 2),
                "mscale": draw.uniform(0.3, 2), "mscale_all_dim": draw.uniform(0.3, 2),
                "original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor} | {k: v for k, v in optional.items() if draw.random() < 0.5}


class Float64Torch:
    """torch, but float32 is float64: runs transformers' own formulas without their rounding."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_transformers(transformers, config: dict, seq_len=None):
    """What transformers computes for a whole config.json: (inv_freq, attention factor)."""
    settings = transformers.LlamaConfig(**json.loads(json.dumps(config)))
    kind = settings.rope_parameters["rope_type"]
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
        return rotary.compute_default_rope_parameters(settings)
    return transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](settings, "cpu", seq_len=seq_len)


def test_200_random_configurations_match_transformers(monkeypatch):
    """A ramp off by one pair, a wrong default, a forgotten mscale: against transformers 4- and 5-style files.

    Its formulas run in float64: its float32 is itself off by up to 5e-6 where llama3's blend nearly cancels.
    """
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.modeling_rope_utils, "torch", Float64Torch())
    draw = random.Random(0)
    for trial in range(200):
        kind = ("default", "linear", "llama3", "yarn", "ntk")[trial % 5]
        head_dim, theta = draw.choice([16, 32, 64, 80, 96, 128, 256]), draw.choice([1e4, 1e5, 5e5, 1e6])
        config = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim,
                  "max_position_embeddings": draw.choice([4096, 8192, 131072])}
        if kind == "ntk":  # static NTK is the `dynamic` rule at the length where it reaches the factor
            factor, window = draw.uniform(1, 600), config["max_position_embeddings"]
            config["rope_parameters"] = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": theta}
            want, want_factor = in_transformers(transformers, config, seq_len=factor * window)
            ours, our_factor = inverse_frequencies(head_dim, theta, RopeScaling("ntk", factor))
        else:
            scaling = {"rope_type": kind} if kind == "default" else random_scaling(draw, kind)
            if trial % 2:
                config |= {"rope_theta": theta, "rope_scaling": scaling}
            else:
                config["rope_parameters"] = scaling | {"rope_theta": theta}
            want, want_factor = in_transformers(transformers, config)
            theta, scaling = rope_theta_from_hf(config), RopeScaling.from_hf(config)
            ours, our_factor = inverse_frequencies(head_dim, theta, scaling)
        tolerance = 1e-6 if kind == "default" else 1e-12  # default lives elsewhere, and stays in float32
        torch.testing.assert_close(ours, want.double(), rtol=tolerance, atol=0, msg=str(config))
        assert our_factor == pytest.approx(want_factor, rel=1e-12), config


def test_paper_recipe_in_transformers_own_float32():
    """The configuration this project exports, as transformers computes it for a user."""
    transformers = pytest.importorskip("transformers")
    for factor in (128.0, 256.0, 512.0):
        config = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0,
                  "max_position_embeddings": int(8192 * factor), "rope_scaling": ultralong(factor).to_hf()}
        want, want_factor = in_transformers(transformers, config)
        ours, our_factor = inverse_frequencies(128, 500000.0, ultralong(factor))
        torch.testing.assert_close(ours, want.double(), rtol=1e-6, atol=0)
        assert our_factor == want_factor


def test_paper_ramp_is_pair_28_to_35_and_temperature_is_explicit():
    """Ramp ends that are off by one, or a temperature of ln s instead of 0.1 ln s + 1."""
    plain, _ = inverse_frequencies(128, 500000.0, RopeScaling())
    for factor, attention in ((128.0, 1.48520), (256.0, 1.55452), (512.0, 1.62383)):
        new, found = inverse_frequencies(128, 500000.0, ultralong(factor))
        assert found == pytest.approx(attention, abs=5e-6)
        stretch = plain / new
        assert torch.allclose(stretch[:29], torch.ones(29, dtype=torch.float64), rtol=1e-12)
        assert (stretch[29:35] > 1.01).all() and (stretch[29:35] < factor / 2).all()
        torch.testing.assert_close(stretch[35:], torch.full((29,), factor, dtype=torch.float64))
    assert inverse_frequencies(128, 500000.0, ultralong(attention_temperature=False))[1] == 1.0
    assert inverse_frequencies(128, 500000.0, ultralong(attention_factor=1.25))[1] == 1.25
    assert new.dtype == torch.float64


def test_index_and_rotation_ramp_differ_by_up_to_1_83_in_pairs_29_to_34():
    """Taking the paper's text for its code: close enough to go unnoticed, different enough to matter."""
    index, _ = inverse_frequencies(128, 500000.0, ultralong())
    rotation, _ = inverse_frequencies(128, 500000.0, ultralong(ramp="rotation"))
    ratio = torch.maximum(index / rotation, rotation / index)
    assert ratio.max().item() == pytest.approx(1.83, abs=0.005)
    assert (ratio > 1.001).nonzero().flatten().tolist() == list(range(29, 35))


def test_llama3_is_yarn_with_the_rotation_ramp_and_no_temperature():
    llama3, one = inverse_frequencies(128, 500000.0, RopeScaling("llama3", 8.0, 8192))
    yarn, _ = inverse_frequencies(128, 500000.0, RopeScaling("yarn", 8.0, 8192, ramp="rotation"))
    assert torch.equal(llama3, yarn) and one == 1.0


def test_yarn_replaces_llama3_scaling_and_never_stacks():
    """Llama-3.1's file divides slow pairs by 8; YaRN on top would divide by 1024, or lose its temperature."""
    released = RopeScaling.from_hf({"rope_scaling": LLAMA31, "max_position_embeddings": 131072})
    extended = replace(released, kind="yarn", factor=128.0)
    assert extended == ultralong()
    slowest = inverse_frequencies(128, 500000.0, extended)[0][-1].item()
    assert slowest == pytest.approx(500000.0 ** (-126 / 128) / 128, rel=1e-12)


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    plain, _ = inverse_frequencies(64, 10000.0, RopeScaling())
    new, factor = inverse_frequencies(64, 10000.0, RopeScaling("ntk", 16.0))
    stretch = plain / new
    assert stretch[0] == 1 and stretch[-1].item() == pytest.approx(16, rel=1e-12) and factor == 1
    assert torch.equal(new, inverse_frequencies(64, ntk_theta(10000.0, 16.0, 64), RopeScaling())[0])


# -------------------------------------------------------------------------------------------------- precision


def exact_angles(positions, pairs):
    """m theta^(-2i/128) modulo 2 pi in fifty-digit decimals, theta 500,000."""
    getcontext().prec = 50
    frequencies = [(-Decimal(500000).ln() * 2 * pair / 128).exp() for pair in pairs]
    angles = [[float(m * f % (2 * PI)) for f in frequencies] for m in positions]
    return torch.tensor(angles, dtype=torch.float64)


def worst_angle_error(angles, exact):
    """Largest distance round the circle, in radians."""
    return (torch.remainder(angles - exact + math.pi, 2 * math.pi) - math.pi).abs().max().item()


def test_angles_are_right_to_1e_6_rad_at_four_million_tokens_and_float32_angles_are_not():
    """float32 position * inv_freq, as most public code has it: 0.05 rad wrong at 1M, 0.2 rad at 4M."""
    pairs, edge = list(range(0, 64, 3)) + [1, 2], 4_194_303
    positions = [0, 1, 8191, 131072, 1_048_575, 2_097_151, edge]
    positions += random.Random(1).sample(range(edge - 5000, edge), 60)
    exact = exact_angles(positions, pairs)
    inv_freq = inverse_frequencies(128, 500000.0, RopeScaling())[0][pairs]
    m = torch.tensor(positions)
    assert worst_angle_error(torch.outer(m.double(), inv_freq), exact) < 1e-6
    cos, sin = rotary_tables(m, inv_freq, 1.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (len(positions), len(pairs))
    assert worst_angle_error(torch.atan2(sin.double(), cos.double()), exact) < 1e-6
    assert worst_angle_error(torch.outer(m.float(), inv_freq.float()).double(), exact) > 0.1


def test_tables_in_chunks_match_one_piece_in_any_order_of_positions(monkeypatch):
    """A chunk border that drops or repeats a row; positions of a zigzag shard are not consecutive."""
    positions = torch.cat((torch.arange(4_194_000, 4_194_304), torch.arange(0, 97)))
    inv_freq, factor = inverse_frequencies(128, 500000.0, ultralong(512.0))
    angles = torch.outer(positions.double(), inv_freq)
    whole = rotary_tables(positions, inv_freq, factor)
    monkeypatch.setattr(rope_yarn, "CHUNK", 50)
    pieces = rotary_tables(positions, inv_freq, factor)
    for table, again, want in zip(whole, pieces, (angles.cos(), angles.sin()), strict=True):
        assert torch.equal(table, again) and torch.equal(table, (want * factor).float())


# --------------------------------------------------------------------------------------------------- rotation


def example(dtype=torch.float32, shape=(2, 3, 11, 16), start=0, factor=1.0, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    inv_freq, _ = inverse_frequencies(shape[-1], 10000.0, RopeScaling())
    return (x, *rotary_tables(torch.arange(start, start + shape[2]), inv_freq, factor))


def complex_rotation(x, cos, sin):
    """The definition: pair i is the complex number x_i + i x_{i + D/2}."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("layout", ["contiguous", "heads_after_positions"])
def test_apply_rotary_is_complex_multiplication_of_split_halves(layout):
    """Interleaved pairs, a swapped sign, or a write into x; with the strides that (B, S, H, D) leaves."""
    x, cos, sin = example(start=5)
    if layout == "heads_after_positions":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    before = x.clone()
    out = apply_rotary(x, cos, sin)
    torch.testing.assert_close(out.double(), complex_rotation(x, cos, sin), rtol=0, atol=1e-6)
    assert out.dtype == x.dtype and out.shape == x.shape and torch.equal(x, before)


def test_rotation_preserves_norms_up_to_the_attention_factor():
    for factor in (1.0, 1.4852):
        x, cos, sin = example(start=1_000_000, factor=factor)
        torch.testing.assert_close(apply_rotary(x, cos, sin).norm(dim=-1), factor * x.norm(dim=-1))


def test_scores_depend_on_distance_only_even_at_four_million():
    """The relative-position property, which float32 angles lose at this distance from zero."""
    q, k = (example(shape=(1, 1, 1, 64), seed=seed)[0] for seed in (1, 2))
    inv_freq, factor = inverse_frequencies(64, 500000.0, RopeScaling("yarn", 512.0, 8192))

    def score(m, n):
        query, key = (apply_rotary(x, *rotary_tables(torch.tensor([position]), inv_freq, factor))
                      for x, position in ((q, m), (k, n)))
        return (query * key).sum().item()

    for distance in (0, 1, 7, 5000):
        near = score(distance, 0)
        assert near == pytest.approx(score(4_194_303, 4_194_303 - distance), abs=1e-4)
        assert near != pytest.approx(score(distance + 3, 0), abs=1e-3)


def test_rotation_of_bfloat16_happens_in_float32():
    """Rotating in bfloat16 rounds three times; the right result is the float32 one, rounded once."""
    x, cos, sin = example(torch.bfloat16, start=3)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), cos, sin).to(torch.bfloat16))


@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
def test_hand_written_backward_matches_autograd_of_the_definition(gradient):
    """A backward that turns the wrong way or forgets the factor, for any layout a gradient arrives in."""
    x, cos, sin = example(factor=1.3)
    weight = {"dense": torch.randn(x.shape), "expanded": torch.ones(()).expand(x.shape),
              "transposed": torch.randn(2, 11, 3, 16).transpose(1, 2)}[gradient]
    ours, definition = x.clone().requires_grad_(), x.double().requires_grad_()
    apply_rotary(ours, cos, sin).backward(weight)
    complex_rotation(definition, cos, sin).backward(weight.double())
    torch.testing.assert_close(ours.grad.double(), definition.grad, rtol=0, atol=1e-6)


def test_gradcheck_in_float64():
    x, cos, sin = example(torch.float64, shape=(1, 2, 3, 8))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x.requires_grad_())


# ------------------------------------------------------------------------------------------------ config.json


EXPORTED = [RopeScaling(), RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 8192), ultralong(),
            ultralong(attention_temperature=False), ultralong(attention_factor=1.2, truncate=False),
            ultralong(ramp="rotation", attention_temperature=False), RopeScaling("yarn", 4, 8192, 32, 1)]


@pytest.mark.parametrize("scaling", EXPORTED, ids=lambda s: f"{s.kind}-{s.ramp}-{s.factor:g}")
def test_export_computes_the_same_here_and_in_transformers(scaling):
    """attention_factor lost on export (transformers would then guess it), in files of either generation."""
    transformers = pytest.importorskip("transformers")
    want, want_factor = inverse_frequencies(128, 500000.0, scaling)
    window = round(8192 * scaling.factor)
    base = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": window}
    written = json.loads(json.dumps(scaling.to_hf()))
    version4 = base | {"rope_theta": 500000.0, "rope_scaling": written}
    version5 = base | {"rope_parameters": written | {"rope_theta": 500000.0}}
    for config in (version4, version5):
        read = RopeScaling.from_hf(config)
        again, again_factor = inverse_frequencies(128, rope_theta_from_hf(config), read)
        assert torch.equal(again, want) and again_factor == want_factor
        theirs, their_factor = in_transformers(transformers, config)
        torch.testing.assert_close(theirs.double(), want, rtol=1e-5, atol=0)
        assert their_factor == pytest.approx(want_factor, rel=1e-12)
    assert torch.equal(inverse_frequencies(128, 500000.0, RopeScaling.from_hf(written))[0], want)


def test_yarn_export_states_every_setting():
    assert ultralong().to_hf() == {
        "rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192, "beta_fast": 4.0,
        "beta_slow": 1.0, "truncate": True, "attention_factor": pytest.approx(1.4852030)}
    assert RopeScaling().to_hf() == {"rope_type": "default"}


def test_what_hugging_face_cannot_express_is_never_computed_differently_there():
    """The rotation ramp with a temperature round-trips here and fails in transformers; ntk is refused."""
    transformers = pytest.importorskip("transformers")
    scaling = ultralong(ramp="rotation")
    written = scaling.to_hf()
    again, again_factor = inverse_frequencies(128, 500000.0, RopeScaling.from_hf(written))
    want, want_factor = inverse_frequencies(128, 500000.0, scaling)
    assert torch.equal(again, want) and again_factor == want_factor
    config = transformers.LlamaConfig(rope_scaling=written, max_position_embeddings=2**20)
    with pytest.raises(KeyError, match="yarn_rotation_ramp"):
        transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    with pytest.raises(ValueError, match="ntk_theta"):
        RopeScaling("ntk", 8.0).to_hf()


def test_left_out_settings_take_transformers_defaults_not_the_papers():
    """beta 32 / 1 and the window from max_position_embeddings, as transformers reads such a file."""
    bare = {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 8}}
    assert RopeScaling.from_hf(bare) == RopeScaling("yarn", 8.0, 4096, 32.0, 1.0)
    stated = bare | {"original_max_position_embeddings": 2048}
    assert RopeScaling.from_hf(stated).original_max_position == 2048
    for absent in ({}, {"rope_scaling": None}, {"rope_scaling": {}, "rope_parameters": None}):
        assert RopeScaling.from_hf(absent) == RopeScaling()
    agreeing = {"rope_scaling": YARN | {"type": "yarn"}, "rope_parameters": YARN | {"rope_theta": 5e5},
                "rope_theta": 5e5}
    assert RopeScaling.from_hf(agreeing) == ultralong(beta_fast=32.0)
    assert rope_theta_from_hf(agreeing) == 5e5 and rope_theta_from_hf({}) == 10000.0
    assert rope_theta_from_hf({"rope_parameters": {"rope_theta": 100000}}) == 100000.0


# --------------------------------------------------------------------------------------------------- refusals


REFUSED_FILES = {
    "unknown type": ({"rope_scaling": YARN | {"rope_type": "yarm"}}, "yarm.*known are"),
    "static ntk": ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "ntk.*unknown"),
    "unknown key": ({"rope_scaling": YARN | {"beta_quick": 4}}, "beta_quick"),
    "key of another type": ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 4}}, "beta_fast"),
    "factor without a type": ({"rope_scaling": {"factor": 2.0}}, "default has no key 'factor'"),
    "type and rope_type": ({"rope_scaling": YARN | {"type": "linear"}}, "differ"),
    "scaling and parameters": ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 4}}, "contradict"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*use yarn"),
    "longrope": ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope.*use yarn"),
    "partial at the top": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial inside": ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "factor is 0.5"),
    "one per layer type": ({"rope_parameters": {"full_attention": YARN}}, "per layer type"),
    "not an object": ({"rope_scaling": "yarn"}, "JSON object"),
    "missing factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor is 'missing'"),
    "null factor": ({"rope_scaling": YARN | {"factor": None}}, "factor is None"),
    "text factor": ({"rope_scaling": YARN | {"factor": "128"}}, "factor is '128'"),
    "bool factor": ({"rope_scaling": YARN | {"factor": True}}, "factor is True"),
    "NaN factor": ({"rope_scaling": YARN | {"factor": math.nan}}, "factor is nan"),
    "factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5"),
    "NaN beta": ({"rope_scaling": YARN | {"beta_slow": math.nan}}, "beta_slow is nan"),
    "beta order": ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1}}, "beta_fast is 1.0.*beta_slow"),
    "llama3 order": ({"rope_scaling": LLAMA31 | {"high_freq_factor": 0.5}}, "beta_fast is 0.5"),
    "llama3 without its factors": ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "high_freq_factor"),
    "text attention factor": ({"rope_scaling": YARN | {"attention_factor": "1.2"}}, "_factor is '1.2'"),
    "infinite attention factor": ({"rope_scaling": YARN | {"attention_factor": math.inf}}, "_factor is inf"),
    "null truncate": ({"rope_scaling": YARN | {"truncate": None}}, "truncate is None"),
    "fractional window": ({"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}}, "is 0.5"),
    "two windows": ({"rope_scaling": YARN, "original_max_position_embeddings": 4096}, "8192 but 4096"),
    "text mscale": ({"rope_scaling": YARN | {"mscale": "1", "mscale_all_dim": 1.0}}, "mscale is '1'"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_refuses_a_file_it_does_not_understand_in_one_line(case):
    """Read as a whole config.json and, where that dict alone is wrong, as the dict itself."""
    config, message = REFUSED_FILES[case]
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    alone = len(config) == 1 and isinstance(scaling, dict) and ("type" in scaling or "rope_type" in scaling)
    for wrong in (config, scaling) if alone else (config,):
        with pytest.raises(ValueError, match=message) as caught:
            RopeScaling.from_hf(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config, message", [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "several values"),
    ({"rope_theta": "10000"}, "rope_theta is '10000'"), ({"rope_theta": True}, "rope_theta is True"),
    ({"rope_theta": math.nan}, "rope_theta is nan"), ({"rope_theta": 1.0}, "above 1")])
def test_refuses_a_wrong_rope_theta_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        rope_theta_from_hf(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields, message", [
    ({"kind": "su"}, "kind is 'su'"), ({"kind": "default", "factor": 2.0}, "kind default"),
    ({"factor": math.inf}, "factor is inf"), ({"factor": True}, "factor is True"),
    ({"original_max_position": 8192.5}, "8192.5"), ({"original_max_position": True}, "True"),
    ({"original_max_position": 0}, "is 0"), ({"beta_slow": 0}, "beta_slow is 0"),
    ({"beta_fast": 1.0}, "beta_fast is 1.0"), ({"beta_fast": "4"}, "beta_fast is '4'"),
    ({"ramp": "cosine"}, "ramp is 'cosine'"), ({"kind": "linear", "ramp": "rotation"}, "ramp is 'rotation'"),
    ({"attention_factor": -1.0}, "attention_factor is -1.0"), ({"truncate": 1}, "truncate is 1"),
    ({"kind": "ntk", "attention_factor": 1.2}, "attention_factor is 1.2"),
    ({"attention_temperature": None}, "attention_temperature is None")])
def test_refuses_a_meaningless_field_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        RopeScaling(**{"kind": "yarn", "factor": 4.0, "original_max_position": 8192} | fields)
    assert "\n" not in str(caught.value)


def test_refuses_to_compute_without_a_window_or_with_an_odd_head():
    for compute in (lambda: inverse_frequencies(128, 1e4, RopeScaling("yarn", 4.0)),
                    lambda: RopeScaling("llama3", 4.0).to_hf()):
        with pytest.raises(ValueError, match="original_max_position"):
            compute()
    for head_dim, theta, message in ((127, 1e4, "head_dim is 127"), (128, 1.0, "rope_theta is 1.0")):
        with pytest.raises(ValueError, match=message):
            inverse_frequencies(head_dim, theta, RopeScaling())
    with pytest.raises(ValueError, match="ntk needs at least 4"):
        ntk_theta(1e4, 2.0, 2)


# ----------------------------------------------------------------------------------------------- command line


def test_command_line_as_in_the_readme():
    """The one test that starts a process: the file is a script, too."""
    command = [sys.executable, SCRIPT, "--factor", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows[1:65]] == [str(pair) for pair in range(64)]
    assert " kept " in rows[29] and "blended  14.29%" in rows[30] and "interpolated" in rows[36]
    assert "8,192 tokens becomes 1,048,576" in done.stdout and "attention factor 1.48520" in done.stdout


def test_command_line_reads_a_config_and_replaces_its_rule(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 512, "num_attention_heads": 8, "rope_theta": 500000.0,
                                "max_position_embeddings": 131072, "rope_scaling": LLAMA31}))
    rope_yarn.main(["--config", str(path)])
    shown = capsys.readouterr().out
    assert "llama3, s = 8: pairs of few turns in 8,192 tokens" in shown and "65,536" not in shown and "becomes" not in shown
    unstated = {"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", "factor": 8}, "hidden_size": 64, "num_attention_heads": 1}
    (tmp_path / "unstated.json").write_text(json.dumps(unstated))
    rope_yarn.main(["--config", str(tmp_path / "unstated.json")])
    assert "becomes" not in capsys.readouterr().out
    rope_yarn.main(["--config", str(path), "--kind", "yarn", "--factor", "4", "--no-temperature"])
    shown = capsys.readouterr().out
    assert "yarn, s = 4: a window of 8,192" in shown and "head dim 64" in shown and "factor 1.00000" in shown


@pytest.mark.parametrize("arguments", [
    "--factor 0.5", "--factor nan", "--head-dim 127", "--theta 1", "--original-length 0", "--beta-fast 1",
    "--kind ntk --ramp rotation", "--kind default --factor 4", "--kind ntk --head-dim 2",
    "--config absent.json", "--config .", f"--config {SCRIPT}"])
def test_command_line_fails_with_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: ") as caught:
        rope_yarn.main(arguments.split())
    assert "\n" not in str(caught.value) and not capsys.readouterr().out and not list(tmp_path.iterdir())
