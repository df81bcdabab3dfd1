"""Sets of voxels in sparse blocks as bools, on any device: the torch twin of `tasks/masks.py`.

Sets are [B, 8, 8, 8] bool. A voxel's id is 512 * row + 64 x + 8 y + z. A block that is not there
counts as full: what is far from the mesh is outside.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.feet import block_rows, voxel_ids, voxel_places
from model.sdf import BLOCK

# Items worked on at once where their number has no bound: some 250 bytes each, half a GB.
CHUNK = 2**21
STEPS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))


@dataclass(frozen=True)
class Grid:
    """Which blocks there are.

    rows: [side, side, side] int32, the row of each block or -1. blocks: [B, 3] int64, sorted.
    neighbours: [B, 6] int64, the rows at -x, +x, -y, +y, -z, +z, or -1.
    """

    rows: Tensor
    blocks: Tensor
    neighbours: Tensor

    def ids_at(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the ids [...] int64 of voxels, -1 where their block is not there."""
        return voxel_ids(self.rows, x, y, z)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coordinates x, y, z [...] int64 of voxels."""
        return voxel_places(self.blocks, ids)


def grid_of(keys: Tensor, side: int) -> Grid:
    """Return the grid of the blocks [B] int64 (x side + y) side + z, sorted."""
    blocks = torch.stack([keys // side**2, keys // side % side, keys % side], 1)
    rows = torch.full((side,) * 3, -1, dtype=torch.int32, device=keys.device)
    rows.view(-1)[keys] = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    around = blocks[:, None] + torch.tensor(STEPS, device=keys.device)
    return Grid(rows, blocks, block_rows(rows, *around.unbind(2)))


def ids_of(masks: Tensor) -> Tensor:
    """Return the ids [N] int64 of the voxels that are set, in order."""
    return masks.view(-1).nonzero().view(-1)


def shifted(
    masks: Tensor, neighbours: Tensor, axis: int, ahead: bool, absent: bool = True
) -> Tensor:
    """Return the set of the voxels that have their neighbour along an axis in `masks`.

    absent: whether those with a neighbour in a block that is not there belong to it.
    """
    other = neighbours[:, 2 * axis + ahead]
    end = masks.select(axis + 1, 0 if ahead else BLOCK - 1)[other.clamp_min(0)]
    end = torch.where((other < 0)[:, None, None], absent, end)
    beyond = end.unsqueeze(axis + 1)
    inner = masks.narrow(axis + 1, int(ahead), BLOCK - 1)
    return torch.cat((inner, beyond) if ahead else (beyond, inner), axis + 1)


def eroded(
    masks: Tensor,
    neighbours: Tensor,
    sides: tuple[bool, ...],
    axes: tuple[int, ...] = (0, 1, 2),
) -> Tensor:
    """Return the voxels that are set with their neighbours along the axes, diagonals included.

    sides: (True,) takes the neighbours ahead, so that a voxel stands for a cell and its eight
    corners; (False, True) those on both sides.
    """
    for axis in axes:
        found = masks.clone()
        for ahead in sides:
            found &= shifted(masks, neighbours, axis, ahead)
        masks = found
    return masks


def dilated(masks: Tensor, neighbours: Tensor, sides: tuple[bool, ...]) -> Tensor:
    """Return the voxels that are set or have a neighbour that is, as in `eroded`."""
    for axis in range(3):
        found = masks.clone()
        for ahead in sides:
            found |= shifted(masks, neighbours, axis, ahead)
        masks = found
    return masks


def blocks_around(grid: Grid, marked: Tensor, reach: int) -> Tensor:
    """Return the blocks [B] bool with a marked one [B] within `reach` blocks along each axis."""
    dense = torch.zeros(grid.rows.shape, device=marked.device)
    dense.view(-1)[_keys(grid)] = marked.float()
    for axis in range(3):
        window = [1, 1, 1]
        window[axis] = 2 * reach + 1
        padding = [size // 2 for size in window]
        dense = torch.nn.functional.max_pool3d(dense[None, None], window, 1, padding)[0, 0]
    return dense.view(-1)[_keys(grid)] > 0


def _keys(grid: Grid) -> Tensor:
    x, y, z = grid.blocks.unbind(1)
    side = len(grid.rows)
    return (x * side + y) * side + z


def expanded(counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (owner, place in it) [n] int64 of the items of which owner i has counts[i], in chunks.

    The next chunk may be asked for only when nothing of the last is needed: memory stays bounded
    however many items there are. Synchronises once.
    """
    ends = counts.cumsum(0)
    starts = ends - counts
    total = int(ends[-1]) if len(ends) else 0
    for first in range(0, total, CHUNK):
        item = torch.arange(first, min(first + CHUNK, total), device=counts.device)
        owner = torch.searchsorted(ends, item, right=True)
        yield owner, item - starts[owner]
