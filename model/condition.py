"""Image conditions of the diffusion transformers: encoders, foreground tokens, eq. (9)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from model.attention import divide_samples
from model.config import EncoderConfig
from model.transformer import AbsolutePositionEmbedding

FOREGROUND = 0.5  # a pixel with this much alpha, or more, belongs to the shape
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Condition:
    """Tokens that a diffusion transformer attends to, padded to the longest sample of the batch.

    tokens: [B, T, C]; mask: [B, T] bool, False at padding. Every sample has a token.
    """

    tokens: Tensor
    mask: Tensor

    def null(self) -> "Condition":
        """Return the condition of classifier-free guidance: the same tokens, all zero."""
        return Condition(torch.zeros_like(self.tokens), self.mask)

    def drop(self, rate: float, generator: Generator | None = None) -> "Condition":
        """Return the condition with each sample made null with probability `rate`.

        generator: on the device of the tokens.
        """
        device = self.tokens.device
        kept = torch.rand(len(self.tokens), device=device, generator=generator) >= rate
        return Condition(self.tokens * kept[:, None, None], self.mask)


class SmallViT(nn.Module):
    """A small vision transformer over RGBA patches, trained jointly (the tiny preset)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.image_size = config.width, config.image_size
        patches = (config.image_size // config.patch) ** 2
        self.embed = nn.Conv2d(4, config.width, config.patch, stride=config.patch)
        self.special = nn.Parameter(0.02 * torch.randn(1 + config.registers, config.width))
        self.position = nn.Parameter(0.02 * torch.randn(patches, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, rgba: Tensor) -> tuple[Tensor, Tensor]:
        """Return patch tokens [B, P, C], row by row, and special tokens [B, 1 + registers, C].

        rgba: [B, 4, S, S] float, straight alpha, in [0, 1], any S.
        """
        _check_rgba(rgba)
        alpha = rgba[:, 3:]
        image = _resize(torch.cat([rgba[:, :3] * alpha, alpha], dim=1), self.image_size)
        patches = self.embed(image).flatten(2).transpose(1, 2) + self.position
        special = self.special.expand(len(rgba), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([special, patches], dim=1)))
        return tokens[:, len(self.special) :], tokens[:, : len(self.special)]


class DINOv2(nn.Module):
    """A frozen DINOv2 with registers: all tokens before the last norm, layer-normed without scale.

    backbone: a `transformers` Dinov2WithRegistersModel, already loaded.
    background: grey level behind the shape, 0 black, 1 white.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, image_size: int = 518, background: float = 0.0) -> None:
        super().__init__()
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self.image_size, self.background = image_size, background
        self.width = int(backbone.config.hidden_size)
        self.special_tokens = 1 + int(backbone.config.num_register_tokens)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "DINOv2":
        """Set the mode of everything but the backbone, which always stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def forward(self, rgba: Tensor) -> tuple[Tensor, Tensor]:
        """Return patch tokens [B, P, C], row by row, and special tokens [B, 1 + registers, C].

        rgba: [B, 4, S, S] float, straight alpha, in [0, 1], any S.
        """
        _check_rgba(rgba)
        alpha = rgba[:, 3:]
        image = _resize(rgba[:, :3] * alpha + self.background * (1 - alpha), self.image_size)
        embedded = self.backbone.embeddings((image - self.mean) / self.std)
        # Past the backbone's own forward, which would apply its last norm.
        tokens = self.backbone.encoder(embedded).last_hidden_state.float()
        tokens = functional.layer_norm(tokens, tokens.shape[-1:])
        return tokens[:, self.special_tokens :], tokens[:, : self.special_tokens]


class SparseConditioning(nn.Module):
    """Eq. (9): c = Linear(f(E(I))) + PE(f(E(I))), f keeping foreground patches and special tokens.

    A patch is kept where the mask, max-pooled to the patch grid, is set. PE is the 3D absolute
    embedding at (column, row, 0) of a patch and at (0, 0, 1) of special tokens.
    """

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_width, width)
        self.position = AbsolutePositionEmbedding(width)

    def forward(self, patches: Tensor, special: Tensor, alpha: Tensor) -> Condition:
        """Return the condition, special tokens first. Synchronises with the host.

        patches: [B, P, C] row by row of a square grid; special: [B, R, C], R > 0;
        alpha: [B, S, S] in [0, 1], of the picture the tokens came from.
        """
        batch, count = patches.shape[:2]
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"patches holds {count} tokens; expected those of a square grid")
        foreground = functional.adaptive_max_pool2d(alpha[:, None].float(), side) >= FOREGROUND
        kept = functional.pad(foreground.flatten(1), (special.shape[1], 0), value=True)
        rows = kept.flatten().nonzero().squeeze(1)
        samples = divide_samples(rows // kept.shape[1], batch)
        tokens = torch.cat([special, patches], dim=1).flatten(0, 1).index_select(0, rows)
        places = _token_positions(special.shape[1], side, tokens.device)[rows % kept.shape[1]]
        embedded = self.project(tokens) + self.position(places)
        mask = samples.mask
        if mask is None:
            mask = kept.new_ones(batch, samples.length)
        return Condition(samples.pad(embedded), mask)


def _token_positions(special: int, side: int, device: torch.device) -> Tensor:
    """Return the positions [special + side^2, 3] of special tokens, then of patches."""
    index = torch.arange(side * side, device=device)
    patches = torch.stack([index % side, index // side, torch.zeros_like(index)], dim=1)
    return torch.cat([patches.new_tensor([[0, 0, 1]]).expand(special, 3), patches])


def _resize(image: Tensor, size: int) -> Tensor:
    """Return image [B, C, S, S] at size x size pixels; premultiplied, so that edges stay clean."""
    if image.shape[-2:] == (size, size):
        return image
    return functional.interpolate(
        image, (size, size), mode="bilinear", align_corners=False, antialias=True
    )


def _check_rgba(rgba: Tensor) -> None:
    if rgba.ndim != 4 or rgba.shape[1] != 4 or not rgba.is_floating_point():
        raise ValueError(
            f"rgba is {list(rgba.shape)} {rgba.dtype}; expected [B, 4, S, S] float in [0, 1]"
        )
