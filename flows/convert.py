"""`gigashape convert`: one mesh file to a watertight one, without a dataset or a server."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tasks.isolation import IsolatedFunction, Limits
from tasks.mesh import MeshRejectedError


class Engine(StrEnum):
    """Names of the conversion engines, for the shell."""

    sparse = "sparse"
    mesh2sdf = "mesh2sdf"


def convert(
    mesh: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="Mesh: glb, gltf, obj, ply, stl, off, dae or 3mf"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the watertight mesh, a .ply")],
    resolution: Annotated[
        int, typer.Option(min=32, max=2048, help="Voxels along the axis, a multiple of 8")
    ] = 256,
    engine: Annotated[Engine, typer.Option(help="Conversion engine")] = Engine.sparse,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit")] = 900.0,
    gigabytes: Annotated[float, typer.Option(min=0.1, help="Memory limit, GiB")] = 6.0,
) -> None:
    """Convert one mesh to a watertight one and print a line of JSON; exit 2 if it is rejected.

    The work happens in a child process under limits. seconds: from the parsed mesh to band,
    watertight mesh, sharp and latent voxels; peak_bytes: of the whole child, libraries included.
    """
    if resolution % 8:
        raise typer.BadParameter(f"--resolution is {resolution}; take a multiple of 8")
    if out.suffix.lower() != ".ply":
        raise typer.BadParameter(f"--out is {out}; its name must end in .ply")
    limits = Limits(seconds, int(gigabytes * 2**30))
    with IsolatedFunction("tasks.convert_file:convert_file", limits) as child:
        outcome = child.run(mesh.resolve(), out.resolve(), resolution, engine.value)
    if outcome.failure is not None:
        reject(outcome.failure.reason, outcome.failure.detail)
    (facts,) = outcome.values
    if isinstance(facts, MeshRejectedError):
        reject(facts.reason, facts.detail)
    measured = {
        "seconds": round(outcome.seconds["convert"], 3),
        "peak_bytes": outcome.peak_bytes,
    }
    typer.echo(json.dumps(measured | facts))


def reject(reason: str, detail: str) -> None:
    """Print the reason as JSON, the detail to stderr, and exit with status 2."""
    typer.echo(json.dumps({"rejected": reason}))
    typer.echo(detail, err=True)
    raise typer.Exit(2)
