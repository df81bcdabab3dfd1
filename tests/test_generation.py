"""Pictures to meshes: framing, the hand-over between resolutions, and what untrained models do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs

from model.sdf import BLOCK, voxel_centres
from tasks.framing import frame_object, read_framed
from tasks.generation import (
    ImageRejectedError,
    generate,
    read_picture,
    surface_cells,
    untrained_models,
)
from tasks.presets import load_preset
from tasks.shards import AssetRow, ShardWriter, StoredView

PRESET = Path(__file__).parent / "minute.toml"


def closest(points: np.ndarray, triangle: np.ndarray, samples: int = 40) -> np.ndarray:
    """Distances of points to a densely sampled triangle: an upper bound, tight to its spacing."""
    u, v = np.meshgrid(*[np.linspace(0, 1, samples)] * 2)
    inside = u + v <= 1
    a, b, c = triangle
    on = a + u[inside, None] * (b - a) + v[inside, None] * (c - a)
    return np.sqrt(((points[:, None] - on) ** 2).sum(-1).min(1))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.floats(-0.9, 0.9), min_size=9, max_size=9))
def test_surface_cells_are_the_blocks_within_two_voxels(values: list[float]) -> None:
    resolution = 24
    triangle = np.array(values).reshape(3, 3)
    cells = surface_cells(triangle, np.array([[0, 1, 2]]), resolution)
    side = resolution // BLOCK
    grid = np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1)
    distance = closest(voxel_centres(grid.reshape(-1, 3), resolution), triangle)
    blocks = distance.reshape(side, BLOCK, side, BLOCK, side, BLOCK).min((1, 3, 5))
    found = np.zeros((side, side, side), bool)
    found[tuple(cells.numpy().T)] = True
    spacing = 1.9 * 2 / 40  # the sampled triangle's, by which `closest` may be too large
    assert found[blocks < 4 / resolution - 1e-9].all()
    assert not found[blocks > 4 / resolution + spacing].any()


def test_surface_cells_of_nothing() -> None:
    assert surface_cells(np.zeros((0, 3)), np.zeros((0, 3), np.int64), 64).shape == (0, 3)


def test_frame_object_centres_and_keeps_proportions() -> None:
    pixels = np.zeros((100, 300, 4), np.uint8)
    pixels[10:30, 200:280] = (255, 0, 0, 255)
    framed = frame_object(pixels, 64)
    rows, columns = np.nonzero(framed[..., 3] > 127)
    assert framed.shape == (64, 64, 4)
    assert abs(rows.min() + rows.max() - 63) <= 2
    assert abs(columns.min() + columns.max() - 63) <= 2
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width / height == pytest.approx(4, rel=0.1)
    assert width == pytest.approx(0.95 * 64, abs=2)


def test_a_stored_view_and_a_file_of_it_give_the_same_condition(tmp_path: Path) -> None:
    off_centre = np.zeros((40, 40, 4), np.uint8)
    off_centre[3:20, 10:38] = np.random.default_rng(0).integers(0, 256, (17, 28, 4), np.uint8)
    off_centre[3:20, 10:38, 3] = 255
    file = tmp_path / "view.png"
    Image.fromarray(off_centre).save(file)
    nothing = tmp_path / "nothing.png"
    Image.fromarray(off_centre * np.uint8([1, 1, 1, 0])).save(nothing)
    views = tuple(StoredView(f.read_bytes(), np.eye(4), 0.7) for f in (file, nothing))
    mesh = np.zeros((3, 3), np.float32), np.array([[0, 1, 2]], np.int32)
    with ShardWriter(fs.LocalFileSystem(), str(tmp_path / "shard")) as writer:
        writer.add_asset(AssetRow("0" * 64, "", "", "", "", *mesh, views))
    place = fs.LocalFileSystem(), str(tmp_path / "shard" / "assets.parquet"), 0
    framed = read_framed(*place, 0)
    condition = read_picture(file, 40).permute(1, 2, 0).numpy() * 255
    np.testing.assert_array_equal(framed, np.round(condition))
    assert not np.array_equal(framed, off_centre)
    assert not read_framed(*place, 1)[..., 3].any()  # shows nothing, and stops no training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"no picture"), "can't be read"),
        (lambda p: Image.new("RGB", (8, 8)).save(p), "no transparent pixel"),
        (lambda p: Image.new("RGBA", (8, 8)).save(p), "shows no object"),
    ],
)
def test_pictures_that_cannot_be_conditions(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(ImageRejectedError, match=message):
        read_picture(path, 32)


def test_a_missing_background_remover_is_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ImageRejectedError, match=r"gigashape\[matting\]"):
        read_picture(path, 32, "rembg")


def test_alpha_goes_before_the_background_remover(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    pixels = np.full((20, 20, 4), 255, np.uint8)
    pixels[:, 10:, 3] = 0
    Image.fromarray(pixels).save(path)
    assert torch.equal(read_picture(path, 32, "no such remover"), read_picture(path, 32))
    Image.fromarray(pixels[..., :3]).save(path)
    with pytest.raises(ImageRejectedError, match="no such remover"):
        read_picture(path, 32, "no such remover")


def test_generation_is_a_function_of_picture_and_seed() -> None:
    preset = load_preset(str(PRESET))
    models = untrained_models(preset, torch.device("cpu"))
    rgba = torch.rand(2, 4, 28, 28, generator=torch.Generator().manual_seed(0))
    rgba[:, 3] = 1
    first, again, other = (generate(models, rgba, seed) for seed in (1, 1, 2))
    assert len(first) == 2
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.vertices, b.vertices)
        assert np.array_equal(a.faces, b.faces)
    assert any(shape.latent_voxels[32] for shape in first)
    assert [shape.latent_voxels for shape in first] != [shape.latent_voxels for shape in other]
