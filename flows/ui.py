"""`gigashape ui`: Prefect's server, a worker and the MLflow UI, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Annotated
from urllib.error import URLError

import typer

from flows.deployments import HEARTBEAT_SECONDS, POOL

START_SECONDS = 180.0  # a busy laptop needs half a minute for Prefect's server


def check_port_free(port: int, service: str, option: str) -> None:
    """Exit with a message when another program listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            typer.echo(
                f"error: port {port}, wanted for {service}, is taken. Stop what uses it, or choose "
                f"another with {option}.",
                err=True,
            )
            raise typer.Exit(1) from None


def wait_until_up(url: str, process: subprocess.Popen[bytes], service: str) -> None:
    """Return once a URL answers; exit when its process ends or 180 s have passed."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            typer.echo(f"error: {service} ended with status {process.returncode}.", err=True)
            raise typer.Exit(1)
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    typer.echo(f"error: {service} did not answer at {url} in {START_SECONDS:.0f} s.", err=True)
    raise typer.Exit(1)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Stop process groups, the last started first: a worker ignores signals without its server."""
    for process in reversed(processes):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def serve_ui(
    data: Annotated[
        Path, typer.Option(help="Data folder of the MLflow UI, and of runs that name none")
    ] = Path("data"),
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's server and UI")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI")] = 5000,
) -> None:
    """Start Prefect's server, a worker and the MLflow UI; Ctrl-C stops all of them."""
    check_port_free(prefect_port, "Prefect's server", "--prefect-port")
    check_port_free(mlflow_port, "the MLflow UI", "--mlflow-port")
    data = data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    prefect_url = f"http://127.0.0.1:{prefect_port}"
    mlflow_url = f"http://127.0.0.1:{mlflow_port}"
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # not 10: one worker asks a server beside it
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GIGASHAPE_MLFLOW_UI": mlflow_url,
        "GIGASHAPE_DATA": str(data),
    }
    database = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{data / 'mlflow.db'}")
    python = [sys.executable, "-m"]
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        # A group of its own: Ctrl-C reaches only us, and we stop them in order.
        process = subprocess.Popen([*python, *command], env=environment, start_new_session=True)
        processes.append(process)
        return process

    # SIGTERM (a service manager's stop) ends like Ctrl-C, and a shell that starts us in the
    # background has made us ignore SIGINT.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        server = start(
            "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)
        )
        mlflow = start(
            *("mlflow", "ui", "--host", "127.0.0.1", "--port", str(mlflow_port)),
            # One process, not four: they take a GB of a laptop, and threads serve one person.
            *("--backend-store-uri", database, "--workers", "1"),
        )
        wait_until_up(f"{prefect_url}/api/health", server, "Prefect's server")
        wait_until_up(f"{mlflow_url}/health", mlflow, "the MLflow UI")
        start("prefect", "worker", "start", "--pool", POOL, "--type", "process")
        typer.echo(
            f"\nPrefect  {prefect_url}\nMLflow   {mlflow_url}\nworker   pool {POOL}\n\n"
            "Deploy, then run, from another shell:\n"
            f"  export PREFECT_API_URL={prefect_url}/api\n"
            "  make deploy\n"
            "  .venv/bin/prefect deployment run refresh-dataset/default --watch\n\n"
            "Ctrl-C stops all of them."
        )
        while all(process.poll() is None for process in processes):
            time.sleep(1)
        typer.echo("error: one of the services ended by itself; stopping the others.", err=True)
        raise typer.Exit(1)
    except KeyboardInterrupt:
        typer.echo("Stopping.")
    finally:
        stop(processes)
