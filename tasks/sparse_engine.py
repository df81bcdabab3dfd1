"""The sparse conversion engine: triangles to a narrow band, without a dense grid."""

import igl
import numpy as np

from model.sdf import BLOCK, truncation, voxel_centres

SHELL = 0.75  # half the thickness of the shell of an open sheet, in voxels


def sparse_field(
    vertices: np.ndarray, faces: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return blocks [B, 3] int32, values [B, 8, 8, 8] float32 and sharp (bool) of a mesh."""
    tau, voxel = truncation(resolution), 2 / resolution
    size = 2 ** int(np.ceil(np.log2(resolution)))
    cells, offsets = (
        np.zeros((1, 3), np.int64),
        np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3),
    )
    while size > BLOCK:
        size //= 2
        cells = (cells[:, None] * 2 + offsets).reshape(-1, 3)
        cells = cells[(cells * size < resolution).all(1)]
        centre = -1 + (cells + 0.5) * size * voxel
        squared = igl.point_mesh_squared_distance(centre, vertices, faces)[0]
        cells = cells[np.sqrt(squared) < size * voxel * np.sqrt(3) / 2 + tau + voxel]
    local = np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), -1).reshape(-1, 3)
    order = np.lexsort(cells.T[::-1])
    cells = cells[order]
    points = voxel_centres((cells[:, None] * BLOCK + local).reshape(-1, 3), resolution)
    squared = igl.point_mesh_squared_distance(points, vertices, faces)[0]
    distance = np.sqrt(squared)
    winding = igl.fast_winding_number(vertices, faces, points)
    values = np.where(np.abs(winding) >= 0.5, -distance, distance)
    values = np.clip(values / tau, -1, 1).astype(np.float32).reshape(-1, BLOCK, BLOCK, BLOCK)
    keep = (np.abs(values) < 1).any((1, 2, 3))
    return cells[keep].astype(np.int32), values[keep], np.zeros(values[keep].shape, bool)
