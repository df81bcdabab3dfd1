"""The whole product as a user runs it: server, worker, MLflow UI, deployments, schedules, runs."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

PROJECT = Path(__file__).resolve().parent.parent
PRESET = PROJECT / "tests" / "minute.toml"
DEPLOYED = {
    "refresh-dataset",
    "train-vae",
    "encode-latents",
    "train-dit",
    "evaluate",
    "generate",
    "retrain",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Services:
    data: Path
    environment: dict[str, str]
    api: str
    mlflow: str

    def deploy(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [Path(sys.executable).parent / "gigashape", "deploy"],
            env=self.environment,
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "prefect", *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=PROJECT, capture_output=True, text=True, timeout=600
        )

    def post(self, path: str, body: dict[str, object]) -> Any:
        request = urllib.request.Request(
            f"{self.api}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def get(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"{self.api}/{path}", timeout=30) as answer:
            return json.load(answer)

    def ray_processes(self) -> list[psutil.Process]:
        """Ray's processes that a run on these services started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("PREFECT_API_URL") == self.api
                if ours and "ray" in " ".join(process.cmdline()).lower():
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    root = tmp_path_factory.mktemp("ui")
    prefect_port, mlflow_port = free_port(), free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
    }
    log = root / "ui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "gigashape"),
                *("ui", "--data", str(root / "data")),
                *("--prefect-port", str(prefect_port), "--mlflow-port", str(mlflow_port)),
            ],
            env=environment,
            cwd=PROJECT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 150
        while "Ctrl-C stops all" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        yield Services(
            root / "data",
            environment,
            environment["PREFECT_API_URL"],
            f"http://127.0.0.1:{mlflow_port}",
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, f"Ctrl-C left {alive}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def first_run(services: Services, flow: str, states: tuple[str, ...]) -> dict[str, object]:
    """Return the first run of a flow in one of some states, once there is one."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        query = {
            "flows": {"name": {"any_": [flow]}},
            "flow_runs": {"state": {"type": {"any_": states}}},
        }
        if found := services.post("flow_runs/filter", query):
            return found[0]
        time.sleep(1)
    raise AssertionError(f"no run of {flow} is one of {states} after 400 s")


def wait_until_deployed(deploying: subprocess.Popen[str]) -> None:
    output, _ = deploying.communicate(timeout=200)
    assert deploying.returncode == 0, output


@pytest.fixture(scope="module")
def retrained(services: Services) -> dict[str, object]:
    """Everything is deployed, a refresh has run, and the retraining that it triggered."""
    wait_until_deployed(services.deploy())
    parameters = {"source": "procedural:8", "preset": str(PRESET), "workers": 1}
    refreshed = services.prefect(
        *("deployment", "run", "refresh-dataset/default", "--watch"),
        *("--params", json.dumps(parameters)),
    )
    assert refreshed.returncode == 0, refreshed.stdout + refreshed.stderr
    # Everything in the first version is new, which triggers a retraining by itself.
    first_run(services, "retrain", ("RUNNING", *ENDED))
    # Deploying again, meanwhile, must change nothing and double nothing.
    wait_until_deployed(services.deploy())
    return first_run(services, "retrain", ENDED)


@pytest.mark.timeout(600)
def test_deployments_run_to_completion(services: Services, retrained: dict[str, object]) -> None:
    assert retrained["state_type"] == "COMPLETED"
    # Source and preset are those of the last refresh, the data folder that of `gigashape ui`.
    again = services.prefect("deployment", "run", "retrain/default", "--watch")
    assert again.returncode == 0, again.stdout + again.stderr
    client = MlflowClient(services.mlflow)
    (experiment,) = client.search_experiments(filter_string="name = 'retrain'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    for run in runs:
        for kind in ("vae", "transformers"):
            assert "champion already" in run.data.tags[f"decision.{kind}"]
    deployments = services.post("deployments/filter", {})
    assert {d["name"] for d in deployments} == {"default"}
    assert len(deployments) == len(DEPLOYED)
    schedules = [s for d in deployments for s in d["schedules"]]  # type: ignore[attr-defined]
    assert sorted(s["slug"] for s in schedules) == ["nightly", "weekly"]
    automations = services.post("automations/filter", {})
    assert len(automations) == 2, "the retrain trigger and the zombie automation"
    # The scheduler really makes the runs that the schedules promise.
    scheduled = services.post(
        "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    )
    assert len(scheduled) >= 2
    artifacts = services.post("artifacts/filter", {})
    links = [a["data"] for a in artifacts if "mlflow-run" in str(a["key"])]
    assert links
    for link in links:
        run_id = re.search(r"runs/([0-9a-f]+)", str(link))
        assert run_id, link
        run = client.get_run(run_id.group(1))
        assert run.info.status == "FINISHED"


def start_training(services: Services, preset: Path) -> str:
    """Start a training through its deployment; return the flow run once it has a checkpoint."""
    before = set((services.data / "training").glob("vae-*/step-*"))
    deployment = services.get("deployments/name/train-vae/default")["id"]
    started = services.post(
        f"deployments/{deployment}/create_flow_run", {"parameters": {"preset": str(preset)}}
    )
    deadline = time.monotonic() + 120
    while before.issuperset((services.data / "training").glob("vae-*/step-*")):
        assert time.monotonic() < deadline, "no checkpoint after 120 s"
        time.sleep(0.5)
    assert services.ray_processes()
    return str(started["id"])


def mlflow_run(services: Services) -> MlflowRun:
    """Return the newest run of train-vae."""
    client = MlflowClient(services.mlflow)
    (experiment,) = client.search_experiments(filter_string="name = 'train-vae'")
    return client.search_runs([experiment.experiment_id])[0]


def wait_until_ended(services: Services, flow_run: str, state: str) -> None:
    deadline = time.monotonic() + 90
    while (run := services.get(f"flow_runs/{flow_run}"))["state_type"] != state:
        assert time.monotonic() < deadline, run["state_type"]
        time.sleep(0.5)
    while services.ray_processes():
        assert time.monotonic() < deadline, services.ray_processes()
        time.sleep(0.5)
    while (status := mlflow_run(services).info.status) != "KILLED":  # Prefect's hook may come last
        assert time.monotonic() < deadline, status
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_a_training_that_is_killed_or_cancelled_leaves_nothing_running(
    services: Services, retrained: dict[str, object], tmp_path: Path
) -> None:
    endless = tmp_path / "endless.toml"
    endless.write_text(PRESET.read_text().replace("steps = 6", "steps = 1_000_000", 1))
    flow_run = start_training(services, endless)
    killed = mlflow_run(services)
    os.kill(int(killed.data.tags["pid"]), signal.SIGKILL)
    wait_until_ended(services, flow_run, "CRASHED")
    flow_run = start_training(services, endless)
    assert mlflow_run(services).info.run_id == killed.info.run_id, "it continues its run"
    services.post(f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until_ended(services, flow_run, "CANCELLED")


def test_invalid_parameters_are_refused_before_work(services: Services) -> None:
    refused = services.prefect(
        *("deployment", "run", "refresh-dataset/default"),
        *("--params", json.dumps({"failure_budget": 7})),
    )
    assert refused.returncode != 0
    assert "failure_budget" in refused.stdout + refused.stderr
