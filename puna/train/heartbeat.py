"""What a rank says of itself, and what its machine says of it: a line in a file, stacks, the state of a process."""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from puna.train.phase import here

SAMPLES_TOLD = 8
FRAMES_TOLD = 20

State = Literal["running", "ended", "failed"]


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands, in one line."""

    rank: int
    role: str
    host: str
    machine: str  # the same for processes that see each other's /proc
    pid: int
    number: int  # grows while the process runs, whatever its main thread does
    state: State
    phase: str
    unit: int  # units of work done
    seconds: float  # in this phase
    samples: list[Any]
    error: str


class Pulse:
    """Writes this rank's heartbeat to a file, over the one before."""

    def __init__(self, path: Path, rank: int) -> None:
        self.number, self.error = 0, ""
        self.state: State = "running"
        role = os.environ.get("ROLE_NAME", "trainer")
        who = {"rank": rank, "role": role, "host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        self._who = json.dumps(who).removesuffix("}")
        self._samples: Sequence[Any] = ()
        self._samples_text = "[]"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def now(self) -> Heartbeat:
        """The heartbeat of this moment."""
        return Heartbeat(**json.loads(self._line()))

    def beat(self) -> None:
        """Write it. A full disk must not end a run that this was meant to keep."""
        with suppress(OSError):
            os.pwrite(self._file, f"{self._line()}\n".encode(), 0)

    def _line(self) -> str:
        """JSON, put together by hand: it is made some ten times a step."""
        if here.samples is not self._samples:
            self._samples = here.samples
            self._samples_text = json.dumps(list(here.samples[:SAMPLES_TOLD]), default=str)
        return (
            f'{self._who}, "number": {self.number}, "state": "{self.state}", "phase": "{here}", "unit": {here.unit}, '
            f'"seconds": {time.monotonic() - here.since:.3f}, "samples": {self._samples_text}, '
            f'"error": {json.dumps(self.error)}}}'
        )

    def end(self, state: State, error: str) -> None:
        """The last words but for what the watchdog's thread still writes."""
        self.error, self.state = error, state
        self.beat()


@dataclass
class Peer:
    """Another rank's heartbeat as this process sees it."""

    path: Path
    line: str
    told: Heartbeat
    seen: float  # when it last changed, by this process's clock

    @classmethod
    def at(cls, path: Path) -> "Peer":
        """The heartbeat in a file."""
        line = _first_line(path)
        return cls(path, line, Heartbeat(**json.loads(line)), time.monotonic())

    def look(self) -> None:
        """Read it again."""
        line = _first_line(self.path)
        with suppress(json.JSONDecodeError):  # it is being written; next time
            if line != self.line:
                self.line, self.told, self.seen = line, Heartbeat(**json.loads(line)), time.monotonic()


def machine() -> str:
    """What processes have in common that see each other's /proc: the start of the kernel and the process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_state(pid: int) -> str:
    """The letter of proc(5): T stopped, t traced, Z ended and not yet buried; "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def stacks() -> str:
    """The Python stack of every thread of this process but the caller's, main thread first, innermost frame last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads = sorted(sys._current_frames().items(), key=lambda item: item[0] != here.thread)
    told = [[names.get(i, "thread"), *_frames(frame)] for i, frame in threads if i != threading.get_ident()]
    return "\n".join("\n  ".join(lines) for lines in told)


def _frames(frame: FrameType) -> list[str]:
    walked = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame)]
    return [f"{'/'.join(Path(file).parts[-3:])}:{line} {name}" for file, line, name in reversed(walked[:FRAMES_TOLD])]


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0]
