"""Conversion: a normalised mesh to a `SparseSDF` and a report, by one of two engines.

The sparse engine has two paths of equal results: compiled on the CPU, torch with Triton on a GPU.
Without a GPU's driver nothing here imports torch, which would take 190 MB of each worker's memory.
"""

import ctypes
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.compiled import compiled
from model.marching_cubes_cpu import surface_by_numba
from model.sdf import BLOCK, SHAPE_SCALE, SparseSDF
from tasks.mesh import MeshRejectedError
from tasks.mesh2sdf_engine import check_dense_resolution, dense_field
from tasks.sparse_common import SparseResult
from tasks.sparse_engine import sparse_field

Device = Literal["cpu", "cuda"]
Surface = tuple[np.ndarray, np.ndarray]  # vertices, faces
# Part of a catalogue row's recipe: raise it when a conversion's result changes.
CONVERSION_VERSION = "4"
# What rendering and converting an asset may take of a GPU, by highest resolution, the driver's own
# share of a process left out: twice the worst that was measured, 1.5 GB of views up to 512 and 2.8
# at 1024 (benchmarks/README.md); 2048 was not.
GPU_BYTES = {512: 3 * 2**30, 1024: 6 * 2**30, 2048: 20 * 2**30}


@dataclass(frozen=True)
class Conversion:
    """What conversion made of a mesh, and how sure it is.

    parts_in, parts_out: connected parts of the mesh (faces that share vertices) of more than two
        voxels across that can be seen from outside, and those of them found at the surface of the
        result. Parts hidden in others are in neither. mesh2sdf keeps one part: 1 and 1.
    surface: of the band, by marching cubes: vertices [V, 3] float32, faces [F, 3] int32.
    closed: the surface is closed and consistently oriented.
    sign_method: `flood`, `flood+winding` (winding numbers closed holes) or `mesh2sdf`.
    sign_confidence: how far the winding numbers were from undecided, in [0, 1]; 1 without them.
    device: where it ran, `cpu` or `cuda`. No part of a recipe: the results are the same.
    """

    sdf: SparseSDF
    surface: Surface
    parts_in: int
    parts_out: int
    closed: bool
    sign_method: str
    sign_confidence: float
    warnings: tuple[str, ...] = ()
    device: Device = "cpu"


def check_resolution(resolution: int, engine: Literal["sparse", "mesh2sdf"]) -> None:
    """Raise ValueError for a resolution that an engine does not take."""
    if resolution % BLOCK or not 32 <= resolution <= 2048:
        raise ValueError(f"resolution {resolution}: expected a multiple of 8 from 32 to 2048")
    if engine == "mesh2sdf":
        check_dense_resolution(resolution)


def best_device(engine: Literal["sparse", "mesh2sdf"]) -> Device:
    """Return where an engine is fastest: on a GPU if it can use one and this process sees one."""
    if engine == "mesh2sdf" or not has_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_driver() -> bool:
    """Return whether CUDA's driver library is there; without it torch sees no GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def gpu_bytes(resolution: int) -> int:
    """Return what one asset may take of a GPU's memory at a resolution up to 2048."""
    return next(size for highest, size in GPU_BYTES.items() if resolution <= highest)


def limit_gpu_memory(resolution: int) -> None:
    """Refuse this process more of its GPU than `gpu_bytes`: others share it."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes(resolution) / total))


def convert(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int,
    engine: Literal["sparse", "mesh2sdf"] = "sparse",
    device: Device | None = None,
) -> Conversion:
    """Return the conversion of triangles at a resolution.

    vertices: [V, 3], normalised (`tasks.mesh.normalise`). faces: [F, 3]. resolution: a multiple
    of 8 in [32, 2048]. device: where it runs; None: `best_device`. The first call in a process
    loads compiled kernels (a second), the first on a machine compiles them (half a minute). Raises
    ValueError for what the caller could have known, MeshRejectedError (`no_area`, `no_surface`)
    for what lies in the mesh, MemoryError when the GPU has too little for it.
    """
    check_resolution(resolution, engine)
    if engine == "mesh2sdf" and device == "cuda":
        raise ValueError("engine mesh2sdf on cuda: it runs on the CPU only")
    device = device or best_device(engine)
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
    largest = np.abs(vertices).max(initial=0)
    if not largest <= SHAPE_SCALE + 1e-6:
        raise ValueError(
            f"vertices reach {largest:.4g}, expected {SHAPE_SCALE} at most: not normalised, "
            "call tasks.mesh.normalise first"
        )
    if device == "cuda":
        result, surface, closed = _converted_on_gpu(vertices, faces, resolution)
    else:
        result, surface, closed = _converted_on_cpu(vertices, faces, resolution, engine)
    if not len(surface[1]):
        raise MeshRejectedError(
            "no_surface", f"nothing of the mesh is larger than a voxel at resolution {resolution}"
        )
    warnings: list[str] = []
    if result.thin_voxels:
        warnings.append(f"thin: {result.thin_voxels} voxels added to make shells")
    if not closed:
        warnings.append("open: the surface of the band is not closed")
    if result.parts_out < result.parts_in:
        lost = result.parts_in - result.parts_out
        warnings.append(f"parts_lost: {lost} of {result.parts_in} parts not found")
    return Conversion(
        result.sdf,
        surface,
        result.parts_in,
        result.parts_out,
        closed,
        result.method,
        result.confidence,
        tuple(warnings),
        device,
    )


def _converted_on_cpu(
    vertices: np.ndarray, faces: np.ndarray, resolution: int, engine: str
) -> tuple[SparseResult, Surface, bool]:
    """Return an engine's result, its surface, and whether this is closed."""
    if engine == "mesh2sdf":
        result = SparseResult(dense_field(vertices, faces, resolution), 1, 1, "mesh2sdf", 1.0, 0)
    else:
        result = sparse_field(vertices, faces, resolution)
    points, triangles = surface_by_numba(result.sdf.blocks, result.sdf.values, resolution)
    return result, (points, triangles), bool(closed_and_oriented(triangles, len(points)))


def _converted_on_gpu(
    vertices: np.ndarray, faces: np.ndarray, resolution: int
) -> tuple[SparseResult, Surface, bool]:
    """Return what `_converted_on_cpu` does for the sparse engine; only results leave the GPU."""
    import torch

    from model.marching_cubes_torch import surface_by_torch
    from tasks import sparse_engine_torch, torch_topology

    try:
        found = sparse_engine_torch.sparse_field(vertices, faces, resolution, "cuda")
        points, triangles = surface_by_torch(found.blocks.long(), found.values, resolution)
        closed = torch_topology.closed_and_oriented(triangles, len(points))
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory at resolution {resolution}: {error}") from error
    return found.on_host(), (points.cpu().numpy(), triangles.cpu().numpy()), closed


@compiled
def closed_and_oriented(faces: np.ndarray, vertex_count: int) -> bool:
    """Return whether each directed edge of faces [F, 3] occurs once, and its reverse once."""
    starts = np.zeros(vertex_count + 1, np.int32)
    for f in range(len(faces)):
        for i in range(3):
            starts[faces[f, i] + 1] += 1
    for v in range(vertex_count):
        starts[v + 1] += starts[v]
    ends, place = np.empty(3 * len(faces), np.int32), starts[:-1].copy()
    for f in range(len(faces)):
        for i in range(3):
            a = faces[f, i]
            ends[place[a]] = faces[f, (i + 1) % 3]
            place[a] += 1
    for a in range(vertex_count):
        for i in range(starts[a], starts[a + 1]):
            b = ends[i]
            ahead = back = 0
            for j in range(starts[a], starts[a + 1]):
                ahead += ends[j] == b
            for j in range(starts[b], starts[b + 1]):
                back += ends[j] == a
            if ahead != 1 or back != 1:
                return False
    return True
