"""Polygons to triangles, concave ones too."""

import mapbox_earcut
import numpy as np


def newell_normal(corners: np.ndarray) -> np.ndarray:
    """Return Newell normals [P, 3] (twice the area) of polygons [P, n, 3], concave or not."""
    return np.cross(corners, np.roll(corners, -1, axis=1)).sum(1)


def triangulate(corners: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons into triangles of the same winding, concave ones by ear clipping.

    corners: [C, 3] positions of all polygons' corners in a row; counts: [P] corners of each.
    Returns triangles [T, 3] as rows of corners, in polygon order, and the polygon [T] of each.
    """
    counts = np.asarray(counts, np.int64)
    starts = np.cumsum(counts) - counts
    pieces, owners = [], []
    for n in np.unique(counts[counts >= 3]):
        polygons = np.flatnonzero(counts == n)
        index = starts[polygons, None] + np.arange(n)
        fan = np.stack([np.zeros(n - 2, np.int64), np.arange(1, n - 1), np.arange(2, n)], 1)
        local = np.repeat(fan[None], len(polygons), 0)
        if n > 3:
            points = corners[index] - corners[index[:, :1]]
            scale = np.abs(points).max((1, 2), keepdims=True)
            points = points / np.where(scale > 0, scale, 1)
            normal = newell_normal(points)
            ahead = np.roll(points, -1, axis=1) - points
            turn = np.einsum("pni,pi->pn", np.cross(ahead, np.roll(ahead, -1, axis=1)), normal)
            inward = turn < -1e-9  # column i is the turn at corner i + 1
            if n == 4:
                local[inward[:, 0] | inward[:, 2]] = [[0, 1, 3], [1, 2, 3]]
            else:
                for p in np.flatnonzero(inward.any(1)):
                    local[p] = clip_ears(points[p], normal[p], local[p])
        pieces.append(np.take_along_axis(index, local.reshape(len(polygons), -1), 1).reshape(-1, 3))
        owners.append(np.repeat(polygons, n - 2))
    if not pieces:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(pieces)[order], owner[order]


def clip_ears(points: np.ndarray, normal: np.ndarray, fan: np.ndarray) -> np.ndarray:
    """Return n - 2 triangles of a concave polygon [n, 3]; the fan where ear clipping fails."""
    drop = int(np.abs(normal).argmax())
    flat = np.ascontiguousarray(points[:, [(drop + 1) % 3, (drop + 2) % 3]])
    triangles = mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], np.uint32))
    triangles = triangles.reshape(-1, 3).astype(np.int64)
    if len(triangles) != len(fan):
        return fan
    a, b, c = flat[triangles].transpose(1, 2, 0)
    area = np.sum((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))
    return triangles if area * normal[drop] > 0 else triangles[:, ::-1]
