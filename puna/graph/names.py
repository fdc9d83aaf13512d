"""Names and their numbers. A name's number is its line in a text file; it never changes, so names can be added later.

In memory a name is 128 bits: 96 of a hash and its number. Two of a billion names meet with a chance of 1e-11.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.graph.read import Column, column_of_lines
from puna.sparse.compiled import exact_kernel
from puna.sparse.hashing import hashes
from puna.sparse.text import whole_lines

_LOW = np.uint64(0xFFFFFFFF)
_EMPTY = np.uint64(0xFFFFFFFF)  # the number of a place that holds no name
MOST_NAMES = (1 << 31) - 1


class Names:
    """Numbers for names, new ones as they come; the new names are written to `file` one a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count = file, 0
        self._table = _room(1 << 12)

    @classmethod
    def of_file(cls, path: Path, file: IO[bytes]) -> "Names":
        """Those of a file of names, which are written to `file` too."""
        names = cls(file)
        with path.open("rb") as lines:
            for block in whole_lines(lines):
                names.numbers(column_of_lines(block))
        return names

    def numbers(self, column: Column) -> npt.NDArray[np.int32]:
        """The number of every row's name. Raises DataError for a name with a line break."""
        hashed = hashes(column.data, column.starts, column.ends)
        self._grow(self.count + len(hashed))
        out, fresh = np.empty(len(hashed), np.int32), np.empty(len(hashed), np.int64)
        count = _number(hashed, self._table, self.count, out, fresh)
        self._write(column, fresh[: count - self.count])
        self.count = count
        return out

    def _write(self, column: Column, rows: npt.NDArray[np.int64]) -> None:
        starts, ends = column.starts[rows], column.ends[rows]
        lines = np.empty(int((ends - starts).sum()) + len(rows), np.uint8)
        broken = _join(column.data, starts, ends, lines)
        if broken >= 0:
            name = column.text(int(rows[broken]))
            raise DataError(f"the name {name!r} has a line break", "Names are one line.")
        self.file.write(lines.data)

    def _grow(self, wanted: int) -> None:
        """Room for so many names, three quarters full at most."""
        if wanted > MOST_NAMES:
            raise DataError(f"more than {MOST_NAMES:,} names", "Numbers of nodes have 31 bits; cut the graph.")
        if 4 * wanted > 3 * len(self._table):
            before = self._table
            self._table = _room(1 << (4 * wanted // 3).bit_length())
            _insert(before, self._table)


def _room(capacity: int) -> npt.NDArray[np.uint64]:
    """Places for names: 64 bits of the hash; 32 more above the number."""
    return np.full((capacity, 2), _EMPTY, np.uint64)


@exact_kernel
def _number(hashes: Any, table: Any, count: int, out: Any, fresh: Any) -> int:
    """Look names up in an open table; those that are not there get the next numbers. How many there are now."""
    mask, known = np.uint64(table.shape[0] - 1), count
    for i in range(hashes.shape[0]):
        a, b = hashes[i, 0], hashes[i, 1] & ~_LOW
        place = a & mask
        while table[place, 1] & _LOW != _EMPTY and (table[place, 0] != a or table[place, 1] & ~_LOW != b):
            place = (place + np.uint64(1)) & mask
        if table[place, 1] & _LOW == _EMPTY:
            table[place, 0] = a
            table[place, 1] = b | np.uint64(count)
            fresh[count - known] = i
            count += 1
        out[i] = np.int32(table[place, 1] & _LOW)
    return count


@exact_kernel
def _insert(table: Any, larger: Any) -> None:
    mask = np.uint64(larger.shape[0] - 1)
    for i in range(table.shape[0]):
        if table[i, 1] & _LOW == _EMPTY:
            continue
        place = table[i, 0] & mask
        while larger[place, 1] & _LOW != _EMPTY:
            place = (place + np.uint64(1)) & mask
        larger[place, 0] = table[i, 0]
        larger[place, 1] = table[i, 1]


@exact_kernel
def _join(data: Any, starts: Any, ends: Any, out: Any) -> int:
    """Names one a line; the first that has a line break, or -1."""
    filled = 0
    for i in range(starts.shape[0]):
        for at in range(starts[i], ends[i]):
            if data[at] == 10:
                return i
            out[filled] = data[at]
            filled += 1
        out[filled] = 10
        filled += 1
    return -1


def read_names(path: Path, count: int) -> list[str]:
    """All names of a file, by number. Raises DataError where there are not `count`."""
    names = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
    if len(names) != count:
        raise DataError(f"{path} has {len(names):,} names, but {count:,} were imported", "Import the graph again.")
    return names


def stream_names(path: Path, count: int) -> Iterator[list[str]]:
    """All names of a file by number, `count` at a time."""
    some: list[str] = []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            some.append(line[:-1])
            if len(some) == count:
                yield some
                some = []
    if some:
        yield some


def number_of(path: Path, name: str) -> int:
    """A name's number; -1 where it is not in the file."""
    wanted = name.encode("utf-8", "surrogateescape") + b"\n"
    with path.open("rb") as file:
        return next((number for number, line in enumerate(file) if line == wanted), -1)


def names_of(path: Path, numbers: Iterable[int]) -> dict[int, str]:
    """Names of some numbers."""
    wanted = set(numbers)
    with path.open("rb") as file:
        found = ((number, line[:-1]) for number, line in enumerate(file) if number in wanted)
        return {number: line.decode("utf-8", "surrogateescape") for number, line in found}
