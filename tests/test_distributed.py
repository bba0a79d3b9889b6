"""Training in several processes gives what one process gives, but for rounding."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.imaging.loader import Bins, load_sets
from stages.networks.inference import place
from stages.runtime.errors import Stopped, UserError
from stages.runtime.machine import usable_cores
from stages.runtime.params import Model
from stages.training import processes as distributed
from stages.training.checkpoint import StopRequest, Watch, restore_checkpoint
from stages.training.engine import Epoch, Trainer
from stages.training.launch import run_processes
from stages.training.processes import CPU, Processes, joined_processes
from tests.made import (
    Large,
    bin_rows,
    close,
    equal,
    full_precision,
    model_knobs,
    noise,
    one_torch_thread,
    tiny_classifier,
    weights_of,
    write_resized,
    write_split,
)

LABELS = [1, 2, 3]
RATE = 0.01


class Network(nn.Module):
    """With batch normalization, and a layer that takes no part, as in some of transformers'."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 5)
        self.used = nn.Sequential(
            nn.Conv2d(3, 4, 8, stride=8, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, labels),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.used(images)
        return logits


def knobs_with(**changes: Any) -> Model:
    return model_knobs("resnet34", learning_rate=RATE, epochs=2, batch_size=8, **changes)


CASES = {
    "plain": knobs_with(),
    "in parts, averaged": knobs_with(
        accumulation=3,
        ema_decay=0.6,
        clip_norm=0.5,
        color_jitter=0.2,
        optimizer="adamw",
        weight_decay=0.1,
        loss="ordinal",
    ),
    "frozen": knobs_with(freeze_backbone=True),
    # For three processes, of which one has nothing to do.
    "of two images": knobs_with().model_copy(update={"batch_size": 2, "epochs": 1}),
}
SETS = ["train", "validation", "test"]
STOPPED = CASES["in parts, averaged"]


def write_sets(folder: Path) -> None:
    """19 bins to train on, one to validate and two to test on: fewer than three processes."""
    rows = bin_rows([1, 2, 3] * 7 + [1], noise)
    write_resized(folder / "resized", rows)
    sets = ["train"] * 19 + ["test"] * 2 + ["validation"]
    ids = [row["id"] for row in rows]
    write_split(folder / "split.csv", dict(zip(ids, sets, strict=True)))


def sets_of(folder: Path, processes: Processes) -> list[Bins]:
    return load_sets(folder / "resized", folder / "split.csv", SETS, folder / "work", processes)


def new_trainer(
    sets: list[Bins],
    knobs: Model,
    processes: Processes,
    make_network: Callable[[int], nn.Module] = Network,
) -> Trainer:
    classifier = tiny_classifier(LABELS, make_network)
    place(classifier, CPU)
    train_bins, validation_bins, test_bins = sets
    return Trainer(classifier, train_bins, validation_bins, test_bins, knobs, 4, processes)


def result_of(trainer: Trainer, epochs: list[Epoch]) -> dict[str, Tensor]:
    """The weights, those kept (their average), and the rows of the epochs."""
    kept = {f"kept {name}": value for name, value in weights_of(trainer.trained.network).items()}
    rows = torch.tensor([list(asdict(epoch).values()) for epoch in epochs], dtype=torch.float64)
    result = weights_of(trainer.classifier.network) | kept | {"rows": rows}
    return {name: value.contiguous() for name, value in result.items()}


def train(sets: list[Bins], knobs: Model, processes: Processes) -> dict[str, Tensor]:
    trainer = new_trainer(sets, knobs, processes)
    return result_of(trainer, list(trainer.train()))


def train_with_a_stop(sets: list[Bins], processes: Processes, path: Path) -> dict[str, Tensor]:
    """Stopped in the second step, for which only the last process is asked, and gone on with."""
    trainer, request = new_trainer(sets, STOPPED, processes), StopRequest()
    if processes.rank == processes.size - 1:
        request.signal = signal.SIGTERM
    with pytest.raises(Stopped, match="at epoch 1, step 2"):
        list(trainer.train(Watch(processes, path, 0, request, _steps_to_look=2)))
    trainer = new_trainer(sets, STOPPED, processes)
    assert restore_checkpoint(path, trainer.state, processes)
    assert trainer.state.step == 2
    return result_of(trainer, list(trainer.train()))


def complaint(sets: list[Bins], processes: Processes, *, backward: bool) -> str:
    """What is said where the memory is for one image only."""

    def large(labels: int) -> nn.Module:
        # In the second step, since DistributedDataParallel's first one is another.
        return Large(labels, 1, backward=backward, easy=1)

    trainer = new_trainer(sets, CASES["plain"], processes, large)
    try:
        list(trainer.train())
    except UserError as error:
        return str(error)
    return "it fits"


def exchange(processes: Processes) -> dict[str, Any]:
    """What this process gets of the others."""
    numbers = torch.arange(3.0) + 10 * processes.rank
    image = torch.arange(24.0).view(1, 2, 3, 4) * (1 - processes.rank)
    image = image.to(memory_format=torch.channels_last)
    processes.broadcast(image)
    return {
        "place": [processes.rank, processes.size, processes.local_rank, processes.local_size],
        "agreed": processes.agree(f"of {processes.rank}"),
        "gathered": processes.gather(numbers).tolist(),
        "broadcast": image.flatten().tolist(),
        "channels_last": image.is_contiguous(memory_format=torch.channels_last),
        "threads": torch.get_num_threads(),
    }


def work_in_a_group(folder_name: str) -> str:
    """All that is tested here, in one process of a group; a file for each result and process."""
    folder = Path(folder_name)
    with joined_processes() as processes, full_precision():
        told: dict[str, Any] = {"exchange": exchange(processes)}
        sets = sets_of(folder, processes)
        told["ids"] = [bins.ids for bins in sets]
        for name, knobs in CASES.items():
            save_file(train(sets, knobs, processes), folder / f"{name} {processes.rank}")
        path = folder / "checkpoint"
        result = train_with_a_stop(sets, processes, path)
        save_file(result, folder / f"stopped {processes.rank}")
        told["complaints"] = [
            complaint(sets, processes, backward=backward) for backward in (False, True)
        ]
        (folder / f"told {processes.rank}").write_text(json.dumps(told))
    return f"{processes.rank} is done"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


class Group:
    """What processes that worked together left behind."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        write_sets(folder)
        self.answer = run_processes(size, work_in_a_group, str(folder))

    def results(self, name: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{name} {rank}") for rank in range(self.size)]

    def told(self) -> list[dict[str, Any]]:
        texts = [(self.folder / f"told {rank}").read_text() for rank in range(self.size)]
        return [json.loads(text) for text in texts]


@pytest.fixture(scope="module", params=[2, 3])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Group:
    return Group(request.param, tmp_path_factory.mktemp("group"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process gives."""
    folder = tmp_path_factory.mktemp("alone")
    write_sets(folder)
    sets = sets_of(folder, Processes())
    with full_precision():
        return {name: train(sets, knobs, Processes()) for name, knobs in CASES.items()}


def test_the_first_process_answers(group: Group) -> None:
    assert group.answer == "0 is done"


def test_processes_know_their_places_and_exchange_values(group: Group) -> None:
    for rank, told in enumerate(group.told()):
        found = told["exchange"]
        assert found["place"] == [rank, group.size, rank, group.size]
        assert found["agreed"] == "of 0"
        assert found["gathered"] == [[of, of + 1, of + 2] for of in range(0, 10 * group.size, 10)]
        assert found["broadcast"] == list(range(24))
        assert found["channels_last"]
        assert found["threads"] == max(1, usable_cores() // group.size)


def test_processes_read_the_same_bins_of_one_file_that_none_leaves(group: Group) -> None:
    expected = [
        [f"{number:05d}" for number in some] for some in (range(1, 20), [22], range(20, 22))
    ]

    assert [told["ids"] for told in group.told()] == [expected] * group.size
    assert list((group.folder / "work").iterdir()) == []


@pytest.mark.parametrize("name", CASES)
def test_the_weights_and_rows_are_those_of_one_process(
    name: str, group: Group, alone: dict[str, dict[str, Tensor]]
) -> None:
    results = group.results(name)

    assert close(results[0], alone[name], RATE / 100)
    # And exactly those of the other processes.
    assert all(equal(result, results[0]) for result in results[1:])


def test_a_layer_that_takes_no_part_stays_as_it_is(group: Group) -> None:
    start = weights_of(tiny_classifier(LABELS, Network).network)

    for name in CASES:
        result = group.results(name)[0]
        for key in ("unused.weight", "unused.bias"):
            assert torch.equal(result[key], start[key]), name


def test_a_training_that_was_stopped_ends_the_same(
    group: Group, alone: dict[str, dict[str, Tensor]]
) -> None:
    (undisturbed, *_), results = group.results("in parts, averaged"), group.results("stopped")

    assert all(equal(result, results[0]) for result in results)
    # The order in which three or more numbers are added up changes with DistributedDataParallel's
    # first step.
    assert close(results[0], undisturbed, 0 if group.size == 2 else RATE / 100)
    # Another number of processes can go on with it.
    sets = sets_of(group.folder, Processes())
    trainer = new_trainer(sets, STOPPED, Processes())
    assert restore_checkpoint(group.folder / "checkpoint", trainer.state, Processes())
    with full_precision():
        result = result_of(trainer, list(trainer.train()))
    assert close(result, alone["in parts, averaged"], RATE / 100)


def test_processes_say_what_fits_into_each_ones_memory(group: Group) -> None:
    share, advised = {2: (4, 4), 3: (3, 4)}[group.size]
    text = (
        f"{share} images of 32 pixels do not fit into cpu: set this model's accumulation to"
        f" {advised}, and 1 at once fit; batch_size stays 8"
    )

    assert [told["complaints"] for told in group.told()] == [[text, text]] * group.size


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_consecutive_and_differ_by_1_at_most(rows: int, size: int) -> None:
    shares = [Processes(rank, size).share(np.arange(rows)) for rank in range(size)]

    assert np.concatenate(shares).tolist() == list(range(rows))
    lengths = {len(share) for share in shares}
    assert max(lengths) - min(lengths) <= 1


def test_a_process_on_its_own_exchanges_values_with_itself() -> None:
    processes, values = Processes(), torch.arange(3.0)

    processes.wait_for_all()
    processes.broadcast(values)

    assert processes.is_first
    assert processes.agree("text") == "text"
    assert torch.equal(processes.gather(values), torch.arange(3.0).view(1, 3))
    assert torch.equal(values, torch.arange(3.0))


def test_outside_of_a_group_a_process_is_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    with joined_processes() as processes:
        assert processes == Processes(device=processes.device)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_the_processes_of_a_machine_share_its_cores(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "usable_cores", lambda: cores)

    assert Processes(0, 2 * processes, 0, processes).loader_threads == threads
