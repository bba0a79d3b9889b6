"""Making shards: many items at once, finished shards kept, in this process or elsewhere."""

import gc
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
from tqdm import tqdm

from stages.collecting.retries import Retries
from stages.formats.shards import Reject, Row, read_rejects, shard_name, write_rejects, write_table
from stages.runtime.errors import UserError
from stages.runtime.space import DiskFullError, readable

T = TypeVar("T")

_NAMED_REJECTS = 10
# In a folder of work.
_SHARDS, _REJECTS = "shards", "rejects"
# A shard is held in memory, and Arrow's columns of bytes end at 2 GB.
_MOST_SHARD_BYTES = 600_000_000


@dataclass(frozen=True)
class Shard(Generic[T]):
    """One file to be made: its name, how many items go into it, and how to get them."""

    name: str
    rows: int
    load: Callable[[], Sequence[T]]


@dataclass(frozen=True)
class RejectLimit:
    """The share of all items that may be rejected, and the key of params.yaml that sets it."""

    key: str
    share: float


def shards_of(table: pa.Table, rows: int, item_bytes: str | None = None) -> list[Shard[Row]]:
    """The table's rows in their order, so many to a shard.

    Fewer where what the column `item_bytes` sums up to would not fit into memory.
    """
    sizes = [0] * len(table) if item_bytes is None else table[item_bytes].to_pylist()
    starts = _starts(sizes, rows)
    # Copies: a slice takes its whole table along to another machine.
    pieces = [
        table.take(pa.array(range(start, stop))) for start, stop in pairwise([*starts, len(table)])
    ]
    return [
        Shard(shard_name(number), len(piece), piece.to_pylist)
        for number, piece in enumerate(pieces)
    ]


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


@dataclass(frozen=True)
class MadeShard:
    """What is known of a shard once it is written."""

    name: str
    rows: int
    rejects: list[Reject]
    retried: Counter[str]


@dataclass(frozen=True)
class ShardMaker(Generic[T]):
    """Writes shards into `folder`, of what `work` makes of their items; see build_shards.

    `work` is map_in_order or await_in_order, but for its items, workers and window. Another machine
    can have it all: what it holds can be pickled.
    """

    folder: Path
    work: Callable[[Iterable[T], int, int], Generator[Row | Reject, None, None]]
    schema: pa.Schema
    workers: int
    window: int
    retries: Retries = field(default_factory=Retries)

    def __call__(
        self, shards: Sequence[Shard[T]], advance: Callable[[int], object]
    ) -> Generator[MadeShard, None, None]:
        """Make the shards one by one, items of the next ones under way; `advance` counts items."""
        items = chain.from_iterable(shard.load() for shard in shards)
        with closing(self.work(items, self.workers, self.window)) as results:
            for shard in shards:
                rows: list[Row] = []
                rejects: list[Reject] = []
                for result in islice(results, shard.rows):
                    if isinstance(result, Reject):
                        rejects.append(result)
                    else:
                        rows.append(result)
                    advance(1)
                # The shard comes last: where it exists, its rejects are known.
                write_rejects(_rejects_file(self.folder, shard.name), rejects)
                table = pa.Table.from_pylist(rows, self.schema)
                write_table(self.folder / _SHARDS / shard.name, table)
                yield MadeShard(shard.name, shard.rows, rejects, self.retries.take_counts())


#: Has shards made, in any order: here, as ShardMaker does it by itself, or on other machines.
Executor = Callable[
    [ShardMaker[T], Sequence[Shard[T]], Callable[[int], object]], Generator[MadeShard, None, None]
]


def make_here(
    make: ShardMaker[T], shards: Sequence[Shard[T]], advance: Callable[[int], object]
) -> Generator[MadeShard, None, None]:
    """The executor of this process."""
    return make(shards, advance)


def build_shards(
    make: ShardMaker[T],
    shards: Sequence[Shard[T]],
    limit: RejectLimit,
    *,
    unit: str,
    executor: Executor[T] = make_here,
) -> tuple[Path, list[Reject]]:
    """Have each shard made that the maker's folder does not have yet.

    Returns the folder that holds the shards, and all rejects in the items' order. Raises
    UserError, naming the first ten, once more than `limit` are rejected; the shards with rejects
    are then forgotten, so that the next run tries them again.
    """
    done = _prepare(make.folder)
    total = sum(shard.rows for shard in shards)
    missing = missing_shards(make.folder, shards)
    finished = {shard.name for shard in shards} - {shard.name for shard in missing}
    rejects = {name: read_rejects(_rejects_file(make.folder, name)) for name in finished}
    _check_limit(rejects, total, limit, done)
    with (
        tqdm(total=total, unit=unit, unit_scale=True, disable=None) as progress,
        _rare_collections(),
    ):
        progress.update(total - sum(shard.rows for shard in missing))
        try:
            with closing(executor(make, missing, progress.update)) as made_shards:
                for made in made_shards:
                    rejects[made.name] = made.rejects
                    make.retries.add_counts(made.retried)
                    _check_limit(rejects, total, limit, done)
        except DiskFullError as error:
            raise DiskFullError(f"{error}{_space_to_come(done, shards)}") from None
    return done, [reject for shard in shards for reject in rejects[shard.name]]


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Rows are many small objects, none in a cycle.

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


def missing_shards(folder: Path, shards: Sequence[Shard[T]]) -> list[Shard[T]]:
    """Those that build_shards has still to make there."""
    return [shard for shard in shards if not (folder / _SHARDS / shard.name).exists()]


def _prepare(folder: Path) -> Path:
    """Make its folders, without what a killed run had half written; the one of the shards."""
    for inner in (folder / _SHARDS, folder / _REJECTS):
        inner.mkdir(exist_ok=True)
        for leftover in inner.glob(".*.partial"):
            leftover.unlink()
    return folder / _SHARDS


def _rejects_file(folder: Path, shard: str) -> Path:
    return folder / _REJECTS / f"{shard}.csv"


def _space_to_come(done: Path, shards: Sequence[Shard[T]]) -> str:
    """What the shards that are not there yet will need, to judge by those that are."""
    rows = {shard.name: shard.rows for shard in shards}
    sizes = {path.name: path.stat().st_size for path in done.glob("*.parquet")}
    finished = sum(rows[name] for name in sizes)
    if not finished:
        return ""
    left = sum(rows.values()) - finished
    return f". What is left needs about {readable(sum(sizes.values()) * left // finished)}"


def _check_limit(
    rejects: dict[str, list[Reject]], total: int, limit: RejectLimit, done: Path
) -> None:
    found = [reject for name in sorted(rejects) for reject in rejects[name]]
    # 29 of 100 are a share of 0.29, whatever floating point says.
    if len(found) <= limit.share * total + 1e-6:
        return
    for name, some in rejects.items():
        if some:
            (done / name).unlink()
    raise UserError(_too_many(found, total, limit))


def _too_many(rejects: list[Reject], total: int, limit: RejectLimit) -> str:
    named = ", ".join(f"{reject.id} ({reject.reason})" for reject in rejects[:_NAMED_REJECTS])
    return (
        f"{len(rejects)} of {total} are unusable, more than {limit.key} ({limit.share:g}) allows."
        f" The first: {named}. Mend them, or raise {limit.key}"
    )
