"""A user's folder as it is found: what cannot be a document is named with its reason, and nothing else is lost."""

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from puna.corpus.build import build_corpus
from puna.corpus.formats import holds_several

ROOT = Path(__file__).parents[2]
SPARSE_BYTES = 2 << 30
MESS = {
    "empty.txt": "empty",
    "empty.jsonl": "empty",
    "picture.png": "binary",
    "program": "binary",
    "cut.txt.gz": "damaged",
    "cut.jsonl.gz": "damaged",
    "latin.md": "not_utf8",
    "huge.txt": "binary",
    "huge.jsonl:1": "too_long",
    "huge.html": "too_long",
    "huge.parquet": "damaged",
    "huge.warc:1": "damaged",
    "huge.txt.gz": "damaged",
    "rows.jsonl:2": "bad_row",
}


def mess(folder: Path, size: int) -> None:
    """Everything that goes wrong in folders, sparse files of 2 GB (of several documents: `size`) among it."""
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9)
    (folder / "program").write_bytes(b"\x7fELF" + os.urandom(5000) + b"\0")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"A text that does not end. " * 99)[:-9])
    told = "of a file that is cut short, and that has words enough to be kept"
    rows = [{"text": f"row {i} {told}: {zlib.crc32(b'%d' % i)} {i * i}"} for i in range(3000)]
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    (folder / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    (folder / "latin.md").write_bytes("déjà vu à la carte, naïve façade; ".encode("latin-1") * 9)
    for name in ("huge.txt", "huge.txt.gz", "huge.html", "huge.jsonl", "huge.parquet", "huge.warc"):
        with open(folder / name, "wb") as file:
            file.truncate(size if holds_several(name) else SPARSE_BYTES)
    good = json.dumps({"text": "A row that says something of its own, and is long enough to be kept: "})
    (folder / "rows.jsonl").write_text(f"{good}\n{{]\n{good.replace('own', 'OWN')}\n")


@pytest.mark.parametrize("size", [100 << 20, pytest.param(SPARSE_BYTES, marks=pytest.mark.slow)])
def test_everything_is_named_and_nothing_else_lost(planter, tmp_path, rows, capsys, size):
    planted = [planter.plant(f"notes/{i}.txt", planter.words()) for i in range(6)]
    mess(planter.folder, size)
    report = build_corpus(str(planter.folder), tmp_path / "out", near=0)
    removed = {row["id"]: row["reason"] for row in rows(tmp_path / "out/removed.jsonl")}
    assert removed == MESS
    kept = {row["id"] for name in ("train", "heldout") for row in rows(tmp_path / f"out/{name}.jsonl")}
    cut = {name for name in kept if name.startswith("cut.jsonl.gz:")}
    assert kept - cut == {*planted, "rows.jsonl:1", "rows.jsonl:3"}
    assert cut == {f"cut.jsonl.gz:{i + 1}" for i in range(len(cut))}
    assert len(cut) > 1000
    assert report["documents"] == len(kept) + len(removed)
    said = " ".join(capsys.readouterr().err.split())
    assert "removed damaged 5: cut.jsonl.gz (Compressed file ended before the end-of-stream marker was reached)" in said
    assert "removed not_utf8 1: latin.md" in said


MEASURED = """
import json, resource, sys
from pathlib import Path
from puna.corpus.build import build_corpus
report = build_corpus(sys.argv[1], Path(sys.argv[2]), near=0)
print(json.dumps({"removed": report["removed"], "seconds": report["seconds"],
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def measured(source: Path, out: Path) -> dict:
    command = [sys.executable, "-c", MEASURED, str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "num_bytes", "reason"), [("huge.txt", SPARSE_BYTES, "binary"), ("huge.jsonl", 512 << 20, "too_long")]
)
def test_memory_does_not_grow_with_a_sparse_file(planter, tmp_path, name, num_bytes, reason):
    for i in range(3):
        planter.plant(f"{i}.txt", planter.words())
    before = measured(planter.folder, tmp_path / "before")["peak_mib"]
    with open(planter.folder / name, "wb") as file:
        file.truncate(num_bytes)
    found = measured(planter.folder, tmp_path / "after")
    assert found["removed"] == {reason: 1}
    assert found["peak_mib"] < before + 200
    assert found["seconds"] < 20


def many(folder: Path, count: int) -> None:
    """Tiny files in a hundred folders, every tenth long enough to be kept."""
    for i in range(count):
        path = folder / f"{i % 100:02d}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"note {i}" + f" says that {i} is a number with a square of {i * i} and a cube of {i**3}" * (i % 10 == 0)
        )


def test_tiny_files(planter, tmp_path, rows):
    many(planter.folder, 1000)
    report = build_corpus(str(planter.folder), tmp_path / "out", near=0)
    assert report["removed"] == {"too_short": 900}
    assert len({row["id"] for row in rows(tmp_path / "out/removed.jsonl")}) == 900
    assert sum(split["documents"] for split in report["splits"].values()) == 100


@pytest.mark.slow
def test_a_hundred_thousand_tiny_files(planter, tmp_path, rows):
    many(planter.folder, 100_000)
    found = measured(planter.folder, tmp_path / "out")
    assert found["removed"] == {"too_short": 90_000}
    assert len({row["id"] for row in rows(tmp_path / "out/removed.jsonl")}) == 90_000
    kept = [row for name in ("train", "heldout") for row in rows(tmp_path / f"out/{name}.jsonl")]
    assert len(kept) == 10_000
    assert found["peak_mib"] < 600
