"""Ids for the values of a categorical feature, in the order in which they are first met. In memory stand 128 bits a
value, never its text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.fields import hashes
from puna.recsys.read import Block
from puna.sparse.compiled import exact_kernel

NONE = 0
"""The id of an empty field, and later of every value without a row of its own."""


class Vocabulary:
    """Ids from 1 on; `count` values are known."""

    def __init__(self) -> None:
        self.count = 0
        self._room(1 << 10)

    def _room(self, capacity: int) -> None:
        self._keys, self._ids = np.empty((capacity, 2), np.uint64), np.zeros(capacity, np.int32)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """The values of a file, a line each."""
        vocabulary = cls()
        for block in _lines(path):
            ids, _ = vocabulary.admit(block, 0)
            if vocabulary.count != vocabulary_end(ids):
                raise DataError(f"{path} holds a value twice, or an empty one", "Import the clicks again.")
        return vocabulary

    def admit(self, block: Block, place: int) -> tuple[npt.NDArray[np.int32], bytes]:
        """Ids of a column, new ones for values that were not known; and those values, a line each."""
        rows = len(block)
        if 2 * (self.count + rows) > len(self._ids):
            keys, ids = self._keys, self._ids
            self._room(1 << (2 * (self.count + rows)).bit_length())
            _insert(keys, ids, self._keys, self._ids)
        out, fresh = np.empty(rows, np.int32), np.empty(rows, np.int64)
        known, bounds = self.count, block.column(place)
        self.count = _number(hashes(block, place), bounds, self._keys, self._ids, known, out, fresh)
        return out, b"".join(bytes(block.data[slice(*bounds[row])]) + b"\n" for row in fresh[: self.count - known])

    def find(self, block: Block, place: int) -> npt.NDArray[np.int32]:
        """Ids of a column: 0 for an empty field, -1 for a value that is not known."""
        out = np.empty(len(block), np.int32)
        _find(hashes(block, place), block.column(place), self._keys, self._ids, out)
        return out


def vocabulary_end(ids: npt.NDArray[np.int32]) -> int:
    """The largest id."""
    return int(ids.max()) if len(ids) else 0


def _lines(path: Path) -> Iterator[Block]:
    data = np.frombuffer(path.read_bytes(), np.uint8) if path.stat().st_size else np.empty(0, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if len(ends):
        starts = np.concatenate([[0], ends[:-1] + 1])
        yield Block(path, data, np.stack([starts, ends], axis=1)[:, None], np.arange(1, len(ends) + 1))


@exact_kernel
def _place(wanted: Any, keys: Any, ids: Any) -> Any:
    """Where a value is in an open table, or the free place where it would be."""
    mask = np.uint64(ids.shape[0] - 1)
    place = wanted[0] & mask
    while ids[place] and (keys[place, 0] != wanted[0] or keys[place, 1] != wanted[1]):
        place = (place + np.uint64(1)) & mask
    return place


@exact_kernel
def _number(hashed: Any, bounds: Any, keys: Any, ids: Any, count: int, out: Any, fresh: Any) -> int:
    """Look values up in an open table; those that are not there get the next ids. How many there are now."""
    known = count
    for i in range(hashed.shape[0]):
        if bounds[i, 0] == bounds[i, 1]:
            out[i] = 0
            continue
        place = _place(hashed[i], keys, ids)
        if ids[place] == 0:
            keys[place, 0] = hashed[i, 0]
            keys[place, 1] = hashed[i, 1]
            fresh[count - known] = i
            count += 1
            ids[place] = count
        out[i] = ids[place]
    return count


@exact_kernel
def _find(hashed: Any, bounds: Any, keys: Any, ids: Any, out: Any) -> None:
    for i in range(hashed.shape[0]):
        if bounds[i, 0] == bounds[i, 1]:
            out[i] = 0
            continue
        place = _place(hashed[i], keys, ids)
        out[i] = ids[place] if ids[place] else -1


@exact_kernel
def _insert(keys: Any, ids: Any, new_keys: Any, new_ids: Any) -> None:
    mask = np.uint64(new_ids.shape[0] - 1)
    for i in range(ids.shape[0]):
        if ids[i] == 0:
            continue
        place = keys[i, 0] & mask
        while new_ids[place]:
            place = (place + np.uint64(1)) & mask
        new_keys[place] = keys[i]
        new_ids[place] = ids[i]
