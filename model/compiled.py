"""How this project compiles its numba kernels."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel, cached on disk where some place for the cache can be written.

    It compiles at its first call, releases the GIL, and is cached beside its file (or in
    NUMBA_CACHE_DIR), so that only the first process pays for it.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator available": a read-only installation without a home
        return numba.njit(nogil=True, error_model="numpy")(function)
