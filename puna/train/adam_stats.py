"""Statistics of Adam's state, before it steps: sampled coordinates, sums that add across shards, what they come to."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

STATISTICS = (
    "g_rms",
    "stall",
    "below_eps",
    "u_rms",
    "f9",
    "bc",
    "surprise",
    "lag_cosine",
    "descent_cosine",
    "update_ratio",
    "stable_rms",
)


@dataclass
class Watched:
    """A tensor under watch and where it stands: `group` is the live parameter group of `optimizer`."""

    name: str
    layer: str
    parameter: nn.Parameter
    optimizer: Optimizer
    group: dict[str, Any]
