"""Where shards are made: in this process, or on the machines of a Ray cluster."""

import logging
import os
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from stages.runtime.errors import UserError
from stages.runtime.machine import usable_cores
from stages.sharding.building import Executor, MadeShard, Shard, ShardMaker, make_here

T = TypeVar("T")

ROOT = Path(__file__).parent.parent.parent
HEAD_SECONDS = 10


def executor(name: Literal["local", "ray"]) -> Executor[Any]:
    """The executor that params.yaml names."""
    return make_on_ray if name == "ray" else make_here


def make_on_ray(
    make: ShardMaker[T], shards: Sequence[Shard[T]], advance: Callable[[int], object]
) -> Generator[MadeShard, None, None]:
    """Make each shard in a task of the cluster at RAY_ADDRESS, which has a core to itself.

    This repository and the maker's folder are on a disk that all machines share, at the same path.
    A task whose machine is lost is run again on another one.
    """
    ray = _connected()
    cores = int(ray.cluster_resources().get("CPU", 1))
    # A core's share of the threads that would work on this machine.
    threads = max(1, make.workers // usable_cores())
    window = max(threads, make.window // usable_cores())
    shipped = ray.put(replace(make, folder=make.folder.absolute(), workers=threads, window=window))
    task = ray.remote(num_cpus=1)(_make_one)
    waiting = list(reversed(shards))
    pending: list[Any] = []
    try:
        while waiting or pending:
            # Twice the cores: the next task is there when one ends.
            while waiting and len(pending) < 2 * cores:
                pending.append(task.remote(shipped, waiting.pop()))
            (done,), pending = ray.wait(pending)
            made = _result(ray, done)
            advance(made.rows)
            yield made
    finally:
        ray.shutdown()


def _make_one(make: ShardMaker[T], shard: Shard[T]) -> MadeShard:
    (made,) = make([shard], lambda _: None)
    return made


def _connected() -> Any:
    try:
        import ray  # noqa: PLC0415 - a package that only this executor needs
    except ImportError:
        raise UserError(
            "executor is ray, which is not installed: pip install ray, or set executor to local"
        ) from None
    _find_head()
    ray.init(
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    return ray


def _find_head() -> None:
    """Raise UserError where nothing answers at RAY_ADDRESS, for which Ray itself waits minutes."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError(
            "executor is ray, but RAY_ADDRESS is not set: the address of a cluster's head, like"
            " 10.0.0.1:6379, or auto on a machine of the cluster"
        )
    if address == "auto":
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), HEAD_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: no cluster answers at {address}: {error}") from None


def _result(ray: Any, done: Any) -> MadeShard:
    """Raises what the task raised, as if it had run here."""
    try:
        made: MadeShard = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    return made
