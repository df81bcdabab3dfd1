"""Diffusion transformers: blocks with adaptive layer norm, and the SS-DiT over sparse latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kernels.ssa import SSALayout, block_order, build_layout
from model.attention import (
    CrossAttention,
    FullAttention,
    Samples,
    SpatialSparseAttention,
    divide_samples,
)
from model.condition import Condition
from model.config import DiTConfig
from model.sparse import SparseTensor
from model.transformer import MLP, AbsolutePositionEmbedding

TIME_FREQUENCIES = 128


class TimestepEmbedding(nn.Module):
    """Sines and cosines of 1000 t at frequencies from 1 down to 1/10000, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * TIME_FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Return [B, width] for t [B] in [0, 1]."""
        steps = torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES
        angles = 1000 * t.float()[:, None] * 10000.0**-steps
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.down(functional.silu(self.up(waves)))


class DiTBlock(nn.Module):
    """adaLN(self-attention), cross-attention to the condition, adaLN(MLP), each added to its input.

    What it adds is zero at first (adaLN-zero, and a zero output of the cross-attention).
    """

    def __init__(
        self,
        attention: nn.Module,
        width: int,
        heads: int,
        head_dim: int,
        mlp_ratio: int,
        condition_width: int,
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = attention
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, condition_width, heads, head_dim)
        self.mlp = MLP(width, mlp_ratio)
        _zero(self.modulation)
        _zero(self.cross_attention.out)

    def forward(
        self,
        h: Tensor,
        time: Tensor,
        condition: Tensor,
        mask: Tensor,
        samples: Samples,
        table: SSALayout | Samples,
    ) -> Tensor:
        """Return [N, width] for rows h [N, width], time [B, width], condition [B, T, C]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            samples.spread(values) for values in self.modulation(functional.silu(time)).chunk(6, 1)
        )
        h = h + gate * self.attention(_modulate(h, shift, scale), table)
        h = h + self.cross_attention(self.cross_norm(h), condition, mask, samples)
        return h + mlp_gate * self.mlp(_modulate(h, mlp_shift, mlp_scale))


class DiffusionTransformer(nn.Module):
    """What the dense and the sparse transformer share: from rows of latents to rows of velocities.

    attentions: the self-attention of each block. Its output is zero at first.
    """

    def __init__(
        self,
        attentions: Iterable[nn.Module],
        latent_channels: int,
        width: int,
        heads: int,
        head_dim: int,
        mlp_ratio: int,
        condition_width: int,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.input = nn.Linear(latent_channels, width)
        self.position = AbsolutePositionEmbedding(width)
        self.time = TimestepEmbedding(width)
        self.blocks = nn.ModuleList(
            DiTBlock(attention, width, heads, head_dim, mlp_ratio, condition_width)
            for attention in attentions
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, latent_channels)
        _zero(self.modulation)
        _zero(self.output)

    def forward(
        self,
        rows: Tensor,
        positions: Tensor,
        t: Tensor,
        condition: Condition,
        samples: Samples,
        tables: Sequence[SSALayout | Samples],
    ) -> Tensor:
        """Return [N, latent] float32 for rows [N, latent] at positions [N, 3], t [B].

        tables: what the self-attention is given, layer by layer, in turn.
        """
        if len(condition.tokens) != samples.count:
            raise ValueError(
                f"the condition has {len(condition.tokens)} samples, t {samples.count}: one each"
            )
        # The sum of all blocks stays in float32 under autocast: bfloat16 loses small updates.
        h = self.input(rows).float() + self.position(positions)
        time = self.time(t)
        for i, block in enumerate(self.blocks):
            inputs = (h, time, *_fields(condition), samples, tables[i % len(tables)])
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(*inputs)
        shift, scale = self.modulation(functional.silu(time)).chunk(2, 1)
        h = _modulate(h, samples.spread(shift), samples.spread(scale))
        return self.output(h).float()


@dataclass(frozen=True)
class TokenTables:
    """Tables of a batch that every layer and every sampling step shares.

    order: [N] int64 that sorts rows into block order; samples: their division;
    layouts: of SSA, for even and for odd layers (windows shifted by half), or the division itself.
    """

    order: Tensor
    samples: Samples
    layouts: tuple[SSALayout | Samples, ...]


class SparseDiT(nn.Module):
    """SS-DiT: the velocity of noisy latents on active latent voxels.

    grid: latent grid side, an eighth of the resolution. It sets the scale of positions alone: the
        weights of one resolution fit every other.
    """

    def __init__(self, config: DiTConfig, grid: int) -> None:
        super().__init__()
        self.config = config
        self.position_scale = 1.0
        while grid * self.position_scale > config.max_grid:
            self.position_scale /= 2
        self.transformer = DiffusionTransformer(
            [_self_attention(config) for _ in range(config.blocks)],
            config.latent_channels,
            config.width,
            config.heads,
            config.head_dim,
            config.mlp_ratio,
            config.condition_width,
            config.recompute,
        )

    def forward(self, x: SparseTensor, t: Tensor, condition: Condition) -> SparseTensor:
        """Return the velocity on the voxels of x, [N, latent] float32.

        x: [N, latent] noisy latents; t: [B] in [0, 1], its length is the number of samples.
        """
        tables = self._tables(x, len(t))
        rows = x.feats.index_select(0, tables.order)
        positions = x.coords[:, 1:].index_select(0, tables.order) * self.position_scale
        velocity = self.transformer(rows, positions, t, condition, tables.samples, tables.layouts)
        return x.replace(torch.empty_like(velocity).index_copy(0, tables.order, velocity))

    def _tables(self, x: SparseTensor, batch: int) -> TokenTables:
        """Return the tables of x, kept in its cache. Synchronises with the host when built."""
        config = self.config
        sides = (config.compression, config.selection, config.window)
        key = ("token tables", config.attention, *sides, batch)
        found = x.cache.get(key)
        if found is not None:
            assert isinstance(found, TokenTables)
            return found
        if not len(x.coords):
            raise ValueError("x has no voxels: there is nothing to denoise")
        order = block_order(x.coords, block=config.selection, compression=config.compression)
        coords = x.coords[order]
        samples = divide_samples(coords[:, 0], batch)
        layouts: tuple[SSALayout | Samples, ...] = (samples,)
        if config.attention == "ssa":
            layouts = tuple(
                build_layout(coords, *sides, shift=shift) for shift in (0, config.window // 2)
            )
        tables = TokenTables(order, samples, layouts)
        x.cache[key] = tables
        return tables


def _self_attention(config: DiTConfig) -> nn.Module:
    if config.attention == "full":
        return FullAttention(config.width, config.heads, config.head_dim)
    return SpatialSparseAttention(
        config.width,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.top_k,
        config.compression,
        config.delta,
    )


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the layer norm of h [N, C], scaled by 1 + scale and shifted, both [N or 1, C]."""
    return functional.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


def _fields(condition: Condition) -> tuple[Tensor, Tensor]:
    return condition.tokens, condition.mask


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
