"""The demo's parts except for the pipeline, which test_pipeline.py runs."""

import shutil
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import psutil
import pytest
from obstore.store import S3Store
from ruamel.yaml import YAML

from tests.conftest import REPOSITORY
from tools import demo
from tools.s3 import CLIENT_ENVIRONMENT, answers, free_port


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo in a temporary folder, with few bins."""
    folder = tmp_path / "demo"
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "DEMO", folder)
    monkeypatch.setattr(demo, "CLONE", folder / "clone")
    monkeypatch.setattr(demo, "BUCKETS", folder / "s3")
    monkeypatch.setattr(demo, "LOG", folder / "s3.log")
    monkeypatch.setattr(demo, "PID", folder / "s3.pid")
    monkeypatch.setattr(demo, "SYNTHETIC_BINS", 6)
    return folder


def test_the_server_runs_until_it_is_cleaned_up(small_demo: Path) -> None:
    endpoint = demo.serve_buckets()
    port = urlsplit(endpoint).port or 0
    try:
        assert answers(port)
    finally:
        demo.clean()
    assert not answers(port)
    assert not small_demo.exists()
    demo.clean()


def test_make_demo_clean_stops_the_server_without_the_environment(small_demo: Path) -> None:
    demo.serve_buckets()
    server = psutil.Process(int(demo.PID.read_text()))
    shutil.copy(REPOSITORY / "Makefile", small_demo.parent)
    try:
        for _ in range(2):  # the second run finds nothing to do
            subprocess.run(["make", "demo-clean"], cwd=small_demo.parent, check=True)
            assert not small_demo.exists()
        server.wait(10)
    finally:
        with suppress(psutil.NoSuchProcess):
            server.kill()


def test_make_demo_clean_spares_another_process_with_the_servers_number(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo/s3.pid").write_text(f"{other.pid}\n")
        shutil.copy(REPOSITORY / "Makefile", tmp_path)
        subprocess.run(["make", "demo-clean"], cwd=tmp_path, check=True)
        assert not (tmp_path / "demo").exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_the_users_proxy_is_not_used_for_loopback(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A proxy that does not answer, and the user's list of exceptions, which lacks loopback.
    users = {name: f"http://127.0.0.1:{free_port()}"}
    users |= {"NO_PROXY": "example.org", "no_proxy": "example.org"}
    for key, value in (users | CLIENT_ENVIRONMENT).items():
        monkeypatch.setenv(key, value)
    endpoint = demo.serve_buckets()
    try:
        demo.fill_bucket(endpoint)
        urllib.request.urlopen(f"{endpoint}/bins/metadata/00001.json").close()  # noqa: S310
    finally:
        demo.clean()
    assert not small_demo.exists()


def test_the_bucket_has_the_real_layout_and_two_broken_objects(small_demo: Path) -> None:
    endpoint = demo.serve_buckets()
    try:
        demo.fill_bucket(endpoint)
        bucket = S3Store(
            "bins", endpoint=endpoint, skip_signature=True, client_options={"allow_http": True}
        )
        keys = {found["path"] for found in obstore.list(bucket).collect()}
        garbled = obstore.get(bucket, f"metadata/{demo.GARBLED_RECORD}.json").bytes()
    finally:
        demo.clean()
    ids = [f"{number:05d}" for number in range(1, 7)]
    assert keys == {f"bin-images/{i}.jpg" for i in ids} | {f"metadata/{i}.json" for i in ids}
    assert bytes(garbled) == b"not a record"
    assert not small_demo.exists()


def test_every_override_but_the_added_ones_is_a_key_of_params_yaml() -> None:
    params = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    for override in demo.OVERRIDES:
        key = override.partition("=")[0]
        values = params
        for part in key.removeprefix("+").split(".")[:-1]:
            values = values[part]
        assert (key.rpartition(".")[2] in values) != key.startswith("+"), key
