"""What checking was worth: estimates whose intervals hold, and the one line about them."""

from collections.abc import Sequence

import numpy as np
import pytest

from tools.audit.decisions import Decision
from tools.audit.worth import Part, best_share, describe, interval, worth, worth_of

RUNS = 1000


def decision(
    number: int,
    verdict: str,
    *,
    part: str = "flagged",
    bins: int | None = 20,
    audit: str = "audit-000000000001",
    day: int = 1,
) -> Decision:
    counted = {"right": 2, "wrong": 3, "unclear": None}[verdict]
    time = f"2026-01-{day:02d}T08:00:00.000Z"
    share = 0.05 if part == "flagged" else None
    name = f"{part}-{number}"
    return Decision(name, 2, counted, verdict, time, "", audit, part, bins, share)


def some(verdicts: str, part: str = "flagged", bins: int | None = 20) -> list[Decision]:
    """Decisions like "wwr?" (wrong, wrong, right, cannot tell)."""
    names = {"w": "wrong", "r": "right", "?": "unclear"}
    return [
        decision(number, names[letter], part=part, bins=bins)
        for number, letter in enumerate(verdicts)
    ]


#: The bins of the list's alarms and all others, with their wrong records and how many are checked.
CASES = [
    # flagged: bins, wrong, checked; others: bins, wrong, checked
    ((200, 60, 200), (9800, 100, 50)),
    ((200, 60, 20), (9800, 100, 20)),
    ((200, 60, 60), (9800, 500, 200)),
    ((200, 0, 200), (9800, 0, 50)),
    ((15, 5, 15), (87, 3, 20)),
    ((15, 5, 5), (87, 3, 5)),
    ((3, 1, 1), (40, 0, 2)),
    ((500, 100, 500), (500_000, 5000, 50)),
]


@pytest.mark.parametrize(("flagged", "others"), CASES)
def test_intervals_hold_in_95_of_100_audits(
    flagged: tuple[int, int, int], others: tuple[int, int, int]
) -> None:
    chance = np.random.default_rng(0)
    (wrong, missed) = (flagged[1], others[1])
    held = np.zeros(3)
    for _ in range(RUNS):
        one, other = (
            Part(bins, checked, int(chance.hypergeometric(bad, bins - bad, checked)))
            for bins, bad, checked in (flagged, others)
        )
        found = worth(one, other, [])
        truths = (wrong / flagged[0], wrong + missed, wrong / max(1, wrong + missed))
        estimates = (found.right_alarms, found.wrong_records, found.found)
        # Where no wrong record was found, nothing is said about the share.
        held += [
            estimate is None or estimate.low - 1e-9 <= truth <= estimate.high + 1e-9
            for estimate, truth in zip(estimates, truths, strict=True)
        ]
    assert (held / RUNS >= 0.95).all(), held / RUNS


def test_the_mean_of_many_estimates_is_the_number_of_wrong_records() -> None:
    chance = np.random.default_rng(0)
    flagged = chance.hypergeometric(60, 140, 40, RUNS)
    others = chance.hypergeometric(100, 900, 50, RUNS)
    totals = [
        found.value
        for one, other in zip(flagged, others, strict=True)
        if (found := worth(Part(200, 40, int(one)), Part(1000, 50, int(other)), []).wrong_records)
    ]
    assert len(totals) == RUNS
    assert np.mean(totals) == pytest.approx(160, rel=0.02)


@pytest.mark.parametrize(
    ("part", "low", "high"),
    [
        # Everything is checked.
        (Part(15, 15, 4), 4, 4),
        (Part(0, 0, 0), 0, 0),
        # Nothing is checked.
        (Part(87, 0, 0), 0, 87),
        # 1 wrong of 2: the rest may be all right or all wrong.
        (Part(4, 2, 1), 1, 3),
        # None wrong of 50 among very many: the bound of Clopper and Pearson, 1 - 0.025 ** (1 / 50).
        (Part(1_000_000, 50, 0), 0, round(1e6 * (1 - 0.025 ** (1 / 50)))),
    ],
)
def test_intervals_worked_by_hand(part: Part, low: int, high: int) -> None:
    found = interval(part, 0.95)
    assert found[0] == low
    assert found[1] == pytest.approx(high, rel=1e-3)


def test_an_audit_whose_bins_were_all_checked_has_no_uncertainty() -> None:
    found = worth(Part(10, 10, 4), Part(30, 30, 1), [])
    assert found.right_alarms == (0.4, 0.4, 0.4)
    assert found.wrong_records == (5, 5, 5)
    assert found.found == (0.8, 0.8, 0.8)


@pytest.mark.parametrize(
    ("alarms", "wrong", "best"),
    [
        # The surest alarms are right, the others are not.
        ([(0.01, True), (0.01, True), (0.05, False), (0.05, False), (0.05, False)], 3, 0.01),
        # The others are right as well.
        ([(0.01, True), (0.01, True), (0.05, True), (0.05, True), (0.05, False)], 4, 0.05),
        ([(0.01, False)], 4, None),
        ([], 4, None),
    ],
)
def test_the_best_share_stops_where_alarms_are_mostly_false(
    alarms: Sequence[tuple[float, bool]], wrong: float, best: float | None
) -> None:
    assert best_share(alarms, 1.0, wrong) == best


@pytest.mark.parametrize(
    ("decisions", "line"),
    [
        # 20 alarms, of which 8 were checked, and 4 of 100 others.
        (
            [*some("wwwrrrrr?"), *some("rrrr", "other", 100)],
            "3 of 8 checked alarms were right (38%, 95% interval 15% to 65%);"
            " about 8 records are wrong in all (3 to 79); the list finds 100% of them (4% to 100%);"
            " the best balance is at --false-alarm 0.05",
        ),
        # No other bin was checked, and none was drawn.
        (some("wr"), "1 of 2 checked alarms were right (50%, 95% interval 5% to 95%)"),
        (some("wwr?", bins=None), "2 of 3 checked alarms were right"),
        # Nobody could tell, or only other bins were checked.
        (some("?"), "no alarm was checked"),
        (some("wr", "other", 9), "no alarm was checked"),
        # None was wrong.
        (
            [*some("rr"), *some("rr", "other", 3)],
            "0 of 2 checked alarms were right (0%, 95% interval 0% to 80%);"
            " about 0 records are wrong in all (0 to 18)",
        ),
    ],
)
def test_one_line_says_what_a_list_was_worth(decisions: list[Decision], line: str) -> None:
    found = worth_of(decisions)
    assert found is not None
    assert describe(found) == line


def test_only_the_audit_that_was_decided_on_last_counts() -> None:
    earlier = [decision(number, "wrong") for number in range(9)]
    later = [decision(9, "right", audit="audit-000000000002", day=2)]
    found = worth_of([*later, *earlier])
    assert found is not None
    assert (found.checked, found.wrong) == (1, 0)
    assert worth_of([]) is None
