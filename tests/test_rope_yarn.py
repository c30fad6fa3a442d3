"""Rotary embedding: each rule against its formula and transformers, angles at 4M, every refusal."""
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal, getcontext

import pytest
import torch

import rope_yarn
from rope_yarn import (
    RopeScaling,
    apply_rotary,
    explain,
    inverse_frequencies,
    ntk_theta,
    rotary_tables,
    scaling_from_options,
    stated_value,
)

ORIGINAL = "original_max_position_embeddings"
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           ORIGINAL: 8192}
YARN = {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192}


def ultralong(factor=128.0, **changes) -> RopeScaling:
    return RopeScaling("yarn", factor, 8192, **changes)


# ------------------------------------------------------------------------- the rules, written out


def obvious(kind: str, i: int, D: int, theta: float, s: float, L: int) -> float:
    """Frequency of pair i by the docstring's formulas, beta_slow 1 and beta_fast 4."""
    f = theta ** (-2 * i / D)
    if kind == "linear":
        return f / s
    if kind == "ntk":
        return (theta * s ** (D / (D - 2))) ** (-2 * i / D)
    if kind == "llama3":  # linear in turns: the equation in YaRN's paper
        g = (L * f / (2 * math.pi) - 1) / (4 - 1)
    else:  # linear in the index, between the pairs that make 4 turns and 1 turn
        low = math.floor(D / 2 * math.log(L / (2 * math.pi * 4), theta))
        high = math.ceil(D / 2 * math.log(L / (2 * math.pi * 1), theta))
        g = 1 - (i - low) / (high - low)
    g = min(max(g, 0), 1)
    return g * f + (1 - g) * f / s


@pytest.mark.parametrize("kind", ["linear", "ntk", "llama3", "yarn"])
def test_each_rule_is_its_formula_and_a_factor_of_1_changes_nothing(kind):
    for D, theta, s in ((128, 500000.0, 128.0), (64, 10000.0, 8.0)):
        new, attention = inverse_frequencies(D, theta, RopeScaling(kind, s, 8192))
        want = [obvious(kind, i, D, theta, s, 8192) for i in range(D // 2)]
        torch.testing.assert_close(new, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
        assert attention == (0.1 * math.log(s) + 1 if kind == "yarn" else 1)

        plain, one = inverse_frequencies(D, theta, RopeScaling())
        same, attention = inverse_frequencies(D, theta, RopeScaling(kind, 1.0, 8192))
        torch.testing.assert_close(same, plain, rtol=1e-15, atol=0)
        assert attention == one == 1


def test_the_papers_blend_is_from_pair_28_to_35_and_its_temperature_can_be_set():
    plain, _ = inverse_frequencies(128, 500000.0, RopeScaling())
    for factor, attention in ((128.0, 1.48520), (256.0, 1.55452), (512.0, 1.62383)):
        new, found = inverse_frequencies(128, 500000.0, ultralong(factor))
        assert found == pytest.approx(attention, abs=5e-6)
        assert new.dtype == torch.float64
        stretch = (plain / new).tolist()
        assert stretch[:29] == pytest.approx([1] * 29)
        assert stretch[35:] == pytest.approx([factor] * 29)
        assert all(1.01 < x < factor / 2 for x in stretch[29:35])
    assert ultralong(attention_temperature=False).cos_sin_factor == 1.0
    assert ultralong(attention_factor=1.25).cos_sin_factor == 1.25


def test_yarns_paper_and_its_code_differ_by_up_to_1_83_in_pairs_29_to_34():
    """The paper's equation, linear in turns, is Llama-3.1's rule."""
    code, _ = inverse_frequencies(128, 500000.0, ultralong())
    paper, _ = inverse_frequencies(128, 500000.0, replace(ultralong(), kind="llama3"))
    ratio = torch.maximum(code / paper, paper / code)
    assert ratio.max().item() == pytest.approx(1.83, abs=0.005)
    assert (ratio > 1.001).nonzero().flatten().tolist() == list(range(29, 35))


def test_yarn_replaces_llama3_scaling_and_never_stacks():
    """Llama-3.1 divides slow pairs by 8; YaRN on top of it would divide by 1024."""
    released = RopeScaling.from_hf({"rope_scaling": LLAMA31, "max_position_embeddings": 131072})
    extended = replace(released, kind="yarn", factor=128.0)
    assert extended == ultralong()
    slowest = inverse_frequencies(128, 500000.0, extended)[0][-1].item()
    assert slowest == pytest.approx(500000.0 ** (-126 / 128) / 128, rel=1e-12)


# ----------------------------------------------------------------------------------- the rotation


def test_angles_are_right_to_1e_6_rad_at_four_million_tokens_and_float32_angles_are_not():
    """Against fifty digits. float32 position * inv_freq, as most public code has it: 0.2 rad."""
    getcontext().prec = 50
    circle = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    pairs = [*range(0, 64, 3), 1, 2]
    m = torch.tensor([0, 1, 8191, 131072, 1_048_575, *range(4_194_303, 4_190_000, -71)])
    frequencies = [(-Decimal(500000).ln() * pair / 64).exp() for pair in pairs]
    exact = torch.empty(len(m), len(pairs), dtype=torch.float64)
    for row, position in enumerate(m.tolist()):
        angles = [float(position * f % circle) for f in frequencies]
        exact[row] = torch.tensor(angles, dtype=torch.float64)

    def error(angles):  # round the circle
        difference = torch.remainder(angles - exact + math.pi, 2 * math.pi) - math.pi
        return difference.abs().max()

    inv_freq = inverse_frequencies(128, 500000.0, RopeScaling())[0][pairs]
    cos, sin = rotary_tables(m, inv_freq, 1.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (len(m), len(pairs))
    assert error(torch.atan2(sin.double(), cos.double())) < 1e-6
    assert error(torch.outer(m.float(), inv_freq.float()).double()) > 0.1


def test_tables_made_in_chunks_are_those_made_at_once_in_any_order_of_positions():
    positions = torch.cat((torch.arange(4_104_000, 4_194_304), torch.arange(97)))
    inv_freq, factor = inverse_frequencies(8, 500000.0, ultralong(512.0))
    angles = torch.outer(positions.double(), inv_freq)
    cos, sin = rotary_tables(positions, inv_freq, factor)
    assert len(positions) > rope_yarn.CHUNK
    assert torch.equal(cos, (angles.cos() * factor).float())
    assert torch.equal(sin, (angles.sin() * factor).float())


def example(dtype=torch.float32, shape=(2, 3, 11, 16), start=0, factor=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    inv_freq, _ = inverse_frequencies(shape[-1], 10000.0, RopeScaling())
    return (x, *rotary_tables(torch.arange(start, start + shape[2]), inv_freq, factor))


def complex_rotation(x, cos, sin):
    """The definition: pair i is the complex number x_i + i x_{i + D/2}."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("layout", ["contiguous", "heads after positions"])
def test_apply_rotary_multiplies_complex_numbers_forward_and_backward(layout):
    """Interleaved pairs, a swapped sign, a write into x; a gradient in any layout, too."""
    x, cos, sin = example(start=5, factor=1.3)
    gradients = [torch.randn(x.shape), torch.ones(()).expand(x.shape)]
    if layout == "heads after positions":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        gradients.append(torch.randn(2, 11, 3, 16).transpose(1, 2))
    before = x.clone()
    for gradient in gradients:
        ours = x.detach().requires_grad_()
        definition = x.double().requires_grad_()
        turned = apply_rotary(ours, cos, sin)
        want = complex_rotation(definition, cos, sin)
        torch.testing.assert_close(turned.double(), want, rtol=0, atol=1e-6)
        turned.backward(gradient)
        want.backward(gradient.double())
        torch.testing.assert_close(ours.grad.double(), definition.grad, rtol=0, atol=1e-6)
    assert turned.dtype == x.dtype and torch.equal(x, before)


def test_scores_depend_on_distance_only_even_at_four_million():
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1)).unbind(0)
    inv_freq, factor = inverse_frequencies(64, 500000.0, ultralong(512.0))

    def score(m, n):
        query = apply_rotary(q, *rotary_tables(torch.tensor([m]), inv_freq, factor))
        key = apply_rotary(k, *rotary_tables(torch.tensor([n]), inv_freq, factor))
        return (query * key).sum().item()

    for distance in (0, 1, 7, 5000):
        near = score(distance, 0)
        assert near == pytest.approx(score(4_194_303, 4_194_303 - distance), abs=1e-4)
        assert near != pytest.approx(score(distance + 3, 0), abs=1e-3)


def test_rotation_of_bfloat16_happens_in_float32():
    """Rotating in bfloat16 rounds three times; right is the float32 result, rounded once."""
    x, cos, sin = example(torch.bfloat16, start=3)
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).bfloat16())


# ---------------------------------------------------------------------- config.json, transformers


class Float64Torch:
    """torch, but float32 is float64: runs transformers' own formulas without their rounding."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_transformers(config: dict, seq_len=None):
    """What transformers computes for a whole config.json: (inv_freq, attention factor)."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(**json.loads(json.dumps(config)))
    kind = settings.rope_parameters["rope_type"]
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
        return rotary.compute_default_rope_parameters(settings)
    rules = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    return rules[kind](settings, "cpu", seq_len=seq_len)


def random_scaling(draw: random.Random, kind: str) -> dict:
    """A rope_scaling that transformers accepts, with every optional key there or not."""
    factor = draw.choice([1.0, 2, draw.uniform(1, 600)])
    original = draw.choice([128, 8192, 32768])
    low = draw.uniform(0.25, 2)
    turns = {"low_freq_factor": low, "high_freq_factor": low + draw.uniform(0.5, 30)}
    optional = {
        "beta_fast": draw.uniform(3, 40),
        "beta_slow": low,
        "truncate": draw.random() < 0.5,
        "attention_factor": draw.uniform(0.5, 2),
        ORIGINAL: original,
    }
    stated = {key: value for key, value in optional.items() if draw.random() < 0.5}
    more = {
        "default": {},
        "linear": {"factor": factor},
        "yarn": {"factor": factor} | stated,
        "llama3": {"factor": factor, ORIGINAL: original} | turns,
    }
    return {"rope_type": kind} | more[kind]


def test_200_random_configurations_match_transformers(monkeypatch):
    """A ramp off by one pair or a wrong default, in files of transformers 4 and of 5.

    In float64: its float32 is itself off by up to 5e-6 where llama3's blend nearly cancels.
    """
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.modeling_rope_utils, "torch", Float64Torch())
    draw = random.Random(0)
    for trial in range(200):
        # 1. A rule, and what transformers makes of it.
        kind = ("default", "linear", "llama3", "yarn", "ntk")[trial % 5]
        D = draw.choice([16, 32, 64, 80, 128, 256])
        theta = draw.choice([1e4, 5e5, 1e6])
        config = {"hidden_size": 4 * D, "num_attention_heads": 4, "head_dim": D,
                  "max_position_embeddings": draw.choice([4096, 8192, 131072])}
        if kind == "ntk":  # the `dynamic` rule at the length where it reaches the factor
            scaling = RopeScaling("ntk", draw.uniform(1, 600))
            length = scaling.factor * config["max_position_embeddings"]
            dynamic = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": theta}
            want = in_transformers(config | {"rope_parameters": dynamic}, length)
        else:
            stated = random_scaling(draw, kind)
            if trial % 2 == 0:  # as transformers 5 writes it
                config |= {"rope_parameters": stated | {"rope_theta": theta}}
            else:
                config |= {"rope_theta": theta, "rope_scaling": stated}
            scaling = RopeScaling.from_hf(config)
            want = in_transformers(config)
            assert stated_value(config, "rope_theta", 10000.0) == theta

        # 2. The same here.
        ours, attention = inverse_frequencies(D, theta, scaling)
        tolerance = 1e-6 if kind == "default" else 1e-12  # default's code stays in float32
        torch.testing.assert_close(ours, want[0].double(), rtol=tolerance, atol=0, msg=str(config))
        assert attention == pytest.approx(want[1], rel=1e-12), config


@pytest.mark.parametrize("scaling", [
    RopeScaling(),
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 8192),
    ultralong(),
    ultralong(256.0),
    ultralong(512.0),
    ultralong(attention_temperature=False),
    ultralong(attention_factor=1.2, truncate=False),
    RopeScaling("yarn", 4, 8192, 32, 1),
])
def test_what_is_written_computes_the_same_here_and_in_transformers(scaling):
    """attention_factor lost on the way, say: transformers would then guess it."""
    want, attention = inverse_frequencies(128, 500000.0, scaling)
    base = {"hidden_size": 4096, "num_attention_heads": 32,
            "max_position_embeddings": round(8192 * scaling.factor)}
    written = json.loads(json.dumps(scaling.to_hf()))
    for rope in ({"rope_theta": 500000.0, "rope_scaling": written},
                 {"rope_parameters": written | {"rope_theta": 500000.0}}):
        read = RopeScaling.from_hf(base | rope)
        theta = stated_value(rope, "rope_theta", 10000.0)
        again, again_attention = inverse_frequencies(128, theta, read)
        assert torch.equal(again, want)
        assert again_attention == attention
        theirs, their_attention = in_transformers(base | rope)
        torch.testing.assert_close(theirs.double(), want, rtol=1e-5, atol=0)
        assert their_attention == pytest.approx(attention, rel=1e-12)
    assert RopeScaling.from_hf(written) == read


def test_yarn_is_written_with_every_setting_and_ntk_not_at_all():
    turns = {"beta_fast": 4.0, "beta_slow": 1.0, "truncate": True}
    assert ultralong(attention_factor=1.5).to_hf() == YARN | turns | {"attention_factor": 1.5}
    assert ultralong().to_hf()["attention_factor"] == pytest.approx(1.4852030)
    with pytest.raises(ValueError, match="ntk_theta"):
        RopeScaling("ntk", 8.0).to_hf()


def test_what_a_file_leaves_out_takes_transformers_defaults_not_the_papers():
    bare = {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 8}}
    assert RopeScaling.from_hf(bare) == RopeScaling("yarn", 8.0, 4096, 32.0, 1.0)
    assert RopeScaling.from_hf(bare | {ORIGINAL: 2048}).original_max_position == 2048
    assert stated_value(bare | {ORIGINAL: 2048}, ORIGINAL) == 2048
    assert stated_value(bare, ORIGINAL) is None
    for absent in ({}, {"rope_scaling": None}, {"rope_scaling": {}, "rope_parameters": None}):
        assert RopeScaling.from_hf(absent) == RopeScaling()
        assert stated_value(absent, "rope_theta", 10000.0) == 1e4
    both = {
        "rope_scaling": YARN | {"type": "yarn"},
        "rope_parameters": YARN | {"rope_theta": 5e5},
        "rope_theta": 5e5,
        "partial_rotary_factor": 1.0,
    }
    assert RopeScaling.from_hf(both) == ultralong(beta_fast=32.0)
    assert stated_value(both, "rope_theta", 10000.0) == 5e5


# --------------------------------------------------------------------------------------- refusals


def one_line(message: str, call, *arguments, **named) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"rope_type": "yarm"}, "yarm.*known are"),
    ({"rope_type": ["yarn"]}, "unknown"),
    ({"rope_type": "yarn_rotation_ramp"}, "yarn_rotation_ramp' is unknown"),
    ({"rope_type": "dynamic"}, "dynamic.*use yarn"),
    ({"rope_type": "longrope"}, "longrope.*yarn"),
    ({"rope_type": "linear"}, ORIGINAL),
    ({"rope_type": None}, "default.*'factor'"),
    ({"type": "linear"}, "differ"),
    ({"beta_quick": 4}, "'beta_quick'"),
    ({"mscale": 1.0}, "'mscale'"),
    ({"mscale_all_dim": 1.0}, "'mscale_all_dim'"),
    ({"partial_rotary_factor": 0.5}, "factor is 0.5"),
    ({"factor": None}, "needs the key .factor"),
    ({"factor": "128"}, "factor is '128'"),
    ({"beta_fast": 1}, "beta_fast is 1.*beta_slow"),
    ({"truncate": "no"}, "truncate is .no"),
    ({ORIGINAL: 0.5}, "is 0.5"),
    (LLAMA31 | {"high_freq_factor": 0.5}, "beta_fast is 0.5"),
])
def test_a_scaling_not_understood_in_full_is_refused_in_one_line(change, message):
    scaling = YARN | change
    for config in (scaling, {"rope_scaling": scaling}, {"rope_parameters": scaling}):
        one_line(message, RopeScaling.from_hf, config)


@pytest.mark.parametrize("config, message", [
    ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 4}}, "contradict"),
    ({"rope_scaling": YARN, ORIGINAL: 4096}, "several values, .8192, 4096"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("yarn", "JSON object"),
    ({"rope_parameters": {"full_attention": YARN}}, "per layer type"),
    ({"rope_scaling": "yarn"}, "object"),
    ({"rope_scaling": YARN, "rope_parameters": YARN | {ORIGINAL: 4096}, ORIGINAL: 8192}, "several"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "needs the key 'factor'"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs the key 'low_freq_factor'"),
])
def test_a_config_not_understood_in_full_is_refused_in_one_line(config, message):
    one_line(message, RopeScaling.from_hf, config)


def test_two_values_of_theta_are_refused_in_one_line():
    two = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}
    one_line("several values", stated_value, two, "rope_theta")


NO_NUMBER = [None, "4", math.nan, math.inf, -math.inf, True, -1.0, 0, [4.0], {}, 10**400, 4j]
HOSTILE = {
    "kind": [None, 4, True, "", "su", "YARN", ["yarn"], {}, math.nan],
    "factor": [*NO_NUMBER, 0.5],
    "original_max_position": [*NO_NUMBER[1:10], 8192.0, 8192.5],
    "beta_slow": NO_NUMBER,
    "beta_fast": [*NO_NUMBER, 1.0],
    "attention_temperature": [None, 0, 1, "yes", math.nan, []],
    "attention_factor": NO_NUMBER[1:],
    "truncate": [None, 0, 1, "yes", math.nan, []],
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_field_that_means_nothing_is_refused_by_name_in_one_line(field):
    fine = {"kind": "yarn", "factor": 4.0, "original_max_position": 8192}
    for value in HOSTILE[field]:
        one_line(f"^rope scaling: {field} is ", RopeScaling, **fine | {field: value})
    one_line("factor is 2.0; it must be 1", RopeScaling, "default", 2.0)
    one_line("attention_factor is 1.2; it must be left out .kind ntk", RopeScaling, "ntk", 2.0,
             attention_factor=1.2)


def test_frequencies_need_the_old_window_an_even_head_and_a_theta_above_1():
    windowless = RopeScaling("yarn", 4.0)
    one_line("yarn needs original_max_position", inverse_frequencies, 128, 1e4, windowless)
    one_line("yarn needs original_max_position", windowless.to_hf)
    one_line("head_dim is 127", inverse_frequencies, 127, 1e4, RopeScaling())
    one_line("rope_theta is 1.0", inverse_frequencies, 128, 1.0, RopeScaling())
    one_line("ntk needs 4 or more", ntk_theta, 1e4, 2.0, 2)


# ----------------------------------------------------------------------------------- command line


def test_options_ask_for_a_rule_or_for_none():
    given = {"rope_kind": "yarn", "rope_factor": 128.0, "original_length": 8192, "beta_fast": None}
    assert scaling_from_options(given) == ultralong()
    assert scaling_from_options(given | {"attention_temperature": False}).cos_sin_factor == 1
    assert scaling_from_options(dict.fromkeys(given)) is None
    assert scaling_from_options({"rope_kind": "default"}) == RopeScaling()
    one_line("factor is given without a kind", scaling_from_options, given | {"rope_kind": None})
    one_line("needs --rope-factor", scaling_from_options, given | {"rope_factor": None})


def test_the_file_is_a_script_that_shows_what_happens_to_each_pair():
    command = [sys.executable, rope_yarn.__file__, "--factor", "128"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = shown.splitlines()
    assert [row.split()[0] for row in rows[1:65]] == [str(pair) for pair in range(64)]
    assert [rows[pair].split()[3] for pair in (29, 30, 36)] == ["0.00%", "14.29%", "100.00%"]
    assert "29 pairs kept" in shown and "6 pairs blended" in shown
    assert "8,192 tokens becomes 1,048,576" in shown
    assert "attention factor 1.48520" in shown
    assert "becomes" not in explain(128, 500000.0, 8192, RopeScaling("llama3", 8.0, 8192))


@pytest.mark.parametrize("kind, factor", [
    ("default", "1"),
    ("linear", "128"),
    ("ntk", "128"),
    ("yarn", "128"),
])
def test_a_kind_alone_is_enough_to_be_shown(kind, factor, capsys):
    rope_yarn.main(["--kind", kind])
    assert f"{kind}, s = {factor}:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    "--factor 0.5",
    "--factor nan",
    "--head-dim 127",
    "--theta 1",
    "--original-length 0",
    "--beta-fast 1",
    "--kind default --factor 4",
    "--kind ntk --head-dim 2",
    "--kind ntk --factor 1e308",
])
def test_a_mistake_on_the_command_line_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match="^error: ") as caught:
        rope_yarn.main(arguments.split())
    assert "\n" not in str(caught.value) and not capsys.readouterr().out
