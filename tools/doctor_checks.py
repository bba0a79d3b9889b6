"""The checks of tools/doctor.py that need the installed packages and a git repository."""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import obstore
import torch
from dvc.repo import Repo
from dvc_objects.fs.generic import test_links
from dvc_objects.fs.local import LocalFileSystem
from obstore.store import S3Store

from stages.collecting.bucket import PHOTOGRAPHS, RECORDS, Store, explained, open_bucket
from stages.runtime.errors import UserError
from stages.runtime.params import Params, load_params
from stages.runtime.work import DAYS_KEPT
from tools.results import Result, first_line, first_three, ok, output, problem, warning
from tools.s3 import CLIENT_ENVIRONMENT

if TYPE_CHECKING:
    from obstore.store import ClientConfig

REQUEST_SECONDS = 4
ORIGINAL_BYTES = 60_000
JPEG_BYTES = 12_000  # at 224 pixels
MODEL_BYTES = 2 * 10**9

NO_ANSWER = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "SSLError"}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
NOT_ALLOWED = {"AccessDenied", "403", "EACCES", "EPERM", "EROFS"}
# By S3's code: what it means, and the settings of the remote that mend it.
ANSWERS = {
    "NoSuchBucket": ("names a bucket that does not exist", "url"),
    "404": ("names a bucket that does not exist", "url"),
    "PermanentRedirect": ("is in another region", "region"),
    "301": ("is in another region", "region"),
    "AuthorizationHeaderMalformed": ("is in another region", "region"),
    "AccessDenied": ("refuses access", "access_key_id"),
    "403": ("refuses access", "access_key_id"),
    "InvalidAccessKeyId": ("does not know the access key", "access_key_id"),
    "SignatureDoesNotMatch": ("does not accept the secret key", "access_key_id"),
    "ExpiredToken": ("does not accept the session token any more", "access_key_id"),
    "InvalidToken": ("does not accept the session token", "access_key_id"),
}


def check_gpu() -> Result:
    if torch.cuda.is_available():
        numbers = range(torch.cuda.device_count())
        gpus = [torch.cuda.get_device_properties(number) for number in numbers]
        return ok(first_three([f"{gpu.name}, {gigabytes(gpu.total_memory)}" for gpu in gpus]))
    if shutil.which("nvidia-smi") and output("nvidia-smi", "-L").startswith("GPU"):
        text = f"torch {torch.__version__} cannot use the one that nvidia-smi lists"
        return problem(text, f"install a driver for CUDA {torch.version.cuda} or newer")
    return warning("none; enough for `make demo`", "train on a machine with one")


def check_params() -> Result:
    try:
        params = load_params()
    except UserError as error:
        return problem(str(error), "edit params.yaml; README lists its keys")
    return ok(f"valid: {params.subset.bins} bins, {' and '.join(params.train)}")


def check_bucket() -> Result:
    """That of the photographs: both folders are there, and an object of each can be read."""
    try:
        bucket = load_params().bucket
    except UserError:
        return warning("not checked, since params.yaml is not valid", "see above")
    try:
        store = impatient(open_bucket(bucket))
        with explained(bucket):
            for folder in (RECORDS, PHOTOGRAPHS):
                key = first_key(store, folder)
                if key is None:
                    text = f"{bucket.url} has nothing in {folder}"
                    return problem(text, "set bucket.url in params.yaml, or fill the bucket")
                obstore.head(store, key)
    except UserError as error:
        # Without what the client did on the way.
        text = re.sub(r"Generic S3 error: .* - ", "", str(error)).partition("; the next run")[0]
        text, _, mend = text.partition(". Check ")
        return problem(text, f"check {mend}" if mend else "set the block bucket in params.yaml")
    how = "anonymously" if bucket.anonymous else "with the keys of the environment"
    return ok(f"{bucket.url}: {RECORDS} and {PHOTOGRAPHS} can be read {how}")


def impatient(store: Store) -> Store:
    """The same store, but it gives up at once where there is no answer."""
    if not isinstance(store, S3Store):
        return store
    seconds = f"{REQUEST_SECONDS}s"
    options = dict(store.client_options or {}, connect_timeout=seconds, timeout=seconds)
    return S3Store(
        config=store.config,
        prefix=store.prefix,
        client_options=cast("ClientConfig", options),
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)},
    )


def first_key(store: Store, folder: str) -> str | None:
    for page in obstore.list(store, folder, chunk_size=1):
        for found in page:
            return found["path"]
    return None


def check_remote() -> Result:
    """DVC's remote: a small object can be written, read and deleted."""
    with Repo(".") as repo:
        name = repo.config["core"].get("remote")
        if name not in repo.config["remote"]:
            return problem(
                "DVC has none", "dvc remote add --default storage s3://<bucket>/<folder>"
            )
        settings = repo.config["remote"][name]
        if "//your-bucket/" in settings["url"]:
            mend = setting(name, "url", "s3://<bucket>/<folder>")
            return warning("not set yet: `dvc push` and `dvc pull` need a bucket of yours", mend)
        if settings["url"].startswith("s3://"):
            settings |= {"connect_timeout": REQUEST_SECONDS, "read_timeout": REQUEST_SECONDS}
        place = location(settings)
        try:
            remote = repo.cloud.get_remote(name)
            # s3fs tries five times where there is no answer, beside botocore.
            remote.fs.fs.retries = 1
            return try_remote(place, remote.fs, remote.path)
        except Exception as error:  # noqa: BLE001 - each kind of remote has errors of its own
            return remote_problem(error, name, place, settings)


def setting(name: str, key: str, value: str) -> str:
    return f"dvc remote modify --local {name} {key} {value}"


def location(settings: dict[str, Any]) -> str:
    """The remote's URL and endpoint, without a user and password in them."""
    urls = filter(None, [settings["url"], settings.get("endpointurl")])
    return " at ".join(re.sub(r"//[^/]*@", "//", url) for url in urls)


def try_remote(place: str, fs: Any, path: str) -> Result:
    """Raises what the file system raises, but where only writing is not allowed."""
    folder = fs.join(path, ".doctor")
    probe = fs.join(folder, uuid.uuid4().hex)
    # Before all writing, which waits for ever where a server takes connections and says nothing.
    list(fs.find(folder))
    try:
        fs.makedirs(folder)
        fs.pipe_file(probe, b"doctor")
    except OSError as error:
        if code_of(error) not in NOT_ALLOWED:
            raise
        mend = "enough for `dvc pull`; for `dvc push` allow these credentials to put and delete"
        return problem(f"{place} can be read, but not written", mend)
    try:
        if fs.cat_file(probe) != b"doctor":
            return problem(f"{place} gives back other bytes than it was given", "use another")
    finally:
        fs.rm_file(probe)
        if fs.protocol == "local":
            fs.rmdir(folder)
    return large_files(place) or ok(f"{place}: an object was written, read and deleted")


def large_files(place: str) -> Result | None:
    """A warning where tools/s3.py serves the remote, and its clients were not told: see there."""
    name = "AWS_REQUEST_CHECKSUM_CALCULATION"
    host = urlsplit(place.rpartition(" at ")[2]).hostname
    if host not in {"127.0.0.1", "localhost"} or os.environ.get(name):
        return None
    text = f"{place} can be written and read, but rclone's server gives no file above 50 MB"
    return warning(text, f"export {name}={CLIENT_ENVIRONMENT[name]}")


def remote_problem(error: Exception, name: str, place: str, settings: dict[str, Any]) -> Result:
    """What the error means, and the command that mends it."""
    kinds = {type(cause).__name__ for cause in causes(error)}
    mends = {
        "url": f"create it, or {setting(name, 'url', 's3://<bucket>/<folder>')}",
        "region": setting(name, "region", "<region>"),
        "access_key_id": f"{setting(name, 'access_key_id', '<key>')}, and secret_access_key",
        "endpointurl": setting(name, "endpointurl", "http://<host>:<port>"),
    }
    if kinds & NO_CREDENTIALS:
        text = f"{place}: there are no credentials for it ({first_line(error)})"
        return problem(without_secrets(text, settings), mends["access_key_id"])
    if kinds & NO_ANSWER or "endpoint" in first_line(error):
        mend = mends["endpointurl"]
        if "endpointurl" not in settings:
            mend = f"check the network; for a server other than Amazon's: {mend}"
        return problem(f"{place} does not answer", mend)
    code = code_of(error)
    if code in ANSWERS:
        answer, key = ANSWERS[code]
        return problem(f"{place} {answer} ({code})", mends[key])
    text = without_secrets(f"{place}: {type(error).__name__}: {first_line(error)}", settings)
    return problem(text, f"check the remote {name} in .dvc/config and .dvc/config.local")


def code_of(error: Exception) -> str:
    """The code of S3's answer, or the name of the system's error; empty if it is neither."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return errno.errorcode.get(getattr(error, "errno", None) or 0, "")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def without_secrets(text: str, settings: dict[str, Any]) -> str:
    for key, value in [*settings.items(), *os.environ.items()]:
        words = ("key", "secret", "token", "password")
        if value and any(word in key.lower() for word in words):
            text = text.replace(str(value), "***")
    return text


def check_links() -> Result:
    """How DVC puts files of its cache into place."""
    cache = cache_folder()
    place = cache.relative_to(Path.cwd()) if cache.is_relative_to(Path.cwd()) else cache
    found = links()
    if found:
        return ok(f"{place}: {found[0]}s, so data takes its space once")
    mend = "dvc cache dir --local <a folder on this disk>, if it can do hard links"
    return warning(f"{place}: copies, so data takes its space twice", mend)


def links() -> list[str]:
    """The kinds that .dvc/config allows and the disks can do; the first is the one in use."""
    with Repo(".") as repo:
        kinds = [kind for kind in repo.cache.local.cache_types if kind != "copy"]
    disk = LocalFileSystem()  # type: ignore[no-untyped-call]
    return list(test_links(kinds, disk, str(existing(cache_folder())), disk, f"{Path.cwd()}/x"))


def cache_folder() -> Path:
    with Repo(".") as repo:
        return Path(repo.cache.local_cache_dir)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(path for path in [folder, *folder.parents] if path.is_dir())


def check_disk() -> Result:
    """Free space, against what the params need beyond what is in data/ and models/ already.

    A photograph takes 60 kB as it is, and 12 kB as a JPEG of 224 pixels, in proportion to the
    area; the latter twice, since training packs them for its processes. Weights and checkpoints
    take 2 GB. DVC's cache takes the same again, where it has no links.
    """
    try:
        needed = needed_bytes(load_params())
    except UserError:
        return warning("not checked, since params.yaml is not valid", "see above")
    needed = max(needed - size_of(Path("data")) - size_of(Path("models")), 0)
    here, cache = Path.cwd(), existing(cache_folder())
    if here.stat().st_dev == cache.stat().st_dev and not links():
        needed *= 2
    free = min(shutil.disk_usage(folder).free for folder in (here, cache))
    text = f"{gigabytes(free)} free, {gigabytes(needed)} needed"
    if free < needed:
        return problem(text, "free some, or set a smaller subset.bins in params.yaml")
    return ok(text)


def needed_bytes(params: Params) -> int:
    """See check_disk."""
    jpeg = JPEG_BYTES * (params.resize.size / 224) ** 2
    return round(params.subset.bins * (ORIGINAL_BYTES + 2 * jpeg)) + MODEL_BYTES


def check_unfinished() -> Result:
    """What killed runs left for the next one with the same inputs."""
    days = {
        path: (time.time() - newest(path)) / 86_400
        for path in sorted(Path(".cache").glob("*/"))
        if path.is_dir()
    }
    old = [path for path in days if days[path] > DAYS_KEPT]
    described = first_three(
        [
            f"{path.name}, {gigabytes(size_of(path))}, {days[path]:.0f} days old"
            for path in old or days
        ]
    )
    if old:
        return warning(f"{described}: nobody goes on", f"rm -r {' '.join(map(str, old))}")
    return ok(f"{described}; the next run goes on there" if days else "no work left in .cache")


def newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


CHECKS: dict[str, Callable[[], Result]] = {
    "GPU": check_gpu,
    "params.yaml": check_params,
    "bucket": check_bucket,
    "DVC remote": check_remote,
    "DVC cache": check_links,
    "disk": check_disk,
    "unfinished": check_unfinished,
}
