"""Which voxels are outside: a flood over sparse blocks, and winding numbers where it leaks.

The flood starts at the border of the grid and walks from voxel to voxel where no triangle crosses
the edge between them. It cannot pass a mesh without boundary, and needs no orientation; what it
does not reach is inside, so whatever is hidden from outside becomes solid. It leaks through holes
and cracks: what it reaches only through a place narrower than 2 CLEARANCE voxels is a pocket, and
the winding number says whether that pocket is inside. Where this fails: an opening of three voxels
or more lets the outside in (the walls become shells, see `tasks/shell.py`); a pocket of a mesh in
pieces, none of which surrounds it and whose orientations cancel, is taken for outside.
"""

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.compiled import compiled
from model.sdf import BLOCK
from tasks.masks import (
    ALL,
    BEYOND,
    NONE,
    ONE,
    Y_FIRST,
    Y_LAST,
    Z_FIRST,
    Z_LAST,
    below,
    block_neighbours,
    lowest,
    population,
    unite,
    voxels_of,
)
from tasks.sparse_common import CLEARANCE, SAMPLES, SMALL_POCKET, SOLID_ANGLES, STEPS, SURE

# The voxels on each side of a block (-x, +x, -y, ...), as eight words.
FACES = np.zeros((6, BLOCK), np.uint64)
FACES[0, 0] = FACES[1, 7] = ALL
FACES[2], FACES[3], FACES[4], FACES[5] = Y_FIRST, Y_LAST, Z_FIRST, Z_LAST


@compiled
def _fill(b: int, reached: np.ndarray, allowed: np.ndarray, walls: np.ndarray) -> None:
    """Extend, in place, what is reached of block b as far as it goes inside the block."""
    one, eight = np.uint64(1), np.uint64(8)
    changed = True
    while changed:
        changed = False
        for turn in range(16):
            x = turn if turn < 8 else 15 - turn
            word = reached[b, x]
            if x > 0:
                word |= reached[b, x - 1] & ~walls[0, b, x - 1]
            if x < 7:
                word |= reached[b, x + 1] & ~walls[0, b, x]
            word &= allowed[b, x]
            if word == NONE:
                continue
            free_y, free_z = ~walls[1, b, x], ~walls[2, b, x] & ~Z_LAST
            while True:
                more = word | (word & free_z) << one | (word >> one & free_z)
                more |= (word & free_y) << eight | (word >> eight & free_y)
                more &= allowed[b, x]
                if more == word:
                    break
                word = more
            if word != reached[b, x]:
                reached[b, x] = word
                changed = True


@compiled
def _across(
    b: int,
    n: int,
    side: int,
    x: int,
    source: np.ndarray,
    walls: np.ndarray,
) -> np.uint64:
    """Return where the voxels of word x of block b get to in block n, its neighbour on a side.

    The result belongs to word x of n; for sides 0 and 1 to words 7 and 0.
    """
    word = source[b, x]
    if side == 0:
        return word & ~walls[0, n, 7] if x == 0 else NONE
    if side == 1:
        return word & ~walls[0, b, 7] if x == 7 else NONE
    if side == 2:
        return word << np.uint64(56) & ~walls[1, n, x]
    if side == 3:
        return (word & ~walls[1, b, x]) >> np.uint64(56)
    if side == 4:
        return (word & Z_FIRST) << np.uint64(7) & ~walls[2, n, x]
    return (word & ~walls[2, b, x] & Z_LAST) >> np.uint64(7)


@compiled
def _face(side: int, x: int) -> np.uint64:
    """Return the voxels of word x that lie on a side of the block."""
    if side < 2:
        return ALL if x == 7 * side else NONE
    if side < 4:
        return Y_FIRST if side == 2 else Y_LAST
    return Z_FIRST if side == 4 else Z_LAST


@compiled
def _flood(
    neighbours: np.ndarray,
    faces: np.ndarray,
    starts: np.ndarray,
    walls: np.ndarray,
    far: np.ndarray,
    allowed: np.ndarray,
    reached: np.ndarray,
    queue: np.ndarray,
    queued: np.ndarray,
    first: np.ndarray,
) -> np.ndarray:
    """Extend `reached` [B, 8], in place, through what is allowed [B, 8]; return the blocks visited.

    neighbours: [B, 6] rows (-x, +x, -y, ...), or -1 - region for a far region, or BEYOND.
    faces, starts: (row, side) [N, 2] of the block faces that touch each far region. far
    [regions] bool: reached; set in place. walls: [3, B, 8]. first [S]: the blocks to begin with.
    queue [B] int32 and queued [B] bool, all False before and after: to work with.
    """
    count = len(neighbours)
    visited = np.empty(1024, np.int32)
    visits = begin = size = 0
    for row in first:
        if not queued[row]:
            queued[row] = True
            queue[size] = row
            size += 1
    while size > 0:
        b = queue[begin]
        begin = (begin + 1) % count
        size -= 1
        queued[b] = False
        if visits == len(visited):
            grown = np.empty(2 * visits, np.int32)
            grown[:visits] = visited
            visited = grown
        visited[visits] = b
        visits += 1
        _fill(b, reached, allowed, walls)
        for side in range(6):
            n = neighbours[b, side]
            if n == BEYOND:
                continue
            if n >= 0:
                grows = False
                for x in range(8):
                    to = 7 - x if side < 2 else x
                    came = _across(b, n, side, x, reached, walls) & allowed[n, to] & ~reached[n, to]
                    if came != NONE:
                        reached[n, to] |= came
                        grows = True
                if grows and not queued[n]:
                    queued[n] = True
                    queue[(begin + size) % count] = n
                    size += 1
                continue
            touches = False
            for x in range(8):
                touches |= reached[b, x] & _face(side, x) != NONE
            if not touches or far[-1 - n]:
                continue
            far[-1 - n] = True
            for m in range(starts[-1 - n], starts[-n]):
                row, grows = faces[m, 0], False
                for x in range(8):
                    came = _face(faces[m, 1], x) & allowed[row, x] & ~reached[row, x]
                    if came != NONE:
                        reached[row, x] |= came
                        grows = True
                if grows and not queued[row]:
                    queued[row] = True
                    queue[(begin + size) % count] = row
                    size += 1
    return visited[:visits]


@compiled
def _step(
    neighbours: np.ndarray,
    faces: np.ndarray,
    starts: np.ndarray,
    walls: np.ndarray,
    far: np.ndarray,
    allowed: np.ndarray,
    frontier: np.ndarray,
) -> np.ndarray:
    """Return the allowed voxels [B, 8] one step from the frontier [B, 8]; arguments as above."""
    reached = np.zeros_like(frontier)
    one, eight = np.uint64(1), np.uint64(8)
    for b in range(len(frontier)):
        empty = True
        for x in range(8):
            empty &= frontier[b, x] == NONE
        if empty:
            continue
        for x in range(8):
            word = frontier[b, x]
            free_y, free_z = ~walls[1, b, x], ~walls[2, b, x] & ~Z_LAST
            more = (word & free_z) << one | (word >> one & free_z)
            more |= (word & free_y) << eight | (word >> eight & free_y)
            if x > 0:
                more |= frontier[b, x - 1] & ~walls[0, b, x - 1]
            if x < 7:
                more |= frontier[b, x + 1] & ~walls[0, b, x]
            reached[b, x] |= more & allowed[b, x]
        for side in range(6):
            n = neighbours[b, side]
            if n == BEYOND:
                continue
            if n >= 0:
                for x in range(8):
                    to = 7 - x if side < 2 else x
                    reached[n, to] |= _across(b, n, side, x, frontier, walls) & allowed[n, to]
                continue
            touches = False
            for x in range(8):
                touches |= frontier[b, x] & _face(side, x) != NONE
            if touches and not far[-1 - n]:
                far[-1 - n] = True
                for m in range(starts[-1 - n], starts[-n]):
                    for x in range(8):
                        row = faces[m, 0]
                        reached[row, x] |= _face(faces[m, 1], x) & allowed[row, x]
    return reached


@compiled
def _pockets(
    neighbours: np.ndarray,
    faces: np.ndarray,
    starts: np.ndarray,
    walls: np.ndarray,
    far: np.ndarray,
    allowed: np.ndarray,
    entries: np.ndarray,
    distance: np.ndarray,
    samples: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flood each pocket that the entries [B, 8] lead into; all of it is removed from `allowed`.

    Returns the blocks [M] and words [M, 8] of all pockets, the first of each [P + 1], their
    sizes [P] in voxels and sample voxels [P, samples]: the one farthest from the mesh (the first of
    them by id) and those at equal steps through the pocket's ids, all of them properties of the
    pocket. Pockets come in the order of their first entries.
    """
    count = len(neighbours)
    reached = np.zeros((count, 8), np.uint64)
    queue, queued = np.empty(count, np.int32), np.zeros(count, np.bool_)
    rows, words = np.empty(1024, np.int32), np.empty((1024, 8), np.uint64)
    firsts, sizes, chosen = [0], [0 for _ in range(0)], [0 for _ in range(0)]
    first = np.empty(1, np.int64)
    used = 0
    for b in range(count):
        for x in range(8):
            while entries[b, x] & allowed[b, x] != NONE:
                bit = ONE << np.uint64(lowest(entries[b, x] & allowed[b, x]))
                reached[b, x] = bit
                first[0] = b
                visited = _flood(
                    neighbours, faces, starts, walls, far, allowed, reached, queue, queued, first
                )
                size, farthest, best, last = 0, -1.0, 0, -1
                for row in np.sort(visited):
                    if row == last:  # visited twice
                        continue
                    last = row
                    if used == len(rows):
                        grown, grown_words = (
                            np.empty(2 * used, np.int32),
                            np.empty((2 * used, 8), np.uint64),
                        )
                        grown[:used], grown_words[:used] = rows, words
                        rows, words = grown, grown_words
                    rows[used] = row
                    for i in range(8):
                        word = reached[row, i]
                        words[used, i] = word
                        allowed[row, i] &= ~word
                        reached[row, i] = NONE
                        while word != NONE:
                            v = lowest(word)
                            word &= word - ONE
                            size += 1
                            if distance[row, i, v >> 3, v & 7] > farthest:
                                farthest = distance[row, i, v >> 3, v & 7]
                                best = row * 512 + i * 64 + v
                    used += 1
                chosen.append(best)
                for k in range(1, samples):
                    place, at, found = size * k // samples, firsts[-1], 0
                    while True:
                        inside = 0
                        for i in range(8):
                            inside += population(words[at, i])
                        if found + inside > place:
                            break
                        found += inside
                        at += 1
                    i = 0
                    while found + population(words[at, i]) <= place:
                        found += population(words[at, i])
                        i += 1
                    word = words[at, i]
                    for _ in range(place - found):
                        word &= word - ONE
                    chosen.append(rows[at] * 512 + i * 64 + lowest(word))
                firsts.append(used)
                sizes.append(size)
    return (
        rows[:used], words[:used], np.array(firsts), np.array(sizes),
        np.array(chosen).reshape(-1, samples),
    )  # fmt: skip


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
    blocks: np.ndarray,
    rows: np.ndarray,
    distance: np.ndarray,
    walls: np.ndarray,
    patches: np.ndarray,
    turns: np.ndarray,
) -> tuple[np.ndarray, float | None]:
    """Return which voxels are outside, [B, 8] masks, and how sure the winding numbers were.

    corners: [F, 3, 3] in voxels; rows: [side, side, side] int32, the row of each block of `blocks`
    [B, 3] or -1; distance: [B, 8, 8, 8], at least CLEARANCE where a block is absent; walls:
    [3, B, 8], the edges that triangles cross; patches, turns: [F], of `oriented_patches`.

    The second result is None when no pocket was in doubt; else the mean over the voxels asked
    about of how far the winding number lay from SURE (0: undecided, 1: certain).
    """
    side = len(rows)
    regions, region_count = ndimage.label(rows < 0)
    neighbours = block_neighbours(np.where(rows < 0, -regions, rows), blocks)
    touching = np.argwhere((neighbours < 0) & (neighbours != BEYOND)).astype(np.int32)
    region_of = -1 - neighbours[touching[:, 0], touching[:, 1]]
    order = np.argsort(region_of, kind="stable")
    touching, region_of = touching[order], region_of[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(region_of, minlength=region_count))])
    tables = (neighbours, touching, starts, walls)
    far = np.zeros(region_count, bool)
    edge_regions = np.unique([regions[s] for axis in range(3) for s in _end_slices(axis)])
    far[edge_regions[edge_regions > 0] - 1] = True

    clear = ~below(distance, CLEARANCE)
    wide = _border(blocks, side)
    seen = touching[far[region_of]]
    unite(wide, seen[:, 0], FACES[seen[:, 1]] & clear[seen[:, 0]])
    queue, queued = np.empty(len(blocks), np.int32), np.zeros(len(blocks), bool)
    _flood(*tables, far, clear | wide, wide, queue, queued, np.flatnonzero(wide.any(1)))
    del clear
    far_wide = far.copy()
    levels, unreached, frontier = [], ~wide, wide
    del wide
    for _ in range(STEPS):
        frontier = _step(*tables, far, unreached, frontier)
        unreached ^= frontier  # which is a part of it
        held = np.flatnonzero(frontier.any(1))
        levels.append((held, frontier[held]))
    outside = ~unreached

    entries = _step(*tables, far.copy(), unreached, frontier)
    del frontier
    held, words, firsts, sizes, samples = _pockets(
        *tables, far, unreached, entries, distance, SAMPLES
    )
    unite(outside, held, words)
    asked = np.flatnonzero(sizes >= SMALL_POCKET)
    asked = asked[np.argsort(-sizes[asked], kind="stable")]
    asked = asked[: max(4, SOLID_ANGLES // (SAMPLES * len(corners)))]
    confidence = None
    if len(asked):
        surface = (corners, patches, turns)
        evidence = _evidence(*surface, _positions(samples[asked].reshape(-1), blocks))
        score = np.median(evidence.reshape(-1, SAMPLES), 1)
        margin = np.abs(score - SURE) / np.where(score < SURE, SURE, 1 - SURE)
        confidence = float(np.average(margin, weights=sizes[asked]))
        inside = np.zeros_like(outside)
        for pocket in asked[score >= SURE]:
            part = slice(firsts[pocket], firsts[pocket + 1])
            unite(inside, held[part], words[part])
        _settle_between(tables, far & ~far_wide, levels, surface, blocks, inside)
        outside &= ~inside
    return outside, confidence


def _settle_between(
    tables: tuple[np.ndarray, ...],
    far: np.ndarray,
    levels: list[tuple[np.ndarray, np.ndarray]],
    surface: tuple[np.ndarray, np.ndarray, np.ndarray],
    blocks: np.ndarray,
    inside: np.ndarray,
) -> None:
    """Add to the inside pockets [B, 8], in place, their share of the steps towards wide places.

    levels: what lies 1, 2, ... STEPS steps from a wide place, as blocks and words; far: [regions]
    those reached by these steps.
    """
    closed = ~far
    between = _united(levels, len(inside))
    contested, frontier = np.zeros_like(inside), inside
    for _ in range(STEPS):
        frontier = _step(*tables, closed, between & ~contested, frontier)
        contested |= frontier
    ids = voxels_of(contested)
    if len(ids) * len(surface[0]) <= SOLID_ANGLES:
        ids = ids[_evidence(*surface, _positions(ids, blocks)) >= 0.5]
        words = np.zeros((len(ids), BLOCK), np.uint64)
        words[np.arange(len(ids)), ids >> 6 & 7] = np.uint64(1) << (ids & 63).astype(np.uint64)
        unite(inside, ids >> 9, words)
        return
    frontier, closed = inside.copy(), ~far
    for step in range(1, STEPS):  # who is nearer has it
        allowed = _united(levels[step:], len(inside)) & ~inside
        frontier = _step(*tables, closed, allowed, frontier)
        inside |= frontier


def _united(levels: list[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Return the mask [count, 8] of what blocks and words hold."""
    masks = np.zeros((count, BLOCK), np.uint64)
    for held, words in levels:
        unite(masks, held, words)
    return masks


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


def oriented_patches(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the patch of each of the faces [F, 3] and -1 where it is to be turned round, else 1.

    Faces are joined by the edges that two faces share. Each face is there twice, as it is and
    turned round, and joined with what runs through the edge the other way: a patch that can be
    oriented falls into two components, of which that of its first face as it is tells the turns
    (all others have the opposite ones); one that can't is one component, and left as it is.
    """
    count = len(faces)
    ends = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2)
    key = ends.min(1) * (faces.max() + 1) + ends.max(1)
    forward = ends[:, 0] < ends[:, 1]
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    pairs = first[np.diff(first, append=len(key)) == 2]
    one, two = order[pairs], order[pairs + 1]
    a, b = one // 3, two // 3 + count * (forward[one] == forward[two])
    links = np.concatenate([a, (a + count)]), np.concatenate([b, (b + count) % (2 * count)])
    graph = coo_array((np.ones(len(links[0]), np.int8), links), (2 * count, 2 * count))
    _, labels = connected_components(graph, directed=False)
    plain, turned = labels[:count], labels[count:]
    patches = np.unique(np.minimum(plain, turned), return_inverse=True)[1]
    return patches, np.where(plain <= turned, 1.0, -1.0)


def _end_slices(axis: int) -> list[tuple[slice | int, ...]]:
    return [tuple(end if a == axis else slice(None) for a in range(3)) for end in (0, -1)]


def _border(blocks: np.ndarray, side: int) -> np.ndarray:
    """Return the mask [B, 8] of the voxels on the border of the grid: always outside."""
    border = np.zeros((len(blocks), BLOCK), np.uint64)
    for face, mask in enumerate(FACES):
        border[blocks[:, face >> 1] == (side - 1) * (face & 1)] |= mask
    return border
