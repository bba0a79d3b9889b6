"""The doctor's findings about a machine and a repository with one fault after another."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import REPOSITORY, S3, bucket_params, folder_bucket, write_params
from tools import doctor
from tools.s3 import CLIENT_ENVIRONMENT, free_port, serving

PHOTOGRAPHS = {"metadata/00001.json": b"{}", "bin-images/00001.jpg": b"x"}
KEYS = {"access_key_id": "key-of-mine", "secret_access_key": "secret-of-mine"}
ONE_EACH = {"split.train": 1, "split.validation": 1, "split.test": 1}
FEW_BINS = {"subset.bins": 1000, "split.train": 800, "split.validation": 50, "split.test": 100}
Said = Callable[[str], str]


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a clone with everything committed, without user settings."""
    folder = tmp_path / "repository"
    for name in (".dvc/config", ".dvc/.gitignore", ".gitignore", "params.yaml", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    monkeypatch.chdir(folder)
    for name in os.environ:
        if name.startswith("AWS_") and name not in CLIENT_ENVIRONMENT:
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    git("init", "--quiet")
    git("config", "user.name", "Test")
    git("config", "user.email", "test@localhost")
    git("add", ".")
    git("commit", "--quiet", "--message", "Everything")
    return folder


def git(*command: str) -> None:
    subprocess.run(["git", *command], check=True)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs one check, and returns its output in one line."""

    def say(name: str) -> str:
        doctor.is_problem(name, (doctor.FIRST_CHECKS | doctor.CHECKS)[name])
        return " ".join(capsys.readouterr().out.split())

    return say


def set_remote(**settings: str) -> None:
    lines = ["['remote \"storage\"']", *(f"{key} = {value}" for key, value in settings.items())]
    Path(".dvc/config.local").write_text("\n".join(lines) + "\n")


def test_an_old_python_is_a_problem(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("Python").startswith("ok Python 3.")
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert said("Python").startswith("problem Python 3.9.1; 3.11 or newer is needed -> make setup")


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ("", "ok packages the 1 of"),
        ("winpty==1 ; sys_platform == 'win32' \\\n    --hash=sha256:d0\n", "ok packages the 1 of"),
        ("torch==2.0.1 \\\n    --hash=sha256:d0\n    # via x\n", "warning packages not as in"),
        ("no-such-package==1.0\n", "problem packages 1 are missing: no-such-package -> make setup"),
    ],
)
def test_missing_and_different_packages_are_named(said: Said, lock: str, expected: str) -> None:
    Path("requirements.txt").write_text(f"pytest=={pytest.__version__}\n{lock}")
    assert said("packages").startswith(expected)


def test_a_user_without_a_name_is_a_problem(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_number: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert said("user").startswith("problem user user id ")
    assert said("user").endswith("-> export USER=<any name>")
    monkeypatch.setenv("USER", "somebody")
    assert said("user") == "ok user somebody"


def test_each_problem_with_git_has_a_fix(
    said: Said, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("git").startswith("ok git")
    Path("stages").mkdir()
    Path("stages/new.py").touch()
    assert said("git") == "warning git queued experiments will lack stages/ -> git add"
    git("config", "--unset", "user.email")
    assert "`dvc exp run --queue` commits -> git config user.name" in said("git")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert said("git").endswith(f"git config --global --add safe.directory {repository}")
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    shutil.rmtree(".git")
    assert said("git").startswith("problem git this is not a git repository")
    monkeypatch.setenv("PATH", "")
    assert said("git").startswith("problem git git is not installed")


def test_invalid_params_are_named(said: Said) -> None:
    assert said("params.yaml").startswith("ok")
    write_params({"resize.fit": "crop"})
    assert "resize.fit" in said("params.yaml")


class Gpu(NamedTuple):
    name: str = "NVIDIA H200"
    total_memory: int = 150_000_000_000


def test_gpus_are_listed_or_a_driver_is_recommended(
    said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said("GPU").startswith("warning GPU none")
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    assert "-> install a driver for CUDA" in said("GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _number: Gpu())
    assert said("GPU") == "ok GPU NVIDIA H200, 150.0 GB; NVIDIA H200, 150.0 GB"


class FakeS3(BaseHTTPRequestHandler):
    """A read-only S3 server with the empty objects that Amazon's console makes for folders."""

    def do_GET(self) -> None:
        keys = {"metadata/": 0, "metadata/1.json": 2, "bin-images/": 0, "bin-images/1.jpg": 1}
        found = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in keys.items()
            if f"prefix={key.partition('/')[0]}" in self.path
        )
        self.answer(200, f"<ListBucketResult><KeyCount>2</KeyCount>{found}</ListBucketResult>")

    def do_HEAD(self) -> None:
        self.answer(200 if self.path.endswith((".json", ".jpg")) else 404, "")

    def do_PUT(self) -> None:
        self.answer(403, "<Error><Code>AccessDenied</Code><Message>Denied</Message></Error>")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def fake_s3() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeS3) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with the bucket storage, which requires KEYS."""
    buckets = tmp_path_factory.mktemp("guarded") / "s3"
    (buckets / "storage").mkdir(parents=True)
    with serving(buckets, "--auth-key", ",".join(KEYS.values())) as url:
        yield url


def test_a_bucket_of_photographs_can_be_read(
    said: Said, s3: S3, tmp_path: Path, fake_s3: str
) -> None:
    bucket = s3.make_bucket(PHOTOGRAPHS)
    with_markers = bucket.model_copy(update={"endpoint": fake_s3})
    for one in (bucket, with_markers, folder_bucket(tmp_path / "bucket", PHOTOGRAPHS)):
        write_params(bucket_params(one))
        expected = f"ok bucket {one.url}: metadata/ and bin-images/ can be read anonymously"
        assert said("bucket") == expected


def test_a_bucket_that_cannot_be_used_is_a_problem(said: Said, s3: S3) -> None:
    bucket = s3.make_bucket({"metadata/00001.json": b"{}"})
    for change, expected in (
        ({}, "has nothing in bin-images/ -> set bucket.url"),
        ({"url": "s3://no-such-bucket"}, "s3://no-such-bucket at"),
        ({"endpoint": f"http://127.0.0.1:{free_port()}"}, "bucket.endpoint"),
        ({"url": "file:///no/such/folder"}, "there is no folder /no/such/folder"),
    ):
        write_params(bucket_params(bucket.model_copy(update=change)))
        assert said("bucket").startswith("problem bucket")
        assert expected in said("bucket")


def test_a_remote_takes_an_object_and_keeps_nothing(said: Said, s3: S3, tmp_path: Path) -> None:
    bucket = s3.make_bucket({"files/md5/00/1": b"an object of DVC's"})
    stored = s3.folder / bucket.url.removeprefix("s3://")
    set_remote(url=bucket.url, endpointurl=s3.url, **KEYS)
    assert said("DVC remote").startswith(f"ok DVC remote {bucket.url} at {s3.url}: an object was")
    assert [path.name for path in stored.rglob("*") if path.is_file()] == ["1"]
    set_remote(url=str(tmp_path / "remote"))
    assert said("DVC remote").startswith("ok")
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]


def test_a_remote_that_is_not_set_comes_with_the_command_for_it(said: Said) -> None:
    assert "-> dvc remote modify --local storage url s3://" in said("DVC remote")
    Path(".dvc/config").write_text("")
    assert "-> dvc remote add" in said("DVC remote")


def test_a_remote_that_cannot_be_used_is_named_without_secrets(
    said: Said, s3: S3, guarded: str, fake_s3: str
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with_user = s3.url.replace("//", "//somebody:secret-of-mine@")
    for url, endpoint, keys, expected in (
        ("s3://no-such-bucket", s3.url, KEYS, "bucket does not exist"),
        ("s3://storage", nowhere, KEYS, "Could not connect to the endpoint URL"),
        ("s3://storage", guarded, {}, "NoCredentialsError"),
        ("s3://storage", guarded, KEYS | {"secret_access_key": "wrong"}, "signature"),
        ("s3://storage", fake_s3, KEYS, "it can be read, but not written"),
        ("s3://storage", with_user, {}, "NoCredentialsError"),
    ):
        set_remote(url=url, endpointurl=endpoint, **keys)
        text = said("DVC remote")
        assert text.startswith(f"problem DVC remote {url} at http://127.0.0.1:"), text
        assert expected in text
        assert "-> dvc remote modify --local storage <key> <value>" in text
        assert not [value for value in [*KEYS.values(), "wrong"] if value in text]


def test_links_are_fine_and_copies_are_a_warning(said: Said) -> None:
    assert said("DVC cache").startswith("ok DVC cache hardlinks")
    Path(".dvc/config.local").write_text("[cache]\ntype = copy\n")
    assert said("DVC cache").startswith("warning DVC cache copies, so data takes its space twice")


def test_a_cache_of_another_user_is_a_problem(
    said: Said, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{repository}/.dvc/cache/a/b")

    # Root, as which the CI runs the tests, is never refused.
    monkeypatch.setattr("dvc_objects.fs.generic.test_links", refuse)
    owner, user = repository.owner(), os.getuid()
    folder = f"{repository}/.dvc"
    assert f"{folder} belongs to {owner}, and you may not use it" in said("DVC cache")
    assert f"-> sudo chown -R {user} {folder}" in said("DVC cache")


def test_the_free_space_is_compared_with_the_params(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params({"subset.bins": 100_000, **ONE_EACH, "resize.size": 112})
    usage = shutil.disk_usage(".")._replace(free=8_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    # 60 kB and twice a quarter of 12 kB per photograph, and 2 GB.
    assert said("disk").startswith("problem disk 8.5 GB free, 8.6 GB needed -> free some")
    Path("data").mkdir()
    with Path("data/raw").open("wb") as file:
        file.truncate(8_000_000_000)
    assert said("disk") == "ok disk 8.5 GB free, 0.6 GB needed"


def test_unfinished_work_is_listed(said: Said) -> None:
    assert said("unfinished") == "ok unfinished none"
    Path(".cache/fetch-1234").mkdir(parents=True)
    with Path(".cache/fetch-1234/00000.parquet").open("wb") as file:
        file.truncate(200_000_000)
    assert said("unfinished").startswith(
        "ok unfinished .cache/fetch-1234, 0.2 GB, for the next run"
    )


def run_doctor(*options: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, *options, "-m", "tools.doctor"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_the_exit_code_says_whether_there_are_problems(s3: S3) -> None:
    write_params(bucket_params(s3.make_bucket(PHOTOGRAPHS)) | FEW_BINS)
    set_remote(url=s3.make_bucket({"a": b"b"}).url, endpointurl=s3.url, **KEYS)
    code, lines = run_doctor()
    assert (code, lines[-1]) == (0, "nothing would fail"), lines
    checks = len(doctor.FIRST_CHECKS) + len(doctor.CHECKS)
    assert len([line for line in lines if not line.startswith(" ")]) == checks + 1
    Path(".dvc/config").write_text("[remote")
    code, lines = run_doctor()
    assert (code, lines[-1]) == (1, "2 problems"), lines


def test_a_python_without_packages_is_told_to_install_them() -> None:
    code, lines = run_doctor("-S")
    assert code == 1
    assert lines[1].startswith("problem  packages     not checked, since packaging is not")
    assert lines[2].endswith("-> make setup")
