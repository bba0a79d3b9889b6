"""What is computed from scored bins: tables of few bins worked by hand, others by scikit-learn."""

from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from numpy.typing import NDArray
from scipy.special import log_softmax

from stages.scoring import evaluation
from stages.scoring.bootstrap import group_weights, intervals
from stages.scoring.evaluation import (
    Scored,
    accuracy_by_siblings,
    alarm_rates,
    calibration_table,
    confusion_table,
    evaluate_scores,
    metrics_with_intervals,
    per_quantity_table,
)
from stages.scoring.metrics import counting_metrics, probability_metrics
from stages.scoring.verification import rates_at, roc_metrics

LABELS = [1, 2, 3]
METRICS = ["accuracy", "rmse", "mae", "within_one", "macro_f1", "kappa"]
METRICS += ["rmse_of_mean", "nll", "ece", "auroc", "found_at_1", "found_at_5", "found_at_10"]
METRICS += ["found", "false_alarms"]
SAMPLES = 100


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes a millisecond or two."""
    monkeypatch.setattr(evaluation, "intervals", partial(intervals, samples=SAMPLES))


def by_hand(groups: list[str] | None = None) -> Scored:
    """Four bins, of which the last one is taken for a 2."""
    return Scored(
        ids=["00001", "00002", "00003", "3"],
        groups=groups or ["00001", "00001", "00003", "3"],
        actual=np.array([1, 2, 3, 3]),
        probabilities=np.array(
            [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9], [0.25, 0.5, 0.25]]
        ),
        labels=LABELS,
    )


def drawn(seed: int, bins: int = 60) -> Scored:
    """Bins in groups of two."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(LABELS, bins)
    scores = chance.gamma(0.7, size=(bins, 3)) + 0.6 * (actual[:, None] == LABELS)
    return Scored(
        ids=[f"{place:05d}" for place in range(bins)],
        groups=[f"{place // 2 * 2:05d}" for place in range(bins)],
        actual=actual,
        probabilities=scores / scores.sum(axis=1, keepdims=True),
        labels=LABELS,
    )


def test_the_most_probable_count_is_predicted() -> None:
    scored = by_hand()

    assert scored.predicted.tolist() == [1, 2, 3, 2]
    assert scored.targets.tolist() == [0, 1, 2, 2]


def test_labels_need_not_be_in_order() -> None:
    probabilities = np.array([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    scored = Scored(["1", "2"], ["1", "2"], np.array([2, 3]), probabilities, [3, 5, 2])

    assert scored.predicted.tolist() == [2, 5]
    assert scored.targets.tolist() == [2, 0]
    assert scored.table().columns.tolist() == ["id", "actual", "predicted", "p3", "p5", "p2"]


def test_right_scores_are_the_probabilities_of_the_true_counts() -> None:
    assert sorted(by_hand().right_scores.tolist()) == [0.25, 0.5, 0.8, 0.9]


def test_a_table_has_a_row_per_bin() -> None:
    table = by_hand().table()

    assert table.columns.tolist() == ["id", "actual", "predicted", "p1", "p2", "p3"]
    assert table["id"].tolist() == ["00001", "00002", "00003", "3"]
    assert table.iloc[3].tolist() == ["3", 3, 2, 0.25, 0.5, 0.25]


def test_calibrating_changes_confidence_and_nothing_else() -> None:
    scored = drawn(0)

    calibrated = scored.calibrated(2.0)

    assert calibrated.predicted.tolist() == scored.predicted.tolist()
    assert (calibrated.ids, calibrated.groups) == (scored.ids, scored.groups)
    expected = np.exp(log_softmax(np.log(scored.probabilities) / 2, axis=1))
    np.testing.assert_allclose(calibrated.probabilities, expected)
    for name, value in scored.metrics().items():
        same = calibrated.metrics()[name] == pytest.approx(value)
        assert same == (name not in {"rmse_of_mean", "nll", "ece"}), name


def test_the_temperature_has_the_least_loss_of_a_grid() -> None:
    scored = drawn(1)

    temperature = scored.temperature()

    losses = [scored.calibrated(t).metrics()["nll"] for t in np.linspace(0.1, 5, 200)]
    assert scored.calibrated(temperature).metrics()["nll"] <= min(losses) + 1e-9


def test_metrics_are_those_of_counts_and_of_probabilities() -> None:
    scored, weights = drawn(2), np.random.default_rng(0).uniform(0, 2, 60)

    for given in (None, weights):
        counting = counting_metrics(scored.actual, scored.predicted, LABELS, given)
        probable = probability_metrics(scored.actual, scored.probabilities, LABELS, given)
        assert scored.metrics(given) == counting | probable
    assert scored.metrics()["accuracy"] == sklearn.metrics.accuracy_score(
        scored.actual, scored.predicted
    )


def test_reliability_worked_by_hand() -> None:
    # 0.8, 0.5 and 0.9 are right, the other 0.5 is wrong.
    table = by_hand().reliability()

    assert table["confidence"].tolist() == pytest.approx([0.5, 0.8, 0.9])
    assert table["accuracy"].tolist() == [0.5, 1, 1]
    assert table["test_bins"].tolist() == [2, 1, 1]


def test_metrics_have_intervals_of_sibling_groups() -> None:
    scored = drawn(3)

    table = metrics_with_intervals(scored, threshold=0.2)

    assert table.columns.tolist() == ["metric", "value", "low", "high"]
    assert table["metric"].tolist() == METRICS
    assert (table["low"] <= table["high"]).all()
    rows = table.set_index("metric")
    rates = rates_at(scored.claims, 0.2, np.ones(60))
    values = scored.metrics() | {
        **roc_metrics(scored.claims, np.ones(60)),
        "found": rates.found,
        "false_alarms": rates.false_alarms,
    }
    assert rows["value"].to_dict() == pytest.approx(values)
    right = scored.predicted == scored.actual
    resampled = group_weights(scored.groups, SAMPLES)
    samples = [np.average(right, weights=weights) for weights in resampled]
    low, high = np.quantile(samples, [0.025, 0.975])
    found = (rows["low"]["accuracy"], rows["high"]["accuracy"])
    assert found == pytest.approx((low, high))
    for name in ("accuracy", "rmse", "mae", "nll", "ece", "auroc", "found", "false_alarms"):
        assert rows["low"][name] < rows["value"][name] < rows["high"][name], name


def test_found_and_false_alarms_are_at_the_given_threshold() -> None:
    scored = drawn(4)

    rows = [metrics_with_intervals(scored, t).set_index("metric") for t in (0.0, 0.2, 1.1)]

    for name in ("found", "false_alarms"):
        none, some, every = ([row[end][name] for end in ("low", "value", "high")] for row in rows)
        assert none == [0, 0, 0]
        assert every == pytest.approx([1, 1, 1])
        assert 0 < some[1] < 1
    others = [row.drop(["found", "false_alarms"]) for row in rows]
    assert all(one.equals(two) for one, two in pairwise(others))


def answered(actual: list[int], predicted: list[int]) -> Scored:
    """Bins without siblings, with these predictions; the ids are their places."""
    probabilities = (np.array(predicted)[:, None] == np.array(LABELS)) * 0.7 + 0.1
    ids = [f"{place}" for place in range(len(actual))]
    return Scored(ids, ids, np.array(actual), probabilities, LABELS)


def test_accuracy_by_siblings_worked_by_hand() -> None:
    scored = answered([1, 1, 2, 1, 1, 2, 2, 2], [1, 1, 3, 1, 2, 2, 2, 2])

    table = accuracy_by_siblings(scored, {"0", "1", "2", "77"})

    columns = ["siblings_in_train", "test_bins", "accuracy", "low", "high"]
    assert table.columns.tolist() == columns
    assert table["siblings_in_train"].tolist() == ["with", "without", "difference"]
    assert table["test_bins"].tolist() == [3, 5, 8]
    # Half of all bins are 1 and half 2: with siblings all 1 are right and no 2, without half the 1
    # and all 2.
    assert table["accuracy"].tolist() == pytest.approx([0.5, 0.75, -0.25])
    assert (table["low"] <= table["accuracy"]).all()
    assert (table["accuracy"] <= table["high"]).all()


@pytest.mark.parametrize(("seen", "name"), [(set(), "without"), ({"00001", "00003", "3"}, "with")])
def test_there_is_no_row_for_what_no_bin_is(seen: set[str], name: str) -> None:
    table = accuracy_by_siblings(by_hand(), seen)

    assert table["siblings_in_train"].tolist() == [name]
    assert table[["test_bins", "accuracy"]].to_numpy().tolist() == [[4, 0.75]]


def test_other_quantities_are_no_leak() -> None:
    # Right on every 1 and on every second 2, whether it has a sibling or not.
    scored = answered([1, 1, 1, 2, 2, 1, 2, 2, 2, 2, 3], [1, 1, 1, 2, 3, 1, 2, 3, 2, 3, 1])

    table = accuracy_by_siblings(scored, {"0", "1", "2", "3", "4"})

    # Of 3 there is none with a sibling; of the other ten 4 are 1 and 6 are 2.
    assert table["accuracy"].tolist() == pytest.approx([0.7, 0.7, 0])


def test_alarm_rates_worked_by_hand() -> None:
    # Of four right claims one may be an alarm: the second lowest score of validation's.
    validation, test = by_hand(), by_hand().calibrated(1.0)

    table = alarm_rates(validation, test, 0.25)

    assert table["alarms"].tolist() == ["chosen", "1%", "5%", "10%"]
    # Of test a share so small is no bin: the threshold is the lowest score.
    assert table["threshold"].tolist() == pytest.approx([0.5, 0.25, 0.25, 0.25])
    # Of the other eight claims one scores 0.5 and is no alarm; below 0.25 there are five.
    assert table["false_alarms"].tolist() == [0.25, 0, 0, 0]
    assert table["found"].tolist() == pytest.approx([7 / 8, 5 / 8, 5 / 8, 5 / 8])


def test_validation_chooses_the_first_threshold_and_test_is_what_it_is_measured_on() -> None:
    validation, test, other = drawn(6), drawn(7), drawn(8, bins=40)

    table = alarm_rates(validation, test, 0.1)

    chosen = table.iloc[0]
    assert np.mean(validation.right_scores < chosen["threshold"]) == pytest.approx(0.1)
    assert chosen["false_alarms"] == pytest.approx(np.mean(test.right_scores < chosen["threshold"]))
    assert alarm_rates(validation, other, 0.1)["threshold"].iloc[0] == chosen["threshold"]
    assert alarm_rates(other, test, 0.1)["threshold"].iloc[0] != chosen["threshold"]
    # The others are test's own.
    for place, share in ((1, 0.01), (2, 0.05), (3, 0.1)):
        row = table.iloc[place]
        assert np.mean(test.right_scores < row["threshold"]) <= share
        assert row["threshold"] in test.right_scores


def test_the_calibration_table_has_the_losses_before_and_after() -> None:
    before = by_hand()

    table = calibration_table(before, before.calibrated(2.0), 2.0)

    assert table.columns.tolist() == ["calibrated", "temperature", "nll", "ece"]
    assert table["calibrated"].tolist() == ["before", "after"]
    assert table["temperature"].tolist() == [1, 2]
    loss = -np.log([0.8, 0.5, 0.9, 0.25]).mean()
    assert table["nll"].iloc[0] == pytest.approx(loss)
    # |1 - 0.8| and |1 - 0.9| of one bin each, and of 0.5, right once of two, nothing.
    assert table["ece"].iloc[0] == pytest.approx((0.2 + 0.1) / 4)
    roots = np.sqrt(before.probabilities)
    of_true = (roots / roots.sum(axis=1, keepdims=True))[range(4), before.targets]
    assert table["nll"].iloc[1] == pytest.approx(-np.log(of_true).mean())


def test_all_of_test_is_calibrated_and_alarmed_by_what_validation_says() -> None:
    validation, test, other = drawn(10), drawn(11), drawn(12, bins=30)

    found = evaluate_scores(validation, test, 0.1, set())
    again = evaluate_scores(validation, other, 0.1, set())

    assert found.temperature == again.temperature == validation.temperature()
    pd.testing.assert_frame_equal(found.validation, again.validation)
    calibrated = validation.calibrated(found.temperature)
    pd.testing.assert_frame_equal(found.validation, calibrated.table())
    assert found.metrics["validation_accuracy"] == validation.metrics()["accuracy"]
    for evaluated, scored in ((found, test), (again, other)):
        after = scored.calibrated(found.temperature)
        tables = evaluated.tables
        pd.testing.assert_frame_equal(tables["predictions"], after.table())
        pd.testing.assert_frame_equal(tables["reliability"], after.reliability())
        pd.testing.assert_frame_equal(tables["reliability_uncalibrated"], scored.reliability())
        pd.testing.assert_frame_equal(tables["alarms"], alarm_rates(calibrated, after, 0.1))
        losses = [scored.metrics()["nll"], after.metrics()["nll"]]
        assert tables["calibration"]["nll"].tolist() == pytest.approx(losses)
        assert evaluated.metrics.items() >= after.metrics().items()
        threshold = tables["alarms"]["threshold"].iloc[0]
        expected = metrics_with_intervals(after, threshold)
        pd.testing.assert_frame_equal(tables["intervals"], expected)


def test_the_confusion_table_has_a_row_for_each_pair_of_counts() -> None:
    scored = drawn(9)
    expected = sklearn.metrics.confusion_matrix(scored.actual, scored.predicted, labels=LABELS)

    table = confusion_table(scored.confusion(), LABELS)

    assert table.columns.tolist() == ["actual", "predicted", "test_bins"]
    assert table["actual"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table["predicted"].tolist() == [1, 2, 3] * 3
    assert table["test_bins"].tolist() == expected.ravel().tolist()
    assert pd.api.types.is_integer_dtype(table["test_bins"])


def test_per_quantity_worked_by_hand() -> None:
    table = per_quantity_table(by_hand().confusion(), LABELS)

    expected: NDArray[np.float64] = np.array([[1, 1, 1, 1], [2, 1, 0.5, 1], [3, 0.5, 1, 2]])
    assert table.columns.tolist() == ["quantity", "recall", "precision", "test_bins"]
    np.testing.assert_allclose(table.to_numpy(), expected)
