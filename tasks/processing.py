"""What a worker does with one shard of assets: a child process for each asset's work, to Parquet.

The work itself (`tasks.asset_work`) is named, not imported: only the child needs its libraries.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from tasks.catalogue import Row, to_table
from tasks.isolation import IsolatedFunction, Limits, Outcome
from tasks.planning import Wanted
from tasks.shards import (
    ASSETS_FILE,
    AssetRow,
    EncodedSDF,
    ShardWriter,
    Stored,
    StoredView,
    sdf_file,
)
from tasks.sources import SourceAsset
from tasks.storage import atomic_file, open_filesystem

# A generator function of a Job and Settings, see there.
PROCESS_ASSET = "tasks.asset_work:process_asset"


@dataclass(frozen=True)
class Settings:
    """What an asset is made into. view_size: pixels of a side."""

    engine: Literal["sparse", "mesh2sdf"]
    views: int
    view_size: int


@dataclass(frozen=True)
class Job:
    """One asset to process at some resolutions; source: its spec, good in any folder."""

    asset: SourceAsset
    wanted: Wanted
    source: str
    resolutions: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """A read, normalised and rendered asset. vertices [V, 3] float32, faces [F, 3] int32."""

    vertices: np.ndarray
    faces: np.ndarray
    views: tuple[StoredView, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """What conversion made of an asset at one resolution; see `tasks.conversion.Conversion`.

    Encoded in the child: its parent holds all resolutions at once.
    """

    sdf: EncodedSDF
    parts_in: int
    parts_out: int
    closed: bool
    sign_method: str
    sign_confidence: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """An asset that cannot become data, at one resolution or (None) at all."""

    resolution: int | None
    reason: str
    detail: str


_child: IsolatedFunction | None = None


def _isolated(function: str, limits: Limits) -> IsolatedFunction:
    """Return this process's child for a function; it outlives a shard, its imports cost seconds."""
    global _child
    if _child is None or (_child.function, _child.limits) != (function, limits):
        if _child is not None:
            _child.close()
        _child = IsolatedFunction(function, limits)
    return _child


@dataclass(frozen=True)
class Shard:
    """What came of a shard: its rows, and seconds of its work that are no one asset's.

    seconds: `start` of the child and its imports, `write` of meshes, views, fields and rows.
    """

    rows: list[Row]
    seconds: dict[str, float]


def process_shard(
    root: str,
    shard: str,
    jobs: Sequence[Job],
    settings: Settings,
    recipe: str,
    limits: Limits,
    cuda_bytes: int,
    process: str,
) -> Shard:
    """Process some assets into one shard; its rows are staged on disk, too.

    The staging file is written after the shard's files are complete, so that its presence means
    that its rows can be used. cuda_bytes: what CUDA's libraries take of the child's memory, on top
    of the limits. process: names the work on one asset. Whatever an asset does is a row; an error
    that is raised is the disk's or ours.
    """
    filesystem, path = open_filesystem(root)
    child = _isolated(process, replace(limits, bytes=limits.bytes + cuda_bytes))
    rows = []
    began, called_for, in_stages = time.monotonic(), 0.0, 0.0
    with ShardWriter(filesystem, f"{path}/shards/{shard}") as writer:
        for job in jobs:
            called = time.monotonic()
            outcome = child.run(job, settings)
            called_for += time.monotonic() - called
            in_stages += sum(outcome.seconds.values())
            rows += _rows(job, outcome, writer, shard, recipe, limits)
    files = writer.files
    rows = [
        replace(
            row,
            sdf_sha256=files[sdf_file(row.resolution)].sha256,
            assets_sha256=files[ASSETS_FILE].sha256,
        )
        if row.status == "ready"
        else row
        for row in rows
    ]
    stage_rows(root, shard, rows)
    write = time.monotonic() - began - called_for
    return Shard(rows, {"start": called_for - in_stages, "write": write})


def stage_rows(root: str, shard: str, rows: Sequence[Row]) -> None:
    """Write the staging file of a shard."""
    filesystem, path = open_filesystem(root)
    filesystem.create_dir(f"{path}/staging", recursive=True)
    with atomic_file(filesystem, f"{path}/staging/{shard}.parquet") as sink:
        pq.write_table(to_table(rows), sink, compression="zstd")


def base_row(job: Job, resolution: int, recipe: str, limits: Limits) -> Row:
    """Return a row with what is known before any work; its status is `failed`."""
    return Row(
        **asdict(job.wanted),
        resolution=resolution,
        status="failed",
        recipe=recipe,
        limits=str(limits),
    )


def _rows(
    job: Job,
    outcome: Outcome,
    writer: ShardWriter,
    shard: str,
    recipe: str,
    limits: Limits,
) -> list[Row]:
    """Store what came of an asset and return its rows, one a resolution."""
    prepared = next((v for v in outcome.values if isinstance(v, Prepared)), None)
    conversions = {v.sdf.resolution: v for v in outcome.values if isinstance(v, Converted)}
    rejections = {v.resolution: v for v in outcome.values if isinstance(v, Rejected)}
    stored: Stored | None = None
    if prepared is not None and any(conversion.closed for conversion in conversions.values()):
        stored = writer.add_asset(
            AssetRow(
                job.wanted.asset_id,
                job.wanted.uris[0],
                job.wanted.licence,
                job.wanted.attribution,
                job.wanted.category,
                prepared.vertices,
                prepared.faces,
                prepared.views,
            )
        )
    rows = []
    for resolution in job.resolutions:
        row = replace(
            base_row(job, resolution, recipe, limits),
            seconds_load=outcome.seconds.get("load"),
            seconds_render=outcome.seconds.get("render"),
            seconds_convert=outcome.seconds.get(f"convert-{resolution}"),
            peak_bytes=outcome.peak_bytes,
        )
        if prepared is not None:
            row = replace(row, faces=len(prepared.faces), warnings=prepared.warnings)
        rejected = rejections.get(resolution, rejections.get(None))
        conversion = conversions.get(resolution)
        if conversion is not None:
            row = _converted_row(row, conversion, stored, writer, shard)
        elif rejected is not None:
            row = replace(row, status="rejected", reason=rejected.reason, detail=rejected.detail)
        elif outcome.failure is not None:
            failure = outcome.failure
            row = replace(row, reason=failure.reason, detail=failure.detail, stage=failure.stage)
        else:
            raise RuntimeError(f"the work on {job.wanted.uris[0]} at {resolution} yielded nothing")
        rows.append(row)
    return rows


def _converted_row(
    row: Row, conversion: Converted, asset: Stored | None, writer: ShardWriter, shard: str
) -> Row:
    """Store a conversion and return its row; one whose surface is open is a failure of ours."""
    row = replace(
        row,
        warnings=(*row.warnings, *conversion.warnings),
        parts_in=conversion.parts_in,
        parts_out=conversion.parts_out,
        closed=conversion.closed,
        sign_method=conversion.sign_method,
        sign_confidence=float(conversion.sign_confidence),
        band_voxels=conversion.sdf.band_voxels,
        latent_voxels=len(conversion.sdf.blocks),
    )
    if not conversion.closed:
        return replace(
            row,
            reason="open_surface",
            detail="the surface of the converted field is not closed and consistently oriented",
            stage=f"convert-{row.resolution}",
        )
    assert asset is not None
    sdf = writer.add_sdf(row.asset_id, conversion.sdf)
    return replace(
        row,
        status="ready",
        shard=shard,
        row_group=sdf.row_group,
        assets_row_group=asset.row_group,
        sdf_digest=sdf.digest,
        asset_digest=asset.digest,
    )
