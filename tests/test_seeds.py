"""tools.seeds: the spread of metrics over the seeds of a training."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from tests.project import Project
from tools import seeds
from tools.seeds import METRICS, differences, estimate, read_groups, spread

SEED = "train.vit.seed"


def data(accuracy: float | None, changes: dict[str, Any], models: str = "vit") -> dict[str, Any]:
    """A revision in `dvc exp show --json`: its params with some changes, and its metrics."""
    params: dict[str, Any] = {
        "split": {"by": "group"},
        "train": {"vit": {"seed": 0, "mean": [0.5, 0.5]}, "resnet34": {"seed": 0}},
    }
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = params
        for name in blocks:
            block = block[name]
        block[last] = value
    names = [] if accuracy is None else models.split()
    return {
        "params": {"params.yaml": {"data": params}},
        "metrics": {
            f"reports/{name}/metrics.json": {"data": dict.fromkeys(METRICS, accuracy)}
            for name in names
        },
    }


def experiment(
    accuracy: float | None,
    changes: dict[str, Any] | None = None,
    state: str = "success",
    models: str = "vit",
) -> dict[str, Any]:
    """An experiment of the queue; one that has not run has no accuracy."""
    revision = {"data": data(accuracy, changes or {}, models)}
    return {"revs": [revision], "executor": {"state": state}}


def revisions(*experiments: dict[str, Any]) -> list[dict[str, Any]]:
    """The workspace, and a commit in which nothing has run, with these experiments."""
    workspace = {"data": data(0.99, {SEED: 99}), "experiments": None}
    return [workspace, {"data": data(None, {}), "experiments": [*experiments]}]


def three(**changes: Any) -> list[dict[str, Any]]:
    """Three seeds of the ViT; in the keys of `changes`, __ stands for a dot."""
    others = {key.replace("__", "."): value for key, value in changes.items()}
    return [experiment(0.5 + 0.01 * seed**2, {SEED: seed, **others}) for seed in range(3)]


def run_tool(
    monkeypatch: pytest.MonkeyPatch, experiments: Sequence[dict[str, Any]], *models: str
) -> None:
    monkeypatch.setattr(seeds, "shown", lambda: revisions(*experiments))
    monkeypatch.setattr(sys, "argv", ["seeds", *models])
    seeds.main()


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.31, 0.35, 0.36, 0.3]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)

    found = estimate(values)

    assert found["mean"] == pytest.approx(np.mean(values))
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])


def test_the_interval_of_a_difference_is_welchs() -> None:
    values, others = [0.31, 0.35, 0.36, 0.3], [0.2, 0.29, 0.26]
    expected = ttest_ind(values, others, equal_var=False).confidence_interval(0.95)

    found = estimate(values, others)

    assert found["mean"] == pytest.approx(np.mean(values) - np.mean(others))
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])


def test_a_metric_that_never_changes_has_no_spread() -> None:
    assert estimate([0.5, 0.5], [0.25, 0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_each_metric_has_its_mean_and_deviation_over_the_seeds() -> None:
    rows = list(spread(read_groups(revisions(*three()))))

    assert [row["metric"] for row in rows] == list(METRICS)
    assert {(row["trained"], row["seeds"]) for row in rows} == {("vit", 3)}
    assert rows[0]["mean"] == pytest.approx(np.mean([0.5, 0.51, 0.54]))
    assert rows[0]["deviation"] == pytest.approx(np.std([0.5, 0.51, 0.54], ddof=1))


def test_the_seed_of_another_model_makes_no_difference() -> None:
    both = [
        experiment(0.1 + 0.1 * seed, {"train.resnet34.seed": seed}, models="vit resnet34")
        for seed in range(2)
    ]

    groups = {group.model: group.metrics for group in read_groups(revisions(*both))}

    # The first one of each seed counts; the later one is a repetition.
    assert {model: list(metrics) for model, metrics in groups.items()} == {
        "vit": [0],
        "resnet34": [0, 1],
    }


def test_other_settings_are_another_group_and_are_named() -> None:
    groups = read_groups(revisions(*three(train__vit__epochs=3), *three(train__vit__epochs=5)))

    assert {row["trained"] for row in spread(groups)} == {
        "vit train.vit.epochs=3",
        "vit train.vit.epochs=5",
    }
    assert [row["mean"] for row in differences(groups)] == [0] * len(METRICS)


def test_experiments_with_other_data_are_not_compared() -> None:
    groups = read_groups(revisions(*three(), *three(split__by="image")))

    assert len(groups) == 2
    assert not list(differences(groups))


def test_splits_are_compared_one_by_one_and_their_overlap_widens_intervals() -> None:
    of_splits = [
        experiment(
            0.25 * seed + gain,
            {"split.seed": seed, "split.train": 80, "split.test": 20, "train.vit.epochs": epochs},
            models="vit baseline ensemble",
        )
        for epochs, gains in ((3, (0.0, 0.0, 0.0)), (5, (0.03, 0.04, 0.02)))
        for seed, gain in enumerate(gains)
    ]
    groups = read_groups(revisions(*of_splits), splits=True)

    assert [(group.model, group.values("accuracy")) for group in groups[:2]] == [
        ("vit", [0.0, 0.25, 0.5]),
        ("baseline", [0.0, 0.25, 0.5]),
    ]
    # The ensemble is another one with other epochs of the ViT.
    assert [group.model for group in groups[2:]] == ["ensemble", "vit", "ensemble"]
    (row,) = (row for row in differences([groups[0], groups[3]]) if row["metric"] == "accuracy")
    assert row["mean"] == pytest.approx(-0.03)
    # Student's factor with two degrees of freedom, a third for three splits, a quarter for 20 / 80.
    half = 4.303 * np.std([0.03, 0.04, 0.02], ddof=1) * np.sqrt(1 / 3 + 1 / 4)
    assert row["high"] - row["mean"] == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("state", ["queued", "running", "failed"])
def test_experiments_that_have_not_finished_do_not_count(state: str) -> None:
    (group,) = read_groups(revisions(*three(), experiment(0.9, {SEED: 7}, state)))

    assert list(group.metrics) == [0, 1, 2]


def test_results_without_a_seed_do_not_count() -> None:
    assert not read_groups(revisions(experiment(0.9, models="baseline")))


def test_fewer_than_two_seeds_are_an_error_that_says_how_to_get_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match=r"every model has fewer than two .*range\(0,3\)"):
        run_tool(monkeypatch, [experiment(0.5), experiment(None, {SEED: 1}, "queued")])
    with pytest.raises(SystemExit, match="resnet34 has fewer than two"):
        run_tool(monkeypatch, three(), "resnet34")
    with pytest.raises(
        SystemExit, match=r"vit has fewer .* of the split; .*split.seed=range\(0,3\)"
    ):
        run_tool(monkeypatch, three(), "vit", "--splits")


def test_a_seed_that_was_trained_but_not_evaluated_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match="vit has the same metrics with seeds 0 and 5"):
        run_tool(monkeypatch, [*three(), experiment(0.5, {SEED: 5})])


@pytest.mark.slow
def test_the_recipe_of_three_seeds(project: Project, tmp_path: Path) -> None:
    clone = project.copy(tmp_path / "clone")
    words = ["--queue", "--set-param", f"{SEED}=range(1,3)", "evaluate@vit"]
    clone.run("dvc", "exp", "run", *words)
    clone.run("dvc", "exp", "run", "--run-all")

    text = clone.run(sys.executable, "-m", "tools.seeds")

    _, commit = json.loads(clone.run("dvc", "exp", "show", "--json"))
    runs = [one["revs"][0]["data"] for one in commit["experiments"]] + [commit["data"]]
    values = [run["metrics"]["reports/vit/metrics.json"]["data"]["validation_rmse"] for run in runs]
    assert len(values) == 3
    assert len(set(values)) > 1
    (row,) = (line.split() for line in text.splitlines() if "validation_rmse" in line)
    mean, deviation = f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}"
    assert row[:4] == ["vit", "validation_rmse", "3", mean]
    assert row[-1] == deviation
    # The other model was trained once.
    assert "resnet34" not in text
