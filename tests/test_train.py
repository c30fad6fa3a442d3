"""Training: options reach their place, the schedule, bit-exact resume after SIGKILL, SIGTERM,
non-finite losses, validation."""
import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from allocations import Operators
from fake_cuda import fake_cuda
from processes import fork_context
from texts import hugging_face_tokenizer

import data
import sft
import train
from model import Llama, ModelConfig, read_config, rescale
from parallel import Grid, ShardedAdamW
from rope_yarn import RopeScaling, inverse_frequencies, scaling_from_options
from tools.perplexity import token_losses
from tools.prepare import prepare_corpus
from tools.train_tokenizer import train_bpe
from train import choose_attention


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A tokenizer, a small corpus and a config of a model that trains in milliseconds."""
    place = tmp_path_factory.mktemp("work")
    texts = []
    for i in range(120):
        texts.append(f"def function_{i}(value):\n    return value * {i} + {i * i}\n" * (1 + i % 7))
    tokenizer = train_bpe(texts, 270, place / "tokenizer")
    write_lines(place / "text.jsonl", [{"text": text} for text in texts])
    prepare_corpus([("code", place / "text.jsonl")], tokenizer, place / "corpus", holdout_window=0)
    prose = [f"Number {i} follows {i - 1}. " * (1 + i % 5) for i in range(60)]
    write_lines(place / "prose.jsonl", [{"text": text} for text in prose])
    prepare_corpus([("prose", place / "prose.jsonl")], tokenizer, place / "prose", holdout_window=0)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.n_vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (place / "config.json").write_text(json.dumps(config))
    chat = []
    for i in range(40):
        question = {"role": "user", "content": f"What is {i}?"}
        answer = {"role": "assistant", "content": f"It is {i}."}
        chat.append({"messages": [question, answer]})
    write_lines(place / "chat.jsonl", chat)
    write_lines(place / "held-out.jsonl", chat[::-3])
    return place


def command(workplace, out, *more, steps=40, sources=("corpus",)):
    words = ["--config", workplace / "config.json", "--tokenizer", workplace / "tokenizer",
             "--data", *(workplace / source for source in sources),
             "--sequence-length", 64, "--batch-size", 2, "--steps", steps,
             "--learning-rate", "1e-2", "--validation-sequences", 2,
             "--device", "cpu", "--dtype", "float32", "--out", out, *more]
    return [str(word) for word in words]


def stage1(*arguments):
    train.main([str(argument) for argument in arguments])


def stage2(*arguments):
    sft.main([str(argument) for argument in arguments])


def records(out):
    """The lines of metrics.jsonl, without what depends on the time of day."""
    timed = ("tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_wait",
             "peak_memory_gib")
    found = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.append({key: value for key, value in record.items() if key not in timed})
    return found


def metrics(out, key="loss"):
    return [line[key] for line in records(out) if key in line]


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    stage1(*command(workplace, workplace / "whole", "--checkpoint-every", 7, "--validate-every", 5))
    return metrics(workplace / "whole")


def test_training_learns_and_leaves_a_model(workplace, uninterrupted):
    assert len(uninterrupted) == 40
    assert metrics(workplace / "whole", "attention") == ["flash"] * 40  # which kernel, at each step
    assert uninterrupted[-1] < 0.6 * uninterrupted[0]
    model = Llama.from_pretrained(workplace / "whole" / "final")
    assert (workplace / "whole" / "final" / "tokenizer.model").is_file()
    assert model.config.vocab_size == data.load_tokenizer(workplace / "whole" / "final").n_vocab
    assert len(train.checkpoints(workplace / "whole")) == 2  # the newest two are kept


# ---------------------------------------------------------------------- options reach their place


def textbook_run(config, batches, rates, seed, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0):
    """A training run written out the obvious way: S x V logits, whole batches, torch's AdamW.
    Returns losses, norms, the model."""
    model = Llama(config).initialise(seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=1e-8)
    losses = []
    norms = []
    for rows, rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        loss = textbook_loss(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms.append(norm.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model


def textbook_loss(model, rows):
    """Mean cross-entropy over all targets of a batch."""
    hidden = model.hidden_states(rows.tokens, rows.document_ids)
    logits = model.model.norm(hidden) @ model.head_weight.T  # (B, S, V)
    return F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=-100)


def test_memory_options_change_memory_alone_and_may_change_at_a_resume(workplace, tmp_path):
    """Recomputed in tiles, kept on the host, optimizer too: the same losses; and a checkpoint of
    such a run continues without."""
    words = ["--checkpoint-every", "3", "--keep-checkpoints", "2"]
    lean = ["--recompute", "mlp", "--offload", "--offload-optimizer", "--tile", "40"]
    stage1(*command(workplace, tmp_path / "plain", steps=6), *words)
    stage1(*command(workplace, tmp_path / "lean", steps=6), *words, *lean)
    expected = pytest.approx(metrics(tmp_path / "plain"), rel=1e-5)
    assert metrics(tmp_path / "lean") == expected
    for line in map(json.loads, (tmp_path / "lean" / "metrics.jsonl").open()):
        if "loss" in line:
            assert 0 <= line["data_wait"] < 1
            assert line["mfu"] is None  # a CPU has no data sheet here
    shutil.rmtree(tmp_path / "lean" / "final")
    shutil.rmtree(tmp_path / "lean" / "checkpoint-00000006")
    stage1(*command(workplace, tmp_path / "lean", steps=6), *words, "--resume")
    assert metrics(tmp_path / "lean") == expected


@pytest.mark.parametrize("masked", [False, True])
def test_stage_1_is_the_textbooks_with_every_option_in_its_place(masked, workplace, tmp_path):
    """The classic: an option that is parsed, saved with the run and used nowhere. None has its
    default here."""
    stage1(*command(workplace, tmp_path / "run", steps=6, sources=("corpus=1", "prose=3")),
           "--batch-size", 4, "--micro-batch-size", 2, "--clip", 0.25, "--weight-decay", 0.3,
           "--betas", 0.8, 0.9, "--warmup-steps", 3, "--final-learning-rate", 0.2, "--seed", 5,
           "--separator", "bos_eos", "--short-length", 40, "--long-length", 100,
           "--short-weight", 0.5, "--long-weight", 3, *["--cross-document-mask"] * masked)
    options = {"sequence_length": 64, "seed": 5, "separator": "bos_eos", "short": 40, "long": 100,
               "tokenizer": data.load_tokenizer(workplace / "tokenizer"), "document_mask": masked}
    weights = {"short_weight": 0.5, "long_weight": 3}
    corpus = data.PackedDataset(workplace / "corpus", "train", **weights, **options)
    prose = data.PackedDataset(workplace / "prose", "train", **weights, **options)
    blend = data.Blend([corpus, prose], [1, 3], 5)
    batches = [data.batch(blend, 4 * i, 4) for i in range(6)]
    # three steps of warm-up, then the cosine of 60, 120, 180 degrees
    rates = [0.01 / 3, 0.02 / 3, 0.01, 0.01 * (0.2 + 0.8 * 0.75), 0.01 * (0.2 + 0.8 * 0.25), 0.002]
    config = read_config(workplace / "config.json")
    losses, norms, model = textbook_run(config, batches, rates, seed=5, betas=(0.8, 0.9),
                                        weight_decay=0.3, clip=0.25)

    assert metrics(tmp_path / "run", "learning_rate") == pytest.approx(rates, rel=1e-12)
    assert metrics(tmp_path / "run") == pytest.approx(losses, rel=1e-4)
    assert metrics(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=1e-3)
    # documents as they come, by no weight
    held_out = data.PackedDataset(workplace / "corpus", "valid", **options)
    expected = textbook_loss(model, data.batch(held_out, 0, 2)).item()
    assert metrics(tmp_path / "run", "validation_loss") == [pytest.approx(expected, rel=1e-4)]


def test_a_run_of_stage_2_is_the_textbooks_on_its_files_and_held_out_chat(workplace, tmp_path):
    """Held-out chat is what --validation-data names, never the training samples; files are blended
    by weight and seed."""
    sft.main(command(workplace, tmp_path / "run", "--seed", 5, "--warmup-steps", 0,
                     "--final-learning-rate", 1, "--validation-data", workplace / "held-out.jsonl",
                     steps=6, sources=("chat.jsonl=3", "held-out.jsonl=1")))
    tokenizer = data.load_tokenizer(workplace / "tokenizer")
    chat = sft.ChatDataset(workplace / "chat.jsonl", tokenizer, 64, 5)
    held_out = sft.ChatDataset(workplace / "held-out.jsonl", tokenizer, 64, 5)
    blend = data.Blend([chat, held_out], [3, 1], 5)
    batches = [data.batch(blend, 2 * i, 2) for i in range(6)]
    config = read_config(workplace / "config.json")
    losses, norms, model = textbook_run(config, batches, rates=[0.01] * 6, seed=5)

    assert metrics(tmp_path / "run") == pytest.approx(losses, rel=1e-4)
    assert metrics(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=1e-3)
    expected = textbook_loss(model, data.batch(held_out, 0, 2)).item()
    assert metrics(tmp_path / "run", "validation_loss") == [pytest.approx(expected, rel=1e-4)]


def test_recomputation_and_tiles_asked_for_are_made(workplace, tmp_path):
    """Counted in the operators that run: their results are the same, so no number would tell."""
    def counts(name, *words):
        """How often attention ran forward and backward, and the MLP's activation."""
        with Operators() as seen:
            stage1(*command(workplace, tmp_path / name, steps=1), "--validation-sequences", 0,
                   *words)
        attention = "_scaled_dot_product_flash_attention_for_cpu"
        return seen.count[attention], seen.count[attention + "_backward"], seen.count["silu"]

    layers = 2
    assert counts("plain") == (layers, layers, layers)
    lean = counts("lean", "--recompute", "block", "--tile", 100, "--batch-size", 4)
    assert lean[:2] == (2 * layers, layers)  # forward twice
    assert lean[2] > 3 * layers  # and the MLP in several tiles


# ------------------------------------------------------------------------- interruption, failures


def train_slowly(arguments):
    """So that ten kills find something to kill."""
    torch.set_num_threads(1)
    step = train.training_step
    train.training_step = lambda *given: time.sleep(0.05) or step(*given)
    train.main(arguments)


def test_sigkill_and_resume_give_the_same_metrics_to_the_last_bit(workplace, uninterrupted,
                                                                  tmp_path):
    """Ten kills at random moments, wherever they fall (start, first step, half-written
    checkpoint): no step or validation is repeated, skipped or changed, no norm and no learning
    rate either."""
    moments = random.Random(0)
    out = tmp_path / "killed"
    kills = 0
    arguments = command(workplace, out, "--checkpoint-every", 3, "--validate-every", 5, "--resume")

    def written():
        """Lines of metrics so far."""
        file = out / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.exists() else 0

    while not (out / "final").exists():
        process = fork_context().Process(target=train_slowly, args=(arguments,))
        process.start()
        if kills < 10:
            started = written()
            deadline = time.time() + 60
            # wait for progress, then strike at random
            while process.is_alive() and time.time() < deadline:
                if started - 3 < written() != started:
                    break
                time.sleep(0.01)
            time.sleep(moments.random() * 0.25)
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3  # a fast machine may finish before the tenth
    assert records(out) == records(workplace / "whole")
    assert not list(out.glob("*.partial"))
    for file in (workplace / "whole" / "final").iterdir():
        assert file.read_bytes() == (out / "final" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_cleanly_and_resumes(number, workplace, uninterrupted, tmp_path):
    out = tmp_path / "stopped"
    arguments = command(workplace, out, "--resume", steps=40)
    process = fork_context().Process(target=train.main, args=(arguments,))
    process.start()
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    if not (out / "final").exists():  # it may have been at its last step already
        assert len(train.checkpoints(out)) == 1
        stage1(*arguments)
    torch.set_num_threads(1)
    # the child had other thread numbers
    assert metrics(out) == pytest.approx(uninterrupted, rel=1e-3)


def test_resume_refuses_other_settings_and_a_used_directory(workplace, uninterrupted):
    with pytest.raises(SystemExit, match="holds an earlier run"):
        stage1(*command(workplace, workplace / "whole"))
    checkpoints = len(train.checkpoints(workplace / "whole"))
    (workplace / "whole" / "final").rename(workplace / "whole-final")
    try:
        for words, message in (
                (["--learning-rate", 0.5], "error: --learning-rate is 0.5, but"),
                # by the name that the command line knows
                (["--cross-document-mask"], "--cross-document-mask .* is True, but"),
                (["--rope-kind", "yarn", "--rope-factor", 2, "--no-attention-temperature"],
                 "--no-attention-temperature. is False, but")):
            with pytest.raises(SystemExit, match=message):
                stage1(*command(workplace, workplace / "whole", "--resume"), *words)
    finally:
        (workplace / "whole-final").rename(workplace / "whole" / "final")
    assert len(train.checkpoints(workplace / "whole")) == checkpoints


def test_a_directory_that_is_no_run_is_not_taken_for_one(workplace, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "lock").write_text("mine too")
    for more in ((), ("--resume",)):
        with pytest.raises(SystemExit, match="holds files, but no run"):
            stage1(*command(workplace, tmp_path, *more))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "lock"}


def test_a_finished_run_is_left_alone_a_damaged_checkpoint_named(workplace, tmp_path, capsys):
    words = command(workplace, tmp_path / "run", "--checkpoint-every", 2, "--resume", steps=2)
    stage1(*words)
    files = sorted((tmp_path / "run").rglob("*"))
    stage1(*words)
    assert "run/final is already there; nothing to do" in capsys.readouterr().out
    assert sorted((tmp_path / "run").rglob("*")) == files
    state = tmp_path / "run" / "checkpoint-00000002" / "optimizer"
    shutil.rmtree(state)  # which is not needed any more
    stage1(*words)
    assert "run/final is already there; nothing to do" in capsys.readouterr().out
    state.mkdir()
    progress = tmp_path / "run" / "checkpoint-00000002" / "training.json"
    progress.write_text('{"format": 2, "step": 2}')
    with pytest.raises(SystemExit, match="training.json: has no step or no settings"):
        stage1(*words)
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "checkpoint-00000002" / "training.json").write_text("{")
    with pytest.raises(SystemExit, match="checkpoint-00000002/training.json: not valid JSON"):
        stage1(*words)


@pytest.mark.parametrize("damaged", ["model-00001-of-00001.safetensors", "config.json",
                                     "optimizer/exp_avg_sq-00001-of-00001.safetensors",
                                     "optimizer/master.safetensors.index.json", "training.json",
                                     "tokenizer.model"])
def test_of_a_damaged_newest_checkpoint_the_newest_whole_one_is_named(damaged, workplace, tmp_path):
    """And how to go on from it; as told, it does. Which of them are whole, is looked at."""
    words = command(workplace, tmp_path / "run", "--checkpoint-every", 1, "--keep-checkpoints", 3,
                    "--resume", steps=3)
    stage1(*words)
    expected = records(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    for step in (2, 3):
        file = tmp_path / "run" / f"checkpoint-0000000{step}" / damaged
        file.write_bytes(file.read_bytes()[:-20])
    said = "checkpoint-00000001 is whole: remove every newer one to continue from it"
    with pytest.raises(SystemExit, match=f"checkpoint-00000003/{damaged}: .*{said}"):
        stage1(*words)
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000003")
    with pytest.raises(SystemExit, match=f"checkpoint-00000002/{damaged}: .*{said}"):
        stage1(*words)
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000002")
    stage1(*words)
    assert records(tmp_path / "run") == expected


def test_a_line_of_metrics_that_is_none_is_named(workplace, tmp_path):
    words = command(workplace, tmp_path / "run", "--checkpoint-every", 1, "--resume", steps=2)
    stage1(*words)
    for place in ("final", "checkpoint-00000002"):
        shutil.rmtree(tmp_path / "run" / place)
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text()
    count = len(lines.splitlines())
    file.write_text(lines + '{"step": 5, "lo\n')
    with pytest.raises(SystemExit, match=f"metrics.jsonl, line {count + 1}: not valid JSON"):
        stage1(*words)
    file.write_text(lines + '{"step": 5, "lo')  # half a line, which a killed run leaves
    stage1(*words)
    assert len(file.read_text().splitlines()) == count


def test_an_empty_directory_of_the_users_stays_after_a_mistake(workplace, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="--sequence-length 640 is beyond"):
        stage1(*command(workplace, tmp_path / "mine"), "--sequence-length", 640)
    assert list((tmp_path / "mine").iterdir()) == []


def test_without_a_whole_checkpoint_none_is_named(workplace, tmp_path):
    words = command(workplace, tmp_path / "run", "--resume", steps=1)
    stage1(*words)
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "checkpoint-00000001" / "config.json").unlink()
    with pytest.raises(SystemExit, match="no config.json there; give .* directory") as error:
        stage1(*words)
    assert "is whole" not in str(error.value)


def test_a_resumed_run_has_its_checkpoints_model(workplace, tmp_path):
    """Whatever has become of the source: the file that --model or --config named may have been
    edited since."""
    config = tmp_path / "config.json"
    config.write_text((workplace / "config.json").read_text())
    words = [*command(workplace, tmp_path / "run", "--checkpoint-every", 2, "--resume", steps=4),
             "--config", config]
    stage1(*words)
    expected = metrics(tmp_path / "run")
    final = (tmp_path / "run" / "final" / "config.json").read_text()
    for path in ("final", "checkpoint-00000004"):
        shutil.rmtree(tmp_path / "run" / path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 77.0}))
    stage1(*words)
    assert metrics(tmp_path / "run") == expected
    assert (tmp_path / "run" / "final" / "config.json").read_text() == final


def test_micro_batches_give_the_whole_batch_gradient(workplace, tmp_path):
    """Loss is per token of the global batch, not a mean of micro-batch means: chat rows have
    unequal numbers of targets."""
    for name, micro in (("whole", 8), ("micro", 2)):
        stage2("--config", workplace / "config.json", "--tokenizer", workplace / "tokenizer",
               "--data", workplace / "chat.jsonl", "--sequence-length", 48, "--steps", 5,
               "--batch-size", 8, "--micro-batch-size", micro, "--learning-rate", "1e-2",
               "--device", "cpu", "--dtype", "float32", "--out", tmp_path / name)
    for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4)):
        whole = metrics(tmp_path / "whole", key)
        assert whole == pytest.approx(metrics(tmp_path / "micro", key), rel=tolerance)


# the first update makes every weight infinite
DIVERGES = ("--learning-rate", 1e38, "--warmup-steps", 0, "--clip", 0)


def test_non_finite_loss_stops_with_the_step_and_the_last_good_checkpoint(workplace, tmp_path):
    message = "step 2: the loss is nan; nothing was updated.*checkpoint-00000001"
    with pytest.raises(SystemExit, match=message):
        stage1(*command(workplace, tmp_path / "nan", "--checkpoint-every", 1), *DIVERGES)
    assert not (tmp_path / "nan" / "final").exists()
    assert len(metrics(tmp_path / "nan")) == 1


def test_full_disk_keeps_the_earlier_checkpoint(workplace, tmp_path):
    """A checkpoint that cannot be written is one line and leaves no half of itself."""
    out = tmp_path / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = command(workplace, out, "--checkpoint-every", 2, "--resume", steps=4)
    stage1(*words)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-00000004")
    # like a full disk, for this process only
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    message = f"^error: {out}.*safetensors: could not be written .*File too large"
    try:
        with pytest.raises(SystemExit, match=message):
            stage1(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in train.checkpoints(out)] == ["checkpoint-00000002"]
    assert not list(out.glob("*.partial"))


def test_a_deletion_cut_short_is_no_checkpoint_and_is_finished_later(workplace, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint-00000009.partial").mkdir(parents=True)
    (out / "checkpoint-00000009.partial" / "optimizer.safetensors").write_text("what a kill left")
    stage1(*command(workplace, out, "--checkpoint-every", 1, "--resume", steps=3))
    names = [path.name for path in train.checkpoints(out)]
    assert names == ["checkpoint-00000002", "checkpoint-00000003"]
    assert not list(out.glob("*.partial"))


def test_signal_handlers_are_given_back_after_a_failure(workplace, tmp_path):
    """A run that ends in an error must not leave a process deaf to Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="step 2: the loss is nan"):
        stage1(*command(workplace, tmp_path / "run"), *DIVERGES)
    assert signal.getsignal(signal.SIGINT) == before


def test_yarn_stage_extends_the_window(workplace, uninterrupted, tmp_path, capsys):
    out = tmp_path / "long"
    stage1("--model", workplace / "whole" / "final", "--data", workplace / "corpus",
           "--sequence-length", 256, "--steps", 2, "--rope-kind", "yarn", "--rope-factor", 4,
           "--device", "cpu", "--validation-sequences", 2, "--out", out)
    said = f"wrote {out}/final; llama.cpp needs --yarn-beta-fast 4 --yarn-beta-slow 1\n"
    assert capsys.readouterr().out.endswith(said)
    config = Llama.from_pretrained(out / "final").config
    assert config.max_position_embeddings == 256
    assert config.rope_scaling.original_max_position == 64
    assert math.isfinite(metrics(out, "validation_loss")[0])


def test_another_base_and_window_are_trained_exported_and_part_of_the_run(workplace, uninterrupted,
                                                                            tmp_path):
    """Without a rule the window must be said; with one, "beyond it" may be said to be inside."""
    words = ["--model", workplace / "whole" / "final", "--data", workplace / "corpus",
             "--sequence-length", 256, "--steps", 1, "--device", "cpu", "--validation-sequences", 0]
    with pytest.raises(SystemExit, match="beyond the model's window of 64"):
        stage1(*words, "--rope-theta", 5e5, "--out", tmp_path / "none")
    stage1(*words, "--rope-theta", 5e5, "--new-window", 256, "--out", tmp_path / "theta")
    config = read_config(tmp_path / "theta" / "final")
    assert config.rope_theta == 5e5
    assert config.rope_scaling.kind == "default"
    assert config.max_position_embeddings == 256
    shutil.rmtree(tmp_path / "theta" / "final")
    with pytest.raises(SystemExit, match="--rope-theta is 4.0, but .* has 500000.0"):
        stage1(*words, "--rope-theta", 4, "--new-window", 256, "--resume", "--out",
               tmp_path / "theta")

    small = ("--rope-kind", "yarn", "--rope-factor", 2)
    with pytest.raises(SystemExit, match="beyond the model's window of 128"):
        stage1(*words, *small, "--out", tmp_path / "none")
    stage1(*words, *small, "--new-window", 256, "--out", tmp_path / "small")
    config = read_config(tmp_path / "small" / "final")
    assert config.rope_scaling.factor == 2
    assert config.rope_scaling.original_max_position == 64
    assert config.max_position_embeddings == 256


def test_a_checkpoint_of_before_an_option_resumes_without_it(workplace, tmp_path):
    stage1(*command(workplace, tmp_path / "run", steps=2))
    shutil.rmtree(tmp_path / "run" / "final")
    [checkpoint] = train.checkpoints(tmp_path / "run")
    progress = json.loads((checkpoint / "training.json").read_text())
    for name in ("rope_theta", "new_window", "stored_order"):
        del progress["settings"][name]
    (checkpoint / "training.json").write_text(json.dumps(progress))
    with pytest.raises(SystemExit, match="--stored-order is True, but .* has None"):
        stage1(*command(workplace, tmp_path / "run", "--stored-order", "--resume", steps=2))
    stage1(*command(workplace, tmp_path / "run", "--resume", steps=2))
    assert (tmp_path / "run" / "final").exists()


def test_stored_order_reaches_the_data(workplace, tmp_path):
    """Training documents as they stand in the corpus: the first step's loss is that of these
    tokens; held-out ones are shuffled as ever."""
    losses = {}
    for name, more in (("shuffled", ()), ("stored", ("--stored-order",))):
        stage1(*command(workplace, tmp_path / name, *more, steps=1))
        losses[name] = metrics(tmp_path / name)[0]
        stage1(*command(workplace, tmp_path / f"{name}-unchanged", "--learning-rate", 0, *more,
                        steps=1))
    held_out = [metrics(tmp_path / f"{name}-unchanged", "validation_loss") for name in losses]
    assert held_out[0] == held_out[1]
    tokenizer = data.load_tokenizer(workplace / "tokenizer")
    corpus = data.PackedDataset(workplace / "corpus", "train", 64, 0, tokenizer=tokenizer,
                                stored_order=True)
    model = Llama(read_config(workplace / "config.json")).initialise(0)
    batch = data.batch(corpus, 0, 2)
    total, targets = model.loss(batch.tokens, batch.targets)
    assert losses["stored"] == pytest.approx((total / targets).item(), rel=1e-6)
    assert losses["shuffled"] != losses["stored"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
# what published config.json files say, and the window their models have
WINDOWS = {
    "Llama 2": (
        {"max_position_embeddings": 4096},
        4096),
    "Llama 3.1": (
        {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        131072),
    "Llama 3.2": (
        {"max_position_embeddings": 131072, "rope_theta": 5e5,
         "rope_scaling": LLAMA3 | {"factor": 32.0}},
        131072),
    "Llama 3.3, transformers 5": (
        {"max_position_embeddings": 131072, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        131072),
    "DeepSeek-R1-Distill-Llama": (
        {"max_position_embeddings": 131072, "rope_theta": 5e5,
         "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        131072),
    "deepseek-coder": (
        {"max_position_embeddings": 16384, "rope_theta": 1e5,
         "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384),
    "Qwen2.5 with yarn": (
        {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6,
         "rope_scaling": {"type": "yarn", "factor": 4.0,
                          "original_max_position_embeddings": 32768}},
        131072),
    "yarn beside an extended window": (
        {"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", "factor": 8.0}},
        131072),
}


@pytest.fixture(scope="module")
def long_place(workplace, tmp_path_factory):
    """A model directory for each of WINDOWS, and for each rule that we export."""
    place = tmp_path_factory.mktemp("windows")
    config = json.loads((workplace / "config.json").read_text())
    for name, (changes, _) in WINDOWS.items():
        Llama(ModelConfig.from_hf(config | changes)).initialise(0).save_pretrained(place / name)
        written = json.loads((place / name / "config.json").read_text())
        del written["rope_scaling"], written["rope_theta"]
        (place / name / "config.json").write_text(json.dumps(written | changes))  # as published
    for kind in ("linear", "yarn", "ntk", "llama3"):
        scaling = RopeScaling(kind, 4.0, 4096)
        model = Llama.from_pretrained(place / "Llama 2", rope_scaling=scaling)
        model.save_pretrained(place / f"our {kind}")
    for model in place.iterdir():
        shutil.copy(workplace / "tokenizer" / "tokenizer.model", model)
    return place


@pytest.mark.parametrize("name, window", [
    *((name, window) for name, (_, window) in WINDOWS.items()),
    ("our linear", 16384),
    ("our yarn", 16384),
    ("our ntk", 16384),
    ("our llama3", 16384),
])
def test_training_without_rope_options_keeps_window_and_rule(name, window, long_place, workplace,
                                                             tmp_path, capsys):
    """Llama 3.1 stated 65,536 after a step of stage 2: its factor was taken for a ratio of windows.
    Twice: a rule that is read back from an export must not grow either."""
    given = long_place / name
    words = ["--steps", 1, "--batch-size", 1, "--device", "cpu", "--dtype", "float32",
             "--sequence-length", 64]
    stage1("--model", given, "--data", workplace / "corpus", "--validation-sequences", 0, *words,
           "--out", tmp_path / "1")
    stage2("--model", tmp_path / "1" / "final", "--data", workplace / "chat.jsonl", *words,
           "--out", tmp_path / "2")
    assert capsys.readouterr().out.count(f"window {window},") == 2
    before = read_config(given)
    frequencies, factor = inverse_frequencies(8, before.rope_theta, before.rope_scaling)
    for out in ("1", "2"):
        written = json.loads((tmp_path / out / "final" / "config.json").read_text())
        after = read_config(tmp_path / out / "final")
        assert before.max_position_embeddings == after.max_position_embeddings == window
        assert written["max_position_embeddings"] == window
        same, same_factor = inverse_frequencies(8, after.rope_theta, after.rope_scaling)
        assert torch.equal(same, frequencies)
        assert same_factor == factor


@pytest.mark.parametrize("name, length, said", [
    ("Llama 2", 8192, r"window of 4096; extend it \(train.py --rope-kind yarn --rope-factor 2\)"),
    ("Llama 3.1", 2**20,
     r"--rope-factor 128 --original-length 8192, which replaces the model's own llama3 rule\)"),
    ("deepseek-coder", 65536,
     r"--rope-factor 16 --original-length 4096, if that was its window before; .* replaces the "
     r"model's own linear"),
    ("yarn beside an extended window", 2**18,
     r"--rope-factor 16 --original-length 16384, if that was its window before"),
    ("our yarn", 32768,
     r"--rope-factor 8 --original-length 4096, which replaces the model's own yarn rule\)"),
])
def test_a_sequence_beyond_the_window_gets_a_hint_that_works(name, length, said, long_place,
                                                             workplace, tmp_path):
    words = ["--model", long_place / name, "--data", workplace / "corpus", "--steps", 1,
             "--sequence-length", length, "--device", "cpu", "--validation-sequences", 0,
             "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match=said) as stopped:
        stage1(*words)
    hint = re.search(r"train.py (--rope-kind [^,)]*)", str(stopped.value))[1]
    options = train.stage1_parser().parse_args([*map(str, words), *hint.split()])
    scaling = scaling_from_options(vars(options))
    extended = rescale(read_config(long_place / name), scaling)
    assert extended.max_position_embeddings >= length
    assert extended.rope_scaling.kind == "yarn"


@pytest.mark.parametrize("masked", [False, True])
def test_validation_is_the_mean_over_targets(tiny_model, masked):
    """Targets of -100 count nowhere. The second document begins with token 3."""
    class Fixed:
        sequence_length = 8
        document_mask = masked

        def sequence(self, index):
            tokens = torch.arange(9).numpy()
            return tokens, tokens >= 5, tokens >= 3

    def mean(first: int) -> float:
        """Loss of the last four targets, of a row that begins with this token."""
        tokens = torch.arange(first, 9)[None]
        return token_losses(model, tokens[:, :-1], tokens[:, 1:])[0, -4:].mean().item()

    model = tiny_model()
    assert mean(3) != pytest.approx(mean(0), rel=1e-4)
    expected = mean(3 if masked else 0)
    assert train.validate(model, Fixed(), sequences=1) == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_follows_a_cosine():
    schedule = {"steps": 110, "peak": 2.0, "warmup_steps": 10, "final_share": 0.1}
    for step in range(1, 11):
        assert train.learning_rate(step, **schedule) == pytest.approx(0.2 * step)
    for step in range(10, 111):
        cosine = math.cos(math.pi * (step - 10) / 100)
        expected = 0.2 + 1.8 * (1 + cosine) / 2
        assert train.learning_rate(step, **schedule) == pytest.approx(expected)
    only = train.learning_rate(1, steps=1, peak=2.0, warmup_steps=0, final_share=0.1)
    assert only == pytest.approx(0.2)


def test_a_failure_while_writing_final_loses_no_step(workplace, uninterrupted, tmp_path):
    """The last step has a checkpoint of its own, so a full disk or a kill during `final` costs the
    export only."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "final.partial").write_text("a file in the way")
    with pytest.raises(SystemExit, match="final.partial"):
        stage1(*command(workplace, out, "--resume"))
    assert not (out / "final").exists()
    (out / "final.partial").unlink()
    stage1(*command(workplace, out, "--resume"))
    assert metrics(out) == uninterrupted
    assert (out / "final" / "config.json").exists()


def test_resume_refuses_other_data_under_the_same_path(workplace, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text((workplace / "chat.jsonl").read_text())
    words = ["--config", workplace / "config.json", "--tokenizer", workplace / "tokenizer",
             "--data", file, "--sequence-length", 48, "--batch-size", 2, "--steps", 2,
             "--device", "cpu", "--out", tmp_path / "run"]
    stage2(*words)
    file.write_text(file.read_text().replace("What is 1?", "What is 2?"))
    with pytest.raises(SystemExit, match="the digest of --data's files is .* the run in .* has"):
        stage2(*words, "--resume")


def test_resume_refuses_another_model_and_takes_the_same_elsewhere(workplace, uninterrupted,
                                                                   tmp_path):
    shutil.copytree(workplace / "whole" / "final", tmp_path / "moved")
    Llama.from_pretrained(tmp_path / "moved").initialise(9).save_pretrained(tmp_path / "other")
    shutil.copy(workplace / "tokenizer" / "tokenizer.model", tmp_path / "other")
    words = ["--data", workplace / "corpus", "--sequence-length", 64, "--steps", 2,
             "--device", "cpu", "--validation-sequences", 0, "--out", tmp_path / "run", "--resume"]
    stage1("--model", workplace / "whole" / "final", *words)
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(SystemExit, match="the digest of --model's files is .* has"):
        stage1("--model", tmp_path / "other", *words)
    stage1("--model", tmp_path / "moved", *words)
    assert (tmp_path / "run" / "final").is_dir()


def test_a_resumed_run_needs_neither_its_base_model_nor_the_same_words(workplace, tmp_path,
                                                                      monkeypatch, capsys):
    """The base model deleted, the corpus moved and spelled otherwise: what counts is what is in
    them."""
    for name in ("corpus", "tokenizer"):
        shutil.copytree(workplace / name, tmp_path / name)
    stage1(*command(workplace, tmp_path / "base", steps=1))
    shutil.move(tmp_path / "base" / "final", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6}')
    monkeypatch.chdir(tmp_path)
    words = ["--sequence-length", 64, "--steps", 4, "--checkpoint-every", 2, "--rope-kind", "yarn",
             "--rope-factor", 4, "--device", "cpu", "--validation-sequences", 0]
    stage1("--model", "model", "--data", "corpus", *words, "--out", "run")
    expected = records("run")
    final = (tmp_path / "run" / "final" / "config.json").read_text()
    generation = (tmp_path / "run" / "final" / "generation_config.json").read_text()
    assert "0.6" in generation
    for place in ("run/final", "run/checkpoint-00000004", "model"):
        shutil.rmtree(tmp_path / place)
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere")
    stage1("--model", "model", "--data", f"{tmp_path}/./elsewhere/", *words, "--out", "run/",
           "--resume")
    assert "--model model is not there; the checkpoint has all that is needed" in (
        capsys.readouterr().out)
    assert records("run") == expected
    assert (tmp_path / "run" / "final" / "config.json").read_text() == final
    assert (tmp_path / "run" / "final" / "generation_config.json").read_text() == generation
    assert data.load_tokenizer("run/final").n_vocab > 256
    # later ones still know which model it was
    saved = json.loads((tmp_path / "run/checkpoint-00000004/training.json").read_text())
    assert saved["settings"]["model"] is not None
    with pytest.raises(SystemExit, match="model: no config.json there"):  # a new run needs it
        stage1("--model", "model", "--data", "elsewhere", *words, "--out", "new")
    assert not (tmp_path / "new").exists()


def train_until_told(arguments, begun, may_end):
    """A run whose steps wait."""
    torch.set_num_threads(1)
    step = train.training_step

    def waiting(*given):
        begun.set()
        may_end.wait()
        return step(*given)

    train.training_step = waiting
    train.main(arguments)


def test_two_runs_in_one_directory_are_one_too_many(workplace, tmp_path):
    """Of two seeds one's checkpoint stood beside the other's export. The lock ends with its
    process, however that ends."""
    out = tmp_path / "run"
    words = command(workplace, out, "--resume", steps=2)
    begun, may_end = fork_context().Event(), fork_context().Event()
    first = fork_context().Process(target=train_until_told, args=(words, begun, may_end))
    first.start()
    assert begun.wait(60)
    with pytest.raises(SystemExit, match=f"{out}/{train.LOCK}: another process is at work"):
        stage1(*words, "--seed", 1)
    first.kill()
    first.join()
    assert (out / train.LOCK).exists()
    stage1(*words)
    assert not (out / train.LOCK).exists()
    assert (out / "final" / "config.json").exists()


@pytest.mark.parametrize("name, launcher", [
    ("SLURM_NTASKS", "srun --ntasks-per-node 1 torchrun --nnodes N --nproc-per-node 8"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun --npernode 1 torchrun --nnodes N --nproc-per-node 8"),
])
def test_processes_that_do_not_know_each_other_are_refused(name, launcher, workplace, tmp_path,
                                                          monkeypatch):
    """srun -n 2 python train.py starts two runs, each of which takes itself for the only one."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match=f"{name} is 2 but RANK is not set: .*{launcher}"):
        stage1(*command(workplace, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")  # as under torchrun
    stage1(*command(workplace, tmp_path / "run", steps=1))
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(name, "1")
    Grid.create()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json",
                                  "special_tokens_map.json"])
@pytest.mark.parametrize("content", ['{"a": 1,}', "[]", '"x"', ""])
def test_what_a_save_needs_is_read_before_the_first_step(name, content, workplace, tmp_path,
                                                        monkeypatch):
    """A comma too many was met at the first save, after all steps."""
    source = tmp_path / "tokenizer"
    shutil.copytree(workplace / "tokenizer", source)
    (source / name).write_text(content)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit, match=f"^error: {source}/{name}: "):
        stage1(*command(workplace, tmp_path / "run", steps=1), "--tokenizer", source)
    assert not (tmp_path / "run").exists()


def test_a_save_needs_nothing_of_its_source(workplace, tmp_path, monkeypatch):
    """Moved or edited while the run is on."""
    source = tmp_path / "tokenizer"
    shutil.copytree(workplace / "tokenizer", source)
    (source / "tokenizer_config.json").write_text("{}")
    step = train.training_step

    def removing(*given):
        shutil.rmtree(source, ignore_errors=True)
        return step(*given)

    monkeypatch.setattr(train, "training_step", removing)
    stage1(*command(workplace, tmp_path / "run", steps=1), "--tokenizer", source)
    assert (tmp_path / "run" / "final" / "tokenizer.model").is_file()
    assert (tmp_path / "run" / "final" / "tokenizer_config.json").is_file()


def test_the_tokenizer_that_was_given_is_exported_alone(workplace, tmp_path):
    """A file: not the other one beside it, which every later program would read first. The model's
    generation_config.json goes along whichever tokenizer it is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    hugging_face_tokenizer("llama3", folder)
    tokenizer = data.load_tokenizer(folder)
    shutil.copy(workplace / "tokenizer" / "tokenizer.model", folder)
    prepare_corpus([("code", workplace / "text.jsonl")], tokenizer, tmp_path / "corpus",
                   holdout_window=0)
    config = ModelConfig.from_hf(json.loads((workplace / "config.json").read_text())
                                 | {"vocab_size": 512})
    Llama(config).initialise(0).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6}')
    stage1("--model", tmp_path / "model", "--tokenizer", folder / "tokenizer.json", "--data",
           tmp_path / "corpus", "--steps", 1, "--sequence-length", 64, "--validation-sequences", 0,
           "--device", "cpu", "--out", tmp_path / "run")
    final = tmp_path / "run" / "final"
    assert not (final / "tokenizer.model").exists()
    assert data.fingerprint(data.load_tokenizer(final)) == data.fingerprint(tokenizer)
    written = json.loads((final / "generation_config.json").read_text())
    assert written == {"temperature": 0.6, "eos_token_id": data.stop_tokens(tokenizer, None)}


def test_limits_of_the_old_window_are_not_exported(workplace, tmp_path):
    """transformers' generate refused 3,000 tokens in a window of 16K, its tokenizer cut 7,201 ids
    to 2,048 without a word. A byte-order mark is read, and not written."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "tokenizer"
    source.mkdir()
    library = hugging_face_tokenizer("llama3", source)
    library.enable_truncation(8)
    library.enable_padding(length=8)
    library.save(str(source / "tokenizer.json"))
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    (source / "tokenizer_config.json").write_text(mark + json.dumps({
        "model_max_length": 8, "max_length": 8, "max_len": 8,
        "auto_map": {"AutoTokenizer": ["a.B", None]},
        "tokenizer_class": "PreTrainedTokenizerFast"}))
    (source / "generation_config.json").write_text(mark + '{"max_length": 8, "temperature": 0.6}')
    config = json.loads((workplace / "config.json").read_text()) | {"vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = data.load_tokenizer(source)
    prepare_corpus([("code", workplace / "text.jsonl")], tokenizer, tmp_path / "corpus",
                   holdout_window=0)
    stage1("--config", tmp_path / "config.json", "--tokenizer", source, "--data",
           tmp_path / "corpus", "--steps", 1, "--sequence-length", 128, "--validation-sequences", 0,
           "--rope-kind", "yarn", "--rope-factor", 4, "--device", "cpu", "--out", tmp_path / "run")
    final = tmp_path / "run" / "final"
    text = "the cat sat on the mat; " * 40
    ids = tokenizer.encode_ordinary(text)
    assert len(ids) > 40
    assert tokenizers.Tokenizer.from_file(str(final / "tokenizer.json")).encode(text).ids == ids
    theirs = transformers.AutoTokenizer.from_pretrained(final)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.model_max_length == 256
    written = {file.name: json.loads(file.read_text()) for file in final.glob("*_config.json")}
    assert written == {
        "tokenizer_config.json": {"model_max_length": 256,
                                  "tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {"temperature": 0.6, "eos_token_id": data.stop_tokens(
            tokenizer, None)},
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(final)
    assert model.generation_config.max_length in (None, 20)  # the default: left out


@pytest.mark.parametrize("scaling, said", [
    (RopeScaling(), ""),
    (RopeScaling("linear", 4.0), ""),
    (RopeScaling("yarn", 4.0, 64, beta_fast=32.0), ""),
    (RopeScaling("yarn", 4.0, 64, beta_fast=32.0, beta_slow=2.0),
     "; llama.cpp needs --yarn-beta-fast 32 --yarn-beta-slow 2"),
    (RopeScaling("yarn", 4.0, 64), "; llama.cpp needs --yarn-beta-fast 4 --yarn-beta-slow 1"),
])
def test_what_other_programs_must_be_told_stands_beside_what_was_written(scaling, said):
    assert train.serving_note(scaling) == said


def test_padding_is_not_computed(tiny_model):
    """Rows are cut after the last target of their micro-batch: the same loss and gradients from
    fewer positions."""
    tokens = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    for row, length in enumerate((5, 9, 3, 1)):
        targets[row, length:] = -100
    targets[3] = -100
    batch = data.Batch(tokens, targets)
    losses = []
    gradients = []
    for micro, cut in ((4, 4 * 9), (2, 2 * 9 + 2 * 3), (1, 5 + 9 + 3 + 1)):
        model = tiny_model(torch.float64)
        optimizer = ShardedAdamW(model, Grid())
        loss, positions = train.training_step(model, optimizer, batch, micro)
        losses.append(loss)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert positions == cut
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)


def test_export_states_window_and_stop_tokens_for_servers(workplace, tmp_path):
    """A tokenizer file of any name is exported under the one loaders look for; the JSON files
    follow the new model."""
    source = tmp_path / "tokenizer"
    shutil.copytree(workplace / "tokenizer", source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"model_max_length": 8, "chat_template": "kept"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    renamed = tmp_path / "mine.tiktoken"
    shutil.copyfile(source / "tokenizer.model", renamed)
    tokenizer = data.load_tokenizer(source)
    for name, path in (("whole", source), ("renamed", renamed)):
        stage1("--config", workplace / "config.json", "--tokenizer", path,
               "--data", workplace / "corpus", "--steps", 1, "--sequence-length", 32,
               "--validation-sequences", 0, "--device", "cpu", "--out", tmp_path / name)
        final = tmp_path / name / "final"
        stops = json.loads((final / "config.json").read_text())["eos_token_id"]
        expected = [tokenizer.encode_single_token("<|end_of_text|>"),
                    tokenizer.encode_single_token("<|eot_id|>")]
        assert stops == sorted(expected)
        assert data.load_tokenizer(final).n_vocab == tokenizer.n_vocab
    # under its new name, too, a checkpoint is resumed
    shutil.rmtree(tmp_path / "renamed" / "final")
    stage1("--config", workplace / "config.json", "--tokenizer", renamed, "--data",
           workplace / "corpus", "--steps", 1, "--sequence-length", 32, "--validation-sequences", 0,
           "--device", "cpu", "--out", tmp_path / "renamed", "--resume")
    final = tmp_path / "whole" / "final"
    assert (final / "chat_template.jinja").read_text() == "{{ messages }}"
    written = json.loads((final / "tokenizer_config.json").read_text())
    assert written == {"model_max_length": 64, "chat_template": "kept"}
    written = json.loads((final / "generation_config.json").read_text())
    assert written == {"eos_token_id": stops}


@pytest.mark.parametrize("device, world, there", [
    ("cpu", 1, True),
    ("cuda", 1, True),
    ("cuda:1", 1, True),
    ("cuda:2", 1, False),
    ("cuda:x", 1, False),
    ("cuda:1", 2, False),  # each of several processes takes a GPU of its own
])
def test_a_device_must_be_there(monkeypatch, device, world, there):
    """On a machine of two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    assert train.is_here(device) == there


@pytest.mark.parametrize("chunk, kernel, said", [
    (512, "cudnn", "attention by cudnn (the faster one here)"),
    (None, "flash", "attention by flash (not cudnn: samples, prompts, documents have any length)"),
])
def test_the_kernel_of_a_run_is_tried_and_told(tiny_model, capsys, chunk, kernel, said):
    """A run on a Hopper, without one: what is chosen, what has run, what is said."""
    config = tiny_model(torch.bfloat16).config
    options = argparse.Namespace(attention="auto", device="cuda:0", dtype=None)
    grid = Grid()
    with fake_cuda() as meter:
        choose_attention(options, grid, config, chunk)
    assert grid.kernel == kernel
    assert meter.kernels == {kernel}
    assert capsys.readouterr().out == said + "\n"


@pytest.mark.parametrize("asked, said", [
    ("auto", "attention by cudnn does not run here: No plan; use --attention flash"),
    ("flash", "attention by flash does not run here: No plan; use --device cpu"),
    ("fa3", "attention by fa3 does not run here: .*flash_attn_interface.*; install "
            "FlashAttention-3 .* or use --attention auto"),
    ("full", "--device cuda:0: its memory is full before anything is loaded; end what else runs"),
])
def test_a_kernel_that_this_machine_lacks_is_refused(tiny_model, monkeypatch, asked, said):
    """Of capability 9.0, but without cuDNN's kernel, flash's, FlashAttention-3's package, or any
    memory."""
    def refuse(*arguments):
        raise RuntimeError("No plan\nto be found")

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    config = tiny_model(torch.bfloat16).config
    options = argparse.Namespace(attention=asked, device="cuda:0", dtype=None)
    if asked == "full":
        options.attention = "auto"
        monkeypatch.setattr(train, "block_forward", run_out)
    elif asked != "fa3":  # which is refused before it computes
        monkeypatch.setattr(train, "block_forward", refuse)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with fake_cuda(), pytest.raises(ValueError, match=said):
        choose_attention(options, Grid(), config, chunk=512)
