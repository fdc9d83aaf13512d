"""Scores, losses and gradients of the hot path, held to naive loops and to autograd in float64."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch

from puna.graph import losses, operators, scores
from puna.graph.config import Comparator, GraphConfig, Loss, Operator
from puna.graph.graph import Edges
from puna.graph.tables import adagrad, draw, fill_normal, scatter
from puna.graph.task import fresh_relations
from puna.graph.worker import Part, Rates, Relations, Worker

OPERATORS, COMPARATORS, LOSSES = get_args(Operator), get_args(Comparator), get_args(Loss)
DIM, NUM_NODES, NUM_RELATIONS = 6, 23, 4


# --- what the kernels are held to -----------------------------------------------------------------------------------


def turned(operator, v, p):
    """g(v), as the table in the sheet says it, for one vector."""
    half = len(v) // 2
    if operator == "none":
        return v
    if operator == "translation":
        return v + p
    if operator == "diagonal":
        return v * p
    if operator in ("linear", "affine"):
        matrix, shift = p[: len(v) ** 2].reshape(len(v), len(v)), p[len(v) ** 2 :]
        return matrix @ v + shift if operator == "affine" else matrix @ v
    real, imag = (p[:half], p[half:]) if operator == "complex_diagonal" else (torch.cos(p), torch.sin(p))
    a, b = v[:half], v[half:]
    return torch.cat([a * real - b * imag, a * imag + b * real])


def score(comparator, bias, a, b):
    """One pair."""
    own = a[0] + b[0] if bias else 0.0
    a, b = a[bias:], b[bias:]
    if comparator == "dot":
        return a @ b + own
    if comparator == "cos":
        return a @ b / (a.norm() * b.norm()) + own
    square = ((a - b) ** 2).sum()
    return own - (square if comparator == "squared_l2" else square.clamp_min(1e-30).sqrt())


def loss_of(config, s, t):
    """One true score against a list of others."""
    t = torch.stack(t)
    if config.loss == "ranking":
        return torch.relu(config.margin - s + t).sum()
    softplus = torch.nn.functional.softplus
    if config.loss == "logistic":
        return softplus(-s) + softplus(t).mean()
    if config.loss == "softmax":
        return torch.logsumexp(torch.cat([t, s[None]]), 0) - s
    share = torch.softmax(config.temperature * t, 0).detach()
    return softplus(-config.margin - s) + (share * softplus(config.margin + t)).sum()


def naive_loss(config, vectors, relations, edges, drawn, weights):
    """The whole batch by double loops over edges and candidates. drawn: (side, group) -> rows."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (h, r, t) in enumerate(zip(edges.heads, edges.relations, edges.tails, strict=True)):
        chunk = range(i // config.chunk_edges * config.chunk_edges, len(edges))[: config.chunk_edges]
        near = [j for j in chunk if j != i] if config.num_batch_negs and not config.all_negs else []
        for side in ("tail", "head"):
            far = [
                n for n in drawn[side][i // config.group_edges] if not (config.all_negs and n == (h, t)[side == "tail"])
            ]
            ends = edges.tails if side == "tail" else edges.heads
            others = [*(ends[j] for j in near), *far]
            if config.reciprocal:
                given = turned(config.operator, vectors[h if side == "tail" else t], relations[side == "head"][r])
                candidates = [vectors[n] for n in others]
                true = vectors[t if side == "tail" else h]
            elif side == "tail":
                given = vectors[h]
                candidates = [turned(config.operator, vectors[n], relations[0][r]) for n in others]
                true = turned(config.operator, vectors[t], relations[0][r])
            else:
                given = turned(config.operator, vectors[t], relations[0][r])
                candidates = [vectors[n] for n in others]
                true = vectors[h]
            found = [score(config.comparator, config.bias, given, c) for c in candidates]
            total = total + weights[i] * loss_of(config, score(config.comparator, config.bias, given, true), found)
    return total


def naive_n3(config, vectors, relations, edges, weights):
    def cubes(v, paired):
        half = len(v) // 2
        return (torch.hypot(v[:half], v[half:]) if paired else v.abs()).pow(3).sum()

    paired = config.operator in ("complex_diagonal", "rotation")
    total = torch.zeros((), dtype=torch.float64)
    for h, r, t, w in zip(edges.heads, edges.relations, edges.tails, weights, strict=True):
        total = total + w * len(relations) * (cubes(vectors[h], paired) + cubes(vectors[t], paired))
        if config.operator not in ("rotation", "none"):
            total = total + w * sum(cubes(table[r], paired) for table in relations)
    return config.n3 * total


# --- one small batch ------------------------------------------------------------------------------------------------


def make(config, num_edges, seed=0):
    rng = np.random.default_rng(seed)
    part = Part(rng.normal(size=(NUM_NODES, config.dim)).astype("f4"), np.zeros(NUM_NODES, "f4"))
    row = operators.identity(config.operator, config.dim)
    sides = []
    for _ in range(1 + config.reciprocal):
        table = np.tile(row, (NUM_RELATIONS, 1)) + rng.normal(size=(NUM_RELATIONS, len(row))) * 0.3
        sides.append(Relations(table.astype("f4"), np.zeros_like(table, "f4")))
    relations = rng.integers(NUM_RELATIONS, size=num_edges) if config.reciprocal else np.full(num_edges, 2)
    heads, tails = (rng.integers(NUM_NODES, size=num_edges).astype("i4") for _ in range(2))
    edges = Edges(heads, relations.astype("i4"), tails, (rng.random(num_edges) + 0.5).astype("f4"))
    return part, sides, edges, Worker(config, NUM_RELATIONS, NUM_NODES)


def drawn_of(worker):
    """The rows that the worker drew, by side and group."""
    own = worker.config.num_batch_negs if worker.config.merges else 0
    return {name: side.draws[:, own:].tolist() for name, side in (("head", worker.heads), ("tail", worker.tails))}


def table_gradients(worker, num_nodes):
    out = np.zeros((num_nodes, worker.config.dim))
    for row, gradient in zip(worker.rows, worker.grads.numpy(), strict=True):
        if row >= 0:
            out[row] += gradient
    return out


def compare(config, num_edges, seed=0):
    """Loss and gradients of the fast path beside autograd's of the double loop."""
    part, sides, edges, worker = make(config, num_edges, seed)
    loss = worker.differentiate(edges, edges, 7, part, part, sides)
    vectors = torch.tensor(part.vectors, dtype=torch.float64, requires_grad=True)
    relations = [torch.tensor(side.table, dtype=torch.float64, requires_grad=True) for side in sides]
    naive = naive_loss(config, vectors, relations, edges, drawn_of(worker), edges.weights)
    assert loss == pytest.approx(naive.item(), rel=1e-5, abs=1e-5)
    (naive + naive_n3(config, vectors, relations, edges, edges.weights)).backward()
    np.testing.assert_allclose(table_gradients(worker, NUM_NODES), vectors.grad, rtol=2e-4, atol=2e-5)
    for side, (table, grads) in enumerate(zip(relations, worker.relation_grads, strict=False)):
        own = np.zeros(table.shape)
        own[worker.relation_unique[: worker.num_relations]] = grads[: worker.num_relations]
        wanted = np.zeros(table.shape) if table.grad is None else table.grad
        np.testing.assert_allclose(own, wanted, rtol=2e-4, atol=2e-5, err_msg=f"relations, side {side}")


def config_of(**values):
    return GraphConfig(
        **({"dim": DIM, "batch_edges": 6, "num_batch_negs": 3, "num_uniform_negs": 4, "margin": 0.5} | values)
    )


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("comparator", COMPARATORS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_autograds(operator, comparator, reciprocal):
    """Every operator, comparator, bias and loss; chunks are whole (6 edges) and torn (5)."""
    for (bias, loss), num_edges in zip(itertools.product([False, True], LOSSES), itertools.cycle([6, 5])):
        config = config_of(operator=operator, comparator=comparator, bias=bias, loss=loss, reciprocal=reciprocal)
        compare(config, num_edges)


@pytest.mark.parametrize(
    "values",
    [
        {"n3": 0.1},
        {"n3": 0.1, "operator": "diagonal", "reciprocal": False},
        {"n3": 0.1, "operator": "rotation", "comparator": "l2"},
        {"share_negs": 2, "batch_edges": 12},
        {"share_negs": 0, "comparator": "l2", "bias": True},
        {"share_negs": 0, "comparator": "squared_l2", "reciprocal": False},
        {"share_negs": 0, "batch_edges": 12},
        {"num_batch_negs": 0},
        {"num_uniform_negs": 0},
        {"num_prevalence_negs": 3},
        {"all_negs": True},
        {"all_negs": True, "reciprocal": False, "comparator": "cos", "loss": "logistic"},
        {"temperature": 3.0, "loss": "self_adversarial"},
    ],
    ids=str,
)
def test_gradients_of_other_negatives_and_n3(values):
    for num_edges in (5, 6):
        compare(config_of(**values), num_edges)


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("comparator", COMPARATORS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_all_pairs_are_the_double_loop(operator, comparator, bias):
    rng = np.random.default_rng(3)
    left, right = (rng.normal(size=(n, DIM)).astype("f4") for n in (5, 7))
    size = operators.num_parameters(operator, DIM)
    table = rng.normal(size=(NUM_RELATIONS, size)).astype("f4")
    relations = rng.integers(NUM_RELATIONS, size=5).astype("i4")
    anchors = np.empty_like(left)
    operators.operate(operators.CODES[operator], left, relations, table, anchors)
    wide = [torch.tensor(x, dtype=torch.float64) for x in (left, right, table)]
    wanted = [
        [score(comparator, bias, turned(operator, v, wide[2][r]), b) for b in wide[1]]
        for v, r in zip(wide[0], relations, strict=True)
    ]
    code = scores.CODES[comparator]
    for vectors in (anchors, right):
        scores.prepare(code, bias, vectors, np.empty(len(vectors), np.float32))
    got = anchors @ right.T
    squares = [np.square(x[:, bias:]).sum(1) for x in (anchors, right)]
    for i, row in enumerate(got):
        scores.to_scores(code, bias, squares[0][i], anchors[i, 0], squares[1], right[:, 0].copy(), 0, 7, row, 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_identity_parameters_leave_a_vector_as_it_is(operator):
    vectors = np.random.default_rng(0).normal(size=(3, DIM)).astype("f4")
    out = np.empty_like(vectors)
    table = operators.identity(operator, DIM)[None]
    operators.operate(operators.CODES[operator], vectors, np.zeros(3, np.int32), table, out)
    np.testing.assert_array_equal(out, vectors)


@pytest.mark.parametrize("operator", ["diagonal", "complex_diagonal", "rotation"])
def test_random_relations_turn_vectors_and_keep_their_lengths(operator):
    """Each relation and side its own way, the same for a seed, and about as far from where they were on average."""
    config = GraphConfig(dim=400, operator=operator, relation_init="random")
    sides, again, other = (fresh_relations(config, 5, seed) for seed in (3, 3, 4))
    vector = np.random.default_rng(0).normal(size=400).astype("f4")
    vectors, out = np.tile(vector, (10, 1)), np.empty((10, 400), np.float32)
    tables = np.concatenate([side.table for side in sides])
    operators.operate(operators.CODES[operator], vectors, np.arange(10, dtype=np.int32), tables, out)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), np.linalg.norm(vector), rtol=1e-5)
    cosines = np.corrcoef(np.concatenate([out, vector[None]]))
    assert np.abs(cosines[~np.eye(11, dtype=bool)]).max() < 0.25
    for side, same, different in zip(sides, again, other, strict=True):
        np.testing.assert_array_equal(side.table, same.table)
        assert not np.array_equal(side.table, different.table)
        assert side.table.dtype == np.float32
        assert not side.sums.any()


@pytest.mark.parametrize("operator", ["translation", "linear", "complex_diagonal"])
def test_small_relations_are_drawn_as_nodes_are(operator):
    config = GraphConfig(dim=20, operator=operator, relation_init="small", init_scale=0.01)
    sides, again, other = (fresh_relations(config, 300, seed) for seed in (3, 3, 4))
    for side, same, different in zip(sides, again, other, strict=True):
        assert side.table.shape == (300, operators.num_parameters(operator, 20))
        assert side.table.dtype == np.float32
        assert side.table.std() == pytest.approx(0.01, rel=0.05)
        np.testing.assert_array_equal(side.table, same.table)
        assert not np.array_equal(side.table, different.table)
    assert not np.array_equal(sides[0].table, sides[1].table)


# --- accounting -----------------------------------------------------------------------------------------------------


def test_a_chunk_of_50_with_50_uniform_has_9900_negatives():
    """Each negative moves the ranking loss by its margin: with equal scores the loss counts them."""
    config = GraphConfig(dim=4, operator="none", loss="ranking", margin=1.0, batch_edges=50)
    part, sides, edges, worker = make(config, 50)
    part.vectors[:] = 0
    edges = Edges(edges.heads, edges.relations, edges.tails)
    assert worker.differentiate(edges, edges, 1, part, part, sides) == 50 * 2 * (50 + 50) - 2 * 50 == 9900


def test_a_torn_chunk_has_fewer_negatives_and_padding_none():
    config = GraphConfig(dim=4, operator="none", loss="ranking", margin=1.0, batch_edges=100)
    part, sides, edges, worker = make(config, 70)
    part.vectors[:] = 0
    edges = Edges(edges.heads, edges.relations, edges.tails)
    wanted = 2 * (50 * (49 + 50) + 20 * (19 + 50))
    assert worker.differentiate(edges, edges, 1, part, part, sides) == wanted


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_masked_has_no_slope_at_all(loss):
    """Bit for bit: a softmax over a row leaves exact zeros on the diagonal and in padding."""
    config = config_of(loss=loss, dim=2, operator="none", batch_edges=6, num_batch_negs=6)
    part, sides, edges, worker = make(config, 4)
    worker.differentiate(edges, edges, 1, part, part, sides)
    slopes = worker.pairs[1].blocks[1][0].far_rows[:, :6]
    assert (slopes[:4, 4:] == 0).all()
    assert (slopes[4:] == 0).all()
    np.testing.assert_array_equal(slopes[:4].diagonal(), worker.pairs[1].slopes[:4])
    assert (slopes[:4, :4] != 0).any()


@pytest.mark.parametrize(("num_prevalence_negs", "follows_degree"), [(64, True), (0, False)])
def test_prevalence_negatives_follow_degree_and_uniform_ones_do_not(num_prevalence_negs, follows_degree):
    config = config_of(num_prevalence_negs=num_prevalence_negs, num_uniform_negs=64 - num_prevalence_negs, share_negs=0)
    part, sides, edges, worker = make(config, 6)
    degrees = np.arange(1, NUM_NODES + 1)
    heads = np.repeat(np.arange(NUM_NODES), degrees).astype("i4")
    pool = Edges(heads, np.zeros_like(heads), heads)
    found = np.zeros(NUM_NODES)
    for key in range(400):
        worker.differentiate(edges, pool, key, part, part, sides)
        found += np.bincount(np.ravel(drawn_of(worker)["tail"]), minlength=NUM_NODES)
    expected = found.sum() * (degrees / degrees.sum() if follows_degree else np.full(NUM_NODES, 1 / NUM_NODES))
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 48.3  # 22 degrees of freedom: exceeded once in a thousand


def test_draws_are_a_function_of_key_and_place():
    a, b = np.empty(100, np.int32), np.empty(40, np.int32)
    draw(np.uint64(5), 1000, 0, a)
    draw(np.uint64(5), 1000, 60, b)
    np.testing.assert_array_equal(a[60:], b)
    draw(np.uint64(6), 1000, 60, b)
    assert (a[60:] != b).any()
    assert a.min() >= 0
    assert a.max() < 1000


# --- steps ----------------------------------------------------------------------------------------------------------


def test_row_adagrad_is_the_scalar_reference_over_100_steps():
    rng = np.random.default_rng(0)
    table, sums = rng.normal(size=(5, 8)).astype("f4"), np.zeros(5, "f4")
    wanted = [[float(x) for x in row] for row in table]
    state = [0.0] * 5
    first, room = np.full(5, -1, np.int32), np.empty((2, 7), np.int32)
    for _ in range(100):
        rows = rng.integers(-1, 5, size=7).astype("i4")
        grads = rng.normal(size=(7, 8)).astype("f4")
        assert scatter(table, sums, rows, grads, np.float32(0.1), first, room[0], room[1], np.empty(8, "f4")) == 0
        assert (first == -1).all()
        for row in range(5):
            whole = [math.fsum(float(g[d]) for r, g in zip(rows, grads, strict=True) if r == row) for d in range(8)]
            if row in rows:
                state[row] += math.fsum(x * x for x in whole) / 8
                for d in range(8):
                    wanted[row][d] -= 0.1 * whole[d] / (math.sqrt(state[row]) + 1e-10)
    np.testing.assert_allclose(table, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums, state, rtol=1e-5)
    assert sums.size * 8 == table.size


def test_relation_adagrad_is_torchs():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(4, 6)).astype("f4")
    parameter = torch.tensor(table[[2, 0]], requires_grad=True)
    optimizer = torch.optim.Adagrad([parameter], lr=0.1, eps=1e-10)
    sums, before = np.zeros_like(table), table.copy()
    for _ in range(100):
        grads = rng.normal(size=(2, 6)).astype("f4")
        assert adagrad(table, sums, np.array([2, 0], np.int32), grads, np.float32(0.1)) == 0
        parameter.grad = torch.tensor(grads)
        optimizer.step()
    np.testing.assert_allclose(table[[2, 0]], parameter.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(table[[1, 3]], before[[1, 3]])


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    config = config_of()
    part, sides, edges, worker = make(config, 6)
    part.vectors[edges.heads[0], 1] = np.nan
    before = part.vectors.copy()
    _, bad = worker.train(edges, edges, 1, part, part, sides, Rates(0.1, 0.1))
    assert bad > 0
    np.testing.assert_array_equal(part.vectors[worker.rows[0]], before[worker.rows[0]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_relation_whose_gradient_is_not_finite_stays_as_it_is(value):
    table, sums, grads = np.ones((3, 6), "f4"), np.zeros((3, 6), "f4"), np.ones((2, 6), "f4")
    grads[0, 4] = value
    assert adagrad(table, sums, np.array([2, 0], np.int32), grads, np.float32(0.1)) == 1
    np.testing.assert_array_equal(table[1:], 1)
    np.testing.assert_array_equal(sums[1:], 0)
    np.testing.assert_allclose(table[0], 0.9)


def test_an_edge_weight_scales_its_gradient():
    config = config_of(loss="logistic")
    part, sides, edges, worker = make(config, 1)
    grads = {}
    for weight in (1.0, 0.5):
        one = Edges(edges.heads, edges.relations, edges.tails, np.array([weight], "f4"))
        worker.differentiate(one, one, 1, part, part, sides)
        grads[weight] = table_gradients(worker, NUM_NODES)
    np.testing.assert_allclose(grads[0.5], grads[1.0] / 2, rtol=1e-6)


def test_long_vectors_are_shortened_when_read():
    config = config_of(max_norm=0.5, operator="none")
    part, sides, edges, worker = make(config, 6)
    worker.differentiate(edges, edges, 1, part, part, sides)
    read = worker.rows[worker.rows >= 0]
    np.testing.assert_allclose(np.linalg.norm(part.vectors[read], axis=1), 0.5, rtol=1e-5)


def test_fresh_vectors_do_not_depend_on_partitions():
    whole = np.empty((20, 5), np.float32)
    fill_normal(np.uint64(9), 0.5, 0, 1, whole)
    part = np.empty((5, 5), np.float32)
    fill_normal(np.uint64(9), 0.5, 3, 4, part)
    np.testing.assert_array_equal(part, whole[3::4])
    many = np.empty((4000, 5), np.float32)
    fill_normal(np.uint64(1), 0.5, 0, 1, many)
    assert abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(0.5, rel=0.02)


def test_exp_over_its_whole_range():
    x = np.linspace(-95, 87, 40_001, dtype=np.float32)
    got = np.array([losses.exp32(v) for v in x])
    wanted = np.exp(x.astype(np.float64)) * (x >= -87)
    np.testing.assert_allclose(got, wanted, rtol=4e-7)
