"""Rows of a kind, coded with frequencies of their own: rows far from the centre of the grid, and rows near it.

Tables hold rows that were seen often and rows that hardly moved from where they began, and one distribution fits
neither. Rows are binned by their mean distance from the centre, and neighbouring bins are merged while that saves bits
(codes, models and the labels that say which row is of which group are all counted).
"""

import math
from typing import Any

import numpy as np

from puna.recsys.codec.compiled import kernel

NUM_BINS = 20
_FINE = 4  # of a code, in which mean distances are measured
_BIN_OF = np.array([0] + [min(NUM_BINS - 1, 1 + int(2 * math.log2(d))) for d in range(1, 256 * _FINE + 1)], np.uint8)
_XLOGX = np.array([0.0] + [c * math.log2(c) for c in range(1, 4096)])
_CODE_MODEL_BITS, _MODEL_BITS = 2.5, 24.0


@kernel
def group_rows(codes: Any, num_codes: int, centre: int, labels: Any, counts: Any, sizes: Any) -> int:
    """The number of groups. Fills labels (k,) of rows, sizes (NUM_BINS,) in rows, counts (NUM_BINS, 256) of codes.

    codes: (k, D) uint8. Each group has at least one row.
    """
    for b in range(NUM_BINS):
        sizes[b] = 0
        for s in range(num_codes):
            counts[b, s] = 0
    _bin_rows(codes, centre, labels, counts, sizes)
    heads, of_bin = np.empty(NUM_BINS, np.int64), np.empty(NUM_BINS, np.int64)
    num_groups = 0
    for b in range(NUM_BINS):
        if sizes[b] > 0:
            heads[num_groups] = b
            num_groups += 1
    num_groups = _merge(heads, num_groups, num_codes, counts, sizes)
    for g in range(num_groups):
        for b in range(heads[g], heads[g + 1] if g + 1 < num_groups else NUM_BINS):
            of_bin[b] = g
        sizes[g] = sizes[heads[g]]
        for s in range(num_codes):
            counts[g, s] = counts[heads[g], s]
    for r in range(codes.shape[0]):
        labels[r] = of_bin[labels[r]]
    return num_groups


@kernel
def _bin_rows(codes: Any, centre: int, labels: Any, counts: Any, sizes: Any) -> None:
    width, middle = codes.shape[1], np.int32(centre)
    for r in range(codes.shape[0]):
        distance: Any = 0
        for j in range(width):
            distance += abs(np.int32(codes[r, j]) - middle)
        b = _BIN_OF[(distance * _FINE + width - 1) // width]
        labels[r] = b
        sizes[b] += 1
    for r in range(codes.shape[0]):
        b = labels[r]
        if b == 0:
            counts[b, centre] += width
        else:
            for j in range(width):
                counts[b, codes[r, j]] += 1


@kernel
def _merge(heads: Any, num_groups: int, num_codes: int, counts: Any, sizes: Any) -> int:
    """Merge neighbours while that saves bits; a group's counts and size stand at its first bin."""
    own, pair = np.empty(NUM_BINS), np.empty(NUM_BINS)
    for g in range(num_groups):
        own[g] = _bits(counts, sizes, heads[g], heads[g], num_codes)
    for g in range(num_groups - 1):
        pair[g] = _bits(counts, sizes, heads[g], heads[g + 1], num_codes)
    while num_groups > 1:
        best = 0
        for g in range(1, num_groups - 1):
            if own[g] + own[g + 1] - pair[g] > own[best] + own[best + 1] - pair[best]:
                best = g
        if own[best] + own[best + 1] < pair[best]:
            break
        a, b = heads[best], heads[best + 1]
        sizes[a] += sizes[b]
        for s in range(num_codes):
            counts[a, s] += counts[b, s]
        own[best] = pair[best]
        num_groups -= 1
        for g in range(best + 1, num_groups):
            heads[g], own[g], pair[g - 1] = heads[g + 1], own[g + 1], pair[g]
        if best > 0:
            pair[best - 1] = _bits(counts, sizes, heads[best - 1], a, num_codes)
        if best + 1 < num_groups:
            pair[best] = _bits(counts, sizes, a, heads[best + 1], num_codes)
    return num_groups


@kernel
def _bits(counts: Any, sizes: Any, a: int, b: int, num_codes: int) -> float:
    """Bits of one group of bins a and b (the same: of one), less those that larger groups save in labels."""
    rows = sizes[a] if a == b else sizes[a] + sizes[b]
    bits, total, first, last = 0.0, 0, num_codes, 0
    for s in range(num_codes):
        count = counts[a, s] if a == b else counts[a, s] + counts[b, s]
        if count > 0:
            total += count
            bits -= _xlogx(count)
            first, last = min(first, s), s
    return bits + _xlogx(total) + _CODE_MODEL_BITS * (last - first) + _MODEL_BITS - _xlogx(rows)


@kernel
def _xlogx(count: int) -> float:
    return _XLOGX[count] if count < _XLOGX.shape[0] else count * np.log2(np.float64(count))
