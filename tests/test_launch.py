"""Starting processes, and hearing how they ended."""

import os
import time

import pytest
import torch

from stages.runtime.errors import UserError
from stages.training.launch import process_count, run_processes


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

    with pytest.raises(UserError, match=r"train\.processes is 3, but there are 2 GPUs: use auto"):
        process_count(3)


def own_number(*words: str) -> str:
    return f"{' '.join(words)} in {os.getpid()}"


def test_one_process_is_this_very_one() -> None:
    assert run_processes(1, own_number, "some", "work") == f"some work in {os.getpid()}"


def test_beside_the_others_of_torchrun_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    assert run_processes(3, own_number, "work") == f"work in {os.getpid()}"


def fail_with_the_other(text: str) -> str:
    """The second fails, which the first notices, and ends before it."""
    if os.environ["RANK"] == "0":
        raise RuntimeError("Connection closed by peer")
    time.sleep(2)
    raise UserError(text)


def test_what_one_process_raises_counts_and_not_what_the_others_make_of_it() -> None:
    with pytest.raises(UserError, match=r"^lower the learning_rate$"):
        run_processes(2, fail_with_the_other, "lower the learning_rate")
