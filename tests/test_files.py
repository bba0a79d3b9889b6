import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from stages.core.files import (
    DAYS_KEPT,
    atomic_write,
    cache_folder,
    digest,
    digest_files,
    publish_folder,
    sha256_file,
    unfinished,
    write_csv,
    write_json,
)
from tests.conftest import REPOSITORY


class StopError(Exception):
    """What breaks the work in these tests."""


def fail_while_writing(path: Path) -> None:
    with suppress(StopError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise StopError


def fail_while_working(stage: str, key: str, part: str) -> Path:
    """The folder of a run that wrote one part and failed."""
    with suppress(StopError), unfinished(stage, key) as folder:
        (folder / part).write_text("done")
        raise StopError
    return folder


def test_a_written_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    fail_while_writing(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    fail_while_writing(tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_hard_link_into_the_cache_keeps_its_bytes(tmp_path: Path) -> None:
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_text("old")
    out.hardlink_to(cached)
    with atomic_write(out) as temporary:
        temporary.write_text("new")
    assert (cached.read_text(), out.read_text()) == ("old", "new")


def test_json_is_readable_utf8(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"name": "Thé", "bins": 3})
    assert path.read_bytes() == '{\n  "name": "Thé",\n  "bins": 3\n}\n'.encode()


def test_csv_has_six_digits_and_unix_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    table = pd.DataFrame({"id": ["00100", "100"], "share": [1 / 3, 1234567.0], "bins": [7, 10**9]})
    write_csv(path, table)
    assert path.read_bytes() == (b"id,share,bins\n00100,0.333333,7\n100,1.23457e+06,1000000000\n")


def test_digests_tell_apart_what_differs() -> None:
    parts: list[tuple[object, ...]] = [(), ("a",), ("a", "b"), ("ab",), (1,), ("1",), (("a",),)]
    assert len({digest(*some) for some in parts}) == len(parts)
    assert digest("a", 1) == digest("a", 1)


def test_a_file_has_the_sha256_that_sha256sum_prints(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")


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
    monkeypatch.setattr("stages.core.files.STAGES", tmp_path)
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


def start_work(folder: Path) -> subprocess.Popen[str]:
    """A run that says what parts it finds, makes one, and waits for a line before it ends."""
    code = (
        "from stages.core.files import unfinished\n"
        "with unfinished('fetch', 'key') as folder:\n"
        "    print([part.name for part in folder.iterdir()])\n"
        "    (folder / 'part').touch()\n"
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
    first = start_work(workspace)
    assert first.stdout is not None
    assert first.stdout.readline() == "[]\n"
    second = start_work(workspace)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("fetch: waiting for another run")
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


def write_texts(folder: Path, texts: dict[str, str]) -> list[Path]:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_files_have_the_digest_of_their_names_and_contents(tmp_path: Path) -> None:
    some = {"a": "1", "b": "2"}
    digests = [
        digest_files(write_texts(tmp_path / str(number), texts))
        for number, texts in enumerate(
            [
                some,
                some,
                {"a": "1", "b": "3"},
                {"a": "1", "c": "2"},
                {"b": "1", "a": "2"},
                {"a": "1"},
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert digest_files(iter([])) == digest_files([])


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
    assert not done.exists()
