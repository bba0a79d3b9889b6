"""Parquet shards: the unit in which bins are read, worked on, written and resumed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.core.command import UserError
from stages.core.files import atomic_write
from stages.core.parallel import map_in_order

T = TypeVar("T")
Row = dict[str, Any]

#: A row of data/raw and data/resized. `image` holds a whole JPEG file.
IMAGES = pa.schema([("id", pa.string()), ("quantity", pa.int32()), ("image", pa.binary())])
_REJECTS = pa.schema([("id", pa.string()), ("reason", pa.string())])
_NAMED_REJECTS = 10


class Reject(NamedTuple):
    """A bin that a stage leaves out, and why."""

    id: str
    reason: str


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


def shard_name(number: int) -> str:
    return f"{number:05d}.parquet"


def shards_of(table: pa.Table, rows: int) -> list[Shard[Row]]:
    """The table's rows in their order, so many to a shard."""
    slices = [table.slice(start, rows) for start in range(0, len(table), rows)]
    return [
        Shard(shard_name(number), len(piece), piece.to_pylist)
        for number, piece in enumerate(slices)
    ]


def build_shards(
    folder: Path,
    shards: Sequence[Shard[T]],
    work: Callable[[T], Row | Reject],
    schema: pa.Schema,
    limit: RejectLimit,
    *,
    workers: int,
    window: int,
    unit: str,
) -> tuple[Path, list[Reject]]:
    """Make each shard that `folder` does not have yet, of work(item) for each of its items.

    Returns the folder that holds the shards, and all rejects in the items' order. Raises
    UserError, naming the first ten, once more than `limit` are rejected; the shards with rejects
    are then forgotten, so that the next run tries them again.
    """
    done, rejected = folder / "shards", folder / "rejects"
    done.mkdir(exist_ok=True)
    rejected.mkdir(exist_ok=True)
    for leftover in chain(done.glob(".*.partial"), rejected.glob(".*.partial")):
        leftover.unlink()
    total = sum(shard.rows for shard in shards)
    missing = [shard for shard in shards if not (done / shard.name).exists()]
    rejects = {
        shard.name: read_rejects(rejected / f"{shard.name}.csv")
        for shard in shards
        if (done / shard.name).exists()
    }
    _check_limit(rejects, total, limit, done)
    results = map_in_order(
        work, chain.from_iterable(shard.load() for shard in missing), workers, window
    )
    with closing(results), tqdm(total=total, unit=unit, unit_scale=True, disable=None) as progress:
        progress.update(total - sum(shard.rows for shard in missing))
        for shard in missing:
            rows: list[Row] = []
            rejects[shard.name] = []
            for result in islice(results, shard.rows):
                if isinstance(result, Reject):
                    rejects[shard.name].append(result)
                else:
                    rows.append(result)
                progress.update()
            # The shard comes last: where it exists, its rejects are known.
            write_rejects(rejected / f"{shard.name}.csv", rejects[shard.name])
            write_table(done / shard.name, pa.Table.from_pylist(rows, schema))
            _check_limit(rejects, total, limit, done)
    return done, [reject for shard in shards for reject in rejects[shard.name]]


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


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet that has the same bytes for the same table.

    A column of JPEGs is neither compressed nor given a dictionary nor statistics: they are
    compressed already, and readers get at them fastest so.
    """
    images = "image" in table.schema.names
    with atomic_write(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="none" if images else "zstd",
            use_dictionary=not images,
            write_statistics=not images,
        )


def table_digest(table: pa.Table) -> str:
    """SHA-256 of the table's rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def shard_paths(folder: Path) -> list[Path]:
    """The folder's shards in the order of their names. Raises FileNotFoundError without any."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no Parquet shards")
    return paths


@contextmanager
def whole_parquet(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises when it reads a damaged `path` into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        # The file system's own errors have a number; pyarrow's for a damaged file have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged ({reason}): remove it, and make it again with `dvc repro` or"
            " `dvc pull`"
        ) from None


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """A CSV of id and reason; only the header where there are none."""
    table = pa.Table.from_pylist([reject._asdict() for reject in rejects], _REJECTS)
    with atomic_write(path) as temporary:
        pyarrow.csv.write_csv(table, temporary)


def read_rejects(path: Path) -> list[Reject]:
    # Ids stay strings: 00100 and 100 are two bins.
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=_REJECTS),
    )
    return [Reject(**row) for row in table.to_pylist()]
