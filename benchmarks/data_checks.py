"""What a conversion is worth, measured on meshes alone: none of the engine's own counts is used.

Surfaces are (vertices [V, 3], faces [F, 3]) in [-1, 1]; distances are in voxels of a resolution.
"""

import tempfile
from dataclasses import dataclass, replace

import igl
import numpy as np
import torch
from pyarrow import fs
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.marching_cubes import marching_cubes
from model.sdf import BLOCK, SparseSDF, truncation
from tasks.distance import edge_crossings
from tasks.metrics import Surface, face_normals, sample_surface, visible_points
from tasks.shards import ShardWriter, encode_sdf, sdf_file
from tasks.sparse_engine import SHIFT, weld

PART_SIZE = 2.0  # parts whose bounding box has a shorter diagonal are not counted, in voxels
PART_SAMPLES = 32
PART_DISTANCE = 1.75  # a sample is found within this of the result: a shell stands off by 0.75
POINTS = 30_000  # samples of a surface


@dataclass(frozen=True)
class Original:
    """A normalised mesh as the checks see it, whatever the resolution.

    surface: welded. parts: [F], which connected part (sharing vertices) a face is of. closed: [P]
    bool, every edge of the part has an even number of faces. visible: [F] bool, some sample of the
    face can be seen from outside.
    """

    surface: Surface
    parts: np.ndarray
    closed: np.ndarray
    visible: np.ndarray

    @classmethod
    def of(cls, vertices: np.ndarray, faces: np.ndarray) -> "Original":
        """Weld a mesh and look at it from outside."""
        vertices, faces = weld(vertices, np.asarray(faces, np.int64))
        ends = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
        links = coo_array((np.ones(len(ends)), tuple(ends.T)), (len(vertices),) * 2)
        labels = connected_components(links, directed=False)[1]
        parts = np.unique(labels[faces[:, 0]], return_inverse=True)[1]
        _, edge, uses = np.unique(
            ends[:, 0] * len(vertices) + ends[:, 1], return_inverse=True, return_counts=True
        )
        closed = np.ones(parts.max() + 1, bool)
        closed[parts[(uses[edge] % 2 == 1).reshape(-1, 3).any(1)]] = False
        return cls((vertices, faces), parts, closed, visible_faces(vertices, faces))


def visible_faces(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:  # [F] bool
    """Say which faces have a visible sample: three inside each face, and POINTS by area."""
    drawn, chosen = sample_surface(vertices, faces, POINTS, 0)
    inner = np.einsum("ij,fjk->fik", np.full((3, 3), 1 / 6) + np.eye(3) / 2, vertices[faces])
    positions = np.concatenate([inner.reshape(-1, 3), drawn])
    of_face = np.concatenate([np.repeat(np.arange(len(faces)), 3), chosen])
    normals = face_normals(vertices, faces)[of_face]
    visible = np.zeros(len(faces), bool)
    visible[of_face[visible_points((vertices, faces), positions, normals)]] = True
    return visible


def parts_found(original: Original, result: Surface, resolution: int) -> tuple[int, int]:
    """Return (parts of the original above PART_SIZE with a visible sample, those found).

    A part is found when at least half of its visible samples, of PART_SAMPLES drawn by area, lie
    within PART_DISTANCE of the result's surface.
    """
    vertices, faces = original.surface
    voxel = 2 / resolution
    order = np.argsort(original.parts, kind="stable")
    first = np.flatnonzero(np.diff(original.parts[order], prepend=-1))
    corners = vertices[faces[order]]
    low = np.minimum.reduceat(corners.min(1), first)
    high = np.maximum.reduceat(corners.max(1), first)
    crosses = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    has_area = np.add.reduceat(np.linalg.norm(crosses, axis=1), first) > 0
    large = np.flatnonzero((np.linalg.norm(high - low, axis=1) > PART_SIZE * voxel) & has_area)
    if not len(large):
        return 0, 0
    last = np.append(first[1:], len(order))
    drawn = [
        sample_surface(vertices, faces[order[first[part] : last[part]]], PART_SAMPLES, int(part))
        for part in large
    ]
    positions = np.concatenate([positions for positions, _ in drawn])
    chosen = np.concatenate(
        [order[first[part] + face] for part, (_, face) in zip(large, drawn, strict=True)]
    )
    normals = face_normals(vertices, faces)[chosen]
    visible = visible_points(original.surface, positions, normals).reshape(-1, PART_SAMPLES)
    squared = igl.point_mesh_squared_distance(positions, *_plain(result))[0]
    near = (squared <= (PART_DISTANCE * voxel) ** 2).reshape(-1, PART_SAMPLES)
    counted = visible.any(1)
    found = counted & (2 * (near & visible).sum(1) >= visible.sum(1))
    return int(counted.sum()), int(found.sum())


def surface_errors(original: Original, result: Surface, resolution: int) -> dict[str, float]:
    """Return how far the result lies from the visible original, in voxels, at closed parts.

    Samples of the result whose nearest visible face is of a closed part; none if there are hardly
    any. error_*: of all of them, so that a wall which the result has and nobody sees counts too;
    seen_*: of those that can be seen from outside.
    """
    vertices, faces = original.surface
    faces, parts = faces[original.visible], original.parts[original.visible]
    positions, chosen = sample_surface(*result, POINTS, 0)
    squared, nearest, _ = igl.point_mesh_squared_distance(positions, *_plain((vertices, faces)))
    kept = original.closed[parts[nearest]]
    if kept.sum() < POINTS // 100:
        return {}
    errors = np.sqrt(squared[kept]) * resolution / 2
    normals = face_normals(*result)[chosen[kept]]
    seen = visible_points(result, positions[kept], normals)
    figures = {"error_median": np.median(errors), "error_99": np.percentile(errors, 99)}
    figures["seen_share"] = seen.mean()
    if seen.any():
        figures["seen_99"] = np.percentile(errors[seen], 99)
    return {name: float(value) for name, value in figures.items()}


def contradictions(sdf: SparseSDF, surface: Surface) -> int:
    """Count the grid edges at stored blocks where the signs and the surface disagree.

    An edge between voxels must be crossed an odd number of times just where the sign changes: then
    the sign of each voxel is that of the closed surface. Edges that leave the blocks must not be.
    """
    count, side = len(sdf.blocks), sdf.resolution // BLOCK
    # One row more, for what lies outside all blocks: nothing may cross there.
    rows = np.full((side, side, side), count, np.int32)
    rows[tuple(sdf.blocks.T)] = np.arange(count)
    positions = (np.asarray(surface[0], np.float64) + 1) * (sdf.resolution / 2) - 0.5
    odd = edge_crossings(positions[surface[1]] + SHIFT, rows, count + 1)[1]
    crossed = np.unpackbits(odd.view(np.uint8), bitorder="little").view(bool)
    crossed = crossed.reshape(3, count + 1, BLOCK, BLOCK, BLOCK)
    inside = sdf.values < 0
    wrong = int(crossed[:, count].sum())
    for axis in range(3):
        beyond = sdf.blocks + np.eye(3, dtype=np.int32)[axis]
        next_row = rows[tuple(np.minimum(beyond, side - 1).T)]
        next_row = np.where(beyond[:, axis] < side, next_row, count)
        here = np.moveaxis(inside, axis + 1, 1)
        after = here[:, -1:].copy()  # no change towards what is not stored
        known = np.flatnonzero(next_row < count)
        after[known] = here[next_row[known], :1]
        changes = here != np.concatenate([here[:, 1:], after], 1)
        wrong += int((changes != np.moveaxis(crossed[axis, :count], axis + 1, 1)).sum())
    return wrong


def quantised(values: np.ndarray, bits: int) -> np.ndarray:
    """Return codes of so many bits as `tasks.shards.quantise` makes them of 16."""
    last = 2 ** (bits - 1) - 1
    codes = np.clip(np.floor(values * np.float32(last + 1)), -last, last - 1).astype(np.int32)
    codes[values == -1], codes[values == 1] = -last - 1, last
    return codes


def storage_at(sdf: SparseSDF, surface: Surface, bits: int) -> dict[str, float]:
    """Return what storing a field with so many bits a value takes and loses.

    bytes: of the Parquet file, codes in the upper bits of int16. error_99: percentile of how far
    the surface's vertices move, in voxels. normals: mean cosine between the faces' normals before
    and after, by area. Mid-rise codes keep every sign, so that both surfaces have the same faces.
    """
    codes = quantised(sdf.values, bits)
    last = 2 ** (bits - 1) - 1
    values = ((codes + 0.5) / (last + 1)).astype(np.float32)
    values[codes == -last - 1], values[codes == last] = -1, 1
    stored = replace(encode_sdf(sdf), codes=(codes << (16 - bits)).astype("<i2"))
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(fs.LocalFileSystem(), folder) as writer:
            writer.add_sdf("0" * 64, stored)
        size = writer.files[sdf_file(sdf.resolution)].size
    points, faces = marching_cubes(
        torch.from_numpy(sdf.blocks), torch.from_numpy(values), sdf.resolution
    )
    assert np.array_equal(faces.numpy(), surface[1])
    moved = np.linalg.norm(points.numpy().astype(np.float64) - surface[0], axis=1)
    before, after = (
        face_normals(vertices, surface[1]) for vertices in (surface[0], points.numpy())
    )
    corners = np.asarray(surface[0], np.float64)[surface[1]]
    crosses = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    cosines = np.einsum("ij,ij->i", before, after)
    return {
        "bytes": float(size),
        "error_99": float(np.percentile(moved, 99) * sdf.resolution / 2),
        "normals": float(np.average(cosines, weights=np.linalg.norm(crosses, axis=1))),
    }


def halved(sdf: SparseSDF) -> SparseSDF:
    """Return the field at half the resolution by interpolation: means of 2^3 samples.

    A coarse centre lies midway between eight fine ones, so that trilinear interpolation is their
    mean. Blocks around the stored ones are there, too, so that no cell of the surface is missed
    where the fine band is narrow. No edge is marked sharp.
    """
    side = sdf.resolution // BLOCK
    rows = np.full((side, side, side), -1, np.int32)
    rows[tuple(sdf.blocks.T)] = np.arange(len(sdf.blocks))
    # Blocks that are not stored have one sign each, that of the voxels beside them.
    regions, count = ndimage.label(rows < 0)
    signs = np.ones(count + 1, np.float32)
    for axis in range(3):
        for step, end in ((-1, 0), (1, BLOCK - 1)):
            beside = sdf.blocks + step * np.eye(3, dtype=np.int32)[axis]
            known = ((beside >= 0) & (beside < side)).all(1)
            region = regions[tuple(beside[known].T)]
            value = sdf.values.take(end, axis + 1)[known].mean((1, 2))
            signs[region[region > 0]] = np.sign(value[region > 0])
    held = np.zeros((side // 2,) * 3, bool)
    held[tuple(sdf.blocks.T // 2)] = True
    coarse = np.argwhere(ndimage.binary_dilation(held, np.ones((3, 3, 3)))).astype(np.int32)
    fine = np.empty((len(coarse), *(2 * BLOCK,) * 3), np.float32)
    for corner in np.ndindex(2, 2, 2):
        place = tuple((2 * coarse + corner).T)
        part = tuple(slice(BLOCK * c, BLOCK * (c + 1)) for c in corner)
        row = rows[place]
        stored = sdf.values[np.maximum(row, 0)]
        fine[(slice(None), *part)] = np.where(
            (row >= 0)[:, None, None, None], stored, signs[regions[place]][:, None, None, None]
        )
    values = fine.reshape(-1, BLOCK, 2, BLOCK, 2, BLOCK, 2).mean((2, 4, 6))
    values *= sdf.tau / truncation(sdf.resolution // 2)
    return SparseSDF(sdf.resolution // 2, coarse, values, np.zeros(values.shape, bool))


def _plain(surface: Surface) -> Surface:
    return np.ascontiguousarray(surface[0], np.float64), np.ascontiguousarray(surface[1], np.int64)
