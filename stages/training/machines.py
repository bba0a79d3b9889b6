"""What the machines of one training share: the same inputs, and a work folder."""

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
    """Yield the stage's `resumable` folder. A machine with its own disk gets a folder of that name.

    `digest` is called once per machine and identifies the stage's inputs. Raises UserError if a
    machine's digest differs from that of the first one.
    """
    first_of_machine = processes.local_rank == 0
    key = digest() if first_of_machine else ""
    if processes.agree(key) != key and first_of_machine:
        raise UserError(
            "the inputs of this machine are not those of the first one: use the same params.yaml"
            " and the same version of torch on all machines, and `dvc pull` the stage's inputs"
        )
    with ExitStack() as stack:
        if processes.is_first:
            folder = stack.enter_context(resumable(stage, key))
            processes.agree(str(folder))
        else:
            folder = Path(processes.agree(""))
            # Without the first process's lock file, this is another disk.
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
    """The bins of each set. All processes of a machine read the photographs from one file.

    The first process of each machine packs the file in `folder`. Raises what pack_bins raises.
    """
    # Named by a rank, because machines may share the folder, and may even have the same host name.
    folder = folder / f"bins-{processes.rank - processes.local_rank}"
    if processes.local_rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        pack_bins(resized, split, set_names, size, folder)
    processes.wait_for_all()
    sets = [open_bins(folder, name, size) for name in set_names]
    processes.wait_for_all()
    if processes.local_rank == 0:
        # The system frees the file once no process has it open, even if they are killed.
        shutil.rmtree(folder)
    return sets
