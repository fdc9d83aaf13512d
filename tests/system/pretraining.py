"""Real pretraining runs in processes that can be killed."""

import sys
from pathlib import Path

from processes import context, finish, start

from puna.recipe import load
from puna.train.metrics import last_steps, read_events

context.set_forkserver_preload(["puna.run", "torch.distributed.fsdp", "torch._dynamo"])


def prepare(run: Path, shards: Path, *overrides: str) -> None:
    """A run directory of the recipe `tiny`."""
    from puna.run import prepare

    prepare(load("tiny", ["--run.dir", str(run), "--data.path", str(shards), *overrides]), run)


def work(run: str) -> None:
    """What every rank does."""
    from puna.run import work

    work(run)


def command(*words: str) -> None:
    """The command line."""
    from puna import cli

    sys.argv = ["puna", *words]
    cli.main()


def train(run: Path, shards: Path, *overrides: str, size: int = 1) -> list[int | None]:
    """Exit codes by rank."""
    prepare(run, shards, *overrides)
    return finish(start(work, str(run), size=size, folder=run.parent))


def losses(run: Path) -> list[float]:
    """Of every step, the one that counts where a step was done twice."""
    steps = last_steps(read_events(run))
    assert list(steps) == list(range(1, len(steps) + 1))
    return [steps[step]["loss"] for step in steps]
