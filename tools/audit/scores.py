"""From photographs to probabilities, part by part, in bounded memory.

Each finished part is a file, so the run after a killed one continues with the next part. Parts and
batches are the same in every run, so the results have the same bytes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.formats.shards import shard_name, write_table
from stages.imaging import jpeg
from stages.networks.calibration import probability_columns
from stages.runtime.machine import usable_cores
from tools.audit.items import expected_columns
from tools.audit.models import Ensemble
from tools.audit.photographs import Content, Photographs, batched

BATCH = 64
# A part takes two cores about a minute with a ViT, and a GPU a tenth of a second.
PART = 4 * BATCH


class Prepared(NamedTuple):
    """A photograph ready for the models, or why it cannot be used."""

    id: str
    pixels: jpeg.Pixels | None
    problem: str


def score_photographs(photographs: Photographs, ensemble: Ensemble, folder: Path) -> pd.DataFrame:
    """A row per photograph: id, p<label> for each label, and the problem if it is unreadable.

    With a witness, there also are the columns of expected_columns.

    `folder` is empty or holds the parts of a killed run with the same photographs and models. The
    next part is read and decoded while this one is scored.
    """
    names = [shard_name(number) for number in range(-(-len(photographs.ids) // PART))]
    done = sum((folder / name).exists() for name in names)
    parts = photographs.parts(done * PART, PART)
    with (
        ThreadPoolExecutor(usable_cores()) as decoders,
        ThreadPoolExecutor(1) as reader,
        tqdm(
            desc="audit", total=len(photographs.ids), unit=" photographs", disable=None, leave=False
        ) as progress,
    ):
        progress.update(min(done * PART, len(photographs.ids)))

        def next_part() -> list[Prepared]:
            return list(decoders.map(partial(prepare, ensemble), next(parts, [])))

        coming = reader.submit(next_part)
        for name in names[done:]:
            part = coming.result()
            coming = reader.submit(next_part)
            tables = []
            for batch in batched(part, BATCH):
                tables.append(score(ensemble, batch))
                progress.update(len(batch))
            write_table(folder / name, pa.concat_tables(tables))
    scored: pd.DataFrame = pa.concat_tables(
        pq.read_table(folder / name) for name in names
    ).to_pandas()
    return scored


def prepare(ensemble: Ensemble, content: Content) -> Prepared:
    problem = content.problem
    if not problem:
        try:
            return Prepared(content.id, ensemble.pixels(content.data), "")
        except jpeg.ImageError as error:
            problem = " ".join(str(error).split())
    return Prepared(content.id, None, f"unreadable photograph: {problem}")


def score(ensemble: Ensemble, batch: Sequence[Prepared]) -> pa.Table:
    """The rows of a batch; unreadable photographs have null probabilities."""
    names = probability_columns(ensemble.labels)
    names += expected_columns() if ensemble.witness else []
    scores = np.full((len(batch), len(names)), np.nan)
    images = {row: one.pixels for row, one in enumerate(batch) if one.pixels is not None}
    if images:
        stacked = np.stack(list(images.values()))
        found = [ensemble.probabilities(stacked)]
        found += [ensemble.expected(stacked)] if ensemble.witness else []
        scores[list(images)] = np.hstack(found)
    columns = {
        name: pa.array(values, from_pandas=True)
        for name, values in zip(names, scores.T, strict=True)
    }
    ids, problems = ([one.id for one in batch], [one.problem for one in batch])
    return pa.table({"id": pa.array(ids, pa.string()), **columns, "problem": pa.array(problems)})
