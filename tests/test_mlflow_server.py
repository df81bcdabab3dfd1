"""A registry behind a real MLflow server, whose artifacts come over HTTP."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from tasks import checkpoint, models
from tasks.presets import load_preset
from tasks.tracking import start_run

PRESET = load_preset(str(Path(__file__).parent / "minute.toml"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(port), "--workers", "1", "--serve-artifacts"),
                *("--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"),
                *("--artifacts-destination", str(tmp_path / "artifacts")),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_model_is_fetched_once_a_machine(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "worker"))
    (tmp_path / "worker").mkdir()
    weights = {"weight": torch.tensor([3.0])}
    state = {"step": 1, "stage": "vae", "description": {"model": asdict(PRESET.vae)}}
    path = checkpoint.save(tmp_path / "checkpoints", state, weights, weights, {}, 1)
    with start_run("train-vae", "vae", server) as run:
        registered = models.register(PRESET, "vae", path, run, {})
    assert registered.tags["weights"] == checkpoint.load(path).state["files"]["ema.safetensors"]

    version = models.resolve_vae(PRESET, server, "gigashape-minute-vae@champion")
    files = pickle.loads(pickle.dumps(models.model_files(version, server)))
    folder = files.folder()
    assert folder.is_relative_to(tmp_path / "worker")
    assert sorted(file.name for file in folder.iterdir()) == ["ema.safetensors", "state.json"]
    assert checkpoint.load(folder).weights(ema=True) == weights
    assert list(folder.parent.iterdir()) == [folder], "nothing but the whole model is left"

    # The second time nothing is asked of the server: its files would be gone.
    (path.parent.parent / "artifacts").rename(tmp_path / "elsewhere")
    before = folder.stat().st_mtime_ns
    assert files.folder() == folder
    assert folder.stat().st_mtime_ns == before
