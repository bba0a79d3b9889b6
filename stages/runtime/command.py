"""How every stage starts and ends: its --help, and errors as one readable line."""

import argparse
import signal
import sys
from collections.abc import Callable

from stages.runtime.errors import Stopped, UserError
from stages.runtime.machine import REMEDIES, allow_open_files, machine_error
from stages.runtime.space import disk_full, disk_full_text
from stages.runtime.work import exclusive_run


def run_stage(name: str, main: Callable[..., str], **arguments: str) -> None:
    """Run `main` with the positional arguments that `arguments` describes (name: help).

    Prints what it returns, one line about what was done. What the user or this machine can fix
    ends the process with one line on stderr and exit code 1, Ctrl-C with code 130, a signal that
    `main` turns into Stopped with 128 and its number. Any other exception is a bug and keeps its
    traceback.
    """
    description = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}", description=description)
    for argument, text in arguments.items():
        parser.add_argument(argument, help=text)
    values = vars(parser.parse_args())
    name = " ".join([name, *values.values()])
    allow_open_files()
    try:
        with exclusive_run(name):
            print(f"{name}: {main(**values)}", flush=True)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Stopped as stopped:
        by = signal.Signals(stopped.signal).name
        text = f"{name}: stopped by {by} {stopped.where}; the next run continues from there"
        print(text, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        sys.exit(f"{name}: error: {line}")


def explain(error: Exception) -> str | None:
    """One line about an error that the user or this machine can fix; None for a bug."""
    if full := disk_full(error):
        return f"{disk_full_text(full)}; free some space, and run again"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        error = machine_error(error) or error
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError):
        return f"{error}: make the stage's inputs with `dvc repro` or `dvc pull`"
    if error.errno in REMEDIES:
        return f"{error}: {REMEDIES[error.errno]}"
    # Libraries raise OSErrors without a file, too: those may be bugs.
    return f"{error}: check this file and its folder, and run again" if error.filename else None
