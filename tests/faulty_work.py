"""Work on assets that fails on demand: what an asset's file says decides what happens to it."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from model.sdf import SparseSDF
from tasks.isolation import Stage
from tasks.processing import Converted, Job, Prepared, Rejected, Settings
from tasks.shards import StoredView, encode_sdf


def sphere(resolution: int, radius: float) -> SparseSDF:
    """A sphere's distances, as an engine would give them."""
    side = resolution // 8
    axis = (2 * np.arange(resolution) + 1) / resolution - 1
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    values = (np.linalg.norm(grid, axis=-1) - radius) / max(1 / 128, 4 / resolution)
    values = values.reshape(side, 8, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5)
    values = np.clip(values.reshape(-1, 8, 8, 8), -1, 1).astype(np.float32)
    active = (np.abs(values) < 1).any((1, 2, 3))
    blocks = np.argwhere(active.reshape(side, side, side)).astype(np.int32)
    return SparseSDF(resolution, blocks, values[active], np.zeros_like(values[active], bool))


def work(job: Job, settings: Settings) -> Iterator[object]:
    """Process one asset, whose file holds words: a fault and numbers."""
    folder = Path(job.wanted.source.removeprefix("folder:"))
    with (folder.parent / "calls").open("a", errors="backslashreplace") as calls:
        calls.write(f"{job.asset.uri}\n")
    yield Stage("load")
    fault, *numbers = (folder / job.asset.uri).read_text().split()
    match fault:
        case "reject":
            yield Rejected(None, "no_area", "all vertices coincide")
            return
        case "segfault":
            ctypes.string_at(0)
        case "hang":
            time.sleep(1000)
        case "hog":
            kept = []
            while True:
                kept.append(np.ones(2**22))
        case "exception":
            raise OverflowError("too round")
        case "slow":
            time.sleep(float(numbers[0]))
        case "kill_worker" | "kill_worker_once":
            marker = folder.parent / "killed"
            if fault == "kill_worker" or not marker.exists():
                marker.touch()
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(1000)
    yield Stage("render")
    views = (StoredView(b"png", np.eye(4), 0.5),) * settings.views
    yield Prepared(np.eye(3, dtype=np.float32), np.arange(3)[None], views, ("odd: a little",))
    for resolution in sorted(job.resolutions):
        yield Stage(f"convert-{resolution}")
        if fault == f"reject_{resolution}":
            yield Rejected(resolution, "no_surface", "too thin")
        elif fault == f"segfault_{resolution}":
            ctypes.string_at(0)
        else:
            sdf = sphere(resolution, 0.5 + len(job.asset.uri) / 100)
            closed = fault != f"open_{resolution}"
            yield Converted(encode_sdf(sdf), 1, 1, closed, "flood", 1.0, ())
