"""Latents of a dataset version under a trained VAE: shards, and their mean and scale.

    latents/<digest>/part-00000/latents-<R>.parquet    as `tasks/shards.py` documents it
                     index.parquet     sample references; in its metadata mean and scale

The digest stands for the dataset version, the resolution and the VAE. A part appears whole or not
at all and names its samples, so an interrupted encoding goes on where it stopped; the index comes
last, and without it the set is not complete. The dense latents of the structure stage, which list
every cell of their grid, are kept in the same way as sparse ones.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pyarrow import fs

from tasks.samples import SampleRef, read_index, write_index
from tasks.shards import ShardWriter, latents_file, read_latents
from tasks.storage import open_filesystem

PART_SAMPLES = 64

# sample -> coords [L, 3] int32, sorted lexicographically; mean of the posterior [L, C]
Encode = Callable[[SampleRef], tuple[np.ndarray, np.ndarray]]


class LatentsError(RuntimeError):
    """Latents that are missing, incomplete or unusable."""


@dataclass(frozen=True)
class LatentSet:
    """A complete set of latents.

    samples: where each sample's latents lie, relative to the data folder; tokens counts them.
    mean, scale: [C] float32, of the posterior means over all latent voxels of the set; training
    and sampling work on (latent - mean) / scale.
    """

    digest: str
    samples: tuple[SampleRef, ...]
    mean: np.ndarray
    scale: np.ndarray


def latents_digest(*parts: str) -> str:
    """Return 16 hexadecimal digits for what latents depend on, such as dataset and VAE version."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def encode_latents(
    encode: Encode,
    samples: Sequence[SampleRef],
    root: str | Path,
    digest: str,
    progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """Encode samples into `latents/<digest>` of the data folder, or return what is there already.

    progress: called with the samples done and their total. Raises LatentsError for latents that
    are not finite, ValueError unless all samples have one resolution.
    """
    resolutions = {s.resolution for s in samples}
    if len(resolutions) != 1:
        raise ValueError(
            f"{len(samples)} samples of the resolutions {sorted(resolutions)}: a set of latents "
            "has samples of one resolution"
        )
    filesystem, base = open_filesystem(root)
    index = f"{base}/latents/{digest}/index.parquet"
    if filesystem.get_file_info(index).type == fs.FileType.File:
        found = open_latents(root, digest)
        if [s.asset_id for s in found.samples] == [s.asset_id for s in samples]:
            return place_views(found, samples, root)
    encoded: list[SampleRef] = []
    count, first, second = 0, np.zeros(1), np.zeros(1)  # rows, sum and sum of squares
    for start in range(0, len(samples), PART_SAMPLES):
        part = samples[start : start + PART_SAMPLES]
        folder = f"latents/{digest}/part-{start // PART_SAMPLES:05d}"
        path = f"{folder}/{latents_file(part[0].resolution)}"
        if _assets(filesystem, f"{base}/{path}") != [s.asset_id for s in part]:
            _write_part(filesystem, f"{base}/{folder}", encode, part)
        for row_group, sample in enumerate(part):
            coords, mean = read_latents(filesystem, f"{base}/{path}", row_group)
            count += len(mean)
            first = first + mean.sum(0, dtype=np.float64)
            second = second + np.square(mean, dtype=np.float64).sum(0)
            encoded.append(replace(sample, path=path, row_group=row_group, tokens=len(coords)))
        if progress:
            progress(len(encoded), len(samples))
    average = first / count
    scale = np.sqrt(np.maximum(second / count - average**2, 1e-12))
    _write_index(filesystem, index, encoded, average, scale)
    return open_latents(root, digest)


def open_latents(root: str | Path, digest: str) -> LatentSet:
    """Open a complete set. Raises LatentsError when there is none under this digest."""
    filesystem, base = open_filesystem(root)
    path = f"{base}/latents/{digest}/index.parquet"
    try:
        samples, metadata = read_index(filesystem, path)
    except FileNotFoundError as error:
        raise LatentsError(
            f"{path} is not there: run encode-latents for this dataset version and VAE"
        ) from error
    mean, scale = (np.array(json.loads(metadata[k]), np.float32) for k in ("mean", "scale"))
    return LatentSet(digest, tuple(samples), mean, scale)


def place_views(found: LatentSet, samples: Sequence[SampleRef], root: str | Path) -> LatentSet:
    """Return a set whose pictures are where `samples` have them; its index is put right.

    A shard that is rebuilt has the same content at another place. samples: of the dataset version,
    in the set's order. Raises LatentsError for other assets than the set's.
    """
    if [s.asset_id for s in found.samples] != [s.asset_id for s in samples]:
        raise LatentsError(
            f"latents/{found.digest} has {len(found.samples)} samples and the dataset version "
            f"{len(samples)}, or in another order: run encode-latents for this dataset version"
        )
    placed = tuple(
        replace(latent, views_path=sample.views_path, views_row_group=sample.views_row_group)
        for latent, sample in zip(found.samples, samples, strict=True)
    )
    if placed != found.samples:
        filesystem, base = open_filesystem(root)
        path = f"{base}/latents/{found.digest}/index.parquet"
        _write_index(filesystem, path, placed, found.mean, found.scale)
    return replace(found, samples=placed)


def _write_index(
    filesystem: fs.FileSystem,
    path: str,
    samples: Sequence[SampleRef],
    mean: np.ndarray,
    scale: np.ndarray,
) -> None:
    metadata = {"mean": json.dumps(mean.tolist()), "scale": json.dumps(scale.tolist())}
    write_index(filesystem, path, samples, metadata)


def _assets(filesystem: fs.FileSystem, path: str) -> list[str]:
    """Return the assets in a part, none when it is not there."""
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return []
    with filesystem.open_input_file(path) as file:
        ids: list[str] = pq.read_table(file, columns=["asset_id"])["asset_id"].to_pylist()
    return ids


def _write_part(
    filesystem: fs.FileSystem, folder: str, encode: Encode, samples: Sequence[SampleRef]
) -> None:
    with ShardWriter(filesystem, folder) as writer:
        for sample in samples:
            coords, mean = encode(sample)
            if not np.isfinite(mean).all():
                raise LatentsError(
                    f"the latents of asset {sample.asset_id} at {sample.resolution} aren't finite: "
                    "is this VAE trained?"
                )
            writer.add_latents(sample.asset_id, sample.resolution, coords, mean)
