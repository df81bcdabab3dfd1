"""One mesh file to a watertight PLY, outside a dataset: the child's part of `gigashape convert`."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tasks import asset_work
from tasks.conversion import convert
from tasks.isolation import Stage
from tasks.mesh import MeshRejectedError, normalise
from tasks.mesh_io import read_mesh
from tasks.storage import atomic_file, open_filesystem

warm_up = asset_work.warm_up  # called in the child, see tasks.isolation
PLY_FACE = np.dtype([("count", "u1"), ("vertices", "<i4", 3)])


def convert_file(
    path: Path, out: Path, resolution: int, engine: Literal["sparse", "mesh2sdf"]
) -> Generator[Any, None, None]:
    """Convert a mesh file and write its watertight surface, in the file's own frame.

    Yields stages, `convert` being from the parsed mesh to band, sharp and latent voxels and the
    watertight mesh; at last the facts of the conversion, or a MeshRejectedError.
    """
    try:
        yield Stage("load")
        mesh = read_mesh(path, path.parent)
        vertices = normalise(mesh.vertices)
        yield Stage("convert")
        conversion = convert(vertices, mesh.faces, resolution, engine)
    except MeshRejectedError as error:
        yield error
        return
    yield Stage("write")
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    scale = np.ptp(mesh.vertices, axis=0).max() / np.ptp(vertices, axis=0).max()
    surface, faces = conversion.surface
    write_ply(surface.astype(np.float64) * scale + low + (high - low) / 2, faces, out)
    yield {
        "resolution": resolution,
        "band_voxels": conversion.sdf.band_voxels,
        "latent_voxels": len(conversion.sdf.blocks),
        "parts_in": conversion.parts_in,
        "parts_out": conversion.parts_out,
        "closed": conversion.closed,
        "warnings": [*mesh.warnings, *conversion.warnings],
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
