"""The models of an audit, whose probabilities are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stages.features.layout import layout_features
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
from stages.scoring.results import WITNESS
from stages.scoring.scored import Scored
from stages.scoring.verification import rates_by_count
from stages.scoring.witness_files import WitnessRelease, load_witness
from tools.audit.items import ItemsJudge

# A witness whose evidence counts less than this changes no probability by a tenth of a percent.
LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Ensemble:
    """Models that take the same images, count the same labels and share their validation bins."""

    folders: list[Path]
    releases: list[Release]
    #: It judges the items of records, where these are known.
    witness: WitnessRelease | None = None

    @property
    def labels(self) -> list[int]:
        return self.releases[0].classifier.labels

    @property
    def device(self) -> torch.device:
        return self.releases[0].classifier.device

    @property
    def identity(self) -> str:
        """Changes with anything that decides the probabilities; settings hold SHA-256 digests."""
        witness = [self.witness.settings] if self.witness else []
        return digest(*(release.settings for release in self.releases), *witness)

    @cached_property
    def _members(self) -> list[Scored]:
        """The models' calibrated scores of the validation bins."""
        return [Scored.from_table(release.validation) for release in self.releases]

    @cached_property
    def temperature(self) -> float:
        return ensemble_temperature(self._members)

    @cached_property
    def counted(self) -> Scored:
        """The validation bins with the calibrated average of the models' probabilities."""
        return average(self._members).with_temperature(self.temperature)

    @cached_property
    def validation(self) -> Scored:
        """The validation bins with the scores that records would have, for each count.

        They are the probabilities of `counted`. With a witness, they are multiplied by the
        probability that the items of the bin's own record are right.
        """
        if self.witness is None:
            return self.counted
        probabilities = self.counted.probabilities * self._right_items[:, None]
        return replace(self.counted, probabilities=probabilities)

    @property
    def _right_items(self) -> Floats:
        """The probability, by the witness, that the items in each validation record are right."""
        assert self.witness is not None
        evidence = [self.witness.validation[bin_id] for bin_id in self.counted.ids]
        return self.witness.witness.belief(np.array(evidence))

    @cached_property
    def judge(self) -> ItemsJudge | None:
        if self.witness is None:
            return None
        return ItemsJudge(self.witness.witness, self.counted.right_scores, self._right_items)

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

    @torch.inference_mode()
    def expected(self, images: jpeg.Pixels) -> Floats:
        """What the witness expects of the records of these images: [images, numbers]."""
        assert self.witness is not None
        features = layout_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        return self.witness.witness.expected(features.numpy())


def with_witness(ensemble: Ensemble) -> Ensemble:
    """The ensemble with the witness in models/witness, if it goes with the models.

    Raises UserError if its files are damaged.
    """
    folder = MODELS / WITNESS
    release = load_witness(folder)
    if name := differing(ensemble, release):
        print(
            f"audit: {folder} is of another run than the models, since their {name} differ: the"
            " items of records are not judged"
        )
        return ensemble
    if release.witness.weight < LEAST_WEIGHT:
        print(
            f"audit: {folder} could not tell swapped records of validation from right ones: the"
            " items of records are not judged"
        )
        return ensemble
    print(f"audit: the items of records are judged too, by {folder}")
    return replace(ensemble, witness=release)


def differing(ensemble: Ensemble, release: WitnessRelease) -> str:
    """What shows that a witness is of another run than the models, or ""."""
    of_models, settings = properties(ensemble.releases[0]), release.settings
    pairs = {
        "counts": (of_models["counts"], settings.labels),
        "image sizes": (of_models["image sizes"], settings.pixels),
        "resizing": (of_models["resizing"], (settings.fit, settings.quality)),
        "validation bins": ({*ensemble.counted.ids}, release.validation.keys()),
    }
    return next((name for name, (of_model, own) in pairs.items() if of_model != own), "")


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
