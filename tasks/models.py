"""Trained stages as registered models: what is stored, how they are found, what fits together.

A model's files are a checkpoint's averaged weights and configuration, which suffice to load it. It
is named `gigashape-<preset>-<stage>`, and its tags say what it comes from: dataset version,
training run, configuration, the SHA-256 of its weights, and the version of the autoencoder whose
latents it learned.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tasks import checkpoint, tracking
from tasks.generation import stages_of
from tasks.model_files import ModelFiles
from tasks.presets import Preset
from tasks.tracking import ModelVersion, Run

CHAMPION, CHALLENGER = "champion", "challenger"


class ModelMismatchError(ValueError):
    """Registered models that don't fit together, or don't fit the preset."""


def model_name(preset: Preset, stage: str) -> str:
    """Return the registered name of a preset's stage."""
    return f"gigashape-{preset.name}-{stage}"


def register(
    preset: Preset, stage: str, checkpoint_folder: Path, run: Run, tags: Mapping[str, object]
) -> ModelVersion:
    """Register a stage's averaged weights as a challenger; as champion too if there is none yet."""
    found = checkpoint.load(checkpoint_folder)
    name = model_name(preset, stage)
    first = not tracking.model_versions(name, run.uri)
    weights = found.state["files"]["ema.safetensors"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(found.path / "ema.safetensors", folder)
        state = found.state | {"files": {"ema.safetensors": weights}}
        (Path(folder) / "state.json").write_text(json.dumps(state, indent=1))
        own = {
            "stage": stage,
            "weights": weights,
            "model_config": json.dumps(found.state["description"]["model"]),
        }
        aliases = (CHALLENGER, CHAMPION) if first else (CHALLENGER,)
        return tracking.register_model(name, Path(folder), run, {**tags, **own}, aliases)


def registered(preset: Preset, stage: str, training_run: str, uri: str) -> ModelVersion | None:
    """Return the newest version that a training run was registered as; None when it wasn't.

    A run has several where max_minutes stopped it before its end.
    """
    versions = reversed(tracking.model_versions(model_name(preset, stage), uri))
    return next((v for v in versions if v.tags.get("training_run") == training_run), None)


def reference(version: ModelVersion) -> str:
    """Return NAME/VERSION, which names a version for good."""
    return f"{version.name}/{version.version}"


def model_files(version: ModelVersion, uri: str) -> ModelFiles:
    """Return what work on another machine needs to load a version."""
    if "weights" not in version.tags:
        raise ModelMismatchError(
            f'{reference(version)} has no tag "weights", so it was not registered by a training '
            "of this version of gigashape: name one that was"
        )
    return ModelFiles(reference(version), version.tags["weights"], uri)


def resolve_vae(preset: Preset, uri: str, vae: str | None) -> ModelVersion:
    """Return the registered VAE that `vae` names, or else the preset's champion.

    Raises LookupError when there is none, ModelMismatchError when it is no VAE of this preset's
    sizes. The weights of its losses may be others.
    """
    wanted = vae or f"{model_name(preset, stages_of(preset)[0])}@{CHAMPION}"
    version = tracking.resolve_model(wanted, uri)
    stage = version.tags.get("stage", "")
    if not stage.startswith("vae"):
        raise ModelMismatchError(f'{reference(version)} is of stage "{stage}": name a VAE')
    there = json.loads(version.tags["model_config"])
    differences = [
        f"{key} {there.get(key)} (preset: {value})"
        for key, value in asdict(preset.vae).items()
        if not key.startswith("lambda_") and there.get(key) != value
    ]
    if differences:
        raise ModelMismatchError(
            f'{reference(version)} does not fit preset "{preset.name}": it has '
            f"{', '.join(differences)}; pass the preset it was trained with, or a VAE of this one"
        )
    return version


def resolve_candidates(
    preset: Preset, references: Sequence[str], uri: str
) -> dict[str, ModelVersion]:
    """Return models of a preset, by stage, from NAME/VERSION or NAME@ALIAS.

    Raises LookupError when one is missing, ModelMismatchError when one is not of this preset.
    """
    stages = {model_name(preset, stage): stage for stage in preset.training}
    versions = [tracking.resolve_model(wanted, uri) for wanted in references]
    if other := [reference(v) for v in versions if v.name not in stages]:
        raise ModelMismatchError(
            f'{other} are not of preset "{preset.name}", whose models are {sorted(stages)}'
        )
    return {stages[version.name]: version for version in versions}


def resolve_set(
    preset: Preset,
    uri: str,
    alias: str = CHAMPION,
    candidates: Mapping[str, ModelVersion] | None = None,
) -> dict[str, ModelVersion]:
    """Return the versions that generate together, by stage.

    The transformers are those with the alias, or the candidates where there are; each brings the
    autoencoder whose latents it learned. Raises LookupError when one is missing,
    ModelMismatchError when they don't fit together.
    """
    vae, structure_vae, *transformers = stages_of(preset)
    candidates = candidates or {}
    chosen = {
        stage: candidates.get(stage)
        or tracking.resolve_model(f"{model_name(preset, stage)}@{alias}", uri)
        for stage in transformers
    }
    autoencoders = {
        vae: {chosen[s].tags["autoencoder"] for s in transformers if s != "structure"},
        structure_vae: {chosen["structure"].tags["autoencoder"]},
    }
    for stage, references in autoencoders.items():
        if len(references) != 1:
            raise ModelMismatchError(
                f"the transformers @{alias} learned latents of different autoencoders "
                f"({sorted(references)}): train the older ones again, or point @{alias} at "
                "versions that share one"
            )
        chosen[stage] = tracking.resolve_model(references.pop(), uri)
    return chosen


def promote_if_better(
    challengers: Sequence[ModelVersion],
    score: str,
    new: float,
    old: float,
    min_gain: float,
    uri: str,
) -> str:
    """Make versions champions, together, if they beat the present ones; return why or why not.

    new, old: the score of the challengers and of the champions on the same assets, higher being
    better. min_gain: by how much it must at least be better. Pointing the alias back is the
    rollback.
    """
    names = ", ".join(reference(version) for version in challengers)
    comparison = f"{score} {new:.4f} against the champion's {old:.4f} on the held-out assets"
    if not new > old + min_gain:
        return f"{names}: kept as challenger: {comparison}, needed more than {min_gain:g} above"
    for version in challengers:
        tracking.set_alias(version.name, CHAMPION, version.version, uri)
    return f"{names}: promoted to champion: {comparison}"
