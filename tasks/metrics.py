"""Scores between triangle meshes and between sets of shapes; needs no network and no weights.

Frame: meshes in [-1, 1]^3. Distances are in that unit and not squared, unless a name says squared.
Distances go from sampled points of one mesh to the exact surface of the other, so they have no
floor from the density of samples; figures of papers that compare samples with samples are larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import igl
import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

Surface = tuple[np.ndarray, np.ndarray]  # vertices [V, 3] float, faces [F, 3] int
DIRECTIONS = 128  # from which a point is looked at
LIFT = 1e-4  # of a ray's start off its face, above float32's error in a frame of size 2


def f_score_name(threshold: float) -> str:
    """Return the key of surface_scores that holds the F-score at a distance."""
    return f"f_score_{threshold:.6g}"


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, points: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points uniformly by area: positions [points, 3] and the face of each [points].

    Raises ValueError when the mesh has no area, which is what a failed generation looks like.
    """
    corners = np.asarray(vertices, np.float64)[np.asarray(faces)]
    areas = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
    )
    total = areas.sum()
    if not total > 0:
        raise ValueError(
            f"a mesh of {len(faces)} faces and area {total} has no surface to sample; "
            "score an empty result as a failure instead"
        )
    rng = np.random.default_rng(seed)
    # Stratified along the sum of areas: less noise than independent draws, the same density.
    at = (np.arange(points) + rng.random(points)) / points * total
    chosen = np.minimum(np.searchsorted(np.cumsum(areas), at, side="right"), len(faces) - 1)
    u, v = rng.random((2, points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    corner = corners[chosen]
    return corner[:, 0] + u * (corner[:, 1] - corner[:, 0]) + v * (corner[:, 2] - corner[:, 0]), (
        chosen
    )


def visible_samples(
    vertices: np.ndarray, faces: np.ndarray, points: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points by area and keep those that can be seen from outside: positions and faces.

    len(result) / points is the visible share of the area. For comparing with meshes whose hidden
    interior a conversion rightly drops.
    """
    vertices = np.asarray(vertices, np.float64)
    positions, chosen = sample_surface(vertices, faces, points, seed)
    visible = visible_points((vertices, faces), positions, face_normals(vertices, faces)[chosen])
    return positions[visible], chosen[visible]


def visible_points(
    surface: Surface, positions: np.ndarray, normals: np.ndarray
) -> np.ndarray:  # [P] bool
    """Say which points [P, 3] on a mesh, with normals [P, 3], can be seen from outside.

    A point is visible when a ray from either side of its face, in one of DIRECTIONS directions
    spread over the sphere, leaves the mesh unhindered.
    """
    scene = EmbreeScene()
    TriangleMesh(scene, surface[0].astype(np.float32), np.asarray(surface[1], np.int32))
    hidden = np.arange(len(positions))
    for direction in fibonacci_sphere(DIRECTIONS):
        if not len(hidden):
            break
        side = np.where(normals[hidden] @ direction > 0, LIFT, -LIFT)[:, None]
        origins = (positions[hidden] + side * normals[hidden]).astype(np.float32)
        rays = np.broadcast_to(direction.astype(np.float32), origins.shape).copy()
        hidden = hidden[scene.run(origins, rays, query="OCCLUDED") != -1]
    visible = np.ones(len(positions), bool)
    visible[hidden] = False
    return visible


def interior_share(vertices: np.ndarray, faces: np.ndarray, points: int, seed: int = 0) -> float:
    """Return the share of a mesh's area, in [0, 1], that can't be seen from outside.

    To within about 1 / sqrt(points): what `visible_samples` drops. Inner layers and hidden parts
    make it large.
    """
    return 1 - len(visible_samples(vertices, faces, points, seed)[0]) / points


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return unit normals [F, 3]; zero for a face without area."""
    corners = np.asarray(vertices, np.float64)[np.asarray(faces)]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


def fibonacci_sphere(count: int) -> np.ndarray:
    """Return unit directions [count, 3], evenly spread."""
    y = 1 - (2 * np.arange(count) + 1) / count
    turn = np.arange(count) * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - y * y)
    return np.stack([ring * np.cos(turn), y, ring * np.sin(turn)], axis=1)


@dataclass(frozen=True)
class SurfaceDistances:
    """From points on one mesh to the surface of another.

    distances: [P] float64 in [-1, 1] units. cosines: [P], absolute cosine between the normals of
    the two faces.
    """

    distances: np.ndarray
    cosines: np.ndarray


def distances_to(
    target: Surface, positions: np.ndarray, normals: np.ndarray | None = None
) -> SurfaceDistances:
    """Measure the exact distance of positions [P, 3] (with normals [P, 3]) to the mesh target."""
    vertices = np.ascontiguousarray(target[0], np.float64)
    faces = np.ascontiguousarray(target[1], np.int64)
    squared, nearest, _ = igl.point_mesh_squared_distance(positions, vertices, faces)
    cosines = np.ones(len(positions))
    if normals is not None:
        cosines = np.abs(np.einsum("ij,ij->i", normals, face_normals(vertices, faces)[nearest]))
    return SurfaceDistances(np.sqrt(np.maximum(squared, 0)), cosines)


def surface_scores(
    predicted: Surface,
    reference: Surface,
    thresholds: Sequence[float],
    points: int = 100_000,
    seed: int = 0,
    visible_only: bool = False,
) -> dict[str, float]:
    """Score a predicted mesh against a reference; both in [-1, 1].

    points: samples on each mesh. thresholds: distances of the F-scores, not squared.
    visible_only: measure completeness on the part of the reference that is visible from outside.

    accuracy_*: from predicted to reference; completeness_*: from reference to predicted (mean,
    median, p99). chamfer: mean of the two means; chamfer_squared: the same of squared distances
    (papers that add the directions have twice these). f_score_<d> in [0, 1]: harmonic mean of the
    shares within d. hausdorff: largest of all distances, over the samples. normal_consistency:
    mean absolute cosine at nearest points, of both directions.
    """
    near = {}
    for name, source, target, choose in (
        ("accuracy", predicted, reference, sample_surface),
        ("completeness", reference, predicted, visible_samples if visible_only else sample_surface),
    ):
        positions, chosen = choose(*source, points, seed)
        if not len(positions):
            raise ValueError("no sample of the reference is visible: pass visible_only=False")
        near[name] = distances_to(target, positions, face_normals(*source)[chosen])
    scores = {}
    for name, found in near.items():
        scores[f"{name}_mean"] = float(found.distances.mean())
        scores[f"{name}_median"] = float(np.median(found.distances))
        scores[f"{name}_p99"] = float(np.percentile(found.distances, 99))
    both = list(near.values())
    scores["chamfer"] = float(np.mean([d.distances.mean() for d in both]))
    scores["chamfer_squared"] = float(np.mean([(d.distances**2).mean() for d in both]))
    scores["hausdorff"] = float(max(d.distances.max() for d in both))
    scores["normal_consistency"] = float(np.mean([d.cosines.mean() for d in both]))
    for threshold in thresholds:
        precision, recall = (float((d.distances <= threshold).mean()) for d in both)
        total = precision + recall
        scores[f_score_name(threshold)] = 2 * precision * recall / total if total else 0.0
    return scores


def volume_iou(
    predicted: Surface, reference: Surface, points: int = 100_000, seed: int = 0
) -> float:
    """Return intersection over union of the volumes of two closed meshes, by uniform points.

    points are drawn in the box around both; inside is a fast winding number above 0.5.
    Raises ValueError when neither mesh encloses one.
    """
    both = np.concatenate([predicted[0], reference[0]])
    queries = np.random.default_rng(seed).uniform(both.min(0), both.max(0), (points, 3))
    inside = [
        igl.fast_winding_number(
            np.ascontiguousarray(vertices, np.float64),
            np.ascontiguousarray(faces, np.int64),
            queries,
        )
        > 0.5
        for vertices, faces in (predicted, reference)
    ]
    union = np.count_nonzero(inside[0] | inside[1])
    if not union:
        raise ValueError(f"neither mesh encloses any of {points} points: close and orient them")
    return float(np.count_nonzero(inside[0] & inside[1]) / union)


@dataclass(frozen=True)
class Topology:
    """Counts of a mesh after vertices at equal positions are merged and empty faces dropped.

    watertight: every edge has exactly two faces, which run along it in opposite directions.
    euler_number: V - E + F. components: parts that share no vertex.
    """

    watertight: bool
    components: int
    euler_number: int
    boundary_edges: int
    nonmanifold_edges: int


def topology(vertices: np.ndarray, faces: np.ndarray) -> Topology:
    """Count the parts, holes and edges of a mesh."""
    _, merged = np.unique(np.asarray(vertices), axis=0, return_inverse=True)
    faces = merged.reshape(-1)[np.asarray(faces)]
    distinct = (np.sort(faces, 1)[:, 1:] != np.sort(faces, 1)[:, :-1]).all(1)
    faces = faces[distinct]
    if not len(faces):
        return Topology(False, 0, 0, 0, 0)
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    half_edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward = half_edges[:, 0] < half_edges[:, 1]
    # One number an edge: rows would take several times as long to sort.
    low, high = np.sort(half_edges, 1).T
    edges, edge, uses = np.unique(low * len(used) + high, return_inverse=True, return_counts=True)
    balance = np.bincount(edge, weights=np.where(forward, 1, -1))
    ends = np.divmod(edges, len(used))
    graph = coo_array((np.ones(len(edges)), ends), shape=(len(used), len(used)))
    return Topology(
        watertight=bool((uses == 2).all() and (balance == 0).all()),
        components=int(connected_components(graph, directed=False)[0]),
        euler_number=len(used) - len(edges) + len(faces),
        boundary_edges=int((uses == 1).sum()),
        nonmanifold_edges=int((uses > 2).sum()),
    )


def set_scores(
    generated: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> dict[str, float]:
    """Compare two sets of point clouds [P, 3] of one size: coverage, MMD and 1-NN accuracy.

    The distance is Chamfer between samples, squared, both directions added. coverage: share of
    reference clouds that are some generated cloud's nearest. mmd_squared: mean over reference
    clouds of the distance to the nearest generated. one_nn_accuracy: leave-one-out share of clouds
    whose nearest neighbour is of their own set; 0.5 is best, 1 when the sets can be told apart.
    """
    clouds = [*generated, *reference]
    if not len(generated) or not len(reference):
        raise ValueError(
            f"{len(generated)} generated, {len(reference)} reference: need one of each"
        )
    trees = [cKDTree(cloud) for cloud in clouds]
    distance = np.full((len(clouds), len(clouds)), np.inf)
    for i in range(len(clouds)):
        for j in range(i):
            forward, backward = trees[j].query(clouds[i])[0], trees[i].query(clouds[j])[0]
            distance[i, j] = distance[j, i] = (forward**2).mean() + (backward**2).mean()
    across = distance[: len(generated), len(generated) :]
    own = np.arange(len(clouds)) < len(generated)
    return {
        "coverage": len(np.unique(across.argmin(1))) / len(reference),
        "mmd_squared": float(across.min(0).mean()),
        "one_nn_accuracy": float((own[distance.argmin(1)] == own).mean()),
    }
