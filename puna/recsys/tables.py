"""Tables over ranks: rows of a batch are looked up where they are and exchanged; gradients go back and are applied.

lookup = tables.index(ids)                       # which rows this batch needs, from whom, for whom
sent = tables.gather(lookup)                     # which the exchange may start to send, while the bottom network works
vectors = tables.receive(lookup, sent, blocks)   # (b, 1 + T, D), with an autograd graph
... backward ...                                 # gradients leave, while the bottom network's are computed
tables.collect()                                 # gradients of this rank's rows; nothing is changed yet
tables.apply(rate)

Where nothing is exchanged (`tables.alone`), `take` stands for all up to `receive`, and `keep` for going backward.
Vectors have the networks' dtype, and a free place before those of the tables, for what the bottom network gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from puna.recsys import lookups
from puna.recsys.alltoall import Blocks, Exchange, Pending
from puna.recsys.placement import EVERYWHERE, Shard
from puna.recsys.table_store import TableStore
from puna.recsys.wires import Block
from puna.sparse.hashing import key_of
from puna.sparse.rows import array_of
from puna.sparse.threads import Team
from puna.train.task import Rows, State

Ints = npt.NDArray[np.int64]


@dataclass
class Lookup:
    """What a batch needs of the tables; see puna/recsys/lookups.py for the arrays."""

    ids: npt.NDArray[np.int32]  # (B, L) of the global batch
    cuts: Ints  # (P + 1,)
    distinct: npt.NDArray[np.int32]  # (T, B)
    counts: npt.NDArray[np.int32]  # (T, P)
    slots: npt.NDArray[np.int32]  # (b, T), of this rank's samples
    row_starts: Ints  # (T,), where a table begins among this rank's distinct rows
    num_rows: int  # distinct rows of this rank's samples, all tables
    sent: list[list[tuple[int, int, int]]]  # by rank: shard, rows, width
    received: list[list[tuple[int, int, int]]]

    @property
    def num_samples(self) -> int:
        """Of this rank."""
        return len(self.slots)


@dataclass
class _Gradients:
    """Of one local shard: places of its rows, their gradients, and the square of each."""

    shard: int
    rows: npt.NDArray[np.signedinteger[Any]]
    values: npt.NDArray[np.float32]
    square: npt.NDArray[np.float32]


@dataclass
class _Kept:
    """Of all tables, (T, ...), where one rank has them alone; see `lookups.fold_by_id`."""

    rows: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    square: npt.NDArray[np.float32]
    counts: Ints
    totals: npt.NDArray[np.float64]

    @classmethod
    def room(cls, num_tables: int, num_samples: int, dim: int) -> "_Kept":
        shape = num_tables, num_samples
        rows, square = np.empty(shape, np.int32), np.empty(shape, np.float32)
        return cls(
            rows, np.empty((*shape, dim), np.float32), square, np.zeros(num_tables, np.int64), np.zeros(num_tables)
        )


class Tables:
    """This rank's shards, their Adagrad sums, and the exchange between ranks."""

    def __init__(
        self,
        rows: Sequence[int],
        dim: int,
        shards: Sequence[Shard],
        exchange: Exchange,
        *,
        hots: Sequence[int] = (),
        seed: int = 0,
        adagrad: bool = False,
        eps: float = 1e-8,
        distinct: bool = True,
        dither: bool = False,
        dtype: torch.dtype = torch.float32,
        run: Path | None = None,
        team: Team | None = None,
    ) -> None:
        """shards: of all ranks. hots: ids that a sample has of each table at most; none: one of each. distinct: rows
        that samples of a rank share are exchanged once. dither: of bounded rows, though not of sums of bags. dtype: of
        vectors. run: where checkpoints keep rows; None: nowhere."""
        self.rows, self.dim, self.shards, self.exchange = tuple(rows), dim, tuple(shards), exchange
        self.columns = np.concatenate([[0], np.cumsum(hots or [1] * len(self.rows))]).astype(np.int64)
        self.bags = np.diff(self.columns) > 1
        self.seed, self.adagrad, self.eps, self.distinct = seed, adagrad, np.float32(eps), distinct
        self.dither, self.dtype = dither, dtype
        self.team, self.rank, self.size = team or Team(), exchange.rank, exchange.size
        self._of_rank = [[n for n, s in enumerate(self.shards) if s.rank == rank] for rank in range(self.size)]
        self._copied = [n for n, s in enumerate(self.shards) if s.rank == EVERYWHERE]
        self.local = self._of_rank[self.rank] + self._copied  # shards that this rank holds
        held = [self.shards[n] for n in self.local]
        self._offsets = np.concatenate([[0], np.cumsum([s.rows * s.width for s in held])]).astype(np.int64)
        self._sum_offsets = np.concatenate([[0], np.cumsum([s.rows for s in held])]).astype(np.int64)
        self.flat = np.empty(self._offsets[-1], np.float32)
        self.sums = np.zeros(self._sum_offsets[-1] if adagrad else 0, np.float32)
        for shard, part in zip(held, self.arrays(), strict=True):
            key = np.uint64(key_of(seed, shard.table))
            scale = 1 / np.sqrt(max(self.rows[shard.table], 1))
            lookups.fill_uniform(key, shard.first_row, shard.first_col, scale, part)
        self._table_offsets = np.zeros(len(self.rows), np.int64)  # of whole tables in `flat`
        self._table_offsets[[shard.table for shard in held]] = self._offsets[:-1]
        self._stores = self._make_stores(run, held) if run else {}
        self._plain = Exchange(exchange.group)
        whole = all(s.rows == self.rows[s.table] and s.width == dim for s in self.shards)
        self.alone = self.size == 1 and not exchange.local and distinct and whole and not self.bags.any()
        self._coming: list[tuple[Lookup, Pending]] = []
        self._copies: list[tuple[Lookup, Pending]] = []
        self._gradients: list[_Gradients] = []
        self._kept: _Kept | None = None

    # --- state ---------------------------------------------------------------------------------------------------

    def arrays(self) -> list[npt.NDArray[np.float32]]:
        """Live rows of each local shard, (rows, width)."""
        held = [self.shards[n] for n in self.local]
        ends = zip(self._offsets[:-1], self._offsets[1:], held, strict=True)
        return [self.flat[a:b].reshape(s.rows, s.width) for a, b, s in ends]

    def sum_arrays(self) -> list[npt.NDArray[np.float32]]:
        """Live Adagrad sums of each local shard, (rows,)."""
        return [self.sums[a:b] for a, b in zip(self._sum_offsets[:-1], self._sum_offsets[1:], strict=True)]

    def state(self) -> State:
        """Rows, and Adagrad sums where there are any, for a checkpoint."""
        return {name: Rows(store) for name, store in self._stores.items()}

    def _make_stores(self, run: Path, held: Sequence[Shard]) -> dict[str, TableStore]:
        mine = [shard.rank != EVERYWHERE or self.rank == 0 for shard in held]
        stores = {"tables": TableStore(run, "tables", held, self.arrays, writes=mine)}
        if self.adagrad:
            firsts = [own and shard.first_col == 0 for own, shard in zip(mine, held, strict=True)]
            stores["tables.adagrad"] = TableStore(
                run, "tables.adagrad", held, self.sum_arrays, writes=firsts, columns=False
            )
        return stores

    # --- forward -------------------------------------------------------------------------------------------------

    def index(self, ids: npt.NDArray[np.int32]) -> Lookup:
        """Of the global batch's ids, (B, L), all within their tables, or -1 in a bag; ranks have consecutive parts.

        B is a multiple of the ranks. Touches no state of the tables.
        """
        num_samples, num_tables = len(ids), len(self.rows)
        cuts = np.arange(self.size + 1, dtype=np.int64) * (num_samples // self.size)
        distinct = np.empty((num_tables, num_samples), np.int32)
        counts = np.zeros((num_tables, self.size), np.int32)
        slots = np.empty((num_samples // self.size, num_tables), np.int32)
        counts[self.bags] = num_samples // self.size
        slots[:, self.bags] = np.arange(len(slots), dtype=np.int32)[:, None]
        held = np.isin(np.arange(num_tables), [self.shards[n].table for n in self.local])
        keys = np.full(1 << int(2 * (num_samples // self.size) + 2).bit_length(), -1, np.int32)
        places = np.empty_like(keys)
        everyone, me = np.arange(self.size), np.array([self.rank])
        for tables, slices in ((held, everyone), (~held, me)):
            lookups.find_distinct(
                ids, self.columns, cuts, np.flatnonzero(tables & ~self.bags), slices, not self.distinct, keys, places,
                distinct, counts, slots, self.rank,
            )  # fmt: skip
        mine = counts[:, self.rank].astype(np.int64)
        return Lookup(
            ids,
            cuts,
            distinct,
            counts,
            slots,
            np.cumsum(mine) - mine,
            int(mine.sum()),
            [[self._block(n, p, cuts, distinct, counts) for n in self._of_rank[self.rank]] for p in range(self.size)],
            [[self._block(n, self.rank, cuts, distinct, counts) for n in theirs] for theirs in self._of_rank],
        )

    def _block(self, n: int, p: int, cuts: Ints, distinct: Any, counts: Any) -> tuple[int, int, int]:
        shard = self.shards[n]
        count = int(counts[shard.table, p])
        if shard.rows < self.rows[shard.table] and not self.bags[shard.table]:
            count = lookups.count_between(distinct[shard.table], cuts[p], count, shard.first_row, shard.end_row)
        return n, count, shard.width

    def blocks(
        self, lookup: Lookup, forward: Sequence[float], backward: Sequence[float], seed: int
    ) -> tuple[Blocks, Blocks]:
        """What is sent and received, with bounds by table. seed: of unbiased rounding, a function of the step."""

        def of(side: list[list[tuple[int, int, int]]], outgoing: bool) -> Blocks:
            return [
                [block(*facts, *((self.rank, p) if outgoing else (p, self.rank))) for facts in side[p]] for p in ranks
            ]

        def block(n: int, rows: int, width: int, owner: int, user: int) -> Block:
            table = self.shards[n].table
            mark = key_of(seed, n, owner, user)
            known = not self.bags[table] and (forward[table] or backward[table])
            ids = self._ids(lookup, n, user) if known else None
            noise = mark if self.dither and not self.bags[table] else 0
            return Block(rows, width, forward[table], backward[table], mark, noise, ids, ids if self.distinct else None)

        ranks = range(self.size)
        return of(lookup.sent, True), of(lookup.received, False)

    def _ids(self, lookup: Lookup, n: int, user: int) -> npt.NDArray[np.int32]:
        """Ids of the rows of a block, which both ends know."""
        shard, first = self.shards[n], int(lookup.cuts[user])
        ids = lookup.distinct[shard.table, first : first + int(lookup.counts[shard.table, user])]
        whole = shard.rows == self.rows[shard.table]
        return ids if whole else ids[(ids >= shard.first_row) & (ids < shard.end_row)]

    def gather(self, lookup: Lookup) -> Tensor:
        """The rows and sums that others (and this rank) need of this rank's shards, flat: for rank 0 first."""
        own = self._of_rank[self.rank]
        starts, total = _starts(lookup.sent)
        out = torch.empty(total)
        array = out.numpy()
        self.team(lambda begin, end: self._gather(lookup, own, 0, starts, begin, end, array), self.size * len(own))
        return out

    def _gather(
        self, lookup: Lookup, numbers: Sequence[int], place: int, starts: Ints, begin: int, end: int, out: Any
    ) -> None:
        """Blocks begin .. end of the shards; `place`: of the first one among the local shards."""
        lookups.gather(
            self.flat, self._offsets[place:], *self._spans(numbers), lookup.ids, self.columns, lookup.distinct,
            lookup.cuts, lookup.counts, starts, begin, end, out,
        )  # fmt: skip

    def receive(
        self,
        lookup: Lookup,
        sent: Tensor,
        blocks: tuple[Blocks, Blocks],
        *,
        exchange: Exchange | None = None,
        terms: Mapping[str, Any] | None = None,
        pending: Pending | None = None,
    ) -> Tensor:
        """Vectors of this rank's samples, (b, 1 + T, D); with gradients on, they have a graph that sends them back."""
        exchange = exchange or self.exchange
        sent.requires_grad_(torch.is_grad_enabled())
        arrived = exchange(
            sent, *blocks, terms=terms, pending=pending, sink=lambda back: self._coming.append((lookup, back))
        )
        return _Spread.apply(arrived, partial(self._spread, lookup), partial(self._fold, lookup))

    def room(self, num_samples: int) -> Tensor:
        """For the vectors of so many samples."""
        return torch.empty(num_samples, 1 + len(self.rows), self.dim, dtype=self.dtype)

    def take(self, ids: npt.NDArray[np.int32], out: Tensor) -> None:
        """What `receive` gives of some samples, to out; by the calling thread, where the tables are `alone`."""
        lookups.take(self.flat, self._table_offsets, ids, array_of(out))

    def look_up(self, ids: npt.NDArray[np.int32]) -> Tensor:
        """Vectors of this rank's part of a batch, exchanged as they are, without a graph."""
        lookup = self.index(ids)
        zeros = [0.0] * len(self.rows)
        with torch.no_grad():
            return self.receive(lookup, self.gather(lookup), self.blocks(lookup, zeros, zeros, 0), exchange=self._plain)

    def _spread(self, lookup: Lookup, arrived: Tensor) -> Tensor:
        rows = self._distinct_rows(lookup, arrived)
        out = self.room(lookup.num_samples)
        array = array_of(out)
        self.team(
            lambda begin, end: lookups.spread(rows, lookup.row_starts, lookup.slots, begin, end, array),
            lookup.num_samples,
        )
        return out

    def _distinct_rows(self, lookup: Lookup, arrived: Tensor) -> npt.NDArray[np.float32]:
        """(M, D) from what has arrived and from the copies that are here; with one rank it stands so already."""
        if self.size == 1:
            return arrived.numpy().reshape(lookup.num_rows, self.dim)
        rows = (np.zeros if self.bags.any() else np.empty)((lookup.num_rows, self.dim), np.float32)
        self._unpack(lookup, arrived.numpy(), rows, backward=False)
        if self._copied:
            first, count = lookup.row_starts[[self.shards[n].table for n in self._copied]], len(self._copied)
            starts, mine = np.tile(first * self.dim, (self.size, 1)), self.rank * count
            place, flat = len(self._of_rank[self.rank]), rows.reshape(-1)
            self._gather(lookup, self._copied, place, starts, mine, mine + count, flat)
        return rows

    def _unpack(self, lookup: Lookup, packed: Any, rows: Any, *, backward: bool) -> None:
        order = [n for theirs in self._of_rank for n in theirs]
        starts, _ = _starts(lookup.received)
        table_of, spans = self._spans(order)
        lefts = np.array([self.shards[n].first_col for n in order], np.int64)
        flat_starts = np.concatenate([part[: len(t)] for part, t in zip(starts, self._of_rank, strict=True)])
        first = int(lookup.cuts[self.rank])
        mine = np.ascontiguousarray(lookup.counts[:, self.rank])
        lookups.unpack(
            packed, flat_starts, table_of, spans, lefts, self.bags, lookup.distinct, first, mine, lookup.row_starts,
            backward, rows,
        )  # fmt: skip

    def _spans(self, numbers: Sequence[int]) -> tuple[Ints, Ints]:
        shards = [self.shards[n] for n in numbers]
        spans = np.array([[s.first_row, s.end_row, s.width] for s in shards], np.int64).reshape(-1, 3)
        return np.array([s.table for s in shards], np.int64), spans

    # --- backward ------------------------------------------------------------------------------------------------

    def _fold(self, lookup: Lookup, gradients: Tensor) -> Tensor:
        """Gradients of this rank's distinct rows, packed as they go back; those of copies are sent to every rank."""
        folded = torch.zeros(lookup.num_rows, self.dim)
        rows, given = folded.numpy(), array_of(gradients.contiguous())
        self.team(
            lambda begin, end: lookups.fold(given, lookup.row_starts, lookup.slots, begin, end, rows), len(self.rows)
        )
        if self.size == 1:
            return folded.view(-1)
        if self._copied:
            self._copies.append((lookup, self._send_copies(lookup, rows)))
        packed = torch.empty(_starts(lookup.received)[1])
        self._unpack(lookup, packed.numpy(), rows, backward=True)
        return packed

    def forget(self) -> None:
        """Whatever a step that was not taken has left."""
        self._kept, self._gradients, self._coming, self._copies = None, [], [], []

    def keep(self, ids: npt.NDArray[np.int32], gradients: Tensor) -> Callable[[int, int], None]:
        """Going backward from `receive`, where the tables are `alone`: call what it gives with (begin, end) until all
        tables have had their turn, then `collect`."""
        given, heights = array_of(gradients), np.array(self.rows)
        kept = self._kept = _Kept.room(len(self.rows), len(ids), self.dim)
        return lambda begin, end: lookups.fold_by_id(
            given, ids, heights, begin, end, kept.rows, kept.values, kept.square, kept.counts, kept.totals
        )

    def _copy_blocks(self, lookup: Lookup, rank: int) -> list[Block]:
        return [Block(int(lookup.counts[self.shards[n].table, rank]), self.dim) for n in self._copied]

    def _send_copies(self, lookup: Lookup, rows: Any) -> Pending:
        first, mine = lookup.row_starts, lookup.counts[:, self.rank]
        tables = [self.shards[n].table for n in self._copied]
        own = np.concatenate([rows[first[t] : first[t] + mine[t]] for t in tables]).reshape(-1)
        blocks = self._copy_blocks(lookup, self.rank)
        received = [self._copy_blocks(lookup, rank) for rank in range(self.size)]
        return self._plain.start(torch.from_numpy(np.tile(own, self.size)), [blocks] * self.size, received)

    def collect(self) -> float:
        """Wait for the gradients of this rank's rows, of all ranks' samples; nothing is changed yet.

        Returns this rank's share of the squared norm of all gradients; not finite where a gradient is not.
        """
        if self._kept:
            return float(self._kept.totals.sum())
        self._gradients = []
        for lookup, pending in self._coming:
            starts, _ = _starts(lookup.sent)
            self._merge(lookup, pending.wait().numpy(), self._of_rank[self.rank], starts, 0)
        total = sum(self._square(gradient) for gradient in self._gradients)
        self._sum_over_columns()
        first = len(self._gradients)
        for lookup, pending in self._copies:
            blocks = [
                [(n, b.rows, b.width) for n, b in zip(self._copied, self._copy_blocks(lookup, p), strict=True)]
                for p in range(self.size)
            ]
            starts, _ = _starts(blocks)
            self._merge(lookup, pending.wait().numpy(), self._copied, starts, len(self._of_rank[self.rank]))
        total += sum(self._square(gradient) for gradient in self._gradients[first:]) / self.size
        self._coming, self._copies = [], []
        return total

    def _merge(self, lookup: Lookup, packed: Any, numbers: Sequence[int], starts: Ints, place: int) -> None:
        """Sum the slices' gradients of each of the shards; `place`: of the first one among the local shards."""
        found: list[_Gradients | None] = [None] * len(numbers)
        scale = np.float32(1 / self.size)

        def act(begin: int, end: int) -> None:
            for s in range(begin, end):
                shard = self.shards[numbers[s]]
                table, counts = shard.table, np.ascontiguousarray(lookup.counts[shard.table])
                bags, own = bool(self.bags[table]), slice(self.columns[table], self.columns[table + 1])
                ids = np.ascontiguousarray(lookup.ids[:, own]) if bags else lookup.distinct[table][:, None]
                most = min(int(counts.sum()) * ids.shape[1], shard.rows)
                keys = np.full(1 << int(2 * most + 2).bit_length(), -1, np.int32)
                rows, values = np.empty(most, np.int64), np.empty((most, shard.width), np.float32)
                span = np.array([shard.first_row, shard.end_row, shard.width], np.int64)
                begins = np.ascontiguousarray(starts[:, s])
                count = lookups.merge(
                    packed, begins, span, ids, lookup.cuts, counts, bags, scale, keys, np.empty_like(keys), rows, values
                )
                found[s] = _Gradients(place + s, rows[:count], values[:count], np.empty(count, np.float32))

        self.team(act, len(numbers))
        self._gradients += [gradient for gradient in found if gradient is not None]

    def _square(self, gradient: _Gradients) -> float:
        return float(lookups.squares(gradient.values, len(gradient.values), gradient.square))

    def _sum_over_columns(self) -> None:
        """Adagrad wants the square of the whole row, which ranks hold in pieces where a table is cut by columns."""
        cut = [g for g in self._gradients if self.shards[self.local[g.shard]].width < self.dim]
        if not cut or not self.adagrad:
            return
        square = torch.from_numpy(np.concatenate([g.square for g in cut]))
        dist.all_reduce(square, group=self.exchange.group)
        for gradient, part in zip(cut, square.split([len(g.square) for g in cut]), strict=True):
            gradient.square[:] = part.numpy()

    def apply(self, rate: float) -> None:
        """One step of SGD or row-wise Adagrad on the rows that have gradients."""
        speed = np.float32(rate)
        if kept := self._kept:
            given = kept.rows, kept.counts, kept.values, kept.square, speed, self.eps
            self.team(
                lambda *part: lookups.step_kept(self.flat, self._table_offsets, self.sums, *given, *part),
                len(self.rows),
            )
            self._kept = None
            return

        def act(begin: int, end: int) -> None:
            for gradient in self._gradients[begin:end]:
                n, rows = gradient.shard, gradient.rows
                lookups.step_rows(
                    self.flat, self._offsets[n], self.sums, self._sum_offsets[n], rows, len(rows), gradient.values,
                    gradient.square, self.dim, speed, self.eps,
                )  # fmt: skip

        self.team(act, len(self._gradients))
        self._gradients = []


class _Spread(torch.autograd.Function):
    """Arrived blocks -> vectors of samples; backward: gradients of samples -> blocks to send back."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, spread: Callable[[Tensor], Tensor], fold: Any) -> Tensor:
        ctx.fold = fold
        return spread(arrived.detach())

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        return ctx.fold(gradients), None, None


def _starts(blocks: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[Ints, int]:
    """Where every block begins in the flat tensor, (ranks, most blocks of one), and its length."""
    starts = np.zeros((len(blocks), max(map(len, blocks), default=0)), np.int64)
    at = 0
    for p, part in enumerate(blocks):
        for n, (_, rows, width) in enumerate(part):
            starts[p, n] = at
            at += rows * width
    return starts, at
