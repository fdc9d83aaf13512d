"""Tables of nodes in partitions: a few in memory, all of them (once trained) in copy-on-write files of the run.

Memory of a run, in bytes: held x rows of a partition x (4 D + 4), and for each worker

    slots x 8 D + batch_edges x 16 D + BLOCK      slots = 2 x (batch_edges + drawn negatives of a batch)

and 24 for each edge of the bucket that is trained. A partition that nobody has touched is in no file: its vectors are a
function of (seed, node), the same for any number of partitions.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import DiskFull
from puna.graph.buckets import partition_rows
from puna.graph.config import GraphConfig
from puna.graph.questions import worker_bytes
from puna.graph.scores import BLOCK_BYTES, padded
from puna.graph.tables import fill_normal
from puna.graph.worker import Part
from puna.train.checkpoint import NO_ROOM
from puna.train.disk import size
from puna.train.rows import RowStore

HELD = 2
"""Partitions in memory at once: those of the bucket that is trained."""


class _Store(RowStore):
    """A RowStore that writes what memory holds before it is asked what there is, and keeps no version that no
    checkpoint can name."""

    def __init__(self, run: Path, name: str, flush: Callable[[], None]) -> None:
        super().__init__(run, name)
        self._flush = flush
        self._named: set[str] = set()

    def write(self, partition: str, rows: Any) -> None:
        before = self._current.get(partition)
        try:
            super().write(partition, rows)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.sweep(name for name in self.files() if name.endswith(".tmp"))
            raise DiskFull(
                f"partition {partition} of {self.name} does not fit the disk of {self.folder}: it has "
                f"{size(rows.nbytes)} ({error.strerror})",
                "Free space there; the same command goes on from the newest checkpoint, which is as it was.",
            ) from None
        if before and before.file not in self._named:
            self.sweep([before.file])

    def snapshot(self) -> dict[str, dict[str, Any]]:
        self._flush()
        current = super().snapshot()
        self._named |= {entry["file"] for entry in current.values()}
        return current

    def restore(self, snapshot: dict[str, dict[str, Any]]) -> None:
        super().restore(snapshot)
        self._named |= {entry["file"] for entry in snapshot.values()}


class Table:
    """Vectors of all nodes, and their Adagrad sums, in two row stores: `nodes` and `nodes.adagrad`."""

    def __init__(self, run: Path, config: GraphConfig, num_nodes: int, key: int) -> None:
        """key: 64 bits, from which fresh vectors come."""
        self.config, self.num_nodes, self.key = config, num_nodes, key
        self.vectors = _Store(run, "nodes", self.flush)
        self.sums = _Store(run, "nodes.adagrad", self.flush)
        self._parts: dict[int, Part] = {}
        self._changed: set[int] = set()

    def rows(self, partition: int) -> int:
        """Nodes of a partition."""
        return partition_rows(self.num_nodes, self.config.num_partitions, partition)

    def take(self, partitions: Collection[int]) -> list[Part]:
        """These partitions to train on, in memory; others leave it, written if they were trained on."""
        for gone in self._parts.keys() - set(partitions):
            self._write(gone)
            del self._parts[gone]
        for new in [p for p in partitions if p not in self._parts]:
            self._parts[new] = self._read(new)
        self._changed |= set(partitions)
        return [self._parts[p] for p in partitions]

    def view(self, partition: int) -> np.ndarray:
        """A partition's vectors to read: those in memory, or mapped from the disk, or fresh."""
        if partition in self._parts:
            return self._parts[partition].vectors
        if str(partition) in self.vectors:
            return self.vectors.read(str(partition), mapped=True)
        return self._fresh(partition)

    def flush(self) -> None:
        """Write what was trained on since it was last written."""
        for partition in sorted(self._changed & self._parts.keys()):
            self._write(partition)

    def _write(self, partition: int) -> None:
        if partition in self._changed:
            self._changed.discard(partition)
            self.vectors.write(str(partition), self._parts[partition].vectors)
            self.sums.write(str(partition), self._parts[partition].sums)

    def _read(self, partition: int) -> Part:
        name = str(partition)
        if name in self.vectors:
            return Part(self.vectors.read(name), self.sums.read(name))
        return Part(self._fresh(partition), np.zeros(self.rows(partition), np.float32))

    def _fresh(self, partition: int) -> np.ndarray:
        vectors = np.empty((self.rows(partition), self.config.dim), np.float32)
        key, parts = np.uint64(self.key), self.config.num_partitions
        fill_normal(key, self.config.init_scale, partition, parts, vectors)
        return vectors


def memory_bytes(config: GraphConfig, num_nodes: int, bucket_edges: int, num_workers: int) -> int:
    """The formula above: most bytes that tables, workers and the edges of a bucket take at once."""
    rows = partition_rows(num_nodes, config.num_partitions, 0)
    held = min(HELD, config.num_partitions)
    size = padded(config.batch_edges, config.group_edges)
    drawn = rows if config.all_negs else config.num_candidates
    slots = 2 * (size + size // config.group_edges * drawn)
    worker = 8 * slots * config.dim + 16 * size * config.dim + BLOCK_BYTES
    if config.by_question:
        worker = worker_bytes(config, rows)
    return held * rows * (4 * config.dim + 4) + num_workers * worker + 24 * bucket_edges
