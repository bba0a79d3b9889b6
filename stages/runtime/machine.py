"""What this process may use of its machine."""

import os


def usable_cores() -> int:
    """The cores this process may run on, fewer than the machine's under taskset or a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
