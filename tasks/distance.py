"""Exact distances to triangles, block by block, and where grid edges cross triangles (compiled).

All lengths here are in voxels: vertex (x, y, z) of [-1, 1] is at (x + 1) * R / 2 - 1/2, so that
voxel i is sampled at i.
"""

import numpy as np

from kernels.tolerances import SLIVER
from model.compiled import compiled
from model.sdf import BLOCK
from tasks.masks import ONE, mask_at, row_at
from tasks.sparse_common import BLOCK_RADIUS, TIE

# Candidates up to which thinning them further costs more than it saves.
FEW = 12


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
def _records(corners: np.ndarray) -> np.ndarray:
    """Return what the distance to a triangle needs, [F, 19]: see `_squared` for the columns."""
    records = np.empty((len(corners), 19))
    for f in range(len(corners)):
        c, r = corners[f], records[f]
        for i in range(3):
            r[i], r[3 + i], r[6 + i] = c[0, i], c[1, i] - c[0, i], c[2, i] - c[0, i]
        uu = r[3] * r[3] + r[4] * r[4] + r[5] * r[5]
        uv = r[3] * r[6] + r[4] * r[7] + r[5] * r[8]
        vv = r[6] * r[6] + r[7] * r[7] + r[8] * r[8]
        ee = (r[6] - r[3]) ** 2 + (r[7] - r[4]) ** 2 + (r[8] - r[5]) ** 2
        r[9], r[10], r[11] = uu, uv, vv
        r[12] = 1 / uu if uu > 0.0 else 0.0
        r[13] = 1 / vv if vv > 0.0 else 0.0
        r[14] = 1 / ee if ee > 0.0 else 0.0
        area = uu * vv - uv * uv
        longest = max(uu, vv, ee)
        nx, ny, nz = r[4] * r[8] - r[5] * r[7], r[5] * r[6] - r[3] * r[8], r[3] * r[7] - r[4] * r[6]
        length = (nx * nx + ny * ny + nz * nz) ** 0.5
        if area > SLIVER * longest * longest and length > 0.0:
            r[15], r[16], r[17], r[18] = area, nx / length, ny / length, nz / length
        else:
            r[15], r[16], r[17], r[18] = -1.0, 0.0, 0.0, 0.0
    return records


@compiled
def _squared(
    wx: float, wy: float, wz: float,
    ux: float, uy: float, uz: float, vx: float, vy: float, vz: float,
    uu: float, uv: float, vv: float, per_uu: float, per_vv: float, per_ee: float,
    area: float, nx: float, ny: float, nz: float,
) -> float:  # fmt: skip
    """Return the squared distance to a triangle, without branches so that loops use vectors.

    w: the point from the first corner; u, v: the others from it; uu, uv, vv: their products;
    per_uu, per_vv, per_ee: inverse squared lengths of the edges; area: uu vv - uv uv, negative
    for a sliver; n: unit normal.
    """
    wu = wx * ux + wy * uy + wz * uz
    wv = wx * vx + wy * vy + wz * vz
    t = min(max(wu * per_uu, 0.0), 1.0)
    x, y, z = wx - t * ux, wy - t * uy, wz - t * uz
    best = x * x + y * y + z * z
    t = min(max(wv * per_vv, 0.0), 1.0)
    x, y, z = wx - t * vx, wy - t * vy, wz - t * vz
    best = min(best, x * x + y * y + z * z)
    ex, ey, ez = vx - ux, vy - uy, vz - uz
    x, y, z = wx - ux, wy - uy, wz - uz
    t = min(max((x * ex + y * ey + z * ez) * per_ee, 0.0), 1.0)
    x, y, z = x - t * ex, y - t * ey, z - t * ez
    best = min(best, x * x + y * y + z * z)
    s = vv * wu - uv * wv
    q = uu * wv - uv * wu
    height = wx * nx + wy * ny + wz * nz
    return height * height if (s >= 0.0) & (q >= 0.0) & (s + q <= area) else best


@compiled
def _prune(
    records: np.ndarray,
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
        r = records[source[i]]
        found[i] = _squared(
            x - r[0], y - r[1], z - r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11],
            r[12], r[13], r[14], r[15], r[16], r[17], r[18],
        )  # fmt: skip
        least = min(least, found[i])
    least = least**0.5
    if least > reach + radius:
        return 0
    limit = (min(reach, least + radius) + radius + 1e-9) ** 2
    kept = 0
    for i in range(count):
        if found[i] <= limit:
            target[kept] = source[i]
            kept += 1
    return kept


@compiled
def _closest(
    records: np.ndarray,
    some: np.ndarray,
    count: int,
    points: np.ndarray,
    n: int,
    best: np.ndarray,
    which: np.ndarray,
) -> None:
    """Lower best [n] (squared) and set which [n] at points [3, n], for the first of `some`."""
    for m in range(count):
        t = some[m]
        r = records[t]
        ax, ay, az = r[0], r[1], r[2]
        ux, uy, uz, vx, vy, vz = r[3], r[4], r[5], r[6], r[7], r[8]
        uu, uv, vv, per_uu, per_vv, per_ee = r[9], r[10], r[11], r[12], r[13], r[14]
        area, nx, ny, nz = r[15], r[16], r[17], r[18]
        for i in range(n):
            d = _squared(
                points[0, i] - ax, points[1, i] - ay, points[2, i] - az,
                ux, uy, uz, vx, vy, vz, uu, uv, vv, per_uu, per_vv, per_ee, area, nx, ny, nz,
            )  # fmt: skip
            closer = d < best[i]
            best[i] = d if closer else best[i]
            which[i] = t if closer else which[i]


@compiled
def block_distances(
    corners: np.ndarray, blocks: np.ndarray, starts: np.ndarray, triangles: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact distances (float32, at most reach) and the nearest triangle (int32, or -1).

    corners: [F, 3, 3]; blocks: [B, 3]; starts, triangles: the candidates of each block. Both
    results [B, 8, 8, 8]. A block's candidates are thinned for its 4^3 and 2^3 parts by bounds
    that lose none.
    """
    records = _records(corners)
    distance = np.empty((len(blocks), BLOCK, BLOCK, BLOCK), np.float32)
    nearest = np.empty((len(blocks), BLOCK, BLOCK, BLOCK), np.int32)
    longest = 0
    for b in range(len(blocks)):
        longest = max(longest, starts[b + 1] - starts[b])
    some, few = np.empty(longest, np.int32), np.empty(longest, np.int32)
    found = np.empty(longest)
    points, best, which = np.empty((3, 64)), np.empty(64), np.empty(64, np.int64)
    root3 = 3**0.5
    for b in range(len(blocks)):
        own = triangles[starts[b] : starts[b + 1]]
        x, y, z = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
        for octant in range(8):
            i, j, k = (octant >> 2) * 4, (octant >> 1 & 1) * 4, (octant & 1) * 4
            n = _prune(
                records, own, len(own), x + i + 1.5, y + j + 1.5, z + k + 1.5,
                1.5 * root3, reach, some, found,
            )  # fmt: skip
            best[:] = reach * reach
            which[:] = -1
            for v in range(64):  # the parts of 2^3 one after the other
                points[0, v] = x + i + (v >> 5) * 2 + (v >> 2 & 1)
                points[1, v] = y + j + (v >> 4 & 1) * 2 + (v >> 1 & 1)
                points[2, v] = z + k + (v >> 3 & 1) * 2 + (v & 1)
            if n <= FEW:
                _closest(records, some, n, points, 64, best, which)
            else:
                for part in range(8):
                    at = slice(8 * part, 8 * part + 8)
                    m = _prune(
                        records, some, n, points[0, 8 * part] + 0.5, points[1, 8 * part] + 0.5,
                        points[2, 8 * part] + 0.5, 0.5 * root3, reach, few, found,
                    )  # fmt: skip
                    _closest(records, few, m, points[:, at], 8, best[at], which[at])
            for v in range(64):
                vi = i + (v >> 5) * 2 + (v >> 2 & 1)
                vj = j + (v >> 4 & 1) * 2 + (v >> 1 & 1)
                vk = k + (v >> 3 & 1) * 2 + (v & 1)
                distance[b, vi, vj, vk] = reach if which[v] < 0 else best[v] ** 0.5
                nearest[b, vi, vj, vk] = which[v]
    return distance, nearest


@compiled
def _line_range(c: np.ndarray, u: int, v: int, pu: int) -> tuple[int, int]:
    """Return the first and last v at which the line u = pu may meet triangle c [3, 3]."""
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
        return 0, -1
    return int(np.ceil(least - 1e-6)), int(np.floor(most + 1e-6))


@compiled
def line_height(c: np.ndarray, w: int, pu: int, pv: int) -> float:
    """Return where the grid line along axis w at (pu, pv) meets triangle c [3, 3], or NaN.

    Triangles that share an edge decide by the same number on which side of it the line runs.
    """
    u, v = (w + 1) % 3, (w + 2) % 3
    e0 = e1 = e2 = 0.0
    above = below = False
    for i in range(3):
        j = (i + 1) % 3
        a, b, swapped = i, j, False
        if c[j, u] < c[i, u] or (c[j, u] == c[i, u] and c[j, v] < c[i, v]):
            a, b, swapped = j, i, True
        e = (c[b, u] - c[a, u]) * (pv - c[a, v])
        e -= (c[b, v] - c[a, v]) * (pu - c[a, u])
        if (e >= 0.0) != swapped:
            above = True
        else:
            below = True
        e = -e if swapped else e
        e0, e1, e2 = e1, e2, e
    if above and below:
        return np.nan
    bottom, top = min(c[0, w], c[1, w], c[2, w]), max(c[0, w], c[1, w], c[2, w])
    total = e0 + e1 + e2
    if total == 0.0:
        return bottom
    height = (e1 * c[0, w] + e2 * c[1, w] + e0 * c[2, w]) / total
    return min(max(height, bottom), top)


@compiled
def _line_span(c: np.ndarray, w: int) -> tuple[int, int]:
    """Return the first and last u of the lines along axis w that may meet triangle c."""
    u, v = (w + 1) % 3, (w + 2) % 3
    area = (c[1, u] - c[0, u]) * (c[2, v] - c[0, v]) - (c[1, v] - c[0, v]) * (c[2, u] - c[0, u])
    if area == 0.0:
        return 0, -1
    low, high = min(c[0, u], c[1, u], c[2, u]), max(c[0, u], c[1, u], c[2, u])
    return int(np.ceil(low)), int(np.floor(high))


@compiled
def edge_crossings(
    corners: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (walls, odd, double) [3, B, 8] uint64: grid edges from a voxel to +axis, as masks.

    walls: crossed by a triangle; odd: by an odd number; double: by more than one. No way leads
    through a mesh without boundary, whatever its orientation. Where TIE makes a crossing block a
    second edge, that edge is in `walls` alone.
    """
    walls = np.zeros((3, count, BLOCK), np.uint64)
    single, odd, double = np.zeros_like(walls), np.zeros_like(walls), np.zeros_like(walls)
    voxel = np.empty(3, np.int64)
    for f in range(len(corners)):
        c = corners[f]
        for w in range(3):
            u, v = (w + 1) % 3, (w + 2) % 3
            first_u, last_u = _line_span(c, w)
            for pu in range(first_u, last_u + 1):
                first_v, last_v = _line_range(c, u, v, pu)
                for pv in range(first_v, last_v + 1):
                    height = line_height(c, w, pu, pv)
                    if np.isnan(height):
                        continue
                    voxel[u], voxel[v] = pu, pv
                    lower = int(np.floor(height - TIE))
                    voxel[w] = int(np.floor(height))
                    for again in range(2):
                        row = rows[voxel[0] >> 3, voxel[1] >> 3, voxel[2] >> 3]
                        x = voxel[0] & 7
                        bit = ONE << np.uint64((voxel[1] & 7) * 8 + (voxel[2] & 7))
                        if again == 0:
                            double[w, row, x] |= single[w, row, x] & bit
                            single[w, row, x] |= bit
                            odd[w, row, x] ^= bit
                        walls[w, row, x] |= bit
                        if lower == voxel[w] and int(np.floor(height + TIE)) == voxel[w]:
                            break
                        voxel[w] = lower if lower != voxel[w] else voxel[w] + 1
    return walls, odd, double


@compiled
def crossing_votes(
    corners: np.ndarray,
    rows: np.ndarray,
    outside: np.ndarray,
    solid: np.ndarray,
    double: np.ndarray,
    patches: np.ndarray,
    patch_count: int,
) -> np.ndarray:
    """Return [P, 2]: how many grid edges cross a patch alone between outside and outside, or solid.

    corners: [F, 3, 3] as they made `double`; patches: [F]; outside, solid: [B, 8] masks. Edges
    that end in a voxel of neither are not counted.
    """
    votes = np.zeros((patch_count, 2), np.int64)
    voxel = np.empty(3, np.int64)
    for f in range(len(corners)):
        c = corners[f]
        for w in range(3):
            u, v = (w + 1) % 3, (w + 2) % 3
            first_u, last_u = _line_span(c, w)
            for pu in range(first_u, last_u + 1):
                first_v, last_v = _line_range(c, u, v, pu)
                for pv in range(first_v, last_v + 1):
                    height = line_height(c, w, pu, pv)
                    if np.isnan(height):
                        continue
                    voxel[u], voxel[v], voxel[w] = pu, pv, int(np.floor(height))
                    if mask_at(double[w], rows, voxel[0], voxel[1], voxel[2]):
                        continue
                    free = full = 0
                    for _ in range(2):
                        x, y, z = voxel[0], voxel[1], voxel[2]
                        free += mask_at(outside, rows, x, y, z)
                        full += row_at(rows, x, y, z) >= 0 and mask_at(solid, rows, x, y, z)
                        voxel[w] += 1
                    if free == 2:
                        votes[patches[f], 0] += 1
                    elif free == 1 and full == 1:
                        votes[patches[f], 1] += 1
    return votes
