"""SSA's kernels, forward and backward, against the reference in float64.

Without a GPU they run in Triton's interpreter, in float32 and float16 (its bfloat16 dot is wrong).
"""

import os
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import triton.language as tl
from test_ssa import draw_coords, sorted_layout
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import ssa, ssa_lists, ssa_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and type(tl.max).__name__ != "InterpretedFunction":
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1: set it in tests/conftest.py")
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
# ||ours - exact|| / ||exact||: a few roundings of the dtype. Seen on an H200: 7e-7, 4e-4, 3.3e-3.
BOUNDS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(samples, sides, shift, heads, kv_heads, dim, seed, dtype, grid=20):
    layout = sorted_layout(draw_coords(samples, grid, seed).to(DEVICE), *sides, shift)
    generator = torch.Generator().manual_seed(seed)
    n, nc = len(layout.coords), layout.num_compression_blocks
    shapes = [(n, heads, dim)] + [(rows, kv_heads, dim) for rows in (n, n, nc, nc)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs.append(torch.rand(n, 3, generator=generator))
    grad = torch.randn(shapes[0], generator=generator).to(DEVICE, dtype)
    return [x.to(DEVICE, dtype).requires_grad_() for x in inputs], layout, grad


def check(inputs, layout, grad, top_k, cancelling=False):
    """Compare the output, the selection and every gradient with the reference in float64.

    cancelling: samples are so small, and the dtype so short, that gradients of logits may be much
    smaller than what they are the difference of.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, selected = ssa_triton.attention_and_selection(*inputs, layout, top_k)
    gradients = torch.autograd.grad(out, inputs, grad)
    check_selection(selected, exact, layout, top_k)
    expected = ssa.ssa_reference(*exact, layout, top_k, selected)
    exact_gradients = torch.autograd.grad(expected, exact, grad.double())
    rounded = rounded_outputs(exact, layout, selected, grad.double()) if cancelling else {}
    errors = {
        name: ((ours.double() - theirs).norm() / (theirs.norm() + rounded.get(name, 0.0))).item()
        for name, ours, theirs in zip(
            ("out", *NAMES), (out, *gradients), (expected, *exact_gradients), strict=True
        )
        # one block of one key: the gradient of its logits is zero but for rounding
        if theirs.norm() + rounded.get(name, 0.0) > 1e-6 * theirs.numel() ** 0.5
    }
    assert max(errors.values()) < BOUNDS[out.dtype], errors
    return errors


def rounded_outputs(exact, layout, selected, grad):
    """Norms of what relative errors of one in the branches' outputs would leave in gradients.

    The gradient of a logit is p (do . v - do . o), and o was rounded to the dtype of the inputs. In
    small samples the difference is much smaller than its terms: with one key it is zero.
    """
    q, k, v, k_cmp, v_cmp, gates = (x.detach() for x in exact)
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    starts = layout.compression_starts[: len(k_cmp)].long()
    own = (layout.sample_index[:, None] == layout.sample_index[starts])[:, None]
    chosen = (selected[:, :, None] == layout.selection_index[:, None]).any(-1)  # [N, Hkv, N]
    window = (layout.window_index[:, None] == layout.window_index)[:, None]
    squares = {"q": 0.0, "k": 0.0, "k_cmp": 0.0}
    branches = [(k_cmp, v_cmp, own), (k, v, chosen), (k, v, window)]
    for i, (keys, values, inside) in enumerate(branches):
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        logits = torch.einsum("nhd,mhd->nhm", q, keys) * scale
        inside = inside.expand(-1, k.shape[1], -1).repeat_interleave(group, 1)
        p = logits.masked_fill(~inside, float("-inf")).softmax(-1)
        out = torch.einsum("nhm,mhd->nhd", p, values)
        error = scale * gates[:, None, i] * (grad * out).norm(dim=-1)  # of do . o, [N, Hq]
        squares["q"] += (torch.einsum("nhm,mhd->nhd", p, keys) * error[..., None]).square().sum()
        of_keys = (p.square().sum(-1) * (q * error[..., None]).square().sum(-1)).sum()
        squares["k_cmp" if i == 0 else "k"] += of_keys
    return {name: square**0.5 for name, square in squares.items()}


def check_selection(selected, exact, layout, top_k):
    """Every block taken scores at least as much as every block left, within rounding."""
    q, k_cmp = exact[0].detach(), exact[3].detach()
    scores = block_scores(q, k_cmp, layout)  # [N, Hkv, Ns], -1 in other samples
    count = (scores >= 0).sum(-1)
    assert torch.equal((selected >= 0).sum(-1), count.clamp(max=top_k))
    taken = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=q.device)
    index = torch.where(selected < 0, scores.shape[2], selected).long()
    taken = taken.scatter(2, index, True)[..., :-1]
    assert torch.equal(taken.sum(-1), count.clamp(max=top_k))  # no block twice
    assert (scores[taken] >= 0).all()
    worst = scores.masked_fill(~taken, float("inf")).amin(-1)
    best_left = scores.masked_fill(taken, -1).amax(-1)
    assert (best_left <= worst * (1 + 1e-5)).all()  # float32 sums of exponentials; seen 1e-6


def block_scores(q, k_cmp, layout):
    counts = layout.counts
    group, dim = q.shape[1] // k_cmp.shape[1], q.shape[2]
    starts = layout.compression_starts[: counts.compression].long()
    own = layout.sample_index[:, None] == layout.sample_index[starts]
    logits = torch.einsum("nhgd,chd->nhgc", q.unflatten(1, (-1, group)), k_cmp) * dim**-0.5
    attention = logits.masked_fill(~own[:, None, None], float("-inf")).softmax(-1).sum(2)
    scores = attention.new_zeros(*attention.shape[:2], counts.selection)
    scores.index_add_(2, layout.selection_index[starts], attention)
    block_sample = layout.sample_index[layout.selection_starts[: counts.selection].long()]
    same = layout.sample_index[:, None] == block_sample
    return scores.masked_fill(~same[:, None], -1)


# samples, sides, shift, heads, KV heads, head dim, top-k, grid, dtype
CASES = [
    ([24, 1, 0, 14], (4, 8, 8), 4, 4, 2, 32, 3, 14, torch.float32),
    ([24, 1, 0, 14], (4, 8, 8), 4, 4, 2, 32, 3, 14, torch.float16),
    ([150], (8, 8, 8), 4, 3, 1, 32, 2, 8, torch.float32),  # over 64 tokens a block, 3 heads
    ([12, 9], (2, 8, 8), 0, 2, 2, 64, 64, 16, torch.float32),  # top-k above the blocks there are
    ([6, 5], (8, 8, 8), 0, 32, 1, 32, 2, 16, torch.float32),
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(case):
    *shape, top_k, grid, dtype = case
    inputs, layout, grad = draw(*shape, 1, dtype, grid)
    check(inputs, layout, grad, top_k)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # by the interpreter
@pytest.mark.parametrize("limit", [-1.0, 1e9], ids=["shifted", "unshifted"])
def test_kernels_equal_the_reference_in_many_small_pieces(monkeypatch, limit):
    """Several chunks of tokens, panels of blocks and programs a block; softmax with and without
    the running maximum; gates that are zero.
    """
    inputs, layout, grad = draw([14, 1, 9], (4, 8, 8), 4, 4, 2, 32, 6, torch.float32, 20)
    with torch.no_grad():
        for branch in range(3):
            inputs[5][branch::4, branch] = 0
    monkeypatch.setattr(ssa_triton, "PARTIAL_BYTES", 4 * 5 * 32 * 4 * 3)  # 5 tokens
    monkeypatch.setattr(ssa_triton, "PAIRS_A_PROGRAM", 2)
    monkeypatch.setattr(ssa_triton, "PAIRS_A_BACKWARD_PROGRAM", 2)
    monkeypatch.setattr(ssa_triton, "SELECT_GROUPS", 4)
    monkeypatch.setattr(ssa_triton, "SELECT_PANEL", 8)
    monkeypatch.setitem(ssa_triton.LIMITS, torch.float32, limit)
    check(inputs, layout, grad, 3)


# Sides, heads, KV heads and top-k go together: each set of them compiles all kernels anew.
@pytest.mark.parametrize("dtype", list(BOUNDS) if DEVICE == "cuda" else list(BOUNDS)[:2])
@pytest.mark.parametrize("kind", [((4, 8, 8), 2, 1, 1), ((8, 8, 8), 3, 3, 2), ((2, 4, 6), 4, 2, 5)])
@settings(max_examples=1 if DEVICE == "cpu" else 25, deadline=None)
@given(
    samples=st.lists(st.integers(0, 12), min_size=1, max_size=3).filter(any),
    shift=st.integers(0, 5),
    seed=st.integers(0, 1 << 30),
)
def test_kernels_equal_the_reference_on_drawn_layouts(kind, dtype, samples, shift, seed):
    sides, heads, kv_heads, top_k = kind
    inputs, layout, grad = draw(samples, sides, shift, heads, kv_heads, 32, seed, dtype, 12)
    check(inputs, layout, grad, top_k, cancelling=dtype != torch.float32)


@pytest.mark.parametrize("shape", [(70, 2, 3), (1, 1, 1), (23, 1, 5)])
@pytest.mark.parametrize("chunk", [1, 7, 80])
@pytest.mark.parametrize("tile", [1, 4, 1000])
def test_lists_hold_every_pair_once_in_tiles_of_one_block(shape, chunk, tile):
    generator = torch.Generator().manual_seed(0)
    blocks = 6
    selected = torch.randint(-1, blocks, shape, generator=generator, dtype=torch.int32).to(DEVICE)
    selected[7:14] = -1  # a chunk without a pair
    by_size = torch.randperm(blocks, generator=generator).int().to(DEVICE)
    by_size = torch.cat([by_size, torch.arange(blocks, 9, dtype=torch.int32, device=DEVICE)])
    chunk = min(chunk, shape[0])
    order, counts, tiles, used = ssa_lists.sort_pairs(selected, by_size, blocks, chunk, tile)
    stable = ssa_lists.stable_list(selected, by_size, blocks, chunk)
    _, kv_heads, top_k = shape
    listed = []
    for number, count in enumerate(used.tolist()):
        for begin, end, segment in tiles[number, :count].tolist():
            assert 0 < end - begin <= tile
            pairs = order[begin:end].long()
            assert (pairs // top_k % kv_heads * blocks + selected.flatten()[pairs] == segment).all()
            assert (pairs // (kv_heads * top_k) // chunk == number).all()
            listed += pairs.tolist()
    assert sorted(listed) == (selected.flatten() >= 0).nonzero().flatten().tolist()
    assert counts.sum() == len(listed)

    def place(pair):
        token, head = divmod(pair // top_k, kv_heads)
        block = int(selected.flatten()[pair])
        rank = by_size.tolist().index(block) if block >= 0 else 0
        return token // chunk, block < 0, head if block >= 0 else 0, rank, pair

    assert stable.tolist() == sorted(range(selected.numel()), key=place)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    ("heads", "top_k"),
    [((32, 2, 32), 8), ((32, 2, 32), 40), ((16, 1, 64), 8), ((4, 4, 128), 8), ((12, 2, 32), 8)],
)
def test_kernels_equal_the_reference_on_larger_batches(heads, dtype, top_k):
    for sides, shift, grid in (((4, 8, 8), 4, 40), ((8, 8, 8), 0, 24)):
        inputs, layout, grad = draw([900, 1, 1400], sides, shift, *heads, 2, dtype, grid)
        check(inputs, layout, grad, top_k)


def test_of_equal_scores_the_first_blocks_are_selected():
    inputs, layout, _ = draw([40], (8, 8, 8), 0, 2, 1, 32, 3, torch.float32, 24)
    with torch.no_grad():
        inputs[0].zero_()
    _, selected = ssa_triton.attention_and_selection(*inputs, layout, 4)
    assert torch.equal(
        selected.sort(-1).values, torch.arange(4).int().to(DEVICE).expand_as(selected)
    )


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(inputs, layout, grad, top_k):
    out = ssa_triton.attention(*inputs, layout, top_k)
    return out, *torch.autograd.grad(out, inputs, grad)


def test_the_same_inputs_give_the_same_bits_in_deterministic_mode():
    # One block that all take, of more tokens than a program has otherwise.
    inputs, layout, grad = draw([70], (8, 8, 8), 4, 2, 1, 32, 4, torch.float32, 8)
    with deterministic():
        first, second = (run(inputs, layout, grad, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    otherwise = run(inputs, layout, grad, 2)
    assert torch.equal(otherwise[0], first[0])  # the output in any mode
    for ours, theirs in zip(otherwise, first, strict=True):
        assert (ours - theirs).norm() <= BOUNDS[torch.float32] * theirs.norm()


def test_the_operators_compile_whole_and_run_in_checkpoints():
    inputs, layout, grad = draw([9, 5], (8, 8, 8), 4, 2, 1, 32, 5, torch.float32, 10)

    def attend(*inputs):
        return ssa_triton.attention(*(2 * x for x in inputs), layout, 3).sin()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")

    def checkpointed(*inputs):
        return checkpoint(attend, *inputs, use_reentrant=False)

    with deterministic():
        expected, *others = (
            (out := function(*inputs), *torch.autograd.grad(out, inputs, grad))
            for function in (attend, compiled, checkpointed)
        )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize(
    ("sides", "heads", "dtype", "message"),
    [
        ((8, 8, 8), (2, 1, 48), torch.float32, "head dim 48"),
        ((8, 8, 8), (33, 1, 32), torch.float32, "33 query heads a KV head"),
        ((8, 8, 8), (2, 1, 32), torch.float64, "torch.float64"),
        ((1, 8, 8), (2, 1, 32), torch.float32, "selection side 8 is 8 times"),
    ],
)
def test_what_the_kernels_lack_is_refused(sides, heads, dtype, message):
    inputs, layout, _ = draw([5], sides, 0, *heads, 7, dtype, 10)
    with pytest.raises(ValueError, match=message):
        ssa_triton.attention(*inputs, layout, 2)


def test_the_operators_have_fakes_and_flop_counts():
    inputs, layout, _ = draw([9, 5], (8, 8, 8), 4, 2, 1, 32, 5, torch.float32, 10)
    with FlopCounterMode(display=False) as counter:
        out = ssa_triton.attention(*inputs, layout, 3)
        forward = counter.get_total_flops()
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    n, nc, blocks = len(out), layout.num_compression_blocks, layout.counts.selection
    assert forward == 2 * n * 2 * 32 * (3 * nc + 2 * (4 * n // blocks))
    assert counter.get_total_flops() - forward == 2 * n * 2 * 32 * 5 * (nc + 4 * n // blocks)
    torch.library.opcheck(
        ssa_triton.ssa_forward,
        ssa_triton.operator_arguments(*inputs, layout, 3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
