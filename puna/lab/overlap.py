"""The paper's claims on prefetch and the rate limiter, in the simulator of `puna.plan.overlap`. No torch here.

Settings of PyTorch FSDP (Zhao et al. 2023, arXiv 2304.11277, sections 5.2 to 5.4) as far as it gives them. What it does
not give is a constant below, with its source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from puna.plan.overlap import Policy, Timeline, Work, simulate

HOST_BYTES = 0.92 * 250e9
"""Bytes a second between hosts: 2 Tb/s (section 5.1), taken as a host's, of which NCCL reaches 92 %."""
HOST_RANKS = 8
BASE, HOP_INSIDE, HOP_BETWEEN = 8.4e-6, 3.4e-6, 14e-6
"""Seconds of a ring collective's start, and of each hop inside and between hosts: NCCL's own model, protocol Simple."""
ISSUE = 6e-4
"""CPU seconds to issue a unit's forward or backward: 60 kernels at 10 microseconds. Assumed."""
RETRY = 1e-2
"""CPU seconds to give memory back and ask for it again, beside the wait. Assumed."""
MEMORY = 80e9


@dataclass(frozen=True)
class Setting:
    """A model on a cluster, as work by unit, and what is left for gathered parameters and unreduced gradients."""

    name: str
    units: tuple[Work, ...]
    capacity: float = MEMORY


def ring_seconds(num_bytes: float, ranks: int) -> float:
    """Time of a ring all-gather or reduce-scatter of `num_bytes` over hosts of 8 ranks."""
    hosts = ranks // HOST_RANKS
    hops = (ranks - hosts) * HOP_INSIDE + (hosts - 1) * HOP_BETWEEN
    return BASE + hops + num_bytes * (ranks - 1) / ranks / HOST_BYTES


def unit(parameters: float, flops: float, rate: float, ranks: int, *, element: int, passes: int) -> Work:
    """Work of a unit whose forward takes `flops` at `rate` a second, and whose backward takes `passes` forwards."""
    wire, size = ring_seconds(element * parameters, ranks), int(element * parameters)
    return Work(flops / rate, passes * flops / rate, wire, wire, size, size)


def gpt_175b(ranks: int, batch: int, *, recompute: bool = True) -> Setting:
    """minGPT-175B in bf16, a layer a unit (section 5.4): the rate is the reached one, 173 or 186 TFLOPS a GPU."""
    layers, dim, vocabulary, length = 96, 12_288, 50_000, 2_048
    rate, tokens = {1: 173e12, 2: 186e12}[batch], batch * length
    passes = 3 if recompute else 2
    layer = 12.0 * dim**2
    layer_flops = 2 * layer * tokens + 4.0 * tokens * length * dim
    block = unit(layer, layer_flops, rate, ranks, element=2, passes=passes)
    table = float(vocabulary * dim)
    embedding = unit(table, 0, rate, ranks, element=2, passes=passes)
    head = unit(table, 2 * table * tokens, rate, ranks, element=2, passes=2)
    states = 16 * (layers * layer + 2 * table) / ranks
    name = f"GPT-175B, {ranks} GPUs, batch {batch}" + ("" if recompute else ", nothing recomputed")
    return Setting(name, (embedding, *[block] * layers, head), MEMORY - states)


def t5_11b(free: float | None = None) -> Setting:
    """T5-11B in fp32 on 2 hosts, batch 2 of 512 tokens (section 5.3), an encoder or decoder layer a unit.

    Shapes are those of Raffel et al. 2020; the rate is the 27 TFLOPS that section 5.2 shows for 2.28B in fp32. free:
    bytes that activations leave; all but the states where None.
    """
    ranks, tokens, rate = 16, 2 * 512, 27e12
    attention, feed_forward = 4.0 * 1024 * 128 * 128, 2.0 * 1024 * 65_536
    encoder, decoder = attention + feed_forward, 2 * attention + feed_forward
    layers = [encoder] * 24 + [decoder] * 24
    units = tuple(unit(size, 2 * size * tokens, rate, ranks, element=4, passes=2) for size in layers)
    room = MEMORY - 16 * sum(layers) / ranks if free is None else free
    return Setting(f"T5-11B, 16 GPUs, batch 2, {room / 1e9:.0f} GB free", units, room)


def bound(what: str, sizes: Sequence[float], wire: float) -> Setting:
    """40 times units of the relative `sizes`; the wire is busy for `wire` times the computation; memory for all."""
    units = [Work(1e-3 * size, 2e-3 * size, wire * 1e-3 * size, wire * 1e-3 * size) for size in sizes]
    return Setting(what, tuple(units * 40), math.inf)


SETTINGS = (
    gpt_175b(128, 1),
    gpt_175b(512, 1),
    gpt_175b(128, 2),
    gpt_175b(128, 1, recompute=False),
    gpt_175b(128, 2, recompute=False),
    t5_11b(),
    t5_11b(8e9),
    bound("compute bound", [1, 2], 0.4),
    bound("wire bound, equal units", [1, 1], 1.25),
    bound("wire bound, units of 1 and 2", [1, 2], 1.25),
)
VARIANTS = {
    "as recommended": Policy(issue=ISSUE, retry=RETRY),
    "no prefetch": Policy(prefetch=False, issue=ISSUE, retry=RETRY),
    "no limiter": Policy(limit=None, issue=ISSUE, retry=RETRY),
}


def overlap() -> dict[str, Any]:
    """Every setting under every variant."""
    return {"settings": [compare(setting) for setting in SETTINGS]}


def compare(setting: Setting) -> dict[str, Any]:
    """A setting under each variant.

    prefetch_gain, limiter_gain: by what share the rate of steps with it is above that without it.
    """
    found = {name: run(setting, policy) for name, policy in VARIANTS.items()}
    usual = found["as recommended"].seconds
    return {
        "setting": setting.name,
        "variants": {name: _figures(timeline) for name, timeline in found.items()},
        "prefetch_gain": found["no prefetch"].seconds / usual - 1,
        "limiter_gain": found["no limiter"].seconds / usual - 1,
    }


def run(setting: Setting, policy: Policy) -> Timeline:
    """The setting under a policy, with the memory that it has."""
    return simulate(setting.units, replace(policy, capacity=setting.capacity))


def _figures(timeline: Timeline) -> dict[str, Any]:
    return {
        "step_seconds": timeline.seconds,
        "backward_seconds": timeline.backward,
        "gathers_in_flight": timeline.in_flight,
        "num_retries": timeline.num_retries,
        "peak_bytes": timeline.peak_bytes,
    }
