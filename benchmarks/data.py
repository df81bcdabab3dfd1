"""Time, memory and errors of mesh conversion over a folder of meshes, engines side by side.

    python -m benchmarks.data FOLDER --resolutions 128 256 --sample 20 [--mesh2sdf 3]

Time is CPU and wall seconds from the parsed mesh to the band, its sharp voxels and the check of
its surface; each mesh runs in a process of its own, so that peak memory is the mesh's own. Kernels
are loaded beforehand. `error` is the distance of the surface's vertices to the original triangles,
in voxels; the table gives its median and 99th percentile (the median mesh) over the meshes without
shells and caps, which stand off on purpose.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Literal

import igl
import numpy as np
import torch
import trimesh

from model.marching_cubes import marching_cubes
from tasks.conversion import convert
from tasks.mesh import normalise
from tasks.mesh_io import read_mesh

Engine = Literal["sparse", "mesh2sdf"]
SUFFIXES = {".glb", ".gltf", ".obj", ".ply", ".stl", ".dae", ".3mf", ".off"}


def measure(path: Path, root: Path, resolution: int, engine: Engine) -> dict[str, object]:
    """Convert one mesh in this process and return its row."""
    torch.set_num_threads(1)
    ball = trimesh.creation.icosphere(1)
    convert(normalise(np.array(ball.vertices)), np.array(ball.faces), 32)
    row: dict[str, object] = {
        "file": str(path.relative_to(root)),
        "engine": engine,
        "resolution": resolution,
    }
    try:
        mesh = read_mesh(path, root)
        vertices = normalise(mesh.vertices)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu, wall = time.process_time(), time.perf_counter()
        result = convert(vertices, mesh.faces, resolution, engine)
        row |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    except ValueError as error:
        return row | {"rejected": str(error)}
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row["loaded_mb"] = before / 1024
    sdf = result.sdf
    surface = marching_cubes(
        torch.from_numpy(sdf.blocks), torch.from_numpy(sdf.values), resolution
    )[0]
    points = surface[:: max(1, len(surface) // 20_000)].double().numpy()
    squared = igl.point_mesh_squared_distance(points, vertices, mesh.faces)[0]
    stands_off = np.sqrt(squared) * resolution / 2
    return row | {
        "faces": len(mesh.faces),
        "band_voxels": sdf.band_voxels,
        "blocks": len(sdf.blocks),
        "parts_in": result.parts_in,
        "parts_out": result.parts_out,
        "closed": result.closed,
        "sign_method": result.sign_method,
        "sign_confidence": round(result.sign_confidence, 3),
        "thin": any(w.startswith("thin") for w in result.warnings),
        "error_median": float(np.median(stands_off)),
        "error_99": float(np.percentile(stands_off, 99)),
    }


def summarise(rows: list[dict], engine: str, resolution: int) -> str:
    """Return one line of the table for an engine and a resolution."""
    chosen = [r for r in rows if r["engine"] == engine and r["resolution"] == resolution]
    done = [r for r in chosen if "rejected" not in r]
    if not done:
        return f"| {engine} | {resolution} | 0 of {len(chosen)} | | | | | | |"

    def column(key: str) -> np.ndarray:
        return np.array([r[key] for r in done], dtype=float)

    cpu = column("cpu")
    exact = [r for r in done if not r["thin"] and r["sign_method"] != "flood+winding"]
    errors = (
        [np.median([r[k] for r in exact]) for k in ("error_median", "error_99")] if exact else []
    )
    parts = f"{column('parts_out').sum():.0f} of {column('parts_in').sum():.0f}"
    return (
        f"| {engine} | {resolution} | {len(done)} of {len(chosen)} | {np.median(cpu):.2f} / "
        f"{np.percentile(cpu, 95):.2f} / {cpu.max():.2f} | {column('peak_mb').max():.0f} | "
        f"{column('closed').mean():.0%} | {parts} | {' / '.join(f'{e:.3f}' for e in errors)} |"
    )


def main() -> None:
    """Print a row of JSON a mesh, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--sample", type=int, default=20, help="meshes, evenly chosen; 0 for all")
    parser.add_argument(
        "--mesh2sdf", type=int, default=0, help="meshes for mesh2sdf (minutes each)"
    )
    options = parser.parse_args()
    paths = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if options.sample:
        paths = paths[:: max(1, len(paths) // options.sample)]
    jobs = [(p, options.folder, r, "sparse") for r in options.resolutions for p in paths]
    jobs += [
        (p, options.folder, r, "mesh2sdf")
        for r in options.resolutions
        if r <= 256
        for p in paths[: options.mesh2sdf]
    ]
    rows = []
    # A fresh process a mesh: its peak of memory is that of this mesh alone.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for job in jobs:
            row = pool.apply(measure, job)
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(
        "\n| engine | R | meshes | CPU s median / 95th / worst | peak MB | closed | parts | error |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for engine, resolution in dict.fromkeys((str(j[3]), j[2]) for j in jobs):
        print(summarise(rows, engine, resolution))


if __name__ == "__main__":
    main()
