"""An object store holds a dataset as a folder does: a real S3 protocol, served on this machine."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from pyarrow import fs

from tasks.catalogue import open_version
from tasks.mirror import Mirror, read_mirror, write_mirror
from tasks.refresh import RefreshConfig, plan_refresh
from tasks.shards import read_image, read_sdf, sdf_file, verify_file
from tasks.storage import open_filesystem

# A process of its own, whose Ray workers know the store.
REFRESH = """
import sys; sys.path[:] = {path!r}
from tasks.refresh import RefreshConfig, refresh
refresh(RefreshConfig({root!r}, "procedural:2", (32,), views=2, view_size=28, workers=1))
"""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a data folder that is not there yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # In a process of its own: delta-rs waits for answers with Python's lock held.
    server = subprocess.Popen(
        [Path(sys.executable).parent / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    retries = Config(retries={"total_max_attempts": 20, "mode": "standard"})
    boto3.client("s3", config=retries).create_bucket(Bucket="meshes")
    yield "s3://meshes/deep/data"
    server.kill()
    server.wait()


def test_a_refresh_writes_to_an_object_store(root: str) -> None:
    script = REFRESH.format(path=sys.path, root=root)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = open_version(root).rows()
    assert [row.status for row in rows] == ["ready", "ready"]
    filesystem, base = open_filesystem(root)
    assert isinstance(filesystem, fs.S3FileSystem)
    for row in rows:
        folder = f"{base}/shards/{row.shard}"
        verify_file(filesystem, f"{folder}/{sdf_file(32)}", str(row.sdf_sha256))
        sdf = read_sdf(filesystem, f"{folder}/{sdf_file(32)}", row.row_group or 0)
        assert len(sdf.blocks) == row.latent_voxels
        image = read_image(filesystem, f"{folder}/assets.parquet", row.assets_row_group or 0, -1)
        assert image[..., 3].any()
    config = RefreshConfig(root, "procedural:2", (32,), views=2, view_size=28)
    assert plan_refresh(config).counts() == {"unchanged": 2}
    mirror = Mirror("procedural:2", "tiny", (32,), "sparse", None)
    write_mirror(root, mirror)
    assert read_mirror(root) == mirror
