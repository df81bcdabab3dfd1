"""What the readers of all mesh formats share: limits, references, textures, parts.

A reader fills a `Reading`; `Reading.mesh()` joins its parts. Everything in a file is taken for
hostile: counts are compared with bytes before memory is asked for, and a reference is opened only
when it is a regular file inside the root.
"""

import os
import re
import stat
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.mesh import Material, Mesh, MeshRejectedError

GREY = Material()
WHITE = Material(colour=(1.0, 1.0, 1.0, 1.0))
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")
MAX_WARNINGS = 32


@dataclass(frozen=True)
class ReadLimits:
    """How much one asset may use up; more is `resource_limit`.

    file_bytes: of the file, and of each file that it references.
    uncompressed_bytes: of the entries of a zip that are read, together; compression_ratio: of one.
    faces, vertices: of the whole asset with its instances; instances: nodes that place a mesh.
    texture_pixels: of one picture, judged by its header; texture_side: larger ones are scaled down;
    texture_bytes: of all pictures, scaled down.
    """

    file_bytes: int = 2 << 30
    uncompressed_bytes: int = 256 << 20
    compression_ratio: int = 200
    faces: int = 20_000_000
    vertices: int = 40_000_000
    instances: int = 100_000
    texture_pixels: int = 8192 * 8192
    texture_side: int = 2048
    texture_bytes: int = 1 << 30


def reject_short(what: str, need: int, have: int) -> MeshRejectedError:
    """Return the error for a file that holds fewer bytes than its header declares.

    Up to 16 times too few is a file cut short (`truncated`); beyond that the header lies
    (`declared_count_exceeds_data`).
    """
    reason = "truncated" if need <= 16 * max(have, 1) else "declared_count_exceeds_data"
    return MeshRejectedError(reason, f"{what} need {need} bytes, the file has {have}")


def inside_root(path: Path, root: Path) -> bool:
    """Say whether path, with every symbolic link followed, is root or lies below it."""
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath((real, real_root)) == real_root


def find_reference(uri: str, folder: Path, root: Path, missing: str) -> Path:
    """Return the file that a reference means, relative to folder.

    Raises MeshRejectedError: `uri_outside_root` when it names another host, an absolute path or,
    links followed, a place outside root; `missing` when there is no such regular file.
    """
    for name in (uri, unquote(uri)):
        name = name.strip().replace("\\", "/")
        try:
            elsewhere = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|/", name) is not None
            if elsewhere or not inside_root(folder / name, root):
                detail = f"{uri[:80]!r} is not a path inside the root"
                raise MeshRejectedError("uri_outside_root", detail)
            if name and (folder / name).is_file():
                return Path(os.path.normpath(folder / name))
        except (OSError, ValueError) as error:
            if isinstance(error, MeshRejectedError):
                raise
            continue  # a name that no file system takes: too long, or with a zero byte
    raise MeshRejectedError(missing, f"{uri[:80]!r} is not beside the asset; restore the file")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return a regular file's bytes; raises `unreadable` or `resource_limit`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MeshRejectedError("unreadable", f"{path.name} is not a regular file")
        if status.st_size > limit:
            detail = f"{path.name} has {status.st_size} bytes, limit {limit}"
            raise MeshRejectedError("resource_limit", detail)
        return path.read_bytes()
    except OSError as error:
        raise MeshRejectedError("unreadable", f"{path.name}: {error.strerror}") from error


def decode_texture(data: bytes, limits: ReadLimits) -> np.ndarray:
    """Return a picture as [H, W, 4] uint8, sides at most `texture_side`; size is judged first."""
    if data[:12] == b"\xabKTX 20\xbb\r\n\x1a\n":
        raise MeshRejectedError("unsupported_texture", "KTX2 texture without a PNG or JPEG twin")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=PICTURES) as image:
                width, height = image.size
                if width * height > limits.texture_pixels:
                    raise Image.DecompressionBombError(f"{width} x {height} pixels")
                side = limits.texture_side
                image.draft("RGB", (side, side))
                picture = image.convert("RGBA")
    except Image.DecompressionBombError as error:
        raise MeshRejectedError("resource_limit", f"texture too large: {error}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise MeshRejectedError("broken_texture", f"{len(data)} bytes: {error}") from error
    if max(picture.size) > side:
        picture.thumbnail((side, side))
    return np.asarray(picture)


@dataclass
class Reading:
    """One asset being read: where it may look, what it may use up, what was found so far."""

    path: Path
    root: Path
    limits: ReadLimits
    warnings: list[str] = field(default_factory=list)
    materials: list[Material] = field(default_factory=list)
    parts: list[tuple] = field(default_factory=list)
    vertices: int = 0
    faces: int = 0
    points: int = 0
    texture_bytes: int = 0
    textures: dict[object, np.ndarray | None] = field(default_factory=dict)

    def warn(self, code: str, detail: str) -> None:
        """Note something odd, once."""
        message = f"{code}: {detail}"
        if message not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(message)

    def reference(self, uri: str, missing: str) -> bytes:
        """Return the bytes of a referenced file; raises as `find_reference` and `read_bytes`."""
        path = find_reference(uri, self.path.parent, self.root, missing)
        return read_bytes(path, self.limits.file_bytes)

    def texture(self, key: object, data: bytes | None = None) -> np.ndarray | None:
        """Return a picture by its URI, or by any key with its bytes; None, with a warning."""
        if key not in self.textures:
            self.textures[key] = None
            try:
                if data is None:
                    data = self.reference(str(key), "missing_texture")
                picture = decode_texture(data, self.limits)
                self.texture_bytes += picture.nbytes
                if self.texture_bytes > self.limits.texture_bytes:
                    detail = f"textures of over {self.limits.texture_bytes} bytes"
                    raise MeshRejectedError("resource_limit", detail)
                self.textures[key] = picture
            except MeshRejectedError as error:
                self.warn(error.reason, error.detail)
        return self.textures[key]

    def material(self, material: Material) -> int:
        """Add a material and return its index."""
        self.materials.append(material)
        return len(self.materials) - 1

    def check_limits(self, vertices: int, faces: int) -> None:
        """Raise `resource_limit` when so many more would be too many."""
        for what, n, limit in (
            ("vertices", self.vertices + vertices, self.limits.vertices),
            ("faces", self.faces + faces, self.limits.faces),
        ):
            if n > limit:
                raise MeshRejectedError("resource_limit", f"{n} {what}, limit {limit}")

    def add(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        material: np.ndarray | int,
        uv: np.ndarray | None = None,
        colours: np.ndarray | None = None,
        transform: np.ndarray | None = None,
    ) -> None:
        """Add triangles [F, 3] over vertices [V, 3] (uv [V, 2], colours [V, 4] uint8).

        Unused vertices are dropped; a mirroring transform [4, 4] also turns the faces over.
        Raises index_out_of_range, non_finite_vertices, non_finite_transform, resource_limit.
        """
        vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
        if len(faces) == 0:
            return
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= len(vertices):
            detail = f"faces use vertices {low} to {high} of {len(vertices)}"
            raise MeshRejectedError("index_out_of_range", detail)
        self.check_limits(0, len(faces))
        used = np.zeros(len(vertices), bool)
        used[faces] = True
        if not used.all():
            faces = (np.cumsum(used) - 1)[faces]
            vertices = vertices[used]
            uv = None if uv is None else uv[used]
            colours = None if colours is None else colours[used]
        self.check_limits(len(vertices), 0)
        if not (finite := np.isfinite(vertices).all(1)).all():
            detail = f"{int((~finite).sum())} of {len(vertices)} used vertices are NaN or infinite"
            raise MeshRejectedError("non_finite_vertices", detail)
        if transform is not None:
            if not np.isfinite(transform).all():
                raise MeshRejectedError("non_finite_transform", str(transform.tolist()))
            vertices = vertices @ transform[:3, :3].T + transform[:3, 3]
            mirrored = np.linalg.det(transform[:3, :3]) < 0
            if not np.isfinite(vertices).all():
                raise MeshRejectedError("non_finite_transform", str(transform.tolist()))
            faces = faces[:, ::-1] if mirrored else faces
        material = np.broadcast_to(np.asarray(material, np.int32), (len(faces),))
        self.vertices += len(vertices)
        self.faces += len(faces)
        self.parts.append((vertices, faces, material, uv, colours))

    def add_corners(
        self,
        positions: np.ndarray,
        index: np.ndarray,
        material: np.ndarray | int,
        uv: tuple[np.ndarray, np.ndarray] | None = None,
        colours: tuple[np.ndarray, np.ndarray] | None = None,
        transform: np.ndarray | None = None,
    ) -> None:
        """Add triangles index [F, 3] whose uv and colours have indices [F, 3] of their own.

        uv, colours: (table, index) pairs. A vertex is made for every combination in use.
        """
        if len(index) == 0:
            return
        for what, table, at in (
            ("vertices", positions, index),
            *((("texture coordinates", *uv),) if uv else ()),
            *((("colours", *colours),) if colours else ()),
        ):
            if at.min() < 0 or at.max() >= len(table):
                detail = f"faces use {what} {at.min()} to {at.max()} of {len(table)}"
                raise MeshRejectedError("index_out_of_range", detail)
        if uv is None and colours is None:
            self.add(positions, index, material, transform=transform)
            return
        key = index.reshape(-1).astype(np.int64)
        for table, at in [pair for pair in (uv, colours) if pair is not None]:
            combined = key * len(table) + at.reshape(-1)
            # Ranks instead of raw keys, so that three tables do not overflow 64 bits.
            key = np.unique(combined, return_inverse=True)[1]
        _, first, faces = np.unique(key, return_index=True, return_inverse=True)
        self.add(
            positions[index.reshape(-1)[first]],
            faces.reshape(-1, 3),
            material,
            None if uv is None else uv[0][uv[1].reshape(-1)[first]],
            None if colours is None else colours[0][colours[1].reshape(-1)[first]],
            transform,
        )

    def mesh(self) -> Mesh:
        """Join the parts; raises `point_cloud_only` or `no_geometry` when there are no faces."""
        if not self.parts:
            if self.points:
                raise MeshRejectedError("point_cloud_only", f"{self.points} points, no faces")
            raise MeshRejectedError("no_geometry", "the file holds no triangle")
        vertices, faces, material, uvs, colours = zip(*self.parts, strict=True)
        sizes = [len(v) for v in vertices]
        starts = np.cumsum([0, *sizes[:-1]])
        uv = colour = None
        if any(u is not None for u in uvs):
            pairs = zip(uvs, sizes, strict=True)
            uv = np.concatenate([np.zeros((n, 2)) if u is None else u for u, n in pairs])
            uv = np.nan_to_num(uv, nan=0, posinf=0, neginf=0).astype(np.float32)
        if any(c is not None for c in colours):
            pairs = zip(colours, sizes, strict=True)
            colour = np.concatenate(
                [np.full((n, 4), 255, np.uint8) if c is None else c for c, n in pairs]
            )
        return Mesh(
            vertices=np.concatenate(vertices),
            faces=np.concatenate([f + s for f, s in zip(faces, starts, strict=True)]),
            uv=uv,
            vertex_colours=colour,
            materials=tuple(self.materials) or (GREY,),
            face_material=np.concatenate(material),
            warnings=tuple(self.warnings),
        )
