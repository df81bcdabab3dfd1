"""Scores: a perfect result scores one, an empty one zero, and each error is the one it says."""

import numpy as np
import pytest
from synthetic_data import sphere_sdf

from tasks.conversion import convert
from tasks.evaluation import Scored, score_pair, shape_scores, summarise, watertight_surface
from tasks.mesh import normalise
from tasks.presets import EvaluationConfig
from tasks.procedural import procedural_mesh

CONFIG = EvaluationConfig(points=4000, assets=1, picture_size=32, normal_size=48)
EMPTY = np.zeros((0, 3)), np.zeros((0, 3), np.int64)


@pytest.fixture(scope="module")
def box() -> tuple[np.ndarray, np.ndarray]:
    mesh = procedural_mesh(0)
    return normalise(mesh.vertices), mesh.faces


def test_a_surface_scores_one_against_itself(box) -> None:
    surface = watertight_surface(convert(*box, 64).sdf)
    scores = score_pair("reconstruction", surface, surface, 64, CONFIG)
    assert scores["reconstruction/f_score_0.001"] == 1
    assert scores["reconstruction/f_score_1_voxel"] == 1
    assert scores["reconstruction/chamfer"] < 1e-6


def test_an_empty_mesh_scores_zero(box) -> None:
    surface = watertight_surface(convert(*box, 64).sdf)
    scores = score_pair("generation", EMPTY, surface, 64, CONFIG)
    assert set(scores.values()) == {0.0}
    assert "generation/f_score_2_voxels" in scores


def test_the_share_of_empty_results_stands_beside_the_means() -> None:
    surface = watertight_surface(sphere_sdf(0.6, 64))
    results = [
        Scored(name, 64, {**score_pair("g", mesh, surface, 64, CONFIG), **shapes})
        for name, mesh in (("a", surface), ("b", EMPTY))
        for shapes in [shape_scores("g", mesh, surface, CONFIG)]
    ]
    means = summarise(results)
    assert means["g/chamfer"] < 1e-6  # of the one that is there
    assert means["g/components"] == 1
    assert means["g/empty"] == means["g/watertight"] == means["g/f_score_1_voxel"] == 0.5
    assert means["g/volume_iou"] == 0.5


def test_shape_scores_of_a_perfect_a_shrunk_and_an_open_result() -> None:
    vertices, faces = watertight_surface(sphere_sdf(0.6, 64))
    same = shape_scores("r", (vertices, faces), (vertices, faces), CONFIG)
    assert same == {
        "r/empty": 0,
        "r/watertight": 1,
        "r/components": 1,
        "r/euler_number": 2,
        "r/interior_area_share": 0,
        "r/volume_iou": 1,
        "r/normal_psnr_db": pytest.approx(100),
        "r/sharp_normal_error": 0,
    }
    shrunk = shape_scores("r", (0.9 * vertices, faces), (vertices, faces), CONFIG)
    assert shrunk["r/volume_iou"] == pytest.approx(0.9**3, abs=0.03)
    assert shrunk["r/sharp_normal_error"] > 0
    opened = shape_scores("r", (vertices, faces[1:]), (vertices, faces), CONFIG)
    assert opened["r/watertight"] == 0
    assert opened["r/euler_number"] == 1
    assert "r/volume_iou" not in opened


def test_a_shift_of_three_voxels_is_beyond_two(box) -> None:
    vertices, faces = watertight_surface(convert(*box, 64).sdf)
    moved = vertices + np.array([0, 0, 3 * 2 / 64])
    scores = score_pair("generation", (moved, faces), (vertices, faces), 64, CONFIG)
    assert scores["generation/f_score_2_voxels"] < 0.95
    assert scores["generation/hausdorff"] == pytest.approx(3 * 2 / 64, rel=0.05)


def test_means_are_over_the_assets_that_have_a_score() -> None:
    results = [Scored("a", 64, {"x": 1.0, "y": 3.0}), Scored("b", 64, {"x": 2.0})]
    assert summarise(results) == {"x": 1.5, "y": 3.0}
