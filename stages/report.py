"""Plot the figures and write the page that shows the run: reports/figures, reports/index.html.

The same inputs give the same bytes. So the page has no times, which differ from run to run, and no
commit, which is made after the run. It has the MD5s of dvc.lock, by which git finds the commit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.formats.shards import read_rejects, shard_paths, whole_parquet
from stages.formats.tables import read_csv, read_json, write_csv
from stages.reporting.content import (
    by_metric,
    by_witness,
    doubtful,
    majority_metrics,
    sample,
    training_settings,
)
from stages.reporting.figures import Picture, Tables, draw_figures
from stages.reporting.page import PUBLISHED, PUBLISHED_CURVES, REPORT, embedded, render
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.counts import open_label
from stages.runtime.files import write_bytes, write_text
from stages.runtime.params import load_params
from stages.runtime.work import publish_folder, scratch
from stages.scoring.bins import corrected_ids, majority_quantity, read_bins
from stages.scoring.comparison import compare_models
from stages.scoring.results import (
    BASELINE,
    CURVES,
    ENSEMBLE,
    METRICS,
    PLOTS,
    WITNESS,
    evaluated,
    read_metrics,
    read_tables,
)
from stages.scoring.verification import false_alarms_by_chance

COMPARISON = paths.REPORTS / "comparison.csv"
FIGURES = paths.REPORTS / "figures"
PAGE = paths.REPORTS / "index.html"


def main() -> str:
    params = load_params()
    networks = evaluated(params.train)
    models = [*networks, ENSEMBLE, BASELINE]
    results = {model: read_metrics(paths.REPORTS / model) for model in models}
    tables = tables_by_name(networks)
    bins = read_bins()
    comparison = compare_models(tables["predictions"])
    write_csv(COMPARISON, comparison)
    majority = majority_quantity(bins)
    by_majority = majority_metrics(tables["predictions"][ENSEMBLE], majority)
    published_curves = pd.read_csv(PUBLISHED_CURVES)
    names = {int(label): str(label) for label in params.subset.quantities}
    figures = draw_figures(bins, by_majority["accuracy"], tables, published_curves, names)
    write_figures(figures)
    doubted = doubtful(tables["predictions"][ENSEMBLE], tables["validation"][ENSEMBLE])
    some = sample(tables["predictions"], params.split.seed)
    page = render(
        REPORT,
        params=params,
        names=names,
        open=open_label(params.subset.quantities),
        networks=networks,
        # Test only measures, so validation chooses the model of the headline.
        best=max(results, key=lambda model: results[model]["validation_accuracy"]),
        results=results,
        majority=majority,
        by_majority=by_majority,
        intervals=by_metric(tables["intervals"]),
        comparison=comparison.to_dict("records"),
        witnesses=by_witness(read_tables(paths.REPORTS / WITNESS)["verification"]),
        witness=read_metrics(paths.REPORTS / WITNESS),
        by_chance=false_alarms_by_chance(
            len(tables["validation"][ENSEMBLE]), params.evaluate.false_alarm
        ),
        leaks=read_json(paths.LEAKS),
        published=read_csv(PUBLISHED).to_dict("records"),
        has_published_curves=bool(published_curves["model"].isin(networks).any()),
        figures=figures,
        tables=tables,
        doubtful=doubted,
        sample=some,
        photographs=read_photographs(sorted({row["id"] for row in [*some, *doubted]})),
        index=read_json(paths.INDEX_COUNTS),
        sampled=pq.read_metadata(paths.SUBSET).num_rows,
        unusable=len(read_rejects(paths.QUARANTINE)),
        sets=bins["set"].value_counts().to_dict(),
        corrected=len(corrected_ids(bins)),
        training=training_settings(params, networks),
        digests={path.as_posix(): md5(path) for path in identifying_files([*models, WITNESS])},
    )
    write_text(PAGE, page)
    return f"open {PAGE} in a browser"


def tables_by_name(networks: Sequence[str]) -> Tables:
    """The tables of all models by name, then by model; only networks have curves."""
    of_model = {name: read_tables(paths.REPORTS / name, (*PLOTS, CURVES)) for name in networks}
    of_model |= {name: read_tables(paths.REPORTS / name) for name in (ENSEMBLE, BASELINE)}
    names = of_model[networks[0]]
    return {name: {m: of[name] for m, of in of_model.items() if name in of} for name in names}


def write_figures(figures: Mapping[str, Picture]) -> None:
    """Write the folder of figures, completely or not at all."""
    with scratch("report") as folder:
        for name, picture in figures.items():
            write_bytes(folder / f"{name}.png", picture.png)
        publish_folder(folder, FIGURES)


def read_photographs(ids: Sequence[str]) -> dict[str, str]:
    """The resized photographs of these bins as data URLs, by id."""
    photographs: dict[str, str] = {}
    for path in shard_paths(paths.RESIZED):
        with whole_parquet(path):
            rows = pq.read_table(path, columns=["id", "image"], filters=pc.field("id").isin(ids))
        for row in rows.to_pylist():
            photographs[row["id"]] = embedded("image/jpeg", row["image"])
    return photographs


def identifying_files(models: Sequence[str]) -> list[Path]:
    """The inputs that tell this run from others, and whose MD5s are in dvc.lock."""
    return [paths.SUBSET, paths.SPLIT, *(paths.REPORTS / model / METRICS for model in models)]


def md5(path: Path) -> str:
    """The MD5 of a file, as in dvc.lock."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    run_stage("report", main)
