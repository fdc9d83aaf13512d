"""Range asymmetric numeral systems (Duda 2013): one state or four in turn over one row of 16-bit words.

A block is codes that share frequencies; blocks follow each other through the same states and words. States lie in
[2**15, 2**31). An encoder goes backwards from LOW, so a decoder ends there: a damaged stream hardly ever does.
"""

from typing import Any

import numpy as np

from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.frequencies import MAX_CODES, TOTAL, TOTAL_BITS

LOW = 1 << 15
LANES = 4
DAMAGED = -1
_MASK = TOTAL - 1
ENCODER_SHAPE, DECODER_SIZE = (MAX_CODES, 5), TOTAL
_ONE = np.uint64(1)


@kernel
def lanes_of(count: int) -> int:
    """States for so many codes: four are faster, and each takes four bytes."""
    return LANES if count >= 2048 else 1


@kernel
def encoder_table(frequencies: Any, num_codes: int, table: Any) -> int:
    """What `encode` needs of each code: where it must shed a word; a reciprocal and its shift; two addends.

    Returns the code that has all slots, for which there is nothing to encode, or -1.
    """
    start = 0
    for s in range(num_codes):
        f, shift = frequencies[s], 0
        if f == TOTAL:
            return s
        while 1 << shift < f:
            shift += 1
        if f > 0:
            table[s, 0] = f << (31 - TOTAL_BITS)
            table[s, 1] = ((1 << (31 + shift)) + f - 1) // f
            table[s, 2] = 31 + shift
            table[s, 3] = TOTAL - f
            table[s, 4] = start
        start += f
    return -1


@kernel
def decoder_table(frequencies: Any, num_codes: int, table: Any) -> int:
    """A code, its frequency and the place in its range for each slot; returns the code that has all slots, or -1."""
    slot = 0
    for s in range(num_codes):
        f = frequencies[s]
        if f == TOTAL:
            return s
        for place in range(f):
            table[slot + place] = s | (f << 8) | (place << (8 + TOTAL_BITS))
        slot += f
    return -1


@kernel
def _push(x: int, table: Any, code: int, words: Any, at: int) -> Any:
    words[at - _ONE] = x & 0xFFFF
    sheds = x >= table[code, 0]
    x = x >> 16 if sheds else x
    quotient = (x * table[code, 1]) >> table[code, 2]
    return x + quotient * table[code, 3] + table[code, 4], at - np.uint64(sheds)


@kernel
def encode(codes: Any, table: Any, states: Any, words: Any, end: int) -> Any:
    """Code a block (m,) before the words from `end` on; returns where they now begin. It takes m + 1 words at most."""
    lanes, at = states.shape[0], np.uint64(end)
    whole = codes.shape[0] // LANES * LANES if lanes == LANES else 0
    for i in range(codes.shape[0] - 1, whole - 1, -1):
        states[i % lanes], at = _push(states[i % lanes], table, codes[i], words, at)
    if whole > 0:
        fours = codes[:whole].reshape(-1, LANES)
        a, b, c, d = states[0], states[1], states[2], states[3]
        for i in range(fours.shape[0] - 1, -1, -1):
            d, at = _push(d, table, fours[i, 3], words, at)
            c, at = _push(c, table, fours[i, 2], words, at)
            b, at = _push(b, table, fours[i, 1], words, at)
            a, at = _push(a, table, fours[i, 0], words, at)
        states[0], states[1], states[2], states[3] = a, b, c, d
    return np.int64(at)


@kernel
def _pull(x: int, entry: int, words: Any, at: int) -> Any:
    x = ((entry >> 8) & _MASK) * (x >> TOTAL_BITS) + (entry >> (8 + TOTAL_BITS))
    fed = (x << 16) | np.int64(words[at])
    short = x < LOW
    return fed if short else x, at + np.uint64(short)


@kernel
def decode(codes: Any, table: Any, states: Any, words: Any, start: int) -> Any:
    """Decode a block (m,) from the words at `start` on; returns where they end, or DAMAGED.

    Past its end `words` has LANES more of any value, which no sound stream uses.
    """
    lanes, at, end = states.shape[0], np.uint64(start), np.uint64(words.shape[0] - LANES)
    whole = codes.shape[0] // LANES * LANES if lanes == LANES else 0
    if whole > 0:
        fours = codes[:whole].reshape(-1, LANES)
        a, b, c, d = states[0], states[1], states[2], states[3]
        for i in range(fours.shape[0]):
            entry = np.int64(table[a & _MASK])
            fours[i, 0] = entry
            a, at = _pull(a, entry, words, at)
            entry = np.int64(table[b & _MASK])
            fours[i, 1] = entry
            b, at = _pull(b, entry, words, at)
            entry = np.int64(table[c & _MASK])
            fours[i, 2] = entry
            c, at = _pull(c, entry, words, at)
            entry = np.int64(table[d & _MASK])
            fours[i, 3] = entry
            d, at = _pull(d, entry, words, at)
            if at > end:
                return DAMAGED
        states[0], states[1], states[2], states[3] = a, b, c, d
    for i in range(whole, codes.shape[0]):
        entry = np.int64(table[states[i % lanes] & _MASK])
        codes[i] = entry
        states[i % lanes], at = _pull(states[i % lanes], entry, words, at)
        if at > end:
            return DAMAGED
    return np.int64(at)
