"""How kernels are compiled: by Numba, without the interpreter's lock, kept on disk. None starts threads: a `Codec` has
its own. Numba checks no index, so every kernel that reads a stream does."""

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit

kernel: Callable[..., Any] = partial(njit, nogil=True, cache=True, error_model="numpy")()
"""No freedom of floating point: an encoder must compute what a decoder will."""
