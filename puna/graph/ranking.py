"""Link prediction: where the true node ranks among all nodes of its type, for the tail and for the head of every edge.

rank = 1 + nodes that score higher + half of the other nodes that score the same (a tie is worth its mean place).
Filtered ranks leave out nodes that make another known edge with the same other end and relation, in any split.
Partitions are visited one at a time, so that memory does not grow with the graph.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from puna.console import track
from puna.graph import operators, scores
from puna.graph.config import GraphConfig, Sampling
from puna.graph.graph import Edges, Graph, Pair
from puna.graph.layout import Layout
from puna.graph.tables import gather_bags
from puna.graph.worker import Relations
from puna.sparse.compiled import kernel

EVAL_QUERIES, EVAL_NODES = 1024, 1 << 14
"""Edges that are ranked at once, and nodes that they are ranked among at once."""
PADDED = 64
"""Columns of a product come in whole numbers of these, so that all are summed alike."""
HITS = (1, 3, 10, 50)


@dataclass(frozen=True)
class Scorer:
    """A trained model to read; relations[0] guesses tails, relations[1] heads.

    view(partition), view(partition, rows): vectors of a partition, or of a slice of its rows.
    """

    config: GraphConfig
    graph: Graph
    view: Callable[..., np.ndarray]
    relations: Sequence[Relations]

    @property
    def kinds(self) -> tuple[int, int]:
        """Codes of the comparator and the bias."""
        return scores.CODES[self.config.comparator], int(self.config.bias)

    @cached_property
    def layout(self) -> Layout:
        """Where nodes' rows are."""
        return Layout.of(self.config, self.graph.types)

    def vectors(self, nodes: npt.NDArray[Any], kind: int = 0) -> npt.NDArray[np.float32]:
        """Copies of the vectors of these nodes of a type, (N, D); means where they are bags of features."""
        out = np.empty((len(nodes), self.config.dim), np.float32)
        if bags := self.graph.bags[kind]:
            gather_bags(self.features(kind), bags.offsets, bags.features, nodes, out)
            return out
        for part, own, rows in self.layout.places(kind, nodes):
            out[own] = self.view(part)[rows]
        return out

    def features(self, kind: int) -> np.ndarray:
        """Vectors of the features of a type, (F, D)."""
        (part,) = self.layout.homes(kind)
        return self.view(part, self.layout.span(kind, part))

    def pieces(self, kind: int, size: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Vectors of a type, at most `size` at a time: the first one's node, how far apart the nodes of two rows are,
        and the rows."""
        if bags := self.graph.bags[kind]:
            for start in range(0, len(bags), size):
                yield start, 1, self.vectors(np.arange(start, min(start + size, len(bags))), kind)
            return
        step = self.layout.step(kind)
        for first, part in enumerate(self.layout.homes(kind)):
            span = self.layout.span(kind, part)
            for start in range(span.start, span.stop, size):
                rows = slice(start, min(start + size, span.stop))
                yield first + (start - span.start) * step, step, self.view(part, rows)

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
    num_raw: npt.NDArray[np.float64]  # (2, N): nodes that a rank is among
    num_filtered: npt.NDArray[np.float64]

    def figures(self) -> dict[str, Any]:
        """mrr, its 95 % interval (over edges), mr, hits1 .. hits50, auc; filtered and raw."""
        return {
            "num_edges": len(self.edges),
            "filtered": summary(self.filtered, self.num_filtered),
            "raw": summary(self.raw, self.num_raw),
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


def draw_candidates(
    graph: Graph, count: int, sampling: Sampling, seed: int = 0, pair: Pair = (0, 0)
) -> npt.NDArray[np.int64]:
    """Nodes to rank among instead of all: (2, count), sorted, those for tails and those for heads; drawn with
    replacement, a function of the graph and the seed alone.

    sampling: uniform, or prevalence: as often as nodes are tails (heads) of training edges. pair: the types that heads
    and tails are of.
    """
    rng = np.random.default_rng([seed, count, *(graph.pairs.index(pair),) * graph.is_typed])
    if sampling == "uniform":
        return np.sort([rng.integers(graph.counts[kind], size=count) for kind in reversed(pair)], axis=1)
    edges = graph.edges("train")
    if graph.is_typed:
        edges = edges.take(np.flatnonzero(graph.pair_of[edges.relations] == graph.pairs.index(pair)))
    places = np.sort(rng.integers(len(edges), size=(2, count)), axis=1)
    drawn = np.stack([edges.tails[places[0]], edges.heads[places[1]]]).astype(np.int64)
    return np.sort(drawn, axis=1)


Candidates = Mapping[Pair, npt.NDArray[np.int64]]
"""Candidates of `draw_candidates` for edges from one type to another."""


def draw_all(graph: Graph, edges: Edges, count: int, sampling: Sampling, seed: int = 0) -> Candidates:
    """The candidates of `draw_candidates` for every pair of types that edges lead from and to."""
    pairs = [graph.pairs[n] for n in np.unique(graph.pair_of[edges.relations])]
    return {pair: draw_candidates(graph, count, sampling, seed, pair) for pair in pairs}


def rank(scorer: Scorer, edges: Edges, candidates: Candidates | None = None) -> Ranks:
    """Rank every edge's tail and head among all nodes of its type, or among candidates of `draw_all`.

    A candidate that is the true node itself counts neither for nor against it; one that is drawn twice counts twice.
    """
    num_edges, graph = len(edges), scorer.graph
    counts, among = np.zeros((2, num_edges, 6), np.int64), np.zeros((2, num_edges), np.int64)
    order = np.arange(num_edges)
    if not scorer.config.reciprocal:
        order = np.argsort(edges.relations, kind="stable")
    knowns = [Known(graph, edges, side) for side in range(2)]
    fields: dict[tuple[int, Pair], _Nodes | _Drawn] = {}
    for rows, pair in track(list(_blocks(graph, edges, order, scorer.config.reciprocal)), "ranking"):
        block = edges.take(rows)
        for side in range(2):
            if (side, pair) not in fields:
                drawn = None if candidates is None else candidates[pair][side]
                kind = pair[1 - side]
                fields[side, pair] = _Nodes(scorer, kind) if drawn is None else _Drawn(scorer, kind, drawn)
            counts[side, rows] = _count_block(scorer, block, pair, side, knowns[side], rows, fields[side, pair])
            among[side, rows] = fields[side, pair].size
    higher, same, known_higher, known_same, own, num_known = (counts[..., n] for n in range(6))
    if candidates is None:
        num_known = np.stack([known.sizes() for known in knowns])
    raw = 1 + higher + same / 2
    filtered = 1 + higher - known_higher + (same - known_same) / 2
    num_raw = (among - own + 1).astype(np.float64)
    return Ranks(edges, raw, filtered, num_raw, num_raw - num_known)


def _blocks(graph: Graph, edges: Edges, order: npt.NDArray[Any], mixed: bool) -> Iterator[tuple[Any, Pair]]:
    """Rows of edges, so many at a time, and the types that they lead from and to; of one relation each where a relation
    acts on the candidates."""
    pairs = graph.pair_of[edges.relations]
    order = order[np.argsort(pairs[order], kind="stable")]
    marks = pairs[order] if mixed else edges.relations[order]
    starts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(order)]
    for start, end in itertools.pairwise(starts):
        for s in range(start, end, EVAL_QUERIES):
            rows = order[s : min(s + EVAL_QUERIES, end)]
            yield rows, graph.pairs[pairs[rows[0]]]


@dataclass(frozen=True)
class _Turned:
    """How a side's candidates become what its anchors are compared with: under `relation`, where it acts on them."""

    scorer: Scorer
    relation: int | None

    def __call__(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.relation is not None:
            vectors = self.scorer.turned(0, vectors, np.full(len(vectors), self.relation))
        return self.scorer.prepared(vectors)

    def scores(self, anchors: npt.NDArray[np.float32], facts: Any, vectors: Any) -> npt.NDArray[np.float32]:
        """Scores of all anchors with all of these nodes, (N, M), and behind them columns that mean nothing."""
        candidates = self(np.pad(vectors, ((0, -len(vectors) % PADDED), (0, 0)), mode="edge"))
        found = (torch.from_numpy(anchors) @ _tensor(candidates).T).numpy()
        _to_scores(*self.scorer.kinds, found, facts, _facts(self.scorer, candidates))
        return found


class _Nodes:
    """All nodes of a type, some of a partition at a time."""

    def __init__(self, scorer: Scorer, kind: int) -> None:
        self.scorer, self.kind = scorer, kind
        self.size = scorer.graph.counts[kind]

    def count(
        self, turned: _Turned, anchors: Any, facts: Any, true: Any, starts: Any, ends: Any, known: Any, counts: Any
    ) -> None:
        """Add to `counts` (N, 6). A true node's score is that of the very product it stands in among the others, so
        that ties are ties: where a product of its own was another in the last bit, the nodes are gone through again."""
        own_vectors = self.scorer.vectors(true, self.kind)
        positives = np.diagonal(turned.scores(anchors, facts, own_vectors)).copy()
        for _ in range(2):
            seen = positives.copy()
            counts[:] = 0
            counts[:, 4] = 1
            for first, step, piece in self.scorer.pieces(self.kind, EVAL_NODES):
                vectors = np.ascontiguousarray(piece)
                values = turned.scores(anchors, facts, vectors)
                place, off = np.divmod(true - first, step)
                here = np.flatnonzero((off == 0) & (place >= 0) & (place < len(vectors)))
                seen[here] = values[here, place[here]]
                _count(values, len(vectors), positives, true, first, step, starts, ends, known, counts)
            if np.array_equal(seen, positives):
                return
            positives = seen


class _Drawn:
    """Drawn candidates of a type: their vectors stay in memory."""

    def __init__(self, scorer: Scorer, kind: int, nodes: npt.NDArray[np.int64]) -> None:
        self.scorer, self.kind, self.nodes = scorer, kind, nodes
        self.vectors, self.size = scorer.vectors(nodes, kind), len(nodes)

    def count(
        self, turned: _Turned, anchors: Any, facts: Any, true: Any, starts: Any, ends: Any, known: Any, counts: Any
    ) -> None:
        """Add to `counts` (N, 6). True nodes stand behind the candidates in one product, so that ties are ties."""
        vectors = np.concatenate([self.vectors, self.scorer.vectors(true, self.kind)])
        values = turned.scores(anchors, facts, vectors)
        positives = values[np.arange(len(true)), self.size + np.arange(len(true))]
        _count_drawn(values, positives, true, self.nodes, starts, ends, known, counts)


def _count_block(
    scorer: Scorer,
    edges: Edges,
    pair: Pair,
    side: int,
    known: "Known",
    rows: npt.NDArray[Any],
    field: "_Nodes | _Drawn",
) -> Any:
    """side: 0 where tails are guessed, 1 heads. (N, 6): nodes that score higher, that score the same, those of them
    that are known (higher, same), candidates that are the true node, other candidates that are known."""
    config = scorer.config
    given, true = (edges.heads, edges.tails) if side == 0 else (edges.tails, edges.heads)
    turns_candidates = not config.reciprocal and side == 0
    vectors = scorer.vectors(np.asarray(given), pair[side])
    anchors = vectors if turns_candidates else scorer.turned(side if config.reciprocal else 0, vectors, edges.relations)
    anchors = scorer.prepared(anchors)
    turned = _Turned(scorer, int(edges.relations[0]) if turns_candidates else None)
    counts = np.zeros((len(edges), 6), np.int64)
    true = np.asarray(true).astype(np.int64)
    spans = known.offsets[rows], known.offsets[rows + 1], known.nodes
    field.count(turned, anchors, _facts(scorer, anchors), true, *spans, counts)
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
    values: Any, num_nodes: int, positives: Any, true: Any, first: int, step: int, starts: Any, ends: Any, known: Any,
    counts: Any,
) -> None:  # fmt: skip
    """Add what scores (N, num_nodes) of nodes first, first + step, .. come to. A node is not counted against itself."""
    for i in range(values.shape[0]):
        row = values[i]
        positive = positives[i]
        if (true[i] - first) % step == 0 and 0 <= (true[i] - first) // step < num_nodes:
            row[(true[i] - first) // step] = -np.inf
        higher, same = 0, 0
        for j in range(num_nodes):
            higher += 1 if row[j] > positive else 0
            same += 1 if row[j] == positive else 0
        counts[i, 0] += higher
        counts[i, 1] += same
        for at in range(starts[i], ends[i]):
            node = known[at]
            if (node - first) % step == 0 and 0 <= (node - first) // step < num_nodes:
                counts[i, 2] += 1 if row[(node - first) // step] > positive else 0
                counts[i, 3] += 1 if row[(node - first) // step] == positive else 0


@kernel
def _count_drawn(
    values: Any, positives: Any, true: Any, nodes: Any, starts: Any, ends: Any, known: Any, counts: Any
) -> None:
    """The same for drawn nodes, sorted, in the first columns of the scores."""
    for i in range(values.shape[0]):
        row = values[i]
        positive = positives[i]
        low, high = np.searchsorted(nodes, true[i]), np.searchsorted(nodes, true[i] + 1)
        for j in range(low, high):
            row[j] = -np.inf
        counts[i, 4] += high - low
        higher, same = 0, 0
        for j in range(nodes.shape[0]):
            higher += 1 if row[j] > positive else 0
            same += 1 if row[j] == positive else 0
        counts[i, 0] += higher
        counts[i, 1] += same
        for at in range(starts[i], ends[i]):
            if known[at] == true[i]:
                continue
            low, high = np.searchsorted(nodes, known[at]), np.searchsorted(nodes, known[at] + 1)
            counts[i, 5] += high - low
            for j in range(low, high):
                counts[i, 2] += 1 if row[j] > positive else 0
                counts[i, 3] += 1 if row[j] == positive else 0


class Known:
    """For each edge the nodes that make a known edge in its true node's place: nodes[offsets[i]:offsets[i + 1]]."""

    def __init__(self, graph: Graph, edges: Edges, side: int) -> None:
        """Streams over all splits and keeps only what the edges ask for. side: 0 for tails, 1 for heads."""
        wanted, which = np.unique(_query(graph, edges, side), return_inverse=True)
        found, most = [], max(graph.counts)
        for split in graph.splits:
            for piece in graph.pieces(split):
                query = _query(graph, piece, side)
                place = np.minimum(np.searchsorted(wanted, query), len(wanted) - 1)
                hit = wanted[place] == query
                nodes = np.asarray(piece.tails if side == 0 else piece.heads)[hit].astype(np.int64)
                found.append(np.unique(place[hit] * most + nodes))
        pairs = np.unique(np.concatenate(found))
        starts = np.searchsorted(pairs, np.arange(len(wanted) + 1) * most)
        sizes = np.diff(starts)[which]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(self.offsets[-1]) + np.repeat(starts[which] - self.offsets[:-1], sizes)
        self.nodes = (pairs % most)[index]
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
