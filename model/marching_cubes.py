"""Marching cubes over blocks of 8^3 signed distances, never a dense grid.

Two paths, one result: compiled on the CPU (`model/marching_cubes_cpu.py`), plain torch elsewhere
(`model/marching_cubes_torch.py`).
"""

import torch
from torch import Tensor

from model.marching_cubes_cpu import surface_by_numba
from model.marching_cubes_torch import block_keys, surface_by_torch


def marching_cubes(blocks: Tensor, values: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the zero surface of a field known in blocks.

    blocks: [B, 3] int, block coordinates in [0, resolution / 8), unique, in any order.
    values: [B, 8, 8, 8] float, negative inside; only the place of the zero matters, not the scale.
    Only cells whose eight corners are all in given blocks are used; cells straddle block borders.

    Returns vertices [V, 3] float32 in [-1, 1] (samples at -1 + (2 i + 1) / resolution) and faces
    [F, 3] int32 whose normals point to the positive side. The surface is closed, and every edge
    has exactly two faces that run through it in opposite directions, wherever all cells that it
    crosses are known. No surface gives empty tensors.
    """
    blocks, values = blocks.to(values.device).long(), values.float()
    order = block_keys(blocks, resolution).argsort()
    blocks = blocks[order]
    if not torch.equal(order, torch.arange(len(order), device=values.device)):
        values = values[order]
    if values.device.type != "cpu":
        return surface_by_torch(blocks, values, resolution)
    vertices, faces = surface_by_numba(blocks.numpy(), values.detach().numpy(), resolution)
    return torch.from_numpy(vertices), torch.from_numpy(faces)
