"""Files that are complete or absent, digests, and checks of free space."""

import errno
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from stages.formats.tables import write_csv, write_json
from stages.runtime.errors import UserError
from stages.runtime.files import atomic_write, digest, digest_files, sha256_file, write_text
from stages.runtime.space import readable, require_space
from stages.runtime.work import publish_folder

Usage = namedtuple("Usage", ["total", "used", "free"])
Events = list[tuple[str, Path]]


def write_and_fail(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("broken off")


def texts_in(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.iterdir()]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_written_file_is_whole_and_alone(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "deep/out.txt"
    if before is not None:
        write_text(path, before)
    with pytest.raises(RuntimeError, match="broken off"):
        write_and_fail(path)
    assert texts_in(path.parent) == ([before] if before else [])
    write_text(path, "new")
    assert texts_in(path.parent) == ["new"]


def test_a_hard_link_into_the_cache_keeps_its_bytes(tmp_path: Path) -> None:
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_text("old")
    out.hardlink_to(cached)
    write_text(out, "new")
    assert (cached.read_text(), out.read_text()) == ("old", "new")


def refuse_flush(descriptor: int) -> None:
    """Fail as on some disks, which accept data before they have room for it."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_only_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", refuse_flush)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out\.txt'"):
        write_text(path, "new")
    assert texts_in(tmp_path) == ["old"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """A list of all flushes, and of both names in each renaming, in their order."""
    happened: Events = []

    def recorded_fsync(descriptor: int) -> None:
        happened.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def recorded(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(source: Path, target: Path) -> None:
            rename(source, target)
            happened.extend([("rename", Path(source)), ("to", Path(target))])

        return call

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.rename", recorded(os.rename))
    monkeypatch.setattr("os.replace", recorded(os.replace))
    return happened


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_after_a_power_loss_a_file_with_its_final_name_is_whole(
    tmp_path: Path, events: Events, what: str
) -> None:
    """The contents are flushed before the file gets its name, and then its folder is flushed."""
    whole = tmp_path / "out"
    if what == "file":
        write_text(whole, "text")
    else:
        for name in ("model.safetensors", "config.json"):
            (tmp_path / "work").mkdir(exist_ok=True)
            (tmp_path / "work" / name).write_text("written by a library that doesn't flush")
        publish_folder(tmp_path / "work", whole)
    position = events.index(("to", whole))
    _, temporary = events[position - 1]
    parts = {temporary / path.relative_to(whole) for path in [whole, *whole.rglob("*")]}
    assert parts <= {path for event, path in events[:position] if event == "flush"}
    assert ("flush", tmp_path) in events[position:]


def test_tables_have_the_same_readable_bytes_everywhere(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", {"name": "Thé", "bins": 3})
    assert (tmp_path / "out.json").read_bytes() == '{\n  "name": "Thé",\n  "bins": 3\n}\n'.encode()
    table = pd.DataFrame({"id": ["00100", "100"], "share": [1 / 3, 1234567.0], "bins": [7, 10**9]})
    write_csv(tmp_path / "out.csv", table)
    written = (tmp_path / "out.csv").read_bytes()
    assert written == b"id,share,bins\n00100,0.333333,7\n100,1.23457e+06,1000000000\n"


def test_digests_of_different_values_differ(tmp_path: Path) -> None:
    parts: list[tuple[object, ...]] = [(), ("a",), ("a", "b"), ("ab",), (1,), ("1",), (("a",),)]
    assert len({digest(*some) for some in parts}) == len(parts)
    folders = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "1"}]
    found = set()
    for number, texts in enumerate([*folders, folders[0]]):
        files = [tmp_path / str(number) / name for name in texts]
        for file in files:
            write_text(file, texts[file.name])
        found.add(digest_files(files))
    assert len(found) == len(folders)
    write_text(tmp_path / "file", "abc")
    # The output of sha256sum.
    assert sha256_file(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_missing_space_is_reported_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 3_000_000_000))
    require_space(tmp_path, 3_000_000_000, "the photographs")
    with pytest.raises(UserError) as caught:
        require_space(tmp_path, 12_500_000_000, "the photographs")
    assert str(caught.value) == (
        f"no room for the photographs (about 12.5 GB): the disk of {tmp_path} has 3.0 GB free;"
        " free 9.5 GB more, and run again"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 bytes"), (1000, "1.0 kB"), (343_000_000, "343.0 MB")]
)
def test_sizes_are_written_in_the_usual_units(count: int, text: str) -> None:
    assert readable(count) == text
