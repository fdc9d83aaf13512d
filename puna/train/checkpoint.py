"""Checkpoints: one manifest over two stores. A checkpoint exists once its manifest.json has its name, and not before.

RUN/checkpoints/step-00000100/{tensors/ (torch DCP), manifest.json}; it names the row partitions, which are in RUN/rows.
"""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

import puna
from puna.errors import CheckpointError, RunLocked
from puna.train import mesh
from puna.train.rows import newest
from puna.train.task import Cursor, Json, Rows, State, Tensors, module_tensors

FORMAT_VERSION = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # from a version to the next one
HASHED_BYTES = 1 << 20  # files up to this size are hashed; larger ones are known by their size
METADATA = "torch.distributed.checkpoint.metadata"
DTYPE_NAMES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
LOCK_SECONDS = 2.0  # a killed process may take this long to leave


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint holds."""

    format_version: int
    cursor: Cursor
    world_size: int
    json: dict[str, Any]
    tensors: dict[str, list[int]]  # shape of every tensor, by "STATE.NAME"
    rows: dict[str, dict[str, dict[str, Any]]]  # state -> partition -> file, bytes, sha256
    files: dict[str, dict[str, Any]]  # path in the checkpoint's folder -> bytes, and sha256 of small ones
    versions: dict[str, str]
    time: float

    @property
    def num_bytes(self) -> int:
        """On disk, row partitions included."""
        rows = sum(entry["bytes"] for table in self.rows.values() for entry in table.values())
        return rows + sum(entry["bytes"] for entry in self.files.values())


def save(run: Path, state: State, cursor: Cursor, keep: int) -> Manifest:
    """Write a checkpoint aside, commit it, drop all but the newest `keep` and that of step 0. Every rank calls it."""
    folder = _folder(run, cursor.units)
    tables = {name: item.store for name, item in state.items() if isinstance(item, Rows)}
    snapshots = mesh.gather({name: store.snapshot() for name, store in tables.items()})
    rows = {name: newest(snapshot[name] for snapshot in snapshots) for name in tables}
    for name, store in tables.items():
        store.restore(rows[name])
    if mesh.rank() == 0:
        for path in incomplete(run):
            shutil.rmtree(path)
        (folder / "tensors").mkdir(parents=True)
    mesh.barrier()
    tensors = _flat(state)
    if tensors:
        _quietly(dcp.save, tensors, storage_writer=dcp.FileSystemWriter(folder / "tensors"))
    mesh.barrier()
    manifest = None
    if mesh.rank() == 0:
        manifest = _manifest(folder, state, cursor, tensors, rows)
        _commit(folder, manifest)
        _prune(run, keep)
        _sweep_rows(run, tables)
    return mesh.from_rank_0(manifest)


def latest(run: Path) -> Manifest | None:
    """The newest complete checkpoint's manifest, or None."""
    steps = complete_steps(run)
    return read_manifest(run, steps[-1]) if steps else None


def load(run: Path, state: State, step: int | None = None) -> Manifest:
    """Restore every state, resharded to the processes there are now; the newest checkpoint, or that of `step`.

    Raises CheckpointError where the checkpoint is missing or damaged or does not fit the state. Every rank calls it.
    """
    manifest = read_manifest(run, step)
    held = {"json": manifest.json, "rows": manifest.rows}
    for kind, names in held.items():
        wanted = {name for name, item in state.items() if isinstance(item, Json if kind == "json" else Rows)}
        if wanted != set(names):
            raise _other_state(run, manifest, wanted ^ set(names))
    for name, item in state.items():
        if isinstance(item, Json):
            item.set(manifest.json[name])
        elif isinstance(item, Rows):
            item.store.restore(manifest.rows[name])
    _load_tensors(run, manifest, _flat(state), "")
    for item in state.values():
        if isinstance(item, Tensors):
            item.set(item.get())
    return manifest


def load_module(run: Path, module: nn.Module, step: int | None = None, name: str = "model") -> Manifest:
    """Fill one module in place, in a single process or over the mesh that it is sharded on.

    name: its state in the checkpoint, such as "model", or "average.model" for averaged weights. Raises CheckpointError.
    """
    manifest = read_manifest(run, step)
    if not any(key.startswith(f"{name}.") for key in manifest.tensors):
        raise _other_state(run, manifest, {name})
    tensors = {f"{name}.{key}": tensor for key, tensor in module_tensors(module).items()}
    _load_tensors(run, manifest, tensors, f"{name}.")
    return manifest


def complete_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that have a manifest, oldest first."""
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in _checkpoints(run).glob("step-*/manifest.json")
    )


def incomplete(run: Path) -> list[Path]:
    """Folders of saves that were cut short (or of checkpoints whose removal was)."""
    return sorted(path for path in _checkpoints(run).glob("step-*") if not (path / "manifest.json").exists())


def read_manifest(run: Path, step: int | None = None) -> Manifest:
    """The manifest of `step` (None: the newest), migrated to this version, files checked. Raises CheckpointError."""
    steps = complete_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{_checkpoints(run)} has {wanted}", f"Steps that are there: {there}.")
    folder = _folder(run, steps[-1] if step is None else step)
    path = folder / "manifest.json"
    try:
        manifest = _parse(_migrated(json.loads(path.read_text(encoding="utf-8")), path))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}", "Remove that folder to use an older checkpoint."
        ) from error
    _check_files(folder, manifest)
    return manifest


def verify(run: Path, step: int | None = None) -> Manifest:
    """Hash every file that has a hash, row partitions too. Raises CheckpointError naming the first damaged one."""
    manifest = read_manifest(run, step)
    for name, table in manifest.rows.items():
        for entry in table.values():
            _check_file(run / "rows" / name / entry["file"], entry, hashed=True)
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


def _checkpoints(run: Path) -> Path:
    return Path(run) / "checkpoints"


def _folder(run: Path, step: int) -> Path:
    return _checkpoints(run) / f"step-{step:08d}"


def _flat(state: State) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, item in state.items()
        if isinstance(item, Tensors)
        for key, tensor in item.get().items()
    }


def _quietly(act: Callable[..., Any], *words: Any, **named: Any) -> None:
    """DCP without a process group, which it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        act(*words, no_dist=not dist.is_initialized(), **named)


def _manifest(
    folder: Path, state: State, cursor: Cursor, tensors: dict[str, Tensor], rows: dict[str, dict[str, dict[str, Any]]]
) -> Manifest:
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return Manifest(
        format_version=FORMAT_VERSION,
        cursor=cursor,
        world_size=mesh.world_size(),
        json={name: item.get() for name, item in state.items() if isinstance(item, Json)},
        tensors={key: list(tensor.shape) for key, tensor in tensors.items()},
        rows=rows,
        files=files,
        versions={"puna": puna.__version__, "torch": torch.__version__},
        time=round(time.time(), 3),
    )


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": _sha256(path)} if size <= HASHED_BYTES else {})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(folder: Path, manifest: Manifest) -> None:
    """DCP has synced its files; sync the folders, then let the manifest appear under its name."""
    _sync_folder(folder / "tensors")
    temporary = folder / "manifest.json.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)
    _sync_folder(folder.parent)
    os.replace(temporary, folder / "manifest.json")
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(run: Path, keep: int) -> None:
    steps = [step for step in complete_steps(run) if step]
    for step in steps[:-keep]:
        folder = _folder(run, step)
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)


def _sweep_rows(run: Path, tables: dict[str, Any]) -> None:
    """Drop partition files that no checkpoint names any more."""
    manifests = [read_manifest(run, step) for step in complete_steps(run)] if tables else []
    for name, store in tables.items():
        store.sweep(entry["file"] for manifest in manifests for entry in manifest.rows.get(name, {}).values())


def _migrated(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    version = raw["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this Puna ({puna.__version__}) reads up to {FORMAT_VERSION}",
            f"Use the Puna that wrote it ({raw.get('versions', {}).get('puna', 'a newer one')}) or newer.",
        )
    while version < FORMAT_VERSION:
        raw, version = MIGRATIONS[version](raw), version + 1
    return raw | {"format_version": FORMAT_VERSION}


def _parse(raw: dict[str, Any]) -> Manifest:
    return Manifest(**(raw | {"cursor": Cursor(**raw["cursor"])}))


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry, hashed="sha256" in entry)


def _check_file(path: Path, entry: dict[str, Any], *, hashed: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    fix = "The checkpoint is damaged; remove its folder to use an older one."
    if size != entry["bytes"]:
        found = "is missing" if size is None else f"has {size}"
        raise CheckpointError(f"{path} should have {entry['bytes']} bytes and {found}", fix)
    if hashed and _sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} has other contents than were saved (SHA-256 differs)", fix)


def _load_tensors(run: Path, manifest: Manifest, tensors: dict[str, Tensor], prefix: str) -> None:
    """In place; `tensors` and what the checkpoint holds under `prefix` must have the same names and shapes."""
    folder = _folder(run, manifest.cursor.units)
    held = {key: shape for key, shape in manifest.tensors.items() if key.startswith(prefix)}
    fix = "Use the recipe that the checkpoint was made with, or another run directory."
    for key, tensor in tensors.items():
        if key not in held:
            there = ", ".join(sorted(held)[:4])
            raise CheckpointError(f"{folder} has no tensor {key}; it has {len(held)}, such as {there}", fix)
        if held[key] != list(tensor.shape):
            raise CheckpointError(f"{folder} holds {key} as {held[key]}, but here it is {list(tensor.shape)}", fix)
    if extra := sorted(held.keys() - tensors.keys()):
        raise CheckpointError(f"{folder} holds {extra[0]} ({len(extra)} such), which has no place here", fix)
    if tensors:
        _quietly(dcp.load, tensors, storage_reader=_Reader(folder / "tensors"))


def _other_state(run: Path, manifest: Manifest, names: set[str]) -> CheckpointError:
    states = sorted({*(key.split(".")[0] for key in manifest.tensors), *manifest.json, *manifest.rows})
    return CheckpointError(
        f"{_folder(run, manifest.cursor.units)} and this task do not both have {', '.join(sorted(names))}; "
        f"the checkpoint holds {', '.join(states)}",
        "Use the recipe that the checkpoint was made with, or another run directory.",
    )


class _Reader(dcp.FileSystemReader):
    """DCP's reader, whose index is a pickle: this one builds only what an index is made of. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self._index: Metadata = _IndexUnpickler(file).load()

    def read_metadata(self, *words: Any, **named: Any) -> Metadata:
        """The index, read before DCP could wrap what is wrong with it."""
        assert self._index.storage_meta is not None
        self._index.storage_meta.load_id = self.load_id
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        {
            *((METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex")),
            *((METADATA, name) for name in ("ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (module == "torch" and name in DTYPE_NAMES):
            return super().find_class(module, name)
        raise CheckpointError(f"the index of a checkpoint asks for {module}.{name}", "Do not load this checkpoint.")
