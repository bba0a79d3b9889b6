"""Stages on a disk that is too small, and then on a larger one: one line, and nothing is lost."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import changed_params
from tests.faults import FaultProxy, fault_proxy
from tests.forks import KNOBS, STAGES, Modules, outs_of
from tests.lab import differences, written, yaml
from tests.project import Project, fill_buckets
from tools.s3 import serving

pytestmark = pytest.mark.slow
PLENTY = 2**29
NO_ROOM = r"no room for (?P<what>.+): the disk of /\S+ has [\d.]+ \w+ free; free .+, and run again"
#: The commands in their order, with the exit codes for errors and for success. The audit succeeds
#: with alarms.
COMMANDS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys([f"stages.{stage}" for stage in STAGES], (1, 0)),
    "tools.audit data/resized": (2, 1),
}


@dataclass(frozen=True)
class Disk:
    """A file system in memory."""

    folder: Path

    def leave(self, room: int) -> None:
        """Resize the disk so that about `room` bytes are free."""
        code = 1
        while code:
            # A process that writes there may meanwhile have used more.
            status = os.statvfs(self.folder)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
            code = mount(
                "-o", f"remount,size={max(4096, used + room)}", str(self.folder)
            ).returncode
            time.sleep(0.001)


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], check=False, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", str(disk.folder))
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    folder = tmp_path_factory.mktemp("server") / "s3"
    fill_buckets(folder)
    with serving(folder) as url, fault_proxy(url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Modules:
    return Modules(tmp_path_factory.mktemp("python") / "output")


@pytest.fixture(scope="module")
def undisturbed(
    python: Modules, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which all commands have run with enough room."""
    folder = tmp_path_factory.mktemp("undisturbed")
    yaml.dump(changed_params(KNOBS | {"bucket.endpoint": proxy.url}), folder / "params.yaml")
    for command, (_, ends) in COMMANDS.items():
        code, printed = python.run(folder, *command.split())
        assert code == ends, printed
    shutil.rmtree(folder / ".cache")
    return folder


def copy_inputs(undisturbed: Path, disk: Disk, command: str) -> tuple[Path, int]:
    """Copy the folder to the disk without the command's outputs. Also returns their size."""
    folder = disk.folder / "workspace"
    shutil.copytree(undisturbed, folder)
    module, _, argument = command.partition(" ")
    package, _, name = module.partition(".")
    outs = ["audit"] if package == "tools" else outs_of(f"{name} {argument}".strip())
    before = size_of(folder)
    for path in map(folder.joinpath, outs):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder, before - size_of(folder)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def outputs(folder: Path) -> dict[str, bytes]:
    """All files, without those in .cache for the next run."""
    files = written(folder)
    return {path: data for path, data in files.items() if not path.startswith(".cache/")}


def check_failure(
    ended: tuple[int, str], command: str, folder: Path, whole: dict[str, bytes]
) -> str:
    """Check that the command reported a full disk. Returns what there was no room for."""
    code, printed = ended
    assert code == COMMANDS[command][0], printed
    name = "audit" if "audit" in command else command.removeprefix("stages.")
    match = re.fullmatch(f"{name}: error: {NO_ROOM}", printed.splitlines()[-1])
    assert match, printed
    assert "Traceback" not in printed
    # All outputs that exist are complete, and there are no other files.
    assert outputs(folder).items() <= whole.items()
    return match["what"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_reported_in_one_line_and_the_next_run_ends_with_the_same_bytes(
    python: Modules, undisturbed: Path, disk: Disk, command: str
) -> None:
    folder, needed = copy_inputs(undisturbed, disk, command)
    disk.leave(needed // 2)
    whole = outputs(undisturbed)
    check_failure(python.run(folder, *command.split()), command, folder, whole)
    disk.leave(PLENTY)
    code, printed = python.run(folder, *command.split())
    assert code == COMMANDS[command][1], printed
    assert differences(whole, outputs(folder)) == []


def test_fetch_asks_for_room_first_and_reads_no_photograph_twice(
    python: Modules, undisturbed: Path, disk: Disk, proxy: FaultProxy
) -> None:
    folder, needed = copy_inputs(undisturbed, disk, "stages.fetch")
    whole = outputs(undisturbed)
    proxy.take_requests()
    disk.leave(needed // 2)
    what = check_failure(python.run(folder, "stages.fetch"), "stages.fetch", folder, whole)
    assert what.startswith("the photographs to fetch (about ")
    assert not proxy.take_requests()

    # Room for the photographs, but not for the overhead of Parquet and of disk pages.
    disk.leave(needed)
    what = check_failure(python.run(folder, "stages.fetch"), "stages.fetch", folder, whole)
    assert what.endswith(".parquet")
    first = proxy.take_requests()
    missing = 9 - len(list(folder.glob(".cache/fetch-*/shards/*.parquet")))
    assert 0 < missing < 9

    disk.leave(PLENTY)
    assert python.run(folder, "stages.fetch")[0] == 0
    assert proxy.take_requests().total() <= 8 * missing
    assert first.total() >= 70 - 8 * missing
    assert differences(whole, outputs(folder)) == []


def test_a_training_without_room_for_a_checkpoint_continues_from_the_previous_one(
    python: Modules, undisturbed: Path, disk: Disk
) -> None:
    folder, _ = copy_inputs(undisturbed, disk, "stages.train vit")
    whole = outputs(undisturbed)
    python.start(folder, "stages.train", "vit")
    while not list(folder.glob(".cache/train-*/checkpoint*")):
        assert python.process.is_alive(), python.finish()
        time.sleep(0.001)
    disk.leave(0)
    what = check_failure(python.finish(), "stages.train vit", folder, whole)
    assert Path(what).name.startswith("checkpoint")
    disk.leave(PLENTY)
    code, printed = python.run(folder, "stages.train", "vit")
    assert code == 0, printed
    assert "after epoch" in printed
    assert differences(whole, outputs(folder)) == []


def test_dvc_without_room_for_its_cache_continues_without_fetching_again(
    project: Project, disk: Disk, tmp_path: Path
) -> None:
    clone = project.copy(tmp_path / "clone")
    clone.run("dvc", "cache", "dir", "--local", str(disk.folder / "cache"))
    params = clone.folder / "params.yaml"
    params.write_text(re.sub("shard_bins: [0-9]+", "shard_bins: 20", params.read_text("utf-8")))
    disk.leave(20 * 4096)
    with pytest.raises(AssertionError, match="No space left on device"):
        clone.run("dvc", "repro", "fetch")
    fetched = {path: path.stat().st_ino for path in clone.folder.glob(".cache/fetch-*/shards/*")}
    assert len(fetched) == 4

    disk.leave(PLENTY)
    clone.run("dvc", "repro", "fetch")
    assert {path: path.stat().st_ino for path in fetched} == fetched
    assert "up to date" in clone.run("dvc", "status", "fetch")
