"""Whether the alarms of an audit can be believed: not if nearly every bin is flagged."""

from collections.abc import Collection, Sequence

import pandas as pd
from scipy.stats import binom, ks_2samp

from stages.networks.calibration import Floats, probability_columns

# More than one wrong record in ten would be unusual.
WRONG_RECORDS = 0.1
# Chance alone causes a warning in at most one audit in a thousand.
CHANCE = 1 / 1000
# Wrong records leave the confidences as they are; other light, crops or cameras moved their
# distribution by 0.28 to 0.82, as Kolmogorov and Smirnov measure it, wherever alarms multiplied.
# Another mixture of counts alone moves it less, but is significant if there are enough photographs.
APART = 0.25
ENOUGH = 100

EITHER = (
    "Far more than expected: either very many records are wrong, or these photographs are unlike"
    " those that the models learned from (camera, crop, light)."
)
RECORDS = (
    " Wrong records are more likely, since the models are as confident as on validation"
    " photographs."
)
PHOTOGRAPHS = (
    " Unlike photographs are more likely, since the models' confidence differs from that on"
    " validation photographs."
)
ADVICE = " Check ten of the flagged bins by hand before believing any."


def warn(
    table: pd.DataFrame,
    labels: Sequence[int],
    false_alarm: float,
    validation: Floats,
    trained_on: Collection[str],
) -> str:
    """What to make of the alarms if they are far too many, or "".

    `table` is that of audit_table. `validation` has the probabilities of the validation bins,
    [bins, labels]. Bins of the ids `trained_on` are not compared: models are surer of them.
    """
    alarms, judged = ((table["alarm"] == "yes").sum(), (table["alarm"] != "").sum())
    if not too_many(int(alarms), int(judged), false_alarm):
        return ""
    columns = probability_columns(list(labels))
    confidences = table.loc[~table["id"].isin(trained_on), columns].max(axis=1).dropna().to_numpy()
    return EITHER + likelier(confidences, validation.max(axis=1)) + ADVICE


def too_many(alarms: int, judged: int, false_alarm: float) -> bool:
    """Whether there are more alarms than many wrong records, all of them found, would explain."""
    most = WRONG_RECORDS + (1 - WRONG_RECORDS) * false_alarm
    return bool(binom.sf(alarms - 1, judged, most) < CHANCE)


def likelier(confidences: Floats, usual: Floats) -> str:
    """Which reason the confidences suggest, compared with those of validation; "" if too few."""
    if not len(confidences):
        return ""
    difference = ks_2samp(confidences, usual, method="asymp")
    if difference.statistic > APART and difference.pvalue < CHANCE:
        return PHOTOGRAPHS
    return RECORDS if len(confidences) >= ENOUGH else ""
