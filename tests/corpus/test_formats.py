"""What each kind of file holds, whole and damaged."""

import gzip
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import backports.zstd as zstd
import pyarrow
import pyarrow.parquet
import pytest

from puna.corpus import formats
from puna.corpus.formats import FAULTS, MAX_BYTES, Document, read

PARAGRAPHS = [f"The {word} of the plateau is told at length in this paragraph, and more." for word in ("one", "two")]
PAGE = f"""<!doctype html><html><head><title>T</title><meta charset="utf-8"></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<article><h1>The plateau</h1>{"".join(f"<p>{text} {text}</p>" for text in PARAGRAPHS)}</article>
<footer>Cookie settings</footer></body></html>""".encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + PAGE
ARCHIVE = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(RESPONSE), RESPONSE) * 3


def documents(path: Path) -> list[Document]:
    return list(read(path, path.name))


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(path: Path, texts: list, column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"other": range(len(texts)), column: texts}), path, row_group_size=3)
    return path


PACKED = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd.compress}


# --- whole files


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.b.c", "A.TXT"])
def test_a_text_is_one_document(tmp_path, name, suffix):
    path = put(tmp_path / f"{name}{suffix}", PACKED[suffix]("Ñandú".encode()))
    assert documents(path) == [Document(path.name, "Ñandú".encode())]


@pytest.mark.parametrize("suffix", PACKED)
def test_json_lines(tmp_path, suffix):
    path = put(tmp_path / f"a.jsonl{suffix}", PACKED[suffix](jsonl("one", "zwei ß") + b"\n"))
    assert documents(path) == [Document(f"{path.name}:1", b"one"), Document(f"{path.name}:2", "zwei ß".encode())]


def test_parquet(tmp_path):
    texts = [f"text {i}" for i in range(10)]
    path = parquet(tmp_path / "a.parquet", texts)
    assert documents(path) == [Document(f"a.parquet:{i + 1}", text.encode()) for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["a.html", "a.htm", "a.HTML.gz", "a.html.zst"])
def test_main_text_of_a_page(tmp_path, name):
    (document,) = documents(put(tmp_path / name, PACKED[Path(name).suffix if "." in name[6:] else ""](PAGE)))
    text = document.data.decode()
    assert all(paragraph in text for paragraph in PARAGRAPHS)
    assert "Cookie" not in text
    assert "About us" not in text


@pytest.mark.parametrize("start", [b"", b"<!-- by hand -->\n" * 9, b"<body>", b"\xef\xbb\xbf"])
def test_a_piece_of_a_page(tmp_path, start):
    text = "A sentence of the page that is long enough to be its main text. " * 5
    (document,) = documents(put(tmp_path / "a.html", start + f"<p>{text}</p>".encode()))
    assert document.data.decode() == text.strip()


def test_several_files_are_one_after_the_other(tmp_path):
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(jsonl("one")) + gzip.compress(jsonl("two")))
    assert [document.data for document in documents(path)] == [b"one", b"two"]
    path = put(tmp_path / "a.jsonl.zst", zstd.compress(jsonl("one")) + zstd.compress(jsonl("two")))
    assert [document.data for document in documents(path)] == [b"one", b"two"]


# --- damaged ones


def faults(path: Path) -> list[tuple[str, str]]:
    """(id, reason) of what could not be read; the rest has data and no reason."""
    found = documents(path)
    assert all(bool(document.data) != bool(document.reason) for document in found)
    return [(document.id, document.reason) for document in found if document.reason]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.warc"])
def test_a_cut_file_is_damaged(tmp_path, name, suffix):
    path = put(tmp_path / f"{name}{suffix}", PACKED[suffix](ARCHIVE if name == "a.warc" else PAGE)[:-9])
    assert faults(path) == [(path.name, "damaged")]
    assert "ended before the end-of-stream marker" in documents(path)[-1].detail


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_rows_before_the_cut_are_kept(tmp_path, suffix):
    whole = PACKED[suffix](jsonl(*(f"row {i} {i * i * 7919}" for i in range(40_000))))
    path = put(tmp_path / f"a.jsonl{suffix}", whole[: len(whole) // 2])
    found = documents(path)
    assert len(found) > 1000
    assert [d.data.split()[1] for d in found[:-1]] == [str(i).encode() for i in range(len(found) - 1)]
    assert (found[-1].id, found[-1].reason) == (path.name, "damaged")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet"])
def test_what_the_suffix_promises_is_not_there(tmp_path, name):
    assert faults(put(tmp_path / name, b"no such format\n")) == [(name, "damaged")]


@pytest.mark.parametrize("row", ['{"text": 3}', '{"txt": "a"}', "[]", '"text"', "{", '{"text": "a"} x', "[" * 100_000])
def test_a_bad_row_is_named_and_the_others_are_kept(tmp_path, row):
    path = put(tmp_path / "a.jsonl", jsonl("one") + row.encode() + b"\n" + jsonl("three"))
    assert faults(path) == [("a.jsonl:2", "bad_row")]
    assert [document.data for document in documents(path) if document.data] == [b"one", b"three"]


def test_a_row_that_is_not_utf8(tmp_path):
    path = put(tmp_path / "a.jsonl", jsonl("one") + '{"text": "déjà"}\n'.encode("latin-1") + jsonl("three"))
    assert faults(path) == [("a.jsonl:2", "bad_row")]


def test_a_row_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    monkeypatch.setattr(formats, "SKIPPED_BYTES", 64)
    path = put(tmp_path / "a.jsonl", jsonl("one", "x" * 5000, "three", "y" * (1000 - 13), "five", "z" * 5000)[:-1])
    assert faults(path) == [("a.jsonl:2", "too_long"), ("a.jsonl:6", "too_long")]
    assert [document.data[:5] for document in documents(path) if document.data] == [b"one", b"three", b"yyyyy", b"five"]


def test_parquet_rows_without_text_and_tables_without_the_column(tmp_path):
    assert faults(parquet(tmp_path / "a.parquet", ["one", None, "three"])) == [("a.parquet:2", "bad_row")]
    assert faults(parquet(tmp_path / "b.parquet", [1, 2])) == [("b.parquet:1", "bad_row"), ("b.parquet:2", "bad_row")]
    (document,) = documents(parquet(tmp_path / "c.parquet", ["one"], column="body"))
    assert (document.reason, document.detail) == ("damaged", "it has no column text")


def test_a_cut_parquet_file(tmp_path):
    data = parquet(tmp_path / "a.parquet", [random.Random(i).randbytes(99).hex() for i in range(50)]).read_bytes()
    assert faults(put(tmp_path / "a.parquet", data[: len(data) // 2])) == [("a.parquet", "damaged")]
    spoilt = bytearray(data)
    spoilt[len(data) // 4 : len(data) // 2] = bytes(len(data) // 4)
    assert ("a.parquet", "damaged") in faults(put(tmp_path / "a.parquet", bytes(spoilt)))


def test_a_parquet_file_that_the_library_cannot_decode(tmp_path, monkeypatch):
    def iter_batches(*_, **__):
        raise pyarrow.lib.ArrowNotImplementedError("no such codec")

    path = parquet(tmp_path / "a.parquet", ["one"])
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert documents(path) == [Document("a.parquet", b"", "damaged", "no such codec")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.warc.gz"])
def test_a_file_without_a_document(tmp_path, name):
    if name == "a.parquet":
        path = parquet(tmp_path / name, [])
    else:
        path = put(tmp_path / name, PACKED[Path(name).suffix if name.endswith(".gz") else ""](b"\n"))
    assert faults(path) == [(name, "empty")]


def test_pages_without_text_and_pages_for_the_filters(tmp_path, monkeypatch, capfd):
    assert faults(put(tmp_path / "a.html", b"<html><body><img src='a.png'></body></html>")) == [("a.html", "no_text")]
    assert documents(put(tmp_path / "b.html", b"\0" * 100)) == [Document("b.html", b"\0" * 100)]
    assert documents(put(tmp_path / "c.html", b"")) == [Document("c.html", b"")]
    monkeypatch.setattr(formats, "MAX_PAGE_BYTES", 100)
    assert faults(put(tmp_path / "d.html", PAGE)) == [("d.html", "too_long")]
    assert capfd.readouterr() == ("", "")


def test_a_file_that_cannot_be_opened(tmp_path):
    assert documents(tmp_path / "gone.txt") == [Document("gone.txt", b"", "unreadable", "No such file or directory")]


def test_a_large_file_is_read_up_to_the_limit(tmp_path):
    with open(tmp_path / "big", "wb") as file:
        file.truncate(MAX_BYTES + 100)
    (document,) = documents(tmp_path / "big")
    assert len(document.data) == MAX_BYTES + 1


@pytest.mark.parametrize(
    "name", ["page.html", "a.warc", "a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.warc.gz"]
)
def test_random_damage_is_reported_never_raised(tmp_path, name):

    draw, reasons = random.Random(5), Counter()
    whole = {
        ".html": PAGE,
        ".warc": ARCHIVE,
        ".jsonl": jsonl(*PARAGRAPHS * 9),
        ".parquet": parquet(tmp_path / "p.parquet", PARAGRAPHS * 9).read_bytes(),
    }[next(s for s in Path(name).suffixes if s not in (".gz", ".zst"))]
    whole = PACKED.get(Path(name).suffix, bytes)(whole)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 20)] = draw.randbytes(draw.randint(0, 20))
        reasons.update(document.reason for document in documents(put(tmp_path / name, bytes(data))))
    assert set(reasons) <= {"", "empty", "too_long", *FAULTS}


# --- real pages


@pytest.mark.slow
def test_main_text_of_real_pages(data_dir):
    """Mean F1 over the words of 181 pages with known bodies."""
    folder = data_dir / "html-article-extraction"
    truth = json.loads(gzip.decompress((folder / "ground-truth.json.gz").read_bytes()))
    scores = []
    with tarfile.open(folder / "html.tar.xz") as tar:
        for member in tar:
            key = Path(member.name).stem
            if member.isfile() and key in truth:
                page = tar.extractfile(member).read()
                found = Counter(formats._main_text(key, page).data.decode().split())
                wanted = Counter(truth[key]["articleBody"].split())
                shared = (found & wanted).total()
                scores.append(2 * shared / max(found.total() + wanted.total(), 1))
    assert len(scores) == 181
    assert sum(scores) / len(scores) > 0.9
