"""The 256 cases of marching cubes: which edges of a cell the triangles join, found, not listed."""

from functools import cache

import numpy as np

# A cell's corner c sits at (c & 1, c >> 1 & 1, c >> 2); an edge joins two corners that differ in
# one bit, and is named by its lower corner and its axis.
EDGES = [(c, c | 1 << axis, axis) for axis in range(3) for c in range(8) if not c >> axis & 1]
# Vertices keep this share of an edge away from its ends, so that no triangle is degenerate where a
# sample is exactly zero. It moves a vertex by a thousandth of a voxel at most.
END_MARGIN = 1e-3


@cache
def case_tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles of the 256 cases: edges [256, T, 3] (padded with 0) and counts [256]."""
    triangles = [_triangulate(_loops(case)) for case in range(256)]
    table = np.zeros((256, max(map(len, triangles)), 3), np.int64)
    for case, found in enumerate(triangles):
        if found:
            table[case, : len(found)] = found
    return table, np.array([len(found) for found in triangles])


def _loops(case: int) -> list[list[int]]:
    """Return the closed loops of crossed edges of a case, outward when seen as polygons.

    On each face of the cell, walked counter-clockwise as seen from outside the cell, a segment
    runs from the edge where the walk entered the inside to the edge where it leaves it. On an
    ambiguous face this cuts off each inside corner by itself: a rule of the face's signs alone,
    so the two cells that share a face draw the same segments.
    """
    edge_of = {frozenset((a, b)): e for e, (a, b, _) in enumerate(EDGES)}
    follows = {}
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        for side in (0, 1 << axis):
            ring = [side, side | u, side | u | v, side | v]
            if not side:
                ring.reverse()
            flags = [case >> c & 1 for c in ring]
            for i in range(4):
                if flags[i] and not flags[i - 3]:  # leaves the inside between i and i + 1
                    first = i
                    while flags[first - 1]:
                        first -= 1
                    enter = edge_of[frozenset((ring[first - 1], ring[first]))]
                    leave = edge_of[frozenset((ring[i], ring[i - 3]))]
                    follows[enter] = leave
    loops = []
    while follows:
        edge, loop = next(iter(follows)), []
        while edge in follows:
            loop.append(edge)
            edge = follows.pop(edge)
        loops.append(loop)
    return loops


def _triangulate(loops: list[list[int]]) -> list[tuple[int, int, int]]:
    """Split loops into triangles without a diagonal that lies in a face of the cell.

    Such a diagonal could be drawn by the neighbour too, and then have four triangles.
    """
    triangles = []
    for loop in loops:
        found = _split(tuple(loop))
        assert found is not None, f"loop {loop} has no triangulation inside its cell"
        triangles += found
    return triangles


def _split(loop: tuple[int, ...]) -> list[tuple[int, int, int]] | None:
    if len(loop) == 3:
        return [(loop[0], loop[1], loop[2])]
    for apex in range(1, len(loop) - 1):
        first, last = loop[: apex + 1], loop[apex:]
        parts: list[tuple[int, int, int]] = [(loop[0], loop[apex], loop[-1])]
        for part in (first, last):
            if len(part) == 2:
                continue
            if _share_face(part[0], part[-1]):
                break
            rest = _split(part)
            if rest is None:
                break
            parts += rest
        else:
            return parts
    return None


def _share_face(a: int, b: int) -> bool:
    corners = (*EDGES[a][:2], *EDGES[b][:2])
    return any(len({c >> axis & 1 for c in corners}) == 1 for axis in range(3))
