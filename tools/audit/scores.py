"""From a stream of photographs to their probabilities, in bounded memory, part by part.

A part that is done is a file, from which a run that was killed goes on. Where parts and batches
begin depends on nothing else, so that the outcome has the same bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.formats.shards import shard_name, write_table
from stages.networks.release import probability_columns
from stages.runtime.machine import usable_cores
from stages.sharding.parallel import map_in_order
from tools.audit.models import Ensemble, Prepared
from tools.audit.photographs import Photographs

T = TypeVar("T")

BATCH = 64
# On two cores a ViT takes a minute for a part, a GPU a tenth of a second.
PART_BATCHES = 4


def score_photographs(photographs: Photographs, ensemble: Ensemble, folder: Path) -> pd.DataFrame:
    """A row per photograph: id, p<label> of each label, and the problem of an unreadable one.

    `folder` is empty, or as a killed run with the same photographs and models left it.
    """
    part_rows = BATCH * PART_BATCHES
    names = [shard_name(part) for part in range(-(-len(photographs.ids) // part_rows))]
    done = sum((folder / name).exists() for name in names)
    contents = photographs.read(done * part_rows)
    batches = map_in_order(
        ensemble.prepare, batched(contents, BATCH), usable_cores(), 2 * usable_cores()
    )
    with (
        closing(contents),
        closing(batches),
        tqdm(
            desc="audit", total=len(photographs.ids), unit=" photographs", disable=None, leave=False
        ) as progress,
    ):
        progress.update(min(done * part_rows, len(photographs.ids)))
        for name in names[done:]:
            tables = []
            for batch in islice(batches, PART_BATCHES):
                tables.append(score_batch(ensemble, batch))
                progress.update(len(batch.ids))
            write_table(folder / name, pa.concat_tables(tables))
    scored: pd.DataFrame = pa.concat_tables(
        pq.read_table(folder / name) for name in names
    ).to_pandas()
    return scored


def score_batch(ensemble: Ensemble, batch: Prepared) -> pa.Table:
    """The rows of a batch; those that are unreadable have nulls for probabilities."""
    readable = np.array([not problem for problem in batch.problems])
    probabilities = np.full((len(batch.ids), len(ensemble.labels)), np.nan)
    probabilities[readable] = ensemble.probabilities(batch.images)
    columns = {
        name: pa.array(values, from_pandas=True)
        for name, values in zip(probability_columns(ensemble.labels), probabilities.T, strict=True)
    }
    problems = pa.array(batch.problems, pa.string())
    return pa.table({"id": pa.array(batch.ids, pa.string()), **columns, "problem": problems})


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
