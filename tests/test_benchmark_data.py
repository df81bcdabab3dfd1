"""The benchmark's own measures against meshes whose answers are known."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from benchmarks.data_checks import (
    Original,
    contradictions,
    halved,
    parts_found,
    quantised,
    storage_at,
    surface_errors,
)
from model.marching_cubes import marching_cubes
from model.sdf import SparseSDF
from tasks.conversion import closed_and_oriented, convert
from tasks.mesh import normalise
from tasks.metrics import Surface
from tasks.shards import quantise

ROOT = Path(__file__).parent.parent
TURN = trimesh.transformations.euler_matrix(0.3, 0.5, 0.7)


def together(*meshes: trimesh.Trimesh) -> Surface:
    mesh = trimesh.util.concatenate(meshes)
    return np.array(mesh.vertices), np.array(mesh.faces)


def sphere(radius: float, x: float) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(3, radius=radius).apply_translation([x, 0, 0])


def surface_of(sdf: SparseSDF) -> Surface:
    tensors = torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values)
    points, faces = marching_cubes(*tensors, sdf.resolution)
    return points.numpy(), faces.numpy()


def test_parts_are_those_that_can_be_seen_and_found_where_the_result_is() -> None:
    left, right = sphere(0.3, -0.5), sphere(0.3, 0.5)
    hidden, tiny = sphere(0.1, 0.5), sphere(0.01, 0.0)
    original = Original.of(*together(left, right, hidden, tiny))
    assert original.closed.tolist() == [True] * 4
    assert original.visible.sum() == len(left.faces) + len(right.faces) + len(tiny.faces)
    assert parts_found(original, together(left, right), 64) == (2, 2)
    assert parts_found(original, together(left), 64) == (2, 1)
    assert parts_found(original, together(left, right), 1024) == (3, 2)  # now the tiny one counts
    moved = right.copy().apply_translation([0, 1.5 * 2 / 64, 0])
    assert parts_found(original, together(left, moved), 64) == (2, 2)
    moved.apply_translation([0, 3 * 2 / 64, 0])
    assert parts_found(original, together(left, moved), 64) == (2, 1)


def test_errors_are_measured_to_what_can_be_seen_of_closed_parts() -> None:
    outer, inner = sphere(0.9, 0), sphere(0.5, 0)
    original = Original.of(*together(outer, inner))
    exact = surface_errors(original, together(outer), 64)
    assert exact["error_99"] < 1e-5
    assert exact["seen_share"] == 1
    # A wall that nobody sees is an error of the result, though the original has one there.
    kept = surface_errors(original, together(outer, inner), 64)
    assert kept["error_99"] == pytest.approx(0.4 * 32, rel=0.02)
    assert kept["seen_99"] < 1e-5
    assert kept["seen_share"] < 0.8
    shifted = surface_errors(original, together(sphere(0.9, 0.5 * 2 / 64)), 64)
    assert 0.15 < shifted["error_median"] < shifted["error_99"] < 0.51
    sheet = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]])
    assert surface_errors(Original.of(*sheet), sheet, 64) == {}


@pytest.mark.parametrize("resolution", [32, 56, 128])
def test_a_flipped_sign_contradicts_its_six_edges(resolution: int) -> None:
    vertices, faces = together(
        trimesh.creation.box((1, 0.7, 0.4)), trimesh.creation.icosphere(2).apply_transform(TURN)
    )
    result = convert(normalise(vertices), faces, resolution)
    assert contradictions(result.sdf, result.surface) == 0
    values = result.sdf.values.copy()
    values[len(values) // 2, 3, 4, 5] *= -1
    assert contradictions(replace(result.sdf, values=values), result.surface) == 6
    # A surface that leaves the stored blocks contradicts them, too.
    few = slice(0, len(values), 2)
    part = replace(result.sdf, blocks=result.sdf.blocks[few], values=result.sdf.values[few])
    assert contradictions(part, result.surface) > 10


def test_fewer_bits_move_the_surface_and_take_less() -> None:
    result = convert(normalise(np.array(sphere(1, 0).vertices)), np.array(sphere(1, 0).faces), 64)
    values = result.sdf.values
    np.testing.assert_array_equal(quantised(values, 16), quantise(values))
    stored = {bits: storage_at(result.sdf, result.surface, bits) for bits in (8, 12, 16)}
    # Two values an edge, each off by half a step of tau = 2 voxels, and 1.5 steps at the ends.
    for bits, found in stored.items():
        assert 0 < found["error_99"] < 4 * 2 * 2.0 ** (1 - bits)
    assert stored[8]["error_99"] > 8 * stored[12]["error_99"] > 64 * stored[16]["error_99"]
    assert stored[8]["bytes"] < stored[12]["bytes"] < stored[16]["bytes"]
    assert stored[8]["normals"] < stored[12]["normals"] < stored[16]["normals"] <= 1 + 1e-9


def test_interpolating_keeps_a_ball_and_breaks_a_sheet() -> None:
    ball = sphere(1, 0)
    vertices, faces = normalise(np.array(ball.vertices)), np.array(ball.faces)
    surface = surface_of(halved(convert(vertices, faces, 128).sdf))
    assert closed_and_oriented(surface[1], len(surface[0]))
    original = Original.of(vertices, faces)
    assert surface_errors(original, surface, 64)["error_99"] < 0.1
    # A sheet on a plane of coarse centres' borders: its shell of 1.5 fine voxels falls between.
    corners = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * 0.95
    sheet = convert(corners, np.array([[0, 1, 2], [0, 2, 3]]), 128)
    assert sheet.closed
    assert len(surface_of(halved(sheet.sdf))[1]) == 0


def test_rows_are_kept_and_failures_done_again(tmp_path: Path) -> None:
    meshes, out = tmp_path / "meshes", tmp_path / "out"
    meshes.mkdir()
    sphere(1, 0).export(meshes / "ball.ply")
    (meshes / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    command = [sys.executable, "-m", "benchmarks.data", str(meshes), "--out", str(out)]
    command += ["--resolutions", "32", "64", "--studies", "2"]
    # What an earlier call left: a row that is kept, and a failure.
    kept = {"file": "flat.obj", "step": "bits-8", "resolution": 32, "rejected": "seen before"}
    failed = {"file": "ball.ply", "step": "sparse", "resolution": 32, "failed": "x"}
    out.mkdir()
    log = out / "rows.jsonl"
    log.write_text(json.dumps(kept) + "\n" + json.dumps(failed) + "\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "rejected: flat.obj, sparse" in done.stdout
    assert "| 64 | 0.00" in done.stdout
    assert "1 of 1 (0 meshes miss one)" in done.stdout
    assert "MLflow run" in done.stdout
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["step"] for row in rows} >= {"prepare", "sparse", "bits-8", "interpolated"}
    assert sum("rejected" in row for row in rows) == (len(rows) - 1) // 2
    assert (out / "mlflow.db").exists()
    assert len(list((out / "worst").glob("*ball.png"))) == 1
    keys = [(row["file"], row["step"], row["resolution"]) for row in rows]
    assert keys.count(("flat.obj", "bits-8", 32)) == 1
    assert keys.count(("ball.ply", "sparse", 32)) == 2
    assert len(set(keys)) == len(keys) - 1
    assert "failed" not in next(row for row in rows[2:] if row["file"] == "ball.ply")
