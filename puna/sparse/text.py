"""Files of lines as they stream by: plain, gzip, xz, zstd or bzip2. Memory does not grow."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from puna.errors import DataError

BLOCK_BYTES = 8 << 20
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
NEWLINE, RETURN = ord("\n"), ord("\r")


def open_file(path: Path) -> Any:
    """The file, to be read as bytes, decompressed by its name."""
    if path.suffix == ".zst":
        from backports import zstd

        return zstd.open(path, "rb")
    return OPENERS.get(path.suffix, open)(path, "rb")


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Whole lines, some megabytes at a time; the last one ends in a newline too."""
    rest = b""
    while data := file.read(BLOCK_BYTES):
        whole, newline, after = (rest + data).rpartition(b"\n")
        if newline:
            yield whole + newline
        rest = after
    if rest:
        yield rest + b"\n"


@contextmanager
def told_of_damage(path: Path, fix: str, reached: Callable[[], str] = str) -> Iterator[None]:
    """Raises DataError where compressed data are damaged or cut short. reached: words on how far one came."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} is damaged or cut short{reached()}: {error}", fix) from None


def shown(text: str) -> str:
    """A line for a message: 80 characters at most."""
    return text if len(text) <= 80 else f"{text[:77]}..."
