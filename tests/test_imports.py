"""The house's rules on imports, read from the sources."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.conversion import has_driver

PROJECT = Path(__file__).resolve().parent.parent
LAYERS = ["flows", "tasks", "model", "kernels"]
MESH_MODULES = (
    "tasks/mesh",  # mesh_io.py and the readers, mesh_inspection.py, mesh2sdf_engine.py
    "tasks/metrics.py",
    "tasks/pictures.py",
    "tasks/rendering.py",
)
# library: the files or folders that may import it
HOMES = {
    "prefect": ("flows/", "tasks/"),
    "ray": ("flows/", "tasks/"),
    "mlflow": ("tasks/tracking.py",),
    "triton": ("kernels/",),
    "spconv": ("model/convolution.py",),
    **dict.fromkeys(("trimesh", "igl", "embreex", "mesh2sdf"), MESH_MODULES),
}


def sources() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((PROJECT / layer).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_run_one_way(path: Path) -> None:
    file = path.relative_to(PROJECT).as_posix()
    layer = LAYERS.index(file.split("/")[0])
    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert not packages & set(LAYERS[:layer]), f"{file} imports from a layer above it"
    for library, homes in HOMES.items():
        if library in packages:
            assert file.startswith(homes), f"{file} imports {library}, which belongs in {homes}"


@pytest.mark.parametrize("layer", [*LAYERS, "configs"])
def test_packages_are_ours(layer: str) -> None:
    module = importlib.import_module(layer)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == PROJECT / layer


@pytest.mark.skipif(has_driver(), reason="with a GPU the work needs torch")
def test_work_on_an_asset_holds_no_large_library_on_a_cpu() -> None:
    """Torch and pandas would take 250 MB of every worker's child."""
    script = (
        "import sys; from tasks import asset_work; asset_work.warm_up(); "
        "print(*({'torch', 'pandas', 'ray', 'prefect', 'mlflow'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []
