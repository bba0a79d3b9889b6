"""The stages in forks of a process that has imported them, to be killed while they work.

A stage that is started anew spends most of its time on imports.
"""

import importlib
import multiprocessing
import os
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from ruamel.yaml import YAML
from safetensors import safe_open

from stages.formats.shards import read_rejects
from stages.runtime.command import run_stage
from stages.runtime.work import only_run_here
from tests.faults import Fault, FaultProxy, at_random
from tests.lab import contents
from tests.made import TINY_VIT, write_params
from tests.project import ROOT
from tests.test_pretrained import FILES, REPO, REVISION, Hub, use_endpoint

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
#: In the pipeline's order, with their arguments.
STAGES = [
    "index",
    "subset",
    "fetch",
    "resize",
    "split",
    "pretrained vit",
    "train vit",
    "evaluate vit",
    "report",
]
KNOBS: dict[str, Any] = {
    "bucket.url": "s3://bins",
    "index.max_rejects": 0.05,
    "subset.bins": 70,
    "fetch.shard_bins": 8,
    "resize.size": 32,
    "resize.max_rejects": 0.05,
    "split.train": 48,
    "split.test": 20,
    "split.validation": 0.25,
    # A checkpoint after each step.
    "run.checkpoint_minutes": 1e-9,
    "train.vit.name": REPO,
    "train.vit.revision": REVISION,
    "train.vit.config": {"model_type": "vit", "hidden_dropout_prob": 0.1},
    "train.vit.warmup_steps": 5,
    "train.vit.epochs": 3,
    "train.vit.batch_size": 4,
    "train.vit.ema_decay": 0.9,
}
# Small parts and few requests at once, so that a kill finds some of it done and some not.
PATCHES = {
    "stages.index.PART_RECORDS": 16,
    "stages.index.IN_FLIGHT": 4,
    "stages.fetch.IN_FLIGHT": 4,
}
LATE_ANSWERS = 0.1
SECONDS = 600

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([__name__, *(f"stages.{one.split()[0]}" for one in STAGES)])


@dataclass
class Done:
    """What killed runs have finished, which no later run may do again.

    `ids`: of the bins in whole shards; `shards`: their inodes and times; `place`: epoch and step
    of the checkpoint; `downloaded`: whether all weights are there.
    """

    ids: set[str] = field(default_factory=set)
    shards: dict[Path, tuple[int, int]] = field(default_factory=dict)
    place: str | None = None
    downloaded: bool = False


class Bench:
    """A folder in which the stages run one after another, on a bucket behind `proxy`."""

    def __init__(self, folder: Path, proxy: FaultProxy, hub: Hub) -> None:
        self.folder = folder
        self.proxy = proxy
        self.hub = hub
        self.output = folder.with_name(f"{folder.name}.txt")
        #: Of each stage that has run undisturbed.
        self.seconds: dict[str, float] = {}
        #: All files after them.
        self.undisturbed: dict[str, bytes] = {}
        folder.mkdir()
        proxy.plan = at_random([Fault.LATENCY], LATE_ANSWERS, seed=0)
        write_params(folder, KNOBS | {"bucket.endpoint": proxy.url})
        # The first fork waits until all is imported.
        start_fork(os.getpid).join()

    def run_undisturbed(self, last: str) -> None:
        """The stages up to this one that have not run yet."""
        for stage in STAGES[: STAGES.index(last) + 1]:
            if stage not in self.seconds:
                start = time.monotonic()
                self.finish(stage)
                self.seconds[stage] = time.monotonic() - start
                self.commit()
                self.undisturbed = self.files()
        self.proxy.take_requests()
        self.hub.asked.clear()

    def finish(self, stage: str) -> str:
        """Run it to the end; what it said."""
        process = self.start(stage)
        process.join(SECONDS)
        said = self.output.read_text("utf-8")
        assert process.exitcode == 0, f"{stage} ended with {process.exitcode}:\n{said}"
        return said

    def kill(self, stage: str, after: float) -> bool:
        """Whether it still ran after so many seconds, and was killed."""
        process = self.start(stage)
        process.join(after)
        process.kill()
        process.join()
        assert process.exitcode in {0, -9}, self.output.read_text("utf-8")
        return bool(process.exitcode)

    def start(self, stage: str) -> Any:
        """Without its outputs, which DVC has deleted by then."""
        for path in map(self.folder.joinpath, outs_of(stage)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return start_fork(run_in_fork, stage, self.folder, self.hub.url, self.output)

    def commit(self) -> None:
        """Do what DVC does when it has the outputs, and let a next stage see it."""
        (self.folder / "dvc.lock").write_text("schema: '2.0'\n")
        process = start_fork(start_next_stage, self.folder)
        process.join()
        assert process.exitcode == 0

    def files(self) -> dict[str, bytes]:
        """All that the stages have written, by path."""
        return contents(self.folder, ["data", "models", "reports", ".cache"])

    def done(self) -> Done:
        done = Done()
        for path in sorted(self.folder.glob(".cache/*/shards/[!.]*")):
            done.shards[path] = identity(path)
            done.ids |= set(pq.read_table(path, columns=["id"])["id"].to_pylist())
            rejects = path.parent.with_name("rejects") / f"{path.name}.csv"
            done.ids |= {reject.id for reject in read_rejects(rejects)}
        for path in self.folder.glob(".cache/*/checkpoint.safetensors"):
            with safe_open(path, "pt") as checkpoint:
                epoch, step, *_ = checkpoint.get_tensor("place").tolist()
            done.place = f"epoch {epoch:.0f}, step {step:.0f}"
        done.downloaded = any(self.folder.glob(".cache/*/source.json"))
        return done

    def repeated(self, done: Done) -> list[str]:
        """What was done already, and a run has done again since this was last asked."""
        asked = self.proxy.take_requests()
        problems = [f"asked for {name} again" for name in asked if Path(name).stem in done.ids]
        for path, known in done.shards.items():
            if not path.exists() or identity(path) != known:
                problems.append(f"made {path.name} again")
        hub_asked, self.hub.asked = self.hub.asked, []
        if done.downloaded and hub_asked:
            problems.append("downloaded the weights again")
        return problems


def outs_of(stage: str) -> list[str]:
    name, _, model = stage.partition(" ")
    block = PIPELINE[name].get("do", PIPELINE[name])
    paths = [*block["outs"], *(next(iter(metrics)) for metrics in block.get("metrics", []))]
    return [path.replace("${item.model}", model) for path in paths]


def identity(path: Path) -> tuple[int, int]:
    """Another one where the file was written anew, be it with the same bytes."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def start_fork(work: Any, *arguments: Any) -> Any:
    # Any, since typeshed has no type for the processes of all contexts.
    process: Any = forks.Process(target=work, args=arguments)
    process.start()
    return process


def run_in_fork(stage: str, folder: Path, hub: str, output: Path) -> None:
    """The stage as DVC starts it, in a process that has imported it already."""
    os.chdir(folder)
    os.environ.update(DVC_STAGE=stage.replace(" ", "@"), DVC_ROOT=str(folder))
    redirect(output)
    patch = pytest.MonkeyPatch()
    for target, value in PATCHES.items():
        patch.setattr(target, value)
    use_endpoint(patch, hub)
    # Tensors this small gain nothing from more, and lose much on a busy machine.
    torch.set_num_threads(1)
    name, *words = stage.split()
    sys.argv = [name, *words]
    main = importlib.import_module(f"stages.{name}").main
    run_stage(name, main, **({"model": "a model"} if words else {}))


class Modules:
    """Runs modules, one at a time, as `python -m` does."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.process: Any = None

    def start(self, folder: Path, module: str, *arguments: str) -> None:
        self.process = start_fork(run_module, folder, self.output, module, *arguments)

    def finish(self) -> tuple[int, str]:
        """The exit code, and what was printed on stdout and stderr."""
        self.process.join(SECONDS)
        return self.process.exitcode, self.output.read_text("utf-8")

    def run(self, folder: Path, module: str, *arguments: str) -> tuple[int, str]:
        self.start(folder, module, *arguments)
        return self.finish()


def run_module(folder: Path, output: Path, module: str, *arguments: str) -> None:
    os.chdir(folder)
    redirect(output)
    sys.argv = [module, *arguments]
    # runpy warns where it was imported before.
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def redirect(output: Path) -> None:
    """What this process prints, into the file."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def start_next_stage(folder: Path) -> None:
    os.chdir(folder)
    os.environ.update(DVC_ROOT=str(folder))
    with only_run_here("next"):
        pass


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub with the weights that KNOBS name."""
    with Hub() as hub, TemporaryDirectory() as folder:
        transformers.set_seed(0)
        transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(folder)
        for name in FILES:
            hub.files[f"/{REPO}/resolve/{REVISION}/{name}"] = Path(folder, name).read_bytes()
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
