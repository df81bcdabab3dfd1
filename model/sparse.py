"""Sparse voxel tensors: ragged batches of features on integer coordinates."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

COORDINATE_BITS = 12  # resolutions up to 4096; four fields fit one int64 key


def voxel_keys(coords: Tensor) -> Tensor:
    """Return one int64 key a row of coords [N, 4] (batch, x, y, z); keys sort as the rows do."""
    batch, x, y, z = coords.long().unbind(1)
    return ((batch << COORDINATE_BITS | x) << COORDINATE_BITS | y) << COORDINATE_BITS | z


@dataclass(frozen=True)
class SparseTensor:
    """Features on voxels of a batch of grids.

    coords: [N, 4] int32 (batch, x, y, z), unique, sorted lexicographically, samples contiguous.
    feats: [N, C].
    cache: tables derived from coords (neighbours, windows), shared by every tensor made by
        `replace`; keyed by what they are.
    """

    coords: Tensor
    feats: Tensor
    cache: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def replace(self, feats: Tensor) -> "SparseTensor":
        """Return a tensor on the same voxels with other features, sharing the cached tables."""
        return SparseTensor(self.coords, feats, self.cache)

    @property
    def batch_size(self) -> int:
        """Number of samples; the last sample must not be empty. Synchronises with the host."""
        return int(self.coords[-1, 0]) + 1 if len(self.coords) else 0

    def lengths(self, batch_size: int) -> Tensor:
        """Return the number of voxels of each sample, [batch_size] int64."""
        return torch.bincount(self.coords[:, 0].long(), minlength=batch_size)
