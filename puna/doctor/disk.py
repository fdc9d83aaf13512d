"""How fast the disk under a folder writes and reads. No torch here."""

import os
import tempfile
import time
from pathlib import Path

BLOCK_BYTES = 4 << 20
MAX_BYTES, MAX_SECONDS = 256 << 20, 2.0
SPARE_BYTES = 1 << 30
"""Free space that must be left."""


def disk_rates(folder: Path) -> dict[str, float]:
    """Bytes/s of a sequential write, until it is safe on the disk, and of a read that the page cache does not serve.

    Up to 256 MB or 2 s each; the file is removed. Raises OSError where the folder cannot be written or is nearly full.
    """
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < MAX_BYTES + SPARE_BYTES:
        raise OSError("there is too little free space to measure")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".puna-doctor-") as file:
        descriptor = file.fileno()
        num_bytes, seconds = _written(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return {"write": num_bytes / seconds, "read": _read(descriptor)}


def _written(descriptor: int) -> tuple[int, float]:
    block, began, num_bytes = os.urandom(BLOCK_BYTES), time.perf_counter(), 0
    while num_bytes < MAX_BYTES and time.perf_counter() - began < MAX_SECONDS:
        num_bytes += os.write(descriptor, block)
    os.fsync(descriptor)
    return num_bytes, time.perf_counter() - began


def _read(descriptor: int) -> float:
    began, num_bytes = time.perf_counter(), 0
    while time.perf_counter() - began < MAX_SECONDS and (length := len(os.read(descriptor, BLOCK_BYTES))):
        num_bytes += length
    return num_bytes / (time.perf_counter() - began)
