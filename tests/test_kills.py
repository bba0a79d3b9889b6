"""Kills at random moments, of stages and of DVC; `python -m tests.kills` has many more of them."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from stages.runtime.files import atomic_write
from stages.runtime.work import publish_folder
from stages.training.checkpoint import TrainingState, save_checkpoint
from tests.faults import FaultProxy, fault_proxy
from tests.forks import STAGES, Bench, serving_hub
from tests.kills import HEADER, kill_stage
from tests.lab import REMEDIES, Lab, Place, kill_alone, kill_group, wait_for
from tests.made import full_network

SEED = 0


@pytest.fixture(scope="module")
def proxy(endpoint: str) -> Iterator[FaultProxy]:
    with fault_proxy(endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bench(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with fault_proxy(endpoint) as proxy, serving_hub() as hub:
        yield Bench(tmp_path_factory.mktemp("kills") / "bench", proxy, hub)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_with_the_bytes_of_one_that_was_not(bench: Bench, stage: str) -> None:
    tally = kill_stage(bench, stage, times=2, seed=SEED)
    print(HEADER, tally.row(), sep="\n")
    assert tally.problems == []
    assert tally.kills == 2


@pytest.fixture(scope="module")
def lab(endpoint: str, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Of the stages up to fetch."""
    return Lab(tmp_path_factory.mktemp("kills") / "lab", endpoint, proxy, "fetch")


def test_dvc_killed_with_its_stage_and_without_ends_with_the_bytes_of_a_run_that_was_not(
    lab: Lab,
) -> None:
    place = lab.fresh()
    chance = random.Random(SEED)
    for how in (kill_group, kill_alone):
        run = place.start()
        after = chance.uniform(0.2, 0.5) * lab.seconds
        print(f"{how.__name__} after {after:.2f} s (seed {SEED})")
        time.sleep(after)
        assert run.kill(how)
        assert place.repeated() == []
    place.finish()
    assert lab.problems(place) == []


def test_dvc_killed_before_it_has_the_photographs_does_not_fetch_them_again(lab: Lab) -> None:
    place = lab.fresh()
    run = place.start()
    wait_for(lambda: list(place.folder.glob(".cache/fetch-*.finished")))
    assert run.kill(kill_group)
    assert "\n  fetch:\n" not in place.lock
    lab.proxy.take_requests()
    place.finish()
    assert lab.proxy.take_requests() == {}
    assert lab.problems(place) == []


def test_what_a_kill_can_cut_of_dvcs_own_files_has_a_remedy(lab: Lab) -> None:
    """DVC writes these files in place, or first makes the folder; a kill may come in between."""
    place = lab.first
    lock, rwlock = place.folder / "dvc.lock", place.folder / ".dvc/tmp/rwlock"
    whole = lock.read_bytes()
    lock.write_bytes(b"")
    rwlock.write_text('{"write": {')
    (noted,) = (path for path in runs(place) if "stages.subset" in path.read_text("utf-8"))
    noted.unlink()
    assert sorted(place.finish()) == sorted(set(REMEDIES.values()))
    assert "Running stage 'subset'" in place.said
    assert lab.proxy.take_requests() == {}
    assert lock.read_bytes() == whole
    assert lab.problems(place) == []


def runs(place: Place) -> list[Path]:
    """What DVC has noted of them, a file each."""
    return [path for path in place.folder.glob(".dvc/cache/runs/*/*/*") if path.is_file()]


Events = list[tuple[str, Path]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Each flush, and each renaming by its target, in the order in which they happen."""
    happened: Events = []

    def recorded_fsync(descriptor: int) -> None:
        happened.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def recorded(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(source: Path, target: Path) -> None:
            rename(source, target)
            happened.append(("rename", Path(source)))
            happened.append(("to", Path(target)))

        return call

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.rename", recorded(os.rename))
    monkeypatch.setattr("os.replace", recorded(os.replace))
    return happened


def assert_safe_in_a_power_loss(events: Events, whole: Path) -> None:
    """`whole`, a file or a folder, and all in it were flushed before they got that name; then the
    name was."""
    place = events.index(("to", whole))
    _, temporary = events[place - 1]
    inner = [temporary / path.relative_to(whole) for path in [whole, *whole.rglob("*")]]
    before = [path for event, path in events[: place - 1] if event == "flush"]
    assert set(inner) <= set(before)
    assert ("flush", whole.parent) in events[place:]


@pytest.mark.usefixtures("workspace")
def test_a_file_is_flushed_before_it_has_its_name(tmp_path: Path, events: Events) -> None:
    path = tmp_path / "data/split.csv"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert_safe_in_a_power_loss(events, path)


def test_a_folder_is_flushed_file_by_file_before_it_has_its_name(
    tmp_path: Path, events: Events
) -> None:
    """Also what a library has written without flushing it, like a model."""
    (tmp_path / "work").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "work" / name).write_text("whole")
    publish_folder(tmp_path / "work", tmp_path / "models/vit")
    assert_safe_in_a_power_loss(events, tmp_path / "models/vit")


def test_a_checkpoint_is_flushed_before_it_has_its_name(tmp_path: Path, events: Events) -> None:
    network = full_network(5)
    optimizer = torch.optim.Adam(network.parameters())
    state = TrainingState(network, optimizer, None, torch.zeros(3), torch.zeros(1, 6))
    save_checkpoint(tmp_path / "checkpoint.safetensors", state, (0.0, 0.0))
    assert_safe_in_a_power_loss(events, tmp_path / "checkpoint.safetensors")
