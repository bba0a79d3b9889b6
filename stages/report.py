"""Draw the figures and write the page that shows the run: reports/figures, reports/index.html.

The same inputs give the same bytes. So the page has no times, which differ from run to run, and no
commit, which a run precedes; it has MD5s as dvc.lock records them, by which git finds the commit.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.formats.shards import read_rejects, shard_paths, whole_parquet
from stages.formats.tables import read_csv, write_csv
from stages.reporting import plots
from stages.reporting.figures import Tables, draw_figures
from stages.reporting.page import embedded, render
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.files import write_text
from stages.runtime.params import Params, load_params
from stages.runtime.work import publish_folder, scratch
from stages.sampling.order import shuffled
from stages.scoring.comparison import compare_models
from stages.scoring.metrics import counting_metrics

COMPARISON = paths.REPORTS / "comparison.csv"
FIGURES = paths.REPORTS / "figures"
OUT = paths.REPORTS / "index.html"
TEMPLATE = Path(plots.__file__).with_name("report.html")
PUBLISHED = Path(plots.__file__).with_name("published.csv")
TABLES = [
    "alarms",
    "calibration",
    "confusion",
    "curves",
    "intervals",
    "per_quantity",
    "precision",
    "predictions",
    "reliability",
    "reliability_uncalibrated",
    "roc",
    "siblings",
    "validation",
]
DOUBTFUL, SAMPLE = 24, 24

Metrics = Mapping[str, Any]
Rows = list[dict[Hashable, Any]]


def main() -> str:
    params = load_params()
    models = [model for model in params.train if (paths.REPORTS / model / "metrics.json").exists()]
    if not models:
        raise UserError("no model was evaluated: make reports/<model> with `dvc repro`")
    results = {model: read_json(paths.REPORTS / model / "metrics.json") for model in models}
    tables = {
        name: {model: read_csv(paths.REPORTS / model / f"{name}.csv") for model in models}
        for name in TABLES
    }
    with whole_parquet(paths.SUBSET):
        subset = pd.read_parquet(paths.SUBSET, columns=["id", "quantity"])
    bins = subset.merge(read_csv(paths.SPLIT), on="id")
    comparison = compare_models(tables["predictions"], bins.set_index("id")["group"])
    write_csv(COMPARISON, comparison)
    majority = int(bins.loc[bins["set"] == "train", "quantity"].mode().iloc[0])
    by_majority = majority_metrics(tables["predictions"], majority)
    figures = draw_figures(bins, by_majority["accuracy"], tables)
    with scratch("report") as folder:
        for name, (figure, _) in figures.items():
            plots.save_figure(figure, folder / f"{name}.png")
        publish_folder(folder, FIGURES)
    doubted = doubtful(tables)
    some = sample(tables["predictions"], params.split.seed)
    page = render(
        TEMPLATE,
        params=params,
        # Test measures, and chooses nothing.
        best=max(results, key=lambda model: results[model]["validation_accuracy"]),
        results=results,
        majority=majority,
        by_majority=by_majority,
        intervals=by_metric(tables["intervals"]),
        comparison=comparison.to_dict("records"),
        leaks=read_json(paths.LEAKS),
        published=read_csv(PUBLISHED).to_dict("records"),
        figures={name: picture(FIGURES / f"{name}.png", alt) for name, (_, alt) in figures.items()},
        tables=tables,
        doubtful=doubted,
        sample=some,
        photographs=read_photographs(sorted({row["id"] for row in [*some, *doubted]})),
        index=read_json(paths.INDEX_COUNTS),
        drawn=len(subset),
        unusable=len(read_rejects(paths.QUARANTINE)),
        sets=bins["set"].value_counts().to_dict(),
        training=training_knobs(params, models),
        digests={path.as_posix(): md5(path) for path in identifying_files(models)},
    )
    write_text(OUT, page)
    return f"open {OUT} in a browser"


def by_metric(intervals: Mapping[str, pd.DataFrame]) -> dict[str, dict[Hashable, Any]]:
    """Each model's rows of intervals.csv by the metric's name."""
    return {model: table.set_index("metric").to_dict("index") for model, table in intervals.items()}


def majority_metrics(predictions: Mapping[str, pd.DataFrame], majority: int) -> Metrics:
    """The metrics of always answering `majority`."""
    actual = next(iter(predictions.values()))["actual"].to_numpy()
    labels = sorted({majority, *actual.tolist()})
    return counting_metrics(actual, np.full_like(actual, majority), labels)


def doubtful(tables: Tables) -> Rows:
    """The held-out bins whose records the models together contradict most surely, first.

    Those of test and validation, on which no model was trained. `belief` is the mean of the models'
    calibrated probabilities of the record's count, `seen` the count they find most probable.
    """
    held_out = [
        pd.concat([tables["predictions"][model], tables["validation"][model]])
        for model in tables["predictions"]
    ]
    both = pd.concat(held_out).groupby(["id", "actual"]).mean(numeric_only=True)
    probabilities = both.filter(regex=r"^p\d+$")
    labels = probabilities.columns.str.removeprefix("p").astype(int)
    bins = both.index.to_frame(index=False)
    places = labels.get_indexer(pd.Index(bins["actual"]))
    bins["belief"] = probabilities.to_numpy()[np.arange(len(bins)), places]
    bins["seen"] = labels[probabilities.to_numpy().argmax(axis=1)]
    bins = bins[bins["seen"] != bins["actual"]].sort_values(["belief", "id"])
    return bins[:DOUBTFUL].to_dict("records")


def sample(predictions: Mapping[str, pd.DataFrame], seed: int) -> Rows:
    """Some test bins, drawn by seed, with the record's count and each model's."""
    bins = next(iter(predictions.values())).set_index("id")["actual"]
    counts = {model: table.set_index("id")["predicted"] for model, table in predictions.items()}
    return [
        {"id": name, "actual": bins[name], "predicted": {m: counts[m][name] for m in counts}}
        for name in sorted(shuffled(bins.index, "sheet", seed)[:SAMPLE])
    ]


def read_photographs(ids: Sequence[str]) -> dict[str, str]:
    """The resized photographs of these bins by id, as URLs that hold them."""
    photographs: dict[str, str] = {}
    for path in shard_paths(paths.RESIZED):
        with whole_parquet(path):
            rows = pq.read_table(path, columns=["id", "image"], filters=pc.field("id").isin(ids))
        for row in rows.to_pylist():
            photographs[row["id"]] = embedded("image/jpeg", row["image"])
    return photographs


def training_knobs(params: Params, models: Sequence[str]) -> dict[str, list[str]]:
    """Each knob of a model with its value for each, as params.yaml has it."""
    blocks = [params.model(model).model_dump() for model in models]
    return {knob: [as_text(block[knob]) for block in blocks] for knob in blocks[0]}


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def identifying_files(models: Sequence[str]) -> list[Path]:
    """Inputs that no other run has."""
    return [
        paths.SUBSET,
        paths.SPLIT,
        *(paths.REPORTS / model / "predictions.csv" for model in models),
    ]


def md5(path: Path) -> str:
    """As dvc.lock records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def picture(path: Path, alt: str) -> dict[str, str]:
    return {"src": embedded("image/png", path.read_bytes()), "alt": alt}


if __name__ == "__main__":
    run_stage("report", main)
