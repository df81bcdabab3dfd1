"""SSA, full and cross-attention: values against plain loops, batches against samples alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssa import SSALayout, block_order, build_layout
from model.attention import (
    CrossAttention,
    FullAttention,
    SpatialSparseAttention,
    block_mean,
    divide_samples,
)


def random_coords(counts: list[int], grid: int, seed: int) -> Tensor:
    """Return distinct voxels [N, 4] int32 of samples with the given counts, lexicographic."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(grid**3, generator=generator)[:count].sort().values
        voxels = torch.stack([cells // grid**2, cells // grid % grid, cells % grid], dim=1)
        parts.append(torch.cat([torch.full((count, 1), sample), voxels], dim=1))
    return torch.cat(parts).int()


def layout_of(counts: list[int], compression: int, shift: int = 0, seed: int = 0) -> SSALayout:
    coords = random_coords(counts, 20, seed)
    coords = coords[block_order(coords, 8, compression)]
    return build_layout(coords, compression, 8, 8, shift)


def attention(delta: str, compression: int, seed: int = 0) -> SpatialSparseAttention:
    torch.manual_seed(seed)
    module = SpatialSparseAttention(48, 4, 2, 32, 3, compression, delta).double()  # type: ignore[arg-type]
    for parameter in module.parameters():  # zero tables would hide what reads them
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    compression=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
def test_block_mean_equals_a_loop(counts: list[int], compression: int, seed: int) -> None:
    layout = layout_of(counts, compression, seed=seed)
    rows = torch.randn(sum(counts), 5, dtype=torch.float64)
    blocks: dict[tuple[int, ...], list[Tensor]] = {}
    for coordinate, row in zip(layout.coords.tolist(), rows, strict=True):
        key = (coordinate[0], *(c // compression for c in coordinate[1:]))
        blocks.setdefault(key, []).append(row)
    mean = block_mean(rows, layout)
    assert len(mean) == len(blocks)
    for key, value in zip(layout.compression_coords.tolist(), mean, strict=True):
        torch.testing.assert_close(value, torch.stack(blocks[tuple(key)]).mean(0))


def test_block_mean_gradients_and_half_precision() -> None:
    layout = layout_of([40, 1, 300], 4)
    rows = torch.randn(341, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_mean(x, layout), rows)
    half = block_mean(rows.detach().bfloat16(), layout)
    exact = block_mean(rows.detach().bfloat16().double(), layout)
    # Summed in float32, so that only the last rounding is bfloat16's.
    torch.testing.assert_close(half, exact.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("delta", ["pointwise", "convolution"])
@pytest.mark.parametrize(("compression", "shift"), [(4, 0), (8, 4)])
def test_a_ragged_batch_equals_its_samples_alone(delta: str, compression: int, shift: int) -> None:
    counts = [130, 1, 260]
    layout = layout_of(counts, compression, shift)
    module = attention(delta, compression)
    rows = torch.randn(sum(counts), 48, dtype=torch.float64)
    together = module(rows, layout)
    start = 0
    for count in counts:
        part = slice(start, start + count)
        coords = layout.coords[part].clone()
        coords[:, 0] = 0
        alone = module(rows[part], build_layout(coords, compression, 8, 8, shift))
        torch.testing.assert_close(together[part], alone)
        start += count


def test_position_table_moves_compressed_keys_only() -> None:
    layout = layout_of([200], 4)
    module = SpatialSparseAttention(48, 4, 2, 32, 3, 4)
    assert module.position.shape == (64, 64)
    assert not module.position.any()
    seen = {}
    for name in ("compress_k", "compress_v"):
        getattr(module, name).register_forward_hook(
            lambda _module, inputs, _output, name=name: seen.__setitem__(name, inputs[0].clone())
        )
    rows = torch.randn(200, 48)
    module(rows, layout)
    before = dict(seen)
    module.position.data.normal_()
    module(rows, layout)
    moved = module.position[layout.position_in_compression_block]
    torch.testing.assert_close(seen["compress_k"], before["compress_k"] + moved)
    assert torch.equal(seen["compress_v"], before["compress_v"])


def test_gates_weigh_the_branches() -> None:
    layout = layout_of([60, 90], 8)
    module = attention("pointwise", 8)
    module.out = torch.nn.Identity()  # type: ignore[assignment]
    rows = torch.randn(150, 48, dtype=torch.float64)
    module.gates.weight.data.zero_()

    def gated(logits: list[float]) -> Tensor:
        module.gates.bias.data = torch.tensor(logits, dtype=torch.float64)
        return module(rows, layout)

    off = -1e9
    branches = [gated([0 if i == j else off for j in range(3)]) for i in range(3)]
    assert all(branch.abs().mean() > 0.01 for branch in branches)
    torch.testing.assert_close(gated([0, 0, 0]), branches[0] + branches[1] + branches[2])
    assert not gated([off, off, off]).any()
    torch.testing.assert_close(gated([1e9, off, off]), 2 * branches[0])


@pytest.mark.parametrize("delta", ["pointwise", "convolution"])
def test_gradients_reach_every_parameter(delta: str) -> None:
    layout = layout_of([300, 40], 4)
    module = attention(delta, 4)
    rows = torch.randn(340, 48, dtype=torch.float64, requires_grad=True)
    module(rows, layout).square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum(1).min() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_samples_pad_spread_and_their_inverses() -> None:
    sample = torch.tensor([0, 0, 0, 2, 2, 3])  # sample 1 is empty
    samples = divide_samples(sample, 4)
    rows = torch.arange(12.0).view(6, 2)
    padded = samples.pad(rows)
    assert padded.shape == (4, 3, 2)
    assert torch.equal(samples.unpad(padded), rows)
    assert samples.mask is not None
    assert samples.mask.sum(1).tolist() == [3, 0, 2, 1]
    assert torch.equal(padded[samples.mask], rows)
    assert not padded[~samples.mask].any()
    values = torch.randn(4, 5)
    assert torch.equal(samples.spread(values), values[sample])
    even = divide_samples(torch.tensor([0, 0, 1, 1]), 2)
    assert even.mask is None
    assert torch.equal(even.unpad(even.pad(rows[:4])), rows[:4])


def test_samples_refuse_an_index_beyond_their_count() -> None:
    with pytest.raises(ValueError, match="sample 2 in a batch of 2"):
        divide_samples(torch.tensor([0, 1, 2]), 2)


def test_full_attention_of_a_batch_equals_samples_alone() -> None:
    torch.manual_seed(0)
    module = FullAttention(24, 3, 8).double()
    rows = torch.randn(12, 24, dtype=torch.float64)
    together = module(rows, divide_samples(torch.tensor([0] * 7 + [1] * 5), 2))
    for part in (slice(0, 7), slice(7, 12)):
        alone = divide_samples(torch.zeros(part.stop - part.start), 1)
        torch.testing.assert_close(together[part], module(rows[part], alone))


def test_cross_attention_ignores_padding() -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 10, 3, 8).double()
    rows = torch.randn(12, 24, dtype=torch.float64)
    samples = divide_samples(torch.tensor([0] * 7 + [1] * 5), 2)
    context = torch.randn(2, 6, 10, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    out = module(rows, context, mask, samples)
    changed = torch.where(mask[:, :, None], context, 100)
    assert torch.equal(module(rows, changed, mask, samples), out)
    alone = module(rows[7:], context[1:, :4], mask[1:, :4], divide_samples(torch.zeros(5), 1))
    torch.testing.assert_close(out[7:], alone)
    # A token that isn't padding does matter.
    assert not torch.allclose(module(rows, changed.flip(1), mask, samples), out)
