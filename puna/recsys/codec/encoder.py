"""A slice into a stream: distinct rows, grid, codes, rows that the grid cannot hold, index, payload."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.codec import grouped, huffman, index, opened, planes, quantise, stream, vector_lz
from puna.recsys.codec.opened import Opened
from puna.recsys.codec.quantise import Grid
from puna.recsys.codec.scratch import Scratch
from puna.recsys.codec.stream import ALL_ROWS, IN_ORDER, KNOWN_IDS, SENT_INDEX, Head

CODECS = ("auto", "rans", "fixed", "raw", "copy", "huffman", "vector_lz", "published")
_METHODS = {name: method for method, name in stream.METHODS.items()}
_WHOLE = ("huffman", "vector_lz", "published")  # code all rows, as published
MAX_BOUND = 0.5
LINK, LZ_SPEEDS, HUFFMAN_SPEEDS = 4e9, (45e9, 290e9), (60e9, 40e9)
"""Bytes a second in the published scheme's formula: link; encode and decode of each coder (the authors' artifact)."""

Rows = npt.NDArray[np.float32]


class Encoder:
    """Of one thread; its buffers are used again."""

    def __init__(self, check_ids: bool) -> None:
        self._scratch, self._check_ids = Scratch(), check_ids

    def encode(self, rows: Rows, ids: npt.NDArray[np.int64] | None, bound: float, codec: str) -> bytes:
        """The stream of rows (n, D)."""
        head = Head(stream.RAW, ALL_ROWS, rows.shape[0], rows.shape[1], len(rows))
        if len(rows) == 0 or codec == "copy":
            return b"".join((stream.write(head, rows.nbytes), _bytes(rows)))
        found = self._open(rows, ids, bound, codec, head)
        exceptions, payload = b"", b""
        if found.grid:
            codes = found.codes
            if found.num_broken:
                codes, exceptions, head.num_exceptions = _without(found)
            head.method, payload = self._payload(codes, found.grid, codec)
            head.grid = found.grid
        parts: list[Any] = [self._index(head, found, codec), exceptions, payload]
        if head.grid is None or len(payload) + len(exceptions) >= found.rows.nbytes:
            head.method, head.num_exceptions, head.grid = stream.RAW, 0, None
            parts[1:] = [_bytes(found.rows)]
        text = stream.write(head, sum(map(len, parts)))
        return b"".join((text, *parts, bytes(head.padding)))

    def _open(self, rows: Rows, ids: npt.NDArray[np.int64] | None, bound: float, codec: str, head: Head) -> Opened:
        if codec in _WHOLE:
            return opened.all_rows(rows, bound, self._scratch)
        bound = opened.EXACT if codec == "raw" else bound
        found = opened.distinct_rows(rows, ids, self._check_ids, bound, self._scratch)
        head.num_distinct = len(found.rows)
        head.index = IN_ORDER if len(found.rows) == len(rows) else SENT_INDEX if ids is None else KNOWN_IDS
        return found

    def _payload(self, codes: npt.NDArray[Any], grid: Grid, codec: str) -> tuple[int, bytes]:
        if grid.num_codes > 256 or grid.num_codes == 1 or codec == "fixed" or codes.size == 0:
            return stream.FIXED, planes.pack(codes.reshape(-1), planes.width_of(grid.num_codes))
        if codec in _WHOLE:
            return self._published(codes, grid, codec)
        plan = grouped.plan(codes, grid.num_codes, grid.centre, self._scratch)
        width = planes.width_of(grid.num_codes)
        if codec == "auto" and planes.packed_size(codes.size, width) <= plan.num_bytes:
            return stream.FIXED, planes.pack(codes.reshape(-1), width)
        return stream.RANS, grouped.encode(codes, grid.num_codes, plan, self._scratch)

    def _published(self, codes: npt.NDArray[np.uint8], grid: Grid, codec: str) -> tuple[int, bytes]:
        """Of the two, the one with the larger 1 / (1/CR + B (1/Tc + 1/Td))."""
        found = {}
        if codec != "vector_lz":
            found["huffman"] = huffman.encode(codes.reshape(-1), grid.num_codes, self._scratch), HUFFMAN_SPEEDS
        if codec != "huffman":
            found["vector_lz"] = vector_lz.encode(codes, self._scratch), LZ_SPEEDS
        times = {
            name: len(payload) / (4 * codes.size) + LINK * sum(1 / speed for speed in speeds)
            for name, (payload, speeds) in found.items()
        }
        name = min(times, key=times.__getitem__)
        return _METHODS[name], found[name][0]

    def _index(self, head: Head, found: Opened, codec: str) -> bytes:
        if head.index != SENT_INDEX:
            return b""
        if codec in ("fixed", "raw"):
            data = index.pack(found.inverse, head.num_distinct)
        else:
            data = index.encode(found.inverse, head.num_distinct, self._scratch)
        return stream.varint(len(data)) + data


def check(rows: Any, ids: Any, bound: float, codec: str) -> tuple[Rows, npt.NDArray[np.int64] | None]:
    """The arguments as the encoder takes them; DataError names what is wrong."""
    rows = np.asarray(rows)
    if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] < 1:
        raise DataError(f"rows are {rows.dtype} of shape {rows.shape}", "They must be float32 of shape (n, D), D > 0.")
    if len(rows) > stream.MAX_ROWS or rows.shape[1] > stream.MAX_WIDTH:
        raise DataError(f"rows have shape {rows.shape}", f"At most {stream.MAX_ROWS} x {stream.MAX_WIDTH} in a slice.")
    if not (0 < bound <= MAX_BOUND and math.isfinite(bound)):
        raise DataError(f"the bound is {bound}", f"It is a share of max - min: above 0 and at most {MAX_BOUND}.")
    if codec not in CODECS:
        raise DataError(f"there is no codec {codec!r}", f"Choose one of {', '.join(CODECS)}.")
    return np.ascontiguousarray(rows), None if ids is None else check_ids(ids, len(rows))


def check_ids(ids: Any, num_rows: int) -> npt.NDArray[np.int64]:
    """Ids (n,) as int64; DataError where they are not whole numbers, one a row."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.shape != (num_rows,):
        raise DataError(f"ids are {ids.dtype} of shape {ids.shape}", f"They must be whole numbers, ({num_rows},).")
    return np.ascontiguousarray(ids, np.int64)


def _bytes(rows: Rows) -> memoryview:
    return rows.astype("<f4", copy=False).reshape(-1).view(np.uint8).data


def _without(found: Opened) -> tuple[npt.NDArray[Any], bytes, int]:
    """Codes of the rows that keep the bound; the others' numbers (as gaps) and their values."""
    assert found.grid
    broken = quantise.broken_rows(found.rows, found.grid, found.error)
    rows = np.flatnonzero(broken)
    gaps = np.diff(rows, prepend=-1) - 1
    values = found.rows[rows].astype("<f4", copy=False).tobytes()
    return found.codes[~broken], b"".join(stream.varint(int(gap)) for gap in gaps) + values, len(rows)
