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
def tile_rows(
    first, n, h,  # the first place, the number of places, the KV head
    order,  # token at each place
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    HAS_ORDER: tl.constexpr,  # False: the token at place p is p
):  # fmt: skip
    """Return places, tokens and rows of [*, Hq] (int64) of T places, [M], and what is to be stored:
    rows past the end and padding heads repeat others.
    """
    lines = tl.arange(0, T * GP)
    unclamped = first + lines // GP
    places = tl.minimum(unclamped, n - 1)
    tokens = (tl.load(order + places) if HAS_ORDER else places).to(tl.int64)
    rows = tokens * (HKV * G) + h * G + tl.minimum(lines % GP, G - 1)
    return places, tokens, rows, (unclamped < n) & (lines % GP < G)


@triton.jit
def load_keys(x, columns, end, order, stride, D: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Return rows [BN, D] of keys or values at columns, zeros from `end` on."""
    inside = columns < end
    keys = tl.load(order + columns, mask=inside, other=0) if HAS_ORDER else columns
    offsets = keys.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x + offsets, mask=inside[:, None], other=0.0)


@triton.jit
def dot(a, b, acc=None):
    """Return a @ b (+ acc), summed in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _softmax_step(
    q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
    M: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
    MASK: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add BN keys. The totals [M, 8] are summed over the last axis at the end: these eight columns
    lie in different threads of a matrix instruction's result, and all others in one.
    """
    columns = start + tl.arange(0, BN)
    keys = load_keys(k, columns, end, order, stride, D, HAS_ORDER)
    values = load_keys(v, columns, end, order, stride, D, HAS_ORDER)
    logits = dot(q, tl.trans(keys))
    inside = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])
    if BOUNDED:
        p = tl.exp2(logits * scale)
        if MASK:
            p = tl.where(inside, p, 0.0)
    else:
        if MASK:
            # Scaled before it is masked: a fused scale * MASKED - m would leave a huge rounding
            # error.
            logits = tl.where(inside, logits * scale, MASKED)
            m_new = tl.maximum(m, tl.max(logits, 1))
            p = tl.exp2(logits - m_new[:, None])
        else:
            m_new = tl.maximum(m, tl.max(logits, 1) * scale)
            p = tl.exp2(logits * scale - m_new[:, None])
        shrink = tl.exp2(m - m_new)[:, None]
        total = total * shrink
        acc = acc * shrink
        m = m_new
    total += tl.sum(tl.reshape(p, [M, BN // 8, 8]), 1)
    return dot(p.to(values.dtype), values, acc), m, total


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
    BOUNDED: tl.constexpr,  # no logit is so large that its exponential needs a shift
):  # fmt: skip
    """Return softmax(q k^T) v [M, D] in float32 and the log-sum-exp [M]."""
    m = tl.full([M], 0.0 if BOUNDED else MASKED, tl.float32)
    total = tl.zeros([M, 8], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for start in range(begin, split, BN):
        acc, m, total = _softmax_step(
            q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
            M, D, BN, HAS_ORDER, False, BOUNDED,
        )  # fmt: skip
    for start in range(split, end, BN):
        acc, m, total = _softmax_step(
            q, acc, m, total, start, lo, hi, end, k, v, order, stride, scale,
            M, D, BN, HAS_ORDER, True, BOUNDED,
        )  # fmt: skip
    sums = tl.sum(total, 1)
    inverse = 1.0 / sums
    return acc * inverse[:, None], m + tl.log2(sums)


@triton.jit(do_not_specialize=["num_keys"])
def longest_keys(
    k,  # [*, Hkv, D]
    longest,  # [Hkv] float32, zero before: becomes the norm of the longest key
    num_keys,
    HKV: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Find the largest norm of each KV head's keys."""
    h = tl.program_id(1)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    keys = load_keys(k + h * D, rows, num_keys, k, HKV * D, D, False).to(tl.float32)
    tl.atomic_max(longest + h, tl.sqrt(tl.max(tl.sum(keys * keys, 1), 0)), sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def attend_places(
    q, k, v, out, lse,  # [N, Hq, D], keys and values [*, Hkv, D], [N, Hq, D], [N, Hq]
    longest,  # [Hkv] float32: norm of the longest key
    largest,  # [Hkv] float32, zero before: becomes a bound of all logits
    order,  # [N] token (and key) at each place
    ranges,  # [N, 2] columns of the token at each place
    n, scale, limit,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Compression or window branch: softmax attention of every token over its own range.

    A logit is at most the product of the norms. Where that is within +-limit for all rows of a
    tile, exponentials need no running maximum.
    """
    h = tl.program_id(1)
    M: tl.constexpr = T * GP
    places, _, row, stored = tile_rows(
        tl.program_id(0) * T, n, h, order, HKV, G, GP, T, HAS_ORDER
    )  # fmt: skip
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    lo = tl.load(ranges + 2 * places)
    hi = tl.load(ranges + 2 * places + 1)
    begin, split, end = span_of(lo, hi, BN)
    q_tile = tl.load(q + offsets)
    wide = q_tile.to(tl.float32)
    bound = tl.sqrt(tl.max(tl.sum(wide * wide, 1), 0)) * tl.load(longest + h) * scale
    tl.atomic_max(largest + h, bound, sem="relaxed")
    if bound <= limit:
        acc, row_lse = _softmax_rows(
            q_tile, lo, hi, begin, split, end, k + h * D, v + h * D, order, HKV * D,
            scale, M, D, BN, HAS_ORDER, True,
        )  # fmt: skip
    else:
        acc, row_lse = _softmax_rows(
            q_tile, lo, hi, begin, split, end, k + h * D, v + h * D, order, HKV * D,
            scale, M, D, BN, HAS_ORDER, False,
        )  # fmt: skip
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=stored[:, None])
    tl.store(lse + row, row_lse, mask=stored)


@triton.jit
def _attend_listed(
    q, k, v, out, lse, order, begin, end, key_begin, key_end, h, first_pair, scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attend from the rows of pairs [begin, end) of the list to keys [key_begin, key_end)."""
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    heads = tl.minimum(rows % GP, G - 1)
    dims = tl.arange(0, D)[None, :]
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
            scale, M, D, BN, False, BOUNDED,
        )  # fmt: skip
        stored = (start + rows // GP < end) & (rows % GP < G)
        pair = (pairs - first_pair).to(tl.int64) * G + heads
        offsets = pair[:, None] * D + dims
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=stored[:, None])
        tl.store(lse + pair, row_lse, mask=stored)
        pairs = next_pairs
        q_tile = next_q


@triton.jit
def load_tile(tiles, tile_counts, chunk):
    """Return begin and end in the list of pairs of this program's tile of a chunk, and KV head *
    Ns + block; an empty tile past the chunk's last.
    """
    number = tl.program_id(0)
    tile = tiles + 3 * (chunk * tl.num_programs(0) + number).to(tl.int64)
    inside = number < tl.load(tile_counts + chunk)
    begin = tl.load(tile, mask=inside, other=0)
    end = tl.load(tile + 1, mask=inside, other=0)
    return begin, end, tl.load(tile + 2, mask=inside, other=0)


@triton.jit(do_not_specialize=["chunk", "first_pair", "num_blocks"])
def attend_pairs(
    q, k, v, out, lse,  # out [pairs of the chunk, G, D], lse [pairs of the chunk, G]
    largest,  # [Hkv] float32: no logit is larger
    order, tiles, tile_counts,  # pairs (token, KV head, slot) of all chunks, see `ssa_lists.py`
    starts,  # [Ns + 1] first token of each block
    chunk, first_pair, num_blocks, scale, limit,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Selection branch: softmax attention of the tokens that took a block over its tokens alone."""
    begin, end, segment = load_tile(tiles, tile_counts, chunk)
    if begin < end:
        h = segment // num_blocks
        block = segment % num_blocks
        key_begin = tl.load(starts + block)
        key_end = tl.load(starts + block + 1)
        if tl.load(largest + h) <= limit:
            _attend_listed(
                q, k, v, out, lse, order, begin, end, key_begin, key_end, h, first_pair, scale,
                HKV, G, GP, T, D, BN, PAIRS, True,
            )  # fmt: skip
        else:
            _attend_listed(
                q, k, v, out, lse, order, begin, end, key_begin, key_end, h, first_pair, scale,
                HKV, G, GP, T, D, BN, PAIRS, False,
            )  # fmt: skip


@triton.jit
def _score_blocks(
    q, k_cmp, lse,  # q [M, D], keys of one KV head, lse [M]
    scores,  # to be written: [T, width], this program's own
    lo, hi, width, stride, scale,
    GP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    LOW: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Write the scores of compression blocks [lo, hi) for T tokens."""
    lines = tl.arange(0, BN)
    token = tl.arange(0, T)
    for start in range(lo, hi, BN):
        columns = start + lines
        keys = load_keys(k_cmp, columns, hi, k_cmp, stride, D, False)
        p = tl.exp2(dot(keys, tl.trans(q)) * scale - lse[None, :])
        # Within threads: in a row of a matrix instruction's result a thread has two neighbours of
        # eight, and so of each token an even number of heads, see select_places.
        p = tl.reshape(p, [BN, T // LOW, GP // TWO, LOW, TWO])
        total = tl.reshape(tl.sum(tl.sum(p, 4), 2), [BN, T])
        places = token[None, :] * width + (columns - lo)[:, None]
        tl.store(scores + places, total, mask=(columns < hi)[:, None])


@triton.jit
def _sum_slots(
    sums,  # to be written: [T, width] of selection blocks from `first` on
    scores,  # [T, panel_width] of compression blocks from `lo` on
    inner,  # [Ns + 1] first compression block of each selection block
    lo, first, begin, end, width, panel_width,
    T: tl.constexpr, SLOTS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Sum the scores of the compression blocks, at most SLOTS, of selection blocks [begin, end)."""
    token = tl.arange(0, T)[:, None]
    for start in range(begin, end, LINES):
        block = start + tl.arange(0, LINES)
        inside = block < end
        column = tl.load(inner + block, mask=inside, other=0)
        count = tl.load(inner + block + 1, mask=inside, other=0) - column
        total = tl.zeros([T, LINES], tl.float32)
        for slot in tl.range(SLOTS, loop_unroll_factor=8):
            places = token * panel_width + (column - lo + slot)[None, :]
            total += tl.load(scores + places, mask=(slot < count)[None, :], other=0.0)
        tl.store(sums + token * width + (block - first)[None, :], total, mask=inside[None, :])


@triton.jit
def _store_top_blocks(
    selected,  # to be written: [T, 1] pointers to the first of TOP_K blocks, int32
    stored,  # [T] whether to write
    scores,  # [T, width] of blocks from `first` on
    begin, end,  # [T] blocks [begin, end) that a token may take, counted from `first`
    first, last, width,
    T: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Write the blocks of the TOP_K best scores, best first, -1 where there are fewer.

    Block b, counted from `first`, belongs to group b % GROUPS. The best of every group is kept; the
    best of these is taken TOP_K times, and its group then looks for the next in its order, which is
    by score, then by block.
    """
    NONE: tl.constexpr = -1.0
    FAR: tl.constexpr = 1 << 30
    token = tl.arange(0, T)[:, None] * width
    group = tl.arange(0, GROUPS)[None, :]
    best = tl.zeros([T, GROUPS], tl.float32) + NONE
    block_of_best = tl.zeros([T, GROUPS], tl.int32)
    for start in range(0, last - first, GROUPS):
        block = start + group
        inside = (block >= begin[:, None]) & (block < end[:, None])
        score = tl.load(scores + token + block, mask=inside, other=NONE)
        better = score > best
        best = tl.where(better, score, best)
        block_of_best = tl.where(better, block, block_of_best)
    for slot in range(TOP_K):
        top = tl.max(best, 1)
        taken = tl.min(tl.where(best == top[:, None], block_of_best, FAR), 1)
        result = tl.where(top > NONE, taken + first, -1)
        tl.store(selected + slot, result[:, None], mask=stored[:, None])
        own = taken % GROUPS
        block = own[:, None] + tl.arange(0, MEMBERS)[None, :] * GROUPS
        inside = (block >= begin[:, None]) & (block < end[:, None])
        score = tl.load(scores + token + block, mask=inside, other=NONE)
        later = (score < top[:, None]) | ((score == top[:, None]) & (block > taken[:, None]))
        score = tl.where(later, score, NONE)
        following = tl.max(score, 1)
        block = tl.min(tl.where(score == following[:, None], block, FAR), 1)
        changed = group == own[:, None]
        best = tl.where(changed, following[:, None], best)
        block_of_best = tl.where(changed, block[:, None], block_of_best)


@triton.jit(do_not_specialize=["n"])
def select_places(
    q, k_cmp, lse,  # [N, Hq, D], [Nc, Hkv, D], [N, Hq] of the compression branch
    selected,  # [N, Hkv, top_k] int32
    scratch,  # [programs, T, width + PANEL * SLOTS] float32; where SLOTS is 1, [programs, T, width]
    compression_range,  # [N, 2] compression blocks of each token's sample
    ranges,  # [N, 2] selection blocks of each token's sample
    inner,  # [Ns + 1] first compression block of each selection block
    n, width, scale,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, PANEL: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Top-k blocks by compression attention. Every program works through many tiles of tokens
    with a scratch of its own, which stays in the cache: nothing is of size N x Nc. Where selection
    blocks hold several compression blocks, these are scored PANEL selection blocks at a time.
    """
    M: tl.constexpr = T * GP
    rows = tl.arange(0, M)
    # From the slowest: high part of the token, of the head, low part of the token, of the head.
    LOW: tl.constexpr = 4 if T % 4 == 0 else 1
    TWO: tl.constexpr = 2 if GP > 1 else 1
    head_of_row = rows // (TWO * LOW) % (GP // TWO) * TWO + rows % TWO
    token_of_row = rows // (GP * LOW) * LOW + rows // TWO % LOW
    PANEL_WIDTH: tl.constexpr = 0 if SLOTS == 1 else PANEL * SLOTS
    sums = scratch + tl.program_id(0).to(tl.int64) * T * (width + PANEL_WIDTH)
    panel = sums + T * width
    for item in range(tl.program_id(0), tl.cdiv(n, T) * HKV, tl.num_programs(0)):
        h = item % HKV
        tile = item // HKV
        tokens = tl.minimum(tile * T + token_of_row, n - 1)
        row = tokens.to(tl.int64) * (HKV * G) + h * G + tl.minimum(head_of_row, G - 1)
        q_tile = tl.load(q + row[:, None] * D + tl.arange(0, D)[None, :])
        # Padding heads weigh nothing.
        row_lse = tl.where(head_of_row < G, tl.load(lse + row), float("inf"))
        token = tile * T + tl.arange(0, T)
        begin = tl.load(ranges + 2 * tl.minimum(token, n - 1))
        end = tl.load(ranges + 2 * tl.minimum(token, n - 1) + 1)
        first = tl.min(begin, 0)
        last = tl.max(end, 0)
        if SLOTS == 1:
            lo = tl.load(compression_range + 2 * tile * T)
            hi = tl.load(compression_range + 2 * tl.minimum(tile * T + T, n) - 1)
            _score_blocks(
                q_tile, k_cmp + h * D, row_lse, sums, lo, hi, width, HKV * D, scale,
                GP, T, D, BN, LOW, TWO,
            )  # fmt: skip
            tl.debug_barrier()  # other threads of the program read what this one wrote
        else:
            for start in range(first, last, PANEL):
                stop = tl.minimum(start + PANEL, last)
                lo = tl.load(inner + start)
                hi = tl.load(inner + stop)
                _score_blocks(
                    q_tile, k_cmp + h * D, row_lse, panel, lo, hi, PANEL_WIDTH, HKV * D, scale,
                    GP, T, D, BN, LOW, TWO,
                )  # fmt: skip
                tl.debug_barrier()
                _sum_slots(
                    sums, panel, inner, lo, first, start, stop, width, PANEL_WIDTH, T, SLOTS, GROUPS
                )
                tl.debug_barrier()
        offsets = (token[:, None].to(tl.int64) * HKV + h) * TOP_K
        _store_top_blocks(
            selected + offsets, token < n, sums, begin - first, end - first, first, last, width,
            T, GROUPS, MEMBERS, TOP_K,
        )  # fmt: skip
        tl.debug_barrier()  # before the next tile overwrites the scores


@triton.jit(do_not_specialize=["first", "n"])
def combine_places(
    out,  # [N, Hq, D]: the window branch; becomes the gated sum of the three
    out_cmp, out_sel,  # [N, Hq, D], to be written the second
    lse_cmp, lse_sel,  # [N, Hq], less log2 of the gate: the first becomes so, the second is written
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
    for i in tl.range(TOP_K, loop_unroll_factor=4):
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
    inverse = 1.0 / tl.maximum(total, 1e-30)
    acc = acc * inverse[:, None]
    row = tokens * (HKV * G) + h * G + heads
    offsets = row[:, None] * D + tl.arange(0, D)[None, :]
    compression = tl.load(out_cmp + offsets).to(tl.float32)
    window = tl.load(out + offsets).to(tl.float32)
    gate_cmp = tl.load(gates + tokens * 3).to(tl.float32)
    gate_sel = tl.load(gates + tokens * 3 + 1).to(tl.float32)
    gate_win = tl.load(gates + tokens * 3 + 2).to(tl.float32)
    mixed = gate_cmp[:, None] * compression + gate_sel[:, None] * acc + gate_win[:, None] * window
    dtype = out.dtype.element_ty
    tl.store(out_sel + offsets, acc.to(dtype), mask=inside[:, None])
    tl.store(out + offsets, mixed.to(dtype), mask=inside[:, None])
    # With these the backward pass gets gate * probability from one exponential.
    row_lse = m + tl.log2(tl.maximum(total, 1e-30))
    tl.store(lse_sel + row, row_lse - tl.log2(gate_sel), mask=inside)
    tl.store(lse_cmp + row, tl.load(lse_cmp + row) - tl.log2(gate_cmp), mask=inside)
