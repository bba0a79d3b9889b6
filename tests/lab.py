"""A project in which DVC and its stages are disturbed, and what is wrong with it afterwards."""

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
# As the pipeline's tests have it, but with small shards, and a small network for a large one.
KNOBS: dict[str, Any] = {
    **{key.lstrip("+"): yaml.load(value) for key, value in (one.split("=", 1) for one in SETTINGS)},
    "fetch.shard_bins": 8,
    "run.checkpoint_minutes": 1e-9,
    "train.resnet34.library": "transformers",
    "train.resnet34.config": TINY_RESNET,
}
NEXT_STAGE = "from stages.runtime.work import exclusive_run\nwith exclusive_run('next'): pass"
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
    """A command that runs beside the test. Its output goes into a file, which orphans share."""

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
        """Whether it was still running."""
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
        #: The names of the objects whose shards are finished.
        self.done: set[str] = set()
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
        # The stages of killed runs are the processes whose current directory is here.
        orphans = [one for one in psutil.process_iter() if works_in(one, self.folder)]
        assert not psutil.wait_procs(orphans, SECONDS)[1]
        return remedies

    def repeated(self) -> list[str]:
        """Objects that were asked for since the last call, though their shard was finished then."""
        asked = set(self.proxy.take_requests())
        problems = [f"asked for {name} again" for name in sorted(asked & self.done)]
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
        """All that the stages have written, once another one has started, and DVC's lock."""
        self.run(sys.executable, "-c", NEXT_STAGE)
        return written(self.folder) | {"dvc.lock": self.lock.encode()}


class Lab:
    """Makes places to disturb, and knows what an undisturbed one has in the end."""

    def __init__(self, folder: Path, proxy: FaultProxy, *targets: str) -> None:
        folder.mkdir()
        self.targets = targets
        self.proxy = proxy
        self.project = Project(folder / "project", proxy.url)
        # Small parts, to be killed between them.
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

    def fresh(self, name: str = "place") -> Place:
        """A copy of the project in which nothing has run, instead of the last one of that name."""
        folder = self.project.folder.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.project.folder, folder, symlinks=True)
        self.proxy.take_requests()
        return Place(Clone(folder, self.project.environment), self.targets, self.proxy)

    def problems(self, place: Place) -> list[str]:
        """What is wrong in a place where all has run in the end."""
        cache = damaged_objects(place.folder / ".dvc/cache")
        return [*differences(self.undisturbed, place.files()), *cache]


def finished_ids(folder: Path, stage: str) -> set[str]:
    """The bins whose shards are finished in .cache, those that were rejected among them."""
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
    """DVC, whose stage continues."""
    os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """DVC and its stage."""
    os.killpg(pid, signal.SIGKILL)


def kill_stage(pid: int) -> None:
    """The stage, if one is running; DVC notices."""
    for process in psutil.Process(pid).children(recursive=True):
        process.kill()


def terminate(pid: int) -> None:
    """All, as a machine does that shuts down."""
    os.killpg(pid, signal.SIGTERM)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def written(folder: Path) -> dict[str, bytes]:
    """All files that stages write, hidden ones and leftovers too, by their paths."""
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
    """The objects of DVC's cache whose name isn't their MD5."""
    objects = [path for path in cache.glob("files/md5/*/*") if path.is_file()]
    assert objects
    return [
        f"{path} of the cache is damaged"
        for path in objects
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        != path.parent.name + path.name.removesuffix(".dir")
    ]
