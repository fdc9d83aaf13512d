"""Documents of a source: a folder tree, one file, or the named source `stdlib`.

A source is read in the order of its ids, one document at a time, as bytes: whether they are text is for the filters.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from puna.console import track
from puna.corpus import formats
from puna.corpus.formats import MAX_BYTES, Document
from puna.errors import DataError

SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
STDLIB_SKIPPED_FOLDERS = SKIPPED_FOLDERS | {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_FIX = "Give a folder or a file of text, code, JSON lines, parquet, HTML or WARC, or the name stdlib."


@dataclass(frozen=True)
class Source:
    """Files to read; `facts` says where they are from and goes into the report."""

    root: Path
    files: tuple[str, ...]
    facts: dict[str, Any]

    def __iter__(self) -> Iterator[Document]:
        for name in self.files:
            yield from formats.read(self.root / name, _printable(name))

    @property
    def num_documents(self) -> int | None:
        """How many documents there are, where that is known without reading."""
        return None if any(map(formats.holds_several, self.files)) else len(self.files)

    @property
    def libraries(self) -> dict[str, str]:
        """The versions of the libraries that decide what a document's text is."""
        return {"trafilatura": version("trafilatura")} if any(map(formats.holds_pages, self.files)) else {}

    def sha256(self) -> str:
        """Hash of every file's name and content, in order; of a file that is one document, up to what is read of it."""
        digest = hashlib.sha256()
        for name in track(self.files, "looking for changes"):
            limit = None if formats.holds_several(name) else MAX_BYTES + 1
            digest.update(f"{_content_hash(self.root / name, limit)} {_printable(name)}\n".encode())
        return digest.hexdigest()


def open_source(source: str) -> Source:
    """The files of a path or of `stdlib`: this Python's own standard library without its tests. Raises DataError."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _walk(root, _is_stdlib_folder, _is_stdlib_file)
        return Source(root, files, {"name": "stdlib", "python": platform.python_version()})
    path = Path(source)
    if path.is_file():
        return Source(path.parent, (path.name,), {"name": source})
    if not path.is_dir():
        raise DataError(f"There is nothing to read at {source}", _FIX)
    files = _walk(path, _is_plain_folder, _is_plain_file)
    if not files:
        raise DataError(f"The folder {source} holds no files", _FIX)
    return Source(path, files, {"name": source})


def _is_plain_file(name: str) -> bool:
    return not name.startswith(".")


def _is_plain_folder(name: str) -> bool:
    return not name.startswith(".") and name not in SKIPPED_FOLDERS


def _is_stdlib_file(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("_sysconfigdata")


def _is_stdlib_folder(name: str) -> bool:
    return name not in STDLIB_SKIPPED_FOLDERS and not name.startswith("config-")


def _walk(root: Path, enter: Callable[[str], bool], take: Callable[[str], bool]) -> tuple[str, ...]:
    """Paths of files under `root`, sorted: folders and files are chosen by their names."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(enter, folders)
        found += [Path(folder, name) for name in files if take(name)]
    return tuple(sorted(path.relative_to(root).as_posix() for path in found if path.is_file()))


def _printable(name: str) -> str:
    """A file name as text, whatever its bytes are."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _content_hash(path: Path, limit: int | None) -> str:
    """SHA-256 of a file's first `limit` bytes (None: all), or why it cannot be read."""
    digest, left = hashlib.sha256(), limit
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(1 << 20 if left is None else min(left, 1 << 20)):
                digest.update(piece)
                left = None if left is None else left - len(piece)
    except OSError as error:
        return f"{error.strerror}"
    return digest.hexdigest()
