"""Tables of nodes in partitions: a few in memory, all of them (once trained) in copy-on-write files of the run.

A thread writes what leaves memory and reads what comes while buckets train. A partition that nobody has touched is in
no file: its vectors are a function of (seed, node), the same for any number of partitions, or those of the run that
this one begins with.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from puna.errors import CheckpointError, DiskFull
from puna.graph.buckets import Bucket, Residents, partition_rows
from puna.graph.config import GraphConfig
from puna.graph.tables import fill_normal
from puna.graph.worker import Part
from puna.train.checkpoint import NO_ROOM
from puna.train.disk import size
from puna.train.rows import RowStore

Floats = npt.NDArray[np.float32]
ALL = slice(None)


class Known(Protocol):
    """Rows that a table begins with: those of its first `num_nodes` nodes."""

    @property
    def num_nodes(self) -> int: ...

    def fill(self, nodes: npt.NDArray[np.int64], vectors: Floats, sums: Floats) -> None:
        """Write these nodes' vectors and Adagrad sums."""


class _Store(RowStore):
    """A RowStore that writes what memory holds before it is asked what there is, and keeps no version that no
    checkpoint can name. What a checkpoint names is on disk for good; what only passes through the disk need not be."""

    def __init__(self, run: Path, name: str, flush: Callable[[], None]) -> None:
        super().__init__(run, name)
        self._flush = flush
        self._named: set[str] = set()
        self._unsynced: set[str] = set()

    def put(self, partition: str, rows: Floats) -> None:
        """Make `rows` the partition's current version. Raises DiskFull."""
        before = self._current.get(partition)
        try:
            self.write(partition, rows, synced=False)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.sweep(name for name in self.files() if name.endswith(".tmp"))
            raise DiskFull(
                f"partition {partition} of {self.name} does not fit the disk of {self.folder}: it has "
                f"{size(rows.nbytes)} ({error.strerror})",
                "Free space there; the same command goes on from the newest checkpoint, which is as it was.",
            ) from None
        self._unsynced.add(self._current[partition].file)
        if before and before.file not in self._named:
            self._unsynced.discard(before.file)
            self.sweep([before.file])

    def fill(self, partition: str, out: Floats) -> None:
        """Read a partition into memory that is there. Raises CheckpointError where it has another shape."""
        path = self.folder / self._current[partition].file
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if shape != out.shape or dtype != out.dtype or file.readinto(out.data.cast("B")) != out.nbytes:
                raise CheckpointError(
                    f"{path} holds {dtype} of {shape}, but {out.dtype} of {out.shape} is wanted",
                    "Resume from an older checkpoint, or restore the file.",
                )

    def snapshot(self) -> dict[str, dict[str, Any]]:
        self._flush()
        current = super().snapshot()
        files = {entry["file"] for entry in current.values()}
        for name in self._unsynced & files:
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced -= files
        self._named |= files
        return current

    def restore(self, snapshot: dict[str, dict[str, Any]]) -> None:
        super().restore(snapshot)
        self._named |= {entry["file"] for entry in snapshot.values()}


class Table:
    """Vectors of all nodes, and their Adagrad sums, in two row stores: `nodes` and `nodes.adagrad`."""

    def __init__(self, run: Path, config: GraphConfig, num_nodes: int, key: int, known: Known | None = None) -> None:
        """key: 64 bits, from which fresh vectors come. known: where rows begin otherwise."""
        self.config, self.num_nodes, self.key, self.known = config, num_nodes, key, known
        self.vectors = _Store(run, "nodes", self.flush)
        self.sums = _Store(run, "nodes.adagrad", self.flush)
        self.num_reads = 0
        self._residents = Residents(min(config.held_partitions, config.num_partitions))
        self._parts: dict[int, Part] = {}
        self._rooms: dict[int, Part] = {}  # of the partitions in memory or on their way there, as large as the largest
        self._coming: dict[int, Future[Part]] = {}
        self._changed: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "partitions")

    def rows(self, partition: int) -> int:
        """Nodes of a partition."""
        return partition_rows(self.num_nodes, self.config.num_partitions, partition)

    def take(self, order: Sequence[Bucket], at: int = 0) -> list[Part]:
        """The parts of bucket order[at], to train on. Those of later buckets begin to come, where there is room.

        Raises DiskFull where a partition that left memory could not be written.
        """
        for move in self._residents.now(order, at):
            self._begin(*move)
        parts = [self._arrived(partition) for partition in order[at]]
        for move in self._residents.ahead(order, at):
            self._begin(*move)
        self._changed |= set(order[at])
        return parts

    def view(self, partition: int, rows: slice = ALL) -> Floats:
        """A partition's vectors to read: those in memory, or mapped from the disk, or fresh."""
        self._settle()
        if partition in self._parts:
            return self._parts[partition].vectors[rows]
        if str(partition) in self.vectors:
            return self.vectors.read(str(partition), mapped=True)[rows]
        places = range(self.rows(partition))[rows]
        part = Part(np.empty((len(places), self.config.dim), np.float32), np.empty(len(places), np.float32))
        self._first(partition, part, places.start)
        return part.vectors

    def fetch(self, partition: int) -> Part:
        """A copy of a partition as it was last written, or fresh, for a process that trains it elsewhere."""
        part = self._room(self.rows(partition))
        self._read(partition, part)
        return part

    def replace(self, partition: int, part: Part) -> None:
        """Write a partition that was trained elsewhere. Raises DiskFull."""
        self._write(partition, part)

    def flush(self) -> None:
        """Write what was trained on since it was last written; and all that comes from another run."""
        self._settle()
        for partition in sorted(self._changed & self._parts.keys()):
            self._write(partition, self._parts[partition])
            self._changed.discard(partition)
        if self.known:
            self._adopt()

    def _adopt(self) -> None:
        for partition in range(self.config.num_partitions):
            if str(partition) not in self.vectors:
                part = self._parts.get(partition) or self._room(self.rows(partition))
                if partition not in self._parts:
                    self._first(partition, part, 0)
                self._write(partition, part)

    def _begin(self, entering: int, leaving: int | None) -> None:
        """Have a partition come, into the place of the one that leaves, if any does, once that is written."""
        room, owed = None, None
        if leaving is not None:
            part = self._arrived(leaving)
            del self._parts[leaving]
            room = self._rooms.pop(leaving)
            owed = (leaving, part) if leaving in self._changed else None
            self._changed.discard(leaving)
        self._rooms[entering] = room or self._room(self.rows(0))
        self._coming[entering] = self._thread.submit(self._swap, entering, self._rooms[entering], owed)

    def _swap(self, entering: int, room: Part, owed: tuple[int, Part] | None) -> Part:
        if owed:
            self._write(*owed)
        rows = self.rows(entering)
        part = Part(room.vectors[:rows], room.sums[:rows])
        self._read(entering, part)
        return part

    def _read(self, partition: int, part: Part) -> None:
        name = str(partition)
        if name in self.vectors:
            self.num_reads += 1
            self.vectors.fill(name, part.vectors)
            self.sums.fill(name, part.sums)
        else:
            self._first(partition, part, 0)

    def _arrived(self, partition: int) -> Part:
        if partition in self._coming:
            self._parts[partition] = self._coming[partition].result()
            del self._coming[partition]
        return self._parts[partition]

    def _settle(self) -> None:
        for partition in list(self._coming):
            self._arrived(partition)

    def _write(self, partition: int, part: Part) -> None:
        self.vectors.put(str(partition), part.vectors)
        self.sums.put(str(partition), part.sums)

    def _room(self, rows: int) -> Part:
        return Part(np.empty((rows, self.config.dim), np.float32), np.empty(rows, np.float32))

    def _first(self, partition: int, part: Part, start: int) -> None:
        """Fill rows of a partition, from `start` on, that nobody has trained."""
        parts = self.config.num_partitions
        first, rows = partition + start * parts, len(part.vectors)
        fill_normal(np.uint64(self.key), self.config.init_scale, first, parts, part.vectors)
        part.sums[:] = 0
        if self.known:
            own = min(rows, max(0, partition_rows(self.known.num_nodes, parts, partition) - start))
            self.known.fill(first + parts * np.arange(own), part.vectors[:own], part.sums[:own])
