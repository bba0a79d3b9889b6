"""Lists of bins in lists/: exactly their bins and sets, or one line that names the problem."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from stages import split, subset
from stages.formats.shards import Reject, write_rejects, write_table
from stages.imaging.loader import load_bins
from stages.runtime.errors import UserError
from tests.builders import SIZE, square, write_resized
from tests.conftest import index_of, write_params

# 00001 and 00002 are siblings, as are 00004 and 00005; 7 and 00007 are two bins.
BINS = {
    "00001": (1, ["A"]),
    "00002": (2, ["A"]),
    "00003": (1, ["B"]),
    "00004": (2, ["C"]),
    "00005": (1, ["C"]),
    "00006": (9, ["D"]),
    "00007": (2, ["E"]),
    "00008": (1, ["F"]),
    "7": (2, ["G"]),
}
FITTING = [bin_id for bin_id, (quantity, _) in BINS.items() if quantity < 6]


def write_list(text: str | bytes) -> None:
    path = Path("lists/mine.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture(autouse=True)
def index(workspace: Path) -> None:
    write_table(workspace / "data/index.parquet", index_of(BINS))
    write_rejects(workspace / "data/quarantine.csv", [])


def run_subset(text: str | bytes) -> list[str]:
    """Run the subset stage with this list. Returns the subset's ids."""
    write_list(text)
    write_params({"subset.ids": "mine.csv", "subset.bins": 1, "subset.quantities": [1, 2]})
    assert "bins of lists/mine.csv" in subset.main()
    ids: list[str] = pq.read_table("data/subset.parquet")["id"].to_pylist()
    return ids


def run_split(text: str | bytes, validation: int = 2) -> dict[str, str]:
    """The set of each bin in data/split.csv, of a subset of all fitting bins."""
    run_subset("\n".join(["id", *FITTING]))
    write_list(text)
    write_params(
        {"split.by": "file", "split.file": "mine.csv", "split.validation": validation},
    )
    split.main()
    sets = pd.read_csv("data/split.csv", dtype=str)
    return dict(zip(sets["id"], sets["set"], strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "id\n7\n00003\n00001\n",
        "\ufeffid\r\n7\r\n00003\r\n00001\r\n",
        'set,id\ntrain,"00001"\ntest,"00003"\n,7\n',
    ],
    ids=["plain", "of a spreadsheet", "with another column"],
)
def test_the_subset_is_the_list(text: str) -> None:
    assert run_subset(text) == ["00001", "00003", "7"]


def test_siblings_of_a_listed_bin_are_found_over_all_bins() -> None:
    run_subset("id\n00002\n00005\n")
    assert pq.read_table("data/subset.parquet")["group"].to_pylist() == ["00001", "00004"]


WRONG = [
    ("", "lists/mine.csv cannot be read as a CSV file: Empty CSV file"),
    ("id,set\n", "lists/mine.csv lists no bins"),
    ("id,set\n1,train,x\n", "lists/mine.csv cannot be read as a CSV file: "),
    (b"id\n\xff\xfe\n", "lists/mine.csv cannot be read as a CSV file: "),
    ("bin;set\n1;train\n", "should have one column id; its first line is 'bin;set'"),
    ("id,id,set\n1,2,train\n", "should have one column id; its first line is 'id, id, set'"),
    ("id,set\n00001,train\n00003,test\n00001,train\n", "lists '00001' more than once"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG)
def test_a_file_that_is_not_a_list_is_reported_in_one_line_by_both_stages(
    text: str | bytes, problem: str
) -> None:
    for run in (run_subset, run_split):
        with pytest.raises(UserError) as caught:
            run(text)
        assert problem in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "id\n1\n00001\n2\n3\n4\n5\n6\n",
            "lists/mine.csv lists '1', '2', '3', '4', '5' and 1 more, which data/index.parquet does"
            " not have: remove them, or correct them (an id is text: 00100 and 100 are two bins)",
        ),
        (
            "id\n00001\n00006\n",
            "lists/mine.csv lists bins whose quantity is not in subset.quantities [1, 2]:"
            " '00006 with 9': remove them, or add their quantities",
        ),
    ],
)
def test_bins_that_the_subset_cannot_have_are_named(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        run_subset(text)
    assert str(caught.value) == problem


def test_the_error_about_a_missing_list_says_where_to_put_it_and_how_queued_runs_get_it() -> None:
    write_params({"subset.ids": "mine.csv"})
    with pytest.raises(UserError) as caught:
        subset.main()
    assert str(caught.value) == (
        "subset.ids: there is no file lists/mine.csv. Put it there; `dvc exp run --queue` and"
        " `--temp` need `git add lists/mine.csv` too, since they only have files that git knows"
    )


ALL_SETS = {
    "00001": "train",
    "00002": "test",
    "00003": "validation",
    "00004": "train",
    "00007": "test",
}


def listing(sets: dict[str, str]) -> str:
    return "\n".join(["id,set", *(f"{bin_id},{name}" for bin_id, name in sets.items())])


def test_the_split_is_that_of_the_file_and_siblings_in_two_sets_are_counted() -> None:
    assert run_split(listing(ALL_SETS)) == ALL_SETS
    # 00002 is a sibling of 00001.
    assert json.loads(Path("data/split.json").read_text()) == {
        "file": {"test_bins": 2, "with_sibling_seen": 1}
    }


def test_the_stage_says_how_many_bins_are_in_no_set() -> None:
    run_split(listing(ALL_SETS))
    write_rejects(Path("data/quarantine.csv"), [Reject("00008", "no bytes")])
    assert split.main() == "2 train, 1 validation, 2 test; 1 unusable, 2 in no set"


def test_without_validation_in_the_file_whole_groups_of_train_validate() -> None:
    sets = dict.fromkeys(FITTING, "train") | {"00007": "test", "00003": "test"}

    found = run_split(listing(sets), validation=3)

    assert {bin_id for bin_id, name in found.items() if name == "test"} == {"00003", "00007"}
    assert found["00001"] == found["00002"]
    assert found["00004"] == found["00005"]
    assert {"train", "validation"} < set(found.values())
    assert found.keys() == set(FITTING)
    assert run_split(listing(sets), validation=3) == found


def test_a_listed_bin_that_is_unusable_is_in_no_set() -> None:
    run_split(listing(ALL_SETS))
    write_rejects(Path("data/quarantine.csv"), [Reject("00001", "no bytes")])
    split.main()
    sets = pd.read_csv("data/split.csv", dtype=str)
    assert set(sets["id"]) == ALL_SETS.keys() - {"00001"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"00001": "dev", "00004": "Train"}, "has the sets 'Train', 'dev': use train, validation,"),
        ({"00006": "train"}, "'00006', which data/subset.parquet (take this file's bins by subset"),
        ({"00099": "test"}, "lists '00099', which data/subset.parquet"),
        ({"00001": "validation", "00004": "test"}, "has no usable bin in the set train"),
        ({"00002": "train", "00007": "train"}, "has no usable bin in the set test"),
    ],
    ids=str,
)
def test_impossible_sets_are_named(changes: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        run_split(listing(ALL_SETS | changes))
    assert str(caught.value).startswith("lists/mine.csv ")
    assert problem in str(caught.value)


def test_a_set_whose_bins_are_all_unusable_is_named() -> None:
    run_split(listing(ALL_SETS))
    write_rejects(Path("data/quarantine.csv"), [Reject("00003", "no bytes")])
    with pytest.raises(UserError, match="has no usable bin in the set validation"):
        split.main()


def test_one_file_serves_as_both() -> None:
    text = listing(ALL_SETS)
    run_subset(text)
    write_params(
        {
            "subset.ids": "mine.csv",
            "subset.quantities": [1, 2],
            "split.by": "file",
            "split.file": "mine.csv",
        }
    )
    subset.main()
    assert split.main() == "2 train, 1 validation, 2 test; 0 unusable"


DECIDED = "id,expected,counted,decision,decided_at\n"


def run_with_corrections(text: str, quantities: tuple[int | str, ...] = (1, 2, 3)) -> str:
    """Split all fitting bins by the sets of a file, with the counts of this list."""
    run_subset("\n".join(["id", *FITTING]))
    write_list(listing(ALL_SETS | {"00005": "train", "00008": "train", "7": "train"}))
    Path("lists/decisions.csv").write_text(DECIDED + text)
    write_params(
        {
            "subset.quantities": list(quantities),
            "split.by": "file",
            "split.file": "mine.csv",
            "split.corrections": "decisions.csv",
        }
    )
    return split.main()


def test_corrected_counts_replace_the_records_which_stay_beside_them() -> None:
    decisions = ["00001,1,3,wrong", "00002,2,2,right", "00003,1,1,other_items", "00004,2,,unclear"]
    line = run_with_corrections("".join(f"{decision},x\n" for decision in decisions))

    sets = pd.read_csv("data/split.csv", dtype=str).set_index("id")
    assert [*sets.loc["00001", ["set", "quantity", "recorded"]]] == ["train", "3", "1"]
    others = sets[sets.index != "00001"]
    assert (others["quantity"] == others["recorded"]).all()
    assert "00004" not in sets.index
    assert line == (
        "4 train, 1 validation, 2 test; 0 unusable; lists/decisions.csv: 1 corrected, 1 left out"
        " (nobody could tell)"
    )
    # Later stages read these counts, and not those of the photographs' shards.
    shards = [{"id": bin_id, "quantity": 9, "image": square(1, 0)} for bin_id in sets.index]
    write_resized(Path("data/resized"), shards)
    (train,) = load_bins(Path("data/resized"), Path("data/split.csv"), "train", size=SIZE)
    assert train.quantities[train.ids.index("00001")] == 3


def test_corrections_that_leave_a_set_without_bins_are_refused() -> None:
    with pytest.raises(UserError, match=r"^lists/decisions.csv leaves no bin in the set valid"):
        run_with_corrections("00003,1,,unclear,x\n")


def test_counts_of_an_open_class_are_compared_as_its_lowest_count() -> None:
    text = "00002,5,4,wrong,x\n00001,1,7,wrong,x\n00007,2,2,right,x\n"
    line = run_with_corrections(text, quantities=(1, "2+"))

    assert line.endswith(": 1 corrected, 0 left out (nobody could tell)")
    sets = pd.read_csv("data/split.csv", dtype=str).set_index("id")
    assert sets.loc[["00001", "00002"], "quantity"].tolist() == ["2", "2"]


def test_corrections_of_unknown_bins_and_changed_records_are_named_and_not_applied() -> None:
    line = run_with_corrections("00099,1,2,wrong,x\n00001,2,3,wrong,x\n00005,1,9,wrong,x\n")

    assert line.endswith(
        "lists/decisions.csv: 0 corrected, 0 left out (nobody could tell), 1 left out (not in"
        " subset.quantities), not applied (their records have changed): '00001', not applied (not"
        " in data/subset.parquet): '00099'"
    )
    sets = pd.read_csv("data/split.csv", dtype=str).set_index("id")
    assert sets.loc["00001", "quantity"] == "1"
    assert "00005" not in sets.index


@pytest.mark.parametrize(
    "row",
    [
        "00001,1,x,wrong,x",
        "00001,1,,wrong,x",
        "00001,1,1,wrong,x",
        "00001,1,2,right,x",
        "00001,1,2,unclear,x",
        "00001,1,2,other_items,x",
        "00001,one,2,wrong,x",
        "00001,1,2,=1+1,x",
        "00001,1,\u0663,wrong,x",
    ],
)
def test_a_row_that_is_not_a_decision_is_named(row: str) -> None:
    with pytest.raises(UserError) as caught:
        run_with_corrections(f"00002,2,2,right,x\n{row}\n")
    assert str(caught.value).startswith(
        "lists/decisions.csv: the row of '00001' is not a decision: expected and counted should be"
    )
    assert str(caught.value).isprintable()


def test_without_corrections_the_split_has_no_counts() -> None:
    run_split(listing(ALL_SETS))
    assert list(pd.read_csv("data/split.csv")) == ["id", "set", "group"]
