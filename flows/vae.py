"""`train-vae`: train the sparse SDF VAE on a dataset version."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.run import close_runs, data_root, preset_of, tracked
from flows.stages import Means, train_stage
from tasks import models
from tasks.catalogue import open_version
from tasks.dataset import log_dataset, samples_of
from tasks.model_files import ModelFiles
from tasks.presets import config_digest, load_preset
from tasks.ray_training import TrainingJob, stage_digest


@flow(name="train-vae", on_cancellation=[close_runs], on_crashed=[close_runs])
def train_vae(
    preset: str | None = None,
    data: str | None = None,
    version: Annotated[int, Field(ge=0)] | None = None,
    workers: Annotated[int, Field(ge=1)] = 1,
    fresh: bool = False,
    training_dir: str | None = None,
) -> str:
    """Train the sparse SDF VAE, and register it.

    A training that was interrupted continues where it stopped; one whose data and configuration
    did not change is not done again. Returns the model's name and version.

    Args:
        preset: tiny, small, paper, or the path of a .toml file; None takes that of the data
            folder's last refresh.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        version: dataset version to train on, a number; None takes the newest.
        workers: processes that train together, a GPU each where there are GPUs.
        fresh: train from the start, even where this was done or begun before.
        training_dir: folder for checkpoints, on storage that all workers see; None takes `training`
            in the data folder, which must then be a folder and no address.
    """
    data = data_root(data)
    sizes = load_preset(preset_of(data, preset))
    dataset = open_version(data, version)
    samples = tuple(samples_of(dataset))
    stages = [name for name in sizes.training if name.startswith("vae")]
    means = Means(workers, fresh, training_dir)
    params = {"preset": sizes, "dataset": dataset.name}
    name = f"vae-{dataset.name}-{config_digest(*[stage_digest(sizes, s) for s in stages])}"
    with tracked("train-vae", name, data, params, resume=not fresh) as tracking_run:
        run = tracking_run.run
        log_dataset(run, dataset, "training")
        done: ModelFiles | None = None
        for stage in stages:
            job = TrainingJob(
                stage,
                sizes,
                data,
                samples,
                dataset.digest,
                start=done if sizes.training[stage].start_from else None,
                provenance={"dataset": dataset.digest},
            )
            tags = {"dataset": dataset.name, "dataset_digest": dataset.digest}
            done = models.model_files(train_stage(job, tracking_run, means, tags), run.uri)
        assert done is not None
        return done.reference
