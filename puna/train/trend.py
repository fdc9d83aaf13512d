"""What is usual for a number that is seen once a step: exponential mean and variance, median and its deviation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

TINY = 1e-6
NORMAL = 1.4826  # deviations of a normal number in one median absolute deviation


@dataclass
class Trend:
    """Exponential mean and variance of a number, begun with the plain ones of the first `warmup` values."""

    alpha: float = 0.97
    warmup: int = 25
    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return len(self.first) >= self.warmup

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)

    def z(self, value: float) -> float:
        """How many deviations `value` is above the mean; 0 during the warm-up."""
        return (value - self.mean) / (self.deviation + TINY) if self.ready else 0.0

    def add(self, value: float) -> None:
        """Take in one more value."""
        if self.ready:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * value
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (value - self.mean) ** 2
            return
        self.first.append(value)
        if self.ready:
            self.mean = sum(self.first) / self.warmup
            self.variance = sum((x - self.mean) ** 2 for x in self.first) / self.warmup


def deviations(value: float, usual: Sequence[float], min_scale: float) -> float:
    """How far `value` is above the median of usual ones, in scaled median absolute deviations.

    min_scale: least deviation that counts, as a share of the median; a number that hardly moves has no spikes of noise.
    """
    middle = median(usual)
    scale = NORMAL * median(abs(x - middle) for x in usual)
    return (value - middle) / max(scale, min_scale * abs(middle), TINY)
