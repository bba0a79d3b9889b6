"""Divide the bins into train, validation and test, siblings together: data/split.csv.

data/split.json says how many test bins have siblings in train or validation, and how many would
under the other protocol. Counts that people corrected replace the records' from here on: split.csv
has the count to learn, and beside it the recorded one. They are applied as late as this because no
photograph has to be fetched or resized again for them, and after the sets are drawn, so that models
before and after are tested on the same bins.
"""

from contextlib import suppress

import pandas as pd

from stages.formats.shards import read_rejects, whole_parquet
from stages.formats.tables import write_csv, write_json
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from stages.sampling.corrections import correct
from stages.sampling.splitting import SETS, count_leaks, split


def main() -> str:
    everything = load_params()
    params = everything.split
    with whole_parquet(paths.SUBSET):
        bins = pd.read_parquet(paths.SUBSET, columns=["id", "quantity", "group"])
    quarantined = {reject.id for reject in read_rejects(paths.QUARANTINE)}
    sets = split(bins, quarantined, params)
    others = len(bins) - len(sets) - len(quarantined)
    left_out, corrected = set[str](), ""
    if params.corrections is not None:
        counted, left_out, corrected = correct(
            bins, params.corrections, everything.subset.quantities
        )
        sets = without(sets, left_out).merge(counted[["id", "quantity", "recorded"]], on="id")
        refuse_empty(sets, params.corrections)
    leaks = {params.by: count_leaks(sets)}
    if params.by != "file":
        other = params.model_copy(update={"by": "image" if params.by == "group" else "group"})
        # Groups may be too large for sizes that bins fit into; then only this protocol is counted.
        with suppress(UserError):
            leaks[other.by] = count_leaks(without(split(bins, quarantined, other), left_out))
    write_csv(paths.SPLIT, sets)
    write_json(paths.LEAKS, leaks)
    counts = sets["set"].value_counts()
    done = f"{counts['train']} train, {counts['validation']} validation, {counts['test']} test"
    unusable = f"{len(quarantined)} unusable" + (f", {others} in no set" if others else "")
    return "; ".join(filter(None, [done, unusable, corrected]))


def refuse_empty(sets: pd.DataFrame, corrections: str) -> None:
    if empty := {*SETS} - {*sets["set"]}:
        raise UserError(
            f"{paths.LISTS / corrections} leaves no bin in the set {min(empty)}: make this larger"
        )


def without(sets: pd.DataFrame, ids: set[str]) -> pd.DataFrame:
    return sets[~sets["id"].isin(ids)]


if __name__ == "__main__":
    run_stage("split", main)
