"""The models of an audit: their mean is what a photograph looks like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stages.imaging import jpeg
from stages.networks import inference
from stages.networks.calibration import Floats
from stages.networks.release import (
    SETTINGS,
    Release,
    load_release,
    probability_columns,
)
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files
from stages.runtime.paths import MODELS, REPORTS
from stages.scoring.verification import threshold_for
from tools.audit.objects import Content


class Prepared(NamedTuple):
    """Photographs as pixels: `images` uint8 [readable ones, size, size, 3].

    `problems` has one for each photograph, "" for the readable ones.
    """

    ids: list[str]
    images: jpeg.Pixels
    problems: list[str]


@dataclass(frozen=True)
class Ensemble:
    """Models for the same images and labels, validated on the same bins."""

    folders: list[Path]
    releases: list[Release]

    @property
    def labels(self) -> list[int]:
        return self.releases[0].classifier.labels

    @property
    def identity(self) -> str:
        """Changes with whatever decides the probabilities."""
        files = [sorted(filter(Path.is_file, folder.iterdir())) for folder in self.folders]
        return digest(*map(digest_files, files), [release.settings for release in self.releases])

    @property
    def validation_bins(self) -> int:
        return len(self.releases[0].validation)

    def threshold(self, false_alarm: float) -> float:
        """The score below which that share of the right claims on the validation bins is."""
        columns = probability_columns(self.labels)
        tables = [release.validation.sort_values("id") for release in self.releases]
        probabilities = np.mean([table[columns].to_numpy() for table in tables], axis=0)
        places = [self.labels.index(count) for count in tables[0]["actual"]]
        return threshold_for(probabilities[np.arange(len(places)), places], false_alarm)

    def prepare(self, contents: Sequence[Content]) -> Prepared:
        """Decode, and resize what has another size, to the pixels that the resize stage makes."""
        size = self.releases[0].classifier.size
        images, problems = [], []
        for content in contents:
            try:
                images.append(self._pixels(content))
                problems.append("")
            except jpeg.ImageError as error:
                problems.append(f"unreadable photograph: {' '.join(str(error).split())}")
        stacked = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
        return Prepared([content.id for content in contents], stacked, problems)

    def _pixels(self, content: Content) -> jpeg.Pixels:
        if content.problem:
            raise jpeg.ImageError(content.problem)
        size, settings = self.releases[0].classifier.size, self.releases[0].settings
        pixels = jpeg.decode(content.data)
        if pixels.shape[:2] == (size, size):
            return pixels
        resized = jpeg.resize(pixels, size, settings.fit)
        return jpeg.decode(jpeg.encode(resized, settings.quality))

    @cached_property
    def _normalizers(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        return [inference.normalizer(release.classifier) for release in self.releases]

    @torch.inference_mode()
    def probabilities(self, images: jpeg.Pixels) -> Floats:
        """The calibrated probability of each label, the mean over the models, [images, labels]."""
        if not len(images):
            return np.empty((0, len(self.labels)))
        device = self.releases[0].classifier.device
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device) / 255
        found = []
        for release, normalized in zip(self.releases, self._normalizers, strict=True):
            with inference.autocast(device):
                logits = release.classifier.logits(normalized(pixels))
            found.append(release.calibrated(logits.float().softmax(1).cpu().numpy()))
        mean: Floats = np.mean(found, axis=0)
        return mean


def load_ensemble(folders: Sequence[Path]) -> Ensemble:
    """Those models, or all of models/ where none is named, on the device where they will work.

    Raises UserError where one is no release, or they cannot be averaged.
    """
    folders = folders or sorted(MODELS / path.parent.name for path in REPORTS.glob(f"*/{SETTINGS}"))
    if not folders:
        raise UserError(f"no model was evaluated here: `dvc pull`, or give --model {MODELS}/<name>")
    ensemble = Ensemble(list(folders), [load_model(folder) for folder in folders])
    for folder, release in zip(folders[1:], ensemble.releases[1:], strict=True):
        refuse_other(folders[0], ensemble.releases[0], folder, release)
    device = inference.default_device()
    for release in ensemble.releases:
        inference.place(release.classifier, device)
    return ensemble


def load_model(folder: Path) -> Release:
    try:
        return load_release(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is no model that was evaluated: there is no {error.filename}; `dvc pull`"
            " has models and reports"
        ) from None


def refuse_other(folder: Path, one: Release, other_folder: Path, other: Release) -> None:
    """Raise UserError where the mean of two models would mean nothing."""
    columns = ["id", "actual"]
    bins = [release.validation[columns].sort_values("id").to_numpy() for release in (one, other)]
    facts: dict[str, list[Any]] = {
        "counts": [release.classifier.labels for release in (one, other)],
        "image sizes": [release.classifier.size for release in (one, other)],
        "resizing": [(r.settings.fit, r.settings.quality) for r in (one, other)],
        "validation bins": [array.tolist() for array in bins],
    }
    for name, (first, second) in facts.items():
        if first != second:
            raise UserError(f"{folder} and {other_folder} cannot be averaged: their {name} differ")
