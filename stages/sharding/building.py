"""Shards: one function call makes one, finished ones are kept, and rejects are counted."""

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
# In a folder of work.
_SHARDS, _REJECTS = "shards", "rejects"
# A shard is held in memory, and so are others beside it.
_MOST_SHARD_BYTES = 300_000_000


@dataclass(frozen=True)
class Shard:
    """One file to be made, of `rows` rows, from the table `source`, or the one at that path."""

    name: str
    rows: int
    source: Any


class MadeShard(NamedTuple):
    """What became of a shard's rows, and what was retried for them, by kind."""

    table: pa.Table
    rejects: list[Reject]
    retried: Counter[str]


#: Makes one shard, and calls its second argument with each number of finished rows. It is pickled
#: for the machines of a cluster.
MakeShard = Callable[[Shard, Callable[[int], object]], Awaitable[MadeShard]]


class WrittenShard(NamedTuple):
    """What is known of a shard once it lies in the folder."""

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
    """The table's rows in their order, so many to a shard.

    Fewer where the sum of the column `row_bytes` would not fit into memory.
    """
    sizes = [0] * len(table) if row_bytes is None else table[row_bytes].to_pylist()
    starts = _starts(sizes, rows)
    # Copies: a slice takes its whole table along to another machine.
    pieces = [
        table.take(pa.array(range(start, stop))) for start, stop in pairwise([*starts, len(table)])
    ]
    return [Shard(shard_name(number), len(piece), piece) for number, piece in enumerate(pieces)]


def _starts(sizes: list[int], rows: int) -> list[int]:
    """Where shards begin, of at most so many rows and _MOST_SHARD_BYTES, but one row at least."""
    starts: list[int] = []
    held = 0
    for place, size in enumerate(sizes):
        if not starts or place - starts[-1] == rows or held + size > _MOST_SHARD_BYTES:
            starts.append(place)
            held = 0
        held += size
    return starts


async def each_row(
    work: Callable[[Row], Awaitable[Row | Reject]], shard: Shard, advance: Callable[[int], object]
) -> list[Row | Reject]:
    """What `work` makes of the rows of a shard's table, all under way at once, in their order."""

    async def one(row: Row) -> Row | Reject:
        result = await work(row)
        advance(1)
        return result

    return await asyncio.gather(*map(one, shard.source.to_pylist()))


def made_of(
    results: Iterable[Row | Reject], schema: pa.Schema, retried: Counter[str] | None = None
) -> MadeShard:
    """The shard of the rows among the results, in their order."""
    rows, rejects = [], []
    for result in results:
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            rows.append(result)
    return MadeShard(pa.Table.from_pylist(rows, schema), rejects, retried or Counter())


def write_shard(folder: Path, shard: Shard, made: MadeShard) -> WrittenShard:
    """Put it into the folder of work, after its rejects: where it exists, they are known."""
    write_rejects(_rejects_file(folder, shard.name), made.rejects)
    write_table(folder / _SHARDS / shard.name, made.table)
    return WrittenShard(shard.name, shard.rows, made.rejects, made.retried)


#: Makes shards and writes them into a folder, in any order, here or elsewhere. Its arguments are
#: make, folder, shards, advance and keep: it calls `advance` with each number of finished rows, and
#: `keep` with each shard that is written.
Executor = Callable[
    [
        MakeShard,
        Path,
        Sequence[Shard],
        Callable[[int], object],
        Callable[[WrittenShard], object],
    ],
    None,
]


def build_shards(
    make: MakeShard,
    folder: Path,
    shards: Sequence[Shard],
    limit: RejectLimit,
    *,
    unit: str,
    executor: Executor,
) -> tuple[Path, list[Reject], Counter[str]]:
    """Have each shard made that `folder` doesn't have yet.

    Returns the folder of the shards, all rejects in the rows' order, and what was retried. Raises
    UserError, naming the first ten, once more than `limit` are rejected; the shards with rejects
    are then removed, so that the next run tries them again.
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
        executor(make, folder, missing, progress.update, keep)
    return done, [reject for shard in shards for reject in rejects[shard.name]], retried


def missing_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Those that build_shards has still to make there."""
    return [shard for shard in shards if not (folder / _SHARDS / shard.name).exists()]


def first_finished_row(folder: Path, shards: Sequence[Shard]) -> Row | None:
    """A row of a planned table whose shard an earlier run made with it; None without any."""
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
    """Rows are many small objects, none of them in a cycle.

    Python's collector, which goes over them time and again, took a sixth of index's time.
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
    """Make its folders, without what a killed run had half written; the one of the shards."""
    for inner in (folder / _SHARDS, folder / _REJECTS):
        inner.mkdir(exist_ok=True)
        for leftover in inner.glob(".*.partial"):
            leftover.unlink()
    return folder / _SHARDS


def _rejects_file(folder: Path, shard: str) -> Path:
    return folder / _REJECTS / f"{shard}.csv"


def _finished_rejects(folder: Path, shards: Sequence[Shard]) -> dict[str, list[Reject]]:
    """The rejects of each shard that is there."""
    missing = {shard.name for shard in missing_shards(folder, shards)}
    names = [shard.name for shard in shards if shard.name not in missing]
    return {name: read_rejects(_rejects_file(folder, name)) for name in names}


def _are_too_many(rejects: dict[str, list[Reject]], total: int, limit: RejectLimit) -> bool:
    # 29 of 100 are a share of 0.29, whatever floating point says.
    return sum(map(len, rejects.values())) > limit.share * total + 1e-6


def _without_rejects(rejects: dict[str, list[Reject]], done: Path) -> dict[str, list[Reject]]:
    """Remove the shards that rejected something, so that they are tried again; the others."""
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
