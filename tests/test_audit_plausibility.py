"""The warning of audits that flag nearly everything, and of no others."""

import pandas as pd
import pytest

from tools.audit.plausibility import ADVICE, EITHER, PHOTOGRAPHS, RECORDS, too_many, warn

EVEN = {1: 40, 2: 40, 3: 40}


def counts(mixture: dict[int, int]) -> list[int]:
    return [count for count, bins in mixture.items() for _ in range(bins)]


def table(seen: dict[int, int], expected: dict[int, int], alarms: int) -> pd.DataFrame:
    """The table of an audit, whose last bin could not be judged."""
    rows = pd.DataFrame({"seen": counts(seen), "expected": counts(expected)}, dtype="Int64")
    rows["alarm"] = ["yes"] * alarms + ["no"] * (len(rows) - alarms)
    rows.loc[len(rows)] = [None, 3, ""]
    return rows


VALIDATION = pd.DataFrame({"actual": counts(EVEN), "predicted": counts({1: 42, 2: 36, 3: 42})})


@pytest.mark.parametrize(
    ("alarms", "judged", "false_alarm", "many"),
    [
        (19, 22, 0.05, True),
        (1400, 4000, 0.05, True),
        (200, 400, 0.25, True),
        (4, 4, 0.0, True),
        # Too few to know.
        (2, 2, 0.05, False),
        (3, 8, 0.05, False),
        # No more than are allowed, or than wrong records explain.
        (5, 100, 0.05, False),
        (15, 100, 0.05, False),
        (1400, 10_000, 0.05, False),
        (300, 1000, 0.25, False),
        (0, 0, 0.05, False),
        (0, 50, 0.0, False),
    ],
)
def test_alarms_are_too_many_if_chance_and_wrong_records_cannot_explain_them(
    alarms: int, judged: int, false_alarm: float, many: bool
) -> None:
    assert too_many(alarms, judged, false_alarm) is many


@pytest.mark.parametrize(
    ("seen", "expected", "likelier"),
    [
        # The models see the same counts as in validation, whatever the records say.
        (EVEN, EVEN, RECORDS),
        (EVEN, {1: 10, 2: 10, 3: 100}, RECORDS),
        ({1: 44, 2: 32, 3: 44}, EVEN, RECORDS),
        # The models see one count nearly everywhere, or never see one.
        ({1: 5, 2: 110, 3: 5}, EVEN, PHOTOGRAPHS),
        ({1: 60, 3: 60}, EVEN, PHOTOGRAPHS),
        ({2: 30}, {1: 10, 2: 10, 3: 10}, PHOTOGRAPHS),
        # One count is more frequent, also in the records.
        ({1: 100, 2: 10, 3: 10}, {1: 100, 2: 10, 3: 10}, ""),
        ({3: 120}, {3: 120}, ""),
        # Too few to tell.
        ({1: 10, 2: 10, 3: 10}, {1: 10, 2: 10, 3: 10}, ""),
        ({1: 1, 2: 3, 3: 1}, {1: 2, 2: 1, 3: 2}, ""),
    ],
)
def test_the_warning_says_which_reason_is_likelier(
    seen: dict[int, int], expected: dict[int, int], likelier: str
) -> None:
    alarms = sum(seen.values())

    warning = warn(table(seen, expected, alarms), 0.05, VALIDATION)

    assert warning == EITHER + likelier + ADVICE


def test_plausible_alarms_have_no_warning() -> None:
    assert warn(table({2: 120}, EVEN, 12), 0.05, VALIDATION) == ""
