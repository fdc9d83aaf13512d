"""Web archives: records, responses, chunks, compression, damage; real archives of other tools."""

import gzip
import io
import zlib
from pathlib import Path

import pytest

from puna.corpus import warc
from puna.corpus.formats import read

LIMIT = 1 << 20
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n{more}\r\n"


def record(block: bytes, kind: str = "response", length: int | None = None, eol: str = "\r\n") -> bytes:
    lines = ["WARC/1.0", f"WARC-Type: {kind}", "Content-Type: application/http; msgtype=response"]
    lines += [f"Content-Length: {len(block) if length is None else length}", "", ""]
    return eol.join(lines).encode() + block + (eol * 2).encode()


def response(body: bytes, more: str = "") -> bytes:
    return HEAD.format(more=more).encode() + body


@pytest.mark.parametrize("eol", ["\r\n", "\n"])
def test_responses_among_other_records(eol):
    blocks = [b"first", b"", b"third"]
    kinds = ["warcinfo", "request", "response", "metadata", "response"]
    data = b"".join(record(blocks[i % 3], kind, eol=eol) for i, kind in enumerate(kinds))
    assert list(warc.responses(io.BytesIO(data), LIMIT)) == [(3, b"third"), (5, b"")]


def test_header_names_of_any_case_and_repeated_empty_lines():
    data = b"\r\n\r\nWARC/1.1\r\nwarc-TYPE: response\r\ncontent-length:4\r\n\r\nbody\r\n\r\n\r\n\r\n"
    assert list(warc.responses(io.BytesIO(data), LIMIT)) == [(1, b"body")]


def test_a_large_record_is_passed_over_in_pieces():
    data = record(bytes(5 << 20), "resource") + record(b"x" * (5 << 20)) + record(b"last")
    found = list(warc.responses(io.BytesIO(data), LIMIT))
    assert [(number, len(block)) for number, block in found] == [(2, LIMIT + warc.MAX_LINE), (3, 4)]


@pytest.mark.parametrize("cut", [5, 7, 40, 150])
def test_the_records_before_a_cut_are_whole(cut):
    archive = warc.responses(io.BytesIO((record(b"one") + record(b"two" * 30))[:-cut]), LIMIT)
    assert next(archive) == (1, b"one")
    with pytest.raises(EOFError, match="the file ends inside"):
        next(archive)


def test_what_is_no_record_is_named_and_reading_goes_on():
    found = warc.responses(io.BytesIO(b"text\nmore\n" + record(b"one") + b"garbage\n" * 3 + record(b"two")), LIMIT)
    assert list(found) == [(1, None), (2, b"one"), (3, None), (4, b"two")]
    for length in ("", "-1", "x"):
        data = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: " + length.encode() + b"\r\n\r\nbody\r\n\r\n"
        assert list(warc.responses(io.BytesIO(data + record(b"two")), LIMIT)) == [(1, None), (2, b"two")]


# --- responses


def page(block: bytes) -> bytes | None:
    return warc.page(block, LIMIT)


def test_pages_are_html_with_status_200():
    assert page(response(b"<p>text")) == b"<p>text"
    assert page(b"HTTP/1.0 200\ncontent-type: TEXT/HTML\n\nbody") == b"body"
    assert page(response(b"x").replace(b"200 OK", b"404 Not Found")) is None
    assert page(response(b"x").replace(b"text/html", b"image/png")) is None
    assert page(b"HTTP/1.1 200 OK\r\n\r\nx") is None
    assert page(b"HTTP/1.1 200 OK") is None
    assert page(b"") is None
    assert len(page(response(b"x" * (LIMIT + 50)))) == LIMIT + 1


def test_chunks():
    chunked = "Transfer-Encoding: chunked\r\n"
    assert page(response(b"4\r\nwiki\r\n5;x=1\r\npedia\r\n0\r\n\r\n", chunked)) == b"wikipedia"
    assert page(response(b"<p>not chunked", chunked)) == b"<p>not chunked"
    for cut in (b"4\r\nwi", b"4\r\nwiki\r\n5\r\npedia\r\n"):
        with pytest.raises(ValueError, match="cut short"):
            page(response(cut, chunked))


def test_content_encodings():
    text = b"<p>text</p>" * 50
    for encoding, data in (("gzip", gzip.compress(text)), ("deflate", zlib.compress(text)), ("identity", text)):
        assert page(response(data, f"Content-Encoding: {encoding}\r\n")) == text
    assert page(response(text, "Content-Encoding: gzip\r\n")) == text
    assert len(page(response(gzip.compress(bytes(50 << 20)), "Content-Encoding: gzip\r\n"))) == LIMIT + 1
    with pytest.raises(ValueError, match="the compressed body of the response is cut short"):
        page(response(gzip.compress(text)[:-12], "Content-Encoding: gzip\r\n"))
    with pytest.raises(warc.UnknownEncoding, match="content encoding br"):
        page(response(text, "Content-Encoding: br\r\n"))


def test_a_response_that_cannot_be_decoded_is_one_document(tmp_path):
    body = b"<html><p>" + b"A sentence of the page that is long enough to be its main text. " * 5 + b"</p></html>"
    path = tmp_path / "a.warc"
    blocks = [
        response(body),
        response(body, "Content-Encoding: br\r\n"),
        response(b"5\r\nab", "Transfer-Encoding: chunked\r\n"),
        response(b"\x1f\x8bxxxxxxxxxxxxxxxx", "Content-Encoding: gzip\r\n"),
        response(body),
    ]
    path.write_bytes(b"".join(map(record, blocks)))
    reasons = {document.id: document.reason for document in read(path, "a.warc")}
    assert reasons == {
        "a.warc:1": "",
        "a.warc:2": "unreadable",
        "a.warc:3": "damaged",
        "a.warc:4": "damaged",
        "a.warc:5": "",
    }


# --- archives of other tools


def count(path: Path) -> tuple[int, int]:
    """Responses and pages of an archive."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        blocks = [block for _, block in warc.responses(file, LIMIT)]
    return len(blocks), sum(page(block) is not None for block in blocks)


def test_real_archives(data_dir):
    folder = data_dir / "warc-samples"
    assert count(folder / "whirlwind.warc.gz") == (1, 1)
    assert count(folder / "warcfile.warc.gz") == (16, 16)
    assert count(folder / "clueweb-quirk.warc.gz") == (29, 29)
    assert count(folder / "warcio-example.warc.gz") == (1, 1)
    assert count(folder / "warcio-example-iana.org-chunked.warc") == (1, 1)
    assert count(folder / "warcio-example-wrong-chunks.warc.gz") == (1, 1)


def test_a_damaged_real_archive(data_dir):
    documents = list(read(data_dir / "warc-samples/warcio-example-trunc.warc", "a.warc"))
    assert [(document.id, document.reason) for document in documents] == [
        ("a.warc:3", "damaged"),
        ("a.warc:4", "damaged"),
    ]
