"""Triton SSA: the launches of the forward and backward kernels, as torch custom operators.

`spatial_sparse_attention` in `ssa.py` calls `attention` for CUDA tensors. With TRITON_INTERPRET=1
set before triton is imported, the same code runs on CPU tensors, slowly, for tests.

The selection branch is split by key block: the (token, KV head, slot) pairs are sorted by the
block they took (`ssa_lists.py`), so that the tokens which took a block are processed together, its
keys are read once for several tokens, and matrix instructions are full. Each pair leaves a partial
result; they are merged chunk by chunk of tokens, which bounds the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import ssa_backward as backward_kernels
from kernels import ssa_forward as forward_kernels
from kernels.ssa import SSALayout
from kernels.ssa_lists import cut_tiles, sort_pairs, stable_list

LOG2_E = 1.4426950408889634
PARTIAL_BYTES = 192 << 20  # partial results of the selection branch held at once
SCRATCH_BYTES = 1 << 27  # scores of the tokens whose blocks are being chosen
KEYS_A_PROGRAM = 128  # whose norms are taken
PAIRS_A_PROGRAM = 32  # of one block, in the forward pass
PAIRS_A_BACKWARD_PROGRAM = 64
SELECT_GROUPS = 128  # groups of blocks whose best scores are kept while choosing
SELECT_PANEL = 2048  # compression blocks that are scored before they are summed
PROGRAMS_A_MULTIPROCESSOR = 3  # that run at once, at 168 registers a thread
HEAD_DIMS = (32, 64, 128)
MAX_GROUP = 32  # query heads a KV head
MAX_RATIO = 4  # selection side over compression side
# Base-2 logits within +-limit need no running maximum: their exponentials are normal numbers.
LIMITS = {torch.float16: 12.0, torch.bfloat16: 60.0, torch.float32: 60.0}


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched: rows (token, head) and keys of a tile, warps, pipeline stages, and
    the registers a thread may have: with fewer, more programs run side by side.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By bytes of a row of q, up to which they serve. Fastest on an H200 of those that
# benchmarks/ssa.py tune tries.
TILES = {
    64: {
        "attend": Tile(128, 64, 4, 3, 128),
        "attend_window": Tile(128, 32, 4, 3, 128),
        "pairs": Tile(128, 32, 4, 2, 128),
        "select": Tile(128, 64, 4, 4),
        "combine": Tile(16, 0, 2, 1),
        "dq": Tile(64, 64, 4, 3),
        "dq_window": Tile(128, 32, 4, 3, 128),
        "dkv": Tile(64, 64, 4, 3, 168),
        "dkv_window": Tile(64, 64, 4, 2, 168),
        "backward_pairs": Tile(64, 64, 4, 5, 168),
    },
    128: {
        "attend": Tile(128, 64, 4, 3),
        "attend_window": Tile(128, 32, 4, 2, 128),
        "pairs": Tile(64, 32, 4, 3, 128),
        "select": Tile(128, 64, 4, 4),
        "combine": Tile(16, 0, 2, 1),
        "dq": Tile(64, 64, 4, 3),
        "dq_window": Tile(64, 32, 4, 3, 128),
        "dkv": Tile(64, 64, 4, 3),
        "dkv_window": Tile(64, 64, 4, 5),
        "backward_pairs": Tile(64, 64, 4, 5),
    },
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
) -> tuple[Tensor | list[Tensor] | int, ...]:
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
        [getattr(layout, name) for name in TABLES],
        top_k,
        layout.counts.selection,
        ratio**3,
    )


# The layout's tables that the kernels read, in this order.
TABLES = (
    "selection_starts",
    "selection_by_size",
    "selection_compression",
    "compression_range",
    "selection_range",
    "compression_tokens",
    "window_order",
    "window_range",
)


@torch.library.custom_op("gigashape::ssa_forward", mutates_args=())
def ssa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    tables: Sequence[Tensor],
    top_k: int,
    num_selection: int,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, compression and selection branch [N, Hq, D], log2-sum-exp [3, N, Hq] float32
    (compression and selection less log2 of the gate, window), selected [N, Hkv, top_k], and the
    sorted pairs with their counts (`sort_pairs`).

    slots: compression blocks that a selection block can hold. A block without a voxel is none.
    """
    starts, by_size, inner, compression_range, selection_range, _, *window = tables
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    out, out_cmp, out_sel = (torch.empty_like(q) for _ in range(3))
    lse = torch.empty(3, n, heads, dtype=torch.float32, device=q.device)
    selected = torch.empty(n, kv_heads, top_k, dtype=torch.int32, device=q.device)
    scale = dim**-0.5 * LOG2_E

    largest = _attend(q, k, v, out, lse[2], *window)
    _attend(q, k_cmp, v_cmp, out_cmp, lse[0], None, compression_range)

    shape, launch, _ = _launch("select", q, k)
    width = triton.cdiv(num_selection, 16) * 16  # rows that loads may vectorise
    panel = max(SELECT_GROUPS, SELECT_PANEL // slots)
    line = shape["T"] * (width + (0 if slots == 1 else panel * slots))
    items = triton.cdiv(n, shape["T"]) * kv_heads
    programs = max(1, min(items, _programs(q), SCRATCH_BYTES // (4 * line)))
    scratch = torch.empty(programs, line, device=q.device)
    forward_kernels.select_places[(programs,)](
        q, k_cmp, lse[0], selected, scratch, compression_range, selection_range, inner,
        n, width, scale, SLOTS=slots, PANEL=panel, GROUPS=SELECT_GROUPS,
        MEMBERS=triton.next_power_of_2(triton.cdiv(num_selection, SELECT_GROUPS)), TOP_K=top_k,
        **shape, **launch,
    )  # fmt: skip
    del scratch

    chunk = min(_chunk(q, top_k), n)
    order, counts, tiles, tile_counts = sort_pairs(
        selected, by_size, num_selection, chunk, PAIRS_A_PROGRAM
    )
    shape, launch, _ = _launch("pairs", q, k)
    partial = q.new_empty(chunk, kv_heads, top_k, heads // kv_heads, dim)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    combine_shape, combine_launch, grid = _launch("combine", q, k)
    del combine_shape["BN"]
    for i, first in enumerate(range(0, n, chunk)):
        last = min(first + chunk, n)
        forward_kernels.attend_pairs[(tiles.shape[1],)](
            q, k, v, partial, partial_lse, largest, order, tiles, tile_counts, starts,
            i, first * kv_heads * top_k, num_selection, scale, LIMITS[q.dtype],
            PAIRS=kv_heads * top_k, **shape, **launch,
        )  # fmt: skip
        forward_kernels.combine_places[grid(last - first)](
            out, out_cmp, out_sel, lse[0], lse[1], partial, partial_lse, selected, gates,
            first, last, TOP_K=top_k, **combine_shape, **combine_launch,
        )  # fmt: skip
    return out, out_cmp, out_sel, lse, selected, order, counts


@ssa_forward.register_fake
def _(q, k, v, k_cmp, v_cmp, gates, tables, top_k, num_selection, slots):  # type: ignore[no-untyped-def]  # noqa: ARG001
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
        q.new_empty(chunks, kv_heads, num_selection, dtype=torch.int32),
    )


@torch.library.custom_op("gigashape::ssa_backward", mutates_args=())
def ssa_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    num_selection: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, k_cmp, v_cmp and gates.

    inputs are these, outputs what `ssa_forward` returns behind the output, tables as there.
    """
    q, k, v, k_cmp, v_cmp, gates = inputs
    out_cmp, out_sel, lse, selected, order, counts = outputs
    starts, by_size, _, compression_range, _, compression_tokens = tables[:6]
    window_order, window_range = tables[6:]
    n, heads, dim = q.shape
    kv_heads, top_k = selected.shape[1:]
    q_scale = dim**-0.5
    scale = q_scale * LOG2_E
    grad = grad.contiguous()

    dq = torch.empty_like(q)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    grad_gates = torch.empty(kv_heads, n, 3, dtype=torch.float32, device=q.device)
    stats = torch.empty(n, heads, 2, dtype=torch.float32, device=q.device)
    shape, launch, grid = _launch("dq_window", q, k)
    backward_kernels.dq_window[grid(n)](
        q, k, v, grad, gates, lse[2], dq, stats, grad_gates, window_order, window_range, n,
        scale, q_scale, **shape, **launch,
    )  # fmt: skip
    shape, launch, _ = _launch("dkv_window", q, k)
    backward_kernels.dkv_places[(triton.cdiv(n, shape["BN"]), kv_heads, 1)](
        q, k, v, grad, stats, dk, dv, window_order, window_range, window_range, n, scale,
        q_scale, HAS_ORDER=True, **shape, **launch,
    )  # fmt: skip

    stats = torch.empty(2, n, heads, 2, dtype=torch.float32, device=q.device)
    shape, launch, grid = _launch("combine", q, k)
    del shape["BN"]
    backward_kernels.prepare_backward[grid(n)](
        grad, out_cmp, out_sel, lse[0], lse[1], stats[0], stats[1], grad_gates, n,
        **shape, **launch,
    )  # fmt: skip
    chunk = min(_chunk(q, top_k), n)
    dq_shape, dq_launch, grid = _launch("dq", q, k)
    shape, launch, _ = _launch("backward_pairs", q, k)
    pairs = chunk * kv_heads * top_k
    if deterministic:  # one program a block, so that its sums need no order, and one order of pairs
        order = stable_list(selected, by_size, num_selection, chunk)
    pairs_a_program = pairs if deterministic else PAIRS_A_BACKWARD_PROGRAM
    _, tiles, tile_counts = cut_tiles(counts, by_size, pairs, pairs_a_program)
    partial = q.new_empty(chunk, kv_heads, top_k, heads // kv_heads, dim)
    for i, first in enumerate(range(0, n, chunk)):
        last = min(first + chunk, n)
        backward_kernels.backward_pairs[(tiles.shape[1],)](
            q, k, v, grad, stats[1], dk, dv, partial, order, tiles, tile_counts, starts,
            i, first * kv_heads * top_k, num_selection, scale, q_scale,
            PAIRS=kv_heads * top_k, **shape, **launch,
        )  # fmt: skip
        backward_kernels.dq_compression[grid(last - first)](
            q, k_cmp, v_cmp, grad, stats[0], dq, compression_range, partial, selected,
            first, last, scale, q_scale, PARTIALS=top_k, **dq_shape, **dq_launch,
        )  # fmt: skip
    del partial

    shape, launch, _ = _launch("dkv", q, k)
    nc = len(k_cmp)
    key_tiles = triton.cdiv(nc, shape["BN"])
    splits = min(_splits(q, key_tiles * kv_heads), triton.cdiv(n, shape["T"]))
    dk_cmp = torch.empty(splits, *k_cmp.shape, dtype=torch.float32, device=k.device)
    dv_cmp = torch.empty_like(dk_cmp)
    backward_kernels.dkv_places[(key_tiles, kv_heads, splits)](
        q, k_cmp, v_cmp, grad, stats[0], dk_cmp, dv_cmp, window_order, compression_range,
        compression_tokens, nc, scale, q_scale, HAS_ORDER=False, **shape, **launch,
    )  # fmt: skip
    return (
        dq,
        dk.to(k.dtype),
        dv.to(v.dtype),
        dk_cmp.sum(0).to(k.dtype),
        dv_cmp.sum(0).to(v.dtype),
        grad_gates.sum(0).to(gates.dtype),
    )


@ssa_backward.register_fake
def _(grad, inputs, outputs, tables, num_selection, deterministic):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tuple(torch.empty_like(x) for x in inputs)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, tables, _, num_selection, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:], *tables)
    ctx.num_selection = num_selection
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros the size of the branches


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None,) * 6
    if grad is not None:
        grads = ssa_backward(
            grad, saved[:6], saved[6:12], saved[12:], ctx.num_selection,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    return *grads, [None] * len(TABLES), None, None, None


ssa_forward.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.gigashape.ssa_forward)
def _forward_flops(q, k, v, k_cmp, v_cmp, gates, tables, top_k, num_selection, *_, out_shape=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count two products of every branch and the scores' one; blocks and windows of mean size.

    The compression blocks of a batch count as if they were of one sample.
    """
    n, heads, dim = q
    local = (top_k + 1) * n // max(num_selection, 1)
    return 2 * n * heads * dim * (3 * k_cmp[0] + 2 * local)


@register_flop_formula(torch.ops.gigashape.ssa_backward)
def _backward_flops(grad, inputs, outputs, tables, num_selection, *_, out_shape=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count five products of every branch, as is usual, though the kernels take some twice."""
    n, heads, dim = inputs[0]
    top_k = outputs[3][2]
    local = (top_k + 1) * n // max(num_selection, 1)
    return 2 * n * heads * dim * 5 * (inputs[3][0] + local)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    order: Tensor | None,
    ranges: Tensor,
) -> Tensor:
    """Write softmax attention of every token over its own range, and the log2-sum-exps.

    Returns a bound [Hkv] of the base-2 logits with all keys.
    """
    n, _, dim = q.shape
    kv_heads = k.shape[1]
    shape, launch, grid = _launch("attend" if order is None else "attend_window", q, k)
    longest, largest = torch.zeros(2, kv_heads, dtype=torch.float32, device=q.device)
    forward_kernels.longest_keys[(triton.cdiv(len(k), KEYS_A_PROGRAM), kv_heads)](
        k, longest, len(k), HKV=kv_heads, D=dim, SIZE=KEYS_A_PROGRAM
    )
    forward_kernels.attend_places[grid(n)](
        q, k, v, out, lse, longest, largest, ranges if order is None else order, ranges, n,
        dim**-0.5 * LOG2_E, LIMITS[q.dtype], HAS_ORDER=order is not None, **shape, **launch,
    )  # fmt: skip
    return largest


def _launch(kernel: str, q: Tensor, k: Tensor):  # type: ignore[no-untyped-def]
    """Return a kernel's constants, its launch options, and its grid for a number of tokens."""
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    row_bytes = dim * q.element_size()
    tile = TILES[64 if row_bytes <= 64 else 128][kernel]
    if row_bytes > 128:  # keeps the tiles within shared memory and registers
        keys = min(tile.keys, 32)
        tile = replace(tile, rows=tile.rows // 2, keys=keys, stages=1, registers=None)
    tokens = max(1, tile.rows // padded)
    tokens = max(tokens, triton.cdiv(16, padded))  # a matrix instruction has 16 rows at least
    shape = {"HKV": kv_heads, "G": group, "GP": padded, "T": tokens, "D": dim, "BN": tile.keys}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}

    def grid(n: int) -> tuple[int, int]:
        return triton.cdiv(n, tokens), kv_heads

    return shape, launch, grid


def _chunk(q: Tensor, top_k: int) -> int:
    """Return the tokens whose partial results PARTIAL_BYTES hold."""
    _, heads, dim = q.shape
    return max(1, PARTIAL_BYTES // (heads * top_k * dim * q.element_size()))


def _programs(q: Tensor) -> int:
    """Return the programs that run at once: the size of a persistent grid."""
    if q.device.type != "cuda":
        return 3  # the interpreter: enough that a program works through several tiles
    count = torch.cuda.get_device_properties(q.device).multi_processor_count
    return count * PROGRAMS_A_MULTIPROCESSOR


def _splits(q: Tensor, programs: int) -> int:
    """Return the shares of rows whose programs fill the device in about whole waves."""
    wave = _programs(q)

    def idle(splits: int) -> float:
        total = splits * programs
        return -(-total // wave) * wave / total

    return min(range(1, 33), key=idle)
