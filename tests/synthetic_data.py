"""A small data folder of spheres in real shards, for tests of what trains on it."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from model.sdf import SparseSDF, truncation, voxel_centres
from tasks.samples import SampleRef
from tasks.shards import AssetRow, ShardWriter, StoredView, encode_sdf, sdf_file
from tasks.storage import open_filesystem


def sphere_sdf(radius: float, resolution: int) -> SparseSDF:
    """The exact signed distances of a sphere around the origin."""
    x = voxel_centres(np.arange(resolution), resolution)
    distance = np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2) - radius
    values = np.clip(distance / truncation(resolution), -1, 1).astype(np.float32)
    side = resolution // 8
    grid = values.reshape(side, 8, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5)
    blocks = np.argwhere((np.abs(grid) < 1).any((3, 4, 5))).astype(np.int32)
    kept = np.ascontiguousarray(grid[tuple(blocks.T)])
    return SparseSDF(resolution, blocks, kept, (np.abs(kept) < 1) & (kept > 0.5))


def disc_view(radius: float, size: int, shade: int) -> StoredView:
    """A picture of a disc; the shade tells views of an asset apart."""
    x = voxel_centres(np.arange(size), size)
    inside = x[:, None] ** 2 + x**2 < radius**2
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[inside] = (shade, 128, 255 - shade, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return StoredView(stream.getvalue(), np.eye(4), 0.7)


def write_spheres(
    root: Path, count: int, resolution: int = 32, views: int = 3, view_size: int = 28
) -> list[SampleRef]:
    """Write a shard of spheres of different radii and return the references to its samples."""
    filesystem, base = open_filesystem(root)
    samples = []
    with ShardWriter(filesystem, f"{base}/shards/spheres") as writer:
        for i in range(count):
            radius = 0.3 + 0.6 * i / max(1, count - 1)
            asset_id = hashlib.sha256(str(i).encode()).hexdigest()
            sdf = sphere_sdf(radius, resolution)
            row = AssetRow(
                asset_id,
                f"sphere-{i}",
                "CC0-1.0",
                "",
                "sphere",
                np.zeros((3, 3), np.float32),
                np.array([[0, 1, 2]], np.int32),
                tuple(disc_view(radius, view_size, 40 * j) for j in range(views)),
            )
            asset, stored = writer.add_asset(row), writer.add_sdf(asset_id, encode_sdf(sdf))
            samples.append(
                SampleRef(
                    asset_id,
                    resolution,
                    len(sdf.blocks),
                    f"shards/spheres/{sdf_file(resolution)}",
                    stored.row_group,
                    "shards/spheres/assets.parquet",
                    asset.row_group,
                )
            )
    return samples
