import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model import convolution
from model.convolution import (
    SubmanifoldConv3d,
    block_values,
    mean_pool,
    plain_convolution,
    spconv_convolution,
    subdivide,
)
from model.sparse import SparseTensor, voxel_keys

GRID = (13, 7, 10)  # unequal sides: a swapped axis shows


def random_voxels(count: int, grid: tuple[int, int, int] = GRID, batch: int = 2) -> Tensor:
    flat = torch.randperm(batch * grid[0] * grid[1] * grid[2])[:count].sort().values
    fields = torch.unravel_index(flat, (batch, *grid))
    return torch.stack(fields, dim=1).int()


def dense(x: SparseTensor, grid: tuple[int, int, int], batch: int) -> Tensor:
    volume = x.feats.new_zeros(batch, *grid, x.feats.shape[1])
    volume = volume.index_put(tuple(x.coords.long().T), x.feats)
    return volume.permute(0, 4, 1, 2, 3)


def dense_convolution(
    x: SparseTensor, weight: Tensor, grid: tuple[int, int, int], batch: int
) -> Tensor:
    out = functional.conv3d(dense(x, grid, batch), weight.permute(0, 4, 1, 2, 3), padding=1)
    return out.permute(0, 2, 3, 4, 1)[tuple(x.coords.long().T)]


def is_sorted(coords: Tensor) -> bool:
    return bool((voxel_keys(coords).diff() > 0).all())


@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 40_000])
def test_values_and_gradients_equal_a_dense_convolution(monkeypatch, whole_blocks, chunk_bytes):
    monkeypatch.setattr(convolution, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    x = SparseTensor(random_voxels(180), torch.randn(180, 5, dtype=torch.float64))
    grid = GRID
    if whole_blocks:
        x = subdivide(subdivide(x.replace(torch.zeros(180, 1))))
        x = x.replace(torch.randn(len(x.coords), 5, dtype=torch.float64))
        grid = (4 * GRID[0], 4 * GRID[1], 4 * GRID[2])
    x.feats.requires_grad_(True)
    layer = SubmanifoldConv3d(5, 3).double()
    seed = torch.randn(len(x.coords), 3, dtype=torch.float64)
    wanted = dense_convolution(x, layer.weight, grid, 2) + layer.bias
    inputs = [x.feats, layer.weight, layer.bias]
    wanted_gradients = torch.autograd.grad((wanted * seed).sum(), inputs)
    got = layer(x).feats
    gradients = torch.autograd.grad((got * seed).sum(), inputs)
    torch.testing.assert_close(got, wanted)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient)


def test_gradients_pass_gradcheck():
    torch.manual_seed(0)
    coords = random_voxels(40, (4, 3, 5), batch=1)
    feats = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, w: plain_convolution(SparseTensor(coords, f), w), (feats, weight)
    )


def test_one_voxel_sees_the_centre_tap_only():
    layer = SubmanifoldConv3d(4, 3)
    coords = torch.tensor([[0, 0, 4095, 7]], dtype=torch.int32)
    x = SparseTensor(coords, torch.randn(1, 4))
    wanted = x.feats @ layer.weight[:, 1, 1, 1].T + layer.bias
    torch.testing.assert_close(layer(x).feats, wanted)


def test_empty_tensor_passes_through_every_operation():
    x = SparseTensor(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4, requires_grad=True))
    layer = SubmanifoldConv3d(4, 3)
    y = layer(subdivide(layer_input := mean_pool(x)))
    assert y.feats.shape == (0, 3)
    assert layer_input.coords.shape == (0, 4)
    assert block_values(y).shape == (0, 8, 3)
    y.feats.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_opposite_sides_of_the_largest_grid_are_no_neighbours():
    coords = torch.tensor(
        [[0, 0, 4095, 4095], [0, 1, 0, 0], [0, 4095, 4095, 4095], [1, 0, 0, 0]], dtype=torch.int32
    )
    weight = torch.ones(1, 3, 3, 3, 1)
    feats = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    torch.testing.assert_close(plain_convolution(SparseTensor(coords, feats), weight), feats)


def test_samples_side_by_side_do_not_leak():
    torch.manual_seed(0)
    layer = SubmanifoldConv3d(3, 3)
    a, b = (random_voxels(60, (5, 4, 6), batch=1) for _ in range(2))
    b[:, 0] = 1
    both = SparseTensor(torch.cat([a, b]), torch.randn(120, 3))
    apart = [
        layer(SparseTensor(c, f)).feats for c, f in zip((a, b), both.feats.split(60), strict=True)
    ]
    torch.testing.assert_close(layer(both).feats, torch.cat(apart))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(0, 1000))
def test_mean_pool_undoes_subdivide_and_rows_stay_sorted(count, seed):
    torch.manual_seed(seed)
    x = SparseTensor(random_voxels(count), torch.randn(count, 3))
    fine = subdivide(subdivide(x))
    assert is_sorted(fine.coords)
    assert len(fine.coords) == 64 * count
    torch.testing.assert_close(block_values(fine), x.feats[:, None].expand(-1, 64, -1))
    back = mean_pool(mean_pool(fine))
    assert torch.equal(back.coords, x.coords)
    torch.testing.assert_close(back.feats, x.feats)


def test_block_values_are_in_xyz_order():
    x = SparseTensor(random_voxels(20), torch.zeros(20, 1))
    fine = subdivide(subdivide(x))
    blocks = block_values(fine.replace(fine.coords.float())).view(20, 4, 4, 4, 4)
    corner = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), dim=-1)
    wanted = 4 * x.coords[:, None, None, None, 1:] + corner
    torch.testing.assert_close(blocks[..., 1:], wanted)
    torch.testing.assert_close(
        blocks[..., 0], x.coords[:, None, None, None, 0].float().expand(-1, 4, 4, 4)
    )


def test_block_values_refuses_voxels_that_are_no_blocks():
    with pytest.raises(ValueError, match="subdivide"):
        block_values(SparseTensor(random_voxels(5), torch.zeros(5, 1)))


def test_mean_pool_averages_the_present_children():
    torch.manual_seed(0)
    x = SparseTensor(
        random_voxels(200), torch.randn(200, 3, dtype=torch.float64, requires_grad=True)
    )
    pooled = mean_pool(x)
    assert is_sorted(pooled.coords)
    for row in range(0, len(pooled.coords), 7):
        cell = torch.cat([x.coords[:, :1], x.coords[:, 1:] // 2], dim=1)
        members = (cell == pooled.coords[row]).all(1)
        torch.testing.assert_close(pooled.feats[row], x.feats[members].mean(0))
    assert torch.autograd.gradcheck(lambda f: mean_pool(x.replace(f)).feats, (x.feats,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [(4, 4), (8, 4), (32, 64), (128, 32)])
@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize("reference", ["plain", "dense"])
def test_spconv_equals_plain_and_dense_convolutions(channels, whole_blocks, reference):
    torch.manual_seed(0)
    grid = (71, 34, 58)
    x = SparseTensor(random_voxels(20_000, grid).cuda(), torch.zeros(20_000, 1).cuda())
    if whole_blocks:
        x, grid = subdivide(x), (142, 68, 116)
    inside, outside = channels
    feats = torch.randn(len(x.coords), inside, device="cuda", requires_grad=True)
    weight = torch.randn(outside, 3, 3, 3, inside, device="cuda", requires_grad=True)
    # Gradients as small as those of a mean over millions of voxels: without scaling they vanish.
    seed = torch.randn(len(x.coords), outside, device="cuda") * 1e-8
    x = x.replace(feats)
    if reference == "plain":
        wanted = plain_convolution(x, weight)
    else:  # in float64, which no TensorFloat-32 rounds
        wanted = dense_convolution(x.replace(feats.double()), weight.double(), grid, 2).float()
    wanted_gradients = torch.autograd.grad((wanted * seed).sum(), (feats, weight))
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):  # the second takes the pairs from the cache
            got = spconv_convolution(x, weight)
            gradients = torch.autograd.grad((got * seed).sum(), (feats, weight))
            assert got.dtype == torch.float32
            for value, target in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
                error = (value - target).norm() / target.norm()
                assert error < 3e-3  # float16 rounds to 5e-4
