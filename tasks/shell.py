"""The surface as seen from outside: hidden walls dropped, what is too thin made a shell (compiled).

Lengths are in voxels. Cells are named by their lower corner voxel; everything is looked up by
voxel position through `rows` [side, side, side], the row of each block or a negative number.
"""

import numpy as np

from model.compiled import compiled
from model.sdf import BLOCK
from tasks.distance import closest_on_triangle

# Half the thickness of a shell. Over half a voxel, so that every grid edge across a sheet has an
# end in the shell; over sqrt(1/2), so that a wire has one too; under one: two voxels at most.
SHELL = 0.75
THIN, EXCUSED = 1, 2
# Cosine from which two sides count as those of a plate: wedges up to 32 degrees.
PLATE = 0.85


@compiled
def _row(rows: np.ndarray, x: int, y: int, z: int) -> int:
    side = rows.shape[0] * BLOCK
    if x < 0 or y < 0 or z < 0 or x >= side or y >= side or z >= side:
        return -1
    return rows[x >> 3, y >> 3, z >> 3]


@compiled
def _outside_at(rows: np.ndarray, outside: np.ndarray, x: int, y: int, z: int) -> bool:
    row = _row(rows, x, y, z)
    return row < 0 or outside[row, x & 7, y & 7, z & 7]


@compiled
def _all_outside(
    rows: np.ndarray, outside: np.ndarray, x: int, y: int, z: int, low: int, high: int
) -> bool:
    """Return whether the voxels x + low .. x + high (both included, each axis) are outside."""
    for i in range(x + low, x + high + 1):
        for j in range(y + low, y + high + 1):
            for k in range(z + low, z + high + 1):
                if not _outside_at(rows, outside, i, j, k):
                    return False
    return True


@compiled
def drop_hidden(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    crossings: np.ndarray,
    outside: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
    reach: float,
) -> int:
    """Replace, in place, the distances of inside voxels near hidden walls by those to seen ones.

    Blocks with an edge that crosses a triangle between two inside voxels, and those around them,
    are done anew, layer by layer from the outside: a voxel tries the triangles of its 26
    neighbours. The closest point counts where its cell has a corner outside; else, at the crease
    where two parts meet, the neighbour's own closest point stands in (measured: 0.75 voxel
    too far at worst, 0.15 at the 99th percentile). Returns the number of blocks done.
    """
    count = len(blocks)
    hides = np.zeros(count, np.bool_)
    for b in range(count):
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    if outside[b, x, y, z]:
                        continue
                    for axis in range(3):
                        if crossings[b, x, y, z, axis] and not _outside_at(
                            rows, outside,
                            blocks[b, 0] * BLOCK + x + (axis == 0),
                            blocks[b, 1] * BLOCK + y + (axis == 1),
                            blocks[b, 2] * BLOCK + z + (axis == 2),
                        ):  # fmt: skip
                            hides[b] = True
    place = np.full(count, -1, np.int64)
    work = 0
    for b in range(count):
        found = False
        for n in range(27):
            x, y, z = (
                blocks[b, 0] + n // 9 - 1,
                blocks[b, 1] + n // 3 % 3 - 1,
                blocks[b, 2] + n % 3 - 1,
            )
            row = _row(rows, x * BLOCK, y * BLOCK, z * BLOCK)
            found |= row >= 0 and hides[row]
        if found:
            place[b] = work
            work += 1
    feet = np.empty((work, BLOCK, BLOCK, BLOCK, 3), np.float32)
    todo = np.zeros((count, BLOCK, BLOCK, BLOCK), np.bool_)
    waiting = np.empty((work * BLOCK**3, 3), np.int32)
    left = 0
    for b in range(count):
        if place[b] < 0:
            continue
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    if not outside[b, x, y, z]:
                        todo[b, x, y, z] = True
                        distance[b, x, y, z] = reach
                        nearest[b, x, y, z] = -1
                        waiting[left, 0] = blocks[b, 0] * BLOCK + x
                        waiting[left, 1] = blocks[b, 1] * BLOCK + y
                        waiting[left, 2] = blocks[b, 2] * BLOCK + z
                        left += 1
    layer = np.empty_like(waiting)
    for _ in range(int(np.ceil(reach)) + 1):
        kept = size = 0
        for n in range(left):
            x, y, z = waiting[n]
            found = False
            for m in range(27):
                i, j, k = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
                row = _row(rows, i, j, k)
                if row >= 0 and not todo[row, i & 7, j & 7, k & 7]:
                    found = True
                    break
            if found:
                layer[size] = waiting[n]
                size += 1
            else:
                waiting[kept] = waiting[n]
                kept += 1
        left = kept
        for n in range(size):
            x, y, z = layer[n]
            best, which = np.inf, -1
            fx = fy = fz = 0.0
            for m in range(27):
                i, j, k = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
                row = _row(rows, i, j, k)
                if row < 0 or todo[row, i & 7, j & 7, k & 7]:
                    continue
                t = nearest[row, i & 7, j & 7, k & 7]
                if t < 0:
                    continue
                qx, qy, qz = closest_on_triangle(x, y, z, corners[t])
                cx, cy, cz = int(np.floor(qx)), int(np.floor(qy)), int(np.floor(qz))
                d = ((x - qx) ** 2 + (y - qy) ** 2 + (z - qz) ** 2) ** 0.5
                if d >= best:
                    continue
                if not _touches_outside(rows, outside, cx, cy, cz):
                    if not outside[row, i & 7, j & 7, k & 7] and place[row] >= 0:
                        foot = feet[place[row], i & 7, j & 7, k & 7]
                        qx, qy, qz = float(foot[0]), float(foot[1]), float(foot[2])
                    else:
                        qx, qy, qz = closest_on_triangle(i, j, k, corners[t])
                    d = ((x - qx) ** 2 + (y - qy) ** 2 + (z - qz) ** 2) ** 0.5
                if d < best:
                    best, which, fx, fy, fz = d, t, qx, qy, qz
            b = rows[x >> 3, y >> 3, z >> 3]
            foot = feet[place[b], x & 7, y & 7, z & 7]
            foot[0], foot[1], foot[2] = fx, fy, fz
            distance[b, x & 7, y & 7, z & 7] = min(best, reach)
            nearest[b, x & 7, y & 7, z & 7] = which
        for n in range(size):
            x, y, z = layer[n]
            todo[rows[x >> 3, y >> 3, z >> 3], x & 7, y & 7, z & 7] = False
    return work


@compiled
def _touches_outside(rows: np.ndarray, outside: np.ndarray, x: int, y: int, z: int) -> bool:
    for c in range(8):
        if _outside_at(rows, outside, x + (c >> 2), y + (c >> 1 & 1), z + (c & 1)):
            return True
    return False


@compiled
def _is_plate(
    corners: np.ndarray, candidates: np.ndarray, x: int, y: int, z: int, axis: int
) -> bool:
    """Return whether the edge from voxel x, y, z to +axis passes between nearly parallel sides.

    They are the first and the last of the candidate triangles [N] that the edge crosses.
    """
    at = (x, y, z)
    u, v = (axis + 1) % 3, (axis + 2) % 3
    pu, pv, bottom = at[u], at[v], at[axis]
    low, high = np.inf, -np.inf
    lowest = highest = -1
    for t in candidates:
        c = corners[t]
        if min(c[0, u], c[1, u], c[2, u]) > pu or max(c[0, u], c[1, u], c[2, u]) < pu:
            continue
        if min(c[0, v], c[1, v], c[2, v]) > pv or max(c[0, v], c[1, v], c[2, v]) < pv:
            continue
        e0 = (c[1, u] - c[0, u]) * (pv - c[0, v]) - (c[1, v] - c[0, v]) * (pu - c[0, u])
        e1 = (c[2, u] - c[1, u]) * (pv - c[1, v]) - (c[2, v] - c[1, v]) * (pu - c[1, u])
        e2 = (c[0, u] - c[2, u]) * (pv - c[2, v]) - (c[0, v] - c[2, v]) * (pu - c[2, u])
        if (e0 >= 0) != (e1 >= 0) or (e1 >= 0) != (e2 >= 0) or e0 + e1 + e2 == 0:
            continue
        height = (e1 * c[0, axis] + e2 * c[1, axis] + e0 * c[2, axis]) / (e0 + e1 + e2)
        if not bottom <= height <= bottom + 1:
            continue
        if height < low:
            low, lowest = height, t
        if height > high:
            high, highest = height, t
    if lowest == highest:
        return False
    # Turned to face each way along the edge, whatever their orientation: the sides of a plate then
    # face away from each other, those of a flat bump that the edge cuts off the same way.
    a, b = _normal(corners[lowest]), _normal(corners[highest])
    facing = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return (facing if a[axis] * b[axis] < 0 else -facing) < -PLATE


@compiled
def _normal(c: np.ndarray) -> tuple[float, float, float]:
    ux, uy, uz = c[1, 0] - c[0, 0], c[1, 1] - c[0, 1], c[1, 2] - c[0, 2]
    vx, vy, vz = c[2, 0] - c[0, 0], c[2, 1] - c[0, 1], c[2, 2] - c[0, 2]
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = max((x * x + y * y + z * z) ** 0.5, 1e-300)
    return x / length, y / length, z / length


@compiled
def _mark_cell(
    rows: np.ndarray, weak: np.ndarray, cells: np.ndarray, x: int, y: int, z: int, sure: bool
) -> None:
    """Mark a cell THIN, or EXCUSED where a solid voxel lies within a voxel of it, unless sure."""
    row = _row(rows, x, y, z)
    if row < 0 or cells[row, x & 7, y & 7, z & 7] == THIN:
        return
    thin = sure or _all_outside(rows, weak, x, y, z, -1, 2)
    cells[row, x & 7, y & 7, z & 7] = THIN if thin else EXCUSED


@compiled
def weak_voxels(rows: np.ndarray, blocks: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Return the voxels [B, 8, 8, 8] outside, or inside with two inside neighbours at most.

    The few samples that a wire happens to catch are such: they represent no solid.
    """
    weak = outside.copy()
    for b in range(len(blocks)):
        x0, y0, z0 = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
        for x in range(x0, x0 + BLOCK):
            for y in range(y0, y0 + BLOCK):
                for z in range(z0, z0 + BLOCK):
                    if outside[b, x & 7, y & 7, z & 7]:
                        continue
                    found = 0
                    for axis in range(3):
                        i, j, k = int(axis == 0), int(axis == 1), int(axis == 2)
                        found += not _outside_at(rows, outside, x + i, y + j, z + k)
                        found += not _outside_at(rows, outside, x - i, y - j, z - k)
                    weak[b, x & 7, y & 7, z & 7] = found <= 2
    return weak


@compiled
def thin_edges(
    rows: np.ndarray,
    blocks: np.ndarray,
    shifted: np.ndarray,
    starts: np.ndarray,
    triangles: np.ndarray,
    crossings: np.ndarray,
    outside: np.ndarray,
    weak: np.ndarray,
    cells: np.ndarray,
) -> None:
    """Mark, in place, the cells around edges that cross the mesh between two outside voxels.

    An odd number of crossings is an open sheet; but with an inside voxel around, it may also be a
    crack along the rim of a solid. Two nearly parallel sides are a plate thinner than a voxel.
    Other even crossings cut off a sharp rim, as sampling does. shifted: the corners that made the
    crossings; starts, triangles: the candidates of each block.
    """
    for b in range(len(blocks)):
        x0, y0, z0 = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
        own = triangles[starts[b] : starts[b + 1]]
        for x in range(x0, x0 + BLOCK):
            for y in range(y0, y0 + BLOCK):
                for z in range(z0, z0 + BLOCK):
                    if not outside[b, x & 7, y & 7, z & 7]:
                        continue
                    for axis in range(3):
                        crossed = crossings[b, x & 7, y & 7, z & 7, axis]
                        if not crossed or not _outside_at(
                            rows, outside, x + (axis == 0), y + (axis == 1), z + (axis == 2)
                        ):
                            continue
                        plate = not crossed & 1
                        if plate and not _is_plate(shifted, own, x, y, z, axis):
                            continue
                        for m in range(4):
                            p, q = m >> 1, m & 1
                            i = x - (p if axis != 0 else 0)
                            j = y - (p if axis == 0 else q if axis == 2 else 0)
                            k = z - (q if axis != 2 else 0)
                            _mark_cell(rows, weak, cells, i, j, k, plate)


@compiled
def thin_feet(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    outside: np.ndarray,
    weak: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
    cells: np.ndarray,
) -> None:
    """Mark, in place, the cells that the surface enters though none of their corners is solid.

    They are found as those of the closest points of outside voxels: wires, crumbs, the borders of
    sheets; with a solid voxel around, sharp rims of solids.
    """
    for b in range(len(blocks)):
        x0, y0, z0 = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
        for x in range(x0, x0 + BLOCK):
            for y in range(y0, y0 + BLOCK):
                for z in range(z0, z0 + BLOCK):
                    i, j, k = x & 7, y & 7, z & 7
                    # Farther voxels than a cell of the shell's surface has as corners don't count.
                    if not outside[b, i, j, k] or distance[b, i, j, k] >= SHELL + 1.0:
                        continue
                    qx, qy, qz = closest_on_triangle(x, y, z, corners[nearest[b, i, j, k]])
                    i, j, k = int(np.floor(qx)), int(np.floor(qy)), int(np.floor(qz))
                    if _all_outside(rows, weak, i, j, k, 0, 1):
                        _mark_cell(rows, weak, cells, i, j, k, False)


@compiled
def settle_excused(rows: np.ndarray, blocks: np.ndarray, cells: np.ndarray) -> None:
    """Make thin, in place, the excused cells next to thin ones: there a sheet meets a solid."""
    for _ in range(2):  # excused cells lie up to two deep around an inside voxel
        before = cells.copy()
        for b in range(len(blocks)):
            x0, y0, z0 = blocks[b, 0] * BLOCK, blocks[b, 1] * BLOCK, blocks[b, 2] * BLOCK
            for x in range(x0, x0 + BLOCK):
                for y in range(y0, y0 + BLOCK):
                    for z in range(z0, z0 + BLOCK):
                        if before[b, x & 7, y & 7, z & 7] != EXCUSED:
                            continue
                        for m in range(27):
                            i, j, k = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
                            row = _row(rows, i, j, k)
                            if row >= 0 and before[row, i & 7, j & 7, k & 7] == THIN:
                                cells[b, x & 7, y & 7, z & 7] = THIN


@compiled
def thicken(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    cells: np.ndarray,
    nearest: np.ndarray,
    field: np.ndarray,
) -> None:
    """Lower the field, in place, by SHELL where the closest point lies in a thin cell."""
    holds = np.zeros(len(blocks), np.bool_)
    for b in range(len(blocks)):
        holds[b] = np.any(cells[b] == THIN)
    for b in range(len(blocks)):
        near = False
        for n in range(125):  # closest points are up to 9 voxels away at 2048
            i = blocks[b, 0] + n // 25 - 2
            j = blocks[b, 1] + n // 5 % 5 - 2
            k = blocks[b, 2] + n % 5 - 2
            row = _row(rows, i * BLOCK, j * BLOCK, k * BLOCK)
            near |= row >= 0 and holds[row]
        if not near:
            continue
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    t = nearest[b, x, y, z]
                    if t < 0:
                        continue
                    px = blocks[b, 0] * BLOCK + x
                    py = blocks[b, 1] * BLOCK + y
                    pz = blocks[b, 2] * BLOCK + z
                    qx, qy, qz = closest_on_triangle(px, py, pz, corners[t])
                    cx, cy, cz = int(np.floor(qx)), int(np.floor(qy)), int(np.floor(qz))
                    row = _row(rows, cx, cy, cz)
                    if row >= 0 and cells[row, cx & 7, cy & 7, cz & 7] == THIN:
                        field[b, x, y, z] -= SHELL


@compiled
def cap_holes(
    rows: np.ndarray,
    blocks: np.ndarray,
    crossings: np.ndarray,
    outside: np.ndarray,
    field: np.ndarray,
) -> None:
    """Bring the surface, in place, halfway between an inside and an outside voxel of no wall.

    Between them lies what closes a hole: no triangle, so their distances tell nothing.
    """
    for b in range(len(blocks)):
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    for axis in range(3):
                        if crossings[b, x, y, z, axis]:
                            continue
                        i = blocks[b, 0] * BLOCK + x + (axis == 0)
                        j = blocks[b, 1] * BLOCK + y + (axis == 1)
                        k = blocks[b, 2] * BLOCK + z + (axis == 2)
                        row = _row(rows, i, j, k)
                        if row < 0 or outside[row, i & 7, j & 7, k & 7] == outside[b, x, y, z]:
                            continue
                        field[b, x, y, z] = min(max(field[b, x, y, z], -0.5), 0.5)
                        other = field[row, i & 7, j & 7, k & 7]
                        field[row, i & 7, j & 7, k & 7] = min(max(other, -0.5), 0.5)


@compiled
def seen_parts(
    rows: np.ndarray,
    blocks: np.ndarray,
    part_of_face: np.ndarray,
    part_count: int,
    outside: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
    field: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (seen [P], found [P]): parts closest to an outside voxel; parts at the surface.

    At the surface: one end of an edge on which the field changes its sign is closest to the part.
    """
    seen = np.zeros(part_count, np.bool_)
    found = np.zeros(part_count, np.bool_)
    for b in range(len(blocks)):
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    t = nearest[b, x, y, z]
                    if t >= 0 and outside[b, x, y, z] and distance[b, x, y, z] < 1.0:
                        seen[part_of_face[t]] = True
                    for axis in range(3):
                        i = blocks[b, 0] * BLOCK + x + (axis == 0)
                        j = blocks[b, 1] * BLOCK + y + (axis == 1)
                        k = blocks[b, 2] * BLOCK + z + (axis == 2)
                        row = _row(rows, i, j, k)
                        if row < 0:
                            continue
                        if (field[row, i & 7, j & 7, k & 7] < 0) == (field[b, x, y, z] < 0):
                            continue
                        s = nearest[row, i & 7, j & 7, k & 7]
                        if t >= 0:
                            found[part_of_face[t]] = True
                        if s >= 0:
                            found[part_of_face[s]] = True
    return seen, found
