"""How kernels share the cores: they start no threads of their own, `Team` calls them on parts of the work."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Team:
    """Threads that take the parts 0 .. size - 1 of a piece of work at the same time; results do not depend on size."""

    def __init__(self, size: int = 0) -> None:
        """size: threads; 0: as many as torch uses."""
        self.size = size or min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self.size - 1) if self.size > 1 else None

    def __call__(self, act: Callable[[int, int], None], count: int) -> None:
        """act(begin, end) for consecutive parts of range(count), one a thread."""
        cuts = [count * n // self.size for n in range(self.size + 1)]
        others = [self._pool.submit(act, cuts[n], cuts[n + 1]) for n in range(1, self.size)] if self._pool else []
        act(cuts[0], cuts[1])
        for other in others:
            other.result()
