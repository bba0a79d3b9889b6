"""Whether the alarms of an audit can be believed: not if nearly every bin is flagged."""

import pandas as pd
from scipy.stats import binom, chi2_contingency

# More than one wrong record in ten would be unusual.
WRONG_RECORDS = 0.1
# Chance alone causes a warning in at most one audit in a thousand.
CHANCE = 0.001
# The `distance` between the counts that the models see here and in validation. In trials with
# models of synthetic bins, wrong records moved it by 0.04 at most, while cropped, dark, grey and
# real photographs, of which a third or more were flagged, moved it by 0.2 to 0.8.
MOVED = 0.1
MOVED_BY_CHANCE = 0.01
ENOUGH = 100

EITHER = (
    "Far more than expected: either very many records are wrong, or these photographs are unlike"
    " those that the models learned from (camera, crop, light)."
)
RECORDS = (
    " Wrong records are more likely, since the models see each count about as often as in the"
    " validation photographs."
)
PHOTOGRAPHS = (
    " Unlike photographs are more likely, since the models see some counts far more often than in"
    " the validation photographs."
)
ADVICE = " Check ten of the flagged bins by hand before believing any."


def warn(table: pd.DataFrame, false_alarm: float, validation: pd.DataFrame) -> str:
    """A warning if there are far more alarms than expected, else "".

    `table` is that of audit_table; `validation` has the columns actual and predicted.
    """
    judged = table[table["alarm"] != ""]
    if not too_many(int((judged["alarm"] == "yes").sum()), len(judged), false_alarm):
        return ""
    return EITHER + likelier(judged, validation) + ADVICE


def too_many(alarms: int, judged: int, false_alarm: float) -> bool:
    """Whether there are more alarms than even many wrong records, all found, would explain."""
    most = WRONG_RECORDS + (1 - WRONG_RECORDS) * false_alarm
    return bool(binom.sf(alarms - 1, judged, most) < CHANCE)


def likelier(judged: pd.DataFrame, validation: pd.DataFrame) -> str:
    """Which reason the counts seen in the photographs suggest, or "" if neither is likelier.

    Models that work as well as in validation see another mixture of counts only if the bins have
    one. How much of that is plausible follows from the records, most of which may be right.
    """
    moved = distance(judged["seen"], validation["predicted"])
    explained = distance(judged["expected"], validation["actual"])
    if moved < MOVED:
        return RECORDS if len(judged) >= ENOUGH else ""
    chance = difference_by_chance(judged["seen"], validation["predicted"])
    return PHOTOGRAPHS if moved - explained > MOVED and chance < MOVED_BY_CHANCE else ""


def distance(counts: "pd.Series[int]", others: "pd.Series[int]") -> float:
    """Half the sum of the differences between the shares of each count: 0 to 1."""
    shares, other_shares = (some.value_counts(normalize=True) for some in (counts, others))
    return float(shares.sub(other_shares, fill_value=0).abs().sum() / 2)


def difference_by_chance(counts: "pd.Series[int]", others: "pd.Series[int]") -> float:
    """The probability that counts of one mixture differ as much as these (chi-squared test)."""
    frequencies = (
        pd.concat([counts.value_counts(), others.value_counts()], axis=1).fillna(0).astype(float)
    )
    return float(chi2_contingency(frequencies).pvalue)
