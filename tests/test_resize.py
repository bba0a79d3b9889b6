import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import resize
from stages.formats.shards import (
    IMAGES,
    Reject,
    read_rejects,
    shard_name,
    shard_paths,
    write_rejects,
    write_table,
)
from stages.imaging import jpeg
from stages.runtime.errors import UserError
from tests.conftest import image_file, jpeg_file, picture, write_params

RESIZED = Path("data/resized")
QUARANTINE = Path("data/quarantine.csv")


class StopError(Exception):
    """Raised to interrupt the work."""


def prepare(
    shards: Sequence[Mapping[str, bytes]], unfetched: Sequence[Reject] = (), **settings: Any
) -> None:
    """Write params.yaml and the outputs of the fetch stage."""
    write_params(
        {"resize.size": 32, "resize.max_rejects": 0.0}
        | {f"resize.{key}": value for key, value in settings.items()}
    )
    for number, photographs in enumerate(shards):
        rows = [
            {"id": bin_id, "quantity": number + 1, "image": data}
            for bin_id, data in photographs.items()
        ]
        table = pa.Table.from_pylist(rows, IMAGES)
        write_table(Path("data/raw") / shard_name(number), table)
    write_rejects(Path("data/unfetched.csv"), unfetched)


def resized() -> list[list[dict[str, Any]]]:
    return [pq.read_table(path).to_pylist() for path in shard_paths(RESIZED)]


def photographs(*ids: str) -> dict[str, bytes]:
    """A photograph for each id, each of a different size."""
    return {bin_id: jpeg_file(40 + 5 * position, 60) for position, bin_id in enumerate(ids)}


@pytest.mark.usefixtures("workspace")
def test_every_photograph_becomes_a_small_square_jpeg() -> None:
    prepare([photographs("00001", "00002", "00003"), photographs("00004", "1")])
    resize.main()
    shards = resized()
    assert [[row["id"] for row in shard] for shard in shards] == [
        ["00001", "00002", "00003"],
        ["00004", "1"],
    ]
    assert [row["quantity"] for shard in shards for row in shard] == [1, 1, 1, 2, 2]
    for shard in shards:
        for row in shard:
            with Image.open(io.BytesIO(row["image"])) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
    assert read_rejects(QUARANTINE) == []
    assert pq.read_schema(shard_paths(RESIZED)[0]).equals(IMAGES)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("fit", ["squeeze", "pad"])
def test_the_knobs_are_followed(fit: str) -> None:
    prepare([{"00001": jpeg_file(80, 40)}], size=24, fit=fit, quality=60)
    resize.main()
    pixels = jpeg.resize(jpeg.decode(jpeg_file(80, 40)), 24, fit)
    assert resized()[0][0]["image"] == jpeg.encode(pixels, 60)


@pytest.mark.usefixtures("workspace")
def test_undecodable_and_unfetched_bins_are_quarantined() -> None:
    good = photographs("00001", "00002", "00003", "00004")
    bad = {"00005": b"", "00006": b"<html></html>", "00007": jpeg_file()[:-300]}
    bad["00008"] = jpeg_file()[:20]
    prepare([good, bad], [Reject("100", "not found")], max_rejects=0.5)
    resize.main()
    rejects = read_rejects(QUARANTINE)
    assert [reject.id for reject in rejects] == ["100", *bad]
    assert [reject.reason for reject in rejects[:3]] == [
        "not found",
        "no bytes",
        "of a format that is not read (a web page or XML): save it as JPEG",
    ]
    assert "truncated" in rejects[3].reason
    assert [[row["id"] for row in shard] for shard in resized()] == [list(good), []]


@pytest.mark.usefixtures("workspace")
def test_every_kind_of_picture_is_kept() -> None:
    image = Image.fromarray(picture(50, 40))
    odd = {
        "00001": image_file(image, "PNG"),
        "00002": image_file(image.convert("L")),
        "00003": image_file(image.convert("CMYK")),
        "00004": image_file(image, progressive=True),
    }
    prepare([odd])
    resize.main()
    assert [row["id"] for row in resized()[0]] == list(odd)


def test_too_many_undecodable_photographs_stop_the_stage(workspace: Path) -> None:
    bad = {"00008": b"", "00009": b"no picture"}
    prepare([photographs("00001", "00002"), bad], max_rejects=0.3)
    with pytest.raises(UserError, match=r"2 of 4 .* resize\.max_rejects .* 00008 \(no bytes\)"):
        resize.main()
    assert not (workspace / RESIZED).exists()
    assert not (workspace / QUARANTINE).exists()


@pytest.mark.usefixtures("workspace")
def test_unfetched_bins_do_not_count_as_undecodable() -> None:
    prepare([photographs("00001")], [Reject(f"{n:05d}", "not found") for n in range(2, 9)])
    resize.main()
    assert len(read_rejects(QUARANTINE)) == 7


@pytest.mark.usefixtures("workspace")
def test_every_run_writes_the_same_bytes() -> None:
    prepare([photographs("00001", "00002"), photographs("00003")], [Reject("00009", "gone")])
    written = []
    for _ in range(2):
        resize.main()
        written.append([path.read_bytes() for path in [*shard_paths(RESIZED), QUARANTINE]])
    assert written[0] == written[1]


@pytest.mark.usefixtures("workspace")
def test_the_next_run_resumes_where_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([photographs("00001", "00002"), photographs("00003"), photographs("00004")])
    encode = jpeg.encode
    calls = 0

    def stop_at_the_fourth(pixels: jpeg.Pixels, quality: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise StopError
        return encode(pixels, quality)

    # One worker, so that the fourth call is the fourth photograph.
    monkeypatch.setattr(resize, "usable_cores", lambda: 1)
    monkeypatch.setattr(resize, "SAMPLE", 0)
    monkeypatch.setattr(jpeg, "encode", stop_at_the_fourth)
    with pytest.raises(StopError):
        resize.main()
    assert not RESIZED.exists()
    resize.main()
    assert calls == 5
    assert [len(shard) for shard in resized()] == [2, 1, 1]


@pytest.mark.usefixtures("workspace")
def test_a_missing_input_is_named() -> None:
    write_params({})
    with pytest.raises(FileNotFoundError, match="data/raw has no Parquet shards"):
        resize.main()
