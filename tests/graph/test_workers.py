"""Threads that share a bucket's batches: the first are one worker's; the next bucket's edges are made ready."""

import threading
import time

import numpy as np
import pytest

from puna.graph import task as graph_task
from puna.graph.config import GraphConfig
from puna.graph.task import GraphTask
from puna.graph.workers import Workers
from puna.train.config import ScheduleConfig
from puna.train.task import Cursor

SMALL = {"dim": 8, "operator": "diagonal", "batch_edges": 40, "num_batch_negs": 10, "num_uniform_negs": 10}


def task_of(graph, run, workers=2, **values):
    return GraphTask(GraphConfig(**(SMALL | values)), ScheduleConfig(decay="constant"), graph, run, num_threads=workers)


def test_every_batch_is_trained_once_and_the_first_ones_by_one_worker():
    seen, lock = [], threading.Lock()

    def train(worker, n):
        with lock:
            seen.append(("begins", worker, n))
        time.sleep(0.002)
        with lock:
            seen.append(("ends", worker, n))

    Workers(["a", "b", "c"]).share(30, train, num_alone=5)
    assert sorted(n for what, _, n in seen if what == "ends") == list(range(30))
    assert seen[:10] == [(what, "a", n) for n in range(5) for what in ("begins", "ends")]
    assert {worker for _, worker, _ in seen} == {"a", "b", "c"}


@pytest.mark.parametrize("num_alone", [0, 9])
def test_fewer_batches_than_the_first_ones_end_and_an_error_comes_through(num_alone):
    done = []
    Workers(["a", "b"]).share(3, lambda _, n: done.append(n), num_alone)
    assert sorted(done) == [0, 1, 2]

    def broken(_, n):
        raise ValueError(f"batch {n}")

    with pytest.raises(ValueError, match="batch 0"):
        Workers(["a", "b"]).share(3, broken, num_alone)


@pytest.mark.parametrize("num_partitions", [1, 2])
def test_only_rows_without_a_step_are_met_alone(planted, tmp_path, monkeypatch, num_partitions):
    """The first bucket, and every later one that brings a partition in whose rows are new."""
    task = task_of(planted, tmp_path, epochs=2, num_partitions=num_partitions)
    told = []
    share = Workers.share

    def spied(self, num_batches, train, num_alone):
        told.append(num_alone)
        share(self, num_batches, train, num_alone)

    monkeypatch.setattr(Workers, "share", spied)
    new, alone = {0, 1} if num_partitions == 2 else {0}, []
    for unit in task.units(Cursor()):
        alone.append(graph_task.NUM_ALONE if new & set(unit.bucket) else 0)
        new -= set(unit.bucket)
        task.step(unit)
    assert told == alone
    assert sum(map(bool, told)) in (1, num_partitions)
    assert told[-1] == 0


@pytest.mark.parametrize("ahead", [10**6, 0])
def test_edges_made_ready_are_those_of_the_next_unit(planted, tmp_path, monkeypatch, ahead):
    """Rounds and epochs are crossed; few edges are made ready before their unit, many are not."""
    monkeypatch.setattr(graph_task, "NUM_AHEAD", ahead)
    task = task_of(planted, tmp_path, workers=1, epochs=2, num_partitions=2, num_chunks=2)
    units = list(task.units(Cursor()))
    assert len(units) == 16
    for unit, after in zip(units, [*units[1:], None], strict=True):
        edges = task._taken(unit)
        expected = task._edges(unit.share)
        for name in ("heads", "relations", "tails"):
            np.testing.assert_array_equal(getattr(edges, name), getattr(expected, name))
        assert list(task._coming) == ([after.share] if after and ahead else [])
