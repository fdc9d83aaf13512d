"""Edge files become a graph folder: every form, stable numbers, and mistakes told by file and line."""

import gzip
import json
import lzma

import numpy as np
import pytest

from puna.errors import DataError
from puna.graph import walks as walking
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.walks import Walks
from puna.sparse import text as reading

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
        ("a.tsv.gz", gzip.compress(text(), mtime=0), {}),
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
        "num_unseen": 0,
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
        ("a.tsv", b"a\tb\t1\n\nb\tc\tnan\n", {"columns": ("head", "tail", "weight")}, ["line 3: the weight 'nan'"]),
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


def test_names_with_returns_and_odd_lengths_keep_their_numbers(tmp_path):
    names = ["", "a", "a\r", "ä" * 7, "12345678", "123456789", "b\x0bc", "\u2028"]
    rows = [f"{a}x\t{b}y" for a in names for b in names]
    graph = imported(tmp_path, "a.tsv", "".join(f"{row}\n" for row in rows).encode(), columns=("head", "tail"))
    found, edges = graph.names(), graph.edges("train")
    assert [f"{found[h]}\t{found[t]}" for h, t in zip(edges.heads, edges.tails, strict=True)] == rows


def test_a_relation_that_no_training_edge_has(tmp_path):
    (tmp_path / "train.tsv").write_bytes(text())
    (tmp_path / "test.tsv").write_text("anna\tknows\tbert\n\nanna\thates\tbert\n")
    with pytest.raises(DataError, match=r"test.tsv, line 3: no training edge has the relation 'hates'"):
        import_graph({"test": tmp_path / "test.tsv", "train": tmp_path / "train.tsv"}, tmp_path / "graph")


def test_nodes_that_training_has_not_seen_are_counted(tmp_path):
    (tmp_path / "train.tsv").write_bytes(text())
    (tmp_path / "test.tsv").write_text("dora\tknows\tbert\n")
    told = import_graph({name: tmp_path / f"{name}.tsv" for name in ("train", "test")}, tmp_path / "graph")
    assert told["num_unseen"] == 1


def test_a_graph_that_is_added_to_keeps_its_numbers(tmp_path):
    old = imported(tmp_path, "a.tsv", text())
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    (tmp_path / "b.tsv").write_text("dora\tknows\tanna\nanna\thates\tcarl\n")
    (tmp_path / "c.tsv").write_text("dora\tlikes\tbert\n")
    told = import_graph(
        {"test": tmp_path / "c.tsv", "train": tmp_path / "b.tsv"}, tmp_path / "grown", add=tmp_path / "graph"
    )
    assert (told["num_new_nodes"], told["num_nodes"], told["edges"]) == (1, 4, {"train": 6, "test": 1})
    grown = Graph.open(tmp_path / "grown")
    assert grown.names() == ["anna", "bert", "carl", "dora"]
    assert grown.relation_names() == ["knows", "likes", "hates"]
    assert triples(grown) == [*LINES, "dora\tknows\tanna", "anna\thates\tcarl"]
    assert triples(grown, "test") == ["dora\tlikes\tbert"]
    assert {path.name: path.read_bytes() for path in old.folder.iterdir()} == before
    assert grown.added_to == [old.version]
    (tmp_path / "d.tsv").write_text("emil\tknows\tanna\n")
    import_graph({"train": tmp_path / "d.tsv"}, tmp_path / "again", add=tmp_path / "grown")
    again = Graph.open(tmp_path / "again")
    assert again.added_to == [old.version, grown.version]
    assert triples(again, "test") == ["dora\tlikes\tbert"]


def test_weights_and_none_do_not_mix(tmp_path):
    imported(tmp_path, "a.tsv", text())
    (tmp_path / "b.tsv").write_text("a\tb\t2\n")
    with pytest.raises(DataError, match="has edges with no weights"):
        import_graph(
            {"train": tmp_path / "b.tsv"}, tmp_path / "grown", ("head", "tail", "weight"), add=tmp_path / "graph"
        )


# --- walks ----------------------------------------------------------------------------------------------------------


def walked(tmp_path, rows, **values):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    walks = Walks(**({"per_node": 3, "length": 12, "window": 4} | values))
    import_graph({"train": path}, tmp_path / "walked", ("head", "tail"), walks=walks)
    return Graph.open(tmp_path / "walked")


def test_walks_stay_within_reach_and_count_every_pair_once(tmp_path, monkeypatch):
    """On a ring: pairs stand at most `window` apart; as many as the windows hold; however they are cut up on disk."""
    ring = [(n, (n + 1) % 30) for n in range(30)]
    graph = walked(tmp_path, ring)
    names = [int(name) for name in graph.names()]
    edges = graph.edges("train")
    apart = [(names[h] - names[t]) % 30 for h, t in zip(edges.heads, edges.tails, strict=True)]
    assert {min(d, 30 - d) for d in apart} <= {1, 2, 3, 4}
    pairs = list(zip(edges.heads.tolist(), edges.tails.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    expected = 90 * sum(np.mean([min(w, 11 - n) for w in (1, 2, 3, 4)]) for n in range(12))
    assert 0.75 * expected < edges.weights.sum() < expected
    assert graph.splits["links"] == {"edges": 30, "weighted": False}
    monkeypatch.setattr(walking, "PAIRS", 50)
    monkeypatch.setattr(walking, "STARTS", 7)
    (tmp_path / "again").mkdir()
    again = walked(tmp_path / "again", ring).edges("train")
    found = [dict(zip(zip(e.heads, e.tails, strict=True), e.weights, strict=True)) for e in (edges, again)]
    assert found[0] == found[1]


def test_walks_over_two_parts_never_meet_and_follow_the_seed(tmp_path):
    rows = [(f"a{n}", f"a{m}") for n in range(5) for m in range(n)] + [
        (f"b{n}", f"b{m}") for n in range(5) for m in range(n)
    ]
    weights = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        graph = walked(folder, rows, seed=seed)
        names, edges = graph.names(), graph.edges("train")
        assert all(names[h][0] == names[t][0] for h, t in zip(edges.heads, edges.tails, strict=True))
        weights.append(edges.weights.tolist())
    assert weights[0] == weights[1] != weights[2]


def test_walks_over_weights_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\t2\n")
    with pytest.raises(DataError, match="have weights, and walks take every edge alike"):
        import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "g", ("head", "tail", "weight"), walks=Walks(2))
