"""Parquet shards: the unit in which bins are read, processed, written and resumed."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from stages.runtime.errors import UserError
from stages.runtime.files import atomic_write, write_bytes

Row = dict[str, Any]

#: A row of data/raw and data/resized. `image` holds a whole JPEG file.
IMAGES = pa.schema([("id", pa.string()), ("quantity", pa.int32()), ("image", pa.binary())])
_REJECTS = pa.schema([("id", pa.string()), ("reason", pa.string())])


class Reject(NamedTuple):
    """A bin that a stage leaves out, and why."""

    id: str
    reason: str


def shard_name(number: int) -> str:
    return f"{number:05d}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet, the same bytes for the same table.

    JPEGs are compressed already, so their column has no compression, dictionary or statistics,
    which makes it fastest to read.
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
    """The folder's shards, sorted by name. Raises FileNotFoundError if there are none."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no Parquet shards")
    return paths


@contextmanager
def whole_parquet(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a UserError that names `path`."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        # Errors of the file system have a number; pyarrow's errors about a damaged file have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged ({reason}): remove it, and make it again with `dvc repro` or"
            " `dvc pull`"
        ) from None


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write a CSV with the columns id and reason; only its header if there are no rejects."""
    table = pa.Table.from_pylist([reject._asdict() for reject in rejects], _REJECTS)
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_rejects(path: Path) -> list[Reject]:
    # Ids stay strings: 00100 and 100 are two bins.
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=_REJECTS),
    )
    return [Reject(**row) for row in table.to_pylist()]
