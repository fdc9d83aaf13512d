"""Documents of a source: a folder tree, one file, or the named source `stdlib`.

A source is read in the order of its ids, one document at a time, as bytes: whether they are text is for the filters.
"""

import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from puna.errors import DataError

MAX_BYTES = 64 << 20  # what is read of one document; the filter `too_long` removes those that have more
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
STDLIB_SKIPPED_FOLDERS = SKIPPED_FOLDERS | {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_FIX = "Give a folder of text or code files, a .txt, .md or .jsonl file (.gz too), or the name stdlib."


@dataclass(frozen=True)
class Document:
    """One document: `id` is its path inside the source (with `:row` for a row of a .jsonl file)."""

    id: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """Files to read; `facts` says where they are from and goes into the report."""

    root: Path
    files: tuple[str, ...]
    facts: dict[str, Any]

    def __iter__(self) -> Iterator[Document]:
        for name in self.files:
            yield from _read(self.root / name, name)

    @property
    def num_documents(self) -> int | None:
        """How many documents there are, where that is known without reading."""
        return None if any(name.endswith((".jsonl", ".jsonl.gz")) for name in self.files) else len(self.files)

    def sha256(self) -> str:
        """Hash of every document's id and content, in order."""
        digest = hashlib.sha256()
        for document in self:
            content = hashlib.sha256(document.data).hexdigest()
            digest.update(f"{content} {document.id}\n".encode())
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


def _read(path: Path, name: str) -> Iterator[Document]:
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _rows(path, shown)
        else:
            with _opened(path) as file:
                yield Document(shown, file.read(MAX_BYTES + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error})", "Mend it or take it out.") from error


def _rows(path: Path, name: str) -> Iterator[Document]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(f"{name}:{number}", _text(json.loads(line)).encode("utf-8", "surrogatepass"))
    except ValueError as error:
        problem = f"Row {number} of {path} is not a JSON object with a string under the key text ({error})"
        raise DataError(problem, "Mend the row or take it out.") from error


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _text(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError("no text")
    return row["text"]
