"""Training graph embeddings under the one loop: a unit is one bucket of edges in one round of an epoch."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from puna.errors import NonFinite, RecipeError
from puna.graph import budget, operators
from puna.graph.buckets import NUM_AHEAD, Bucket, Buckets, order_buckets
from puna.graph.config import GraphConfig, num_bytes
from puna.graph.graph import Edges, Graph, Pair
from puna.graph.growing import Start
from puna.graph.layout import Layout
from puna.graph.partitions import Table
from puna.graph.questions import Asked, Questions, QuestionWorker, cut
from puna.graph.ranking import Scorer, draw_all, rank
from puna.graph.worker import Part, Rates, Relations, Worker
from puna.graph.workers import NUM_ALONE, Workers
from puna.sparse.hashing import key_of
from puna.sparse.padding import padded
from puna.sparse.threads import Team
from puna.train.config import ScheduleConfig, TrainConfig
from puna.train.schedule import Schedule
from puna.train.task import Cursor, Json, Rows, State, StepReport, Task, Tensors


@dataclass(frozen=True)
class Unit:
    """A share of one bucket's edges."""

    index: int
    epoch: int
    chunk: int
    bucket: Bucket
    place: int  # in its round, among the buckets that have edges
    tokens: int  # edges trained before it

    @property
    def share(self) -> "Share":
        """What decides its edges."""
        return self.epoch, self.chunk, self.bucket


Share = tuple[int, int, Bucket]
Batch = Callable[[], Edges] | Callable[[], Questions]
"""Gathered by the worker that trains it."""


def num_workers(config: GraphConfig, num_threads: int) -> int:
    """Workers of a run: one a thread, but one in all where edges are trained by question. 0 threads: one a core."""
    return 1 if config.by_question else _threads(num_threads)


def _threads(num_threads: int) -> int:
    return num_threads or len(os.sched_getaffinity(0))


class GraphTask(Task):
    """Embeds a graph's nodes. Resume is exact with one worker; with several, races make runs differ as noise does."""

    def __init__(
        self,
        config: GraphConfig,
        schedule: ScheduleConfig,
        graph: Graph,
        run: Path,
        *,
        seed: int = 0,
        num_threads: int = 0,
        eval_edges: int = 0,
        start: Start | None = None,
    ) -> None:
        """num_threads: of all workers; 0: one a core. eval_edges: held-out edges of an evaluation. start: what it goes
        on from.

        Raises DataError (see `Buckets.open`), and RecipeError where the largest bucket does not fit graph.memory.
        """
        self.config, self.graph, self.seed, self.eval_edges = config, graph, seed, eval_edges
        self.num_workers = num_workers(config, num_threads)
        self.num_threads = _threads(num_threads)
        known = (start.counts, start.num_relations) if start and config.freeze else None
        layout = Layout.of(config, graph.types)
        self._refuse_with_features(start)
        self.buckets = Buckets.open(graph, "train", config.num_partitions, known, layout.whole)
        self.total = config.epochs * int(self.buckets.offsets[-1])
        self.schedule = Schedule(schedule, TrainConfig(tokens=self.total))
        self.plan = self._plan()
        self.table = Table(run, config, layout, key_of(seed, "nodes"), start, graph.bags)
        self.relations = fresh_relations(config, graph.num_relations, key_of(seed, "relations"))
        if start:
            start.fill_relations(self.relations)
        self.best: dict[str, Any] = {"mrr": -1.0, "waited": 0}
        self._workers: Workers[Any] | None = None  # of Worker, or QuestionWorker where the settings allow it
        self._aside = ThreadPoolExecutor(1, "edges")
        self._coming: dict[Share, Future[Edges]] = {}
        self._paths: dict[tuple[int, int], list[Bucket]] = {}
        self._asked: tuple[Edges, list[Asked]] | None = None

    def units(self, cursor: Cursor) -> Iterator[Unit]:
        """Buckets that hold edges, epoch by epoch; ends early where the held-out MRR no longer rises (patience)."""
        index, tokens = 0, 0
        for epoch, chunk in itertools.product(range(self.config.epochs), range(self.config.num_chunks)):
            for place, bucket in enumerate(self._path(epoch, chunk)):
                if self.config.patience and self.best["waited"] >= self.config.patience:
                    return
                if index >= cursor.units:
                    yield Unit(index, epoch, chunk, bucket, place, tokens)
                start, end = self._share(bucket, chunk)
                index, tokens = index + 1, tokens + end - start

    def step(self, unit: Unit) -> StepReport:
        """Train on a bucket. Raises NonFinite; partitions on disk are then as the last checkpoint has them."""
        began, reads = time.perf_counter(), self.table.num_reads
        head_part, tail_part = self.table.take(self._ahead(unit), unit.place)
        edges = self._taken(unit)
        read_s = time.perf_counter() - began
        head_parts = self.table.by_type(unit.bucket[0], head_part)
        tail_parts = head_parts if tail_part is head_part else self.table.by_type(unit.bucket[1], tail_part)
        loss = self._train(unit, edges, head_parts, tail_parts)
        require_finite(unit, loss)
        metrics = {"lr": self.config.lr * self.schedule.learning_rate(unit.tokens), "epoch": float(unit.epoch + 1)}
        metrics |= {"swap_s": read_s, "swaps": float(self.table.num_reads - reads)}
        return StepReport(loss / len(edges), len(edges), len(edges), metrics)

    def state(self) -> State:
        """Vectors and Adagrad sums as rows; relations as tensors; the best held-out MRR."""
        state: State = {"nodes": Rows(self.table.vectors), "nodes.adagrad": Rows(self.table.sums)}
        if self.relations[0].table.size:
            state["relations"] = Tensors(lambda: relation_tensors(self.relations))
        return state | {"best": Json(lambda: self.best, self._set_best)}

    def evaluate(self, split: str) -> dict[str, float]:
        """Filtered ranks of `eval_edges` edges of the graph's valid split; none without it.

        Among all nodes, or `eval_candidates` drawn ones.
        """
        if "valid" not in self.graph.splits or not self.eval_edges:
            return {}
        edges = self.graph.edges("valid")
        if len(edges) > self.eval_edges:
            chosen = np.random.default_rng(key_of(self.seed, "valid")).choice(
                len(edges), self.eval_edges, replace=False
            )
            edges = edges.take(np.sort(chosen))
        torch.set_num_threads(self.num_threads)
        count, candidates = self.config.eval_candidates, None
        if count:
            candidates = draw_all(self.graph, edges, count, self.config.eval_sampling, self.seed)
        figures = rank(self.scorer(), edges, candidates).figures()["filtered"]
        self.best["waited"] += 1
        if figures["mrr"] > self.best["mrr"]:
            self.best.update(mrr=figures["mrr"], waited=0)
        return {name: figures[name] for name in ("mrr", "mr", "hits1", "hits10")}

    def describe(self) -> dict[str, Any]:
        """Sizes, memory by the formula, swaps of an epoch by its order."""
        config = self.config
        width = config.num_batch_negs + config.num_uniform_negs + config.num_prevalence_negs
        facts = {
            "num_parameters": self.graph.num_nodes * config.dim + sum(side.table.size for side in self.relations),
            **self.plan,
            "version": self.graph.version,
            "flops_per_token": 0 if config.all_negs else 12 * width * config.dim,
        }
        return facts | ({} if config.patience else {"total_tokens": self.total})

    def scorer(self) -> Scorer:
        """What ranks and neighbours are computed from: the tables as they are now."""
        return Scorer(self.config, self.graph, self.table.view, self.relations)

    def _plan(self) -> dict[str, Any]:
        """What memory and disk will see. Raises RecipeError where that is more than graph.memory."""
        largest = int(np.diff(self.buckets.offsets).max())
        sizes = budget.Sizes.of(self.graph, largest)
        told = budget.plan(self.config, sizes, self.num_workers, self.eval_edges > 0)
        if self.config.memory and told["memory"]["total"] > num_bytes(self.config.memory):
            raise RecipeError(
                f"graph.memory is {self.config.memory}, but the largest bucket has {largest:,} edges, and with it "
                f"{told['memory']['total'] / 1e6:,.0f} MB are needed",
                f"Give more memory, or more than {self.config.num_partitions} partitions (graph.num_partitions).",
            )
        return told

    def _refuse_with_features(self, start: Start | None) -> None:
        named = [key for key in ("all_negs", "max_norm") if self.config.model_dump()[key]]
        if self.graph.feature_counts and (named or start):
            key = named[0] if named else "start"
            raise RecipeError(
                f"graph.{key} is set, but the nodes of {next(iter(self.graph.feature_counts))} are bags of features",
                f"Leave graph.{key} out: it is for nodes with vectors of their own.",
            )

    def _path(self, epoch: int, chunk: int) -> list[Bucket]:
        """A round's buckets that have edges, in its order."""
        if (epoch, chunk) not in self._paths:
            if len(self._paths) > 2:
                self._paths.clear()
            config, rng = self.config, np.random.default_rng(key_of(self.seed, "order", epoch, chunk))
            order = order_buckets(config.bucket_order, config.num_partitions, rng, config.held_partitions)
            self._paths[epoch, chunk] = [bucket for bucket in order if len(range(*self._share(bucket, chunk)))]
        return self._paths[epoch, chunk]

    def _ahead(self, unit: Unit) -> list[Bucket]:
        """The unit's round, and the one after it, if any is: what decides which partitions stay in memory."""
        after = unit.epoch * self.config.num_chunks + unit.chunk + 1
        if after == self.config.epochs * self.config.num_chunks:
            return self._path(unit.epoch, unit.chunk)
        return self._path(unit.epoch, unit.chunk) + self._path(*divmod(after, self.config.num_chunks))

    def _share(self, bucket: Bucket, chunk: int) -> tuple[int, int]:
        """Where a round's share of a bucket begins and ends in the bucket's order."""
        size = self.buckets.size(bucket)
        return chunk * size // self.config.num_chunks, (chunk + 1) * size // self.config.num_chunks

    def _taken(self, unit: Unit) -> Edges:
        """A unit's edges; those of the next one begin to be made ready, unless they are many."""
        if self._asked and self._is_one_share:
            return self._asked[0]
        coming = self._coming.pop(unit.share, None)
        edges = self._edges(unit.share) if coming is None else coming.result()
        after = [] if self._is_one_share else self._next(unit)
        few = [share for share in after if self.buckets.size(share[-1]) <= NUM_AHEAD]
        self._coming = {share: self._aside.submit(self._edges, share) for share in few}
        return edges

    @property
    def _is_one_share(self) -> bool:
        """Whether units differ in nothing but in the order of questions, so that these are grouped once."""
        return self.config.by_question and self.config.num_partitions == self.config.num_chunks == 1

    def _questions(self, edges: Edges) -> list[Asked]:
        """Edges by question, one side and one pair of types at a time."""
        if self._asked is None or self._asked[0] is not edges:
            self._asked = None
            self._asked = edges, [Asked.of(pool, side) for pool in self._pools(edges).values() for side in range(2)]
        return self._asked[1]

    def _next(self, unit: Unit) -> list["Share"]:
        """What follows a unit, if anything does."""
        after = unit.place + 1
        own = self._path(unit.epoch, unit.chunk)
        if after < len(own):
            return [(unit.epoch, unit.chunk, own[after])]
        epoch, chunk = divmod(unit.epoch * self.config.num_chunks + unit.chunk + 1, self.config.num_chunks)
        return [] if epoch == self.config.epochs else [(epoch, chunk, first) for first in self._path(epoch, chunk)[:1]]

    def _edges(self, share: "Share") -> Edges:
        """Edges of a unit, shuffled; those that lead from one type to another stand together, and where a relation has
        one operator, those of a relation."""
        epoch, chunk, bucket = share
        rng = np.random.default_rng(key_of(self.seed, "edges", epoch, bucket))
        order = np.arange(self.buckets.size(bucket), dtype=np.int32)
        if not self._is_one_share:
            rng.shuffle(order)
        order = order[slice(*self._share(bucket, chunk))]
        if not self.config.reciprocal or self.graph.is_typed:
            groups = self._groups(self.buckets.column(bucket, "relations")[order])
            order = order[np.argsort(groups, kind="stable")]
        return self.buckets.rows(bucket, order)

    def _groups(self, relations: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """What the edges of a batch have in common: types, and the relation where that has one operator."""
        if not self.graph.is_typed:
            return relations
        pairs = self.graph.pair_of[relations]
        return pairs if self.config.reciprocal else pairs * self.graph.num_relations + relations

    def _pools(self, edges: Edges) -> dict[Pair, Edges]:
        """A unit's edges by the types that they lead from and to."""
        if not self.graph.is_typed:
            return {self.graph.pairs[0]: edges}
        bounds = np.searchsorted(self.graph.pair_of[edges.relations], np.arange(len(self.graph.pairs) + 1))
        slices = itertools.starmap(slice, itertools.pairwise(bounds.tolist()))
        pools = zip(self.graph.pairs, map(edges.take, slices), strict=True)
        return {pair: pool for pair, pool in pools if len(pool)}

    def _batches(self, unit: Unit, edges: Edges) -> Sequence[Batch]:
        size, rng = self.config.batch_edges, np.random.default_rng(key_of(self.seed, "batches", unit.index))
        if self.config.by_question:
            return cut(self._questions(edges), size, rng)
        if self.config.reciprocal and not self.graph.is_typed:
            pieces = list(self._even(len(edges)))
        else:
            starts = [0, *(np.flatnonzero(np.diff(self._groups(edges.relations))) + 1).tolist(), len(edges)]
            spans = itertools.pairwise(starts)
            pieces = [(s, min(s + size, end)) for start, end in spans for s in range(start, end, size)]
            pieces = [pieces[n] for n in rng.permutation(len(pieces))]
        return [partial(edges.take, slice(*piece)) for piece in pieces]

    def _even(self, num_edges: int) -> Iterator[tuple[int, int]]:
        """Where batches begin and end: of whole chunks, about as many for each worker."""
        size = self.config.batch_edges
        chunk = min(size, self.config.num_batch_negs or 1)
        num_chunks = -(-num_edges // chunk)
        num_batches = min(num_chunks, padded(-(-num_chunks // (size // chunk)), self.num_workers))
        bounds = (min(num_edges, n * num_chunks // num_batches * chunk) for n in range(num_batches + 1))
        return itertools.pairwise(bounds)

    def _train(self, unit: Unit, edges: Edges, head_parts: Sequence[Part], tail_parts: Sequence[Part]) -> float:
        """All batches of a unit by all workers; the loss sum, not finite where a gradient was not. Parts by type."""
        if self._workers is None:
            sizes = self.config, self.graph.num_relations, self.table.layout.most_rows
            each = self.num_threads // self.num_workers
            kind = partial(QuestionWorker, team=Team(each)) if self.config.by_question else Worker
            self._workers = Workers([kind(*sizes) for _ in range(self.num_workers)], each)
        batches, pools = self._batches(unit, edges), self._pools(edges)
        losses = [0.0] * len(batches)

        def train(worker: Any, n: int) -> None:
            rates = self._rates(unit.tokens + n * len(edges) // len(batches))
            key, batch = key_of(self.seed, unit.index, n), batches[n]()
            head, tail = self.graph.ends[batch.relations[0]].tolist()
            parts = head_parts[head], tail_parts[tail]
            loss, bad = worker.train(batch, pools[head, tail], key, *parts, self.relations, rates)
            losses[n] = math.nan if bad else loss

        met = [part for head, tail in pools for part in (head_parts[head], tail_parts[tail])]
        self._workers.share(len(batches), train, 0 if all(part.sums.any() for part in met) else NUM_ALONE)
        return math.fsum(losses)

    def _rates(self, tokens: int) -> Rates:
        share = self.schedule.learning_rate(tokens)
        return Rates(share * self.config.lr, share * (self.config.relation_lr or self.config.lr))

    def _set_best(self, best: dict[str, Any]) -> None:
        self.best = dict(best)


def require_finite(unit: Unit, loss: float) -> None:
    """Raise NonFinite where a unit's loss is not finite."""
    if not math.isfinite(loss):
        raise NonFinite(
            f"unit {unit.index + 1} (epoch {unit.epoch + 1}, bucket {unit.bucket}): the loss is not finite; "
            "lower graph.lr, or raise graph.n3 or set graph.max_norm. The newest checkpoint is as it was"
        )


def fresh_relations(config: GraphConfig, num_relations: int, seed: int = 0) -> list[Relations]:
    """Operators of every relation, by relation_init: to guess tails and, where relations are reciprocal, heads."""
    rng, tables = np.random.default_rng(seed), []
    for _ in range(1 + config.reciprocal):
        if config.relation_init == "random":
            tables.append(operators.turned(config.operator, config.dim, num_relations, rng))
        elif config.relation_init == "small":
            shape = num_relations, operators.num_parameters(config.operator, config.dim)
            tables.append(config.init_scale * rng.standard_normal(shape, np.float32))
        else:
            tables.append(np.tile(operators.identity(config.operator, config.dim), (num_relations, 1)))
    return [Relations(table, np.zeros_like(table)) for table in tables]


def relation_tensors(relations: Sequence[Relations]) -> dict[str, torch.Tensor]:
    """Relations' parameters and Adagrad sums as live tensors, by side."""
    sides = zip(("tail", "head"), relations, strict=False)
    arrays = {f"{side}.{name}": array for side, r in sides for name, array in vars(r).items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
