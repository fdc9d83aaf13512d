"""A run returns to a checkpoint: what is on disk is changed first, so that a resume comes to the same.

Newer checkpoints are dropped, the newest first; then the manifest of the one that is returned to is replaced, with a
cursor that passes over the data since then and with what the controller knows of the return. A kill on the way leaves a
run that resumes from before the trouble, comes to it again and returns again: the same steps, and the same end.
"""

from dataclasses import replace
from pathlib import Path

from puna.errors import Diverged
from puna.train import mesh
from puna.train.checkpoint import everywhere, remove
from puna.train.controller import Controller, Target
from puna.train.manifest import Manifest, complete_steps, folder_of, read_manifest, write_manifest
from puna.train.task import Cursor, Setback


def roll_back(
    run: Path, controller: Controller, setback: Setback, cursor: Cursor, tokens: int
) -> tuple[Manifest, Target]:
    """Make the run's newest checkpoint the one from before a setback; its manifest. Every rank calls it.

    cursor: after the step that ended in the setback, of `tokens` tokens. The data that was read since the checkpoint is
    passed over, and as much more as `Controller.passes` says. Raises Diverged where there is no checkpoint to
    return to, CheckpointError where one could not be changed.
    """
    target = mesh.from_rank_0(controller.target(complete_steps(run), setback.onset, cursor.units))
    if target is None:
        raise Diverged(
            f"step {cursor.units}: {setback.reason}; there is no checkpoint from before step {setback.onset}"
        )
    position = cursor.position + controller.passes(setback.onset, cursor.units) * tokens
    problem = f"the run could not return to the checkpoint of step {target.step}"
    everywhere(
        None, problem, lambda: _edit(run, controller, setback, cursor, target, position) if mesh.rank() == 0 else None
    )
    return read_manifest(run, target.step), target


def _edit(run: Path, controller: Controller, setback: Setback, cursor: Cursor, target: Target, position: int) -> None:
    for step in reversed(complete_steps(run)):
        if step > target.step:
            remove(folder_of(run, step))
    manifest = read_manifest(run, target.step)
    numbers = controller.returned(manifest.json.get("controller"), target.step, setback.onset, cursor.units)
    passed = replace(manifest.cursor, skipped=position - manifest.cursor.tokens)
    changed = replace(manifest, cursor=passed, json=manifest.json | {"controller": numbers})
    write_manifest(folder_of(run, target.step), changed)
