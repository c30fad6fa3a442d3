"""The commands on several processes: models, checkpoints across grids, evaluation, ranks that die
or hang, wrong grids."""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, Job, launch, results, torchrun

import eval_niah
import sft
import train
from model import Llama, ModelConfig, read_config
from parallel import Grid, zigzag_positions
from tools import answer
from tools.prepare import prepare_corpus
from tools.train_tokenizer import train_bpe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, a corpus, a haystack, a config and a model directory."""
    place = tmp_path_factory.mktemp("work")
    texts = []
    for i in range(120):
        texts.append(f"def function_{i}(value):\n    return value * {i} + {i * i}\n" * (1 + i % 7))
    tokenizer = train_bpe(texts, 272, place / "tokenizer")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus([("code", place / "text.jsonl")], tokenizer, place / "corpus", holdout_window=0)
    lines = [f"The hill of {word} is green in every month." for word in "abcdefghij" * 30]
    (place / "haystack.txt").write_text("\n".join(lines))
    # a vocabulary that 4 ranks can share
    config = CONFIG | {"vocab_size": math.ceil(tokenizer.n_vocab / 4) * 4}
    (place / "config.json").write_text(json.dumps(config))
    model = Llama(ModelConfig.from_hf(config)).initialise(0)
    model.save_pretrained(place / "model", max_shard_bytes=20_000)
    shutil.copyfile(place / "tokenizer" / "tokenizer.model", place / "model" / "tokenizer.model")
    return place


def options(place: Path, out: Path, *more) -> list[str]:
    return ["--config", place / "config.json", "--tokenizer", place / "tokenizer",
            "--data", place / "corpus", "--device", "cpu", "--dtype", "float32",
            "--sequence-length", 64, "--batch-size", 4, "--learning-rate", "1e-3", "--out", out,
            "--validation-sequences", 3, *more]


def records(out: Path, key: str = "loss") -> list:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def files(directory: Path) -> dict[str, bytes]:
    """What is in its files, by name."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in paths}


@pytest.mark.parametrize("processes, grids", [(4, ["4,1", "2,2", "1,4", "2,1"]), (3, ["1,3"])])
def test_model_on_a_grid_computes_generates_and_saves_what_one_process_does(
        place, tmp_path, processes, grids):
    """A shard of the wrong dimension, a cache with padding in it, a decode merged by the wrong
    weights, a rank that draws alone."""
    found = results(processes, "models.py", place / "model", tmp_path, *grids)
    written = files(place / "model")
    del written["tokenizer.model"]
    assert len(written) > 5
    for grid in grids:
        case = found[grid]
        tp = int(grid[0])
        for name in ("logits", "token_losses", "loss", "hidden_at", "continued"):
            assert case[name] < 1e-3, name  # logits reach 40
        assert case["greedy"] == found["alone"]["greedy"]
        assert case["sampled"] == found["alone"]["sampled"]
        assert case["agreed"]
        ranks = tp * int(grid[2])
        # a rank's share of q; S / cp x hidden would be larger, say
        assert case["largest"] <= 1092 * 64 // ranks
        assert files(tmp_path / grid) == written
        assert case["cut"] * tp + case["held"] - case["cut"] == case["whole"]
        assert case["held"] - case["cut"] == 5 * 32  # the norms of two layers and the last one


@pytest.fixture(scope="module")
def four_ranks(place):
    """Six steps on tp 2 x cp 2, with a checkpoint after the third: the command itself, ranks with
    hash seeds of their own."""
    done = torchrun(4, "train.py",
                    *options(place, place / "four", "--tp", 2, "--cp", 2, "--steps", 6,
                             "--checkpoint-every", 3))
    assert done.returncode == 0, done.stderr
    return place / "four"


@pytest.mark.parametrize("processes, tp, cp, micro", [
    (4, 2, 2, 4),
    (1, 1, 1, 2),
    (4, 1, 2, 1),
    (4, 4, 1, 4),
])
def test_checkpoint_of_one_grid_continues_on_every_other(
        place, four_ranks, tmp_path, processes, tp, cp, micro):
    """Same grid: every file equal to the last bit. Another: the next losses to 1e-6."""
    out = tmp_path / "run"
    shutil.copytree(four_ranks, out, ignore=shutil.ignore_patterns("final", "checkpoint-00000006"))
    done = launch(processes, "train.py",
                  *options(place, out, "--tp", tp, "--cp", cp, "--micro-batch-size", micro,
                           "--steps", 6, "--checkpoint-every", 3, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stdout, done.stderr
    if (tp, cp) == (2, 2):
        assert records(out) == records(four_ranks)
        assert files(out / "final") == files(four_ranks / "final")
        state = "checkpoint-00000006/optimizer"
        assert files(out / state) == files(four_ranks / state)
    for key, tolerance in (("loss", 1e-6), ("gradient_norm", 1e-5), ("validation_loss", 1e-6)):
        expected = records(four_ranks, key)
        assert records(out, key) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("tp, cp", [(2, 1), (1, 2), (1, 4)])
def test_cross_document_mask_on_several_ranks(place, tmp_path, tp, cp):
    """Documents of 40 to 400 tokens in rows of 64 and chunks of 8, two micro-batches; and what a
    run without the mask learns is something else."""
    more = ("--steps", 3, "--micro-batch-size", 1)
    masked = (*more, "--cross-document-mask", "--recompute", "mlp")
    train.main(list(map(str, options(place, tmp_path / "one", *masked))))
    done = launch(4, "train.py",
                  *options(place, tmp_path / "four", *masked, "--tp", tp, "--cp", cp))
    assert done.returncode == 0, done.stderr
    assert f"dp {4 // (tp * cp)} x cp {cp} x tp {tp}" in done.stdout, done.stderr
    train.main(list(map(str, options(place, tmp_path / "unmasked", *more))))
    for key in ("loss", "validation_loss"):
        expected = records(tmp_path / "one", key)
        assert records(tmp_path / "four", key) == pytest.approx(expected, rel=1e-6)
        assert records(tmp_path / "unmasked", key) != pytest.approx(expected, rel=1e-4)


def test_needle_evaluation_gives_identical_answers_on_1_2_and_4_ranks(place, tmp_path):
    """Prompts of lengths that no grid divides, a number of prompts that two replicas do not share
    evenly."""
    arguments = [place / "model", "--haystack", place / "haystack.txt", "--lengths", 151, 250,
                 "--depths", 3, "--samples", 1, "--task", "mixed", "--device", "cpu"]
    eval_niah.main([*map(str, arguments), "--out", str(tmp_path / "1.json")])
    expected = json.loads((tmp_path / "1.json").read_text())
    given = {prompt["given"] for cell in expected["cells"] for prompt in cell["prompts"]}
    assert len(given) > 2
    for processes, grid in ((2, ("--cp", 2)), (4, ("--cp", 2, "--tp", 2)), (4, ("--tp", 2))):
        done = launch(processes, "eval_niah.py", *arguments, *grid, "--out", tmp_path / "many.json")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "many.json").read_text())
        assert found["cells"] == expected["cells"]
        assert found["means"] == expected["means"]


def test_questions_get_identical_answers_on_several_ranks(place, tmp_path):
    """Answers that only one replica knows, more rounds for one than for the other."""
    text = (place / "haystack.txt").read_text()
    questions = tmp_path / "questions.jsonl"
    starts = [text[:400], text[:400], text[:300], text[7:90], text[:400]]
    lines = []
    for i, start in enumerate(starts):
        question = {"prompt": f"{start} {i}", "answers": ["e"], "max_new_tokens": 9}
        lines.append(json.dumps(question))
    questions.write_text("\n".join(lines))
    arguments = [place / "model", "--jsonl", questions, "--max-length", 2000, "--batch-tokens", 1,
                 "--device", "cpu"]
    answer.main([*map(str, arguments), "--out", str(tmp_path / "1.jsonl")])
    done = launch(2, "-m", "tools.answer", *arguments, "--out", tmp_path / "2.jsonl")
    assert done.returncode == 0, done.stderr

    def answers(file):
        lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        return sorted(lines, key=lambda line: line["index"])

    one = answers(tmp_path / "1.jsonl")
    assert one == answers(tmp_path / "2.jsonl")
    assert len(one) == 5
    assert len({answer["prediction"] for answer in one}) > 1


def test_chat_is_the_same_on_several_processes(place):
    """One answer, printed once."""
    arguments = ("-m", "tools.chat", place / "model", "--raw", "--prompt", "def function_3(value):",
                 "--max-new-tokens", 20, "--device", "cpu")
    one = launch(1, *arguments)
    four = launch(4, *arguments, "--cp", 4)
    assert one.returncode == four.returncode == 0, four.stderr
    assert one.stdout == four.stdout != "\n"


# ------------------------------------------------------------------------- ranks that die or hang


def training(place: Path, out: Path, *more) -> list:
    """Words for a job of three ranks that lasts."""
    return ["train.py", *options(place, out, "--cp", 3, "--sequence-length", 48, *more)]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def said_where(job: Job, ranks: tuple[int, ...]) -> bool:
    """Whether each of these ranks of the first attempt has printed a traceback through train()."""
    files = [next(job.logs.glob(f"*/attempt_0/{rank}/stderr.log")) for rank in ranks]
    return all(re.search(r"line \d+,? in train\n", file.read_text()) for file in files)


def test_after_a_killed_rank_the_others_say_where_they_were_and_a_restart_goes_on(place, tmp_path):
    """From the last checkpoint. Which rank was killed, torchrun says."""
    more = ("--steps", 30, "--checkpoint-every", 10, "--resume")
    with Job(3, *training(place, tmp_path / "run", *more), logs=tmp_path / "logs",
             restarts=1) as job:
        wait_for((tmp_path / "run" / "checkpoint-00000010").is_dir)
        os.kill(job.process(2), signal.SIGKILL)
        done = job.result(60)
    assert done.returncode == 0, done.stderr
    assert said_where(job, (0, 1)), done.stderr
    whole = launch(3, *training(place, tmp_path / "whole", *more))
    assert whole.returncode == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize("work", ["signals_received()", "nullcontext()"])  # in training, elsewhere
def test_a_rank_tells_its_error_though_torchrun_terminates_it_meanwhile(work):
    """Another rank's end is this one's error and torchrun's reason for a SIGTERM, at the same
    time."""
    script = f"""
import os, signal, sys
from contextlib import nullcontext
from parallel import one_line_errors
from train import signals_received

def tell(*error):
    os.kill(os.getpid(), signal.SIGTERM)
    sys.__excepthook__(*error)

sys.excepthook = tell
with one_line_errors(), {work}:
    raise RuntimeError("the peer is gone")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT,
                          env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"}, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1, done
    assert "RuntimeError: the peer is gone" in done.stderr, done


def test_a_stopped_rank_ends_the_job_and_the_others_say_where_they_waited(place, tmp_path):
    words = training(place, tmp_path / "run", "--steps", 100_000, "--checkpoint-every", 5,
                     "--timeout", 5)
    with Job(3, *words, logs=tmp_path / "logs") as job:
        wait_for((tmp_path / "run" / "checkpoint-00000005").is_dir)
        os.kill(job.process(1), signal.SIGSTOP)
        wait_for(lambda: "".join(job.printed("stderr")).count("Timeout (0:00:05)!") == 2, 20)
        os.kill(job.process(1), signal.SIGCONT)  # torchrun would kill it after 30 s
        done = job.result(60)
    assert done.returncode != 0, done.stderr
    assert said_where(job, (0, 2)), done.stderr
    assert train.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("what, ranks, places", [
    ("sleeps", 3, ("in rank_1_sleeps", "in barrier")),
    ("deadlock", 3, ("in deadlock",)),
])
def test_ranks_that_hang_end_the_job_and_each_says_where_it_stood(what, ranks, places):
    began = time.monotonic()
    done = launch(3, ROOT / "tests" / "distributed" / "hangs.py", what)
    assert done.returncode != 0
    assert time.monotonic() - began < 55
    assert done.stderr.count("(most recent call first):") == ranks, done.stderr
    for place in places:
        assert place in done.stderr, done.stderr


def test_a_rank_at_work_is_not_taken_for_one_that_hangs():
    done = launch(3, ROOT / "tests" / "distributed" / "hangs.py", "works")
    assert done.returncode == 0, done.stderr
    assert "most recent call" not in done.stderr, done.stderr


@pytest.mark.parametrize("how", ["ends", "destroys"])
def test_programs_that_end_without_close_end_well(how):
    """Threads at work when the interpreter ended, ours and then gloo's, aborted one in two, later
    one in ten."""
    done = torchrun(2, ROOT / "tests" / "distributed" / "hangs.py", how)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(place, tmp_path):
    """Ranks receive a signal at different moments: one that stopped a step early would hang the
    others."""
    with Job(3, *training(place, tmp_path / "run", "--steps", 100_000, "--checkpoint-every", 5),
             logs=tmp_path / "logs") as job:
        wait_for((tmp_path / "run" / "checkpoint-00000005").is_dir)
        os.kill(job.process(1), signal.SIGTERM)
        done = job.result(60)
    assert done.returncode == 0, done.stderr
    step = int(re.search(r"stopped by a signal after step (\d+)", done.stdout)[1])
    assert train.checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step:08d}"
    assert len(records(tmp_path / "run")) == step


def test_a_restart_does_not_touch_a_directory_of_another_run(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    done = torchrun(2, "--max-restarts", 1, "train.py",
                    *options(place, tmp_path / "run", "--steps", 2))
    assert done.returncode != 0, done.stderr
    assert done.stderr.count("holds an earlier run") == 2, done.stderr
    assert files(tmp_path / "run") == {"metrics.jsonl": b'{"step": 1, "loss": 5.0}\n'}


def test_ranks_that_find_different_checkpoints_refuse_to_train(place, four_ranks, tmp_path):
    """Another machine with an older copy of the run: its ranks would train other weights, and
    nobody would see it."""
    out = tmp_path / "run"
    shutil.copytree(four_ranks, out, ignore=shutil.ignore_patterns("final"))
    shutil.copytree(four_ranks, tmp_path / "run.1",
                    ignore=shutil.ignore_patterns("final", "checkpoint-00000006"))
    done = launch(2, ROOT / "tests" / "distributed" / "stale.py",
                  *options(place, out, "--steps", 6, "--resume"))
    assert done.returncode != 0, done.stderr
    said = re.findall("error: .*the ranks have found different checkpoints in .*;", done.stderr)
    assert said == re.findall("error: .*?;", done.stderr)  # and nothing else


def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(place, four_ranks, tmp_path):
    """The first rank alone meets it; the others must not hang or hide the cause."""
    out = tmp_path / "run"
    shutil.copytree(four_ranks, out, ignore=shutil.ignore_patterns("final", "checkpoint-00000006"))
    words = ["--standalone", "--nproc-per-node", 2, "train.py",
             *options(place, out, "--steps", 6, "--cp", 2, "--resume")]
    ends = "ulimit -f 40; exec \"$@\""  # no file over 40 KiB, as on a disk that is full
    command = ["bash", "-c", ends, "bash", sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode != 0, done.stderr
    assert re.findall("error: .*", done.stderr)[0].startswith(f"error: {out}"), done.stderr
    assert "safetensors: could not be written" in done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in train.checkpoints(out)] == ["checkpoint-00000003"]
    assert not list(out.glob("*.partial"))


def test_usage_errors_are_one_line_however_many_ranks_there_are(place):
    done = launch(3, "train.py", "--frobnicate")
    assert done.returncode != 0, done.stderr
    assert re.findall("error: .*", done.stderr)[0].startswith("error: "), done.stderr
    assert done.stderr.count("required: --steps") == 1
    done = launch(3, "eval_niah.py", "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage: ") == 1


@pytest.mark.parametrize("dtype, tolerance, tp, cp, pack", [
    ("float32", 1e-6, 2, 1, ()),
    ("bfloat16", 3e-3, 1, 2, ()),
    ("float32", 1e-6, 1, 2, ("--pack",)),
    ("float32", 1e-6, 2, 2, ("--pack",)),
    ("bfloat16", 3e-3, 1, 4, ("--pack",)),
])
def test_chat_tuning_on_several_ranks_gives_one_process_losses(
        place, tmp_path, dtype, tolerance, tp, cp, pack):
    """Rows cut at their last target, of other lengths in each replica; in bfloat16 what is summed
    must be float32."""
    lines = []
    for i in range(24):
        question = {"role": "user", "content": f"What is {i} {'and again ' * (i % 5)}?"}
        answer = {"role": "assistant", "content": f"It is {i}." * (1 + i % 3)}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    arguments = ["--model", place / "model", "--data", tmp_path / "chat.jsonl",
                 "--sequence-length", 96, "--batch-size", 6, "--steps", 4,
                 "--learning-rate", "1e-3", "--warmup-steps", 0, "--dtype", dtype,
                 "--device", "cpu", *pack]
    sft.main([*map(str, arguments), "--out", str(tmp_path / "one")])
    done = launch(4, "sft.py", *arguments, "--out", tmp_path / "four", "--tp", tp, "--cp", cp)
    assert done.returncode == 0, done.stderr
    assert f"dp {4 // (tp * cp)} x cp {cp} x tp {tp}" in done.stdout, done.stderr
    assert records(tmp_path / "four") == pytest.approx(records(tmp_path / "one"), rel=tolerance)
    norms = records(tmp_path / "four", "gradient_norm")
    expected = records(tmp_path / "one", "gradient_norm")
    assert norms == pytest.approx(expected, rel=10 * tolerance)


def test_a_wrong_grid_is_one_line_and_leaves_nothing(place, tmp_path):
    done = launch(4, "train.py",
                  *options(place, tmp_path / "run", "--steps", 1, "--tp", 2, "--cp", 2,
                           "--sequence-length", 60))
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    assert re.findall("error: .*", done.stderr) == [
        "error: --sequence-length 60 is not a multiple of 8 (2 x cp x tp); 56 is"]


@pytest.mark.parametrize("tp, cp, world, message", [
    (0, 1, 1, "--tp 0 x --cp 1"),
    (1, -1, 1, "--tp 1 x --cp -1"),
    (2, 1, 1, "--tp 2 x --cp 1 must divide the number of processes, 1; "
     "change them or start 2 or a multiple"),
    (2, 3, 8, "--tp 2 x --cp 3 must divide the number of processes, 8; "
     "change them or start 6 or a multiple"),
])
def test_grids_that_do_not_fit_the_processes_are_refused(tp, cp, world, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid.create(tp, cp)


@pytest.mark.parametrize("tp, sizes, message", [
    (4, {"num_key_value_heads": 6}, "--tp 4 does not divide the model's num_key_value_heads, 6"),
    (2, {"vocab_size": 49155}, "--tp 2 does not divide the model's vocab_size, 49155"),
])
def test_models_that_tp_cannot_cut_are_refused(tp, sizes, message):
    config = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 96,
              "num_hidden_layers": 1, "num_attention_heads": 12}
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama(ModelConfig.from_hf(config | sizes), Grid(tp=tp))


@pytest.mark.parametrize("grid, words, message", [
    (Grid(tp=2, cp=2), ["--sequence-length", 60],
     "--sequence-length 60 is not a multiple of 8 (2 x cp x tp); 56 is"),
    (Grid(cp=3), ["--sequence-length", 131072],  # and whole chunks for cuDNN, if it is that long
     "--sequence-length 131072 is not a multiple of 6 (2 x cp x tp); 130560 is"),
    (Grid(dp=2), ["--batch-size", 3],
     "--batch-size 3 is not a multiple of the 2 data-parallel replicas; 2 is"),
    (Grid(dp=8), ["--batch-size", 1],
     "--batch-size 1 is not a multiple of the 8 data-parallel replicas; 8 is"),
    (Grid(dp=2), ["--batch-size", 8, "--micro-batch-size", 3],
     "--micro-batch-size 3 does not divide a replica's share of --batch-size, 4"),
    (Grid(), ["--offload"], "--offload moves what recomputed blocks keep"),
])
def test_runs_that_a_grid_cannot_train_are_refused(grid, words, message, place):
    words = ["--config", place / "config.json", "--sequence-length", 64, *words]
    options = train.stage1_parser(planned=True).parse_args([str(word) for word in words])
    with pytest.raises(ValueError, match=re.escape(message)):
        train.check_run(options, grid, read_config(place / "config.json"))


def test_grid_coordinates_have_tp_fastest():
    coordinates = itertools.product(range(2), range(3), range(2))
    for rank, expected in enumerate(coordinates):
        grid = Grid(dp=2, cp=3, tp=2, rank=rank)
        assert (grid.dp_rank, grid.cp_rank, grid.tp_rank) == expected
    assert rank == 11
    assert grid.size("dp_cp") == 6
    assert grid.size("all") == 12
    assert grid.sequence_multiple == 12


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_zigzag_shards_hold_every_position_once_and_equal_work(cp):
    positions = [zigzag_positions(24, Grid(cp=cp, rank=rank)) for rank in range(cp)]
    assert torch.cat(positions).sort()[0].equal(torch.arange(24))
    keys = {int((own + 1).sum()) for own in positions}  # that a rank's queries see
    assert len(keys) == 1
    half = 12 // cp
    assert positions[0].tolist() == [*range(half), *range(24 - half, 24)]
