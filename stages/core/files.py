"""Outputs that are whole or absent, and unfinished work that survives a killed run."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

STAGES = Path(__file__).parent.parent
# How long the work of a killed run waits for a next one with the same inputs.
DAYS_KEPT = 14


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


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Six significant digits: enough for shares and losses, and the same on every machine."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")


def read_csv(path: Path) -> pd.DataFrame:
    """A table of write_csv. Ids, which groups are named by too, are strings: 00100 is not 100."""
    return pd.read_csv(path, dtype={"id": str, "group": str}, keep_default_na=False)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """One SHA-256 of the names and contents of files, read on all cores."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        return digest([path.name for path in paths], *pool.map(sha256_file, paths))


def digest(*parts: object) -> str:
    """One SHA-256 of all parts, each as its repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def cache_folder() -> Path:
    """`.cache` of the repository, also for an experiment in a temporary copy of it (DVC_ROOT)."""
    folder = Path(os.environ.get("DVC_ROOT", ".")) / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def unfinished(stage: str, key: str) -> Iterator[Path]:
    """Give the folder of a stage's finished parts, which a killed run leaves for the next one.

    DVC deletes a stage's outs before it runs, so parts live in cache_folder(), in a folder named
    by `key`, a digest of all the inputs that matter, and by the version of the stage's code. The
    folder is locked while in use, and removed when the block ends well, with those that other
    inputs left behind DAYS_KEPT ago.
    """
    folder = cache_folder() / f"{stage}-{digest(key, _code_version())[:16]}"
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
        _remove_stale(stage)
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


def _remove_stale(stage: str) -> None:
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for folder in cache_folder().glob(f"{stage}-*/"):
        # Where another run is at work, files come and go.
        with suppress(FileNotFoundError):
            if max(path.stat().st_mtime for path in [folder, *folder.iterdir()]) < oldest:
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_suffix(".lock").unlink(missing_ok=True)


def _code_version() -> str:
    """Of the modules of this project that the running stage has imported."""
    loaded = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    return digest_files(sorted(path for path in loaded if path.is_relative_to(STAGES)))
