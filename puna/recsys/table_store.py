"""Tables in a run's row files: a partition a shard, read again by whatever shards there are then."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError
from puna.recsys.placement import Shard
from puna.train.rows import RowStore

_NAME = re.compile(r"(\d+)\.(\d+)-(\d+)\.(\d+)-(\d+)$")


class TableStore(RowStore):
    """Partitions of this process's shards, written whenever a checkpoint asks what there is.

    arrays: of each shard, (rows, width) or, with `columns` false, (rows,), the live ones. A checkpoint of other shards
    fills them piece by piece, so the placement it was made under does not matter.
    """

    def __init__(
        self, run: Path, name: str, shards: Sequence[Shard], arrays: Callable[[], list[Any]], *, writes: Sequence[bool],
        columns: bool = True,
    ) -> None:  # fmt: skip
        """writes: which shards this process saves; copies of one are saved by one rank alone."""
        super().__init__(run, name)
        self.shards, self._arrays, self._writes, self._columns = shards, arrays, writes, columns
        self._saving = False

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Write this process's shards; their files."""
        self._current = {}
        for shard, array, mine in zip(self.shards, self._arrays(), self._writes, strict=True):
            if mine:
                self.write(self._name(shard), array)
        self._saving = True
        return super().snapshot()

    def restore(self, snapshot: dict[str, dict[str, Any]]) -> None:
        """Make the named files current, and read them; not those that a snapshot has just written."""
        super().restore(snapshot)
        if self._saving:
            self._saving = False
            return
        for shard, array in zip(self.shards, self._arrays(), strict=True):
            self._fill(shard, array)

    def _name(self, shard: Shard) -> str:
        return shard.name if self._columns else f"{shard.table}.{shard.first_row}-{shard.end_row}.0-1"

    def _fill(self, shard: Shard, array: Any) -> None:
        filled = 0
        for name in self._current:
            match = _NAME.match(name)
            if not match:
                raise CheckpointError(f"{self.folder} has a partition {name!r}, which is no piece of a table", OTHER)
            table, first, end, left, right = map(int, match.groups())
            if table != shard.table:
                continue
            a, b = max(first, shard.first_row), min(end, shard.end_row)
            c, d = (max(left, shard.first_col), min(right, shard.end_col)) if self._columns else (0, 1)
            if a >= b or c >= d:
                continue
            piece = self.read(name, mapped=True)
            if piece.shape[0] != end - first or (self._columns and piece.shape[1] != right - left):
                raise CheckpointError(f"partition {name} of {self.folder} holds {piece.shape} numbers", OTHER)
            if self._columns:
                array[a - shard.first_row : b - shard.first_row, c - shard.first_col : d - shard.first_col] = piece[
                    a - first : b - first, c - left : d - left
                ]
            else:
                array[a - shard.first_row : b - shard.first_row] = piece[a - first : b - first]
            filled += (b - a) * (d - c)
        if filled < (shard.rows * shard.width if self._columns else shard.rows):
            raise CheckpointError(f"{self.folder} lacks numbers of table {shard.table}, {shard.name}", OTHER)


OTHER = "Use the recipe that the checkpoint was made with, or another run directory."
