"""Sets of voxels as bits (compiled): eight 64-bit words a block, so that a step moves 64 voxels.

Masks are [B, 8] uint64: word x, bit 8 y + z stands for voxel (x, y, z) of block b. A block that is
not there counts as full: what is far from the mesh is outside.
"""

import numpy as np

from model.compiled import compiled

NONE, ONE, ALL = np.uint64(0), np.uint64(1), np.uint64(2**64 - 1)
Z_FIRST, Z_LAST = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
Y_FIRST, Y_LAST = np.uint64(0xFF), np.uint64(0xFF << 56)
BEYOND = -(
    2**31
)  # "row" of a neighbour beyond the grid; other negatives: a block that is not there
# The place of a lone bit, by de Bruijn's multiplication.
_DE_BRUIJN = np.uint64(0x022FDD63CC95386D)
_SHIFT = np.uint64(58)
_PLACES = np.zeros(64, np.int64)
for _place in range(64):
    _PLACES[((1 << _place) * int(_DE_BRUIJN) & 2**64 - 1) >> 58] = _place


@compiled
def lowest(word: np.uint64) -> int:
    """Return the place of the lowest bit that is set; the word is not zero."""
    return _PLACES[((word & (~word + ONE)) * _DE_BRUIJN) >> _SHIFT]


@compiled
def population(word: np.uint64) -> int:
    """Return the number of bits set."""
    count = 0
    while word != NONE:
        word &= word - ONE
        count += 1
    return count


@compiled
def row_at(rows: np.ndarray, x: int, y: int, z: int) -> int:
    """Return the row of the block that holds a voxel, negative where there is none."""
    side = rows.shape[0] * 8
    if x < 0 or y < 0 or z < 0 or x >= side or y >= side or z >= side:
        return -1
    return rows[x >> 3, y >> 3, z >> 3]


@compiled
def mask_at(masks: np.ndarray, rows: np.ndarray, x: int, y: int, z: int) -> bool:
    """Return whether a voxel is in the set."""
    row = row_at(rows, x, y, z)
    if row < 0:
        return True
    return masks[row, x & 7] >> np.uint64((y & 7) * 8 + (z & 7)) & ONE != NONE


@compiled
def unite(masks: np.ndarray, rows: np.ndarray, words: np.ndarray) -> None:
    """Add words [N, 8] to the masks of rows [N], in place; a row may occur more than once."""
    for n in range(len(rows)):
        for x in range(8):
            masks[rows[n], x] |= words[n, x]


@compiled
def voxels_of(masks: np.ndarray) -> np.ndarray:
    """Return the ids [N] int64 of the voxels that are set: 512 * row + 64 x + 8 y + z."""
    count = 0
    for b in range(len(masks)):
        for x in range(8):
            count += population(masks[b, x])
    ids = np.empty(count, np.int64)
    at = 0
    for b in range(len(masks)):
        for x in range(8):
            word = masks[b, x]
            while word != NONE:
                ids[at] = b * 512 + x * 64 + lowest(word)
                word &= word - ONE
                at += 1
    return ids


@compiled
def below(values: np.ndarray, limit: float) -> np.ndarray:
    """Return the mask of values [B, 8, 8, 8] under a limit."""
    masks = np.zeros((len(values), 8), np.uint64)
    for b in range(len(values)):
        for x in range(8):
            word = NONE
            for v in range(64):
                word |= np.uint64(values[b, x, v >> 3, v & 7] < limit) << np.uint64(v)
            masks[b, x] = word
    return masks


@compiled
def shifted(masks: np.ndarray, neighbours: np.ndarray, axis: int, ahead: bool) -> np.ndarray:
    """Return the mask whose voxels are those with their neighbour along an axis in `masks`.

    neighbours: [B, 6] rows of the blocks at -x, +x, -y, +y, -z, +z; negative where there is none.
    """
    result = np.empty_like(masks)
    one, seven, eight, most = np.uint64(1), np.uint64(7), np.uint64(8), np.uint64(56)
    for b in range(len(masks)):
        other = neighbours[b, 2 * axis + ahead]
        for x in range(8):
            if axis == 0:
                i = x + 1 if ahead else x - 1
                if 0 <= i < 8:
                    result[b, x] = masks[b, i]
                else:
                    result[b, x] = masks[other, i & 7] if other >= 0 else ALL
                continue
            word = masks[b, x]
            beyond = masks[other, x] if other >= 0 else ALL
            if axis == 1 and ahead:
                result[b, x] = word >> eight | beyond << most
            elif axis == 1:
                result[b, x] = word << eight | beyond >> most
            elif ahead:
                result[b, x] = (word >> one & ~Z_LAST) | (beyond & Z_FIRST) << seven
            else:
                result[b, x] = (word << one & ~Z_FIRST) | (beyond & Z_LAST) >> seven
    return result


def eroded(
    masks: np.ndarray,
    neighbours: np.ndarray,
    sides: tuple[bool, ...],
    axes: tuple[int, ...] = (0, 1, 2),
) -> np.ndarray:
    """Return the voxels that are set with their neighbours along the axes, diagonals included.

    sides: (True,) takes the neighbours ahead, so that a voxel stands for a cell and its eight
    corners; (False, True) those on both sides.
    """
    for axis in axes:
        found = shifted(masks, neighbours, axis, sides[0])
        found &= masks
        for ahead in sides[1:]:
            found &= shifted(masks, neighbours, axis, ahead)
        masks = found
    return masks


def dilated(masks: np.ndarray, neighbours: np.ndarray, sides: tuple[bool, ...]) -> np.ndarray:
    """Return the voxels that are set or have a neighbour that is, as in `eroded`."""
    for axis in range(3):
        found = shifted(masks, neighbours, axis, sides[0])
        found |= masks
        for ahead in sides[1:]:
            found |= shifted(masks, neighbours, axis, ahead)
        masks = found
    return masks


def block_neighbours(rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return [B, 6] int32: what `rows` has at -x, +x, -y, +y, -z, +z of each block, or BEYOND."""
    padded = np.pad(rows, 1, constant_values=BEYOND).astype(np.int32)
    steps = np.array([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])
    around = blocks[:, None] + 1 + steps
    return padded[around[..., 0], around[..., 1], around[..., 2]]
