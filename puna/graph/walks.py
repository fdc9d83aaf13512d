"""Random walks over a graph, counted: how often two nodes stand near each other becomes the weight of an edge.

As in DeepWalk (Perozzi, Al-Rfou, Skiena 2014): from every node walks of `length` nodes, over edges both ways; each node
of a walk meets those that follow it within a window, which is drawn from 1 .. window as word2vec does. Pairs are sorted
on disk, so that memory holds the graph's neighbours and a share of the pairs.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.graph import Edges, Graph
from puna.sparse.compiled import exact_kernel
from puna.sparse.hashing import mix

STARTS = 1 << 15
"""Walks that are made at once."""
PAIRS = 1 << 25
"""Pairs that are counted at once."""


@dataclass(frozen=True)
class Walks:
    """Which walks are made: so many from every node, of so many nodes; how far two nodes of a walk may stand apart.

    contexts: the later nodes are of a second type, `context`, with vectors of their own, as skip-gram has two tables.
    """

    per_node: int
    length: int = 40
    window: int = 10
    seed: int = 0
    contexts: bool = False


def co_occurrences(graph: Graph, walks: Walks) -> Iterator[Edges]:
    """Pairs of nodes (earlier, later in a walk), each once, with its count as weight; some at a time, by earlier node.

    Relation 0 for all. Raises DataError where edges have weights, or walks of one node.
    """
    if graph.split("train")["weighted"]:
        raise DataError(f"the edges of {graph.folder} have weights, and walks take every edge alike", "Leave them out.")
    if walks.length < 2 or walks.window < 1 or walks.per_node < 1:
        raise DataError(f"{walks} has no pair of nodes", "Give a walk of 2 nodes or more, and a window of 1 or more.")
    offsets, neighbours = _neighbours(graph)
    expected = len(offsets) * walks.per_node * walks.length * (walks.window + 1) // 2
    with tempfile.TemporaryDirectory(dir=graph.folder) as folder:
        files = [Path(folder) / str(n) for n in range(1 + expected // PAIRS)]
        _walk_all(offsets, neighbours, walks, files)
        for path in track(files, "counting pairs"):
            keys = np.sort(np.fromfile(path, np.int64))
            path.unlink()
            if len(keys):
                yield _counted(keys, graph.num_nodes)


def _counted(keys: npt.NDArray[np.int64], num_nodes: int) -> Edges:
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    weights = np.diff(starts, append=len(keys)).astype(np.float32)
    heads, tails = np.divmod(keys[starts], num_nodes)
    return Edges(heads.astype(np.int32), np.zeros(len(heads), np.int32), tails.astype(np.int32), weights)


def _neighbours(graph: Graph) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """For each node, where its neighbours begin and end, and all of these; every edge leads both ways."""
    degrees = np.zeros(graph.num_nodes, np.int64)
    for piece in graph.pieces("train"):
        for ends in (piece.heads, piece.tails):
            degrees += np.bincount(ends, minlength=graph.num_nodes)
    offsets = np.concatenate([[0], np.cumsum(degrees)])
    filled, neighbours = offsets[:-1].copy(), np.empty(int(offsets[-1]), np.int32)
    for piece in graph.pieces("train"):
        _join(piece.heads, piece.tails, filled, neighbours)
    return offsets, neighbours


def _walk_all(
    offsets: npt.NDArray[np.int64], neighbours: npt.NDArray[np.int32], walks: Walks, files: list[Path]
) -> None:
    """Write every pair as head x nodes + tail, to the file that its head falls to."""
    num_nodes = len(offsets) - 1
    starts = np.flatnonzero(np.diff(offsets)).astype(np.int32)
    room = np.empty((STARTS, walks.length), np.int32)
    pairs = np.empty(STARTS * walks.length * walks.window, np.int64)
    jobs = [(n, start) for n in range(walks.per_node) for start in range(0, len(starts), STARTS)]
    open_files = [path.open("wb") for path in files]
    for n, start in track(jobs, "walking"):
        some = starts[start : start + STARTS]
        key = np.uint64(mix(np.uint64((walks.seed + n * 0x9E3779B97F4A7C15) % 2**64)))
        _walk(offsets, neighbours, some, key, room[: len(some)])
        count = _pair(room[: len(some)], walks.window, num_nodes, np.uint64(mix(key)), pairs)
        own = pairs[:count] // num_nodes % len(files)
        order = np.argsort(own.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(own, minlength=len(files)))
        for file, piece in zip(open_files, np.split(pairs[:count][order], ends[:-1]), strict=True):
            file.write(piece.data)
    for file in open_files:
        file.close()


@exact_kernel
def _join(heads: Any, tails: Any, filled: Any, neighbours: Any) -> None:
    for i in range(heads.shape[0]):
        neighbours[filled[heads[i]]] = tails[i]
        filled[heads[i]] += 1
        neighbours[filled[tails[i]]] = heads[i]
        filled[tails[i]] += 1


@exact_kernel
def _walk(offsets: Any, neighbours: Any, starts: Any, key: Any, out: Any) -> None:
    """A walk from each of some nodes; its draws are a function of (key, node)."""
    for i in range(starts.shape[0]):
        node = starts[i]
        state = mix(key ^ np.uint64(node))
        for n in range(out.shape[1]):
            out[i, n] = node
            state = mix(state + np.uint64(0x9E3779B97F4A7C15))
            degree = np.uint64(offsets[node + 1] - offsets[node])
            node = neighbours[offsets[node] + np.int64(((state >> np.uint64(32)) * degree) >> np.uint64(32))]


@exact_kernel
def _pair(walks: Any, window: int, num_nodes: int, key: Any, out: Any) -> int:
    """Pairs of each walk, as one number each; how many."""
    count, length = 0, walks.shape[1]
    for i in range(walks.shape[0]):
        state = mix(key ^ np.uint64(walks[i, 0]))
        for n in range(length):
            state = mix(state + np.uint64(0x9E3779B97F4A7C15))
            reach = 1 + np.int64(((state >> np.uint64(32)) * np.uint64(window)) >> np.uint64(32))
            for later in range(n + 1, min(n + reach + 1, length)):
                if walks[i, later] != walks[i, n]:
                    out[count] = np.int64(walks[i, n]) * num_nodes + walks[i, later]
                    count += 1
    return count
