"""Web archives (WARC 1.1, ISO 28500): the HTML pages of a stream of records.

A record is a version line, headers, an empty line, `Content-Length` bytes and two line ends. Lines that end with LF
alone, and header fields in any order and case, are taken as they come.
"""

import re
import zlib
from collections.abc import Iterator
from typing import Protocol

VERSION = b"WARC/"
MAX_LINE = 1 << 16
PASSED_BYTES = 1 << 20  # read at a time of a record that is not wanted
HTML = ("text/html", "application/xhtml+xml")
_CHUNK = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")


class Bytes(Protocol):
    """A file that is read forwards: plain or compressed."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


class UnknownEncoding(Exception):
    """A response whose content encoding is not read."""


def responses(file: Bytes, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The HTTP responses of an archive: number of the record in the file (from 1) and its block.

    A block ends after `max_bytes` and what HTTP headers may take. Where something is no record, its number and None;
    reading goes on at the next line that begins with WARC/. Raises EOFError where the file ends inside a record; those
    before it are whole.
    """
    number, line = 0, _first_line(file)
    while line:
        number += 1
        headers = _fields(_head(file)) if line.startswith(VERSION) else {}
        if not headers.get("content-length", "").isdecimal():
            yield number, None
            line = _next_version(file)
            continue
        length = int(headers["content-length"])
        wanted = headers.get("warc-type") == "response" and "http" in headers.get("content-type", "http")
        block = file.read(min(length, max_bytes + MAX_LINE)) if wanted else b""
        _pass_over(file, length - len(block))
        if wanted:
            yield number, block
        line = _first_line(file)


def page(block: bytes, max_bytes: int) -> bytes | None:
    """The body of an HTTP response where it is a page of HTML with status 200, `max_bytes` + 1 at most; else None.

    Raises ValueError where its chunks (RFC 9112, section 7.1) are cut short, zlib.error where its compressed body is
    damaged, UnknownEncoding where it is compressed in another way than gzip or deflate.
    """
    end = _HEAD_END.search(block)
    if end is None:
        return None
    status, _, head = block[: end.start()].partition(b"\n")
    fields = _fields(head)
    if status.split()[1:2] != [b"200"] or not fields.get("content-type", "").lower().startswith(HTML):
        return None
    body = block[end.end() :]
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = _dechunked(body)
    return _decoded(body, fields.get("content-encoding", "").lower(), max_bytes)[: max_bytes + 1]


def _first_line(file: Bytes) -> bytes:
    """The next line that is not empty; empty at the end of the file."""
    line = file.readline(MAX_LINE)
    while line in (b"\n", b"\r\n"):
        line = file.readline(MAX_LINE)
    return line


def _next_version(file: Bytes) -> bytes:
    """The next line that begins a record; empty at the end of the file."""
    while (line := file.readline(MAX_LINE)) and not line.startswith(VERSION):
        pass
    return line


def _head(file: Bytes) -> bytes:
    lines = []
    while (line := file.readline(MAX_LINE)) not in (b"\n", b"\r\n"):
        if not line:
            raise EOFError("the file ends inside the headers of a record")
        lines.append(line)
    return b"".join(lines)


def _fields(head: bytes) -> dict[str, str]:
    """Header fields by lower-case name; of one that is repeated the last."""
    lines = (line.partition(":") for line in head.decode("utf-8", "replace").splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def _pass_over(file: Bytes, length: int) -> None:
    while length > 0:
        passed = len(file.read(min(length, PASSED_BYTES)))
        if not passed:
            raise EOFError("the file ends inside a record")
        length -= passed


def _dechunked(body: bytes) -> bytes:
    """The body of a chunked message; as it is where it is not chunked, for crawlers store bodies under old headers."""
    parts: list[bytes] = []
    place = 0
    while size := _CHUNK.match(body, place):
        length, start = int(size[1], 16), size.end()
        if not length:
            return b"".join(parts)
        if start + length > len(body):
            raise ValueError("a chunk of the response is cut short")
        parts.append(body[start : start + length])
        place = start + length + (2 if body[start + length :][:2] == b"\r\n" else 1)
    if parts:
        raise ValueError("the chunks of the response are cut short")
    return body


def _decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo gzip and deflate; a body that does not begin as gzip was decoded by the crawler."""
    if encoding in ("", "identity") or (encoding in ("gzip", "x-gzip") and body[:2] != b"\x1f\x8b"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnknownEncoding(f"content encoding {encoding}")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)
    decoded = decompressor.decompress(body, max_bytes + 1)
    if not decompressor.eof and len(decoded) <= max_bytes:
        raise ValueError("the compressed body of the response is cut short")
    return decoded
