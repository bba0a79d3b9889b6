"""Draw the figures and write the page that shows the run: reports/figures, reports/index.html.

The same inputs give the same bytes. So the page has no times, which differ from run to run, and no
commit, which a run precedes; it has MD5s as dvc.lock records them, by which git finds the commit.
"""

import base64
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from stages.core import plots
from stages.core.command import run_stage
from stages.core.draw import shuffled
from stages.core.files import atomic_write, digest, publish_folder, read_csv, unfinished
from stages.core.metrics import headline_metrics
from stages.core.params import Params, load_params
from stages.core.shards import read_rejects, shard_paths, whole_parquet

INDEX_COUNTS = Path("data/index.json")
SUBSET = Path("data/subset.parquet")
QUARANTINE = Path("data/quarantine.csv")
RESIZED = Path("data/resized")
SPLIT = Path("data/split.csv")
REPORTS = Path("reports")
FIGURES = REPORTS / "figures"
OUT = REPORTS / "index.html"
TEMPLATE = Path(__file__).with_suffix(".html")
PUBLISHED = Path(__file__).with_name("published.csv")
TABLES = ["confusion", "curves", "per_quantity", "predictions", "reliability"]
SURELY_WRONG, SAMPLE = 12, 24

# By name of the file in reports/<model>, and by model.
Tables = Mapping[str, Mapping[str, pd.DataFrame]]
Metrics = Mapping[str, Any]
Rows = list[dict[Hashable, Any]]


def main() -> str:
    params = load_params()
    models = [
        model for model in params.train.models() if (REPORTS / model / "metrics.json").exists()
    ]
    results = {model: read_json(REPORTS / model / "metrics.json") for model in models}
    tables = {
        name: {model: read_csv(REPORTS / model / f"{name}.csv") for model in models}
        for name in TABLES
    }
    with whole_parquet(SUBSET):
        subset = pd.read_parquet(SUBSET, columns=["id", "quantity"])
    bins = subset.merge(read_csv(SPLIT), on="id")
    figures = draw_figures(bins, results, tables)
    with unfinished("report", digest(params)) as folder:
        for name, (figure, _) in figures.items():
            plots.save_figure(figure, folder / f"{name}.png")
        publish_folder(folder, FIGURES)
    wrong = {model: surely_wrong(table) for model, table in tables["predictions"].items()}
    some = sample(tables["predictions"], params.split.seed)
    shown = sorted({row["id"] for rows in [some, *wrong.values()] for row in rows})
    majority = int(bins.loc[bins["set"] == "train", "quantity"].mode().iloc[0])
    page = render(
        params=params,
        best=max(results, key=lambda model: results[model]["accuracy"]),
        results=results,
        majority=majority,
        scores=results | {"majority class": majority_metrics(tables["predictions"], majority)},
        published=read_csv(PUBLISHED).to_dict("records"),
        figures={name: picture(FIGURES / f"{name}.png", alt) for name, (_, alt) in figures.items()},
        per_quantity=tables["per_quantity"],
        surely_wrong=wrong,
        sample=some,
        photographs=read_photographs(shown),
        index=read_json(INDEX_COUNTS),
        drawn=len(subset),
        unusable=len(read_rejects(QUARANTINE)),
        sets=bins["set"].value_counts().to_dict(),
        training=training_knobs(params, models),
        digests={path.as_posix(): md5(path) for path in identifying_files(models)},
    )
    with atomic_write(OUT) as temporary:
        temporary.write_text(page, "utf-8")
    return f"open {OUT} in a browser"


def draw_figures(
    bins: pd.DataFrame, results: Mapping[str, Metrics], tables: Tables
) -> dict[str, tuple[Figure, str]]:
    """Each figure by its file's name, with a text for those who do not see it."""
    quantities = pd.crosstab(bins["quantity"], bins["set"])
    figures = {"quantities": (plots.quantities_figure(quantities), quantities_text(quantities))}
    for model, metrics in results.items():
        curves = tables["curves"][model]
        figure = plots.curves_figure(model, curves, metrics["majority_accuracy"])
        figures[f"curves_{model}"] = figure, curves_text(model, curves)
        confusion = tables["confusion"][model].pivot_table(
            "test_bins", "actual", "predicted", aggfunc="sum"
        )
        figure = plots.confusion_figure(model, confusion.to_numpy(), confusion.index.tolist())
        figures[f"confusion_{model}"] = figure, confusion_text(model, confusion)
    text = "Recall per quantity, in the tables below."
    figures["recall"] = plots.recall_figure(tables["per_quantity"]), text
    text = "Accuracy by confidence: " + "; ".join(
        f"{model} differs by {metrics['ece']:.1%} on average" for model, metrics in results.items()
    )
    figures["reliability"] = plots.reliability_figure(tables["reliability"]), text
    return figures


def quantities_text(quantities: pd.DataFrame) -> str:
    return "Bins per quantity: " + "; ".join(
        f"{quantity}: {row['train']:,} train, {row['test']:,} test"
        for quantity, row in quantities.iterrows()
    )


def curves_text(model: str, curves: pd.DataFrame) -> str:
    last = curves.iloc[-1]
    return (
        f"Loss and accuracy of {model} by epoch. After epoch {last['epoch']:.0f} it is right on"
        f" {last['train_accuracy']:.1%} of train and {last['test_accuracy']:.1%} of test."
    )


def confusion_text(model: str, confusion: pd.DataFrame) -> str:
    """`confusion`: test bins, with the quantities as index and the predictions as columns."""
    shares = confusion.div(confusion.sum(axis=1).clip(lower=1), axis=0)
    return f"Predictions of {model} for each quantity: " + "; ".join(
        f"{quantity}: "
        + ", ".join(f"{share:.0%} as {predicted}" for predicted, share in row.items())
        for quantity, row in shares.iterrows()
    )


def majority_metrics(predictions: Mapping[str, pd.DataFrame], majority: int) -> Metrics:
    """The metrics of always answering `majority`."""
    actual = next(iter(predictions.values()))["actual"].to_numpy()
    labels = sorted({majority, *actual.tolist()})
    return headline_metrics(actual, np.full_like(actual, majority), labels, majority)


def surely_wrong(predictions: pd.DataFrame) -> Rows:
    """The bins for which the model is surest of a count other than the record's."""
    wrong = predictions[predictions["predicted"] != predictions["actual"]]
    wrong = wrong.assign(confidence=wrong.filter(regex=r"^p\d+$").max(axis=1))
    wrong = wrong.sort_values(["confidence", "id"], ascending=[False, True])[:SURELY_WRONG]
    return wrong.to_dict("records")


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
    for path in shard_paths(RESIZED):
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
    return [SUBSET, SPLIT, *(REPORTS / model / "predictions.csv" for model in models)]


def md5(path: Path) -> str:
    """As dvc.lock records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def picture(path: Path, alt: str) -> dict[str, str]:
    return {"src": embedded("image/png", path.read_bytes()), "alt": alt}


def embedded(media_type: str, data: bytes) -> str:
    """The URL of a file that the page itself holds."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def render(**values: Any) -> str:
    """The page; everything that goes into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(**values)


if __name__ == "__main__":
    run_stage("report", main)
