"""Space on disks: asked for before long work, and named where it runs out."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.errors import UserError


class DiskFullError(UserError):
    """What is to be written does not fit on its disk."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFullError where the disk of `folder` has fewer than `needed` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise _no_room(folder, needed, what)


def on_one_disk(some: Path, others: Path) -> bool:
    return some.stat().st_dev == others.stat().st_dev


@contextmanager
def space_for(path: Path, needed: int) -> Iterator[None]:
    """Turn what is raised in the block where the disk is full into a DiskFullError.

    It says that `path`, whose folder exists, takes about `needed` bytes; 0 where nobody knows.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise _no_room(path.parent, needed, str(path)) from None


def _no_room(folder: Path, needed: int, what: str) -> DiskFullError:
    free = shutil.disk_usage(folder).free
    takes = f" (about {readable(needed)})" if needed else ""
    # What was estimated may fit, and yet not be all.
    missing = f" for {readable(needed - free)}" if needed > free else ""
    return DiskFullError(
        f"no room for {what}{takes}: the disk of {folder.absolute()} has {readable(free)} free;"
        f" make room{missing}, and run again"
    )


def is_disk_full(error: Exception) -> bool:
    """Also where a library written in Rust has the system's number in its text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"(os error {number})" in str(error) for number in numbers)


def readable(count: int) -> str:
    """Bytes in the unit in which people count them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
