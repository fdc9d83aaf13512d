"""Training a recommendation model under the one loop: a unit is a batch, spread over the ranks; tokens are samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import SGD, Adagrad, Optimizer

from puna.errors import DataError, RecipeError
from puna.recsys import lookups
from puna.recsys.adapt import Bounds, homogenisation
from puna.recsys.alltoall import Exchange
from puna.recsys.clicks import Clicks, Samples
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.dlrm import Dlrm
from puna.recsys.figures import figures
from puna.recsys.network import Run
from puna.recsys.placement import loads, place
from puna.recsys.tables import Lookup, Tables
from puna.recsys.wires import make_wire
from puna.sparse.hashing import key_of
from puna.sparse.threads import Team
from puna.train import mesh
from puna.train.config import ScheduleConfig, TrainConfig
from puna.train.memory import keep_freed_memory
from puna.train.order import permute
from puna.train.phase import during
from puna.train.schedule import Schedule
from puna.train.sharding import local
from puna.train.task import Cursor, Json, OptimizerTask, State, StepReport

EVAL_BATCH = 8192
AHEAD = 2
"""Batches that are read before they are needed."""
ORDERED = 32
"""Batches whose samples are drawn at once."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a batch, and how to find which rows all of it needs."""

    samples: npt.NDArray[np.int64]
    dense: Tensor
    labels: Tensor
    table_ids: npt.NDArray[np.int32]  # of the whole batch
    index: Callable[[npt.NDArray[np.int32]], Lookup]
    step: int

    @cached_property
    def lookup(self) -> Lookup:
        """Found in the step: the thread that reads ahead would take cores and lock from the step before."""
        return self.index(self.table_ids)

    @property
    def weight(self) -> int:
        """Samples of this rank."""
        return len(self.samples)

    @property
    def ids(self) -> Sequence[Any]:
        """Their numbers."""
        return self.samples.tolist()


@dataclass(frozen=True)
class Unit:
    """One step."""

    cursor: Cursor
    tokens: int
    batches: tuple[Batch, ...]
    read_on: Callable[[], None]  # has a thread read the batch after the next, at a time that suits the step


class DlrmTask(OptimizerTask):
    """Trains tables and networks on the train split of clicks; evaluates on its valid split, or test without one."""

    def __init__(
        self,
        config: DlrmConfig,
        exchange: ExchangeConfig,
        schedule: ScheduleConfig,
        clicks: Clicks,
        run: Path | None = None,
        *,
        seed: int = 0,
        eval_samples: int = 0,
    ) -> None:
        """run: where checkpoints keep rows; None: there are none. eval_samples: of an evaluation, the last ones.

        Raises RecipeError: a batch that does not divide over the ranks or is larger than an epoch, classes for another
        number of tables.
        """
        self.config, self.exchange_config, self.clicks, self.seed = config, exchange, clicks, seed
        self.eval_samples, self.size, self.rank = eval_samples, mesh.world_size(), mesh.rank()
        self.rows = tuple(min(count, config.max_rows or count) for count in clicks.rows)
        self._require(clicks)
        self.per_epoch = clicks.count("train") // config.batch
        whole = config.epochs * self.per_epoch * config.batch
        self.total = min(config.samples or whole, whole) // config.batch * config.batch
        keep_freed_memory()
        self.team = Team()
        torch.manual_seed(key_of(seed, 0))
        self.model = Dlrm(config, len(clicks.dense), len(self.rows))
        super().__init__(
            {"model": self.model},
            {"dense": dense_optimizer(self.model, config)},
            learning_rate=Schedule(schedule, TrainConfig(tokens=self.total)).learning_rate,
        )
        self.bounds = Bounds(exchange, self.rows)
        self.shards = place(
            self.rows, config.dim, self.size, config.placement, hots=clicks.hots, data_rows=config.data_rows,
            balance=config.balance,
        )  # fmt: skip
        wires = [make_wire(name, exchange.codec, self.team.size) for name in (exchange.forward, exchange.backward)]
        self.tables = Tables(
            self.rows,
            config.dim,
            self.shards,
            Exchange(None, *wires, local=exchange.local),
            hots=clicks.hots,
            seed=seed,
            adagrad=config.table_optimizer == "adagrad",
            eps=config.eps,
            distinct=exchange.distinct,
            dither=exchange.dither,
            dtype=self.model.vector_dtype,
            run=run,
            team=self.team,
        )
        self._multiplier = 1.0
        self._ordered: tuple[int, int, npt.NDArray[np.int64]] = (-1, 0, np.empty(0, np.int64))

    def _require(self, clicks: Clicks) -> None:
        config, count = self.config, clicks.count("train")
        if config.batch % self.size:
            raise RecipeError(
                f"dlrm.batch is {config.batch}, which {self.size} ranks cannot share evenly",
                f"Set it to a multiple of {self.size}.",
            )
        there = min(count, config.samples or count)
        if config.batch > there:
            raise RecipeError(
                f"dlrm.batch is {config.batch}, but there are {there:,} samples to train on",
                "Lower dlrm.batch.",
            )
        if self.exchange_config.classes and len(self.exchange_config.classes) != len(self.rows):
            raise RecipeError(
                f"exchange.classes names {len(self.exchange_config.classes)} tables, but {clicks.folder} has "
                f"{len(self.rows)}",
                "Give a class for every table, or none.",
            )

    # --- data ----------------------------------------------------------------------------------------------------

    def units(self, cursor: Cursor) -> Iterator[Unit]:
        """Batches of `dlrm.batch` samples, epoch by epoch, read ahead by a thread."""
        batch = self.config.batch
        todo = range(cursor.units, self.total // batch)
        with ThreadPoolExecutor(1) as pool:
            coming = {step: pool.submit(self._load, step) for step in todo[:AHEAD]}

            def read_on(step: int) -> None:
                if step in todo:
                    coming[step] = pool.submit(self._load, step)

            try:
                for step in todo:
                    loaded = coming.pop(step).result() if step in coming else self._load(step)
                    yield Unit(Cursor(step, step * batch), batch, (loaded,), partial(read_on, step + AHEAD))
            finally:
                todo = range(0)  # a step that is still done needs no more

    def _load(self, step: int) -> Batch:
        batch = self.config.batch
        epoch, number = divmod(step, self.per_epoch)
        samples = self._fold(self.clicks.take("train", self._positions(epoch, number)))
        mine = slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)
        return Batch(
            samples.numbers[mine],
            torch.from_numpy(samples.dense[mine]),
            torch.from_numpy(samples.labels[mine]),
            samples.ids,
            self.tables.index,
            step,
        )

    def _positions(self, epoch: int, number: int) -> npt.NDArray[np.int64]:
        """Of a batch's samples; of `ORDERED` batches at a time, as so few numbers cost little more than one batch's."""
        batch, first = self.config.batch, number // ORDERED * ORDERED
        if self._ordered[:2] != (epoch, first):
            positions = np.arange(first * batch, min(first + ORDERED, self.per_epoch) * batch, dtype=np.int64)
            if self.config.shuffle:
                positions = permute(self.seed, epoch, self.clicks.count("train"))(positions)
            self._ordered = epoch, first, positions
        return self._ordered[2][(number - first) * batch :][:batch]

    def _fold(self, samples: Samples) -> Samples:
        """The samples, their ids beyond dlrm.max_rows folded in place. Raises DataError for ids beyond their tables."""
        self.clicks.refuse_strangers(samples, self.clicks.rows)
        if self.rows != self.clicks.rows:
            lookups.fold_ids(samples.ids, self.clicks.by_column(self.rows))
        return samples

    def samples(self, unit: Unit) -> Sequence[Any]:  # type: ignore[override]
        """Numbers of this rank's samples."""
        return unit.batches[0].samples  # type: ignore[return-value]

    # --- a step --------------------------------------------------------------------------------------------------

    def step(self, unit: Unit) -> StepReport:  # type: ignore[override]
        """One step of networks and tables; with what was exchanged, from time to time."""
        report = super().step(unit)
        traffic = (self.tables.exchange.sent, self.tables.exchange.returned)
        report.metrics["sent_bytes"] = float(sum(t.sent for t in traffic))
        alone = self.size == 1 and not self.exchange_config.local
        if (unit.cursor.units + 1) % self.exchange_config.record_every or alone:
            return report
        record = {"event": "exchange", "step": unit.cursor.units + 1, **self._exchanged(unit)}
        return StepReport(**(vars(report) | {"records": [record]}))

    def accumulate(self, unit: Unit, factor: float) -> list[Tensor]:  # type: ignore[override]
        """Then the networks are done, and what is left of the step leaves a core to the thread that reads."""
        losses = super().accumulate(unit, factor)
        unit.read_on()
        return losses

    def differentiate(self, batch: Batch, factor: float) -> Tensor:
        """Gradients are set, as a unit has one batch. Each of the team's threads works on a part of the samples alone,
        but for the tables."""
        self.tables.forget()
        model, on_parts = self.model, self.team.on_parts
        alone = self.tables.alone and not self.bounds.observing
        if alone:
            vectors = self.tables.room(batch.weight)
            below = on_parts(self._below, batch.dense, torch.from_numpy(batch.table_ids), vectors)
        else:
            below, vectors = self._exchange(batch)
        change = torch.empty_like(vectors)
        above = on_parts(partial(self._top, factor), below, vectors.detach(), batch.labels, change)
        fold = None
        if alone:
            fold = self.tables.keep(batch.table_ids, change)
        else:
            vectors.backward(change)
        tables = self.team.shares(len(self.rows))
        outer = on_parts(partial(self._outward, fold), tables, below, change)
        total, *others = (low + high for low, (_, high) in zip(outer, above, strict=True))
        for other in others:
            torch._foreach_add_(total, other)
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        return torch.stack([loss for loss, _ in above]).sum()

    def _below(self, dense: Tensor, ids: Tensor, vectors: Tensor) -> tuple[Tensor, Run]:
        self.tables.take(ids.numpy(), vectors)
        return self.model.bottom(dense)

    def _top(
        self, factor: float, below: tuple[Tensor, Run], vectors: Tensor, labels: Tensor, change: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss sum and gradients of parameters, times the factor; those of the vectors to `change`."""
        logits, top = self.model.top(below[0], vectors)
        loss = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return loss, self.model.back_top(top, (torch.sigmoid(logits) - labels) * factor, change)

    def _outward(
        self,
        fold: Callable[[int, int], None] | None,
        tables: tuple[int, int],
        below: tuple[Tensor, Run],
        change: Tensor,
    ) -> list[Tensor]:
        """Gradients of the bottom network's parameters; and with `fold`, of some of the tables' rows."""
        if fold:
            fold(*tables)
        return self.model.back_bottom(below[1], change[:, 0])

    def _exchange(self, batch: Batch) -> tuple[list[tuple[Tensor, Run]], Tensor]:
        """What the bottom network gives by part and, exchanged meanwhile, the vectors of this rank's samples."""
        tables, terms = self.tables, {}
        forward, backward = self.bounds.forward(batch.step), self.bounds.backward()
        if self.exchange_config.forward == "bounded" or self.exchange_config.backward == "bounded":
            terms = {"step": batch.step, "codec": self.exchange_config.codec, "dither": self.exchange_config.dither}
            terms |= {f"bound of {name}": bound for name, bound in zip(self.clicks.tables, forward, strict=True)}
            terms |= {"bound of gradients": backward[0]}
        blocks = tables.blocks(batch.lookup, forward, backward, key_of(self.seed, 1, batch.step))
        sent = tables.gather(batch.lookup)
        if self.bounds.observing:
            self._observe(batch.lookup, sent)
        pending = tables.exchange.start(sent, *blocks, terms)
        below = self.team.on_parts(self.model.bottom, batch.dense)
        return below, tables.receive(batch.lookup, sent, blocks, terms=terms, pending=pending)

    def _observe(self, lookup: Lookup, sent: Tensor) -> None:
        """The homogenisation index of every table in this batch: the mean over the ranks' pieces of what they send."""
        totals, flat, at = np.zeros((2, len(self.rows))), sent.numpy(), 0
        for part in lookup.sent:
            for n, rows, width in part:
                piece = flat[at : at + rows * width].reshape(rows, width)
                totals[:, self.shards[n].table] += (homogenisation(piece, self.exchange_config.base), 1)
                at += rows * width
        sums = np.array(mesh.agree(totals.reshape(-1).tolist())).reshape(2, -1)
        self.bounds.observe(sums[0] / np.maximum(sums[1], 1))

    def _global_weight(self, unit: Unit) -> int:  # type: ignore[override]
        return unit.tokens

    def _set_learning_rate(self, unit: Unit) -> float:  # type: ignore[override]
        rate = super()._set_learning_rate(unit)
        self._multiplier = rate / self.config.lr
        return rate

    @during("collective")
    @torch.no_grad()
    def _vote(self, losses: list[Tensor], scale: float) -> tuple[float, float]:
        """Loss sum over ranks and the norm of all gradients, those of tables too; not finite if one rank's are not."""
        square = self.tables.collect()
        dense = torch._foreach_norm([local(p.grad) for p in self._parameters if p.grad is not None])
        totals = torch.stack([losses[0].double(), torch.stack(dense).double().square().sum() / self.size + square])
        if self.size > 1:
            dist.all_reduce(totals)
        loss_sum, total = totals.tolist()
        return loss_sum, math.sqrt(total) / scale if total >= 0 else math.nan

    def _update(self, norm: float, scale: float, tokens: int) -> bool:
        taken = super()._update(norm, scale, tokens)
        with during("optimizer"):
            self.tables.apply((self.config.table_lr or self.config.lr) * self._multiplier)
        return taken

    # --- state, figures --------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Networks and their optimiser; rows of the tables and their sums; classes of the tables."""
        return super().state() | self.tables.state() | {"bounds": Json(self.bounds.state, self.bounds.restore)}

    @torch.no_grad()
    def predict(self, split: str, first: int, end: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits and labels of samples first .. end of a split; every rank gets all of them, and calls it."""
        logits, labels = [], []
        for begin in range(first, end, EVAL_BATCH):
            count = min(EVAL_BATCH, end - begin)
            whole = -(-count // self.size) * self.size
            positions = np.minimum(np.arange(begin, begin + whole, dtype=np.int64), end - 1)
            samples = self._fold(self.clicks.take(split, positions))
            mine = slice(self.rank * whole // self.size, (self.rank + 1) * whole // self.size)
            vectors = self.tables.look_up(samples.ids)
            found = torch.cat(self.team.on_parts(self._logits, torch.from_numpy(samples.dense[mine]), vectors))
            if self.size > 1:
                parts = [torch.empty_like(found) for _ in range(self.size)]
                dist.all_gather(parts, found)
                found = torch.cat(parts)
            logits.append(found.numpy()[:count])
            labels.append(samples.labels[:count])
        return np.concatenate(logits), np.concatenate(labels)

    def _logits(self, dense: Tensor, vectors: Tensor) -> Tensor:
        x, _ = self.model.bottom(dense)
        return self.model.top(x, vectors)[0]

    def evaluate(self, split: str) -> dict[str, float]:
        """loss, auc, ne and calibration on the last `eval_samples` of the valid split, or of test without one; none
        where there is neither."""
        held = next((name for name in ("valid", "test") if name in self.clicks.splits), None)
        if held is None or not self.eval_samples:
            return {}
        count = self.clicks.count(held)
        if not count:
            raise DataError(f"the {held} split of {self.clicks.folder} is empty", "Import with a larger share.")
        return figures(*self.predict(held, max(0, count - self.eval_samples), count))

    def _exchanged(self, unit: Unit) -> dict[str, Any]:
        """What the step has sent, by table, over all ranks."""
        found = np.zeros((3, len(self.rows)))
        sides = (self.tables.exchange.sent.blocks, self.tables.exchange.returned.blocks)
        batch = unit.batches[0].lookup
        for place_, (side, blocks) in enumerate(zip(sides, (batch.sent, batch.received), strict=True)):
            for p, part in enumerate(blocks):
                if p == self.rank and not self.exchange_config.local:
                    continue
                for (n, rows, width), size in zip(part, side[p], strict=True):
                    found[place_, self.shards[n].table] += size
                    found[2, self.shards[n].table] += 4 * rows * width * (1 - place_)
        forward, backward, plain = np.array(mesh.agree(found.reshape(-1).tolist())).reshape(3, -1)
        bounds = self.bounds.forward(batch_step(unit))
        classes = self.bounds.classes or ("tight",) * len(self.rows)
        return {
            "wires": [self.exchange_config.forward, self.exchange_config.backward],
            "tables": [
                {
                    "name": name,
                    "class": classes[t],
                    "bound": bounds[t],
                    "plain_bytes": plain[t],
                    "forward_bytes": forward[t],
                    "backward_bytes": backward[t],
                }
                for t, name in enumerate(self.clicks.tables)
            ],
        }

    def describe(self) -> dict[str, Any]:
        """Sizes, and what the ranks hold."""
        num_dense = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "num_parameters": num_dense + sum(self.rows) * self.config.dim,
            "num_dense_parameters": num_dense,
            "num_tables": len(self.rows),
            "num_rows": sum(self.rows),
            "ranks": loads(self.shards, self.size, self.clicks.hots),
            "total_tokens": self.total,
            "flops_per_token": 6 * num_dense,
        }


def batch_step(unit: Unit) -> int:
    """The global step that a unit's bounds are a function of."""
    return unit.batches[0].step


def dense_optimizer(model: Dlrm, config: DlrmConfig) -> Optimizer:
    """Of the networks."""
    if config.optimizer == "sgd":
        return SGD(model.parameters(), lr=config.lr, fused=True)
    return Adagrad(model.parameters(), lr=config.lr, eps=config.eps, fused=True)
