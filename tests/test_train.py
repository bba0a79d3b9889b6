"""The train stage as a command: killed, stopped, in several processes, with the same result."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from stages import train
from stages.networks.release import load_release
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from stages.training import checkpoint
from tests.builders import (
    ALL_STATE,
    REPOSITORY,
    SIZE,
    TINY_VIT,
    bin_rows,
    one_torch_thread,
    write_params,
    write_resized,
    write_split,
)

EPOCHS, STEPS = 6, 10
KNOBS: dict[str, Any] = {
    "subset.bins": 200,
    "split.train": 160,
    "split.validation": 20,
    "split.test": 20,
    "resize.size": SIZE,
    # This writes a checkpoint after each step.
    "run.checkpoint_minutes": 1e-9,
    "train.vit.pretrained": False,
    "train.vit.config": TINY_VIT | {"hidden_dropout_prob": 0.1},
    "train.vit.learning_rate": 1e-3,
    "train.vit.warmup_steps": 5,
    "train.vit.epochs": EPOCHS,
    "train.vit.batch_size": 16,
    **ALL_STATE,
}
STAGE = [sys.executable, "-m", "stages.train", "vit"]
SECONDS = 300


class Workspace:
    """A folder with the inputs of the train stage, which runs there as DVC would run it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """`settings` has keys of params.yaml like run.processes, with __ instead of the dot."""
        self.folder = folder
        rows = bin_rows([1, 2, 3, 4, 5] * 40)
        write_resized(folder / "data/resized", rows, shard_bins=50)
        sets = ["train"] * 160 + ["validation"] * 20 + ["test"] * 20
        ids = [row["id"] for row in rows]
        write_split(folder / "data/split.csv", dict(zip(ids, sets, strict=True)))
        start = folder / "models/pretrained/vit/source.json"
        start.parent.mkdir(parents=True)
        start.write_text('{"pretrained": false}\n', "utf-8")
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        write_params(folder, KNOBS | changes)

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
            # Signals to the stage and its children must not reach the tests.
            start_new_session=True,
        )

    def run(self) -> tuple[int, str]:
        """Run it to its end; returns the exit code and the output."""
        process = self.start()
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output

    def finish(self) -> str:
        code, output = self.run()
        assert code == 0, output
        assert not list((self.folder / ".cache").iterdir())
        return output

    def outputs(self) -> dict[str, bytes]:
        """The content of all files that the stage has written, by path."""
        folders = [self.folder / "models/vit", self.folder / "reports/vit"]
        files = [path for folder in folders for path in folder.iterdir()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def steps_done(self) -> int:
        """The number of steps over all epochs that the checkpoint has."""
        for path in self.folder.glob(f".cache/train-*/{checkpoint.NAME}"):
            saved = torch.load(path, weights_only=True)
            return int((saved["epoch"] - 1) * STEPS + saved["step"])
        return 0

    def wait_for_step(self, process: "subprocess.Popen[str]", step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while self.steps_done() < step and process.poll() is None:
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.002)

    def interrupt(self, after: int, number: int, *, group: bool = False) -> tuple[int, str]:
        """Send a signal after this number of steps; returns the exit code and the output."""
        # An earlier run may have gone further than asked, but this run must have started to train.
        after = max(after, self.steps_done() + 1)
        process = self.start()
        self.wait_for_step(process, after)
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode != 0, f"it was done before the signal came:\n{output}"
        return process.returncode, output


def random_steps(count: int, seed: int) -> list[int]:
    """Random steps of a training, in order, but none of its last ones."""
    steps = sorted(random.Random(seed).sample(range(1, (EPOCHS - 2) * STEPS), count))
    print(f"interrupted after the steps {steps} (seed {seed})")
    return steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which one process has trained without interruption."""
    workspace = Workspace(tmp_path_factory.mktemp("alone"))
    output = workspace.finish()
    assert "160 bins on 1 x " in output
    assert output.count("vit epoch ") == EPOCHS
    return workspace


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of two processes that trained without interruption."""
    workspace = Workspace(tmp_path_factory.mktemp("together"), run__processes=2)
    output = workspace.finish()
    assert "160 bins on 2 x " in output
    assert output.count("epoch 1/6") == 1
    return workspace.outputs()


@pytest.mark.slow
def test_the_model_folder_is_all_that_is_needed_to_use_the_model(alone: Workspace) -> None:
    release = load_release(alone.folder / "models/vit")

    assert release.classifier.labels == [1, 2, 3, 4, 5]
    assert (release.settings.fit, release.settings.quality) == ("squeeze", 90)
    assert release.validation["id"].tolist() == [f"{number:05d}" for number in range(161, 181)]
    assert release.validation["actual"].tolist() == [1, 2, 3, 4, 5] * 4
    # The kept epoch was calibrated: its row of the curves has the same accuracy.
    curves = pd.read_csv(alone.folder / "reports/vit/curves.csv")
    right = (release.validation["actual"] == release.validation["predicted"]).mean()
    assert right == pytest.approx(curves["validation_accuracy"].max())
    assert curves["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert release.settings.epoch == curves["validation_accuracy"].argmax() + 1


@pytest.mark.slow
def test_a_request_to_stop_writes_a_checkpoint_and_says_so(
    alone: Workspace, tmp_path: Path
) -> None:
    # The only other checkpoints are those at the end of an epoch.
    workspace = Workspace(tmp_path, run__checkpoint_minutes=60)
    process = workspace.start()
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    process.send_signal(signal.SIGTERM)
    lines += process.stdout.readlines()
    process.wait(SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, lines
    assert "train vit: stopped by SIGTERM at epoch " in lines[-1]
    assert workspace.steps_done() > 0
    assert "continuing after epoch" in workspace.finish()
    assert workspace.outputs() == alone.outputs()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_two_processes_killed_and_stopped_end_with_the_bytes_of_two_that_were_not(
    together: dict[str, bytes], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path, run__processes=2)
    stop, interrupt, kill_parent = random_steps(3, seed=1)
    code, output = workspace.interrupt(stop, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, output
    assert output.splitlines()[-1].startswith("train vit: stopped by SIGTERM at epoch ")
    assert workspace.steps_done() >= stop
    # A terminal sends it to all processes.
    code, output = workspace.interrupt(interrupt, signal.SIGINT, group=True)
    assert code == 128 + signal.SIGINT, output
    assert output.count("stopped by SIGINT") == 1
    assert "Traceback" not in output
    code, output = workspace.interrupt(kill_parent, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert "continuing after epoch" in workspace.finish()
    assert workspace.outputs() == together


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_one_line(tmp_path: Path) -> None:
    workspace = Workspace(
        tmp_path,
        run__processes=2,
        train__vit__learning_rate=1e30,
        train__vit__warmup_steps=0,
    )
    code, output = workspace.run()
    assert code == 1
    assert output.count("train vit: error: the loss is not finite at step") == 1
    assert "learning_rate (1e+30)" in output
    assert "Traceback" not in output
    assert not (workspace.folder / "models/vit").exists()


def test_training_does_without_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train__vit__epochs": 1, "train__vit__keep": "last"}
    workspace = Workspace(tmp_path, subset__quantities=[1, 2, 3, 4, 5, 9], **settings)
    split = workspace.folder / "data/split.csv"
    sets = pd.read_csv(split, dtype=str)
    sets[sets["set"] != "test"].to_csv(split, index=False)
    monkeypatch.chdir(workspace.folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    with one_torch_thread():
        summary = train.train_model("vit")

    assert summary == "160 bins, 1 epochs; the weights of epoch 1 are kept"
    curves = pd.read_csv("reports/vit/curves.csv")
    assert curves.columns.tolist() == [
        *("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    ]
    # Even if only test had bins with 9 items, the model could be evaluated.
    assert load_release(Path("models/vit")).classifier.labels == [1, 2, 3, 4, 5, 9]


def test_photographs_of_another_size_than_params_says_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Workspace(tmp_path, resize__size=64).folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    message = f"of {SIZE} x {SIZE} pixels, but resize.size is 64: .* `dvc repro --force resize`"
    with pytest.raises(UserError, match=message):
        train.train_model("vit")


@pytest.mark.parametrize(
    "change",
    [
        {"train__vit__seed": 1},
        {"resize__fit": "pad"},
        {"subset__quantities": [1, 2, 3, 4, 5, 6]},
        {"resize__quality": 80},
        {"run__deterministic": True},
    ],
    ids=str,
)
def test_a_killed_runs_work_is_not_continued_with_other_inputs(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name, changes in {"before": {}, "as before": {}, "changed": change}.items():
        monkeypatch.chdir(Workspace(tmp_path / name, **changes).folder)
        digests.append(train.inputs_of(load_params(), "vit"))

    before, as_before, changed = digests
    assert before == as_before != changed
