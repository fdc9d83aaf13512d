"""The manifest of a checkpoint: what it holds, under which hashes; which checkpoints of a run are whole."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import puna
from puna.errors import CheckpointError
from puna.train.hashed import sha256_of
from puna.train.task import Cursor

FORMAT_VERSION = 3
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {  # from a version to the next one
    1: lambda raw: raw | {"heldout_loss": None},
    2: lambda raw: raw,  # cursors got `skipped`, 0 unless it is there
}
FIX = "The checkpoint is damaged; remove its folder to use an older one."


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint holds."""

    format_version: int
    cursor: Cursor
    heldout_loss: float | None  # at this step, where it was evaluated
    world_size: int
    json: dict[str, Any]
    tensors: dict[str, list[int]]  # shape of every tensor, by "STATE.NAME"
    rows: dict[str, dict[str, dict[str, Any]]]  # state -> partition -> file, bytes, sha256
    files: dict[str, dict[str, Any]]  # path in the checkpoint's folder -> bytes, sha256
    versions: dict[str, str]
    time: float

    @property
    def num_bytes(self) -> int:
        """On disk, row partitions included."""
        rows = sum(entry["bytes"] for table in self.rows.values() for entry in table.values())
        return rows + sum(entry["bytes"] for entry in self.files.values())

    @property
    def states(self) -> list[str]:
        """Names of the states, tensors first."""
        return list(dict.fromkeys([*(key.split(".")[0] for key in self.tensors), *self.rows, *self.json]))


def checkpoints(run: Path) -> Path:
    """The folder of all checkpoints."""
    return Path(run) / "checkpoints"


def folder_of(run: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return checkpoints(run) / f"step-{step:08d}"


def complete_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that have a manifest, oldest first."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in checkpoints(run).glob("step-*/manifest.json"))


def incomplete(run: Path) -> list[Path]:
    """Folders of saves that were cut short (or of checkpoints whose removal was)."""
    return sorted(path for path in checkpoints(run).glob("step-*") if not (path / "manifest.json").exists())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Let it appear under its name, with a hash of itself; from then on the checkpoint exists."""
    raw = asdict(manifest)
    temporary = folder / "manifest.json.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(raw | {"sha256": _digest(raw)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)
    os.replace(temporary, folder / "manifest.json")
    sync_folder(folder)


def find_step(run: Path, step: int | None = None) -> int:
    """`step`, or the newest one where it is None. Raises CheckpointError where no complete checkpoint is of it."""
    steps = complete_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{checkpoints(run)} has {wanted}", f"Steps that are there: {there}.")
    return steps[-1] if step is None else step


def read_manifest(run: Path, step: int | None = None) -> Manifest:
    """The manifest of `step` (None: the newest), migrated to this version; its files are not looked at.

    Raises CheckpointError: there is none, it is damaged, it is of a newer version.
    """
    path = folder_of(run, find_step(run, step)) / "manifest.json"
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", FIX) from error


def damages(run: Path, manifest: Manifest, *, hash_up_to: float) -> Iterator[tuple[int, CheckpointError | None]]:
    """Bytes of each file of a checkpoint, and what is wrong with it. Files above `hash_up_to` are known by their size.

    hash_up_to: bytes.
    """
    folder = folder_of(run, manifest.cursor.units)
    entries = [(folder / name, entry) for name, entry in manifest.files.items()]
    tables = [(run / "rows" / name, table) for name, table in manifest.rows.items()]
    entries += [(folder / entry["file"], entry) for folder, table in tables for entry in table.values()]
    for path, entry in entries:
        yield entry["bytes"], _damage(path, entry, hash_up_to)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parsed(raw: dict[str, Any], path: Path) -> Manifest:
    if (version := raw["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this Puna ({puna.__version__}) reads up to {FORMAT_VERSION}",
            f"Use the Puna that wrote it ({raw.get('versions', {}).get('puna', 'a newer one')}) or newer.",
        )
    seal = raw.pop("sha256", None)
    if version > 1 and seal != _digest(raw):
        raise CheckpointError(f"{path} has other contents than were saved (SHA-256 differs)", FIX)
    while version < FORMAT_VERSION:
        raw, version = MIGRATIONS[version](raw), version + 1
    return Manifest(**(raw | {"format_version": FORMAT_VERSION, "cursor": Cursor(**raw["cursor"])}))


def _digest(raw: dict[str, Any]) -> str:
    """Of a manifest without its own hash; JSON keeps order and numbers, so it is the same after reading."""
    return hashlib.sha256(json.dumps(raw).encode()).hexdigest()


def _damage(path: Path, entry: dict[str, Any], hash_up_to: float) -> CheckpointError | None:
    size = path.stat().st_size if path.is_file() else None
    if size is None or size != entry["bytes"]:
        found = "is missing" if size is None else f"has {size}"
        return CheckpointError(f"{path} should have {entry['bytes']} bytes and {found}", FIX)
    if "sha256" in entry and size <= hash_up_to and sha256_of(path) != entry["sha256"]:
        return CheckpointError(f"{path} has other contents than were saved (SHA-256 differs)", FIX)
    return None
