"""Where trainers come in: each has two links, for buckets and for parameters, and two threads that wait on them.

Threads only move bytes. What trainers ask for becomes a queue of events, which one thread answers.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.graph.links import COUNTER, Link, Lost, Meeting
from puna.graph.parameters import ParameterServer
from puna.graph.worker import Part

LOOK_SECONDS = 0.1  # between looks for trainers that have come
END: dict[str, Any] = {"unit": None}


@dataclass(frozen=True)
class Answer:
    """What a trainer gets: words, and the partitions that it asked for."""

    words: Mapping[str, Any]
    parts: Sequence[Part] = ()


@dataclass
class Guest:
    """A trainer as the server knows it."""

    number: int
    name: str  # host and process
    answers: "queue.Queue[Answer]" = field(default_factory=queue.Queue)
    held: dict[int, int] = field(default_factory=dict)  # versions of the partitions that it has in memory
    dismissed: bool = False
    gone: bool = False


@dataclass(frozen=True)
class Event:
    """A trainer has joined or is gone; or it wants a bucket, and may have one to give back."""

    kind: str  # joined, wants, gone
    guest: Guest
    words: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[int, Part] = field(default_factory=dict)  # trained, of the bucket that it gives back


class Door:
    """Lets trainers in while it is open; `events` is what they do."""

    def __init__(
        self,
        meeting: Meeting,
        facts: Mapping[str, Any],
        room: Callable[[int], Part],
        parameters: ParameterServer,
    ) -> None:
        """facts: in which trainers and server must agree. room: memory for a partition that comes back."""
        self.events: queue.Queue[Event] = queue.Queue()
        self._meeting, self._room, self._parameters = meeting, room, parameters
        self._facts = json.loads(json.dumps(facts))
        self._closed = threading.Event()
        self._store = meeting.open()
        self._threads: list[threading.Thread] = []
        self._start(self._let_in, "door")

    def close(self) -> None:
        """Let nobody in any more; who is inside learns at the next exchange of parameters that the run is over."""
        self._closed.set()
        self._parameters.stopped = True

    def join(self, deadline: float) -> None:
        """Wait for the threads, until `deadline` (monotonic) at most: a process that ends under one in gloo aborts."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, target: Callable[..., None], name: str, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _let_in(self) -> None:
        number = 0
        while not self._closed.wait(LOOK_SECONDS):
            come = int(self._store.get(COUNTER)) if self._store.check([COUNTER]) else 0
            while number < come:
                number += 1
                self._start(self._meet, f"trainer {number}", number)

    def _meet(self, number: int) -> None:
        try:
            store = self._meeting.open()
            buckets, parameters = (Link(store, f"{number}/{what}", 0) for what in ("buckets", "parameters"))
            words = buckets.hear()
            differing = [key for key in self._facts if words["facts"].get(key) != self._facts[key]]
            buckets.tell({"differ": {key: self._facts[key] for key in differing}})
        except Lost:  # it was gone before it was in
            return
        if differing:
            return
        guest = Guest(number, words["name"])
        self.events.put(Event("joined", guest))
        self._start(self._exchange, f"parameters {number}", guest, parameters)
        self._attend(guest, buckets)

    def _exchange(self, guest: Guest, link: Link) -> None:
        why = ""
        try:
            self._parameters.serve(link)
        except Lost as lost:
            why = str(lost)
        self.events.put(Event("gone", guest, {"why": why}))

    def _attend(self, guest: Guest, link: Link) -> None:
        why = ""
        try:
            while not guest.dismissed:
                words = link.hear()
                parts = {partition: self._room(partition) for partition in sorted(set(words.get("bucket", ())))}
                for part in parts.values():
                    link.receive(part.vectors, part.sums)
                self.events.put(Event("wants", guest, words, parts))
                answer = guest.answers.get()
                link.tell(answer.words)
                for part in answer.parts:
                    link.send(part.vectors, part.sums)
                guest.dismissed = answer.words["unit"] is None
        except Lost as lost:
            why = str(lost)
        self.events.put(Event("gone", guest, {"why": why}))


def wait_for(events: "queue.Queue[Event]", seconds: float) -> Event | None:
    """The next event; None where none comes within `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            return events.get(timeout=min(left, LOOK_SECONDS))  # short, so that signals are seen
        except queue.Empty:
            continue
    return None
