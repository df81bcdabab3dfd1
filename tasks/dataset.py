"""A dataset version as training and people see it: sample references, and its summary in MLflow."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tasks.catalogue import DatasetVersion, Row
from tasks.pictures import contact_sheet
from tasks.refresh import RefreshReport
from tasks.samples import SampleRef
from tasks.shards import read_image, sdf_file
from tasks.storage import open_filesystem
from tasks.tracking import Run

SHEET_ASSETS = 64


def samples_of(version: DatasetVersion) -> list[SampleRef]:
    """Return the references to a version's ready rows; tokens are latent voxels.

    Raises ValueError when it has none.
    """
    samples = [_sample(row) for row in version.rows() if row.status == "ready"]
    if not samples:
        raise ValueError(
            f"dataset version {version.name} of {version.root} has no ready asset: look at the "
            "reasons in the catalogue or in the MLflow run of its refresh"
        )
    return samples


def _sample(row: Row) -> SampleRef:
    assert row.latent_voxels is not None
    assert row.row_group is not None
    assert row.assets_row_group is not None
    return SampleRef(
        asset_id=row.asset_id,
        resolution=row.resolution,
        tokens=row.latent_voxels,
        path=f"shards/{row.shard}/{sdf_file(row.resolution)}",
        row_group=row.row_group,
        views_path=f"shards/{row.shard}/assets.parquet",
        views_row_group=row.assets_row_group,
    )


def log_dataset(run: Run, version: DatasetVersion, context: str) -> None:
    """Log a dataset version as the input of a run."""
    run.log_dataset("gigashape", version.number, version.digest, version.root, context)


def log_summary(run: Run, report: RefreshReport) -> None:
    """Log what a refresh did: counts, reasons, distributions, times, a sheet of renders."""
    version, rows = report.version, report.version.rows()
    ready = [row for row in rows if row.status == "ready"]
    log_dataset(run, version, "refresh")
    counts = {f"rows/{status}": 0.0 for status in ("ready", "rejected", "failed")}
    for row in rows:
        counts[f"rows/{row.status}"] += 1
    run.log_metrics(
        counts
        | {f"plan/{action}": float(n) for action, n in report.plan.counts().items()}
        | {f"seconds/{name}": value for name, value in report.seconds.items()}
        | {f"work_seconds/{name}": value for name, value in report.stage_seconds.items()}
        | {"changed_share": report.changed_share, "bytes_written": float(report.bytes_written)}
    )
    columns = ("uris", "resolution", "status", "reason", "detail", "warnings", "seconds_convert")
    shown = [{name: getattr(row, name) for name in ("asset_id", *columns)} for row in rows]
    run.log_table(shown, "assets")
    run.log_table([row for row in shown if row["status"] != "ready"], "not_ready")
    run.log_text(report.plan.table(), "plan.txt")
    if ready:
        run.log_picture("distributions", _histograms(ready))
        run.log_picture("renders", _renders(version.root, ready))


def _histograms(rows: Sequence[Row]) -> Image.Image:
    """Draw band voxels, latent voxels, faces and conversion times, a colour a resolution."""
    from matplotlib.figure import Figure  # half a second at the start of every other flow

    names = {
        "band_voxels": "band voxels",
        "latent_voxels": "latent voxels (tokens)",
        "faces": "triangles of the source",
        "seconds_convert": "conversion, s",
    }
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        for resolution in sorted({row.resolution for row in rows}):
            values = np.array([getattr(r, name) for r in rows if r.resolution == resolution])
            axes.hist(values, bins=20, alpha=0.6, label=str(resolution))
        axes.set_xlabel(label)
        axes.set_ylabel("assets")
    axes.legend(title="resolution")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


def _renders(root: str, rows: Sequence[Row]) -> Image.Image:
    """Tile the first view of up to 64 assets."""
    filesystem, base = open_filesystem(root)
    first = list({row.asset_id: row for row in rows}.values())[:SHEET_ASSETS]
    samples = [_sample(row) for row in first]
    images = [
        read_image(filesystem, f"{base}/{s.views_path}", s.views_row_group, 0) for s in samples
    ]
    labels = [f"{row.category} {row.uris[0].split('/')[-1]}".strip() for row in first]
    return contact_sheet(images, 8, labels)
