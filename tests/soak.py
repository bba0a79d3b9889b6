"""Runs the pipeline for some rounds, each disturbed in another way, and compares all bytes.

`python -m tests.soak --rounds 20 --seed 0`: a line for each round, and a table at the end. It ends
with 1 where a round left other bytes than an undisturbed run, left something behind, or did work
twice that was finished. No round begins after `--minutes`.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import Fault, at_random, fault_proxy, no_faults, outage
from tests.lab import Lab, Place, kill_alone, kill_group, kill_stage
from tests.project import fill_buckets
from tools.s3 import CLIENT_ENVIRONMENT, serving


@dataclass(frozen=True)
class Round:
    """What was done in it, what `dvc repro` said to it, and what was wrong in the end."""

    fault: str
    outcomes: list[str]
    seconds: float
    problems: list[str]


#: Disturbs a run, and says what came of it.
Disturb = Callable[[Lab, Place, random.Random], str]


def interrupted(how: Callable[[int], None]) -> Disturb:
    def disturb(lab: Lab, place: Place, chance: random.Random) -> str:
        run = place.start()
        time.sleep(chance.random() * lab.seconds * 0.8)
        if not run.kill(how):
            return "came too late"
        return "the next run went on"

    return disturb


def terminate(pid: int) -> None:
    """As a machine does that goes down."""
    os.killpg(pid, signal.SIGTERM)


def faulty_store(lab: Lab, place: Place, chance: random.Random) -> str:
    lab.proxy.plan = at_random(list(Fault), 0.1, chance.randrange(1000))
    code = place.start().wait()
    lab.proxy.plan = no_faults
    return f"ended with {code}"


def store_gone(lab: Lab, place: Place, chance: random.Random) -> str:
    fault = chance.choice([Fault.SLOW_DOWN, Fault.RESET, Fault.DENIED])
    after = lab.proxy.requests.total() + chance.randrange(1, 200)
    lab.proxy.plan = outage(fault, after, lists=chance.random() < 0.5)
    code = place.start().wait()
    lab.proxy.plan = no_faults
    return f"ended with {code}"


def two_at_once(lab: Lab, place: Place, chance: random.Random) -> str:
    first = place.start()
    time.sleep(chance.random() * lab.seconds * 0.8)
    second = place.start()
    codes = sorted(run.wait() for run in (first, second))
    return f"ended with {codes[0]} and {codes[1]}"


def cut_lock(lab: Lab, place: Place, chance: random.Random) -> str:
    run = place.start()
    time.sleep(chance.random() * lab.seconds * 0.8)
    run.kill(kill_group)
    lock = place.folder / "dvc.lock"
    if not lock.exists():
        return "came too early"
    whole = lock.read_bytes()
    lock.write_bytes(whole[: chance.randrange(len(whole))])
    return "the next run went on"


FAULTS: dict[str, Disturb] = {
    "one fault in ten requests": faulty_store,
    "the store is gone": store_gone,
    "DVC killed": interrupted(kill_alone),
    "DVC and its stage killed": interrupted(kill_group),
    "the stage killed": interrupted(kill_stage),
    "SIGTERM for all": interrupted(terminate),
    "two runs at once": two_at_once,
    "dvc.lock cut": cut_lock,
}


def run_round(lab: Lab, fault: str, chance: random.Random) -> Round:
    """Disturb the pipeline in this way once to three times, and let it end."""
    start = time.monotonic()
    place = lab.fresh()
    outcomes, problems = [], []
    for _ in range(chance.randint(1, 3)):
        outcome = FAULTS[fault](lab, place, chance)
        problems += place.repeated()
        outcomes.append(outcome)
    outcomes += [f"after `{remedy}`" for remedy in place.finish()]
    problems += lab.problems(place)
    return Round(fault, outcomes, time.monotonic() - start, problems)


def table(rounds: list[Round]) -> str:
    by_fault = defaultdict(list)
    for one in rounds:
        by_fault[one.fault].append(one)
    lines = [f"{'fault':<28}{'rounds':>7}{'times':>7}   {'bytes equal':<13}outcomes"]
    for fault, some in by_fault.items():
        outcomes = [outcome for one in some for outcome in one.outcomes]
        counted = ", ".join(f"{outcomes.count(text)} x {text}" for text in sorted(set(outcomes)))
        equal = "no" if any(one.problems for one in some) else "yes"
        times = sum(not outcome.startswith("after `") for outcome in outcomes)
        lines.append(f"{fault:<28}{len(some):>7}{times:>7}   {equal:<13}{counted}")
    return "\n".join(lines)


def soak(folder: Path, count: int, seed: int, deadline: float) -> list[Round]:
    fill_buckets(folder / "s3")
    rounds: list[Round] = []
    order = random.Random(seed).sample(sorted(FAULTS), len(FAULTS))
    with serving(folder / "s3") as url, fault_proxy(url) as proxy:
        lab = Lab(folder / "lab", url, proxy)
        print(f"undisturbed: {lab.seconds:.0f} s", flush=True)
        while len(rounds) < count and time.monotonic() < deadline:
            number = len(rounds)
            chance = random.Random(f"{seed} {number}")
            one = run_round(lab, order[number % len(order)], chance)
            verdict = "; ".join(one.problems) or "bytes equal"
            outcomes = ", ".join(one.outcomes)
            print(
                f"{number + 1}. {one.fault}: {outcomes}; {one.seconds:.0f} s; {verdict}", flush=True
            )
            rounds.append(one)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=len(FAULTS), help=f"{len(FAULTS)}")
    parser.add_argument("--seed", type=int, default=0, help="of faults and moments: 0")
    parser.add_argument("--minutes", type=float, default=60, help="60")
    arguments = parser.parse_args()
    os.environ |= CLIENT_ENVIRONMENT
    deadline = time.monotonic() + 60 * arguments.minutes
    print(f"{arguments.rounds} rounds, seed {arguments.seed}", flush=True)
    with TemporaryDirectory() as folder:
        rounds = soak(Path(folder), arguments.rounds, arguments.seed, deadline)
    print(table(rounds))
    return int(any(one.problems for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
