"""Scores against shapes whose distances, volumes and topology are known."""

import subprocess
import sys

import numpy as np
import pytest
import trimesh

from tasks import metrics
from tasks.metrics import (
    f_score_name,
    interior_share,
    sample_surface,
    set_scores,
    surface_scores,
    topology,
    visible_samples,
    volume_iou,
)
from tasks.normal_metrics import normal_scores, sharp_edges


def sphere(radius: float, subdivisions: int = 5) -> metrics.Surface:
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def box(half: float, centre: tuple[float, float, float] = (0, 0, 0)) -> metrics.Surface:
    mesh = trimesh.creation.box((2 * half,) * 3)
    return np.asarray(mesh.vertices) + centre, np.asarray(mesh.faces)


def plane(z: float, half: float = 0.9) -> metrics.Surface:
    corners = np.array([[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]])
    return corners, np.array([[0, 1, 2], [0, 2, 3]])


def join(*meshes: metrics.Surface) -> metrics.Surface:
    offsets = np.cumsum([0, *(len(vertices) for vertices, _ in meshes)])
    faces = [f + offset for (_, f), offset in zip(meshes, offsets, strict=False)]
    return np.concatenate([v for v, _ in meshes]), np.concatenate(faces)


def test_shifted_planes_are_exactly_the_shift_apart() -> None:
    scores = surface_scores(plane(0.1), plane(0), [0.099, 0.101], points=2000, seed=1)
    for name in ("accuracy_mean", "accuracy_median", "accuracy_p99", "completeness_p99"):
        assert scores[name] == pytest.approx(0.1)
    assert scores["chamfer"] == pytest.approx(0.1)
    assert scores["chamfer_squared"] == pytest.approx(0.01)
    assert scores["hausdorff"] == pytest.approx(0.1)
    assert scores[f_score_name(0.099)] == 0
    assert scores[f_score_name(0.101)] == 1
    assert scores["normal_consistency"] == pytest.approx(1)


def test_concentric_spheres() -> None:
    scores = surface_scores(sphere(0.8), sphere(0.75), [0.04, 0.06], points=5000)
    assert scores["chamfer"] == pytest.approx(0.05, rel=0.01)
    assert scores["chamfer_squared"] == pytest.approx(0.0025, rel=0.02)
    assert scores["f_score_0.04"] == 0
    assert scores["f_score_0.06"] == 1
    assert scores["normal_consistency"] > 0.999
    assert volume_iou(sphere(0.8), sphere(0.75)) == pytest.approx((0.75 / 0.8) ** 3, abs=0.01)


def test_f_score_is_the_harmonic_mean_and_directions_are_not_mixed_up() -> None:
    # Half of the prediction is right, all of the reference is covered.
    prediction = join(plane(0), plane(0.5))
    scores = surface_scores(prediction, plane(0), [0.01], points=20_000)
    assert scores["accuracy_mean"] == pytest.approx(0.25, abs=0.01)
    assert scores["completeness_mean"] == pytest.approx(0, abs=1e-9)
    assert scores["f_score_0.01"] == pytest.approx(2 * 0.5 / 1.5, abs=0.01)
    swapped = surface_scores(plane(0), prediction, [0.01], points=20_000)
    assert swapped["completeness_mean"] == pytest.approx(0.25, abs=0.01)


def test_identical_meshes_and_crossed_planes() -> None:
    same = surface_scores(sphere(0.9), sphere(0.9), [1e-6], points=3000)
    assert same["hausdorff"] < 1e-7
    assert same["f_score_1e-06"] == 1
    vertices, faces = plane(0)
    crossed = vertices[:, [2, 1, 0]], faces
    assert surface_scores((vertices, faces), crossed, [], 2000)["normal_consistency"] < 1e-9


def test_samples_are_uniform_by_area_and_repeat() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [3, 0, 0], [0, -1, 0]], float)
    faces = np.array([[0, 1, 2], [3, 4, 5]])
    positions, chosen = sample_surface(vertices, faces, 40_000, seed=5)
    assert (chosen == 1).mean() == pytest.approx(0.75, abs=0.001)
    centroid = positions[chosen == 1].mean(0)
    assert centroid == pytest.approx([1, -1 / 3, 0], abs=0.02)
    assert (positions[chosen == 0] >= 0).all()
    assert (positions[chosen == 0].sum(1) <= 1).all()
    assert np.array_equal(positions, sample_surface(vertices, faces, 40_000, seed=5)[0])
    with pytest.raises(ValueError, match="no surface to sample"):
        sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 10, 0)
    with pytest.raises(ValueError, match="0 faces"):
        sample_surface(np.zeros((0, 3)), np.zeros((0, 3), int), 10, 0)


def test_only_the_outer_of_two_nested_boxes_is_visible() -> None:
    vertices, faces = join(box(0.8), box(0.4))
    positions, chosen = visible_samples(vertices, faces, 5000, seed=0)
    assert (chosen < 12).all()
    assert len(positions) / 5000 == pytest.approx(0.8, abs=0.005)  # 4 of 5 parts of the area
    assert interior_share(vertices, faces, 5000) == pytest.approx(0.2, abs=0.005)
    assert interior_share(*box(0.8), 500) == 0
    # Without its lid the outer box shows the inner one.
    opened = faces[(vertices[faces][:, :, 1] < 0.7).any(1)]
    assert (visible_samples(vertices, opened, 5000, seed=0)[1] >= len(opened) - 12).any()


def test_visible_only_forgives_a_dropped_interior() -> None:
    reference = join(box(0.8), box(0.4))
    forgiving = surface_scores(box(0.8), reference, [0.01], 3000, visible_only=True)
    strict = surface_scores(box(0.8), reference, [0.01], 3000)
    assert forgiving["completeness_p99"] < 1e-6
    assert strict["completeness_p99"] == pytest.approx(0.4, abs=0.01)


def test_flipped_faces_are_visible_too() -> None:
    vertices, faces = sphere(0.5, 3)
    faces[::2] = faces[::2, ::-1]
    assert len(visible_samples(vertices, faces, 3000, seed=0)[0]) == 3000


def test_volume_of_shifted_boxes() -> None:
    iou = volume_iou(box(0.5), box(0.5, (0.25, 0, 0)), seed=2)
    assert iou == pytest.approx(0.75 / 1.25, abs=0.01)
    with pytest.raises(ValueError, match="encloses"):
        volume_iou(plane(0), plane(0.1), points=1000)


def test_normal_scores_rank_a_blurred_edge() -> None:
    truth = box(0.6)
    same = normal_scores(truth, truth, views=4, size=128)
    assert same["normal_psnr_db"] == pytest.approx(100)
    assert same["sharp_normal_error"] == 0
    rounded = trimesh.creation.box((1.2,) * 3).subdivide_loop(4)
    rounded.apply_scale(1.2 / rounded.extents.max())
    blurred = normal_scores((rounded.vertices, rounded.faces), truth, views=4, size=128)
    assert blurred["normal_psnr_db"] < 30
    assert blurred["sharp_normal_error"] > 0.05


def test_normal_scores_of_nothing_and_of_turned_faces() -> None:
    truth = box(0.6)
    nothing = normal_scores((np.zeros((0, 3)), np.zeros((0, 3), int)), truth, views=3, size=64)
    assert nothing["sharp_normal_error"] == pytest.approx(1)  # unit normals against none
    assert nothing["normal_psnr_db"] == pytest.approx(10 * np.log10(12))
    turned = truth[0], truth[1][:, ::-1]  # how faces are wound makes no difference
    assert normal_scores(turned, truth, views=3, size=64)["normal_psnr_db"] == pytest.approx(100)


def test_edges_are_found_where_normals_break() -> None:
    normals = np.zeros((64, 64, 3))
    normals[:, :32, 0] = 1
    normals[:, 32:, 1] = 1
    edges = sharp_edges(normals)
    assert edges[:, 30:34].all()
    assert not edges[:, :24].any()
    assert not edges[:, 40:].any()
    gentle = np.zeros((64, 64, 3))
    angle = np.linspace(0, 1, 64)
    gentle[..., 0], gentle[..., 1] = np.cos(angle), np.sin(angle)
    assert not sharp_edges(gentle).any()


def test_topology() -> None:
    ball = topology(*sphere(0.5, 2))
    assert (ball.watertight, ball.components, ball.euler_number) == (True, 1, 2)
    torus = trimesh.creation.torus(0.6, 0.2)
    assert topology(torus.vertices, torus.faces).euler_number == 0
    both = topology(*join(sphere(0.2, 2), box(0.3, (0.6, 0, 0))))
    assert (both.watertight, both.components, both.euler_number) == (True, 2, 4)
    sheet = topology(*plane(0))
    assert (sheet.watertight, sheet.boundary_edges, sheet.euler_number) == (False, 4, 1)
    vertices, faces = box(0.5)
    split = vertices[faces].reshape(-1, 3), np.arange(len(faces) * 3).reshape(-1, 3)
    assert topology(*split).watertight  # equal positions are merged
    flipped = faces.copy()
    flipped[0] = flipped[0, ::-1]
    assert not topology(vertices, flipped).watertight
    fan = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [-1, 0, 0.0]])
    assert topology(fan, np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]])).nonmanifold_edges == 1
    assert topology(np.zeros((0, 3)), np.zeros((0, 3), int)).components == 0


def test_set_scores() -> None:
    rng = np.random.default_rng(0)
    balls = [sample_surface(*sphere(r, 2), 200, i)[0] for i, r in enumerate((0.3, 0.5, 0.7))]
    same = set_scores([b + 1e-4 * rng.standard_normal(b.shape) for b in balls], balls)
    assert same["coverage"] == 1
    assert same["mmd_squared"] < 1e-6
    assert same["one_nn_accuracy"] == 0  # each cloud's neighbour is its copy in the other set
    far = set_scores([b + 5 for b in balls], balls)
    assert far["one_nn_accuracy"] == 1
    assert set_scores([balls[0]] * 3, balls)["coverage"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="0 generated"):
        set_scores([], balls)


def test_importing_metrics_needs_no_renderer_and_no_tracker() -> None:
    code = "import sys, tasks.metrics; print({'numba', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
