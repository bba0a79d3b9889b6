"""How well each witness tells wrong records from right ones: the count, the items, and both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Counts, Floats
from stages.runtime.params import Evaluate
from stages.scoring.bootstrap import intervals
from stages.scoring.exchanges import Exchanges, picks, swaps
from stages.scoring.scored import Scored
from stages.scoring.verification import choose_thresholds, curve_of, metrics_of
from stages.scoring.witness import Witness

#: A record alone cannot tell, and its row shows that it does not.
RECORD, COUNT, ITEMS, BOTH = WITNESSES = ("record", "count", "items", "both")
#: Each kind of wrong records.
PICKS, SWAPS = "picks", "swaps"
COLUMNS = ["errors", "witness", "metric", "value", "low", "high"]


@dataclass(frozen=True)
class Witnessed:
    """Bins whose photographs two witnesses have seen, in the order of `scored`.

    `expected` [bins, numbers] are the deviations that the photographs let one expect, and
    `deviations` [bins, numbers] those of the records.
    """

    witness: Witness
    scored: Scored
    expected: Floats
    deviations: Floats

    def evidence(self, bins: Counts, records: Counts) -> Floats:
        """The evidence for claims: for each, the positions of its bin and of its record."""
        return self.witness.evidence(self.expected[bins], self.deviations[records])

    def scores(self, bins: Counts, records: Counts) -> dict[str, Floats]:
        """The scores of claims by WITNESSES, the lower the more suspicious."""
        evidence = self.evidence(bins, records)
        counted = self.scored.probabilities[bins, self.scored.targets[records]]
        return {
            RECORD: self.witness.usualness(self.deviations)[records],
            COUNT: counted,
            ITEMS: evidence,
            # The count is right, and so are the items: the witnesses look at different things.
            BOTH: counted * self.witness.belief(evidence),
        }

    @property
    def own_scores(self) -> dict[str, Floats]:
        """The scores of the bins' own records."""
        every = np.arange(len(self.scored.ids))
        return self.scores(every, every)

    @property
    def exchanges(self) -> dict[str, Exchanges]:
        """The wrong records of each kind that there are among these bins."""
        some = self.scored
        found = {
            PICKS: picks(some.ids, some.groups, some.actual),
            SWAPS: swaps(some.ids, some.actual),
        }
        return {kind: pairs for kind, pairs in found.items() if len(pairs.bins)}


@dataclass(frozen=True)
class Hearing:
    """What one witness says about claims of one kind, lowest score first, an entry for each."""

    bins: Counts
    right: NDArray[np.bool_]
    scores: Floats
    alarms: NDArray[np.bool_]

    def statistics(self, weights: Floats) -> dict[str, float]:
        """The metrics of the claims, with a weight for each bin; NaN if no bin with weight has any.

        `found` and `false_alarms` are at the chosen threshold, all others at the claims' own.
        """
        of_claim = weights[self.bins]

        def share(chosen: NDArray[np.bool_]) -> float:
            total = of_claim[chosen].sum()
            return float(of_claim[chosen & self.alarms].sum() / total) if total else float("nan")

        return metrics_of(*curve_of(self.scores, self.right, of_claim)) | {
            "found": share(~self.right),
            "false_alarms": share(self.right),
        }


def hear(test: Witnessed, pairs: Exchanges, thresholds: Mapping[str, Floats]) -> dict[str, Hearing]:
    """Each of WITNESSES on the right and the wrong claims of these pairs.

    `thresholds` [labels] has those of each witness.
    """
    bins = np.concatenate([pairs.bins, pairs.bins])
    records = np.concatenate([pairs.bins, pairs.others])
    right = np.arange(len(bins)) < len(pairs.bins)
    hearings = {}
    for witness, scores in test.scores(bins, records).items():
        alarms = scores < thresholds[witness][test.scored.targets[records]]
        order = np.argsort(scores, kind="stable")
        hearings[witness] = Hearing(bins[order], right[order], scores[order], alarms[order])
    return hearings


def thresholds_by_witness(validation: Witnessed, params: Evaluate) -> dict[str, Floats]:
    """The thresholds that take the chosen share of validation's own records for wrong: [labels]."""
    columns, labels = validation.scored.targets, len(validation.scored.labels)
    return {
        witness: choose_thresholds(scores, columns, labels, params.false_alarm, params.threshold)
        for witness, scores in validation.own_scores.items()
    }


def verification_table(validation: Witnessed, test: Witnessed, params: Evaluate) -> pd.DataFrame:
    """Each metric of each witness for each kind of wrong records, with its 95% interval.

    The columns are errors, witness, metric, value, low and high. `gain` is the AUROC minus that of
    the count alone. A kind of which test has no records has no rows.
    """
    thresholds = thresholds_by_witness(validation, params)
    tables = []
    for kind, pairs in test.exchanges.items():
        statistics = all_statistics(hear(test, pairs, thresholds))
        table = intervals(statistics, test.scored.groups)
        names = table["metric"].str.split(" ", n=1, expand=True)
        table = table.assign(errors=kind, witness=names[0], metric=names[1])
        tables.append(table[COLUMNS])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def all_statistics(hearings: Mapping[str, Hearing]) -> Callable[[Floats], dict[str, float]]:
    """A function that computes the statistics of all witnesses, named like "items auroc"."""

    def statistics(weights: Floats) -> dict[str, float]:
        found = {witness: hearing.statistics(weights) for witness, hearing in hearings.items()}
        for values in found.values():
            values["gain"] = values["auroc"] - found[COUNT]["auroc"]
        return {
            f"{witness} {name}": value
            for witness, values in found.items()
            for name, value in values.items()
        }

    return statistics
