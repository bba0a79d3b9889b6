"""Decisions of earlier audits: their files, whether they still hold, and the list of the rest."""

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime.errors import UserError
from tools.audit.counts import CountsError
from tools.audit.decisions import (
    COLUMNS,
    Decision,
    fingerprint,
    parse_decisions,
    read_decisions,
    still_hold,
    still_needed,
)
from tools.audit.photographs import open_photographs
from tools.audit.work_list import make_list

HEADER = ",".join(COLUMNS)
PRINT = "sha256:0123456789abcdef"
AUDIT = "audit-0123456789ab"
ROWS = [
    f"00001,3,3,right,2026-01-02T08:00:00.000Z,{PRINT},{AUDIT},flagged,15,0.05",
    f"00002,1,4,wrong,2026-01-02T08:01:00.000Z,{PRINT},{AUDIT},other,87,",
    f"00003,2,,unclear,2026-01-02T08:02:00.000Z,,{AUDIT},flagged,,0.01",
]
IDS = ["00001", "00002", "00003"]
READ = {
    "00001": Decision(
        "00001", 3, 3, "right", "2026-01-02T08:00:00.000Z", PRINT, AUDIT, "flagged", 15, 0.05
    ),
    "00002": Decision(
        "00002", 1, 4, "wrong", "2026-01-02T08:01:00.000Z", PRINT, AUDIT, "other", 87, None
    ),
    "00003": Decision(
        "00003", 2, None, "unclear", "2026-01-02T08:02:00.000Z", "", AUDIT, "flagged", None, 0.01
    ),
}


def write(path: Path, rows: Sequence[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows, ""]), "utf-8")
    return path


def test_the_file_of_a_page_is_read(tmp_path: Path) -> None:
    found = read_decisions([write(tmp_path / "decisions.csv", ROWS)], IDS)
    assert found.by_id == READ
    assert found.notes == []


def test_a_record_with_the_right_count_and_other_items_is_wrong(tmp_path: Path) -> None:
    row = ROWS[0].replace("right", "other_items")
    found = read_decisions([write(tmp_path / "decisions.csv", [row])], IDS).by_id["00001"]

    assert found == READ["00001"]._replace(decision="other_items")
    assert (found.counted, found.is_wrong) == (3, True)


def test_a_file_that_went_through_a_spreadsheet_is_read_as_counts_are(tmp_path: Path) -> None:
    lines = "\n".join([HEADER, *ROWS]).replace("T08:00:00.000Z", " 08:00:00").replace("0000", "")
    path = tmp_path / "decisions.csv"
    path.write_bytes(lines.replace(",", ";").replace("0.0", "0,0").encode("utf-16"))

    found = read_decisions([path], IDS)

    assert found.by_id == READ
    assert found.notes == [
        f"{path}: read as UTF-16, semicolon-separated;"
        " ids whose lost leading zeros were restored: 3"
    ]


@pytest.mark.parametrize("names", [("a.csv", "b.csv"), ("b.csv", "a.csv")])
def test_of_several_decisions_about_a_bin_the_one_made_last_holds(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    later = ROWS[0].replace("3,3,right", "3,1,wrong").replace("01-02T08", "01-02T12")
    # Local time, two hours ahead.
    earlier = ROWS[1].replace("1,4,wrong", "1,1,right").replace("08:01:00.000Z", "09:00:00+02:00")
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.csv", [later, earlier])

    found = read_decisions([tmp_path / name for name in names], IDS).by_id

    assert {bin_id: one.counted for bin_id, one in found.items()} == {
        "00001": 1,
        "00002": 4,
        "00003": None,
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ROWS[0].replace("3,3,right", "3,4,right"), "line 2: expected '3', counted '4' and decis"),
        (ROWS[0].replace("3,3,right", "3,3,wrong"), "do not fit together: save the file again"),
        (ROWS[0].replace("3,3,right", "3,,wrong"), "do not fit together"),
        (ROWS[0].replace("3,3,right", "3,3,unclear"), "do not fit together"),
        (ROWS[0].replace("3,3,right", "3,4,other_items"), "do not fit together"),
        (ROWS[0].replace("3,3,right", ",,right"), "do not fit together"),
        (ROWS[0].replace("right", "ok"), "decision 'ok' do not fit together"),
        (ROWS[0].replace("3,3", "3,x"), "line 2: the count of 00001 is 'x'"),
        (ROWS[0].replace("2026-01-02T08:00:00.000Z", "yesterday"), "decided_at is 'yesterday', bu"),
        (ROWS[0].replace("2026-01-02T08:00", "0001-01-01T00:00").replace("Z", "+14:00"), "decided"),
        (ROWS[0].replace(PRINT, "1.2E+15"), r"photograph is '1.2E\+15', which no page of an audit"),
        (ROWS[0].replace("flagged", "=1+1"), r"part is '=1\+1'"),
        (ROWS[0].replace(AUDIT, "x"), "audit is 'x'"),
        (ROWS[0].replace("0.05", "5%"), "flagged_at is '5%'"),
        (ROWS[0].replace("00001", "../1"), "'../1' is not a bin's id"),
    ],
)
def test_a_row_that_no_page_writes_is_named(tmp_path: Path, row: str, problem: str) -> None:
    path = write(tmp_path / "decisions.csv", [row])
    with pytest.raises(UserError, match=problem) as caught:
        read_decisions([path], IDS)
    assert str(caught.value).startswith(f"{path}: line 2: ")


def test_a_part_of_fewer_bins_than_were_decided_on_is_refused(tmp_path: Path) -> None:
    rows = [
        ROWS[0].replace(",15,", ",1,"),
        ROWS[0].replace(",15,", ",1,").replace("00001", "00002"),
    ]
    path = write(tmp_path / "decisions.csv", rows)
    with pytest.raises(UserError, match="2 bins of audit-0123456789ab were decided on in the part"):
        read_decisions([path], IDS)


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "counts.csv", ["00001,3"], header="id,expected")
    with pytest.raises(UserError, match="should name the columns id, expected, counted, decision,"):
        read_decisions([path], IDS)


def test_a_decision_holds_as_long_as_photograph_and_record_are_the_same(tmp_path: Path) -> None:
    for bin_id in IDS:
        (tmp_path / f"{bin_id}.jpg").write_bytes(bin_id.encode())
    decisions = {
        bin_id: READ["00001"]._replace(id=bin_id, photograph=fingerprint(bin_id.encode()))
        for bin_id in [*IDS, "00004"]
    }
    photographs = open_photographs(str(tmp_path))
    counts = {"00001": 3, "00002": 3, "00003": 4, "00004": 3}
    (tmp_path / "00002.jpg").write_bytes(b"another")

    assert still_hold(decisions, counts, photographs) == {"00001": decisions["00001"]}


def test_the_next_file_keeps_decisions_unless_they_are_known_to_be_over() -> None:
    counts = {"00001": 3, "00002": 5}
    kept = still_needed(READ, {"00001"}, counts)
    assert [one.id for one in kept] == ["00001", "00003"], "00003 may be in another audit"


@given(st.one_of(st.binary(), st.text().map(lambda text: f"{HEADER}\n{text}".encode())))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(CountsError):
        parse_decisions(data)


def judged(alarms: int, others: int) -> pd.DataFrame:
    """A table of flagged bins a0, a1, ... and then others o0, o1, ..."""
    ids = [*(f"a{number}" for number in range(alarms)), *(f"o{number}" for number in range(others))]
    flags = ["yes"] * alarms + ["no"] * others
    table = pd.DataFrame({"id": ids, "alarm": flags})
    return pd.concat([table, pd.DataFrame({"id": ["x"], "alarm": [""]})], ignore_index=True)


ALARMS = {f"a{number}": 0.05 for number in range(30)}


def test_without_a_sample_the_most_suspicious_alarms_are_listed_in_order() -> None:
    work = make_list(judged(30, 500), ALARMS, {"a1": READ["00001"]}, top=5, sample=0, seed=0)
    assert work.ids == ["a0", "a2", "a3", "a4", "a5"]
    assert not work.sampled


def test_the_sample_is_of_all_judged_bins_that_would_not_be_listed() -> None:
    """Alarms beyond --top among them: nothing else would say how many of those are right."""
    drawn = set()
    for seed in range(40):
        work = make_list(judged(30, 100), ALARMS, {"o7": READ["00001"]}, 20, sample=25, seed=seed)
        assert work.others == 109
        assert set(work.flagged) == {f"a{number}" for number in range(20)}
        assert len(set(work.ids)) == 45
        drawn |= {bin_id for bin_id in work.ids if bin_id not in work.flagged}
    everything = {f"a{number}" for number in range(20, 30)} | {f"o{n}" for n in range(100)}
    assert drawn == everything - {"o7"}


def test_the_place_of_a_bin_on_a_list_with_a_sample_does_not_tell_whether_it_was_flagged() -> None:
    positions = []
    for seed in range(40):
        work = make_list(judged(30, 100), ALARMS, {}, 30, sample=30, seed=seed)
        positions += [place for place, bin_id in enumerate(work.ids) if bin_id in work.flagged]
    # The mean of random places differs from 29.5 by 17.3 / sqrt(1200) at most about three times.
    assert abs(sum(positions) / len(positions) - 29.5) < 1.5
    again = make_list(judged(30, 100), ALARMS, {}, 30, sample=30, seed=39)
    assert again.ids == work.ids


def test_a_bin_that_is_drawn_stays_drawn_when_others_come() -> None:
    """So the next night asks for the rest of an unfinished sample, and not for another one."""
    few, many = (make_list(judged(0, 1000), {}, {}, 9, sample, 0) for sample in (30, 60))
    assert set(few.ids) < set(many.ids)
    gone = random.Random(0).sample(few.ids, 10)
    settled = dict.fromkeys(gone, READ["00001"])
    rest = make_list(judged(0, 1000), {}, settled, 9, 30, 0)
    assert set(few.ids) - set(gone) < set(rest.ids)
