"""Two runs at once: one waits for the other, the outputs are right and the cache is intact."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.lab import Run, damaged_objects, kill_alone, wait_for
from tests.project import Clone, Project

pytestmark = pytest.mark.slow
yaml = YAML(typ="safe", pure=True)
QUALITY = 80
REPRO = ["dvc", "repro", "resize"]
EXPERIMENT = ["dvc", "exp", "run", "--temp", "--set-param", f"resize.quality={QUALITY}", "resize"]


def copy_of(project: Project, folder: Path) -> Clone:
    """A copy of the project with its fetched photographs, but with an empty DVC cache."""
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("cache"), symlinks=True)
    return Clone(folder, project.environment)


def change_quality(clone: Clone) -> None:
    """Change a param, so that resize has to run."""
    params = yaml.load(clone.folder / "params.yaml")
    params["resize"]["quality"] = QUALITY
    yaml.dump(params, clone.folder / "params.yaml")


@pytest.fixture
def clone(project: Project, tmp_path: Path) -> Clone:
    return copy_of(project, tmp_path / "clone")


@pytest.fixture(scope="module")
def resized(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of a single run."""
    clone = copy_of(project, tmp_path_factory.mktemp("alone") / "clone")
    change_quality(clone)
    clone.run(*REPRO)
    return outputs(clone)


def outputs(clone: Clone) -> dict[str, bytes]:
    folder = clone.folder / "data/resized"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def held_up(clone: Clone, lock: str) -> Iterator[int]:
    """Wait until a stage has this lock, and suspend it during the block. Yields its process id."""
    wait_for(lambda: "process" in "".join(text_of(path) for path in clone.folder.glob(lock)))
    (path,) = clone.folder.glob(lock)
    pid = int(path.read_text("utf-8").split()[1])
    stage = psutil.Process(pid)
    stage.suspend()
    try:
        yield pid
    finally:
        stage.resume()


def text_of(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def waits(run: Run, stage: int, which: str) -> bool:
    """Whether the run's stage has printed that it waits for the process `stage`, and since when."""
    holder = f"process {stage} on {socket.gethostname()}, since 2"
    return f"resize: waiting for another run {which}: {holder}" in run.printed


def test_dvc_refuses_a_second_run_and_names_the_first(
    clone: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(clone)
    first = Run(clone, *REPRO)
    with held_up(clone, ".cache/resize.run.lock"):
        second = Run(clone, *REPRO)
        assert second.wait() != 0
    assert "is busy, it is being blocked by:" in second.printed
    assert f"(PID {first.process.pid}): " in second.printed
    assert first.wait() == 0, first.printed
    assert outputs(clone) == resized
    assert damaged_objects(clone.folder / ".dvc/cache") == []


def test_a_run_waits_for_a_stage_that_has_outlived_its_dvc(
    clone: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(clone)
    first = Run(clone, *REPRO)
    with held_up(clone, ".cache/resize.run.lock") as orphan:
        first.kill(kill_alone)
        second = Run(clone, *REPRO)
        wait_for(lambda: waits(second, orphan, "of this stage") or second.process.poll())
    assert second.wait() == 0, second.printed
    assert waits(second, orphan, "of this stage")
    assert outputs(clone) == resized
    assert damaged_objects(clone.folder / ".dvc/cache") == []


def test_two_experiments_with_the_same_inputs_do_the_work_once(
    clone: Clone, resized: dict[str, bytes]
) -> None:
    first = Run(clone, *EXPERIMENT, "--name", "first")
    with held_up(clone, ".cache/resize-*.lock") as stage:
        second = Run(clone, *EXPERIMENT, "--name", "second")
        wait_for(lambda: waits(second, stage, "with the same inputs") or second.process.poll())
    for run in (first, second):
        assert run.wait() == 0, run.printed
    assert waits(second, stage, "with the same inputs")
    assert damaged_objects(clone.folder / ".dvc/cache") == []
    found = [resized_by(clone, name) for name in ("first", "second")]
    change_quality(clone)
    assert "is cached - skipping run" in clone.run(*REPRO)
    assert outputs(clone) == resized
    assert found == 2 * [clone.locked()["data/resized"]]


def resized_by(clone: Clone, experiment: str) -> str:
    """The MD5 of data/resized in the experiment."""
    (reference,) = clone.run(
        "git", "for-each-ref", "--format=%(refname)", f"refs/exps/**/{experiment}"
    ).split()
    lock = yaml.load(clone.run("git", "show", f"{reference}:dvc.lock"))
    md5: str = next(
        out["md5"] for out in lock["stages"]["resize"]["outs"] if out["path"] == "data/resized"
    )
    return md5


def test_two_runs_that_start_at_the_same_moment_leave_the_right_outputs(
    clone: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(clone)
    runs = [Run(clone, *REPRO), Run(clone, *REPRO)]
    codes = [run.wait() for run in runs]
    assert 0 in codes
    for run, code in zip(runs, codes, strict=True):
        refused = "is busy" in run.printed or "Unable to acquire lock" in run.printed
        assert refused == (code != 0), run.printed
    assert outputs(clone) == resized
    assert damaged_objects(clone.folder / ".dvc/cache") == []
