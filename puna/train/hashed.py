"""SHA-256 of files: as they are written, and as they are read again."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO


class Hashed:
    """A file, open for writing, that hashes and counts what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha, self._size = file, hashlib.sha256(), 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a manifest says of a file."""
        return {"bytes": self._size, "sha256": self._sha.hexdigest()}

    def write(self, data: Any) -> int:
        """Append bytes, or anything with their buffer."""
        self._sha.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def fileno(self) -> int:
        """For fsync."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file underneath."""
        self._file.close()


def sha256_of(path: Path) -> str:
    """Of a file's contents now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
