"""The models of an audit, whose probabilities are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stages.imaging import jpeg
from stages.networks import inference
from stages.networks.calibration import Floats, probability_columns
from stages.networks.release import SETTINGS, Release, load_release
from stages.runtime.errors import UserError
from stages.runtime.files import digest
from stages.runtime.paths import MODELS
from stages.scoring.verification import rates_by_count, right_probabilities, threshold_for


@dataclass(frozen=True)
class Ensemble:
    """Models that take the same images, count the same labels and share their validation bins."""

    folders: list[Path]
    releases: list[Release]

    @property
    def labels(self) -> list[int]:
        return self.releases[0].classifier.labels

    @property
    def device(self) -> torch.device:
        return self.releases[0].classifier.device

    @property
    def identity(self) -> str:
        """Changes with anything that decides the probabilities; settings hold SHA-256 digests."""
        return digest(*(release.settings for release in self.releases))

    @property
    def validation_ids(self) -> set[str]:
        return set(self.releases[0].validation["id"])

    @cached_property
    def validation(self) -> pd.DataFrame:
        """A row for each validation bin: actual, predicted, and p<label> for each label."""
        columns = probability_columns(self.labels)
        tables = [release.validation.sort_values("id") for release in self.releases]
        mean = np.mean([table[columns].to_numpy() for table in tables], axis=0)
        found = pd.DataFrame(mean, columns=columns)
        found["actual"] = tables[0]["actual"].to_numpy()
        found["predicted"] = np.array(self.labels)[mean.argmax(axis=1)]
        return found

    def threshold(self, false_alarm: float) -> float:
        """The score below which this share of the correct validation records lies."""
        return threshold_for(right_probabilities(self.validation), false_alarm)

    def flagged_by_count(self, threshold: float) -> pd.DataFrame:
        """The table of rates_by_count for the validation bins."""
        probabilities = self.validation[probability_columns(self.labels)].to_numpy()
        actual = self.validation["actual"].to_numpy()
        return rates_by_count(probabilities, actual, self.labels, threshold)

    def pixels(self, data: bytes) -> jpeg.Pixels:
        """A photograph as the resize stage prepares it, [size, size, 3]. Raises ImageError."""
        size, settings = self.releases[0].classifier.size, self.releases[0].settings
        pixels = jpeg.decode(data)
        if pixels.shape[:2] == (size, size):
            return pixels
        resized = jpeg.resize(pixels, size, settings.fit)
        return jpeg.decode(jpeg.encode(resized, settings.quality))

    @cached_property
    def _normalizers(self) -> list[Any]:
        return [inference.normalizer(release.classifier) for release in self.releases]

    @torch.inference_mode()
    def probabilities(self, images: jpeg.Pixels) -> Floats:
        """Each label's calibrated probability, averaged over the models: [images, labels].

        `images` are uint8 [images, size, size, 3].
        """
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device) / 255
        found = []
        for release, normalized in zip(self.releases, self._normalizers, strict=True):
            with inference.autocast(self.device):
                logits = release.classifier.logits(normalized(scaled))
            found.append(logits.double().softmax(1).cpu().numpy())
        mean: Floats = np.mean(found, axis=0)
        return mean


def load_ensemble(folders: Sequence[Path]) -> Ensemble:
    """Load these models, by default all in models/, onto a GPU if there is one.

    Raises UserError if one of them is not a trained model or they cannot be averaged.
    """
    folders = folders or sorted(path.parent for path in MODELS.glob(f"*/{SETTINGS}"))
    if not folders:
        raise UserError(
            f"there is no model in {MODELS}/: get one with `dvc pull`, or add --model FOLDER"
        )
    ensemble = Ensemble(list(folders), [load_model(folder) for folder in folders])
    refuse_to_mix(ensemble)
    for release in ensemble.releases:
        inference.place(release.classifier, inference.default_device())
    return ensemble


def load_model(folder: Path) -> Release:
    try:
        return load_release(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a trained model: {error.filename} is missing; get the whole folder"
            " with `dvc pull` or `dvc get`"
        ) from None


def refuse_to_mix(ensemble: Ensemble) -> None:
    """Raise UserError if an average of the models would be meaningless."""
    first, *others = (properties(release) for release in ensemble.releases)
    for folder, other in zip(ensemble.folders[1:], others, strict=True):
        for name, value in first.items():
            if value != other[name]:
                raise UserError(
                    f"{ensemble.folders[0]} and {folder} cannot be averaged: their {name} differ"
                )


def properties(release: Release) -> dict[str, Any]:
    """What models must have in common to be averaged."""
    return {
        "counts": release.classifier.labels,
        "image sizes": release.classifier.size,
        "resizing": (release.settings.fit, release.settings.quality),
        "validation bins": release.validation[["id", "actual"]].sort_values("id").values.tolist(),
    }
