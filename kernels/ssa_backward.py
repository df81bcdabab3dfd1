"""Triton kernels of SSA's backward pass; tiles, rows and lists are those of `ssa_forward.py`.

Per branch, with gate g and output o: delta = do . o, p = exp2(logits - lse), dv = (g p)^T do,
ds = g p (do v^T - delta), dq = ds k, dk = ds^T q. No kernel uses atomics, so the same inputs give
the same bits.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from kernels.ssa_forward import dot, load_keys, row_of, span_of


@triton.jit
def _prepare_branch(
    do, out, delta, grad_gates, branch, offsets, row, inside, token, h, n,
    T: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    values = tl.load(out + offsets, mask=inside[:, None], other=0.0)
    product = tl.sum(do * values.to(tl.float32), 1)
    tl.store(delta + row, product, mask=inside)
    share = tl.sum(tl.reshape(product, [T, GP]), 1)
    tl.store(grad_gates + (h * n + token) * 3 + branch, share, mask=token < n)


@triton.jit(do_not_specialize=["n"])
def prepare_backward(
    grad, out_cmp, out_sel, out_win,  # [N, Hq, D]
    delta_cmp, delta_sel, delta_win,  # [N, Hq] float32 to be written
    grad_gates,  # [Hkv, N, 3] to be written: each KV head's share
    n,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Products of the output's gradient with the branches."""
    h = tl.program_id(1)
    rows = tl.arange(0, T * GP)
    tokens = (tl.program_id(0) * T + rows // GP).to(tl.int64)
    inside = (tokens < n) & (rows % GP < G)
    row = tokens * (HKV * G) + h * G + rows % GP
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    do = tl.load(grad + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    token = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    _prepare_branch(
        do, out_cmp, delta_cmp, grad_gates, 0, offsets, row, inside, token, h, n, T, GP
    )  # fmt: skip
    _prepare_branch(
        do, out_sel, delta_sel, grad_gates, 1, offsets, row, inside, token, h, n, T, GP
    )  # fmt: skip
    _prepare_branch(
        do, out_win, delta_win, grad_gates, 2, offsets, row, inside, token, h, n, T, GP
    )  # fmt: skip


@triton.jit
def _dq_step(
    q, do, lse, delta, acc, start, lo, hi, end, k, v, order, stride, scale,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BN)
    keys = load_keys(k, columns, end, order, stride, D, HAS_ORDER)
    values = load_keys(v, columns, end, order, stride, D, HAS_ORDER)
    p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
    if MASK:
        inside = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
        p = tl.where(inside, p, 0.0)
    ds = p * (dot(do, tl.trans(values)) - delta[:, None])
    return acc + dot(ds.to(keys.dtype), keys)


@triton.jit
def _dq_rows(
    q, do, lse, delta,  # [M, D], [M, D], [M], [M]
    lo, hi, begin, split, end, k, v, order, stride, scale,
    M: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Return the gradient [M, D] float32 of q, without scale and gate."""
    acc = tl.zeros([M, D], tl.float32)
    for start in range(begin, split, BN):
        acc = _dq_step(
            q, do, lse, delta, acc, start, lo, hi, end, k, v, order, stride, scale,
            D, BN, HAS_ORDER, False,
        )  # fmt: skip
    for start in range(split, end, BN):
        acc = _dq_step(
            q, do, lse, delta, acc, start, lo, hi, end, k, v, order, stride, scale,
            D, BN, HAS_ORDER, True,
        )  # fmt: skip
    return acc


@triton.jit
def _load_rows(
    start, end, q, grad, gates, lse, delta, order, h,
    BRANCH: tl.constexpr, PAIRS: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Return q, do [M, D], lse, delta, gate and place [M] of the rows at places from `start` on.

    Rows past the end repeat the last but have a log-sum-exp of infinity: they weigh nothing.
    """
    rows = tl.arange(0, T * GP)
    places = start + rows // GP
    inside = (places < end) & (rows % GP < G)
    places = tl.maximum(tl.minimum(places, end - 1), 0)
    tokens = row_of(places, order, PAIRS, HAS_ORDER)
    row = tokens * (HKV * G) + h * G + tl.minimum(rows % GP, G - 1)
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    row_lse = tl.where(inside, tl.load(lse + row), float("inf"))
    gate = tl.load(gates + tokens * 3 + BRANCH).to(tl.float32)
    return (
        tl.load(q + offsets),
        tl.load(grad + offsets),
        row_lse,
        tl.load(delta + row),
        gate,
        places,
    )


@triton.jit(do_not_specialize=["first", "n"])
def dq_places(
    q, k, v, grad, gates, lse, delta,  # lse, delta [N, Hq] of the branch
    dq,  # [N, Hq, D]: written, or where there are PARTIALS added to
    order, ranges,
    partial, selected,  # [chunk, Hkv, PARTIALS, G, D], [N, Hkv, PARTIALS]
    first, n,  # places [first, n)
    scale, q_scale,
    BRANCH: tl.constexpr, PARTIALS: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Gradient of q: window branch; or compression branch with the other two added."""
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    unclamped = first + tl.program_id(0) * T + rows // GP
    places = tl.minimum(unclamped, n - 1)
    heads = tl.minimum(rows % GP, G - 1)
    stored = (unclamped < n) & (rows % GP < G)
    tokens = row_of(places, order, 0, HAS_ORDER)
    row = tokens * (HKV * G) + h * G + heads
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    lo = tl.load(ranges + 2 * places)
    hi = tl.load(ranges + 2 * places + 1)
    begin, split, end = span_of(lo, hi, BN)
    acc = _dq_rows(
        tl.load(q + offsets), tl.load(grad + offsets), tl.load(lse + row), tl.load(delta + row),
        lo, hi, begin, split, end, k + h * D, v + h * D, order, HKV * D, scale, M, D, BN, HAS_ORDER,
    )  # fmt: skip
    acc = acc * (q_scale * tl.load(gates + tokens * 3 + BRANCH).to(tl.float32))[:, None]
    if PARTIALS:
        acc += tl.load(dq + offsets).to(tl.float32)
        slot = (tokens * HKV + h) * PARTIALS
        for i in range(PARTIALS):
            taken = (tl.load(selected + slot + i) >= 0) & stored
            line = (slot + i - first * HKV * PARTIALS) * G + heads
            acc += tl.load(
                partial + line[:, None] * D + tl.arange(0, D)[None, :],
                mask=taken[:, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
    tl.store(dq + offsets, acc.to(dq.dtype.element_ty), mask=stored[:, None])


@triton.jit(do_not_specialize=["tiles", "first_pair", "num_blocks"])
def dq_pairs(
    q, k, v, grad, gates, lse, delta,
    partial,  # [pairs of the chunk, G, D]
    order, tiles, starts, first_pair, num_blocks, scale, q_scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradient of q from each block that a token took, apart."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(tiles + 3 * tile)
    end = tl.load(tiles + 3 * tile + 1)
    if begin < end:
        segment = tl.load(tiles + 3 * tile + 2)
        h = segment // num_blocks
        block = segment % num_blocks
        M: tl.constexpr = T * GP
        rows = tl.arange(0, M)
        heads = tl.minimum(rows % GP, G - 1)
        key_begin = tl.load(starts + block)
        key_end = tl.load(starts + block + 1)
        split = key_begin + (key_end - key_begin) // BN * BN
        lo = tl.zeros([M], tl.int32) + key_begin
        hi = tl.zeros([M], tl.int32) + key_end
        q_tile, do, row_lse, row_delta, gate, places = _load_rows(
            begin, end, q, grad, gates, lse, delta, order, h, 1, PAIRS, HKV, G, GP, T, D, True
        )
        for start in range(begin, end, T):
            next_q, next_do, next_lse, next_delta, next_gate, next_places = _load_rows(
                start + T, end, q, grad, gates, lse, delta, order, h,
                1, PAIRS, HKV, G, GP, T, D, True,
            )  # fmt: skip
            acc = _dq_rows(
                q_tile, do, row_lse, row_delta, lo, hi, key_begin, split, key_end,
                k + h * D, v + h * D, order, HKV * D, scale, M, D, BN, False,
            )  # fmt: skip
            acc = acc * (q_scale * gate)[:, None]
            stored = (start + rows // GP < end) & (rows % GP < G)
            pair = (tl.load(order + places) - first_pair).to(tl.int64) * G + heads
            offsets = pair[:, None] * D + tl.arange(0, D)[None, :]
            tl.store(partial + offsets, acc.to(partial.dtype.element_ty), mask=stored[:, None])
            q_tile, do, row_lse, row_delta = next_q, next_do, next_lse, next_delta
            gate, places = next_gate, next_places


@triton.jit
def _dkv_rows(
    keys, values, columns,  # [BN, D], [BN, D], [BN]
    begin, end,  # places of the rows
    q, grad, gates, lse, delta, order, ranges, h, scale,
    BRANCH: tl.constexpr, PAIRS: tl.constexpr, MASK: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Return the gradients [BN, D] float32 of keys (without the scale) and values."""
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    q_tile, do, row_lse, row_delta, gate, places = _load_rows(
        begin, end, q, grad, gates, lse, delta, order, h,
        BRANCH, PAIRS, HKV, G, GP, T, D, HAS_ORDER,
    )  # fmt: skip
    for start in range(begin, end, T):
        # The next rows load while these are at work: their addresses hang on other loads.
        next_q, next_do, next_lse, next_delta, next_gate, next_places = _load_rows(
            start + T, end, q, grad, gates, lse, delta, order, h,
            BRANCH, PAIRS, HKV, G, GP, T, D, HAS_ORDER,
        )  # fmt: skip
        p = tl.exp2(dot(keys, tl.trans(q_tile)) * scale - row_lse[None, :])
        if MASK:
            lo = tl.load(ranges + 2 * places)
            hi = tl.load(ranges + 2 * places + 1)
            seen = (columns[:, None] >= lo[None, :]) & (columns[:, None] < hi[None, :])
            p = tl.where(seen, p, 0.0)
        p = p * gate[None, :]
        dv += dot(p.to(do.dtype), do)
        ds = p * (dot(values, tl.trans(do)) - row_delta[None, :])
        dk += dot(ds.to(q_tile.dtype), q_tile)
        q_tile, do, row_lse, row_delta = next_q, next_do, next_lse, next_delta
        gate, places = next_gate, next_places
    return dk, dv


@triton.jit(do_not_specialize=["num_keys"])
def dkv_places(
    q, k, v, grad, gates, lse, delta,
    dk, dv,  # [splits, Nk, Hkv, D] float32 to be written
    order, ranges,
    row_ranges,  # [Nk, 2] places of the rows that attend to the key at each column
    num_keys, scale, q_scale,
    BRANCH: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of the compression or window branch, a share of rows a split."""
    h = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.program_id(0) * BN
    columns = first + tl.arange(0, BN)
    keys = load_keys(k + h * D, columns, num_keys, order, HKV * D, D, HAS_ORDER)
    values = load_keys(v + h * D, columns, num_keys, order, HKV * D, D, HAS_ORDER)
    last = tl.minimum(first + BN, num_keys) - 1
    begin = tl.load(row_ranges + 2 * first)
    end = tl.load(row_ranges + 2 * last + 1)
    uniform = (tl.load(row_ranges + 2 * last) == begin) & (
        tl.load(row_ranges + 2 * first + 1) == end
    )
    share = tl.cdiv(tl.cdiv(end - begin, T), tl.num_programs(2)) * T
    begin = begin + split * share
    end = tl.minimum(begin + share, end)
    if uniform:
        grad_k, grad_v = _dkv_rows(
            keys, values, columns, begin, end, q, grad, gates, lse, delta, order, ranges, h, scale,
            BRANCH, 0, False, HKV, G, GP, T, D, BN, HAS_ORDER,
        )  # fmt: skip
    else:
        grad_k, grad_v = _dkv_rows(
            keys, values, columns, begin, end, q, grad, gates, lse, delta, order, ranges, h, scale,
            BRANCH, 0, True, HKV, G, GP, T, D, BN, HAS_ORDER,
        )  # fmt: skip
    inside = columns < num_keys
    rows = tl.load(order + columns, mask=inside, other=0) if HAS_ORDER else columns
    line = (split.to(tl.int64) * num_keys + rows) * HKV + h
    offsets = line[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + offsets, grad_k * q_scale, mask=inside[:, None])
    tl.store(dv + offsets, grad_v, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_blocks", "stride", "tiles_a_block"])
def dkv_pairs(
    q, k, v, grad, gates, lse, delta,
    dk_win, dv_win,  # [N, Hkv, D] float32, the window branch's share
    dk, dv,  # [N, Hkv, D] to be written
    order, segments,  # segments [>= Hkv * Ns * stride + 1]: first place of each KV head and block
    starts, num_blocks, stride, tiles_a_block, scale, q_scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: selection branch, with the window branch added."""
    # Tiles of one block run side by side: they read the same rows.
    tile = tl.program_id(0) % tiles_a_block
    block = tl.program_id(0) // tiles_a_block % num_blocks
    h = tl.program_id(0) // tiles_a_block // num_blocks
    last = tl.load(starts + block + 1)
    first = tl.load(starts + block) + tile * BN
    if first < last:
        columns = first + tl.arange(0, BN)
        keys = load_keys(k + h * D, columns, last, order, HKV * D, D, False)
        values = load_keys(v + h * D, columns, last, order, HKV * D, D, False)
        list_begin = tl.load(segments + (h * num_blocks + block) * stride)
        list_end = tl.load(segments + (h * num_blocks + block + 1) * stride)
        grad_k, grad_v = _dkv_rows(
            keys, values, columns, list_begin, list_end,
            q, grad, gates, lse, delta, order, starts, h, scale,
            1, PAIRS, False, HKV, G, GP, T, D, BN, True,
        )  # fmt: skip
        offsets = (columns.to(tl.int64) * HKV + h)[:, None] * D + tl.arange(0, D)[None, :]
        inside = (columns < last)[:, None]
        grad_k = grad_k * q_scale + tl.load(dk_win + offsets, mask=inside, other=0.0)
        grad_v = grad_v + tl.load(dv_win + offsets, mask=inside, other=0.0)
        tl.store(dk + offsets, grad_k.to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=inside)
