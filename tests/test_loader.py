"""Bins of a set, and batches of their pixels."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from stages.core.command import UserError
from stages.core.loader import Bins, load_batches, load_bins
from tests.made import SIZE, as_jpeg, bin_rows, pillow_pixels, write_resized, write_split


@pytest.fixture(scope="module")
def noise() -> Bins:
    """Eleven bins in two chunks, each with other pixels."""
    chance = np.random.default_rng(0)
    photographs = [
        as_jpeg(chance.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(11)
    ]
    return Bins(
        ids=[f"{number:05d}" for number in range(11)],
        quantities=np.ones(11, np.int64),
        images=pa.chunked_array([photographs[:4], photographs[4:]], pa.binary()),
        size=SIZE,
    )


ORDERS = {
    "in order": np.arange(11),
    "shuffled": np.random.default_rng(1).permutation(11),
    "some": np.array([9, 2, 4]),
    "one": np.array([5]),
}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 100])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_batches_hold_each_row_once_in_the_given_order(
    noise: Bins, order: NDArray[np.int64], batch_size: int
) -> None:
    batches = [(len(batch.images), batch.rows) for batch in load_batches(noise, order, batch_size)]

    np.testing.assert_array_equal(np.concatenate([rows for _, rows in batches]), order)
    full, rest = divmod(len(order), batch_size)
    assert [size for size, _ in batches] == [batch_size] * full + [rest] * (rest > 0)
    assert all(size == len(rows) for size, rows in batches)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_a_batch_has_the_pixels_that_pillow_decodes(
    noise: Bins, order: NDArray[np.int64], batch_size: int
) -> None:
    # Compared while each batch is the current one: later its buffer is another's.
    for batch in load_batches(noise, order, batch_size):
        for image, row in zip(batch.images, batch.rows, strict=True):
            expected = pillow_pixels(noise.images[int(row)].as_py())
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_a_batch_stays_as_it_is_until_the_next_is_taken(noise: Bins) -> None:
    batches = load_batches(noise, np.arange(11), 2)
    for batch in batches:
        copy = batch.images.clone()
        # The batches that are decoded ahead are done once this many pixels are decoded again.
        for row in range(11):
            pillow_pixels(noise.images[row].as_py())
        assert batch.images.equal(copy)


def test_batches_are_uint8_in_channels_last_and_share_few_buffers(noise: Bins) -> None:
    addresses = []
    for batch in load_batches(noise, np.arange(11), 1):
        assert batch.images.shape == (1, 3, SIZE, SIZE)
        assert str(batch.images.dtype) == "torch.uint8"
        assert batch.images.stride()[1] == 1
        addresses.append(batch.images.data_ptr())

    assert len(addresses) == 11
    assert len(set(addresses)) < 6
    assert all(address != after for address, after in pairwise(addresses))


def test_taking_only_the_first_batch_ends_well(noise: Bins) -> None:
    batches = load_batches(noise, np.arange(11), 2)
    first = next(batches)

    np.testing.assert_array_equal(first.rows, [0, 1])
    batches.close()  # type: ignore[attr-defined]
    assert next(batches, None) is None


def test_an_image_that_cannot_be_decoded_is_an_error_and_not_a_batch() -> None:
    broken = Bins(["1"], np.ones(1, np.int64), pa.chunked_array([[b"not a JPEG"]]), SIZE)

    with pytest.raises(ValueError, match=r"(?i)jpeg"):
        next(load_batches(broken, np.arange(1), 1))


def test_a_set_has_its_own_bins_in_the_order_of_the_shards(tmp_path: Path) -> None:
    rows = bin_rows([1, 2, 3, 4, 5, 1, 2])
    write_resized(tmp_path, rows, shard_bins=3)
    sets = {row["id"]: "test" if row["quantity"] == 2 else "train" for row in rows}
    # The split's own order does not matter.
    write_split(tmp_path / "split.csv", dict(reversed(sets.items())))

    train = load_bins(tmp_path, tmp_path / "split.csv", "train")
    test = load_bins(tmp_path, tmp_path / "split.csv", "test")

    assert train.ids == ["00001", "00003", "00004", "00005", "00006"]
    assert train.quantities.tolist() == [1, 3, 4, 5, 1]
    assert test.ids == ["00002", "00007"]
    assert test.images.to_pylist() == [rows[1]["image"], rows[6]["image"]]
    assert (len(train), len(test), test.size) == (5, 2, SIZE)


def test_bins_that_no_set_has_are_left_out(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2, 3]))
    write_split(tmp_path / "split.csv", {"00001": "train", "00003": "test"})

    assert load_bins(tmp_path, tmp_path / "split.csv", "train").ids == ["00001"]


def test_a_padded_id_and_its_bare_twin_are_two_bins(tmp_path: Path) -> None:
    first, second = bin_rows([1, 2])
    write_resized(tmp_path, [first | {"id": "00100"}, second | {"id": "100"}])
    write_split(tmp_path / "split.csv", {"00100": "train", "100": "test"})

    train = load_bins(tmp_path, tmp_path / "split.csv", "train")
    test = load_bins(tmp_path, tmp_path / "split.csv", "test")

    assert (train.ids, train.quantities.tolist()) == (["00100"], [1])
    assert (test.ids, test.quantities.tolist()) == (["100"], [2])


def test_bins_that_the_shards_lack_are_counted_and_one_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", dict.fromkeys(["00001", "00002", "7", "9"], "train"))

    with pytest.raises(UserError, match=r"lacks 2 bins of .*split\.csv, like [79]"):
        load_bins(tmp_path, tmp_path / "split.csv", "train")


def test_shards_that_lack_all_bins_of_a_set_are_not_blamed_on_the_split(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", dict.fromkeys(["7", "9"], "train"))

    with pytest.raises(UserError, match="lacks 2 bins"):
        load_bins(tmp_path, tmp_path / "split.csv", "train")


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", {"00001": "train", "00002": "train"})

    with pytest.raises(UserError, match=r"no bin in the set test: check split\.test"):
        load_bins(tmp_path, tmp_path / "split.csv", "test")


def test_a_folder_without_shards_is_a_missing_input(tmp_path: Path) -> None:
    write_split(tmp_path / "split.csv", {"00001": "train"})

    with pytest.raises(FileNotFoundError, match="no Parquet shards"):
        load_bins(tmp_path / "resized", tmp_path / "split.csv", "train")
