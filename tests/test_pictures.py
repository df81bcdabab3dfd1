"""Sheets, slices, .glb files, and the HTML viewer in a real browser where one is installed."""

import base64
import json
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import trimesh

from tasks import pictures
from tasks.pictures import contact_sheet, save_glb, slice_picture, viewer_html


def test_contact_sheet_places_every_picture_under_its_label() -> None:
    images = [np.full((20, 30, 3), [value, 0, 0], np.uint8) for value in (50, 100, 150)]
    sheet = np.asarray(contact_sheet(images, columns=2, labels=["a", "b" * 99, ""]))
    gap, label = pictures.GAP, pictures.LABEL
    assert sheet.shape == (2 * (20 + label + gap) + gap, 2 * (30 + gap) + gap, 3)
    for number, value in enumerate((50, 100, 150)):
        y = gap + (number // 2) * (20 + label + gap) + label
        x = gap + (number % 2) * (30 + gap)
        assert (sheet[y : y + 20, x : x + 30] == [value, 0, 0]).all()
    assert (sheet[gap : gap + label, gap : gap + 30] < 128).any()  # ink
    assert contact_sheet([np.zeros((4, 5), np.uint8)], columns=6).size == (5 + 2 * gap, 4 + 2 * gap)
    with pytest.raises(ValueError, match="3 pictures but 1 labels"):
        contact_sheet(images, 2, ["one"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], 2)


def test_transparent_parts_are_chequered() -> None:
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, 8:] = [10, 20, 30, 255]
    sheet = np.asarray(contact_sheet([image], 1))
    inner = sheet[pictures.GAP : pictures.GAP + 16, pictures.GAP : pictures.GAP + 16]
    assert (inner[:, 8:] == [10, 20, 30]).all()
    assert set(np.unique(inner[:, :8])) == {236, 250}


def test_slice_is_blue_inside_with_x_right_and_y_up() -> None:
    values = np.ones((8, 8))
    values[5:, :3] = -1  # large x, small y: lower right
    values[0, 7] = np.nan
    image = slice_picture(values, 64)
    assert image.shape == (64, 64, 3)
    assert image[60, 60].tolist() == list(pictures.INSIDE)
    assert image[4, 60].tolist() == list(pictures.OUTSIDE)
    assert image[2, 2].tolist() == [128, 128, 128]
    assert (image[40:, 40] == 0).all()  # the line where the sign changes
    assert slice_picture(np.zeros((4, 4)), 4)[2, 2].tolist() == list(pictures.SURFACE)


def test_glb_reads_back(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(2, 0.7)
    save_glb(ball.vertices, ball.faces, tmp_path / "ball.glb")
    back = trimesh.load_mesh(tmp_path / "ball.glb")
    assert back.is_watertight
    assert back.volume == pytest.approx(ball.volume, rel=1e-4)  # positive: outward
    assert np.allclose(back.bounds, ball.bounds, atol=1e-6)


def test_viewer_holds_the_meshes_and_needs_no_network() -> None:
    ball = trimesh.creation.icosphere(2, 0.7)
    page = viewer_html({"</script>": (ball.vertices, ball.faces)}, title="<b>")
    assert "http" not in page
    assert page.count("</script>") == 1
    assert "<b>" not in page
    text = page.split("const meshes = ")[1].split(";\n")[0]
    [[name, positions, faces]] = json.loads(text)
    assert name == "</script>"
    read = np.frombuffer(zlib.decompress(base64.b64decode(positions)), "<u2").reshape(-1, 3)
    assert np.abs(read / 65535 * 2 - 1 - ball.vertices).max() < 2e-5
    read = np.frombuffer(zlib.decompress(base64.b64decode(faces)), "<u4").reshape(-1, 3)
    assert np.array_equal(read, ball.faces)
    with pytest.raises(ValueError, match=r"log the \.glb alone"):
        viewer_html({"big": (np.zeros((3, 3)), np.zeros((1_000_001, 3), int))}, "big")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_viewer_runs_in_a_browser(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(3, 0.9)
    page = tmp_path / "ball.html"
    page.write_text(viewer_html({"a": (ball.vertices, ball.faces), "b": (ball.vertices, [])}, "t"))
    flags = "--headless --no-sandbox --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    flags += " --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
    flags += f" --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=5000 --dump-dom"
    done = subprocess.run(
        ["chromium", *flags.split(), page.as_uri()], check=True, timeout=90, capture_output=True
    )
    # Written once the shaders are compiled and the mesh is unpacked and on the card.
    assert "t: a, 1,280 faces</p>" in done.stdout.decode()
    assert '<button class="on">a</button>' in done.stdout.decode()
