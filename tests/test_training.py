import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic_data import write_spheres
from torch import nn
from torch.nn import functional

from tasks import checkpoint
from tasks.loader import Loader, SampleDataset
from tasks.storage import open_filesystem
from tasks.training import (
    Shown,
    Stage,
    TrainingConfig,
    TrainingDivergedError,
    learning_rate,
    train,
)

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    steps=12,
    token_budget=60,
    resolutions=(32,),
    learning_rate=1e-2,
    warmup_steps=3,
    log_every=1,
    checkpoint_every=4,
    picture_every=6,
    seed=5,
)


class Recorder:
    """Keeps what the loop reports, and may stop it as a fault would."""

    def __init__(self, fail_at: int = -1):
        self.losses: dict[int, float] = {}
        self.values: dict[int, dict[str, float]] = {}
        self.pictures: list[tuple[int, str]] = []
        self.shapes: list[tuple[int, list[str]]] = []
        self.checkpoints: list[int] = []
        self.fail_at = fail_at

    def metrics(self, step, values):
        self.losses[step], self.values[step] = values["loss"], values
        if step == self.fail_at:
            raise KeyboardInterrupt

    def picture(self, step, name, image):
        self.pictures.append((step, name))

    def meshes(self, step, meshes):
        self.shapes.append((step, list(meshes)))

    def checkpoint(self, step, path):
        self.checkpoints.append(step)


class Toy(nn.Module):
    """Reconstructs blocks; uses dropout (torch's own generator) and noise (the step's)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(512, 16), nn.Dropout(0.2), nn.Linear(16, 512))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, values, generator):
        flat = values.flatten(1)
        self.seen += len(flat)
        noise = torch.randn(flat.shape, generator=generator)
        loss = functional.mse_loss(self.layers(flat + 0.1 * noise), flat)
        return loss, {"error": loss.detach().sqrt()}


def toy_stage(prepare=lambda batch, device: batch.values, description=None) -> Stage:
    def show(module, inputs, generator):
        assert not module.training
        triangle = np.eye(3), np.array([[0, 1, 2]])
        return Shown({"slice": np.zeros((2, 2, 3), np.uint8)}, {"target": triangle})

    return Stage("toy", Toy(), prepare, show, description or {"width": 16})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def samples(root):
    return write_spheres(root, 6)


def toy_loader(root, samples, config=CONFIG) -> Loader:
    filesystem, base = open_filesystem(root)
    dataset = SampleDataset(samples, filesystem, base, "sdf", False, config.seed)
    return Loader(dataset, config.token_budget)


def run(root, samples, folder, config=CONFIG, fail_at=-1, stage=None):
    report = Recorder(fail_at)
    stage = stage or toy_stage()
    result = train(stage, config, toy_loader(root, samples, config), folder, report, CPU)
    return report, result


@pytest.fixture(scope="module")
def uninterrupted(root, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    report, result = run(root, samples, folder)
    return folder, report, result


def test_a_run_reports_and_learns(uninterrupted):
    folder, report, result = uninterrupted
    assert (result.step, result.finished) == (12, True)
    assert result.checkpoint == folder / "step-00000012"
    assert report.losses[12] < 0.7 * report.losses[1]
    assert report.checkpoints == [4, 8, 12]
    assert report.pictures == [(s, "slice") for s in (4, 6, 8, 12)]
    assert report.shapes == [(12, ["target"])]  # once, at the end
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000008", "step-00000012"]
    values = report.values[12]
    assert set(values) == {
        "loss",
        "error",
        "learning_rate",
        "gradient_norm",
        "epoch",
        "tokens_per_second",
        "voxels_per_second",
        "step_seconds",
        "data_wait_seconds",
        "peak_memory_bytes",
    }
    assert math.isclose(values["error"] ** 2, values["loss"], rel_tol=1e-5)
    assert math.isclose(values["voxels_per_second"], 512 * values["tokens_per_second"])
    assert 1e8 < values["peak_memory_bytes"] < 1e10
    assert 0 < values["data_wait_seconds"] < values["step_seconds"]


@pytest.mark.parametrize("fail_at", [2, 4, 7, 11])
def test_a_stopped_run_goes_on_with_exactly_the_same_losses(
    root, samples, tmp_path, uninterrupted, fail_at
):
    whole_folder, whole, _ = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        run(root, samples, tmp_path, fail_at=fail_at)
    report, result = run(root, samples, tmp_path)
    assert result.finished
    # The checkpoint of step 4 follows its metrics, so a run stopped by these starts anew.
    first = (fail_at - 1) // 4 * 4 + 1
    assert report.losses == {step: whole.losses[step] for step in range(first, 13)}
    for name in ("model.safetensors", "ema.safetensors"):
        expected = load_file(whole_folder / "step-00000012" / name)
        found = load_file(tmp_path / "step-00000012" / name)
        assert all(torch.equal(expected[k], found[k]) for k in expected)


def slow_run(root, samples, folder, log):
    """What the killed process runs: the toy, slowed down, telling each step in a file."""

    class Telling(Recorder):
        def metrics(self, step, values):
            with Path(log).open("a") as file:
                file.write(json.dumps([step, values["loss"]]) + "\n")
            time.sleep(0.2)

    torch.set_num_threads(1)
    train(toy_stage(), CONFIG, toy_loader(root, samples), folder, Telling(), CPU)


def test_kill_9_in_the_middle_loses_and_doubles_nothing(root, samples, tmp_path, uninterrupted):
    _, whole, _ = uninterrupted
    log = tmp_path / "log"
    log.touch()
    arguments = (root, samples, tmp_path / "run", log)
    process = multiprocessing.get_context("spawn").Process(target=slow_run, args=arguments)
    process.start()
    deadline = time.monotonic() + 120
    while len(log.read_text().splitlines()) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = dict(json.loads(line) for line in log.read_text().splitlines())
    assert 6 <= max(before) < 12
    report, result = run(root, samples, tmp_path / "run")
    assert min(report.losses) == max(before) // 4 * 4 + 1 or max(before) % 4 == 0
    assert result.finished
    assert before | report.losses == whole.losses


def test_a_finished_run_returns_at_once(root, samples, uninterrupted):
    folder, _, _ = uninterrupted
    report, result = run(root, samples, folder)
    assert not report.losses
    assert (result.step, result.finished, result.checkpoint) == (12, True, folder / "step-00000012")


def test_another_configuration_or_stage_is_refused(root, samples, uninterrupted):
    folder, _, _ = uninterrupted
    with pytest.raises(ValueError, match="made with another training"):
        run(root, samples, folder, replace(CONFIG, learning_rate=1e-3))
    with pytest.raises(ValueError, match="made with another description"):
        run(root, samples, folder, stage=toy_stage(description={"width": 32}))
    run(root, samples, folder, replace(CONFIG, log_every=5, loader_workers=0, max_minutes=9))


def test_accumulation_takes_the_mean_gradient_of_its_batches(root, samples, tmp_path):
    class Plain(Toy):
        def forward(self, values, generator):
            flat = values.flatten(1)
            return functional.mse_loss(self.layers[2](self.layers[0](flat)), flat), {}

    stage = replace(toy_stage(), module=Plain())
    config = replace(CONFIG, accumulation=2, steps=1)
    report, _ = run(root, samples, tmp_path, config, stage=stage)
    plain, batches = Plain(), iter(toy_loader(root, samples))
    first, second = (plain(next(batches).values, None)[0] for _ in range(2))
    mean = (first + second) / 2
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    assert math.isclose(report.values[1]["loss"], mean.item(), rel_tol=1e-6)
    assert math.isclose(report.values[1]["gradient_norm"], norm.item(), rel_tol=1e-5)
    assert first.item() != second.item()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(root, samples, tmp_path, poison):
    steps = 0

    class Rooted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    class Poisoned(Toy):
        def forward(self, values, generator):
            nonlocal steps
            steps += 1
            loss, parts = super().forward(values, generator)
            if steps == 6:
                loss = loss * math.nan if poison == "loss" else Rooted.apply(loss)
            return loss, parts

    stage = replace(toy_stage(), module=Poisoned())
    match = "loss of toy is nan at step 6 .*terms" if poison == "loss" else "gradient norm is .* 6"
    with pytest.raises(TrainingDivergedError, match=match):
        run(root, samples, tmp_path, stage=stage)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert all(p.isfinite().all() for p in stage.module.parameters())


def test_max_minutes_ends_with_a_checkpoint_that_goes_on(root, samples, tmp_path, uninterrupted):
    _, whole, _ = uninterrupted
    report, result = run(root, samples, tmp_path, replace(CONFIG, max_minutes=1e-9))
    assert (result.step, result.finished) == (1, False)
    rest, result = run(root, samples, tmp_path)
    assert result.finished
    assert report.losses | rest.losses == whole.losses


def test_the_average_follows_the_weights(root, samples, tmp_path):
    run(root, samples, tmp_path, replace(CONFIG, ema_decay=0.0))
    folder = tmp_path / "step-00000012"
    model, ema = (load_file(folder / f"{n}.safetensors") for n in ("model", "ema"))
    assert all(torch.equal(model[k], ema[k]) for k in model)
    run(root, samples, tmp_path / "slow", replace(CONFIG, ema_decay=0.9))
    folder = tmp_path / "slow" / "step-00000012"
    model, ema = (load_file(folder / f"{n}.safetensors") for n in ("model", "ema"))
    assert not torch.equal(model["layers.0.weight"], ema["layers.0.weight"])
    assert model["seen"] == ema["seen"] > 0


def test_schedules():
    rates = [learning_rate(CONFIG, step) for step in range(12)]
    assert np.allclose(rates[:3], [1e-2 / 3, 2e-2 / 3, 1e-2])
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert np.isclose(learning_rate(CONFIG, 12), 1e-3)
    constant = replace(CONFIG, schedule="constant")
    assert {learning_rate(constant, step) for step in range(3, 12)} == {1e-2}


def test_a_wrong_configuration_names_itself():
    with pytest.raises(ValueError, match=r"TrainingConfig.steps is 0; it must be above zero"):
        replace(CONFIG, steps=0)
    with pytest.raises(ValueError, match=r"ema_decay is 1.0"):
        replace(CONFIG, ema_decay=1.0)


def test_the_loop_and_the_stages_need_no_orchestration():
    """A bare GPU machine has torch, pyarrow, safetensors, transformers and Pillow."""
    absent = ["prefect", "ray", "mlflow", "deltalake", "pydantic", "trimesh", "numba", "typer"]
    block = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    code = f"{block}; import benchmarks.training"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones((), dtype=torch.int64)}


def save(folder, step, keep=2) -> Path:
    return checkpoint.save(folder, {"step": step}, tensors(), tensors(), {"x": [step]}, keep)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    found = checkpoint.load(save(tmp_path, 3))
    assert found.step == 3
    assert torch.equal(found.weights(ema=True)["a"], tensors()["a"])
    assert found.optimiser() == {"x": [3]}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / ("state.json" if damage == "no state" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "skipping a damaged checkpoint" in caplog.text
    assert str(newest) in caplog.text
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint .* is damaged"):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_half_written_is_none(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)
    save(tmp_path, 3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-00000002", "step-00000003"]
