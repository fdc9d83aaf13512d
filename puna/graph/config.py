"""Settings of a graph run: the `graph` section of a recipe. Without torch, so that a planner can read them."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from puna.train.config import Section, setting

Operator = Literal["none", "translation", "diagonal", "linear", "affine", "complex_diagonal", "rotation"]
Comparator = Literal["dot", "cos", "l2", "squared_l2"]
Loss = Literal["ranking", "logistic", "softmax", "self_adversarial"]
BucketOrder = Literal["random", "affinity", "outside_in", "inside_out", "buffered"]
Sampling = Literal["uniform", "prevalence"]
Size = Literal["given", "auto"]
TypeNames = Annotated[tuple[str, ...], Field(strict=False)]

RelationInit = Literal["identity", "random", "small"]
Products = Literal["fp32", "bf16"]
PAIRED = ("complex_diagonal", "rotation")
"""Operators that read a vector as real parts, then imaginary parts."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B")


def num_bytes(text: str) -> int:
    """Bytes of a size such as 4GB or 1.5 MiB. Raises ValueError where it is none."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(text)
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


class GraphConfig(Section):
    """A graph model and its training; rates follow `schedule`, of which tokens are edges."""

    size: Size = setting(
        "given",
        "auto: dim, batch_edges, num_batch_negs, num_uniform_negs, epochs, lr and partitions follow from the graph's "
        "nodes and edges, where no flag sets them",
    )
    dim: int = setting(100, "numbers in the vector of a node", ge=1)
    operator: Operator = setting(
        "complex_diagonal",
        "what a relation does to a node; diagonal with dot: DistMult; complex_diagonal with dot: ComplEx; linear with "
        "dot: RESCAL; translation: TransE; rotation: RotatE",
    )
    comparator: Comparator = setting("dot", "score of two vectors; l2 and squared_l2 are minus a distance")
    bias: bool = setting(
        False, "the first number of a vector is added to its scores and kept out of the comparator and its norms"
    )
    reciprocal: bool = setting(
        True,
        "true: each relation has two operators, one for each side that is guessed, and a batch mixes relations "
        "(PBG's dynamic relations); false: one operator, on the tail, and a batch is of one relation",
    )
    loss: Loss = setting("softmax", "of one true edge against its false ones; summed over edges and both sides")
    margin: float = setting(0.1, "of the ranking and self_adversarial losses")
    temperature: float = setting(1.0, "self_adversarial: how sharply hard negatives are preferred", ge=1e-3)
    n3: float = setting(
        0.0,
        "weight of the cubed moduli of head, relation and tail (N3), for each guess of an edge (reciprocal: two)",
        ge=0,
    )
    init_scale: float = setting(1e-3, "deviation of fresh vectors", gt=0)
    relation_init: RelationInit = setting(
        "identity",
        "fresh relations: identity, as PBG; random: each turns vectors by angles (diagonal: signs) of its own, for "
        "relations that lead back and forth, where from the identity every node would first be its own best answer; "
        "small: drawn as fresh nodes are, so that both grow together (Lacroix et al. 2018)",
    )
    max_norm: float = setting(0.0, "longest vector; longer ones are shortened when read; 0: no limit", ge=0)

    epochs: int = setting(10, "times that every edge is trained on", ge=1)
    batch_edges: int = setting(1000, "edges of one update by one worker", "edges", ge=1)
    num_batch_negs: int = setting(
        50, "edges of a chunk: the other heads (tails) of its chunk are negatives of an edge; 0: none", "nodes", ge=0
    )
    num_uniform_negs: int = setting(50, "negatives drawn evenly from the partition, for each side", "nodes", ge=0)
    num_prevalence_negs: int = setting(
        0, "negatives drawn as often as nodes occur in edges, for each side", "nodes", ge=0
    )
    share_negs: int = setting(
        1, "chunks that share a draw of uniform and prevalence negatives; 0: all of a batch", "chunks", ge=0
    )
    all_negs: bool = setting(False, "every node of the partition is a negative, in place of the other three")
    products: Products = setting(
        "fp32",
        "dtype of what scores and their gradients are multiplied in where edges are trained by question (all_negs with "
        "softmax and dot); bf16 is for processors with instructions for it",
    )
    lr: float = setting(0.1, "peak rate of row-wise Adagrad", gt=0)
    relation_lr: float = setting(0.0, "peak rate of the relations' Adagrad; 0: as lr", ge=0)

    memory: str = setting(
        "",
        "most memory of the process, such as 4GB; from it follow num_partitions (where that is 1), held_partitions and "
        "bucket_order; empty: they are as set",
    )
    num_partitions: int = setting(
        1,
        "parts that the nodes are cut into; held_partitions / num_partitions of the table are in memory at once",
        ge=1,
    )
    unpartitioned: TypeNames = setting(
        (), "types of nodes that are not cut into partitions and stay in memory: those with few nodes"
    )
    held_partitions: int = setting(
        2,
        "partitions in memory at once, those that are read or written while others train included",
        "partitions",
        ge=2,
    )
    bucket_order: BucketOrder = setting(
        "inside_out",
        "in which buckets of edges follow each other in an epoch; buffered: so that a buffer of held_partitions, one "
        "of them on its way from or to the disk, is filled anew as seldom as can be",
    )
    num_chunks: int = setting(1, "rounds over all buckets that make an epoch, each with its share of the edges", ge=1)
    patience: int = setting(
        0, "evaluations without a better held-out MRR after which the run ends; 0: it never does", ge=0
    )
    eval_candidates: int = setting(
        0, "nodes that held-out edges are ranked among while training, drawn by eval_sampling; 0: all", "nodes", ge=0
    )
    eval_sampling: Sampling = setting(
        "prevalence", "how candidates are drawn: evenly, or as often as nodes occur in training edges"
    )
    start: str = setting("", "run whose vectors and relations this one begins with; its graph was added to", "path")
    freeze: bool = setting(
        False, "what comes from graph.start stays as it is, and edges without a new node or relation are left out"
    )

    @model_validator(mode="after")
    def _memory_is_a_size(self) -> "GraphConfig":
        if self.memory and not _SIZE.fullmatch(self.memory):
            raise ValueError(
                f"graph.memory is {self.memory!r}, which is no size; write a number and a unit, such as 4GB or 512MiB"
            )
        return self

    @model_validator(mode="after")
    def _frozen_rows_stay(self) -> "GraphConfig":
        if self.freeze and not self.start:
            raise ValueError("graph.freeze is set, but there is no graph.start; name the run that it keeps")
        if self.freeze and self.max_norm:
            raise ValueError(
                "graph.freeze is set, but graph.max_norm shortens vectors as they are read; set graph.max_norm to 0"
            )
        return self

    @model_validator(mode="after")
    def _turns(self) -> "GraphConfig":
        if self.relation_init == "random" and self.operator not in ("diagonal", *PAIRED):
            raise ValueError(
                f"graph.relation_init is random, but {self.operator} has no angles or signs to draw; random is for "
                "diagonal, complex_diagonal and rotation"
            )
        return self

    @model_validator(mode="after")
    def _pairs(self) -> "GraphConfig":
        if self.operator in PAIRED and self.dim % 2:
            raise ValueError(
                f"graph.dim is {self.dim}, but {self.operator} needs pairs of numbers; make graph.dim an even number"
            )
        if self.bias and self.dim < 2:
            raise ValueError(
                "graph.bias takes the first number of a vector, but graph.dim is 1; make graph.dim 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _n3_has_a_meaning(self) -> "GraphConfig":
        if self.n3 and self.operator in ("linear", "affine"):
            raise ValueError(
                f"graph.n3 is set, but {self.operator} has matrices; set graph.n3 to 0, or another operator"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fill_a_batch(self) -> "GraphConfig":
        if self.all_negs:
            return self
        if self.num_batch_negs and self.batch_edges % self.num_batch_negs:
            raise ValueError(
                f"graph.batch_edges is {self.batch_edges}, no multiple of graph.num_batch_negs {self.num_batch_negs}; "
                f"make it {-(-self.batch_edges // self.num_batch_negs) * self.num_batch_negs}"
            )
        if self.num_batch_negs < 2 and not self.num_uniform_negs + self.num_prevalence_negs:
            raise ValueError(
                "graph.num_batch_negs, graph.num_uniform_negs and graph.num_prevalence_negs leave no negative to learn "
                "from; raise one of them, or set graph.all_negs"
            )
        return self

    @model_validator(mode="after")
    def _products_are_of_questions(self) -> "GraphConfig":
        if self.products != "fp32" and not self.by_question:
            raise ValueError(
                f"graph.products is {self.products}, which only training by question can: set graph.all_negs with "
                "graph.loss softmax and graph.comparator dot (no bias, no max_norm, reciprocal), or graph.products fp32"
            )
        return self

    @property
    def by_question(self) -> bool:
        """Whether edges that ask the same share a row of scores: softmax of dot products over every node."""
        plain = self.comparator == "dot" and not self.bias and not self.max_norm
        return self.all_negs and self.reciprocal and self.loss == "softmax" and plain

    @property
    def chunk_edges(self) -> int:
        """Edges that are one another's negatives; without batch negatives the whole batch is one chunk."""
        return self.num_batch_negs if self.num_batch_negs and not self.all_negs else self.batch_edges

    @property
    def group_edges(self) -> int:
        """Edges that share a draw of negatives: whole chunks, at most a batch."""
        chunks = self.batch_edges // self.chunk_edges
        share = min(self.share_negs, chunks) or chunks
        return self.chunk_edges * share

    @property
    def merges(self) -> bool:
        """Whether a group is one chunk: its nodes then stand before the drawn ones, and one product does for both."""
        return not self.all_negs and self.num_batch_negs > 0 and self.group_edges == self.chunk_edges

    @property
    def num_candidates(self) -> int:
        """Nodes that every edge of a group is compared with, for each side: drawn ones, and a merged chunk's own."""
        return self.num_uniform_negs + self.num_prevalence_negs + self.merges * self.num_batch_negs
