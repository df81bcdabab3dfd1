"""The work on one asset, in a child process under limits: read, normalise, render, convert.

`python -m tasks.asset_work` compiles its kernels into their caches on disk, as `make` does after an
installation.

Imports mesh libraries and, for a GPU, torch; `tasks.processing` names this module instead of
importing it.
"""

from collections.abc import Generator
from dataclasses import replace
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

from tasks.conversion import CONVERSION_VERSION, Conversion, best_device, convert, limit_gpu_memory
from tasks.isolation import Stage
from tasks.mesh import Mesh, MeshRejectedError, normalise
from tasks.processing import Converted, Job, Prepared, Rejected, Settings
from tasks.rendering import View, render_views
from tasks.shards import StoredView, encode_sdf
from tasks.sources import Source, open_source

# Part of a catalogue row's recipe: raise it when reading, normalising, rendering or what is stored
# of them change.
PREPARATION_VERSION = "3"


def recipe(settings: Settings) -> str:
    """Return what a catalogue row depends on beside its asset's bytes and its resolution."""
    return (
        f"preparation={PREPARATION_VERSION} conversion={CONVERSION_VERSION} "
        f"engine={settings.engine} views={settings.views}x{settings.view_size}"
    )


@lru_cache(maxsize=1)
def _source(spec: str) -> Source:
    return open_source(spec)


def process_asset(
    job: Job, settings: Settings
) -> Generator[Stage | Prepared | Rejected | Converted, None, None]:
    """Read, normalise, render and convert one asset.

    Yields stages, then `Prepared`, then a `Converted` or a `Rejected` for each resolution, lowest
    first; or one `Rejected` for all. Renders and converts on a GPU where this process sees one.
    """
    device = best_device(settings.engine)
    if device == "cuda":
        limit_gpu_memory(max(job.resolutions))
    yield Stage("load")
    try:
        mesh = _source(job.source).load(job.asset)
        mesh = replace(mesh, vertices=normalise(mesh.vertices))
        yield Stage("render")
        # Cameras differ from asset to asset and stay the same for each.
        seed = int(job.wanted.asset_id[:8], 16)
        views = render_views(mesh, settings.views, settings.view_size, seed, device)
    except MeshRejectedError as error:
        yield Rejected(None, error.reason, error.detail)
        return
    yield Prepared(
        mesh.vertices.astype(np.float32),
        mesh.faces.astype(np.int32),
        tuple(_stored(view) for view in views),
        mesh.warnings,
    )
    for resolution in sorted(job.resolutions):
        yield Stage(f"convert-{resolution}")
        try:
            yield _converted(
                convert(mesh.vertices, mesh.faces, resolution, settings.engine, device)
            )
        except MeshRejectedError as error:
            yield Rejected(resolution, error.reason, error.detail)


def _converted(conversion: Conversion) -> Converted:
    return Converted(
        encode_sdf(conversion.sdf),
        conversion.parts_in,
        conversion.parts_out,
        conversion.closed,
        conversion.sign_method,
        conversion.sign_confidence,
        conversion.warnings,
    )


def _stored(view: View) -> StoredView:
    png = BytesIO()
    Image.fromarray(view.image).save(png, "PNG")
    return StoredView(png.getvalue(), view.camera_to_world, view.fov)


def warm_up() -> None:
    """Load the kernels; on a machine where they are not yet compiled, that takes half a minute."""
    corners = np.array([[-1.0, -1, -1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    # A solid with an open sheet beside it, and then a solid whose faces leave cracks between them,
    # take every path.
    sheet = corners[:3] + np.array([3.0, 0, 0])
    vertices = normalise(np.concatenate([corners, sheet]))
    both = np.concatenate([faces, [[4, 5, 6]]])
    solid = Mesh(vertices, both, face_material=np.zeros(5, np.int32))
    render_views(solid, 1, 16, 0, best_device("sparse"))
    centres = corners[faces].mean(1, keepdims=True)
    apart = (centres + 0.97 * (corners[faces] - centres)).reshape(-1, 3)
    convert(vertices, both, 32)
    convert(normalise(apart), np.arange(12).reshape(-1, 3), 32)


if __name__ == "__main__":
    warm_up()
