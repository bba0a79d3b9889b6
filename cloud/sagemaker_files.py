"""What goes into the bucket for a SageMaker job, and what comes back."""

import gzip
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime import paths
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.work import exclusive_run, publish_folder, scratch

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3ServiceResource

#: What a job runs, by its place in the repository and in the bucket.
ENTRY = Path("cloud/sagemaker_entry.py")
CODE = [ENTRY, Path("stages"), Path("params.yaml"), Path("requirements.txt")]
#: What model.tar.gz holds: the model, in which nothing is code, and the curves of its training.
CURVES = "curves.csv"
FILES = {
    "config.json",
    "inference.json",
    "model.safetensors",
    "preprocessor_config.json",
    "validation.csv",
    CURVES,
}


@dataclass(frozen=True)
class Inputs:
    """The folders of the bucket that a job reads, as URLs, and every file by its own URL.

    The folders are named by their content: what is there already isn't sent again, and a job finds
    the checkpoints of an earlier one with the same inputs.
    """

    code: str
    data: str
    checkpoints: str
    files: dict[str, Path]


def collect_inputs(model: str, bucket: str) -> Inputs:
    """Raises UserError if `bucket` isn't s3://bucket/folder, or if an input is missing."""
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/.+)?", bucket) is None:
        raise UserError(f"--bucket {bucket}: write s3://bucket/folder")
    root = bucket.rstrip("/")
    code = files_in(CODE)
    data = files_in([paths.RESIZED, paths.SPLIT, paths.PRETRAINED / model])
    of_code, of_data = digest_of(code), digest_of(data)
    return Inputs(
        code=f"{root}/code/{of_code}",
        data=f"{root}/data/{of_data}",
        checkpoints=f"{root}/checkpoints/{model}-{of_code}-{of_data}",
        files={f"{root}/code/{of_code}/{path.as_posix()}": path for path in code}
        | {f"{root}/data/{of_data}/{path.as_posix()}": path for path in data},
    )


def files_in(places: list[Path]) -> list[Path]:
    found = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place} is missing: `dvc pull {place}`, or `dvc repro` makes it")
        inside = [path for path in place.rglob("*") if "__pycache__" not in path.parts]
        found += sorted(filter(Path.is_file, inside)) if place.is_dir() else [place]
    return found


def digest_of(files: list[Path]) -> str:
    return digest([path.as_posix() for path in files], digest_files(files))[:16]


def upload(inputs: Inputs, s3: "S3ServiceResource") -> None:
    """Send what the bucket lacks."""
    there = set()
    for folder in (inputs.code, inputs.data):
        bucket, key = split_url(folder)
        there |= {found.key for found in s3.Bucket(bucket).objects.filter(Prefix=f"{key}/")}
    missing = {url: path for url, path in inputs.files.items() if split_url(url)[1] not in there}
    print(f"sagemaker: sending {len(missing)} of {len(inputs.files)} files", flush=True)
    for url, path in missing.items():
        bucket, key = split_url(url)
        s3.Bucket(bucket).upload_file(str(path), key)


def fetch(url: str, model: str, s3: "S3ServiceResource") -> None:
    """Put the job's model.tar.gz where the train stage puts its outputs."""
    bucket, key = split_url(url)
    with exclusive_run(f"train {model}"), scratch("sagemaker") as folder:
        archive, unpacked = folder / "model.tar.gz", folder / "model"
        s3.Bucket(bucket).download_file(key, str(archive))
        unpack(archive, unpacked)
        write_text(paths.REPORTS / model / CURVES, (unpacked / CURVES).read_text("utf-8"))
        (unpacked / CURVES).unlink()
        publish_folder(unpacked, paths.MODELS / model)


def unpack(path: Path, folder: Path) -> None:
    """Raises UserError if the archive holds anything but FILES, or is damaged."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"model.tar.gz is damaged ({error}): run again with --attach") from None
    found = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*")}
    if odd := [name for name in found if name not in FILES or found[name].is_symlink()]:
        raise UserError(f"model.tar.gz holds {odd[0]!a}, which isn't a file of a model")
    if missing := FILES - found.keys():
        raise UserError(f"model.tar.gz lacks {', '.join(sorted(missing))}")


def split_url(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key
