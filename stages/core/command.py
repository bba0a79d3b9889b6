"""How every stage starts and ends: its --help, and errors as one readable line."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something a user can mend. The text names the key, file or object, and what to do."""


def run_stage(name: str, main: Callable[..., str], **arguments: str) -> None:
    """Run `main` with the positional arguments that `arguments` describes (name: help).

    Prints what it returns, one line of what was done.
    A UserError or a missing input ends the process with one line on stderr and exit code 1,
    Ctrl-C with code 130, without a traceback. Any other exception is a bug and keeps its traceback.
    """
    description = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}", description=description)
    for argument, text in arguments.items():
        parser.add_argument(argument, help=text)
    values = vars(parser.parse_args())
    name = " ".join([name, *values.values()])
    try:
        print(f"{name}: {main(**values)}", flush=True)
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"{name}: error: {error}: make the stage's inputs with `dvc repro` or `dvc pull`")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
