"""`train-dit`: the structure stage and the SS-DiT stages, coarse to fine."""

import logging
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import Tracked, close_runs, data_root, preset_of, tracked
from flows.stages import Means, train_stage
from tasks import models, tracking
from tasks.catalogue import DatasetVersion, open_version
from tasks.dataset import log_dataset, samples_of
from tasks.encoding import encode, open_encoded, structure_resolution
from tasks.latents import LatentSet
from tasks.model_files import ModelFiles
from tasks.presets import Preset, config_digest, load_preset
from tasks.ray_training import TrainingJob, stage_digest
from tasks.tracking import ModelVersion

logger = logging.getLogger(__name__)


@flow(name="train-dit", on_cancellation=[close_runs], on_crashed=[close_runs])
def train_dit(
    stages: list[str] | None = None,
    preset: str | None = None,
    data: str | None = None,
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
        preset: tiny, small, paper, or the path of a .toml file; None takes that of the data
            folder's last refresh.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        version: dataset version to train on, a number; None takes the newest.
        vae: registered VAE whose latents to learn, such as gigashape-tiny-vae@champion; None takes
            the preset's champion.
        workers: processes that train together, a GPU each where there are GPUs.
        fresh: train from the start, even where this was done or begun before.
        training_dir: folder for checkpoints, on storage that all workers see; None takes `training`
            in the data folder, which must then be a folder and no address.
    """
    data = data_root(data)
    sizes = load_preset(preset_of(data, preset))
    known = ["structure", *sizes.dit_stages()]
    wanted = stages or known
    if unknown := [stage for stage in wanted if stage not in known]:
        raise ValueError(f'stages {unknown} are not in preset "{sizes.name}": take of {known}')
    dataset = open_version(data, version)
    means = Means(workers, fresh, training_dir)
    # What stages need is looked for before any of them trains for hours.
    autoencoder, latents = _open_latents(sizes, dataset, wanted, vae)
    done = _begun(sizes, wanted, tracking.tracking_uri(data))
    params = {"preset": sizes, "dataset": dataset.name, "stages": wanted}
    name = _run_name(sizes, dataset, wanted, autoencoder)
    with tracked("train-dit", name, data, params, resume=not fresh) as tracking_run:
        log_dataset(tracking_run.run, dataset, "training")
        tracking_run.run.set_tags({"image_encoder": sizes.encoder.kind})
        if sizes.encoder.kind == "small-vit":
            logger.warning(
                'preset "%s" has no DINOv2: a small ViT is trained jointly with each transformer, '
                "and knows these assets' pictures alone",
                sizes.name,
            )
        for stage in wanted:
            if stage == "structure":
                done[stage] = _train_structure(sizes, dataset, tracking_run, means)
            else:
                assert autoencoder is not None
                below = sizes.training[stage].start_from
                start = models.model_files(done[below], tracking_run.run.uri) if below else None
                job = _flow_job(stage, sizes, dataset, latents[stage], autoencoder, start)
                done[stage] = train_stage(job, tracking_run, means, _tags(dataset, autoencoder))
        return [models.reference(done[stage]) for stage in wanted]


def _open_latents(
    preset: Preset, dataset: DatasetVersion, stages: list[str], vae: str | None
) -> tuple[ModelFiles | None, dict[str, LatentSet]]:
    """Return the VAE behind the SS-DiT stages, and their latents by stage.

    Raises LookupError without the VAE, LatentsError without latents.
    """
    sparse = [stage for stage in stages if stage != "structure"]
    if not sparse:
        return None, {}
    uri = tracking.tracking_uri(dataset.root)
    autoencoder = models.model_files(models.resolve_vae(preset, uri, vae), uri)
    resolutions = {stage: int(stage.removeprefix("dit-")) for stage in sparse}
    return autoencoder, {s: open_encoded(dataset, autoencoder, r) for s, r in resolutions.items()}


def _run_name(
    preset: Preset, dataset: DatasetVersion, stages: list[str], autoencoder: ModelFiles | None
) -> str:
    """Return what names the MLflow run: stages, data and all configuration that counts."""
    trained = ["structure-vae", *stages] if "structure" in stages else stages
    digests = [stage_digest(preset, stage) for stage in trained]
    weights = autoencoder.weights if autoencoder else ""
    return f"{'+'.join(stages)}-{dataset.name}-{config_digest(*digests, weights)}"


def _train_structure(
    preset: Preset, dataset: DatasetVersion, tracked: Tracked, means: Means
) -> ModelVersion:
    """Train the occupancy VAE and the transformer over its latents; return the latter."""
    samples = tuple(samples_of(dataset))
    provenance = {"dataset": dataset.digest}
    job = TrainingJob(
        "structure-vae", preset, dataset.root, samples, dataset.digest, provenance=provenance
    )
    trained = train_stage(job, tracked, means, _tags(dataset))
    autoencoder = models.model_files(trained, tracked.run.uri)
    with Progress("encode-structure", "asset") as bar:
        latents = encode(dataset, autoencoder, structure_resolution(preset), bar.update)
    job = _flow_job("structure", preset, dataset, latents, autoencoder)
    return train_stage(job, tracked, means, _tags(dataset, autoencoder))


def _begun(preset: Preset, stages: list[str], uri: str) -> dict[str, ModelVersion]:
    """Return the challengers that stages start from, of stages not trained before them here.

    Raises LookupError when one is missing.
    """
    begun = {}
    for number, stage in enumerate(stages):
        below = preset.training[stage].start_from
        if below and below not in stages[:number]:
            challenger = f"{models.model_name(preset, below)}@{models.CHALLENGER}"
            begun[below] = tracking.resolve_model(challenger, uri)
    return begun


def _flow_job(
    stage: str,
    preset: Preset,
    dataset: DatasetVersion,
    latents: LatentSet,
    autoencoder: ModelFiles,
    start: ModelFiles | None = None,
) -> TrainingJob:
    return TrainingJob(
        stage,
        preset,
        dataset.root,
        latents.samples,
        latents.digest,
        latents,
        start,
        {"dataset": dataset.digest, "autoencoder": autoencoder.weights},
        autoencoder,
    )


def _tags(dataset: DatasetVersion, autoencoder: ModelFiles | None = None) -> dict[str, str]:
    tags = {"dataset": dataset.name, "dataset_digest": dataset.digest}
    return tags | ({"autoencoder": autoencoder.reference} if autoencoder else {})
