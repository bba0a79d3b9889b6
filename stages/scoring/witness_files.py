"""The folder of a fitted witness, which an audit loads: models/witness."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import safetensors.numpy
from pydantic import Field
from safetensors import SafetensorError

from stages.formats.tables import read_csv, write_csv, write_json
from stages.networks.calibration import Floats
from stages.networks.model_files import check_digests, damaged, digests, read_settings, reason_of
from stages.runtime.files import write_bytes
from stages.runtime.params import Block, Resize
from stages.scoring.witness import NUMBERS, Witness

ARRAYS = "witness.safetensors"
VALIDATION = "validation.csv"
SETTINGS = "witness.json"


class Settings(Block):
    """witness.json: what the arrays are about, and the SHA-256 of each other file.

    `numbers` names those of a record and `labels` the counts, in the order of the arrays. The
    photographs were `pixels` wide and high, and `fit` and `quality` are those of the resize stage.
    `weight` is the witness's.
    """

    numbers: list[str]
    labels: list[str]
    pixels: int
    fit: Literal["squeeze", "pad"]
    quality: int
    weight: Annotated[float, Field(ge=0)]
    sha256: dict[str, str]


@dataclass(frozen=True)
class WitnessRelease:
    """A witness, and its evidence for the right record of each validation bin, by id."""

    witness: Witness
    settings: Settings
    validation: dict[str, float]


def save_witness(
    folder: Path,
    witness: Witness,
    labels: list[int],
    resize: Resize,
    ids: list[str],
    evidence: Floats,
) -> None:
    """Write a witness, with its `evidence` for the records of the validation bins `ids`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(witness, name)) for name in array_names()}
    write_bytes(folder / ARRAYS, safetensors.numpy.save(arrays))
    # With all digits, because thresholds are chosen among these values.
    table = pd.DataFrame({"id": ids, "evidence": evidence})
    write_csv(folder / VALIDATION, table, digits=17)
    settings = Settings(
        numbers=list(NUMBERS),
        labels=[str(label) for label in labels],
        pixels=resize.size,
        fit=resize.fit,
        quality=resize.quality,
        weight=witness.weight,
        sha256=digests(folder, [ARRAYS, VALIDATION]),
    )
    write_json(folder / SETTINGS, settings.model_dump())


def load_witness(folder: Path) -> WitnessRelease:
    """Read what save_witness wrote.

    Raises FileNotFoundError if a file is missing, and UserError if one is damaged or is not the one
    that was saved.
    """
    path = folder / SETTINGS
    settings = read_settings(path, Settings)
    check_digests(folder, [ARRAYS, VALIDATION], settings.sha256, path)
    try:
        arrays = safetensors.numpy.load_file(folder / ARRAYS)
        witness = Witness(**{name: arrays[name] for name in array_names()}, weight=settings.weight)
    except (SafetensorError, KeyError) as error:
        raise damaged(folder / ARRAYS, reason_of(error)) from None
    if settings.numbers != list(NUMBERS):
        raise damaged(path, "it is about other numbers of records than this version of the code")
    table = read_csv(folder / VALIDATION)
    return WitnessRelease(
        witness, settings, dict(zip(table["id"], table["evidence"].astype(float), strict=True))
    )


def array_names() -> list[str]:
    return [field.name for field in fields(Witness) if field.name != "weight"]
