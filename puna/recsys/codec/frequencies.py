"""How often each code is expected: what an entropy coder works from, and its few bytes in a stream.

Three kinds: one code only; all codes of a span alike; a level for each code of a span. A level is a third of an octave
of frequency, which costs the coder 0.003 bits a code against exact frequencies, and neighbours' levels are close, so
that a code's level takes two or three bits of the stream. Frequencies follow from levels by whole numbers alone.
"""

from typing import Any

import numpy as np

from puna.recsys.codec.bits import DAMAGED, get, put, put_delta
from puna.recsys.codec.compiled import kernel

TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS
MAX_CODES = 256
ONE_CODE, ALIKE, LEVELS = range(3)
_KIND_BITS, _LEVEL_BITS = 2, 6
_STEPS = 3  # levels of an octave
_MAX_LEVEL = 1 + _STEPS * TOTAL_BITS
_WEIGHTS = np.array([0] + [round(16 * 2 ** (level / _STEPS)) for level in range(_MAX_LEVEL)], np.int64)
_EDGES = np.array([int(16 * 2 ** ((level - 0.5) / _STEPS)) for level in range(1, _MAX_LEVEL)], np.int64)
_BITS = np.log2(TOTAL / np.maximum(np.arange(TOTAL + 1), 1))  # of a code of so much frequency


@kernel
def fit(counts: Any, num_codes: int, levels: Any, frequencies: Any) -> Any:
    """The cheaper kind for counts of codes: (kind, first code, last code, bits of the coded counts).

    Fills levels and frequencies (MAX_CODES,); frequencies add up to TOTAL. At least one count is not 0.
    """
    first, last, total = num_codes, 0, 0
    for s in range(num_codes):
        levels[s] = 0
        if counts[s] > 0:
            first, last = min(first, s), s
            total += counts[s]
    if first == last:
        levels[first] = 1
        spread(levels, num_codes, frequencies)
        return ONE_CODE, first, last, 0.0
    scale = 16.0 * TOTAL / total
    for s in range(first, last + 1):
        if counts[s] > 0:
            levels[s] = _level(np.int64(counts[s] * scale))
    spread(levels, num_codes, frequencies)
    bits = _coded_bits(counts, frequencies, first, last)
    levels_bits = model_bits(levels, first, last)
    alike = total * np.log2(last - first + 1.0)
    if alike > bits + levels_bits:
        return LEVELS, first, last, bits
    set_alike(levels, first, last)
    spread(levels, num_codes, frequencies)
    return ALIKE, first, last, _coded_bits(counts, frequencies, first, last)


@kernel
def _level(weight: int) -> int:
    low, high = 0, _EDGES.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if weight >= _EDGES[middle]:
            low = middle + 1
        else:
            high = middle
    return low + 1


@kernel
def set_alike(levels: Any, first: int, last: int) -> None:
    """The same level for all codes of a span."""
    for s in range(first, last + 1):
        levels[s] = 1


@kernel
def spread(levels: Any, num_codes: int, frequencies: Any) -> None:
    """Frequencies that add up to TOTAL, at least 1 where the level is not 0; some level is not 0."""
    weight, total, largest = 0, 0, 0
    for s in range(num_codes):
        weight += _WEIGHTS[levels[s]]
    for s in range(num_codes):
        frequencies[s] = 0
        if levels[s] > 0:
            frequencies[s] = max(1, _WEIGHTS[levels[s]] * TOTAL // weight)
        total += frequencies[s]
        if frequencies[s] > frequencies[largest]:
            largest = s
    while total != TOTAL:
        change = max(TOTAL - total, 1 - frequencies[largest])
        frequencies[largest] += change
        total += change
        for s in range(num_codes):
            if frequencies[s] > frequencies[largest]:
                largest = s


@kernel
def _coded_bits(counts: Any, frequencies: Any, first: int, last: int) -> float:
    bits = 0.0
    for s in range(first, last + 1):
        bits += counts[s] * _BITS[frequencies[s]]
    return bits


@kernel
def model_bits(levels: Any, first: int, last: int) -> int:
    """What `put_model` takes for LEVELS, without kind and span."""
    bits = _LEVEL_BITS
    for s in range(first + 1, last + 1):
        size = abs(levels[s] - levels[s - 1])
        bits += size + 1 + (size > 0)
    return bits


@kernel
def put_model(buffer: Any, at: int, code_bits: int, kind: int, first: int, last: int, levels: Any) -> int:
    """Write a model; returns the bit after it."""
    at = put(buffer, at, _KIND_BITS, kind)
    at = put(buffer, at, code_bits, first)
    if kind == ONE_CODE:
        return at
    at = put(buffer, at, code_bits, last)
    if kind == ALIKE:
        return at
    at = put(buffer, at, _LEVEL_BITS, levels[first])
    for s in range(first + 1, last + 1):
        at = put_delta(buffer, at, levels[s] - levels[s - 1])
    return at


@kernel
def get_model(buffer: Any, at: int, code_bits: int, num_codes: int, levels: Any, frequencies: Any) -> int:
    """Read a model into frequencies; returns the bit after it, or DAMAGED."""
    kind, first = get(buffer, at, _KIND_BITS), get(buffer, at + _KIND_BITS, code_bits)
    at += _KIND_BITS + code_bits
    last = first
    if kind != ONE_CODE:
        last = get(buffer, at, code_bits)
        at += code_bits
    if kind < 0 or kind > LEVELS or first < 0 or last < first or last >= num_codes:
        return DAMAGED
    for s in range(num_codes):
        levels[s] = 0
    set_alike(levels, first, last)
    if kind == LEVELS:
        at = _get_levels(buffer, at, first, last, levels)
    if at >= 0:
        spread(levels, num_codes, frequencies)
    return at


@kernel
def _get_levels(buffer: Any, at: int, first: int, last: int, levels: Any) -> int:
    level, highest = get(buffer, at, _LEVEL_BITS), 0
    at += _LEVEL_BITS
    for s in range(first, last + 1):
        if s > first:
            size = 0
            bit = get(buffer, at, 1)
            while bit == 0:
                size += 1
                bit = get(buffer, at + size, 1)
            at += size + 1
            if bit < 0:
                return DAMAGED
            if size > 0:
                level += -size if get(buffer, at, 1) else size
                at += 1
        if level < 0 or level > _MAX_LEVEL:
            return DAMAGED
        levels[s] = level
        highest = max(highest, level)
    return at if highest > 0 and at <= 8 * buffer.shape[0] else DAMAGED
