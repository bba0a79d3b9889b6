"""Two runs at once: who waits for whom; the outputs are right and the cache is whole."""

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
    """The project, with the photographs that its run has fetched, and nothing in DVC's cache."""
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("cache"), symlinks=True)
    return Clone(folder, project.environment)


def change_quality(place: Clone) -> None:
    """So that resize has to run."""
    params = yaml.load(place.folder / "params.yaml")
    params["resize"]["quality"] = QUALITY
    yaml.dump(params, place.folder / "params.yaml")


@pytest.fixture
def place(project: Project, tmp_path: Path) -> Clone:
    return copy_of(project, tmp_path / "place")


@pytest.fixture(scope="module")
def resized(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run makes alone."""
    place = copy_of(project, tmp_path_factory.mktemp("alone") / "place")
    change_quality(place)
    place.run(*REPRO)
    return outputs(place)


def outputs(place: Clone) -> dict[str, bytes]:
    folder = place.folder / "data/resized"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def held_up(place: Clone, lock: str) -> Iterator[int]:
    """Wait until the stage has this lock, and stop it while the block runs; its process."""
    wait_for(lambda: "process" in "".join(text_of(path) for path in place.folder.glob(lock)))
    (path,) = place.folder.glob(lock)
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
    """Whether the run's stage has said that it waits for the process `stage`, and since when."""
    holder = f"process {stage} on {socket.gethostname()}, since 2"
    return f"resize: waiting for another run {which}: {holder}" in run.said


def test_dvc_refuses_a_second_run_and_names_the_first(
    place: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(place)
    first = Run(place, *REPRO)
    with held_up(place, ".cache/resize.run.lock"):
        second = Run(place, *REPRO)
        assert second.wait() != 0
    assert "is busy, it is being blocked by:" in second.said
    assert f"(PID {first.process.pid}): " in second.said
    assert first.wait() == 0, first.said
    assert outputs(place) == resized
    assert damaged_objects(place.folder / ".dvc/cache") == []


def test_a_run_beside_a_stage_that_dvc_has_left_behind_waits_for_it(
    place: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(place)
    first = Run(place, *REPRO)
    with held_up(place, ".cache/resize.run.lock") as orphan:
        first.kill(kill_alone)
        second = Run(place, *REPRO)
        wait_for(lambda: waits(second, orphan, "of this stage") or second.process.poll())
    assert second.wait() == 0, second.said
    assert waits(second, orphan, "of this stage")
    assert outputs(place) == resized
    assert damaged_objects(place.folder / ".dvc/cache") == []


def test_two_experiments_with_the_same_inputs_do_the_work_once(
    place: Clone, resized: dict[str, bytes]
) -> None:
    first = Run(place, *EXPERIMENT, "--name", "first")
    with held_up(place, ".cache/resize-*.lock") as stage:
        second = Run(place, *EXPERIMENT, "--name", "second")
        wait_for(lambda: waits(second, stage, "with the same inputs") or second.process.poll())
    for run in (first, second):
        assert run.wait() == 0, run.said
    assert waits(second, stage, "with the same inputs")
    assert damaged_objects(place.folder / ".dvc/cache") == []
    found = [resized_by(place, name) for name in ("first", "second")]
    change_quality(place)
    assert "is cached - skipping run" in place.run(*REPRO)
    assert outputs(place) == resized
    assert found == 2 * [place.locked()["data/resized"]]


def resized_by(place: Clone, experiment: str) -> str:
    """The MD5 of the experiment's output."""
    (reference,) = place.run(
        "git", "for-each-ref", "--format=%(refname)", f"refs/exps/**/{experiment}"
    ).split()
    lock = yaml.load(place.run("git", "show", f"{reference}:dvc.lock"))
    md5: str = next(
        out["md5"] for out in lock["stages"]["resize"]["outs"] if out["path"] == "data/resized"
    )
    return md5


def test_two_runs_that_start_at_the_same_moment_leave_the_right_outputs(
    place: Clone, resized: dict[str, bytes]
) -> None:
    change_quality(place)
    runs = [Run(place, *REPRO), Run(place, *REPRO)]
    codes = [run.wait() for run in runs]
    assert 0 in codes
    for run, code in zip(runs, codes, strict=True):
        refused = "is busy" in run.said or "Unable to acquire lock" in run.said
        assert refused == (code != 0), run.said
    assert outputs(place) == resized
    assert damaged_objects(place.folder / ".dvc/cache") == []
