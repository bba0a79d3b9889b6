"""A trained model as it is used: network, preparation of photographs, and calibration."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from stages.core.calibration import Floats, with_temperature
from stages.core.files import read_csv, write_csv, write_json
from stages.core.networks import Classifier, load_classifier

MODELS = Path("models")
REPORTS = Path("reports")
SETTINGS = "inference.json"
VALIDATION = "validation.csv"


@dataclass(frozen=True)
class Settings:
    """What turns a photograph into calibrated probabilities, beside the network.

    `fit` and `quality` are those of the resize stage, which the network's own size goes with.
    """

    temperature: float
    fit: str
    quality: int


@dataclass(frozen=True)
class Release:
    """`validation`: id, actual, and the calibrated p<label> of each label, of the bins that
    chose its thresholds."""

    classifier: Classifier
    settings: Settings
    validation: pd.DataFrame

    def calibrated(self, probabilities: Floats) -> Floats:
        return with_temperature(probabilities, self.settings.temperature)


def write_settings(reports: Path, settings: Settings, validation: pd.DataFrame) -> None:
    """Put into a model's folder of reports/ what load_release wants beside the network."""
    write_json(reports / SETTINGS, asdict(settings))
    write_csv(reports / VALIDATION, validation)


def load_release(model: Path) -> Release:
    """The model in the folder models/<model>, with what its evaluation put in reports/<model>.

    Raises FileNotFoundError where either is missing.
    """
    reports = model.absolute().parent.parent / REPORTS / model.name
    settings = Settings(**json.loads((reports / SETTINGS).read_text("utf-8")))
    return Release(load_classifier(model), settings, read_csv(reports / VALIDATION))


def probability_columns(labels: list[int]) -> list[str]:
    """The names of the columns with the probabilities of the labels."""
    return [f"p{label}" for label in labels]
