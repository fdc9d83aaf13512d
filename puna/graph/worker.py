"""One worker's batch: gather, operators, scores and losses of both sides, gradients back, Adagrad. Buffers are reused.

Slots of a batch, each a vector and its gradient: heads, drawn heads, tails, drawn tails. Reciprocal relations guess the
head from h_r(tail) and the tail from g_r(head); one operator guesses both from head and g_r(tail), so its drawn tails
pass through the operator too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.graph import operators, scores
from puna.graph.config import PAIRED, GraphConfig
from puna.graph.graph import Bags, Edges
from puna.graph.scores import Compared, Pairs, prepare, restore, room_for
from puna.graph.tables import adagrad, draw_groups, gather, gather_bags, number, scatter, spread
from puna.sparse.hashing import mix
from puna.sparse.padding import padded

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """A partition in memory: vectors (N, D) and their Adagrad sums (N,); bags: where these are of features."""

    vectors: Floats
    sums: Floats
    bags: Bags | None = None

    @classmethod
    def room(cls, rows: int, dim: int) -> "Part":
        """Memory for one."""
        return cls(np.empty((rows, dim), np.float32), np.empty(rows, np.float32))

    @property
    def num_nodes(self) -> int:
        """Nodes to draw from."""
        return len(self.vectors) if self.bags is None else len(self.bags)


@dataclass(frozen=True)
class Relations:
    """Parameters of every relation's operator for one side, (R, parameters), and their Adagrad sums."""

    table: Floats
    sums: Floats


@dataclass(frozen=True)
class Rates:
    """Learning rates of a batch."""

    nodes: float
    relations: float


class Side:
    """Where the slots of one kind of node (heads or tails) are, and what is guessed there."""

    def __init__(self, vectors: Tensor, grads: Tensor, rows: Any, size: int, groups: int, drawn: int) -> None:
        dim = vectors.shape[1]
        self.vectors, self.grads = vectors, grads
        self.near, self.near_grads = vectors[:size], grads[:size]
        self.far, self.far_grads = vectors[size:], grads[size:]
        shape = (groups, drawn, dim)
        self.compared = Compared(self.near, self.near_grads, self.far.view(shape), self.far_grads.view(shape))
        self.rows, self.drawn_rows = rows[:size], rows[size:]
        self.draws = self.drawn_rows.reshape(groups, drawn)


class Worker:
    """Trains batches of one bucket at a time. Several work on the same tables without locks (HOGWILD)."""

    def __init__(self, config: GraphConfig, num_relations: int, num_rows: int) -> None:
        """num_rows: nodes of the largest partition."""
        self.config = config
        self.size = padded(config.batch_edges, config.group_edges)
        self.groups = self.size // config.group_edges
        self.drawn = num_rows if config.all_negs else config.num_candidates
        self.code, self.comparator = operators.CODES[config.operator], scores.CODES[config.comparator]
        self.bias = int(config.bias)
        self.num_parameters = operators.num_parameters(config.operator, config.dim)
        slots = self.size + self.groups * self.drawn
        self.vectors, self.grads = torch.zeros(2 * slots, config.dim), torch.zeros(2 * slots, config.dim)
        self.rows = np.full(2 * slots, -1, np.int32)
        self.heads, self.tails = (
            Side(self.vectors[own], self.grads[own], self.rows[own], self.size, self.groups, self.drawn)
            for own in (slice(slots), slice(slots, None))
        )
        self.anchors, self.anchor_grads = torch.zeros(2, self.size, config.dim), torch.zeros(2, self.size, config.dim)
        self.turned = self._turned()
        room = torch.empty(room_for(config, self.drawn))
        self.pairs = [
            Pairs(config, anchors, grads, compared, room)
            for anchors, grads, compared in zip(*self._guesses(), strict=True)
        ]
        self.lengths = np.ones((3, max(2 * slots, 2 * self.size)), np.float32)
        self.ones = np.ones(self.size, np.float32)
        self.first, self.following = np.full(num_rows, -1, np.int32), np.empty(2 * slots, np.int32)
        self.unique, self.total = np.empty(2 * slots, np.int32), np.empty(config.dim, np.float32)
        self.relation_slots = np.full(num_relations, -1, np.int32)
        self.relation_unique = np.empty(min(num_relations, self.size), np.int32)
        self.relation_grads = np.zeros((2, len(self.relation_unique), self.num_parameters), np.float32)

    def _guesses(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Compared]]:
        """For guessing tails and heads: anchors, their gradients, and what they are compared with."""
        if self.config.reciprocal:
            return self.anchors.unbind(), self.anchor_grads.unbind(), (self.tails.compared, self.heads.compared)
        return (self.heads.near, self.turned.near), self.anchor_grads.unbind(), (self.turned, self.heads.compared)

    def _turned(self) -> Compared:
        """Room for tails, true and drawn, under the operator where there is one."""
        size, groups = (0, 0) if self.config.reciprocal else (self.size, self.groups)
        near = torch.zeros(2, size, self.config.dim)
        far = torch.zeros(2, groups, self.drawn, self.config.dim)
        return Compared(near[0], near[1], far[0], far[1])

    def train(
        self,
        edges: Edges,
        pool: Edges,
        key: int,
        head_part: Part,
        tail_part: Part,
        sides: Sequence[Relations],
        rates: Rates,
    ) -> tuple[float, int]:
        """One update; the loss sum over both sides, and the rows whose gradient was not finite and was not applied.

        edges: at most batch_edges, of one relation unless relations are reciprocal. pool: the bucket's edges, whose
        ends prevalence negatives are. key: of the draws, 64 bits. sides: parameters for guessing tails, then
        (reciprocal) those for guessing heads.
        """
        loss = self.differentiate(edges, pool, key, head_part, tail_part, sides)
        names = self.relation_unique[: self.num_relations]
        bad = self._scatter(head_part, tail_part, rates)
        for side, grads in zip(sides, self.relation_grads, strict=False):
            bad += adagrad(side.table, side.sums, names, grads, np.float32(rates.relations))
        return loss, bad

    def differentiate(
        self, edges: Edges, pool: Edges, key: int, head_part: Part, tail_part: Part, sides: Sequence[Relations]
    ) -> float:
        """The loss sum; gradients are in `grads` by slot (`rows` names each slot's row) and in `relation_grads`."""
        self._gather(edges, pool, key, head_part, tail_part)
        weights = self.ones[: len(edges)] if edges.weights is None else edges.weights
        self.num_relations = number(edges.relations, self.relation_slots, self.relation_unique)
        self.relation_grads[:, : self.num_relations] = 0
        guess = self._guess_reciprocally if self.config.reciprocal else self._guess_by_one_operator
        loss = guess(edges, weights, sides)
        if self.config.n3:
            self._regularise(edges, weights, sides)
        self.relation_slots[self.relation_unique[: self.num_relations]] = -1
        return loss

    def _gather(self, edges: Edges, pool: Edges, key: int, head_part: Part, tail_part: Part) -> None:
        ends = ((self.heads, head_part, edges.heads, pool.heads), (self.tails, tail_part, edges.tails, pool.tails))
        self.num_far = []
        for n, (side, part, own, others) in enumerate(ends):
            side.rows[: len(own)] = own
            side.rows[len(own) :] = -1
            self.num_far.append(self._draw(side, len(own), part.num_nodes, others, _key(key, n)))
        half = len(self.rows) // 2
        self._fetch(head_part, self.rows[:half], self.vectors[:half].numpy())
        self._fetch(tail_part, self.rows[half:], self.vectors[half:].numpy())

    def _fetch(self, part: Part, rows: Any, out: Floats) -> None:
        if part.bags is None:
            gather(part.vectors, rows, np.float32(self.config.max_norm), out)
        else:
            gather_bags(part.vectors, part.bags.offsets, part.bags.features, rows, out)

    def _draw(self, side: Side, num_edges: int, num_rows: int, others: Any, key: Any) -> int:
        """Draw a side's nodes, for groups that have an edge; how many columns of a group hold one."""
        if self.config.all_negs:
            side.drawn_rows[:num_rows] = np.arange(num_rows, dtype=np.int32)
            side.drawn_rows[num_rows:] = -1
            return num_rows
        chunk = self.config.num_batch_negs if self.config.merges else 0
        draws = side.draws[: -(-num_edges // self.config.group_edges)]
        draw_groups(key, num_rows, side.rows, chunk, others, self.config.num_uniform_negs, draws)
        side.draws[len(draws) :] = -1
        return self.drawn

    def _guess_reciprocally(self, edges: Edges, weights: Floats, sides: Sequence[Relations]) -> float:
        known, guessed = (self.heads, self.tails), (self.tails, self.heads)
        anchors, grads = self.anchors.numpy(), self.anchor_grads.numpy()
        flat, flat_grads = anchors.reshape(-1, self.config.dim), grads.reshape(-1, self.config.dim)
        for n, relations in enumerate(sides):
            operators.operate(self.code, known[n].near.numpy(), edges.relations, relations.table, anchors[n])
            anchors[n, len(edges) :] = 0
        prepared = [(flat, flat_grads), *self._compared()]
        for lengths, (vectors, _) in zip(self.lengths, prepared, strict=False):
            prepare(self.comparator, self.bias, vectors, lengths)
        loss = sum(self._lose(n, weights, guessed[n].rows) for n in range(2))
        for lengths, (vectors, own) in zip(self.lengths, prepared, strict=False):
            restore(self.comparator, self.bias, vectors, lengths, own)
        for n, relations in enumerate(sides):
            operators.operate_back(
                self.code, known[n].near.numpy(), edges.relations, relations.table, self.relation_slots, grads[n],
                known[n].near_grads.numpy(), self.relation_grads[n],
            )  # fmt: skip
        return loss

    def _compared(self) -> list[tuple[Floats, Floats]]:
        """Slots that are compared, and their gradients: where a chunk's nodes stand among the drawn, only those."""
        if self.config.merges and self.pairs[0].by_products:
            return [
                (_flat(c.far).numpy(), _flat(c.far_grads).numpy()) for c in (self.tails.compared, self.heads.compared)
            ]
        return [(self.vectors.numpy(), self.grads.numpy())]

    def _guess_by_one_operator(self, edges: Edges, weights: Floats, sides: Sequence[Relations]) -> float:
        heads, turned, bias = self.heads, self.turned, self.bias
        relations = sides[0].table
        drawn = np.full(self.groups * self.drawn, edges.relations[0], np.int32)
        pairs = [(self.tails.near, turned.near, edges.relations), (self.tails.far, _flat(turned.far), drawn)]
        for source, out, names in pairs:
            operators.operate(self.code, source.numpy(), names, relations, out.numpy())
        turned.near[len(edges) :] = 0
        half = len(self.rows) // 2
        head_vectors, head_grads = self.vectors[:half].numpy(), self.grads[:half].numpy()
        prepared = [
            (head_vectors, head_grads),
            (turned.near.numpy(), turned.near_grads.numpy()),
            (_flat(turned.far).numpy(), _flat(turned.far_grads).numpy()),
        ]
        for n, (vectors, _) in enumerate(prepared):
            prepare(self.comparator, bias, vectors, self.lengths[n])
        loss = self._lose(0, weights, self.tails.rows) + self._lose(1, weights, heads.rows)
        heads.near_grads.add_(self.anchor_grads[0])
        turned.near_grads.add_(self.anchor_grads[1])
        for n, (vectors, grads) in enumerate(prepared):
            restore(self.comparator, bias, vectors, self.lengths[n], grads)
        self.tails.grads.zero_()
        back = [(*pairs[0], turned.near_grads, self.tails.near_grads)]
        back += [(*pairs[1], _flat(turned.far_grads), self.tails.far_grads)]
        for source, _, names, grads_out, into in back:
            operators.operate_back(
                self.code, source.numpy(), names, relations, self.relation_slots, grads_out.numpy(), into.numpy(),
                self.relation_grads[0],
            )  # fmt: skip
        return loss

    def _lose(self, side: int, weights: Floats, true_rows: Any) -> float:
        """side: 0 where tails are guessed, 1 heads. Under all_negs a true node's own column is no negative."""
        true = true_rows[: len(weights)].astype(np.int64) if self.config.all_negs else None
        return self.pairs[side].lose(weights, self.num_far[1 - side], true)

    def _regularise(self, edges: Edges, weights: Floats, sides: Sequence[Relations]) -> None:
        weight, paired = self.config.n3, self.config.operator in PAIRED
        for side in (self.heads, self.tails):
            operators.add_n3(paired, weight * len(sides), side.near.numpy(), weights, side.near_grads.numpy())
        if self.config.operator == "rotation":
            return
        names = self.relation_unique[: self.num_relations]
        shares = np.bincount(self.relation_slots[edges.relations], weights, len(names)).astype(np.float32)
        for relations, grads in zip(sides, self.relation_grads, strict=False):
            operators.add_n3(paired, weight, relations.table[names], shares, grads)

    def _scatter(self, head_part: Part, tail_part: Part, rates: Rates) -> int:
        half, grads, bad = len(self.rows) // 2, self.grads.numpy(), 0
        halves = [(head_part, slice(half)), (tail_part, slice(half, None))]
        for part, own in [(head_part, slice(None))] if head_part is tail_part else halves:
            rows, values, room = self.rows[own], grads[own], (self.following, self.unique)
            if part.bags is not None:
                rows, values = spread(part.bags.offsets, part.bags.features, rows, values)
                room = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
            bad += scatter(
                part.vectors, part.sums, rows, values, np.float32(rates.nodes), self.first, *room, self.total
            )
        return bad


def _key(key: int, n: int) -> Any:
    """The n-th key that comes from a key."""
    return np.uint64(mix(np.uint64((key + n) % 2**64)))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])
