"""Seconds of collectives on a two-level network, for many groups at once.

A group of n ranks with k of them in each of n / k nodes (or racks): inside, every rank has a fast link; between nodes, a
node's ranks of the group share the network cards beside them. Latencies are those of NCCL's tuning model (graph/tuning.cc):
a start, and a hop for every step of a ring or a tree; low-latency protocols halve the bandwidth and shorten the hops.
"""

import numpy as np

Array = np.ndarray

START, RING_HOP, NET_HOP, TREE_HOP, TREE_NET_HOP = 8.4e-6, 3.4e-6, 14e-6, 4.0e-6, 14e-6
LOW_START, LOW_RING_HOP, LOW_NET_HOP, LOW_TREE_HOP, LOW_TREE_NET_HOP = 6.7e-6, 0.6e-6, 2.7e-6, 0.6e-6, 5e-6
LOW_SHARE = 0.5
"""Bandwidth of the low-latency protocol: a flag for every word of data."""


def bandwidth(n: Array, k: Array, link: Array, net: Array) -> Array:
    """Bytes/s of a ring: the links inside, or the network cards of the k ranks a node has in it, the slower one."""
    between = k * net
    return np.where(n <= k, link, np.minimum(link, between))


def gather(size: Array, n: Array, k: Array, link: Array, net: Array, hop: Array | float = 1.0) -> Array:
    """All-gather or reduce-scatter of a whole tensor of `size` bytes; hop: multiplier of the network's hops."""
    nodes = np.maximum(1.0, n / k)
    rate = bandwidth(n, k, link, net)
    moved = size * (n - 1) / n
    simple = START + (n - nodes) * RING_HOP + (nodes - 1) * NET_HOP * hop + moved / rate
    low = LOW_START + (n - nodes) * LOW_RING_HOP + (nodes - 1) * LOW_NET_HOP * hop + moved / (rate * LOW_SHARE)
    return np.where(n > 1, np.minimum(simple, low), 0.0)


def reduce_all(size: Array, n: Array, k: Array, link: Array, net: Array, hop: Array | float = 1.0) -> Array:
    """All-reduce of `size` bytes: the faster of a ring and a tree between nodes."""
    nodes = np.maximum(1.0, n / k)
    rate = bandwidth(n, k, link, net)
    ring = 2 * gather(size, n, k, link, net, hop) - START
    depth = np.log2(nodes)
    inside = np.minimum(n, k) - 1
    moved = 2 * size * (n - 1) / n
    tree = START + 2 * (inside * TREE_HOP + depth * TREE_NET_HOP * hop) + moved / (rate * 0.95)
    low = LOW_START + 2 * (inside * LOW_TREE_HOP + depth * LOW_TREE_NET_HOP * hop) + moved / (rate * LOW_SHARE)
    return np.where(n > 1, np.minimum(ring, np.minimum(tree, low)), 0.0)


def exchange(size: Array, n: Array, k: Array, link: Array, net: Array, hop: Array | float = 1.0) -> Array:
    """All-to-all of `size` bytes held by each rank: what leaves the node goes through the rank's own card."""
    inside = size * (np.minimum(n, k) - 1) / n / link
    outside = size * np.maximum(0, n - k) / n / net
    return np.where(n > 1, START + (n - 1) * LOW_NET_HOP * hop + np.maximum(inside, outside), 0.0)
