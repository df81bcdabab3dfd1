"""The command line, as a shell calls it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh

from tasks.procedural import procedural_bytes

GIGASHAPE = str(Path(sys.executable).parent / "gigashape")
FACTS = {
    *("seconds", "peak_bytes", "resolution", "band_voxels", "latent_voxels"),
    *("parts_in", "parts_out", "closed", "warnings"),
}


def gigashape(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [GIGASHAPE, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


def test_convert_writes_a_closed_mesh_in_the_files_own_frame(tmp_path: Path) -> None:
    source, out = tmp_path / "gear.ply", tmp_path / "closed.ply"
    source.write_bytes(procedural_bytes(7))
    done = gigashape("convert", source, "--resolution", 64, "--out", out)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == FACTS
    assert facts["resolution"] == 64
    assert facts["closed"] is True
    assert facts["band_voxels"] > facts["latent_voxels"] > 0
    before, after = trimesh.load(source), trimesh.load(out)
    assert after.is_watertight
    voxel = np.ptp(before.bounds, axis=0).max() / (0.95 * 64)
    assert np.abs(after.bounds - before.bounds).max() < voxel


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"v 0 0 0\nv 1 0 0\nv nan 1 0\nf 1 2 3\n", "non_finite_vertices"), (b"", "empty_file")],
)
def test_a_rejected_mesh_gives_its_reason_and_status_2(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    source, out = tmp_path / "bad.obj", tmp_path / "closed.ply"
    source.write_bytes(content)
    done = gigashape("convert", source, "--out", out)
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"rejected": reason}
    assert done.stderr.strip()
    assert not out.exists()
