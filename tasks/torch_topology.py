"""Welded triangles, their parts, patches and sharp edges, on any device.

The torch twin of `weld` and `_parts` of `sparse_engine.py`, `oriented_patches` of `sign.py`, and
`sharp.py`, which say more.
"""

import math

import torch
from torch import Tensor

from kernels.components import graph_components
from kernels.triangles import closest_on_segment, squared_between
from tasks.sparse_common import DIHEDRAL, SHARP_REACH, WELD
from tasks.torch_distance import along, largest, turned
from tasks.torch_masks import Grid, expanded


def weld(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return vertices joined where they coincide, and faces without degenerate and double ones.

    vertices: [V, 3] float64; faces: [F, 3] int64.
    """
    x, y, z = ((vertices / WELD).round().long() + 2**20).unbind(1)
    _, inverse = torch.unique(x << 42 | y << 21 | z, return_inverse=True)
    faces = inverse[faces]
    a, b, c = faces.unbind(1)
    faces = faces[(a != b) & (b != c) & (c != a)]
    first = _first_of(inverse)
    low, middle, high = faces.sort(1).values.unbind(1)
    _, pair = torch.unique(low * len(first) + middle, return_inverse=True)
    _, kind = torch.unique(pair * len(first) + high, return_inverse=True)
    return vertices[first], faces[_first_of(kind).sort().values]


def _first_of(numbers: Tensor) -> Tensor:
    """Return where each of the numbers 0, 1, ... [N] comes first."""
    count = int(numbers.max()) + 1 if len(numbers) else 0
    place = torch.arange(len(numbers), device=numbers.device)
    return numbers.new_full((count,), len(numbers)).scatter_reduce_(0, numbers, place, "amin")


def parts_of(faces: Tensor, vertex_count: int) -> Tensor:
    """Return the part [F] of each face: faces that share vertices are one."""
    a, b, c = faces.unbind(1)
    labels = graph_components(torch.cat([a, b]), torch.cat([b, c]), vertex_count)
    return torch.unique(labels[a], return_inverse=True)[1]


def part_sizes(columns: Tensor, parts: Tensor) -> Tensor:
    """Return the diagonal [P] of each part's bounding box. columns: [9, F]; parts: [F]."""
    points = columns.view(3, 3, -1)
    shape = (3, int(parts.max()) + 1)
    index = parts.expand(3, -1)
    low = points.new_full(shape, torch.inf).scatter_reduce_(1, index, points.amin(0), "amin")
    high = points.new_full(shape, -torch.inf).scatter_reduce_(1, index, points.amax(0), "amax")
    x, y, z = high - low
    return (x * x + y * y + z * z).sqrt()


def _half_edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return the key [3 F] of each face's edges, whichever way they run, and which run upwards."""
    start, end = faces.reshape(-1), faces.roll(-1, 1).reshape(-1)
    count = int(faces.max()) + 1
    return torch.minimum(start, end) * count + torch.maximum(start, end), start < end


def oriented_patches(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patch [F] of each of the faces [F, 3] and -1.0 where it is to be turned round."""
    count = len(faces)
    key, upwards = _half_edges(faces)
    key, order = key.sort(stable=True)
    _, uses = torch.unique_consecutive(key, return_counts=True)
    first = (uses.cumsum(0) - uses)[uses == 2]
    one, two = order[first], order[first + 1]
    a, b = one // 3, two // 3 + count * (upwards[one] == upwards[two])
    labels = graph_components(
        torch.cat([a, a + count]), torch.cat([b, (b + count) % (2 * count)]), 2 * count
    )
    plain, turned = labels[:count], labels[count:]
    patches = torch.unique(torch.minimum(plain, turned), return_inverse=True)[1]
    return patches, torch.where(plain <= turned, 1.0, -1.0).double()


def sharp_edges(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the edges [E, 2] at which the surface turns by more than 30 degrees."""
    corners = vertices[faces]
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (corners[:, i].unbind(1) for i in range(3))
    ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = (x * x + y * y + z * z).sqrt()
    sides = (corners - corners.roll(-1, 1)).square()
    longest = (sides[..., 0] + sides[..., 1] + sides[..., 2]).amax(1)
    fair = length > 1e-4 * longest
    length = length.clamp_min(1e-300)
    x, y, z = x / length, y / length, z / length
    key, upwards = _half_edges(faces)
    usable = fair.repeat_interleave(3).nonzero().view(-1)
    key, order = key[usable].sort(stable=True)
    half = usable[order]
    same = (key[1:] == key[:-1]).nonzero().view(-1)
    one, two = half[same], half[same + 1]
    turn = torch.where(upwards[one] == upwards[two], -1.0, 1.0)
    one, two = one // 3, two // 3
    cosine = (x[one] * x[two] + y[one] * y[two] + z[one] * z[two]) * turn
    sharp = torch.unique(key[same[cosine < math.cos(DIHEDRAL)]])
    count = int(faces.max()) + 1
    return torch.stack([sharp // count, sharp % count], 1)


def mark_sharp(grid: Grid, segments: Tensor, field: Tensor, shell: float) -> Tensor:
    """Return the voxels [B, 8, 8, 8] bool within SHARP_REACH of a segment [E, 2, 3] that is seen.

    An edge is hidden where |field| is more than the distance from it says (or the shell's half
    thickness).
    """
    marks = torch.zeros_like(field, dtype=torch.bool)
    window = 2  # a slab's disc reaches SHARP_REACH / cos(54.7 degrees) at most
    ends = segments.permute(1, 2, 0).contiguous()  # end, axis, segment
    axis = largest((ends[1] - ends[0]).abs())
    a, b = turned(ends, axis)
    first = (torch.minimum(a[2], b[2]) - SHARP_REACH).ceil().long()
    last = (torch.maximum(a[2], b[2]) + SHARP_REACH).floor().long()
    for s, place in expanded((last - first + 1) * 25):
        p, q = a[:, s], b[:, s]
        w = first[s] + place // 25
        run = q[2] - p[2]
        t = torch.where(run == 0, 0.0, ((w - p[2]) / run).clamp(0, 1))
        centre_u, centre_v = p[:2] + t * (q[:2] - p[:2])
        u = (centre_u - window).ceil().long() + place // 5 % 5
        v = (centre_v - window).ceil().long() + place % 5
        voxel = along(axis[s], u, v, w)
        ids = grid.ids_at(*voxel)
        point = voxel[0].double(), voxel[1].double(), voxel[2].double()
        foot = closest_on_segment(point, ends[0, :, s], ends[1, :, s])
        distance = squared_between(point, foot).sqrt()
        away = field.view(-1)[ids.clamp_min(0)].abs().double()
        near = (ids >= 0) & (distance <= SHARP_REACH)
        near &= (u <= (centre_u + window).floor()) & (v <= (centre_v + window).floor())
        near &= away <= (distance + 0.1).clamp_min(shell)
        marks.view(-1)[ids[near]] = True
    return marks


def closed_and_oriented(faces: Tensor, vertex_count: int) -> bool:
    """Return whether each directed edge of faces [F, 3] occurs once, and its reverse once."""
    faces = faces.long()  # a key is the product of two vertices
    start, end = faces.reshape(-1), faces.roll(-1, 1).reshape(-1)
    ahead = (start * vertex_count + end).sort().values
    back = (end * vertex_count + start).sort().values
    return torch.equal(ahead, back) and bool((ahead[1:] != ahead[:-1]).all())
