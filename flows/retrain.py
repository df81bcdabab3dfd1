"""`retrain`: refresh, train what changed, evaluate, promote what is better."""

import logging
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.dit import train_dit
from flows.evaluate import Subject, evaluate
from flows.latents import encode_latents
from flows.refresh import refresh_dataset
from flows.run import close_runs, data_root, markdown_table, preset_of, publish, tracked
from flows.vae import train_vae
from tasks import models, tracking
from tasks.catalogue import open_version
from tasks.presets import load_preset

logger = logging.getLogger(__name__)

# The score that decides, of the means over the held-out assets; higher is better.
RECONSTRUCTION_SCORE = "reconstruction/f_score_1_voxel"
GENERATION_SCORE = "generation/f_score_2_voxels"


@flow(name="retrain", on_cancellation=[close_runs], on_crashed=[close_runs])
def retrain(
    source: str | None = None,
    preset: str | None = None,
    data: str | None = None,
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
        source: where assets come from, as in refresh-dataset; None takes that of the data folder's
            last refresh.
        preset: tiny, small, paper, or the path of a .toml file; None takes that of the data
            folder's last refresh.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        refresh: refresh the dataset first; otherwise take its newest version.
        workers: processes that train together, a GPU each where there are GPUs.
        training_dir: folder for checkpoints, on storage that all workers see; None takes `training`
            in the data folder, which must then be a folder and no address.
        min_gain: how much better a score must be for a promotion, 0 to 1.
    """
    data = data_root(data)
    preset = preset_of(data, preset)
    sizes = load_preset(preset)
    if not sizes.data.held_out:
        raise ValueError(
            f'preset "{sizes.name}" has data.held_out 0, so there is nothing to compare models on: '
            "set it to a share such as 0.1"
        )
    with tracked("retrain", f"retrain-{sizes.name}", data, {"preset": sizes.name}) as tracking_run:
        if refresh:
            refresh_dataset(source=source, preset=preset, data=data)
        # One version for all that follows, whatever another refresh commits meanwhile.
        version = open_version(data).number
        trained = train_vae(
            preset=preset, data=data, version=version, workers=workers, training_dir=training_dir
        )
        decisions = {
            "vae": decide(
                [trained], "reconstruction", RECONSTRUCTION_SCORE, preset, data, version, min_gain
            )
        }
        vae = encode_latents(preset=preset, data=data, version=version)
        transformers = train_dit(
            preset=preset,
            data=data,
            version=version,
            vae=vae,
            workers=workers,
            training_dir=training_dir,
        )
        decisions["transformers"] = decide(
            transformers, "generation", GENERATION_SCORE, preset, data, version, min_gain
        )
        tracking_run.run.set_tags({f"decision.{name}": text for name, text in decisions.items()})
        publish(
            "promotion",
            markdown_table([{"models": k, "decision": v} for k, v in decisions.items()]),
        )
        return decisions


def decide(
    trained: list[str],
    subject: Subject,
    score: str,
    preset: str,
    data: str,
    version: int,
    min_gain: float,
) -> str:
    """Promote models, together, if they beat the champions; say why or why not.

    trained: NAME/VERSION of each stage. version: of the dataset, on whose held-out assets both are
    scored.
    """
    uri = tracking.tracking_uri(data)
    newest = [tracking.resolve_model(reference, uri) for reference in trained]
    present = [tracking.resolve_model(f"{v.name}@{models.CHAMPION}", uri) for v in newest]
    if newest == present:
        decision = f"{', '.join(trained)}: champion already; nothing newer was trained"
    else:
        old, new = (
            evaluate(
                subjects=[subject],
                preset=preset,
                data=data,
                version=version,
                candidates=[models.reference(model) for model in compared],
                part="test",
            )[score]
            for compared in (present, newest)
        )
        decision = models.promote_if_better(newest, score, new, old, min_gain, uri)
    logger.info(decision)
    return decision
