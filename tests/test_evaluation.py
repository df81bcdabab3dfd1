"""Scores: a perfect result scores one, an empty one zero, and each error is the one it says."""

import numpy as np
import pytest

from tasks.conversion import convert
from tasks.evaluation import Scored, score_pair, summarise, watertight_surface
from tasks.mesh import normalise
from tasks.presets import EvaluationConfig
from tasks.procedural import procedural_mesh

CONFIG = EvaluationConfig(points=4000, assets=1, picture_size=32)


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
    empty = np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    scores = score_pair("generation", empty, surface, 64, CONFIG)
    assert set(scores.values()) == {0.0}
    assert "generation/f_score_2_voxels" in scores


def test_a_shift_of_three_voxels_is_beyond_two(box) -> None:
    vertices, faces = watertight_surface(convert(*box, 64).sdf)
    moved = vertices + np.array([0, 0, 3 * 2 / 64])
    scores = score_pair("generation", (moved, faces), (vertices, faces), 64, CONFIG)
    assert scores["generation/f_score_2_voxels"] < 0.95
    assert scores["generation/hausdorff"] == pytest.approx(3 * 2 / 64, rel=0.05)


def test_means_are_over_the_assets_that_have_a_score() -> None:
    results = [Scored("a", 64, {"x": 1.0, "y": 3.0}), Scored("b", 64, {"x": 2.0})]
    assert summarise(results) == {"x": 1.5, "y": 3.0, "assets": 2.0}
