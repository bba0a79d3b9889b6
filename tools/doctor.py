"""What would fail here and how to mend it, one line for each thing that the pipeline needs.

A problem stops a stage, an experiment, or `dvc push` and `dvc pull`; a warning only limits
something. The exit code is 0 where there is no problem, and 1 where there is one. No secret is
printed, and nothing is changed, but for a small object that comes and goes in the DVC remote.
"""

# Only the standard library up here, and nothing that old Pythons do not understand: what is
# missing or too old is for the checks to find.
from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Callable  # noqa: UP035 - not in collections.abc of old Pythons

from tools.results import Result, first_line, first_three, ok, output, problem, succeeds, warning

Check = Callable[[], Result]

# A check that hangs is given up. Its requests end sooner by themselves.
CHECK_SECONDS = 20


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.doctor", description=__doc__).parse_args()
    # What libraries say meanwhile is in the results, in plainer words.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # Botocore's default is to try five times.
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
    try:
        count = run_checks()
    except KeyboardInterrupt:
        print("doctor: interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"{count} problem{'s' if count > 1 else ''}" if count else "nothing would fail")
    sys.exit(count > 0)


def run_checks() -> int:
    """Print what each finds; the number of problems."""
    states = [show(name, check) for name, check in FIRST_CHECKS.items()]
    if "problem" not in states:
        from tools.doctor_checks import CHECKS  # noqa: PLC0415 - it needs the packages

        states += [show(name, check) for name, check in CHECKS.items()]
    return states.count("problem")


def show(name: str, check: Check) -> str:
    result = in_time(check)
    print(f"{result.state:8} {name:12} {result.text}", flush=True)
    if result.mend:
        print(f"{'':21} -> {result.mend}", flush=True)
    return result.state


def in_time(check: Check) -> Result:
    """The check's result; a problem where it fails itself, or hangs."""
    results: list[Result] = []

    def work() -> None:
        try:
            results.append(check())
        except Exception as error:  # noqa: BLE001 - whatever is broken, the others are checked
            text = f"not checked: {type(error).__name__}: {first_line(error)}"
            results.append(problem(text, "mend that, and try again"))

    # A daemon: one that hangs does not keep the program from ending.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    hangs = problem(f"no answer in {CHECK_SECONDS} s", "check the network, proxies and disks")
    return results[0] if results else hangs


def check_python() -> Result:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - whichever Python was found runs this
        return problem(f"{version}; 3.11 is needed", "make setup PYTHON=/path/to/python3.11")
    return ok(f"{version}, {sys.executable}")


def check_packages() -> Result:
    """Those installed, against requirements.txt."""
    try:
        wanted = locked_versions(Path("requirements.txt").read_text("utf-8"))
    except ModuleNotFoundError:
        return problem("those of requirements.txt are not installed", "make setup")
    missing, different = [], []
    for name, version in wanted.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        # torch 2.14.0+cu130 is torch 2.14.0.
        if installed.partition("+")[0] != version.partition("+")[0]:
            different.append(f"{name} {installed}, not {version}")
    if missing:
        return problem(f"{len(missing)} are missing: {first_three(missing)}", "make setup")
    if different:
        return warning(f"not those of requirements.txt: {first_three(different)}", "make setup")
    return ok(f"the {len(wanted)} of requirements.txt")


def locked_versions(requirements: str) -> dict[str, str]:
    """Names and versions of a lock, from the lines that are for this machine."""
    from packaging.requirements import Requirement  # noqa: PLC0415 - it may be missing

    lines = [line.rstrip(" \\") for line in requirements.splitlines()]
    found = [Requirement(line) for line in lines if "==" in line and line[0].isalnum()]
    return {
        requirement.name: str(requirement.specifier).replace("==", "")
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate()
    }


def check_git() -> Result:
    if not shutil.which("git"):
        return problem("git is not installed", "install it with the system's package manager")
    if not succeeds("git", "rev-parse", "--git-dir"):
        return problem("this is no git repository, and DVC needs one", "clone it with git")
    changes = output("git", "status", "--porcelain").splitlines()
    new = [line[3:] for line in changes if line.startswith("??")]
    if new:
        return warning(f"experiments of a queue will lack {first_three(new)}", "git add")
    if changes:
        return ok(f"changes in {len(changes)} of its files, which experiments take along")
    return ok("all committed")


def check_identity() -> Result:
    # DVC takes no name that git guesses from the machine.
    if succeeds("git", "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT"):
        return ok("set, for commits and experiments")
    mend = "git config user.name '<name>'; git config user.email '<address>'"
    return problem("git has none, and `dvc exp run --queue` commits", mend)


FIRST_CHECKS: dict[str, Check] = {
    "Python": check_python,
    "packages": check_packages,
    "git": check_git,
    "git identity": check_identity,
}

if __name__ == "__main__":
    main()
