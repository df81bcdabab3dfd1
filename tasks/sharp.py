"""Voxels near the sharp edges of a mesh (compiled)."""

import numpy as np

from model.compiled import compiled
from model.sdf import BLOCK
from tasks.distance import closest_on_segment
from tasks.sparse_common import DIHEDRAL, SHARP_REACH


def sharp_edges(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the edges [E, 2] at which the surface turns by more than 30 degrees.

    vertices: [V, 3]; faces: [F, 3] welded. Normals of flipped neighbours are turned round first;
    slivers have no normal and make no edge sharp; borders of open sheets are not sharp.
    """
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1)
    longest = np.max([((p - q) ** 2).sum(1) for p, q in ((a, b), (b, c), (c, a))], axis=0)
    fair = length > 1e-4 * longest
    normal = normal / np.maximum(length, 1e-300)[:, None]
    ends = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2)
    owner = np.repeat(np.arange(len(faces)), 3)
    forward = ends[:, 0] < ends[:, 1]
    key = ends.min(1) * len(vertices) + ends.max(1)
    usable = fair[owner]
    key, owner, forward = key[usable], owner[usable], forward[usable]
    order = np.argsort(key, kind="stable")
    key, owner, forward = key[order], owner[order], forward[order]
    same = np.flatnonzero(key[1:] == key[:-1])
    one, two = owner[same], owner[same + 1]
    turn = np.where(forward[same] == forward[same + 1], -1.0, 1.0)
    cosine = (normal[one] * normal[two]).sum(1) * turn
    sharp = np.unique(key[same[cosine < np.cos(DIHEDRAL)]])
    return np.stack([sharp // len(vertices), sharp % len(vertices)], 1)


@compiled
def mark_sharp(
    rows: np.ndarray, segments: np.ndarray, field: np.ndarray, shell: float, sharp: np.ndarray
) -> None:
    """Mark, in place, the voxels within SHARP_REACH of a segment [E, 2, 3] that is seen.

    An edge lies on the surface, so a voxel is no farther from the surface than from the edge:
    where |field| says otherwise (by more than the shell's half thickness) the edge is hidden.
    """
    p = np.empty(3, np.int64)
    side = rows.shape[0] * BLOCK
    window = 2  # a slab's disc reaches SHARP_REACH / cos(54.7 degrees) at most
    for s in range(len(segments)):
        a, b = segments[s, 0], segments[s, 1]
        w = int(np.argmax(np.abs(b - a)))
        u, v = (w + 1) % 3, (w + 2) % 3
        low, high = min(a[w], b[w]), max(a[w], b[w])
        for pw in range(int(np.ceil(low - SHARP_REACH)), int(np.floor(high + SHARP_REACH)) + 1):
            t = 0.0 if high == low else min(max((pw - a[w]) / (b[w] - a[w]), 0.0), 1.0)
            cu, cv = a[u] + t * (b[u] - a[u]), a[v] + t * (b[v] - a[v])
            for pu in range(int(np.ceil(cu - window)), int(np.floor(cu + window)) + 1):
                for pv in range(int(np.ceil(cv - window)), int(np.floor(cv + window)) + 1):
                    p[u], p[v], p[w] = pu, pv, pw
                    if min(p[0], p[1], p[2]) < 0 or max(p[0], p[1], p[2]) >= side:
                        continue
                    row = rows[p[0] >> 3, p[1] >> 3, p[2] >> 3]
                    if row < 0:
                        continue
                    qx, qy, qz = closest_on_segment(
                        p[0], p[1], p[2], a[0], a[1], a[2], b[0], b[1], b[2]
                    )
                    d = ((p[0] - qx) ** 2 + (p[1] - qy) ** 2 + (p[2] - qz) ** 2) ** 0.5
                    if d > SHARP_REACH:
                        continue
                    if abs(field[row, p[0] & 7, p[1] & 7, p[2] & 7]) <= max(d + 0.1, shell):
                        sharp[row, p[0] & 7, p[1] & 7, p[2] & 7] = True
