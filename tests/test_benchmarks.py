"""The command for a day with a GPU, in small on a CPU: its first two parts; and what it refuses.
What all benchmarks refuse."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common
from benchmarks.document_balance import equal_documents, pairs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project whose .venv is this Python."""
    folder = tmp_path_factory.mktemp("gpu") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "assets"))
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


def gpu_sh(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "benchmarks/gpu.sh", *arguments], cwd=folder,
                          capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_in_small_on_a_cpu(tree):
    result = gpu_sh(tree, "--tiny", "kernels", "step")
    assert result.returncode == 0, result.stdout + result.stderr
    out = tree / "out" / "gpu-tiny"

    # 1. Pages for the documentation: headed by the machine, every row with its kernel.
    kernels = (out / "kernels.md").read_text()
    assert kernels.count("| kernel | block | heads | out | lse | dq | dk | dv |") == 2
    assert kernels.count("CPU, ") >= 3  # each table says where
    parity = json.loads((out / "kernels-flash" / "parity.json").read_text())
    tables = [parity]
    for name in ("rates", "large"):
        tables.append(json.loads((out / "kernels-flash" / f"{name}.json").read_text()))
    assert kernels.count("| flash |") == sum(len(table["rows"]) for table in tables)
    step = (out / "step.md").read_text()
    assert "attention by flash (the kernel for CPUs)" in step

    # 2. JSON with the numbers.
    assert all(row["out"] < 1e-2 for row in parity["rows"])
    assert parity["torch"] in kernels
    same = json.loads((out / "same_step-flash.json").read_text())
    assert [row["--offload"] for row in same["rows"][1:]] == ["no", "no", "no", "yes"]
    ranks = json.loads((out / "one_rank-flash.json").read_text())
    first, second, whole = ranks["rows"]
    assert whole["layers"] == "3, extrapolated"
    # the line through 1 and 2 layers, at 3
    line = 2 * second["s a step"] - first["s a step"]
    assert whole["s a step"] == pytest.approx(line)
    assert {row["kernel"] for row in ranks["rows"]} == {"flash"}


def test_benchmarks_take_the_first_gpu(monkeypatch, capsys):
    """CUDA_VISIBLE_DEVICES chooses another: measurements and tables are of the first one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = common.parser("", "out").parse_args(["--device", "cuda"])
    assert options.device == "cuda"
    with pytest.raises(SystemExit):
        common.parser("", "out").parse_args(["--device", "cuda:1"])
    assert "cuda:1" in capsys.readouterr().err


def test_documents_of_one_length_leave_ranks_equal_work():
    """What a position near a document's start has too little, its mirror image near an end has too
    much, and zigzag gives both to one rank. Not so where lengths differ, mirrored or not."""
    for count in (1, 2, 3, 5, 16):
        table = pairs(960, 4, equal_documents(960, count))
        own = {sum(hops) for hops in table}
        assert own == {count * (960 // count) * (960 // count + 1) // 2 // 4}
    mirrored = [sum(hops) for hops in pairs(64, 4, [0, 16, 48, 64])]
    assert mirrored == [136, 136, 264, 264]
    first, second = pairs(8, 2, [0, 4, 5, 6, 7, 8])  # chunks of two
    assert first == [3 + 2, 0]  # a pair of the long one, and two short ones
    assert second == [3 + 2, 4]  # its end, and what that sees of its beginning


@pytest.mark.parametrize("arguments, words", [
    (["speed"], "speed: usage: bash benchmarks/gpu.sh"),
    (["--model", "nowhere", "recipe"], "--model nowhere: no config.json there"),
])
def test_the_command_for_a_gpu_refuses_in_a_line(arguments, words):
    result = gpu_sh(ROOT, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_the_command_for_a_gpu_says_what_it_does_from_anywhere():
    result = subprocess.run(["bash", "gpu.sh", "--help"], cwd=ROOT / "benchmarks",
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "bash benchmarks/gpu.sh [--model DIR] [kernels|step|long|recipe]" in result.stdout
