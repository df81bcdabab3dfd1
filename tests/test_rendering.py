"""Views and face pictures against projected truth; colours, light and alpha."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import rendering
from tasks.mesh import Material, Mesh, normalise
from tasks.procedural import FAMILIES, procedural_mesh
from tasks.rendering import (
    Camera,
    orbit_camera,
    render_faces,
    render_geometry,
    render_normals,
    render_views,
)
from tasks.torch_rendering import draw_views

QUAD = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float64) * 0.9
QUAD_FACES = np.array([[0, 1, 2], [0, 2, 3]])
QUAD_UV = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
DEV = Path(os.environ.get("GIGASHAPE_SHARED", "/nowhere")) / "meshes/dev"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FRONT = orbit_camera(azimuth=90, elevation=0, focal_mm=50, points=QUAD)


def box(low: list[float], high: list[float]) -> tuple[np.ndarray, np.ndarray]:
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    faces = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]]
    faces += [[2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    return np.array(low) + corners * (np.array(high) - low), np.array(faces)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 360), st.floats(-90, 90), st.floats(30, 100), st.integers(0, 10**6))
def test_a_known_point_is_where_its_pixel_is(
    azimuth: float, elevation: float, focal: float, seed: int
) -> None:
    # A tetrahedron of 0.02 around a point: its pixels must lie around the point's projection,
    # which is worked out here from the pose and the field of view alone.
    point = np.random.default_rng(seed).uniform(-0.5, 0.5, 3)
    vertices = point + 0.02 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
    camera = orbit_camera(azimuth, elevation, focal)
    x, y, z = (np.linalg.inv(camera.camera_to_world) @ [*point, 1])[:3]
    assert z < 0  # it looks down -z
    scale = -z * np.tan(camera.fov / 2)
    expected = (x / scale + 1) * 100, (1 - y / scale) * 100
    rows, columns = np.nonzero(render_faces(vertices, faces, camera, 200) >= 0)
    assert columns.mean() + 0.5 == pytest.approx(expected[0], abs=1.0)
    assert rows.mean() + 0.5 == pytest.approx(expected[1], abs=1.0)


def test_up_right_and_front() -> None:
    front, _ = FRONT.project(np.array([[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0.0]]), 100)
    assert front[0, 1] < 50  # +y is up
    assert front[1, 0] > 50  # seen from +z, +x is right
    assert front[2] == pytest.approx([50, 50])
    assert FRONT.camera_to_world[2, 3] > 1


def test_views_have_the_papers_cameras_fill_the_frame_and_repeat() -> None:
    mesh = Mesh(*box([-0.95, -0.3, -0.4], [0.95, 0.3, 0.4]))
    views = render_views(mesh, 24, 96, seed=3)
    again = render_views(mesh, 24, 96, seed=3)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(views, again, strict=True))
    assert not np.array_equal(views[0].image, render_views(mesh, 1, 96, seed=4)[0].image)
    for view in views:
        eye = view.camera_to_world[:3, 3]
        elevation = np.degrees(np.arcsin(eye[1] / np.linalg.norm(eye)))
        azimuth = np.degrees(np.arctan2(eye[2], eye[0]))
        assert 10 <= elevation <= 40
        assert 0 <= azimuth <= 180
        assert 30 <= 18 / np.tan(view.fov / 2) <= 100
        assert np.allclose(view.camera_to_world[:3, :3].T @ view.camera_to_world[:3, :3], np.eye(3))
        assert np.linalg.det(view.camera_to_world[:3, :3]) == pytest.approx(1)
        mask = view.image[..., 3] > 0
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        reach = max(np.abs(np.argwhere(mask) - 47.5).max(0))
        assert reach >= 0.9 * 48


def test_texture_is_upright_and_multiplied_by_the_material() -> None:
    texture = np.full((4, 4, 4), 255, np.uint8)
    texture[:2, :2, :3] = [255, 0, 0]  # upper left
    texture[2:, 2:, :3] = [0, 0, 255]  # lower right
    material = Material((1.0, 1.0, 0.5, 0.1), texture)
    mesh = Mesh(QUAD, QUAD_FACES, uv=QUAD_UV, materials=(material,))
    image = rendering._draw(QUAD, QUAD_FACES, FRONT, 64, rendering.Paint.of(mesh, 64))
    assert image[32, 32, 3] == 255  # drawn opaque whatever its alpha
    upper_left, lower_right, other = image[16, 16, :3], image[48, 48, :3], image[16, 48, :3]
    assert upper_left[0] > 3 * upper_left[1]
    assert lower_right[2] > 2 * lower_right[0]
    assert other[0] == other[1] > 1.5 * other[2] > 0


def test_texture_repeats_and_large_ones_shrink() -> None:
    texture = np.zeros((2048, 2048, 4), np.uint8)
    texture[:1024, :, 0] = 255
    uv = QUAD_UV + 3
    mesh = Mesh(QUAD, QUAD_FACES, uv=uv, materials=(Material((1, 1, 1, 1), texture),))
    paint = rendering.Paint.of(mesh, 128)
    assert paint.textures[0, 1:].tolist() == [128, 128]
    image = rendering._draw(QUAD, QUAD_FACES, FRONT, 64, paint)
    assert image[16, 32, 0] > 150 > 60 > image[48, 32, 0]


def test_vertex_colours_are_interpolated() -> None:
    colours = np.array([[255, 0, 0], [255, 0, 0], [0, 255, 0], [0, 255, 0]], np.uint8)
    mesh = Mesh(QUAD, QUAD_FACES, vertex_colours=np.c_[colours, np.full(4, 255, np.uint8)])
    image = rendering._draw(QUAD, QUAD_FACES, FRONT, 64, rendering.Paint.of(mesh, 64)).astype(int)
    assert image[6, 32, 1] > image[6, 32, 0] + 60
    assert image[57, 32, 0] > image[57, 32, 1] + 60
    assert abs(image[32, 32, 0] - image[32, 32, 1]) < 12


def test_both_sides_are_lit_and_black_is_not_black() -> None:
    mesh = Mesh(QUAD, QUAD_FACES)
    flipped = Mesh(QUAD, QUAD_FACES[:, ::-1])
    seen, back = (render_views(m, 4, 64, seed=0) for m in (mesh, flipped))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(seen, back, strict=True))
    black = Mesh(*box([-0.9] * 3, [0.9] * 3), materials=(Material((0, 0, 0, 1)),))
    picture = render_views(black, 1, 64, seed=0)[0].image
    shades = picture[picture[..., 3] == 255][:, :3]
    assert shades.min() > 10
    assert len(np.unique(shades)) >= 3  # its sides can be told apart


def test_alpha_is_straight() -> None:
    views = render_views(Mesh(*box([-0.9] * 3, [0.9] * 3)), 1, 64, seed=1)
    image = views[0].image.astype(int)
    partial = (image[..., 3] > 0) & (image[..., 3] < 255)
    assert partial.sum() > 20
    # With premultiplied alpha the outline would be darker than every face.
    full = image[image[..., 3] == 255][:, 0]
    assert image[partial][:, 0].min() >= full.min() - 1


def test_nearer_face_wins_through_perspective() -> None:
    # Two crossing quads: the boundary is where they cross, not where a linear depth would put it.
    wall = QUAD.copy()
    wall[:, 2] = np.where(QUAD[:, 0] < 0, -0.9, 0.9)
    vertices = np.concatenate([QUAD, wall])
    faces = np.concatenate([QUAD_FACES, QUAD_FACES + 4])
    seen = render_faces(vertices, faces, orbit_camera(90, 0, 30, vertices), 101)
    middle = seen[50]
    columns = np.nonzero(middle >= 2)[0]
    assert columns.min() == pytest.approx(50, abs=1)
    assert (middle[20:48] < 2).all()


def test_closed_mesh_has_no_cracks() -> None:
    rng = np.random.default_rng(0)
    n = 40  # a height field whose vertices fall on no pixel grid
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, n), np.linspace(-0.9, 0.9, n), indexing="ij")
    vertices = np.stack([x, y, 0.05 * rng.standard_normal((n, n))], -1).reshape(-1, 3)
    a = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.c_[a, a + n, a + n + 1], np.c_[a, a + n + 1, a + 1]])
    seen = render_faces(vertices, faces, FRONT, 301)
    assert (seen[20:-20, 20:-20] >= 0).all()


def test_awkward_meshes() -> None:
    triangle = Mesh(np.array([[-0.9, 0, 0], [0.9, 0, 0], [0, 0.2, 0.1]]), np.array([[0, 1, 2]]))
    views = render_views(triangle, 2, 63, seed=0)
    assert views[0].image.shape == (63, 63, 4)
    assert views[0].image[..., 3].any()
    empty = render_geometry(np.zeros((0, 3)), np.zeros((0, 3), int), 32)
    assert (empty == 255).all()
    degenerate = render_geometry(np.zeros((3, 3)), np.array([[0, 1, 2]]), 32)
    assert (degenerate == 255).all()
    behind = Camera(np.eye(4), 1.0)  # stands inside the box: faces behind the eye are left out
    assert (render_faces(*box([-0.5] * 3, [0.5] * 3), behind, 32) >= 0).any()


def test_normals_point_at_the_camera() -> None:
    vertices, faces = box([-0.5] * 3, [0.5] * 3)
    faces[::2] = faces[::2, ::-1]  # half of them wound the wrong way
    normals, mask = render_normals(vertices, faces, FRONT, 50)
    assert mask[25, 25]
    assert normals[mask] == pytest.approx(np.broadcast_to([0.0, 0, 1], (mask.sum(), 3)))
    assert (normals[~mask] == 0).all()


def test_a_sliver_whose_weights_cancel_has_its_first_corners_colour() -> None:
    seen = np.zeros((2, 2), np.int32)
    pixels = np.full((3, 2), 5.0)  # all corners in one place: every weight is zero
    local = np.array([[0, 0, -2.0], [1, 0, -2], [0, 1, -2]])
    white = np.ones((1, 3), np.float32)
    corner_colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    image = rendering._shade(
        seen,
        pixels,
        local,
        np.array([[0, 1, 2]]),
        white,
        np.zeros(1, np.int32),
        corner_colours,
        np.zeros((1, 2), np.float32),
        np.zeros((1, 3), np.uint8),
        np.array([[-1, 0, 0]]),
    )
    red, green, blue, alpha = image[0, 0]
    assert alpha == 255
    assert red > 3 * green == 3 * blue > 0


def assert_paths_agree(mesh: Mesh, size: int = 96, views: int = 2) -> None:
    compiled = render_views(mesh, views, size, seed=1)
    cameras = [view.camera for view in compiled]
    paint = rendering.Paint.of(mesh, rendering.SAMPLES * size)
    images = draw_views(mesh.vertices, mesh.faces, cameras, size, paint, DEVICE)
    for view, image in zip(compiled, images, strict=True):
        np.testing.assert_array_equal(view.image, image)


@pytest.mark.parametrize("seed", range(len(FAMILIES)))
def test_torch_draws_the_same_pictures(seed: int) -> None:
    mesh = procedural_mesh(seed)
    assert_paths_agree(replace(mesh, vertices=normalise(mesh.vertices)))


def test_torch_draws_the_same_textures_and_vertex_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.torch_rendering.CHUNK", 1000)  # in many pieces
    rng = np.random.default_rng(0)
    textures = [rng.integers(0, 256, (h, w, 4), np.uint8) for h, w in ((7, 300), (64, 5))]
    materials = (Material((1, 0.5, 1, 1), textures[0]), Material(), Material(texture=textures[1]))
    vertices = np.concatenate([QUAD, QUAD[:, ::-1] * 0.7, QUAD * [0.3, 0.3, 1] + [0, 0, 0.2]])
    mesh = Mesh(
        vertices,
        np.concatenate([QUAD_FACES + 4 * k for k in range(3)]),
        uv=rng.uniform(-2, 3, (12, 2)).astype(np.float32),
        vertex_colours=rng.integers(0, 256, (12, 4), np.uint8),
        materials=materials,
        face_material=np.array([0, 0, 1, 1, 2, 2], np.int32),
    )
    assert_paths_agree(mesh, size=128, views=4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([1e-6, 0.1, 1.0]))
def test_torch_draws_the_same_soups(seed: int, count: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-1, 1, (count, 1, 3))
    corners = (centres + spread * rng.uniform(-1, 1, (count, 3, 3))).reshape(-1, 3)
    corners = np.round(corners, rng.integers(0, 4))  # shared points, needles, faces of no area
    try:
        vertices = normalise(corners)
    except ValueError:
        return
    assert_paths_agree(Mesh(vertices, np.arange(3 * count).reshape(-1, 3)), size=24)


def test_torch_draws_nothing_where_there_is_nothing() -> None:
    paint = rendering.Paint.of(Mesh(QUAD, QUAD_FACES), 32)
    (image,) = draw_views(QUAD, QUAD_FACES[:0], [FRONT], 32, paint, DEVICE)
    assert not image.any()
    (image,) = draw_views(QUAD - [0, 0, 50], QUAD_FACES, [FRONT], 32, paint, DEVICE)
    (behind,) = draw_views(QUAD - [0, 0, -50], QUAD_FACES, [FRONT], 32, paint, DEVICE)
    assert image.any()
    assert not behind.any()
