"""`encode-latents`: the latents that the diffusion transformers learn."""

import logging
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.progress import Progress
from flows.run import close_runs, data_root, markdown_table, preset_of, publish, tracked
from tasks import models, tracking
from tasks.catalogue import open_version
from tasks.dataset import log_dataset
from tasks.encoding import encode
from tasks.presets import load_preset

logger = logging.getLogger(__name__)


@flow(name="encode-latents", on_cancellation=[close_runs], on_crashed=[close_runs])
def encode_latents(
    preset: str | None = None,
    data: str | None = None,
    version: Annotated[int, Field(ge=0)] | None = None,
    vae: str | None = None,
) -> str:
    """Encode a dataset version under a registered VAE, once for each resolution of the preset.

    Latents are cached in the data folder with their mean and scale; those that are there already
    are not made again. Returns the VAE's name and version.

    Args:
        preset: tiny, small, paper, or the path of a .toml file; None takes that of the data
            folder's last refresh.
        data: data folder, or an address such as s3://bucket/folder; None takes GIGASHAPE_DATA,
            else data.
        version: dataset version to encode, a number; None takes the newest.
        vae: registered VAE, such as gigashape-tiny-vae@champion or gigashape-tiny-vae/3; None takes
            the preset's champion.
    """
    data = data_root(data)
    sizes = load_preset(preset_of(data, preset))
    dataset = open_version(data, version)
    uri = tracking.tracking_uri(data)
    autoencoder = models.model_files(models.resolve_vae(sizes, uri, vae), uri)
    params = {"preset": sizes.name, "dataset": dataset.name, "vae": autoencoder.reference}
    with tracked("encode-latents", f"latents-{dataset.name}", data, params) as tracking_run:
        log_dataset(tracking_run.run, dataset, "encoding")
        rows = []
        for stage in sizes.dit_stages():
            resolution = int(stage.removeprefix("dit-"))
            with Progress(f"encode-{resolution}", "asset") as bar:
                latents = encode(dataset, autoencoder, resolution, bar.update)
            tokens = [sample.tokens for sample in latents.samples]
            rows.append(
                {
                    "resolution": resolution,
                    "samples": len(tokens),
                    "tokens": sum(tokens),
                    "most_tokens": max(tokens),
                    "digest": latents.digest,
                    "mean": [round(float(v), 4) for v in latents.mean],
                    "scale": [round(float(v), 4) for v in latents.scale],
                }
            )
            metrics = {"samples": float(len(tokens)), "tokens": float(sum(tokens))}
            tracking_run.run.log_metrics({f"{k}/{resolution}": v for k, v in metrics.items()})
        tracking_run.run.log_table(rows, "latents")
        publish("latents", markdown_table(rows))
    return autoencoder.reference
