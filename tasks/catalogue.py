"""The catalogue: a Delta table with a row an asset and resolution, and its versions.

The catalogue is the truth about a dataset: what was converted how, what was not and why, and where
the arrays are. A commit adds one version; a version never changes, and stays readable. A dataset
version is named by its Delta version and a digest over its rows, such as `v3-1f0c9a52be7d`.
"""

import hashlib
import types
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from tasks.storage import list_files, open_filesystem

Key = tuple[str, int]  # asset_id, resolution

# Columns that say what a version holds, not how long it took or how it was packed into files.
_DIGESTED = (
    "asset_id",
    "resolution",
    "status",
    "reason",
    "split",
    "recipe",
    "sdf_digest",
    "asset_digest",
)


class CatalogueError(RuntimeError):
    """A catalogue that cannot be read or that moved on under a refresh."""


def _column(description: str, unit: str = "", **default: Any) -> Any:
    return field(metadata={"description": description, "unit": unit}, **default)


@dataclass(frozen=True)
class Row:
    """One asset at one resolution. What does not apply (a rejected asset's voxels) is None."""

    asset_id: str = _column("SHA-256 of the source bytes, hex")
    resolution: int = _column("voxels along an axis")
    uris: tuple[str, ...] = _column("every place in the source where these bytes are")
    status: str = _column("ready; rejected: unfit as data; failed: crashed or beyond its limits")
    recipe: str = _column("what the row depends on beside the asset's bytes")
    source: str = _column("source of the first uri")
    split: str = _column("train or test, by asset_id")
    licence: str = _column("as the source states it", default="")
    attribution: str = _column("as the source states it", default="")
    category: str = _column("as the source states it", default="")
    limits: str = _column("time and memory that the work was given", default="")
    reason: str = _column("code of why the row is not ready", default="")
    detail: str = _column("the reason in words, with figures", default="")
    stage: str = _column("where the work stood when it failed", default="")
    warnings: tuple[str, ...] = _column("`code: detail` of what was odd", default=())
    faces: int | None = _column("triangles of the source mesh", default=None)
    parts_in: int | None = _column("connected parts before conversion", default=None)
    parts_out: int | None = _column("connected parts of the converted surface", default=None)
    closed: bool | None = _column("whether the converted surface is closed", default=None)
    sign_method: str | None = _column("how inside and outside were told apart", default=None)
    sign_confidence: float | None = _column("how sure the sign is, 0 to 1", default=None)
    band_voxels: int | None = _column("voxels with |sdf| < tau", default=None)
    latent_voxels: int | None = _column("active 8^3 blocks: tokens of the VAE", default=None)
    seconds_load: float | None = _column(
        "reading and normalising, once for all resolutions", "second", default=None
    )
    seconds_render: float | None = _column(
        "rendering the views, once for all resolutions", "second", default=None
    )
    seconds_convert: float | None = _column("conversion at this resolution", "second", default=None)
    peak_bytes: int | None = _column(
        "most resident memory of the process during the asset, libraries included",
        "byte",
        default=None,
    )
    shard: str | None = _column("folder under shards/", default=None)
    row_group: int | None = _column("of sdf-<resolution>.parquet", default=None)
    assets_row_group: int | None = _column("of assets.parquet", default=None)
    sdf_digest: str | None = _column("SHA-256 of the stored distances", default=None)
    asset_digest: str | None = _column("SHA-256 of the stored mesh and views", default=None)
    sdf_sha256: str | None = _column("SHA-256 of sdf-<resolution>.parquet", default=None)
    assets_sha256: str | None = _column("SHA-256 of assets.parquet", default=None)

    @property
    def key(self) -> Key:
        """What makes the row unique."""
        return self.asset_id, self.resolution


def _schema() -> pa.Schema:
    plain = {
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        bool: pa.bool_(),
        tuple[str, ...]: pa.list_(pa.string()),
    }
    hints = get_type_hints(Row)
    columns = []
    for item in fields(Row):
        kind = hints[item.name]
        optional = get_origin(kind) is types.UnionType
        arrow = plain[get_args(kind)[0] if optional else kind]
        metadata = {name: text for name, text in item.metadata.items() if text}
        columns.append(pa.field(item.name, arrow, nullable=optional, metadata=metadata))
    return pa.schema(columns)


SCHEMA = _schema()


def storable(text: str) -> str:
    """Return text as UTF-8 can hold it: a file's name may have bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Return rows as an Arrow table with the catalogue's schema."""
    safe = (replace(r, detail=storable(r.detail), warnings=_safe(r.warnings)) for r in rows)
    return pa.Table.from_pylist([asdict(row) for row in safe], SCHEMA)


def _safe(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(storable(text) for text in texts)


def from_table(table: pa.Table) -> list[Row]:
    """Return an Arrow table's rows."""
    lists = ("uris", "warnings")
    return [Row(**{**row, **{n: tuple(row[n]) for n in lists}}) for row in table.to_pylist()]


@dataclass(frozen=True)
class DatasetVersion:
    """One version of a data folder's catalogue; immutable."""

    root: str
    number: int
    digest: str

    @property
    def name(self) -> str:
        """What other things call this version, such as `v3-1f0c9a52be7d`."""
        return f"v{self.number}-{self.digest[:12]}"

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows as an Arrow table, sorted by asset and resolution."""
        return _read(_open(self.root, self.number)).select(columns or SCHEMA.names)

    def rows(self) -> list[Row]:
        """Return the rows, sorted by asset and resolution."""
        return from_table(self.table())


def _uri(root: str) -> str:
    return f"{root.rstrip('/')}/catalogue"


def _open(root: str, number: int | None) -> DeltaTable:
    try:
        return DeltaTable(_uri(root), version=number)
    except TableNotFoundError:
        raise CatalogueError(
            f"{root} holds no dataset: run `gigashape refresh` with this data folder first"
        ) from None


def _read(table: DeltaTable) -> pa.Table:
    rows = table.to_pyarrow_table()
    if set(rows.column_names) != set(SCHEMA.names):
        differing = sorted(set(rows.column_names) ^ set(SCHEMA.names))
        raise CatalogueError(
            f"the catalogue in {table.table_uri} was written by another version of gigashape "
            f"(columns {', '.join(differing)}): refresh into a new data folder"
        )
    order = [("asset_id", "ascending"), ("resolution", "ascending")]
    return rows.select(SCHEMA.names).cast(SCHEMA).sort_by(order)


def _version(root: str, table: DeltaTable) -> DatasetVersion:
    digest = hashlib.sha256()
    rows = _read(table)
    for name in _DIGESTED:
        digest.update("\n".join([name, *map(str, rows[name].to_pylist())]).encode())
    return DatasetVersion(root, table.version(), digest.hexdigest())


def exists(root: str) -> bool:
    """Tell whether a data folder has a catalogue."""
    return DeltaTable.is_deltatable(_uri(root))


def create(root: str) -> DatasetVersion:
    """Return the newest version; where there is none, version 0, which is empty."""
    # Delta would forget old versions after a month.
    forever = {
        "delta.enableExpiredLogCleanup": "false",
        "delta.logRetentionDuration": "interval 36500 days",
        "delta.deletedFileRetentionDuration": "interval 36500 days",
    }
    DeltaTable.create(_uri(root), SCHEMA, mode="ignore", configuration=forever)
    return open_version(root)


def open_version(root: str, version: int | str | None = None) -> DatasetVersion:
    """Return a dataset version by its number or its name; the newest for None.

    Raises CatalogueError when there is none, or when a name's digest is not that of its rows.
    """
    number = int(version.removeprefix("v").split("-")[0]) if isinstance(version, str) else version
    newest = _open(root, None)
    if number is not None and not 0 <= number <= newest.version():
        raise CatalogueError(f"{root} has versions 0 to {newest.version()}, not {version}")
    table = newest if number is None else _open(root, number)
    found = _version(root, table)
    if isinstance(version, str) and not found.name.startswith(version):
        raise CatalogueError(
            f"version {number} in {root} is {found.name}, not {version}: it is another data folder"
        )
    return found


def commit(base: DatasetVersion, rows: Sequence[Row], gone: Sequence[Key]) -> DatasetVersion:
    """Add one version: base with these rows put in place and the gone ones taken out.

    Only files with such rows are rewritten. Raises CatalogueError when base is not the newest any
    more; nothing is written then.
    """
    if not rows and not gone:
        return base
    deleted = pa.field("deleted", pa.bool_())
    source = to_table(rows).append_column(deleted, pa.array([False] * len(rows), pa.bool_()))
    removals = [{"asset_id": asset_id, "resolution": resolution} for asset_id, resolution in gone]
    nullable = pa.schema([item.with_nullable(True) for item in source.schema])
    removed = pa.Table.from_pylist([{**key, "deleted": True} for key in removals], nullable)
    columns = {name: f"source.{name}" for name in SCHEMA.names}
    table = _open(base.root, base.number)
    try:
        (
            table.merge(
                pa.concat_tables([source.cast(nullable), removed]),
                "target.asset_id = source.asset_id AND target.resolution = source.resolution",
                source_alias="source",
                target_alias="target",
                commit_properties=CommitProperties(max_commit_retries=0),
            )
            .when_matched_delete("source.deleted")
            .when_matched_update(columns)
            .when_not_matched_insert(columns)
            .execute()
        )
    except CommitFailedError as error:
        raise CatalogueError(
            f"another refresh added a version to {base.root} while this one, which started from "
            f"v{base.number}, was at work. Finished assets are kept: run it again"
        ) from error
    return _version(base.root, table)


def referenced_shards(root: str) -> set[str]:
    """Return the shards that any version refers to."""
    filesystem, path = open_filesystem(root)
    files = [
        f"{path}/catalogue/{name}"
        for name in list_files(filesystem, f"{path}/catalogue")
        if name.endswith(".parquet") and not name.startswith("_delta_log/")
    ]
    if not files:
        return set()
    import pyarrow.dataset as pads  # brings pandas: 60 MB that every worker's child would hold

    table = pads.dataset(files, filesystem=filesystem).to_table(columns=["shard"])
    # Not unique(): on the string views that delta-rs writes, it makes '' of null (pyarrow 25).
    return set(table["shard"].to_pylist()) - {None}
