"""Every stage of the tiny preset, with real shards and latents, for a few steps.

`python tests/test_stages.py` writes the golden losses anew: do so when a change of the models, the
losses or the loader means to change them, and say so in the commit.
"""

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_data import write_spheres

from model.vae import chunk_rows
from tasks import stages
from tasks.image_encoder import EncoderUnavailableError, load_image_encoder
from tasks.latents import LatentSet, encode_latents
from tasks.metrics import Surface, topology
from tasks.presets import Preset, load_preset
from tasks.stage_pictures import with_pictures
from tasks.stages import (
    FlowModule,
    StructureVAEModule,
    VAEModule,
    build_loader,
    build_module,
    build_stage,
    latent_encoder,
    load_module,
    random_chunks,
    stage_resolution,
)
from tasks.training import NoReport, train

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"
NAMES = ("vae", "structure-vae", "structure", "dit-64")
STEPS = 4


class Losses(NoReport):
    def __init__(self, fail_at: int = -1):
        self.losses: dict[int, float] = {}
        self.pictures: dict[str, np.ndarray] = {}
        self.shapes: dict[str, Surface] = {}
        self.fail_at = fail_at

    def metrics(self, step, values):
        self.losses[step] = values["loss"]
        if step == self.fail_at:
            raise KeyboardInterrupt

    def picture(self, step, name, image):
        self.pictures[name] = image

    def meshes(self, step, meshes):
        assert step == STEPS
        self.shapes = meshes


def short_preset() -> Preset:
    changes = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "picture_every": 100}
    changes |= {"token_budget": 400, "warmup_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.9}
    return load_preset(
        "tiny", {f"training.{name}.{k}": v for name in NAMES for k, v in changes.items()}
    )


class Workshop:
    """A data folder and the latents of untrained autoencoders, made once."""

    def __init__(self, root: Path):
        torch.set_num_threads(1)
        self.root, self.preset = root, short_preset()
        self.samples = write_spheres(root, 4, resolution=64, views=3, view_size=56)
        self.latents: dict[str, LatentSet] = {}
        for name, source in (("structure", "structure-vae"), ("dit-64", "vae")):
            module = build_module(source, self.preset)
            assert isinstance(module, VAEModule | StructureVAEModule)
            encode = latent_encoder(module, root, CPU)
            self.latents[name] = encode_latents(encode, self.samples, root, source)

    def run(self, name, folder, report, autoencoder=None):
        latents = self.latents.get(name)
        stage = with_pictures(build_stage(name, self.preset, latents), autoencoder)
        samples = latents.samples if latents else self.samples
        loader = build_loader(name, self.preset, samples, self.root)
        return train(stage, self.preset.training[name], loader, folder, report, CPU)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    threads = torch.get_num_threads()
    yield Workshop(tmp_path_factory.mktemp("data"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """Every stage, uninterrupted: name -> report and result."""
    runs = {}
    for name in NAMES:
        source = {"structure": "structure-vae", "dit-64": "vae"}.get(name)
        autoencoder = runs[source][1].checkpoint if source else None
        report = Losses()
        result = workshop.run(name, tmp_path_factory.mktemp(name), report, autoencoder)
        runs[name] = report, result
    return runs


@pytest.mark.parametrize("name", NAMES)
def test_the_first_losses_are_the_golden_ones(finished, name):
    found = list(finished[name][0].losses.values())
    expected = json.loads(GOLDEN.read_text())[name]
    # Other processors and versions of torch sum in other orders.
    assert found == pytest.approx(expected, rel=1e-3), f"{name}: {found}"


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_stage_goes_on_with_exactly_the_same_losses(workshop, finished, tmp_path, name):
    before, after = Losses(fail_at=3), Losses()
    with pytest.raises(KeyboardInterrupt):
        workshop.run(name, tmp_path, before)
    workshop.run(name, tmp_path, after)
    assert min(after.losses) == 3
    assert before.losses | after.losses == finished[name][0].losses


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_alone_gives_the_model_and_its_pictures(workshop, finished, name):
    report, result = finished[name]
    module = load_module(result.checkpoint)
    assert not module.training
    trained = load_module(result.checkpoint, ema=False)
    pairs = zip(module.parameters(), trained.parameters(), strict=True)
    assert any(not torch.equal(averaged, last) for averaged, last in pairs)
    if isinstance(module, FlowModule):
        assert np.array_equal(module.latent_scale.numpy(), workshop.latents[name].scale)
    flow, sparse = isinstance(module, FlowModule), name in ("vae", "dit-64")
    whats = "condition - latents - generated" if flow else "target - reconstruction"
    kinds = ("sdf", "surface") if sparse else ("voxels",)
    assert set(report.pictures) == {f"{kind} {whats}" for kind in kinds}
    for picture in report.pictures.values():
        assert picture.shape == (256, (3 if flow else 2) * 256, 3)
        assert picture.std() > 5
    assert list(report.shapes) == (whats.split(" - ")[-2:] if sparse else [])


def test_the_target_surface_is_the_samples_own(finished):
    shapes = finished["vae"][0].shapes
    radii = np.linalg.norm(shapes["target"][0], axis=1)
    assert radii.std() < 1e-3
    assert topology(*shapes["target"]).euler_number == 2
    picture = finished["vae"][0].pictures["surface target - reconstruction"][:, :256]
    assert 0.02 < (picture < 250).mean() < 0.8  # a ball on white


def test_latents_are_normalised_and_back(workshop, finished):
    for name in ("structure", "dit-64"):
        module = load_module(finished[name][1].checkpoint)
        assert isinstance(module, FlowModule)
        batch = next(
            iter(build_loader(name, workshop.preset, workshop.latents[name].samples, workshop.root))
        )
        x0 = module.normalise(batch)
        rows = x0 if isinstance(x0, torch.Tensor) else x0.feats
        back = module.denormalise(rows)
        if name == "structure":
            back = back.permute(0, 2, 3, 4, 1).flatten(0, 3)
        assert torch.allclose(back, batch.latents, atol=1e-5)
        assert 0.3 < rows.std() < 2


def test_a_finer_stage_starts_from_the_averaged_weights_below(workshop, finished, tmp_path):
    changes = {"data.resolutions": [64, 128], "training.dit-128": {}}
    table = {"steps": 4, "token_budget": 4000, "resolutions": [128], "start_from": "dit-64"}
    preset = load_preset("tiny", changes | {f"training.dit-128.{k}": v for k, v in table.items()})
    latents = replace(workshop.latents["dit-64"], mean=np.full(16, 7, np.float32))
    start = finished["dit-64"][1].checkpoint
    stage = build_stage("dit-128", preset, latents, start)
    weights = load_module(start).state_dict()
    for key, value in stage.module.state_dict().items():
        if key == "latent_mean":
            assert (value == 7).all()
        elif key != "latent_scale":
            assert torch.equal(value, weights[key]), key
    assert len(stage.description["start"]) == 64
    with pytest.raises(ValueError, match=r'start_from is "dit-64".*is None: give both'):
        build_stage("dit-128", preset, latents)
    with pytest.raises(ValueError, match=r'is of stage vae, not of "dit-64"'):
        build_stage("dit-128", preset, latents, finished["vae"][1].checkpoint)


def test_what_does_not_fit_is_refused(workshop):
    with pytest.raises(ValueError, match="encode them first"):
        build_stage("dit-64", workshop.preset)
    few = replace(workshop.latents["dit-64"], mean=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"3 channels.*16"):
        build_stage("dit-64", workshop.preset, few)
    wrong = load_preset(
        "tiny", {"structure.grid": 16, "structure.latent_grid": 8, "data.resolutions": [64]}
    )
    with pytest.raises(ValueError, match=r"structure.grid is 16: take 128 alone"):
        build_loader("structure-vae", wrong, workshop.samples, workshop.root)
    assert [stage_resolution(n) for n in ("vae", "vae-1024", "dit-64")] == [0, 1024, 64]
    for name in ("dit", "dit-60", "structure-64", "gan"):
        with pytest.raises(ValueError, match="there is no stage"):
            stage_resolution(name)


def test_random_chunks_hold_a_part_of_every_sample(workshop):
    samples = [replace(s, resolution=64) for s in workshop.samples]
    preset = load_preset("tiny", {"training.vae.token_budget": 4000})
    batch = next(iter(build_loader("vae", preset, samples, workshop.root)))
    inside, around = random_chunks(batch, torch.Generator().manual_seed(1))
    assert (around | ~inside).all()
    assert set(batch.coords[inside, 0].tolist()) == set(range(len(samples)))
    for sample in range(len(samples)):
        cells = batch.coords[inside & (batch.coords[:, 0] == sample)] // torch.tensor([1, 2, 2, 2])
        assert len(cells.unique(dim=0)) == 1
        here, near = chunk_rows(batch.coords, cells[0], 2)
        rows = batch.coords[:, 0] == sample
        assert torch.equal(inside[rows], here[rows])
        assert torch.equal(around[rows], near[rows])


def test_a_chunk_is_decoded_as_in_the_whole(workshop, monkeypatch):
    """The loss over one chunk is that of the same voxels decoded with all the others."""
    preset = load_preset("tiny", {"vae.lambda_kl": 0.0, "training.vae.token_budget": 1024})
    batch = next(iter(build_loader("vae", preset, workshop.samples[-1:], workshop.root)))
    module = build_module("vae", preset)
    monkeypatch.setattr(stages, "sample_latent", lambda mean, logvar, generator: mean)
    with torch.no_grad():
        monkeypatch.setattr(stages, "CHUNKED_RESOLUTION", 64)
        chunk, parts = module(batch, torch.Generator().manual_seed(1))
        inside, _ = random_chunks(batch, torch.Generator().manual_seed(1))
        assert 0 < inside.sum() < len(inside)
        mean, _ = module.vae.encode(stages.band_tensor(batch.coords, batch.values))
        values = module.vae.decode(mean)[inside]
    error = (values - batch.values[inside]).square()[batch.values[inside].abs() < 1].mean()
    assert math.isclose(parts["in"], error, rel_tol=1e-4)
    assert chunk.isfinite()


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A small DINOv2 with registers, untrained, saved as the hub's folders are."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dino")
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


def dino_preset(path) -> Preset:
    encoder = {
        "kind": "dinov2",
        "image_size": 28,
        "patch": 14,
        "width": 32,
        "blocks": 2,
        "heads": 2,
    }
    encoder |= {"path": str(path), "name": "nobody/nothing"}
    return load_preset("tiny", {f"encoder.{k}": v for k, v in encoder.items()})


def test_dinov2_is_frozen_and_no_part_of_the_checkpoint(workshop, dino_folder):
    preset = dino_preset(dino_folder)
    latents = workshop.latents["dit-64"]
    stage = build_stage("dit-64", preset, latents)
    assert isinstance(stage.module, FlowModule)
    assert stage.module.encoder is None
    assert not [k for k in stage.module.state_dict() if "backbone" in k]
    assert str(dino_folder) not in json.dumps(stage.description)
    batch = next(iter(build_loader("dit-64", preset, latents.samples, workshop.root)))
    inputs = stage.prepare(batch, CPU)
    assert inputs.tokens[0].shape == (len(batch.asset_ids), 4, 32)
    loss, _ = stage.module(inputs, torch.Generator().manual_seed(0))
    loss.backward()
    assert stage.module.conditioning.project.weight.grad is not None
    with pytest.raises(ValueError, match="none came"):
        stage.module.condition(batch.rgba)


def test_an_encoder_that_is_not_there_is_an_error_and_never_another(
    dino_folder, tmp_path, monkeypatch
):
    with pytest.raises(EncoderUnavailableError, match=r"no config.json.*hf download nobody/"):
        load_image_encoder(dino_preset(tmp_path).encoder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderUnavailableError, match=r"nothing could not be loaded; set encoder"):
        load_image_encoder(replace(dino_preset(dino_folder).encoder, path=""))
    with pytest.raises(ValueError, match="blocks is 3 in the configuration, 2 there"):
        load_image_encoder(replace(dino_preset(dino_folder).encoder, blocks=3))
    with pytest.raises(ValueError, match='"small-vit"'):
        load_image_encoder(load_preset("tiny").encoder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder) / "data")
        golden = {}
        for name in NAMES:
            report = Losses()
            workshop.run(name, Path(folder) / name, report)
            golden[name] = list(report.losses.values())
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    sys.stdout.write(GOLDEN.read_text())
