"""One true edge against its negatives: losses and their derivatives, a row of scores at a time, in cache and in place.

s is the true edge's score, t_j those of its N negatives, m the margin, p the softmax of temperature x t (no gradient
flows through it). Sums, not means (PBG sheet; self-adversarial: Sun et al. 2019, equation 5, without its halves).

    ranking           sum_j max(0, m - s + t_j)
    logistic          softplus(-s) + 1/N sum_j softplus(t_j)
    softmax           log(exp(s) + sum_j exp(t_j)) - s
    self_adversarial  softplus(-m - s) + sum_j p_j softplus(m + t_j)
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from puna.graph.config import Loss
from puna.sparse.compiled import kernel, kernel_without_nan

RANKING, LOGISTIC, SOFTMAX, SELF_ADVERSARIAL = range(4)
CODES: dict[Loss, int] = {
    "ranking": RANKING,
    "logistic": LOGISTIC,
    "softmax": SOFTMAX,
    "self_adversarial": SELF_ADVERSARIAL,
}
MASKED = np.float32(-1e9)
"""Score of what is no negative: every loss and its derivative are zero there."""

_F = np.float32
_LOG2E, _LN2_HIGH, _LN2_LOW = _F(1.44269504), _F(0.693359375), _F(-2.12194440e-4)
_LOW, _HALF, _ONE, _ZERO = _F(-87), _F(0.5), _F(1), _F(0)
_TAYLOR = tuple(_F(1 / math.factorial(n)) for n in range(7, 1, -1))
_T7, _T6, _T5, _T4, _T3, _T2 = _TAYLOR


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@kernel
def exp32(x: Any) -> Any:
    """exp of a float32 up to 88, within 3e-7 of it; zero below -87. Arithmetic that loops can turn into vector code."""
    n = np.floor(max(x, _LOW) * _LOG2E + _HALF)
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    poly = _T7
    poly = poly * f + _T6
    poly = poly * f + _T5
    poly = poly * f + _T4
    poly = poly * f + _T3
    poly = poly * f + _T2
    poly = poly * f + _ONE
    poly = poly * f + _ONE
    power: Any = _float_of_bits(np.int32((np.int32(n) + np.int32(127)) * np.int32(1 << 23)))  # type: ignore[call-arg]
    return _ZERO if x < _LOW else poly * power


@kernel_without_nan
def _largest(row: Any, best: Any) -> Any:
    for j in range(row.shape[0]):
        best = row[j] if row[j] > best else best
    return best


@kernel
def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@kernel
def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@kernel
def row_loss(code: int, s: Any, near: Any, far: Any, count: int, weight: Any, margin: Any, temperature: Any) -> Any:
    """Loss of one row times `weight`, and its derivative by s; near and far, negatives' scores, become those by them.

    count: negatives that are not masked.
    """
    if count == 0:
        _scale(near, _ZERO)
        _scale(far, _ZERO)
        return 0.0, _ZERO
    if code == SOFTMAX:
        return _softmax(s, near, far, weight)
    if code == RANKING:
        return _ranking(s, near, far, weight, margin)
    if code == LOGISTIC:
        return _logistic(s, near, far, count, weight)
    return _self_adversarial(s, near, far, weight, margin, temperature)


@kernel
def _ranking(s: Any, near: Any, far: Any, weight: Any, margin: Any) -> Any:
    near_sum, near_active = _hinge(near, margin - s, weight)
    far_sum, far_active = _hinge(far, margin - s, weight)
    return float(weight) * (near_sum + far_sum), _F(-weight * (near_active + far_active))


@kernel
def _hinge(t: Any, offset: Any, weight: Any) -> Any:
    total, active = _ZERO, _ZERO
    for j in range(t.shape[0]):
        excess = offset + t[j]
        hit = _ONE if excess > _ZERO else _ZERO
        total += max(excess, _ZERO)
        active += hit
        t[j] = weight * hit
    return total, active


@kernel
def _logistic(s: Any, near: Any, far: Any, count: int, weight: Any) -> Any:
    share = _F(weight / count)
    total = _softplus_rows(near, share) + _softplus_rows(far, share)
    return float(weight) * _softplus(-s) + float(share) * total, _F(-weight * _sigmoid(-s))


@kernel
def _softplus_rows(t: Any, share: Any) -> float:
    """Sums of logarithms as logarithms of products: one for 64 factors, none of which is above 2."""
    total = 0.0
    for first in range(0, t.shape[0], 64):
        piece = t[first : first + 64]
        linear, product = _ZERO, _ONE
        for j in range(piece.shape[0]):
            x = piece[j]
            small = exp32(-abs(x))
            linear += max(x, _ZERO)
            product *= _ONE + small
            piece[j] = share * (_ONE if x > _ZERO else small) / (_ONE + small)
        total += float(linear) + math.log(float(product))
    return total


@kernel
def _exponentials(t: Any, top: Any) -> Any:
    """t becomes exp(t - top); its sum."""
    total = _ZERO
    for j in range(t.shape[0]):
        e = exp32(t[j] - top)
        t[j] = e
        total += e
    return total


@kernel
def _scale(t: Any, by: Any) -> None:
    for j in range(t.shape[0]):
        t[j] *= by


@kernel
def _softmax(s: Any, near: Any, far: Any, weight: Any) -> Any:
    top = _largest(far, _largest(near, s))
    own = exp32(s - top)
    total = own + _exponentials(near, top) + _exponentials(far, top)
    scale = weight / total
    _scale(near, scale)
    _scale(far, scale)
    return float(weight) * (math.log(total) + top - s), _F(own * scale - weight)


@kernel
def _self_adversarial(s: Any, near: Any, far: Any, weight: Any, margin: Any, temperature: Any) -> Any:
    top = _largest(far, _largest(near, MASKED))
    mass = _tempered(near, top, temperature) + _tempered(far, top, temperature)
    total = _weighted(near, top, mass, weight, margin, temperature)
    total += _weighted(far, top, mass, weight, margin, temperature)
    return weight * _softplus(-margin - s) + total, _F(-weight * _sigmoid(-margin - s))


@kernel
def _tempered(t: Any, top: Any, temperature: Any) -> Any:
    mass = _ZERO
    for j in range(t.shape[0]):
        mass += exp32(temperature * (t[j] - top))
    return mass


@kernel
def _weighted(t: Any, top: Any, mass: Any, weight: Any, margin: Any, temperature: Any) -> float:
    total = 0.0
    for j in range(t.shape[0]):
        share = exp32(temperature * (t[j] - top)) * weight / mass
        x = margin + t[j]
        small = exp32(-abs(x))
        total += share * (max(x, _ZERO) + math.log1p(small))
        t[j] = share * (_ONE if x > _ZERO else small) / (_ONE + small)
    return total


@kernel
def softmax_rows(scores: Any, count: int, starts: Any, true: Any, weights: Any, losses: Any) -> None:
    """Rows of scores against everything, `count` columns, become slopes; their losses. Row q's true columns, with their
    weights, stand at starts[q]:starts[q + 1] of `true`; they are candidates too, each for the others and for itself."""
    for q in range(starts.shape[0] - 1):
        row, whole, own = scores[q, :count], _ZERO, 0.0
        top = _largest(row, MASKED)
        for n in range(starts[q], starts[q + 1]):
            whole += weights[n]
            own += float(weights[n]) * row[true[n]]
        mass = _exponentials(row, top)
        _scale(row, whole / mass)
        for n in range(starts[q], starts[q + 1]):
            row[true[n]] -= weights[n]
        losses[q] = float(whole) * (math.log(mass) + top) - own
