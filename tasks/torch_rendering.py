"""Condition views on any device: the torch twin of the rasteriser in `tasks/rendering.py`.

The same arithmetic in float64, as operations on whole arrays: faces are cut into rows, rows into
samples, and the nearest face of each sample is the largest of packed depths and face numbers, so
that the order of writing does not matter. Its pictures are those of the compiled path.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tasks.rendering import AMBIENT, HEADLIGHT, LIGHTS, NEAR, SAMPLES, SHEEN, Camera, Paint

CHUNK = 1 << 22  # samples worked on at once, some 80 bytes each
_LAST_FACE = 2**31 - 1


def draw_views(
    vertices: np.ndarray,
    faces: np.ndarray,
    cameras: list[Camera],
    size: int,
    paint: Paint,
    device: str | torch.device,
) -> list[np.ndarray]:
    """Return the lit picture [size, size, 4] uint8, straight alpha, that each camera takes.

    vertices: [V, 3] float64; faces: [F, 3] int64.
    """
    points, triangles = (torch.from_numpy(part).to(device) for part in (vertices, faces))
    brush = _Brush(paint, triangles)
    # Small meshes are drawn from many cameras at once: a GPU waits for launches otherwise.
    together = max(1, CHUNK // max(len(faces), len(vertices), (size * SAMPLES) ** 2 // 4))
    images = []
    for first in range(0, len(cameras), together):
        part = cameras[first : first + together]
        poses = torch.from_numpy(np.stack([camera.camera_to_world for camera in part])).to(points)
        half = np.array([[[np.tan(camera.fov / 2)]] for camera in part])
        offset = points - poses[:, None, :3, 3]
        local = offset[..., :1] * poses[:, None, 0, :3] + offset[..., 1:2] * poses[:, None, 1, :3]
        local += offset[..., 2:] * poses[:, None, 2, :3]
        depth = -local[..., 2:]
        safe = torch.where(depth > NEAR, depth, torch.nan) * torch.from_numpy(half).to(points)
        flip = torch.tensor([1.0, -1.0], dtype=torch.float64, device=points.device)
        pixels = (local[..., :2] / safe * flip + 1) * (size * SAMPLES / 2)
        seen = nearest_faces(pixels, depth[..., 0], triangles, size * SAMPLES)
        images += list(brush.shade(seen, pixels, local).cpu().numpy())
    return images


def nearest_faces(pixels: Tensor, depth: Tensor, faces: Tensor, side: int) -> Tensor:
    """Return the nearest face at each sample's centre, [K, side, side] int64, -1 where none.

    pixels: [K, V, 2] float64, in samples, by each of K cameras; depth: [K, V] float64; faces:
    [F, 3] int64. Faces that reach behind the near plane are left out.
    """
    views, count = len(pixels), len(faces)
    first = torch.arange(0, depth.numel(), depth.shape[1], device=faces.device)
    faces = (first[:, None, None] + faces).reshape(-1, 3)
    pixels, depth = pixels.reshape(-1, 2), depth.reshape(-1)
    corners, depths = pixels[faces], depth[faces]  # [F, 3, 2], [F, 3]
    (ax, ay), (bx, by), (cx, cy) = (corners[:, k].unbind(1) for k in range(3))
    top = (corners[..., 1].amin(1) - 0.5).ceil().clamp_min(0)
    bottom = (corners[..., 1].amax(1) - 0.5).floor().clamp_max(side - 1)
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    drawn = (depths > NEAR).all(1) & (top <= bottom) & (area != 0)
    ia, ib, ic = (1 / depths).unbind(1)
    slope_x = ((ib - ia) * (cy - ay) - (ic - ia) * (by - ay)) / area
    slope_y = ((ic - ia) * (bx - ax) - (ib - ia) * (cx - ax)) / area

    height = torch.where(drawn, bottom - top + 1, 0).long()
    nearest = torch.zeros(views * side * side, dtype=torch.int64, device=faces.device)
    for face, within in _pieces(height):
        y = top[face] + within + 0.5
        low = torch.full_like(y, torch.inf)
        high = -low
        for x0, y0, x1, y1 in ((ax, ay, bx, by), (bx, by, cx, cy), (cx, cy, ax, ay)):
            x0, y0, x1, y1 = (part[face] for part in (x0, y0, x1, y1))
            down = y0 > y1  # the same arithmetic for both faces of an edge: no cracks
            x0, x1 = torch.where(down, x1, x0), torch.where(down, x0, x1)
            y0, y1 = torch.where(down, y1, y0), torch.where(down, y0, y1)
            crossing = x0 + (x1 - x0) * ((y - y0) / (y1 - y0))
            flat = y0 == y1
            left = torch.where(flat, torch.minimum(x0, x1), crossing)
            right = torch.where(flat, torch.maximum(x0, x1), crossing)
            crossed = (y0 <= y) & (y <= y1)
            low = torch.where(crossed, torch.minimum(low, left), low)
            high = torch.where(crossed, torch.maximum(high, right), high)
        first = (low - 0.5).clamp_min(0).ceil()
        last = (high - 0.5).clamp_max(side - 1).floor()
        at_row = ia[face] + (y - ay[face]) * slope_y[face]
        width = torch.where(low <= high, last - first + 1, 0).clamp_min(0).long()
        for row, step in _pieces(width):
            number = face[row]
            column = first[row] + step
            inverse = at_row[row] + (column + 0.5 - ax[number]) * slope_x[number]
            inverse = torch.where(inverse > 0, inverse, 0).float()
            # Bits of a positive number grow as it does; of two faces as near, the first wins.
            packed = (inverse.view(torch.int32).long() << 32) | (_LAST_FACE - number % count)
            packed = torch.where(inverse > 0, packed, 0)
            line = number // count * side + (y[row] - 0.5).long()
            at = line * side + column.long()
            nearest.scatter_reduce_(0, at, packed, "amax")
    seen = _LAST_FACE - (nearest & 0xFFFFFFFF)
    return torch.where(nearest > 0, seen, -1).view(views, side, side)


def _pieces(counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Lay out `counts` [N] items of each of N owners, in runs of owners of some CHUNK items.

    Yields of each run the owner [M] and the place within the owner [M] of its items.
    """
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    marks = CHUNK * torch.arange(1, max(1, -(-total // CHUNK)), device=counts.device)
    cuts = [0, *torch.searchsorted(ends, marks).tolist(), len(counts)]
    for first, last in pairwise(cuts):
        if first == last:
            continue
        owner = torch.repeat_interleave(counts[first:last])
        within = torch.arange(len(owner), device=counts.device)
        within -= (ends[first:last] - counts[first:last] - (ends[first] - counts[first]))[owner]
        yield owner + first, within


class _Brush:
    """A mesh's paint and faces on a device."""

    def __init__(self, paint: Paint, faces: Tensor) -> None:
        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(faces.device)

        self.faces = faces
        self.colours = there(paint.colours).double()
        self.face_material = there(paint.face_material).long()
        self.vertex_colours = there(paint.vertex_colours)
        self.uv = there(paint.uv)
        self.texels = there(paint.texels)
        self.textures = there(paint.textures)
        self.textured = bool((paint.textures[:, 0] >= 0).any())

    def shade(self, seen: Tensor, pixels: Tensor, local: Tensor) -> Tensor:
        """Return [K, size, size, 4] uint8: colour times light, averaged over covered samples.

        seen: [K, s * size, s * size] int64; pixels: [K, V, 2], in samples; local: [K, V, 3], in the
        cameras' frames.
        """
        side, vertices = seen.shape[1], pixels.shape[1]
        covered = seen >= 0
        light = torch.zeros(seen.numel(), 3, dtype=torch.float64, device=seen.device)
        at = covered.view(-1).nonzero().view(-1)
        pixels, local = pixels.reshape(-1, 2), local.reshape(-1, 3)
        for part in at.split(CHUNK // 4):
            face = seen.view(-1)[part]
            corners = self.faces[face]
            placed = corners + (part // side**2 * vertices)[:, None]
            weight = _weights(pixels[placed], local[placed, 2], part % side**2, side)
            colour = self._colour(face, corners, weight)
            light[part] = _light(local[placed])[:, None] * (SHEEN + (1 - SHEEN) * colour)
        # Samples of a pixel one after another, as the compiled path adds them.
        samples = [(i, j) for i in range(SAMPLES) for j in range(SAMPLES)]
        light = light.view(-1, side, side, 3)
        total = sum(light[:, i::SAMPLES, j::SAMPLES] for i, j in samples)
        count = sum(covered[:, i::SAMPLES, j::SAMPLES].double() for i, j in samples)
        assert isinstance(total, Tensor)
        assert isinstance(count, Tensor)
        # Straight alpha: the mean is over covered samples only.
        rgb = (total / count.clamp_min(1)[..., None]).clamp(0, 1)
        rgba = torch.cat([rgb, (count / SAMPLES**2)[..., None]], -1)
        return (rgba * 255 + 0.5).to(torch.uint8)

    def _colour(self, face: Tensor, corners: Tensor, weight: Tensor) -> Tensor:
        """Return colours [n, 3] float64 of samples by their faces [n] and corners [n, 3]."""
        material = self.face_material[face]
        colour = self.colours[material]
        scale = 1 / ((weight[:, 0] + weight[:, 1]) + weight[:, 2])
        if len(self.vertex_colours) > 1:
            tint = self.vertex_colours[corners]
            colour = colour * (_mixed(weight, tint) * scale[:, None])
        if self.textured:
            offset, height, width = self.textures[material].unbind(1)
            has = offset >= 0
            uv = _mixed(weight * scale[:, None], self.uv[corners])
            texel = self._texel(uv, offset.clamp_min(0), height.clamp_min(1), width.clamp_min(1))
            # A tensor, since CUDA divides by a number by multiplying with its inverse.
            white = torch.full_like(texel, 255)
            colour = torch.where(has[:, None], colour * (texel / white), colour)
        return colour

    def _texel(self, uv: Tensor, offset: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Return the bilinear texel [n, 3] at uv [n, 2] of repeating textures."""
        u, v = uv.unbind(1)
        x, y = (u - u.floor()) * width - 0.5, (v.ceil() - v) * height - 0.5
        left, upper = x.floor(), y.floor()
        right_share, lower_share = x - left, y - upper
        texel = torch.zeros(len(uv), 3, dtype=torch.float64, device=uv.device)
        for corner in range(4):
            dx, dy = corner % 2, corner // 2
            share = right_share if dx else 1 - right_share
            share = share * (lower_share if dy else 1 - lower_share)
            row, column = (upper.long() + dy) % height, (left.long() + dx) % width
            texel += share[:, None] * self.texels[offset + row * width + column]
        return texel


def _mixed(weight: Tensor, values: Tensor) -> Tensor:
    """Return the weighted sums [n, K] of values [n, 3, K], added corner by corner."""
    first = weight[:, :1] * values[:, 0] + weight[:, 1:2] * values[:, 1]
    return first + weight[:, 2:] * values[:, 2]


def _weights(corners: Tensor, z: Tensor, at: Tensor, side: int) -> Tensor:
    """Return perspective-correct weights [n, 3] of samples `at` [n], not scaled to one.

    corners: [n, 3, 2], in samples; z: [n, 3], in the camera's frame.
    """
    centre = torch.stack([at % side, at // side], 1).double() + 0.5
    (ax, ay), (bx, by), (cx, cy) = ((corners[:, k] - centre).unbind(1) for k in range(3))
    # Areas opposite each corner over its depth.
    areas = torch.stack([bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx], 1)
    weight = areas / z
    total = (weight[:, 0] + weight[:, 1]) + weight[:, 2]
    # A sliver that rounding leaves no area: its first corner's colour.
    first = torch.where(total == 0, 1.0, weight[:, 0])
    rest = torch.where((total == 0)[:, None], 0.0, weight[:, 1:])
    return torch.cat([first[:, None], rest], 1)


def _light(corners: Tensor) -> Tensor:
    """Return the light in (0, 1] on faces with corners [n, 3, 3] in the camera's frame."""
    a, b, c = corners.unbind(1)
    p, q = b - a, c - a
    x = p[:, 1] * q[:, 2] - p[:, 2] * q[:, 1]
    y = p[:, 2] * q[:, 0] - p[:, 0] * q[:, 2]
    z = p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]
    length = (x * x + y * y + z * z).sqrt()
    away = x * a[:, 0] + y * a[:, 1] + z * a[:, 2] > 0
    length = torch.where(away, -length, length)
    total = AMBIENT + HEADLIGHT * (z / length).clamp_min(0)
    for lx, ly, lz in LIGHTS.tolist():
        total += ((x * lx + y * ly + z * lz) / length).clamp_min(0)
    return torch.where(length == 0, 1.0, total.clamp_max(1))
