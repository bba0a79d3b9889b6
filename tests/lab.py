"""Projects in which DVC and its stages are disturbed, and checks of the result."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from stages.formats.shards import read_rejects
from tests.conftest import changed_params
from tests.faults import FaultProxy
from tests.project import SETTINGS, Clone, Project

yaml = YAML(typ="safe", pure=True)
TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
# The params of the pipeline's tests, but with smaller shards and a smaller network.
KNOBS: dict[str, Any] = {
    **{key.lstrip("+"): yaml.load(value) for key, value in (one.split("=", 1) for one in SETTINGS)},
    "fetch.shard_bins": 8,
    "run.checkpoint_minutes": 1e-9,
    "train.resnet34.library": "transformers",
    "train.resnet34.config": TINY_RESNET,
}
NEXT_STAGE = "from stages.runtime.work import exclusive_run\nwith exclusive_run('next'): pass"
SECONDS = 600
#: The errors of `dvc repro` after a kill has damaged a file of DVC, and the commands that help.
REMEDIES = {
    "'./dvc.lock' validation failed": "rm dvc.lock",
    "'./dvc.lock' is invalid": "rm dvc.lock",
    "unable to read: 'dvc.lock'": "rm dvc.lock",
    "Unable to read RWLock-file": "rm .dvc/tmp/rwlock",
    "join() argument must be str": "find .dvc/cache/runs -type d -empty -delete",
}


class Run:
    """A command in the background. Its output goes into a file, which orphans may keep open."""

    def __init__(self, clone: Clone, *command: str) -> None:
        self.output = clone.folder.with_name(f"{clone.folder.name}-{time.monotonic_ns()}.txt")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=clone.folder,
                env=clone.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A session of its own, so that exactly its processes can be killed together.
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        return self.output.read_text("utf-8", errors="replace")

    def wait(self) -> int:
        """Wait for the end. Returns the exit code."""
        return self.process.wait(SECONDS)

    def kill(self, how: Callable[[int], None]) -> bool:
        """Kill the command. Returns False if it had already ended."""
        if self.process.poll() is not None:
            return False
        how(self.process.pid)
        self.wait()
        return True


class DisturbedClone(Clone):
    """A clone in which `dvc repro` is disturbed."""

    def __init__(self, clone: Clone, targets: tuple[str, ...], proxy: FaultProxy) -> None:
        super().__init__(clone.folder, clone.environment)
        self.targets = targets
        self.proxy = proxy
        #: The names of objects in finished shards.
        self.done: set[str] = set()
        #: The output of the last run that was finished.
        self.printed = ""

    def start(self) -> Run:
        return Run(self, "dvc", "repro", *self.targets)

    def finish(self) -> list[str]:
        """Run `dvc repro` to its end. Returns the commands of REMEDIES that were needed."""
        remedies: list[str] = []
        while (run := self.start()).wait() != 0:
            commands = {command for text, command in REMEDIES.items() if text in run.printed}
            assert commands - set(remedies), run.printed
            for command in commands:
                self.run(*command.split())
                remedies.append(command)
        self.printed = run.printed
        # Stages of killed runs are the processes whose current directory is this clone.
        orphans = [one for one in psutil.process_iter() if works_in(one, self.folder)]
        assert not psutil.wait_procs(orphans, SECONDS)[1]
        return remedies

    def repeated(self) -> list[str]:
        """Objects requested since the last call although their shards were already finished."""
        asked = set(self.proxy.take_requests())
        problems = [f"requested {name} again" for name in sorted(asked & self.done)]
        for stage, suffix in (("index", ".json"), ("fetch", ".jpg")):
            self.done |= {f"{one}{suffix}" for one in finished_ids(self.folder, stage)}
            if f"\n  {stage}:\n" in self.lock:
                self.done |= {name for name in asked if name.endswith(suffix)}
        return problems

    @property
    def lock(self) -> str:
        path = self.folder / "dvc.lock"
        return path.read_text("utf-8") if path.exists() else ""

    def files(self) -> dict[str, bytes]:
        """All files of the stages, after another stage has started, and DVC's lock."""
        self.run(sys.executable, "-c", NEXT_STAGE)
        return written(self.folder) | {"dvc.lock": self.lock.encode()}


class Lab:
    """Makes clones to disturb, and compares them with an undisturbed one."""

    def __init__(self, folder: Path, proxy: FaultProxy, *targets: str) -> None:
        folder.mkdir()
        self.targets = targets
        self.proxy = proxy
        self.project = Project(folder / "project", proxy.url)
        # Small parts, so that kills come between them.
        index = self.project.folder / "stages/index.py"
        code, changes = re.subn(r"PART_RECORDS = [\d_]+", "PART_RECORDS = 16", index.read_text())
        assert changes == 1
        index.write_text(code)
        values = changed_params(KNOBS | {"bucket.endpoint": proxy.url})
        yaml.dump(values, self.project.folder / "params.yaml")
        self.project.run("git", "commit", "--quiet", "--all", "--message", "Small parts")
        self.first = self.fresh("first")
        start = time.monotonic()
        assert self.first.finish() == []
        self.seconds = time.monotonic() - start
        self.undisturbed = self.first.files()

    def fresh(self, name: str = "clone") -> DisturbedClone:
        """A copy of the project in which nothing has run; replaces the last copy of that name."""
        folder = self.project.folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.project.folder, folder, symlinks=True)
        self.proxy.take_requests()
        return DisturbedClone(Clone(folder, self.project.environment), self.targets, self.proxy)

    def problems(self, clone: DisturbedClone) -> list[str]:
        """The problems of a clone in which everything has run to its end."""
        cache = damaged_objects(clone.folder / ".dvc/cache")
        return [*differences(self.undisturbed, clone.files()), *cache]


def finished_ids(folder: Path, stage: str) -> set[str]:
    """The bins of finished shards in .cache, including the rejected ones."""
    ids: set[str] = set()
    for path in folder.glob(f".cache/{stage}-*/shards/[!.]*"):
        ids |= set(pq.read_table(path, columns=["id"])["id"].to_pylist())
        rejects = read_rejects(path.parent.with_name("rejects") / f"{path.name}.csv")
        ids |= {reject.id for reject in rejects}
    return ids


def works_in(process: psutil.Process, folder: Path) -> bool:
    with suppress(psutil.Error):
        return process.cwd() == str(folder)
    return False


def kill_alone(pid: int) -> None:
    """Kill only DVC; its stage continues."""
    os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """Kill DVC and its stage."""
    os.killpg(pid, signal.SIGKILL)


def kill_stage(pid: int) -> None:
    """Kill the stage, if one is running; DVC notices."""
    for process in psutil.Process(pid).children(recursive=True):
        process.kill()


def terminate(pid: int) -> None:
    """Send SIGTERM to DVC and its stage, as when a machine shuts down."""
    os.killpg(pid, signal.SIGTERM)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def written(folder: Path) -> dict[str, bytes]:
    """All files that stages write, by path, including hidden ones and leftovers."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for part in ("data", "models", "reports", "audit", ".cache")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return [
        *(f"{path} is missing" for path in sorted(expected.keys() - found.keys())),
        *(f"{path} is left behind" for path in sorted(found.keys() - expected.keys())),
        *(f"{path} differs" for path in expected.keys() & found if expected[path] != found[path]),
    ]


def damaged_objects(cache: Path) -> list[str]:
    """The objects in DVC's cache whose name is not their MD5."""
    objects = [path for path in cache.glob("files/md5/*/*") if path.is_file()]
    assert objects
    return [
        f"{path} of the cache is damaged"
        for path in objects
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        != path.parent.name + path.name.removesuffix(".dir")
    ]
