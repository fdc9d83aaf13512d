"""Where tables are: shards over ranks, and the planner that balances bytes and lookups. Without torch."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from puna.errors import RecipeError
from puna.recsys.config import Placed

EVERYWHERE = -1
"""The rank of a shard that every rank has a copy of."""
SPLIT_SHARE = 0.5
"""auto: a table of more than this share of what a rank would hold at best is cut by rows."""


@dataclass(frozen=True)
class Shard:
    """Rows first_row .. end_row and columns first_col .. end_col of a table, on one rank or EVERYWHERE."""

    table: int
    rank: int
    first_row: int
    end_row: int
    first_col: int
    end_col: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.end_row - self.first_row

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.end_col - self.first_col

    @property
    def name(self) -> str:
        """Of its partition in a checkpoint: table, rows, columns."""
        return f"{self.table}.{self.first_row}-{self.end_row}.{self.first_col}-{self.end_col}"


def place(
    rows: Sequence[int],
    dim: int,
    num_ranks: int,
    how: Placed = "auto",
    *,
    hots: Sequence[int] = (),
    data_rows: int = 0,
    balance: float = 0.5,
) -> tuple[Shard, ...]:
    """Shards of tables with so many rows of `dim` numbers, by rank and table; a pure function of its arguments.

    data_rows, balance: of auto; see DlrmConfig. hots: lookups of each table a sample, none: one; a piece by rows has
    its share of them.
    Raises RecipeError where there are fewer columns than ranks to cut them for.
    """
    if how == "column" and dim < num_ranks:
        raise RecipeError(
            f"dlrm.placement is column, but dlrm.dim {dim} does not reach {num_ranks} ranks",
            "Lower run.num_processes, or choose another placement.",
        )
    if num_ranks == 1:
        return tuple(Shard(table, 0, 0, count, 0, dim) for table, count in enumerate(rows))
    if how == "data":
        return tuple(Shard(table, EVERYWHERE, 0, count, 0, dim) for table, count in enumerate(rows))
    hots = hots or [1] * len(rows)
    pieces: list[tuple[int, int, int, int, int]] = []
    shards: list[Shard] = []
    most = SPLIT_SHARE * sum(rows) / num_ranks
    for table, count in enumerate(rows):
        if how == "auto" and count <= data_rows:
            shards.append(Shard(table, EVERYWHERE, 0, count, 0, dim))
        elif how == "column":
            shards += _cut_columns(table, count, dim, num_ranks)
        elif how == "row" or (how == "auto" and count > most and count >= 1 << 16):
            shards += _cut_rows(table, count, dim, num_ranks)
        else:
            pieces.append((table, 0, count, 0, dim))
    shards += _deal(pieces, shards, num_ranks, balance, sum(rows) * dim, hots)
    return tuple(sorted(shards, key=lambda shard: (shard.rank, shard.table, shard.first_row, shard.first_col)))


def _cut_rows(table: int, count: int, dim: int, num_ranks: int) -> list[Shard]:
    cuts = [count * rank // num_ranks for rank in range(num_ranks + 1)]
    return [Shard(table, rank, cuts[rank], cuts[rank + 1], 0, dim) for rank in range(num_ranks)]


def _cut_columns(table: int, count: int, dim: int, num_ranks: int) -> list[Shard]:
    cuts = [dim * rank // num_ranks for rank in range(num_ranks + 1)]
    shards = [Shard(table, rank, 0, count, cuts[rank], cuts[rank + 1]) for rank in range(num_ranks)]
    return shards


def _deal(
    pieces: Sequence[tuple[int, int, int, int, int]],
    placed: Sequence[Shard],
    num_ranks: int,
    balance: float,
    total_numbers: int,
    hots: Sequence[int],
) -> list[Shard]:
    """Whole tables to the rank with the least cost so far, the costliest first (longest processing time)."""

    def cost(numbers: int, lookups: float) -> float:
        return balance * numbers / max(total_numbers, 1) + (1 - balance) * lookups / max(sum(hots), 1)

    loads = [0.0] * num_ranks
    for shard in placed:
        if shard.rank != EVERYWHERE:
            loads[shard.rank] += cost(shard.rows * shard.width, hots[shard.table] / num_ranks)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    shards = [Shard(table, 0, *spans) for table, *spans in pieces]
    costs = {shard.table: cost(shard.rows * shard.width, hots[shard.table]) for shard in shards}
    for place, shard in sorted(enumerate(shards), key=lambda one: (-costs[one[1].table], one[1].table)):
        load, rank = heapq.heappop(heap)
        shards[place] = replace(shard, rank=rank)
        heapq.heappush(heap, (load + costs[shard.table], rank))
    return shards


def loads(shards: Sequence[Shard], num_ranks: int, hots: Sequence[int] = ()) -> list[dict[str, float]]:
    """Of every rank: bytes of its shards, and lookups for each sample of the global batch."""
    found = [{"bytes": 0.0, "lookups": 0.0} for _ in range(num_ranks)]
    whole: dict[int, int] = {}
    for shard in shards:
        whole[shard.table] = max(whole.get(shard.table, 0), shard.end_row)
    for shard in shards:
        ranks = range(num_ranks) if shard.rank == EVERYWHERE else [shard.rank]
        share = 1 / num_ranks if shard.rank == EVERYWHERE else shard.rows / max(whole[shard.table], 1)
        for rank in ranks:
            found[rank]["bytes"] += 4 * shard.rows * shard.width
            found[rank]["lookups"] += share * (hots[shard.table] if hots else 1)
    return found
