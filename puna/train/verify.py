"""Whether the checkpoints of a run are as they were written."""

import math
from pathlib import Path
from typing import Any

from puna.console import bar
from puna.errors import CheckpointError
from puna.train.manifest import complete_steps, damages, find_step, folder_of, incomplete, read_manifest


def verify_run(run: Path, step: int | None = None) -> dict[str, Any]:
    """Read and hash every file of every checkpoint (or that of `step`). Shows a bar; the run may be at work meanwhile.

    Returns run, ok, checkpoints (each with step, ok, bytes, num_files, damaged: what is wrong with which file) and
    incomplete (folders of saves that were cut short). Raises CheckpointError where there is nothing to verify.
    """
    newest = find_step(run, step)
    steps = complete_steps(run) if step is None else [newest]
    told = [figures for each in steps if (figures := _verify(run, each))]
    return {
        "run": str(run),
        "ok": all(each["ok"] for each in told),
        "checkpoints": told,
        "incomplete": [folder.name for folder in incomplete(run)],
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures of `verify_run`, a line a checkpoint and a line a damaged file."""
    shown = []
    for each in figures["checkpoints"]:
        verdict = "ok" if each["ok"] else "DAMAGED"
        shown.append(f"step {each['step']:,}  {verdict}  {each['num_files']} files, {each['bytes']:,} bytes")
        shown += [f"    {problem}" for problem in each["damaged"]]
    return shown + [f"{name}  incomplete: a save was cut short; it is passed over" for name in figures["incomplete"]]


def _verify(run: Path, step: int) -> dict[str, Any] | None:
    """One checkpoint; None where the run has dropped it meanwhile."""
    problems, num_files, num_bytes = [], 0, 0
    try:
        manifest = read_manifest(run, step)
        num_bytes = manifest.num_bytes
        with bar() as progress:
            task = progress.add_task(f"step {step:,}", total=num_bytes)
            for size, damage in damages(run, manifest, hash_up_to=math.inf):
                num_files += 1
                problems += [damage.problem] if damage else []
                progress.advance(task, size)
    except CheckpointError as error:
        problems.append(error.problem)
    if problems and not (folder_of(run, step) / "manifest.json").exists():
        return None
    return {"step": step, "ok": not problems, "bytes": num_bytes, "num_files": num_files, "damaged": problems}
