"""The folder models/pretrained/<model>: weights from a hub, and what they were when they came."""

from pathlib import Path

from stages.formats.tables import write_json
from stages.networks.libraries import library_of
from stages.networks.model_files import (
    CONFIG,
    SOURCE,
    WEIGHTS,
    check_digests,
    digests,
    read_json,
)
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams


def download_pretrained(model: ModelParams, folder: Path) -> None:
    """Put the pretrained weights, their config and source.json into `folder`, this one last.

    Raises UserError where the source does not have them or could not be reached.
    """
    record_source(folder, library_of(model.library).download(model, folder))


def record_source(folder: Path, source: str) -> None:
    """Write source.json: the URL that the weights are from, and their SHA-256."""
    files = digests(folder, (CONFIG, WEIGHTS))
    write_json(folder / SOURCE, {"pretrained": True, "source": source, "sha256": files})


def mark_random_start(folder: Path) -> None:
    """Write source.json for a model without pretrained weights."""
    write_json(folder / SOURCE, {"pretrained": False})


def check_pretrained(folder: Path) -> None:
    """Raise UserError where the weights are not those that the pretrained stage put there."""
    record = folder / SOURCE
    source = read_json(record)
    if source.get("pretrained") is False:
        raise UserError(f"{folder} has no weights, only a random start: `dvc repro` gets them")
    check_digests(folder, (CONFIG, WEIGHTS), source.get("sha256", {}), record)
