"""Going on with a run by its own recipe, and saying beforehand what that comes to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna import recipe as recipes
from puna.errors import CheckpointError
from puna.recipe import Loaded
from puna.run import refuse_other_run, train
from puna.train import explain as explanation


def resume(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train by the run's own recipe, in this folder wherever it was moved to. As `puna.run.train`."""
    return train(recipe_of(run, overrides))


def explain(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `resume` would do with the same overrides; as `puna.train.explain.explain`. Trains nothing.

    Raises RecipeError where an override would compute something else, CheckpointError where a checkpoint is damaged.
    """
    loaded, own = recipe_of(run, overrides), recipe_of(run)
    refuse_other_run(loaded, run)
    before, now = recipes.flat(own.recipe), recipes.flat(loaded.recipe)
    changed = {key: (before[key], value) for key, value in now.items() if before[key] != value}
    return explanation.explain(run, loaded.recipe.run.num_processes, loaded.recipe.run.seed, changed)


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Loaded:
    """A run's own recipe with overrides laid over it. Raises CheckpointError where `run` holds no run."""
    path = run / "recipe.toml"
    if not path.is_file():
        raise CheckpointError(f"{run} holds no run: there is no {path}", "Give a folder that `puna train` has written.")
    return recipes.load(path, [*overrides, "--run.dir", str(run)])
