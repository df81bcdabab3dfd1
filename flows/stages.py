"""What the training flows share: train a stage on Ray unless that was done, and register it."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray

from flows.progress import Progress
from flows.run import Tracked
from tasks import models
from tasks.ray_training import TrainingJob, train_on_ray
from tasks.reporting import MLflowReport, watched
from tasks.tracking import ModelVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Means:
    """How a flow trains its stages.

    workers: processes that train together. fresh: start anew even where this was done or begun.
    training_dir: folder for checkpoints; None takes `training` in the data folder.
    """

    workers: int
    fresh: bool
    training_dir: str | None


def on_gpus(workers: int) -> bool:
    """Tell whether workers train on GPUs, one each, which is where the cluster has any.

    Raises ValueError when it has some, but too few: a CPU would be silently slow.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < workers:
        raise ValueError(
            f"workers is {workers}, but Ray has {gpus} GPU(s), and each worker takes one: "
            f"take at most {gpus}"
        )
    return gpus > 0


def train_stage(
    job: TrainingJob, tracked: Tracked, means: Means, tags: dict[str, str]
) -> ModelVersion:
    """Train one stage and register it; return the registered version if nothing changed."""
    run = tracked.run
    if means.training_dir:
        job = replace(job, training_dir=Path(means.training_dir).resolve())
    found = None
    if not means.fresh:
        found = models.registered(job.preset, job.stage, job.run_name, run.uri)
    if found is not None and found.tags["finished"] == "True":
        logger.info(
            "%s: data and configuration are those of %s, so it is not trained again",
            job.stage,
            models.reference(found),
        )
        return found
    config = job.preset.training[job.stage]
    use_gpu = on_gpus(means.workers)
    with Progress(job.stage, "step") as bar, watched(bar.update) as writer:
        report = partial(MLflowReport, run.run_id, run.uri, job.stage, config.steps, writer)
        result = train_on_ray(job, report, means.workers, use_gpu, fresh=means.fresh)
    if not result.finished:
        logger.warning(
            "%s: stopped by max_minutes at step %d of %d", job.stage, result.step, config.steps
        )
    version = models.register(
        job.preset,
        job.stage,
        result.checkpoint,
        run,
        {
            "training_run": job.run_name,
            "step": result.step,
            "finished": result.finished,
            **tags,
        },
    )
    logger.info("%s: registered as %s %s", job.stage, models.reference(version), version.aliases)
    return version
