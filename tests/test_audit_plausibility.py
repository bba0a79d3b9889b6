"""Audits that flag nearly everything say what that means, and only those do."""

import numpy as np
import pandas as pd
import pytest

from tools.audit.plausibility import ADVICE, EITHER, PHOTOGRAPHS, RECORDS, too_many, warn

LABELS = [1, 2, 3]


def probabilities(bins: int, sharpness: float, seed: int = 0) -> "np.ndarray[tuple[int, int]]":
    """Random ones; a sharper model is more confident."""
    chance = np.random.default_rng(seed)
    shares: np.ndarray[tuple[int, int]] = chance.dirichlet([1 / sharpness] * len(LABELS), bins)
    return shares


def table(alarms: int, others: int, sharpness: float) -> pd.DataFrame:
    """That of an audit; the last row is a photograph that could not be read."""
    bins = alarms + others
    rows = pd.DataFrame(probabilities(bins, sharpness, seed=1), columns=["p1", "p2", "p3"])
    rows["id"] = [f"{number:05d}" for number in range(bins)]
    rows["alarm"] = ["yes"] * alarms + ["no"] * others
    rows.loc[bins, "alarm"] = ""
    return rows


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
        # As many as are allowed, or as wrong records explain.
        (5, 100, 0.05, False),
        (15, 100, 0.05, False),
        (1400, 10_000, 0.05, False),
        (300, 1000, 0.25, False),
        (0, 0, 0.05, False),
        (0, 50, 0.0, False),
    ],
)
def test_many_alarms_are_more_than_chance_and_wrong_records_explain(
    alarms: int, judged: int, false_alarm: float, many: bool
) -> None:
    assert too_many(alarms, judged, false_alarm) is many


@pytest.mark.parametrize(
    ("alarms", "others", "sharpness", "likelier"),
    [
        # As confident as in validation.
        (180, 20, 1, RECORDS),
        (4000, 1000, 1, RECORDS),
        # A somewhat different mixture of counts, significant as it is.
        (9000, 1000, 1.3, RECORDS),
        # More confident and less so.
        (180, 20, 4, PHOTOGRAPHS),
        (180, 20, 0.2, PHOTOGRAPHS),
        (36, 4, 10, PHOTOGRAPHS),
        # Too few to tell.
        (30, 10, 1, ""),
    ],
)
def test_the_warning_says_which_reason_is_likelier(
    alarms: int, others: int, sharpness: float, likelier: str
) -> None:
    warning = warn(table(alarms, others, sharpness), LABELS, 0.05, probabilities(300, 1), {})

    assert warning == EITHER + likelier + ADVICE


@pytest.mark.parametrize(("trained_on", "likelier"), [(150, RECORDS), (250, ""), (300, "")])
def test_confidence_in_bins_of_the_training_set_says_nothing_about_photographs(
    trained_on: int, likelier: str
) -> None:
    bins = table(300, 0, 1)
    bins.loc[: trained_on - 1, ["p1", "p2", "p3"]] = probabilities(trained_on, 10)

    warning = warn(bins, LABELS, 0.05, probabilities(300, 1), set(bins["id"][:trained_on]))

    assert warning == EITHER + likelier + ADVICE


def test_there_is_no_warning_of_alarms_that_say_something() -> None:
    assert warn(table(8, 92, 10), LABELS, 0.05, probabilities(300, 1), {}) == ""
