"""Runs a function over chunks of items on Ray, and survives the death of workers.

Plain tasks, not Prefect's RayTaskRunner: 200 empty ones took 1.4 s against 51 s. Ray's own retries
are off, since they happen unseen; what a dead worker left is tried again here.
"""

import itertools
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Generic, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayError, RayTaskError

logger = logging.getLogger(__name__)

# A chunk is a quarter of a worker's share of what is left: they shrink, and the work ends evenly.
CHUNKS_A_WORKER = 4
OBJECT_STORE_BYTES = 100 * 2**20  # Ray carries catalogue rows only; arrays go to disk

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(RuntimeError):
    """The work on one item ended its worker process, and not for the first time."""


@dataclass(frozen=True)
class Chunk(Generic[Item, Result]):
    """Items done in one task. result: WorkerDiedError for one item that kills its workers."""

    name: str
    items: list[Item]
    result: Result | WorkerDiedError


def run_chunks(
    function: Callable[[str, list[Item]], Result],
    items: Sequence[Item],
    *,
    most: int,
    width: int,
    memory: int,
    gpus: float = 0.0,
) -> Generator[Chunk[Item, Result], None, None]:
    """Call function(chunk name, chunk) on Ray for items in chunks of at most `most`, in parallel.

    Runs in the Ray session of this process. width: chunks at work at once, never more than memory
    allows; memory: bytes that one may take; gpus: the share of a GPU of each. Items are taken in
    their order, in ever smaller chunks: give the dearest first.

    Yields chunks as they finish. What a dead worker left is done again, then item by item, so that
    one that kills its workers takes no other with it. Raises what function raises, and ValueError
    where no machine has the memory. Closing the generator cancels what is at work.
    """
    if not items:
        return
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
    names = (f"{run}-{number:05d}" for number in itertools.count())
    _check_memory(memory, width)
    for length in (most, most, 1):
        chunks = _shrinking(items, length, width)
        dead = []
        for chunk in _run(function, zip(names, chunks, strict=False), width, memory, gpus):
            if isinstance(chunk.result, WorkerDiedError):
                logger.warning("%s", chunk.result)
                dead.append(chunk)
            else:
                yield chunk
        items = [item for chunk in dead for item in chunk.items]
    yield from dead


def _shrinking(items: Sequence[Item], most: int, width: int) -> list[list[Item]]:
    """Cut items into chunks of at most `most`, the last ones of a single item."""
    chunks, start = [], 0
    while start < len(items):
        size = min(most, math.ceil((len(items) - start) / (CHUNKS_A_WORKER * width)))
        chunks.append(list(items[start : start + size]))
        start += size
    return chunks


def _check_memory(memory: int, width: int) -> None:
    """Raise ValueError if no machine can hold one chunk's work: Ray would wait for one for ever."""
    machines = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    if memory > max(machines):
        raise ValueError(
            f"one asset may take {memory / 2**30:.1f} GiB, and the largest machine had "
            f"{max(machines) / 2**30:.1f} GiB free when Ray started: end other programs, lower the "
            "resolutions or the memory limit of an asset, or add a larger machine"
        )
    fitting = sum(int(free // memory) for free in machines)
    if fitting < width:
        logger.warning(
            "memory for %d of %d workers at %.1f GiB each", fitting, width, memory / 2**30
        )


def gpu_for_each(width: int, memory: int) -> float:
    """Return the share of a GPU for each of `width` workers; 0 where the cluster has none.

    memory: bytes of a GPU that one may take.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        return 0.0
    # The workers' torch says what Ray does not know; a machine may have GPUs that it cannot use.
    probe: Any = ray.remote(num_cpus=0, num_gpus=0.001, max_retries=0)(_gpu_memory)
    total = ray.get(probe.remote())
    if not total:
        logger.warning("torch does not see the %d GPU(s) of the workers: CPUs do it all", gpus)
        return 0.0
    share = share_of_gpu(width, gpus, memory / total)
    logger.info("%d workers share %d GPU(s), %.3g of one each", width, gpus, share)
    return share


def share_of_gpu(width: int, gpus: int, least: float) -> float:
    """Return an even share of `gpus` for each of `width` workers, no less than `least` of one.

    At most 1, and the inverse of a whole number, so that shares fill a GPU.
    """
    a_gpu = min(math.ceil(width / gpus), int(1 / least) if least < 1 else 1)
    if a_gpu * gpus < width:
        logger.warning(
            "GPU memory for %d of %d workers at %.2g of a GPU each", a_gpu * gpus, width, least
        )
    return 1 / a_gpu


def _gpu_memory() -> int:
    """Return the bytes of this process's first GPU, 0 if torch sees none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _run(
    function: Callable[[str, list[Item]], Result],
    chunks: Iterator[tuple[str, list[Item]]],
    width: int,
    memory: int,
    gpus: float,
) -> Iterator[Chunk[Item, Result]]:
    """Run each chunk once, `width` at a time."""
    # Ray ends a worker that had a GPU after one call, where nothing says otherwise; ours keep a
    # child that has loaded its kernels.
    task: Any = ray.remote(max_retries=0, max_calls=0, num_cpus=1, num_gpus=gpus, memory=memory)(
        _call
    )
    flying: dict[Any, tuple[str, list[Item]]] = {}
    try:
        while True:
            for name, items in itertools.islice(chunks, width - len(flying)):
                flying[task.remote(function, name, items)] = name, items
            if not flying:
                return
            (reference, *_), _ = ray.wait(list(flying), num_returns=1)
            name, items = flying.pop(reference)
            result: Result | WorkerDiedError
            try:
                result = ray.get(reference)
            except RayTaskError:  # raised by the function; the other errors are its worker's
                raise
            except RayError as error:
                result = WorkerDiedError(f"a Ray worker died at work on {name}: {error}")
            yield Chunk(name, items, result)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)


def _call(function: Callable[[str, list[Item]], Result], name: str, items: list[Item]) -> Result:
    if not ray.get_gpu_ids():  # Ray hides GPUs from no task: who asked for none leaves them alone
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return function(name, items)


@contextmanager
def session(workers: int = 0, address: str | None = None) -> Iterator[int]:
    """Join the Ray session of this process, a cluster, or a new local one; yield the workers."""
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        if not (address or os.environ.get("RAY_ADDRESS")):
            # Ray Train's watcher of machines that a cloud takes back: none here, and it costs
            # every training the start of a process.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        local: dict[str, Any] = {
            "num_cpus": workers or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        address = address or os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({} if address else local),
        )
        _outlive_sigterm()
    try:
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if started:
            ray.shutdown()


def _outlive_sigterm() -> None:
    """Let this process clean up after a SIGTERM, by which Prefect cancels a flow.

    Ray's C++ handler sets an alarm that aborts the process after 3 s (ray-project/ray#64830) and
    then calls Ray's Python handler, which exits; stopping workers and closing runs takes longer.
    """
    exit_by_ray = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(exit_by_ray):
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.alarm(0)
        exit_by_ray(number, frame)

    signal.signal(signal.SIGTERM, end)
