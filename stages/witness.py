"""Fit a second witness against wrong records: do the items in the record fit the photograph?

Counting finds records whose count is wrong. It is blind to a record with the right count but with
the items of another bin, of which this witness finds some: models/witness, with which an audit
judges too, and reports/witness, how well both find records of either kind. It is fitted on train;
its weight and the thresholds are chosen on validation, and test is only measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from stages.features.layout import layout_features
from stages.features.projection import feature_batches, fit_projection, linear_map, project
from stages.formats.items import MEASURED
from stages.formats.shards import whole_parquet
from stages.formats.tables import read_csv, write_csv, write_json
from stages.imaging.loader import Bins, load_bins
from stages.networks.calibration import Counts, Floats, positions_of
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import Resize, load_params
from stages.runtime.work import publish_folder, scratch
from stages.scoring.bins import corrected_ids
from stages.scoring.results import ENSEMBLE, METRICS, TABLES, WITNESS, read_tables
from stages.scoring.scored import Scored
from stages.scoring.witness import NUMBERS, Witness, fit_weight, fit_witness, record_numbers
from stages.scoring.witness_files import save_witness
from stages.scoring.wrong_records import SWAPS, Witnessed, verification_table

COMPONENTS = 64
# With fewer bins than this for each component, a regression would learn train by heart.
BINS_PER_COMPONENT = 8
# Records in memory at once.
RECORDS = 8192


class Seen(NamedTuple):
    """A set of bins with the numbers of their records, [bins, numbers]."""

    bins: Bins
    numbers: Floats


def main() -> str:
    params = load_params()
    train, *others = load_seen(params.resize.size)
    witness = fit(train, params.subset.quantities)
    counted = read_tables(paths.REPORTS / ENSEMBLE)
    scored = [Scored.from_table(counted[name]) for name in ("validation", "predictions")]
    pairs = zip(others, scored, strict=True)
    looked = [look(witness, seen, counts) for seen, counts in pairs]
    weighed = replace(witness, weight=earned_weight(looked[0]))
    validation, test = (replace(some, witness=weighed) for some in looked)
    save(validation, params.resize)
    return publish(verification_table(validation, test, params.evaluate), test)


def load_seen(size: int) -> list[Seen]:
    """The bins of train, validation and test."""
    names = ["train", "validation", "test"]
    loaded = load_bins(paths.RESIZED, paths.SPLIT, *names, size=size, stage=WITNESS)
    # A record whose count was wrong does not list the items.
    wrong = corrected_ids(read_csv(paths.SPLIT))
    records = read_numbers({bin_id for bins in loaded for bin_id in bins.ids} - wrong)
    unknown = np.full(len(NUMBERS), np.nan)
    return [
        Seen(bins, np.stack([records.get(bin_id, unknown) for bin_id in bins.ids]))
        for bins in loaded
    ]


def read_numbers(ids: set[str]) -> dict[str, Floats]:
    """The numbers of these bins' records, by id."""
    numbers = {}
    with whole_parquet(paths.INDEX):
        index = pq.ParquetFile(paths.INDEX)
        for batch in index.iter_batches(RECORDS, columns=["id", *MEASURED]):
            for row in batch.to_pylist():
                if row["id"] in ids:
                    numbers[row["id"]] = record_numbers(row["items"] or [])
    return numbers


def fit(train: Seen, labels: list[int]) -> Witness:
    """Fit on the principal components of train, and rewrite the witness for features."""
    bins = train.bins
    components = min(COMPONENTS, max(1, len(bins) // BINS_PER_COMPONENT))
    projection = fit_projection(bins, components, layout_features, WITNESS)
    projected = project(projection, bins, layout_features, WITNESS).astype(np.float64)
    columns = positions_of(bins.quantities, labels)
    witness = fit_witness(projected, train.numbers, columns, len(labels))
    matrix, offset = linear_map(projection)
    return replace(
        witness, slopes=matrix @ witness.slopes, offset=offset @ witness.slopes + witness.offset
    )


def look(witness: Witness, seen: Seen, scored: Scored) -> Witnessed:
    """What the witness says about bins that the ensemble has counted, in the order of `scored`.

    Raises UserError if these are other bins.
    """
    rows = rows_of(seen.bins, scored.ids)
    batches = feature_batches(seen.bins, rows, layout_features, WITNESS)
    expected = np.concatenate([witness.expected(features) for features in batches])
    deviations = witness.deviations(seen.numbers[rows], scored.targets)
    return Witnessed(witness, scored, expected, deviations)


def rows_of(bins: Bins, ids: Sequence[str]) -> Counts:
    """The positions of these ids. Raises UserError if the bins have others."""
    positions = {bin_id: row for row, bin_id in enumerate(bins.ids)}
    if positions.keys() != set(ids):
        raise UserError(
            f"{paths.REPORTS / ENSEMBLE} is about other bins than {paths.SPLIT}: run `dvc repro`"
        )
    return np.array([positions[bin_id] for bin_id in ids])


def earned_weight(validation: Witnessed) -> float:
    """The weight of the witness's evidence, by what it says of records that were swapped."""
    pairs = validation.exchanges.get(SWAPS)
    if pairs is None:
        return fit_weight(np.empty(0), np.empty(0))
    right, wrong = (
        validation.evidence(pairs.bins, records) for records in (pairs.bins, pairs.others)
    )
    return fit_weight(right, wrong)


def save(validation: Witnessed, resize: Resize) -> None:
    """Write models/witness, completely or not at all."""
    scored = validation.scored
    every = np.arange(len(scored.ids))
    evidence = validation.evidence(every, every)
    with scratch("witness model") as folder:
        save_witness(folder, validation.witness, scored.labels, resize, scored.ids, evidence)
        publish_folder(folder, paths.MODELS / WITNESS)


def publish(table: pd.DataFrame, test: Witnessed) -> str:
    """Write reports/witness. Returns its metrics in one line."""
    with scratch("witness tables") as folder:
        write_csv(folder / "verification.csv", table)
        publish_folder(folder, paths.REPORTS / WITNESS / TABLES)
    areas = table[table["metric"] == "auroc"].dropna()
    names = areas["errors"] + "_auroc_" + areas["witness"]
    metrics: dict[str, float] = dict(zip(names, areas["value"].astype(float), strict=True))
    metrics |= {f"{kind}_records": len(pairs.bins) for kind, pairs in test.exchanges.items()}
    metrics["weight"] = test.witness.weight
    write_json(paths.REPORTS / WITNESS / METRICS, metrics)
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


if __name__ == "__main__":
    run_stage(WITNESS, main)
