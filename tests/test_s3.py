"""The local S3 server as `make s3` runs it, in the foreground."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import psutil
import pytest

from stages.collecting.bucket import open_bucket
from stages.runtime.params import Bucket
from tests.conftest import REPOSITORY
from tools.s3 import CLIENT_ENVIRONMENT, answers, free_port, instructions

COMMAND = [sys.executable, "-m", "tools.s3"]


@contextmanager
def run_by_hand(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "--folder", str(folder), "--port", str(port)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_two_buckets_until_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    folder, port = tmp_path / "s3", free_port()
    with run_by_hand(folder, port) as process:
        wait_until(lambda: answers(port))
        bucket = Bucket(
            url="s3://bins", region="us-east-1", endpoint=f"http://127.0.0.1:{port}", anonymous=True
        )
        store = open_bucket(bucket)
        obstore.put(store, "metadata/1.json", b"{}")
        # A file that is copied into the folder after the bucket has been listed.
        assert len(obstore.list(store).collect()) == 1
        (folder / "bins/metadata/2.json").write_bytes(b"{}")
        wait_until(lambda: len(obstore.list(store).collect()) == 2)
        process.send_signal(number)
        text, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert text.endswith(f"stopped; the data stays in {folder}/\n")
    assert "Traceback" not in text
    assert not answers(port)
    assert (folder / "bins/metadata/1.json").exists()


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with run_by_hand(tmp_path / "s3", port) as process:
            text, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert text == f"s3: error: port {port} is in use; try another: make s3 PORT=<port>\n"
    assert not (tmp_path / "s3").exists()


def test_it_ends_if_its_server_dies(tmp_path: Path) -> None:
    folder, port = tmp_path / "s3", free_port()
    with run_by_hand(folder, port) as process:
        assert process.stdout is not None
        # Printed once the server answers; before that, the command would fail to start.
        process.stdout.readline()
        psutil.Process(int((folder / ".server.pid").read_text())).kill()
        text, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "s3: error: the server ended" in text
    assert "Traceback" not in text


def test_the_commands_that_it_prints_set_dvc_up(tmp_path: Path) -> None:
    lines = [line.strip() for line in instructions(Path("s3"), "http://127.0.0.1:1").splitlines()]
    (export,) = (line for line in lines if line.startswith("export"))
    words = dict(word.split("=") for word in shlex.split(export)[1:])
    assert words == CLIENT_ENVIRONMENT
    (tmp_path / ".dvc").mkdir()
    shutil.copy(REPOSITORY / ".dvc/config", tmp_path / ".dvc")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = [line for line in lines if line.startswith("dvc remote modify")]
    for command in commands:
        subprocess.run(
            shlex.split(command), cwd=tmp_path, env=os.environ | {"PATH": path}, check=True
        )
    settings = (tmp_path / ".dvc/config.local").read_text()
    for name in ("url = s3://storage", "endpointurl = http://127.0.0.1:1", "secret_access_key ="):
        assert name in settings
