"""No output, log, lock, report or traceback has credentials, whatever a server answers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import lab
from tests.conftest import changed_params
from tests.faults import Fault, FaultProxy, always, at_random, fault_proxy, outage
from tests.project import Project, fill_buckets
from tools.s3 import serving

pytestmark = pytest.mark.slow
KEY, SECRET, TOKEN = "AKIAMARKEDMARKED0001", "marked+secret/key=0001", "marked+session/token=0001"
MARKS = [KEY, SECRET, TOKEN, "marked%2Bsecret", "marked%2Bsession", "bWFya2Vk"]
WRONG = "marked+secret/that-is-wrong"
FAULTS = [Fault.INTERNAL_ERROR, Fault.RESET, Fault.GARBLED, Fault.EXPIRED]


@dataclass
class Private:
    """A project whose bucket requires the marked credentials, behind a proxy with faults."""

    project: Project
    proxy: FaultProxy
    printed: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, **environment: str) -> int:
        """Run a command and keep its output. Returns the exit code."""
        done = subprocess.run(
            command,
            cwd=self.project.folder,
            env=self.project.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.printed[f"{len(self.printed)} {' '.join(command)}"] = done.stdout
        return done.returncode

    @property
    def last(self) -> str:
        return list(self.printed.values())[-1]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    root = tmp_path_factory.mktemp("private")
    fill_buckets(root / "s3")
    with (
        serving(root / "s3", "--auth-key", f"{KEY},{SECRET}") as endpoint,
        fault_proxy(endpoint) as proxy,
    ):
        project = Project(root / "project", endpoint)
        for name, value in {
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "session_token": TOKEN,
        }.items():
            project.run("dvc", "remote", "modify", "--local", "storage", name, value)
        project.environment |= {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": TOKEN,
        }
        settings = {**lab.KNOBS, "bucket.endpoint": proxy.url, "bucket.anonymous": False}
        # A body may be garbled twice, which is a reject.
        settings |= {"index.max_rejects": 0.2, "fetch.max_rejects": 0.2}
        lab.yaml.dump(changed_params(settings), project.folder / "params.yaml")
        yield Private(project, proxy)


@pytest.fixture(scope="module")
def used(private: Private) -> Private:
    """Every command that talks to a server has run, with success and with failure."""
    proxy, python = private.proxy, sys.executable
    proxy.plan = at_random(FAULTS, 0.1, seed=1)
    assert private.run("dvc", "repro", "-v", "fetch") == 0, private.last
    assert sum(proxy.injected.values()) > 10
    assert "retried" in private.last
    assert private.run("dvc", "push", "-v") == 0, private.last

    proxy.plan = always(Fault.DENIED, ".jpg")
    assert private.run(python, "-m", "stages.fetch") == 1
    assert "of 70 are unusable" in private.last
    assert "(access denied)" in private.last
    proxy.plan = outage(Fault.DENIED, after=0, lists=True)
    assert private.run(python, "-m", "stages.index") == 1
    assert "refuses access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in private.last
    audit = [python, "-m", "tools.audit", "s3://bins", "--signed", "--endpoint", proxy.url]
    assert private.run(*audit) == 2
    assert "refuses access" in private.last

    remote = ["dvc", "remote", "modify", "--local", "storage", "secret_access_key"]
    private.project.run(*remote, WRONG)
    assert private.run("dvc", "push", "-v") != 0
    assert private.run(python, "-m", "tools.doctor") == 1
    assert "refuses access" in private.last
    assert "signature" in private.last
    return private


def test_no_output_has_a_credential(used: Private) -> None:
    assert len(used.printed) == 7
    for command, text in used.printed.items():
        for mark in [*MARKS, WRONG]:
            assert mark not in text, f"{command} prints {mark}"


def test_no_file_but_the_configuration_has_a_credential(used: Private) -> None:
    folder = used.project.folder
    folders = [folder, Path(used.project.environment["HOME"])]
    files = [
        Path(parent, name) for top in folders for parent, _, names in os.walk(top) for name in names
    ]
    with_marks = [
        path.relative_to(folder.parent).as_posix()
        for path in files
        if path.name != Path(__file__).name
        and any(mark.encode() in path.read_bytes() for mark in [*MARKS, WRONG])
    ]
    assert with_marks == ["project/.dvc/config.local"]
    names = {path.relative_to(folder).as_posix() for path in files if folder in path.parents}
    assert {"dvc.lock", "data/index.json", "data/subset.parquet", "data/unfetched.csv"} <= names
