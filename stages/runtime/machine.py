"""What this process may use of its machine."""

import os
from contextlib import suppress

# Enough for the connections of fetch and the files of a training.
OPEN_FILES = 4096


def usable_cores() -> int:
    """The cores this process may run on, fewer than the machine's under taskset or a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allow_open_files() -> None:
    """Raise this process' limit of open files, 256 by default on macOS, as far as it may."""
    # ImportError: not on Windows. OSError and ValueError: a system with a lower limit of its own.
    with suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
