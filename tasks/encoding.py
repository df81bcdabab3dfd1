"""Latents of a dataset version under a registered autoencoder, encoded on a Ray worker."""

from collections.abc import Sequence

import torch

from model.sdf import BLOCK
from tasks.catalogue import DatasetVersion
from tasks.dataset import samples_of
from tasks.latents import (
    LatentsError,
    LatentSet,
    encode_latents,
    latents_digest,
    open_latents,
    place_views,
)
from tasks.model_files import ModelFiles
from tasks.presets import Preset
from tasks.reporting import Progress, call_on_worker
from tasks.samples import SampleRef
from tasks.stages import StructureVAEModule, VAEModule, latent_encoder, load_module


def latent_set_digest(dataset: DatasetVersion, autoencoder: ModelFiles, resolution: int) -> str:
    """Return what names the latents of a dataset version at a resolution under some weights."""
    return latents_digest(dataset.digest, autoencoder.weights, str(resolution))


def encode(
    dataset: DatasetVersion, autoencoder: ModelFiles, resolution: int, update: Progress
) -> LatentSet:
    """Encode a dataset version at one resolution, or open what is there already.

    autoencoder: a registered VAE, sparse or dense. update: told of the progress.
    """
    try:
        return open_encoded(dataset, autoencoder, resolution)
    except LatentsError:  # not there, or not whole
        pass
    samples = _samples(dataset, resolution)
    digest = latent_set_digest(dataset, autoencoder, resolution)
    call_on_worker(_encode, autoencoder, samples, dataset.root, digest, update=update)
    return open_latents(dataset.root, digest)


def open_encoded(dataset: DatasetVersion, autoencoder: ModelFiles, resolution: int) -> LatentSet:
    """Open what `encode` made, its pictures where this dataset version has them.

    Raises LatentsError when they were not encoded.
    """
    found = open_latents(dataset.root, latent_set_digest(dataset, autoencoder, resolution))
    return place_views(found, _samples(dataset, resolution), dataset.root)


def _samples(dataset: DatasetVersion, resolution: int) -> list[SampleRef]:
    samples = [s for s in samples_of(dataset) if s.resolution == resolution]
    if not samples:
        raise ValueError(
            f"dataset version {dataset.name} has nothing at resolution {resolution}: refresh it "
            "with that resolution"
        )
    return samples


def _encode(
    autoencoder: ModelFiles,
    samples: Sequence[SampleRef],
    root: str,
    digest: str,
    device: torch.device,
    progress: Progress,
) -> None:
    module = load_module(autoencoder.folder())
    assert isinstance(module, VAEModule | StructureVAEModule)
    encode_latents(
        latent_encoder(module, root, device),
        samples,
        root,
        digest,
        lambda done, total: progress(done, total, ""),
    )


def structure_resolution(preset: Preset) -> int:
    """Return the resolution whose latent voxels are the structure stage's occupancy."""
    return BLOCK * preset.structure.grid
