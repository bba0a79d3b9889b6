"""The files of a model: read as data only, and checked before a library gets them.

They come from hubs, from DVC's remote and from people. Nothing unpickles them, and nothing imports
or opens what they name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.formats.tables import write_json
from stages.runtime.errors import UserError
from stages.runtime.files import sha256_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SOURCE = "source.json"
# One that names the 22,000 classes of ImageNet twice has 2 MB.
_MOST_JSON_BYTES = 16_000_000
_BACK = "remove it, and `dvc checkout`, `dvc pull` or `dvc repro` brings it back"


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): {_BACK}")


def reason_of(error: Exception) -> str:
    """The error's text in one line, short and without what a terminal would obey.

    Libraries repeat in it what a file holds.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter for letter in text[:400] if letter.isprintable())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file is. Raises UserError where it is something else."""
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise damaged(path, f"it has {path.stat().st_size:,} bytes")
    try:
        found = json.loads(path.read_bytes())
    # What is no text is a ValueError too; a thousand brackets are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no JSON: {reason_of(error)}") from None
    if not isinstance(found, dict):
        raise damaged(path, "no JSON object")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises UserError where it is damaged."""
    try:
        weights = load_file(path)
        # Of the types of floats, some have no test for it.
        not_finite = [
            name
            for name, values in weights.items()
            if values.is_floating_point() and not torch.isfinite(values.float()).all()
        ]
    # A KeyError or RuntimeError is a type of numbers that torch has not, or does nothing with.
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise damaged(path, f"no safetensors: {reason_of(error)}") from None
    if not_finite:
        raise damaged(path, f"its {not_finite[0]!a:.100} has numbers that are not finite")
    return weights


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of these files."""
    return {name: sha256_file(folder / name) for name in names}


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def check_digests(folder: Path, expected: Mapping[str, str], what: str, record: Path) -> None:
    """Raise UserError, naming the file, where one is not what was `what`, like "downloaded".

    `expected` has the SHA-256 of each file, as the file `record` has it.
    """
    for name, digest in expected.items():
        path = folder / name
        if sha256_file(path) != digest:
            raise UserError(
                f"{path} is not the file that was {what}: its SHA-256 is not the one in {record}:"
                f" {_BACK}"
            )


def record_source(folder: Path, source: str) -> None:
    """Put source.json beside the weights: where they are from, and what they are."""
    files = digests(folder, (CONFIG, WEIGHTS))
    write_json(folder / SOURCE, {"pretrained": True, "source": source, "sha256": files})


def check_pretrained(folder: Path) -> None:
    """Raise UserError where the weights there are not those that the pretrained stage put there."""
    record = folder / SOURCE
    source = read_json(record)
    if source.get("pretrained") is False:
        raise UserError(f"{folder} has no weights, only a random start: `dvc repro` gets them")
    found = source.get("sha256")
    names = {CONFIG, WEIGHTS}
    if (
        not isinstance(found, dict)
        or found.keys() != names
        or not all(map(is_sha256, found.values()))
    ):
        raise damaged(record, f"it lacks the SHA-256 of {CONFIG} and {WEIGHTS}")
    check_digests(folder, found, "downloaded", record)
