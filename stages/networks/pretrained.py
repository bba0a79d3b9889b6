"""The folder models/pretrained/<model>: weights to start from, and a record of their source."""

from pathlib import Path

from stages.formats.tables import write_json
from stages.networks.libraries import library_of
from stages.networks.local_weights import copy_weights
from stages.networks.model_files import (
    CONFIG,
    SOURCE,
    WEIGHTS,
    check_digests,
    digests,
    read_json_object,
)
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams
from stages.runtime.work import original_repository


def obtain_pretrained(params: ModelParams, folder: Path) -> None:
    """Copy or download the pretrained weights and their config to `folder`, then write source.json.

    Raises UserError if their source does not have them or could not be reached.
    """
    if isinstance(params.pretrained, str):
        path = original_repository() / params.pretrained
        source = copy_weights(params, path, folder)
    else:
        source = library_of(params.library).download(params, folder)
    record_source(folder, source)


def record_source(folder: Path, source: str) -> None:
    """Write source.json: the URL or file name of the weights, and the SHA-256 of the files."""
    files = digests(folder, (CONFIG, WEIGHTS))
    write_json(folder / SOURCE, {"pretrained": True, "source": source, "sha256": files})


def mark_random_start(folder: Path) -> None:
    """Write source.json for a model without pretrained weights."""
    write_json(folder / SOURCE, {"pretrained": False})


def check_pretrained(folder: Path) -> None:
    """Raise UserError if the weights are not those that the pretrained stage wrote."""
    record = folder / SOURCE
    source = read_json_object(record)
    if source.get("pretrained") is False:
        raise UserError(
            f"{folder} has no weights, since pretrained was false: `dvc repro` downloads them"
        )
    check_digests(folder, (CONFIG, WEIGHTS), source.get("sha256", {}), record)
