"""The container of glTF 2.0, text and binary: JSON, buffers, accessors, held against the bytes."""

import base64
import binascii
import json
import struct
from typing import Any

import numpy as np

from tasks.mesh import MeshRejectedError
from tasks.mesh_parts import Reading, find_reference, reject_short

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


class GltfDocument:
    """A glTF document with its buffers, read when first used."""

    def __init__(self, data: bytes, reading: Reading):
        self.document, self.binary = split_gltf(data)
        self.reading = reading
        self.loaded: dict[int, bytes] = {}

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
