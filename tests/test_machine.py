"""How many cores a process may use, and how torch's threads share them with others."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.runtime import machine
from stages.runtime.machine import usable_cores
from tests.conftest import REPOSITORY

# Imports torch as the stages do.
SHOW = """
from stages.imaging.loader import torch, usable_cores
print(usable_cores(), torch.get_num_threads())
"""
VARIABLES = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_only_the_cores_given_to_the_process_are_usable() -> None:
    given = os.sched_getaffinity(0)
    assert usable_cores() == len(given)
    os.sched_setaffinity(0, {min(given)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, given)


class Cgroups:
    """A machine with 64 cores and a tree of cgroups, of which this process is in some."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.own = folder / "cgroups", folder / "own"

    def join(self, *lines: str) -> None:
        self.own.write_text("".join(f"{line}\n" for line in lines))

    def limit(self, cgroup: str, **files: str) -> None:
        folder = self.tree / cgroup
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"cpu.{name}").write_text(f"{text}\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cgroups:
    made = Cgroups(tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", made.own)
    monkeypatch.setattr(machine, "CGROUPS", made.tree)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return made


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("9900000 100000", 64),
    ],
)
def test_a_containers_limit_counts(cgroups: Cgroups, limit: str, cores: int) -> None:
    cgroups.join("0::/")
    cgroups.limit("", max=limit)

    assert usable_cores() == cores


def test_the_lowest_limit_of_the_own_cgroup_and_those_above_counts(cgroups: Cgroups) -> None:
    cgroups.join("0::/user.slice/job/step")
    cgroups.limit("user.slice", max="800000 100000")
    cgroups.limit("user.slice/job", max="300000 100000")
    cgroups.limit("user.slice/job/step", max="max 100000")
    cgroups.limit("user.slice/another", max="100000 100000")

    assert usable_cores() == 3


@pytest.mark.parametrize("controllers", ["cpu", "cpuacct,cpu"])
def test_limits_of_cgroups_of_version_1_count(cgroups: Cgroups, controllers: str) -> None:
    cgroups.join("5:cpuset:/alone", f"3:{controllers}:/docker/job", "1:name=systemd:/", "0::/")
    cgroups.limit("cpu/docker", cfs_quota_us="-1", cfs_period_us="100000")
    cgroups.limit("cpu/docker/job", cfs_quota_us="200000", cfs_period_us="50000")

    assert usable_cores() == 4


def test_a_container_that_sees_only_its_own_cgroup_finds_its_limit(cgroups: Cgroups) -> None:
    """Version 1 names a path outside of the container, whose cgroup is mounted as the top."""
    cgroups.join("3:cpu:/docker/0123456789ab")
    cgroups.limit("cpu", cfs_quota_us="200000", cfs_period_us="100000")

    assert usable_cores() == 2


def test_without_cgroups_all_cores_are_usable(cgroups: Cgroups) -> None:
    assert not cgroups.own.exists()
    assert usable_cores() == 64
    cgroups.join("0::/gone")
    assert usable_cores() == 64


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """A real cgroup with the limit of one CPU; the test is skipped where none can be made."""
    for top, name, limit in [
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "100000"),
        ("/sys/fs/cgroup", "cpu.max", "100000 100000"),
    ]:
        folder = Path(top, f"test-{os.getpid()}")
        if Path(top, "cgroup.procs").exists() and os.access(top, os.W_OK):
            folder.mkdir()
            try:
                if (folder / name).exists():
                    (folder / name).write_text(limit)
                    yield folder
                    return
            finally:
                folder.rmdir()
    pytest.skip("cgroups with a CPU limit can only be made by root, and not in every container")


def shown(before: str = "true", **variables: str) -> tuple[list[str], str]:
    """What SHOW prints in a shell after the command `before`, and how long torch's threads spin.

    OpenMP itself says so, in whose settings these variables are the only ones.
    """
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        ["sh", "-c", f'{before}; "$0" -c "$1"', sys.executable, SHOW],
        cwd=REPOSITORY,
        env=kept | variables | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    (spins,) = re.findall("GOMP_SPINCOUNT = '(.*)'", done.stderr)
    return done.stdout.split(), spins


def test_a_process_under_a_real_limit_uses_one_core_and_one_thread(one_cpu: Path) -> None:
    numbers, _ = shown(f"echo $$ > {one_cpu}/cgroup.procs")
    assert numbers == ["1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, machine.SPINS), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")],
    ids=str,
)
def test_torchs_threads_spin_shortly_unless_the_user_says_otherwise(
    variables: dict[str, str], spins: str
) -> None:
    numbers, found = shown(**variables, OMP_NUM_THREADS="1")
    assert (numbers[1], found) == ("1", spins)
