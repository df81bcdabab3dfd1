"""Spatial Sparse Attention: token order, layout tables, the function, its plain PyTorch reference.

Every token attends three times: to the compression tokens of its sample, to all tokens of the
`top_k` selection blocks with the highest compression attention, and to the tokens of its window;
gates weigh the three. CPU tensors take the reference below, CUDA tensors `kernels/ssa_triton.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_COORDINATE = 4096  # three coordinates, padded to blocks, and the batch fit one int64 key
MAX_TOP_K = 64
CHUNK_ELEMENTS = 1 << 22  # logits the reference holds at once


class Counts(NamedTuple):
    """Numbers of rows in use of a layout's tables, on the host."""

    samples: int
    compression: int
    selection: int
    windows: int


@dataclass(frozen=True)
class SSALayout:
    """Block and window tables of one batch; every layer and the backward reuse them.

    N tokens; S samples, Nc compression blocks, Ns selection blocks in order of their first token.
    These numbers depend on the data, so tables of blocks have N + 1 rows, padded with their last
    value, and nothing is read back while they are built; `counts` reads once, when first asked.
    All int32 unless stated, on the device of the coordinates.
    """

    coords: Tensor  # [N, 4] (batch, x, y, z), in block_order
    compression: int  # side of a compression block, in voxels
    selection: int
    window: int
    shift: int
    compression_index: Tensor  # [N] int64: compression block of each token
    position_in_compression_block: Tensor  # [N] int64 in [0, compression^3)
    sample_index: Tensor  # [N] int64: sample of each token, empty samples not counted
    selection_index: Tensor  # [N] int64: selection block of each token
    window_index: Tensor  # [N] int64: window of each token
    sample_starts: Tensor  # [N + 1]: first token of each sample
    selection_starts: Tensor  # [N + 1]: first token of each selection block
    compression_starts: Tensor  # [N + 1]: first token of each compression block
    selection_by_size: Tensor  # [N]: selection blocks, those of the most tokens first
    selection_compression: Tensor  # [N + 1]: first compression block of each selection block
    compression_range: Tensor  # [N, 2]: compression blocks [begin, end) of each token's sample
    selection_range: Tensor  # [N, 2]: selection blocks [begin, end) of each token's sample
    compression_tokens: Tensor  # [N, 2]: tokens [begin, end) of each compression block's sample
    window_order: Tensor  # [N]: tokens sorted by window
    window_range: Tensor  # [N, 2]: places in window_order of the window of the token at each place
    status: Tensor  # [6] int64: Counts, whether the order is wrong, whether coords are out of range

    @cached_property
    def counts(self) -> Counts:
        """Read the counts from the device; raise ValueError if the coordinates were wrong."""
        *counts, unordered, outside = self.status.tolist()
        if outside:
            raise ValueError(
                f"coords hold values outside [0, {MAX_COORDINATE}): move the voxels into the grid"
            )
        if unordered:
            raise ValueError(
                "coords are not in block order or not unique: permute the tokens by "
                f"block_order(coords, block={self.selection}, compression={self.compression})"
            )
        return Counts(*counts)

    @property
    def num_compression_blocks(self) -> int:
        """Nc, the rows of k_cmp and v_cmp. The first use synchronises with the device."""
        return self.counts.compression

    @property
    def compression_coords(self) -> Tensor:
        """[Nc, 4] int32 (batch, x, y, z) of the compression blocks, in units of their side."""
        coords = self.coords[self.compression_starts[: self.num_compression_blocks].long()]
        return torch.cat([coords[:, :1], coords[:, 1:] // self.compression], dim=1)


def block_order(coords: Tensor, block: int = 8, compression: int = 8) -> Tensor:
    """Return the permutation [N] that sorts coords [N, 4] by batch, block, inner block, voxel.

    `block` is the selection side; the inner blocks have the compression side, which divides it.
    """
    _check_coords(coords)
    _check_sides(compression, block, window=1, shift=0)
    return torch.argsort(_order_key(coords, block, compression))


def build_layout(
    coords: Tensor, compression: int, selection: int, window: int, shift: int
) -> SSALayout:
    """Build the tables of one batch from coords [N, 4] int32, tokens in `block_order`.

    Sides and shift are in voxels; the window of a voxel is (coordinate + shift) // window.
    Nothing synchronises with the device: on CUDA, coordinates that are out of order or out of
    range raise ValueError when `counts` is first read, which is before any attention is launched.
    """
    _check_coords(coords)
    _check_sides(compression, selection, window, shift)
    coords = coords.int()
    batch, voxel = coords[:, 0].long(), coords[:, 1:].long()
    key = _order_key(coords, selection, compression)
    sample_index, sample_starts = _runs(batch)
    compression_index, compression_starts = _runs(key // compression**3)
    selection_index, selection_starts = _runs(key // selection**3)

    window_key = _mixed_radix(batch, (voxel + shift) // window, MAX_COORDINATE + window)
    window_order = torch.argsort(window_key, stable=True)
    window_of_place, window_starts = _runs(window_key[window_order])
    window_index = torch.empty_like(window_of_place).scatter_(0, window_order, window_of_place)

    tokens = _range(sample_starts, sample_index)  # [N, 2] tokens of each token's sample
    compression_range = _block_range(tokens, compression_index)
    selection_compression = _pad_take(compression_index, selection_starts)
    first_tokens = compression_starts[:-1].long().clamp(max=max(len(coords) - 1, 0))

    unordered = (key[1:] <= key[:-1]).any()
    outside = ((voxel < 0) | (voxel >= MAX_COORDINATE)).any() | (batch < 0).any()
    totals = [
        index[-1:].sum() + (index.numel() > 0)
        for index in (sample_index, compression_index, selection_index, window_of_place)
    ]
    layout = SSALayout(
        coords=coords,
        compression=compression,
        selection=selection,
        window=window,
        shift=shift,
        compression_index=compression_index,
        position_in_compression_block=key % compression**3,
        sample_index=sample_index,
        selection_index=selection_index,
        window_index=window_index,
        sample_starts=sample_starts,
        selection_starts=selection_starts,
        compression_starts=compression_starts,
        selection_by_size=selection_starts.diff().argsort(descending=True, stable=True).int(),
        selection_compression=selection_compression,
        compression_range=compression_range,
        selection_range=_block_range(tokens, selection_index),
        compression_tokens=tokens[first_tokens].contiguous(),
        window_order=window_order.int(),
        window_range=_range(window_starts, window_of_place),
        status=torch.stack([*totals, unordered.long(), outside.long()]),
    )
    if coords.device.type == "cpu":
        _ = layout.counts  # costs nothing here: report wrong coordinates at once
    return layout


def spatial_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
) -> Tensor:
    """Return SSA [N, Hq, D] of a ragged batch.

    q: [N, Hq, D]; k, v: [N, Hkv, D], query head h reads KV head h // (Hq / Hkv).
    k_cmp, v_cmp: [Nc, Hkv, D], compressed keys and values.
    gates: [N, 3] weights of the compression, selection and window branch, already sigmoid: the
    kernels take their logarithm, and a negative one gives NaN gradients.
    Scale 1 / sqrt(D). top_k: selection blocks a token and a KV head take; fewer where the sample
    has fewer, and of equal scores the first block. No gradient flows through the selection.
    On CUDA equal inputs give equal bits, of the gradients of k and v only where
    torch.use_deterministic_algorithms is on: these are then summed without atomics, more slowly
    where many tokens take one block.
    """
    _check_inputs(q, k, v, k_cmp, v_cmp, gates, layout, top_k)
    # float64 is for checks, and no kernel launches on an empty grid: both take the reference.
    if q.device.type == "cuda" and q.dtype != torch.float64 and len(q):
        from kernels import ssa_triton  # triton is needed on CUDA alone

        return ssa_triton.attention(q, k, v, k_cmp, v_cmp, gates, layout, top_k)
    return ssa_reference(q, k, v, k_cmp, v_cmp, gates, layout, top_k)


def ssa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
    selected: Tensor | None = None,
) -> Tensor:
    """`spatial_sparse_attention` in plain PyTorch, on any device; half precision runs in float32.

    selected: [N, Hkv, top_k] from `select_blocks`, which is called where it is missing.
    Queries go in chunks, recomputed in the backward pass, so that no N x N matrix is kept.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if selected is None:
        selected = select_blocks(q, k_cmp, layout, top_k)
    heads = q.shape[1]
    inputs = [x.to(dtype) for x in (q, k, v, k_cmp, v_cmp, gates)]
    outputs = [q.new_zeros((0, *q.shape[1:]), dtype=dtype)]
    for tokens, compression, blocks in _samples(layout):
        qs, ks, vs, gs = (inputs[i][tokens] for i in (0, 1, 2, 5))
        kcs, vcs = inputs[3][compression], inputs[4][compression]
        block_of_key = layout.selection_index[tokens] - blocks.start
        window = layout.window_index[tokens]
        chosen = selected[tokens].long() - blocks.start
        chunk = max(1, CHUNK_ELEMENTS // (heads * len(qs)))
        for i in range(0, len(qs), chunk):
            j = slice(i, i + chunk)
            arguments = (qs[j], gs[j], chosen[j], window[j], ks, vs, kcs, vcs, block_of_key, window)
            if len(qs) > chunk and torch.is_grad_enabled():
                out = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:  # a sample of one chunk keeps less than its recomputation is worth
                out = _attend(*arguments)
            outputs.append(out)
    return torch.cat(outputs).to(q.dtype)


@torch.no_grad()
def select_blocks(q: Tensor, k_cmp: Tensor, layout: SSALayout, top_k: int) -> Tensor:
    """Return the selected blocks [N, Hkv, top_k] int32, best first, -1 where the sample has fewer.

    The score of a selection block is the compression attention probability summed over the
    compression blocks in it and over the query heads of a KV head. Plain PyTorch, any device.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k_cmp.shape[1]
    selected = torch.full((len(q), kv_heads, top_k), -1, dtype=torch.int32, device=q.device)
    block_of_compression = layout.selection_index[
        layout.compression_starts[: layout.num_compression_blocks].long()
    ]
    for tokens, compression, blocks in _samples(layout):
        keys = k_cmp[compression].to(dtype)
        block_of_key = block_of_compression[compression] - blocks.start
        count = blocks.stop - blocks.start
        chunk = max(1, CHUNK_ELEMENTS // (q.shape[1] * len(keys)))
        for i in range(tokens.start, tokens.stop, chunk):
            j = slice(i, min(i + chunk, tokens.stop))
            attention = _logits(q[j].to(dtype), keys).softmax(-1).sum(1)  # [Hkv, n, keys]
            scores = attention.new_zeros(*attention.shape[:2], count)
            scores.index_add_(2, block_of_key, attention)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
            selected[j, :, : best.shape[-1]] = (best + blocks.start).transpose(0, 1).int()
    return selected


def _attend(
    q: Tensor,  # [n, Hq, D] queries of one sample
    gates: Tensor,  # [n, 3]
    chosen: Tensor,  # [n, Hkv, top_k] blocks of the sample, negative where there are fewer
    window_of_query: Tensor,  # [n]
    k: Tensor,  # [m, Hkv, D] all tokens of the sample
    v: Tensor,  # [m, Hkv, D]
    k_cmp: Tensor,  # [c, Hkv, D]
    v_cmp: Tensor,  # [c, Hkv, D]
    block_of_key: Tensor,  # [m]
    window_of_key: Tensor,  # [m]
) -> Tensor:
    """Return the gated sum of the three branches, [n, Hq, D]."""
    # One column more takes the absent blocks, and no key reads it.
    blocks = int(block_of_key[-1]) + 1
    not_chosen = torch.ones((k.shape[1], len(q), blocks + 1), dtype=torch.bool, device=q.device)
    not_chosen.scatter_(2, torch.where(chosen < 0, blocks, chosen).transpose(0, 1), False)
    outside_selection = not_chosen.index_select(2, block_of_key)[:, None]  # [Hkv, 1, n, m]
    outside_window = window_of_query[:, None] != window_of_key  # [n, m]

    logits = _logits(q, k)  # [Hkv, G, n, m], shared by two branches
    compression = _weigh(_logits(q, k_cmp).softmax(-1), v_cmp)
    selection = _weigh(logits.masked_fill(outside_selection, float("-inf")).softmax(-1), v)
    window = _weigh(logits.masked_fill(outside_window, float("-inf")).softmax(-1), v)
    gate = gates.t()[:, None, None, :, None]  # [3, 1, 1, n, 1]
    out = gate[0] * compression + gate[1] * selection + gate[2] * window  # [Hkv, G, n, D]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Return q . k / sqrt(D), [Hkv, G, n, m], of q [n, Hkv * G, D] and k [m, Hkv, D]."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    rows = q.view(n, k.shape[1], group, dim).permute(1, 2, 0, 3).flatten(1, 2) * dim**-0.5
    return (rows @ k.permute(1, 2, 0)).unflatten(1, (group, n))


def _weigh(weights: Tensor, v: Tensor) -> Tensor:
    """Return weights [Hkv, G, n, m] times v [m, Hkv, D], [Hkv, G, n, D]."""
    out = weights.flatten(1, 2) @ v.transpose(0, 1)
    return out.unflatten(1, weights.shape[1:3])


def _samples(layout: SSALayout) -> list[tuple[slice, slice, slice]]:
    """Return the tokens, compression blocks and selection blocks of each sample."""
    if not layout.counts.samples:
        return []
    starts = layout.sample_starts[: layout.counts.samples].long()
    table = torch.stack([starts, layout.compression_index[starts], layout.selection_index[starts]])
    counts = layout.counts
    ends = (len(layout.coords), counts.compression, counts.selection)
    columns = [
        [slice(a, b) for a, b in zip(row, [*row[1:], end], strict=True)]
        for row, end in zip(table.tolist(), ends, strict=True)
    ]
    return list(zip(*columns, strict=True))


def _order_key(coords: Tensor, block: int, compression: int) -> Tensor:
    """Return one int64 key a voxel; key // compression^3 and key // block^3 name its blocks."""
    batch, voxel = coords[:, 0].long(), coords[:, 1:].long()
    block_key = _mixed_radix(batch, voxel // block, MAX_COORDINATE)
    inner = _mixed_radix(block_key, voxel % block // compression, block // compression)
    return _mixed_radix(inner, voxel % compression, compression)


def _mixed_radix(high: Tensor, digits: Tensor, radix: int) -> Tensor:
    for digit in digits.unbind(1):
        high = high * radix + digit
    return high


def _runs(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the run [N] int64 that each sorted key belongs to, and the runs' starts [N + 1]."""
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    index = is_first.cumsum(0) - 1
    places = torch.arange(len(keys) + 1, device=keys.device)
    return index, torch.searchsorted(index, places).int()


def _range(starts: Tensor, index: Tensor) -> Tensor:
    """Return [begin, end) of run `index`, [N, 2] int32."""
    return torch.stack([starts[index], starts[index + 1]], dim=1)


def _block_range(tokens: Tensor, block_index: Tensor) -> Tensor:
    """Return the blocks [begin, end) that tokens [begin, end) lie in, [N, 2] int32."""
    return torch.stack(
        [block_index[tokens[:, 0].long()], block_index[tokens[:, 1].long() - 1] + 1], dim=1
    ).int()


def _pad_take(index: Tensor, places: Tensor) -> Tensor:
    """Return index[places], int32, with one more than its last value behind the end."""
    padded = torch.cat([index, index[-1:] + 1 if len(index) else index.new_zeros(1)])
    return padded[places.long()].int()


def _check_coords(coords: Tensor) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "coords: expected [N, 4] int32 (batch, x, y, z), "
            f"got {list(coords.shape)} {coords.dtype}"
        )


def _check_sides(compression: int, selection: int, window: int, shift: int) -> None:
    if min(compression, selection, window) < 1 or selection % compression:
        raise ValueError(
            f"sides {compression}/{selection}/{window}: expected positive voxels, the compression "
            "side dividing the selection side"
        )
    if not 0 <= shift < window:
        raise ValueError(f"shift {shift}: expected 0 <= shift < window = {window}")


def _check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    layout: SSALayout,
    top_k: int,
) -> None:
    n, nc = len(layout.coords), layout.num_compression_blocks
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError(f"q, k: expected [N, heads, D], got {list(q.shape)} and {list(k.shape)}")
    heads, dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    expected = {
        "q": (q, (n, heads, dim)),
        "k": (k, (n, kv_heads, dim)),
        "v": (v, (n, kv_heads, dim)),
        "k_cmp": (k_cmp, (nc, kv_heads, dim)),
        "v_cmp": (v_cmp, (nc, kv_heads, dim)),
        "gates": (gates, (n, 3)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected {list(shape)} for the layout's {n} tokens and {nc} compression "
                f"blocks, got {list(tensor.shape)}"
            )
        if tensor.device != layout.coords.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the layout on {layout.coords.device}: move one"
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q is {q.dtype}: cast to one dtype")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: expected a floating point dtype")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads: expected a multiple of the {kv_heads} KV heads")
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"top_k {top_k}: expected 1 to {MAX_TOP_K}")
