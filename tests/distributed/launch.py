"""Run a script on several processes of this machine, one thread each, and read what its first rank
wrote."""
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import torch
from processes import fork_context
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent.parent


def torchrun(processes: int, *arguments) -> subprocess.CompletedProcess:
    """The command `torchrun --standalone --nproc-per-node PROCESSES ARGUMENTS`, in the repository's
    root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=240)


class Job:
    """A script on several ranks, started by torchrun's launcher, but as forks of a server that has
    imported torch: several times faster. What each rank prints is in a file of its own under
    `logs`. Leaving `with` kills what still runs.
    """

    def __init__(self, processes: int, *arguments, logs: Path, restarts: int = 0) -> None:
        fork_context()  # before the launcher starts the server
        self.logs = logs
        self.arguments = list(map(str, arguments))
        self.config = LaunchConfig(
            1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=restarts, start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL))

    def __enter__(self):
        # in a thread, the launcher leaves this process's signals alone
        self.code = ThreadPoolExecutor(1).submit(self.run)
        return self

    def __exit__(self, *_) -> None:
        while not self.code.done():  # again: a restart makes new ones
            for file in self.logs.glob("*.pid"):
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGKILL)
            time.sleep(0.1)

    def run(self) -> int:
        try:
            elastic_launch(self.config, be_rank)(str(self.logs), *self.arguments)
        except ChildFailedError:
            return 1
        return 0

    def process(self, rank: int) -> int:
        """The process id of a rank."""
        return int((self.logs / f"{rank}.pid").read_text())

    def printed(self, stream: str) -> list[str]:
        """What each rank has printed to stdout or stderr, attempt by attempt, rank by rank."""
        return [file.read_text() for file in sorted(self.logs.rglob(f"{stream}.log"))]

    def result(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for its end."""
        wait([self.code], timeout)
        printed = ["".join(self.printed(stream)) for stream in ("stdout", "stderr")]
        assert self.code.done(), printed
        return subprocess.CompletedProcess(self.arguments, self.code.result(), *printed)


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """Run a job to its end."""
    with tempfile.TemporaryDirectory() as place:
        with Job(processes, *arguments, logs=Path(place)) as job:
            return job.result()


def be_rank(logs: str, *arguments: str) -> None:
    """Run a script or module in this fork, which then, unlike `python`, ends without atexit or
    finalisation."""
    Path(logs, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    os.chdir(ROOT)
    torch.set_num_threads(1)
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except Exception:  # the launcher would keep it for itself
        traceback.print_exc()
        sys.exit(1)


def results(processes: int, script: str, *arguments):
    """What tests/distributed/SCRIPT wrote as JSON into the file named by its first argument."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "results.json"
        done = launch(processes, ROOT / "tests" / "distributed" / script, out, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())
