"""Room on the disk: what the checkpoints of a run will take, and what is free."""

import shutil
from pathlib import Path

from puna.errors import DiskFull
from puna.train.config import CheckpointConfig, ScheduleConfig, TrainConfig

WEIGHT_BYTES, OPTIMIZER_BYTES, AVERAGE_BYTES = 4, 8, 4  # float32; AdamW's two moments (Muon's one is less)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def require_room(run: Path, step: int, needed: int, free: int) -> None:
    """Raise DiskFull unless `needed` of `free` bytes can be written, before anything is."""
    if needed > free:
        raise DiskFull(
            f"no room for the checkpoint of step {step}: it needs {size(needed)} and the disk of {run} has "
            f"{size(free)} free",
            f"Free {size(needed - free)} there; older checkpoints are as they were.",
        )


def require_plan(
    run: Path,
    checkpoint: CheckpointConfig,
    train: TrainConfig,
    schedule: ScheduleConfig,
    num_parameters: int,
    num_there: int,
    num_guarded: int = 0,
) -> None:
    """Raise DiskFull unless the checkpoints that the run will hold at once fit; `num_there` of them are there already.

    While one is written the older ones stay, so there are checkpoint.keep + 1, and those that are kept for good.
    num_guarded: most that the controller keeps.
    """
    each = checkpoint_bytes(train, schedule, num_parameters)
    num_missing = max(1, num_held(checkpoint, train, schedule) + num_guarded - num_there)
    free = free_bytes(run)
    if num_missing * each > free:
        there = f" beside the {num_there} that are there" if num_there else ""
        raise DiskFull(
            f"the checkpoints of {run} do not fit: {num_missing} of {size(each)}{there} need "
            f"{size(num_missing * each)}, and the disk has {size(free)} free",
            f"Free {size(num_missing * each - free)} there, choose another disk with --run.dir, or keep fewer "
            "(checkpoint.keep, checkpoint.keep_every; one more is there while it is written).",
        )


def checkpoint_bytes(train: TrainConfig, schedule: ScheduleConfig, num_parameters: int) -> int:
    """Bytes of one checkpoint: weights, optimiser (exact for AdamW, at most for Muon), averaged weights."""
    average = 0 if schedule.average == "none" else AVERAGE_BYTES
    return num_parameters * (WEIGHT_BYTES + OPTIMIZER_BYTES + average)


def num_held(checkpoint: CheckpointConfig, train: TrainConfig, schedule: ScheduleConfig) -> int:
    """Most checkpoints that a run holds at once, the one that is being written included."""
    num_steps = -(-train.tokens // min([train.batch_tokens, *(tokens for _, tokens in schedule.batch_stages)]))
    newest = min(checkpoint.keep + 1, -(-num_steps // checkpoint.every))
    for_good = num_steps // checkpoint.keep_every if checkpoint.keep_every else 0
    return newest + for_good + checkpoint.keep_best + checkpoint.initial


def size(num_bytes: int) -> str:
    """In GiB, or MiB where it is less."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
