"""One mesh file to a watertight PLY, outside a dataset: what `gigashape convert` runs.

The work happens in a child process with limits of time and memory, as in a refresh.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from model.marching_cubes import marching_cubes
from tasks.conversion import Conversion, convert
from tasks.isolation import IsolatedFunction, Limits, Stage
from tasks.mesh import MeshRejectedError, normalise
from tasks.mesh_io import read_mesh
from tasks.storage import atomic_file, open_filesystem

PLY_FACE = np.dtype([("count", "u1"), ("vertices", "<i4", 3)])


def convert_file(
    path: Path,
    out: Path,
    resolution: int,
    engine: Literal["sparse", "mesh2sdf"],
    limits: Limits,
) -> dict[str, Any]:
    """Convert a mesh file and write its watertight surface; return the facts of it.

    The surface keeps the file's frame: its scale and position. seconds: from the parsed mesh to
    band, watertight mesh, sharp and latent voxels. peak_bytes: of the whole child process,
    libraries included. Raises MeshRejectedError for a mesh that can't be converted, and with the
    reasons `crashed`, `time_limit`, `memory_limit` or `exception` for one that broke its child.
    """
    with IsolatedFunction(_convert, limits) as child:
        outcome = child.run(path, out, resolution, engine)
    if outcome.failure is not None:
        raise MeshRejectedError(outcome.failure.reason, outcome.failure.detail)
    (facts,) = outcome.values
    if isinstance(facts, MeshRejectedError):
        raise facts
    return {
        "seconds": round(outcome.seconds["convert"], 3),
        "peak_bytes": outcome.peak_bytes,
        **facts,
    }


def _convert(
    path: Path, out: Path, resolution: int, engine: Literal["sparse", "mesh2sdf"]
) -> Generator[Any, None, None]:
    try:
        yield Stage("load")
        mesh = read_mesh(path, path.parent)
        vertices = normalise(mesh.vertices)
        yield Stage("convert")
        conversion = convert(vertices, mesh.faces, resolution, engine)
        sdf = conversion.sdf
        surface, faces = marching_cubes(
            torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values), resolution
        )
    except MeshRejectedError as error:
        yield error
        return
    yield Stage("write")
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    scale = np.ptp(mesh.vertices, axis=0).max() / np.ptp(vertices, axis=0).max()
    write_ply(
        surface.numpy().astype(np.float64) * scale + low + (high - low) / 2, faces.numpy(), out
    )
    yield _facts(replace(conversion, warnings=(*mesh.warnings, *conversion.warnings)))


def _facts(conversion: Conversion) -> dict[str, Any]:
    return {
        "resolution": conversion.sdf.resolution,
        "band_voxels": conversion.sdf.band_voxels,
        "latent_voxels": len(conversion.sdf.blocks),
        "parts_in": conversion.parts_in,
        "parts_out": conversion.parts_out,
        "closed": conversion.closed,
        "warnings": list(conversion.warnings),
    }


def write_ply(vertices: np.ndarray, faces: np.ndarray, path: Path) -> None:
    """Write a binary PLY, whole or not at all; float64 vertices keep a far or tiny frame exact."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\n"
        "property double x\nproperty double y\nproperty double z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), PLY_FACE)
    rows["count"], rows["vertices"] = 3, faces
    filesystem, target = open_filesystem(path)
    with atomic_file(filesystem, target) as sink:
        sink.write(header.encode())
        sink.write(np.ascontiguousarray(vertices, "<f8").tobytes())
        sink.write(rows.tobytes())
