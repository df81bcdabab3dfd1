"""The sparse signed distance field of one shape: what conversion makes and what the VAE learns.

Frame: the shape lies in [-1, 1]^3, scaled to 0.95 of it. A grid of resolution R has R voxels along
each axis; voxel i is a sample at its centre, x_i = -1 + (2 i + 1) / R. Eight voxels along each axis
make a block; a block that holds a voxel of the band |sdf| < tau is an active latent voxel of the
VAE (downsample factor 8), and every one of its 512 voxels is stored with its true sign.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 8
SHAPE_SCALE = 0.95


def truncation(resolution: int) -> float:
    """Return tau, half the width of the band, in units of the [-1, 1] frame.

    The paper's 1/128 (its section 3.1), and never under two voxels: a cell that the surface
    crosses has corners up to sqrt(3) voxels away, and without them it can't be extracted. From
    512 upwards both are the paper's figure.
    """
    return max(1 / 128, 4 / resolution)


def voxel_centres(indices: np.ndarray, resolution: int) -> np.ndarray:
    """Return the [-1, 1] positions of voxel indices (any shape), as float64."""
    return (2 * np.asarray(indices, dtype=np.float64) + 1) / resolution - 1


@dataclass(frozen=True)
class SparseSDF:
    """A truncated signed distance field in blocks of 8^3 voxels.

    resolution: voxels along an axis of [-1, 1]; a multiple of 8.
    blocks: [B, 3] int32, block coordinates (x, y, z) in [0, resolution / 8), sorted
        lexicographically, unique; exactly the blocks that hold a voxel with |values| < 1.
    values: [B, 8, 8, 8] float32, sdf / tau clipped to [-1, 1], negative inside. Voxel
        [b, i, j, k] has grid index 8 * blocks[b] + (i, j, k).
    sharp: [B, 8, 8, 8] bool, band voxels near a sharp edge of the surface.
    """

    resolution: int
    blocks: np.ndarray
    values: np.ndarray
    sharp: np.ndarray

    @property
    def tau(self) -> float:
        """Half the width of the band, in units of the [-1, 1] frame."""
        return truncation(self.resolution)

    @property
    def band_voxels(self) -> int:
        """Number of voxels with |sdf| < tau."""
        return int(np.count_nonzero(np.abs(self.values) < 1))
