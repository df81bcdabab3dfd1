"""The stages: what each trains, on which samples, with which loss, and from which weights.

    vae, vae-R       the sparse SDF VAE; vae-R continues at a finer resolution
    structure-vae    the dense VAE of the active latent voxels
    structure        the dense DiT over its latents, from a picture
    dit-R            the SS-DiT over the sparse latents of resolution R, from a picture

The module of a stage has the loss as its forward; generation uses its parts (`vae`, `dit`,
`condition`). Frozen helpers, such as a pretrained image encoder, are no part of it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from model.condition import Condition, DINOv2, SmallViT, SparseConditioning
from model.config import DiTConfig, EncoderConfig, StructureConfig, VAEConfig
from model.dit import SparseDiT
from model.flow import flow_loss, noise_like, sample_timesteps
from model.sdf import BLOCK
from model.sparse import SparseTensor
from model.structure import DenseDiT, StructureVAE, structure_vae_loss
from model.vae import SparseSDFVAE, band_tensor, chunk_rows, sample_latent, vae_loss
from tasks import checkpoint
from tasks.image_encoder import load_image_encoder
from tasks.latents import Encode, LatentSet
from tasks.loader import Batch, Kind, Loader, SampleDataset
from tasks.presets import Preset, build_config
from tasks.samples import SampleRef, split
from tasks.shards import read_sdf
from tasks.storage import open_filesystem
from tasks.training import Stage, autocast

CHUNKED_RESOLUTION = 1024  # from here on a VAE's training decodes one random chunk a sample
CONDITION_DROPOUT = 0.1  # for classifier-free guidance; the paper doesn't publish its rate

Config = TypeVar("Config")
Parts = dict[str, Tensor]


class VAEModule(nn.Module):
    """The sparse SDF VAE and its loss."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = SparseSDFVAE(config)

    def forward(self, batch: Batch, generator: Generator) -> tuple[Tensor, Parts]:
        """Return eq. (3) and its parts; from 1024 on of one random chunk of each sample."""
        assert batch.values is not None
        assert batch.sharp is not None
        mean, logvar = self.vae.encode(band_tensor(batch.coords, batch.values))
        z = sample_latent(mean, logvar, generator)
        target, sharp = batch.values, batch.sharp
        if max(batch.resolutions) < CHUNKED_RESOLUTION:
            values = self.vae.decode(z)
        else:
            hidden = self.vae.transform(z)
            inside, around = random_chunks(batch, generator)
            part = SparseTensor(z.coords[around], hidden.feats[around])
            values = self.vae.upsample(part)[inside[around]]
            target, sharp = target[inside], sharp[inside]
        return vae_loss(values, target, sharp, mean.feats, logvar.feats, self.config)


class StructureVAEModule(nn.Module):
    """The dense VAE of the active latent voxels and its loss."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = StructureVAE(config)

    def forward(self, batch: Batch, generator: Generator) -> tuple[Tensor, Parts]:
        """Return cross-entropy, dice and KL divergence of a batch's occupancy."""
        occupancy = dense_occupancy(batch.coords, len(batch.asset_ids), self.config.grid)
        logits, mean, logvar = self.vae(occupancy, generator)
        loss, parts = structure_vae_loss(logits, occupancy, mean, logvar, self.config)
        return loss, {name: part.detach() for name, part in parts.items()}


@dataclass(frozen=True)
class Pictured:
    """A batch with what a frozen image encoder makes of its pictures, if there is one."""

    batch: Batch
    tokens: tuple[Tensor, Tensor] | None


class FlowModule(nn.Module):
    """A diffusion transformer, its conditioning, and what normalises its latents.

    dit: dense where `structure` is given, else sparse. encoder: the small ViT, trained jointly, or
    None where a frozen one makes the image tokens.
    """

    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(
        self, config: DiTConfig | StructureConfig, encoder: EncoderConfig, resolution: int
    ) -> None:
        super().__init__()
        self.config = config
        self.dit: DenseDiT | SparseDiT
        if isinstance(config, StructureConfig):
            self.dit = DenseDiT(config)
        else:
            self.dit = SparseDiT(config, resolution // BLOCK)
        self.conditioning = SparseConditioning(encoder.width, config.condition_width)
        self.encoder = SmallViT(encoder) if encoder.kind == "small-vit" else None
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_scale", torch.ones(config.latent_channels))

    def condition(self, rgba: Tensor, tokens: tuple[Tensor, Tensor] | None = None) -> Condition:
        """Return the condition of pictures [B, 4, S, S]; tokens: of them, by a frozen encoder."""
        if self.encoder is not None:
            tokens = self.encoder(rgba)
        if tokens is None:
            raise ValueError("this model needs the image tokens of its frozen encoder; none came")
        return self.conditioning(*tokens, rgba[:, 3])

    def normalise(self, batch: Batch) -> SparseTensor | Tensor:
        """Return a batch's latents, normalised: sparse, or dense [B, C, g, g, g]."""
        assert batch.latents is not None
        rows = (batch.latents - self.latent_mean) / self.latent_scale
        if isinstance(self.config, DiTConfig):
            return SparseTensor(batch.coords, rows)
        side = self.config.latent_grid
        return rows.view(-1, side, side, side, rows.shape[1]).permute(0, 4, 1, 2, 3).contiguous()

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return latents [N, C] or [B, C, g, g, g] as the VAE gave them."""
        shape = (-1, *[1] * (latents.ndim - 2))
        return latents * self.latent_scale.view(shape) + self.latent_mean.view(shape)

    def forward(self, inputs: Pictured, generator: Generator) -> tuple[Tensor, Parts]:
        """Return eq. (11), each sample's condition dropped at times for guidance."""
        batch = inputs.batch
        assert batch.rgba is not None
        condition = self.condition(batch.rgba, inputs.tokens).drop(CONDITION_DROPOUT, generator)
        t = sample_timesteps(len(batch.rgba), batch.rgba.device, generator)
        x0: Any = self.normalise(batch)
        return flow_loss(self.dit, x0, condition, t, noise_like(x0, generator)), {}


StageModule = VAEModule | StructureVAEModule | FlowModule


def random_chunks(batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return rows in one chunk of each sample, and rows in or near it, as `chunk_rows` does.

    A chunk is a quarter of the grid's side and holds a random voxel of its sample.
    """
    inside = torch.zeros(len(batch.coords), dtype=torch.bool, device=batch.coords.device)
    around = inside.clone()
    starts = torch.bincount(batch.coords[:, 0].long()).cumsum(0).tolist()
    for begin, end, resolution in zip([0, *starts], starts, batch.resolutions, strict=False):
        side = max(1, resolution // BLOCK // 4)
        device = batch.coords.device
        row = begin + torch.randint(end - begin, (), generator=generator, device=device)
        cell = batch.coords[row].clone()
        cell[1:] //= side
        here, near = chunk_rows(batch.coords, cell, side)
        inside, around = inside | here, around | near
    return inside, around


def dense_occupancy(coords: Tensor, batch_size: int, grid: int) -> Tensor:
    """Return [B, 1, G, G, G] float32 in {0, 1} of active latent voxels coords [L, 4]."""
    occupancy = torch.zeros(batch_size, 1, grid, grid, grid, device=coords.device)
    sample, x, y, z = coords.long().unbind(1)
    occupancy[sample, 0, x, y, z] = 1
    return occupancy


def stage_resolution(name: str) -> int:
    """Return the resolution in a stage's name; 0 where it names none.

    Raises ValueError for a name that isn't a stage.
    """
    if name in ("vae", "structure-vae", "structure"):
        return 0
    kind, _, resolution = name.rpartition("-")
    if kind in ("vae", "dit") and resolution.isdigit() and int(resolution) % BLOCK == 0:
        return int(resolution)
    raise ValueError(
        f'there is no stage "{name}": take vae, vae-R, structure-vae, structure or dit-R, '
        "R a resolution, a multiple of 8"
    )


def build_module(name: str, preset: Preset) -> StageModule:
    """Return the untrained module of a stage; the same weights for the same preset."""
    torch.manual_seed(preset.training[name].seed)
    resolution = stage_resolution(name)
    if name == "structure-vae":
        return StructureVAEModule(preset.structure)
    if name.startswith("vae"):
        return VAEModule(preset.vae)
    config = preset.structure if name == "structure" else preset.dit
    return FlowModule(config, preset.encoder, resolution)


def load_module(path: Path, ema: bool = True, device: str = "cpu") -> StageModule:
    """Return the trained module in a checkpoint folder, in evaluation mode.

    ema: the averaged weights, which evaluation and generation use. The folder alone suffices.
    """
    found = checkpoint.load(path)
    name, description = found.state["stage"], found.state["description"]

    def config(kind: type[Config], key: str) -> Config:
        return build_config(kind, description[key], f"{path}/state.json")

    module: StageModule
    if name == "structure-vae":
        module = StructureVAEModule(config(StructureConfig, "model"))
    elif name.startswith("vae"):
        module = VAEModule(config(VAEConfig, "model"))
    else:
        dense = name == "structure"
        model = config(StructureConfig, "model") if dense else config(DiTConfig, "model")
        module = FlowModule(model, config(EncoderConfig, "encoder"), stage_resolution(name))
    module.load_state_dict(found.weights(ema))
    return module.to(device).eval()


def build_stage(
    name: str,
    preset: Preset,
    latents: LatentSet | None = None,
    start: Path | None = None,
    provenance: dict[str, str] | None = None,
) -> Stage:
    """Return a stage ready for `train`.

    latents: what a diffusion transformer learns; gives the normalisation. start: checkpoint folder
    of the stage that `training.<name>.start_from` names; needed if and only if it names one.
    provenance: what else tells this run from others, such as the dataset version's digest.
    """
    config = preset.training[name]
    if (start is None) != (config.start_from == ""):
        raise ValueError(
            f'training.{name}.start_from is "{config.start_from}", and the checkpoint to start '
            f"from is {start}: give both or neither"
        )
    module = build_module(name, preset)
    encoder: DINOv2 | None = None
    origin = ""
    if start is not None:
        origin = _start_from(module, start, config.start_from)
    if isinstance(module, FlowModule):
        if latents is None:
            raise ValueError(f"stage {name} trains on latents: encode them first, and pass the set")
        if len(latents.mean) != len(module.latent_mean):
            raise ValueError(
                f"the latents have {len(latents.mean)} channels, the transformer of {name} "
                f"{len(module.latent_mean)}: set latent_channels alike in the preset"
            )
        module.latent_mean.copy_(torch.from_numpy(latents.mean))
        module.latent_scale.copy_(torch.from_numpy(latents.scale))
        if module.encoder is None:
            encoder = load_image_encoder(preset.encoder)

    def prepare(batch: Batch, device: torch.device) -> Batch | Pictured:
        batch = batch.to(device)
        if not isinstance(module, FlowModule):
            return batch
        return Pictured(batch, encoder.to(device)(batch.rgba) if encoder else None)

    description = {
        "model": asdict(module.config),
        # Where its copy lies is no part of what the run is.
        "encoder": asdict(replace(preset.encoder, path="")),
        "latents": latents.digest if latents else "",
        "start": origin,
        "provenance": provenance or {},
    }
    return Stage(name, module, prepare, description=description)


def build_loader(
    name: str,
    preset: Preset,
    samples: Sequence[SampleRef],
    root: str | Path,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Return the loader of a stage over a data folder.

    samples: of the dataset version, or of the latent set for a diffusion transformer; those of
    other resolutions and of held-out assets are left aside here.
    """
    config = preset.training[name]
    chosen = [s for s in samples if s.resolution in config.resolutions]
    chosen, _ = split(chosen, preset.data.held_out)
    kind: Kind = "sdf"
    if name == "structure-vae":
        kind = "blocks"
        wrong = {s.resolution for s in chosen} - {BLOCK * preset.structure.grid}
        if wrong:
            raise ValueError(
                f"training.structure-vae.resolutions has {sorted(wrong)}, but structure.grid is "
                f"{preset.structure.grid}: take {BLOCK * preset.structure.grid} alone"
            )
        chosen = [replace(s, tokens=preset.structure.latent_grid**3) for s in chosen]
    elif name == "structure" or name.startswith("dit-"):
        kind = "latents"
    filesystem, base = open_filesystem(root)
    dataset = SampleDataset(chosen, filesystem, base, kind, kind == "latents", config.seed)
    return Loader(dataset, config.token_budget, rank, world_size, config.loader_workers)


def latent_encoder(
    module: VAEModule | StructureVAEModule, root: str | Path, device: torch.device
) -> Encode:
    """Return what `encode_latents` calls: reads a sample's SDF and encodes it on a device."""
    filesystem, base = open_filesystem(root)
    module = module.to(device).eval()

    def encode(sample: SampleRef) -> tuple[np.ndarray, np.ndarray]:
        sdf = read_sdf(filesystem, f"{base}/{sample.path}", sample.row_group)
        coords = functional.pad(torch.from_numpy(sdf.blocks.copy()), (1, 0)).to(device)
        with torch.no_grad(), autocast(device):
            if isinstance(module, VAEModule):
                values = torch.from_numpy(sdf.values).to(device)
                latents, _ = module.vae.encode(band_tensor(coords, values))
                return sdf.blocks, latents.feats.float().cpu().numpy()
            dense, _ = module.vae.encode(dense_occupancy(coords, 1, module.config.grid))
        side = dense.shape[2]
        cells = np.argwhere(np.ones((side, side, side))).astype(np.int32)
        return cells, dense[0].flatten(1).T.float().cpu().numpy()

    return encode


def _start_from(module: StageModule, start: Path, stage: str) -> str:
    """Load the averaged weights of an earlier stage; return what names them: their SHA-256."""
    found = checkpoint.load(start)
    if found.state["stage"] != stage:
        raise ValueError(f'{start} is of stage {found.state["stage"]}, not of "{stage}"')
    weights = found.weights(ema=True)
    if isinstance(module, FlowModule):  # the latents of another resolution have other statistics
        weights |= {k: v for k, v in module.state_dict().items() if k.startswith("latent_")}
    module.load_state_dict(weights)
    return str(found.state["files"]["ema.safetensors"])
