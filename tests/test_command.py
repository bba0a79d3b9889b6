"""How a stage ends: what it prints, on which stream, and with which exit code."""

import errno
import os
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from stages import split
from stages.runtime.command import run_stage
from stages.runtime.errors import Stopped, UserError
from stages.runtime.machine import allow_open_files, machine_error
from tests.conftest import REPOSITORY, write_params

MISSING = "make the stage's inputs with `dvc repro` or `dvc pull`"
FULL = "has 500 bytes free; free some space, and run again"
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def on_a_full_disk(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1000, 500, 500))
    return workspace


def end_of(
    monkeypatch: pytest.MonkeyPatch, main: Callable[..., str], *words: str, **arguments: str
) -> Any:
    """The exit code or message of run_stage with these command-line arguments."""
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    with pytest.raises(SystemExit) as caught:
        run_stage("fetch", main, **arguments)
    return caught.value.code


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[], Never]:
    def main() -> Never:
        raise error from cause

    return main


def train(model: str) -> str:
    return f"trained {model}"


def test_a_stage_that_ends_well_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", "vit"])
    run_stage("train", train, model="a model")
    assert capsys.readouterr().out == "train vit: trained vit\n"
    assert list(Path(".cache").iterdir()) == []


def system(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("lower subset.bins"), "lower subset.bins"),
        (FileNotFoundError("data/subset.parquet"), f"data/subset.parquet: {MISSING}"),
        (system(errno.EACCES, "data/a"), "'data/a': give this user access to it, and run again"),
        (system(errno.EROFS, "data/a"), "'data/a': make its disk writable, and run again"),
        (system(errno.EIO, "data/a"), "'data/a': check its disk, and run again"),
        (system(errno.ESTALE, "data/a"), "'data/a': mount its network disk anew, and run again"),
        (system(errno.EMFILE), "Too many open files: run `ulimit -n 4096` in this shell, and run"),
        (system(errno.ENFILE), "close other programs on this machine, and run again"),
        (system(errno.ENOMEM), "free some memory, or use a machine with more, and run again"),
        (MemoryError("Unable to allocate 4. TiB"), "4. TiB: free some memory, or use a machine"),
        (MemoryError(), "Cannot allocate memory: free some memory, or use a machine with more"),
        (system(errno.ENOTDIR, "data/a"), "'data/a': check this file and its folder, and run"),
        # A full disk, as reported by the system, pyarrow, safetensors, or a library that wraps it.
        (system(errno.ENOSPC, "data/a/b"), f"no room for data/a/b: the disk of {{here}} {FULL}"),
        (system(errno.EDQUOT, "data/a/b"), f"no room for data/a/b: the disk of {{here}} {FULL}"),
        (OSError(errno.ENOSPC, "Error writing bytes"), "no room for more: the disk of {here}"),
        (SafetensorError("I/O error: (os error 28)"), "no room for more: the disk of {here}"),
        (RuntimeError("write failed"), f"no room for model.pt: the disk of {{here}} {FULL}"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    monkeypatch: pytest.MonkeyPatch, workspace: Path, error: Exception, line: str
) -> None:
    cause = system(errno.ENOSPC, "model.pt") if isinstance(error, RuntimeError) else None
    code = end_of(monkeypatch, raising(error, cause))
    assert code.startswith("fetch: error: ")
    assert line.format(here=workspace) in code
    assert code.isprintable()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("28"),
        KeyError("a bug"),
        OSError("of a library"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(type(error)) as caught:
        run_stage("fetch", raising(error))
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "fetch: interrupted\n"),
        (
            Stopped(15, "after epoch 3"),
            143,
            "fetch: stopped by SIGTERM after epoch 3; the next run continues from there\n",
        ),
    ],
)
def test_a_signal_ends_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    assert end_of(monkeypatch, raising(error)) == code
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("words", [[], ["vit", "resnet34"], ["--fast", "vit"]])
def test_wrong_arguments_show_the_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert end_of(monkeypatch, train, *words, model="a model") == 2
    assert capsys.readouterr().err.startswith("usage: python -m stages.fetch [-h] model")


def test_help_says_what_the_stage_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(monkeypatch, split.main, "--help") == 0
    assert " ".join(str(split.__doc__).split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (None, "params.yaml is missing: run from the repository's root"),
        ({"split.colour": 1}, "params.yaml: split.colour: there is no such key"),
        ({}, MISSING),
    ],
    ids=["no params", "unknown key", "no input"],
)
def test_a_process_ends_with_one_line_and_code_one(
    overrides: dict[str, Any] | None, error: str
) -> None:
    if overrides is not None:
        write_params(overrides)
    process = subprocess.run(
        [sys.executable, "-m", "stages.split"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("split: error: ")
    assert error in process.stderr
    assert process.stderr.count("\n") == 1
    assert list(Path().glob("data/*")) == []


@pytest.mark.parametrize(("hard", "allowed"), [(resource.RLIM_INFINITY, 4096), (300, 300)])
def test_a_stage_may_open_as_many_files_as_this_machine_allows(
    monkeypatch: pytest.MonkeyPatch, hard: int, allowed: int
) -> None:
    limits = [(256, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    allow_open_files()
    allow_open_files()
    assert limits == [(256, hard), (allowed, hard)]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (system(errno.EMFILE, "model"), errno.EMFILE),
        (system(errno.EIO, "model"), errno.EIO),
        (system(errno.ENOSPC, "model"), errno.ENOSPC),
        (MemoryError(), errno.ENOMEM),
        # The wording of torch, pyarrow and safetensors.
        (RuntimeError("unable to open file <m>: Too many open files (24)"), errno.EMFILE),
        (RuntimeError("Error code 12 (Cannot allocate memory)"), errno.ENOMEM),
        (pa.ArrowMemoryError("malloc of size 64 failed"), errno.ENOMEM),
        (SafetensorError("I/O error: Input/output error (os error 5)"), errno.EIO),
        (ValueError("wrong"), None),
        (OSError("no file named model.safetensors"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "model"), None),
    ],
    ids=repr,
)
def test_an_error_of_the_machine_is_distinguished_from_one_of_the_input(
    error: Exception, number: int | None
) -> None:
    wrapped = ValueError("cannot be loaded")
    wrapped.__context__ = error

    for one in (error, wrapped):
        found = machine_error(one)
        assert (found.errno if found else None) == number
