"""Attention of the diffusion transformers: Spatial Sparse Attention, full, and cross-attention.

Rows are the tokens of a ragged batch, one sample after the other; `Samples` says whose they are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.ssa import SSALayout, spatial_sparse_attention
from model.convolution import SubmanifoldConv3d
from model.sparse import SparseTensor, voxel_keys
from model.transformer import RMSNorm


@dataclass(frozen=True)
class Samples:
    """How the rows of a ragged batch divide into samples, and where they go in a padded batch.

    count: samples, B; length: rows of the longest one, L.
    membership: [N, B] float32, 1 where the row belongs to the sample.
    slot: [N] int64, place of each row in the padded [B * L] batch, or None where every sample has
        L rows, so that padding is a view.
    """

    count: int
    length: int
    membership: Tensor
    slot: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """[B, L] bool, False at padding; None where there is none."""
        if self.slot is None:
            return None
        mask = torch.zeros(self.count * self.length, dtype=torch.bool, device=self.slot.device)
        return mask.index_fill(0, self.slot, True).view(self.count, self.length)

    def pad(self, rows: Tensor) -> Tensor:
        """Return rows [N, ...] as [B, L, ...], zero at padding."""
        if self.slot is not None:
            empty = rows.new_zeros(self.count * self.length, *rows.shape[1:])
            rows = empty.index_copy(0, self.slot, rows)
        return rows.view(self.count, self.length, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Return [B, L, ...] as rows [N, ...]; the inverse of `pad`."""
        rows = padded.flatten(0, 1)
        return rows if self.slot is None else rows.index_select(0, self.slot)

    def spread(self, values: Tensor) -> Tensor:
        """Return values [B, C], one a sample, at each row: [N, C], or [1, C] of a single sample.

        A matrix product, because its gradient is one too: an indexed read would add N rows of
        gradient onto B with atomics, slowly and in no fixed order.
        """
        return values if self.count == 1 else self.membership.to(values.dtype) @ values


def divide_samples(sample: Tensor, count: int) -> Samples:
    """Return the division of rows by their sample index [N], sorted. Synchronises with the host."""
    sample = sample.long()
    if len(sample) and int(sample[-1]) >= count:
        raise ValueError(f"rows of sample {int(sample[-1])} in a batch of {count} samples")
    starts = torch.searchsorted(sample, torch.arange(count + 1, device=sample.device))
    length = int(starts.diff().max())
    slot = None
    if len(sample) != count * length:
        within = torch.arange(len(sample), device=sample.device) - starts[sample]
        slot = sample * length + within
    return Samples(count, length, functional.one_hot(sample, count).float(), slot)


def block_mean(rows: Tensor, layout: SSALayout) -> Tensor:
    """Return the mean of the rows of each compression block, [Nc, C] for rows [N, C].

    Sums in float32, in the order of the rows, without atomics: equal input, equal bits.
    """
    if not len(rows):
        return rows
    starts = layout.compression_starts[: layout.num_compression_blocks + 1].long()
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    mean = torch.segment_reduce(wide, "mean", offsets=starts, axis=0, unsafe=True)
    return mean.to(rows.dtype)


class PointwiseCompression(nn.Module):
    """delta of eq. (7) as in v1.1: 1x1 convolution, SiLU, block mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, channels)

    def forward(self, rows: Tensor, layout: SSALayout) -> Tensor:
        """Return [Nc, channels] for rows [N, channels]."""
        return block_mean(functional.silu(self.project(rows)), layout)


class ConvolutionCompression(nn.Module):
    """delta of eq. (7) as in v1.0: norm, SiLU, block mean, then a residual pair of convolutions.

    The convolutions see the compression blocks as voxels. The norms are per block, so that a
    sample's result doesn't depend on the others in the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.conv_in = SubmanifoldConv3d(channels, channels)
        self.norm_out = nn.LayerNorm(channels)
        self.conv_out = SubmanifoldConv3d(channels, channels)

    def forward(self, rows: Tensor, layout: SSALayout) -> Tensor:
        """Return [Nc, channels] for rows [N, channels]."""
        pooled = block_mean(functional.silu(self.norm_in(rows)), layout)
        # Blocks come in the layout's order; SparseTensor wants them lexicographic.
        coords = layout.compression_coords
        order = voxel_keys(coords).argsort()
        h = self.conv_in(SparseTensor(coords[order], pooled.index_select(0, order)))
        h = self.conv_out(h.replace(functional.silu(self.norm_out(h.feats))))
        return pooled + torch.empty_like(h.feats).index_copy(0, order, h.feats)


class SpatialSparseAttention(nn.Module):
    """SSA with its projections, eqs. (6) to (8): compression, selection and window, gated a token.

    position: the learned table PE over the places in a compression block, zero at first; it moves
        the compressed keys only.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        top_k: int,
        compression: int,
        delta: Literal["pointwise", "convolution"] = "pointwise",
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.top_k = heads, kv_heads, head_dim, top_k
        kv_channels = kv_heads * head_dim
        self.qkv = nn.Linear(width, heads * head_dim + 2 * kv_channels)
        self.q_norm = RMSNorm(heads, head_dim)
        self.k_norm = RMSNorm(kv_heads, head_dim)
        self.position = nn.Parameter(torch.zeros(compression**3, kv_channels))
        kind = PointwiseCompression if delta == "pointwise" else ConvolutionCompression
        self.compress_k = kind(kv_channels)
        self.compress_v = kind(kv_channels)
        self.gates = nn.Linear(width, 3)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, rows: Tensor, layout: SSALayout) -> Tensor:
        """Return [N, width] for rows [N, width] in the layout's block order."""
        kv_channels = self.kv_heads * self.head_dim
        q, k, v = self.qkv(rows).split([self.heads * self.head_dim, kv_channels, kv_channels], 1)
        q = self.q_norm(q.unflatten(1, (self.heads, self.head_dim)))
        k = self.k_norm(k.unflatten(1, (self.kv_heads, self.head_dim)))
        # embedding and not indexing: its backward sorts instead of adding with atomics.
        place = functional.embedding(layout.position_in_compression_block, self.position)
        k_cmp = self.compress_k(k.flatten(1) + place.to(k.dtype), layout)
        v_cmp = self.compress_v(v, layout)
        gates = torch.sigmoid(self.gates(rows))
        heads = (self.kv_heads, self.head_dim)
        attended = spatial_sparse_attention(
            q,
            k,
            v.unflatten(1, heads),
            k_cmp.to(q.dtype).unflatten(1, heads),
            v_cmp.to(q.dtype).unflatten(1, heads),
            gates.to(q.dtype),
            layout,
            self.top_k,
        )
        return self.out(attended.flatten(1))


class FullAttention(nn.Module):
    """Softmax attention among all rows of a sample, eqs. (4) and (5), with qk RMS norm."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.q_norm = RMSNorm(heads, head_dim)
        self.k_norm = RMSNorm(heads, head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, rows: Tensor, samples: Samples) -> Tensor:
        """Return [N, width] for rows [N, width]."""
        q, k, v = self.qkv(rows).unflatten(1, (3, self.heads, self.head_dim)).unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.out(_attend(q, samples.pad(k), samples.pad(v), samples.mask, samples))


class CrossAttention(nn.Module):
    """Softmax attention of a sample's rows to its padded condition tokens."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q = nn.Linear(width, heads * head_dim)
        self.kv = nn.Linear(context_width, 2 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, rows: Tensor, context: Tensor, mask: Tensor, samples: Samples) -> Tensor:
        """Return [N, width] for rows [N, width], context [B, T, C] and its mask [B, T]."""
        q = self.q(rows).unflatten(1, (self.heads, self.head_dim))
        k, v = self.kv(context).unflatten(2, (2, self.heads, self.head_dim)).unbind(2)
        return self.out(_attend(q, k, v, mask, samples))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, samples: Samples) -> Tensor:
    """Return [N, H * D] of queries [N, H, D] over k, v [B, T, H, D] under mask [B, T]."""
    out = functional.scaled_dot_product_attention(
        samples.pad(q).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None, None, :],
    )
    return samples.unpad(out.transpose(1, 2)).flatten(1)
