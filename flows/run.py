"""What every flow does around its work: one MLflow run, a link to it in Prefect, a Ray session."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run

from tasks import tracking
from tasks.mirror import read_mirror
from tasks.ray_work import session
from tasks.tracking import Run

MLFLOW_UI = "http://127.0.0.1:5000"  # where `make ui` serves it; GIGASHAPE_MLFLOW_UI says otherwise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of a flow, its page, and the runs of flows called inside."""

    run: Run
    experiment: str
    name: str
    url: str
    children: list["Tracked"] = field(default_factory=list)


_parent: ContextVar[Tracked | None] = ContextVar("parent", default=None)


def data_root(data: str | None) -> str:
    """Return the data folder as an absolute path: Ray's workers run in folders of their own.

    None takes GIGASHAPE_DATA, which `gigashape ui` sets for its worker, else `data`.
    """
    data = data or os.environ.get("GIGASHAPE_DATA", "data")
    return data if "://" in data else str(Path(data).resolve())


def preset_of(data: str, preset: str | None) -> str:
    """Return a preset's name or absolute path; None takes that of the data folder's last refresh.

    Before the first one it is `tiny`.
    """
    if preset is None:
        mirror = read_mirror(data)
        return mirror.preset if mirror else "tiny"
    return str(Path(preset).resolve()) if preset.endswith(".toml") else preset


@contextmanager
def tracked(
    experiment: str,
    name: str,
    data: str,
    params: Mapping[str, object],
    resume: bool = False,
) -> Iterator[Tracked]:
    """Open the one MLflow run of a flow, and a Ray session for its work.

    It ends FINISHED, FAILED on an exception, KILLED on a cancellation. Flows called inside become
    its children. resume: continue the unfinished run of that name, if there is one; the name must
    then stand for data and configuration. Raises RunBusyError when another process is at it.
    """
    uri = tracking.tracking_uri(data)
    parent = _parent.get()
    tags = {"prefect.flow_run_id": flow_run.id, "prefect.flow_run_name": flow_run.name}
    run = tracking.resume_run(experiment, name, uri) if resume else None
    if run is not None:
        logger.info("continuing MLflow run %s (%s)", name, run.run_id)
    else:
        run = tracking.start_run(
            experiment, name, uri, params, tags, parent.run if parent else None
        )
    url = run.url(os.environ.get("GIGASHAPE_MLFLOW_UI", MLFLOW_UI))
    logger.info("MLflow run %s / %s: %s", experiment, name, url)
    create_link_artifact(url, f"MLflow: {experiment} / {name}", key="mlflow-run")
    opened = Tracked(run, experiment, name, url)
    if parent is not None:
        parent.children.append(opened)
    token = _parent.set(opened)
    try:
        with run, session():
            yield opened
    finally:
        _parent.reset(token)


def close_runs(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """End the MLflow runs that a cancelled or killed flow left open: a hook for Prefect's runner.

    The runner calls it once the flow's process is gone, which may not have had the time to.
    """
    uri = tracking.tracking_uri(data_root(flow_run.parameters.get("data")))
    log = flow_run_logger(flow_run, flow)
    for run_id in tracking.reconcile(uri):
        log.warning("%s: ended MLflow run %s, whose process is gone", state.name, run_id)


def publish(key: str, markdown: str) -> None:
    """Leave a Markdown artifact on the flow run's page."""
    create_markdown_artifact(markdown, key=key)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as a Markdown table; the columns are the first row's."""
    if not rows:
        return "(none)"
    columns = list(rows[0])
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        cells = (row[column] for column in columns)
        lines.append(" | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    return "\n".join(f"| {line} |" for line in lines)
