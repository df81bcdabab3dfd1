"""Latents of a dataset version under a registered autoencoder, encoded on a Ray worker."""

from collections.abc import Sequence
from pathlib import Path

import torch

from model.sdf import BLOCK
from tasks import tracking
from tasks.catalogue import DatasetVersion
from tasks.dataset import samples_of
from tasks.latents import LatentSet, encode_latents, latents_digest, open_latents
from tasks.presets import Preset
from tasks.reporting import Progress, call_on_worker
from tasks.samples import SampleRef
from tasks.stages import StructureVAEModule, VAEModule, latent_encoder, load_module


def latent_set_digest(dataset: DatasetVersion, autoencoder: str, resolution: int) -> str:
    """Return what names the latents of a dataset version at a resolution under a model version."""
    return latents_digest(dataset.digest, autoencoder, str(resolution))


def encode(
    dataset: DatasetVersion, autoencoder: str, resolution: int, uri: str, update: Progress
) -> LatentSet:
    """Encode a dataset version at one resolution, or open what is there already.

    autoencoder: NAME/VERSION of a registered VAE, sparse or dense. update: told of the progress.
    """
    samples = [s for s in samples_of(dataset) if s.resolution == resolution]
    if not samples:
        raise ValueError(
            f"dataset version {dataset.name} has nothing at resolution {resolution}: refresh it "
            "with that resolution"
        )
    digest = latent_set_digest(dataset, autoencoder, resolution)
    folder = tracking.download_model(autoencoder, uri)
    call_on_worker(_encode, folder, samples, dataset.root, digest, update=update)
    return open_latents(dataset.root, digest)


def _encode(
    folder: Path,
    samples: Sequence[SampleRef],
    root: str,
    digest: str,
    device: torch.device,
    progress: Progress,
) -> None:
    module = load_module(folder)
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
