"""Bins of a set, and batches of their pixels."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.imaging import loader
from stages.imaging.loader import Bins, load_batches, load_bins, open_bins, pack_bins
from stages.runtime.errors import UserError
from tests.builders import (
    SIZE,
    bin_rows,
    make_bins,
    noise,
    pillow_pixels,
    write_resized,
    write_split,
)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    """Eleven bins, each with different pixels."""
    return make_bins(tmp_path_factory.mktemp("noisy"), [1] * 11, noise)


def cut(rows: range | list[int], batch_size: int) -> list[NDArray[np.int64]]:
    return [
        np.array(rows[start : start + batch_size], np.int64)
        for start in range(0, len(rows), batch_size)
    ]


BATCHES = {
    "threes": cut(range(11), 3),
    "backwards": cut(range(11)[::-1], 4),
    "shuffled, one twice": [*cut(np.random.default_rng(1).permutation(11).tolist(), 4), [9]],
    "of many sizes": [np.array([5]), np.arange(11), np.array([3, 4])],
    "empty ones too": [np.arange(0), np.array([7, 1]), np.arange(0), np.arange(0), np.array([2])],
    "only empty ones": [np.arange(0)] * 5,
    "none": [],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_hold_the_given_rows_with_the_pixels_that_pillow_decodes(
    noisy: Bins, batches: list[NDArray[np.int64]], threads: int
) -> None:
    taken = []
    # Compared at once, because the buffer of a batch is used again later.
    for batch in load_batches(noisy, batches, threads=threads):
        taken.append(batch.rows)
        assert batch.images.shape == (len(batch.rows), 3, SIZE, SIZE)
        for image, row in zip(batch.images, batch.rows, strict=True):
            expected = pillow_pixels(noisy.images[int(row)])
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)

    assert [list(rows) for rows in taken] == [list(rows) for rows in batches]


def test_batches_are_uint8_in_channels_last_and_share_few_buffers(noisy: Bins) -> None:
    addresses = []
    for batch in load_batches(noisy, cut(range(11), 1)):
        assert str(batch.images.dtype) == "torch.uint8"
        assert batch.images.stride()[1] == 1
        addresses.append(batch.images.data_ptr())

    assert len(addresses) == 11
    assert len(set(addresses)) < 6
    assert all(address != after for address, after in pairwise(addresses))


def test_no_more_batches_are_decoded_than_fit_into_the_buffers(
    noisy: Bins, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def count(_bins: Bins, rows: NDArray[np.int64], *_: Any) -> None:
        decoded.append(int(rows[0]))

    monkeypatch.setattr(loader, "_decode_piece", count)
    for number, _ in enumerate(load_batches(noisy, cut(range(11), 1), threads=1)):
        assert decoded[: number + 1] == list(range(number + 1))
        assert len(decoded) <= number + 1 + loader.PREFETCH


def test_taking_only_the_first_batch_ends_well(noisy: Bins) -> None:
    batches = load_batches(noisy, cut(range(11), 2))
    first = next(batches)

    np.testing.assert_array_equal(first.rows, [0, 1])
    batches.close()
    assert next(batches, None) is None


def test_an_image_that_cannot_be_decoded_is_an_error_and_not_a_batch(tmp_path: Path) -> None:
    rows = bin_rows([1, 2, 3])
    rows[1]["image"] = b"not a JPEG"
    write_resized(tmp_path, rows)
    write_split(tmp_path / "split.csv", {row["id"]: "train" for row in rows})
    pack_bins(tmp_path, tmp_path / "split.csv", ["train"], SIZE, tmp_path)

    batches = load_batches(open_bins(tmp_path, "train", SIZE), cut(range(3), 1))

    assert next(batches).rows.tolist() == [0]
    with pytest.raises(ValueError, match=r"(?i)jpeg"):
        next(batches)


def test_a_row_that_does_not_exist_is_an_index_error(noisy: Bins) -> None:
    with pytest.raises(IndexError):
        noisy.images[11]


def photographs(bins: Bins) -> list[bytes]:
    return [bins.images[row] for row in range(len(bins))]


def test_each_set_has_its_own_bins_in_the_order_of_the_shards(
    workspace: Path, tmp_path: Path
) -> None:
    rows = bin_rows([1, 2, 3, 4, 5, 1, 2], noise)
    write_resized(tmp_path / "resized", rows, shard_bins=3)
    sets = {row["id"]: "test" if row["quantity"] == 2 else "train" for row in rows[:-2]}
    # Neither the order of the split nor bins without a set matter.
    write_split(tmp_path / "split.csv", dict(reversed(sets.items())))

    test, train = load_bins(
        tmp_path / "resized", tmp_path / "split.csv", "test", "train", size=SIZE
    )

    assert (test.ids, train.ids) == (["00002"], ["00001", "00003", "00004", "00005"])
    assert train.quantities.tolist() == [1, 3, 4, 5]
    assert train.quantities.dtype == np.int64
    assert (len(train), len(train.images), train.size) == (4, 4, SIZE)
    # Still readable, although the file has been unlinked.
    assert photographs(test) == [rows[1]["image"]]
    assert photographs(train) == [rows[number]["image"] for number in (0, 2, 3, 4)]
    assert list(workspace.glob(".cache/*")) == []


def test_the_photographs_are_stored_once_and_read_without_copies(tmp_path: Path) -> None:
    bins = make_bins(tmp_path, [1, 2, 3], noise)
    path = tmp_path / "work" / loader.IMAGES
    packed = path.read_bytes()

    assert packed == b"".join(photographs(bins))
    # Bins see a change of the file, because they hold no copies.
    with path.open("r+b") as file:
        file.write(bytes(len(packed)))
    assert b"".join(photographs(bins)) == bytes(len(packed))


@pytest.mark.usefixtures("workspace")
def test_a_padded_id_and_its_bare_twin_are_two_bins(tmp_path: Path) -> None:
    first, second = bin_rows([1, 2])
    write_resized(tmp_path, [first | {"id": "00100"}, second | {"id": "100"}])
    write_split(tmp_path / "split.csv", {"00100": "train", "100": "test"})

    train, test = load_bins(tmp_path, tmp_path / "split.csv", "train", "test", size=SIZE)

    assert (train.ids, train.quantities.tolist()) == (["00100"], [1])
    assert (test.ids, test.quantities.tolist()) == (["100"], [2])
    assert (photographs(train), photographs(test)) == ([first["image"]], [second["image"]])


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("ids", "set_name", "size", "message"),
    [
        (["1", "2", "7", "9"], "train", SIZE, r"lacks 2 bins of .*split\.csv, like [79]"),
        # The split is not blamed.
        (["7", "9"], "train", SIZE, "lacks 2 bins"),
        (["1", "2"], "test", SIZE, r"no bin in the set test: check split\.test"),
        (
            ["1", "2"],
            "train",
            64,
            f"has photographs of {SIZE} x {SIZE} pixels, but resize.size is 64: make them again"
            " with `dvc repro --force resize`",
        ),
    ],
    ids=["some missing", "all missing", "empty set", "another size"],
)
def test_inputs_that_do_not_fit_together_are_reported(
    ids: list[str], set_name: str, size: int, message: str, tmp_path: Path
) -> None:
    rows = [row | {"id": row["id"].lstrip("0")} for row in bin_rows([1, 2])]
    write_resized(tmp_path, rows)
    write_split(tmp_path / "split.csv", dict.fromkeys(ids, "train"))

    with pytest.raises(UserError, match=message):
        load_bins(tmp_path, tmp_path / "split.csv", set_name, size=size)


@pytest.mark.usefixtures("workspace")
def test_a_folder_without_shards_is_a_missing_input(tmp_path: Path) -> None:
    write_split(tmp_path / "split.csv", {"00001": "train"})

    with pytest.raises(FileNotFoundError, match="no Parquet shards"):
        load_bins(tmp_path / "resized", tmp_path / "split.csv", "train", size=SIZE)


@pytest.mark.usefixtures("workspace")
def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", {"00001": "train"})
    os.truncate(tmp_path / "00000.parquet", 1000)

    with pytest.raises(UserError, match=r"00000\.parquet is damaged"):
        load_bins(tmp_path, tmp_path / "split.csv", "train", size=SIZE)
