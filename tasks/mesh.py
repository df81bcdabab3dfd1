"""A triangle mesh with what rendering needs, free of any library's own scene classes."""

from dataclasses import dataclass, field

import numpy as np

from model.sdf import SHAPE_SCALE


class MeshRejectedError(ValueError):
    """A mesh that cannot become training data; a value of the catalogue, never a crash.

    reason: a code of the catalogue, such as `no_geometry` or `truncated`.
    detail: what was found, what was expected, and the remedy.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Material:
    """Base colour of a set of faces.

    colour: RGBA in [0, 1], sRGB; multiplies the texture.
    texture: [H, W, 4] uint8 sRGB, row 0 at the top (v = 1), or None.
    """

    colour: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    texture: np.ndarray | None = None


@dataclass(frozen=True)
class Mesh:
    """Triangles of one asset, all parts together, scene transforms applied.

    vertices: [V, 3] float64, finite. faces: [F, 3] int64, indices into vertices.
    uv: [V, 2] float32 with v up, textures repeat outside [0, 1], or None.
    vertex_colours: [V, 4] uint8 sRGB, multiply the material's colour, or None.
    materials and face_material ([F] int32): the material of each face.
    warnings: codes with detail of what was odd, `code: detail`.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray | None = None
    vertex_colours: np.ndarray | None = None
    materials: tuple[Material, ...] = (Material(),)
    face_material: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    warnings: tuple[str, ...] = ()


def normalise(vertices: np.ndarray) -> np.ndarray:
    """Centre vertices [V, 3] and scale them so that the longest side spans 0.95 of [-1, 1].

    Raises MeshRejectedError (`no_area`) when the bounding box is a point.
    """
    low, high = vertices.min(0), vertices.max(0)
    extent = float((high - low).max())
    if not extent > 0:
        raise MeshRejectedError("no_area", f"all vertices coincide at {low.tolist()}")
    return (vertices - low - (high - low) / 2) * (2 * SHAPE_SCALE / extent)
