"""Time, memory, errors and bytes of data preparation over a folder of meshes, ways side by side.

    python -m benchmarks.data FOLDER --out OUT --resolutions 256 512 1024 --sample 30 \
        [--dense 10] [--mesh2sdf 10] [--minutes 4]

A row a mesh and step goes to OUT/rows.jsonl as it comes; a later call leaves out what is there, so
that a long run can be done in pieces (`--minutes`). Every call ends with the tables of all rows so
far, OUT/rows.csv, and the ten assets with the lowest F-score, original beside result, in OUT/worst.

Times are CPU seconds on one core, kernels loaded. Each mesh has a process of its own, forked
before anything is read; its peak memory is reset before each conversion and includes what every
worker holds (libraries, kernels). Steps of a mesh:

- `prepare`: parsing; 24 textured views of 512 pixels; writing mesh and views to a shard.
- `sparse`: from the parsed mesh to band, watertight mesh, sharp and latent voxels, checked to be
  closed; marching cubes alone; writing to and reading from a shard.
- `dense`: the way of many public scripts: libigl's signed distance (fast winding number) on a
  grid, then its marching cubes; 128 and 256.
- `mesh2sdf`: the engine of that name (minutes a mesh); 128 and 256.

Errors of `sparse`, in voxels: of samples of the result whose nearest original face belongs to a
closed part, the distance to the original. `contradicting`: voxels, of 20,000 of the band, whose
sign is not that of the winding number of the result's mesh. This, F-score(0.001), Chamfer
and normal consistency (`tasks.metrics.surface_scores`) against the visible original
are left out above resolution `--scored`, where the trees of the results take longer than the rest.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import igl
import numpy as np
import torch
import trimesh
from PIL import Image
from pyarrow import fs

from model.marching_cubes import marching_cubes
from model.sdf import voxel_centres
from tasks.asset_work import compile_kernels
from tasks.conversion import Conversion, closed_and_oriented, convert
from tasks.mesh import Mesh, normalise
from tasks.mesh_io import read_mesh
from tasks.metrics import sample_surface, surface_scores
from tasks.rendering import render_geometry, render_views
from tasks.shards import AssetRow, ShardWriter, StoredView, read_sdf, sdf_file
from tasks.sparse_engine import weld

SUFFIXES = {".glb", ".gltf", ".obj", ".ply", ".stl", ".dae", ".3mf", ".off"}
POINTS = 30_000  # samples of each surface for errors and scores
SIGNS = 20_000  # band voxels whose sign is compared
DENSE = (128, 256)
Row = dict[str, object]


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """Return a result and the CPU seconds that it took."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def reset_peak() -> None:
    """Set the peak of this process's memory to what it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the peak of this process's memory since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(path: Path, root: Path, step: str, resolution: int, scored: int) -> Row:
    """Do one step with one mesh in this process and return its row."""
    row: Row = {"file": str(path.relative_to(root)), "step": step, "resolution": resolution}
    try:
        mesh, parse = timed(lambda: read_mesh(path, root))
        vertices = normalise(mesh.vertices)
        row |= {"faces": len(mesh.faces)}
        if step == "prepare":
            return row | {"parse": parse} | prepare(mesh, vertices)
        if step == "dense":
            return row | dense(vertices, mesh.faces, resolution)
        reset_peak()
        engine = "sparse" if step == "sparse" else "mesh2sdf"
        result, cpu = timed(lambda: convert(vertices, mesh.faces, resolution, engine))
        row |= {"cpu": cpu, "peak_mb": peak_mb()}
        return row | examine(result, vertices, mesh.faces, resolution <= scored)
    except ValueError as error:  # MeshRejectedError too
        return row | {"rejected": str(error)}


def prepare(mesh: Mesh, vertices: np.ndarray) -> Row:
    """Render and write one mesh."""
    placed = replace(mesh, vertices=vertices)
    views, render = timed(lambda: render_views(placed, 24, 512, 0))
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

        size, write_cpu = timed(write)
    return {"render": render, "write": write_cpu, "bytes": size}


def dense(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> Row:
    """Convert by libigl on a grid of all voxels."""
    reset_peak()

    def run() -> tuple[np.ndarray, np.ndarray]:
        axis = voxel_centres(np.arange(resolution), resolution)
        z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
        grid = np.stack([x, y, z], -1).reshape(-1, 3)
        kind = igl.SIGNED_DISTANCE_TYPE_FAST_WINDING_NUMBER
        values = igl.signed_distance(grid, vertices, np.asarray(faces, np.int64), kind)[0]
        return igl.marching_cubes(values, grid, resolution, resolution, resolution)[:2]

    surface, cpu = timed(run)
    row: Row = {"cpu": cpu, "peak_mb": peak_mb()}
    return row | scores(surface, vertices, faces)


def examine(result: Conversion, vertices: np.ndarray, faces: np.ndarray, scored: bool) -> Row:
    """Return what a conversion is worth, and what storing it takes."""
    sdf = result.sdf
    tensors = torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values)
    (points, triangles), cpu = timed(lambda: marching_cubes(*tensors, sdf.resolution))
    surface = points.double().numpy(), triangles.numpy()
    with tempfile.TemporaryDirectory() as folder:
        local = fs.LocalFileSystem()

        def write() -> int:
            with ShardWriter(local, folder) as writer:
                writer.add_sdf("0" * 64, sdf)
            return writer.files[sdf_file(sdf.resolution)].size

        size, write_cpu = timed(write)
        file = f"{folder}/{sdf_file(sdf.resolution)}"
        _, read_cpu = timed(lambda: read_sdf(local, file, 0))
    row: Row = {
        "marching_cubes": cpu,
        "band_voxels": sdf.band_voxels,
        "blocks": len(sdf.blocks),
        "triangles": len(triangles),
        "parts_in": result.parts_in,
        "parts_out": result.parts_out,
        "closed": result.closed,
        "sign_method": result.sign_method,
        "sign_confidence": round(result.sign_confidence, 3),
        "warnings": "; ".join(result.warnings),
        "write": write_cpu,
        "read": read_cpu,
        "bytes": size,
    }
    row |= closed_part_errors(surface, vertices, faces, sdf.resolution)
    if scored:
        row |= scores(surface, vertices, faces)
        row["contradicting"] = contradicting(result, surface)
    return row


def closed_part_errors(
    surface: tuple[np.ndarray, np.ndarray], vertices: np.ndarray, faces: np.ndarray, resolution: int
) -> Row:
    """Return the median and 99th percentile of the distance to closed parts, in voxels."""
    welded, kept = weld(vertices, np.asarray(faces, np.int64))
    mesh = trimesh.Trimesh(welded, kept, process=False)
    edges = np.sort(mesh.edges, 1)
    key = edges[:, 0] * len(welded) + edges[:, 1]
    _, edge, uses = np.unique(key, return_inverse=True, return_counts=True)
    open_face = (uses[edge] % 2 == 1).reshape(-1, 3).any(1)
    parts = trimesh.graph.connected_component_labels(mesh.edges, len(welded))[kept[:, 0]]
    is_open = np.zeros(parts.max() + 1, bool)
    is_open[parts[open_face]] = True
    positions, _ = sample_surface(*surface, POINTS, 0)
    squared, nearest, _ = igl.point_mesh_squared_distance(positions, welded, kept)
    found = np.sqrt(squared[~is_open[parts[nearest]]]) * resolution / 2
    if len(found) < POINTS // 100:
        return {}
    return {"error_median": float(np.median(found)), "error_99": float(np.percentile(found, 99))}


def scores(surface: tuple[np.ndarray, np.ndarray], vertices: np.ndarray, faces: np.ndarray) -> Row:
    """Return the scores of a result against the visible original."""
    found = surface_scores(surface, (vertices, faces), [0.001], POINTS, visible_only=True)
    kept = ("f_score_0.001", "chamfer", "normal_consistency", "accuracy_p99", "completeness_p99")
    row: Row = {name: found[name] for name in kept}
    return row | {"closed": bool(closed_and_oriented(surface[1], len(surface[0])))}


def contradicting(result: Conversion, surface: tuple[np.ndarray, np.ndarray]) -> int:
    """Count the voxels of a sample of the band whose sign is not that of the result's mesh."""
    sdf = result.sdf
    band = np.argwhere(np.abs(sdf.values) < 1)
    band = band[:: max(1, len(band) // SIGNS)]
    points = voxel_centres(sdf.blocks[band[:, 0]] * 8 + band[:, 1:], sdf.resolution)
    inside = sdf.values[tuple(band.T)] < 0
    doubtful = (igl.fast_winding_number(*surface, points) > 0.5) != inside
    if not doubtful.any():
        return 0
    exact = igl.winding_number(*surface, points[doubtful]) > 0.5  # the fast one approximates
    return int((exact != inside[doubtful]).sum())


def distribution(rows: list[Row], key: str, digits: int = 2) -> str:
    """Return median / 95th percentile / worst of a column."""
    values = np.array([row[key] for row in rows if key in row], float)
    if not len(values):
        return ""
    found = (np.median(values), np.percentile(values, 95), values.max())
    return " / ".join(f"{value:.{digits}f}" for value in found)


def middle(rows: list[Row], key: str, digits: int = 3) -> str:
    """Return the median of a column."""
    values = [row[key] for row in rows if key in row]
    return f"{np.median(values):.{digits}f}" if values else ""


def tables(rows: list[Row]) -> str:
    """Return the tables of all rows, in Markdown."""
    lines = [
        "| way | R | meshes | CPU s median / 95th / worst | peak MB median / 95th / worst | closed "
        "| F(0.001) | Chamfer | normals |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["step"]), int(row["resolution"])), []).append(row)
    done = {key: [r for r in found if "rejected" not in r] for key, found in sorted(groups.items())}
    for (step, resolution), found in done.items():
        if step == "prepare" or not found:
            continue
        closed = np.mean([bool(row["closed"]) for row in found])
        lines.append(
            f"| {step} | {resolution} | {len(found)} of {len(groups[step, resolution])} "
            f"| {distribution(found, 'cpu')} | {distribution(found, 'peak_mb', 0)} | {closed:.1%} "
            f"| {middle(found, 'f_score_0.001')} | {middle(found, 'chamfer', 5)} "
            f"| {middle(found, 'normal_consistency')} |"
        )
    lines += [
        "",
        "| sparse, R | marching cubes s median / 95th / worst | parts found | error median / 99th, "
        "closed parts (voxels, median mesh) | worst mesh | contradicting signs "
        "| KB an asset median / 95th / worst | write s | read s | MB/s of int16 read |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (step, resolution), found in done.items():
        if step != "sparse" or not found:
            continue
        exact = [row for row in found if "error_median" in row]
        worst = max((float(row["error_99"]) for row in exact), default=np.nan)
        signs = [int(row["contradicting"]) for row in found if "contradicting" in row]
        sizes = [{"kb": float(row["bytes"]) / 1e3} for row in found]
        held = [{"speed": float(r["blocks"]) * 2e-6 * 512 / float(r["read"])} for r in found]
        parts = [sum(int(row[key]) for row in found) for key in ("parts_out", "parts_in")]
        errors = f"{middle(exact, 'error_median')} / {middle(exact, 'error_99')}"
        wrong = f"{sum(signs)} of {len(signs)} meshes" if signs else ""
        cells = (
            f"{resolution}",
            distribution(found, "marching_cubes"),
            f"{parts[0]} of {parts[1]}",
            f"{errors} ({len(exact)} meshes)",
            f"{worst:.2f}",
            wrong,
            distribution(sizes, "kb", 0),
            middle(found, "write"),
            middle(found, "read"),
            middle(held, "speed", 0),
        )
        lines.append(f"| {' | '.join(cells)} |")
    found = done.get(("prepare", 0), [])
    lines += [
        "",
        "| prepare | CPU s median / 95th / worst |",
        "| --- | --- |",
        f"| parsing | {distribution(found, 'parse')} |",
        f"| 24 views of 512 px | {distribution(found, 'render')} |",
        f"| encoding and writing mesh and views | {distribution(found, 'write')} |",
        f"| bytes of mesh and views, KB | "
        f"{distribution([{'kb': float(r['bytes']) / 1e3} for r in found], 'kb', 0)} |",
    ]
    lines += ["", *at_scale(done)]
    rejected = sorted(
        {(str(row["file"]), str(row["rejected"])) for row in rows if "rejected" in row}
    )
    lines += ["", *(f"rejected: {file}: {why}" for file, why in rejected)]
    return "\n".join(lines)


def at_scale(done: dict[tuple[str, int], list[Row]], assets: int = 10_000_000) -> list[str]:
    """Return a table of means, and what so many assets would take at them."""
    lines = [
        f"| mean an asset | CPU s | MB | {assets:,} assets: core-hours | TB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (step, resolution), rows in done.items():
        if step not in ("prepare", "sparse") or not rows:
            continue
        parts = ("parse", "render", "write") if step == "prepare" else ("cpu", "write")
        seconds = np.mean([sum(float(row[part]) for part in parts) for row in rows])
        size = np.mean([float(row["bytes"]) for row in rows])
        lines.append(
            f"| {' + '.join(parts)}{f' at {resolution}' if resolution else ''} | {seconds:.2f} "
            f"| {size / 1e6:.2f} | {seconds * assets / 3600:,.0f} | {size * assets / 1e12:.1f} |"
        )
    return lines


def draw_worst(rows: list[Row], root: Path, out: Path) -> None:
    """Draw the ten assets with the lowest F-score at the highest scored resolution."""
    scored = [row for row in rows if row["step"] == "sparse" and "f_score_0.001" in row]
    if not scored:
        return
    highest = max(int(row["resolution"]) for row in scored)
    scored = [row for row in scored if row["resolution"] == highest]
    out.mkdir(exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    for place, row in enumerate(sorted(scored, key=lambda row: row["f_score_0.001"])[:10]):
        mesh = read_mesh(root / str(row["file"]), root)
        vertices = normalise(mesh.vertices)
        sdf = convert(vertices, mesh.faces, highest).sdf
        surface = marching_cubes(
            torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values), highest
        )
        pictures = [
            render_geometry(vertices, mesh.faces, 512),
            render_geometry(surface[0].numpy(), surface[1].numpy(), 512),
        ]
        name = f"{place}-{float(row['f_score_0.001']):.3f}-{Path(str(row['file'])).stem}.png"
        Image.fromarray(np.concatenate(pictures, 1)).save(out / name)


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sample", type=int, default=30, help="meshes, by digest; 0 for all")
    parser.add_argument("--dense", type=int, default=0, help="meshes for libigl's dense way")
    parser.add_argument("--mesh2sdf", type=int, default=0, help="meshes for mesh2sdf")
    parser.add_argument("--scored", type=int, default=512, help="highest resolution with scores")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["file"], row["step"], row["resolution"]) for row in rows}
    root = options.folder
    paths = sorted(
        (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES),
        key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest(),
    )
    chosen = paths[: options.sample or None]
    jobs = [(p, "prepare", 0) for p in chosen]
    jobs += [(p, "sparse", r) for r in options.resolutions for p in chosen]
    jobs += [(p, "dense", r) for r in DENSE for p in chosen[: options.dense]]
    jobs += [(p, "mesh2sdf", r) for r in DENSE for p in chosen[: options.mesh2sdf]]
    missing = [job for job in jobs if (str(job[0].relative_to(root)), *job[1:]) not in known]
    compile_kernels()
    start = time.monotonic()
    # A fresh process a mesh, forked with kernels loaded: its peak of memory is its own.
    with (
        multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool,
        log.open("a") as f,
    ):
        for path, step, resolution in missing:
            if time.monotonic() - start > options.minutes * 60:
                break
            row = pool.apply(measure, (path, root, step, resolution, options.scored))
            f.write(json.dumps(row) + "\n")
            f.flush()
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (options.out / "rows.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    wanted = {(str(p.relative_to(root)), step, r) for p, step, r in jobs}
    have = {(row["file"], row["step"], row["resolution"]) for row in rows}
    print(tables(rows))
    if wanted <= have:
        draw_worst(rows, root, options.out / "worst")
    else:
        print(f"{len(wanted - have)} of {len(wanted)} rows are missing: call again")


if __name__ == "__main__":
    main()
