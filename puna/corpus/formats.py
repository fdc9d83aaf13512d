"""What a file holds, by its suffix; one document in memory at a time.

    .jsonl        a document a row: the text under the key `text`
    .parquet      a document a row: the text in the column `text`
    .html .htm    the main text of the page
    .warc         a document an HTML response: the main text of its page
    others        the file itself

All but .parquet may be compressed: .gz, .zst. What cannot be read is a document too, without data and with the reason.
"""

import codecs
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import splitext
from pathlib import Path
from typing import Any

from puna.corpus import warc

MAX_BYTES = 64 << 20  # what is read of one document; the filter `too_long` removes those that have more
MAX_PAGE_BYTES = 16 << 20  # of HTML
SKIPPED_BYTES = 1 << 20  # read at a time of what is passed over
BUFFER_BYTES = 1 << 16  # of a file that is read in small pieces
PARQUET_ROWS = 256  # decoded at a time
COMPRESSED = (".gz", ".zst")

FAULTS = {
    "unreadable": "the file cannot be opened, or its encoding is not known",
    "damaged": "cut short, or not of the form that its suffix says; documents before the damage are kept",
    "bad_row": "a row that is no JSON object with a string under `text`, or has no string in the column `text`",
    "no_text": "a page in which no main text was found",
}


@dataclass(frozen=True)
class Document:
    """One document: `id` is its path inside the source, with `:number` for one of several in a file.

    reason: why it could not be read, with its detail; empty where it was.
    """

    id: str
    data: bytes
    reason: str = ""
    detail: str = ""


def holds_several(name: str) -> bool:
    """Whether a file of this name holds documents rather than being one."""
    return _reader(name) in (_rows, _table, _archive)


def holds_pages(name: str) -> bool:
    """Whether main text is extracted from a file of this name."""
    return _reader(name) in (_page, _archive)


def read(path: Path, name: str) -> Iterator[Document]:
    """The documents of one file, and what could not be read of it; at least one."""
    found = False
    try:
        for document in _reader(name)(path, name):
            found = True
            yield document
    except (OSError, EOFError, ValueError, zlib.error) as error:
        is_closed = isinstance(error, OSError) and error.strerror is not None
        yield Document(name, b"", "unreadable" if is_closed else "damaged", _sentence(error))
        return
    if not found:
        yield Document(name, b"", "empty")


def _reader(name: str) -> Callable[[Path, str], Iterator[Document]]:
    stem, suffix = splitext(name.lower())
    if suffix == ".parquet":
        return _table
    return READERS.get(splitext(stem)[1] if suffix in COMPRESSED else suffix, _whole)


@contextmanager
def _opened(path: Path) -> Iterator[warc.Bytes]:
    """The content of a file, decompressed. Raises OSError, EOFError, ValueError, zlib.error at damage."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import backports.zstd as zstd

        try:
            with zstd.open(path, "rb") as file:
                yield file
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
    else:
        with gzip.open(path, "rb") if suffix == ".gz" else path.open("rb", buffering=BUFFER_BYTES) as file:
            yield file


def _whole(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield Document(name, file.read(MAX_BYTES + 1))


def _rows(path: Path, name: str) -> Iterator[Document]:
    number = 0
    with _opened(path) as file:
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                while not line.endswith(b"\n") and line:
                    line = file.readline(SKIPPED_BYTES)
                yield Document(f"{name}:{number}", b"", "too_long")
            elif line.strip():
                yield _row(f"{name}:{number}", line)


def _row(id: str, line: bytes) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Document(id, b"", "bad_row", _sentence(error))
    return _text(id, row.get("text") if isinstance(row, dict) else None)


def _text(id: str, text: Any) -> Document:
    if not isinstance(text, str):
        return Document(id, b"", "bad_row", "no string under text")
    return Document(id, text.encode("utf-8", "surrogatepass"))


def _table(path: Path, name: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=SKIPPED_BYTES, pre_buffer=False) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError("it has no column text")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    yield _text(f"{name}:{number}", value.as_py())
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _page(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield _main_text(name, file.read(MAX_PAGE_BYTES + 1))


def _archive(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, block in warc.responses(file, MAX_PAGE_BYTES):
            id = f"{name}:{number}"
            if block is None:
                yield Document(id, b"", "damaged", "no record")
            else:
                yield from _response(id, block)


def _response(id: str, block: bytes) -> Iterator[Document]:
    try:
        page = warc.page(block, MAX_PAGE_BYTES)
    except (ValueError, zlib.error) as error:
        yield Document(id, b"", "damaged", _sentence(error))
    except warc.UnknownEncoding as error:
        yield Document(id, b"", "unreadable", _sentence(error))
    else:
        if page is not None:
            yield _main_text(id, page)


def _main_text(id: str, page: bytes) -> Document:
    """The main text of an HTML page; a page that is empty, too long or binary is left to the filters."""
    import trafilatura

    if len(page) > MAX_PAGE_BYTES:
        return Document(id, b"", "too_long")
    if not page or b"\0" in page:
        return Document(id, page)
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # a page without text is no event
    tagged = b"<html>" + page.removeprefix(
        codecs.BOM_UTF8
    )  # without the tag at its very beginning it is taken for none
    text = trafilatura.extract(tagged, include_comments=False)
    return Document(id, text.encode("utf-8", "surrogatepass")) if text else Document(id, b"", "no_text")


def _sentence(error: Exception) -> str:
    """What went wrong, in one line and without a path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _rows,
    ".html": _page,
    ".htm": _page,
    ".warc": _archive,
}
