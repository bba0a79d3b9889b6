"""Training on several machines: two torchruns on loopback, each with one process."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from stages.runtime.machine import usable_cores
from tests.test_train import SECONDS, STAGE, Workspace
from tools.s3 import free_port

pytestmark = pytest.mark.slow

TORCHRUN = [str(Path(STAGE[0]).with_name("torchrun")), "--nnodes", "2", "--nproc-per-node", "1"]
# Seconds within which a machine ends after the other one is gone.
BOUND = 60
LOST = "train vit: error: the connection to the other processes broke off ("


def start_machines(
    workspaces: Sequence[Workspace], *, ranked: bool
) -> list["subprocess.Popen[str]"]:
    """Start torchrun in each workspace, with ranks as in the README or with a rendezvous."""
    port = free_port()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    if ranked:
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    machines = []
    for rank, workspace in enumerate(workspaces):
        own = ["--node-rank", str(rank)] if ranked else []
        machines.append(workspace.start([*TORCHRUN, *meeting, *own, *STAGE[1:]]))
    return machines


def end(machine: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for its end; returns the exit code and the output."""
    output, _ = machine.communicate(timeout=SECONDS)
    return machine.returncode, output


def kill(machine: "subprocess.Popen[str]") -> None:
    """Kill all its processes, as if its power were cut."""
    agent = psutil.Process(machine.pid)
    for process in [agent, *agent.children(recursive=True)]:
        process.kill()
    code, _ = end(machine)
    assert code == -signal.SIGKILL


@pytest.fixture(autouse=True)
def as_many_threads_as_two_processes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of threads, additions would have another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(max(1, usable_cores() // 2)))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of two processes on one machine."""
    workspace = Workspace(
        tmp_path_factory.mktemp("together"), run__processes=2, train__vit__epochs=2
    )
    workspace.finish()
    return workspace.outputs()


def test_two_machines_that_share_a_folder_train_what_two_processes_do(
    together: dict[str, bytes], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path, train__vit__epochs=2)
    ended = [end(machine) for machine in start_machines([workspace] * 2, ranked=False)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert sum("160 bins on 2 x " in output for _, output in ended) == 1
    assert workspace.outputs() == together
    assert not list((tmp_path / ".cache").iterdir())


def test_two_machines_with_copies_of_the_inputs_of_which_one_is_killed_do_so_too(
    together: dict[str, bytes], tmp_path: Path
) -> None:
    workspaces = [Workspace(tmp_path / name, train__vit__epochs=2) for name in ("first", "second")]
    first, second = start_machines(workspaces, ranked=True)
    deadline = time.monotonic() + SECONDS
    while workspaces[0].steps_done() < 3:
        assert first.poll() is None, end(first)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(second)
    killed = time.monotonic()
    code, output = end(first)
    assert time.monotonic() - killed < BOUND
    assert code == 1
    assert LOST in output
    assert "the next run continues from the last checkpoint" in output
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0]

    ended = [end(machine) for machine in start_machines(workspaces, ranked=True)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert "continuing after epoch" in ended[0][1]
    assert workspaces[0].outputs() == together
    assert not (workspaces[1].folder / "models/vit").exists()
    assert not [*tmp_path.glob("*/.cache/*")]
