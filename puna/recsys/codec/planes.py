"""Codes of a fixed width: whole bytes, then the bits above them in planes of four, two and one.

A plane of b bits has 8 / b segments of equal length, the first in the lowest bits of its bytes, so that a byte holds
codes that are far apart and packing is plain vector code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.stream import damaged


def width_of(num_codes: int) -> int:
    """Bits of the largest of num_codes codes."""
    return (num_codes - 1).bit_length()


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return count * (width // 8) + sum(-(-count // (8 // bits)) for _, bits in _planes(width % 8))


def pack(codes: npt.NDArray[Any], width: int) -> bytes:
    """Codes (m,), unsigned and each below 2**width, as `packed_size` bytes."""
    parts = [(codes >> codes.dtype.type(8 * byte)).astype(np.uint8) for byte in range(width // 8)]
    if width % 8:
        top = codes if width < 8 else codes >> codes.dtype.type(8 * (width // 8))
        planes = np.empty(packed_size(len(codes), width % 8), np.uint8)
        _pack(top.astype(np.uint8, copy=False), width % 8, planes)
        parts.append(planes)
    return b"".join(part.tobytes() for part in parts)


def unpack(data: npt.NDArray[np.uint8], num_codes: int, codes: npt.NDArray[Any]) -> None:
    """Codes (m,) from their bytes; DataError where there are more or fewer, or a code is not below num_codes."""
    count, width = len(codes), width_of(num_codes)
    if len(data) != packed_size(count, width):
        raise damaged(f"{len(data)} bytes for {count} codes of {width} bits")
    if width < 8:
        _unpack(data, width, codes)
    else:
        codes[:] = 0
        for byte in range(width // 8):
            codes |= data[byte * count :][:count].astype(codes.dtype) << codes.dtype.type(8 * byte)
        if width % 8:
            top = np.empty(count, np.uint8)
            _unpack(data[width // 8 * count :], width % 8, top)
            codes |= top.astype(codes.dtype) << codes.dtype.type(8 * (width // 8))
    if 1 << width > num_codes and count and codes.max() >= num_codes:
        raise damaged(f"a code beyond the last of {num_codes}")


def _planes(width: int) -> Iterator[tuple[int, int]]:
    """Shift and bits of each plane of codes below a byte."""
    shift = 0
    for bits in (4, 2, 1):
        if width & bits:
            yield shift, bits
            shift += bits


@kernel
def _pack(codes: Any, width: int, out: Any) -> None:
    """Planes of codes (m,) of less than eight bits, one after the other."""
    count, at, shift = codes.shape[0], 0, 0
    if width & 4:
        size = (count + 1) >> 1
        low, high = codes[:size], codes[size:]
        for j in range(high.shape[0]):
            out[j] = (low[j] & 15) | ((high[j] & 15) << 4)
        if high.shape[0] < size:
            out[size - 1] = low[size - 1] & 15
        at, shift = size, 4
    for bits in (2, 1):
        if width & bits:
            size = (count * bits + 7) >> 3
            plane = out[at : at + size]
            plane[:] = 0
            for segment in range(8 // bits):
                _pack_segment(codes[min(segment * size, count) : (segment + 1) * size], shift, bits, segment, plane)
            at, shift = at + size, shift + bits


@kernel
def _pack_segment(codes: Any, shift: int, bits: int, segment: int, plane: Any) -> None:
    mask, place = (1 << bits) - 1, segment * bits
    for j in range(codes.shape[0]):
        plane[j] |= ((codes[j] >> shift) & mask) << place


@kernel
def _unpack(data: Any, width: int, codes: Any) -> None:
    count, at, shift = codes.shape[0], 0, 0
    if width & 4:
        size = (count + 1) >> 1
        low, high = codes[:size], codes[size:]
        for j in range(size):
            low[j] = data[j] & 15
        for j in range(high.shape[0]):
            high[j] = data[j] >> 4
        at, shift = size, 4
    else:
        codes[:] = 0
    for bits in (2, 1):
        if width & bits:
            size = (count * bits + 7) >> 3
            plane = data[at : at + size]
            for segment in range(8 // bits):
                _unpack_segment(plane, shift, bits, segment, codes[min(segment * size, count) : (segment + 1) * size])
            at, shift = at + size, shift + bits


@kernel
def _unpack_segment(plane: Any, shift: int, bits: int, segment: int, codes: Any) -> None:
    mask, place = (1 << bits) - 1, segment * bits
    for j in range(codes.shape[0]):
        codes[j] |= ((plane[j] >> place) & mask) << shift
