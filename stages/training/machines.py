"""What the machines of one training have in common: their inputs, and the folder of their work."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.imaging.loader import Bins, open_bins, pack_bins
from stages.runtime.errors import UserError
from stages.runtime.work import resumable
from stages.training.processes import Processes


@contextmanager
def folder_of_work(stage: str, digest: Callable[[], str], processes: Processes) -> Iterator[Path]:
    """The folder of `unfinished` in the first process, and its like on machines with own disks.

    Raises UserError on a machine where `digest`, of the stage's inputs, is not the first one's.
    """
    first_of_machine = processes.local_rank == 0
    key = digest() if first_of_machine else ""
    if processes.agree(key) != key and first_of_machine:
        raise UserError(
            "the inputs of this machine are not those of the first one: on each of them, have the"
            " same params.yaml and the same torch, and `dvc pull` the stage's inputs"
        )
    with ExitStack() as stack:
        if processes.is_first:
            folder = stack.enter_context(resumable(stage, key))
            processes.agree(str(folder))
        else:
            folder = Path(processes.agree(""))
            # The lock that the first process holds is not on this disk.
            if first_of_machine and not folder.with_suffix(".lock").exists():
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def share_bins(
    resized: Path,
    split: Path,
    set_names: Sequence[str],
    size: int,
    folder: Path,
    processes: Processes,
) -> list[Bins]:
    """The bins of each set, whose photographs all processes of a machine read from one file.

    It is packed in `folder`. Raises what pack_bins raises.
    """
    # By the rank of its first process: two machines may share the folder, and even have one name.
    folder = folder / f"bins-{processes.rank - processes.local_rank}"
    if processes.local_rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        pack_bins(resized, split, set_names, size, folder)
    processes.wait_for_all()
    sets = [open_bins(folder, name, size) for name in set_names]
    processes.wait_for_all()
    if processes.local_rank == 0:
        # The file goes with its name as soon as no process has it open, killed or not.
        shutil.rmtree(folder)
    return sets
