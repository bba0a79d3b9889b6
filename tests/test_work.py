import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from stages.runtime.work import (
    DAYS_KEPT,
    cache_folder,
    only_run_here,
    publish_folder,
    scratch,
    unfinished,
)
from tests.conftest import REPOSITORY


class StopError(Exception):
    """What breaks the work in these tests."""


def fail_while_working(stage: str, key: str, part: str) -> Path:
    """The folder of a run that wrote one part and failed."""
    with suppress(StopError), unfinished(stage, key) as folder:
        (folder / part).write_text("done")
        raise StopError
    return folder


def test_finished_work_leaves_nothing_behind(workspace: Path) -> None:
    with unfinished("fetch", "key") as folder:
        (folder / "part").write_text("done")
    assert list((workspace / ".cache").iterdir()) == []


def test_work_survives_a_failure_and_is_found_again(workspace: Path) -> None:
    folder = fail_while_working("fetch", "key", "part")
    with unfinished("fetch", "key") as again:
        assert again == folder
        assert (again / "part").read_text() == "done"
    assert list((workspace / ".cache").iterdir()) == []


@pytest.mark.parametrize(("stage", "key"), [("fetch", "other"), ("resize", "key")])
def test_work_on_other_inputs_starts_afresh(workspace: Path, stage: str, key: str) -> None:
    folder = fail_while_working("fetch", "key", "part")
    with unfinished(stage, key) as other:
        assert list(other.iterdir()) == []
    assert (workspace / folder / "part").exists()


def test_work_of_another_version_of_the_code_starts_afresh(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = fail_while_working("fetch", "key", "part")
    (tmp_path / "stage.py").write_text("changed = True")
    monkeypatch.setattr("stages.runtime.work.STAGES", tmp_path)
    with unfinished("fetch", "key") as changed:
        assert changed != folder
    assert (workspace / folder).is_dir()


def test_an_experiment_in_a_copy_works_in_the_original_repository(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(repository))
    with unfinished("fetch", "key") as folder:
        assert folder.parent == repository / ".cache"
    assert list(workspace.iterdir()) == []


def start_work(folder: Path, context: str) -> subprocess.Popen[str]:
    """A run that says what parts it finds, if it has a folder, and waits for a line."""
    code = (
        "from stages.runtime.work import only_run_here, unfinished\n"
        f"with {context} as folder:\n"
        "    print('begun' if folder is None else [part.name for part in folder.iterdir()])\n"
        "    if folder is not None: (folder / 'part').touch()\n"
        "    input()"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_run_on_the_same_inputs_waits_for_the_first(workspace: Path) -> None:
    first = start_work(workspace, "unfinished('fetch', 'key')")
    assert first.stdout is not None
    assert first.stdout.readline() == "[]\n"
    second = start_work(workspace, "unfinished('fetch', 'key')")
    assert second.stdout is not None
    said = second.stdout.readline()
    assert said.startswith("fetch: waiting for another run with the same inputs: process ")
    assert f"process {first.pid} on" in said
    first.communicate("\n", timeout=20)
    # The first has ended, and with it its parts.
    assert second.communicate("\n", timeout=20)[0] == "[]\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert list((workspace / ".cache").iterdir()) == []


def make_old(folder: Path, days: float) -> None:
    """As if nothing in the folder had changed for so many days."""
    then = time.time() - days * 24 * 3600
    for path in [*folder.iterdir(), folder]:
        os.utime(path, (then, then))


def finish(stage: str, key: str) -> None:
    with unfinished(stage, key):
        pass


@pytest.mark.usefixtures("workspace")
def test_what_other_inputs_left_long_ago_goes_when_a_run_ends_well() -> None:
    old, fresh = (fail_while_working("fetch", key, "part") for key in ("old", "fresh"))
    other_stage = fail_while_working("train-vit", "old", "part")
    make_old(old, DAYS_KEPT + 0.1)
    make_old(fresh, DAYS_KEPT - 0.1)
    make_old(other_stage, DAYS_KEPT + 100)

    fail_while_working("fetch", "another", "part")
    assert old.exists()
    finish("fetch", "key")

    assert not old.exists()
    assert not old.with_suffix(".lock").exists()
    assert (fresh / "part").read_text() == "done"
    assert (other_stage / "part").read_text() == "done"


@pytest.mark.usefixtures("workspace")
def test_an_old_folder_with_a_part_of_today_is_kept() -> None:
    folder = fail_while_working("fetch", "old", "part")
    make_old(folder, DAYS_KEPT + 100)
    (folder / "part").touch()

    finish("fetch", "key")

    assert (folder / "part").exists()


@pytest.mark.usefixtures("workspace")
def test_a_file_that_vanishes_in_another_runs_folder_does_no_harm() -> None:
    folder = fail_while_working("fetch", "other", "part")
    # What a listing still has, and the disk no more.
    (folder / "vanished").symlink_to("nowhere")

    finish("fetch", "key")

    assert (folder / "part").exists()


def test_the_cache_is_in_the_current_directory(workspace: Path) -> None:
    assert cache_folder().resolve() == workspace / ".cache"
    assert cache_folder().is_dir()


def test_the_cache_of_an_experiment_is_in_the_original_repository(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache"
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    "prepare",
    [
        lambda _: None,
        lambda out: out.mkdir(parents=True),
        lambda out: (out.mkdir(parents=True), (out / "stale").write_text("stale")),
    ],
    ids=["absent", "empty", "stale"],
)
def test_a_published_folder_is_the_whole_of_it(
    tmp_path: Path, prepare: Callable[[Path], object]
) -> None:
    done, out = tmp_path / "done", tmp_path / "data" / "raw"
    done.mkdir()
    (done / "part").write_text("done")
    prepare(out)
    publish_folder(done, out)
    assert [path.name for path in out.iterdir()] == ["part"]
    # Once on the disk, under both names.
    assert (out / "part").samefile(done / "part")
    assert [path.name for path in out.parent.iterdir()] == ["raw"]


def test_without_hard_links_a_folder_is_copied_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "done").mkdir()
    (tmp_path / "done/part").write_text("done")
    publish_folder(tmp_path / "done", tmp_path / "out")
    for folder in ("done", "out"):
        assert (tmp_path / folder / "part").read_text() == "done"


def work_for_dvc(stage: str, key: str) -> Path:
    """A stage whose work ended well; the folder of its work."""
    with unfinished(stage, key) as folder:
        (folder / "part").write_text("done")
    return folder


def commit(repository: Path) -> None:
    """As DVC does after each stage, be its entry another or not."""
    (repository / "dvc.lock").write_text("schema: '2.0'\n")


@pytest.fixture
def as_dvc_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_STAGE", "fetch")
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    return workspace


def test_work_waits_until_dvc_has_its_outputs(as_dvc_runs: Path) -> None:
    folder = work_for_dvc("fetch", "key")
    assert (folder / "part").exists()
    # DVC was killed before it wrote its lock: the next run finds everything done.
    with unfinished("fetch", "key") as again:
        assert (again / "part").read_text() == "done"
    commit(as_dvc_runs)
    with only_run_here("resize"):
        assert not folder.exists()
    assert list((as_dvc_runs / ".cache").iterdir()) == []


def test_once_dvc_has_the_outputs_the_work_is_done_anew(as_dvc_runs: Path) -> None:
    commit(as_dvc_runs)
    work_for_dvc("fetch", "key")
    commit(as_dvc_runs)
    with unfinished("fetch", "key") as folder:
        assert list(folder.iterdir()) == []


def test_a_run_of_another_stage_leaves_work_that_dvc_does_not_have(as_dvc_runs: Path) -> None:
    commit(as_dvc_runs)
    folder = work_for_dvc("fetch", "key")
    with only_run_here("pretrained vit"):
        assert (folder / "part").exists()


def test_the_work_of_an_experiment_waits_for_the_lock_of_its_own_copy(
    as_dvc_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    folder = work_for_dvc("fetch", "key")
    assert folder.parent == as_dvc_runs / ".cache"
    # Another copy's lock says nothing of this one.
    commit(as_dvc_runs)
    with unfinished("resize", "key"):
        assert folder.exists()
    copy.rename(tmp_path / "gone")
    monkeypatch.chdir(as_dvc_runs)
    with unfinished("resize", "key"):
        assert not folder.exists()


@pytest.mark.usefixtures("workspace")
def test_a_second_run_of_a_stage_in_the_same_folder_waits_and_says_for_whom() -> None:
    first = start_work(Path.cwd(), "only_run_here('subset')")
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    second = start_work(Path.cwd(), "only_run_here('subset')")
    assert second.stdout is not None
    said = second.stdout.readline()
    assert said.startswith("subset: waiting for another run of this stage: process ")
    assert f"process {first.pid} on {socket.gethostname()}, since 2" in said
    first.communicate("\n", timeout=20)
    assert second.communicate("\n", timeout=20)[0] == "begun\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert list(Path(".cache").iterdir()) == []


@pytest.mark.usefixtures("workspace")
def test_a_killed_run_keeps_nobody_waiting() -> None:
    first = start_work(Path.cwd(), "only_run_here('subset')")
    assert first.stdout is not None
    first.stdout.readline()
    first.kill()
    first.communicate(timeout=20)
    with only_run_here("subset"):
        pass
    assert list(Path(".cache").iterdir()) == []


def test_the_processes_of_one_training_do_not_wait_for_each_other(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_run_here("train vit"):
        monkeypatch.setenv("RANK", "1")
        with only_run_here("train vit"):
            assert [path.name for path in (workspace / ".cache").iterdir()] == [
                "train-vit.run.lock"
            ]


def test_the_name_of_a_lock_is_no_path(workspace: Path) -> None:
    with only_run_here("train ../../vit"):
        assert len(list((workspace / ".cache").iterdir())) == 1


def test_scratch_is_empty_at_first_and_gone_at_last(workspace: Path) -> None:
    killed = workspace / ".cache/report.scratch"
    killed.mkdir(parents=True)
    (killed / "left").touch()
    with scratch("report") as folder:
        assert folder.resolve() == killed
        assert list(folder.iterdir()) == []
        (folder / "figure").touch()
    assert not killed.exists()
