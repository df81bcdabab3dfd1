"""The sparse conversion engine on any device: the torch twin of `tasks/sparse_engine.py`.

The same steps in the same order, as operations on whole arrays (`tasks/torch_*.py`) and Triton
kernels (`kernels/{distance,feet,components,winding}.py`). Its results are those of the compiled
path: equal blocks, signs, marks and parts, values but for rounding. It imports neither numba nor
any mesh library.

Memory: some 40 bytes a voxel of the blocks near triangles at most, which is 3 GB for the 150,000
blocks of a large mesh at 1024, and half a GB for what is worked on at once (the modules' CHUNKs).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.distance import closest_triangles, triangle_records
from model.sdf import BLOCK, SparseSDF, truncation
from tasks import torch_shell as shell
from tasks.mesh import MeshRejectedError
from tasks.sparse_common import PART_SIZE, SHELL, SHIFT, SparseResult
from tasks.torch_distance import block_pairs, crossing_votes, edge_crossings
from tasks.torch_masks import CHUNK, grid_of, ids_of
from tasks.torch_sign import border_voxels, outside_voxels
from tasks.torch_topology import (
    mark_sharp,
    oriented_patches,
    part_sizes,
    parts_of,
    sharp_edges,
    weld,
)


@dataclass(frozen=True)
class TorchResult:
    """What the engine found, still on its device: a `SparseResult` but for where its arrays lie.

    blocks: [B, 3] int32; values: [B, 8, 8, 8] float32; sharp: [B, 8, 8, 8] bool, as `SparseSDF`.
    """

    resolution: int
    blocks: Tensor
    values: Tensor
    sharp: Tensor
    parts_in: int
    parts_out: int
    method: str
    confidence: float
    thin_voxels: int

    def on_host(self) -> SparseResult:
        """Return the result in arrays of NumPy's."""
        arrays = [part.cpu().numpy() for part in (self.blocks, self.values, self.sharp)]
        return SparseResult(
            SparseSDF(self.resolution, *arrays),
            self.parts_in,
            self.parts_out,
            self.method,
            self.confidence,
            self.thin_voxels,
        )


def _no_mark(_: str) -> None:
    """Do nothing at the end of a step."""


def sparse_field(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int,
    device: str | torch.device,
    mark: Callable[[str], None] = _no_mark,
) -> TorchResult:
    """Return the band of normalised triangles.

    vertices: [V, 3] float64 in [-0.95, 0.95]; faces: [F, 3]. mark: called with the name of each
    step at its end, for benchmarks. Deterministic. Raises MeshRejectedError (`no_area`) when no
    triangle is left once degenerate ones are gone.
    """
    points, triangles_of = weld(
        torch.from_numpy(np.asarray(vertices, np.float64)).to(device),
        torch.from_numpy(np.asarray(faces, np.int64)).to(device),
    )
    if not len(triangles_of):
        raise MeshRejectedError("no_area", "every triangle is degenerate: no surface to convert")
    mark("weld")
    parts = parts_of(triangles_of, len(points))
    patches, turns = oriented_patches(triangles_of)
    positions = (points + 1) * (resolution / 2) - 0.5
    segments = positions[sharp_edges(points, triangles_of)]
    mark("topology")

    tau = truncation(resolution) * resolution / 2
    reach = tau + SHELL
    corners = positions[triangles_of]
    columns = corners.view(-1, 9).T.contiguous()
    keys, starts, triangles = block_pairs(columns, resolution // BLOCK, reach)
    grid = grid_of(keys, resolution // BLOCK)
    neighbours = grid.neighbours
    mark("pairs")
    records = triangle_records(corners)
    field, nearest = closest_triangles(records, grid.blocks, starts, triangles, reach)
    mark("distances")
    crossed = columns + torch.from_numpy(np.tile(SHIFT, 3)).to(device)[:, None]
    walls, odd, double = edge_crossings(crossed, grid)
    mark("crossings")
    outside, confidence = outside_voxels(columns, grid, field, walls, patches, turns)
    mark("signs")
    near = outside & (field < 1.0 + SHELL)
    shell.drop_hidden(grid, columns, walls, outside, field, nearest, reach)
    mark("hidden walls")
    solid = shell.solid_voxels(walls, outside, neighbours)
    votes = crossing_votes(crossed, grid, outside, solid, double, patches, int(patches.max()) + 1)
    del double, solid
    sheet = shell.sheet_faces(votes, patches)
    others, other_walls = crossed, (walls, odd)
    if bool(sheet.any()):
        others = crossed[:, ~sheet]
        other_walls = edge_crossings(others, grid)[:2]
    mark("sheets")
    thin = shell.thin_cells(
        grid, columns, others, patches, sheet, *other_walls, outside, field, nearest
    )
    del other_walls, odd
    mark("thin cells")
    field = torch.where(outside, field, -field)
    shell.thicken(grid, columns, thin, sheet, nearest, field)
    near_sheets, nearest_sheet = shell.join_sheets(
        grid, records, starts, triangles, sheet, field, reach
    )
    thin_voxels = int((outside & (field < 0)).sum())
    mark("shells")
    if confidence is not None:
        shell.cap_holes(neighbours, walls, outside, field)
    # At 32 shells would reach beyond the grid.
    field = torch.where(border_voxels(grid), field.clamp_min(0.05), field)
    shell.bound_corners(neighbours, field)
    # A part that lies in another's shell is not seen: no voxel beside it is left outside.
    seen = shell.nearest_parts(ids_of(near & (field >= 0)), nearest, parts)
    surface = shell.surface_voxels(neighbours, field)
    found = shell.nearest_parts(surface, nearest, parts)
    nearest[near_sheets] = nearest_sheet
    found |= shell.nearest_parts(surface, nearest, parts)
    counted = seen & (part_sizes(columns, parts) > PART_SIZE)
    mark("parts")
    sharp = mark_sharp(grid, segments, field, SHELL)
    mark("sharp")
    keep = _truncate(field, tau, sharp).nonzero().view(-1)
    result = TorchResult(
        resolution,
        grid.blocks[keep].int(),
        field[keep],
        sharp[keep],
        int(counted.sum()),
        int((counted & found).sum()),
        "flood" if confidence is None else "flood+winding",
        1.0 if confidence is None else confidence,
        thin_voxels,
    )
    mark("band")
    return result


def _truncate(field: Tensor, tau: float, sharp: Tensor) -> Tensor:
    """Scale and clip the field, in place, to [-1, 1], and sharp to the band |values| < 1.

    Returns which blocks [B] bool hold a voxel of the band.
    """
    keep = torch.zeros(len(field), dtype=torch.bool, device=field.device)
    # A tensor, since CUDA divides by a number by multiplying with its inverse: that rounds twice.
    divisor = torch.tensor(tau, dtype=torch.float64, device=field.device)
    for first in range(0, len(field), CHUNK >> 9):
        part = slice(first, first + (CHUNK >> 9))
        values = (field[part].double() / divisor).clamp(-1, 1).float()
        band = values.abs() < 1
        field[part] = values
        sharp[part] &= band
        keep[part] = band.flatten(1).any(1)
    return keep
