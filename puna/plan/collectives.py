"""Seconds of collectives on a two-level network, for many groups at once.

A group of n ranks with k of them in each of n / k nodes (or racks): inside, every rank has a fast link; between nodes,
a node's ranks of the group share the network cards beside them. A collective takes a start, a hop for every step of its
ring or tree, and its bytes over the slower of the two bandwidths; the fastest protocol is taken. Latencies, shares and
caps are those of NCCL's tuning model (src/graph/tuning.cc); `hop` multiplies every hop, for switches and neighbours
under load.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Protocol:
    """Start and hops in seconds, the share of the bandwidth, and the most bytes/s between nodes; tree 0: none."""

    start: float
    ring: float
    ring_net: float
    tree: float
    tree_net: float
    share: float
    cap: float = np.inf


PROTOCOLS = (
    Protocol(6.7e-6, 0.6e-6, 2.7e-6, 0.6e-6, 5.0e-6, 0.5, 35e9),  # LL
    Protocol(14e-6, 1.9e-6, 4.0e-6, 0.0, 0.0, 0.92),  # LL128; its trees are left out: measured ones are slower
    Protocol(8.4e-6, 3.4e-6, 14e-6, 4.0e-6, 14e-6, 1.0),  # Simple
)


def bandwidth(n: Array, k: Array, link: Array, net: Array) -> Array:
    """Bytes/s of a ring: the links inside, or the network cards of the k ranks a node has in it, the slower one."""
    return np.where(n <= k, link, np.minimum(link, k * net))


def gather(size: Array, n: Array, k: Array, link: Array, net: Array, hop: float = 1.0) -> Array:
    """All-gather or reduce-scatter, by a ring, of a whole tensor of `size` bytes."""
    nodes = np.maximum(1.0, n / k)
    moved = size * (n - 1) / n
    rate = bandwidth(n, k, link, net)
    times = [
        p.start + ((n - nodes) * p.ring + (nodes - 1) * p.ring_net) * hop + moved / _capped(rate, p, nodes)
        for p in PROTOCOLS
    ]
    return np.where(n > 1, np.minimum.reduce(times), 0.0)


def reduce_all(size: Array, n: Array, k: Array, link: Array, net: Array, hop: float = 1.0) -> Array:
    """All-reduce of `size` bytes: the faster of a ring, twice a gather, and of a tree between nodes."""
    nodes = np.maximum(1.0, n / k)
    moved = 2 * size * (n - 1) / n
    rate = bandwidth(n, k, link, net)
    inside, depth = np.minimum(n, k) - 1, np.log2(nodes)
    times = [2 * gather(size, n, k, link, net, hop)]
    times += [
        p.start + 2 * (inside * p.tree + depth * p.tree_net) * hop + moved / _capped(rate, p, nodes)
        for p in PROTOCOLS
        if p.tree
    ]
    return np.where(n > 1, np.minimum.reduce(times), 0.0)


def _capped(rate: Array, protocol: Protocol, nodes: Array) -> Array:
    return np.where(nodes > 1, np.minimum(rate * protocol.share, protocol.cap), rate * protocol.share)


def exchange(size: Array, n: Array, k: Array, link: Array, net: Array, hop: float = 1.0) -> Array:
    """All-to-all of `size` bytes held by each rank: what leaves the node goes through the rank's own card."""
    inside = size * (np.minimum(n, k) - 1) / n / link
    outside = size * np.maximum(0, n - k) / n / net
    return np.where(n > 1, PROTOCOLS[0].start + (n - 1) * PROTOCOLS[0].ring * hop + np.maximum(inside, outside), 0.0)
