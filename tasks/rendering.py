"""Pictures of meshes by a small software rasteriser: condition views, grey renders, face images.

numba and not VTK: VTK's wheel loads libEGL and Mesa from the system, segfaults on a machine that
has none, and its LLVM kills a process that imports triton afterwards. This needs no display and no
driver.

Frame: meshes in [-1, 1]^3, +y up. Cameras are OpenGL: they look down -z, +y is up in the image.
Azimuth turns about +y from +x towards +z, so that 90 degrees looks at the front of a glTF asset.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from model.compiled import compiled
from model.sdf import SHAPE_SCALE
from tasks.mesh import Mesh

SENSOR_MM = 36.0
FOCAL_MM = (30.0, 100.0)  # the paper's ranges of its condition views
ELEVATION_DEG = (10.0, 40.0)
AZIMUTH_DEG = (0.0, 180.0)
FILL = 0.95  # of half the frame that the farthest vertex reaches
SAMPLES = 2  # along each side of a pixel
NEAR = 1e-3

# Directions in the camera's frame, x right, y up, z towards the eye: lit from where one looks, so
# that no visible face is darker than 0.45 of its colour whatever its material.
LIGHTS = np.array([[-0.45, 0.65, 0.61], [0.75, 0.05, 0.66]]) * [[0.62], [0.22]]
AMBIENT, HEADLIGHT = 0.33, 0.12
# White that every surface reflects on top of its colour, as dielectrics do: a black asset would
# otherwise be a silhouette, which tells nothing of its shape.
SHEEN = 0.15


@dataclass(frozen=True)
class Camera:
    """A pinhole camera of a square picture.

    camera_to_world: [4, 4] float64, rigid. fov: full angle in radians, the same both ways.
    """

    camera_to_world: np.ndarray
    fov: float

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return points [N, 3] in the camera's frame, in products that all devices round alike."""
        x, y, z = np.split(points - self.camera_to_world[:3, 3], 3, axis=1)
        rows = self.camera_to_world[:3, :3]
        return x * rows[0] + y * rows[1] + z * rows[2]

    def project(self, points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels [N, 2] (x right, y down, centres at .5) and depths [N] of points [N, 3]."""
        local = self.local(points)
        depth = -local[:, 2]
        safe = np.where(depth > NEAR, depth, np.nan)[:, None] * np.tan(self.fov / 2)
        pixels = (local[:, :2] / safe * [1, -1] + 1) * (size / 2)
        return pixels, depth


@dataclass(frozen=True)
class View:
    """A picture of an asset and the camera that took it.

    image: [S, S, 4] uint8 sRGB, straight alpha. camera_to_world: [4, 4]. fov: radians, vertical.
    """

    image: np.ndarray
    camera_to_world: np.ndarray
    fov: float

    @property
    def camera(self) -> Camera:
        """The camera, to take a picture of another mesh from the same place."""
        return Camera(self.camera_to_world, self.fov)


def orbit_camera(
    azimuth: float, elevation: float, focal_mm: float, points: np.ndarray | None = None
) -> Camera:
    """Return a camera that looks at the origin from (azimuth, elevation) in degrees.

    Its distance is the least at which points [N, 3] stay inside FILL of the frame; without points,
    at which the sphere around a normalised cube's faces does, which is the same for every mesh.
    """
    az, el = np.radians([azimuth, elevation])
    backward = np.array([np.cos(el) * np.cos(az), np.sin(el), np.cos(el) * np.sin(az)])
    # Not the cross product with +y: that one is zero for a camera that looks straight down.
    right = np.array([np.sin(az), 0.0, -np.cos(az)])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(backward, right), backward], axis=1)
    fov = 2 * np.arctan(SENSOR_MM / 2 / focal_mm)
    reach = FILL * np.tan(fov / 2)
    if points is None:
        distance = SHAPE_SCALE * np.sqrt(1.5) / np.sin(np.arctan(reach))
    else:
        local = points @ pose[:3, :3]
        distance = (local[:, 2] + np.abs(local[:, :2]).max(1) / reach).max()
    pose[:3, 3] = backward * max(distance, 0.1)
    return Camera(pose, float(fov))


def render_views(
    mesh: Mesh, count: int, size: int, seed: int, device: Literal["cpu", "cuda"] = "cpu"
) -> list[View]:
    """Render condition views of a normalised mesh from the paper's range of cameras.

    Elevation, azimuth and focal length are uniform over their ranges, by seed. Faces are lit from
    both sides and drawn opaque, whatever their material's alpha: the SDF holds glass as a surface
    too, and alpha, the mask of the condition, must cover all of it. size: pixels a side. device:
    where they are drawn, by compiled code on the CPU or torch on a GPU; the pictures are the same.
    """
    rng = np.random.default_rng(seed)
    is_used = np.zeros(len(mesh.vertices), bool)
    is_used[mesh.faces] = True
    used = mesh.vertices[is_used]
    paint = Paint.of(mesh, limit=SAMPLES * size)
    cameras = []
    for _ in range(count):
        elevation, azimuth = rng.uniform(*ELEVATION_DEG), rng.uniform(*AZIMUTH_DEG)
        cameras.append(orbit_camera(azimuth, elevation, rng.uniform(*FOCAL_MM), used))
    if device == "cuda":
        from tasks.torch_rendering import draw_views

        images = draw_views(mesh.vertices, mesh.faces, cameras, size, paint, device)
    else:
        images = [_draw(mesh.vertices, mesh.faces, camera, size, paint) for camera in cameras]
    return [
        View(image, camera.camera_to_world, camera.fov)
        for image, camera in zip(images, cameras, strict=True)
    ]


def render_geometry(
    vertices: np.ndarray,  # [V, 3] in [-1, 1]
    faces: np.ndarray,  # [F, 3], none at all gives an empty picture
    size: int,
    camera: Camera | None = None,
    background: int = 255,
) -> np.ndarray:  # [size, size, 3] uint8
    """Render a mesh in grey. The default camera is the same for every mesh, for comparisons."""
    camera = camera or orbit_camera(azimuth=60, elevation=25, focal_mm=50)
    mesh = Mesh(np.asarray(vertices, np.float64), np.asarray(faces, np.int64))
    rgba = _draw(mesh.vertices, mesh.faces, camera, size, Paint.of(mesh, limit=1))
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + background * (1 - alpha)).astype(np.uint8)


def render_faces(vertices: np.ndarray, faces: np.ndarray, camera: Camera, size: int) -> np.ndarray:
    """Return which face each pixel's centre sees: [size, size] int32, -1 where none."""
    pixels, depth = camera.project(np.asarray(vertices, np.float64), size)
    return _rasterise(pixels, depth, np.asarray(faces, np.int64), size)


def render_normals(
    vertices: np.ndarray, faces: np.ndarray, camera: Camera, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return unit normals [size, size, 3] float64 in the world's frame and a mask [size, size].

    Normals are those of the faces, turned towards the camera; zero outside the mask.
    """
    seen = render_faces(vertices, faces, camera, size)
    mask = seen >= 0
    vertices = np.asarray(vertices, np.float64)
    corners = vertices[np.asarray(faces)[seen[mask]]]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)
    to_eye = camera.camera_to_world[:3, 3] - corners.mean(1)
    normals[np.einsum("ij,ij->i", normals, to_eye) < 0] *= -1
    image = np.zeros((size, size, 3))
    image[mask] = normals
    return image, mask


@dataclass(frozen=True)
class Paint:
    """A mesh's colours as flat arrays, which compiled code can index."""

    colours: np.ndarray  # [M, 3] float32 in [0, 1]
    face_material: np.ndarray  # [F] int32
    vertex_colours: np.ndarray  # [V or 1, 3] float32; one row: the same everywhere
    uv: np.ndarray  # [V or 1, 2] float32
    texels: np.ndarray  # [T, 3] uint8, all textures one after another
    textures: np.ndarray  # [M, 3] int64: offset in texels (-1: none), height, width

    @classmethod
    def of(cls, mesh: Mesh, limit: int) -> "Paint":
        """Collect the colours of mesh, textures shrunk to limit pixels a side.

        A material's texture is left out when the mesh has no uv to place it by.
        """
        texels, textures, offset = [np.zeros((1, 3), np.uint8)], [], 1
        for material in mesh.materials:
            if material.texture is None or mesh.uv is None:
                textures.append((-1, 0, 0))
                continue
            texture = _shrink(material.texture[..., :3], limit)
            textures.append((offset, *texture.shape[:2]))
            texels.append(texture.reshape(-1, 3))
            offset += len(texels[-1])
        vertex_colours: np.ndarray = np.ones((1, 3), np.float32)
        if mesh.vertex_colours is not None:
            vertex_colours = mesh.vertex_colours[:, :3].astype(np.float32) / 255
        face_material: np.ndarray = np.zeros(len(mesh.faces), np.int32)
        if len(mesh.face_material):
            face_material = mesh.face_material.astype(np.int32)
        return cls(
            np.array([material.colour[:3] for material in mesh.materials], np.float32),
            face_material,
            vertex_colours,
            np.zeros((1, 2), np.float32) if mesh.uv is None else mesh.uv.astype(np.float32),
            np.concatenate(texels),
            np.array(textures, np.int64),
        )


def _shrink(texture: np.ndarray, limit: int) -> np.ndarray:
    """Return texture [H, W, 3] uint8 averaged down to at most limit pixels a side."""
    height, width = texture.shape[:2]
    if max(height, width) <= limit:
        return np.ascontiguousarray(texture)
    scale = limit / max(height, width)
    new = max(round(width * scale), 1), max(round(height * scale), 1)
    image = Image.fromarray(np.ascontiguousarray(texture))
    return np.asarray(image.resize(new, Image.Resampling.BOX))


def _draw(
    vertices: np.ndarray, faces: np.ndarray, camera: Camera, size: int, paint: Paint
) -> np.ndarray:
    """Return the lit picture [size, size, 4] uint8 with straight alpha."""
    pixels, depth = camera.project(vertices, size * SAMPLES)
    seen = _rasterise(pixels, depth, faces, size * SAMPLES)
    return _shade(
        seen,
        pixels,
        camera.local(vertices),
        faces,
        paint.colours,
        paint.face_material,
        paint.vertex_colours,
        paint.uv,
        paint.texels,
        paint.textures,
    )


@compiled
def _rasterise(  # type: ignore[no-untyped-def]  # numba infers
    pixels,  # [V, 2] float64
    depth,  # [V] float64
    faces,  # [F, 3] int64
    side,
):
    """Return the nearest face at each pixel's centre, [side, side] int32, -1 where none.

    Rows are filled between exact crossings of the edges, not by testing a bounding box: CAD parts
    have long slivers, whose boxes are thousands of times their area. Faces that reach behind the
    near plane are left out.
    """
    nearest = np.zeros((side, side), np.float32)  # 1 / depth: linear in the picture's plane
    seen = np.full((side, side), -1, np.int32)
    for face in range(len(faces)):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        if not (depth[a] > NEAR and depth[b] > NEAR and depth[c] > NEAR):
            continue
        ax, ay, bx, by = pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1]
        cx, cy = pixels[c, 0], pixels[c, 1]
        top = max(int(np.ceil(min(ay, by, cy) - 0.5)), 0)
        bottom = min(int(np.floor(max(ay, by, cy) - 0.5)), side - 1)
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if top > bottom or area == 0:
            continue
        ia, ib, ic = 1 / depth[a], 1 / depth[b], 1 / depth[c]
        # The plane of 1 / depth: value at a and its slopes along x and y.
        slope_x = ((ib - ia) * (cy - ay) - (ic - ia) * (by - ay)) / area
        slope_y = ((ic - ia) * (bx - ax) - (ib - ia) * (cx - ax)) / area
        for row in range(top, bottom + 1):
            y = row + 0.5
            low, high = np.inf, -np.inf
            for edge in range(3):
                if edge == 0:
                    x0, y0, x1, y1 = ax, ay, bx, by
                elif edge == 1:
                    x0, y0, x1, y1 = bx, by, cx, cy
                else:
                    x0, y0, x1, y1 = cx, cy, ax, ay
                if y0 > y1:  # the same arithmetic for both faces of an edge: no cracks
                    x0, y0, x1, y1 = x1, y1, x0, y0
                if y0 <= y <= y1:
                    if y0 == y1:
                        low, high = min(low, x0, x1), max(high, x0, x1)
                    else:
                        crossing = x0 + (x1 - x0) * ((y - y0) / (y1 - y0))
                        low, high = min(low, crossing), max(high, crossing)
            if not low <= high:
                continue
            first = int(np.ceil(max(low - 0.5, 0.0)))
            last = int(np.floor(min(high - 0.5, side - 1.0)))
            at_row = ia + (y - ay) * slope_y
            for column in range(first, last + 1):
                # Rounded before it is compared: of two faces as near, the first wins.
                inverse = np.float32(at_row + (column + 0.5 - ax) * slope_x)
                if inverse > nearest[row, column]:
                    nearest[row, column] = inverse
                    seen[row, column] = face
    return seen


@compiled
def _light(a, b, c):  # type: ignore[no-untyped-def]
    """Return the light in (0, 1] on a face with corners a, b, c [3] in the camera's frame.

    Flat and not smooth: assets have flipped and badly wound faces, whose averaged normals are
    wrong, and a flat normal can be turned towards the eye.
    """
    x = (b[1] - a[1]) * (c[2] - a[2]) - (b[2] - a[2]) * (c[1] - a[1])
    y = (b[2] - a[2]) * (c[0] - a[0]) - (b[0] - a[0]) * (c[2] - a[2])
    z = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    length = np.sqrt(x * x + y * y + z * z)
    if x * a[0] + y * a[1] + z * a[2] > 0:  # it faces away from the eye, which is the origin
        length = -length
    if length == 0:
        return 1.0
    total = AMBIENT + HEADLIGHT * max(z / length, 0.0)
    for k in range(len(LIGHTS)):
        total += max((x * LIGHTS[k, 0] + y * LIGHTS[k, 1] + z * LIGHTS[k, 2]) / length, 0.0)
    return min(total, 1.0)


@compiled
def _shade(  # type: ignore[no-untyped-def]
    seen,  # [s * size, s * size] int32
    pixels,  # [V, 2] float64, in samples
    local,  # [V, 3] float64, in the camera's frame
    faces,
    colours,
    face_material,
    vertex_colours,
    uv,
    texels,
    textures,
):
    """Return [size, size, 4] uint8: colour times light, averaged over a pixel's covered samples."""
    size = len(seen) // SAMPLES
    out = np.zeros((size, size, 4), np.uint8)
    weight = np.zeros(3)
    colour = np.zeros(3)
    for row in range(size):
        for column in range(size):
            covered = 0
            total_r, total_g, total_b = 0.0, 0.0, 0.0
            for sample in range(SAMPLES * SAMPLES):
                y, x = row * SAMPLES + sample // SAMPLES, column * SAMPLES + sample % SAMPLES
                face = seen[y, x]
                if face < 0:
                    continue
                covered += 1
                a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
                px, py = x + 0.5, y + 0.5
                ax, ay = pixels[a, 0] - px, pixels[a, 1] - py
                bx, by = pixels[b, 0] - px, pixels[b, 1] - py
                cx, cy = pixels[c, 0] - px, pixels[c, 1] - py
                # Areas opposite each corner over its depth: perspective-correct weights.
                weight[0] = (bx * cy - by * cx) / local[a, 2]
                weight[1] = (cx * ay - cy * ax) / local[b, 2]
                weight[2] = (ax * by - ay * bx) / local[c, 2]
                total = weight[0] + weight[1] + weight[2]
                if total == 0:  # a sliver that rounding leaves no area: its first corner's colour
                    weight[0] = total = 1.0
                    weight[1] = weight[2] = 0.0
                scale = 1 / total
                material = face_material[face]
                for k in range(3):
                    colour[k] = colours[material, k]
                if len(vertex_colours) > 1:
                    for k in range(3):
                        mixed = 0.0
                        for corner in range(3):
                            mixed += weight[corner] * vertex_colours[faces[face, corner], k]
                        colour[k] *= mixed * scale
                offset, height, width = textures[material]
                if offset >= 0:
                    u, v = 0.0, 0.0
                    for corner in range(3):
                        u += weight[corner] * scale * uv[faces[face, corner], 0]
                        v += weight[corner] * scale * uv[faces[face, corner], 1]
                    tx, ty = (u - np.floor(u)) * width - 0.5, (np.ceil(v) - v) * height - 0.5
                    left, upper = int(np.floor(tx)), int(np.floor(ty))
                    right_share, lower_share = tx - left, ty - upper
                    for k in range(3):
                        texel = 0.0
                        for corner in range(4):
                            dx, dy = corner % 2, corner // 2
                            share = right_share if dx else 1 - right_share
                            share *= lower_share if dy else 1 - lower_share
                            at = ((upper + dy) % height) * width + (left + dx) % width
                            texel += share * texels[offset + at, k]
                        colour[k] *= texel / 255
                light = _light(local[a], local[b], local[c])
                total_r += light * (SHEEN + (1 - SHEEN) * colour[0])
                total_g += light * (SHEEN + (1 - SHEEN) * colour[1])
                total_b += light * (SHEEN + (1 - SHEEN) * colour[2])
            if covered:
                # Straight alpha: the mean is over covered samples only.
                out[row, column, 0] = int(min(max(total_r / covered, 0.0), 1.0) * 255 + 0.5)
                out[row, column, 1] = int(min(max(total_g / covered, 0.0), 1.0) * 255 + 0.5)
                out[row, column, 2] = int(min(max(total_b / covered, 0.0), 1.0) * 255 + 0.5)
                out[row, column, 3] = int(covered / (SAMPLES * SAMPLES) * 255 + 0.5)
    return out
