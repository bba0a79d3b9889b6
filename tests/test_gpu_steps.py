"""What benchmarks/gpu.py measures of single steps, on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_steps import WAYS, Way, WholeTrainer, kernels_of, time_attention
from benchmarks.training import step_on_one_batch
from stages.imaging.loader import CPU
from stages.training.engine import Trainer
from tests.builders import SIZE, close, make_bins, noise, one_torch_thread, weights_of

SCALE = replace(gpu.SMALL_SCALE, size=SIZE, seconds=0.01)
# All that is between a loaded image and its loss, with steps that change the weights.
EVERYTHING = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "color_jitter": 0.2,
    "rotation": 5.0,
    "shift": 0.05,
    "blur": 1.0,
    "ordinal_share": 0.5,
    "label_smoothing": 0.1,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bins")
    make_bins(folder, [1, 2, 3, 4, 5], noise)
    return folder


def train(trainer: Trainer, steps: int) -> None:
    step = step_on_one_batch(trainer)
    for _ in range(steps):
        step()


@pytest.mark.parametrize("model", ["resnet34", "vit"])
def test_a_step_that_is_compiled_whole_computes_what_the_engine_does(
    model: str, folder: Path
) -> None:
    way = Way("whole", WholeTrainer, "default")
    task = gpu.make_task(SCALE, folder, model, batch_size=5, compile=False, **EVERYTHING)
    engine, other = task.trainer(), way.trainer(task)

    train(engine, steps=2)
    train(other, steps=2)

    assert engine.state.totals[0] > 0
    assert other.state.totals.tolist() == pytest.approx(engine.state.totals.tolist(), rel=1e-6)
    assert close(weights_of(other.module), weights_of(engine.module), 1e-6)


def test_kernels_are_counted_per_step() -> None:
    matrix = torch.ones(64, 64)

    kernels = kernels_of(lambda: matrix @ matrix @ matrix, CPU)

    assert {kernel.name: kernel.calls for kernel in kernels}["aten::mm"] == 2


def attention_of(model: str, folder: Path) -> str:
    return time_attention(gpu.make_task(SCALE, folder, model, batch_size=2), seconds=0.01)


def test_the_vits_attention_is_torchs_and_is_timed(folder: Path) -> None:
    found = attention_of("vit", folder)

    assert "vit calls it 2 times a step" in found
    assert "| fused, cuDNN | does not run" in found
    row = next(line for line in found.splitlines() if "torch's choice" in line)
    assert float(row.split("|")[2]) > 0


def test_a_network_without_attention_says_so(folder: Path) -> None:
    assert attention_of("resnet34", folder) == (
        "resnet34 does not call torch's function for attention."
    )


@pytest.mark.slow
def test_the_report_has_kernels_and_every_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "COMPILED", [("vit", 1)])
    report = gpu.Report(tmp_path / "report.md", minutes=5)

    for part in ("profile", "attention", "ways"):
        gpu.PARTS[part](report, SCALE, folder, 1e12)

    written = report.path.read_text()
    assert "failed" not in written
    assert "aten::mkldnn_convolution" in written
    assert [way.name for way in WAYS if f"| {way.name} |" not in written] == []
