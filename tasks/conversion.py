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
    field = {"sparse": sparse_field, "mesh2sdf": dense_field}[engine]
    blocks, values, sharp = field(
        np.asarray(vertices, np.float64), np.asarray(faces, np.int64), resolution
    )
    sdf = SparseSDF(resolution, blocks, values, sharp)
    surface, triangles = marching_cubes(
        torch.from_numpy(blocks), torch.from_numpy(values), resolution
    )
    if not len(triangles):
        raise MeshRejectedError("no_surface", f"no surface at resolution {resolution}")
    return Conversion(sdf, 1, 1, _closed(triangles, len(surface)), "winding", 1.0)


def _closed(faces: torch.Tensor, vertex_count: int) -> bool:
    ahead = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    keys = (ahead[:, 0] * vertex_count + ahead[:, 1]).sort().values
    return bool((keys[1:] != keys[:-1]).all()) and torch.equal(
        keys, (ahead[:, 1] * vertex_count + ahead[:, 0]).sort().values
    )
