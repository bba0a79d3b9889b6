import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from stages import index
from stages.collecting.bucket import list_objects, open_bucket
from stages.runtime import params
from tests.conftest import bucket_params, jpeg_file, record_json, write_params

#: Keys that S3 takes, and no file system of a test server does.
ODD = [
    "metadata//00003.json",
    "metadata/../00003.json",
    "metadata/./00003.json",
    "metadata/../../../../etc/passwd.json",
    "metadata/0\t3.json",
    "metadata/0\n3.json",
    "metadata/0\x1b[31m3.json",
    "metadata/ 00003.json",
    "metadata/00003 .json",
    "metadata/%2e%2e%2f.json",
    "metadata/0\u202e3.json",
    "metadata/٣.json",
    "metadata/a/00003.json",
    "metadata/.json",
    "metadata/",
    "bin-images/../00003.jpg",
    "bin-images//00003.jpg",
]
PAGE = 3
IDS = ["-1", "00001", "00002", "zz1", "zz2"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Lists its objects, three on a page, and gives them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        objects = cast("Server", self.server).objects
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if "list-type" in query:
            self._answer(list_page(objects, query))
        else:
            self._answer(objects[parts.path.removeprefix("/bins/")])

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 12:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def list_page(objects: dict[str, bytes], query: dict[str, str]) -> bytes:
    after = unquote(query.get("continuation-token", "")) or query.get("start-after", "")
    encode = quote if query.get("encoding-type") == "url" else escape
    keys = sorted(key for key in objects if key.startswith(query["prefix"]) and key > after)
    contents = [
        f"<Contents><Key>{encode(key)}</Key><Size>{len(objects[key])}</Size><ETag>&quot;one&quot;"
        "</ETag><LastModified>2026-11-25T12:00:00.000Z</LastModified></Contents>"
        for key in keys[:PAGE]
    ]
    more = len(keys) > PAGE
    last = quote(keys[:PAGE][-1]) if more else ""
    token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
    encoding = f"<EncodingType>{query['encoding-type']}</EncodingType>" if encode is quote else ""
    return (
        f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{encoding}"
        f"{token}{''.join(contents)}</ListBucketResult>"
    ).encode()


class Server(http.server.ThreadingHTTPServer):
    objects: dict[str, bytes]


@contextmanager
def serving_keys(objects: dict[str, bytes]) -> Iterator[params.Bucket]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.objects = objects
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield params.Bucket(url="s3://bins", region="us-east-1", endpoint=url, anonymous=True)
        server.shutdown()


def good_bins() -> dict[str, bytes]:
    """Five bins, two on each side of where most odd keys are listed."""
    return {f"metadata/{bin_id}.json": record_json(2) for bin_id in IDS} | {
        f"bin-images/{bin_id}.jpg": jpeg_file() for bin_id in IDS
    }


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_an_odd_key_hides_no_other_object(odd: str) -> None:
    objects = good_bins() | {odd: b"{}"}
    with serving_keys(objects) as bucket:
        store = open_bucket(bucket)
        for prefix in ("metadata/", "bin-images/"):
            found = list_objects(store, prefix).filter(pc.field("size") > 2)
            assert found["key"].to_pylist() == sorted(
                key for key in good_bins() if key.startswith(prefix)
            )
            assert set(found["etag"].to_pylist()) == {"one"}


@pytest.mark.usefixtures("workspace")
def test_records_with_odd_keys_are_rejects_and_never_read() -> None:
    # Read, they would fail: the server has nothing for them.
    with serving_keys(good_bins() | dict.fromkeys(ODD, b"")) as bucket:
        write_params({**bucket_params(bucket), "index.max_rejects": 0.9})
        index.main()
    assert pq.read_table(index.OUT)["id"].to_pylist() == sorted(
        ["-1", "00001", "00002", "zz1", "zz2"]
    )
    counts = json.loads(index.COUNTS.read_text("utf-8"))
    records = [key for key in ODD if key.startswith("metadata/") and key.endswith(".json")]
    assert counts["rejected"] == {"impossible id": len(records)}


@pytest.mark.usefixtures("workspace")
def test_files_with_odd_names_hide_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    for key, data in good_bins().items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    for name in (b"0\t3.json", b"0\x1b3.json", b"\xff\xfe.json", b"a b.json", b"..json"):
        Path(str(folder), "metadata", name.decode("utf-8", "surrogateescape")).write_bytes(b"{}")
    bucket = params.Bucket(url=folder.as_uri(), region="us-east-1", endpoint=None, anonymous=True)
    write_params({**bucket_params(bucket), "index.max_rejects": 0.9})
    index.main()
    assert len(pq.read_table(index.OUT)) == 5
    counts = json.loads(index.COUNTS.read_text("utf-8"))
    assert counts["rejected"] == {"impossible id": 5}
