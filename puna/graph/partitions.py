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
from puna.graph.buckets import Bucket, Residents
from puna.graph.config import GraphConfig
from puna.graph.graph import Bags
from puna.graph.layout import WHOLE, Layout
from puna.graph.tables import fill_normal
from puna.graph.worker import Part
from puna.train.checkpoint import NO_ROOM
from puna.train.disk import size
from puna.train.rows import RowStore

Floats = npt.NDArray[np.float32]
ALL = slice(None)
APART = 0xD1342543DE82EF95
"""Between the keys of two types: what fresh vectors are a function of."""


class Known(Protocol):
    """Rows that a table begins with: those of the first `counts[kind]` nodes of each type."""

    @property
    def counts(self) -> Sequence[int]: ...

    def fill(self, kind: int, nodes: npt.NDArray[np.int64], vectors: Floats, sums: Floats) -> None:
        """Write the vectors and Adagrad sums of these nodes of a type."""


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

    def __init__(
        self,
        run: Path,
        config: GraphConfig,
        nodes: Layout | int,
        key: int,
        known: Known | None = None,
        bags: Sequence[Bags | None] = (),
    ) -> None:
        """nodes: where they are, or how many where they have one type. key: 64 bits, from which fresh vectors come.
        known: where rows begin otherwise. bags: by type, where nodes are bags of features."""
        self.layout = Layout.plain(config, nodes) if isinstance(nodes, int) else nodes
        self.config, self.key, self.known = config, key, known
        self.bags = bags or [None] * len(self.layout.counts)
        self.vectors = _Store(run, "nodes", self.flush)
        self.sums = _Store(run, "nodes.adagrad", self.flush)
        self.num_reads = 0
        self._residents = Residents(min(config.held_partitions, config.num_partitions))
        self._parts: dict[int, Part] = {}
        self._rooms: dict[int, Part] = {}  # of the partitions in memory or on their way there, as large as the largest
        self._coming: dict[int, Future[Part]] = {}
        self._changed: set[int] = set()
        self._cut_whole: dict[int, Part] = {}  # by type: those that are not cut
        self._thread = ThreadPoolExecutor(1, "partitions")

    def rows(self, partition: int) -> int:
        """Nodes of a partition."""
        return self.layout.rows(partition)

    def by_type(self, partition: int, part: Part) -> list[Part]:
        """What of a partition in memory is of each type; all of a type's nodes where it is not cut."""
        if self.bags == [None]:
            return [part]
        spans, whole = dict(self.layout.spans(partition)), self._whole()
        own = {kind: Part(part.vectors[rows], part.sums[rows], self.bags[kind]) for kind, rows in spans.items()}
        nothing = Part(part.vectors[:0], part.sums[:0])
        return [whole.get(kind) or own.get(kind, nothing) for kind in range(len(self.layout.counts))]

    def _whole(self) -> dict[int, Part]:
        """Types that are not cut; read, or begun, the first time."""
        if WHOLE in self.layout.partitions:
            if WHOLE not in self._parts:
                self._parts[WHOLE] = self._swap(WHOLE, self._room(self.rows(WHOLE)), None)
            self._changed.add(WHOLE)
            part = self._parts[WHOLE]
            for kind, rows in self.layout.spans(WHOLE) if not self._cut_whole else ():
                self._cut_whole[kind] = Part(part.vectors[rows], part.sums[rows], self.bags[kind])
        return self._cut_whole

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
        if name_of(partition) in self.vectors:
            return self.vectors.read(name_of(partition), mapped=True)[rows]
        places = range(self.rows(partition))[rows]
        part = self._room(len(places))
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
        for partition in self.layout.partitions:
            if name_of(partition) not in self.vectors:
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
        name = name_of(partition)
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
        self.vectors.put(name_of(partition), part.vectors)
        self.sums.put(name_of(partition), part.sums)

    def _room(self, rows: int) -> Part:
        return Part.room(rows, self.config.dim)

    def _first(self, partition: int, part: Part, start: int) -> None:
        """Fill rows of a partition, from `start` on, that nobody has trained."""
        part.sums[:] = 0
        for kind, span in self.layout.spans(partition):
            low, high = max(span.start, start), min(span.stop, start + len(part.vectors))
            if low < high:
                own = Part(part.vectors[low - start : high - start], part.sums[low - start : high - start])
                step = self.layout.step(kind)
                self._first_of(kind, max(partition, 0) + (low - span.start) * step, step, own)

    def _first_of(self, kind: int, first: int, step: int, part: Part) -> None:
        """Fill rows of nodes first, first + step, .. of a type."""
        key = (self.key + kind * APART) % 2**64
        fill_normal(np.uint64(key), self.config.init_scale, first, step, part.vectors)
        if self.known and kind < len(self.known.counts):
            nodes = first + step * np.arange(len(part.vectors))
            own = int((nodes < self.known.counts[kind]).sum())
            self.known.fill(kind, nodes[:own], part.vectors[:own], part.sums[:own])


def name_of(partition: int) -> str:
    """What a partition is called in row stores."""
    return "whole" if partition == WHOLE else str(partition)
