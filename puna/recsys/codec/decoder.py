"""A stream into a slice. Everything is checked against the stream's head and length before room is made for it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.codec import distinct, grouped, huffman, index, planes, quantise, stream, vector_lz
from puna.recsys.codec.encoder import Rows, check_ids
from puna.recsys.codec.quantise import Grid
from puna.recsys.codec.scratch import Scratch
from puna.recsys.codec.stream import KNOWN_IDS, SENT_INDEX, Head, Reader, damaged


class Decoder:
    """Of one thread; its buffers are used again."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def decode(self, data: Any, ids: Any, out: Rows | None) -> Rows:
        """Rows (n, D), in `out` where given; DataError where the stream or the ids are wrong."""
        view = memoryview(data).cast("B").toreadonly()
        head, at = stream.read(view)
        reader = Reader(view[: len(view) - head.padding], at)
        out = _room(head, out)
        inverse = self._inverse(head, reader, ids)
        direct = inverse is None and head.num_exceptions == 0 and head.method != stream.RANS
        rows = out if direct else self._scratch.take("rows", head.num_distinct * head.width, np.float32)
        rows = rows.reshape(head.num_distinct, head.width)
        order = self._rows(head, reader, rows)
        if direct:
            return out
        if inverse is None:
            inverse = order
        elif order is not None:
            inverse = np.take(order, inverse, out=self._scratch.take("order", head.num_rows, np.int64), mode="clip")
        assert inverse is not None  # rows that are in order are decoded where they belong
        np.take(rows, inverse, axis=0, out=out, mode="clip")
        return out

    def _inverse(self, head: Head, reader: Reader, ids: Any) -> npt.NDArray[np.int64] | None:
        """The number of the distinct row of each lookup; None: they are the rows, in order."""
        if head.index == KNOWN_IDS:
            if ids is None:
                raise DataError("the codec stream was made with ids that its receiver knows", "Give the same ids.")
            found = distinct.by_ids(check_ids(ids, head.num_rows), self._scratch)
            if len(found.first) != head.num_distinct:
                raise DataError(
                    f"the ids have {len(found.first)} distinct values and the codec stream {head.num_distinct} rows",
                    "Give the ids that it was made with.",
                )
            return found.inverse
        if head.index != SENT_INDEX:
            return None
        part = _bytes(reader.take(reader.varint()))
        inverse = self._scratch.take("inverse", head.num_rows, np.int64)
        if not index.decode(part, head.num_distinct, inverse, self._scratch):
            raise damaged("its index")
        return inverse

    def _rows(self, head: Head, reader: Reader, rows: Rows) -> npt.NDArray[np.int64] | None:
        """Fill rows (k, D) and say where each is among them; None: in order."""
        if head.grid is None:
            rows[:] = np.frombuffer(_exactly(reader, 4 * rows.size), "<f4").reshape(rows.shape)
            return None
        exceptions = self._exceptions(head, reader, rows)
        places = self._coded(head, head.grid, _bytes(reader.rest()), rows[: head.num_coded])
        if exceptions is None:
            return places
        order = np.empty(head.num_distinct, np.int64)
        order[exceptions] = np.arange(head.num_coded, head.num_distinct)
        order[~exceptions] = np.arange(head.num_coded) if places is None else places
        return order

    def _exceptions(self, head: Head, reader: Reader, rows: Rows) -> npt.NDArray[np.bool_] | None:
        """Which rows were sent as they are; their values are put after those of the others."""
        if not head.num_exceptions:
            return None
        if head.num_exceptions > len(reader.stream) - reader.at:
            raise damaged("more exceptions than bytes")
        is_exception = np.zeros(head.num_distinct, np.bool_)
        row = -1
        for _ in range(head.num_exceptions):
            row += reader.varint() + 1
            if row >= head.num_distinct:
                raise damaged("an exception beyond the last row")
            is_exception[row] = True
        values = np.frombuffer(reader.take(4 * head.num_exceptions * head.width), "<f4")
        rows[head.num_coded :] = values.reshape(-1, head.width)
        return is_exception

    def _coded(self, head: Head, grid: Grid, data: npt.NDArray[np.uint8], rows: Rows) -> npt.NDArray[np.int64] | None:
        """Fill rows that were coded; where each is among them, None: in order."""
        places, values = None, rows.reshape(-1)
        name = "codes" if grid.num_codes <= 256 else "wide codes"
        codes = self._scratch.take(name, rows.size, grid.code_type)
        if head.method == stream.FIXED:
            planes.unpack(data, grid.num_codes, codes)
        elif rows.size == 0:
            raise damaged("no codes")
        else:
            places = self._entropy_coded(head, grid, data, codes.reshape(rows.shape))
        quantise.restore(codes, grid, values)
        return places

    def _entropy_coded(
        self, head: Head, grid: Grid, data: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int64] | None:
        if head.method == stream.RANS:
            places = grouped.decode(data, grid.num_codes, codes, self._scratch)
            if places is None:
                raise damaged("its codes end elsewhere than they began")
            return places
        sound = (
            huffman.decode(data, grid.num_codes, codes.reshape(-1), self._scratch)
            if head.method == stream.HUFFMAN
            else vector_lz.decode(data, codes) and codes.max() < grid.num_codes
        )
        if not sound:
            raise damaged("its codes")
        return None


def _room(head: Head, out: Rows | None) -> Rows:
    shape = (head.num_rows, head.width)
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise DataError(f"out is {out.dtype} of shape {out.shape}", f"The codec stream holds float32 of shape {shape}.")
    return out


def _bytes(part: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(part, np.uint8)


def _exactly(reader: Reader, size: int) -> memoryview:
    part = reader.rest()
    if len(part) != size:
        raise damaged(f"{len(part)} bytes instead of {size}")
    return part
