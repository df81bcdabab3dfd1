"""`train-dit`: the structure stage and the SS-DiT stages, coarse to fine."""

import logging
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import Tracked, close_runs, data_root, tracked
from flows.stages import Means, train_stage
from tasks import models, tracking
from tasks.catalogue import DatasetVersion, open_version
from tasks.dataset import log_dataset, samples_of
from tasks.encoding import encode, latent_set_digest, structure_resolution
from tasks.generation import stages_of
from tasks.latents import open_latents
from tasks.presets import Preset, load_preset
from tasks.ray_training import TrainingJob

logger = logging.getLogger(__name__)


@flow(name="train-dit", on_cancellation=[close_runs], on_crashed=[close_runs])
def train_dit(
    stages: list[str] | None = None,
    preset: str = "tiny",
    data: str = "data",
    version: Annotated[int, Field(ge=0)] | None = None,
    vae: str | None = None,
    workers: Annotated[int, Field(ge=1)] = 1,
    fresh: bool = False,
    training_dir: str | None = None,
) -> list[str]:
    """Train diffusion transformers, and register them.

    `structure` trains the dense VAE of the active latent voxels and the dense transformer over its
    latents. `dit-R` trains the SS-DiT at resolution R on the latents that encode-latents made,
    starting from the resolution below. Interrupted trainings continue; finished ones are kept.

    Args:
        stages: structure and dit-R, in the order to train; None takes all of the preset.
        preset: tiny, small, paper, or the path of a .toml file.
        data: data folder, or an address such as s3://bucket/folder.
        version: dataset version to train on, a number; None takes the newest.
        vae: registered VAE whose latents to learn, such as gigashape-vae@champion; None takes the
            champion.
        workers: processes that train together, a GPU each where there are GPUs.
        fresh: train from the start, even where this was done or begun before.
        training_dir: folder for checkpoints, on storage that all workers see; None takes `training`
            in the data folder, which must then be a folder and no address.
    """
    data = data_root(data)
    sizes = load_preset(preset)
    known = ["structure", *sizes.dit_stages()]
    wanted = stages or known
    if unknown := [stage for stage in wanted if stage not in known]:
        raise ValueError(f'stages {unknown} are not in preset "{sizes.name}": take of {known}')
    dataset = open_version(data, version)
    means = Means(workers, fresh, training_dir)
    params = {"preset": sizes, "dataset": dataset.name, "stages": wanted}
    name = f"{'+'.join(wanted)}-{dataset.name}"
    with tracked("train-dit", name, data, params, resume=True) as tracking_run:
        log_dataset(tracking_run.run, dataset, "training")
        tracking_run.run.set_tags({"image_encoder": sizes.encoder.kind})
        if sizes.encoder.kind == "small-vit":
            logger.warning(
                'preset "%s" has no DINOv2: a small ViT is trained jointly with each transformer, '
                "and knows these assets' pictures alone",
                sizes.name,
            )
        done = {}
        for stage in wanted:
            if stage == "structure":
                done[stage] = _train_structure(sizes, dataset, tracking_run, means)
            else:
                done[stage] = _train_sparse(stage, sizes, dataset, tracking_run, means, vae, done)
        return list(done.values())


def _train_structure(
    preset: Preset, dataset: DatasetVersion, tracked: Tracked, means: Means
) -> str:
    """Train the occupancy VAE and the transformer over its latents; return NAME/VERSION."""
    samples = tuple(samples_of(dataset))
    tags = {"dataset": dataset.name, "dataset_digest": dataset.digest}
    provenance = {"dataset": dataset.digest}
    job = TrainingJob(
        "structure-vae", preset, dataset.root, samples, dataset.digest, provenance=provenance
    )
    autoencoder = models.reference(train_stage(job, tracked, means, tags))
    with Progress("encode-structure", "asset") as bar:
        resolution = structure_resolution(preset)
        latents = encode(dataset, autoencoder, resolution, tracked.run.uri, bar.update)
    job = TrainingJob(
        "structure",
        preset,
        dataset.root,
        latents.samples,
        latents.digest,
        latents,
        provenance=provenance,
        autoencoder=tracking.download_model(autoencoder, tracked.run.uri),
    )
    tags |= {"autoencoder": autoencoder}
    return models.reference(train_stage(job, tracked, means, tags))


def _train_sparse(
    stage: str,
    preset: Preset,
    dataset: DatasetVersion,
    tracked: Tracked,
    means: Means,
    vae: str | None,
    done: dict[str, str],
) -> str:
    """Train one SS-DiT stage; `done` names those trained before it. Return NAME/VERSION."""
    uri = tracked.run.uri
    wanted = vae or f"{models.model_name(stages_of(preset)[0])}@{models.CHAMPION}"
    autoencoder = models.reference(tracking.resolve_model(wanted, uri))
    resolution = int(stage.removeprefix("dit-"))
    latents = open_latents(dataset.root, latent_set_digest(dataset, autoencoder, resolution))
    start = None
    if below := preset.training[stage].start_from:
        newest = done.get(below) or f"{models.model_name(below)}@{models.CHALLENGER}"
        start = tracking.download_model(newest, uri)
    job = TrainingJob(
        stage,
        preset,
        dataset.root,
        latents.samples,
        latents.digest,
        latents,
        start,
        {"dataset": dataset.digest, "autoencoder": autoencoder},
        tracking.download_model(autoencoder, uri),
    )
    tags = {
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "autoencoder": autoencoder,
    }
    return models.reference(train_stage(job, tracked, means, tags))
