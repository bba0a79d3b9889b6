import errno
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError

from stages import fetch, resize
from stages.formats.shards import shard_paths
from stages.imaging import jpeg
from stages.runtime.files import atomic_write, write_text
from stages.runtime.space import DiskFullError, is_disk_full, readable, require_space, space_for
from stages.runtime.work import publish_folder
from tests.conftest import folder_bucket, objects_of
from tests.test_fetch import prepare as prepare_fetch
from tests.test_resize import photographs
from tests.test_resize import prepare as prepare_resize
from tools.drawing import DrawnBin

Usage = namedtuple("Usage", ["total", "used", "free"])
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded", "data/split.csv"),
    # As safetensors raises it.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]
OTHERS = [
    OSError(errno.EIO, "Input/output error"),
    ValueError("28"),
    SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
]
Leave = Callable[[int], None]


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Leave:
    """Makes every disk one with so many bytes free, to who asks."""

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - free, free))

    return leave


def test_there_is_room_for_what_just_fits(leave: Leave, tmp_path: Path) -> None:
    leave(1000)
    require_space(tmp_path, 1000, "the photographs")
    with pytest.raises(DiskFullError):
        require_space(tmp_path, 1001, "the photographs")


def test_what_is_missing_is_named_with_figures(leave: Leave, tmp_path: Path) -> None:
    leave(3_000_000_000)
    with pytest.raises(DiskFullError) as caught:
        require_space(tmp_path, 12_500_000_000, "the photographs")
    assert str(caught.value) == (
        f"no room for the photographs (about 12.5 GB): the disk of {tmp_path} has 3.0 GB"
        " free; make room for 9.5 GB, and run again"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (57_000, "57.0 kB"),
        (343_000_000, "343.0 MB"),
        (12_540_000_000, "12.5 GB"),
    ],
)
def test_bytes_are_counted_as_people_do(count: int, text: str) -> None:
    assert readable(count) == text


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_known_by_what_any_library_raises(
    leave: Leave, tmp_path: Path, error: Exception
) -> None:
    leave(500)
    assert is_disk_full(error)
    with pytest.raises(DiskFullError) as caught, space_for(tmp_path / "out", 800):
        raise error
    assert str(caught.value) == (
        f"no room for {tmp_path / 'out'} (about 800 bytes): the disk of {tmp_path} has"
        " 500 bytes free; make room for 300 bytes, and run again"
    )


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    assert not is_disk_full(error)
    with pytest.raises(type(error)) as caught, space_for(tmp_path / "out", 800):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("size", [0, 400])
def test_where_the_size_is_unknown_or_not_all_no_figure_is_made_up(
    leave: Leave, tmp_path: Path, size: int
) -> None:
    leave(500)
    with pytest.raises(DiskFullError) as caught, space_for(tmp_path / "out", size):
        raise FULL[0]
    takes = " (about 400 bytes)" if size else ""
    assert str(caught.value) == (
        f"no room for {tmp_path / 'out'}{takes}: the disk of {tmp_path} has 500 bytes free; make"
        " room, and run again"
    )


def refuse_flush(descriptor: int) -> None:
    """As disks of other machines do, which take what is written before they have room for it."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise FULL[0]


def test_a_disk_that_says_so_late_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", refuse_flush)
    with pytest.raises(DiskFullError, match=r"no room for .*out\.txt \(about 3 bytes\)"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_says_so_late_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, out = tmp_path / "done", tmp_path / "out"
    for folder, text in ((done, "new"), (out, "old")):
        folder.mkdir()
        (folder / "part").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse_flush)
        with pytest.raises(DiskFullError, match=r"no room for .*out \(about 3 bytes\)"):
            publish_folder(done, out)
    assert (out / "part").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "out"]
    publish_folder(done, out)
    assert (out / "part").read_text() == "new"


def test_the_room_of_what_was_half_written_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_usage(_: Path) -> Usage:
        return Usage(10, 0, 10 - sum(path.stat().st_size for path in tmp_path.iterdir()))

    def write_half() -> None:
        with atomic_write(tmp_path / "out", 12) as temporary:
            temporary.write_text("half")
            raise FULL[0]

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(DiskFullError, match="has 10 bytes free; make room for 2 bytes"):
        write_half()


@pytest.mark.usefixtures("workspace")
def test_fetch_wants_room_for_the_photographs_that_are_not_there_yet(
    tmp_path: Path, drawn: list[DrawnBin], leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(drawn[:40]))
    prepare_fetch(bucket, drawn[:40], shard_bins=10)
    sizes = [len(one.photograph) for one in sorted(drawn[:40], key=lambda one: one.id)]
    leave(sum(sizes) - 1)
    with pytest.raises(DiskFullError) as caught:
        fetch.main()
    assert f"(about {readable(sum(sizes))}): " in str(caught.value)
    assert "make room for 1 bytes" in str(caught.value)

    # A run that was killed, and then one that finds the first three shards.
    leave(sum(sizes))
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "publish_folder", stop)
        with pytest.raises(StopError):
            fetch.main()
    (last,) = Path(".cache").glob("fetch-*/shards/00003.parquet")
    last.unlink()
    leave(sum(sizes[30:]) - 1)
    with pytest.raises(DiskFullError, match="make room for 1 bytes"):
        fetch.main()
    leave(sum(sizes[30:]))
    fetch.main()


class StopError(Exception):
    """What breaks the work in these tests."""


def stop(*_: object) -> None:
    raise StopError


@pytest.mark.usefixtures("workspace")
def test_a_photograph_too_large_to_be_fetched_wants_no_room(
    tmp_path: Path, drawn: list[DrawnBin], leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(drawn[:5]))
    prepare_fetch(bucket, drawn[:5], max_rejects=1.0)
    *fitting, largest = sorted(len(one.photograph) for one in drawn[:5])
    monkeypatch.setattr(fetch, "MAX_PHOTOGRAPH_BYTES", largest - 1)
    leave(sum(fitting))
    fetch.main()


@pytest.mark.usefixtures("workspace")
def test_resize_wants_room_for_as_much_as_a_sample_tells(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resize, "SAMPLE", 2)
    shards = [photographs("00001", "00002", "00003"), photographs("00004", "00005")]
    prepare_resize(shards)
    sample = [
        len(jpeg.encode(jpeg.resize(jpeg.decode(data), 32, "squeeze"), 90))
        for data in list(shards[0].values())[:2]
    ]
    needed = 5 * sum(sample) // 2
    leave(needed - 1)
    with pytest.raises(DiskFullError) as caught:
        resize.main()
    assert f"the resized photographs (about {readable(needed)}): " in str(caught.value)
    assert "make room for 1 bytes" in str(caught.value)
    leave(needed)
    resize.main()
    assert sum(map(pq_rows, shard_paths(Path("data/resized")))) == 5


def pq_rows(path: Path) -> int:
    table: pa.Table = pq.read_table(path)
    return len(table)
