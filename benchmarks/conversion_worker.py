"""What a refresh's child process takes for a mesh, on a CPU core and with a GPU, one after another.

    python -m benchmarks.conversion_worker OUT/*.npz --resolutions 512 [--devices cpu cuda]

Meshes come from `benchmarks/conversion_gpu.py export`. A job is a refresh's but for reading and
writing: 24 views of 512 pixels, conversion, encoding, under the limits of `tasks/refresh.py`. Rows
of one mesh must hold the same pictures and bytes. Needs torch, triton, numba, numpy, scipy, Pillow,
psutil and pyarrow.
"""

import argparse
import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.conversion import Device, convert, limit_gpu_memory
from tasks.isolation import IsolatedFunction, Limits, Stage
from tasks.mesh import Mesh
from tasks.rendering import render_views
from tasks.shards import encode_sdf

VIEWS, VIEW_SIZE = 24, 512
TETRAHEDRON = np.array([[-0.9, -0.9, -0.9], [0.9, 0.9, -0.9], [0.9, -0.9, 0.9], [-0.9, 0.9, 0.9]])


def warm_up() -> None:
    """Load the kernels of both devices; called in the child, see tasks.isolation."""
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    devices: tuple[Device, ...] = ("cpu", "cuda")
    for device in devices[: 1 + torch.cuda.is_available()]:
        render_views(Mesh(TETRAHEDRON, faces), 1, 16, 0, device)
        convert(TETRAHEDRON, faces, 64, device=device)


def work(path: Path, resolution: int, device: Device) -> Iterator[Stage | dict[str, Any]]:
    """Render, convert and encode one mesh as `tasks.asset_work` does."""
    yield Stage("load")
    if device == "cuda":
        limit_gpu_memory(resolution)
        torch.cuda.reset_peak_memory_stats()
    with np.load(path) as mesh:
        vertices, faces = mesh["vertices"], mesh["faces"].astype(np.int64)
    yield Stage("render")
    views = render_views(Mesh(vertices, faces), VIEWS, VIEW_SIZE, 0, device)
    rendered = torch.cuda.max_memory_allocated() >> 20
    yield Stage("convert")
    conversion = convert(vertices, faces, resolution, device=device)
    yield Stage("encode")
    encoded = encode_sdf(conversion.sdf)
    pictures = hashlib.sha256(b"".join(view.image.tobytes() for view in views))
    field = hashlib.sha256(encoded.codes.tobytes() + encoded.sharp.tobytes())
    yield {
        "pictures": pictures.hexdigest()[:12],
        "field": field.hexdigest()[:12],
        "closed": conversion.closed,
        "gpu_mb_render": rendered,
        "gpu_mb": torch.cuda.max_memory_allocated() >> 20,
    }


def main() -> None:
    """Print one line of JSON a mesh, resolution and device, and medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512])
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="limit of the child, GiB")
    args = parser.parse_args()
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    taken: dict[str, list[float]] = defaultdict(list)
    limits = Limits(900.0, int(args.gigabytes * 2**30))
    with IsolatedFunction("benchmarks.conversion_worker:work", limits) as child:
        for resolution in args.resolutions:
            for path in args.paths:
                for device in args.devices:
                    outcome = child.run(path, resolution, device)
                    row = {stage: round(t, 3) for stage, t in outcome.seconds.items()}
                    row |= {"peak_mb": outcome.peak_bytes >> 20}
                    if outcome.failure is not None:
                        row |= {"failed": f"{outcome.failure.reason}: {outcome.failure.detail}"}
                    else:
                        (found,) = outcome.values
                        row |= found
                        for stage in ("render", "convert", "encode"):
                            key = f"{resolution} {device} {stage}"
                            taken[key].append(outcome.seconds[stage])
                    named = {"mesh": path.stem, "resolution": resolution, "device": device}
                    print(json.dumps(named | row), flush=True)
    for key, seconds in taken.items():
        print(f"{key}: median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
