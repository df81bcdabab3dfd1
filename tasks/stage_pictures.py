"""Pictures of a training: what the averaged model makes of a sample, beside what it should make.

Slices of signed distances and renders of surfaces for the sparse stages, views through the active
voxels for the dense ones, the condition in front where there is one; always of the first sample of
the newest batch.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator, Tensor, nn

from model.flow import noise_like, sample_euler
from model.marching_cubes import marching_cubes
from model.sdf import BLOCK
from model.sparse import SparseTensor
from model.vae import band_tensor
from tasks.loader import Batch
from tasks.metrics import Surface
from tasks.pictures import slice_picture
from tasks.rendering import render_geometry
from tasks.stages import (
    FlowModule,
    Pictured,
    StageModule,
    StructureVAEModule,
    VAEModule,
    dense_occupancy,
    load_module,
)
from tasks.training import Shown, Stage

SIZE = 256  # pixels of a side of each part
EULER_STEPS, SHIFT = 12, 3.0


def with_pictures(stage: Stage, autoencoder: Path | None = None) -> Stage:
    """Return the stage with what draws its pictures.

    autoencoder: checkpoint folder of the VAE whose latents a diffusion transformer learns, which
    decodes what is drawn; without it a diffusion transformer has no pictures.
    """
    if isinstance(stage.module, VAEModule):
        return replace(stage, show=_reconstruction)
    if isinstance(stage.module, StructureVAEModule):
        return replace(stage, show=_occupancy)
    if autoencoder is None:
        return stage
    return replace(stage, show=partial(_generation, load_module(autoencoder)))


def _reconstruction(module: nn.Module, batch: Batch, generator: Generator) -> Shown:
    """Show target | reconstruction of the posterior's mean. generator: not needed."""
    del generator
    assert isinstance(module, VAEModule)
    assert batch.values is not None
    rows = batch.coords[:, 0] == 0
    coords, values = batch.coords[rows], batch.values[rows]
    latents, _ = module.vae.encode(band_tensor(coords, values))
    decoded = module.vae.decode_chunked(latents, batch.resolutions[0] // BLOCK)
    fields = {"target": values, "reconstruction": decoded}
    return _show_fields(coords, fields, batch.resolutions[0], [])


def _occupancy(module: nn.Module, batch: Batch, generator: Generator) -> Shown:
    """Show target | reconstruction of the posterior's mean. generator: not needed."""
    del generator
    assert isinstance(module, StructureVAEModule)
    target = dense_occupancy(batch.coords[batch.coords[:, 0] == 0], 1, module.config.grid)
    logits = module.vae.decode(module.vae.encode(target)[0])
    parts = [_see_through(v) for v in (target, logits.sigmoid())]
    return Shown({"voxels target - reconstruction": np.concatenate(parts, axis=1)})


def _generation(
    autoencoder: StageModule, module: nn.Module, inputs: Pictured, generator: Generator
) -> Shown:
    """Show condition | decoded latents | decoded latents generated from the condition."""
    assert isinstance(module, FlowModule)
    batch = _first(inputs.batch)
    assert batch.rgba is not None
    tokens = None if inputs.tokens is None else (inputs.tokens[0][:1], inputs.tokens[1][:1])
    condition = module.condition(batch.rgba, tokens)
    x0: Any = module.normalise(batch)
    noise = noise_like(x0, generator)
    made = sample_euler(module.dit, noise, condition, None, EULER_STEPS, 1, SHIFT)
    picture = _on_white(batch.rgba[0])
    if isinstance(x0, SparseTensor):
        assert isinstance(autoencoder, VAEModule)
        vae = autoencoder.to(batch.coords.device).vae
        resolution = batch.resolutions[0]
        fields = {
            name: vae.decode_chunked(
                latents.replace(module.denormalise(latents.feats)), resolution // BLOCK
            )
            for name, latents in (("latents", x0), ("generated", made))
        }
        return _show_fields(batch.coords, fields, resolution, [picture])
    assert isinstance(autoencoder, StructureVAEModule)
    decoder = autoencoder.to(batch.coords.device).vae
    logits = [decoder.decode(module.denormalise(latents)) for latents in (x0, made)]
    parts = [picture, *(_see_through(v.sigmoid()) for v in logits)]
    return Shown({"voxels condition - latents - generated": np.concatenate(parts, axis=1)})


def _show_fields(
    coords: Tensor, fields: dict[str, Tensor], resolution: int, condition: list[np.ndarray]
) -> Shown:
    """Show fields [B, 8, 8, 8] on blocks coords [B, 4], in slices and as surfaces, and the meshes.

    condition: the picture that goes in front, if there is one.
    """
    meshes: dict[str, Surface] = {}
    for name, values in fields.items():
        vertices, faces = marching_cubes(coords[:, 1:], values.float(), resolution)
        meshes[name] = vertices.cpu().numpy(), faces.cpu().numpy()
    slices = [_slice(coords, values, resolution // BLOCK) for values in fields.values()]
    renders = [render_geometry(*mesh, SIZE) for mesh in meshes.values()]
    names = " - ".join(["condition"] * len(condition) + list(fields))
    pictures = {
        f"sdf {names}": np.concatenate(condition + slices, axis=1),
        f"surface {names}": np.concatenate(condition + renders, axis=1),
    }
    return Shown(pictures, meshes)


def _first(batch: Batch) -> Batch:
    """Return the first sample of a batch, without signed distances."""
    rows = batch.coords[:, 0] == 0
    return Batch(
        asset_ids=batch.asset_ids[:1],
        resolutions=batch.resolutions[:1],
        tokens=int(rows.sum()),
        coords=batch.coords[rows],
        latents=None if batch.latents is None else batch.latents[rows],
        rgba=None if batch.rgba is None else batch.rgba[:1],
    )


def _slice(coords: Tensor, values: Tensor, grid: int) -> np.ndarray:
    """Return the slice through the middle of the blocks along z, [SIZE, SIZE, 3] uint8."""
    blocks = coords[:, 1:].cpu().numpy()
    plane = np.full((grid, grid, BLOCK, BLOCK), np.nan, np.float32)
    level = int(np.median(blocks[:, 2]))
    rows = blocks[:, 2] == level
    plane[blocks[rows, 0], blocks[rows, 1]] = values.float().cpu().numpy()[rows, :, :, BLOCK // 2]
    whole = plane.transpose(0, 2, 1, 3).reshape(grid * BLOCK, grid * BLOCK)
    return slice_picture(whole, SIZE)


def _see_through(occupancy: Tensor) -> np.ndarray:
    """Return the share of active voxels along z, x right and y up, [SIZE, SIZE, 3] uint8."""
    share = occupancy[0, 0].float().mean(2).cpu().numpy().T[::-1]
    grey = np.round(255 * (1 - share)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(grey)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture.convert("RGB"))


def _on_white(rgba: Tensor) -> np.ndarray:
    """Return a picture [4, S, S] over white, [SIZE, SIZE, 3] uint8."""
    colour = (rgba[:3] * rgba[3:] + 1 - rgba[3:]).float().cpu().numpy().transpose(1, 2, 0)
    picture = Image.fromarray(np.round(255 * colour).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
