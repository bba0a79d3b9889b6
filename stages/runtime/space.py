"""Disk space: checked before long work, and reported when it runs out."""

import errno
import shutil
from pathlib import Path

from stages.runtime.errors import UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for {what} (about {readable(needed)}): the disk of {folder.absolute()} has"
            f" {readable(free)} free; free {readable(needed - free)} more, and run again"
        )


def on_one_disk(some: Path, others: Path) -> bool:
    return some.stat().st_dev == others.stat().st_dev


def disk_full(error: BaseException) -> BaseException | None:
    """The error of a full disk or quota behind this one, whichever library raised it, or None.

    Libraries written in Rust have the system's error number only in their text. Others raise an
    error of their own while they handle the system's.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number in _DISK_FULL or any(f"(os error {one})" in str(seen) for one in _DISK_FULL):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def disk_full_text(error: BaseException) -> str:
    """Which file did not fit, if the error names it, and how much space its disk has."""
    # When a file is copied, the second name is the one that is written.
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    folder = next(folder for folder in Path(file or "x").absolute().parents if folder.exists())
    free = readable(shutil.disk_usage(folder).free)
    return f"no room for {file or 'more'}: the disk of {folder} has {free} free"


def readable(count: int) -> str:
    """A number of bytes as people write it, like 12.6 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
