import random
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest

from stages.sampling.siblings import padded_number, sibling_groups


def groups_of(contents: Mapping[str, Sequence[str | None]]) -> dict[str, str]:
    """The group of each id, found from the ASINs of each bin."""
    items = [(position, asin) for position, asins in enumerate(contents.values()) for asin in asins]
    table = pd.DataFrame(items, columns=["bin", "asin"])
    return dict(zip(contents, sibling_groups(list(contents), table), strict=True))


@pytest.mark.parametrize(
    ("bin_id", "number"),
    [("00001", 1), ("09999", 9999), ("99999", 99_999), ("100000", 100_000), ("535234", 535_234)],
)
def test_padded_ids_have_a_number(bin_id: str, number: int) -> None:
    assert padded_number(bin_id) == number


@pytest.mark.parametrize(
    "bin_id",
    [
        "1",
        "1102",
        "0",
        "",
        "001",
        "000001",
        "099999",
        "1e5",
        "-0001",
        "0000a",
        "\u0660\u0660\u0660\u0660\u0661",
    ],
)
def test_other_ids_have_none(bin_id: str) -> None:
    assert padded_number(bin_id) is None


def test_consecutive_bins_that_share_an_asin_are_one_group() -> None:
    groups = groups_of({"00001": ["A", "B"], "00002": ["B"], "00003": ["C"]})
    assert groups == {"00001": "00001", "00002": "00001", "00003": "00003"}


def test_siblings_of_siblings_are_one_group() -> None:
    groups = groups_of({"00001": ["A"], "00002": ["A", "B"], "00003": ["B", "C"], "00004": ["C"]})
    assert set(groups.values()) == {"00001"}


def test_a_gap_in_the_ids_separates_groups() -> None:
    groups = groups_of({"00001": ["A"], "00002": ["A"], "00004": ["A"], "00005": ["A"]})
    assert groups == {"00001": "00001", "00002": "00001", "00004": "00004", "00005": "00004"}


def test_an_empty_bin_separates_groups() -> None:
    groups = groups_of({"00001": ["A"], "00002": [], "00003": ["A"]})
    assert set(groups.values()) == {"00001", "00002", "00003"}


def test_each_unpadded_bin_is_its_own_group() -> None:
    contents = {bin_id: ["A"] for bin_id in ["1", "00001", "2", "00002", "10", "11"]}
    groups = groups_of(contents)
    assert groups == {id_: id_ for id_ in contents} | {"00002": "00001"}


def test_the_sequence_continues_at_six_digits() -> None:
    assert set(groups_of({"99999": ["A"], "100000": ["A"]}).values()) == {"99999"}


def test_an_asin_held_twice_or_unknown_does_not_link_bins() -> None:
    groups = groups_of({"00001": ["A", "A", None], "00002": [None], "00003": ["B", "B"]})
    assert set(groups.values()) == {"00001", "00002", "00003"}


@pytest.mark.parametrize("contents", [{}, {"00001": []}, {"00001": [], "1": [], "00002": []}])
def test_each_bin_without_items_is_its_own_group(contents: dict[str, list[str]]) -> None:
    assert groups_of(contents) == {bin_id: bin_id for bin_id in contents}


def test_the_order_of_the_bins_does_not_matter() -> None:
    chance = random.Random(0)
    contents = {
        f"{number:05d}": chance.sample("ABCDE", 2) for number in range(200) if chance.random() < 0.9
    }
    ids = list(contents)
    chance.shuffle(ids)
    assert groups_of({bin_id: contents[bin_id] for bin_id in ids}) == groups_of(contents)
