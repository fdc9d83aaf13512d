"""Two processes of a run over torch.distributed's gloo, in a group of their own: where one dies, only its links break.

A group of all processes would not do: gloo ends every operation of a group when one of its members is gone.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from puna.errors import DeviceError
from puna.train import network

FOREVER = 365 * 86_400.0  # seconds
JOIN_SECONDS = 300.0  # for the two ends of a link to meet, and for a trainer to reach the meeting place
COUNTER = "joined"


class Lost(Exception):
    """The process at the other end is gone, or was silent for too long."""


@dataclass(frozen=True)
class Meeting:
    """Where processes find each other: a file, or a TCP store that rank 0 keeps, or torchrun's agent for it."""

    rank: int
    path: str = ""
    host: str = ""
    port: int = 0
    hosted: bool = False  # whether another process keeps the store
    attempt: str = "0"  # stores of torchrun outlive a restart

    @classmethod
    def from_environment(cls) -> "Meeting":
        """By the names that the launcher or torchrun has set. Raises DeviceError where they lead nowhere."""
        found = os.environ
        network.choose_interface()
        if path := found.get("PUNA_STORE"):
            return cls(int(found["RANK"]), path)
        if "MASTER_ADDR" not in found or not found.get("MASTER_PORT", "").isdecimal():
            raise DeviceError(
                "RANK is set, but MASTER_ADDR and MASTER_PORT name no meeting place",
                "Set them to an address of rank 0's machine and a free port there, or start by `puna launch`.",
            )
        hosted = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = found.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(int(found["RANK"]), "", found["MASTER_ADDR"], int(found["MASTER_PORT"]), hosted, attempt)

    def open(self) -> dist.Store:
        """A client of the store for one thread: it does one thing at a time. Raises Lost where it cannot be reached."""
        with _as_lost():
            return dist.PrefixStore(f"graph-{self.attempt}", self._store())

    def keep(self) -> dist.Store | None:
        """On rank 0, before anything else: keep the store while the result is referred to. Raises DeviceError."""
        if self.path or self.hosted or self.rank:
            return None
        try:
            return dist.TCPStore(self.host, self.port, None, True, wait_for_workers=False)
        except RuntimeError as error:
            raise DeviceError(
                f"port {self.port} of {self.host} cannot be listened on ({_short(error)})",
                "Set MASTER_ADDR to an address of this machine and MASTER_PORT to a free port.",
            ) from None

    def _store(self) -> dist.Store:
        if self.path:
            return dist.FileStore(self.path, -1)
        return dist.TCPStore(self.host, self.port, None, False, timedelta(seconds=JOIN_SECONDS))

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


class Link:
    """Messages and arrays to and from one other process. Every method raises Lost."""

    def __init__(self, store: dist.Store, name: str, end: int, seconds: float = JOIN_SECONDS) -> None:
        """Returns when both ends, 0 and 1, are there. seconds: longest wait of what has no limit of its own."""
        prefixed, limit = dist.PrefixStore(name, store), timedelta(seconds=seconds)
        self._other = 1 - end
        with _as_lost():
            self._group: Any = dist.ProcessGroupGloo(prefixed, end, 2, limit)  # stubs lack send and recv

    def send(self, *arrays: npt.NDArray[Any]) -> None:
        """Arrays whose shapes and dtypes the other end knows."""
        for array in arrays:
            if array.size:
                with _as_lost():
                    self._group.send([torch.from_numpy(array)], self._other, 0).wait()

    def receive(self, *arrays: npt.NDArray[Any], seconds: float = FOREVER) -> None:
        """Fill arrays with what the other end sends, each within `seconds`."""
        for array in arrays:
            if array.size:
                with _as_lost():
                    self._group.recv([torch.from_numpy(array)], self._other, 0).wait(timedelta(seconds=seconds))

    def tell(self, words: Any) -> None:
        """Send JSON."""
        data = np.frombuffer(bytearray(json.dumps(words).encode()), np.uint8)
        self.send(np.array([len(data)]), data)

    def hear(self, seconds: float = FOREVER) -> Any:
        """Receive JSON."""
        length = np.zeros(1, np.int64)
        self.receive(length, seconds=seconds)
        data = np.empty(length[0], np.uint8)
        self.receive(data, seconds=seconds)
        return json.loads(data.tobytes())


@contextmanager
def _as_lost() -> Iterator[None]:
    """What gloo and the stores say of another process's absence, as Lost."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(_short(error)) from None


def _short(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
