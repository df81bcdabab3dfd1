"""`retrain`: refresh, train what changed, evaluate, promote what is better."""

import logging
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.dit import train_dit
from flows.evaluate import Subject, evaluate
from flows.latents import encode_latents
from flows.refresh import refresh_dataset
from flows.run import Tracked, close_runs, data_root, markdown_table, publish, tracked
from flows.vae import train_vae
from tasks import models, tracking
from tasks.generation import stages_of
from tasks.presets import load_preset

logger = logging.getLogger(__name__)

# The score that decides, of the means over the held-out assets; higher is better.
RECONSTRUCTION_SCORE = "reconstruction/f_score_1_voxel"
GENERATION_SCORE = "generation/f_score_2_voxels"


@flow(name="retrain", on_cancellation=[close_runs], on_crashed=[close_runs])
def retrain(
    source: str | None = None,
    preset: str = "tiny",
    data: str = "data",
    refresh: bool = True,
    workers: Annotated[int, Field(ge=1)] = 1,
    training_dir: str | None = None,
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> dict[str, str]:
    """Refresh the dataset, train what it changes, and promote models that beat the champions.

    The VAE is compared first, by its F-score at one voxel on the held-out assets; then, on latents
    of the champion VAE, the transformers as a set, by the F-score at two voxels of meshes generated
    from held-out pictures. What doesn't win stays registered as challenger. Returns the decisions.

    Args:
        source: where assets come from, as in refresh-dataset; None takes the preset's.
        preset: tiny, small, paper, or the path of a .toml file.
        data: data folder, or an address such as s3://bucket/folder.
        refresh: refresh the dataset first; otherwise take its newest version.
        workers: processes that train together, a GPU each where there are GPUs.
        training_dir: folder for checkpoints, on storage that all workers see; None takes `training`
            in the data folder, which must then be a folder and no address.
        min_gain: how much better a score must be for a promotion, 0 to 1.
    """
    data = data_root(data)
    sizes = load_preset(preset)
    if not sizes.data.held_out:
        raise ValueError(
            f'preset "{sizes.name}" has data.held_out 0, so there is nothing to compare models on: '
            "set it to a share such as 0.1"
        )
    vae_stage, _, *transformers = stages_of(sizes)
    with tracked("retrain", f"retrain-{sizes.name}", data, {"preset": sizes.name}) as tracking_run:
        if refresh:
            refresh_dataset(source=source, preset=preset, data=data)
        train_vae(preset=preset, data=data, workers=workers, training_dir=training_dir)
        decisions = {
            vae_stage: _decide(
                [vae_stage], "reconstruction", RECONSTRUCTION_SCORE, tracking_run, preset, data,
                min_gain,
            )
        }  # fmt: skip
        vae = encode_latents(preset=preset, data=data)
        train_dit(preset=preset, data=data, vae=vae, workers=workers, training_dir=training_dir)
        decisions["transformers"] = _decide(
            transformers, "generation", GENERATION_SCORE, tracking_run, preset, data, min_gain
        )
        tracking_run.run.set_tags({f"decision.{name}": text for name, text in decisions.items()})
        publish(
            "promotion",
            markdown_table([{"models": k, "decision": v} for k, v in decisions.items()]),
        )
        return decisions


def _decide(
    stages: list[str],
    subject: Subject,
    score: str,
    tracked: Tracked,
    preset: str,
    data: str,
    min_gain: float,
) -> str:
    """Promote the challengers of stages, together, if they beat the champions; say why or not."""
    uri = tracked.run.uri
    newest, present = (
        {s: tracking.resolve_model(f"{models.model_name(s)}@{alias}", uri) for s in stages}
        for alias in (models.CHALLENGER, models.CHAMPION)
    )
    if newest == present:
        names = ", ".join(models.reference(version) for version in newest.values())
        decision = f"{names}: champion already; nothing newer was trained"
    else:
        old, new = (
            evaluate(subjects=[subject], preset=preset, data=data, alias=alias, part="test")[score]
            for alias in (models.CHAMPION, models.CHALLENGER)
        )
        decision = models.promote_if_better(list(newest.values()), score, new, old, min_gain, uri)
    logger.info(decision)
    return decision
