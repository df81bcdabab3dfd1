"""Times the torch path of the sparse engine, step by step: python benchmarks/conversion_gpu.py.

    export FOLDER OUT --resolutions 256   meshes of a folder as .npz, with a summary of what the
                                          compiled path makes of them
    time OUT/*.npz --resolutions 512 1024 median of each step over --runs, and peak GPU memory
    traffic OUT/*.npz --resolutions 256   operations and bytes of each step, on any device
    check OUT/*.npz --resolutions 256     results on this device against those summaries

`time`, `traffic` and `check` need torch, triton, numpy and scipy only. Timings are from parsed mesh
to band, watertight mesh, sharp and latent voxels on the device; `host` copies them back. `floor` is
the traffic at 4.3 TB/s (an H200's copies) plus 5 us an operation: what plain torch can reach,
beside the kernels, whose docstrings give theirs.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from model.marching_cubes_torch import surface_by_torch
from tasks import sparse_engine_torch, torch_shell, torch_sign
from tasks.sparse_common import SparseResult
from tasks.sparse_engine_torch import TorchResult, sparse_field
from tasks.torch_topology import closed_and_oriented

Surface = tuple[torch.Tensor, torch.Tensor]
BYTES_A_SECOND, SECONDS_AN_OPERATION = 4.3e12, 5e-6


def export(folder: Path, out: Path, count: int, resolutions: list[int]) -> None:
    """Write normalised meshes of a folder, spread evenly by the logarithm of their faces, and what
    the compiled path makes of them.
    """
    from tasks import sparse_engine
    from tasks.mesh import normalise
    from tasks.mesh_io import EXTENSIONS, read_mesh

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    found = []
    for path in paths[:: max(1, len(paths) // (12 * count))]:
        mesh = read_mesh(path, folder)
        found.append((len(mesh.faces), path.stem, normalise(mesh.vertices), mesh.faces))
    found.sort(key=lambda item: item[:2])
    (out / "truth").mkdir(parents=True, exist_ok=True)
    sizes = [item[0] for item in found]
    wanted = np.geomspace(sizes[len(sizes) // 4], sizes[-1], count)
    for i in np.unique(np.searchsorted(sizes, wanted).clip(max=len(sizes) - 1)):
        faces, stem, vertices, triangles = found[i]
        path = out / f"{faces}-{stem}.npz"
        np.savez_compressed(path, vertices=vertices, faces=triangles.astype(np.int32))
        for resolution in resolutions:
            result = sparse_engine.sparse_field(vertices, triangles, resolution)
            np.savez_compressed(truth_file(path, resolution), **summary(result))


def run(
    path: Path, resolution: int, device: str, mark: Callable[[str], None]
) -> tuple[TorchResult, Surface]:
    """Convert one mesh as `convert` does on a GPU, and leave the result there."""
    with np.load(path) as mesh:
        vertices, faces = mesh["vertices"], mesh["faces"].astype(np.int64)
    mark("start")
    result = sparse_field(vertices, faces, resolution, device, mark)
    surface = surface_by_torch(result.blocks.long(), result.values, resolution)
    mark("marching cubes")
    assert closed_and_oriented(surface[1], len(surface[0])), f"{path}: open at {resolution}"
    mark("closed")
    return result, surface


def seconds(path: Path, resolution: int, device: str, runs: int) -> dict[str, Any]:
    """Return the median time of each step in milliseconds, after one run to warm up."""
    taken: dict[str, list[float]] = defaultdict(list)
    last = 0.0

    def mark(step: str) -> None:
        nonlocal last
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step != "start":
            taken[step].append(1000 * (now - last))
        last = now

    for turn in range(runs + 1):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result, _ = run(path, resolution, device, mark)
        result.on_host()
        mark("host")
        if not turn:
            taken.clear()
    row: dict[str, Any] = {step: round(statistics.median(t), 2) for step, t in taken.items()}
    total = sum(row.values()) - row["host"]
    row |= {"total": round(total, 1), "blocks": len(result.blocks)}
    if device == "cuda":
        row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return row


class _Traffic(TorchDispatchMode):
    """Counts operations that launch something, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            self.operations += 1
            for item in tree_leaves((args, kwargs, out)):
                if isinstance(item, torch.Tensor):
                    # Broadcast dimensions are read once.
                    held = [n for n, s in zip(item.shape, item.stride(), strict=True) if s]
                    self.bytes += int(np.prod(held)) * item.element_size()
        return out


def _hidden(function: Callable[..., Any], *args: Any) -> Any:
    with _disable_current_modes():
        return function(*args)


def leave_out_kernels() -> None:
    """Hide from counters what Triton does on a GPU and a twin elsewhere."""
    for module, name in (
        (sparse_engine_torch, "closest_triangles"),
        (torch_shell, "closest_triangles"),
        (torch_shell, "best_feet"),
        (torch_shell, "foot_cells"),
        (torch_sign, "block_labels"),
        (torch_sign, "winding_numbers"),
    ):
        setattr(module, name, partial(_hidden, getattr(module, name)))


def traffic(path: Path, resolution: int, device: str) -> dict[str, Any]:
    """Return operations, megabytes and the floor in milliseconds of each step, kernels left out."""
    row: dict[str, Any] = {}
    floor = 0.0
    counter = _Traffic()

    def mark(step: str) -> None:
        nonlocal floor
        if step != "start":
            least = counter.bytes / BYTES_A_SECOND + counter.operations * SECONDS_AN_OPERATION
            floor += least
            row[step] = (counter.operations, round(counter.bytes / 2**20), round(1000 * least, 2))
        counter.operations = counter.bytes = 0

    with counter:
        result, _ = run(path, resolution, device, mark)
    return row | {"blocks": len(result.blocks), "floor": round(1000 * floor, 1)}


def summary(result: SparseResult) -> dict[str, Any]:
    """Return what stands for a result: what must be equal, and a sample of the values."""
    sdf = result.sdf
    exact = hashlib.sha256(sdf.blocks.tobytes())
    exact.update(np.packbits(sdf.values < 0).tobytes())
    exact.update(np.packbits(sdf.sharp).tobytes())
    at = np.linspace(0, max(0, sdf.values.size - 1), 20_000).astype(np.int64)
    return {
        "exact": exact.hexdigest(),
        "report": f"{result.method} {result.parts_in} {result.parts_out} {result.thin_voxels}",
        "blocks": len(sdf.blocks),
        "values": sdf.values.reshape(-1)[at],
        "confidence": result.confidence,
    }


def truth_file(path: Path, resolution: int) -> Path:
    """Return where `export` puts the summary of the compiled path's result."""
    return path.parent / "truth" / f"{path.stem}-{resolution}.npz"


def check(path: Path, resolution: int, device: str) -> dict[str, Any]:
    """Return how far the result lies from that of the compiled path, as `export` kept it."""
    with np.load(path) as mesh:
        vertices, faces = mesh["vertices"], mesh["faces"].astype(np.int64)
    found = summary(sparse_field(vertices, faces, resolution, device).on_host())
    with np.load(truth_file(path, resolution)) as truth:
        same = all(found[name] == truth[name] for name in ("exact", "report", "blocks"))
        values = float(np.abs(found["values"] - truth["values"]).max())
        confidence = float(abs(found["confidence"] - truth["confidence"]))
        row = {"same": same, "values": values, "confidence": confidence}
        if not same:
            row |= {"found": f"{found['report']} {found['blocks']}"}
            row |= {"expected": f"{truth['report']} {truth['blocks']}"}
    return row


def main() -> None:
    """Print one line of JSON a mesh and resolution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["export", "time", "traffic", "check"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512])
    parser.add_argument("--meshes", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "export":
        export(*args.paths, args.meshes, args.resolutions)
        return
    if args.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if args.command == "traffic":
        leave_out_kernels()
    totals = defaultdict(list)
    for resolution in args.resolutions:
        for path in args.paths:
            if args.command == "time":
                row = seconds(path, resolution, args.device, args.runs)
                totals[resolution].append(row["total"])
            elif args.command == "traffic":
                row = traffic(path, resolution, args.device)
                totals[resolution].append(row["floor"])
            else:
                row = check(path, resolution, args.device)
            print(json.dumps({"mesh": path.stem, "resolution": resolution} | row), flush=True)
    for resolution, found in totals.items():
        print(f"{resolution}: median {statistics.median(found):.1f} ms, worst {max(found):.1f} ms")


if __name__ == "__main__":
    main()
