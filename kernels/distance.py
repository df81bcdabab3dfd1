"""The closest of each block's triangles to each of its 8^3 voxels, exactly, in float64.

`closest_triangles` runs the Triton kernel on CUDA and its plain twin `closest_triangles_torch`
elsewhere. Both do the same operations in the same order, none of them fused, so that they also
choose the same one of two triangles that are equally far: neighbours that share an edge always are.
Lengths are in voxels; voxel i of a block at b is sampled at 8 b + i.

Floor: 74 operations in float64 a candidate and voxel; an H200 does 17 T unfused ones a second, so
a million candidate pairs take 2.2 ms. Bytes: 6 a voxel written, 0.15 ms a 100,000 blocks.
"""

# Triton functions have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tolerances import SLIVER

BLOCK = 8
RECORD = 20  # columns of a triangle's record, the last of them unused: rows of whole sectors
CHUNK = 256  # blocks at once, in the twin: what the caches hold


def triangle_records(corners: Tensor) -> Tensor:
    """Return what the distance to a triangle needs, [F, RECORD] float64.

    corners: [F, 3, 3] float64. Columns: the first corner; edges u, v from it; uu, uv, vv; inverse
    squared lengths of the three edges (0 for none); uu vv - uv uv, or -1 for a sliver; unit normal.
    """
    a, b, c = corners.unbind(1)
    ux, uy, uz = (b - a).unbind(1)
    vx, vy, vz = (c - a).unbind(1)
    uu = ux * ux + uy * uy + uz * uz
    uv = ux * vx + uy * vy + uz * vz
    vv = vx * vx + vy * vy + vz * vz
    ex, ey, ez = vx - ux, vy - uy, vz - uz
    ee = ex * ex + ey * ey + ez * ez
    area = uu * vv - uv * uv
    longest = torch.maximum(torch.maximum(uu, vv), ee)
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = (nx * nx + ny * ny + nz * nz).sqrt()
    fair = (area > SLIVER * longest * longest) & (length > 0)
    inverse = [torch.where(square > 0, 1 / square, 0.0) for square in (uu, vv, ee)]
    normal = [torch.where(fair, n / length, 0.0) for n in (nx, ny, nz)]
    area = torch.where(fair, area, -1.0)
    return torch.stack(
        [*a.unbind(1), ux, uy, uz, vx, vy, vz, uu, uv, vv, *inverse, area, *normal, area], 1
    )


def closest_triangles(
    records: Tensor, blocks: Tensor, starts: Tensor, triangles: Tensor, reach: float
) -> tuple[Tensor, Tensor]:
    """Return distances [B, 8, 8, 8] float32, at most reach, and nearest triangles, int32 or -1.

    records: [F, RECORD] of `triangle_records`; blocks: [B, 3] int64 (x, y, z); triangles: [P] int32
    and starts: [B + 1] int64, the candidates of block b at starts[b] to starts[b + 1]. Of equally
    near candidates the first counts.
    """
    if not records.is_cuda:
        return closest_triangles_torch(records, blocks, starts, triangles, reach)
    return closest_triangles_triton(records, blocks, starts, triangles, reach)


def closest_triangles_torch(
    records: Tensor, blocks: Tensor, starts: Tensor, triangles: Tensor, reach: float
) -> tuple[Tensor, Tensor]:
    """Return what `closest_triangles` does: candidate after candidate, for many blocks at once."""
    shape = (len(blocks), BLOCK, BLOCK, BLOCK)
    distance = torch.empty(shape, dtype=torch.float32, device=records.device)
    nearest = torch.empty(shape, dtype=torch.int32, device=records.device)
    order = (starts[1:] - starts[:-1]).argsort(descending=True)
    inner = torch.arange(BLOCK, device=records.device)
    for first in range(0, len(order), CHUNK):
        some = order[first : first + CHUNK]
        counts = starts[some + 1] - starts[some]
        at = (blocks[some, :, None] * BLOCK + inner).double()
        x, y, z = at[:, 0, :, None, None], at[:, 1, None, :, None], at[:, 2, None, None, :]
        best = torch.full((len(some), *shape[1:]), reach * reach, dtype=torch.float64)
        best = best.to(records.device)
        which = torch.full_like(best, -1, dtype=torch.int32)
        for place in range(int(counts[0])):
            n = int((counts > place).sum())  # those of the most candidates come first
            candidate = triangles[starts[some[:n]] + place]
            record = records[candidate.long()].T[:, :, None, None, None]
            found = _squared(x[:n], y[:n], z[:n], record)
            closer = found < best[:n]
            best[:n] = torch.where(closer, found, best[:n])
            which[:n] = torch.where(closer, candidate[:, None, None, None], which[:n])
        distance[some] = torch.where(which < 0, reach, best.sqrt()).float()
        nearest[some] = which
    return distance, nearest


def _squared(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """Return the squared distances of points to triangles by their records r [RECORD, ...]."""
    wx, wy, wz = x - r[0], y - r[1], z - r[2]
    ux, uy, uz, vx, vy, vz, uu, uv, vv = r[3:12]
    wu = wx * ux + wy * uy + wz * uz
    wv = wx * vx + wy * vy + wz * vz
    t = (wu * r[12]).clamp(0, 1)
    px, py, pz = wx - t * ux, wy - t * uy, wz - t * uz
    best = px * px + py * py + pz * pz
    t = (wv * r[13]).clamp(0, 1)
    px, py, pz = wx - t * vx, wy - t * vy, wz - t * vz
    best = torch.minimum(best, px * px + py * py + pz * pz)
    ex, ey, ez = vx - ux, vy - uy, vz - uz
    px, py, pz = wx - ux, wy - uy, wz - uz
    t = ((px * ex + py * ey + pz * ez) * r[14]).clamp(0, 1)
    px, py, pz = px - t * ex, py - t * ey, pz - t * ez
    best = torch.minimum(best, px * px + py * py + pz * pz)
    s = vv * wu - uv * wv
    q = uu * wv - uv * wu
    height = wx * r[16] + wy * r[17] + wz * r[18]
    return torch.where((s >= 0) & (q >= 0) & (s + q <= r[15]), height * height, best)


def closest_triangles_triton(
    records: Tensor, blocks: Tensor, starts: Tensor, triangles: Tensor, reach: float
) -> tuple[Tensor, Tensor]:
    """Return what `closest_triangles` does, by a program a block."""
    shape = (len(blocks), BLOCK, BLOCK, BLOCK)
    distance = torch.empty(shape, dtype=torch.float32, device=records.device)
    nearest = torch.empty(shape, dtype=torch.int32, device=records.device)
    if len(blocks):
        # A float argument would be float32: what is compared in float64 comes as a tensor.
        limits = torch.tensor([reach, reach * reach], dtype=torch.float64, device=records.device)
        _closest_triangles_kernel[(len(blocks),)](
            records.contiguous(), blocks.contiguous(), starts.contiguous(), triangles.contiguous(),
            limits, distance, nearest,
            RECORD=RECORD, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return distance, nearest


@triton.jit
def _unit(t):
    return tl.minimum(tl.maximum(t, 0.0), 1.0)


@triton.jit
def _closest_triangles_kernel(
    records, blocks, starts, triangles, limits,
    distance, nearest,
    RECORD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    voxel = tl.arange(0, 512)
    x = (tl.load(blocks + 3 * b) * 8 + voxel // 64).to(tl.float64)
    y = (tl.load(blocks + 3 * b + 1) * 8 + voxel // 8 % 8).to(tl.float64)
    z = (tl.load(blocks + 3 * b + 2) * 8 + voxel % 8).to(tl.float64)
    reach = tl.load(limits)
    best = tl.load(limits + 1 + voxel * 0)
    which = tl.full([512], -1, tl.int32)
    for place in range(tl.load(starts + b), tl.load(starts + b + 1)):
        triangle = tl.load(triangles + place)
        r = records + triangle.to(tl.int64) * RECORD
        wx, wy, wz = x - tl.load(r), y - tl.load(r + 1), z - tl.load(r + 2)
        ux, uy, uz = tl.load(r + 3), tl.load(r + 4), tl.load(r + 5)
        vx, vy, vz = tl.load(r + 6), tl.load(r + 7), tl.load(r + 8)
        uu, uv, vv = tl.load(r + 9), tl.load(r + 10), tl.load(r + 11)
        wu = wx * ux + wy * uy + wz * uz
        wv = wx * vx + wy * vy + wz * vz
        t = _unit(wu * tl.load(r + 12))
        px, py, pz = wx - t * ux, wy - t * uy, wz - t * uz
        found = px * px + py * py + pz * pz
        t = _unit(wv * tl.load(r + 13))
        px, py, pz = wx - t * vx, wy - t * vy, wz - t * vz
        found = tl.minimum(found, px * px + py * py + pz * pz)
        ex, ey, ez = vx - ux, vy - uy, vz - uz
        px, py, pz = wx - ux, wy - uy, wz - uz
        t = _unit((px * ex + py * ey + pz * ez) * tl.load(r + 14))
        px, py, pz = px - t * ex, py - t * ey, pz - t * ez
        found = tl.minimum(found, px * px + py * py + pz * pz)
        s = vv * wu - uv * wv
        q = uu * wv - uv * wu
        height = wx * tl.load(r + 16) + wy * tl.load(r + 17) + wz * tl.load(r + 18)
        above = (s >= 0.0) & (q >= 0.0) & (s + q <= tl.load(r + 15))
        found = tl.where(above, height * height, found)
        closer = found < best
        best = tl.where(closer, found, best)
        which = tl.where(closer, triangle, which)
    far = tl.where(which < 0, reach, tl.sqrt(best))
    tl.store(distance + b * 512 + voxel, far.to(tl.float32))
    tl.store(nearest + b * 512 + voxel, which)
