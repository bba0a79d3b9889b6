"""The files that go into the bucket for a SageMaker job, and those that come back."""

import gzip
import re
import shutil
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

#: The code that a job runs, by its paths in the repository.
ENTRY = Path("cloud/sagemaker_entry.py")
CODE = [ENTRY, Path("stages"), Path("params.yaml"), Path("requirements.txt")]
#: The content of model.tar.gz: the model, none of whose files is code, and its training curves.
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
    """The URLs of a job's folders in the bucket, and of each of its files.

    The folders are named by digests of their content. So files are sent only once, and a job finds
    the checkpoints of an earlier job with the same inputs.
    """

    code: str
    data: str
    checkpoints: str
    files: dict[str, Path]


def collect_inputs(model: str, bucket: str) -> Inputs:
    """The inputs of the train stage. Raises UserError for a bad bucket or a missing input."""
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/.+)?", bucket) is None:
        raise UserError(f"--bucket is {bucket}, but should be like s3://bucket/folder")
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


def files_in(sources: list[Path]) -> list[Path]:
    """The files of all folders and files in `sources`. Raises UserError if one is missing."""
    found = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} is missing: run `dvc pull {source}`, or `dvc repro`")
        inside = [path for path in source.rglob("*") if "__pycache__" not in path.parts]
        found += sorted(filter(Path.is_file, inside)) if source.is_dir() else [source]
    return found


def digest_of(files: list[Path]) -> str:
    return digest([path.as_posix() for path in files], digest_files(files))[:16]


def upload(inputs: Inputs, s3: "S3ServiceResource") -> None:
    """Send the files that the bucket lacks."""
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
    """Write the content of the job's model.tar.gz as the outputs of the train stage."""
    bucket, key = split_url(url)
    with exclusive_run(f"train {model}"), scratch("sagemaker") as folder:
        archive, unpacked = folder / "model.tar.gz", folder / "model"
        s3.Bucket(bucket).download_file(key, str(archive))
        unpack(archive, unpacked)
        write_text(paths.REPORTS / model / CURVES, (unpacked / CURVES).read_text("utf-8"))
        (unpacked / CURVES).unlink()
        publish_folder(unpacked, paths.MODELS / model)


def unpack(path: Path, folder: Path) -> None:
    """Unpack the archive. Raises UserError if it is damaged or its files are not FILES."""
    folder.mkdir(parents=True)
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                unpack_member(archive, member, folder)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise UserError(
            f"model.tar.gz is damaged ({error}): --attach to the job again to fetch it once more"
        ) from None
    if missing := FILES - {entry.name for entry in folder.iterdir()}:
        raise UserError(f"model.tar.gz lacks {', '.join(sorted(missing))}")


def unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Unpack a file of FILES by its own name; skip the archive's root, and refuse all else."""
    name = member.name.removeprefix("./")
    if name == "." and member.isdir():
        return
    content = archive.extractfile(member) if member.isfile() and name in FILES else None
    if content is None:
        raise UserError(f"model.tar.gz contains {name!a}, which is not a file of a model")
    with content, (folder / name).open("wb") as file:
        shutil.copyfileobj(content, file)


def split_url(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key
