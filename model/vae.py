"""The sparse SDF VAE (paper, section 3.1): band voxels -> sparse latents -> blocks of SDF."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import VAEConfig
from model.convolution import SubmanifoldConv3d, block_values, mean_pool, subdivide
from model.sdf import BLOCK
from model.sparse import SparseTensor, voxel_keys
from model.transformer import AbsolutePositionEmbedding, WindowBlock

# Latent voxels around a chunk. The decoder's convolutions reach 2.63 (one voxel at side 1, two at
# side 2, two at side 4, one at side 8), so that chunks join exactly from 3 on; the paper takes 4.
CHUNK_PADDING = 4


class GroupNorm(nn.Module):
    """Group norm over all voxels of a sample, computed in float32; up to 32 groups.

    Statistics are a sample's own, so that a result does not depend on what shares its batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = math.gcd(32, channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a float32 tensor on the same voxels (float64 stays). Synchronises once."""
        lengths = x.cache.get("lengths")
        if lengths is None:
            lengths = x.cache["lengths"] = x.lengths(x.batch_size).tolist()
        assert isinstance(lengths, list)
        feats = x.feats if x.feats.dtype == torch.float64 else x.feats.float()
        normed = []
        for sample in feats.unflatten(1, (self.groups, -1)).split(lengths):
            if not len(sample):  # a variance of nothing warns
                continue
            variance, mean = torch.var_mean(sample, dim=(0, 2), correction=0, keepdim=True)
            normed.append(((sample - mean) * (variance + 1e-5).rsqrt()).flatten(1))
        result = torch.cat(normed) if normed else feats
        return x.replace(result * self.weight + self.bias)


def _silu(x: SparseTensor) -> SparseTensor:
    return x.replace(functional.silu(x.feats))


class DownBlock(nn.Module):
    """Residual stage of the encoder: halves the grid, changes the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = SubmanifoldConv3d(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = SubmanifoldConv3d(out_channels, out_channels)
        self.skip = nn.Linear(in_channels, out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the voxels of half the grid."""
        hidden = self.conv1(mean_pool(_silu(self.norm1(x))))
        hidden = self.conv2(_silu(self.norm2(hidden)))
        return hidden.replace(hidden.feats + self.skip(mean_pool(x).feats))


class UpBlock(nn.Module):
    """Stage of the decoder: doubles the grid, keeps every child, changes the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SubmanifoldConv3d(in_channels, out_channels)
        self.conv2 = SubmanifoldConv3d(out_channels, out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on all 8 children of each voxel."""
        return _silu(self.conv2(subdivide(_silu(self.conv1(x)))))


class WindowTransformer(nn.Module):
    """Absolute positions, then window blocks, the odd ones shifted by half a window."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.position = AbsolutePositionEmbedding(config.channels)
        self.blocks = nn.ModuleList(
            WindowBlock(
                config.channels,
                config.heads,
                config.head_dim,
                config.window,
                config.window // 2 * (index % 2),
                config.mlp_ratio,
            )
            for index in range(config.blocks)
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels."""
        x = x.replace(x.feats + self.position(x.coords[:, 1:]).to(x.feats.dtype))
        for block in self.blocks:
            x = block(x)
        return x


class SparseSDFVAE(nn.Module):
    """Autoencoder of truncated SDFs: 8^3 voxels of the grid make one latent voxel.

    Parameters are float32. On CUDA run it under bfloat16 autocast: linear layers and attention
    follow that, convolutions are float16 inside, norms and the last layer float32.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels // part for part in (16, 8, 4, 1)]
        self.embed = nn.Linear(1, widths[0])
        self.down = nn.Sequential(*map(DownBlock, widths[:-1], widths[1:]))
        self.encoder = WindowTransformer(config)
        self.encoder_norm = nn.LayerNorm(config.channels)
        self.to_latent = nn.Linear(config.channels, 2 * config.latent_channels)
        # Start almost without noise: from a variance of 1 the decoder first learns to ignore z
        # (the tiny preset's loss after 200 steps is .058 instead of .071).
        nn.init.constant_(self.to_latent.bias[config.latent_channels :], -4.0)

        self.from_latent = nn.Linear(config.latent_channels, config.channels)
        self.decoder = WindowTransformer(config)
        widths = [config.channels // part for part in (1, 4, 8, 16)]
        self.up = nn.Sequential(*map(UpBlock, widths[:-1], widths[1:]))
        self.to_value = nn.Linear(widths[-1], 1)

    def encode(self, x: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
        """Return the mean and log variance of the latents, [L, latent_channels] float32.

        x: the band's voxels with features [N, 1], sdf / tau.
        """
        if x.feats.shape[1] != 1:
            raise ValueError(f"features are {tuple(x.feats.shape)}; expected [N, 1], sdf / tau")
        hidden = self.encoder(self.down(x.replace(self.embed(x.feats))))
        latent = self.to_latent(self.encoder_norm(hidden.feats))
        mean, logvar = latent.to(self.to_latent.weight.dtype).chunk(2, dim=1)
        return hidden.replace(mean), hidden.replace(logvar.clamp(-30, 20))

    def decode(self, z: SparseTensor) -> Tensor:
        """Return sdf / tau by latent voxel, [L, 8, 8, 8], rows as z.coords."""
        return self.upsample(self.transform(z))

    def transform(self, z: SparseTensor) -> SparseTensor:
        """Return the decoder's features at the latent voxels, [L, channels]: decode, first part."""
        return self.decoder(z.replace(self.from_latent(z.feats)))

    def upsample(self, hidden: SparseTensor) -> Tensor:
        """Return [L, 8, 8, 8] for the features of transform: decode, second part."""
        fine = self.up(hidden)
        values = fine.replace(fine.feats.to(self.to_value.weight.dtype))
        with torch.autocast(fine.feats.device.type, enabled=False):
            return self.to_value(block_values(values)).tanh().view(-1, BLOCK, BLOCK, BLOCK)

    def decode_chunked(self, z: SparseTensor, grid: int) -> Tensor:
        """Return what decode returns, upsampling one cube of a quarter of the grid at a time.

        The transformer sees the whole shape, and a cube is upsampled with as many latent voxels
        around it as the convolutions reach, so that the result is the same. grid: side of the
        latent grid.
        """
        hidden = self.transform(z)
        values = hidden.feats.new_empty(
            len(z.coords), BLOCK, BLOCK, BLOCK, dtype=self.to_value.weight.dtype
        )
        side = max(1, grid // 4)
        cells = torch.cat([z.coords[:, :1], z.coords[:, 1:] // side], dim=1).unique(dim=0)
        for cell in cells:
            inside, around = chunk_rows(z.coords, cell, side)
            part = SparseTensor(z.coords[around], hidden.feats[around])
            values[inside] = self.upsample(part)[inside[around]].to(values.dtype)
        return values


def chunk_rows(coords: Tensor, cell: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return which rows of coords [L, 4] are in a chunk, and which in it or near it, [L] bool.

    cell: [4], sample and chunk (batch, x, y, z); a chunk is a cube of side^3 latent voxels.
    """
    low = cell[1:] * side
    same = coords[:, 0] == cell[0]
    distance = torch.maximum(low - coords[:, 1:], coords[:, 1:] - (low + side - 1)).amax(1)
    return same & (distance <= 0), same & (distance <= CHUNK_PADDING)


def band_tensor(blocks: Tensor, values: Tensor) -> SparseTensor:
    """Return the encoder's input, the voxels with |value| < 1 and their values as features.

    blocks: [L, 4] int32 (batch, x, y, z), sorted; values: [L, 8, 8, 8], sdf / tau.
    """
    block, x, y, z = (values.abs() < 1).nonzero(as_tuple=True)
    corner = blocks[block].long()
    corner[:, 1:] = BLOCK * corner[:, 1:] + torch.stack([x, y, z], dim=1)
    order = voxel_keys(corner).argsort()
    feats = values[block, x, y, z][order, None]
    return SparseTensor(corner[order].int(), feats)


def sample_latent(
    mean: SparseTensor, logvar: SparseTensor, generator: torch.Generator | None = None
) -> SparseTensor:
    """Return a sample of the posterior: mean + exp(logvar / 2) * noise."""
    noise = torch.randn(
        mean.feats.shape, generator=generator, device=mean.feats.device, dtype=mean.feats.dtype
    )
    return mean.replace(mean.feats + (logvar.feats / 2).exp() * noise)


def vae_loss(
    values: Tensor,
    target: Tensor,
    sharp: Tensor,
    mean: Tensor,
    logvar: Tensor,
    config: VAEConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the VAE's loss and its parts "in", "ext", "sharp" and "kl" (equations 2 and 3).

    values, target: [L, 8, 8, 8], sdf / tau. V_in is |target| < 1, V_ext the rest, V_sharp is
    given: sharp [L, 8, 8, 8] bool. Each part is a mean over its voxels of the whole batch, zero
    where there is none; "kl" is a mean over latent voxels and channels.
    mean, logvar: [L, latent_channels].
    """
    error = (values - target).square()
    band = target.abs() < 1

    def mean_over(voxels: Tensor) -> Tensor:
        return (error * voxels).sum() / voxels.sum().clamp(min=1)

    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    parts = {
        "in": mean_over(band),
        "ext": mean_over(~band),
        "sharp": mean_over(sharp),
        "kl": kl.sum() / max(1, kl.numel()),
    }
    loss = (
        config.lambda_in * parts["in"]
        + config.lambda_ext * parts["ext"]
        + config.lambda_sharp * parts["sharp"]
        + config.lambda_kl * parts["kl"]
    )
    return loss, {name: part.detach() for name, part in parts.items()}
