"""Exact distances to triangles, block by block, and where grid edges cross triangles (compiled).

All lengths here are in voxels: vertex (x, y, z) of [-1, 1] is at (x + 1) * R / 2 - 1/2, so that
voxel i is sampled at i.
"""

import numpy as np

from model.compiled import compiled
from model.sdf import BLOCK

BLOCK_RADIUS = 3.5 * 3**0.5  # from a block's centre to its farthest voxel centre
# Squared area over fourth power of the longest edge, under which a triangle counts as its edges:
# barycentric coordinates of thinner ones are noise.
SLIVER = 1e-12
# A crossing so near to a voxel centre blocks the edges on both sides of it: rounding may not
# open a way through.
TIE = 1e-9


@compiled
def closest_on_segment(
    px: float,
    py: float,
    pz: float,
    ax: float,
    ay: float,
    az: float,
    bx: float,
    by: float,
    bz: float,
) -> tuple[float, float, float]:
    """Return the closest point of segment ab to p."""
    ux, uy, uz = bx - ax, by - ay, bz - az
    length = ux * ux + uy * uy + uz * uz
    t = 0.0
    if length > 0.0:
        t = ((px - ax) * ux + (py - ay) * uy + (pz - az) * uz) / length
        t = min(max(t, 0.0), 1.0)
    return ax + t * ux, ay + t * uy, az + t * uz


@compiled
def closest_on_triangle(
    px: float, py: float, pz: float, c: np.ndarray
) -> tuple[float, float, float]:
    """Return the closest point of triangle c [3, 3] to p, by the region that p falls in."""
    ax, ay, az = c[0, 0], c[0, 1], c[0, 2]
    ux, uy, uz = c[1, 0] - ax, c[1, 1] - ay, c[1, 2] - az
    vx, vy, vz = c[2, 0] - ax, c[2, 1] - ay, c[2, 2] - az
    wx, wy, wz = px - ax, py - ay, pz - az
    uu = ux * ux + uy * uy + uz * uz
    uv = ux * vx + uy * vy + uz * vz
    vv = vx * vx + vy * vy + vz * vz
    area = uu * vv - uv * uv
    longest = max(uu, vv, uu + vv - 2 * uv)
    if area > SLIVER * longest * longest:
        wu = wx * ux + wy * uy + wz * uz
        wv = wx * vx + wy * vy + wz * vz
        s = vv * wu - uv * wv
        t = uu * wv - uv * wu
        if s >= 0.0 and t >= 0.0 and s + t <= area:
            s, t = s / area, t / area
            return ax + s * ux + t * vx, ay + s * uy + t * vy, az + s * uz + t * vz
    best = np.inf
    qx = qy = qz = 0.0
    for i in range(3):
        j = (i + 1) % 3
        ex, ey, ez = closest_on_segment(
            px, py, pz, c[i, 0], c[i, 1], c[i, 2], c[j, 0], c[j, 1], c[j, 2]
        )
        d = (px - ex) ** 2 + (py - ey) ** 2 + (pz - ez) ** 2
        if d < best:
            best, qx, qy, qz = d, ex, ey, ez
    return qx, qy, qz


@compiled
def triangle_distance(px: float, py: float, pz: float, c: np.ndarray) -> float:
    """Return the distance of p to triangle c [3, 3]."""
    qx, qy, qz = closest_on_triangle(px, py, pz, c)
    return ((px - qx) ** 2 + (py - qy) ** 2 + (pz - qz) ** 2) ** 0.5


@compiled
def block_pairs(corners: np.ndarray, side: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (blocks [P] int64 linear index, triangles [P] int32) that may be within `reach`.

    corners: [F, 3, 3] float64. side: blocks along an axis. Every block that holds a voxel within
    reach of a triangle is there; a block is tested by the sphere around it.
    """
    capacity = 4 * len(corners) + 1024
    blocks = np.empty(capacity, np.int64)
    triangles = np.empty(capacity, np.int32)
    count = 0
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    normal = np.empty(3)
    cell = np.empty(3, np.int64)
    for f in range(len(corners)):
        c = corners[f]
        for a in range(3):
            least = min(c[0, a], c[1, a], c[2, a]) - reach
            most = max(c[0, a], c[1, a], c[2, a]) + reach
            low[a] = max(0, int(np.ceil((least - (BLOCK - 1)) / BLOCK)))
            high[a] = min(side - 1, int(np.floor(most / BLOCK)))
        for a in range(3):
            b, d = (a + 1) % 3, (a + 2) % 3
            normal[a] = (c[1, b] - c[0, b]) * (c[2, d] - c[0, d]) - (c[1, d] - c[0, d]) * (
                c[2, b] - c[0, b]
            )
        w = 0
        for a in range(1, 3):
            if abs(normal[a]) > abs(normal[w]):
                w = a
        u, v = (w + 1) % 3, (w + 2) % 3
        flat = normal[w] != 0.0
        slope_u = normal[u] / normal[w] if flat else 0.0
        slope_v = normal[v] / normal[w] if flat else 0.0
        # The plane is at most this far from its height over a column's centre, reach included.
        slack = (abs(slope_u) + abs(slope_v)) * 3.5 + 3.5
        slack += reach * (1 + slope_u**2 + slope_v**2) ** 0.5
        for iu in range(low[u], high[u] + 1):
            for iv in range(low[v], high[v] + 1):
                first, last = low[w], high[w]
                if flat:
                    height = c[0, w] - slope_u * (iu * BLOCK + 3.5 - c[0, u])
                    height -= slope_v * (iv * BLOCK + 3.5 - c[0, v])
                    first = max(first, int(np.ceil((height - slack - 3.5) / BLOCK)))
                    last = min(last, int(np.floor((height + slack - 3.5) / BLOCK)))
                for iw in range(first, last + 1):
                    cell[u], cell[v], cell[w] = iu, iv, iw
                    x, y, z = cell[0] * BLOCK + 3.5, cell[1] * BLOCK + 3.5, cell[2] * BLOCK + 3.5
                    if triangle_distance(x, y, z, c) > reach + BLOCK_RADIUS:
                        continue
                    if count == capacity:
                        capacity *= 2
                        grown = np.empty(capacity, np.int64)
                        grown[:count] = blocks
                        blocks = grown
                        grown_triangles = np.empty(capacity, np.int32)
                        grown_triangles[:count] = triangles
                        triangles = grown_triangles
                    blocks[count] = (cell[0] * side + cell[1]) * side + cell[2]
                    triangles[count] = f
                    count += 1
    return blocks[:count].copy(), triangles[:count].copy()


@compiled
def group_pairs(
    keys: np.ndarray, triangles: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows [side, side, side] int32 or -1, starts [B + 1] int64, sorted triangles [P])."""
    rows = np.zeros(side**3, np.int32)
    for key in keys:
        rows[key] += 1
    used = 0
    for key in range(len(rows)):
        used += rows[key] > 0
    starts = np.zeros(used + 1, np.int64)
    row = 0
    for key in range(len(rows)):
        if rows[key] > 0:
            starts[row + 1] = starts[row] + rows[key]
            rows[key] = row
            row += 1
        else:
            rows[key] = -1
    place = starts[:-1].copy()
    ordered = np.empty_like(triangles)
    for i in range(len(keys)):
        row = rows[keys[i]]
        ordered[place[row]] = triangles[i]
        place[row] += 1
    return rows.reshape(side, side, side), starts, ordered


@compiled
def _prune(
    corners: np.ndarray,
    source: np.ndarray,
    count: int,
    x: float,
    y: float,
    z: float,
    radius: float,
    reach: float,
    target: np.ndarray,
    found: np.ndarray,
) -> int:
    """Keep those triangles that may be closest, within reach, to a point within radius of xyz."""
    least = np.inf
    for i in range(count):
        found[i] = triangle_distance(x, y, z, corners[source[i]])
        least = min(least, found[i])
    if least > reach + radius:
        return 0
    limit = min(reach, least + radius) + radius
    kept = 0
    for i in range(count):
        if found[i] <= limit:
            target[kept] = source[i]
            kept += 1
    return kept


@compiled
def block_distances(
    corners: np.ndarray, blocks: np.ndarray, starts: np.ndarray, triangles: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact distances (float32, at most reach) and the nearest triangle (int32, or -1).

    blocks: [B, 3]; starts, triangles: the candidates of each block. Both results [B, 8, 8, 8].
    A block's candidates are thinned for its 4^3 and 2^3 parts by bounds that lose none.
    """
    distance = np.full((len(blocks), BLOCK, BLOCK, BLOCK), reach, np.float32)
    nearest = np.full((len(blocks), BLOCK, BLOCK, BLOCK), -1, np.int32)
    longest = 0
    for b in range(len(blocks)):
        longest = max(longest, starts[b + 1] - starts[b])
    some, few = np.empty(longest, np.int32), np.empty(longest, np.int32)
    found = np.empty(longest)
    root3 = 3**0.5
    for b in range(len(blocks)):
        own = triangles[starts[b] : starts[b + 1]]
        x, y, z = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
        for octant in range(8):
            i, j, k = (octant >> 2) * 4, (octant >> 1 & 1) * 4, (octant & 1) * 4
            n = _prune(
                corners, own, len(own), x + i + 1.5, y + j + 1.5, z + k + 1.5,
                1.5 * root3, reach, some, found,
            )  # fmt: skip
            if n == 0:
                continue
            for part in range(8):
                pi, pj, pk = i + (part >> 2) * 2, j + (part >> 1 & 1) * 2, k + (part & 1) * 2
                m = _prune(
                    corners, some, n, x + pi + 0.5, y + pj + 0.5, z + pk + 0.5,
                    0.5 * root3, reach, few, found,
                )  # fmt: skip
                if m == 0:
                    continue
                for voxel in range(8):
                    vi, vj, vk = pi + (voxel >> 2), pj + (voxel >> 1 & 1), pk + (voxel & 1)
                    best, which = reach, -1
                    for t in few[:m]:
                        d = triangle_distance(x + vi, y + vj, z + vk, corners[t])
                        if d < best:
                            best, which = d, t
                    distance[b, vi, vj, vk] = best
                    nearest[b, vi, vj, vk] = which
    return distance, nearest


@compiled
def edge_crossings(corners: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Return how triangles cross the grid edges: [B, 8, 8, 8, 3] uint8, edge from voxel to +axis.

    Bit 0: an odd number of crossings; bit 1: at least one. Triangles that share an edge decide
    by the same number on which side of it a grid line runs, so none slips between them: no way
    leads through a mesh without boundary, whatever its orientation.
    """
    crossings = np.zeros((count, BLOCK, BLOCK, BLOCK, 3), np.uint8)
    voxel = np.empty(3, np.int64)
    e = np.empty(3)
    sides = np.empty(3, np.bool_)
    for f in range(len(corners)):
        c = corners[f]
        for w in range(3):
            u, v = (w + 1) % 3, (w + 2) % 3
            area = (c[1, u] - c[0, u]) * (c[2, v] - c[0, v])
            area -= (c[1, v] - c[0, v]) * (c[2, u] - c[0, u])
            if area == 0.0:
                continue
            bottom, top = min(c[0, w], c[1, w], c[2, w]), max(c[0, w], c[1, w], c[2, w])
            first_u = int(np.ceil(min(c[0, u], c[1, u], c[2, u])))
            last_u = int(np.floor(max(c[0, u], c[1, u], c[2, u])))
            for pu in range(first_u, last_u + 1):
                # The line u = pu meets the triangle's outline in this range of v.
                least, most = np.inf, -np.inf
                for i in range(3):
                    j = (i + 1) % 3
                    if (c[i, u] - pu) * (c[j, u] - pu) <= 0.0:
                        step = c[j, u] - c[i, u]
                        if step == 0.0:
                            least = min(least, c[i, v], c[j, v])
                            most = max(most, c[i, v], c[j, v])
                        else:
                            at = c[i, v] + (pu - c[i, u]) / step * (c[j, v] - c[i, v])
                            least, most = min(least, at), max(most, at)
                if most < least:
                    continue
                for pv in range(int(np.ceil(least - 1e-6)), int(np.floor(most + 1e-6)) + 1):
                    for i in range(3):
                        j = (i + 1) % 3
                        a, b, swapped = i, j, False
                        if c[j, u] < c[i, u] or (c[j, u] == c[i, u] and c[j, v] < c[i, v]):
                            a, b, swapped = j, i, True
                        e[i] = (c[b, u] - c[a, u]) * (pv - c[a, v])
                        e[i] -= (c[b, v] - c[a, v]) * (pu - c[a, u])
                        sides[i] = (e[i] >= 0.0) != swapped
                        e[i] = -e[i] if swapped else e[i]
                    if sides[0] != sides[1] or sides[1] != sides[2]:
                        continue
                    total = e[0] + e[1] + e[2]
                    height = bottom
                    if total != 0.0:
                        height = (e[1] * c[0, w] + e[2] * c[1, w] + e[0] * c[2, w]) / total
                        height = min(max(height, bottom), top)
                    voxel[u], voxel[v] = pu, pv
                    lower = int(np.floor(height - TIE))
                    voxel[w] = int(np.floor(height))
                    for again in range(2):
                        row = rows[voxel[0] >> 3, voxel[1] >> 3, voxel[2] >> 3]
                        x, y, z = voxel[0] & 7, voxel[1] & 7, voxel[2] & 7
                        crossings[row, x, y, z, w] |= 2
                        if again == 0:
                            crossings[row, x, y, z, w] ^= 1
                        if lower == voxel[w] and int(np.floor(height + TIE)) == voxel[w]:
                            break
                        voxel[w] = lower if lower != voxel[w] else voxel[w] + 1
    return crossings
