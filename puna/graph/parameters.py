"""What all buckets share (relations): kept by a parameter server, trained on by every trainer on a copy of its own.

A trainer sends how its copy has changed since it last did, and gets what all trainers' changes have come to; it does so
while batches run, without locks, and around every bucket. An Adagrad sum is a sum of changes too.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np
import numpy.typing as npt

from puna.graph.links import Link, Lost

Floats = npt.NDArray[np.float32]
BYTES_PER_SECOND = 1e8  # a trainer's exchanges take no more of the network than this, each way
LEAST_SECONDS, MOST_SECONDS = 0.1, 1.0  # between two exchanges while a bucket trains
LEASE_SECONDS = 60.0  # silence after which a trainer has lost its bucket; exchanges are its signs of life
JOINING_SECONDS = 1800.0  # the same before its first exchange: it may have to sort edges into buckets
GO_ON, LEAVE = 0, 1


class ParameterServer:
    """Adds up changes. `values`: the live arrays, which a checkpoint saves."""

    def __init__(self, values: Sequence[Floats], lease_s: float) -> None:
        self.values, self.lease_s = values, lease_s
        self.stopped = False
        self._lock = threading.Lock()

    def serve(self, link: Link) -> None:
        """One trainer's exchanges, to its end. Raises Lost where it is gone or silent for longer than its lease."""
        word = np.zeros(1, np.int64)
        changes = [np.empty_like(value) for value in self.values]
        limit = JOINING_SECONDS
        while not self.stopped:
            link.receive(word, seconds=limit)
            if word[0] == LEAVE:
                return
            link.receive(*changes, seconds=self.lease_s)
            with self._lock:
                for value, change in zip(self.values, changes, strict=True):
                    value += change
                    change[...] = value
            word[0] = LEAVE if self.stopped else GO_ON
            link.send(word, *changes)
            limit = self.lease_s


class SharedParameters:
    """A trainer's copy, in place: `values` are the arrays that its workers change. Inside, a thread exchanges them."""

    def __init__(self, link: Link, values: Sequence[Floats]) -> None:
        self.values = values
        self._link, self._lock, self._over = link, threading.Lock(), threading.Event()
        self._known = [value.copy() for value in values]
        self._fresh = [np.empty_like(value) for value in values]
        num_bytes = sum(value.nbytes for value in values)
        self._pause = min(MOST_SECONDS, max(LEAST_SECONDS, num_bytes / BYTES_PER_SECOND))
        self._thread = threading.Thread(target=self._keep_exchanging, name="parameters", daemon=True)

    def exchange(self) -> None:
        """Send this copy's changes, take the others'. Ends the process where the run is over. Raises Lost."""
        with self._lock:
            own = [value.copy() for value in self.values]
            self._link.send(np.array([GO_ON]), *map(_change, own, self._known))
            word = np.zeros(1, np.int64)
            self._link.receive(word, *self._fresh)
            if word[0] == LEAVE:
                os._exit(0)
            for value, before, fresh in zip(self.values, own, self._fresh, strict=True):
                value += _change(fresh, before)
            self._known, self._fresh = self._fresh, self._known

    def _keep_exchanging(self) -> None:
        while not self._over.wait(self._pause):
            try:
                self.exchange()
            except Lost:
                return  # the main thread will notice

    def __enter__(self) -> "SharedParameters":
        self.exchange()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        with suppress(Lost):  # the server may have left first
            self._link.send(np.array([LEAVE]))


def _change(now: Floats, before: Floats) -> Floats:
    """now - before; nothing where both are infinite, as the sums of rows that are to stay are."""
    change = np.zeros_like(now)
    return np.subtract(now, before, out=change, where=np.isfinite(before))
