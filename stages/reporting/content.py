"""What the page shows besides the tables of the evaluate stage."""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stages.reporting.figures import Tables
from stages.runtime.params import Params
from stages.sampling.order import shuffled
from stages.scoring.metrics import counting_metrics
from stages.scoring.verification import right_probabilities

DOUBTFUL, SAMPLE = 20, 20

Rows = list[dict[Hashable, Any]]


def by_metric(intervals: Mapping[str, pd.DataFrame]) -> dict[str, dict[Hashable, Any]]:
    """Each model's rows of intervals.csv, by metric."""
    return {model: table.set_index("metric").to_dict("index") for model, table in intervals.items()}


def majority_metrics(predictions: Mapping[str, pd.DataFrame], majority: int) -> dict[str, float]:
    """The metrics of always answering `majority`."""
    actual = next(iter(predictions.values()))["actual"].to_numpy()
    labels = sorted({majority, *actual.tolist()})
    return counting_metrics(actual, np.full_like(actual, majority), labels)


def doubtful(tables: Tables) -> Rows:
    """The test and validation bins whose records the models together contradict most confidently.

    No model was trained on these bins. `belief` is the mean of the models' calibrated probabilities
    of the record's count, and `seen` the count with the highest mean. The record with the least
    belief comes first.
    """
    held_out = [
        pd.concat([tables["predictions"][model], tables["validation"][model]])
        for model in tables["predictions"]
    ]
    mean = pd.concat(held_out).groupby(["id", "actual"]).mean(numeric_only=True).reset_index()
    probabilities = mean.filter(regex=r"^p\d+$")
    labels = probabilities.columns.str.removeprefix("p").astype(int)
    bins = mean[["id", "actual"]].assign(
        belief=right_probabilities(mean), seen=labels[probabilities.to_numpy().argmax(axis=1)]
    )
    bins = bins[bins["seen"] != bins["actual"]].sort_values(["belief", "id"])
    return bins[:DOUBTFUL].to_dict("records")


def sample(predictions: Mapping[str, pd.DataFrame], seed: int) -> Rows:
    """Test bins sampled by seed, with the record's count and each model's."""
    bins = next(iter(predictions.values())).set_index("id")["actual"]
    counts = {model: table.set_index("id")["predicted"] for model, table in predictions.items()}
    return [
        {"id": name, "actual": bins[name], "predicted": {m: counts[m][name] for m in counts}}
        for name in sorted(shuffled(bins.index, "sheet", seed)[:SAMPLE])
    ]


def training_settings(params: Params, models: Sequence[str]) -> dict[str, list[str]]:
    """The models' values of each setting in their blocks of params.yaml."""
    blocks = [params.model(model).model_dump() for model in models]
    return {name: [_as_text(block[name]) for block in blocks] for name in blocks[0]}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
