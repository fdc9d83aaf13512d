"""Softmax over every node by question, held to autograd in float64 and to what is computed edge by edge."""

from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from puna import recipe, run
from puna.graph import operators, questions
from puna.graph.budget import Sizes, memory
from puna.graph.config import GraphConfig, Operator
from puna.graph.graph import Edges
from puna.graph.questions import Asked, QuestionWorker, cut
from puna.graph.task import GraphTask
from puna.graph.worker import Part, Rates, Relations, Worker
from puna.train.config import ScheduleConfig
from puna.train.task import Cursor

DIM, NUM_NODES, NUM_RELATIONS = 6, 19, 3


def turned(operator, v, p):
    """g(v) by torch, from torch's own complex numbers."""
    if operator == "none":
        return v
    if operator == "translation":
        return v + p
    if operator == "diagonal":
        return v * p
    if operator in ("linear", "affine"):
        matrix, shift = p[: len(v) ** 2].reshape(len(v), len(v)), p[len(v) ** 2 :]
        return matrix @ v + shift if operator == "affine" else matrix @ v
    half = len(v) // 2
    factor = torch.polar(torch.ones_like(p), p) if operator == "rotation" else torch.complex(p[:half], p[half:])
    product = torch.complex(v[:half], v[half:]) * factor
    return torch.cat([product.real, product.imag])


def cubes(operator, v):
    half = len(v) // 2
    return (torch.hypot(v[:half], v[half:]) if operator in operators_of_pairs() else v.abs()).pow(3).sum()


def operators_of_pairs():
    return ("complex_diagonal", "rotation")


def naive(config, side, known, guessed, table, edges):
    """The loss and N3 of one side, edge by edge."""
    loss = torch.zeros((), dtype=torch.float64)
    n3 = torch.zeros((), dtype=torch.float64)
    for h, r, t, w in zip(edges.heads, edges.relations, edges.tails, edges.weights, strict=True):
        node, true = (h, t) if side == 0 else (t, h)
        anchor = turned(config.operator, known[node], table[r])
        scores = torch.stack([anchor @ other for other in guessed])
        loss = loss + w * (torch.logsumexp(scores, 0) - scores[true])
        n3 = n3 + w * (cubes(config.operator, known[node]) + cubes(config.operator, guessed[true]))
        if config.operator not in ("rotation", "none"):
            n3 = n3 + w * cubes(config.operator, table[r])
    return loss, config.n3 * n3


def make(config, num_edges, seed=0):
    rng = np.random.default_rng(seed)
    parts = [Part(rng.normal(size=(n, config.dim)).astype("f4"), np.zeros(n, "f4")) for n in (NUM_NODES, NUM_NODES - 4)]
    row = operators.identity(config.operator, config.dim)
    sides = []
    for _ in range(2):
        table = np.tile(row, (NUM_RELATIONS, 1)) + rng.normal(size=(NUM_RELATIONS, len(row))) * 0.3
        sides.append(Relations(table.astype("f4"), np.zeros_like(table, "f4")))
    heads, relations, tails = (rng.integers(n, size=num_edges).astype("i4") for n in (5, NUM_RELATIONS, NUM_NODES - 4))
    return parts, sides, Edges(heads, relations, tails, (rng.random(num_edges) + 0.5).astype("f4"))


def config_of(**values):
    return GraphConfig(**({"dim": DIM, "batch_edges": 40, "all_negs": True} | values))


def batches_of(edges, size):
    return [make() for make in cut([Asked.of(edges, side) for side in range(2)], size, np.random.default_rng(0))]


def by_row(batch, grads, num_rows):
    """Gradients by question, added up by known node."""
    out = np.zeros((num_rows, grads.shape[1]))
    np.add.at(out, batch.nodes, grads[: len(batch.nodes)])
    return out


@pytest.mark.parametrize("n3", [0.0, 0.1])
@pytest.mark.parametrize("operator", get_args(Operator))
def test_gradients_are_autograds(operator, n3, monkeypatch):
    """Two partitions of different sizes; questions in several blocks, the last one torn."""
    if n3 and operator in ("linear", "affine"):
        return
    monkeypatch.setattr(questions, "ROWS", 4)
    config = config_of(operator=operator, n3=n3)
    (head_part, tail_part), sides, edges = make(config, 30)
    worker = QuestionWorker(config, NUM_RELATIONS, NUM_NODES)
    for batch in batches_of(edges, 40):
        known, guessed = (head_part, tail_part) if batch.side == 0 else (tail_part, head_part)
        assert len(batch.nodes) > 8
        loss = worker.differentiate(batch, known, guessed, sides[batch.side])
        wide = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (known.vectors, guessed.vectors)]
        table = torch.tensor(sides[batch.side].table, dtype=torch.float64, requires_grad=True)
        wanted, penalty = naive(config, batch.side, *wide, table, edges)
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        (wanted + penalty).backward()
        found = by_row(batch, worker.known_grads, len(known.vectors))
        np.testing.assert_allclose(found, wide[0].grad, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(worker.grads[: len(guessed.vectors)], wide[1].grad, rtol=2e-4, atol=2e-5)
        if operator != "none":
            own = np.zeros(table.shape)
            own[worker.relation_unique[: worker.num_relations]] = worker.relation_grads[: worker.num_relations]
            np.testing.assert_allclose(own, table.grad, rtol=2e-4, atol=2e-5)


def test_products_of_bfloat16_are_near_those_of_float32(monkeypatch):
    monkeypatch.setattr(questions, "ROWS", 4)
    (head_part, tail_part), sides, edges = make(config_of(), 30)
    for batch in batches_of(edges, 40):
        known, guessed = (head_part, tail_part) if batch.side == 0 else (tail_part, head_part)
        found = []
        for products in ("fp32", "bf16"):
            worker = QuestionWorker(config_of(products=products), NUM_RELATIONS, NUM_NODES)
            loss = worker.differentiate(batch, known, guessed, sides[batch.side])
            found.append((loss, worker.known_grads, worker.grads.numpy(), worker.relation_grads))
        exact, near = found
        assert 1e-6 < abs(near[0] / exact[0] - 1) < 0.01
        for wanted, gradient in zip(exact[1:], near[1:], strict=True):
            np.testing.assert_allclose(gradient, wanted, atol=0.02 * np.abs(wanted).max())


def test_both_sides_are_what_is_computed_edge_by_edge():
    """The gradients of one batch edge by edge, which is of both sides, are the sum of the two batches of questions."""
    config = config_of(operator="complex_diagonal", n3=0.05)
    (part, _), sides, edges = make(config, 30)
    edges = Edges(edges.heads, edges.relations, edges.tails)
    slow = Worker(config, NUM_RELATIONS, NUM_NODES)
    loss = slow.differentiate(edges, edges, 1, part, part, sides)
    wanted = np.zeros((NUM_NODES, DIM))
    for row, gradient in zip(slow.rows, slow.grads.numpy(), strict=True):
        if row >= 0:
            wanted[row] += gradient
    fast, found, found_loss = QuestionWorker(config, NUM_RELATIONS, NUM_NODES), np.zeros((NUM_NODES, DIM)), 0.0
    for batch in batches_of(edges, 40):
        found_loss += fast.differentiate(batch, part, part, sides[batch.side])
        found += fast.grads.numpy() + by_row(batch, fast.known_grads, NUM_NODES)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("same", [True, False])
def test_a_step_is_row_adagrads(same):
    """One partition takes both gradients in one step; of two, each takes its own."""
    config = config_of(operator="complex_diagonal")
    (head_part, tail_part), sides, edges = make(config, 30)
    tail_part = head_part if same else tail_part
    batch = next(b for b in batches_of(edges, 40) if b.side == 0)
    worker = QuestionWorker(config, NUM_RELATIONS, NUM_NODES)
    worker.differentiate(batch, head_part, tail_part, sides[0])
    known = by_row(batch, worker.known_grads, NUM_NODES)
    guessed = worker.grads[: len(tail_part.vectors)].numpy().astype(float)
    wanted = [(head_part, known + guessed)] if same else [(head_part, known), (tail_part, guessed)]
    before = [np.array(part.vectors) for part, _ in wanted]
    _, bad = worker.train(batch, edges, 1, head_part, tail_part, sides, Rates(0.1, 0.1))
    assert bad == 0
    for (part, gradient), vectors in zip(wanted, before, strict=True):
        sums = np.square(gradient).mean(1)
        steps = 0.1 * gradient / (np.sqrt(sums) + 1e-10)[:, None]
        np.testing.assert_allclose(part.vectors, vectors - steps, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(part.sums, sums, rtol=1e-3, atol=1e-7)


def test_batches_hold_every_edge_once_a_side_and_questions_whole():
    config = config_of()
    _, _, edges = make(config, 400)
    batches = batches_of(edges, 16)
    for side in range(2):
        mine = [b for b in batches if b.side == side]
        asked = [(n, r) for b in mine for n, r in zip(b.nodes.tolist(), b.relations.tolist(), strict=True)]
        assert max(Counter(asked).values()) == 1
        found = Counter()
        for b in mine:
            assert len(b.nodes) <= 16
            assert len(b.true) == len(b.weights) == b.starts[-1]
            sizes = np.diff(b.starts)
            columns = (np.repeat(b.nodes, sizes), np.repeat(b.relations, sizes), b.true, b.weights)
            found.update(zip(*(x.tolist() for x in columns), strict=True))
        known, true = (edges.heads, edges.tails) if side == 0 else (edges.tails, edges.heads)
        assert found == Counter(zip(*(x.tolist() for x in (known, edges.relations, true, edges.weights)), strict=True))
    assert [b.side for b in batches] != sorted(b.side for b in batches)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    config = config_of()
    (part, _), sides, edges = make(config, 30)
    part.vectors[2, 1] = np.nan
    before, table = part.vectors.copy(), sides[0].table.copy()
    batch = next(b for b in batches_of(edges, 40) if b.side == 0)
    _, bad = QuestionWorker(config, NUM_RELATIONS, NUM_NODES).train(batch, edges, 1, part, part, sides, Rates(0.1, 0.1))
    assert bad > 0
    np.testing.assert_array_equal(part.vectors, before)
    np.testing.assert_array_equal(sides[0].table, table)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"all_negs": False, "num_batch_negs": 10}, False),
        ({"reciprocal": False}, False),
        ({"loss": "logistic"}, False),
        ({"comparator": "cos"}, False),
        ({"bias": True}, False),
        ({"max_norm": 1.0}, False),
    ],
)
def test_where_questions_are_possible(values, expected):
    assert config_of(**values).by_question is expected


def test_a_run_learns_the_planted_communities(planted, tmp_path):
    """Half of the nodes fit a relation: the MRR of a model that knows the communities and nothing else is 0.13."""
    settings = ["--graph.all_negs", "true", "--graph.dim", "16", "--graph.epochs", "20", "--run.num_threads", "1"]
    outcome = run.train(
        recipe.load("graph-small", ["--data.path", str(planted.folder), "--run.dir", str(tmp_path / "r"), *settings])
    )
    assert outcome["heldout_mrr"] > 0.12


def test_memory_counts_the_tables_gradient_and_the_scores():
    config = config_of(dim=400, batch_edges=1000)
    workers = [memory(config, Sizes(15_000, 0, 0, False, 0), n, False).workers for n in (1, 2)]
    assert workers[1] - workers[0] == 4 * (15_000 * 400 + 512 * 15_008 + 2536 * 400)


@pytest.mark.parametrize(
    ("values", "times"),
    [({}, 2), ({"num_chunks": 2}, 2 * 6), ({"num_partitions": 2}, 2 * 4 * 3)],
)
def test_edges_are_grouped_once_where_units_have_the_same(planted, tmp_path, monkeypatch, values, times):
    """Two sides, three epochs; every unit has its own order of questions, and each edge stands in it once a side."""
    sorts, asked = [], Asked.of
    monkeypatch.setattr(Asked, "of", lambda edges, side: sorts.append(side) or asked(edges, side))
    config = config_of(epochs=3, dim=8, **values)
    task = GraphTask(config, ScheduleConfig(decay="constant"), planted, tmp_path, num_threads=1)
    orders = []
    for unit in task.units(Cursor()):
        edges = task._taken(unit)
        batches = [make() for make in task._batches(unit, edges)]
        for side, names in ((0, ("heads", "tails")), (1, ("tails", "heads"))):
            mine = [batch for batch in batches if batch.side == side]
            known = np.concatenate([np.repeat(batch.nodes, np.diff(batch.starts)) for batch in mine])
            found = Counter(zip(known.tolist(), np.concatenate([b.true for b in mine]).tolist(), strict=True))
            assert found == Counter(zip(*(getattr(edges, name).tolist() for name in names), strict=True))
        orders.append(batches[0].nodes.tolist())
    assert len(sorts) == times
    assert len({tuple(order) for order in orders}) == len(orders)


def test_all_threads_train_one_batch_the_same_as_one(planted, tmp_path):
    """Not as workers without locks do: bit for bit the same each time, and as one thread but for rounding."""

    def trained(name, num_threads):
        config = config_of(epochs=3, dim=8, n3=1e-3)
        task = GraphTask(config, ScheduleConfig(decay="constant"), planted, tmp_path / name, num_threads=num_threads)
        losses = [task.step(unit).loss for unit in task.units(Cursor())]
        return losses, task.scorer().vectors(np.arange(planted.counts[0]), 0)

    one, two, again = trained("a", 1), trained("b", 3), trained("c", 3)
    assert two[0] == again[0]
    np.testing.assert_array_equal(two[1], again[1])
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(two[1], one[1], atol=1e-4)
