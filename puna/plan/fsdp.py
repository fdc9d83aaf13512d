"""What fully sharded data parallelism costs: collectives, bytes, unsharded elements and states of one rank.

Formulas of PyTorch FSDP (Zhao et al. 2023, arXiv 2304.11277, sections 3.2 and 3.3) for PyTorch's `fully_shard`, which
cuts every parameter on dim 0 and pads it there to a multiple of the ranks. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Reshard = Literal["all", "inner", "none"]
"""Units freed after their forward: all; all but the last, which backward needs first; none (grad-op)."""
Prefetch = Literal["none", "backward", "both"]
"""When the next unit is gathered early: never; in backward (PyTorch's default); in forward too."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together and whose gradients are reduced together."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    def elements(self, ranks: int = 1) -> int:
        """Elements over `ranks` ranks, with the rows that pad dim 0 of every parameter to a multiple of them."""
        return sum(-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in self.shapes)


@dataclass(frozen=True)
class Sharding:
    """How units are spread: one copy of them is cut over `shard` ranks (F), and there are `replicas` copies (W / F).

    encloses: the last unit's forward encloses that of the others, so that it is gathered first and freed last.
    """

    shard: int
    replicas: int = 1
    reshard: Reshard = "inner"
    prefetch: Prefetch = "backward"
    encloses: bool = False
    param_bytes: int = 4  # of an element that is gathered
    reduce_bytes: int = 4  # of a gradient that is reduced

    def gathered_again(self, num_units: int) -> int:
        """Units, the first ones, that backward has to gather because they were freed after their forward."""
        return {"all": num_units, "inner": num_units - 1, "none": 0}[self.reshard]


@dataclass(frozen=True)
class Traffic:
    """Collectives that one rank takes part in, and the bytes that it sends."""

    all_gathers: int
    reduce_scatters: int
    all_reduces: int
    bytes: float

    @classmethod
    def total(cls, parts: "Sequence[Traffic]") -> "Traffic":
        """The sum over micro-steps."""
        return cls(
            sum(part.all_gathers for part in parts),
            sum(part.reduce_scatters for part in parts),
            sum(part.all_reduces for part in parts),
            sum(part.bytes for part in parts),
        )


def ring_bytes(operation: Literal["gather", "reduce", "all_reduce"], num_bytes: int, ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends in a ring collective over a whole tensor of `num_bytes`.

    n (k - 1) / k for an all-gather or a reduce-scatter, twice that for an all-reduce, which is one after the other.
    """
    return (2 if operation == "all_reduce" else 1) * num_bytes * (ranks - 1) / ranks


def micro_step(units: Sequence[Unit], sharding: Sharding, *, reduces: bool = True, gathered: bool = False) -> Traffic:
    """Traffic of a forward and a backward.

    With M bytes in N units, F > 1 and one dtype: 2N, 2N - 1 or N all-gathers and N reduce-scatters; 3M (F - 1) / F
    bytes in full shard, 2M (F - 1) / F in grad-op; with W / F copies N all-reduces and 2 (M / F) (W - F) / W bytes
    more. reduces: whether gradients are reduced (not in a micro-step that only accumulates). gathered: whether the
    micro-step before has left all units gathered.
    """
    forward = [] if gathered else list(units)
    backward = list(units[: sharding.gathered_again(len(units))])
    gathers = [*forward, *backward] if sharding.shard > 1 else []
    scatters = list(units) if reduces and sharding.shard > 1 else []
    sums = list(units) if reduces and sharding.replicas > 1 else []
    elements = {unit.name: unit.elements(sharding.shard) for unit in units}
    sent = [ring_bytes("gather", elements[u.name] * sharding.param_bytes, sharding.shard) for u in gathers]
    sent += [ring_bytes("reduce", elements[u.name] * sharding.reduce_bytes, sharding.shard) for u in scatters]
    pieces = [elements[u.name] // sharding.shard * sharding.reduce_bytes for u in sums]
    sent += [ring_bytes("all_reduce", piece, sharding.replicas) for piece in pieces]
    return Traffic(len(gathers), len(scatters), len(sums), sum(sent))


def peak_unsharded(units: Sequence[Unit], sharding: Sharding) -> int:
    """Most elements that are gathered, or being gathered, at one time.

    The two largest neighbours where the next unit is prefetched, the largest alone where it is not, everything where
    nothing is freed after forward; and the enclosing unit throughout (section 3.2.1: O(sum / F + max)).
    """
    sizes = [unit.elements(sharding.shard) for unit in units]
    if sharding.reshard == "none":
        return sum(sizes)
    throughout, chain = (sizes[-1], sizes[:-1]) if sharding.encloses else (0, sizes)
    pairs = [a + b for a, b in pairwise(chain)] if sharding.prefetch != "none" else []
    return throughout + max(chain + pairs)


def state_bytes(units: Sequence[Unit], sharding: Sharding, *, num_moments: int = 2, master_bytes: int = 4) -> int:
    """Bytes of the parameters, gradients and optimiser moments that one rank keeps, its padding included."""
    return (2 + num_moments) * master_bytes * sum(unit.elements(sharding.shard) for unit in units) // sharding.shard
