"""Hidden walls and shells, on any device: the torch twin of `tasks/shell.py`, which says why.

Sets of voxels and of cells are [B, 8, 8, 8] bool (`tasks/torch_masks.py`), triangles [9, F]
(`tasks/torch_distance.py`), distances float32, nearest triangles int32 or -1.
"""

import math

import torch
from torch import Tensor

from kernels.distance import closest_triangles
from kernels.feet import best_feet, foot_cells, holds
from kernels.triangles import Point
from tasks.sparse_common import BACKED, PLATE, SHELL
from tasks.torch_distance import along, crossings
from tasks.torch_masks import (
    CHUNK,
    Grid,
    blocks_around,
    dilated,
    eroded,
    ids_of,
    shifted,
)


def solid_voxels(walls: Tensor, outside: Tensor, neighbours: Tensor) -> Tensor:
    """Return the voxels of cells that lie inside with nothing between their corners."""
    cells = eroded(~outside, neighbours, (True,))
    for axis in range(3):
        others = ((axis + 1) % 3, (axis + 2) % 3)
        cells &= eroded(~walls[axis], neighbours, (True,), others)
    return dilated(cells, neighbours, (False,)) & ~outside


def sheet_faces(votes: Tensor, patches: Tensor) -> Tensor:
    """Return which faces [F] belong to sheets, by the votes [P, 2] of `crossing_votes`."""
    sheet = (votes[:, 0] > 0) & (votes[:, 1] <= BACKED * votes[:, 0].double())
    return sheet[patches]


def drop_hidden(
    grid: Grid,
    columns: Tensor,
    walls: Tensor,
    outside: Tensor,
    distance: Tensor,
    nearest: Tensor,
    reach: float,
) -> None:
    """Replace, in place, the distances of inside voxels near hidden walls by those to seen ones."""
    hidden = torch.zeros_like(outside)
    for axis in range(3):
        hidden |= walls[axis] & ~outside & ~shifted(outside, grid.neighbours, axis, True)
    place = blocks_around(grid, hidden.flatten(1).any(1), 1)
    if not bool(place.any()):
        return
    todo = ~outside & place[:, None, None, None]
    distance.masked_fill_(todo, reach)
    nearest.masked_fill_(todo, -1)
    work = torch.where(place, place.cumsum(0) - 1, -1)
    feet = torch.empty((int(place.sum()) * 512, 3), dtype=torch.float32, device=columns.device)
    touch = dilated(outside, grid.neighbours, (True,))
    for _ in range(math.ceil(reach) + 1):
        layer = todo & ~eroded(todo, grid.neighbours, (False, True))
        for ids in ids_of(layer).split(CHUNK):
            best_feet(
                grid.rows, grid.blocks, columns, outside, touch, todo, work, ids, feet,
                nearest, distance, reach,
            )  # fmt: skip
        todo &= ~layer


def weak_voxels(outside: Tensor, neighbours: Tensor) -> Tensor:
    """Return the voxels outside, or inside with two inside neighbours at most."""
    count = torch.zeros_like(outside, dtype=torch.int8)
    for axis in range(3):
        for ahead in (False, True):
            count += ~shifted(outside, neighbours, axis, ahead)
    return outside | (count <= 2)


def thin_cells(
    grid: Grid,
    columns: Tensor,
    others: Tensor,
    patches: Tensor,
    sheet: Tensor,
    walls: Tensor,
    odd: Tensor,
    outside: Tensor,
    distance: Tensor,
    nearest: Tensor,
) -> Tensor:
    """Return the cells in which the surface, sheets left aside, has to be made a shell.

    others [9, G]: the shifted triangles of no sheet, which made the crossings walls and odd
    [3, B, 8, 8, 8]; patches, sheet: [F].
    """
    weak = weak_voxels(outside, grid.neighbours)
    empty = eroded(weak, grid.neighbours, (True,))
    lonely = eroded(empty, grid.neighbours, (False, True))  # no solid voxel within a voxel of it
    thin, excused = torch.zeros_like(outside), torch.zeros_like(outside)
    across = torch.stack(
        [walls[a] & outside & shifted(outside, grid.neighbours, a, True) for a in range(3)]
    )
    plates, single = _plates(grid, others, across & ~odd), ids_of(across & odd)
    cells = _cells_around(grid, plates)
    thin.view(-1)[cells] = True
    cells = _cells_around(grid, single)
    alone = lonely.view(-1)[cells]
    thin.view(-1)[cells[alone]] = True
    excused.view(-1)[cells[~alone]] = True
    # Farther voxels than a cell of the shell's surface has as corners don't count.
    near = outside & (distance < SHELL + 1.0)
    _mark_feet(grid, columns, patches, sheet, near, nearest, weak, empty, lonely, thin, excused)
    for _ in range(2):  # excused cells lie up to two deep around an inside voxel
        thin |= excused & ~eroded(~thin, grid.neighbours, (False, True))
    return thin


def _cells_around(grid: Grid, edges: Tensor) -> Tensor:
    """Return the cells, by id, of the blocks there are, around edges [N]: places in [3, B, 512]."""
    axis, ids = edges // (512 * len(grid.blocks)), edges % (512 * len(grid.blocks))
    back = torch.cartesian_prod(*[torch.arange(2, device=edges.device)] * 2)
    u, v, w = along(axis[:, None], back[:, 0], back[:, 1], torch.zeros_like(back[:, 0]))
    x, y, z = (a[:, None] for a in grid.places(ids))
    cells = grid.ids_at(x - u, y - v, z - w)
    return cells[cells >= 0]


def _plates(grid: Grid, columns: Tensor, doubtful: Tensor) -> Tensor:
    """Return those of the doubtful edges that pass between nearly parallel sides.

    doubtful: [3, B, 8, 8, 8]; the result are places in it. The sides are the first and the last of
    the triangles [9, F] that the edge crosses.
    """
    if not bool(doubtful.any()):
        return grid.blocks.new_zeros(0)
    edges, faces, heights = [], [], []
    for some in crossings(columns):
        # A crossing at a voxel is one of both edges that end there.
        for bottom in (some.height.floor().long(), some.height.ceil().long() - 1):
            at = some.edges_at(grid, bottom)
            asked = (holds(doubtful, at) & (at >= 0)).nonzero().view(-1)
            edges.append(at[asked])
            faces.append(some.face[asked])
            heights.append(some.height[asked])
    height, face = torch.cat(heights), torch.cat(faces)
    found, edge = torch.unique(torch.cat(edges), return_inverse=True)
    low = height.new_full(found.shape, torch.inf).scatter_reduce_(0, edge, height, "amin")
    high = height.new_full(found.shape, -torch.inf).scatter_reduce_(0, edge, height, "amax")
    ends = []
    for end in (low, high):
        there = height == end[edge]
        first = face.new_full(found.shape, columns.shape[1])
        ends.append(first.scatter_reduce_(0, edge[there], face[there], "amin"))
    a, b = (torch.stack(_normals(columns[:, end])) for end in ends)
    facing = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    axis = (found // (512 * len(grid.blocks)))[None]
    apart = (a.gather(0, axis) * b.gather(0, axis))[0] < 0
    facing = torch.where(apart, facing, -facing)
    return found[(ends[0] != ends[1]) & (facing < -PLATE)]


def _normals(c: Tensor) -> Point:
    ux, uy, uz = c[3:6] - c[:3]
    vx, vy, vz = c[6:] - c[:3]
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = (x * x + y * y + z * z).sqrt().clamp_min(1e-300)
    return x / length, y / length, z / length


def _mark_feet(
    grid: Grid,
    columns: Tensor,
    patches: Tensor,
    sheet: Tensor,
    near: Tensor,
    nearest: Tensor,
    weak: Tensor,
    empty: Tensor,
    lonely: Tensor,
    thin: Tensor,
    excused: Tensor,
) -> None:
    """Mark, in place, the cells that the surface enters though none of their corners is solid."""
    patch_count = int(patches.max()) + 1
    asked = []
    for ids in ids_of(near).split(CHUNK):
        triangle = nearest.view(-1)[ids]
        single = ~sheet[triangle.long()]
        ids, triangle = ids[single], triangle[single]
        cells = foot_cells(grid.rows, grid.blocks, columns, ids, triangle)
        entered = (cells >= 0) & holds(empty, cells)
        cells, triangle = cells[entered], triangle[entered].long()
        alone = lonely.view(-1)[cells]
        thin.view(-1)[cells[alone]] = True
        asked.append(torch.unique(cells[~alone] * patch_count + patches[triangle[~alone]]))
    if not asked:
        return
    around = torch.cartesian_prod(*[torch.arange(-1, 3, device=near.device)] * 3)
    for pairs in torch.unique(torch.cat(asked)).split(CHUNK >> 6):
        cells, patch = pairs // patch_count, pairs % patch_count
        x, y, z = (a[:, None] for a in grid.places(cells))
        # Is a solid voxel within a voxel of the cell closest to the patch?
        ids = grid.ids_at(x + around[:, 0], y + around[:, 1], z + around[:, 2])
        triangle = nearest.view(-1)[ids.clamp_min(0)].long()
        same = (triangle >= 0) & (patches[triangle.clamp_min(0)] == patch[:, None])
        backed = (same & ~holds(weak, ids)).any(1)
        excused.view(-1)[cells[backed]] = True
        thin.view(-1)[cells[~backed]] = True


def thicken(
    grid: Grid, columns: Tensor, thin: Tensor, sheet: Tensor, nearest: Tensor, field: Tensor
) -> None:
    """Lower the field, in place, by SHELL where the closest point lies in a thin cell."""
    # Closest points are up to 9 voxels away at 2048: in the second block.
    near = blocks_around(grid, thin.flatten(1).any(1), 2)
    flat = field.view(-1)
    for rows in near.nonzero().view(-1).split(CHUNK >> 9):
        triangles = nearest[rows].flatten(1)
        single = (triangles >= 0) & ~sheet[triangles.clamp_min(0).long()]
        row, place = single.nonzero(as_tuple=True)
        ids = rows[row] << 9 | place
        cells = foot_cells(grid.rows, grid.blocks, columns, ids, triangles[single])
        ids = ids[holds(thin, cells) & (cells >= 0)]
        flat[ids] = (flat[ids].double() - SHELL).float()


def join_sheets(
    grid: Grid,
    records: Tensor,
    starts: Tensor,
    triangles: Tensor,
    sheet: Tensor,
    field: Tensor,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Join, in place, the field with the shells of sheets: the lesser of the two.

    records: [F, RECORD] of `triangle_records`; starts, triangles: the candidates of each block.
    Returns the blocks [M] near sheets and other surfaces, and the sheets' triangles that are
    nearest to their voxels [M, 8, 8, 8], or -1.
    """
    of_sheet = sheet[triangles.long()]
    before = torch.cat([starts.new_zeros(1), of_sheet.cumsum(0)])
    total, some = starts[1:] - starts[:-1], before[starts[1:]] - before[starts[:-1]]
    pure = ((some > 0) & (some == total)).nonzero().view(-1)
    is_mixed = (some > 0) & (some < total)
    mixed = is_mixed.nonzero().view(-1)
    field[pure] = torch.minimum(field[pure], field[pure].abs() - SHELL)
    picked = triangles[of_sheet & torch.repeat_interleave(is_mixed, total)]
    picked_starts = torch.cat([starts.new_zeros(1), some[mixed].cumsum(0)])
    distance, nearest = closest_triangles(records, grid.blocks[mixed], picked_starts, picked, reach)
    field[mixed] = torch.minimum(field[mixed], distance - SHELL)
    return mixed, nearest


def bound_corners(neighbours: Tensor, field: Tensor) -> None:
    """Bring corners of cells that the surface crosses, in place, to at most sqrt(3) from zero."""
    inside = field < 0
    crossed = ~eroded(inside, neighbours, (True,)) & ~eroded(~inside, neighbours, (True,))
    corners = ~eroded(~crossed, neighbours, (False,))
    most = 3**0.5
    field.copy_(torch.where(corners, field.clamp(-most, most), field))


def cap_holes(neighbours: Tensor, walls: Tensor, outside: Tensor, field: Tensor) -> None:
    """Bring the surface, in place, halfway between an inside and an outside voxel of no wall."""
    ends = torch.zeros_like(outside)
    for axis in range(3):
        # Outside is what is not there: both say no, and such edges are left alone.
        beyond = shifted(~outside, neighbours, axis, True, absent=False)
        within = shifted(outside, neighbours, axis, True, absent=False)
        open_ = torch.where(outside, beyond, within) & ~walls[axis]
        ends |= open_ | shifted(open_, neighbours, axis, False, absent=False)
    field.copy_(torch.where(ends, field.clamp(-0.5, 0.5), field))


def nearest_parts(ids: Tensor, nearest: Tensor, part_of_face: Tensor) -> Tensor:
    """Return which parts [P] bool are closest to one of the voxels [N], given by id."""
    found = part_of_face.new_zeros(int(part_of_face.max()) + 1, dtype=torch.bool)
    triangle = nearest.view(-1)[ids].long()
    found[part_of_face[triangle[triangle >= 0]]] = True
    return found


def surface_voxels(neighbours: Tensor, field: Tensor) -> Tensor:
    """Return the ids [N] of the voxels that end an edge on which the field changes its sign."""
    inside = field < 0
    ends = torch.zeros_like(inside)
    for axis in range(3):
        for ahead in (False, True):
            # What is not there changes no sign: it counts as set, whichever mask is asked.
            ends |= inside & ~shifted(inside, neighbours, axis, ahead)
            ends |= ~inside & ~shifted(~inside, neighbours, axis, ahead)
    return ids_of(ends)
