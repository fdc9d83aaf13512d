"""Edges in buckets: bucket (i, j) holds those from partition i to partition j. In which order buckets are trained.

Node n of P partitions is row n // P of partition n % P: partitions are even, and a node that is added later moves none.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.graph.config import BucketOrder
from puna.graph.graph import COLUMNS, READ_ROWS, Edges, Graph, map_edges

Bucket = tuple[int, int]


def partition_rows(num_nodes: int, num_partitions: int, partition: int) -> int:
    """Nodes of one partition."""
    return (num_nodes - partition + num_partitions - 1) // num_partitions


@dataclass(frozen=True)
class Buckets:
    """A split's edges by bucket."""

    edges: Edges
    offsets: npt.NDArray[np.int64]  # (P * P + 1,): bucket (i, j) is i * P + j
    num_partitions: int

    @classmethod
    def open(cls, graph: Graph, split: str, num_partitions: int) -> "Buckets":
        """Buckets are made, beside the graph, the first time that they are asked for; one alone is the split itself."""
        if num_partitions == 1:
            edges = graph.edges(split)
            return cls(edges, np.array([0, len(edges)]), 1)
        folder = graph.folder / "buckets" / f"{split}-{num_partitions}"
        if not folder.is_dir():
            _make(graph.edges(split), num_partitions, folder)
        weighted = graph.splits[split]["weighted"]
        return cls(map_edges(folder, "", weighted), np.load(folder / "offsets.npy"), num_partitions)

    def size(self, bucket: Bucket) -> int:
        """Edges of a bucket."""
        at = bucket[0] * self.num_partitions + bucket[1]
        return int(self.offsets[at + 1] - self.offsets[at])

    def rows(self, bucket: Bucket) -> Edges:
        """A bucket's edges, read; heads and tails as rows of their partitions."""
        at, parts = bucket[0] * self.num_partitions + bucket[1], self.num_partitions
        edges = self.edges.take(slice(self.offsets[at], self.offsets[at + 1]))
        weights = None if edges.weights is None else np.array(edges.weights)
        heads, tails = (np.array(column) // np.int32(parts) for column in (edges.heads, edges.tails))
        return Edges(heads, np.array(edges.relations), tails, weights)


def _make(edges: Edges, parts: int, folder: Path) -> None:
    """A counting sort by bucket, a piece at a time: once to count, once to place."""
    counts = np.zeros(parts * parts, np.int64)
    num_pieces = -(-len(edges) // READ_ROWS)
    for piece in track(edges.pieces(), "counting buckets", num_pieces):
        counts += np.bincount(_bucket_of(piece, parts), minlength=parts * parts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [name for name in COLUMNS if name != "weights" or edges.weights is not None]
    out = {name: np.memmap(partial / name, COLUMNS[name], "w+", shape=(len(edges),)) for name in names}
    sources = {name: column for name, column in vars(edges).items() if column is not None}
    filled = offsets[:-1].copy()
    for start in track(range(0, len(edges), READ_ROWS), "filling buckets"):
        rows = slice(start, start + READ_ROWS)
        bucket = _bucket_of(edges.take(rows), parts)
        order = np.argsort(bucket, kind="stable")
        sizes = np.bincount(bucket, minlength=parts * parts)
        ends = np.cumsum(sizes)
        for at in np.flatnonzero(sizes):
            taken = order[ends[at] - sizes[at] : ends[at]]
            for name, column in out.items():
                column[filled[at] : filled[at] + len(taken)] = sources[name][rows][taken]
            filled[at] += len(taken)
    for column in out.values():
        column.flush()
    np.save(partial / "offsets.npy", offsets)
    os.replace(partial, folder)


def _bucket_of(edges: Edges, parts: int) -> npt.NDArray[np.int64]:
    return (edges.heads % parts).astype(np.int64) * parts + edges.tails % parts


def order_buckets(kind: BucketOrder, parts: int, rng: np.random.Generator) -> list[Bucket]:
    """All P x P buckets, each once (PBG sheet, section 8).

    inside_out: layer k holds the buckets whose smaller number is k; layers in falling order, and in one (k, m) stands
    beside (m, k), so that all of a layer share partition k. outside_in: layers in rising order. affinity: a bucket that
    shares a partition with the one before, if any is left, its mirror image first. random: no order.
    """
    if kind == "random":
        return [(int(n) // parts, int(n) % parts) for n in rng.permutation(parts * parts)]
    if kind == "affinity":
        return _by_affinity(parts, rng)
    layers = range(parts) if kind == "outside_in" else reversed(range(parts))
    found: list[Bucket] = []
    for k in layers:
        for m in (rng.permutation(parts - k) + k).tolist():
            found += [(k, k)] if m == k else [(k, m), (m, k)]
    return found


def _by_affinity(parts: int, rng: np.random.Generator) -> list[Bucket]:
    left = {(i, j) for i in range(parts) for j in range(parts)}
    at = (int(rng.integers(parts)), int(rng.integers(parts)))
    found: list[Bucket] = []
    while left:
        left.remove(at)
        found.append(at)
        mirrored = (at[1], at[0])
        sharing = sorted(bucket for bucket in left if set(bucket) & set(at))
        choices = [mirrored] if mirrored in left else sharing or sorted(left)
        if choices:
            at = choices[int(rng.integers(len(choices)))]
    return found


def num_swaps(order: Sequence[Bucket], held: int = 2) -> int:
    """Partitions read along an order while `held` of them stay in memory, the longest unused leaving first."""
    memory: list[int] = []
    reads = 0
    for bucket in order:
        for part in dict.fromkeys(bucket):
            if part in memory:
                memory.remove(part)
            else:
                reads += 1
            memory.append(part)
        memory = memory[-held:]
    return reads
