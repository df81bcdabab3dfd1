"""Shards: the Parquet files that hold the arrays of some dozen assets, one row group an asset.

`assets.parquet` has the normalised source mesh and the views of each asset, `sdf-<R>.parquet` its
signed distances at resolution R, `latents-<R>.parquet` what a VAE makes of them. Columns, units
and frames are in the field metadata, so that `pyarrow.parquet.read_schema(path)` documents a file.
Rows are found through the catalogue; reading one touches the file's footer and that row's columns
only, and each view is a column, so that one picture is read without the others. Pages carry
checksums, which every read verifies; whole files have a SHA-256 in the catalogue (`verify_file`).
Needs numpy and pyarrow, and Pillow for pictures.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from model.sdf import BLOCK, SparseSDF, truncation
from tasks.storage import HashingSink, atomic_file

ASSETS_FILE = "assets.parquet"
_LAST = 32767  # the code that means exactly +1; -32768 means exactly -1
ENCODED_AT_ONCE = 4096  # blocks, 8 MB of float32: intermediate arrays stay small


class ShardError(RuntimeError):
    """A shard file that is missing, damaged or not what the catalogue says."""


@dataclass(frozen=True)
class StoredView:
    """A picture of an asset.

    png: encoded RGBA, straight alpha. camera_to_world: [4, 4] float64, OpenGL camera (looks down
    -z, +y up in the image) in the [-1, 1] frame. fov: vertical, radians.
    """

    png: bytes
    camera_to_world: np.ndarray
    fov: float


@dataclass(frozen=True)
class AssetRow:
    """What is stored of an asset at every resolution.

    vertices: [V, 3] float32 in the [-1, 1] frame, normalised, as in the source file (not made
    watertight). faces: [F, 3] int32.
    """

    asset_id: str
    uri: str
    licence: str
    attribution: str
    category: str
    vertices: np.ndarray
    faces: np.ndarray
    views: tuple[StoredView, ...]


@dataclass(frozen=True)
class EncodedSDF:
    """A `SparseSDF` as it is stored, two and an eighth bytes a voxel instead of five.

    blocks: [B, 3] int32. codes: [B, 8, 8, 8] little-endian int16, see `quantise`. sharp: [B * 64]
    uint8, a bit a voxel, most significant first.
    """

    resolution: int
    blocks: np.ndarray
    codes: np.ndarray
    sharp: np.ndarray

    @property
    def band_voxels(self) -> int:
        """Number of voxels with |sdf| < tau."""
        return int(np.count_nonzero((self.codes != -_LAST - 1) & (self.codes != _LAST)))


@dataclass(frozen=True)
class Stored:
    """Where a row went, and the SHA-256 of its content (not of its encoding in the file)."""

    row_group: int
    digest: str


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 (hex) and size in bytes of a written file."""

    sha256: str
    size: int


def _field(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=False, metadata=metadata)


_FRAME = "[-1, 1]^3, longest side of the asset scaled to 0.95 of it"

_VIEW = pa.struct(
    [
        _field("png", pa.binary(), "RGBA picture, straight alpha, PNG"),
        _field(
            "camera_to_world",
            pa.list_(pa.float64()),
            "4 x 4, row-major; OpenGL camera: looks down -z, +y up",
            f"frame {_FRAME}",
        ),
        _field("fov", pa.float64(), "vertical field of view", "radian"),
    ]
)


def asset_schema(views: int) -> pa.Schema:
    """Return the schema of an `assets.parquet` whose assets have so many views."""
    return pa.schema(
        [
            _field("asset_id", pa.string(), "SHA-256 of the source bytes, hex"),
            _field("uri", pa.string(), "where the asset was found first"),
            _field("licence", pa.string(), "licence of the asset, as its source states it"),
            _field("attribution", pa.string(), "whom to credit, as the source states it"),
            _field("category", pa.string(), "category, as the source states it"),
            _field(
                "vertices",
                pa.list_(pa.float32()),
                "V x 3, row-major: the source mesh",
                f"frame {_FRAME}",
            ),
            _field("faces", pa.list_(pa.int32()), "F x 3, row-major: vertex indices of triangles"),
            *(
                _field(_view_column(i), _VIEW, "a picture of the asset, with its camera")
                for i in range(views)
            ),
        ]
    )


def _view_column(index: int) -> str:
    return f"view_{index}"


SDF_SCHEMA = pa.schema(
    [
        _field("asset_id", pa.string(), "SHA-256 of the source bytes, hex"),
        _field("resolution", pa.int32(), "voxels along an axis; centres -1 + (2 i + 1) / R"),
        _field("tau", pa.float64(), "half the width of the band", f"frame {_FRAME}"),
        _field(
            "blocks",
            pa.list_(pa.int32()),
            "B x 3, row-major: block coordinates x, y, z, sorted; those that hold a band voxel",
            "8 voxels",
        ),
        _field(
            "values",
            pa.binary(),
            "B x 8 x 8 x 8 little-endian int16 codes q of signed distance, negative inside: "
            "(q + 0.5) / 32768; -32768 and 32767 mean exactly -1 and +1: outside the band",
            "tau",
        ),
        _field(
            "sharp",
            pa.binary(),
            "B x 8 x 8 x 8 bits, most significant first: band voxels near a sharp edge",
        ),
    ]
)

LATENT_SCHEMA = pa.schema(
    [
        _field("asset_id", pa.string(), "SHA-256 of the source bytes, hex"),
        _field("resolution", pa.int32(), "voxels along an axis of the SDF that was encoded"),
        _field(
            "coords",
            pa.list_(pa.int32()),
            "L x 3, row-major: latent voxels x, y, z, sorted",
            "8 voxels",
        ),
        _field("channels", pa.int32(), "C, latent channels"),
        _field("mean", pa.list_(pa.float32()), "L x C, row-major: mean of the posterior"),
    ]
)


def sdf_file(resolution: int) -> str:
    """Return the name of a shard's file for one resolution."""
    return f"sdf-{resolution}.parquet"


def latents_file(resolution: int) -> str:
    """Return the name of a folder's file of latents for one resolution."""
    return f"latents-{resolution}.parquet"


def shard_path(root_path: str, shard: str, name: str) -> str:
    """Return the path of a shard's file; root_path is the data folder in its file system."""
    return f"{root_path}/shards/{shard}/{name}"


def quantise(values: np.ndarray) -> np.ndarray:
    """Return the int16 codes of values (any shape, in [-1, 1]).

    Mid-rise: no code lies at 0, so a sign is never lost (0 counts as outside). The error is at
    most half a step of 1 / 32768, and 1.5 steps beside -1 and +1, whose codes are taken.
    """
    if not (np.abs(values) <= 1).all():  # False for NaN, too
        raise ValueError(
            f"signed distances must lie in [-1, 1] (units of tau), got {np.nanmin(values)} to "
            f"{np.nanmax(values)} with {int(np.isnan(values).sum())} NaN: clip sdf / tau"
        )
    codes = np.clip(np.floor(values * np.float32(32768)), -_LAST, _LAST - 1).astype(np.int16)
    codes[values == -1] = -_LAST - 1
    codes[values == 1] = _LAST
    return codes


def encode_sdf(sdf: SparseSDF) -> EncodedSDF:
    """Return a field as it is stored; raises ValueError where its values are not in [-1, 1]."""
    codes = np.empty(sdf.values.shape, "<i2")
    for start in range(0, len(codes), ENCODED_AT_ONCE):
        part = slice(start, start + ENCODED_AT_ONCE)
        try:
            codes[part] = quantise(sdf.values[part])
        except ValueError as error:
            raise ValueError(f"blocks from {start} on: {error}") from error
    blocks = np.ascontiguousarray(sdf.blocks, np.int32)
    return EncodedSDF(sdf.resolution, blocks, codes, np.packbits(sdf.sharp))


def dequantise(codes: np.ndarray) -> np.ndarray:
    """Return the float32 values of int16 codes."""
    values = (codes.astype(np.float32) + np.float32(0.5)) / np.float32(32768)
    values[codes == -_LAST - 1] = -1
    values[codes == _LAST] = 1
    return values


class ShardWriter:
    """Writes the files of one shard, row by row; they appear when the context ends without error.

    folder: the shard's folder in filesystem, made where missing. After the context, `files` has
    the digest of each.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str):
        self.files: dict[str, FileDigest] = {}
        self._filesystem, self._folder = filesystem, folder
        self._stack = ExitStack()
        self._writers: dict[str, tuple[pq.ParquetWriter, HashingSink]] = {}
        self._rows: dict[str, int] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if error is None:
            self.files = {
                name: FileDigest(sink.sha256(), sink.bytes_written)
                for name, (_, sink) in self._writers.items()
            }

    def add_asset(self, asset: AssetRow) -> Stored:
        """Append the mesh and the views of an asset; all assets of a shard have equally many."""
        row = {
            "asset_id": asset.asset_id,
            "uri": asset.uri,
            "licence": asset.licence,
            "attribution": asset.attribution,
            "category": asset.category,
            "vertices": np.ascontiguousarray(asset.vertices, np.float32).ravel(),
            "faces": np.ascontiguousarray(asset.faces, np.int32).ravel(),
            **{
                _view_column(i): {
                    "png": view.png,
                    "camera_to_world": view.camera_to_world.ravel(),
                    "fov": view.fov,
                }
                for i, view in enumerate(asset.views)
            },
        }
        content = [row["vertices"], row["faces"], *(v.png for v in asset.views)]
        return self._append(ASSETS_FILE, asset_schema(len(asset.views)), row, content)

    def add_sdf(self, asset_id: str, sdf: EncodedSDF) -> Stored:
        """Append the signed distances of an asset."""
        row = {
            "asset_id": asset_id,
            "resolution": sdf.resolution,
            "tau": truncation(sdf.resolution),
            "blocks": sdf.blocks.ravel(),
            "values": sdf.codes.tobytes(),
            "sharp": sdf.sharp.tobytes(),
        }
        content = [sdf.blocks, sdf.codes, sdf.sharp]
        return self._append(sdf_file(sdf.resolution), SDF_SCHEMA, row, content)

    def add_latents(
        self, asset_id: str, resolution: int, coords: np.ndarray, mean: np.ndarray
    ) -> Stored:
        """Append the latents of an asset: coords [L, 3] int32, mean [L, C] float32."""
        row = {
            "asset_id": asset_id,
            "resolution": resolution,
            "coords": np.ascontiguousarray(coords, np.int32).ravel(),
            "channels": mean.shape[1],
            "mean": np.ascontiguousarray(mean, np.float32).ravel(),
        }
        content = [row["coords"], row["mean"]]
        return self._append(latents_file(resolution), LATENT_SCHEMA, row, content)

    def _append(
        self, name: str, schema: pa.Schema, row: Mapping[str, object], content: Sequence[Any]
    ) -> Stored:
        if name not in self._writers:
            self._filesystem.create_dir(self._folder, recursive=True)
            path = f"{self._folder}/{name}"
            sink = self._stack.enter_context(atomic_file(self._filesystem, path))
            # No dictionaries and no statistics: a row group is one row.
            writer = pq.ParquetWriter(
                sink,
                schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
            self._writers[name] = self._stack.enter_context(writer), sink
            self._rows[name] = 0
        columns = [pa.array([row[field.name]], field.type) for field in schema]
        self._writers[name][0].write_table(pa.Table.from_arrays(columns, schema=schema))
        self._rows[name] += 1
        digest = hashlib.sha256()
        for part in content:
            digest.update(part)
        return Stored(self._rows[name] - 1, digest.hexdigest())


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what goes wrong with a file into a ShardError that names it and the remedy."""
    try:
        yield
    except (OSError, pa.ArrowException, IndexError) as error:
        raise ShardError(
            f"cannot read {path}: {error}. Delete its folder and run the refresh again: it "
            "converts the assets of missing shards anew"
        ) from error


@contextmanager
def _row_group(
    filesystem: fs.FileSystem, path: str, row_group: int
) -> Iterator[tuple[Callable[[list[str]], pa.Table], list[str]]]:
    """Open a file; yield what reads columns of one row group, and the columns' names."""
    with (
        _explained(path),
        filesystem.open_input_file(path) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as file,
    ):
        if not 0 <= row_group < file.num_row_groups:
            raise IndexError(f"row group {row_group} of {file.num_row_groups}")

        def read(columns: list[str]) -> pa.Table:
            return file.read_row_group(row_group, columns=columns, use_threads=False)

        yield read, file.schema_arrow.names


def _read(filesystem: fs.FileSystem, path: str, row_group: int, columns: list[str]) -> pa.Table:
    with _row_group(filesystem, path, row_group) as (read, _):
        return read(columns)


def _values(table: pa.Table, column: str) -> np.ndarray:
    return table[column].chunk(0).flatten().to_numpy()


def read_sdf(filesystem: fs.FileSystem, path: str, row_group: int) -> SparseSDF:
    """Return the signed distances in one row group of a `sdf-<R>.parquet`.

    Raises ShardError when the file is missing or damaged.
    """
    table = _read(filesystem, path, row_group, ["resolution", "tau", "blocks", "values", "sharp"])
    resolution = table["resolution"][0].as_py()
    if table["tau"][0].as_py() != truncation(resolution):
        raise ShardError(
            f"{path} was converted with tau {table['tau'][0].as_py()} at resolution {resolution}, "
            f"this version uses {truncation(resolution)}: run the refresh again"
        )
    blocks = _values(table, "blocks").reshape(-1, 3)
    shape = (len(blocks), BLOCK, BLOCK, BLOCK)
    codes = np.frombuffer(table["values"][0].as_buffer(), "<i2").reshape(shape)
    bits = np.frombuffer(table["sharp"][0].as_buffer(), np.uint8)
    sharp = np.unpackbits(bits, count=codes.size).view(bool).reshape(shape)
    return SparseSDF(resolution, blocks, dequantise(codes), sharp)


def _view_columns(names: list[str]) -> list[str]:
    return [_view_column(i) for i in range(len(names)) if _view_column(i) in names]


def read_views(filesystem: fs.FileSystem, path: str, row_group: int) -> tuple[StoredView, ...]:
    """Return the views in one row group of an `assets.parquet`, pictures still encoded."""
    with _row_group(filesystem, path, row_group) as (read, names):
        columns = _view_columns(names)
        row = read(columns).to_pylist()[0]
    return tuple(
        StoredView(v["png"], np.array(v["camera_to_world"]).reshape(4, 4), v["fov"])
        for v in (row[name] for name in columns)
    )


def read_image(
    filesystem: fs.FileSystem, path: str, row_group: int, view: int | Callable[[int], int]
) -> np.ndarray:
    """Return one view's picture, [S, S, 4] uint8, straight alpha; the others are not read.

    view: its index, a negative one from the end, or a function of the number of views that
    returns one. Raises ValueError when there is no such view, ShardError as `read_sdf` does.
    """
    from PIL import Image  # a machine that trains the VAE alone has no need of it

    with _row_group(filesystem, path, row_group) as (read, names):
        columns = _view_columns(names)
        index = view(len(columns)) if callable(view) else view
        if not -len(columns) <= index < len(columns):
            raise ValueError(f"there is no view {index} in {path}: its assets have {len(columns)}")
        column = columns[index]
        png = read([f"{column}.png"])[column][0]["png"].as_buffer()
    with Image.open(pa.BufferReader(png)) as image:
        return np.asarray(image.convert("RGBA"))


def read_latents(
    filesystem: fs.FileSystem, path: str, row_group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return coords [L, 3] int32 and mean [L, C] float32 of one row of a `latents-<R>.parquet`."""
    table = _read(filesystem, path, row_group, ["coords", "channels", "mean"])
    coords = _values(table, "coords").reshape(-1, 3)
    return coords, _values(table, "mean").reshape(len(coords), table["channels"][0].as_py())


def read_geometry(
    filesystem: fs.FileSystem, path: str, row_group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [V, 3] float32 and faces [F, 3] int64 of one row of an `assets.parquet`."""
    table = _read(filesystem, path, row_group, ["vertices", "faces"])
    faces = _values(table, "faces").reshape(-1, 3).astype(np.int64)
    return _values(table, "vertices").reshape(-1, 3), faces


def verify_file(filesystem: fs.FileSystem, path: str, sha256: str) -> None:
    """Check a whole file against the SHA-256 in the catalogue; raises ShardError."""
    digest = hashlib.sha256()
    with _explained(path):
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise OSError(f"its SHA-256 is {digest.hexdigest()}, the catalogue says {sha256}")
