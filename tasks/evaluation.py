"""Scores of trained models on a dataset version: reconstruction and generation.

Reconstruction has three errors side by side, so that none hides another: the VAE against the
watertight surface it learned, the VAE against the original mesh, and the conversion alone, without
any network, against the original mesh. Distances are in the [-1, 1] frame.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from model.marching_cubes import marching_cubes
from model.sdf import BLOCK, SparseSDF
from model.vae import band_tensor
from tasks.framing import read_framed
from tasks.generation import (
    CHUNKED_GRID,
    Models,
    generate,
    load_models,
    stages_of,
    untrained_models,
)
from tasks.metrics import (
    Surface,
    f_score_name,
    interior_share,
    sample_surface,
    set_scores,
    surface_scores,
    topology,
    volume_iou,
)
from tasks.model_files import ModelFiles
from tasks.normal_metrics import normal_scores
from tasks.presets import EvaluationConfig, Preset
from tasks.rendering import render_geometry
from tasks.samples import SampleRef
from tasks.shards import read_geometry, read_sdf
from tasks.stages import VAEModule, build_module, load_module
from tasks.storage import open_filesystem
from tasks.training import autocast

logger = logging.getLogger(__name__)

FIXED_THRESHOLDS = (0.001, 0.005)  # the paper's F-scores
SET_POINTS = 2048  # of a shape, for comparing sets
INTERIOR_POINTS = 4096  # give the share of hidden area to a hundredth or two
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scored:
    """One asset's scores, its pictures (label -> [S, S, 3 or 4] uint8) and its meshes."""

    asset_id: str
    resolution: int
    scores: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    meshes: dict[str, Surface] = field(default_factory=dict)


def thresholds(resolution: int) -> tuple[float, ...]:
    """Return the F-scores' distances: the paper's two, and one and two voxels."""
    return (*FIXED_THRESHOLDS, 2 / resolution, 4 / resolution)


def voxel_scores(prefix: str, scores: dict[str, float], resolution: int) -> dict[str, float]:
    """Return scores with a prefix, those at one and two voxels named so."""
    names = {
        f_score_name(2 / resolution): "f_score_1_voxel",
        f_score_name(4 / resolution): "f_score_2_voxels",
    }
    return {f"{prefix}/{names.get(name, name)}": value for name, value in scores.items()}


def score_pair(
    prefix: str,
    predicted: Surface,
    reference: Surface,
    resolution: int,
    config: EvaluationConfig,
    visible_only: bool = False,
) -> dict[str, float]:
    """Score a mesh against a reference; an empty mesh has F-scores of zero and no distances."""
    if not len(predicted[1]):
        zeros = {f_score_name(threshold): 0.0 for threshold in thresholds(resolution)}
        return voxel_scores(prefix, zeros, resolution)
    scores = surface_scores(
        predicted, reference, thresholds(resolution), config.points, visible_only=visible_only
    )
    return voxel_scores(prefix, scores, resolution)


def shape_scores(
    prefix: str, result: Surface, watertight: Surface, config: EvaluationConfig
) -> dict[str, float]:
    """Score a mesh as a whole against its watertight target: volume, normals, topology.

    empty: 1 where there is no mesh, which then has no distances, components and so on: the mean of
    this one says how many assets the other means leave out. volume_iou: 0 for an empty mesh; it is
    left out where either mesh is open, as `watertight` says of the result.
    """
    found = topology(*result)
    empty = found.components == 0
    scores = {
        "empty": float(empty),
        "watertight": float(found.watertight),
        **normal_scores(result, watertight, size=config.normal_size),
    }
    if not empty:
        scores["components"] = float(found.components)
        scores["euler_number"] = float(found.euler_number)
        scores["interior_area_share"] = interior_share(*result, INTERIOR_POINTS)
    if (empty or found.watertight) and topology(*watertight).watertight:
        try:
            iou = 0.0 if empty else volume_iou(result, watertight, config.points)
        except ValueError as error:
            logger.warning("%s: no volume IoU of this asset: %s", prefix, error)
        else:
            scores["volume_iou"] = iou
    return {f"{prefix}/{name}": value for name, value in scores.items()}


def watertight_surface(sdf: SparseSDF) -> Surface:
    """Return the surface of a stored field, the mesh that the VAE is to reproduce."""
    vertices, faces = marching_cubes(
        torch.tensor(sdf.blocks), torch.tensor(sdf.values), sdf.resolution
    )
    return vertices.numpy(), faces.numpy()


@torch.no_grad()
def reconstruct(module: VAEModule, sdf: SparseSDF, device: torch.device) -> Surface:
    """Encode a field, decode the posterior's mean, and return the surface of what comes out."""
    coords = functional.pad(torch.tensor(sdf.blocks), (1, 0)).to(device)
    grid = sdf.resolution // BLOCK
    with autocast(device):
        mean, _ = module.vae.encode(band_tensor(coords, torch.tensor(sdf.values, device=device)))
        chunked = grid >= CHUNKED_GRID
        values = module.vae.decode_chunked(mean, grid) if chunked else module.vae.decode(mean)
    vertices, faces = marching_cubes(coords[:, 1:], values.float(), sdf.resolution)
    return vertices.cpu().numpy(), faces.cpu().numpy()


def evaluate_reconstruction(
    module: VAEModule,
    samples: Sequence[SampleRef],
    root: str,
    config: EvaluationConfig,
    device: torch.device,
    progress: Progress = lambda done, total, detail: None,
) -> list[Scored]:
    """Score the reconstruction of each sample, at most config.assets of them, in their order."""
    filesystem, base = open_filesystem(root)
    module = module.to(device).eval()
    chosen = samples[: config.assets]
    results = []
    for done, sample in enumerate(chosen):
        progress(done, len(chosen), sample.asset_id[:8])
        sdf = read_sdf(filesystem, f"{base}/{sample.path}", sample.row_group)
        original = read_geometry(filesystem, f"{base}/{sample.views_path}", sample.views_row_group)
        watertight, result = watertight_surface(sdf), reconstruct(module, sdf, device)
        r = sample.resolution
        scores = {
            **score_pair("reconstruction", result, watertight, r, config),
            **shape_scores("reconstruction", result, watertight, config),
            **score_pair("reconstruction_original", result, original, r, config, True),
            **score_pair("conversion", watertight, original, r, config, True),
        }
        shown = {"original": original, "watertight": watertight, "reconstruction": result}
        results.append(_scored(sample, scores, shown, config))
    progress(len(chosen), len(chosen), "")
    return results


def evaluate_generation(
    models: Models,
    samples: Sequence[SampleRef],
    root: str,
    config: EvaluationConfig,
    view: int,
    seed: int = 0,
    progress: Progress = lambda done, total, detail: None,
) -> list[Scored]:
    """Score the mesh generated from one view of each sample against its watertight surface.

    samples: of the finest resolution that the models generate. view: index of the view; -1 is the
    one that no training saw.
    """
    filesystem, base = open_filesystem(root)
    chosen = samples[: config.assets]
    results = []
    for done, sample in enumerate(chosen):
        progress(done, len(chosen), sample.asset_id[:8])
        sdf = read_sdf(filesystem, f"{base}/{sample.path}", sample.row_group)
        image = read_framed(filesystem, f"{base}/{sample.views_path}", sample.views_row_group, view)
        rgba = torch.tensor(image).permute(2, 0, 1).float() / 255
        (shape,) = generate(models, rgba[None], seed)
        watertight, result = watertight_surface(sdf), (shape.vertices, shape.faces)
        scores = {
            **score_pair("generation", result, watertight, sample.resolution, config),
            **shape_scores("generation", result, watertight, config),
        }
        scores["generation/latent_voxels"] = float(shape.latent_voxels[min(shape.latent_voxels)])
        shown = {"watertight": watertight, "generated": result}
        scored = _scored(sample, scores, shown, config)
        larger = Image.fromarray(image).resize((config.picture_size, config.picture_size))
        pictures = {"condition": np.asarray(larger), **scored.pictures}
        results.append(replace(scored, pictures=pictures))
    progress(len(chosen), len(chosen), "")
    return results


def _scored(
    sample: SampleRef,
    scores: dict[str, float],
    shown: dict[str, Surface],
    config: EvaluationConfig,
) -> Scored:
    pictures = {
        label: render_geometry(*surface, config.picture_size) for label, surface in shown.items()
    }
    return Scored(sample.asset_id, sample.resolution, scores, pictures, shown)


def summarise(results: Sequence[Scored]) -> dict[str, float]:
    """Return the mean of each score over the assets that have it."""
    names = sorted({name for result in results for name in result.scores})
    return {
        name: float(np.mean([r.scores[name] for r in results if name in r.scores]))
        for name in names
    }


def distribution_scores(results: Sequence[Scored]) -> dict[str, float]:
    """Return coverage, MMD and 1-NN accuracy of the generated meshes against the watertight ones.

    Empty when fewer than two shapes were generated: as a set they can't be compared then.
    """
    generated, reference = (
        [
            sample_surface(*r.meshes[label], SET_POINTS, seed=0)[0]
            for r in results
            if len(r.meshes[label][1])
        ]
        for label in ("generated", "watertight")
    )
    return set_scores(generated, reference) if len(generated) > 1 else {}


def score_reconstruction(
    vae: ModelFiles,
    preset: Preset,
    samples: Sequence[SampleRef],
    root: str,
    trained: bool,
    device: torch.device,
    progress: Progress,
) -> list[Scored]:
    """Score a registered VAE, or the same VAE before any training."""
    module = load_module(vae.folder()) if trained else build_module(stages_of(preset)[0], preset)
    assert isinstance(module, VAEModule)
    return evaluate_reconstruction(module, samples, root, preset.evaluation, device, progress)


def score_generation(
    files: Mapping[str, ModelFiles],
    preset: Preset,
    samples: Sequence[SampleRef],
    root: str,
    view: int,
    seed: int,
    trained: bool,
    device: torch.device,
    progress: Progress,
) -> list[Scored]:
    """Score registered models, by stage, or the same models before any training."""
    if trained:
        folders = {stage: model.folder() for stage, model in files.items()}
        models = load_models(folders, preset, device)
    else:
        models = untrained_models(preset, device)
    return evaluate_generation(models, samples, root, preset.evaluation, view, seed, progress)
