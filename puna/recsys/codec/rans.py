"""Range asymmetric numeral systems (Duda 2013), eight states in turn over one row of 16-bit words.

A block is codes that share frequencies; blocks follow each other through the same states and words. States lie in
[2**15, 2**31). An encoder goes backwards from LOW, so a decoder ends there: a damaged stream hardly ever does.
"""

from typing import Any

import numpy as np

from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.frequencies import MAX_CODES, TOTAL, TOTAL_BITS

LOW = 1 << 15
LANES = 8
DAMAGED = -1
_MASK = TOTAL - 1
_ENTRY = 5  # numbers of a code in an encoder's table
ENCODER_SIZE, DECODER_SIZE = _ENTRY * MAX_CODES, TOTAL


@kernel
def lanes_of(count: int) -> int:
    """States for so many codes: eight take 16 to 32 bytes, one is slow."""
    return LANES if count >= 4096 else 1


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
            table[_ENTRY * s] = f << (31 - TOTAL_BITS)
            table[_ENTRY * s + 1] = ((1 << (31 + shift)) + f - 1) // f
            table[_ENTRY * s + 2] = 31 + shift
            table[_ENTRY * s + 3] = TOTAL - f
            table[_ENTRY * s + 4] = start
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
    entry = _ENTRY * code
    words[at - 1] = x & 0xFFFF
    sheds = np.int64(x >= table[entry])
    x >>= sheds << 4
    quotient = (x * table[entry + 1]) >> table[entry + 2]
    return x + quotient * table[entry + 3] + table[entry + 4], at - sheds


@kernel
def encode(codes: Any, table: Any, states: Any, words: Any, at: int) -> int:
    """Code a block before the words from `at` on; returns where they now begin. `words` needs one a code, and one more."""
    lanes = states.shape[0]
    whole = codes.shape[0] // LANES * LANES if lanes == LANES else 0
    for i in range(codes.shape[0] - 1, whole - 1, -1):
        states[i % lanes], at = _push(states[i % lanes], table, np.int64(codes[i]), words, at)
    if whole == 0:
        return at
    a, b, c, d, e, f, g, h = states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7]
    for i in range(whole - LANES, -1, -LANES):
        h, at = _push(h, table, np.int64(codes[i + 7]), words, at)
        g, at = _push(g, table, np.int64(codes[i + 6]), words, at)
        f, at = _push(f, table, np.int64(codes[i + 5]), words, at)
        e, at = _push(e, table, np.int64(codes[i + 4]), words, at)
        d, at = _push(d, table, np.int64(codes[i + 3]), words, at)
        c, at = _push(c, table, np.int64(codes[i + 2]), words, at)
        b, at = _push(b, table, np.int64(codes[i + 1]), words, at)
        a, at = _push(a, table, np.int64(codes[i]), words, at)
    states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7] = a, b, c, d, e, f, g, h
    return at


@kernel
def _pull(x: int, entry: int, words: Any, at: int) -> Any:
    x = ((entry >> 8) & _MASK) * (x >> TOTAL_BITS) + (entry >> (8 + TOTAL_BITS))
    fed = (x << 16) | np.int64(words[at])
    short = x < LOW
    return fed if short else x, at + np.int64(short)


@kernel
def decode(codes: Any, table: Any, states: Any, words: Any, at: int) -> int:
    """Decode a block from the words at `at` on; returns where they end, or DAMAGED. Past its end `words` has LANES more
    of any value, which no sound stream uses."""
    lanes, num_words = states.shape[0], words.shape[0] - LANES
    whole = codes.shape[0] // LANES * LANES if lanes == LANES else 0
    if whole > 0:
        a, b, c, d, e, f, g, h = states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7]
        for i in range(0, whole, LANES):
            entry = np.int64(table[a & _MASK])
            codes[i] = entry
            a, at = _pull(a, entry, words, at)
            entry = np.int64(table[b & _MASK])
            codes[i + 1] = entry
            b, at = _pull(b, entry, words, at)
            entry = np.int64(table[c & _MASK])
            codes[i + 2] = entry
            c, at = _pull(c, entry, words, at)
            entry = np.int64(table[d & _MASK])
            codes[i + 3] = entry
            d, at = _pull(d, entry, words, at)
            entry = np.int64(table[e & _MASK])
            codes[i + 4] = entry
            e, at = _pull(e, entry, words, at)
            entry = np.int64(table[f & _MASK])
            codes[i + 5] = entry
            f, at = _pull(f, entry, words, at)
            entry = np.int64(table[g & _MASK])
            codes[i + 6] = entry
            g, at = _pull(g, entry, words, at)
            entry = np.int64(table[h & _MASK])
            codes[i + 7] = entry
            h, at = _pull(h, entry, words, at)
            if at > num_words:
                return DAMAGED
        states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7] = a, b, c, d, e, f, g, h
    for i in range(whole, codes.shape[0]):
        entry = np.int64(table[states[i % lanes] & _MASK])
        codes[i] = entry
        states[i % lanes], at = _pull(states[i % lanes], entry, words, at)
        if at > num_words:
            return DAMAGED
    return at
