"""`gigashape quickstart`: the whole pipeline on procedural objects, in minutes on a laptop."""

import logging
from pathlib import Path

from PIL import Image
from prefect import flow

from flows.dit import train_dit
from flows.evaluate import evaluate
from flows.generate import generate
from flows.latents import encode_latents
from flows.refresh import refresh_dataset
from flows.run import data_root, tracked
from flows.vae import train_vae
from tasks.catalogue import open_version
from tasks.dataset import samples_of
from tasks.mirror import read_mirror
from tasks.presets import load_preset
from tasks.samples import split
from tasks.shards import read_image
from tasks.sources import absolute_spec
from tasks.storage import open_filesystem

logger = logging.getLogger(__name__)
SHOWN = {
    "reconstruction/f_score_1_voxel": "VAE, F-score at 1 voxel against the watertight mesh",
    "reconstruction_original/f_score_1_voxel": "VAE, F-score at 1 voxel against the original",
    "conversion/f_score_1_voxel": "conversion alone, F-score at 1 voxel against the original",
    "generation/f_score_2_voxels": "generated from a training view, F-score at 2 voxels",
}


@flow(name="quickstart")
def quickstart(data: str | None = None, preset: str = "tiny") -> None:
    """Make a dataset, train all models on it, evaluate them, and turn a picture into a mesh.

    Args:
        data: data folder; a second quickstart on it reuses what did not change. None takes
            GIGASHAPE_DATA, else data.
        preset: tiny, small, paper, or the path of a .toml file.
    """
    data = data_root(data)
    sizes = load_preset(preset)
    if "://" in data:
        raise ValueError(f"data is {data}: a quickstart needs a folder of this machine")
    mirror = read_mirror(data)
    if mirror is not None and mirror.source != absolute_spec(sizes.data.source):
        raise ValueError(
            f"{data} mirrors {mirror.source}, which a quickstart would replace by "
            f"{sizes.data.source}: give it another folder with --data"
        )
    with tracked("quickstart", "quickstart", data, {"preset": sizes}) as tracking_run:
        refreshed = refresh_dataset(preset=preset, data=data)
        assert refreshed is not None
        train_vae(preset=preset, data=data)
        vae = encode_latents(preset=preset, data=data)
        train_dit(preset=preset, data=data, vae=vae)
        scores = evaluate(preset=preset, data=data, part="train", view=0, untrained=4)
        image = _training_picture(data, sizes.data.held_out)
        (generated,) = generate([str(image)], out=str(image.parent), preset=preset, data=data)
        tracking_run.run.log_metrics({name: scores[name] for name in SHOWN})

        lines = ["", f"dataset version   {refreshed.version_name}"]
        if refreshed.changed_share == 0:
            lines[-1] += "   (nothing changed: the existing dataset was reused)"
        lines += [
            "",
            "score                                                      trained  untrained",
        ]
        for name, label in SHOWN.items():
            before = scores[f"untrained/{name}"]
            untrained = "" if name.startswith("conversion") else f"{before:9.3f}"
            lines.append(f"{label:58} {scores[name]:7.3f}  {untrained}")
        lines += ["", "MLflow runs (experiment / run)"]
        lines += [f"  {child.experiment} / {child.name}" for child in tracking_run.children]
        lines += [
            "",
            f"picture           {image}",
            f"generated mesh    {generated.mesh}",
            f"both in one       {generated.picture}",
            f"MLflow            {tracking_run.run.uri}",
            f"                  {tracking_run.url} once `make ui` runs",
        ]
        print("\n".join(lines))  # noqa: T201 - what the command is for


def _training_picture(data: str, held_out: float) -> Path:
    """Write the first view of a training object beside where its mesh will go."""
    training, _ = split(samples_of(open_version(data)), held_out)
    sample = training[0]
    filesystem, base = open_filesystem(data)
    image = read_image(filesystem, f"{base}/{sample.views_path}", sample.views_row_group, 0)
    folder = Path(data) / "quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"input-{sample.asset_id[:8]}.png"
    Image.fromarray(image).save(path)
    return path
