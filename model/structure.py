"""First stage: which latent voxels are active. A dense occupancy VAE and a dense DiT."""

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from model.attention import FullAttention, Samples
from model.condition import Condition
from model.config import StructureConfig
from model.dit import DiffusionTransformer


class ResidualBlock(nn.Module):
    """Group norm, SiLU, conv3, twice; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_norm_conv(channels, channels), *_norm_conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, X, Y, Z] for the same shape."""
        return x + self.layers(x)


class StructureVAE(nn.Module):
    """Dense VAE of the occupancy: G^3 voxels to a g^3 grid of latents and back."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        widths = config.vae_channels
        encoder: list[nn.Module] = [nn.Conv3d(1, widths[0], 3, padding=1)]
        for fine, coarse in pairwise(widths):
            encoder += [ResidualBlock(fine), nn.Conv3d(fine, coarse, 2, stride=2)]
        encoder += [ResidualBlock(widths[-1]), *_norm_conv(widths[-1], 2 * config.latent_channels)]
        decoder: list[nn.Module] = [nn.Conv3d(config.latent_channels, widths[-1], 3, padding=1)]
        for coarse, fine in pairwise(reversed(widths)):
            decoder += [ResidualBlock(coarse), nn.ConvTranspose3d(coarse, fine, 2, stride=2)]
        decoder += [ResidualBlock(widths[0]), *_norm_conv(widths[0], 1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, occupancy: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance [B, C, g, g, g] of occupancy [B, 1, G, G, G] in {0, 1}."""
        mean, logvar = self.encoder(2 * occupancy - 1).float().chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Return occupancy logits [B, 1, G, G, G] float32 of latents [B, C, g, g, g]."""
        return self.decoder(z).float()

    def forward(
        self, occupancy: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of a drawn latent, mean and log variance; what `structure_vae_loss` takes.

        generator: on the device of the occupancy.
        """
        mean, logvar = self.encode(occupancy)
        noise = torch.randn(mean.shape, device=mean.device, generator=generator)
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


def structure_vae_loss(
    logits: Tensor, occupancy: Tensor, mean: Tensor, logvar: Tensor, config: StructureConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its parts: binary cross-entropy, dice, KL divergence.

    Cross-entropy alone lets the empty voxels, most of a grid, outvote the occupied ones; dice
    weighs them by their overlap.
    """
    bce = functional.binary_cross_entropy_with_logits(logits, occupancy)
    probability = logits.sigmoid()
    overlap = 2 * (probability * occupancy).flatten(1).sum(1) + 1
    dice = 1 - (overlap / ((probability + occupancy).flatten(1).sum(1) + 1)).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = bce + config.lambda_dice * dice + config.lambda_kl * kl
    return loss, {"bce": bce, "dice": dice, "kl": kl}


class DenseDiT(nn.Module):
    """The velocity of noisy structure latents: full attention among all g^3 of them, patch 1."""

    places: Tensor

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.grid = config.latent_grid
        head_dim = config.width // config.heads
        self.transformer = DiffusionTransformer(
            [FullAttention(config.width, config.heads, head_dim) for _ in range(config.blocks)],
            config.latent_channels,
            config.width,
            config.heads,
            head_dim,
            config.mlp_ratio,
            config.condition_width,
            config.recompute,
        )
        axis = torch.arange(config.latent_grid)
        self.register_buffer("places", torch.cartesian_prod(axis, axis, axis), persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the velocity [B, C, g, g, g] float32 of x, shaped alike, at t [B] in [0, 1]."""
        batch, tokens = len(x), len(self.places)
        membership = torch.eye(batch, device=x.device).repeat_interleave(tokens, 0)
        samples = Samples(batch, tokens, membership, None)
        rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
        positions = self.places.repeat(batch, 1)
        velocity = self.transformer(rows, positions, t, condition, samples, [samples])
        grid = (self.grid, self.grid, self.grid)
        return velocity.unflatten(0, (batch, tokens)).transpose(1, 2).unflatten(2, grid)


def _norm_conv(channels: int, out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return group norm, SiLU, conv3. A group has 8 channels or more, where the width allows."""
    groups = math.gcd(channels, min(32, max(1, channels // 8)))
    return nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv3d(channels, out, 3, padding=1)
