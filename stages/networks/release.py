"""A trained model's folder: the calibrated network, its preprocessing and validation scores."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from stages.formats.tables import read_csv, write_csv, write_json
from stages.networks.calibration import (
    fit_temperature,
    positions_of,
    probability_columns,
    with_temperature,
)
from stages.networks.classifier import (
    Classifier,
    divide_logits,
    load_classifier,
    save_classifier,
)
from stages.networks.model_files import (
    CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    check_digests,
    damaged,
    digests,
    read_settings,
)
from stages.runtime.params import Block, ModelParams, Precision, Resize

FILES = (CONFIG, PREPROCESSOR, WEIGHTS)
SETTINGS = "inference.json"
VALIDATION = "validation.csv"


class Settings(Block):
    """inference.json: where the network's own files come from.

    The last layer is divided by `folded_temperature`, so the network's scores are calibrated.
    `epoch` is the one whose weights were kept; `precision` and `average_mirrored` are the model's.
    `pixels`, `fit` and `quality` are the size and settings of the resize stage; the network may
    scale to fewer pixels. `sha256` has the digest of each of FILES.
    """

    folded_temperature: Annotated[float, Field(gt=0)]
    epoch: Annotated[int, Field(ge=1)]
    precision: Precision
    average_mirrored: bool
    pixels: Annotated[int, Field(ge=1)]
    fit: Literal["squeeze", "pad"]
    quality: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Release:
    """A trained model, whose scores are calibrated.

    `validation` has a row for each bin that calibrated it: id, group (of siblings), actual,
    predicted, and the calibrated probability p<label> of each label.
    """

    classifier: Classifier
    settings: Settings
    validation: pd.DataFrame


def save_release(
    folder: Path,
    classifier: Classifier,
    params: ModelParams,
    resize: Resize,
    validation: pd.DataFrame,
    probabilities: NDArray[np.floating],
    *,
    epoch: int,
) -> None:
    """Calibrate a model on the validation bins, and write everything that is needed to use it.

    `validation` has the columns id, group and actual (the quantity), `probabilities` [bins, labels]
    are the softmax of the network's scores, and `epoch` is the one whose weights the network has.
    The network itself is calibrated, and moved to the CPU.
    """
    labels = np.array(classifier.labels)
    targets = positions_of(validation["actual"].to_numpy(), classifier.labels)
    temperature = fit_temperature(probabilities, targets)
    # In the weights, so that every program that loads the model gives calibrated probabilities.
    divide_logits(classifier, temperature)
    save_classifier(classifier, params, folder, resize.fit)
    settings = Settings(
        folded_temperature=temperature,
        epoch=epoch,
        precision=params.precision,
        average_mirrored=params.average_mirrored,
        pixels=resize.size,
        fit=resize.fit,
        quality=resize.quality,
        sha256=digests(folder, FILES),
    )
    write_json(folder / SETTINGS, settings.model_dump())
    calibrated = with_temperature(probabilities, temperature)
    table = validation[["id", "group", "actual"]].copy()
    table["predicted"] = labels[calibrated.argmax(axis=1)]
    table[probability_columns(classifier.labels)] = calibrated
    # With all digits, because thresholds are chosen among these probabilities, and those of a
    # confident model differ in the last digits only.
    write_csv(folder / VALIDATION, table, digits=17)


def load_release(folder: Path) -> Release:
    """Read what save_release wrote.

    Raises FileNotFoundError if a file is missing, and UserError if one is damaged or is not the one
    that was saved.
    """
    settings = read_settings(folder / SETTINGS, Settings)
    check_digests(folder, FILES, settings.sha256, folder / SETTINGS)
    classifier = replace(
        load_classifier(folder),
        precision=settings.precision,
        average_mirrored=settings.average_mirrored,
    )
    return Release(classifier, settings, _read_validation(folder / VALIDATION, classifier.labels))


def _read_validation(path: Path, labels: list[int]) -> pd.DataFrame:
    table = read_csv(path)
    wanted = {"id", "group", "actual", "predicted", *probability_columns(labels)}
    if missing := sorted(wanted - set(table.columns)):
        raise damaged(path, f"it has no column {missing[0]}")
    return table
