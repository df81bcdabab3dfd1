"""What is odd about a mesh's geometry: a few vectorised checks, seconds for a million faces."""

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MANY_COMPONENTS = 1000
SLIVER = 1e-4  # height over longest edge
EDGE_SAMPLE = 20_000


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge vertices [V, 3] of exactly equal position; no tolerance, so any scale is safe.

    Returns vertices [W, 3] and faces [F, 3] over them, both float64 and int64.
    """
    vertices = np.ascontiguousarray(vertices, np.float64) + 0.0  # -0.0 becomes 0.0
    bits = vertices.view(np.uint64)
    key = np.zeros(len(bits), np.uint64)
    for column in bits.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    if not np.array_equal(vertices[first][inverse], vertices):  # two positions share a key
        _, first, inverse = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    return vertices[first], inverse.reshape(-1)[faces].astype(np.int64)


def repeated_faces(faces: np.ndarray) -> np.ndarray:
    """Say [F] which faces repeat an earlier one, whatever its starting corner; winding counts."""
    if len(faces) == 0:
        return np.zeros(0, bool)
    turned = (faces.argmin(1)[:, None] + np.arange(3)) % 3
    start = np.take_along_axis(faces, turned, 1)
    order = np.lexsort(start.T[::-1])
    ordered = start[order]
    repeated = np.zeros(len(faces), bool)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(1)
    return repeated


def inspect_geometry(vertices: np.ndarray, faces: np.ndarray) -> tuple[str, ...]:
    """Return warnings `code: detail` for welded vertices [V, 3], faces [F, 3] without repeats.

    Codes: triangle_soup_not_watertight, open_surface_zero_thickness, non_manifold_edge,
    inconsistent_winding, inverted_orientation, many_components, near_degenerate_geometry,
    self_intersection (of a sample of the edges).
    """
    found: list[str] = []
    low, high = vertices.min(0), vertices.max(0)
    points = (vertices - (low + high) / 2) / max(float((high - low).max()), 1e-300)

    ends = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    forward = ends[:, 0] < ends[:, 1]
    key = np.minimum(*ends.T) * len(vertices) + np.maximum(*ends.T)
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(key[order]) != 0])
    uses = np.diff(np.r_[first, len(key)])
    face_of = order // 3

    pairs = np.flatnonzero(np.r_[np.diff(key[order]) == 0, False])
    links = coo_array(
        (np.ones(len(pairs), bool), (face_of[pairs], face_of[pairs + 1])),
        shape=(len(faces), len(faces)),
    )
    parts, part_of = connected_components(links, directed=False)

    open_part = np.zeros(parts, bool)
    open_part[part_of[face_of[first[uses == 1]]]] = True
    open_edges = int((uses == 1).sum())
    if open_edges > len(uses) * 0.9 and parts > len(faces) * 0.5 and len(faces) > 2:
        found.append(f"triangle_soup_not_watertight: {parts} parts of {len(faces)} faces")
    elif open_edges:
        detail = f"{int(open_part.sum())} of {parts} parts, {open_edges} open edges"
        found.append(f"open_surface_zero_thickness: {detail}")
    if (uses > 2).any():
        found.append(f"non_manifold_edge: {int((uses > 2).sum())} edges have 3 faces or more")
    twins = first[uses == 2]
    same_way = forward[order[twins]] == forward[order[twins + 1]]
    twisted = np.zeros(parts, bool)
    twisted[part_of[face_of[twins[same_way]]]] = True
    if same_way.any():
        found.append(f"inconsistent_winding: {int(same_way.sum())} of {len(uses)} edges")

    a, b, c = (points[faces[:, i]] for i in range(3))
    volume = np.bincount(part_of, np.einsum("fi,fi->f", a, np.cross(b, c)) / 6, parts)
    inward = outward_wrong(points, faces, part_of, volume, ~open_part & ~twisted)
    if inward:
        found.append(f"inverted_orientation: {inward} of {parts} parts are wound inward")
    if parts > MANY_COMPONENTS:
        found.append(f"many_components: {parts}")
    double_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest = np.maximum.reduce([np.sum(e * e, 1) for e in (b - a, c - b, a - c)])
    slivers = int((double_area < SLIVER * longest).sum())
    if slivers:
        found.append(f"near_degenerate_geometry: {slivers} of {len(faces)} faces are slivers")
    crossing, tried = crossing_edges(points, faces, ends[order[first]])
    if crossing:
        found.append(f"self_intersection: {crossing} of {tried} edges tried pass through a face")
    return tuple(found)


def outward_wrong(
    points: np.ndarray,
    faces: np.ndarray,
    part_of: np.ndarray,
    volume: np.ndarray,
    sound: np.ndarray,
) -> int:
    """Count closed parts of negative volume that are no cavity (no box of another part holds them).

    sound: [parts] bool, closed and consistently wound; the 64 largest parts are tried as holders.
    """
    suspects = np.flatnonzero(sound & (volume < -1e-12))
    if len(suspects) == 0:
        return 0
    low = np.full((len(volume), 3), np.inf)
    high = np.full((len(volume), 3), -np.inf)
    for corner in faces.T:
        np.minimum.at(low, part_of, points[corner])
        np.maximum.at(high, part_of, points[corner])
    held = np.zeros(len(suspects), bool)
    for holder in np.argsort(-volume)[:64]:
        if volume[holder] > 0:
            within = (low[holder] <= low[suspects]) & (high[suspects] <= high[holder])
            held |= within.all(1)
    return int((~held).sum())


def crossing_edges(points: np.ndarray, faces: np.ndarray, edges: np.ndarray) -> tuple[int, int]:
    """Count edges [E, 2] that pass through a face which they do not belong to, of a fixed sample.

    The ends are left out by a hundredth of the edge, so that touching faces do not count.
    """
    if len(edges) > EDGE_SAMPLE:
        edges = edges[np.random.default_rng(0).choice(len(edges), EDGE_SAMPLE, replace=False)]
    scene = EmbreeScene()
    TriangleMesh(scene, points.astype(np.float32), faces.astype(np.int32))
    start, along = points[edges[:, 0]], points[edges[:, 1]] - points[edges[:, 0]]
    length = np.linalg.norm(along, axis=1)
    keep = length > 1e-5
    edges, start, along, length = edges[keep], start[keep], along[keep], length[keep]
    if len(edges) == 0:
        return 0, 0
    along /= length[:, None]
    origin = start + 0.01 * length[:, None] * along
    hit = scene.run(
        origin.astype(np.float32), along.astype(np.float32), query="INTERSECT", output=True
    )
    face, distance = hit["primID"], hit["tfar"]
    through = (face >= 0) & (distance > 0) & (distance < 0.98 * length)
    corners = faces[np.where(through, face, 0)]
    own = (corners[:, :, None] == edges[:, None, :]).any((1, 2))
    through &= ~own
    # A face that the edge lies in, rather than crosses, is a matter of rounding.
    normal = np.cross(
        points[corners[:, 1]] - points[corners[:, 0]], points[corners[:, 2]] - points[corners[:, 0]]
    )
    size = np.linalg.norm(normal, axis=1)
    slope = np.abs(np.einsum("ei,ei->e", normal, along))
    return int((through & (slope > 0.02 * size)).sum()), len(edges)
