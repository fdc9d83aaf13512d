"""Dual-level bounds: a class a table, by how many of its rows a quantiser would merge, and a factor that falls with the
global step (Feng et al. 2024, arXiv 2407.04272; the decays as in the authors' artifact)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from puna.recsys.config import Decay, ExchangeConfig

Class = Literal["tight", "base", "loose"]
NUM_DROPS = 10
"""Of the decay by steps."""


def factor(decay: Decay, step: int, num_steps: int, first: float) -> float:
    """What bounds are multiplied by in this step: `first` at step 0, 1 from `num_steps` on; never rises."""
    if step >= num_steps:
        return 1.0
    t, fallen = step / num_steps, 1 - 1 / first
    if decay == "step":
        return first * max(1 - math.floor(NUM_DROPS * t) * fallen / NUM_DROPS, 1 / first)
    if decay == "linear":
        return first * (1 - t * fallen)
    if decay == "log":
        left = 1 - math.log(1 + t * (math.e - 1))
        return first * (left * fallen + 1 / first)
    return first


def homogenisation(rows: npt.NDArray[np.float32], bound: float) -> float:
    """H = 1 - distinct rows after quantising / distinct rows before, in [0, 1): how much a bound would merge."""
    if not len(rows):
        return 0.0
    before = np.unique(rows, axis=0)
    error = bound * float(before.max() - before.min())
    if not error > 0 or not math.isfinite(error):
        return 0.0
    after = np.unique(np.rint(before / (2 * error)), axis=0)
    return 1 - len(after) / len(before)


def classify(indices: Sequence[float], rows: Sequence[int]) -> tuple[Class, ...]:
    """The third of the tables with the largest index is tight, that with the smallest loose; of equal ones, more rows
    count as more."""
    order = sorted(range(len(indices)), key=lambda table: (indices[table], rows[table]))
    third = len(order) // 3
    classes: list[Class] = ["base"] * len(order)
    for table in order[:third]:
        classes[table] = "loose"
    for table in order[len(order) - third :]:
        classes[table] = "tight"
    return tuple(classes)


class Bounds:
    """Bounds of every table in every step. Classes are the recipe's, or come from the first batches; see `observe`."""

    def __init__(self, config: ExchangeConfig, rows: Sequence[int]) -> None:
        self.config, self.rows = config, rows
        self.classes: tuple[Class, ...] | None = config.classes or None
        self._sums, self._seen = np.zeros(len(rows)), 0

    @property
    def observing(self) -> bool:
        """Whether the index of the next batch is wanted."""
        return self.config.forward == "bounded" and self.classes is None

    def observe(self, indices: npt.NDArray[np.float64]) -> None:
        """The index of every table in a batch, the same numbers on every rank."""
        self._sums += indices
        self._seen += 1
        if self._seen == self.config.warmup:
            self.classes = classify((self._sums / self._seen).tolist(), self.rows)

    def forward(self, step: int) -> list[float]:
        """Bounds of rows, by table; 0 where they are sent as they are."""
        if self.config.forward != "bounded":
            return [0.0] * len(self.rows)
        of = {"tight": self.config.tight, "base": self.config.base, "loose": self.config.loose}
        times = factor(self.config.decay, step, self.config.decay_steps, self.config.factor)
        if self.classes is None:
            return [self.config.tight] * len(self.rows)
        return [min(0.5, of[name] * times) for name in self.classes]

    def backward(self) -> list[float]:
        """Bounds of gradients, by table."""
        return [self.config.backward_bound if self.config.backward == "bounded" else 0.0] * len(self.rows)

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "classes": list(self.classes) if self.classes else None,
            "sums": self._sums.tolist(),
            "seen": self._seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self.classes = tuple(state["classes"]) if state["classes"] else None
        self._sums, self._seen = np.array(state["sums"]), state["seen"]
