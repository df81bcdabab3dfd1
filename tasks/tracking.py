"""MLflow: runs, pictures, dataset inputs, and the registry of models. No other module imports it.

Every call names its store and its run, so that it works from any process: nothing here touches
MLflow's active run, which a child process would end for its parent. The import takes seconds: do it
inside the function that needs it.
"""

import getpass
import json
import logging
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # "1" is not accepted
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # flows log their run's

import mlflow.artifacts
import numpy as np
import pandas as pd
import psutil
from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

# Hundreds of lines about tables it creates, two at the start of every run, one a model on a server.
for _name in (
    "alembic",
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.system_metrics",
):
    logging.getLogger(_name).setLevel(logging.WARNING)

DIGEST_CHARACTERS = 36  # what MLflow stores of a dataset's digest
PARAMS_A_BATCH = 100

logger = logging.getLogger(__name__)


class RunBusyError(RuntimeError):
    """A run that was to be resumed is another process's, which is alive."""


def tracking_uri(data: Path | str) -> str:
    """Return the store of a data folder: MLFLOW_TRACKING_URI, else SQLite in that folder."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in str(data):
        raise ValueError(
            f"the data folder is {data}, where MLflow's SQLite can't be: set MLFLOW_TRACKING_URI "
            "to a server"
        )
    folder = Path(data).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


@lru_cache
def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment_id(uri: str, name: str) -> str:
    """Return the id of an experiment, made where it does not exist.

    Artifacts of a SQLite store go to mlflow/ beside it; a server decides for itself.
    """
    client = _client(uri)
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlflow" / name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id  # another process was first


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings, dataclasses and pydantic models to dotted keys and text."""
    if hasattr(config, "model_dump"):
        config = config.model_dump()
    elif is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping):
        return {prefix: str(config)}
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def git_commit() -> str:
    """Return the commit of this code, with `-dirty` where files differ, or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return "unknown"
    return done.stdout.strip()


@dataclass
class Run:
    """One MLflow run, by its id; can be pickled and used in another process.

    As a context it ends the run: FINISHED, FAILED on an exception, KILLED on an interrupt.
    last_steps: the last step logged of each metric, so that none is logged twice.
    """

    run_id: str
    experiment_id: str
    uri: str
    last_steps: dict[str, int] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.end()
        else:
            self.set_tags({"error": f"{type(error).__name__}: {error}"[:4000]})
            self.end("FAILED" if isinstance(error, Exception) else "KILLED")

    def end(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; a run that has ended keeps its status."""
        if self.status() == "RUNNING":
            _client(self.uri).set_terminated(self.run_id, status)

    def status(self) -> str:
        """Return RUNNING, FINISHED, FAILED or KILLED."""
        return str(_client(self.uri).get_run(self.run_id).info.status)

    def url(self, ui: str) -> str:
        """Return the run's page under the address of an MLflow UI, http://host:port."""
        page = f"{ui.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{page}?workflowType=machine_learning"  # or else the menus are those of chat agents

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, old values replaced."""
        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        _client(self.uri).log_batch(self.run_id, tags=entities, synchronous=True)

    def log_params(self, config: Any) -> None:
        """Log a configuration (nested mapping, dataclass or pydantic model) by dotted keys.

        Raises MlflowException where a key is there already with another value.
        """
        entities = [Param(key, value) for key, value in flatten(config).items()]
        for start in range(0, len(entities), PARAMS_A_BATCH):
            batch = entities[start : start + PARAMS_A_BATCH]
            _client(self.uri).log_batch(self.run_id, params=batch, synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step in one call; those already logged at or after it are dropped.

        A training that resumes from a checkpoint repeats the steps after it, with equal values.
        """
        now = int(time.time() * 1000)
        fresh = {k: float(v) for k, v in metrics.items() if step > self.last_steps.get(k, -1)}
        if fresh:
            entities = [Metric(key, value, now, step) for key, value in fresh.items()]
            _client(self.uri).log_batch(self.run_id, metrics=entities, synchronous=True)
            self.last_steps.update(dict.fromkeys(fresh, step))

    def log_picture(
        self, name: str, image: np.ndarray | Image.Image, step: int | None = None
    ) -> None:
        """Log a picture (PIL, or [H, W, 3 or 4] uint8).

        With a step it is one of a series, which the UI shows with a slider, once a step; without,
        it is the artifact NAME.png.
        """
        client = _client(self.uri)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image, np.uint8))
        if step is None:
            client.log_image(self.run_id, image, artifact_file=f"{name}.png", synchronous=True)
            return
        start = f"images/{name.replace('/', '~')}+step+{step}+"
        if any(
            file.path.startswith(start) for file in client.list_artifacts(self.run_id, "images")
        ):
            return
        client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def log_text(self, text: str, file: str) -> None:
        """Log text, such as Markdown or an HTML page, as the artifact `file`."""
        _client(self.uri).log_text(self.run_id, text, file)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as an artifact, in a folder of the run's artifacts."""
        _client(self.uri).log_artifact(self.run_id, str(path), folder)

    def log_table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Log rows as NAME.csv, which the UI shows as a table, and NAME.json; old ones go."""
        self.log_text(pd.DataFrame(rows).to_csv(index=False), f"{name}.csv")
        self.log_text(json.dumps(list(rows), indent=1, default=str), f"{name}.json")

    def log_dataset(
        self, name: str, version: int, digest: str, location: str, context: str = "training"
    ) -> None:
        """Log a dataset version as the run's input. location: a folder or an address like s3://."""
        local = "://" not in location
        source = LocalArtifactDatasetSource(location) if local else resolve_dataset_source(location)
        dataset = MetaDataset(source, name=name, digest=digest[:DIGEST_CHARACTERS])  # type: ignore[abstract]
        tags = [InputTag("mlflow.data.context", context), InputTag("version", str(version))]
        entity = DatasetInput(dataset=dataset._to_mlflow_entity(), tags=tags)
        _client(self.uri).log_inputs(self.run_id, [entity])
        self.set_tags({"dataset.name": name, "dataset.version": version, "dataset.digest": digest})

    @contextmanager
    def system_metrics(self, seconds: float = 10.0) -> Iterator[None]:
        """Log this machine's processor, memory, disk, network and GPU every so many seconds."""
        monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=self.uri
        )
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


def start_run(
    experiment: str,
    name: str,
    uri: str,
    params: Any = None,
    tags: Mapping[str, object] | None = None,
    parent: Run | None = None,
) -> Run:
    """Start a run in an experiment, after ending those whose process is dead (`reconcile`).

    Tags say who runs it (host, pid, start of the process), the commit, and the parent run.
    """
    reconcile(uri)
    all_tags = {
        **_process_tags(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": experiment,
        "mlflow.source.git.commit": git_commit(),
        **({"mlflow.parentRunId": parent.run_id} if parent else {}),
        **(tags or {}),
    }
    experiment_id = _experiment_id(uri, experiment)
    texts = {key: str(value) for key, value in all_tags.items()}
    made = _client(uri).create_run(experiment_id, run_name=name, tags=texts)
    run = Run(made.info.run_id, experiment_id, uri)
    if params is not None:
        run.log_params(params)
    return run


def attach(run_id: str, uri: str) -> Run:
    """Return a run that exists, knowing what it has logged, to add to it from this process."""
    found = _client(uri).get_run(run_id)
    # Public calls give a metric's last value without its step, or its whole history.
    last_steps = {metric.key: metric.step for metric in found.data._metric_objs}
    return Run(run_id, found.info.experiment_id, uri, last_steps)


def resume_run(experiment: str, name: str, uri: str) -> Run | None:
    """Make the newest run of that name this process's own, RUNNING again; None if it finished.

    None too where there is no such run. Raises RunBusyError when its process is alive on this host;
    a run of another host is taken over, since nobody here can tell.
    """
    client = _client(uri)
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return None
    quoted = name.replace("'", "''")
    filters = f"attributes.run_name = '{quoted}'"
    runs = client.search_runs([known.experiment_id], filters, max_results=1)
    if not runs or runs[0].info.status == "FINISHED":
        return None
    tags, run_id = runs[0].data.tags, runs[0].info.run_id
    here = tags.get("host") == socket.gethostname() and "process_start" in tags
    if runs[0].info.status == "RUNNING":
        if here and _is_alive(int(tags["pid"]), float(tags["process_start"])):
            raise RunBusyError(
                f"MLflow run {name} ({run_id}) of {experiment} is at work in process "
                f"{tags['pid']} on this machine: wait for it to end, or stop it, then start again"
            )
        if not here:
            logger.warning("taking over run %s (%s), begun on %s", name, run_id, tags.get("host"))
    client.update_run(run_id, status="RUNNING")
    run = attach(run_id, uri)
    run.set_tags(_process_tags())
    return run


def _process_tags() -> dict[str, object]:
    process = psutil.Process()
    start = process.create_time()
    return {"host": socket.gethostname(), "pid": process.pid, "process_start": start}


def reconcile(uri: str) -> list[str]:
    """End as KILLED the runs that say RUNNING though their process on this host is gone.

    kill -9 leaves such runs. Runs of other hosts are left alone: nobody here can tell. Returns ids.
    """
    client = _client(uri)
    ended = []
    for experiment in client.search_experiments():
        running = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
        for run in running:
            tags = run.data.tags
            if tags.get("host") != socket.gethostname() or "process_start" not in tags:
                continue
            if not _is_alive(int(tags["pid"]), float(tags["process_start"])):
                client.set_terminated(run.info.run_id, "KILLED")
                ended.append(run.info.run_id)
    return ended


def _is_alive(pid: int, start: float) -> bool:
    """Tell whether the process lives and is not another one that was given its number."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start) < 2.0  # seconds; the clock may be adjusted
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class ModelVersion:
    """A registered model: where it comes from and what it is called.

    tags: what it was registered with: dataset version and digest, configuration digest, commit.
    """

    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def register_model(
    name: str,
    folder: Path,
    run: Run,
    tags: Mapping[str, object],
    aliases: Sequence[str] = (),
) -> ModelVersion:
    """Register a folder of files, made in a run, as the next version of the model `name`.

    The tag `commit` is added. An alias moves here from the version that had it.
    """
    client = _client(run.uri)
    if not any(folder.iterdir()):
        raise ValueError(f"{folder} is empty: a model is the files to load it from")
    texts = {"commit": git_commit(), **{key: str(value) for key, value in tags.items()}}
    logged = client.create_logged_model(
        run.experiment_id, name=name, source_run_id=run.run_id, tags=texts
    )
    try:
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run.run_id,
        tags=texts,
        model_id=logged.model_id,
    )
    for alias in aliases:
        client.set_registered_model_alias(name, alias, made.version)
    return resolve_model(f"{name}/{made.version}", run.uri)


def set_alias(name: str, alias: str, version: int, uri: str) -> None:
    """Point an alias at a version of a model; a rollback points `champion` at an earlier one."""
    resolve_model(f"{name}/{version}", uri)
    _client(uri).set_registered_model_alias(name, alias, str(version))


def delete_alias(name: str, alias: str, uri: str) -> None:
    """Take an alias off a model."""
    _client(uri).delete_registered_model_alias(name, alias)


def model_versions(name: str, uri: str) -> list[ModelVersion]:
    """Return all versions of a model, oldest first; none when it isn't registered."""
    quoted = name.replace("'", "''")
    found = _client(uri).search_model_versions(f"name = '{quoted}'")
    numbers = sorted(int(version.version) for version in found)
    return [resolve_model(f"{name}/{number}", uri) for number in numbers]


def resolve_model(reference: str, uri: str) -> ModelVersion:
    """Return what NAME@ALIAS or NAME/VERSION stands for.

    Raises ValueError for another form, LookupError when there is no such model.
    """
    match = re.fullmatch(r"(?P<name>[^@/]+)(@(?P<alias>[^@/]+)|/(?P<version>\d+))", reference)
    if not match:
        raise ValueError(
            f"model {reference!r}: expected NAME@ALIAS or NAME/VERSION, as vae@champion"
        )
    client, name = _client(uri), match["name"]
    try:
        if match["alias"]:
            number = client.get_model_version_by_alias(name, match["alias"]).version
        else:
            number = match["version"]
        # By number: only this answer lists the aliases.
        found = client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = [model.name for model in client.search_registered_models()]
        raise LookupError(
            f"no model {reference!r} in {uri} ({error.message}); registered are {known}: "
            "train one, or set the alias"
        ) from error
    return ModelVersion(
        name, int(found.version), found.run_id or "", tuple(sorted(found.aliases)), dict(found.tags)
    )


def download_model(reference: str, uri: str, cache: Path) -> Path:
    """Return a folder with the files of a model: its own in a local store, otherwise `cache`.

    cache: a folder that stands for these files alone; the first call fills it, whole or not at all.
    """
    if cache.is_dir():
        return cache
    found = resolve_model(reference, uri)
    # By its place: given a models:/ address, MLflow looks in its global store whatever is passed.
    place = _client(uri).get_model_version_download_uri(found.name, str(found.version))
    if urlparse(place).scheme in ("", "file"):
        return Path(mlflow.artifacts.download_artifacts(place, tracking_uri=uri))
    cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache.parent) as partial:
        place = mlflow.artifacts.download_artifacts(place, tracking_uri=uri, dst_path=partial)
        try:
            Path(place).rename(cache)
        except OSError:  # another process was first
            if not cache.is_dir():
                raise
    return cache
