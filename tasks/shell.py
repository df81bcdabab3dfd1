"""The surface as seen from outside: hidden walls dropped, what is too thin made a shell.

Lengths are in voxels. Cells are named by their lower corner voxel. Sets of voxels and of cells are
masks (`tasks/masks.py`), [B, 8] uint64 for the B blocks whose place `rows` [side, side, side] tells
(negative: no block) and whose neighbours `neighbours` [B, 6] are.

Two kinds of thin surface become shells. A sheet is a patch of triangles that has the outside on
both sides wherever it is seen: all of it becomes a shell, joined with the rest as solids are, so
that it does not matter what lies close by. The thin places of other patches (plates under a voxel,
wires, the open parts of vessels) are found cell by cell.
"""

import numpy as np

from model.compiled import compiled
from model.sdf import BLOCK
from tasks.distance import block_distances, closest_on_triangle, line_height
from tasks.masks import (
    NONE,
    ONE,
    below,
    dilated,
    eroded,
    lowest,
    mask_at,
    row_at,
    shifted,
    voxels_of,
)
from tasks.sparse_common import BACKED, PLATE, SHELL


def solid_voxels(walls: np.ndarray, outside: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return the voxels of cells that lie inside with nothing between their corners.

    Voxels caught between two sheets, or between a sheet and a solid, are inside, but not solid.
    """
    cells = eroded(~outside, neighbours, (True,))
    for axis in range(3):
        others = ((axis + 1) % 3, (axis + 2) % 3)
        cells &= eroded(~walls[axis], neighbours, (True,), others)
    return dilated(cells, neighbours, (False,)) & ~outside


def sheet_faces(votes: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Return which faces [F] belong to sheets.

    votes: [P, 2], the edges across a patch with the outside at both ends, and at one (the other
    is solid).
    """
    sheet = (votes[:, 0] > 0) & (votes[:, 1] <= BACKED * votes[:, 0])
    return sheet[patches]


def drop_hidden(
    rows: np.ndarray,
    neighbours: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    walls: np.ndarray,
    outside: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
    reach: float,
) -> None:
    """Replace, in place, the distances of inside voxels near hidden walls by those to seen ones.

    Blocks with an edge that crosses a triangle between two inside voxels, and those around them,
    are done anew, layer by layer from the outside: a voxel tries the triangles of its 26
    neighbours. The closest point counts where its cell has a corner outside; else, at the crease
    where two parts meet, the neighbour's own closest point stands in (measured: 0.75 voxel
    too far at worst, 0.15 at the 99th percentile).
    """
    hidden = np.zeros_like(outside)
    for axis in range(3):
        covered = shifted(outside, neighbours, axis, True)
        covered |= outside
        np.invert(covered, out=covered)
        covered &= walls[axis]
        hidden |= covered
    del covered
    place = _around(rows, blocks, hidden.any(1), 1)
    if not place.any():
        return
    todo = np.where(place[:, None], ~outside, NONE)
    work = np.where(place, np.cumsum(place) - 1, -1)
    feet = np.empty((int(place.sum()), BLOCK, BLOCK, BLOCK, 3), np.float32)
    _forget(todo, distance, nearest, reach)
    touch = dilated(outside, neighbours, (True,))
    for _ in range(int(np.ceil(reach)) + 1):
        layer = todo & ~eroded(todo, neighbours, (False, True))
        _try_neighbours(
            rows, blocks, corners, outside, touch, todo, voxels_of(layer), work, feet,
            distance, nearest, reach,
        )  # fmt: skip
        todo &= ~layer


@compiled
def _around(rows: np.ndarray, blocks: np.ndarray, marked: np.ndarray, reach: int) -> np.ndarray:
    """Return the blocks [B] bool with a marked one within `reach` blocks along each axis."""
    found = np.zeros(len(blocks), np.bool_)
    for b in range(len(blocks)):
        if not marked[b]:
            continue
        for i in range(blocks[b, 0] - reach, blocks[b, 0] + reach + 1):
            for j in range(blocks[b, 1] - reach, blocks[b, 1] + reach + 1):
                for k in range(blocks[b, 2] - reach, blocks[b, 2] + reach + 1):
                    row = row_at(rows, i * BLOCK, j * BLOCK, k * BLOCK)
                    if row >= 0:
                        found[row] = True
    return found


@compiled
def _forget(todo: np.ndarray, distance: np.ndarray, nearest: np.ndarray, reach: float) -> None:
    """Set the voxels in `todo` to have no triangle within reach."""
    for b in range(len(todo)):
        for x in range(BLOCK):
            word = todo[b, x]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                distance[b, x, v >> 3, v & 7] = reach
                nearest[b, x, v >> 3, v & 7] = -1


@compiled
def _try_neighbours(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    outside: np.ndarray,
    touch: np.ndarray,
    todo: np.ndarray,
    layer: np.ndarray,
    work: np.ndarray,
    feet: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
    reach: float,
) -> None:
    """Give each voxel of the layer [N], by id, the best of its neighbours' closest points.

    feet [W, 8, 8, 8, 3]: the closest points of inside voxels, by work [B]; touch: the cells with a
    corner outside.
    """
    for n in range(len(layer)):
        b, inner = layer[n] >> 9, layer[n] & 511
        x = blocks[b, 0] * BLOCK + (inner >> 6)
        y = blocks[b, 1] * BLOCK + (inner >> 3 & 7)
        z = blocks[b, 2] * BLOCK + (inner & 7)
        best, which, last, seen = np.inf, -1, -1, False
        fx = fy = fz = tx = ty = tz = 0.0
        for m in range(27):
            i, j, k = x + m // 9 - 1, y + m // 3 % 3 - 1, z + m % 3 - 1
            row = row_at(rows, i, j, k)
            if row < 0 or mask_at(todo, rows, i, j, k):
                continue
            t = nearest[row, i & 7, j & 7, k & 7]
            if t < 0:
                continue
            if t != last:
                last = t
                tx, ty, tz = closest_on_triangle(x, y, z, corners[t])
                seen = mask_at(touch, rows, int(np.floor(tx)), int(np.floor(ty)), int(np.floor(tz)))
            qx, qy, qz = tx, ty, tz
            d = (x - qx) ** 2 + (y - qy) ** 2 + (z - qz) ** 2
            if d >= best:
                continue
            if not seen:
                if work[row] >= 0 and not mask_at(outside, rows, i, j, k):
                    foot = feet[work[row], i & 7, j & 7, k & 7]
                    qx, qy, qz = float(foot[0]), float(foot[1]), float(foot[2])
                else:
                    qx, qy, qz = closest_on_triangle(i, j, k, corners[t])
                d = (x - qx) ** 2 + (y - qy) ** 2 + (z - qz) ** 2
            if d < best:
                best, which, fx, fy, fz = d, t, qx, qy, qz
        foot = feet[work[b], x & 7, y & 7, z & 7]
        foot[0], foot[1], foot[2] = fx, fy, fz
        distance[b, x & 7, y & 7, z & 7] = min(best**0.5, reach)
        nearest[b, x & 7, y & 7, z & 7] = which


def weak_voxels(outside: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return the voxels outside, or inside with two inside neighbours at most.

    The few samples that a wire happens to catch are such: they represent no solid.
    """
    ones, twos, fours = (np.zeros_like(outside) for _ in range(3))  # a count, digit by digit
    for axis in range(3):
        for ahead in (False, True):
            inside = shifted(outside, neighbours, axis, ahead)
            np.invert(inside, out=inside)
            carry = ones & inside
            ones ^= inside
            fours |= twos & carry
            twos ^= carry
    del inside, carry
    return outside | ~(fours | twos & ones)


def thin_cells(
    rows: np.ndarray,
    neighbours: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    shifted_corners: np.ndarray,
    starts: np.ndarray,
    triangles: np.ndarray,
    patches: np.ndarray,
    sheet: np.ndarray,
    walls: np.ndarray,
    odd: np.ndarray,
    outside: np.ndarray,
    distance: np.ndarray,
    nearest: np.ndarray,
) -> np.ndarray:
    """Return the cells in which the surface, sheets left aside, has to be made a shell.

    shifted_corners: those that made the crossings walls and odd [3, B, 8], without sheets; starts,
    triangles: the candidates of each block; patches, sheet: [F].

    Beside the solid that it belongs to, a thin place is the sharp rim or a crack of that solid,
    and cut off as sampling does: it is excused, unless a thin cell that is not lies next to it.
    """
    weak = weak_voxels(outside, neighbours)
    empty = eroded(weak, neighbours, (True,))
    lonely = eroded(empty, neighbours, (False, True))  # no solid voxel within a voxel of it
    thin, excused = np.zeros_like(outside), np.zeros_like(outside)
    for axis in range(3):
        across = shifted(outside, neighbours, axis, True)
        across &= outside
        across &= walls[axis]
        _mark_edges(
            rows, blocks, shifted_corners, starts, triangles, sheet, across, odd[axis], axis,
            lonely, thin, excused,
        )  # fmt: skip
        del across
    # Farther voxels than a cell of the shell's surface has as corners don't count.
    near = below(distance, SHELL + 1.0)
    near &= outside
    _mark_feet(
        rows, blocks, corners, patches, sheet, near, nearest, weak, empty, lonely, thin, excused
    )
    del weak, empty, lonely, near
    for _ in range(2):  # excused cells lie up to two deep around an inside voxel
        thin |= excused & ~eroded(~thin, neighbours, (False, True))
    return thin


@compiled
def _is_plate(
    corners: np.ndarray,
    candidates: np.ndarray,
    sheet: np.ndarray,
    x: int,
    y: int,
    z: int,
    axis: int,
) -> bool:
    """Return whether the edge from voxel x, y, z to +axis passes between nearly parallel sides.

    They are the first and the last of the candidate triangles [N] that the edge crosses.
    """
    at = (x, y, z)
    u, v = (axis + 1) % 3, (axis + 2) % 3
    pu, pv, bottom = at[u], at[v], at[axis]
    low, high = np.inf, -np.inf
    lowest_one = highest_one = -1
    for t in candidates:
        c = corners[t]
        if min(c[0, u], c[1, u], c[2, u]) > pu or max(c[0, u], c[1, u], c[2, u]) < pu:
            continue
        if min(c[0, v], c[1, v], c[2, v]) > pv or max(c[0, v], c[1, v], c[2, v]) < pv:
            continue
        if sheet[t]:
            continue
        height = line_height(c, axis, pu, pv)
        if not bottom <= height <= bottom + 1:
            continue
        if height < low:
            low, lowest_one = height, t
        if height > high:
            high, highest_one = height, t
    if lowest_one == highest_one:
        return False
    # Turned to face each way along the edge, whatever their orientation: the sides of a plate then
    # face away from each other, those of a flat bump that the edge cuts off the same way.
    a, b = _normal(corners[lowest_one]), _normal(corners[highest_one])
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
def _mark(masks: np.ndarray, rows: np.ndarray, x: int, y: int, z: int) -> None:
    row = row_at(rows, x, y, z)
    if row >= 0:
        masks[row, x & 7] |= ONE << np.uint64((y & 7) * 8 + (z & 7))


@compiled
def _mark_edges(
    rows: np.ndarray,
    blocks: np.ndarray,
    shifted_corners: np.ndarray,
    starts: np.ndarray,
    triangles: np.ndarray,
    sheet: np.ndarray,
    across: np.ndarray,
    odd: np.ndarray,
    axis: int,
    lonely: np.ndarray,
    thin: np.ndarray,
    excused: np.ndarray,
) -> None:
    """Mark, in place, the cells around the edges `across` that have the outside at both ends.

    An odd number of crossings is an open surface; but with an inside voxel around, it may also
    be a crack along the rim of a solid. Two nearly parallel sides are a plate thinner than a
    voxel. Other even crossings cut off a sharp rim, as sampling does.
    """
    for b in range(len(blocks)):
        own = triangles[starts[b] : starts[b + 1]]
        for i in range(BLOCK):
            word = across[b, i]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                x = blocks[b, 0] * BLOCK + i
                y = blocks[b, 1] * BLOCK + (v >> 3)
                z = blocks[b, 2] * BLOCK + (v & 7)
                plate = odd[b, i] >> np.uint64(v) & ONE == NONE
                if plate and not _is_plate(shifted_corners, own, sheet, x, y, z, axis):
                    continue
                for m in range(4):
                    p, q = m >> 1, m & 1
                    cx = x - (p if axis != 0 else 0)
                    cy = y - (p if axis == 0 else q if axis == 2 else 0)
                    cz = z - (q if axis != 2 else 0)
                    if plate or mask_at(lonely, rows, cx, cy, cz):
                        _mark(thin, rows, cx, cy, cz)
                    else:
                        _mark(excused, rows, cx, cy, cz)


@compiled
def _mark_feet(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    patches: np.ndarray,
    sheet: np.ndarray,
    near: np.ndarray,
    nearest: np.ndarray,
    weak: np.ndarray,
    empty: np.ndarray,
    lonely: np.ndarray,
    thin: np.ndarray,
    excused: np.ndarray,
) -> None:
    """Mark, in place, the cells that the surface enters though none of their corners is solid.

    They are found as those of the closest points of outside voxels: wires, crumbs, the borders of
    open surfaces; and sharp rims, with a solid voxel of the same patch around.
    """
    for b in range(len(blocks)):
        for i in range(BLOCK):
            word = near[b, i]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                t = nearest[b, i, v >> 3, v & 7]
                if sheet[t]:
                    continue
                qx, qy, qz = closest_on_triangle(
                    blocks[b, 0] * BLOCK + i,
                    blocks[b, 1] * BLOCK + (v >> 3),
                    blocks[b, 2] * BLOCK + (v & 7),
                    corners[t],
                )
                x, y, z = int(np.floor(qx)), int(np.floor(qy)), int(np.floor(qz))
                if not mask_at(empty, rows, x, y, z) or mask_at(thin, rows, x, y, z):
                    continue
                if mask_at(lonely, rows, x, y, z):
                    _mark(thin, rows, x, y, z)
                elif _own_solid(rows, weak, nearest, patches, patches[t], x, y, z):
                    _mark(excused, rows, x, y, z)
                else:
                    _mark(thin, rows, x, y, z)


@compiled
def _own_solid(
    rows: np.ndarray,
    weak: np.ndarray,
    nearest: np.ndarray,
    patches: np.ndarray,
    patch: int,
    x: int,
    y: int,
    z: int,
) -> bool:
    """Return whether a solid voxel within a voxel of cell x, y, z is closest to a patch."""
    for i in range(x - 1, x + 3):
        for j in range(y - 1, y + 3):
            for k in range(z - 1, z + 3):
                if mask_at(weak, rows, i, j, k):
                    continue
                t = nearest[rows[i >> 3, j >> 3, k >> 3], i & 7, j & 7, k & 7]
                if t >= 0 and patches[t] == patch:
                    return True
    return False


def thicken(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    thin: np.ndarray,
    sheet: np.ndarray,
    nearest: np.ndarray,
    field: np.ndarray,
) -> None:
    """Lower the field, in place, by SHELL where the closest point lies in a thin cell."""
    # Closest points are up to 9 voxels away at 2048: in the second block.
    near = _around(rows, blocks, (thin != NONE).any(1), 2)
    _lower_field(rows, blocks, corners, thin, sheet, np.flatnonzero(near), nearest, field)


@compiled
def _lower_field(
    rows: np.ndarray,
    blocks: np.ndarray,
    corners: np.ndarray,
    thin: np.ndarray,
    sheet: np.ndarray,
    near: np.ndarray,
    nearest: np.ndarray,
    field: np.ndarray,
) -> None:
    for b in near:
        for x in range(BLOCK):
            for y in range(BLOCK):
                for z in range(BLOCK):
                    t = nearest[b, x, y, z]
                    if t < 0 or sheet[t]:
                        continue
                    px = blocks[b, 0] * BLOCK + x
                    py = blocks[b, 1] * BLOCK + y
                    pz = blocks[b, 2] * BLOCK + z
                    qx, qy, qz = closest_on_triangle(px, py, pz, corners[t])
                    cx, cy, cz = int(np.floor(qx)), int(np.floor(qy)), int(np.floor(qz))
                    if row_at(rows, cx, cy, cz) >= 0 and mask_at(thin, rows, cx, cy, cz):
                        field[b, x, y, z] -= SHELL


def join_sheets(
    blocks: np.ndarray,
    corners: np.ndarray,
    starts: np.ndarray,
    triangles: np.ndarray,
    sheet: np.ndarray,
    field: np.ndarray,
    reach: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Join, in place, the field with the shells of sheets: the lesser of the two.

    Returns the blocks [M] near sheets and other surfaces, and the sheets' triangles that are
    nearest to their voxels [M, 8, 8, 8], or -1.
    """
    few, more, chosen, chosen_starts = _sheet_candidates(starts, triangles, sheet)
    field[few] = np.minimum(field[few], np.abs(field[few]) - np.float32(SHELL))
    distance, nearest = block_distances(corners, blocks[more], chosen_starts, chosen, reach)
    field[more] = np.minimum(field[more], distance - np.float32(SHELL))
    return more, nearest


@compiled
def _sheet_candidates(
    starts: np.ndarray, triangles: np.ndarray, sheet: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return blocks near sheets only, blocks near others too, and the latter's sheet candidates."""
    pure, mixed = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
    chosen = np.empty_like(triangles)
    chosen_starts = np.zeros(len(starts) + 1, np.int64)
    pures = mixes = at = 0
    for b in range(len(starts) - 1):
        before = at
        for t in triangles[starts[b] : starts[b + 1]]:
            if sheet[t]:
                chosen[at] = t
                at += 1
        if at == before:
            continue
        if at - before == starts[b + 1] - starts[b]:
            pure[pures] = b
            pures += 1
            at = before
        else:
            mixed[mixes] = b
            mixes += 1
            chosen_starts[mixes] = at
    return pure[:pures], mixed[:mixes], chosen[:at], chosen_starts[: mixes + 1]


def bound_corners(neighbours: np.ndarray, field: np.ndarray) -> None:
    """Bring corners of cells that the surface crosses, in place, to at most sqrt(3) from zero.

    They are no farther from it. Without this, where a shell ends beside a surface that is none,
    a corner could lie outside the band, its block be left out, and the surface be open.
    """
    inside = below(field, 0.0)
    crossed = ~eroded(inside, neighbours, (True,)) & ~eroded(~inside, neighbours, (True,))
    _clip(field, ~eroded(~crossed, neighbours, (False,)), np.float32(3**0.5))


@compiled
def _clip(field: np.ndarray, masks: np.ndarray, most: float) -> None:
    """Bring the field's voxels in the set to [-most, most], in place."""
    for b in range(len(masks)):
        for x in range(BLOCK):
            word = masks[b, x]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                value = field[b, x, v >> 3, v & 7]
                field[b, x, v >> 3, v & 7] = min(max(value, -most), most)


def cap_holes(
    rows: np.ndarray,
    neighbours: np.ndarray,
    blocks: np.ndarray,
    walls: np.ndarray,
    outside: np.ndarray,
    field: np.ndarray,
) -> None:
    """Bring the surface, in place, halfway between an inside and an outside voxel of no wall.

    Between them lies what closes a hole: no triangle, so their distances tell nothing.
    """
    for axis in range(3):
        open_ = (outside ^ shifted(outside, neighbours, axis, True)) & ~walls[axis]
        _cap_edges(rows, blocks, voxels_of(open_), axis, field)


@compiled
def _cap_edges(
    rows: np.ndarray, blocks: np.ndarray, voxels: np.ndarray, axis: int, field: np.ndarray
) -> None:
    for id_ in voxels:
        b, x, y, z = id_ >> 9, id_ >> 6 & 7, id_ >> 3 & 7, id_ & 7
        i = blocks[b, 0] * BLOCK + x + (axis == 0)
        j = blocks[b, 1] * BLOCK + y + (axis == 1)
        k = blocks[b, 2] * BLOCK + z + (axis == 2)
        row = row_at(rows, i, j, k)
        if row < 0:
            continue
        field[b, x, y, z] = min(max(field[b, x, y, z], -0.5), 0.5)
        other = field[row, i & 7, j & 7, k & 7]
        field[row, i & 7, j & 7, k & 7] = min(max(other, -0.5), 0.5)


@compiled
def nearest_parts(masks: np.ndarray, nearest: np.ndarray, part_of_face: np.ndarray) -> np.ndarray:
    """Return which parts [P] bool are closest to one of the voxels of a set."""
    found = np.zeros(part_of_face.max() + 1, np.bool_)
    for b in range(len(masks)):
        for x in range(BLOCK):
            word = masks[b, x]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                t = nearest[b, x, v >> 3, v & 7]
                if t >= 0:
                    found[part_of_face[t]] = True
    return found


def surface_voxels(neighbours: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Return the voxels that end an edge on which the field changes its sign."""
    inside = below(field, 0.0)
    ends = np.zeros_like(inside)
    for axis in range(3):
        for ahead in (False, True):
            # What is not there changes no sign: it counts as set, whichever mask is asked.
            ends |= inside & ~shifted(inside, neighbours, axis, ahead)
            ends |= ~inside & ~shifted(~inside, neighbours, axis, ahead)
    return ends
