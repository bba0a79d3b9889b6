import io
import json
from itertools import islice

import pytest
from PIL import Image

from stages.collecting.records import parse_record
from tests.conftest import sibling_pairs
from tools import synthetic
from tools.synthetic import SyntheticBin, synthetic_bins


def asins_of(synthetic_bin: SyntheticBin) -> set[str]:
    return {item["asin"] for item in parse_record(synthetic_bin.record)["items"]}


def test_the_seed_decides_every_byte() -> None:
    assert list(synthetic_bins(5, seed=3)) == list(synthetic_bins(5, seed=3))
    assert list(synthetic_bins(5, seed=3)) != list(synthetic_bins(5, seed=4))


def test_a_larger_bucket_begins_with_the_bins_of_a_smaller_one(
    synthetic: list[SyntheticBin],
) -> None:
    assert list(islice(synthetic_bins(500, seed=0), 7)) == synthetic[:7]


def test_ids_are_padded_and_every_hundredth_has_an_unpadded_twin(
    synthetic: list[SyntheticBin],
) -> None:
    padded = [f"{number:05d}" for number in range(1, 121)]
    assert [one.id for one in synthetic] == [*padded[:100], "100", *padded[100:]]


def test_ids_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without rendering, which takes a minute.
    monkeypatch.setattr(
        synthetic, "_render", lambda bin_id, items, _: SyntheticBin(bin_id, len(items), b"", b"")
    )
    ids = [one.id for one in synthetic_bins(10_100, seed=0)]
    assert len(set(ids)) == len(ids)


def test_records_have_the_rendered_quantities(synthetic: list[SyntheticBin]) -> None:
    for one in synthetic:
        record = parse_record(one.record)
        assert record["quantity"] == one.quantity
        assert sum(item["quantity"] for item in record["items"]) == one.quantity
        assert record["image_fname"] == (f"{one.id}.jpg" if len(one.id) < 5 else None)


def test_items_have_the_form_of_the_buckets(synthetic: list[SyntheticBin]) -> None:
    for one in synthetic:
        for asin, item in json.loads(one.record)["BIN_FCSKU_DATA"].items():
            assert item["asin"] == asin
            assert len(asin) == 10
            assert set(item) == {
                *("asin", "height", "length", "name"),
                *("normalizedName", "quantity", "weight", "width"),
            }


def test_every_class_is_rendered(synthetic: list[SyntheticBin]) -> None:
    assert {1, 2, 3, 4, 5} <= {one.quantity for one in synthetic}


def test_siblings_share_an_asin_and_differ_by_one_item(synthetic: list[SyntheticBin]) -> None:
    bins = {one.id: one for one in synthetic}
    pairs = sibling_pairs({one.id: one.record for one in synthetic})
    assert 0.2 < len(pairs) / len(synthetic) < 0.5
    for one, two in pairs:
        assert asins_of(bins[one]) & asins_of(bins[two])
        assert abs(bins[one].quantity - bins[two].quantity) == 1


def test_a_twin_is_another_bin(synthetic: list[SyntheticBin]) -> None:
    bins = {one.id: one for one in synthetic}
    assert not asins_of(bins["100"]) & asins_of(bins["00100"])


def test_photographs_are_jpegs_that_differ(synthetic: list[SyntheticBin]) -> None:
    for one in synthetic[::10]:
        with Image.open(io.BytesIO(one.photograph)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 260 <= image.width <= 380
            assert 230 <= image.height <= 320
            image.load()
    assert len({one.photograph for one in synthetic}) == len(synthetic)
