"""Space on disks: asked for before long work, and named where it runs out."""

import errno
import shutil
from pathlib import Path

from stages.runtime.errors import UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError where the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for {what} (about {readable(needed)}): the disk of {folder.absolute()} has"
            f" {readable(free)} free; free {readable(needed - free)} more, and run again"
        )


def on_one_disk(some: Path, others: Path) -> bool:
    return some.stat().st_dev == others.stat().st_dev


def disk_full(error: BaseException) -> BaseException | None:
    """The error of a full disk or quota that is or caused this one, whichever library raised it.

    Libraries written in Rust have the system's number in their text only; others raise an error of
    their own while they handle the system's.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number in _DISK_FULL or any(f"(os error {one})" in str(seen) for one in _DISK_FULL):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def disk_full_text(error: BaseException) -> str:
    """Which file has no room, where the error of a full disk names it, and what its disk has."""
    # Of a copy, the second file is the one that is written.
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    folder = next(place for place in Path(file or "x").absolute().parents if place.exists())
    free = readable(shutil.disk_usage(folder).free)
    return f"no room for {file or 'more'}: the disk of {folder} has {free} free"


def readable(count: int) -> str:
    """Bytes in the unit in which people count them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
