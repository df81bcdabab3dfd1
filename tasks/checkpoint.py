"""Checkpoints of a training: folders that are either complete and checked, or not there.

    <folder>/step-00001000/model.safetensors      the trained module's state
                           ema.safetensors        the same keys, averaged weights
                           optimiser.pt           state of the optimiser (torch.save)
                           state.json             step, loader state, configuration, checksums

A folder is written under another name, flushed to the disk and renamed: a process killed at any
moment leaves the older checkpoints as they were.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, with what to do about it."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder whose files have been checked.

    path: its folder. state: the content of state.json, with at least `step`.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimiser steps taken."""
        return int(self.state["step"])

    def weights(self, ema: bool, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return the tensors of the module, averaged over training (ema) or as last trained."""
        name = "ema.safetensors" if ema else "model.safetensors"
        return load_file(self.path / name, device=str(device))

    def optimiser(self) -> dict[str, Any]:
        """Return the optimiser's state, on the CPU."""
        loaded: dict[str, Any] = torch.load(
            self.path / "optimiser.pt", map_location="cpu", weights_only=True
        )
        return loaded


def save(
    folder: Path,
    state: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimiser: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of step state["step"], atomically; keep the newest `keep` of the folder.

    A checkpoint of the same step that is already there is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f"{_PARTIAL}{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_contiguous(model), partial / "model.safetensors")
    save_file(_contiguous(ema), partial / "ema.safetensors")
    torch.save(optimiser, partial / "optimiser.pt")
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / "state.json").write_text(json.dumps({**state, "files": files}, indent=1))
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(folder)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load(path: Path) -> Checkpoint:
    """Check and open one checkpoint folder. Raises CheckpointError when it is damaged."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name, expected in state["files"].items():
            found = _sha256(path / name)
            if found != expected:
                raise CheckpointError(
                    f"{path / name}: SHA-256 is {found}, state.json says {expected}; "
                    f"the file is damaged: delete {path} and resume from an older checkpoint"
                )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no complete checkpoint ({error!r}): delete it and resume from an older one"
        ) from error
    return Checkpoint(path, state)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest sound checkpoint of a training's folder; None when it has none at all.

    Damaged ones are logged as errors and passed over. Raises CheckpointError when there are
    checkpoints but every one is damaged: starting anew would hide that training was lost.
    """
    failures = []
    for path in reversed(_folders(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            logger.error("skipping a damaged checkpoint: %s", error)
            failures.append(str(error))
    if failures:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; delete the folder to train from the start: "
            + "; ".join(failures)
        )
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Ask the kernel to put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
