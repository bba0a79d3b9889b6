"""The check of the lock for known vulnerabilities, with a stand-in for pip-audit."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import vulnerabilities

# Answers for each database by its line of a file, and notes how it was asked.
STAND_IN = """
import json, pathlib, sys
answers = json.loads(pathlib.Path("answers.json").read_text())
with open("asked.txt", "a") as file:
    print(*sys.argv[1:], file=file)
database = sys.argv[sys.argv.index("--vulnerability-service") + 1]
code, out, err = answers[database]
print(out)
print(err, file=sys.stderr)
sys.exit(code)
"""
UNREACHABLE = [1, "", "Traceback\n...\nConnectionError: Failed to resolve 'x'"]
UNKNOWN = {"name": "a", "skip_reason": "Dependency not found on PyPI"}
GOOD = {"name": "b", "version": "1.0", "vulns": []}


def answer(*packages: dict[str, Any], code: int = 0) -> list[Any]:
    return [code, json.dumps({"dependencies": packages, "fixes": []}), ""]


def vulnerable(*fixes: str) -> dict[str, Any]:
    problem = {"id": "PYSEC-1", "fix_versions": list(fixes), "aliases": [], "description": ""}
    return {"name": "c", "version": "2.0", "vulns": [problem]}


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **answers: list[Any]
) -> tuple[int, list[str]]:
    """The exit code and the lines that are printed."""
    Path("answers.json").write_text(json.dumps(answers))
    Path("stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(vulnerabilities, "PIP_AUDIT", [sys.executable, "stand_in.py"])
    monkeypatch.setattr(sys, "argv", ["vulnerabilities"])
    try:
        vulnerabilities.main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_lock_without_vulnerabilities_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(monkeypatch, capsys, pypi=answer(GOOD))

    assert code == 0
    assert lines == ["vulnerabilities: 0 in the 1 packages of requirements.txt"]
    (asked,) = Path("asked.txt").read_text().splitlines()
    for option in ("--require-hashes", "--disable-pip", "-r requirements.txt"):
        assert option in asked


@pytest.mark.parametrize(("fixes", "code"), [(["2.1", "3.0"], 1), ([], 0)])
def test_what_a_newer_version_mends_fails(
    fixes: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(monkeypatch, capsys, pypi=answer(GOOD, UNKNOWN, vulnerable(*fixes), code=1))

    assert found[0] == code
    assert found[1] == [
        f"c 2.0: PYSEC-1, mended in {', '.join(fixes) or 'no version yet'}",
        "not in the database: a",
        "vulnerabilities: 1 in the 3 packages of requirements.txt",
    ]


@pytest.mark.parametrize("first", [UNREACHABLE, answer(UNKNOWN, UNKNOWN)])
def test_the_second_database_is_asked_where_the_first_has_no_answer(
    first: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(monkeypatch, capsys, pypi=first, osv=answer(vulnerable("3"), code=1))

    assert code == 1
    assert lines[0] == "c 2.0: PYSEC-1, mended in 3"


def test_without_a_database_one_line_says_that_nothing_was_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(monkeypatch, capsys, pypi=answer(UNKNOWN), osv=UNREACHABLE)

    assert code == 0
    assert lines == [
        "vulnerabilities: requirements.txt was not checked, since no database answers (pypi: it has"
        " none of the packages; osv: ConnectionError: Failed to resolve 'x'); where one does: make"
        " audit-lock"
    ]


def test_a_database_that_hangs_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vulnerabilities, "SECONDS", 0.01)

    code, lines = run(monkeypatch, capsys, pypi=answer(GOOD), osv=answer(GOOD))

    assert code == 0
    assert "pypi: nothing for 0.01 seconds; osv: nothing for 0.01 seconds" in lines[0]
