"""SSA's layout and reference against naive loops, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ssa

ROUNDING = 1e-10  # float64; the largest relative difference seen was 2e-15


def draw_coords(samples: list[int], grid: int, seed: int) -> torch.Tensor:
    """Unique voxels, about samples[b] of them in sample b, in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch, count in enumerate(samples):
        xyz = torch.randint(0, grid, (count, 3), generator=generator).unique(dim=0)
        parts.append(torch.cat([torch.full((len(xyz), 1), batch), xyz], dim=1))
    coords = torch.cat(parts).int()
    return coords[torch.randperm(len(coords), generator=generator)]


def draw_inputs(layout, heads, kv_heads, dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n, nc = len(layout.coords), layout.num_compression_blocks

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    keys = [normal(rows, kv_heads, dim) for rows in (n, n, nc, nc)]
    return [normal(n, heads, dim), *keys, normal(n, 3)]


def sorted_layout(coords, compression, selection, window, shift):
    coords = coords[ssa.block_order(coords, selection, compression)]
    return ssa.build_layout(coords, compression, selection, window, shift)


def naive_ssa(q, k, v, k_cmp, v_cmp, gates, layout, top_k):
    """Token by token, head by head, from the definition, with blocks named by coordinates."""
    rows = [tuple(row) for row in layout.coords.tolist()]
    compressed = [tuple(row) for row in layout.compression_coords.tolist()]

    def block(row, side, shift=0):
        return row[0], *((c + shift) // side for c in row[1:])

    ratio = layout.selection // layout.compression
    parents = [(c[0], *(x // ratio for x in c[1:])) for c in compressed]
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[2])
    out = torch.zeros_like(q)
    for i, row in enumerate(rows):
        own = [c for c, parent in enumerate(parents) if parent[0] == row[0]]
        window = [
            j
            for j, other in enumerate(rows)
            if block(other, layout.window, layout.shift) == block(row, layout.window, layout.shift)
        ]
        for kv in range(k.shape[1]):
            heads = range(kv * group, (kv + 1) * group)
            attention = {h: (scale * k_cmp[own, kv] @ q[i, h]).softmax(0) for h in heads}
            score: dict[tuple[int, ...], float] = {}
            for place, c in enumerate(own):
                total = sum(float(attention[h][place].detach()) for h in heads)
                score[parents[c]] = score.get(parents[c], 0.0) + total
            best = sorted(score, key=lambda b: -score[b])[:top_k]  # stable, in order of the blocks
            keys = [j for j, other in enumerate(rows) if block(other, layout.selection) in best]
            for h in heads:
                weights = [
                    attention[h],
                    (scale * k[keys, kv] @ q[i, h]).softmax(0),
                    (scale * k[window, kv] @ q[i, h]).softmax(0),
                ]
                values = [v_cmp[own, kv], v[keys, kv], v[window, kv]]
                out[i, h] = sum(gates[i, b] * weights[b] @ values[b] for b in range(3))
    return out


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(
    ("sides", "shift", "heads", "kv_heads", "top_k"),
    [((4, 8, 8), 4, 4, 2, 3), ((8, 8, 8), 0, 3, 1, 2), ((2, 4, 6), 3, 2, 2, 64)],
)
@pytest.mark.parametrize("chunk", [1 << 22, 300])
def test_reference_and_its_gradients_equal_the_naive_loop(
    monkeypatch, sides, shift, heads, kv_heads, top_k, chunk
):
    monkeypatch.setattr(ssa, "CHUNK_ELEMENTS", chunk)  # 300: several checkpointed chunks a sample
    coords = draw_coords([31, 1, 0, 17], 20, seed=1)
    layout = sorted_layout(coords, *sides, shift)
    inputs = draw_inputs(layout, heads, kv_heads, 8, seed=2)
    got = ssa.spatial_sparse_attention(*inputs, layout, top_k)
    expected = naive_ssa(*inputs, layout, top_k)
    assert relative_error(got, expected) < ROUNDING
    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(3))
    got_gradients = torch.autograd.grad((got * weights).sum(), inputs)
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for ours, theirs in zip(got_gradients, gradients, strict=True):
        assert relative_error(ours, theirs) < ROUNDING


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any),
    ratio=st.integers(1, 3),
    compression=st.integers(1, 5),
    window=st.integers(1, 9),
    shift=st.integers(0, 8),
    seed=st.integers(0, 1 << 30),
)
def test_layout_tables_name_the_right_tokens(samples, ratio, compression, window, shift, seed):
    selection, shift = ratio * compression, shift % window
    layout = sorted_layout(draw_coords(samples, 21, seed), compression, selection, window, shift)
    coords, n = layout.coords, len(layout.coords)
    batch, xyz = coords[:, :1], coords[:, 1:]

    def check(index, starts, count, blocks):
        unique, inverse = torch.unique(blocks, dim=0, return_inverse=True)
        assert count == len(unique)
        # equal blocks have equal indices, and the other way round
        assert len(torch.unique(torch.stack([index, inverse], 1), dim=0)) == count
        if starts is not None:
            expected = torch.arange(n) if len(index) == 0 else torch.bincount(index).cumsum(0)
            assert starts[1 : count + 1].tolist() == expected.tolist()
            assert (starts[count:] == n).all()

    counts = layout.counts
    check(layout.sample_index, layout.sample_starts, counts.samples, batch)
    blocks = torch.cat([batch, xyz // compression], 1)
    check(layout.compression_index, layout.compression_starts, counts.compression, blocks)
    assert torch.equal(layout.compression_coords[layout.compression_index], blocks)
    blocks = torch.cat([batch, xyz // selection], 1)
    check(layout.selection_index, layout.selection_starts, counts.selection, blocks)
    blocks = torch.cat([batch, (xyz + shift) // window], 1)
    check(layout.window_index, None, counts.windows, blocks)

    inside = (xyz % compression).long()
    place = (inside[:, 0] * compression + inside[:, 1]) * compression + inside[:, 2]
    assert torch.equal(layout.position_in_compression_block, place)
    sorted_windows = layout.window_index[layout.window_order]
    for place, (begin, end) in enumerate(layout.window_range.tolist()):
        same = (sorted_windows == sorted_windows[place]).nonzero()[:, 0]
        assert (begin, end) == (int(same[0]), int(same[-1]) + 1)
        assert len(same) == end - begin
    for i in range(0, n, 7):
        same = layout.sample_index == layout.sample_index[i]
        begin, end = layout.compression_range[i].tolist()
        assert layout.compression_index[same].unique().tolist() == list(range(begin, end))
        begin, end = layout.selection_range[i].tolist()
        assert layout.selection_index[same].unique().tolist() == list(range(begin, end))
        block = layout.compression_index[i]
        begin, end = layout.compression_tokens[block].tolist()
        assert same.nonzero()[:, 0].tolist() == list(range(begin, end))
    inner = layout.selection_compression[: counts.selection + 1].tolist()
    for block in range(counts.selection):
        of_block = layout.compression_index[layout.selection_index == block].unique().tolist()
        assert of_block == list(range(inner[block], inner[block + 1]))
    by_size = layout.selection_by_size[: counts.selection].long()
    assert sorted(by_size.tolist()) == list(range(counts.selection))
    assert (layout.selection_starts.diff()[by_size].diff() <= 0).all()


def test_of_equal_scores_the_first_blocks_are_selected():
    layout = sorted_layout(draw_coords([60, 40], 64, seed=5), 8, 8, 8, 0)
    q, _, _, k_cmp, _, _ = draw_inputs(layout, 4, 2, 32, seed=6)
    selected = ssa.select_blocks(q * 0, k_cmp, layout, 8)
    first = layout.selection_range[:, :1, None] + torch.arange(8)
    assert torch.equal(selected, first.expand_as(selected).int())


def test_blocks_that_a_sample_lacks_are_minus_one():
    layout = sorted_layout(draw_coords([1, 50], 16, seed=7), 8, 8, 8, 4)
    q, _, _, k_cmp, _, _ = draw_inputs(layout, 2, 1, 32, seed=8)
    selected = ssa.select_blocks(q, k_cmp, layout, 12)
    assert selected[0, 0].tolist() == [0] + [-1] * 11
    assert ((selected[1:] >= 1).sum(-1) == layout.counts.selection - 1).all()


def test_half_precision_runs_in_float32():
    layout = sorted_layout(draw_coords([80, 30], 24, seed=9), 4, 8, 8, 4)
    exact = draw_inputs(layout, 4, 2, 32, seed=10)
    rounded = [x.detach().bfloat16() for x in exact]
    out = ssa.spatial_sparse_attention(*rounded, layout, 4)
    assert out.dtype == torch.bfloat16
    expected = ssa.spatial_sparse_attention(*[x.double() for x in rounded], layout, 4)
    assert relative_error(out.double(), expected) < 2**-8  # the output's own rounding; seen 1.7e-3


def test_no_token_at_all():
    layout = ssa.build_layout(torch.zeros(0, 4, dtype=torch.int32), 4, 8, 8, 4)
    inputs = draw_inputs(layout, 4, 2, 32, seed=0)
    assert ssa.spatial_sparse_attention(*inputs, layout, 8).shape == (0, 4, 32)


COORDS = draw_coords([40], 24, seed=11)


@pytest.mark.parametrize(
    ("coords", "sides", "shift", "message"),
    [
        (COORDS, (8, 8, 8), 0, "block_order"),
        (COORDS[:1].repeat(2, 1), (8, 8, 8), 0, "block_order"),
        (COORDS[:1] + 4096, (8, 8, 8), 0, r"outside \[0, 4096\)"),
        (COORDS[:, :3], (8, 8, 8), 0, r"\[40, 3\]"),
        (COORDS.float(), (8, 8, 8), 0, "float32"),
        (COORDS, (3, 8, 8), 0, "3/8/8"),
        (COORDS, (4, 8, 8), 8, "shift 8"),
    ],
)
def test_wrong_coordinates_are_refused(coords, sides, shift, message):
    with pytest.raises(ValueError, match=message):
        ssa.build_layout(coords, *sides, shift)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"k_cmp": x["k_cmp"][1:]}, "k_cmp: expected"),
        (lambda x: {"q": x["q"][1:]}, "q: expected"),
        (lambda x: {"q": x["q"][:, :3]}, "3 query heads"),
        (lambda x: {"gates": x["gates"][:, :2]}, "gates: expected"),
        (lambda x: {"v": x["v"].float()}, "v is torch.float32"),
        (lambda x: {"v": x["v"].to("meta")}, "v is on meta"),
        (lambda x: {"top_k": 0}, "top_k 0"),
        (lambda x: {"top_k": 65}, "top_k 65"),
        (lambda x: {"q": x["q"].flatten()}, "q, k: expected"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    layout = sorted_layout(COORDS, 8, 8, 8, 0)
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
    inputs = dict(zip(names, draw_inputs(layout, 4, 2, 32, seed=0), strict=True))
    inputs |= {"layout": layout, "top_k": 4}
    with pytest.raises(ValueError, match=message):
        ssa.spatial_sparse_attention(**(inputs | change(inputs)))
