"""The cache of compiled kernels sees changes in every file that a kernel calls into."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from model import compiled

KERNEL = "from model.compiled import compiled\n{imports}\n@compiled\ndef {name}(x):\n    {body}\n"


def test_a_changed_callee_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    package = tmp_path / "model"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(compiled.__file__, package)
    outer = KERNEL.format(
        imports="from model.inner import inner", name="outer", body="return inner(x)"
    )
    (package / "outer.py").write_text(outer)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}

    def results(factor: int) -> list[str]:
        inner = KERNEL.format(imports="", name="inner", body=f"return x * {factor}")
        (package / "inner.py").write_text(inner)
        script = (
            "from model.outer import outer; print(outer(7), sum(outer.stats.cache_hits.values()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert results(2) == ["14", "0"]
    assert results(2) == ["14", "1"]
    assert results(3) == ["21", "0"]
