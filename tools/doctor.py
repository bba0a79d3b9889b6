"""Check this machine for everything that the project needs, and say how to fix what is missing.

A problem would stop a stage, an experiment, `dvc push` or `dvc pull`; a warning is only a
limitation. The exit code is 1 if there is a problem. No secret is printed and nothing is changed,
except that a small object is written to the DVC remote and deleted again.
"""

# This file imports only the standard library here, and runs on an old Python, because the checks
# have to report missing packages and an old Python. A check returns good news, or raises Finding.
from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - not in collections.abc of old Pythons

from stages.runtime.errors import UserError

REQUEST_SECONDS = 4
PHOTOGRAPH_BYTES = 60_000
JPEG_BYTES = 12_000  # at 224 pixels
MODEL_BYTES = 2 * 10**9  # weights and checkpoints


class Finding(Exception):  # noqa: N818 - some are only warnings
    """What a check found, and how to fix it: a command or a sentence."""

    def __init__(self, text: str, fix: str = "", state: str = "problem") -> None:
        super().__init__(text)
        self.fix = fix
        self.state = state


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.doctor", description=__doc__).parse_args()
    # Libraries' own messages would repeat the findings in less plain words.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # Botocore would try five times.
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
    try:
        problems = sum(is_problem(name, check) for name, check in FIRST_CHECKS.items())
        if not problems:
            problems = sum(is_problem(name, check) for name, check in CHECKS.items())
    except KeyboardInterrupt:
        print("doctor: interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"{problems} problem{'s' * (problems > 1)}" if problems else "nothing would fail")
    sys.exit(problems > 0)


def is_problem(name: str, check: Callable[[], str]) -> bool:
    """Run a check and print what it finds. Returns whether that is a problem."""
    try:
        found = Finding(check(), state="ok")
    except Exception as error:  # noqa: BLE001 - the other checks run all the same
        found = finding_of(error)
    print(f"{found.state:8} {name:12} {found}", flush=True)
    if found.fix:
        print(f"{'':21} -> {found.fix}", flush=True)
    return found.state == "problem"


def finding_of(error: Exception) -> Finding:
    if isinstance(error, Finding):
        return error
    if isinstance(error, UserError):
        return Finding(str(error))
    if isinstance(error, ModuleNotFoundError):
        return Finding(f"not checked, since {error.name} is not installed", "make setup")
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        return not_ours(Path(error.filename).absolute())
    return Finding(f"not checked: {described(error)}")


def not_ours(path: Path) -> Finding:
    while not os.path.exists(path):  # noqa: PTH110 - Path.exists raises if access is denied
        path = path.parent
    try:
        owner = path.owner()
    except KeyError:
        owner = f"user id {path.stat().st_uid}"
    fix = f"sudo chown -R {os.getuid()} {path}; or, if it is shared, sudo chmod -R g+rwX {path}"
    return Finding(f"{path} belongs to {owner}, and you may not use it", fix)


def described(error: Exception) -> str:
    """One line, without a URL's user and password."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {without_user(line)}"


def without_user(text: str) -> str:
    return re.sub("//[^/@]*@", "//", text)


def first_three(words: list[str]) -> str:
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - an old Python may run this file
        fix = "make setup PYTHON=/path/to/python3.11"
        raise Finding(f"{version}; 3.11 or newer is needed", fix)
    return f"{version}, {sys.executable}"


def check_packages() -> str:
    """Compare the installed packages with requirements.txt."""
    wanted = locked_versions(Path("requirements.txt").read_text("utf-8"))
    # Python imports the first of two packages with one name. torch 2.14.0+cu130 is torch 2.14.0.
    found = {
        re.sub("[._]", "-", package.name).lower(): package.version.partition("+")[0]
        for package in reversed(list(importlib.metadata.distributions()))
    }
    if missing := [name for name in wanted if name not in found]:
        raise Finding(f"{len(missing)} are missing: {first_three(missing)}", "make setup")
    if other := [f"{name} {found[name]}" for name in wanted if found[name] != wanted[name]]:
        raise Finding(f"not as in requirements.txt: {first_three(other)}", "make setup", "warning")
    return f"the {len(wanted)} of requirements.txt"


def locked_versions(requirements: str) -> dict[str, str]:
    """The versions by name in a lock file, from the lines that apply to this machine."""
    from packaging.requirements import Requirement

    lines = re.findall(r"^\w.*==[^\\\n]*", requirements, re.MULTILINE)
    return {
        found.name: str(found.specifier).replace("==", "")
        for found in map(Requirement, map(str.strip, lines))
        if found.marker is None or found.marker.evaluate()
    }


def check_user() -> str:
    try:
        return getpass.getuser()
    # KeyError up to Python 3.12.
    except (KeyError, OSError):
        text = f"user id {os.getuid()} has no name on this machine, and DVC and torch ask for one"
        raise Finding(text, "export USER=<any name>") from None


def check_git() -> str:
    if not shutil.which("git"):
        raise Finding("git is not installed", "install it with the system's package manager")
    status = run("git", "status", "--porcelain")
    if "safe.directory" in status.stderr:
        fix = status.stderr.strip().splitlines()[-1].strip()
        raise Finding("git refuses this repository, since another user owns it", fix)
    if status.returncode:
        raise Finding("this is not a git repository, and DVC needs one", "clone it with git")
    # DVC does not accept a name that git guesses from the machine.
    if run("git", "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT").returncode:
        fix = "git config user.name '<name>'; git config user.email '<address>'"
        raise Finding("git does not know your name, and `dvc exp run --queue` commits", fix)
    if new := [line[3:] for line in status.stdout.splitlines() if line.startswith("??")]:
        raise Finding(f"queued experiments will lack {first_three(new)}", "git add", "warning")
    return "a repository without untracked files, and a name for commits"


def check_params() -> str:
    from stages.runtime.params import load_params

    params = load_params()
    return f"valid: {params.subset.bins} bins, {' and '.join(params.train)}"


def check_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        numbers = range(torch.cuda.device_count())
        gpus = [torch.cuda.get_device_properties(number) for number in numbers]
        return first_three([f"{gpu.name}, {gigabytes(gpu.total_memory)}" for gpu in gpus])
    if shutil.which("nvidia-smi") and run("nvidia-smi", "-L").stdout.startswith("GPU"):
        fix = f"install a driver for CUDA {torch.version.cuda} or newer"
        raise Finding(f"torch {torch.__version__} cannot use the one that nvidia-smi lists", fix)
    raise Finding("none; enough for `make demo`", "train on a machine with one", "warning")


def check_bucket() -> str:
    """Check that an object can be read in both folders of the bucket of photographs."""
    import obstore

    from stages.collecting.advice import explained
    from stages.collecting.bucket import PHOTOGRAPHS, RECORDS, open_bucket
    from stages.runtime.params import load_params

    bucket = load_params().bucket
    store = open_bucket(bucket)
    with explained(bucket):
        for folder in (RECORDS, PHOTOGRAPHS):
            pages = obstore.list(store, folder)
            # Amazon's console marks folders by empty objects, which are skipped.
            key = next((one["path"] for page in pages for one in page if one["size"]), None)
            if key is None:
                fix = "set bucket.url in params.yaml, or fill the bucket"
                raise Finding(f"{bucket.url} has nothing in {folder}", fix)
            obstore.head(store, key)
    how = "anonymously" if bucket.anonymous else "with your credentials"
    return f"{bucket.url}: {RECORDS} and {PHOTOGRAPHS} can be read {how}"


def check_remote() -> str:
    """Check that a small object can be written to DVC's remote, read and deleted."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        name = repo.config["core"].get("remote")
        settings = repo.config["remote"].get(name)
        if settings is None:
            fix = "dvc remote add --default storage s3://<bucket>/<folder>"
            raise Finding("DVC has no default remote", fix)
        change = f"dvc remote modify --local {name}"
        if "//your-bucket/" in settings["url"]:
            text = "not set yet: `dvc push` and `dvc pull` need a bucket that you own"
            raise Finding(text, f"{change} url s3://<bucket>/<folder>", "warning")
        if settings["url"].startswith("s3://"):
            settings |= {"connect_timeout": REQUEST_SECONDS, "read_timeout": REQUEST_SECONDS}
        location = " at ".join(filter(None, [settings["url"], settings.get("endpointurl")]))
        try:
            remote = repo.cloud.get_remote(name)
            # Without an answer, s3fs tries five times, in addition to botocore's tries.
            remote.fs.fs.retries = 1
            try_remote(remote.fs, remote.path)
        except Exception as error:  # noqa: BLE001 - each kind of remote raises its own errors
            fix = f"{change} <key> <value>; keys are url, endpointurl, region, access_key_id, ..."
            raise Finding(f"{without_user(location)}: {described(error)}", fix) from None
    return f"{without_user(location)}: an object was written, read and deleted"


def try_remote(fs: Any, path: str) -> None:
    folder = fs.join(path, ".doctor")
    probe = fs.join(folder, uuid.uuid4().hex)
    # List first: writing waits forever for a server that accepts connections but never answers.
    list(fs.find(folder))
    try:
        fs.makedirs(folder)
        fs.pipe_file(probe, b"doctor")
    except PermissionError:
        raise PermissionError("it can be read, but not written") from None
    fs.cat_file(probe)
    fs.rm_file(probe)


def check_cache() -> str:
    """Check whether DVC can link files from its cache, or has to copy them."""
    from dvc.repo import Repo
    from dvc_objects.fs.generic import test_links
    from dvc_objects.fs.local import LocalFileSystem

    with Repo(".") as repo:
        kinds = [kind for kind in repo.cache.local.cache_types if kind != "copy"]
        cache = Path(repo.cache.local_cache_dir)
    folder = next(path for path in [cache, *cache.parents] if path.is_dir())
    disk = LocalFileSystem()  # type: ignore[no-untyped-call]
    if links := test_links(kinds, disk, str(folder), disk, f"{Path.cwd()}/x"):
        return f"{links[0]}s, so data takes its space once"
    fix = "dvc cache dir --local <a folder on this disk>, if it can do hard links"
    raise Finding("copies, so data takes its space twice", fix, "warning")


def check_disk() -> str:
    """Compare the free space with what the params need, less what data/ and models/ hold already.

    Each photograph is needed three times: as it is, as a resized JPEG (in proportion to its area),
    and packed for the processes of training. The models come on top.
    """
    from stages.runtime.params import load_params

    params = load_params()
    jpeg = JPEG_BYTES * (params.resize.size / 224) ** 2
    needed = params.subset.bins * (PHOTOGRAPH_BYTES + 2 * jpeg) + MODEL_BYTES
    needed = max(needed - size_of(Path("data")) - size_of(Path("models")), 0)
    free = shutil.disk_usage(".").free
    text = f"{gigabytes(free)} free, {gigabytes(needed)} needed"
    if free < needed:
        raise Finding(text, "free some, or set a smaller subset.bins in params.yaml")
    return text


def check_unfinished() -> str:
    """List what interrupted runs have left for the next run with the same inputs."""
    folders = [path for path in sorted(Path(".cache").glob("*")) if path.is_dir()]
    words = [f"{folder}, {gigabytes(size_of(folder))}" for folder in folders]
    return f"{first_three(words)}, for the next run with the same inputs" if words else "none"


FIRST_CHECKS: dict[str, Callable[[], str]] = {
    "Python": check_python,
    "packages": check_packages,
    "user": check_user,
    "git": check_git,
    "params.yaml": check_params,
}
CHECKS: dict[str, Callable[[], str]] = {
    "GPU": check_gpu,
    "bucket": check_bucket,
    "DVC remote": check_remote,
    "DVC cache": check_cache,
    "disk": check_disk,
    "unfinished": check_unfinished,
}

if __name__ == "__main__":
    main()
