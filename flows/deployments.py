"""`gigashape deploy`: the work pool, its queues, the zombie automation, then all of prefect.yaml.

Running it again is safe: it brings a server to what prefect.yaml says, schedules that were removed
from the file included.
"""

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import typer
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

POOL = "gigashape"
QUEUES = {"data": None, "training": 1}  # name: how many runs at once
ZOMBIE_AUTOMATION = "gigashape: crash runs without a heartbeat"
HEARTBEAT_SECONDS = 180  # set for workers by `gigashape ui`
PROJECT = Path(__file__).resolve().parent.parent


def prepare_pool(client: SyncPrefectClient) -> None:
    """Create the process work pool and its queues, and set the queues' limits."""
    # A worker that starts at this moment creates it too.
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    for queue, limit in QUEUES.items():
        try:
            found = client.read_work_queue_by_name(queue, work_pool_name=POOL)
        except ObjectNotFound:
            found = client.create_work_queue(name=queue, work_pool_name=POOL)
        client.update_work_queue(found.id, concurrency_limit=limit)


def prepare_zombie_automation() -> None:
    """Mark a run as crashed when its heartbeat stops for three beats: its machine is gone."""
    automation = Automation(
        name=ZOMBIE_AUTOMATION,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Failed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.Crashed",
            },
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=3 * HEARTBEAT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message="No heartbeat: the process or its machine is gone. Start it again; "
                "finished work is kept.",
            )
        ],
    )
    try:
        # Coroutines only where an event loop runs, and none does here.
        Automation.read(name=ZOMBIE_AUTOMATION)  # type: ignore[unused-coroutine]
    except ValueError:
        automation.create()


def clear_schedules(client: SyncPrefectClient) -> None:
    """Remove schedules from our deployments; prefect.yaml's come back with `prefect deploy`."""
    for deployment in client.read_deployments():
        if deployment.work_pool_name == POOL:
            for schedule in client.read_deployment_schedules(deployment.id):
                client.delete_deployment_schedule(deployment.id, schedule.id)


def deploy() -> None:
    """Create the work pool and queues and deploy every flow of prefect.yaml to the server."""
    if not PREFECT_API_URL.value():
        typer.echo(
            "error: PREFECT_API_URL is not set, so there is no server to deploy to. Run `make ui` "
            "in another shell and then: "
            "PREFECT_API_URL=http://127.0.0.1:4200/api make deploy",
            err=True,
        )
        raise typer.Exit(1)
    with get_client(sync_client=True) as client:
        prepare_pool(client)
        clear_schedules(client)
    prepare_zombie_automation()
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # Prefect records the folder that it deploys from; a worker runs flows from there.
    subprocess.run(command, cwd=PROJECT, env=os.environ, check=True)
