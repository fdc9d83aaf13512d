"""A toy run under the controller, with faults that can be planted in its data and in its gradients."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from puna.train import mesh
from puna.train.actions import Limits
from puna.train.config import CheckpointConfig, EvalConfig, HealthConfig, LoopConfig, MeshConfig, RunConfig
from puna.train.loop import Run
from puna.train.optim import Average
from puna.train.sharding import local
from puna.train.task import Cursor, GradientTask

TOKENS = 16
LIMITS = Limits(
    good_after=20,
    margin=5,
    min_losses=20,
    wait=8,
    slope_steps=3,
    rate_steps=20,
    ramp_steps=10,
    again_steps=200,
    min_age=5,
)
"""The controller's, for runs of a hundred steps."""

STALLED = ("model.0.weight", "model.0.bias")


class Guarded(GradientTask):
    """Regression with faults: `nan` and `wild` name data by position (in units of TOKENS), `stall` steps.

    nan: units whose targets are not finite. wild: units whose targets are far off. stall: (first, last + 1) step in
    which the gradients of STALLED are made tiny.
    """

    def __init__(
        self,
        num_units: int = 80,
        *,
        sharded: bool = False,
        nan: tuple[int, ...] = (),
        wild: tuple[int, ...] = (),
        stall: tuple[int, int] = (0, 0),
        act: bool = True,
        lr: float = 1e-2,
        limits: Limits = LIMITS,
        clip: float = 1.0,
        **settings: Any,
    ) -> None:
        self.num_units, self.nan, self.wild, self.stall = num_units, nan, wild, stall
        self.read: list[int] = []  # positions of the units that were made
        model = toys.network(3, dropout=0.0)
        if sharded:
            fully_shard(model[0])
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999))
        super().__init__(
            {"model": model},
            {"adamw": optimizer},
            clip=clip,
            average=Average({"model": model}, "mean"),
            health=HealthConfig(act=act, record_every=10),
            limits=limits,
            **settings,
        )

    def units(self, cursor: Cursor) -> Iterator[toys.Unit]:
        while cursor.tokens < TOKENS * self.num_units:
            self.read.append(cursor.position // TOKENS)
            parts = toys.batches(3, cursor.position, TOKENS, 1, mesh.rank(), mesh.world_size())
            yield toys.Unit(cursor, TOKENS, parts)
            cursor = cursor.after(TOKENS)

    def step(self, unit: toys.Unit) -> Any:
        self.unit = unit
        return super().step(unit)

    def loss_sum(self, batch: toys.Batch) -> Tensor:
        place = self.unit.cursor.position // TOKENS
        targets = batch.targets * (math.nan if place in self.nan else 1.0) + (60.0 if place in self.wild else 0.0)
        return (self.modules["model"](batch.inputs) - targets).square().sum()

    def accumulate(self, unit: toys.Unit, factor: float) -> list[Tensor]:
        losses = super().accumulate(unit, factor)
        if self.stall[0] <= unit.cursor.units + 1 < self.stall[1]:
            for p, name in self._names.items():
                if name in STALLED:
                    local(p.grad).mul_(1e-7)
        return losses

    def describe(self) -> dict[str, Any]:
        return {"total_tokens": TOKENS * self.num_units}


def config(every: int = 10, **more: Any) -> LoopConfig:
    return LoopConfig(
        run=RunConfig(seed=1, device="cpu", tensorboard=False),
        checkpoint=CheckpointConfig(every=every, **more),
        eval=EvalConfig(tokens=0),
    )


def weights(task: GradientTask) -> list[float]:
    """All weights and moments, whole."""
    tensors = list(task.modules["model"].parameters())
    states = [tensor for p in tensors for tensor in task.optimizers["adamw"].state[p].values()]
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in [*tensors, *states]]
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in whole]).tolist()


def run(folder: Path | str, task: GradientTask, **more: Any) -> GradientTask:
    Run(task, folder, config(**more)).go()
    return task


def train(folder: str, num_units: str, kind: str, size: str) -> None:
    """Words only, so that a launcher can call it."""
    torch.set_num_threads(1)
    with mesh.open_mesh(RunConfig(dir=folder, device="cpu"), MeshConfig()):
        run(folder, Guarded(int(num_units), sharded=int(size) > 1, **FAULTS[kind]))


FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "nan": {"nan": (45,)},
    "wild": {"wild": tuple(range(45, 54))},
    "stall": {"stall": (1, 31), "lr": 3e-2},
    "frozen": {"stall": (1, 80), "limits": replace(LIMITS, stall_steps=20)},
}
