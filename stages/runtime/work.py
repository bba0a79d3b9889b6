"""Work that outlives a killed run: finished parts wait in .cache until DVC has the outputs."""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.runtime.files import digest, digest_files, flush, write_text
from stages.runtime.space import space_for

STAGES = Path(__file__).parent.parent
# How long the work of a killed run waits for a next one with the same inputs.
DAYS_KEPT = 14
# Beside a folder of work: the repository that made outputs of it, which DVC may not have yet.
_FINISHED = ".finished"
_LOCK = ".lock"


def cache_folder() -> Path:
    """`.cache` of the repository, also for an experiment in a temporary copy of it (DVC_ROOT)."""
    folder = Path(os.environ.get("DVC_ROOT", ".")) / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def unfinished(stage: str, key: str) -> Iterator[Path]:
    """Give the folder of a stage's finished parts, which a killed run leaves for the next one.

    DVC deletes a stage's outs before it runs, so parts live in cache_folder(), in a folder named
    by `key`, a digest of all the inputs that matter, and by the version of the stage's code. The
    folder is locked while in use. When the block ends well it is removed or, where DVC runs the
    stage, kept until DVC has written dvc.lock: a run that is killed while DVC takes gigabytes into
    its cache has nothing to do again. Then go too the folders that other inputs left behind
    DAYS_KEPT ago.
    """
    _remove_committed()
    folder = cache_folder() / f"{stage}-{digest(key, _code_version())[:16]}"
    with only_run(stage, "with the same inputs", folder.with_suffix(_LOCK)):
        finished = folder.with_suffix(_FINISHED)
        finished.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        # What a killed run had half written.
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()
        yield folder
        if "DVC_STAGE" in os.environ:
            write_text(finished, str(Path.cwd()))
        else:
            shutil.rmtree(folder, ignore_errors=True)
        _remove_stale(stage)


@contextmanager
def only_run(stage: str, which: str, lock_file: Path) -> Iterator[None]:
    """Hold the lock; where another process does, say which one, and wait for its end."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{stage}: waiting for another run {which}: {_holder(lock_file)}", flush=True)
        lock.acquire()
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        # On a full disk nobody is told; what the stage writes tells what there is no room for.
        with suppress(OSError):
            lock_file.write_text(who, "utf-8")
        yield
    finally:
        # While it is held: whoever waits for it notices that this file is gone, and makes another.
        lock_file.unlink(missing_ok=True)
        lock.release()


def _holder(lock_file: Path) -> str:
    with suppress(FileNotFoundError):
        return lock_file.read_text("utf-8") or "just begun"
    return "just ended"


@contextmanager
def only_run_here(stage: str) -> Iterator[None]:
    """Let one run of a stage at a time write its outputs in the current directory.

    A run of which only DVC was killed goes on; the next one waits for it, and finds its work.
    """
    _remove_committed()
    folder = Path(".cache")
    folder.mkdir(exist_ok=True)
    # Of the processes that torchrun starts together, the first.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with only_run(stage, "of this stage", folder / f"{_file_name(stage)}.run.lock"):
        yield


@contextmanager
def scratch(stage: str) -> Iterator[Path]:
    """Give an empty folder for the time of the block, which a killed run leaves to the next one.

    On the disk of the outputs, so that they can be moved into place; only_run_here guards it.
    """
    folder = Path(".cache") / f"{_file_name(stage)}.scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file_name(stage: str) -> str:
    """Of a stage with its arguments, which nothing has checked yet."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", stage)


def publish_folder(folder: Path, out: Path) -> None:
    """Make `out` all files of `folder`, by hard links where the disk has them, else by copying.

    `folder` keeps them: what breaks off here has nothing to do again. Files that begin with a dot
    are what a killed run had half written. Raises DiskFullError.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = list(folder.glob("[!.]*"))
    try:
        with space_for(out, sum(file.stat().st_size for file in files)):
            for file in files:
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
    # Libraries that wrote it did not; and some disks say only then that they are full.
    flush(target)


def _remove_committed() -> None:
    """Remove the folders whose outputs DVC has, of all stages."""
    for marker in cache_folder().glob(f"*{_FINISHED}"):
        _remove(marker.with_suffix(""), _is_committed)


def _is_committed(folder: Path) -> bool:
    """Whether DVC has written dvc.lock since, or the experiment's copy of the repository is gone.

    DVC writes it after each stage, changed or not, once it has the outputs in its cache.
    """
    marker = folder.with_suffix(_FINISHED)
    repository = Path(marker.read_text("utf-8"))
    lock = repository / "dvc.lock"
    if not lock.exists():
        return not repository.exists()
    return lock.stat().st_mtime_ns > marker.stat().st_mtime_ns


def _remove_stale(stage: str) -> None:
    for folder in cache_folder().glob(f"{stage}-*/"):
        _remove(folder, _is_stale)


def _is_stale(folder: Path) -> bool:
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    return max(path.stat().st_mtime for path in [folder, *folder.iterdir()]) < oldest


def _remove(folder: Path, is_due: Callable[[Path], bool]) -> None:
    """Remove a folder of work that is due, unless a run works in it."""
    lock_file = folder.with_suffix(_LOCK)
    # Where other runs are at work, files come and go.
    with suppress(FileNotFoundError, Timeout):
        if not is_due(folder):
            return
        with FileLock(lock_file).acquire(blocking=False):
            try:
                # Again, since a run may have taken it up, and ended, in between.
                if is_due(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.with_suffix(_FINISHED).unlink(missing_ok=True)
            finally:
                lock_file.unlink(missing_ok=True)


def _code_version() -> str:
    """Of the modules of this project that the running stage has imported."""
    loaded = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    return digest_files(sorted(path for path in loaded if path.is_relative_to(STAGES)))
