"""What this process may use of its machine, and the errors of the machine itself."""

# `make doctor` imports this on Pythons that are too old for the rest.
from __future__ import annotations

import errno
import math
import os
from contextlib import suppress
from pathlib import Path

# The kernel's list of the cgroups that this process is in, and where they are mounted.
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# About 30 microseconds, as long as it takes to wake a thread; libgomp's own number is 300000.
SPINS = "3000"
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
    """The cores that this process can keep busy, maybe fewer than the machine's.

    taskset and schedulers leave a process some of the cores, and a container's CPU limit leaves it
    some of their time: a limit of 1.5 CPUs keeps two cores busy.
    """
    return math.ceil(min(_cores_to_run_on(), _cpu_limit()))


def _cores_to_run_on() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_limit() -> float:
    """The CPUs that this process's cgroup and all above it allow, infinite if none has a limit.

    Those that a container hides are skipped. What a container sees as the top is then its own.
    """
    limits = [math.inf]
    # Other systems than Linux have no cgroups.
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            # Version 2 has one tree, and names no controllers; version 1 has a tree for CPU time.
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = CGROUPS / "cpu" if controllers else CGROUPS
            own = top / path.lstrip("/")
            limits += [_limit_of(one) for one in (own, *own.parents) if top in (one, *one.parents)]
    return min(limits)


def _limit_of(cgroup: Path) -> float:
    # ValueError: version 2 writes "max" for no limit. Version 1 writes -1.
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text("utf-8").split()
        return int(quota) / int(period)
    with suppress(OSError):
        quota, period = (
            (cgroup / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period")
        )
        if int(quota) > 0:
            return int(quota) / int(period)
    return math.inf


def set_up_openmp() -> None:
    """Keep torch's threads within a container's limit, and from wasting cores that others need.

    Threads that wait for one another spin, by default for 3 ms, and occupy cores that the awaited
    ones may need; so a training would be slowed down several times by another one beside it. Call
    this before torch is imported, when its OpenMP reads the environment. What the user has set
    there stays.

    The number of threads cannot depend on what else the machine does: it decides how sums are
    rounded, and the same inputs would no longer give the same bytes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if usable_cores() < _cores_to_run_on():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


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
