"""The model: parity with transformers, the tiled loss, generation, and Hugging Face directories."""
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
from model import (
    ARCHITECTURES,
    ONLY,
    VOCABULARY_TILE,
    Llama,
    ModelConfig,
    TiledCrossEntropy,
    read_config,
    rescale,
)
from parallel import Grid, ShardedAdamW
from rope_yarn import RopeScaling, ntk_theta
from tools.perplexity import token_losses

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 32}


def tokens_of(shape, vocab=97, seed=3):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------- parity with transformers


def in_transformers(path, **options):
    """The model of a directory as transformers computes it, in float32."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    return model.eval()


@pytest.mark.parametrize("changes", [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"head_dim": 12},
    {"num_key_value_heads": 6},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 256},
    {"rope_scaling": YARN, "max_position_embeddings": 128},
    {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    {"model_type": "qwen3", "rope_scaling": YARN, "max_position_embeddings": 128},
    {"model_type": "smollm3"},
    {"model_type": "smollm3", "no_rope_layer_interval": 2},
    {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 0], "rope_scaling": YARN,
     "max_position_embeddings": 128},
], ids=str)
def test_logits_equal_transformers_after_save_and_load(changes, tiny_model, tmp_path):
    """What we save, transformers loads, and computes the same logits from (far beyond the original
    window too)."""
    ours = tiny_model(**changes)
    ours.save_pretrained(tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved", attn_implementation="sdpa")
    tokens = tokens_of((2, 100))
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4, difference


def test_ntk_export_is_the_same_model_in_transformers(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    ours = Llama.from_pretrained(tmp_path / "base", rope_scaling=RopeScaling("ntk", 4.0))
    ours.save_pretrained(tmp_path / "ntk")
    theirs = in_transformers(tmp_path / "ntk")
    tokens = tokens_of((1, 100))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_greedy_generation_equals_transformers(tiny_model, tmp_path):
    ours = tiny_model()
    ours.save_pretrained(tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved")
    prompt = tokens_of((2, 9))
    everything = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=everything, max_new_tokens=20,
                               do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 20), expected)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_dense_cross_entropy(tied, tiny_model):
    """Tiles of 3 rows with an odd remainder, half of the targets masked: the same numbers as S x V
    logits give."""
    ours = tiny_model(torch.float64, tie_word_embeddings=tied)
    dense = tiny_model(torch.float64, tie_word_embeddings=tied)
    ours.tile = 3
    tokens = tokens_of((3, 11))
    targets = tokens_of((3, 11), seed=4)
    masked = torch.rand(3, 11, generator=torch.Generator().manual_seed(5)) < 0.5
    targets[masked] = -100

    loss, count = ours.loss(tokens, targets)
    (loss * 0.37).backward()
    logits = dense(tokens).flatten(0, 1)  # (B S, V)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    (expected * 0.37).backward()

    assert count == (targets != -100).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, a), b in zip(ours.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    losses = token_losses(ours, tokens, targets)
    torch.testing.assert_close(losses.double().sum(), loss.detach(), rtol=1e-5, atol=0)
    assert (losses[targets == -100] == 0).all()


def relative_error(ours, expected):
    difference = ours.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def test_bfloat16_loss_and_gradients_equal_dense_cross_entropy(tiny_model):
    """In bfloat16 the gradient has a second buffer (stale: the logits themselves) and many tiles to
    add up in float32."""
    size = 2 * VOCABULARY_TILE + 17  # the head's gradient is added up in three parts
    model = tiny_model(torch.bfloat16, vocab_size=size)
    norm = model.model.norm
    weight = model.head_weight
    ShardedAdamW(model, Grid())  # its gradients are float32
    # half of all are one token: large sums
    even = tokens_of((1, 1201)) % 2 == 0
    targets = tokens_of((1, 1201), size, seed=4).masked_fill(even, 5)
    noise = torch.randn(1, 1201, 48, generator=torch.Generator().manual_seed(6))
    hidden = (noise + 0.5).bfloat16().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()

    # four tiles and one row
    arguments = (hidden, norm.weight, weight, norm, targets[:, None], Grid(), 300)
    (0.37 * TiledCrossEntropy.apply(*arguments)).backward()

    exact_scale = norm.weight.detach().double()
    normed = F.rms_norm(exact, (48,), exact_scale, model.config.rms_norm_eps)
    expected = F.cross_entropy((normed @ exact_weight.T)[0], targets[0], reduction="sum")
    (expected * 0.37).backward()
    with torch.no_grad():
        loss = TiledCrossEntropy.apply(*arguments)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert relative_error(hidden.grad, exact.grad) < 0.01
    assert relative_error(weight.grad, exact_weight.grad) < 0.01


def test_bfloat16_gradient_of_a_frequent_token_is_summed_in_float32(tiny_model):
    """256 + 1 is 256 in bfloat16: summed there, the embedding of a token that fills a long text
    hardly learns."""
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model(torch.bfloat16).to(dtype)
        optimizer = ShardedAdamW(model, Grid())
        tokens = tokens_of((2, 1000)).masked_fill(torch.arange(1000) % 2 == 0, 11)
        optimizer.zero_gradients()
        model.loss(tokens, torch.full_like(tokens, 23))[0].backward()
        gradients.append(model.model.embed_tokens.weight.grad[11].clone())
    assert gradients[0].dtype == torch.float32
    assert relative_error(*gradients) < 0.03


def test_loss_without_a_target_is_zero_not_nan(tiny_model):
    model = tiny_model()
    loss, count = model.loss(tokens_of((2, 5)), torch.full((2, 5), -100))
    loss.backward()
    assert loss == 0 and count == 0
    for parameter in model.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


def test_cross_document_mask_makes_documents_independent(tiny_model):
    """A masked row equals its documents run alone at the same positions; without the mask it does
    not."""
    model = tiny_model(torch.float64)
    first = tokens_of((1, 7))
    second = tokens_of((1, 9), seed=8)
    other = tokens_of((1, 7), seed=9)
    ids = torch.tensor([[0] * 7 + [1] * 9])

    def after(document, ids=None):
        """Hidden states of the second document, which follows this one."""
        row = torch.cat([document, second], 1)
        return model.hidden_states(row, ids)[:, 7:]

    with torch.no_grad():
        torch.testing.assert_close(after(first, ids), after(other, ids))
        # rotary positions are relative: the offset does not matter
        alone = model.hidden_states(second)
        torch.testing.assert_close(after(first, ids), alone, rtol=1e-3, atol=1e-5)
        assert (after(first) - after(other)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------- generation


def test_cache_gives_the_logits_of_a_full_forward(tiny_model):
    """Greedy decoding with the cache picks what the full forward would at every step."""
    model = tiny_model()
    out = model.generate(tokens_of((2, 5)), 12)
    full = model(out).argmax(-1)
    assert torch.equal(out[:, 5:], full[:, 4:-1])


def test_sampling_is_seeded_and_top_p_keeps_the_nucleus(tiny_model):
    model = tiny_model()
    prompt = tokens_of((1, 4))

    def draw(seed, **options):
        return model.generate(prompt, 8, temperature=1.0, seed=seed, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    # the smallest nucleus is the greedy token
    assert torch.equal(draw(1, top_p=1e-9), model.generate(prompt, 8))


def test_stop_token_ends_generation(tiny_model):
    model = tiny_model()
    prompt = tokens_of((1, 4))
    third = model.generate(prompt, 8)[0, 6].item()
    out = model.generate(prompt, 8, stop_tokens=(third,))[0, 4:].tolist()
    assert out[-1] == third and out.count(third) == 1


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_byte_identical_and_sharded(dtype, tiny_model, tmp_path):
    model = tiny_model(dtype)
    model.save_pretrained(tmp_path / "a", max_shard_bytes=20_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    Llama.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_bytes=20_000)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    # files are full: of two that follow each other, one could not take the other's tensors too
    files = sorted((tmp_path / "a").glob("model-*.safetensors"))
    for file, following in itertools.pairwise(files):
        first, second = (load_file(path).values() for path in (file, following))
        assert sum(x.nbytes for x in first) + max(x.nbytes for x in second) > 20_000
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    assert {"model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight",
            "model.norm.weight", "lm_head.weight"} <= set(names)


def test_single_file_checkpoint_with_extra_tied_head(tiny_model, tiny_config, tmp_path):
    """model.safetensors without an index, which repeats the tied embedding as lm_head, as some
    exports do."""
    model = tiny_model(tie_word_embeddings=True)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
    loaded = Llama.from_pretrained(tmp_path)
    tokens = tokens_of((1, 6))
    assert torch.equal(loaded(tokens), model(tokens))


def save_single(path, weights, config):
    """A directory of one file of weights."""
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_head_that_differs_from_the_tied_embedding_is_not_dropped(tiny_model, tmp_path):
    """transformers unties; we say what to do. As said, both are used."""
    model = tiny_model()
    weights = weights_of(model)
    save_single(tmp_path, weights, model.config.to_hf() | {"tie_word_embeddings": True})
    message = "lm_head.weight contradicts .* tie_word_embeddings is true, .*; correct config.json"
    for tp in (1, 2):
        if tp == 2:
            weights = weights_of(tiny_model(vocab_size=98))
            config = tiny_model(vocab_size=98).config.to_hf() | {"tie_word_embeddings": True}
            save_single(tmp_path, weights, config)
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(tmp_path, Grid(tp=tp, rank=tp - 1))
    save_single(tmp_path, weights_of(model), model.config.to_hf())
    tokens = tokens_of((1, 6))
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq",
                                  "model.layers.2.self_attn.rotary_emb.inv_freq"])
def test_stored_frequencies_must_be_those_of_config_json(name, tiny_model, tmp_path):
    """Old files have them, some in float16. Of another theta they say that config.json is wrong."""
    model = tiny_model(rope_theta=500000.0)
    weights = weights_of(model)
    stored = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    rule = {"rope_scaling": YARN, "max_position_embeddings": 128}  # they are those before any rule
    save_single(tmp_path, weights | {name: stored.half()}, model.config.to_hf() | rule)
    loaded = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert name not in dict(loaded.named_parameters())
    config = model.config.to_hf() | {"rope_theta": 10000.0}
    save_single(tmp_path, weights | {name: stored}, config)
    with pytest.raises(ValueError, match=f"{name} contradicts .* rope_theta is 10000, "):
        Llama.from_pretrained(tmp_path)
    save_single(tmp_path, weights | {name.replace("inv_freq", "scale"): stored}, config)
    with pytest.raises(ValueError, match="rotary_emb.scale is unexpected"):
        Llama.from_pretrained(tmp_path)


def test_of_two_sets_of_weights_the_single_file_is_read_and_told(tiny_model, tmp_path, capsys):
    """save_pretrained twice into one directory, sharded and then not, leaves the old index, and
    perhaps its files. transformers reads the single file."""
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_bytes=20_000)
    new = tiny_model(seed=2)
    save_file(weights_of(new), tmp_path / "model.safetensors")
    tokens = tokens_of((1, 6))
    for stale in (True, False):
        if not stale:
            for file in tmp_path.glob("model-*.safetensors"):
                file.unlink()
        loaded = Llama.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens), new(tokens))
        said = capsys.readouterr().out
        assert said.count("holds two sets of weights; model.safetensors is read, ") == 1
    index = tmp_path / "model.safetensors.index.json"
    names = dict.fromkeys(weights_of(new), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))  # one set, as mlx_lm writes it
    Llama.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""
    theirs = in_transformers(tmp_path)
    with torch.no_grad():
        assert (theirs(tokens).logits - new(tokens)).abs().max() < 1e-4


def test_weights_are_not_saved_beside_others(tiny_model, tmp_path):
    """Beside a single file ours would never be read."""
    save_file(weights_of(tiny_model()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="already holds a model"):
        tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a model"):
        tiny_model().save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype, stored_as", [
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.int8, "I8"),
    (torch.uint8, "U8"),
])
def test_numbers_that_may_need_scales_are_refused_before_any_is_read(
        dtype, stored_as, tiny_model, tmp_path, monkeypatch):
    """A single one, of the last layer; its scales may be missing."""
    model = tiny_model()
    weights = weights_of(model)
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_single(tmp_path, weights, model.config.to_hf())
    monkeypatch.setattr(data, "read_shard", lambda *_: pytest.fail("something was read"))
    message = f"{name} is stored as {stored_as}, .*before quantisation"
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(tmp_path)


def test_yarn_replaces_llama3_scaling_and_exports_explicitly(tiny_model, tmp_path):
    """YaRN never stacks on Llama 3.1's scaling; window = original x factor; attention_factor is
    written."""
    tiny_model(rope_scaling=LLAMA3, max_position_embeddings=256).save_pretrained(tmp_path / "a")
    model = Llama.from_pretrained(tmp_path / "a", rope_scaling=RopeScaling("yarn", 128.0))
    assert model.config.max_position_embeddings == 32 * 128
    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["max_position_embeddings"] == 4096
    rule = written["rope_scaling"]
    assert rule["rope_type"] == "yarn"
    assert rule["attention_factor"] == pytest.approx(1.48520, abs=1e-5)
    assert rule["original_max_position_embeddings"] == 32
    assert read_config(tmp_path / "b").rope_scaling.factor == 128.0


def test_no_rule_stacks_on_a_saved_one(tiny_model, tiny_config, tmp_path):
    """Linear must be told its window before. An exported NTK-aware model is a model with a larger
    theta and window."""
    for kind in ("ntk", "linear"):
        model = tiny_model()
        model.config = rescale(model.config, RopeScaling(kind, 4.0))
        model.save_pretrained(tmp_path / kind)
    ntk = read_config(tmp_path / "ntk")
    assert ntk.rope_theta == ntk_theta(10000.0, 4.0, ntk.head_dim)
    assert ntk.max_position_embeddings == 256
    assert ntk.rope_scaling.kind == "default"

    linear = read_config(tmp_path / "linear")
    assert linear.rope_theta == 10000.0
    assert linear.max_position_embeddings == 256
    assert linear.rope_scaling.kind == "linear"
    with pytest.raises(ValueError, match="--original-length is needed"):
        rescale(read_config(tmp_path / "linear"), RopeScaling("yarn", 8.0))
    extended = rescale(read_config(tmp_path / "linear"), RopeScaling("yarn", 8.0, 64))
    assert extended.max_position_embeddings == 64 * 8

    # its frequencies have no window before
    unstated = ModelConfig.from_hf(tiny_config(rope_scaling={"type": "yarn", "factor": 4.0}))
    message = "--original-length is needed: a checkpoint with such yarn scaling"
    with pytest.raises(ValueError, match=message):
        rescale(unstated, RopeScaling("yarn", 8.0))


def test_base_and_window_may_change_with_a_rule_or_alone(tiny_model, tmp_path):
    config = ModelConfig.from_hf(vars(tiny_model().config)["hf"])
    assert rescale(config) == config
    theta = rescale(config, theta=5e5, window=256)
    assert (theta.rope_theta, theta.max_position_embeddings) == (5e5, 256)
    assert theta.rope_scaling == config.rope_scaling
    both = rescale(config, RopeScaling("yarn", 2.0), 5e5, 256)
    assert (both.rope_theta, both.max_position_embeddings) == (5e5, 256)
    assert both.rope_scaling == RopeScaling("yarn", 2.0, 64)  # of the old window, not the new

    with pytest.raises(ValueError, match="--new-window 64 is below the 128 that the model takes"):
        rescale(config, RopeScaling("yarn", 2.0), window=64)
    model = tiny_model()
    for factor in (2.0, 8.0):  # as told, and beyond what the rule reaches
        model.config = rescale(config, RopeScaling("yarn", factor), window=512)
        model.save_pretrained(tmp_path / f"{factor}")
        again = read_config(tmp_path / f"{factor}")
        assert again.max_position_embeddings == 512
        assert again.rope_scaling.factor == factor
        assert again.window_before() == 64

    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    asked = Llama.from_pretrained(tmp_path / "a", rope_theta=5e5)
    model.config = theta
    tokens = torch.arange(90).view(1, 90)
    assert torch.equal(asked(tokens), model(tokens))
    assert asked.config.max_position_embeddings == 64


def test_window_of_the_source_file_does_not_contradict_the_export(tiny_model, tmp_path):
    """transformers 5 lets a top-level original_max_position_embeddings win over the scaling: it
    must not be left there."""
    model = tiny_model(rope_scaling=LLAMA3, max_position_embeddings=256,
                       original_max_position_embeddings=32)
    model.save_pretrained(tmp_path / "a")
    extended = Llama.from_pretrained(tmp_path / "a", rope_scaling=RopeScaling("yarn", 2.0, 64))
    extended.save_pretrained(tmp_path / "b")
    config = read_config(tmp_path / "b")
    assert config.rope_scaling.original_max_position == 64
    # without its rule: the old window
    assert rescale(config, RopeScaling()).max_position_embeddings == 64


def test_bfloat16_loads_as_float32_on_request(tiny_model, tmp_path):
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "a")
    model = Llama.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(next((tmp_path / "a").glob("*.safetensors")))
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gemma"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"rope_theta": "10000"}, "rope_theta .*'10000'"),
    ({"rope_theta": True}, "rope_theta .* True"),
    ({"rope_theta": math.nan}, "rope_theta .* nan"),
    ({"rope_theta": 1.0}, "rope_theta must be a number above 1"),
    ({"initializer_range": -1.0}, "initializer_range"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"head_dim": None, "hidden_size": 50}, "hidden_size 50"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers .1, 1. must .* the 3 "),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1, 2]}, "no_rope_layers .1, 1, 2. must have"),
    ({"model_type": "smollm3", "no_rope_layers": "110"}, "no_rope_layers .'110'. must have"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ({"model_type": "smollm3", "no_rope_layer_interval": "4"}, "no_rope_layer_interval is '4'"),
    ({"model_type": "smollm3", "num_hidden_layers": None}, "num_hidden_layers"),
])
def test_bad_configurations_are_named(change, message, tiny_config):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_hf(tiny_config(**change))
    assert "\n" not in str(error.value)


CHANGES_NOTHING = {  # keys with values as other programs write them
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "dtype": "float16",
    "transformers_version": "4.43.0", "use_cache": False, "pretraining_tp": 2, "_name_or_path": "x",
    "attention_dropout": 0.0, "rope_interleaved": False, "is_llama_config": True, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": [2, 3], "unsloth_fixed": True, "max_sequence_length": 2048,
    "auto_map": {"AutoConfig": "configuration_x.C"}, "temperature": 0.6, "top_k": 50,
    "id2label": {"0": "LABEL_0"}, "num_experts": 0, "sliding_window": None, "qk_layernorm": False,
    "layer_types": ["full_attention"] * 3, "logits_scaling": 1.0, "residual_multiplier": 1.0,
    "no_rope_layers": [], "use_sliding_window": False, "attn_logit_softcapping": None,
}
CHANGES_SOMETHING = [
    {"no_rope_layers": [1, 1, 0]}, {"no_rope_layer_interval": 4},
    {"dual_chunk_attention_config": {"chunk_size": 262144}}, {"sliding_window": 4096},
    {"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]},
    {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0},
    {"embedding_multiplier": 12.0}, {"attention_multiplier": 0.0078125},
    {"residual_multiplier": 0.22}, {"logits_scaling": 8.0}, {"use_qk_norm": True},
    {"qk_layernorm": True}, {"num_experts": 8}, {"attention_dropout": 0.1}, {"mlp_bias": True},
    {"quantization_config": {"quant_method": "fp8"}}, {"clip_qkv": 8.0}, {"attention_sinks": 4},
    {"scale_emb": 12}, {"unheard_of": "x"}, {"rope_interleaved": True},
    {"is_encoder_decoder": True}, {"is_causal": False}, {"use_rope": False},
    {"embedding_multiplier": True}, {"use_scaled_rope": True},
]


@pytest.mark.parametrize("key", CHANGES_NOTHING)
def test_keys_known_to_change_nothing_pass(key, tiny_config):
    plain = ModelConfig.from_hf(tiny_config())
    config = ModelConfig.from_hf(tiny_config(**{key: CHANGES_NOTHING[key]}))
    assert replace(config, hf={}) == replace(plain, hf={})


@pytest.mark.parametrize("change", CHANGES_SOMETHING, ids=lambda change: next(iter(change)))
def test_keys_that_may_change_the_function_are_refused_by_name(change, tiny_config):
    """Whatever is not known to change nothing. Of a family that reads them they may be known."""
    [key] = change
    with pytest.raises(ValueError, match=f"^config.json: {key} ") as error:
        ModelConfig.from_hf(tiny_config(**change))
    assert "\n" not in str(error.value)
    if key not in (*ONLY, "quantization_config"):  # of which more is known
        assert str(error.value).endswith("delete it if it changes nothing")


def test_a_window_that_is_switched_off_changes_nothing(tiny_config):
    """As Qwen2.5's files have it, where no layer uses it."""
    for family in ("qwen2", "qwen3", "smollm3"):
        ModelConfig.from_hf(tiny_config(model_type=family, use_sliding_window=False,
                                        sliding_window=32768, max_window_layers=28))
        with pytest.raises(ValueError, match="use_sliding_window"):
            ModelConfig.from_hf(tiny_config(model_type=family, use_sliding_window=True))


def test_keys_left_out_have_transformers_values(tiny_config):
    transformers = pytest.importorskip("transformers")
    sizes = tiny_config(num_attention_heads=32, num_hidden_layers=5, hidden_size=64)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta",
                "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        del sizes[key]
    cases = [{"model_type": family} for family in ARCHITECTURES]
    cases.append({"model_type": "smollm3", "no_rope_layer_interval": 2})
    for changes in cases:
        family = changes["model_type"]
        ours = ModelConfig.from_hf(sizes | changes)
        theirs = transformers.AutoConfig.for_model(**sizes | changes)
        for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                    "tie_word_embeddings"):
            assert getattr(ours, key) == getattr(theirs, key), (family, key)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert list(ours.no_rope_layers) == getattr(theirs, "no_rope_layers", [])
        # a file that states every default says the same
        whole = json.loads(theirs.to_json_string(use_diff=False))
        assert replace(ModelConfig.from_hf(whole), hf={}) == replace(ours, hf={})


def test_biases_of_qwen2_are_not_stated(tiny_config):
    """q, k and v have them, o has none, whatever its files say: other programs might believe it."""
    config = ModelConfig.from_hf(tiny_config(model_type="qwen2", attention_bias=True))
    names = [name for name, _ in Llama(config).named_parameters() if name.endswith("bias")]
    assert len(names) == 3 * 3 and not any("o_proj" in name for name in names)
    assert "attention_bias" not in config.to_hf()


def test_only_what_still_holds_is_exported(tiny_config):
    """What is said of the source's weights, code and window is not said of ours."""
    source = tiny_config(
        **CHANGES_NOTHING | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1]},
        model_max_length=2048, original_max_position_embeddings=64)
    written = ModelConfig.from_hf(source).to_hf()
    stated = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
              "rms_norm_eps", "initializer_range", "tie_word_embeddings", "attention_bias")
    about = ("architectures", "model_type", "hidden_act", "rope_theta", "rope_scaling",
             "no_rope_layers", "bos_token_id", "eos_token_id", "pad_token_id")
    assert sorted(written) == sorted((*stated, *about))
    assert written["no_rope_layers"] == [1, 0, 1]
    assert written["eos_token_id"] == [2, 3]
    assert written["architectures"] == ["SmolLM3ForCausalLM"]


def test_errors_name_the_file_whatever_it_is_called(tiny_config, tmp_path):
    """A tokenizer.json given as a model, say."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match=f"^{file}: is no model's configuration"):
        read_config(file)
    file.write_text(json.dumps(tiny_config(head_dim=7)))
    with pytest.raises(ValueError, match=f"^{file}: head_dim 7 is odd"):
        read_config(file)


@pytest.mark.parametrize("config, generation, stops", [
    (2, None, [2]),
    (2, [2, 5], [2, 5]),
    (None, 7, [7]),
    ([3, 4], 3, [3, 4]),
])
def test_stop_tokens_are_those_of_both_files(config, generation, stops, tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=config)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(tmp_path).hf["eos_token_id"] == stops


@pytest.mark.parametrize("stated", ["</s>", True, [2, "3"], {"id": 2}, 2.0])
def test_a_stop_token_that_is_none_is_named(stated, tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=stated)))
    with pytest.raises(ValueError, match="config.json: eos_token_id is .*; it must be an id"):
        read_config(tmp_path)


REAL = json.loads((Path(__file__).parent / "real_configs.json").read_text())
MODELS = (Path(__file__).parent.parent / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", REAL)
def test_real_models_load_or_are_refused_with_the_line_that_the_documentation_says(name):
    """docs/models.md has a row for each: its window and rule, or the error."""
    [row] = [line for line in MODELS.splitlines() if line.startswith(f"| {name} |")]
    try:
        config = ModelConfig.from_hf(REAL[name])
    except ValueError as error:
        said = f"`{error}`"
    else:
        said = f"{config.max_position_embeddings:,}, {config.rope_scaling.kind}"
        assert ModelConfig.from_hf(config.to_hf()).to_hf() == config.to_hf()
    assert row == f"| {name} | {said} |"


def test_bad_weight_files_are_named(tiny_model, tmp_path):
    """Missing shard, truncated shard, wrong shape, missing tensor: each is one line with the file
    or the tensor."""
    tiny_model().save_pretrained(tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}.*not a complete"):
        Llama.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        Llama.from_pretrained(tmp_path)
    shard.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    with pytest.raises(ValueError, match="gate_proj.*81"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="layers.3.*missing"):
        Llama.from_pretrained(tmp_path)


def test_tokens_outside_the_vocabulary_are_refused(tiny_model):
    """Of a vocabulary spread over ranks no rank would miss them."""
    model = tiny_model()
    good = torch.tensor([[1, 2]])
    for bad in (torch.tensor([[1, 97]]), torch.tensor([[-7, 1]])):
        with pytest.raises(IndexError, match="vocabulary of 97"):
            model(bad)
        with pytest.raises(IndexError, match="vocabulary of 97"):
            model.loss(good, bad)


@pytest.mark.parametrize("tp", [1, 2])
def test_loaded_weights_are_in_memory_of_their_own(tp, tiny_model, tmp_path):
    """A view of the file begins at any byte, where a kernel may round otherwise than where the run
    began."""
    tiny_model(vocab_size=98).save_pretrained(tmp_path)
    for name, parameter in Llama.from_pretrained(tmp_path, Grid(tp=tp)).named_parameters():
        assert parameter.data_ptr() % 64 == 0, name
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
