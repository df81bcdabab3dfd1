"""Reader of glTF 2.0, text and binary.

Nodes, skins and morph weights are evaluated at rest (animations are ignored); base colours and
their textures are read, other maps are not. Everything is checked against the bytes that are there.
"""

import base64
import binascii
import json
import struct
from typing import Any

import numpy as np

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_parts import GREY, Reading, find_reference, reject_short

COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
# Required extensions that do not change the geometry read here, or that are implemented.
HARMLESS = (
    "KHR_materials_",
    "KHR_texture_",
    "EXT_texture_",
    "KHR_lights_",
    "KHR_mesh_quantization",
    "EXT_mesh_gpu_instancing",
    "KHR_animation_pointer",
    "KHR_xmp",
    "KHR_node_visibility",
)
COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")


def split_gltf(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Return the JSON of a .gltf or .glb, and the binary chunk of the latter."""
    binary = None
    if data[:4] == b"glTF":
        if len(data) < 20:
            raise MeshRejectedError("truncated", f"{len(data)} bytes; a GLB header takes 20")
        version, length, size, kind = struct.unpack_from("<IIII", data, 4)
        if version != 2:
            raise MeshRejectedError("unsupported_version", f"glTF {version}; convert it to 2.0")
        if length > len(data) or 20 + size > len(data):
            raise MeshRejectedError("truncated", f"GLB of {length} bytes, the file has {len(data)}")
        if kind != 0x4E4F534A:
            raise MeshRejectedError("malformed_header", "the first chunk of the GLB is not JSON")
        start = 20 + size
        text, rest = data[20:start], data[start:length]
        if len(rest) >= 8:
            size, kind = struct.unpack_from("<II", rest)
            if 8 + size > len(rest):
                raise MeshRejectedError("truncated", f"a chunk of {size} bytes, {len(rest)} there")
            binary = rest[8 : 8 + size] if kind == 0x004E4942 else None
    else:
        text = data
    document = json.loads(text.decode("utf-8-sig"))
    if not isinstance(document, dict) or "asset" not in document:
        raise MeshRejectedError("wrong_format", "no glTF: the JSON has no `asset`")
    if not str(document["asset"].get("version", "")).startswith("2"):
        found = document["asset"].get("version")
        raise MeshRejectedError("unsupported_version", f"glTF {found}; convert it to 2.0")
    return document, binary


def gltf_references(data: bytes) -> list[str]:
    """Return the URIs of a glTF's buffers and images that are files of their own."""
    document, _ = split_gltf(data)
    items = [*document.get("buffers", []), *document.get("images", [])]
    uris = [item["uri"] for item in items if isinstance(item.get("uri"), str)]
    return list(dict.fromkeys(uri for uri in uris if not uri.startswith("data:")))


def data_uri(uri: str) -> bytes:
    """Return the bytes of a base64 `data:` URI."""
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise MeshRejectedError("malformed", f"data URI {head[:40]!r} is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise MeshRejectedError("malformed", f"data URI: {error}") from error


def at(items: list, index: object, what: str) -> Any:
    """Return items[index]; raises index_out_of_range for what glTF allows no index to be."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(items):
        raise MeshRejectedError("index_out_of_range", f"{what} {index!r} of {len(items)}")
    return items[index]


class Gltf:
    """A glTF document with its buffers, read when first used."""

    def __init__(self, data: bytes, reading: Reading):
        self.document, self.binary = split_gltf(data)
        self.reading = reading
        self.loaded: dict[int, bytes] = {}
        self.material_index: dict[object, int] = {}
        self.texture_settings: dict[int, tuple[int, np.ndarray]] = {}
        self.globals: list[np.ndarray] = []  # [4, 4] of each node, once the scene is walked

    def items(self, name: str) -> list:
        """Return a top-level array."""
        return self.document.get(name, [])

    def check(self) -> None:
        """Reject, before anything is read, what can't be read or must not be opened."""
        required = self.document.get("extensionsRequired", [])
        used = {*required, *self.document.get("extensionsUsed", [])}
        unknown = [n for n in required if not n.startswith(HARMLESS)]
        for primitive in (p for m in self.items("meshes") for p in m.get("primitives", [])):
            unknown += [n for n in COMPRESSED if n in primitive.get("extensions", {})]
        for view in self.items("bufferViews"):
            unknown += [n for n in COMPRESSED if n in view.get("extensions", {})]
        if unknown:
            detail = f"{unknown[0]} (of {sorted(used)}); export without it"
            raise MeshRejectedError("unsupported_extension", detail)
        self.parents = check_graph(self.items("nodes"))
        for buffer in self.items("buffers"):
            uri = buffer.get("uri")
            if uri is not None and not uri.startswith("data:"):
                folder, root = self.reading.path.parent, self.reading.root
                find_reference(uri, folder, root, "missing_external_buffer")

    def buffer(self, index: int) -> bytes:
        """Return a buffer's bytes."""
        if index not in self.loaded:
            buffer = at(self.items("buffers"), index, "buffer")
            uri = buffer.get("uri")
            if uri is None:
                if index or self.binary is None:
                    raise MeshRejectedError("missing_external_buffer", f"buffer {index} has no uri")
                data = self.binary
            elif uri.startswith("data:"):
                data = data_uri(uri)
            else:
                data = self.reading.reference(uri, "missing_external_buffer")
            if buffer["byteLength"] > len(data):
                raise reject_short(f"buffer {index}", buffer["byteLength"], len(data))
            self.loaded[index] = data
        return self.loaded[index]

    def view(self, index: int) -> tuple[bytes, int, int, int]:
        """Return a buffer view as (buffer, start, length, stride or 0)."""
        view = at(self.items("bufferViews"), index, "bufferView")
        data = self.buffer(view["buffer"])
        start, length = view.get("byteOffset", 0), view["byteLength"]
        if start < 0 or length < 0 or start + length > len(data):
            raise reject_short(f"bufferView {index}", start + length, len(data))
        return data, start, length, view.get("byteStride", 0)

    def array(self, view: int, offset: int, count: int, dtype: str, width: int) -> np.ndarray:
        """Return [count, width] of dtype from a buffer view."""
        data, start, length, stride = self.view(view)
        item = np.dtype(dtype).itemsize * width
        stride = stride or item
        need = offset + stride * (count - 1) + item if count else 0
        if count < 0 or offset < 0 or stride < item or need > length:
            detail = f"an accessor takes {need} bytes of a bufferView of {length}"
            raise MeshRejectedError("declared_count_exceeds_data", detail)
        shape, strides = (count, width), (stride, np.dtype(dtype).itemsize)
        return np.ndarray(shape, dtype, data, start + offset, strides)

    def accessor(self, index: int) -> np.ndarray:
        """Return an accessor as [count, width]: integers as they are, normalised ones as floats."""
        accessor = at(self.items("accessors"), index, "accessor")
        count, width = accessor["count"], WIDTHS[accessor["type"]]
        dtype = COMPONENTS[accessor["componentType"]]
        limit = 3 * self.reading.limits.vertices
        if not 0 <= count <= limit:
            detail = f"an accessor of {count} elements, limit {limit}"
            raise MeshRejectedError("resource_limit", detail)
        if "bufferView" in accessor:
            offset = accessor.get("byteOffset", 0)
            values = self.array(accessor["bufferView"], offset, count, dtype, width)
        else:
            if "sparse" not in accessor:
                self.reading.check_limits(count, 0)
            values = np.zeros((count, width), dtype)
        if "sparse" in accessor:
            sparse = accessor["sparse"]
            where, what, n = sparse["indices"], sparse["values"], sparse["count"]
            kind = COMPONENTS[where["componentType"]]
            rows = self.array(where["bufferView"], where.get("byteOffset", 0), n, kind, 1)[:, 0]
            if n and int(rows.max()) >= count:
                raise MeshRejectedError("index_out_of_range", f"sparse row {rows.max()} of {count}")
            values = values.copy()
            offset = what.get("byteOffset", 0)
            values[rows] = self.array(what["bufferView"], offset, n, dtype, width)
        if accessor.get("normalized") and values.dtype.kind in "iu":
            return np.maximum(values / np.iinfo(values.dtype).max, -1.0)
        return values

    def material(self, index: int | None) -> int:
        """Return the reading's index of a material, and remember its texture coordinates."""
        if index not in self.material_index:
            source = {} if index is None else at(self.items("materials"), index, "material")
            extensions = source.get("extensions", {})
            old = extensions.get("KHR_materials_pbrSpecularGlossiness")
            if old is not None:
                factor, info = old.get("diffuseFactor", [1] * 4), old.get("diffuseTexture")
            else:
                pbr = source.get("pbrMetallicRoughness", {})
                factor, info = pbr.get("baseColorFactor", [1] * 4), pbr.get("baseColorTexture")
            r, g, b, a = np.clip(np.array(factor, float), 0, 1)
            texture = self.texture(info["index"]) if info else None
            mode = source.get("alphaMode", "OPAQUE")
            if mode == "OPAQUE":
                a = 1.0
            if texture is not None and mode != "BLEND":
                texture = texture.copy()
                cut = source.get("alphaCutoff", 0.5) * 255 if mode == "MASK" else -1
                texture[..., 3] = np.where(texture[..., 3] * a >= cut, 255, 0)
            r, g, b = (float(c) for c in linear_to_srgb(np.array([r, g, b])))
            material = Material((r, g, b, float(a)), texture) if index is not None else GREY
            self.material_index[index] = self.reading.material(material)
            if texture is not None:
                self.texture_settings[self.material_index[index]] = texture_transform(info)
        return self.material_index[index]

    def texture(self, index: int) -> np.ndarray | None:
        """Return the picture of a texture, or None with a warning."""
        texture = at(self.items("textures"), index, "texture")
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = texture.get("source", webp.get("source"))
        if source is None:
            names = list(texture.get("extensions", {}))
            self.reading.warn("unsupported_texture", f"texture {index} has only {names}")
            return None
        image = at(self.items("images"), source, "image")
        uri = image.get("uri")
        try:
            if uri is None:
                data, start, length, _ = self.view(image["bufferView"])
                return self.reading.texture(("image", source), data[start : start + length])
            if uri.startswith("data:"):
                return self.reading.texture(("image", source), data_uri(uri))
        except MeshRejectedError as error:
            self.reading.warn("broken_texture", f"image {source}: {error}")
            return None
        return self.reading.texture(uri)

    def primitive(self, primitive: dict, weights: list, node: dict) -> dict | None:
        """Return the arrays of a primitive's triangles in the mesh's frame, or None."""
        attributes = primitive["attributes"]
        if "POSITION" not in attributes:
            return None
        positions = self.accessor(attributes["POSITION"]).astype(np.float64)
        if "indices" in primitive:
            index = self.accessor(primitive["indices"])[:, 0].astype(np.int64)
        else:
            index = np.arange(len(positions))
        match primitive.get("mode", 4):
            case 4:
                faces = index[: len(index) // 3 * 3].reshape(-1, 3)
            case 5:
                faces = np.stack([index[:-2], index[1:-1], index[2:]], 1)
                faces[1::2] = faces[1::2, ::-1]
            case 6:
                faces = np.stack([np.full(len(index) - 2, index[0]), index[1:-1], index[2:]], 1)
            case _:
                self.reading.points += len(positions)
                return None
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            if weight and "POSITION" in target:
                positions = positions + weight * self.accessor(target["POSITION"])
        if "skin" in node and "JOINTS_0" in attributes:
            positions = self.skin(positions, attributes, node["skin"])
        material = self.material(primitive.get("material"))
        uv = None
        if material in self.texture_settings:
            which, matrix = self.texture_settings[material]
            if f"TEXCOORD_{which}" in attributes:
                uv = self.accessor(attributes[f"TEXCOORD_{which}"]).astype(np.float64)
                uv = uv @ matrix[:2, :2].T + matrix[:2, 2]
                uv[:, 1] = 1 - uv[:, 1]  # glTF counts v downwards
            else:
                self.reading.warn("broken_texture", "a texture, but no texture coordinates")
        colours = None
        if "COLOR_0" in attributes:
            raw = self.accessor(attributes["COLOR_0"])
            if raw.dtype.kind in "iu":
                raw = raw / np.iinfo(raw.dtype).max
            alpha = raw[:, 3:] if raw.shape[1] == 4 else np.ones((len(raw), 1))
            raw = np.concatenate([linear_to_srgb(np.clip(raw[:, :3], 0, 1)), alpha], 1)
            colours = (np.clip(np.nan_to_num(raw), 0, 1) * 255 + 0.5).astype(np.uint8)
        for values in (uv, colours):
            if values is not None and len(values) != len(positions):
                raise MeshRejectedError("malformed", "attributes of different lengths")
        return {
            "vertices": positions,
            "faces": faces,
            "material": material,
            "uv": uv,
            "colours": colours,
        }

    def skin(self, positions: np.ndarray, attributes: dict, index: int) -> np.ndarray:
        """Return vertices moved by their joints' rest pose (linear blend skinning)."""
        skin = at(self.items("skins"), index, "skin")
        joints = np.stack([at(self.globals, j, "joint") for j in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4)
            joints = joints @ inverse[: len(joints)].transpose(0, 2, 1)
        moved, total = np.zeros_like(positions), np.zeros(len(positions))
        ones = np.concatenate([positions, np.ones((len(positions), 1))], 1)
        for n in range(8):
            if f"JOINTS_{n}" not in attributes:
                break
            which = self.accessor(attributes[f"JOINTS_{n}"]).astype(np.int64)
            weights = self.accessor(attributes[f"WEIGHTS_{n}"]).astype(np.float64)
            if len(which) and which.max() >= len(joints):
                raise MeshRejectedError("index_out_of_range", f"joint {which.max()}")
            for k in range(4):
                moved += weights[:, k, None] * np.einsum(
                    "vij,vj->vi", joints[which[:, k], :3], ones
                )
                total += weights[:, k]
        held = total > 1e-6
        moved[held] /= total[held, None]
        return np.where(held[:, None], moved, positions)


def linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    """Return sRGB values of linear ones, both in [0, 1]."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def texture_transform(info: dict) -> tuple[int, np.ndarray]:
    """Return which texture coordinates a texture takes, and KHR_texture_transform's matrix."""
    settings = info.get("extensions", {}).get("KHR_texture_transform", {})
    (sx, sy), (tx, ty) = settings.get("scale", [1, 1]), settings.get("offset", [0, 0])
    angle = settings.get("rotation", 0)
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.array([[c * sx, s * sy, tx], [-s * sx, c * sy, ty], [0, 0, 1]], float)
    return settings.get("texCoord", info.get("texCoord", 0)), matrix


def check_graph(nodes: list) -> np.ndarray:
    """Return the parent [N] of each node, -1 for roots; rejects cycles and second parents."""
    edges = [(i, c) for i, node in enumerate(nodes) for c in node.get("children", [])]
    for _, child in edges:
        at(nodes, child, "node")
    waiting = np.zeros(len(nodes), np.int64)
    np.add.at(waiting, [c for _, c in edges], 1)
    parents_of = waiting.copy()
    ready = [i for i in range(len(nodes)) if waiting[i] == 0]
    done = 0
    while ready:
        done += 1
        for child in nodes[ready.pop()].get("children", []):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    if done < len(nodes):
        raise MeshRejectedError("cyclic_scene_graph", f"{len(nodes) - done} nodes hang on a cycle")
    if (parents_of > 1).any():
        shared = int((parents_of > 1).sum())
        raise MeshRejectedError("invalid_scene_graph", f"{shared} nodes have several parents")
    parents = np.full(len(nodes), -1)
    for parent, child in edges:
        parents[child] = parent
    return parents


def trs_matrix(translation: Any, rotation: Any, scale: Any) -> np.ndarray:
    """Return [..., 4, 4] of translations [..., 3], quaternions xyzw [..., 4], scales [..., 3]."""
    x, y, z, w = np.moveaxis(np.asarray(rotation, float), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix = np.zeros((*np.shape(x), 4, 4))
    turn = np.stack([np.stack(row, -1) for row in rows], -2)
    matrix[..., :3, :3] = turn * np.asarray(scale, float)[..., None, :]
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1
    return matrix


def local_matrix(node: dict) -> np.ndarray:
    """Return a node's transform [4, 4]; raises non_finite_transform."""
    if "matrix" in node:
        matrix = np.array(node["matrix"], float).reshape(4, 4).T
    else:
        matrix = trs_matrix(
            node.get("translation", [0, 0, 0]),
            node.get("rotation", [0, 0, 0, 1]),
            node.get("scale", [1, 1, 1]),
        )
    if not np.isfinite(matrix).all():
        raise MeshRejectedError("non_finite_transform", f"node {node.get('name', '')!r}")
    return matrix


def read_gltf(data: bytes, reading: Reading) -> None:
    """Read a .gltf or .glb: the default scene, y up, instances and rest pose applied."""
    gltf = Gltf(data, reading)
    gltf.check()
    nodes, scenes, parents = gltf.items("nodes"), gltf.items("scenes"), gltf.parents
    roots = [i for i in range(len(nodes)) if parents[i] < 0]
    if scenes:
        roots = at(scenes, gltf.document.get("scene", 0), "scene").get("nodes", [])
    gltf.globals = [local_matrix(node) for node in nodes]
    order = [i for i in range(len(nodes)) if parents[i] < 0]
    for i in order:  # grows while it is walked: every node after its parent
        children = nodes[i].get("children", [])
        for child in children:
            gltf.globals[child] = gltf.globals[i] @ gltf.globals[child]
        order.extend(children)
    shown = list(roots)
    for i in shown:
        shown.extend(at(nodes, i, "node").get("children", []))
    for i in shown:
        node = nodes[i]
        if "mesh" not in node:
            continue
        mesh = at(gltf.items("meshes"), node["mesh"], "mesh")
        # A skinned mesh is placed by its joints alone.
        place = np.eye(4) if "skin" in node else gltf.globals[i]
        copies = instances(gltf, node)
        weights = node.get("weights", mesh.get("weights", []))
        for primitive in mesh["primitives"]:
            arrays = gltf.primitive(primitive, weights, node)
            if arrays is not None:
                for copy in copies:
                    reading.add(**arrays, transform=place @ copy)


def instances(gltf: Gltf, node: dict) -> np.ndarray:
    """Return the transforms [K, 4, 4] of EXT_mesh_gpu_instancing, or one identity."""
    extension = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
    if extension is None:
        return np.eye(4)[None]
    values = {name: gltf.accessor(i) for name, i in extension["attributes"].items()}
    count = len(next(iter(values.values())))
    if count > gltf.reading.limits.instances:
        raise MeshRejectedError("resource_limit", f"{count} instances of one mesh")
    return trs_matrix(
        values.get("TRANSLATION", np.zeros((count, 3))),
        values.get("ROTATION", np.tile([0.0, 0, 0, 1], (count, 1))),
        values.get("SCALE", np.ones((count, 3))),
    )
