"""Bins of a set, and batches of their pixels."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.imaging import loader
from stages.imaging.loader import Bins, load_batches, load_bins, load_sets, open_bins, pack_bins
from stages.runtime.errors import UserError
from stages.training.processes import Processes
from tests.made import SIZE, bin_rows, make_bins, noise, pillow_pixels, write_resized, write_split


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    """Eleven bins, each with other pixels."""
    return make_bins(tmp_path_factory.mktemp("noisy"), [1] * 11, noise)


def cut(rows: Sequence[int], batch_size: int) -> list[NDArray[np.int64]]:
    return [
        np.array(rows[start : start + batch_size], np.int64)
        for start in range(0, len(rows), batch_size)
    ]


BATCHES = {
    "one by one": cut(range(11), 1),
    "threes": cut(range(11), 3),
    "all": cut(range(11), 100),
    "backwards": cut(range(11)[::-1], 4),
    "shuffled": cut(np.random.default_rng(1).permutation(11).tolist(), 4),
    "some, one twice": [np.array([9, 2, 4]), np.array([9])],
    "of many sizes": [np.array([5]), np.arange(11), np.array([3, 4])],
    "empty ones too": [np.arange(0), np.array([7, 1]), np.arange(0), np.arange(0), np.array([2])],
    "only empty ones": [np.arange(0)] * 5,
    "none": [],
}
every_order = pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES.keys())


@every_order
def test_batches_hold_the_given_rows_in_the_given_order(
    noisy: Bins, batches: list[NDArray[np.int64]]
) -> None:
    loaded = [(len(batch.images), batch.rows.tolist()) for batch in load_batches(noisy, batches)]

    assert loaded == [(len(rows), rows.tolist()) for rows in batches]


@every_order
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_batch_has_the_pixels_that_pillow_decodes(
    noisy: Bins, batches: list[NDArray[np.int64]], threads: int
) -> None:
    # Compared while each batch is the current one: later its buffer is another's.
    for batch in load_batches(noisy, batches, threads=threads):
        assert batch.images.shape == (len(batch.rows), 3, SIZE, SIZE)
        for image, row in zip(batch.images, batch.rows, strict=True):
            expected = pillow_pixels(noisy.images[int(row)])
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_a_batch_stays_as_it_is_until_the_next_is_taken(noisy: Bins) -> None:
    for batch in load_batches(noisy, cut(range(11), 2)):
        copy = batch.images.clone()
        # The batches that are decoded ahead are done once this many pixels are decoded again.
        for row in range(11):
            pillow_pixels(noisy.images[row])
        assert batch.images.equal(copy)


def test_batches_are_uint8_in_channels_last_and_share_few_buffers(noisy: Bins) -> None:
    addresses = []
    for batch in load_batches(noisy, cut(range(11), 1)):
        assert batch.images.shape == (1, 3, SIZE, SIZE)
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
    batches = load_batches(noisy, cut(range(11), 1), threads=1)
    for number, _ in enumerate(batches):
        assert decoded[: number + 1] == list(range(number + 1))
        assert len(decoded) <= number + 1 + loader.PREFETCH


def test_taking_only_the_first_batch_ends_well(noisy: Bins) -> None:
    batches = load_batches(noisy, cut(range(11), 2))
    first = next(batches)

    np.testing.assert_array_equal(first.rows, [0, 1])
    batches.close()  # type: ignore[attr-defined]
    assert next(batches, None) is None


def test_an_image_that_cannot_be_decoded_is_an_error_and_not_a_batch(tmp_path: Path) -> None:
    rows = bin_rows([1, 2, 3])
    rows[1]["image"] = b"not a JPEG"
    write_resized(tmp_path, rows)
    write_split(tmp_path / "split.csv", {row["id"]: "train" for row in rows})
    (broken,) = load_sets(tmp_path, tmp_path / "split.csv", ["train"], tmp_path, Processes())

    batches = load_batches(broken, cut(range(3), 1))

    assert next(batches).rows.tolist() == [0]
    with pytest.raises(ValueError, match=r"(?i)jpeg"):
        next(batches)


def two_sets(folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Shards of seven bins, of which test has the second and the last."""
    rows = bin_rows([1, 2, 3, 4, 5, 1, 2], noise)
    write_resized(folder / "resized", rows, shard_bins=3)
    sets = {row["id"]: "test" if row["quantity"] == 2 else "train" for row in rows}
    # The split's own order does not matter.
    write_split(folder / "split.csv", dict(reversed(sets.items())))
    return folder / "resized", folder / "split.csv", rows


def photographs(bins: Bins) -> list[bytes]:
    return [bins.images[row] for row in range(len(bins))]


def test_a_set_has_its_own_bins_in_the_order_of_the_shards(tmp_path: Path) -> None:
    resized, split, rows = two_sets(tmp_path)

    train, test = load_sets(resized, split, ["train", "test"], tmp_path / "work", Processes())

    assert train.ids == ["00001", "00003", "00004", "00005", "00006"]
    assert train.quantities.tolist() == [1, 3, 4, 5, 1]
    assert train.quantities.dtype == np.int64
    assert test.ids == ["00002", "00007"]
    assert photographs(train) == [rows[number]["image"] for number in (0, 2, 3, 4, 5)]
    assert photographs(test) == [rows[1]["image"], rows[6]["image"]]
    assert (len(train), len(test), test.size) == (5, 2, SIZE)
    assert (len(train.images), len(test.images)) == (5, 2)


@pytest.mark.usefixtures("workspace")
def test_one_set_alone_has_the_same_bins(tmp_path: Path) -> None:
    resized, split, _ = two_sets(tmp_path)
    both = load_sets(resized, split, ["train", "test"], tmp_path / "work", Processes())

    for bins, name in zip(both, ["train", "test"], strict=True):
        (alone,) = load_bins(resized, split, name)
        assert alone.ids == bins.ids
        assert photographs(alone) == photographs(bins)


@pytest.mark.usefixtures("workspace")
def test_several_sets_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    resized, split, rows = two_sets(tmp_path)

    test, train = load_bins(resized, split, "test", "train")

    assert test.ids == ["00002", "00007"]
    assert train.ids == ["00001", "00003", "00004", "00005", "00006"]
    assert photographs(test) == [rows[1]["image"], rows[6]["image"]]


def test_the_photographs_lie_once_in_one_file_and_are_read_where_they_lie(tmp_path: Path) -> None:
    resized, split, rows = two_sets(tmp_path)

    pack_bins(resized, split, ["train", "test"], tmp_path)
    test = open_bins(tmp_path, "test")

    packed = (tmp_path / loader.IMAGES).read_bytes()
    assert packed == b"".join(row["image"] for row in rows)
    # Overwritten in the file, as the Bins hold no copies.
    with (tmp_path / loader.IMAGES).open("r+b") as file:
        file.write(bytes(len(packed)))
    assert photographs(test) == [bytes(len(rows[1]["image"])), bytes(len(rows[6]["image"]))]


def test_the_file_goes_with_its_name_but_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized, split, rows = two_sets(tmp_path)
    opened: list[Path] = []

    def watched_open(folder: Path, name: str) -> Bins:
        assert (folder / loader.IMAGES).exists()
        opened.append(folder)
        return open_bins(folder, name)

    monkeypatch.setattr(loader, "open_bins", watched_open)
    train, test = load_sets(resized, split, ["train", "test"], tmp_path / "work", Processes())

    assert opened[0].parent == tmp_path / "work"
    assert list((tmp_path / "work").iterdir()) == []
    assert photographs(train) + photographs(test) == [
        rows[number]["image"] for number in (0, 2, 3, 4, 5, 1, 6)
    ]


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path, noisy: Bins) -> None:
    resized, split, rows = two_sets(tmp_path)
    work = tmp_path / "work"

    def leave(_folder: Path, _name: str) -> Bins:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "open_bins", leave)
        with pytest.raises(KeyboardInterrupt):
            load_sets(resized, split, ["train", "test"], work, Processes())
    (left,) = work.iterdir()
    (left / loader.IMAGES).write_bytes(b"".join(photographs(noisy)))

    (test,) = load_sets(resized, split, ["test"], work, Processes())

    assert photographs(test) == [rows[1]["image"], rows[6]["image"]]
    assert list(work.iterdir()) == []


def test_machines_that_share_a_folder_and_a_name_have_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized, split, rows = two_sets(tmp_path)
    meeting = Barrier(2, timeout=10)
    monkeypatch.setattr(Processes, "wait_for_all", lambda _self: meeting.wait())
    machines = [Processes(0, 4, 0, 2), Processes(2, 4, 0, 2)]

    def load(machine: Processes) -> list[Bins]:
        return load_sets(resized, split, ["test"], tmp_path / "work", machine)

    with ThreadPoolExecutor() as pool:
        loaded = list(pool.map(load, machines))

    files = {os.fstat(test.images._file.fileno()).st_ino for (test,) in loaded}
    assert len(files) == 2
    for (test,) in loaded:
        assert photographs(test) == [rows[1]["image"], rows[6]["image"]]
    assert list((tmp_path / "work").iterdir()) == []


def test_nothing_is_left_in_the_cache(workspace: Path, tmp_path: Path) -> None:
    resized, split, rows = two_sets(tmp_path)

    (test,) = load_bins(resized, split, "test")
    with pytest.raises(UserError, match="no bin in the set other"):
        load_bins(resized, split, "other")

    assert list((workspace / ".cache").iterdir()) == []
    assert list(workspace.iterdir()) == [workspace / ".cache"]
    assert photographs(test) == [rows[1]["image"], rows[6]["image"]]


def test_a_row_that_there_is_not_is_an_index_error(noisy: Bins) -> None:
    with pytest.raises(IndexError):
        noisy.images[11]


@pytest.mark.usefixtures("workspace")
def test_bins_that_no_set_has_are_left_out(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2, 3]))
    write_split(tmp_path / "split.csv", {"00001": "train", "00003": "test"})

    (train,) = load_bins(tmp_path, tmp_path / "split.csv", "train")
    assert train.ids == ["00001"]


@pytest.mark.usefixtures("workspace")
def test_a_padded_id_and_its_bare_twin_are_two_bins(tmp_path: Path) -> None:
    first, second = bin_rows([1, 2])
    write_resized(tmp_path, [first | {"id": "00100"}, second | {"id": "100"}])
    write_split(tmp_path / "split.csv", {"00100": "train", "100": "test"})

    (train,) = load_bins(tmp_path, tmp_path / "split.csv", "train")
    (test,) = load_bins(tmp_path, tmp_path / "split.csv", "test")

    assert (train.ids, train.quantities.tolist()) == (["00100"], [1])
    assert (test.ids, test.quantities.tolist()) == (["100"], [2])
    assert (photographs(train), photographs(test)) == ([first["image"]], [second["image"]])


@pytest.mark.usefixtures("workspace")
def test_bins_that_the_shards_lack_are_counted_and_one_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", dict.fromkeys(["00001", "00002", "7", "9"], "train"))

    with pytest.raises(UserError, match=r"lacks 2 bins of .*split\.csv, like [79]"):
        load_bins(tmp_path, tmp_path / "split.csv", "train")


@pytest.mark.usefixtures("workspace")
def test_shards_that_lack_all_bins_of_a_set_are_not_blamed_on_the_split(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", dict.fromkeys(["7", "9"], "train"))

    with pytest.raises(UserError, match="lacks 2 bins"):
        load_bins(tmp_path, tmp_path / "split.csv", "train")


@pytest.mark.usefixtures("workspace")
def test_an_empty_set_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", {"00001": "train", "00002": "train"})

    with pytest.raises(UserError, match=r"no bin in the set test: check split\.test"):
        load_bins(tmp_path, tmp_path / "split.csv", "test")


@pytest.mark.usefixtures("workspace")
def test_a_folder_without_shards_is_a_missing_input(tmp_path: Path) -> None:
    write_split(tmp_path / "split.csv", {"00001": "train"})

    with pytest.raises(FileNotFoundError, match="no Parquet shards"):
        load_bins(tmp_path / "resized", tmp_path / "split.csv", "train")


@pytest.mark.usefixtures("workspace")
def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_resized(tmp_path, bin_rows([1, 2]))
    write_split(tmp_path / "split.csv", {"00001": "train"})
    os.truncate(tmp_path / "00000.parquet", 1000)

    with pytest.raises(UserError, match=r"00000\.parquet is damaged"):
        load_bins(tmp_path, tmp_path / "split.csv", "train")
