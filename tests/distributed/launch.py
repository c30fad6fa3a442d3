"""Run a script on several processes of this machine, one thread each, and read what its first rank wrote."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def torchrun(processes: int, *arguments, options: tuple = (), timeout: float = 240, **settings) -> subprocess.CompletedProcess:
    """torchrun --standalone --nproc-per-node PROCESSES ARGUMENTS, in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options,
               *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, **settings)


def results(processes: int, script: str, *arguments):
    """What tests/distributed/SCRIPT wrote as JSON into the file named by its first argument."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "results.json"
        done = torchrun(processes, ROOT / "tests" / "distributed" / script, out, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())
