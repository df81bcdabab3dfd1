"""`refresh-dataset`: make the newest dataset version mirror a source of meshes."""

import logging
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from prefect import flow
from prefect.events import emit_event
from prefect.runtime import flow_run
from pydantic import Field

from flows.progress import Progress
from flows.run import close_runs, data_root, markdown_table, preset_of, publish, tracked
from tasks.dataset import log_summary
from tasks.mirror import Mirror, read_mirror, write_mirror
from tasks.presets import load_preset
from tasks.refresh import RefreshConfig, plan_refresh, refresh
from tasks.sources import absolute_spec

logger = logging.getLogger(__name__)
Engine = Literal["sparse", "mesh2sdf"]
LOGGED_FAILURES = 50  # one by one; the MLflow run's table has all


@dataclass(frozen=True)
class Refreshed:
    """What a refresh left. changed_share: of the assets and resolutions, in [0, 1]."""

    version: int
    version_name: str
    changed_share: float
    outcomes: dict[str, int]
    url: str


@flow(name="refresh-dataset", on_cancellation=[close_runs], on_crashed=[close_runs])
def refresh_dataset(
    source: str | None = None,
    preset: str | None = None,
    data: str | None = None,
    resolutions: list[Annotated[int, Field(ge=32, le=2048, multiple_of=8)]] | None = None,
    engine: Engine | None = None,
    plan: bool = False,
    workers: Annotated[int, Field(ge=0)] = 0,
    asset_seconds: Annotated[float, Field(gt=0)] = 900.0,
    asset_gigabytes: Annotated[float, Field(gt=0)] | None = None,
    failure_budget: Annotated[float, Field(ge=0, le=1)] = 0.2,
    retry_failed: bool = False,
    retrain_share: Annotated[float, Field(gt=0, le=1)] = 0.1,
    licences: list[str] | None = None,
) -> Refreshed | None:
    """Bring a dataset up to date with its source: only what is new, changed or stale is worked on.

    Each asset is parsed, checked, scaled to 0.95 of [-1, 1], rendered, made watertight and stored
    as a sparse signed distance field. A broken asset becomes a row with a reason. The result is a
    new, immutable dataset version; a refresh that is killed leaves the last one and resumes.

    A data folder mirrors one source: what is not in it goes. What is left out here is as the
    folder's last refresh had it, so that a schedule needs no parameters; at first, as the preset
    has it.

    Args:
        source: where assets come from: folder:PATH (any depth; glb, gltf, obj, ply, stl, off, dae,
            3mf), procedural:COUNT, objaverse:FILE_OR_UIDS, shapenet:PATH.
        preset: tiny, small, paper, or the path of a .toml file.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        resolutions: voxels along an axis, multiples of 8 from 32 to 2048.
        engine: conversion engine; mesh2sdf needs minutes a mesh and 256 at most.
        plan: only say what is new, changed, stale or gone, and why.
        workers: assets worked on at once; 0 takes one a core.
        asset_seconds: time limit of an asset, in seconds.
        asset_gigabytes: memory limit of an asset, in GiB, which Ray sets aside for each at work;
            None takes 1.5 up to resolution 256, 2 to 512, 4 to 1024, 8 above, 3 for mesh2sdf. A
            worker that uses a GPU is given one more, for CUDA.
        failure_budget: share of rows that may crash or exceed their limits before the refresh
            stops with an error, 0 to 1. Rejected assets do not count.
        retry_failed: try again what crashed or exceeded its limits before.
        retrain_share: share of changed rows from which on `retrain` is triggered, above 0 to 1.
        licences: only assets under these licences, as the source names them; an empty list is all.
    """
    data = data_root(data)
    chosen = choose(data, source, preset, resolutions, engine, licences)
    sizes = load_preset(chosen.preset)
    config = RefreshConfig(
        root=data,
        source=chosen.source,
        resolutions=chosen.resolutions,
        engine=chosen.engine,
        views=sizes.data.views,
        view_size=sizes.data.view_size,
        held_out=sizes.data.held_out,
        seconds=asset_seconds,
        bytes=int(asset_gigabytes * 2**30) if asset_gigabytes else None,
        workers=workers,
        failure_budget=failure_budget,
        retry_failed=retry_failed,
        licences=chosen.licences,
    )
    if plan:
        table = plan_refresh(config).table()
        print(table)  # noqa: T201 - what was asked for
        publish("refresh-plan", f"```\n{table}\n```")
        return None
    with tracked("refresh-dataset", config.source, data, {"config": config}) as tracking:
        with Progress("refresh", "asset") as bar:
            report = refresh(config, bar.update)
        write_mirror(data, chosen)
        logger.info("plan:\n%s", report.plan.table())
        log_summary(tracking.run, report)
        outcomes = [{"outcome": name, "rows": rows} for name, rows in report.outcomes.items()]
        not_ready = [row for row in report.version.rows() if row.status != "ready"]
        explained = [
            {"asset": r.uris[0], "resolution": r.resolution, "reason": r.reason, "detail": r.detail}
            for r in not_ready[:LOGGED_FAILURES]
        ]
        for row in not_ready[:LOGGED_FAILURES]:
            logger.warning(
                "%s at %d: %s: %s: %s",
                *(row.uris[0], row.resolution, row.status, row.reason, row.detail),
            )
        if len(not_ready) > LOGGED_FAILURES:
            logger.warning(
                "and %d more: table not_ready of the MLflow run", len(not_ready) - LOGGED_FAILURES
            )
        publish("refresh-outcomes", f"{markdown_table(outcomes)}\n\n{markdown_table(explained)}")
        logger.info(
            "dataset version %s: %s%s",
            report.version.name,
            ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items()),
            " (nothing changed: the last version is kept)"
            if report.version.number == report.previous.number
            else "",
        )
        alone = flow_run.parent_flow_run_id is None  # a retraining refreshes for itself
        if alone and report.changed_share >= retrain_share:
            emit_event(
                "gigashape.dataset.drifted",
                {"prefect.resource.id": f"gigashape.dataset.{report.version.digest[:12]}"},
                payload={
                    "changed_share": report.changed_share,
                    "version": report.version.number,
                    "preset": chosen.preset,
                    "data": data,
                },
            )
        return Refreshed(
            report.version.number,
            report.version.name,
            report.changed_share,
            report.outcomes,
            tracking.url,
        )


def choose(
    data: str,
    source: str | None = None,
    preset: str | None = None,
    resolutions: list[int] | None = None,
    engine: Engine | None = None,
    licences: list[str] | None = None,
) -> Mirror:
    """Return what is asked for; what is not, as the last refresh had it, else the preset.

    Resolutions and engine of the last refresh stand for its preset, so another one brings its own.
    """
    last = read_mirror(data)
    name = preset_of(data, preset)
    own = load_preset(name).data
    same_preset = last is not None and last.preset == name
    chosen = Mirror(
        last.source if last else own.source,
        name,
        last.resolutions if last and same_preset else own.resolutions,
        last.engine if last and same_preset else own.engine,
        last.licences if last else None,
    )
    if source is not None:
        chosen = replace(chosen, source=source)
    if resolutions is not None:
        chosen = replace(chosen, resolutions=tuple(resolutions))
    if engine is not None:
        chosen = replace(chosen, engine=engine)
    if licences is not None:
        chosen = replace(chosen, licences=tuple(licences) or None)
    return replace(chosen, source=absolute_spec(chosen.source))
