"""Shared by the tests: real records, a real S3 server, small buckets, tables and photographs."""

import io
import itertools
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow as pa
import pytest
import torch
from obstore.store import S3Store
from PIL import Image
from ruamel.yaml import YAML
from xdist.scheduler import LoadScopeScheduling

from stages.collecting.reading import Reader
from stages.collecting.records import INDEX_SCHEMA, parse_record
from stages.imaging.jpeg import Pixels
from stages.runtime import params
from tests.project import SETTINGS, Project, fill_buckets
from tools.s3 import CLIENT_ENVIRONMENT, serving
from tools.synthetic import SyntheticBin, synthetic_bins

# For the S3 clients in this process and in those that tests start, past a user's proxy.
os.environ |= CLIENT_ENVIRONMENT

REPOSITORY = Path(__file__).parent.parent

MakeBucket = Callable[[Mapping[str, bytes]], params.Bucket]


#: Files with tests of the session's project. One worker runs them, so that the pipeline runs once.
PROJECT_FILES = {
    "test_disk_full.py",
    "test_pipeline.py",
    "test_plots_page.py",
    "test_readme.py",
    "test_secrets.py",
    "test_seeds.py",
    "test_sky.py",
    "test_two_runs.py",
    "test_workflows.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the project's tests first, since they take longest."""
    items.sort(key=lambda item: item.path.name not in PROJECT_FILES)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """One worker runs a file, whose fixtures may be slow; one worker runs all of PROJECT_FILES."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).name
        return "project" if file in PROJECT_FILES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def abid() -> Path:
    """The folder with a piece of the real data set, which is not part of the repository."""
    folder = REPOSITORY.parent / "shared" / "abid"
    if not folder.is_dir():
        pytest.skip(f"there is no piece of the real data set at {folder}")
    return folder


@pytest.fixture(scope="session")
def abid_records(abid: Path) -> dict[str, bytes]:
    """The real records of resized-10k, and the un-padded ones of originals-1k, by id."""
    paths = [*(abid / "resized-10k/metadata").glob("*.json")]
    paths += [
        path for path in (abid / "originals-1k/metadata").glob("*.json") if len(path.stem) < 5
    ]
    return {path.stem: path.read_bytes() for path in sorted(paths)}


@pytest.fixture(scope="session")
def abid_index(abid_records: dict[str, bytes]) -> pa.Table:
    return index_table({bin_id: parse_record(data) for bin_id, data in abid_records.items()})


@pytest.fixture(scope="session")
def synthetic() -> list[SyntheticBin]:
    return list(synthetic_bins(120, seed=0))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory for a stage that runs in this process."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    # The resize stage sets the number for the rest of its process.
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt this process and those that it starts.

    A shell's background jobs ignore SIGINT, and so do their children.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def changed_params(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the repository's params.yaml, with changes by dotted key."""
    values: dict[str, Any] = YAML(typ="safe", pure=True).load(REPOSITORY / "params.yaml")
    for key, value in overrides.items():
        *blocks, last = key.split(".")
        block = values
        for name in blocks:
            block = block[name]
        block[last] = value
    return values


def write_params(overrides: Mapping[str, Any]) -> None:
    """Write changed_params to params.yaml in the current directory."""
    YAML(typ="safe", pure=True).dump(changed_params(overrides), Path("params.yaml"))


def bucket_params(bucket: params.Bucket) -> dict[str, Any]:
    """The overrides that make a stage read this bucket."""
    return {f"bucket.{key}": value for key, value in bucket.model_dump().items()}


@dataclass(frozen=True)
class S3:
    """A real S3 server on loopback. Each folder in `folder` is a bucket."""

    url: str
    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def locate(self, name: str) -> params.Bucket:
        return params.Bucket(
            url=f"s3://{name}", region="us-east-1", endpoint=self.url, anonymous=True
        )

    def make_bucket(self, objects: Mapping[str, bytes]) -> params.Bucket:
        """A new bucket, to which these objects have been uploaded."""
        bucket = self.locate(f"bucket-{next(self._numbers)}")
        name = bucket.url.removeprefix("s3://")
        # The server would not see a new folder until its cached listing expires.
        headers = {"Content-Length": "0"}
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT", headers=headers)  # noqa: S310
        urllib.request.urlopen(request).close()  # noqa: S310
        # With obstore's own retries, since concurrent uploads that create one folder may fail.
        store = S3Store(
            name,
            region=bucket.region,
            endpoint=self.url,
            skip_signature=True,
            client_options={"allow_http": True},
        )
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: obstore.put(store, key, objects[key]), objects))
        return bucket


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    folder.mkdir()
    with serving(folder) as url:
        yield S3(url, folder)


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with synthetic bins in one bucket and nothing in the other."""
    buckets = tmp_path_factory.mktemp("server") / "s3"
    fill_buckets(buckets)
    with serving(buckets) as url:
        yield url


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Project:
    """A project in which the whole pipeline has run once, been committed and tagged.

    Tests only read it, in any order. A test that changes something works on a `copy()`.
    """
    project = Project(tmp_path_factory.mktemp("first") / "project", endpoint)
    project.experiment(*SETTINGS, f"bucket.endpoint={endpoint}")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", "--message", "A run")
    project.run("git", "tag", "first-run")
    return project


def folder_bucket(folder: Path, objects: Mapping[str, bytes]) -> params.Bucket:
    """A new folder with these objects, as a bucket."""
    folder.mkdir(parents=True)
    for key, data in objects.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return params.Bucket(
        url=folder.absolute().as_uri(), region="us-east-1", endpoint=None, anonymous=True
    )


@pytest.fixture(params=["s3", "file"])
def make_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> MakeBucket:
    """Makes a bucket with the given objects: on the S3 server, and in a folder."""
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        return server.make_bucket
    numbers = itertools.count()
    return lambda objects: folder_bucket(tmp_path / f"bucket-{next(numbers)}", objects)


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects the keys of all objects that are read from now on."""
    keys: list[str] = []
    read = Reader.read

    async def read_and_note(reader: Reader, key: str, size: int, etag: str | None) -> bytes:
        keys.append(key)
        return await read(reader, key, size, etag)

    monkeypatch.setattr(Reader, "read", read_and_note)
    return keys


def objects_of(bins: Sequence[SyntheticBin]) -> dict[str, bytes]:
    """The bins in the layout of the real bucket."""
    return {
        f"bin-images/{synthetic_bin.id}.jpg": synthetic_bin.photograph for synthetic_bin in bins
    } | {f"metadata/{synthetic_bin.id}.json": synthetic_bin.record for synthetic_bin in bins}


def record_json(quantity: Any, asins: Sequence[str] = (), **more: Any) -> bytes:
    """A record like those of the bucket, with one item of each ASIN."""
    contents = {asin: {"asin": asin, "name": None, "quantity": 1} for asin in asins}
    record = {"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": quantity}
    return json.dumps(record | more).encode()


def index_table(records: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """A table like data/index.parquet of parsed records by id."""
    rows = [
        {"id": bin_id, **record, "key": f"bin-images/{bin_id}.jpg", "size": 1, "etag": None}
        for bin_id, record in records.items()
    ]
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def index_of(contents: Mapping[str, tuple[int, Sequence[str]]]) -> pa.Table:
    """A table like data/index.parquet of quantity and ASINs by id."""
    return index_table(
        {
            bin_id: parse_record(record_json(quantity, asins))
            for bin_id, (quantity, asins) in contents.items()
        }
    )


def sibling_pairs(records: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Pairs of consecutive padded ids whose records share an ASIN, found in a plain way."""
    asins = {bin_id: set(json.loads(data)["BIN_FCSKU_DATA"]) for bin_id, data in records.items()}
    padded = sorted(bin_id for bin_id in records if len(bin_id) >= 5)
    following = [(bin_id, f"{int(bin_id) + 1:05d}") for bin_id in padded]
    return [(one, two) for one, two in following if two in asins and asins[one] & asins[two]]


def picture(width: int, height: int) -> Pixels:
    """Smooth colors, different in every corner."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [255 * across, 255 * down, 127 + 100 * np.sin(5 * across + 3 * down)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def image_file(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg_file(width: int = 48, height: int = 40) -> bytes:
    return image_file(Image.fromarray(picture(width, height)), quality=90)
