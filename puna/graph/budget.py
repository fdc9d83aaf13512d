"""What a graph run holds in memory and moves over the disk, before it starts; and partitions that fit a budget.

    partitions   (held x rows of a partition + nodes of types that are not cut) x (4 D + 4)
    workers      for each: 8 D x slots (12 D where one operator serves both sides: its drawn tails are turned) +
                 16 D x batch + 24 x slots + 4 x rows + the gradients of a batch's relations + BLOCK_BYTES;
                 by question: see `puna.graph.questions.worker_bytes`
    edges        24 (28 with weights) x edges of the largest bucket, and 12 (16) more for each edge of the next one,
                 which is made ready where it has no more than NUM_AHEAD; by question EDGE_BYTES in place of 12
    relations    8 x parameters
    evaluation   of EVAL_QUERIES edges with EVAL_NODES nodes at a time
    process      the interpreter, torch, TensorBoard, Numba and compiled kernels

slots = 2 x (batch + drawn negatives of a batch). The largest bucket is not known before buckets are made: SKEW times
the mean of a graph's is taken, and of P buckets instead of P x P where a type is not cut.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from puna.errors import RecipeError
from puna.graph import operators
from puna.graph.buckets import NUM_AHEAD, num_swaps_again, order_buckets
from puna.graph.config import GraphConfig, num_bytes
from puna.graph.graph import Graph, NodeType
from puna.graph.layout import WHOLE, Layout
from puna.graph.questions import EDGE_BYTES, worker_bytes
from puna.graph.ranking import EVAL_NODES, EVAL_QUERIES
from puna.graph.scores import BLOCK_BYTES
from puna.sparse.padding import padded

PROCESS_BYTES = 500_000_000
HELD = 4
"""Partitions in memory under a budget: three that buckets train, and a place for the one that comes or goes."""
MOST_PARTITIONS = 256
DERIVED = ("num_partitions", "held_partitions", "bucket_order")
"""Settings that graph.memory decides."""
SKEW = 1.5


@dataclass(frozen=True)
class Memory:
    """Most bytes that a run holds, by use."""

    partitions: int
    workers: int
    edges: int
    relations: int
    evaluation: int
    process: int

    @property
    def table(self) -> int:
        """What grows with the graph."""
        return self.partitions + self.workers + self.edges + self.relations

    @property
    def total(self) -> int:
        """All of it."""
        return self.table + self.evaluation + self.process


@dataclass(frozen=True)
class Sizes:
    """What of a graph decides how much memory it takes. bucket_edges: of the largest bucket; None: not known yet.
    types: of nodes, where they have any."""

    num_nodes: int
    num_relations: int
    num_edges: int
    weighted: bool
    bucket_edges: int | None = None
    types: tuple[NodeType, ...] = ()

    def layout(self, config: GraphConfig) -> Layout:
        """Where nodes' rows are. Raises RecipeError (see `Layout.of`)."""
        return Layout.of(config, self.types) if self.types else Layout.plain(config, self.num_nodes)

    @classmethod
    def of(cls, graph: Graph, bucket_edges: int | None = None) -> "Sizes":
        """Those of a graph's training edges."""
        train = graph.split("train")
        types = tuple(graph.types)
        return cls(graph.num_nodes, graph.num_relations, train["edges"], train["weighted"], bucket_edges, types)


def memory(config: GraphConfig, sizes: Sizes, num_workers: int, evaluates: bool) -> Memory:
    """The formula above."""
    dim, parts = config.dim, config.num_partitions
    layout = sizes.layout(config)
    rows, largest_type = layout.rows(0), layout.most_rows
    batch = padded(config.batch_edges, config.group_edges)
    slots = 2 * (batch + batch // config.group_edges * (largest_type if config.all_negs else config.num_candidates))
    parameters = operators.num_parameters(config.operator, dim)
    grads = 8 * parameters * min(sizes.num_relations, batch)
    turned = 0 if config.reciprocal else 4 * dim * slots
    worker = 8 * dim * slots + turned + 16 * dim * batch + 24 * slots + 4 * largest_type + grads + BLOCK_BYTES
    if config.by_question:
        worker = worker_bytes(config, largest_type) + grads
    columns = 16 if sizes.weighted else 12
    largest = sizes.bucket_edges
    if largest is None:
        num_buckets = parts if any(layout.whole) else parts**2
        largest = sizes.num_edges if parts == 1 else int(SKEW * sizes.num_edges / num_buckets)
    return Memory(
        partitions=(min(config.held_partitions, parts) * rows + layout.rows(WHOLE)) * (4 * dim + 4),
        workers=num_workers * worker,
        edges=(columns + (EDGE_BYTES if config.by_question else 12)) * largest + columns * min(largest, NUM_AHEAD),
        relations=8 * parameters * sizes.num_relations * (1 + config.reciprocal),
        evaluation=4 * EVAL_NODES * (EVAL_QUERIES + 2 * dim) if evaluates else 0,
        process=PROCESS_BYTES,
    )


def fitted(config: GraphConfig, sizes: Sizes, num_workers: int, evaluates: bool) -> GraphConfig:
    """The settings with partitions, buffer and order that graph.memory asks for; as they are where it is empty.

    The fewest partitions of which HELD fit; graph.num_partitions where that is more than 1. Raises RecipeError where
    nothing fits.
    """
    if not config.memory:
        return config
    budget = num_bytes(config.memory)
    numbers = [config.num_partitions] if config.num_partitions > 1 else range(1, MOST_PARTITIONS + 1)
    for parts in numbers:
        order = "buffered" if parts > HELD else config.bucket_order
        update = {"num_partitions": parts, "held_partitions": min(HELD, max(2, parts)), "bucket_order": order}
        found = config.model_copy(update=update)
        held = memory(found, sizes, num_workers, evaluates)
        if held.total <= budget:
            return found
    told = ", ".join(f"{use} {size / 1e6:,.0f} MB" for use, size in asdict(held).items() if size)
    raise RecipeError(
        f"graph.memory is {config.memory}, but {config.num_partitions if len(numbers) == 1 else MOST_PARTITIONS} "
        f"partitions need {held.total / 1e6:,.0f} MB: {told}",
        "Give more memory, fewer threads (run.num_threads), smaller batches (graph.batch_edges) or fewer negatives.",
    )


def plan(config: GraphConfig, sizes: Sizes, num_workers: int, evaluates: bool) -> dict[str, Any]:
    """What a run by these settings holds and moves: memory by use (bytes), partitions, and bytes read in an epoch.

    As many bytes are written: each partition that was read was trained. Checkpoints are not counted.
    """
    held = memory(config, sizes, num_workers, evaluates)
    order = order_buckets(config.bucket_order, config.num_partitions, np.random.default_rng(0), config.held_partitions)
    reads = config.num_chunks * num_swaps_again(order, min(config.held_partitions, config.num_partitions))
    partition = sizes.layout(config).rows(0) * (4 * config.dim + 4)
    return {
        "num_nodes": sizes.num_nodes,
        "num_relations": sizes.num_relations,
        "num_edges": sizes.num_edges,
        "num_workers": num_workers,
        "num_partitions": config.num_partitions,
        "held_partitions": min(config.held_partitions, config.num_partitions),
        "bucket_order": config.bucket_order,
        "partition_bytes": partition,
        "swaps_per_epoch": reads,
        "read_bytes_per_epoch": reads * partition,
        "written_bytes_per_epoch": reads * partition,
        "memory": asdict(held) | {"total": held.total},
    }


def sentence(told: dict[str, Any], budget: str) -> str:
    """What `plan` says, in one line."""
    parts, held = told["num_partitions"], told["held_partitions"]
    tables = f"{parts} partitions of {told['partition_bytes'] / 1e6:,.0f} MB" if parts > 1 else "one partition"
    moves = (
        f"{held} of them in memory; in {told['bucket_order']} order {told['swaps_per_epoch']} swaps an epoch, "
        f"{told['read_bytes_per_epoch'] / 1e9:,.2f} GB read and as much written"
        if parts > 1
        else "nothing is swapped"
    )
    return f"within {budget}: {tables}, {moves}; at most {told['memory']['total'] / 1e6:,.0f} MB in memory"
