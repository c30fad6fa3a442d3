"""Run a script on several processes of this machine, one thread each, and read what its first rank wrote."""
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from processes import server
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent.parent
HANDLED = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]  # by the launcher, which leaves its handlers there


def torchrun(processes: int, *arguments) -> subprocess.CompletedProcess:
    """The command `torchrun --standalone --nproc-per-node PROCESSES ARGUMENTS`, in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """The same by torchrun's launcher, several times faster: ranks are forks of a server that has imported torch. Their output
    comes rank by rank.
    """
    server()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    with tempfile.TemporaryDirectory() as place:
        config = LaunchConfig(1, 1, processes, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                              start_method="forkserver", logs_specs=DefaultLogsSpecs(log_dir=place, redirects=Std.ALL))
        try:
            elastic_launch(config, run)(*map(str, arguments))
            code = 0
        except ChildFailedError:
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        shown = ["".join(file.read_text() for file in sorted(Path(place).rglob(name))) for name in ("stdout.log", "stderr.log")]
    return subprocess.CompletedProcess(arguments, code, *shown)


def run(*arguments: str) -> None:
    """What a rank does: `python ARGUMENTS`."""
    torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def results(processes: int, script: str, *arguments):
    """What tests/distributed/SCRIPT wrote as JSON into the file named by its first argument."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "results.json"
        done = launch(processes, ROOT / "tests" / "distributed" / script, out, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())
