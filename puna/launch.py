"""One recipe on many machines: by torchrun, by Slurm, by Ray. What runs is the same `puna train` in every rank."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.errors import RecipeError
from puna.recipe import Loaded
from puna.train.slurm import Job, script
from puna.train.torchrun import PORT, Meeting, flags_of_this_node, torchrun


def by_torchrun(loaded: Loaded, num_nodes: int, endpoint: str, dry_run: bool) -> dict[str, Any]:
    """Become torchrun on this machine; the same command on the other ones joins it. Returns `lines` in a dry run.

    Raises RecipeError where several machines have no place to meet.
    """
    meeting = _meeting(endpoint, num_nodes)
    if dry_run:
        return {"lines": _lines(_line(loaded, num_nodes, meeting), num_nodes)}
    line = _line(loaded, num_nodes, meeting, flags_of_this_node(meeting) if meeting else ())
    _freeze(loaded)
    os.execv(line[0], line)


def by_slurm(loaded: Loaded, job: Job, dry_run: bool) -> dict[str, Any]:
    """Write RUN/launch/train.sbatch beside a copy of the recipe. Returns script, submit, lines; a dry run: lines."""
    config = loaded.recipe.run
    run, words = Path(config.dir), _words(loaded)
    text = script(words, run, job, config.num_processes, config.max_restarts, Path.cwd())
    lines = {"lines": _lines(_line(loaded, job.num_nodes, Meeting("node-1", name="0")), job.num_nodes)}
    if dry_run:
        return lines
    path = _freeze(loaded).with_name("train.sbatch")
    (run / "logs").mkdir(exist_ok=True)  # Slurm does not make it, and says nothing
    path.write_text(text, encoding="utf-8")
    return {"script": str(path), "submit": shlex.join(["sbatch", str(path)]), **lines}


def by_ray(loaded: Loaded, num_nodes: int, address: str, dry_run: bool) -> dict[str, Any]:
    """Train on Ray actors and return what `puna train` does; a dry run returns `lines`, one for each rank."""
    config = loaded.recipe.run
    num_ranks = num_nodes * config.num_processes
    if dry_run:
        return {"lines": [f"rank {rank}: puna.run:work {config.dir}" for rank in range(num_ranks)]}
    from puna.run import outcome, prepare
    from puna.train.mesh import choose_device
    from puna.train.ray_actors import launch_actors

    run = Path(config.dir)
    prepare(loaded, run)
    gpus = int(choose_device(config.device).type == "cuda")
    launch_actors("puna.run:work", [str(run)], num_ranks, run, gpus, address)
    return outcome(run)


def _line(loaded: Loaded, num_nodes: int, meeting: Meeting | None, of_node: Sequence[str] = ()) -> list[str]:
    config = loaded.recipe.run
    return torchrun(
        _words(loaded),
        num_processes=config.num_processes,
        num_nodes=num_nodes,
        meeting=meeting,
        max_restarts=config.max_restarts,
        of_node=of_node,
    )


def _lines(line: list[str], num_nodes: int) -> list[str]:
    return [f"node-{node}: {shlex.join(line)}" for node in range(1, num_nodes + 1)]


def _words(loaded: Loaded) -> list[str]:
    return ["train", str(Path(loaded.recipe.run.dir) / "launch" / "recipe.toml")]


def _freeze(loaded: Loaded) -> Path:
    """Write the resolved recipe where the ranks read it, so that what is changed later does not reach them."""
    path = Path(_words(loaded)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"recipe.{os.getpid()}.tmp")
    temporary.write_text(loaded.text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _meeting(endpoint: str, num_nodes: int) -> Meeting | None:
    if not endpoint:
        if num_nodes > 1:
            raise RecipeError(
                f"{num_nodes} machines have no place to meet",
                "Give --endpoint HOST:PORT, a machine of the run and a free port on it; the same on every machine.",
            )
        return None
    host, _, port = endpoint.partition(":")
    if not host or not (port or str(PORT)).isdigit():
        raise RecipeError(f"--endpoint {endpoint!r} is not HOST:PORT", f"Write for instance node1:{PORT}.")
    return Meeting(host, int(port or PORT))
