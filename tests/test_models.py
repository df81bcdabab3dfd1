"""Registered models: how they are found, what fits together, and who becomes champion."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from flows.evaluate import resolve
from tasks import checkpoint, models, tracking
from tasks.model_files import ModelFiles, OtherWeightsError
from tasks.models import CHALLENGER, CHAMPION, ModelMismatchError, promote_if_better
from tasks.presets import Preset, load_preset
from tasks.tracking import ModelVersion, resolve_model, set_alias, start_run

SCORE = "generation/f_score_2_voxels"
MINUTE = load_preset(str(Path(__file__).parent / "minute.toml"))
TRANSFORMERS = ("structure", "dit-32")


class Registry:
    """A real registry on SQLite, and models of one number each."""

    def __init__(self, folder: Path, empty_store: Path):
        self.folder = folder
        shutil.copy(empty_store, folder / "mlflow.db")
        self.uri = tracking.tracking_uri(folder)
        self.run = start_run("train", "train", self.uri)

    def register(
        self, stage: str, weight: float, preset: Preset = MINUTE, **tags: object
    ) -> ModelVersion:
        config = preset.vae if stage.startswith("vae") else preset.structure
        state = {"step": 1, "stage": stage, "description": {"model": asdict(config)}}
        weights = {"weight": torch.tensor([weight])}
        path = checkpoint.save(self.folder / "checkpoints", state, weights, weights, {}, 1)
        return models.register(preset, stage, path, self.run, tags)

    def register_set(self, weight: float, vae: ModelVersion) -> list[ModelVersion]:
        """Register transformers that learned latents of a VAE; return the two."""
        structure_vae = self.register("structure-vae", weight)
        autoencoders = (structure_vae, vae)
        return [
            self.register(stage, weight, autoencoder=models.reference(autoencoder))
            for stage, autoencoder in zip(TRANSFORMERS, autoencoders, strict=True)
        ]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # MLflow takes seconds to make its tables: they are made once and copied for each test.
    folder = tmp_path_factory.mktemp("store")
    tracking.reconcile(tracking.tracking_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture
def registry(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(tmp_path, empty_store)


def test_presets_do_not_share_models(registry: Registry) -> None:
    small = replace(MINUTE, name="small")
    ours = registry.register("vae", 1)
    theirs = registry.register("vae", 2, small)
    assert (ours.name, theirs.name) == ("gigashape-minute-vae", "gigashape-small-vae")
    assert ours.aliases == theirs.aliases == (CHALLENGER, CHAMPION)
    assert models.resolve_vae(MINUTE, registry.uri, None) == ours
    assert models.resolve_vae(small, registry.uri, None) == theirs
    with pytest.raises(LookupError, match="gigashape-paper-vae@champion"):
        models.resolve_vae(replace(MINUTE, name="paper"), registry.uri, None)


def test_a_vae_must_fit_the_preset(registry: Registry) -> None:
    wide = replace(MINUTE, name="wide", vae=replace(MINUTE.vae, channels=64))
    name = models.reference(registry.register("vae", 1, wide))
    with pytest.raises(
        ModelMismatchError, match=r'wide-vae/1 does not fit preset "minute": it has channels 64 '
    ):
        models.resolve_vae(MINUTE, registry.uri, name)
    other_loss = replace(wide, name="loss", vae=replace(wide.vae, lambda_kl=0.5))
    assert models.reference(models.resolve_vae(other_loss, registry.uri, name)) == name
    structure_vae = registry.register("structure-vae", 1)
    with pytest.raises(ModelMismatchError, match='is of stage "structure-vae": name a VAE'):
        models.resolve_vae(MINUTE, registry.uri, models.reference(structure_vae))


def test_a_training_run_stands_for_its_newest_version(registry: Registry) -> None:
    assert models.registered(MINUTE, "vae", "run-a", registry.uri) is None
    registry.register("vae", 1, training_run="run-a", finished=False)
    finished = registry.register("vae", 2, training_run="run-a", finished=True)
    registry.register("vae", 3, training_run="run-b", finished=True)
    found = models.registered(MINUTE, "vae", "run-a", registry.uri)
    assert found is not None
    assert models.reference(found) == models.reference(finished) == "gigashape-minute-vae/2"
    assert models.registered(MINUTE, "vae", "run-c", registry.uri) is None


def test_transformers_bring_their_own_vae(registry: Registry) -> None:
    old = registry.register("vae", 1)
    registry.register_set(1, old)
    new = registry.register("vae", 2)
    set_alias(new.name, CHAMPION, new.version, registry.uri)  # promoted; transformers were kept
    chosen = resolve("generation", MINUTE, registry.uri, CHAMPION, {})
    assert {stage: version.version for stage, version in chosen.items()} == {
        "vae": 1,
        "structure-vae": 1,
        "structure": 1,
        "dit-32": 1,
    }
    reconstruction = resolve("reconstruction", MINUTE, registry.uri, CHAMPION, {})
    assert {stage: version.version for stage, version in reconstruction.items()} == {"vae": 2}

    newer = registry.register_set(2, new)
    references = [models.reference(version) for version in newer]
    candidates = models.resolve_candidates(MINUTE, references, registry.uri)
    chosen = models.resolve_set(MINUTE, registry.uri, CHAMPION, candidates)
    assert {version.version for version in chosen.values()} == {2}
    small = replace(MINUTE, name="small")
    with pytest.raises(ModelMismatchError, match=r"vae/1'\] are not of preset \"small\""):
        models.resolve_candidates(small, ["gigashape-minute-vae/1"], registry.uri)


def test_transformers_of_different_vaes_are_no_set(registry: Registry) -> None:
    training = {**MINUTE.training, "dit-64": MINUTE.training["dit-32"]}
    preset = replace(MINUTE, training=training)
    first, second = registry.register("vae", 1), registry.register("vae", 2)
    registry.register_set(1, first)
    registry.register("dit-64", 1, autoencoder=models.reference(second))
    with pytest.raises(ModelMismatchError, match=r"vae/1', 'gigashape-minute-vae/2'"):
        models.resolve_set(preset, registry.uri)


def test_files_are_those_of_the_weights(registry: Registry) -> None:
    version = registry.register("vae", 1)
    files = models.model_files(version, registry.uri)
    found = checkpoint.load(files.folder())
    assert found.weights(ema=True) == {"weight": torch.tensor([1.0])}
    assert found.state["files"] == {"ema.safetensors": files.weights}
    other = models.model_files(registry.register("vae", 2), registry.uri)
    assert other.weights != files.weights
    with pytest.raises(OtherWeightsError, match=r"vae/1 .* made anew"):
        ModelFiles(files.reference, other.weights, registry.uri).folder()
    untagged = replace(version, tags={})
    with pytest.raises(ModelMismatchError, match='no tag "weights"'):
        models.model_files(untagged, registry.uri)


def champions(uri: str) -> list[int]:
    names = [models.model_name(MINUTE, stage) for stage in TRANSFORMERS]
    return [resolve_model(f"{name}@{CHAMPION}", uri).version for name in names]


def test_a_better_set_is_promoted_and_can_be_rolled_back(registry: Registry) -> None:
    vae = registry.register("vae", 1)
    registry.register_set(1, vae)
    challengers = registry.register_set(2, vae)
    decision = promote_if_better(challengers, SCORE, 0.8123, 0.7, 0.1, registry.uri)
    assert champions(registry.uri) == [2, 2]
    assert "gigashape-minute-structure/2, gigashape-minute-dit-32/2: promoted" in decision
    assert "0.8123 against the champion's 0.7000" in decision
    for challenger in challengers:
        set_alias(challenger.name, CHAMPION, 1, registry.uri)
    assert champions(registry.uri) == [1, 1]


@pytest.mark.parametrize(("new", "min_gain"), [(0.7, 0.0), (0.6, 0.0), (0.79, 0.1)])
def test_what_is_not_better_stays_challenger(
    registry: Registry, new: float, min_gain: float
) -> None:
    vae = registry.register("vae", 1)
    registry.register_set(1, vae)
    challengers = registry.register_set(2, vae)
    decision = promote_if_better(challengers, SCORE, new, 0.7, min_gain, registry.uri)
    assert champions(registry.uri) == [1, 1]
    names = [models.model_name(MINUTE, stage) for stage in TRANSFORMERS]
    challenging = [resolve_model(f"{name}@{CHALLENGER}", registry.uri).version for name in names]
    assert challenging == [2, 2]
    assert "kept as challenger" in decision
    assert f"{new:.4f} against the champion's 0.7000" in decision
