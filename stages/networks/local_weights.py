"""Pretrained weights from a disk: checks, and a copy."""

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stages.formats.tables import write_json
from stages.networks.model_files import CONFIG, WEIGHTS, read_json_object, reason_of
from stages.runtime.errors import UserError
from stages.runtime.files import atomic_write, sha256_file
from stages.runtime.params import ModelParams

# The file that lists the parts of weights in several files.
INDEX = "model.safetensors.index.json"


def copy_weights(params: ModelParams, path: Path, folder: Path) -> str:
    """Copy the weights at `path` to `folder`, as config.json and model.safetensors.

    `path` is a folder with these two files, or for torchvision and timm, a safetensors file with
    the network's state dict. Returns the file's name, without the folders of this machine. Raises
    UserError if the weights cannot be read, or are not those of `revision`.
    """
    weights = _find(path, params.library)
    _check_format(weights)
    _check_revision(weights, params.revision)
    if path.is_dir():
        _copy(path / CONFIG, folder / CONFIG)
    else:
        write_json(folder / CONFIG, {"library": params.library, "name": params.name})
    _copy(weights, folder / WEIGHTS)
    return weights.resolve().name if path.is_file() else f"{path.resolve().name}/{WEIGHTS}"


def _find(path: Path, library: str) -> Path:
    """The file with the weights. Raises UserError if it or its config.json cannot be used."""
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise UserError(f"there is no {path}, the path in this model's key pretrained")
    if library == "transformers":
        raise UserError(
            f"{path} is one file, but transformers also needs its {CONFIG}: set pretrained to the"
            " folder that has both"
        )
    return path


def _find_in_folder(folder: Path) -> Path:
    if (folder / INDEX).exists():
        raise UserError(
            f"{folder} has its weights in several files, as {INDEX} says, but one is needed: save"
            ' the network again with save_pretrained(folder, max_shard_size="1TB")'
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} has no {name}: save the network again, with save_pretrained of"
                " transformers or save_for_hf(..., safe_serialization=True) of timm"
            )
    try:
        read_json_object(folder / CONFIG)
    except UserError:
        raise UserError(f"{folder / CONFIG} is not a JSON object: copy the folder again") from None
    return folder / WEIGHTS


def _check_format(path: Path) -> None:
    """Raise UserError if the file is not safetensors. It is not read in any other way."""
    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(2)
        # torch.save writes a ZIP archive with a pickle, and once wrote a plain pickle.
        if start == b"PK" or start[:1] == b"\x80":
            raise UserError(
                f"{path} is a pickle, which may run code when it is read: convert it with"
                " safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
            ) from None
        raise UserError(f"{path} is not a safetensors file: {reason_of(error)}") from None


def _check_revision(path: Path, revision: str) -> None:
    found = sha256_file(path)
    if len(revision) < 8 or not found.startswith(revision):
        raise UserError(
            f"{path} has the SHA-256 {found}, which does not begin with this model's revision,"
            f' {revision}: if it is the file that you mean, set revision to "{found[:16]}"'
        )


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
