"""Checkpoints: one manifest over two stores. A checkpoint exists once its manifest.json has its name, and not before.

RUN/checkpoints/step-00000100/{tensors/ (torch DCP), manifest.json}; it names the row partitions, which are in RUN/rows.
A save is two acts: `take_snapshot` between two steps, then `write`, at once or while training goes on.
"""

import copy
import errno
import fcntl
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import puna
from puna.errors import CheckpointError, DiskFull, RunLocked
from puna.train import mesh
from puna.train.config import CheckpointConfig
from puna.train.manifest import (
    FORMAT_VERSION,
    Manifest,
    complete_steps,
    damages,
    folder_of,
    incomplete,
    read_manifest,
    sync_folder,
    write_manifest,
)
from puna.train.rows import RowStore, newest
from puna.train.task import ASIDE, Cursor, Json, Rows, State, Tensors, module_tensors
from puna.train.tensor_files import read_tensors, write_tensors

T = TypeVar("T")

HASHED_BYTES = 1 << 20  # a load hashes files up to this size, and knows larger ones by their size; verify hashes all
LOCK_SECONDS = 2.0  # a killed process may take this long to leave
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RECORD_BYTES, INDEX_BYTES = 4096, 1 << 20  # more than DCP adds: around each tensor on each rank, and once


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, and nothing that training changes."""

    cursor: Cursor
    heldout_loss: float | None
    tensors: dict[str, Tensor]
    json: dict[str, Any]
    stores: dict[str, RowStore]
    rows: dict[str, dict[str, dict[str, Any]]]
    superseded: dict[str, set[str]]  # row files on disk that this checkpoint does not name


def take_snapshot(state: State, cursor: Cursor, heldout_loss: float | None = None, *, copied: bool = False) -> Snapshot:
    """The state between two steps. Every rank calls it.

    copied: tensors in host memory, so that training may go on; otherwise they are the live ones. Row partitions are
    files that nobody changes, and need no copy.
    """
    stores = {name: item.store for name, item in state.items() if isinstance(item, Rows)}
    found = {name: set(store.files()) for name, store in stores.items()}
    tables = mesh.gather({name: store.snapshot() for name, store in stores.items()})
    rows = {name: newest(table[name] for table in tables) for name in stores}
    for name, store in stores.items():
        store.restore(rows[name])
    tensors = {key: tensor.detach() for key, tensor in _flat(state).items()}
    return Snapshot(
        cursor,
        heldout_loss if heldout_loss is not None and math.isfinite(heldout_loss) else None,
        {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()} if copied else tensors,
        copy.deepcopy({name: item.get() for name, item in state.items() if isinstance(item, Json)}),
        stores,
        rows,
        {name: found[name] - {entry["file"] for entry in rows[name].values()} for name in stores},
    )


def write(
    run: Path,
    snapshot: Snapshot,
    retention: CheckpointConfig,
    group: dist.ProcessGroup | None = None,
    stays: frozenset[int] = frozenset(),
) -> Manifest:
    """Write a checkpoint aside, commit it, then drop what neither `retention` nor `stays` keeps. Every rank calls it.

    group: the process group to do it over, one of its own where the ranks train meanwhile. Raises DiskFull or
    CheckpointError on all ranks where one could not write; what was written is gone then, all else is as it was.
    """
    step = snapshot.cursor.units
    folder = folder_of(run, step)
    together = partial(everywhere, group, f"the checkpoint of step {step} could not be written")
    together(lambda: _make_folder(run, folder) if mesh.rank() == 0 else None)
    try:
        files = together(lambda: write_tensors(folder / "tensors", snapshot.tensors, group))
        manifest = _manifest(snapshot, {f"tensors/{name}": part[name] for part in files for name in sorted(part)})
        together(lambda: _commit(folder, snapshot, manifest) if mesh.rank() == 0 else None)
    except CheckpointError:
        if mesh.rank() == 0:
            remove(folder)
        raise
    dropping = f"the checkpoint of step {step} is written, but older ones could not be dropped"
    everywhere(group, dropping, lambda: _retain(run, snapshot, retention, stays) if mesh.rank() == 0 else None)
    return manifest


def save(run: Path, state: State, cursor: Cursor, keep: int) -> Manifest:
    """Write the state as it is; keep the newest `keep` checkpoints and that of step 0. Every rank calls it."""
    return write(run, take_snapshot(state, cursor), CheckpointConfig(keep=keep))


def needed_bytes(state: State) -> int:
    """Disk that a checkpoint takes at most, over all ranks; row partitions are there already."""
    tensors = _flat(state).values()
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return numbers + RECORD_BYTES * len(tensors) * mesh.world_size() + INDEX_BYTES


def kept(losses: Mapping[int, float | None], retention: CheckpointConfig) -> set[int]:
    """Which of the steps that are there (with their held-out loss) stay: the newest, the best, every n-th, step 0."""
    steps = sorted(losses)
    best = sorted((loss, step) for step, loss in losses.items() if loss is not None)[: int(retention.keep_best)]
    every = [step for step in steps if retention.keep_every and step % retention.keep_every == 0]
    first = [step for step in steps if step == 0]
    return {*[step for step in steps if step][-retention.keep :], *(step for _, step in best), *every, *first}


def latest(run: Path) -> Manifest | None:
    """The newest complete checkpoint's manifest, or None."""
    return read_manifest(run) if complete_steps(run) else None


def load(run: Path, state: State, step: int | None = None) -> Manifest:
    """Restore every state, resharded to the processes there are now; the newest checkpoint, or that of `step`.

    Raises CheckpointError where the checkpoint is missing or damaged or does not fit the state. Every rank calls it.
    """
    manifest = verify(run, step, hash_up_to=HASHED_BYTES)
    state = {name: item for name, item in state.items() if name not in ASIDE or _has(manifest, name, item)}
    held = {"json": manifest.json, "rows": manifest.rows}
    for kind, names in held.items():
        wanted = {name for name, item in state.items() if isinstance(item, Json if kind == "json" else Rows)}
        if others := wanted ^ (names.keys() - (ASIDE - state.keys())):
            raise _other_state(run, manifest, others)
    for name, item in state.items():
        if isinstance(item, Json):
            item.set(manifest.json[name])
        elif isinstance(item, Rows):
            item.store.restore(manifest.rows[name])
    tensors = {name: item.get() for name, item in state.items() if isinstance(item, Tensors)}
    _load_tensors(run, manifest, _named(tensors), "", left=ASIDE - state.keys())
    for name, item in state.items():
        if isinstance(item, Tensors):
            item.set(tensors[name])
    return manifest


def load_module(run: Path, module: nn.Module, step: int | None = None, name: str = "model") -> Manifest:
    """Fill one module in place, in a single process or over the mesh that it is sharded on.

    name: its state in the checkpoint, such as "model", or "average.model" for averaged weights. Raises CheckpointError.
    """
    manifest = verify(run, step, hash_up_to=HASHED_BYTES)
    if not any(key.startswith(f"{name}.") for key in manifest.tensors):
        raise _other_state(run, manifest, {name})
    tensors = {f"{name}.{key}": tensor for key, tensor in module_tensors(module).items()}
    _load_tensors(run, manifest, tensors, f"{name}.")
    return manifest


def verify(run: Path, step: int | None = None, *, hash_up_to: float = math.inf) -> Manifest:
    """Hash every file of a checkpoint (those up to so many bytes). Raises CheckpointError for the first damaged one."""
    manifest = read_manifest(run, step)
    for _, damage in damages(run, manifest, hash_up_to=hash_up_to):
        if damage:
            raise damage
    return manifest


@contextmanager
def hold_lock(run: Path) -> Iterator[None]:
    """Rank 0 holds RUN/lock while inside; all raise RunLocked where another process has it. Every rank calls it."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("a+", encoding="utf-8") as file:
        owner = mesh.from_rank_0(_take_lock(file) if mesh.rank() == 0 else None)
        if owner is not None:
            raise RunLocked(
                f"{run} is in use by {owner}", "Wait for it, stop it, or choose another folder with --run.dir."
            )
        yield


def _take_lock(file: Any) -> str | None:
    """None once the lock is held; who holds it where it does not come free."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            file.seek(0)
            return file.read().strip() or "another process"
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return None


def _flat(state: State) -> dict[str, Tensor]:
    return _named({name: item.get() for name, item in state.items() if isinstance(item, Tensors)})


def _named(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, group in tensors.items() for key, tensor in group.items()}


def everywhere(group: dist.ProcessGroup | None, problem: str, act: Callable[[], T]) -> list[T]:
    """`act` on every rank; its results by rank. What stopped it on one is raised on all, with that rank's number."""
    result: T | None = None
    told: tuple[str, bool] | None = None
    try:
        result = act()
    except Exception as error:
        told = f"{type(error).__name__}: {error}", isinstance(error, OSError) and error.errno in NO_ROOM
    answers: list[Any] = [(result, told)]
    if dist.is_initialized():
        answers *= mesh.world_size()
        dist.all_gather_object(answers, (result, told), group=group)
    failures = {rank: told for rank, (_, told) in enumerate(answers) if told}
    if failures:
        where = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in failures.items())
        full = any(full for _, full in failures.values())
        raise (DiskFull if full else CheckpointError)(
            f"{problem}: {where}",
            f"{'Free space there' if full else 'Mend that'}; what was saved before is as it was, and the same command "
            "resumes from it.",
        )
    return [result for result, _ in answers]


def _make_folder(run: Path, folder: Path) -> None:
    for path in incomplete(run):
        shutil.rmtree(path)
    (folder / "tensors").mkdir(parents=True)


def _manifest(snapshot: Snapshot, files: dict[str, dict[str, Any]]) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        cursor=snapshot.cursor,
        heldout_loss=snapshot.heldout_loss,
        world_size=mesh.world_size(),
        json=snapshot.json,
        tensors={key: list(tensor.shape) for key, tensor in snapshot.tensors.items()},
        rows=snapshot.rows,
        files=files,
        versions={"puna": puna.__version__, "torch": torch.__version__},
        time=round(time.time(), 3),
    )


def _commit(folder: Path, snapshot: Snapshot, manifest: Manifest) -> None:
    """The files are synced; so are then the folders with their names, and last of all the manifest."""
    for store in snapshot.stores.values():
        sync_folder(store.folder)
    sync_folder(folder / "tensors")
    write_manifest(folder, manifest)


def remove(folder: Path) -> None:
    """A checkpoint, or what there is of one; a kill on the way leaves an incomplete one."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _retain(run: Path, snapshot: Snapshot, retention: CheckpointConfig, stays: frozenset[int]) -> None:
    """Drop checkpoints, then the row files that none names any more (but no row file while a manifest is damaged)."""
    steps = complete_steps(run)
    manifests = {step: _undamaged(run, step) for step in steps} if retention.keep_best or snapshot.stores else {}
    losses = {step: manifest.heldout_loss if (manifest := manifests.get(step)) else None for step in steps}
    stay = kept(losses, retention) | (stays & set(steps))
    for step in set(steps) - stay:
        remove(folder_of(run, step))
    staying = [manifest for step in stay if (manifest := manifests.get(step))]
    for name, store in snapshot.stores.items():
        named = {entry["file"] for manifest in staying for entry in manifest.rows.get(name, {}).values()}
        if len(staying) == len(stay):
            store.sweep(snapshot.superseded[name] - named)


def _undamaged(run: Path, step: int) -> Manifest | None:
    try:
        return read_manifest(run, step)
    except CheckpointError:
        return None


def _has(manifest: Manifest, name: str, item: Tensors | Rows | Json) -> bool:
    """Whether a checkpoint has this state, in this shape."""
    if isinstance(item, Tensors):
        held = {key: shape for key, shape in manifest.tensors.items() if key.split(".")[0] == name}
        return held == {f"{name}.{key}": list(tensor.shape) for key, tensor in item.get().items()}
    return name in manifest.json or name in manifest.rows


def _load_tensors(
    run: Path, manifest: Manifest, tensors: dict[str, Tensor], prefix: str, left: Collection[str] = ()
) -> None:
    """In place; `tensors` and what the checkpoint holds under `prefix` must have the same names and shapes.

    left: states of the checkpoint that are left out.
    """
    folder = folder_of(run, manifest.cursor.units)
    wanted = {key: shape for key, shape in manifest.tensors.items() if key.split(".")[0] not in left}
    held = {key: shape for key, shape in wanted.items() if key.startswith(prefix)}
    fix = "Use the recipe that the checkpoint was made with, or another run directory."
    for key, tensor in tensors.items():
        if key not in held:
            there = ", ".join(sorted(held)[:4])
            raise CheckpointError(f"{folder} has no tensor {key}; it has {len(held)}, such as {there}", fix)
        if held[key] != list(tensor.shape):
            raise CheckpointError(f"{folder} holds {key} as {held[key]}, but here it is {list(tensor.shape)}", fix)
    if extra := sorted(held.keys() - tensors.keys()):
        raise CheckpointError(f"{folder} holds {extra[0]} ({len(extra)} such), which has no place here", fix)
    read_tensors(folder / "tensors", tensors)


def _other_state(run: Path, manifest: Manifest, names: set[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder_of(run, manifest.cursor.units)} and this task do not both have {', '.join(sorted(names))}; "
        f"the checkpoint holds {', '.join(sorted(manifest.states))}",
        "Use the recipe that the checkpoint was made with, or another run directory.",
    )
