"""Stages and DVC killed while they work; `python -m tests.kills` does that at random moments."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import FaultProxy, fault_proxy, no_faults
from tests.forks import STAGES, Bench
from tests.kills import HEADER, kill_stages
from tests.lab import REMEDIES, Lab, kill_alone, kill_group, wait_for
from tests.project import fill_buckets
from tools.s3 import serving

pytestmark = pytest.mark.slow
SEED = 0


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    folder = tmp_path_factory.mktemp("server") / "s3"
    fill_buckets(folder)
    with serving(folder) as url, fault_proxy(url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bench(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kills") / "bench", proxy)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_with_the_bytes_of_an_undisturbed_one(bench: Bench, stage: str) -> None:
    tally = kill_stages(bench, stage, times=2, seed=SEED)
    print(HEADER, tally.row(), sep="\n")
    assert tally.problems == []
    assert tally.times == 2


@pytest.fixture(scope="module")
def lab(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab for the stages up to fetch."""
    proxy.plan = no_faults
    return Lab(tmp_path_factory.mktemp("kills") / "lab", proxy, "fetch")


def has_shard(folder: Path, stage: str) -> bool:
    """Whether an unfinished run of the stage has built a shard."""
    return any(folder.glob(f".cache/{stage}-*/shards/*.parquet"))


def test_dvc_killed_with_or_without_its_stage_ends_with_the_bytes_of_an_undisturbed_run(
    lab: Lab,
) -> None:
    clone = lab.fresh()
    for how, stage in ((kill_group, "index"), (kill_alone, "fetch")):
        run = clone.start()
        wait_for(partial(has_shard, clone.folder, stage))
        assert run.kill(how)
        assert clone.repeated() == []
    clone.finish()
    assert clone.repeated() == []
    assert lab.problems(clone) == []


def test_dvc_killed_before_it_has_the_photographs_does_not_fetch_them_again(lab: Lab) -> None:
    clone = lab.fresh()
    run = clone.start()
    wait_for(lambda: list(clone.folder.glob(".cache/fetch-*/.finished")))
    assert run.kill(kill_group)
    assert "\n  fetch:\n" not in clone.lock
    lab.proxy.take_requests()
    clone.finish()
    assert lab.proxy.take_requests() == {}
    assert lab.problems(clone) == []


def test_files_of_dvc_that_a_kill_can_damage_have_a_remedy(lab: Lab) -> None:
    """DVC writes some files in place, or creates their folders first; a kill may come between."""
    clone = lab.first
    lock, rwlock = clone.folder / "dvc.lock", clone.folder / ".dvc/tmp/rwlock"
    whole = lock.read_bytes()
    lock.write_bytes(b"")
    rwlock.write_text('{"write": {')
    (noted,) = (path for path in runs(clone.folder) if "stages.subset" in path.read_text("utf-8"))
    noted.unlink()
    lab.proxy.take_requests()
    assert sorted(clone.finish()) == sorted(set(REMEDIES.values()))
    assert "Running stage 'subset'" in clone.printed
    assert lab.proxy.take_requests() == {}
    assert lock.read_bytes() == whole
    assert lab.problems(clone) == []


def runs(folder: Path) -> list[Path]:
    """The files of DVC's run cache, one for each run."""
    return [path for path in folder.glob(".dvc/cache/runs/*/*/*") if path.is_file()]
