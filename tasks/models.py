"""Trained stages as registered models: what is stored, how they are found, what fits together.

A model's files are a checkpoint's averaged weights and configuration, which suffice to load it. It
is named `gigashape-<stage>`, and its tags say what it comes from: dataset version, training run,
preset, and the version of the autoencoder whose latents it learned.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks import checkpoint, tracking
from tasks.generation import stages_of
from tasks.presets import Preset
from tasks.tracking import ModelVersion, Run

CHAMPION, CHALLENGER = "champion", "challenger"


class ModelMismatchError(ValueError):
    """Registered models that don't fit together, or don't fit the preset."""


def model_name(stage: str) -> str:
    """Return the registered name of a stage."""
    return f"gigashape-{stage}"


def register(
    stage: str, checkpoint_folder: Path, run: Run, tags: Mapping[str, object]
) -> ModelVersion:
    """Register a stage's averaged weights as a challenger; as champion too if there is none yet."""
    found = checkpoint.load(checkpoint_folder)
    name = model_name(stage)
    first = not tracking.model_versions(name, run.uri)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(found.path / "ema.safetensors", folder)
        files = {"ema.safetensors": found.state["files"]["ema.safetensors"]}
        state = json.dumps(found.state | {"files": files}, indent=1)
        (Path(folder) / "state.json").write_text(state)
        aliases = (CHALLENGER, CHAMPION) if first else (CHALLENGER,)
        return tracking.register_model(name, Path(folder), run, tags, aliases)


def registered(stage: str, training_run: str, uri: str) -> ModelVersion | None:
    """Return the version that a training run was registered as; None when it wasn't."""
    versions = tracking.model_versions(model_name(stage), uri)
    return next((v for v in versions if v.tags.get("training_run") == training_run), None)


def reference(version: ModelVersion) -> str:
    """Return NAME/VERSION, which names a version for good."""
    return f"{version.name}/{version.version}"


def resolve_set(preset: Preset, uri: str, alias: str = CHAMPION) -> dict[str, ModelVersion]:
    """Return the versions that generate together, by stage.

    The transformers are those with the alias; each brings the autoencoder whose latents it learned.
    Raises LookupError when one is missing, ModelMismatchError when they don't fit together.
    """
    vae, structure_vae, *transformers = stages_of(preset)
    chosen = {s: tracking.resolve_model(f"{model_name(s)}@{alias}", uri) for s in transformers}
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
    for stage, version in chosen.items():
        if version.tags["preset"] != preset.name:
            raise ModelMismatchError(
                f"{reference(version)} ({stage}) was trained with the preset "
                f'"{version.tags["preset"]}", not "{preset.name}": pass the preset it was '
                "trained with"
            )
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


def download(versions: Mapping[str, ModelVersion], uri: str) -> dict[str, Path]:
    """Return the folders of models, by stage; those of a local store are not copied."""
    return {s: tracking.download_model(reference(v), uri) for s, v in versions.items()}
