"""Start one worker of DVC's experiment queue for each GPU of this machine.

Every worker of `dvc queue start` sees all GPUs. Each of these workers sees only one, so that one
experiment runs on each GPU. They run in the background and end once the queue has been empty for
some seconds. `dvc queue status`, `dvc queue logs` and `dvc queue stop` work as usual.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

LOGS = Path(".dvc/tmp/exps")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.queue_workers", description=__doc__)
    parser.add_argument(
        "gpus",
        nargs="*",
        help="numbers or UUIDs, as in CUDA_VISIBLE_DEVICES (default: all GPUs)",
    )
    gpus = list(dict.fromkeys(parser.parse_args().gpus or visible_gpus()))
    if not gpus:
        sys.exit("queue_workers: error: no GPU here; `dvc queue start` starts a worker for the CPU")
    for gpu in gpus:
        start_worker(gpu)
    print(f"queue_workers: one worker each for GPU {', '.join(gpus)}; see `dvc queue status`")


def visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def start_worker(gpu: str) -> None:
    """Start a worker as `dvc queue start` does, but with its own name, for this GPU only.

    DVC stops a second worker with the same name at once.
    """
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": gpu,
        # The worker finds `dvc` on the PATH.
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
    }
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"gpu-{gpu}.log").open("ab") as log:
        subprocess.Popen(
            [programs / "dvc", "exp", "queue-worker", f"gpu-{gpu}@localhost"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # The worker outlives this terminal.
            start_new_session=True,
            env=environment,
        )


if __name__ == "__main__":
    main()
