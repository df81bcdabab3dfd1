"""Triangles beside blocks and across grid edges, on any device: the torch twin of `distance.py`.

Every formula is that of the compiled path, operation by operation, so that the two agree bit for
bit: floors, signs and ties decide there. PyTorch fuses no operations of one call with another's.
Triangles are [9, N] float64: rows x, y, z of the first corner, then of the others. Turned to an
axis w, their rows are u, v, w of the corners, u and v being the axes after w.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.feet import holds
from kernels.triangles import closest_on_triangle, squared_between
from model.sdf import BLOCK
from tasks.sparse_common import BLOCK_RADIUS, TIE
from tasks.torch_masks import Grid, expanded


def along(axis: Tensor, u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y, z of what lies at u, v, w along the two axes after `axis`, and it."""
    first, second = axis == 0, axis == 1
    return (
        torch.where(first, w, torch.where(second, v, u)),
        torch.where(first, u, torch.where(second, w, v)),
        torch.where(first, v, torch.where(second, u, w)),
    )


def turned(values: Tensor, axis: Tensor) -> Tensor:
    """Return values [..., 3, N], by x, y, z, as u, v, w of each one's axis [N]."""
    order = (axis + torch.arange(1, 4, device=axis.device)[:, None]) % 3
    return values.gather(-2, order.expand(values.shape))


def block_pairs(columns: Tensor, side: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks that may be within reach of triangles, and these.

    columns: [9, F]; side: blocks along an axis. Returns blocks [B] int64, sorted, as keys
    (x side + y) side + z; starts [B + 1] int64 and triangles [P] int32, ascending in each block.
    Every block that holds a voxel within reach of a triangle is there; a block is tested by the
    sphere around it.
    """
    pairs = torch.cat([*_pairs(columns, side, reach)]).sort().values
    blocks, counts = torch.unique_consecutive(pairs // columns.shape[1], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return blocks, starts, (pairs % columns.shape[1]).int()


def _pairs(columns: Tensor, side: int, reach: float) -> Iterator[Tensor]:
    """Yield pairs as block * F + triangle.

    The columns of blocks along the axis that a triangle lies flattest across are walked, and of
    each the blocks that the triangle's plane can reach.
    """
    points = columns.view(3, 3, -1)  # corner, axis, triangle
    one, two = points[1] - points[0], points[2] - points[0]
    normal = torch.stack(
        [
            one[(a + 1) % 3] * two[(a + 2) % 3] - one[(a + 2) % 3] * two[(a + 1) % 3]
            for a in range(3)
        ]
    )
    axis = largest(normal.abs())
    points = turned(points, axis)
    low = ((points.amin(0) - reach - (BLOCK - 1)) / BLOCK).ceil().long().clamp_min(0)
    high = ((points.amax(0) + reach) / BLOCK).floor().long().clamp_max(side - 1)
    nu, nv, nw = turned(normal, axis)
    flat = nw != 0
    slope_u, slope_v = torch.where(flat, nu / nw, 0.0), torch.where(flat, nv / nw, 0.0)
    slack = (slope_u.abs() + slope_v.abs()) * 3.5 + 3.5
    slack = slack + reach * (1 + slope_u * slope_u + slope_v * slope_v).sqrt()
    across_u, across_v, _ = (high - low + 1).clamp_min(0)
    for f, place in expanded(across_u * across_v):
        iu, iv = low[0, f] + place // across_v[f], low[1, f] + place % across_v[f]
        height = points[0, 2, f] - slope_u[f] * (iu * BLOCK + 3.5 - points[0, 0, f])
        height = height - slope_v[f] * (iv * BLOCK + 3.5 - points[0, 1, f])
        first = ((height - slack[f] - 3.5) / BLOCK).ceil().clamp(-1, side + 1).long()
        last = ((height + slack[f] - 3.5) / BLOCK).floor().clamp(-1, side + 1).long()
        first = torch.where(flat[f], torch.maximum(low[2, f], first), low[2, f])
        last = torch.where(flat[f], torch.minimum(high[2, f], last), high[2, f])
        for i, depth in expanded((last - first + 1).clamp_min(0)):
            triangle = f[i]
            x, y, z = along(axis[triangle], iu[i], iv[i], first[i] + depth)
            centre = x * BLOCK + 3.5, y * BLOCK + 3.5, z * BLOCK + 3.5
            foot = closest_on_triangle(centre, columns[:, triangle])
            distance = squared_between(centre, foot).sqrt()
            key = ((x * side + y) * side + z) * columns.shape[1] + triangle
            yield key[distance <= reach + BLOCK_RADIUS]


def largest(values: Tensor) -> Tensor:
    """Return which of values [3, N] is the largest, the first of equals."""
    x, y, z = values
    return torch.where(z > torch.maximum(x, y), 2, torch.where(y > x, 1, 0))


def _line_range(c: Tensor, pu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first v [N] at which the line u = pu may meet turned triangles, and how many."""
    least = torch.full_like(c[0], torch.inf)
    most = -least
    for i in range(0, 9, 3):
        j = (i + 3) % 9
        meets = (c[i] - pu) * (c[j] - pu) <= 0
        step = c[j] - c[i]
        at = c[i + 1] + (pu - c[i]) / step * (c[j + 1] - c[i + 1])
        one = torch.where(step == 0, c[i + 1], at)
        two = torch.where(step == 0, c[j + 1], at)
        least = torch.where(meets, torch.minimum(least, torch.minimum(one, two)), least)
        most = torch.where(meets, torch.maximum(most, torch.maximum(one, two)), most)
    none = most < least
    first = (torch.where(none, 0.0, least) - 1e-6).ceil().long()
    last = (torch.where(none, -1.0, most) + 1e-6).floor().long()
    return first, last - first + 1


def _line_heights(c: Tensor, pu: Tensor, pv: Tensor) -> Tensor:
    """Return where grid lines at (pu, pv) [N] meet turned triangles c [9, N], or NaN.

    Triangles that share an edge decide by the same number on which side of it the line runs.
    """
    above = torch.zeros_like(pu, dtype=torch.bool)
    below = above.clone()
    areas = []
    for i in range(0, 9, 3):
        j = (i + 3) % 9
        swapped = (c[j] < c[i]) | ((c[j] == c[i]) & (c[j + 1] < c[i + 1]))
        au, av = torch.where(swapped, c[j], c[i]), torch.where(swapped, c[j + 1], c[i + 1])
        bu, bv = torch.where(swapped, c[i], c[j]), torch.where(swapped, c[i + 1], c[j + 1])
        e = (bu - au) * (pv - av)
        e = e - (bv - av) * (pu - au)
        over = (e >= 0) != swapped
        above |= over
        below |= ~over
        areas.append(torch.where(swapped, -e, e))
    e0, e1, e2 = areas
    bottom = torch.minimum(torch.minimum(c[2], c[5]), c[8])
    top = torch.maximum(torch.maximum(c[2], c[5]), c[8])
    total = e0 + e1 + e2
    height = (e1 * c[2] + e2 * c[5] + e0 * c[8]) / total
    height = torch.where(total == 0, bottom, torch.minimum(torch.maximum(height, bottom), top))
    return torch.where(above & below, torch.nan, height)


@dataclass(frozen=True)
class Crossings:
    """Where grid lines cross triangles: face, axis of the line, its place and the height on it.

    All [N]: face, axis, u, v int64; height float64.
    """

    face: Tensor
    axis: Tensor
    u: Tensor
    v: Tensor
    height: Tensor

    def ids_at(self, grid: Grid, height: Tensor) -> Tensor:
        """Return the voxels [N], by id, at a height [N] int64 of each line."""
        return grid.ids_at(*along(self.axis, self.u, self.v, height))

    def edges_at(self, grid: Grid, height: Tensor) -> Tensor:
        """Return the places in [3, B, 8, 8, 8] of the edges from these voxels to +axis, or -1."""
        ids = self.ids_at(grid, height)
        return torch.where(ids < 0, -1, self.axis * (512 * len(grid.blocks)) + ids)


def crossings(columns: Tensor) -> Iterator[Crossings]:
    """Yield, in chunks, where grid lines along the three axes cross triangles [9, F]."""
    faces = columns.shape[1]
    axes = torch.arange(3, device=columns.device).repeat_interleave(faces)
    c = turned(columns.view(3, 3, -1).repeat(1, 1, 3), axes).view(9, -1)
    area = (c[3] - c[0]) * (c[7] - c[1]) - (c[4] - c[1]) * (c[6] - c[0])
    first_u = torch.minimum(torch.minimum(c[0], c[3]), c[6]).ceil().long()
    last_u = torch.maximum(torch.maximum(c[0], c[3]), c[6]).floor().long()
    for f, place in expanded(torch.where(area == 0, 0, last_u - first_u + 1).clamp_min(0)):
        pu = first_u[f] + place
        first_v, count = _line_range(c[:, f], pu)
        for i, step in expanded(count.clamp_min(0)):
            turned_face, u, v = f[i], pu[i], first_v[i] + step
            height = _line_heights(c[:, turned_face], u, v)
            met = (~height.isnan()).nonzero().view(-1)
            turned_face = turned_face[met]
            yield Crossings(turned_face % faces, turned_face // faces, u[met], v[met], height[met])


def edge_crossings(columns: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return (walls, odd, double) [3, B, 8, 8, 8] bool: grid edges from a voxel to +axis.

    walls: crossed by a triangle; odd: by an odd number; double: by more than one. Where TIE makes
    a crossing block a second edge, that edge is in `walls` alone.
    """
    shape = (3, len(grid.blocks), BLOCK, BLOCK, BLOCK)
    walls = torch.zeros(shape, dtype=torch.bool, device=columns.device)
    count = torch.zeros(walls.numel(), dtype=torch.int32, device=columns.device)
    for some in crossings(columns):
        main, lower = some.height.floor().long(), (some.height - TIE).floor().long()
        upper = (some.height + TIE).floor().long()
        edges = some.edges_at(grid, main)
        count.scatter_add_(0, edges, torch.ones_like(edges, dtype=torch.int32))
        edges = some.edges_at(grid, torch.where(lower != main, lower, main + 1))
        walls.view(-1)[edges[((lower != main) | (upper != main)) & (edges >= 0)]] = True
    odd, double = torch.empty_like(walls), torch.empty_like(walls)
    for axis, found in enumerate(count.view(shape)):
        walls[axis] |= found > 0
        odd[axis] = found & 1 == 1
        double[axis] = found > 1
    return walls, odd, double


def crossing_votes(
    columns: Tensor,
    grid: Grid,
    outside: Tensor,
    solid: Tensor,
    double: Tensor,
    patches: Tensor,
    patch_count: int,
) -> Tensor:
    """Return [P, 2]: how many grid edges cross a patch alone between outside and outside, or solid.

    columns: [9, F] as they made `double`; patches: [F]; outside, solid: [B, 8, 8, 8]. Edges that
    end in a voxel of neither are not counted.
    """
    votes = torch.zeros(2 * patch_count, dtype=torch.int64, device=columns.device)
    for some in crossings(columns):
        main = some.height.floor().long()
        alone = ~holds(double, some.edges_at(grid, main))
        one, two = some.ids_at(grid, main), some.ids_at(grid, main + 1)
        free = holds(outside, one).int() + holds(outside, two)
        full = (holds(solid, one) & (one >= 0)).int() + (holds(solid, two) & (two >= 0))
        counted = alone & ((free == 2) | ((free == 1) & (full == 1)))
        vote = 2 * patches[some.face] + (free == 1)
        votes += torch.bincount(vote[counted], minlength=2 * patch_count)
    return votes.view(-1, 2)
