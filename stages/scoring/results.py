"""The files of reports/<model>, which evaluate writes and report reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from stages.formats.tables import read_csv, read_json, write_csv, write_json
from stages.runtime.work import publish_folder, scratch

METRICS = "metrics.json"
TABLES = "tables"
#: Tables that dvc.yaml plots. Each is a file next to the folder with the other tables.
PLOTS = ("confusion", "per_quantity", "reliability", "roc")
# The table that train writes.
CURVES = "curves"


def write_results(
    reports: Path, metrics: Mapping[str, float], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Write a model's metrics and tables. The folder of tables is complete or absent."""
    with scratch(f"tables {reports.name}") as folder:
        for name, table in tables.items():
            write_csv((reports if name in PLOTS else folder) / f"{name}.csv", table)
        publish_folder(folder, reports / TABLES)
    write_json(reports / METRICS, metrics)


def read_metrics(reports: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(reports / METRICS)
    return metrics


def read_tables(reports: Path) -> dict[str, pd.DataFrame]:
    """A model's tables by name, with its curves. Raises FileNotFoundError if files are missing."""
    plots = [reports / f"{name}.csv" for name in (*PLOTS, CURVES)]
    others = [path for path in (reports / TABLES).iterdir() if path.suffix == ".csv"]
    return {path.stem: read_csv(path) for path in (*plots, *others)}
