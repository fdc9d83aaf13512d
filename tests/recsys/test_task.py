"""Training: it learns, any number of ranks and any placement train the same model, checkpoints fit all of them."""

import copy
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from clicking import load, plain_logits, save, steps, task_of, train_each
from processes import finish, start

from puna.errors import DataError, NonFinite, RecipeError
from puna.recipe import load as load_recipe
from puna.recsys.clicks import Clicks
from puna.run import dlrm_rank, write_recipe
from puna.train.metrics import last_steps, read_events
from puna.train.task import Cursor

PLACEMENTS = ("table", "row", "column", "data", "auto")


def each(folder, data, size, settings, count=6):
    out = folder / f"{size}.json"
    codes = finish(start(train_each, str(data), str(out), json.dumps(settings), str(count), size=size, folder=folder))
    assert codes == [0] * size
    return json.loads(out.read_text())


def test_it_learns_what_was_planted(planted, tmp_path):
    """From chance to most of the way to the truth's own AUC."""
    task = task_of(planted, dim=8, bottom=(32,), top=(32,), epochs=6, table_lr=1.0)
    before = task.evaluate("heldout")
    losses = steps(task, 10**6)
    after = task.evaluate("heldout")
    assert abs(before["auc"] - 0.5) < 0.1
    assert after["auc"] > 0.7
    assert after["ne"] < 0.93
    assert abs(after["calibration"] - 1) < 0.1
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.03


@pytest.mark.parametrize("interaction", ["cat", "cross"])
def test_other_interactions_learn(planted, interaction):
    task = task_of(
        planted,
        interaction=interaction,
        cross_rank=8,
        epochs=3,
        optimizer="adagrad",
        table_optimizer="adagrad",
        lr=0.02,
    )
    losses = steps(task, 10**6)
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.02


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("planted", (1, 2, 4)), ("bagged", (1, 2)), pytest.param("bagged", (1, 4), marks=pytest.mark.slow)],
)
def test_ranks_and_placements_train_the_same_model(kind, sizes, request, tmp_path):
    """1, 2 and 4 ranks, every placement, both optimisers: losses equal to 1e-5, and the figures after them."""
    clicks = request.getfixturevalue(kind)
    settings = {
        f"{placement} {optimizer}": {
            "placement": placement,
            "table_optimizer": optimizer,
            "data_rows": 50,
            "table_lr": 0.5,
        }
        for placement in PLACEMENTS
        for optimizer in ("sgd", "adagrad")
    }
    found = {size: each(tmp_path, clicks.folder, size, settings) for size in sizes}
    for optimizer in ("sgd", "adagrad"):
        wanted = found[1][f"table {optimizer}"]
        assert wanted["losses"][-1] != wanted["losses"][0]
        for size in sizes:
            for placement in PLACEMENTS:
                got = found[size][f"{placement} {optimizer}"]
                np.testing.assert_allclose(got["losses"], wanted["losses"], atol=1e-5, err_msg=f"{size} {placement}")
                assert abs(got["loss"] - wanted["loss"]) < 1e-5


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_bags_are_sums_as_in_torch(bagged, optimizer):
    """Three steps beside EmbeddingBag and autograd, with rows that are several times in a bag."""
    task = task_of(bagged, dim=4, batch=64, table_optimizer=optimizer, table_lr=0.5, optimizer="sgd", lr=1e-9)
    model = copy.deepcopy(task.model)
    tables = [torch.tensor(array, requires_grad=True) for array in task.tables.arrays()]
    sums = [torch.zeros(len(table)) for table in tables]
    for unit, _ in zip(task.units(Cursor()), range(3), strict=False):
        (batch,) = unit.batches
        samples = bagged.at(batch.samples)
        columns = np.split(samples.ids, np.cumsum(bagged.hots)[:-1], axis=1)
        vectors = torch.stack([_sum_of_rows(t, ids) for t, ids in zip(tables, columns, strict=True)], dim=1)
        logits = plain_logits(model, batch.dense, vectors)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        assert task.step(unit).loss == pytest.approx(loss.item(), abs=1e-6)
        for table, total, grad in zip(tables, sums, torch.autograd.grad(loss, tables), strict=True):
            total += grad.square().mean(dim=1)
            factor = 1 / (total.sqrt() + 1e-8) if optimizer == "adagrad" else torch.ones_like(total)
            table.data -= 0.5 * factor[:, None] * grad
    for table, array in zip(tables, task.tables.arrays(), strict=True):
        np.testing.assert_allclose(array, table.detach().numpy(), atol=5e-6)


@pytest.mark.parametrize("interaction", ["dot", "cross"])
def test_networks_step_as_in_torch(bagged, interaction):
    """Every parameter after a step, beside autograd and an optimiser that is not fused."""
    task = task_of(bagged, dim=4, batch=64, optimizer="sgd", lr=0.1, interaction=interaction, cross_rank=3)
    model = copy.deepcopy(task.model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    unit = next(task.units(Cursor()))
    (batch,) = unit.batches
    with torch.no_grad():
        vectors = task.tables.look_up(batch.table_ids)[:, 1:]
    logits = plain_logits(model, batch.dense, vectors)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
    plain.step()
    task.step(unit)
    for ours, wanted in zip(task.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=1e-5)


def _sum_of_rows(table, ids):
    there = [torch.from_numpy(row[row >= 0]).long() for row in ids]
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in there])[:-1]])
    return torch.nn.functional.embedding_bag(torch.cat(there), table, offsets, mode="sum")


def test_a_bag_without_ids_is_zero_and_changes_nothing(bagged):
    task = task_of(bagged)
    ids = np.tile(np.array([[-1] * 5 + [0] + [-1] * 3 + [0] + [-1] * 2], np.int32), (128, 1))
    vectors = task.tables.look_up(ids)
    assert not vectors[:, [1, 3, 5]].any()
    assert vectors[:, [2, 4]].all()


def test_what_crosses_for_a_bag_is_one_row_a_sample(bagged):
    task = task_of(bagged, batch=128)
    (batch,) = next(task.units(Cursor())).batches
    ((blocks),) = batch.lookup.sent
    assert [rows for _, rows, _ in blocks][::2] == [128] * 3
    assert all(rows < 128 for _, rows, _ in blocks[1::2])


def test_the_optimisers_differ(planted):
    """So that the test above compares what it says it does."""
    a, b = (steps(task_of(planted, table_optimizer=name, table_lr=0.5), 6) for name in ("sgd", "adagrad"))
    assert abs(a[-1] - b[-1]) > 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_rows_taken_where_they_are_train_as_those_that_are_exchanged(planted, optimizer):
    """One rank alone takes a shorter way: bit for bit the same losses."""
    short, long = (
        task_of(planted, exchange={"distinct": distinct}, table_optimizer=optimizer, table_lr=0.5)
        for distinct in (True, False)
    )
    assert short.tables.alone
    assert not long.tables.alone
    assert steps(short, 12) == steps(long, 12)
    for a, b in zip(short.tables.arrays(), long.tables.arrays(), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_rows_sent_once_or_for_every_sample_are_the_same(planted, tmp_path):
    settings = {
        "once": {"exchange": {"distinct": True}},
        "each": {"exchange": {"distinct": False}},
    }
    one, two = (each(tmp_path, planted.folder, size, settings) for size in (1, 2))
    assert one["once"] == one["each"]
    np.testing.assert_allclose(two["once"]["losses"], two["each"]["losses"], atol=1e-6)


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adagrad"])
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_four(planted, tmp_path, optimizer):
    """Saved under one placement, read under another."""
    settings = {"table_optimizer": optimizer, "placement": "row", "table_lr": 0.5}
    run = tmp_path / "two"
    assert finish(start(save, str(planted.folder), str(run), json.dumps(settings), "5", size=2, folder=tmp_path)) == [
        0,
        0,
    ]
    wanted = json.loads((run / "after.json").read_text())
    for size, placement in ((1, "table"), (2, "row"), (4, "column")):
        other = tmp_path / f"{size}"
        shutil.copytree(run, other)
        words = (str(planted.folder), str(other), json.dumps(settings | {"placement": placement}), "5")
        assert finish(start(load, *words, size=size, folder=tmp_path)) == [0] * size
        got = json.loads((other / "after.json").read_text())
        if size == 2:
            assert got == wanted
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def recipe_of(planted, run, *flags):
    words = {"run.dir": run, "data.path": planted.folder, "dlrm.batch": 64, "checkpoint.every": 10, "eval.tokens": 2048}
    loaded = load_recipe(
        "dlrm-tiny", [word for key, value in words.items() for word in (f"--{key}", str(value))] + list(flags)
    )
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(loaded, run)
    return loaded


def losses(run):
    return {step: record["loss"] for step, record in last_steps(read_events(run)).items()}


def test_a_killed_run_ends_as_one_that_was_not(planted, tmp_path):
    """SIGKILL between checkpoints; the losses of the steps that are done again are the same bits."""
    recipe_of(planted, tmp_path / "straight")
    assert finish(start(dlrm_rank, str(tmp_path / "straight"))) == [0]
    run = tmp_path / "killed"
    recipe_of(planted, run)
    (process,) = start(dlrm_rank, str(run))
    deadline = time.monotonic() + 60
    while len(losses(run)) < 25 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert finish([process]) == [-signal.SIGKILL]
    assert 25 <= len(losses(run)) < 128
    assert finish(start(dlrm_rank, str(run))) == [0]
    assert losses(run) == losses(tmp_path / "straight")
    assert len(losses(run)) == 128
    evals = [
        [e["auc"] for e in read_events(tmp_path / name) if e["event"] == "eval"][-1] for name in ("killed", "straight")
    ]
    assert evals[0] == evals[1]


def test_a_gradient_that_is_not_finite_changes_nothing(planted):
    task = task_of(planted)
    units = task.units(Cursor())
    task.step(next(units))
    before = task.tables.flat.copy()
    unit = next(units)
    unit.batches[0].dense[3, 1] = float("nan")
    with pytest.raises(NonFinite, match="step 2 is not finite"):
        task.step(unit)
    assert np.array_equal(task.tables.flat, before)


def test_mistakes_are_named(planted, tmp_path):
    with pytest.raises(RecipeError, match=r"dlrm.batch is 16384, but there are 8,192 samples"):
        task_of(planted, batch=16384)
    with pytest.raises(RecipeError, match=r"exchange.classes names 1 tables, but .* has 5"):
        task_of(planted, exchange={"classes": ("tight",)})


@pytest.mark.parametrize(
    ("kind", "column", "wrong", "words"),
    [
        ("planted", 1, 3, r"column C2: the id 3 is beyond its table of 3 rows"),
        ("planted", 1, -1, r"column C2: the id -1 is beyond its table of 3 rows"),
        ("bagged", 7, 40, r"column C3: the id 40 is beyond its table of 40 rows"),
        ("bagged", 7, -2, r"column C3: the id -2 is beyond its table of 40 rows"),
    ],
)
def test_an_id_beyond_its_table_is_named(kind, column, wrong, words, request, tmp_path):
    clicks, folder = request.getfixturevalue(kind), tmp_path / "clicks"
    shutil.copytree(clicks.folder, folder)
    ids = np.memmap(folder / "ids", "<i4", "r+").reshape(-1, sum(clicks.hots))
    ids[70, column] = wrong
    ids.flush()
    with pytest.raises(DataError, match=rf"ids, sample 70, {words}"):
        steps(task_of(Clicks.open(folder), shuffle=False), 1)


def test_folded_ids_fit_a_smaller_table(planted):
    task = task_of(planted, max_rows=50)
    assert task.rows == (50, 3, 40, 50, 9)
    assert len(steps(task, 3)) == 3


def test_folded_bags_keep_their_ends(bagged):
    task = task_of(bagged, max_rows=50)
    whole, same = (bagged.take("train", np.arange(64)) for _ in range(2))
    folded = task._fold(same).ids
    assert ((folded < 0) == (whole.ids < 0)).all()
    assert folded.max() < 50 <= whole.ids.max()


def test_bf16_networks_follow_fp32_ones(planted):
    a, b = (steps(task_of(planted, dtype=dtype, **{}), 30) for dtype in ("fp32", "bf16"))
    assert a != b
    np.testing.assert_allclose(a, b, atol=0.02)
