"""Softmax over every node, a row of scores for each question: what (known node, relation) leads to, on one side.

Edges that ask the same share the row. With W their weights' sum, p the row's softmax and w_i an edge's weight:

    loss = sum_i w_i (log sum_j exp(t_j) - t_true(i))        slope of t_j = W p_j - sum of w_i over edges true at j

This is what `Worker` computes edge by edge under all_negs, at the price of the distinct questions of a batch: a batch
is of one side, and its edges are chosen so that questions stay whole. Scores are products with the partition's own
table, which is never copied; its gradient is as large as the table.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.graph import operators
from puna.graph.config import PAIRED, GraphConfig
from puna.graph.graph import Edges
from puna.graph.losses import softmax_rows
from puna.graph.tables import adagrad, adagrad_rows, add_rows, gather, number, scatter
from puna.graph.worker import Part, Rates, Relations
from puna.sparse.padding import padded
from puna.sparse.threads import Team

ROWS = 512
"""Questions whose scores are in memory at once."""
HALF = torch.bfloat16


@dataclass(frozen=True)
class Questions:
    """A batch: Q questions of one side and their E answers, those of question q at starts[q]:starts[q + 1]."""

    side: int  # 0: tails are guessed, 1: heads
    nodes: npt.NDArray[np.int32]  # (Q,) known nodes
    relations: npt.NDArray[np.int32]  # (Q,)
    starts: npt.NDArray[np.int64]  # (Q + 1,)
    true: npt.NDArray[np.int32]  # (E,)
    weights: npt.NDArray[np.float32]  # (E,)


@dataclass(frozen=True)
class Asked:
    """Edges by the question that they answer on one side: those of question q at starts[q]:starts[q + 1]."""

    side: int
    nodes: npt.NDArray[np.int32]  # (Q,) known nodes
    relations: npt.NDArray[np.int32]  # (Q,)
    starts: npt.NDArray[np.int64]  # (Q + 1,)
    true: npt.NDArray[np.int32]  # (E,)
    weights: npt.NDArray[np.float32]  # (E,)

    @classmethod
    def of(cls, edges: Edges, side: int) -> "Asked":
        """One sort of all edges."""
        known, true = (edges.heads, edges.tails) if side == 0 else (edges.tails, edges.heads)
        asked = known * np.int64(int(edges.relations.max()) + 1) + edges.relations
        order = np.argsort(asked)
        firsts = np.flatnonzero(np.diff(asked[order], prepend=-1))
        askers = order[firsts]
        weights = np.ones(len(edges), np.float32) if edges.weights is None else edges.weights[order]
        starts = np.append(firsts, len(edges))
        return cls(side, known[askers], edges.relations[askers], starts, true[order], weights)

    def cut(self, size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """Questions in random order, in batches of about `size` edges and never more questions."""
        order = rng.permutation(len(self.nodes))
        ends = np.cumsum(np.diff(self.starts)[order])
        begins = np.append(0, ends[:-1])
        return np.split(order, np.flatnonzero(np.diff(begins // size)) + 1)

    def take(self, chosen: npt.NDArray[np.int64]) -> Questions:
        """A batch."""
        begins, counts = self.starts[chosen], np.diff(self.starts)[chosen]
        starts = np.append(0, np.cumsum(counts))
        rows = np.repeat(begins - starts[:-1], counts) + np.arange(starts[-1])
        return Questions(
            self.side, self.nodes[chosen], self.relations[chosen], starts, self.true[rows], self.weights[rows]
        )


def cut(groups: Iterable[Asked], size: int, rng: np.random.Generator) -> list[Callable[[], Questions]]:
    """Every question once, in batches of about `size` edges in random order; a batch is gathered when it is called."""
    batches = [partial(group.take, chosen) for group in groups for chosen in group.cut(size, rng)]
    return [batches[n] for n in rng.permutation(len(batches))]


EDGE_BYTES = 48
"""Of an edge's group on either side (16), and of the sort that makes one."""


def worker_bytes(config: GraphConfig, num_rows: int) -> int:
    """What one worker takes: the table's gradient, scores of a block, and vectors of a batch's questions."""
    halves = 2 * num_rows * (2 * config.dim + ROWS) if config.products == "bf16" else 0
    return halves + 4 * (num_rows * config.dim + ROWS * padded(num_rows) + (config.batch_edges + 3 * ROWS) * config.dim)


class Products:
    """The three matrix products of a block of Q questions, in float32."""

    def take(self, table: Tensor) -> None:
        """Candidates (N, D) of the blocks that follow."""
        self.table = table

    def score(self, anchors: Tensor, scores: Tensor) -> None:
        """Anchors (Q, D) with every candidate, (Q, N)."""
        torch.mm(anchors, self.table.T, out=scores)

    def back(self, slopes: Tensor, anchors: Tensor, anchor_grads: Tensor, grads: Tensor, *, anew: bool) -> None:
        """From slopes (Q, N) the gradients of anchors, and those of candidates: anew, or added to `grads`."""
        torch.mm(slopes, self.table, out=anchor_grads)
        torch.addmm(grads, slopes.T, anchors, beta=int(not anew), out=grads)


class HalfProducts(Products):
    """The same of bfloat16 copies; what they come to is float32 again."""

    def __init__(self, num_rows: int, dim: int) -> None:
        self.room, self.scores = torch.empty(num_rows, dim, dtype=HALF), torch.empty(ROWS * num_rows, dtype=HALF)

    def take(self, table: Tensor) -> None:
        """Copies them: they change from batch to batch."""
        self.table = self.room[: len(table)].copy_(table)

    def score(self, anchors: Tensor, scores: Tensor) -> None:
        """As in float32, rounded to bfloat16."""
        half = self.scores[: scores.numel()].view(scores.shape)
        scores.copy_(torch.mm(anchors.to(HALF), self.table.T, out=half))

    def back(self, slopes: Tensor, anchors: Tensor, anchor_grads: Tensor, grads: Tensor, *, anew: bool) -> None:
        """As in float32; each block's products are rounded to bfloat16, their sum is not."""
        half = self.scores[: slopes.numel()].view(slopes.shape).copy_(slopes)
        anchor_grads.copy_(half @ self.table)
        product = half.T @ anchors.to(HALF)
        grads.copy_(product) if anew else grads.add_(product)


class QuestionWorker:
    """Trains batches of questions, one at a time by all threads: a batch changes every row of the table, and workers
    without locks would undo each other's steps."""

    def __init__(self, config: GraphConfig, num_relations: int, num_rows: int, team: Team | None = None) -> None:
        """num_rows: nodes of the largest partition."""
        self.config, self.team, dim = config, team or Team(1), config.dim
        self.code, self.paired = operators.CODES[config.operator], config.operator in PAIRED
        self.grads = torch.zeros(num_rows, dim)
        self.scores = torch.empty(ROWS, padded(num_rows))
        self.products = HalfProducts(num_rows, dim) if config.products == "bf16" else Products()
        self.known, self.anchors, self.anchor_grads = torch.zeros(3, ROWS, dim).unbind()
        self.known_grads = np.zeros((config.batch_edges, dim), np.float32)
        self.relation_slots = np.full(num_relations, -1, np.int32)
        self.relation_unique = np.empty(min(num_relations, config.batch_edges), np.int32)
        num_parameters = operators.num_parameters(config.operator, dim)
        self.relation_grads = np.zeros((len(self.relation_unique), num_parameters), np.float32)
        self.first, self.following = np.full(num_rows, -1, np.int32), np.empty(config.batch_edges, np.int32)
        self.unique, self.total = np.empty(config.batch_edges, np.int32), np.empty(dim, np.float32)

    def train(
        self, batch: Questions, pool: Edges, key: int, head_part: Part, tail_part: Part, sides: Sequence[Relations],
        rates: Rates,
    ) -> tuple[float, int]:  # fmt: skip
        """One update; the loss sum, and the rows whose gradient was not finite and was not applied.

        pool and key have no part here: nothing is drawn.
        """
        known, guessed = (head_part, tail_part) if batch.side == 0 else (tail_part, head_part)
        relations = sides[batch.side]
        loss = self.differentiate(batch, known, guessed, relations)
        num_questions, names = len(batch.nodes), self.relation_unique[: self.num_relations]
        bad, rate = 0, np.float32(rates.nodes)
        if known is guessed:
            add_rows(self.grads.numpy(), batch.nodes, self.known_grads)
        else:
            bad += scatter(
                known.vectors, known.sums, batch.nodes, self.known_grads[:num_questions], rate, self.first,
                self.following, self.unique, self.total,
            )  # fmt: skip
        bad += self._step(guessed, rate)
        bad += adagrad(relations.table, relations.sums, names, self.relation_grads, np.float32(rates.relations))
        return loss, bad

    def _step(self, part: Part, rate: Any) -> int:
        grads, bad = self.grads.numpy(), []

        def act(begin: int, end: int) -> None:
            own = slice(begin, end)
            bad.append(adagrad_rows(part.vectors[own], part.sums[own], grads[own], rate))

        self.team(act, len(part.vectors))
        return sum(bad)

    def differentiate(self, batch: Questions, known: Part, guessed: Part, relations: Relations) -> float:
        """The loss sum; gradients of the guessed partition are in `grads` by row, of the known nodes in `known_grads`
        by question, of the relations in `relation_grads`."""
        num_questions = len(batch.nodes)
        self.num_relations = number(batch.relations, self.relation_slots, self.relation_unique)
        self.relation_grads[: self.num_relations] = 0
        self.known_grads[:num_questions] = 0
        table, loss = torch.from_numpy(guessed.vectors), 0.0
        self.products.take(table)
        for start in range(0, num_questions, ROWS):
            loss += self._block(batch, slice(start, min(start + ROWS, num_questions)), known, table, relations)
        if self.config.n3:
            self._regularise(batch, known, guessed, relations)
        self.relation_slots[self.relation_unique[: self.num_relations]] = -1
        return loss

    def _block(self, batch: Questions, own: slice, known: Part, table: Tensor, relations: Relations) -> float:
        """Three products: scores, gradients of anchors, gradients of candidates (added up over blocks)."""
        count, grads = own.stop - own.start, self.grads[: len(table)]
        nodes, names = batch.nodes[own], batch.relations[own]
        vectors, anchors = self.known[:count], self.anchors[:count]
        scores, anchor_grads = self.scores[:count, : len(table)], self.anchor_grads[:count]
        gather(known.vectors, nodes, np.float32(0), vectors.numpy())
        operators.operate(self.code, vectors.numpy(), names, relations.table, anchors.numpy())
        self.products.score(anchors, scores)
        loss = self._softmax(batch, own, len(table))
        self.products.back(scores, anchors, anchor_grads, grads, anew=own.start == 0)
        operators.operate_back(
            self.code, vectors.numpy(), names, relations.table, self.relation_slots, anchor_grads.numpy(),
            self.known_grads[own], self.relation_grads,
        )  # fmt: skip
        return loss

    def _softmax(self, batch: Questions, own: slice, num_nodes: int) -> float:
        """Scores become slopes; the loss sum."""
        starts, scores = batch.starts[own.start : own.stop + 1], self.scores.numpy()
        losses = np.empty(len(starts) - 1)

        def act(begin: int, end: int) -> None:
            rows = slice(begin, end)
            softmax_rows(scores[rows], num_nodes, starts[begin : end + 1], batch.true, batch.weights, losses[rows])

        self.team(act, len(losses))
        return float(losses.sum())

    def _regularise(self, batch: Questions, known: Part, guessed: Part, relations: Relations) -> None:
        """N3 of every edge's known node, relation and true node (Lacroix et al. 2018, equation 5)."""
        weight = self.config.n3
        totals = np.add.reduceat(batch.weights, batch.starts[:-1])
        operators.add_n3(self.paired, weight, known.vectors[batch.nodes], totals, self.known_grads)
        by_node = np.bincount(batch.true, batch.weights, len(guessed.vectors)).astype(np.float32)
        grads = self.grads.numpy()

        def act(begin: int, end: int) -> None:
            own = slice(begin, end)
            operators.add_n3(self.paired, weight, guessed.vectors[own], by_node[own], grads[own])

        self.team(act, len(by_node))
        if self.config.operator != "rotation":
            names = self.relation_unique[: self.num_relations]
            by_relation = np.bincount(self.relation_slots[batch.relations], totals, len(names)).astype(np.float32)
            operators.add_n3(self.paired, weight, relations.table[names], by_relation, self.relation_grads)
