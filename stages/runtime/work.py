"""Work that outlives a killed run: its finished parts wait in .cache for the next run.

DVC deletes a stage's outputs before it runs the stage, so parts lie outside of them, in
`.cache/<stage>-<digest>`, where the digest is of the stage's inputs and code. A killed run leaves
this folder to the next run with the same digest, and a run that ends well removes it, unless DVC
runs the stage: DVC still has to take the outputs into its cache, maybe gigabytes of them, and may
be killed meanwhile. Therefore the folder is then marked as finished, and stays until any stage
starts, except for the same one with the same digest before DVC has written dvc.lock. So nothing is
left after a complete `dvc repro`, and after one that ends with another stage than `report`, at most
the folder of its last stage.
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
# In a folder of work whose outputs are in place.
FINISHED = ".finished"


@contextmanager
def unfinished(stage: str, key: str) -> Iterator[Path]:
    """Give the folder of a stage's finished parts, which a killed run leaves for the next one.

    `key` is a digest of all inputs that matter. The folder is locked while in use, and lies in
    the original repository (DVC_ROOT) even for an experiment in a temporary copy of it.
    """
    cache = Path(os.environ.get("DVC_ROOT", ".")) / ".cache"
    cache.mkdir(exist_ok=True)
    folder = cache / f"{stage}-{digest(key, _code_version())[:16]}"
    _remove_finished(cache, but=folder.name)
    with _only_run(stage, "with the same inputs", folder.with_suffix(".lock")):
        if _dvc_has_outputs(folder / FINISHED):
            # With `dvc repro --force`, for example, all is to be done anew.
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        # What a killed run had half written, or had already finished.
        for leftover in [*folder.glob(".*.partial"), *folder.glob(FINISHED)]:
            leftover.unlink()
        yield folder
        if "DVC_STAGE" in os.environ:
            (folder / FINISHED).touch()
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_run_here(stage: str) -> Iterator[None]:
    """Let one run of a stage at a time write its outputs in the current directory.

    A stage whose `dvc` was killed continues; the next run waits for it, and finds its work.
    """
    # Of the processes that torchrun starts together, the first.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    cache = Path(".cache")
    cache.mkdir(exist_ok=True)
    name = _file_name(stage)
    with _only_run(stage, "of this stage", cache / f"{name}.run.lock"):
        _remove_finished(Path(os.environ.get("DVC_ROOT", "."), ".cache"), but=f"{name}-")
        yield


@contextmanager
def scratch(stage: str) -> Iterator[Path]:
    """Give an empty folder for the time of the block, on the disk of the outputs.

    What a killed run left in it is removed. only_run_here sees to it that no other run uses it.
    """
    folder = Path(".cache") / f"{_file_name(stage)}.scratch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, out: Path) -> None:
    """Replace `out` by all files of `folder`, as hard links where the disk has them, else copies.

    `folder` keeps them, so a run that is killed here has nothing to repeat. Files whose names
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
    # The library that wrote it may not have flushed it.
    flush(target)


@contextmanager
def _only_run(stage: str, which: str, lock_file: Path) -> Iterator[None]:
    """Hold the lock; where another process holds it, say which one, and wait until it ends."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{stage}: waiting for another run {which}: {_holder(lock_file)}", flush=True)
        lock.acquire()
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        # On a full disk nobody is told; the stage's own writing will say that it is full.
        with suppress(OSError):
            lock_file.write_text(
                f"process {os.getpid()} on {socket.gethostname()}, since {since}", "utf-8"
            )
        yield
    finally:
        # While it is held: whoever waits notices that the file is gone, and makes another.
        lock_file.unlink(missing_ok=True)
        lock.release()


def _holder(lock_file: Path) -> str:
    with suppress(FileNotFoundError):
        return lock_file.read_text("utf-8") or "it has just begun"
    return "it has just ended"


def _remove_finished(cache: Path, but: str) -> None:
    """Remove finished folders, unless a run uses them or their names begin with `but`."""
    for mark in cache.glob(f"*/{FINISHED}"):
        folder = mark.parent
        if folder.name.startswith(but):
            continue
        lock_file = folder.with_suffix(".lock")
        with suppress(Timeout), FileLock(lock_file).acquire(blocking=False):
            # Another run may have taken it up since, and been killed.
            if mark.exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def _dvc_has_outputs(mark: Path) -> bool:
    """Whether DVC has written dvc.lock since, as it does once it has the outputs of a stage."""
    lock = Path("dvc.lock")
    return mark.exists() and lock.exists() and lock.stat().st_mtime_ns > mark.stat().st_mtime_ns


def _code_version() -> str:
    """Of the stage and of all packages that it has imported modules of, as dvc.yaml has its deps.

    Some modules are imported later. Except for runtime, which decides no output.
    """
    loaded = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    ours = {path for path in loaded if path.is_relative_to(STAGES)}
    packages = {path.parent for path in ours} - {STAGES, STAGES / "runtime"}
    files = {path for path in ours if path.parent == STAGES}
    files.update(path for package in packages for path in package.glob("*.py"))
    return digest_files(sorted(files))


def _file_name(stage: str) -> str:
    """For a stage with its arguments, which are not checked yet."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", stage)
