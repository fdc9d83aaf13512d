"""Codes of a fixed width: whole bytes, then the bits above them in planes of four, two and one.

A plane of b bits has 8 / b segments of equal length, the first in the lowest bits of its bytes, so that a byte holds
codes that are far apart and packing is plain vector code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel


def width_of(num_codes: int) -> int:
    """Bits of the largest of num_codes codes."""
    return (num_codes - 1).bit_length()


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return count * (width // 8) + sum(-(-count // (8 // bits)) for _, bits in _planes(width % 8))


def pack(codes: npt.NDArray[Any], width: int) -> bytes:
    """Codes (m,), unsigned and each below 2**width, as `packed_size` bytes."""
    parts = []
    for byte in range(width // 8):
        parts.append((codes >> codes.dtype.type(8 * byte)).astype(np.uint8))
    if width % 8:
        top = codes if width < 8 else (codes >> codes.dtype.type(8 * (width // 8)))
        top = top.astype(np.uint8, copy=False)
        for shift, bits in _planes(width % 8):
            plane = np.zeros(-(-len(codes) // (8 // bits)), np.uint8)
            _pack_plane(top, np.uint8(shift), np.uint8(bits), plane)
            parts.append(plane)
    return b"".join(part.tobytes() for part in parts)


def unpack(data: npt.NDArray[np.uint8], width: int, codes: npt.NDArray[Any]) -> None:
    """Codes (m,) from data (packed_size,)."""
    count, at = len(codes), 0
    codes[:] = 0
    for byte in range(width // 8):
        codes |= data[at : at + count].astype(codes.dtype) << codes.dtype.type(8 * byte)
        at += count
    if width % 8 == 0:
        return
    top = codes if width < 8 else np.zeros(count, np.uint8)
    for shift, bits in _planes(width % 8):
        size = -(-count // (8 // bits))
        _unpack_plane(data[at : at + size], np.uint8(shift), np.uint8(bits), top)
        at += size
    if width > 8:
        codes |= top.astype(codes.dtype) << codes.dtype.type(8 * (width // 8))


def _planes(width: int) -> Iterator[tuple[int, int]]:
    """Shift and bits of each plane of codes below a byte."""
    shift = 0
    for bits in (4, 2, 1):
        if width & bits:
            yield shift, bits
            shift += bits


@kernel
def _pack_plane(codes: Any, shift: Any, bits: Any, plane: Any) -> None:
    size, mask = plane.shape[0], (1 << bits) - 1
    for segment in range(8 // bits):
        place = segment * bits
        start = segment * size
        for j in range(min(size, codes.shape[0] - start)):
            plane[j] |= ((codes[start + j] >> shift) & mask) << place


@kernel
def _unpack_plane(plane: Any, shift: Any, bits: Any, codes: Any) -> None:
    size, mask = plane.shape[0], (1 << bits) - 1
    for segment in range(8 // bits):
        place = segment * bits
        start = segment * size
        for j in range(min(size, codes.shape[0] - start)):
            codes[start + j] |= ((plane[j] >> place) & mask) << shift
