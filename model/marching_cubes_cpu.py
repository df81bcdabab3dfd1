"""Marching cubes over blocks on the CPU (compiled): the twin of the torch path, face for face.

Signs are kept as bits, a byte a row of eight voxels, so that a row of cells without surface costs a
few operations. Vertices are numbered without sorting: each block has a bit an edge, and a
vertex's number is that of its block's first plus the count of bits before its own.
"""

import numpy as np

from model.compiled import compiled
from model.marching_cubes_cases import EDGES, END_MARGIN, case_tables

WORDS = 48  # of 32 bits: three edges for each of a block's 512 voxels


@compiled
def _population(word: int) -> int:
    """Return the number of bits set in a word of 32 bits."""
    word = word - (word >> 1 & 0x55555555)
    word = (word & 0x33333333) + (word >> 2 & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return word * 0x01010101 >> 24 & 255


@compiled
def _neighbours(blocks: np.ndarray, side: int) -> np.ndarray:
    """Return the rows [B, 8] of the blocks at b + (c & 1, c >> 1 & 1, c >> 2), or -1.

    blocks: [B, 3], sorted: so each of the eight walks through them in order.
    """
    keys = np.empty(len(blocks), np.int64)
    for b in range(len(blocks)):
        keys[b] = (np.int64(blocks[b, 0]) * side + blocks[b, 1]) * side + blocks[b, 2]
    found = np.full((len(blocks), 8), -1, np.int32)
    for c in range(8):
        offset = ((c & 1) * side + (c >> 1 & 1)) * side + (c >> 2)
        at = 0
        for b in range(len(blocks)):
            while at < len(keys) and keys[at] < keys[b] + offset:
                at += 1
            if at < len(keys) and keys[at] == keys[b] + offset:
                found[b, c] = at
    return found


@compiled
def _sign_rows(values: np.ndarray) -> np.ndarray:
    """Return [B, 64] uint8: bit z of row 8 x + y is set where the voxel is inside."""
    signs = np.zeros((len(values), 64), np.uint8)
    for b in range(len(values)):
        for x in range(8):
            for y in range(8):
                bits = 0
                for z in range(8):
                    bits |= int(values[b, x, y, z] < 0) << z
                signs[b, 8 * x + y] = bits
    return signs


@compiled
def _cell_rows(
    b: int, near: np.ndarray, signs: np.ndarray, padded: np.ndarray, active: np.ndarray
) -> bool:
    """Fill padded [81] with signs, 9 x 9 rows of nine voxels, and active [64] with a block's cells.

    Bit z of active: the cell's eight corners are known and differ. Returns whether there are any.
    """
    either, both = 0, 511
    for x in range(9):
        for y in range(9):
            c = (x >> 3) | (y >> 3) << 1
            row = (x & 7) * 8 + (y & 7)
            bits = 0
            if near[b, c] >= 0:
                bits |= signs[near[b, c], row]
            if near[b, c | 4] >= 0:
                bits |= (signs[near[b, c | 4], row] & 1) << 8
            padded[9 * x + y] = bits
            either |= bits
            both &= bits
    if either == 0 or both == 511:
        return False
    some = False
    for x in range(8):
        for y in range(8):
            reach = int(x == 7) | int(y == 7) << 1
            known = 0xFF
            for c in range(1, 4):
                if c & reach == c and near[b, c] < 0:
                    known = 0
            for c in range(4):
                if c & reach == c and near[b, c | 4] < 0:
                    known &= 0x7F
            p, q = padded[9 * x + y], padded[9 * x + y + 1]
            r, s = padded[9 * x + y + 9], padded[9 * x + y + 10]
            either, both = p | q | r | s, p & q & r & s
            active[8 * x + y] = (either | either >> 1) & ~(both & both >> 1) & known
            some |= active[8 * x + y] != 0
    return some


@compiled
def _case(padded: np.ndarray, x: int, y: int, z: int) -> int:
    """Return a cell's case: bit c is set where corner (c & 1, c >> 1 & 1, c >> 2) is inside."""
    at = 9 * x + y
    return (
        (padded[at] >> z & 1) | (padded[at + 9] >> z & 1) << 1 | (padded[at + 1] >> z & 1) << 2
        | (padded[at + 10] >> z & 1) << 3 | (padded[at] >> z + 1 & 1) << 4
        | (padded[at + 9] >> z + 1 & 1) << 5 | (padded[at + 1] >> z + 1 & 1) << 6
        | (padded[at + 10] >> z + 1 & 1) << 7
    )  # fmt: skip


def surface_by_numba(
    blocks: np.ndarray, values: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `marching_cubes` does, for sorted blocks [B, 3] and float32 values."""
    # One type and order of memory for all callers: each other would be compiled for itself.
    blocks = np.ascontiguousarray(blocks, np.int64)
    values = np.ascontiguousarray(values, np.float32)
    return _surface(blocks, values, resolution, END_MARGIN, np.array(EDGES), *case_tables())


@compiled
def _surface(
    blocks: np.ndarray,
    values: np.ndarray,
    resolution: int,
    margin: float,
    edges: np.ndarray,
    case_triangles: np.ndarray,
    case_counts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [V, 3] float32 and faces [F, 3] int32.

    blocks: [B, 3], sorted; values: [B, 8, 8, 8] float32. edges: [12, 3] corner, corner and axis of
    a cell's edges; case_triangles [256, T, 3] and case_counts [256]: triangles as edges.
    margin: the share of an edge that a vertex keeps from its ends.
    """
    count = len(blocks)
    near = _neighbours(blocks, resolution // 8 + 1)
    signs = _sign_rows(values)
    padded, active = np.empty(81, np.int64), np.empty(64, np.int64)
    crossed = np.zeros(256, np.int64)  # the edges that each case's triangles use, as bits
    for case in range(256):
        for t in range(case_counts[case]):
            for i in range(3):
                crossed[case] |= 1 << case_triangles[case, t, i]
    used = np.zeros((count, WORDS), np.uint32)
    face_count = 0
    for b in range(count):
        if not _cell_rows(b, near, signs, padded, active):
            continue
        for row in range(64):
            for z in range(8):
                if not active[row] >> z & 1:
                    continue
                case = _case(padded, row >> 3, row & 7, z)
                face_count += case_counts[case]
                for e in range(12):
                    if crossed[case] >> e & 1:
                        c = edges[e, 0]
                        i, j, k = (row >> 3) + (c & 1), (row & 7) + (c >> 1 & 1), z + (c >> 2)
                        owner = near[b, i >> 3 | (j >> 3) << 1 | (k >> 3) << 2]
                        bit = ((i & 7) * 64 + (j & 7) * 8 + (k & 7)) * 3 + edges[e, 2]
                        used[owner, bit >> 5] |= np.uint32(1 << (bit & 31))
    before = np.empty((count, WORDS), np.int32)  # vertices before each word
    vertex_count = 0
    for b in range(count):
        for word in range(WORDS):
            before[b, word] = vertex_count
            vertex_count += _population(np.int64(used[b, word]))
    vertices = np.empty((vertex_count, 3), np.float32)
    faces = np.empty((face_count, 3), np.int32)
    number = np.empty(12, np.int64)
    place = np.empty(3)
    done = 0
    for b in range(count):
        for word in range(WORDS):
            bits = np.int64(used[b, word])
            at = before[b, word]
            for bit in range(32):
                if not bits >> bit & 1:
                    continue
                inner, axis = (word * 32 + bit) // 3, (word * 32 + bit) % 3
                i, j, k = inner >> 6, inner >> 3 & 7, inner & 7
                one = np.float64(values[b, i, j, k])
                p, q, r = i + (axis == 0), j + (axis == 1), k + (axis == 2)
                owner = near[b, p >> 3 | (q >> 3) << 1 | (r >> 3) << 2]
                two = np.float64(values[owner, p & 7, q & 7, r & 7])
                place[0], place[1], place[2] = i, j, k
                place[axis] += min(max(one / (one - two), margin), 1 - margin)
                for a in range(3):
                    vertices[at, a] = (2 * (blocks[b, a] * 8 + place[a]) + 1) / resolution - 1
                at += 1
        if not _cell_rows(b, near, signs, padded, active):
            continue
        for row in range(64):
            for z in range(8):
                if not active[row] >> z & 1:
                    continue
                case = _case(padded, row >> 3, row & 7, z)
                for e in range(12):
                    if crossed[case] >> e & 1:
                        c = edges[e, 0]
                        i, j, k = (row >> 3) + (c & 1), (row & 7) + (c >> 1 & 1), z + (c >> 2)
                        owner = near[b, i >> 3 | (j >> 3) << 1 | (k >> 3) << 2]
                        bit = ((i & 7) * 64 + (j & 7) * 8 + (k & 7)) * 3 + edges[e, 2]
                        lower = np.int64(used[owner, bit >> 5]) & ((1 << (bit & 31)) - 1)
                        number[e] = before[owner, bit >> 5] + _population(lower)
                for t in range(case_counts[case]):
                    for i in range(3):
                        faces[done, i] = number[case_triangles[case, t, i]]
                    done += 1
    return vertices, faces
