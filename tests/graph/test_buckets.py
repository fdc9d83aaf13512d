"""Partitions and buckets: every edge in its bucket, every bucket once, and how many partitions an order reads."""

import itertools

import numpy as np
import pytest

from puna.graph import buckets
from puna.graph.buckets import Buckets, num_swaps, order_buckets, partition_rows
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


@pytest.mark.parametrize("read_rows", [buckets.READ_ROWS, 64])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_edge_is_in_its_bucket_and_keeps_its_fields(graph, parts, read_rows, monkeypatch):
    monkeypatch.setattr(buckets, "READ_ROWS", read_rows)
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
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_visits_each_bucket_once(kind, parts):
    order = order_buckets(kind, parts, np.random.default_rng(1))
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
