"""Link prediction: where the true node ranks among all nodes, for the tail and for the head of every edge.

rank = 1 + nodes that score higher + half of the other nodes that score the same (a tie is worth its mean place).
Filtered ranks leave out nodes that make another known edge with the same other end and relation, in any split.
Partitions are visited one at a time, so that memory does not grow with the graph.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from puna.console import track
from puna.graph import operators, scores
from puna.graph.compiled import kernel
from puna.graph.config import GraphConfig
from puna.graph.graph import Edges, Graph
from puna.graph.worker import Relations

QUERIES = 1024
"""Edges that are ranked at once."""
HITS = (1, 3, 10, 50)


@dataclass(frozen=True)
class Scorer:
    """A trained model to read: `view` gives a partition's vectors, relations[0] guesses tails, relations[1] heads."""

    config: GraphConfig
    graph: Graph
    view: Callable[[int], np.ndarray]
    relations: Sequence[Relations]

    @property
    def kinds(self) -> tuple[int, int]:
        """Codes of the comparator and the bias."""
        return scores.CODES[self.config.comparator], int(self.config.bias)

    def vectors(self, nodes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Copies of these nodes' vectors, (N, D)."""
        parts = self.config.num_partitions
        out = np.empty((len(nodes), self.config.dim), np.float32)
        for part in range(parts):
            own = np.flatnonzero(nodes % parts == part)
            if len(own):
                out[own] = self.view(part)[nodes[own] // parts]
        return out

    def turned(self, side: int, vectors: Any, relations: Any) -> npt.NDArray[np.float32]:
        """Vectors under relations' operators of a side."""
        out = np.empty(vectors.shape, np.float32)
        code = operators.CODES[self.config.operator]
        operators.operate(code, vectors, relations.astype(np.int32), self.relations[side].table, out)
        return out

    def prepared(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As the comparator wants them; a copy where that changes them."""
        if self.config.comparator == "cos":
            vectors = np.array(vectors)
            scores.prepare(*self.kinds, vectors, np.empty(len(vectors), np.float32))
        return vectors


@dataclass(frozen=True)
class Ranks:
    """Of N edges: ranks (2, N) of the tail and of the head, among all nodes and among those not known to be true."""

    edges: Edges
    raw: npt.NDArray[np.float64]
    filtered: npt.NDArray[np.float64]
    num_raw: int  # nodes that a rank is among
    num_filtered: npt.NDArray[np.float64]  # (2, N)

    def figures(self) -> dict[str, Any]:
        """mrr, its 95 % interval (over edges), mr, hits1 .. hits50, auc; filtered and raw."""
        num_raw = np.full(self.raw.shape, float(self.num_raw))
        return {
            "num_edges": len(self.edges),
            "filtered": summary(self.filtered, self.num_filtered),
            "raw": summary(self.raw, num_raw),
        }

    def by_relation(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One record a relation: its edges and their filtered figures, the most frequent first."""
        relations = np.asarray(self.edges.relations)
        found, counts = np.unique(relations, return_counts=True)
        records = []
        for n in np.argsort(-counts, kind="stable"):
            own = relations == found[n]
            figures = summary(self.filtered[:, own], self.num_filtered[:, own])
            record = {"relation": names[found[n]], "num_edges": int(counts[n])}
            records.append(record | {key: figures[key] for key in ("mrr", "mr", "hits1", "hits10")})
        return records


def summary(ranks: npt.NDArray[np.float64], among: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Figures of ranks (2, N), each among so many nodes. auc: share of the others that score below the true node."""
    reciprocal = (1 / ranks).mean(axis=0)
    error = float(reciprocal.std(ddof=1) / np.sqrt(len(reciprocal))) if len(reciprocal) > 1 else 0.0
    mrr = float(reciprocal.mean())
    below = (among - ranks) / np.maximum(among - 1, 1)
    return {
        "mrr": mrr,
        "mrr_interval": [mrr - 1.96 * error, mrr + 1.96 * error],
        "mr": float(ranks.mean()),
        **{f"hits{k}": float((ranks <= k).mean()) for k in HITS},
        "auc": float(below.mean()),
    }


def rank(scorer: Scorer, edges: Edges) -> Ranks:
    """Rank every edge's tail and head among all nodes of the graph."""
    num_edges, graph = len(edges), scorer.graph
    counts = np.zeros((2, num_edges, 4), np.int64)  # higher, same, of the known: higher, same
    num_known = np.zeros((2, num_edges), np.int64)
    order = np.arange(num_edges)
    if not scorer.config.reciprocal:
        order = np.argsort(edges.relations, kind="stable")
    knowns = [Known(graph, edges, side) for side in range(2)]
    for rows in track(list(_blocks(edges, order, scorer.config.reciprocal)), "ranking"):
        block = edges.take(rows)
        for side in range(2):
            counts[side, rows] = _count_block(scorer, block, side, knowns[side], rows)
    for side in range(2):
        num_known[side] = knowns[side].sizes()
    higher, same, known_higher, known_same = (counts[..., n] for n in range(4))
    raw = 1 + higher + same / 2
    filtered = 1 + higher - known_higher + (same - known_same) / 2
    return Ranks(edges, raw, filtered, graph.num_nodes, graph.num_nodes - num_known.astype(float))


def _blocks(edges: Edges, order: npt.NDArray[Any], mixed: bool) -> Any:
    """Rows of edges, so many at a time; of one relation each where a relation acts on the candidates."""
    if mixed:
        cuts = np.arange(QUERIES, len(order), QUERIES)
        return np.split(order, cuts)
    relations = edges.relations[order]
    starts = [0, *(np.flatnonzero(np.diff(relations)) + 1).tolist(), len(order)]
    return [
        order[s : min(s + QUERIES, end)]
        for start, end in itertools.pairwise(starts)
        for s in range(start, end, QUERIES)
    ]


def _count_block(scorer: Scorer, edges: Edges, side: int, known: "Known", rows: npt.NDArray[Any]) -> Any:
    """side: 0 where tails are guessed, 1 heads. (N, 4) counts as in `rank`."""
    config, parts = scorer.config, scorer.config.num_partitions
    given, true = (edges.heads, edges.tails) if side == 0 else (edges.tails, edges.heads)
    turns_candidates = not config.reciprocal and side == 0
    vectors = scorer.vectors(np.asarray(given))
    anchors = vectors if turns_candidates else scorer.turned(side if config.reciprocal else 0, vectors, edges.relations)
    anchors = scorer.prepared(anchors)
    true = np.asarray(true)
    facts, positives = _facts(scorer, anchors), np.empty(len(edges), np.float32)
    counts = np.zeros((len(edges), 4), np.int64)

    def score_part(part: int, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Scores of some anchors with a partition's nodes."""
        candidates = scorer.view(part)
        if turns_candidates:
            candidates = scorer.turned(0, candidates, np.full(len(candidates), edges.relations[0]))
        candidates = scorer.prepared(candidates)
        found = (torch.from_numpy(anchors[rows]) @ _tensor(candidates).T).numpy()
        _to_scores(*scorer.kinds, found, np.ascontiguousarray(facts[:, rows]), _facts(scorer, candidates))
        return found

    everyone, found = np.arange(len(edges)), None
    for part in range(
        parts
    ):  # the true node's score comes from the same kind of product as the others', so ties are ties
        own = np.flatnonzero(true % parts == part)
        if len(own):
            found = score_part(part, own)
            positives[own] = found[np.arange(len(own)), true[own] // parts]
    for part in range(parts):
        values = found if parts == 1 else score_part(part, everyone)
        _count(values, positives, true, part, parts, known.offsets[rows], known.offsets[rows + 1], known.nodes, counts)
    return counts


def _tensor(array: npt.NDArray[np.float32]) -> torch.Tensor:
    """Without a copy, also of a read-only map, which is not written to."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def _facts(scorer: Scorer, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Squared lengths without the bias, and biases: (2, N)."""
    bias = int(scorer.config.bias)
    return np.stack([np.square(vectors[:, bias:]).sum(1), vectors[:, 0]])


@kernel
def _to_scores(code: int, bias: int, products: Any, anchors: Any, candidates: Any) -> None:
    """All pairs' products (N, M) become scores; anchors (2, N) and candidates (2, M): squared lengths and biases."""
    for i in range(products.shape[0]):
        own, own_bias = anchors[0, i], anchors[1, i]
        scores.to_scores(code, bias, own, own_bias, candidates[0], candidates[1], 0, products.shape[1], products[i], 0)


@kernel
def _count(
    values: Any, positives: Any, true: Any, part: int, parts: int, starts: Any, ends: Any, known: Any, counts: Any
) -> None:
    """Add what one partition's scores (N, M) come to. A node is not counted against itself."""
    num_rows, num_nodes = values.shape
    for i in range(num_rows):
        row = values[i]
        positive = positives[i]
        if true[i] % parts == part:
            row[true[i] // parts] = -np.inf
        higher, same = 0, 0
        for j in range(num_nodes):
            higher += 1 if row[j] > positive else 0
            same += 1 if row[j] == positive else 0
        counts[i, 0] += higher
        counts[i, 1] += same
        for at in range(starts[i], ends[i]):
            node = known[at]
            if node % parts == part:
                counts[i, 2] += 1 if row[node // parts] > positive else 0
                counts[i, 3] += 1 if row[node // parts] == positive else 0


class Known:
    """For each edge the nodes that make a known edge in its true node's place: nodes[offsets[i]:offsets[i + 1]]."""

    def __init__(self, graph: Graph, edges: Edges, side: int) -> None:
        """Streams over all splits and keeps only what the edges ask for. side: 0 for tails, 1 for heads."""
        wanted, which = np.unique(_query(graph, edges, side), return_inverse=True)
        found = []
        for split in graph.splits:
            for piece in graph.edges(split).pieces():
                query = _query(graph, piece, side)
                place = np.minimum(np.searchsorted(wanted, query), len(wanted) - 1)
                hit = wanted[place] == query
                nodes = np.asarray(piece.tails if side == 0 else piece.heads)[hit].astype(np.int64)
                found.append(np.unique(place[hit] * graph.num_nodes + nodes))
        pairs = np.unique(np.concatenate(found))
        starts = np.searchsorted(pairs, np.arange(len(wanted) + 1) * graph.num_nodes)
        sizes = np.diff(starts)[which]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(self.offsets[-1]) + np.repeat(starts[which] - self.offsets[:-1], sizes)
        self.nodes = (pairs % graph.num_nodes)[index]
        self._own = np.asarray(edges.tails if side == 0 else edges.heads)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Known nodes of each edge, without its own."""
        own = self.nodes == np.repeat(self._own, np.diff(self.offsets))
        has_own = np.bincount(
            np.repeat(np.arange(len(self._own)), np.diff(self.offsets))[own], minlength=len(self._own)
        )
        return np.diff(self.offsets) - np.minimum(has_own, 1)


def _query(graph: Graph, edges: Edges, side: int) -> npt.NDArray[np.int64]:
    """What is given when a side is guessed, as one number: the other node and the relation."""
    given = np.asarray(edges.heads if side == 0 else edges.tails).astype(np.int64)
    return given * graph.num_relations + np.asarray(edges.relations)
