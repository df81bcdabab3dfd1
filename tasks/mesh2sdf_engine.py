"""The mesh2sdf conversion engine: a dense grid with its own repair, kept for comparison.

Its known bias: the repaired surface lies one voxel outside the original one, open sheets become
double walls, and only the part with the largest bounding box survives. Minutes a mesh at 256.
"""

import numpy as np

from model.sdf import BLOCK, SparseSDF, truncation

LARGEST = 256


def check_dense_resolution(resolution: int) -> None:
    """Raise ValueError unless the resolution is a power of two, 256 at most."""
    if resolution > LARGEST or resolution & (resolution - 1):
        raise ValueError(
            f"engine mesh2sdf at resolution {resolution}: it builds a dense grid, so it takes "
            f"powers of two up to {LARGEST}; use engine 'sparse'"
        )


def dense_field(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> SparseSDF:
    """Return the band of normalised triangles [V, 3], [F, 3]; no voxel of it is marked sharp.

    mesh2sdf samples at -1 + 2 i / N; moving the mesh by minus half a voxel makes these our
    voxel centres. Raises ValueError for resolutions that are no power of two or above 256.
    """
    import mesh2sdf  # only this engine's children load it

    check_dense_resolution(resolution)
    shifted = np.ascontiguousarray(vertices - 1 / resolution)
    field = mesh2sdf.compute(shifted, faces, resolution, fix=True, level=2 / resolution)
    values = np.clip(field / truncation(resolution), -1, 1).astype(np.float32)
    side = resolution // BLOCK
    values = values.reshape(side, BLOCK, side, BLOCK, side, BLOCK).transpose(0, 2, 4, 1, 3, 5)
    blocks = np.argwhere((np.abs(values) < 1).any((3, 4, 5)))
    kept = np.ascontiguousarray(values[tuple(blocks.T)])
    return SparseSDF(resolution, blocks.astype(np.int32), kept, np.zeros(kept.shape, bool))
