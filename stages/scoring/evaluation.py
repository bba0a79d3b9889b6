"""A model's scores of bins with known counts, and the metrics and tables computed from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Counts, Floats, probability_columns, with_temperature
from stages.scoring.bootstrap import intervals
from stages.scoring.metrics import (
    confusion_matrix,
    counting_metrics,
    probability_metrics,
    recall_and_precision,
    reliability_table,
    squared_calibration_error,
)
from stages.scoring.verification import (
    FALSE_ALARMS,
    Claims,
    make_claims,
    precision_table,
    rates_at,
    rates_by_count,
    right_probabilities,
    roc_metrics,
    roc_table,
    threshold_for,
    verification_table,
)

# The columns of overlap.csv.
OVERLAP = ["shared", "half", "test_bins", "accuracy", "low", "high"]


@dataclass(frozen=True)
class Scored:
    """`actual` [bins] and `probabilities` [bins, labels]; `groups` has each bin's sibling group."""

    ids: list[str]
    groups: list[str]
    actual: Counts
    probabilities: Floats
    labels: list[int]

    @cached_property
    def predicted(self) -> Counts:
        predicted: Counts = np.array(self.labels)[self.probabilities.argmax(axis=1)]
        return predicted

    @cached_property
    def targets(self) -> Counts:
        """The position of each bin's count in `labels`."""
        positions: Counts = (self.actual[:, None] == np.array(self.labels)).argmax(axis=1)
        return positions

    @cached_property
    def claims(self) -> Claims:
        return make_claims(self.probabilities, self.actual, self.labels)

    def calibrated(self, temperature: float) -> "Scored":
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

    def table(self) -> pd.DataFrame:
        """A row per bin: id, actual, predicted, and the probability of each label."""
        columns = {"id": self.ids, "actual": self.actual, "predicted": self.predicted}
        probabilities = zip(probability_columns(self.labels), self.probabilities.T, strict=True)
        return pd.DataFrame(columns | dict(probabilities))


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics and tables, all of test except the table "validation"."""

    metrics: dict[str, float]
    tables: dict[str, pd.DataFrame]


def evaluate_scores(
    validation: pd.DataFrame,
    test: Scored,
    temperature: float,
    false_alarm: float,
    shared: Mapping[str, set[str]],
) -> Evaluation:
    """Compute all metrics and tables from a model's scores.

    `validation` has calibrated scores, with the columns of Scored.table; they choose the threshold
    for a share of `false_alarm`. `test` has the network's own scores, which are calibrated by
    `temperature` and only measured. `shared` maps "siblings" and "products" to the ids of the test
    bins that have some in train or validation.
    """
    uncalibrated, test = test, test.calibrated(temperature)
    alarms = alarm_rates(validation, test, false_alarm)
    threshold = float(alarms["threshold"].iloc[0])
    measured = metrics_with_intervals(test, threshold)
    confusion = test.confusion()
    pairs = zip(measured["metric"], measured["value"], strict=True)
    # A table of experiments has room for few columns; intervals.csv has the others.
    metrics = {name: value for name, value in pairs if not name.startswith("found_at_")}
    tables = {
        "alarms": alarms,
        "alarms_by_count": rates_by_count(test.probabilities, test.actual, test.labels, threshold),
        "calibration": calibration_table(uncalibrated, test, temperature),
        "confusion": confusion_table(confusion, test.labels),
        "intervals": measured,
        "overlap": overlap_table(test, shared),
        "per_quantity": per_quantity_table(confusion, test.labels),
        "precision": precision_table(alarms, len(test.ids)),
        "predictions": test.table(),
        "reliability": test.reliability(),
        "reliability_uncalibrated": uncalibrated.reliability(),
        "roc": roc_table(test.claims),
        "validation": validation,
    }
    return Evaluation(metrics | validation_metrics(validation, test.labels), tables)


def validation_metrics(validation: pd.DataFrame, labels: list[int]) -> dict[str, float]:
    """The metrics that models and params are compared by, so that test chooses nothing."""
    actual, predicted = validation["actual"].to_numpy(), validation["predicted"].to_numpy()
    probabilities = validation[probability_columns(labels)].to_numpy()
    metrics = (
        counting_metrics(actual, predicted, labels)
        | probability_metrics(actual, probabilities, labels)
        | roc_metrics(make_claims(probabilities, actual, labels), np.ones(len(validation)))
    )
    return {f"validation_{name}": metrics[name] for name in ("accuracy", "rmse", "nll", "auroc")}


def metrics_with_intervals(test: Scored, threshold: float) -> pd.DataFrame:
    """Each metric's value with its 95% interval.

    `found` and `false_alarms` are measured at the threshold. Their intervals take it as given,
    although other validation bins would have given another one. The calibration error is resampled
    as its square, which is unbiased.
    """

    def statistics(weights: Floats) -> dict[str, float]:
        rates = rates_at(test.claims, threshold, weights)
        verified = {"found": rates.found, "false_alarms": rates.false_alarms}
        squared = {"calibration_error": test.squared_calibration_error(weights)}
        return test.metrics(weights) | squared | roc_metrics(test.claims, weights) | verified

    table = intervals(statistics, test.groups, centred=["calibration_error"]).set_index("metric")
    table.loc["calibration_error"] = table.loc["calibration_error"].clip(lower=0) ** 0.5
    return table.reset_index()


def overlap_table(test: Scored, shared: Mapping[str, set[str]]) -> pd.DataFrame:
    """The rows of accuracy_by_overlap for each kind of overlap in `shared`."""
    tables = [
        accuracy_by_overlap(test, ids).assign(shared=kind)[OVERLAP] for kind, ids in shared.items()
    ]
    return pd.concat(tables, ignore_index=True)


def accuracy_by_overlap(test: Scored, ids: set[str]) -> pd.DataFrame:
    """The accuracy with its interval on the test bins with these ids, and on the other test bins.

    The difference between the two is what the overlap is worth. The halves hold other counts, which
    are easier or harder in themselves, so each is weighted to the quantities of all test bins. A
    half without bins has no row.
    """
    seen = np.isin(test.ids, [*ids])
    halves = {"with": seen, "without": ~seen}
    halves = {name: half for name, half in halves.items() if half.any()}

    def accuracies(weights: Floats) -> dict[str, float]:
        found = standardized_accuracies(test, list(halves.values()), weights)
        of_halves = dict(zip(halves, found, strict=True))
        if len(halves) < 2:
            return of_halves
        return of_halves | {"difference": of_halves["with"] - of_halves["without"]}

    table = intervals(accuracies, test.groups)
    bins = {name: int(half.sum()) for name, half in halves.items()} | {"difference": len(seen)}
    table = table.rename(columns={"metric": "half", "value": "accuracy"})
    return table.assign(test_bins=table["half"].map(bins))


def standardized_accuracies(
    test: Scored, halves: list[NDArray[np.bool_]], weights: Floats
) -> list[float]:
    """The accuracy on each half, weighted to the quantities of all bins.

    Only quantities that occur in every half count; if there are none, the accuracy is 0.
    """
    right, size = test.predicted == test.actual, len(test.labels)
    bins = [np.bincount(test.targets, weights * half, minlength=size) for half in halves]
    hits = [np.bincount(test.targets, weights * half * right, minlength=size) for half in halves]
    shares = np.bincount(test.targets, weights, minlength=size) * np.all(bins, axis=0)
    shares /= max(shares.sum(), 1e-12)
    return [
        float((shares * hit / np.maximum(count, 1e-12)).sum())
        for hit, count in zip(hits, bins, strict=True)
    ]


def alarm_rates(validation: pd.DataFrame, test: Scored, false_alarm: float) -> pd.DataFrame:
    """Rates on test: at validation's threshold, and at test's own for each of FALSE_ALARMS."""
    chosen = {"chosen": threshold_for(right_probabilities(validation), false_alarm)}
    right = test.claims.scores[test.claims.right]
    of_test = {f"{share:.0%}": threshold_for(right, share) for share in FALSE_ALARMS}
    return verification_table(test.claims, chosen | of_test)


def calibration_table(before: Scored, after: Scored, temperature: float) -> pd.DataFrame:
    """The negative log-likelihood and the calibration error before and after scaling."""
    metrics = pd.DataFrame([before.metrics(), after.metrics()])[["nll", "calibration_error"]]
    metrics.insert(0, "calibrated", ["before", "after"])
    metrics.insert(1, "temperature", [1.0, temperature])
    return metrics


def confusion_table(confusion: Floats, labels: list[int]) -> pd.DataFrame:
    """A row for each pair of counts, including pairs that do not occur."""
    pairs = pd.MultiIndex.from_product([labels, labels], names=["actual", "predicted"])
    return pd.DataFrame({"test_bins": confusion.ravel().astype(int)}, index=pairs).reset_index()


def per_quantity_table(confusion: Floats, labels: list[int]) -> pd.DataFrame:
    recall, precision = recall_and_precision(confusion)
    bins = confusion.sum(axis=1).astype(int)
    columns = {"quantity": labels, "recall": recall, "precision": precision, "test_bins": bins}
    return pd.DataFrame(columns)
