"""Closest points of triangles, one triangle a point, in torch alone (`feet.py` has Triton's).

They do the operations of the compiled path (`tasks/distance.py`) in its order, none of them fused,
so that floors and comparisons of their results fall as they do there. Points are x, y and z apart;
triangles are [9, N] float64: rows x, y, z of the first corner, then of the others.
"""

import torch
from torch import Tensor

from kernels.tolerances import SLIVER

Point = tuple[Tensor, Tensor, Tensor]


def closest_on_segment(p: Point, a: Tensor, b: Tensor) -> Point:
    """Return the closest points of segments ab, each [3, N], to points p."""
    ux, uy, uz = b - a
    length = ux * ux + uy * uy + uz * uz
    t = ((p[0] - a[0]) * ux + (p[1] - a[1]) * uy + (p[2] - a[2]) * uz) / length
    t = torch.where(length > 0, t.clamp(0, 1), 0.0)
    return a[0] + t * ux, a[1] + t * uy, a[2] + t * uz


def squared_between(p: Point, q: Point) -> Tensor:
    """Return the squared distances of points."""
    x, y, z = p[0] - q[0], p[1] - q[1], p[2] - q[2]
    return x * x + y * y + z * z


def chosen(which: Tensor, p: Point, q: Point) -> Point:
    """Return points p where `which`, else q."""
    return (
        torch.where(which, p[0], q[0]),
        torch.where(which, p[1], q[1]),
        torch.where(which, p[2], q[2]),
    )


def closest_on_triangle(p: Point, c: Tensor) -> Point:
    """Return the closest points of triangles c [9, N] to points p [N]."""
    a = c[:3]
    ux, uy, uz = c[3:6] - a
    vx, vy, vz = c[6:] - a
    wx, wy, wz = p[0] - a[0], p[1] - a[1], p[2] - a[2]
    uu = ux * ux + uy * uy + uz * uz
    uv = ux * vx + uy * vy + uz * vz
    vv = vx * vx + vy * vy + vz * vz
    area = uu * vv - uv * uv
    longest = torch.maximum(torch.maximum(uu, vv), uu + vv - 2 * uv)
    wu = wx * ux + wy * uy + wz * uz
    wv = wx * vx + wy * vy + wz * vz
    s = vv * wu - uv * wv
    t = uu * wv - uv * wu
    above = (area > SLIVER * longest * longest) & (s >= 0) & (t >= 0) & (s + t <= area)
    s, t = s / area, t / area
    foot = a[0] + s * ux + t * vx, a[1] + s * uy + t * vy, a[2] + s * uz + t * vz
    best = torch.full_like(s, torch.inf)
    q = (torch.zeros_like(s),) * 3
    for i in range(3):
        j = (i + 1) % 3
        e = closest_on_segment(p, c[3 * i : 3 * i + 3], c[3 * j : 3 * j + 3])
        d = squared_between(p, e)
        closer = d < best
        best = torch.where(closer, d, best)
        q = chosen(closer, e, q)
    return chosen(above, foot, q)
