"""Reader of glTF 2.0, text and binary.

Nodes, skins and morph weights are evaluated at rest (animations are ignored); base colours and
their textures are read, other maps are not.
"""

from typing import Any

import numpy as np

from tasks.mesh import Material, MeshRejectedError
from tasks.mesh_gltf_document import GltfDocument, at, data_uri
from tasks.mesh_parts import GREY, Reading


class Gltf(GltfDocument):
    """A glTF document with its materials, made when first used."""

    def __init__(self, data: bytes, reading: Reading):
        super().__init__(data, reading)
        self.material_index: dict[object, int] = {}
        self.texture_settings: dict[int, tuple[int, np.ndarray]] = {}
        self.cut_textures: dict[tuple[int, float], np.ndarray] = {}
        self.globals: list[np.ndarray] = []  # [4, 4] of each node, once the scene is walked

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
                cut = source.get("alphaCutoff", 0.5) / max(a, 1e-6) if mode == "MASK" else 0.0
                texture = self.hard_alpha(info["index"], texture, float(cut))
            r, g, b = (float(c) for c in linear_to_srgb(np.array([r, g, b])))
            material = Material((r, g, b, float(a)), texture) if index is not None else GREY
            self.material_index[index] = self.reading.material(material)
            if texture is not None:
                self.texture_settings[self.material_index[index]] = texture_transform(info)
        return self.material_index[index]

    def hard_alpha(self, index: int, texture: np.ndarray, cut: float) -> np.ndarray:
        """Return a texture that is opaque where alpha >= cut and clear elsewhere, made once."""
        if (index, cut) not in self.cut_textures:
            alpha = np.where(texture[..., 3] >= cut * 255, 255, 0).astype(np.uint8)
            if not np.array_equal(alpha, texture[..., 3]):
                texture = np.concatenate([texture[..., :3], alpha[..., None]], 2)
            self.cut_textures[index, cut] = texture
        return self.cut_textures[index, cut]

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
