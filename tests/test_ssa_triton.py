"""SSA's kernels, forward and backward, against the reference in float64.

Without a GPU they run in Triton's interpreter, in float32 and float16 (its bfloat16 dot is wrong).
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from kernels import ssa, ssa_triton
from tests.test_ssa import draw_coords, sorted_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
# ||ours - exact|| / ||exact||: a few roundings of the dtype. Seen: 6e-7, 6e-4, 4.5e-3.
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


def check(inputs, layout, grad, top_k):
    """Compare the output, the selection and every gradient with the reference in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, selected = ssa_triton.attention_and_selection(*inputs, layout, top_k)
    gradients = torch.autograd.grad(out, inputs, grad)
    check_selection(selected, exact, layout, top_k)
    expected = ssa.ssa_reference(*exact, layout, top_k, selected)
    exact_gradients = torch.autograd.grad(expected, exact, grad.double())
    bound = BOUNDS[out.dtype]
    errors = {
        name: ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        for name, ours, theirs in zip(
            ("out", *NAMES), (out, *gradients), (expected, *exact_gradients), strict=True
        )
        # one block of one key: the gradient of its logits is zero but for rounding
        if theirs.norm() > 1e-6 * theirs.numel() ** 0.5
    }
    assert max(errors.values()) < bound, errors
    return errors


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


CASES = [  # samples, sides, shift, heads, kv_heads, dim, top_k, grid
    ([40, 1, 0, 25], (4, 8, 8), 4, 4, 2, 32, 3, 20),
    ([150], (8, 8, 8), 4, 3, 1, 32, 2, 10),  # blocks over 64 tokens, a group no power of 2
    ([20, 9], (2, 8, 8), 0, 2, 2, 64, 64, 20),  # top-k above the number of blocks
    ([12, 9], (8, 8, 8), 0, 32, 1, 32, 2, 24),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_reference(case, dtype):
    *shape, top_k, grid = case
    inputs, layout, grad = draw(*shape, 1, dtype, grid)
    check(inputs, layout, grad, top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("heads", [(32, 2, 32), (16, 1, 64), (4, 4, 128), (12, 2, 32)])
@pytest.mark.parametrize("top_k", [8, 40])
def test_kernels_equal_the_reference_on_larger_batches(heads, dtype, top_k):
    for sides, shift, grid in (((4, 8, 8), 4, 40), ((8, 8, 8), 0, 24)):
        inputs, layout, grad = draw([900, 1, 1400], sides, shift, *heads, 2, dtype, grid)
        check(inputs, layout, grad, top_k)


def test_of_equal_scores_the_first_blocks_are_selected():
    inputs, layout, _ = draw([60], (8, 8, 8), 0, 2, 1, 32, 3, torch.float32, 64)
    with torch.no_grad():
        inputs[0].zero_()
    _, selected = ssa_triton.attention_and_selection(*inputs, layout, 4)
    assert torch.equal(
        selected.sort(-1).values, torch.arange(4).int().to(DEVICE).expand_as(selected)
    )


def test_the_same_inputs_give_the_same_bits():
    inputs, layout, grad = draw([30, 9], (8, 8, 8), 4, 4, 2, 32, 4, torch.float32)
    first, second = (
        (out := ssa_triton.attention(*inputs, layout, 3), *torch.autograd.grad(out, inputs, grad))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operators_have_fakes():
    inputs, layout, _ = draw([20, 9], (8, 8, 8), 4, 4, 2, 32, 5, torch.float32)
    torch.library.opcheck(
        ssa_triton.ssa_forward,
        ssa_triton.operator_arguments(*inputs, layout, 3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
