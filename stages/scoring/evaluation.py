"""A model's scores of bins whose counts are known, and everything that is computed from them."""

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
)
from stages.scoring.verification import (
    FALSE_ALARMS,
    Claims,
    make_claims,
    precision_table,
    rates_at,
    right_probabilities,
    roc_metrics,
    roc_table,
    threshold_for,
    verification_table,
)


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
        """The place of each bin's count in `labels`."""
        places: Counts = (self.actual[:, None] == np.array(self.labels)).argmax(axis=1)
        return places

    @cached_property
    def claims(self) -> Claims:
        return make_claims(self.probabilities, self.actual, self.labels)

    def calibrated(self, temperature: float) -> "Scored":
        return replace(self, probabilities=with_temperature(self.probabilities, temperature))

    def metrics(self, weights: Floats | None = None) -> dict[str, float]:
        counted = counting_metrics(self.actual, self.predicted, self.labels, weights)
        return counted | probability_metrics(self.actual, self.probabilities, self.labels, weights)

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
    """What is known of a model: `tables` are of test, but for "validation"."""

    metrics: dict[str, float]
    tables: dict[str, pd.DataFrame]


def evaluate_scores(
    validation: pd.DataFrame,
    test: Scored,
    temperature: float,
    false_alarm: float,
    seen_groups: set[str],
) -> Evaluation:
    """Everything that a model's scores tell.

    `validation` has its calibrated scores, a row per bin as Scored.table has it; they choose the
    threshold with a share of `false_alarm`. `test` has scores as they come out of the network,
    which `temperature` calibrates; they are only measured. `seen_groups` are the sibling groups
    with bins in other sets than test.
    """
    uncalibrated, test = test, test.calibrated(temperature)
    alarms = alarm_rates(validation, test, false_alarm)
    measured = metrics_with_intervals(test, threshold=alarms["threshold"].iloc[0])
    confusion = test.confusion()
    pairs = zip(measured["metric"], measured["value"], strict=True)
    # Those at round false alarms are in intervals.csv: a table of experiments has room for few.
    metrics = {name: value for name, value in pairs if not name.startswith("found_at_")}
    tables = {
        "alarms": alarms,
        "calibration": calibration_table(uncalibrated, test, temperature),
        "confusion": confusion_table(confusion, test.labels),
        "intervals": measured,
        "per_quantity": per_quantity_table(confusion, test.labels),
        "precision": precision_table(alarms, len(test.ids)),
        "predictions": test.table(),
        "reliability": test.reliability(),
        "reliability_uncalibrated": uncalibrated.reliability(),
        "roc": roc_table(test.claims),
        "siblings": accuracy_by_siblings(test, seen_groups),
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
    """Each metric's value with its 95% interval; found and false_alarms are at the threshold."""

    def statistics(weights: Floats) -> dict[str, float]:
        rates = rates_at(test.claims, threshold, weights)
        verified = {"found": rates.found, "false_alarms": rates.false_alarms}
        return test.metrics(weights) | roc_metrics(test.claims, weights) | verified

    return intervals(statistics, test.groups, biased=["ece"])


def accuracy_by_siblings(test: Scored, seen_groups: set[str]) -> pd.DataFrame:
    """Accuracy with its interval on the test bins with a sibling in `seen_groups`, and without.

    The difference of the two is what the leak is worth. Bins without siblings hold other counts,
    which are easier or harder in themselves, so each half is weighted to the quantities of all
    test bins. A half without bins has no row.
    """
    seen = np.array([group in seen_groups for group in test.groups])
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
    table = table.rename(columns={"metric": "siblings_in_train", "value": "accuracy"})
    table.insert(1, "test_bins", table["siblings_in_train"].map(bins))
    return table


def standardized_accuracies(
    test: Scored, halves: list[NDArray[np.bool_]], weights: Floats
) -> list[float]:
    """The accuracy on each of `halves`, if it held the quantities that all bins hold.

    Only quantities that occur in every half count; without any, the accuracy is 0.
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
    """Rates on test: at the threshold that validation chose, and at those of round false alarms."""
    chosen = {"chosen": threshold_for(right_probabilities(validation), false_alarm)}
    right = test.claims.scores[test.claims.right]
    of_test = {f"{share:.0%}": threshold_for(right, share) for share in FALSE_ALARMS}
    return verification_table(test.claims, chosen | of_test)


def calibration_table(before: Scored, after: Scored, temperature: float) -> pd.DataFrame:
    """Negative log-likelihood and ECE before and after temperature scaling."""
    rows = [
        {"calibrated": name, "temperature": value, "nll": metrics["nll"], "ece": metrics["ece"]}
        for name, value, metrics in (
            ("before", 1.0, before.metrics()),
            ("after", temperature, after.metrics()),
        )
    ]
    return pd.DataFrame(rows)


def confusion_table(confusion: Floats, labels: list[int]) -> pd.DataFrame:
    """A row for each pair of counts, including pairs that did not occur."""
    pairs = pd.MultiIndex.from_product([labels, labels], names=["actual", "predicted"])
    return pd.DataFrame({"test_bins": confusion.ravel().astype(int)}, index=pairs).reset_index()


def per_quantity_table(confusion: Floats, labels: list[int]) -> pd.DataFrame:
    recall, precision = recall_and_precision(confusion)
    bins = confusion.sum(axis=1).astype(int)
    columns = {"quantity": labels, "recall": recall, "precision": precision, "test_bins": bins}
    return pd.DataFrame(columns)
