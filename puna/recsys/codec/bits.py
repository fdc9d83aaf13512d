"""Small numbers in a row of bits, lowest bit first: what models are written with."""

from typing import Any

from puna.recsys.codec.compiled import kernel

DAMAGED = -1


@kernel
def put(buffer: Any, at: int, width: int, value: int) -> int:
    """Write `width` bits of value at bit `at` of buffer (bytes, zero from there on); returns the bit after them."""
    for bit in range(width):
        buffer[(at + bit) >> 3] |= ((value >> bit) & 1) << ((at + bit) & 7)
    return at + width


@kernel
def get(buffer: Any, at: int, width: int) -> int:
    """The value of `width` bits at bit `at`; DAMAGED where the buffer ends before them."""
    if at < 0 or at + width > 8 * buffer.shape[0]:
        return DAMAGED
    value = 0
    for bit in range(width):
        value |= ((buffer[(at + bit) >> 3] >> ((at + bit) & 7)) & 1) << bit
    return value


@kernel
def put_delta(buffer: Any, at: int, delta: int) -> int:
    """A small signed number: as many zeros as it is large, a one, its sign."""
    size = abs(delta)
    at = put(buffer, at + size, 1, 1)
    return put(buffer, at, 1, delta < 0) if size else at
