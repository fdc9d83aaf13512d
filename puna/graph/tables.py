"""Tables of vectors under many workers without locks: fresh rows, gathering, row-wise Adagrad on scattered gradients.

    sum += mean_d(g_d^2);  row -= rate * g / (sqrt(sum) + 1e-10)          (PBG sheet: one number of state a row)

g is the whole gradient of a row in a batch: what several slots of the batch hold of one row is added up first. A worker
divides by the sum that it wrote itself, so that under races it never divides by less than its own gradient.
"""

import math
from typing import Any

import numpy as np

from puna.sparse.compiled import exact_kernel, kernel
from puna.sparse.hashing import mix

EPSILON = np.float32(1e-10)
LARGEST = np.finfo(np.float32).max  # kernels compare with it: LLVM may reorder isfinite, which is x - x == 0, away
_ZERO, _ONE = np.float32(0), np.float32(1)
_TO_UNIT = 2.0**-53


@exact_kernel
def draw(key: Any, bound: int, first: int, out: Any) -> None:
    """Whole numbers below `bound`, evenly; the n-th is a function of (key, first + n)."""
    for n in range(out.shape[0]):
        bits = mix(key + np.uint64(first + n + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        out[n] = np.int32((bits * np.uint64(bound)) >> np.uint64(32))


@exact_kernel
def draw_groups(key: Any, num_rows: int, near: Any, chunk: int, pool: Any, num_uniform: int, out: Any) -> None:
    """For each group, a row of `out`: its `chunk` rows of near, `num_uniform` rows below num_rows, then rows that stand
    anywhere in `pool`."""
    width, uniform_end = out.shape[1], chunk + num_uniform
    for g in range(out.shape[0]):
        for n in range(chunk):
            out[g, n] = near[g * chunk + n]
        draw(key, num_rows, g * width, out[g, chunk:uniform_end])
        draw(key, pool.shape[0], g * width + num_uniform, out[g, uniform_end:])
        for n in range(uniform_end, width):
            out[g, n] = pool[out[g, n]]


@exact_kernel
def fill_normal(key: Any, scale: float, first: int, step: int, out: Any) -> None:
    """out[r] = normal numbers of node first + r * step, a function of (key, node), however nodes are cut up."""
    dim = out.shape[1]
    for r in range(out.shape[0]):
        seed = mix(key ^ mix(np.uint64(first + r * step) + np.uint64(1)))
        for k in range(0, dim, 2):
            a = mix(seed + np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))
            b = mix(seed + np.uint64(k + 2) * np.uint64(0x9E3779B97F4A7C15))
            radius = math.sqrt(-2.0 * math.log((float(a >> np.uint64(11)) + 1.0) * _TO_UNIT))
            angle = 2.0 * math.pi * float(b >> np.uint64(11)) * _TO_UNIT
            out[r, k] = scale * radius * math.cos(angle)
            if k + 1 < dim:
                out[r, k + 1] = scale * radius * math.sin(angle)


@kernel
def gather(table: Any, rows: Any, max_norm: Any, out: Any) -> None:
    """out[i] = table[rows[i]], zeros where that is -1; a row longer than max_norm (if above 0) is shortened first."""
    dim = table.shape[1]
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0:
            for k in range(dim):
                out[i, k] = _ZERO
            continue
        if max_norm > _ZERO:
            square = _ZERO
            for k in range(dim):
                square += table[row, k] * table[row, k]
            if square > max_norm * max_norm:
                scale = max_norm / np.sqrt(square)
                for k in range(dim):
                    table[row, k] *= scale
        for k in range(dim):
            out[i, k] = table[row, k]


@kernel
def gather_bags(table: Any, offsets: Any, features: Any, rows: Any, out: Any) -> None:
    """out[i] = the mean of the rows features[offsets[r]:offsets[r + 1]] of table, r = rows[i]; zeros where r is -1."""
    dim = table.shape[1]
    for i in range(rows.shape[0]):
        for k in range(dim):
            out[i, k] = _ZERO
        if rows[i] < 0:
            continue
        start, end = offsets[rows[i]], offsets[rows[i] + 1]
        for at in range(start, end):
            vector = table[features[at]]
            for k in range(dim):
                out[i, k] += vector[k]
        scale = _ONE / np.float32(end - start)
        for k in range(dim):
            out[i, k] *= scale


def spread(offsets: Any, features: Any, rows: Any, grads: Any) -> tuple[Any, Any]:
    """What gradients of bags mean for their features: a row and a gradient for each feature of each of `rows`."""
    sizes = np.where(rows >= 0, offsets[rows + 1] - offsets[rows], 0)
    out = np.empty(int(sizes.sum()), np.int32), np.empty((int(sizes.sum()), grads.shape[1]), np.float32)
    _spread(offsets, features, rows, grads, *out)
    return out


@kernel
def _spread(offsets: Any, features: Any, rows: Any, grads: Any, rows_out: Any, grads_out: Any) -> None:
    filled = 0
    for i in range(rows.shape[0]):
        if rows[i] < 0:
            continue
        start, end = offsets[rows[i]], offsets[rows[i] + 1]
        share = _ONE / np.float32(end - start)
        for at in range(start, end):
            rows_out[filled] = features[at]
            for k in range(grads.shape[1]):
                grads_out[filled, k] = share * grads[i, k]
            filled += 1


@kernel
def scatter(
    table: Any, sums: Any, rows: Any, grads: Any, rate: Any, first: Any, following: Any, unique: Any, total: Any
) -> int:
    """One row-wise Adagrad step of every row that `rows` names (-1: none), on the sum of its slots' gradients.

    first: a number a table row, all -1 before and after; following, unique: room for len(rows); total: for one row.
    Returns how many rows had a gradient that is not finite; they are as they were.
    """
    count, bad = 0, 0
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0:
            continue
        if first[row] < 0:
            unique[count] = row
            count += 1
        following[i] = first[row]
        first[row] = i
    dim = table.shape[1]
    for u in range(count):
        row = unique[u]
        slot = first[row]
        first[row] = -1
        gradient = grads[slot]
        if following[slot] >= 0:
            for k in range(dim):
                total[k] = gradient[k]
            slot = following[slot]
            while slot >= 0:
                other = grads[slot]
                for k in range(dim):
                    total[k] += other[k]
                slot = following[slot]
            gradient = total
        square = _ZERO
        for k in range(dim):
            square += gradient[k] * gradient[k]
        if not square <= LARGEST:
            bad += 1
            continue
        sum_now = sums[row] + square / np.float32(dim)
        sums[row] = sum_now
        scale = rate / (np.sqrt(sum_now) + EPSILON)
        for k in range(dim):
            table[row, k] -= scale * gradient[k]
    return bad


@kernel
def adagrad_rows(table: Any, sums: Any, grads: Any, rate: Any) -> int:
    """One row-wise Adagrad step of every row; grads[i] is the gradient of row i.

    Returns how many rows had a gradient that is not finite; they are as they were.
    """
    dim, bad = table.shape[1], 0
    for i in range(table.shape[0]):
        row, gradient = table[i], grads[i]
        square = _ZERO
        for k in range(dim):
            square += gradient[k] * gradient[k]
        if not square <= LARGEST:
            bad += 1
            continue
        sum_now = sums[i] + square / np.float32(dim)
        sums[i] = sum_now
        scale = rate / (np.sqrt(sum_now) + EPSILON)
        for k in range(dim):
            row[k] -= scale * gradient[k]
    return bad


@kernel
def add_rows(into: Any, rows: Any, vectors: Any) -> None:
    """into[rows[i]] += vectors[i], in turn."""
    for i in range(rows.shape[0]):
        row, vector = into[rows[i]], vectors[i]
        for k in range(vector.shape[0]):
            row[k] += vector[k]


@kernel
def adagrad(table: Any, sums: Any, rows: Any, grads: Any, rate: Any) -> int:
    """Element-wise Adagrad of whole rows, for relations; grads[i] is the gradient of row rows[i], each named once.

    Returns how many rows had a gradient that is not finite; they are as they were.
    """
    bad = 0
    for i in range(rows.shape[0]):
        p, s, g = table[rows[i]], sums[rows[i]], grads[i]
        square = _ZERO
        for k in range(g.shape[0]):
            square += g[k] * g[k]
        if not square <= LARGEST:
            bad += 1
            continue
        for k in range(g.shape[0]):
            sum_now = s[k] + g[k] * g[k]
            s[k] = sum_now
            p[k] -= rate * g[k] / (np.sqrt(sum_now) + EPSILON)
    return bad


@exact_kernel
def number(values: Any, slots: Any, unique: Any) -> int:
    """Give each distinct value its place in `unique` through `slots` (all -1 before); how many there are."""
    count = 0
    for i in range(values.shape[0]):
        if slots[values[i]] < 0:
            slots[values[i]] = count
            unique[count] = values[i]
            count += 1
    return count
