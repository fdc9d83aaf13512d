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
import numpy.typing as npt
import torch
from torch import Tensor

from puna.graph import losses
from puna.graph.config import Comparator, GraphConfig
from puna.graph.losses import MASKED, row_loss
from puna.sparse.compiled import kernel
from puna.sparse.padding import padded

DOT, COS, L2, SQUARED_L2 = range(4)
CODES: dict[Comparator, int] = {"dot": DOT, "cos": COS, "l2": L2, "squared_l2": SQUARED_L2}
SMALLEST = np.float32(1e-12)  # length that a vector is taken to have at least where it is divided by it
NEAR = np.float32(1e-6)  # squared distance, as a share of n_a + n_b, below which float32 cannot tell it from none
_ZERO, _TWO = np.float32(0), np.float32(2)
BLOCK_BYTES = 1 << 20  # of scores that are worked on at once: what stays in the caches


@kernel
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


@kernel
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


@kernel
def to_scores(
    code: int, bias: int, own: Any, own_bias: Any, others: Any, biases: Any, start: int, count: int, out: Any, at: int
) -> None:
    """Products of one vector with `count` others, in out[at:], become scores.

    own, others[start:]: squared lengths; own_bias, biases[start:]: first numbers. Neither is read where it has no part.
    """
    out, others, biases = out[at : at + count], others[start : start + count], biases[start : start + count]
    if bias:
        for j in range(out.shape[0]):
            out[j] -= own_bias * biases[j]
    if code == SQUARED_L2:
        for j in range(out.shape[0]):
            out[j] = _TWO * out[j] - own - others[j]
    elif code == L2:
        for j in range(out.shape[0]):
            lengths = own + others[j]
            square = lengths - _TWO * out[j]
            out[j] = -np.sqrt(square) if square > NEAR * lengths else _ZERO
    if bias:
        for j in range(out.shape[0]):
            out[j] += own_bias + biases[j]


@kernel
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


@kernel
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


@kernel
def _to_slopes_by_products(
    code: int, bias: int, scores: Any, slopes: Any, own_bias: Any, facts: Any, start: int
) -> Any:
    """Slopes by scores become slopes by products; both are added up by column, from column `start` of facts on. Their
    two sums."""
    end = start + slopes.shape[0]
    biases, by_score, by_product = facts[1, start:end], facts[2, start:end], facts[3, start:end]
    score_sum, product_sum = _ZERO, _ZERO
    if bias:
        for j in range(slopes.shape[0]):
            score_sum += slopes[j]
            by_score[j] += slopes[j]
    if code < L2:
        return score_sum, product_sum
    for j in range(slopes.shape[0]):
        slope = _TWO * slopes[j]
        if code == L2:
            distance = -scores[j]
            if bias:
                distance += own_bias + biases[j]
            slope = slopes[j] / distance if distance > SMALLEST else _ZERO
        slopes[j] = slope
        product_sum += slope
        by_product[j] += slope
    return score_sum, product_sum


@kernel
def _lose(
    kinds: Any, scalars: Any, sizes: Any, weights: Any, anchor_facts: Any, positives: Any, near: Any, far: Any,
    num_far: int, true: Any, slopes: Any, anchor_sums: Any, near_facts: Any, far_facts: Any, kept: Any,
) -> float:  # fmt: skip
    """Losses of a block of rows; `near` (rows, chunk) and `far` (rows, drawn), products, become slopes by products.

    sizes: of a chunk, of a group, the block's first row and group, columns of a row that are its chunk's nodes (those
    of near, or the first of far). Rows beyond the weights are padding. num_far: far columns that hold a node.
    true[row]: the far column that is the true node, where the chunk's are not there, or -1. What is the true node or
    padding is no negative. Under dot and cos the product of a row with its true node, where there is one, gives the
    positive score and takes its slope; `positives` and `slopes` (rows,) hold both. anchor_sums (rows, 2): sums of
    slopes by scores and by products. Facts (4, N): squared lengths, biases, the same sums by node. kept: scratch.
    """
    comparator, loss, bias = kinds[0], kinds[1], kinds[2]
    chunk, group, first, first_group, num_chunk = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    plain = comparator < L2 and not bias
    num_near, width = near.shape[1], far.shape[1]
    kept_near, kept_far = kept[:num_near], kept[num_near:]
    num_rows = weights.shape[0]
    total = 0.0
    for r in range(near.shape[0]):
        i = first + r
        near_row, far_row = near[r], far[r]
        if i >= num_rows:
            _fill(near_row, _ZERO)
            _fill(far_row, _ZERO)
            continue
        chunk_start, far_start = i // chunk * chunk, (first_group + r // group) * width
        own, own_bias = anchor_facts[0, i], anchor_facts[1, i]
        if not plain:
            to_scores(comparator, bias, own, own_bias, near_facts[0], near_facts[1], chunk_start, num_near, near_row, 0)
            to_scores(comparator, bias, own, own_bias, far_facts[0], far_facts[1], far_start, width, far_row, 0)
        own_row = near_row if num_near > 0 else far_row
        count, column = num_near + num_far, i - chunk_start if num_chunk else true[i]
        if column >= 0:
            if plain:
                positives[i] = own_row[column]
            own_row[column] = MASKED
            count -= 1
        present = min(num_chunk, num_rows - chunk_start)
        _fill(own_row[present:num_chunk], MASKED)
        count -= num_chunk - present
        _fill(far_row[num_far:], MASKED)
        if not plain:
            _copy(near_row, kept_near)
            _copy(far_row, kept_far)
        lost, slopes[i] = row_loss(loss, positives[i], near_row, far_row, count, weights[i], scalars[0], scalars[1])
        total += lost
        if not plain:
            near_sums = _to_slopes_by_products(
                comparator, bias, kept_near, near_row, own_bias, near_facts, chunk_start
            )  # fmt: skip
            far_sums = _to_slopes_by_products(comparator, bias, kept_far, far_row, own_bias, far_facts, far_start)
            anchor_sums[i, 0] = near_sums[0] + far_sums[0]
            anchor_sums[i, 1] = near_sums[1] + far_sums[1]
        elif column >= 0:
            own_row[column] = slopes[i]
    return total


@kernel
def _fill(out: Any, value: Any) -> None:
    for j in range(out.shape[0]):
        out[j] = value


@kernel
def _copy(source: Any, out: Any) -> None:
    for j in range(out.shape[0]):
        out[j] = source[j]


@kernel
def _facts(bias: int, vectors: Any, facts: Any) -> None:
    """facts (4, N): squared lengths without the bias, biases, and room for two sums, empty."""
    for i in range(vectors.shape[0]):
        total = _ZERO
        for k in range(bias, vectors.shape[1]):
            total += vectors[i, k] * vectors[i, k]
        facts[0, i] = total
        facts[1, i] = vectors[i, 0]
        facts[2, i] = _ZERO
        facts[3, i] = _ZERO


@kernel
def _correct(code: int, bias: int, vectors: Any, by_score: Any, by_product: Any, grads: Any) -> None:
    """What matrix products leave out of the gradients: the squared lengths of a distance, and the bias."""
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


@dataclass(frozen=True)
class _Block:
    """Some groups of a batch: views of everything that their products read and write."""

    sizes: npt.NDArray[np.int64]  # of a chunk, of a group, first row, first group, columns that are the chunk's
    a: Tensor  # (groups, group, D)
    da: Tensor
    far: Tensor  # (groups, drawn, D)
    far_columns: Tensor  # the same, its transpose
    dfar: Tensor
    far_scores: Tensor  # (groups, group, drawn)
    far_scores_columns: Tensor
    a_chunks: Tensor  # (chunks, chunk, D)
    da_chunks: Tensor
    near: Tensor
    near_columns: Tensor
    dnear: Tensor
    near_scores: Tensor  # (chunks, chunk, chunk)
    near_scores_columns: Tensor
    near_rows: npt.NDArray[np.float32]  # (rows, chunk)
    far_rows: npt.NDArray[np.float32]  # (rows, drawn)


class Pairs:
    """One side of one worker's batches: `lose` scores, loses and differentiates, without allocating memory."""

    def __init__(self, config: GraphConfig, anchors: Tensor, anchor_grads: Tensor, compared: Compared, room: Tensor):
        """anchors (B, D), B whole groups; row i's true node is row i of near. room: `room_for` numbers."""
        self.num_chunk = 0 if config.all_negs else config.num_batch_negs
        self.num_near = 0 if config.merges else self.num_chunk
        self.num_far = compared.far.shape[1]
        self.chunk, self.group = config.chunk_edges, config.group_edges
        comparator, loss = CODES[config.comparator], losses.CODES[config.loss]
        self.comparator, self.bias = comparator, int(config.bias)
        self.kinds = np.array([comparator, loss, config.bias], np.int64)
        self.scalars = np.array([config.margin, config.temperature], np.float32)
        size, dim = anchors.shape
        self.vectors = [x.numpy() for x in (anchors, compared.near, compared.far.view(-1, dim))]
        self.grads = [x.numpy() for x in (anchor_grads, compared.near_grads, compared.far_grads.view(-1, dim))]
        self.kept = np.empty(self.num_near + self.num_far, np.float32)
        self.positives, self.slopes = np.zeros((2, size), np.float32)
        self.anchor_sums = np.zeros((size, 2), np.float32)
        self.facts = [np.zeros((4, len(vectors)), np.float32) for vectors in self.vectors]
        self.nowhere = np.full(size, -1, np.int64)
        has_true = bool(self.num_chunk) or config.all_negs
        self.by_products = has_true and comparator < L2 and not config.bias
        self.tensors, self.compared, self.room = (anchors, anchor_grads), compared, room
        self.step = block_groups(config, self.num_far)
        self.blocks: dict[int, list[_Block]] = {}

    def _cover(self, groups: int) -> list[_Block]:
        """Blocks that hold so many groups."""
        if groups not in self.blocks:
            starts = range(0, groups, self.step)
            self.blocks[groups] = [self._block(first, min(first + self.step, groups)) for first in starts]
        return self.blocks[groups]

    def _block(self, first: int, last: int) -> _Block:
        (anchors, anchor_grads), compared, room = self.tensors, self.compared, self.room
        dim, count = anchors.shape[1], last - first
        rows, num_rows = slice(first * self.group, last * self.group), count * self.group
        chunks = (num_rows // self.chunk, self.chunk, dim)
        a, da, near, dnear = (x[rows] for x in (anchors, anchor_grads, compared.near, compared.near_grads))
        near_scores = room[: num_rows * self.num_near].view(chunks[0], self.chunk, self.num_near)
        far_scores = room[num_rows * self.num_near :][: num_rows * self.num_far].view(count, self.group, self.num_far)
        far = compared.far[first:last]
        return _Block(
            np.array([self.chunk, self.group, rows.start, first, self.num_chunk]),
            a.view(count, self.group, dim), da.view(count, self.group, dim),
            far, far.transpose(1, 2), compared.far_grads[first:last],
            far_scores, far_scores.transpose(1, 2),
            a.view(chunks), da.view(chunks), near.view(chunks), near.view(chunks).transpose(1, 2), dnear.view(chunks),
            near_scores, near_scores.transpose(1, 2),
            near_scores.view(num_rows, self.num_near).numpy(), far_scores.view(num_rows, self.num_far).numpy(),
        )  # fmt: skip

    def lose(self, weights: Any, num_far: int | None = None, true: Any = None) -> float:
        """Loss of the rows of `weights`; fills the gradients of anchors and of what they are compared with.

        All vectors are prepared; rows beyond the weights are finite padding. num_far: columns of far that hold a node;
        the others are masked. true: for each row the column of far that is its true node, or -1, where rows of near are
        not among the candidates.
        """
        comparator, bias, num_rows = self.comparator, self.bias, len(weights)
        true = self.nowhere if true is None else true
        num_far = self.num_far if num_far is None else num_far
        a, b, _ = self.vectors
        da, db, _ = self.grads
        if not self.by_products:
            score_pairs(comparator, bias, a, b, self.positives[:num_rows])
        if comparator >= L2 or bias:
            for vectors, facts in zip(self.vectors, self.facts, strict=True):
                _facts(bias, vectors, facts)
        groups = -(-num_rows // self.group)
        total = sum((self._lose_block(block, weights, num_far, true) for block in self._cover(groups)), 0.0)
        self.compared.near_grads[groups * self.group :].zero_()
        self.compared.far_grads[groups:].zero_()
        if comparator >= L2 or bias:
            _correct(comparator, bias, a, self.anchor_sums[:num_rows, 0], self.anchor_sums[:num_rows, 1], da)
            for n in (1, 2) if self.num_near else (2,):
                _correct(comparator, bias, self.vectors[n], self.facts[n][2], self.facts[n][3], self.grads[n])
        if not self.num_near:
            db.fill(0)
        if not self.by_products:
            _pairs_back(comparator, bias, a, b, self.positives, self.slopes[:num_rows], da, db)
        return total

    def _lose_block(self, block: _Block, weights: Any, num_far: int, true: Any) -> float:
        """Products, losses, and the products back."""
        if self.num_near:
            torch.bmm(block.a_chunks, block.near_columns, out=block.near_scores)
        if self.num_far:
            torch.bmm(block.a, block.far_columns, out=block.far_scores)
        total = _lose(
            self.kinds, self.scalars, block.sizes, weights, self.facts[0], self.positives, block.near_rows,
            block.far_rows, num_far, true, self.slopes, self.anchor_sums, self.facts[1], self.facts[2], self.kept,
        )  # fmt: skip
        if self.num_far:
            torch.bmm(block.far_scores, block.far, out=block.da)
            torch.bmm(block.far_scores_columns, block.a, out=block.dfar)
        else:
            block.da.zero_()
        if self.num_near:
            block.da_chunks.baddbmm_(block.near_scores, block.near)
            torch.bmm(block.near_scores_columns, block.a_chunks, out=block.dnear)
        return total


def block_groups(config: GraphConfig, num_far: int) -> int:
    """Groups whose scores are worked on at once."""
    groups = padded(config.batch_edges, config.group_edges) // config.group_edges
    return min(groups, max(1, BLOCK_BYTES // (4 * config.group_edges * max(1, num_far))))


def room_for(config: GraphConfig, num_far: int) -> int:
    """Numbers that the scores of a block take, of a side at a time."""
    num_near = 0 if config.all_negs or config.merges else config.num_batch_negs
    return block_groups(config, num_far) * config.group_edges * (num_near + num_far)
