"""The model: parity with transformers, the tiled loss, generation, and Hugging Face directories."""
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import VOCABULARY_TILE, Llama, ModelConfig, TiledCrossEntropy, read_config, rescale
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
])
def test_bad_configurations_are_named(change, message, tiny_config):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_hf(tiny_config(**change))
    assert "\n" not in str(error.value)


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
