"""Kills stages at random moments, and holds what they write in the end against an undisturbed run.

`python -m tests.kills --times 30` kills each stage so often, and then `dvc repro` (tests/lab.py).
The stages run in forks of a process that has imported them: so they are killed while they work,
not while Python starts. Those that DVC runs are killed anywhere.
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

from tests.faults import fault_proxy
from tests.forks import STAGES, Bench, Done, serving_hub
from tests.lab import Lab, differences, kill_alone, kill_group
from tests.project import fill_buckets
from tools.s3 import CLIENT_ENVIRONMENT, serving


@dataclass
class Tally:
    """A row of the table: how often something was killed, and what came of it.

    `found`: the kills that left finished work; `ended`: the runs that ended before their kill;
    `remedies`: what it took to go on where a kill had cut a file of DVC's own.
    """

    what: str
    seconds: float
    kills: int = 0
    found: int = 0
    ended: int = 0
    completed: int = 0
    remedies: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        verdict = "no" if self.problems else "yes"
        for remedy, count in self.remedies.items():
            verdict += f", {count} x after `{remedy}`"
        return (
            f"{self.what:<22}{self.seconds:9.2f}{self.kills:7}{self.found:11}{self.ended:14}"
            f"{self.completed:11}   {verdict}"
        )


HEADER = (
    f"{'what':<22}{'seconds':>9}{'kills':>7}{'left work':>11}{'ended before':>14}"
    f"{'completed':>11}   bytes equal, nothing left behind, nothing done twice"
)


def kill_stage(bench: Bench, stage: str, times: int, seed: int) -> Tally:
    """Kill it one to three times before it may end, again and again, `times` in all."""
    chance = random.Random(f"{seed} {stage}")
    bench.run_undisturbed(stage)
    tally = Tally(stage, bench.seconds[stage])
    while tally.kills < times:
        done = Done()
        for _ in range(min(chance.randint(1, 3), times - tally.kills)):
            killed = bench.kill(stage, chance.random() * tally.seconds)
            tally.problems += bench.repeated(done)
            done = bench.done()
            tally.kills += killed
            tally.ended += not killed
            tally.found += killed and done != Done()
        said = bench.finish(stage)
        tally.problems += bench.repeated(done)
        if done.place and f"going on after {done.place}\n" not in said:
            tally.problems.append(f"did not go on after {done.place}")
        bench.commit()
        tally.problems += differences(bench.undisturbed, bench.files())
        tally.completed += 1
    return tally


def kill_dvc(lab: Lab, how: Callable[[int], None], times: int, seed: int) -> Tally:
    """Kill `dvc repro` up to eight times before it may end, again and again, `times` in all."""
    chance = random.Random(f"{seed} {how.__name__}")
    tally = Tally(f"dvc repro, {how.__name__}", lab.seconds)
    while tally.kills < times:
        place = lab.fresh()
        for _ in range(min(chance.randint(3, 8), times - tally.kills)):
            run = place.start()
            time.sleep(chance.random() * lab.seconds / 3)
            killed = run.kill(how)
            tally.problems += place.repeated()
            tally.kills += killed
            tally.ended += not killed
            tally.found += killed and any(place.folder.glob(".cache/*/*"))
            if not killed:
                break
        tally.remedies.update(place.finish())
        tally.problems += lab.problems(place)
        tally.completed += 1
    return tally


def cut_lock(lab: Lab, times: int, seed: int) -> Tally:
    """Leave what a kill leaves that comes while DVC writes dvc.lock."""
    chance = random.Random(f"{seed} dvc.lock")
    tally = Tally("dvc.lock cut", lab.seconds)
    place = lab.first
    path = place.folder / "dvc.lock"
    whole = path.read_bytes()
    for _ in range(times):
        path.write_bytes(whole[: chance.randrange(len(whole))])
        tally.remedies.update(place.finish())
        if "Running stage" in place.said:
            tally.problems.append("ran a stage again")
        tally.problems += lab.problems(place)
        tally.completed += 1
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="kills of each: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments: 0")
    arguments = parser.parse_args()
    os.environ |= CLIENT_ENVIRONMENT
    problems = 0
    print(f"{arguments.times} kills of each, seed {arguments.seed}\n{HEADER}", flush=True)
    with TemporaryDirectory() as folder:
        for tally in kill_all(Path(folder), arguments.times, arguments.seed):
            print(tally.row(), *tally.problems, sep="\n  ", flush=True)
            problems += len(tally.problems)
    return min(1, problems)


def kill_all(folder: Path, times: int, seed: int) -> Iterator[Tally]:
    fill_buckets(folder / "s3")
    with serving(folder / "s3") as url, fault_proxy(url) as proxy, serving_hub() as hub:
        bench = Bench(folder / "bench", proxy, hub)
        for stage in STAGES:
            yield kill_stage(bench, stage, times, seed)
        lab = Lab(folder / "lab", url, proxy)
        for how in (kill_alone, kill_group):
            yield kill_dvc(lab, how, times, seed)
        yield cut_lock(lab, times, seed)


if __name__ == "__main__":
    sys.exit(main())
