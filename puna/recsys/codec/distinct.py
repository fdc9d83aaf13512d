"""Distinct rows: each is sent once, in the order in which lookups first meet it."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.scratch import Scratch

_MIX = np.int64(0x9E3779B97F4A7C15 - (1 << 64))


class Distinct(NamedTuple):
    """`first` (k,): lookup at which each distinct row is first met; `inverse` (n,): number of a lookup's row."""

    first: npt.NDArray[np.int64]
    inverse: npt.NDArray[np.int64]


def by_ids(ids: npt.NDArray[np.int64], scratch: Scratch) -> Distinct:
    """Lookups of the same id are of the same row."""
    first, inverse, table = room(len(ids), scratch)
    return Distinct(first[: number_ids(ids, table, first, inverse)], inverse)


def by_content(rows: npt.NDArray[np.uint32], scratch: Scratch) -> Distinct:
    """Rows (n, D) that are equal bit for bit."""
    first, inverse, table = room(len(rows), scratch)
    hashes = scratch.take("hashes", len(rows), np.int64)
    return Distinct(first[: number_rows(rows, factors(rows.shape[1]), hashes, table, first, inverse)], inverse)


def room(num_rows: int, scratch: Scratch) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """For first (n,), inverse (n,) and the hash table."""
    size = 1 << max(2 * num_rows - 1, 1).bit_length()
    first, inverse = scratch.take("first", num_rows, np.int64), scratch.take("inverse", num_rows, np.int64)
    return first, inverse, scratch.take("table", size, np.int32)


@lru_cache(maxsize=64)
def factors(width: int) -> npt.NDArray[np.uint32]:
    """An odd number for each place in a row, by which it is hashed."""
    mixed = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32) | np.uint64(1)).astype(np.uint32)


@kernel
def number_ids(ids: Any, table: Any, first: Any, inverse: Any) -> int:
    """Fill first and inverse; returns how many ids there are.

    Whether an id is new is not branched on, because nobody can foresee it: each lookup is a candidate for a new row.
    """
    mask = table.shape[0] - 1
    table[:] = -1
    count = 0
    for i in range(ids.shape[0]):
        number = ids[i]
        place = ((number * _MIX) >> 32) & mask
        found = table[place]
        first[count] = i
        while ids[first[found if found >= 0 else count]] != number:
            place = (place + 1) & mask
            found = table[place]
        inverse[i] = table[place] = found if found >= 0 else count
        count += found < 0
    return count


@kernel
def _hash_rows(rows: Any, factors: Any, hashes: Any) -> None:
    for i in range(rows.shape[0]):
        total = np.uint64(0)
        for j in range(rows.shape[1]):
            total += np.uint64(rows[i, j]) * np.uint64(factors[j])
        hashes[i] = np.int64(total)


@kernel
def number_rows(rows: Any, factors: Any, hashes: Any, table: Any, first: Any, inverse: Any) -> int:
    """Fill first and inverse; returns how many rows there are. That rows of one hash are equal is checked."""
    _hash_rows(rows, factors, hashes)
    count = number_ids(hashes, table, first, inverse)
    return count if first_unequal(rows, first, inverse) < 0 else _number_exactly(rows, hashes, table, first, inverse)


@kernel
def _number_exactly(rows: Any, hashes: Any, table: Any, first: Any, inverse: Any) -> int:
    mask = table.shape[0] - 1
    table[:] = -1
    count = 0
    for i in range(rows.shape[0]):
        place = ((hashes[i] * _MIX) >> 32) & mask
        while table[place] >= 0 and not _equal(rows, i, first[table[place]]):
            place = (place + 1) & mask
        if table[place] < 0:
            table[place] = count
            first[count] = i
            count += 1
        inverse[i] = table[place]
    return count


@kernel
def _equal(rows: Any, i: int, k: int) -> bool:
    difference = np.uint32(0)
    for j in range(rows.shape[1]):
        difference = np.uint32(difference | np.uint32(rows[i, j] ^ rows[k, j]))
    return difference == 0


@kernel
def first_unequal(rows: Any, first: Any, inverse: Any) -> int:
    """The first row that is not the one its number stands for; -1: there is none."""
    for i in range(inverse.shape[0]):
        k = first[inverse[i]]
        if k != i and not _equal(rows, i, k):
            return i
    return -1
