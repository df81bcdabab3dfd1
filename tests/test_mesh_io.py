"""Reading meshes: the shared hostile and dev folders, and every format against known geometry."""

import base64
import csv
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.mesh import Mesh, MeshRejectedError, normalise
from tasks.mesh_inspection import inspect_geometry, repeated_faces, weld
from tasks.mesh_io import EXTENSIONS, ReadLimits, read_mesh, referenced_files
from tasks.mesh_obj import face_numbers
from tasks.mesh_parts import inside_root
from tasks.mesh_polygons import triangulate

SHARED = os.environ.get("GIGASHAPE_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="GIGASHAPE_SHARED is not set")

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)], float)
SIDES = np.array(
    [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
)
CUBE_FACES = np.concatenate([SIDES[:, [0, 1, 2]], SIDES[:, [0, 2, 3]]])


def codes(mesh: Mesh) -> set[str]:
    return {warning.split(":")[0] for warning in mesh.warnings}


def rejected(path: Path, root: Path | None = None, **limits: int) -> str:
    with pytest.raises(MeshRejectedError) as error:
        read_mesh(path, root or path.parent, ReadLimits(**limits))
    return error.value.reason


def volume(mesh: Mesh) -> float:
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


def area(mesh: Mesh) -> float:
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def png(colour: tuple[int, ...] = (10, 20, 30, 255), size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", size, colour).save(stream, "PNG")
    return stream.getvalue()


# ---- what is opened

_opened: list[object] | None = None


def _note_open(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(args[0])


# Sees open, os.open, zipfile, Pillow and numpy alike, but not what C code such as libxml2 opens. It
# can't be removed again, so it is installed once and notes only while a list is there.
sys.addaudithook(_note_open)


@contextmanager
def opens_only_in(folder: Path) -> Iterator[list[object]]:
    """Fail when the body opens a file outside folder; code, which imports open, is not counted."""
    global _opened
    found = _opened = []
    try:
        yield found
    finally:
        _opened = None
        code = [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parent.parent]
        for name in found:
            assert isinstance(name, str | bytes | os.PathLike), name  # no handle from elsewhere
            path = Path(os.fsdecode(name))
            assert inside_root(path, folder) or any(inside_root(path, c) for c in code), path


@pytest.mark.parametrize(
    "read",
    [
        lambda path: open(path, "rb").close(),  # noqa: PTH123 - the point
        lambda path: os.close(os.open(path, os.O_RDONLY)),
        lambda path: Image.open(path).close(),
        lambda path: zipfile.ZipFile(path, "a").close(),
        Path.read_bytes,
        np.fromfile,
    ],
)
def test_a_file_opened_elsewhere_is_noticed(tmp_path: Path, read) -> None:
    (tmp_path / "folder").mkdir()
    outside = tmp_path / "outside.png"
    outside.write_bytes(png())
    with pytest.raises(AssertionError, match="outside"), opens_only_in(tmp_path / "folder"):
        read(outside)


# ---- the shared folders


@needs_shared
def test_hostile_files_have_the_expected_outcome(tmp_path: Path) -> None:
    source = Path(SHARED or "") / "meshes" / "hostile"
    folder = tmp_path / "hostile"
    for path in source.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with (folder / "expected.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 50
    for row in rows:
        path = folder / row["file"]
        if row["copy_as"]:
            path = shutil.copy(path, path.with_name(row["copy_as"]))
        try:
            with opens_only_in(folder) as opened:
                mesh = read_mesh(path, folder)
        except MeshRejectedError as error:
            outcome, found = "reject", {error.reason}
        else:
            assert opened, row["file"]
            outcome, found = "accept", codes(mesh)
            points = normalise(mesh.vertices)
            assert np.isfinite(points).all(), row["file"]
            assert len(mesh.faces) == len(mesh.face_material) > 0
        expected = row["expected"]
        if expected != "either":
            assert outcome == expected.removesuffix("_with_warning"), (row["file"], found)
        if expected == "accept":
            # The flat quad of unicode_test.glb is open, and saying so is right.
            assert found <= {"open_surface_zero_thickness"}, row["file"]
        elif outcome == "reject" or expected == "accept_with_warning":
            assert row["reason_code"] in found, (row["file"], found)


@needs_shared
def test_dev_meshes_are_all_read() -> None:
    root = Path(SHARED or "") / "meshes" / "dev"
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["faces"]))
    # The smaller quarter of each format: the whole folder takes half a minute.
    for suffix in sorted({Path(row["file"]).suffix.lower() for row in rows}):
        same = [row for row in rows if Path(row["file"]).suffix.lower() == suffix]
        for row in same[: len(same) // 4 + 1]:
            mesh = read_mesh(root / row["file"], root)
            assert np.isfinite(normalise(mesh.vertices)).all()
            bundle = {root / name for name in row["bundle_files"].split("|") if name}
            found = set(referenced_files(root / row["file"], root))
            assert found <= {Path(os.path.normpath(p)) for p in bundle}, row["file"]
            if suffix == ".dae" and int(row["texture_images"]):
                assert any(m.texture is not None for m in mesh.materials), row["file"]


# ---- one box through every format


def write_obj(path: Path) -> None:
    text = "".join(f"v {x} {y} {z}\n" for x, y, z in CUBE)
    path.write_text(text + "".join("f " + " ".join(map(str, s + 1)) + "\n" for s in SIDES))


def write_off(path: Path) -> None:
    text = f"OFF # comment\n\n{len(CUBE)} {len(SIDES)} 0\n"
    text += "".join(f"{x} {y} {z}\n" for x, y, z in CUBE)
    path.write_text(text + "".join("4 " + " ".join(map(str, s)) + "\n" for s in SIDES))


def write_stl(path: Path) -> None:
    record = np.zeros(len(CUBE_FACES), [("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])
    record["v"] = CUBE[CUBE_FACES]
    path.write_bytes(b"solid".ljust(80) + struct.pack("<I", len(record)) + record.tobytes())


def write_stl_text(path: Path) -> None:
    text = "solid box\n"
    for face in CUBE_FACES:
        corners = "".join(f"   vertex {x:e} {y:e} {z:e}\n" for x, y, z in CUBE[face])
        text += f" facet normal 0 0 0\n  outer loop\n{corners}  endloop\n endfacet\n"
    path.write_text(text + "endsolid box\n")


def ply_head(kind: str) -> str:
    return (
        f"ply\nformat {kind} 1.0\nelement vertex {len(CUBE)}\n"
        "property double x\nproperty double y\nproperty double z\n"
        f"element face {len(SIDES)}\nproperty list uchar int vertex_indices\nend_header\n"
    )


def write_ply(path: Path, order: str = ">", mixed: bool = False) -> None:
    kind = "binary_big_endian" if order == ">" else "binary_little_endian"
    faces = [s.tolist() for s in SIDES]
    head = ply_head(kind)
    if mixed:  # one quad as two triangles, so that rows differ in length
        faces = [[0, 1, 3], [0, 3, 2], *faces[1:]]
        head = head.replace(f"face {len(SIDES)}", f"face {len(faces)}")
    body = CUBE.astype(order + "f8").tobytes()
    for face in faces:
        body += struct.pack(f"{order}B{len(face)}i", len(face), *face)
    path.write_bytes(head.encode() + body)


def write_ply_text(path: Path) -> None:
    text = ply_head("ascii") + "".join(f"{x} {y} {z}\n" for x, y, z in CUBE)
    path.write_text(text + "".join("4 " + " ".join(map(str, s)) + "\n" for s in SIDES))


def gltf(**extra) -> dict:
    positions, index = CUBE.astype("<f4").tobytes(), CUBE_FACES.astype("<u2").tobytes()
    data = positions + index
    return {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": len(positions)},
            {"buffer": 0, "byteOffset": len(positions), "byteLength": len(index)},
        ],
        "buffers": [
            {
                "byteLength": len(data),
                "uri": "data:application/octet-stream;base64," + base64.b64encode(data).decode(),
            }
        ],
        **extra,
    }


def write_gltf(path: Path) -> None:
    path.write_text(json.dumps(gltf()))


def write_glb(path: Path) -> None:
    document = gltf()
    data = base64.b64decode(document["buffers"][0].pop("uri").partition(",")[2])
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    chunks += struct.pack("<II", len(data), 0x004E4942) + data
    path.write_bytes(b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks)


DAE = """<?xml version="1.0"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><unit meter="{unit}"/><up_axis>{up}</up_axis></asset>
{libraries}
<library_geometries><geometry id="g"><mesh>
<source id="p"><float_array id="a" count="24">{points}</float_array><technique_common>
<accessor source="#a" count="8" stride="3"/></technique_common></source>
{sources}
<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>
<polylist count="6" material="m"><input semantic="VERTEX" source="#v" offset="0"/>{inputs}
<vcount>4 4 4 4 4 4</vcount><p>{index}</p></polylist></mesh></geometry></library_geometries>
<library_visual_scenes><visual_scene id="s"><node id="s">{node}
<instance_geometry url="#g"><bind_material><technique_common>
<instance_material symbol="m" target="#paint"/></technique_common></bind_material>
</instance_geometry></node></visual_scene></library_visual_scenes>
<scene><instance_visual_scene url="#s"/></scene></COLLADA>"""


PAINT = (
    '<library_effects><effect id="e"><profile_COMMON><technique sid="c"><lambert><diffuse>'
    "<color>1 0.5 0 1</color></diffuse></lambert></technique></profile_COMMON></effect>"
    '</library_effects><library_materials><material id="paint"><instance_effect url="#e"/>'
    "</material></library_materials>"
)


def dae(**fields: str) -> str:
    values = {
        "unit": "1",
        "up": "Y_UP",
        "libraries": PAINT,
        "sources": "",
        "inputs": "",
        "node": "",
        "points": " ".join(map(str, CUBE.reshape(-1))),
        "index": " ".join(map(str, SIDES.reshape(-1))),
    }
    return DAE.format(**{**values, **fields})


def write_dae(path: Path) -> None:
    path.write_text(dae())


def model_3mf(properties: str = "", resources: str = "", build: str | None = None) -> str:
    vertices = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in CUBE)
    triangles = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in CUBE_FACES)
    return (
        '<?xml version="1.0"?><model unit="millimeter" xmlns="http://schemas.microsoft.com/'
        f'3dmanufacturing/core/2015/02"><resources>{resources}<object id="1" type="model" '
        f"{properties}><mesh><vertices>{vertices}</vertices><triangles>{triangles}</triangles>"
        f"</mesh></object></resources><build>{build or '<item objectid=' + chr(34) + '1' + chr(34)}"
        + ("" if build else "/>")
        + "</build></model>"
    )


def zip_3mf(path: Path, **files: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def write_3mf(path: Path) -> None:
    zip_3mf(path, **{"3D/3dmodel.model": model_3mf()})


WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    (".obj", write_obj),
    (".off", write_off),
    (".stl", write_stl),
    (".STL", write_stl_text),
    (".ply", write_ply),
    (".ply", lambda path: write_ply(path, "<")),
    (".ply", lambda path: write_ply(path, ">", mixed=True)),
    (".ply", write_ply_text),
    (".gltf", write_gltf),
    (".glb", write_glb),
    (".dae", write_dae),
    (".3mf", write_3mf),
]


@pytest.mark.parametrize(("suffix", "write"), WRITERS)
def test_a_box_is_the_same_in_every_format(suffix: str, write, tmp_path: Path) -> None:
    path = tmp_path / f"box{suffix}"
    write(path)
    mesh = read_mesh(path, tmp_path)
    assert mesh.warnings == ()
    assert len(mesh.faces) == 12
    assert volume(mesh) == pytest.approx(6)
    assert np.array_equal(mesh.vertices.max(0), [1, 2, 3])
    assert mesh.vertices.dtype == np.float64
    assert mesh.faces.dtype == np.int64
    assert mesh.face_material.dtype == np.int32


@pytest.mark.parametrize(("suffix", "write"), WRITERS)
def test_a_file_cut_anywhere_is_rejected_or_whole(suffix: str, write, tmp_path: Path) -> None:
    path = tmp_path / f"box{suffix}"
    write(path)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        try:
            mesh = read_mesh(path, tmp_path)
        except MeshRejectedError:
            continue
        # Text formats may end at a line that makes sense.
        assert 0 < len(mesh.faces) <= 12
        assert np.isfinite(mesh.vertices).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash_a_reader(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    suffix, write = data.draw(st.sampled_from(WRITERS))
    path = folder / f"box{suffix}"
    write(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    referenced_files(path, folder)
    try:
        mesh = read_mesh(path, folder, ReadLimits(vertices=10_000, faces=10_000))
    except MeshRejectedError:
        return
    assert np.isfinite(mesh.vertices).all()
    assert mesh.faces.max() < len(mesh.vertices)


# ---- limits, names and references


def test_limits_are_errors_with_a_reason(tmp_path: Path) -> None:
    write_stl(path := tmp_path / "box.stl")
    assert rejected(path, file_bytes=100) == "resource_limit"
    assert rejected(path, faces=11) == "resource_limit"
    assert rejected(path, vertices=7) == "resource_limit"
    assert rejected(tmp_path / "box.fbx") == "unsupported_format"
    assert rejected(tmp_path / "absent.stl") == "unreadable"
    (tmp_path / "folder.stl").mkdir()
    assert rejected(tmp_path / "folder.stl") == "unreadable"
    os.mkfifo(tmp_path / "pipe.obj")
    assert rejected(tmp_path / "pipe.obj") == "unreadable"
    assert (
        frozenset({".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae", ".3mf"}) == EXTENSIONS
    )


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.bin",
        "%2e%2e/secret.bin",
        "..\\secret.bin",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x.bin",
        "/etc/passwd",
        "C:/x.bin",
        "link.bin",
        "linked/secret.bin",
    ],
)
def test_references_never_leave_the_root(uri: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    document = gltf()
    data = base64.b64decode(document["buffers"][0]["uri"].partition(",")[2])
    (tmp_path / "secret.bin").write_bytes(data)
    (root / "link.bin").symlink_to(tmp_path / "secret.bin")
    (root / "linked").symlink_to(tmp_path)
    document["buffers"][0]["uri"] = uri
    path = root / "box.gltf"
    path.write_text(json.dumps(document))
    assert rejected(path) == "uri_outside_root"
    assert referenced_files(path, root) == []
    # The same bytes inside the root are fine, by any spelling.
    (root / "in side").mkdir()
    (root / "in side" / "b.bin").write_bytes(data)
    document["buffers"][0]["uri"] = "in%20side/../in%20side/b.bin"
    path.write_text(json.dumps(document))
    assert len(read_mesh(path, root).faces) == 12
    assert referenced_files(path, root) == [root / "in side" / "b.bin"]


def test_a_mesh_that_is_a_link_out_of_the_root_is_not_read(tmp_path: Path) -> None:
    write_stl(tmp_path / "box.stl")
    root = tmp_path / "root"
    root.mkdir()
    (root / "box.stl").symlink_to(tmp_path / "box.stl")
    assert rejected(root / "box.stl") == "uri_outside_root"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nodes": [{"mesh": 0, "children": [1]}, {"children": [0]}]}, "cyclic_scene_graph"),
        ({"nodes": [{"children": [1, 1]}, {"mesh": 0}]}, "invalid_scene_graph"),
        ({"nodes": [{"mesh": 7}]}, "index_out_of_range"),
        ({"nodes": [{"mesh": -1}]}, "index_out_of_range"),
        ({"nodes": [{"mesh": 0, "scale": [1, float("inf"), 1]}]}, "non_finite_transform"),
        ({"nodes": [{"mesh": 0, "scale": [0, 0, 0]}]}, "no_area"),
        ({"extensionsRequired": ["ACME_bricks"]}, "unsupported_extension"),
        ({"asset": {"version": "1.0"}}, "unsupported_version"),
        ({"nodes": []}, "index_out_of_range"),
        ({"nodes": [{}]}, "no_geometry"),
    ],
)
def test_broken_gltf_is_rejected(change: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "box.gltf"
    path.write_text(json.dumps(gltf(**change)))
    assert rejected(path) == reason


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("accessors", 0, "count"), 9, "declared_count_exceeds_data"),
        (("accessors", 0, "count"), 1 << 60, "resource_limit"),
        (("accessors", 0, "bufferView"), 9, "index_out_of_range"),
        (("bufferViews", 1, "byteLength"), 1 << 40, "declared_count_exceeds_data"),
        (("buffers", 0, "byteLength"), 200, "truncated"),
        (("accessors", 0, "componentType"), 1, "malformed"),
    ],
)
def test_gltf_counts_are_held_against_the_bytes(where, value, reason, tmp_path: Path) -> None:
    document = gltf()
    document[where[0]][where[1]][where[2]] = value
    path = tmp_path / "box.gltf"
    path.write_text(json.dumps(document))
    assert rejected(path) == reason


def test_a_texture_is_judged_by_its_header_and_scaled_down(tmp_path: Path) -> None:
    (tmp_path / "paint.png").write_bytes(png(size=(64, 32)))
    (tmp_path / "box.mtl").write_text("newmtl a\nKd 1 1 1\nmap_Kd -s 1 1 1 -bm 0.5 paint.png\n")
    path = tmp_path / "box.obj"
    write_obj(path)
    lines = path.read_text().splitlines()
    faces = [f"f {' '.join(f'{w}/1' for w in ln.split()[1:])}" for ln in lines if ln[0] == "f"]
    text = "\n".join([ln for ln in lines if ln[0] == "v"] + faces)
    path.write_text("mtllib box.mtl\nvt 0.25 0.75\nusemtl a\n" + text)
    texture = read_mesh(path, tmp_path, ReadLimits(texture_side=16)).materials[1].texture
    assert texture is not None
    assert texture.shape == (8, 16, 4)
    assert (texture[0, 0] == [10, 20, 30, 255]).all()
    small = read_mesh(path, tmp_path, ReadLimits(texture_pixels=64 * 32 - 1))
    assert codes(small) == {"resource_limit"}
    assert all(m.texture is None for m in small.materials)
    assert referenced_files(path, tmp_path) == [tmp_path / "box.mtl", tmp_path / "paint.png"]


# ---- what each format means


def test_obj_details(tmp_path: Path) -> None:
    (tmp_path / "a b.mtl").write_text("newmtl red paint\nKd 1 0 0\nd 0.5\nnewmtl blue\nKd 0 0 1\n")
    path = tmp_path / "o.obj"
    path.write_text(
        "mtllib a b.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nusemtl red paint\n"
        "f -3//1 -2//1 -1//1\n  v 0 1 0 # a comment\nv 0 0 1\nusemtl blue\n"
        "f 1 \\\n  2 \\\n  5\nf\t1/1/1 3/1/1 4/1/1 \nl 1 2\n"
    )
    mesh = read_mesh(path, tmp_path)
    corners = mesh.vertices[mesh.faces]
    assert np.array_equal(corners[0], [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert np.array_equal(corners[1], [[0, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert np.array_equal(corners[2], [[0, 0, 0], [1, 1, 0], [0, 1, 0]])
    colours = [mesh.materials[m].colour for m in mesh.face_material]
    assert colours == [(1, 0, 0, 0.5), (0, 0, 1, 1), (0, 0, 1, 1)]


def test_obj_vertex_colours(tmp_path: Path) -> None:
    path = tmp_path / "o.obj"
    path.write_text("v 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 0 1 0 0 0 0.5\nf 1 2 3\n")
    mesh = read_mesh(path, tmp_path)
    assert mesh.vertex_colours is not None
    assert mesh.vertex_colours.tolist() == [[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 128, 255]]
    assert mesh.materials[mesh.face_material[0]].colour == (1, 1, 1, 1)


def test_gltf_nodes_colours_and_textures(tmp_path: Path) -> None:
    image = base64.b64encode(png((200, 100, 50, 7))).decode()
    uv = np.full((8, 2), 0.25, "<f4").tobytes()
    document = gltf(
        nodes=[
            {"children": [1], "rotation": [0, 0, np.sin(np.pi / 4), np.cos(np.pi / 4)]},
            {"mesh": 0, "translation": [10, 0, 0], "scale": [-1, 1, 1]},
        ],
        materials=[
            {
                "pbrMetallicRoughness": {
                    "baseColorFactor": [0.5, 0, 1, 0.5],
                    "baseColorTexture": {
                        "index": 0,
                        "extensions": {
                            "KHR_texture_transform": {"offset": [0.5, 0], "scale": [2, 1]}
                        },
                    },
                }
            }
        ],
        textures=[{"source": 0}],
        images=[{"uri": "data:image/png;base64," + image}],
    )
    primitive = document["meshes"][0]["primitives"][0]
    primitive["material"], primitive["attributes"]["TEXCOORD_0"] = 0, 2
    document["accessors"].append(
        {"bufferView": 2, "componentType": 5126, "count": 8, "type": "VEC2"}
    )
    document["bufferViews"].append({"buffer": 1, "byteLength": len(uv)})
    uri = "data:application/octet-stream;base64," + base64.b64encode(uv).decode()
    document["buffers"].append({"byteLength": len(uv), "uri": uri})
    path = tmp_path / "box.gltf"
    path.write_text(json.dumps(document))
    mesh = read_mesh(path, tmp_path)
    # x to 10 - x, then x to y and y to -x; the mirrored faces are turned over again
    assert mesh.vertices.min(0) == pytest.approx([-2, 9, 0])
    assert mesh.vertices.max(0) == pytest.approx([0, 10, 3])
    assert volume(mesh) == pytest.approx(6)
    assert mesh.uv is not None
    assert mesh.uv == pytest.approx(np.tile([1.0, 0.75], (8, 1)))
    material = mesh.materials[mesh.face_material[0]]
    assert material.colour == pytest.approx((0.735, 0, 1, 1), abs=1e-3)
    assert material.texture is not None
    assert material.texture[0, 0].tolist() == [200, 100, 50, 255]  # OPAQUE ignores alpha


def test_gltf_skin_morph_and_instances_at_rest(tmp_path: Path) -> None:
    joints = np.zeros((8, 4), np.uint8).tobytes()
    weights = np.tile([1, 0, 0, 0], (8, 1)).astype("<f4").tobytes()
    target = np.tile([0, 0, 2], (8, 1)).astype("<f4").tobytes()
    shifts = np.array([[0, 0, 0], [5, 0, 0]], "<f4").tobytes()
    extra = joints + weights + target + shifts
    document = gltf(
        nodes=[
            {"mesh": 0, "skin": 0, "translation": [99, 99, 99]},
            {"translation": [0, 7, 0]},
            {
                "mesh": 1,
                "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 5}}},
            },
        ],
        scenes=[{"nodes": [0, 1, 2]}],
        skins=[{"joints": [1]}],
    )
    primitive = {"attributes": {"POSITION": 0}, "indices": 1}
    skinned = {"attributes": {"POSITION": 0, "JOINTS_0": 2, "WEIGHTS_0": 3}, "indices": 1}
    document["meshes"] = [
        {"primitives": [{**skinned, "targets": [{"POSITION": 4}]}], "weights": [0.5]},
        {"primitives": [primitive]},
    ]
    shapes = [(5121, 8, "VEC4", 32), (5126, 8, "VEC4", 128), (5126, 8, "VEC3", 96)]
    offset = 0
    for i, (kind, count, width, size) in enumerate([*shapes, (5126, 2, "VEC3", 24)]):
        document["accessors"].append(
            {"bufferView": 2 + i, "componentType": kind, "count": count, "type": width}
        )
        document["bufferViews"].append({"buffer": 1, "byteOffset": offset, "byteLength": size})
        offset += size
    uri = "data:application/octet-stream;base64," + base64.b64encode(extra).decode()
    document["buffers"].append({"byteLength": len(extra), "uri": uri})
    path = tmp_path / "box.gltf"
    path.write_text(json.dumps(document))
    mesh = read_mesh(path, tmp_path)
    assert len(mesh.faces) == 36
    lows = [mesh.vertices[8 * i : 8 * i + 8].min(0).tolist() for i in range(3)]
    assert lows == [[0, 7, 1], [0, 0, 0], [5, 0, 0]]


@pytest.mark.parametrize(
    ("up", "extent"),
    [("Y_UP", [10, 20, 30]), ("Z_UP", [10, 30, 20]), ("X_UP", [20, 10, 30])],
)
def test_collada_axes_units_and_textures(up: str, extent: list, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "p.png").write_bytes(png())
    (tmp_path / "meshes").mkdir()
    libraries = (
        '<library_images><image id="i"><init_from>../pictures/p.png</init_from></image>'
        '</library_images><library_effects><effect id="e"><profile_COMMON><newparam sid="f">'
        '<surface type="2D"><init_from>i</init_from></surface></newparam><newparam sid="m">'
        '<sampler2D><source>f</source></sampler2D></newparam><technique sid="c"><phong><diffuse>'
        '<texture texture="m" texcoord="t"/></diffuse></phong></technique></profile_COMMON>'
        '</effect></library_effects><library_materials><material id="paint">'
        '<instance_effect url="#e"/></material></library_materials>'
    )
    sources = (
        '<source id="u"><float_array id="ua" count="2">0.25 0.5</float_array><technique_common>'
        '<accessor source="#ua" count="1" stride="2"/></technique_common></source>'
    )
    path = tmp_path / "meshes" / "box.dae"
    path.write_text(
        dae(
            unit="10",
            up=up,
            libraries=libraries,
            sources=sources,
            inputs='<input semantic="TEXCOORD" source="#u" offset="1" set="0"/>',
            index=" ".join(f"{i} 0" for i in SIDES.reshape(-1)),
            node="<rotate>0 0 1 360</rotate><translate>1 2 3</translate>",
        )
    )
    mesh = read_mesh(path, tmp_path)
    assert mesh.vertices.max(0) - mesh.vertices.min(0) == pytest.approx(extent)
    assert volume(mesh) == pytest.approx(6000)
    assert mesh.uv is not None
    assert mesh.uv == pytest.approx(np.tile([0.25, 0.5], (8, 1)))
    texture = mesh.materials[mesh.face_material[0]].texture
    assert texture is not None
    assert texture[0, 0].tolist() == [10, 20, 30, 255]
    assert referenced_files(path, tmp_path) == [tmp_path / "pictures" / "p.png"]
    # With the folder of the mesh as the root, the picture is out of bounds.
    assert codes(read_mesh(path, path.parent)) == {"uri_outside_root"}
    assert referenced_files(path, path.parent) == []


def test_collada_rotations_turn_the_right_way(tmp_path: Path) -> None:
    path = tmp_path / "box.dae"
    path.write_text(dae(node="<rotate>0 0 1 90</rotate>"))
    mesh = read_mesh(path, tmp_path)
    assert mesh.vertices.min(0) == pytest.approx([-2, 0, 0])  # x to y, y to -x
    assert mesh.materials[mesh.face_material[0]].colour == (1, 0.5, 0, 1)
    path.write_text(dae(libraries=""))
    assert codes(read_mesh(path, tmp_path)) == {"broken_material_reference"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_a_document_type_is_refused(encoding: str, tmp_path: Path) -> None:
    text = dae().replace("?>", '?>\n<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>')
    path = tmp_path / "box.dae"
    path.write_bytes(text.replace('"1.0"', f'"1.0" encoding="{encoding}"').encode(encoding))
    assert rejected(path) == "xml_entity_expansion"


def test_collada_nodes_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "box.dae"
    path.write_text(dae(node='<instance_node url="#s"/>'))
    assert rejected(path) == "cyclic_scene_graph"
    bomb = "".join(
        f'<node id="n{i}"><instance_node url="#n{i + 1}"/><instance_node url="#n{i + 1}"/></node>'
        for i in range(40)
    )
    nodes = f'<library_nodes>{bomb}<node id="n40"/></library_nodes>'
    path.write_text(dae(libraries=nodes, node='<instance_node url="#n0"/>'))
    assert rejected(path, instances=1000) == "resource_limit"


def test_3mf_colours_components_and_transforms(tmp_path: Path) -> None:
    resources = (
        '<basematerials id="5"><base name="a" displaycolor="#FF0000"/>'
        '<base name="b" displaycolor="#00FF0080"/></basematerials>'
    )
    second = (
        '<object id="2" type="model"><components><component objectid="1" '
        'transform="1 0 0 0 1 0 0 0 1 5 0 0"/><component objectid="1"/></components></object>'
    )
    build = '<item objectid="2" transform="0 1 0 -1 0 0 0 0 1 0 0 0"/>'
    text = model_3mf('pid="5" pindex="1"', resources, build)
    path = tmp_path / "box.3mf"
    zip_3mf(path, **{"3D/3dmodel.model": text.replace("</resources>", second + "</resources>")})
    mesh = read_mesh(path, tmp_path)
    assert len(mesh.faces) == 24
    assert mesh.vertices.min(0) == pytest.approx([-2, 0, 0])  # x to y, y to -x
    assert mesh.vertices.max(0) == pytest.approx([0, 6, 3])
    assert mesh.vertex_colours is not None
    assert (mesh.vertex_colours == [0, 255, 0, 128]).all()
    loop = second.replace('objectid="1"', 'objectid="2"')
    zip_3mf(path, **{"3D/3dmodel.model": text.replace("</resources>", loop + "</resources>")})
    assert rejected(path) in ("cyclic_scene_graph", "resource_limit")


def test_3mf_is_limited_before_it_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "box.3mf"
    zip_3mf(path, **{"3D/3dmodel.model": model_3mf() + " " * (2 << 20)})
    assert rejected(path) == "resource_limit"
    zip_3mf(path, **{"readme.txt": "x"})
    assert rejected(path) == "wrong_format"


# ---- polygons and geometry


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.2, 1.0), min_size=4, max_size=14), st.integers(0, 1000))
def test_star_shaped_polygons_keep_their_area_and_winding(radii: list, seed: int) -> None:
    angle = np.arange(len(radii)) * 2 * np.pi / len(radii)
    flat = np.array(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    after = np.roll(flat, -1, 0)
    expected = (flat[:, 0] * after[:, 1] - flat[:, 1] * after[:, 0]).sum() / 2
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    corners = flat @ turn[:2] * 1e-9
    triangles, owner = triangulate(corners, np.array([len(radii)]))
    assert len(triangles) == len(radii) - 2
    assert (owner == 0).all()
    a, b, c = (flat[triangles[:, i]] for i in range(3))
    areas = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
    assert areas.sum() == pytest.approx(expected)
    assert np.abs(areas).sum() == pytest.approx(expected, rel=1e-6)  # none folds over another


def test_polygons_of_all_sizes_together() -> None:
    arrow = np.array([[0, 0, 0], [2, 1, 0], [0, 2, 0], [0.5, 1, 0]])  # a concave quad
    corners = np.concatenate([arrow[:3], arrow, arrow[:2]])
    triangles, owner = triangulate(corners, np.array([3, 4, 2]))
    assert owner.tolist() == [0, 1, 1]
    assert triangles[0].tolist() == [0, 1, 2]
    a, b, c = (corners[triangles[1:, i]] for i in range(3))
    areas = np.cross(b - a, c - a)[:, 2] / 2
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(1.5)
    assert triangulate(np.zeros((0, 3)), np.zeros(0))[0].shape == (0, 3)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(0, 100))
def test_welding_merges_equal_positions_only(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    soup = (CUBE * scale)[CUBE_FACES].reshape(-1, 3)
    order = rng.permutation(len(soup))
    faces = np.argsort(order).reshape(-1, 3)
    vertices, welded = weld(soup[order], faces)
    assert len(vertices) == 8
    assert np.array_equal(vertices[welded], soup.reshape(-1, 3, 3))
    assert inspect_geometry(vertices, welded) == ()


def test_repeated_faces_count_with_their_winding() -> None:
    faces = np.array([[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 1, 3], [0, 1, 2]])
    assert repeated_faces(faces).tolist() == [False, True, False, False, True]
    assert repeated_faces(faces[:0]).tolist() == []


def found(vertices: np.ndarray, faces: np.ndarray) -> set[str]:
    return {warning.split(":")[0] for warning in inspect_geometry(vertices, faces)}


def test_inspection_names_what_is_wrong() -> None:
    assert found(CUBE, CUBE_FACES) == set()
    assert found(CUBE, CUBE_FACES[:, ::-1]) == {"inverted_orientation"}
    assert found(CUBE, CUBE_FACES[1:]) == {"open_surface_zero_thickness"}
    flipped = CUBE_FACES.copy()
    flipped[0] = flipped[0, ::-1]
    assert found(CUBE, flipped) == {"inconsistent_winding"}
    two = np.concatenate([CUBE, CUBE + 0.5]), np.concatenate([CUBE_FACES, CUBE_FACES + 8])
    assert found(*two) == {"self_intersection"}
    apart = np.concatenate([CUBE, CUBE + 9]), two[1]
    assert found(*apart) == set()
    # A cavity is a closed part wound inward inside another: nothing is wrong with it.
    hollow = np.concatenate([CUBE * 3 - 1, CUBE])
    assert found(hollow, np.concatenate([CUBE_FACES, CUBE_FACES[:, ::-1] + 8])) == set()
    fin = np.concatenate([CUBE, [[5.0, 5, 5]]]), np.concatenate([CUBE_FACES, [[0, 1, 8]]])
    assert "non_manifold_edge" in found(*fin)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=3, max_size=5), min_size=1, max_size=8),
    st.lists(st.sampled_from(["{0}", "{0}/{1}", "{0}//{2}", "{0}/{1}/{2}"]), min_size=8),
    st.sampled_from([" ", "  "]),
)
def test_obj_faces_of_any_shape_are_parsed_alike(faces: list, styles: list, blank: str) -> None:
    rows, vertex, texture = [], [], []
    for face, style in zip(faces, styles, strict=False):
        rows.append("f" + "".join(blank + style.format(i, -i, 7) for i in face) + blank[1:])
        vertex += face
        texture += [-i if "{1}" in style else 0 for i in face]
    counts, vertices, textures = face_numbers(rows)
    assert counts.tolist() == [len(face) for face in faces]
    assert vertices.tolist() == vertex
    assert textures.tolist() == texture
