"""How kernels share the cores: they start no threads of their own, `Team` calls them on parts of the work."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPENMP = ctypes.CDLL(None)  # torch has loaded the one that it uses where every library finds it
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Team:
    """Threads that take the parts 0 .. size - 1 of a piece of work at the same time.

    They are the OpenMP threads of torch's own operators: those wait for their next work awake, and would keep others
    off the cores. Without OpenMP the parts come one after the other.
    """

    def __init__(self, size: int = 0) -> None:
        """size: threads; 0: as many as torch uses."""
        self.size = size or min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        self._parallel = getattr(_OPENMP, "GOMP_parallel", None) if self.size > 1 else None

    def __call__(self, act: Callable[[int, int], None], count: int) -> None:
        """act(begin, end) for consecutive parts of range(count), one a thread."""
        if not self._parallel:
            act(0, count)
            return
        shares = self.shares(count)
        failures: list[BaseException] = []

        def region(_: object) -> None:
            try:
                for n in range(_OPENMP.omp_get_thread_num(), self.size, _OPENMP.omp_get_num_threads()):
                    act(*shares[n])
            except BaseException as failure:
                failures.append(failure)

        self._parallel(_REGION(region), None, self.size, 0)
        if failures:
            raise failures[0]

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Begin and end of each thread's part of range(count)."""
        return [(count * n // self.size, count * (n + 1) // self.size) for n in range(self.size)]

    def on_parts(self, act: Callable[..., Any], *whole: Any) -> list[Any]:
        """act(part of each) for as many parts of all samples as there are threads, each of which works alone.

        A tensor (its first dim: samples) is cut; a list has its parts already. What one operator of a part leaves is
        then near the core that reads it, and no thread waits for another after each.
        """
        parts = [x.tensor_split(self.size) if isinstance(x, Tensor) else x for x in whole]
        found: list[Any] = [None] * self.size

        def some(begin: int, end: int) -> None:
            for n in range(begin, end):
                found[n] = act(*(part[n] for part in parts))

        self(some, self.size)
        return found
