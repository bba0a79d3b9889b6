"""Work that survives a killed run: its finished parts stay in .cache for the next run.

DVC deletes a stage's outputs before it runs the stage, so the parts are kept elsewhere, in
`.cache/<stage>-<digest>`, where the digest covers the stage's inputs and code. A killed run leaves
this folder to the next run with the same digest. A run that succeeds removes it, unless DVC runs
the stage: DVC has yet to copy the outputs to its cache, perhaps gigabytes, and may be killed while
it does. In that case the folder is only marked as finished. The next stage that starts removes it,
unless that is the same stage with the same digest and DVC has not written dvc.lock since. So a
complete `dvc repro` leaves nothing, and one that ends before `report` leaves at most the folder of
its last stage.
"""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.runtime.files import digest, digest_files, flush

STAGES = Path(__file__).parent.parent
# The mark in a folder of work whose outputs are in place.
FINISHED = ".finished"


def original_repository() -> Path:
    """The user's repository, even when DVC runs an experiment in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT", "."))


@contextmanager
def resumable(stage: str, key: str) -> Iterator[Path]:
    """Yield the folder for a stage's finished parts, with what an interrupted run left in it.

    `key` is a digest of all inputs that matter. The folder is locked while in use. It is in the
    original repository.
    """
    cache = original_repository() / ".cache"
    cache.mkdir(exist_ok=True)
    folder = cache / f"{stage}-{digest(key, _code_version())[:16]}"
    _remove_finished(cache, but=folder.name)
    with _one_at_a_time(stage, "with the same inputs", folder.with_suffix(".lock")):
        if _dvc_has_outputs(folder / FINISHED):
            # The stage runs although DVC has its outputs, as with `dvc repro --force`: start over.
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        # Half-written files of a killed run, and its mark.
        for leftover in [*folder.glob(".*.partial"), *folder.glob(FINISHED)]:
            leftover.unlink()
        yield folder
        if "DVC_STAGE" in os.environ:
            (folder / FINISHED).touch()
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive_run(stage: str) -> Iterator[None]:
    """Allow only one run of a stage at a time in the current directory.

    A stage keeps running when its `dvc` is killed. The next run waits for it, then uses its work.
    """
    # torchrun starts several processes of one run; the first holds the lock.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    cache = Path(".cache")
    cache.mkdir(exist_ok=True)
    name = _file_name(stage)
    with _one_at_a_time(stage, "of this stage", cache / f"{name}.run.lock"):
        _remove_finished(original_repository() / ".cache", but=f"{name}-")
        yield


@contextmanager
def scratch(stage: str) -> Iterator[Path]:
    """Yield an empty folder on the disk of the outputs, and remove it afterwards.

    What a killed run left there is removed first. exclusive_run keeps other runs out of it.
    """
    folder = Path(".cache") / f"{_file_name(stage)}.scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, out: Path) -> None:
    """Replace `out` by the files of `folder`: hard links where the disk supports them, else copies.

    `folder` keeps its files, so a run that is killed here has nothing to repeat. Files whose names
    begin with a dot are left out.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in folder.glob("[!.]*"):
            _link_or_copy(file, partial / file.name)
        flush(partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    # The library that wrote the file may not have flushed it.
    flush(target)


@contextmanager
def _one_at_a_time(stage: str, which: str, lock_file: Path) -> Iterator[None]:
    """Hold the lock. If another process holds it, say which one and wait until it ends."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{stage}: waiting for another run {which}: {_holder(lock_file)}", flush=True)
        lock.acquire()
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        # A full disk is reported by the stage's own writing.
        with suppress(OSError):
            lock_file.write_text(
                f"process {os.getpid()} on {socket.gethostname()}, since {since}", "utf-8"
            )
        yield
    finally:
        # Removed while the lock is held: a waiting process notices, and creates a new file.
        lock_file.unlink(missing_ok=True)
        lock.release()


def _holder(lock_file: Path) -> str:
    with suppress(FileNotFoundError):
        return lock_file.read_text("utf-8") or "it has just started"
    return "it has just ended"


def _remove_finished(cache: Path, but: str) -> None:
    """Remove finished folders, except those in use and those whose names begin with `but`."""
    for mark in cache.glob(f"*/{FINISHED}"):
        folder = mark.parent
        if folder.name.startswith(but):
            continue
        lock_file = folder.with_suffix(".lock")
        with suppress(Timeout), FileLock(lock_file).acquire(blocking=False):
            # Another run may have resumed it since, and been killed.
            if mark.exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def _dvc_has_outputs(mark: Path) -> bool:
    """Whether DVC has written dvc.lock since, as it does once it has cached a stage's outputs."""
    lock = Path("dvc.lock")
    return mark.exists() and lock.exists() and lock.stat().st_mtime_ns > mark.stat().st_mtime_ns


def _code_version() -> str:
    """A digest of the stage's code: its file, and every package that it imports from.

    Whole packages, as in the deps of dvc.yaml, because some modules are imported later. Without
    runtime, which decides no byte of an output.
    """
    loaded = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    ours = {path for path in loaded if path.is_relative_to(STAGES)}
    packages = {path.parent for path in ours} - {STAGES, STAGES / "runtime"}
    files = {path for path in ours if path.parent == STAGES}
    files.update(path for package in packages for path in package.glob("*.py"))
    return digest_files(sorted(files))


def _file_name(stage: str) -> str:
    """A file name for a stage and its arguments, which are not checked yet."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", stage)
