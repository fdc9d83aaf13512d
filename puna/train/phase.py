"""Where the training thread of this process stands: phase, unit, samples. Marked as it goes, read by the watchdog."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LONG_PHASES = frozenset({"start", "evaluation", "checkpoint"})  # may take much longer than a step


class Place:
    """Where a thread stands; only that thread's marks count, so that a thread that saves aside changes nothing."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.phases = ["start"]  # the outer one first: ["checkpoint", "collective"]
        self.unit = 0  # units of work done
        self.samples: Sequence[Any] = ()
        self.since = time.monotonic()
        self.changed: Callable[[], None] = lambda: None

    def mark(self, phases: list[str]) -> None:
        """Stand in `phases` from now on."""
        if threading.get_ident() == self.thread:
            self.phases, self.since = phases, time.monotonic()
            self.changed()

    def __str__(self) -> str:
        inner = self.phases if self.phases[0] == "start" else self.phases[1:] or self.phases
        return " in ".join(reversed(inner))


here = Place()


def enter(phase: str) -> None:
    """An outermost phase begins, and whatever was before it is over."""
    here.mark([phase])


def begin_unit(unit: int, samples: Sequence[Any]) -> None:
    """The step after `unit` done units begins, on these samples; its own phases are marked inside."""
    here.unit, here.samples = unit, samples
    here.mark(["other work"])


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Inside (or in a function so decorated), this phase. An error leaves it standing: that is where it happened."""
    before = here.phases
    here.mark([*before, phase])
    yield
    here.mark(before)
