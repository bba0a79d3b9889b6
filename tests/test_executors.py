"""Fetch and resize on a real Ray cluster on this machine, with two worker processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from stages import fetch, resize
from stages.runtime import params
from stages.runtime.errors import UserError
from tests.conftest import S3, bucket_params, objects_of, write_params
from tests.faults import Fault, at_random, fault_proxy
from tests.test_fetch import prepare
from tools.s3 import free_port
from tools.synthetic import SyntheticBin

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")


@contextmanager
def ray_cluster(folder: Path, cores: int) -> Iterator[str]:
    """Run a cluster with `cores` worker processes and its files in `folder`. Yields its address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--num-cpus={cores}", "--include-dashboard=false"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}"]
    environment = os.environ | {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        yield address
    finally:
        # Ray then ends the processes that it started.
        head.terminate()
        head.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    # Not pytest's folder: the paths of Ray's sockets may have only 107 characters.
    with (
        TemporaryDirectory(prefix="ray-") as folder,
        ray_cluster(Path(folder), cores=2) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_ADDRESS", address)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield address


def outputs() -> dict[str, bytes]:
    return {
        path.as_posix(): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()
    }


def run_stages(source: params.Bucket, name: str) -> list[str]:
    settings = {"run.executor": name, "fetch.shard_bins": 25, "resize.size": 32}
    write_params({**bucket_params(source), **settings})
    return [fetch.main(), resize.main()]


@pytest.mark.usefixtures("workspace", "cluster")
def test_a_cluster_writes_the_same_bytes_as_this_process(
    s3: S3, synthetic: list[SyntheticBin]
) -> None:
    source = s3.make_bucket(objects_of(synthetic))
    prepare(source, synthetic)
    said_here = run_stages(source, "local")
    here = outputs()
    with fault_proxy(s3.url) as proxy:
        proxy.plan = at_random([Fault.SLOW_DOWN, Fault.CUT], 0.1, seed=0)
        behind = source.model_copy(update={"endpoint": proxy.url})
        fetched, resized = run_stages(behind, "ray")
    assert outputs() == here
    # Retries of the workers are counted in this process.
    assert fetched.startswith(said_here[0] + "; retried ")
    assert resized == said_here[1]


@pytest.mark.usefixtures("workspace", "cluster")
def test_an_error_of_a_worker_is_reported_here(s3: S3, synthetic: list[SyntheticBin]) -> None:
    prepare(s3.make_bucket(objects_of(synthetic)), synthetic, shard_bins=25)
    gone = s3.locate("nowhere")
    write_params({**bucket_params(gone), "run.executor": "ray", "fetch.shard_bins": 25})
    with pytest.raises(UserError, match="no longer gives its listing"):
        fetch.main()


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "run.executor is ray, but RAY_ADDRESS is not set"),
        (f"127.0.0.1:{free_port()}", r"RAY_ADDRESS: no cluster answers at 127\.0\.0\.1:\d+: .*ref"),
        ("127.0.0.1:many", "RAY_ADDRESS: no cluster answers at 127.0.0.1:many: "),
    ],
    ids=["not set", "nobody there", "no port"],
)
def test_an_address_without_a_cluster_is_named(
    s3: S3,
    synthetic: list[SyntheticBin],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    problem: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    source = s3.make_bucket(objects_of(synthetic))
    prepare(source, synthetic)
    write_params({**bucket_params(source), "run.executor": "ray"})
    with pytest.raises(UserError, match=problem):
        fetch.main()
