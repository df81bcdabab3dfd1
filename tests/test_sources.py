"""Sources: what they list, how assets are identified, and that they travel to workers."""

import hashlib
import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tasks.mesh import MeshRejectedError
from tasks.mesh_io import ReadLimits
from tasks.procedural import FAMILIES, procedural_bytes, procedural_mesh
from tasks.sources import SourceAsset, SourceError, open_source

OBJ = "mtllib {name}.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl a\nf 1 2 3\n"


def write_asset(folder: Path, name: str, picture: bytes = b"not a picture") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.obj").write_text(OBJ.format(name=name))
    (folder / f"{name}.mtl").write_text(f"newmtl a\nmap_Kd {name}.png\n")
    (folder / f"{name}.png").write_bytes(picture)


def listed(root: Path, **options) -> dict[str, SourceAsset]:
    return {asset.uri: asset for asset in open_source(f"folder:{root}", **options).assets()}


def test_a_folder_lists_meshes_of_any_depth(tmp_path: Path) -> None:
    write_asset(tmp_path, "top")
    write_asset(tmp_path / "a" / "b c", "deep")
    write_asset(tmp_path / ".hidden", "no")
    write_asset(tmp_path / "__MACOSX", "no")
    (tmp_path / "._top.obj").write_bytes(b"\0")
    (tmp_path / "UPPER.STL").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no mesh")
    (tmp_path / "manifest.csv").write_text(
        "file,licence,attribution,category\na/b c/deep.obj,CC0-1.0,Ada,chair\ngone.obj,MIT,B,c\n"
    )
    assets = listed(tmp_path)
    assert list(assets) == ["UPPER.STL", "top.obj", "a/b c/deep.obj"]
    deep, top = assets["a/b c/deep.obj"], assets["top.obj"]
    assert (deep.licence, deep.attribution, deep.category) == ("CC0-1.0", "Ada", "chair")
    assert (top.licence, top.category) == ("unknown", "unknown")
    assert list(listed(tmp_path, licences=["CC0-1.0"])) == ["a/b c/deep.obj"]


def test_identity_is_the_hash_of_the_file_and_its_references(tmp_path: Path) -> None:
    write_asset(tmp_path, "a")
    files = [tmp_path / f"a.{suffix}" for suffix in ("obj", "mtl", "png")]
    data = b"".join(path.read_bytes() for path in files)
    asset = listed(tmp_path)["a.obj"]
    assert asset.asset_id == hashlib.sha256(data).hexdigest()
    assert asset.size == len(data)
    source = open_source(f"folder:{tmp_path}")
    assert len(source.load(asset).faces) == 1
    (tmp_path / "a.png").write_bytes(b"another picture")
    assert listed(tmp_path)["a.obj"].asset_id != asset.asset_id
    with pytest.raises(MeshRejectedError, match="changed"):
        source.load(asset)
    (tmp_path / "a.obj").unlink()
    with pytest.raises(MeshRejectedError, match="gone"):
        source.load(asset)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write_asset(tmp_path / "outside", "secret")
    root = tmp_path / "root"
    write_asset(root, "a")
    (root / "file.obj").symlink_to(tmp_path / "outside" / "secret.obj")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root)
    (root / "inside.obj").symlink_to(root / "a.obj")
    assert list(listed(root)) == ["a.obj", "inside.obj"]


def test_an_unreadable_file_is_an_asset_with_a_reason(tmp_path: Path) -> None:
    write_asset(tmp_path, "big")
    write_asset(tmp_path, "ok")
    (tmp_path / "lost.obj").symlink_to(tmp_path / "nowhere.obj")
    limits = ReadLimits(file_bytes=(tmp_path / "big.obj").stat().st_size)
    (tmp_path / "big.obj").write_text("# more\n" + (tmp_path / "big.obj").read_text())
    source = open_source(f"folder:{tmp_path}", limits=limits)
    assets = {asset.uri: asset for asset in source.assets()}
    assert set(assets) == {"big.obj", "ok.obj", "lost.obj"}
    assert len({asset.asset_id for asset in assets.values()}) == 3
    assert len(source.load(assets["ok.obj"]).faces) == 1
    for uri, reason in (("big.obj", "resource_limit"), ("lost.obj", "gone")):
        assert assets[uri].size == 0
        with pytest.raises(MeshRejectedError, match=reason):
            source.load(assets[uri])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_asset_with_a_reason(tmp_path: Path) -> None:
    write_asset(tmp_path, "a")
    (tmp_path / "a.obj").chmod(0)
    source = open_source(f"folder:{tmp_path}")
    (asset,) = source.assets()
    with pytest.raises(MeshRejectedError, match="unreadable"):
        source.load(asset)


def test_procedural_objects_are_identified_by_their_file() -> None:
    source = open_source("procedural:14")
    assets = list(source.assets())
    assert [asset.uri for asset in assets] == [str(seed) for seed in range(14)]
    assert assets[13].asset_id == hashlib.sha256(procedural_bytes(13)).hexdigest()
    assert assets[13].category == FAMILIES[13 % len(FAMILIES)].__name__
    made, read = procedural_mesh(13), source.load(assets[13])
    # Only faces stored twice are gone, and vertices have the order of their file.
    assert len(made.faces) * 0.9 < len(read.faces) <= len(made.faces)
    assert np.array_equal(made.vertices.max(0), read.vertices.max(0))
    assert read.vertex_colours is not None
    assert set(map(tuple, read.vertex_colours)) == set(map(tuple, made.vertex_colours))
    stale = SourceAsset("13", "0" * 64, 1)
    with pytest.raises(MeshRejectedError, match="changed"):
        source.load(stale)


def test_shapenet_layout(tmp_path: Path) -> None:
    folder = tmp_path / "02691156" / "abc" / "models"
    write_asset(folder, "model_normalized")
    (folder.parent / "images").mkdir()
    (folder.parent / "images" / "t.png").write_bytes(b"picture")
    (folder / "model_normalized.mtl").write_text("newmtl a\nmap_Kd ../images/t.png\n")
    (tmp_path / "taxonomy.json").write_text("[]")
    source = open_source(f"shapenet:{tmp_path}")
    (asset,) = source.assets()
    assert (asset.uri, asset.category, asset.licence) == ("02691156/abc", "02691156", "ShapeNet")
    names = (folder / "model_normalized.obj", folder / "model_normalized.mtl")
    data = b"".join(path.read_bytes() for path in names) + b"picture"
    assert asset.asset_id == hashlib.sha256(data).hexdigest()
    assert len(source.load(asset).faces) == 1
    assert list(open_source(f"shapenet:{tmp_path}", licences=["MIT"]).assets()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("objaverse") is not None, reason="the package is installed"
)
def test_objaverse_says_what_is_missing(tmp_path: Path) -> None:
    uids = tmp_path / "uids.txt"
    uids.write_text("8476c4170df24cf5bbe6967222d1a42d\n")
    with pytest.raises(SourceError, match=r"pip install 'gigashape\[objaverse\]'"):
        list(open_source(f"objaverse:{uids}").assets())


@pytest.mark.parametrize(
    "spec",
    [
        "folder:",
        "folder:/no/such/place",
        "shapenet:/no/such/place",
        "procedural:0",
        "procedural:-3",
        "procedural:many",
        "objaverse:",
        "objaverse:not a uid",
        "ftp:somewhere",
        "",
    ],
)
def test_a_wrong_spec_is_explained(spec: str) -> None:
    with pytest.raises(SourceError, match=r"expected|give the path|neither"):
        open_source(spec)


def test_a_broken_manifest_is_explained(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("name,licence\na.obj,MIT\n")
    with pytest.raises(SourceError, match="file"):
        list(open_source(f"folder:{tmp_path}").assets())


def test_sources_are_picklable(tmp_path: Path) -> None:
    write_asset(tmp_path, "a")
    for spec in (f"folder:{tmp_path}", f"shapenet:{tmp_path}", "procedural:2", "objaverse:abc,def"):
        source = open_source(spec, licences=["CC0-1.0"])
        assert pickle.loads(pickle.dumps(source)) == source
