"""The training loop of every stage: one process a device, told where to report, nothing more.

It imports neither Ray, Prefect nor MLflow, so that it runs on a bare machine with torch and
pyarrow. A run killed at any moment and started again takes the same steps as one that was not:
weights, averages, optimiser and the position in the data are in the checkpoint, and the random
numbers of a step are a function of (seed, step, rank).
"""

import copy
import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tasks import checkpoint
from tasks.loader import Batch, Loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """How a stage is trained. Every number of steps counts optimiser steps.

    resolutions: of the samples it learns from. start_from: the stage whose averaged weights it
        begins with, or "" for random ones.
    token_budget: most tokens in a batch of one rank (latent voxels, or dense latent cells).
    schedule: after warmup_steps, "constant", or "cosine" to a tenth of learning_rate at the end.
    accumulation: batches a step. clip_norm: largest gradient norm.
    ema_decay: of the averaged weights; early steps average over less, (1 + step) / (10 + step).
    max_minutes: stop, with a checkpoint, after this time; 0 is no limit.
    """

    steps: int
    token_budget: int
    resolutions: tuple[int, ...]
    start_from: str = ""
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 10
    picture_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    loader_workers: int = 0
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "token_budget", "learning_rate", "clip_norm", "accumulation"):
            self._check(name, getattr(self, name) > 0, "it must be above zero")
        self._check("resolutions", len(self.resolutions) > 0, "name at least one")
        for name in ("log_every", "picture_every", "checkpoint_every", "keep_checkpoints"):
            self._check(name, getattr(self, name) > 0, "it must be above zero")
        for name in ("warmup_steps", "weight_decay", "seed", "loader_workers", "max_minutes"):
            self._check(name, getattr(self, name) >= 0, "it can't be negative")
        for name in ("ema_decay", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "it must be in [0, 1)")
        self._check("schedule", self.schedule in ("constant", "cosine"), "constant or cosine")

    def _check(self, name: str, ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(f"TrainingConfig.{name} is {getattr(self, name)!r}; {message}")


@dataclass(frozen=True)
class Shown:
    """What a stage makes of a sample, for people to see, by what it shows.

    pictures: [H, W, 3] uint8. meshes: vertices [V, 3] in [-1, 1] and faces [F, 3].
    """

    pictures: dict[str, np.ndarray]
    meshes: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class Stage:
    """One thing to train, as `tasks/stages.py` makes it.

    module: what is trained; forward(inputs, generator) -> (loss, parts), parts being the detached
        terms of the loss by name. Its state dictionary is what checkpoints hold.
    prepare: puts a batch on the device and runs what is frozen; under no_grad, in autocast.
    show: (averaged module, prepared inputs, generator) -> what people see of it; or None.
    description: the resolved configuration and where the stage comes from, JSON.
    """

    name: str
    module: nn.Module
    prepare: Callable[[Batch, torch.device], Any]
    show: Callable[[nn.Module, Any, torch.Generator], Shown] | None = None
    description: dict[str, Any] = field(default_factory=dict)


class Report(Protocol):
    """What the loop tells the outside; called on rank 0 alone."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take means over the steps since the last call."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Take one picture, [H, W, 3] uint8."""

    def meshes(self, step: int, meshes: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Take the meshes of the last step's pictures: vertices and faces by what they are."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Learn of a finished checkpoint folder; it may vanish after `keep_checkpoints` more."""


class NoReport:
    """Tells nobody."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Drop them."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Drop it."""

    def meshes(self, step: int, meshes: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Drop them."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Drop it."""


class TrainingDivergedError(RuntimeError):
    """A step whose loss or gradient is not finite; no weights were changed by it."""


@dataclass(frozen=True)
class TrainingResult:
    """How far a run came. finished: all steps taken; otherwise max_minutes ended it."""

    step: int
    finished: bool
    checkpoint: Path


def train(
    stage: Stage,
    config: TrainingConfig,
    loader: Loader,
    checkpoint_dir: Path,
    report: Report,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> TrainingResult:
    """Train a stage up to config.steps, from the newest checkpoint in checkpoint_dir if any.

    With world_size > 1 the process group must be initialised, and checkpoint_dir be a folder that
    all ranks see. Raises TrainingDivergedError before a step that isn't finite, ValueError when
    the checkpoint belongs to other data or another configuration.
    """
    module = stage.module.to(device).train()
    ema = copy.deepcopy(module).eval().requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained,
        config.learning_rate,
        (0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    step, path = 0, checkpoint_dir
    if found := checkpoint.latest(checkpoint_dir):
        _require_same_run(found, stage, config)
        module.load_state_dict(found.weights(ema=False, device=device))
        ema.load_state_dict(found.weights(ema=True, device=device))
        optimiser.load_state_dict(found.optimiser())
        loader.load_state_dict(found.state["loader"])
        step, path = found.step, found.path
        logger.info("%s continues at step %d from %s", stage.name, step, path)

    forward: nn.Module = module
    if world_size > 1:
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(module, device_ids=devices)
    batches = iter(loader)
    window = _Window()
    end = time.monotonic() + 60 * config.max_minutes if config.max_minutes else math.inf
    stop = False
    while step < config.steps and not stop:
        started = time.monotonic()
        rate = learning_rate(config, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        inputs = _backward(stage, forward, batches, config, window, step, rank, world_size, device)
        norm = _optimise(optimiser, trained, config, step)
        _average(ema, module, min(config.ema_decay, (1 + step) / (10 + step)))
        step += 1
        window.add_step(time.monotonic() - started, norm)

        stop = config.max_minutes > 0 and _any(time.monotonic() > end, device, world_size)
        save = step % config.checkpoint_every == 0 or step == config.steps or stop
        if step % config.log_every == 0 or save:
            values = window.means(device, world_size)
            if rank == 0:
                report.metrics(step, values | {"learning_rate": rate, "epoch": loader.epoch})
            window = _Window()
        if rank == 0 and stage.show and (step % config.picture_every == 0 or save):
            generator = _seed(config.seed, step, rank, 0, device)
            with torch.no_grad(), autocast(device):
                shown = stage.show(ema, inputs, generator)
            for name, image in shown.pictures.items():
                report.picture(step, name, image)
            if shown.meshes and (step == config.steps or stop):
                report.meshes(step, shown.meshes)
        if save:
            path = checkpoint_dir / f"step-{step:08d}"
            if rank == 0:
                state = _run_identity(stage, config)
                state |= {"step": step, "loader": loader.state_dict()}
                path = checkpoint.save(
                    checkpoint_dir,
                    state,
                    module.state_dict(),
                    ema.state_dict(),
                    optimiser.state_dict(),
                    config.keep_checkpoints,
                )
                report.checkpoint(step, path)
            _any(False, device, world_size)  # no rank goes on, or ends, before it is written
    return TrainingResult(step, step >= config.steps, path)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of the step after `step` optimiser steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, fp32 elsewhere; sparse convolutions turn to fp16 by themselves."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _backward(
    stage: Stage,
    forward: nn.Module,
    batches: Iterator[Batch],
    config: TrainingConfig,
    window: "_Window",
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Any:
    """Accumulate the gradients of one step's batches; return the last batch's inputs."""
    inputs = None
    for part in range(config.accumulation):
        waiting = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - waiting
        generator = _seed(config.seed, step, rank, part, device)
        context: AbstractContextManager[None] = nullcontext()
        if isinstance(forward, DistributedDataParallel) and part < config.accumulation - 1:
            context = forward.no_sync()
        with context:
            with autocast(device):
                with torch.no_grad():
                    inputs = stage.prepare(batch, device)
                loss, parts = forward(inputs, generator)
            value = loss.item()
            # All ranks must agree: the others would wait for this one's gradients for ever.
            if _any(not math.isfinite(value), device, world_size):
                terms = {name: float(term) for name, term in parts.items()}
                raise TrainingDivergedError(
                    f"the loss of {stage.name} is {value} at step {step + 1} on rank {rank} "
                    f"(terms {terms}, assets {list(batch.asset_ids)}); the weights are as before "
                    "this step: lower learning_rate, or look at these assets, and start again "
                    "from the checkpoint"
                )
            (loss / config.accumulation).backward()
        window.add_batch(batch, waited, {"loss": loss.detach(), **parts})
    return inputs


def _optimise(
    optimiser: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    config: TrainingConfig,
    step: int,
) -> float:
    """Clip the gradients, take the step and clear them; return their norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(trained, config.clip_norm))
    if not math.isfinite(norm):
        raise TrainingDivergedError(
            f"the gradient norm is {norm} at step {step + 1}, though the loss is finite; the "
            "weights are as before this step: lower learning_rate and start again from the "
            "checkpoint"
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


def _average(ema: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the trained ones; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
        for averaged, buffer in zip(ema.buffers(), module.buffers(), strict=True):
            averaged.copy_(buffer)


def _seed(seed: int, step: int, rank: int, part: int, device: torch.device) -> torch.Generator:
    """Seed torch anew for one batch of one step, so that a restart needs no random state."""
    value = int(np.random.SeedSequence((seed, step, rank, part)).generate_state(1, np.uint64)[0])
    torch.manual_seed(value)
    return torch.Generator(device).manual_seed(value)


def _any(flag: bool, device: torch.device, world_size: int) -> bool:
    """Return whether any rank says so; all ranks wait for each other here."""
    if world_size == 1:
        return flag
    tensor = torch.tensor(float(flag), device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)


def training_identity(config: TrainingConfig) -> dict[str, Any]:
    """Return what of a configuration decides the weights; the rest may change within a run."""
    cadence = ("log_every", "picture_every", "checkpoint_every", "keep_checkpoints")
    excluded = (*cadence, "loader_workers", "max_minutes")
    return {name: value for name, value in asdict(config).items() if name not in excluded}


def _run_identity(stage: Stage, config: TrainingConfig) -> dict[str, Any]:
    """What a checkpoint and a run that continues it must share, as JSON gives it back."""
    training = training_identity(config)
    identity = {"stage": stage.name, "description": stage.description, "training": training}
    return dict(json.loads(json.dumps(identity)))


def _require_same_run(found: checkpoint.Checkpoint, stage: Stage, config: TrainingConfig) -> None:
    for name, expected in _run_identity(stage, config).items():
        if found.state.get(name) != expected:
            raise ValueError(
                f"{found.path} was made with another {name}: it has {found.state.get(name)}, this "
                f"run {expected}; continue with the run's own configuration, or train into "
                "another folder"
            )


@dataclass
class _Window:
    """Sums over the steps between two reports."""

    batches: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    voxels: int = 0
    norms: float = 0.0
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add_batch(self, batch: Batch, waited: float, parts: dict[str, Tensor]) -> None:
        self.batches += 1
        self.waited += waited
        self.tokens += batch.tokens
        self.voxels += 0 if batch.values is None else batch.values.numel()
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0) + value.detach().double()

    def add_step(self, seconds: float, norm: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.norms += norm

    def means(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Return the means over steps, and over ranks, and the rates summed over ranks."""
        values = {name: float(value) / self.batches for name, value in self.parts.items()}
        values |= {
            "gradient_norm": self.norms / self.steps,
            "step_seconds": self.seconds / self.steps,
            "data_wait_seconds": self.waited / self.steps,
            "tokens_per_second": world_size * self.tokens / self.seconds,
            "peak_memory_bytes": _peak_memory(device),
        }
        if self.voxels:
            values["voxels_per_second"] = world_size * self.voxels / self.seconds
        if world_size > 1:
            sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            dist.all_reduce(sums)
            values = dict(zip(values, (sums / world_size).tolist(), strict=True))
        return values


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
