"""A refresh goes on with the choices of the data folder's last one."""

from pathlib import Path

import pytest

from flows.refresh import choose
from flows.run import data_root, preset_of
from tasks.mirror import Mirror, read_mirror, write_mirror

PRESET = str(Path(__file__).parent / "minute.toml")


def test_a_new_folder_takes_the_presets_choices(tmp_path: Path) -> None:
    assert read_mirror(str(tmp_path)) is None
    assert preset_of(str(tmp_path), None) == "tiny"
    assert choose(str(tmp_path), preset=PRESET) == Mirror(
        "procedural:8", PRESET, (32,), "sparse", None
    )


def test_a_schedule_without_parameters_keeps_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meshes").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = choose(
        str(tmp_path), "folder:meshes", PRESET, [64, 128], "mesh2sdf", ["CC0-1.0", "MIT"]
    )
    assert asked.source == f"folder:{tmp_path / 'meshes'}"
    write_mirror(str(tmp_path), asked)
    monkeypatch.chdir("/")
    assert choose(str(tmp_path)) == asked
    assert preset_of(str(tmp_path), None) == PRESET
    assert choose(str(tmp_path), licences=[]).licences is None
    # Another preset brings its resolutions, but the source stays.
    other = choose(str(tmp_path), preset="small")
    assert other.source == asked.source
    assert other.licences == asked.licences
    assert other.resolutions == choose(str(tmp_path / "new"), preset="small").resolutions


def test_the_data_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIGASHAPE_DATA", str(tmp_path / "elsewhere"))
    assert data_root(None) == str(tmp_path / "elsewhere")
    assert data_root("s3://bucket/folder") == "s3://bucket/folder"
