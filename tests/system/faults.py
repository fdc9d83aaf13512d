"""Runs of a toy task in which rank 1 goes wrong, each in its own way, at the sixth step."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import toys
from processes import context

from puna.errors import DataError
from puna.train import mesh, watchdog
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, MeshConfig, RunConfig
from puna.train.loop import Run

context.set_forkserver_preload(["puna.run", "puna.train.watchdog", "torch.distributed.fsdp", "torch._dynamo", "toys"])

WHEN = 5  # steps that go well


def work(run: str, fault: str, still: str = "5", hang_seconds: str = "0", num_units: str = "10000") -> None:
    """What every rank does; the fault happens once. still: seconds after which a rank is looked at."""
    torch.set_num_threads(1)
    watchdog.STILL_SECONDS = float(still)
    config = LoopConfig(
        run=RunConfig(dir=run, seed=1, device="cpu", tensorboard=False, hang_seconds=float(hang_seconds)),
        checkpoint=CheckpointConfig(every=3),
        eval=EvalConfig(tokens=0),
    )
    with mesh.open_mesh(config.run, MeshConfig()), watchdog.watch(Path(run), config.run):
        task = toys.Regression(int(num_units), sharded=True)
        if fault and mesh.rank() == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            arm(task, fault)
        Run(task, run, config).go()


def arm(task: toys.Regression, fault: str) -> None:
    """Let the task of this rank go wrong once."""
    steps = 0
    step, agree = task.step, mesh.agree

    def faulty(unit: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == WHEN + 1:
            FAULTS[fault]()
        return step(unit)

    def skips(values: list[float], how: str = "sum") -> list[float]:
        """Leaves out the exchange after the step, once."""
        if steps == WHEN + 1 and how == "max":
            return values
        return agree(values, how)

    task.step = faulty
    if fault == "skips":
        mesh.agree = skips


def stop() -> None:
    """As `kill -STOP` does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    """As the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """A defect."""
    raise KeyError("lost")


def give_up() -> None:
    """A mistake that only this rank meets."""
    raise DataError("shard 7 is damaged on this machine", "Copy it again.")


def dawdle() -> None:
    """Waits for a file system, say."""
    time.sleep(60)


def nothing() -> None:
    """The fault is elsewhere."""


FAULTS = {
    "stop": stop,
    "die": die,
    "fail": fail,
    "give up": give_up,
    "dawdle": dawdle,
    "skips": nothing,
    "adds": mesh.barrier,
}


def pretrain(run: str, other: str) -> None:
    """Ranks of a pretraining run by RUN's recipe, but for rank 1, which was given the recipe `other`."""
    from puna.recipe import load
    from puna.run import train_ranks

    recipe = load(other if os.environ["RANK"] == "1" else run).recipe
    train_ranks(recipe.model_copy(update={"run": load(run).recipe.run}), Path(run))
