"""A real S3 server (rclone's) on loopback, for the demo, for tests, and for trying DVC by hand.

`make s3` runs it with two empty buckets until Ctrl-C, and prints how to use them.
"""

import argparse
import os
import signal
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
# The server's clients need these. DVC reads a file above 50 MB in ranges, and the server sends the
# checksum of the whole object with each range, which makes botocore report damage. So no checksums
# may be uploaded.
CLIENT_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    # A proxy cannot reach this machine's loopback. Some clients read only one of the two names.
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.s3", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("s3"), help="for the data (default: s3)"
    )
    parser.add_argument("--port", type=int, default=9000, help="default: 9000")
    arguments = parser.parse_args()
    if answers(arguments.port):
        sys.exit(f"s3: error: port {arguments.port} is in use; try another: make s3 PORT=<port>")
    # `kill` and a closed terminal stop the server as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        serve_until_stopped(arguments.folder, arguments.port)
    except (OSError, RuntimeError) as error:
        sys.exit(f"s3: error: {error}")


def serve_until_stopped(folder: Path, port: int) -> None:
    """Serve the buckets bins and storage in `folder` until SIGINT, and print how to use them."""
    for bucket in ("bins", "storage"):
        (folder / bucket).mkdir(parents=True, exist_ok=True)
    log, pid_file = folder / ".server.log", folder / ".server.pid"
    try:
        # Files that are copied into the folder, rather than uploaded, appear within this time.
        url = start_server(folder, port, log, pid_file, "--dir-cache-time", "1s")
        print(instructions(folder, url), flush=True)
        psutil.Process(int(pid_file.read_text())).wait()
        raise RuntimeError(f"the server ended: {log.read_text(errors='replace')}")
    except KeyboardInterrupt:
        print(f"\nstopped; the data stays in {folder}/")
    finally:
        stop_server(pid_file)


def instructions(folder: Path, url: str) -> str:
    settings = " ".join(f"{name}={value}" for name, value in CLIENT_ENVIRONMENT.items())
    return f"""\
An S3 server for this machine is at {url}, with its data in {folder}/:
  {folder}/bins      a bucket for photographs, bin-images/<id>.jpg, and records, metadata/<id>.json
  {folder}/storage   a bucket for what DVC pushes
It accepts any access key and secret key, or none. In another terminal, in the repository:

  export {settings}
  dvc remote modify --local storage url s3://storage
  dvc remote modify --local storage endpointurl {url}
  dvc remote modify --local storage access_key_id any
  dvc remote modify --local storage secret_access_key any
  dvc exp run -S bucket.url=s3://bins -S bucket.endpoint={url}

Ctrl-C stops it, and the data stays."""


def start_server(folder: Path, port: int, log: Path, pid_file: Path, *options: str) -> str:
    """Serve each folder in `folder` as a bucket until stop_server is called. Returns the URL.

    The server listens on loopback only. It accepts anonymous requests and any credentials, unless
    `options` (more arguments for rclone) change that. Raises RuntimeError with the text of the log
    if it does not answer.
    """
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(RCLONE), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # The server survives Ctrl-C here, and ignores the user's rclone configuration.
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
    """Stop the server that start_server started, if it still runs, and wait for it to end."""
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
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Serve `folder` while the block runs. Yields the server's URL."""
    log, pid_file = folder.with_name("s3.log"), folder.with_name("s3.pid")
    url = start_server(folder, free_port(), log, pid_file, *options)
    try:
        yield url
    finally:
        stop_server(pid_file)


if __name__ == "__main__":
    main()
