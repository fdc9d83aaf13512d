"""Distinct rows: each is sent once, in the order in which lookups first meet it."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.scratch import Scratch

_MIX = np.int64(0x9E3779B97F4A7C15 - (1 << 64))
_HALF = np.uint64(32)


class Distinct(NamedTuple):
    """`first` (k,): the lookup at which each distinct row is first met; `inverse` (n,): the number of a lookup's row."""

    first: npt.NDArray[np.int64]
    inverse: npt.NDArray[np.int64]


def by_ids(ids: npt.NDArray[np.int64], scratch: Scratch) -> Distinct:
    """Lookups of the same id are of the same row."""
    first, inverse = _room(len(ids), scratch)
    count = _number_ids(ids, _table(len(ids), scratch), first, inverse)
    return Distinct(first[:count], inverse)


def by_content(rows: npt.NDArray[Any], scratch: Scratch) -> Distinct:
    """Rows (n, D) of unsigned numbers that are equal bit for bit."""
    first, inverse = _room(len(rows), scratch)
    factors = (np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> _HALF) | np.uint64(1)
    hashes = scratch.take("hashes", len(rows), np.int64)
    count = _number_rows(rows, factors.astype(np.uint32), _table(len(rows), scratch), hashes, first, inverse)
    return Distinct(first[:count], inverse)


def check_ids(rows: npt.NDArray[np.uint32], ids: npt.NDArray[np.int64], distinct: Distinct) -> None:
    """Rows (n, D) that have the same id are equal bit for bit; DataError names the first that is not."""
    found = _first_unequal(rows, distinct.first, distinct.inverse)
    if found >= 0:
        other = int(distinct.first[distinct.inverse[found]])
        raise DataError(
            f"rows {other} and {found} have the same id {ids[found]} and are not equal",
            "Give ids only where an id stands for one row; leave them out for sums of several rows.",
        )


def _room(num_rows: int, scratch: Scratch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return scratch.take("first", num_rows, np.int64), scratch.take("inverse", num_rows, np.int64)


def _table(num_rows: int, scratch: Scratch) -> npt.NDArray[np.int32]:
    return scratch.take("table", 1 << max(2 * num_rows - 1, 1).bit_length(), np.int32)


@kernel
def _number_ids(ids: Any, table: Any, first: Any, inverse: Any) -> int:
    mask = table.shape[0] - 1
    table[:] = -1
    count = 0
    for i in range(ids.shape[0]):
        number = ids[i]
        place = ((number * _MIX) >> 32) & mask
        while table[place] >= 0 and ids[first[table[place]]] != number:
            place = (place + 1) & mask
        if table[place] < 0:
            table[place] = count
            first[count] = i
            count += 1
        inverse[i] = table[place]
    return count


@kernel
def _number_rows(rows: Any, factors: Any, table: Any, hashes: Any, first: Any, inverse: Any) -> int:
    mask = table.shape[0] - 1
    table[:] = -1
    count = 0
    for i in range(rows.shape[0]):
        total = np.uint64(0)
        for j in range(rows.shape[1]):
            total += np.uint64(rows[i, j]) * np.uint64(factors[j])
        mixed = np.int64(total) * _MIX
        place = (mixed >> 32) & mask
        while table[place] >= 0 and not (hashes[table[place]] == mixed and _equal(rows, i, first[table[place]])):
            place = (place + 1) & mask
        if table[place] < 0:
            table[place] = count
            hashes[count] = mixed
            first[count] = i
            count += 1
        inverse[i] = table[place]
    return count


@kernel
def _equal(rows: Any, i: int, k: int) -> bool:
    difference = np.uint64(0)
    for j in range(rows.shape[1]):
        difference |= np.uint64(rows[i, j]) ^ np.uint64(rows[k, j])
    return difference == np.uint64(0)


@kernel
def _first_unequal(rows: Any, first: Any, inverse: Any) -> int:
    for i in range(inverse.shape[0]):
        k = first[inverse[i]]
        if k != i and not _equal(rows, i, k):
            return i
    return -1
