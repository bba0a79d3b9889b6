"""Print how much the seed of a training matters, by experiments that differ in nothing else.

This reads the finished experiments of the current commit, as `dvc exp show` lists them. For each
model and metric, it prints the mean over the seeds, the standard deviation, and the mean's 95% t
interval; then the differences between models, with Welch's t interval. With --splits, it is the
seed of the split that matters, and models are compared on the same splits.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import stdtrit

from stages.scoring.results import ENSEMBLE

#: Of reports/<model>/metrics.json. Models are chosen by those of validation.
METRICS = (
    "validation_accuracy",
    "validation_rmse",
    "accuracy",
    "rmse",
    "rmse_of_mean",
    "nll",
    "auroc",
    "found",
)
SPLIT_SEED = "split.seed"

Settings = frozenset[tuple[str, str]]
Metrics = dict[str, float]


class Group(NamedTuple):
    """The trainings of one model that differ only in the seed.

    `settings` are dotted keys of params.yaml with their values, without those of other models.
    `overlap` is the size of test as a share of train if splits differ, and 0 if trainings do.
    """

    model: str
    settings: Settings
    metrics: dict[int, Metrics]  # by seed
    overlap: float = 0.0

    def values(self, metric: str) -> list[float]:
        return [self.metrics[seed][metric] for seed in sorted(self.metrics)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.seeds", description=__doc__)
    parser.add_argument(
        "models", nargs="*", help="keys of params.yaml's train block (default: all)"
    )
    parser.add_argument(
        "--splits",
        action="store_true",
        help="compare experiments that differ in split.seed, not in the seed of the training",
    )
    options = parser.parse_args()
    models, splits = options.models, options.splits
    groups = read_groups(shown(), splits=splits)
    groups = [group for group in groups if not models or group.model in models]
    groups = [group for group in groups if len(group.metrics) > 1]
    for group in groups:
        refuse_stale(group)
    if not groups:
        what, key = (
            ("the seed of the split", SPLIT_SEED) if splits else ("the seed", "train.vit.seed")
        )
        sys.exit(
            f"seeds: error: {' and '.join(models) or 'every model'} has fewer than two finished"
            f" experiments of this commit that differ only in {what}; make them like this:"
            f" dvc exp run --queue -S '{key}=range(0,3)' && dvc exp run --run-all"
        )
    for rows in (list(spread(groups)), list(differences(groups))):
        if rows:
            print(pd.DataFrame(rows).to_string(index=False, float_format="%.4f"), end="\n\n")


def shown() -> list[dict[str, Any]]:
    """The output of `dvc exp show --json`: the workspace, and the commit with its experiments."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit("seeds: error: `dvc exp show` failed, as said above")
    revisions: list[dict[str, Any]] = json.loads(done.stdout)
    return revisions


def read_groups(revisions: Sequence[dict[str, Any]], *, splits: bool = False) -> list[Group]:
    """Group what `shown` returns by model and settings."""
    groups: dict[tuple[str, Settings], Group] = {}
    for data in finished(revisions):
        params = dict(flat(data["params"]["params.yaml"].get("data", {})))
        for path, metrics in data["metrics"].items():
            model = path.split("/")[1]
            key = SPLIT_SEED if splits else f"train.{model}.seed"
            # The baseline and the ensemble have no seed of their own, an unreadable file has no
            # data, and the witness has other metrics.
            if key in params and metrics.get("data", {}).keys() >= {*METRICS}:
                settings = settings_of(model, params, key)
                overlap = overlap_of(params) if splits else 0.0
                group = groups.setdefault((model, settings), Group(model, settings, {}, overlap))
                group.metrics.setdefault(int(params[key]), metrics["data"])
    return [*groups.values()]


def overlap_of(params: dict[str, str]) -> float:
    return int(params["split.test"]) / int(params["split.train"])


def finished(revisions: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The data of the commit and of its experiments.

    The workspace is left out, since its params.yaml may have changed since its run. So are
    experiments that wait, run, or have failed, which may show the metrics of the commit.
    """
    for commit in revisions[1:]:
        experiments = [
            one["revs"][0]
            for one in commit["experiments"] or []
            if one["executor"] is None or one["executor"]["state"] == "success"
        ]
        yield from (one["data"] for one in [commit, *experiments] if one["data"])


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings in a block of params.yaml, by dotted key, as JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, json.dumps(value)


def settings_of(model: str, params: dict[str, str], seed: str) -> Settings:
    """All settings but the key `seed` and those of other models; the ensemble has those of all."""
    own = "train." if model == ENSEMBLE else f"train.{model}."
    return frozenset(
        (key, value)
        for key, value in params.items()
        if key != seed and (key.startswith(own) or not key.startswith("train."))
    )


def refuse_stale(group: Group) -> None:
    """An experiment that only trains, like train@vit, still has the metrics of its commit."""
    for one, other in combinations(sorted(group.metrics), 2):
        if group.metrics[one] == group.metrics[other]:
            sys.exit(
                f"seeds: error: {group.model} has the same metrics with seeds {one} and {other}, so"
                " one of them was only trained: run it again, without a target"
            )


def spread(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """A row for each metric of each group."""
    for group, metric in product(groups, METRICS):
        values = group.values(metric)
        row = {"trained": label(group, groups), "metric": metric, "seeds": len(values)}
        estimated = estimate(values, overlap=group.overlap)
        yield row | estimated | {"deviation": statistics.stdev(values)}


def differences(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """A row for each metric of each two groups that share their data."""
    for (first, second), metric in product(combinations(groups, 2), METRICS):
        if data_of(first) == data_of(second):
            names = f"{label(first, groups)} - {label(second, groups)}"
            row = {"difference": names, "metric": metric}
            if not first.overlap:
                yield row | estimate(first.values(metric), second.values(metric))
            elif len(both := sorted(first.metrics.keys() & second.metrics.keys())) > 1:
                gains = [first.metrics[one][metric] - second.metrics[one][metric] for one in both]
                yield row | estimate(gains, overlap=first.overlap)


def estimate(values: list[float], *others: list[float], overlap: float = 0.0) -> dict[str, float]:
    """The mean, or the difference between two, with its 95% t interval.

    Welch, The generalization of Student's problem, 1947. For one mean, this is Student's. Results
    of several splits are alike, since these share most of their bins. That makes the variance of
    the mean larger by `overlap`, the size of test as a share of train (Nadeau and Bengio, Inference
    for the Generalization Error, 2003).
    """
    mean = statistics.mean(values) - sum(map(statistics.mean, others))
    variances = [
        statistics.variance(some) * (1 / len(some) + overlap) for some in (values, *others)
    ]
    total = sum(variances)
    if total == 0:
        return {"mean": mean, "low": mean, "high": mean}
    freedom = [len(some) - 1 for some in (values, *others)]
    parts = (one**2 / degrees for one, degrees in zip(variances, freedom, strict=True))
    half = float(stdtrit(total**2 / sum(parts), 0.975)) * math.sqrt(total)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def data_of(group: Group) -> Settings:
    """The settings that are not the model's."""
    return frozenset(one for one in group.settings if not one[0].startswith("train."))


def label(group: Group, groups: Sequence[Group]) -> str:
    """The model, with the settings in which the groups of this model differ."""
    alike = [one.settings for one in groups if one.model == group.model]
    own = group.settings - frozenset.intersection(*alike)
    return " ".join([group.model, *(f"{key}={value}" for key, value in sorted(own))])


if __name__ == "__main__":
    main()
