"""A real S3 server on loopback (rclone's), for the demo and the tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

START_SECONDS = 20
RCLONE = Path(sys.executable).with_name("rclone")
# What its clients need. It answers a read of a range, as DVC reads files above 50 MB, with the
# whole object's checksum, which botocore then holds against the range; so none may be uploaded.
CLIENT_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    # A proxy cannot reach this machine's loopback. Some clients obey the one name, some the other.
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(folder: Path, port: int, log: Path, pid_file: Path) -> str:
    """Serve each folder in `folder` as a bucket, until stop_server; the server's URL.

    It listens on loopback only and takes anonymous requests as well as any credentials.
    Raises RuntimeError with the log's text if it does not answer.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(RCLONE), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # It outlives the terminal's Ctrl-C, and sees no configuration of the user's rclone.
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "RCLONE_CONFIG": os.devnull},
        )
    pid_file.write_text(f"{server.pid}\n")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if answers(port):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    stop_server(pid_file)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')}")


def stop_server(pid_file: Path) -> None:
    """Stop the server that start_server started, if it still runs, and wait for its end."""
    if not pid_file.exists():
        return
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(int(pid_file.read_text()))
        # The number may belong to another process by now.
        if server.cmdline()[1:3] == ["serve", "s3"]:
            server.terminate()
            server.wait()
    pid_file.unlink()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve `folder` while the block runs, and give the server's URL."""
    log, pid_file = folder.with_name("s3.log"), folder.with_name("s3.pid")
    url = start_server(folder, free_port(), log, pid_file)
    try:
        yield url
    finally:
        stop_server(pid_file)
