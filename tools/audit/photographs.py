"""The photographs of an audit, from a folder, S3 or Parquet files, read part by part."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from stages.collecting.advice import Names
from stages.collecting.bucket import PHOTOGRAPHS, Store, open_bucket
from stages.collecting.failures import ObjectError
from stages.collecting.ids import PHOTOGRAPH, is_bin_id, named_by_id
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader
from stages.formats.shards import table_digest, whole_parquet
from stages.runtime import params
from stages.runtime.errors import UserError
from stages.runtime.files import digest

T = TypeVar("T")

#: Names of the settings in error messages about the bucket: here they are options.
OPTIONS = Names("its name", "--endpoint", "add --signed", "--region")
# The columns and their types. As numbers, the ids 00100 and 100 would be the same.
_TYPES = {"id": (pa.string(), pa.large_string()), "image": (pa.binary(), pa.large_binary())}
# How many rows of a shard are in memory at once, and how many bytes are read at once.
_ROWS = 64
_BUFFER = 1 << 20
_PICKED = 256


class Content(NamedTuple):
    """The bytes of a bin's file, or why they could not be read."""

    id: str
    data: bytes
    problem: str = ""


class Files:
    """The files <id><ending> directly below `prefix` ("" or ending in "/") in a folder or S3.

    `left_out` has the keys of files whose names are not ids. Raises UserError if a bin has two
    files: 1.jpg and 1.JPG.
    """

    def __init__(self, place: str, store: Store, prefix: str, ending: str) -> None:
        self.place, self.store, self.prefix = place, store, prefix
        self._reader = Reader(store)
        self._objects, self.left_out = named_by_id(list_objects(store, prefix), prefix, ending)

    @property
    def ids(self) -> list[str]:
        """In reading order."""
        ids: list[str] = self._objects["id"].to_pylist()
        return ids

    @property
    def identity(self) -> str:
        """A digest that changes with any of the files."""
        return table_digest(self._objects)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file, by id."""
        return dict(zip(self.ids, self._objects["size"].to_pylist(), strict=True))

    def drop(self, ids: Iterable[str]) -> None:
        """Leave out these bins."""
        self._objects = without(self._objects, ids)

    def parts(self, start: int, size: int) -> Iterator[list[Content]]:
        """The files from the position `start` in `ids` onwards, `size` at a time."""
        return self._read(self._objects.slice(start), size)

    def pick(self, ids: Sequence[str]) -> Iterator[Content]:
        """The files of these bins, in any order."""
        chosen = self._objects.filter(pc.field("id").isin(pa.array(ids, pa.string())))
        return chain.from_iterable(self._read(chosen, _PICKED))

    def _read(self, objects: pa.Table, size: int) -> Iterator[list[Content]]:
        for start in range(0, len(objects), size):
            rows = objects.slice(start, size).to_pylist()
            # After the colon comes advice for the pipeline.
            yield [
                Content(row["id"], b"", str(found).partition(":")[0])
                if isinstance(found, ObjectError)
                else Content(row["id"], found)
                for row, found in zip(rows, self._reader.read_all(rows), strict=True)
            ]


class Shards:
    """Parquet files with the columns id and image (the bytes of an image file).

    They are read as Files are. `rows` has the ids and quantities of each file.
    """

    def __init__(self, place: str, paths: Sequence[Path]) -> None:
        self.place = place
        self.rows = {path: read_ids(path) for path in paths}
        self.left_out: list[str] = []
        refuse_repeated(self.ids, "rows")

    @property
    def ids(self) -> list[str]:
        return [bin_id for rows in self.rows.values() for bin_id in rows["id"].to_pylist()]

    @property
    def identity(self) -> str:
        # Enough to recognize a file in the next run without reading gigabytes.
        status = [path.stat() for path in self.rows]
        return digest([(file.st_size, file.st_mtime_ns) for file in status], self.ids)

    def drop(self, ids: Iterable[str]) -> None:
        self.rows = {path: without(rows, ids) for path, rows in self.rows.items()}

    def parts(self, start: int, size: int) -> Iterator[list[Content]]:
        return batched(self._read(start), size)

    def _read(self, start: int) -> Iterator[Content]:
        for path, rows in self.rows.items():
            if start < len(rows):
                kept = set(rows["id"].to_pylist())
                contents = (content for content in read_shard(path) if content.id in kept)
                yield from islice(contents, start, None)
            start = max(0, start - len(rows))

    def pick(self, ids: Sequence[str]) -> Iterator[Content]:
        wanted = set(ids)
        for path, rows in self.rows.items():
            if wanted.intersection(rows["id"].to_pylist()):
                yield from (content for content in read_shard(path) if content.id in wanted)


Photographs = Files | Shards


def open_photographs(
    place: str, endpoint: str | None = None, region: str = "us-east-1", *, signed: bool = False
) -> Photographs:
    """Photographs of a folder, a bucket or Parquet files. Raises UserError if there are none."""
    path = Path(place)
    found: Photographs
    if "://" in place:
        found = find_files(place, open_s3(place, endpoint, region, signed=signed))
    elif path.is_file() and path.suffix == ".parquet":
        found = Shards(place, [path])
    elif not path.is_dir():
        raise UserError(f"{place} is not a folder, an s3:// URL or a Parquet file: check the path")
    elif paths := sorted(path.glob("*.parquet")):
        found = Shards(place, paths)
    else:
        found = find_files(place, open_folder(path))
    if not found.ids:
        raise UserError(
            f"{place} has no photographs: there should be {PHOTOGRAPHS}<id>.jpg, <id>.jpg or, in a"
            " local folder, *.parquet"
        )
    return found


def find_files(place: str, store: Store) -> Files:
    """The photographs in bin-images/ or, if there are none, directly in `place`."""
    inside = Files(place, store, PHOTOGRAPHS, PHOTOGRAPH)
    return inside if inside.ids else Files(place, store, "", PHOTOGRAPH)


def open_folder(folder: Path) -> Store:
    return open_s3(folder.absolute().as_uri(), None, "us-east-1", signed=False)


def open_s3(url: str, endpoint: str | None, region: str, *, signed: bool) -> Store:
    """Raises UserError if an argument is malformed, without repeating it: it may hold a key."""
    try:
        bucket = params.Bucket(url=url, region=region, endpoint=endpoint, anonymous=not signed)
    except pydantic.ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        example = {"url": "s3://bucket/prefix", "endpoint": "http://127.0.0.1:9000"}
        raise UserError(f"the {wrong} should look like {example.get(wrong, 'us-east-1')}") from None
    return open_bucket(bucket)


def read_ids(path: Path) -> pa.Table:
    """The columns id and quantity. Raises UserError if the audit cannot use this file."""
    with whole_parquet(path):
        types = {field.name: field.type for field in pq.read_schema(path)}
        for name, allowed in _TYPES.items():
            if types.get(name) not in allowed:
                found = f"is {types[name]}" if name in types else "is missing"
                raise UserError(f"{path}: the column {name} {found}; it should be {allowed[0]}")
        if "quantity" in types and not pa.types.is_integer(types["quantity"]):
            raise UserError(
                f"{path}: the column quantity is {types['quantity']}; it should be integer"
            )
        rows = pq.read_table(path, columns=[name for name in ("id", "quantity") if name in types])
    for number, bin_id in enumerate(rows["id"].to_pylist(), start=1):
        if not is_bin_id(bin_id or ""):
            raise UserError(f"{path}: row {number}: {bin_id!a:.80} is not a bin's id")
    return rows


def read_shard(path: Path) -> Iterator[Content]:
    """The rows of a file, with only a few in memory however large its row groups are."""
    with (
        whole_parquet(path),
        # Pre-buffering would hold every image of a row group.
        pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(_ROWS, columns=["id", "image"]):
            for row in batch.to_pylist():
                yield Content(row["id"], row["image"] or b"")


def without(rows: pa.Table, ids: Iterable[str]) -> pa.Table:
    """The rows of other bins than these."""
    return rows.filter(~pc.field("id").isin(pa.array(ids, pa.string())))


def refuse_repeated(ids: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for bin_id in ids:
        if bin_id in seen:
            raise UserError(f"there are two {what} of the bin {bin_id}: keep one")
        seen.add(bin_id)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
