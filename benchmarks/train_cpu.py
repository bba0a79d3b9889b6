"""Training on a CPU, compared with transformers' Trainer and torchvision's reference loop.

python -m benchmarks.train_cpu
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, training
from benchmarks.training import Stopwatch, Task
from stages.imaging.loader import CPU
from stages.runtime.machine import usable_cores

PACKAGES = ["torch", "torchvision", "transformers", "accelerate", "simplejpeg", "pillow"]
# Steps in an epoch: more than are ever reached.
EPOCH = 20_000
BINS = 256
TINY_SIZE, TINY_BATCH = 32, 8

WAYS: Mapping[str, Callable[[Task, Stopwatch], Any]] = {
    "ours": training.train_ours,
    "Hugging Face Trainer": training.train_with_hugging_face,
    "torchvision's reference loop": partial(
        training.train_like_torchvision, workers=usable_cores()
    ),
}
WAYS_TO_STEP: Mapping[str, Callable[[Task, Stopwatch], Any]] = {
    "ours, one batch in memory": training.train_on_one_batch,
    "ours, loading its images": training.train_ours,
    "Hugging Face Trainer, images in memory": training.train_with_hugging_face_from_memory,
    "a bare loop, one batch in memory": training.train_bare,
}


@dataclass(frozen=True)
class Case:
    model: str
    way: str

    def __str__(self) -> str:
        return f"{self.model}, {self.way}"


def seconds_a_step(task: Task, way: str, seconds: float) -> float:
    """The first steps, which allocate memory, are not timed."""
    if task.model == training.TINY:
        # Tensors this small gain nothing from more threads.
        torch.set_num_threads(1)
        stopwatch = Stopwatch(CPU, skip=50, seconds=min(2.0, seconds))
        WAYS_TO_STEP[way](task, stopwatch)
    else:
        stopwatch = Stopwatch(CPU, skip=1, seconds=seconds)
        WAYS[way](task, stopwatch)
    return stopwatch.seconds_a_step


def speed_table(tasks: Mapping[str, Task], steps: Mapping[Case, list[float]]) -> str:
    rows = []
    for case, values in steps.items():
        if case.model == training.TINY:
            continue
        batch = tasks[case.model].settings.batch_size
        own = statistics.median(steps[Case(case.model, "ours")])
        ratio = common.times(statistics.median(values) / own)
        speeds = [batch / value for value in values]
        rows.append([case.model, case.way, str(batch), common.spread(speeds), ratio])
    return common.table(["network", "trained with", "batch", "images/s", "ours is"], rows)


def overhead_table(steps: Mapping[Case, list[float]]) -> str:
    rows = [
        [case.way, common.spread([1000 * value for value in values])]
        for case, values in steps.items()
        if case.model == training.TINY
    ]
    return common.table(["trained with", "ms a step"], rows)


def tiny_task(folder: Path) -> Task:
    settings = training.comparable_settings("resnet34", batch_size=TINY_BATCH)
    return Task(training.TINY, settings, folder, TINY_SIZE, EPOCH * TINY_BATCH, CPU)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=12, help="per measurement (default: 12)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--resnet34-batch", type=int, default=16, help="default: 16")
    parser.add_argument("--vit-batch", type=int, default=8, help="default: 8")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "train-cpu.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, PACKAGES)
    batches = {"resnet34": options.resnet34_batch, "vit": options.vit_batch}
    cases = [Case(model, way) for model in batches for way in WAYS]
    cases += [Case(training.TINY, way) for way in WAYS_TO_STEP]
    with (
        common.synthetic_data(BINS, 0, options.size) as folder,
        common.synthetic_data(BINS, 0, TINY_SIZE) as tiny_folder,
    ):
        tasks = {training.TINY: tiny_task(tiny_folder)}
        for model, batch in batches.items():
            settings = training.comparable_settings(model, batch_size=batch)
            tasks[model] = Task(model, settings, folder, options.size, EPOCH * batch, CPU)

        def measure(case: Case) -> float:
            task = tasks[case.model]
            return common.in_fresh_process(seconds_a_step, task, case.way, options.seconds)

        steps = common.interleaved(cases, options.rounds, measure)
    scale = (
        f"Synthetic bins as JPEGs of {options.size} pixels, random weights, AdamW. Steps are timed"
        f" for {options.seconds:g} seconds after the first one, in a new process for each"
        f" measurement; medians of {options.rounds} rounds, with the least and the most."
    )
    overhead = (
        f"A network that computes next to nothing, {TINY_BATCH} images of {TINY_SIZE} pixels."
        " All but one keep their images in memory; ours normalizes and flips them in the step."
    )
    sections = {
        "": f"{machine}\n{scale}",
        "Images per second": speed_table(tasks, steps),
        "Overhead of a step": f"{overhead}\n\n{overhead_table(steps)}",
    }
    common.write_report(options.out, "Training on a CPU", sections)


if __name__ == "__main__":
    main()
