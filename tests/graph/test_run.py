"""A graph recipe under the run loop: learning, exact resume, partitions on disk, and the `puna graph` verbs."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from puna.errors import CheckpointError, DataError, DiskFull, NonFinite, Unfinished
from puna.graph import budget
from puna.graph.config import GraphConfig
from puna.graph.partitions import Table
from puna.graph.task import GraphTask
from puna.train import checkpoint
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig, ScheduleConfig
from puna.train.loop import Run
from puna.train.metrics import last_steps, read_events
from puna.train.task import Cursor

SMALL = {
    "dim": 8, "operator": "diagonal", "epochs": 8, "batch_edges": 40, "num_batch_negs": 10, "num_uniform_negs": 10,
    "init_scale": 0.1,
}  # fmt: skip


def task_of(graph, run, seed=0, workers=1, eval_edges=100, decay="constant", **values):
    config = GraphConfig(**(SMALL | values))
    schedule = ScheduleConfig(decay=decay)
    return GraphTask(config, schedule, graph, run, seed=seed, num_threads=workers, eval_edges=eval_edges)


def loop(run, every=1, eval_every=0, keep=2):
    return LoopConfig(
        run=RunConfig(dir=str(run), tensorboard=False),
        checkpoint=CheckpointConfig(every=every, keep=keep),
        eval=EvalConfig(every=eval_every, tokens=100),
    )


def vectors(task):
    return task.scorer().vectors(np.arange(task.graph.num_nodes))


def relation_tables(task):
    return [side.table for side in task.relations]


def test_planted_communities_are_found(planted, tmp_path):
    """Nodes of one community become neighbours, and held-out edges rank far above chance."""
    task = task_of(planted, tmp_path, epochs=30)
    before = task.evaluate("heldout")
    Run(task, tmp_path, loop(tmp_path, every=30)).go()
    after = task.evaluate("heldout")
    assert after["mr"] < 0.62 * before["mr"]
    found = vectors(task)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    community = np.array([int(name[1:]) % 2 for name in planted.names()])
    similar = found @ found.T
    same = community[:, None] == community
    assert similar[same].mean() > similar[~same].mean() + 0.5


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_losses_fall_with_any_number_of_workers(planted, tmp_path, workers, reciprocal):
    """Two workers lose some of each other's writes to the one row of relations, so they leave the start later."""
    task = task_of(planted, tmp_path, workers=workers, reciprocal=reciprocal, epochs=24)
    Run(task, tmp_path, loop(tmp_path, every=24)).go()
    losses = [step["loss"] for step in last_steps(read_events(tmp_path)).values()]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("num_partitions", [1, 3])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(planted, tmp_path, num_partitions):
    """Bit for bit: stopped after every unit, each time in a fresh task."""
    values = {"num_partitions": num_partitions, "epochs": 2, "decay": "linear"}
    whole = task_of(planted, tmp_path / "whole", **values)
    Run(whole, tmp_path / "whole", loop(tmp_path / "whole", every=3)).go()
    run = tmp_path / "stopped"

    class Stopping(GraphTask):
        def step(self, unit):
            report = super().step(unit)
            os.kill(os.getpid(), signal.SIGTERM)
            return report

    for _ in range(2 * num_partitions**2):
        pieces = task_of(planted, run, **values)
        pieces.__class__ = Stopping
        with pytest.raises(Unfinished):
            Run(pieces, run, loop(run, every=100)).go()
    last = task_of(planted, run, **values)
    Run(last, run, loop(run)).go()
    np.testing.assert_array_equal(vectors(last), vectors(whole))
    for a, b in zip(relation_tables(last), relation_tables(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [[s["loss"] for s in last_steps(read_events(folder)).values()] for folder in (tmp_path / "whole", run)]
    assert steps[0] == steps[1]


def test_two_seeds_differ(planted, tmp_path):
    tasks = [task_of(planted, tmp_path / str(seed), seed=seed, epochs=1) for seed in (0, 1)]
    for seed, task in enumerate(tasks):
        Run(task, tmp_path / str(seed), loop(tmp_path / str(seed))).go()
    assert (vectors(tasks[0]) != vectors(tasks[1])).any()


def test_units_are_a_function_of_the_cursor_and_hold_every_edge_once(planted, tmp_path):
    task = task_of(planted, tmp_path, num_partitions=3, num_chunks=2, epochs=2)
    units = list(task.units(Cursor()))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert list(task.units(Cursor(5))) == units[5:]
    for epoch in range(2):
        own = [unit for unit in units if unit.epoch == epoch]
        got = []
        for unit in own:
            edges, (i, j) = task._edges(unit.share), unit.bucket
            got += zip(
                (edges.heads * 3 + i).tolist(), edges.relations.tolist(), (edges.tails * 3 + j).tolist(), strict=True
            )
        edges = planted.edges("train")
        assert sorted(got) == sorted(
            zip(*(c.tolist() for c in (edges.heads, edges.relations, edges.tails)), strict=True)
        )
    assert units[-1].tokens + len(task._edges(units[-1].share)) == task.total == 2400


def test_batches_of_one_operator_hold_one_relation(planted, tmp_path):
    task = task_of(planted, tmp_path, reciprocal=False)
    unit = next(task.units(Cursor()))
    batches = [make() for make in task._batches(unit, task._edges(unit.share))]
    assert all(len(set(batch.relations.tolist())) == 1 and len(batch) <= 40 for batch in batches)
    assert sum(map(len, batches)) == 1200


def test_memory_holds_two_partitions_and_the_disk_no_version_twice(planted, tmp_path):
    task = task_of(planted, tmp_path, num_partitions=5, epochs=1)
    held, files = [], []
    for unit in task.units(Cursor()):
        task.step(unit)
        held.append(len(task.table._parts))
        files.append(len(list((tmp_path / "rows" / "nodes").iterdir())))
    assert max(held) == 2
    assert max(files) <= 5


def test_a_partition_keeps_its_rows_over_the_disk(planted, tmp_path):
    table = Table(tmp_path, GraphConfig(**SMALL, num_partitions=3), planted.num_nodes, 1)
    part, _ = table.take([(1, 1)])
    part.vectors[:] = 7
    part.sums[:] = 3
    table.take([(0, 2)])
    np.testing.assert_array_equal(table.view(1), np.full((20, 8), 7, "f4"))
    again, _ = table.take([(1, 1)])
    assert (again.sums == 3).all()
    assert again.vectors.flags.writeable


@contextmanager
def small_disk():
    """Inside, files of at most 500 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_during_a_swap_loses_nothing(planted, tmp_path):
    task = task_of(planted, tmp_path, num_partitions=3)
    Run(task_of(planted, tmp_path, num_partitions=3, epochs=1), tmp_path, loop(tmp_path)).go()
    saved = checkpoint.latest(tmp_path)
    checkpoint.load(tmp_path, task.state())
    task.table.take([(0, 1)])
    with (
        small_disk(),
        pytest.raises(DiskFull, match=r"partition 0 of nodes does not fit the disk of .*rows/nodes: it has"),
    ):
        task.table.take([(2, 1)])
    assert not list((tmp_path / "rows" / "nodes").glob("*.tmp"))
    assert checkpoint.latest(tmp_path) == saved
    checkpoint.verify(tmp_path)


def test_partitions_do_not_change_where_vectors_begin(planted, tmp_path):
    whole, parts = (task_of(planted, tmp_path / str(p), num_partitions=p) for p in (1, 4))
    np.testing.assert_array_equal(vectors(whole), vectors(parts))


@pytest.mark.parametrize("reciprocal", [True, False])
def test_the_memory_formula_counts_what_a_run_allocates(planted, tmp_path, reciprocal):
    values = {"reciprocal": reciprocal, "num_partitions": 5, "held_partitions": 3}
    task = task_of(planted, tmp_path, epochs=1, **values)
    task.step(next(task.units(Cursor())))
    task.table.flush()
    worker = task._workers.own[0]
    arrays = [worker.rows, worker.lengths, worker.first, worker.following, worker.unique, worker.relation_grads]
    tensors = [worker.vectors, worker.grads, worker.anchors, worker.anchor_grads]
    tensors += [worker.turned.far, worker.turned.far_grads, worker.turned.near, worker.turned.near_grads]
    own = sum(x.nbytes for x in arrays) + sum(x.numel() * 4 for x in tensors)
    told = budget.memory(task.config, budget.Sizes.of(planted, 50), 1, evaluates=True)
    slack = 16 * 8 * 40  # the formula takes vectors that are turned for all slots of a side
    assert own <= told.workers - (1 << 20) <= own + slack
    assert told.partitions == sum(x.nbytes for p in task.table._rooms.values() for x in (p.vectors, p.sums))
    assert told.edges == 36 * 50
    assert told.relations == sum(x.nbytes for side in task.relations for x in (side.table, side.sums))
    assert task.describe()["memory"]["total"] == task.plan["memory"]["total"]


def test_a_run_that_blows_up_says_so_and_keeps_its_checkpoint(planted, tmp_path):
    run = tmp_path
    Run(task_of(planted, run, epochs=1), run, loop(run)).go()
    saved = checkpoint.latest(run).rows
    task = task_of(planted, run, epochs=3, lr=1e30)
    with pytest.raises(NonFinite, match=r"unit 2 .*lower graph.lr"):
        Run(task, run, loop(run)).go()
    assert checkpoint.latest(run).rows == saved
    checkpoint.verify(run)


def test_patience_ends_a_run_that_no_longer_gets_better(planted, tmp_path):
    task = task_of(planted, tmp_path, epochs=500, patience=3, lr=0.3)
    Run(task, tmp_path, loop(tmp_path, every=50, eval_every=1)).go()
    evals = [event["mrr"] for event in read_events(tmp_path) if event["event"] == "eval"]
    assert len(evals) < 200
    assert max(evals[-3:]) <= max(evals[:-3])


# --- as typed -------------------------------------------------------------------------------------------------------


FLAGS = [
    "--run.num_threads", "1", "--graph.dim", "8", "--graph.batch_edges", "50", "--graph.num_batch_negs", "10",
    "--graph.num_uniform_negs", "10", "--graph.epochs", "2", "--run.tensorboard", "false", "--eval.every", "1",
    "--checkpoint.every", "1",
]  # fmt: skip


def test_the_verbs_from_files_to_neighbours(puna, planted, tmp_path):
    folder = planted.folder.parent
    words = [f"--{name}={folder / name}.tsv" for name in ("train", "valid", "test")]
    status, out, _ = puna("graph", "import", *words, "--out", "g", "--json")
    assert (status, json.loads(out)["edges"]) == (0, {"train": 1200, "valid": 100, "test": 100})
    status, out, err = puna("train", "graph-small", "--data.path", "g", "--run.dir", "r", *FLAGS, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["steps"], told["tokens"]) == (2, 2400)
    assert 0 < told["heldout_mrr"] < 1
    status, out, _ = puna("graph", "eval", "r", "--split", "test", "--relations", "--json")
    figures = json.loads(out)
    assert figures["num_edges"] == 100
    assert {"mrr", "mrr_interval", "mr", "hits1", "hits3", "hits10", "hits50", "auc"} == figures["raw"].keys()
    assert figures["filtered"]["mrr"] >= figures["raw"]["mrr"]
    assert {record["relation"] for record in figures["relations"]} == {"same", "other"}
    status, out, _ = puna("graph", "neighbors", "r", "n4", "--count", "3", "--json")
    found = json.loads(out)["neighbors"]
    assert len(found) == 3
    assert "n4" not in [record["name"] for record in found]
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    assert puna("graph", "eval", "r", "--step", "1", "--limit", "7", "--json")[0] == 0
    assert puna("verify", "r")[0] == 0
    status, _, err = puna("train", "graph-small", "--data.path", "g", "--run.dir", "r", *FLAGS, "--graph.dim", "16")
    assert status == 2
    assert "graph.dim is 8 there, 16 here" in err


def test_from_python_in_five_lines(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from puna import recipe, run
    from puna.graph.importing import import_graph

    import_graph({"train": str(planted.folder.parent / "train.tsv")}, "graph")
    told = run.train(recipe.load("graph-small", ["--data.path", "graph", "--run.dir", "runs/graph", *FLAGS]))
    assert (told["tokens"], told["heldout_loss"]) == (2400, None)


@pytest.mark.parametrize("form", ["tsv", "npy", "parquet"])
def test_exported_tables_are_the_models(planted, tmp_path, form):
    from puna.graph.trained import export, load

    if form == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
    task = task_of(planted, tmp_path / "run", epochs=1, num_partitions=2)
    Run(task, tmp_path / "run", loop(tmp_path / "run")).go()
    scorer, step = load(tmp_path / "run", task.config, planted)
    assert step == 4
    out = tmp_path / "out"
    assert export(scorer, out, form)["num_nodes"] == 60
    names, wanted, relations = planted.names(), vectors(task), relation_tables(task)
    if form == "npy":
        np.testing.assert_array_equal(np.load(out / "nodes.npy"), wanted)
        np.testing.assert_array_equal(np.load(out / "relations.head.npy"), relations[1])
    elif form == "tsv":
        rows = [line.split("\t") for line in (out / "nodes.tsv").read_text().splitlines()]
        assert [row[0] for row in rows] == names
        np.testing.assert_array_equal(np.array([row[1:] for row in rows], "f4"), wanted)
        rows = [line.split("\t") for line in (out / "relations.tsv").read_text().splitlines()]
        assert [row[1:3] for row in rows] == [["tail", "diagonal"]] * 2 + [["head", "diagonal"]] * 2
        np.testing.assert_array_equal(np.array([row[3:] for row in rows], "f4"), np.concatenate(relations))
    else:
        table = pq.read_table(out / "nodes.parquet")
        assert table["name"].to_pylist() == names
        np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), "f4"), wanted)
    with pytest.raises(DataError, match="already there"):
        export(scorer, out, form)


def test_a_graph_other_than_the_runs_is_refused(planted, tmp_path):
    from puna.graph.graph import Graph
    from puna.graph.importing import import_graph
    from puna.graph.trained import load

    task = task_of(planted, tmp_path / "run", epochs=1)
    Run(task, tmp_path / "run", loop(tmp_path / "run")).go()
    (tmp_path / "a.tsv").write_text("a\tx\tb\nb\ty\tc\n")
    import_graph({"train": tmp_path / "a.tsv"}, tmp_path / "other")
    with pytest.raises(DataError, match=r"vectors of 60 nodes, but .*other has 3"):
        load(tmp_path / "run", task.config, Graph.open(tmp_path / "other"))
    with pytest.raises(CheckpointError):
        load(tmp_path / "none", task.config, planted)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--graph.dim", "7"], "graph.dim is 7, but complex_diagonal needs pairs of numbers"),
        (["--graph.operator", "translation", "--graph.relation_init", "random"], "translation has no angles or signs"),
        (["--graph.batch_edges", "55"], "graph.batch_edges is 55, no multiple of graph.num_batch_negs 10"),
        (["--graph.operator", "linear", "--graph.n3", "0.1"], "graph.n3 is set, but linear has matrices"),
        (["--graph.products", "bf16"], "graph.products is bf16, which only training by question can: set graph.all_"),
        (
            ["--run.num_processes", "2", "--graph.num_partitions", "3"],
            "graph.num_partitions is 3, but 2 trainers need 4",
        ),
        (["--graph.num_batch_negs", "0", "--graph.num_uniform_negs", "0"], "leave no negative to learn from"),
        (["--data.path", "nowhere"], "nowhere holds no graph"),
    ],
)
def test_mistakes_in_a_recipe(puna, planted, words, told):
    flags = [*FLAGS, "--data.path", planted.folder, "--run.dir", "r"]
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key in flags:
            flags[flags.index(key) + 1] = value
        else:
            flags += [key, value]
    status, _, err = puna("train", "graph-small", *flags)
    assert status == 2
    assert told.lower() in err.lower().replace("\n", " ")


def test_verbs_refuse_what_they_are_not_for(puna, tmp_path):
    assert "holds no run" in puna("graph", "eval", "nowhere")[2]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.toml").write_text('task = "pretrain"\n')
    assert "holds a run of task pretrain" in puna("graph", "neighbors", "r", "a")[2]
    assert "holds no graph" in puna("check", "graph-small")[2]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_vectors(planted, tmp_path):
    """SIGKILL in the middle, as typed, with one worker."""

    def command(folder):
        return [
            sys.executable, "-m", "puna.cli", "train", "graph-small", "--data.path", str(planted.folder), "--run.dir",
            str(folder), *FLAGS, "--graph.epochs", "60", "--checkpoint.every", "5", "--eval.every", "0",
        ]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.complete_steps(tmp_path / "killed"):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    found = [checkpoint.latest(tmp_path / name).rows["nodes"]["0"]["sha256"] for name in ("whole", "killed")]
    assert found[0] == found[1]
