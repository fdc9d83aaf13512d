"""How kernels are compiled: by Numba, without the interpreter's lock, kept on disk. None starts threads of its own:
the callers' threads call kernels, so no threading layer is ever loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Freedom that turns loops into vector code; NaN and infinity keep their meaning."""

_compile: Callable[..., Any] = partial(njit, nogil=True, cache=True, error_model="numpy")
exact_kernel = _compile()
"""For whole numbers, and where the last bit matters."""
kernel = _compile(fastmath=FAST)
kernel_without_nan = _compile(fastmath=True)
"""Where a wrong answer for NaN does no harm."""
