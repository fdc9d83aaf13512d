"""Scores of many pairs of vectors at once, the loss on them, and the gradients, around three matrix products a side.

`prepare` turns vectors in place into what the comparator multiplies; `Pairs` scores anchors (one an edge) against what
they are compared with: the true one, the others of the chunk, and nodes drawn for a group of chunks. Higher is better.

A product of prepared vectors d = a . b becomes a score (n: squared length, 0: bias, which is not in d and n):

    dot, cos     d                                         cos divides by the length first
    squared_l2   -(n_a + n_b - 2 d)
    l2           -sqrt(n_a + n_b - 2 d)                    all of them + a_0 + b_0 with a bias
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from puna.graph import losses
from puna.graph.config import Comparator, GraphConfig
from puna.graph.losses import MASKED, row_loss
from puna.graph.operators import FAST

DOT, COS, L2, SQUARED_L2 = range(4)
CODES: dict[Comparator, int] = {"dot": DOT, "cos": COS, "l2": L2, "squared_l2": SQUARED_L2}
SMALLEST = np.float32(1e-12)  # length that a vector is taken to have at least where it is divided by it
NEAR = np.float32(1e-6)  # squared distance, as a share of n_a + n_b, below which float32 cannot tell it from none
_ZERO, _TWO = np.float32(0), np.float32(2)
BLOCK_BYTES = 1 << 20  # of scores that are worked on at once: what stays in the caches


@njit(nogil=True, fastmath=FAST, cache=True)
def prepare(code: int, bias: int, vectors: Any, lengths: Any) -> None:
    """Divide by the length, under cos; `lengths` (N,) keeps it for `restore`."""
    if code != COS:
        return
    for i in range(vectors.shape[0]):
        v = vectors[i, bias:]
        square = _ZERO
        for k in range(v.shape[0]):
            square += v[k] * v[k]
        length = max(np.sqrt(square), SMALLEST)
        lengths[i] = length
        inverse = np.float32(1) / length
        for k in range(v.shape[0]):
            v[k] *= inverse


@njit(nogil=True, fastmath=FAST, cache=True)
def restore(code: int, bias: int, vectors: Any, lengths: Any, grads: Any) -> None:
    """Undo `prepare`: the vectors are as they were, and the gradients are theirs."""
    if code != COS:
        return
    for i in range(vectors.shape[0]):
        v, g = vectors[i, bias:], grads[i, bias:]
        along = _ZERO
        for k in range(v.shape[0]):
            along += v[k] * g[k]
        length = lengths[i]
        inverse = np.float32(1) / length
        for k in range(v.shape[0]):
            g[k] = (g[k] - v[k] * along) * inverse
            v[k] *= length


@njit(nogil=True, fastmath=FAST, cache=True)
def to_scores(
    code: int, bias: int, own: Any, own_bias: Any, others: Any, biases: Any, start: int, count: int, out: Any, at: int
) -> None:
    """Products of one vector with `count` others, in out[at:], become scores.

    own, others[start:]: squared lengths; own_bias, biases[start:]: first numbers. Neither is read where it has no part.
    """
    if bias:
        for j in range(count):
            out[at + j] -= own_bias * biases[start + j]
    if code == SQUARED_L2:
        for j in range(count):
            out[at + j] = _TWO * out[at + j] - own - others[start + j]
    elif code == L2:
        for j in range(count):
            lengths = own + others[start + j]
            square = lengths - _TWO * out[at + j]
            out[at + j] = -np.sqrt(square) if square > NEAR * lengths else _ZERO
    if bias:
        for j in range(count):
            out[at + j] += own_bias + biases[start + j]


@njit(nogil=True, fastmath=FAST, cache=True)
def score_pairs(code: int, bias: int, a: Any, b: Any, out: Any) -> None:
    """out[i] = score of a[i] with b[i], both prepared; (N, D), (N, D), (N,). Distances are exact, not from products."""
    for i in range(out.shape[0]):
        total = _ZERO
        if code >= L2:
            for k in range(bias, a.shape[1]):
                difference = a[i, k] - b[i, k]
                total -= difference * difference
            if code == L2:
                total = -np.sqrt(-total)
        else:
            for k in range(bias, a.shape[1]):
                total += a[i, k] * b[i, k]
        out[i] = total + (a[i, 0] + b[i, 0] if bias else _ZERO)


@njit(nogil=True, fastmath=FAST, cache=True)
def _pairs_back(code: int, bias: int, a: Any, b: Any, score: Any, slope: Any, da: Any, db: Any) -> None:
    """Add the gradients of `score_pairs` where the loss has `slope` (N,) by its scores."""
    for i in range(slope.shape[0]):
        if bias:
            da[i, 0] += slope[i]
            db[i, 0] += slope[i]
        if code < L2:
            for k in range(bias, a.shape[1]):
                da[i, k] += slope[i] * b[i, k]
                db[i, k] += slope[i] * a[i, k]
            continue
        scale = _TWO * slope[i]
        if code == L2:
            distance = -(score[i] - a[i, 0] - b[i, 0]) if bias else -score[i]
            scale = slope[i] / distance if distance > SMALLEST else _ZERO
        for k in range(bias, a.shape[1]):
            pull = scale * (b[i, k] - a[i, k])
            da[i, k] += pull
            db[i, k] -= pull


@njit(nogil=True, fastmath=FAST, cache=True)
def _to_slopes_by_products(
    code: int, bias: int, scores: Any, slopes: Any, own_bias: Any, biases: Any, start: int, count: int, at: int,
    by_score: Any, by_product: Any,
) -> Any:  # fmt: skip
    """Slopes by scores, in slopes[at:], become slopes by products; both are added up by column, and their sums given."""
    score_sum, product_sum = _ZERO, _ZERO
    if bias:
        for j in range(count):
            score_sum += slopes[at + j]
            by_score[start + j] += slopes[at + j]
    if code < L2:
        return score_sum, product_sum
    for j in range(count):
        slope = _TWO * slopes[at + j]
        if code == L2:
            distance = -scores[at + j]
            if bias:
                distance += own_bias + biases[start + j]
            slope = slopes[at + j] / distance if distance > SMALLEST else _ZERO
        slopes[at + j] = slope
        product_sum += slope
        by_product[start + j] += slope
    return score_sum, product_sum


@njit(nogil=True, fastmath=FAST, cache=True)
def _lose(
    kinds: Any, scalars: Any, sizes: Any, weights: Any, own: Any, own_biases: Any, positives: Any, near: Any, far: Any,
    skip: Any, slopes: Any, anchor_sums: Any, near_facts: Any, far_facts: Any, scores: Any, t: Any,
) -> float:  # fmt: skip
    """Losses of a block of rows; `near` (rows, chunk) and `far` (rows, drawn), products, become slopes by products.

    sizes: of a chunk, of a group, the block's first row and group, far columns that hold a node. Rows beyond the weights
    are padding. skip[row]: the far column that is the true node, or -1. anchor_sums (rows, 2): sums of slopes by scores
    and by products. near_facts, far_facts (4, nodes): squared lengths, biases, the same sums by node.
    """
    comparator, loss, bias = kinds[0], kinds[1], kinds[2]
    chunk, group, first, first_group, num_far = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    plain = comparator < L2 and not bias
    num_near, width = near.shape[1], far.shape[1]
    num_rows = weights.shape[0]
    total = 0.0
    for r in range(near.shape[0]):
        i = first + r
        if i >= num_rows:
            for j in range(num_near):
                near[r, j] = _ZERO
            for j in range(width):
                far[r, j] = _ZERO
            continue
        for j in range(num_near):
            t[j] = near[r, j]
        for j in range(width):
            t[num_near + j] = far[r, j]
        chunk_start, far_start = i // chunk * chunk, (first_group + r // group) * width
        if not plain:
            to_scores(comparator, bias, own[i], own_biases[i], near_facts[0], near_facts[1], chunk_start, num_near, t, 0)
            to_scores(comparator, bias, own[i], own_biases[i], far_facts[0], far_facts[1], far_start, width, t, num_near)
        count = num_far
        if num_near:
            present = min(chunk, num_rows - chunk_start)
            t[i - chunk_start] = MASKED
            for j in range(present, num_near):
                t[j] = MASKED
            count += present - 1
        for j in range(num_near + num_far, t.shape[0]):
            t[j] = MASKED
        if skip[i] >= 0:
            t[num_near + skip[i]] = MASKED
            count -= 1
        if not plain:
            scores[:] = t
        lost, slopes[i] = row_loss(loss, positives[i], t, count, weights[i], scalars[0], scalars[1])
        total += lost
        if not plain:
            near_sums = _to_slopes_by_products(
                comparator, bias, scores, t, own_biases[i], near_facts[1], chunk_start, num_near, 0, near_facts[2],
                near_facts[3],
            )  # fmt: skip
            far_sums = _to_slopes_by_products(
                comparator, bias, scores, t, own_biases[i], far_facts[1], far_start, width, num_near, far_facts[2],
                far_facts[3],
            )  # fmt: skip
            anchor_sums[i, 0] = near_sums[0] + far_sums[0]
            anchor_sums[i, 1] = near_sums[1] + far_sums[1]
        for j in range(num_near):
            near[r, j] = t[j]
        for j in range(width):
            far[r, j] = t[num_near + j]
    return total


@njit(nogil=True, fastmath=FAST, cache=True)
def _facts(code: int, bias: int, vectors: Any, facts: Any) -> None:
    """facts (4, N): squared lengths and biases, where they have a part in a score, and room for two sums."""
    if code < L2 and not bias:
        return
    for i in range(vectors.shape[0]):
        total = _ZERO
        for k in range(bias, vectors.shape[1]):
            total += vectors[i, k] * vectors[i, k]
        facts[0, i] = total
        facts[1, i] = vectors[i, 0]
        facts[2, i] = _ZERO
        facts[3, i] = _ZERO


@njit(nogil=True, fastmath=FAST, cache=True)
def _correct(code: int, bias: int, vectors: Any, by_score: Any, by_product: Any, grads: Any) -> None:
    """What matrix products leave out of the gradients: the squared lengths of a distance, and the bias."""
    if code < L2 and not bias:
        return
    for i in range(by_score.shape[0]):
        if code >= L2:
            for k in range(vectors.shape[1]):
                grads[i, k] -= by_product[i] * vectors[i, k]
        if bias:
            grads[i, 0] = by_score[i]


@dataclass(frozen=True)
class Compared:
    """What anchors are compared with, prepared, and room for the gradients: near (B, D), far (groups, drawn, D)."""

    near: Tensor
    near_grads: Tensor
    far: Tensor
    far_grads: Tensor


class Pairs:
    """Buffers for one side of one worker's batches: `lose` scores, loses and differentiates. No memory is allocated."""

    def __init__(self, config: GraphConfig, num_far: int) -> None:
        """num_far: nodes drawn for a group."""
        self.chunk, self.group, self.num_far = config.chunk_edges, config.group_edges, num_far
        self.num_near = 0 if config.all_negs else config.num_batch_negs
        self.size = padded(config.batch_edges, self.group)
        comparator, loss = CODES[config.comparator], losses.CODES[config.loss]
        self.kinds = np.array([comparator, loss, config.bias], np.int64)
        self.scalars = np.array([config.margin, config.temperature], np.float32)
        self.block = max(1, min(self.size // self.group, BLOCK_BYTES // (4 * self.group * max(1, num_far))))
        rows = self.block * self.group
        self.near = torch.empty(rows, self.num_near)
        self.far = torch.empty(rows, num_far)
        self.scores, self.t = np.empty((2, self.num_near + num_far), np.float32)
        self.positives, self.slopes = np.zeros((2, self.size), np.float32)
        self.anchor_sums = np.zeros((self.size, 2), np.float32)
        self.anchor_facts, self.near_facts = np.zeros((2, 4, self.size), np.float32)
        self.far_facts = np.zeros((4, self.size // self.group * num_far), np.float32)
        self.no_skip = np.full(self.size, -1, np.int64)

    def lose(
        self,
        anchors: Tensor,
        anchor_grads: Tensor,
        compared: Compared,
        weights: Any,
        num_far: int | None = None,
        skip: Any = None,
    ) -> float:
        """Loss of the rows of `weights`; fills the gradients of anchors and of what they are compared with.

        anchors (B, D), prepared; row i's true node is row i of near. B is whole groups; rows beyond the weights are
        finite padding. num_far: columns of far that hold a node; the others are masked. skip: for each row the column of
        far that is its true node, or -1.
        """
        comparator, _, bias = self.kinds
        skip = self.no_skip if skip is None else skip
        num_far = self.num_far if num_far is None else num_far
        num_rows = len(weights)
        a, da, b, db = (tensor.numpy() for tensor in (anchors, anchor_grads, compared.near, compared.near_grads))
        far, far_grads = (tensor.view(-1, a.shape[1]).numpy() for tensor in (compared.far, compared.far_grads))
        score_pairs(comparator, bias, a[:num_rows], b[:num_rows], self.positives[:num_rows])
        for vectors, facts in ((a, self.anchor_facts), (b, self.near_facts), (far, self.far_facts)):
            _facts(comparator, bias, vectors, facts)
        total = 0.0
        for first in range(0, len(compared.far), self.block):
            last = min(first + self.block, len(compared.far))
            total += self._block(first, last, anchors, anchor_grads, compared, weights, num_far, skip)
        _correct(comparator, bias, a, self.anchor_sums[:num_rows, 0], self.anchor_sums[:num_rows, 1], da)
        if self.num_near:
            _correct(comparator, bias, b, self.near_facts[2], self.near_facts[3], db)
        else:
            db.fill(0)
        _correct(comparator, bias, far, self.far_facts[2], self.far_facts[3], far_grads)
        _pairs_back(comparator, bias, a, b, self.positives[:num_rows], self.slopes[:num_rows], da, db)
        return total

    def _block(
        self, first: int, last: int, anchors: Tensor, anchor_grads: Tensor, compared: Compared, weights: Any,
        num_far: int, skip: Any,
    ) -> float:  # fmt: skip
        """Groups first to last: products, losses, and the three products back."""
        dim, count = anchors.shape[1], last - first
        rows = slice(first * self.group, last * self.group)
        a, da = anchors[rows].view(count, self.group, dim), anchor_grads[rows].view(count, self.group, dim)
        num_rows = count * self.group
        far = self.far[:num_rows].view(count, self.group, self.num_far)
        near = self.near[:num_rows]
        drawn, drawn_grads = compared.far[first:last], compared.far_grads[first:last]
        chunks = (num_rows // self.chunk, self.chunk, dim)
        if self.num_near:
            b, db = compared.near[rows].view(chunks), compared.near_grads[rows].view(chunks)
            square = near.view(chunks[0], self.chunk, self.chunk)
            torch.bmm(a.view(chunks), b.transpose(1, 2), out=square)
        if self.num_far:
            torch.bmm(a, drawn.transpose(1, 2), out=far)
        sizes = np.array([self.chunk, self.group, rows.start, first, num_far])
        total = _lose(
            self.kinds, self.scalars, sizes, weights, self.anchor_facts[0], self.anchor_facts[1], self.positives,
            near.numpy(), far.view(num_rows, self.num_far).numpy(), skip, self.slopes, self.anchor_sums,
            self.near_facts, self.far_facts, self.scores, self.t,
        )  # fmt: skip
        if self.num_far:
            torch.bmm(far, drawn, out=da)
            torch.bmm(far.transpose(1, 2), a, out=drawn_grads)
        else:
            da.zero_()
        if self.num_near:
            da.view(chunks).baddbmm_(square, b)
            torch.bmm(square.transpose(1, 2), a.view(chunks), out=db)
        return total


def padded(rows: int, group: int) -> int:
    """Rows in whole groups."""
    return -(-rows // group) * group
