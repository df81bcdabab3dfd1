"""Triangles beside blocks and across grid edges, on any device: the torch twin of `distance.py`.

Every formula is that of the compiled path, operation by operation, so that the two agree bit for
bit: floors, signs and ties decide there. PyTorch fuses no operations of one call with another's.
Triangles are [9, N] float64: rows x, y, z of the first corner, then of the others.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.feet import holds
from kernels.triangles import closest_on_triangle, squared_between
from model.sdf import BLOCK
from tasks.sparse_common import BLOCK_RADIUS, TIE
from tasks.torch_masks import Grid, expanded


def along(axis: int, u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y, z of what lies at u, v, w along the axes after `axis`, and it."""
    found = (w, u, v)
    return found[-axis % 3], found[(1 - axis) % 3], found[(2 - axis) % 3]


def block_pairs(columns: Tensor, side: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks that may be within reach of triangles, and these.

    columns: [9, F]; side: blocks along an axis. Returns blocks [B] int64, sorted, as keys
    (x side + y) side + z; starts [B + 1] int64 and triangles [P] int32, ascending in each block.
    Every block that holds a voxel within reach of a triangle is there; a block is tested by the
    sphere around it.
    """
    points = columns.view(3, 3, -1)  # corner, axis, triangle
    low = (points.amin(0) - reach - (BLOCK - 1)) / BLOCK
    high = (points.amax(0) + reach) / BLOCK
    low, high = low.ceil().long().clamp_min(0), high.floor().long().clamp_max(side - 1)
    u, v = points[1] - points[0], points[2] - points[0]
    normal = [u[(a + 1) % 3] * v[(a + 2) % 3] - u[(a + 2) % 3] * v[(a + 1) % 3] for a in range(3)]
    x, y, z = (n.abs() for n in normal)
    flattest = torch.where(y > x, 1, 0)
    flattest = torch.where(z > torch.maximum(x, y), 2, flattest)
    keys = []
    for axis in range(3):
        faces = (flattest == axis).nonzero().view(-1)
        keys += list(_pairs_along(axis, faces, columns, low, high, normal, side, reach))
    pairs = torch.cat(keys).sort().values if keys else flattest[:0]
    blocks, counts = torch.unique_consecutive(pairs // columns.shape[1], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return blocks, starts, (pairs % columns.shape[1]).int()


def _pairs_along(
    w: int,
    faces: Tensor,
    columns: Tensor,
    low: Tensor,
    high: Tensor,
    normal: list[Tensor],
    side: int,
    reach: float,
) -> Iterator[Tensor]:
    """Yield pairs as block * F + triangle, of those triangles [N] that lie flattest across w.

    low, high: [3, F] the blocks of each triangle's bounding box. The blocks of a column along w
    are those that the triangle's plane can reach.
    """
    u, v = (w + 1) % 3, (w + 2) % 3
    high_v, low_v = high[v, faces], low[v, faces]
    across = (high_v - low_v + 1).clamp_min(0)
    flat = normal[w][faces] != 0
    slope_u = torch.where(flat, normal[u][faces] / normal[w][faces], 0.0)
    slope_v = torch.where(flat, normal[v][faces] / normal[w][faces], 0.0)
    slack = (slope_u.abs() + slope_v.abs()) * 3.5 + 3.5
    slack = slack + reach * (1 + slope_u * slope_u + slope_v * slope_v).sqrt()
    for i, place in expanded((high[u, faces] - low[u, faces] + 1).clamp_min(0) * across):
        face = faces[i]
        iu, iv = low[u, face] + place // across[i], low_v[i] + place % across[i]
        height = columns[w, face] - slope_u[i] * (iu * BLOCK + 3.5 - columns[u, face])
        height = height - slope_v[i] * (iv * BLOCK + 3.5 - columns[v, face])
        first = ((height - slack[i] - 3.5) / BLOCK).ceil().clamp(-1, side + 1).long()
        last = ((height + slack[i] - 3.5) / BLOCK).floor().clamp(-1, side + 1).long()
        first = torch.where(flat[i], torch.maximum(low[w, face], first), low[w, face])
        last = torch.where(flat[i], torch.minimum(high[w, face], last), high[w, face])
        for j, depth in expanded((last - first + 1).clamp_min(0)):
            x, y, z = along(w, iu[j], iv[j], first[j] + depth)
            triangle = face[j]
            c = columns[:, triangle]
            centre = x * BLOCK + 3.5, y * BLOCK + 3.5, z * BLOCK + 3.5
            distance = squared_between(centre, closest_on_triangle(centre, c)).sqrt()
            key = ((x * side + y) * side + z) * columns.shape[1] + triangle
            yield key[distance <= reach + BLOCK_RADIUS]


def _line_range(c: Tensor, u: int, v: int, pu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first v [N] at which the line u = pu may meet triangles c [9, N], and how many."""
    least = torch.full_like(c[0], torch.inf)
    most = -least
    for i in range(3):
        j = (i + 1) % 3
        iu, iv, ju, jv = c[3 * i + u], c[3 * i + v], c[3 * j + u], c[3 * j + v]
        meets = (iu - pu) * (ju - pu) <= 0
        step = ju - iu
        at = iv + (pu - iu) / step * (jv - iv)
        one, two = torch.where(step == 0, iv, at), torch.where(step == 0, jv, at)
        least = torch.where(meets, torch.minimum(least, torch.minimum(one, two)), least)
        most = torch.where(meets, torch.maximum(most, torch.maximum(one, two)), most)
    none = most < least
    first = (torch.where(none, 0.0, least) - 1e-6).ceil().long()
    last = (torch.where(none, -1.0, most) + 1e-6).floor().long()
    return first, last - first + 1


def _line_heights(c: Tensor, w: int, pu: Tensor, pv: Tensor) -> Tensor:
    """Return where grid lines along w at (pu, pv) [N] meet triangles c [9, N], or NaN.

    Triangles that share an edge decide by the same number on which side of it the line runs.
    """
    u, v = (w + 1) % 3, (w + 2) % 3
    above = torch.zeros_like(pu, dtype=torch.bool)
    below = above.clone()
    areas = []
    for i in range(3):
        j = (i + 1) % 3
        iu, iv, ju, jv = c[3 * i + u], c[3 * i + v], c[3 * j + u], c[3 * j + v]
        swapped = (ju < iu) | ((ju == iu) & (jv < iv))
        au, av = torch.where(swapped, ju, iu), torch.where(swapped, jv, iv)
        bu, bv = torch.where(swapped, iu, ju), torch.where(swapped, iv, jv)
        e = (bu - au) * (pv - av)
        e = e - (bv - av) * (pu - au)
        over = (e >= 0) != swapped
        above |= over
        below |= ~over
        areas.append(torch.where(swapped, -e, e))
    e0, e1, e2 = areas
    hw = c[w], c[3 + w], c[6 + w]
    bottom = torch.minimum(torch.minimum(hw[0], hw[1]), hw[2])
    top = torch.maximum(torch.maximum(hw[0], hw[1]), hw[2])
    total = e0 + e1 + e2
    height = (e1 * hw[0] + e2 * hw[1] + e0 * hw[2]) / total
    height = torch.where(total == 0, bottom, torch.minimum(torch.maximum(height, bottom), top))
    return torch.where(above & below, torch.nan, height)


def crossings(columns: Tensor, w: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield, in chunks, where grid lines along axis w cross triangles [9, F].

    Each is (face, pu, pv [n] int64, height [n] float64): triangle, line and place on it.
    """
    u, v = (w + 1) % 3, (w + 2) % 3
    au, bu, cu = columns[u], columns[3 + u], columns[6 + u]
    av, bv, cv = columns[v], columns[3 + v], columns[6 + v]
    area = (bu - au) * (cv - av) - (bv - av) * (cu - au)
    first_u = torch.minimum(torch.minimum(au, bu), cu).ceil().long()
    last_u = torch.maximum(torch.maximum(au, bu), cu).floor().long()
    for i, place in expanded(torch.where(area == 0, 0, last_u - first_u + 1).clamp_min(0)):
        pu = first_u[i] + place
        first_v, count = _line_range(columns[:, i], u, v, pu)
        for j, step in expanded(count.clamp_min(0)):
            face, at_u, at_v = i[j], pu[j], first_v[j] + step
            height = _line_heights(columns[:, face], w, at_u, at_v)
            met = ~height.isnan()
            yield face[met], at_u[met], at_v[met], height[met]


def edge_crossings(columns: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return (walls, odd, double) [3, B, 8, 8, 8] bool: grid edges from a voxel to +axis.

    walls: crossed by a triangle; odd: by an odd number; double: by more than one. Where TIE makes
    a crossing block a second edge, that edge is in `walls` alone.
    """
    shape = (3, len(grid.blocks), BLOCK, BLOCK, BLOCK)
    walls, odd, double = (
        torch.zeros(shape, dtype=torch.bool, device=columns.device) for _ in range(3)
    )
    for w in range(3):
        count = torch.zeros(walls[w].numel(), dtype=torch.int32, device=columns.device)
        tied = walls[w].view(-1)
        for _, pu, pv, height in crossings(columns, w):
            main, lower = height.floor().long(), (height - TIE).floor().long()
            ids = grid.ids_at(*along(w, pu, pv, main))
            count.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
            upper = (height + TIE).floor().long()
            other = torch.where(lower != main, lower, main + 1)
            ids = grid.ids_at(*along(w, pu, pv, other))
            tied[ids[((lower != main) | (upper != main)) & (ids >= 0)]] = True
        walls[w] |= (count > 0).view(shape[1:])
        odd[w] = (count & 1 == 1).view(shape[1:])
        double[w] = (count > 1).view(shape[1:])
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
    for w in range(3):
        for face, pu, pv, height in crossings(columns, w):
            main = height.floor().long()
            one = grid.ids_at(*along(w, pu, pv, main))
            two = grid.ids_at(*along(w, pu, pv, main + 1))
            alone = ~holds(double[w], one)
            free = holds(outside, one).int() + holds(outside, two).int()
            full = (holds(solid, one) & (one >= 0)).int() + (holds(solid, two) & (two >= 0)).int()
            counted = alone & ((free == 2) | ((free == 1) & (full == 1)))
            vote = 2 * patches[face] + (free == 1)
            votes += torch.bincount(vote[counted], minlength=2 * patch_count)
    return votes.view(-1, 2)
