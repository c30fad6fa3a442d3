"""The recipes of runs/: their plans fit, mistakes get one line, and every option they give
exists."""
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import eval_niah
import sft
import train
from parallel import Grid
from tools import plan, ruler
from tools.variants import EXPERIMENTS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "runs").iterdir()
                 if path.suffix in (".sh", ".slurm"))
# of runs/ultralong.sh: window, sequences a step, steps
PRESETS = {
    "1m": (2**20, 2, 480),
    "2m": (2**21, 4, 140),
    "4m": (2**22, 2, 150),
    "llama32_1b": (2**19, 2, 96),
}
LARGE = ("1m", "2m", "4m")  # of Llama 3.1 8B
RECIPES = {preset: ["runs/ultralong.sh", preset] for preset in PRESETS}
RECIPES["smollm2"] = ["runs/smollm2_128k.sh"]
ARGUMENTS = dict.fromkeys(PRESETS, ["model", "text", "chat", "out"])
ARGUMENTS["smollm2"] = ["model", "chat/train.jsonl", "out"]

# Stands for python, torchrun, srun and scontrol: writes its arguments down and makes what the
# scripts look for.
STUB = r"""#!PYTHON -SE
import json, os, sys
name = os.path.basename(sys.argv[0])
arguments = sys.argv[1:]
if name == "scontrol":
    print("node1\nnode2")
    raise SystemExit
if arguments == ["--help"]:
    print(os.environ["HELP"])
    raise SystemExit
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, *arguments]) + "\n")
programs = [text for text in arguments if text.startswith("tools.") or text.endswith(".py")]
program = programs[0] if programs else None
if "--figure" in arguments:
    open(arguments[arguments.index("--figure") + 1], "a").close()
if program and "--out" in arguments:
    out = arguments[arguments.index("--out") + 1]
    if os.environ.get("STOPPED") == program:  # as if by SIGTERM: exit code 0, but no `final`
        os.makedirs(out, exist_ok=True)
        raise SystemExit
    files = {
        "tools.train_tokenizer": "tokenizer.model",
        "tools.prepare": "meta.json",
        "tools.chat_blend": "train.jsonl",
        "tools.experiment": "runs.jsonl",
    }
    if program in ("train.py", "sft.py"):
        os.makedirs(os.path.join(out, "final"), exist_ok=True)
    elif program in files:
        os.makedirs(out, exist_ok=True)
        open(os.path.join(out, files[program]), "w").close()
    else:
        open(out, "a").close()
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what the recipes read from it."""
    ours = {"GPU", "GPUS", "TP", "CP", "MEMORY", "LAUNCH", "WAIT", "SAMPLES", "NPROC", "BATCH",
            "ROWS", "LR1", "LR2", "DTYPE", "SEEDS", "SIZE"}
    return {name: value for name, value in os.environ.items() if name not in ours} | changes


def tree(folder: Path, programs: dict[str, str]) -> Path:
    """A repository in `folder`: the real scripts, and a .venv of these programs that setup.sh finds
    up to date."""
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "tools"]:
        (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    wanted = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")]
    (folder / ".venv" / "installed.txt").write_text("".join(wanted))
    for name, text in programs.items():
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    for name in ("model", "text", "chat"):
        (folder / name).mkdir()
    for name in ("model/config.json", "chat/train.jsonl", "chat/valid.jsonl"):
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A tree whose python is this one."""
    python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    return tree(tmp_path_factory.mktemp("planned"), {"python": python})


def bash(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], cwd=folder, env=environment(**variables),
                          capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess, words: str) -> None:
    """One line of error, exit code 1."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    result = subprocess.run(["bash", "-n", ROOT / "runs" / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_plan_is_printed(planned):
    result = bash(planned, *RECIPES["1m"], "--plan")
    assert result.returncode == 0, result.stderr
    assert "2 x 1,048,576 tokens a step; dp 1 x cp 1 x tp 8 = 8 x H100-80" in result.stdout
    assert "128 x 8,192 tokens a step" in result.stdout
    assert result.stdout.count("of 76.0: fits") == 2
    assert "beyond the model's window" not in result.stdout  # stage 1 extends it
    assert "a micro-batch takes" not in result.stdout


def test_plan_that_does_not_fit_stops_everything(planned):
    variables = {"MEMORY": "--recompute none", "GPU": "A100-80"}
    refused(bash(planned, *RECIPES["4m"], "--plan", **variables), "do not fit")
    shutil.copy(ROOT / "runs" / "llama31_8b.json", planned / "model" / "config.json")
    refused(bash(planned, *RECIPES["4m"], *ARGUMENTS["4m"], **variables), "do not fit")
    assert not (planned / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_arguments(planned, recipe):
    """Missing or wrong: one line, before anything runs."""
    script = RECIPES[recipe]
    good = ARGUMENTS[recipe]
    refused(bash(planned, *script), "usage: bash runs/")
    refused(bash(planned, *script, *good[:-1]), "usage: bash runs/")
    refused(bash(planned, *script, "--plan", "more"), "usage: bash runs/")
    refused(bash(planned, *script, "--plan", "16384", "2", "1"), "usage: bash runs/")
    refused(bash(planned, *script, *good, *["1"] * 4), "usage: bash runs/")
    for place in range(len(good) - 1):
        refused(bash(planned, *script, *good[:place], "nowhere", *good[place + 1:]), "nowhere: no ")
    refused(bash(planned, *script, *good[:-1], "model/config.json"), "is a file")
    assert not (planned / "out").exists()


@pytest.mark.parametrize("arguments", [
    [],
    ["--plan"],
    ["8m", "--plan"],
    ["", *ARGUMENTS["1m"]],
    ARGUMENTS["1m"],
])
def test_preset_that_is_none(planned, arguments):
    refused(bash(planned, "runs/ultralong.sh", *arguments),
            "usage: bash runs/ultralong.sh 1m|2m|4m|llama32_1b ")


def test_gpus_that_the_grid_does_not_divide(planned):
    refused(bash(planned, "runs/ultralong.sh", "1m", "--plan", GPUS="4"),
            "GPUS 4: must be a multiple of TP x CP, 8 x 1; set TP or CP")


@pytest.mark.parametrize("numbers, words", [
    (["12288"], "WINDOW 12288"),
    (["8192"], "WINDOW 8192"),
    (["16384", "0"], "0: "),
    (["16384", "2", "x"], "x: "),
])
def test_numbers_of_smollm2(planned, numbers, words):
    refused(bash(planned, *RECIPES["smollm2"], *ARGUMENTS["smollm2"], *numbers), words)


def test_slurm_file_outside_slurm(planned):
    for preset in PRESETS:
        refused(bash(planned, "runs/ultralong.slurm", preset, *ARGUMENTS[preset], SLURM_JOB_ID=""),
                "under Slurm: sbatch")
    for arguments in ([], ["8m", *ARGUMENTS["1m"]], ARGUMENTS["1m"]):
        refused(bash(planned, "runs/ultralong.slurm", *arguments, SLURM_JOB_ID="7"),
                "usage: sbatch runs/ultralong.slurm 1m|")
    elsewhere = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(planned / "text")}
    refused(bash(planned, "runs/ultralong.slurm", "1m", *ARGUMENTS["1m"], **elsewhere),
            "submit from the repository")


# ---------------------------------------------------------------------------- every option exists


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A function that runs a script among stubs and returns the result and the commands that it
    gave; `help` is what torchrun says of its options, if not given the real one's."""
    stub = STUB.replace("PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)  # options name files there
    folder = tree(tmp_path, {name: stub for name in ("python", "torchrun", "srun", "scontrol")})

    def run(*arguments: str, help: str = get_args_parser().format_help(), **variables: str):
        commands = folder / "commands"
        commands.write_text("")
        path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
        result = bash(folder, *arguments, RECORD=str(commands), PATH=path, HELP=help, **variables)
        return result, [json.loads(line) for line in commands.read_text().splitlines()]

    return run


def parts(command: list[str]) -> tuple[list[str], str, list[str]]:
    """What launches, the program (train.py, tools.plan, ...) and the program's options."""
    place = next(i for i, text in enumerate(command) if text == "-m" or text.endswith(".py"))
    launcher, rest = command[:place], command[place:]
    if rest[0] == "-m":
        rest = rest[1:]
    return launcher, rest[0], rest[1:]


def of(commands: list[list[str]], *programs: str) -> list[list[str]]:
    """Those that start one of these programs."""
    return [command for command in commands if parts(command)[1] in programs]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def values(command: list[str], *options: str) -> list[str]:
    return [value(command, option) for option in options]


def check(command: list[str]) -> None:
    """The parser of the program that a command starts takes its options, and torchrun its own; the
    grid is possible there."""
    launcher, program, options = parts(command)
    # one program a command
    assert not any(text.endswith(".py") or text.startswith("tools.") for text in options)
    processes = 1
    if "torchrun" in launcher:
        rest = command[command.index("torchrun") + 1:]
        a = get_args_parser().parse_args(rest)
        assert a.training_script == program
        assert a.module == program.startswith("tools.")
        assert a.training_script_args == options
        processes = int(a.nproc_per_node) * int(a.nnodes.split(":")[-1])
    if program.startswith("benchmarks."):  # their options are nobody else's
        assert (ROOT / f"{program.replace('.', '/')}.py").is_file()
        return
    if program in ("train.py", "sft.py"):
        parser = train.stage1_parser() if program == "train.py" else sft.stage2_parser()
        a = parser.parse_args(options)
        grid = Grid(processes // (a.tp * a.cp), a.cp, a.tp)
        assert a.sequence_length % grid.sequence_multiple == 0
        assert a.batch_size % (grid.dp * (a.micro_batch_size or 1)) == 0
        assert grid.size("all") == processes
        assert a.steps
        assert a.out
        assert a.data
        return
    module = eval_niah if program == "eval_niah.py" else importlib.import_module(program)
    a = module.parser().parse_args(options)
    if program in ("eval_niah.py", "tools.answer", "tools.perplexity"):
        assert processes % (a.tp * a.cp) == 0
        assert a.model
        if program == "tools.answer":
            assert a.jsonl
        else:
            assert a.haystack
            assert a.lengths
    elif program != "tools.chat":
        assert launcher == ["python"]  # nothing else knows of other processes
    if program == "tools.ruler":
        assert a.tasks == ["all"] or set(a.tasks) <= set(ruler.TASKS)


def check_all(commands: list[list[str]]) -> None:
    for command in commands:
        check(command)


def plans(capsys, record, recipe: str, **variables: str) -> tuple[list[str], list[float], str]:
    """What the commands of --plan print, here; of the first stage GiB, GiB on the host and seconds;
    and what the header of the script says of them, for ultralong.sh the preset's line."""
    result, commands = record(*RECIPES[recipe], "--plan", **variables)
    assert result.returncode == 0, result.stderr
    assert [command[:3] for command in commands] == [["python", "-m", "tools.plan"]] * 2
    printed = []
    for command in commands:
        capsys.readouterr()
        words = [str(ROOT / text) if text.startswith("runs/") else text for text in command[3:]]
        plan.main(words)
        printed.append(capsys.readouterr().out)
        assert ": fits" in printed[-1]
    numbers = []
    for pattern in (r"total +([\d.]+) of", r"in host memory +([\d.]+)", r"total +([\d.]+): "):
        match = re.search(pattern, printed[0])
        numbers.append(float(match[1]) if match else 0.0)
    header = (ROOT / RECIPES[recipe][0]).read_text().split("set -euo")[0]
    if recipe in PRESETS:
        [header] = [line for line in header.splitlines() if line.startswith(f"#   {recipe} ")]
    return printed, numbers, header


@pytest.mark.parametrize("recipe", PRESETS)
def test_plans_are_what_the_header_says(capsys, record, recipe):
    window, batch, steps = PRESETS[recipe]
    (first, second), (gib, host, seconds), header = plans(capsys, record, recipe)
    assert f"{batch} x {window:,} tokens a step" in first
    assert "128 x 8,192 tokens a step" in second
    # sft.py's samples have any length
    assert "attention by cudnn (the faster one here)" in first
    assert "attention by flash (not cudnn: samples, prompts, documents have any length" in second
    assert gib < 76
    assert host < 240
    assert "of 76.0: fits" in first
    a_step = f"{seconds / 60:.0f} min a step" if seconds > 600 else f"{seconds:.0f} s a step"
    memory = f"{gib:.0f} GiB and {host + 0.01:.0f} on the host"
    if recipe in LARGE:
        memory += " a GPU"
    assert f" {memory}, {a_step}, {seconds * steps / 3600:.0f} h " in header


@pytest.mark.parametrize("recipe", LARGE)
def test_plans_of_256_are_what_the_header_says(capsys, record, recipe):
    (first, second), (gib, host, seconds), header = plans(
        capsys, record, recipe, GPUS="256", CP="16", MEMORY="--recompute mlp")
    assert "dp 2 x cp 16 x tp 8 = 256 x H100-80" in first
    assert "dp 32 x cp 1 x tp 8 = 256" in second
    hours = seconds * PRESETS[recipe][2] / 3600
    assert f" {gib:.0f} GiB, {seconds:.0f} s a step, {hours:.2g} h (the paper: " in header
    assert host == 0


def test_plan_of_eight_for_the_1b_is_what_the_header_says(capsys, record):
    (first, second), (gib, host, seconds), header = plans(capsys, record, "llama32_1b", GPUS="8")
    assert "dp 1 x cp 8 x tp 1 = 8" in first
    assert "dp 8 x cp 1 x tp 1 = 8" in second
    hours = seconds * PRESETS["llama32_1b"][2] / 3600
    memory = f"{gib:.0f} GiB and {host:.0f} on the host a GPU"
    assert f" {memory}, {seconds:.0f} s a step, {hours:.2g} h" in header


def test_plan_of_smollm2_is_what_its_header_says(capsys, record):
    (first, _), (gib, _, seconds), header = plans(capsys, record, "smollm2", GPU="H100-80")
    assert "0.13B parameters, 4 x 131,072 tokens a step" in first
    assert f"{gib:.0f} GiB, {seconds:.0f} s a step, {seconds * 40 / 60:.0f} min" in header


@pytest.mark.parametrize("recipe", PRESETS)
def test_commands_of_presets(record, recipe):
    window, batch, steps = PRESETS[recipe]
    result, commands = record(*RECIPES[recipe], *ARGUMENTS[recipe])
    assert result.returncode == 0, result.stderr
    check_all(commands)
    [prepare] = of(commands, "tools.prepare")
    assert not any("weight" in option for option in prepare)  # up-sampling happens once

    [stage1] = of(commands, "train.py")
    assert value(stage1, "--sequence-length") == str(window)
    assert value(stage1, "--batch-size") == str(batch)
    assert value(stage1, "--steps") == str(steps)
    assert values(stage1, "--short-weight", "--long-weight") == ["0.5", "2"]
    assert values(stage1, "--beta-slow", "--beta-fast") == ["1", "4"]
    assert value(stage1, "--separator") == "<s>"
    assert value(stage1, "--rope-factor") == str(window // 8192)
    assert value(stage1, "--original-length") == "8192"
    assert value(stage1, "--learning-rate") == "3e-5"

    [stage2] = of(commands, "sft.py")
    assert value(stage2, "--learning-rate") == "5e-6"
    assert int(value(stage2, "--steps")) * int(value(stage2, "--batch-size")) == 99840

    launcher = "python" if recipe == "llama32_1b" else "torchrun"  # one GPU needs no torchrun
    for command in of(commands, "train.py", "sft.py", "eval_niah.py", "tools.answer"):
        assert command[0] == launcher
    assert len(of(commands, "tools.plot")) == 1
    assert "-m tools.chat out/stage2/final" in result.stdout.splitlines()[-1]

    # nothing is prepared, measured or drawn twice
    result, again = record(*RECIPES[recipe], *ARGUMENTS[recipe])
    assert result.returncode == 0
    assert not of(again, "tools.prepare", "tools.ruler", "eval_niah.py", "tools.plot")
    assert len(of(again, "tools.answer")) == 1
    assert "--resume" in of(again, "train.py")[0]


def test_variables_win_over_presets(record):
    variables = {"GPUS": "4", "TP": "2", "CP": "2", "WAIT": "99", "SAMPLES": "7",
                 "MEMORY": "--recompute none"}
    for preset in PRESETS:
        _, commands = record(*RECIPES[preset], *ARGUMENTS[preset][:-1], f"out-{preset}", GPU="H200",
                             **variables)
        [stage1] = of(commands, "train.py")
        launcher = parts(stage1)[0]
        assert launcher[0] == "torchrun"
        assert launcher[-3:] == ["--standalone", "--nproc-per-node", "4"]
        assert values(stage1, "--tp", "--cp") == ["2", "2"]
        assert value(stage1, "--recompute") == "none"
        assert value(stage1, "--timeout") == "99"
        assert "--offload" not in stage1
        [ruler_command] = of(commands, "tools.ruler")
        assert value(ruler_command, "--samples") == "7"
        assert "H200" in of(commands, "tools.plan")[0]
    _, commands = record(*RECIPES["1m"], *ARGUMENTS["1m"],
                         LAUNCH="srun torchrun --nproc-per-node 8")
    for command in of(commands, "train.py", "sft.py"):
        launcher = parts(command)[0]
        assert launcher[:2] == ["srun", "torchrun"]
        assert launcher[-2:] == ["--nproc-per-node", "8"]


@pytest.mark.parametrize("script", ["runs/ultralong.sh", "runs/ultralong.slurm",
                                    "runs/smollm2_128k.sh"])
def test_time_for_a_last_checkpoint_is_given_where_torchrun_has_the_option(record, script):
    """torch 2.13 has it, 2.11 has not."""
    arguments = ARGUMENTS["smollm2"] if "smollm2" in script else ["1m", *ARGUMENTS["1m"]]
    variables = {"GPUS": "8", "WAIT": "600", "SLURM_JOB_ID": "7", "SLURM_NNODES": "32",
                 "SLURM_JOB_NODELIST": "node[1-32]"}
    _, commands = record(script, *arguments[:-1], "new", **variables, help="--shutdown-timeout")
    assert value(of(commands, "train.py")[0], "--shutdown-timeout") == "600"
    _, commands = record(script, *arguments[:-1], "old", **variables, help="--standalone")
    assert of(commands, "train.py")
    assert not any("--shutdown-timeout" in command for command in commands)


def test_4m_are_evaluated_where_the_cache_fits(record):
    def longest(out: str, **variables: str) -> str:
        _, commands = record(*RECIPES["4m"], *ARGUMENTS["4m"][:-1], out, **variables)
        [needles] = of(commands, "eval_niah.py")
        [ruler_command] = of(commands, "tools.ruler")
        lengths = re.search(r"--lengths ([\d ]+)", " ".join(ruler_command))[1]
        assert f"--lengths {lengths}" in " ".join(needles)
        return lengths.split()[-1]

    assert longest("out") == "2097152"
    assert longest("other", GPU="H200") == "4194304"
    assert longest("third", GPUS="16", CP="2") == "4194304"
    assert longest("fourth", GPUS="16") == "2097152"  # two replicas, each with a cache


@pytest.mark.parametrize("program, words", [
    ("train.py", "stage 1 was stopped"),
    ("sft.py", "stage 2 was stopped"),
])
@pytest.mark.parametrize("recipe", ["1m", "smollm2"])
def test_a_stopped_stage_ends_the_recipe(record, recipe, program, words):
    result, commands = record(*RECIPES[recipe], *ARGUMENTS[recipe], STOPPED=program)
    assert result.returncode == 1
    assert words in result.stderr
    assert of(commands, program)
    assert not any("out/stage2/final" in command for command in commands)


@pytest.mark.parametrize("recipe", PRESETS)
def test_slurm_file(record, recipe):
    """Training and evaluation go to 32 nodes by srun; the rest runs on the first."""
    result, commands = record("runs/ultralong.slurm", recipe, *ARGUMENTS[recipe], SLURM_JOB_ID="7",
                              SLURM_NNODES="32", SLURM_JOB_NODELIST="node[1-32]")
    assert result.returncode == 0, result.stderr
    check_all(commands)
    [stage1] = of(commands, "train.py")
    assert stage1[0] == "srun"
    assert value(stage1, "--nnodes") == "32"
    assert value(stage1, "--rdzv-endpoint") == "node1:29500"
    assert value(stage1, "--tp") == "8"
    assert value(stage1, "--cp") == "16"
    assert value(stage1, "--recompute") == "mlp"
    assert "--offload" not in stage1
    measured = of(commands, "eval_niah.py", "tools.answer")
    assert [command[0] for command in measured] == ["srun", "srun"]
    for command in of(commands, "tools.prepare", "tools.ruler", "tools.plot"):
        assert command[0] == "python"


@pytest.mark.parametrize("gpus", ["1", "4"])
def test_commands_of_smollm2(record, gpus):
    result, commands = record(*RECIPES["smollm2"], *ARGUMENTS["smollm2"], GPUS=gpus)
    assert result.returncode == 0, result.stderr
    check_all(commands)
    [stage1] = of(commands, "train.py")
    sizes = values(stage1, "--steps", "--batch-size", "--sequence-length")
    assert 15e6 < math.prod(map(int, sizes)) < 25e6  # tokens
    assert value(stage1, "--rope-factor") == "16"
    [stage2] = of(commands, "sft.py")
    assert "--pack" in stage2

    measured = of(commands, "eval_niah.py", "tools.answer", "tools.perplexity")
    assert len(measured) == 12
    assert sum("--rope-factor" in command for command in measured) == 3
    for program in ("eval_niah.py", "tools.answer", "tools.perplexity"):
        assert len(of(measured, program)) == 4
    needles = measured[0][measured[0].index("--lengths") + 1:][:6]
    assert needles == ["4096", "8192", "16384", "32768", "65536", "131072"]
    assert len(of(commands, "tools.plot")) == 6  # a heat map a model, both comparisons

    _, again = record(*RECIPES["smollm2"], *ARGUMENTS["smollm2"], GPUS=gpus)
    assert not of(again, "tools.prepare", "tools.chat_blend", "tools.ruler", "eval_niah.py",
                  "tools.perplexity")
    assert len(of(again, "tools.plot")) == 2
    assert len(of(again, "tools.answer")) == 4  # answers know what they have


def test_small_numbers_of_smollm2(record):
    result, commands = record(*RECIPES["smollm2"], *ARGUMENTS["smollm2"], "16384", "2", "1",
                              BATCH="1", ROWS="1")
    assert result.returncode == 0, result.stderr
    check_all(commands)
    [stage1] = of(commands, "train.py")
    assert values(stage1, "--rope-factor", "--steps") == ["2", "2"]
    [stage2] = of(commands, "sft.py")
    assert value(stage2, "--steps") == "2"
    lengths = ["4096", "8192", "16384"]
    depths = ["--depths", "3"]
    samples = ["--samples", "1"]
    assert [*lengths, *depths, *samples] == of(commands, "eval_niah.py")[0][-9:-2]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_commands_of_tiny(record, processes):
    result, commands = record("runs/tiny.sh", NPROC=processes)
    assert result.returncode == 0, result.stderr
    check_all(commands)
    for program, times in (("train.py", 3), ("sft.py", 1), ("eval_niah.py", 5), ("tools.plot", 2)):
        assert len(of(commands, program)) == times, program
    assert "-m tools.chat out/tiny-0/stage2/final" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("variables, page", [
    ({}, "docs/experiments.md"),
    ({"SIZE": "toy", "SEEDS": "0 1"}, "out/experiments/experiments.md"),
])
def test_commands_of_experiments(record, tmp_path, variables, page):
    """All there are, then the page; a toy's is not put among the documents."""
    for folder in ("docs", "assets", "out/experiments"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs" / "experiments_text.md").touch()
    result, commands = record("runs/experiments.sh", **variables)
    assert result.returncode == 0, result.stderr
    check_all(commands)
    made = of(commands, "tools.experiment")
    assert sorted(parts(command)[2][0] for command in made) == sorted(EXPERIMENTS)
    assert commands[:-1] == made
    for command in made:
        assert command[command.index("--seeds") + 1:][:2] == ["0", "1"]
        assert value(command, "--size") == variables.get("SIZE", "full")
    [report] = of(commands, "tools.report")
    assert value(report, "--out") == page


# ------------------------------------------------------------------------- README and docs


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/memory.md",
                                  "docs/recipes.md", "docs/grids.md", "docs/experiments.md"])
def test_commands_of_the_documentation(page, record, tmp_path):
    """Every program in a page's code blocks exists, and takes the options that it is given there
    (but for benchmarks, which only have to be there)."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    commands = re.sub(r"^bash runs/.*$", "", "".join(blocks), flags=re.MULTILINE)  # tested above
    (tmp_path / "page.sh").write_text("set -eu\nM=model\n" + commands)
    # what a reader has: models, texts, chat records; and what another page's commands have made
    for name in ("SmolLM2-135M-Instruct", "Llama-3.1-8B-Instruct", "books", "slimpajama",
                 "out/corpus", "out/chat", "out/stage1/final"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sharegpt.json", "metamath.jsonl", "magicoder.jsonl", "gsm8k.jsonl", "mmlu.jsonl",
                 "out/chat/train.jsonl", "out/chat/valid.jsonl"):
        (tmp_path / name).touch()
    result, commands = record("page.sh")
    assert result.returncode == 0, result.stderr
    assert commands
    check_all(commands)


def test_the_plan_in_the_readme_is_what_the_planner_says(capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    line = readme.partition("# before that: ")[2].splitlines()[0]
    monkeypatch.chdir(ROOT)
    plan.main(["H100-80", "--config", "runs/llama31_8b.json", "--sequence-length", "1048576",
               "--tp", "8", "--recompute", "mlp", "--offload"])
    printed = capsys.readouterr().out
    gib = float(re.search(r"total +([\d.]+) of 76.0: fits", printed)[1])
    host = float(re.search(r"in host memory +([\d.]+)", printed)[1])
    speed = re.search(r"(\d+) tokens/s a GPU", printed)[1]
    assert f"{gib:.0f} of 76 GiB a GPU, {host + 0.01:.0f} on the host, {speed} tokens/s/GPU" in line
