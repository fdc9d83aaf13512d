"""Codes of a fixed width: whole bytes, then the bits above them in planes of four, two and one.

A plane of b bits has 8 / b segments of equal length, the first in the lowest bits of its bytes, so that a byte holds
codes that are far apart and packing is plain vector code.
"""

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
    size = count * (width >> 3)
    for bits in (4, 2, 1):
        if width & bits:
            size += (count * bits + 7) >> 3
    return size


def pack(codes: npt.NDArray[Any], width: int) -> bytes:
    """Whole numbers (m,), each below 2**width, as `packed_size` bytes."""
    out = np.empty(packed_size(len(codes), width), np.uint8)
    _pack(codes, width, out)
    return out.tobytes()


def unpack(data: npt.NDArray[np.uint8], num_codes: int, codes: npt.NDArray[Any]) -> None:
    """Codes (m,) from their bytes; DataError where there are more or fewer, or a code is not below num_codes."""
    width = width_of(num_codes)
    if len(data) != packed_size(len(codes), width):
        raise damaged(f"{len(data)} bytes for {len(codes)} codes of {width} bits")
    if not _unpack(data, width, num_codes, codes):
        raise damaged(f"a code beyond the last of {num_codes}")


@kernel
def _pack(codes: Any, width: int, out: Any) -> None:
    count, at, shift = codes.shape[0], 0, 0
    while shift + 8 <= width:
        plane = out[at : at + count]
        for j in range(count):
            plane[j] = codes[j] >> shift
        at, shift = at + count, shift + 8
    if (width - shift) & 4:
        size = (count + 1) >> 1
        low, high, plane = codes[:size], codes[size:], out[at : at + size]
        if shift == 0:  # known to the compiler, and the usual case
            for j in range(high.shape[0]):
                plane[j] = (low[j] & 15) | ((high[j] & 15) << 4)
        else:
            for j in range(high.shape[0]):
                plane[j] = ((low[j] >> shift) & 15) | (((high[j] >> shift) & 15) << 4)
        if high.shape[0] < size:
            plane[size - 1] = (low[size - 1] >> shift) & 15
        at, shift = at + size, shift + 4
    for bits in (2, 1):
        if (width & 3) & bits:
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
def _unpack(data: Any, width: int, num_codes: int, codes: Any) -> bool:
    """Whether all codes are below num_codes."""
    count, at, shift = codes.shape[0], 0, 0
    if width >= 8 or not width & 4:
        codes[:] = 0
    while shift + 8 <= width:
        plane = data[at : at + count]
        for j in range(count):
            codes[j] |= np.int64(plane[j]) << shift
        at, shift = at + count, shift + 8
    if (width - shift) & 4:
        size = (count + 1) >> 1
        low, high, plane = codes[:size], codes[size:], data[at : at + size]
        if shift == 0:
            for j in range(size):
                low[j] = plane[j] & 15
            for j in range(high.shape[0]):
                high[j] = plane[j] >> 4
        else:
            for j in range(size):
                low[j] |= (plane[j] & 15) << shift
            for j in range(high.shape[0]):
                high[j] |= (plane[j] >> 4) << shift
        at, shift = at + size, shift + 4
    for bits in (2, 1):
        if (width & 3) & bits:
            size = (count * bits + 7) >> 3
            plane = data[at : at + size]
            for segment in range(8 // bits):
                _unpack_segment(plane, shift, bits, segment, codes[min(segment * size, count) : (segment + 1) * size])
            at, shift = at + size, shift + bits
    beyond = np.int32(0)
    for j in range(count):
        beyond = np.int32(beyond | np.int32(codes[j] >= num_codes))
    return beyond == 0


@kernel
def _unpack_segment(plane: Any, shift: int, bits: int, segment: int, codes: Any) -> None:
    mask, place = (1 << bits) - 1, segment * bits
    for j in range(codes.shape[0]):
        codes[j] |= ((plane[j] >> place) & mask) << shift
