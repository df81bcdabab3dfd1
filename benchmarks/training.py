"""The bare training loop, stage after stage, as on a machine with only torch and pyarrow.

    python benchmarks/training.py --preset small --data DIR --minutes 3 --out OUT

DIR is a data folder with `samples.parquet` (`tasks.samples.write_index`). Every stage of the
preset trains for at most that many minutes, on the latents of the ones before; OUT gets
`metrics.jsonl`, the checkpoints, and `reconstructions.npz` with what the VAE makes of some
samples. Prints a table of rates and peak memory.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from model.sdf import BLOCK
from model.vae import band_tensor
from tasks.latents import LatentSet, encode_latents, latents_digest
from tasks.presets import Preset, load_preset
from tasks.samples import SampleRef, read_index
from tasks.shards import read_sdf
from tasks.stages import (
    StructureVAEModule,
    VAEModule,
    build_loader,
    build_stage,
    latent_encoder,
    load_module,
)
from tasks.storage import open_filesystem
from tasks.training import NoReport, TrainingResult, autocast, train

WARM_UP = 10  # steps before the rates count: kernels are compiled, memory is taken


class BenchmarkReport(NoReport):
    """Appends metrics to a file, prints some of them, and keeps them for the table."""

    def __init__(self, stage: str, file: Path):
        self.stage, self.file = stage, file
        self.rows: list[dict[str, float]] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take the means of some steps."""
        self.rows.append({"step": step} | values)
        with self.file.open("a") as stream:
            stream.write(json.dumps({"stage": self.stage, "step": step} | values) + "\n")
        if step % 100 == 0:
            told = ("loss", "gradient_norm", "step_seconds", "data_wait_seconds")
            print(self.stage, step, *(f"{k} {values[k]:.4g}" for k in told), flush=True)

    def summary(self) -> dict[str, float]:
        """Medians of the rates after the warm-up; the first and the last losses."""
        steady = [row for row in self.rows if row["step"] > WARM_UP] or self.rows
        names = ("step_seconds", "data_wait_seconds", "tokens_per_second", "voxels_per_second")
        rates = {k: float(np.median([r[k] for r in steady])) for k in names if k in steady[0]}
        tail = [row["loss"] for row in self.rows[-5:]]
        losses = {"first_loss": self.rows[0]["loss"], "last_loss": float(np.mean(tail))}
        return {"steps": self.rows[-1]["step"], **losses, **rates} | {
            "peak_gib": max(row["peak_memory_bytes"] for row in self.rows) / 2**30
        }


def run_stage(
    name: str,
    preset: Preset,
    root: Path,
    samples: list[SampleRef],
    out: Path,
    device: torch.device,
    latents: LatentSet | None,
    done: dict[str, TrainingResult],
) -> tuple[TrainingResult, dict[str, float]]:
    """Train one stage and return its result and its row of the table."""
    config = preset.training[name]
    start = done[config.start_from].checkpoint if config.start_from else None
    stage = build_stage(name, preset, latents, start)
    loader = build_loader(name, preset, latents.samples if latents else samples, root)
    report = BenchmarkReport(name, out / "metrics.jsonl")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = train(stage, config, loader, out / name, report, device)
    return result, report.summary()


def encode(
    checkpoint: Path, root: Path, samples: list[SampleRef], resolution: int, device: torch.device
) -> LatentSet:
    """Encode the samples of one resolution under a trained autoencoder."""
    module = load_module(checkpoint)
    assert isinstance(module, VAEModule | StructureVAEModule)
    chosen = [s for s in samples if s.resolution == resolution]
    digest = latents_digest(str(checkpoint.absolute()), str(resolution))
    return encode_latents(latent_encoder(module, root, device), chosen, root, digest)


def save_reconstructions(
    checkpoint: Path, root: Path, samples: list[SampleRef], out: Path, device: torch.device
) -> None:
    """Write blocks, target and reconstruction of some samples, to look at elsewhere."""
    module = load_module(checkpoint).to(device)
    assert isinstance(module, VAEModule)
    filesystem, base = open_filesystem(root)
    arrays: dict[str, np.ndarray] = {}
    for number, sample in enumerate(samples):
        sdf = read_sdf(filesystem, f"{base}/{sample.path}", sample.row_group)
        coords = functional.pad(torch.from_numpy(sdf.blocks.copy()), (1, 0)).to(device)
        with torch.no_grad(), autocast(device):
            mean, _ = module.vae.encode(
                band_tensor(coords, torch.from_numpy(sdf.values).to(device))
            )
            values = module.vae.decode_chunked(mean, sdf.resolution // BLOCK)
        arrays[f"blocks_{number}"] = sdf.blocks
        arrays[f"target_{number}"] = sdf.values.astype(np.float16)
        arrays[f"values_{number}"] = values.float().cpu().numpy().astype(np.float16)
    np.savez_compressed(out / "reconstructions.npz", **arrays)  # type: ignore[arg-type]


def main() -> None:
    """Read the command line, train the preset's stages in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--minutes", type=float, default=3.0, help="at most, for each stage")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="VALUE in JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    overrides = {k: json.loads(v) for k, v in (item.split("=", 1) for item in options.set)}
    names = list(load_preset(options.preset).training)
    overrides = {f"training.{n}.max_minutes": options.minutes for n in names} | overrides
    preset = load_preset(options.preset, overrides)
    filesystem, base = open_filesystem(options.data)
    samples, _ = read_index(filesystem, f"{base}/samples.parquet")
    options.out.mkdir(parents=True, exist_ok=True)

    done: dict[str, TrainingResult] = {}
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        latents = None
        if name == "structure" or name.startswith("dit-"):
            vaes = [n for n in done if n == "vae" or n.startswith("vae-")]
            source = done["structure-vae" if name == "structure" else vaes[-1]].checkpoint
            resolution = preset.training[name].resolutions[0]
            latents = encode(source, options.data, samples, resolution, device)
        done[name], rows[name] = run_stage(
            name, preset, options.data, samples, options.out, device, latents, done
        )
        print(name, json.dumps(rows[name]), flush=True)
        if name == "vae":
            finest = max(preset.training["vae"].resolutions)
            shown = [s for s in samples if s.resolution == finest][:4]
            save_reconstructions(done[name].checkpoint, options.data, shown, options.out, device)

    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"\n| stage | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in rows.items():
        values = (f"{row[c]:.4g}" if c in row else "-" for c in columns)
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
