import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import fetch, resize, split, subset
from stages.core.command import UserError
from stages.core.shards import (
    IMAGES,
    Reject,
    RejectLimit,
    Row,
    Shard,
    build_shards,
    read_rejects,
    shard_name,
    shard_paths,
    table_digest,
    whole_parquet,
    write_rejects,
    write_table,
)
from tests.conftest import write_params

Work = Callable[[int], Row | Reject]
SCHEMA = pa.schema([("id", pa.string())])
NO_LIMIT = RejectLimit("fetch.max_rejects", 1.0)


class StopError(Exception):
    """What breaks the work in these tests."""


def shards_of(total: int, size: int) -> list[Shard[int]]:
    numbers = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [
        Shard(shard_name(place), len(some), partial(list[int], some))
        for place, some in enumerate(numbers)
    ]


def build(
    folder: Path, shards: list[Shard[int]], work: Work, limit: RejectLimit = NO_LIMIT
) -> tuple[list[list[str]], list[Reject]]:
    """The ids in each shard, and the rejects."""
    done, rejects = build_shards(folder, shards, work, SCHEMA, limit, workers=3, window=6, unit="")
    return [pq.read_table(path)["id"].to_pylist() for path in shard_paths(done)], rejects


def keep(number: int) -> Row:
    return {"id": str(number)}


def reject_multiples(divisor: int, number: int) -> Row | Reject:
    return keep(number) if number % divisor else Reject(str(number), f"divides by {divisor}")


def fail_at(stop: int, number: int) -> Row | Reject:
    if number == stop:
        raise StopError
    return reject_multiples(3, number)


def test_shards_hold_the_items_in_order(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(8, 3), keep)
    assert ids == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert rejects == []


def test_rejects_are_left_out_and_returned_in_order(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(8, 3), partial(reject_multiples, 3))
    assert ids == [["1", "2"], ["4", "5"], ["7"]]
    assert rejects == [Reject(str(number), "divides by 3") for number in (0, 3, 6)]


def test_a_shard_of_rejects_alone_is_empty(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(4, 2), partial(reject_multiples, 1))
    assert ids == [[], []]
    assert len(rejects) == 4


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        build(tmp_path, shards_of(12, 3), partial(fail_at, 7))
    worked: list[int] = []

    def work(number: int) -> Row | Reject:
        worked.append(number)
        return reject_multiples(3, number)

    ids, rejects = build(tmp_path, shards_of(12, 3), work)
    assert sorted(worked) == list(range(6, 12))
    assert ids == [["1", "2"], ["4", "5"], ["7", "8"], ["10", "11"]]
    assert [reject.id for reject in rejects] == ["0", "3", "6", "9"]


def test_a_half_written_shard_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / f".{shard_name(0)}.partial").write_bytes(b"PAR1 half")
    ids, _ = build(tmp_path, shards_of(2, 2), keep)
    assert ids == [["0", "1"]]
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [shard_name(0)]


def test_too_many_rejects_stop_the_work_and_the_first_ten_are_named(tmp_path: Path) -> None:
    limit = RejectLimit("fetch.max_rejects", 0.25)
    with pytest.raises(UserError) as caught:
        build(tmp_path, shards_of(60, 40), partial(reject_multiples, 2), limit)
    text = str(caught.value)
    assert text.startswith("20 of 60 are unusable, more than fetch.max_rejects (0.25) allows.")
    named = [f"{number} (divides by 2)" for number in range(0, 20, 2)]
    assert ", ".join(named) in text
    assert "20 (divides by 2)" not in text
    assert "\n" not in text


def test_after_too_many_rejects_only_their_shards_are_tried_again(tmp_path: Path) -> None:
    def reject_after_five(number: int) -> Row | Reject:
        return keep(number) if number < 6 else Reject(str(number), "gone")

    with pytest.raises(UserError):
        build(tmp_path, shards_of(12, 3), reject_after_five, RejectLimit("k", 0.1))
    worked: list[int] = []

    def mended(number: int) -> Row:
        worked.append(number)
        return keep(number)

    ids, rejects = build(tmp_path, shards_of(12, 3), mended, RejectLimit("k", 0.1))
    assert sorted(worked) == list(range(6, 12))
    assert sum(ids, []) == [str(number) for number in range(12)]  # noqa: RUF017
    assert rejects == []


@pytest.mark.parametrize(
    ("share", "total", "rejected"), [(0.0, 10, 0), (0.01, 100, 1), (0.29, 100, 29), (1.0, 7, 7)]
)
def test_as_many_rejects_as_the_limit_are_allowed(
    tmp_path: Path, share: float, total: int, rejected: int
) -> None:
    def work(number: int) -> Row | Reject:
        return Reject(str(number), "gone") if number < rejected else keep(number)

    _, rejects = build(tmp_path, shards_of(total, total), work, RejectLimit("k", share))
    assert len(rejects) == rejected


@pytest.mark.parametrize(("share", "rejected"), [(0.0, 1), (0.01, 2), (0.29, 30)])
def test_one_more_than_the_limit_is_not(tmp_path: Path, share: float, rejected: int) -> None:
    def work(number: int) -> Row | Reject:
        return Reject(str(number), "gone") if number < rejected else keep(number)

    with pytest.raises(UserError, match=f"{rejected} of 100 are unusable"):
        build(tmp_path, shards_of(100, 100), work, RejectLimit("k", share))


def test_a_stricter_limit_holds_for_finished_shards_too(tmp_path: Path) -> None:
    build(tmp_path, shards_of(9, 3), partial(reject_multiples, 3))
    with pytest.raises(UserError, match="3 of 9 are unusable"):
        build(tmp_path, shards_of(9, 3), partial(reject_multiples, 3), RejectLimit("k", 0.1))


def test_the_same_table_has_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"id": f"{n:05d}", "quantity": n % 5, "image": bytes([n]) * 99} for n in range(50)]
    write_table(tmp_path / "one", pa.Table.from_pylist(rows, IMAGES))
    pieces = [pa.Table.from_pylist(rows[:7], IMAGES), pa.Table.from_pylist(rows[7:], IMAGES)]
    write_table(tmp_path / "two", pa.concat_tables(pieces))
    assert pq.read_table(tmp_path / "one").to_pylist() == rows
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_digest_is_of_the_rows_not_of_their_chunks() -> None:
    rows = [{"id": f"{n:05d}", "quantity": n, "image": None if n % 3 else b"x"} for n in range(40)]
    table = pa.Table.from_pylist(rows, IMAGES)
    pieces = pa.concat_tables([table.slice(0, 13), table.slice(13, 9), table.slice(22)])
    assert table_digest(pieces) == table_digest(table)


@pytest.mark.parametrize(("name", "value"), [("id", "1"), ("quantity", 2), ("image", b"y")])
def test_a_digest_tells_one_changed_value(name: str, value: Any) -> None:
    row: Row = {"id": "00001", "quantity": 1, "image": b"x"}
    tables = [pa.Table.from_pylist([one], IMAGES) for one in (row, row | {name: value})]
    assert table_digest(tables[0]) != table_digest(tables[1])


def test_photographs_lie_in_the_file_as_they_are(tmp_path: Path) -> None:
    image = b"\xff\xd8 a whole photograph, which lies uncompressed in the file \xff\xd9" * 9
    rows = [{"id": "00001", "quantity": 1, "image": image}]
    write_table(tmp_path / "shard", pa.Table.from_pylist(rows, IMAGES))
    assert image in (tmp_path / "shard").read_bytes()


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [shard_name(number) for number in (10, 2, 0)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".00001.parquet.partial").touch()
    assert [path.name for path in shard_paths(tmp_path)] == sorted(names)


@pytest.mark.parametrize("name", [".", "absent"])
def test_a_folder_without_shards_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="has no Parquet shards"):
        shard_paths(tmp_path / name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_the_rows(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])


def damage_the_footer(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes(150) + data[-50:])


@pytest.mark.parametrize("damage", [truncate, empty, damage_the_rows, damage_the_footer])
@pytest.mark.parametrize(
    "read", [pq.read_table, pd.read_parquet, lambda path: pq.ParquetFile(path).read(["id"])]
)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    path = tmp_path / "00001.parquet"
    write_table(path, pa.table({"id": [f"{number:05d}" for number in range(2000)]}))
    damage(path)
    with (
        pytest.raises(UserError, match=rf"{path} is damaged .*: remove it") as caught,
        whole_parquet(path),
    ):
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("data/raw has no Parquet shards"),
        PermissionError(errno.EACCES, "Permission denied"),
        KeyError("a bug"),
    ],
)
def test_what_is_no_damage_is_raised_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, whole_parquet(tmp_path / "00001.parquet"):
        raise error
    assert caught.value is error


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("stage", "path"),
    [
        (fetch, "data/subset.parquet"),
        (subset, "data/index.parquet"),
        (split, "data/subset.parquet"),
        (resize, "data/raw/00000.parquet"),
    ],
)
def test_every_stage_names_a_damaged_input(stage: ModuleType, path: str) -> None:
    write_params({})
    Path(path).parent.mkdir(parents=True)
    Path(path).write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        stage.main()


def test_a_shard_with_damaged_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_table(path, pa.table({"id": [f"{number:05d}" for number in range(2000)]}))
    damage_the_rows(path)
    shard = resize.shard_of(path)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        shard.load()


@pytest.mark.parametrize(
    "rejects",
    [
        [],
        [("00100", "not found"), ("100", "no bytes")],
        [("NA", "null"), ("", "")],
        [("a,b", 'has "quotes", commas; and é')],
        [("a\nb", "two\nlines"), ("00001", "\r")],
        [("1e5", " spaces "), ("007", "true")],
    ],
)
def test_rejects_come_back_as_they_were_written(
    tmp_path: Path, rejects: list[tuple[Any, Any]]
) -> None:
    written = [Reject(*reject) for reject in rejects]
    write_rejects(tmp_path / "rejects.csv", written)
    assert read_rejects(tmp_path / "rejects.csv") == written
