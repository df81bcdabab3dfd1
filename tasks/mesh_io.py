"""Reads a mesh file safely: glb, gltf, obj, ply, stl, off, dae, 3mf -> Mesh.

`read_mesh(path, root)` opens nothing outside root and no network address. What can't become
training data is a MeshRejectedError with a reason code; what is odd is a warning of the Mesh.
The readers are our own: libraries drop broken faces without a word, load undecoded geometry as
zeros, fan-triangulate concave polygons, or follow references anywhere.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.mesh import Mesh, MeshRejectedError
from tasks.mesh_3mf import read_3mf
from tasks.mesh_dae import dae_references, read_dae
from tasks.mesh_gltf import read_gltf
from tasks.mesh_gltf_document import gltf_references
from tasks.mesh_inspection import inspect_geometry, repeated_faces, weld
from tasks.mesh_obj import mtl_textures, obj_references, read_obj
from tasks.mesh_parts import Reading, ReadLimits, find_reference, inside_root, read_bytes
from tasks.mesh_plain import ply_header, read_off, read_ply, read_stl

__all__ = ["EXTENSIONS", "ReadLimits", "read_mesh", "referenced_files"]

DEFAULT_LIMITS = ReadLimits()
MAGIC = {
    b"glTF": "GLB",
    b"PK\x03\x04": "a zip",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"%PDF": "PDF",
    b"\x1f\x8b": "gzip",
    b"ply": "PLY",
    b"Kaydara": "FBX",
    b"BLENDER": "a Blender file",
}


def is_text(data: bytes) -> bool:
    """Say whether data begins like text: no zero byte in its first 4 KiB."""
    return b"\0" not in data[:4096]


def begins(data: bytes, *starts: bytes) -> bool:
    """Say whether data begins so, a byte order mark and blanks aside."""
    return data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(starts)


def is_xml(data: bytes) -> bool:
    """Say whether data begins like XML, in UTF-8 or UTF-16."""
    return begins(data, b"<") or data[:2] in (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Format:
    """How a kind of file is told, and read; `magic`: its own entry of MAGIC."""

    looks_right: Callable[[bytes], bool]
    read: Callable[[bytes, "Reading"], None]
    magic: bytes | None = None


FORMATS = {
    ".glb": Format(lambda data: data[:4] == b"glTF", read_gltf, b"glTF"),
    ".gltf": Format(lambda data: begins(data, b"{"), read_gltf),
    ".obj": Format(lambda data: is_text(data) and not is_xml(data), read_obj),
    ".ply": Format(lambda data: data[:3] == b"ply", read_ply, b"ply"),
    ".stl": Format(lambda data: not is_xml(data), read_stl),
    ".off": Format(is_text, read_off),
    ".dae": Format(is_xml, read_dae),
    ".3mf": Format(lambda data: data[:2] == b"PK", read_3mf, b"PK\x03\x04"),
}
EXTENSIONS = frozenset(FORMATS)


def read_mesh(path: Path, root: Path, limits: ReadLimits = DEFAULT_LIMITS) -> Mesh:
    """Read one mesh with its materials; scene transforms applied, units kept but for COLLADA.

    path: a file at or below root. Skins and morphs are at rest. Repeated faces are removed.
    Raises MeshRejectedError for everything that is wrong with the file.
    """
    if not inside_root(path, root):
        raise MeshRejectedError("uri_outside_root", f"{path.name} leads outside the root")
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        detail = f"{path.suffix!r}, expected one of {sorted(EXTENSIONS)}"
        raise MeshRejectedError("unsupported_format", detail)
    data = read_bytes(path, limits.file_bytes)
    if not data:
        raise MeshRejectedError("empty_file", "0 bytes")
    foreign = [n for m, n in MAGIC.items() if data.startswith(m) and m != form.magic]
    if foreign or not form.looks_right(data):
        found = foreign[0] if foreign else f"{data[:12]!r}"
        raise MeshRejectedError("wrong_format", f"{path.suffix} file that begins like {found}")
    reading = Reading(path, root, limits)
    try:
        with np.errstate(all="ignore"):  # overflows are found in what comes out
            form.read(data, reading)
            mesh = reading.mesh()
    except MeshRejectedError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        # A file can break the rules of its format in more ways than are worth a code each.
        raise MeshRejectedError("malformed", f"{type(error).__name__}: {error}") from error
    return cleaned(mesh)


def cleaned(mesh: Mesh) -> Mesh:
    """Return the mesh without collapsed and repeated faces, and with warnings of its geometry.

    Raises `no_area` when nothing is left.
    """
    with np.errstate(all="ignore"):
        extent = float((mesh.vertices.max(0) - mesh.vertices.min(0)).max())
    if not np.isfinite(extent):
        raise MeshRejectedError("non_finite_vertices", "the extent overflows 64-bit floats")
    vertices, faces = weld(mesh.vertices, mesh.faces)
    warnings = list(mesh.warnings)
    a, b, c = faces.T
    keep = (a != b) & (b != c) & (c != a)
    if not keep.all():
        warnings.append(f"degenerate_faces: {int((~keep).sum())} faces with a repeated corner")
    repeated = np.zeros(len(faces), bool)
    repeated[keep] = repeated_faces(faces[keep])
    if repeated.any():
        warnings.append(f"duplicate_faces: {int(repeated.sum())} of {len(faces)} removed")
    keep &= ~repeated
    # Areas in a frame of the asset's own size: 1e-9 and 1e15 are both fine.
    if extent > 1e-290:
        points = (vertices - vertices.mean(0)) / extent
        a, b, c = (points[faces[keep, i]] for i in range(3))
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if extent <= 1e-290 or not (area > 1e-15).any():
        detail = f"no face of {len(faces)} has an area; extent {extent:g}"
        raise MeshRejectedError("no_area", detail)
    warnings += inspect_geometry(vertices, faces[keep])
    return replace(
        mesh,
        faces=mesh.faces[keep],
        face_material=mesh.face_material[keep],
        warnings=tuple(warnings),
    )


def referenced_files(path: Path, root: Path, limits: ReadLimits = DEFAULT_LIMITS) -> list[Path]:
    """Return the files inside root that a mesh names, in its order: part of the asset's identity.

    Missing, forbidden or unreadable ones are left out, and all of them when the file is broken:
    reading the mesh is what says why.
    """
    suffix = path.suffix.lower()
    if suffix not in (".gltf", ".glb", ".obj", ".dae", ".ply") or not inside_root(path, root):
        return []
    found: list[Path] = []
    try:
        data = read_bytes(path, limits.file_bytes)
        if suffix in (".gltf", ".glb"):
            uris = gltf_references(data)
        elif suffix == ".dae":
            uris = dae_references(data)
        elif suffix == ".ply":
            texture = ply_header(data)[2]
            uris = [texture] if texture else []
        else:
            uris = obj_references(data)
        for uri in uris:
            add_reference(found, uri, path.parent, root)
        if suffix == ".obj":
            for library in tuple(found):
                for uri in mtl_textures(read_bytes(library, limits.file_bytes)):
                    add_reference(found, uri, path.parent, root)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return found
    except struct.error:
        return found
    return found


def add_reference(found: list[Path], uri: str, folder: Path, root: Path) -> None:
    """Append the file that a URI means, unless there is none or it is there already."""
    try:
        file = find_reference(uri, folder, root, "missing")
    except MeshRejectedError:
        return
    if file not in found:
        found.append(file)
