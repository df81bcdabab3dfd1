"""References to training samples, and the Parquet file that carries a list of them.

A plain list is all that training needs to know of a dataset version, so that a machine without
the catalogue's library can train from an index file. Needs pyarrow only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tasks.storage import atomic_file


@dataclass(frozen=True)
class SampleRef:
    """Where one training sample lies; paths are relative to the data folder.

    tokens: what it counts against a token budget: latent voxels, or the cells of a dense latent.
    path, row_group: its SDF, or its latents. views_path, views_row_group: its pictures.
    """

    asset_id: str
    resolution: int
    tokens: int
    path: str
    row_group: int
    views_path: str
    views_row_group: int


_SCHEMA = pa.schema(
    [
        ("asset_id", pa.string()),
        ("resolution", pa.int32()),
        ("tokens", pa.int64()),
        ("path", pa.string()),
        ("row_group", pa.int32()),
        ("views_path", pa.string()),
        ("views_row_group", pa.int32()),
    ]
)


def write_index(
    filesystem: fs.FileSystem,
    path: str,
    samples: Sequence[SampleRef],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write references, in their order, and what is to be known of them all, as one file."""
    table = pa.Table.from_pylist([asdict(s) for s in samples], _SCHEMA.with_metadata(metadata))
    with atomic_file(filesystem, path) as sink:
        pq.write_table(table, sink, compression="zstd")


def read_index(filesystem: fs.FileSystem, path: str) -> tuple[list[SampleRef], dict[str, str]]:
    """Return the references and the metadata that `write_index` wrote."""
    with filesystem.open_input_file(path) as file:
        table = pq.read_table(file)
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    return [SampleRef(**row) for row in table.to_pylist()], metadata


def split(samples: Sequence[SampleRef], held_out: float) -> tuple[list[SampleRef], list[SampleRef]]:
    """Return the samples for training and those of held-out assets.

    An asset's side depends on its identity and the share alone, so that it never changes sides
    between dataset versions, and every resolution of it lies on the same one.
    """
    training: list[SampleRef] = []
    kept_out: list[SampleRef] = []
    for sample in samples:
        first = int(sample.asset_id[:8], 16) / 0x1_0000_0000
        (kept_out if first < held_out else training).append(sample)
    return training, kept_out
