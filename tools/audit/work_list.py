"""Which bins somebody should check, in which order, and how they were drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from stages.runtime.params import Threshold
from stages.sampling.order import shuffled
from stages.scoring.evaluation import thresholds_of
from tools.audit.decisions import Decision
from tools.audit.expected import Expected
from tools.audit.models import Ensemble
from tools.audit.table import audit_table

#: The false-alarm shares that an audit is compared with: its own and the smaller ones of these.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class WorkList:
    """The bins to check, in this order: those of `flagged`, and `drawn` at random from others.

    Without a sample, the most suspicious come first. With one, the order is random and says
    nothing about the alarm, so that whatever has been checked is a random sample of both parts:
    all of `flagged`, and the `others` judged bins that would not be on the list without it.
    `flagged` has the smallest false-alarm share at which each bin is flagged, and `settled` the
    decisions of earlier audits that still hold.
    """

    ids: list[str]
    flagged: Mapping[str, float]
    others: int
    sampled: bool
    settled: Mapping[str, Decision]


def make_list(
    table: pd.DataFrame,
    alarms: Mapping[str, float],
    settled: Mapping[str, Decision],
    top: int,
    sample: int,
    seed: int,
) -> WorkList:
    """List the `top` most suspicious alarms of audit_table, and `sample` of the other judged bins.

    `alarms` is what flagged_at returns.
    """
    judged = table.loc[(table["alarm"] != "") & ~table["id"].isin(settled.keys()), "id"]
    flagged = [bin_id for bin_id in judged if bin_id in alarms][:top]
    others = judged[~judged.isin(flagged)]
    drawn = shuffled(others, "audit sample", seed)[:sample]
    ids = shuffled([*flagged, *drawn], "audit order", seed) if sample else flagged
    return WorkList(ids, {one: alarms[one] for one in flagged}, len(others), bool(sample), settled)


def flagged_at(
    scored: pd.DataFrame,
    counts: Expected,
    ensemble: Ensemble,
    false_alarm: float,
    threshold: Threshold,
    alarms: Sequence[str],
) -> dict[str, float]:
    """The smallest of SHARES at which each of these alarms is one, at most `false_alarm`."""
    own = scored[scored["id"].isin(alarms)]
    expected = replace(counts, counts={one: counts.counts[one] for one in alarms}, problems={})
    found = dict.fromkeys(alarms, false_alarm)
    for share in sorted((share for share in SHARES if share < false_alarm), reverse=True):
        thresholds = thresholds_of(ensemble.validation, share, threshold)
        table = audit_table(own, expected, ensemble.labels, thresholds, ensemble.judge)
        found |= dict.fromkeys(table.loc[table["alarm"] == "yes", "id"], share)
    return found
