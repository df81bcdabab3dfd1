"""Convolution, mean pooling and subdivision of sparse voxels.

SubmanifoldConv3d runs on spconv on CUDA and on plain PyTorch on the CPU, where spconv is wrong:
its backward needs CUDA and its threads race. Both take the same weights.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv3d_weight

from model.sparse import SparseTensor, voxel_keys

CHUNK_BYTES = 64 << 20  # of gathered features at a time
CENTRE = 13  # of the 27 taps in [x, y, z] order; tap 26 - k lies opposite tap k


@dataclass(frozen=True)
class Children:
    """Says that a tensor holds all the voxels of the side^3 blocks of a coarser one.

    root: the coarser voxels, without features. rows: [L, side^3] int64, row of each child,
    children in [x, y, z] order.
    """

    root: SparseTensor
    side: int
    rows: Tensor


def neighbour_rows(x: SparseTensor) -> Tensor:
    """Return the rows of the 27 neighbours of each voxel, [N, 27] int64, N where there is none.

    Tap k = 9 i + 3 j + l is the neighbour at (i - 1, j - 1, l - 1). Kept in x.cache.
    """
    found = x.cache.get("neighbours")
    if isinstance(found, Tensor):
        return found
    coords = x.coords.long()
    # A spare bit a field, so that a step off the grid can't land on a voxel at its other side.
    shifts = torch.tensor([39, 26, 13, 0], device=coords.device)
    keys = (coords << shifts).sum(1)
    count = len(keys)
    rows = torch.arange(count, device=coords.device)
    table = torch.full((count, 27), count, device=coords.device)
    table[:, CENTRE] = rows
    for tap in range(CENTRE):  # these sort before the voxel, so the position found is in range
        step = ((tap // 9 - 1) << 26) + ((tap // 3 % 3 - 1) << 13) + tap % 3 - 1
        position = torch.searchsorted(keys, keys + step)
        hit = keys[position] == keys + step
        here, there = rows[hit], position[hit]
        table[here, tap] = there
        table[there, 26 - tap] = here
    x.cache["neighbours"] = table
    return table


def halo_rows(x: SparseTensor, children: Children) -> Tensor:
    """Return the rows of each block of x with one voxel around it, [L, (side + 2)^3] int64.

    N, the number of voxels, where there is none. Kept in x.cache.
    """
    found = x.cache.get("halo")
    if isinstance(found, Tensor):
        return found
    side, rows = children.side, children.rows
    axis = torch.arange(-1, side + 1, device=rows.device)
    block = (axis >= 0).long() + (axis >= side).long()
    inside = axis % side
    tap = (9 * block[:, None, None] + 3 * block[:, None] + block).flatten()
    offset = ((inside[:, None, None] * side + inside[:, None]) * side + inside).flatten()
    outside = torch.full_like(rows[:1], rows.numel())
    halo = torch.cat([rows, outside])[neighbour_rows(children.root)[:, tap], offset]
    x.cache["halo"] = halo
    return halo


def _correlate_gathered(
    feats: Tensor, weight: Tensor, rows: Tensor, against: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve by one gather and one matrix product a chunk of voxels. See _correlate."""
    channels = feats.shape[1]
    matrix = weight.flatten(1).T
    out = feats.new_empty(len(rows), len(weight))
    product = torch.zeros_like(weight)
    chunk = max(1, CHUNK_BYTES // (27 * channels * feats.element_size()))
    padded = torch.cat([feats, feats.new_zeros(1, channels)])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        patches = padded.index_select(0, rows[part].flatten()).view(-1, 27 * channels)
        torch.mm(patches, matrix, out=out[part])
        if against is not None:
            product += (against[part].T @ patches).view_as(product)
    return out, product


def _correlate_blocks(
    feats: Tensor, weight: Tensor, halo: Tensor, children: Children, against: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve whole blocks densely, each with its halo. See _correlate."""
    channels, side, rows = feats.shape[1], children.side, children.rows
    kernel = weight.permute(0, 4, 1, 2, 3).contiguous()
    out = feats.new_empty(len(feats), len(weight))
    product = torch.zeros_like(kernel)
    chunk = max(1, CHUNK_BYTES // (halo.shape[1] * channels * feats.element_size()))
    padded = torch.cat([feats, feats.new_zeros(1, channels)])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)

        def blocks(values: Tensor, index: Tensor, width: int) -> Tensor:
            picked = values.index_select(0, index.flatten())
            return picked.view(-1, width, width, width, values.shape[1]).permute(0, 4, 1, 2, 3)

        patches = blocks(padded, halo[part], side + 2)
        result = functional.conv3d(patches, kernel)
        out.index_copy_(0, rows[part].flatten(), result.permute(0, 2, 3, 4, 1).flatten(0, 3))
        if against is not None:
            other = blocks(against, rows[part], side)
            product += conv3d_weight(patches, list(kernel.shape), other)
    return out, product.permute(0, 2, 3, 4, 1)


def _correlate(
    feats: Tensor, weight: Tensor, x: SparseTensor, against: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the convolution of feats [N, in] on the voxels of x with weight [out, 3, 3, 3, in].

    With it, of that weight's shape, the product of `against` [N, out] with the neighbourhoods of
    feats: the gradient of the weight where `against` is that of the result; zeros without.
    """
    children = x.cache.get("children")
    if isinstance(children, Children):
        return _correlate_blocks(feats, weight, halo_rows(x, children), children, against)
    return _correlate_gathered(feats, weight, neighbour_rows(x), against)


class _Convolution(torch.autograd.Function):
    """The plain convolution. It has no scatter, so it is deterministic on any device.

    Neighbourhoods are symmetric: what voxel m takes from n through tap k, n takes from m through
    tap 26 - k. So the gradient of the input is the convolution of the gradient with the flipped
    kernel, and one gather of the gradient serves the gradient of the weight too.
    """

    @staticmethod
    def forward(ctx: Any, feats: Tensor, weight: Tensor, x: SparseTensor) -> Tensor:
        ctx.save_for_backward(feats, weight)
        ctx.x = SparseTensor(x.coords, x.coords.new_empty(0), x.cache)
        return _correlate(feats, weight, x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        feats, weight = ctx.saved_tensors
        flipped = weight.flip(1, 2, 3).transpose(0, 4)
        grad_feats, product = _correlate(grad, flipped, ctx.x, against=feats)
        return grad_feats, product.transpose(0, 4).flip(1, 2, 3), None


def plain_convolution(x: SparseTensor, weight: Tensor) -> Tensor:
    """Return the convolution of x with weight [out, 3, 3, 3, in] in plain PyTorch, any device.

    [N, out] in the dtype of weight, which autocast does not change.
    """
    with torch.autocast(x.feats.device.type, enabled=False):
        return _Convolution.apply(x.feats.to(weight.dtype), weight, x)


class _GradientScale:
    """Factor that one convolution's gradients carry on their way through float16."""

    value: Tensor


class _ToHalf(torch.autograd.Function):
    """Enter float16; the gradient leaves it, unscaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: _GradientScale) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        return x.half()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.float() / ctx.scale.value).to(ctx.dtype), None


class _FromHalf(torch.autograd.Function):
    """Leave float16; the gradient enters it, scaled.

    The losses are means over millions of voxels, so a gradient is around 1e-7, which float16
    can't hold. It is scaled to a peak of 2^14 / N (at most 1): the gradient of the weight is a
    sum over N voxels and must stay below 65504.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: _GradientScale) -> Tensor:
        ctx.scale = scale
        return y.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        target = min(1.0, 2.0**14 / len(grad))
        peak = grad.abs().amax()
        ctx.scale.value = torch.where(peak > 0, target / peak, 1.0)
        return (grad * ctx.scale.value).half().contiguous(), None


@functools.cache
def _spconv_layer(in_channels: int, out_channels: int) -> nn.Module:
    """Return spconv's module without weights of its own (they would draw random numbers).

    It stays in training mode: the pairs that spconv finds in evaluation lack the backward's.
    """
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError(
            "sparse convolution on CUDA needs spconv, which is not installed; "
            "install the CUDA set: pip install -c constraints.txt '.[cuda]'"
        ) from error
    with torch.device("meta"):
        return spconv.SubMConv3d(in_channels, out_channels, 3, bias=False, indice_key="3x3x3")


def spconv_convolution(x: SparseTensor, weight: Tensor) -> Tensor:
    """Return the convolution of x with weight [out, 3, 3, 3, in] by spconv, [N, out] float32.

    Computed in float16: spconv has no bfloat16 kernels, and its float32 is 4 to 6 times slower.
    """
    layer = _spconv_layer(weight.shape[4], weight.shape[0])
    import spconv.pytorch as spconv

    grid = x.cache.get("spconv grid")
    if grid is None:
        grid = ((x.coords[:, 1:].amax(0) + 1).tolist(), x.batch_size, {})
        x.cache["spconv grid"] = grid
    assert isinstance(grid, tuple)
    shape, batch_size, pairs = grid
    with torch.autocast("cuda", enabled=False):
        scale = _GradientScale()
        feats = _ToHalf.apply(x.feats, scale)
        given = spconv.SparseConvTensor(feats, x.coords, shape, batch_size, indice_dict=pairs)
        half = {"weight": _ToHalf.apply(weight, scale)}
        result = torch.func.functional_call(layer, half, (given,))
        pairs.update(result.indice_dict)
        return _FromHalf.apply(result.features, scale)


class SubmanifoldConv3d(nn.Module):
    """3x3x3 convolution onto the voxels of its input; absent neighbours count as zero.

    weight: [out, 3, 3, 3, in], taps in [x, y, z] order, the layout of spconv 2; bias: [out].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        # Keeps the variance through a SiLU (gain 1.68); PyTorch's default gain of 0.58 lets six
        # convolutions without a norm, the VAE's decoder, fade to a constant.
        nn.init.normal_(self.weight, std=1.68 / math.sqrt(27 * in_channels))
        nn.init.zeros_(self.bias)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels; float32 on CUDA, else the weight's dtype.

        Raises ImportError on CUDA without spconv.
        """
        empty = len(x.coords) == 0
        convolve = spconv_convolution if x.feats.is_cuda and not empty else plain_convolution
        return x.replace(convolve(x, self.weight) + self.bias)


def mean_pool(x: SparseTensor, factor: int = 2) -> SparseTensor:
    """Return the mean over the voxels present in each cube of factor^3; coordinates are divided."""
    found = x.cache.get(("pool", factor))
    if found is None:
        coarse = torch.cat([x.coords[:, :1], x.coords[:, 1:] // factor], dim=1)
        keys, order = voxel_keys(coarse).sort(stable=True)
        counts = torch.unique_consecutive(keys, return_counts=True)[1]
        found = (coarse[order[counts.cumsum(0) - counts]], order, counts, {})
        x.cache["pool", factor] = found
    assert isinstance(found, tuple)
    coords, order, counts, cache = found
    # A segmented sum and not index_add, whose order of addition on CUDA is any.
    grouped = x.feats.index_select(0, order)
    feats = torch.segment_reduce(grouped, "mean", lengths=counts, axis=0, unsafe=True)
    return SparseTensor(coords, feats, cache)


def subdivide(x: SparseTensor) -> SparseTensor:
    """Return the 8 children of every voxel, each with its features; coordinates are doubled."""
    corner = torch.tensor([0, 1], dtype=x.coords.dtype, device=x.coords.device)
    steps = torch.cartesian_prod(corner[:1], corner, corner, corner)
    doubled = torch.cat([x.coords[:, :1], 2 * x.coords[:, 1:]], dim=1)
    coords = (doubled[:, None] + steps).flatten(0, 1)
    order = voxel_keys(coords).argsort()
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    rows = rows.view(-1, 8)

    family = x.cache.get("children")
    if isinstance(family, Children):  # children of children are whole blocks of twice the side
        root, side = family.root, family.side
        grown = rows[family.rows].view(-1, side, side, side, 2, 2, 2)
        rows = grown.permute(0, 1, 4, 2, 5, 3, 6).flatten(1)
    else:
        root, side = SparseTensor(x.coords, x.coords.new_empty(0), x.cache), 1
    # Not kept in x.cache: with the root in it that would be a cycle, freed who knows when.
    cache: dict[object, object] = {"children": Children(root, 2 * side, rows)}
    return SparseTensor(coords[order], x.feats.index_select(0, order // 8), cache)


def block_values(x: SparseTensor) -> Tensor:
    """Return the features of a subdivided tensor, [L, side^3, C], a row a voxel of its root."""
    children = x.cache.get("children")
    if not isinstance(children, Children):
        raise ValueError("only a tensor that subdivide made has blocks; this one has none")
    return x.feats.index_select(0, children.rows.flatten()).unflatten(0, children.rows.shape)
