"""The files of reports/<model>: an evaluation writes them, the stages after it read them."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from stages.formats.tables import read_csv, read_json, write_csv, write_json
from stages.runtime import paths
from stages.runtime.errors import UserError
from stages.runtime.params import Evaluate
from stages.runtime.work import publish_folder, scratch
from stages.scoring.bins import (
    differences_in_train,
    majority_quantity,
    read_bins,
    read_products,
    shared_with_training,
)
from stages.scoring.evaluation import Evaluation, evaluate_scores
from stages.scoring.scored import Scored

METRICS = "metrics.json"
TABLES = "tables"
#: The tables of a network that dvc.yaml plots. Each is a file next to the folder with the others.
PLOTS = ("confusion", "per_quantity", "reliability", "roc")
#: The table that train writes.
CURVES = "curves"
#: The average of all networks, and the classifier without one. They are evaluated like networks.
ENSEMBLE, BASELINE = "ensemble", "baseline"
#: The stage that judges records by their items, which is also the name of its folders.
WITNESS = "witness"
# Thresholds are chosen among these probabilities, and those of a confident model differ in the last
# digits only.
_EXACT = ("predictions", "validation")


def publish_evaluation(
    model: str,
    validation: Scored,
    test: Scored,
    temperature: float,
    params: Evaluate,
    plots: Collection[str] = (),
) -> Evaluation:
    """Evaluate a model's calibrated scores, see evaluate_scores, and write reports/<model>.

    The tables in `plots` become files next to the folder with the others.
    """
    bins = read_bins()
    evaluation = evaluate_scores(
        validation,
        test,
        temperature,
        params,
        differences_in_train(bins),
        shared_with_training(bins, read_products()),
        majority_quantity(bins),
    )
    write_results(paths.REPORTS / model, evaluation, plots)
    return evaluation


def write_results(reports: Path, evaluation: Evaluation, plots: Collection[str]) -> None:
    """Write a model's metrics and tables. The folder of tables is complete or absent."""
    with scratch(f"tables {reports.name}") as folder:
        for name, table in evaluation.tables.items():
            parent = reports if name in plots else folder
            write_csv(parent / f"{name}.csv", table, digits=17 if name in _EXACT else 6)
        publish_folder(folder, reports / TABLES)
    write_json(reports / METRICS, evaluation.metrics)


def evaluated(models: Iterable[str]) -> list[str]:
    """Those of the models that have been evaluated. Raises UserError if there is none."""
    found = [model for model in models if (paths.REPORTS / model / METRICS).exists()]
    if not found:
        raise UserError(
            "no model has been evaluated: run `dvc repro`, which writes reports/<model>"
        )
    return found


def read_metrics(reports: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(reports / METRICS)
    return metrics


def read_tables(reports: Path, others: Iterable[str] = ()) -> dict[str, pd.DataFrame]:
    """The tables of a model's folder by name, and `others` beside it.

    Raises FileNotFoundError if one of these or the folder is missing.
    """
    paths_of_others = [reports / f"{name}.csv" for name in others]
    in_folder = [path for path in (reports / TABLES).iterdir() if path.suffix == ".csv"]
    # A number may be missing, like the share of right records of a count that no test bin has.
    return {
        path.stem: read_csv(path, empty_is_missing=True) for path in (*in_folder, *paths_of_others)
    }
