"""LZ whose symbol is a whole row of codes: the published scheme's other coder (ICS23-GPULZ, vector_matching).

Blocks of 2,048 rows stand by themselves. At each row the longest run of rows that also began within the `window` rows
before it is taken (a run may reach into itself), else the row is copied. Four arrays, one after the other: bytes of
flags of each block, bytes of data of each block, flags (lowest bit first, 1: a run), data (a run: length, offset).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.recsys.codec import distinct
from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.scratch import Scratch

BLOCK = 2048
WINDOW = 32
_MAX_RUN = 255
_RUN_BYTES = 2


def encode(codes: npt.NDArray[np.uint8], scratch: Scratch, window: int = WINDOW) -> bytes:
    """Rows (n, D) of codes as bytes; window is 1 to 255 rows."""
    num_rows, width = codes.shape
    num_blocks = -(-num_rows // BLOCK)
    sizes = np.zeros((2, num_blocks), np.int64)
    flags = np.zeros(num_blocks * (BLOCK // 8), np.uint8)
    data = scratch.take("lz", num_rows * max(width, _RUN_BYTES), np.uint8)
    numbers = distinct.by_content(codes.astype(np.uint32), scratch).inverse
    _encode(codes, numbers, window, sizes, flags, data)
    parts = [sizes[0].astype("<u2"), sizes[1].astype("<u4"), flags[: sizes[0].sum()], data[: sizes[1].sum()]]
    return b"".join(part.tobytes() for part in parts)


def decode(data: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8]) -> bool:
    """Fill rows (n, D) of codes from `encode`'s bytes; False where they are damaged."""
    num_blocks = -(-len(codes) // BLOCK)
    head = 6 * num_blocks
    if len(data) < head:
        return False
    flag_bytes = np.frombuffer(data[: 2 * num_blocks].tobytes(), "<u2").astype(np.int64)
    data_bytes = np.frombuffer(data[2 * num_blocks : head].tobytes(), "<u4").astype(np.int64)
    flags_end = head + int(flag_bytes.sum())
    if flags_end + int(data_bytes.sum()) != len(data):
        return False
    return bool(_decode(data[head:flags_end], data[flags_end:], flag_bytes, data_bytes, codes))


@kernel
def _encode(codes: Any, numbers: Any, window: int, sizes: Any, flags: Any, data: Any) -> None:
    flag_at, at = 0, 0
    for block in range(sizes.shape[1]):
        start, end = block * BLOCK, min((block + 1) * BLOCK, codes.shape[0])
        tokens, begin, p = 0, at, start
        while p < end:
            run, offset = _longest(numbers, start, end, p, window)
            if run > 0:
                flags[flag_at + (tokens >> 3)] |= 1 << (tokens & 7)
                data[at], data[at + 1] = run, offset
                at += _RUN_BYTES
            else:
                for j in range(codes.shape[1]):
                    data[at + j] = codes[p, j]
                at += codes.shape[1]
            tokens += 1
            p += max(run, 1)
        sizes[0, block], sizes[1, block] = (tokens + 7) >> 3, at - begin
        flag_at += sizes[0, block]


@kernel
def _longest(numbers: Any, start: int, end: int, p: int, window: int) -> Any:
    """Length and offset of the longest run at p; the nearest of equals; (0, 0) without one."""
    best, best_offset = 0, 0
    most = min(end - p, _MAX_RUN)
    for offset in range(1, min(window, p - start) + 1):
        run = 0
        while run < most and numbers[p + run] == numbers[p + run - offset]:
            run += 1
        if run > best:
            best, best_offset = run, offset
    return best, best_offset


@kernel
def _decode(flags: Any, data: Any, flag_bytes: Any, data_bytes: Any, codes: Any) -> bool:
    width = codes.shape[1]
    flag_at, at = 0, 0
    for block in range(flag_bytes.shape[0]):
        start, end = block * BLOCK, min((block + 1) * BLOCK, codes.shape[0])
        flag_end, data_end = flag_at + flag_bytes[block], at + data_bytes[block]
        p: Any = start
        token = 8 * flag_at
        while p < end:
            if token >= 8 * flag_end:
                return False
            if (flags[token >> 3] >> (token & 7)) & 1:
                if at + _RUN_BYTES > data_end:
                    return False
                run, offset = np.int64(data[at]), np.int64(data[at + 1])
                at += _RUN_BYTES
                if run == 0 or offset == 0 or offset > p - start or run > end - p:
                    return False
                for r in range(run):
                    for j in range(width):
                        codes[p + r, j] = codes[p + r - offset, j]
                p += run
            else:
                if at + width > data_end:
                    return False
                for j in range(width):
                    codes[p, j] = data[at + j]
                at += width
                p += 1
            token += 1
        if at != data_end or (token + 7) >> 3 != flag_end:
            return False
        flag_at = flag_end
    return True
