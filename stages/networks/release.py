"""A trained model as it is used: network, preparation of photographs, and calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field, ValidationError

from stages.formats.tables import read_csv, write_csv, write_json
from stages.networks.calibration import HIGHEST, LOWEST, Floats, with_temperature
from stages.networks.classifier import Classifier, load_classifier
from stages.networks.model_files import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    check_digests,
    damaged,
    digests,
    read_json,
    reason_of,
)
from stages.runtime.params import Block
from stages.runtime.paths import REPORTS

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

#: Of a trained model.
FILES = (CONFIG, PREPROCESSOR, WEIGHTS)
SETTINGS = "inference.json"
VALIDATION = "validation.csv"


def _of_each_file(found: dict[str, str]) -> dict[str, str]:
    if found.keys() != set(FILES):
        raise ValueError(f"is not of {', '.join(FILES)}")
    return found


class Settings(Block):
    """What turns a photograph into calibrated probabilities, beside the network.

    `fit` and `quality` are those of the resize stage, which the network's own size goes with.
    `sha256` is of each file of the model, as it was evaluated.
    """

    temperature: Annotated[float, Field(ge=LOWEST, le=HIGHEST)]
    fit: Literal["squeeze", "pad"]
    quality: Annotated[int, Field(ge=1, le=100)]
    sha256: Annotated[dict[str, Sha256], AfterValidator(_of_each_file)]


@dataclass(frozen=True)
class Release:
    """`validation`: id, actual, and the calibrated p<label> of each label, of the bins that
    chose its thresholds."""

    classifier: Classifier
    settings: Settings
    validation: pd.DataFrame

    def calibrated(self, probabilities: Floats) -> Floats:
        return with_temperature(probabilities, self.settings.temperature)


def digests_of(model: Path) -> dict[str, str]:
    """The SHA-256 of each file of the model in this folder."""
    return digests(model, FILES)


def write_settings(reports: Path, settings: Settings, validation: pd.DataFrame) -> None:
    """Put into a model's folder of reports/ what load_release wants beside the network."""
    write_json(reports / SETTINGS, settings.model_dump())
    write_csv(reports / VALIDATION, validation)


def load_release(model: Path) -> Release:
    """The model in the folder models/<model>, with what its evaluation put in reports/<model>.

    Raises FileNotFoundError where either is missing, and UserError where a file is damaged, or is
    not the one that was evaluated.
    """
    reports = model.absolute().parent.parent / REPORTS / model.name
    settings = read_settings(reports / SETTINGS)
    check_digests(model, settings.sha256, "evaluated", reports / SETTINGS)
    classifier = load_classifier(model)
    return Release(classifier, settings, read_validation(reports / VALIDATION, classifier.labels))


def read_settings(path: Path) -> Settings:
    """Raises UserError where the file is not as write_settings writes it."""
    found = read_json(path)
    try:
        return Settings.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{key}: {first['msg']}") from None


def read_validation(path: Path, labels: list[int]) -> pd.DataFrame:
    """Raises UserError where the table is not as write_settings writes it for these labels."""
    try:
        table = read_csv(path)
        numbers = table[probability_columns(labels)].to_numpy(np.float64)
        right = len(table) and table["actual"].isin(labels).all() and table["id"].is_unique
    # What is no text or no number is a ValueError, as is what is no table.
    except (ValueError, KeyError) as error:
        raise damaged(path, reason_of(error)) from None
    if not right or not ((numbers >= 0) & (numbers <= 1)).all():
        raise damaged(path, "it has no row of probabilities for each bin that validated the model")
    return table


def probability_columns(labels: list[int]) -> list[str]:
    """The names of the columns with the probabilities of the labels."""
    return [f"p{label}" for label in labels]
