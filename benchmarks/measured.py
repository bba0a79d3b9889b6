"""Run `python <arguments>`, and append its time and memory as JSON to the file $BENCH_MEASURES."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MEASURES = "BENCH_MEASURES"
#: The URL of the server's request counts.
COUNTS = "BENCH_COUNTS"


@dataclass(frozen=True)
class Measure:
    """The time, memory and requests of a command; memory is the peak of its largest process."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    requests: int

    @classmethod
    def of(cls, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Measure:
        """Run the command. Raises CalledProcessError if it fails."""
        before, started = requests(environment), time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command))
        return cls(
            command[-1].removeprefix("stages."),
            seconds,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * 1024,
            requests(environment) - before,
        )


def requests(environment: Mapping[str, str]) -> int:
    """How many requests the server has answered, without those for its counts."""
    if COUNTS not in environment:
        return 0
    with urllib.request.urlopen(environment[COUNTS]) as answer:  # noqa: S310 - on loopback
        counts = json.load(answer)
    return sum(counts[kind] for kind in ("gets", "heads", "lists"))


def main() -> None:
    try:
        measure = Measure.of([sys.executable, *sys.argv[1:]], Path.cwd(), os.environ)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    with Path(os.environ[MEASURES]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(measure)) + "\n")


if __name__ == "__main__":
    main()
