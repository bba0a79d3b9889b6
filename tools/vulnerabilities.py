"""Look up every package of the lock in a database of known vulnerabilities, with pip-audit.

Exits with 1 where a package has one that a newer version mends; the others are only printed. Where
no database answers, one line says that nothing was checked, and the exit code is 0.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The package index's own, and another where that is a mirror without one.
DATABASES = ["pypi", "osv"]
PIP_AUDIT = [sys.executable, "-m", "pip_audit"]
# Without resolving or installing anything: the lock has all that there is, with hashes.
OPTIONS = ["--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
SECONDS = 300
LOCK = Path("requirements.txt")

Packages = list[dict[str, Any]]


class NoAnswerError(Exception):
    """A database did not answer; the text says why."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.vulnerabilities", description=__doc__)
    parser.add_argument("lock", nargs="?", type=Path, default=LOCK, help=f"default: {LOCK}")
    lock = parser.parse_args().lock
    try:
        packages = look_up(lock)
    except NoAnswerError as error:
        print(
            f"vulnerabilities: {lock} was not checked, since no database answers ({error}); where"
            " one does: make audit-lock"
        )
        return
    sys.exit(report(lock, packages))


def look_up(lock: Path) -> Packages:
    """What the first database that answers says of each package. Raises NoAnswerError."""
    reasons = []
    for database in DATABASES:
        try:
            return ask(database, lock)
        except NoAnswerError as error:
            reasons.append(f"{database}: {error}")
    raise NoAnswerError("; ".join(reasons))


def ask(database: str, lock: Path) -> Packages:
    command = [*PIP_AUDIT, *OPTIONS, "--vulnerability-service", database, "-r", str(lock)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        packages: Packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"nothing for {SECONDS} seconds") from None
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise NoAnswerError(lines[-1][:120]) from None
    # It skips packages that a database does not have, and calls that no vulnerability: of a mirror
    # without a database, all.
    if all("skip_reason" in package for package in packages):
        raise NoAnswerError("it has none of the packages")
    return packages


def report(lock: Path, packages: Packages) -> int:
    """Print what was found; the exit code."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, problem) for package in packages for problem in package.get("vulns", [])]
    for package, problem in found:
        mended = ", ".join(problem["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {problem['id']}, mended in {mended}")
    if skipped:
        print(f"not in the database: {', '.join(skipped)}")
    print(f"vulnerabilities: {len(found)} in the {len(packages)} packages of {lock}")
    return int(any(problem["fix_versions"] for _, problem in found))


if __name__ == "__main__":
    main()
