"""The sentence about a job that does not fit: capacity, need and gap by kind, and the cheapest ways out."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from puna.plan.constants import Fitted
from puna.plan.estimate import estimate
from puna.plan.footprint import KINDS, footprint
from puna.plan.layout import Case, Layout, columns
from puna.plan.workload import PlanError

NUM_REMEDIES = 3


def shortfall(case: Case) -> dict[str, Any]:
    """GB by kind, what the device has, and what is missing."""
    need = {name: float(value[0]) / 1e9 for name, value in footprint(columns([case])).items()}
    return {
        "capacity_gb": case.cluster.gpu.memory,
        "need_gb": need["total"],
        "gap_gb": max(0.0, need["total"] - case.cluster.gpu.memory),
        "by_kind_gb": {name: need[name] for name in KINDS},
    }


def remedies(case: Case, fitted: Fitted) -> list[dict[str, Any]]:
    """Changes that make it fit, the fastest first: what, its price in step time, GB then."""
    before = float(estimate(columns([case]), fitted.constants)["seconds"][0])
    options: list[dict[str, Any]] = []
    for text, other in [*((text, replace(case, layout=layout)) for text, layout in _changes(case)), *_larger(case)]:
        try:
            other.layout.check(other.model, other.cluster)
        except PlanError:
            continue
        c = columns([other])
        need = float(footprint(c)["total"][0]) / 1e9
        if need <= case.cluster.gpu.memory:
            price = float(estimate(c, fitted.constants)["seconds"][0]) / before - 1
            options.append({"change": text, "step_time": price, "need_gb": need})
    return sorted(options, key=lambda option: option["step_time"])[:NUM_REMEDIES]


def _changes(case: Case) -> list[tuple[str, Layout]]:
    old = case.layout
    found = [(f"recompute {kind}", replace(old, recompute=kind)) for kind in ("selective", "full")]
    found += [(f"sharding {kind}", replace(old, sharding=kind)) for kind in ("zero1", "zero2", "zero3")]
    found += [(f"micro-batch {n}", replace(old, micro_batch=n)) for n in _smaller(old.micro_batch)]
    for factor in (2, 4, 8):
        if old.dp % factor == 0:
            found.append((f"tp {old.tp * factor}", replace(old, tp=old.tp * factor, dp=old.dp // factor)))
            found.append((f"pp {old.pp * factor}", replace(old, pp=old.pp * factor, dp=old.dp // factor)))
            found.append((f"cp {old.cp * factor}", replace(old, cp=old.cp * factor, dp=old.dp // factor)))
    combined = replace(old, recompute="full", sharding="zero3", micro_batch=1)
    return [*found, ("recompute full, sharding zero3, micro-batch 1", combined)]


def _larger(case: Case) -> Iterator[tuple[str, Case]]:
    """More devices, everything sharded over them, all blocks recomputed."""
    for factor in (2, 4, 8, 16):
        cluster = replace(case.cluster, gpus=case.cluster.gpus * factor)
        layout = replace(
            case.layout, dp=case.layout.dp * factor, sharding="zero3", shard_group=0, recompute="full", micro_batch=1
        )
        yield (
            f"{cluster.gpus} GPUs with sharding zero3, recompute full, micro-batch 1",
            Case(case.model, cluster, layout),
        )


def _smaller(size: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32) if n < size and size % n == 0]


def sentence(short: dict[str, Any], options: list[dict[str, Any]]) -> str:
    """The report in words; the trainer prints the same when a device runs out of memory."""
    kinds = ", ".join(f"{name} {value:.1f}" for name, value in short["by_kind_gb"].items() if value >= 0.05)
    head = (
        f"Does not fit: {short['need_gb']:.1f} GB of {short['capacity_gb']:.1f} GB, {short['gap_gb']:.1f} GB too many "
        f"({kinds})."
    )
    if not options:
        return f"{head} Nothing tried helps: take larger devices."
    ways = "; ".join(f"{o['change']} ({o['step_time']:+.0%} step time, {o['need_gb']:.1f} GB)" for o in options)
    return f"{head} What helps, the cheapest first: {ways}."
