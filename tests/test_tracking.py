"""Runs and models in a real MLflow store on SQLite, with processes that are really killed."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import trimesh
from PIL import Image
from pydantic import BaseModel

from tasks import tracking
from tasks.reporting import MLflowReport
from tasks.tracking import (
    Run,
    RunBusyError,
    attach,
    reconcile,
    resolve_model,
    resume_run,
    start_run,
)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # MLflow takes seconds to make its tables: they are made once and copied for each test.
    folder = tmp_path_factory.mktemp("store")
    uri = tracking.tracking_uri(folder)
    tracking.reconcile(uri)
    return folder / "mlflow.db"


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tracking.tracking_uri(tmp_path)


def data_of(run: Run):
    return tracking._client(run.uri).get_run(run.run_id)


def history(run: Run, key: str) -> list[tuple[int, float]]:
    found = tracking._client(run.uri).get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in found]


def artifacts(run: Run, folder: str | None = None) -> list[str]:
    return [file.path for file in tracking._client(run.uri).list_artifacts(run.run_id, folder)]


def test_a_run_holds_its_configuration_metrics_and_files(uri: str, tmp_path: Path) -> None:
    class Flow(BaseModel):
        rate: float = 1e-4

    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = 8
        sides: tuple[int, int] = (4, 8)
        flow: Flow = dataclasses.field(default_factory=Flow)

    with start_run("train-vae", "first", uri, params={"model": Config()}, tags={"a": 1}) as run:
        run.log_metrics({"loss/total": 2.0, "rate": 0.5}, step=3)
        run.log_text("<p>hello", "viewer/mesh.html")
        (tmp_path / "mesh.glb").write_bytes(b"glTF")
        run.log_file(tmp_path / "mesh.glb", "meshes")
        run.log_picture("sheet", np.zeros((4, 6, 3), np.uint8))
        run.log_picture("recon/slice", Image.new("RGB", (8, 8)), step=20)
        run.log_picture("recon/slice", Image.new("RGB", (8, 8)), step=20)
        run.log_table([{"asset": "a", "f": 0.5}, {"asset": "b", "f": None}], "scores")
        assert run.status() == "RUNNING"
    found = data_of(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    params = {"model.width": "8", "model.sides": "(4, 8)", "model.flow.rate": "0.0001"}
    assert found.data.params == params
    assert history(run, "loss/total") == [(3, 2.0)]
    assert found.data.tags["a"] == "1"
    assert len(found.data.tags["mlflow.source.git.commit"]) >= 7
    assert sorted(artifacts(run)) == [
        "images",
        "meshes",
        "scores.csv",
        "scores.json",
        "sheet.png",
        "viewer",
    ]
    assert len(artifacts(run, "images")) == 2  # the picture and its thumbnail, once
    folder = tmp_path / "mlflow" / "train-vae" / run.run_id / "artifacts"
    assert json.loads((folder / "scores.json").read_text())[0] == {"asset": "a", "f": 0.5}
    assert (folder / "scores.csv").read_text().splitlines() == ["asset,f", "a,0.5", "b,"]
    assert (folder / "viewer" / "mesh.html").read_text() == "<p>hello"
    page = f"http://x:1/#/experiments/{run.experiment_id}/runs/{run.run_id}?"
    assert run.url("http://x:1/").startswith(page)


def test_a_training_reports_the_meshes_that_are_there(uri: str, tmp_path: Path) -> None:
    told = []
    run = start_run("train-vae", "meshes", uri)
    report = MLflowReport(run.run_id, uri, "vae", 4, lambda *word: told.append(word))
    triangle, nothing = np.array([[0, 1, 2]]), np.zeros((0, 3), np.int64)
    report.meshes(4, {"target": (np.eye(3), triangle), "reconstruction": (np.eye(3), nothing)})
    report.metrics(4, {"loss": 0.25})
    report._system.__exit__(None, None, None)
    assert sorted(artifacts(run, "vae")) == ["vae/step-4-target.glb", "vae/step-4.html"]
    folder = tmp_path / "mlflow" / "train-vae" / run.run_id / "artifacts" / "vae"
    assert len(trimesh.load_mesh(folder / "step-4-target.glb").faces) == 1
    assert "step-4" in (folder / "step-4.html").read_text()
    assert history(run, "vae/loss") == [(4, 0.25)]
    assert told == [(4, 4, "loss 0.2500")]


def test_how_a_run_ends(uri: str) -> None:
    with pytest.raises(ZeroDivisionError), start_run("e", "fails", uri) as failed:
        _ = 1 / 0
    assert failed.status() == "FAILED"
    assert data_of(failed).data.tags["error"].startswith("ZeroDivisionError")
    with pytest.raises(KeyboardInterrupt), start_run("e", "stopped", uri) as stopped:
        raise KeyboardInterrupt
    assert stopped.status() == "KILLED"
    stopped.end("FINISHED")
    assert stopped.status() == "KILLED"  # the first end counts: hooks come later than the flow
    with start_run("e", "outer", uri) as outer, start_run("e", "inner", uri, parent=outer) as inner:
        pass
    assert data_of(inner).data.tags["mlflow.parentRunId"] == outer.run_id


CHILD = """
import pickle, sys, time
from tasks import tracking
parents = pickle.loads(bytes.fromhex(sys.argv[2]))
parents.log_metrics({"from_child": 1.0}, 5)
run = tracking.start_run("train", "killed", sys.argv[1])
for step in range(4):
    run.log_metrics({"loss": 1 / (1 + step), "rate": 0.1}, step)
print(run.run_id, flush=True)
time.sleep(120)
"""


def test_kill_reconcile_resume_without_a_step_twice(uri: str) -> None:
    mine = start_run("e", "parent", uri)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, uri, pickle.dumps(mine).hex()],
        stdout=subprocess.PIPE,
        text=True,
    )
    run_id = process.stdout.readline().strip()
    assert attach(run_id, uri).status() == "RUNNING"
    assert reconcile(uri) == []  # it lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert reconcile(uri) == [run_id]
    assert mine.status() == "RUNNING"  # the child wrote to its parent's run and didn't end it
    assert history(mine, "from_child") == [(5, 1.0)]
    assert attach(run_id, uri).status() == "KILLED"
    assert reconcile(uri) == []

    # The checkpoint was of step 2: steps 2 and 3 are trained again.
    assert resume_run("train", "other", uri) is None
    assert resume_run("other", "killed", uri) is None
    resumed = resume_run("train", "killed", uri)
    assert resumed.run_id == run_id
    assert resumed.last_steps == {"loss": 3, "rate": 3}
    assert reconcile(uri) == []  # it is this process's now
    for step in range(2, 6):
        resumed.log_metrics({"loss": 1 / (1 + step), "new": float(step)}, step)
    assert history(resumed, "loss") == [(s, pytest.approx(1 / (1 + s))) for s in range(6)]
    assert [step for step, _ in history(resumed, "new")] == [2, 3, 4, 5]
    resumed.end()
    assert resumed.status() == "FINISHED"
    assert resume_run("train", "killed", uri) is None  # nothing is left to do


def test_a_run_at_work_is_not_taken_over(uri: str, caplog) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, uri, pickle.dumps(start_run("e", "r", uri)).hex()],
        stdout=subprocess.PIPE,
        text=True,
    )
    run_id = process.stdout.readline().strip()
    with pytest.raises(RunBusyError, match=rf"killed \({run_id}\).* process {process.pid}.*stop"):
        resume_run("train", "killed", uri)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert resume_run("train", "killed", uri).run_id == run_id

    # Of another host nobody here can tell: its machine may be the one that is gone.
    attach(run_id, uri).set_tags({"host": "another"})
    assert resume_run("train", "killed", uri).run_id == run_id
    assert "begun on another" in caplog.text
    with pytest.raises(RunBusyError, match=f"process {os.getpid()}"):
        resume_run("train", "killed", uri)  # this process's own by now


def test_runs_of_another_host_or_a_reused_pid(uri: str) -> None:
    run = start_run("e", "reused", uri)
    run.set_tags({"process_start": 1.0})  # our pid, but another process's start
    elsewhere = start_run("e", "elsewhere", uri)
    assert run.status() == "KILLED"  # start_run reconciles
    elsewhere.set_tags({"host": "another", "pid": 999_999})
    assert reconcile(uri) == []


def test_dataset_is_an_input(uri: str, tmp_path: Path) -> None:
    digest = "ab" * 32
    with start_run("e", "r", uri) as run:
        run.log_dataset("dev", version=7, digest=digest, location=str(tmp_path))
    [found] = data_of(run).inputs.dataset_inputs
    assert found.dataset.name == "dev"
    assert found.dataset.digest == digest[:36]
    assert str(tmp_path) in found.dataset.source
    assert {tag.key: tag.value for tag in found.tags} == {
        "mlflow.data.context": "training",
        "version": "7",
    }
    assert data_of(run).data.tags["dataset.digest"] == digest


def test_models_by_version_and_alias_and_rollback(uri: str, tmp_path: Path) -> None:
    with start_run("e", "r", uri) as run:
        for number in (1, 2):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(bytes([number]) * 10)
            (folder / "config.json").write_text("{}")
            made = tracking.register_model(
                "vae", folder, run, {"dataset.version": number}, aliases=["champion"]
            )
            assert made.version == number
    assert made.run_id == run.run_id
    assert made.tags["dataset.version"] == "2"
    assert "commit" in made.tags
    assert resolve_model("vae@champion", uri) == made
    assert resolve_model("vae/1", uri).aliases == ()

    def champion() -> bytes:
        folder = tracking.download_model("vae@champion", uri, tmp_path / "unused")
        return (folder / "model.safetensors").read_bytes()

    assert champion() == b"\2" * 10
    tracking.set_alias("vae", "champion", 1, uri)
    assert champion() == b"\1" * 10
    assert not (tmp_path / "unused").exists(), "files of a local store are not copied"
    assert [v.aliases for v in tracking.model_versions("vae", uri)] == [("champion",), ()]
    tracking.delete_alias("vae", "champion", uri)
    with pytest.raises(LookupError, match=r"registered are \['vae'\]"):
        resolve_model("vae@champion", uri)
    with pytest.raises(LookupError, match="vae/9"):
        tracking.set_alias("vae", "champion", 9, uri)
    with pytest.raises(LookupError, match="dit@champion"):
        resolve_model("dit@champion", uri)
    with pytest.raises(ValueError, match="NAME@ALIAS or NAME/VERSION"):
        resolve_model("vae", uri)
    assert tracking.model_versions("dit", uri) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        tracking.register_model("vae", tmp_path / "empty", run, {})


def test_system_metrics_are_this_machines_until_the_end(uri: str) -> None:
    wanted = {
        "cpu_utilization_percentage": (0, 100),
        "system_memory_usage_megabytes": (1, psutil.virtual_memory().total / 1e6),
        "system_memory_usage_percentage": (0.1, 100),
        "disk_usage_percentage": (0.01, 100),
    }
    with start_run("e", "r", uri) as run, run.system_metrics(seconds=0.2):
        for _ in range(50):
            time.sleep(0.2)
            if f"system/{next(iter(wanted))}" in data_of(run).data.metrics:
                break
    for name, (least, most) in wanted.items():
        values = [value for _, value in history(run, f"system/{name}")]
        assert values, name
        assert all(least <= value <= most for value in values), (name, values)
    before = len(values)
    time.sleep(0.6)
    assert len(history(run, f"system/{name}")) == before


def test_all_metrics_of_a_step_arrive_together(uri: str) -> None:
    run = start_run("e", "r", uri)
    names = [f"m{i}" for i in range(20)]
    for step in (3, 8):
        run.log_metrics({name: float(i + step) for i, name in enumerate(names)}, step)
    moments = set()
    for i, name in enumerate(names):
        assert history(run, name) == [(3, i + 3.0), (8, i + 8.0)]
        points = tracking._client(run.uri).get_metric_history(run.run_id, name)
        moments |= {(point.step, point.timestamp) for point in points}
    assert len(moments) == 2  # one call a step: a row in the store's charts, whatever their number
