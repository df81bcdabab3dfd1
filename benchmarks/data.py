"""Time, memory, errors and bytes of data preparation over a folder of meshes, ways side by side.

    python -m benchmarks.data FOLDER --out OUT --resolutions 256 512 1024 --sample 30 \
        [--studies 10] [--dense 10] [--mesh2sdf 10] [--minutes 4]

A row a mesh and step goes to OUT/rows.jsonl as it comes; a later call leaves out what is there, so
that a long run can be done in pieces (`--minutes`). Every call ends with the tables of all rows so
far and OUT/rows.csv; the one that has all rows logs them to MLflow (experiment `benchmark-data`,
`--mlflow`), with the ten assets of the lowest F-score, original beside result, also in OUT/worst.

Times are CPU seconds on one core, kernels loaded. The work is done in a child process that serves
one mesh after another, under limits, as a refresh does it; its peak memory is reset before each
conversion and includes what every worker holds (libraries, kernels). A mesh that the pipeline
rejects is a row `rejected`; whatever else goes wrong is one `failed`, done again by the next call.
Steps of a mesh:

- `prepare`: parsing; 24 textured views of 512 pixels; writing mesh and views to a shard.
- `prepare-paper` (`--studies` meshes): the same with the `paper` preset's 45 views of 1024 pixels.
- `sparse`: from the parsed mesh to band, watertight mesh, sharp and latent voxels, checked to be
  closed; marching cubes alone; writing to and reading from a shard; `benchmarks.data_checks`.
- `bits-N`, `interpolated` (`--studies` meshes): the field stored with N bits a value, and the field
  interpolated from one of twice the resolution, beside the one converted.
- `dense`: the way of many public scripts: libigl's signed distance (fast winding number) on a
  grid, then its marching cubes; 128 and 256.
- `mesh2sdf`: the engine of that name (minutes a mesh); 128 and 256.

F-score(0.001), Chamfer and normal consistency (`tasks.metrics.surface_scores`) against the visible
original are left out above resolution `--scored`, where the trees of the results take longer than
the rest.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import igl
import numpy as np
import torch
from PIL import Image
from pyarrow import fs

from benchmarks.data_checks import (
    Original,
    contradictions,
    halved,
    parts_found,
    storage_at,
    surface_errors,
)
from benchmarks.data_tables import Row, tables, worst
from model.marching_cubes import marching_cubes
from model.sdf import SparseSDF, voxel_centres
from tasks import asset_work
from tasks.conversion import Conversion, closed_and_oriented, convert
from tasks.isolation import IsolatedFunction, Limits
from tasks.mesh import Mesh, MeshRejectedError, normalise
from tasks.mesh_io import EXTENSIONS, read_mesh, referenced_files
from tasks.metrics import Surface, surface_scores
from tasks.rendering import render_geometry, render_views
from tasks.shards import AssetRow, ShardWriter, StoredView, encode_sdf, read_sdf, sdf_file

POINTS = 30_000  # samples of each surface for scores
DENSE = (128, 256)
VIEWS = {"prepare": (24, 512), "prepare-paper": (45, 1024)}
BITS = (8, 10, 12, 16)
LIMITS = Limits(1800, 12 * 2**30)  # mesh2sdf takes minutes; the checks' trees take memory


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """Return a result and the CPU seconds that it took."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def reset_peak() -> None:
    """Set the peak of this process's memory to what it needs now (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what the last mesh left in the allocator is not this one's
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the peak of this process's memory since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


warm_up = asset_work.warm_up  # called in the child, see tasks.isolation


@lru_cache(maxsize=1)
def original(path: Path, root: Path) -> Original:
    """Return a mesh as the checks see it; steps of one mesh follow each other."""
    mesh = read_mesh(path, root)
    return Original.of(normalise(mesh.vertices), mesh.faces)


def measure(
    path: Path, root: Path, step: str, resolution: int, scored: int
) -> Iterator[Row | np.ndarray]:
    """Do one step with one mesh in this process; yields its row, or the picture of step `draw`."""
    row: Row = {"file": str(path.relative_to(root)), "step": step, "resolution": resolution}
    try:
        mesh, parse = timed(lambda: read_mesh(path, root))
        vertices = normalise(mesh.vertices)
        row |= {"faces": len(mesh.faces)}
        if step in VIEWS:
            files = (path, *referenced_files(path, root))
            row |= {"parse": parse, "source_bytes": sum(file.stat().st_size for file in files)}
            yield row | prepare(mesh, vertices, *VIEWS[step])
        elif step == "draw":
            surface = convert(vertices, mesh.faces, resolution).surface
            both = (vertices, mesh.faces), surface
            yield np.concatenate([render_geometry(*shape, 512) for shape in both], 1)
        elif step == "dense":
            yield row | dense(vertices, mesh.faces, resolution)
        elif step == "interpolated":
            sdf = halved(convert(vertices, mesh.faces, 2 * resolution).sdf)
            yield row | interpolated(sdf, vertices, mesh.faces, original(path, root))
        elif step.startswith("bits-"):
            result = convert(vertices, mesh.faces, resolution)
            yield row | storage_at(result.sdf, result.surface, int(step.removeprefix("bits-")))
        else:
            reset_peak()
            engine = "sparse" if step == "sparse" else "mesh2sdf"
            result, cpu = timed(lambda: convert(vertices, mesh.faces, resolution, engine))
            row |= {"cpu": cpu, "peak_mb": peak_mb()} | examine(result, original(path, root))
            if resolution <= scored:
                row |= scores(result.surface, vertices, mesh.faces)
            yield row
    except MeshRejectedError as error:
        yield row | {"rejected": str(error)}


def prepare(mesh: Mesh, vertices: np.ndarray, count: int, size: int) -> Row:
    """Render `count` views of `size` pixels of one mesh and write it with them."""
    placed = replace(mesh, vertices=vertices)
    views, render = timed(lambda: render_views(placed, count, size, 0))
    with tempfile.TemporaryDirectory() as folder:

        def write() -> int:
            stored = []
            for view in views:
                file = Path(folder) / "view.png"
                Image.fromarray(view.image).save(file)
                stored.append(StoredView(file.read_bytes(), view.camera_to_world, view.fov))
            with ShardWriter(fs.LocalFileSystem(), folder) as writer:
                writer.add_asset(
                    AssetRow("0" * 64, "", "", "", "", vertices, mesh.faces, tuple(stored))
                )
            return writer.files["assets.parquet"].size

        written, write_cpu = timed(write)
    return {"render": render, "write": write_cpu, "bytes": written}


def dense(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Row:
    """Convert by libigl on a grid of all voxels."""
    reset_peak()

    def run() -> Surface:
        axis = voxel_centres(np.arange(resolution), resolution)
        z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
        grid = np.stack([x, y, z], -1).reshape(-1, 3)
        kind = igl.SIGNED_DISTANCE_TYPE_FAST_WINDING_NUMBER
        values = igl.signed_distance(grid, vertices, np.asarray(faces, np.int64), kind)[0]
        return igl.marching_cubes(values, grid, resolution, resolution, resolution)[:2]

    surface, cpu = timed(run)
    row: Row = {"cpu": cpu, "peak_mb": peak_mb()}
    if not len(surface[1]):
        raise MeshRejectedError("no_surface", "no sample of the grid is inside")
    closed = bool(closed_and_oriented(surface[1], len(surface[0])))
    return row | {"closed": closed} | scores(surface, vertices, faces)


def interpolated(sdf: SparseSDF, vertices: np.ndarray, faces: np.ndarray, truth: Original) -> Row:
    """Return what an interpolated field's surface is worth."""
    tensors = torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values)
    points, triangles = marching_cubes(*tensors, sdf.resolution)
    surface = points.numpy(), triangles.numpy()
    if not len(triangles):
        return {
            "closed": False,
            "parts": parts_found(truth, truth.surface, sdf.resolution)[0],
            "parts_found": 0,
            "f_score_0.001": 0.0,
        }
    parts, found = parts_found(truth, surface, sdf.resolution)
    closed = bool(closed_and_oriented(surface[1], len(points)))
    row: Row = {"closed": closed, "parts": parts, "parts_found": found}
    return row | scores(surface, vertices, faces)


def examine(result: Conversion, truth: Original) -> Row:
    """Return what a conversion is worth, and what storing it takes."""
    sdf = result.sdf
    tensors = torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values)
    _, cpu = timed(lambda: marching_cubes(*tensors, sdf.resolution))
    with tempfile.TemporaryDirectory() as folder:
        local = fs.LocalFileSystem()

        def write() -> int:
            with ShardWriter(local, folder) as writer:
                writer.add_sdf("0" * 64, encode_sdf(sdf))
            return writer.files[sdf_file(sdf.resolution)].size

        size, write_cpu = timed(write)
        file = f"{folder}/{sdf_file(sdf.resolution)}"
        _, read_cpu = timed(lambda: read_sdf(local, file, 0))
    parts, found = parts_found(truth, result.surface, sdf.resolution)
    row: Row = {
        "marching_cubes": cpu,
        "band_voxels": sdf.band_voxels,
        "blocks": len(sdf.blocks),
        "triangles": len(result.surface[1]),
        "parts": parts,
        "parts_found": found,
        "parts_in": result.parts_in,
        "parts_out": result.parts_out,
        "closed": result.closed,
        "sign_method": result.sign_method,
        "sign_confidence": round(result.sign_confidence, 3),
        "warnings": "; ".join(result.warnings),
        "write": write_cpu,
        "read": read_cpu,
        "bytes": size,
        "contradictions": contradictions(sdf, result.surface),
    }
    return row | surface_errors(truth, result.surface, sdf.resolution)


def scores(surface: Surface, vertices: np.ndarray, faces: np.ndarray) -> Row:
    """Return the scores of a result against the visible original."""
    found = surface_scores(surface, (vertices, faces), [0.001], POINTS, visible_only=True)
    kept = ("f_score_0.001", "chamfer", "normal_consistency", "accuracy_p99", "completeness_p99")
    return {name: found[name] for name in kept}


def read_rows(log: Path) -> dict[tuple[str, str, int], Row]:
    """Return the newest row of each mesh and step; failed ones are done again."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines]
    newest = {(row["file"], row["step"], row["resolution"]): row for row in rows}
    return {key: row for key, row in newest.items() if "failed" not in row}


def steps_of(place: int, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the steps, with their resolutions, of the mesh at a place of the order."""
    steps = [("prepare", 0), *(("sparse", r) for r in options.resolutions)]
    if place < options.studies:
        steps.append(("prepare-paper", 0))
        steps += [(f"bits-{bits}", r) for r in options.resolutions for bits in BITS]
        steps += [("interpolated", r) for r in options.resolutions if 2 * r in options.resolutions]
    steps += [("dense", r) for r in DENSE if place < options.dense]
    steps += [("mesh2sdf", r) for r in DENSE if place < options.mesh2sdf]
    return steps


def draw(
    child: IsolatedFunction, root: Path, rows: list[Row], options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Return pictures of the worst assets by name, original beside result."""
    pictures = {}
    for place, row in enumerate(worst(rows)):
        path = root / str(row["file"])
        outcome = child.run(path, root, "draw", row["resolution"], options.scored)
        if outcome.failure is not None:
            raise RuntimeError(f"drawing {row['file']} failed: {outcome.failure.detail}")
        name = f"{place}-{float(row['f_score_0.001']):.3f}-{path.stem}"
        pictures[name] = outcome.values[0]
    return pictures


def publish(
    text: str,
    rows: list[Row],
    pictures: dict[str, np.ndarray],
    name: str,
    options: argparse.Namespace,
) -> None:
    """Write the pictures to OUT/worst, and them and the tables to an MLflow run."""
    from tasks.tracking import start_run, tracking_uri  # the child has no need of half a GB

    folder = options.out / "worst"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    uri = options.mlflow or tracking_uri(options.out)
    with start_run("benchmark-data", name, uri, vars(options)) as run:
        run.log_text(text, "tables.md")
        run.log_table(rows, "rows")
        run.log_table(worst(rows), "worst")
        for title, picture in pictures.items():
            Image.fromarray(picture).save(folder / f"{title}.png")
            run.log_picture(f"worst/{title}", picture)
    print(f"MLflow run {run.run_id} in {uri}")


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sample", type=int, default=30, help="meshes, by digest; 0 for all")
    parser.add_argument("--studies", type=int, default=0, help="meshes for bits and interpolation")
    parser.add_argument("--dense", type=int, default=0, help="meshes for libigl's dense way")
    parser.add_argument("--mesh2sdf", type=int, default=0, help="meshes for mesh2sdf")
    parser.add_argument("--scored", type=int, default=512, help="highest resolution with scores")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after this")
    parser.add_argument("--mlflow", help="tracking URI; SQLite in OUT without it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "rows.jsonl"
    rows = read_rows(log)
    root = options.folder.absolute()
    paths = sorted(
        (p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS),
        key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest(),
    )
    wanted = {
        (str(path.relative_to(root)), step, resolution): (path, step, resolution)
        for place, path in enumerate(paths[: options.sample or None])
        for step, resolution in steps_of(place, options)
    }
    start = time.monotonic()
    # Children import this module by name, which `python -m` does not give it.
    with IsolatedFunction("benchmarks.data:measure", LIMITS) as child, log.open("a") as f:
        for key in [key for key in wanted if key not in rows]:
            if time.monotonic() - start > options.minutes * 60:
                break
            path, step, resolution = wanted[key]
            outcome = child.run(path, root, step, resolution, options.scored)
            if outcome.failure is not None:
                why = f"{outcome.failure.reason}: {outcome.failure.detail}"
                found: Row = dict(zip(("file", "step", "resolution"), key, strict=True))
                rows[key] = found | {"failed": why}
            else:
                (rows[key],) = outcome.values
            f.write(json.dumps(rows[key]) + "\n")
            f.flush()
        kept = list(rows.values())
        columns = list(dict.fromkeys(column for row in kept for column in row))
        with (options.out / "rows.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(kept)
        text = tables(kept)
        print(text)
        missing = [key for key in wanted if key not in rows]
        if missing:
            print(f"{len(missing)} of {len(wanted)} rows are missing: call again")
            return
        pictures = draw(child, root, kept, options)
    publish(text, kept, pictures, root.name, options)


if __name__ == "__main__":
    main()
