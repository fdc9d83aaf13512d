"""A slice into a stream: distinct rows, grid, codes, rows that the grid cannot hold, index, payload."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.codec import distinct, grouped, huffman, index, planes, quantise, stream, vector_lz
from puna.recsys.codec.quantise import Grid
from puna.recsys.codec.scratch import Scratch
from puna.recsys.codec.stream import ALL_ROWS, IN_ORDER, KNOWN_IDS, SENT_INDEX, Head

CODECS = ("auto", "rans", "fixed", "raw", "huffman", "vector_lz", "published")
_METHODS = {name: method for method, name in stream.METHODS.items()}
_WHOLE = ("huffman", "vector_lz", "published")  # code all rows, as published
MAX_BOUND = 0.5
LINK, LZ_SPEEDS, HUFFMAN_SPEEDS = 4e9, (45e9, 290e9), (60e9, 40e9)
"""Bytes a second in the published scheme's formula: link; encode and decode of each coder (the authors' artifact)."""

Rows = npt.NDArray[np.float32]


class Encoder:
    """Of one thread; its buffers are used again."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def encode(self, rows: Rows, ids: npt.NDArray[np.int64] | None, bound: float, codec: str) -> bytes:
        """The stream of rows (n, D)."""
        kept, head, inverse = self._distinct(rows, ids, codec)
        whole = kept.reshape(-1)
        grid, error = None, 0.0
        if codec != "raw" and len(kept):
            low, high = quantise.finite_range(whole)
            grid, error = quantise.grid_of(low, high, bound), bound * (high - low)
        exceptions, payload = b"", b""
        if grid:
            codes = self._scratch.take(f"codes{grid.code_type.__name__}", whole.size, grid.code_type)
            broken = quantise.quantise(whole, grid, error, codes)
            codes = codes.reshape(kept.shape)
            if broken:
                codes, exceptions, head.num_exceptions = _without(kept, codes, grid, error)
            head.method, payload = self._payload(codes, grid, codec)
        if grid is None or len(payload) + len(exceptions) >= whole.nbytes:
            head.method, head.num_exceptions, grid = stream.RAW, 0, None
            exceptions, payload = b"", kept.astype("<f4", copy=False).tobytes()
        head.grid = grid
        body = self._index(head, inverse) + exceptions + payload
        return stream.write(head, len(body)) + body + bytes(head.padding)

    def _distinct(
        self, rows: Rows, ids: npt.NDArray[np.int64] | None, codec: str
    ) -> tuple[Rows, Head, npt.NDArray[np.int64] | None]:
        head = Head(stream.RAW, ALL_ROWS, *rows.shape, len(rows))
        if codec in _WHOLE or len(rows) == 0:
            return rows, head, None
        words = rows.view(np.uint32)
        if ids is None:
            found = distinct.by_content(words, self._scratch)
        else:
            found = distinct.by_ids(ids, self._scratch)
            distinct.check_ids(words, ids, found)
        head.num_distinct = len(found.first)
        head.index = SENT_INDEX if ids is None else KNOWN_IDS
        if len(found.first) == len(rows):
            head.index = IN_ORDER
            return rows, head, None
        kept = self._scratch.take("kept", len(found.first) * rows.shape[1], np.float32).reshape(-1, rows.shape[1])
        np.take(rows, found.first, axis=0, out=kept, mode="clip")
        return kept, head, found.inverse

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

    def _index(self, head: Head, inverse: npt.NDArray[np.int64] | None) -> bytes:
        if head.index != SENT_INDEX or inverse is None:
            return b""
        data = index.encode(inverse, head.num_distinct, self._scratch)
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


def _without(
    kept: Rows, codes: npt.NDArray[Any], grid: Grid, error: float
) -> tuple[npt.NDArray[Any], bytes, int]:
    """Codes of the rows that keep the bound; the others' numbers (as gaps) and their values."""
    broken = quantise.broken_rows(kept, grid, error)
    rows = np.flatnonzero(broken)
    gaps = np.diff(rows, prepend=-1) - 1
    values = kept[rows].astype("<f4", copy=False).tobytes()
    return codes[~broken], b"".join(stream.varint(int(gap)) for gap in gaps) + values, len(rows)
