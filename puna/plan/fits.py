"""What does not fit: capacity, need and gap by kind, and the cheapest ways out with their price.

The planner and a run that was refused memory say it in the same words: `sentence`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from puna.plan.constants import Fitted
from puna.plan.estimate import estimate
from puna.plan.footprint import KINDS, footprint
from puna.plan.layout import Case, columns
from puna.plan.workload import PlanError

NUM_REMEDIES = 3
MOST_AT_ONCE = 3
ROOM = 0.95
"""Share of a device's memory that a plan may fill: the allocator's slack and the driver's context take the rest."""

Change = tuple[str, str, dict[str, Any]]
"""What turns (only one change of a kind at a time), the change in words, and the settings it sets."""


def shortfall(case: Case) -> dict[str, Any]:
    """What a job needs by kind beside what a device has; see `gap`."""
    need = {name: float(value[0]) / 1e9 for name, value in footprint(columns([case])).items()}
    return gap({name: need[name] for name in KINDS}, case.cluster.gpu.memory, ROOM)


def gap(by_kind_gb: Mapping[str, float], capacity_gb: float, room: float = 1.0) -> dict[str, Any]:
    """GB needed by kind and in all, what there is, what of it may be filled, and what is missing (0 where it fits)."""
    need = sum(by_kind_gb.values())
    return {
        "capacity_gb": capacity_gb,
        "usable_gb": room * capacity_gb,
        "need_gb": need,
        "gap_gb": max(0.0, need - room * capacity_gb),
        "by_kind_gb": dict(by_kind_gb),
    }


def remedies(case: Case, fitted: Fitted) -> list[dict[str, Any]]:
    """The cheapest changes that make a job fit; two or three at a time where fewer do not do.

    Of each: the change, its price in device time of a step (what is paid) and in step time (what is waited), as shares
    of what the job would take if it fitted, and GB then.
    """
    found: list[dict[str, Any]] = []
    for count in range(1, MOST_AT_ONCE + 1):
        if len(found) < NUM_REMEDIES:
            changes = [_together(some) for some in combinations(_changes(case), count) if _differ(some)]
            found += _priced(case, changes, fitted)
    return sorted(found, key=lambda option: option["device_time"])[:NUM_REMEDIES]


def _differ(changes: Sequence[Change]) -> bool:
    return len({kind for kind, _, _ in changes}) == len(changes)


def _together(changes: Sequence[Change]) -> Change:
    kinds, words, settings = zip(*changes, strict=True)
    return ", ".join(kinds), " and ".join(words), {key: value for some in settings for key, value in some.items()}


def _priced(case: Case, changes: Sequence[Change], fitted: Fitted) -> list[dict[str, Any]]:
    """Those of the changes under which the job is possible and fits."""
    possible = [(words, other) for words, other in _changed(case, changes)]
    if not possible:
        return []
    c = columns([case, *(other for _, other in possible)])
    seconds, need = estimate(c, fitted.constants)["seconds"], footprint(c)["total"]
    fits = need <= ROOM * c.capacity
    paid = seconds * c.n / (seconds[0] * c.n[0]) - 1
    return [
        {
            "change": words,
            "device_time": float(paid[place]),
            "step_time": float(seconds[place] / seconds[0]) - 1,
            "need_gb": float(need[place]) / 1e9,
        }
        for place, (words, _) in enumerate(possible, 1)
        if fits[place]
    ]


def _changed(case: Case, changes: Sequence[Change]) -> Iterator[tuple[str, Case]]:
    """The job after each change that is possible; data-parallel ranks fill what the other degrees leave."""
    for _, words, settings in changes:
        cluster = replace(case.cluster, gpus=settings.get("gpus", case.cluster.gpus))
        layout = replace(case.layout, **{key: value for key, value in settings.items() if key != "gpus"})
        cut = layout.tp * layout.pp * layout.cp
        layout = replace(layout, dp=max(1, cluster.gpus // cut))
        try:
            layout.check(case.model, cluster)
        except PlanError:
            continue
        yield words, Case(case.model, cluster, layout)


def _changes(case: Case) -> Iterator[Change]:
    """Single settings, each with what it is now."""
    old = case.layout
    for kind in ("selective", "full"):
        if kind != old.recompute:
            yield "recompute", f"recompute {kind} instead of {old.recompute}", {"recompute": kind}
    for kind in ("zero1", "zero2", "zero3"):
        if kind != old.sharding:
            yield "sharding", f"sharding {kind} instead of {old.sharding}", {"sharding": kind, "shard_group": 0}
    for size in _smaller(old.micro_batch):
        yield "micro-batch", f"micro-batch {size} instead of {old.micro_batch}", {"micro_batch": size}
    for axis in ("tp", "pp", "cp"):
        now = getattr(old, axis)
        for factor in (2, 4, 8):
            yield axis, f"{axis} {now * factor} instead of {now}", {axis: now * factor}
    for factor in (2, 4, 8, 16):
        gpus = case.cluster.gpus * factor
        yield "gpus", f"{gpus} GPUs instead of {case.cluster.gpus}", {"gpus": gpus}


def _smaller(size: int) -> list[int]:
    return [n for n in range(1, size) if size % n == 0]


def sentence(short: Mapping[str, Any], options: Sequence[Mapping[str, Any]]) -> str:
    """The report in words. A price that is not known is None in `device_time`."""
    kinds = sorted(short["by_kind_gb"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {_gb(value)}" for name, value in kinds if value >= 0.005 * short["need_gb"])
    there = f"{_gb(short['capacity_gb'])} GB"
    if short["usable_gb"] < short["capacity_gb"]:
        there += f", of which {_gb(short['usable_gb'])} may be filled"
    need, missing = _gb(short["need_gb"]), _gb(short["gap_gb"])
    return f"Does not fit: needs {need} GB of {there}; {missing} GB too many. By kind: {parts}. {advice(options)}"


def advice(options: Sequence[Mapping[str, Any]]) -> str:
    """The ways out in words."""
    if not options:
        return "Nothing tried helps: take larger devices, or a smaller model."
    ways = "; ".join(f"({place}) {option['change']}: {_price(option)}" for place, option in enumerate(options, 1))
    known = all(option["device_time"] is not None for option in options)
    order = (
        "the cheapest first" if known else "the mildest first; this machine was not measured, so prices are not known"
    )
    return f"What helps, {order}: {ways}."


def _price(option: Mapping[str, Any]) -> str:
    then = f"{_gb(option['need_gb'])} GB"
    if option["device_time"] is None:
        return then
    waited = (
        "" if np.isclose(option["step_time"], option["device_time"]) else f" and {option['step_time']:+.0%} step time"
    )
    return f"{option['device_time']:+.0%} device time{waited}, {then}"


def _gb(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
