"""Images to meshes: the structure stage, the SS-DiT stages coarse to fine, the VAE's decoder.

models = load_models(folders, preset, device)
shapes = generate(models, rgba, seed=0)
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from model.condition import Condition, DINOv2
from model.config import StructureConfig
from model.flow import Latent, sample_euler
from model.marching_cubes import marching_cubes
from model.sdf import BLOCK
from model.sparse import SparseTensor
from tasks.distance import block_distances, block_pairs, group_pairs
from tasks.framing import frame_object
from tasks.image_encoder import load_image_encoder
from tasks.presets import Preset, SamplingConfig
from tasks.stages import FlowModule, StructureVAEModule, VAEModule, build_module, load_module
from tasks.training import autocast

logger = logging.getLogger(__name__)

UPSAMPLING_REACH = 2.0  # voxels: the band |d| < 4 / 1024 of the paper, at its 1024
CHUNKED_GRID = 64  # latent grid side from which on decoding runs in chunks


class ImageRejectedError(ValueError):
    """A picture that can't be a condition; says why and what to do."""


@dataclass(frozen=True)
class Models:
    """Everything that turns a picture into a mesh.

    dits: by resolution, coarse to fine. encoder: the frozen image encoder, or None where each
    transformer has its own.
    """

    vae: VAEModule
    structure_vae: StructureVAEModule
    structure: FlowModule
    dits: Mapping[int, FlowModule]
    sampling: Mapping[str, SamplingConfig]
    encoder: DINOv2 | None
    device: torch.device


@dataclass(frozen=True)
class Shape:
    """A generated mesh in [-1, 1]^3; without faces where the structure stage gave nothing.

    latent_voxels: active ones at each resolution. seconds: by stage.
    """

    vertices: np.ndarray
    faces: np.ndarray
    resolution: int
    latent_voxels: dict[int, int]
    seconds: dict[str, float] = field(default_factory=dict)


def stages_of(preset: Preset) -> list[str]:
    """Return the stages that generation needs: VAE, structure stage, transformers by resolution."""
    vaes = [name for name in preset.training if name.startswith("vae")]
    return [vaes[-1], "structure-vae", "structure", *preset.dit_stages()]


def load_models(folders: Mapping[str, Path], preset: Preset, device: torch.device) -> Models:
    """Load the checkpoint folders of `stages_of(preset)`, by stage name."""
    return _assemble({name: load_module(path) for name, path in folders.items()}, preset, device)


def untrained_models(preset: Preset, device: torch.device) -> Models:
    """Return the models before any training: what scores are to be compared with."""
    modules = {name: build_module(name, preset).eval() for name in stages_of(preset)}
    return _assemble(modules, preset, device)


def _assemble(
    modules: Mapping[str, torch.nn.Module], preset: Preset, device: torch.device
) -> Models:
    vae, structure_vae, structure, *dits = (modules[name] for name in stages_of(preset))
    assert isinstance(vae, VAEModule)
    assert isinstance(structure_vae, StructureVAEModule)
    assert isinstance(structure, FlowModule)
    by_resolution = {}
    for name, dit in zip(preset.dit_stages(), dits, strict=True):
        assert isinstance(dit, FlowModule)
        by_resolution[int(name.removeprefix("dit-"))] = dit.to(device)
    encoder = None
    if structure.encoder is None:
        encoder = load_image_encoder(preset.encoder).to(device)
    return Models(
        vae.to(device),
        structure_vae.to(device),
        structure.to(device),
        by_resolution,
        {name: preset.sampling.get(name, SamplingConfig()) for name in preset.training},
        encoder,
        device,
    )


@torch.no_grad()
def generate(
    models: Models,
    rgba: Tensor,
    seed: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Shape]:
    """Generate one mesh a picture.

    rgba: [B, 4, S, S] float32 in [0, 1], straight alpha, the object framed as in `frame_object`.
    seed: of the noise; the same pictures, models, seed and device give the same meshes.
    progress: told the stage that begins.
    """
    rgba = rgba.to(models.device)
    generator = Generator(models.device).manual_seed(seed)
    with autocast(models.device):
        tokens = models.encoder(rgba) if models.encoder is not None else None
        progress("structure")
        started = time.monotonic()
        coords = _sample_structure(models, models.structure.condition(rgba, tokens), generator)
        seconds = {"structure": time.monotonic() - started}
        shapes = []
        for i in range(len(rgba)):
            own = coords[coords[:, 0] == i, 1:]
            own_tokens = None if tokens is None else (tokens[0][i : i + 1], tokens[1][i : i + 1])
            shapes.append(
                _refine(models, own, rgba[i : i + 1], own_tokens, generator, seconds, progress)
            )
    return shapes


def _sample_structure(models: Models, condition: Condition, generator: Generator) -> Tensor:
    """Return the active latent voxels [L, 4] int32 (sample, x, y, z), sorted."""
    config = models.structure.config
    assert isinstance(config, StructureConfig)
    side = config.latent_grid
    noise = torch.randn(
        (len(condition.tokens), config.latent_channels, side, side, side),
        generator=generator,
        device=models.device,
    )
    latent = _sample(models, "structure", models.structure, noise, condition)
    logits = models.structure_vae.vae.decode(models.structure.denormalise(latent))
    return (logits[:, 0] > 0).nonzero().int()


def _refine(
    models: Models,
    cells: Tensor,
    rgba: Tensor,
    tokens: tuple[Tensor, Tensor] | None,
    generator: Generator,
    seconds: dict[str, float],
    progress: Callable[[str], None],
) -> Shape:
    """Sample latents on active voxels cells [L, 3] and decode; go on at the next resolution."""
    counts: dict[int, int] = {}
    vertices, faces = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    seconds = dict(seconds)
    resolution = 0
    for resolution, dit in models.dits.items():
        name = f"dit-{resolution}"
        if counts:
            cells = surface_cells(vertices, faces, resolution).to(models.device)
        counts[resolution] = len(cells)
        if not len(cells):
            logger.warning("%s: no active latent voxel, so this picture gives no mesh", name)
            break
        progress(name)
        started = time.monotonic()
        coords = functional.pad(cells, (1, 0)).int()
        noise = torch.randn(
            (len(cells), models.vae.config.latent_channels),
            generator=generator,
            device=models.device,
        )
        condition = dit.condition(rgba, tokens)
        latent = _sample(models, name, dit, SparseTensor(coords, noise), condition)
        latent = latent.replace(dit.denormalise(latent.feats))
        vae, grid = models.vae.vae, resolution // BLOCK
        values = vae.decode_chunked(latent, grid) if grid >= CHUNKED_GRID else vae.decode(latent)
        mesh = marching_cubes(cells, values.float(), resolution)
        vertices, faces = (part.cpu().numpy() for part in mesh)
        seconds[name] = time.monotonic() - started
    return Shape(vertices, faces, resolution, counts, seconds)


def _sample(
    models: Models, name: str, module: FlowModule, noise: Latent, condition: Condition
) -> Latent:
    config = models.sampling[name]
    return sample_euler(
        module.dit,
        noise,
        condition,
        condition.null(),
        config.steps,
        config.guidance,
        config.shift,
    )


def surface_cells(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Tensor:
    """Return the latent voxels [L, 3] int32, sorted, of the unsigned band around a mesh.

    A latent voxel is there when one of its 8^3 voxels is within two voxels of the surface: how the
    paper hands a 512 mesh to the 1024 stage.
    """
    if not len(faces):
        return torch.zeros((0, 3), dtype=torch.int32)
    corners = ((np.asarray(vertices, np.float64) + 1) * (resolution / 2) - 0.5)[faces]
    side = resolution // BLOCK
    rows, starts, triangles = group_pairs(*block_pairs(corners, side, UPSAMPLING_REACH), side)
    blocks = np.argwhere(rows >= 0)
    distance, _ = block_distances(corners, blocks, starts, triangles, UPSAMPLING_REACH)
    near = (distance < UPSAMPLING_REACH).any((1, 2, 3))
    return torch.from_numpy(blocks[near].astype(np.int32))


def read_picture(path: Path, size: int, remover: str | None = None) -> Tensor:
    """Read a picture as a condition: [4, size, size] float32, the object framed.

    The object is where alpha is; only a picture without transparent pixels goes to `remover`,
    "rembg". Raises ImageRejectedError for what can't be read or shows no object.
    """
    try:
        with Image.open(path) as image:
            image.load()
            rgba = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageRejectedError(f"{path} can't be read as a picture: {error}") from error
    pixels = np.asarray(rgba)
    if remover is not None and pixels[..., 3].min() == 255:
        pixels = np.asarray(remove_background(rgba, remover))
    if pixels[..., 3].min() == 255:
        raise ImageRejectedError(
            f"{path} has no transparent pixel, so where its object is isn't known: give a picture "
            "with an alpha channel, or name a background remover (rembg, from the extra `matting`)"
        )
    try:
        framed = frame_object(pixels, size)
    except ValueError as error:
        raise ImageRejectedError(f"{path}: {error}") from error
    return torch.tensor(framed).permute(2, 0, 1).float() / 255


def remove_background(image: Image.Image, remover: str) -> Image.Image:
    """Return the picture with alpha by a named remover. Raises ImageRejectedError without it."""
    if remover != "rembg":
        raise ImageRejectedError(f'there is no background remover "{remover}": take rembg')
    try:
        from rembg import remove  # optional, and slow to import
    except ImportError as error:
        raise ImageRejectedError(
            "the background remover rembg is not installed: pip install 'gigashape[matting]'"
        ) from error
    return remove(image.convert("RGB")).convert("RGBA")
