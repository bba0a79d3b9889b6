"""Writing files whole or not at all, and digests of inputs."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.space import disk_full


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; if the block succeeds, flush it and rename it to `path`.

    `path` itself is never opened, because it may be a hard link into DVC's cache. When the disk is
    full, the OSError names `path` even if the writing library does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except Exception as error:
        if disk_full(error) is None:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


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


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
