"""Draw the figures and write the page that shows the run: reports/figures, reports/index.html."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from stages.core import plots
from stages.core.command import run_stage
from stages.core.draw import shuffled
from stages.core.files import atomic_write, digest, publish_folder, read_csv, unfinished
from stages.core.metrics import confusion_matrix
from stages.core.params import Params, load_params
from stages.core.shards import read_rejects, shard_paths

INDEX_COUNTS = Path("data/index.json")
SUBSET = Path("data/subset.parquet")
QUARANTINE = Path("data/quarantine.csv")
RESIZED = Path("data/resized")
SPLIT = Path("data/split.csv")
REPORTS = Path("reports")
FIGURES = REPORTS / "figures"
OUT = REPORTS / "index.html"
TEMPLATE = Path(__file__).with_suffix(".html")
SHEET_BINS = 24
CAPTIONS = {
    "quantities": ("The bins", "Bins per quantity in train and test."),
    "curves": ("Training", "Loss and accuracy of both sets after each epoch."),
    "confusions": ("Confusion", "Share and number of each quantity's test bins by prediction."),
    "sheet": ("Some test bins", "Test bins drawn by seed: items in the record, and predictions."),
}


def main() -> str:
    params = load_params()
    sets = read_csv(SPLIT)
    subset = pd.read_parquet(SUBSET, columns=["id", "quantity"])
    bins = subset.merge(sets, on="id")
    models = [model for model in params.train.models() if (REPORTS / model / "metrics.json").exists()]
    curves = {model: read_csv(REPORTS / model / "curves.csv") for model in models}
    per_quantity = {model: read_csv(REPORTS / model / "per_quantity.csv") for model in models}
    predictions = {model: read_csv(REPORTS / model / "predictions.csv") for model in models}
    figures = {
        "quantities": plots.quantities_figure(pd.crosstab(bins["quantity"], bins["set"])),
        "curves": plots.curves_figure(curves),
        "confusions": confusions(predictions),
        "sheet": sheet(predictions, params.split.seed),
    }
    with unfinished("report", digest(params)) as folder:
        for name, figure in figures.items():
            plots.save_figure(figure, folder / f"{name}.png")
        publish_folder(folder, FIGURES)
    results = {model: read_json(REPORTS / model / "metrics.json") for model in models}
    page = render(
        params=params,
        index=read_json(INDEX_COUNTS),
        drawn=len(subset),
        unusable=len(read_rejects(QUARANTINE)),
        sets=sets["set"].value_counts().to_dict(),
        results=results,
        per_quantity=per_quantity,
        training=training_knobs(params, models),
        figures=[embedded(FIGURES / f"{name}.png") for name in figures],
    )
    with atomic_write(OUT) as temporary:
        temporary.write_text(page, "utf-8")
    return f"open {OUT} in a browser"


def confusions(predictions: dict[str, pd.DataFrame]) -> Figure:
    labels = sorted(
        set().union(
            *(set(table["actual"]) | set(table["predicted"]) for table in predictions.values())
        )
    )
    matrices = {
        model: confusion_matrix(table["actual"].to_numpy(), table["predicted"].to_numpy(), labels)
        for model, table in predictions.items()
    }
    return plots.confusions_figure(matrices, labels)


def sheet(predictions: dict[str, pd.DataFrame], seed: int) -> Figure:
    """Some test bins, drawn by seed, with the record's count and each model's."""
    first = next(iter(predictions.values()))
    bins = first[["id", "actual"]]
    for model, table in predictions.items():
        bins = bins.merge(table[["id", "predicted"]].rename(columns={"predicted": model}), on="id")
    ids = shuffled(bins["id"], "sheet", seed)[:SHEET_BINS]
    return plots.sheet_figure(bins[bins["id"].isin(ids)], read_photographs(ids))


def read_photographs(ids: list[str]) -> dict[str, NDArray[np.uint8]]:
    """The pixels of these bins' resized photographs, by id."""
    photographs = {}
    for path in shard_paths(RESIZED):
        rows = pq.read_table(path, columns=["id", "image"], filters=pc.field("id").isin(ids))
        for row in rows.to_pylist():
            photographs[row["id"]] = np.array(Image.open(io.BytesIO(row["image"])))
    return photographs


def training_knobs(params: Params, models: list[str]) -> dict[str, list[Any]]:
    """Each knob of the train block with its value for each model."""
    blocks = [params.model(model).model_dump() for model in models]
    return {knob: [block[knob] for block in blocks] for knob in blocks[0]}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def embedded(path: Path) -> dict[str, str]:
    """A figure as the page holds it: without any other file."""
    title, caption = CAPTIONS[path.stem]
    data = base64.b64encode(path.read_bytes()).decode()
    return {"title": title, "caption": caption, "base64": data}


def render(**values: Any) -> str:
    """The page; everything that goes into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(**values)


if __name__ == "__main__":
    run_stage("report", main)
