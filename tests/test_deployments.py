"""The whole product as a user runs it: server, worker, MLflow UI, deployments, schedules, runs."""

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

import psutil
import pytest

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

    def gigashape(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(Path(sys.executable).parent / "gigashape"), *arguments)

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "prefect", *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=PROJECT, capture_output=True, text=True, timeout=600
        )

    def post(self, path: str, body: dict[str, object]) -> list[dict[str, object]]:
        request = urllib.request.Request(
            f"{self.api}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


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


def wait_for_run(services: Services, flow: str) -> str:
    """Return the state in which the first run of a flow to end has ended."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        query = {
            "flows": {"name": {"any_": [flow]}},
            "flow_runs": {
                "state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
            },
        }
        if ended := services.post("flow_runs/filter", query):
            return str(ended[0]["state_type"])
        time.sleep(1)
    return "none after 400 s"


@pytest.mark.timeout(900)
def test_deployments_run_to_completion(services: Services) -> None:
    # Twice: deploying again must change nothing and double nothing.
    for _ in range(2):
        deployed = services.gigashape("deploy")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    deployments = services.post("deployments/filter", {})
    assert {d["name"] for d in deployments} == {"default"}
    assert len(deployments) == len(DEPLOYED)
    schedules = [s for d in deployments for s in d["schedules"]]  # type: ignore[attr-defined]
    assert sorted(s["slug"] for s in schedules) == ["nightly", "weekly"]
    automations = services.post("automations/filter", {})
    assert len(automations) == 2, "the retrain trigger and the zombie automation"

    parameters = {
        "source": "procedural:8",
        "preset": str(PRESET),
        "data": str(services.data),
    }
    refreshed = services.prefect(
        *("deployment", "run", "refresh-dataset/default", "--watch"),
        *("--params", json.dumps(parameters)),
    )
    assert refreshed.returncode == 0, refreshed.stdout + refreshed.stderr

    # Everything in the first version is new, which triggers a retraining by itself.
    assert wait_for_run(services, "retrain") == "COMPLETED"
    retrained = services.prefect(
        *("deployment", "run", "retrain/default", "--watch"),
        *("--params", json.dumps(parameters)),
    )
    assert retrained.returncode == 0, retrained.stdout + retrained.stderr

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
        url = f"{services.mlflow}/api/2.0/mlflow/runs/get?run_id={run_id.group(1)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert json.load(answer)["run"]["info"]["status"] == "FINISHED"


def test_invalid_parameters_are_refused_before_work(services: Services) -> None:
    refused = services.prefect(
        *("deployment", "run", "refresh-dataset/default"),
        *("--params", json.dumps({"failure_budget": 7})),
    )
    assert refused.returncode != 0
    assert "failure_budget" in refused.stdout + refused.stderr
