"""What every way of coding a slice begins with, in one call: distinct rows, their grid, their codes."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.codec import distinct, quantise
from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.quantise import Grid
from puna.recsys.codec.scratch import Scratch

_ALL, _BY_CONTENT, _BY_IDS, _BY_TRUSTED_IDS = range(4)
_NO_IDS = np.zeros(0, np.int64)
EXACT = 0.0
"""Instead of a bound: rows are not quantised."""


class Opened(NamedTuple):
    """Distinct rows (k, D), the number of each lookup's row (n,), and what `quantise.quantised` says of the rows."""

    rows: npt.NDArray[np.float32]
    inverse: npt.NDArray[np.int64]
    grid: Grid | None
    error: float
    codes: npt.NDArray[Any]
    num_broken: int


def all_rows(rows: npt.NDArray[np.float32], bound: float, scratch: Scratch) -> Opened:
    """Rows (n, D) as they are, n > 0."""
    return _open(rows, _NO_IDS, _ALL, bound, scratch)


def distinct_rows(
    rows: npt.NDArray[np.float32], ids: npt.NDArray[np.int64] | None, check: bool, bound: float, scratch: Scratch
) -> Opened:
    """Rows (n, D), n > 0, once each: by ids, or by their content. With `check`, ids of rows that differ: DataError."""
    if ids is None:
        return _open(rows, _NO_IDS, _BY_CONTENT, bound, scratch)
    return _open(rows, ids, _BY_IDS if check else _BY_TRUSTED_IDS, bound, scratch)


def _open(
    rows: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], how: int, bound: float, scratch: Scratch
) -> Opened:
    num_rows, width = rows.shape
    first, inverse, table = distinct.room(num_rows, scratch)
    hashes = scratch.take("hashes", num_rows, np.int64)
    kept = scratch.take("kept", rows.size, np.float32).reshape(num_rows, width)
    codes: npt.NDArray[Any] = scratch.take("codes", rows.size, np.uint8)
    count, unequal, found, error, num_broken = _opened(
        rows, rows.view(np.uint32), ids, how, bound, distinct.factors(width), table, hashes, first, inverse, kept, codes
    )
    if unequal >= 0:
        other = int(first[inverse[unequal]])
        raise DataError(
            f"rows {other} and {unequal} have the same id {ids[unequal]} and are not equal",
            "Give ids only where an id stands for one row; leave them out for sums of several rows.",
        )
    kept, grid = (rows if count == num_rows else kept[:count]), quantise.as_grid(found)
    if grid and grid.code_type is np.int64:
        codes = scratch.take("wide codes", kept.size, np.int64)
        num_broken = quantise.quantise_wide(kept.reshape(-1), grid, error, codes)
    return Opened(kept, inverse, grid, error, codes[: kept.size].reshape(count, width), num_broken)


@kernel
def _opened(
    rows: Any, words: Any, ids: Any, how: int, bound: float, factors: Any, table: Any, hashes: Any, first: Any,
    inverse: Any, kept: Any, codes: Any,
) -> Any:  # fmt: skip
    count, unequal, values = rows.shape[0], -1, rows
    if how == _BY_CONTENT:
        count = distinct.number_rows(words, factors, hashes, table, first, inverse)
    elif how != _ALL:
        count = distinct.number_ids(ids, table, first, inverse)
    if how == _BY_IDS:
        unequal = distinct.first_unequal(words, first, inverse)
    if count < rows.shape[0]:
        for k in range(count):
            row = first[k]
            for j in range(rows.shape[1]):
                kept[k, j] = rows[row, j]
        values = kept[:count]
    if bound == EXACT:
        return count, unequal, (quantise.NO_GRID, 0.0, 0, 0), 0.0, 0
    flat = values.reshape(values.size)
    found, error, num_broken = quantise.quantised(flat, flat.view(np.int32), bound, codes)
    return count, unequal, found, error, num_broken
