"""Small numbers in a row of bits, lowest bit first: what models are written with."""

from typing import Any

import numpy as np

from puna.recsys.codec.compiled import kernel

DAMAGED = -1


@kernel
def put(buffer: Any, at: int, width: int, value: int) -> int:
    """Write value, of `width` bits, at most eight, at bit `at` of buffer; returns the bit after them.

    buffer: bytes that are zero from there on, with one to spare.
    """
    shifted = value << (at & 7)
    buffer[at >> 3] |= shifted & 0xFF
    buffer[(at >> 3) + 1] |= shifted >> 8
    return at + width


@kernel
def get(buffer: Any, at: int, width: int) -> Any:
    """The value of `width` bits, at most eight, at bit `at`; DAMAGED where the buffer ends before them."""
    if at < 0 or at + width > 8 * buffer.shape[0]:
        return DAMAGED
    byte = at >> 3
    word = np.int64(buffer[byte]) if width else 0
    if byte + 1 < buffer.shape[0]:
        word |= np.int64(buffer[byte + 1]) << 8
    return (word >> (at & 7)) & ((1 << width) - 1)


@kernel
def put_delta(buffer: Any, at: int, delta: int) -> int:
    """A small signed number: as many zeros as it is large, a one, its sign."""
    size = abs(delta)
    at = put(buffer, at + size, 1, 1)
    return put(buffer, at, 1, delta < 0) if size else at
