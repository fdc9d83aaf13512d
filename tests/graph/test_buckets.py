"""Partitions and buckets: every edge in its bucket, every bucket once, and how many partitions an order reads."""

import itertools

import numpy as np
import pytest

from puna.errors import DataError
from puna.graph import graph as graphs
from puna.graph.buckets import Buckets, Residents, num_swaps, order_buckets, partition_rows
from puna.graph.importing import import_graph

KINDS = ("random", "affinity", "outside_in", "inside_out")


@pytest.fixture
def graph(tmp_path):
    from puna.graph.graph import Graph

    rng = np.random.default_rng(0)
    rows = "".join(f"n{h}\tr{r}\tn{t}\t{h + 0.5}\n" for h, r, t in rng.integers(0, [29, 3, 29], size=(500, 3)))
    (tmp_path / "a.tsv").write_text(rows)
    import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "graph", ("head", "relation", "tail", "weight"))
    return Graph.open(tmp_path / "graph")


@pytest.mark.parametrize("read_rows", [graphs.READ_ROWS, 64])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_edge_is_in_its_bucket_and_keeps_its_fields(graph, parts, read_rows, monkeypatch):
    monkeypatch.setattr(graphs, "READ_ROWS", read_rows)
    found = Buckets.open(graph, "train", parts)
    got = []
    for i in range(parts):
        for j in range(parts):
            edges = found.rows((i, j))
            assert len(edges) == found.size((i, j))
            heads, tails = edges.heads * parts + i, edges.tails * parts + j
            got += zip(heads.tolist(), edges.relations.tolist(), tails.tolist(), edges.weights.tolist(), strict=True)
    edges = graph.edges("train")
    columns = (edges.heads, edges.relations, edges.tails, edges.weights)
    assert sorted(got) == sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_partitions_are_even_and_hold_all_nodes():
    for parts in (1, 3, 7):
        sizes = [partition_rows(29, parts, p) for p in range(parts)]
        assert sum(sizes) == 29
        assert max(sizes) - min(sizes) <= 1
        assert sizes == [len(range(p, 29, parts)) for p in range(parts)]


@pytest.mark.parametrize("parts", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", [*KINDS, "buffered"])
def test_every_order_visits_each_bucket_once(kind, parts):
    order = order_buckets(kind, parts, np.random.default_rng(1), held=4)
    assert sorted(order) == [(i, j) for i in range(parts) for j in range(parts)]


@pytest.mark.parametrize("kind", ["outside_in", "inside_out"])
def test_layers(kind):
    order = order_buckets(kind, 6, np.random.default_rng(2))
    layers = [min(bucket) for bucket in order]
    assert layers == sorted(layers, reverse=kind == "inside_out")
    for at, (i, j) in enumerate(order):
        assert i == j or (j, i) in (order[at - 1], order[(at + 1) % len(order)])


def test_affinity_shares_a_partition_in_nearly_every_step():
    for parts in (8, 12):
        order = order_buckets("affinity", parts, np.random.default_rng(3))
        shared = [bool(set(a) & set(b)) for a, b in itertools.pairwise(order)]
        assert np.mean(shared) > 0.9


def test_swaps_by_order():
    """Two partitions held: a layered order reads about one partition for every two buckets, a random one more."""
    swaps = {kind: num_swaps(order_buckets(kind, 8, np.random.default_rng(4))) for kind in KINDS}
    assert swaps["inside_out"] < swaps["random"]
    assert swaps["affinity"] < swaps["random"]
    assert num_swaps([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]) == 3
    assert num_swaps([(0, 1), (2, 3), (0, 1)]) == 6
    assert num_swaps([(0, 1), (2, 3), (0, 1)], held=4) == 4


@pytest.mark.parametrize("held", [3, 4, 6])
def test_a_buffered_order_reads_little(held):
    """Hardly more than the lower bound of Mohoney et al. 2021 (section 4.2), far less than the others."""
    parts = 12
    order = order_buckets("buffered", parts, np.random.default_rng(5), held)
    least = [room + -(-(parts * (parts - 1) - room * (room - 1)) // (2 * (room - 1))) for room in (held, held - 1)]
    reads = num_swaps(order, held)
    assert least[0] <= reads <= 1.2 * least[1]
    assert reads < min(num_swaps(order_buckets(kind, parts, np.random.default_rng(5)), held) for kind in KINDS[:2])


@pytest.mark.parametrize("kind", [*KINDS, "buffered"])
@pytest.mark.parametrize("held", [2, 3, 4, 9])
def test_what_is_in_memory_along_an_order(kind, held):
    """A bucket's partitions are there when it trains, moves ahead leave them alone, no more than `held` are there."""
    order = order_buckets(kind, 6, np.random.default_rng(6), held) * 2
    residents, inside = Residents(held), set()

    def follow(moves, trained):
        for entering, leaving in moves:
            assert entering not in inside
            if leaving is not None:
                assert leaving not in trained
                inside.remove(leaving)
            inside.add(entering)
            assert len(inside) <= held

    for at, bucket in enumerate(order):
        follow(residents.now(order, at), set(bucket))
        assert set(bucket) <= inside
        follow(residents.ahead(order, at), set(bucket))
        assert set(bucket) <= inside
    if held >= 6:
        assert num_swaps(order, held) == 6


def test_a_place_to_spare_has_every_later_bucket_ready():
    """Three partitions held, buckets of two: after the first bucket none waits for the disk."""
    order = order_buckets("buffered", 8, np.random.default_rng(7), 3)
    residents = Residents(3)
    waits = []
    for at in range(len(order)):
        waits.append(len(residents.now(order, at)))
        residents.ahead(order, at)
    assert waits[0] in (1, 2)
    assert sum(waits[1:]) == 0


def test_edges_of_known_nodes_and_relations_are_left_out(graph):
    edges = graph.edges("train")
    found = Buckets.open(graph, "train", 3, known=([20], 3))
    heads = [bucket[0] + 3 * found.rows(bucket).heads for bucket in itertools.product(range(3), repeat=2)]
    tails = [bucket[1] + 3 * found.rows(bucket).tails for bucket in itertools.product(range(3), repeat=2)]
    wanted = (edges.heads >= 20) | (edges.tails >= 20)
    got = np.stack([np.concatenate(heads), np.concatenate(tails)], 1)
    np.testing.assert_array_equal(np.sort(got, 0), np.sort(np.stack([edges.heads, edges.tails], 1)[wanted], 0))
    with pytest.raises(DataError, match="has no edges with a new node or relation"):
        Buckets.open(graph, "train", 1, known=([29], 3))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("heads", 29, r"train.heads, row 8: heads has the number 29, but the graph has 29 nodes"),
        ("tails", -1, r"train.tails, row 8: tails has the number -1"),
        ("relations", 3, r"train.relations, row 8: relations has the number 3, but the graph has 3 relations"),
        ("weights", np.nan, r"train.weights, row 8: the weight is nan"),
    ],
)
def test_numbers_out_of_range_are_told_by_file_and_row(graph, parts, name, value, told):
    column = np.memmap(graph.folder / f"train.{name}", "f4" if name == "weights" else "i4", "r+")
    column[7] = value
    column.flush()
    with pytest.raises(DataError, match=told):
        Buckets.open(graph, "train", parts).rows((0, 0))
