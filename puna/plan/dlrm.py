"""Recommendation models: tables spread over devices, small networks on each, and an exchange between the two.

Hybrid parallelism of DLRM (Naumov et al. 2019): a forward exchange of looked-up vectors, a backward one of their
gradients, an all-reduce of the networks' gradients; a codec may shrink the forward one (Feng et al. 2024,
arXiv 2407.04272).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from puna.plan import collectives
from puna.plan.estimate import Constants
from puna.plan.hardware import Cluster

FLOAT = 4
LAUNCH = 10e-6
KERNELS = 40
"""Kernels of a step that their launch bounds: lookups, layers, interaction, losses, updates."""


@dataclass(frozen=True)
class Dlrm:
    """Tables of `dim` wide rows; widths of the two networks, inputs first."""

    rows: tuple[int, ...]
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]

    @property
    def dense_parameters(self) -> int:
        """Weights and biases of the networks; the top one begins with the products of all pairs of vectors."""
        vectors = len(self.rows) + 1
        top = (vectors * (vectors - 1) // 2 + self.dim, *self.top)
        return sum((i + 1) * o for widths in (self.bottom, top) for i, o in pairwise(widths))

    @property
    def table_bytes(self) -> int:
        """Of all tables."""
        return sum(self.rows) * self.dim * FLOAT


@dataclass(frozen=True)
class Codec:
    """ratio: bytes before over bytes after; encode, decode: bytes/s of what is not compressed."""

    ratio: float
    encode: float
    decode: float


def step(model: Dlrm, cluster: Cluster, batch: int, k: Constants, codec: Codec | None = None) -> dict[str, float]:
    """Seconds of a step by part: forward and backward exchange, all-reduce, kernels, codec; "seconds" is their sum."""
    n = cluster.gpus
    net, link = cluster.network_gbps * 1e9 / 8 * k.network, cluster.gpu.link * 1e9 * k.link
    ranks, near, fast, slow = (np.array(float(x)) for x in (n, min(n, cluster.gpus_per_node), link, net))
    exchanged = len(model.rows) * batch * model.dim * FLOAT / n
    sent = exchanged / codec.ratio if codec else exchanged
    dense = np.array(float(FLOAT * model.dense_parameters))
    operations = 6 * model.dense_parameters * batch / n
    looked_up = 3 * exchanged / (cluster.gpu.bandwidth * 1e12 * k.memory)
    parts = {
        "forward exchange": float(collectives.exchange(np.array(sent), ranks, near, fast, slow, k.hop)),
        "backward exchange": float(collectives.exchange(np.array(exchanged), ranks, near, fast, slow, k.hop)),
        "all-reduce": float(collectives.reduce_all(dense, ranks, near, fast, slow, k.hop)),
        "kernels": KERNELS * LAUNCH + looked_up + operations / (cluster.gpu.peak("fp32") * 1e12 * 0.5),
        "codec": exchanged * (1 / codec.encode + 1 / codec.decode) if codec else 0.0,
    }
    return parts | {"seconds": sum(parts.values())}


def gain(forward_share: float, codec: Codec, exchange_rate: float) -> float:
    """End-to-end speed-up of compressing a forward exchange that took `forward_share` of the step at `exchange_rate`.

    1 / (1 - f + f (1 / ratio + rate (1 / encode + 1 / decode))).
    """
    left = 1 / codec.ratio + exchange_rate * (1 / codec.encode + 1 / codec.decode)
    return 1 / (1 - forward_share * (1 - left))


def shares(parts: dict[str, float]) -> dict[str, Any]:
    """Each part over the step."""
    return {name: value / parts["seconds"] for name, value in parts.items() if name != "seconds"}
