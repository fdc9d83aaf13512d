"""Where a node's row is: type t's node n of P partitions is row n // P of the rows of t in partition n % P.

A partition holds the rows of every type that is cut, one type after the other. Types that are not cut (few countries)
stand together in a partition of their own, WHOLE, which is always in memory. Where nodes are bags of features, the rows
are those of the features, and the type is not cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import RecipeError
from puna.graph.buckets import partition_rows
from puna.graph.config import GraphConfig
from puna.graph.graph import NodeType

WHOLE = -1
"""The partition of the types that are not cut."""


@dataclass(frozen=True)
class Layout:
    """counts: rows of each type. whole: which types are not cut; with one partition no type needs to be."""

    counts: tuple[int, ...]
    parts: int
    whole: tuple[bool, ...]

    @classmethod
    def of(cls, config: GraphConfig, types: Sequence[NodeType]) -> "Layout":
        """That of a run on a graph with these types. Raises RecipeError where graph.unpartitioned names another."""
        names = [kind.name for kind in types]
        unknown = [name for name in config.unpartitioned if name not in names]
        if unknown:
            raise RecipeError(
                f"graph.unpartitioned names {unknown[0]!r}, but the graph's types are {', '.join(names)}",
                "Name types of the graph, as in the file given with `puna graph import --types`.",
            )
        cut = config.num_partitions > 1
        whole = tuple(cut and (kind.name in config.unpartitioned or kind.num_features > 0) for kind in types)
        if all(whole):
            raise RecipeError(
                f"graph.num_partitions is {config.num_partitions}, but every type is in graph.unpartitioned or has "
                "features",
                "Set graph.num_partitions to 1, or leave a type out.",
            )
        return cls(tuple(kind.num_rows for kind in types), config.num_partitions, whole)

    @classmethod
    def plain(cls, config: GraphConfig, num_nodes: int) -> "Layout":
        """That of nodes of one type."""
        return cls((num_nodes,), config.num_partitions, (False,))

    @property
    def partitions(self) -> list[int]:
        """All partitions, WHOLE among them where it has a row."""
        return [*range(self.parts), *([WHOLE] if any(self.whole) else [])]

    def rows(self, partition: int) -> int:
        """Rows of a partition."""
        return sum(self.type_rows(kind, partition) for kind in range(len(self.counts)))

    def type_rows(self, kind: int, partition: int) -> int:
        """Nodes of a type in a partition."""
        if self.whole[kind] or partition == WHOLE:
            return self.counts[kind] if self.whole[kind] and partition == WHOLE else 0
        return partition_rows(self.counts[kind], self.parts, partition)

    @property
    def most_rows(self) -> int:
        """Rows of the type that has most of them in a partition."""
        return max(self.type_rows(kind, partition) for kind in range(len(self.counts)) for partition in (0, WHOLE))

    def spans(self, partition: int) -> Iterator[tuple[int, slice]]:
        """Types that have rows in a partition, and which rows these are."""
        sizes = [self.type_rows(kind, partition) for kind in range(len(self.counts))]
        for kind, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
            if size:
                yield kind, slice(end - size, end)

    def span(self, kind: int, partition: int) -> slice:
        """The rows of a type in a partition."""
        return dict(self.spans(partition)).get(kind, slice(0, 0))

    def step(self, kind: int) -> int:
        """How far the numbers of two nodes of a type are apart that stand in rows beside each other."""
        return 1 if self.whole[kind] else self.parts

    def homes(self, kind: int) -> list[int]:
        """Partitions that a type's nodes are in; that at place p begins with the node p."""
        return [WHOLE] if self.whole[kind] else list(range(self.parts))

    def places(self, kind: int, nodes: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
        """Partitions that hold any of these nodes of a type, which of them, and their rows there."""
        step = self.step(kind)
        for first, partition in enumerate(self.homes(kind)):
            own = np.flatnonzero(nodes % step == first)
            if len(own):
                yield partition, own, self.span(kind, partition).start + nodes[own] // step
