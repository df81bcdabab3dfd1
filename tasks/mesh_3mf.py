"""Reader of 3MF: core, production (parts in files of their own) and materials extensions."""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from lxml import etree

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_parts import GREY, WHITE, Reading
from tasks.mesh_xml import MAX_DEPTH, local, numbers, parse_xml


def open_3mf(data: bytes, reading: Reading) -> dict[str, bytes]:
    """Return the models and pictures of a 3MF by lower-case name; nothing is written to disk.

    Rejects, by the directory and before a byte is inflated, what is too large (`resource_limit`).
    """
    limits = reading.limits
    try:
        archive = zipfile.ZipFile(BytesIO(data))
        wanted = [
            e
            for e in archive.infolist()
            if re.search(r"\.(model|rels|png|jpe?g)$", e.filename, re.IGNORECASE)
        ]
        total = sum(e.file_size for e in wanted)
        ratio = max((e.file_size / max(e.compress_size, 1) for e in wanted), default=0)
        if total > limits.uncompressed_bytes or (
            ratio > limits.compression_ratio and total > 1 << 20
        ):
            detail = f"{total} bytes from {len(data)}, ratio up to {ratio:.0f}:1"
            raise MeshRejectedError("resource_limit", detail)
        # A size in the directory that is too small ends the entry there, with a CRC error.
        return {"/" + e.filename.lstrip("/").lower(): archive.read(e) for e in wanted}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
        raise MeshRejectedError("truncated", f"no whole zip: {error}") from error
    except RuntimeError as error:  # an encrypted entry
        raise MeshRejectedError("unsupported_feature", str(error)) from error


def matrix_3mf(text: str | None) -> np.ndarray:
    """Return the column-vector matrix [4, 4] of a 3MF transform (12 numbers, row vectors)."""
    matrix = np.eye(4)
    if text:
        matrix[:3] = numbers(text).reshape(4, 3).T
    if not np.isfinite(matrix).all():
        raise MeshRejectedError("non_finite_transform", f"{text!r}")
    return matrix


def hex_colour(text: str | None) -> np.ndarray:
    """Return `#RRGGBB` or `#RRGGBBAA` as [4] uint8."""
    digits = (text or "").removeprefix("#").ljust(8, "F")
    return np.frombuffer(bytes.fromhex(digits), np.uint8)


class Model3MF:
    """The objects and properties of all model files of a 3MF, by (file, id)."""

    def __init__(self, files: dict[str, bytes], reading: Reading):
        self.files, self.reading = files, reading
        self.objects: dict[tuple[str, str], etree._Element] = {}
        self.colours: dict[tuple[str, str], np.ndarray] = {}
        self.texture_groups: dict[tuple[str, str], tuple[int, np.ndarray]] = {}
        self.build: list[tuple[str, etree._Element]] = []
        self.white: int | None = None
        self.grey = reading.material(GREY)
        for name in files:
            if name.endswith(".model"):
                self.read_model(name)

    def read_model(self, name: str) -> None:
        """Take in one model file's resources."""
        root = parse_xml(self.files[name])
        for element in root.iterfind("{*}resources/{*}*"):
            key = (name, element.get("id", ""))
            kind = local(element)
            if kind == "object":
                self.objects[key] = element
            elif kind == "basematerials":
                entries = [hex_colour(b.get("displaycolor")) for b in element]
                self.colours[key] = np.array(entries, np.uint8).reshape(-1, 4)
            elif kind == "colorgroup":
                entries = [hex_colour(c.get("color")) for c in element]
                self.colours[key] = np.array(entries, np.uint8).reshape(-1, 4)
            elif kind == "texture2dgroup":
                textures = {t.get("id"): t for t in root.iterfind("{*}resources/{*}texture2d")}
                texture = textures.get(element.get("texid"))
                path = "" if texture is None else (texture.get("path") or "").lower()
                picture = None
                if path in self.files:
                    picture = self.reading.texture(("3mf", path), self.files[path])
                else:
                    self.reading.warn("missing_texture", f"{path!r} is not in the archive")
                table = [(c.get("u"), c.get("v")) for c in element]
                if picture is not None and table:
                    index = self.reading.material(Material(WHITE.colour, picture))
                    self.texture_groups[key] = (index, np.array(table, float))
        self.build += [(name, item) for item in root.iterfind("{*}build/{*}item")]

    def add(self, name: str, element: etree._Element, matrix: np.ndarray) -> None:
        """Add an object's own triangles; plain, coloured and textured ones are separate parts."""
        mesh = element.find("{*}mesh")
        if mesh is None:
            return
        vertices = [v.attrib for v in mesh.iterfind("{*}vertices/{*}vertex")]
        triangles = [t.attrib for t in mesh.iterfind("{*}triangles/{*}triangle")]
        self.reading.points += len(vertices)
        if not triangles:
            return
        self.reading.check_limits(len(vertices), len(triangles))
        positions = np.array([(v["x"], v["y"], v["z"]) for v in vertices], float)
        index = np.array([(t["v1"], t["v2"], t["v3"]) for t in triangles], np.int64)
        if index.min() < 0 or index.max() >= len(positions):
            detail = f"faces use vertices {index.min()} to {index.max()} of {len(positions)}"
            raise MeshRejectedError("index_out_of_range", detail)
        default, first = element.get("pid", ""), element.get("pindex", "0")
        groups = np.array([t.get("pid", default) for t in triangles])
        p1 = [t.get("p1", first) if "pid" in t or "p1" in t else first for t in triangles]
        pairs = zip(p1, triangles, strict=True)
        rows = [(p, t.get("p2", p), t.get("p3", p)) for p, t in pairs]
        property_index = np.array(rows, np.int64)
        for group in np.unique(groups):
            chosen, key = groups == group, (name, str(group))
            material, uv, colours = self.grey, None, None
            if key in self.texture_groups:
                material, table = self.texture_groups[key]
                uv = (table, property_index[chosen])
            elif key in self.colours:
                if self.white is None:
                    self.white = self.reading.material(WHITE)
                material = self.white
                colours = (self.colours[key], property_index[chosen])
            self.reading.add_corners(positions, index[chosen], material, uv, colours, matrix)

    def placed(self) -> Iterator[tuple[str, etree._Element, np.ndarray]]:
        """Yield the objects of the build with their transforms, components followed."""
        waiting = []
        for name, item in reversed(self.build):
            matrix = matrix_3mf(item.get("transform"))
            waiting.append((self.file_of(item, name), item.get("objectid", ""), matrix, 0))
        seen = 0
        while waiting:
            name, object_id, above, depth = waiting.pop()
            seen += 1
            if depth > MAX_DEPTH:
                raise MeshRejectedError("cyclic_scene_graph", f"components {MAX_DEPTH} deep")
            if seen > self.reading.limits.instances:
                raise MeshRejectedError("resource_limit", f"over {seen - 1} components")
            if (name, object_id) not in self.objects:
                detail = f"object {object_id!r} of {name!r} is not there"
                raise MeshRejectedError("broken_reference", detail)
            element = self.objects[name, object_id]
            yield name, element, above
            for part in element.iterfind("{*}components/{*}component"):
                matrix = above @ matrix_3mf(part.get("transform"))
                entry = (self.file_of(part, name), part.get("objectid", ""), matrix, depth + 1)
                waiting.append(entry)

    @staticmethod
    def file_of(element: etree._Element, name: str) -> str:
        """Return the model file of a component or item: its `path` attribute, else this one."""
        paths = [v for k, v in element.attrib.items() if etree.QName(k).localname == "path"]
        return str(paths[0]).lower() if paths else name


def read_3mf(data: bytes, reading: Reading) -> None:
    """Read a 3MF: the items of its build, with base materials, colour groups and textures."""
    files = open_3mf(data, reading)
    if not any(name.endswith(".model") for name in files):
        raise MeshRejectedError("wrong_format", "a zip without a 3D model part")
    model = Model3MF(files, reading)
    for name, element, matrix in model.placed():
        model.add(name, element, matrix)
