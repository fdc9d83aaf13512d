"""A server in this process and trainers in others, forked from a server that has torch and the kernels already."""

import itertools
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from puna.graph.config import GraphConfig
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.links import Meeting
from puna.graph.serving import GraphServer
from puna.graph.task import GraphTask
from puna.graph.trainer import Trainer, train
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig, ScheduleConfig
from puna.train.launch import die_with
from puna.train.loop import Run

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["puna.graph.trainer", "puna.graph.questions", "puna.train.loop"])

VALUES = {
    "dim": 32, "operator": "complex_diagonal", "batch_edges": 100, "num_batch_negs": 10, "num_uniform_negs": 30,
    "init_scale": 0.1, "lr": 0.1, "num_partitions": 4,
}  # fmt: skip
NUM_RELATIONS, NUM_COMMUNITIES = 6, 48
NUM_LEFT_OUT, NUM_HELD_OUT = 200, 1200


def num_edges(size: int) -> int:
    """Of the training split."""
    return NUM_COMMUNITIES * size * NUM_RELATIONS * size - NUM_LEFT_OUT - NUM_HELD_OUT


def communities(folder: Path, size: int) -> Graph:
    """Relation r leads from each of `size` nodes of community c to nearly all of community c + r, so that held-out
    edges rank high."""
    lines = [
        f"n{head}\tr{relation}\tn{place * NUM_COMMUNITIES + (head + relation) % NUM_COMMUNITIES}\n"
        for head, relation, place in itertools.product(range(NUM_COMMUNITIES * size), range(NUM_RELATIONS), range(size))
    ]
    np.random.default_rng(0).shuffle(lines)
    parts = {"train": lines[NUM_HELD_OUT + NUM_LEFT_OUT :], "valid": lines[:NUM_HELD_OUT]}
    for name, part in parts.items():
        (folder / f"{name}.tsv").write_text("".join(part))
    import_graph({name: folder / f"{name}.tsv" for name in parts}, folder / "graph")
    return Graph.open(folder / "graph")


def job(graph, run, **values):
    return GraphConfig(**(VALUES | values)), ScheduleConfig(decay="linear"), graph, Path(run)


def loop(run, every=1000):
    return LoopConfig(
        run=RunConfig(dir=str(run), tensorboard=False),
        checkpoint=CheckpointConfig(every=every),
        eval=EvalConfig(every=0, tokens=NUM_HELD_OUT),
    )


def alone(graph, run, seed=0, **values):
    """What one process, with one worker, makes of it."""
    task = GraphTask(*job(graph, run, **values), seed=seed, num_threads=1, eval_edges=NUM_HELD_OUT)
    Run(task, run, loop(run)).go()
    return task


class Assembled(GraphServer):
    """Begins when so many trainers are there."""

    num_wanted = 0

    def _give(self):
        if len(self._guests) >= self.num_wanted:
            self.num_wanted = 0
            super()._give()


class Dying(Trainer):
    """Kills itself when it has trained so many buckets, the last of them not given back."""

    num_left = 0

    def _train(self, *arguments):
        loss = super()._train(*arguments)
        self.num_left -= 1
        if not self.num_left:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class Lazy(Trainer):
    """Takes its time, so that it can be stopped while it trains."""

    seconds = 0.0

    def _train(self, *arguments):
        loss = super()._train(*arguments)
        time.sleep(self.seconds)
        return loss


def be_trainer(meeting, folder, run, facts, values, seed, dies_after, seconds):
    die_with(os.getppid())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    kind = Dying if dies_after else Lazy

    def make():
        trainer = kind(*job(Graph.open(folder), run, **values), seed=seed, num_threads=1)
        trainer.num_left, trainer.seconds = dies_after, seconds
        return trainer

    train(meeting, facts, Path(folder), make)


@contextmanager
def trainers(meeting, graph, run, deaths, seed=0, facts=None, seconds=0.0, **values):
    """A process for each number of `deaths`: buckets after which it dies; 0: never."""
    processes = [
        context.Process(
            target=be_trainer, args=(meeting, str(graph.folder), str(run), facts or {}, values, seed, number, seconds)
        )
        for number in deaths
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def together(graph, run, deaths=(0, 0), seed=0, server=Assembled, every=1000, **values):
    """A run of a server and trainers, to its end or what it raises; returns the server's task and exit codes."""
    meeting = meet(run)
    task = server(meeting, {}, *job(graph, run, **values), seed=seed, num_threads=1, eval_edges=NUM_HELD_OUT)
    task.num_wanted = len(deaths)
    with trainers(meeting, graph, run, deaths, seed, **values) as processes:
        with task.serving():
            Run(task, run, loop(run, every)).go()
        for process in processes:
            process.join(10)
        codes = [process.exitcode for process in processes]
    return task, codes


def meet(run):
    """A new meeting place beside a run."""
    Path(run).mkdir(parents=True, exist_ok=True)
    return Meeting(0, str(Path(run) / f"meeting-{os.urandom(4).hex()}"))
