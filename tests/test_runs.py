"""The recipes of runs/: their plans fit, mistakes get one line, and every option they give exists."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import data
import eval_niah
import sft
import train
from parallel import check_grid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runs"))
import chat_blend
import ruler
import tiny_documents

SCRIPTS = sorted(path.name for path in (ROOT / "runs").iterdir() if path.suffix in (".sh", ".slurm"))
LARGE = {"ultralong_1m": (2**20, 8, 120), "ultralong_2m": (2**21, 4, 120), "ultralong_4m": (2**22, 2, 150),
         "llama32_1b_512k": (2**19, 2, 96)}  # window, sequences a step, steps
PAPER = {"ultralong_1m": "4", "ultralong_2m": "16", "ultralong_4m": "16"}  # cp, of tp 8 on 256 GPUs
RECIPES = [*LARGE, "smollm2_128k"]

# Stands for python, torchrun, srun and scontrol: writes its arguments down and makes what the scripts look for.
STUB = r"""#!PYTHON -SE
import json, os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "scontrol":
    print("node1\nnode2")
    raise SystemExit
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, *arguments]) + "\n")
place = next((i for i, text in enumerate(arguments) if text.endswith(".py")), None)
if place is not None and "--out" in arguments and "--dry-run" not in arguments:
    program, out = os.path.basename(arguments[place]), arguments[arguments.index("--out") + 1]
    if os.environ.get("STOPPED") == program:  # as if by SIGTERM: exit code 0, but no `final`
        os.makedirs(out, exist_ok=True)
        raise SystemExit
    folder, file = {"train.py": ("final", None), "sft.py": ("final", None), "chat_blend.py": ("", "train.jsonl"),
                    "data.py": ("", "meta.json")}.get(program, (None, None))
    if folder is None:
        open(out, "a").close()
    else:
        os.makedirs(os.path.join(out, folder), exist_ok=True)
        file and open(os.path.join(out, file), "w").close()
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what the recipes read from it."""
    ours = {"GPU", "GPUS", "TP", "CP", "MEMORY", "LAUNCH", "WAIT", "SAMPLES", "NPROC", "RECIPE", "BATCH", "ROWS", "DTYPE"}
    return {name: value for name, value in os.environ.items() if name not in ours} | changes


def tree(folder: Path, programs: dict[str, str]) -> Path:
    """A repository in `folder`: the real scripts, and a .venv of these programs that setup.sh finds up to date."""
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
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
    return tree(tmp_path_factory.mktemp("planned"), {"python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'})


def bash(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], cwd=folder, env=environment(**variables), capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess, words: str) -> None:
    """One line of error, exit code 1."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    result = subprocess.run(["bash", "-n", ROOT / "runs" / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_plan_is_printed(planned):
    result = bash(planned, "runs/ultralong_1m.sh", "--plan")
    assert result.returncode == 0, result.stderr
    assert "8 x 1,048,576 tokens a step; dp 1 x cp 1 x tp 8 = 8 x H100-80" in result.stdout
    assert "128 x 8,192 tokens a step" in result.stdout and result.stdout.count("of 76.0: fits") == 2


def test_plan_that_does_not_fit_stops_everything(planned):
    variables = {"MEMORY": "--recompute none", "GPU": "A100-80"}
    refused(bash(planned, "runs/ultralong_4m.sh", "--plan", **variables), "do not fit")
    shutil.copy(ROOT / "runs" / "llama31_8b.json", planned / "model" / "config.json")
    refused(bash(planned, "runs/ultralong_4m.sh", "model", "text", "chat", "out", **variables), "do not fit")
    assert not (planned / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_arguments(planned, recipe):
    """Missing or wrong: one line, before anything runs."""
    good = ["model", "text", "chat", "out"] if recipe in LARGE else ["model", "chat/train.jsonl", "out"]
    refused(bash(planned, f"runs/{recipe}.sh"), "usage: bash")
    refused(bash(planned, f"runs/{recipe}.sh", *good[:-1]), "usage: bash")
    refused(bash(planned, f"runs/{recipe}.sh", "--plan", "more"), "usage: bash")
    refused(bash(planned, f"runs/{recipe}.sh", *good, *["1"] * 4), "usage: bash")
    for place in range(len(good) - 1):
        refused(bash(planned, f"runs/{recipe}.sh", *good[:place], "nowhere", *good[place + 1:]), "nowhere: no ")
    refused(bash(planned, f"runs/{recipe}.sh", *good[:-1], "model/config.json"), "is a file")
    assert not (planned / "out").exists()


@pytest.mark.parametrize("numbers, words", [(["12288"], "WINDOW 12288"), (["8192"], "WINDOW 8192"), (["16384", "0"], "0: "),
                                            (["16384", "2", "x"], "x: ")])
def test_numbers_of_smollm2(planned, numbers, words):
    refused(bash(planned, "runs/smollm2_128k.sh", "model", "chat/train.jsonl", "out", *numbers), words)


def test_slurm_file_outside_slurm(planned):
    refused(bash(planned, "runs/ultralong.slurm", "model", "text", "chat", "out", SLURM_JOB_ID=""), "under Slurm")
    refused(bash(planned, "runs/ultralong.slurm", RECIPE="none"), "RECIPE")


# ---------------------------------------------------------------------------------------------------- every option exists


@pytest.fixture
def record(tmp_path):
    """A function that runs a script among stubs and returns the result and the commands that it gave."""
    stub = STUB.replace("PYTHON", sys.executable)
    folder = tree(tmp_path, {name: stub for name in ("python", "torchrun", "srun", "scontrol")})

    def run(*arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        commands = folder / "commands"
        commands.write_text("")
        path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
        result = bash(folder, *arguments, RECORD=str(commands), PATH=path, **variables)
        return result, [json.loads(line) for line in commands.read_text().splitlines()]
    return run


def of(commands: list[list[str]], program: str) -> list[list[str]]:
    """Those that train, prepare, ... by a program."""
    return [command for command in commands if program in command and "--dry-run" not in command]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def check(command: list[str], monkeypatch) -> None:
    """The parser of the program that a command starts takes its options, and torchrun its own; the grid is possible there."""
    place = next(i for i, text in enumerate(command) if text.endswith(".py"))
    launcher, program, options, processes = command[:place], command[place], command[place + 1:], 1
    assert (ROOT / program).is_file()
    if "torchrun" in launcher:
        a = get_args_parser().parse_args([*launcher[launcher.index("torchrun") + 1:], program])
        processes = int(a.nproc_per_node) * int(a.nnodes.split(":")[-1])
    if program in ("train.py", "sft.py"):
        a = (train.stage1_parser if program == "train.py" else sft.stage2_parser)().parse_args(options)
        if not a.dry_run:  # a plan of so many processes, for check_arguments
            assert a.steps and a.out and a.data
            a.dry_run, a.processes = "H100-80", processes
        train.check_arguments(a)
    elif program == "eval_niah.py":
        a = eval_niah.parse_arguments(options)
        check_grid(a.tp, a.cp, processes)
        assert (a.model is None) != (a.compare is None) and (a.model is None or a.jsonl or a.haystack and a.lengths)
    elif program == "data.py":
        data.parse_arguments(options)
    elif program == "runs/ruler.py":
        a = ruler.parse_arguments(options)
        assert a.tasks == ["all"] or set(a.tasks) <= set(ruler.TASKS)
    else:
        module, seen = {"runs/chat_blend.py": chat_blend, "runs/tiny_documents.py": tiny_documents}[program], []
        monkeypatch.setattr(sys, "argv", [program, *options])
        monkeypatch.setattr(module, "run", seen.append)
        module.main()
        assert seen


def check_all(commands: list[list[str]], monkeypatch) -> None:
    for command in commands:
        if any(text.endswith(".py") for text in command):  # not `python - < lines`
            check(command, monkeypatch)


def plan(capsys, record, recipe: str, **variables: str) -> tuple[list[str], list[float], str]:
    """What the commands of --plan print, here; of the first stage GiB, GiB on the host and seconds; and the script's header."""
    result, commands = record(f"runs/{recipe}.sh", "--plan", **variables)
    assert result.returncode == 0, result.stderr
    assert [command[1] for command in commands] == ["train.py", "sft.py"]
    printed = []
    for command, parser in zip(commands, (train.stage1_parser(), sft.stage2_parser())):
        options = [str(ROOT / text) if text.startswith("runs/") else text for text in command[2:]]
        capsys.readouterr()
        train.main(parser, None, options)
        printed.append(capsys.readouterr().out)
        assert ": fits" in printed[-1]
    patterns = r"total +([\d.]+) of", r"in host memory +([\d.]+)", r"total +([\d.]+): "
    found = [re.search(pattern, printed[0]) for pattern in patterns]
    return printed, [float(match[1]) if match else 0.0 for match in found], (ROOT / "runs" / f"{recipe}.sh").read_text()


@pytest.mark.parametrize("recipe", LARGE)
def test_plans_are_what_headers_say(capsys, record, recipe):
    window, batch, steps = LARGE[recipe]
    (first, second), (gib, host, seconds), header = plan(capsys, record, recipe)
    assert f"{batch} x {window:,} tokens a step" in first and "128 x 8,192 tokens a step" in second
    assert gib < 76 and host < 240 and "of 76.0: fits" in first
    assert f"{gib:.0f} GiB and {host + 0.01:.0f} on the host" in header
    a_step = f"{seconds / 60:.0f} min a step" if seconds > 600 else f"{seconds:.0f} s a step"
    assert f"{a_step}, {seconds * steps / 3600:.0f} h" in header


@pytest.mark.parametrize("recipe", PAPER)
def test_plans_of_the_papers_grid_are_what_headers_say(capsys, record, recipe):
    (first, second), (gib, host, seconds), header = plan(capsys, record, recipe, GPUS="256", CP=PAPER[recipe],
                                                         MEMORY="--recompute mlp")
    assert f"x cp {PAPER[recipe]} x tp 8 = 256 x H100-80" in first and "dp 32 x cp 1 x tp 8 = 256" in second
    assert f"{gib:.0f} GiB, {seconds:.0f} s a step" in header and host == 0


def test_plan_of_eight_for_the_1b_is_what_its_header_says(capsys, record):
    (first, second), (gib, host, seconds), header = plan(capsys, record, "llama32_1b_512k", GPUS="8")
    assert "dp 1 x cp 8 x tp 1 = 8" in first and "dp 8 x cp 1 x tp 1 = 8" in second
    assert f"{gib:.0f} GiB and {host:.0f} on the host a GPU, {seconds:.0f} s a step" in header


def test_plan_of_smollm2_is_what_its_header_says(capsys, record):
    (first, _), (gib, _, seconds), header = plan(capsys, record, "smollm2_128k", GPU="H100-80")
    assert "0.13B parameters, 4 x 131,072 tokens a step" in first
    assert f"{gib:.0f} GiB, {seconds:.0f} s a step, {seconds * 40 / 60:.0f} min" in header


@pytest.mark.parametrize("recipe", LARGE)
def test_commands_of_large_recipes(record, monkeypatch, recipe):
    window, batch, steps = LARGE[recipe]
    result, commands = record(f"runs/{recipe}.sh", "model", "text", "chat", "out")
    assert result.returncode == 0, result.stderr
    check_all(commands, monkeypatch)
    [prepare], [stage1], [stage2] = (of(commands, program) for program in ("data.py", "train.py", "sft.py"))
    assert value(prepare, "--tokens") == str(window * batch * steps)
    assert value(stage1, "--rope-factor") == str(window // 8192) and value(stage1, "--original-length") == "8192"
    assert (value(stage1, "--beta-slow"), value(stage1, "--beta-fast"), value(stage1, "--separator")) == ("1", "4", "<s>")
    assert value(stage1, "--learning-rate") == "3e-5" and value(stage2, "--learning-rate") == "5e-6"
    assert int(value(stage2, "--steps")) * int(value(stage2, "--batch-size")) == 99840
    result, again = record(f"runs/{recipe}.sh", "model", "text", "chat", "out")  # nothing is prepared or measured twice
    assert result.returncode == 0 and not of(again, "data.py") and not of(again, "runs/ruler.py")
    assert len(of(again, "eval_niah.py")) == 1 and "--resume" in of(again, "train.py")[0]


def test_4m_are_evaluated_where_the_cache_fits(record):
    _, commands = record("runs/ultralong_4m.sh", "model", "text", "chat", "out")
    assert "2097152" in of(commands, "runs/ruler.py")[0] and "4194304" not in of(commands, "runs/ruler.py")[0]
    for out, variables in (("other", {"GPU": "H200"}), ("third", {"GPUS": "16", "CP": "2"})):
        _, commands = record("runs/ultralong_4m.sh", "model", "text", "chat", out, **variables)
        assert "4194304" in of(commands, "runs/ruler.py")[0]
    _, commands = record("runs/ultralong_4m.sh", "model", "text", "chat", "fourth", GPUS="16")  # two replicas, each with a cache
    assert "4194304" not in of(commands, "runs/ruler.py")[0]


@pytest.mark.parametrize("program, words", [("train.py", "stage 1 was stopped"), ("sft.py", "stage 2 was stopped")])
@pytest.mark.parametrize("recipe", ["ultralong_1m", "smollm2_128k"])
def test_a_stopped_stage_ends_the_recipe(record, recipe, program, words):
    arguments = ["model", "text", "chat", "out"] if recipe in LARGE else ["model", "chat/train.jsonl", "out"]
    result, commands = record(f"runs/{recipe}.sh", *arguments, STOPPED=program)
    assert result.returncode == 1 and words in result.stderr
    assert of(commands, program) and not any("out/stage2/final" in command for command in commands)


@pytest.mark.parametrize("recipe", PAPER)
def test_slurm_file(record, monkeypatch, recipe):
    """Training and evaluation go to 32 nodes by srun; the rest runs on the first."""
    result, commands = record("runs/ultralong.slurm", "model", "text", "chat", "out", RECIPE=recipe, SLURM_JOB_ID="7",
                              SLURM_NNODES="32", SLURM_JOB_NODELIST="node[1-32]")
    assert result.returncode == 0, result.stderr
    check_all(commands, monkeypatch)
    [stage1], [prepare] = of(commands, "train.py"), of(commands, "data.py")
    assert stage1[0] == "srun" and value(stage1, "--nnodes") == "32" and value(stage1, "--rdzv-endpoint") == "node1:29500"
    assert (value(stage1, "--tp"), value(stage1, "--cp"), value(stage1, "--recompute")) == ("8", PAPER[recipe], "mlp")
    assert prepare[0] == "python" and all(command[0] == "srun" for command in of(commands, "eval_niah.py"))


@pytest.mark.parametrize("gpus", ["1", "4"])
def test_commands_of_smollm2(record, monkeypatch, gpus):
    result, commands = record("runs/smollm2_128k.sh", "model", "chat/train.jsonl", "out", GPUS=gpus)
    assert result.returncode == 0, result.stderr
    check_all(commands, monkeypatch)
    [stage1], [stage2] = of(commands, "train.py"), of(commands, "sft.py")
    tokens = int(value(stage1, "--steps")) * int(value(stage1, "--batch-size")) * int(value(stage1, "--sequence-length"))
    assert 15e6 < tokens < 25e6 and value(stage1, "--rope-factor") == "16" and "--pack" in stage2
    measured = [command for command in of(commands, "eval_niah.py") if "--compare" not in command]
    assert len(measured) == 12 and sum("--rope-factor" in command for command in measured) == 3
    needles = measured[0][measured[0].index("--lengths") + 1:][:6]
    assert needles == ["4096", "8192", "16384", "32768", "65536", "131072"]


def test_small_numbers_of_smollm2(record, monkeypatch):
    result, commands = record("runs/smollm2_128k.sh", "model", "chat/train.jsonl", "out", "16384", "2", "1", BATCH="1", ROWS="1")
    assert result.returncode == 0, result.stderr
    check_all(commands, monkeypatch)
    [stage1], [stage2] = of(commands, "train.py"), of(commands, "sft.py")
    assert (value(stage1, "--rope-factor"), value(stage1, "--steps"), value(stage2, "--steps")) == ("2", "2", "2")
    assert ["4096", "8192", "16384", "--depths", "3", "--samples", "1"] == of(commands, "eval_niah.py")[0][-11:-4]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_commands_of_tiny(record, monkeypatch, processes):
    result, commands = record("runs/tiny.sh", NPROC=processes)
    assert result.returncode == 0, result.stderr
    check_all(commands, monkeypatch)
    assert len(of(commands, "train.py")) == 3 and len(of(commands, "sft.py")) == 1 and len(of(commands, "eval_niah.py")) == 7
