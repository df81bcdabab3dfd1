"""Sizes of the models, as frozen dataclasses; the defaults are the published ones."""

from dataclasses import dataclass
from typing import Literal


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"{type(config).__name__}.{name} is {value}; it must be above zero")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class VAEConfig:
    """The sparse SDF VAE: 8^3 voxels a latent voxel (paper, section 3.1, and equation 3).

    channels: width of the transformer; the convolutions use 1/16, 1/8 and 1/4 of it.
    blocks: shifted-window transformer blocks, in the encoder and again in the decoder.
    window: side of an attention window in latent voxels; odd blocks shift it by half.
    lambda_in, lambda_ext, lambda_sharp, lambda_kl: weights of the losses.
    """

    channels: int = 512
    latent_channels: int = 16
    blocks: int = 4
    heads: int = 8
    head_dim: int = 64
    window: int = 8
    mlp_ratio: int = 4
    lambda_in: float = 1.0
    lambda_ext: float = 0.1
    lambda_sharp: float = 1.0
    lambda_kl: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(self, "channels", "latent_channels", "blocks", "heads", "head_dim")
        _check_positive(self, "window", "mlp_ratio")
        _check(
            self.channels % 16 == 0,
            f"VAEConfig.channels is {self.channels}; the finest stage has 1/16 of it, "
            "so take a multiple of 16",
        )
        _check(
            self.window % 2 == 0,
            f"VAEConfig.window is {self.window}; odd blocks shift it by half, so take an even one",
        )
        for name in ("lambda_in", "lambda_ext", "lambda_sharp", "lambda_kl"):
            value = getattr(self, name)
            _check(value >= 0, f"VAEConfig.{name} is {value}; a loss weight can't be negative")


@dataclass(frozen=True)
class DiTConfig:
    """The SS-DiT over sparse latents (paper, sections 3.2 and 3.3).

    heads, kv_heads, head_dim: query heads, key/value heads they share, channels of each.
    compression, selection, window: block sides of SSA in latent voxels; top_k: selected blocks.
    delta: compression of a block's keys and values, "pointwise" (v1.1) or "convolution" (v1.0).
    attention: "ssa", or "full" to compare with.
    condition_width: channels of the image tokens.
    recompute: activation checkpointing, a block at a time.
    max_grid: latent grid side that positions are scaled to: a larger grid's coordinates are
        divided until they fit, so that 1024 shares the embedding of 512.
    """

    width: int = 1024
    blocks: int = 24
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 32
    mlp_ratio: int = 4
    latent_channels: int = 16
    compression: int = 8
    selection: int = 8
    window: int = 8
    top_k: int = 8
    delta: Literal["pointwise", "convolution"] = "pointwise"
    attention: Literal["ssa", "full"] = "ssa"
    condition_width: int = 1024
    max_grid: int = 64
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "width", "blocks", "heads", "kv_heads", "head_dim", "mlp_ratio")
        _check_positive(self, "latent_channels", "top_k", "condition_width", "max_grid")
        _check(
            self.heads % self.kv_heads == 0,
            f"DiTConfig.heads is {self.heads}; take a multiple of kv_heads, {self.kv_heads}",
        )
        for name in ("compression", "selection", "window"):
            value = getattr(self, name)
            _check(_is_power_of_two(value), f"DiTConfig.{name} is {value}; take a power of two")
        _check(
            self.compression <= self.selection,
            f"DiTConfig.compression is {self.compression}, above selection, {self.selection}; "
            "a selection block is made of whole compression blocks",
        )
        _check(
            self.delta in ("pointwise", "convolution"),
            f'DiTConfig.delta is "{self.delta}"; take "pointwise" or "convolution"',
        )
        _check(
            self.attention in ("ssa", "full"),
            f'DiTConfig.attention is "{self.attention}"; take "ssa" or "full"',
        )


@dataclass(frozen=True)
class StructureConfig:
    """The first stage: a dense occupancy VAE and a dense DiT on its latent grid.

    grid: side of the occupancy, the latent grid of the sparse VAE.
    latent_grid, latent_channels: the grid the DiT works on.
    vae_channels: widths of the VAE from grid down to latent_grid, halved at each step.
    lambda_dice, lambda_kl: weights of the VAE's losses beside the cross-entropy.
    width, blocks, heads, mlp_ratio: the dense DiT; condition_width: channels of the image tokens.
    recompute: activation checkpointing, a block at a time.
    """

    grid: int = 64
    latent_grid: int = 16
    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (32, 128, 512)
    lambda_dice: float = 1.0
    lambda_kl: float = 1e-3
    width: int = 1024
    blocks: int = 24
    heads: int = 16
    mlp_ratio: int = 4
    condition_width: int = 1024
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "grid", "latent_grid", "latent_channels", "width", "blocks", "heads")
        _check_positive(self, "mlp_ratio", "condition_width")
        steps = len(self.vae_channels) - 1
        _check(
            steps >= 0 and self.grid == self.latent_grid << steps,
            f"StructureConfig.vae_channels has {len(self.vae_channels)} widths, so grid must be "
            f"latent_grid * 2^{steps}; grid is {self.grid} and latent_grid {self.latent_grid}",
        )
        _check(
            all(channels > 0 for channels in self.vae_channels),
            f"StructureConfig.vae_channels is {self.vae_channels}; each must be above zero",
        )
        _check(
            self.width % self.heads == 0,
            f"StructureConfig.width is {self.width}; take a multiple of heads, {self.heads}",
        )


@dataclass(frozen=True)
class EncoderConfig:
    """The image encoder.

    kind: "dinov2", pretrained, frozen, or "small-vit", trained jointly (the tiny preset).
    image_size, patch: pixels of the square image and of a patch, both sides.
    width, blocks, heads: of the transformer; registers: special tokens beside the class token.
        For "dinov2" they are checked against the weights.
    name, revision: the pretrained model on the hub, pinned; path: a local folder to take instead.
    """

    kind: Literal["dinov2", "small-vit"] = "dinov2"
    image_size: int = 518
    patch: int = 14
    width: int = 1024
    blocks: int = 24
    heads: int = 16
    registers: int = 4
    name: str = "facebook/dinov2-with-registers-large"
    revision: str = "main"
    path: str = ""

    def __post_init__(self) -> None:
        _check(
            self.kind in ("dinov2", "small-vit"),
            f'EncoderConfig.kind is "{self.kind}"; take "dinov2" or "small-vit"',
        )
        _check_positive(self, "image_size", "patch", "width", "blocks", "heads")
        _check(
            self.image_size % self.patch == 0,
            f"EncoderConfig.image_size is {self.image_size}; take a multiple of patch, "
            f"{self.patch}",
        )
        _check(
            self.width % self.heads == 0,
            f"EncoderConfig.width is {self.width}; take a multiple of heads, {self.heads}",
        )
