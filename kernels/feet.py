"""Closest points ("feet") of voxels in sparse blocks: the cells they lie in, and whose is best.

`foot_cells` and `best_feet` run Triton kernels on CUDA and their plain twins elsewhere. Voxels go
by id, 512 * row of the block + 64 x + 8 y + z, or -1 for those of no block. rows: [side, side,
side] int32, the row of each block or -1; blocks: [B, 3] int64; columns: [9, F] float64 triangles in
voxels (`kernels/triangles.py`).

Floors: `foot_cells` reads and writes 20 bytes a voxel and does 200 operations in float64, 1.2 ms a
100 million on an H200. `best_feet` does 27 times that, and gathers some 3 KB a voxel, from caches.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tolerances import SLIVER
from kernels.triangles import (
    Point,
    chosen,
    closest_on_triangle,
    squared_between,
)

PER_PROGRAM = 128  # voxels


def block_rows(rows: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the rows [...] int64 of blocks at block coordinates, -1 where there is none."""
    side = len(rows)
    key = (x * side + y) * side + z
    # Negative ones have the sign bit set in x | y | z.
    inside = ((x | y | z) >= 0) & (torch.maximum(torch.maximum(x, y), z) < side)
    found = rows.view(-1)[torch.where(inside, key, 0)]
    return torch.where(inside, found, -1).long()


def voxel_ids(rows: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the ids [...] int64 of voxels at x, y, z, -1 where their block is not there."""
    row = block_rows(rows, x >> 3, y >> 3, z >> 3)
    # -1 << 9 has all bits but the lowest nine set; where there is no block these are set too.
    return row << 9 | torch.where(row < 0, 511, (x & 7) << 6 | (y & 7) << 3 | (z & 7))


def voxel_places(blocks: Tensor, ids: Tensor) -> Point:
    """Return the coordinates x, y, z [...] int64 of voxels."""
    x, y, z = blocks[ids >> 9].unbind(-1)
    return x << 3 | (ids >> 6 & 7), y << 3 | (ids >> 3 & 7), z << 3 | (ids & 7)


def holds(masks: Tensor, ids: Tensor) -> Tensor:
    """Return whether voxels are in a set [B, 8, 8, 8] bool; those of no block are."""
    return masks.view(-1)[ids.clamp_min(0)] | (ids < 0)


def _floors(q: Point) -> Point:
    return q[0].floor().long(), q[1].floor().long(), q[2].floor().long()


def _doubles(q: Point) -> Point:
    return q[0].double(), q[1].double(), q[2].double()


def foot_cells(
    rows: Tensor, blocks: Tensor, columns: Tensor, ids: Tensor, triangles: Tensor
) -> Tensor:
    """Return the cells [N] int64, by id or -1, of the closest points of voxels on triangles.

    ids: [N] int64; triangles: [N] int32, not negative.
    """
    if not ids.is_cuda:
        return foot_cells_torch(rows, blocks, columns, ids, triangles)
    return foot_cells_triton(rows, blocks, columns, ids, triangles)


def foot_cells_torch(
    rows: Tensor, blocks: Tensor, columns: Tensor, ids: Tensor, triangles: Tensor
) -> Tensor:
    """Return what `foot_cells` does."""
    p = _doubles(voxel_places(blocks, ids))
    return voxel_ids(rows, *_floors(closest_on_triangle(p, columns[:, triangles.long()])))


def foot_cells_triton(
    rows: Tensor, blocks: Tensor, columns: Tensor, ids: Tensor, triangles: Tensor
) -> Tensor:
    """Return what `foot_cells` does, by a thread a voxel."""
    cells = ids.new_empty(len(ids))
    if len(ids):
        sliver = torch.tensor([SLIVER], dtype=torch.float64, device=ids.device)
        _foot_cells_kernel[(triton.cdiv(len(ids), PER_PROGRAM),)](
            rows, len(rows), blocks, columns, columns.shape[1], sliver,
            ids.contiguous(), len(ids), triangles.contiguous(), cells,
            N=PER_PROGRAM, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return cells


def best_feet(
    rows: Tensor,
    blocks: Tensor,
    columns: Tensor,
    outside: Tensor,
    touch: Tensor,
    todo: Tensor,
    work: Tensor,
    ids: Tensor,
    feet: Tensor,
    nearest: Tensor,
    distance: Tensor,
    reach: float,
) -> None:
    """Give each voxel of a layer the best of the closest points that its 26 neighbours offer.

    outside, touch, todo: [B, 8, 8, 8] bool: voxels outside; cells with a corner outside; voxels not
    yet done, of which the layer [N], by ids, is a part. Neighbours that are done offer the closest
    point of their nearest triangle, if its cell has a corner outside, else their own foot. The
    least distance counts, the first of equals. Written in place for the layer: feet
    [W * 512, 3] float32, by work [B] int64, the closest points of voxels in blocks worked on (-1:
    not worked on, feet are what `nearest` gives); nearest [B, 8, 8, 8] int32, -1 for no offer;
    distance [B, 8, 8, 8] float32, reach at most.
    """
    run = best_feet_triton if ids.is_cuda else best_feet_torch
    run(
        rows, blocks, columns, outside, touch, todo, work, ids, feet, nearest, distance, reach
    )  # fmt: skip


def best_feet_torch(
    rows: Tensor,
    blocks: Tensor,
    columns: Tensor,
    outside: Tensor,
    touch: Tensor,
    todo: Tensor,
    work: Tensor,
    ids: Tensor,
    feet: Tensor,
    nearest: Tensor,
    distance: Tensor,
    reach: float,
) -> None:
    """Do what `best_feet` does, neighbour after neighbour."""
    x, y, z = voxel_places(blocks, ids)
    best = torch.full(ids.shape, torch.inf, dtype=torch.float64, device=ids.device)
    which = torch.full(ids.shape, -1, dtype=torch.int32, device=ids.device)
    foot = best.new_zeros((3, len(ids)))
    for m in range(27):
        i, j, k = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
        other = voxel_ids(rows, i, j, k)
        triangle = nearest.view(-1)[other.clamp_min(0)]
        offers = (~holds(todo, other) & (triangle >= 0)).nonzero().view(-1)
        triangle, other, limit = triangle[offers], other[offers], best[offers]
        p = _doubles((x[offers], y[offers], z[offers]))
        c = columns[:, triangle.long()]
        q = closest_on_triangle(p, c)
        hidden = ~holds(touch, voxel_ids(rows, *_floors(q)))
        found = squared_between(p, q)
        hopeful = found < limit
        known = work[other >> 9]
        sx, sy, sz = feet[known.clamp_min(0) << 9 | (other & 511)].double().unbind(1)
        own = closest_on_triangle(_doubles((i[offers], j[offers], k[offers])), c)
        own = chosen((known >= 0) & ~holds(outside, other), (sx, sy, sz), own)
        q = chosen(hidden, own, q)
        found = squared_between(p, q)
        better = (hopeful & (found < limit)).nonzero().view(-1)
        to = offers[better]
        best[to], which[to] = found[better], triangle[better]
        foot[:, to] = torch.stack(q)[:, better]
    feet[work[ids >> 9] << 9 | (ids & 511)] = foot.T.float()
    nearest.view(-1)[ids] = which
    distance.view(-1)[ids] = best.sqrt().clamp_max(reach).float()


def best_feet_triton(
    rows: Tensor,
    blocks: Tensor,
    columns: Tensor,
    outside: Tensor,
    touch: Tensor,
    todo: Tensor,
    work: Tensor,
    ids: Tensor,
    feet: Tensor,
    nearest: Tensor,
    distance: Tensor,
    reach: float,
) -> None:
    """Do what `best_feet` does, by a thread a voxel."""
    if not len(ids):
        return
    limits = torch.tensor([SLIVER, reach], dtype=torch.float64, device=ids.device)
    _best_feet_kernel[(triton.cdiv(len(ids), PER_PROGRAM),)](
        rows, len(rows), blocks, columns, columns.shape[1], limits,
        outside.view(torch.int8), touch.view(torch.int8), todo.view(torch.int8), work,
        ids.contiguous(), len(ids), feet, nearest, distance,
        N=PER_PROGRAM, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _square(x, y, z):
    return x * x + y * y + z * z


@triton.jit
def _on_segment(px, py, pz, ax, ay, az, bx, by, bz):
    ux, uy, uz = bx - ax, by - ay, bz - az
    length = ux * ux + uy * uy + uz * uz
    some = length > 0.0
    t = (px - ax) * ux + (py - ay) * uy + (pz - az) * uz
    t = tl.minimum(tl.maximum(t / tl.where(some, length, 1.0), 0.0), 1.0)
    t = tl.where(some, t, 0.0)
    return ax + t * ux, ay + t * uy, az + t * uz


@triton.jit
def _closest_point(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz, sliver):
    """Return the closest points of triangles abc to points p, by the region that p falls in."""
    ux, uy, uz = bx - ax, by - ay, bz - az
    vx, vy, vz = cx - ax, cy - ay, cz - az
    wx, wy, wz = px - ax, py - ay, pz - az
    uu = ux * ux + uy * uy + uz * uz
    uv = ux * vx + uy * vy + uz * vz
    vv = vx * vx + vy * vy + vz * vz
    area = uu * vv - uv * uv
    longest = tl.maximum(tl.maximum(uu, vv), uu + vv - 2 * uv)
    wu = wx * ux + wy * uy + wz * uz
    wv = wx * vx + wy * vy + wz * vz
    s = vv * wu - uv * wv
    t = uu * wv - uv * wu
    above = (area > sliver * longest * longest) & (s >= 0.0) & (t >= 0.0) & (s + t <= area)
    whole = tl.where(above, area, 1.0)
    s, t = s / whole, t / whole
    qx, qy, qz = _on_segment(px, py, pz, ax, ay, az, bx, by, bz)
    best = _square(px - qx, py - qy, pz - qz)
    ex, ey, ez = _on_segment(px, py, pz, bx, by, bz, cx, cy, cz)
    found = _square(px - ex, py - ey, pz - ez)
    closer = found < best
    best = tl.where(closer, found, best)
    qx, qy, qz = tl.where(closer, ex, qx), tl.where(closer, ey, qy), tl.where(closer, ez, qz)
    ex, ey, ez = _on_segment(px, py, pz, cx, cy, cz, ax, ay, az)
    closer = _square(px - ex, py - ey, pz - ez) < best
    qx, qy, qz = tl.where(closer, ex, qx), tl.where(closer, ey, qy), tl.where(closer, ez, qz)
    qx = tl.where(above, ax + s * ux + t * vx, qx)
    qy = tl.where(above, ay + s * uy + t * vy, qy)
    qz = tl.where(above, az + s * uz + t * vz, qz)
    return qx, qy, qz


@triton.jit
def _voxel_id(rows, side, x, y, z, live):
    inside = live & (x >= 0) & (y >= 0) & (z >= 0)
    inside &= (x < 8 * side) & (y < 8 * side) & (z < 8 * side)
    row = tl.load(rows + ((x >> 3) * side + (y >> 3)) * side + (z >> 3), inside, -1).to(tl.int64)
    return tl.where(row < 0, -1, row * 512 + (x & 7) * 64 + (y & 7) * 8 + (z & 7))


@triton.jit
def _floor(x):
    whole = x.to(tl.int64)  # towards zero
    return whole - (whole.to(tl.float64) > x).to(tl.int64)


@triton.jit
def _place(blocks, id, live):
    row = 3 * (id >> 9)
    x = tl.load(blocks + row, live, 0) * 8 + (id >> 6 & 7)
    y = tl.load(blocks + row + 1, live, 0) * 8 + (id >> 3 & 7)
    z = tl.load(blocks + row + 2, live, 0) * 8 + (id & 7)
    return x, y, z


@triton.jit
def _corner(columns, faces, corner: tl.constexpr, triangle, live):
    at = columns + 3 * corner * faces + triangle
    x = tl.load(at, live, 0.0)
    y = tl.load(at + faces, live, 0.0)
    z = tl.load(at + 2 * faces, live, 0.0)
    return x, y, z


@triton.jit
def _foot_cells_kernel(
    rows, side, blocks, columns, faces, limits,
    ids, count, triangles, cells,
    N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    live = at < count
    x, y, z = _place(blocks, tl.load(ids + at, live, 0), live)
    triangle = tl.load(triangles + at, live, 0).to(tl.int64)
    ax, ay, az = _corner(columns, faces, 0, triangle, live)
    bx, by, bz = _corner(columns, faces, 1, triangle, live)
    cx, cy, cz = _corner(columns, faces, 2, triangle, live)
    qx, qy, qz = _closest_point(
        x.to(tl.float64), y.to(tl.float64), z.to(tl.float64),
        ax, ay, az, bx, by, bz, cx, cy, cz, tl.load(limits),
    )  # fmt: skip
    cell = _voxel_id(rows, side, _floor(qx), _floor(qy), _floor(qz), live)
    tl.store(cells + at, cell, live)


@triton.jit
def _best_feet_kernel(
    rows, side, blocks, columns, faces, limits,
    outside, touch, todo, work,
    ids, count, feet, nearest, distance,
    N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    live = at < count
    sliver, reach = tl.load(limits), tl.load(limits + 1)
    id = tl.load(ids + at, live, 0)
    x, y, z = _place(blocks, id, live)
    px, py, pz = x.to(tl.float64), y.to(tl.float64), z.to(tl.float64)
    best = tl.full([N], float("inf"), tl.float64)
    which = tl.full([N], -1, tl.int32)
    fx, fy, fz = px * 0.0, px * 0.0, px * 0.0
    for m in range(27):
        i, j, k = x + (m // 9 - 1), y + (m // 3 % 3 - 1), z + (m % 3 - 1)
        other = _voxel_id(rows, side, i, j, k, live)
        offers = live & (other >= 0)
        offers &= tl.load(todo + other, offers, 1) == 0
        triangle = tl.load(nearest + other, offers, -1)
        offers &= triangle >= 0
        t = tl.where(offers, triangle, 0).to(tl.int64)
        ax, ay, az = _corner(columns, faces, 0, t, offers)
        bx, by, bz = _corner(columns, faces, 1, t, offers)
        cx, cy, cz = _corner(columns, faces, 2, t, offers)
        qx, qy, qz = _closest_point(
            px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz, sliver
        )  # fmt: skip
        cell = _voxel_id(rows, side, _floor(qx), _floor(qy), _floor(qz), offers)
        dx, dy, dz = px - qx, py - qy, pz - qz
        found = dx * dx + dy * dy + dz * dz
        hopeful = offers & (found < best)
        hidden = hopeful & (cell >= 0)
        hidden &= tl.load(touch + cell, hidden, 1) == 0
        if tl.max(hidden.to(tl.int32), 0) > 0:
            known = tl.load(work + (other >> 9), hidden, -1)
            stored = hidden & (known >= 0)
            stored &= tl.load(outside + other, stored, 1) == 0
            foot = feet + 3 * (known * 512 + (other & 511))
            ox, oy, oz = _closest_point(
                i.to(tl.float64), j.to(tl.float64), k.to(tl.float64),
                ax, ay, az, bx, by, bz, cx, cy, cz, sliver,
            )  # fmt: skip
            ox = tl.where(stored, tl.load(foot, stored, 0.0).to(tl.float64), ox)
            oy = tl.where(stored, tl.load(foot + 1, stored, 0.0).to(tl.float64), oy)
            oz = tl.where(stored, tl.load(foot + 2, stored, 0.0).to(tl.float64), oz)
            qx, qy, qz = (
                tl.where(hidden, ox, qx),
                tl.where(hidden, oy, qy),
                tl.where(hidden, oz, qz),
            )
            dx, dy, dz = px - qx, py - qy, pz - qz
            found = dx * dx + dy * dy + dz * dz
        better = hopeful & (found < best)
        best = tl.where(better, found, best)
        which = tl.where(better, triangle, which)
        fx, fy, fz = tl.where(better, qx, fx), tl.where(better, qy, fy), tl.where(better, qz, fz)
    own = feet + 3 * (tl.load(work + (id >> 9), live, 0) * 512 + (id & 511))
    tl.store(own, fx.to(tl.float32), live)
    tl.store(own + 1, fy.to(tl.float32), live)
    tl.store(own + 2, fz.to(tl.float32), live)
    tl.store(nearest + id, which, live)
    tl.store(distance + id, tl.minimum(tl.sqrt(best), reach).to(tl.float32), live)
