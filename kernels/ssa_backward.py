"""Triton kernels of SSA's backward pass; tiles, rows and lists are those of `ssa_forward.py`.

Per branch, with gate g and output o: delta = do . o, p = g softmax = exp2(logits - lse), where lse
is the log-sum-exp less log2 g, dv = p^T do, ds = p (do v^T - delta), dq = ds k, dk = ds^T q. Only
`backward_pairs` uses atomics; where one program has all tokens that took a block, in one order
(`ssa_lists.stable_list`), nothing else adds to the same place meanwhile, and the same inputs give
the same bits.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from kernels.ssa_forward import dot, load_keys, load_tile, span_of, tile_rows


@triton.jit
def _prepare_branch(
    do, out, lse, stats, grad_gates, branch, offsets, row, inside, token, h, n,
    T: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    values = tl.load(out + offsets, mask=inside[:, None], other=0.0)
    product = tl.sum(do * values.to(tl.float32), 1)
    tl.store(stats + 2 * row, tl.load(lse + row, mask=inside), mask=inside)
    tl.store(stats + 2 * row + 1, product, mask=inside)
    share = tl.sum(tl.reshape(product, [T, GP]), 1)
    tl.store(grad_gates + (h * n + token) * 3 + branch, share, mask=token < n)


@triton.jit(do_not_specialize=["n"])
def prepare_backward(
    grad, out_cmp, out_sel,  # [N, Hq, D]
    lse_cmp, lse_sel,  # [N, Hq] float32
    stats_cmp, stats_sel,  # [N, Hq, 2] float32 to be written: lse, delta
    grad_gates,  # [Hkv, N, 3] two of three to be written: each KV head's share
    n,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Products of the output's gradient with two branches, beside the log-sum-exps."""
    h = tl.program_id(1)
    rows = tl.arange(0, T * GP)
    tokens = (tl.program_id(0) * T + rows // GP).to(tl.int64)
    inside = (tokens < n) & (rows % GP < G)
    row = tokens * (HKV * G) + h * G + rows % GP
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    do = tl.load(grad + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    token = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    _prepare_branch(
        do, out_cmp, lse_cmp, stats_cmp, grad_gates, 0, offsets, row, inside, token, h, n, T, GP
    )
    _prepare_branch(
        do, out_sel, lse_sel, stats_sel, grad_gates, 1, offsets, row, inside, token, h, n, T, GP
    )


@triton.jit(do_not_specialize=["n"])
def dq_window(
    q, k, v, grad, gates, lse,  # lse [N, Hq]: not less the gate
    dq,  # [N, Hq, D] to be written
    stats,  # [N, Hq, 2] float32 to be written: log-sum-exp less log2 of the gate, delta
    grad_gates,  # [Hkv, N, 3] the third to be written
    order, ranges, n, scale, q_scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of q in the window branch, whose output was not kept: delta = sum p dp comes out of
    the same pass as sum p dp k and sum p k, and dq = sum p dp k - delta sum p k.
    """
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    places, tokens, row, stored = tile_rows(
        tl.program_id(0) * T, n, h, order, HKV, G, GP, T, True
    )  # fmt: skip
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    lo = tl.load(ranges + 2 * places)
    hi = tl.load(ranges + 2 * places + 1)
    q_tile = tl.load(q + offsets)
    do = tl.load(grad + offsets)
    row_lse = tl.load(lse + row)
    delta = tl.zeros([M], tl.float32)
    with_dp = tl.zeros([M, D], tl.float32)
    without = tl.zeros([M, D], tl.float32)
    end = tl.max(hi, 0)
    for start in range(tl.min(lo, 0), end, BN):
        columns = start + tl.arange(0, BN)
        keys = load_keys(k + h * D, columns, end, order, HKV * D, D, True)
        values = load_keys(v + h * D, columns, end, order, HKV * D, D, True)
        logits = dot(q_tile, tl.trans(keys))
        dp = dot(do, tl.trans(values))
        inside = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
        p = tl.where(inside, tl.exp2(logits * scale - row_lse[:, None]), 0.0)
        product = p * dp
        delta += tl.sum(product, 1)
        with_dp = dot(product.to(keys.dtype), keys, with_dp)
        without = dot(p.to(keys.dtype), keys, without)
    gate = tl.load(gates + tokens * 3 + 2).to(tl.float32)
    acc = (with_dp - delta[:, None] * without) * (gate * q_scale)[:, None]
    tl.store(dq + offsets, acc.to(dq.dtype.element_ty), mask=stored[:, None])
    tl.store(stats + 2 * row, row_lse - tl.log2(gate), mask=stored)
    tl.store(stats + 2 * row + 1, delta, mask=stored)
    place = tl.program_id(0) * T + tl.arange(0, T)
    token = tl.load(order + place, mask=place < n, other=0).to(tl.int64)
    share = tl.sum(tl.reshape(tl.where(stored, delta, 0.0), [T, GP]), 1)
    tl.store(grad_gates + (h * n + token) * 3 + 2, share, mask=place < n)


@triton.jit
def _dq_step(
    q, do, lse, delta, acc, start, lo, hi, end, k, v, stride, scale,
    D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BN)
    keys = load_keys(k, columns, end, k, stride, D, False)
    values = load_keys(v, columns, end, k, stride, D, False)
    p = tl.exp2(dot(q, tl.trans(keys)) * scale - lse[:, None])
    if MASK:
        inside = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
        p = tl.where(inside, p, 0.0)
    ds = p * (dot(do, tl.trans(values)) - delta[:, None])
    return dot(ds.to(keys.dtype), keys, acc)


@triton.jit(do_not_specialize=["first", "n"])
def dq_compression(
    q, k, v, grad, stats,  # stats [N, Hq, 2] of the branch
    dq,  # [N, Hq, D]: the window branch's; the other two are added
    ranges,
    partial, selected,  # [chunk, Hkv, PARTIALS, G, D], [N, Hkv, PARTIALS]
    first, n,  # tokens [first, n)
    scale, q_scale,
    PARTIALS: tl.constexpr,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of q: compression branch, with the other two added."""
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    places, tokens, row, stored = tile_rows(
        first + tl.program_id(0) * T, n, h, ranges, HKV, G, GP, T, False
    )  # fmt: skip
    lo = tl.load(ranges + 2 * places)
    hi = tl.load(ranges + 2 * places + 1)
    begin, split, end = span_of(lo, hi, BN)
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + offsets)
    do = tl.load(grad + offsets)
    row_lse = tl.load(stats + 2 * row)
    row_delta = tl.load(stats + 2 * row + 1)
    acc = tl.zeros([M, D], tl.float32)
    for start in range(begin, split, BN):
        acc = _dq_step(
            q_tile, do, row_lse, row_delta, acc, start, lo, hi, end, k + h * D, v + h * D,
            HKV * D, scale, D, BN, False,
        )  # fmt: skip
    for start in range(split, end, BN):
        acc = _dq_step(
            q_tile, do, row_lse, row_delta, acc, start, lo, hi, end, k + h * D, v + h * D,
            HKV * D, scale, D, BN, True,
        )  # fmt: skip
    others = tl.load(dq + offsets).to(tl.float32)
    slot = (tokens * HKV + h) * PARTIALS
    for i in tl.range(PARTIALS, loop_unroll_factor=4):
        taken = (tl.load(selected + slot + i) >= 0) & stored
        line = (slot + i - first * HKV * PARTIALS) * G + row % G
        others += tl.load(
            partial + line[:, None] * D + tl.arange(0, D)[None, :],
            mask=taken[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
    acc = acc * q_scale + others
    tl.store(dq + offsets, acc.to(dq.dtype.element_ty), mask=stored[:, None])


@triton.jit
def _dkv_step(
    dk, dv, keys, values, columns, start, end, q, grad, stats, order, ranges, key_end, h, scale,
    PAIRS: tl.constexpr, MASK: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Add the rows at T places to the gradients of keys (without the scale) and values.

    Returns also ds [BN, M].
    """
    rows = tl.arange(0, T * GP)
    places = start + rows // GP
    used = (places < end) & (rows % GP < G)
    places = tl.minimum(places, end - 1)
    items = tl.load(order + places) if HAS_ORDER else places
    tokens = (items // PAIRS if PAIRS else items).to(tl.int64)
    row = tokens * (HKV * G) + h * G + tl.minimum(rows % GP, G - 1)
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + offsets)
    do = tl.load(grad + offsets)
    row_lse, row_delta = tl.split(tl.load(stats + row[:, None] * 2 + tl.arange(0, 2)[None, :]))
    # Rows past the end weigh nothing.
    row_lse = tl.where(used, row_lse, float("inf"))
    logits = dot(keys, tl.trans(q_tile))
    dp = dot(values, tl.trans(do))
    p = tl.exp2(logits * scale - row_lse[None, :])
    if PAIRS:  # a key past the end is zero, but its probability may be anything
        p = tl.where((columns < key_end)[:, None], p, 0.0)
    if MASK:
        lo = tl.load(ranges + 2 * places)
        hi = tl.load(ranges + 2 * places + 1)
        seen = (columns[:, None] >= lo[None, :]) & (columns[:, None] < hi[None, :])
        p = tl.where(seen, p, 0.0)
    ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
    dv = dot(p.to(do.dtype), do, dv)
    dk = dot(ds, q_tile, dk)
    return dk, dv, ds


@triton.jit(do_not_specialize=["num_keys"])
def dkv_places(
    q, k, v, grad, stats,
    dk, dv,  # [splits, Nk, Hkv, D] float32 to be written
    order, ranges,
    row_ranges,  # [Nk, 2] places of the rows that attend to the key at each column
    num_keys, scale, q_scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
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
    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, D], tl.float32)
    split_end = tl.where(uniform, end, begin)  # two loops in a row: branches cost the overlap
    for start in range(begin, split_end, T):
        grad_k, grad_v, _ = _dkv_step(
            grad_k, grad_v, keys, values, columns, start, end, q, grad, stats, order,
            ranges, num_keys, h, scale, 0, False, HKV, G, GP, T, D, HAS_ORDER,
        )  # fmt: skip
    for start in range(split_end, end, T):
        grad_k, grad_v, _ = _dkv_step(
            grad_k, grad_v, keys, values, columns, start, end, q, grad, stats, order,
            ranges, num_keys, h, scale, 0, True, HKV, G, GP, T, D, HAS_ORDER,
        )  # fmt: skip
    inside = columns < num_keys
    rows = tl.load(order + columns, mask=inside, other=0) if HAS_ORDER else columns
    line = (split.to(tl.int64) * num_keys + rows) * HKV + h
    offsets = line[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + offsets, grad_k * q_scale, mask=inside[:, None])
    tl.store(dv + offsets, grad_v, mask=inside[:, None])


@triton.jit(do_not_specialize=["chunk", "first_pair", "num_blocks"])
def backward_pairs(
    q, k, v, grad, stats,
    dk, dv,  # [N, Hkv, D] float32 to be added to
    partial,  # [pairs of the chunk, G, D] to be written: gradient of q from each pair
    order, tiles, tile_counts, starts,  # as in attend_pairs
    chunk, first_pair, num_blocks, scale, q_scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Selection branch: gradients of keys, of values, and of q from each block that a token took.

    A program has a block and tokens that took it. A block of more than BN tokens takes several
    passes, which add to the gradient of q.
    """
    begin, end, segment = load_tile(tiles, tile_counts, chunk)
    if begin < end:
        h = segment // num_blocks
        block = segment % num_blocks
        key_begin = tl.load(starts + block)
        key_end = tl.load(starts + block + 1)
        dims = tl.arange(0, D)[None, :]
        rows = tl.arange(0, T * GP)
        heads = tl.minimum(rows % GP, G - 1)
        for key_start in range(key_begin, key_end, BN):
            columns = key_start + tl.arange(0, BN)
            keys = load_keys(k + h * D, columns, key_end, order, HKV * D, D, False)
            values = load_keys(v + h * D, columns, key_end, order, HKV * D, D, False)
            grad_k = tl.zeros([BN, D], tl.float32)
            grad_v = tl.zeros([BN, D], tl.float32)
            for start in range(begin, end, T):
                pairs = tl.load(order + tl.minimum(start + rows // GP, end - 1))
                line = (pairs - first_pair).to(tl.int64) * G + heads
                places = partial + line[:, None] * D + dims
                used = (start + rows // GP < end) & (rows % GP < G)
                again = used & (key_start > key_begin)
                earlier = tl.load(places, mask=again[:, None], other=0.0)
                grad_k, grad_v, ds = _dkv_step(
                    grad_k, grad_v, keys, values, columns, start, end, q, grad, stats,
                    order, order, key_end, h, scale, PAIRS, False, HKV, G, GP, T, D, True,
                )  # fmt: skip
                grad_q = dot(tl.trans(ds), keys) * q_scale + earlier.to(tl.float32)
                tl.store(places, grad_q.to(partial.dtype.element_ty), mask=used[:, None])
            offsets = (columns.to(tl.int64) * HKV + h)[:, None] * D + dims
            inside = (columns < key_end)[:, None]
            tl.atomic_add(dk + offsets, grad_k * q_scale, mask=inside, sem="relaxed")
            tl.atomic_add(dv + offsets, grad_v, mask=inside, sem="relaxed")
            tl.debug_barrier()  # what is added to may have been written by other threads
