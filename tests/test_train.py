"""The train stage as it is run: killed, stopped, in several processes; always the same model."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.made import (
    REPOSITORY,
    SIZE,
    TINY_VIT,
    bin_rows,
    write_params,
    write_resized,
    write_split,
)

EPOCHS, STEPS = 6, 10
KNOBS: dict[str, Any] = {
    "subset.bins": 200,
    "split.train": 180,
    "split.test": 20,
    "split.validation": 1 / 9,
    "resize.size": SIZE,
    # A checkpoint after each step.
    "run.checkpoint_minutes": 1e-9,
    "train.vit.pretrained": False,
    "train.vit.config": TINY_VIT | {"hidden_dropout_prob": 0.1},
    "train.vit.learning_rate": 1e-3,
    "train.vit.warmup_steps": 5,
    "train.vit.epochs": EPOCHS,
    "train.vit.batch_size": 16,
    "train.vit.ema_decay": 0.9,
    "train.vit.color_jitter": 0.2,
}
STAGE = [sys.executable, "-m", "stages.train", "vit"]
SECONDS = 300


class Workspace:
    """A folder with the inputs of the train stage, which runs there as DVC would run it."""

    def __init__(self, folder: Path, **knobs: Any) -> None:
        self.folder = folder
        rows = bin_rows([1, 2, 3, 4, 5] * 40)
        write_resized(folder / "data/resized", rows, shard_bins=50)
        sets = ["train"] * 160 + ["validation"] * 20 + ["test"] * 20
        ids = [row["id"] for row in rows]
        write_split(folder / "data/split.csv", dict(zip(ids, sets, strict=True)))
        start = folder / "models/pretrained/vit/source.json"
        start.parent.mkdir(parents=True)
        start.write_text('{"pretrained": false}\n', "utf-8")
        self.set_knobs(**knobs)

    def set_knobs(self, **knobs: Any) -> None:
        changes = {f"train.{name.replace('__', '.')}": value for name, value in knobs.items()}
        write_params(self.folder, KNOBS | changes)

    def start(self, command: Sequence[str] = STAGE) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # So that a signal to it and its children does not reach the tests.
            start_new_session=True,
        )

    def finish(self, command: Sequence[str] = STAGE) -> str:
        """Run to the end; what it printed."""
        process = self.start(command)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        assert not list((self.folder / ".cache").iterdir())
        return output

    def outputs(self) -> dict[str, bytes]:
        paths = ["models/vit/model.safetensors", "models/vit/config.json", "reports/vit/curves.csv"]
        return {path: (self.folder / path).read_bytes() for path in paths}

    def steps_done(self) -> int:
        """Of all epochs, by the checkpoint."""
        for path in self.folder.glob(".cache/train-*/checkpoint.safetensors"):
            with safe_open(path, "pt") as checkpoint:
                epoch, step, *_ = checkpoint.get_tensor("place").tolist()
                return int((epoch - 1) * STEPS + step)
        return 0

    def interrupt(self, after: int, number: int, *, group: bool = False) -> tuple[int, str]:
        """Send a signal once that many steps are done; the exit code, and what was printed."""
        process = self.start()
        deadline = time.monotonic() + SECONDS
        while self.steps_done() < after and process.poll() is None:
            assert time.monotonic() < deadline, f"step {after} never came"
            time.sleep(0.002)
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode != 0, f"it was done before the signal came:\n{output}"
        return process.returncode, output


def random_steps(count: int, seed: int) -> list[int]:
    """Some steps of a training, in order, none of them its last ones."""
    steps = sorted(random.Random(seed).sample(range(1, (EPOCHS - 2) * STEPS), count))
    print(f"interrupted after the steps {steps} (seed {seed})")
    return steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process trains, undisturbed."""
    workspace = Workspace(tmp_path_factory.mktemp("alone"))
    output = workspace.finish()
    assert "160 bins on 1 x " in output
    return workspace.outputs()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two processes train, undisturbed."""
    workspace = Workspace(tmp_path_factory.mktemp("together"), processes=2)
    output = workspace.finish()
    assert "160 bins on 2 x " in output
    assert output.count("epoch 1/6") == 1
    return workspace.outputs()


def test_a_killed_training_ends_with_the_bytes_of_one_that_was_not(
    alone: dict[str, bytes], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    for step in random_steps(3, seed=0):
        code, output = workspace.interrupt(step, signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    assert "going on after epoch" in workspace.finish()
    assert workspace.outputs() == alone


def test_a_request_to_stop_writes_a_checkpoint_and_says_so(
    alone: dict[str, bytes], tmp_path: Path
) -> None:
    # No checkpoint but that one, and those at the end of an epoch.
    workspace = Workspace(tmp_path, checkpoint_minutes=60)
    process = workspace.start()
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    process.send_signal(signal.SIGTERM)
    lines += process.stdout.readlines()
    process.wait(SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, lines
    assert "train vit: stopped by SIGTERM" in lines[-1]
    assert "the next run goes on from there" in lines[-1]
    assert workspace.steps_done() > 0
    assert "going on after epoch" in workspace.finish()
    assert workspace.outputs() == alone


def test_two_processes_killed_and_stopped_end_with_the_bytes_of_two_that_were_not(
    together: dict[str, bytes], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path, processes=2)
    stop, kill_parent, kill_all = random_steps(3, seed=1)
    code, output = workspace.interrupt(stop, signal.SIGINT)
    assert code == 128 + signal.SIGINT, output
    assert output.count("stopped by SIGINT") == 1
    assert "Traceback" not in output
    code, output = workspace.interrupt(kill_parent, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    code, output = workspace.interrupt(kill_all, signal.SIGKILL, group=True)
    assert code == -signal.SIGKILL, output
    assert "going on after epoch" in workspace.finish()
    assert workspace.outputs() == together


def test_torchrun_trains_what_train_processes_does(
    together: dict[str, bytes], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    workspace.finish([torchrun, "--standalone", "--nproc-per-node", "2", *STAGE[1:]])
    assert workspace.outputs() == together


def test_two_processes_end_with_one_line_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, processes=2, vit__learning_rate=1e30, vit__warmup_steps=0)
    process = workspace.start()
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert output.count("error: the loss is not finite at step") == 1
    assert "learning_rate (1e+30)" in output
    assert "Traceback" not in output
    assert not (workspace.folder / "models/vit").exists()
