import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from synthetic_data import write_spheres

from flows.run import Tracked
from flows.stages import Means, on_gpus, train_stage
from tasks import ray_training
from tasks.model_files import ModelFiles
from tasks.presets import load_preset
from tasks.ray_training import TrainingBusyError, TrainingJob, only_writer, train_on_ray
from tasks.stages import build_loader, build_stage
from tasks.tracking import model_versions, start_run, tracking_uri
from tasks.training import NoReport, TrainingDivergedError, TrainingResult, _seed, train

# Ray's own modules warn of each other's deprecated settings.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    pytest.mark.timeout(400),  # each start of Ray's actors imports torch; busy cores take minutes
]
STEPS = 6
CPU = torch.device("cpu")


class FileReport(NoReport):
    """Appends each loss to a file, which outlives the worker; at one step, kills it for once."""

    def __init__(self, path: Path, kill_at: int = -1):
        self.path, self.kill_at = path, kill_at

    def metrics(self, step, values):
        with self.path.open("a") as file:
            file.write(json.dumps([step, values["loss"]]) + "\n")
        killed = self.path.with_suffix(".killed")
        if step == self.kill_at and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def read(path: Path) -> list[tuple[int, float]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def samples(root):
    return tuple(write_spheres(root, 5, resolution=64))


def make_job(root, samples, **overrides) -> TrainingJob:
    values = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "token_budget": 4096}
    values |= overrides
    preset = load_preset(
        "tiny",
        {f"training.structure-vae.{k}": v for k, v in values.items()}
        | {"structure.vae_channels": [8, 8], "structure.latent_channels": 2},
    )
    return TrainingJob("structure-vae", preset, str(root), samples, "0123456789abcdef")


def bare(job, folder, report) -> TrainingResult:
    stage = build_stage(job.stage, job.preset)
    loader = build_loader(job.stage, job.preset, job.samples, job.root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(stage, job.preset.training[job.stage], loader, folder, report, CPU)
    finally:
        torch.set_num_threads(threads)


def test_two_workers_take_the_mean_of_their_losses_and_a_killed_one_goes_on_with_the_same(
    ray_session, root, samples, tmp_path
):
    job = make_job(root, samples, token_budget=64, steps=4)  # a sample a batch
    log = tmp_path / "log"
    result = train_on_ray(job, lambda: FileReport(log, kill_at=3), num_workers=2, cpus_per_worker=1)
    assert (result.step, result.finished) == (4, True)
    assert result.checkpoint.parent == job.checkpoint_dir
    # Killed after step 3, so from the checkpoint of step 2 on again: 3 is told twice, alike.
    told = read(log)
    assert [step for step, _ in told] == [1, 2, 3, 3, 4]
    assert told[2] == told[3]
    expected = []
    for rank in range(2):
        stage = build_stage(job.stage, job.preset)
        batch = next(iter(build_loader(job.stage, job.preset, samples, root, rank, 2)))
        generator = _seed(job.preset.training[job.stage].seed, 0, rank, 0, CPU)
        expected.append(float(stage.module(batch, generator)[0].detach()))
    assert told[0][1] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "tried_again", "overrides", "error"),
    [
        (1, False, {"learning_rate": 1e30, "schedule": "constant"}, TrainingDivergedError),
        (2, False, {"learning_rate": 1e30, "schedule": "constant"}, TrainingDivergedError),
        (1, False, {}, OSError),
        (2, True, {}, OSError),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    ray_session, root, samples, monkeypatch, workers, tried_again, overrides, error
):
    """Ray Train tries again what a worker raises, and not what it returns."""

    class Context:  # of a Ray Train worker, and of Ray's
        get_world_rank = staticmethod(lambda: 0)
        get_world_size = staticmethod(lambda: workers)
        get_assigned_resources = staticmethod(lambda: {"CPU": torch.get_num_threads()})

    def train_alone(*arguments):
        if error is OSError:
            raise OSError("no space left on device")
        return train(*arguments[:6])

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray_training, "get_device", lambda: CPU)
    monkeypatch.setattr(ray_training, "train", train_alone)
    job = make_job(root, samples, seed=10 + workers, warmup_steps=0, **overrides)
    config = {"job": job, "make_report": NoReport}
    if tried_again:
        with pytest.raises(error):
            ray_training._train_worker(config)
    else:
        assert isinstance(ray_training._train_worker(config), error)


def test_a_run_name_tells_data_and_configuration_apart(root, samples):
    job = make_job(root, samples)
    start = ModelFiles("gigashape-tiny-vae/1", "12" * 32, "sqlite:///a.db")
    names = {
        job.run_name,
        make_job(root, samples, steps=7).run_name,
        make_job(root, samples, seed=1).run_name,
        replace(job, start=start).run_name,
        replace(job, start=replace(start, weights="34" * 32)).run_name,
    }
    assert len(names) == 5
    assert job.run_name.startswith("structure-vae-0123456789ab-")
    # What decides no weight may change within a run, as its checkpoints allow.
    cadence = {"max_minutes": 9, "log_every": 5, "picture_every": 5, "checkpoint_every": 3}
    same = make_job(root, samples, loader_workers=1, keep_checkpoints=5, **cadence)
    assert same.run_name == job.run_name
    elsewhere = replace(start, reference="gigashape-tiny-vae/7", uri="http://server")
    assert replace(job, start=elsewhere).run_name == replace(job, start=start).run_name


def test_a_stopped_training_goes_on_and_is_registered_once_it_is_done(
    ray_session, root, samples, tmp_path, monkeypatch
):
    def without_ray_train(job, *_, **__):  # its start takes longer than all the rest
        return bare(job, job.checkpoint_dir, NoReport())

    monkeypatch.setattr("flows.stages.train_on_ray", without_ray_train)
    uri = tracking_uri(tmp_path)
    with start_run("train", "train", uri) as run:
        tracked, means = Tracked(run, "train", "train", ""), Means(1, False, None)
        stopped = make_job(root, samples, seed=2, max_minutes=1e-6)
        first = train_stage(stopped, tracked, means, {})
        assert (first.tags["step"], first.tags["finished"]) == ("1", "False")
        job = make_job(root, samples, seed=2, max_minutes=0)
        second = train_stage(job, tracked, means, {})
        assert (second.tags["step"], second.tags["finished"]) == (str(STEPS), "True")
        assert train_stage(job, tracked, means, {}) == second
        assert train_stage(stopped, tracked, means, {}) == second
    assert second.version == 2
    assert second.tags["training_run"] == first.tags["training_run"] == job.run_name
    assert [v.version for v in model_versions(second.name, uri)] == [1, 2]


def test_one_folder_has_one_training(ray_session, root, samples, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.ray_training.BUSY_SECONDS", 0.3)
    job = make_job(root, samples, seed=3)
    (job.checkpoint_dir / "step-00000001").mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from tasks.ray_training import only_writer\n"
            "with only_writer(Path(sys.argv[1])):\n"
            "    print(flush=True); time.sleep(200)",
            str(job.checkpoint_dir),
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    for fresh in (False, True):
        with pytest.raises(TrainingBusyError, match=r"another process trains into .*structure-vae"):
            train_on_ray(job, NoReport, cpus_per_worker=1, fresh=fresh)
    assert (job.checkpoint_dir / "step-00000001").exists(), "fresh deletes nothing of another's"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with only_writer(job.checkpoint_dir):  # the lock went with its process
        pass


@pytest.mark.parametrize(("gpus", "workers"), [(0, 3), (2, 2), (4, 1)])
def test_workers_have_a_gpu_each_where_there_are_gpus(monkeypatch, gpus, workers):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    assert on_gpus(workers) == (gpus > 0)


def test_too_few_gpus_are_no_reason_to_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    with pytest.raises(ValueError, match=r"workers is 3, but Ray has 2 GPU.*take at most 2"):
        on_gpus(3)
