"""The sparse conversion engine: triangles to a signed narrow band, without a dense grid.

Steps: exact distances in the blocks near triangles (`tasks/distance.py`); what is outside
(`tasks/sign.py`); hidden walls dropped, thin parts made shells, holes capped (`tasks/shell.py`);
sharp edges (`tasks/sharp.py`). Memory and time grow with the surface; the only dense tables have
one entry a block of 8^3 voxels. A part that is closed keeps its surface where it is.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.sdf import BLOCK, SparseSDF, truncation
from tasks import shell
from tasks.distance import block_distances, block_pairs, edge_crossings, group_pairs
from tasks.mesh import MeshRejectedError
from tasks.sharp import mark_sharp, sharp_edges
from tasks.sign import outside_voxels

WELD = 2.0**-19  # vertices in the same cell of this size are one: a 500th of a voxel at 2048
# Parts whose bounding box has a shorter diagonal are not counted, in voxels.
PART_SIZE = 2.0
# Grid lines pass the mesh shifted by this, in voxels: models like to put faces, edges and planes
# of symmetry exactly where the samples are.
SHIFT = np.array([1.3e-5, 2.9e-5, 4.7e-5])


@dataclass(frozen=True)
class SparseResult:
    """What the engine found.

    parts_in: connected parts of the mesh (sharing vertices) above PART_SIZE that are seen from
        outside; parts_out: those of them at the surface of the result.
    method, confidence: `flood`, or `flood+winding` with how far the winding numbers of the pockets
        lay from undecided (0: undecided, 1: certain); see `tasks/sign.py`.
    thin_cells: cells whose surface had to be made a shell.
    """

    sdf: SparseSDF
    parts_in: int
    parts_out: int
    method: str
    confidence: float
    thin_cells: int


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices joined where they coincide, and faces without degenerate and double ones.

    A face that occurs more than once, in whatever direction, is kept once. Vertices keep the
    position of the first of those joined.
    """
    cell = np.round(vertices / WELD).astype(np.int64)
    # Twenty-one bits hold a coordinate of [-1, 1]: one key a cell, faster than unique rows.
    cell += 2**20
    key = (cell[:, 0] << 42) | (cell[:, 1] << 21) | cell[:, 2]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (c != a)]
    _, kept = np.unique(np.sort(faces, 1), axis=0, return_index=True)
    return vertices[first], faces[np.sort(kept)]


def sparse_field(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> SparseResult:
    """Return the band of normalised triangles.

    vertices: [V, 3] float64 in [-0.95, 0.95]; faces: [F, 3]. Deterministic. Raises
    MeshRejectedError (`no_area`) when no triangle is left once degenerate ones are gone.
    """
    vertices, faces = weld(vertices, faces)
    if not len(faces):
        raise MeshRejectedError("no_area", "every triangle is degenerate: no surface to convert")
    side = resolution // BLOCK
    tau = truncation(resolution) * resolution / 2
    reach = tau + shell.SHELL
    positions = (vertices + 1) * (resolution / 2) - 0.5
    corners = positions[faces]
    rows, starts, triangles = group_pairs(*block_pairs(corners, side, reach), side)
    blocks = np.argwhere(rows >= 0).astype(np.int32)
    distance, nearest = block_distances(corners, blocks, starts, triangles, reach)
    shifted = corners + SHIFT
    crossings = edge_crossings(shifted, rows, len(blocks))
    outside, confidence = outside_voxels(corners, faces, blocks, rows, distance, crossings)
    seen_distance = distance.copy()
    shell.drop_hidden(rows, blocks, corners, crossings, outside, distance, nearest, reach)
    field = np.where(outside, distance, -distance)
    cells = np.zeros(outside.shape, np.uint8)
    weak = shell.weak_voxels(rows, blocks, outside)
    shell.thin_edges(rows, blocks, shifted, starts, triangles, crossings, outside, weak, cells)
    shell.thin_feet(rows, blocks, corners, outside, weak, distance, nearest, cells)
    shell.settle_excused(rows, blocks, cells)
    shell.thicken(rows, blocks, corners, cells, nearest, field)
    if confidence is not None:
        shell.cap_holes(rows, blocks, crossings, outside, field)
    _keep_border_outside(field, blocks, resolution)
    parts = _parts(faces, len(vertices))
    seen, found = shell.seen_parts(
        rows, blocks, parts, int(parts.max()) + 1, outside, seen_distance, nearest, field
    )
    counted = seen & (_part_sizes(corners, parts) > PART_SIZE)
    sharp = np.zeros(field.shape, bool)
    segments = positions[sharp_edges(vertices, faces)]
    mark_sharp(rows, segments, field, shell.SHELL, sharp)
    values = np.clip(field / tau, -1, 1).astype(np.float32)
    keep = (np.abs(values) < 1).any((1, 2, 3))
    sdf = SparseSDF(
        resolution, blocks[keep], values[keep], sharp[keep] & (np.abs(values[keep]) < 1)
    )
    return SparseResult(
        sdf,
        int(counted.sum()),
        int((counted & found).sum()),
        "flood" if confidence is None else "flood+winding",
        1.0 if confidence is None else confidence,
        int((cells == shell.THIN).sum()),
    )


def _parts(faces: np.ndarray, vertex_count: int) -> np.ndarray:
    """Return the part of each face: faces that share vertices are one."""
    a, b = faces[:, [0, 1]].reshape(-1), faces[:, [1, 2]].reshape(-1)
    links = coo_array((np.ones(len(a), np.int8), (a, b)), (vertex_count, vertex_count))
    _, labels = connected_components(links, directed=False)
    return np.unique(labels[faces[:, 0]], return_inverse=True)[1]


def _part_sizes(corners: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the diagonal of each part's bounding box, in voxels."""
    order = np.argsort(parts, kind="stable")
    first = np.flatnonzero(np.diff(parts[order], prepend=-1))
    low = np.minimum.reduceat(corners.min(1)[order], first)
    high = np.maximum.reduceat(corners.max(1)[order], first)
    return np.linalg.norm(high - low, axis=1)


def _keep_border_outside(field: np.ndarray, blocks: np.ndarray, resolution: int) -> None:
    """Keep shells off the border of the grid, in place: at 32 they would reach beyond it."""
    local = np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), -1)
    rows = np.flatnonzero(((blocks == 0) | (blocks == resolution // BLOCK - 1)).any(1))
    place = blocks[rows, None, None, None] * BLOCK + local
    border = ((place == 0) | (place == resolution - 1)).any(-1)
    field[rows] = np.where(border, np.maximum(field[rows], 0.05), field[rows])
