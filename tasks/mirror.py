"""What a data folder mirrors: the choices of its last refresh, which the next one goes on with.

A nightly refresh that names no source must bring the folder up to date with the one it has, not
replace it by an example. Written to `refresh.json` once a refresh has ended well.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from pyarrow import fs

from tasks.storage import atomic_file, open_filesystem

FILE = "refresh.json"


@dataclass(frozen=True)
class Mirror:
    """The choices of a refresh.

    source: as `open_source` takes it, with an absolute path. preset: a name, or the absolute path
    of a .toml file. resolutions: voxels along an axis. engine: of the conversion. licences: those
    kept, None for all.
    """

    source: str
    preset: str
    resolutions: tuple[int, ...]
    engine: Literal["sparse", "mesh2sdf"]
    licences: tuple[str, ...] | None


def read_mirror(root: str) -> Mirror | None:
    """Return what a data folder mirrors; None before its first refresh."""
    filesystem, path = open_filesystem(root)
    if filesystem.get_file_info(f"{path}/{FILE}").type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(f"{path}/{FILE}") as stream:
        found = json.loads(stream.read())
    licences = found["licences"]
    return Mirror(
        found["source"],
        found["preset"],
        tuple(found["resolutions"]),
        found["engine"],
        None if licences is None else tuple(licences),
    )


def write_mirror(root: str, mirror: Mirror) -> None:
    """Record what a data folder, which must exist, mirrors from now on."""
    filesystem, path = open_filesystem(root)
    with atomic_file(filesystem, f"{path}/{FILE}") as sink:
        sink.write(json.dumps(asdict(mirror), indent=1).encode())
