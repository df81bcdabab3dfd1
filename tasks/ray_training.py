"""Runs a stage's training under Ray Train: one worker on a laptop, many on a cluster.

The loop and its checkpoints are `tasks/training.py`'s own: Ray places the workers, connects them,
and starts them again when one dies, whereupon they find the newest checkpoint by themselves. Ray's
own checkpoints are not used: it would resume silently, and from a copy, whatever has its run name.
`train_on_ray` must be called from the main thread, since Ray Train handles signals there.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from tasks.latents import LatentSet
from tasks.model_files import ModelFiles
from tasks.presets import Preset, config_digest
from tasks.samples import SampleRef
from tasks.stage_pictures import with_pictures
from tasks.stages import build_loader, build_stage
from tasks.storage import locked
from tasks.training import (
    NoReport,
    Report,
    TrainingDivergedError,
    TrainingResult,
    train,
    training_identity,
)

logger = logging.getLogger(__name__)

MakeReport = Callable[[], Report]
BUSY_SECONDS = 30.0  # a killed driver's workers end within these


class TrainingBusyError(RuntimeError):
    """Another process writes the same checkpoints."""


@dataclass(frozen=True)
class TrainingJob:
    """One stage on one dataset version; all that a worker needs, and picklable.

    root: the data folder. samples: of the dataset version, or of `latents` for a diffusion
    transformer. start: the model that the stage begins with, where its preset names one.
    dataset_digest: of the dataset version, or of the latent set. autoencoder: the VAE behind
    `latents`, for pictures. training_dir: where runs keep their folders, on storage that all
    workers see; by default `training` in the data folder.
    """

    stage: str
    preset: Preset
    root: str
    samples: tuple[SampleRef, ...]
    dataset_digest: str
    latents: LatentSet | None = None
    start: ModelFiles | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    autoencoder: ModelFiles | None = None
    training_dir: Path | None = None

    @property
    def run_name(self) -> str:
        """Stage, data and configuration: another one of these is another run."""
        start = self.start.weights if self.start else ""
        digest = config_digest(stage_digest(self.preset, self.stage), start)
        return f"{self.stage}-{self.dataset_digest[:12]}-{digest}"

    @property
    def checkpoint_dir(self) -> Path:
        """The run's folder. Raises ValueError when it would be on an object store."""
        if self.training_dir is not None:
            return self.training_dir / self.run_name
        if "://" in self.root:
            raise ValueError(
                f"checkpoints can't be written to {self.root}: give training_dir, a folder that "
                "all workers see"
            )
        return Path(self.root) / "training" / self.run_name


def stage_digest(preset: Preset, stage: str) -> str:
    """Return what stands for the configuration that decides a stage's weights."""
    training = training_identity(preset.training[stage])
    if stage.startswith("vae"):
        return config_digest(preset.vae, training, preset.data.held_out)
    if stage == "structure-vae":
        return config_digest(preset.structure, training, preset.data.held_out)
    model = preset.structure if stage == "structure" else preset.dit
    encoder = replace(preset.encoder, path="")  # where its copy lies changes nothing
    return config_digest(model, encoder, training, preset.data.held_out)


@contextmanager
def only_writer(checkpoint_dir: Path) -> Iterator[None]:
    """Keep other trainings on this machine out of a run's folder.

    Waits for the workers of a training that was just killed to end; then raises TrainingBusyError.
    """
    lock = checkpoint_dir.with_name(f"{checkpoint_dir.name}.lock")  # outside: `fresh` deletes it
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, BUSY_SECONDS))
        except BlockingIOError:
            raise TrainingBusyError(
                f"another process trains into {checkpoint_dir}; wait for it to end or stop it, "
                "then start again"
            ) from None
        yield


def train_on_ray(
    job: TrainingJob,
    make_report: MakeReport,
    num_workers: int = 1,
    use_gpu: bool = False,
    cpus_per_worker: int | None = None,
    max_failures: int = 3,
    fresh: bool = False,
) -> TrainingResult:
    """Train a stage on Ray workers and return how far it came; Ray must be initialised.

    A run that was stopped continues, one that is finished returns at once; fresh: train from the
    start instead, deleting the checkpoints. make_report: called on the worker of rank 0.
    cpus_per_worker: an even share of the cluster by default. max_failures: workers' deaths before
    giving up. Raises TrainingDivergedError or ValueError as `train` does, without a restart, and
    TrainingBusyError while another training writes the same checkpoints.
    """
    with only_writer(job.checkpoint_dir):
        if fresh:
            shutil.rmtree(job.checkpoint_dir, ignore_errors=True)
    # The annotations that mypy sees here are those of Ray Train v1; v2 is what runs.
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job, "make_report": make_report},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": cpus_per_worker or share_of_cpus(num_workers),
                **({"GPU": 1} if use_gpu else {}),
            },
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=job.run_name,
            storage_path=str(job.checkpoint_dir.parent.absolute()),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, TrainingResult)
    return outcome


def _train_worker(config: dict[str, Any]) -> TrainingResult | Exception:
    """Train on one worker. What would fail again is returned: an exception would be retried."""
    job: TrainingJob = config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # Ray gives OMP_NUM_THREADS of the worker's CPUs, but torch may have been imported before.
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    try:
        start = job.start.folder() if job.start else None
        stage = build_stage(job.stage, job.preset, job.latents, start, job.provenance)
        stage = with_pictures(stage, job.autoencoder.folder() if job.autoencoder else None)
        loader = build_loader(job.stage, job.preset, job.samples, job.root, rank, world_size)
        report = config["make_report"]() if rank == 0 else NoReport()
        # Rank 0 alone writes checkpoints, and it may outlive a driver that is killed.
        with only_writer(job.checkpoint_dir) if rank == 0 else nullcontext():
            return train(
                stage,
                job.preset.training[job.stage],
                loader,
                job.checkpoint_dir,
                report,
                get_device(),
                rank,
                world_size,
            )
    except (TrainingDivergedError, ValueError) as error:  # on all ranks alike
        return error
    except Exception as error:
        # Other ranks may wait for this one: there Ray must end them, and may well try again.
        if world_size > 1:
            raise
        return error


def share_of_cpus(num_workers: int) -> int:
    """Return CPUs a worker: an even share of all, at most what the largest node has."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(sum(nodes) / num_workers, max(nodes, default=0))))
