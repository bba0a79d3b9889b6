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
from stages.networks.calibration import Floats, with_temperature
from stages.networks.release import SETTINGS, Release, load_release
from stages.runtime.errors import UserError
from stages.runtime.files import digest
from stages.runtime.paths import MODELS
from stages.scoring.claims import sibling_differences
from stages.scoring.ensemble import average, ensemble_temperature
from stages.scoring.evaluation import claims_about
from stages.scoring.scored import Scored
from stages.scoring.verification import rates_by_count


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

    @cached_property
    def _members(self) -> list[Scored]:
        """The models' calibrated scores of the validation bins."""
        return [Scored.from_table(release.validation) for release in self.releases]

    @cached_property
    def temperature(self) -> float:
        return ensemble_temperature(self._members)

    @cached_property
    def validation(self) -> Scored:
        """The validation bins with the calibrated average of the models' probabilities."""
        return average(self._members).with_temperature(self.temperature)

    def flagged_by_count(self, thresholds: Floats) -> pd.DataFrame:
        """The table of rates_by_count for the validation bins, if wrong records miss a pick."""
        bins = self.validation
        differences = sibling_differences(bins.ids, bins.groups, bins.actual)
        return rates_by_count(claims_about(bins, "picks", differences), self.labels, thresholds)

    def pixels(self, data: bytes) -> jpeg.Pixels:
        """A photograph as the resize stage prepares it, [size, size, 3]. Raises ImageError."""
        settings = self.releases[0].settings
        size = settings.pixels
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
        """Each label's probability, averaged over the models and calibrated: [images, labels].

        `images` are uint8 [images, size, size, 3].
        """
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device) / 255
        found = []
        for release, normalized in zip(self.releases, self._normalizers, strict=True):
            with inference.autocast(self.device, release.classifier.precision):
                logits = release.classifier.logits(normalized(scaled))
            found.append(logits.double().softmax(1).cpu().numpy())
        return with_temperature(np.mean(found, axis=0), self.temperature)


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
        # As text, since 5 and 5+ are equal numbers.
        "counts": [str(label) for label in release.classifier.labels],
        "image sizes": release.settings.pixels,
        "resizing": (release.settings.fit, release.settings.quality),
        "validation bins": release.validation[["id", "actual"]].sort_values("id").values.tolist(),
    }
