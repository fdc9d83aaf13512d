"""One plan in figures: time by part, memory by kind, speed, power, energy, money, goodput."""

from dataclasses import asdict
from typing import Any

import numpy as np

from puna.plan.constants import Fitted
from puna.plan.estimate import estimate
from puna.plan.fits import ROOM
from puna.plan.footprint import footprint
from puna.plan.goodput import goodput
from puna.plan.layout import Case, columns

WAITING = 0.85
"""Power of a device that waits for communication over that of one that computes (128 to 2,048 H100: -37 % speed, -6 %
power; Fernandez et al. 2024, arXiv 2411.13055)."""
BUSY = 0.94
"""Power of a device that computes over its limit: 658 W of 700 W (same study)."""
EXPOSED = ("tensor", "context", "experts", "sharding", "pipeline", "gradients")


def describe(case: Case, fitted: Fitted) -> dict[str, Any]:
    """The figures of one job. Seconds, GB (1e9 bytes), watts, joules; money in the hardware table's USD."""
    c = columns([case])
    middle, low, high = (float(value[0]) for value in fitted.predict(c))
    parts = {name: float(value[0]) for name, value in estimate(c, fitted.constants).items() if name != "seconds"}
    tokens = case.layout.global_batch * case.layout.seq_len
    gpus = case.cluster.gpus
    rate = tokens / middle / gpus
    model_flops = case.model.flops_per_token(case.layout.seq_len, causal=False, frozen=case.layout.frozen) * rate
    need = {name: float(value[0]) / 1e9 for name, value in footprint(c).items()}
    watts = power(case, parts)
    figures: dict[str, Any] = {
        "model": case.model.name,
        "gpu": case.cluster.gpu.name,
        "gpus": gpus,
        "layout": _layout(case),
        "seconds": middle,
        "low": low,
        "high": high,
        "tokens_per_s_per_gpu": rate,
        "tflops_per_gpu": model_flops / 1e12,
        "mfu": model_flops / (float(c.peak16[0])),
        "exposed": sum(parts[name] for name in EXPOSED) / middle,
        "parts": parts,
        "memory_gb": need | {"capacity": case.cluster.gpu.memory},
        "fits": need["total"] <= ROOM * case.cluster.gpu.memory,
        "power_w": watts,
        "tokens_per_joule": rate / watts if watts else None,
        "usd_per_billion_tokens": 1e9 / (rate * 3600) * case.cluster.gpu.price,
        "goodput": goodput(gpus),
    }
    return figures


def _layout(case: Case) -> dict[str, Any]:
    return asdict(case.layout)


def power(case: Case, parts: dict[str, float]) -> float:
    """Watts of one device: BUSY of its limit while it computes, WAITING of that while it waits for others."""
    total = sum(parts.values())
    waiting = sum(parts[name] for name in (*EXPOSED, "bubble")) / total
    return case.cluster.gpu.power * BUSY * (1 - waiting + WAITING * waiting)


def hours(case: Case, fitted: Fitted, tokens: float) -> dict[str, float]:
    """GPU-hours of a run over `tokens`, with the ends of the 80 % interval; failures are not in it."""
    middle, low, high = (float(value[0]) for value in fitted.predict(columns([case])))
    steps = tokens / (case.layout.global_batch * case.layout.seq_len)
    return {
        name: float(np.ceil(steps)) * value * case.cluster.gpus / 3600
        for name, value in (("gpu_hours", middle), ("low", low), ("high", high))
    }
