"""Space on disks: asked for before long work, and named when it runs out."""

import errno
import shutil
from pathlib import Path

from stages.core.errors import UserError


class DiskFullError(UserError):
    """What was being written did not fit on its disk."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFullError where the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{what} need about {readable(needed)}, and the disk of {folder.absolute()} has"
            f" {readable(free)} free: make room for {readable(needed - free)}, and run again"
        )


def disk_full(path: Path, written: int) -> DiskFullError:
    """The error for a file of which so many bytes were written when its disk was full."""
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        f"{path} does not fit on its disk, which had room for {readable(written)} of it and has"
        f" {readable(free)} free now: make room, and run again"
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
