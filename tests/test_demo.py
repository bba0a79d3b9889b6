"""The demo's parts around the pipeline, which test_pipeline.py runs."""

from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store
from ruamel.yaml import YAML

from tools import demo
from tools.s3 import answers


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo in a folder of its own, with a few bins."""
    folder = tmp_path / "demo"
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "DEMO", folder)
    monkeypatch.setattr(demo, "CLONE", folder / "clone")
    monkeypatch.setattr(demo, "BUCKETS", folder / "s3")
    monkeypatch.setattr(demo, "LOG", folder / "s3.log")
    monkeypatch.setattr(demo, "PID", folder / "s3.pid")
    monkeypatch.setattr(demo, "DRAWN_BINS", 6)
    return folder


def test_the_server_goes_on_until_it_is_cleaned_up(small_demo: Path) -> None:
    endpoint = demo.serve_buckets()
    port = urlsplit(endpoint).port or 0
    try:
        assert answers(port)
    finally:
        demo.clean()
    assert not answers(port)
    assert not small_demo.exists()
    demo.clean()


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
    params = YAML(typ="safe").load(Path(__file__).parent.parent / "params.yaml")
    for override in demo.OVERRIDES:
        key = override.partition("=")[0]
        values = params
        for part in key.removeprefix("+").split(".")[:-1]:
            values = values[part]
        assert (key.rpartition(".")[2] in values) != key.startswith("+"), key
