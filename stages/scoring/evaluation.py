"""The metrics and tables of a model, computed from its scores of bins with known counts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Floats
from stages.runtime.counts import open_label
from stages.runtime.errors import UserError
from stages.runtime.params import Errors, Evaluate, Threshold
from stages.scoring.bootstrap import intervals
from stages.scoring.claims import Claims, make_claims, pick_errors, uniform_errors
from stages.scoring.metrics import recall_and_precision
from stages.scoring.scored import Scored
from stages.scoring.verification import (
    FALSE_ALARMS,
    PREVALENCES,
    choose_thresholds,
    precision_at,
    rates_at,
    rates_by_count,
    roc_metrics,
    roc_table,
)

# The columns of overlap.csv.
OVERLAP = ["shared", "half", "test_bins", "accuracy", "low", "high"]


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics and tables, all of test except the table "validation"."""

    metrics: dict[str, float]
    tables: dict[str, pd.DataFrame]

    @property
    def summary(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())


def evaluate_scores(
    validation: Scored,
    test: Scored,
    temperature: float,
    params: Evaluate,
    differences: pd.DataFrame,
    shared: Mapping[str, set[str]],
    majority: int,
) -> Evaluation:
    """Compute all metrics and tables from a model's calibrated scores.

    Validation chooses the thresholds of alarms; test is only measured. `temperature` is the one
    that calibrated the scores, and `differences` the table of sibling_differences of train.
    `shared` maps "siblings" and "products" to the ids of the test bins that have some in train or
    validation, and `majority` is the most frequent count of train. Raises UserError if a set has no
    bin with a known count.
    """
    refuse_unknown_counts("validation", validation)
    refuse_unknown_counts("test", test)
    claims = claims_about(test, params.errors, differences)
    thresholds = thresholds_of(validation, params.false_alarm, params.threshold)
    measured = metrics_with_intervals(test, claims, thresholds)
    uncalibrated = test.with_temperature(1 / temperature)
    confusion = test.confusion()
    tables = {
        "alarms": alarm_rates(test, claims, thresholds, params.threshold),
        "alarms_by_count": rates_by_count(claims, test.labels, thresholds),
        "calibration": calibration_table(uncalibrated, test, temperature),
        "confusion": confusion_table(confusion, test.labels),
        "intervals": measured,
        "overlap": overlap_table(test, shared),
        "per_quantity": per_quantity_table(confusion, test.labels),
        "precision": precision_table(measured),
        "predictions": test.table(),
        "reliability": test.reliability(),
        "reliability_uncalibrated": uncalibrated.reliability(),
        "roc": roc_table(claims),
        "sibling_differences": differences,
        "validation": validation.table(),
    }
    pairs = zip(measured["metric"], measured["value"], strict=True)
    # A table of experiments has room for few columns; intervals.csv has the others. Without counts
    # that differ by one item, auroc_off_by_one is missing, for which JSON has no number.
    metrics = {name: value for name, value in pairs if "_at_" not in name and not math.isnan(value)}
    metrics |= validation_metrics(validation, claims_about(validation, params.errors, differences))
    metrics |= {
        "majority_accuracy": float((test.actual == majority).mean()),
        "test_bins": len(test.ids),
    }
    return Evaluation(metrics, tables)


def refuse_unknown_counts(name: str, scored: Scored) -> None:
    """Raise UserError if all bins are of an open class, so that no error in items is known."""
    highest = open_label(scored.labels)
    if (scored.actual == highest).all():
        raise UserError(
            f"all bins of {name} have {highest} items, so errors in items cannot be measured: make"
            f" {name} larger, or put bins with other counts into it"
        )


def claims_about(scored: Scored, errors: Errors, differences: pd.DataFrame) -> Claims:
    """The right claims about the bins, and wrong ones of this kind."""
    actual, labels = scored.actual, scored.labels
    if errors == "picks":
        wrong = pick_errors(scored.ids, scored.groups, actual, labels, differences)
    else:
        wrong = uniform_errors(actual, labels)
    return make_claims(scored.probabilities, actual, labels, wrong)


def thresholds_of(scored: Scored, false_alarm: float, kind: Threshold) -> Floats:
    """The thresholds, by label, that take a share `false_alarm` of these records for wrong."""
    labels = len(scored.labels)
    return choose_thresholds(scored.right_scores, scored.targets, labels, false_alarm, kind)


def validation_metrics(validation: Scored, claims: Claims) -> dict[str, float]:
    """The metrics that models and params are compared by, so that test chooses nothing."""
    metrics = validation.metrics() | roc_metrics(claims, np.ones(len(validation.ids)))
    return {f"validation_{name}": metrics[name] for name in ("accuracy", "rmse", "nll", "auroc")}


def metrics_with_intervals(test: Scored, claims: Claims, thresholds: Floats) -> pd.DataFrame:
    """Each metric's value with its 95% interval.

    `found`, `false_alarms` and precision are measured at the thresholds. Their intervals take these
    as given, although other validation bins would have given others. The calibration error is
    resampled as its square, which is unbiased.
    """
    near = claims.off_by_at_most(1)

    def statistics(weights: Floats) -> dict[str, float]:
        rates = rates_at(claims, thresholds, weights)
        precision = precision_at(rates, len(test.ids))
        return (
            test.metrics(weights)
            | {"calibration_error": test.squared_calibration_error(weights)}
            | roc_metrics(claims, weights)
            | {"auroc_off_by_one": roc_metrics(near, weights)["auroc"]}
            | {"found": rates.found, "false_alarms": rates.false_alarms}
            | {f"precision_at_{share:g}": value for share, value in precision.items()}
        )

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


def alarm_rates(test: Scored, claims: Claims, thresholds: Floats, kind: Threshold) -> pd.DataFrame:
    """Rates on test: at validation's thresholds, and at test's own for each of FALSE_ALARMS."""
    chosen = {"chosen": thresholds}
    of_test = {f"{share:.0%}": thresholds_of(test, share, kind) for share in FALSE_ALARMS}
    weights = np.ones(len(test.ids))
    return pd.DataFrame(
        {"alarms": name} | rates_at(claims, one, weights)._asdict()
        for name, one in (chosen | of_test).items()
    )


def precision_table(measured: pd.DataFrame) -> pd.DataFrame:
    """The precision of the chosen alarms by the share of wrong records, with its interval.

    `bins_per_find` is the number of alarms a person looks at for each wrong record found, `inf` if
    none is found. `measured` is the table of metrics_with_intervals.
    """
    rows = measured.set_index("metric").loc[[f"precision_at_{share:g}" for share in PREVALENCES]]
    table = rows.rename(columns={"value": "precision"}).reset_index(drop=True)
    table.insert(0, "wrong_records", PREVALENCES)
    return table.assign(bins_per_find=1 / table["precision"])


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
