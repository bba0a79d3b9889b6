"""What this process may use of its machine, and the errors of the machine itself."""

import errno
import os
from contextlib import suppress

# Enough for the connections of fetch and the files of a training.
OPEN_FILES = 4096
#: Errors of a machine, and what to do about them; stages.runtime.space is about full disks.
REMEDIES = {
    errno.EACCES: "give this user access to it, and run again",
    errno.EPERM: "give this user access to it, and run again",
    errno.EROFS: "make its disk writable, and run again",
    errno.EIO: "check its disk, and run again",
    errno.ESTALE: "mount its network disk anew, and run again",
    errno.EMFILE: "run `ulimit -n 4096` in this shell, and run again",
    errno.ENFILE: "close other programs on this machine, and run again",
    errno.ENOMEM: "free some memory, or use a machine with more, and run again",
}


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


def machine_error(error: BaseException) -> OSError | None:
    """The error of this machine that is or caused this one, or None if the input is at fault.

    Some libraries repeat the system's message in an exception of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return OSError(errno.ENOMEM, str(seen) or os.strerror(errno.ENOMEM))
        for number in (*REMEDIES, errno.ENOSPC, errno.EDQUOT):
            if isinstance(seen, OSError) and seen.errno == number:
                return seen
            if os.strerror(number) in str(seen):
                return OSError(number, " ".join(str(seen).split()))
        seen = seen.__cause__ or seen.__context__
    return None
