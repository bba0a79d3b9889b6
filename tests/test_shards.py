import errno
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import fetch, resize, split, subset
from stages.formats.shards import (
    IMAGES,
    Reject,
    Row,
    read_rejects,
    shard_name,
    shard_paths,
    table_digest,
    whole_parquet,
    write_rejects,
    write_table,
)
from stages.runtime.errors import UserError
from tests.conftest import write_params


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
        pa.ArrowMemoryError("malloc of size 64 failed"),
        KeyError("a bug"),
    ],
)
def test_other_errors_are_raised_unchanged(tmp_path: Path, error: Exception) -> None:
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
    shard = resize.plan_shard(path)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        resize.read_rows(shard)


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
