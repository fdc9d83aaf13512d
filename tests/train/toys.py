"""Three toy tasks (autograd, a table whose rows change each unit, two models in two phases) and how to run them."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from puna.train import mesh
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, MeshConfig, RunConfig
from puna.train.loop import Run
from puna.train.optim import Average
from puna.train.order import permute
from puna.train.rows import RowStore
from puna.train.task import Cursor, GradientTask, Rows, State, StepReport, Task

SAMPLES, WIDTH = 64, 6


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    weight: int
    ids: list[int]
    phase: int = 0


@dataclass
class Unit:
    cursor: Cursor
    tokens: int
    batches: Sequence[Batch]


def samples(ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs (n, WIDTH) and targets (n, 1) of the named samples, a pure function of the ids."""
    generator = np.random.default_rng(7)
    table = generator.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
    inputs = torch.from_numpy(table[ids])
    return inputs, inputs.sin().sum(1, keepdim=True)


def batches(
    seed: int, start: int, num_samples: int, num_micro: int, rank: int, world_size: int, phase: int = 0
) -> list[Batch]:
    """This rank's share of samples start .. start + num_samples of the endless order."""
    places = np.arange(start, start + num_samples)
    order = {int(epoch): permute(seed, int(epoch), SAMPLES) for epoch in np.unique(places // SAMPLES)}
    ids = np.array([int(order[p // SAMPLES](p % SAMPLES)) for p in map(int, places)])
    mine = ids.reshape(num_micro, world_size, -1)[:, rank]
    return [Batch(*samples(part), weight=len(part), ids=part.tolist(), phase=phase) for part in mine]


def network(seed: int, width: int = 8, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))


class Regression(GradientTask):
    """Autograd: a small network with dropout (so that the random numbers of a step matter)."""

    def __init__(
        self, num_units: int = 12, num_micro: int = 2, *, sharded: bool = False, seed: int = 3, dropout: float = 0.1
    ) -> None:
        self.num_units, self.num_micro, self.seed = num_units, num_micro, seed
        model = network(seed, dropout=dropout)
        if sharded:
            fully_shard(model[0])
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        super().__init__({"model": model}, {"adamw": optimizer}, clip=1.0, average=Average({"model": model}, "mean"))

    def units(self, cursor: Cursor) -> Iterator[Unit]:
        while cursor.units < self.num_units:
            parts = batches(self.seed, cursor.tokens, 16, self.num_micro, mesh.rank(), mesh.world_size())
            yield Unit(cursor, 16, parts)
            cursor = cursor.after(16)

    def loss_sum(self, batch: Batch) -> Tensor:
        return (self.modules["model"](batch.inputs) - batch.targets).square().sum()

    def evaluate(self, split: str) -> dict[str, float]:
        with torch.no_grad():
            inputs, targets = samples(np.arange(SAMPLES))
            self.modules["model"].eval()
            loss = (self.modules["model"](inputs) - targets).square().mean().item()
            self.modules["model"].train()
        return {"loss": loss}

    def describe(self) -> dict[str, float]:
        return {"total_tokens": 16 * self.num_units, "flops_per_token": 6.0 * 64}


class Table(Task):
    """No autograd: a table in partitions; each unit changes one pair of them, as a bucket of a graph does."""

    PARTITIONS = 4

    def __init__(self, run: str, num_units: int = 12, rows: int = 32) -> None:
        self.num_units, self.rows = num_units, rows
        self.store = RowStore(run, "entities")
        if mesh.rank() == 0:
            for partition in range(self.PARTITIONS):
                if str(partition) not in self.store:
                    self.store.write(str(partition), np.full((rows, WIDTH), float(partition)))

    def units(self, cursor: Cursor) -> Iterator[tuple[int, int]]:
        for unit in range(cursor.units, self.num_units):
            pair = permute(5, unit, self.PARTITIONS)([0, 1])
            yield int(pair[0]), int(pair[1])

    def step(self, unit: tuple[int, int]) -> StepReport:
        left, right = (self.store.read(str(p)) for p in unit)
        noise = torch.randn(self.rows, WIDTH).numpy().astype(np.float64)
        left, right = 0.9 * left + 0.1 * right + 0.01 * noise, 0.9 * right + 0.1 * left
        self.store.write(str(unit[0]), left)
        self.store.write(str(unit[1]), right)
        return StepReport(float(np.square(left - right).mean()), self.rows, self.rows)

    def state(self) -> State:
        return {"entities": Rows(self.store)}


class TwoPhases(GradientTask):
    """Two models, two optimisers: units 0 1 2 teach the first, 3 4 5 teach the second to copy it, and so on."""

    def __init__(self, num_units: int = 12, *, sharded: bool = False) -> None:
        self.num_units = num_units
        teacher, student = network(1), network(2, width=5)
        if sharded:
            fully_shard(teacher)
            fully_shard(student)
        optimizers = {
            "teacher": torch.optim.AdamW(teacher.parameters(), lr=1e-2),
            "student": torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9),
        }
        super().__init__({"teacher": teacher, "student": student}, optimizers)

    def units(self, cursor: Cursor) -> Iterator[Unit]:
        while cursor.units < self.num_units:
            phase = cursor.units // 3 % 2
            yield Unit(cursor, 8, batches(11, cursor.tokens, 8, 1, mesh.rank(), mesh.world_size(), phase))
            cursor = cursor.after(8)

    def loss_sum(self, batch: Batch) -> Tensor:
        if batch.phase == 0:
            return (self.modules["teacher"](batch.inputs) - batch.targets).square().sum()
        with torch.no_grad():
            wanted = self.modules["teacher"](batch.inputs)
        return (self.modules["student"](batch.inputs) - wanted).square().sum()


def make(kind: str, run: str, num_units: int) -> Task:
    if kind == "table":
        return Table(run, num_units)
    if kind == "phases":
        return TwoPhases(num_units, sharded=mesh.world_size() > 1)
    return Regression(num_units, sharded=True, dropout=0.0 if kind == "plain" else 0.1)


def train(kind: str, run: str, num_units: str = "12", every: str = "2", crash: str = "", delay: str = "0") -> None:
    """Run a toy task to its end; words only, so that a launcher can call it. crash: see `arm`."""
    torch.set_num_threads(1)
    config = LoopConfig(
        run=RunConfig(seed=1, device="cpu", tensorboard=False),
        checkpoint=CheckpointConfig(every=int(every)),
        eval=EvalConfig(every=5),
    )
    with mesh.open_mesh(config.run, MeshConfig()):
        task = make(kind, run, int(num_units))
        if crash and mesh.rank() == int(crash.split(":")[2]):
            arm(task, *crash.split(":")[:2])
        slow_down(task, float(delay))
        Run(task, run, config).go()


def slow_down(task: Task, seconds: float) -> None:
    step = task.step

    def slow(unit: object) -> StepReport:
        time.sleep(seconds)
        return step(unit)

    task.step = slow


def arm(task: Task, where: str, when: str) -> None:
    """SIGKILL this process at the `when`-th call: of step, of os.fsync, or just before or after an os.replace."""
    if where == "step":
        task.step = _fatal(task.step, int(when), before=True)
    else:
        name, _, side = where.partition("-")
        setattr(os, name, _fatal(getattr(os, name), int(when), before=side != "after"))


def _fatal(act: object, when: int, before: bool) -> object:
    calls = 0

    def acting(*words: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if before and calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act(*words, **named)
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return acting
