"""How every stage starts and ends: its --help, and errors as one readable line."""

import argparse
import errno
import signal
import sys
from collections.abc import Callable

from stages.runtime.errors import Stopped, UserError
from stages.runtime.space import is_disk_full
from stages.runtime.work import only_run_here

# What the file system refuses, whatever file it was, and what to do about it.
_REMEDIES = {
    errno.ENOSPC: "free some space on the disk, and run again",
    errno.EDQUOT: "free some space of the disk quota, and run again",
    errno.EACCES: "give this user access to it, and run again",
    errno.EPERM: "give this user access to it, and run again",
    errno.EROFS: "make its disk writable, and run again",
    errno.EIO: "check its disk, and run again",
}


def run_stage(name: str, main: Callable[..., str], **arguments: str) -> None:
    """Run `main` with the positional arguments that `arguments` describes (name: help).

    Prints what it returns, one line of what was done.
    A UserError, a missing input or a file that the system refuses ends the process with one line
    on stderr and exit code 1, Ctrl-C with code 130, without a traceback. Any other exception is a
    bug and keeps its traceback.
    """
    description = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}", description=description)
    for argument, text in arguments.items():
        parser.add_argument(argument, help=text)
    values = vars(parser.parse_args())
    name = " ".join([name, *values.values()])
    try:
        with only_run_here(name):
            print(f"{name}: {main(**values)}", flush=True)
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"{name}: error: {error}: make the stage's inputs with `dvc repro` or `dvc pull`")
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        sys.exit(f"{name}: error: {error}: {remedy}")
    except Stopped as stopped:
        name_of_signal = signal.Signals(stopped.signal).name
        print(
            f"{name}: stopped by {name_of_signal} {stopped.where}; the next run goes on from there",
            file=sys.stderr,
        )
        sys.exit(128 + stopped.signal)
    except Exception as error:
        if not is_disk_full(error):
            raise
        sys.exit(f"{name}: error: {error}: {_REMEDIES[errno.ENOSPC]}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _remedy(error: OSError) -> str | None:
    """What to do about a file that the system refuses; None for errors of another kind.

    Libraries raise OSErrors too, without a number or a file: those may be bugs.
    """
    if error.errno in _REMEDIES:
        return _REMEDIES[error.errno]
    return None if error.filename is None else "check this file and its folder, and run again"
