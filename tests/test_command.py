import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Never

import pytest

from stages import fetch
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from tests.conftest import REPOSITORY, write_params

MISSING = "make the stage's inputs with `dvc repro` or `dvc pull`"


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a stage as dvc.yaml does, in the current directory."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def exit_of(
    main: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    *words: str,
    arguments: Mapping[str, str] | None = None,
) -> Any:
    """What run_stage leaves the process with when `words` follow the command."""
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    with pytest.raises(SystemExit) as caught:
        run_stage("fetch", main, **(arguments or {}))
    return caught.value.code


def raising(error: BaseException) -> Callable[[], Never]:
    def main() -> Never:
        raise error

    return main


def train(model: str) -> str:
    return f"trained {model}"


def test_a_stage_that_ends_well_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", "vit"])
    run_stage("train", train, model="a model")
    assert capsys.readouterr().out == "train vit: trained vit\n"


def test_a_user_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    code = exit_of(raising(UserError("lower subset.bins")), monkeypatch)
    assert code == "fetch: error: lower subset.bins"


def test_a_missing_input_tells_how_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = exit_of(raising(FileNotFoundError("data/subset.parquet")), monkeypatch)
    assert code == f"fetch: error: data/subset.parquet: {MISSING}"


def test_ctrl_c_ends_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(raising(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "fetch: interrupted\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "data/raw/.00000.parquet.partial"),
            "[Errno 28] No space left on device: 'data/raw/.00000.parquet.partial': free some space"
            " on the disk, and run again",
        ),
        # As pyarrow raises it.
        (
            OSError(errno.ENOSPC, "Error writing bytes to file"),
            "[Errno 28] Error writing bytes to file: free some space on the disk, and run again",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "data/index.parquet"),
            "[Errno 13] Permission denied: 'data/index.parquet': give this user access to it, and"
            " run again",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "data/raw"),
            "[Errno 20] Not a directory: 'data/raw': check this file and its folder, and run again",
        ),
    ],
    ids=["disk full", "disk full, no file", "permission", "another"],
)
def test_a_file_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: OSError, text: str
) -> None:
    assert exit_of(raising(error), monkeypatch) == f"fetch: error: {text}"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("a bug"),
        OSError("of a library"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(type(error)) as caught:
        run_stage("fetch", raising(error))
    assert caught.value is error


@pytest.mark.parametrize("words", [[], ["vit", "resnet34"], ["--fast", "vit"]])
def test_wrong_arguments_show_the_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code = exit_of(train, monkeypatch, *words, arguments={"model": "a model"})
    assert code == 2
    assert capsys.readouterr().err.startswith("usage: python -m stages.fetch [-h] model")


def test_help_says_what_the_stage_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(fetch.main, monkeypatch, "--help") == 0
    assert str(fetch.__doc__) in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("workspace")
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
    process = run_module("stages.split")
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith("split: error: ")
    assert error in process.stderr
    assert process.stderr.count("\n") == 1
    assert list(Path().glob("data/*")) == []
