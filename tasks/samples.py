"""References to training samples, and the Parquet file that carries a list of them.

A plain list is all that training needs to know of a dataset version, so that a machine without
the catalogue's library can train from an index file. Needs pyarrow only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

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


def split_of(asset_id: str, held_out: float) -> Literal["train", "test"]:
    """Return an asset's side; held_out: share of the assets on the `test` side, in [0, 1].

    It depends on its identity (a SHA-256) and the share alone, so that an asset never changes sides
    between dataset versions, and every resolution of it lies on the same one.
    """
    return "test" if int(asset_id[:8], 16) / 0x1_0000_0000 < held_out else "train"


def split(samples: Sequence[SampleRef], held_out: float) -> tuple[list[SampleRef], list[SampleRef]]:
    """Return the samples for training and those of held-out assets, by `split_of`."""
    sides: dict[str, list[SampleRef]] = {"train": [], "test": []}
    for sample in samples:
        sides[split_of(sample.asset_id, held_out)].append(sample)
    return sides["train"], sides["test"]
