"""The sparse conversion engine: triangles to a signed narrow band, without a dense grid.

Steps: exact distances in the blocks near triangles (`tasks/distance.py`); what is outside
(`tasks/sign.py`); hidden walls dropped, thin parts made shells, holes capped (`tasks/shell.py`);
sharp edges (`tasks/sharp.py`). Memory and time grow with the surface; the only dense tables have
one entry a block of 8^3 voxels. A part that is closed keeps its surface where it is.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.compiled import compiled
from model.sdf import BLOCK, SparseSDF, truncation
from tasks import shell
from tasks.distance import (
    block_distances,
    block_pairs,
    crossing_votes,
    edge_crossings,
    group_pairs,
)
from tasks.masks import NONE, ONE, below, block_neighbours, lowest, voxels_of
from tasks.mesh import MeshRejectedError
from tasks.sharp import mark_sharp, sharp_edges
from tasks.sign import oriented_patches, outside_voxels
from tasks.sparse_common import PART_SIZE, SHELL, SHIFT, WELD, SparseResult


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
    reach = tau + SHELL
    positions = (vertices + 1) * (resolution / 2) - 0.5
    corners = positions[faces]
    rows, starts, triangles = group_pairs(*block_pairs(corners, side, reach), side)
    blocks = np.argwhere(rows >= 0).astype(np.int32)
    neighbours = block_neighbours(rows, blocks)
    distance, nearest = block_distances(corners, blocks, starts, triangles, reach)
    crossed = corners + SHIFT
    walls, odd, double = edge_crossings(crossed, rows, len(blocks))
    patches, turns = oriented_patches(faces)
    outside, confidence = outside_voxels(corners, blocks, rows, distance, walls, patches, turns)
    parts = _parts(faces, len(vertices))
    near = outside & below(distance, 1.0 + SHELL)
    shell.drop_hidden(rows, neighbours, blocks, corners, walls, outside, distance, nearest, reach)
    solid = shell.solid_voxels(walls, outside, neighbours)
    votes = crossing_votes(crossed, rows, outside, solid, double, patches, int(patches.max()) + 1)
    del solid, double
    sheet = shell.sheet_faces(votes, patches)
    other_walls = (walls, odd)
    if sheet.any():
        other_walls = edge_crossings(crossed[~sheet], rows, len(blocks))[:2]
    thin = shell.thin_cells(
        rows, neighbours, blocks, corners, crossed, starts, triangles, patches, sheet,
        *other_walls, outside, distance, nearest,
    )  # fmt: skip
    field = distance
    _give_sign(field, outside)
    shell.thicken(rows, blocks, corners, thin, sheet, nearest, field)
    near_sheets, nearest_sheet = shell.join_sheets(
        blocks, corners, starts, triangles, sheet, field, reach
    )
    thin_voxels = len(voxels_of(outside & below(field, 0.0)))
    if confidence is not None:
        shell.cap_holes(rows, neighbours, blocks, walls, outside, field)
    _keep_border_outside(field, blocks, resolution)
    shell.bound_corners(neighbours, field)
    # A part that lies in another's shell is not seen: no voxel beside it is left outside.
    seen = shell.nearest_parts(near & ~below(field, 0.0), nearest, parts)
    surface = shell.surface_voxels(neighbours, field)
    found = shell.nearest_parts(surface, nearest, parts)
    nearest[near_sheets] = nearest_sheet
    found |= shell.nearest_parts(surface, nearest, parts)
    counted = seen & (_part_sizes(corners, parts) > PART_SIZE)
    del nearest  # as large as the field
    sharp = np.zeros(field.shape, bool)
    segments = positions[sharp_edges(vertices, faces)]
    mark_sharp(rows, segments, field, SHELL, sharp)
    kept = _truncate(blocks, field, tau, sharp)
    return SparseResult(
        SparseSDF(resolution, blocks[:kept], field[:kept], sharp[:kept]),
        int(counted.sum()),
        int((counted & found).sum()),
        "flood" if confidence is None else "flood+winding",
        1.0 if confidence is None else confidence,
        thin_voxels,
    )


@compiled
def _give_sign(distance: np.ndarray, outside: np.ndarray) -> None:
    """Make distances [B, 8, 8, 8] negative, in place, where the voxel is not outside."""
    for b in range(len(distance)):
        for x in range(BLOCK):
            word = ~outside[b, x]
            while word != NONE:
                v = lowest(word)
                word &= word - ONE
                distance[b, x, v >> 3, v & 7] = -distance[b, x, v >> 3, v & 7]


@compiled
def _truncate(blocks: np.ndarray, field: np.ndarray, tau: float, sharp: np.ndarray) -> int:
    """Scale and clip the field, in place, to [-1, 1], and sharp to the band |values| < 1.

    Blocks that hold a voxel of the band move to the front of all three, in their order; returns
    how many they are.
    """
    values, marks = field.reshape(-1), sharp.reshape(-1)
    kept = 0
    for b in range(len(blocks)):
        to = kept * BLOCK**3
        banded = False
        for i in range(b * BLOCK**3, (b + 1) * BLOCK**3):
            value = np.float32(min(max(values[i] / tau, -1.0), 1.0))
            values[to] = value
            marks[to] = marks[i] & (abs(value) < 1)
            banded |= bool(abs(value) < 1)
            to += 1
        if banded:
            blocks[kept] = blocks[b]
            kept += 1
    return kept


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
