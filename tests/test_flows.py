"""Flows that decide, with a real Prefect API, registry, dataset and models, and no training flow.

What they decide on is made directly: a dataset of procedural objects, a VAE that decodes to
nothing, and one that decodes to some surface.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.dit import train_dit
from flows.evaluate import evaluate
from flows.retrain import RECONSTRUCTION_SCORE, decide
from flows.run import tracked
from tasks import checkpoint, models, tracking
from tasks.catalogue import DatasetVersion
from tasks.latents import LatentsError
from tasks.models import CHAMPION
from tasks.presets import load_preset
from tasks.refresh import RefreshConfig, refresh
from tasks.stages import build_stage
from tasks.tracking import ModelVersion, Run, RunBusyError, resolve_model, start_run

# Prefect's temporary server needs half a minute on two busy cores.
pytestmark = [pytest.mark.usefixtures("api", "ray_session"), pytest.mark.timeout(400)]
FILE = str(Path(__file__).parent / "minute.toml")
PRESET = load_preset(FILE)


@pytest.fixture(scope="module")
def api() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@dataclass(frozen=True)
class Place:
    """A data folder with a dataset version, and the checkpoints of two VAEs, one better."""

    data: str
    dataset: DatasetVersion
    better: Path
    worse: Path

    @property
    def uri(self) -> str:
        return tracking.tracking_uri(self.data)

    def register(self, run: Run, folder: Path) -> ModelVersion:
        return models.register(PRESET, "vae", folder, run, {"dataset": self.dataset.name})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Place:
    folder = tmp_path_factory.mktemp("flows")
    data = PRESET.data
    config = RefreshConfig(
        str(folder / "data"),
        data.source,
        data.resolutions,
        views=data.views,
        view_size=data.view_size,
        held_out=data.held_out,
        workers=1,
    )
    dataset = refresh(config).version
    stage = build_stage("vae", PRESET)
    state = {"step": 0, "stage": "vae", "description": stage.description}
    weights = {key: value.clone() for key, value in stage.module.state_dict().items()}
    empty = checkpoint.save(folder / "empty", state, weights, weights, {}, 1)
    # Random distances around zero: a surface, if a poor one, near the object's.
    weights["vae.to_value.bias"].zero_()
    noisy = checkpoint.save(folder / "noisy", state, weights, weights, {}, 1)
    return Place(config.root, dataset, noisy, empty)


def test_what_was_trained_becomes_champion_only_if_it_is_better(place: Place) -> None:
    with start_run("train-vae", "vae", place.uri) as run:
        first, better = (place.register(run, f) for f in (place.worse, place.better))

    def decided(trained: ModelVersion, min_gain: float = 0.0) -> str:
        name = models.reference(trained)
        number = place.dataset.number
        return decide(
            [name], "reconstruction", RECONSTRUCTION_SCORE, FILE, place.data, number, min_gain
        )

    def champion() -> int:
        return resolve_model(f"{first.name}@{CHAMPION}", place.uri).version

    # Another training registers a challenger meanwhile; what is compared is what was named.
    with start_run("train-vae", "other", place.uri) as run:
        place.register(run, place.worse)
    assert "champion already" in decided(first)
    assert "kept as challenger" in decided(better, min_gain=1.0)
    assert champion() == first.version
    assert "gigashape-minute-vae/2: promoted to champion" in decided(better)
    assert champion() == better.version

    scores = evaluate(["reconstruction"], preset=FILE, data=place.data, untrained=1)
    assert scores["reconstruction/assets"] == 2
    assert scores["untrained/reconstruction/assets"] == 1
    gained = scores[RECONSTRUCTION_SCORE] - scores[f"untrained/{RECONSTRUCTION_SCORE}"]
    assert gained > 0


def test_missing_latents_are_noticed_before_anything_is_trained(place: Place) -> None:
    with start_run("train-vae", "vae", place.uri) as run:
        vae = models.reference(place.register(run, place.better))
    with pytest.raises(LatentsError, match="run encode-latents"):
        train_dit(preset=FILE, data=place.data, vae=vae)
    assert tracking.model_versions("gigashape-minute-structure-vae", place.uri) == []
    assert not (Path(place.data) / "training").exists()


def test_a_run_is_resumed_unless_it_finished_or_is_at_work(place: Place) -> None:
    @flow
    def run_of(name: str, resume: bool = True, fails: bool = False) -> str:
        with suppress(ZeroDivisionError), tracked("e", name, place.data, {}, resume) as opened:
            run_id = opened.run.run_id
            if fails:
                raise ZeroDivisionError
        return run_id

    failed = run_of("vae-v1-a", fails=True)
    assert run_of("vae-v1-b") != failed, "another configuration"
    assert run_of("vae-v1-a") == failed
    assert run_of("vae-v1-a") != failed, "it finished"
    failed = run_of("vae-v1-c", fails=True)
    assert run_of("vae-v1-c", resume=False) != failed, "from the start"
    running = start_run("e", "vae-v1-d", place.uri)
    with pytest.raises(RunBusyError, match=rf"vae-v1-d \({running.run_id}\)"):
        run_of("vae-v1-d")
    assert running.status() == "RUNNING"
    running.end()
