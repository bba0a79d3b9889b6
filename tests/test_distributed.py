"""Training in several processes: the results are those of one process, except for rounding."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.imaging.loader import CPU, Bins
from stages.networks.inference import place
from stages.runtime.errors import Stopped, UserError
from stages.runtime.machine import usable_cores
from stages.runtime.params import ModelParams
from stages.training import machines
from stages.training.checkpoint import StopRequest, Watch, restore_checkpoint
from stages.training.engine import Epoch, Trainer
from stages.training.launch import process_count, run_processes
from stages.training.machines import share_bins
from stages.training.processes import Processes, joined_processes
from tests.builders import (
    SIZE,
    TINY_VIT,
    Large,
    bin_rows,
    close,
    equal,
    full_network,
    full_precision,
    make_bins,
    model_params,
    noise,
    one_torch_thread,
    random_classifier,
    tiny_classifier,
    weights_of,
    write_resized,
    write_split,
)

LABELS = [1, 2, 3]
RATE = 0.01
SETS = ["train", "validation"]
PROCESSES = 3


class Network(nn.Module):
    """A ViT with an unused layer, which some networks of transformers have."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 5)
        # The gradient of a key's bias is only rounding, but Adam would take a full step along it.
        config = TINY_VIT | {"qkv_bias": False}
        settings = model_params("vit", pretrained=False, config=config)
        self.used = random_classifier(settings, range(1, labels + 1)).network

    def forward(self, images: Tensor) -> Any:
        return self.used(images)


def settings_with(**changes: Any) -> ModelParams:
    return model_params("resnet34", learning_rate=RATE, epochs=2, batch_size=8, **changes)


CASES = {
    "plain": settings_with(),
    "in parts, averaged": settings_with(
        accumulation=3,
        ema_decay=0.6,
        clip_norm=0.5,
        color_jitter=0.2,
        rotation=5.0,
        shift=0.05,
        blur=1.0,
        side_by_side=0.5,
        optimizer="adamw",
        weight_decay=0.1,
        ordinal_share=0.5,
    ),
    "frozen": settings_with(freeze_backbone=True),
    # One of the processes gets no image.
    "of two images": settings_with(rotation=5.0, blur=1.0, side_by_side=0.5).model_copy(
        update={"batch_size": 2, "epochs": 1}
    ),
}
STOPPED = CASES["in parts, averaged"]


def write_sets(folder: Path) -> None:
    """19 bins to train on and two to validate on, fewer than processes."""
    rows = bin_rows([1, 2, 3] * 7, noise)
    write_resized(folder / "resized", rows)
    sets = ["train"] * 19 + ["validation"] * 2
    ids = [row["id"] for row in rows]
    write_split(folder / "split.csv", dict(zip(ids, sets, strict=True)))


def sets_of(folder: Path, processes: Processes) -> list[Bins]:
    work = folder / "work"
    return share_bins(folder / "resized", folder / "split.csv", SETS, SIZE, work, processes)


def new_trainer(
    sets: list[Bins],
    settings: ModelParams,
    processes: Processes,
    make_network: Callable[[int], nn.Module] = Network,
) -> Trainer:
    classifier = tiny_classifier(LABELS, make_network)
    place(classifier, CPU)
    train_bins, validation_bins = sets
    return Trainer(classifier, train_bins, validation_bins, settings, 4, processes)


def result_of(trainer: Trainer, epochs: list[Epoch]) -> dict[str, Tensor]:
    """The weights, the kept weights (their average), and the rows of the epochs."""
    kept = {f"kept {name}": value for name, value in weights_of(trainer.trained.network).items()}
    rows = torch.tensor([list(asdict(epoch).values()) for epoch in epochs], dtype=torch.float64)
    result = weights_of(trainer.classifier.network) | kept | {"rows": rows}
    return {name: value.contiguous() for name, value in result.items()}


def train(sets: list[Bins], settings: ModelParams, processes: Processes) -> dict[str, Tensor]:
    trainer = new_trainer(sets, settings, processes)
    return result_of(trainer, list(trainer.train()))


def train_with_a_stop(sets: list[Bins], processes: Processes, path: Path) -> dict[str, Tensor]:
    """Train with a stop after the second step, which only the last process is asked for."""
    trainer, request = new_trainer(sets, STOPPED, processes), StopRequest()
    if processes.rank == processes.size - 1:
        request.signal = signal.SIGTERM
    with pytest.raises(Stopped, match="at epoch 1, step 2"):
        list(trainer.train(Watch(processes, path, 0, request, _steps_to_look=2)))
    trainer = new_trainer(sets, STOPPED, processes)
    assert restore_checkpoint(path, trainer.state, processes)
    assert trainer.state.step == 2
    return result_of(trainer, list(trainer.train()))


def complaint(sets: list[Bins], processes: Processes) -> str:
    """The error if the memory has room for one image only."""

    def large(labels: int) -> nn.Module:
        # In the second step, because DistributedDataParallel's first step works differently.
        return Large(labels, 1, backward=True, easy=1)

    try:
        list(new_trainer(sets, CASES["plain"], processes, large).train())
    except UserError as error:
        return str(error)
    return "it fits"


def work_in_a_group(folder_name: str) -> str:
    """Do everything that is tested here in one process of a group; write a file per result."""
    folder = Path(folder_name)
    with joined_processes() as processes, full_precision():
        sets = sets_of(folder, processes)
        for name, settings in CASES.items():
            save_file(train(sets, settings, processes), folder / f"{name} {processes.rank}")
        result = train_with_a_stop(sets, processes, folder / "checkpoint")
        save_file(result, folder / f"stopped {processes.rank}")
        numbers = torch.arange(3.0) + 10 * processes.rank
        told = {
            "place": [processes.rank, processes.size, processes.local_rank, processes.local_size],
            "agreed": processes.agree(f"of {processes.rank}"),
            "gathered": processes.gather(numbers).tolist(),
            "threads": torch.get_num_threads(),
            "ids": [bins.ids for bins in sets],
            "complaint": complaint(sets, processes),
        }
        (folder / f"told {processes.rank}").write_text(json.dumps(told))
    return f"{processes.rank} is done"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of processes that worked together."""
    folder = tmp_path_factory.mktemp("group")
    write_sets(folder)
    assert run_processes(PROCESSES, work_in_a_group, str(folder)) == "0 is done"
    return folder


def results(group: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(group / f"{name} {rank}") for rank in range(PROCESSES)]


def told(group: Path) -> list[dict[str, Any]]:
    return [json.loads((group / f"told {rank}").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The results of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    write_sets(folder)
    sets = sets_of(folder, Processes())
    with full_precision():
        return {name: train(sets, settings, Processes()) for name, settings in CASES.items()}


@pytest.mark.slow
def test_processes_know_their_places_and_exchange_values(group: Path) -> None:
    for rank, found in enumerate(told(group)):
        assert found["place"] == [rank, PROCESSES, rank, PROCESSES]
        assert found["agreed"] == "of 0"
        assert found["gathered"] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
        assert found["threads"] == max(1, usable_cores() // PROCESSES)


@pytest.mark.slow
def test_processes_read_the_same_bins_of_one_file_that_none_leaves(group: Path) -> None:
    sets = (range(1, 20), range(20, 22))
    expected = [[f"{number:05d}" for number in numbers] for numbers in sets]

    assert [found["ids"] for found in told(group)] == [expected] * PROCESSES
    assert list((group / "work").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_weights_and_rows_are_those_of_one_process(
    name: str, group: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    first, *others = results(group, name)

    assert close(first, alone[name], RATE / 100)
    assert all(equal(other, first) for other in others)
    start = weights_of(tiny_classifier(LABELS, Network).network)
    assert torch.equal(first["unused.weight"], start["unused.weight"])


@pytest.mark.slow
def test_a_training_that_was_stopped_ends_the_same_in_as_many_processes_or_in_one(
    group: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    first, *others = results(group, "stopped")

    assert all(equal(other, first) for other in others)
    # DistributedDataParallel changes the order of additions after its first step, which matters
    # for three or more numbers.
    assert close(first, alone["in parts, averaged"], RATE / 100)
    sets = sets_of(group, Processes())
    trainer = new_trainer(sets, STOPPED, Processes())
    assert restore_checkpoint(group / "checkpoint", trainer.state, Processes())
    with full_precision():
        result = result_of(trainer, list(trainer.train()))
    assert close(result, alone["in parts, averaged"], RATE / 100)


@pytest.mark.slow
def test_processes_say_what_fits_into_each_ones_memory(group: Path) -> None:
    text = (
        "3 images of 32 pixels do not fit into cpu: set this model's accumulation to 4, and 1 at"
        " once fit; batch_size stays 8"
    )

    assert [found["complaint"] for found in told(group)] == [text] * PROCESSES


def fail(kind: str) -> str:
    """Fail in the second process; the first one notices that before the second has ended."""
    if os.environ["RANK"] == "0":
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
    if kind == "full disk":
        raise OSError(28, "No space left on device", "checkpoint.pt")
    raise UserError("lower the learning_rate")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error", r"^lower the learning_rate$"),
        ("full disk", r"^no room for checkpoint\.pt: .* free some space, and run again$"),
        ("killed", r"^process 1 was ended by SIGKILL; the next run continues from the last"),
    ],
)
def test_what_ended_one_process_is_said_and_not_what_the_others_make_of_it(
    kind: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        run_processes(2, fail, kind)

    assert capfd.readouterr().err == ""


def own_number() -> str:
    return str(os.getpid())


def test_one_process_is_this_very_one_also_beside_others_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_processes(1, own_number) == str(os.getpid())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_processes(3, own_number) == str(os.getpid())


def raise_error(text: str) -> str:
    raise RuntimeError(text)


def test_a_lost_exchange_is_a_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    reset = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.7]:49573:"
        " Connection reset by peer. This is typically caused by a remote worker hanging."
    )
    with pytest.raises(UserError, match=r"off \(Read error \[10\.0\.0\.7\]:49573: .* by peer\):"):
        run_processes(2, raise_error, reset)
    # Other errors are raised unchanged.
    with pytest.raises(RuntimeError, match="shapes"):
        run_processes(2, raise_error, "shapes [2, 3] and [3, 2] differ")


@pytest.mark.parametrize(
    ("wanted", "gpus", "count"), [("auto", 0, 1), ("auto", 4, 4), (3, 0, 3), (2, 4, 2), (4, 4, 4)]
)
def test_auto_is_a_process_per_gpu_or_one(
    wanted: int | str, gpus: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    assert process_count(wanted) == count


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(UserError, match=r"run\.processes is 3, but there are 2 GPUs: use auto"):
        process_count(3)


def test_several_processes_on_cpus_refuse_batch_normalization(tmp_path: Path) -> None:
    bins = make_bins(tmp_path, LABELS)

    with pytest.raises(UserError, match=r"by several processes on CPUs: set run\.processes to 1"):
        new_trainer([bins] * 2, CASES["plain"], Processes(0, 2), full_network)


def test_outside_of_a_group_a_process_is_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    with joined_processes() as processes:
        assert processes == Processes(device=processes.device)
        processes.wait_for_all()
        assert processes.agree("text") == "text"
        assert processes.gather(torch.arange(3)).tolist() == [[0, 1, 2]]


def inodes(sets: list[Bins]) -> set[int]:
    return {os.fstat(bins.images._file.fileno()).st_ino for bins in sets}


def test_machines_that_share_a_folder_have_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sets(tmp_path)
    meeting = Barrier(2, timeout=10)
    monkeypatch.setattr(Processes, "wait_for_all", lambda _self: meeting.wait())
    first_of_each = [Processes(0, 4, 0, 2), Processes(2, 4, 0, 2)]

    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda processes: sets_of(tmp_path, processes), first_of_each)

    assert len(inodes(one)) == len(inodes(other)) == 1
    assert inodes(one) != inodes(other)
    assert one[1].images[1] == other[1].images[1] == bin_rows([1, 2, 3] * 7, noise)[20]["image"]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_machine_with_other_inputs_than_the_first_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Processes, "agree", lambda *_: "the first machine's digest")

    with (
        pytest.raises(UserError, match="inputs of this machine are not those of the first one"),
        machines.folder_of_work("train-vit", lambda: "another", Processes(1, 2)),
    ):
        raise AssertionError
