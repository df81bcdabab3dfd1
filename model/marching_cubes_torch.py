"""Marching cubes over blocks in plain torch, on any device: the twin of the compiled path.

Imports nothing that is compiled here, so that it runs where only torch is.
"""

import torch
from torch import Tensor

from model.marching_cubes_cases import EDGES, END_MARGIN, case_tables
from model.sdf import BLOCK

# Blocks of one pass: bounds the temporary memory to some 400 MB.
CHUNK = 32768


def surface_by_torch(blocks: Tensor, values: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return what `marching_cubes` does, for sorted blocks [B, 3] int64 and float32 values.

    Vertices are ordered by block, voxel and axis, faces by block and cell.
    """
    device = values.device
    keys = block_keys(blocks, resolution)
    triangle_edges, triangle_count = (torch.from_numpy(table).to(device) for table in case_tables())
    edges = torch.tensor(EDGES, device=device)
    edge_keys, fractions = [], []
    for start in range(0, len(blocks), CHUNK):
        voxels, cases, corners = _active_cells(
            keys, values, blocks[start : start + CHUNK], resolution
        )
        count = triangle_count[cases]
        cell_of = torch.repeat_interleave(torch.arange(len(cases), device=device), count)
        place = torch.arange(len(cell_of), device=device) - (count.cumsum(0) - count)[cell_of]
        edge = edges[triangle_edges[cases[cell_of], place]]  # [T, 3, 3]: corner, corner, axis
        ends = corners[cell_of[:, None, None], edge[..., :2]].double()
        edge_keys.append(3 * voxels[cell_of[:, None], edge[..., 0]] + edge[..., 2])
        fractions.append(ends[..., 0] / (ends[..., 0] - ends[..., 1]))
    if not edge_keys:
        return values.new_zeros((0, 3)), keys.new_zeros((0, 3), dtype=torch.int32)
    unique, faces = torch.unique(torch.cat(edge_keys), return_inverse=True)
    fraction = values.new_zeros(len(unique), dtype=torch.float64)
    # Cells that share an edge computed the same fraction: which of them is kept does not matter.
    fraction[faces.reshape(-1)] = torch.cat(fractions).reshape(-1)
    voxel, axis = unique // 3, unique % 3
    inner = torch.stack([voxel >> 6 & 7, voxel >> 3 & 7, voxel & 7], 1)
    vertices = (blocks[voxel >> 9] * BLOCK + inner).double()
    along = fraction.clamp(END_MARGIN, 1 - END_MARGIN)
    vertices.scatter_add_(1, axis[:, None], along[:, None])
    return ((2 * vertices + 1) / resolution - 1).float(), faces.int()


def block_keys(blocks: Tensor, resolution: int) -> Tensor:
    """Return the keys [B] of blocks [B, 3], which sort as these do."""
    side = resolution // BLOCK + 1  # one more, so that the neighbour past the end is no block
    return (blocks[:, 0] * side + blocks[:, 1]) * side + blocks[:, 2]


def _active_cells(
    keys: Tensor, values: Tensor, blocks: Tensor, resolution: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells of `blocks`, some of those that `keys` and `values` hold, that are crossed.

    Returns the voxel of each corner [C, 8] int64 (512 * row of its block + place in it), the case
    [C] int64 (bit c: corner c inside) and the corners' values [C, 8].
    """
    device = values.device
    rows = torch.empty((len(blocks), 8), dtype=torch.int64, device=device)
    known = torch.empty((len(blocks), 8), dtype=torch.bool, device=device)
    padded = values.new_empty((len(blocks), BLOCK + 1, BLOCK + 1, BLOCK + 1))
    for corner in range(8):
        offset = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=device)
        wanted = block_keys(blocks + offset, resolution)
        rows[:, corner] = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        known[:, corner] = keys[rows[:, corner]] == wanted
        to = [slice(BLOCK, None) if o else slice(0, BLOCK) for o in offset.tolist()]
        of = [slice(0, 1) if o else slice(None) for o in offset.tolist()]
        padded[:, to[0], to[1], to[2]] = values[:, of[0], of[1], of[2]][rows[:, corner]]
    inside = (padded < 0).to(torch.uint8)
    case = torch.zeros((len(blocks), BLOCK, BLOCK, BLOCK), dtype=torch.uint8, device=device)
    for corner in range(8):
        dx, dy, dz = corner & 1, corner >> 1 & 1, corner >> 2
        case |= inside[:, dx : dx + BLOCK, dy : dy + BLOCK, dz : dz + BLOCK] << corner
    row, i, j, k = ((case != 0) & (case != 255)).nonzero(as_tuple=True)
    # The corner blocks that a cell reaches into: those whose offset is set only where it may be.
    last = (i == BLOCK - 1).long() | (j == BLOCK - 1).long() << 1 | (k == BLOCK - 1).long() << 2
    complete = torch.ones_like(last, dtype=torch.bool)
    for corner in range(1, 8):
        complete &= known[row, corner] | (last & corner != corner)
    row, i, j, k = row[complete], i[complete], j[complete], k[complete]
    corners = torch.stack(
        [padded[row, i + (c & 1), j + (c >> 1 & 1), k + (c >> 2)] for c in range(8)], 1
    )
    voxels = torch.empty(corners.shape, dtype=torch.int64, device=device)
    for c in range(8):
        x, y, z = i + (c & 1), j + (c >> 1 & 1), k + (c >> 2)
        owner = rows[row, (x >> 3) | (y >> 3) << 1 | (z >> 3) << 2]
        voxels[:, c] = owner * BLOCK**3 + ((x & 7) << 6 | (y & 7) << 3 | (z & 7))
    return voxels, case[row, i, j, k].long(), corners
