"""A trainer: takes a bucket from rank 0, trains it by its threads, gives it back; until there is none left."""

import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from puna.errors import RankFailed, RanksDiffer
from puna.graph.links import COUNTER, JOIN_SECONDS, Link, Lost, Meeting
from puna.graph.parameters import SharedParameters
from puna.graph.serving import shared_arrays
from puna.graph.task import GraphTask, Unit
from puna.graph.worker import Part

LAST_WORDS_SECONDS = 1.0  # for the launcher to see that the server is gone before it sees what follows from it
TOLD = 4  # settings that differ


def train(meeting: Meeting, facts: Mapping[str, Any], folder: Path, make: Callable[[], "Trainer"]) -> None:
    """Join the run, make the trainer, work to the end of the run.

    facts: in which it must agree with the server. folder: the graph's. Raises RanksDiffer, and RankFailed where the
    server is not there or is gone.
    """
    try:
        buckets, parameters = _join(meeting, facts)
        with _alone_in(folder):
            trainer = make()
        with _wish_to_leave() as wish:
            trainer.work(buckets, parameters, wish)
    except Lost as lost:
        time.sleep(LAST_WORDS_SECONDS)
        raise RankFailed(f"the server met at {meeting} is not there, or has given this trainer up ({lost})") from None


def _join(meeting: Meeting, facts: Mapping[str, Any]) -> tuple[Link, Link]:
    store = meeting.open()
    number = store.add(COUNTER, 1)
    buckets, parameters = (Link(store, f"{number}/{what}", 1) for what in ("buckets", "parameters"))
    buckets.tell({"facts": facts, "name": f"process {os.getpid()} on {socket.gethostname()}"})
    differ = buckets.hear(JOIN_SECONDS)["differ"]
    if differ:
        told = "; ".join(f"{key} is {facts.get(key)!r} here, {value!r} there" for key, value in differ.items())
        raise RanksDiffer(f"this trainer would not train what the server at {meeting} does: {told}")
    return buckets, parameters


class Trainer(GraphTask):
    """`GraphTask` that holds the partitions of one bucket, which come from the server and go back to it."""

    def work(self, buckets: Link, parameters: Link, wish: list[int]) -> None:
        """Train until the server has no more, or until there is a `wish` to leave. Raises Lost."""
        held: dict[int, Part] = {}
        words: dict[str, Any] = {}
        with SharedParameters(parameters, shared_arrays(self)) as shared:
            while True:
                buckets.tell(words)
                for partition in sorted(set(words.get("bucket", ()))):
                    buckets.send(held[partition].vectors, held[partition].sums)
                answer = buckets.hear()
                if answer["unit"] is None:
                    if answer.get("lost"):
                        raise Lost("it was silent for too long")
                    return
                began = time.perf_counter()
                unit = Unit(**answer["unit"] | {"bucket": tuple(answer["unit"]["bucket"])})
                held = self._parts(unit, held, answer["fetched"])
                for partition in answer["fetched"]:
                    buckets.receive(held[partition].vectors, held[partition].sums)
                swapped = {"swap_s": time.perf_counter() - began, "swaps": len(answer["fetched"])}
                shared.exchange()
                parts = [self.table.by_type(partition, held[partition]) for partition in unit.bucket]
                loss = self._train(unit, self._edges(unit.share), *parts)
                shared.exchange()
                words = {"bucket": unit.bucket, "tokens": unit.tokens, "loss": loss, "leaves": bool(wish), **swapped}

    def _parts(self, unit: Unit, held: dict[int, Part], fetched: list[int]) -> dict[int, Part]:
        """Partitions of a unit: those that stay, and room for those that come, in the memory of those that leave."""
        stay = {p: part for p, part in held.items() if p in unit.bucket and p not in fetched}
        spare = [part for p, part in held.items() if p not in stay]
        return stay | {p: self._room(p, spare) for p in fetched}

    def _room(self, partition: int, spare: list[Part]) -> Part:
        rows = self.table.rows(partition)
        fitting = next((part for part in spare if len(part.vectors) == rows), None)
        if fitting is None:
            return Part.room(rows, self.config.dim)
        spare[:] = [part for part in spare if part is not fitting]
        return fitting


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process of a machine at a time sorts edges into buckets, or finds that another one has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _wish_to_leave() -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGINT are noted: the bucket is trained to its end and given back."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
