"""Triton SSA: the launches of the forward and backward kernels, as torch custom operators.

`spatial_sparse_attention` in `ssa.py` calls `attention` for CUDA tensors. With TRITON_INTERPRET=1
set before triton is imported, the same code runs on CPU tensors, slowly, for tests.

The selection branch is split by key block: the (token, KV head, slot) pairs are sorted by the
block they took, so that the tokens which took a block are processed together, its keys are read
once for several tokens, and matrix instructions are full. Each pair leaves a partial result; they
are merged chunk by chunk of tokens, which bounds the memory.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import ssa_backward as backward_kernels
from kernels import ssa_forward as forward_kernels
from kernels.ssa import SSALayout

LOG2_E = 1.4426950408889634
PARTIAL_BYTES = 1 << 28  # partial results of the selection branch held at once
SCRATCH_BYTES = 1 << 27  # scores of the tokens whose blocks are being chosen
ROUNDS = 4  # tiles of pairs a program works through
SELECT_GROUPS = 128  # groups of blocks whose best scores are kept while choosing
PROGRAMS_A_MULTIPROCESSOR = 6  # of the persistent select kernel
HEAD_DIMS = (32, 64, 128)
MAX_GROUP = 32  # query heads a KV head
MAX_RATIO = 4  # selection side over compression side


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched: rows (token, head) and keys of a tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# Fastest on an H200 at head dim 32 of those tried; see benchmarks/README.md.
TILES = {
    "attend": Tile(128, 64, 4, 3),
    "pairs": Tile(128, 32, 4, 2),
    "select": Tile(128, 64, 4, 4),
    "combine": Tile(32, 0, 4, 1),
    "dq": Tile(64, 64, 4, 3),
    "dq_pairs": Tile(64, 32, 4, 2),
    "dkv": Tile(128, 64, 4, 1),
    "dkv_pairs": Tile(128, 64, 4, 1),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
) -> Tensor:
    """`spatial_sparse_attention` of checked inputs through the kernels."""
    return ssa_forward(*operator_arguments(q, k, v, k_cmp, v_cmp, gates, layout, top_k))[0]


def attention_and_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Return the output and the selected blocks [N, Hkv, top_k] int32, unsorted, -1 for none."""
    outputs = ssa_forward(*operator_arguments(q, k, v, k_cmp, v_cmp, gates, layout, top_k))
    return outputs[0], outputs[4]


def operator_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
) -> tuple[Tensor | int, ...]:
    """Return the arguments of `ssa_forward`; raise ValueError for what the kernels lack."""
    group, dim = q.shape[1] // k.shape[1], q.shape[2]
    ratio = layout.selection // layout.compression
    if dim not in HEAD_DIMS:
        raise ValueError(f"head dim {dim}: the kernels take {HEAD_DIMS}; use ssa_reference")
    if group > MAX_GROUP:
        raise ValueError(f"{group} query heads a KV head: the kernels take up to {MAX_GROUP}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q is {q.dtype}: the kernels take fp16, bf16 and fp32")
    if ratio > MAX_RATIO:
        raise ValueError(
            f"selection side {layout.selection} is {ratio} times the compression side "
            f"{layout.compression}: the kernels take up to {MAX_RATIO} times"
        )
    return (
        *(x.contiguous() for x in (q, k, v, k_cmp, v_cmp, gates)),
        layout.selection_starts,
        layout.selection_compression,
        layout.compression_range,
        layout.selection_range,
        layout.compression_tokens,
        layout.window_order,
        layout.window_range,
        top_k,
        layout.counts.selection,
        ratio**3,
        layout.selection**3,
    )


@torch.library.custom_op("gigashape::ssa_forward", mutates_args=())
def ssa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    selection_starts: Tensor,
    selection_compression: Tensor,
    compression_range: Tensor,
    selection_range: Tensor,
    compression_tokens: Tensor,  # noqa: ARG001  (for the backward)
    window_order: Tensor,
    window_range: Tensor,
    top_k: int,
    num_selection: int,
    slots: int,
    block_tokens: int,  # noqa: ARG001  (for the backward)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, compression and selection branch [N, Hq, D], log2-sum-exp [3, N, Hq] float32
    (compression, selection, window), selected [N, Hkv, top_k], and the sorted pairs: the pairs and
    the first of each KV head, block and chunk (`_sort_pairs`).
    """
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    out, out_cmp, out_sel = (torch.empty_like(q) for _ in range(3))
    lse = torch.empty(3, n, heads, dtype=torch.float32, device=q.device)
    selected = torch.empty(n, kv_heads, top_k, dtype=torch.int32, device=q.device)
    scale = dim**-0.5 * LOG2_E

    shape, launch, grid = _launch("attend", q, k)
    forward_kernels.attend_places[grid(n)](
        q,
        k,
        v,
        out,
        lse[2],
        window_order,
        window_range,
        n,
        scale,
        HAS_ORDER=True,
        **shape,
        **launch,
    )
    forward_kernels.attend_places[grid(n)](
        q, k_cmp, v_cmp, out_cmp, lse[0], window_order, compression_range, n, scale,
        HAS_ORDER=False, **shape, **launch,
    )  # fmt: skip

    shape, launch, _ = _launch("select", q, k)
    padded_slots = triton.next_power_of_2(slots)
    blocks_a_tile = max(1, shape.pop("BN") // padded_slots)
    items = triton.cdiv(n, shape["T"]) * kv_heads
    row_bytes = 4 * shape["T"] * num_selection
    programs = max(1, min(items, _programs(q), SCRATCH_BYTES // row_bytes))
    scratch = torch.empty(programs, shape["T"], num_selection, device=q.device)
    forward_kernels.select_places[(programs,)](
        q, k_cmp, lse[0], selected, scratch, selection_range, selection_compression,
        n, num_selection, scale, BS=blocks_a_tile, SLOTS=padded_slots,
        GROUPS=SELECT_GROUPS,
        MEMBERS=triton.next_power_of_2(triton.cdiv(num_selection, SELECT_GROUPS)), TOP_K=top_k,
        **shape, **launch,
    )  # fmt: skip
    del scratch

    chunk = _chunk(q, top_k)
    order, segments = _sort_pairs(selected, num_selection, chunk)
    shape, launch, _ = _launch("pairs", q, k)
    tiles = _pair_tiles(
        segments, -(-n // chunk), min(chunk, n) * kv_heads * top_k, ROUNDS * shape["T"]
    )
    partial = q.new_empty(min(chunk, n), kv_heads, top_k, heads // kv_heads, dim)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    combine_shape, combine_launch, grid = _launch("combine", q, k)
    del combine_shape["BN"]
    for i, first in enumerate(range(0, n, chunk)):
        last = min(first + chunk, n)
        forward_kernels.attend_pairs[(tiles.shape[1],)](
            q, k, v, partial, partial_lse, order, tiles[i], selection_starts,
            first * kv_heads * top_k, num_selection, scale, PAIRS=kv_heads * top_k,
            **shape, **launch,
        )  # fmt: skip
        forward_kernels.combine_places[grid(last - first)](
            out, out_cmp, out_sel, lse[1], partial, partial_lse, selected, gates, first, last,
            TOP_K=top_k, **combine_shape, **combine_launch,
        )  # fmt: skip
    return out, out_cmp, out_sel, lse, selected, order, segments


@ssa_forward.register_fake
def _(q, k, v, k_cmp, v_cmp, gates, *tables_and_numbers):  # type: ignore[no-untyped-def]  # noqa: ARG001
    top_k, num_selection = tables_and_numbers[-4:-2]
    n, heads, _ = q.shape
    kv_heads = k.shape[1]
    chunks = -(-n // _chunk(q, top_k))
    return (
        torch.empty_like(q),
        torch.empty_like(q),
        torch.empty_like(q),
        q.new_empty(3, n, heads, dtype=torch.float32),
        q.new_empty(n, kv_heads, top_k, dtype=torch.int32),
        q.new_empty(n * kv_heads * top_k, dtype=torch.int32),
        q.new_empty(kv_heads * num_selection * chunks + 1, dtype=torch.int32),
    )


@torch.library.custom_op("gigashape::ssa_backward", mutates_args=())
def ssa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    out_cmp: Tensor,
    out_sel: Tensor,
    lse: Tensor,
    selected: Tensor,
    order: Tensor,
    segments: Tensor,
    selection_starts: Tensor,
    compression_range: Tensor,
    compression_tokens: Tensor,
    window_order: Tensor,
    window_range: Tensor,
    num_selection: int,
    block_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, k_cmp, v_cmp and gates."""
    n, heads, dim = q.shape
    kv_heads, top_k = selected.shape[1:]
    q_scale = dim**-0.5
    scale = q_scale * LOG2_E
    grad = grad.contiguous()

    # The window branch is computed again rather than kept, in what becomes the gradient of q.
    dq = torch.empty_like(q)
    shape, launch, grid = _launch("attend", q, k)
    forward_kernels.attend_places[grid(n)](
        q, k, v, dq, lse[2], window_order, window_range, n, scale, HAS_ORDER=True, **shape, **launch
    )
    delta = torch.empty_like(lse)
    grad_gates = torch.empty(kv_heads, n, 3, dtype=torch.float32, device=q.device)
    shape, launch, grid = _launch("combine", q, k)
    del shape["BN"]
    backward_kernels.prepare_backward[grid(n)](
        grad, out_cmp, out_sel, dq, delta[0], delta[1], delta[2], grad_gates, n,
        **shape, **launch,
    )  # fmt: skip

    place_shape, place_launch, grid = _launch("dq", q, k)
    backward_kernels.dq_places[grid(n)](
        q, k, v, grad, gates, lse[2], delta[2], dq, window_order, window_range, dq, selected,
        0, n, scale, q_scale, BRANCH=2, PARTIALS=0, HAS_ORDER=True, **place_shape, **place_launch,
    )  # fmt: skip
    chunk = _chunk(q, top_k)
    shape, launch, _ = _launch("dq_pairs", q, k)
    tiles = _pair_tiles(
        segments, -(-n // chunk), min(chunk, n) * kv_heads * top_k, ROUNDS * shape["T"]
    )
    partial = q.new_empty(min(chunk, n), kv_heads, top_k, heads // kv_heads, dim)
    for i, first in enumerate(range(0, n, chunk)):
        last = min(first + chunk, n)
        backward_kernels.dq_pairs[(tiles.shape[1],)](
            q, k, v, grad, gates, lse[1], delta[1], partial, order, tiles[i], selection_starts,
            first * kv_heads * top_k, num_selection, scale, q_scale, PAIRS=kv_heads * top_k,
            **shape, **launch,
        )  # fmt: skip
        backward_kernels.dq_places[grid(last - first)](
            q, k_cmp, v_cmp, grad, gates, lse[0], delta[0], dq, window_order, compression_range,
            partial, selected, first, last, scale, q_scale,
            BRANCH=0, PARTIALS=top_k, HAS_ORDER=False, **place_shape, **place_launch,
        )  # fmt: skip
    del partial

    shape, launch, _ = _launch("dkv", q, k)
    dk_win = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    dv_win = torch.empty_like(dk_win)
    key_tiles = triton.cdiv(n, shape["BN"])
    backward_kernels.dkv_places[(key_tiles, kv_heads, 1)](
        q, k, v, grad, gates, lse[2], delta[2], dk_win, dv_win, window_order, window_range,
        window_range, n, scale, q_scale, BRANCH=2, HAS_ORDER=True, **shape, **launch,
    )  # fmt: skip
    nc = len(k_cmp)
    key_tiles = triton.cdiv(nc, shape["BN"])
    splits = min(_splits(key_tiles * kv_heads), triton.cdiv(n, shape["T"]))
    dk_cmp = torch.empty(splits, *k_cmp.shape, dtype=torch.float32, device=k.device)
    dv_cmp = torch.empty_like(dk_cmp)
    backward_kernels.dkv_places[(key_tiles, kv_heads, splits)](
        q, k_cmp, v_cmp, grad, gates, lse[0], delta[0], dk_cmp, dv_cmp, window_order,
        compression_range, compression_tokens, nc, scale, q_scale,
        BRANCH=0, HAS_ORDER=False, **shape, **launch,
    )  # fmt: skip
    shape, launch, _ = _launch("dkv_pairs", q, k)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    tiles_a_block = triton.cdiv(min(n, block_tokens), shape["BN"])
    backward_kernels.dkv_pairs[(kv_heads * num_selection * tiles_a_block,)](
        q, k, v, grad, gates, lse[1], delta[1], dk_win, dv_win, dk, dv, order, segments,
        selection_starts, num_selection, -(-n // chunk), tiles_a_block, scale, q_scale,
        PAIRS=kv_heads * top_k, **shape, **launch,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        dk_cmp.sum(0).to(k.dtype),
        dv_cmp.sum(0).to(v.dtype),
        grad_gates.sum(0).to(gates.dtype),
    )


@ssa_backward.register_fake
def _(grad, q, k, v, k_cmp, v_cmp, gates, *others):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tuple(torch.empty_like(x) for x in (q, k, v, k_cmp, v_cmp, gates))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, k_cmp, v_cmp, gates, starts, _, compression_range, _, compression_tokens = inputs[:11]
    _, out_cmp, out_sel, lse, selected, order, segments = output
    ctx.save_for_backward(
        q, k, v, k_cmp, v_cmp, gates, out_cmp, out_sel, lse, selected, order, segments,
        starts, compression_range, compression_tokens, *inputs[11:13],
    )  # fmt: skip
    ctx.num_selection, ctx.block_tokens = inputs[14], inputs[16]
    ctx.mark_non_differentiable(out_cmp, out_sel, lse, selected, order, segments)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    grads = ssa_backward(grad, *ctx.saved_tensors, ctx.num_selection, ctx.block_tokens)
    return (*grads, *[None] * 11)


ssa_forward.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.gigashape.ssa_forward)
def _forward_flops(q, k, v, k_cmp, *others, out_shape=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count two products of every branch and the scores' one; blocks and windows of mean size.

    The compression blocks of a batch count as if they were of one sample.
    """
    n, heads, dim = q
    top_k, num_selection = others[-4:-2]
    local = (top_k + 1) * n // max(num_selection, 1)
    return 2 * n * heads * dim * (3 * k_cmp[0] + 2 * local)


@register_flop_formula(torch.ops.gigashape.ssa_backward)
def _backward_flops(grad, q, k, v, k_cmp, *others, out_shape=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count five products of every branch, as is usual, though the kernels take seven."""
    n, heads, dim = q
    top_k, num_selection = others[5][2], others[-2]
    local = (top_k + 1) * n // max(num_selection, 1)
    return 2 * n * heads * dim * 5 * (k_cmp[0] + local)


def _launch(kernel: str, q: Tensor, k: Tensor):  # type: ignore[no-untyped-def]
    """Return a kernel's constants, its launch options, and its grid for a number of tokens."""
    tile = TILES[kernel]
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    if dim * q.element_size() > 128:  # keeps the tiles within shared memory and registers
        tile = replace(tile, rows=tile.rows // 2, stages=1, keys=min(tile.keys, 32))
    tokens = max(1, tile.rows // padded)
    tokens = max(tokens, triton.cdiv(16, padded))  # a matrix instruction has 16 rows at least
    shape = {"HKV": kv_heads, "G": group, "GP": padded, "T": tokens, "D": dim, "BN": tile.keys}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}

    def grid(n: int) -> tuple[int, int]:
        return triton.cdiv(n, tokens), kv_heads

    return shape, launch, grid


def _chunk(q: Tensor, top_k: int) -> int:
    """Return the tokens whose partial results PARTIAL_BYTES hold."""
    _, heads, dim = q.shape
    return max(1, PARTIAL_BYTES // (heads * top_k * dim * q.element_size()))


def _programs(q: Tensor) -> int:
    """Return the size of a persistent grid."""
    if q.device.type != "cuda":
        return 3  # the interpreter: enough that a program works through several tiles
    count = torch.cuda.get_device_properties(q.device).multi_processor_count
    return count * PROGRAMS_A_MULTIPROCESSOR


def _splits(programs: int) -> int:
    """Return the shares of rows that fill the device when there are few tiles of keys."""
    return max(1, min(64, 1024 // programs))


def _sort_pairs(selected: Tensor, num_selection: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs (token, KV head, slot) by KV head, block and chunk of tokens.

    Returns the pairs [N * Hkv * top_k] int32, pairs without a block last, and the place of the
    first of each KV head, block and chunk, [Hkv * Ns * chunks + 1] int32.
    """
    n, kv_heads, _ = selected.shape
    chunks = -(-n // chunk)
    head = torch.arange(kv_heads, device=selected.device, dtype=torch.int32)[:, None]
    part = torch.arange(n, device=selected.device, dtype=torch.int32)[:, None, None] // chunk
    total = kv_heads * num_selection * chunks
    key = (head * num_selection + selected) * chunks + part
    key = torch.where(selected < 0, total, key).flatten()
    key, order = key.sort(stable=True)
    places = torch.arange(total + 1, device=selected.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(key, places, out_int32=True)


def _pair_tiles(segments: Tensor, chunks: int, pairs: int, tokens: int) -> Tensor:
    """Cut each chunk's segments into tiles of at most `tokens` pairs.

    Returns [chunks, tiles, 3] int32: begin and end in the sorted pairs, KV head * Ns + block. The
    number of tiles is a bound that needs no look at the data; the tiles past the last are empty.
    """
    begin = segments[:-1].view(-1, chunks).t()
    length = segments.diff().view(-1, chunks).t()
    last = ((length + tokens - 1) // tokens).cumsum(1)  # [chunks, Hkv * Ns], one past its tiles
    bound = pairs // tokens + begin.shape[1]
    tile = torch.arange(bound, device=segments.device).expand(chunks, bound).contiguous()
    segment = torch.searchsorted(last.contiguous(), tile, right=True)
    used = segment < begin.shape[1]
    segment = segment.clamp(max=begin.shape[1] - 1)
    offset = (tile - (last.gather(1, segment) - -(-length.gather(1, segment) // tokens))) * tokens
    start = begin.gather(1, segment) + offset
    end = torch.minimum(start + tokens, begin.gather(1, segment) + length.gather(1, segment))
    table = torch.stack([start, end, segment], dim=2)
    return torch.where(used[:, :, None], table, 0).int()
