"""What a run begins with where another run went before it: that run's vectors and relations, to go on from or to keep.

A row that is to stay has an Adagrad sum of infinity: every step of it is then exactly zero, without a test in a kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from puna.graph.ranking import Scorer
from puna.graph.worker import Relations

Floats = npt.NDArray[np.float32]
STAYS = np.float32(np.inf)


@dataclass(frozen=True)
class Start:
    """The tables of another run. sums: Adagrad sums of one of its partitions."""

    scorer: Scorer
    sums: Callable[[int], Floats]
    freeze: bool

    @property
    def counts(self) -> list[int]:
        """Nodes of each type that the other run knew: the first ones."""
        return self.scorer.graph.counts

    @property
    def num_relations(self) -> int:
        """Relations that the other run knew: the first ones."""
        return self.scorer.graph.num_relations

    def fill(self, kind: int, nodes: npt.NDArray[np.int64], vectors: Floats, sums: Floats) -> None:
        """Write the vectors and Adagrad sums of these nodes of a type."""
        vectors[:] = self.scorer.vectors(nodes, kind)
        if self.freeze:
            sums[:] = STAYS
            return
        for part, own, rows in self.scorer.layout.places(kind, nodes):
            sums[own] = _free(self.sums(part)[rows])

    def fill_relations(self, relations: Sequence[Relations]) -> None:
        """Write the relations that the other run knew."""
        for mine, others in zip(relations, self.scorer.relations, strict=True):
            known = len(others.table)
            mine.table[:known] = others.table
            mine.sums[:known] = STAYS if self.freeze else _free(others.sums)


def _free(sums: Floats) -> Floats:
    """Sums to go on from; what stayed until now begins anew."""
    return np.where(np.isfinite(sums), sums, np.float32(0))
