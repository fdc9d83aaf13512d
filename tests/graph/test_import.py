"""Edge files become a graph folder: every form, stable numbers, and mistakes told by file and line."""

import gzip
import json
import lzma

import numpy as np
import pytest

from puna.errors import DataError
from puna.graph import read as reading
from puna.graph.graph import Graph
from puna.graph.importing import import_graph

LINES = ["anna\tknows\tbert", "bert\tknows\tcarl", "carl\tlikes\tanna", "anna\tlikes\tanna"]


def triples(graph, split="train"):
    edges, nodes, relations = graph.edges(split), graph.names(), graph.relation_names()
    return [
        f"{nodes[h]}\t{relations[r]}\t{nodes[t]}"
        for h, r, t in zip(edges.heads, edges.relations, edges.tails, strict=True)
    ]


def imported(tmp_path, name, data, **options):
    path = tmp_path / name
    path.write_bytes(data)
    import_graph({"train": path}, tmp_path / "graph", **options)
    return Graph.open(tmp_path / "graph")


def text(separator="\t", end="\n"):
    return "".join(line.replace("\t", separator) + end for line in LINES).encode()


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("a.tsv", text(), {}),
        ("a.txt", text(end="\r\n"), {}),
        ("a.txt", text()[:-1], {}),
        ("a.txt", b"\n" + text() + b"\n\n", {}),
        ("a.csv", text(","), {}),
        ("a.csv", b"head,relation,tail\n" + text(","), {"header": True}),
        ("a.csv", text(",").replace(b"anna,", b'"anna",'), {}),
        ("a.txt", text("|"), {"delimiter": "|"}),
        ("a.tsv.gz", gzip.compress(text()), {}),
        ("a.csv.xz", lzma.compress(text(",")), {}),
    ],
)
def test_every_form_gives_the_same_edges(tmp_path, name, data, options):
    graph = imported(tmp_path, name, data, **options)
    assert triples(graph) == LINES
    assert graph.names() == ["anna", "bert", "carl"]


def test_zstd(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    assert triples(imported(tmp_path, "a.tsv.zst", zstd.compress(text()))) == LINES


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = zip(*(line.split("\t") for line in LINES), strict=True)
    pq.write_table(pa.table(dict(zip("hrt", map(list, columns), strict=True))), tmp_path / "a.parquet")
    import_graph({"train": tmp_path / "a.parquet"}, tmp_path / "graph")
    assert triples(Graph.open(tmp_path / "graph")) == LINES


def test_blocks_of_any_size_give_the_same_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 7)
    assert triples(imported(tmp_path, "a.tsv", text())) == LINES


def test_many_names_keep_their_numbers_through_the_growth_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 14)
    pairs = [(f"node-{(7919 * n) % 20_011}", f"node-{n}") for n in range(20_011)]
    data = "".join(f"{a}\t{b}\n" for a, b in pairs).encode()
    graph = imported(tmp_path, "a.tsv", data, columns=("head", "tail"))
    edges, names = graph.edges("train"), graph.names()
    assert [(names[h], names[t]) for h, t in zip(edges.heads, edges.tails, strict=True)] == pairs
    assert graph.num_nodes == len(set(names)) == 20_011


def test_splits_share_numbers_and_train_comes_first(tmp_path):
    for name, lines in (("train", LINES), ("test", ["dora\tknows\tbert"])):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    told = import_graph({"train": tmp_path / "train", "test": tmp_path / "test"}, tmp_path / "graph")
    assert told["edges"] == {"train": 4, "test": 1}
    graph = Graph.open(tmp_path / "graph")
    assert graph.names() == ["anna", "bert", "carl", "dora"]
    assert triples(graph, "test") == ["dora\tknows\tbert"]


def test_weights_are_floats(tmp_path):
    graph = imported(tmp_path, "a.tsv", b"a\tb\t0.5\nb\tc\t2e-3\n", columns=("head", "tail", "weight"))
    np.testing.assert_array_equal(graph.edges("train").weights, np.array([0.5, 2e-3], "f4"))
    assert graph.relation_names() == ["edge"]


def test_a_field_can_be_left_out(tmp_path):
    graph = imported(tmp_path, "a.tsv", b"1\ta\tb\n2\tb\tc\n", columns=("-", "head", "tail"))
    assert graph.names() == ["a", "b", "c"]


def test_real_triples_keep_their_counts(tmp_path, data_dir):
    folder = data_dir / "kg-nations"
    splits = {name: folder / f"{name}.txt" for name in ("train", "valid", "test")}
    told = import_graph(splits, tmp_path / "graph")
    assert told == {
        "out": str(tmp_path / "graph"),
        "num_nodes": 14,
        "num_relations": 55,
        "edges": {"train": 1592, "valid": 199, "test": 201},
    }
    assert triples(Graph.open(tmp_path / "graph"), "test") == splits["test"].read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "data", "options", "words"),
    [
        ("a.tsv", text() + b"dora\tknows\n", {}, ["a.tsv, line 5 has 2 fields where 3", "dora", "--columns"]),
        ("a.tsv", text() + b"\ndora\t\tbert\n", {}, ["line 6 has an empty field"]),
        ("a.tsv", text() + b"a\tb\tc\td\n", {}, ["line 5 has 4 fields where 3"]),
        ("a.csv", text(",") + b'"a,b\n', {}, ["a.csv, from line 1 on"]),
        ("a.tsv.gz", b"no gzip", {}, ["a.tsv.gz is damaged"]),
        ("a.tsv.xz", lzma.compress(text())[:-9], {}, ["a.tsv.xz is damaged"]),
        ("a.parquet", b"no parquet", {}, ["a.parquet is no Parquet file"]),
        ("a.tsv", b"", {}, ["a.tsv has no edge"]),
        ("a.tsv", b"a\tb\tnan\n", {"columns": ("head", "tail", "weight")}, ["line 1: the weight 'nan'"]),
        ("a.tsv", b"a\tb\t1\nb\tc\tx\n", {"columns": ("head", "tail", "weight")}, ["line 2: the weight 'x'"]),
        ("a.tsv", b"a\tb\t-1\n", {"columns": ("head", "tail", "weight")}, ["line 1: the weight '-1'"]),
        ("a.tsv", text(), {"columns": ("head", "relation")}, ["head,relation do not describe an edge"]),
        ("a.tsv", text(), {"columns": ("head", "tail", "tall")}, ["head,tail,tall do not describe"]),
    ],
)
def test_mistakes_are_told_by_file_and_line(tmp_path, name, data, options, words):
    with pytest.raises(DataError) as told:
        imported(tmp_path, name, data, **options)
    assert all(word in str(told.value) for word in words), told.value
    assert not (tmp_path / "graph" / "graph.json").exists()


def test_a_missing_file_and_a_graph_that_is_there(tmp_path):
    with pytest.raises(DataError, match=r"no edge file at .*none.tsv"):
        import_graph({"train": tmp_path / "none.tsv"}, tmp_path / "graph")
    imported(tmp_path, "a.tsv", text())
    with pytest.raises(DataError, match="holds a graph already"):
        import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "graph")


def test_a_graph_that_is_none_torn_or_of_another_format(tmp_path):
    with pytest.raises(DataError, match="holds no graph"):
        Graph.open(tmp_path)
    graph = imported(tmp_path, "a.tsv", text())
    with pytest.raises(DataError, match="no split 'valid'; it has train"):
        graph.edges("valid")
    (graph.folder / "train.heads").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"train.heads should have 16 bytes and has 4"):
        Graph.open(graph.folder)
    manifest = graph.folder / "graph.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(raw | {"format_version": 99}))
    with pytest.raises(DataError, match="format 99"):
        Graph.open(graph.folder)
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"graph.json is damaged"):
        Graph.open(graph.folder)
