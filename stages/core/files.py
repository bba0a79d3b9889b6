"""Outputs that are whole or absent, and unfinished work that survives a killed run."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

STAGES = Path(__file__).parent.parent


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; when the block ends well, flush it and rename it to `path`.

    `path` itself is never opened: it may be a hard link into DVC's cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Six significant digits: enough for shares and losses, and the same on every machine."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")


def read_csv(path: Path) -> pd.DataFrame:
    """A table of write_csv. Ids are strings: 00100 and 100 are two bins."""
    return pd.read_csv(path, dtype={"id": str}, keep_default_na=False)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """One SHA-256 of all parts, each as its repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def unfinished(stage: str, key: str) -> Iterator[Path]:
    """Give the folder of a stage's finished parts, which a killed run leaves for the next one.

    DVC deletes a stage's outs before it runs, so parts live in `.cache` of the repository (also
    for an experiment in a temporary copy of it: DVC_ROOT), in a folder named by `key`, a digest
    of all the inputs that matter, and by the version of this code. The folder is locked while in
    use, and removed when the block ends well.
    """
    cache = Path(os.environ.get("DVC_ROOT", ".")) / ".cache"
    folder = cache / f"{stage}-{digest(key, _code_version())[:16]}"
    cache.mkdir(exist_ok=True)
    lock_file = folder.with_suffix(".lock")
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(
            f"{stage}: waiting for another run with the same inputs, which holds {lock_file}",
            flush=True,
        )
        lock.acquire()
    try:
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        # While it is held: whoever waits for it notices that this file is gone, and makes another.
        lock_file.unlink()
    finally:
        lock.release()


def publish_folder(folder: Path, out: Path) -> None:
    """Make `out` the whole of `folder`, which is moved there."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, out)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _code_version() -> str:
    return digest(*(source.read_bytes() for source in sorted(STAGES.rglob("*.py"))))
