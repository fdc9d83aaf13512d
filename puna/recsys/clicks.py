"""Clicks on disk: a row a sample, in the order of time. `clicks.json` is written last, by rename.

DIR/clicks.json       features, rows of each table, splits as ranges of samples, SHA-256 of each file
DIR/labels            uint8, 0 or 1
DIR/dense             little-endian float32, (samples, dense features), as log(1 + x) where the import took it
DIR/ids               little-endian int32, (samples, ids of a sample); 0 is what has no row of its own. A categorical
                      feature has one column, or as many as a bag of its has ids at most: -1 where there is no more
DIR/maps/NAME.txt     the value of every id from 1 on, a line each; none where values were hashed or were ids already
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.sparse.compiled import exact_kernel
from puna.sparse.folder import check_sizes, read_manifest
from puna.train.hashed import sha256_of

FORMAT_VERSION = 2  # since 2 a feature may have several ids
MANIFEST = "clicks.json"
HOW = "Make it with `puna recsys import FILE --layout criteo --out DIR` or `puna recsys generate --out DIR`."
COLUMNS: dict[str, np.dtype[Any]] = {"labels": np.dtype("u1"), "dense": np.dtype("<f4"), "ids": np.dtype("<i4")}


@dataclass(frozen=True)
class Samples:
    """Some samples. numbers: their places, (N,); labels (N,) float32; dense (N, F) float32; ids (N, L) int32."""

    numbers: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Clicks:
    """Imported clicks; columns are mapped, not read."""

    folder: Path
    dense: tuple[str, ...]  # names of the dense features
    tables: tuple[str, ...]  # names of the categorical ones
    rows: tuple[int, ...]  # ids of each, 0 among them
    hots: tuple[int, ...]  # ids that a sample has of each at most
    splits: dict[str, tuple[int, int]]  # samples from, to
    columns: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> "Clicks":
        """Raises DataError where the folder holds no clicks, ones of a newer format, or a file of another size."""
        folder = Path(folder)
        return read_manifest(folder / MANIFEST, "clicks", HOW, FORMAT_VERSION, lambda raw: cls._of(folder, raw))

    @classmethod
    def _of(cls, folder: Path, raw: dict[str, Any]) -> "Clicks":
        dense, tables, count = tuple(raw["dense"]), tuple(raw["tables"]), raw["samples"]
        hots = tuple(raw.get("hots", [1] * len(tables)))
        check_sizes(folder, raw["files"])
        shapes = {"labels": (count,), "dense": (count, len(dense)), "ids": (count, sum(hots))}
        columns = {name: _map(folder / name, COLUMNS[name], shape) for name, shape in shapes.items()}
        splits = {name: (first, last) for name, (first, last) in raw["splits"].items()}
        return cls(folder, dense, tables, tuple(raw["rows"]), hots, splits, columns)

    def by_column(self, rows: Sequence[int]) -> npt.NDArray[np.int32]:
        """Of every column of ids, (L,), what `rows` says of its table."""
        return np.repeat(np.asarray(rows, np.int32), self.hots)

    def count(self, split: str) -> int:
        """Samples of a split. Raises DataError where there is no such split."""
        if split not in self.splits:
            have = ", ".join(self.splits)
            raise DataError(f"{self.folder} has no split {split!r}; it has {have}", "Import with --valid and --test.")
        first, end = self.splits[split]
        return end - first

    def take(self, split: str, positions: npt.NDArray[np.int64]) -> Samples:
        """Samples of a split by their places in it."""
        return self.at(positions + self.splits[split][0])

    def at(self, numbers: npt.NDArray[np.int64]) -> Samples:
        """Samples by their numbers."""
        found = {name: np.asarray(column.take(numbers, axis=0)) for name, column in self.columns.items()}
        return Samples(numbers, found["labels"].astype(np.float32), found["dense"], found["ids"])

    def version(self) -> dict[str, str]:
        """What the folder says of itself: copies on several machines must be the same."""
        return {str(self.folder / MANIFEST): sha256_of(self.folder / MANIFEST)[:16]}

    def refuse_strangers(self, samples: Samples, rows: tuple[int, ...]) -> None:
        """Raise DataError for the first id that its table, of so many rows, does not have."""
        smallest = self.by_column([-1 if hot > 1 else 0 for hot in self.hots])
        at, column = _first_stranger(samples.ids, smallest, self.by_column(rows))
        if at >= 0:
            table = self.by_column(range(len(rows)))[column]
            raise DataError(
                f"{self.folder / 'ids'}, sample {samples.numbers[at]:,}, column {self.tables[table]}: the id "
                f"{samples.ids[at, column]:,} is beyond its table of {rows[table]:,} rows",
                "The file is damaged, or the model was made for other clicks: import again, or set dlrm.max_rows.",
            )


@exact_kernel
def _first_stranger(ids: Any, smallest: Any, rows: Any) -> tuple[int, int]:
    """Row and column of the first id that is below the smallest or beyond the rows of its column; -1: there is none."""
    for n in range(ids.shape[0]):
        for c in range(ids.shape[1]):
            if ids[n, c] < smallest[c] or ids[n, c] >= rows[c]:
                return n, c
    return -1, -1


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    return np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.empty(shape, dtype)
