"""Threads that share the batches of a bucket, each with buffers of its own (HOGWILD: the tables have no locks)."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

NUM_ALONE = 20
"""Batches that one worker trains before the others begin, where rows are new. A row's first gradient can be a hundred
times its later ones (under cos it grows as the vector shrinks), and Adagrad never forgets it: two workers that both
take a row's first step from where it began leave it twice as far off, and slower for good."""

W = TypeVar("W")


class Workers(Generic[W]):
    """Threads, and what each of them works with."""

    def __init__(self, own: Sequence[W], num_threads: int = 1) -> None:
        """own: one for each thread. num_threads: that torch's operators have in each."""
        self.own, self.num_threads = own, num_threads
        self._pool = ThreadPoolExecutor(len(own), "worker")

    def share(self, num_batches: int, train: Callable[[W, int], None], num_alone: int = 0) -> None:
        """train(worker, n) for every batch n, by whichever thread is free; the first `num_alone` by one of them."""
        todo, lock = iter(range(num_batches)), threading.Lock()

        def work(worker: W, most: int) -> None:
            torch.set_num_threads(self.num_threads)
            for _ in range(most):
                with lock:
                    n = next(todo, None)
                if n is None:
                    return
                train(worker, n)

        if num_alone:
            self._pool.submit(work, self.own[0], num_alone).result()
        list(self._pool.map(work, self.own, [num_batches] * len(self.own)))
