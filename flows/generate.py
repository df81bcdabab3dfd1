"""`generate`: pictures to meshes, by registered models."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import close_runs, data_root, markdown_table, preset_of, publish, tracked
from tasks import models, tracking
from tasks.generation import Shape, load_models, read_picture
from tasks.generation import generate as generate_shapes
from tasks.model_files import ModelFiles
from tasks.pictures import contact_sheet, save_glb
from tasks.presets import Preset, load_preset
from tasks.rendering import render_geometry
from tasks.reporting import Progress as Update
from tasks.reporting import call_on_worker, log_meshes

logger = logging.getLogger(__name__)
PICTURE_SIZE = 384


@dataclass(frozen=True)
class Generated:
    """Files of one generated mesh; mesh is None where the picture gave none."""

    image: str
    mesh: Path | None
    picture: Path
    faces: int


@flow(name="generate", on_cancellation=[close_runs], on_crashed=[close_runs])
def generate(
    images: list[str],
    out: str = "generated",
    preset: str | None = None,
    data: str | None = None,
    alias: str = models.CHAMPION,
    seed: Annotated[int, Field(ge=0)] = 0,
    background_remover: Literal["rembg"] | None = None,
) -> list[Generated]:
    """Generate a mesh (.glb) from each picture, and a picture of it beside its input.

    The object is where the picture's alpha is. Files are named after the pictures.

    Args:
        images: paths of pictures (PNG, JPEG, WebP); PNG and WebP with an alpha channel.
        out: folder to write NAME.glb and NAME-beside.png to.
        preset: the preset that the models were trained with; None takes that of the data folder's
            last refresh.
        data: data folder that holds the model registry; None takes GIGASHAPE_DATA, else data.
        alias: which registered models: champion or challenger.
        seed: of the noise; the same seed gives the same mesh.
        background_remover: for pictures without alpha: rembg, from the extra `matting`.
    """
    data = data_root(data)
    sizes = load_preset(preset_of(data, preset))
    uri = tracking.tracking_uri(data)
    names = [Path(image).stem for image in images]
    if len(set(names)) < len(names):
        raise ValueError(f"two pictures share a name, and their meshes would too: {sorted(names)}")
    size = sizes.data.view_size
    pixels = torch.stack([read_picture(Path(i), size, background_remover) for i in images])
    chosen = models.resolve_set(sizes, uri, alias)
    params = {
        "preset": sizes.name,
        "seed": seed,
        "images": images,
        "models": {stage: models.reference(v) for stage, v in chosen.items()},
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tracked("generate", names[0], data, params) as tracking_run:
        run = tracking_run.run
        files = {stage: models.model_files(v, uri) for stage, v in chosen.items()}
        with Progress("generate", "picture") as bar:
            shapes = call_on_worker(_generate, files, sizes, pixels, seed, update=bar.update)
        results, rows = [], []
        for name, image, rgba, shape in zip(names, images, pixels, shapes, strict=True):
            condition = Image.fromarray(
                np.round(rgba.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            ).resize((PICTURE_SIZE, PICTURE_SIZE))
            picture = contact_sheet(
                [np.asarray(condition), render_geometry(shape.vertices, shape.faces, PICTURE_SIZE)],
                2,
                ["picture", "generated"],
            )
            beside = folder / f"{name}-beside.png"
            picture.save(beside)
            run.log_picture(name, picture)
            mesh = None
            if len(shape.faces):
                mesh = folder / f"{name}.glb"
                save_glb(shape.vertices, shape.faces, mesh)
                log_meshes(run, {"generated": (shape.vertices, shape.faces)}, "meshes", name)
                logger.info(
                    "%s: made %s, %d triangles; see %s", image, mesh, len(shape.faces), beside
                )
            else:
                logger.warning("%s: the models made no surface from this picture", image)
            results.append(Generated(image, mesh, beside, len(shape.faces)))
            rows.append(
                {
                    "image": image,
                    "mesh": mesh or "none: no surface",
                    "faces": len(shape.faces),
                    **{f"seconds_{k}": v for k, v in shape.seconds.items()},
                    **{f"tokens_{k}": v for k, v in shape.latent_voxels.items()},
                }
            )
        run.log_table(rows, "meshes")
        publish("generated", markdown_table(rows))
        return results


def _generate(
    files: dict[str, ModelFiles],
    preset: Preset,
    pixels: torch.Tensor,
    seed: int,
    device: torch.device,
    progress: Update,
) -> Sequence[Shape]:
    """Generate one picture at a time: peak memory is that of one."""
    folders = {stage: model.folder() for stage, model in files.items()}
    loaded = load_models(folders, preset, device)
    shapes: list[Shape] = []
    for number, rgba in enumerate(pixels):
        started = time.monotonic()
        progress(number, len(pixels), "")
        shapes += generate_shapes(loaded, rgba[None], seed)
        logger.info("picture %d: %.1f s", number, time.monotonic() - started)
    progress(len(pixels), len(pixels), "")
    return shapes
