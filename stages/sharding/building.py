"""Building shards: one function builds one, finished ones are kept, rejects are counted."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from stages.formats.shards import (
    Reject,
    Row,
    read_rejects,
    shard_name,
    write_rejects,
    write_table,
)
from stages.runtime.errors import UserError

_NAMED_REJECTS = 10
# Subfolders of a stage's work folder.
_SHARDS, _REJECTS = "shards", "rejects"
# Several shards are held in memory at once.
_MOST_SHARD_BYTES = 300_000_000


@dataclass(frozen=True)
class Shard:
    """A file to build: `rows` rows from `source`, which is a table or the path of one."""

    name: str
    rows: int
    source: Any


class BuiltShard(NamedTuple):
    """A shard's finished rows, its rejects, and how many requests were retried, by kind."""

    table: pa.Table
    rejects: list[Reject]
    retried: Counter[str]


#: Builds one shard, and reports progress by calling its second argument with a number of rows. It
#: is pickled when it runs on a cluster.
BuildShard = Callable[[Shard, Callable[[int], object]], Awaitable[BuiltShard]]


class WrittenShard(NamedTuple):
    """The summary of a shard that has been written."""

    name: str
    rows: int
    rejects: list[Reject]
    retried: Counter[str]


@dataclass(frozen=True)
class RejectLimit:
    """The share of all rows that may be rejected, and the key of params.yaml that sets it."""

    key: str
    share: float


def plan_shards(table: pa.Table, rows: int, row_bytes: str | None = None) -> list[Shard]:
    """Cut the table into shards of `rows` rows, in order.

    A shard has fewer rows where the sum of its column `row_bytes` would not fit into memory.
    """
    sizes = [0] * len(table) if row_bytes is None else table[row_bytes].to_pylist()
    starts = _starts(sizes, rows)
    # Copies, because pickling a slice sends its whole table to another machine.
    pieces = [
        table.take(pa.array(range(start, stop))) for start, stop in pairwise([*starts, len(table)])
    ]
    return [Shard(shard_name(number), len(piece), piece) for number, piece in enumerate(pieces)]


def _starts(sizes: list[int], rows: int) -> list[int]:
    """Where each shard begins: at most `rows` and _MOST_SHARD_BYTES, but at least one row."""
    starts: list[int] = []
    held = 0
    for position, size in enumerate(sizes):
        if not starts or position - starts[-1] == rows or held + size > _MOST_SHARD_BYTES:
            starts.append(position)
            held = 0
        held += size
    return starts


async def each_row(
    work: Callable[[Row], Awaitable[Row | Reject]], shard: Shard, advance: Callable[[int], object]
) -> list[Row | Reject]:
    """Apply `work` to all rows of a shard's table concurrently; results keep the rows' order."""

    async def one(row: Row) -> Row | Reject:
        result = await work(row)
        advance(1)
        return result

    return await asyncio.gather(*map(one, shard.source.to_pylist()))


def built_shard(
    results: Iterable[Row | Reject], schema: pa.Schema, retried: Counter[str] | None = None
) -> BuiltShard:
    """Separate the results into rows and rejects."""
    rows, rejects = [], []
    for result in results:
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            rows.append(result)
    return BuiltShard(pa.Table.from_pylist(rows, schema), rejects, retried or Counter())


def write_shard(folder: Path, shard: Shard, result: BuiltShard) -> WrittenShard:
    """Write the rejects before the shard: if a shard exists, so do its rejects."""
    write_rejects(_rejects_file(folder, shard.name), result.rejects)
    write_table(folder / _SHARDS / shard.name, result.table)
    return WrittenShard(shard.name, shard.rows, result.rejects, result.retried)


#: Builds shards and writes them to a folder, in any order, on this machine or others. Its arguments
#: are build, folder, shards, advance (called with each number of finished rows) and keep (called
#: with each written shard).
Executor = Callable[
    [
        BuildShard,
        Path,
        Sequence[Shard],
        Callable[[int], object],
        Callable[[WrittenShard], object],
    ],
    None,
]


def build_shards(
    build: BuildShard,
    folder: Path,
    shards: Sequence[Shard],
    limit: RejectLimit,
    *,
    unit: str,
    executor: Executor,
) -> tuple[Path, list[Reject], Counter[str]]:
    """Build the shards that are missing from `folder`.

    Returns the folder of the shards, all rejects in row order, and the retries by kind. Raises
    UserError, naming the first ten rejects, once more than `limit` of the rows are rejected. Shards
    with rejects are then removed, so that the next run tries them again.
    """
    done, retried = _prepare(folder), Counter[str]()
    total = sum(shard.rows for shard in shards)
    rejects = _finished_rejects(folder, shards)
    if _are_too_many(rejects, total, limit):
        rejects = _without_rejects(rejects, done)
    missing = missing_shards(folder, shards)

    def keep(written: WrittenShard) -> None:
        rejects[written.name] = written.rejects
        retried.update(written.retried)
        if _are_too_many(rejects, total, limit):
            _without_rejects(rejects, done)
            raise UserError(_too_many(rejects, total, limit))

    with (
        tqdm(total=total, unit=unit, unit_scale=True, disable=None) as progress,
        _rare_collections(),
    ):
        progress.update(total - sum(shard.rows for shard in missing))
        executor(build, folder, missing, progress.update, keep)
    return done, [reject for shard in shards for reject in rejects[shard.name]], retried


def missing_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards that `folder` does not have yet."""
    return [shard for shard in shards if not (folder / _SHARDS / shard.name).exists()]


def first_finished_row(folder: Path, shards: Sequence[Shard]) -> Row | None:
    """A row that an earlier run built successfully, or None."""
    missing = {shard.name for shard in missing_shards(folder, shards)}
    for shard in shards:
        if shard.name not in missing and isinstance(shard.source, pa.Table):
            rejected = {reject.id for reject in read_rejects(_rejects_file(folder, shard.name))}
            for row in shard.source.to_pylist():
                if row["id"] not in rejected:
                    found: Row = row
                    return found
    return None


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python's cyclic garbage collector run rarely.

    Rows are many small objects without cycles; collecting them took a sixth of index's time.
    """
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def _prepare(folder: Path) -> Path:
    """Create the subfolders, remove what a killed run half wrote, return the shards' folder."""
    for inner in (folder / _SHARDS, folder / _REJECTS):
        inner.mkdir(exist_ok=True)
        for leftover in inner.glob(".*.partial"):
            leftover.unlink()
    return folder / _SHARDS


def _rejects_file(folder: Path, shard: str) -> Path:
    return folder / _REJECTS / f"{shard}.csv"


def _finished_rejects(folder: Path, shards: Sequence[Shard]) -> dict[str, list[Reject]]:
    """The rejects of every finished shard, by its name."""
    missing = {shard.name for shard in missing_shards(folder, shards)}
    names = [shard.name for shard in shards if shard.name not in missing]
    return {name: read_rejects(_rejects_file(folder, name)) for name in names}


def _are_too_many(rejects: dict[str, list[Reject]], total: int, limit: RejectLimit) -> bool:
    # 29 of 100 are a share of 0.29, whatever floating point says.
    return sum(map(len, rejects.values())) > limit.share * total + 1e-6


def _without_rejects(rejects: dict[str, list[Reject]], done: Path) -> dict[str, list[Reject]]:
    """Remove the shards that have rejects, so that they are tried again; returns the others."""
    for name, some in rejects.items():
        if some:
            (done / name).unlink()
    return {name: some for name, some in rejects.items() if not some}


def _too_many(rejects: dict[str, list[Reject]], total: int, limit: RejectLimit) -> str:
    found = [reject for name in sorted(rejects) for reject in rejects[name]]
    named = ", ".join(f"{reject.id} ({reject.reason})" for reject in found[:_NAMED_REJECTS])
    return (
        f"{len(found)} of {total} are unusable, more than {limit.key} ({limit.share:g}) allows."
        f" The first: {named}. Fix them, or raise {limit.key}"
    )
