"""Divide the bins into train, validation and test, siblings together: data/split.csv.

data/split.json says how many test bins have siblings in train or validation, and how many would
under the other protocol.
"""

from contextlib import suppress

import pandas as pd

from stages.formats.shards import read_rejects, whole_parquet
from stages.formats.tables import write_csv, write_json
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from stages.sampling.splitting import count_leaks, split


def main() -> str:
    params = load_params().split
    with whole_parquet(paths.SUBSET):
        bins = pd.read_parquet(paths.SUBSET, columns=["id", "quantity", "group"])
    unusable = {reject.id for reject in read_rejects(paths.QUARANTINE)}
    sets = split(bins, unusable, params)
    leaks = {params.by: count_leaks(sets)}
    if params.by != "file":
        other = params.model_copy(update={"by": "image" if params.by == "group" else "group"})
        # Groups may be too large for sizes that bins fit into; then only this protocol is counted.
        with suppress(UserError):
            leaks[other.by] = count_leaks(split(bins, unusable, other))
    write_csv(paths.SPLIT, sets)
    write_json(paths.LEAKS, leaks)
    counts = sets["set"].value_counts()
    done = f"{counts['train']} train, {counts['validation']} validation, {counts['test']} test"
    others = len(bins) - len(sets) - len(unusable)
    return f"{done}; {len(unusable)} unusable" + (f", {others} in no set" if others else "")


if __name__ == "__main__":
    run_stage("split", main)
