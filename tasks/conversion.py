"""Conversion: a normalised mesh to a `SparseSDF` and a report, by one of two engines."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from model.marching_cubes import marching_cubes
from model.sdf import SparseSDF
from tasks.mesh import MeshRejectedError
from tasks.mesh2sdf_engine import dense_field
from tasks.sparse_engine import sparse_field

# Part of a catalogue row's recipe: raise it when a conversion's result changes.
CONVERSION_VERSION = "0"


@dataclass(frozen=True)
class Conversion:
    """What conversion made of a mesh, and how sure it is."""

    sdf: SparseSDF
    parts_in: int
    parts_out: int
    closed: bool
    sign_method: str
    sign_confidence: float
    warnings: tuple[str, ...] = ()


def convert(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int,
    engine: Literal["sparse", "mesh2sdf"] = "sparse",
) -> Conversion:
    """Return the conversion of normalised triangles at a resolution."""
    if engine == "mesh2sdf":
        sdf = dense_field(vertices, faces, resolution)
        parts_in = parts_out = 1
        method, confidence = "mesh2sdf", 1.0
    else:
        result = sparse_field(vertices, faces, resolution)
        sdf, parts_in, parts_out = result.sdf, result.parts_in, result.parts_out
        method, confidence = result.method, result.confidence
    surface, triangles = marching_cubes(
        torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values), resolution
    )
    if not len(triangles):
        raise MeshRejectedError("no_surface", f"no surface at resolution {resolution}")
    closed = _closed(triangles, len(surface))
    return Conversion(sdf, parts_in, parts_out, closed, method, confidence)


def _closed(faces: torch.Tensor, vertex_count: int) -> bool:
    ahead = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    keys = (ahead[:, 0] * vertex_count + ahead[:, 1]).sort().values
    return bool((keys[1:] != keys[:-1]).all()) and torch.equal(
        keys, (ahead[:, 1] * vertex_count + ahead[:, 0]).sort().values
    )
