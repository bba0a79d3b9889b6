"""The work that a killed run leaves to the next run."""

import errno
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from stages.runtime.work import FINISHED, exclusive_run, publish_folder, resumable, scratch
from tests.conftest import REPOSITORY


class StopError(Exception):
    """Raised to interrupt the work."""


def break_off(stage: str, key: str) -> Path:
    """The folder of a run that wrote one part and failed."""
    with suppress(StopError), resumable(stage, key) as folder:
        (folder / "part").write_text("done")
        raise StopError
    return folder


def finish(stage: str, key: str) -> Path:
    """The folder of a run that wrote one part and ended well."""
    with resumable(stage, key) as folder:
        (folder / "part").write_text("done")
    return folder


def left() -> list[str]:
    return sorted(path.name for path in Path(".cache").iterdir())


@pytest.fixture
def dvc(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment in which DVC runs a stage."""
    monkeypatch.setenv("DVC_STAGE", "fetch")
    monkeypatch.setenv("DVC_ROOT", str(workspace))


@pytest.mark.usefixtures("workspace")
def test_work_survives_a_failure_and_is_removed_when_a_run_succeeds() -> None:
    folder = break_off("fetch", "key")
    (folder / ".half.partial").write_text("half")
    with resumable("fetch", "key") as again:
        assert again == folder
        assert [path.name for path in folder.iterdir()] == ["part"]
    assert left() == []


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("stage", "key"), [("fetch", "other"), ("resize", "key")])
def test_work_on_other_inputs_starts_afresh_and_leaves_what_is_unfinished(
    stage: str, key: str
) -> None:
    folder = break_off("fetch", "key")
    with resumable(stage, key) as other:
        assert list(other.iterdir()) == []
    assert (folder / "part").exists()


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("package", "afresh"), [("formats", True), ("runtime", False)])
def test_changed_code_starts_afresh_if_it_decides_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, afresh: bool
) -> None:
    """This includes code that is imported only after the work has begun."""
    imported, module = (tmp_path / package / f"{name}.py" for name in ("imported", "later"))
    module.parent.mkdir()
    for path in (imported, module):
        path.write_text("changed = False\n")
    monkeypatch.setattr("stages.runtime.work.STAGES", tmp_path)
    monkeypatch.setattr(sys.modules["stages.runtime.files"], "__file__", str(imported))
    folder = break_off("fetch", "key")
    module.write_text("changed = True\n")
    assert (break_off("fetch", "key") != folder) == afresh


def write_lock(folder: Path, seconds: float) -> None:
    """Write dvc.lock, `seconds` after the work in the folder was finished."""
    Path("dvc.lock").touch()
    finished = (folder / FINISHED).stat().st_mtime
    os.utime("dvc.lock", (finished + seconds, finished + seconds))


@pytest.mark.usefixtures("dvc")
def test_finished_work_waits_until_dvc_has_its_outputs() -> None:
    folder = finish("fetch", "key")
    # DVC was killed after it had written dvc.lock for the previous stage.
    write_lock(folder, seconds=-1)
    with exclusive_run("fetch"), resumable("fetch", "key") as again:
        assert again == folder
        assert (again / "part").read_text() == "done"
    assert left() == [folder.name]
    # The same stage again, by `dvc repro --force`.
    write_lock(folder, seconds=1)
    with exclusive_run("fetch"), resumable("fetch", "key") as again:
        assert list(again.iterdir()) == []
    # Another stage, or this one on other inputs.
    other = finish("fetch", "other")
    assert left() == [other.name]
    with exclusive_run("resize"):
        assert not other.exists()
    assert left() == []


@pytest.mark.usefixtures("dvc")
def test_other_stages_leave_work_that_is_unfinished_or_in_use() -> None:
    unfinished_work, finished = break_off("fetch", "key"), finish("resize", "key")
    with FileLock(finished.with_suffix(".lock")), exclusive_run("report"):
        assert finished.exists()
    with exclusive_run("report"):
        assert not finished.exists()
    assert left() == [unfinished_work.name]


def test_an_experiment_in_a_copy_works_in_the_original_repository(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with resumable("fetch", "key") as folder:
        assert folder.parent == tmp_path / ".cache"
    assert list(workspace.iterdir()) == []


CODE = """\
from stages.runtime.work import exclusive_run, resumable
with {context} as folder:
    print('begun', flush=True)
    input()
"""


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("resumable('fetch', 'key')", "fetch: waiting for another run with the same inputs"),
        ("exclusive_run('fetch')", "fetch: waiting for another run of this stage"),
    ],
)
def test_a_second_run_waits_and_says_for_whom_but_not_for_a_killed_one(
    workspace: Path, context: str, expected: str
) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CODE.format(context=context)],
            cwd=workspace,
            env={"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start() as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "begun\n"
        with start() as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith(
                f"{expected}: process {holder.pid} on {socket.gethostname()}, since 2"
            )
            holder.kill()
            assert waiting.communicate("\n", timeout=60)[0] == "begun\n"
            assert waiting.returncode == 0
    assert [name for name in left() if name.endswith(".lock")] == []


def test_the_processes_of_one_training_do_not_wait_for_each_other(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with exclusive_run("train ../../vit"):
        monkeypatch.setenv("RANK", "1")
        with exclusive_run("train ../../vit"):
            assert [path.parent for path in workspace.rglob("*.lock")] == [workspace / ".cache"]


def test_scratch_is_empty_at_first_and_removed_at_the_end(workspace: Path) -> None:
    killed = workspace / ".cache/report.scratch"
    killed.mkdir(parents=True)
    (killed / "left").touch()
    with scratch("report") as folder:
        assert folder.resolve() == killed
        assert list(folder.iterdir()) == []
        (folder / "figure").touch()
    assert not killed.exists()


@pytest.mark.parametrize("before", [[], ["stale"]])
@pytest.mark.parametrize("links", [True, False])
def test_a_published_folder_has_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str], links: bool
) -> None:
    done, out = tmp_path / "done", tmp_path / "data/raw"
    done.mkdir()
    (done / "part").write_text("done")
    (done / ".half").write_text("half")
    for name in before:
        out.mkdir(parents=True)
        (out / name).touch()
    if not links:
        monkeypatch.setattr("os.link", refuse_link)
    publish_folder(done, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"part": "done"}
    # With links, it takes its space on the disk once.
    assert (out / "part").samefile(done / "part") == links
    assert list(out.parent.iterdir()) == [out]


def refuse_link(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_copy_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, out = tmp_path / "done", tmp_path / "out"
    for folder, text in ((done, "new"), (out, "old")):
        folder.mkdir()
        (folder / "part").write_text(text)
    monkeypatch.setattr("stages.runtime.work.flush", refuse_link)
    with pytest.raises(OSError, match="not permitted"):
        publish_folder(done, out)
    assert (out / "part").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [done, out]
