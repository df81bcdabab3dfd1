"""The command line: `gigashape refresh`, `train-vae` and so on run the flows without a server.

Each flow's command takes the flow's own parameters; their help is the flow's docstring.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

# command: (module, function). A command's module is imported when it is asked for: all of them
# together take many seconds.
COMMANDS = {
    "refresh": ("flows.refresh", "refresh_dataset"),
    "train-vae": ("flows.vae", "train_vae"),
    "encode-latents": ("flows.latents", "encode_latents"),
    "train-dit": ("flows.dit", "train_dit"),
    "evaluate": ("flows.evaluate", "evaluate"),
    "generate": ("flows.generate", "generate"),
    "retrain": ("flows.retrain", "retrain"),
    "quickstart": ("flows.quickstart", "quickstart"),
    "convert": ("flows.convert", "convert"),
    "deploy": ("flows.deployments", "deploy"),
    "ui": ("flows.ui", "serve_ui"),
}
ENVIRONMENT = {
    # Nothing that we run calls home.
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A temporary server needs half a minute on two busy cores.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # What our modules log is part of a run's log; prefect.yaml says so to workers.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
}
ARGUMENTS = ("images",)  # the flows' parameters that the shell gives without a name


def main() -> None:
    """Run the command that the shell names; without one, say what there is."""
    app = typer.Typer(
        help="Meshes in, trained Direct3D-S2 models and generated meshes out.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)  # or else a lone command would lose its name
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name in [wanted] if wanted in COMMANDS else COMMANDS:
        module, function = COMMANDS[name]
        found = getattr(importlib.import_module(module), function)
        app.command(name)(found if inspect.isfunction(found) else command_of(found))
    app()


def command_of(flow: Any) -> Callable[..., None]:
    """Return a typer command with the parameters of a Prefect flow."""
    from prefect.utilities.callables import parameter_docstrings

    descriptions = parameter_docstrings(inspect.getdoc(flow.fn))
    hints = get_type_hints(flow.fn)  # without the constraints in Annotated: Prefect checks them
    parameters = []
    for parameter in inspect.signature(flow.fn).parameters.values():
        kind = typer.Argument if parameter.name in ARGUMENTS else typer.Option
        info = kind(help=descriptions.get(parameter.name, ""))
        parameters.append(
            parameter.replace(
                annotation=Annotated[_for_typer(hints[parameter.name]), info],
                kind=inspect.Parameter.KEYWORD_ONLY,
            )
        )

    def command(**values: Any) -> None:
        try:
            flow(**values)
        except Exception as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = (inspect.getdoc(flow.fn) or "").split("\n\nArgs:")[0]
    return command


def _for_typer(hint: Any) -> Any:
    """Return lists of literals as lists of texts: typer has no such type, and Prefect checks."""
    if get_origin(hint) is list and get_origin(get_args(hint)[0]) is Literal:
        return list[str]
    if get_origin(hint) is UnionType:
        return Union[tuple(_for_typer(member) for member in get_args(hint))]  # noqa: UP007
    return hint
