"""What the page shows besides the tables of the evaluate stage."""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from stages.runtime.params import Params
from stages.sampling.order import shuffled
from stages.scoring.metrics import counting_metrics
from stages.scoring.scored import Scored

DOUBTFUL, SAMPLE = 20, 20

Rows = list[dict[Hashable, Any]]


def by_metric(intervals: Mapping[str, pd.DataFrame]) -> dict[str, dict[Hashable, Any]]:
    """Each model's rows of intervals.csv, by metric."""
    return {model: table.set_index("metric").to_dict("index") for model, table in intervals.items()}


def by_witness(verification: pd.DataFrame) -> dict[str, dict[str, dict[Hashable, Any]]]:
    """The rows of the witness stage's table, by the kind of wrong records, witness and metric."""
    return {
        str(kind): by_metric(
            {str(name): rows for name, rows in of_kind.groupby("witness", sort=False)}
        )
        for kind, of_kind in verification.groupby("errors", sort=False)
    }


def majority_metrics(predictions: pd.DataFrame, majority: int) -> dict[str, float]:
    """The metrics of always answering `majority`."""
    actual = predictions["actual"].to_numpy()
    labels = Scored.from_table(predictions).labels
    return counting_metrics(actual, np.full_like(actual, majority), labels)


def doubtful(*held_out: pd.DataFrame) -> Rows:
    """The bins whose records a model contradicts most confidently.

    `held_out` are tables of bins that it was not trained on. `belief` is its probability of the
    record's count. The record with the least belief comes first.
    """
    scored = Scored.from_table(pd.concat(held_out))
    bins = scored.table()[["id", "actual", "predicted"]].assign(belief=scored.right_scores)
    bins = bins[bins["predicted"] != bins["actual"]].sort_values(["belief", "id"])
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
