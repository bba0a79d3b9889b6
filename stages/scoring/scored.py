"""Bins with known counts, and a model's probabilities of each count."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from stages.networks.calibration import (
    Counts,
    Floats,
    positions_of,
    probability_columns,
    with_temperature,
)
from stages.runtime.counts import parse_label
from stages.scoring.metrics import (
    confusion_matrix,
    counting_metrics,
    probability_metrics,
    reliability_table,
    squared_calibration_error,
)


@dataclass(frozen=True)
class Scored:
    """`actual` [bins] and `probabilities` [bins, labels]; `groups` has each bin's sibling group."""

    ids: list[str]
    groups: list[str]
    actual: Counts
    probabilities: Floats
    labels: list[int]

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> "Scored":
        """The bins of a table with the columns of Scored.table."""
        columns = table.columns[table.columns.str.fullmatch(r"p\d+\+?")]
        return cls(
            ids=table["id"].tolist(),
            groups=table["group"].tolist(),
            actual=table["actual"].to_numpy(),
            probabilities=table[columns].to_numpy(),
            labels=[parse_label(column.removeprefix("p")) for column in columns],
        )

    def table(self) -> pd.DataFrame:
        """A row per bin: id, group, actual, predicted, and p<label> for each label."""
        columns = {
            "id": self.ids,
            "group": self.groups,
            "actual": self.actual,
            "predicted": self.predicted,
        }
        probabilities = zip(probability_columns(self.labels), self.probabilities.T, strict=True)
        return pd.DataFrame(columns | dict(probabilities))

    @cached_property
    def predicted(self) -> Counts:
        predicted: Counts = np.array(self.labels)[self.probabilities.argmax(axis=1)]
        return predicted

    @cached_property
    def targets(self) -> Counts:
        """The position of each bin's count in `labels`."""
        return positions_of(self.actual, self.labels)

    @property
    def right_scores(self) -> Floats:
        """The probability of each bin's own count."""
        scores: Floats = self.probabilities[np.arange(len(self.actual)), self.targets]
        return scores

    def with_temperature(self, temperature: float) -> "Scored":
        return replace(self, probabilities=with_temperature(self.probabilities, temperature))

    def metrics(self, weights: Floats | None = None) -> dict[str, float]:
        counted = counting_metrics(self.actual, self.predicted, self.labels, weights)
        return counted | probability_metrics(self.actual, self.probabilities, self.labels, weights)

    def squared_calibration_error(self, weights: Floats) -> float:
        right, confidence = self.predicted == self.actual, self.probabilities.max(axis=1)
        return squared_calibration_error(right, confidence, weights)

    def reliability(self) -> pd.DataFrame:
        return reliability_table(self.predicted == self.actual, self.probabilities.max(axis=1))

    def confusion(self) -> Floats:
        return confusion_matrix(self.actual, self.predicted, self.labels)
