"""Which voxels are outside: a flood over sparse blocks, and winding numbers where it leaks.

The flood starts at the border of the grid and walks from voxel to voxel where no triangle crosses
the edge between them. It cannot pass a mesh without boundary, and needs no orientation; what it
does not reach is inside, so whatever is hidden from outside becomes solid. It leaks through holes
and cracks: what it reaches only through a place narrower than 2 CLEARANCE voxels is a pocket, and
the winding number says whether that pocket is inside. Where this fails: an opening of three voxels
or more lets the outside in (the walls become shells, see `tasks/shell.py`); a pocket of a mesh in
pieces, none of which surrounds it and whose orientations cancel, is taken for outside.
"""

import igl
import numpy as np
from scipy import ndimage

from model.compiled import compiled
from model.sdf import BLOCK

# A place is wide when it holds a voxel farther than this from every triangle, in voxels.
CLEARANCE = 1.5
# Steps from a wide place within which a voxel belongs to it. Into the corner of three walls it
# takes five.
STEPS = 6
# Pockets of fewer voxels are crevices, and outside, without a question asked.
SMALL_POCKET = 32
SAMPLES = 4  # a pocket
# A pocket is inside from this winding number on: beside an open sheet it is one half.
SURE = 0.75
# Solid angles to compute at most, some 2 s: past it the smaller pockets are not asked about.
SOLID_ANGLES = 100_000_000

UNREACHED, WIDE, POCKET = 0, 1, 100  # 1 + n: n steps from a wide place; from 100: the pockets
INSIDE, CONTESTED = -1, -2
BEYOND = -(2**31)  # "row" of a neighbour beyond the grid; other negatives are far regions


@compiled
def _spread(
    neighbours: np.ndarray,
    faces: np.ndarray,
    starts: np.ndarray,
    crossings: np.ndarray,
    distance: np.ndarray,
    state: np.ndarray,
    far: np.ndarray,
    frontier: np.ndarray,
    low: int,
    high: int,
    label: int,
    least: float,
    steps: int,
    low_step: int,
    label_step: int,
) -> np.ndarray:
    """Label what can be reached from the frontier and has a state in [low, high].

    neighbours: [B, 6] rows (-x, +x, -y, ...), or -1 - region for a far region, or BEYOND.
    faces, starts: (row, side) [N, 2] of the block faces that touch each far region. crossings
    [B * 512, 3], distance and state [B * 512], far [regions]: flat. Voxels nearer to a triangle
    than least are not entered. After each of the steps low and label grow by their steps.
    Returns the ids of the voxels that were labelled.
    """
    queue = np.empty(max(1024, 2 * len(frontier)), np.int32)
    queue[: len(frontier)] = frontier
    begin, count = 0, len(frontier)
    for _ in range(steps):
        end = count
        if begin == end:
            break
        for place in range(begin, end):
            voxel = queue[place]
            row, inner = voxel >> 9, voxel & 511
            if count + 4096 > len(queue):
                grown = np.empty(2 * len(queue) + 4096, np.int32)
                grown[:count] = queue[:count]
                queue = grown
            for direction in range(6):
                axis, ahead = direction >> 1, direction & 1
                shift = 6 - 3 * axis
                at = inner >> shift & 7
                if ahead and at < 7:
                    other = voxel + (1 << shift)
                elif not ahead and at > 0:
                    other = voxel - (1 << shift)
                else:
                    next_row = neighbours[row, direction]
                    if next_row == BEYOND:
                        continue
                    if next_row < 0:
                        region = -1 - next_row
                        if not low <= far[region] <= high:
                            continue
                        far[region] = label
                        for n in range(starts[region], starts[region + 1]):
                            side = faces[n, 1]
                            turn = 6 - 3 * (side >> 1)
                            if count + 4096 > len(queue):
                                grown = np.empty(2 * len(queue) + 4096, np.int32)
                                grown[:count] = queue[:count]
                                queue = grown
                            for v in range(512):
                                if v >> turn & 7 != 7 * (side & 1):
                                    continue
                                id_ = faces[n, 0] * 512 + v
                                if low <= state[id_] <= high and distance[id_] >= least:
                                    state[id_] = label
                                    queue[count] = id_
                                    count += 1
                        continue
                    other = next_row * 512 + inner + ((-7 if ahead else 7) << shift)
                if not low <= state[other] <= high or distance[other] < least:
                    continue
                if crossings[voxel if ahead else other, axis] != 0:
                    continue
                state[other] = label
                queue[count] = other
                count += 1
        begin = end
        low += low_step
        label += label_step
    return queue[len(frontier) : count].copy()


@compiled
def _label_pockets(
    neighbours: np.ndarray,
    faces: np.ndarray,
    starts: np.ndarray,
    crossings: np.ndarray,
    distance: np.ndarray,
    state: np.ndarray,
    far: np.ndarray,
    frontier: np.ndarray,
    samples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Give each pocket beyond the frontier a state; return sizes [P] and voxel ids [P, samples].

    The first sample is the voxel farthest from the mesh, the others lie along the way.
    """
    sizes = [0 for _ in range(0)]
    chosen = [0 for _ in range(0)]
    for i in range(len(frontier)):
        reached = _spread(
            neighbours, faces, starts, crossings, distance, state, far,
            frontier[i : i + 1], 0, 0, 100 + len(sizes), 0.0, 1 << 60, 0, 0,
        )  # fmt: skip
        if len(reached) == 0:
            continue
        sizes.append(len(reached))
        chosen.append(reached[np.argmax(distance[reached])])
        chosen.extend([reached[len(reached) * k // samples] for k in range(1, samples)])
    return np.array(sizes), np.array(chosen).reshape(-1, samples)


@compiled
def winding_numbers(
    corners: np.ndarray, patches: np.ndarray, turns: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum over all triangles [S], greatest absolute sum of a patch [S]) at points [S, 3].

    corners: [F, 3, 3]; patches: [F]; turns: [F], -1 for a triangle to be turned round in its
    patch's sum. Solid angles by van Oosterom and Strackee (1983).
    """
    total, strongest = np.zeros(len(points)), np.zeros(len(points))
    sums = np.zeros(np.max(patches) + 1)
    for s in range(len(points)):
        sums[:] = 0.0
        px, py, pz = points[s, 0], points[s, 1], points[s, 2]
        for f in range(len(corners)):
            c = corners[f]
            ax, ay, az = c[0, 0] - px, c[0, 1] - py, c[0, 2] - pz
            bx, by, bz = c[1, 0] - px, c[1, 1] - py, c[1, 2] - pz
            cx, cy, cz = c[2, 0] - px, c[2, 1] - py, c[2, 2] - pz
            la = (ax * ax + ay * ay + az * az) ** 0.5
            lb = (bx * bx + by * by + bz * bz) ** 0.5
            lc = (cx * cx + cy * cy + cz * cz) ** 0.5
            volume = ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)
            base = la * lb * lc + (ax * bx + ay * by + az * bz) * lc
            base += (bx * cx + by * cy + bz * cz) * la + (cx * ax + cy * ay + cz * az) * lb
            share = np.arctan2(volume, base) / (2 * np.pi)
            total[s] += share
            sums[patches[f]] += turns[f] * share
        strongest[s] = np.max(np.abs(sums))
    return total, strongest


def outside_voxels(
    corners: np.ndarray,
    faces: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    distance: np.ndarray,
    crossings: np.ndarray,
) -> tuple[np.ndarray, float | None]:
    """Return which voxels are outside, [B, 8, 8, 8] bool, and how sure the winding numbers were.

    corners: [F, 3, 3] in voxels; faces: [F, 3] welded; rows: [side, side, side] int32, the row of
    each block of `blocks` [B, 3] or -1; distance: [B, 8, 8, 8], at least CLEARANCE where a block
    is absent; crossings: [B, 8, 8, 8, 3].

    The second result is None when no pocket was in doubt; else the mean over the voxels asked
    about of how far the winding number lay from SURE (0: undecided, 1: certain).
    """
    side = len(rows)
    regions, region_count = ndimage.label(rows < 0)
    links = np.where(rows < 0, -regions, rows)
    links = np.pad(links, 1, constant_values=BEYOND).astype(np.int32)
    steps = np.array([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])
    around = blocks[:, None] + 1 + steps
    neighbours = links[around[..., 0], around[..., 1], around[..., 2]]
    touching = np.argwhere((neighbours < 0) & (neighbours != BEYOND)).astype(np.int32)
    region_of = -1 - neighbours[touching[:, 0], touching[:, 1]]
    touching = touching[np.argsort(region_of, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(region_of, minlength=region_count))])
    flat = distance.reshape(-1)
    state = np.zeros(flat.shape, np.int32)
    far = np.zeros(region_count, np.int32)
    tables = (neighbours, touching, starts, crossings.reshape(-1, 3), flat, state, far)

    border = _border_voxels(blocks, side)
    edge_regions = np.unique([regions[s] for axis in range(3) for s in _end_slices(axis)])
    far[edge_regions[edge_regions > 0] - 1] = WIDE
    seen = far[region_of[np.argsort(region_of, kind="stable")]] == WIDE
    by_far = _face_voxels(touching[seen])
    by_far = by_far[flat[by_far] >= CLEARANCE]
    seeds = np.unique(np.concatenate([border, by_far])).astype(np.int32)
    state[seeds] = WIDE
    _spread(*tables, seeds, UNREACHED, UNREACHED, WIDE, CLEARANCE, 1 << 60, 0, 0)
    near = np.flatnonzero((state == WIDE) & (flat < CLEARANCE + 1)).astype(np.int32)
    _spread(*tables, near, UNREACHED, UNREACHED, WIDE + 1, 0.0, STEPS, 0, 1)

    frontier = np.flatnonzero(state == WIDE + STEPS).astype(np.int32)
    sizes, samples = _label_pockets(*tables, frontier, SAMPLES)
    asked = np.flatnonzero(sizes >= SMALL_POCKET)
    asked = asked[np.argsort(-sizes[asked], kind="stable")]
    asked = asked[: max(4, SOLID_ANGLES // (SAMPLES * len(faces)))]
    confidence = None
    if len(asked):
        surface = (corners, *_oriented_patches(faces))
        evidence = _evidence(*surface, _positions(samples[asked].reshape(-1), blocks))
        score = np.median(evidence.reshape(-1, SAMPLES), 1)
        margin = np.abs(score - SURE) / np.where(score < SURE, SURE, 1 - SURE)
        confidence = float(np.average(margin, weights=sizes[asked]))
        inside = np.flatnonzero(np.isin(state, POCKET + asked[score >= SURE])).astype(np.int32)
        state[inside] = INSIDE
        steps_out = state.copy()
        between = (WIDE + 1, WIDE + STEPS)
        contested = _spread(*tables, inside, *between, CONTESTED, 0.0, STEPS, 0, 0)
        if len(contested) * len(faces) <= SOLID_ANGLES:
            taken = _evidence(*surface, _positions(contested, blocks)) >= 0.5
            state[contested] = np.where(taken, INSIDE, WIDE)
        else:  # outside and pocket share what lies between them by who is nearer
            state[:] = steps_out
            _spread(*tables, inside, WIDE + 2, WIDE + STEPS, INSIDE, 0.0, STEPS, 1, 0)
    return (state > UNREACHED).reshape(distance.shape), confidence


def _evidence(
    corners: np.ndarray, patches: np.ndarray, turns: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Return how much speaks for points [S, 3] to be inside, in [0, 1]: one half decides.

    A patch that surrounds the point by itself; or all of them together, but then only when they
    add up to nearly a whole number: open sheets, a half each, add up to anything.
    """
    total, strongest = winding_numbers(corners, patches, turns, points)
    together = np.where(np.round(total) == 0, 0, 1 - 4 * np.abs(total - np.round(total)))
    return np.clip(np.maximum(together, strongest), 0, 1)


def _positions(ids: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return the positions [N, 3] of voxel ids [N], in voxels."""
    inner = np.stack(np.unravel_index(ids & 511, (BLOCK,) * 3), 1)
    return (blocks[ids >> 9] * BLOCK + inner).astype(np.float64)


def _oriented_patches(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the patch of each face (joined by edges of two faces) and -1 where it is turned."""
    oriented, patches = igl.bfs_orient(faces)
    first = (oriented == faces[:, :1]).argmax(1)
    second = np.take_along_axis(oriented, ((first + 1) % 3)[:, None], 1)[:, 0]
    return patches, np.where(second == faces[:, 1], 1.0, -1.0)


def _end_slices(axis: int) -> list[tuple[slice | int, ...]]:
    return [tuple(end if a == axis else slice(None) for a in range(3)) for end in (0, -1)]


def _border_voxels(blocks: np.ndarray, side: int) -> np.ndarray:
    """Return the ids of the voxels on the border of the grid: always outside."""
    rows = np.flatnonzero(((blocks == 0) | (blocks == side - 1)).any(1))
    local = np.stack(np.unravel_index(np.arange(BLOCK**3), (BLOCK,) * 3), 1)
    place = blocks[rows, None] * BLOCK + local
    on = ((place == 0) | (place == side * BLOCK - 1)).any(2)
    return (rows[:, None] * BLOCK**3 + np.arange(BLOCK**3))[on]


def _face_voxels(touching: np.ndarray) -> np.ndarray:
    """Return the ids of the 64 voxels of each (row, side) [N, 2] of a block's face."""
    grid = np.arange(BLOCK**3).reshape((BLOCK,) * 3)
    faces = np.stack(
        [np.take(grid, 7 * (side & 1), axis=side >> 1).reshape(-1) for side in range(6)]
    )
    return (touching[:, :1] * BLOCK**3 + faces[touching[:, 1]]).reshape(-1)
