"""Ranks held to a double loop over all nodes: raw and filtered, ties, partitions, both kinds of relations."""

import dataclasses

import numpy as np
import pytest
import torch

from puna.graph import operators, ranking
from puna.graph.config import GraphConfig
from puna.graph.graph import Edges
from puna.graph.ranking import Known, Ranks, Scorer, draw_all, draw_candidates, rank, summary
from puna.graph.worker import Relations


def scorer_of(graph, table, sides=2, **values):
    config = GraphConfig(**({"dim": table.shape[1], "operator": "translation"} | values))
    size = operators.num_parameters(config.operator, config.dim)
    rng = np.random.default_rng(9)
    relations = [
        Relations(rng.normal(size=(graph.num_relations, size)).astype("f4"), np.zeros((0, 0), "f4"))
        for _ in range(1 + config.reciprocal)
    ]
    return Scorer(config, graph, lambda part, rows=slice(None): table[part :: config.num_partitions][rows], relations)


def naive_score(scorer, side, given, relation, candidate):
    config = scorer.config
    table = scorer.relations[side if config.reciprocal else 0].table.astype(np.float64)
    turn = lambda v: v + table[relation]  # noqa: E731
    a, b = given.astype(np.float64), candidate.astype(np.float64)
    a, b = (a, turn(b)) if not config.reciprocal and side == 0 else (turn(a), b)
    if config.comparator == "cos":
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return a @ b if config.comparator in ("dot", "cos") else -np.linalg.norm(a - b)


def naive_ranks(scorer, table, edges, known):
    raw, filtered = np.zeros((2, len(edges))), np.zeros((2, len(edges)))
    for i, (h, r, t) in enumerate(zip(edges.heads, edges.relations, edges.tails, strict=True)):
        for side, (given, true) in enumerate([(h, t), (t, h)]):
            values = np.array([naive_score(scorer, side, table[given], r, v) for v in table])
            others = [n for n in range(len(table)) if n != true]
            new = [n for n in others if ((h, r, n) if side == 0 else (n, r, t)) not in known]
            for out, candidates in ((raw, others), (filtered, new)):
                higher = sum(values[n] > values[true] + 1e-9 for n in candidates)
                same = sum(abs(values[n] - values[true]) <= 1e-9 for n in candidates)
                out[side, i] = 1 + higher + same / 2
    return raw, filtered


def known_of(graph):
    edges = [graph.edges(split) for split in graph.splits]
    return {x for e in edges for x in zip(e.heads.tolist(), e.relations.tolist(), e.tails.tolist(), strict=True)}


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("comparator", ["dot", "cos", "l2"])
@pytest.mark.parametrize("num_partitions", [1, 4])
def test_ranks_are_the_double_loops(planted, num_partitions, comparator, reciprocal, monkeypatch):
    monkeypatch.setattr(ranking, "EVAL_QUERIES", 16)
    monkeypatch.setattr(ranking, "EVAL_NODES", 11)
    table = np.random.default_rng(1).normal(size=(planted.num_nodes, 5)).astype("f4")
    values = {"num_partitions": num_partitions, "comparator": comparator, "reciprocal": reciprocal}
    scorer = scorer_of(planted, table, **values)
    edges = planted.edges("test").take(slice(40))
    got = rank(scorer, edges)
    raw, filtered = naive_ranks(scorer, table, edges, known_of(planted))
    np.testing.assert_array_equal(got.raw, raw)
    np.testing.assert_array_equal(got.filtered, filtered)
    assert (got.filtered <= got.raw).all()


def test_a_tie_is_worth_its_mean_place(planted):
    """All vectors equal: every rank is the middle, by chance, and not the best or the worst."""
    table = np.ones((planted.num_nodes, 4), "f4")
    scorer = scorer_of(planted, table)
    edges = planted.edges("test").take(slice(5))
    assert (rank(scorer, edges).raw == (planted.num_nodes + 1) / 2).all()


def test_known_nodes_by_a_loop(planted):
    edges = planted.edges("test").take(slice(30))
    known = known_of(planted)
    for side in range(2):
        found = Known(planted, edges, side)
        for i, (h, r, t) in enumerate(zip(edges.heads, edges.relations, edges.tails, strict=True)):
            wanted = {x[2 if side == 0 else 0] for x in known if x[1] == r and x[2 * side] == (h, t)[side]}
            assert found.nodes[found.offsets[i] : found.offsets[i + 1]].tolist() == sorted(wanted)
            assert found.sizes()[i] == len(wanted) - 1


def test_figures():
    ranks = np.array([[1.0, 4.0, 11.0], [2.0, 1.0, 100.0]])
    got = summary(ranks, np.full(ranks.shape, 101.0))
    assert got["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 11 + 1 / 2 + 1 + 1 / 100) / 6)
    assert got["mr"] == pytest.approx(119 / 6)
    assert [got[f"hits{k}"] for k in (1, 3, 10, 50)] == [2 / 6, 3 / 6, 4 / 6, 5 / 6]
    assert got["auc"] == pytest.approx(np.mean([1, 0.97, 0.9, 0.99, 1, 0.01]))
    low, high = got["mrr_interval"]
    by_edge = np.array([0.75, 0.625, (1 / 11 + 1 / 100) / 2])
    assert high - low == pytest.approx(2 * 1.96 * by_edge.std(ddof=1) / np.sqrt(3))


def test_relations_are_told_apart():
    edges = Edges(*(np.array(column, "i4") for column in ([0, 1, 2], [1, 0, 1], [1, 2, 0])))
    ranks = np.array([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    among = np.full((2, 3), 9.0)
    got = Ranks(edges, ranks, ranks, among, among).by_relation(["likes", "knows"])
    assert [(record["relation"], record["num_edges"], record["mrr"]) for record in got] == [
        ("knows", 2, 0.75),
        ("likes", 1, 0.25),
    ]


def test_a_mapped_table_is_ranked_as_one_in_memory(planted, tmp_path):
    table = np.random.default_rng(1).normal(size=(planted.num_nodes, 5)).astype("f4")
    np.save(tmp_path / "t.npy", table)
    mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
    edges = planted.edges("test")
    scorer = scorer_of(planted, table)
    other = dataclasses.replace(scorer_of(planted, mapped), relations=scorer.relations)
    torch.testing.assert_close(rank(scorer, edges).raw, rank(other, edges).raw)


@pytest.mark.parametrize("candidates", [0, 200])
@pytest.mark.parametrize("nodes", [7, 1 << 14])
def test_equal_vectors_tie_in_whatever_pieces_they_are_multiplied(planted, nodes, candidates, monkeypatch):
    monkeypatch.setattr(ranking, "EVAL_NODES", nodes)
    table = np.tile(np.random.default_rng(3).normal(size=100).astype("f4"), (planted.num_nodes, 1))
    edges = planted.edges("test")
    drawn = draw_all(planted, edges, candidates, "uniform") if candidates else None
    got = rank(scorer_of(planted, table, operator="none"), edges, drawn)
    np.testing.assert_array_equal(got.raw, (got.num_raw + 1) / 2)


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("sampling", ["uniform", "prevalence"])
@pytest.mark.parametrize("num_partitions", [1, 4])
def test_ranks_among_drawn_nodes_are_a_loops(planted, num_partitions, sampling, reciprocal, monkeypatch):
    monkeypatch.setattr(ranking, "EVAL_QUERIES", 16)
    table = np.random.default_rng(1).normal(size=(planted.num_nodes, 5)).astype("f4")
    scorer = scorer_of(planted, table, num_partitions=num_partitions, reciprocal=reciprocal)
    edges, known = planted.edges("test").take(slice(30)), known_of(planted)
    drawn = draw_candidates(planted, 90, sampling, seed=5)
    got = rank(scorer, edges, {(0, 0): drawn})
    for i, (h, r, t) in enumerate(zip(edges.heads, edges.relations, edges.tails, strict=True)):
        for side, (given, true) in enumerate([(h, t), (t, h)]):
            values = np.array([naive_score(scorer, side, table[given], r, v) for v in table])
            others = [n for n in drawn[side] if n != true]
            new = [n for n in others if ((h, r, n) if side == 0 else (n, r, t)) not in known]
            for ranks, among, kept in ((got.raw, got.num_raw, others), (got.filtered, got.num_filtered, new)):
                higher = sum(values[n] > values[true] + 1e-9 for n in kept)
                same = sum(abs(values[n] - values[true]) <= 1e-9 for n in kept)
                assert (ranks[side, i], among[side, i]) == (1 + higher + same / 2, 1 + len(kept))


def test_drawn_nodes_follow_their_sampling(planted):
    """As often as nodes are tails (heads) of training edges, or evenly; a function of the seed alone."""
    edges = planted.edges("train")
    for side, ends in enumerate((edges.tails, edges.heads)):
        share = np.bincount(ends, minlength=60) / len(edges)
        drawn = np.bincount(draw_candidates(planted, 200_000, "prevalence", 1)[side], minlength=60) / 200_000
        np.testing.assert_allclose(drawn, share, atol=0.003)
    even = np.bincount(draw_candidates(planted, 200_000, "uniform", 1)[0], minlength=60) / 200_000
    np.testing.assert_allclose(even, 1 / 60, atol=0.003)
    same, other = (draw_candidates(planted, 50, "prevalence", seed) for seed in (1, 2))
    assert (same == draw_candidates(planted, 50, "prevalence", 1)).all()
    assert (same != other).any()


def test_ties_hold_where_the_first_guess_at_a_true_nodes_score_is_off(planted, monkeypatch):
    """As if the product of the true nodes alone had rounded otherwise than that with all nodes."""
    scores = ranking._Turned.scores

    def off(self, anchors, facts, vectors):
        found = scores(self, anchors, facts, vectors)
        return found * np.float32(1.0001) if len(vectors) == len(anchors) else found

    monkeypatch.setattr(ranking._Turned, "scores", off)
    table = np.tile(np.random.default_rng(3).normal(size=100).astype("f4"), (planted.num_nodes, 1))
    got = rank(scorer_of(planted, table, operator="none"), planted.edges("test"))
    np.testing.assert_array_equal(got.raw, (got.num_raw + 1) / 2)
