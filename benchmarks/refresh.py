"""A folder of meshes through whole refreshes: assets an hour, bytes, stages, and the speed-up.

    python -m benchmarks.refresh FOLDER --out OUT --resolution 512 [--workers 1 2] [--pieces 4]

Runs what the flow `refresh-dataset` runs, without Prefect: Ray, a child process an asset, 24 views
of 512 pixels, Parquet and catalogue. The folder is cut into pieces, each brought into a data folder
of its own with each number of workers, one after the other; a row a piece and number goes to
OUT/refresh.jsonl as it comes, and a later call goes on from there (`--minutes`). Ray and
the kernels are started beforehand; the workers' children start within the time measured.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from pathlib import Path

from tasks.mesh_io import EXTENSIONS, referenced_files
from tasks.ray_work import session
from tasks.refresh import RefreshConfig, refresh

Row = dict[str, object]


def meshes(root: Path) -> list[Path]:
    """Return the mesh files of a folder in an order that mixes its subfolders."""
    found = [path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS]
    return sorted(
        found, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()
    )


def copy(paths: list[Path], root: Path, to: Path) -> None:
    """Copy meshes, and what they reference, to a new folder."""
    shutil.rmtree(to, ignore_errors=True)
    for path in paths:
        for file in (path, *referenced_files(path, root)):
            target = to / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def measure(source: Path, data: Path, resolution: int, workers: int) -> Row:
    """Refresh an empty data folder and return what it took; the data goes."""
    shutil.rmtree(data, ignore_errors=True)
    config = RefreshConfig(str(data), f"folder:{source}", (resolution,), workers=workers)
    start = time.monotonic()
    report = refresh(config)
    seconds = time.monotonic() - start
    peaks = [row.peak_bytes or 0 for row in report.version.rows()]
    shutil.rmtree(data)
    return {
        "assets": len(report.plan.entries),
        "seconds": seconds,
        "bytes": report.bytes_written,
        "outcomes": report.outcomes,
        "stages": report.stage_seconds,
        "peak_bytes": max(peaks),
    }


def tables(rows: list[Row]) -> str:
    """Return throughput by resolution and workers, and the share of each stage, in Markdown."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((int(row["resolution"]), int(row["workers"])), []).append(row)
    lines = [
        "| R | workers | assets | outcomes | s | assets an hour | speed-up | MB an asset "
        "| MB of memory, worst child | share of the workers' time by stage |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (resolution, workers), found in sorted(groups.items()):
        assets = sum(int(row["assets"]) for row in found)
        seconds = sum(float(row["seconds"]) for row in found)
        outcomes, stages = Counter(), Counter()
        for row in found:
            outcomes.update(row["outcomes"])
            stages.update(row["stages"])
        shares = {name: spent / (workers * seconds) for name, spent in stages.most_common()}
        shares["waiting, planning, committing"] = 1 - sum(shares.values())
        # Of the pieces that one worker did, too.
        alone = {row["piece"]: row for row in groups.get((resolution, 1), [])}
        both = [row for row in found if row["piece"] in alone]
        speedup = ""
        if both and workers > 1:
            slow = sum(float(alone[row["piece"]]["seconds"]) for row in both)
            speedup = f"{slow / sum(float(row['seconds']) for row in both):.2f}"
        cells = (
            f"{resolution}",
            f"{workers}",
            f"{assets}",
            ", ".join(f"{count} {name}" for name, count in outcomes.items()),
            f"{seconds:.0f}",
            f"{3600 * assets / seconds:.0f}",
            speedup,
            f"{sum(int(row['bytes']) for row in found) / assets / 1e6:.2f}",
            f"{max(int(row['peak_bytes']) for row in found) / 1e6:.0f}",
            ", ".join(f"{name} {share:.1%}" for name, share in shares.items()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sample", type=int, default=0, help="meshes, by digest; 0 for all")
    parser.add_argument("--pieces", type=int, default=1, help="cut the folder into so many")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "refresh.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    root = options.folder.absolute()
    paths = meshes(root)[: options.sample or None]
    begun = time.monotonic()
    with session(max(options.workers)), log.open("a") as stream:
        for number in range(options.pieces):
            piece = f"{number + 1} of {options.pieces}, {len(paths)} meshes"
            source = options.out.absolute() / "source"
            copy(paths[number :: options.pieces], root, source)
            for workers in options.workers:
                key = {"piece": piece, "resolution": options.resolution, "workers": workers}
                if any(key.items() <= row.items() for row in rows):
                    continue
                if time.monotonic() - begun > options.minutes * 60:
                    break
                data = options.out.absolute() / "data"
                row = key | measure(source, data, options.resolution, workers)
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                rows.append(row)
    print(tables(rows))


if __name__ == "__main__":
    main()
