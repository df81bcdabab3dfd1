"""What work tells of itself: metrics, pictures and meshes to MLflow, progress to Ray's driver."""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import ray
import torch

from tasks.metrics import Surface
from tasks.pictures import VIEWER_FACES, save_glb, viewer_html
from tasks.ray_training import share_of_cpus

if TYPE_CHECKING:  # MLflow takes seconds to import, and most workers don't need it
    from tasks.tracking import Run

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5

Progress = Callable[[int, int, str], None]  # units done, of how many, a short text


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Board:
    """Holds the newest word on each piece of work."""

    def __init__(self) -> None:
        self.newest: dict[str, tuple[int, int, str]] = {}

    def write(self, work: str, done: int, total: int, detail: str) -> None:
        self.newest[work] = done, total, detail

    def read(self, work: str) -> tuple[int, int, str] | None:
        return self.newest.get(work)

    def forget(self, work: str) -> None:
        self.newest.pop(work, None)


@lru_cache(maxsize=1)
def _board(ray_job: str) -> Any:  # noqa: ARG001 - what the cache goes by
    """Return the board of this process's Ray session: one, since an actor is a process."""
    return _Board.remote()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class BoardWriter:
    """Tells the driver's progress from a Ray worker; can be pickled."""

    board: Any
    work: str

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        """Set the progress; returns at once."""
        self.board.write.remote(self.work, done, total, detail)


@contextmanager
def watched(update: Progress) -> Iterator[BoardWriter]:
    """Yield a writer for Ray workers; `update` is called here, in a thread, with what it says."""
    board = _board(ray.get_runtime_context().get_job_id())
    work = uuid4().hex
    done = threading.Event()

    def poll() -> None:
        last = None
        while True:
            finished = done.wait(POLL_SECONDS)
            newest = ray.get(board.read.remote(work))
            if newest is not None and newest != last:
                last = newest
                update(*newest)
            if finished:
                return

    # The context tells Prefect's artifacts which flow run they belong to.
    thread = threading.Thread(target=copy_context().run, args=(poll,), daemon=True)
    thread.start()
    try:
        yield BoardWriter(board, work)
    finally:
        done.set()
        thread.join()
        board.forget.remote(work)


def call_on_worker(function: Callable[..., Any], *args: Any, update: Progress) -> Any:
    """Call function(*args, device=..., progress=...) on a Ray worker, with a GPU if there is one.

    Returns what it returns; an exception in it is raised here. Not tried again when it fails.
    """
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task: Any = ray.remote(max_retries=0, num_cpus=share_of_cpus(1), num_gpus=gpus)(_call)
    with watched(update) as writer:
        reference = task.remote(function, args, writer)
        try:
            return ray.get(reference)
        except BaseException:
            ray.cancel(reference, force=True)
            raise


def _call(function: Callable[..., Any], args: tuple[Any, ...], writer: BoardWriter) -> Any:
    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    device = torch.device("cuda" if resources.get("GPU", 0) else "cpu")
    return function(*args, device=device, progress=writer)


def log_meshes(run: "Run", meshes: Mapping[str, Surface], folder: str, name: str) -> None:
    """Log meshes as .glb files, and together as one page that shows them in the MLflow UI."""
    shown = {kind: mesh for kind, mesh in meshes.items() if len(mesh[1])}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, mesh in shown.items():
            path = Path(temporary) / f"{name}-{kind}.glb"
            save_glb(*mesh, path)
            run.log_file(path, folder)
    faces = sum(len(mesh[1]) for mesh in shown.values())
    if faces > VIEWER_FACES:
        logger.warning("%s: %d faces are too many for a viewer page; see its .glb", name, faces)
    elif shown:
        run.log_text(viewer_html(shown, name), f"{folder}/{name}.html")


class MLflowReport:
    """A training's report: to one MLflow run, names prefixed by the stage, and to a progress.

    Made on the worker of rank 0. A resumed training logs no step twice.
    """

    def __init__(self, run_id: str, uri: str, stage: str, steps: int, progress: Progress):
        from tasks import tracking  # takes seconds, on the worker

        self.run = tracking.attach(run_id, uri)
        self.stage = stage
        self.steps = steps
        self.progress = progress
        self._system = self.run.system_metrics()
        self._system.__enter__()  # ends with the worker's process

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the means since the last call."""
        self.run.log_metrics({f"{self.stage}/{k}": v for k, v in values.items()}, step)
        self.progress(step, self.steps, f"loss {values['loss']:.4f}")

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture, [H, W, 3] uint8, into the series of its name."""
        self.run.log_picture(f"{self.stage}/{name}", image, step)

    def meshes(self, step: int, meshes: Mapping[str, Surface]) -> None:
        """Log meshes as .glb files and a viewer page, in the stage's folder."""
        log_meshes(self.run, meshes, self.stage, f"step-{step}")

    def checkpoint(self, step: int, path: Path) -> None:
        """Note the newest checkpoint as tags of the run."""
        self.run.set_tags({f"checkpoint.{self.stage}": path, f"checkpoint.{self.stage}.step": step})
