"""Edges in buckets: bucket (i, j) holds those from partition i to partition j. In which order buckets are trained.

Node n of P partitions is row n // P of partition n % P: partitions are even, and a node that is added later moves none.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.config import BucketOrder
from puna.graph.graph import ENDS, Edges, Graph, column_names

Bucket = tuple[int, int]
Move = tuple[int, int | None]
"""The partition that enters memory, and the one that leaves for it, if any does."""

NUM_AHEAD = 1_000_000
"""Edges of a bucket, at most, that are made ready while the one before it trains."""
NEW = "edges with a new node or relation"
Known = tuple[Sequence[int], int]
"""Nodes of each type, and relations, that are known."""


def partition_rows(num_nodes: int, num_partitions: int, partition: int) -> int:
    """Nodes of one partition."""
    return (num_nodes - partition + num_partitions - 1) // num_partitions


@dataclass(frozen=True)
class Buckets:
    """A split's edges by bucket, in files; only what is asked for is read."""

    graph: Graph
    folder: Path
    prefix: str
    weighted: bool
    offsets: npt.NDArray[np.int64]  # (P * P + 1,): bucket (i, j) is i * P + j
    num_partitions: int
    whole: tuple[bool, ...]  # types that are not cut

    @classmethod
    def open(
        cls,
        graph: Graph,
        split: str,
        num_partitions: int,
        known: Known | None = None,
        whole: tuple[bool, ...] = (),
    ) -> "Buckets":
        """Buckets are made, beside the graph, the first time that they are asked for; one alone is the split itself.

        known: counts of the nodes and relations that are known; edges between those alone are then left out. whole:
        for each type whether it is not cut; none is where it is empty. Raises DataError: no such split, a number of a
        node or relation that is out of range (file and row), no edge is left.
        """
        weighted = graph.split(split)["weighted"]
        whole = whole if any(whole) else ()
        if num_partitions == 1 and known is None:
            offsets = np.array([0, graph.splits[split]["edges"]])
            return cls(graph, graph.folder, f"{split}.", weighted, offsets, 1, whole)
        named = "".join(f"-whole-{kind.name}" for kind, one in zip(graph.types, whole, strict=False) if one)
        after = "-after-{}-{}".format("-".join(map(str, known[0])), known[1]) if known else ""
        folder = graph.folder / "buckets" / f"{split}-{num_partitions}{named}{after}"
        if not folder.is_dir():
            _make(graph, split, num_partitions, folder, known, whole)
        offsets = np.load(folder / "offsets.npy")
        if not offsets[-1]:
            raise DataError(f"{graph.folder} has no {NEW}", "Add some, or train without graph.freeze.")
        return cls(graph, folder, "", weighted, offsets, num_partitions, whole)

    def size(self, bucket: Bucket) -> int:
        """Edges of a bucket."""
        at = bucket[0] * self.num_partitions + bucket[1]
        return int(self.offsets[at + 1] - self.offsets[at])

    def column(self, bucket: Bucket, name: str) -> npt.NDArray:
        """A column of a bucket's edges, as it is in the file. Raises DataError for a number that is out of range."""
        at = bucket[0] * self.num_partitions + bucket[1]
        start, stop = self.offsets[at : at + 2].tolist()
        return self.graph.checked(self.folder / f"{self.prefix}{name}", name, start, stop)

    def rows(self, bucket: Bucket, order: npt.NDArray | None = None) -> Edges:
        """A bucket's edges, or those at the places `order`; heads and tails as rows of their type in the partition."""
        relations = self.column(bucket, "relations") if self.graph.is_typed else None
        found = {}
        for name in column_names(self.weighted):
            column = self.column(bucket, name)
            if name in ENDS:
                column //= self._steps(bucket, name, column, relations)
            found[name] = column if order is None else column[order]
        return Edges(**found)

    def _steps(
        self, bucket: Bucket, name: str, column: npt.NDArray[np.int32], relations: npt.NDArray[np.int32] | None
    ) -> Any:
        """What numbers are divided by to be rows; where nodes have types, numbers are held to their types' counts."""
        if relations is not None:
            start = self.offsets[bucket[0] * self.num_partitions + bucket[1]]
            self.graph.require_type(column, relations, name, self.folder / f"{self.prefix}{name}", int(start))
        if relations is None or not self.whole:
            return np.int32(self.num_partitions)
        is_whole = np.array(self.whole)[self.graph.ends[relations, ENDS.index(name)]]
        return np.where(is_whole, 1, self.num_partitions).astype(np.int32)


def _make(graph: Graph, split: str, parts: int, folder: Path, known: Known | None, whole: tuple[bool, ...]) -> None:
    """A counting sort by bucket, a piece at a time: once to count, once to place."""
    counts = np.zeros(parts * parts, np.int64)
    ends = np.array(whole)[graph.ends] if whole else None
    for piece in track(graph.pieces(split), "counting buckets", graph.num_pieces(split)):
        counts += np.bincount(_bucket_of(_new(graph, piece, known), parts, ends), minlength=parts * parts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = column_names(graph.splits[split]["weighted"])
    files = {name: os.open(partial / name, os.O_CREAT | os.O_WRONLY) for name in names}
    filled = offsets[:-1].copy()
    for piece in track(graph.pieces(split), "filling buckets", graph.num_pieces(split)):
        edges = _new(graph, piece, known)
        bucket = _bucket_of(edges, parts, ends)
        order = np.argsort(bucket, kind="stable")
        sizes = np.bincount(bucket, minlength=parts * parts)
        for name, file in files.items():
            _place(file, getattr(edges, name)[order], filled, sizes)
        filled += sizes
    for file in files.values():
        os.fsync(file)
        os.close(file)
    np.save(partial / "offsets.npy", offsets)
    os.replace(partial, folder)


def _place(file: int, column: npt.NDArray, filled: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> None:
    """Write a piece's rows, in the order of buckets, where their buckets go on."""
    ends = np.cumsum(sizes)
    for at in np.flatnonzero(sizes):
        own = column[ends[at] - sizes[at] : ends[at]]
        os.pwrite(file, own.data, int(filled[at]) * column.itemsize)


def _new(graph: Graph, edges: Edges, known: Known | None) -> Edges:
    if known is None:
        return edges
    num_nodes, num_relations = np.zeros(len(graph.counts), np.int64), known[1]
    num_nodes[: len(known[0])] = known[0]
    heads, tails = num_nodes[graph.ends[edges.relations]].T
    return edges.take((edges.heads >= heads) | (edges.tails >= tails) | (edges.relations >= num_relations))


def _bucket_of(edges: Edges, parts: int, whole: npt.NDArray[np.bool_] | None) -> npt.NDArray:
    """Numbers of buckets, as small as they can be: 16 bits are sorted by radix.

    whole: (R, 2), for each relation's ends whether their type is not cut. Such an end counts as in the partition of the
    other one; where neither is cut, edges are spread over the buckets of one partition.
    """
    heads, tails = edges.heads % parts, edges.tails % parts
    if whole is not None:
        head_whole, tail_whole = whole[edges.relations].T
        spread = (heads + tails) % parts
        rows = np.where(head_whole, np.where(tail_whole, spread, tails), heads)
        tails = np.where(tail_whole, np.where(head_whole, spread, heads), tails)
        heads = rows
    numbers = heads * np.int32(parts) + tails
    return numbers.astype(np.uint16 if parts < 256 else np.int32)


# --- orders ---------------------------------------------------------------------------------------------------------


def order_buckets(kind: BucketOrder, parts: int, rng: np.random.Generator, held: int = 2) -> list[Bucket]:
    """All P x P buckets, each once (PBG sheet, section 8).

    inside_out: layer k holds the buckets whose smaller number is k; layers in falling order, and in one (k, m) stands
    beside (m, k), so that all of a layer share partition k. outside_in: layers in rising order. affinity: a bucket that
    shares a partition with the one before, if any is left, its mirror image first. random: no order. buffered: see
    `_buffered`, for a buffer of `held` partitions of which one is a place for what comes or goes.
    """
    if kind == "random":
        return [(int(n) // parts, int(n) % parts) for n in rng.permutation(parts * parts)]
    if kind == "affinity":
        return _by_affinity(parts, rng)
    if kind == "buffered":
        return _buffered(parts, max(2, held - 1), rng)
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


def _buffered(parts: int, room: int, rng: np.random.Generator) -> list[Bucket]:
    """Buckets as a buffer of `room` partitions meets them, one changing at a time (BETA, Mohoney et al. 2021)."""
    found: dict[Bucket, None] = {}
    for inside in _buffers(rng.permutation(parts).tolist(), min(room, parts)):
        newest = inside[-1]
        for m in inside[:-1] if found else []:
            found |= dict.fromkeys([(newest, m), (m, newest)])
        for i in inside:
            found |= dict.fromkeys([(i, i), *((a, b) for j in inside for a, b in ((i, j), (j, i)))])
    return list(found)


def _buffers(names: list[int], room: int) -> Iterator[list[int]]:
    """What the buffer holds, the newest partition last: all but one stay while the others pass through its place, and
    those that stayed, having met everyone, give way one by one."""
    inside, outside = names[:room], names[room:]
    yield list(inside)
    while outside:
        for n in range(len(outside)):
            inside[-1], outside[n] = outside[n], inside[-1]
            yield list(inside)
        last = inside.pop()
        inside = [last, *inside]
        for new in outside[: room - 1]:
            inside = [last, *inside[2:], new]
            yield list(inside)
        outside = outside[room - 1 :]


class Residents:
    """Which partitions are in memory along an order of buckets. One that leaves is the one needed again last (Belady
    1966), and it leaves for one that is needed earlier, as soon as no bucket in training needs it."""

    def __init__(self, held: int) -> None:
        """held: partitions in memory at most, 2 or more."""
        self.held, self.inside = held, list[int]()

    def now(self, order: Sequence[Bucket], at: int) -> list[Move]:
        """Moves that bucket order[at] waits for."""
        wanted = dict.fromkeys(order[at])
        moves: list[Move] = []
        for entering in wanted:
            if entering not in self.inside:
                leaving = None
                if len(self.inside) >= self.held:
                    leaving = _needed_last([part for part in self.inside if part not in wanted], order, at + 1)[0]
                moves.append(self._move(entering, leaving))
        return moves

    def ahead(self, order: Sequence[Bucket], at: int) -> list[Move]:
        """Moves for later buckets, for which there is room while order[at] trains."""
        moves: list[Move] = []
        while (missing := self._first_missing(order, at + 1)) is not None:
            entering, needed_at = missing
            leaving = None
            if len(self.inside) >= self.held:
                idle = [part for part in self.inside if part not in order[at]]
                leaving, next_use = _needed_last(idle, order, at + 1) if idle else (None, 0)
                if next_use <= needed_at:
                    break
            moves.append(self._move(entering, leaving))
        return moves

    def _move(self, entering: int, leaving: int | None) -> Move:
        if leaving is not None:
            self.inside.remove(leaving)
        self.inside.append(entering)
        return entering, leaving

    def _first_missing(self, order: Sequence[Bucket], start: int) -> tuple[int, int] | None:
        for at in range(start, len(order)):
            for part in order[at]:
                if part not in self.inside:
                    return part, at
        return None


def _needed_last(parts: Sequence[int], order: Sequence[Bucket], start: int) -> tuple[int, int]:
    """Of some partitions the one whose next use is last, and the place of that use (past the end: none)."""
    waiting = set(parts)
    for at in range(start, len(order)):
        for part in order[at]:
            if waiting == {part}:
                return part, at
            waiting.discard(part)
    return min(waiting), len(order)


def num_swaps(order: Sequence[Bucket], held: int = 2) -> int:
    """Partitions that are read along an order while `held` of them are in memory."""
    residents = Residents(held)
    return sum(len(residents.now(order, at)) + len(residents.ahead(order, at)) for at in range(len(order)))


def num_swaps_again(order: Sequence[Bucket], held: int) -> int:
    """The same for an epoch that begins where one like it has ended."""
    return num_swaps([*order, *order], held) - num_swaps(order, held)
