"""Placement, bounds, figures, interaction, planted clicks."""

import itertools
import math

import numpy as np
import pytest
import torch
from clicking import plain_logits, plain_products

from puna.errors import DataError, RecipeError
from puna.recsys.adapt import Bounds, classify, factor, homogenisation
from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.dlrm import Dlrm
from puna.recsys.figures import auc, figures
from puna.recsys.generator import KAGGLE_ROWS, TERABYTE_ROWS, generate, zipf
from puna.recsys.interaction import products, products_back
from puna.recsys.network import Network
from puna.recsys.placement import EVERYWHERE, loads, place
from puna.sparse.threads import Team


@pytest.mark.parametrize("how", ["auto", "table", "row", "column", "data"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_number_of_every_table_has_one_place(how, num_ranks):
    rows = (1000, 3, 70_000, 1, 50)
    shards = place(rows, 4, num_ranks, how, data_rows=10)
    for table, count in enumerate(rows):
        seen = np.zeros((count, 4), int)
        for shard in shards:
            if shard.table == table:
                seen[shard.first_row : shard.end_row, shard.first_col : shard.end_col] += 1
                assert shard.rank in range(num_ranks) or (shard.rank == EVERYWHERE and num_ranks > 1)
        assert (seen == 1).all()
    assert shards == place(rows, 4, num_ranks, how, data_rows=10)


@pytest.mark.parametrize("rows", [KAGGLE_ROWS, TERABYTE_ROWS])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_planner_balances_bytes_and_lookups(rows, num_ranks):
    """Better than contiguous slices of tables, as the reference has them, in both; within a quarter of the mean."""
    found = loads(place(rows, 16, num_ranks), num_ranks)
    for what in ("bytes", "lookups"):
        values = [load[what] for load in found]
        assert max(values) < 1.25 * np.mean(values)
    sizes = np.array_split(np.array(rows), num_ranks)
    assert max(load["bytes"] for load in found) < 64 * max(part.sum() for part in sizes)
    assert sum(load["bytes"] for load in found) == 64 * sum(rows)


def test_small_tables_are_copied_and_large_ones_cut():
    shards = place((10, 1_000_000, 500), 8, 2, "auto", data_rows=10)
    assert [(s.table, s.rank) for s in shards if s.table == 0] == [(0, EVERYWHERE)]
    assert sorted(s.rank for s in shards if s.table == 1) == [0, 1]
    assert len([s for s in shards if s.table == 2]) == 1


def test_columns_that_do_not_reach_the_ranks_are_refused():
    with pytest.raises(RecipeError, match=r"dlrm.dim 4 does not reach 8 ranks"):
        place((10,), 4, 8, "column")


@pytest.mark.parametrize("decay", ["step", "linear", "log", "constant"])
def test_the_factor_falls_from_first_to_one(decay):
    """The formulas at t = 0, S / 2, S - 1, S; it never rises."""
    steps, first = 1000, 3.0
    values = [factor(decay, step, steps, first) for step in range(steps + 5)]
    assert values[0] == pytest.approx(first)
    assert values[steps:] == [1.0] * 5
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    half = {
        "step": 2.0,
        "linear": 2.0,
        "log": 3 * ((1 - math.log(1 + 0.5 * (math.e - 1))) * 2 / 3 + 1 / 3),
        "constant": 3.0,
    }
    assert values[500] == pytest.approx(half[decay])
    last = {"step": 1.2, "linear": 1.002, "log": 1 + 2 * (1 - math.log(1 + 0.999 * (math.e - 1))), "constant": 3.0}
    assert values[999] == pytest.approx(last[decay])


def test_homogenisation_is_the_share_of_rows_that_merge():
    rows = np.array([[0.0, 0.0], [0.01, 0.0], [0.5, 0.5], [1.0, 1.0], [0.0, 0.0]], np.float32)
    assert homogenisation(rows, 0.05) == pytest.approx(1 / 4)
    assert homogenisation(rows, 0.001) == 0
    assert homogenisation(rows[:1], 0.1) == 0
    assert homogenisation(np.full((3, 2), 7, np.float32), 0.1) == 0
    rng = np.random.default_rng(0)
    many = rng.normal(size=(500, 4)).astype(np.float32)
    indices = [homogenisation(many, bound) for bound in (0.005, 0.01, 0.05, 0.1, 0.3)]
    assert indices == sorted(indices)


def test_classes_follow_the_index():
    assert classify([0.5, 0.0, 0.9, 0.1, 0.1, 0.6], [9, 9, 9, 9, 10, 9]) == (
        "base", "loose", "tight", "loose", "base", "tight",
    )  # fmt: skip


def test_bounds_are_tight_until_the_index_is_known():
    config = ExchangeConfig(forward="bounded", warmup=2, decay_steps=10, decay="linear", factor=2.0)
    bounds = Bounds(config, (5, 6, 7))
    assert bounds.forward(0) == [0.01] * 3
    bounds.observe(np.array([0.2, 0.9, 0.1]))
    assert bounds.observing
    kept = bounds.state()
    bounds.observe(np.array([0.2, 0.9, 0.1]))
    assert bounds.classes == ("base", "tight", "loose")
    assert bounds.forward(0) == pytest.approx([0.06, 0.02, 0.1])
    assert bounds.forward(5) == pytest.approx([0.045, 0.015, 0.075])
    assert bounds.forward(10) == pytest.approx([0.03, 0.01, 0.05])
    again = Bounds(config, (5, 6, 7))
    again.restore(kept)
    again.observe(np.array([0.2, 0.9, 0.1]))
    assert again.classes == bounds.classes
    assert Bounds(ExchangeConfig(), (5,)).forward(0) == [0.0]


def test_figures_are_their_definitions():
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=300), 1).astype(np.float32)
    labels = (rng.random(300) < 0.3).astype(np.float32)
    pairs = [(a > b) + 0.5 * (a == b) for a in logits[labels == 1] for b in logits[labels == 0]]
    found = figures(logits, labels)
    assert found["auc"] == pytest.approx(np.mean(pairs))
    p = 1 / (1 + np.exp(-logits.astype(float)))
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    rate = labels.mean()
    assert found["loss"] == pytest.approx(loss)
    assert found["ne"] == pytest.approx(loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))
    assert found["calibration"] == pytest.approx(p.mean() / rate)
    assert math.isnan(auc(logits, np.ones(300, np.float32)))


def with_room(vectors):
    """The vectors of tables with a free place before them, which nobody may read."""
    return torch.cat([torch.full_like(vectors[:, :1], torch.nan), vectors], dim=1)


@pytest.mark.parametrize(("samples", "tables", "dim"), [(1, 1, 1), (37, 5, 7), (64, 26, 16), (3, 40, 2)])
def test_products_equal_torch(samples, tables, dim):
    vectors = torch.randn(samples, tables + 1, dim, requires_grad=True)
    out, wanted = products(vectors.detach()), plain_products(vectors)
    width = wanted.shape[1]
    assert out.shape[1] % 16 == 0
    assert not out[:, width:].any()
    torch.testing.assert_close(out[:, :width], wanted, atol=1e-5, rtol=1e-5)
    weights, got = torch.randn_like(out), torch.empty_like(vectors)
    products_back(vectors.detach(), weights, got)
    (again,) = torch.autograd.grad((wanted * weights[:, :width]).sum(), vectors)
    torch.testing.assert_close(got, again, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("interaction", ["dot", "cat", "cross"])
def test_gradients_by_hand_are_those_of_autograd(interaction, dtype):
    """Of every parameter and of the tables' vectors; bf16 against float32 with vectors and weights rounded first."""
    torch.manual_seed(0)
    config = DlrmConfig(dim=7, bottom=(33, 20), top=(50, 30), interaction=interaction, cross_rank=9, dtype=dtype)
    model = Dlrm(config, 13, 26)
    model.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()})
    dense, vectors = torch.randn(64, 13).bfloat16().float(), torch.randn(64, 26, 7).bfloat16().float()
    vectors.requires_grad_()
    wanted = plain_logits(model, dense, vectors)
    weights = torch.randn(64)
    grads = torch.autograd.grad((wanted * weights).sum(), [vectors, *model.parameters()])
    x, run = model.bottom(dense)
    logits, top = model.top(x, with_room(vectors.detach()).to(model.vector_dtype))
    change = torch.empty_like(top.vectors)
    above = model.back_top(top, weights, change)
    _, nothing = model.top(*(part[:0] for part in (x, top.vectors)))
    assert all(not g.any() for g in model.back_top(nothing, weights[:0], change[:0])), "a thread may have no sample"
    found = [logits, change[:, 1:], *model.back_bottom(run, change[:, 0]), *above]
    assert [ours.shape for ours in found] == [theirs.shape for theirs in [wanted, *grads]]
    if dtype == "fp32":
        for ours, theirs in zip(found, [wanted, *grads], strict=True):
            assert (ours - theirs).norm() < 2e-5 * theirs.norm()
        return
    assert (logits - wanted).norm() < 0.02 * wanted.norm()
    ours, theirs = (torch.cat([x.float().flatten() for x in part]) for part in (found[1:], grads))
    assert (ours - theirs).norm() < 0.1 * theirs.norm(), "of one tensor, a sum that nearly cancels is off by more"


def test_threads_share_the_work_and_tell_of_what_fails():
    seen = []
    Team(3)(lambda begin, end: seen.append((begin, end)), 10)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 10)]
    for failing in range(3):
        with pytest.raises(ZeroDivisionError):
            Team(3)(lambda begin, end: 1 / (begin - 10 * failing // 3), 10)  # noqa: B023


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("widths", [(13, 512, 16), (367, 33, 1), (16, 16), (5, 3, 2, 7)])
def test_networks_equal_torch(widths, last):
    """Forward, and gradients of inputs, weights and biases."""
    network = Network(widths, last=last, dtype=torch.float32)
    layers = [part for layer in network.layers for part in (layer, torch.nn.ReLU())]
    plain = torch.nn.Sequential(*(layers if last else layers[:-1]))
    x = torch.randn(37, widths[0], requires_grad=True)
    (out, run), wanted = network.run(x.detach()), plain(x)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    given, found = network.back(run, weights, inward=True)
    got = (given[:, : widths[0]], *found)
    inputs = (x, *network.parameters())
    for a, b in zip(got, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    zeros = torch.zeros(37, -widths[0] % 16)
    torch.testing.assert_close(network.run(torch.cat([x.detach(), zeros], dim=1))[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_not_one_goes_through_relu(dtype):
    network = Network((3, 4, 2), last=True, dtype=dtype)
    assert network.run(torch.tensor([[float("nan"), 0, 0]]))[0].isnan().all()


def test_the_kaggle_recipe_has_the_published_sizes():
    from puna.recipe import load

    recipe = load("dlrm-kaggle").recipe.dlrm
    model = Dlrm(recipe, 13, 26)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(512, 13), (256, 512), (64, 256), (16, 64), (512, 367), (256, 512), (1, 256)]
    assert load("dlrm-terabyte").recipe.exchange.classes.count("tight") == 7
    assert load("dlrm-kaggle-32").recipe.exchange.classes.count("tight") == 8
    for name in ("dlrm-terabyte", "dlrm-kaggle-32"):
        assert len(load(name).recipe.exchange.classes) == 26


def test_a_model_without_dense_features():
    model = Dlrm(DlrmConfig(dim=4, bottom=(4,), top=(4,)), 0, 2)
    out, _ = model.top(model.bottom(torch.empty(3, 0))[0], with_room(torch.randn(3, 2, 4)))
    assert out.shape == (3,)


def test_bags_weigh_by_their_lookups():
    """Two tables of equal bytes: the one with a bag of nine is alone, whatever the order."""
    for hots in ((9, 1, 1), (1, 1, 9)):
        shards = place((100, 100, 100), 4, 2, "table", hots=hots, balance=0.1)
        ranks = {shard.table: shard.rank for shard in shards}
        assert [n for n in range(3) if ranks[n] == ranks[hots.index(9)]] == [hots.index(9)]
        assert sorted(load["lookups"] for load in loads(shards, 2, hots)) == [2, 9]


def test_planted_bags(tmp_path):
    """One to h ids, evenly; as many of them as of the others to learn."""
    words = {"samples": 4000, "test": 1000, "rows": (50, 7, 300), "num_dense": 3}
    figures = generate(tmp_path / "a", hots=(1, 4, 2), **words)
    assert 0.65 < figures["best_auc"] < 0.9
    ids = Clicks.open(tmp_path / "a").columns["ids"]
    assert ids.shape == (5000, 7)
    counts = np.bincount((ids[:, 1:5] >= 0).sum(axis=1), minlength=5)
    assert counts[0] == 0
    assert (abs(counts[1:] - 1250) < 150).all()
    assert (np.diff((ids[:, 1:5] >= 0).astype(int), axis=1) <= 0).all()
    for hots in ((1, 4), (1, 4, 0)):
        with pytest.raises(DataError, match=r"bags of \[1, 4.* ids do not fit 3 tables"):
            generate(tmp_path / "b", hots=hots, **words)


def test_zipf_has_its_exponent():
    ids = zipf(np.random.default_rng(0).random(400_000), 1000, 1.05)
    counts = np.bincount(ids, minlength=1000)
    assert ids.min() == 0
    assert ids.max() == 999
    places = np.arange(10, 300)
    slope = np.polyfit(np.log(places + 1), np.log(counts[places]), 1)[0]
    assert slope == pytest.approx(-1.05, abs=0.08)


def test_planted_clicks_are_a_function_of_the_seed(tmp_path):
    words = {"samples": 3000, "test": 1000, "rows": (50, 7), "num_dense": 3, "num_threads": 2}
    a = generate(tmp_path / "a", seed=5, **words)
    b = generate(tmp_path / "b", seed=5, **words)
    c = generate(tmp_path / "c", seed=6, **words)
    for name in ("labels", "dense", "ids"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    assert a["best_auc"] == b["best_auc"] != c["best_auc"]
    assert 0.65 < a["best_auc"] < 0.9
    clicks = Clicks.open(tmp_path / "a")
    assert clicks.splits == {"train": (0, 3000), "test": (3000, 4000)}
    assert clicks.columns["labels"].mean() == pytest.approx(0.25, abs=0.03)
    with pytest.raises(DataError, match="holds clicks already"):
        generate(tmp_path / "a", seed=5, **words)
