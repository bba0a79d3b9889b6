"""What goes into the bucket for a SageMaker job, and what comes back."""

import gzip
import io
import posixpath
import re
import shutil
import subprocess
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.work import only_run_here, publish_folder, scratch

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Of what git tracks, what the train stage needs: a change elsewhere makes no other job of it.
CODE = ["stages", "params.yaml", "requirements.txt"]
ARCHIVE = "code.tar.gz"
ENTRY = Path(__file__).with_name("sagemaker_entry.py")
MODELS, REPORTS = Path("models"), Path("reports")
#: What model.tar.gz holds. The weights are safetensors: nothing in it is code.
CURVES = "curves.csv"
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", CURVES}
UPLOADS = 8


@dataclass(frozen=True)
class Inputs:
    """What a job reads, each file by its place in the bucket.

    The folders, URLs, are named by their content: what is there already is not sent again, and a
    job finds the checkpoints of an earlier one with the same inputs.
    """

    code: str
    data: str
    checkpoints: str
    files: dict[str, bytes | Path]


def collect_inputs(model: str, bucket: str) -> Inputs:
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/.+)?", bucket) is None:
        raise UserError(f"--bucket {bucket}: write s3://bucket/folder")
    root, entry, archive = bucket.rstrip("/"), ENTRY.read_bytes(), pack_code()
    paths = data_files(model)
    of_code, of_data = digest(entry, archive)[:16], digest(paths, digest_files(paths))[:16]
    code, data = f"{root}/code/{of_code}", f"{root}/data/{of_data}"
    files: dict[str, bytes | Path] = {f"{code}/{ENTRY.name}": entry, f"{code}/{ARCHIVE}": archive}
    files |= {f"{data}/{path.as_posix()}": path for path in paths}
    return Inputs(code, data, f"{root}/checkpoints/{model}-{of_code}-{of_data}", files)


def pack_code() -> bytes:
    """A tar.gz of what git tracks of CODE, as it is on the disk; the same bytes for the same files.

    Raises UserError where git does not track some of it, which the job would lack.
    """
    if new := git_files("--others", "--exclude-standard"):
        raise UserError(f"git does not track {new[0]}, and the job would not have it: `git add` it")
    buffer = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in git_files("--cached"):
            # One that is deleted, but not yet for git, is none.
            if Path(name).is_file():
                member = tarfile.TarInfo(name)
                content = Path(name).read_bytes()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def git_files(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options, "--", *CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git cannot tell what to send: {' '.join(done.stderr.split())}")
    return sorted(filter(None, done.stdout.split("\0")))


def data_files(model: str) -> list[Path]:
    """What the train stage reads, by dvc.yaml. Raises UserError where it is not here."""
    found = []
    for place in (Path("data/resized"), Path("data/split.csv"), MODELS / "pretrained" / model):
        if not place.exists():
            raise UserError(f"{place} is missing: `dvc pull {place}`, or `dvc repro` makes it")
        found += sorted(place.iterdir()) if place.is_dir() else [place]
    return found


def upload(inputs: Inputs, s3: "S3Client") -> None:
    """Send what the bucket lacks. Raises UserError where there is no such bucket."""
    bucket, _ = split_url(inputs.code)
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        raise UserError(
            f"the bucket {bucket} cannot be reached ({one_line(error)}): create it, or let these"
            " credentials use it"
        ) from None
    missing = {url: file for url, file in inputs.files.items() if not is_there(url, file, s3)}
    print(f"sagemaker: {len(missing)} of {len(inputs.files)} files to send", flush=True)

    def send(url: str) -> None:
        file, (bucket, key) = missing[url], split_url(url)
        body = io.BytesIO(file) if isinstance(file, bytes) else file.open("rb")
        with body:
            s3.upload_fileobj(body, bucket, key)

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(send, missing))


def is_there(url: str, file: bytes | Path, s3: "S3Client") -> bool:
    """By its size, as its folder is named by its content."""
    bucket, key = split_url(url)
    try:
        found = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return found == (len(file) if isinstance(file, bytes) else file.stat().st_size)


def fetch(url: str, model: str, s3: "S3Client") -> None:
    bucket, key = split_url(url)
    with only_run_here(f"train {model}"), scratch("sagemaker") as folder:
        path = folder / "model.tar.gz"
        s3.download_file(bucket, key, str(path))
        unpacked = folder / "model"
        unpack(path, unpacked)
        curves = (unpacked / CURVES).read_text("utf-8")
        (unpacked / CURVES).unlink()
        publish_folder(unpacked, MODELS / model)
        write_text(REPORTS / model / CURVES, curves)


def unpack(path: Path, folder: Path) -> None:
    """Raises UserError where the archive holds anything but FILES, or is damaged."""
    folder.mkdir()
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if member.isdir() and name == ".":
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or name not in FILES:
                    raise UserError(f"model.tar.gz holds {name!a}, which is no file of a model")
                with (folder / name).open("wb") as target:
                    shutil.copyfileobj(file, target)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"model.tar.gz is damaged ({error}): run again with --attach") from None
    if missing := FILES - {found.name for found in folder.iterdir()}:
        raise UserError(f"model.tar.gz lacks {', '.join(sorted(missing))}")


def split_url(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
