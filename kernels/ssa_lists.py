"""Lists for SSA's selection branch: which (token, KV head, slot) pairs took a block, and the tiles.

Pairs are numbered (token * Hkv + KV head) * top_k + slot. Their list is sorted by chunk of tokens,
KV head and block, those of the most tokens first, so that no long program is left running at the
end. It is a counting sort: `count_pairs` counts the pairs and draws each one's place among those of
its block, `cut_segments` finds where each block's begin and cuts them into tiles, `place_pairs`
writes them down. Places are drawn by atomics, so that the order within a block changes from run to
run; no result of the forward pass depends on it.

The pairs of a chunk begin at a place that its number alone tells; pairs without a block (-1) leave
a gap at the chunk's end.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024  # of a program
SEGMENTS = 1024  # that a program cuts at a time


@triton.jit
def _load_pairs(
    selected, num_pairs, chunk_tokens, num_blocks,
    HKV: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return this program's pairs, the index of each one's segment in [chunks, Hkv, Ns], and which
    pairs have a block.
    """
    pairs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    block = tl.load(selected + pairs, mask=pairs < num_pairs, other=-1)
    token = pairs // (HKV * TOP_K)
    head = pairs // TOP_K % HKV
    return pairs, (token // chunk_tokens * HKV + head) * num_blocks + block, block >= 0


@triton.jit(do_not_specialize=["num_pairs", "chunk_tokens", "num_blocks"])
def count_pairs(
    selected,  # [N, Hkv, top_k] int32
    counts,  # [chunks, Hkv, Ns] int32, zero before
    places,  # [N, Hkv, top_k] int32 to be written: place among the pairs of the same segment
    num_pairs, chunk_tokens, num_blocks,
    HKV: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Count the pairs of each segment."""
    pairs, segment, taken = _load_pairs(
        selected, num_pairs, chunk_tokens, num_blocks, HKV, TOP_K, SIZE
    )  # fmt: skip
    place = tl.atomic_add(counts + segment, 1, mask=taken, sem="relaxed")
    tl.store(places + pairs, place, mask=taken)


@triton.jit(do_not_specialize=["chunk_pairs", "num_blocks", "bound", "tile_pairs"])
def cut_segments(
    counts,  # [chunks, Hkv, Ns] int32
    by_size,  # [Ns] blocks in the order in which their segments lie in the list
    firsts,  # [chunks, Hkv, Ns] int32 to be written: place of a segment's first pair
    tiles,  # [chunks, bound, 3] int32 to be written: begin, end in the list, KV head * Ns + block
    tile_counts,  # [chunks] int32 to be written: tiles of each chunk
    chunk_pairs, num_blocks, bound, tile_pairs,
    HKV: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Place the segments of one chunk one after the other; cut them into tiles of tile_pairs."""
    chunk = tl.program_id(0)
    first = chunk * chunk_pairs
    first_tile = 0
    for start in range(0, HKV * num_blocks, SIZE):
        line = start + tl.arange(0, SIZE)
        inside = line < HKV * num_blocks
        segment = line // num_blocks * num_blocks
        segment += tl.load(by_size + line % num_blocks, mask=inside, other=0)
        place = chunk * (HKV * num_blocks) + segment
        count = tl.load(counts + place, mask=inside, other=0)
        begin = first + tl.cumsum(count, 0) - count
        tl.store(firsts + place, begin, mask=inside)
        pieces = (count + tile_pairs - 1) // tile_pairs
        tile = first_tile + tl.cumsum(pieces, 0) - pieces
        for piece in range(tl.max(pieces, 0)):
            entry = tiles + (chunk * bound + tile + piece).to(tl.int64) * 3
            mine = piece < pieces
            begins = begin + piece * tile_pairs
            tl.store(entry, begins, mask=mine)
            tl.store(entry + 1, tl.minimum(begins + tile_pairs, begin + count), mask=mine)
            tl.store(entry + 2, segment, mask=mine)
        first += tl.sum(count, 0)
        first_tile += tl.sum(pieces, 0)
    tl.store(tile_counts + chunk, first_tile)


@triton.jit(do_not_specialize=["num_pairs", "chunk_tokens", "num_blocks"])
def place_pairs(
    selected, places, firsts,  # as above
    order,  # [N * Hkv * top_k] int32 to be written: the list
    num_pairs, chunk_tokens, num_blocks,
    HKV: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the list of pairs."""
    pairs, segment, taken = _load_pairs(
        selected, num_pairs, chunk_tokens, num_blocks, HKV, TOP_K, SIZE
    )  # fmt: skip
    place = tl.load(firsts + segment, mask=taken) + tl.load(places + pairs, mask=taken)
    tl.store(order + place, pairs, mask=taken)


def sort_pairs(
    selected: Tensor, by_size: Tensor, num_selection: int, chunk: int, tile_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the pairs of selected [N, Hkv, top_k] int32, `chunk` tokens a chunk.

    by_size: [>= Ns] int32, selection blocks in the order in which they are to be worked on. Returns
    the list [N * Hkv * top_k] int32, the counts [chunks, Hkv, Ns] int32, the tiles and their
    numbers, see `cut_tiles`.
    """
    n, kv_heads, top_k = selected.shape
    device = selected.device
    chunks = -(-n // chunk)
    counts = torch.zeros(chunks, kv_heads, num_selection, dtype=torch.int32, device=device)
    places = torch.empty_like(selected)
    order = torch.empty(selected.numel(), dtype=torch.int32, device=device)
    grid = (triton.cdiv(selected.numel(), PAIRS),)
    sizes = selected.numel(), chunk, num_selection
    constants = {"HKV": kv_heads, "TOP_K": top_k, "SIZE": PAIRS}
    count_pairs[grid](selected, counts, places, *sizes, **constants)
    firsts, tiles, tile_counts = cut_tiles(counts, by_size, chunk * kv_heads * top_k, tile_pairs)
    place_pairs[grid](selected, places, firsts, order, *sizes, **constants)
    return order, counts, tiles, tile_counts


def cut_tiles(
    counts: Tensor, by_size: Tensor, chunk_pairs: int, tile_pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the segments of the list, counts [chunks, Hkv, Ns], into tiles of at most tile_pairs.

    Returns the place of each segment's first pair [chunks, Hkv, Ns] int32; the tiles [chunks, T, 3]
    int32, begin and end in the list and KV head * Ns + block; and how many of them each chunk uses,
    [chunks] int32: their number is not known on the host.
    """
    chunks, kv_heads, num_selection = counts.shape
    bound = chunk_pairs // tile_pairs + kv_heads * num_selection
    firsts = torch.empty_like(counts)
    tiles = counts.new_empty(chunks, bound, 3)
    tile_counts = counts.new_empty(chunks)
    cut_segments[(chunks,)](
        counts, by_size, firsts, tiles, tile_counts, chunk_pairs, num_selection, bound, tile_pairs,
        HKV=kv_heads, SIZE=SEGMENTS,
    )  # fmt: skip
    return firsts, tiles, tile_counts


def stable_list(selected: Tensor, by_size: Tensor, num_selection: int, chunk: int) -> Tensor:
    """Return the list of `sort_pairs` with the pairs of a segment in the order of their numbers."""
    n, kv_heads, _ = selected.shape
    device = selected.device
    head = torch.arange(kv_heads, device=device)[:, None]
    chunk_of = torch.arange(n, device=device)[:, None, None] // chunk
    rank = by_size[:num_selection].argsort()
    segments = kv_heads * num_selection
    key = head * num_selection + rank[selected.clamp_min(0).long()]
    key = chunk_of * (segments + 1) + torch.where(selected < 0, segments, key)
    return key.flatten().argsort(stable=True).int()
