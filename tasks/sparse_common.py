"""What the two paths of the sparse engine share: limits and tolerances, in voxels, and the result.

The compiled path (`distance`, `sign`, `shell`, `sharp`) and the torch path (`torch_*`) import this
module, not each other, so that either runs where the libraries of the other are missing.
"""

from dataclasses import dataclass

import numpy as np

from model.sdf import SparseSDF

WELD = 2.0**-19  # vertices in the same cell of this size are one: a 500th of a voxel at 2048
# Parts whose bounding box has a shorter diagonal are not counted, in voxels.
PART_SIZE = 2.0
# Grid lines pass the mesh shifted by this, in voxels: models like to put faces, edges and planes
# of symmetry exactly where the samples are.
SHIFT = np.array([1.3e-5, 2.9e-5, 4.7e-5])

# Distances
BLOCK_RADIUS = 3.5 * 3**0.5  # from a block's centre to its farthest voxel centre
# A crossing so near to a voxel centre blocks the edges on both sides of it: rounding may not
# open a way through.
TIE = 1e-9

# Signs
# A place is wide when it holds a voxel farther than this from every triangle, in voxels.
CLEARANCE = 1.5
# Steps from a wide place within which a voxel belongs to it. Into the corner of three walls it
# takes five.
STEPS = 6
# Pockets of fewer voxels are crevices, and outside, without a question asked.
SMALL_POCKET = 32
SAMPLES = 4  # a pocket
# A pocket is inside from this winding number on: beside an open sheet it is one half.
SURE = 0.75
# Solid angles to compute at most, some 2 s on a core: past it the smaller pockets are not asked
# about.
SOLID_ANGLES = 100_000_000

# Shells
# Half the thickness of a shell. Over half a voxel, so that every grid edge across a sheet has an
# end in the shell; over sqrt(1/2), so that a wire has one too; under one: two voxels at most.
SHELL = 0.75
# Cosine from which two sides count as those of a plate: wedges up to 32 degrees.
PLATE = 0.85
# The share of a sheet's seen crossings that may have an inside behind them.
BACKED = 0.05

# Sharp edges
DIHEDRAL = np.deg2rad(30)
# Voxels with their centre this near to a sharp edge are sharp, in voxels.
SHARP_REACH = 1.0


@dataclass(frozen=True)
class SparseResult:
    """What the engine found.

    parts_in: connected parts of the mesh (sharing vertices) above PART_SIZE that are seen from
        outside; parts_out: those of them at the surface of the result.
    method, confidence: `flood`, or `flood+winding` with how far the winding numbers of the pockets
        lay from undecided (0: undecided, 1: certain); see `tasks/sign.py`.
    thin_voxels: voxels that no part encloses, added to make shells of thin surfaces.
    """

    sdf: SparseSDF
    parts_in: int
    parts_out: int
    method: str
    confidence: float
    thin_voxels: int
