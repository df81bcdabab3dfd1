"""Hidden walls and shells, on any device: the torch twin of `tasks/shell.py`, which says why.

Sets of voxels and of cells are [B, 8, 8, 8] bool (`tasks/torch_masks.py`), triangles [9, F]
(`tasks/torch_distance.py`), distances float32, nearest triangles int32 or -1.
"""

import math

import torch
from torch import Tensor

from kernels.distance import closest_triangles
from tasks.sparse_common import BACKED, PLATE, SHELL
from tasks.torch_distance import (
    along,
    chosen,
    closest_on_triangle,
    crossings,
    squared_between,
)
from tasks.torch_masks import (
    CHUNK,
    Grid,
    blocks_around,
    dilated,
    eroded,
    holds,
    ids_of,
    shifted,
)

Point = tuple[Tensor, Tensor, Tensor]


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
            best, which, foot = _best_of_neighbours(
                grid, columns, outside, touch, todo, ids, work, feet, nearest
            )
            feet[work[ids >> 9] << 9 | (ids & 511)] = foot.T.float()
            distance.view(-1)[ids] = best.sqrt().clamp_max(reach).float()
            nearest.view(-1)[ids] = which
        todo &= ~layer


def _best_of_neighbours(
    grid: Grid,
    columns: Tensor,
    outside: Tensor,
    touch: Tensor,
    todo: Tensor,
    ids: Tensor,
    work: Tensor,
    feet: Tensor,
    nearest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best of what their 26 neighbours offer voxels [N], by id, of one layer.

    That is: squared distances [N] float64, triangles [N] int32 or -1, closest points [3, N].
    feet [W * 512, 3]: the closest points of inside voxels, by work [B]; touch: the cells with a
    corner outside.
    """
    x, y, z = grid.places(ids)
    best = torch.full(ids.shape, torch.inf, dtype=torch.float64, device=ids.device)
    which = torch.full(ids.shape, -1, dtype=torch.int32, device=ids.device)
    foot = best.new_zeros((3, len(ids)))
    for m in range(27):
        at = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
        other = grid.ids_at(*at)
        triangle = nearest.view(-1)[other.clamp_min(0)]
        offers = (~holds(todo, other) & (triangle >= 0)).nonzero().view(-1)
        triangle, other = triangle[offers], other[offers]
        p: Point = (x[offers].double(), y[offers].double(), z[offers].double())
        c = columns[:, triangle.long()]
        q = closest_on_triangle(p, c)
        seen = holds(touch, grid.ids_at(*(a.floor().long() for a in q)))
        found = squared_between(p, q)
        limit = best[offers]
        hopeful = found < limit
        hidden = (hopeful & ~seen).nonzero().view(-1)
        if len(hidden):
            other = other[hidden]
            known = work[other >> 9]
            stored = feet[known.clamp_min(0) << 9 | (other & 511)].T.double()
            from_there: Point = tuple(a[offers[hidden]].double() for a in at)  # type: ignore[assignment]
            own = closest_on_triangle(from_there, c[:, hidden])
            instead = chosen((known >= 0) & ~holds(outside, other), (*stored,), own)
            found[hidden] = squared_between((p[0][hidden], p[1][hidden], p[2][hidden]), instead)
            for a in range(3):
                q[a][hidden] = instead[a]
        better = (hopeful & (found < limit)).nonzero().view(-1)
        to = offers[better]
        best[to], which[to] = found[better], triangle[better]
        foot[:, to] = torch.stack(q)[:, better]
    return best, which, foot


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
    for axis in range(3):
        across = walls[axis] & outside & shifted(outside, grid.neighbours, axis, True)
        plates = _plates(grid, others, across & ~odd[axis], axis)
        single = ids_of(across & odd[axis])
        for ids, is_plate in ((plates, True), (single, False)):
            x, y, z = grid.places(ids)
            for m in range(4):
                back = [0, 0, 0]
                back[0 if axis != 0 else 1] = m >> 1
                back[2 if axis != 2 else 1] = m & 1
                cells = grid.ids_at(x - back[0], y - back[1], z - back[2])
                cells = cells[cells >= 0]
                if is_plate:
                    thin.view(-1)[cells] = True
                else:
                    alone = lonely.view(-1)[cells]
                    thin.view(-1)[cells[alone]] = True
                    excused.view(-1)[cells[~alone]] = True
    # Farther voxels than a cell of the shell's surface has as corners don't count.
    near = outside & (distance < SHELL + 1.0)
    _mark_feet(grid, columns, patches, sheet, near, nearest, weak, empty, lonely, thin, excused)
    for _ in range(2):  # excused cells lie up to two deep around an inside voxel
        thin |= excused & ~eroded(~thin, grid.neighbours, (False, True))
    return thin


def _plates(grid: Grid, columns: Tensor, doubtful: Tensor, axis: int) -> Tensor:
    """Return those of the doubtful edges, by id, that pass between nearly parallel sides.

    They are the first and the last of the triangles [9, F] that the edge crosses.
    """
    edges, faces, heights = [], [], []
    if bool(doubtful.any()):
        for face, pu, pv, height in crossings(columns, axis):
            # A crossing at a voxel is one of both edges that end there.
            for bottom in (height.floor().long(), height.ceil().long() - 1):
                ids = grid.ids_at(*along(axis, pu, pv, bottom))
                asked = holds(doubtful, ids) & (ids >= 0)
                edges.append(ids[asked])
                faces.append(face[asked])
                heights.append(height[asked])
    if not edges:
        return grid.blocks.new_zeros(0)
    height, face = torch.cat(heights), torch.cat(faces)
    found, edge = torch.unique(torch.cat(edges), return_inverse=True)
    low = height.new_full(found.shape, torch.inf).scatter_reduce_(0, edge, height, "amin")
    high = height.new_full(found.shape, -torch.inf).scatter_reduce_(0, edge, height, "amax")
    ends = []
    for end in (low, high):
        there = height == end[edge]
        first = face.new_full(found.shape, columns.shape[1])
        ends.append(first.scatter_reduce_(0, edge[there], face[there], "amin"))
    a, b = (_normals(columns[:, end]) for end in ends)
    facing = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    facing = torch.where(a[axis] * b[axis] < 0, facing, -facing)
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
        triangle = nearest.view(-1)[ids].long()
        single = ~sheet[triangle]
        ids, triangle = ids[single], triangle[single]
        cells = _feet_cells(grid, columns, ids, triangle)
        entered = (cells >= 0) & holds(empty, cells)
        cells, triangle = cells[entered], triangle[entered]
        alone = lonely.view(-1)[cells]
        thin.view(-1)[cells[alone]] = True
        asked.append(torch.unique(cells[~alone] * patch_count + patches[triangle[~alone]]))
    if not asked:
        return
    for pairs in torch.unique(torch.cat(asked)).split(CHUNK):
        cells, patch = pairs // patch_count, pairs % patch_count
        x, y, z = grid.places(cells)
        backed = torch.zeros_like(cells, dtype=torch.bool)
        for m in range(64):  # is a solid voxel within a voxel of the cell closest to the patch?
            ids = grid.ids_at(x + m // 16 - 1, y + m // 4 % 4 - 1, z + m % 4 - 1)
            triangle = nearest.view(-1)[ids.clamp_min(0)].long()
            same = patches[triangle.clamp_min(0)] == patch
            backed |= ~holds(weak, ids) & (triangle >= 0) & same
        excused.view(-1)[cells[backed]] = True
        thin.view(-1)[cells[~backed]] = True


def _feet_cells(grid: Grid, columns: Tensor, ids: Tensor, triangle: Tensor) -> Tensor:
    """Return the cells [N], by id or -1, of the closest points of voxels on triangles [N]."""
    x, y, z = grid.places(ids)
    q = closest_on_triangle((x.double(), y.double(), z.double()), columns[:, triangle])
    return grid.ids_at(*(a.floor().long() for a in q))


def thicken(
    grid: Grid, columns: Tensor, thin: Tensor, sheet: Tensor, nearest: Tensor, field: Tensor
) -> None:
    """Lower the field, in place, by SHELL where the closest point lies in a thin cell."""
    # Closest points are up to 9 voxels away at 2048: in the second block.
    near = blocks_around(grid, thin.flatten(1).any(1), 2)
    flat = field.view(-1)
    for rows in near.nonzero().view(-1).split(CHUNK >> 9):
        triangles = nearest[rows].flatten(1).long()
        row, place = ((triangles >= 0) & ~sheet[triangles.clamp_min(0)]).nonzero(as_tuple=True)
        ids = rows[row] << 9 | place
        cells = _feet_cells(grid, columns, ids, triangles[row, place])
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
