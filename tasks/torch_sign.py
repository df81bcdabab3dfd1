"""Which voxels are outside, on any device: the torch twin of `tasks/sign.py`, which says how.

A flood is a component: rooms (the components in each block) and the regions of blocks that are not
there are the nodes of a graph, whose components are found in a few passes. Sets are [B, 8, 8, 8].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from kernels.components import NO_LABEL, block_labels, graph_components
from kernels.winding import winding_numbers
from model.sdf import BLOCK
from tasks.sparse_common import CLEARANCE, SAMPLES, SMALL_POCKET, SOLID_ANGLES, STEPS, SURE
from tasks.torch_masks import Grid, ids_of, shifted

CHUNK_BLOCKS = 2**14  # where each voxel needs an index of eight bytes


@dataclass(frozen=True)
class Space:
    """What floods go through.

    walls: [3, B, 8, 8, 8], the edges from a voxel to +axis that are closed. sides: for each side
    of a block (-x, +x, -y, ...) the rows of the blocks that touch a far region there, and which.
    region_count: far regions are the components of the blocks that are not there.
    """

    grid: Grid
    walls: Tensor
    sides: tuple[tuple[Tensor, Tensor], ...]
    region_count: int


def _space_of(grid: Grid, walls: Tensor) -> tuple[Space, Tensor]:
    """Return the space and which far regions [regions] bool touch the border of the grid."""
    device = grid.rows.device
    regions, count = ndimage.label((grid.rows < 0).cpu().numpy())
    ends = [np.take(regions, end, axis).reshape(-1) for axis in range(3) for end in (0, -1)]
    far = np.zeros(count + 1, bool)
    far[np.unique(np.concatenate(ends))] = True
    regions = torch.from_numpy(regions).to(device)
    side = len(grid.rows)
    sides = []
    for face in range(6):
        place = grid.blocks.clone()
        place[:, face >> 1] += 2 * (face & 1) - 1
        within = (place[:, face >> 1] >= 0) & (place[:, face >> 1] < side)
        rows = (within & (grid.neighbours[:, face] < 0)).nonzero().view(-1)
        x, y, z = place[rows].unbind(1)
        sides.append((rows, regions[x, y, z].long() - 1))
    return Space(grid, walls, tuple(sides), count), torch.from_numpy(far[1:]).to(device)


def _face(masks: Tensor, side: int) -> Tensor:
    """Return the view [B, 8, 8] of the voxels on a side of each block."""
    return masks.select((side >> 1) + 1, (BLOCK - 1) * (side & 1))


def _step(space: Space, far: Tensor, allowed: Tensor, frontier: Tensor) -> Tensor:
    """Return the allowed voxels one step from the frontier; far regions reached are set, in place.

    A far region that is not set yet is crossed in the same step.
    """
    reached = torch.zeros_like(frontier)
    neighbours = space.grid.neighbours
    for axis in range(3):
        open_ = ~space.walls[axis]
        reached |= shifted(frontier & open_, neighbours, axis, False, absent=False)
        reached |= shifted(frontier, neighbours, axis, True, absent=False) & open_
    entered = torch.zeros_like(far)
    for side, (rows, regions) in enumerate(space.sides):
        entered[regions[_face(frontier, side)[rows].flatten(1).any(1)]] = True
    entered &= ~far
    far |= entered
    for side, (rows, regions) in enumerate(space.sides):
        _face(reached, side)[rows] |= entered[regions][:, None, None]
    return reached & allowed


@dataclass(frozen=True)
class Rooms:
    """The components of a set of voxels.

    labels: [B, 8, 8, 8] of `block_labels`; roots [K] int64: the ids of the voxels that name rooms,
    ascending; component: [K + regions] int64, a number for each room, then each far region.
    """

    labels: Tensor
    roots: Tensor
    component: Tensor

    def rooms_of(self, ids: Tensor) -> Tensor:
        """Return the components [N] of voxels of the set, by id."""
        root = (ids >> 9 << 9) + self.labels.view(-1)[ids]
        return self.component[torch.searchsorted(self.roots, root)]

    def voxels(self, chosen: Tensor) -> Tensor:
        """Return the voxels of the components for which chosen [K + regions] bool is set."""
        found = torch.zeros(self.labels.shape, dtype=torch.bool, device=chosen.device).flatten(1)
        found.view(-1)[self.roots] = chosen[self.component[: len(self.roots)]]
        for first in range(0, len(found), CHUNK_BLOCKS):
            labels = self.labels[first : first + CHUNK_BLOCKS].flatten(1)
            part = found[first : first + CHUNK_BLOCKS]
            held = part.gather(1, labels.clamp_max(NO_LABEL - 1).long())
            part.copy_(held & (labels < NO_LABEL))
        return found.view(self.labels.shape)


def _rooms_of(space: Space, allowed: Tensor, passable: Tensor) -> Rooms:
    """Return the components of what is allowed, joined across those far regions passable."""
    labels = block_labels(allowed, space.walls)
    place = torch.arange(512, dtype=torch.int16, device=allowed.device).view(8, 8, 8)
    roots = ids_of(labels == place)
    links = [*_links_between(space, labels), *_links_to_regions(space, labels, passable)]
    ends = []
    for one, two in links:
        a = torch.searchsorted(roots, one)
        # Far regions come as -1 - region.
        b = torch.where(two < 0, len(roots) - 1 - two, torch.searchsorted(roots, two))
        ends.append((a, b))
    a, b = (torch.cat(found) for found in zip(*ends, strict=True))
    return Rooms(labels, roots, graph_components(a, b, len(roots) + space.region_count))


def _links_between(space: Space, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the roots of rooms that are joined across the sides of blocks, by axis."""
    for axis in range(3):
        other = space.grid.neighbours[:, 2 * axis + 1]
        rows = (other >= 0).nonzero().view(-1)
        beyond = other[rows]
        one, two = _face(labels, 2 * axis + 1)[rows], _face(labels, 2 * axis)[beyond]
        joined = (one < NO_LABEL) & (two < NO_LABEL)
        joined &= ~_face(space.walls[axis], 2 * axis + 1)[rows]
        one, two = rows[:, None] * 512 + one.flatten(1), beyond[:, None] * 512 + two.flatten(1)
        yield _first_of_runs(joined.flatten(1), one, two)


def _links_to_regions(
    space: Space, labels: Tensor, passable: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the roots of rooms beside far regions, and -1 - region, by side."""
    for side, (rows, regions) in enumerate(space.sides):
        open_ = passable[regions]
        rows, regions = rows[open_], regions[open_]
        label = _face(labels, side)[rows].flatten(1)
        region = (-1 - regions)[:, None].expand(-1, 64)
        yield _first_of_runs(label < NO_LABEL, rows[:, None] * 512 + label, region)


def _first_of_runs(used: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs that are used, all [N, 64], less those equal to the one before them."""
    fresh = used.clone()
    same = (one[:, 1:] == one[:, :-1]) & (two[:, 1:] == two[:, :-1]) & used[:, :-1]
    fresh[:, 1:] &= ~same
    return one[fresh], two[fresh]


def outside_voxels(
    columns: Tensor, grid: Grid, distance: Tensor, walls: Tensor, patches: Tensor, turns: Tensor
) -> tuple[Tensor, float | None]:
    """Return which voxels are outside, and how sure the winding numbers were: as `tasks/sign.py`.

    columns: [9, F] triangles in voxels; distance: [B, 8, 8, 8]; walls: [3, B, 8, 8, 8], the edges
    that triangles cross; patches [F] int64, turns [F] float64.
    """
    space, far = _space_of(grid, walls)
    clear = distance >= CLEARANCE
    wide = border_voxels(grid)
    for side, (rows, regions) in enumerate(space.sides):
        seen = rows[far[regions]]
        _face(wide, side)[seen] |= _face(clear, side)[seen]
    rooms = _rooms_of(space, clear | wide, torch.ones_like(far))
    flooded = torch.zeros_like(rooms.component, dtype=torch.bool)
    flooded[rooms.rooms_of(ids_of(wide))] = True
    of_regions = rooms.component[len(rooms.roots) :]
    flooded[of_regions[far]] = True
    wide = rooms.voxels(flooded)
    far = flooded[of_regions]
    del rooms
    far_wide = far.clone()
    levels, unreached = [wide], ~wide
    for _ in range(STEPS):
        levels.append(_step(space, far, unreached, levels[-1]))
        unreached &= ~levels[-1]
    entries = _step(space, far.clone(), unreached, levels[-1])
    if not bool(entries.any()):
        return ~unreached, None
    pockets = _pockets_of(space, far, unreached, entries, distance)
    far |= pockets.far
    outside = ~unreached
    outside.view(-1)[pockets.ids] = True
    sizes = pockets.sizes.cpu().numpy()
    asked = np.flatnonzero(sizes >= SMALL_POCKET)
    asked = asked[np.argsort(-sizes[asked], kind="stable")]
    asked = asked[: max(4, SOLID_ANGLES // (SAMPLES * columns.shape[1]))]
    if not len(asked):
        return outside, None
    surface = (columns, patches, turns)
    samples = pockets.samples[torch.from_numpy(asked).to(far.device)]
    evidence = _evidence(*surface, grid, samples.view(-1)).cpu().numpy()
    score = np.median(evidence.reshape(-1, SAMPLES), 1)
    margin = np.abs(score - SURE) / np.where(score < SURE, SURE, 1 - SURE)
    confidence = float(np.average(margin, weights=sizes[asked]))
    is_inside = torch.zeros(len(sizes), dtype=torch.bool, device=far.device)
    is_inside[torch.from_numpy(asked[score >= SURE]).to(far.device)] = True
    inside = torch.zeros_like(outside)
    inside.view(-1)[pockets.ids[is_inside[pockets.pocket]]] = True
    inside = _settle_between(space, far & ~far_wide, levels[1:], surface, inside)
    return outside & ~inside, confidence


@dataclass(frozen=True)
class _Pockets:
    """Voxels [N] by id, ascending in each pocket; the pocket of each [N]; of pockets: sizes [P]
    and samples [P, SAMPLES] by id; far [regions]: the far regions in pockets.
    """

    ids: Tensor
    pocket: Tensor
    sizes: Tensor
    samples: Tensor
    far: Tensor


def _pockets_of(
    space: Space, far: Tensor, allowed: Tensor, entries: Tensor, distance: Tensor
) -> _Pockets:
    """Return the components of what is allowed that hold entries, in the order of these.

    Samples: the voxel farthest from the mesh, the first of them by id; and those at equal steps
    through the pocket's ids.
    """
    rooms = _rooms_of(space, allowed, ~far)
    first_entry = torch.full_like(rooms.component, 2**62)
    entry = ids_of(entries)
    first_entry.scatter_reduce_(0, rooms.rooms_of(entry), entry, "amin")
    held = first_entry < 2**62
    order = held.nonzero().view(-1)
    order = order[first_entry[order].argsort()]
    number = torch.zeros_like(first_entry)
    number[order] = torch.arange(len(order), device=far.device)
    ids = ids_of(rooms.voxels(held))
    pocket, by_pocket = number[rooms.rooms_of(ids)].sort(stable=True)
    ids = ids[by_pocket]
    sizes = torch.bincount(pocket, minlength=len(order))
    away = distance.view(-1)[ids]
    farthest = away.new_full((len(order),), -1).scatter_reduce_(0, pocket, away, "amax")
    best = ids[away == farthest[pocket]]
    samples = ids.new_full((len(order), SAMPLES), 2**62)
    samples[:, 0].scatter_reduce_(0, pocket[away == farthest[pocket]], best, "amin")
    starts = sizes.cumsum(0) - sizes
    for k in range(1, SAMPLES):
        samples[:, k] = ids[starts + sizes * k // SAMPLES]
    return _Pockets(ids, pocket, sizes, samples, held[rooms.component[len(rooms.roots) :]])


def _settle_between(
    space: Space,
    far: Tensor,
    levels: list[Tensor],
    surface: tuple[Tensor, Tensor, Tensor],
    inside: Tensor,
) -> Tensor:
    """Return the inside pockets with their share of the steps towards wide places.

    levels: what lies 1, 2, ... STEPS steps from a wide place; far: [regions] bool, those reached
    by these steps.
    """
    closed = ~far
    between = reduce(torch.logical_or, levels)
    contested, frontier = torch.zeros_like(inside), inside
    for _ in range(STEPS):
        frontier = _step(space, closed, between & ~contested, frontier)
        contested |= frontier
    ids = ids_of(contested)
    if len(ids) * surface[0].shape[1] <= SOLID_ANGLES:
        inside = inside.clone()
        inside.view(-1)[ids[_evidence(*surface, space.grid, ids) >= 0.5]] = True
        return inside
    frontier, closed = inside, ~far
    for step in range(1, STEPS):  # who is nearer has it
        allowed = reduce(torch.logical_or, levels[step:]) & ~inside
        frontier = _step(space, closed, allowed, frontier)
        inside = inside | frontier
    return inside


def _evidence(columns: Tensor, patches: Tensor, turns: Tensor, grid: Grid, ids: Tensor) -> Tensor:
    """Return how much speaks for voxels [S], by id, to be inside, in [0, 1]: one half decides."""
    points = torch.stack(grid.places(ids), 1).double()
    total, strongest = winding_numbers(columns, patches, turns, points)
    together = torch.where(total.round() == 0, 0, 1 - 4 * (total - total.round()).abs())
    return torch.maximum(together, strongest).clamp(0, 1)


def border_voxels(grid: Grid) -> Tensor:
    """Return the voxels on the border of the grid: always outside."""
    shape = (len(grid.blocks), BLOCK, BLOCK, BLOCK)
    border = torch.zeros(shape, dtype=torch.bool, device=grid.blocks.device)
    for side in range(6):
        end = (len(grid.rows) - 1) * (side & 1)
        _face(border, side)[grid.blocks[:, side >> 1] == end] = True
    return border
