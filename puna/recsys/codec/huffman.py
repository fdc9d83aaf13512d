"""Canonical Huffman codes of at most 12 bits, over all rows: the published scheme's coder (Feng et al., SC24)."""

import heapq
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.scratch import Scratch

MAX_BITS = 12
_SLOTS = 1 << MAX_BITS
_WORD = 32
_LAST = (1 << _WORD) - 1
_SPARE = 2  # words that a decoder may look at beyond the end


def encode(codes: npt.NDArray[np.uint8], num_codes: int, scratch: Scratch) -> bytes:
    """Lengths of num_codes codes, four bits each, and the codes (m,)."""
    lengths = lengths_of(np.bincount(codes, minlength=num_codes))
    words = scratch.take("huffman", codes.size * MAX_BITS // _WORD + 2, np.uint32)
    size = _encode(codes, canonical(lengths), lengths, words)
    padded = np.zeros(num_codes + num_codes % 2, np.uint8)
    padded[:num_codes] = lengths
    return (padded[::2] | padded[1::2] << 4).tobytes() + words[:size].astype("<u4", copy=False).tobytes()


def decode(data: npt.NDArray[np.uint8], num_codes: int, codes: npt.NDArray[np.uint8], scratch: Scratch) -> bool:
    """Fill codes (m,) from `encode`'s bytes; False where they are damaged."""
    head = (num_codes + 1) // 2
    num_words, odd = divmod(len(data) - head, 4)
    if num_words < 0 or odd:
        return False
    lengths = np.stack([data[:head] & 15, data[:head] >> 4], axis=1).reshape(-1)[:num_codes].astype(np.int64)
    used = np.flatnonzero(lengths)
    if len(used) == 1 and lengths[used[0]] == 1:
        codes[:] = used[0]
        return num_words == 0
    if lengths.max() > MAX_BITS or (_SLOTS >> lengths[used]).sum() != _SLOTS:
        return False
    words = scratch.take("huffman", num_words + _SPARE, np.uint32)
    words[:num_words] = np.frombuffer(data[head:].tobytes(), "<u4")
    words[num_words:] = 0
    table = scratch.take("slots", _SLOTS, np.uint16)
    _fill(canonical(lengths), lengths, table)
    return _decode(words, num_words, table, codes) == num_words


def lengths_of(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bits of each code; 0 of one that does not occur. Counts are halved until no code is longer than MAX_BITS."""
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    while True:
        order = count()
        heap = [(int(counts[s]), next(order), [int(s)]) for s in used]
        heapq.heapify(heap)
        lengths[:] = 0
        while len(heap) > 1:
            a, _, left = heapq.heappop(heap)
            b, _, right = heapq.heappop(heap)
            lengths[left + right] += 1
            heapq.heappush(heap, (a + b, next(order), left + right))
        if lengths.max() <= MAX_BITS:
            return lengths
        counts = (counts + 1) // 2


def canonical(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Codes by length and then by number, their bits reversed, as they are written lowest bit first."""
    words = np.zeros(len(lengths), np.int64)
    _canonical(lengths, words)
    return words


@kernel
def _canonical(lengths: Any, words: Any) -> None:
    word = 0
    for bits in range(1, MAX_BITS + 1):
        word <<= 1
        for s in range(lengths.shape[0]):
            if lengths[s] == bits:
                for bit in range(bits):
                    words[s] |= ((word >> bit) & 1) << (bits - 1 - bit)
                word += 1


@kernel
def _encode(codes: Any, words_of: Any, lengths: Any, out: Any) -> int:
    held, filled, size, used = 0, 0, 0, 0
    for s in range(lengths.shape[0]):
        used += lengths[s] > 0
    if used == 1:
        return 0
    for i in range(codes.shape[0]):
        held |= words_of[codes[i]] << filled
        filled += lengths[codes[i]]
        if filled >= _WORD:
            out[size] = held & _LAST
            size += 1
            held >>= _WORD
            filled -= _WORD
    if filled > 0:
        out[size] = held
        size += 1
    return size


@kernel
def _fill(words_of: Any, lengths: Any, table: Any) -> None:
    for s in range(lengths.shape[0]):
        if lengths[s] > 0:
            for slot in range(words_of[s], _SLOTS, 1 << lengths[s]):
                table[slot] = s | (lengths[s] << 8)


@kernel
def _decode(words: Any, num_words: int, table: Any, codes: Any) -> int:
    """Words that were used; more than num_words where the data end too early."""
    held: Any = 0
    filled: Any = 0
    at = 0
    for i in range(codes.shape[0]):
        if filled < MAX_BITS:
            if at >= words.shape[0]:
                return num_words + 1
            held |= np.int64(words[at]) << filled
            filled += _WORD
            at += 1
        entry = np.int64(table[held & (_SLOTS - 1)])
        codes[i] = entry & 0xFF
        held >>= entry >> 8
        filled -= entry >> 8
    return at - filled // _WORD
