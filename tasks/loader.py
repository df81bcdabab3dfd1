"""Batches for training: ragged, under a token budget, the same ones for a seed and an epoch.

What a batch holds is a pure function of (samples, token budget, seed, epoch, world size, rank,
position), so the state of a loader is its epoch and position. torchdata's stateful loader would
keep the same two numbers; torch's own also runs where torchdata is not installed. Needs torch,
pyarrow and Pillow only.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from pyarrow import fs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.framing import read_framed
from tasks.samples import SampleRef
from tasks.shards import read_latents, read_sdf

logger = logging.getLogger(__name__)

POOL_BATCHES = 32  # samples are sorted by size within this many batches' worth of a shuffled epoch

Kind = Literal["sdf", "blocks", "latents"]


@dataclass(frozen=True)
class Batch:
    """Samples of one step, ragged: rows of all samples one after the other.

    tokens: what the samples count against the token budget.
    coords: [L, 4] int32 (sample, x, y, z), latent voxels, sorted lexicographically.
    values: [L, 8, 8, 8] float32, sdf / tau; sharp: the same shape, bool; kind `sdf` only.
    latents: [L, C] float32, as the VAE gave them; kind `latents` only.
    rgba: [B, 4, S, S] float32 in [0, 1], straight alpha, one view a sample; where views are read.
    """

    asset_ids: tuple[str, ...]
    resolutions: tuple[int, ...]
    tokens: int
    coords: Tensor
    values: Tensor | None = None
    sharp: Tensor | None = None
    latents: Tensor | None = None
    rgba: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> "Batch":
        tensors = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


class SampleDataset(Dataset[dict[str, Any]]):
    """Reads the sample of a key (index, epoch); the view drawn depends on it and the seed alone."""

    def __init__(
        self,
        samples: Sequence[SampleRef],
        filesystem: fs.FileSystem,
        root: str,
        kind: Kind,
        views: bool,
        seed: int,
    ):
        self.samples = list(samples)
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.kind = kind
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, epoch = key
        sample = self.samples[index]
        path = f"{self.root}/{sample.path}"
        names = ("asset_id", "resolution", "tokens")
        item: dict[str, Any] = {name: getattr(sample, name) for name in names}
        if self.kind == "latents":
            coords, mean = read_latents(self.filesystem, path, sample.row_group)
            item |= {"coords": coords, "latents": mean}
        else:
            sdf = read_sdf(self.filesystem, path, sample.row_group)
            item["coords"] = sdf.blocks
            if self.kind == "sdf":
                item |= {"values": sdf.values, "sharp": sdf.sharp}
        if self.views:
            views_path = f"{self.root}/{sample.views_path}"
            place = (self.filesystem, views_path, sample.views_row_group)
            rng = np.random.default_rng((self.seed, epoch, index))
            picture = read_framed(
                *place, lambda count: int(rng.integers(training_views(count, sample.asset_id)))
            )
            image = picture.astype(np.float32) / 255
            item["rgba"] = np.ascontiguousarray(image.transpose(2, 0, 1))
        return item


def training_views(count: int, asset_id: str) -> int:
    """Return how many of an asset's views are trained on: all but the last, which is held out."""
    if count < 2:
        raise ValueError(
            f"asset {asset_id} has {count} view(s); conditional stages need at least 2, since the "
            "last one is held out for evaluation: refresh the dataset with more views"
        )
    return count - 1


def collate(items: list[dict[str, Any]]) -> Batch:
    """Join samples into one ragged batch."""
    coords = [
        np.concatenate([np.full((len(item["coords"]), 1), i, np.int32), item["coords"]], axis=1)
        for i, item in enumerate(items)
    ]

    def joined(name: str) -> Tensor | None:
        if name not in items[0]:
            return None
        return torch.from_numpy(np.concatenate([item[name] for item in items]))

    return Batch(
        asset_ids=tuple(item["asset_id"] for item in items),
        resolutions=tuple(item["resolution"] for item in items),
        tokens=sum(item["tokens"] for item in items),
        coords=torch.from_numpy(np.concatenate(coords).astype(np.int32)),
        values=joined("values"),
        sharp=joined("sharp"),
        latents=joined("latents"),
        rgba=torch.from_numpy(np.stack([item["rgba"] for item in items]))
        if "rgba" in items[0]
        else None,
    )


def epoch_batches(
    tokens: Sequence[int], budget: int, seed: int, epoch: int, world_size: int
) -> list[list[int]]:
    """Return the batches of an epoch, for all ranks; rank r takes every world_size-th from r on.

    The samples are shuffled, sorted by tokens within pools of POOL_BATCHES batches, so that a
    batch holds samples of about one size, and packed until the next would exceed the budget.
    Every sample occurs once; where the batches don't divide by world_size, the first ones are
    used again at the end, so that each rank gets as many.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(tokens))
    pool = (np.cumsum(np.asarray(tokens)[order]) - 1) // (POOL_BATCHES * budget)
    batches: list[list[int]] = []
    for number in np.unique(pool):
        members = order[pool == number]
        filled = budget + 1  # opens a new batch: none spans two pools
        for index in members[np.argsort(np.asarray(tokens)[members], kind="stable")].tolist():
            filled += tokens[index]
            if filled > budget:
                batches.append([])
                filled = tokens[index]
            batches[-1].append(index)
    batches = [batches[i] for i in rng.permutation(len(batches))]
    missing = -len(batches) % world_size
    return batches + [batches[i % len(batches)] for i in range(missing)]


class Loader:
    """An endless iterator over the batches of one rank, with a state that resumes in place.

    Samples above the token budget can't be in any batch: they are left out, counted in
    `left_out`, and logged. Raises ValueError when no sample is left.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        token_budget: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        self.kept = [i for i, s in enumerate(dataset.samples) if s.tokens <= token_budget]
        self.left_out = len(dataset) - len(self.kept)
        if not self.kept:
            smallest = min((s.tokens for s in dataset.samples), default=0)
            raise ValueError(
                f"no sample fits the token budget: {len(dataset)} samples, the smallest of "
                f"{smallest} tokens, budget {token_budget}; raise token_budget or add data"
            )
        if self.left_out:
            logger.warning(
                "%d of %d samples exceed the token budget of %d and are left out",
                self.left_out,
                len(dataset),
                token_budget,
            )
        self.dataset = dataset
        self.token_budget = token_budget
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.epoch = 0
        self.position = 0  # batches of this epoch that this rank has handed out
        self._batches = lru_cache(maxsize=2)(self._make_batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._keys(),
            collate_fn=collate,
            num_workers=self.workers,
            # A forked worker inherits the locks of pyarrow's and torch's threads, and may hang.
            multiprocessing_context="spawn" if self.workers else None,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or else it would draw from the global one
        )
        for batch in loader:
            self.position += 1
            if self.position == len(self._batches(self.epoch)):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (index, epoch) keys of each batch, from the position on; runs ahead of it."""
        epoch, position = self.epoch, self.position
        while True:
            for batch in self._batches(epoch)[position:]:
                yield [(index, epoch) for index in batch]
            epoch, position = epoch + 1, 0

    def _make_batches(self, epoch: int) -> list[list[int]]:
        tokens = [self.dataset.samples[i].tokens for i in self.kept]
        batches = epoch_batches(
            tokens, self.token_budget, self.dataset.seed, epoch, self.world_size
        )
        return [[self.kept[i] for i in batch] for batch in batches[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, the same on every rank."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "world_size": self.world_size,
            "samples": self._digest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the loader that gave `state` stood.

        Raises ValueError for other samples, budget or seed, and for another number of ranks in
        the middle of an epoch, since the batches that are left would be others.
        """
        if state["samples"] != self._digest():
            raise ValueError(
                "the checkpoint was made with other samples, token budget or seed; resume with the "
                "dataset version and configuration of the run, or start a new run"
            )
        if state["world_size"] != self.world_size and state["position"] != 0:
            raise ValueError(
                f"the checkpoint stands at batch {state['position']} of epoch {state['epoch']} on "
                f"{state['world_size']} rank(s) and cannot continue on {self.world_size}: resume "
                f"with {state['world_size']}, or from a checkpoint at the end of an epoch"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _digest(self) -> str:
        samples = [(s.asset_id, s.resolution, s.tokens) for s in self.dataset.samples]
        content = repr((samples, self.token_budget, self.dataset.seed))
        return hashlib.sha256(content.encode()).hexdigest()[:16]
