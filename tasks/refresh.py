"""Refresh: makes a data folder's newest dataset version mirror its source, with Ray's workers.

The order of writes makes any kill harmless: a shard's files, its staging file, and, when all shards
are done, one commit of the catalogue; then the staging files go. A refresh that starts takes over
what an interrupted one staged, and removes shards that nothing refers to.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

import pyarrow.parquet as pq
from pyarrow import fs

from tasks import catalogue
from tasks.asset_work import recipe
from tasks.catalogue import DatasetVersion, Key, Row, storable
from tasks.conversion import check_resolution, gpu_bytes
from tasks.isolation import Limits
from tasks.planning import WORK, Plan, Wanted, plan
from tasks.processing import (
    PROCESS_ASSET,
    Job,
    Settings,
    Shard,
    base_row,
    process_shard,
    stage_rows,
)
from tasks.ray_work import Chunk, WorkerDiedError, gpu_for_each, run_chunks, session
from tasks.samples import split_of
from tasks.sources import SourceAsset, absolute_spec, open_source
from tasks.storage import absolute_root, exclusive, list_files, open_filesystem

logger = logging.getLogger(__name__)

# So many failed rows are never too many: a share means little in a small dataset.
FREE_FAILURES = 3
# What the work on one asset may take where a configuration does not say, by highest resolution,
# libraries included: the worst of 318 took 1.05 GB at 512, 3.98 at 1024 (benchmarks/README.md).
SPARSE_BYTES = {256: 3 * 2**29, 512: 2 * 2**30, 1024: 4 * 2**30, 2048: 8 * 2**30}
MESH2SDF_BYTES = 3 * 2**30
CUDA_BYTES = 2**30  # what CUDA's libraries and driver take of a process's memory on the host
# The Ray worker beside the child: its libraries, and fields that wait for those of the highest
# resolution. When it writes, the child has let go of more than that takes.
PARENT_BYTES, PARENT_SHARE = 2**28, 1 / 8
# An object store has no lock: a shard there that nothing refers to may be in the making.
ORPHAN_AGE = timedelta(days=1)

Report = Callable[[int, int, str], None]  # assets done, assets to do, a short text


class FailureBudgetError(RuntimeError):
    """Too many assets failed for the refresh to be sound; what was finished is kept."""


@dataclass(frozen=True)
class RefreshConfig:
    """What a data folder is to hold, and the means to make it.

    root: data folder or URI. source: such as `folder:PATH`. resolutions: voxels along an axis,
    multiples of 8 from 32 to 2048. licences: keep assets under these only, all for None. views,
    view_size: pictures an asset, pixels of a side. held_out: share of assets in the `test` split.
    seconds, bytes: limits of one asset's work, all resolutions together; for None the highest
    resolution says how many bytes, CUDA's own on a GPU left out. workers: assets at work at once,
    0 for one a core. shard_assets: most assets a shard. failure_budget: share of rows that may have
    failed. retry_failed: try those again that crashed or exceeded their limits. ray_address: of a
    cluster, such as `auto`; None takes the session of this process or starts a local one.
    """

    root: str
    source: str
    resolutions: tuple[int, ...]
    licences: tuple[str, ...] | None = None
    engine: Literal["sparse", "mesh2sdf"] = "sparse"
    views: int = 24
    view_size: int = 512
    held_out: float = 0.0
    seconds: float = 900.0
    bytes: int | None = None
    workers: int = 0
    shard_assets: int = 32
    failure_budget: float = 0.2
    retry_failed: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise ValueError("there are no resolutions; take multiples of 8 from 32 to 2048")
        for resolution in self.resolutions:
            check_resolution(resolution, self.engine)
        for name in ("held_out", "failure_budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; take a share from 0 to 1")
        for name in ("seconds", "bytes", "shard_assets", "view_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above zero")

    @property
    def settings(self) -> Settings:
        """What an asset is made into."""
        return Settings(self.engine, self.views, self.view_size)

    @property
    def limits(self) -> Limits:
        """Time and memory of one asset's work, CUDA's share left out."""
        if self.bytes is not None:
            return Limits(self.seconds, self.bytes)
        if self.engine == "mesh2sdf":
            return Limits(self.seconds, MESH2SDF_BYTES)
        highest = max(self.resolutions)
        return Limits(self.seconds, next(b for r, b in SPARSE_BYTES.items() if highest <= r))

    @property
    def worker_bytes(self) -> int:
        """Memory that Ray sets aside for an asset at work: the child's limit and its parent."""
        return int(self.limits.bytes * (1 + PARENT_SHARE)) + PARENT_BYTES


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    version, previous: the newest version after and before; the same when nothing changed.
    outcomes: rows of the new version by status and reason, such as `rejected: no_area`.
    seconds: wall-clock time of the refresh's steps. stage_seconds: work of the workers by stage, in
    this refresh. bytes_written: size of the shards written in this refresh.
    """

    version: DatasetVersion
    previous: DatasetVersion
    plan: Plan
    outcomes: dict[str, int]
    seconds: dict[str, float]
    stage_seconds: dict[str, float]
    bytes_written: int

    @property
    def changed_share(self) -> float:
        """Share of the rows, of both versions, that this refresh changed."""
        unchanged = len(self.plan.of("unchanged"))
        return 1 - unchanged / max(len(self.plan.entries), 1)


@dataclass(frozen=True)
class _State:
    """What a refresh finds. shards: files under shards/, such as `<shard id>/sdf-64.parquet`."""

    rows: list[Row]
    staged: dict[Key, Row]
    staging_files: list[str]
    shards: dict[str, fs.FileInfo]
    assets: list[tuple[SourceAsset, Wanted]]
    plan: Plan


def plan_refresh(config: RefreshConfig) -> Plan:
    """Say what `refresh` would do, and why; writes nothing."""
    return _look(config).plan


def refresh(
    config: RefreshConfig, progress: Report | None = None, process: str = PROCESS_ASSET
) -> RefreshReport:
    """Bring a data folder up to date with its source and configuration.

    process: names the work on one asset; tests name others. Raises DatasetBusyError while another
    refresh has the folder, FailureBudgetError, CatalogueError when another refresh of an object
    store committed first, and what a source or a disk raises.
    """
    seconds: dict[str, float] = {}
    with exclusive(config.root):
        with _timed(seconds, "plan"):
            previous = catalogue.create(config.root)
            state = _look(config)
            _remove_orphans(config.root, state)
        with _timed(seconds, "work"):
            finished = _process(
                config, state, progress or (lambda done, total, text: None), process
            )
        with _timed(seconds, "commit"):
            version = catalogue.commit(
                previous, _rows_to_put(state, finished), [e.key for e in state.plan.of("gone")]
            )
            _remove_staged(config.root, state, finished)
    return RefreshReport(
        version,
        previous,
        state.plan,
        _outcomes(version.rows()),
        seconds,
        _stage_seconds(finished),
        _size(config.root, finished.shards),
    )


def _look(config: RefreshConfig) -> _State:
    """Read catalogue, staging files, shards and source, and plan."""
    filesystem, path = open_filesystem(config.root)
    rows = catalogue.open_version(config.root).rows() if catalogue.exists(config.root) else []
    staged: dict[Key, Row] = {}
    names = sorted(list_files(filesystem, f"{path}/staging"))  # by time: shard ids begin with it
    files = [f"{path}/staging/{name}" for name in names if name.endswith(".parquet")]
    for file in files:
        table = pq.read_table(file, filesystem=filesystem)
        if set(table.column_names) == set(catalogue.SCHEMA.names):  # else of another version
            staged |= {row.key: row for row in catalogue.from_table(table)}
    shards = list_files(filesystem, f"{path}/shards")
    assets = _list_assets(config)
    recipes = dict.fromkeys(sorted(config.resolutions), recipe(config.settings))
    result = plan(
        rows,
        [wanted for _, wanted in assets],
        recipes,
        str(config.limits),
        retry_failed=config.retry_failed,
        staged=staged,
        files=shards,
    )
    return _State(rows, staged, files, shards, assets, result)


def _list_assets(config: RefreshConfig) -> list[tuple[SourceAsset, Wanted]]:
    """Return the source's assets, each once with every place of it, sorted by first place."""
    by_id: dict[str, list[SourceAsset]] = defaultdict(list)
    for asset in open_source(config.source, config.licences).assets():
        by_id[asset.asset_id].append(asset)
    if not by_id:
        raise ValueError(
            f"the source {config.source} holds no assets: check its path and the licences. A "
            "refresh does not empty a dataset; to start over, take a new data folder"
        )
    listed = []
    for asset_id, copies in by_id.items():
        first = min(copies, key=lambda asset: asset.uri)
        wanted = Wanted(
            asset_id,
            tuple(sorted(storable(asset.uri) for asset in copies)),
            config.source,
            first.licence,
            first.attribution,
            first.category,
            split_of(asset_id, config.held_out),
        )
        listed.append((first, wanted))
    return sorted(listed, key=lambda pair: pair[1].uris)


def _remove_orphans(root: str, state: _State) -> None:
    """Remove shards of refreshes that were killed, which no version and no staging file names."""
    newest: dict[str, datetime] = {}
    for name, info in state.shards.items():
        shard = name.split("/")[0]
        newest[shard] = max(newest.get(shard, info.mtime), info.mtime)
    named = {row.shard for row in (*state.rows, *state.staged.values())}
    orphans = set(newest) - named
    if not orphans:
        return
    filesystem, path = open_filesystem(root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        orphans = {s for s in orphans if newest[s] < datetime.now(UTC) - ORPHAN_AGE}
    for shard in orphans - catalogue.referenced_shards(root):
        logger.info("removing shard %s, left by an interrupted refresh", shard)
        filesystem.delete_dir(f"{path}/shards/{shard}")


@dataclass
class _Finished:
    """What a refresh has done so far: rows, the shards they were written under, times of those."""

    rows: list[Row]
    shards: list[str]
    seconds: dict[str, float]


def _process(config: RefreshConfig, state: _State, progress: Report, process: str) -> _Finished:
    """Do the planned work; raises FailureBudgetError as soon as too much of it has failed."""
    wanted_at: dict[str, list[int]] = defaultdict(list)
    for entry in state.plan.of(*WORK):
        wanted_at[entry.asset_id].append(entry.resolution)
    jobs = [
        Job(asset, wanted, absolute_spec(config.source), tuple(wanted_at[wanted.asset_id]))
        for asset, wanted in state.assets
        if wanted.asset_id in wanted_at
    ]
    # The largest first: one that came last would keep its worker while the others have no work.
    jobs.sort(key=lambda job: -job.asset.size)
    finished = _Finished([], [], {})
    kept = {row.key: row for row in state.rows}
    before = [kept[entry.key] for entry in state.plan.of("unchanged", "relabelled")]
    before += [state.staged[entry.key] for entry in state.plan.of("staged")]
    total = len(state.plan.entries) - len(state.plan.of("gone"))
    _check_budget(config, before, total)
    if not jobs:
        return finished
    progress(0, len(jobs), "")
    with (
        session(config.workers, config.ray_address) as width,
        closing(_chunks(config, jobs, process, width)) as chunks,
    ):
        for chunk in chunks:
            if isinstance(chunk.result, WorkerDiedError):
                rows = _died(config, chunk.name, chunk.items, chunk.result)
            else:
                rows = chunk.result.rows
                for stage, seconds in chunk.result.seconds.items():
                    finished.seconds[stage] = finished.seconds.get(stage, 0.0) + seconds
            finished.rows += rows
            finished.shards.append(chunk.name)
            _check_budget(config, [*before, *finished.rows], total)
            counts = Counter(row.status for row in finished.rows)
            text = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            progress(len({row.asset_id for row in finished.rows}), len(jobs), text)
    return finished


def _chunks(
    config: RefreshConfig, jobs: list[Job], process: str, width: int
) -> Generator[Chunk[Job, Shard], None, None]:
    """Start the work on `width` Ray workers; yields chunks as they finish."""
    gpus = 0.0
    if config.engine == "sparse":
        gpus = gpu_for_each(width, gpu_bytes(max(config.resolutions)))
    cuda = CUDA_BYTES if gpus else 0
    work = partial(
        process_shard,
        absolute_root(config.root),
        settings=config.settings,
        recipe=recipe(config.settings),
        limits=config.limits,
        cuda_bytes=cuda,
        process=process,
    )
    memory = config.worker_bytes + cuda
    return run_chunks(work, jobs, most=config.shard_assets, width=width, memory=memory, gpus=gpus)


def _check_budget(config: RefreshConfig, rows: Sequence[Row], total: int) -> None:
    failed = [row for row in rows if row.status == "failed"]
    if len(failed) <= max(FREE_FAILURES, config.failure_budget * total):
        return
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in failed).items())
    example = failed[-1]
    raise FailureBudgetError(
        f"{len(failed)} of {total} rows failed, more than failure_budget "
        f"{config.failure_budget:g} allows: {reasons}. The last: {example.uris[0]} at "
        f"{example.resolution}: {example.detail[:500]}\nNothing was committed; finished assets are "
        "kept for the next refresh. Mend the cause and refresh with retry_failed, or raise "
        "failure_budget"
    )


def _died(config: RefreshConfig, shard: str, jobs: list[Job], why: WorkerDiedError) -> list[Row]:
    """Return, and stage, the rows of assets that no worker survived."""
    rows = [
        replace(
            base_row(job, resolution, recipe(config.settings), config.limits),
            reason="worker_died",
            detail=str(why),
        )
        for job in jobs
        for resolution in job.resolutions
    ]
    stage_rows(config.root, shard, rows)
    return rows


def _rows_to_put(state: _State, finished: _Finished) -> list[Row]:
    """Return the rows that the new version changes, labelled as the source has them now."""
    rows = {row.key: row for row in state.rows}
    put = [rows[entry.key] for entry in state.plan.of("relabelled")]
    put += [state.staged[entry.key] for entry in state.plan.of("staged")]
    labels = {wanted.asset_id: asdict(wanted) for _, wanted in state.assets}
    return [replace(row, **labels[row.asset_id]) for row in (*put, *finished.rows)]


def _remove_staged(root: str, state: _State, finished: _Finished) -> None:
    filesystem, path = open_filesystem(root)
    for file in (*state.staging_files, *(f"{path}/staging/{s}.parquet" for s in finished.shards)):
        filesystem.delete_file(file)


def _outcomes(rows: Sequence[Row]) -> dict[str, int]:
    names = (f"{row.status}: {row.reason}" if row.reason else row.status for row in rows)
    return dict(Counter(names).most_common())


def _stage_seconds(finished: _Finished) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float, finished.seconds)
    for row in {row.asset_id: row for row in finished.rows}.values():
        seconds["load"] += row.seconds_load or 0.0
        seconds["render"] += row.seconds_render or 0.0
    for row in finished.rows:
        seconds[f"convert-{row.resolution}"] += row.seconds_convert or 0.0
    return dict(seconds)


def _size(root: str, shards: Sequence[str]) -> int:
    filesystem, path = open_filesystem(root)
    files = [list_files(filesystem, f"{path}/shards/{shard}") for shard in shards]
    return sum(info.size for infos in files for info in infos.values())


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
