"""Reader of COLLADA (.dae) 1.4 and 1.5."""

import numpy as np
from lxml import etree

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_parts import GREY, WHITE, Reading
from tasks.mesh_polygons import triangulate
from tasks.mesh_xml import MAX_DEPTH, local, numbers, parse_xml, target


def dae_references(data: bytes) -> list[str]:
    """Return the pictures that a COLLADA file names, in order, each once."""
    root = parse_xml(data)
    uris = [image_uri(image) for image in root.iterfind("{*}library_images/{*}image")]
    return list(dict.fromkeys(uri for uri in uris if uri))


def image_uri(image: etree._Element) -> str:
    """Return the path of a COLLADA image (1.4, or 1.5 with <ref>), or an empty string."""
    for path in ("{*}init_from/{*}ref", "{*}init_from"):
        found = image.findtext(path)
        if found and found.strip():
            return found.strip()
    return ""


class Collada:
    """A COLLADA document: elements by id, materials and geometries read when first used."""

    def __init__(self, data: bytes, reading: Reading):
        self.root = parse_xml(data)
        if local(self.root) != "COLLADA":
            detail = f"root element {local(self.root)!r}, expected COLLADA"
            raise MeshRejectedError("wrong_format", detail)
        self.reading = reading
        # By kind as well: 3ds Max gives a scene and its node the same id.
        self.by_id = {(local(e), e.get("id")): e for e in self.root.iter("{*}*") if e.get("id")}
        self.materials: dict[str, int] = {}
        self.primitives: dict[str, list[dict]] = {}

    def find(self, element: etree._Element, attribute: str, *kinds: str) -> etree._Element:
        """Return the element, of one of these kinds, that an attribute like `url` means."""
        for kind in kinds:
            if (kind, target(element, attribute)) in self.by_id:
                return self.by_id[kind, target(element, attribute)]
        detail = f"<{local(element)}> means {element.get(attribute)!r}, no {' or '.join(kinds)}"
        raise MeshRejectedError("broken_reference", detail)

    def material(self, name: str) -> int:
        """Return the reading's index of a material id; grey, with a warning, when it is broken."""
        if name not in self.materials:
            try:
                found = self.diffuse(name)
            except (AttributeError, ValueError, TypeError, IndexError) as error:
                self.reading.warn("broken_material_reference", f"material {name!r}: {error}")
                found = GREY
            self.materials[name] = self.reading.material(found)
        return self.materials[name]

    def diffuse(self, name: str) -> Material:
        """Return the diffuse colour (as sRGB; transparency is ignored) of a material id."""
        if not name:
            return GREY
        if ("material", name) not in self.by_id:
            raise ValueError("it is not defined")
        instance = self.by_id["material", name].find("{*}instance_effect")
        effect = self.find(instance, "url", "effect")
        profile = effect.find("{*}profile_COMMON")
        diffuse = profile.find("{*}technique/{*}*/{*}diffuse")
        if diffuse is None:
            return GREY
        colour = diffuse.find("{*}color")
        if colour is not None:
            r, g, b = np.clip(numbers(colour.text)[:3], 0, 1).tolist()
            return Material((r, g, b, 1.0))
        reference = diffuse.find("{*}texture").get("texture")
        params = {p.get("sid"): p for p in effect.iter("{*}newparam")}
        sampler = params.get(reference)
        if sampler is not None:
            surface = sampler.findtext("{*}sampler2D/{*}source") or ""
            image = sampler.find("{*}sampler2D/{*}instance_image")
            if image is not None:
                reference = target(image, "url")
            else:
                found = params.get(surface.strip(), sampler)
                reference = (found.findtext("{*}surface/{*}init_from") or surface).strip()
        image = self.by_id.get(("image", reference))
        uri = "" if image is None else image_uri(image)
        if not uri:
            raise ValueError(f"image {reference!r} has no file")
        texture = self.reading.texture(uri)
        return GREY if texture is None else Material(WHITE.colour, texture)

    def source(self, element: etree._Element) -> np.ndarray:
        """Return a <source>'s float array as [count, stride]."""
        array, accessor = (
            element.find("{*}float_array"),
            element.find("{*}technique_common/{*}accessor"),
        )
        values = numbers(None if array is None else array.text)
        stride = int(accessor.get("stride", 1)) if accessor is not None else 3
        offset = int(accessor.get("offset", 0)) if accessor is not None else 0
        count = int(accessor.get("count", 0)) if accessor is not None else len(values) // stride
        if stride < 1 or offset < 0 or count < 0 or offset + count * stride > len(values):
            detail = f"source {element.get('id')!r}: {count} x {stride} of {len(values)} numbers"
            raise MeshRejectedError("declared_count_exceeds_data", detail)
        return values[offset : offset + count * stride].reshape(count, stride)

    def geometry(self, element: etree._Element) -> list[dict]:
        """Return the primitives of a <geometry>: positions, triangles, uv, colours, symbol."""
        name = element.get("id", "")
        if name not in self.primitives:
            mesh = element.find("{*}mesh")
            if mesh is None:
                mesh = element.find("{*}convex_mesh")
            parts = [] if mesh is None else [self.primitive(p) for p in mesh]
            self.primitives[name] = [p for p in parts if p is not None]
        return self.primitives[name]

    def primitive(self, element: etree._Element) -> dict | None:
        """Return the triangles of one <triangles>, <polylist>, <polygons>, strip or fan element."""
        kind = local(element)
        if kind not in ("triangles", "polylist", "polygons", "tristrips", "trifans"):
            return None
        inputs: dict[str, tuple[int, etree._Element]] = {}
        offsets = [0]
        for entry in sorted(element.iterfind("{*}input"), key=lambda e: int(e.get("set") or 0)):
            offsets.append(int(entry.get("offset") or 0))
            source = self.find(entry, "source", "vertices", "source")
            inputs.setdefault(entry.get("semantic") or "", (offsets[-1], source))
        rows = [numbers(p.text, np.int64) for p in element.iterfind("{*}p")]
        rows += [numbers(p.text, np.int64) for p in element.iterfind("{*}ph/{*}p")]
        stride = max(offsets) + 1
        if "VERTEX" not in inputs or not sum(map(len, rows)):
            return None
        corners = np.concatenate([row[: len(row) // stride * stride] for row in rows])
        corners = corners.reshape(-1, stride)
        sizes = np.array([len(row) // stride for row in rows])
        at_vertex, vertices = inputs["VERTEX"]
        for entry in vertices.iterfind("{*}input"):
            pair = (at_vertex, self.find(entry, "source", "source"))
            inputs.setdefault(entry.get("semantic") or "", pair)
        positions = self.source(inputs["POSITION"][1])[:, :3]
        if positions.shape[1] != 3:
            raise MeshRejectedError("malformed", f"positions of {positions.shape[1]} numbers")
        index = corners[:, at_vertex]
        if index.min() < 0 or index.max() >= len(positions):
            detail = f"faces use vertices {index.min()} to {index.max()} of {len(positions)}"
            raise MeshRejectedError("index_out_of_range", detail)
        triangles = corner_triangles(kind, element, sizes, positions[index])
        tables: dict[str, tuple[np.ndarray, np.ndarray] | None] = {"TEXCOORD": None, "COLOR": None}
        for semantic in tables:
            if semantic in inputs:
                offset, source = inputs[semantic]
                tables[semantic] = (self.source(source), corners[:, offset][triangles])
        if (uv := tables["TEXCOORD"]) is not None:
            tables["TEXCOORD"] = (uv[0][:, :2], uv[1])
        if (colour := tables["COLOR"]) is not None:
            rgba = np.ones((len(colour[0]), 4))
            rgba[:, : colour[0].shape[1]] = np.clip(np.nan_to_num(colour[0][:, :4]), 0, 1)
            tables["COLOR"] = ((rgba * 255 + 0.5).astype(np.uint8), colour[1])
        return {
            "positions": positions,
            "index": index[triangles],
            "uv": tables["TEXCOORD"],
            "colours": tables["COLOR"],
            "symbol": element.get("material", ""),
        }

    def place(self, instance: etree._Element, geometry: etree._Element, matrix: np.ndarray) -> None:
        """Add a geometry's primitives with the materials that its instance binds."""
        bound = {
            m.get("symbol"): target(m, "target") for m in instance.iter("{*}instance_material")
        }
        for part in self.geometry(geometry):
            symbol = part["symbol"]
            material = self.material(bound.get(symbol, symbol))
            textured = self.reading.materials[material].texture is not None
            if textured and part["uv"] is None:
                self.reading.warn("broken_texture", "a texture, but no texture coordinates")
            self.reading.add_corners(
                part["positions"],
                part["index"],
                material,
                part["uv"] if textured else None,
                part["colours"],
                matrix,
            )


def corner_triangles(
    kind: str, element: etree._Element, sizes: np.ndarray, corners: np.ndarray
) -> np.ndarray:
    """Return triangles [T, 3] as rows of corners [C, 3]; sizes [K]: corners of each <p>."""
    if kind == "triangles":
        return np.arange(len(corners) // 3 * 3).reshape(-1, 3)
    if kind == "polylist":
        counts = numbers(element.findtext("{*}vcount"), np.int64)
        if counts.min(initial=0) < 0 or counts.sum() > len(corners):
            detail = f"a polylist of {counts.sum()} corners has {len(corners)}"
            raise MeshRejectedError("declared_count_exceeds_data", detail)
        return triangulate(corners, counts)[0]
    if kind == "polygons":
        return triangulate(corners, sizes)[0]
    pieces = []
    for start, n in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        i = np.arange(max(n - 2, 0))
        first = i if kind == "tristrips" else np.zeros_like(i)
        strip = np.stack([first, i + 1, i + 2], 1)
        if kind == "tristrips":
            strip[1::2] = strip[1::2, ::-1]
        pieces.append(strip + start)
    return np.concatenate(pieces)


def node_matrix(node: etree._Element) -> np.ndarray:
    """Return the product of a COLLADA node's transforms, in document order."""
    matrix = np.eye(4)
    for child in node:
        kind, step = local(child), np.eye(4)
        if kind == "matrix":
            step = numbers(child.text).reshape(4, 4)
        elif kind == "translate":
            step[:3, 3] = numbers(child.text)
        elif kind == "scale":
            step[[0, 1, 2], [0, 1, 2]] = numbers(child.text)
        elif kind == "rotate":
            x, y, z, degrees = numbers(child.text)
            axis = np.array([x, y, z]) / max(np.sqrt(x * x + y * y + z * z), 1e-300)
            cross = np.cross(np.eye(3), axis)
            angle = np.deg2rad(degrees)
            step[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        else:
            continue
        matrix = matrix @ step
    if not np.isfinite(matrix).all():
        raise MeshRejectedError("non_finite_transform", f"node {node.get('name', '')!r}")
    return matrix


def up_and_unit(root: etree._Element) -> np.ndarray:
    """Return the transform [4, 4] from the file's axes and unit to y up and metres."""
    up = (root.findtext("{*}asset/{*}up_axis") or "Y_UP").strip()
    unit = root.find("{*}asset/{*}unit")
    scale = float(unit.get("meter") or 1) if unit is not None else 1.0
    scale = scale if np.isfinite(scale) and scale > 0 else 1.0
    turns = {
        "X_UP": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
        "Z_UP": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    }
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(turns.get(up, np.eye(3))) * scale
    return matrix


def read_dae(data: bytes, reading: Reading) -> None:
    """Read a COLLADA file: its scene, y up, in metres; skins and morphs in their bind shape."""
    collada = Collada(data, reading)
    scene = collada.root.find("{*}scene/{*}instance_visual_scene")
    if scene is not None:
        visual = collada.find(scene, "url", "visual_scene")
    else:
        visual = collada.root.find("{*}library_visual_scenes/{*}visual_scene")
    waiting = []
    if visual is not None:
        base = up_and_unit(collada.root)
        waiting = [(n, base, 0) for n in reversed(list(visual.iterfind("{*}node")))]
    seen = 0
    while waiting:
        node, above, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH:
            raise MeshRejectedError("cyclic_scene_graph", f"nodes {MAX_DEPTH} deep")
        if seen > reading.limits.instances:
            raise MeshRejectedError("resource_limit", f"over {seen - 1} nodes after instancing")
        matrix = above @ node_matrix(node)
        below = []
        for child in node:
            kind = local(child)
            if kind == "node":
                below.append((child, matrix, depth + 1))
            elif kind == "instance_node":
                below.append((collada.find(child, "url", "node"), matrix, depth + 1))
            elif kind == "instance_geometry":
                collada.place(child, collada.find(child, "url", "geometry"), matrix)
            elif kind == "instance_controller":
                geometry, shape = bind_shape(collada, child)
                collada.place(child, geometry, matrix @ shape)
        waiting.extend(reversed(below))


def bind_shape(collada: Collada, instance: etree._Element) -> tuple[etree._Element, np.ndarray]:
    """Return the geometry behind a skin or morph controller, and its bind shape matrix."""
    matrix = np.eye(4)
    element = collada.find(instance, "url", "controller", "geometry")
    for _ in range(8):
        if local(element) == "geometry":
            return element, matrix
        inner = element.find("{*}skin")
        if inner is not None:
            text = inner.findtext("{*}bind_shape_matrix")
            matrix = numbers(text).reshape(4, 4) @ matrix if text else matrix
        else:
            inner = element.find("{*}morph")
        element = collada.find(inner, "source", "geometry", "controller")
    raise MeshRejectedError("cyclic_scene_graph", "controllers that mean each other")
