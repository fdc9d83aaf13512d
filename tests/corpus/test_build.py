"""The whole pipeline on planted corpora: what is removed and why, what is made again, what a kill leaves."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import backports.zstd as zstd
import pyarrow.parquet
import pytest

from puna.corpus.build import FILES, build_corpus
from puna.corpus.filters import Limits
from puna.errors import DataError

ROOT = Path(__file__).parents[2]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def removed_by_plan(planter) -> dict[str, tuple[str, str]]:
    """Plant 30 documents and repeats of some: id -> (reason, of)."""
    plan = {}
    for i in range(30):
        words = planter.words()
        first = planter.plant(f"a/{i:02d}.txt", words)
        if i % 3 == 0:
            plan[planter.plant(f"b/exact-{i:02d}.py", words, per_line=7)] = ("exact_duplicate", first)
        if i % 4 == 0:
            plan[planter.plant(f"b/near-{i:02d}.md", planter.edit(words, 2))] = ("near_duplicate", first)
        if i % 5 == 0:
            planter.plant(f"b/other-{i:02d}.md", planter.edit(words, 40))
    return plan


def test_exactly_the_planted_duplicates_are_removed(planter, tmp_path, rows):
    plan = removed_by_plan(planter)
    report = build_corpus(str(planter.folder), tmp_path / "out")
    removed = {row["id"]: (row["reason"], row["of"]) for row in rows(tmp_path / "out/removed.jsonl")}
    assert removed == plan
    assert report["removed"] == {"exact_duplicate": 10, "near_duplicate": 8}
    kept = [row for name in FILES[:2] for row in rows(tmp_path / "out" / name)]
    assert len(kept) == report["documents"] - 18 == 36
    for row in kept:
        assert row["text"] == (planter.folder / row["id"]).read_text()
    counts = [report["splits"][split]["documents"] for split in ("train", "heldout")]
    assert counts == [len(rows(tmp_path / "out" / name)) for name in FILES[:2]]
    size = sum(len(row["text"].encode()) for row in rows(tmp_path / "out/heldout.jsonl"))
    assert size == report["splits"]["heldout"]["bytes"]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_alike_straddles_the_split(planter, tmp_path, rows, seed):
    """Documents that are 0.775 alike, mostly too little to be removed, stay on one side; near duplicates are gone."""
    for i in range(25):
        words = planter.words(320)
        one, two = planter.edit(words, 4), planter.edit(words, 4)
        for name, version in (("one", one), ("two", two), ("zero", planter.edit(one, 1))):
            planter.plant(f"{i}-{name}.txt", version)
    report = build_corpus(str(planter.folder), tmp_path / "out", heldout=0.4, seed=seed)
    sides = {name: rows(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "heldout")}
    assert report["heldout_checked"] == len(sides["heldout"]) > 5
    groups = [{row["id"].split("-")[0] for row in side} for side in sides.values()]
    assert not groups[0] & groups[1]
    assert sum(map(len, sides.values())) > 25, "some pairs must be alike but not removed"
    train = [shingles(row["text"]) for row in sides["train"]]
    for row in sides["heldout"]:
        own = shingles(row["text"])
        assert max(len(own & other) / len(own | other) for other in train) < 0.7


def test_near_zero_looks_for_exact_duplicates_only(planter, tmp_path):
    removed_by_plan(planter)
    report = build_corpus(str(planter.folder), tmp_path / "out", near=0)
    assert report["removed"] == {"exact_duplicate": 10}


def test_filtered_documents_are_counted_not_fatal(planter, tmp_path, rows):
    for i in range(3):
        planter.plant(f"{i}.txt", planter.words())
    (planter.folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 30)
    (planter.folder / "junk.bin").write_bytes(bytes(range(256)))
    (planter.folder / "empty.py").write_text("")
    report = build_corpus(str(planter.folder), tmp_path / "out", heldout=0.5)
    assert report["removed"] == {"binary": 1, "empty": 1, "not_utf8": 1}
    expected = {"latin.txt": "not_utf8", "junk.bin": "binary", "empty.py": "empty"}
    assert {row["id"]: row["reason"] for row in rows(tmp_path / "out/removed.jsonl")} == expected


def test_second_call_returns_at_once(planter, tmp_path, capsys):
    removed_by_plan(planter)
    first = build_corpus(str(planter.folder), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    second = build_corpus(str(planter.folder), tmp_path / "out")
    assert (first["up_to_date"], second["up_to_date"]) == (False, True)
    assert f"corpus {tmp_path / 'out'}: up to date" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {**first, "up_to_date": 0, "seconds": 0} == {**second, "up_to_date": 0, "seconds": 0}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda planter, out: planter.plant("a/00.txt", planter.words()), {}, "because the input changed"),
        (lambda planter, out: planter.plant("new.txt", planter.words()), {}, "because the input changed"),
        (lambda planter, out: None, {"near": 0.9}, "because near was 0.8 and is 0.9"),
        (lambda planter, out: None, {"seed": 1, "heldout": 0.1}, "heldout was 0.05 and is 0.1; seed was 0 and is 1"),
        (lambda planter, out: None, {"limits": Limits(min_chars=9)}, "because min_chars was 64 and is 9"),
        (lambda planter, out: (out / "train.jsonl").write_text(""), {}, "because train.jsonl is missing or was cut"),
        (lambda planter, out: (out / "heldout.jsonl").unlink(), {}, "because heldout.jsonl is missing or was cut"),
        (lambda planter, out: edit_report(out, code="old"), {}, "because the code that makes it changed"),
    ],
)
def test_says_why_it_builds_again(planter, tmp_path, capsys, change, options, words):
    removed_by_plan(planter)
    out = tmp_path / "out"
    first = build_corpus(str(planter.folder), out)
    change(planter, out)
    capsys.readouterr()
    again = build_corpus(str(planter.folder), out, **options)
    said = capsys.readouterr().err
    assert f"corpus {out}: making it again, because " in said
    assert words in said
    assert not again["up_to_date"]
    assert (again["key"] == first["key"]) == (words.endswith("cut") or "code" in words)
    assert build_corpus(str(planter.folder), out, **options)["up_to_date"]


def edit_report(out: Path, **values) -> None:
    path = out / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHILD = """
import os, signal, sys
from pathlib import Path
from puna.corpus.build import build_corpus
left, replace = int(sys.argv[1]), os.replace
def counted(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counted
build_corpus(sys.argv[2], Path(sys.argv[3]), seed=int(sys.argv[4]))
"""


def child(at: int, source: Path, out: Path, seed: int, hash_seed: str = "0") -> int:
    command = [sys.executable, "-c", CHILD, str(at), str(source), str(out), str(seed)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True).returncode


@pytest.mark.parametrize("at", [1, 2, 4])
def test_killed_at_a_rename_leaves_no_corpus(planter, tmp_path, at):
    """A rebuild killed at its first, second or last rename: no report, and the next call makes it whole."""
    removed_by_plan(planter)
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    build_corpus(str(planter.folder), out)
    assert child(at, planter.folder, out, seed=3) == -9
    assert not (out / "corpus.json").exists()
    assert not build_corpus(str(planter.folder), out, seed=3)["up_to_date"]
    build_corpus(str(planter.folder), fresh, seed=3)
    assert contents(out) == contents(fresh)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".tmp")}


def test_same_bytes_whatever_the_hash_seed(planter, tmp_path):
    removed_by_plan(planter)
    for hash_seed in ("1", "2"):
        assert child(0, planter.folder, tmp_path / hash_seed, 0, hash_seed) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert contents(tmp_path / "1").keys() == {*FILES, "corpus.json"}


def test_changed_while_it_is_read(planter, tmp_path, monkeypatch):
    removed_by_plan(planter)
    from puna.corpus import build

    def meddle(*arguments):
        planter.plant("a/00.txt", planter.words())
        return check(*arguments)

    check = build.check_no_leak
    monkeypatch.setattr(build, "check_no_leak", meddle)
    with pytest.raises(DataError, match=r"a/00\.txt changed while it was read\. Build again when it is"):
        build_corpus(str(planter.folder), tmp_path / "out")
    assert not (tmp_path / "out/corpus.json").exists()


def test_all_forms_of_one_folder(planter, tmp_path, rows):
    """The same kinds of documents out of text, rows, tables, pages and archives."""
    texts = {}
    for name in ("a.txt", "b.py", "c.md.gz", "d.jsonl", "e.jsonl.zst", "f.parquet", "g.html", "h.warc.gz"):
        words = planter.words()
        text = "\n".join(" ".join(words[i : i + 12]) + "." for i in range(0, len(words), 12))
        page = "".join(f"<p>{line}</p>" for line in text.split("\n"))
        html = f"<html><body><article>{page}</article></body></html>".encode()
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html
        record = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(block), block)
        path, row = planter.folder / name, json.dumps({"text": text}).encode() + b"\n"
        if name == "f.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        else:
            content = {"d": row, "e": row, "g": html, "h": record}.get(name[0], text.encode())
            packed = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)(content)
            path.write_bytes(packed)
        texts[name + ":1" * (name[0] in "defh")] = text
    report = build_corpus(str(planter.folder), tmp_path / "out", heldout=0.2)
    found = {row["id"]: row["text"] for name in FILES[:2] for row in rows(tmp_path / "out" / name)}
    assert {id: text.split() for id, text in found.items()} == {id: text.split() for id, text in texts.items()}
    assert report["removed"] == {}
    assert build_corpus(str(planter.folder), tmp_path / "out", heldout=0.2)["up_to_date"]


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_rows_that_come_and_go_while_they_are_read(planter, tmp_path, monkeypatch, change):
    from puna.corpus import build

    path = planter.folder / "a.jsonl"
    lines = [json.dumps({"text": " ".join(planter.words())}) + "\n" for _ in range(6)]
    path.write_text("".join(lines[:5]))

    def meddle(*arguments):
        path.write_text("".join(lines if change == "more" else lines[:4]))
        return check(*arguments)

    check = build.check_no_leak
    monkeypatch.setattr(build, "check_no_leak", meddle)
    with pytest.raises(DataError, match=r" changed while it was read\. Build again when it is at rest"):
        build_corpus(str(planter.folder), tmp_path / "out")
    assert not (tmp_path / "out/corpus.json").exists()


def test_mistakes_are_named(planter, tmp_path):
    source, out = str(planter.folder), tmp_path / "out"
    with pytest.raises(DataError, match=r"There is nothing to read at no/such\. Give a folder or a file of text"):
        build_corpus("no/such", out)
    with pytest.raises(DataError, match=r"The folder .* holds no files"):
        build_corpus(source, out)
    planter.plant("short.txt", ["a", "b"])
    with pytest.raises(DataError, match=r"Of 1 documents in .* 0 are left \(removed: 1 too_short\)\. Give more"):
        build_corpus(source, out)
    planter.plant("one.txt", planter.words())
    with pytest.raises(DataError, match=r"1 are left \(removed: 1 too_short\), too few or too much alike to hold"):
        build_corpus(source, out)
    with pytest.raises(DataError, match=r"heldout is 1\.0\. Give the share of the bytes to hold out, from 0 to below"):
        build_corpus(source, out, heldout=1.0)
    with pytest.raises(DataError, match=r"near is 0\.5\. Give a Jaccard similarity from 0\.7 to 1, or 0 for exact"):
        build_corpus(source, out, near=0.5)
    with pytest.raises(DataError, match=r"The output folder .*inside lies inside the source .*\. Choose a folder"):
        build_corpus(source, planter.folder / "inside")
    assert build_corpus(source, out, heldout=0)["splits"]["heldout"] == {"documents": 0, "bytes": 0}


def test_odd_file_names(planter, tmp_path, rows):
    planter.plant("one.txt", planter.words())
    planter.plant("zwei ß\u2028.txt", planter.words())
    with open(os.fsencode(planter.folder) + b"/\xff.txt", "w") as file:
        file.write(" ".join(planter.words()))
    build_corpus(str(planter.folder), tmp_path / "out", heldout=0)
    assert [row["id"] for row in rows(tmp_path / "out/train.jsonl")] == ["one.txt", "zwei ß\u2028.txt", "\ufffd.txt"]
