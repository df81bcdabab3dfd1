"""Refresh with real Ray, Parquet and Delta: nothing lost or done twice, whatever is killed."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from faulty_work import sphere
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from tasks import catalogue
from tasks import refresh as refresh_module
from tasks.catalogue import CatalogueError, Row, open_version
from tasks.processing import stage_rows
from tasks.ray_work import run_chunks, share_of_gpu
from tasks.refresh import (
    FailureBudgetError,
    RefreshConfig,
    RefreshReport,
    plan_refresh,
    refresh,
)
from tasks.shards import read_sdf, read_views, shard_path, verify_file
from tasks.storage import DatasetBusyError, exclusive

pytestmark = pytest.mark.usefixtures("ray_session")
LOCAL = fs.LocalFileSystem()
WORK = "faulty_work:work"


class Folder:
    """A source folder, a data folder, and what was called."""

    def __init__(self, path: Path, root: str):
        self.path, self.root = path / "meshes", root
        self.path.mkdir()
        self.config = RefreshConfig(
            root,
            f"folder:{self.path}",
            (32, 64),
            views=2,
            view_size=8,
            seconds=60,
            bytes=600 * 2**20,
            workers=2,
            shard_assets=2,
            failure_budget=0.5,
        )

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / f"{name}.obj").write_text(f"{text}")

    def refresh(self, **changes: object) -> RefreshReport:
        return refresh(replace(self.config, **changes), process=WORK)

    def calls(self) -> list[str]:
        """Return, and forget, the assets worked on."""
        log = self.path.parent / "calls"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(name.removesuffix(".obj") for name in names)

    def rows(self) -> dict[str, Row]:
        """The newest rows at resolution 32 by name."""
        rows = open_version(self.root).rows()
        return {row.uris[0].removesuffix(".obj"): row for row in rows if row.resolution == 32}

    def check_arrays(self, rows: list[Row]) -> None:
        """Check that every ready row's arrays are there, whole and its own."""
        for row in rows:
            if row.status == "ready":
                path = shard_path(self.root, row.shard, f"sdf-{row.resolution}.parquet")
                verify_file(LOCAL, path, row.sdf_sha256)
                expected = sphere(row.resolution, 0.5 + len(row.uris[0]) / 100)
                got = read_sdf(LOCAL, path, row.row_group)
                np.testing.assert_array_equal(got.blocks, expected.blocks)
                np.testing.assert_allclose(got.values, expected.values, atol=5e-5)
                path = shard_path(self.root, row.shard, "assets.parquet")
                verify_file(LOCAL, path, row.assets_sha256)
                assert len(read_views(LOCAL, path, row.assets_row_group)) == 2

    def leftovers(self) -> list[str]:
        """Files of the data folder that a finished refresh should not leave."""
        root = Path(self.root)
        used = catalogue.referenced_shards(self.root)
        found = [path for path in root.glob("shards/*") if path.name not in used]
        return [str(path) for path in (*found, *root.glob("staging/*"), *root.rglob("*.tmp"))]


@pytest.fixture
def folder(tmp_path: Path, data_root: str) -> Folder:
    return Folder(tmp_path, data_root)


def test_only_what_changed_is_done(folder: Folder) -> None:
    folder.write(a="good 1", bb="good 2", ccc="good 3", dddd="good 4", copy="good 1")
    seen: list[tuple[int, int, str]] = []
    report = refresh(folder.config, lambda *args: seen.append(args), WORK)
    assert folder.calls() == ["a", "bb", "ccc", "dddd"]
    assert report.plan.counts() == {"new": 8}
    assert report.outcomes == {"ready": 8}
    assert report.changed_share == 1
    assert set(report.stage_seconds) == {
        *("start", "load", "render", "convert-32", "convert-64", "write"),
    }
    assert min(report.stage_seconds.values()) > 0
    assert report.bytes_written > 10_000
    assert seen[0] == (0, 4, "")
    assert seen[-1] == (4, 4, "8 ready")
    first = report.version
    folder.check_arrays(first.rows())
    assert folder.rows()["a"].uris == ("a.obj", "copy.obj")
    assert folder.leftovers() == []

    started = time.monotonic()
    again = folder.refresh()
    assert time.monotonic() - started < 5
    assert folder.calls() == []
    assert again.version == again.previous == first
    assert again.plan.counts() == {"unchanged": 8}
    assert again.changed_share == 0

    folder.write(bb="good 22", eeeee="good 5")
    (folder.path / "ccc.obj").unlink()
    (folder.path / "copy.obj").unlink()
    expected = {"new": 2, "changed": 2, "relabelled": 2, "gone": 4, "unchanged": 2}
    before = sorted(str(p) for p in Path(folder.root).rglob("*"))
    assert plan_refresh(folder.config).counts() == expected
    assert sorted(str(p) for p in Path(folder.root).rglob("*")) == before
    third = folder.refresh()
    assert third.plan.counts() == expected
    assert folder.calls() == ["bb", "eeeee"]
    assert set(folder.rows()) == {"a", "bb", "dddd", "eeeee"}
    assert folder.rows()["a"].uris == ("a.obj",)
    assert third.version.number == first.number + 1
    for version, count in ((first, 8), (third.version, 8)):
        rows = open_version(folder.root, version.name).rows()
        assert len(rows) == count
        folder.check_arrays(rows)


def test_a_stale_recipe_a_new_resolution_and_a_lost_file(folder: Folder) -> None:
    folder.write(a="good 1", bb="good 2")
    first = folder.refresh().version
    folder.calls()
    report = folder.refresh(resolutions=(32, 40))
    assert report.plan.counts() == {"new": 2, "gone": 2, "unchanged": 2}
    assert folder.calls() == ["a", "bb"]
    report = folder.refresh(views=3, resolutions=(32,))
    assert {e.reason for e in report.plan.of("stale")} == {"views 2x8 -> 3x8"}
    folder.refresh()
    shard = folder.rows()["a"].shard
    lost = shard_path(folder.root, shard, "sdf-64.parquet")
    Path(lost).unlink()
    folder.calls()
    report = folder.refresh()
    assert {e.reason for e in report.plan.of("stale")} == {
        f"shards/{shard}/sdf-64.parquet is missing"
    }
    folder.check_arrays(report.version.rows())
    folder.check_arrays(first.rows())


def test_a_bad_asset_is_a_row_and_stops_nothing(folder: Folder) -> None:
    bad = ["segfault", "hog", "exception", "reject", "reject_32", "segfault_64", "open_32"]
    folder.write(**{name: name for name in bad}, good="good", better="good 2")
    report = folder.refresh(failure_budget=0.9)
    rows = {(r.uris[0].removesuffix(".obj"), r.resolution): r for r in report.version.rows()}
    got = {key: (row.status, row.reason, row.stage) for key, row in rows.items()}
    both = {
        "segfault": ("failed", "crashed", "load"),
        "hog": ("failed", "memory_limit", "load"),
        "exception": ("failed", "exception", "load"),
        "reject": ("rejected", "no_area", ""),
        "good": ("ready", "", ""),
        "better": ("ready", "", ""),
    }
    assert got == {
        **{(name, r): outcome for name, outcome in both.items() for r in (32, 64)},
        ("reject_32", 32): ("rejected", "no_surface", ""),
        ("reject_32", 64): ("ready", "", ""),
        ("open_32", 32): ("failed", "open_surface", "convert-32"),
        ("open_32", 64): ("ready", "", ""),
        ("segfault_64", 32): ("ready", "", ""),
        ("segfault_64", 64): ("failed", "crashed", "convert-64"),
    }
    assert "OverflowError: too round" in rows["exception", 32].detail
    assert "SIGSEGV" in rows["segfault", 32].detail
    assert rows["hog", 32].peak_bytes > 550 * 2**20
    assert rows["good", 32].warnings == ("odd: a little",)
    folder.check_arrays(report.version.rows())
    assert len(folder.calls()) == 9

    assert folder.refresh(failure_budget=0.9).plan.counts() == {"unchanged": 18}
    assert folder.calls() == []
    (folder.path / "hog.obj").unlink()
    again = folder.refresh(failure_budget=0.9, retry_failed=True)
    assert again.plan.counts() == {"retry": 6, "gone": 2, "unchanged": 10}
    assert folder.calls() == ["exception", "open_32", "segfault", "segfault_64"]
    assert folder.leftovers() == []


def test_a_hanging_asset_and_a_name_that_is_no_text(folder: Folder) -> None:
    folder.write(hang="hang", good="good")
    (folder.path / os.fsdecode(b"\xff.obj")).write_text("good 2")
    report = folder.refresh(seconds=3)
    assert report.outcomes == {"ready": 4, "failed: time_limit": 2}
    assert folder.rows()["hang"].detail == "still in `load` after 3 s"
    assert r"\udcff" in folder.rows()
    plan = plan_refresh(replace(folder.config, seconds=3))
    assert plan.counts() == {"unchanged": 6}
    plan = plan_refresh(folder.config)
    assert plan.counts() == {"retry": 2, "unchanged": 4}
    assert {e.reason for e in plan.of("retry")} == {
        "failed before (time_limit) within 3 s, 600 MiB, now 60 s, 600 MiB"
    }


def test_a_killed_worker_costs_no_asset(folder: Folder) -> None:
    folder.write(**{f"good{n}": f"good {n}" for n in range(6)}, once="kill_worker_once")
    report = folder.refresh(shard_assets=4)
    assert report.outcomes == {"ready": 14}
    folder.check_arrays(report.version.rows())
    assert folder.calls().count("once") == 2
    # One that always kills its worker takes no other with it.
    folder.write(always="kill_worker", other="good 7")
    report = folder.refresh(shard_assets=4)
    assert report.outcomes == {"ready": 16, "failed: worker_died": 2}
    assert "died" in folder.rows()["always"].detail
    assert folder.calls().count("always") == 3
    assert folder.refresh().plan.counts() == {"unchanged": 18}
    assert folder.leftovers() == []


DRIVER = """
import sys; sys.path[:] = {path!r}
from tasks.refresh import RefreshConfig, refresh
refresh({config!r}, process={work!r})
"""


def test_a_killed_driver_loses_and_doubles_nothing(folder: Folder) -> None:
    folder.write(a="good 1")
    first = folder.refresh().version
    folder.calls()
    folder.write(**{f"x{n}": f"slow 0.4 {n}" for n in range(12)})
    script = DRIVER.format(path=sys.path, config=folder.config, work=WORK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as driver:
        staging = Path(folder.root) / "staging"
        deadline = time.monotonic() + 90
        while len(list(staging.glob("*.parquet"))) < 2:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(DatasetBusyError):
            folder.refresh()
        family = psutil.Process(driver.pid).children(recursive=True)
        # Ray's agents take half a minute to see that their raylet is gone.
        ours = [p for p in family if "Agent" not in p.name()]
        driver.send_signal(signal.SIGKILL)
    assert open_version(folder.root) == first
    assert psutil.wait_procs(ours, timeout=30)[1] == []
    staged = len(list(staging.glob("*.parquet")))
    done = folder.calls()
    assert 2 <= len(done) < 12
    report = folder.refresh()
    counts = report.plan.counts()
    assert counts["staged"] >= 2 * staged
    assert counts["staged"] + counts["new"] == 24
    assert len(folder.calls()) == counts["new"] // 2
    rows = report.version.rows()
    assert len(rows) == len({row.key for row in rows}) == 26
    folder.check_arrays(rows)
    assert report.version.number == first.number + 1
    assert folder.leftovers() == []


@pytest.mark.parametrize("where", ["commit", "_remove_staged"])
def test_a_kill_around_the_commit(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*args: object) -> None:
        raise Killed

    folder.write(a="good 1", bb="good 2", bad="exception")
    with monkeypatch.context() as patch:
        patch.setattr(catalogue if where == "commit" else refresh_module, where, die)
        with pytest.raises(Killed):
            folder.refresh()
    folder.calls()
    report = folder.refresh()
    assert folder.calls() == []
    assert report.plan.counts() == {"staged" if where == "commit" else "unchanged": 6}
    assert report.version.number == 1
    assert report.outcomes == {"ready": 4, "failed: exception": 2}
    folder.check_arrays(report.version.rows())
    assert folder.leftovers() == []


def test_too_many_failures_stop_the_refresh_and_keep_the_rest(folder: Folder) -> None:
    folder.write(**{f"bad{n}": f"exception {n}" for n in range(8)}, good="good")
    with pytest.raises(FailureBudgetError, match=r"(?s)of 18 rows.*exception.*retry_failed"):
        folder.refresh(failure_budget=0.2, shard_assets=1)
    assert len(folder.calls()) < 9
    assert open_version(folder.root).rows() == []
    report = folder.refresh(failure_budget=1.0)
    assert report.plan.counts()["staged"] >= 4
    assert report.outcomes == {"failed: exception": 16, "ready": 2}
    folder.calls()
    with pytest.raises(FailureBudgetError):
        folder.refresh(failure_budget=0.2)
    assert folder.calls() == []


def test_orphans_go_and_old_versions_keep_their_shards(folder: Folder) -> None:
    folder.write(a="good 1")
    first = folder.refresh().version
    folder.write(a="good 2")
    orphan = Path(folder.root) / "shards/orphan/sdf-32.parquet"
    orphan.parent.mkdir()
    orphan.write_bytes(b"half")
    # A worker that outlived its driver stages rows of a shard that was taken for an orphan.
    late = replace(first.rows()[0], asset_id="f" * 64, shard="lost", uris=("late.obj",))
    stage_rows(folder.root, "late", [late])
    report = folder.refresh()
    assert report.plan.counts() == {"changed": 2, "gone": 2}
    assert not orphan.parent.exists()
    folder.check_arrays(first.rows())
    assert folder.leftovers() == []


def test_one_refresh_at_a_time(folder: Folder) -> None:
    folder.write(a="good 1")
    with exclusive(folder.root), pytest.raises(DatasetBusyError, match="another refresh"):
        folder.refresh()
    # Where there is no lock (object stores), the second commit is refused.
    base = catalogue.create(folder.root)
    folder.refresh()
    with pytest.raises(CatalogueError, match="run it again"):
        catalogue.commit(base, open_version(folder.root).rows(), [])


def test_an_empty_source_and_bad_figures_are_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="no assets"):
        folder.refresh()
    with pytest.raises(ValueError, match="multiple of 8"):
        folder.refresh(resolutions=(36,))
    with pytest.raises(ValueError, match="from 32 to 2048"):
        folder.refresh(resolutions=(24, 64))
    with pytest.raises(ValueError, match="powers of two up to 256"):
        folder.refresh(resolutions=(512,), engine="mesh2sdf")
    with pytest.raises(ValueError, match="bytes"):
        folder.refresh(bytes=0)
    with pytest.raises(ValueError, match="failure_budget"):
        folder.refresh(failure_budget=2.0)


def _explode(name: str, items: list[int]) -> int:
    raise OSError("no space left on device")


def _gpus(name: str, items: list[int]) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_work_that_asked_for_no_gpu_sees_none() -> None:
    chunks = run_chunks(_gpus, [1], most=1, width=1, memory=1)
    assert [chunk.result for chunk in chunks] == [""]


@given(st.integers(1, 300), st.integers(1, 16), st.floats(0.001, 2))
def test_workers_share_gpus_evenly_and_within_their_memory(
    width: int, gpus: int, least: float
) -> None:
    share = share_of_gpu(width, gpus, least)
    a_gpu = round(1 / share)
    assert share == 1 / a_gpu
    assert share >= min(least, 1)
    if width <= gpus:
        assert share == 1
    if least * math.ceil(width / gpus) <= 1:
        assert a_gpu * gpus >= width  # all at once, and no share is left over
        assert (a_gpu - 1) * gpus < width


def test_an_error_of_ours_stops_the_work() -> None:
    with pytest.raises(OSError, match="no space left"):
        list(run_chunks(_explode, [1], most=1, width=2, memory=1))


def test_the_memory_limit_follows_the_highest_resolution(data_root: str) -> None:
    def limit(*resolutions: int, **other: object) -> float:
        config = RefreshConfig(data_root, "procedural:2", resolutions, **other)
        return config.limits.bytes / 2**30

    assert [limit(64), limit(64, 512), limit(1024, 512), limit(2048)] == [1.5, 2, 4, 8]
    assert limit(256, engine="mesh2sdf") == 3
    assert limit(2048, bytes=2**30) == 1
    # The quickstart works on two assets at once on a laptop of 8 GiB, half of them free.
    small = RefreshConfig(data_root, "procedural:2", (64,))
    assert 2 * small.worker_bytes < 4 * 2**30


def test_work_that_no_machine_can_hold_is_refused(folder: Folder) -> None:
    folder.write(a="good 1")
    with pytest.raises(ValueError, match=r"may take 4608\.2 GiB.*had .* GiB free.*lower the"):
        folder.refresh(bytes=2**42)


def test_the_largest_assets_come_first_and_chunks_shrink(folder: Folder) -> None:
    folder.write(**{f"x{n}": f"good {'1' * n}" for n in range(1, 13)})
    report = folder.refresh(workers=1, shard_assets=4)
    log = (folder.path.parent / "calls").read_text().split()
    assert log == [f"x{n}.obj" for n in range(12, 0, -1)]
    rows = {row.asset_id: row for row in report.version.rows()}.values()
    shards = sorted(row.shard for row in rows)
    assert [shards.count(shard) for shard in dict.fromkeys(shards)] == [3, 3, 2, 1, 1, 1, 1]


# Each item waits for another at work at the same time, for a while. Then Ray, told of a GPU that
# torch does not see, has torch's answer replaced.
CROWD = """
import os, sys, time; sys.path[:] = {path!r}
from pathlib import Path
import ray
from tasks import ray_work

def meet(name, items):
    mine = Path({folder!r}) / name
    mine.touch()
    deadline = time.monotonic() + 4
    met = 1
    while met < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        met = len(list(mine.parent.iterdir()))
    time.sleep(0.1)  # so that the other sees this one
    mine.unlink()
    return met

def resources(name, items):
    return ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0), os.getpid()

def results(function, count, memory=1, gpus=0.0):
    chunks = ray_work.run_chunks(
        function, range(count), most=1, width=2, memory=memory, gpus=gpus
    )
    return [chunk.result for chunk in chunks]

ray.init(
    num_cpus=2, num_gpus=1, _memory=3 * 2**30, object_store_memory=100 * 2**20,
    include_dashboard=False, log_to_driver=False,
)
results(resources, 2)
for memory in (2**30, 2 * 2**30):
    print("met", max(results(meet, 2, memory=memory)))
for _ in range(2):
    share = ray_work.gpu_for_each(2, 50)
    shares, processes = zip(*results(resources, 9, gpus=share))
    print("gpus", min(shares), max(shares), len(set(processes)))
    ray_work._gpu_memory = lambda: 100
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where torch sees no GPU")
def test_no_more_work_at_once_than_memory_allows_and_gpus_are_shared(tmp_path: Path) -> None:
    script = CROWD.format(path=sys.path, folder=str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[0] == "met"] == ["2", "1"]
    assert "memory for 1 of 2 workers at 2.0 GiB each" in done.stderr
    without, shared = (line[1:] for line in lines if line[0] == "gpus")
    assert without[:2] == ["0.0", "0.0"]
    assert "does not see the 1 GPU(s)" in done.stderr
    assert shared[:2] == ["0.5", "0.5"]
    assert int(shared[2]) <= 2  # a worker that ended after each call would lose its child


def test_the_real_work_on_procedural_assets(data_root: str) -> None:
    config = RefreshConfig(data_root, "procedural:2", (32,), views=2, view_size=32, workers=1)
    report = refresh(config)
    assert report.outcomes == {"ready": 2}
    for row in report.version.rows():
        assert row.licence == "CC0-1.0"
        sdf = read_sdf(LOCAL, shard_path(data_root, row.shard, "sdf-32.parquet"), row.row_group)
        assert sdf.band_voxels == row.band_voxels > 100
        path = shard_path(data_root, row.shard, "assets.parquet")
        assert len(read_views(LOCAL, path, row.assets_row_group)) == 2
    assert os.environ.get("RAY_ADDRESS") is None
