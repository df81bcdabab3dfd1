"""Sparse marching cubes: closed, oriented, in the right place, whatever the field."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.marching_cubes import marching_cubes, surface_by_torch


def dense_blocks(resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All blocks of a grid and the positions [B, 8, 8, 8, 3] of their voxels."""
    side = torch.arange(resolution // 8)
    blocks = torch.cartesian_prod(side, side, side)
    local = torch.cartesian_prod(*[torch.arange(8)] * 3).reshape(8, 8, 8, 3)
    index = blocks[:, None, None, None] * 8 + local
    return blocks, (2 * index.double() + 1) / resolution - 1


def assert_closed(vertices: torch.Tensor, faces: torch.Tensor) -> None:
    """Every directed edge once, and its reverse once: a closed, oriented 2-manifold."""
    ends = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    ends = ends.long()
    ahead = ends[:, 0] * len(vertices) + ends[:, 1]
    back = ends[:, 1] * len(vertices) + ends[:, 0]
    assert len(ahead.unique()) == len(ahead)
    assert torch.equal(ahead.sort().values, back.sort().values)


def volume(vertices: torch.Tensor, faces: torch.Tensor) -> float:
    a, b, c = vertices[faces].double().unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def test_sphere_off_centre_has_its_volume_area_and_place() -> None:
    centre, radius = torch.tensor([0.13, -0.21, 0.34], dtype=torch.float64), 0.5
    blocks, points = dense_blocks(64)
    values = (points - centre).norm(dim=-1) - radius
    vertices, faces = marching_cubes(blocks, values.float(), 64)
    assert vertices.dtype == torch.float32
    assert faces.dtype == torch.int32
    assert_closed(vertices, faces)
    assert ((vertices - centre).norm(dim=1) - radius).abs().max() < 3e-4  # measured 2.1e-4
    a, b, c = vertices[faces].double().unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2
    assert volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * radius**3, rel=4e-3)
    assert float(area) == pytest.approx(4 * np.pi * radius**2, rel=4e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([16, 24, 40]), st.sampled_from([0.3, 1.0, 3.0]))
def test_random_fields_give_closed_surfaces(seed: int, resolution: int, bias: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, points = dense_blocks(resolution)
    values = torch.randn(points.shape[:-1], generator=generator) + bias
    values[torch.rand(values.shape, generator=generator) < 0.05] = 0.0  # exact zeros are outside
    border = (points.abs() > 1 - 1.5 / resolution).any(-1)
    values[border] = 1.0
    vertices, faces = marching_cubes(blocks, values, resolution)
    assert_closed(vertices, faces)
    assert vertices.isfinite().all()


def test_result_does_not_depend_on_the_order_of_the_blocks() -> None:
    blocks, points = dense_blocks(24)
    values = points.norm(dim=-1) - 0.6
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    one = marching_cubes(blocks, values, 24)
    two = marching_cubes(blocks[order], values[order], 24)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1].sort(0).values, two[1].sort(0).values)


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_only_cells_with_eight_known_corners_are_used(step: tuple[int, int, int]) -> None:
    """A small ball across the border of two blocks: whole with all, cut with one missing."""
    blocks, points = dense_blocks(32)
    corner = torch.tensor(step) * 1.0
    centre = -0.25 + 0.25 * corner  # on the border of the blocks, in the middle of one otherwise
    values = (points - centre).norm(dim=-1) - 0.15
    whole = marching_cubes(blocks, values, 32)
    assert_closed(*whole)
    touched = (values < 0.2).any(-1).any(-1).any(-1)
    near = marching_cubes(blocks[touched], values[touched], 32)
    assert torch.equal(near[0], whole[0])
    missing = (blocks == torch.tensor([1, 1, 1]) + torch.tensor(step)).all(1)
    cut = marching_cubes(blocks[~missing], values[~missing], 32)
    assert 0 < len(cut[1]) < len(whole[1])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_torch_path_makes_the_same_faces(share: float) -> None:
    """On noise, which has every case, with blocks missing and exact zeros."""
    generator = torch.Generator().manual_seed(3)
    blocks, points = dense_blocks(40)
    values = torch.randn(points.shape[:-1], generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.05] = 0.0
    kept = torch.rand(len(blocks), generator=generator) < share
    blocks, values = blocks[kept], values[kept]
    one = marching_cubes(blocks, values, 40)
    two = surface_by_torch(blocks, values, 40)
    assert len(one[1]) > 10_000
    assert torch.equal(one[1], two[1])
    assert (one[0] - two[0]).abs().max() < 1e-6  # measured: equal


def test_no_blocks_and_no_surface_give_empty_results() -> None:
    blocks, points = dense_blocks(16)
    for chosen in (slice(0, 0), slice(None)):
        vertices, faces = marching_cubes(blocks[chosen], points[chosen, ..., 0].abs() + 1, 16)
        assert vertices.shape == (0, 3)
        assert faces.shape == (0, 3)


def test_keys_hold_the_finest_grid() -> None:
    """At 2048, voxel numbers pass 2^31: a ball in the last corner stays there."""
    side = 2048 // 8
    local = torch.cartesian_prod(*[torch.arange(2)] * 3)
    blocks = local + side - 2
    inner = torch.cartesian_prod(*[torch.arange(8)] * 3).reshape(8, 8, 8, 3)
    index = (blocks[:, None, None, None] * 8 + inner).double()
    centre = 2048 - 8.3
    vertices, faces = marching_cubes(blocks, (index - centre).norm(dim=-1) - 4, 2048)
    assert_closed(vertices, faces)
    place = ((vertices.double() + 1) * 2048 - 1) / 2
    assert ((place - centre).norm(dim=1) - 4).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu() -> None:
    blocks, points = dense_blocks(64)
    values = (points.norm(dim=-1) - 0.6).float()
    one = marching_cubes(blocks, values, 64)
    two = marching_cubes(blocks.cuda(), values.cuda(), 64)
    assert torch.allclose(one[0], two[0].cpu(), atol=1e-6)
    assert torch.equal(one[1], two[1].cpu())
