"""Tables larger than memory: one NumPy file a partition, never changed in place."""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import CheckpointError
from puna.train.hashed import Hashed

_FILE = re.compile(r"(?P<partition>.+)\.(?P<version>\d{8})\.npy$")


@dataclass(frozen=True)
class PartitionFile:
    """One version of one partition."""

    file: str
    bytes: int
    sha256: str


class RowStore:
    """Partitions of a table in RUN/rows/NAME. A write makes a new file; a manifest's files stay until it is dropped."""

    def __init__(self, run: Path | str, name: str) -> None:
        self.name, self.folder = name, Path(run) / "rows" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._current: dict[str, PartitionFile] = {}

    def read(self, partition: str, *, mapped: bool = False) -> npt.NDArray[Any]:
        """The partition's rows; mapped: read-only from the page cache as they are touched."""
        if partition not in self._current:
            raise KeyError(f"table {self.name} has no partition {partition}; it has {sorted(self._current)}")
        path = self.folder / self._current[partition].file
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)

    def write(self, partition: str, rows: npt.NDArray[Any], *, synced: bool = True) -> None:
        """Make `rows` the partition's current version; on disk for good when this returns, if it is to be `synced`.

        Raises ValueError where rows are Python objects, which would have to be pickled.
        """
        if rows.dtype.hasobject:
            raise ValueError(f"table {self.name} is of numbers, and {rows.dtype} needs pickles: allow_pickle is off")
        name = f"{partition}.{self._last_version(partition) + 1:08d}.npy"
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            hashed = Hashed(file)
            whole = np.ascontiguousarray(rows)
            np.lib.format.write_array_header_1_0(hashed, np.lib.format.header_data_from_array_1_0(whole))
            hashed.write(whole.data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        self._current[partition] = PartitionFile(name, **hashed.fingerprint)

    def __contains__(self, partition: str) -> bool:
        return partition in self._current

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """The current file of every partition that this process knows, for the manifest."""
        return {partition: asdict(entry) for partition, entry in sorted(self._current.items())}

    def restore(self, snapshot: dict[str, dict[str, Any]]) -> None:
        """Make exactly the named files current. Raises CheckpointError for one that is gone or of another size."""
        entries = {partition: PartitionFile(**entry) for partition, entry in snapshot.items()}
        for entry in entries.values():
            path = self.folder / entry.file
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                raise CheckpointError(
                    f"{path} should have {entry.bytes} bytes and {'is missing' if size is None else f'has {size}'}",
                    "Resume from an older checkpoint, or restore the file.",
                )
        self._current = entries

    def files(self) -> list[str]:
        """Every file on disk now: current, superseded, half-written."""
        return [entry.name for entry in os.scandir(self.folder)]

    def sweep(self, names: Iterable[str]) -> None:
        """Remove these files. The caller knows that no manifest names them and that none of them is current."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _last_version(self, partition: str) -> int:
        """Highest version on disk, whoever wrote it: a number is never used twice."""
        found = (_FILE.match(entry.name) for entry in os.scandir(self.folder))
        return max((int(m["version"]) for m in found if m and m["partition"] == partition), default=0)


def newest(snapshots: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One snapshot out of the ranks': where several wrote a partition, the highest version."""
    merged: dict[str, dict[str, Any]] = {}
    for snapshot in snapshots:
        for partition, entry in snapshot.items():
            if partition not in merged or merged[partition]["file"] < entry["file"]:
                merged[partition] = entry
    return merged
