"""Partitions from a memory budget, what is read ahead and written behind, and what a run says of it beforehand."""

import json
import shutil
import threading

import numpy as np
import pytest

from puna import recipe, run
from puna.errors import CheckpointError, DiskFull, RecipeError
from puna.graph import budget
from puna.graph.budget import HELD, Sizes, fitted
from puna.graph.config import GraphConfig, num_bytes
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.partitions import Table, _Store
from puna.graph.task import GraphTask
from puna.train import checkpoint
from puna.train.config import CheckpointConfig, LoopConfig, RunConfig, ScheduleConfig
from puna.train.loop import Run
from puna.train.metrics import read_events
from puna.train.task import Cursor

SMALL = {
    "dim": 8, "operator": "diagonal", "epochs": 2, "batch_edges": 40, "num_batch_negs": 10, "num_uniform_negs": 10,
    "init_scale": 0.1,
}  # fmt: skip
LARGE = Sizes(10_000_000, 1, 100_000_000, weighted=False)
SOCIAL = GraphConfig(dim=100, operator="none", num_batch_negs=50, num_uniform_negs=50)


def task_of(graph, folder, workers=1, start=None, **values):
    config = GraphConfig(**(SMALL | values))
    return GraphTask(config, ScheduleConfig(decay="constant"), graph, folder, num_threads=workers, start=start)


def loop(folder, every=1):
    settings = RunConfig(dir=str(folder), tensorboard=False)
    return LoopConfig(run=settings, checkpoint=CheckpointConfig(every=every, keep=2))


def vectors(task):
    return task.scorer().vectors(np.arange(task.graph.num_nodes))


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4_000_000_000), ("1.5 MiB", 1_572_864), ("300kB", 300_000), ("12B", 12), ("2TiB", 2 << 40)],
)
def test_sizes(text, size):
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["4", "4 apples", "GB", "-4GB", "4gb"])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match=r"graph.memory is .*no size .*flag.*Write a number and a unit"):
        recipe.load("social", ["--graph.memory", text])


@pytest.mark.parametrize("memory", ["1GB", "2GB", "3GB", "4GB", "8GB"])
def test_the_fewest_partitions_that_fit(memory):
    found = fitted(SOCIAL.model_copy(update={"memory": memory}), LARGE, 2, False)
    parts, held = found.num_partitions, found.held_partitions
    assert budget.memory(found, LARGE, 2, False).total <= num_bytes(memory)
    fewer = found.model_copy(update={"num_partitions": parts - 1, "held_partitions": min(HELD, max(2, parts - 1))})
    assert parts == 1 or budget.memory(fewer, LARGE, 2, False).total > num_bytes(memory)
    assert held == min(HELD, max(2, parts))
    assert found.bucket_order == ("buffered" if parts > HELD else SOCIAL.bucket_order)
    if parts > HELD:
        table = LARGE.num_nodes * 404
        assert budget.memory(found, LARGE, 2, False).table <= (held + 0.3) / parts * table


def test_partitions_that_are_set_stay_and_are_refused_where_they_do_not_fit():
    set_so = SOCIAL.model_copy(update={"memory": "3GB", "num_partitions": 32})
    assert fitted(set_so, LARGE, 2, False).num_partitions == 32
    with pytest.raises(RecipeError, match=r"graph.memory is 3GB, but 5 partitions need 3,.* MB: partitions 3,232 MB"):
        fitted(set_so.model_copy(update={"num_partitions": 5}), LARGE, 2, False)
    with pytest.raises(RecipeError, match=r"graph.memory is 100MB, but 256 partitions need .*process 500 MB"):
        fitted(SOCIAL.model_copy(update={"memory": "100MB"}), LARGE, 2, False)
    assert fitted(SOCIAL, LARGE, 2, False) is SOCIAL


def test_the_plan_counts_swaps_and_bytes():
    config = SOCIAL.model_copy(update={"num_partitions": 8, "held_partitions": 4, "bucket_order": "buffered"})
    told = budget.plan(config, LARGE, 2, False)
    assert told["partition_bytes"] == 1_250_000 * 404
    assert told["read_bytes_per_epoch"] == told["swaps_per_epoch"] * told["partition_bytes"]
    assert 8 < told["swaps_per_epoch"] < 20
    inside_out = budget.plan(
        config.model_copy(update={"bucket_order": "inside_out", "held_partitions": 2}), LARGE, 2, False
    )
    assert inside_out["swaps_per_epoch"] > 1.5 * told["swaps_per_epoch"]
    whole = budget.plan(SOCIAL, LARGE, 2, False)
    assert (whole["swaps_per_epoch"], whole["held_partitions"]) == (0, 1)


def test_the_plan_is_what_a_run_does(planted, tmp_path):
    """Partitions that are read from the disk in the second epoch: those that the plan says."""
    values = {"num_partitions": 6, "held_partitions": 3, "bucket_order": "inside_out", "epochs": 3}
    task = task_of(planted, tmp_path, **values)
    reads = [(unit.epoch, task.step(unit).metrics["swaps"]) for unit in task.units(Cursor())]
    task.table.flush()
    told = task.describe()["swaps_per_epoch"]
    assert abs(sum(count for epoch, count in reads if epoch == 1) - told) <= 3


# --- reading ahead, writing behind ----------------------------------------------------------------------------------


SLOW = [pytest.param(order, marks=pytest.mark.slow) for order in ("affinity", "random")]


@pytest.mark.parametrize("order", ["inside_out", *SLOW])
def test_what_is_held_does_not_change_what_is_learnt(planted, tmp_path, order):
    """Bit for bit, whether nothing, one or everything is read ahead."""
    found = []
    for held in (2, 3, 5):
        folder = tmp_path / str(held)
        task = task_of(planted, folder, num_partitions=5, held_partitions=held, bucket_order=order)
        Run(task, folder, loop(folder, every=7)).go()
        found.append(vectors(task))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("held", [3, 4])
def test_a_run_with_a_buffer_resumes_exactly(planted, tmp_path, held):
    values = {"num_partitions": 6, "held_partitions": held, "bucket_order": "buffered"}
    whole = task_of(planted, tmp_path / "whole", **values)
    Run(whole, tmp_path / "whole", loop(tmp_path / "whole", every=100)).go()
    for stop in (5, 23, 72):
        task = task_of(planted, tmp_path / "cut", **values)
        state, cursor = task.state(), Cursor()
        if checkpoint.latest(tmp_path / "cut"):
            cursor = checkpoint.load(tmp_path / "cut", state).cursor
        for unit in task.units(cursor):
            report = task.step(unit)
            cursor = cursor.after(report.tokens)
            if cursor.units == stop:
                break
        checkpoint.save(tmp_path / "cut", state, cursor, keep=1)
    np.testing.assert_array_equal(vectors(task), vectors(whole))


def test_a_buffer_holds_what_the_mode_says_and_the_disk_no_version_twice(planted, tmp_path):
    task = task_of(planted, tmp_path, num_partitions=8, held_partitions=4, bucket_order="buffered")
    for unit in task.units(Cursor()):
        task.step(unit)
        assert len(task.table._rooms) <= 4
    task.table.flush()
    assert sorted(int(path.name.split(".")[0]) for path in (tmp_path / "rows" / "nodes").iterdir()) == list(range(8))


def test_partitions_come_while_a_bucket_trains(planted, tmp_path, monkeypatch):
    """In the second epoch, where all are on the disk, no bucket waits: a `take` is over while reading is held up."""
    task = task_of(planted, tmp_path, num_partitions=6, held_partitions=3, bucket_order="buffered")
    go_on, fill, held_up = threading.Event(), _Store.fill, 0

    def slow(*args):
        assert go_on.wait(10)
        fill(*args)

    monkeypatch.setattr(_Store, "fill", slow)
    go_on.set()
    for unit in task.units(Cursor()):
        if unit.epoch == 1:
            task.table._settle()
            go_on.clear()
            task.table.take(task._ahead(unit), unit.place)
            held_up += any(not future.done() for future in task.table._coming.values())
            go_on.set()
        task.step(unit)
    assert held_up >= 6


def test_a_disk_that_is_full_behind_a_bucket_ends_the_run_and_loses_nothing(planted, tmp_path, monkeypatch):
    """The write fails in the thread, while a bucket trains; the run says so, and goes on when there is room."""
    values = {"num_partitions": 6, "held_partitions": 3, "bucket_order": "buffered", "epochs": 3}
    whole = task_of(planted, tmp_path / "whole", **values)
    Run(whole, tmp_path / "whole", loop(tmp_path / "whole", every=36)).go()
    folder = tmp_path / "cut"
    Run(task_of(planted, folder, **(values | {"epochs": 1})), folder, loop(folder, every=36)).go()
    saved = checkpoint.latest(folder).rows

    def full(self, partition, rows, *, synced=True):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("puna.train.rows.RowStore.write", full)
        with pytest.raises(DiskFull, match=r"partition \d of nodes does not fit the disk of .*goes on from the newest"):
            Run(task_of(planted, folder, **values), folder, loop(folder, every=36)).go()
    assert checkpoint.latest(folder).rows == saved
    checkpoint.verify(folder)
    again = task_of(planted, folder, **values)
    Run(again, folder, loop(folder, every=36)).go()
    np.testing.assert_array_equal(vectors(again), vectors(whole))


def test_a_partition_of_another_shape_is_told(planted, tmp_path):
    table = Table(tmp_path, GraphConfig(**SMALL, num_partitions=3), planted.num_nodes, 1)
    table.take([(0, 1)])
    table.flush()
    other = Table(tmp_path, GraphConfig(**(SMALL | {"dim": 4}), num_partitions=3), planted.num_nodes, 1)
    other.vectors.restore(table.vectors.snapshot())
    other.sums.restore(table.sums.snapshot())
    with pytest.raises(CheckpointError, match=r"nodes/0.*npy holds float32 of \(20, 8\), but float32 of \(20, 4\)"):
        other.take([(0, 1)])


def test_buckets_and_partitions_without_edges_are_passed_over(tmp_path):
    """Three nodes in eight partitions: most buckets are empty, some partitions too; all vectors are trained."""
    (tmp_path / "a.tsv").write_text("a\tx\tb\nb\tx\tc\na\tx\tc\n")
    import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "graph")
    graph = Graph.open(tmp_path / "graph")
    task = task_of(graph, tmp_path / "run", num_partitions=8, held_partitions=4, bucket_order="buffered")
    before = vectors(task)
    Run(task, tmp_path / "run", loop(tmp_path / "run")).go()
    steps = [event for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert [step["tokens"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert (vectors(task) != before).any(axis=1).all()


# --- as typed -------------------------------------------------------------------------------------------------------


FLAGS = [
    "--run.num_threads", "1", "--graph.dim", "8", "--graph.batch_edges", "50", "--graph.num_batch_negs", "10",
    "--graph.num_uniform_negs", "10", "--graph.epochs", "1", "--run.tensorboard", "false", "--checkpoint.every", "100",
    "--eval.every", "0", "--eval.tokens", "0",
]  # fmt: skip


@pytest.fixture
def tight(monkeypatch):
    """As if the process itself took nothing, so that a small graph can need partitions."""
    monkeypatch.setattr(budget, "PROCESS_BYTES", 0)


def test_memory_decides_what_train_plan_and_check_say(puna, planted, tight):
    flags = ["social", "--data.path", str(planted.folder), "--run.dir", "r", *FLAGS]
    six = recipe.load("social", flags[1:]).recipe.graph.model_copy(update={"num_partitions": 6, "held_partitions": 4})
    memory = f"{budget.memory(six, Sizes.of(planted), 1, False).total}B"
    flags += ["--memory", memory]
    status, out, err = puna("plan", "graph", *flags, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["num_partitions"], told["held_partitions"], told["bucket_order"]) == (6, 4, "buffered")
    assert told["memory"]["total"] == told["memory"]["available"]
    status, out, err = puna("check", *flags, "--json")
    found = json.loads(out)
    assert (found["task"], found["num_partitions"], found["splits"]["test"]) == ("graph", 6, 100)
    assert {"head", "relation", "tail"} == found["samples"][0].keys()
    status, out, err = puna("train", *flags, "--json")
    assert status == 0, err
    assert f"within {memory}: 6 partitions of" in err
    start = next(event for event in read_events("r") if event["event"] == "start")
    assert start["num_partitions"] == 6
    kept = recipe.load("r")
    assert (kept.recipe.graph.num_partitions, kept.recipe.graph.memory) == (6, memory)
    assert json.loads((run.Path("r") / "recipe.json").read_text())["graph.num_partitions"]["layer"] == "memory"
    assert puna("train", *flags)[0] == 0
    assert puna("resume", "r")[0] == 0


def test_the_page_of_check(puna, planted):
    status, out, err = puna("check", "social", "--data.path", planted.folder, "--memory", "2GB")
    assert status == 0, err
    assert "60 nodes, 2 relations; edges: 1,200 train, 100 valid, 100 test" in out
    assert "one partition, nothing is swapped" in out


def test_mistakes_with_memory(puna, planted, tmp_path):
    flags = ["--data.path", planted.folder, "--run.dir", "r"]
    assert "task is pretrain, which has no partitions" in puna("train", "tiny", "--memory", "4GB")[2]
    assert "graph.memory is 90MB, but 256 partitions need" in puna("train", "social", *flags, "--memory", "90MB")[2]
    assert "is a recipe of task pretrain" in puna("plan", "graph", "tiny")[2]
    assert "puna plan graph social" in puna("plan", "estimate", "social", "--gpu", "h100-sxm", "--gpus", "1")[2]


def test_a_bucket_larger_than_planned_is_refused(tmp_path, tight):
    """All edges between two nodes of one partition: the plan's even share was too little."""
    rows = "".join(f"n{n}\tn{n}\n" for n in range(40)) + "n0\tn4\n" * 40_000
    (tmp_path / "a.tsv").write_text(rows)
    import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "graph", ("head", "tail"))
    graph = Graph.open(tmp_path / "graph")
    four = GraphConfig(**SMALL, num_partitions=4, held_partitions=4)
    needed = budget.memory(four, Sizes.of(graph), 1, False).total
    config = fitted(GraphConfig(**SMALL, memory=f"{needed}B"), Sizes.of(graph), 1, False)
    assert config.num_partitions == 4
    with pytest.raises(RecipeError, match=r"the largest bucket has 40,010 edges.*more than 4 partitions"):
        GraphTask(config, ScheduleConfig(), graph, tmp_path / "run", num_threads=1)
    shutil.rmtree(graph.folder)
