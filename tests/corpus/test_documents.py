"""Sources: which files are read, in which order, and what is refused."""

import gzip
import json
import platform

import pytest

from puna.corpus.documents import open_source
from puna.errors import DataError


def ids(source) -> list[str]:
    return [document.id for document in open_source(str(source))]


def test_folder_tree_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b/c.md", "B.c", ".hidden", ".git/x", "__pycache__/y.pyc", "node_modules/m.js"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert ids(tmp_path) == ["B.c", "a/b/c.md", "a/z.py", "b.txt"]
    assert [d.data for d in open_source(str(tmp_path))] == [b"B.c", b"a/b/c.md", b"a/z.py", b"b.txt"]
    assert open_source(str(tmp_path)).num_documents == 4


def test_single_file(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"text")
    assert ids(tmp_path / "one.txt") == ["one.txt"]
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"more text"))
    assert [d.data for d in open_source(str(tmp_path / "two.txt.gz"))] == [b"more text"]


def test_rows_of_json_lines_are_documents(tmp_path):
    content = "\n".join(json.dumps({"text": text, "other": 1}) for text in ("one", "zwei ß", "\ud800")) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    documents = list(open_source(str(tmp_path)))
    assert [d.id for d in documents] == [f"{name}:{row}" for name in ("a.jsonl", "b.jsonl.gz") for row in (1, 2, 3)]
    assert [d.data for d in documents[:2]] == [b"one", "zwei ß".encode()]
    with pytest.raises(UnicodeDecodeError):
        documents[2].data.decode()
    assert open_source(str(tmp_path)).num_documents is None


def test_damaged_files_do_not_end_the_reading(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.txt").write_bytes(b"text")
    documents = list(open_source(str(tmp_path)))
    assert [(d.id, d.data, d.reason) for d in documents] == [("a.jsonl.gz", b"", "damaged"), ("b.txt", b"text", "")]
    assert documents[0].detail == "Not a gzipped file (b'no')"


def test_a_file_that_vanishes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    source = open_source(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    assert [(d.id, d.reason) for d in source] == [("a.txt", "unreadable")]
    assert source.sha256()


def test_the_library_that_extracts_pages_is_part_of_the_result(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    assert open_source(str(tmp_path)).libraries == {}
    (tmp_path / "b.warc.gz").write_bytes(b"")
    assert list(open_source(str(tmp_path)).libraries) == ["trafilatura"]


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"There is nothing to read at .*none\. Give a folder or a file of text, code"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"The folder .* holds no files\. Give a folder"):
        open_source(str(tmp_path))


def test_hash_depends_on_names_and_content(tmp_path):
    (tmp_path / "a").write_text("one")
    seen = {open_source(str(tmp_path)).sha256()}
    (tmp_path / "a").write_text("two")
    seen.add(open_source(str(tmp_path)).sha256())
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(open_source(str(tmp_path)).sha256())
    assert len(seen) == 3
    assert open_source(str(tmp_path)).sha256() in seen


def test_stdlib_is_source_without_tests():
    source = open_source("stdlib")
    assert source.facts == {"name": "stdlib", "python": platform.python_version()}
    assert {"abc.py", "json/decoder.py", "idlelib/editor.py", "lib2to3/pytree.py"} & set(source.files)
    assert all(name.endswith(".py") for name in source.files)
    parts = {part for name in source.files for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in source.files)
    assert 8e6 < sum((source.root / name).stat().st_size for name in source.files) < 20e6
