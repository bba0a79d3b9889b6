"""Bins that the models were trained on: even their wrong records have been learned."""

from pathlib import Path

import pyarrow.parquet as pq

from stages.formats.shards import whole_parquet
from stages.formats.tables import read_csv
from stages.runtime.paths import RAW, RESIZED, SPLIT, SUBSET
from tools.audit.models import Ensemble
from tools.audit.photographs import Photographs, Shards


def training_ids(ensemble: Ensemble) -> set[str]:
    """The training set of data/split.csv; empty if the models were trained with another split."""
    if not SPLIT.exists():
        return set()
    split = read_csv(SPLIT)
    ids = {name: set(split.loc[split["set"] == name, "id"]) for name in ("train", "validation")}
    return ids["train"] if ids["validation"] == {*ensemble.validation.ids} else set()


def project_ids(photographs: Photographs) -> set[str]:
    """The photographs that are known to be this project's: others may have equal ids by chance.

    Shards are recognized by their folder, and files by their size, which data/subset.parquet has.
    """
    if isinstance(photographs, Shards):
        own = [rows["id"].to_pylist() for path, rows in photographs.rows.items() if is_output(path)]
        return {bin_id for ids in own for bin_id in ids}
    if not SUBSET.exists():
        return set()
    with whole_parquet(SUBSET):
        subset = pq.read_table(SUBSET, columns=["id", "size"])
    sizes = zip(subset["id"].to_pylist(), subset["size"].to_pylist(), strict=True)
    return {bin_id for bin_id, size in sizes if photographs.sizes.get(bin_id) == size}


def is_output(path: Path) -> bool:
    """Whether a file lies in data/raw or data/resized, however its path is written."""
    return any(folder.exists() and path.parent.samefile(folder) for folder in (RAW, RESIZED))
