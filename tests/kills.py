"""Disturb stages and DVC at random moments, and compare all bytes with those of an undisturbed run.

`python -m tests.kills --times 30` kills each stage 30 times while it works, and then disturbs
`dvc repro` 30 times in each of several ways. It prints a line for each. The exit code is 1 if any
run ended with other bytes, left something behind, or repeated finished work.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import Fault, fault_proxy, no_faults, outage, passing
from tests.forks import STAGES, Bench
from tests.lab import (
    DisturbedClone,
    Lab,
    differences,
    kill_alone,
    kill_group,
    kill_stage,
    terminate,
)
from tests.project import fill_buckets
from tools.s3 import CLIENT_ENVIRONMENT, serving


@dataclass
class Tally:
    """A row of the table: how often something was disturbed, and with what result.

    `too_late` counts the runs that ended before the disturbance, and `remedies` the commands that
    were needed after a kill had damaged one of DVC's own files.
    """

    what: str
    times: int = 0
    too_late: int = 0
    completed: int = 0
    remedies: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        verdict = "no" if self.problems else "yes"
        verdict += "".join(f", {count} x after `{one}`" for one, count in self.remedies.items())
        return f"{self.what:<28}{self.times:7}{self.too_late:10}{self.completed:11}   {verdict}"


HEADER = f"{'what':<28}{'times':>7}{'too late':>10}{'completed':>11}   same bytes, nothing left"


def kill_stages(bench: Bench, stage: str, times: int, seed: int) -> Tally:
    """Kill a stage one to three times before it may end, and repeat that, `times` kills in all."""
    chance = random.Random(f"{seed} {stage}")
    bench.run_undisturbed(stage)
    name = stage.replace(" ", "-")
    tally = Tally(stage)
    while tally.times < times:
        ids, shards = set[str](), set[tuple[str, int, int]]()
        for _ in range(min(chance.randint(1, 3), times - tally.times)):
            killed = bench.kill(stage, chance.random() * bench.seconds[stage])
            tally.times += killed
            tally.too_late += not killed
            tally.problems += repeated(bench, name, ids, shards)
            ids, shards = bench.done(name)
        resumes = bench.has_checkpoint() and stage.startswith("train")
        printed = bench.finish(stage)
        tally.problems += repeated(bench, name, ids, shards)
        if resumes and "after epoch" not in printed:
            tally.problems.append("did not continue from its checkpoint")
        tally.problems += differences(bench.undisturbed, bench.files())
        tally.completed += 1
    return tally


def repeated(
    bench: Bench, stage: str, ids: set[str], shards: set[tuple[str, int, int]]
) -> list[str]:
    """Work that had been finished and was repeated."""
    asked = {Path(name).stem for name in bench.proxy.take_requests()}
    again = [f"requested {one} again" for one in sorted(asked & ids)]
    return again + [f"built {name} again" for name, *_ in shards - bench.done(stage)[1]]


#: Disturbs a run of DVC. Returns False if the run had already ended.
Disturb = Callable[[Lab, DisturbedClone, random.Random], bool]


def killed(how: Callable[[int], None]) -> Disturb:
    def disturb(lab: Lab, clone: DisturbedClone, chance: random.Random) -> bool:
        run = clone.start()
        time.sleep(chance.random() * lab.seconds / 2)
        return run.kill(how)

    return disturb


def faulty_store(lab: Lab, clone: DisturbedClone, chance: random.Random) -> bool:
    lab.proxy.plan = passing(0.1, chance.randrange(1000))
    return clone.start().wait() == 0


def store_gone(lab: Lab, clone: DisturbedClone, chance: random.Random) -> bool:
    fault = chance.choice([Fault.SLOW_DOWN, Fault.RESET, Fault.DENIED])
    after = lab.proxy.requests.total() + chance.randrange(1, 200)
    lab.proxy.plan = outage(fault, after, lists=chance.random() < 0.5)
    return clone.start().wait() != 0


def two_at_once(lab: Lab, clone: DisturbedClone, chance: random.Random) -> bool:
    first = clone.start()
    time.sleep(chance.random() * lab.seconds / 2)
    second = clone.start()
    return {first.wait(), second.wait()} != {0}


DISTURBANCES: dict[str, Disturb] = {
    "DVC killed": killed(kill_alone),
    "DVC and its stage killed": killed(kill_group),
    "the stage killed": killed(kill_stage),
    "SIGTERM for all": killed(terminate),
    "a fault in ten requests": faulty_store,
    "the store is gone": store_gone,
    "two runs at once": two_at_once,
}


STORE = {"a fault in ten requests", "the store is gone"}


def disturb_dvc(lab: Lab, what: str, times: int, seed: int) -> Tally:
    """Disturb `dvc repro` one to five times before it may end, and repeat that."""
    chance = random.Random(f"{seed} {what}")
    tally = Tally(f"dvc repro, {what}")
    while tally.times < times:
        clone = lab.fresh()
        for _ in range(min(chance.randint(1, 5), times - tally.times)):
            in_time = DISTURBANCES[what](lab, clone, chance)
            lab.proxy.plan = no_faults
            again = clone.repeated()
            # After an outage, a reader asks for a finished object to see whether the store is back.
            tally.problems += again if what not in STORE else []
            tally.times += 1
            tally.too_late += not in_time
        tally.remedies.update(clone.finish())
        tally.problems += lab.problems(clone)
        tally.completed += 1
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="for each row (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="for the moments (default: 0)")
    arguments = parser.parse_args()
    os.environ |= CLIENT_ENVIRONMENT
    problems = 0
    print(f"{arguments.times} of each, seed {arguments.seed}\n{HEADER}", flush=True)
    with TemporaryDirectory() as folder:
        for tally in disturb_all(Path(folder), arguments.times, arguments.seed):
            print(tally.row(), *tally.problems, sep="\n  ", flush=True)
            problems += len(tally.problems)
    return min(1, problems)


def disturb_all(folder: Path, times: int, seed: int) -> Iterator[Tally]:
    fill_buckets(folder / "s3")
    with serving(folder / "s3") as url, fault_proxy(url) as proxy:
        bench = Bench(folder / "bench", proxy)
        for stage in STAGES:
            yield kill_stages(bench, stage, times, seed)
        proxy.plan = no_faults
        lab = Lab(folder / "lab", proxy)
        for what in DISTURBANCES:
            yield disturb_dvc(lab, what, times, seed)


if __name__ == "__main__":
    sys.exit(main())
