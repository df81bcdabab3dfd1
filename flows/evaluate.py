"""`evaluate`: scores of registered models on a dataset version, as tables and pictures."""

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import close_runs, data_root, log_meshes, markdown_table, publish, tracked
from tasks import models, tracking
from tasks.catalogue import open_version
from tasks.dataset import log_dataset, samples_of
from tasks.evaluation import (
    Scored,
    distribution_scores,
    score_generation,
    score_reconstruction,
    summarise,
)
from tasks.generation import stages_of
from tasks.pictures import contact_sheet
from tasks.presets import Preset, load_preset
from tasks.reporting import call_on_worker
from tasks.samples import SampleRef, split
from tasks.tracking import ModelVersion, Run

logger = logging.getLogger(__name__)

SHEET_ASSETS = 2  # in a row of the sheet
HEADLINES = ("f_score_1_voxel", "f_score_2_voxels", "chamfer", "normal_consistency")  # logged
SHOWN_ASSETS = 8  # with a viewer and .glb files each
Subject = Literal["reconstruction", "generation"]
Part = Literal["train", "test", "all"]


@flow(name="evaluate", on_cancellation=[close_runs], on_crashed=[close_runs])
def evaluate(
    subjects: list[Subject] | None = None,
    preset: str = "tiny",
    data: str = "data",
    version: Annotated[int, Field(ge=0)] | None = None,
    alias: str = models.CHAMPION,
    part: Part = "test",
    view: Annotated[int, Field(ge=-64, le=63)] = -1,
    untrained: Annotated[int, Field(ge=0)] = 0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> dict[str, float]:
    """Score registered models: reconstruction against watertight and original meshes, generation.

    Reconstruction states three errors: of the VAE against the watertight surface, of the VAE
    against the original mesh, and of the conversion alone. Generation is scored against the
    watertight surface of the object in the picture. Distances are in the [-1, 1] frame.

    Args:
        subjects: reconstruction, generation; None scores both.
        preset: the preset that the models were trained with.
        data: data folder, or an address such as s3://bucket/folder.
        version: dataset version, a number; None takes the newest.
        alias: which registered models: champion or challenger.
        part: assets to score: test (held out), train, or all.
        view: picture that generation starts from; -1 is the one held out of training.
        untrained: score the same models before any training too, under untrained/, on this many
            of the assets.
        seed: of the noise that generation starts from.
    """
    data = data_root(data)
    sizes = load_preset(preset)
    dataset = open_version(data, version)
    uri = tracking.tracking_uri(data)
    subjects = subjects or ["reconstruction", "generation"]
    chosen = resolve(subjects, sizes, uri, alias)
    samples = _part(samples_of(dataset), sizes.data.held_out, part)
    params = {
        "preset": sizes.name,
        "dataset": dataset.name,
        "alias": alias,
        "part": part,
        "view": view,
        "seed": seed,
        "models": {stage: models.reference(v) for stage, v in chosen.items()},
    }
    with tracked("evaluate", f"{alias}-{part}-{dataset.name}", data, params) as tracking_run:
        run = tracking_run.run
        log_dataset(run, dataset, "evaluation")
        folders = models.download(chosen, uri)
        scores: dict[str, float] = {}
        for subject in subjects:
            resolution = _finest(sizes, subject)
            subset = [s for s in samples if s.resolution == resolution]
            for trained in (True, False) if untrained else (True,):
                scored = subset if trained else subset[:untrained]
                label = subject if trained else f"untrained-{subject}"
                with Progress(label, "asset") as bar:
                    if subject == "reconstruction":
                        results = call_on_worker(
                            score_reconstruction,
                            folders[stages_of(sizes)[0]],
                            sizes,
                            scored,
                            data,
                            trained,
                            update=bar.update,
                        )
                    else:
                        results = call_on_worker(
                            score_generation,
                            folders,
                            sizes,
                            scored,
                            data,
                            view,
                            seed,
                            trained,
                            update=bar.update,
                        )
                found = summarise(results)
                if subject == "generation":
                    found |= distribution_scores(results)
                prefix = "" if trained else "untrained/"
                scores |= {f"{prefix}{name}": value for name, value in found.items()}
                log_results(run, label, results)
        run.log_metrics(scores)
        headlines = {k: v for k, v in scores.items() if k.endswith(HEADLINES)}
        logger.info("scores:\n%s", "\n".join(f"{v:10.4f}  {k}" for k, v in headlines.items()))
        publish("scores", markdown_table([{"score": k, "mean": v} for k, v in scores.items()]))
        return scores


def resolve(
    subjects: Sequence[Subject], preset: Preset, uri: str, alias: str
) -> dict[str, ModelVersion]:
    """Return the model versions that the subjects need, by stage."""
    chosen = models.resolve_set(preset, uri, alias) if "generation" in subjects else {}
    if "reconstruction" in subjects:
        # The VAE with the alias itself, which the transformers may not have learned yet.
        vae = stages_of(preset)[0]
        found = tracking.resolve_model(f"{models.model_name(vae)}@{alias}", uri)
        if chosen and chosen[vae] != found:
            raise models.ModelMismatchError(
                f"{models.reference(found)} is @{alias}, but the transformers @{alias} learned "
                f"{models.reference(chosen[vae])}: evaluate reconstruction and generation apart"
            )
        chosen[vae] = found
    return chosen


def _finest(preset: Preset, subject: Subject) -> int:
    if subject == "generation":
        return int(preset.dit_stages()[-1].removeprefix("dit-"))
    return max(preset.training[stages_of(preset)[0]].resolutions)


def _part(samples: Sequence[SampleRef], held_out: float, part: Part) -> list[SampleRef]:
    train, test = split(samples, held_out)
    chosen = {"train": train, "test": test, "all": list(samples)}[part]
    if not chosen:
        raise ValueError(
            f'part "{part}" has no asset: data.held_out of the preset is {held_out}, and the '
            f"dataset has {len({s.asset_id for s in samples})} assets; raise held_out, add assets, "
            "or evaluate another part"
        )
    return chosen


def log_results(run: Run, label: str, results: Sequence[Scored]) -> None:
    """Log the scores of each asset, a sheet of pictures, and a viewer and .glb files of some."""
    rows = [{"asset_id": r.asset_id, "resolution": r.resolution, **r.scores} for r in results]
    run.log_table(rows, f"{label}/assets")
    pictures = [picture for r in results for picture in r.pictures.values()]
    labels = [name for r in results for name in r.pictures]
    columns = SHEET_ASSETS * len(results[0].pictures)
    run.log_picture(f"{label}/pictures", contact_sheet(pictures, columns, labels))
    for result in results[:SHOWN_ASSETS]:
        log_meshes(run, result.meshes, label, result.asset_id[:12])
