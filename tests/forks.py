"""Stages in forks of a process that has imported them, so that starting one takes no time.

So a kill hits the work of a stage, and not the import of torch.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from stages.runtime.work import exclusive_run
from tests import lab
from tests.builders import ALL_STATE
from tests.conftest import changed_params
from tests.faults import Fault, FaultProxy, at_random
from tests.lab import SECONDS, finished_ids, written
from tests.project import ROOT

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
#: The stages in the pipeline's order, with their arguments.
STAGES = [
    *("index", "subset", "fetch", "resize", "split"),
    *("pretrained vit", "train vit", "evaluate vit", "baseline", "ensemble", "witness", "report"),
]
KNOBS: dict[str, Any] = {
    **lab.KNOBS,
    "train.vit.config.hidden_dropout_prob": 0.1,
    "train.vit.epochs": 3,
    "train.vit.batch_size": 4,
    **ALL_STATE,
}
forks = multiprocessing.get_context("forkserver")
# Modules that stages import only when they need them.
LATER = ["tools.audit.run", "transformers.models.vit.modeling_vit", "torch._dynamo"]
forks.set_forkserver_preload([__name__, *(f"stages.{one.split()[0]}" for one in STAGES), *LATER])


class Modules:
    """Runs modules in a folder, one at a time, as `python -m` does under DVC."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.process: Any = None
        # The first fork waits until everything has been imported.
        start_fork(os.getpid).join()

    def start(self, folder: Path, module: str, *arguments: str) -> None:
        self.process = start_fork(run_module, folder, self.output, module, *arguments)

    def finish(self) -> tuple[int, str]:
        """The exit code, and what was printed on stdout and stderr."""
        self.process.join(SECONDS)
        return self.process.exitcode, self.output.read_text("utf-8")

    def run(self, folder: Path, module: str, *arguments: str) -> tuple[int, str]:
        self.start(folder, module, *arguments)
        return self.finish()


class Bench:
    """A folder in which the stages run one after another, on a bucket behind `proxy`."""

    def __init__(self, folder: Path, proxy: FaultProxy) -> None:
        self.folder = folder
        self.proxy = proxy
        self.modules = Modules(folder.with_name(f"{folder.name}.txt"))
        #: The time of each stage that has run undisturbed, and all files after these runs.
        self.seconds: dict[str, float] = {}
        self.undisturbed: dict[str, bytes] = {}
        folder.mkdir()
        # Some answers come late, so that a kill hits a stage between answers.
        proxy.plan = at_random([Fault.LATENCY], 0.1, seed=0)
        values = changed_params(KNOBS | {"bucket.endpoint": proxy.url})
        lab.yaml.dump(values, folder / "params.yaml")

    def run_undisturbed(self, last: str) -> None:
        """Run the stages up to this one that have not run yet."""
        for stage in STAGES[: STAGES.index(last) + 1]:
            if stage not in self.seconds:
                start = time.monotonic()
                self.finish(stage)
                self.seconds[stage] = time.monotonic() - start
                self.undisturbed = self.files()
        self.proxy.take_requests()

    def start(self, stage: str) -> None:
        """Start a stage without its outputs, which DVC would have deleted."""
        for path in map(self.folder.joinpath, outs_of(stage)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        name, *arguments = stage.split()
        self.modules.start(self.folder, f"stages.{name}", *arguments)

    def finish(self, stage: str) -> str:
        """Run a stage to its end. Returns its output."""
        self.start(stage)
        code, printed = self.modules.finish()
        assert code == 0, f"{stage} ended with {code}:\n{printed}"
        return printed

    def kill(self, stage: str, after: float) -> bool:
        """Kill a stage after this many seconds. Returns False if it had already ended."""
        self.start(stage)
        process = self.modules.process
        process.join(after)
        process.kill()
        code, printed = self.modules.finish()
        assert code in {0, -9}, printed
        return bool(code)

    def files(self) -> dict[str, bytes]:
        """All files that the stages have written, after another stage has started."""
        next_stage = start_fork(start_another, self.folder)
        next_stage.join()
        assert next_stage.exitcode == 0
        return written(self.folder)

    def done(self, stage: str) -> tuple[set[str], set[tuple[str, int, int]]]:
        """The bins in finished shards, and these shards' names, inodes and times.

        A file that was written again has another inode or time, even with the same bytes.
        """
        shards = set()
        for path in self.folder.glob(f".cache/{stage}-*/shards/[!.]*"):
            status = path.stat()
            shards.add((path.name, status.st_ino, status.st_mtime_ns))
        return finished_ids(self.folder, stage), shards

    def has_checkpoint(self) -> bool:
        return any(self.folder.glob(".cache/train-*/checkpoint*"))


def outs_of(stage: str) -> list[str]:
    name, _, model = stage.partition(" ")
    block = PIPELINE[name].get("do", PIPELINE[name])
    listed = [*block["outs"], *block.get("metrics", []), *block.get("plots", [])]
    paths = [one if isinstance(one, str) else next(iter(one)) for one in listed]
    return [path.replace("${key}", model) for path in paths]


def start_fork(work: Any, *arguments: Any) -> Any:
    # Any, because typeshed has no common type for the processes of all contexts.
    process: Any = forks.Process(target=work, args=arguments)
    process.start()
    return process


def run_module(folder: Path, output: Path, module: str, *arguments: str) -> None:
    os.chdir(folder)
    os.environ.update(DVC_STAGE="_".join([module, *arguments]), DVC_ROOT=str(folder))
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Such small tensors gain nothing from more threads, and lose much on a busy machine.
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    # runpy warns if the module has been imported before.
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_another(folder: Path) -> None:
    os.chdir(folder)
    os.environ.update(DVC_ROOT=str(folder))
    with exclusive_run("next"):
        pass
