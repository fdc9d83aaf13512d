"""Names and their numbers. A name's number is its line in a text file; it never changes, so names can be added later.

In memory stand 128 bits a name (two hashes) rather than the name: two of a billion names meet with a chance of 1e-21.
"""

from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.graph.compiled import exact_kernel
from puna.graph.read import Column
from puna.graph.tables import mix

_SEEDS = np.array([0x243F6A8885A308D3, 0x13198A2E03707344], np.uint64)
_EMPTY = -1


class Names:
    """Numbers for names, new ones as they come; the new names are written to `file` one a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count = file, 0
        self._room(1 << 12)

    def _room(self, capacity: int) -> None:
        self._keys = np.empty((capacity, 2), np.uint64)
        self._numbers = np.full(capacity, _EMPTY, np.int32)

    def numbers(self, column: Column) -> npt.NDArray[np.int32]:
        """The number of every row's name."""
        rows = len(column.starts)
        self._grow(self.count + rows)
        out, fresh = np.empty(rows, np.int32), np.empty(rows, np.int64)
        count = _number(
            column.data, column.starts, column.ends, _SEEDS, self._keys, self._numbers, self.count, out, fresh
        )
        for row in fresh[: count - self.count]:
            name = bytes(column.data[column.starts[row] : column.ends[row]])
            if b"\n" in name:
                raise DataError(f"the name {name.decode('utf-8', 'replace')!r} has a line break", "Names are one line.")
            self.file.write(name + b"\n")
        self.count = count
        return out

    def _grow(self, wanted: int) -> None:
        if 4 * wanted <= 3 * len(self._numbers):
            return
        keys, numbers = self._keys, self._numbers
        self._room(1 << (4 * wanted // 3).bit_length())
        _insert(keys, numbers, self._keys, self._numbers)


@exact_kernel
def _hash(data: Any, start: int, end: int, seed: Any) -> Any:
    state = mix(seed ^ np.uint64(end - start))
    word, filled = np.uint64(0), 0
    for at in range(start, end):
        word = (word << np.uint64(8)) | np.uint64(data[at])
        filled += 1
        if filled == 8:
            state = mix(state ^ word) + seed
            word, filled = np.uint64(0), 0
    return mix(mix(state ^ word) + seed)


@exact_kernel
def _number(
    data: Any, starts: Any, ends: Any, seeds: Any, keys: Any, numbers: Any, count: int, out: Any, fresh: Any
) -> int:
    """Look names up in an open table; those that are not there get the next numbers. How many there are now."""
    mask, known = np.uint64(numbers.shape[0] - 1), count
    for i in range(starts.shape[0]):
        a = _hash(data, starts[i], ends[i], seeds[0])
        b = _hash(data, starts[i], ends[i], seeds[1])
        place = a & mask
        while numbers[place] >= 0 and (keys[place, 0] != a or keys[place, 1] != b):
            place = (place + np.uint64(1)) & mask
        if numbers[place] < 0:
            keys[place, 0] = a
            keys[place, 1] = b
            numbers[place] = count
            fresh[count - known] = i
            count += 1
        out[i] = numbers[place]
    return count


@exact_kernel
def _insert(keys: Any, numbers: Any, new_keys: Any, new_numbers: Any) -> None:
    mask = np.uint64(new_numbers.shape[0] - 1)
    for i in range(numbers.shape[0]):
        if numbers[i] < 0:
            continue
        place = keys[i, 0] & mask
        while new_numbers[place] >= 0:
            place = (place + np.uint64(1)) & mask
        new_keys[place] = keys[i]
        new_numbers[place] = numbers[i]


def read_names(path: Path, count: int) -> list[str]:
    """All names of a file, by number. Raises DataError where there are not `count`."""
    names = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    if len(names) != count:
        raise DataError(f"{path} has {len(names):,} names, but {count:,} were imported", "Import the graph again.")
    return names
