"""Sources: which files are read, in which order, and what is refused."""

import gzip
import json
import platform

import pytest

from puna.corpus.documents import MAX_BYTES, open_source
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


def test_json_lines_plain_and_compressed(tmp_path):
    content = "\n".join(json.dumps({"text": text, "other": 1}) for text in ("one", "zwei ß", "\ud800")) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    documents = list(open_source(str(tmp_path)))
    assert [d.id for d in documents] == [f"{name}:{row}" for name in ("a.jsonl", "b.jsonl.gz") for row in (1, 2, 3)]
    assert [d.data for d in documents[:2]] == [b"one", "zwei ß".encode()]
    with pytest.raises(UnicodeDecodeError):
        documents[2].data.decode()
    assert open_source(str(tmp_path)).num_documents is None


@pytest.mark.parametrize("row", ['{"text": 3}', '{"txt": "a"}', "[]", '"text"', "{", '{"text": "a"} x'])
def test_bad_row_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"Row 2 of .*a\.jsonl is not a JSON object with a string under the key text"):
        ids(tmp_path)


def test_cut_gzip_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 500)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read \(Compressed file ended"):
        ids(tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read \(Not a gzipped file"):
        ids(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"There is nothing to read at .*none\. Give a folder of text or code files, a"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"The folder .* holds no files\. Give a folder"):
        open_source(str(tmp_path))


def test_large_files_are_read_up_to_the_limit(tmp_path):
    with open(tmp_path / "big", "wb") as file:
        file.truncate(MAX_BYTES + 100)
    (document,) = open_source(str(tmp_path))
    assert len(document.data) == MAX_BYTES + 1


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
