"""Two trainings side by side on a CPU, compared with one alone, by how long waiting threads spin.

python -m benchmarks.side_by_side
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

from benchmarks import common, training
from benchmarks.training import Stopwatch, Task
from stages.imaging.loader import CPU
from stages.runtime.machine import SPINS

BINS = 256
# Steps in an epoch: more than are ever reached.
EPOCH = 20_000
# As in `make demo`.
SIZE, BATCH = 64, 32
WAYS: Mapping[str, Mapping[str, str]] = {
    f"ours: {SPINS} spins": {"GOMP_SPINCOUNT": SPINS},
    "libgomp's own: 300000 spins": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE: no spins": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread each": {"OMP_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class Case:
    way: str
    trainings: int

    def __str__(self) -> str:
        return f"{self.way}, {self.trainings} at once"


def images_per_second(task: Task, case: Case, seconds: float) -> float:
    """The mean speed of the trainings, which are timed during the same seconds."""
    for name in {name for variables in WAYS.values() for name in variables}:
        os.environ.pop(name, None)
    os.environ.update(WAYS[case.way])
    # Unlike forked ones, spawned processes read these variables.
    spawn = multiprocessing.get_context("spawn")
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(case.trainings, spawn) as pool:
        start = manager.Barrier(case.trainings)
        speeds = [pool.submit(_train, task, seconds, start) for _ in range(case.trainings)]
        return statistics.mean(speed.result() for speed in speeds)


def _train(task: Task, seconds: float, start: Barrier) -> float:
    start.wait()
    stopwatch = Stopwatch(CPU, skip=3, seconds=seconds)
    training.train_ours(task, stopwatch)
    return task.settings.batch_size / stopwatch.seconds_a_step


def speed_table(speeds: Mapping[Case, list[float]]) -> str:
    rows = []
    for way in WAYS:
        alone, beside = (speeds[Case(way, trainings)] for trainings in (1, 2))
        slower = statistics.median(alone) / statistics.median(beside)
        rows.append([way, common.spread(alone), common.spread(beside), common.times(slower)])
    header = ["waiting threads", "alone", "each of two", "two take, beside one alone"]
    return common.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", type=float, default=6, help="per measurement (default: 6)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "side-by-side.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, ["torch", "torchvision"])
    settings = training.comparable_settings("resnet34", batch_size=BATCH)
    with common.synthetic_data(BINS, 0, SIZE) as folder:
        task = Task("resnet34", settings, folder, SIZE, EPOCH * BATCH, CPU)

        def measure(case: Case) -> float:
            return images_per_second(task, case, options.seconds)

        cases = [Case(way, trainings) for way in WAYS for trainings in (1, 2)]
        speeds = common.interleaved(cases, options.rounds, measure)
    scale = (
        f"ResNet34 on synthetic bins of {SIZE} pixels in batches of {BATCH}, as in `make demo`."
        f" Steps are timed for {options.seconds:g} seconds after the first three, in new processes"
        f" for each measurement; medians of {options.rounds} rounds, with the least and the most."
    )
    sections = {"": f"{machine}\n{scale}", "Images per second": speed_table(speeds)}
    common.write_report(options.out, "Trainings side by side on a CPU", sections)


if __name__ == "__main__":
    main()
