"""Where the audited photographs are: a folder, S3, or Parquet shards. They come as a stream."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.store import LocalStore

from stages.collecting.bucket import PHOTOGRAPHS, Store
from stages.collecting.records import is_bin_id
from stages.formats.shards import table_digest, whole_parquet
from stages.runtime.errors import UserError
from stages.runtime.files import digest
from tools.audit.objects import (
    Content,
    list_bins,
    open_folder,
    open_s3,
    read_bins,
    refuse_twins,
)

SUFFIXES = "jpe?g"
# As many as records can have.
MOST_ITEMS = 2**31 - 1
# Photographs of a shard that are in memory at once, and what is read of the file at once, in bytes.
_ROWS = 64
_BUFFER = 1 << 20


class Photographs(Protocol):
    """`ids` in the order in which they are read; `identity` changes with any of the files."""

    place: str
    ids: list[str]
    identity: str

    def read(self, start: int) -> Generator[Content, None, None]:
        """All photographs from that place in `ids` on."""

    def pick(self, ids: Sequence[str]) -> Iterator[Content]:
        """The photographs of these bins, in any order."""


class StoredPhotographs:
    """A file each, in a folder or in S3. `in_bucket_layout`: below bin-images/."""

    def __init__(self, place: str, store: Store) -> None:
        self.place = place
        self.store = store
        listing = list_bins(store, PHOTOGRAPHS, SUFFIXES)
        self.in_bucket_layout = len(listing.objects) > 0
        if not self.in_bucket_layout:
            listing = list_bins(store, "", SUFFIXES)
        if not len(listing.objects):
            kinds = f"no <id>.jpg, no {PHOTOGRAPHS}<id>.jpg"
            if isinstance(store, LocalStore):
                kinds += ", no *.parquet"
            raise UserError(f"there are no photographs in {place}: {kinds}")
        self.objects, self.left_out = listing
        self.ids: list[str] = self.objects["id"].to_pylist()
        self.identity = table_digest(self.objects)

    def read(self, start: int) -> Generator[Content, None, None]:
        return read_bins(self.store, self.objects.slice(start))

    def pick(self, ids: Sequence[str]) -> Iterator[Content]:
        return read_bins(
            self.store, self.objects.filter(pc.field("id").isin(pa.array(ids, pa.string())))
        )


@dataclass(frozen=True)
class Shard:
    """`rows`: its columns id and, where it has one, quantity."""

    path: Path
    rows: pa.Table


class ShardPhotographs:
    """Parquet files with the columns id and image, a whole file of JPEG or the like."""

    def __init__(self, place: str, paths: Sequence[Path]) -> None:
        self.place = place
        self.shards = [Shard(path, read_ids(path)) for path in paths]
        self.ids: list[str] = [
            bin_id for shard in self.shards for bin_id in shard.rows["id"].to_pylist()
        ]
        if not self.ids:
            raise UserError(f"there are no photographs in {place}")
        refuse_twins(self.ids, "rows")
        # Enough to know a shard again in the next run, without reading gigabytes.
        status = [path.stat() for path in paths]
        self.identity = digest([(file.st_size, file.st_mtime_ns) for file in status], self.ids)

    def read(self, start: int) -> Generator[Content, None, None]:
        for shard in self.shards:
            if start < len(shard.rows):
                yield from islice(read_shard(shard.path), start, None)
            start = max(0, start - len(shard.rows))

    def pick(self, ids: Sequence[str]) -> Iterator[Content]:
        wanted = set(ids)
        for shard in self.shards:
            if wanted.intersection(shard.rows["id"].to_pylist()):
                yield from (row for row in read_shard(shard.path) if row.id in wanted)


def open_photographs(
    place: str, endpoint: str | None, region: str, *, signed: bool
) -> StoredPhotographs | ShardPhotographs:
    """Find out what is at `place`. Raises UserError where there are no photographs."""
    if "://" in place:
        return StoredPhotographs(place, open_s3(place, endpoint, region, signed=signed))
    path = Path(place)
    if path.is_file() and path.suffix == ".parquet":
        return ShardPhotographs(place, [path])
    if not path.is_dir():
        raise UserError(f"{place} is no folder, no s3:// URL and no file of Parquet")
    if paths := sorted(path.glob("*.parquet")):
        return ShardPhotographs(place, paths)
    return StoredPhotographs(place, open_folder(path))


def read_ids(path: Path) -> pa.Table:
    """The columns id and quantity. Raises UserError where a shard is not as audits need it."""
    with whole_parquet(path):
        types = {field.name: field.type for field in pq.read_schema(path)}
        check_type(path, types, "id", (pa.string(), pa.large_string()))
        check_type(path, types, "image", (pa.binary(), pa.large_binary()))
        if "quantity" in types and not pa.types.is_integer(types["quantity"]):
            raise UserError(f"{path}: its column quantity has {types['quantity']}, not integers")
        rows = pq.read_table(path, columns=[name for name in ("id", "quantity") if name in types])
    # By its maximum: a comparison would convert unsigned integers, which fails for the largest.
    if "quantity" in types and (pc.max(rows["quantity"]).as_py() or 0) > MOST_ITEMS:
        raise UserError(f"{path}: its column quantity has a number above {MOST_ITEMS}")
    for number, bin_id in enumerate(rows["id"].to_pylist(), start=1):
        if bin_id is None or not is_bin_id(bin_id):
            raise UserError(f"{path}: row {number}: {bin_id!a:.80} is no bin's id")
    return rows


def check_type(
    path: Path, types: dict[str, pa.DataType], name: str, wanted: tuple[pa.DataType, ...]
) -> None:
    if name not in types:
        raise UserError(f"{path} has no column {name}")
    if types[name] not in wanted:
        # 00100 and 100 are two bins, which numbers do not tell apart.
        raise UserError(f"{path}: its column {name} has {types[name]}, not {wanted[0]}")


def read_shard(path: Path) -> Generator[Content, None, None]:
    """The rows of a shard, of which a piece is in memory at once, however large its row groups."""
    with (
        whole_parquet(path),
        # The pre-buffer would be all images of a row group.
        pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(_ROWS, columns=["id", "image"]):
            for row in batch.to_pylist():
                yield Content(row["id"], row["image"] or b"")
