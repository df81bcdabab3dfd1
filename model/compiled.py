"""How this project compiles its numba kernels."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

# Files without kernels whose constants kernels hold.
CONSTANTS = ("tolerances.py", "sdf.py", "sparse_common.py")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel, cached on disk where some place for the cache can be written.

    It compiles at its first call, releases the GIL, and is cached beside its file (or in
    NUMBA_CACHE_DIR), so that only the first process pays for it, until a kernel's source changes.
    """
    try:
        kernel: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator available": a read-only installation without a home
        return numba.njit(nogil=True, error_model="numpy")(function)
    # numba looks at the kernel's own file only: a cached kernel would keep the old code of those
    # that it calls in other files.
    kernel._cache._cache_file._source_stamp = sources_digest()
    return kernel


@cache
def sources_digest() -> bytes:
    """Return a SHA-256 over every file with kernels, and over those whose constants they hold."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    files = [
        path for layer in ("kernels", "model", "tasks") for path in (root / layer).glob("*.py")
    ]
    for path in sorted(files):
        source = path.read_bytes()
        if b"model.compiled" in source or path.name in CONSTANTS:
            digest.update(source)
    return digest.digest()
