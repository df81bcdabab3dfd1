"""The command line: `gigashape refresh`, `train-vae` and so on run the flows without a server.

Each flow's command takes the flow's own parameters; their help is the flow's docstring.
"""

import inspect
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from prefect import Flow
from prefect.utilities.callables import parameter_docstrings

from flows.deployments import deploy
from flows.dit import train_dit
from flows.evaluate import evaluate
from flows.generate import generate
from flows.latents import encode_latents
from flows.quickstart import quickstart
from flows.refresh import refresh_dataset
from flows.retrain import retrain
from flows.ui import serve_ui
from flows.vae import train_vae
from tasks.convert_file import convert_file
from tasks.isolation import Limits
from tasks.mesh import MeshRejectedError

app = typer.Typer(
    help="Meshes in, trained Direct3D-S2 models and generated meshes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Engine(StrEnum):
    """Names of the conversion engines, for the shell."""

    sparse = "sparse"
    mesh2sdf = "mesh2sdf"


def command_of(flow: Flow[..., Any], arguments: tuple[str, ...] = ()) -> Callable[..., None]:
    """Return a typer command with the parameters of a flow; `arguments` are positional."""
    descriptions = parameter_docstrings(inspect.getdoc(flow.fn))
    hints = get_type_hints(flow.fn)
    parameters = []
    for parameter in inspect.signature(flow.fn).parameters.values():
        # Constraints in Annotated are checked by Prefect; typer needs the bare type.
        hint = hints[parameter.name]
        help_text = descriptions.get(parameter.name, "")
        info = (
            typer.Argument(help=help_text)
            if parameter.name in arguments
            else typer.Option(help=help_text)
        )
        parameters.append(
            parameter.replace(
                annotation=Annotated[hint, info],
                kind=inspect.Parameter.KEYWORD_ONLY,
            )
        )

    def command(**values: Any) -> None:
        try:
            flow(**values)
        except Exception as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    signature = inspect.Signature(parameters)
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = (flow.description or "").split("\n\nArgs:")[0]
    return command


app.command("refresh")(command_of(refresh_dataset))
app.command("train-vae")(command_of(train_vae))
app.command("encode-latents")(command_of(encode_latents))
app.command("train-dit")(command_of(train_dit))
app.command("evaluate")(command_of(evaluate))
app.command("generate")(command_of(generate, arguments=("images",)))
app.command("retrain")(command_of(retrain))
app.command("quickstart")(command_of(quickstart))
app.command("deploy")(deploy)
app.command("ui")(serve_ui)


@app.command("convert")
def convert(
    mesh: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="Mesh: glb, gltf, obj, ply, stl, off, dae or 3mf"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the watertight mesh, a .ply")],
    resolution: Annotated[
        int, typer.Option(min=8, max=2048, help="Voxels along the axis, a multiple of 8")
    ] = 256,
    engine: Annotated[Engine, typer.Option(help="Conversion engine")] = Engine.sparse,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit")] = 900.0,
    gigabytes: Annotated[float, typer.Option(min=0.1, help="Memory limit, GiB")] = 6.0,
) -> None:
    """Convert one mesh to a watertight one and print a line of JSON; exit 2 if it is rejected."""
    if resolution % 8:
        raise typer.BadParameter(f"--resolution is {resolution}; take a multiple of 8")
    if out.suffix.lower() != ".ply":
        raise typer.BadParameter(f"--out is {out}; its name must end in .ply")
    limits = Limits(seconds, int(gigabytes * 2**30))
    try:
        facts = convert_file(mesh.resolve(), out.resolve(), resolution, engine.value, limits)
    except MeshRejectedError as error:
        typer.echo(json.dumps({"rejected": error.reason}))
        typer.echo(error.detail, err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(facts))
