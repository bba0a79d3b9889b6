"""Where shards are made: in this process, or on the machines of a Ray cluster."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import uvloop

from stages.runtime.errors import UserError
from stages.sharding.building import Executor, MakeShard, Shard, WrittenShard, write_shard

ROOT = Path(__file__).parent.parent.parent
HEAD_SECONDS = 10


def executor(name: Literal["local", "ray"], at_once: int) -> Executor:
    """The executor that run.executor names; the local one makes `at_once` shards at a time."""
    return make_on_ray if name == "ray" else partial(make_here, at_once)


def make_here(
    at_once: int,
    make: MakeShard,
    folder: Path,
    shards: Sequence[Shard],
    advance: Callable[[int], object],
    keep: Callable[[WrittenShard], object],
) -> None:
    """In one event loop, which also lets shards be read while others are written."""

    async def make_all() -> None:
        # For decoding and writing, which release Python's lock.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(at_once))
        turns = asyncio.Semaphore(at_once)

        async def make_one(shard: Shard) -> None:
            async with turns:
                keep(await make_and_write(make, folder, shard, advance))

        async with asyncio.TaskGroup() as group:
            for shard in shards:
                group.create_task(make_one(shard))

    try:
        uvloop.run(make_all())
    except BaseExceptionGroup as group:
        # The first ended the others.
        raise group.exceptions[0] from None


async def make_and_write(
    make: MakeShard, folder: Path, shard: Shard, advance: Callable[[int], object]
) -> WrittenShard:
    made = await make(shard, advance)
    return await asyncio.to_thread(write_shard, folder, shard, made)


def make_on_ray(
    make: MakeShard,
    folder: Path,
    shards: Sequence[Shard],
    advance: Callable[[int], object],
    keep: Callable[[WrittenShard], object],
) -> None:
    """Each shard in a task of the cluster at RAY_ADDRESS, which has a core to itself.

    This repository and the folder are on a disk that all machines share, at the same path. A task
    whose machine is lost is run again on another one.
    """
    ray = _connected()
    cores = int(ray.cluster_resources().get("CPU", 1))
    task = ray.remote(num_cpus=1)(_make_in_task)
    shipped = ray.put((make, folder.absolute()))
    waiting = list(reversed(shards))
    pending: list[Any] = []
    try:
        while waiting or pending:
            # Twice the cores: the next task is there when one ends.
            while waiting and len(pending) < 2 * cores:
                pending.append(task.remote(shipped, waiting.pop()))
            (done,), pending = ray.wait(pending)
            written = _result(ray, done)
            advance(written.rows)
            keep(written)
    finally:
        ray.shutdown()


def _make_in_task(job: tuple[MakeShard, Path], shard: Shard) -> WrittenShard:
    make, folder = job
    return uvloop.run(make_and_write(make, folder, shard, lambda _: None))


def _connected() -> Any:
    try:
        import ray  # noqa: PLC0415 - a package that only this executor needs
    except ImportError:
        raise UserError(
            "run.executor is ray, which is not installed: pip install ray, or set run.executor to"
            " local"
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
            "run.executor is ray, but RAY_ADDRESS is not set: the address of a cluster's head, like"
            " 10.0.0.1:6379, or auto on a machine of the cluster"
        )
    if address == "auto":
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), HEAD_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: no cluster answers at {address}: {error}") from None


def _result(ray: Any, done: Any) -> WrittenShard:
    """Raises what the task raised, as if it had run here."""
    try:
        written: WrittenShard = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    return written
