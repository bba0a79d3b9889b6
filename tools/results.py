"""What the checks of tools/doctor.py give. Standard library only, since packages may be missing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """`state` is ok, warning or problem; `mend` a command or what else to do about it."""

    state: str
    text: str
    mend: str = ""


def ok(text: str) -> Result:
    return Result("ok", text)


def warning(text: str, mend: str) -> Result:
    return Result("warning", text, mend)


def problem(text: str, mend: str) -> Result:
    return Result("problem", text, mend)


def first_three(words: list[str]) -> str:
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
