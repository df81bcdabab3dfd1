"""What conversion promises for any triangles: random soups, and sheets that lie close to solids."""

import igl
import numpy as np
import pytest
import torch
import trimesh
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from model.marching_cubes import marching_cubes
from model.sdf import SparseSDF, voxel_centres
from tasks.conversion import convert
from tasks.mesh import normalise

TETRAHEDRON = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])


def grid_values(sdf: SparseSDF) -> np.ndarray:
    """The field on the whole grid; NaN where no block is stored."""
    side = sdf.resolution // 8
    grid = np.full((side, side, side, 8, 8, 8), np.nan)
    grid[tuple(sdf.blocks.T)] = sdf.values
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape((sdf.resolution,) * 3)


def grid_points(resolution: int) -> np.ndarray:
    axis = voxel_centres(np.arange(resolution), resolution)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def distances(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Brute force in float64."""
    squared = igl.point_mesh_squared_distance(points.reshape(-1, 3), vertices, faces)[0]
    return np.sqrt(squared).reshape(points.shape[:-1])


def areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


@st.composite
def soups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Triangles with flipped, doubled and degenerate ones, and perhaps a closed tetrahedron.

    Returns vertices, faces and how many faces (0 or 4) from the front are the tetrahedron's.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 30))
    solid = draw(st.booleans()) or count == 0
    size = draw(st.sampled_from([0.02, 0.2, 1.0]))
    corners = rng.uniform(-1, 1, (count, 1, 3)) + rng.normal(0, size, (count, 3, 3))
    shape = draw(st.sampled_from(["free", "flat", "slivers", "on the grid"]))
    if shape == "flat":
        corners[..., 2] = np.round(corners[..., 2])
    elif shape == "slivers":
        corners[:, 2] = corners[:, 1] + 1e-4 * corners[:, 2]
    elif shape == "on the grid":
        corners = np.round(corners * 8) / 8
    vertices, faces = corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3)
    if count:
        doubled = rng.integers(0, count, draw(st.integers(0, 3)))
        faces = np.concatenate([faces, faces[doubled][:, ::-1], faces[:1, [0, 0, 1]]])
    if solid:
        tetrahedron = 1.2 * np.array([[-1.0, -1, -1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])
        vertices = np.concatenate(
            [tetrahedron @ np.linalg.qr(rng.normal(size=(3, 3)))[0], vertices]
        )
        faces = np.concatenate([TETRAHEDRON, faces + 4])
        flipped = rng.random(4) < 0.5
        faces[:4][flipped] = faces[:4][flipped][:, ::-1]
    assume(areas(vertices, faces).max() > 1e-3)
    return normalise(vertices), faces, 4 if solid else 0


@settings(max_examples=25, deadline=None)
@given(soups(), st.sampled_from([32, 48]))
def test_any_soup_gives_a_closed_surface_with_the_right_sign(
    soup: tuple[np.ndarray, np.ndarray, int], resolution: int
) -> None:
    vertices, faces, solid = soup
    result = convert(vertices, faces, resolution)
    assert result.closed
    voxel = 2 / resolution
    values, points = grid_values(result.sdf), grid_points(resolution)
    stored = ~np.isnan(values)
    distance = distances(points, vertices, faces)

    # Whatever the outside reaches past places of three voxels is outside.
    regions, _ = ndimage.label(distance >= 1.5 * voxel + 1e-6)
    border = np.ones(regions.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    wide = np.isin(regions, np.setdiff1d(regions[border], 0))
    assert (values[wide & stored] > 0).all()
    assert (values[border & stored] > 0).all()

    if solid:  # inside the tetrahedron is inside, whatever else there is
        corners = vertices[faces[:4]]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        inward = np.sign(((corners.mean((0, 1)) - corners[:, 0]) * normals).sum(1))
        heights = ((points[..., None, :] - corners[:, 0]) * normals).sum(-1) * inward
        # The engine moves the grid by some 1e-5 voxels, off planes of symmetry.
        enclosed = (heights > 0).all(-1) & (distances(points, vertices, faces[:4]) > 1e-3 * voxel)
        assert (values[enclosed & stored] < 0).all()

    # No triangle lies outside the result by more than half a voxel.
    centres = vertices[faces[areas(vertices, faces) > 1e-4]].mean(1)
    at = tuple(((centres + 1) * resolution / 2).astype(int).T)
    offset = np.linalg.norm(points[at] - centres, axis=1)
    seen = stored[at]  # the others are deep inside
    assert (values[at] * result.sdf.tau <= offset + 0.5 * voxel)[seen].all()
    if not solid:  # a lone triangle within a voxel of a solid may get lost
        assert result.parts_in == result.parts_out

    # The signs are those of the engine's own watertight surface.
    surface, triangles = marching_cubes(
        torch.from_numpy(result.sdf.blocks), torch.from_numpy(result.sdf.values), resolution
    )
    clear = stored & (np.abs(np.nan_to_num(values)) > 0.01)
    winding = igl.fast_winding_number(
        surface.double().numpy(), triangles.numpy(), np.ascontiguousarray(points[clear])
    )
    np.testing.assert_array_equal(winding > 0.5, values[clear] < 0)


@pytest.mark.parametrize("gap", [0.4, 0.9, 1.4, 2.5])
def test_sheet_close_to_a_solid_is_a_whole_shell(gap: float) -> None:
    """An open band around a drum: seen from outside, its shell has no hole and no bead."""
    voxel = 2 / 64
    radius = 0.5
    drum = trimesh.creation.cylinder(radius, 1.9, sections=64)
    tube = trimesh.creation.cylinder(radius + gap * voxel, 0.8, sections=64)
    caps = np.abs(tube.face_normals[:, 2]) > 0.5
    vertices = np.concatenate([drum.vertices, tube.vertices])
    faces = np.concatenate([drum.faces, tube.faces[~caps] + len(drum.vertices)])
    result = convert(vertices, faces, 64)
    values, points = grid_values(result.sdf), grid_points(64)
    band = distances(points, np.array(tube.vertices), tube.faces[~caps]) - 0.75 * voxel
    distance = np.linalg.norm(points[..., :2], axis=-1)
    beyond = (distance > radius + gap * voxel) & (np.abs(points[..., 2]) < 0.35)
    beyond &= ~np.isnan(values)
    expected = np.clip(band[beyond] / result.sdf.tau, -1, 1)
    np.testing.assert_allclose(values[beyond], expected, atol=1e-5)
    assert result.closed
    assert result.parts_in == result.parts_out == 2
