"""`evaluate`: scores of registered models on a dataset version, as tables and pictures."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import close_runs, data_root, markdown_table, preset_of, publish, tracked
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
from tasks.reporting import call_on_worker, log_meshes
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
    preset: str | None = None,
    data: str | None = None,
    version: Annotated[int, Field(ge=0)] | None = None,
    alias: str = models.CHAMPION,
    candidates: list[str] | None = None,
    part: Part = "test",
    view: Annotated[int, Field(ge=-64, le=63)] = -1,
    untrained: Annotated[int, Field(ge=0)] = 0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> dict[str, float]:
    """Score registered models: reconstruction against watertight and original meshes, generation.

    Reconstruction states three errors: of the VAE against the watertight surface, of the VAE
    against the original mesh, and of the conversion alone. Generation is scored against the
    watertight surface of the object in the picture; its VAE is the one whose latents the
    transformers learned. Distances are in the [-1, 1] frame.

    Args:
        subjects: reconstruction, generation; None scores both.
        preset: the preset that the models were trained with; None takes that of the data folder's
            last refresh.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        version: dataset version, a number; None takes the newest.
        alias: which registered models: champion or challenger.
        candidates: registered models to score in place of those with the alias, such as
            gigashape-tiny-vae/3.
        part: assets to score: test (held out), train, or all.
        view: picture that generation starts from; -1 is the one held out of training.
        untrained: score the same models before any training too, under untrained/, on this many
            of the assets.
        seed: of the noise that generation starts from.
    """
    data = data_root(data)
    sizes = load_preset(preset_of(data, preset))
    dataset = open_version(data, version)
    uri = tracking.tracking_uri(data)
    given = models.resolve_candidates(sizes, candidates or [], uri)
    chosen = {
        subject: resolve(subject, sizes, uri, alias, given)
        for subject in subjects or ["reconstruction", "generation"]
    }
    samples = _part(samples_of(dataset), sizes.data.held_out, part)
    params = {
        "preset": sizes.name,
        "dataset": dataset.name,
        "alias": alias,
        "part": part,
        "view": view,
        "seed": seed,
        "models": {
            subject: {stage: models.reference(v) for stage, v in versions.items()}
            for subject, versions in chosen.items()
        },
    }
    label = "candidates" if candidates else alias
    with tracked("evaluate", f"{label}-{part}-{dataset.name}", data, params) as tracking_run:
        run = tracking_run.run
        log_dataset(run, dataset, "evaluation")
        scores: dict[str, float] = {}
        for subject, versions in chosen.items():
            files = {stage: models.model_files(v, uri) for stage, v in versions.items()}
            resolution = _finest(sizes, subject)
            subset = [s for s in samples if s.resolution == resolution]
            for trained in (True, False) if untrained else (True,):
                scored = subset if trained else subset[:untrained]
                label = subject if trained else f"untrained-{subject}"
                with Progress(label, "asset") as bar:
                    if subject == "reconstruction":
                        results = call_on_worker(
                            score_reconstruction,
                            files[stages_of(sizes)[0]],
                            sizes,
                            scored,
                            data,
                            trained,
                            update=bar.update,
                        )
                    else:
                        results = call_on_worker(
                            score_generation,
                            files,
                            sizes,
                            scored,
                            data,
                            view,
                            seed,
                            trained,
                            update=bar.update,
                        )
                found = {**summarise(results), f"{subject}/assets": float(len(results))}
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
    subject: Subject,
    preset: Preset,
    uri: str,
    alias: str,
    candidates: Mapping[str, ModelVersion],
) -> dict[str, ModelVersion]:
    """Return the model versions that a subject needs, by stage.

    Reconstruction takes the VAE with the alias, which the transformers may not have learned yet.
    """
    if subject == "generation":
        return models.resolve_set(preset, uri, alias, candidates)
    vae = stages_of(preset)[0]
    if vae in candidates:
        return {vae: candidates[vae]}
    return {vae: tracking.resolve_model(f"{models.model_name(preset, vae)}@{alias}", uri)}


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
