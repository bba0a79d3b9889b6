"""What doctor says of a machine and a repository where one thing after another is broken."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stages.runtime import params
from tests.conftest import REPOSITORY, S3, bucket_params, folder_bucket, write_params
from tools import doctor, doctor_checks
from tools.doctor import locked_versions
from tools.doctor_checks import needed_bytes
from tools.results import Result
from tools.s3 import CLIENT_ENVIRONMENT, free_port, serving

PHOTOGRAPHS = {"metadata/00001.json": b"{}", "bin-images/00001.jpg": b"x"}
KEYS = {"access_key_id": "key-of-mine", "secret_access_key": "secret-of-mine"}
FEW_BINS = {"subset.bins": 1000, "split.train": 800, "split.test": 100}
LOCK = """\
# by uv
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:d0 \\
    --hash=sha256:d1
    # via tqdm
numpy==2.3.1 \\
    --hash=sha256:d2
torch==2.14.0 ; sys_platform == 'linux' \\
    --hash=sha256:d3
"""


def git(*command: str) -> None:
    subprocess.run(["git", *command], check=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a clone with everything committed, on a machine without settings."""
    folder = tmp_path / "repository"
    for name in (".dvc/config", ".dvc/.gitignore", ".gitignore", "params.yaml", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    monkeypatch.chdir(folder)
    for name in os.environ:
        if name.startswith("AWS_") and name not in CLIENT_ENVIRONMENT:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    git("init", "--quiet")
    git("config", "user.name", "Test")
    git("config", "user.email", "test@localhost")
    git("add", ".")
    git("commit", "--quiet", "--message", "Everything")
    return folder


def set_remote(**settings: str) -> None:
    lines = ["['remote \"storage\"']", *(f"{key} = {value}" for key, value in settings.items())]
    Path(".dvc/config.local").write_text("\n".join(lines) + "\n")


def set_remote_bucket(bucket: params.Bucket) -> None:
    assert bucket.endpoint
    set_remote(url=bucket.url, endpointurl=bucket.endpoint, **KEYS)


def test_the_lock_is_read_for_this_machine() -> None:
    assert locked_versions(LOCK) == {"numpy": "2.3.1", "torch": "2.14.0"}


def test_python_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python().state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    result = doctor.check_python()
    assert result.state == "problem"
    assert "3.9.1; 3.11 is needed" in result.text


@pytest.mark.usefixtures("repository")
def test_packages_are_missing_or_others(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("requirements.txt").write_text(LOCK)
    versions = {"numpy": "2.3.1", "torch": "2.14.0+cu130"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.check_packages() == Result("ok", "the 2 of requirements.txt")
    versions["torch"] = "2.11.0"
    result = doctor.check_packages()
    assert result.state == "warning"
    assert "torch 2.11.0, not 2.14.0" in result.text
    del versions["numpy"]
    assert doctor.check_packages() == Result("problem", "1 are missing: numpy", "make setup")


@pytest.mark.usefixtures("repository")
def test_the_state_of_git() -> None:
    assert doctor.check_git() == Result("ok", "all committed")
    Path("params.yaml").write_text("")
    assert doctor.check_git().text.startswith("changes in 1 of its files")
    Path("stages").mkdir()
    Path("stages/new.py").write_text("")
    result = doctor.check_git()
    assert (result.state, result.mend) == ("warning", "git add")
    assert "stages/" in result.text
    shutil.rmtree(".git")
    assert doctor.check_git().state == "problem"


def test_git_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert doctor.check_git().text == "git is not installed"


@pytest.mark.usefixtures("repository")
def test_git_knows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_identity().state == "ok"
    git("config", "--unset", "user.email")
    result = doctor.check_identity()
    assert result.state == "problem"
    assert "git config user.email" in result.mend
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "somebody@localhost")
    assert doctor.check_identity().state == "ok"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu(NamedTuple):
        name: str = "NVIDIA H200"
        total_memory: int = 150_000_000_000

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _number: Gpu())
    one = "NVIDIA H200, 150.0 GB"
    assert doctor_checks.check_gpu() == Result("ok", f"{one}; {one}")


def test_no_gpu_or_none_that_torch_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_checks.check_gpu().state == "warning"
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    result = doctor_checks.check_gpu()
    assert result.state == "problem"
    assert "driver" in result.mend


@pytest.mark.usefixtures("repository")
def test_params_that_are_not_valid_stop_no_other_check() -> None:
    assert doctor_checks.check_params().state == "ok"
    write_params({"resize.fit": "crop"})
    result = doctor_checks.check_params()
    assert result.state == "problem"
    assert "resize.fit" in result.text
    assert doctor_checks.check_bucket().text == "not checked, since params.yaml is not valid"
    assert doctor_checks.check_disk().text == "not checked, since params.yaml is not valid"
    Path("params.yaml").unlink()
    assert "run from the repository's root" in doctor_checks.check_params().text


def bucket_result(bucket: params.Bucket, **changed: Any) -> Result:
    write_params(bucket_params(bucket.model_copy(update=changed)))
    return doctor_checks.check_bucket()


@pytest.mark.usefixtures("repository")
def test_a_bucket_of_photographs(s3: S3, tmp_path: Path) -> None:
    bucket = s3.make_bucket(PHOTOGRAPHS)
    result = bucket_result(bucket)
    assert result == Result(
        "ok", f"{bucket.url}: metadata/ and bin-images/ can be read anonymously"
    )
    assert bucket_result(folder_bucket(tmp_path / "bucket", PHOTOGRAPHS)).state == "ok"


@pytest.mark.usefixtures("repository")
def test_a_bucket_without_photographs(s3: S3, tmp_path: Path) -> None:
    records = {"metadata/00001.json": b"{}"}
    for bucket in (s3.make_bucket(records), folder_bucket(tmp_path / "bucket", records)):
        result = bucket_result(bucket)
        assert result.state == "problem"
        assert result.text == f"{bucket.url} has nothing in bin-images/"
        assert "bucket.url" in result.mend


@pytest.mark.usefixtures("repository")
def test_a_bucket_that_is_not_there(s3: S3, tmp_path: Path) -> None:
    result = bucket_result(s3.locate("no-such-bucket"))
    assert result.state == "problem"
    assert result.text.startswith(f"s3://no-such-bucket at {s3.url} does not exist")
    wrong_port = f"http://127.0.0.1:{free_port()}"
    result = bucket_result(s3.locate("bins"), endpoint=wrong_port)
    assert result.state == "problem"
    assert result.text.startswith(f"s3://bins at {wrong_port} cannot be read: HTTP error")
    assert result.mend == "check bucket.endpoint and the network"
    result = bucket_result(s3.locate("bins"), url=f"file://{tmp_path}/nowhere", endpoint=None)
    assert result.state == "problem"
    assert "there is no folder" in result.text


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with the buckets bins and storage, which wants KEYS."""
    buckets = tmp_path_factory.mktemp("guarded") / "s3"
    folder_bucket(buckets / "bins", PHOTOGRAPHS)
    (buckets / "storage").mkdir()
    with serving(buckets, "--auth-key", ",".join(KEYS.values())) as url:
        yield url


@pytest.mark.usefixtures("repository")
def test_a_bucket_that_wants_keys(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = params.Bucket(url="s3://bins", region="us-east-1", endpoint=guarded, anonymous=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    result = bucket_result(bucket)
    assert result.state == "problem"
    assert "AWS_SECRET_ACCESS_KEY" in result.text
    assert "another-secret" not in result.text
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["secret_access_key"])
    assert bucket_result(bucket).text.endswith("can be read with the keys of the environment")


@pytest.mark.usefixtures("repository")
def test_a_remote_takes_an_object_and_keeps_nothing(s3: S3, tmp_path: Path) -> None:
    bucket = s3.make_bucket({"files/md5/00/1": b"an object of DVC's"})
    set_remote_bucket(bucket)
    before = sorted((s3.folder / bucket.url.removeprefix("s3://")).rglob("*"))
    result = doctor_checks.check_remote()
    assert result.state == "ok"
    assert result.text.startswith(f"{bucket.url} at {s3.url}: an object was written")
    assert sorted((s3.folder / bucket.url.removeprefix("s3://")).rglob("*")) == before
    set_remote(url=str(tmp_path / "remote"))
    assert doctor_checks.check_remote().state == "ok"
    assert not list((tmp_path / "remote").iterdir())


@pytest.mark.usefixtures("repository")
def test_clients_of_the_local_server_need_a_setting(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_remote_bucket(s3.make_bucket({"files/md5/00/1": b"an object of DVC's"}))
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
    result = doctor_checks.check_remote()
    assert result.state == "warning"
    assert result.mend == "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required"


@pytest.mark.usefixtures("repository")
def test_a_remote_that_is_not_set() -> None:
    result = doctor_checks.check_remote()
    assert result.state == "warning"
    assert result.mend.startswith("dvc remote modify --local storage url s3://")
    Path(".dvc/config").write_text("")
    result = doctor_checks.check_remote()
    assert result.state == "problem"
    assert result.mend.startswith("dvc remote add")


@pytest.mark.usefixtures("repository")
def test_a_remote_that_is_not_there(s3: S3) -> None:
    set_remote_bucket(s3.locate("no-such-bucket"))
    result = doctor_checks.check_remote()
    assert result.state == "problem"
    assert "s3://no-such-bucket" in result.text
    assert "names a bucket that does not exist" in result.text
    assert "dvc remote modify --local storage url" in result.mend
    set_remote(url="s3://storage", endpointurl=f"http://127.0.0.1:{free_port()}", **KEYS)
    result = doctor_checks.check_remote()
    assert result.state == "problem"
    assert result.text.endswith("does not answer")
    assert result.mend.startswith("dvc remote modify --local storage endpointurl")


@pytest.mark.usefixtures("repository")
def test_a_remote_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "REQUEST_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        set_remote(
            url="s3://storage", endpointurl=f"http://127.0.0.1:{server.getsockname()[1]}", **KEYS
        )
        started = time.monotonic()
        assert doctor_checks.check_remote().text.endswith("does not answer")
        assert time.monotonic() - started < 10


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "there are no credentials for it"),
        ({"profile": "nobody"}, "there are no credentials for it"),
        (KEYS | {"access_key_id": "wrong-key"}, "does not know the access key"),
        (KEYS | {"secret_access_key": "wrong-secret"}, "does not accept the secret key"),
    ],
)
def test_a_remote_with_other_keys(guarded: str, keys: dict[str, str], text: str) -> None:
    set_remote(url="s3://storage", endpointurl=guarded, **keys)
    result = doctor_checks.check_remote()
    assert result.state == "problem"
    assert text in result.text
    assert result.mend.startswith("dvc remote modify --local storage access_key_id")
    for value in keys.values():
        assert value not in f"{result.text} {result.mend}" or value == "nobody"


@pytest.mark.usefixtures("repository")
def test_a_remote_with_its_keys(guarded: str) -> None:
    set_remote(url="s3://storage", endpointurl=guarded, **KEYS)
    assert doctor_checks.check_remote().state == "ok"


class DenyingServer(BaseHTTPRequestHandler):
    """S3 as it answers where one may list but not write, and in another region."""

    def do_GET(self) -> None:
        if self.path.startswith("/elsewhere"):
            self.answer(301, "<Error><Code>PermanentRedirect</Code></Error>")
        else:
            self.answer(200, "<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")

    def do_HEAD(self) -> None:
        self.answer(200, "")

    def do_PUT(self) -> None:
        self.answer(403, "<Error><Code>AccessDenied</Code><Message>Denied</Message></Error>")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: Any) -> None:
        pass


@contextmanager
def denying_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), DenyingServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.usefixtures("repository")
def test_a_remote_that_can_only_be_read() -> None:
    with denying_server() as url:
        set_remote(url="s3://storage", endpointurl=url, **KEYS)
        result = doctor_checks.check_remote()
        assert result.state == "problem"
        assert result.text == f"s3://storage at {url} can be read, but not written"
        set_remote(url="s3://elsewhere", endpointurl=url, **KEYS)
        assert "remote modify --local storage region" in doctor_checks.check_remote().mend


@pytest.mark.usefixtures("repository")
def test_no_user_or_password_of_a_url_is_shown(s3: S3) -> None:
    url = s3.url.replace("//", "//somebody:secret-of-mine@")
    set_remote(url="s3://storage", endpointurl=url)
    result = doctor_checks.check_remote()
    assert result.state == "problem"
    assert "secret-of-mine" not in f"{result.text} {result.mend}"


def test_secrets_are_taken_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-mine")
    text = "no: key-of-mine, secret-of-mine, token-of-mine, s3://storage"
    settings = KEYS | {"url": "s3://storage"}
    assert doctor_checks.without_secrets(text, settings) == "no: ***, ***, ***, s3://storage"


@pytest.mark.usefixtures("repository")
def test_links_and_copies() -> None:
    assert doctor_checks.check_links().state == "ok"
    Path(".dvc/config.local").write_text("[cache]\ntype = copy\n")
    result = doctor_checks.check_links()
    assert result == Result(
        "warning",
        ".dvc/cache: copies, so data takes its space twice",
        "dvc cache dir --local <a folder on this disk>, if it can do hard links",
    )
    assert not Path(".dvc/cache").exists()


@pytest.mark.usefixtures("repository")
def test_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params({"subset.bins": 100_000, "split.train": 1, "split.test": 1, "resize.size": 112})
    # 60 kB and twice a quarter of 12 kB each, and 2 GB.
    assert needed_bytes(params.load_params()) == 8_600_000_000
    free = 8_700_000_000
    usage = shutil.disk_usage(".")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    assert doctor_checks.check_disk() == Result("ok", "8.7 GB free, 8.6 GB needed")
    Path(".dvc/config.local").write_text("[cache]\ntype = copy\n")
    result = doctor_checks.check_disk()
    assert (result.state, result.text) == ("problem", "8.7 GB free, 17.2 GB needed")
    Path("data").mkdir()
    with Path("data/raw").open("wb") as file:
        file.truncate(8_500_000_000)
    assert doctor_checks.check_disk().text == "8.7 GB free, 0.2 GB needed"


@pytest.mark.usefixtures("repository")
def test_unfinished_work() -> None:
    assert doctor_checks.check_unfinished() == Result("ok", "no work left in .cache")
    folder = Path(".cache/fetch-1234")
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(bytes(200_000_000))
    result = doctor_checks.check_unfinished()
    assert result.state == "ok"
    assert result.text.startswith("fetch-1234, 0.2 GB, 0 days old")
    long_ago = time.time() - 20 * 24 * 3600
    for path in (folder / "00000.parquet", folder):
        os.utime(path, (long_ago, long_ago))
    result = doctor_checks.check_unfinished()
    assert (result.state, result.mend) == ("warning", "rm -r .cache/fetch-1234")
    assert "20 days old" in result.text


def test_a_check_that_hangs_or_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.1)
    forever = threading.Event()
    assert doctor.in_time(lambda: Result("ok", str(forever.wait()))).text == "no answer in 0.1 s"
    forever.set()

    def fail() -> Result:
        raise ValueError("what is\nthis?")

    assert doctor.in_time(fail).text == "not checked: ValueError: what is"


def run_doctor(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "tools.doctor"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("repository")
def test_nothing_would_fail(s3: S3) -> None:
    write_params(bucket_params(s3.make_bucket(PHOTOGRAPHS)) | FEW_BINS)
    set_remote_bucket(s3.make_bucket({"files/md5/00/1": b"an object of DVC's"}))
    done = run_doctor()
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("nothing would fail\n")
    checks = len(doctor.FIRST_CHECKS) + len(doctor_checks.CHECKS)
    assert sum(line[0] != " " for line in done.stdout.splitlines()) == checks + 1
    assert done.stderr == ""


@pytest.mark.usefixtures("repository")
def test_everything_would_fail() -> None:
    write_params({"bucket.endpoint": f"http://127.0.0.1:{free_port()}"} | FEW_BINS)
    set_remote(url="s3://storage", endpointurl=f"http://127.0.0.1:{free_port()}", **KEYS)
    done = run_doctor()
    assert done.returncode == 1
    assert done.stdout.endswith("2 problems\n")
    assert done.stderr == ""
    Path(".dvc/config").write_text("[remote")
    done = run_doctor()
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.usefixtures("repository")
def test_a_python_without_packages() -> None:
    done = run_doctor("-S")
    assert done.returncode == 1
    assert "those of requirements.txt are not installed" in done.stdout
    assert "-> make setup" in done.stdout
    assert done.stderr == ""
