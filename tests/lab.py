"""A project in which DVC and its stages are disturbed, and what is wrong with it afterwards."""

import hashlib
import os
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
from tests.faults import FaultProxy
from tests.made import TINY_RESNET, write_params
from tests.project import SETTINGS, Clone, Project

yaml = YAML(typ="safe", pure=True)
# As the pipeline's tests have it, but with a small network for a large one.
KNOBS: dict[str, Any] = {
    **{key.lstrip("+"): yaml.load(value) for key, value in (one.split("=", 1) for one in SETTINGS)},
    "fetch.shard_bins": 8,
    "run.checkpoint_minutes": 1e-9,
    "train.resnet34.library": "transformers",
    "train.resnet34.config": TINY_RESNET,
}
# In the project's code: small parts, and few requests at once, to be killed between them.
CHANGES = {
    "stages/index.py": ("PART_RECORDS = 10_000", "PART_RECORDS = 16"),
    "stages/collecting/bucket.py": ("IN_FLIGHT = 256", "IN_FLIGHT = 4"),
}
WRITTEN = ["data", "models", "reports", ".cache"]
NEXT_STAGE = "from stages.runtime.work import only_run_here\nwith only_run_here('next'): pass"
SECONDS = 600
#: What `dvc repro` says where a kill has cut a file of DVC's own, and what to do then.
REMEDIES = {
    "'./dvc.lock' validation failed": "rm dvc.lock",
    "'./dvc.lock' is invalid": "rm dvc.lock",
    "unable to read: 'dvc.lock'": "rm dvc.lock",
    "Unable to read RWLock-file": "rm .dvc/tmp/rwlock",
    "join() argument must be str": "find .dvc/cache/runs -type d -empty -delete",
}


class Run:
    """A command that goes on beside the test. Its output goes into a file, which orphans share."""

    def __init__(self, place: Clone, *command: str) -> None:
        self.output = place.folder.with_name(f"{place.folder.name}-{time.monotonic_ns()}.txt")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=place.folder,
                env=place.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # So that all its processes can be killed at once, and no others.
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.output.read_text("utf-8", errors="replace")

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(SECONDS)

    def kill(self, how: Callable[[int], None]) -> bool:
        """Whether it still ran."""
        if self.process.poll() is not None:
            return False
        how(self.process.pid)
        self.wait()
        return True


class Place(Clone):
    """A clone in which `dvc repro` runs, and is killed."""

    def __init__(self, clone: Clone, targets: tuple[str, ...], proxy: FaultProxy) -> None:
        super().__init__(clone.folder, clone.environment)
        self.targets = targets
        self.proxy = proxy
        #: The names of the objects whose shards are finished, and of those that were asked for.
        self.done: set[str] = set()
        self.asked: set[str] = set()
        #: By the last run that was finished.
        self.said = ""

    def start(self) -> Run:
        return Run(self, "dvc", "repro", *self.targets)

    def finish(self) -> list[str]:
        """Run it to its end; the commands of REMEDIES that this took."""
        remedies: list[str] = []
        while (run := self.start()).wait() != 0:
            commands = {command for text, command in REMEDIES.items() if text in run.said}
            assert commands - set(remedies), run.said
            for command in commands:
                self.run(*command.split())
                remedies.append(command)
        self.said = run.said
        self.wait_for_orphans()
        return remedies

    def wait_for_orphans(self) -> None:
        """For the stages of killed runs, which are the ones whose current directory is here."""
        orphans = [one for one in psutil.process_iter() if works_in(one, self.folder)]
        _, left = psutil.wait_procs(orphans, SECONDS)
        assert not left

    def repeated(self) -> list[str]:
        """Objects that were asked for since the last call, though their shard was finished then."""
        done = self.finished()
        asked = set(self.proxy.take_requests())
        problems = [f"asked for {name} again" for name in sorted(asked & self.done)]
        self.asked |= asked
        self.done |= done
        return problems

    def finished(self) -> set[str]:
        done = set()
        for stage, suffix in (("index", ".json"), ("fetch", ".jpg")):
            if f"\n  {stage}:\n" in self.lock:
                done |= {name for name in self.asked if name.endswith(suffix)}
            for path in self.folder.glob(f".cache/{stage}-*/shards/[!.]*"):
                rejects = read_rejects(path.parent.with_name("rejects") / f"{path.name}.csv")
                ids = pq.read_table(path, columns=["id"])["id"].to_pylist()
                done |= {f"{name}{suffix}" for name in [*ids, *(one.id for one in rejects)]}
        return done

    @property
    def lock(self) -> str:
        path = self.folder / "dvc.lock"
        return path.read_text("utf-8") if path.exists() else ""

    def files(self) -> dict[str, bytes]:
        """All that the stages have written, once a next one has begun, and DVC's lock."""
        self.run(sys.executable, "-c", NEXT_STAGE)
        return contents(self.folder, WRITTEN) | {"dvc.lock": self.lock.encode()}


class Lab:
    """Makes places to disturb, and knows what an undisturbed one has in the end."""

    def __init__(self, folder: Path, endpoint: str, proxy: FaultProxy, *targets: str) -> None:
        folder.mkdir()
        self.targets = targets
        self.proxy = proxy
        self.project = Project(folder / "project", endpoint)
        for name, (before, after) in CHANGES.items():
            path = self.project.folder / name
            code = path.read_text("utf-8")
            assert before in code, f"{name} has no {before}"
            path.write_text(code.replace(before, after), "utf-8")
        write_params(self.project.folder, KNOBS | {"bucket.endpoint": proxy.url})
        self.project.run("git", "commit", "--quiet", "--all", "--message", "Small parts")
        self.first = self.fresh("first")
        start = time.monotonic()
        assert self.first.finish() == []
        self.seconds = time.monotonic() - start
        self.undisturbed = self.first.files()

    def fresh(self, name: str = "place") -> Place:
        """A copy of the project in which nothing has run, instead of the last one of that name."""
        folder = self.project.folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.project.folder, folder, symlinks=True)
        self.proxy.take_requests()
        return Place(Clone(folder, self.project.environment), self.targets, self.proxy)

    def problems(self, place: Place) -> list[str]:
        """What is wrong in a place where all has run in the end."""
        return [
            *place.repeated(),
            *differences(self.undisturbed, place.files()),
            *damaged_objects(place.folder / ".dvc/cache"),
        ]


def works_in(process: psutil.Process, folder: Path) -> bool:
    with suppress(psutil.Error):
        return process.cwd() == str(folder)
    return False


def kill_alone(pid: int) -> None:
    """DVC, whose stage goes on."""
    os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """DVC and its stage."""
    os.killpg(pid, signal.SIGKILL)


def kill_stage(pid: int) -> None:
    """The stage, if one runs now; DVC notices."""
    for process in psutil.Process(pid).children(recursive=True):
        process.kill()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def contents(folder: Path, parts: list[str]) -> dict[str, bytes]:
    """All files below these parts of a folder, hidden ones too, by their paths in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for part in parts
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return [
        *(f"{path} is missing" for path in sorted(expected.keys() - found.keys())),
        *(f"{path} is left behind" for path in sorted(found.keys() - expected.keys())),
        *(f"{path} differs" for path in expected if expected[path] != found.get(path, b"")),
    ]


def damaged_objects(cache: Path) -> list[str]:
    """The objects of DVC's cache whose name is not their MD5."""
    objects = [path for path in cache.glob("files/md5/*/*") if path.is_file()]
    assert objects
    return [
        f"{path} of the cache is damaged"
        for path in objects
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        != path.parent.name + path.name.removesuffix(".dir")
    ]
