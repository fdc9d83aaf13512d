"""What a resume would do, told without doing it."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.train.checkpoint import HASHED_BYTES, latest, verify
from puna.train.manifest import Manifest, complete_steps, folder_of, incomplete
from puna.train.metrics import last_steps, read_events


def explain(run: Path, num_processes: int, seed: int, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What `puna resume` takes over, from the newest checkpoint's manifest and the run's records; loads no tensor.

    num_processes: of the resume; torchrun's WORLD_SIZE goes before. changed: settings that it changes, (before, now).
    Returns run, checkpoint (None: the run starts from its beginning), cursor, data, restored, resharded, reset, redone,
    passed_over, changed. Raises CheckpointError where the checkpoint is damaged.
    """
    world_size = int(os.environ.get("WORLD_SIZE", num_processes))
    manifest = latest(run)
    if manifest is None:
        return {"run": str(run), "checkpoint": None, "passed_over": [path.name for path in incomplete(run)]}
    verify(run, manifest.cursor.units, hash_up_to=HASHED_BYTES)
    events = read_events(run)
    step = manifest.cursor.units
    return {
        "run": str(run),
        "checkpoint": str(folder_of(run, step)),
        "older_checkpoints": complete_steps(run)[:-1],
        "cursor": {"step": step, "tokens": manifest.cursor.tokens},
        "data": _data(manifest.cursor.position, seed, events),
        "restored": {name: _content(manifest, name) for name in manifest.states},
        "resharded": _resharded(manifest, world_size),
        "reset": _reset(manifest, world_size),
        "redone": _redone(step, events),
        "passed_over": [path.name for path in incomplete(run)],
        "changed": {key: {"before": before, "now": now} for key, (before, now) in changed.items()},
    }


def lines(told: dict[str, Any]) -> list[str]:
    """What `explain` returns, in sentences."""
    skipped = [f"passed over  {name}: a save was cut short" for name in told["passed_over"]]
    if told["checkpoint"] is None:
        return [f"{told['run']} has no complete checkpoint: the run starts from its beginning", *skipped]
    cursor, redone = told["cursor"], told["redone"]
    shown = [f"checkpoint   {told['checkpoint']}"]
    shown += [f"cursor       step {cursor['step']:,}, {cursor['tokens']:,} tokens", f"data         {told['data']}"]
    shown += [f"restored     {name}: {content}" for name, content in told["restored"].items()]
    shown += [f"resharded    {name}: {how}" for name, how in told["resharded"].items()]
    shown += [f"reset        {name}: {why}" for name, why in told["reset"].items()]
    shown += [f"changed      {key}: {value['before']} -> {value['now']}" for key, value in told["changed"].items()]
    if redone["steps"]:
        shown.append(f"redone       {redone['steps']:,} steps after the checkpoint ({redone['seconds']:,.1f} s)")
    return shown + skipped


def _content(manifest: Manifest, name: str) -> str:
    """What the checkpoint holds of a state, counted."""
    if name in manifest.json:
        return "in the manifest"
    if name in manifest.rows:
        table = manifest.rows[name].values()
        return f"{len(table)} partitions, {sum(entry['bytes'] for entry in table):,} bytes"
    shapes = [shape for key, shape in manifest.tensors.items() if key.split(".")[0] == name]
    return f"{len(shapes)} tensors, {sum(map(math.prod, shapes)):,} numbers"


def _resharded(manifest: Manifest, world_size: int) -> dict[str, str]:
    if world_size == manifest.world_size:
        return {}
    names = dict.fromkeys(key.split(".")[0] for key in manifest.tensors)
    return dict.fromkeys(names, f"from {manifest.world_size} to {world_size} ranks, cut anew")


def _reset(manifest: Manifest, world_size: int) -> dict[str, str]:
    draws = "a step seeds them from (seed, step, rank), so the same numbers are drawn"
    if world_size != manifest.world_size:
        draws += f" per rank; with {world_size} instead of {manifest.world_size} ranks, dropout falls elsewhere"
    return {
        "random generators": draws,
        "learning rates": "not saved; a function of the recipe and the tokens consumed",
        "data readers": "not saved; the order is a function of the seed and the sample index",
        "rates and peak memory": "measured anew",
    }


def _data(tokens: int, seed: int, events: list[dict[str, Any]]) -> str:
    """Where the run stands in its data."""
    sizes = [event["num_train_tokens"] for event in events if event.get("num_train_tokens")]
    if not sizes:
        return f"{tokens:,} tokens into the order of seed {seed}"
    epoch, place = divmod(tokens, sizes[-1])
    return f"{tokens:,} tokens into the order of seed {seed}: pass {epoch + 1}, {place / sizes[-1]:.1%} through"


def _redone(step: int, events: list[dict[str, Any]]) -> dict[str, float]:
    lost = [event for number, event in last_steps(events).items() if number > step]
    return {"steps": len(lost), "seconds": round(sum(event["step_s"] + event["data_wait_s"] for event in lost), 3)}
