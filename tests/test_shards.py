"""Shards: exact round trips, one row without its neighbours, damage found and explained."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pyarrow import fs

from model.sdf import SparseSDF
from tasks.shards import (
    SDF_SCHEMA,
    AssetRow,
    ShardError,
    ShardWriter,
    StoredView,
    asset_schema,
    dequantise,
    encode_sdf,
    quantise,
    read_geometry,
    read_image,
    read_latents,
    read_sdf,
    read_views,
    shard_path,
    verify_file,
)
from tasks.storage import DatasetBusyError, atomic_file, exclusive, list_files, open_filesystem

LOCAL = fs.LocalFileSystem()


def random_sdf(seed: int, blocks: int = 5, resolution: int = 64) -> SparseSDF:
    rng = np.random.default_rng(seed)
    flat = np.sort(rng.choice((resolution // 8) ** 3, blocks, replace=False))
    coords = np.stack(np.unravel_index(flat, (resolution // 8,) * 3), 1).astype(np.int32)
    values = np.clip(rng.normal(size=(blocks, 8, 8, 8)), -1, 1).astype(np.float32)
    return SparseSDF(resolution, coords, values, rng.random(values.shape) < 0.1)


def random_asset(seed: int) -> AssetRow:
    rng = np.random.default_rng(seed)
    views = tuple(StoredView(rng.bytes(n), rng.normal(size=(4, 4)), 0.5 + n) for n in (900, 1, 0))
    return AssetRow(
        f"{seed:064x}",
        f"deep/{seed} ❤.glb",
        "CC0-1.0",
        "someone",
        "chair",
        rng.uniform(-0.95, 0.95, (7, 3)).astype(np.float32),
        rng.integers(0, 7, (5, 3)).astype(np.int32),
        views,
    )


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=2, max_side=40),
        elements=st.floats(-1, 1, width=32),
    )
)
def test_codes_keep_sign_band_and_half_a_step(values: np.ndarray) -> None:
    decoded = dequantise(quantise(values))
    assert decoded.dtype == np.float32
    assert ((decoded < 0) == (values < 0)).all()
    assert ((np.abs(decoded) == 1) == (np.abs(values) == 1)).all()
    step = 1 / 32768
    tolerance = np.where(np.abs(values) > 1 - step, 1.5 * step, 0.5 * step)
    assert (np.abs(decoded.astype(float) - values) <= tolerance).all()


def test_every_code_decodes_to_itself() -> None:
    codes = np.arange(-32768, 32768).astype(np.int16)
    values = dequantise(codes)
    assert (np.diff(values) > 0).all()
    np.testing.assert_array_equal(quantise(values), codes)


@pytest.mark.parametrize("bad", [1.0001, -np.inf, np.nan])
def test_values_outside_the_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        quantise(np.array([0.5, bad], np.float32))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 20)), min_size=1, max_size=4))
def test_shard_round_trip(rows: list[tuple[int, int]]) -> None:
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem()))
    sdfs = [random_sdf(seed, blocks) for seed, blocks in rows]
    assets = [random_asset(seed) for seed, _ in rows]
    with ShardWriter(filesystem, "/data/shards/s") as writer:
        for index, (asset, sdf) in enumerate(zip(assets, sdfs, strict=True)):
            assert writer.add_asset(asset).row_group == index
            assert writer.add_sdf(asset.asset_id, encode_sdf(sdf)).row_group == index
    for index, (asset, sdf) in enumerate(zip(assets, sdfs, strict=True)):
        got = read_sdf(filesystem, shard_path("/data", "s", "sdf-64.parquet"), index)
        assert got.resolution == sdf.resolution
        np.testing.assert_array_equal(got.blocks, sdf.blocks)
        np.testing.assert_array_equal(got.values, dequantise(quantise(sdf.values)))
        assert encode_sdf(sdf).band_voxels == sdf.band_voxels == got.band_voxels
        np.testing.assert_array_equal(got.sharp, sdf.sharp)
        assert got.values.dtype == np.float32
        assert got.sharp.dtype == bool
        path = shard_path("/data", "s", "assets.parquet")
        vertices, faces = read_geometry(filesystem, path, index)
        np.testing.assert_array_equal(vertices, asset.vertices)
        np.testing.assert_array_equal(faces, asset.faces)
        assert faces.dtype == np.int64
        for view, stored in zip(asset.views, read_views(filesystem, path, index), strict=True):
            assert (stored.png, stored.fov) == (view.png, view.fov)
            np.testing.assert_array_equal(stored.camera_to_world, view.camera_to_world)
    for name, digest in writer.files.items():
        verify_file(filesystem, shard_path("/data", "s", name), digest.sha256)


def test_latents_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 8, (5, 3)).astype(np.int32)
    mean = rng.normal(size=(5, 16)).astype(np.float32)
    with ShardWriter(LOCAL, str(tmp_path)) as writer:
        writer.add_latents("a", 64, coords, mean)
    got_coords, got_mean = read_latents(LOCAL, str(tmp_path / "latents-64.parquet"), 0)
    np.testing.assert_array_equal(got_coords, coords)
    np.testing.assert_array_equal(got_mean, mean)


def write_pictures(folder: Path, pictures: np.ndarray) -> list[StoredView]:
    """Write an asset with these pictures [V, H, W, 4] and return its views."""
    views = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        views.append(StoredView(buffer.getvalue(), np.eye(4), 0.7))
    with ShardWriter(LOCAL, str(folder)) as writer:
        writer.add_asset(replace(random_asset(0), views=tuple(views)))
    return views


def test_one_picture_is_decoded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 4)).astype(np.uint8)
    write_pictures(tmp_path, pixels)
    path = str(tmp_path / "assets.parquet")
    for view in (0, 11, -1, lambda count: count - 2):
        index = view(12) if callable(view) else view
        np.testing.assert_array_equal(read_image(LOCAL, path, 0, view), pixels[index])
    for view in (12, -13):
        with pytest.raises(ValueError, match=f"no view {view} in .*have 12"):
            read_image(LOCAL, path, 0, view)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardWriter]:
    with ShardWriter(LOCAL, f"{tmp_path}/shards/s") as writer:
        for seed in range(3):
            writer.add_asset(random_asset(seed))
            writer.add_sdf(f"{seed:064x}", encode_sdf(random_sdf(seed, blocks=40)))
    return tmp_path / "shards" / "s", writer


def test_files_explain_themselves(shard: tuple[Path, ShardWriter]) -> None:
    folder, writer = shard
    assert sorted(p.name for p in folder.iterdir()) == ["assets.parquet", "sdf-64.parquet"]
    for name, schema in (("assets.parquet", asset_schema(3)), ("sdf-64.parquet", SDF_SCHEMA)):
        stored = pq.read_schema(folder / name)
        assert stored.names == schema.names
        for field in stored:
            assert b"description" in field.metadata
            assert not isinstance(field.type, pa.ExtensionType)
        metadata = pq.read_metadata(folder / name)
        assert metadata.num_row_groups == metadata.num_rows == 3
        assert metadata.row_group(0).column(0).compression == "ZSTD"
        assert (folder / name).stat().st_size == writer.files[name].size
    assert stored.field("tau").metadata[b"unit"].startswith(b"frame [-1, 1]^3")


class CountingFile(io.FileIO):
    """A file that remembers which bytes were read."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        data = super().read(size)
        self.ranges.append((start, start + len(data)))
        return data


def counted(path: Path) -> tuple[CountingFile, fs.FileSystem]:
    """A file, and a filesystem that reads nothing else."""
    counting = CountingFile(path)

    class Recording(fs.FSSpecHandler):
        def open_input_file(self, path: str) -> pa.PythonFile:
            return pa.PythonFile(counting, mode="r")

    return counting, fs.PyFileSystem(Recording(MemoryFileSystem()))


def data_reads(counting: CountingFile, path: Path) -> list[tuple[int, int]]:
    """Return the ranges read but for the footer: its first read takes the last 64 KiB."""
    size = path.stat().st_size
    footer = size - pq.read_metadata(path).serialized_size - 8
    return [(a, b) for a, b in counting.ranges if b > a and a < footer and b < size]


def test_one_row_is_read_without_its_neighbours(shard: tuple[Path, ShardWriter]) -> None:
    path = shard[0] / "sdf-64.parquet"
    metadata = pq.read_metadata(path)
    counting, filesystem = counted(path)
    np.testing.assert_array_equal(
        read_sdf(filesystem, str(path), 1).blocks, random_sdf(1, 40).blocks
    )
    spans = []
    for group in (0, 2):
        columns = [metadata.row_group(group).column(c) for c in range(metadata.num_columns)]
        first = min(c.data_page_offset for c in columns)
        spans.append((first, first + sum(c.total_compressed_size for c in columns)))
    reads = data_reads(counting, path)
    assert reads
    for start, end in reads:
        assert all(end <= low or start >= high for low, high in spans)


def test_one_picture_is_read_without_the_others(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 100, 100, 4)).astype(np.uint8)
    views = write_pictures(tmp_path, noise)
    path = tmp_path / "assets.parquet"
    counting, filesystem = counted(path)
    np.testing.assert_array_equal(read_image(filesystem, str(path), 0, 2), noise[2])
    assert 0 < sum(b - a for a, b in data_reads(counting, path)) < 1.5 * len(views[2].png)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("flip")
    with ShardWriter(LOCAL, f"{root}/shards/s") as writer:
        writer.add_sdf("a", encode_sdf(random_sdf(0)))
    path = root / "shards/s/sdf-64.parquet"
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"sdf-64\.parquet.*SHA-256.*refresh again"):
        verify_file(LOCAL, str(path), writer.files["sdf-64.parquet"].sha256)


def test_a_damaged_page_names_file_and_remedy(shard: tuple[Path, ShardWriter]) -> None:
    path = shard[0] / "sdf-64.parquet"
    column = pq.read_metadata(path).row_group(1).column(SDF_SCHEMA.get_field_index("values"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)
    read_sdf(LOCAL, str(path), 0)
    with pytest.raises(ShardError, match=r"(?s)sdf-64\.parquet.*refresh again"):
        read_sdf(LOCAL, str(path), 1)


def test_missing_file_and_row_are_explained(shard: tuple[Path, ShardWriter]) -> None:
    with pytest.raises(ShardError, match="row group 3 of 3"):
        read_sdf(LOCAL, str(shard[0] / "sdf-64.parquet"), 3)
    with pytest.raises(ShardError, match=r"sdf-128\.parquet.*refresh again"):
        read_sdf(LOCAL, str(shard[0] / "sdf-128.parquet"), 0)


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(LOCAL, f"{tmp_path}/shards/s") as writer:
            writer.add_asset(random_asset(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list((tmp_path / "shards/s").iterdir()) == []


def test_atomic_file_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(LOCAL, str(path)) as sink:
            sink.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"old"
    with atomic_file(LOCAL, str(path)) as sink:
        sink.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(list_files(LOCAL, str(tmp_path))) == ["file"]


def test_two_holders_of_one_folder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(DatasetBusyError, match="another refresh"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_roots_are_folders_or_uris(tmp_path: Path) -> None:
    assert open_filesystem(tmp_path) == (LOCAL, str(tmp_path))
    filesystem, path = open_filesystem(f"file://{tmp_path}/data")
    assert (filesystem, path) == (LOCAL, f"{tmp_path}/data")
