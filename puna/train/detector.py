"""From statistics to a state: documented rules, calm -> watch -> alarm, with the evidence. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from puna.train.config import HealthConfig

State = Literal["calm", "watch", "alarm"]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """One rule that fired: on which tensor ("" for the whole run), on what value, against which threshold."""

    tensor: str
    layer: str
    rule: str
    statistic: str
    value: float
    threshold: float


@dataclass(frozen=True)
class Status:
    """What the detector thinks at a step; score: largest alarm value as a multiple of its threshold (1: at alarm)."""

    state: State = "calm"
    step: int = 0
    evidence: tuple[Evidence, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Reading:
    """What one look before an update came to. Arrays are by tensor, in the order of `names`; NaN: nothing to tell."""

    step: int
    names: tuple[str, ...]
    layers: tuple[str, ...]
    statistics: Mapping[str, Numbers]  # by statistic
    ages: npt.NDArray[np.int64]  # steps that Adam has taken on each tensor since its start or reset
    settled: npt.NDArray[np.bool_]  # past 3 / (1 - b1) steps: r is no longer +-1 by construction
    loss: float | None = None
    grad_norm: float | None = None
    companions: Mapping[str, float] = field(default_factory=dict)  # max_logit, z: newest values, where they are given
    status: Status = Status()


class Detector:
    """Turns readings into a status; its memory (running medians, streaks) is part of a checkpoint."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.status = Status()

    def judge(self, reading: Reading) -> Status:
        """The status after one more reading."""
        return self.status

    def announce(self, step: int) -> None:
        """The rate, the batch or the data change at this step on purpose: thresholds are wider for a while."""

    def forget(self, names: tuple[str, ...]) -> None:
        """These tensors were reset: their running figures begin anew."""

    def numbers(self) -> dict[str, Any]:
        """Everything the detector remembers, as JSON."""
        return {}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
