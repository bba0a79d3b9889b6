"""Where shards are built: in this process, or on the machines of a Ray cluster."""

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
from stages.sharding.building import BuildShard, Executor, Shard, WrittenShard, write_shard

ROOT = Path(__file__).parent.parent.parent
HEAD_SECONDS = 10


def executor(name: Literal["local", "ray"], at_once: int) -> Executor:
    """The executor that run.executor names; the local one builds `at_once` shards at a time."""
    return build_on_ray if name == "ray" else partial(build_here, at_once)


def build_here(
    at_once: int,
    build: BuildShard,
    folder: Path,
    shards: Sequence[Shard],
    advance: Callable[[int], object],
    keep: Callable[[WrittenShard], object],
) -> None:
    """Build shards in one event loop, so that some are read while others are written."""

    async def build_all() -> None:
        # For decoding and writing, which release the GIL.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(at_once))
        turns = asyncio.Semaphore(at_once)

        async def build_one(shard: Shard) -> None:
            async with turns:
                keep(await build_and_write(build, folder, shard, advance))

        async with asyncio.TaskGroup() as group:
            for shard in shards:
                group.create_task(build_one(shard))

    try:
        uvloop.run(build_all())
    except BaseExceptionGroup as group:
        # The first failure cancelled the other shards.
        raise group.exceptions[0] from None


async def build_and_write(
    build: BuildShard, folder: Path, shard: Shard, advance: Callable[[int], object]
) -> WrittenShard:
    result = await build(shard, advance)
    return await asyncio.to_thread(write_shard, folder, shard, result)


def build_on_ray(
    build: BuildShard,
    folder: Path,
    shards: Sequence[Shard],
    advance: Callable[[int], object],
    keep: Callable[[WrittenShard], object],
) -> None:
    """Build each shard in a one-core task of the Ray cluster at RAY_ADDRESS.

    This repository and `folder` must be on a disk that all machines share, at the same path. Ray
    repeats a task on another machine when its own is lost.
    """
    ray = _connected()
    cores = int(ray.cluster_resources().get("CPU", 1))
    task = ray.remote(num_cpus=1)(_build_in_task)
    shipped = ray.put((build, folder.absolute()))
    waiting = list(reversed(shards))
    pending: list[Any] = []
    try:
        while waiting or pending:
            # Twice as many tasks as cores, so that no core waits for its next one.
            while waiting and len(pending) < 2 * cores:
                pending.append(task.remote(shipped, waiting.pop()))
            (done,), pending = ray.wait(pending)
            written = _result(ray, done)
            advance(written.rows)
            keep(written)
    finally:
        ray.shutdown()


def _build_in_task(job: tuple[BuildShard, Path], shard: Shard) -> WrittenShard:
    build, folder = job
    return uvloop.run(build_and_write(build, folder, shard, lambda _: None))


def _connected() -> Any:
    try:
        import ray  # noqa: PLC0415 - only this executor needs it
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
    """Raise UserError if nothing answers at RAY_ADDRESS; Ray itself would wait for minutes."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError(
            "run.executor is ray, but RAY_ADDRESS is not set: set it to the address of the"
            " cluster's head, such as 10.0.0.1:6379, or to auto on a machine of the cluster"
        )
    if address == "auto":
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), HEAD_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: no cluster answers at {address}: {error}") from None


def _result(ray: Any, done: Any) -> WrittenShard:
    """What the task returned; raises what it raised."""
    try:
        written: WrittenShard = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    return written
