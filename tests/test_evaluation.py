"""The tables of scored bins, compared with other libraries and with results worked by hand."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from scipy.special import log_softmax, softmax

from stages.runtime.counts import AndMore
from stages.runtime.errors import UserError
from stages.runtime.params import Evaluate, Threshold
from stages.scoring import evaluation
from stages.scoring.bootstrap import group_weights, intervals
from stages.scoring.claims import Claims
from stages.scoring.comparison import compare_models
from stages.scoring.ensemble import average
from stages.scoring.evaluation import (
    Evaluation,
    accuracy_by_overlap,
    alarm_rates,
    claims_about,
    evaluate_scores,
    metrics_with_intervals,
    overlap_table,
    precision_table,
)
from stages.scoring.scored import Scored
from stages.scoring.verification import rates_at, roc_metrics
from tests.conftest import REPOSITORY

LABELS = [1, 2, 3]
METRICS = ["accuracy", "rmse", "mae", "within_one", "macro_f1", "kappa"]
METRICS += [
    "rmse_of_mean",
    "mae_of_median",
    "rps",
    "nll",
    "calibration_error",
    "auroc",
    "found_at_1",
    "found_at_5",
    "found_at_10",
]
METRICS += ["auroc_off_by_one", "found", "false_alarms"]
PRECISION = ["precision_at_0.001", "precision_at_0.01", "precision_at_0.05"]
PROBABILISTIC = {"rmse_of_mean", "mae_of_median", "rps", "nll", "calibration_error"}
SAMPLES = 100
PARAMS = Evaluate(batch_size=1, false_alarm=0.25, errors="picks", threshold="global")
DIFFERENCES = pd.DataFrame({"items_off": [1, 2], "pairs": [3, 1], "share": [0.75, 0.25]})


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the bootstrap takes a millisecond or two."""
    monkeypatch.setattr(evaluation, "intervals", partial(intervals, samples=SAMPLES))


def by_hand() -> Scored:
    """Four bins; the last one is counted as 2."""
    return Scored(
        ids=["00001", "00002", "00003", "3"],
        groups=["00001", "00001", "00003", "3"],
        actual=np.array([1, 2, 3, 3]),
        probabilities=np.array(
            [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9], [0.25, 0.5, 0.25]]
        ),
        labels=LABELS,
    )


def random_scores(seed: int, bins: int = 60) -> Scored:
    """Bins in groups of two."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(LABELS, bins)
    scores = chance.gamma(0.7, size=(bins, 3)) + 0.6 * (actual[:, None] == LABELS)
    return Scored(
        ids=[f"{position:05d}" for position in range(bins)],
        groups=[f"{position // 2 * 2:05d}" for position in range(bins)],
        actual=actual,
        probabilities=scores / scores.sum(axis=1, keepdims=True),
        labels=LABELS,
    )


def evaluated(
    test: Scored, validation: Scored | None = None, temperature: float = 1.0
) -> Evaluation:
    return evaluate_scores(
        validation or by_hand(), test, temperature, PARAMS, DIFFERENCES, {"siblings": set()}, 2
    )


def picked(scored: Scored) -> Claims:
    return claims_about(scored, "picks", DIFFERENCES)


def test_a_table_has_a_row_per_bin_and_its_labels_need_not_be_in_order() -> None:
    probabilities = np.array([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    scored = Scored(["00001", "1"], ["a", "b"], np.array([2, 3]), probabilities, [3, 5, 2])

    table = scored.table()

    assert table.columns.tolist() == ["id", "group", "actual", "predicted", "p3", "p5", "p2"]
    assert table.iloc[0].tolist() == ["00001", "a", 2, 2, 0.1, 0.2, 0.7]
    assert table.iloc[1].tolist() == ["1", "b", 3, 5, 0.3, 0.6, 0.1]
    again = Scored.from_table(table)
    pd.testing.assert_frame_equal(again.table(), table)
    assert again.right_scores.tolist() == [0.7, 0.3]


def test_calibrating_changes_confidence_and_nothing_else() -> None:
    scored = random_scores(0)

    calibrated = scored.with_temperature(2.0)

    assert calibrated.predicted.tolist() == scored.predicted.tolist()
    assert (calibrated.ids, calibrated.groups) == (scored.ids, scored.groups)
    expected = np.exp(log_softmax(np.log(scored.probabilities) / 2, axis=1))
    np.testing.assert_allclose(calibrated.probabilities, expected)
    for name, value in scored.metrics().items():
        same = calibrated.metrics()[name] == pytest.approx(value)
        assert same == (name not in PROBABILISTIC), name


def test_metrics_have_intervals_of_sibling_groups() -> None:
    scored = random_scores(3)

    claims = picked(scored)
    table = metrics_with_intervals(scored, claims, np.full(3, 0.2))

    assert table.columns.tolist() == ["metric", "value", "low", "high"]
    assert table["metric"].tolist() == [*METRICS, *PRECISION]
    rows = table.set_index("metric")
    rates = rates_at(claims, np.full(3, 0.2), np.ones(60))
    values = scored.metrics() | roc_metrics(claims, np.ones(60))
    near = roc_metrics(claims.off_by_at_most(1), np.ones(60))
    values |= {"auroc_off_by_one": near["auroc"]}
    values |= {"found": rates.found, "false_alarms": rates.false_alarms}
    assert rows["value"][list(values)].to_dict() == pytest.approx(values)
    right = scored.predicted == scored.actual
    resampled = group_weights(scored.groups, SAMPLES)
    samples = [np.average(right, weights=weights) for weights in resampled]
    found = (rows["low"]["accuracy"], rows["high"]["accuracy"])
    assert found == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    for name in ("accuracy", "rmse", "rps", "nll", "auroc", "found", "false_alarms", *PRECISION):
        assert rows["low"][name] < rows["value"][name] < rows["high"][name], name


def confident(seed: int, sharper: float, bins: int = 662) -> Scored:
    """Bins whose logits are too large by this factor; 1 is a perfectly calibrated model."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 1.2, (bins, len(LABELS)))
    true, told = softmax(logits, axis=1), softmax(sharper * logits, axis=1)
    positions = (true.cumsum(axis=1) < chance.random((bins, 1))).sum(axis=1)
    actual = np.array(LABELS)[positions.clip(max=len(LABELS) - 1)]
    ids = [f"{position:05d}" for position in range(bins)]
    return Scored(ids, ids, actual, told, LABELS)


def calibration_intervals(sharper: float) -> pd.DataFrame:
    """The rows of the calibration error for 24 samples of bins."""
    several = [confident(seed, sharper) for seed in range(24)]
    tables = [metrics_with_intervals(one, picked(one), np.full(3, 0.2)) for one in several]
    return pd.concat([table[table["metric"] == "calibration_error"] for table in tables])


def test_a_calibrated_model_is_not_called_miscalibrated() -> None:
    found = calibration_intervals(1.0)

    # 95% of the intervals should include the true error, 0.
    assert (found["low"] == 0).sum() >= 23
    # Chance moves the estimates both ways, so their mean is about 0.
    squares = [confident(s, 1.0).squared_calibration_error(np.ones(662)) for s in range(24)]
    assert abs(np.mean(squares)) < 2.5 * np.std(squares) / 24**0.5
    assert min(squares) < 0 < max(squares)


@pytest.mark.parametrize(("sharper", "detected"), [(1.5, 12), (2.5, 24)])
def test_the_interval_of_the_calibration_error_includes_the_true_one(
    sharper: float, detected: int
) -> None:
    # With this many bins the error is nearly that of the model.
    many = confident(99, sharper, bins=400_000)
    true = many.squared_calibration_error(np.ones(400_000)) ** 0.5

    found = calibration_intervals(sharper)

    assert ((found["low"] <= true) & (true <= found["high"])).sum() >= 22
    assert found["value"].mean() == pytest.approx(true, rel=0.15)
    # A large error is detected.
    assert (found["low"] > 0).sum() >= detected


def answered(actual: list[int], predicted: list[int]) -> Scored:
    """Bins without siblings, with these predictions; their ids are 0, 1, 2 and so on."""
    probabilities = (np.array(predicted)[:, None] == np.array(LABELS)) * 0.7 + 0.1
    ids = [f"{position}" for position in range(len(actual))]
    return Scored(ids, ids, np.array(actual), probabilities, LABELS)


@pytest.mark.parametrize(
    ("actual", "predicted", "seen", "expected"),
    [
        # Half of all bins hold 1 item and half hold 2. With siblings, every 1 is right and no 2;
        # without, half of the 1s and every 2.
        (
            [1, 1, 2, 1, 1, 2, 2, 2],
            [1, 1, 3, 1, 2, 2, 2, 2],
            "0 1 2 77",
            {"with": (3, 0.5), "without": (5, 0.75), "difference": (8, -0.25)},
        ),
        # Every 1 and every second 2 is right in both halves. So there is no leak, although
        # the halves hold other quantities. Only bins without siblings hold 3 items; of the other
        # ten, 4 hold 1 item and 6 hold 2.
        (
            [1, 1, 1, 2, 2, 1, 2, 2, 2, 2, 3],
            [1, 1, 1, 2, 3, 1, 2, 3, 2, 3, 1],
            "0 1 2 3 4",
            {"with": (5, 0.7), "without": (6, 0.7), "difference": (11, 0)},
        ),
        ([1, 2, 3, 3], [1, 2, 3, 2], "", {"without": (4, 0.75)}),
        ([1, 2, 3, 3], [1, 2, 3, 2], "0 1 2 3", {"with": (4, 0.75)}),
    ],
    ids=["a leak", "other quantities", "none seen", "all seen"],
)
def test_accuracy_by_overlap_worked_by_hand(
    actual: list[int], predicted: list[int], seen: str, expected: dict[str, tuple[int, float]]
) -> None:
    table = accuracy_by_overlap(answered(actual, predicted), set(seen.split()))

    assert table["half"].tolist() == list(expected)
    found = zip(table["test_bins"], table["accuracy"], strict=True)
    assert list(found) == [pytest.approx(values) for values in expected.values()]
    assert (table["low"] <= table["accuracy"] + 1e-12).all()
    assert (table["accuracy"] <= table["high"] + 1e-12).all()


def test_each_kind_of_overlap_has_its_rows() -> None:
    test = answered([1, 2, 3, 3], [1, 2, 3, 2])

    table = overlap_table(test, {"siblings": set(), "products": {"2", "3"}})

    assert table.columns.tolist() == ["shared", "half", "test_bins", "accuracy", "low", "high"]
    kinds = list(zip(table["shared"], table["half"], table["test_bins"], strict=True))
    assert kinds == [
        ("siblings", "without", 4),
        ("products", "with", 2),
        ("products", "without", 2),
        ("products", "difference", 4),
    ]


def test_alarm_rates_worked_by_hand() -> None:
    claims = claims_about(by_hand(), "uniform", DIFFERENCES)

    table = alarm_rates(by_hand(), claims, np.full(3, 0.5), "global")

    assert table["alarms"].tolist() == ["chosen", "1%", "5%", "10%"]
    # These shares of test's four right claims are less than one, so the lowest is the threshold.
    # One of the eight wrong claims scores 0.5 and raises no alarm; five score below 0.25.
    assert table["false_alarms"].tolist() == [0.25, 0, 0, 0]
    assert table["found"].tolist() == pytest.approx([7 / 8, 5 / 8, 5 / 8, 5 / 8])


def test_wrong_records_miss_a_pick_or_are_wrong_in_any_way() -> None:
    scored = by_hand()

    # Bins 00001 and 00002 are siblings with 1 and 2 items. The other two bins have 3 items, and are
    # claimed to have 2 in three quarters of the cases.
    of_picks = rates_at(picked(scored), np.full(3, 0.3), np.ones(4))
    assert of_picks.found == pytest.approx((1 + 1 + 1 + 0.25) / 4)
    of_all = rates_at(claims_about(scored, "uniform", DIFFERENCES), np.full(3, 0.3), np.ones(4))
    assert of_all.found == pytest.approx((2 + 1 + 2 + 1) / 8)


def test_the_precision_table_says_how_many_bins_to_look_at() -> None:
    measured = pd.DataFrame(
        {"metric": PRECISION, "value": [0.0, 0.2, 0.5], "low": [0, 0.1, 0.3], "high": [0, 0.4, 0.6]}
    )

    table = precision_table(measured)

    assert table.columns.tolist() == ["wrong_records", "precision", "low", "high", "bins_per_find"]
    assert table["wrong_records"].tolist() == [0.001, 0.01, 0.05]
    assert table["precision"].tolist() == [0.0, 0.2, 0.5]
    assert table["bins_per_find"].tolist() == [np.inf, 5, 2]


@pytest.mark.parametrize("kind", ["global", "per_count"])
def test_validation_chooses_the_thresholds_and_test_only_measures(kind: Threshold) -> None:
    validation, test, other = random_scores(6), random_scores(7), random_scores(8, bins=40)
    params = PARAMS.model_copy(update={"threshold": kind})

    tables = [
        evaluate_scores(validation, scored, 1.5, params, DIFFERENCES, {"siblings": set()}, 2).tables
        for scored in (test, other)
    ]

    thresholds = [table["alarms_by_count"]["threshold"].to_numpy() for table in tables]
    assert thresholds[0].tolist() == thresholds[1].tolist()
    assert (len({*thresholds[0]}) == 1) == (kind == "global")
    flagged = validation.right_scores < thresholds[0][validation.targets]
    assert np.mean(flagged) == pytest.approx(0.25, abs=0.03)
    if kind == "per_count":
        shares = [flagged[validation.targets == label].mean() for label in range(3)]
        assert shares == pytest.approx([0.25] * 3, abs=0.06)
    for scored, table in zip((test, other), tables, strict=True):
        pd.testing.assert_frame_equal(table["validation"], validation.table())
        pd.testing.assert_frame_equal(table["predictions"], scored.table())
        alarms = scored.right_scores < thresholds[0][scored.targets]
        assert table["alarms"]["false_alarms"][0] == pytest.approx(np.mean(alarms))


def test_the_metrics_are_those_of_test_and_some_of_validation_to_choose_by() -> None:
    test, validation = random_scores(11), random_scores(10)

    found = evaluated(test, validation, 2.0)

    headline = {name for name in METRICS if not name.startswith("found_at_")}
    assert found.metrics.items() >= test.metrics().items()
    by_name = validation.metrics() | roc_metrics(picked(validation), np.ones(60))
    chosen_by = {f"validation_{name}" for name in ("accuracy", "rmse", "nll", "auroc")}
    assert found.metrics.keys() == headline | chosen_by | {"majority_accuracy", "test_bins"}
    assert found.metrics["majority_accuracy"] == np.mean(test.actual == 2)
    assert {name: found.metrics[name] for name in chosen_by} == pytest.approx(
        {name: by_name[name.removeprefix("validation_")] for name in chosen_by}
    )
    rows = found.tables["intervals"].set_index("metric")
    assert {name: rows["value"][name] for name in headline} == pytest.approx(
        {name: found.metrics[name] for name in headline}
    )


def test_counts_that_never_differ_by_one_have_no_auroc_of_records_off_by_one() -> None:
    some = random_scores(1)
    odd = replace(some, actual=2 * some.actual - 1, labels=[1, 3, 5])

    found = evaluated(odd, odd)

    measured = found.tables["intervals"].set_index("metric")
    assert measured.loc["auroc_off_by_one"].isna().all()
    assert "auroc_off_by_one" not in found.metrics
    assert 0 < found.metrics["auroc"] < 1


def test_calibration_is_told_before_and_after() -> None:
    test = by_hand()
    calibrated = test.with_temperature(2.0)

    tables = evaluated(calibrated, temperature=2.0).tables

    roots = np.sqrt(test.probabilities)
    of_true = (roots / roots.sum(axis=1, keepdims=True))[range(4), test.targets]
    calibration = tables["calibration"]
    assert calibration["calibrated"].tolist() == ["before", "after"]
    assert calibration["temperature"].tolist() == [1, 2]
    losses = [-np.log([0.8, 0.5, 0.9, 0.25]).mean(), -np.log(of_true).mean()]
    assert calibration["nll"].tolist() == pytest.approx(losses)
    # The predictions with 0.8, 0.9 and one with 0.5 are right; the other with 0.5 is wrong.
    assert tables["reliability_uncalibrated"].to_numpy().tolist() == pytest.approx(
        np.array([[0.5, 0.5, 2], [0.8, 1, 1], [0.9, 1, 1]])
    )
    errors = [test.metrics(), calibrated.metrics()]
    assert calibration["calibration_error"].tolist() == pytest.approx(
        [metrics["calibration_error"] for metrics in errors]
    )
    pd.testing.assert_frame_equal(tables["reliability"], calibrated.reliability())


def test_confusion_and_quantities_are_those_of_the_predictions() -> None:
    test = random_scores(9)
    expected = sklearn.metrics.confusion_matrix(test.actual, test.predicted, labels=LABELS)
    precision, recall, _, bins = sklearn.metrics.precision_recall_fscore_support(
        test.actual, test.predicted, labels=LABELS
    )

    tables = evaluated(test).tables

    confusion = tables["confusion"]
    assert confusion.columns.tolist() == ["actual", "predicted", "test_bins"]
    # There is a row for each pair of counts.
    assert confusion["actual"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert confusion["predicted"].tolist() == [1, 2, 3] * 3
    assert confusion["test_bins"].tolist() == expected.ravel().tolist()
    assert pd.api.types.is_integer_dtype(confusion["test_bins"])
    rows = tables["per_quantity"]
    assert rows.columns.tolist() == ["quantity", "recall", "precision", "test_bins"]
    np.testing.assert_allclose(rows.T, [LABELS, recall, precision, bins])


def test_two_models_are_compared_on_the_same_bins() -> None:
    first = answered([1, 1, 2, 3, 3], [1, 1, 2, 3, 1]).table()
    second = answered([1, 1, 2, 3, 3], [1, 2, 3, 3, 3]).table()[::-1]

    (row,) = compare_models({"one": first, "two": second}).to_dict("records")

    assert (row["first"], row["second"]) == ("one", "two")
    assert row["accuracy"] == pytest.approx(4 / 5 - 3 / 5)
    assert row["rmse"] == pytest.approx((4 / 5) ** 0.5 - (2 / 5) ** 0.5)
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert row["rmse_low"] < row["rmse"] < row["rmse_high"]
    assert (row["only_first_right"], row["only_second_right"]) == (2, 1)
    assert row["p_value"] == 1


def test_models_that_were_scored_on_different_bins_or_counts_are_not_averaged() -> None:
    one = by_hand()
    shuffled = Scored.from_table(one.table()[::-1])
    np.testing.assert_allclose(average([one, shuffled]).probabilities, one.probabilities)

    others = replace(one, ids=["00001", "00002", "00003", "4"])
    open_class = replace(one, labels=[1, 2, AndMore(3)])
    for other in (others, open_class):
        with pytest.raises(UserError, match="the models were scored on different bins"):
            average([one, other])


def test_scoring_and_reporting_import_no_torch() -> None:
    """The report starts at once, and metrics can be computed without the libraries of networks."""
    modules = (
        "stages.report, stages.scoring.evaluation, stages.scoring.results, stages.scoring.card"
    )
    heavy = {"torch", "torchvision", "transformers"}
    script = f"import sys, {modules}; print({heavy} & {{*sys.modules}})"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"
