"""Training on one GPU: its speed, what limits it, and whether it stops and resumes correctly.

    python -m benchmarks.gpu

It needs neither DVC nor a network, and renders its own data; benchmarks/README.md names the
packages that it needs. `--data FOLDER` also trains models on real data: resized/ and split.csv in
FOLDER, as the pipeline writes them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import checks, common, gpu_steps, training
from benchmarks.gpu_steps import WAYS, Way
from benchmarks.training import Stopwatch, Task
from stages.imaging.loader import load_batches
from stages.networks.classifier import logits_of
from stages.networks.inference import default_device
from stages.runtime.machine import usable_cores
from stages.training.epochs import split_into_batches

PACKAGES = ["torch", "torchvision", "transformers", "accelerate", "simplejpeg", "pillow"]
# Small networks of both kinds, for everything but speed.
SMALL_VIT = {
    "model_type": "vit",
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "hidden_dropout_prob": 0.1,
}
SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet34": {"name": "resnet18"},
    "vit": {"name": "a small ViT", "config": SMALL_VIT},
}
# Steps before the timed ones, in which kernels are chosen and memory is allocated.
SKIP = 10
# A batch that fills the GPU, as a multiple of the usual one.
LARGE = 4
# Models and multiples of their batch sizes for which ways of compiling are compared. With a quarter
# of its batch, ResNet34 left half of an H200's time unused, waiting for kernels to be started.
COMPILED: list[tuple[str, float]] = [("vit", 1), ("resnet34", 1 / 4), ("resnet34", 1)]
# For the check of a batch that is too large: bytes of GPU memory, and images.
MEMORY, TOO_MANY = 4 * 2**30, 1024


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    size: int
    bins: int
    matrix: int
    # The models of params.yaml that are measured, with changes of their params.
    networks: dict[str, dict[str, Any]]
    # A multiple of the batch sizes in params.yaml.
    batch: float
    seconds: float


# Shows on any machine that everything runs.
SMALL_SCALE = Scale(32, 64, 256, SMALL_NETWORKS, 1 / 16, 0.5)


def full_scale() -> Scale:
    size = common.load_params()["resize"]["size"]
    return Scale(size, 2048, 8192, {model: {} for model in SMALL_NETWORKS}, 1, 5)


@dataclass
class Report:
    """Writes each section as soon as it is known, since a run may be cut short."""

    path: Path
    minutes: float
    sections: dict[str, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def add(self, heading: str, text: str, news: str | None = None) -> None:
        """Add a section and print it, or only `news`."""
        self.sections[heading] = text
        common.write_report(self.path, "Training on a GPU", self.sections)
        print(f"{self.seconds_passed:.0f} s: {heading}\n{news or text}", flush=True)

    def add_if_it_works(self, heading: str, make: Callable[[], str]) -> None:
        """Add a section. A failure is a result too, since other parts are still worth measuring."""
        try:
            text = make()
        except Exception as error:  # noqa: BLE001 - any failure is reported
            text = describe(error)
        self.add(heading, text)

    @property
    def seconds_passed(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - self.seconds_passed


def describe(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"


@dataclass(frozen=True)
class Speed:
    """One row of the speed table."""

    way: str
    images_a_second: float
    peak: int
    seconds_before: float


def make_task(scale: Scale, folder: Path, model: str, **changes: Any) -> Task:
    """A task whose epoch has as many images as params.yaml says."""
    settings = training.comparable_settings(model, **scale.networks[model] | changes)
    images = common.load_params()["split"]["train"]
    return Task(model, settings, folder, scale.size, images, default_device())


def batch_of(scale: Scale, model: str, factor: float = 1) -> int:
    """A multiple of the model's batch size."""
    return round(factor * scale.batch * common.model_params(model).batch_size)


def matrix_rate(size: int) -> float:
    """Operations per second when multiplying two bfloat16 matrices of this size."""
    device = default_device()
    one, other = torch.randn(2, size, size, device=device).bfloat16()
    stopwatch = Stopwatch(device, skip=3, seconds=1)
    torch.mm(one, other)
    while not stopwatch.step():
        torch.mm(one, other)
    return 2 * size**3 / stopwatch.seconds_a_step


def operations_an_image(task: Task) -> float:
    """Additions and multiplications, forward and backward, per image."""
    network = task.classifier().network.to("meta").train()
    # Two images, since batch normalization refuses a single one.
    images = torch.empty(2, 3, task.size, task.size, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits_of(network(images)).sum().backward()  # type: ignore[no-untyped-call]
    operations: int = counter.get_total_flops()
    return operations / 2


def load_ours(task: Task, stopwatch: Stopwatch, _workers: int) -> None:
    (bins,) = common.load_data(task.folder, "train")
    bins = common.repeated(bins, task.images)
    order = np.random.default_rng(0).permutation(len(bins))
    batches = split_into_batches(len(bins), task.settings.batch_size)
    rows = [order[positions] for positions in batches]
    # A single pass may take less time than is to be measured.
    for _batch in load_batches(bins, 10 * rows, task.device):
        if stopwatch.step():
            break


def load_image_folder(task: Task, stopwatch: Stopwatch, workers: int) -> None:
    """Load uint8 images, so that it does no more work than ours."""
    files = ImageFolder(str(task.folder / "files"), v2.PILToTensor())
    repeats = [files] * -(-task.images // len(files))
    loader: Any = DataLoader(
        ConcatDataset(repeats),
        task.settings.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=task.device.type == "cuda",
    )
    for images, _labels in loader:
        images.to(task.device, non_blocking=True)
        if stopwatch.step():
            break


def loading_speed(
    load: Callable[[Task, Stopwatch, int], None], task: Task, seconds: float, workers: int
) -> float:
    stopwatch = Stopwatch(task.device, skip_with(workers), seconds)
    load(task, stopwatch, workers)
    return task.settings.batch_size / stopwatch.seconds_a_step


def skip_with(workers: int) -> int:
    """Steps to skip: each worker has two batches ready when the first step ends."""
    return SKIP + 2 * workers


def loader_section(scale: Scale, folder: Path) -> str:
    task, cores = make_task(scale, folder, "resnet34"), usable_cores()
    rows = []
    for name, load in {
        f"ours, {cores} threads": load_ours,
        f"torchvision ImageFolder and DataLoader, {cores} workers": load_image_folder,
    }.items():
        speed = common.in_fresh_process(loading_speed, load, task, scale.seconds, cores)
        rows.append([name, str(task.settings.batch_size), common.rounded(speed)])
    return common.table(["JPEG files to uint8 on the GPU", "batch", "images/s"], rows)


def speeds_of_ours(task: Task, seconds: float) -> list[Speed]:
    way = "ours" if task.settings.compile else "ours, not compiled"
    fed = Stopwatch(task.device, SKIP, seconds)
    trainer = training.train_ours(task, fed)
    alone = Stopwatch(task.device, SKIP, seconds)
    training.repeat_one_batch(trainer, alone)
    return [as_speed(way, task, fed), as_speed(f"{way}, one batch on the GPU", task, alone)]


def speeds_of_hugging_face(task: Task, seconds: float) -> list[Speed]:
    workers = usable_cores()
    stopwatch = Stopwatch(task.device, skip_with(workers), seconds)
    training.train_with_hugging_face(task, stopwatch, workers)
    return [as_speed(f"Hugging Face Trainer, {workers} workers", task, stopwatch)]


def speeds_of_way(way: Way, task: Task, seconds: float) -> list[Speed]:
    """Of one batch on the device, with a step that is compiled in this way."""
    stopwatch = Stopwatch(task.device, SKIP, seconds)
    training.repeat_one_batch(way.trainer(task), stopwatch)
    return [as_speed(way.name, task, stopwatch)]


def as_speed(way: str, task: Task, stopwatch: Stopwatch) -> Speed:
    speed = task.settings.batch_size / stopwatch.seconds_a_step
    return Speed(way, speed, stopwatch.peak, stopwatch.seconds_before)


def speed_rows(task: Task, floor: float, speeds: list[Speed]) -> list[list[str]]:
    """A row for each speed. `floor` is the least time that an image can take, in seconds."""
    images = task.images * task.settings.epochs
    return [
        [
            task.model,
            str(task.settings.batch_size),
            speed.way,
            common.rounded(speed.images_a_second),
            f"{floor * speed.images_a_second:.1%}",
            f"{speed.peak / 2**30:.1f}" if speed.peak else "-",
            f"{images / speed.images_a_second / 60:.1f}",
            f"{speed.seconds_before:.0f}",
        ]
        for speed in speeds
    ]


SPEED_HEADER = [
    "network",
    "batch",
    "trained with",
    "images/s",
    "of the matrix rate",
    "GiB",
    "minutes",
    "seconds to start",
]


@dataclass(frozen=True)
class Case:
    """A row or more of a table of speeds."""

    name: str
    measure: Callable[[Task, float], list[Speed]]
    task: Task


def speed_cases(factor: float, scale: Scale, folder: Path) -> Iterator[Case]:
    for model in scale.networks:
        size = batch_of(scale, model, factor)
        make = partial(make_task, scale, folder, model, batch_size=size)
        if default_device().type == "cuda":
            yield Case("ours", speeds_of_ours, make(compile=True))
        yield Case("ours, not compiled", speeds_of_ours, make(compile=False))
        yield Case("Hugging Face Trainer", speeds_of_hugging_face, make())


def way_cases(scale: Scale, folder: Path) -> Iterator[Case]:
    """The ways of compiling, for all networks before the next way, in case the time runs out."""
    for way in WAYS:
        for model, factor in COMPILED:
            size = batch_of(scale, model, factor)
            task = make_task(scale, folder, model, batch_size=size, compile=False)
            yield Case(way.name, partial(speeds_of_way, way), task)


def add_speeds(
    heading: str,
    cases: Callable[[Scale, Path], Iterator[Case]],
    report: Report,
    scale: Scale,
    folder: Path,
    rate: float,
) -> None:
    """Measure the speeds, and add them to the report. `rate` is from matrix_rate."""
    operations = {
        model: operations_an_image(make_task(scale, folder, model)) for model in scale.networks
    }
    needed = [f"{value / 1e9:.4g} GFLOP an image of {model}" for model, value in operations.items()]
    rows: list[list[str]] = []
    for case in cases(scale, folder):
        if report.seconds_left < 0:
            break
        task = case.task
        try:
            speeds = common.in_fresh_process(case.measure, task, scale.seconds)
            new = speed_rows(task, operations[task.model] / rate, speeds)
        except Exception as error:  # noqa: BLE001 - other cases are still worth measuring
            way = f"{case.name}: {describe(error)}"
            new = [[task.model, str(task.settings.batch_size), way, *[""] * 5]]
        rows += new
        note = (
            f"Forward and backward take {', '.join(needed)}; 100% would be the matrix rate."
            f" Minutes are of a training on {task.images:,} images for the epochs of params.yaml,"
            " without its tests."
        )
        text = f"{note}\n\n{common.table(SPEED_HEADER, rows)}"
        report.add(heading, text, news=common.table(SPEED_HEADER, new))


def stop_section(scale: Scale, folder: Path) -> str:
    """Stop and resume with everything on that is random or belongs to the state."""
    settings = {
        "batch_size": 32,
        "epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "ema_decay": 0.9,
        "color_jitter": 0.1,
        "rotation": 5.0,
        "shift": 0.05,
        "blur": 1.0,
        "side_by_side": 0.5,
        "ordinal_share": 0.5,
    }
    rows = []
    for model, network in SMALL_NETWORKS.items():
        task = make_task(scale, folder, model, **settings | network)
        row = common.in_fresh_process(checks.compare_stopped_training, replace(task, images=320))
        rows.append(row)
    return common.table(["network", "stopped after", "at the end, with deterministic"], rows)


def memory_section(scale: Scale, folder: Path) -> str:
    if default_device().type != "cuda":
        return "Needs a GPU."
    task = make_task(scale, folder, "resnet34", batch_size=TOO_MANY, compile=False)
    task = replace(task, images=TOO_MANY)
    message = common.in_fresh_process(checks.too_large_batch, task, MEMORY)
    advised = common.in_fresh_process(checks.follow_advice, task, MEMORY, message)
    allowed = f"A batch of {TOO_MANY} images with {MEMORY / 2**30:g} GiB of memory:"
    return f"{allowed}\n\n> {message}\n\n{advised}"


def accuracy_section(options: argparse.Namespace, model: str, seconds: float) -> str:
    settings = common.model_params(model, **{"pretrained": False} | dict(options.set))
    return common.in_fresh_process(checks.accuracies, options.data, model, settings, seconds)


def profile_section(scale: Scale, folder: Path) -> str:
    parts = []
    for model in scale.networks:
        task = make_task(scale, folder, model, batch_size=batch_of(scale, model))
        stopwatch = Stopwatch(task.device, SKIP, scale.seconds)
        parts.append(common.in_fresh_process(gpu_steps.profile_steps, task, stopwatch))
    return "\n".join(parts)


def attention_section(scale: Scale, folder: Path) -> str:
    task = make_task(scale, folder, "vit", batch_size=batch_of(scale, "vit"))
    return common.in_fresh_process(gpu_steps.time_attention, task, scale.seconds / 10)


def add_section(
    heading: str,
    make: Callable[[Scale, Path], str],
    report: Report,
    scale: Scale,
    folder: Path,
    _rate: float,
) -> None:
    if report.seconds_left > 0:
        report.add_if_it_works(heading, partial(make, scale, folder))


PARTS: dict[str, Callable[[Report, Scale, Path, float], None]] = {
    "loader": partial(add_section, "The loader alone", loader_section),
    "stop": partial(add_section, "Stopped and resumed", stop_section),
    "memory": partial(add_section, "A batch too large", memory_section),
    # Before the parts below, since a network that was compiled before starts sooner.
    "speed": partial(add_speeds, "Images per second", partial(speed_cases, 1)),
    "profile": partial(add_section, "What takes the time of a step", profile_section),
    "attention": partial(add_section, "Ways to compute attention", attention_section),
    "ways": partial(add_speeds, "Ways to compile a step, with one batch on the GPU", way_cases),
    "large": partial(add_speeds, "With larger batches", partial(speed_cases, LARGE)),
}


def describe_setup(scale: Scale, folder: Path, rate: float) -> str:
    kilobytes = common.mean_file_size(folder) / 1000
    return (
        f"{common.describe_machine(default_device(), PACKAGES)}\n"
        f"The matrix rate is {rate / 1e12:.4g} TFLOP/s, measured by multiplying two bfloat16"
        f" matrices of {scale.matrix} x {scale.matrix}. Images are {scale.bins} synthetic bins,"
        f" repeated: JPEGs of {scale.size} pixels and {kilobytes:.1f} kB. Weights are random."
        f" Each case runs in its own process, and is timed for {scale.seconds:g} seconds."
    )


def main() -> None:
    options = parse_options()
    scale = SMALL_SCALE if options.small else full_scale()
    report = Report(options.out, options.minutes)
    if options.parts:
        rate = common.in_fresh_process(matrix_rate, scale.matrix)
        with common.synthetic_data(scale.bins, 0, scale.size) as folder:
            report.add("", describe_setup(scale, folder, rate))
            for name, add in PARTS.items():
                if name in options.parts:
                    add(report, scale, folder, rate)
    else:
        report.add("", common.describe_machine(default_device(), PACKAGES))
    for model in options.models if options.data else []:
        make = partial(accuracy_section, options, model, report.seconds_left)
        report.add_if_it_works(f"Accuracy of {model}", make)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "train-gpu.md")
    parser.add_argument(
        "--minutes", type=float, default=12, help="no measurement begins after (default: 12)"
    )
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all"
    )
    parser.add_argument(
        "--small", action="store_true", help="use tiny sizes, only to see that it runs"
    )
    parser.add_argument("--data", type=Path, help="also train on the bins in this folder")
    parser.add_argument(
        "--models", nargs="+", default=["resnet34"], help="for --data (default: resnet34)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=parse_setting,
        metavar="KNOB=VALUE",
        help="change settings of params.yaml for --data, like epochs=3",
    )
    return parser.parse_args()


def parse_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, common.parse_yaml(value)


if __name__ == "__main__":
    main()
