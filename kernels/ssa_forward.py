"""Triton kernels of SSA's forward pass; `ssa_triton.py` launches them, `ssa.py` defines SSA.

Rows of a tile are (token, query head of one KV head) pairs, T tokens times GP heads, GP being the
group padded to a power of two: the heads of a group share their keys, so their rows fill a matrix
instruction. Rows past the end repeat a valid row and are not stored. Log-sum-exps are in base 2.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)  # finite: a tile without a valid key must not give NaN


@triton.jit
def row_of(
    places,  # [M] places in the list of tokens or pairs
    order,  # list: token of a place; or pair of a place, token * PAIRS + KV head * top_k + slot
    PAIRS: tl.constexpr,  # 0: a list of tokens
    HAS_ORDER: tl.constexpr,  # False: the token at place p is p
):
    """Return the tokens [M] int64 at these places."""
    if HAS_ORDER:
        tokens = tl.load(order + places)
        if PAIRS:
            tokens = tokens // PAIRS
    else:
        tokens = places
    return tokens.to(tl.int64)


@triton.jit
def load_keys(x, columns, end, order, stride, D: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Return rows [BN, D] of keys or values at columns, zeros from `end` on."""
    inside = columns < end
    keys = tl.load(order + columns, mask=inside, other=0) if HAS_ORDER else columns
    offsets = keys.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x + offsets, mask=inside[:, None], other=0.0)


@triton.jit
def dot(a, b):
    """Return a @ b, summed in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _softmax_step(
    q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BN)
    keys = load_keys(k, columns, end, order, stride, D, HAS_ORDER)
    logits = dot(q, tl.trans(keys))
    if MASK:
        # Scaled before it is masked: a fused scale * MASKED - m would leave a huge rounding error.
        inside = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
        logits = tl.where(inside, logits * scale, MASKED)
        m_new = tl.maximum(m, tl.max(logits, 1))
        p = tl.exp2(logits - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    values = load_keys(v, columns, end, order, stride, D, HAS_ORDER)
    acc = acc * shrink[:, None] + dot(p.to(values.dtype), values)
    return acc, m_new, total


@triton.jit
def span_of(lo, hi, BN: tl.constexpr):
    """Return (begin, split, end) of the columns [lo, hi) of all rows; before `split` no row's
    range ends inside a tile of BN columns, so that no mask is needed.
    """
    begin = tl.min(lo, 0)
    end = tl.max(hi, 0)
    uniform = (tl.max(lo, 0) == begin) & (tl.min(hi, 0) == end)
    return begin, tl.where(uniform, begin + (end - begin) // BN * BN, begin), end


@triton.jit
def _softmax_rows(
    q,  # [M, D]
    lo, hi,  # [M] columns each row attends to, [lo, hi), at least one
    begin, split, end,  # span_of(lo, hi)
    k, v,  # rows of keys and values of one KV head, `stride` elements apart
    order, stride, scale,
    M: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Return softmax(q k^T) v [M, D] in float32 and the log-sum-exp [M]."""
    m = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for start in range(begin, split, BN):
        acc, m, total = _softmax_step(
            q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
            D, BN, HAS_ORDER, False,
        )  # fmt: skip
    for start in range(split, end, BN):
        acc, m, total = _softmax_step(
            q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
            D, BN, HAS_ORDER, True,
        )  # fmt: skip
    return acc / total[:, None], m + tl.log2(total)


@triton.jit(do_not_specialize=["n"])
def attend_places(
    q, k, v, out, lse,  # [N, Hq, D], keys and values [*, Hkv, D], [N, Hq, D], [N, Hq]
    order,  # [N] token (and key) at each place
    ranges,  # [N, 2] columns of the token at each place
    n, scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Compression or window branch: softmax attention of every token over its own range."""
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    unclamped = tl.program_id(0) * T + rows // GP
    places = tl.minimum(unclamped, n - 1)
    heads = tl.minimum(rows % GP, G - 1)
    stored = (unclamped < n) & (rows % GP < G)
    row = row_of(places, order, 0, HAS_ORDER) * (HKV * G) + h * G + heads
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    lo = tl.load(ranges + 2 * places)
    hi = tl.load(ranges + 2 * places + 1)
    begin, split, end = span_of(lo, hi, BN)
    acc, row_lse = _softmax_rows(
        tl.load(q + offsets), lo, hi, begin, split, end, k + h * D, v + h * D, order, HKV * D,
        scale, M, D, BN, HAS_ORDER,
    )  # fmt: skip
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=stored[:, None])
    tl.store(lse + row, row_lse, mask=stored)


@triton.jit(do_not_specialize=["tiles", "first_pair", "num_blocks"])
def attend_pairs(
    q, k, v, out, lse,  # out [pairs of the chunk, G, D], lse [pairs of the chunk, G]
    order,  # pairs (token, KV head, slot) sorted by KV head, block, chunk of tokens
    tiles,  # [tiles, 3] (begin, end in order, KV head * Ns + block); begin == end: none
    starts,  # [Ns + 1] first token of each block
    first_pair, num_blocks, scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Selection branch: softmax attention of the tokens that took a block over its tokens alone."""
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
        dims = tl.arange(0, D)[None, :]
        key_begin = tl.load(starts + block)
        key_end = tl.load(starts + block + 1)
        split = key_begin + (key_end - key_begin) // BN * BN
        lo = tl.zeros([M], tl.int32) + key_begin
        hi = tl.zeros([M], tl.int32) + key_end
        pairs = tl.load(order + tl.minimum(begin + rows // GP, end - 1))
        row = (pairs // PAIRS).to(tl.int64) * (HKV * G) + h * G + heads
        q_tile = tl.load(q + row[:, None] * D + dims)
        for start in range(begin, end, T):
            # The next rows load while these are at work.
            next_pairs = tl.load(order + tl.minimum(start + T + rows // GP, end - 1))
            row = (next_pairs // PAIRS).to(tl.int64) * (HKV * G) + h * G + heads
            next_q = tl.load(q + row[:, None] * D + dims)
            acc, row_lse = _softmax_rows(
                q_tile, lo, hi, key_begin, split, key_end, k + h * D, v + h * D, order, HKV * D,
                scale, M, D, BN, False,
            )  # fmt: skip
            stored = (start + rows // GP < end) & (rows % GP < G)
            pair = (pairs - first_pair).to(tl.int64) * G + heads
            offsets = pair[:, None] * D + dims
            tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=stored[:, None])
            tl.store(lse + pair, row_lse, mask=stored)
            pairs = next_pairs
            q_tile = next_q


@triton.jit
def _score_blocks(
    q, k_cmp, lse,  # q [M, D], keys of one KV head, lse [M]
    scores,  # to be written: [T, width], this program's own
    inner, lo, hi, width, stride, scale,
    GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Write the scores of selection blocks [lo, hi) for T tokens."""
    lines = tl.arange(0, BS * SLOTS)
    token = tl.arange(0, T)
    for start in range(lo, hi, BS):
        if SLOTS > 1:
            blocks = tl.minimum(start + lines // SLOTS, hi - 1)
            columns = tl.load(inner + blocks) + lines % SLOTS
            inside = columns < tl.load(inner + blocks + 1)
        else:  # as many compression blocks as selection blocks
            columns = start + lines
            inside = columns < hi
        offsets = columns.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
        keys = tl.load(k_cmp + offsets, mask=inside[:, None], other=0.0)
        p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
        total = tl.sum(tl.reshape(p, [BS * SLOTS, T, GP]), 2)
        if SLOTS > 1:
            total = tl.where(inside[:, None], total, 0.0)
            total = tl.sum(tl.reshape(total, [BS, SLOTS, T]), 1)
        block = start + tl.arange(0, BS)
        places = token[None, :] * width + (block - lo)[:, None]
        tl.store(scores + places, total, mask=(block < hi)[:, None])


@triton.jit
def _store_top_blocks(
    selected,  # to be written: [T, 1] pointers to the first of TOP_K blocks, int32
    stored,  # [T] whether to write
    scores,  # [T, width] of blocks from `first` on
    begin, end,  # [T] blocks [begin, end) that a token may take
    first, last, width,
    T: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Write the blocks of the TOP_K best scores, best first, -1 where there are fewer.

    Block b belongs to group (b - first) % GROUPS. The best of every group is kept; the best of
    these is taken TOP_K times, and its group then looks for the next in its order, which is by
    score, then by block.
    """
    NONE: tl.constexpr = -1.0
    FAR: tl.constexpr = 1 << 30
    token = tl.arange(0, T)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    best = tl.zeros([T, GROUPS], tl.float32) + NONE
    block_of_best = tl.zeros([T, GROUPS], tl.int32)
    for start in range(first, last, GROUPS):
        block = start + group
        inside = (block >= begin[:, None]) & (block < end[:, None])
        score = tl.load(scores + token * width + (block - first), mask=inside, other=NONE)
        better = score > best
        best = tl.where(better, score, best)
        block_of_best = tl.where(better, block, block_of_best)
    for slot in range(TOP_K):
        top = tl.max(best, 1)
        taken = tl.min(tl.where(best == top[:, None], block_of_best, FAR), 1)
        result = tl.where(top > NONE, taken, -1)
        tl.store(selected + slot, result[:, None], mask=stored[:, None])
        own = (taken - first) % GROUPS
        block = first + own[:, None] + tl.arange(0, MEMBERS)[None, :] * GROUPS
        inside = (block >= begin[:, None]) & (block < end[:, None])
        score = tl.load(scores + token * width + (block - first), mask=inside, other=NONE)
        later = (score < top[:, None]) | ((score == top[:, None]) & (block > taken[:, None]))
        score = tl.where(later, score, NONE)
        following = tl.max(score, 1)
        block = tl.min(tl.where(score == following[:, None], block, FAR), 1)
        changed = group == own[:, None]
        best = tl.where(changed, following[:, None], best)
        block_of_best = tl.where(changed, block[:, None], block_of_best)


@triton.jit(do_not_specialize=["n", "width"])
def select_places(
    q, k_cmp, lse,  # [N, Hq, D], [Nc, Hkv, D], [N, Hq] of the compression branch
    selected,  # [N, Hkv, top_k] int32
    scratch,  # [programs, T, width] float32
    ranges,  # [N, 2] selection blocks of each token's sample
    inner,  # [Ns + 1] first compression block of each selection block
    n, width, scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Top-k blocks by compression attention. Every program works through many tiles of tokens
    with a scratch of its own, which stays in the cache: nothing is of size N x Nc.
    """
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    scores = scratch + tl.program_id(0).to(tl.int64) * T * width
    for item in range(tl.program_id(0), tl.cdiv(n, T) * HKV, tl.num_programs(0)):
        h = item % HKV
        tile = item // HKV
        tokens = tl.minimum(tile * T + rows // GP, n - 1)
        row = tokens.to(tl.int64) * (HKV * G) + h * G + tl.minimum(rows % GP, G - 1)
        q_tile = tl.load(q + row[:, None] * D + tl.arange(0, D)[None, :])
        # Padding heads weigh nothing.
        row_lse = tl.where(rows % GP < G, tl.load(lse + row), float("inf"))
        token = tile * T + tl.arange(0, T)
        begin = tl.load(ranges + 2 * tl.minimum(token, n - 1))
        end = tl.load(ranges + 2 * tl.minimum(token, n - 1) + 1)
        first = tl.min(begin, 0)
        last = tl.max(end, 0)
        _score_blocks(
            q_tile, k_cmp + h * D, row_lse, scores, inner, first, last, width, HKV * D, scale,
            GP, T, D, BS, SLOTS,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of the program read what this one wrote
        offsets = (token[:, None].to(tl.int64) * HKV + h) * TOP_K
        _store_top_blocks(
            selected + offsets, token < n, scores, begin, end, first, last, width,
            T, GROUPS, MEMBERS, TOP_K,
        )  # fmt: skip
        tl.debug_barrier()  # before the next tile overwrites the scores


@triton.jit(do_not_specialize=["first", "n"])
def combine_places(
    out,  # [N, Hq, D]: the window branch; becomes the gated sum of the three
    out_cmp, out_sel, lse_sel,  # [N, Hq, D], [N, Hq, D] and [N, Hq] to be written
    partial, partial_lse,  # [chunk, Hkv, top_k, G, D], [chunk, Hkv, top_k, G]
    selected, gates,  # [N, Hkv, top_k], [N, 3]
    first, n,  # tokens [first, n) of the chunk
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Merge the selected blocks of each token, then gate the three branches."""
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    tokens = first + tl.program_id(0) * T + rows // GP
    inside = (tokens < n) & (rows % GP < G)
    heads = tl.minimum(rows % GP, G - 1)
    tokens = tl.minimum(tokens, n - 1).to(tl.int64)
    slot = (tokens * HKV + h) * TOP_K
    pair = slot - first * HKV * TOP_K
    m = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for i in range(TOP_K):
        taken = (tl.load(selected + slot + i) >= 0) & inside
        line = (pair + i) * G + heads
        row_lse = tl.load(partial_lse + line, mask=taken, other=MASKED)
        values = tl.load(
            partial + line[:, None] * D + tl.arange(0, D)[None, :], mask=taken[:, None], other=0.0
        )
        m_new = tl.maximum(m, row_lse)
        shrink = tl.exp2(m - m_new)
        weight = tl.where(taken, tl.exp2(row_lse - m_new), 0.0)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + values.to(tl.float32) * weight[:, None]
        m = m_new
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    row = tokens * (HKV * G) + h * G + heads
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    compression = tl.load(out_cmp + offsets).to(tl.float32)
    window = tl.load(out + offsets).to(tl.float32)
    gate = gates + tokens * 3
    mixed = tl.load(gate).to(tl.float32)[:, None] * compression
    mixed += tl.load(gate + 1).to(tl.float32)[:, None] * acc
    mixed += tl.load(gate + 2).to(tl.float32)[:, None] * window
    dtype = out.dtype.element_ty
    tl.store(out_sel + offsets, acc.to(dtype), mask=inside[:, None])
    tl.store(lse_sel + row, m + tl.log2(tl.maximum(total, 1e-30)), mask=inside)
    tl.store(out + offsets, mixed.to(dtype), mask=inside[:, None])
