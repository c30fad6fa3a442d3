"""Several torchruns, as on several machines: one job, which a killed rank does not end."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from launch import ROOT, launch
from test_programs import options, place, records, wait_for  # noqa: F401 (a fixture)

STEPS = ("--steps", 30, "--checkpoint-every", 10, "--resume")


def agent(address: str, *arguments, inside: tuple[str, ...] = (), options: tuple[str, ...] = (),
          **variables: str) -> subprocess.Popen:
    """A torchrun with one rank of two, which restarts once. `inside` is put before the command."""
    command = [*inside, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
               "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", address,
               "--rdzv-id", "a job", "--max-restarts", "1", *options, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def worker(torchrun: subprocess.Popen) -> int:
    """The process id of a torchrun's rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
    return int(children.split()[0])


def is_told_to_end(process: int) -> bool:
    """Whether SIGTERM waits for a process that stands still."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return bool(pending >> signal.SIGTERM - 1 & 1)


def run_and_kill(stack: ExitStack, agents: list[subprocess.Popen], out: Path) -> None:
    """Kill the second torchrun's rank after the first checkpoint, and wait for the job's end.

    The first one's stands still meanwhile: so it does not die of it, and its torchrun restarts it
    for the other's sake, which it does not count as a restart.
    """
    for torchrun in agents:
        stack.callback(torchrun.kill)
    wait_for((out / "checkpoint-00000010").is_dir, 120)
    waiting = worker(agents[0])
    os.kill(waiting, signal.SIGSTOP)
    os.kill(worker(agents[1]), signal.SIGKILL)
    wait_for(lambda: is_told_to_end(waiting))
    os.kill(waiting, signal.SIGKILL)  # rather than wait until it has noticed, or torchrun's 30 s
    said = [torchrun.communicate(timeout=120)[0] for torchrun in agents]
    assert [torchrun.returncode for torchrun in agents] == [0, 0], said
    text = "".join(said)
    assert text.count("resumed after step") == 1, text
    assert text.count("failed (exitcode: ") == 1, text  # the killed one: the second attempt met


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):  # noqa: F811
    """Losses of the same job with one torchrun, of which no rank dies."""
    out = tmp_path_factory.mktemp("one") / "run"
    done = launch(2, "train.py", *options(place, out, "--cp", 2, *STEPS))
    assert done.returncode == 0, done.stderr
    return records(out)


def test_a_killed_rank_of_one_torchrun_restarts_those_of_the_other_too(
        place, undisturbed, tmp_path):  # noqa: F811
    """Each torchrun counts its own restarts: ranks that named an attempt by that number would look
    for each other under different names."""
    out = tmp_path / "run"
    words = ("train.py", *options(place, out, "--cp", 2, *STEPS))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with ExitStack() as stack:
        run_and_kill(stack, [agent(address, *words) for _ in range(2)], out)
    assert records(out) == undisturbed


def ip(*words: str) -> bool:
    """Run Linux's ip, and say whether it could."""
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def two_hosts():
    """Names of two network namespaces on one cable; 10.77.0.1 is the first, 10.77.0.2 the other."""
    names = [f"ulfs{os.getpid()}-{number}" for number in (1, 2)]
    if os.geteuid() != 0 or not shutil.which("ip") or not ip("netns", "add", names[0]):
        pytest.skip("needs root, Linux's ip (Debian's iproute2) and network namespaces")
    ip("netns", "add", names[1])
    ends = [f"ulfs{number}" for number in (1, 2)]
    made = ip("link", "add", ends[0], "netns", names[0], "type", "veth",
              "peer", "name", ends[1], "netns", names[1])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        made &= ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
        made &= ip("-n", name, "link", "set", end, "up")
        made &= ip("-n", name, "link", "set", "lo", "up")
    try:
        if not made:
            pytest.skip("this machine makes no veth pairs")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_machines_go_on_after_a_killed_rank(place, undisturbed, two_hosts, tmp_path):  # noqa: F811
    """Losses are those of one machine, to the last bit."""
    out = tmp_path / "run"
    words = ("train.py", *options(place, out, "--cp", 2, *STEPS))
    with ExitStack() as stack:
        agents = []
        for number, name in enumerate(two_hosts, 1):
            agents.append(agent("10.77.0.1:29511", *words, inside=("ip", "netns", "exec", name),
                                options=("--local-addr", f"10.77.0.{number}",
                                         "--rdzv-conf", f"is_host={number == 1}"),
                                GLOO_SOCKET_IFNAME=f"ulfs{number}"))
        run_and_kill(stack, agents, out)
    assert records(out) == undisturbed
